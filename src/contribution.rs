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
use crate::nft::dataplane::FIRST_LOCAL_SLOT;
use crate::nft::element::{ElementId, Key, Value};
use crate::nft::names::{ChainName, SetName};
use crate::selection::{Candidate, Uses, select};
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

/// The numbering of the backends of every port of a Service, by family, protocol and port name.
pub type PortSlots = BTreeMap<(Family, Protocol, Box<str>), Lists>;

/// The numberings of one port: each list has slots of its own, shared by all its frontends.
#[derive(Clone, Debug, Default)]
pub struct Lists {
    /// Backends for traffic that may reach any endpoint.
    pub cluster: Slots,
    /// Backends on this node, for traffic under a Local policy.
    pub local: Slots,
}

/// The contribution of a Service on a node. `slots` is moved on to its present backends.
pub fn of_service(
    service: &Service,
    slices: &[&EndpointSlice],
    node: &NodeFacts,
    slots: &mut PortSlots,
    owners: &Frontends,
) -> (Contribution, Vec<Problem>) {
    slots.retain(|(family, protocol, name), _| {
        service.cluster_ip(*family).is_some()
            && service.ports.iter().any(|p| p.protocol == *protocol && p.name == *name)
    });
    let mut building = Building {
        service,
        node,
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
            let lists = slots.entry((family, port.protocol, port.name.clone())).or_default();
            building.port(port, family, slices, lists, owners);
        }
    }
    (Contribution::new(building.elements, building.chains), building.problems)
}

struct Building<'a> {
    service: &'a Service,
    node: &'a NodeFacts,
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
        lists: &mut Lists,
        owners: &Frontends,
    ) {
        let frontends = frontends(self.service, port, family);
        let external = frontends.iter().any(|(_, kind)| *kind == FrontendKind::External);
        let internal_policy = self.service.internal_traffic_policy;
        let external_policy = self.service.external_traffic_policy;
        let uses = Uses {
            cluster: internal_policy == TrafficPolicy::Cluster || external,
            local: internal_policy == TrafficPolicy::Local
                || external_policy == TrafficPolicy::Local && external,
        };
        let selection = select(port, family, uses, slices.iter().copied(), self.node);
        self.number(&mut lists.cluster, &selection.cluster, port);
        self.number(&mut lists.local, &selection.local, port);

        // A pod can be given itself only where it runs.
        for candidate in selection.cluster.iter().chain(&selection.local).filter(|c| c.local) {
            let address = candidate.backend.address;
            self.add(family, SetName::Hairpin, Key::Pair(address, address), Value::None);
        }
        for (frontend, kind) in frontends {
            match owners.owner(frontend) {
                Some(owner) if *owner == self.service.name => {
                    let policy = match kind {
                        FrontendKind::ClusterIp => internal_policy,
                        FrontendKind::External => external_policy,
                    };
                    let mut objects = Objects::new(self, frontend, family);
                    objects.frontend(kind, policy, lists, selection.any);
                }
                owner => {
                    let owner = owner.map_or_else(|| "nobody".into(), ToString::to_string);
                    self.report("", format!("{frontend} stays with Service {owner}, which is older; this one takes over when that goes"));
                }
            }
        }
    }

    /// Moves a numbering on to the backends selected now.
    fn number(&mut self, slots: &mut Slots, candidates: &[Candidate], port: &ServicePort) {
        let mut backends: Vec<_> = candidates.iter().map(|c| c.backend).collect();
        if backends.len() > MAX_BACKENDS {
            let (found, name) = (backends.len(), &port.name);
            self.report(
                "spec.ports",
                format!("port {name:?} has {found} endpoints, the first {MAX_BACKENDS} are used"),
            );
            backends.truncate(MAX_BACKENDS);
        }
        slots.update(&backends);
    }
}

/// The maps and chains for one kind of key: a frontend address or a node port.
struct Objects<'a, 'b> {
    building: &'a mut Building<'b>,
    family: Family,
    frontend: Frontend,
    /// Dispatch, and its second step for a Local policy: for clients that may reach any endpoint,
    /// and for others.
    verdicts: [SetName; 3],
    refusals: SetName,
    endpoints: SetName,
}

impl<'a, 'b> Objects<'a, 'b> {
    fn new(building: &'a mut Building<'b>, frontend: Frontend, family: Family) -> Self {
        let (verdicts, refusals, endpoints) = match frontend {
            Frontend::Address(..) => (
                [SetName::Services, SetName::ServicesCluster, SetName::ServicesLocal],
                SetName::NoEndpoints,
                SetName::Endpoints,
            ),
            Frontend::NodePort(..) => (
                [SetName::Nodeports, SetName::NodeportsCluster, SetName::NodeportsLocal],
                SetName::NoEndpointNodeports,
                SetName::NodeportEndpoints,
            ),
        };
        Self { building, family, frontend, verdicts, refusals, endpoints }
    }

