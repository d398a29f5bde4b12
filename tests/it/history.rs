//! Histories: what can happen to the proxy, in any order, and what has to come of it in the end.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use nftproxy::model::{
    Endpoint, EndpointSlice, Event, Family, Hints, HostFacts, Kind, NamespacedName, NodeFacts,
    Protocol, Scheduler, Service, ServiceCidr, ServicePort, SessionAffinity, SlicePort,
    TrafficPolicy,
};
use nftproxy::nft::dataplane::{Loopback, Options};
use nftproxy::nft::element::Key;
use nftproxy::nft::fake::FakeKernel;

use nftproxy::nft::rule::InterfaceName;

use nftproxy::reconcile::Proxy;
use nftproxy::settings::{DetectLocal, NodePortAddresses, Settings};
use nftproxy::state::State;
use proptest::prelude::*;

use crate::model::{all_listed, name, node, port, service, settings};

/// What happens to the proxy.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Event(Event),
    /// Other settings, of [`ALL_SETTINGS`].
    Settings(usize),
    /// A listing of a kind begins, names what is there, and ends.
    Relist(Kind),
    Commit,
    /// What nobody uses is removed.
    Collect,
    /// Somebody else takes one of so many elements away, and it is put right.
    Tamper(proptest::sample::Index),
}

const SERVICES: [&str; 4] = ["a", "b", "c", "d"];
/// A small world, so that Services get into each other's way.
const ADDRESSES: [&str; 6] =
    ["10.96.0.1", "10.96.0.2", "fd00:10:96::1", "203.0.113.1", "198.51.100.1", "fd00:203::1"];

fn any_ports() -> impl Strategy<Value = Vec<ServicePort>> {
    let protocol =
        prop_oneof![3 => Just(Protocol::Tcp), 3 => Just(Protocol::Udp), 1 => Just(Protocol::Sctp)];
    let one = (0..2_usize, protocol, 80..82_u16, 30000..30003_u16).prop_map(
        |(name, protocol, number, node_port)| {
            // 30000 stands for "none".
            let node_port = if node_port == 30000 { 0 } else { node_port };
            port(["", "x"][name], protocol, number, node_port)
        },
    );
    proptest::collection::vec(one, 0..3).prop_map(|mut ports| {
        // The API allows each name, each number, and each node port of a protocol once.
        ports.sort_by_key(|p| (p.name.clone(), p.protocol));
        ports.dedup_by_key(|p| (p.name.clone(), p.protocol));
        ports.sort_by_key(|p| (p.port, p.protocol));
        ports.dedup_by_key(|p| (p.port, p.protocol));
        let mut node_ports = BTreeSet::new();
        for port in &mut ports {
            port.node_port = port.node_port.filter(|n| node_ports.insert((*n, port.protocol)));
        }
        ports
    })
}

/// Session affinity, scheduler and source ranges.
fn any_extras() -> impl Strategy<Value = (SessionAffinity, Scheduler, Vec<IpNet>)> {
    let affinity = prop_oneof![
        2 => Just(SessionAffinity::None),
        1 => Just(SessionAffinity::ClientIp { timeout: 10 }),
        1 => Just(SessionAffinity::ClientIp { timeout: 20 }),
    ];
    let scheduler = prop_oneof![
        4 => Just(Scheduler::Random),
        2 => Just(Scheduler::RoundRobin),
        2 => Just(Scheduler::SourceHash),
        1 => Just(Scheduler::Maglev),
    ];
    let ranges = ["10.0.0.0/8", "10.1.0.0/16", "192.0.2.0/24", "fd00::/16", "0.0.0.0/0"];
    let ranges = ranges.map(|range| range.parse::<IpNet>().unwrap());
    (affinity, scheduler, proptest::sample::subsequence(ranges.to_vec(), 0..=2))
}

