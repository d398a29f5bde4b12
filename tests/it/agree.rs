//! The interpreter of the typed ruleset against the kernel: on random Services and packets both must
//! agree, and while commits and packets interleave at random, no packet meets a state that is neither the
//! one before nor the one after.
//!
//! `AGREE_CASES` says how many random tables are made, and `AGREE_SECONDS` how long commits and packets
//! interleave; `AGREE_SEED` repeats a run.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nftproxy::model::{
    EndpointSlice, Event, Family, Kind, NodeFacts, Protocol, Scheduler, Service, SessionAffinity,
    SlicePort, TrafficPolicy,
};
use nftproxy::nft::element::{Backend, ElementId, Key, Value};
use nftproxy::nft::interpret::{Fate, Origin, Packet, World, interpret};
use nftproxy::nft::names::{AffinityName, SetName};
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::nft::ruleset::Ruleset;
use nftproxy::reconcile::Proxy;
use nftproxy::settings::Settings;
use nftproxy::state::State;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::model::{all_listed, name, node, port, service, settings, slice};
use crate::net::{
    CLIENT, GATEWAY, NODE, NODE_SECOND, Net, POD_A, POD_B, REMOTE, REMOTE_GATEWAY, in_netns, ip,
    number, patient,
};
use crate::serve::{Outcome, sctp, tcp_here, udp};

/// Who dials: namespace, addresses, and the node's interface by which the packets come in.
const DIALLERS: [(&str, [&str; 2], Option<&str>); 5] = [
    ("client", CLIENT, Some("eth0")),
    ("a", POD_A, Some("pod-a")),
    ("b", POD_B, Some("pod-b")),
    ("remote", REMOTE, Some("pod-remote")),
    ("node", NODE, None),
];
/// Who answers.
const PODS: [(&str, [&str; 2]); 4] =
    [("a", POD_A), ("b", POD_B), ("remote", REMOTE), ("host", NODE)];

const VIPS: [[&str; 2]; 3] = [
    ["10.96.0.1", "fd00:10:96::1"],
    ["10.96.0.2", "fd00:10:96::2"],
    ["10.96.0.3", "fd00:10:96::3"],
];
/// Nobody's.
const UNUSED: [&str; 2] = ["10.96.0.99", "fd00:10:96::99"];
const BALANCERS: [[&str; 2]; 2] = [["203.0.113.1", "fd00:203::1"], ["203.0.113.2", "fd00:203::2"]];
const EXTERNALS: [[&str; 2]; 2] = [["198.51.100.1", "fd00:198::1"], ["192.0.2.10", "fd00:192::10"]];
const SERVICES: [&str; 3] = ["x", "y", "z"];
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

