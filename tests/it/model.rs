//! Small constructors of model values, for tests that start behind the Kubernetes types.

use nftproxy::model::{
    Endpoint, EndpointSlice, Event, Family, Kind, NamespacedName, NodeFacts, Protocol, Scheduler,
    Service, ServiceCidr, ServicePort, SessionAffinity, SlicePort, TrafficPolicy,
};
use nftproxy::settings::{DetectLocal, Settings};
use nftproxy::state::State;

pub(crate) fn name(text: &str) -> NamespacedName {
    NamespacedName::new("default", text)
}

/// A Service with these addresses, of which those of 10.96/12 and `fd00:10:96::/108` are ClusterIPs,
/// those of 203.0.113/24 and `fd00:203::/64` balancer addresses, and the others external ones.
pub(crate) fn service(service: &str, addresses: &[&str], ports: &[ServicePort]) -> Service {
    let all: Vec<std::net::IpAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
    let within = |nets: [&str; 2]| {
        let nets = nets.map(|net| net.parse::<ipnet::IpNet>().unwrap());
        all.iter().copied().filter(|a| nets.iter().any(|net| net.contains(a))).collect::<Vec<_>>()
    };
    let cluster_ips = within(["10.96.0.0/12", "fd00:10:96::/108"]);
    let load_balancer_ips = within(["203.0.113.0/24", "fd00:203::/64"]);
    let external_ips = all
        .iter()
        .copied()
        .filter(|a| !cluster_ips.contains(a) && !load_balancer_ips.contains(a))
        .collect();
    Service {
        external_ips,
        load_balancer_ips,
        ..Service::new(name(service), cluster_ips, ports.to_vec())
    }
}

pub(crate) fn port(name: &str, protocol: Protocol, port: u16, node_port: u16) -> ServicePort {
    ServicePort { name: name.into(), protocol, port, node_port: node_port.try_into().ok() }
}

/// A slice of a Service with ready endpoints; an address ending in `!` is one on this node.
pub(crate) fn slice(
    service: &str,
    suffix: &str,
    ports: &[(&str, Protocol, u16)],
    addresses: &[&str],
) -> EndpointSlice {
    let endpoint = |text: &&str| Endpoint {
        local: text.ends_with('!'),
        ..Endpoint::new(text.trim_end_matches('!').parse().unwrap())
    };
    let endpoints: Vec<_> = addresses.iter().map(endpoint).collect();
    EndpointSlice {
        name: name(&format!("{service}-{suffix}")),
        service: name(service),
        family: endpoints.first().map_or(Family::V4, |e: &Endpoint| Family::of(e.address)),
        ports: ports
            .iter()
            .map(|&(name, protocol, port)| SlicePort { name: name.into(), protocol, port })
            .collect(),
        endpoints,
        last_change_trigger: None,
    }
}

pub(crate) fn settings() -> Settings {
    let cidrs = ["10.244.0.0/16", "fd00:10:244::/56"].map(|cidr| cidr.parse().unwrap());
    Settings { detect_local: DetectLocal::ClusterCidr(cidrs.into()), ..Settings::default() }
}

pub(crate) fn node() -> NodeFacts {
    NodeFacts {
        name: "node-1".into(),
        addresses: ["192.0.2.10", "fd00:192::10"].map(|a| a.parse().unwrap()).into(),
        ..NodeFacts::default()
    }
}

pub(crate) fn state() -> State {
    State::new(settings(), node())
}

/// Every kind is listed; what was sent before stays.
pub(crate) fn all_listed() -> impl Iterator<Item = Event> {
    Kind::ALL.into_iter().map(Event::Listed)
}

