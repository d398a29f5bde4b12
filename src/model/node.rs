//! What the proxy knows about its own node and about the cluster's address plan.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Family, NamespacedName};

/// Facts about the node this proxy runs on, from its Node object or from the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// The node's name, lower case.
    pub name: String,
    /// Node addresses, `InternalIP` before `ExternalIP`; the first of a family is its primary one.
    pub addresses: Vec<IpAddr>,
    /// Addresses of this host's interfaces, sorted.
    pub interfaces: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// The Node is being deleted, or about to be: it has a deletion timestamp or the taint
    /// `ToBeDeletedByClusterAutoscaler`.
    pub leaving: bool,
}

impl NodeFacts {
    /// The primary address of a family: the first one that is neither loopback nor unspecified.
    #[must_use]
    pub fn primary(&self, family: Family) -> Option<IpAddr> {
        self.addresses
            .iter()
            .copied()
            .find(|&a| Family::of(a) == family && !a.is_loopback() && !a.is_unspecified())
    }
}

/// What the host itself tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The address of each family that others would reach this host by. Counts where no Node object
    /// tells.
    pub addresses: Vec<IpAddr>,
    /// Addresses of interfaces, sorted.
    pub interfaces: Vec<IpAddr>,
}

/// A ServiceCIDR object: a range ClusterIPs are allocated from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceCidr {
    /// Its cluster-scoped name.
    pub name: NamespacedName,
    /// `spec.cidrs`.
    pub cidrs: Vec<IpNet>,
}