    fn add(&mut self, set: SetName, value: Value) {
        let key = match self.frontend {
            Frontend::Address(address, protocol, port) => Key::Frontend(address, protocol, port),
            Frontend::NodePort(_, protocol, port) => Key::NodePort(protocol, port),
        };
        self.building.add(self.family, set, key, value);
    }

    /// Adds a verdict that goes to a shared chain.
    fn go(&mut self, set: SetName, chain: ChainName) {
        self.building.chains.push((self.family, chain));
        self.add(set, Value::Goto(chain));
    }

    /// Adds the backends of a list; returns their number.
    fn backends(&mut self, slots: &Slots, first_slot: u16) -> u16 {
        let backends = slots.as_slice();
        for (slot, &backend) in (first_slot..).zip(backends) {
            let key = match self.frontend {
                Frontend::Address(address, protocol, port) => {
                    Key::Slot(address, protocol, port, slot)
                }
                Frontend::NodePort(_, protocol, port) => Key::NodePortSlot(protocol, port, slot),
            };
            self.building.add(self.family, self.endpoints, key, Value::Backend(backend));
        }
        u16::try_from(backends.len()).expect("bounded by MAX_BACKENDS")
    }

    /// The chain that picks one of `n` backends of any node.
    fn selection(&self, n: u16) -> ChainName {
        match self.frontend {
            Frontend::Address(..) => ChainName::Lb(n),
            Frontend::NodePort(..) => ChainName::NodeportLb(n),
        }
    }

    /// The chain that picks one of `n` backends of this node.
    fn local_selection(&self, n: u16) -> ChainName {
        match self.frontend {
            Frontend::Address(..) => ChainName::LbLocal(n),
            Frontend::NodePort(..) => ChainName::NodeportLbLocal(n),
        }
    }

    /// Everything a frontend needs, as the table in `SEMANTICS.md` section 2 says.
    fn frontend(&mut self, kind: FrontendKind, policy: TrafficPolicy, lists: &Lists, any: bool) {
        let [dispatch, for_cluster, for_local] = self.verdicts;
        let (cluster, local) = (&lists.cluster, &lists.local);
        let nobody_here = match policy {
            TrafficPolicy::Cluster => cluster.as_slice().is_empty(),
            TrafficPolicy::Local => local.as_slice().is_empty(),
        };
        if nobody_here {
            // Where another node could answer, the packet should not have come here.
            let drop = policy == TrafficPolicy::Local && any;
            let refusal = if drop { Value::Drop } else { Value::Goto(ChainName::NoEndpoint) };
            self.add(self.refusals, refusal);
        }
        match (kind, policy) {
            (_, TrafficPolicy::Cluster) | (FrontendKind::ClusterIp, TrafficPolicy::Local)
                if nobody_here => {}
            (FrontendKind::ClusterIp, TrafficPolicy::Cluster) => {
                let n = self.backends(cluster, 0);
                self.go(dispatch, self.selection(n));
            }
            (FrontendKind::ClusterIp, TrafficPolicy::Local) => {
                let n = self.backends(local, FIRST_LOCAL_SLOT);
                self.go(dispatch, self.local_selection(n));
            }
            (FrontendKind::External, TrafficPolicy::Cluster) => {
                let n = self.backends(cluster, 0);
                // The masquerading chain ends in the selection, which so has to be there, too.
                self.building.chains.push((self.family, self.selection(n)));
                self.go(
                    dispatch,
                    match self.frontend {
                        Frontend::Address(..) => ChainName::External(n),
                        Frontend::NodePort(..) => ChainName::Nodeport(n),
                    },
                );
            }
            (FrontendKind::External, TrafficPolicy::Local) => {
                if !cluster.as_slice().is_empty() {
                    let n = self.backends(cluster, 0);
                    self.go(for_cluster, self.selection(n));
                }
                if !nobody_here {
                    let n = self.backends(local, FIRST_LOCAL_SLOT);
                    self.go(for_local, self.local_selection(n));
                }
                if any {
                    let by_client = match self.frontend {
                        Frontend::Address(..) => ChainName::ExternalLocal,
                        Frontend::NodePort(..) => ChainName::NodeportExternalLocal,
                    };
                    self.add(dispatch, Value::Goto(by_client));
                }
            }
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
