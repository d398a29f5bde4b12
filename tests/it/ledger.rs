//! Any order of events with the same final objects ends in the same table as a fresh start, every
//! transaction on the way is one the kernel accepts, and a restart finds nothing to do.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use nftproxy::model::{
    Endpoint, EndpointSlice, Event, Family, Hints, HostFacts, Kind, NamespacedName, NodeFacts,
    Protocol, Scheduler, Service, ServiceCidr, ServicePort, SessionAffinity, SlicePort,
    TrafficPolicy,
};
use nftproxy::nft::dataplane::Options;
use nftproxy::nft::element::{Backend, ElementId, Key, Value};
use nftproxy::nft::fake::{Failure, FakeKernel};
use nftproxy::nft::kernel::{Applied, ApplyError, Kernel, LoadError, Loaded, Refusal};
use nftproxy::nft::names::SetName;
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::nft::rule::InterfaceName;
use nftproxy::nft::text;
use nftproxy::nft::transaction::{Op, Transaction};
use nftproxy::reconcile::Proxy;
use nftproxy::settings::{DetectLocal, NodePortAddresses, Settings};
use nftproxy::state::State;
use proptest::prelude::*;

use crate::fuzz::cases;
use crate::model::{all_listed, example, name, node, port, service, settings, slice, state};
use crate::namespace::in_namespace;

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

