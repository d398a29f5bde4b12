//! What others ask the state: health checks, metrics, connection tracking, and commands.
//!
//! None of it changes anything, and none of it is asked on the way to a commit but about the Services
//! that the commit was for.

use std::net::IpAddr;

use super::State;
use crate::account::{self, Local};
use crate::connections::{Served, served};
use crate::conntrack::{Endpoints, NodePortAddresses, udp_frontends};
use crate::contribution::Contributor;
use crate::frontend::Frontend;
use crate::model::{
    EndpointSlice, Event, Family, HostFacts, Kind, NamespacedName, NodeFacts, Protocol, Service,
};
use crate::settings::Settings;

impl State {
    /// Those whose commits are told to others than the kernel: the node, then the few Services of which
    /// [`Self::local`] or [`Self::udp_frontends`] can have something to say; all, where connections are
    /// counted.
    pub fn accountable(&self) -> impl Iterator<Item = Contributor> {
        let all = self.settings.counters;
        let services =
            self.objects.services().filter(move |(.., service)| all || is_accountable(service));
        let services = services.map(|(name, ..)| Contributor::Service(name.clone()));
        std::iter::once(Contributor::Node).chain(services)
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What [`Self::new`] was told of the node, or would be told now.
    #[must_use]
    pub fn host_facts(&self) -> NodeFacts {
        let HostFacts { addresses, interfaces } = self.host.clone();
        NodeFacts { name: self.node.name.clone(), addresses, interfaces, ..NodeFacts::default() }
    }

    /// Events that bring a new state to what this one knows.
    pub fn events(&self) -> impl Iterator<Item = Event> {
        let listed = Kind::ALL.into_iter().filter(|kind| !self.missing().contains(kind));
        let node = NodeFacts { addresses: self.registered.clone(), ..self.node.clone() };
        let node = self.seen.then_some(Event::Node(node));
        let cidrs = self.cidrs.values().map(|known| Event::ServiceCidr(known.object.clone()));
        let services = self.services().cloned().map(Event::Service);
        let slices = self.objects.slices().cloned().map(Event::EndpointSlice);
        let objects = node.into_iter().chain(cidrs).chain(services).chain(slices);
        objects.chain(listed.map(Event::Listed))
    }

    /// All Services, by name.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.objects.services().map(|(_, _, service)| service)
    }

    /// The Service of this name.
    #[must_use]
    pub fn service_named(&self, name: &NamespacedName) -> Option<&Service> {
        self.objects.service(name).map(|(_, service)| service)
    }

    /// The slices of a Service.
    #[must_use]
    pub fn slices_of(&self, service: &NamespacedName) -> Vec<&EndpointSlice> {
        self.objects.service(service).map_or_else(Vec::new, |(holding, _)| holding.slices())
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

    /// Whether a Service is one of them.
    #[must_use]
    pub fn is_accountable(&self, name: &NamespacedName) -> bool {
        let all = self.settings.counters;
        self.objects.service(name).is_some_and(|(_, service)| all || is_accountable(service))
    }

    /// What a Service's connections are counted by; nothing if there is no such Service.
    #[must_use]
    pub fn served(&self, name: &NamespacedName) -> Vec<Served> {
        self.objects.service(name).map_or_else(Vec::new, |(holding, service)| {
            served(service, &holding.slices(), &self.frontends)
        })
    }

    /// The UDP frontends a Service owns, with the endpoints whose flows are to stay.
    #[must_use]
    pub fn udp_frontends(&self, name: &NamespacedName) -> Vec<(Frontend, Endpoints)> {
        match self.objects.service(name) {
            Some((holding, service)) if has_udp(service) => {
                udp_frontends(service, &holding.slices(), &self.frontends)
            }
            _ => Vec::new(),
        }
    }

    /// What about a Service concerns this node alone; nothing if there is no such Service.
    #[must_use]
    pub fn local(&self, name: &NamespacedName) -> Local {
        match self.objects.service(name) {
            Some((holding, service)) if has_local(service) => {
                account::local(service, &holding.slices(), &self.node)
            }
            _ => Local::default(),
        }
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
}

fn has_udp(service: &Service) -> bool {
    service.ports.iter().any(|port| port.protocol == Protocol::Udp)
}

fn has_local(service: &Service) -> bool {
    service.health_check_node_port.is_some() || service.is_local()
}

fn is_accountable(service: &Service) -> bool {
    has_udp(service) || has_local(service)
}
