//! What the programming thread tells the rest of the program, without ever waiting for it.
//!
//! [`Status`] is shared: atomics, written by that thread and read by whoever answers a probe or a
//! scrape. [`Reporter`] is that thread's own side.

mod reporter;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::debug;

pub use self::reporter::{Addresses, HealthCheckChange, Reporter};
use crate::connections::{Connections, Served};
use crate::conntrack::Pass;
use crate::health::{self, Answer, Progress};
use crate::metrics::Metrics;
use crate::model::{Family, NamespacedName};
use crate::nft::connection::Counters;
use crate::nft::kernel::LoadError;
use crate::nft::netlink::{OpenError, ReadCounters};
use crate::recent::Recent;

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
        let found = {
            let counting = held(&self.counting);
            match (counting.on, counting.served.is_empty()) {
                (true, _) => None,
                // They are no longer counted: there is nothing, and what was told goes.
                (false, false) => Some(Counters { complete: true, ..Counters::default() }),
                (false, true) => return,
            }
        };
        let found = found.map_or_else(read_counters, Ok);
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
