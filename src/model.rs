//! The plain values every decision is made from.
//!
//! Nothing here knows Kubernetes types, netlink, files or clocks: objects are converted once, at the
//! edge (`watch/convert.rs`), and dropped. The types are kept small on purpose, because they are all
//! that stays in memory for every Service and endpoint of the cluster.

mod endpoint;
mod event;
mod node;
mod notice;
mod service;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use endpoint::{Endpoint, EndpointSlice, Hints, SlicePort};
pub use event::{Event, Kind};
pub use node::{HostFacts, NodeFacts, ServiceCidr};
pub use notice::{Notice, Standing, Topic};
pub use service::{Scheduler, Service, ServicePort, SessionAffinity, TrafficPolicy};

/// An address family: one nftables table each, with no state shared between the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// IPv4, nftables family `ip`.
    V4,
    /// IPv6, nftables family `ip6`.
    V6,
}

impl Family {
    /// Both families, in the order they are written everywhere.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The family an address belongs to. An IPv4-mapped IPv6 address counts as IPv6, as written.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// nft's word for the family.
impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        })
    }
}

/// A transport protocol a Service port may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Protocol {
    /// TCP, protocol number 6.
    Tcp = 6,
    /// UDP, protocol number 17.
    Udp = 17,
    /// SCTP, protocol number 132.
    Sctp = 132,
}

impl Protocol {
    /// The IANA protocol number, as it stands in the IP header.
    #[must_use]
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The protocol with this IANA number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Tcp, Self::Udp, Self::Sctp].into_iter().find(|p| p.number() == number)
    }
}

/// nft's word for the protocol.
impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// `namespace/name` of an object, or the bare name of a cluster-scoped one. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct NamespacedName(Arc<str>);

impl NamespacedName {
    /// The name of a namespaced object.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self(format!("{namespace}/{name}").into())
    }

    /// The name of a cluster-scoped object.
    #[must_use]
    pub fn cluster_scoped(name: &str) -> Self {
        Self(name.into())
    }

    /// `namespace/name`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for NamespacedName {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

impl From<NamespacedName> for String {
    fn from(name: NamespacedName) -> Self {
        name.as_str().to_owned()
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Something wrong with one object that does not stop the rest of it, nor any other object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The object: kind and name, for instance `Service default/web`.
    pub object: String,
    /// Path of the field, for instance `spec.ports[0].port`; empty if the whole object is meant.
    pub field: String,
    /// What is wrong, what was expected, and what happens instead.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            write!(f, "{}: {}", self.object, self.message)
        } else {
            write!(f, "{}: {}: {}", self.object, self.field, self.message)
        }
    }
}
