//! The contribution of a Service: for every port its lists of backends, and for every frontend the
//! way through the maps that its policies ask for.

use ipnet::IpNet;

use super::{Affinity, Contribution, Lists, PortSlots};
use crate::frontend::{Frontend, FrontendKind, Frontends, frontends};
use crate::maglev;
use crate::model::{
    EndpointSlice, Family, NodeFacts, Problem, Scheduler, Service, ServicePort, SessionAffinity,
    TrafficPolicy,
};
use crate::nft::dataplane::FIRST_LOCAL_SLOT;
use crate::nft::element::{Backend, ElementId, Key, Value};
use crate::nft::names::{
    AffinityName, ChainName, Entry, List, Memory, Pick, PortChain, PortName, PrefixLengths,
    Selection, SetName, Traffic, Way,
};
use crate::selection::{Candidate, Uses, select};
use crate::slots::{MAX_BACKENDS, Slots};

/// The contribution of a Service on a node. `slots` is moved on to its present backends.
pub fn of_service(
    service: &Service,
    slices: &[&EndpointSlice],
    node: &NodeFacts,
    slots: &mut PortSlots,
    owners: &Frontends,
) -> (Contribution, Vec<Problem>) {
    slots.retain_ports_of(service);
    let mut building = Building {
        service,
        node,
        elements: Vec::new(),
        chains: Vec::new(),
        affinities: Vec::new(),
        problems: Vec::new(),
    };
    for family in Family::BOTH {
        let Some(cluster_ip) = service.cluster_ip(family) else { continue };
        if !service.ports.is_empty() {
            building.add(family, SetName::ClusterIps, Key::Address(cluster_ip), Value::None);
        }
        for port in &service.ports {
            let lists = slots.lists(family, port);
            building.port(port, family, slices, lists, owners);
        }
    }
    let Building { elements, chains, affinities, mut problems, .. } = building;
    // Most are about the Service, and found in both families.
    problems.dedup();
    (Contribution::new(elements, chains, affinities), problems)
}

struct Building<'a> {
    service: &'a Service,
    node: &'a NodeFacts,
    elements: Vec<(ElementId, Value)>,
    chains: Vec<(Family, ChainName)>,
    affinities: Vec<Affinity>,
    problems: Vec<Problem>,
}

impl Building<'_> {
    fn add(&mut self, family: Family, set: SetName, key: Key, value: Value) {
        self.elements.push((ElementId { family, set, key }, value));
    }

    fn report(&mut self, field: &str, message: String) {
        let object = format!("Service {}", self.service.name);
        let problem = Problem { object, field: field.into(), message };
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
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
        let external = frontends.iter().any(|(_, kind)| kind.is_external());
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
        let name = self.own_name(port);
        let sticky = self.affinity(name.as_ref(), family, uses, lists);
        let pick = match self.service.scheduler {
            Scheduler::SourceHash | Scheduler::Maglev => Pick::SourceHash,
            Scheduler::RoundRobin if name.is_some() => Pick::RoundRobin,
            Scheduler::Random | Scheduler::RoundRobin => Pick::Random,
        };
        let serving = Serving { lists, any: selection.any, pick, name, sticky };
        for (frontend, kind) in frontends {
            match owners.owner(frontend) {
                Some(owner) if *owner == self.service.name => {
                    let policy = match kind {
                        FrontendKind::ClusterIp => internal_policy,
                        _ => external_policy,
                    };
                    Objects::new(self, frontend, family, &serving).frontend(kind, policy);
                }
                owner => {
                    let owner = owner.map_or_else(|| "nobody".into(), ToString::to_string);
                    self.report("", format!("{frontend} is served by Service {owner}, which is older, or which alone has endpoints; this one takes over when that goes"));
                }
            }
        }
    }

    /// Moves a numbering on to the backends selected now.
    fn number(&mut self, slots: &mut Slots, candidates: &[Candidate], port: &ServicePort) {
        let weighted =
            candidates.iter().flat_map(|c| std::iter::repeat_n(c.backend, c.weight.into()));
        let mut backends: Vec<Backend> = weighted.collect();
        if backends.len() > MAX_BACKENDS {
            let (found, name) = (backends.len(), &port.name);
            let weights = if found > candidates.len() { " (counted by their weights)" } else { "" };
            self.report(
                "spec.ports",
                format!(
                    "port {name:?} has {found} endpoints{weights}, the first {MAX_BACKENDS} are used"
                ),
            );
            backends.truncate(MAX_BACKENDS);
        }
        if self.service.scheduler == Scheduler::Maglev {
            *slots = Slots::table(maglev::table(&backends));
        } else {
            slots.update(&backends);
        }
    }

    /// The name of the objects that belong to this port alone, if it needs any.
    fn own_name(&mut self, port: &ServicePort) -> Option<PortName> {
        let sticky = self.service.session_affinity != SessionAffinity::None;
        if !sticky && self.service.scheduler != Scheduler::RoundRobin {
            return None;
        }
        let name = PortName::new(&self.service.name, port.protocol, &port.name);
        if name.is_none() {
            self.report(
                "metadata.name",
                format!(
                    "with the name of port {:?} it does not make the name of a chain (at most 150 \
                     letters, digits, '-', '.' and '_'), which session affinity and round robin \
                     need; every connection is a new choice",
                    port.name
                ),
            );
        }
        name
    }

    /// The affinity maps of a port, and how its clients are remembered.
    fn affinity(
        &mut self,
        name: Option<&PortName>,
        family: Family,
        uses: Uses,
        lists: &Lists,
    ) -> Option<Sticky> {
        let SessionAffinity::ClientIp { timeout } = self.service.session_affinity else {
            return None;
        };
        let port = name?.clone();
        if lists.cluster.as_slice().is_empty() && lists.local.as_slice().is_empty() {
            return None;
        }
        let sorted = |slots: &[&Slots]| -> Box<[Backend]> {
            let mut backends: Vec<_> = slots.iter().flat_map(|s| s.as_slice()).copied().collect();
            backends.sort_unstable();
            backends.dedup();
            backends.into()
        };
        let backends = sorted(&[&lists.cluster, &lists.local]);
        let mut add = |list, backends| {
            let name = AffinityName { port: port.clone(), list };
            self.affinities.push(Affinity { family, name, backends });
        };
        if uses.cluster {
            add(List::Cluster, backends.clone());
        }
        if uses.local {
            add(List::Local, sorted(&[&lists.local]));
        }
        let memory = match (uses.cluster, uses.local) {
            (true, true) => Memory::Both,
            (false, true) => Memory::Local,
            _ => Memory::Cluster,
        };
        Some(Sticky { port, memory, timeout, backends })
    }
}