/// Histories that once ended otherwise.
const SEEDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fuzz/seeds/ledger.txt");

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
const ALL_SETTINGS: [fn() -> Settings; 4] = [
    settings,
    || Settings { masquerade_all: true, masquerade_mark: 2, ..settings() },
    || Settings { detect_local: DetectLocal::NodeCidr, ..settings() },
    || Settings {
        detect_local: DetectLocal::Interface(InterfaceName::Prefix("veth".into())),
        node_port_addresses: NodePortAddresses::Ranges(vec!["10.0.0.0/8".parse().unwrap()]),
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

fn committed(proxy: &mut Proxy<FakeKernel>) {
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
fn accepted(proxy: &mut Proxy<FakeKernel>, rules: &mut Options) -> Result<(), TestCaseError> {
    let before = std::mem::replace(rules, proxy.state().options());
    let done = proxy.commit().unwrap();
    prop_assert!(!done.adopted || before != *rules, "the fake kernel refused a transaction");
    prop_assert_eq!(done.set_aside, 0);
    Ok(())
}

fn kind_of(event: &Event) -> Option<Kind> {
    Some(match event {
        Event::Service(_) => Kind::Service,
        Event::EndpointSlice(_) => Kind::EndpointSlice,
        Event::ServiceCidr(_) => Kind::ServiceCidr,
        Event::Node(_) => Kind::Node,
        _ => return None,
    })
}

fn identity(event: &Event) -> Option<(String, bool)> {
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

proptest! {
    #![proptest_config(cases(400, SEEDS))]

    #[test]
    fn any_history_ends_like_a_fresh_start(steps in proptest::collection::vec(any_step(), 1..60)) {
        let mut proxy = Proxy::new(state(), FakeKernel::default());
        let mut objects = Objects::default();
        let mut settings = settings();
        let mut rules = proxy.state().options();
        all_listed().for_each(|event| proxy.observe(event));
        committed(&mut proxy);
        for step in steps {
            match step {
                Step::Event(event) => {
                    objects.observe(&event);
                    proxy.observe(event);
                }
                Step::Settings(number) => {
                    settings = ALL_SETTINGS[number]();
                    proxy.configure(settings.clone());
                }
                Step::Relist(kind) => {
                    proxy.observe(Event::Listing(kind));
                    for event in objects.0.values().filter(|event| kind_of(event) == Some(kind)) {
                        proxy.observe(event.clone());
                    }
                    proxy.observe(Event::Listed(kind));
                }
                Step::Commit => accepted(&mut proxy, &mut rules)?,
                Step::Collect => {
                    proxy.collect_idle().unwrap();
                }
                Step::Tamper(which) => {
                    let kernel = proxy.kernel_mut();
                    let ids: Vec<_> = kernel.elements().map(|(id, _)| *id).collect();
                    if !ids.is_empty() {
                        prop_assert!(kernel.tamper(&ids[which.index(ids.len())]));
                        prop_assert_eq!(proxy.repair().unwrap().set_aside, 0);
                        rules = proxy.state().options();
                        prop_assert!(proxy.plan().unwrap().is_empty());
                    }
                }
            }
        }
        accepted(&mut proxy, &mut rules)?;
        proxy.collect_idle().unwrap();
        prop_assert!(proxy.plan().unwrap().is_empty());
        let Objects(objects) = objects;

        let mut fresh = fresh_with(settings.clone(), &objects);
        prop_assert_eq!(normal(proxy.kernel_mut()), normal(fresh.kernel_mut()));
        let chains = |dump: String| -> Vec<String> {
            dump.lines().filter(|l| l.contains(" chain ")).map(Into::into).collect()
        };
        prop_assert_eq!(chains(proxy.kernel_mut().dump()), chains(fresh.kernel_mut().dump()));

        // A restart adopts: nothing to do, not even renumbering.
        let kernel = proxy.kernel_mut().clone();
        let before = kernel.dump();
        let mut restarted = Proxy::new(State::new(settings, node()), kernel);
        for event in objects.values().cloned().chain(all_listed()) {
            restarted.observe(event);
        }
        let done = restarted.commit().unwrap();
        prop_assert_eq!(done.operations, 0, "{:?}", restarted.kernel_mut().applied.last());
        prop_assert_eq!(restarted.kernel_mut().dump(), before);

        // A relist that names everything again changes nothing; one that names nothing empties it.
        proxy.observe(Event::Listing(Kind::Service));
        for event in objects.values().filter(|e| matches!(e, Event::Service(_))) {
            proxy.observe(event.clone());
        }
        proxy.observe(Event::Listed(Kind::Service));
        prop_assert_eq!(proxy.commit().unwrap().operations, 0);
        proxy.observe(Event::Listing(Kind::Service));
        proxy.observe(Event::Listed(Kind::Service));
        proxy.commit().unwrap();
        let left = proxy.kernel_mut().elements().filter(|(id, _)| id.set == SetName::Services);
        prop_assert_eq!(left.count(), 0);
    }

    #[test]
    fn a_start_over_any_table_ends_like_a_fresh_start(
        one in proptest::collection::vec(any_step(), 1..30),
        other in proptest::collection::vec(any_step(), 1..30),
    ) {
        let objects = |steps: Vec<Step>| -> BTreeMap<String, Event> {
            steps.into_iter().filter_map(|step| match step {
                Step::Event(event) => identity(&event).filter(|(_, there)| *there).map(|(id, _)| (id, event)),
                _ => None,
            }).collect()
        };
        let (one, other) = (objects(one), objects(other));
        let mut over = Proxy::new(state(), fresh(&one).kernel_mut().clone());
        for event in other.values().cloned().chain(all_listed()) {
            over.observe(event);
        }
        committed(&mut over);
        prop_assert_eq!(normal(over.kernel_mut()), normal(fresh(&other).kernel_mut()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 40, ..cases(25, SEEDS) })]

    /// What the fake kernel accepts, the real one does: a sample of the histories above.
    #[test]
    fn the_real_kernel_accepts_any_history(steps in proptest::collection::vec(any_step(), 20..80)) {
        in_namespace(|| {
            let mut proxy = Proxy::new(state(), NetlinkKernel::open().unwrap());
            all_listed().for_each(|event| proxy.observe(event));
            let mut rules = proxy.state().options();
            let commit = |proxy: &mut Proxy<NetlinkKernel>, rules: &mut Options| {
                let before = std::mem::replace(rules, proxy.state().options());
                let done = proxy.commit().unwrap();
                assert!(!done.adopted || before != *rules, "the kernel refused a transaction");
                assert_eq!(done.set_aside, 0);
            };
            proxy.commit().unwrap();
            for step in &steps {
                match step {
                    Step::Event(event) => proxy.observe(event.clone()),
                    Step::Settings(number) => proxy.configure(ALL_SETTINGS[*number]()),
                    Step::Relist(kind) => proxy.observe(Event::Listed(*kind)),
                    Step::Commit => commit(&mut proxy, &mut rules),
                    Step::Collect => {
                        proxy.collect_idle().unwrap();
                    }
                    Step::Tamper(_) => {
                        assert_eq!(proxy.repair().unwrap().set_aside, 0);
                        rules = proxy.state().options();
                    }
                }
            }
            commit(&mut proxy, &mut rules);
            proxy.collect_idle().unwrap();
            let left = proxy.plan().unwrap();
            let left: Vec<_> = left.iter().map(|(op, _)| text::op(op)).collect();
            assert!(left.is_empty(), "{left:#?}");
        });
    }
}

fn web(endpoints: &[&str]) -> [Event; 2] {
    [
        Event::Service(service("web", &["10.96.0.10"], &[port("", Protocol::Tcp, 80, 0)])),
        Event::EndpointSlice(slice("web", "4", &[("", Protocol::Tcp, 8080)], endpoints)),
    ]
}

#[test]
fn an_endpoint_more_is_two_elements_and_its_replacement_one() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    for event in example().into_iter().chain(web(&["10.0.0.1", "10.0.0.2"])).chain(all_listed()) {
        proxy.observe(event);
    }
    committed(&mut proxy);
    let ops = |proxy: &mut Proxy<FakeKernel>, endpoints: &[&str]| {
        web(endpoints).into_iter().for_each(|event| proxy.observe(event));
        proxy.commit().unwrap().operations
    };
    // A new slot, and the verdict replaced; lb-3 is there for dns.
    assert_eq!(ops(&mut proxy, &["10.0.0.1", "10.0.0.2", "10.0.0.3"]), 3);
    assert_eq!(ops(&mut proxy, &["10.0.0.1", "10.0.0.4", "10.0.0.3"]), 2);
    // The first goes: the last takes its slot.
    assert_eq!(ops(&mut proxy, &["10.0.0.4", "10.0.0.3"]), 5);
    assert_eq!(ops(&mut proxy, &["10.0.0.3", "10.0.0.4"]), 0);
}

#[test]
fn the_older_service_keeps_a_contested_frontend_and_the_next_takes_over() {
    let claim = |name: &str, cluster_ip: &str, created: i64| {
        let ports = [port("", Protocol::Tcp, 80, 0)];
        Event::Service(Service { created, ..service(name, &[cluster_ip, "198.51.100.1"], &ports) })
    };
    let endpoint = |name: &str, address: &str| {
        Event::EndpointSlice(slice(name, "4", &[("", Protocol::Tcp, 8080)], &[address]))
    };
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    let answer = |proxy: &mut Proxy<FakeKernel>| {
        proxy.commit().unwrap();
        let key = Key::Slot([198, 51, 100, 1].into(), Protocol::Tcp, 80, 0);
        let id = ElementId { family: Family::V4, set: SetName::Endpoints, key };
        let found = proxy.kernel_mut().elements().find(|(found, _)| **found == id);
        found.map(|(_, value)| value.clone())
    };
    let backend =
        |last: u8| Some(Value::Backend(Backend { address: [10, 244, 0, last].into(), port: 8080 }));
    all_listed().for_each(|event| proxy.observe(event));
    proxy.observe(claim("young", "10.96.0.2", 20));
    proxy.observe(endpoint("young", "10.244.0.2"));
    assert_eq!(answer(&mut proxy), backend(2));
    proxy.observe(claim("old", "10.96.0.1", 10));
    proxy.observe(endpoint("old", "10.244.0.1"));
    assert_eq!(answer(&mut proxy), backend(1));
    // The younger one changing does not matter.
    proxy.observe(claim("young", "10.96.0.2", 20));
    proxy.observe(endpoint("young", "10.244.0.3"));
    assert_eq!(answer(&mut proxy), backend(1));
    // While nobody could answer for the older one, the younger one serves.
    let none = |name: &str| Event::EndpointSlice(slice(name, "4", &[], &[]));
    proxy.observe(none("old"));
    assert_eq!(answer(&mut proxy), backend(3));
    proxy.observe(none("young"));
    assert_eq!(answer(&mut proxy), None);
    proxy.observe(endpoint("young", "10.244.0.3"));
    assert_eq!(answer(&mut proxy), backend(3));
    proxy.observe(Event::Gone(Kind::Service, name("young")));
    assert_eq!(answer(&mut proxy), None);
    proxy.observe(claim("young", "10.96.0.2", 20));
    assert_eq!(answer(&mut proxy), backend(3));
    proxy.observe(endpoint("old", "10.244.0.1"));
    assert_eq!(answer(&mut proxy), backend(1));
    proxy.observe(Event::Gone(Kind::Service, name("old")));
    assert_eq!(answer(&mut proxy), backend(3));
}

#[test]
fn a_refused_service_is_left_out_and_everything_else_committed() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    for event in example().into_iter().chain(all_listed()) {
        proxy.observe(event);
    }
    committed(&mut proxy);
    let before = proxy.kernel_mut().elements().count();
    web(&["10.0.0.1"]).into_iter().for_each(|event| proxy.observe(event));
    // The batch is refused, and so is the same change after reading back.
    let last = {
        let plan = proxy.plan().unwrap();
        plan.iter().position(|(op, _)| format!("{op:?}").contains("10.96.0.10")).unwrap()
    };
    proxy.kernel_mut().fail = vec![Failure::Refuse(last, libc::ENFILE); 2];
    proxy.observe(Event::EndpointSlice(slice(
        "dns",
        "4",
        &[("dns", Protocol::Udp, 53)],
        &["10.244.1.6!", "10.244.1.7!"],
    )));
    let done = proxy.commit().unwrap();
    assert!(done.adopted);
    assert_eq!(done.set_aside, 1);
    assert!(proxy.kernel_mut().elements().count() < before, "dns lost an endpoint");
    // It is tried again when it changes.
    web(&["10.0.0.2"]).into_iter().for_each(|event| proxy.observe(event));
    assert_eq!(proxy.commit().unwrap().set_aside, 0);
    let web = Key::Frontend([10, 96, 0, 10].into(), Protocol::Tcp, 80);
    assert!(proxy.kernel_mut().elements().any(|(id, _)| id.key == web));
}

#[test]
fn an_element_that_vanished_is_put_back_when_a_commit_meets_it() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    for event in web(&["10.0.0.1", "10.0.0.2"]).into_iter().chain(all_listed()) {
        proxy.observe(event);
    }
    committed(&mut proxy);
    let key = Key::Slot([10, 96, 0, 10].into(), Protocol::Tcp, 80, 1);
    let id = ElementId { family: Family::V4, set: SetName::Endpoints, key };
    assert!(proxy.kernel_mut().tamper(&id));
    web(&["10.0.0.1"]).into_iter().for_each(|event| proxy.observe(event));
    assert!(proxy.commit().unwrap().adopted);
    assert_eq!(
        proxy.kernel_mut().elements().filter(|(id, _)| matches!(id.key, Key::Slot(..))).count(),
        1
    );
}

/// Found by `any_history_ends_like_a_fresh_start`: other rules were forgotten until the next event.
#[test]
fn a_repair_brings_rules_that_wait_to_be_committed() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    for event in web(&["10.0.0.1"]).into_iter().chain(all_listed()) {
        proxy.observe(event);
    }
    committed(&mut proxy);
    proxy.configure(Settings { masquerade_all: true, ..settings() });
    assert!(proxy.is_stale());
    proxy.repair().unwrap();
    assert!(!proxy.is_stale());
    assert!(proxy.plan().unwrap().is_empty());
}

