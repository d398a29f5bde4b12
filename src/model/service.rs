//! A Service as the proxy sees it: addresses, ports and policies, with everything that does not
//! concern a packet left out. Services that are not for a proxy (headless, `ExternalName`, labelled
//! for another proxy) never become one of these.

use std::net::IpAddr;
use std::num::NonZeroU16;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Family, NamespacedName, Protocol};

/// A Service with at least one ClusterIP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Namespace and name.
    pub name: NamespacedName,
    /// Creation time in seconds since the epoch, 0 if unknown: the older of two Services that claim
    /// one frontend keeps it.
    pub created: i64,
    /// `spec.clusterIPs`, at most one of a family. A family without one does not exist for the
    /// Service: none of its other frontends of that family do either.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` with ipMode unset or `VIP`; those in `Proxy` mode are
    /// meant to leave the node untouched and are dropped when the object is converted.
    pub load_balancer_ips: Vec<IpAddr>,
    /// The ports, in the order of the object.
    pub ports: Vec<ServicePort>,
    /// `spec.internalTrafficPolicy`.
    pub internal_traffic_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`, `Cluster` where the Service is not externally reachable.
    pub external_traffic_policy: TrafficPolicy,
    /// `spec.sessionAffinity` with its timeout.
    pub session_affinity: SessionAffinity,
    /// `spec.loadBalancerSourceRanges`, both families, truncated to their prefixes.
    pub source_ranges: Vec<IpNet>,
    /// Annotation `nftproxy.dev/scheduler`.
    pub scheduler: Scheduler,
    /// `spec.healthCheckNodePort`.
    pub health_check_node_port: Option<NonZeroU16>,
}

impl Service {
    /// A Service that asks for nothing else, as Kubernetes understands that.
    #[must_use]
    pub fn new(name: NamespacedName, cluster_ips: Vec<IpAddr>, ports: Vec<ServicePort>) -> Self {
        Self {
            name,
            created: 0,
            cluster_ips,
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            ports,
            internal_traffic_policy: TrafficPolicy::Cluster,
            external_traffic_policy: TrafficPolicy::Cluster,
            session_affinity: SessionAffinity::None,
            source_ranges: Vec::new(),
            scheduler: Scheduler::Random,
            health_check_node_port: None,
        }
    }

    /// The ClusterIP of a family, if the Service exists in it.
    #[must_use]
    pub fn cluster_ip(&self, family: Family) -> Option<IpAddr> {
        self.cluster_ips.iter().copied().find(|&ip| Family::of(ip) == family)
    }

    /// Whether a policy keeps some traffic on this node.
    #[must_use]
    pub fn is_local(&self) -> bool {
        [self.internal_traffic_policy, self.external_traffic_policy].contains(&TrafficPolicy::Local)
    }

    /// The source ranges of a family. Without any, its load-balancer addresses are open to all.
    pub fn source_ranges_of(&self, family: Family) -> impl Iterator<Item = IpNet> + '_ {
        self.source_ranges.iter().copied().filter(move |range| Family::of(range.addr()) == family)
    }
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// The name, which is what endpoints are matched by; empty for an unnamed port.
    pub name: Box<str>,
    /// The transport protocol; endpoints are matched by it, too.
    pub protocol: Protocol,
    /// The port clients dial on the Service's addresses.
    pub port: u16,
    /// The port clients dial on the node's addresses.
    pub node_port: Option<NonZeroU16>,
}

/// Who may answer: every endpoint, or those of this node only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// Every usable endpoint.
    #[default]
    Cluster,
    /// Endpoints on this node only.
    Local,
}

/// Whether a client keeps its endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionAffinity {
    /// Every connection is a new choice.
    #[default]
    None,
    /// A client address keeps its endpoint until it made no connection for the timeout.
    ClientIp {
        /// `timeoutSeconds`, 1 to 86400.
        timeout: u32,
    },
}

/// How new connections are spread over the endpoints of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scheduler {
    /// By chance, as kube-proxy does.
    #[default]
    Random,
    /// One after the other.
    RoundRobin,
    /// By a hash of the client's address over the number of endpoints.
    SourceHash,
    /// By a hash of the client's address, so that one endpoint more or less moves few clients.
    Maglev,
}
