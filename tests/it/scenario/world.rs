//! Where the scenario table takes place: the node of [`Net`] with what the table needs besides, the
//! configurations a proxy runs with, and the objects there are.
//!
//! What a proxy leaves alone is as much a row as what it takes. So whoever would get such a packet
//! answers it here: daemons of the node on some node ports, a second node, and behind the default route
//! a world that has every address, a load balancer's or an unused one.

use std::collections::BTreeMap;

use serde_json::Value;

use super::services::{self, SERVICES, UDP_NUMBER, node_port};
use crate::namespace::nft;
use crate::net::{CLIENT, Net, in_netns, ip_batch_in};
use crate::serve::listen;

/// A second node, reached as `remote` is.
pub(crate) const HOST_NETWORK_ELSEWHERE: [&str; 2] = ["198.18.0.20", "fd00:198:18::20"];
/// A host beyond, for UDP.
pub(crate) const HOST_BEYOND: [&str; 2] = ["203.0.113.250", "fd00:203::fa"];
/// Further addresses of the client, as many and more.
pub(crate) const SOURCES: u8 = 48;
/// Two clients that come from one address.
pub(crate) const BEHIND_ONE: [[&str; 2]; 2] =
    [["192.0.2.180", "192.0.2.181"], ["fd00:192::180", "fd00:192::181"]];

/// One of the client's further addresses.
pub(crate) fn source(number: u8, family: usize) -> String {
    assert!(number < SOURCES);
    [format!("192.0.2.{}", 128 + number), format!("fd00:192::{}", 128 + u16::from(number))][family]
        .clone()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zone {
    Z1,
    None,
}

/// With what a proxy runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Setting {
    /// The cluster's range of pods, of each family; everything else by default.
    Base,
    MasqueradeAll,
    /// No range of pods.
    NoDetector,
    NodeCidr,
    BridgeInterface,
    InterfacePrefix,
    /// Node ports on every address.
    AllAddresses,
    /// Node ports on a range that has not the node's addresses.
    OtherRange,
    /// Node ports on loopback ranges only.
    LoopbackRange,
    /// A Node without zone and IPv6 address.
    BareNode,
    /// No ServiceCIDR can be seen.
    NoServiceCidr,
}

impl Setting {
    pub(crate) const ALL: [Self; 11] = [
        Self::Base,
        Self::MasqueradeAll,
        Self::NoDetector,
        Self::NodeCidr,
        Self::BridgeInterface,
        Self::InterfacePrefix,
        Self::AllAddresses,
        Self::OtherRange,
        Self::LoopbackRange,
        Self::BareNode,
        Self::NoServiceCidr,
    ];

    /// Lines of the configuration file.
    pub(crate) fn lines(self) -> String {
        let range = "clusterCIDR: 10.244.0.0/16,fd00:10:244::/56\n";
        let lines = match self {
            Self::Base | Self::MasqueradeAll | Self::BareNode | Self::NoServiceCidr => range,
            Self::NoDetector => "",
            Self::NodeCidr => "detectLocalMode: NodeCIDR\n",
            Self::BridgeInterface => {
                "detectLocalMode: BridgeInterface\ndetectLocal: { bridgeInterface: pod-b }\n"
            }
            Self::InterfacePrefix => {
                "detectLocalMode: InterfaceNamePrefix\n\
                 detectLocal: { interfaceNamePrefix: pod-b }\n"
            }
            Self::AllAddresses => "nodePortAddresses: [\"0.0.0.0/0\", \"::/0\"]\n",
            Self::OtherRange => "nodePortAddresses: [10.244.1.0/24, \"fd00:10:244:1::/64\"]\n",
            Self::LoopbackRange => "nodePortAddresses: [127.0.0.0/8, \"::1/128\"]\n",
        };
        let ports = matches!(self, Self::AllAddresses | Self::OtherRange | Self::LoopbackRange);
        format!("{}{lines}", if ports { range } else { "" })
    }

    pub(crate) fn masquerade_all(self) -> bool {
        self == Self::MasqueradeAll
    }
}