/// Services that show every object of the table: `web` in both families with all kinds of frontends,
/// `dns` over UDP, `near` and `far` under Local policies with and without an endpoint on this node,
/// `empty` without endpoints, `sticky` with session affinity, `guarded` with source ranges and round
/// robin, `hashed` by source; and an address plan.
pub(crate) fn example() -> Vec<Event> {
    use Protocol::{Tcp, Udp};
    let web_ports = [port("http", Tcp, 80, 30080), port("metrics", Tcp, 9090, 0)];
    let web_addresses =
        ["10.96.0.10", "fd00:10:96::10", "203.0.113.7", "fd00:203::7", "198.51.100.7"];
    let numbers = [("http", Tcp, 8080), ("metrics", Tcp, 9090)];
    let cidrs = ["10.96.0.0/12", "fd00:10:96::/108"].map(|cidr| cidr.parse().unwrap());
    vec![
        Event::Service(service("web", &web_addresses, &web_ports)),
        Event::EndpointSlice(slice("web", "4", &numbers, &["10.244.1.5!", "10.244.2.9"])),
        Event::EndpointSlice(slice("web", "6", &numbers, &["fd00:10:244:1::5!"])),
        Event::Service(service("dns", &["10.96.0.53"], &[port("dns", Udp, 53, 0)])),
        Event::EndpointSlice(slice(
            "dns",
            "4",
            &[("dns", Udp, 53)],
            &["10.244.1.6!", "10.244.1.7!", "10.244.2.6"],
        )),
        Event::Service(Service {
            internal_traffic_policy: TrafficPolicy::Local,
            external_traffic_policy: TrafficPolicy::Local,
            ..service("near", &["10.96.0.20", "203.0.113.20"], &[port("", Tcp, 80, 30020)])
        }),
        Event::EndpointSlice(slice("near", "4", &[("", Tcp, 80)], &["10.244.1.8!", "10.244.2.8"])),
        Event::Service(Service {
            internal_traffic_policy: TrafficPolicy::Local,
            external_traffic_policy: TrafficPolicy::Local,
            ..service("far", &["10.96.0.21", "203.0.113.21"], &[port("", Tcp, 80, 30021)])
        }),
        Event::EndpointSlice(slice("far", "4", &[("", Tcp, 80)], &["10.244.2.8"])),
        Event::Service(service(
            "empty",
            &["10.96.0.99", "fd00:10:96::99"],
            &[port("", Tcp, 80, 30099)],
        )),
        Event::Service(Service {
            session_affinity: SessionAffinity::ClientIp { timeout: 10_800 },
            external_traffic_policy: TrafficPolicy::Local,
            ..service("sticky", &["10.96.0.30", "203.0.113.30"], &[port("http", Tcp, 80, 30030)])
        }),
        Event::EndpointSlice(slice(
            "sticky",
            "4",
            &[("http", Tcp, 80)],
            &["10.244.1.9!", "10.244.2.9"],
        )),
        Event::Service(Service {
            source_ranges: ["192.0.2.0/24", "10.0.0.0/8", "fd00:192::/64", "192.0.2.7/32"]
                .map(|range| range.parse().unwrap())
                .into(),
            scheduler: Scheduler::RoundRobin,
            ..service(
                "guarded",
                &["10.96.0.40", "fd00:10:96::40", "203.0.113.40", "fd00:203::40"],
                &[port("", Tcp, 443, 0)],
            )
        }),
        Event::EndpointSlice(slice(
            "guarded",
            "4",
            &[("", Tcp, 443)],
            &["10.244.1.8!", "10.244.2.8"],
        )),
        Event::EndpointSlice(slice("guarded", "6", &[("", Tcp, 443)], &["fd00:10:244:2::8"])),
        Event::Service(Service {
            scheduler: Scheduler::SourceHash,
            ..service("hashed", &["10.96.0.50", "fd00:10:96::50"], &[port("", Udp, 5000, 30050)])
        }),
        Event::EndpointSlice(slice(
            "hashed",
            "4",
            &[("", Udp, 5000)],
            &["10.244.1.8!", "10.244.2.8"],
        )),
        Event::EndpointSlice(slice(
            "hashed",
            "6",
            &[("", Udp, 5000)],
            &["fd00:10:244:2::8", "fd00:10:244:2::9"],
        )),
        Event::ServiceCidr(ServiceCidr {
            name: NamespacedName::cluster_scoped("kubernetes"),
            cidrs: cidrs.into(),
        }),
    ]
}
