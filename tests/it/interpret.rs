//! What the interpreter says of packets that the real kernel is seldom asked about by `agree`, which holds the
//! two together: by which way they pass, which rules are told, and shares of what is drawn.

use std::collections::BTreeMap;
use std::net::IpAddr;

use nftproxy::model::{Event, Protocol, Service, SessionAffinity};
use nftproxy::nft::dataplane::{self, Loopback};
use nftproxy::nft::element::{Backend, Key};
use nftproxy::nft::fake::FakeKernel;
use nftproxy::nft::interpret::{Fate, Origin, Outcome, Packet, World, interpret};
use nftproxy::nft::names::{AffinityName, ChainName, List};
use nftproxy::nft::rule::InterfaceName;
use nftproxy::nft::ruleset::Ruleset;
use nftproxy::reconcile::Proxy;
use nftproxy::settings::{DetectLocal, NodePortAddresses, Settings};
use nftproxy::state::State;

use crate::model::{all_listed, node, port, service, settings, slice};

const NODE: &str = "192.0.2.10";

/// The tables of a Service `web` with the ClusterIP 10.96.0.10, node port 30080 and these endpoints.
fn tables(settings: Settings, affinity: SessionAffinity, endpoints: &[&str]) -> Ruleset {
    let ports = [port("", Protocol::Tcp, 80, 30080)];
    let web = Service { session_affinity: affinity, ..service("web", &["10.96.0.10"], &ports) };
    let slice = slice("web", "4", &[("", Protocol::Tcp, 8080)], endpoints);
    let mut proxy = Proxy::new(State::new(settings, node()), FakeKernel::default());
    let events = [Event::Service(web), Event::EndpointSlice(slice)];
    events.into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
    proxy.wanted()
}

fn packet(origin: Origin, source: &str, to: &str, port: u16) -> Packet {
    let [source, destination] = [source, to].map(|address| address.parse().unwrap());
    Packet { source, destination, protocol: Protocol::Tcp, port, origin }
}

fn by(interface: &str) -> Origin {
    Origin::Interface(Some(interface.into()))
}

fn outcomes(ruleset: &Ruleset, packet: &Packet) -> Vec<Outcome> {
    remembering(ruleset, &BTreeMap::new(), packet)
}

fn remembering(
    ruleset: &Ruleset,
    remembered: &BTreeMap<AffinityName, Backend>,
    packet: &Packet,
) -> Vec<Outcome> {
    let is_local = |address: IpAddr| address.is_loopback() || address.to_string() == NODE;
    interpret(packet, &World { ruleset, is_local: &is_local, remembered })
}

/// The only thing that can become of a packet.
fn outcome(ruleset: &Ruleset, packet: &Packet) -> Outcome {
    let all = outcomes(ruleset, packet);
    let [one] = &all[..] else { panic!("{all:#?}") };
    one.clone()
}

fn is_masqueraded(outcome: &Outcome) -> bool {
    matches!(outcome.fate, Fate::Passes { masqueraded: true, .. })
}

/// The chains whose rules are told, each once for a run of its own.
fn told(outcome: &Outcome) -> Vec<String> {
    let mut chains: Vec<_> = outcome.steps.iter().map(|step| step.chain.to_string()).collect();
    chains.dedup();
    chains
}

/// The comments of the rules that are told.
fn comments(ruleset: &Ruleset, outcome: &Outcome) -> Vec<&'static str> {
    let family = nftproxy::model::Family::V4;
    let rule = |step: &nftproxy::nft::interpret::Step| {
        let chain = dataplane::chain(step.chain.clone(), family, &ruleset.options);
        chain.rules[step.rule].comment
    };
    outcome.steps.iter().filter_map(rule).collect()
}

#[test]
fn slots_are_drawn_alike_and_one_without_its_element_falls_to_the_first() {
    let mut ruleset = tables(settings(), SessionAffinity::None, &["10.0.0.1", "10.0.0.2"]);
    let packet = packet(by("eth0"), "203.0.113.9", "10.96.0.10", 80);
    let drawn = |ruleset: &Ruleset| -> Vec<(u8, f64)> {
        let outcomes = outcomes(ruleset, &packet).into_iter();
        let host = |backend: Backend| match backend.address {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(_) => unreachable!(),
        };
        outcomes.map(|one| (host(one.pick.unwrap().backend), one.share)).collect()
    };
    assert_eq!(drawn(&ruleset), [(1, 0.5), (2, 0.5)]);
    let second = |key| matches!(key, Key::Slot(.., 1));
    let elements = std::mem::take(&mut ruleset.elements).into_iter();
    ruleset.elements = elements.filter(|(id, _)| !second(id.key)).collect();
    assert_eq!(drawn(&ruleset), [(1, 0.5), (1, 0.5)]);
}

