//! The objects that are programmed: many Services alike, or of all kinds that there are.

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;
use std::ops::Range;

use ipnet::{IpNet, Ipv4Net};
use nftproxy::model::{
    Endpoint, EndpointSlice, Event, Family, Kind, NamespacedName, Protocol, Scheduler, Service,
    ServicePort, SessionAffinity, SlicePort, TrafficPolicy,
};

/// Ranges of one load balancer in ten, and of a single one.
const SOME_RANGES: usize = 20;
const MANY_RANGES: usize = 1_000;

/// Which objects.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
    pub(crate) mixed: bool,
}

/// What happens to a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum What {
    EndpointMore,
    EndpointLess,
    EndpointOther,
    RangeMore,
    RangeOther,
    Gone,
    There,
    /// What it left behind is removed, and spare chains are made; when nothing else is to be done.
    Collected,
}

impl What {
    pub(crate) const ALL: [Self; 8] = [
        Self::EndpointMore,
        Self::EndpointLess,
        Self::EndpointOther,
        Self::RangeMore,
        Self::RangeOther,
        Self::Gone,
        Self::There,
        Self::Collected,
    ];
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::EndpointMore => "an endpoint more",
            Self::EndpointLess => "less",
            Self::EndpointOther => "another",
            Self::RangeMore => "a range more",
            Self::RangeOther => "another range",
            Self::Gone => "the Service gone",
            Self::There => "the Service there",
            Self::Collected => "collected",
        })
    }
}

impl Size {
    /// Services with a ClusterIP and one TCP port.
    pub(crate) fn plain(services: usize, endpoints: usize) -> Self {
        Self { services, endpoints, mixed: false }
    }

    /// Services of all kinds in turn, with five endpoints each.
    pub(crate) fn mixed(services: usize) -> Self {
        Self { services, endpoints: 5, mixed: true }
    }

    /// What tells the measurement of this size from others.
    pub(crate) fn arguments(self) -> Vec<String> {
        if self.mixed {
            return vec!["mixed".to_owned()];
        }
        vec![self.services.to_string(), self.endpoints.to_string()]
    }

    /// What sort of Service this one is.
    pub(crate) fn kind(self, index: usize) -> &'static str {
        if !self.mixed {
            return "ClusterIP";
        }
        match index % 10 {
            _ if index == 2 => "1,000 source ranges",
            0 => "ClusterIP",
            1 => "node port",
            2 => "20 source ranges",
            3 => "affinity",
            4 => "affinity, node port",
            5 => "load balancer, policy Local",
            6 => "external IP, UDP",
            7 => "source ranges and affinity",
            8 => "internal policy Local",
            _ => "Maglev",
        }
    }

    pub(crate) fn service(self, index: usize) -> Service {
        let kind = self.kind(index);
        let (balanced, affine) =
            (kind.contains("ranges") || kind.contains("balancer"), kind.contains("affinity"));
        let local = |is: bool| if is { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
        let node_port = balanced || kind.contains("node port");
        Service {
            name: name(index),
            created: 0,
            cluster_ips: vec![address(Ipv4Addr::new(10, 96, 0, 1), index)],
            external_ips: only(
                kind.contains("external"),
                address(Ipv4Addr::new(198, 18, 0, 1), index),
            ),
            load_balancer_ips: only(balanced, address(Ipv4Addr::new(198, 19, 0, 1), index)),
            ports: vec![ServicePort {
                name: "http".into(),
                protocol: protocol(kind),
                port: 80,
                node_port: NonZeroU16::new(30_000 + short(index)).filter(|_| node_port),
            }],
            internal_traffic_policy: local(kind.starts_with("internal")),
            external_traffic_policy: local(kind.ends_with("balancer, policy Local")),
            session_affinity: if affine {
                SessionAffinity::ClientIp { timeout: 10_800 }
            } else {
                SessionAffinity::None
            },
            source_ranges: ranges(kind).map(|n| range(index, n)).collect(),
            scheduler: if kind == "Maglev" { Scheduler::Maglev } else { Scheduler::Random },
            health_check_node_port: None,
        }
    }

    /// What happens to a Service: one endpoint more, one less, one in the place of another. In a mixture, of its
    /// source ranges there is one more, then another in the place of one; then it goes, and comes again.
    pub(crate) fn changes(self, index: usize) -> Vec<(What, Event)> {
        let slice = |first, count| Event::EndpointSlice(self.slice(index, first, count));
        let mut changes = vec![
            (What::EndpointMore, slice(0, self.endpoints + 1)),
            (What::EndpointLess, slice(0, self.endpoints)),
            (What::EndpointOther, slice(1, self.endpoints)),
        ];
        if !self.mixed {
            return changes;
        }
        let count = ranges(self.kind(index)).len();
        let with = |ranges: Range<usize>| {
            let source_ranges = ranges.map(|n| range(index, n)).collect();
            Event::Service(Service { source_ranges, ..self.service(index) })
        };
        if count > 0 {
            changes.push((What::RangeMore, with(0..count + 1)));
            changes.push((What::RangeOther, with(1..count + 1)));
        }
        changes.push((What::Gone, Event::Gone(Kind::Service, name(index))));
        changes.push((What::There, with(0..count)));
        changes
    }

    /// The slice of a Service with endpoints `first .. first + count`.
    pub(crate) fn slice(self, index: usize, first: usize, count: usize) -> EndpointSlice {
        let base = index * (self.endpoints + 8);
        let endpoint = |n: usize| Endpoint {
            local: if self.mixed { n % 2 == 1 } else { n == 0 && index.is_multiple_of(100) },
            ..Endpoint::new(address(Ipv4Addr::new(10, 128, 0, 1), base + n))
        };
        let protocol = protocol(self.kind(index));
        EndpointSlice {
            name: NamespacedName::new("default", &format!("service-{index}-abcde")),
            service: name(index),
            family: Family::V4,
            ports: vec![SlicePort { name: "http".into(), protocol, port: 8080 }],
            endpoints: (first..first + count).map(endpoint).collect(),
            last_change_trigger: None,
        }
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.mixed {
            return write!(f, "{} mixed", self.services);
        }
        write!(f, "{}x{}", self.services, self.endpoints)
    }
}

fn name(index: usize) -> NamespacedName {
    NamespacedName::new("default", &format!("service-{index}"))
}

fn protocol(kind: &str) -> Protocol {
    if kind.contains("UDP") { Protocol::Udp } else { Protocol::Tcp }
}

fn only<T>(is: bool, value: T) -> Vec<T> {
    is.then_some(value).into_iter().collect()
}

/// The numbers of its source ranges.
fn ranges(kind: &str) -> Range<usize> {
    0..match kind {
        "1,000 source ranges" => MANY_RANGES,
        kind if kind.contains("ranges") => SOME_RANGES,
        _ => 0,
    }
}

/// A network of 16 addresses, with as many between it and the next, as neighbours would become one.
fn range(index: usize, n: usize) -> IpNet {
    let base = Ipv4Addr::new(11, 0, 0, 0);
    let address = Ipv4Addr::from(u32::from(base) + bits((index * SOME_RANGES + n) * 32));
    IpNet::V4(Ipv4Net::new(address, 28).expect("a prefix"))
}

fn address(first: Ipv4Addr, index: usize) -> IpAddr {
    Ipv4Addr::from(u32::from(first) + bits(index)).into()
}

fn bits(index: usize) -> u32 {
    u32::try_from(index).expect("fewer than 4 billion")
}

fn short(index: usize) -> u16 {
    u16::try_from(index % 30_000).expect("fewer than 65 thousand")
}
