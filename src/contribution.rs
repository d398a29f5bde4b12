//! What one object asks the tables to contain.
//!
//! A contribution is the list of elements and shared chains that follow from one Service (or from the
//! node and the cluster's address plan), and nothing else: an event recomputes the contribution of
//! the one object it is about, and the ledger compares it with the previous one.

use std::collections::BTreeMap;

use ipnet::IpNet;

use crate::frontend::{Frontend, FrontendKind, Frontends, frontends};
use crate::model::{
    EndpointSlice, Family, NamespacedName, NodeFacts, Problem, Protocol, Service, ServiceCidr,
    ServicePort, SessionAffinity, TrafficPolicy,
};
use crate::nft::element::{ElementId, Key, Value};
use crate::nft::names::{ChainName, SetName};
use crate::selection::candidates;
use crate::settings::Settings;
use crate::slots::{MAX_BACKENDS, Slots};

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

/// Elements and shared chains that one contributor asks for; sorted, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contribution {
    /// Elements.
    pub elements: Box<[(ElementId, Value)]>,
    /// Shared chains, those that others of them go to included.
    pub chains: Box<[(Family, ChainName)]>,
}

impl Contribution {
    fn new(mut elements: Vec<(ElementId, Value)>, mut chains: Vec<(Family, ChainName)>) -> Self {
        elements.sort_unstable();
        elements.dedup_by_key(|(id, _)| *id);
        chains.sort_unstable();
        chains.dedup();
        Self { elements: elements.into(), chains: chains.into() }
    }
}

/// The numbering of every port of a Service, by family, protocol and port name.
pub type PortSlots = BTreeMap<(Family, Protocol, Box<str>), Slots>;

/// The contribution of a Service. `slots` is moved on to its present backends.
pub fn of_service(
    service: &Service,
    slices: &[&EndpointSlice],
    slots: &mut PortSlots,
    owners: &Frontends,
) -> (Contribution, Vec<Problem>) {
    slots.retain(|(family, protocol, name), _| {
        service.cluster_ip(*family).is_some()
            && service.ports.iter().any(|p| p.protocol == *protocol && p.name == *name)
    });
    let mut building = Building {
        service,
        elements: Vec::new(),
        chains: Vec::new(),
        problems: not_honoured(service),
    };
    for family in Family::BOTH {
        let Some(cluster_ip) = service.cluster_ip(family) else { continue };
        if !service.ports.is_empty() {
            building.add(family, SetName::ClusterIps, Key::Address(cluster_ip), Value::None);
        }
        for port in &service.ports {
            let slots = slots.entry((family, port.protocol, port.name.clone())).or_default();
            building.port(port, family, slices, slots, owners);
        }
    }
    (Contribution::new(building.elements, building.chains), building.problems)
}

struct Building<'a> {
    service: &'a Service,
    elements: Vec<(ElementId, Value)>,
    chains: Vec<(Family, ChainName)>,
    problems: Vec<Problem>,
}

