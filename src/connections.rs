//! Whose connections the kernel counted: from pairs of addresses to Service ports and endpoints.
//!
//! The kernel's counters begin when a pair is first seen, end an hour after its last connection, and
//! are gone with a table that is replaced. What is told of them only grows: each reading is compared
//! with the one before, and a counter that is less than it was has begun anew. The first reading is
//! where counting begins, so that a restart does not tell again what the run before told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use crate::conntrack::endpoints_named;
use crate::frontend::{Frontend, frontends};
use crate::model::{EndpointSlice, Family, NamespacedName, Protocol, Service};
use crate::nft::connection::Connection;
use crate::nft::element::Backend;

/// A port of a Service, of both families.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    /// The Service.
    pub service: NamespacedName,
    /// Name of the port; empty if it has none.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
}

/// What a Service port is dialled by, and who may answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// The port.
    pub port: Arc<Port>,
    /// The frontends that the Service owns.
    pub frontends: Vec<Frontend>,
    /// Every endpoint that slices name, chosen or not.
    pub backends: BTreeSet<Backend>,
}
