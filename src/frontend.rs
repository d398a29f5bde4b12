//! Frontends: what clients dial, and who owns it.
//!
//! A frontend follows from the Service object alone, so the registry of claims changes with Services;
//! endpoints matter to it only where several Services name one frontend (an external IP, say). The
//! older one keeps it, whatever order they were seen in, and the next takes over when it goes. One that
//! has nobody to answer steps back for one that has: a Service that could be reached is never shadowed
//! by one that could not.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use crate::model::{Family, NamespacedName, Protocol, Service, ServicePort};

/// What a client dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Frontend {
    /// An address of the Service.
    Address(IpAddr, Protocol, u16),
    /// Any node-port address of the node.
    NodePort(Family, Protocol, u16),
}

impl Frontend {
    /// The family whose packets it is dialled by.
    #[must_use]
    pub fn family(self) -> Family {
        match self {
            Self::Address(address, ..) => Family::of(address),
            Self::NodePort(family, ..) => family,
        }
    }
}

impl std::fmt::Display for Frontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(IpAddr::V4(a), proto, port) => write!(f, "{a}:{port}/{proto}"),
            Self::Address(IpAddr::V6(a), proto, port) => write!(f, "[{a}]:{port}/{proto}"),
            Self::NodePort(_, proto, port) => write!(f, "node port {port}/{proto}"),
        }
    }
}

/// Where a frontend of a Service comes from; decides which of its traffic policies applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontendKind {
    /// `spec.clusterIPs`: traffic inside the cluster.
    ClusterIp,
    /// `status.loadBalancer`: traffic from outside, which source ranges can restrict.
    LoadBalancer,
    /// `spec.externalIPs`: traffic from outside.
    ExternalIp,
    /// `spec.ports[].nodePort`: traffic from outside.
    NodePort,
}

impl FrontendKind {
    /// Whether it is meant for traffic from outside the cluster.
    #[must_use]
    pub fn is_external(self) -> bool {
        self != Self::ClusterIp
    }
}

/// The frontends of one port of a Service in a family, ClusterIP first, each once.
#[must_use]
pub fn frontends(
    service: &Service,
    port: &ServicePort,
    family: Family,
) -> Vec<(Frontend, FrontendKind)> {
    let Some(cluster_ip) = service.cluster_ip(family) else { return Vec::new() };
    let at = |address| Frontend::Address(address, port.protocol, port.port);

    let mut list = vec![(at(cluster_ip), FrontendKind::ClusterIp)];
    // Of an address that is named as both, the one that can be restricted counts.
    let balancer = service.load_balancer_ips.iter().map(|ip| (*ip, FrontendKind::LoadBalancer));
    let external = service.external_ips.iter().map(|ip| (*ip, FrontendKind::ExternalIp));
    for (address, kind) in balancer.chain(external) {
        let frontend = at(address);
        if Family::of(address) == family && !list.iter().any(|(f, _)| *f == frontend) {
            list.push((frontend, kind));
        }
    }
    if let Some(node_port) = port.node_port {
        let frontend = Frontend::NodePort(family, port.protocol, node_port.get());
        list.push((frontend, FrontendKind::NodePort));
    }
    list
}

/// All frontends of a Service.
fn all(service: &Service) -> BTreeSet<Frontend> {
    let ports = service.ports.iter();
    ports
        .flat_map(|port| Family::BOTH.map(|family| frontends(service, port, family)))
        .flatten()
        .map(|(frontend, _)| frontend)
        .collect()
}

/// A Service that names a frontend. The least one comes first: the oldest, then the first by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claimant {
    created: i64,
    service: NamespacedName,
}

/// Who owns which frontend.
#[derive(Clone, Debug, Default)]
pub struct Frontends {
    /// The first claimant of each.
    oldest: HashMap<Frontend, Claimant>,
    /// Those that come after it; few, or none, in a healthy cluster.
    waiting: BTreeSet<(Frontend, Claimant)>,
    /// Claims on frontends of several Services that nobody could answer for.
    idle: BTreeSet<(Frontend, NamespacedName)>,
}

impl Frontends {
    /// Replaces the claims of a Service (`None`: it is not there). Returns the *other* Services that
    /// gained or lost a frontend by it.
    pub fn update(
        &mut self,
        before: Option<&Service>,
        after: Option<&Service>,
    ) -> BTreeSet<NamespacedName> {
        let mut affected = BTreeSet::new();
        let claim = |service: &Service| Claimant {
            created: service.created,
            service: service.name.clone(),
        };
        let rank_changed = before.map(claim) != after.map(claim);
        let old = before.map(all).unwrap_or_default();
        let new = after.map(all).unwrap_or_default();
        let named: BTreeSet<Frontend> = old.union(&new).copied().collect();
        affected.extend(self.rivals(&named));
        if let Some(before) = before {
            for &frontend in old.iter().filter(|f| rank_changed || !new.contains(f)) {
                affected.extend(self.release(frontend, &claim(before)));
            }
        }
        if let Some(after) = after {
            for &frontend in new.iter().filter(|f| rank_changed || !old.contains(f)) {
                affected.extend(self.claim(frontend, claim(after)));
            }
        }
        affected.extend(self.rivals(&named));
        let own = after.or(before).map(|service| &service.name);
        affected.retain(|name| Some(name) != own);
        affected
    }

