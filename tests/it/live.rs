//! What changes while it runs and is no Service or slice, at the packet: labels of the Node, the ranges
//! of ClusterIPs, who of two has an address. And what becomes of the packets that it masquerades: marks
//! of others stay, ports are drawn.

use std::collections::BTreeSet;
use std::process::Command;

use crate::namespace::nft;
use crate::net::{GATEWAY, NODE, Net, POD_B, in_netns, ip_batch_in, wait_until};
use crate::objects::{CLUSTER, Svc, slice};
use crate::packets::{CIDRS, HTTP, answered, many, one, run, to};
use crate::serve::Outcome;

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];
const EXTERNALS: [&str; 2] = ["198.51.100.7", "fd00:198::7"];

fn service(name: &str, vips: &[&str], spec: &[&str], node_port: u16) -> String {
    let ports = [("http", "TCP", 80, node_port)];
    Svc { name, cluster_ips: vips, ports: &ports, spec, balancer_ips: &[] }.yaml()
}

/// Endpoint `a` and `remote` in both families.
fn slices(service: &str) -> String {
    slice(service, "4", &HTTP, &["10.244.1.5!", "10.244.2.9"])
        + &slice(service, "6", &HTTP, &["fd00:10:244:1::5!", "fd00:10:244:2::9"])
}

/// Who answers many connections of a pod.
fn who(net: &Net, address: &str) -> BTreeSet<String> {
    let by = |outcome| match outcome {
        Outcome::Answered { by, .. } => by,
        other => format!("{other:?}"),
    };
    many(net, "b", to(address, 80)).into_keys().map(by).collect()
}