fn runner() -> TestRunner {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = number("AGREE_SEED", now.as_secs());
    eprintln!("AGREE_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    TestRunner::new_with_rng(Config::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

fn draw<T: std::fmt::Debug>(runner: &mut TestRunner, strategy: impl Strategy<Value = T>) -> T {
    strategy.new_tree(runner).unwrap().current()
}

/// The node as the test network has it.
fn this_node() -> NodeFacts {
    let mut interfaces: Vec<IpAddr> = [NODE, GATEWAY, REMOTE_GATEWAY, ["127.0.0.1", "::1"]]
        .concat()
        .into_iter()
        .map(ip)
        .collect();
    interfaces.push(ip(NODE_SECOND));
    interfaces.sort_unstable();
    NodeFacts { interfaces, ..node() }
}

/// A Service, with all that a Service can have.
fn any_service(which: usize) -> impl Strategy<Value = Event> {
    let policy = || prop_oneof![2 => Just(TrafficPolicy::Cluster), 1 => Just(TrafficPolicy::Local)];
    let affinity = prop_oneof![
        3 => Just(SessionAffinity::None),
        1 => Just(SessionAffinity::ClientIp { timeout: 600 }),
    ];
    let scheduler = select(vec![
        Scheduler::Random,
        Scheduler::Random,
        Scheduler::RoundRobin,
        Scheduler::SourceHash,
        Scheduler::Maglev,
    ]);
    let ranges: Vec<IpNet> = [
        "192.0.2.0/24",
        "10.244.1.5/32",
        "fd00:192::/63",
        "10.0.0.0/7",
        "fd00:10:244:2::9/128",
        "0.0.0.0/0",
        "192.0.2.4/30",
    ]
    .map(|range| range.parse().unwrap())
    .into();
    let ranges = prop_oneof![2 => Just(Vec::new()), 1 => subsequence(ranges, 1..4)];
    let frontends =
        (subsequence(BALANCERS.to_vec(), 0..=1), subsequence(EXTERNALS.to_vec(), 0..=1));
    let ports = subsequence(PROTOCOLS.to_vec(), 1..=3);
    let numbers = (80..82_u16, prop_oneof![Just(0), Just(30080 + u16::try_from(which).unwrap())]);
    (policy(), policy(), affinity, scheduler, ranges, frontends, ports, numbers).prop_map(
        move |(internal, external, affinity, scheduler, ranges, frontends, protocols, numbers)| {
            let addresses =
                [&VIPS[which][..], &frontends.0.concat(), &frontends.1.concat()].concat();
            let ports = protocols.iter().map(|p| port(&p.to_string(), *p, numbers.0, numbers.1));
            Event::Service(Service {
                internal_traffic_policy: internal,
                external_traffic_policy: external,
                session_affinity: affinity,
                source_ranges: ranges,
                scheduler,
                ..service(SERVICES[which], &addresses, &ports.collect::<Vec<_>>())
            })
        },
    )
}

/// The endpoints of a Service in a family.
fn any_slice(which: usize, family: usize) -> impl Strategy<Value = Event> {
    let pods = subsequence(PODS.to_vec(), 0..=3).prop_shuffle();
    (pods, select(vec![8080, 8081, 53_u16])).prop_map(move |(pods, target)| {
        let address = |(name, addresses): &(&str, [&str; 2])| {
            addresses[family].to_owned() + if *name == "remote" { "" } else { "!" }
        };
        let addresses: Vec<_> = pods.iter().map(address).collect();
        let addresses: Vec<_> = addresses.iter().map(String::as_str).collect();
        let ports = PROTOCOLS.map(|protocol| (protocol.to_string(), protocol, target));
        let ports =
            ports.each_ref().map(|(name, protocol, target)| (name.as_str(), *protocol, *target));
        let mut slice = slice(SERVICES[which], &family.to_string(), &ports, &addresses);
        slice.family = Family::BOTH[family];
        Event::EndpointSlice(slice)
    })
}

fn any_settings() -> impl Strategy<Value = Settings> {
    (any::<bool>(), proptest::bool::weighted(0.25)).prop_map(|(detect, masquerade_all)| {
        let settings = if detect { settings() } else { Settings::default() };
        Settings { masquerade_all, ..settings }
    })
}

/// What there is to dial, whether somebody answers or not.
fn frontends(ruleset: &Ruleset) -> Vec<(SocketAddr, Protocol)> {
    let of = |(id, _): &(ElementId, Value)| match id.key {
        Key::Frontend(address, protocol, port) => Some((SocketAddr::new(address, port), protocol)),
        Key::NodePort(protocol, port) => {
            Some((SocketAddr::new(ip(NODE[usize::from(id.family == Family::V6)]), port), protocol))
        }
        _ => None,
    };
    let sets = Family::BOTH.into_iter().flat_map(|f| SetName::ALL.map(|set| (f, set)));
    sets.flat_map(|(family, set)| ruleset.elements_of(family, set).filter_map(of)).collect()
}

/// What mostly nobody serves.
fn any_target() -> impl Strategy<Value = (SocketAddr, Protocol)> {
    let addresses = [&VIPS[..], &BALANCERS, &EXTERNALS, &[UNUSED, NODE, [NODE_SECOND, NODE[1]]]];
    let ports = prop_oneof![3 => Just(80), 2 => Just(81), 3 => 30080..30083_u16];
    (select(addresses.concat().concat()), ports, select(&PROTOCOLS[..]))
        .prop_map(|(address, port, protocol)| (SocketAddr::new(ip(address), port), protocol))
}

/// What a client meets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Met {
    /// This pod; on which port and from where, as far as that can be known.
    Pod(String, Option<u16>, Option<IpAddr>),
    Refused,
    Lost,
}

impl Met {
    fn of(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Answered { by, port, seen } => Self::Pod(by, Some(port), Some(seen)),
            Outcome::Refused => Self::Refused,
            Outcome::TimedOut => Self::Lost,
        }
    }

    fn is(&self, predicted: &Self) -> bool {
        let same = |a: bool, b: bool, equal: bool| !a || !b || equal;
        match (self, predicted) {
            (Self::Pod(by, port, seen), Self::Pod(other, number, from)) => {
                by == other
                    && same(port.is_some(), number.is_some(), port == number)
                    && same(seen.is_some(), from.is_some(), seen == from)
            }
            _ => self == predicted,
        }
    }
}

