//! The metrics that kube-proxy has in nftables mode: the same names, types, labels, buckets and help
//! texts. `tests/it/metrics.rs` compares them with a scrape of a real one.

use std::time::Duration;

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts,
};

use super::{ByFamily, Register, histogram, histograms, registered};

/// `kubeproxy_…`
#[derive(Debug)]
pub struct KubeProxy {
    /// How long commits took, failed ones as well.
    pub sync: ByFamily<Histogram>,
    /// Of them those for which the kernel was read back.
    pub full_sync: ByFamily<Histogram>,
    /// The others.
    pub partial_sync: ByFamily<Histogram>,
    /// When the last commit succeeded.
    pub last_sync: ByFamily<Gauge>,
    /// When one was last asked for.
    pub last_queued: ByFamily<Gauge>,
    /// From the change of an object to the kernel.
    pub network_programming: ByFamily<Histogram>,
    /// EndpointSlices that changed and are not committed.
    pub endpoint_changes_pending: IntGauge,
    /// Changes of EndpointSlices.
    pub endpoint_changes: IntCounter,
    /// Services that changed and are not committed.
    pub service_changes_pending: IntGauge,
    /// Changes of Services.
    pub service_changes: IntCounter,
    /// Service ports that drop traffic under the internal policy for want of an endpoint here.
    pub no_local_internal: ByFamily<IntGauge>,
    /// The same under the external policy.
    pub no_local_external: ByFamily<IntGauge>,
    /// Failed commits.
    pub sync_failures: ByFamily<IntCounter>,
    /// Failed removals of what nobody uses any more.
    pub cleanup_failures: ByFamily<IntCounter>,
    /// How long searches for stale flows took.
    pub conntrack: ByFamily<Histogram>,
    /// Stale flows that were deleted.
    pub conntrack_deleted: ByFamily<IntCounter>,
    /// Answers of `/healthz`: 200 and 503.
    pub healthz: [IntCounter; 2],
    /// Answers of `/livez`: 200 and 503.
    pub livez: [IntCounter; 2],
}

/// 0.001 and its doubles, 15 in all.
fn exponential() -> Vec<f64> {
    prometheus::exponential_buckets(0.001, 2.0, 15).expect("start and factor are positive")
}

/// Dense where the goal of the Kubernetes project lies, which is 30 s.
fn network_programming_buckets() -> Vec<f64> {
    let seconds = |from: u32, to: u32, step: u32| (from..=to).step_by(step as usize).map(f64::from);
    let mut buckets = vec![0.0, 0.25, 0.5];
    buckets.extend(seconds(1, 59, 1));
    buckets.extend(seconds(60, 115, 5));
    buckets.extend(seconds(120, 300, 30));
    buckets
}

