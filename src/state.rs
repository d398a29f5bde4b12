//! What is known of the cluster, and which contributions it made stale.
//!
//! Events change this state and mark what they touch; contributions are computed only when they are
//! about to be committed, so that ten changes of one Service between two commits cost one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Range;

use crate::account::{self, Local};
use crate::conntrack::{Endpoints, NodePortAddresses, udp_frontends};
use crate::contribution::{self, Contribution, Contributor, Lists, PortSlots};
use crate::frontend::{Frontend, Frontends, frontends};
use crate::model::{
    EndpointSlice, Event, Family, HostFacts, Kind, NamespacedName, NodeFacts, Problem, Service,
    ServiceCidr,
};
use crate::nft::dataplane::{FIRST_LOCAL_SLOT, Options};
use crate::nft::element::{ElementId, Key, Value};
use crate::nft::names::SetName;
use crate::selection::anybody;
use crate::settings::{DetectLocal, Settings};
use crate::slots::Slots;

/// The objects of the cluster that concern this node.
#[derive(Debug)]
pub struct State {
    settings: Settings,
    /// The Node object where there is one, completed by what the host tells.
    node: NodeFacts,
    host: HostFacts,
    /// The addresses that the Node object names; none while there is no such object.
    registered: Vec<IpAddr>,
    /// Whether there is a Node object.
    seen: bool,
    services: BTreeMap<NamespacedName, Known<Service>>,
    slices: BTreeMap<NamespacedName, Known<EndpointSlice>>,
    /// Slices by the Service they belong to; a slice can arrive before its Service.
    slices_of: BTreeMap<NamespacedName, BTreeSet<NamespacedName>>,
    cidrs: BTreeMap<NamespacedName, Known<ServiceCidr>>,
    slots: BTreeMap<NamespacedName, PortSlots>,
    frontends: Frontends,
    stale: BTreeSet<Contributor>,
    listings: BTreeMap<Kind, Listing>,
}

/// An object and the listing that named it last.
#[derive(Debug)]
struct Known<T> {
    object: T,
    listing: u32,
}

#[derive(Debug, Default)]
struct Listing {
    /// Number of the present listing.
    number: u32,
    /// Whether one was complete, or the kind cannot be had.
    settled: bool,
}

impl State {
    /// Nothing known yet but the node's own facts as far as the host tells them.
    #[must_use]
    pub fn new(settings: Settings, node: NodeFacts) -> Self {
        let mut this = Self {
            settings,
            host: HostFacts {
                addresses: node.addresses.clone(),
                interfaces: node.interfaces.clone(),
            },
            registered: Vec::new(),
            seen: false,
            node: NodeFacts::default(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            slices_of: BTreeMap::new(),
            cidrs: BTreeMap::new(),
            slots: BTreeMap::new(),
            frontends: Frontends::default(),
            stale: BTreeSet::from([Contributor::Node]),
            listings: BTreeMap::new(),
        };
        this.node(node);
        this
    }

    /// Takes over other settings.
    pub fn configure(&mut self, settings: Settings) {
        if settings == self.settings {
            return;
        }
        self.settings = settings;
        let touched = self.node(self.node.clone());
        self.stale.extend(touched);
        self.stale.insert(Contributor::Node);
    }

    /// Whether pods are to be told from others by ranges of the Node that are not known yet.
    #[must_use]
    pub fn lacks_pod_cidrs(&self) -> bool {
        self.settings.detect_local == DetectLocal::NodeCidr && self.node.pod_cidrs.is_empty()
    }

    /// Whether every kind was listed once: before that, programming would look like deletions.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing().is_empty()
    }

    /// The kinds that were not listed yet.
    #[must_use]
    pub fn missing(&self) -> Vec<Kind> {
        let settled = |kind: &Kind| self.listings.get(kind).is_some_and(|l| l.settled);
        Kind::ALL.into_iter().filter(|kind| !settled(kind)).collect()
    }

    /// What shapes the rules, with the node as it is known now.
    #[must_use]
    pub fn options(&self) -> Options {
        self.settings.options(&self.node)
    }

