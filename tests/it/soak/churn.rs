//! What changes under a soak: Services that are dialled, Services beside them, addresses of the node, and
//! ServiceCIDRs; as manifests, and through an API server, which refuses what makes no sense.

use std::time::Duration;

use crate::net::{ip_batch_in, write_manifest};
use crate::objects::{Svc, slice};
use crate::restart::Random;

use super::{Api, Soak};

/// What is dialled: who may answer, who always does, and the last part of its addresses.
pub(super) struct Dialled {
    pub(super) name: &'static str,
    pub(super) pods: [&'static str; 2],
    pub(super) number: u16,
}

pub(super) const DIALLED: [Dialled; 2] = [
    Dialled { name: "web", pods: ["a", "b"], number: 10 },
    Dialled { name: "api", pods: ["remote", "b"], number: 20 },
];
const BESIDE: u64 = 24;

fn address(pod: &str, family: usize) -> &'static str {
    match (pod, family) {
        ("a", 0) => "10.244.1.5!",
        ("a", _) => "fd00:10:244:1::5!",
        ("b", 0) => "10.244.1.6!",
        ("b", _) => "fd00:10:244:1::6!",
        (_, 0) => "10.244.2.9",
        (_, _) => "fd00:10:244:2::9",
    }
}

/// A Service that is dialled, with the first of its pods and perhaps the other, and anything that may change
/// without a connection noticing.
pub(super) fn dialled(service: &Dialled, random: &mut Random) -> String {
    let Dialled { name, pods, number } = service;
    let addresses = [format!("10.96.0.{number}"), format!("fd00:10:96::{number}")];
    let affinity = ["sessionAffinity: None", "sessionAffinity: ClientIP"];
    let external = format!("externalIPs: [\"198.51.100.{number}\", \"fd00:198::{number}\"]");
    let ports = [
        ("tcp", "TCP", 80, 30000 + number),
        ("udp", "UDP", 80, 30000 + number),
        ("sctp", "SCTP", 80, 30000 + number),
    ];
    let mut text = Svc {
        name,
        cluster_ips: &addresses.each_ref().map(String::as_str),
        ports: &ports,
        spec: &[
            affinity[usize::from(random.below(3) == 0)],
            &external,
            "ipFamilyPolicy: RequireDualStack",
        ],
        balancer_ips: &[],
    }
    .yaml();
    let scheduler = ["random", "round-robin", "source-hash", "maglev"][random.index(4)];
    let annotated = format!("annotations: {{ nftproxy.dev/scheduler: {scheduler} }}, namespace");
    text = text.replacen("namespace", &annotated, 1);
    let pods = &pods[..=random.index(2)];
    for family in [0, 1] {
        let addresses: Vec<_> = pods.iter().map(|pod| address(pod, family)).collect();
        let ports = [("tcp", "TCP", 8080), ("udp", "UDP", 8080), ("sctp", "SCTP", 8080)];
        text += &slice(name, &family.to_string(), &ports, &addresses);
    }
    text
}

/// Services that nobody dials, of all kinds.
pub(super) fn beside(random: &mut Random) -> String {
    let mut text = String::new();
    for i in 0..BESIDE {
        if random.below(4) == 0 {
            continue;
        }
        let name = format!("beside-{i}");
        let address = format!("10.97.{}.{}", random.below(3), i + 1);
        let policy = |random: &mut Random| ["Cluster", "Local"][random.index(2)];
        let spec = [
            format!("internalTrafficPolicy: {}", policy(random)),
            format!("externalTrafficPolicy: {}", policy(random)),
            format!("sessionAffinity: {}", ["None", "ClientIP"][random.index(2)]),
            format!("loadBalancerSourceRanges: [10.{}.0.0/16]", random.below(9)),
            format!("healthCheckNodePort: {}", 31000 + i),
        ];
        text += &Svc {
            name: &name,
            cluster_ips: &[&address],
            ports: &[("http", "TCP", 80, 30100 + u16::try_from(i).unwrap())],
            spec: &spec.each_ref().map(String::as_str),
            balancer_ips: &[&format!("203.0.113.{}", i + 1)],
        }
        .yaml();
        let endpoints = (0..random.below(5)).map(|e| format!("10.244.{}.{}", e % 2 + 1, e + 20));
        let endpoints: Vec<_> = endpoints.collect();
        let endpoints: Vec<_> = endpoints.iter().map(String::as_str).collect();
        text += &slice(&name, "4", &[("http", "TCP", 8080)], &endpoints);
    }
    text
}

