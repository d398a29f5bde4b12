//! What an event touches, and what is known after it.

use super::*;
use crate::model::{Endpoint, Hints, Protocol, ServicePort, SlicePort};

pub(super) fn name(text: &str) -> NamespacedName {
    NamespacedName::new("default", text)
}

/// A Service with a ClusterIP that ends in this, and ports of these numbers and their names.
pub(super) fn service(text: &str, last: u8, ports: &[u16]) -> Service {
    let port = |&port: &u16| ServicePort {
        name: port.to_string().into(),
        protocol: Protocol::Tcp,
        port,
        node_port: None,
    };
    let ports = ports.iter().map(port).collect();
    Service::new(name(text), vec![[10, 96, 0, last].into()], ports)
}

/// A slice of a Service with one endpoint for these ports.
pub(super) fn slice(text: &str, owner: &str, ports: &[u16]) -> EndpointSlice {
    let port = |port: &u16| SlicePort {
        name: port.to_string().into(),
        protocol: Protocol::Tcp,
        port: 8000,
    };
    EndpointSlice {
        name: name(text),
        service: name(owner),
        family: Family::V4,
        ports: ports.iter().map(port).collect(),
        endpoints: vec![Endpoint::new([10, 244, 0, 1].into())],
        last_change_trigger: None,
    }
}

fn cidr(text: &str) -> ServiceCidr {
    let name = NamespacedName::cluster_scoped(text);
    ServiceCidr { name, cidrs: vec!["10.96.0.0/16".parse().unwrap()] }
}

fn empty() -> State {
    State::new(Settings::default(), NodeFacts::default())
}

fn services<const N: usize>(names: [&str; N]) -> BTreeSet<Contributor> {
    names.map(|text| Contributor::Service(name(text))).into()
}

#[test]
fn a_state_is_complete_when_every_kind_was_listed_or_cannot_be_had() {
    let mut state = empty();
    assert_eq!(state.missing(), Kind::ALL);
    for (number, kind) in Kind::ALL.into_iter().enumerate() {
        assert!(!state.is_complete());
        state.observe(Event::Listing(kind));
        assert!(state.missing().contains(&kind), "a listing that began is none yet");
        state.observe(if number == 0 { Event::Unavailable(kind) } else { Event::Listed(kind) });
        assert_eq!(state.missing(), Kind::ALL[number + 1..]);
    }
    assert!(state.is_complete());
}

#[test]
fn objects_are_counted_by_kind_and_each_once() {
    let mut state = empty();
    let count = |state: &State| Kind::ALL.map(|kind| state.count(kind));
    assert_eq!(count(&state), [0, 0, 0, 1]);
    for last in [1, 1, 2] {
        state.observe(Event::Service(service(&format!("s-{last}"), last, &[80])));
        state.observe(Event::EndpointSlice(slice(&format!("e-{last}"), "s-1", &[80])));
        state.observe(Event::EndpointSlice(slice(&format!("f-{last}"), "s-2", &[80])));
        state.observe(Event::ServiceCidr(cidr(&format!("c-{last}"))));
    }
    assert_eq!(count(&state), [2, 4, 2, 1]);
    state.observe(Event::Gone(Kind::Service, name("s-1")));
    state.observe(Event::Gone(Kind::EndpointSlice, name("e-1")));
    state.observe(Event::Gone(Kind::ServiceCidr, NamespacedName::cluster_scoped("c-1")));
    assert_eq!(count(&state), [1, 3, 1, 1]);
}

