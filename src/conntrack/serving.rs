//! Which endpoints every UDP frontend may be answered by, as of the last commit.
//!
//! Kept to know whether a commit can have made a flow stale at all: that an endpoint was added to
//! others cannot, and most changes are of TCP Services. It begins empty, so that the first commit of a
//! run looks at every frontend: what went stale while no proxy ran is found then.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use super::sweep::{Endpoints, NodePortAddresses, Sweep, endpoints};
use crate::frontend::{Frontend, Frontends, frontends};
use crate::model::{EndpointSlice, Family, NamespacedName, Protocol, Service, ServicePort};

/// The endpoints whose flows of a Service port are to stay: all that are serving, on any node,
/// terminating or not, whatever policies and hints choose for new flows.
#[must_use]
pub fn serving_endpoints<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
) -> Endpoints {
    let of_family = slices.into_iter().filter(|slice| slice.family == family);
    endpoints(of_family.flat_map(|slice| {
        let ports = slice.ports.iter();
        let numbers = ports.filter(|p| p.name == port.name && p.protocol == port.protocol);
        numbers.flat_map(|p| {
            // New flows go to whatever is ready: those must not be stale at once.
            let serving = slice.endpoints.iter().filter(|e| e.serving || e.ready);
            serving.map(|e| SocketAddr::new(e.address, p.port))
        })
    }))
}

/// The UDP frontends that a Service owns, each with the endpoints whose flows are to stay: what
/// [`Serving::update`] is to be told once this is committed.
#[must_use]
pub fn udp_frontends(
    service: &Service,
    slices: &[&EndpointSlice],
    owners: &Frontends,
) -> Vec<(Frontend, Endpoints)> {
    let mut list = Vec::new();
    for port in service.ports.iter().filter(|port| port.protocol == Protocol::Udp) {
        for family in Family::BOTH {
            let mut own = frontends(service, port, family);
            own.retain(|(frontend, _)| owners.owner(*frontend) == Some(&service.name));
            if !own.is_empty() {
                let by = serving_endpoints(port, family, slices.iter().copied());
                list.extend(own.into_iter().map(|(frontend, _)| (frontend, by.clone())));
            }
        }
    }
    list
}

/// The UDP frontends of all Services, with their endpoints, and what changed among them since the
/// last [`take`](Self::take).
#[derive(Debug, Default)]
pub struct Serving {
    owners: BTreeMap<Frontend, (NamespacedName, Endpoints)>,
    frontends: HashMap<NamespacedName, Box<[Frontend]>>,
    /// Frontends with an address, by port: one shadows the node port of the same number there.
    by_port: BTreeSet<(u16, IpAddr)>,
    node_port_addresses: NodePortAddresses,
    changed: Sweep,
}

impl Serving {
    /// On which addresses node ports are served from now on.
    pub fn set_node_port_addresses(&mut self, addresses: NodePortAddresses) {
        if addresses == self.node_port_addresses {
            return;
        }
        self.node_port_addresses = addresses;
        self.changed.merge(Sweep::new(self.node_port_addresses.clone()));
        // Flows to an address that was not served before were never translated.
        for (frontend, (service, by)) in &self.owners {
            if let Frontend::NodePort(_, _, port) = *frontend {
                self.changed.served(*frontend, service, by.clone());
                shadows(&self.by_port, &self.owners, port, &mut self.changed);
            }
        }
    }

