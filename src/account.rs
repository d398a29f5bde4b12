//! What the committed state amounts to: what health checks and metrics tell about it.
//!
//! Kept up with every commit at the cost of what changed, so that nobody ever has to count the
//! tables: which Services have a health-check node port and how many endpoints here answer for it,
//! which ports drop traffic for want of an endpoint on this node, how many elements each object has,
//! and what is waiting.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;

use crate::connections::Served;
use crate::frontend::frontends;
use crate::model::{
    EndpointSlice, Event, Family, Kind, NamespacedName, NodeFacts, Service, TrafficPolicy,
};
use crate::nft::element::ElementId;
use crate::nft::names::SetName;
use crate::nft::transaction::Op;
use crate::selection::{Uses, select};

/// What load balancers are told on a Service's health-check node port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`.
    pub port: NonZeroU16,
    /// Ready endpoints on this node, in the order of [`Family::BOTH`]; None where the Service does
    /// not exist in the family.
    pub endpoints: [Option<usize>; 2],
}

/// What about a Service concerns this node alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Local {
    /// Its health check, if it has one.
    pub health_check: Option<HealthCheck>,
    /// Ports that drop traffic here although there are endpoints elsewhere, by family in the order of
    /// [`Family::BOTH`].
    pub without_endpoints: [WithoutEndpoints; 2],
}

/// Ports under a Local policy without an endpoint on this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WithoutEndpoints {
    /// By the internal policy.
    pub internal: usize,
    /// By the external policy.
    pub external: usize,
}

/// What about a Service concerns this node alone.
#[must_use]
pub fn local(service: &Service, slices: &[&EndpointSlice], node: &NodeFacts) -> Local {
    let ready_here = |family| {
        // Every port counts, also one that the Service does not have, and an address once.
        let slices = slices.iter().filter(|s| s.family == family && !s.ports.is_empty());
        let endpoints = slices.flat_map(|slice| &slice.endpoints);
        let here = endpoints.filter(|e| e.ready && e.local && e.weight > 0).map(|e| e.address);
        here.collect::<BTreeSet<IpAddr>>().len()
    };
    let health_check = service.health_check_node_port.map(|port| HealthCheck {
        port,
        endpoints: Family::BOTH.map(|f| service.cluster_ip(f).map(|_| ready_here(f))),
    });
    let without_endpoints = Family::BOTH.map(|f| without_endpoints(service, f, slices, node));
    Local { health_check, without_endpoints }
}

fn without_endpoints(
    service: &Service,
    family: Family,
    slices: &[&EndpointSlice],
    node: &NodeFacts,
) -> WithoutEndpoints {
    let mut found = WithoutEndpoints::default();
    let internal = service.internal_traffic_policy == TrafficPolicy::Local;
    let external = service.external_traffic_policy == TrafficPolicy::Local;
    if !internal && !external {
        return found;
    }
    for port in &service.ports {
        let frontends = frontends(service, port, family);
        if frontends.is_empty() {
            continue;
        }
        let external = external && frontends.iter().any(|(_, kind)| kind.is_external());
        let uses = Uses { cluster: false, local: internal || external };
        let selection = select(port, family, uses, slices.iter().copied(), node);
        if selection.any && selection.local.is_empty() {
            found.internal += usize::from(internal);
            found.external += usize::from(external);
        }
    }
    found
}

/// Changes of objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Of Services.
    pub services: u64,
    /// Of EndpointSlices.
    pub endpoint_slices: u64,
}

/// When a change was made that is now in force, and in which family.
pub type Trigger = (Family, u64);

/// Triggers that are kept while commits fail: beyond, they would all say the same.
const MAX_TRIGGERS: usize = 10_000;

/// How many elements each object has.
pub type ElementCounts = BTreeMap<(Family, SetName), usize>;

/// Counts elements by object. They come in order, so that those of one object are next to each other.
pub fn count_elements<'a>(elements: impl IntoIterator<Item = &'a ElementId>) -> ElementCounts {
    let mut counts = ElementCounts::new();
    let mut run: Option<((Family, SetName), usize)> = None;
    for id in elements {
        let object = (id.family, id.set);
        match &mut run {
            Some((same, count)) if *same == object => *count += 1,
            run => {
                if let Some((object, count)) = run.replace((object, 1)) {
                    *counts.entry(object).or_default() += count;
                }
            }
        }
    }
    if let Some((object, count)) = run {
        *counts.entry(object).or_default() += count;
    }
    counts
}

