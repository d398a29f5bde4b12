//! Commits one after the other: what each can have made stale, and what not.

use std::num::NonZeroU16;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::conntrack::sweep::{Flow, Tuple};
use crate::model::{Endpoint, SlicePort};

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn name(name: &str) -> NamespacedName {
    NamespacedName::new("default", name)
}

fn frontend(text: &str) -> Frontend {
    Frontend::Address(at(text).ip(), Protocol::Udp, at(text).port())
}

const VIP: &str = "10.96.0.10:53";
const NODE_PORT: Frontend = Frontend::NodePort(Family::V4, Protocol::Udp, 30053);

fn serving() -> Serving {
    let mut serving = Serving::default();
    let node = Arc::new([IpAddr::from([192, 0, 2, 10])]);
    serving.set_node_port_addresses(node);
    serving
}

fn by(hosts: &[u8]) -> Endpoints {
    endpoints(hosts.iter().map(|&host| SocketAddr::from(([10, 244, 1, host], 53))))
}

/// Whether a flow that was dialled so and is answered by that endpoint is swept away.
fn sweeps_away(sweep: &Sweep, dialled: &str, host: u8) -> bool {
    let reply = Tuple { source: by(&[host])[0], destination: at("10.244.9.9:4000") };
    let original = Tuple { source: reply.destination, destination: at(dialled) };
    sweep.stale(&Flow { protocol: 17, zone: 0, original, reply, id: None }).is_some()
}

#[test]
fn what_was_missing_is_looked_at_again_at_every_frontend() {
    let mut serving = serving();
    serving.update(&name("dns"), [(frontend(VIP), by(&[1])), (NODE_PORT, by(&[1]))]);
    serving.take().unwrap();
    serving.update(&name("dns"), [(frontend(VIP), by(&[1])), (NODE_PORT, by(&[1]))]);
    assert_eq!(serving.take(), None, "nothing changed");
    serving.look_again();
    let sweep = serving.take().unwrap();
    for dialled in [VIP, "192.0.2.10:30053"] {
        assert!(sweeps_away(&sweep, dialled, 2) && !sweeps_away(&sweep, dialled, 1));
    }
}

#[test]
fn only_changes_that_can_strand_a_flow_are_swept() {
    let mut serving = serving();
    let dns = name("dns");
    let mut after = |hosts: &[u8]| {
        serving.update(&dns, [(frontend(VIP), by(hosts)), (NODE_PORT, by(hosts))]);
        serving.take()
    };
    let sought = |sweep: Option<Sweep>| sweep.map(|sweep| sweep.sought());
    assert_eq!(sought(after(&[])), Some(2), "a new frontend");
    assert_eq!(after(&[]), None);
    assert_eq!(sought(after(&[1])), Some(2), "its first endpoint");
    assert_eq!(sought(after(&[1, 2])), Some(0), "one more");
    assert_eq!(after(&[1, 2]), None, "no change");
    let sweep = after(&[2, 3]).expect("one replaced");
    assert!(sweeps_away(&sweep, VIP, 1) && sweeps_away(&sweep, "192.0.2.10:30053", 1));
    assert!(!sweeps_away(&sweep, VIP, 2) && !sweeps_away(&sweep, VIP, 3));
    let sweep = after(&[]).expect("scaled to zero");
    assert!(sweeps_away(&sweep, VIP, 2) && sweeps_away(&sweep, "192.0.2.10:30053", 3));
}

#[test]
fn other_protocols_are_nobodys_business() {
    let mut serving = serving();
    let tcp = Frontend::Address(at(VIP).ip(), Protocol::Tcp, 53);
    serving.update(&name("dns"), [(tcp, by(&[1]))]);
    serving.update(&name("dns"), []);
    serving.found([tcp]);
    assert_eq!(serving.take(), None);
}

#[test]
fn a_frontend_that_goes_takes_its_flows_along() {
    let mut serving = serving();
    serving.update(&name("dns"), [(frontend(VIP), by(&[1])), (NODE_PORT, by(&[1]))]);
    serving.take();
    serving.update(&name("dns"), [(frontend(VIP), by(&[1]))]);
    let sweep = serving.take().expect("the node port is gone");
    assert!(sweeps_away(&sweep, "192.0.2.10:30053", 1) && !sweeps_away(&sweep, VIP, 1));
    serving.update(&name("dns"), []);
    assert!(sweeps_away(&serving.take().expect("the Service is gone"), VIP, 1));
    serving.update(&name("dns"), []);
    assert_eq!(serving.take(), None);
    serving.update(&name("dns"), [(frontend(VIP), by(&[1]))]);
    serving.update(&name("log"), [(frontend("10.96.0.11:53"), by(&[1]))]);
    serving.take();
    serving.retain(|service| *service == name("log"));
    let sweep = serving.take().expect("the Service is gone");
    assert!(sweeps_away(&sweep, VIP, 1) && sweep.sought() == 1);
}