    /// What a Service has since a commit: the frontends it owns, each with the endpoints whose flows
    /// are to stay; none if the Service is gone. Other protocols than UDP are ignored.
    pub fn update(
        &mut self,
        service: &NamespacedName,
        frontends: impl IntoIterator<Item = (Frontend, Endpoints)>,
    ) {
        let mut own = Vec::new();
        for (frontend, by) in frontends {
            let (Frontend::Address(_, protocol, _) | Frontend::NodePort(_, protocol, _)) = frontend;
            if protocol != Protocol::Udp {
                continue;
            }
            own.push(frontend);
            if let Frontend::Address(address, _, port) = frontend {
                self.by_port.insert((port, address));
            }
            let before = self.owners.insert(frontend, (service.clone(), by.clone()));
            if may_strand(before.as_ref().map(|(_, by)| &**by), &by) {
                self.changed.served(frontend, service, by);
                if let Frontend::NodePort(_, _, port) = frontend {
                    shadows(&self.by_port, &self.owners, port, &mut self.changed);
                }
            } else if before.is_none_or(|(_, before)| before != by) {
                self.changed.amended(frontend, service, by);
            }
        }
        own.sort_unstable();
        let before = self.frontends.remove(service).unwrap_or_default();
        for &frontend in before.iter().filter(|f| own.binary_search(f).is_err()) {
            self.release(frontend, service);
        }
        if !own.is_empty() {
            self.frontends.insert(service.clone(), own.into());
        }
    }

    /// Services this is not true of are gone. For when everything is told anew, and nobody says which
    /// Services there were.
    pub fn retain(&mut self, exists: impl Fn(&NamespacedName) -> bool) {
        let gone = self.frontends.keys().filter(|service| !exists(service));
        for service in gone.cloned().collect::<BTreeSet<_>>() {
            self.update(&service, []);
        }
    }

    /// Frontends that an adopted table had: those that nobody has now are gone. To be called when
    /// every Service was told of.
    pub fn found(&mut self, frontends: impl IntoIterator<Item = Frontend>) {
        for frontend in frontends {
            if !self.owners.contains_key(&frontend) {
                self.changed.gone(frontend, None);
                if let Frontend::NodePort(_, _, port) = frontend {
                    shadows(&self.by_port, &self.owners, port, &mut self.changed);
                }
            }
        }
    }

    /// Something was missing in the tables and is there again: what began meanwhile was not translated, at
    /// whatever frontend.
    pub fn look_again(&mut self) {
        for (frontend, (service, by)) in &self.owners {
            self.changed.served(*frontend, service, by.clone());
        }
    }

    /// What the [`Sweeper`](super::Sweeper) has to be told for the commits since the last call, if
    /// anything.
    pub fn take(&mut self) -> Option<Sweep> {
        let empty = Sweep::new(self.node_port_addresses.clone());
        let changed = std::mem::replace(&mut self.changed, empty);
        (!changed.is_empty()).then_some(changed)
    }

    fn release(&mut self, frontend: Frontend, service: &NamespacedName) {
        // Another Service may have taken it over in the same commit.
        if self.owners.get(&frontend).is_none_or(|(owner, _)| owner != service) {
            return;
        }
        self.owners.remove(&frontend);
        self.changed.gone(frontend, Some(service));
        match frontend {
            Frontend::Address(address, _, port) => {
                self.by_port.remove(&(port, address));
            }
            Frontend::NodePort(_, _, port) => {
                shadows(&self.by_port, &self.owners, port, &mut self.changed);
            }
        }
    }
}

/// Whether a flow may be stale now that was not before.
fn may_strand(before: Option<&[SocketAddr]>, now: &[SocketAddr]) -> bool {
    match before {
        // New, or with its first endpoints: flows may have begun before, untranslated.
        None => true,
        Some([]) => !now.is_empty(),
        Some(before) => before.iter().any(|endpoint| now.binary_search(endpoint).is_err()),
    }
}

/// Looks at the frontends with an address, too, whose port number is that of a node port, so that
/// their flows are judged by their own endpoints.
fn shadows(
    by_port: &BTreeSet<(u16, IpAddr)>,
    owners: &BTreeMap<Frontend, (NamespacedName, Endpoints)>,
    port: u16,
    sweep: &mut Sweep,
) {
    let first = (port, IpAddr::from([0, 0, 0, 0]));
    for &(_, address) in by_port.range(first..).take_while(|(p, _)| *p == port) {
        let frontend = Frontend::Address(address, Protocol::Udp, port);
        if let Some((service, by)) = owners.get(&frontend) {
            sweep.served(frontend, service, by.clone());
        }
    }
}

#[cfg(test)]
mod tests;