#[test]
fn the_host_s_own_connections_pass_output_and_others_prerouting() {
    let ruleset = tables(settings(), SessionAffinity::None, &["10.0.0.1"]);
    let first = |origin, source| {
        outcome(&ruleset, &packet(origin, source, "10.96.0.10", 80)).steps[0].base.clone()
    };
    assert_eq!(first(Origin::Host, NODE), ChainName::NatOutput);
    assert_eq!(first(by("eth0"), "203.0.113.9"), ChainName::NatPrerouting);
}

#[test]
fn pods_are_told_by_their_interface_where_the_configuration_says_so() {
    let masqueraded = |prefix: &str, origin, source| {
        let detect_local = DetectLocal::Interface(InterfaceName::Prefix(prefix.into()));
        let settings = Settings { detect_local, ..settings() };
        let ruleset = tables(settings, SessionAffinity::None, &["10.0.0.1"]);
        is_masqueraded(&outcome(&ruleset, &packet(origin, source, "10.96.0.10", 80)))
    };
    assert!(!masqueraded("veth", by("veth1"), "10.244.0.9"));
    assert!(masqueraded("veth", by("eth0"), "10.244.0.9"));
    // The host's own came in by none.
    assert!(masqueraded("veth", Origin::Host, NODE));
    assert!(masqueraded("lo", Origin::Host, NODE));
}

#[test]
fn loopback_serves_node_ports_only_where_it_is_asked_to() {
    let all = NodePortAddresses::Ranges(vec!["0.0.0.0/0".parse().unwrap()]);
    let dialled = |loopback, endpoint: &str, source: &str, to: &str| {
        let settings = Settings { node_port_addresses: all.clone(), loopback, ..settings() };
        let ruleset = tables(settings, SessionAffinity::None, &[endpoint]);
        let outcome = outcome(&ruleset, &packet(Origin::Host, source, to, 30080));
        let comments = comments(&ruleset, &outcome);
        assert!(matches!(outcome.fate, Fate::Passes { .. }), "{outcome:#?}");
        (outcome.pick.is_some(), comments.contains(&"a node port dialled on loopback"))
    };
    let lo = "127.0.0.1";
    assert_eq!(dialled(Loopback::Untouched, "10.0.0.1", NODE, NODE), (true, false));
    assert_eq!(dialled(Loopback::Untouched, "10.0.0.1", lo, lo), (false, false));
    assert_eq!(dialled(Loopback::NodePorts, "10.0.0.1", lo, lo), (true, true));
    // To an endpoint in the host's own network it leaves by no other interface.
    assert_eq!(dialled(Loopback::NodePorts, NODE, lo, lo), (true, false));
}

#[test]
fn what_is_told_are_the_rules_that_found_something() {
    let ruleset = tables(settings(), SessionAffinity::None, &["10.0.0.1"]);
    let way =
        |to: &str, port| told(&outcome(&ruleset, &packet(by("eth0"), "203.0.113.9", to, port)));
    let dispatched = ["nat-prerouting", "dispatch", "dispatch-services", "internal-lb-1"];
    let marked = ["mark-internal", "mark-for-masquerade", "internal-lb-1", "lb-1"];
    let behind = ["filter-forward", "new-connection", "nat-postrouting"];
    assert_eq!(way("10.96.0.10", 80), [&dispatched[..], &marked, &behind].concat());
    // It is looked up by whoever comes; nothing is told of look-ups in vain.
    assert_eq!(way("198.51.100.9", 80), [&dispatched[..1], &behind].concat());
}

#[test]
fn a_client_keeps_its_endpoint_and_is_remembered_by_whatever_it_dialled() {
    let held = SessionAffinity::ClientIp { timeout: 10 };
    let ruleset = tables(settings(), held, &["10.0.0.1", "10.0.0.2"]);
    let port = "default/web/tcp".parse().unwrap();
    let name = AffinityName { port, list: List::Cluster };
    let backend = Backend { address: [10, 0, 0, 2].into(), port: 8080 };
    let remembered = [(name.clone(), backend)].into();
    for (to, port) in [("10.96.0.10", 80), (NODE, 30080)] {
        let packet = packet(by("eth0"), "203.0.113.9", to, port);
        assert_eq!(outcomes(&ruleset, &packet).len(), 2, "a new client");
        let outcomes = remembering(&ruleset, &remembered, &packet);
        let [outcome] = &outcomes[..] else { panic!("{outcomes:#?}") };
        let pick = outcome.pick.as_ref().unwrap();
        assert_eq!((pick.backend, pick.remembered.as_ref()), (backend, Some(&name)));
        assert!(
            told(outcome).contains(&"record-10s/default/web/tcp".to_owned()),
            "{:?}",
            told(outcome)
        );
    }
}
