//! Connections by Service port and by endpoint, as the kernel counts them.
//!
//! Nothing of it is there before connections are counted. How many series there can be is bounded: an
//! endpoint has one from its first connection until it is gone, ports and endpoints without
//! connections have none.

use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Opts};

use super::{Register, registered};
use crate::connections::{Port, Reading};
use crate::health::ip_family;
use crate::model::Family;
use crate::nft::connection::Counters;
use crate::nft::rule::CONNECTIONS_SIZE;

/// `nftproxy_…connection…`
#[derive(Debug)]
pub struct Connections {
    ports: IntCounterVec,
    endpoints: IntCounterVec,
    foreign: IntCounterVec,
    incomplete: IntCounterVec,
    left_out: IntGaugeVec,
    pairs: IntGaugeVec,
    full: GaugeVec,
}

impl Connections {
    pub(super) fn new(register: &Register) -> Self {
        let counter = |name: &str, help: &str, labels: &[&str]| {
            registered(register, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let gauge = |name: &str, help: &str, labels: &[&str]| {
            registered(register, IntGaugeVec::new(Opts::new(name, help), labels))
        };
        let of_port = ["namespace", "service", "port", "protocol"];
        let of_endpoint = ["namespace", "service", "port", "protocol", "endpoint"];
        Self {
            ports: counter(
                "nftproxy_service_connections_total",
                "New connections of each Service port.",
                &of_port,
            ),
            endpoints: counter(
                "nftproxy_endpoint_connections_total",
                "New connections of each endpoint, by the Service port that was dialled.",
                &of_endpoint,
            ),
            foreign: counter(
                "nftproxy_foreign_connections_total",
                "New connections that were translated, and not to a Service that is known.",
                &[],
            ),
            incomplete: counter(
                "nftproxy_connection_readings_incomplete_total",
                "Readings of the kernel's counters that failed or took too long to see all.",
                &[],
            ),
            left_out: gauge(
                "nftproxy_endpoint_connections_left_out",
                "Endpoints with connections that have no series of their own: too many have one.",
                &[],
            ),
            pairs: gauge(
                "nftproxy_connection_counters",
                "Pairs of a frontend and an endpoint that the kernel has a counter for.",
                &["ip_family"],
            ),
            full: registered(
                register,
                GaugeVec::new(
                    Opts::new(
                        "nftproxy_connection_counters_full_ratio",
                        "How full the kernel's counters are; connections of pairs beyond 1 are not counted.",
                    ),
                    &["ip_family"],
                ),
            ),
        }
    }

    /// Takes in what a reading of the counters brought.
    pub fn read(&self, reading: &Reading, counters: &Counters) {
        for (port, new) in &reading.ports {
            self.ports.with_label_values(&labels(port)).inc_by(*new);
        }
        for ((port, address), new) in &reading.endpoints {
            let address = address.to_string();
            let [namespace, service, name, protocol] = &labels(port);
            let labels = [namespace, service, name, protocol, &address];
            self.endpoints.with_label_values(&labels).inc_by(*new);
        }
        // What was never told is not there, and that is as well.
        for port in &reading.gone_ports {
            let _ = self.ports.remove_label_values(&labels(port));
        }
        for (port, address) in &reading.gone_endpoints {
            let address = address.to_string();
            let [namespace, service, name, protocol] = &labels(port);
            let labels = [namespace, service, name, protocol, &address];
            let _ = self.endpoints.remove_label_values(&labels);
        }
        self.foreign.with_label_values::<&str>(&[]).inc_by(reading.foreign);
        self.incomplete.with_label_values::<&str>(&[]).inc_by(u64::from(!counters.complete));
        let int = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.left_out.with_label_values::<&str>(&[]).set(int(reading.left_out));
        for (family, set) in Family::BOTH.into_iter().zip(counters.sets) {
            let family = [ip_family(family)];
            if let Some(set) = set {
                let full = f64::from(u32::try_from(set.pairs).unwrap_or(u32::MAX));
                self.pairs.with_label_values(&family).set(int(set.pairs));
                self.full.with_label_values(&family).set(full / f64::from(CONNECTIONS_SIZE));
            }
        }
    }

    /// The counters could not be read.
    pub fn failed(&self) {
        self.incomplete.with_label_values::<&str>(&[]).inc();
    }
}

fn labels(port: &Port) -> [String; 4] {
    let service = port.service.as_str();
    let (namespace, name) = service.split_once('/').unwrap_or(("", service));
    [namespace.into(), name.into(), port.name.to_string(), port.protocol.to_string()]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::metrics::Metrics;
    use crate::model::{NamespacedName, Protocol};
    use crate::nft::connection::CounterSet;

    #[test]
    fn counters_grow_and_go_with_what_they_are_of() {
        let metrics = Metrics::default();
        assert!(!metrics.text().contains("connection"), "nothing is counted yet");
        let service = NamespacedName::new("default", "web");
        let port = Arc::new(Port { service, name: "".into(), protocol: Protocol::Udp });
        let endpoint = (port.clone(), "[fd00::1]:53".parse().unwrap());
        let reading = |new| Reading {
            ports: [(port.clone(), new)].into(),
            endpoints: [(endpoint.clone(), new)].into(),
            ..Reading::default()
        };
        let full = CounterSet { handle: (1, 1), pairs: 65535 };
        let counters =
            |complete| Counters { connections: Vec::new(), sets: [Some(full), None], complete };
        metrics.connections.read(&reading(2), &counters(true));
        metrics.connections.read(&reading(3), &counters(false));
        let text = metrics.text();
        let labels = r#"namespace="default",port="",protocol="udp",service="web""#;
        let endpoint_labels = format!(r#"endpoint="[fd00::1]:53",{labels}"#);
        for line in [
            format!("nftproxy_service_connections_total{{{labels}}} 5"),
            format!("nftproxy_endpoint_connections_total{{{endpoint_labels}}} 5"),
            r#"nftproxy_connection_counters_full_ratio{ip_family="IPv4"} 1"#.into(),
            "nftproxy_connection_readings_incomplete_total 1".into(),
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        let gone_ports = vec![port.clone()];
        let gone = Reading { gone_ports, gone_endpoints: vec![endpoint], ..Reading::default() };
        metrics.connections.read(&gone, &counters(true));
        assert!(!metrics.text().contains("connections_total{"), "{}", metrics.text());
    }
}
