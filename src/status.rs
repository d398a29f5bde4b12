//! What the programming thread tells the rest of the program, without ever waiting for it.
//!
//! [`Status`] is shared: atomics, written by that thread and read by whoever answers a probe or a
//! scrape. [`Reporter`] is that thread's own side; it looks at the proxy after every turn of the
//! loop and passes on what is new.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::debug;

use crate::account::{Changes, HealthCheck};
use crate::connections::{Connections, Served};
use crate::conntrack::Pass;
use crate::health::{self, Answer, Progress};
use crate::metrics::Metrics;
use crate::model::{Family, Kind, NamespacedName};
use crate::nft::connection::Counters;
use crate::nft::kernel::{Kernel, LoadError};
use crate::nft::netlink::{Intrusion, OpenError, ReadCounters};
use crate::recent::{Batch, Cause, Recent};
use crate::reconcile::{CommitError, Committed, Proxy};
use crate::watch::notices::Notices;

/// How far programming is, and all metrics.
#[derive(Debug)]
pub struct Status {
    /// Everything that is counted.
    pub metrics: Metrics,
    /// The last batches.
    pub recent: Recent,
    families: Vec<Family>,
    patience: Duration,
    started: Instant,
    /// Milliseconds from the start to when the oldest waiting change came, plus one; 0 if none waits.
    waiting_since: AtomicU64,
    /// Microseconds since the epoch; 0 for never.
    committed: AtomicI64,
    eligible: AtomicBool,
    /// Whoever serves has a receiver as long as there is something to answer.
    stopping: watch::Sender<bool>,
    /// Held while the kernel's counters are read.
    connections: Mutex<Connections>,
    /// Held for no time.
    counting: Mutex<Counting>,
}

/// What the programming thread says of counting connections.
#[derive(Debug, Default)]
struct Counting {
    /// Whether the tables have counters.
    on: bool,
    /// What changed since the last reading.
    served: BTreeMap<NamespacedName, Vec<Served>>,
}

/// How long requests that have begun may take when the program stops.
const DRAIN: Duration = Duration::from_secs(1);

/// How long reading the kernel's counters may take: twice 65,535 of them need a third of it.
const READ_FOR: Duration = Duration::from_secs(2);

impl Status {
    /// Nothing has happened yet. `families` are those the host has.
    #[must_use]
    pub fn new(families: Vec<Family>, sync_period: Duration) -> Self {
        Self {
            metrics: Metrics::default(),
            recent: Recent::new(Timestamp::now()),
            families,
            patience: health::patience(sync_period),
            started: Instant::now(),
            waiting_since: AtomicU64::new(0),
            committed: AtomicI64::new(0),
            eligible: AtomicBool::new(false),
            stopping: watch::Sender::new(false),
            // There is no set of counters yet, or it is about to be removed.
            connections: Mutex::new(Connections::new(Some(&Counters::default()))),
            counting: Mutex::default(),
        }
    }

    /// Connections are counted from the start on. To be said before the first commit: what was counted
    /// by then was told by another run.
    pub fn count_from_here(&self) {
        let before = read_counters();
        if let Err(error) = &before {
            debug!(%error, "the counters cannot be read");
        }
        let before = before.ok().filter(|counters| counters.complete);
        let connections = Connections::new(before.as_ref());
        *held(&self.connections) = connections;
    }

    /// Reads how many connections there were, if they are counted.
    pub fn look_at_connections(&self) {
        let mut connections = held(&self.connections);
        if !held(&self.counting).on {
            return;
        }
        let found = read_counters();
        // Behind the reading: what began meanwhile is known then, and what ended still is.
        let served = std::mem::take(&mut held(&self.counting).served);
        for (service, served) in served {
            connections.serve(&service, served);
        }
        match found {
            Ok(found) => {
                let reading = connections.read(&found);
                self.metrics.connections.read(&reading, &found);
            }
            Err(error) => {
                self.metrics.connections.failed();
                debug!(%error, "the counters cannot be read");
            }
        }
    }

