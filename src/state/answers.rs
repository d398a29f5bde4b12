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
        self.objects.service(name).map_or_else(Vec::new, |(holding, service)| {
            udp_frontends(service, &holding.slices(), &self.frontends)
        })
    }

    /// What about a Service concerns this node alone; nothing if there is no such Service.
    #[must_use]
    pub fn local(&self, name: &NamespacedName) -> Local {
        self.objects.service(name).map_or_else(Local::default, |(holding, service)| {
            account::local(service, &holding.slices(), &self.node)
        })
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

fn is_accountable(service: &Service) -> bool {
    service.ports.iter().any(|port| port.protocol == Protocol::Udp)
        || service.health_check_node_port.is_some()
        || service.is_local()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::super::tests::{name, service, slice};
    use super::*;
    use crate::model::TrafficPolicy;

    /// One of each kind, every one with an endpoint.
    fn state(settings: Settings) -> State {
        let mut state = State::new(settings, NodeFacts::default());
        let mut dns = service("dns", 1, &[53]);
        dns.ports[0].protocol = Protocol::Udp;
        let mut checked = service("checked", 2, &[80]);
        checked.health_check_node_port = NonZeroU16::new(32000);
        let mut inside = service("inside", 3, &[80]);
        inside.internal_traffic_policy = TrafficPolicy::Local;
        let mut outside = service("outside", 4, &[80]);
        outside.external_traffic_policy = TrafficPolicy::Local;
        for service in [dns, checked, inside, outside, service("plain", 5, &[80])] {
            let mut slice = slice(service.name.as_str(), "", &[service.ports[0].port]);
            slice.service = service.name.clone();
            slice.ports[0].protocol = service.ports[0].protocol;
            state.observe(Event::Service(service));
            state.observe(Event::EndpointSlice(slice));
        }
        state
    }

    #[test]
    fn commits_are_told_of_services_that_have_something_to_say_or_are_counted() {
        let all = ["checked", "dns", "inside", "outside", "plain"];
        for (counters, told) in [(false, &all[..4]), (true, &all)] {
            let state = state(Settings { counters, ..Settings::default() });
            let services = told.iter().map(|text| Contributor::Service(name(text)));
            let expected: Vec<_> = std::iter::once(Contributor::Node).chain(services).collect();
            assert_eq!(state.accountable().collect::<Vec<_>>(), expected);
            for text in all {
                assert_eq!(state.is_accountable(&name(text)), told.contains(&text), "{text}");
            }
            assert!(!state.is_accountable(&name("nobody")));
        }
    }

    #[test]
    fn what_is_told_of_a_service_is_its_own() {
        let state = state(Settings::default());
        let dns = Frontend::Address([10, 96, 0, 1].into(), Protocol::Udp, 53);
        let frontends = |text| state.udp_frontends(&name(text)).into_iter().map(|(f, _)| f);
        assert_eq!(frontends("dns").collect::<Vec<_>>(), [dns]);
        assert_eq!(frontends("plain").count(), 0);
        assert_eq!(state.local(&name("inside")).without_endpoints[0].internal, 1);
        assert!(state.local(&name("checked")).health_check.is_some());
        assert_eq!(state.local(&name("plain")), Local::default());
        let served = state.served(&name("dns"));
        assert_eq!((served.len(), served[0].endpoints.len()), (1, 1));
        assert_eq!(served[0].frontends, [dns]);
        assert_eq!(state.owner(dns), Some(&name("dns")));
        assert_eq!(state.service_named(&name("dns")).unwrap().name, name("dns"));
        assert_eq!(state.services().count(), 5);
        let slices: Vec<_> = state.slices_of(&name("dns")).iter().map(|s| s.name.clone()).collect();
        assert_eq!(slices, [NamespacedName::new("default", "default/dns")]);
        // Of one that there is not, nothing.
        let nobody = name("nobody");
        assert_eq!(
            (state.udp_frontends(&nobody), state.local(&nobody)),
            (vec![], Local::default())
        );
        assert_eq!((state.served(&nobody), state.slices_of(&nobody)), (vec![], vec![]));
        assert_eq!(state.service_named(&nobody), None);
    }

    #[test]
    fn connections_of_a_port_are_those_to_endpoints_of_its_name_and_protocol() {
        let mut state = State::new(Settings::default(), NodeFacts::default());
        let mut web = service("web", 1, &[80, 81]);
        web.ports[1].protocol = Protocol::Sctp;
        state.observe(Event::Service(web));
        state.observe(Event::EndpointSlice(slice("web-1", "web", &[80, 81])));
        let endpoints: Vec<_> =
            state.served(&name("web")).iter().map(|served| served.endpoints.len()).collect();
        assert_eq!(endpoints, [1, 0]);
    }

    #[test]
    fn node_ports_are_served_on_every_address_of_the_host_but_loopback_unless_some_are_named() {
        let interfaces = ["10.0.0.1", "127.0.0.1", "192.0.2.1", "::1", "fd00::1"];
        let interfaces: Vec<IpAddr> = interfaces.map(|address| address.parse().unwrap()).into();
        let served = |ranges: &[&str]| {
            let ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
            let node_port_addresses = crate::settings::NodePortAddresses::Ranges(ranges);
            let settings = Settings { node_port_addresses, ..Settings::default() };
            let facts = NodeFacts { interfaces: interfaces.clone(), ..NodeFacts::default() };
            State::new(settings, facts)
        };
        let told = |state: State| state.node_port_addresses();
        let of = |addresses: &[&str]| -> NodePortAddresses {
            addresses.iter().map(|address| address.parse::<IpAddr>().unwrap()).collect()
        };
        assert_eq!(told(served(&[])), of(&["10.0.0.1", "192.0.2.1", "fd00::1"]));
        assert_eq!(told(served(&["10.0.0.0/8"])), of(&["10.0.0.1", "fd00::1"]));
        assert_eq!(told(served(&["10.0.0.0/8", "fd01::/16"])), of(&["10.0.0.1"]));
        assert_eq!(served(&[]).node_port_ips(Family::V4), None);
    }

    #[test]
    fn there_is_a_node_object_once_it_was_seen() {
        let mut state = State::new(Settings::default(), NodeFacts::default());
        assert_eq!(state.node_object(), None);
        let node = NodeFacts { name: "node-1".into(), ..NodeFacts::default() };
        state.observe(Event::Node(node.clone()));
        assert_eq!(state.node_object(), Some(&node));
    }

    /// What is told to commands, without the events of objects.
    #[test]
    fn a_state_made_of_what_another_knows_of_its_host_has_the_same_node() {
        let facts = NodeFacts {
            name: "node-1".into(),
            addresses: vec![[192, 0, 2, 1].into()],
            interfaces: vec![[192, 0, 2, 1].into(), [10, 0, 0, 1].into()],
            ..NodeFacts::default()
        };
        let first = Some([192, 0, 2, 1].into());
        let settings = Settings { node_address: first, ..Settings::default() };
        let mut state = State::new(settings, facts.clone());
        assert_eq!(state.host_facts(), facts);
        // The Node's own addresses are told by its event.
        let registered = vec![[192, 0, 2, 9].into()];
        let node = NodeFacts { addresses: registered.clone(), ..facts.clone() };
        state.observe(Event::Node(node.clone()));
        state.observe(Event::Listed(Kind::Node));
        assert_eq!(state.host_facts(), facts);
        let events: Vec<_> = state.events().collect();
        assert_eq!(events, [Event::Node(node), Event::Listed(Kind::Node)]);
    }
}
