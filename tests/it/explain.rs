//! `explain` and `list` against the truth: real connections must do what was explained, whoever
//! dials whatever; and their texts are what the snapshots hold.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use serde_json::Value;

use crate::net::{
    CLIENT, Daemon, GATEWAY, NODE, NODE_SECOND, Net, POD_A, POD_B, REMOTE, REMOTE_GATEWAY,
    in_netns, ip,
};
use crate::objects::{CLUSTER, Svc, addresses, slice};
use crate::packets::{CIDRS, to};
use crate::serve::{Outcome, echo_here, tcp_here, udp};

const PROGRAM: &str = env!("CARGO_BIN_EXE_nftproxy");

const WEB: Svc<'_> = Svc {
    name: "web",
    cluster_ips: &["10.96.0.10", "fd00:10:96::10"],
    ports: &[("http", "TCP", 80, 30080), ("dns", "UDP", 53, 30053)],
    spec: &[EXTERNAL],
    balancer_ips: &["203.0.113.7", "fd00:203::7"],
};
const EXTERNAL: &str = "externalIPs: [198.51.100.7, \"fd00:198::7\"]";
const VIP: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];
const UNUSED_VIP: [&str; 2] = ["10.96.7.7", "fd00:10:96::7"];
const BALANCER: [&str; 2] = ["203.0.113.7", "fd00:203::7"];
const EXTERNAL_IP: [&str; 2] = ["198.51.100.7", "fd00:198::7"];

/// The manifests of `web` with these lines of spec, and these endpoints.
fn web(spec: &[&str], who: &[&str]) -> String {
    let ports = [("http", "TCP", 8080), ("dns", "UDP", 53)];
    let spec: Vec<&str> = [EXTERNAL].iter().chain(spec).copied().collect();
    CLUSTER.to_owned()
        + &Svc { spec: &spec, ..WEB }.yaml()
        + &slice("web", "4", &ports, &addresses(who, 0))
        + &slice("web", "6", &ports, &addresses(who, 1))
}

/// Somebody who dials.
struct Dialler {
    name: &'static str,
    addresses: [&'static str; 2],
    /// The node's interface that its packets come in by.
    interface: Option<&'static str>,
}

const DIALLERS: [Dialler; 5] = [
    Dialler { name: "client", addresses: CLIENT, interface: Some("eth0") },
    Dialler { name: "a", addresses: POD_A, interface: Some("pod-a") },
    Dialler { name: "b", addresses: POD_B, interface: Some("pod-b") },
    Dialler { name: "remote", addresses: REMOTE, interface: Some("pod-remote") },
    Dialler { name: "node", addresses: NODE, interface: None },
];

/// A running node, its flags, and what is asked of it.
struct Scene {
    net: Net,
    flags: Vec<String>,
    /// Whether clients are remembered, so that everybody connects once before anything is explained.
    sticky: bool,
    _daemon: Daemon,
}

impl Scene {
    fn new(manifests: &str, flags: &[&str]) -> Option<Self> {
        let net = Net::new()?;
        net.write("web.yaml", manifests);
        let dir = net.manifests().display().to_string();
        let own = ["--manifests", &dir, "--hostname-override", "node-1"];
        let flags: Vec<String> = own.iter().chain(flags).map(ToString::to_string).collect();
        let run: Vec<&str> =
            std::iter::once("run").chain(flags.iter().map(String::as_str)).collect();
        let daemon = Daemon::start(&net.name("node"), &run);
        let sticky = manifests.contains("sessionAffinity: ClientIP");
        Some(Self { net, flags, sticky, _daemon: daemon })
    }

