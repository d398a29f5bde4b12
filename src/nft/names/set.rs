//! The named sets and maps every node has.

use std::fmt;
use std::str::FromStr;

use super::{Entry, UnknownName};
use crate::model::Protocol;

/// A named set or map. The rules that ask them, line by line: `deploy/docs/ruleset.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum SetName {
    /// Frontend address → what to do with a new connection.
    Services,
    /// Of frontend addresses of Services with affinity: what to do for clients that are not remembered.
    ServicesNewClients,
    /// Frontend address and a range of sources that may pass: its first address and its last.
    SourceRanges,
    /// Frontend address and slot → backend.
    Endpoints,
    /// Node port → what to do with a new connection.
    Nodeports,
    /// As `services-new-clients`, for node ports.
    NodeportsNewClients,
    /// Node port and slot → backend.
    NodeportEndpoints,
    /// Addresses of this node that node ports are served on.
    NodeportIps,
    /// Every ClusterIP in use.
    ClusterIps,
    /// The ranges ClusterIPs are allocated from.
    ServiceCidrs,
    /// Addresses of local traffic: its sources are not masqueraded on the way to a ClusterIP.
    LocalPods,
    /// Pairs of the same address: a pod of this node that was given itself.
    Hairpin,
    /// Frontend addresses nobody can answer for → how to refuse.
    NoEndpoints,
    /// Node ports nobody can answer for → how to refuse.
    NoEndpointNodeports,
    /// Addresses of Services with affinity: for others nobody is remembered.
    AffinityIps,
    /// Frontend address and port of TCP Services with affinity → where clients are remembered.
    AffinityRecordTcp,
    /// The same for UDP.
    AffinityRecordUdp,
    /// The same for SCTP.
    AffinityRecordSctp,
    /// Node port of TCP Services with affinity → where clients are remembered.
    AffinityRecordNodeportTcp,
    /// The same for UDP.
    AffinityRecordNodeportUdp,
    /// The same for SCTP.
    AffinityRecordNodeportSctp,
    /// Node port of Services with affinity and one of its backends: whose clients are remembered.
    AffinityNodeportBackends,
}

/// A field of an element's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyField {
    /// An address of the table's family.
    Address,
    /// A transport protocol number.
    Protocol,
    /// A transport port.
    Port,
    /// A backend's number, 0 to 65535; the only field in host byte order.
    Slot,
}

/// What an element maps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataType {
    /// Nothing: a set.
    None,
    /// A verdict.
    Verdict,
    /// Address and port of a backend.
    Backend,
}

impl SetName {
    /// All of them, in the order of the table's text.
    pub const ALL: [Self; 22] = [
        Self::Services,
        Self::ServicesNewClients,
        Self::SourceRanges,
        Self::Endpoints,
        Self::Nodeports,
        Self::NodeportsNewClients,
        Self::NodeportEndpoints,
        Self::NodeportIps,
        Self::ClusterIps,
        Self::ServiceCidrs,
        Self::LocalPods,
        Self::Hairpin,
        Self::NoEndpoints,
        Self::NoEndpointNodeports,
        Self::AffinityIps,
        Self::AffinityRecordTcp,
        Self::AffinityRecordUdp,
        Self::AffinityRecordSctp,
        Self::AffinityRecordNodeportTcp,
        Self::AffinityRecordNodeportUdp,
        Self::AffinityRecordNodeportSctp,
        Self::AffinityNodeportBackends,
    ];

    /// The map that says where the clients of a frontend are remembered. nft reads no protocol in a
    /// key that is about the connection's original direction, hence one for each.
    #[must_use]
    pub fn affinity_record(entry: Entry, protocol: Protocol) -> Self {
        match (entry, protocol) {
            (Entry::Address, Protocol::Tcp) => Self::AffinityRecordTcp,
            (Entry::Address, Protocol::Udp) => Self::AffinityRecordUdp,
            (Entry::Address, Protocol::Sctp) => Self::AffinityRecordSctp,
            (Entry::NodePort, Protocol::Tcp) => Self::AffinityRecordNodeportTcp,
            (Entry::NodePort, Protocol::Udp) => Self::AffinityRecordNodeportUdp,
            (Entry::NodePort, Protocol::Sctp) => Self::AffinityRecordNodeportSctp,
        }
    }

