//! The thread that sweeps, apart from the one that commits.
//!
//! A commit leaves its sweep here and goes on. While a sweep runs, those that come are merged into
//! one, so that thousands of changes cost one more listing; and each is followed by a pause of a few
//! times what it took, so that it never takes more than a fixed share of one core, however many flows
//! there are. A failed sweep is repeated until it succeeds: a stale flow does not go by itself.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::flows::{Flows, Found, Stale, SweepError};
use super::sweep::Sweep;
use crate::model::Family;

/// A sweep is followed by a pause of this many times what it took.
const PAUSE: u32 = 5;

/// The pause after a failure, doubled up to the longest. A new sweep ends it after the first.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// Services named in one line of the log.
const NAMED: usize = 20;

/// What was done since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Sweeps that were carried out to the end.
    pub sweeps: u64,
    /// Sweeps that failed, and were or will be repeated.
    pub failures: u64,
    /// Flows the kernel listed for them.
    pub listed: u64,
    /// Flows deleted, by family in the order of [`Family::BOTH`].
    pub deleted: [u64; 2],
}

/// One listing of a family's flows, when it is over.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// The family.
    pub family: Family,
    /// How long it took, deletions included.
    pub took: Duration,
    /// Flows the kernel listed.
    pub listed: u64,
    /// Flows deleted.
    pub deleted: u64,
    /// Whether it went to the end.
    pub complete: bool,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    sweeps: AtomicU64,
    failures: AtomicU64,
    listed: AtomicU64,
    deleted: [AtomicU64; 2],
}

#[derive(Debug, Default)]
struct Waiting {
    sweep: Sweep,
    /// Something to look for came since the last sweep began.
    fresh: bool,
    running: bool,
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // What is kept under the lock is whole at every moment.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running thread that removes stale flows. Dropping it finishes what was asked for, once.
#[derive(Debug)]
pub struct Sweeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Sweeper {
    /// Starts the thread, in the network namespace of the calling one. Whether the kernel lets it
    /// list flows shows at the first sweep, in the log: a proxy without this is still one.
    pub fn start() -> io::Result<Self> {
        Self::start_reporting(|_| {})
    }

    /// The same, with somebody who is told of every pass.
    pub fn start_reporting(report: impl Fn(Pass) + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let report = Box::new(report);
        let work = Work { shared: shared.clone(), flows: None, failing: None, report };
        let thread = std::thread::Builder::new().name("conntrack".into());
        let thread = thread.spawn(move || work.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Asks for a sweep; to be called right after the commit that made it necessary. Never waits.
    pub fn sweep(&self, sweep: Sweep) {
        if sweep.is_empty() {
            return;
        }
        let mut waiting = self.shared.lock();
        waiting.fresh |= sweep.sought() > 0;
        waiting.sweep.merge(sweep);
        if !waiting.running {
            waiting.sweep.forget_amendments();
        }
        drop(waiting);
        self.shared.changed.notify_one();
    }

    /// What was done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            sweeps: read(&self.shared.sweeps),
            failures: read(&self.shared.failures),
            listed: read(&self.shared.listed),
            deleted: [read(&self.shared.deleted[0]), read(&self.shared.deleted[1])],
        }
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, its message is in the log already.
            drop(thread.join());
        }
    }
}

/// The thread's own.
struct Work {
    shared: Arc<Shared>,
    /// None before the first sweep, and after a failed one.
    flows: Option<Flows>,
    /// The next pause, while sweeps fail.
    failing: Option<Duration>,
    report: Box<dyn Fn(Pass) + Send>,
}

impl Work {
    fn run(mut self) {
        while let Some(sweep) = self.next() {
            let began = now();
            let outcome = self.carry_out(&sweep, began);
            self.ended(outcome.is_err().then_some(sweep));
            match outcome {
                Ok(()) => {
                    self.shared.sweeps.fetch_add(1, Ordering::Relaxed);
                    if self.failing.take().is_some() {
                        info!("stale UDP flows are removed again");
                    }
                    self.rest(began.elapsed() * PAUSE, Duration::ZERO);
                }
                Err(error) => {
                    self.shared.failures.fetch_add(1, Ordering::Relaxed);
                    self.flows = None;
                    let pause = self.failing.unwrap_or(FIRST_RETRY);
                    match (self.failing, error) {
                        (None, SweepError::Interrupted) | (Some(_), _) => {
                            debug!(%error, retry_in = ?pause, "stale UDP flows may remain");
                        }
                        (None, _) => {
                            warn!(%error, retry_in = ?pause, "stale UDP flows may remain");
                        }
                    }
                    self.failing = Some((pause * 2).min(LONGEST_RETRY));
                    self.rest((began.elapsed() * PAUSE).max(FIRST_RETRY), pause);
                }
            }
        }
    }