/// The sums over all Services, and what is waiting.
#[derive(Debug, Default)]
pub struct Account {
    seen: Changes,
    waiting: Changes,
    triggers: Vec<Trigger>,
    /// Services that have something to say.
    local: BTreeMap<NamespacedName, Local>,
    without_endpoints: [WithoutEndpoints; 2],
    health_checks: BTreeMap<NamespacedName, Option<HealthCheck>>,
    /// Services whose connections are counted, and of which of them something else is to be told.
    counted: BTreeSet<NamespacedName>,
    served: BTreeMap<NamespacedName, Vec<Served>>,
    elements: ElementCounts,
    /// Objects whose number of elements may have changed.
    moved: BTreeSet<(Family, SetName)>,
}

impl Account {
    /// An event came. To be told before it is taken in; [`Self::waits`] follows if it changes
    /// something.
    pub fn observe(&mut self, event: &Event) -> Option<Waiting> {
        let (kind, trigger) = match event {
            Event::Service(_) => (Kind::Service, None),
            Event::EndpointSlice(slice) => {
                (Kind::EndpointSlice, slice.last_change_trigger.map(|at| (slice.family, at)))
            }
            Event::Gone(kind, _) => (*kind, None),
            _ => return None,
        };
        *self.seen.of(kind)? += 1;
        Some(Waiting { kind, trigger })
    }

    /// An event made a change that is to be committed.
    pub fn waits(&mut self, waiting: Waiting) {
        if let Some(count) = self.waiting.of(waiting.kind) {
            *count += 1;
        }
        if self.triggers.len() < MAX_TRIGGERS {
            self.triggers.extend(waiting.trigger);
        }
    }

    /// What waited is committed.
    pub fn settle(&mut self) {
        self.waiting = Changes::default();
    }

    /// A Service was committed, or is gone if there is nothing to say of it.
    pub fn update(&mut self, service: &NamespacedName, local: Local) {
        let nothing = Local::default();
        let before = if local == nothing {
            self.local.remove(service)
        } else {
            self.local.insert(service.clone(), local)
        };
        let before = before.unwrap_or_default();
        if before.health_check != local.health_check {
            self.health_checks.insert(service.clone(), local.health_check);
        }
        for (i, sum) in self.without_endpoints.iter_mut().enumerate() {
            let (was, is) = (before.without_endpoints[i], local.without_endpoints[i]);
            sum.internal = sum.internal + is.internal - was.internal;
            sum.external = sum.external + is.external - was.external;
        }
    }

    /// The connections of a Service are counted by this; by nothing if it is gone.
    pub fn count(&mut self, service: &NamespacedName, served: Vec<Served>) {
        let (was, is) = (self.counted.contains(service), !served.is_empty());
        if is {
            self.counted.insert(service.clone());
        } else {
            self.counted.remove(service);
        }
        if was || is {
            self.served.insert(service.clone(), served);
        }
    }

    /// What connections are counted by that changed since the last call.
    pub fn take_served(&mut self) -> BTreeMap<NamespacedName, Vec<Served>> {
        std::mem::take(&mut self.served)
    }

    /// Services this is not true of are gone.
    pub fn retain(&mut self, exists: impl Fn(&NamespacedName) -> bool) {
        let gone: Vec<_> = self.counted.iter().filter(|name| !exists(name)).cloned().collect();
        for name in gone {
            self.count(&name, Vec::new());
        }
        let gone: Vec<_> = self.local.keys().filter(|name| !exists(name)).cloned().collect();
        for name in gone {
            self.update(&name, Local::default());
        }
    }

    /// These operations were committed.
    pub fn apply<'a>(&mut self, ops: impl IntoIterator<Item = &'a Op>) {
        for op in ops {
            let (id, change) = match op {
                Op::AddElement(id, _) => (id, 1),
                Op::DeleteElement(id, _) => (id, -1),
                _ => continue,
            };
            let count = self.elements.entry((id.family, id.set)).or_default();
            *count = count.saturating_add_signed(change);
            self.moved.insert((id.family, id.set));
        }
    }

    /// The tables hold these numbers of elements, and no others.
    pub fn set_elements(&mut self, elements: ElementCounts) {
        self.moved.extend(self.elements.keys().chain(elements.keys()));
        self.elements = elements;
    }

    /// Changes seen so far.
    #[must_use]
    pub fn seen(&self) -> Changes {
        self.seen
    }

    /// Changes that are not committed yet.
    #[must_use]
    pub fn waiting(&self) -> Changes {
        self.waiting
    }

    /// How many elements the objects have that were changed since the last call.
    pub fn take_elements(&mut self) -> Vec<((Family, SetName), usize)> {
        let moved = std::mem::take(&mut self.moved).into_iter();
        moved.map(|object| (object, self.elements.get(&object).copied().unwrap_or(0))).collect()
    }

    /// Ports that drop traffic for want of an endpoint on this node, in the order of [`Family::BOTH`].
    #[must_use]
    pub fn without_endpoints(&self) -> [WithoutEndpoints; 2] {
        self.without_endpoints
    }

    /// The health checks that changed since the last call; None stands for one that is gone.
    pub fn take_health_checks(&mut self) -> BTreeMap<NamespacedName, Option<HealthCheck>> {
        std::mem::take(&mut self.health_checks)
    }

    /// When the changes were triggered that were committed since the last call.
    pub fn take_triggers(&mut self) -> Vec<Trigger> {
        std::mem::take(&mut self.triggers)
    }
}