fn any_service() -> impl Strategy<Value = Service> {
    let addresses = proptest::sample::subsequence(&ADDRESSES[..], 0..=ADDRESSES.len());
    let policy = || prop_oneof![Just(TrafficPolicy::Cluster), Just(TrafficPolicy::Local)];
    let policies = (policy(), policy());
    (0..SERVICES.len(), addresses, any_ports(), 0..3_i64, policies, any_extras()).prop_map(
        |(which, mut addresses, ports, created, policies, extras)| {
            // One ClusterIP of a family.
            if addresses.contains(&"10.96.0.1") {
                addresses.retain(|a| *a != "10.96.0.2");
            }
            Service {
                created,
                internal_traffic_policy: policies.0,
                external_traffic_policy: policies.1,
                session_affinity: extras.0,
                scheduler: extras.1,
                source_ranges: extras.2,
                ..service(SERVICES[which], &addresses, &ports)
            }
        },
    )
}

fn any_hints() -> impl Strategy<Value = Option<Box<Hints>>> {
    let names = |names: [&'static str; 2]| {
        let names: Vec<Box<str>> = names.map(Into::into).into();
        proptest::sample::subsequence(names, 0..=2)
    };
    let hints = (names(["zone-a", "zone-b"]), names(["node-1", "node-2"]));
    proptest::option::weighted(
        0.3,
        hints.prop_map(|(zones, nodes)| Box::new(Hints { zones, nodes })),
    )
}

fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    let weight = prop_oneof![6 => Just(1), 1 => Just(0), 1 => Just(3)];
    let flags = any::<[bool; 4]>();
    (1..8_u8, flags, weight, any_hints()).prop_map(
        |(host, [ready, serving, terminating, local], weight, hints)| {
            let address = [10, 244, 0, host].into();
            Endpoint { address, ready, serving, terminating, local, weight, hints }
        },
    )
}

fn any_slice() -> impl Strategy<Value = EndpointSlice> {
    let endpoints = proptest::collection::vec(any_endpoint(), 0..6);
    let six = proptest::bool::weighted(0.3);
    (0..SERVICES.len(), 0..3_u8, 0..SERVICES.len(), endpoints, six).prop_map(
        |(named_after, number, owner, mut endpoints, six)| {
            let port = |name: &str, protocol| SlicePort { name: name.into(), protocol, port: 8080 };
            // A slice keeps its family, as the API has it.
            let six = six && number == 2;
            if six {
                for endpoint in &mut endpoints {
                    let IpAddr::V4(four) = endpoint.address else { unreachable!() };
                    endpoint.address =
                        format!("fd00:10:244::{}", four.octets()[3]).parse().unwrap();
                }
            }
            EndpointSlice {
                // Mostly of one Service, at times moved to another.
                name: name(&format!("{}-{number}", SERVICES[named_after])),
                service: name(SERVICES[if number == 0 { named_after } else { owner }]),
                family: if six { Family::V6 } else { Family::V4 },
                ports: vec![
                    port("", Protocol::Tcp),
                    port("x", Protocol::Tcp),
                    port("", Protocol::Udp),
                    port("", Protocol::Sctp),
                ],
                endpoints,
                last_change_trigger: None,
            }
        },
    )
}

/// Settings that a changed configuration can bring.
pub(crate) const ALL_SETTINGS: [fn() -> Settings; 5] = [
    settings,
    || Settings { masquerade_all: true, masquerade_mark: 2, ..settings() },
    || Settings { detect_local: DetectLocal::NodeCidr, ..settings() },
    || Settings {
        detect_local: DetectLocal::Interface(InterfaceName::Prefix("veth".into())),
        node_port_addresses: NodePortAddresses::Ranges(vec!["10.0.0.0/8".parse().unwrap()]),
        ..settings()
    },
    || Settings {
        detect_local: DetectLocal::Interface(InterfaceName::Whole("cbr0".into())),
        node_port_addresses: NodePortAddresses::Ranges(vec!["0.0.0.0/0".parse().unwrap()]),
        counters: true,
        loopback: Loopback::NodePorts,
        ..settings()
    },
];

