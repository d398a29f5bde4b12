//! What this program can tell and kube-proxy cannot: the cost of every batch, the way from an event
//! to the kernel, and how full things are.

use std::collections::BTreeMap;

use prometheus::{
    Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
};

use super::{ByFamily, Register, histogram, registered};
use crate::model::Family;
use crate::nft::names::SetName;

/// `nftproxy_…`
#[derive(Debug)]
pub struct Own {
    /// Batches the kernel took for changes.
    pub commits: IntCounter,
    /// Of them those that followed on reading back what the kernel holds.
    pub adoptions: IntCounter,
    /// Batches that removed what nobody uses any more.
    pub collections: IntCounter,
    /// Commits that failed.
    pub commit_failures: IntCounter,
    /// Operations of each batch.
    pub operations: Histogram,
    /// Bytes of each batch.
    pub bytes: Histogram,
    /// How long a commit took.
    pub commit_seconds: Histogram,
    /// From taking in the oldest event of a commit until it was in force.
    pub event_to_kernel: Histogram,
    /// Services known.
    pub services: IntGauge,
    /// Objects whose change the kernel refuses.
    pub set_aside: IntGauge,
    /// Times that a foreign change of our tables was repaired.
    pub drift_repairs: IntCounter,
    /// Searches for stale flows that were carried out.
    pub sweeps: IntCounter,
    /// Those that failed.
    pub sweep_failures: IntCounter,
    /// Flows that the kernel listed for them.
    pub flows_listed: IntCounter,
    /// Health-check node ports that are open.
    pub health_check_listeners: IntGauge,
    /// Those that could not be opened.
    pub health_check_failures: IntCounter,
    /// Affinity maps, the clients in them, and how full the fullest is.
    pub affinity: ByFamily<Affinity>,
    elements: BTreeMap<(Family, SetName), IntGauge>,
}

/// The affinity maps of a family. One value for all of them: there can be thousands.
#[derive(Clone, Debug)]
pub struct Affinity {
    /// How many there are.
    pub maps: IntGauge,
    /// Clients in them.
    pub entries: IntGauge,
    /// How full the fullest is, from 0 to 1.
    pub fullest: Gauge,
}

/// From 10 µs, which a small commit takes, doubling up to 5 s.
fn short() -> Vec<f64> {
    prometheus::exponential_buckets(1e-5, 2.0, 20).expect("start and factor are positive")
}

fn quadrupling(start: f64, count: usize) -> Vec<f64> {
    prometheus::exponential_buckets(start, 4.0, count).expect("start and factor are positive")
}

fn affinity(register: &Register) -> ByFamily<Affinity> {
    let by_family = |name: &str, help: &str| {
        registered(register, IntGaugeVec::new(Opts::new(name, help), &["ip_family"]))
    };
    let maps = by_family("nftproxy_affinity_maps", "Maps of clients that keep their endpoint.");
    let clients = by_family("nftproxy_affinity_entries", "Clients that keep their endpoint.");
    let fullest = registered(
        register,
        GaugeVec::new(
            Opts::new(
                "nftproxy_affinity_fullest_ratio",
                "How full the fullest affinity map is; clients beyond 1 get any endpoint.",
            ),
            &["ip_family"],
        ),
    );
    ByFamily::new(|family| Affinity {
        maps: maps.with_label_values(&[family]),
        entries: clients.with_label_values(&[family]),
        fullest: fullest.with_label_values(&[family]),
    })
}

impl Own {
    pub(super) fn new(register: &Register) -> Self {
        let counter = |name: &str, help: &str| registered(register, IntCounter::new(name, help));
        let gauge = |name: &str, help: &str| registered(register, IntGauge::new(name, help));
        let histogram = |name: &str, help: &str, buckets: Vec<f64>| {
            registered(register, Histogram::with_opts(histogram(name, help, &buckets)))
        };
        let commits = registered(
            register,
            IntCounterVec::new(
                Opts::new("nftproxy_commits_total", "Batches that the kernel took, by what for."),
                &["kind"],
            ),
        );
        let commits = |kind: &str| commits.with_label_values(&[kind]);
        let elements = registered(
            register,
            IntGaugeVec::new(
                Opts::new("nftproxy_elements", "Elements of each set and map, as committed."),
                &["ip_family", "object"],
            ),
        );
        let element = |(number, set): (usize, SetName)| {
            let gauges = ByFamily::new(|f| elements.with_label_values(&[f, set.as_str()]));
            ((Family::BOTH[number], set), gauges.0[number].clone())
        };
        let both = |set| [(0, set), (1, set)];
        let build = registered(
            register,
            GaugeVec::new(
                Opts::new("nftproxy_build_info", "1, with the version as a label."),
                &["version"],
            ),
        );
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        Self {
            commits: commits("change"),
            adoptions: commits("adoption"),
            collections: commits("collection"),
            commit_failures: counter(
                "nftproxy_commit_failures_total",
                "Commits that failed and were tried again.",
            ),
            operations: histogram(
                "nftproxy_commit_operations",
                "Operations of a batch that is not empty.",
                quadrupling(1.0, 12),
            ),
            bytes: histogram(
                "nftproxy_commit_bytes",
                "Bytes of a batch that is not empty.",
                quadrupling(256.0, 10),
            ),
            commit_seconds: histogram(
                "nftproxy_commit_duration_seconds",
                "Time of a commit: computing the change, sending it, the kernel's answer.",
                short(),
            ),
            event_to_kernel: histogram(
                "nftproxy_event_to_kernel_seconds",
                "Time from taking in the oldest event of a commit until it was in force.",
                short(),
            ),
            services: gauge("nftproxy_services", "Services that are known."),
            set_aside: gauge(
                "nftproxy_set_aside_objects",
                "Objects left out because the kernel refuses their change.",
            ),
            drift_repairs: counter(
                "nftproxy_drift_repairs_total",
                "Times that a foreign change of our tables was repaired.",
            ),
            sweeps: counter(
                "nftproxy_conntrack_sweeps_total",
                "Searches for stale flows that were carried out.",
            ),
            sweep_failures: counter(
                "nftproxy_conntrack_sweep_failures_total",
                "Searches for stale flows that failed and were repeated.",
            ),
            flows_listed: counter(
                "nftproxy_conntrack_listed_total",
                "Flows that the kernel listed in searches for stale ones.",
            ),
            health_check_listeners: gauge(
                "nftproxy_health_check_listeners",
                "Health-check node ports that are open, counted by address.",
            ),
            health_check_failures: counter(
                "nftproxy_health_check_listen_failures_total",
                "Attempts to open a health-check node port that failed.",
            ),
            affinity: affinity(register),
            elements: SetName::ALL.into_iter().flat_map(both).map(element).collect(),
        }
    }

    /// Sets the number of elements of some objects.
    pub fn set_elements(&self, counts: impl IntoIterator<Item = ((Family, SetName), usize)>) {
        for (object, count) in counts {
            if let Some(gauge) = self.elements.get(&object) {
                gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
    }
}
