//! What is known of the cluster, and which contributions it made stale.
//!
//! Events change this state and mark what they touch; contributions are computed only when they are
//! about to be committed, so that ten changes of one Service between two commits cost one.

mod adopted;
mod answers;
mod objects;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use self::objects::{Holding, Known, Objects};
use crate::contribution::{self, Contribution, Contributor};
use crate::frontend::{Frontend, Frontends, frontends};
use crate::model::{
    EndpointSlice, Event, Family, HostFacts, Kind, NamespacedName, NodeFacts, Problem, Service,
    ServiceCidr,
};
use crate::nft::dataplane::Options;
use crate::selection::anybody;
use crate::settings::{DetectLocal, Settings};

/// The objects of the cluster that concern this node.
#[derive(Clone, Debug)]
pub struct State {
    settings: Settings,
    /// The Node object where there is one, completed by what the host tells.
    node: NodeFacts,
    host: HostFacts,
    /// The addresses that the Node object names; none while there is no such object.
    registered: Vec<IpAddr>,
    /// Whether there is a Node object.
    seen: bool,
    objects: Objects,
    cidrs: BTreeMap<NamespacedName, Known<ServiceCidr>>,
    frontends: Frontends,
    stale: BTreeSet<Contributor>,
    listings: BTreeMap<Kind, Listing>,
}

#[derive(Clone, Debug, Default)]
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
            objects: Objects::default(),
            cidrs: BTreeMap::new(),
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

    /// Whether there is a Node object. Without it, the facts of the host count.
    #[must_use]
    pub fn has_node(&self) -> bool {
        self.seen
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
            Kind::Service => self.objects.service_count(),
            Kind::EndpointSlice => self.objects.slice_count(),
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
        let Some((_, service)) = self.objects.service(name) else { return affected };
        for frontend in self.frontends.contested(service) {
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
        let Some((holding, service)) = self.objects.service(name) else { return false };
        let slices = holding.slices();
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
            Kind::Service => self.objects.service_listing(name),
            Kind::EndpointSlice => self.objects.slice_listing(name),
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
            Kind::Service => self.objects.unnamed_services(number),
            Kind::EndpointSlice => self.objects.unnamed_slices(number),
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
            let hinted = self
                .objects
                .slices()
                .filter(|slice| slice.endpoints.iter().any(|endpoint| endpoint.hints.is_some()));
            touched.extend(hinted.map(|slice| Contributor::Service(slice.service.clone())));
        }
        if Family::BOTH.map(|f| before.primary(f)) != Family::BOTH.map(|f| self.node.primary(f)) {
            // A load balancer's source ranges may contain the node.
            let services = self.objects.services();
            let restricted = services.filter(|(.., service)| !service.source_ranges.is_empty());
            touched.extend(restricted.map(|(name, ..)| Contributor::Service(name.clone())));
        }
        touched
    }

    fn service(&mut self, service: Service) -> BTreeSet<Contributor> {
        let listing = self.listing(Kind::Service);
        let name = service.name.clone();
        let before = self.objects.service(&name).map(|(_, service)| service);
        if before == Some(&service) {
            if let Some(known) = self.objects.service_listing(&name) {
                *known = listing;
            }
            return BTreeSet::new();
        }
        let others = self.frontends.update(before, Some(&service));
        self.objects.put_service(service, listing);
        others.into_iter().chain([name]).map(Contributor::Service).collect()
    }

    fn slice(&mut self, slice: EndpointSlice) -> BTreeSet<Contributor> {
        let listing = self.listing(Kind::EndpointSlice);
        let mut touched = BTreeSet::new();
        if let Some(known) = self.objects.slice(&slice.name) {
            if *known == slice {
                let known = self.objects.slice_listing(&slice.name);
                if let Some(known) = known {
                    *known = listing;
                }
                return touched;
            }
            if known.service != slice.service {
                touched.extend(self.take_slice(&slice.name));
            }
        }
        touched.extend(self.contributor(slice.service.clone()));
        self.objects.put_slice(slice, listing);
        touched
    }

    /// Takes a slice from its Service.
    fn take_slice(&mut self, slice: &NamespacedName) -> Option<Contributor> {
        let owner = self.objects.take_slice(slice)?;
        self.contributor(owner)
    }

    /// A Service as contributor, if there is one of the name.
    fn contributor(&self, name: NamespacedName) -> Option<Contributor> {
        self.has_service(&name).then_some(Contributor::Service(name))
    }

    fn gone(&mut self, kind: Kind, name: &NamespacedName) -> BTreeSet<Contributor> {
        match kind {
            Kind::Service => {
                let Some(service) = self.objects.take_service(name) else {
                    return BTreeSet::new();
                };
                let others = self.frontends.update(Some(&service), None);
                others.into_iter().chain([name.clone()]).map(Contributor::Service).collect()
            }
            Kind::EndpointSlice => self.take_slice(name).into_iter().collect(),
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
        let mut all = Vec::with_capacity(1 + self.objects.service_count());
        all.push(self.contribution(Contributor::Node));
        let Self { objects, node, frontends, .. } = self;
        let mut gone = Vec::new();
        for (name, holding) in objects.holdings() {
            match of_service(holding, node, frontends) {
                Some((contribution, problems)) => {
                    all.push((Contributor::Service(name.clone()), contribution, problems));
                }
                None => gone.push(name.clone()),
            }
        }
        for name in &gone {
            self.objects.tidy(name);
        }
        all
    }

    /// A contribution is to be committed although nothing changed it.
    pub fn touch(&mut self, contributor: Contributor) {
        self.stale.insert(contributor);
    }

    /// Everything stale was committed.
    pub fn settle(&mut self) {
        self.stale.clear();
    }

    fn has_service(&self, name: &NamespacedName) -> bool {
        self.objects.service(name).is_some()
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
            Contributor::Service(name) => {
                let Self { objects, node, frontends, .. } = self;
                let holding = objects.holding(name);
                let found = holding.and_then(|holding| of_service(holding, node, frontends));
                found.unwrap_or_else(|| {
                    objects.tidy(name);
                    (Contribution::default(), Vec::new())
                })
            }
        };
        (contributor, contribution, problems)
    }
}

/// The contribution of a Service, if there is one.
fn of_service(
    holding: &mut Holding,
    node: &NodeFacts,
    owners: &Frontends,
) -> Option<(Contribution, Vec<Problem>)> {
    // Taken out, since the slices are borrowed from the same place.
    let mut slots = std::mem::take(&mut holding.slots);
    let of = |known: &Known<Service>| {
        contribution::of_service(&known.object, &holding.slices(), node, &mut slots, owners)
    };
    let found = holding.service.as_ref().map(of);
    holding.slots = slots;
    found
}

fn unnamed<T>(known: &BTreeMap<NamespacedName, Known<T>>, listing: u32) -> Vec<NamespacedName> {
    let old = known.iter().filter(|(_, known)| known.listing != listing);
    old.map(|(name, _)| name.clone()).collect()
}

#[cfg(test)]
mod tests;