    /// Becomes true when the program stops.
    #[must_use]
    pub fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// Has servers take no more connections, and waits until what has begun is answered. The answers are
    /// those of any other time: the tables stay in force, so that a node whose proxy stops is as fit as
    /// before; that it is to leave is what its Node object says.
    pub async fn drain(&self) {
        self.stopping.send_replace(true);
        // Clients that keep others waiting may be cut off.
        drop(tokio::time::timeout(DRAIN, self.stopping.closed()).await);
    }

    /// The families the host has.
    #[must_use]
    pub fn families(&self) -> &[Family] {
        &self.families
    }

    /// Both families are one transaction, and so as far as each other.
    fn progress(&self) -> Progress {
        let waiting = self
            .waiting_since
            .load(Ordering::Relaxed)
            .checked_sub(1)
            .map(|since| self.started.elapsed().saturating_sub(Duration::from_millis(since)));
        let committed = match self.committed.load(Ordering::Relaxed) {
            0 => None,
            at => Timestamp::from_microsecond(at).ok(),
        };
        Progress { waiting, committed }
    }

    /// Something is not in force that should be, since then or longer.
    fn waits_since(&self, then: Instant) {
        let since = then.saturating_duration_since(self.started).as_millis();
        let since = u64::try_from(since).unwrap_or(u64::MAX - 1) + 1;
        // Only one thread writes.
        if self.waiting_since.load(Ordering::Relaxed) == 0 {
            self.waiting_since.store(since, Ordering::Relaxed);
        }
    }

    /// Whether programming keeps up.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.progress().is_healthy(self.patience)
    }

    /// When the last commit was.
    #[must_use]
    pub fn last_commit(&self) -> Option<Timestamp> {
        self.progress().committed
    }

    /// Whether load balancers may send new traffic to the node.
    #[must_use]
    pub fn is_eligible(&self) -> bool {
        self.eligible.load(Ordering::Relaxed)
    }

    /// The answer of `/healthz`.
    #[must_use]
    pub fn healthz(&self) -> Answer {
        let eligible = self.eligible.load(Ordering::Relaxed);
        self.answer(Some(eligible), &self.metrics.kube_proxy.healthz)
    }

    /// The answer of `/livez`.
    #[must_use]
    pub fn livez(&self) -> Answer {
        self.answer(None, &self.metrics.kube_proxy.livez)
    }

    fn answer(&self, eligible: Option<bool>, codes: &[prometheus::IntCounter; 2]) -> Answer {
        let progress = self.progress();
        let families: Vec<_> = self.families.iter().map(|family| (*family, progress)).collect();
        let answer = health::answer(&families, self.patience, eligible, Timestamp::now());
        codes[usize::from(!answer.good)].inc();
        answer
    }

    /// The answer on a Service's health-check node port.
    #[must_use]
    pub fn service(&self, service: &NamespacedName, endpoints: usize) -> Answer {
        let healthy = self.progress().is_healthy(self.patience);
        health::service_answer(service, endpoints, healthy)
    }

    /// Flows of a family were searched for stale ones.
    pub fn swept(&self, pass: Pass) {
        let Metrics { kube_proxy, own, .. } = &self.metrics;
        kube_proxy.conntrack.of(pass.family).observe(pass.took.as_secs_f64());
        kube_proxy.conntrack_deleted.of(pass.family).inc_by(pass.deleted);
        own.flows_listed.inc_by(pass.listed);
        if pass.complete {
            own.sweeps.inc();
        } else {
            own.sweep_failures.inc();
        }
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_counters() -> Result<Counters, LoadError> {
    let open = |error: OpenError| LoadError::Socket { step: error.step, source: error.source };
    ReadCounters::open().map_err(open)?.read(READ_FOR)
}

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