    fn explain(&self, from: &Dialler, target: SocketAddr, protocol: &str, more: &[&str]) -> Value {
        let family = usize::from(target.is_ipv6());
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.net.name("node"), PROGRAM, "explain"]);
        let dialled = if protocol == "icmp" { target.ip().to_string() } else { target.to_string() };
        command.args([&format!("{dialled}/{protocol}"), "--output", "json"]);
        if let Some(interface) = from.interface {
            command.args(["--from", from.addresses[family], "--interface", interface]);
        }
        let output = command.args(&self.flags).args(more).env_remove("RUST_LOG").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let answer: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{e}: {}{said}", String::from_utf8_lossy(&output.stdout)));
        let answers =
            answer["outcomes"].as_array().unwrap().iter().any(|o| o["translated"] == true);
        assert_eq!(output.status.code(), Some(i32::from(!answers)), "{answer:#}{said}");
        answer
    }

    /// Connections do what was explained: everything that was said to be possible is seen, and nothing
    /// else.
    fn holds(&self, from: &Dialler, target: SocketAddr, protocol: &str) {
        let netns = self.net.name(from.name);
        let connect = |tries: usize| -> BTreeSet<Met> {
            match protocol {
                "udp" => (0..tries).map(|_| Met::of(udp(&netns, target))).collect(),
                "icmp" => {
                    in_netns(&netns, || (0..tries).map(|_| Met::of(echo_here(target))).collect())
                }
                _ => in_netns(&netns, || (0..tries).map(|_| Met::of(tcp_here(target))).collect()),
            }
        };
        if self.sticky {
            connect(1);
        }
        let answer = self.explain(from, target, protocol, &[]);
        assert_eq!(answer["tables"], "what the kernel holds", "{answer:#}");
        let shares: f64 = answer["outcomes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|o| o["share"].as_f64().unwrap())
            .sum();
        assert!((shares - 1.0).abs() < 1e-9, "{answer:#}");
        let explained = expected(&answer, from, target);
        // One of three that is never met in so many tries: once in three million.
        let tries = if explained.len() > 1 { 40 } else { 2 };
        let seen = connect(tries);
        let who = from.name;
        let as_said = if explained.is_empty() {
            // It is not translated: whoever has the address answers, if at all; pings always.
            let by_pod = |met: &Met| matches!(met, Met::Pod(by, ..) if by != "echo");
            !seen.iter().any(by_pod) && (protocol != "icmp" || !seen.contains(&Met::Lost))
        } else {
            let mut pairs = seen.iter().zip(&explained);
            seen.len() == explained.len() && pairs.all(|(seen, explained)| seen.is(explained))
        };
        assert!(
            as_said,
            "{who} to {target}/{protocol}: seen {seen:?}, explained {explained:?}: {answer:#}"
        );
        // The objects alone give the same answer.
        let wanted = self.explain(from, target, protocol, &["--wanted"]);
        let remembered = answer["outcomes"][0]["remembered_in"] != Value::Null;
        if !remembered {
            assert_eq!(expected(&wanted, from, target), explained, "{wanted:#}");
            assert_eq!(wanted["summary"], answer["summary"]);
        }
    }

    /// All diallers on all frontends of both families, and over UDP to some of them.
    fn all_hold(&self, diallers: &[&str]) {
        for from in DIALLERS.iter().filter(|d| diallers.contains(&d.name)) {
            for family in [0, 1] {
                for (address, port) in [(VIP, 80), (NODE, 30080), (BALANCER, 80), (EXTERNAL_IP, 80)]
                {
                    self.holds(from, to(address[family], port), "tcp");
                }
                for (address, port) in [(VIP, 53), (NODE, 30053)] {
                    self.holds(from, to(address[family], port), "udp");
                }
            }
        }
    }
}

/// What a connection met, in the words of what can be explained.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Met {
    /// A pod, on its port, which saw this source; None where that cannot be known.
    Pod(String, u16, Option<IpAddr>),
    Refused,
    Lost,
}