    /// Waits for work. None at the end: closed, and nothing is left that was not tried.
    fn next(&self) -> Option<Sweep> {
        let mut waiting = self.shared.lock();
        loop {
            if waiting.closed && !waiting.fresh {
                return None;
            }
            if !waiting.sweep.is_empty() {
                waiting.fresh = false;
                waiting.running = true;
                return Some(std::mem::take(&mut waiting.sweep));
            }
            waiting = self.shared.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A sweep has ended; it is given back if it has to be repeated.
    fn ended(&self, failed: Option<Sweep>) {
        let mut waiting = self.shared.lock();
        waiting.running = false;
        if let Some(failed) = failed {
            waiting.sweep.merge_earlier(failed);
        }
        waiting.sweep.forget_amendments();
    }

    /// Pauses: at least so long, and at most so long if nothing comes; not at all at the end.
    fn rest(&self, least: Duration, most: Duration) {
        let began = now();
        let mut waiting = self.shared.lock();
        loop {
            let goal = if waiting.fresh { least } else { least.max(most) };
            let left = goal.saturating_sub(began.elapsed());
            if waiting.closed || left.is_zero() {
                return;
            }
            let waited = self.shared.changed.wait_timeout(waiting, left);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn carry_out(&mut self, sweep: &Sweep, began: Instant) -> Result<(), SweepError> {
        let mut outcome = Ok(());
        let mut deleted = BTreeMap::<String, u64>::new();
        for (family, counter) in Family::BOTH.into_iter().zip(&self.shared.deleted) {
            let Some(filter) = sweep.filter(family) else { continue };
            let flows = match &mut self.flows {
                Some(flows) => flows,
                none => none.insert(Flows::open()?),
            };
            let spare = |batch: &mut Vec<Stale<'_>>| {
                // What was committed since this sweep began counts as well.
                let waiting = self.shared.lock();
                batch.retain(|(flow, culprit)| !waiting.sweep.acquits(flow, *culprit));
            };
            let (mut found, pass_began) = (Found::default(), now());
            let passed = flows.pass(sweep, &filter, &spare, &mut found);
            self.shared.listed.fetch_add(found.listed, Ordering::Relaxed);
            let removed: u64 = found.deleted.values().sum();
            counter.fetch_add(removed, Ordering::Relaxed);
            (self.report)(Pass {
                family,
                took: pass_began.elapsed(),
                listed: found.listed,
                deleted: removed,
                complete: passed.is_ok(),
            });
            for (culprit, count) in &found.deleted {
                *deleted.entry(culprit.to_string()).or_default() += count;
            }
            let (listed, other) = (found.listed, found.other);
            debug!(%family, ?filter, listed, other, "looked for stale UDP flows");
            if passed.is_err() {
                self.flows = None;
                outcome = passed;
            }
        }
        if !deleted.is_empty() {
            let flows: u64 = deleted.values().sum();
            let services = named(&deleted);
            info!(flows, %services, took = ?began.elapsed(), "removed stale UDP flows");
        }
        outcome
    }
}

/// `default/dns 12, default/log 3`
fn named(deleted: &BTreeMap<String, u64>) -> String {
    let mut text = String::new();
    for (number, (name, count)) in deleted.iter().take(NAMED).enumerate() {
        let comma = if number == 0 { "" } else { ", " };
        let _ = write!(text, "{comma}{name} {count}");
    }
    if let Some(more @ 1..) = deleted.len().checked_sub(NAMED) {
        let _ = write!(text, " and {more} more");
    }
    text
}

#[expect(clippy::disallowed_methods, reason = "pacing is the business of this thread alone")]
fn now() -> Instant {
    Instant::now()
}