/// Dials once.
fn dial(net: &Net, from: &str, to: SocketAddr, protocol: Protocol) -> Met {
    let netns = net.name(from);
    match protocol {
        Protocol::Tcp => Met::of(in_netns(&netns, || tcp_here(to))),
        Protocol::Udp => Met::of(udp(&netns, to)),
        Protocol::Sctp => {
            let by = sctp(&netns, to, &["a", "b", "remote", "host"]);
            by.map_or(Met::Lost, |by| Met::Pod(by, None, None))
        }
    }
}

fn is_local(address: IpAddr) -> bool {
    address.is_loopback() || this_node().interfaces.contains(&address)
}

/// What the interpreter says of a packet; None stands for one that is left alone.
fn predicted(
    ruleset: &Ruleset,
    remembered: &BTreeMap<AffinityName, Backend>,
    dialler: &(&str, [&str; 2], Option<&str>),
    to: SocketAddr,
    protocol: Protocol,
) -> BTreeSet<Option<Met>> {
    let family = usize::from(to.is_ipv6());
    // What a host sends to itself comes from the address it goes to.
    let to_itself = dialler.0 == "node" && is_local(to.ip());
    let source = if to_itself { to.ip() } else { ip(dialler.1[family]) };
    let origin =
        dialler.2.map_or(Origin::Host, |interface| Origin::Interface(Some(interface.into())));
    let packet = Packet { source, destination: to.ip(), protocol, port: to.port(), origin };
    let outcomes = interpret(&packet, &World { ruleset, is_local: &is_local, remembered });
    let share: f64 = outcomes.iter().map(|outcome| outcome.share).sum();
    assert!((share - 1.0).abs() < 1e-9, "{outcomes:#?}");
    let met = |outcome: &nftproxy::nft::interpret::Outcome| match outcome.fate {
        Fate::Dropped => Some(Met::Lost),
        // A raw socket is not told.
        Fate::Rejected if protocol == Protocol::Sctp => Some(Met::Lost),
        Fate::Rejected => Some(Met::Refused),
        Fate::Passes { .. } if outcome.pick.is_none() => None,
        Fate::Passes { to, masqueraded, .. } => {
            let found = PODS.iter().find(|(_, addresses)| ip(addresses[family]) == to.address);
            let (by, _) = found.expect("an endpoint of ours");
            let seen = match (*by, masqueraded) {
                ("host", true) => None,
                ("remote", true) => Some(ip(REMOTE_GATEWAY[family])),
                (_, true) => Some(ip(GATEWAY[family])),
                (_, false) => Some(source),
            };
            // Nobody accepts what comes from its own address.
            let itself = *by == dialler.0 && !masqueraded;
            Some(if itself { Met::Lost } else { Met::Pod((*by).into(), Some(to.port), seen) })
        }
    };
    outcomes.iter().map(met).collect()
}

/// Whether something that was met is among what was predicted.
fn agrees(met: &Met, predicted: &BTreeSet<Option<Met>>) -> bool {
    predicted.iter().any(|predicted| match predicted {
        Some(predicted) => met.is(predicted),
        // It is left alone: whoever has the address answers, and that is no pod.
        None => !matches!(met, Met::Pod(..)),
    })
}

/// Who is remembered where, of one client.
fn remembered(
    ruleset: &Ruleset,
    family: Family,
    client: IpAddr,
) -> BTreeMap<AffinityName, Backend> {
    let mut kernel = NetlinkKernel::open().unwrap();
    let held = ruleset.affinities_of(family).filter_map(|name| {
        let clients = kernel.clients(family, name).unwrap();
        Some((name.clone(), *clients.get(&client)?))
    });
    held.collect()
}