    /// The Service that serves a frontend: the oldest for which somebody could answer, or else the
    /// oldest.
    #[must_use]
    pub fn owner(&self, frontend: Frontend) -> Option<&NamespacedName> {
        if self.idle.is_empty() {
            return self.oldest.get(&frontend).map(|claimant| &claimant.service);
        }
        let is_idle = |name: &NamespacedName| self.idle.contains(&(frontend, name.clone()));
        let mut claimants = self.claimants(frontend);
        claimants.find(|name| !is_idle(name)).or_else(|| self.claimants(frontend).next())
    }

    /// The Services that name a frontend, the oldest first.
    pub fn claimants(&self, frontend: Frontend) -> impl Iterator<Item = &NamespacedName> {
        let oldest = self.oldest.get(&frontend).map(|claimant| &claimant.service);
        let others = self.waiting_for(frontend).map(|claimant| &claimant.service);
        oldest.into_iter().chain(others)
    }

    /// The frontends of a Service that others name, too.
    #[must_use]
    pub fn contested(&self, service: &Service) -> Vec<Frontend> {
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let is_contested = |frontend: &Frontend| self.waiting_for(*frontend).next().is_some();
        all(service).into_iter().filter(is_contested).collect()
    }

    /// Says whether nobody could answer for a Service at a frontend that others name, too.
    pub fn set_idle(&mut self, frontend: Frontend, service: &NamespacedName, idle: bool) {
        let claim = (frontend, service.clone());
        if idle {
            self.idle.insert(claim);
        } else {
            self.idle.remove(&claim);
        }
    }

    /// Whoever may serve one of these frontends instead of another Service.
    fn rivals(&self, frontends: &BTreeSet<Frontend>) -> BTreeSet<NamespacedName> {
        if self.idle.is_empty() {
            return BTreeSet::new();
        }
        frontends.iter().flat_map(|frontend| self.claimants(*frontend)).cloned().collect()
    }

    fn waiting_for(&self, frontend: Frontend) -> impl Iterator<Item = &Claimant> {
        let first = Claimant { created: i64::MIN, service: NamespacedName::cluster_scoped("") };
        let from_here = self.waiting.range((frontend, first)..);
        from_here.take_while(move |(f, _)| *f == frontend).map(|(_, claimant)| claimant)
    }

    fn claim(&mut self, frontend: Frontend, claimant: Claimant) -> Option<NamespacedName> {
        let Some(oldest) = self.oldest.get_mut(&frontend) else {
            self.oldest.insert(frontend, claimant);
            return None;
        };
        if claimant < *oldest {
            let displaced = std::mem::replace(oldest, claimant);
            let name = displaced.service.clone();
            self.waiting.insert((frontend, displaced));
            Some(name)
        } else {
            self.waiting.insert((frontend, claimant));
            None
        }
    }

    fn release(&mut self, frontend: Frontend, claimant: &Claimant) -> Option<NamespacedName> {
        self.set_idle(frontend, &claimant.service, false);
        let mut successor = None;
        if self.oldest.get(&frontend) == Some(claimant) {
            self.oldest.remove(&frontend);
            let next = (frontend, self.waiting_for(frontend).next()?.clone());
            self.waiting.remove(&next);
            successor = Some(next.1.service.clone());
            self.oldest.insert(frontend, next.1);
        } else {
            self.waiting.remove(&(frontend, claimant.clone()));
        }
        // The last one has no rival to step back for.
        if self.waiting_for(frontend).next().is_none()
            && let Some(last) = self.oldest.get(&frontend)
        {
            self.idle.remove(&(frontend, last.service.clone()));
        }
        successor
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const FRONTEND: Frontend =
        Frontend::Address(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), Protocol::Tcp, 80);

    fn service(name: &str, created: i64) -> Service {
        let port =
            ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None };
        let name = NamespacedName::new("default", name);
        Service { created, ..Service::new(name, vec![[10, 96, 0, 1].into()], vec![port]) }
    }

    #[test]
    fn who_stepped_back_learns_that_the_one_in_its_place_is_gone() {
        let [old, young] = [service("old", 1), service("young", 2)];
        let mut frontends = Frontends::default();
        frontends.update(None, Some(&old));
        frontends.update(None, Some(&young));
        assert_eq!(frontends.owner(FRONTEND), Some(&old.name));
        frontends.set_idle(FRONTEND, &old.name, true);
        assert_eq!(frontends.owner(FRONTEND), Some(&young.name));
        assert!(frontends.update(Some(&young), None).contains(&old.name));
        assert_eq!(frontends.owner(FRONTEND), Some(&old.name));
        // Alone, nobody has to step back.
        assert!(frontends.contested(&old).is_empty() && frontends.idle.is_empty());
    }
}