impl KubeProxy {
    pub(super) fn new(register: &Register) -> Self {
        let sync = |name: &str, help: &str| histograms(register, name, help, &exponential());
        let counters = |name: &str, help: &str| {
            let made = IntCounterVec::new(Opts::new(name, help), &["ip_family"]);
            let made = registered(register, made);
            ByFamily::new(|family| made.with_label_values(&[family]))
        };
        let counter = |name: &str, help: &str| registered(register, IntCounter::new(name, help));
        let gauge = |name: &str, help: &str| registered(register, IntGauge::new(name, help));
        let gauges = |name: &str, help: &str| {
            let made = registered(register, GaugeVec::new(Opts::new(name, help), &["ip_family"]));
            ByFamily::new(|family| made.with_label_values(&[family]))
        };
        let codes = |name: &str, help: &str| {
            let made = registered(register, IntCounterVec::new(Opts::new(name, help), &["code"]));
            ["200", "503"].map(|code| made.with_label_values(&[code]))
        };
        let no_local = registered(
            register,
            IntGaugeVec::new(
                Opts::new(
                    "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
                    "[ALPHA] Number of services with a Local traffic policy and no endpoints",
                ),
                &["ip_family", "traffic_policy"],
            ),
        );
        let no_local =
            |policy| ByFamily::new(|family| no_local.with_label_values(&[family, policy]));
        Self {
            sync: sync(
                "kubeproxy_sync_proxy_rules_duration_seconds",
                "[ALPHA] SyncProxyRules latency in seconds",
            ),
            full_sync: sync(
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "[ALPHA] SyncProxyRules latency in seconds for full resyncs",
            ),
            partial_sync: sync(
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "[ALPHA] SyncProxyRules latency in seconds for partial resyncs",
            ),
            last_sync: gauges(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "[ALPHA] The last time proxy rules were successfully synced",
            ),
            last_queued: gauges(
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "[ALPHA] The last time a sync of proxy rules was queued",
            ),
            network_programming: histograms(
                register,
                "kubeproxy_network_programming_duration_seconds",
                "[ALPHA] In Cluster Network Programming Latency in seconds",
                &network_programming_buckets(),
            ),
            endpoint_changes_pending: gauge(
                "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
                "[ALPHA] Pending proxy rules Endpoint changes",
            ),
            endpoint_changes: counter(
                "kubeproxy_sync_proxy_rules_endpoint_changes_total",
                "[ALPHA] Cumulative proxy rules Endpoint changes",
            ),
            service_changes_pending: gauge(
                "kubeproxy_sync_proxy_rules_service_changes_pending",
                "[ALPHA] Pending proxy rules Service changes",
            ),
            service_changes: counter(
                "kubeproxy_sync_proxy_rules_service_changes_total",
                "[ALPHA] Cumulative proxy rules Service changes",
            ),
            no_local_internal: no_local("internal"),
            no_local_external: no_local("external"),
            sync_failures: counters(
                "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
                "[ALPHA] Cumulative proxy nftables sync failures",
            ),
            cleanup_failures: counters(
                "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
                "[ALPHA] Cumulative proxy nftables cleanup failures",
            ),
            conntrack: sync(
                "kubeproxy_conntrack_reconciler_sync_duration_seconds",
                "[ALPHA] ReconcileConntrackFlowsLatency latency in seconds",
            ),
            conntrack_deleted: counters(
                "kubeproxy_conntrack_reconciler_deleted_entries_total",
                "[ALPHA] Cumulative conntrack flows deleted by conntrack reconciler",
            ),
            healthz: codes(
                "kubeproxy_proxy_healthz_total",
                "[ALPHA] Cumulative proxy healthz HTTP status",
            ),
            livez: codes(
                "kubeproxy_proxy_livez_total",
                "[ALPHA] Cumulative proxy livez HTTP status",
            ),
        }
    }
}

/// `rest_client_…`: requests to the API server. Verbs and hosts are few, and known when they come.
#[derive(Clone, Debug)]
pub struct RestClient {
    requests: IntCounterVec,
    durations: HistogramVec,
}

impl RestClient {
    pub(super) fn new(register: &Register) -> Self {
        let buckets = [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0];
        Self {
            requests: registered(
                register,
                IntCounterVec::new(
                    Opts::new(
                        "rest_client_requests_total",
                        "[ALPHA] Number of HTTP requests, partitioned by status code, method, and \
                         host.",
                    ),
                    &["code", "host", "method"],
                ),
            ),
            durations: registered(
                register,
                HistogramVec::new(
                    histogram(
                        "rest_client_request_duration_seconds",
                        "[ALPHA] Request latency in seconds. Broken down by verb, and host.",
                        &buckets,
                    ),
                    &["host", "verb"],
                ),
            ),
        }
    }

    /// A request was answered, or failed without an answer (no code).
    pub fn observe(&self, method: &str, host: &str, code: Option<u16>, took: Duration) {
        let code = code.map_or_else(|| "<error>".to_owned(), |code| code.to_string());
        self.requests.with_label_values(&[&code, host, method]).inc();
        self.durations.with_label_values(&[host, method]).observe(took.as_secs_f64());
    }
}