    /// Whether something waits to be committed.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        !self.stale.is_empty()
    }

    /// How many objects of a kind are known, of those that can be many.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Service => self.services.len(),
            Kind::EndpointSlice => self.slices.len(),
            Kind::ServiceCidr => self.cidrs.len(),
            Kind::Node => 1,
        }
    }

    /// Takes in an event. Returns whose contributions it touched.
    pub fn observe(&mut self, event: Event) -> BTreeSet<Contributor> {
        let mut touched = match event {
            Event::Listing(kind) => {
                self.listings.entry(kind).or_default().number += 1;
                BTreeSet::new()
            }
            Event::Listed(kind) => self.listed(kind),
            Event::Unavailable(kind) => {
                self.listings.entry(kind).or_default().settled = true;
                BTreeSet::new()
            }
            Event::Service(service) => self.service(service),
            Event::EndpointSlice(slice) => self.slice(slice),
            Event::ServiceCidr(cidr) => {
                let listing = self.listing(Kind::ServiceCidr);
                self.cidrs.insert(cidr.name.clone(), Known { object: cidr, listing });
                BTreeSet::from([Contributor::Node])
            }
            Event::Node(node) => {
                self.registered.clone_from(&node.addresses);
                self.seen = true;
                self.node(node)
            }
            Event::Host(host) => {
                self.host = host;
                self.node(self.node.clone())
            }
            Event::Unreadable(kind, name) => {
                self.keep(kind, &name);
                BTreeSet::new()
            }
            Event::Gone(kind, name) => self.gone(kind, &name),
        };
        let mut others = BTreeSet::new();
        for contributor in &touched {
            if let Contributor::Service(name) = contributor {
                others.extend(self.contest(name));
            }
        }
        touched.extend(others.into_iter().map(Contributor::Service));
        self.stale.extend(touched.iter().cloned());
        touched
    }

    /// Finds out anew who serves the frontends of a Service that others name, too. Returns those that
    /// gained or lost one by it, and their rivals.
    fn contest(&mut self, name: &NamespacedName) -> BTreeSet<NamespacedName> {
        let mut affected = BTreeSet::new();
        let Some(service) = self.services.get(name) else { return affected };
        for frontend in self.frontends.contested(&service.object) {
            let claimants: Vec<_> = self.frontends.claimants(frontend).cloned().collect();
            let before = self.frontends.owner(frontend).cloned();
            for claimant in &claimants {
                let idle = !self.can_answer(claimant, frontend);
                self.frontends.set_idle(frontend, claimant, idle);
            }
            if self.frontends.owner(frontend) != before.as_ref() {
                affected.extend(claimants);
            }
        }
        affected
    }

    /// Whether there is an endpoint anywhere that could answer for a Service at a frontend of its own.
    fn can_answer(&self, name: &NamespacedName, frontend: Frontend) -> bool {
        let Some(Known { object: service, .. }) = self.services.get(name) else { return false };
        let slices = slices_of(name, &self.slices_of, &self.slices);
        let family = frontend.family();
        service.ports.iter().any(|port| {
            frontends(service, port, family).iter().any(|(own, _)| *own == frontend)
                && anybody(port, family, slices.iter().copied())
        })
    }

    fn listing(&self, kind: Kind) -> u32 {
        self.listings.get(&kind).map_or(0, |listing| listing.number)
    }

    /// The present listing names an object without saying what it looks like.
    fn keep(&mut self, kind: Kind, name: &NamespacedName) {
        let listing = self.listing(kind);
        let known = match kind {
            Kind::Service => self.services.get_mut(name).map(|known| &mut known.listing),
            Kind::EndpointSlice => self.slices.get_mut(name).map(|known| &mut known.listing),
            Kind::ServiceCidr => self.cidrs.get_mut(name).map(|known| &mut known.listing),
            Kind::Node => None,
        };
        if let Some(known) = known {
            *known = listing;
        }
    }

    /// Forgets what the listing that just ended did not name.
    fn listed(&mut self, kind: Kind) -> BTreeSet<Contributor> {
        let listing = self.listings.entry(kind).or_default();
        listing.settled = true;
        let number = listing.number;
        let unnamed: Vec<NamespacedName> = match kind {
            Kind::Service => unnamed(&self.services, number),
            Kind::EndpointSlice => unnamed(&self.slices, number),
            Kind::ServiceCidr => unnamed(&self.cidrs, number),
            // A Node that is away for a moment must not take the node's addresses along.
            Kind::Node => Vec::new(),
        };
        unnamed.iter().flat_map(|name| self.gone(kind, name)).collect()
    }

    fn node(&mut self, mut node: NodeFacts) -> BTreeSet<Contributor> {
        // The host's count if the Node is not there, or not registered completely.
        let registered = !self.registered.is_empty();
        let addresses = if registered { &self.registered } else { &self.host.addresses };
        node.addresses.clone_from(addresses);
        if let Some(first) = self.settings.node_address {
            node.addresses.retain(|address| *address != first);
            node.addresses.insert(0, first);
        }
        node.interfaces.clone_from(&self.host.interfaces);
        let before = std::mem::replace(&mut self.node, node);
        let mut touched = BTreeSet::new();
        if before != self.node {
            touched.insert(Contributor::Node);
        }
        if (&before.zone, &before.name) != (&self.node.zone, &self.node.name) {
            // One of two events that concern many Services: those whose endpoints are for some zones.
            let hinted =
                self.slices.values().map(|known| &known.object).filter(|slice| {
                    slice.endpoints.iter().any(|endpoint| endpoint.hints.is_some())
                });
            touched.extend(hinted.map(|slice| Contributor::Service(slice.service.clone())));
        }
        if Family::BOTH.map(|f| before.primary(f)) != Family::BOTH.map(|f| self.node.primary(f)) {
            // A load balancer's source ranges may contain the node.
            let services = self.services.values().map(|known| &known.object);
            let restricted = services.filter(|service| !service.source_ranges.is_empty());
            touched.extend(restricted.map(|service| Contributor::Service(service.name.clone())));
        }
        touched
    }

    fn service(&mut self, service: Service) -> BTreeSet<Contributor> {
        let listing = self.listing(Kind::Service);
        let name = service.name.clone();
        if let Some(known) = self.services.get_mut(&name)
            && known.object == service
        {
            known.listing = listing;
            return BTreeSet::new();
        }
        let before = self.services.get(&name).map(|known| &known.object);
        let others = self.frontends.update(before, Some(&service));
        self.services.insert(name.clone(), Known { object: service, listing });
        others.into_iter().chain([name]).map(Contributor::Service).collect()
    }

    fn slice(&mut self, slice: EndpointSlice) -> BTreeSet<Contributor> {
        let listing = self.listing(Kind::EndpointSlice);
        let mut touched = BTreeSet::new();
        if let Some(known) = self.slices.get_mut(&slice.name) {
            if known.object == slice {
                known.listing = listing;
                return touched;
            }
            let owner = known.object.service.clone();
            if owner != slice.service {
                touched.extend(self.detach(&owner, &slice.name));
            }
        }
        self.slices_of.entry(slice.service.clone()).or_default().insert(slice.name.clone());
        if self.services.contains_key(&slice.service) {
            touched.insert(Contributor::Service(slice.service.clone()));
        }
        self.slices.insert(slice.name.clone(), Known { object: slice, listing });
        touched
    }

    /// Takes a slice from a Service.
    fn detach(&mut self, owner: &NamespacedName, slice: &NamespacedName) -> Option<Contributor> {
        if let Some(slices) = self.slices_of.get_mut(owner) {
            slices.remove(slice);
            if slices.is_empty() {
                self.slices_of.remove(owner);
            }
        }
        self.services.contains_key(owner).then(|| Contributor::Service(owner.clone()))
    }

    fn gone(&mut self, kind: Kind, name: &NamespacedName) -> BTreeSet<Contributor> {
        match kind {
            Kind::Service => {
                let Some(known) = self.services.remove(name) else { return BTreeSet::new() };
                let others = self.frontends.update(Some(&known.object), None);
                others.into_iter().chain([name.clone()]).map(Contributor::Service).collect()
            }
            Kind::EndpointSlice => {
                let Some(known) = self.slices.remove(name) else { return BTreeSet::new() };
                self.detach(&known.object.service, name).into_iter().collect()
            }
            Kind::ServiceCidr => {
                let removed = self.cidrs.remove(name);
                removed.into_iter().map(|_| Contributor::Node).collect()
            }
            Kind::Node => {
                self.seen = false;
                BTreeSet::new()
            }
        }
    }

    /// The contributions that events made stale, computed now. They stay stale until [`Self::settle`].
    pub fn stale_contributions(&mut self) -> Vec<(Contributor, Contribution, Vec<Problem>)> {
        let stale: Vec<_> = self.stale.iter().cloned().collect();
        stale.into_iter().map(|contributor| self.contribution(contributor)).collect()
    }

    /// Every contribution, computed now.
    pub fn all_contributions(&mut self) -> Vec<(Contributor, Contribution, Vec<Problem>)> {
        let all: Vec<_> = self.contributors().collect();
        all.into_iter().map(|contributor| self.contribution(contributor)).collect()
    }

    /// Everything stale was committed.
    pub fn settle(&mut self) {
        self.stale.clear();
    }

    /// Everybody who asks for something: the node, then the Services by name.
    pub fn contributors(&self) -> impl Iterator<Item = Contributor> {
        let services = self.services.keys().cloned().map(Contributor::Service);
        std::iter::once(Contributor::Node).chain(services)
    }

    /// All Services, by name.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values().map(|known| &known.object)
    }

    /// The Service of this name.
    #[must_use]
    pub fn service_named(&self, name: &NamespacedName) -> Option<&Service> {
        self.services.get(name).map(|known| &known.object)
    }

    /// The slices of a Service.
    #[must_use]
    pub fn slices_of(&self, service: &NamespacedName) -> Vec<&EndpointSlice> {
        slices_of(service, &self.slices_of, &self.slices)
    }

    /// The Service that serves a frontend.
    #[must_use]
    pub fn owner(&self, frontend: Frontend) -> Option<&NamespacedName> {
        self.frontends.owner(frontend)
    }

    /// The node, as it is known now.
    #[must_use]
    pub fn node_facts(&self) -> &NodeFacts {
        &self.node
    }

    /// Whether there is such a Service.
    #[must_use]
    pub fn has_service(&self, name: &NamespacedName) -> bool {
        self.services.contains_key(name)
    }

    /// The UDP frontends a Service owns, with the endpoints whose flows are to stay.
    #[must_use]
    pub fn udp_frontends(&self, name: &NamespacedName) -> Vec<(Frontend, Endpoints)> {
        let Some(service) = self.services.get(name) else { return Vec::new() };
        let slices = slices_of(name, &self.slices_of, &self.slices);
        udp_frontends(&service.object, &slices, &self.frontends)
    }

    /// What about a Service concerns this node alone; nothing if there is no such Service.
    #[must_use]
    pub fn local(&self, name: &NamespacedName) -> Local {
        let Some(service) = self.services.get(name) else { return Local::default() };
        let service = &service.object;
        if service.health_check_node_port.is_none() && !service.is_local() {
            return Local::default();
        }
        account::local(service, &slices_of(name, &self.slices_of, &self.slices), &self.node)
    }

    /// The Node object, if there is one.
    #[must_use]
    pub fn node_object(&self) -> Option<&NodeFacts> {
        self.seen.then_some(&self.node)
    }

    /// The addresses of a family that node ports are served on; None stands for all of them.
    #[must_use]
    pub fn node_port_ips(&self, family: Family) -> Option<Vec<IpAddr>> {
        self.settings.node_port_ips(&self.node, family)
    }

    /// The addresses of this host that node ports are served on.
    #[must_use]
    pub fn node_port_addresses(&self) -> NodePortAddresses {
        let of = |family| {
            self.node_port_ips(family).unwrap_or_else(|| {
                let all = self.node.interfaces.iter().copied();
                all.filter(|a| Family::of(*a) == family && !a.is_loopback()).collect()
            })
        };
        Family::BOTH.into_iter().flat_map(of).collect()
    }

    fn contribution(
        &mut self,
        contributor: Contributor,
    ) -> (Contributor, Contribution, Vec<Problem>) {
        let (contribution, problems) = match &contributor {
            Contributor::Node => {
                let cidrs = self.cidrs.values().map(|known| &known.object);
                (contribution::of_node(&self.node, &self.settings, cidrs), Vec::new())
            }
            Contributor::Service(name) => match self.services.get(name) {
                None => {
                    self.slots.remove(name);
                    (Contribution::default(), Vec::new())
                }
                Some(service) => {
                    let slices = slices_of(name, &self.slices_of, &self.slices);
                    let slots = self.slots.entry(name.clone()).or_default();
                    contribution::of_service(
                        &service.object,
                        &slices,
                        &self.node,
                        slots,
                        &self.frontends,
                    )
                }
            },
        };
        (contributor, contribution, problems)
    }

    /// Takes over the numbering of backends that the kernel holds in a family, so that a restart
    /// renumbers nothing. All frontends of a port share its lists; the first that has one in the kernel tells.
    pub fn adopt_slots(&mut self, family: Family, elements: &BTreeMap<ElementId, Value>) {
        for (name, known) in &self.services {
            let service = &known.object;
            for port in &service.ports {
                let mut lists = Lists::default();
                let all = frontends(service, port, family).into_iter();
                for (frontend, _) in all.filter(|(f, _)| self.frontends.owner(*f) == Some(name)) {
                    let held = |slots| held_slots(elements, family, frontend, slots);
                    if lists.cluster.as_slice().is_empty() {
                        lists.cluster = held(0..FIRST_LOCAL_SLOT);
                    }
                    if lists.local.as_slice().is_empty() {
                        lists.local = held(FIRST_LOCAL_SLOT..u16::MAX);
                    }
                }
                let key = (family, port.protocol, port.name.clone());
                self.slots.entry(name.clone()).or_default().insert(key, lists);
            }
        }
    }
}