impl Building<'_> {
    fn add(&mut self, family: Family, set: SetName, key: Key, value: Value) {
        self.elements.push((ElementId { family, set, key }, value));
    }

    fn report(&mut self, field: &str, message: String) {
        let object = format!("Service {}", self.service.name);
        self.problems.push(Problem { object, field: field.into(), message });
    }

    fn port(
        &mut self,
        port: &ServicePort,
        family: Family,
        slices: &[&EndpointSlice],
        slots: &mut Slots,
        owners: &Frontends,
    ) {
        let mut candidates = candidates(port, family, slices.iter().copied());
        if candidates.len() > MAX_BACKENDS {
            let (found, name) = (candidates.len(), &port.name);
            self.report(
                "spec.ports",
                format!("port {name:?} has {found} endpoints, the first {MAX_BACKENDS} are used"),
            );
            candidates.truncate(MAX_BACKENDS);
        }
        let backends: Vec<_> = candidates.iter().map(|candidate| candidate.backend).collect();
        slots.update(&backends);

        // A pod can be given itself only where it runs.
        for candidate in candidates.iter().filter(|candidate| candidate.local) {
            let address = candidate.backend.address;
            self.add(family, SetName::Hairpin, Key::Pair(address, address), Value::None);
        }
        for (frontend, kind) in frontends(self.service, port, family) {
            match owners.owner(frontend) {
                Some(owner) if *owner == self.service.name => {
                    self.frontend(frontend, kind, family, slots);
                }
                owner => {
                    let owner = owner.map_or_else(|| "nobody".into(), ToString::to_string);
                    self.report(
                        "",
                        format!("{frontend} stays with Service {owner}, which is older; this one takes over when that goes"),
                    );
                }
            }
        }
    }

    fn frontend(&mut self, frontend: Frontend, kind: FrontendKind, family: Family, slots: &Slots) {
        let backends = slots.as_slice();
        let n = u16::try_from(backends.len()).expect("bounded by MAX_BACKENDS");
        let (key, verdicts, refusals) = match frontend {
            Frontend::Address(address, protocol, port) => {
                (Key::Frontend(address, protocol, port), SetName::Services, SetName::NoEndpoints)
            }
            Frontend::NodePort(_, protocol, port) => {
                (Key::NodePort(protocol, port), SetName::Nodeports, SetName::NoEndpointNodeports)
            }
        };
        if n == 0 {
            self.add(family, refusals, key, Value::Goto(ChainName::NoEndpoint));
            return;
        }
        let (chain, selection) = match (frontend, kind) {
            (Frontend::Address(..), FrontendKind::ClusterIp) => {
                (ChainName::Lb(n), ChainName::Lb(n))
            }
            (Frontend::Address(..), FrontendKind::External) => {
                (ChainName::External(n), ChainName::Lb(n))
            }
            (Frontend::NodePort(..), _) => (ChainName::Nodeport(n), ChainName::NodeportLb(n)),
        };
        self.add(family, verdicts, key, Value::Goto(chain));
        self.chains.extend([(family, chain), (family, selection)]);
        for (slot, &backend) in (0..n).zip(backends) {
            let (map, key) = match frontend {
                Frontend::Address(address, protocol, port) => {
                    (SetName::Endpoints, Key::Slot(address, protocol, port, slot))
                }
                Frontend::NodePort(_, protocol, port) => {
                    (SetName::NodeportEndpoints, Key::NodePortSlot(protocol, port, slot))
                }
            };
            self.add(family, map, key, Value::Backend(backend));
        }
    }
}

/// What the Service asks for and does not get yet. Said once for a Service, so that nobody believes
/// a policy is in force that is not.
fn not_honoured(service: &Service) -> Vec<Problem> {
    let problem = |field: &str, message: &str| Problem {
        object: format!("Service {}", service.name),
        field: field.into(),
        message: message.into(),
    };
    let mut problems = Vec::new();
    if service.internal_traffic_policy == TrafficPolicy::Local {
        let message = "Local is not supported yet, all endpoints are used";
        problems.push(problem("spec.internalTrafficPolicy", message));
    }
    if service.external_traffic_policy == TrafficPolicy::Local {
        let message = "Local is not supported yet, all endpoints are used and sources masqueraded";
        problems.push(problem("spec.externalTrafficPolicy", message));
    }
    if service.session_affinity != SessionAffinity::None {
        let message = "ClientIP is not supported yet, every connection is a new choice";
        problems.push(problem("spec.sessionAffinity", message));
    }
    if !service.source_ranges.is_empty() {
        let message = "source ranges are not supported yet, the load-balancer addresses stay unserved rather than open to all";
        problems.push(problem("spec.loadBalancerSourceRanges", message));
    }
    problems
}

/// The contribution of the node, its configuration and the cluster's address plan.
pub fn of_node<'a>(
    node: &NodeFacts,
    settings: &Settings,
    cidrs: impl Iterator<Item = &'a ServiceCidr>,
) -> Contribution {
    let mut elements = Vec::new();
    for family in Family::BOTH {
        if let Some(address) = node.primary(family) {
            let key = Key::Address(address);
            elements.push((ElementId { family, set: SetName::NodeportIps, key }, Value::None));
        }
    }
    let service_cidrs: Vec<IpNet> = cidrs.flat_map(|cidr| cidr.cidrs.iter().copied()).collect();
    let local = settings.local_ranges(node);
    for (set, ranges) in [(SetName::ServiceCidrs, &*service_cidrs), (SetName::LocalPods, local)] {
        // An interval set refuses ranges that overlap.
        let ranges: Vec<IpNet> = ranges.iter().map(IpNet::trunc).collect();
        for range in IpNet::aggregate(&ranges) {
            let family = Family::of(range.addr());
            let key = Key::Range(range.network(), range.broadcast());
            elements.push((ElementId { family, set, key }, Value::None));
        }
    }
    Contribution::new(elements, Vec::new())
}
