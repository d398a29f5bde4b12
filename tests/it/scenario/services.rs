//! The Services of the scenario table, as data: one for every combination of policies, endpoints and
//! addresses that a row asks for, all there at once, so that a proxy has to be started but once for a
//! configuration.
//!
//! Each has every kind of frontend, at addresses that follow from its place in the list.

use serde_json::{Value, json};

use super::world::{HOST_NETWORK_ELSEWHERE, Zone};
use crate::net::{NODE, POD_A, POD_B, REMOTE};

/// A Service, and the slices of its endpoints. An endpoint is a word for where it is (`a`, `b`,
/// `remote`, `host` or `host-elsewhere`), and what else there is to say about it: conditions that are
/// true (the others are false then; without any it is ready and serving), `unset` for no conditions
/// at all, `zone:z1` and `node:node-1` for hints, and `nowhere` for no node name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Service {
    pub(crate) name: &'static str,
    pub(crate) endpoints: &'static [&'static str],
    /// Further slices: port number, labels, endpoints.
    pub(crate) more: &'static [(u16, Option<&'static str>, &'static [&'static str])],
    pub(crate) protocol: &'static str,
    pub(crate) target_port: u16,
    /// If it is not 80.
    pub(crate) port: Option<u16>,
    /// A second port, at the endpoints 8081: protocol, number, node port.
    pub(crate) second: Option<(&'static str, u16, u16)>,
    /// If it does not follow from the place in the list.
    pub(crate) node_port: Option<u16>,
    pub(crate) external_ips: Option<[&'static str; 2]>,
    pub(crate) internal_local: bool,
    pub(crate) external_local: bool,
    pub(crate) ranges: &'static [&'static str],
    pub(crate) balancer: Balancer,
    pub(crate) only_ipv4: bool,
    pub(crate) label: Option<&'static str>,
    /// Seconds for which clients are held to their endpoint.
    pub(crate) affinity: Option<u32>,
}

/// What a load balancer has in `status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Balancer {
    /// Addresses in this `ipMode`.
    Vip,
    Proxy,
    /// No address but a name.
    Hostname,
}