/// A Service at all addresses and a node port.
fn serve_web(net: &Net) {
    let web = service("web", &VIPS, &[], 30080) + &slices("web");
    net.write("web.yaml", &(CLUSTER.to_owned() + &web));
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_node_that_gets_another_zone_sends_to_the_endpoints_of_that() {
    let Some(net) = Net::new() else { return };
    let hint = |zone: &str| format!(", hints: {{ forZones: [{{ name: {zone} }}] }} }}\n");
    let hinted = slices("web")
        .replace("nodeName: node-1 }\n", &format!("nodeName: node-1{}", hint("z1")))
        .replace("nodeName: node-2 }\n", &format!("nodeName: node-2{}", hint("z2")));
    let services = service("web", &VIPS, &[], 0) + &hinted;
    let label = |zone: &str| {
        let labels = format!("name: node-1, labels: {{ topology.kubernetes.io/zone: {zone} }} }}");
        let node = CLUSTER.replacen("name: node-1 }", &labels, 1);
        assert!(node.contains(zone));
        net.write("web.yaml", &(node + &services));
    };
    label("z1");
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let met = |expected: &[&str]| {
        for vip in VIPS {
            wait_until("the zone to count", || who(&net, vip) == names(expected));
        }
    };
    met(&["a"]);
    label("z2");
    met(&["remote"]);
    // No endpoint is for that one: hints do not count.
    label("z3");
    met(&["a", "remote"]);
    label("z1");
    met(&["a"]);
    // The label goes.
    net.write("web.yaml", &(CLUSTER.to_owned() + &services));
    met(&["a", "remote"]);
}

#[test]
fn ranges_of_cluster_ips_come_and_go() {
    let Some(net) = Net::new() else { return };
    // Somebody who has addresses of a range that becomes one of ClusterIPs.
    let others = ["10.200.0.7", "fd00:10:200::7"];
    for (family, address) in others.into_iter().enumerate() {
        let length = [32, 128][family];
        let add = format!("addr add {address}/{length} dev eth0 {}\n", ["", "nodad"][family]);
        ip_batch_in(&net.name("remote"), &add);
        let route = format!("route add {address}/{length} dev pod-remote\n");
        ip_batch_in(&net.name("node"), &route);
    }
    net.write("cluster.yaml", CLUSTER);
    let range = |cidrs: &str| {
        let text = format!(
            "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {{ name: more }}\nspec: {{ cidrs: [{cidrs}] }}\n"
        );
        net.write("more.yaml", &text);
    };
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let met = |expected: [bool; 2]| {
        for (address, is_dropped) in others.into_iter().zip(expected) {
            for from in ["b", "node"] {
                wait_until("the range to count", || match one(&net, from, to(address, 8080)) {
                    Outcome::TimedOut => is_dropped,
                    Outcome::Answered { by, .. } => by == "remote" && !is_dropped,
                    Outcome::Refused => false,
                });
            }
        }
    };
    met([false, false]);
    range("10.200.0.0/16, \"fd00:10:200::/112\"");
    met([true, true]);
    range("10.200.0.0/16");
    met([true, false]);
    range("10.200.0.8/29, \"fd00:10:200::/112\"");
    met([false, true]);
    // An address that is allocated is refused, where a port has no Service.
    net.write("web.yaml", &service("web", &others, &[], 0));
    for address in others {
        wait_until("a refusal", || one(&net, "b", to(address, 8080)) == Outcome::Refused);
    }
    std::fs::remove_file(net.manifests().join("web.yaml")).unwrap();
    std::fs::remove_file(net.manifests().join("more.yaml")).unwrap();
    met([false, false]);
}

/// A bit of another program's, and one of ours that is not the usual one.
#[test]
fn marks_of_others_masquerade_nothing_and_stay() {
    let Some(net) = Net::new() else { return };
    serve_web(&net);
    let config = net.dir.path().join("config.conf");
    std::fs::write(
        &config,
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
         clusterCIDR: 10.244.0.0/16,fd00:10:244::/56\nnftables: { masqueradeBit: 5 }\n",
    )
    .unwrap();
    let _daemon = run(&net, &["--config", config.to_str().unwrap()]);
    // The usual bit and further ones, on all new connections; counted again behind everything.
    let text = "table inet other {
        chain before { type filter hook prerouting priority -150
            ct state new meta mark set 0xf0f04000
        }
        chain after { type filter hook postrouting priority 200
            ct state new ct status dnat meta mark == 0xf0f04000 counter comment \"kept\"
            ct state new ct status dnat meta mark != 0xf0f04000 counter comment \"changed\"
        }
    }";
    in_netns(&net.name("node"), || nft(&["-f", "-"], text));
    for family in [0, 1] {
        // A pod is not masqueraded, whoever sets bit 14; who comes from outside is.
        let from_pod = many(&net, "b", to(VIPS[family], 80));
        assert!(from_pod.contains_key(&answered("a", 8080, POD_B[family])), "{from_pod:?}");
        assert!(from_pod.contains_key(&answered("remote", 8080, POD_B[family])), "{from_pod:?}");
        for target in [to(VIPS[family], 80), to(NODE[family], 30080)] {
            let from_outside = many(&net, "client", target);
            let here = answered("a", 8080, GATEWAY[family]);
            assert!(
                from_outside.contains_key(&here) && from_outside.len() == 2,
                "{from_outside:?}"
            );
        }
    }
    let listed = in_netns(&net.name("node"), || nft(&["list", "table", "inet", "other"], ""));
    let packets = |comment: &str| -> u32 {
        let line = listed.lines().find(|line| line.contains(comment)).unwrap();
        line.split("packets ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!(packets("changed"), 0, "{listed}");
    assert!(packets("kept") >= 360, "{listed}");
}

/// Two clients behind one address with the same port would not fail for it; and nobody can guess it.
#[test]
fn the_port_of_a_masqueraded_connection_is_drawn() {
    let Some(net) = Net::new() else { return };
    serve_web(&net);
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    for family in [0, 1] {
        many(&net, "client", to(NODE[family], 30080));
        // Both directions: source and destination ports of what was sent, and of its answers.
        let listed = in_netns(&net.name("node"), || {
            let family = ["ipv4", "ipv6"][family];
            let arguments = ["-L", "-f", family, "-p", "tcp", "--orig-port-dst", "30080"];
            let output = Command::new("conntrack").args(arguments).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        });
        let ports = |line: &str, which: &str, direction: usize| -> u16 {
            line.split(which)
                .nth(1 + direction)
                .unwrap()
                .split(' ')
                .next()
                .unwrap()
                .parse()
                .unwrap()
        };
        let all: Vec<_> = listed
            .lines()
            .map(|line| (ports(line, "sport=", 0), ports(line, "dport=", 1)))
            .collect();
        assert!(all.len() >= 60, "{listed}");
        // One after the other they would keep their ports, as they are free. One in 64,000 does.
        let kept = all.iter().filter(|(own, masqueraded)| own == masqueraded).count();
        assert!(kept <= 2, "{kept} of {}: {listed}", all.len());
        let distances: BTreeSet<_> = all.iter().map(|(own, drawn)| own.abs_diff(*drawn)).collect();
        assert!(distances.len() > 50, "not drawn, but counted: {distances:?}");
    }
}

/// Of two that claim an address and port, the older one has it: on every node, over restarts, and whatever
/// the other one does.
#[test]
fn a_contested_external_ip_stays_with_the_older_service() {
    let Some(net) = Net::new() else { return };
    let external = format!("externalIPs: [{:?}, {:?}]", EXTERNALS[0], EXTERNALS[1]);
    let claim = |name: &str, last: u8, created: &str, spec: &str| {
        let vips = [format!("10.96.0.{last}"), format!("fd00:10:96::{last}")];
        let text = service(name, &[&vips[0], &vips[1]], &[&external, spec], 0);
        let created = format!("namespace: default, creationTimestamp: \"{created}\" }}");
        text.replacen("namespace: default }", &created, 1)
    };
    // By name it would be the other way around.
    let (older, younger) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
    let old = claim("z-old", 21, older, "sessionAffinity: None")
        + &slice("z-old", "4", &HTTP, &["10.244.1.5!"])
        + &slice("z-old", "6", &HTTP, &["fd00:10:244:1::5!"]);
    let young = |spec: &str| {
        claim("a-young", 22, younger, spec)
            + &slice("a-young", "4", &HTTP, &["10.244.2.9"])
            + &slice("a-young", "6", &HTTP, &["fd00:10:244:2::9"])
    };
    net.write("cluster.yaml", CLUSTER);
    net.write("young.yaml", &young("sessionAffinity: None"));
    let mut daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let met = |expected: &[&str]| {
        for address in EXTERNALS {
            wait_until("the owner to answer", || who(&net, address) == names(expected));
        }
    };
    met(&["remote"]);
    net.write("old.yaml", &old);
    met(&["a"]);
    daemon.wait_for("198.51.100.7:80/tcp is served by Service default/z-old");
    // The younger one changes: nothing comes of it there.
    net.write("young.yaml", &young("sessionAffinity: ClientIP"));
    wait_until("the change", || {
        let tables = || nft(&["list", "maps", "ip"], "");
        in_netns(&net.name("node"), tables).contains("affinity/default/a-young")
    });
    met(&["a"]);
    daemon.kill9();
    daemon = run(&net, &["--cluster-cidr", CIDRS]);
    met(&["a"]);
    std::fs::remove_file(net.manifests().join("old.yaml")).unwrap();
    met(&["remote"]);
    drop(daemon);
}

/// As one that goes while it runs: who was held to it chooses anew, and keeps that when it comes back.
#[test]
fn clients_of_an_endpoint_that_went_while_no_proxy_ran_are_forgotten() {
    let Some(net) = Net::new() else { return };
    let endpoints = ["10.244.1.5!", "10.244.1.6!", "10.244.2.9"];
    let objects = |without: &[&str]| {
        let there: Vec<&str> =
            endpoints.into_iter().filter(|e| !without.contains(&e.trim_end_matches('!'))).collect();
        let web = service("web", &VIPS[..1], &["sessionAffinity: ClientIP"], 30080);
        net.write("web.yaml", &(CLUSTER.to_owned() + &web + &slice("web", "4", &HTTP, &there)));
    };
    // The client is an endpoint itself, so that its address says nothing.
    let holds = |address: &str| {
        let map = || nft(&["list", "map", "ip", "nftproxy", "affinity/default/web/tcp/http"], "");
        in_netns(&net.name("node"), map).contains(&format!(": {address} . 8080"))
    };
    objects(&[]);
    let daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let first = who(&net, VIPS[0]);
    assert_eq!(first.len(), 1, "{first:?}");
    let address =
        endpoints.map(|e| e.trim_end_matches('!')).into_iter().find(|e| holds(e)).unwrap();
    daemon.kill9();
    objects(&[address]);
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    wait_until("the client to be forgotten", || !holds(address));
    let second = who(&net, VIPS[0]);
    assert!(second.len() == 1 && second.is_disjoint(&first), "{first:?}, {second:?}");
    objects(&[]);
    wait_until("the endpoint to be back", || {
        let map = || nft(&["list", "map", "ip", "nftproxy", "endpoints"], "");
        in_netns(&net.name("node"), map).contains(address)
    });
    assert_eq!(who(&net, VIPS[0]), second);
}