#[test]
fn a_chain_is_there_before_anything_leads_to_it() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    all_listed().for_each(|event| proxy.observe(event));
    web(&["10.0.0.1"]).into_iter().for_each(|event| proxy.observe(event));
    committed(&mut proxy);
    let before = proxy.kernel_mut().applied.len();
    web(&["10.0.0.1", "10.0.0.2"]).into_iter().for_each(|event| proxy.observe(event));
    committed(&mut proxy);
    // A packet on its way sees new elements, but of a chain made with them only the empty beginning.
    let applied = &proxy.kernel_mut().applied[before..];
    let chains = |op: &Op| matches!(op, Op::AddChain(..) | Op::AddRules(..));
    let [first, then] = applied else { panic!("{applied:?}") };
    assert!(first.ops.iter().all(chains), "{first:?}");
    assert!(!then.ops.iter().any(chains), "{then:?}");
    // The next Service of that size finds it.
    let other = service("other", &["10.96.0.11"], &[port("", Protocol::Tcp, 80, 0)]);
    proxy.observe(Event::Service(other));
    let endpoints = ["10.0.0.3", "10.0.0.4"];
    let slice = slice("other", "4", &[("", Protocol::Tcp, 80)], &endpoints);
    proxy.observe(Event::EndpointSlice(slice));
    committed(&mut proxy);
    assert_eq!(proxy.kernel_mut().applied.len(), before + 3);
}

