//! What one object asks the tables to contain.
//!
//! A contribution is the list of elements, chains and affinity maps that follow from one Service (or
//! from the node and the cluster's address plan), and nothing else: an event recomputes the
//! contribution of the one object it is about, and the ledger compares it with the previous one.

mod node;
mod service;

pub use node::of_node;
pub use service::of_service;

use crate::model::{Family, NamespacedName, Protocol, Service, ServicePort};
use crate::nft::element::{Backend, ElementId, Value};
use crate::nft::names::{AffinityName, ChainName};
use crate::slots::Slots;

/// Who asks for an element.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Contributor {
    /// The node, its configuration and the ServiceCIDRs.
    Node,
    /// A Service with its EndpointSlices.
    Service(NamespacedName),
}

impl std::fmt::Display for Contributor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Node => f.write_str("the node"),
            Self::Service(name) => write!(f, "Service {name}"),
        }
    }
}

/// What one contributor asks for; each list sorted, everything once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contribution {
    /// Elements.
    pub elements: Box<[(ElementId, Value)]>,
    /// Chains, those that others of them lead to included.
    pub chains: Box<[(Family, ChainName)]>,
    /// Affinity maps.
    pub affinities: Box<[Affinity]>,
}

/// An affinity map, and what may be remembered in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Affinity {
    /// The table it is in.
    pub family: Family,
    /// Its name.
    pub name: AffinityName,
    /// The backends that clients may be held to; sorted. Clients of any other one are forgotten.
    pub backends: Box<[Backend]>,
}

impl Contribution {
    fn new(
        mut elements: Vec<(ElementId, Value)>,
        mut chains: Vec<(Family, ChainName)>,
        mut affinities: Vec<Affinity>,
    ) -> Self {
        // Most come in rows that are sorted, the longer the more slots there are: a stable sort merges them.
        elements.sort_by_key(|(id, _)| *id);
        elements.dedup_by(|(a, _), (b, _)| a == b);
        chains.sort_unstable();
        chains.dedup();
        affinities.sort_unstable();
        Self { elements: elements.into(), chains: chains.into(), affinities: affinities.into() }
    }
}

/// The numbering of the backends of every port of a Service, by family, protocol and port name. A list,
/// since almost every Service has one port or two, and there are tens of thousands of Services.
#[derive(Clone, Debug, Default)]
pub struct PortSlots(Vec<(PortKey, Lists)>);

type PortKey = (Family, Protocol, Box<str>);

impl PortSlots {
    /// The lists of a port, empty if it had none so far.
    pub fn lists(&mut self, family: Family, port: &ServicePort) -> &mut Lists {
        let key = (family, port.protocol, &*port.name);
        let found = self.0.iter().position(|((f, p, name), _)| (*f, *p, &**name) == key);
        let index = found.unwrap_or_else(|| {
            let key = (family, port.protocol, port.name.clone());
            self.0.reserve_exact(1);
            self.0.push((key, Lists::default()));
            self.0.len() - 1
        });
        &mut self.0[index].1
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Forgets the ports that are not the Service's.
    fn retain_ports_of(&mut self, service: &Service) {
        self.0.retain(|((family, protocol, name), _)| {
            service.cluster_ip(*family).is_some()
                && service.ports.iter().any(|p| p.protocol == *protocol && p.name == *name)
        });
    }
}

/// The numberings of one port: each list has slots of its own, shared by all its frontends.
#[derive(Clone, Debug, Default)]
pub struct Lists {
    /// Backends for traffic that may reach any endpoint.
    pub cluster: Slots,
    /// Backends on this node, for traffic under a Local policy.
    pub local: Slots,
}

#[cfg(test)]
mod tests;