/// The objects there are, of which some change.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    gone: Vec<&'static str>,
    endpoints: BTreeMap<(&'static str, usize), Vec<&'static str>>,
    ranges: BTreeMap<&'static str, &'static [&'static str]>,
}

impl Objects {
    /// Changes the endpoints of a Service in a family.
    pub(crate) fn set(&mut self, name: &'static str, family: usize, endpoints: &[&'static str]) {
        self.endpoints.insert((name, family), endpoints.to_vec());
    }

    pub(crate) fn restrict(&mut self, name: &'static str, ranges: &'static [&'static str]) {
        self.ranges.insert(name, ranges);
    }

    pub(crate) fn remove(&mut self, name: &'static str) {
        self.gone.push(name);
    }

    /// All of them, as the API has them.
    pub(crate) fn all(&self, setting: Setting) -> Vec<Value> {
        let bare = setting == Setting::BareNode;
        let mut all = vec![services::node(if bare { Zone::None } else { Zone::Z1 }, !bare)];
        if setting != Setting::NoServiceCidr {
            all.push(services::service_cidr());
        }
        for service in SERVICES.iter().filter(|service| !self.gone.contains(&service.name)) {
            let ranges = self.ranges.get(service.name).copied().unwrap_or(service.ranges);
            all.push(services::Service { ranges, ..*service }.object());
            let endpoints = [0, 1].map(|family| {
                let changed = self.endpoints.get(&(service.name, family));
                changed.map_or(service.endpoints, Vec::as_slice)
            });
            all.extend(service.slices(endpoints));
        }
        all
    }
}

/// Makes the rest of the world.
pub(crate) fn build(net: &Net) {
    let mac = "02:00:00:00:00:01";
    let mut node = format!("link set beyond address {mac}\n");
    let mut beyond = format!("link set eth0 address {mac} arp off\nlink set lo up\n");
    for range in ["203.0.113.0/24", "198.51.100.0/24", "10.96.0.0/12"].into_iter().chain([
        "fd00:203::/64",
        "fd00:198::/64",
        "fd00:10:96::/108",
    ]) {
        beyond += &format!("route add local {range} dev lo\n");
    }
    let (mut remote, mut client) = (String::new(), String::new());
    for (family, length) in [32, 128].into_iter().enumerate() {
        let nodad = ["", "nodad"][family];
        let host = HOST_BEYOND[family];
        beyond += &format!("addr add {host}/{length} dev eth0 {nodad}\n");
        beyond += &format!("route add default dev eth0 src {host}\n");
        let elsewhere = HOST_NETWORK_ELSEWHERE[family];
        remote += &format!("addr add {elsewhere}/{length} dev eth0 {nodad}\n");
        node += &format!("route add {elsewhere}/{length} dev pod-remote\n");
        for name in ["balancer-here", "ranges-node-here", "ranges-others-here"] {
            let address = &services::balancer_ip(name)[family];
            node += &format!("addr add {address}/{length} dev lo {nodad}\n");
        }
        let sources = (0..SOURCES).map(|number| source(number, family));
        for address in sources.chain(BEHIND_ONE[family].map(str::to_owned)) {
            let length = [24, 64][family];
            client += &format!("addr add {address}/{length} dev eth0 {nodad} preferred_lft 0\n");
        }
    }
    for (name, lines) in
        [("beyond", beyond), ("remote", remote), ("node", node), ("client", client)]
    {
        ip_batch_in(&net.name(name), &lines);
    }
    for (family, table) in ["ip", "ip6"].into_iter().enumerate() {
        let ([first, second], one) = (BEHIND_ONE[family], CLIENT[family]);
        let text = format!(
            "table {table} home {{\nchain out {{\ntype nat hook postrouting priority 100\n\
             {table} saddr {{ {first}, {second} }} snat to {one}\n}}\n}}\n"
        );
        in_netns(&net.name("client"), || nft(&["-f", "-"], &text));
    }
    for port in [80, 81, UDP_NUMBER] {
        listen(&net.name("beyond"), "beyond", port);
    }
    listen(&net.name("remote"), "remote", node_port("any"));
    for daemon in ["daemon", "none", "external-none", "only-ipv4", "other-proxy"] {
        listen(&net.name("node"), "daemon", node_port(daemon));
    }
}