const fn service(name: &'static str, endpoints: &'static [&'static str]) -> Service {
    Service {
        name,
        endpoints,
        more: &[],
        protocol: "TCP",
        target_port: 8080,
        port: None,
        second: None,
        node_port: None,
        external_ips: None,
        internal_local: false,
        external_local: false,
        ranges: &[],
        balancer: Balancer::Vip,
        only_ipv4: false,
        label: None,
        affinity: None,
    }
}

impl Service {
    const fn internal(self) -> Self {
        Self { internal_local: true, ..self }
    }

    const fn external(self) -> Self {
        Self { external_local: true, ..self }
    }

    const fn ranges(self, ranges: &'static [&'static str]) -> Self {
        Self { ranges, ..self }
    }

    const fn udp(self) -> Self {
        Self { protocol: "UDP", ..self }
    }

    const fn external_ips(self, addresses: [&'static str; 2]) -> Self {
        Self { external_ips: Some(addresses), ..self }
    }
}

const ANY: &[&str] = &["a", "remote"];
const ENDING: &[&str] = &["a serving terminating", "remote"];
const CLIENTS: &[&str] = &["192.0.2.2/32", "fd00:192::2/128"];
const OTHERS: &[&str] = &["198.18.99.0/24", "fd00:198:99::/64"];
const NODES: &[&str] = &["192.0.2.10/32", "fd00:192::10/128"];
const SHARED: [[&str; 2]; 3] = [
    ["198.51.100.201", "fd00:198::201"],
    ["198.51.100.202", "fd00:198::202"],
    ["198.51.100.203", "fd00:198::203"],
];

/// A node port, and the number of somebody else's port beyond.
pub(crate) const UDP_NUMBER: u16 = 30904;

pub(crate) const SERVICES: &[Service] = &[
    service("any", ANY),
    service("only-a", &["a"]),
    service("here", &["a", "b"]),
    service("none", &[]),
    service("unready", &["a serving"]),
    service("ending", &["a serving terminating"]),
    service("ending-a", ENDING),
    service("ended", &["a terminating"]),
    service("unset", &["a unset", "remote unset"]),
    service("published", &["a ready serving terminating"]),
    service("internal", ANY).internal(),
    service("internal-away", &["remote"]).internal(),
    service("internal-none", &[]).internal(),
    service("internal-ending", ENDING).internal(),
    service("internal-unready", &["a serving", "remote"]).internal(),
    service("internal-nowhere", &["a nowhere"]).internal(),
    service("zone", &["a zone:z1", "remote zone:z2"]),
    service("zone-partly", &["a zone:z1", "remote"]),
    service("zone-elsewhere", &["a zone:z2", "remote zone:z3"]),
    service("zone-unready", &["a serving zone:z1", "remote zone:z2"]),
    service(
        "zone-ending",
        &["a serving terminating zone:z1", "remote serving terminating zone:z2"],
    ),
    service("zone-local", &["a zone:z2", "remote zone:z1"]).external(),
    service("node-hint", &["a node:node-1", "remote node:node-2"]),
    service("node-elsewhere", &["a node:node-2 zone:z2", "remote node:node-3 zone:z1"]),
    service("host", &["host"]),
    service("host-elsewhere", &["host-elsewhere"]),
    service("daemon", ANY),
    service("external", ANY).external(),
    service("external-away", &["remote"]).external(),
    service("external-none", &[]).external(),
    service("external-ending", ENDING).external(),
    // The API server gives one number to two ports only if they are of one Service.
    Service {
        node_port: Some(30901),
        second: Some(("UDP", 80, 30901)),
        ..service("number", &["a"])
    },
    Service { port: Some(30902), ..service("node-ip", &["a"]).external_ips(NODE) },
    Service { node_port: Some(30902), ..service("node-port", &["b"]) },
    service("balancer-here", ANY).external(),
    Service { balancer: Balancer::Proxy, ..service("mode-proxy", ANY) },
    Service { balancer: Balancer::Proxy, ..service("mode-proxy-ranges", ANY).ranges(OTHERS) },
    Service { balancer: Balancer::Hostname, ..service("hostname", ANY) },
    service("ranges", ANY).ranges(CLIENTS),
    service("ranges-local", ANY).ranges(CLIENTS).external(),
    service("ranges-others", ANY).ranges(OTHERS),
    service("ranges-node", ANY).ranges(NODES),
    service("ranges-node-here", ANY).ranges(NODES),
    service("ranges-others-here", ANY).ranges(OTHERS),
    service("ranges-none", &[]).ranges(CLIENTS),
    service("ranges-others-none", &[]).ranges(OTHERS),
    service("ranges-ipv4", ANY).ranges(&["198.18.99.0/24"]),
    service("ranges-overlap", ANY).ranges(&[
        "192.0.2.0/30",
        "192.0.2.0/29",
        "192.0.2.2/32",
        "192.0.2.2/32",
        "fd00:192::/126",
        "fd00:192::2/128",
        "fd00:192::2/128",
    ]),
    service("claim-1", &["a"]).external_ips(SHARED[0]),
    service("claim-2", &["remote"]).external_ips(SHARED[0]),
    // The rule of nftproxy is that the older Service, or else the first by name, has it.
    service("full-1", &["a"]).external_ips(SHARED[1]),
    service("full-2-none", &[]).external_ips(SHARED[1]),
    service("none-1", &[]).external_ips(SHARED[2]),
    service("none-2-full", &["a"]).external_ips(SHARED[2]),
    Service { protocol: "SCTP", ..service("sctp", &["a"]) },
    Service { only_ipv4: true, ..service("only-ipv4", ANY) },
    Service {
        more: &[(8080, Some("service.kubernetes.io/headless"), &["a"])],
        ..service("headless-slice", &["remote"])
    },
    Service {
        label: Some("service.kubernetes.io/service-proxy-name"),
        ..service("other-proxy", &["a"])
    },
    Service {
        more: &[(8080, None, &["a serving terminating"])],
        ..service("twice", &["a", "remote serving terminating"])
    },
    Service { more: &[(8081, None, &["a"])], ..service("two-numbers", &["a"]) },
    // What changes over time.
    service("deleted", &["a"]),
    Service { target_port: 8081, ..service("ranges-change", &["a"]).ranges(CLIENTS) },
    Service {
        affinity: Some(10_800),
        second: Some(("TCP", 443, 30903)),
        ..service("sticky", &["a", "b", "remote"])
    },
    Service { affinity: Some(4), ..service("sticky-short", &["a", "b", "remote"]) },
    Service { target_port: 8081, ..service("tcp-leaves", &["a"]) },
    service("udp-leaves", &["a"]).udp(),
    service("udp-ends", &["a"]).udp(),
    service("udp-none", &["a"]).udp(),
    service("udp-late", &[]).udp(),
    Service { node_port: Some(UDP_NUMBER), ..service("udp-number", &["a"]).udp() },
];

/// The Service of this name, and its number.
pub(crate) fn find(name: &str) -> (usize, &'static Service) {
    let found = SERVICES.iter().enumerate().find(|(_, service)| service.name == name);
    let (place, service) = found.unwrap_or_else(|| panic!("no Service {name:?} in the table"));
    (place + 1, service)
}

/// The ClusterIPs of a Service.
pub(crate) fn cluster_ip(name: &str) -> [String; 2] {
    let number = find(name).0;
    [format!("10.96.1.{number}"), format!("fd00:10:96::1:{number:x}")]
}

pub(crate) fn balancer_ip(name: &str) -> [String; 2] {
    let number = find(name).0;
    [format!("203.0.113.{number}"), format!("fd00:203::{number:x}")]
}

pub(crate) fn external_ip(name: &str) -> [String; 2] {
    let (number, service) = find(name);
    let own = [format!("198.51.100.{number}"), format!("fd00:198::{number:x}")];
    service.external_ips.map_or(own, |addresses| addresses.map(str::to_owned))
}

pub(crate) fn node_port(name: &str) -> u16 {
    let (number, service) = find(name);
    service.node_port.unwrap_or_else(|| 30000 + u16::try_from(number).unwrap())
}

pub(crate) fn port(name: &str) -> u16 {
    find(name).1.port.unwrap_or(80)
}

impl Service {
    pub(crate) fn object(&self) -> Value {
        let families = if self.only_ipv4 { 1 } else { 2 };
        let ip_families = &["IPv4", "IPv6"][..families];
        let family_policy = ["SingleStack", "RequireDualStack"][families - 1];
        let first = |list: [String; 2]| list[..families].to_vec();
        let policy = |local| if local { "Local" } else { "Cluster" };
        let mut ports = vec![json!({
            "name": "p", "protocol": self.protocol, "port": port(self.name),
            "nodePort": node_port(self.name),
        })];
        if let Some((protocol, port, node_port)) = self.second {
            ports.push(json!({
                "name": "q", "protocol": protocol, "port": port, "nodePort": node_port,
            }));
        }
        let mut spec = json!({
            "type": "LoadBalancer",
            "clusterIP": cluster_ip(self.name)[0],
            "clusterIPs": first(cluster_ip(self.name)),
            "ipFamilies": ip_families,
            "ipFamilyPolicy": family_policy,
            "externalIPs": external_ip(self.name),
            "internalTrafficPolicy": policy(self.internal_local),
            "externalTrafficPolicy": policy(self.external_local),
            "ports": ports,
        });
        if self.external_local {
            spec["healthCheckNodePort"] = json!(31000 + find(self.name).0);
        }
        if !self.ranges.is_empty() {
            spec["loadBalancerSourceRanges"] = json!(self.ranges);
        }
        if let Some(seconds) = self.affinity {
            spec["sessionAffinity"] = json!("ClientIP");
            spec["sessionAffinityConfig"] = json!({ "clientIP": { "timeoutSeconds": seconds } });
        }
        let entries =
            |mode| balancer_ip(self.name).map(|ip| json!({ "ip": ip, "ipMode": mode })).to_vec();
        let ingress = match self.balancer {
            Balancer::Vip => entries("VIP"),
            Balancer::Proxy => entries("Proxy"),
            Balancer::Hostname => vec![json!({ "hostname": "balancer.example" })],
        };
        let labels = self.label.map(|label| json!({ label: "" })).unwrap_or_default();
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": self.name, "namespace": "default", "labels": labels },
            "spec": spec,
            "status": { "loadBalancer": { "ingress": ingress } },
        })
    }

    /// Its slices in both families, with these endpoints in the first of each.
    pub(crate) fn slices(&self, endpoints: [&[&str]; 2]) -> Vec<Value> {
        let mut slices = Vec::new();
        for (family, kind) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let first = (self.target_port, None, endpoints[family]);
            let all = std::iter::once(first).chain(self.more.iter().copied());
            for (place, (port, label, endpoints)) in all.enumerate() {
                let mut ports =
                    vec![json!({ "name": "p", "protocol": self.protocol, "port": port })];
                if let Some((protocol, ..)) = self.second {
                    ports.push(json!({ "name": "q", "protocol": protocol, "port": 8081 }));
                }
                let mut labels = json!({ "kubernetes.io/service-name": self.name });
                if let Some(label) = label {
                    labels[label] = json!("");
                }
                let endpoints = endpoints.iter().map(|words| endpoint(words, family));
                slices.push(json!({
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": format!("{}-{}-{place}", self.name, kind.to_lowercase()),
                        "namespace": "default", "labels": labels,
                    },
                    "addressType": kind,
                    "ports": ports,
                    "endpoints": endpoints.collect::<Vec<_>>(),
                }));
            }
        }
        slices
    }
}

