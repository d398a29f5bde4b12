//! The resolved configuration that decisions depend on, without where it came from.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{Family, NodeFacts};
use crate::nft::dataplane::{Detector, NodePorts, Options};
use crate::nft::rule::InterfaceName;

/// How a client inside the cluster is told from one outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// Sources in these ranges are pods of the cluster; a family without a range is not told apart.
    ClusterCidr(Vec<IpNet>),
    /// Sources in the pod CIDRs of this node are its pods.
    NodeCidr,
    /// What comes in by this interface, or by those whose names begin so, is from this node's pods.
    Interface(InterfaceName),
}

/// On which addresses of the node node ports are served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The node's primary address of each family. A family without one accepts them on all addresses.
    #[default]
    Primary,
    /// Addresses of interfaces in these ranges; a family without a range accepts them on all
    /// addresses, and so does one whose range has the length 0.
    Ranges(Vec<IpNet>),
}

/// What the data plane is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The packet mark bit that asks for masquerading.
    pub masquerade_mark: u32,
    /// Masquerade everything that goes to a ClusterIP.
    pub masquerade_all: bool,
    /// The local-traffic detector.
    pub detect_local: DetectLocal,
    /// Where node ports are served.
    pub node_port_addresses: NodePortAddresses,
    /// Whether they are served on 127.0.0.0/8, too, for the node itself.
    pub localhost_node_ports: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            masquerade_mark: 1 << 14,
            masquerade_all: false,
            detect_local: DetectLocal::ClusterCidr(Vec::new()),
            node_port_addresses: NodePortAddresses::default(),
            localhost_node_ports: false,
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
        match &self.node_port_addresses {
            NodePortAddresses::Primary => node.primary(family).map(|address| vec![address]),
            NodePortAddresses::Ranges(ranges) => {
                let of_family = || ranges.iter().filter(|range| Family::of(range.addr()) == family);
                if of_family().next().is_none() || of_family().any(|range| range.prefix_len() == 0)
                {
                    return None;
                }
                let within = |address: &&IpAddr| of_family().any(|range| range.contains(*address));
                let addresses = node.interfaces.iter().filter(|address| !address.is_loopback());
                Some(addresses.filter(within).copied().collect())
            }
        }
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
            localhost_node_ports: self.localhost_node_ports,
        }
    }
}
