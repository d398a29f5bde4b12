//! Everything a source can tell the proxy, as one closed enum, so that every cause of work can be
//! seen in one match. The API server and a directory of manifests speak the same stream.

use serde::{Deserialize, Serialize};

use super::{EndpointSlice, HostFacts, NamespacedName, NodeFacts, Service, ServiceCidr};

/// A kind of object that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// `v1/Service`.
    Service,
    /// `discovery.k8s.io/v1/EndpointSlice`.
    EndpointSlice,
    /// `networking.k8s.io/v1/ServiceCIDR`.
    ServiceCidr,
    /// `v1/Node`, the proxy's own only.
    Node,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Service, Self::EndpointSlice, Self::ServiceCidr, Self::Node];
}

/// The name of the kind as it stands in an object's `kind`.
impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::ServiceCidr => "ServiceCIDR",
            Self::Node => "Node",
        })
    }
}

/// One thing that a source saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A complete listing of the kind begins. Until [`Event::Listed`] nothing is forgotten; what was
    /// not named in between is gone.
    Listing(Kind),
    /// The listing of the kind is complete.
    Listed(Kind),
    /// The source cannot serve this kind now and says so in the log. What is known stays; a kind
    /// that was never listed counts as empty, so that the others are not held up by it.
    Unavailable(Kind),
    /// A Service exists and looks like this.
    Service(Service),
    /// An EndpointSlice exists and looks like this.
    EndpointSlice(EndpointSlice),
    /// A ServiceCIDR exists and looks like this.
    ServiceCidr(ServiceCidr),
    /// The own Node exists and looks like this.
    Node(NodeFacts),
    /// The host's addresses are these.
    Host(HostFacts),
    /// The object of this kind and name exists, but makes no sense. What is known of it stays.
    Unreadable(Kind, NamespacedName),
    /// The object of this kind and name is gone, or is no longer one for this proxy.
    Gone(Kind, NamespacedName),
}
