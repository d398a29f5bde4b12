//! Real connections through a node that nftproxy programs: who answered, seen from which address, or
//! refused, or lost. The numbers are rows of the scenario table in `SEMANTICS.md`, section 11.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};

use crate::net::{
    CLIENT, Daemon, GATEWAY, NODE, NODE_SECOND, Net, POD_A, POD_B, REMOTE, REMOTE_GATEWAY,
    in_netns, ip, wait_until,
};
use crate::objects::{CLUSTER, Svc, slice};
use crate::serve::{Outcome, sctp, tcp, udp};

pub(crate) const CIDRS: &str = "10.244.0.0/16,fd00:10:244::/56";
pub(crate) const HTTP: [(&str, &str, u16); 1] = [("http", "TCP", 8080)];

pub(crate) fn run(net: &Net, arguments: &[&str]) -> Daemon {
    let dir = net.manifests();
    let mut all =
        vec!["run", "--manifests", dir.to_str().unwrap(), "--hostname-override", "node-1"];
    all.extend(arguments);
    Daemon::start(&net.name("node"), &all)
}

pub(crate) fn to(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

/// What many connections met, and how often.
pub(crate) fn many(net: &Net, from: &str, to: SocketAddr) -> BTreeMap<Outcome, usize> {
    let mut seen = BTreeMap::new();
    for _ in 0..60 {
        *seen.entry(tcp(&net.name(from), to)).or_default() += 1;
    }
    seen
}

/// The outcomes alone.
pub(crate) fn set(net: &Net, from: &str, to: SocketAddr) -> BTreeSet<Outcome> {
    many(net, from, to).into_keys().collect()
}

pub(crate) fn answered(by: &str, port: u16, seen: &str) -> Outcome {
    Outcome::Answered { by: by.into(), port, seen: ip(seen) }
}

pub(crate) fn answers<const N: usize>(list: [(&str, &str); N]) -> BTreeSet<Outcome> {
    list.into_iter().map(|(by, seen)| answered(by, 8080, seen)).collect()
}

pub(crate) fn one(net: &Net, from: &str, to: SocketAddr) -> Outcome {
    tcp(&net.name(from), to)
}

/// `web` in both families, on every kind of frontend, with a pod of this node and one of another.
fn web(spec: &[&str]) -> String {
    let service = Svc {
        name: "web",
        cluster_ips: &["10.96.0.10", "fd00:10:96::10"],
        ports: &[("http", "TCP", 80, 30080)],
        spec,
        balancer_ips: &["203.0.113.7", "fd00:203::7"],
    };
    CLUSTER.to_owned() + &service.yaml()
}

fn web_endpoints(four: &[&str], six: &[&str]) -> String {
    slice("web", "4", &HTTP, four) + &slice("web", "6", &HTTP, six)
}

const EXTERNAL: &str = "externalIPs: [198.51.100.7, \"fd00:198::7\"]";

#[test]
fn a_cluster_ip_is_answered_by_every_endpoint_and_seen_from_the_right_address() {
    let Some(net) = Net::new() else { return };
    net.write(
        "web.yaml",
        &(web(&[])
            + &web_endpoints(
                &["10.244.1.5!", "10.244.2.9"],
                &["fd00:10:244:1::5!", "fd00:10:244:2::9"],
            )),
    );
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    for (family, vip) in ["10.96.0.10", "fd00:10:96::10"].into_iter().enumerate() {
        let vip = to(vip, 80);
        // 1: a pod keeps its address.
        let from_b = answers([("a", POD_B[family]), ("remote", POD_B[family])]);
        assert_eq!(set(&net, "b", vip), from_b);
        // Both get a fair share: 60 tries, of which each gets 11 or more with overwhelming likelihood.
        assert!(many(&net, "b", vip).values().all(|count| *count > 10));
        // 2, 3: a pod that is given itself is masqueraded, else not.
        let from_a = answers([("a", GATEWAY[family]), ("remote", POD_A[family])]);
        assert_eq!(set(&net, "a", vip), from_a);
        // 4, 5: the node and outside clients are masqueraded.
        let masqueraded = answers([("a", GATEWAY[family]), ("remote", REMOTE_GATEWAY[family])]);
        assert_eq!(set(&net, "node", vip), masqueraded);
        assert_eq!(set(&net, "client", vip), masqueraded);
        // 6: another node's pod that comes through here keeps its address.
        // (Given itself, it gets a packet from its own address, which nobody accepts.)
        wait_until("the remote pod to be given the local one", || {
            one(&net, "remote", vip) == answered("a", 8080, REMOTE[family])
        });
        // 11, 12: a port the Service does not have; 15: an address nobody has.
        for from in ["b", "node", "client"] {
            assert_eq!(one(&net, from, SocketAddr::new(vip.ip(), 81)), Outcome::Refused, "{from}");
        }
        let unused = ["10.96.7.7", "fd00:10:96::7"][family];
        assert_eq!(one(&net, "b", to(unused, 80)), Outcome::TimedOut);
        assert_eq!(one(&net, "node", to(unused, 80)), Outcome::TimedOut);
        // 13: another protocol.
        assert_eq!(udp(&net.name("b"), vip), Outcome::Refused);
    }
}

#[test]
fn external_frontends_are_masqueraded_under_policy_cluster() {
    let Some(net) = Net::new() else { return };
    net.write(
        "web.yaml",
        &(web(&[EXTERNAL])
            + &web_endpoints(
                &["10.244.1.5!", "10.244.2.9"],
                &["fd00:10:244:1::5!", "fd00:10:244:2::9"],
            )),
    );
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    for family in [0, 1] {
        let masqueraded = answers([("a", GATEWAY[family]), ("remote", REMOTE_GATEWAY[family])]);
        let frontends = [
            to(NODE[family], 30080),
            to(["203.0.113.7", "fd00:203::7"][family], 80),
            to(["198.51.100.7", "fd00:198::7"][family], 80),
        ];
        for frontend in frontends {
            // 45, 48, 49; 74, 75, 76; 99: clients, pods and the node alike.
            for from in ["client", "b", "node"] {
                assert_eq!(set(&net, from, frontend), masqueraded, "{from} to {frontend}");
            }
        }
        // 83: a port of a balancer address that no Service has is not ours; nobody else has it.
        let stray = one(&net, "client", SocketAddr::new(frontends[1].ip(), 81));
        assert_ne!(stray, answered("a", 8080, CLIENT[family]));
    }
    // 51: only the primary address serves node ports. 54: nor does loopback.
    assert_eq!(one(&net, "client", to(NODE_SECOND, 30080)), Outcome::Refused);
    assert_eq!(one(&net, "node", to("127.0.0.1", 30080)), Outcome::Refused);
}

#[test]
fn local_policies_keep_traffic_and_addresses() {
    let Some(net) = Net::new() else { return };
    let local = [
        EXTERNAL,
        "internalTrafficPolicy: Local",
        "externalTrafficPolicy: Local",
        "healthCheckNodePort: 32000",
    ];
    let both =
        web_endpoints(&["10.244.1.5!", "10.244.2.9"], &["fd00:10:244:1::5!", "fd00:10:244:2::9"]);
    net.write("web.yaml", &(web(&local) + &both));
    let daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let frontends = |family: usize| {
        [
            to(NODE[family], 30080),
            to(["203.0.113.7", "fd00:203::7"][family], 80),
            to(["198.51.100.7", "fd00:198::7"][family], 80),
        ]
    };
    let vips = [to("10.96.0.10", 80), to("fd00:10:96::10", 80)];
    for family in [0, 1] {
        // 26, 27, 28: the endpoint of this node only.
        assert_eq!(set(&net, "b", vips[family]), answers([("a", POD_B[family])]));
        assert_eq!(set(&net, "node", vips[family]), answers([("a", GATEWAY[family])]));
        assert_eq!(set(&net, "client", vips[family]), answers([("a", GATEWAY[family])]));
        for frontend in frontends(family) {
            // 57, 77: outside clients get this node's endpoint and keep their address.
            assert_eq!(
                set(&net, "client", frontend),
                answers([("a", CLIENT[family])]),
                "{frontend}"
            );
            // 61: pods reach any endpoint, not masqueraded; 80: but when given themselves.
            let any = answers([("a", POD_B[family]), ("remote", POD_B[family])]);
            assert_eq!(set(&net, "b", frontend), any, "{frontend}");
            let hairpin = answers([("a", GATEWAY[family]), ("remote", POD_A[family])]);
            assert_eq!(set(&net, "a", frontend), hairpin, "{frontend}");
            // The node, any, masqueraded.
            let any = answers([("a", GATEWAY[family]), ("remote", REMOTE_GATEWAY[family])]);
            assert_eq!(set(&net, "node", frontend), any, "{frontend}");
        }
    }
    // Endpoints elsewhere only.
    net.write("web.yaml", &(web(&local) + &web_endpoints(&["10.244.2.9"], &["fd00:10:244:2::9"])));
    wait_until("the local endpoint to go", || one(&net, "b", vips[0]) == Outcome::TimedOut);
    for family in [0, 1] {
        // 29, 30
        assert_eq!(one(&net, "b", vips[family]), Outcome::TimedOut);
        assert_eq!(one(&net, "node", vips[family]), Outcome::TimedOut);
        for frontend in frontends(family) {
            // 58, 78; 59, 79; 60, 81
            assert_eq!(one(&net, "client", frontend), Outcome::TimedOut, "{frontend}");
            let kept = answers([("remote", POD_B[family])]);
            assert_eq!(set(&net, "b", frontend), kept, "{frontend}");
            let masqueraded = answers([("remote", REMOTE_GATEWAY[family])]);
            assert_eq!(set(&net, "node", frontend), masqueraded, "{frontend}");
        }
    }
    // 32, 66: a terminating endpoint of this node stands in; 67: for pods it does not.
    let ending = ["10.244.1.5! serving terminating", "10.244.2.9"];
    net.write("web.yaml", &(web(&local) + &web_endpoints(&ending, &[])));
    wait_until("the endpoint to stand in", || one(&net, "b", vips[0]) != Outcome::TimedOut);
    assert_eq!(set(&net, "client", frontends(0)[0]), answers([("a", CLIENT[0])]));
    assert_eq!(set(&net, "b", frontends(0)[0]), answers([("remote", POD_B[0])]));
    // 31: nobody anywhere.
    net.write("web.yaml", &web(&local));
    wait_until("nobody to be left", || one(&net, "b", vips[0]) == Outcome::Refused);
    assert_eq!(one(&net, "client", frontends(0)[1]), Outcome::Refused);
    drop(daemon);
    // 62, 63: without a detector a pod is like any outside client.
    net.write("web.yaml", &(web(&local) + &both));
    let _daemon = run(&net, &[]);
    assert_eq!(set(&net, "b", frontends(0)[0]), answers([("a", POD_B[0])]));
}

#[test]
fn endpoints_are_chosen_by_their_conditions() {
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &web(&[]));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let vip = to("10.96.0.10", 80);
    // 18, 19: nobody can answer, on any frontend (68, 69, and a balancer address).
    for (from, frontend) in [
        ("b", vip),
        ("node", vip),
        ("client", vip),
        ("client", to(NODE[0], 30080)),
        ("node", to(NODE[0], 30080)),
        ("client", to("203.0.113.7", 80)),
        ("b", to("fd00:10:96::10", 80)),
        ("client", to(NODE[1], 30080)),
    ] {
        assert_eq!(one(&net, from, frontend), Outcome::Refused, "{from} to {frontend}");
    }
    let cases: [(&[&str], &[&str]); 8] = [
        (&["10.244.1.5! serving"], &[]),                // 20
        (&["10.244.1.5! serving terminating"], &["a"]), // 21
        (&["10.244.1.5! serving terminating", "10.244.2.9 ready serving"], &["remote"]), // 22
        (&["10.244.1.5! terminating"], &[]),            // 23
        (&["10.244.1.5!"], &["a"]),                     // 24
        (&["10.244.1.5! ready serving terminating"], &["a"]), // 25
        (&["10.244.1.5!", "10.244.1.6!", "10.244.2.9"], &["a", "b", "remote"]),
        (&[], &[]),
    ];
    for (number, (endpoints, by)) in cases.into_iter().enumerate() {
        // The client comes through the same path, and is never one of the pods.
        net.write("web.yaml", &(web(&[]) + &slice("web", "4", &HTTP, endpoints)));
        let expected: BTreeSet<String> = by.iter().map(ToString::to_string).collect();
        wait_until(&format!("case {number}"), || {
            let names = many(&net, "client", vip).into_keys().map(|outcome| match outcome {
                Outcome::Answered { by, .. } => Some(by),
                Outcome::Refused => None,
                Outcome::TimedOut => panic!("case {number}: a packet was lost"),
            });
            names.collect::<Option<BTreeSet<_>>>().unwrap_or_default() == expected
        });
    }
}