impl Met {
    fn of(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Answered { by, port, seen } => Self::Pod(by, port, Some(seen)),
            Outcome::Refused => Self::Refused,
            Outcome::TimedOut => Self::Lost,
        }
    }

    fn is(&self, explained: &Self) -> bool {
        match (self, explained) {
            (Self::Pod(by, port, _), Self::Pod(other, number, None)) => {
                (by, port) == (other, number)
            }
            _ => self == explained,
        }
    }
}

/// What was explained, in the words of what is met. Empty if the packet was said to be left alone.
fn expected(answer: &Value, from: &Dialler, target: SocketAddr) -> BTreeSet<Met> {
    let family = usize::from(target.is_ipv6());
    let outcome = |outcome: &Value| {
        let to = match outcome["fate"].as_str().unwrap() {
            "rejected" => return Some(Met::Refused),
            "dropped" => return Some(Met::Lost),
            "passes" if outcome["translated"] == false => return None,
            _ => outcome["to"].as_str().unwrap().parse::<SocketAddr>().unwrap(),
        };
        let pods = [("a", POD_A), ("b", POD_B), ("remote", REMOTE), ("host", NODE)];
        let (by, _) = pods.iter().find(|(_, addresses)| ip(addresses[family]) == to.ip()).unwrap();
        let masqueraded = outcome["masqueraded"] == true;
        let seen = match (*by, masqueraded) {
            // What the host sends to itself can get any of its addresses.
            ("host", true) => None,
            ("remote", true) => Some(ip(REMOTE_GATEWAY[family])),
            (_, true) => Some(ip(GATEWAY[family])),
            (_, false) => Some(answer["from"].as_str().unwrap().parse().unwrap()),
        };
        // Nobody accepts a packet that comes from its own address: the other node's pod, given itself.
        let itself = *by == from.name && !masqueraded && by != &"host";
        Some(if itself { Met::Lost } else { Met::Pod((*by).to_owned(), to.port(), seen) })
    };
    answer["outcomes"].as_array().unwrap().iter().filter_map(outcome).collect()
}

const CLUSTER_CIDR: [&str; 2] = ["--cluster-cidr", CIDRS];
const LOCAL: [&str; 3] =
    ["internalTrafficPolicy: Local", "externalTrafficPolicy: Local", "healthCheckNodePort: 32000"];

#[test]
fn connections_do_what_is_explained_under_policy_cluster() {
    let Some(scene) = Scene::new(&web(&[], &["a", "remote"]), &CLUSTER_CIDR) else { return };
    scene.all_hold(&["client", "a", "b", "node"]);
    for from in &DIALLERS {
        for family in [0, 1] {
            // What no Service has: a port of a ClusterIP, another protocol, a ClusterIP, a balancer's port.
            scene.holds(from, to(VIP[family], 81), "tcp");
            scene.holds(from, to(VIP[family], 80), "udp");
            scene.holds(from, to(BALANCER[family], 81), "tcp");
            scene.holds(from, to(UNUSED_VIP[family], 80), "tcp");
            // Pings of a ClusterIP, of an address that could be one, and of the node.
            for address in [VIP, UNUSED_VIP, NODE] {
                scene.holds(from, to(address[family], 0), "icmp");
            }
        }
        scene.holds(from, to(NODE_SECOND, 30080), "tcp");
    }
    scene.holds(&DIALLERS[3], to(VIP[0], 80), "tcp");
}

#[test]
fn connections_do_what_is_explained_under_policy_local() {
    let Some(scene) = Scene::new(&web(&LOCAL, &["a", "remote"]), &CLUSTER_CIDR) else { return };
    scene.all_hold(&["client", "a", "b", "node"]);
    drop(scene);
    let Some(scene) = Scene::new(&web(&LOCAL, &["remote"]), &CLUSTER_CIDR) else { return };
    scene.all_hold(&["client", "b", "node"]);
}