fn slices_of<'a>(
    service: &NamespacedName,
    of: &BTreeMap<NamespacedName, BTreeSet<NamespacedName>>,
    slices: &'a BTreeMap<NamespacedName, Known<EndpointSlice>>,
) -> Vec<&'a EndpointSlice> {
    let names = of.get(service).into_iter().flatten();
    names.filter_map(|name| slices.get(name)).map(|known| &known.object).collect()
}

/// The backends of a frontend in these slots, numbered from the first of them.
fn held_slots(
    elements: &BTreeMap<ElementId, Value>,
    family: Family,
    frontend: Frontend,
    slots: Range<u16>,
) -> Slots {
    let id = |slot| match frontend {
        Frontend::Address(address, protocol, port) => ElementId {
            family,
            set: SetName::Endpoints,
            key: Key::Slot(address, protocol, port, slot),
        },
        Frontend::NodePort(_, protocol, port) => ElementId {
            family,
            set: SetName::NodeportEndpoints,
            key: Key::NodePortSlot(protocol, port, slot),
        },
    };
    let found = elements.range(id(slots.start)..id(slots.end));
    Slots::adopted(found.filter_map(|(id, value)| match (id.key, value) {
        (Key::Slot(.., slot) | Key::NodePortSlot(.., slot), Value::Backend(backend)) => {
            Some((slot - slots.start, *backend))
        }
        _ => None,
    }))
}

fn unnamed<T>(known: &BTreeMap<NamespacedName, Known<T>>, listing: u32) -> Vec<NamespacedName> {
    let old = known.iter().filter(|(_, known)| known.listing != listing);
    old.map(|(name, _)| name.clone()).collect()
}