#[test]
fn ports_slices_and_protocols_find_each_other() {
    let Some(net) = Net::new() else { return };
    let multi = Svc {
        name: "multi",
        cluster_ips: &["10.96.0.20", "fd00:10:96::20"],
        ports: &[
            ("http", "TCP", 80, 0),
            ("more", "TCP", 81, 0),
            ("dns", "UDP", 53, 0),
            ("sctp", "SCTP", 80, 0),
        ],
        spec: &[],
        balancer_ips: &[],
    };
    let ports =
        [("http", "TCP", 8080), ("more", "TCP", 8081), ("dns", "UDP", 53), ("sctp", "SCTP", 8080)];
    let six = slice("multi", "6", &ports, &["fd00:10:244:1::5!"]);
    // 122: two slices give a port different numbers; 121: an endpoint twice, once as terminating.
    let second = slice("multi", "5", &[("http", "TCP", 8081)], &["10.244.1.6!"])
        + &slice("multi", "7", &[("http", "TCP", 8080)], &["10.244.1.5! serving terminating"]);
    // 72, 73: one node-port number for two protocols; an address and port beat a node port.
    let one_number = Svc {
        name: "tcp-port",
        cluster_ips: &["10.96.0.21"],
        ports: &[("p", "TCP", 80, 30081)],
        spec: &[],
        balancer_ips: &[],
    };
    let other = Svc {
        name: "udp-port",
        cluster_ips: &["10.96.0.22"],
        ports: &[("p", "UDP", 80, 30081)],
        ..one_number
    };
    let beats = Svc {
        name: "beats",
        cluster_ips: &["10.96.0.23"],
        ports: &[("p", "TCP", 30082, 0)],
        spec: &["externalIPs: [192.0.2.10]"],
        balancer_ips: &[],
    };
    let beaten = Svc {
        name: "beaten",
        cluster_ips: &["10.96.0.24"],
        ports: &[("p", "TCP", 80, 30082)],
        ..one_number
    };
    let all = CLUSTER.to_owned()
        + &multi.yaml()
        + &slice("multi", "4", &ports, &["10.244.1.5!"])
        + &second
        + &six
        + &one_number.yaml()
        + &slice("tcp-port", "4", &[("p", "TCP", 8080)], &["10.244.1.5!"])
        + &other.yaml()
        + &slice("udp-port", "4", &[("p", "UDP", 53)], &["10.244.1.6!"])
        + &beats.yaml()
        + &slice("beats", "4", &[("p", "TCP", 8080)], &["10.244.1.6!"])
        + &beaten.yaml()
        + &slice("beaten", "4", &[("p", "TCP", 8080)], &["10.244.1.5!"]);
    net.write("all.yaml", &all);
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);

    let both = [answered("a", 8080, REMOTE[0]), answered("b", 8081, REMOTE[0])];
    assert_eq!(set(&net, "remote", to("10.96.0.20", 80)), both.into());
    assert_eq!(one(&net, "remote", to("10.96.0.20", 81)), answered("a", 8081, REMOTE[0]));
    assert_eq!(udp(&net.name("remote"), to("10.96.0.20", 53)), answered("a", 53, REMOTE[0]));
    assert_eq!(udp(&net.name("client"), to("10.96.0.20", 53)), answered("a", 53, GATEWAY[0]));
    // 116: SCTP like TCP, in both families; and UDP in IPv6.
    for (family, address) in ["10.96.0.20", "fd00:10:96::20"].into_iter().enumerate() {
        for from in ["remote", "client", "node"] {
            let by = sctp(&net.name(from), to(address, 80), &["a", "b"]);
            assert_eq!(by.as_deref(), Some("a"), "family {family}, from {from}");
        }
    }
    assert_eq!(sctp(&net.name("client"), to("10.96.0.20", 99), &["a"]), None);
    assert_eq!(udp(&net.name("client"), to("fd00:10:96::20", 53)), answered("a", 53, GATEWAY[1]));

    assert_eq!(one(&net, "client", to(NODE[0], 30081)), answered("a", 8080, GATEWAY[0]));
    assert_eq!(udp(&net.name("client"), to(NODE[0], 30081)), answered("b", 53, GATEWAY[0]));
    assert_eq!(one(&net, "client", to(NODE[0], 30082)), answered("b", 8080, GATEWAY[0]));
}