/// How the clients of a port are remembered.
struct Sticky {
    port: PortName,
    memory: Memory,
    timeout: u32,
    /// Whose clients they are; each once.
    backends: Box<[Backend]>,
}

/// What all frontends of a port have in common.
struct Serving<'a> {
    lists: &'a Lists,
    /// Whether anybody anywhere could answer.
    any: bool,
    pick: Pick,
    /// What chains of the port's own are named after; only if it needs any.
    name: Option<PortName>,
    sticky: Option<Sticky>,
}

impl Serving<'_> {
    /// The chain that takes the backend a client had last, if clients are remembered.
    fn sticky(&self, way: Way) -> Option<ChainName> {
        let chain = match way {
            Way::Select(selection) => PortChain::Sticky(selection.list),
            Way::Enter(traffic, selection) => PortChain::EnterSticky(traffic, selection.list),
            Way::ExternalLocal(..) => PortChain::ExternalLocalSticky,
        };
        Some(ChainName::of_port(&self.sticky.as_ref()?.port, chain))
    }
}

/// The maps and chains for one frontend.
struct Objects<'a, 'b> {
    building: &'a mut Building<'b>,
    serving: &'a Serving<'a>,
    family: Family,
    frontend: Frontend,
    entry: Entry,
    /// Where it is looked up, and where once more, for clients that are not remembered.
    dispatch: SetName,
    new_clients: SetName,
    refusals: SetName,
    endpoints: SetName,
}

impl<'a, 'b> Objects<'a, 'b> {
    fn new(
        building: &'a mut Building<'b>,
        frontend: Frontend,
        family: Family,
        serving: &'a Serving<'a>,
    ) -> Self {
        let (entry, [dispatch, new_clients, refusals, endpoints]) = match frontend {
            Frontend::Address(..) => (
                Entry::Address,
                [
                    SetName::Services,
                    SetName::ServicesNewClients,
                    SetName::NoEndpoints,
                    SetName::Endpoints,
                ],
            ),
            Frontend::NodePort(..) => (
                Entry::NodePort,
                [
                    SetName::Nodeports,
                    SetName::NodeportsNewClients,
                    SetName::NoEndpointNodeports,
                    SetName::NodeportEndpoints,
                ],
            ),
        };
        Self {
            building,
            serving,
            family,
            frontend,
            entry,
            dispatch,
            new_clients,
            refusals,
            endpoints,
        }
    }

    fn add(&mut self, set: SetName, value: Value) {
        let key = match self.frontend {
            Frontend::Address(address, protocol, port) => Key::Frontend(address, protocol, port),
            Frontend::NodePort(_, protocol, port) => Key::NodePort(protocol, port),
        };
        self.building.add(self.family, set, key, value);
    }

    /// Leads the frontend on, if there is anybody, within the lengths of source ranges that may pass.
    fn lead(&mut self, ranges: Option<PrefixLengths>, way: Option<Way>) {
        let restricted = |chain| match ranges {
            Some(lengths) => Some(ChainName::restricted(lengths, chain)),
            None => chain,
        };
        let name = self.serving.name.as_ref();
        let pick = restricted(way.map(|way| ChainName::way(name, way)));
        let Some(pick) = pick else { return };
        self.claim(&pick);
        let sticky = way.and_then(|way| self.serving.sticky(way));
        match sticky.and_then(|chain| restricted(Some(chain))) {
            Some(sticky) => {
                self.claim(&sticky);
                self.add(self.dispatch, Value::Jump(sticky));
                self.add(self.new_clients, Value::Goto(pick));
            }
            None => self.add(self.dispatch, Value::Goto(pick)),
        }
    }

