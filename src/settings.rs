//! The resolved configuration that decisions depend on, without where it came from.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::{Family, NodeFacts};
use crate::nft::dataplane::{Detector, Loopback, NodePorts, Options};
use crate::nft::rule::InterfaceName;

/// How a client inside the cluster is told from one outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DetectLocal {
    /// Sources in these ranges are pods of the cluster; a family without a range is not told apart.
    ClusterCidr(Vec<IpNet>),
    /// Sources in the pod CIDRs of this node are its pods.
    NodeCidr,
    /// What comes in by this interface, or by those whose names begin so, is from this node's pods.
    Interface(InterfaceName),
}

/// On which addresses of the node node ports are served.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodePortAddresses {
    /// The node's primary address of each family. A family without one accepts them on all addresses.
    #[default]
    Primary,
    /// Addresses of interfaces in these ranges; a family without a range accepts them on all
    /// addresses, and so does one whose range has the length 0.
    Ranges(Vec<IpNet>),
    /// The primary addresses and those in these ranges.
    PrimaryAnd(Vec<IpNet>),
}

/// What the data plane is to be like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The packet mark bit that asks for masquerading.
    pub masquerade_mark: u32,
    /// Masquerade everything that goes to a ClusterIP.
    pub masquerade_all: bool,
    /// The local-traffic detector.
    pub detect_local: DetectLocal,
    /// Where node ports are served.
    pub node_port_addresses: NodePortAddresses,
    /// Taken for the node's first address, whatever its Node object says.
    pub node_address: Option<IpAddr>,
    /// Whether they are served on 127.0.0.0/8, too, for the node itself.
    pub loopback: Loopback,
    /// Count connections by Service port and endpoint.
    pub counters: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            masquerade_mark: 1 << 14,
            masquerade_all: false,
            detect_local: DetectLocal::ClusterCidr(Vec::new()),
            node_port_addresses: NodePortAddresses::default(),
            node_address: None,
            loopback: Loopback::default(),
            counters: false,
        }
    }
}

impl Settings {
    /// The ranges whose sources count as local, of both families.
    #[must_use]
    pub fn local_ranges<'a>(&'a self, node: &'a NodeFacts) -> &'a [IpNet] {
        match &self.detect_local {
            DetectLocal::ClusterCidr(cidrs) => cidrs,
            DetectLocal::NodeCidr => &node.pod_cidrs,
            DetectLocal::Interface(_) => &[],
        }
    }

    /// The addresses of a family that node ports are served on; None stands for all but loopback.
    #[must_use]
    pub fn node_port_ips(&self, node: &NodeFacts, family: Family) -> Option<Vec<IpAddr>> {
        let primary = || node.primary(family);
        let (ranges, primary) = match &self.node_port_addresses {
            NodePortAddresses::Primary => return primary().map(|address| vec![address]),
            NodePortAddresses::Ranges(ranges) => (ranges, None),
            NodePortAddresses::PrimaryAnd(ranges) => (ranges, primary()),
        };
        let of_family = || ranges.iter().filter(|range| Family::of(range.addr()) == family);
        let nothing = of_family().next().is_none() && primary.is_none();
        if nothing || of_family().any(|range| range.prefix_len() == 0) {
            return None;
        }
        let within = |address: &&IpAddr| of_family().any(|range| range.contains(*address));
        let addresses = node.interfaces.iter().filter(|address| !address.is_loopback());
        let mut served: Vec<_> = addresses.filter(within).copied().collect();
        served.extend(primary.filter(|address| !served.contains(address)));
        Some(served)
    }

    /// What shapes the rules on this node.
    #[must_use]
    pub fn options(&self, node: &NodeFacts) -> Options {
        let ranges = self.local_ranges(node);
        let detector = |family| match &self.detect_local {
            DetectLocal::Interface(name) => Detector::Interface(name.clone()),
            _ if ranges.iter().any(|range| Family::of(range.addr()) == family) => {
                Detector::LocalPods
            }
            _ => Detector::None,
        };
        let node_ports = |family| match self.node_port_ips(node, family) {
            Some(_) => NodePorts::Listed,
            None => NodePorts::All,
        };
        Options {
            masquerade_mark: self.masquerade_mark,
            masquerade_all: self.masquerade_all,
            detect_local: Family::BOTH.map(detector),
            node_ports: Family::BOTH.map(node_ports),
            loopback: self.loopback,
            counters: self.counters,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_ports_are_served_on_the_primary_address_and_in_ranges() {
        let addresses: Vec<IpAddr> =
            ["192.0.2.10", "192.0.2.11", "10.1.1.1"].map(|a| a.parse().unwrap()).into();
        let node = NodeFacts {
            addresses: addresses[..1].to_vec(),
            interfaces: addresses.clone(),
            ..NodeFacts::default()
        };
        let served = |scope: NodePortAddresses, family| {
            let settings = Settings { node_port_addresses: scope, ..Settings::default() };
            settings.node_port_ips(&node, family)
        };
        let ranges = |text: &str| vec![text.parse().unwrap()];
        let both = NodePortAddresses::PrimaryAnd(ranges("10.1.0.0/16"));
        assert_eq!(served(both.clone(), Family::V4), Some(vec![addresses[2], addresses[0]]));
        assert_eq!(served(both, Family::V6), None);
        let overlapping = NodePortAddresses::PrimaryAnd(ranges("192.0.2.0/24"));
        assert_eq!(served(overlapping, Family::V4), Some(addresses[..2].to_vec()));
        let all = NodePortAddresses::PrimaryAnd(ranges("0.0.0.0/0"));
        assert_eq!(served(all, Family::V4), None);
        let some = NodePortAddresses::Ranges(ranges("10.1.0.0/16"));
        assert_eq!(served(some, Family::V4), Some(vec![addresses[2]]));
    }

    #[test]
    fn pods_are_told_by_their_ranges_in_the_families_that_have_some() {
        use Detector::{LocalPods, None};
        let told = |ranges: &[&str]| {
            let ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
            let detect_local = DetectLocal::ClusterCidr(ranges);
            let settings = Settings { detect_local, ..Settings::default() };
            settings.options(&NodeFacts::default()).detect_local
        };
        assert_eq!(told(&[]), [None, None]);
        assert_eq!(told(&["10.244.0.0/16"]), [LocalPods, None]);
        assert_eq!(told(&["fd00:10:244::/56"]), [None, LocalPods]);
        assert_eq!(told(&["10.244.0.0/16", "fd00:10:244::/56"]), [LocalPods, LocalPods]);
    }
}