/// A Service that nobody dials as an API server takes it: what cannot be changed stays.
fn beside_by_api(i: u64, random: &mut Random) -> String {
    let name = format!("beside-{i}");
    let policy = ["Cluster", "Local"][random.index(2)];
    let affinity = ["None", "ClientIP"][random.index(2)];
    let spec = [
        format!("internalTrafficPolicy: {policy}"),
        format!("sessionAffinity: {affinity}"),
        format!("loadBalancerSourceRanges: [10.{}.0.0/16]", random.below(9)),
    ];
    let endpoints: Vec<_> =
        (0..random.below(5)).map(|e| format!("10.244.{}.{}", e % 2 + 1, e + 20)).collect();
    let endpoints: Vec<_> = endpoints.iter().map(String::as_str).collect();
    Svc {
        name: &name,
        cluster_ips: &[&format!("10.97.0.{}", i + 1)],
        ports: &[("http", "TCP", 80, 30100 + u16::try_from(i).unwrap())],
        spec: &spec.each_ref().map(String::as_str),
        balancer_ips: &[&format!("203.0.113.{}", i + 1)],
    }
    .yaml()
        + &slice(&name, "4", &[("http", "TCP", 8080)], &endpoints)
}

impl Random {
    pub(super) fn index(&mut self, limit: u64) -> usize {
        usize::try_from(self.below(limit)).unwrap()
    }
}

impl Soak<'_> {
    /// Changes manifests and the node, without a pause.
    pub(super) fn change(&self, mut random: Random) {
        let dir = self.net.manifests();
        let mut extra = false;
        while !self.is_over() {
            match random.below(12) {
                0..5 => {
                    let service = &DIALLED[random.index(2)];
                    let text = dialled(service, &mut random);
                    write_manifest(&dir, &format!("{}.yaml", service.name), &text);
                }
                5..8 => write_manifest(&dir, "beside.yaml", &beside(&mut random)),
                8 | 9 => self.change_address(&mut extra),
                _ => write_manifest(
                    &dir,
                    "cidr.yaml",
                    &format!(
                        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {{ name: more }}\n\
                         spec: {{ cidrs: [10.{}.0.0/16] }}\n",
                        97 + random.below(3)
                    ),
                ),
            }
            self.seen.lock().unwrap().changes += 1;
            std::thread::sleep(Duration::from_millis(random.below(60)));
        }
    }

    /// Changes objects of an API server and the node, whenever there is a server.
    pub(super) fn change_by_api(&self, api: &Api<'_>, mut random: Random) {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let mut extra = false;
        let mut there = vec![false; usize::try_from(BESIDE).unwrap()];
        while !self.is_over() {
            let n = random.below(10);
            if n == 0 {
                self.change_address(&mut extra);
            } else {
                // Nobody ends the server meanwhile.
                let plane = api.plane.lock().unwrap();
                let i = random.index(BESIDE);
                if n < 5 {
                    runtime.block_on(plane.apply(&dialled(&DIALLED[random.index(2)], &mut random)));
                } else if there[i] && random.below(2) == 0 {
                    for (kind, name) in [("Service", ""), ("EndpointSlice", "-4")] {
                        let name = format!("beside-{i}{name}");
                        runtime.block_on(plane.delete(kind, "default", &name));
                    }
                    there[i] = false;
                } else {
                    runtime.block_on(plane.apply(&beside_by_api(i as u64, &mut random)));
                    there[i] = true;
                }
            }
            self.seen.lock().unwrap().changes += 1;
            std::thread::sleep(Duration::from_millis(random.below(60)));
        }
    }

    fn change_address(&self, extra: &mut bool) {
        let verb = if *extra { "del" } else { "add" };
        *extra = !*extra;
        ip_batch_in(&self.net.name("node"), &format!("addr {verb} 192.0.2.77/24 dev eth0\n"));
    }
}