#[test]
fn the_configuration_decides_who_is_masqueraded() {
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &(web(&[]) + &web_endpoints(&["10.244.1.5!"], &["fd00:10:244:1::5!"])));
    let vips = [to("10.96.0.10", 80), to("fd00:10:96::10", 80)];
    // 9, 10: without a cluster CIDR only a pod that is given itself.
    let daemon = run(&net, &[]);
    for family in [0, 1] {
        assert_eq!(one(&net, "client", vips[family]), answered("a", 8080, CLIENT[family]));
        assert_eq!(one(&net, "a", vips[family]), answered("a", 8080, GATEWAY[family]));
        // Node ports are masqueraded all the same.
        assert_eq!(
            one(&net, "client", to(NODE[family], 30080)),
            answered("a", 8080, GATEWAY[family])
        );
    }
    daemon.terminate();
    // 8: everything. The rules of a running table are changed in one commit.
    let daemon = run(&net, &["--masquerade-all"]);
    for family in [0, 1] {
        assert_eq!(one(&net, "b", vips[family]), answered("a", 8080, GATEWAY[family]));
    }
    daemon.terminate();
    // 7: NodeCIDR: pods of other nodes are not local.
    let config = net.dir.path().join("config.conf");
    let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\ndetectLocalMode: NodeCIDR\n";
    std::fs::write(&config, text).unwrap();
    let daemon = run(&net, &["--config", config.to_str().unwrap()]);
    for family in [0, 1] {
        assert_eq!(one(&net, "b", vips[family]), answered("a", 8080, POD_B[family]));
        assert_eq!(one(&net, "remote", vips[family]), answered("a", 8080, GATEWAY[family]));
    }
    daemon.terminate();
}