/// Forgets every connection, so that none of an earlier table answers for this one.
fn forget_connections(net: &Net) {
    let node = net.name("node");
    let output =
        Command::new("ip").args(["netns", "exec", &node, "conntrack", "-F"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Random Services and settings, as events.
fn any_world(runner: &mut TestRunner, services: usize) -> (Settings, Vec<Event>) {
    let settings = draw(runner, any_settings());
    let mut events = Vec::new();
    for which in 0..services {
        events.push(draw(runner, any_service(which)));
        events.extend([0, 1].map(|family| draw(runner, any_slice(which, family))));
    }
    (settings, events)
}

#[test]
fn the_kernel_does_to_random_packets_what_the_interpreter_says() {
    let Some(net) = Net::new() else { return };
    let mut runner = runner();
    let mut met_of_kind: BTreeMap<&str, usize> = BTreeMap::new();
    for case in 0..number("AGREE_CASES", 6) {
        let services = draw(&mut runner, 1..=SERVICES.len());
        let (settings, events) = any_world(&mut runner, services);
        let ruleset = in_netns(&net.name("node"), || {
            let state = State::new(settings.clone(), this_node());
            let mut proxy = Proxy::new(state, NetlinkKernel::open().unwrap());
            for event in events.iter().cloned().chain(all_listed()) {
                proxy.observe(event);
            }
            assert_eq!(proxy.commit().unwrap().set_aside, 0);
            proxy.wanted()
        });
        forget_connections(&net);
        for _ in 0..24 {
            let dialler = draw(&mut runner, select(&DIALLERS[..]));
            let (to, protocol) = if draw(&mut runner, proptest::bool::weighted(0.8)) {
                draw(&mut runner, select(frontends(&ruleset)))
            } else {
                draw(&mut runner, any_target())
            };
            let family = usize::from(to.is_ipv6());
            for attempt in 0..4 {
                let held = in_netns(&net.name("node"), || {
                    remembered(&ruleset, Family::BOTH[family], ip(dialler.1[family]))
                });
                let predicted = predicted(&ruleset, &held, &dialler, to, protocol);
                let is_host =
                    |met: &Option<Met>| matches!(met, Some(Met::Pod(by, ..)) if by == "host");
                if protocol != Protocol::Tcp && predicted.iter().any(is_host) {
                    // The servers of the host answer from whichever of its addresses is the nearest.
                    break;
                }
                let met = dial(&net, dialler.0, to, protocol);
                assert!(
                    agrees(&met, &predicted),
                    "case {case}, try {attempt}: {} to {to}/{protocol} met {met:?}, predicted {predicted:?}\n\
                     {settings:?}\n{events:#?}",
                    dialler.0
                );
                let kind = match &met {
                    Met::Pod(_, _, Some(seen)) if *seen != ip(dialler.1[family]) => "masqueraded",
                    Met::Pod(..) => "answered",
                    Met::Refused => "refused",
                    Met::Lost => "lost",
                };
                *met_of_kind.entry(kind).or_default() += 1;
                // It takes its time, and says the same again.
                if met == Met::Lost {
                    break;
                }
            }
        }
    }
    eprintln!("agreed on {met_of_kind:?}");
    assert!(met_of_kind.len() == 4, "not all kinds were met: {met_of_kind:?}");
}

/// An event without what makes a connection wait, as it would meet many states until it gives up: nobody is
/// kept out. Nor is anybody remembered, which would be one more state.
fn quick(event: Event) -> Event {
    match event {
        Event::Service(service) => Event::Service(Service {
            session_affinity: SessionAffinity::None,
            internal_traffic_policy: TrafficPolicy::Cluster,
            external_traffic_policy: TrafficPolicy::Cluster,
            source_ranges: Vec::new(),
            // Addresses that are somebody's all the time: packets to others are lost.
            load_balancer_ips: Vec::new(),
            external_ips: if service.name == name("x") {
                [BALANCERS[0], EXTERNALS[0]].concat().into_iter().map(ip).collect()
            } else {
                Vec::new()
            },
            ports: [80, 81].map(|n| port(&format!("{n}"), Protocol::Tcp, n, 0)).into(),
            ..service
        }),
        Event::EndpointSlice(slice) => {
            let number = slice.ports[0].port;
            let ports = ["80", "81"].map(|name| SlicePort {
                name: name.into(),
                protocol: Protocol::Tcp,
                port: number,
            });
            Event::EndpointSlice(EndpointSlice { ports: ports.into(), ..slice })
        }
        event => event,
    }
}

/// A connection: between which states it was made, and what it met.
struct Sample {
    states: (usize, usize),
    dialler: usize,
    to: SocketAddr,
    met: Met,
}

/// Looked up ahead of the commit that brings the first endpoint, and filtered behind it: each hook has the
/// table of its moment, so that such a packet is sent on as if the address were nobody's, and the next
/// SYN is answered. That shows at addresses that are no ClusterIPs alone.
fn is_lost_between_hooks(met: &Met, to: SocketAddr, predicted: &BTreeSet<Option<Met>>) -> bool {
    let is_cluster_ip = VIPS.as_flattened().contains(&&*to.ip().to_string());
    *met == Met::Lost && !is_cluster_ip && predicted.contains(&Some(Met::Refused))
}

#[test]
fn packets_between_random_commits_meet_the_state_before_or_after() {
    let Some(net) = Net::new() else { return };
    let mut runner = runner();
    let states: Vec<(Settings, Vec<Event>)> =
        (0..40).map(|_| any_world(&mut runner, SERVICES.len())).collect();
    let rulesets: Mutex<Vec<Ruleset>> = Mutex::new(Vec::new());
    // How many commits have begun, and how many are done.
    let (begun, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let stop = AtomicBool::new(false);
    let (sender, samples) = mpsc::channel();
    let (ready, started) = mpsc::channel();
    let node = net.name("node");
    std::thread::scope(|scope| {
        let commits = scope.spawn(|| {
            in_netns(&node, || {
                let state = State::new(settings(), this_node());
                let mut proxy = Proxy::new(state, NetlinkKernel::open().unwrap());
                all_listed().for_each(|event| proxy.observe(event));
                for (_, events) in states.iter().cycle() {
                    for slice in SERVICES {
                        if draw(&mut runner, proptest::bool::weighted(0.2)) {
                            let slice = name(&format!("{slice}-0"));
                            proxy.observe(Event::Gone(Kind::EndpointSlice, slice));
                        }
                    }
                    for event in events {
                        // All Services are there from the start.
                        if begun.load(SeqCst) == 0 || draw(&mut runner, any::<bool>()) {
                            proxy.observe(quick(event.clone()));
                        }
                    }
                    rulesets.lock().unwrap().push(proxy.wanted());
                    begun.fetch_add(1, SeqCst);
                    let committed = proxy.commit().unwrap();
                    assert!(committed.set_aside == 0);
                    done.fetch_add(1, SeqCst);
                    let _ = ready.send(());
                    if stop.load(SeqCst) {
                        return;
                    }
                    std::thread::sleep(Duration::from_micros(draw(&mut runner, 0..4000_u64)));
                }
            });
        });
        started.recv().unwrap();
        // All but the one whose packets can come back to it, which nobody accepts.
        let clients: Vec<_> = [0, 1, 2, 4, 0, 1]
            .into_iter()
            .map(|dialler| {
                let (net, stop, begun, done, sender) = (&net, &stop, &begun, &done, sender.clone());
                scope.spawn(move || {
                    in_netns(&net.name(DIALLERS[dialler].0), || {
                        for n in (0..).step_by(7) {
                            let all = [VIPS[n % 3], BALANCERS[0], EXTERNALS[0]];
                            let addresses = all[n / 7 % 3];
                            let to =
                                SocketAddr::new(ip(addresses[n % 2]), 80 + u16::from(n % 5 == 0));
                            let before = done.load(SeqCst);
                            let met = Met::of(tcp_here(to));
                            let states = (before, begun.load(SeqCst));
                            sender.send(Sample { states, dialler, to, met }).unwrap();
                            // The commits need the processors, too.
                            std::thread::sleep(Duration::from_micros(500));
                            if stop.load(SeqCst) {
                                return;
                            }
                        }
                    });
                })
            })
            .collect();
        let time = patient(Duration::from_secs(number("AGREE_SECONDS", 5)));
        let until = Instant::now() + time;
        while Instant::now() < until && !commits.is_finished() {
            std::thread::sleep(Duration::from_millis(20));
        }
        stop.store(true, SeqCst);
        for thread in clients.into_iter().chain([commits]) {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    drop(sender);
    judge(&rulesets.into_inner().unwrap(), samples);
}

/// Compares what connections met with the states that they were made between.
fn judge(rulesets: &[Ruleset], samples: impl IntoIterator<Item = Sample>) {
    let (mut connections, mut raced, mut lost, mut neither) = (0, 0, 0, Vec::new());
    let mut between_hooks = 0;
    for Sample { states: (before, after), dialler, to, met } in samples {
        connections += 1;
        raced += usize::from(before != after);
        lost += usize::from(met == Met::Lost);
        let all: BTreeSet<_> = (before - 1..after)
            .flat_map(|state| {
                predicted(&rulesets[state], &BTreeMap::new(), &DIALLERS[dialler], to, Protocol::Tcp)
            })
            .collect();
        let is_between_hooks = before != after && is_lost_between_hooks(&met, to, &all);
        between_hooks += usize::from(is_between_hooks);
        if !is_between_hooks && !agrees(&met, &all) {
            neither.push(format!(
                "{} to {to}: {met:?} in states {before} to {after}: {all:?}",
                DIALLERS[dialler].0
            ));
        }
    }
    eprintln!(
        "{} commits, {connections} connections, {raced} during a commit, {lost} lost",
        rulesets.len()
    );
    assert!(raced > 0);
    assert!(between_hooks <= 1 + raced / 5000, "{between_hooks} between hooks are not rare");
    assert!(neither.is_empty(), "{} of {connections}: {neither:#?}", neither.len());
}