#[test]
fn connections_do_what_is_explained_with_nobody_there_and_guarded_balancers() {
    let Some(scene) = Scene::new(&web(&[], &[]), &CLUSTER_CIDR) else { return };
    scene.all_hold(&["client", "b", "node"]);
    drop(scene);
    let ranges = ["loadBalancerSourceRanges: [192.0.2.2/32, \"fd00:192::2/128\"]"];
    let Some(scene) = Scene::new(&web(&ranges, &["a", "remote"]), &CLUSTER_CIDR) else { return };
    scene.all_hold(&["client", "b", "node"]);
}

#[test]
fn connections_do_what_is_explained_with_affinity() {
    let affinity = ["sessionAffinity: ClientIP"];
    let Some(scene) = Scene::new(&web(&affinity, &["a", "b", "remote"]), &CLUSTER_CIDR) else {
        return;
    };
    for from in DIALLERS.iter().filter(|from| from.name != "remote") {
        for family in [0, 1] {
            let vip = to(VIP[family], 80);
            let fresh = scene.explain(from, vip, "tcp", &[]);
            assert_eq!(fresh["outcomes"].as_array().unwrap().len(), 3, "{fresh:#}");
            in_netns(&scene.net.name(from.name), || tcp_here(vip));
            let kept = scene.explain(from, vip, "tcp", &[]);
            let outcomes = kept["outcomes"].as_array().unwrap();
            assert_eq!(outcomes.len(), 1, "{kept:#}");
            assert_eq!(outcomes[0]["remembered_in"], "affinity/default/web/tcp/http");
            let others = kept["left_out"].as_array().unwrap();
            assert_eq!(others.len(), 2);
            assert_eq!(others[0]["why"], "the client is remembered at another one");
        }
    }
    scene.all_hold(&["client", "a", "b", "node"]);
}

#[test]
fn connections_do_what_is_explained_with_other_schedulers() {
    for (scheduler, chains) in [("source-hash", 1), ("maglev", 1), ("round-robin", 3)] {
        let annotated =
            format!("annotations: {{ nftproxy.dev/scheduler: {scheduler} }}, namespace");
        let manifests = web(&[], &["a", "b", "remote"]).replacen(
            "name: web, namespace",
            &format!("name: web, {annotated}"),
            1,
        );
        let Some(scene) = Scene::new(&manifests, &CLUSTER_CIDR) else { return };
        for from in &DIALLERS {
            for family in [0, 1] {
                let vip = to(VIP[family], 80);
                let answer = scene.explain(from, vip, "tcp", &[]);
                assert_eq!(answer["outcomes"].as_array().unwrap().len(), chains, "{answer:#}");
                scene.holds(from, vip, "tcp");
            }
        }
    }
}

#[test]
fn connections_do_what_is_explained_under_every_configuration() {
    let manifests = web(&[], &["a", "remote"]);
    let diallers = ["client", "b", "node"];
    for flags in [&["--masquerade-all"][..], &[]] {
        let Some(scene) = Scene::new(&manifests, flags) else { return };
        scene.all_hold(&diallers);
    }
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.conf");
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    let lines = "detectLocalMode: BridgeInterface\ndetectLocal: { bridgeInterface: pod-b }\nnodePortAddresses: [0.0.0.0/0]\n";
    std::fs::write(&config, format!("{head}{lines}")).unwrap();
    let flags = ["--config", config.to_str().unwrap()];
    let Some(scene) = Scene::new(&manifests, &flags) else { return };
    scene.all_hold(&diallers);
    for from in &DIALLERS {
        scene.holds(from, to(NODE_SECOND, 30080), "tcp");
    }
    drop(scene);
    let flags = [&CLUSTER_CIDR[..], &["--localhost-node-ports"]].concat();
    let Some(scene) = Scene::new(&web(&[], &["host", "remote"]), &flags) else { return };
    scene.all_hold(&["client", "node"]);
    let node = &DIALLERS[4];
    let answer = scene.explain(node, to("127.0.0.1", 30080), "tcp", &[]);
    assert_eq!(answer["outcomes"].as_array().unwrap().len(), 2, "{answer:#}");
}