#[test]
fn what_a_listing_does_not_name_is_gone_but_not_what_it_names_and_nobody_can_read() {
    let mut state = empty();
    let all = [
        (Kind::Service, ["a", "b", "c"].map(name)),
        (Kind::EndpointSlice, ["a-1", "b-1", "c-1"].map(name)),
        (Kind::ServiceCidr, ["x", "y", "z"].map(NamespacedName::cluster_scoped)),
    ];
    for (number, owner) in ["a", "b", "c"].into_iter().enumerate() {
        state.observe(Event::Service(service(owner, u8::try_from(number).unwrap(), &[80])));
        state.observe(Event::EndpointSlice(slice(&format!("{owner}-1"), owner, &[80])));
        state.observe(Event::ServiceCidr(cidr(["x", "y", "z"][number])));
    }
    state.settle();
    // Of each kind the first is named as it is, the second is named and nobody can read it.
    for (kind, [_, unreadable, _]) in all {
        state.observe(Event::Listing(kind));
        let touched = state.observe(match kind {
            Kind::Service => Event::Service(service("a", 0, &[80])),
            Kind::EndpointSlice => Event::EndpointSlice(slice("a-1", "a", &[80])),
            _ => Event::ServiceCidr(cidr("x")),
        });
        assert!(kind == Kind::ServiceCidr || touched.is_empty(), "{kind} is as it was");
        assert_eq!(state.observe(Event::Unreadable(kind, unreadable)), BTreeSet::new());
        let gone = state.observe(Event::Listed(kind));
        let expected = match kind {
            Kind::ServiceCidr => [Contributor::Node].into(),
            // The Service of the third slice is gone already.
            Kind::EndpointSlice => BTreeSet::new(),
            _ => services(["c"]),
        };
        assert_eq!((gone, state.count(kind)), (expected, 2), "{kind}");
    }
    state.observe(Event::Unreadable(Kind::Node, name("node-1")));
    assert!(!state.has_node());
}

#[test]
fn an_event_that_says_nothing_new_touches_nobody() {
    let mut state = empty();
    let event = || Event::Service(service("web", 1, &[80]));
    assert_eq!(state.observe(event()), services(["web"]));
    let slices = || Event::EndpointSlice(slice("web-1", "web", &[80]));
    assert_eq!(state.observe(slices()), services(["web"]));
    state.settle();
    assert_eq!(state.observe(event()), BTreeSet::new());
    assert_eq!(state.observe(slices()), BTreeSet::new());
    assert!(!state.is_stale());
}

#[test]
fn a_slice_touches_the_services_that_have_it_and_those_that_had() {
    let mut state = empty();
    state.settle();
    let moved = |owner| Event::EndpointSlice(slice("e-1", owner, &[80]));
    assert_eq!(state.observe(moved("a")), BTreeSet::new(), "there is no such Service");
    assert!(!state.is_stale());
    state.observe(Event::Service(service("a", 1, &[80])));
    state.observe(Event::Service(service("b", 2, &[80])));
    assert_eq!(state.observe(moved("b")), services(["a", "b"]));
    assert_eq!(state.observe(moved("c")), services(["b"]));
    assert_eq!(state.observe(moved("a")), services(["a"]));
    let gone = Event::Gone(Kind::EndpointSlice, name("e-1"));
    assert_eq!(state.observe(gone.clone()), services(["a"]));
    assert_eq!(state.observe(gone), BTreeSet::new());
}

#[test]
fn an_endpoint_for_another_port_is_none_for_a_contested_one() {
    let mut state = empty();
    let claim = |text: &str, last, created, ports: &[u16]| {
        let external_ips = vec![[198, 51, 100, 1].into()];
        Event::Service(Service { created, external_ips, ..service(text, last, ports) })
    };
    let frontend = Frontend::Address([198, 51, 100, 1].into(), Protocol::Tcp, 80);
    state.observe(claim("old", 1, 1, &[80, 81]));
    state.observe(claim("young", 2, 2, &[80]));
    state.observe(Event::EndpointSlice(slice("old-1", "old", &[81])));
    assert_eq!(state.owner(frontend), Some(&name("old")), "while nobody can answer");
    let touched = state.observe(Event::EndpointSlice(slice("young-1", "young", &[80])));
    assert_eq!(touched, services(["old", "young"]));
    assert_eq!(state.owner(frontend), Some(&name("young")));
    let touched = state.observe(Event::EndpointSlice(slice("old-1", "old", &[80])));
    assert_eq!(touched, services(["old", "young"]));
    assert_eq!(state.owner(frontend), Some(&name("old")));
}

