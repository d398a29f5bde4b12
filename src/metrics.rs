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

use prometheus::core::Collector;
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
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::new();
        Self {
            process: process::Process::new(&registry),
            kube_proxy: KubeProxy::new(&registry),
            rest_client: RestClient::new(&registry),
            connections: Connections::new(&registry),
            own: Own::new(&registry),
            registry,
        }
    }
}

impl Metrics {
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
    registry: &Registry,
    metric: prometheus::Result<C>,
) -> C {
    let metric = metric.expect("names and labels are well-formed");
    registry.register(Box::new(metric.clone())).expect("no two metrics have one name");
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
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: &[f64],
) -> ByFamily<prometheus::Histogram> {
    let made = HistogramVec::new(histogram(name, help, buckets), &["ip_family"]);
    let made = registered(registry, made);
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
