//! The resolved configuration that decisions depend on, without where it came from.

use ipnet::IpNet;

use crate::model::{Family, NodeFacts};
use crate::nft::dataplane::Options;

/// How a client inside the cluster is told from one outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// Sources in these ranges are pods of the cluster; a family without a range is not told apart.
    ClusterCidr(Vec<IpNet>),
    /// Sources in the pod CIDRs of this node are its pods.
    NodeCidr,
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
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            masquerade_mark: 1 << 14,
            masquerade_all: false,
            detect_local: DetectLocal::ClusterCidr(Vec::new()),
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
        }
    }

    /// What shapes the rules on this node.
    #[must_use]
    pub fn options(&self, node: &NodeFacts) -> Options {
        let ranges = self.local_ranges(node);
        Options {
            masquerade_mark: self.masquerade_mark,
            masquerade_all: self.masquerade_all,
            detect_local: Family::BOTH
                .map(|family| ranges.iter().any(|range| Family::of(range.addr()) == family)),
        }
    }
}
