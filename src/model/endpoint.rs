//! EndpointSlices, reduced to what selects a backend. There are far more endpoints than anything
//! else in a cluster, so the hints, which most clusters do not use, sit behind one pointer.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Family, NamespacedName, Protocol};

/// An EndpointSlice with an address type a proxy can use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSlice {
    /// Namespace and name of the slice itself.
    pub name: NamespacedName,
    /// The Service it belongs to (label `kubernetes.io/service-name`).
    pub service: NamespacedName,
    /// `addressType`; every address below is of this family.
    pub family: Family,
    /// The ports every endpoint of the slice serves.
    pub ports: Vec<SlicePort>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
    /// When the change that led to this was made, in milliseconds since the epoch, if the object says
    /// so: annotation `endpoints.kubernetes.io/last-change-trigger-time`.
    pub last_change_trigger: Option<u64>,
}

/// A port of an EndpointSlice: it serves the Service port of the same name and protocol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlicePort {
    /// Name of the Service port it serves.
    pub name: Box<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The number on the endpoint.
    pub port: u16,
}

/// One endpoint. Unset conditions were resolved at conversion: ready and serving default to true,
/// terminating to false.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "the API's own conditions, independent of another"
)]
pub struct Endpoint {
    /// `addresses[0]`; further addresses of an endpoint are not used by proxies.
    pub address: IpAddr,
    /// Meant to receive traffic.
    pub ready: bool,
    /// Able to answer, even if it is going away.
    pub serving: bool,
    /// Going away.
    pub terminating: bool,
    /// `nodeName` is this node.
    pub local: bool,
    /// How many shares of new connections it gets, compared with others; 0 for none.
    pub weight: u16,
    /// Topology hints, if the object has any.
    pub hints: Option<Box<Hints>>,
}

impl Endpoint {
    /// An endpoint on another node, of which nothing else is said.
    #[must_use]
    pub fn new(address: IpAddr) -> Self {
        Self {
            address,
            ready: true,
            serving: true,
            terminating: false,
            local: false,
            weight: 1,
            hints: None,
        }
    }
}

/// Topology hints of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hints {
    /// `hints.forZones[].name`.
    pub zones: Vec<Box<str>>,
    /// `hints.forNodes[].name`.
    pub nodes: Vec<Box<str>>,
}
