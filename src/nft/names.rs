//! Names of sets, maps and chains, as closed enums: a misspelt name does not compile, and what the
//! kernel lists can be read back into the same values.

use std::fmt;
use std::str::FromStr;

/// Name of the one table a family has.
pub const TABLE: &str = "nftproxy";

/// Comment on the table. It marks a table as ours and says which layout of sets, maps and chains is
/// in it; a table without it, or with another number, is replaced as a whole at start-up.
pub const LAYOUT: &str = "nftproxy layout 1";

/// A named set or map. What each is for: `DESIGN.md` section 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum SetName {
    /// Frontend address → what to do with a new connection.
    Services,
    /// Of frontend addresses under a Local policy: what to do for clients that may reach any endpoint.
    ServicesCluster,
    /// Of frontend addresses under a Local policy: what to do for all others.
    ServicesLocal,
    /// Frontend address and slot → backend.
    Endpoints,
    /// Node port → what to do with a new connection.
    Nodeports,
    /// As `services-cluster`, for node ports.
    NodeportsCluster,
    /// As `services-local`, for node ports.
    NodeportsLocal,
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
    pub const ALL: [Self; 15] = [
        Self::Services,
        Self::ServicesCluster,
        Self::ServicesLocal,
        Self::Endpoints,
        Self::Nodeports,
        Self::NodeportsCluster,
        Self::NodeportsLocal,
        Self::NodeportEndpoints,
        Self::NodeportIps,
        Self::ClusterIps,
        Self::ServiceCidrs,
        Self::LocalPods,
        Self::Hairpin,
        Self::NoEndpoints,
        Self::NoEndpointNodeports,
    ];

    /// The name as nft shows it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::ServicesCluster => "services-cluster",
            Self::ServicesLocal => "services-local",
            Self::Endpoints => "endpoints",
            Self::Nodeports => "nodeports",
            Self::NodeportsCluster => "nodeports-cluster",
            Self::NodeportsLocal => "nodeports-local",
            Self::NodeportEndpoints => "nodeport-endpoints",
            Self::NodeportIps => "nodeport-ips",
            Self::ClusterIps => "cluster-ips",
            Self::ServiceCidrs => "service-cidrs",
            Self::LocalPods => "local-pods",
            Self::Hairpin => "hairpin",
            Self::NoEndpoints => "no-endpoints",
            Self::NoEndpointNodeports => "no-endpoint-nodeports",
        }
    }

    /// The fields of its keys.
    #[must_use]
    pub fn key(self) -> &'static [KeyField] {
        use KeyField::{Address, Port, Protocol, Slot};
        match self {
            Self::Services | Self::ServicesCluster | Self::ServicesLocal | Self::NoEndpoints => {
                &[Address, Protocol, Port]
            }
            Self::Endpoints => &[Address, Protocol, Port, Slot],
            Self::Nodeports
            | Self::NodeportsCluster
            | Self::NodeportsLocal
            | Self::NoEndpointNodeports => &[Protocol, Port],
            Self::NodeportEndpoints => &[Protocol, Port, Slot],
            Self::NodeportIps | Self::ClusterIps | Self::ServiceCidrs | Self::LocalPods => {
                &[Address]
            }
            Self::Hairpin => &[Address, Address],
        }
    }

    /// What its elements map to.
    #[must_use]
    pub fn data(self) -> DataType {
        match self {
            Self::Services
            | Self::ServicesCluster
            | Self::ServicesLocal
            | Self::Nodeports
            | Self::NodeportsCluster
            | Self::NodeportsLocal
            | Self::NoEndpoints
            | Self::NoEndpointNodeports => DataType::Verdict,
            Self::Endpoints | Self::NodeportEndpoints => DataType::Backend,
            Self::NodeportIps
            | Self::ClusterIps
            | Self::ServiceCidrs
            | Self::LocalPods
            | Self::Hairpin => DataType::None,
        }
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
        matches!(self, Self::ClusterIps | Self::Hairpin)
    }
}

impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name is not one of this program's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a name of nftproxy's table")]
pub struct UnknownName;

impl FromStr for SetName {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        Self::ALL.into_iter().find(|set| set.as_str() == name).ok_or(UnknownName)
    }
}