fn any_node() -> impl Strategy<Value = NodeFacts> {
    let addresses: Vec<IpAddr> =
        ["192.0.2.10", "192.0.2.11", "fd00:192::10"].map(|a| a.parse().unwrap()).into();
    let ranges: Vec<IpNet> =
        ["10.244.0.0/24", "fd00:10:244::/64"].map(|range| range.parse().unwrap()).into();
    let zone = prop_oneof![Just(None), Just(Some("zone-a")), Just(Some("zone-b"))];
    let addresses = proptest::sample::subsequence(addresses, 0..=3).prop_shuffle();
    (addresses, proptest::sample::subsequence(ranges, 0..=2), zone, any::<bool>()).prop_map(
        |(addresses, pod_cidrs, zone, leaving)| NodeFacts {
            addresses,
            pod_cidrs,
            zone: zone.map(Into::into),
            leaving,
            ..node()
        },
    )
}

pub(crate) fn any_step() -> impl Strategy<Value = Step> {
    let which = 0..SERVICES.len();
    let cidr = || ServiceCidr {
        name: NamespacedName::cluster_scoped("one"),
        cidrs: ["10.96.0.0/16", "10.96.1.0/24"].map(|cidr| cidr.parse().unwrap()).into(),
    };
    prop_oneof![
        4 => any_service().prop_map(|s| Step::Event(Event::Service(s))),
        6 => any_slice().prop_map(|s| Step::Event(Event::EndpointSlice(s))),
        1 => which.clone().prop_map(|w| Step::Event(Event::Gone(Kind::Service, name(SERVICES[w])))),
        2 => (which, 0..2_u8).prop_map(|(w, n)| {
            Step::Event(Event::Gone(Kind::EndpointSlice, name(&format!("{}-{n}", SERVICES[w]))))
        }),
        1 => any::<bool>().prop_map(move |there| Step::Event(if there {
            Event::ServiceCidr(cidr())
        } else {
            Event::Gone(Kind::ServiceCidr, NamespacedName::cluster_scoped("one"))
        })),
        1 => any_node().prop_map(|node| Step::Event(Event::Node(node))),
        1 => (0..ALL_SETTINGS.len()).prop_map(Step::Settings),
        1 => proptest::sample::select(&Kind::ALL[..]).prop_map(Step::Relist),
        1 => proptest::sample::select(&Kind::ALL[..]).prop_map(|kind| Step::Event(Event::Unavailable(kind))),
        1 => (0..SERVICES.len()).prop_map(|w| Step::Event(Event::Unreadable(Kind::Service, name(SERVICES[w])))),
        1 => any::<proptest::sample::Index>().prop_map(Step::Tamper),
        1 => Just(Step::Collect),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(moved, two)| {
            let mut addresses = vec![IpAddr::from([192, 0, 2, if moved { 200 } else { 10 }])];
            // A family that loses its only address changes rules, for which everything is read back.
            addresses.push("fd00:192::10".parse().unwrap());
            addresses.extend(two.then(|| IpAddr::from([10, 1, 0, 1])));
            let interfaces = addresses.clone();
            Step::Event(Event::Host(HostFacts { addresses, interfaces }))
        }),
        6 => Just(Step::Commit),
    ]
}

/// The elements with the slots of a frontend in sorted order: numbers depend on history, the set of
/// backends does not.
pub(crate) fn normal(kernel: &FakeKernel) -> BTreeMap<String, Vec<String>> {
    let mut content: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut slots: BTreeMap<String, Vec<u16>> = BTreeMap::new();
    for (id, value) in kernel.elements() {
        let (frontend, slot) = match id.key {
            Key::Slot(address, proto, port, slot) => {
                (format!("{} {} {address} {proto} {port}", id.family, id.set), Some(slot))
            }
            Key::NodePortSlot(proto, port, slot) => {
                (format!("{} {} {proto} {port}", id.family, id.set), Some(slot))
            }
            _ => (id.to_string(), None),
        };
        slots.entry(frontend.clone()).or_default().extend(slot);
        content.entry(frontend).or_default().push(value.to_string());
    }
    for (frontend, slots) in slots {
        // Both lists of a frontend are numbered without holes.
        let (cluster, local): (Vec<u16>, Vec<u16>) = slots.into_iter().partition(|s| *s < 32768);
        for (list, first) in [(cluster, 0), (local, 32768)] {
            let numbers = first..first + u16::try_from(list.len()).unwrap();
            assert!(list.iter().copied().eq(numbers), "{frontend}: {list:?}");
        }
    }
    content.values_mut().for_each(|values| values.sort());
    content
}