/// A kernel that refuses one backend.
struct Refusing(FakeKernel, IpAddr);

impl Kernel for Refusing {
    fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
        self.0.load(options)
    }

    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        let refused = |op: &Op| matches!(op, Op::AddElement(_, Value::Backend(backend)) if backend.address == self.1);
        let Some(op) = transaction.ops.iter().position(refused) else {
            return self.0.apply(transaction);
        };
        let refusal = Refusal { op: Some(op), errno: libc::ENFILE, message: None };
        Err(ApplyError::Refused { refusals: vec![refusal] })
    }
}

#[test]
fn a_refused_change_leaves_no_trace_of_the_chains_made_for_it() {
    let mut proxy = Proxy::new(state(), Refusing(FakeKernel::default(), [10, 0, 0, 2].into()));
    all_listed().for_each(|event| proxy.observe(event));
    web(&["10.0.0.1"]).into_iter().for_each(|event| proxy.observe(event));
    proxy.commit().unwrap();
    let before = proxy.kernel_mut().0.dump();
    // The chain for two is made; the change that needs it is refused, and again after reading back.
    web(&["10.0.0.1", "10.0.0.2"]).into_iter().for_each(|event| proxy.observe(event));
    assert_eq!(proxy.commit().unwrap().set_aside, 1);
    assert_eq!(proxy.kernel_mut().0.dump(), before);
    // The same at a start, which takes over what is there; the refused Service has nothing then.
    let kernel = proxy.kernel_mut().0.clone();
    let mut started = Proxy::new(state(), Refusing(kernel, [10, 0, 0, 2].into()));
    all_listed().for_each(|event| started.observe(event));
    web(&["10.0.0.1", "10.0.0.2"]).into_iter().for_each(|event| started.observe(event));
    assert_eq!(started.commit().unwrap().set_aside, 1);
    assert!(!started.kernel_mut().0.dump().contains("chain lb-"));
    // It changes, and is committed as if nothing had been.
    web(&["10.0.0.1", "10.0.0.3"]).into_iter().for_each(|event| proxy.observe(event));
    let done = proxy.commit().unwrap();
    assert_eq!((done.adopted, done.set_aside), (false, 0));
    proxy.collect_idle().unwrap();
    assert!(proxy.plan().unwrap().is_empty());
}

