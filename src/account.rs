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
mod tests;
