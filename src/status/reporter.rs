//! The programming thread's side of the status: it looks at the proxy after every turn of the loop and
//! passes on what is new.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;

use super::{Status, held};
use crate::account::{Changes, HealthCheck};
use crate::health;
use crate::metrics::Metrics;
use crate::model::{Family, Kind, NamespacedName};
use crate::nft::kernel::Kernel;
use crate::nft::netlink::Intrusion;
use crate::recent::{Batch, Cause};
use crate::reconcile::{CommitError, Committed, Proxy};
use crate::watch::notices::Notices;

/// What health-check node ports have to be, as it changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthCheckChange {
    /// A Service's health check is this now; None if it has none.
    Service(NamespacedName, Option<HealthCheck>),
    /// The addresses to serve on, in the order of [`Family::BOTH`]; None stands for all of a family.
    Addresses(Addresses),
}

/// Addresses of each family, in the order of [`Family::BOTH`]; None stands for all of them.
pub type Addresses = [Option<Vec<std::net::IpAddr>>; 2];

/// The programming thread's side.
#[derive(Debug)]
pub struct Reporter {
    status: Arc<Status>,
    changes: UnboundedSender<HealthCheckChange>,
    addresses: Option<Addresses>,
    seen: Changes,
    /// When the oldest event came that is not in force.
    oldest: Option<Instant>,
    /// The last repair failed: what is in force is not what should be, whatever else is committed.
    broken: bool,
    notices: Notices,
}

impl Reporter {
    /// A reporter, and what it will say of health-check node ports.
    #[must_use]
    pub fn new(status: Arc<Status>) -> (Self, UnboundedReceiver<HealthCheckChange>) {
        let (changes, receiver) = unbounded_channel();
        let this = Self {
            status,
            changes,
            addresses: None,
            seen: Changes::default(),
            oldest: None,
            broken: false,
            notices: Notices::default(),
        };
        (this, receiver)
    }

    /// Has the owners of Services told what they have to know.
    #[must_use]
    pub fn with_notices(self, notices: Notices) -> Self {
        Self { notices, ..self }
    }

    /// Events were taken in that came at this time.
    pub fn took_in<K: Kernel>(&mut self, proxy: &mut Proxy<K>, came: Instant) {
        let status = &*self.status;
        let eligible = health::is_eligible(proxy.state().node_object());
        status.eligible.store(eligible, Ordering::Relaxed);
        let Metrics { kube_proxy, own, .. } = &status.metrics;
        let account = proxy.account_mut();
        let seen = account.seen();
        kube_proxy.service_changes.inc_by(seen.services - self.seen.services);
        kube_proxy.endpoint_changes.inc_by(seen.endpoint_slices - self.seen.endpoint_slices);
        let fresh = seen != self.seen;
        self.seen = seen;
        self.waiting(account.waiting());
        own.services.set(int(proxy.state().count(Kind::Service)));
        // Before the first complete lists there is nothing to be late with.
        if !proxy.is_complete() || !proxy.is_stale() {
            return;
        }
        if fresh || self.oldest.is_none() {
            let now = seconds(Timestamp::now());
            kube_proxy.last_queued.iter().for_each(|gauge| gauge.set(now));
        }
        if self.oldest.is_none() {
            self.oldest = Some(came);
            status.waits_since(came);
        }
    }

    /// A commit was tried.
    pub fn committed<K: Kernel>(
        &mut self,
        proxy: &mut Proxy<K>,
        took: Duration,
        outcome: &Result<Committed, CommitError>,
    ) {
        let adopted = outcome.as_ref().is_ok_and(|done| done.adopted);
        let cause = if adopted { Cause::Sync } else { Cause::Change };
        self.keep(proxy, cause, took, outcome);
        self.count(proxy, took, outcome);
    }

    fn count<K: Kernel>(
        &mut self,
        proxy: &mut Proxy<K>,
        took: Duration,
        outcome: &Result<Committed, CommitError>,
    ) {
        let Metrics { kube_proxy, own, .. } = &self.status.metrics;
        let observe = |histograms: &crate::metrics::ByFamily<prometheus::Histogram>| {
            histograms.iter().for_each(|histogram| histogram.observe(took.as_secs_f64()));
        };
        observe(&kube_proxy.sync);
        own.commit_seconds.observe(took.as_secs_f64());
        own.set_aside.set(int(proxy.set_aside_count()));
        for notice in proxy.take_notices() {
            self.notices.give(notice);
        }
        match outcome {
            Err(_) => {
                // Nothing may be waiting: it may be a repair that fails.
                self.status.waits_since(Instant::now());
                observe(&kube_proxy.full_sync);
                own.commit_failures.inc();
                kube_proxy.sync_failures.iter().for_each(prometheus::IntCounter::inc);
            }
            Ok(done) => {
                self.broken &= !done.adopted;
                let kind = if done.adopted {
                    observe(&kube_proxy.full_sync);
                    &own.adoptions
                } else {
                    observe(&kube_proxy.partial_sync);
                    &own.commits
                };
                if done.operations > 0 {
                    kind.inc();
                }
                self.batch(done);
                self.in_force(proxy);
            }
        }
    }

