//! Metrics: kube-proxy's own names, labels and buckets, so that dashboards and alerts made for it go
//! on working, and what this program can tell beyond them under `nftproxy_`.
//!
//! Values are atomics that the thread which programs the kernel writes without waiting; children of
//! labelled metrics are looked up once, at the start. There is no global registry. Text format 0.0.4
//! and this crate rather than `OpenMetrics`, which would write `le="1.0"` for `le="1"` and another
//! name of every counter's family: to Prometheus those would be other series than kube-proxy's.

mod connections;
mod kubeproxy;
mod own;
mod process;

use std::cell::RefCell;

use prometheus::core::Collector;
use prometheus::proto::MetricType;
use prometheus::{Encoder as _, HistogramOpts, HistogramVec, Registry, TextEncoder};

pub use connections::Connections;
pub use kubeproxy::{KubeProxy, RestClient};
pub use own::Own;

use crate::health::ip_family;
use crate::model::Family;

/// What a scrape is answered with.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics of the program.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    process: process::Process,
    /// Those that kube-proxy has, too.
    pub kube_proxy: KubeProxy,
    /// Requests to the API server.
    pub rest_client: RestClient,
    /// Connections by Service port and endpoint.
    pub connections: Connections,
    /// Our own otherwise.
    pub own: Own,
    described: Vec<Description>,
}

/// What there is to know of a metric before it has a value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// Names of its labels.
    pub labels: Vec<String>,
    /// Its help text.
    pub help: String,
}

/// Where metrics are registered, and noted down.
#[derive(Default)]
struct Register {
    registry: Registry,
    described: RefCell<Vec<Description>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let register = Register::default();
        Self {
            process: process::Process::new(&register),
            kube_proxy: KubeProxy::new(&register),
            rest_client: RestClient::new(&register),
            connections: Connections::new(&register),
            own: Own::new(&register),
            registry: register.registry,
            described: register.described.into_inner(),
        }
    }
}

impl Metrics {
    /// Every metric there is, those without a value as well, in the order of the program.
    #[must_use]
    pub fn described(&self) -> &[Description] {
        &self.described
    }

    /// The text of all metrics, as they are now.
    #[must_use]
    pub fn text(&self) -> String {
        self.process.read();
        let mut text = Vec::new();
        // It fails if a metric has no name or samples of two types.
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("metrics are consistent");
        String::from_utf8(text).expect("metrics are text")
    }
}

/// Adds a metric to the registry. Names and labels are constants, so that a failure is a mistake in
/// this program, which the first test finds.
fn registered<C: Collector + Clone + 'static>(
    register: &Register,
    metric: prometheus::Result<C>,
) -> C {
    let metric = metric.expect("names and labels are well-formed");
    // A family says its type even while it has no children.
    let families = metric.collect();
    let described = metric.desc().into_iter().zip(&families).map(|(desc, family)| Description {
        name: desc.fq_name.clone(),
        kind: match family.get_field_type() {
            MetricType::COUNTER => "counter",
            MetricType::GAUGE => "gauge",
            MetricType::HISTOGRAM => "histogram",
            other => unreachable!("no metric is {other:?}"),
        },
        labels: desc.variable_labels.clone(),
        help: desc.help.clone(),
    });
    register.described.borrow_mut().extend(described);
    register.registry.register(Box::new(metric.clone())).expect("no two metrics have one name");
    metric
}

fn histogram(name: &str, help: &str, buckets: &[f64]) -> HistogramOpts {
    HistogramOpts::new(name, help).buckets(buckets.to_vec())
}

/// One value of a metric for each family, in the order of [`Family::BOTH`].
#[derive(Clone, Debug)]
pub struct ByFamily<T>(pub [T; 2]);

impl<T> ByFamily<T> {
    fn new(child: impl Fn(&str) -> T) -> Self {
        Self(Family::BOTH.map(|family| child(ip_family(family))))
    }

    /// The family's own.
    pub fn of(&self, family: Family) -> &T {
        match family {
            Family::V4 => &self.0[0],
            Family::V6 => &self.0[1],
        }
    }

    /// Both.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }
}

fn histograms(
    register: &Register,
    name: &str,
    help: &str,
    buckets: &[f64],
) -> ByFamily<prometheus::Histogram> {
    let made = HistogramVec::new(histogram(name, help, buckets), &["ip_family"]);
    let made = registered(register, made);
    ByFamily::new(|family| made.with_label_values(&[family]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_a_name_a_type_and_a_help_text_once() {
        let text = Metrics::default().text();
        let named = |prefix: &str| -> Vec<String> {
            let lines = text.lines().filter_map(|line| line.strip_prefix(prefix));
            lines.map(|line| line.split(' ').next().unwrap().to_owned()).collect()
        };
        let (helps, types) = (named("# HELP "), named("# TYPE "));
        assert_eq!(helps, types);
        assert!(helps.is_sorted_by(|a, b| a < b), "{helps:?}");
    }
}