/// A kernel whose next answer lacks these elements, or for which somebody adds them just then.
struct Forgetful(FakeKernel, Vec<ElementId>);

impl Kernel for Forgetful {
    fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
        let mut loaded = self.0.load(options)?;
        for id in self.1.drain(..) {
            loaded.tables.get_mut(&id.family).unwrap().elements.remove(&id).unwrap();
        }
        Ok(loaded)
    }

    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.0.apply(transaction)
    }
}

#[test]
fn what_the_kernel_holds_against_what_was_read_is_no_fault_of_an_object() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    all_listed().for_each(|event| proxy.observe(event));
    // The newcomer takes the first slot: [5, 2, 3].
    for endpoints in [["10.0.0.1", "10.0.0.2", "10.0.0.3"], ["10.0.0.2", "10.0.0.3", "10.0.0.5"]] {
        web(&endpoints).into_iter().for_each(|event| proxy.observe(event));
        committed(&mut proxy);
    }
    let kernel = proxy.kernel_mut().clone();
    let slot = |slot| ElementId {
        family: Family::V4,
        set: SetName::Endpoints,
        key: Key::Slot([10, 96, 0, 10].into(), Protocol::Tcp, 80, slot),
    };
    // A start that does not see the first two numbers them anew, which the kernel refuses.
    let mut restarted = Proxy::new(state(), Forgetful(kernel.clone(), vec![slot(0), slot(1)]));
    let endpoints = ["10.0.0.2", "10.0.0.3", "10.0.0.5"];
    web(&endpoints).into_iter().chain(all_listed()).for_each(|event| restarted.observe(event));
    let done = restarted.commit().unwrap();
    assert_eq!((done.set_aside, restarted.set_aside_count()), (0, 0));
    assert!(restarted.plan().unwrap().is_empty());
    let elements = |kernel: &FakeKernel| kernel.elements().count();
    assert_eq!(elements(&restarted.kernel_mut().0), elements(&kernel));
}