#[test]
fn the_addresses_of_a_node_are_those_of_its_object_as_far_as_it_has_any() {
    let address = |last: u8| std::net::IpAddr::from([192, 0, 2, last]);
    let facts = |addresses: &[u8]| NodeFacts {
        addresses: addresses.iter().copied().map(address).collect(),
        ..NodeFacts::default()
    };
    let mut state = State::new(Settings::default(), facts(&[1]));
    let addresses = |state: &State| state.node_facts().addresses.clone();
    assert!(!state.has_node());
    assert_eq!(addresses(&state), [address(1)]);
    state.observe(Event::Node(facts(&[])));
    assert!(state.has_node());
    assert_eq!(addresses(&state), [address(1)], "not registered completely");
    state.observe(Event::Node(facts(&[2, 3])));
    assert_eq!(addresses(&state), [address(2), address(3)]);
    let host = HostFacts { addresses: vec![address(4)], interfaces: vec![address(5)] };
    assert_eq!(state.observe(Event::Host(host.clone())), [Contributor::Node].into());
    assert_eq!(state.observe(Event::Host(host)), BTreeSet::new(), "nothing new");
    assert_eq!(addresses(&state), [address(2), address(3)]);
    assert_eq!(state.node_facts().interfaces, [address(5)]);
    // What the configuration says comes first, and once.
    for (first, all) in [(3, vec![3, 2]), (9, vec![9, 2, 3])] {
        state.configure(Settings { node_address: Some(address(first)), ..Settings::default() });
        assert_eq!(addresses(&state), all.into_iter().map(address).collect::<Vec<_>>());
        state.configure(Settings::default());
        assert_eq!(addresses(&state), [address(2), address(3)]);
    }
    // A Node that is away for a moment does not take its addresses along.
    assert_eq!(state.observe(Event::Gone(Kind::Node, name("node-1"))), BTreeSet::new());
    assert!(!state.has_node());
    assert_eq!(addresses(&state), [address(2), address(3)]);
}

#[test]
fn a_node_touches_the_services_that_depend_on_its_zone_or_its_address() {
    let mut state = empty();
    let facts = |zone: &str, last: u8| {
        let addresses = vec![[192, 0, 2, last].into()];
        Event::Node(NodeFacts { zone: Some(zone.into()), addresses, ..NodeFacts::default() })
    };
    state.observe(facts("a", 1));
    for (number, text) in ["plain", "hinted", "restricted"].into_iter().enumerate() {
        let mut service = service(text, u8::try_from(number).unwrap(), &[80]);
        let mut slice = slice(&format!("{text}-1"), text, &[80]);
        match text {
            "hinted" => slice.endpoints[0].hints = Some(Box::new(Hints::default())),
            "restricted" => service.source_ranges = vec!["192.0.2.0/24".parse().unwrap()],
            _ => {}
        }
        state.observe(Event::Service(service));
        state.observe(Event::EndpointSlice(slice));
    }
    let mut with_node = |event, others: BTreeSet<_>| {
        let node = BTreeSet::from([Contributor::Node]);
        assert_eq!(state.observe(event), &node | &others);
    };
    with_node(facts("b", 1), services(["hinted"]));
    with_node(facts("b", 2), services(["restricted"]));
    let leaving = NodeFacts {
        zone: Some("b".into()),
        addresses: vec![[192, 0, 2, 2].into()],
        leaving: true,
        ..NodeFacts::default()
    };
    with_node(Event::Node(leaving), BTreeSet::new());
}

#[test]
fn the_ranges_of_pods_are_lacking_while_the_node_is_to_tell_them_and_does_not() {
    let told =
        NodeFacts { pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()], ..NodeFacts::default() };
    let by_node = || Settings { detect_local: DetectLocal::NodeCidr, ..Settings::default() };
    assert!(State::new(by_node(), NodeFacts::default()).lacks_pod_cidrs());
    assert!(!State::new(by_node(), told.clone()).lacks_pod_cidrs());
    assert!(!State::new(Settings::default(), NodeFacts::default()).lacks_pod_cidrs());
    assert!(!State::new(Settings::default(), told).lacks_pod_cidrs());
}
