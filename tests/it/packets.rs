//! Real connections through a node that nftproxy programs: who answered, seen from which address, or
//! refused, or lost. What the scenario table says is in [`crate::scenario`]; here is what goes beyond
//! it.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::net::{Daemon, GATEWAY, NODE, Net, REMOTE, ip};
use crate::objects::{CLUSTER, Svc, slice};
use crate::serve::{Outcome, tcp, udp};

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

pub(crate) fn answered(by: &str, port: u16, seen: &str) -> Outcome {
    Outcome::Answered { by: by.into(), port, seen: ip(seen) }
}

pub(crate) fn one(net: &Net, from: &str, to: SocketAddr) -> Outcome {
    tcp(&net.name(from), to)
}

/// A Service with ClusterIPs and perhaps a node port, and a slice for each of its endpoints' families.
fn simple(name: &str, ips: &[&str], port: (&str, u16, u16), target: u16, who: &[&str]) -> String {
    let (protocol, number, node_port) = port;
    let ports = [("p", protocol, number, node_port)];
    let service = Svc { name, cluster_ips: ips, ports: &ports, spec: &[], balancer_ips: &[] };
    let of_family = |six: bool| who.iter().copied().filter(move |a| a.contains(':') == six);
    let four = slice(name, "4", &[("p", protocol, target)], &of_family(false).collect::<Vec<_>>());
    let six = slice(name, "6", &[("p", protocol, target)], &of_family(true).collect::<Vec<_>>());
    service.yaml() + &four + &six
}

#[test]
fn every_endpoint_gets_a_fair_share() {
    let Some(net) = Net::new() else { return };
    let vips = ["10.96.0.10", "fd00:10:96::10"];
    let who = ["10.244.1.5!", "10.244.2.9", "fd00:10:244:1::5!", "fd00:10:244:2::9"];
    net.write(
        "web.yaml",
        &(CLUSTER.to_owned() + &simple("web", &vips, ("TCP", 80, 0), 8080, &who)),
    );
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    for vip in vips {
        // Of 60 tries, each gets 11 or more with overwhelming likelihood.
        let counts = many(&net, "b", to(vip, 80));
        assert!(counts.len() == 2 && counts.values().all(|count| *count > 10), "{counts:?}");
    }
}

/// The API server gives one node port to one Service only; manifests may say otherwise.
#[test]
fn services_of_two_protocols_can_have_one_number() {
    let Some(net) = Net::new() else { return };
    let tcp_port = simple("tcp", &["10.96.0.21"], ("TCP", 80, 30081), 8080, &["10.244.1.5!"]);
    let udp_port = simple("udp", &["10.96.0.22"], ("UDP", 80, 30081), 53, &["10.244.1.6!"]);
    // The same on one ClusterIP, as DNS has it.
    let dns = Svc {
        name: "dns",
        cluster_ips: &["10.96.0.23"],
        ports: &[("dns", "UDP", 53, 0), ("dns-tcp", "TCP", 53, 0)],
        spec: &[],
        balancer_ips: &[],
    };
    let dns_ports = [("dns", "UDP", 53), ("dns-tcp", "TCP", 8081)];
    let dns = dns.yaml() + &slice("dns", "4", &dns_ports, &["10.244.1.5!"]);
    net.write("all.yaml", &(CLUSTER.to_owned() + &tcp_port + &udp_port + &dns));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    assert_eq!(one(&net, "client", to(NODE[0], 30081)), answered("a", 8080, GATEWAY[0]));
    assert_eq!(udp(&net.name("client"), to(NODE[0], 30081)), answered("b", 53, GATEWAY[0]));
    let dns = to("10.96.0.23", 53);
    assert_eq!(one(&net, "remote", dns), answered("a", 8081, REMOTE[0]));
    assert_eq!(udp(&net.name("remote"), dns), answered("a", 53, REMOTE[0]));
}

/// Kubernetes says that an endpoint cannot be a ClusterIP; kube-proxy refuses what is sent to one.
#[test]
fn an_endpoint_that_is_a_cluster_ip_is_refused() {
    let Some(net) = Net::new() else { return };
    let vips = ["10.96.0.10", "fd00:10:96::10"];
    let here = ["10.244.1.5!", "fd00:10:244:1::5!"];
    let web = simple("web", &vips, ("TCP", 80, 0), 8080, &here);
    let via = |name, ips: &[&str], port| simple(name, ips, ("TCP", 80, 0), port, &vips);
    // By a port that the ClusterIP has, and by one that it has not.
    let to_its_port = via("to-its-port", &["10.96.0.11", "fd00:10:96::11"], 80);
    let to_no_port = via("to-no-port", &["10.96.0.12", "fd00:10:96::12"], 81);
    net.write("web.yaml", &(CLUSTER.to_owned() + &web + &to_its_port + &to_no_port));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    for (family, prefix) in ["10.96.0.", "fd00:10:96::"].into_iter().enumerate() {
        for from in ["client", "b", "node"] {
            assert!(matches!(one(&net, from, to(vips[family], 80)), Outcome::Answered { .. }));
            for last in ["11", "12"] {
                let vip = to(&format!("{prefix}{last}"), 80);
                assert_eq!(one(&net, from, vip), Outcome::Refused, "{from} to {vip}");
            }
        }
    }
}