/// An event that may have to be committed.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    kind: Kind,
    trigger: Option<Trigger>,
}

impl Changes {
    fn of(&mut self, kind: Kind) -> Option<&mut u64> {
        match kind {
            Kind::Service => Some(&mut self.services),
            Kind::EndpointSlice => Some(&mut self.endpoint_slices),
            Kind::ServiceCidr | Kind::Node => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Endpoint, Protocol, Scheduler, ServicePort, SessionAffinity, SlicePort};

    fn name(text: &str) -> NamespacedName {
        NamespacedName::new("default", text)
    }

    fn service(policies: [TrafficPolicy; 2]) -> Service {
        let port = |name: &str, port| ServicePort {
            name: name.into(),
            protocol: Protocol::Tcp,
            port,
            node_port: NonZeroU16::new(30000 + port),
        };
        Service {
            name: name("web"),
            created: 0,
            cluster_ips: vec![[10, 96, 0, 10].into()],
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            ports: vec![port("http", 80), port("admin", 81)],
            internal_traffic_policy: policies[0],
            external_traffic_policy: policies[1],
            session_affinity: SessionAffinity::None,
            source_ranges: Vec::new(),
            scheduler: Scheduler::Random,
            health_check_node_port: NonZeroU16::new(32000),
        }
    }

    /// An endpoint in letters: `L` local, `r` ready, `s` serving, `t` terminating, `0` of no weight.
    fn slice(endpoints: &[(u8, &str)]) -> EndpointSlice {
        let endpoint = |&(host, words): &(u8, &str)| Endpoint {
            address: [10, 244, 1, host].into(),
            ready: words.contains('r'),
            serving: words.contains('s'),
            terminating: words.contains('t'),
            local: words.contains('L'),
            weight: u16::from(!words.contains('0')),
            hints: None,
        };
        let port =
            |name: &str| SlicePort { name: name.into(), protocol: Protocol::Tcp, port: 8080 };
        EndpointSlice {
            name: name("web-1"),
            service: name("web"),
            family: Family::V4,
            ports: vec![port("http"), port("other")],
            endpoints: endpoints.iter().map(endpoint).collect(),
            last_change_trigger: None,
        }
    }

    fn counted(endpoints: &[(u8, &str)]) -> Option<usize> {
        let service = service([TrafficPolicy::Cluster, TrafficPolicy::Local]);
        let slice = slice(endpoints);
        let local = local(&service, &[&slice, &slice], &NodeFacts::default());
        let check = local.health_check.unwrap();
        assert_eq!((check.port.get(), check.endpoints[1]), (32000, None), "no IPv6 Service");
        check.endpoints[0]
    }

    #[test]
    fn ready_endpoints_of_this_node_count_once_each() {
        assert_eq!(counted(&[]), Some(0));
        assert_eq!(counted(&[(1, "Lrs"), (2, "Lrs"), (3, "rs")]), Some(2)); // 124
        assert_eq!(counted(&[(1, "Lst"), (2, "Ls")]), Some(0)); // 125
        assert_eq!(counted(&[(1, "Lrst")]), Some(1), "published although it is not ready");
        assert_eq!(counted(&[(1, "Lrs0")]), Some(0), "drained by its weight");
        let mut without_port = slice(&[(1, "Lrs")]);
        without_port.ports.clear();
        let service = service([TrafficPolicy::Cluster; 2]);
        let local = local(&service, &[&without_port], &NodeFacts::default());
        assert_eq!(local.health_check.unwrap().endpoints, [Some(0), None]);
    }

    #[test]
    fn ports_without_a_local_endpoint_are_counted_by_policy() {
        use TrafficPolicy::{Cluster, Local};
        let counted = |policies, endpoints: &[(u8, &str)]| {
            let service = service(policies);
            let local = local(&service, &[&slice(endpoints)], &NodeFacts::default());
            let WithoutEndpoints { internal, external } = local.without_endpoints[0];
            assert_eq!(local.without_endpoints[1], WithoutEndpoints::default());
            (internal, external)
        };
        assert_eq!(counted([Local, Local], &[(1, "rs")]), (1, 1), "port admin has none anywhere");
        assert_eq!(counted([Local, Cluster], &[(1, "rs")]), (1, 0));
        assert_eq!(counted([Cluster, Local], &[(1, "rs")]), (0, 1));
        assert_eq!(counted([Cluster, Cluster], &[(1, "rs")]), (0, 0));
        assert_eq!(counted([Local, Local], &[(1, "rs"), (2, "Lrs")]), (0, 0));
        assert_eq!(counted([Local, Local], &[(1, "rs"), (2, "Lst")]), (0, 0));
        assert_eq!(counted([Local, Local], &[(2, "L")]), (0, 0));
        // The external policy is nothing to a port that has no frontend outside.
        let mut service = service([Cluster, Local]);
        service.ports.iter_mut().for_each(|port| port.node_port = None);
        let local = local(&service, &[&slice(&[(1, "rs")])], &NodeFacts::default());
        assert_eq!(local.without_endpoints, [WithoutEndpoints::default(); 2]);
    }

    #[test]
    fn an_account_follows_its_services() {
        let mut account = Account::default();
        let check =
            HealthCheck { port: NonZeroU16::new(32000).unwrap(), endpoints: [Some(1), None] };
        let missing = WithoutEndpoints { internal: 1, external: 2 };
        let web = Local {
            health_check: Some(check),
            without_endpoints: [missing, WithoutEndpoints::default()],
        };
        account.update(&name("web"), web);
        account.update(&name("plain"), Local::default());
        account.update(&name("other"), Local { health_check: None, ..web });
        assert_eq!(account.without_endpoints()[0], WithoutEndpoints { internal: 2, external: 4 });
        assert_eq!(account.take_health_checks(), [(name("web"), Some(check))].into());
        account.update(&name("web"), web);
        assert_eq!(account.take_health_checks(), BTreeMap::new(), "nothing changed");
        account.retain(|service| *service == name("other"));
        assert_eq!(account.without_endpoints()[0], missing);
        assert_eq!(account.take_health_checks(), [(name("web"), None)].into());
    }

    #[test]
    fn elements_are_counted_by_object() {
        use crate::nft::element::{Key, Value};
        let id = |family, set, host: u8| ElementId {
            family,
            set,
            key: Key::Address([10, 0, 0, host].into()),
        };
        let add = |id| Op::AddElement(id, Value::None);
        let delete = |id| Op::DeleteElement(id, Value::None);
        let ips = |host| id(Family::V4, SetName::ClusterIps, host);
        let others = id(Family::V6, SetName::ClusterIps, 9);
        let mut account = Account::default();
        account.apply(&[add(ips(1)), add(ips(2)), add(others), delete(ips(1)), add(ips(3))]);
        let counted =
            [((Family::V4, SetName::ClusterIps), 2), ((Family::V6, SetName::ClusterIps), 1)];
        assert_eq!(account.take_elements(), counted);
        assert_eq!(account.take_elements(), [], "nothing changed");
        let pods = id(Family::V4, SetName::LocalPods, 1);
        let found = [ips(1), ips(2), ips(3), pods];
        account.set_elements(count_elements(&found));
        let ip_count = ((Family::V4, SetName::ClusterIps), 3);
        let pod_count = ((Family::V4, SetName::LocalPods), 1);
        let gone = ((Family::V6, SetName::ClusterIps), 0);
        let mut taken = account.take_elements();
        taken.sort_unstable();
        let mut expected = [ip_count, pod_count, gone];
        expected.sort_unstable();
        assert_eq!(taken, expected);
    }

    #[test]
    fn changes_wait_until_they_are_committed() {
        let mut account = Account::default();
        let mut slice = slice(&[]);
        slice.last_change_trigger = Some(5);
        for changes in [true, false, true] {
            let waiting = account.observe(&Event::EndpointSlice(slice.clone())).unwrap();
            if changes {
                account.waits(waiting);
            }
        }
        let gone = account.observe(&Event::Gone(Kind::Service, name("web"))).unwrap();
        account.waits(gone);
        assert!(account.observe(&Event::Gone(Kind::Node, name("n"))).is_none());
        assert!(account.observe(&Event::Listed(Kind::Service)).is_none());
        assert_eq!(account.seen(), Changes { services: 1, endpoint_slices: 3 });
        assert_eq!(account.waiting(), Changes { services: 1, endpoint_slices: 2 });
        account.settle();
        assert_eq!(account.waiting(), Changes::default());
        assert_eq!(account.take_triggers(), [(Family::V4, 5), (Family::V4, 5)]);
        assert_eq!(account.take_triggers(), []);
    }
}