    /// A repair of what others changed was tried.
    pub fn repaired<K: Kernel>(
        &mut self,
        proxy: &mut Proxy<K>,
        intrusion: Intrusion,
        took: Duration,
        outcome: &Result<Committed, CommitError>,
    ) {
        self.broken = outcome.is_err();
        self.keep(proxy, Cause::Repair(intrusion), took, outcome);
        self.count(proxy, took, outcome);
        if outcome.as_ref().is_ok_and(|done| done.operations > 0) {
            self.status.metrics.own.drift_repairs.inc();
        }
    }

    /// What nobody uses any more was removed, or could not be.
    pub fn collected<K: Kernel>(
        &mut self,
        proxy: &mut Proxy<K>,
        took: Duration,
        outcome: &Result<Committed, CommitError>,
    ) {
        self.keep(proxy, Cause::Collection, took, outcome);
        let Metrics { kube_proxy, own, .. } = &self.status.metrics;
        match outcome {
            Ok(done) => {
                own.collections.inc();
                self.batch(done);
                own.set_elements(proxy.account_mut().take_elements());
            }
            Err(_) => kube_proxy.cleanup_failures.iter().for_each(prometheus::IntCounter::inc),
        }
    }

    /// Keeps a batch for whoever wants to know. One that had nothing to do is none.
    fn keep<K: Kernel>(
        &self,
        proxy: &mut Proxy<K>,
        cause: Cause,
        took: Duration,
        outcome: &Result<Committed, CommitError>,
    ) {
        let trace = proxy.take_trace();
        let (operations, bytes, error) = match outcome {
            Ok(done) if done.operations == 0 => return,
            Ok(done) => (done.operations, done.applied.bytes, None),
            Err(error) => (0, 0, Some(error.to_string())),
        };
        let waited = match cause {
            Cause::Change | Cause::Sync => self.oldest.map(|oldest| oldest.elapsed()),
            Cause::Repair(_) | Cause::Collection => None,
        };
        let at = Timestamp::now();
        let batch = Batch { at, cause, trace, operations, bytes, took, waited, error };
        self.status.recent.push(batch, proxy.refused().cloned().collect());
    }

    fn batch(&self, done: &Committed) {
        let own = &self.status.metrics.own;
        if done.operations > 0 {
            own.operations.observe(float(done.operations));
            own.bytes.observe(float(done.applied.bytes));
        }
    }

    /// Everything that was waiting is in force.
    fn in_force<K: Kernel>(&mut self, proxy: &mut Proxy<K>) {
        let status = &*self.status;
        let Metrics { kube_proxy, own, .. } = &status.metrics;
        let now = Timestamp::now();
        if !self.broken {
            status.waiting_since.store(0, Ordering::Relaxed);
        }
        status.committed.store(now.as_microsecond(), Ordering::Relaxed);
        kube_proxy.last_sync.iter().for_each(|gauge| gauge.set(seconds(now)));
        if let Some(oldest) = self.oldest.take() {
            own.event_to_kernel.observe(oldest.elapsed().as_secs_f64());
        }

        let counts = proxy.counts();
        let account = proxy.account_mut();
        {
            let mut counting = held(&status.counting);
            counting.on = counts;
            counting.served.extend(account.take_served());
        }
        own.set_elements(account.take_elements());
        for (family, without) in Family::BOTH.into_iter().zip(account.without_endpoints()) {
            kube_proxy.no_local_internal.of(family).set(int(without.internal));
            kube_proxy.no_local_external.of(family).set(int(without.external));
        }
        for (family, at) in account.take_triggers() {
            let at = Timestamp::from_millisecond(i64::try_from(at).unwrap_or(i64::MAX));
            // What was changed before this began did not wait for this.
            if let Some(at) = at.ok().filter(|at| *at > status.recent.started()) {
                let took = now.duration_since(at).as_secs_f64().max(0.0);
                kube_proxy.network_programming.of(family).observe(took);
            }
        }
        // Nobody listens if there is no server, and that is as well.
        for (name, check) in account.take_health_checks() {
            drop(self.changes.send(HealthCheckChange::Service(name, check)));
        }
        let waiting = account.waiting();
        self.waiting(waiting);
        let addresses = Family::BOTH.map(|family| proxy.state().node_port_ips(family));
        if self.addresses.as_ref() != Some(&addresses) {
            self.addresses = Some(addresses.clone());
            drop(self.changes.send(HealthCheckChange::Addresses(addresses)));
        }
    }

    fn waiting(&self, waiting: Changes) {
        let kube_proxy = &self.status.metrics.kube_proxy;
        kube_proxy.service_changes_pending.set(waiting.services.cast_signed());
        kube_proxy.endpoint_changes_pending.set(waiting.endpoint_slices.cast_signed());
    }
}

fn int(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn float(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::from(u32::MAX), f64::from)
}

fn seconds(at: Timestamp) -> f64 {
    at.as_duration().as_secs_f64()
}