pub(crate) fn committed(proxy: &mut Proxy<FakeKernel>) {
    let done = proxy.commit().unwrap();
    assert_eq!(done.set_aside, 0);
}

/// A proxy that sees only the final objects, in the order of their names.
pub(crate) fn fresh(objects: &BTreeMap<String, Event>) -> Proxy<FakeKernel> {
    fresh_with(settings(), objects)
}

fn fresh_with(settings: Settings, objects: &BTreeMap<String, Event>) -> Proxy<FakeKernel> {
    let mut proxy = Proxy::new(State::new(settings, node()), FakeKernel::default());
    for event in objects.values().cloned().chain(all_listed()) {
        proxy.observe(event);
    }
    committed(&mut proxy);
    proxy
}

/// What a history leaves to be wanted.
pub(crate) struct Wanted {
    pub(crate) objects: Objects,
    pub(crate) settings: Settings,
}

impl Wanted {
    /// Before it.
    pub(crate) fn new() -> Self {
        Self { objects: Objects::default(), settings: settings() }
    }

    /// Something happens.
    pub(crate) fn observe(&mut self, proxy: &mut Proxy<FakeKernel>, event: Event) {
        self.objects.observe(&event);
        proxy.observe(event);
    }

    /// Settings become those of this number.
    pub(crate) fn configure(&mut self, proxy: &mut Proxy<FakeKernel>, number: usize) {
        self.settings = ALL_SETTINGS[number]();
        proxy.configure(self.settings.clone());
    }

    /// A proxy that sees only this.
    pub(crate) fn fresh(&self) -> Proxy<FakeKernel> {
        fresh_with(self.settings.clone(), &self.objects.0)
    }
}

/// The objects that there are after some events, by kind and name.
#[derive(Debug, Default)]
pub(crate) struct Objects(pub(crate) BTreeMap<String, Event>);

impl Objects {
    pub(crate) fn observe(&mut self, event: &Event) {
        match identity(event) {
            Some((id, true)) => drop(self.0.insert(id, event.clone())),
            Some((id, false)) => drop(self.0.remove(&id)),
            None => {}
        }
    }
}

/// Commits. `rules` is what shaped the rules of the last commit: others are no reason for the kernel to
/// refuse anything, but for everything to be read back.
pub(crate) fn accepted(
    proxy: &mut Proxy<FakeKernel>,
    rules: &mut Options,
) -> Result<(), TestCaseError> {
    let before = std::mem::replace(rules, proxy.state().options());
    let done = proxy.commit().unwrap();
    prop_assert!(!done.adopted || before != *rules, "the fake kernel refused a transaction");
    prop_assert_eq!(done.set_aside, 0);
    Ok(())
}

pub(crate) fn kind_of(event: &Event) -> Option<Kind> {
    Some(match event {
        Event::Service(_) => Kind::Service,
        Event::EndpointSlice(_) => Kind::EndpointSlice,
        Event::ServiceCidr(_) => Kind::ServiceCidr,
        Event::Node(_) => Kind::Node,
        _ => return None,
    })
}

pub(crate) fn identity(event: &Event) -> Option<(String, bool)> {
    Some(match event {
        Event::Service(s) => (format!("Service {}", s.name), true),
        Event::EndpointSlice(s) => (format!("EndpointSlice {}", s.name), true),
        Event::ServiceCidr(c) => (format!("ServiceCIDR {}", c.name), true),
        Event::Host(_) => ("host".into(), true),
        Event::Node(_) => ("node".into(), true),
        Event::Gone(kind, name) => (format!("{kind} {name}"), false),
        _ => return None,
    })
}