    /// Asks for a chain, and for those that it leads to.
    fn claim(&mut self, chain: &ChainName) {
        for next in chain.next() {
            self.claim(&next);
        }
        self.building.chains.push((self.family, chain.clone()));
    }

    /// Adds the backends of a list; returns their number.
    fn backends(&mut self, list: List) -> u16 {
        let (slots, first_slot) = match list {
            List::Cluster => (&self.serving.lists.cluster, 0),
            List::Local => (&self.serving.lists.local, FIRST_LOCAL_SLOT),
        };
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

    /// Adds the backends of a list; returns the choice of one of them.
    fn selection(&mut self, list: List) -> Selection {
        let n = self.backends(list);
        Selection { entry: self.entry, list, pick: self.serving.pick, n }
    }

    /// Everything a frontend needs.
    fn frontend(&mut self, kind: FrontendKind, policy: TrafficPolicy) {
        let serving = self.serving;
        let somebody = !serving.lists.cluster.as_slice().is_empty();
        let somebody_here = !serving.lists.local.as_slice().is_empty();
        let nobody = match policy {
            TrafficPolicy::Cluster => !somebody,
            TrafficPolicy::Local => !somebody_here,
        };
        if nobody {
            // Where another node could answer, the packet should not have come here.
            let drop = policy == TrafficPolicy::Local && serving.any;
            let refusal = if drop { Value::Drop } else { Value::Goto(ChainName::NoEndpoint) };
            self.add(self.refusals, refusal);
        }
        let ranges = if kind == FrontendKind::LoadBalancer { self.source_ranges() } else { None };
        let list = match policy {
            TrafficPolicy::Cluster => List::Cluster,
            TrafficPolicy::Local => List::Local,
        };
        let way = match (kind, policy) {
            (FrontendKind::ClusterIp, _) if !nobody => {
                Some(Way::Enter(Traffic::Internal, self.selection(list)))
            }
            (FrontendKind::ClusterIp, _) => None,
            (_, TrafficPolicy::Cluster) if !nobody => {
                Some(Way::Enter(Traffic::External, self.selection(list)))
            }
            (_, TrafficPolicy::Local) if serving.any => {
                Some(Way::ExternalLocal(self.selection(List::Cluster), self.backends(list)))
            }
            _ => None,
        };
        self.lead(ranges, way);
        if way.is_some() {
            self.remember();
        }
    }

    /// Says where the clients of the frontend are remembered.
    fn remember(&mut self) {
        let Some(Sticky { port, memory, timeout, backends }) = &self.serving.sticky else { return };
        let chain = ChainName::of_port(port, PortChain::Record(*memory, *timeout));
        let (key, protocol) = match self.frontend {
            Frontend::Address(address, protocol, port) => {
                let key = Key::Address(address);
                self.building.add(self.family, SetName::AffinityIps, key, Value::None);
                (Key::AddressPort(address, port), protocol)
            }
            Frontend::NodePort(_, protocol, port) => {
                for backend in backends {
                    let key = Key::NodePortBackend(protocol, port, *backend);
                    let set = SetName::AffinityNodeportBackends;
                    self.building.add(self.family, set, key, Value::None);
                }
                (Key::Port(port), protocol)
            }
        };
        let set = SetName::affinity_record(self.entry, protocol);
        self.building.chains.push((self.family, chain.clone()));
        self.building.add(self.family, set, key, Value::Goto(chain));
    }

    /// Adds the source ranges of this family that may pass to a load balancer's address, if not everybody may;
    /// returns their lengths.
    fn source_ranges(&mut self) -> Option<PrefixLengths> {
        let Frontend::Address(address, protocol, port) = self.frontend else { return None };
        let (service, family) = (self.building.service, self.family);
        let mut ranges: Vec<IpNet> = service.source_ranges_of(family).collect();
        // A node that has the address itself dials it from there.
        let node = self.building.node.primary(family);
        if node.is_some_and(|node| ranges.iter().any(|range| range.contains(&node))) {
            let of_family = |ip: &&std::net::IpAddr| Family::of(**ip) == family;
            let own = service.load_balancer_ips.iter().filter(of_family);
            ranges.extend(own.map(|ip| IpNet::from(*ip)));
        }
        let lengths = PrefixLengths::new(ranges.iter().map(IpNet::prefix_len))?;
        for range in ranges {
            let key = Key::Sources(address, protocol, port, range);
            self.building.add(family, SetName::SourceRanges, key, Value::None);
        }
        Some(lengths)
    }
}