#[test]
fn a_frontend_that_changes_hands_is_not_gone() {
    for new_owner_first in [false, true] {
        let mut serving = serving();
        serving.update(&name("old"), [(frontend(VIP), by(&[1, 2]))]);
        serving.take();
        if new_owner_first {
            serving.update(&name("new"), [(frontend(VIP), by(&[2]))]);
            serving.update(&name("old"), []);
        } else {
            serving.update(&name("old"), []);
            serving.update(&name("new"), [(frontend(VIP), by(&[2]))]);
        }
        let sweep = serving.take().unwrap();
        assert!(sweeps_away(&sweep, VIP, 1) && !sweeps_away(&sweep, VIP, 2));
        serving.update(&name("new"), []);
        assert!(sweeps_away(&serving.take().unwrap(), VIP, 2));
    }
}

#[test]
fn a_node_port_brings_the_frontends_that_shadow_it() {
    let mut serving = serving();
    let shadow = "192.0.2.10:30053";
    serving.update(&name("external"), [(frontend(shadow), by(&[1]))]);
    serving.take();
    serving.update(&name("dns"), [(NODE_PORT, by(&[2]))]);
    let sweep = serving.take().unwrap();
    assert!(!sweeps_away(&sweep, shadow, 1) && sweeps_away(&sweep, shadow, 2));
    // With the shadow gone, flows to that address are the node port's.
    serving.update(&name("external"), []);
    assert!(sweeps_away(&serving.take().unwrap(), shadow, 1));
    serving.update(&name("dns"), []);
    let sweep = serving.take().unwrap();
    assert_eq!((sweep.sought(), sweeps_away(&sweep, shadow, 2)), (1, true));
}

#[test]
fn what_an_earlier_run_left_is_gone_unless_somebody_has_it() {
    let mut serving = serving();
    serving.update(&name("dns"), [(frontend(VIP), by(&[1]))]);
    serving.take();
    serving.found([frontend(VIP)]);
    assert_eq!(serving.take(), None);
    serving.found([frontend(VIP), frontend("10.96.0.11:53"), NODE_PORT]);
    let sweep = serving.take().unwrap();
    assert!(sweeps_away(&sweep, "10.96.0.11:53", 1));
    assert!(sweeps_away(&sweep, "192.0.2.10:30053", 1));
    assert!(!sweeps_away(&sweep, VIP, 1));
}

#[test]
fn new_node_port_addresses_are_swept_for_every_node_port() {
    let mut serving = serving();
    serving.update(&name("dns"), [(frontend(VIP), by(&[1])), (NODE_PORT, by(&[1]))]);
    serving.take();
    let more: NodePortAddresses = ["192.0.2.10", "192.0.2.11"].map(|a| a.parse().unwrap()).into();
    serving.set_node_port_addresses(more.clone());
    assert_eq!(serving.take().unwrap().sought(), 1);
    serving.set_node_port_addresses(more);
    assert_eq!(serving.take(), None);
}

#[test]
fn serving_endpoints_are_those_that_answer_or_may_be_chosen() {
    let endpoint = |host, ready, serving| Endpoint {
        ready,
        serving,
        terminating: !ready,
        local: host == 1,
        ..Endpoint::new([10, 244, 1, host].into())
    };
    let slice = |family, port_name: &str| EndpointSlice {
        name: name("dns-1"),
        service: name("dns"),
        family,
        ports: vec![
            SlicePort { name: port_name.into(), protocol: Protocol::Udp, port: 53 },
            SlicePort { name: port_name.into(), protocol: Protocol::Tcp, port: 54 },
        ],
        endpoints: vec![
            endpoint(1, true, true),
            endpoint(2, false, true),
            endpoint(3, false, false),
            endpoint(4, true, false),
        ],
        last_change_trigger: None,
    };
    let port =
        ServicePort { name: "dns".into(), protocol: Protocol::Udp, port: 53, node_port: None };
    let slices = [slice(Family::V4, "dns"), slice(Family::V4, "x"), slice(Family::V6, "dns")];
    assert_eq!(serving_endpoints(&port, Family::V4, &slices), by(&[1, 2, 4]));
}