/// A chain. Those with a number are shared by every Service that has so many backends; they exist
/// while one needs them. All others always exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainName {
    /// Picks one of N backends of a frontend address.
    Lb(u16),
    /// Picks one of N backends on this node of a frontend address.
    LbLocal(u16),
    /// As `lb-N` for traffic from outside the cluster: masqueraded.
    External(u16),
    /// Picks one of N backends of a node port.
    NodeportLb(u16),
    /// Picks one of N backends on this node of a node port.
    NodeportLbLocal(u16),
    /// The same, masqueraded.
    Nodeport(u16),
    /// Sets the mark that postrouting masquerades by.
    MarkForMasquerade,
    /// Tells clients of a frontend address under a Local policy apart.
    ExternalLocal,
    /// The same for node ports.
    NodeportExternalLocal,
    /// Looks a new connection up in the maps.
    Dispatch,
    /// Refuses a connection nobody can answer.
    NoEndpoint,
    /// Refuses unused ports of ClusterIPs, drops what goes to unallocated ones.
    ClusterIpsCheck,
    /// Base chain, filter input.
    FilterInput,
    /// Base chain, filter forward.
    FilterForward,
    /// Base chain, filter output.
    FilterOutput,
    /// Base chain, nat prerouting.
    NatPrerouting,
    /// Base chain, nat output.
    NatOutput,
    /// Base chain, nat postrouting.
    NatPostrouting,
}

impl ChainName {
    /// The chains that always exist, in the order of the table's text.
    pub const FIXED: [Self; 12] = [
        Self::MarkForMasquerade,
        Self::ExternalLocal,
        Self::NodeportExternalLocal,
        Self::Dispatch,
        Self::NoEndpoint,
        Self::ClusterIpsCheck,
        Self::FilterInput,
        Self::FilterForward,
        Self::FilterOutput,
        Self::NatPrerouting,
        Self::NatOutput,
        Self::NatPostrouting,
    ];

    /// The number of a shared chain and its prefix, or the whole name.
    fn parts(self) -> (&'static str, Option<u16>) {
        match self {
            Self::Lb(n) => ("lb-", Some(n)),
            Self::LbLocal(n) => ("lb-local-", Some(n)),
            Self::External(n) => ("external-", Some(n)),
            Self::NodeportLb(n) => ("nodeport-lb-", Some(n)),
            Self::NodeportLbLocal(n) => ("nodeport-lb-local-", Some(n)),
            Self::Nodeport(n) => ("nodeport-", Some(n)),
            Self::ExternalLocal => ("external-local", None),
            Self::NodeportExternalLocal => ("nodeport-external-local", None),
            Self::MarkForMasquerade => ("mark-for-masquerade", None),
            Self::Dispatch => ("dispatch", None),
            Self::NoEndpoint => ("no-endpoint", None),
            Self::ClusterIpsCheck => ("cluster-ips-check", None),
            Self::FilterInput => ("filter-input", None),
            Self::FilterForward => ("filter-forward", None),
            Self::FilterOutput => ("filter-output", None),
            Self::NatPrerouting => ("nat-prerouting", None),
            Self::NatOutput => ("nat-output", None),
            Self::NatPostrouting => ("nat-postrouting", None),
        }
    }

    /// Whether the chain exists only while a Service needs it.
    #[must_use]
    pub fn is_shared(self) -> bool {
        self.parts().1.is_some()
    }
}

impl fmt::Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.parts() {
            (prefix, Some(n)) => write!(f, "{prefix}{n}"),
            (name, None) => f.write_str(name),
        }
    }
}

impl FromStr for ChainName {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        if let Some(fixed) = Self::FIXED.into_iter().find(|chain| chain.parts().0 == name) {
            return Ok(fixed);
        }
        let (prefix, number) = name.split_at(name.rfind('-').ok_or(UnknownName)? + 1);
        let n: u16 = number.parse().map_err(|_| UnknownName)?;
        let chain = match prefix {
            "lb-" => Self::Lb(n),
            "lb-local-" => Self::LbLocal(n),
            "external-" => Self::External(n),
            "nodeport-lb-" => Self::NodeportLb(n),
            "nodeport-lb-local-" => Self::NodeportLbLocal(n),
            "nodeport-" => Self::Nodeport(n),
            _ => return Err(UnknownName),
        };
        // `lb-02` and `lb-+2` parse, but are not names we write.
        if chain.to_string() == name { Ok(chain) } else { Err(UnknownName) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_what_they_write() {
        for set in SetName::ALL {
            assert_eq!(set.as_str().parse(), Ok(set));
        }
        let shared = [
            ChainName::Lb(1),
            ChainName::LbLocal(2),
            ChainName::External(65535),
            ChainName::NodeportLbLocal(3),
            ChainName::NodeportLb(32768),
            ChainName::Nodeport(7),
        ];
        for chain in ChainName::FIXED.into_iter().chain(shared) {
            assert_eq!(chain.to_string().parse(), Ok(chain));
        }
    }

    #[test]
    fn names_of_others_are_unknown() {
        for name in ["", "lb", "lb-", "lb-02", "lb-+2", "lb-65536", "Lb-2", "dispatch-1", "-1"] {
            assert_eq!(name.parse::<ChainName>(), Err(UnknownName), "{name:?}");
        }
        assert_eq!("Services".parse::<SetName>(), Err(UnknownName));
    }
}