fn endpoint(words: &str, family: usize) -> Value {
    let mut words = words.split(' ');
    let (address, node) = match words.next().unwrap() {
        "a" => (POD_A, "node-1"),
        "b" => (POD_B, "node-1"),
        "host" => (NODE, "node-1"),
        "remote" => (REMOTE, "node-2"),
        "host-elsewhere" => (HOST_NETWORK_ELSEWHERE, "node-2"),
        other => panic!("no endpoint {other:?}"),
    };
    let mut endpoint = json!({ "addresses": [address[family]], "nodeName": node });
    let (mut conditions, mut unset) = (Vec::new(), false);
    for word in words {
        match word.split_once(':') {
            Some(("zone", name)) => endpoint["hints"]["forZones"] = json!([{ "name": name }]),
            Some(("node", name)) => endpoint["hints"]["forNodes"] = json!([{ "name": name }]),
            Some(_) => panic!("no hint {word:?}"),
            None if word == "nowhere" => drop(endpoint.as_object_mut().unwrap().remove("nodeName")),
            None if word == "unset" => unset = true,
            None => conditions.push(word),
        }
    }
    if conditions.is_empty() {
        conditions = vec!["ready", "serving"];
    }
    if !unset {
        for condition in ["ready", "serving", "terminating"] {
            endpoint["conditions"][condition] = json!(conditions.contains(&condition));
        }
    }
    endpoint
}

/// The Node this is about.
pub(crate) fn node(zone: Zone, with_ipv6: bool) -> Value {
    let labels = match zone {
        Zone::Z1 => json!({ "topology.kubernetes.io/zone": "z1" }),
        Zone::None => json!({}),
    };
    let addresses = NODE[..if with_ipv6 { 2 } else { 1 }].iter();
    let addresses = addresses.map(|ip| json!({ "type": "InternalIP", "address": ip }));
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": "node-1", "labels": labels },
        "spec": { "podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"] },
        "status": { "addresses": addresses.collect::<Vec<_>>() },
    })
}

pub(crate) fn service_cidr() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": { "name": "kubernetes" },
        "spec": { "cidrs": ["10.96.0.0/12", "fd00:10:96::/108"] },
    })
}