#[test]
fn a_host_network_endpoint_sees_the_client() {
    let Some(net) = Net::new() else { return };
    // 46: delivered to the node itself, a packet never reaches postrouting.
    net.write("web.yaml", &(web(&[]) + &web_endpoints(&["192.0.2.10!"], &["fd00:192::10!"])));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    for family in [0, 1] {
        let seen = one(&net, "client", to(NODE[family], 30080));
        assert_eq!(seen, answered("host", 8080, CLIENT[family]));
        assert_eq!(one(&net, "b", to(NODE[family], 30080)), answered("host", 8080, POD_B[family]));
    }
}

#[test]
fn an_established_connection_outlives_its_endpoint() {
    let Some(net) = Net::new() else { return };
    let ports = [("http", "TCP", 8081)];
    let objects = |endpoints: &[&str]| web(&[]) + &slice("web", "4", &ports, endpoints);
    net.write("web.yaml", &objects(&["10.244.1.5!"]));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let vip = to("10.96.0.10", 80);
    // 110
    let stream = in_netns(&net.name("client"), || TcpStream::connect(vip).unwrap());
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let by = |line: String| line.split(' ').next().unwrap().to_owned();
    assert_eq!(by(lines.next().unwrap().unwrap()), "a");
    net.write("web.yaml", &objects(&["10.244.2.9"]));
    wait_until("new connections to go elsewhere", || {
        one(&net, "client", vip) == answered("remote", 8081, REMOTE_GATEWAY[0])
    });
    (&stream).write_all(b"still there?\n").unwrap();
    assert_eq!(by(lines.next().unwrap().unwrap()), "a");
}