#[test]
fn of_a_service_its_own_udp_frontends_count() {
    let port = |name: &str, protocol, port| ServicePort {
        name: name.into(),
        protocol,
        port,
        node_port: NonZeroU16::new(30000 + port),
    };
    let service = |text: &str, cluster_ips: [&str; 2], created| Service {
        created,
        external_ips: vec![IpAddr::from([198, 51, 100, 7])],
        ..Service::new(
            name(text),
            cluster_ips.map(|ip| ip.parse().unwrap()).into(),
            vec![port("dns", Protocol::Udp, 53), port("dns-tcp", Protocol::Tcp, 53)],
        )
    };
    let endpoint = |host: u8| Endpoint::new([10, 244, 1, host].into());
    let slice = EndpointSlice {
        name: name("dns-1"),
        service: name("dns"),
        family: Family::V4,
        ports: vec![SlicePort { name: "dns".into(), protocol: Protocol::Udp, port: 53 }],
        endpoints: vec![endpoint(1), endpoint(2)],
        last_change_trigger: None,
    };
    let dns = service("dns", ["10.96.0.10", "fd00:10:96::10"], 2);
    let older = service("older", ["10.96.0.11", "fd00:10:96::11"], 1);
    let mut owners = Frontends::default();
    owners.update(None, Some(&dns));
    let six = "[fd00:10:96::10]:53";
    let node_port = |family| Frontend::NodePort(family, Protocol::Udp, 30053);
    let all = [
        (frontend(VIP), by(&[1, 2])),
        (frontend("198.51.100.7:53"), by(&[1, 2])),
        (node_port(Family::V4), by(&[1, 2])),
        (frontend(six), by(&[])),
        (node_port(Family::V6), by(&[])),
    ];
    assert_eq!(udp_frontends(&dns, &[&slice], &owners), all);
    owners.update(None, Some(&older));
    let own = [(frontend(VIP), by(&[1, 2])), (frontend(six), by(&[]))];
    assert_eq!(udp_frontends(&dns, &[&slice], &owners), own);
}

proptest! {
    /// After any changes, handed on and swept in any portions, every flow that was translated at
    /// some time is there if its endpoint serves the frontend now, and was swept away if not.
    #[test]
    fn nothing_stale_is_missed_and_nothing_else_is_hit(
        steps in prop::collection::vec(
            (
                0_u8..3,
                prop::option::of((0_u8..3, prop::collection::vec(1_u8..5, 0..4))),
                0_u8..3,
            ),
            1..20,
        ),
    ) {
        let vip = |number: u8| format!("10.96.0.{number}:53");
        let mut serving = serving();
        let mut waiting = Sweep::default();
        // A frontend has one owner at a time, as the registry of owners sees to.
        let mut now: BTreeMap<u8, (u8, Endpoints)> = BTreeMap::new();
        let mut flows: BTreeSet<(u8, u8)> = BTreeSet::new();
        let steps = steps.into_iter().chain([(9, None, 2)]);
        for (service, part, progress) in steps {
            now.retain(|_, (owner, _)| *owner != service);
            if let Some((number, hosts)) = part && !now.contains_key(&number) {
                now.insert(number, (service, by(&hosts)));
                flows.extend(hosts.iter().map(|host| (number, *host)));
            }
            let own = now.iter().filter(|(_, (owner, _))| *owner == service);
            let own: Vec<_> =
                own.map(|(number, (_, by))| (frontend(&vip(*number)), by.clone())).collect();
            serving.update(&name(&service.to_string()), own);
            if progress > 0 {
                waiting.merge(serving.take().unwrap_or_default());
                waiting.forget_amendments();
            }
            if progress > 1 {
                let sweep = std::mem::take(&mut waiting);
                flows.retain(|(number, host)| !sweeps_away(&sweep, &vip(*number), *host));
                let kept = flows.iter().filter(|(number, _)| now.contains_key(number));
                prop_assert_eq!(kept.count(), flows.len());
                for (number, (_, by_now)) in &now {
                    let there = flows.iter().filter(|(n, _)| n == number);
                    let there: Vec<u8> = there.map(|(_, host)| *host).collect();
                    prop_assert_eq!(by(&there), by_now.clone());
                }
            }
        }
    }
}