    /// The name as nft shows it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::ServicesNewClients => "services-new-clients",
            Self::SourceRanges => "source-ranges",
            Self::Endpoints => "endpoints",
            Self::Nodeports => "nodeports",
            Self::NodeportsNewClients => "nodeports-new-clients",
            Self::NodeportEndpoints => "nodeport-endpoints",
            Self::NodeportIps => "nodeport-ips",
            Self::ClusterIps => "cluster-ips",
            Self::ServiceCidrs => "service-cidrs",
            Self::LocalPods => "local-pods",
            Self::Hairpin => "hairpin",
            Self::NoEndpoints => "no-endpoints",
            Self::NoEndpointNodeports => "no-endpoint-nodeports",
            Self::AffinityIps => "affinity-ips",
            Self::AffinityRecordTcp => "affinity-record-tcp",
            Self::AffinityRecordUdp => "affinity-record-udp",
            Self::AffinityRecordSctp => "affinity-record-sctp",
            Self::AffinityRecordNodeportTcp => "affinity-record-nodeport-tcp",
            Self::AffinityRecordNodeportUdp => "affinity-record-nodeport-udp",
            Self::AffinityRecordNodeportSctp => "affinity-record-nodeport-sctp",
            Self::AffinityNodeportBackends => "affinity-nodeport-backends",
        }
    }

    /// The fields of its keys.
    #[must_use]
    pub fn key(self) -> &'static [KeyField] {
        use KeyField::{Address, Port, Protocol, Slot};
        match self {
            Self::Services | Self::ServicesNewClients | Self::NoEndpoints => {
                &[Address, Protocol, Port]
            }
            Self::SourceRanges => &[Address, Protocol, Port, Address, Address],
            Self::Endpoints => &[Address, Protocol, Port, Slot],
            Self::Nodeports | Self::NodeportsNewClients | Self::NoEndpointNodeports => {
                &[Protocol, Port]
            }
            Self::NodeportEndpoints => &[Protocol, Port, Slot],
            Self::NodeportIps
            | Self::ClusterIps
            | Self::ServiceCidrs
            | Self::LocalPods
            | Self::AffinityIps => &[Address],
            Self::Hairpin => &[Address, Address],
            Self::AffinityRecordTcp | Self::AffinityRecordUdp | Self::AffinityRecordSctp => {
                &[Address, Port]
            }
            Self::AffinityRecordNodeportTcp
            | Self::AffinityRecordNodeportUdp
            | Self::AffinityRecordNodeportSctp => &[Port],
            Self::AffinityNodeportBackends => &[Protocol, Port, Address, Port],
        }
    }

    /// What its elements map to.
    #[must_use]
    pub fn data(self) -> DataType {
        match self {
            Self::Services
            | Self::ServicesNewClients
            | Self::Nodeports
            | Self::NodeportsNewClients
            | Self::NoEndpoints
            | Self::NoEndpointNodeports
            | Self::AffinityRecordTcp
            | Self::AffinityRecordUdp
            | Self::AffinityRecordSctp
            | Self::AffinityRecordNodeportTcp
            | Self::AffinityRecordNodeportUdp
            | Self::AffinityRecordNodeportSctp => DataType::Verdict,
            Self::Endpoints | Self::NodeportEndpoints => DataType::Backend,
            Self::SourceRanges
            | Self::NodeportIps
            | Self::ClusterIps
            | Self::ServiceCidrs
            | Self::LocalPods
            | Self::AffinityIps
            | Self::AffinityNodeportBackends
            | Self::Hairpin => DataType::None,
        }
    }

    /// Whether its verdicts lead to where a packet is translated, or remembered; others refuse it.
    #[must_use]
    pub fn leads_on(self) -> bool {
        let refuses = matches!(self, Self::NoEndpoints | Self::NoEndpointNodeports);
        self.data() == DataType::Verdict && !refuses
    }

    /// Whether its keys are ranges.
    #[must_use]
    pub fn is_interval(self) -> bool {
        matches!(self, Self::ServiceCidrs | Self::LocalPods)
    }

    /// Whether several Services may ask for the same element: such elements are counted and leave
    /// with the last one that asks. Elements of all other sets belong to exactly one contributor.
    #[must_use]
    pub fn is_shared(self) -> bool {
        matches!(self, Self::ClusterIps | Self::Hairpin | Self::AffinityIps)
    }
}

impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for SetName {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        Self::ALL.into_iter().find(|set| set.as_str() == name).ok_or(UnknownName)
    }
}
