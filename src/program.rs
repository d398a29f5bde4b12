//! The thread that programs the kernel: it takes in events and decides *when* to commit.
//!
//! State, ledger and netlink socket live here and nowhere else.
//! - Nothing is committed before every kind was listed once.
//! - The first change is committed at once, and the next no sooner than a few times what the last commit
//!   took, so that programming never takes more than a fixed share of one core, whatever the size.
//! - After a failure it is tried again with growing pauses, up to `syncPeriod`.
//! - What others do to the tables is put right ([`crate::drift`]).

use std::time::Duration;

use tokio::sync::mpsc::{Receiver, error::TryRecvError};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use crate::conntrack::Sweeper;
use crate::drift::{self, Repairs};
use crate::model::{Event, Kind};
use crate::nft::kernel::Kernel;
use crate::nft::netlink::{Intrusion, NetlinkKernel};
use crate::reconcile::{CommitError, Committed, Proxy};
use crate::status::Reporter;

/// A commit is followed by a pause of this many times what it took.
const PAUSE: u32 = 5;

/// Shared chains nobody uses are removed when nothing was committed for so long.
const COLLECT_AFTER: Duration = Duration::from_secs(2);

/// How often start-up says what it waits for.
const WAITING: Duration = Duration::from_secs(10);

/// First pause after a failed commit; doubled up to `syncPeriod`.
const FIRST_RETRY: Duration = Duration::from_millis(100);

/// When to commit.
#[derive(Clone, Copy, Debug)]
pub struct Pacing {
    /// Least time between the end of a commit and the next.
    pub min_sync_period: Duration,
    /// Longest time between a failed commit and the next.
    pub sync_period: Duration,
}

/// The state of the thread.
pub struct Program {
    proxy: Proxy<NetlinkKernel>,
    sweeper: Sweeper,
    clock: Clock,
    /// From the first commit on: that one would only fill it.
    intrusions: Option<Receiver<Intrusion>>,
    repairs: Repairs,
    reporter: Reporter,
}

/// What there is to do next.
enum Input {
    Event(Event),
    Intrusion(Intrusion),
    Due,
    /// Nobody will send any more events.
    Closed,
}

impl Program {
    /// Nothing done yet.
    #[must_use]
    pub fn new(
        proxy: Proxy<NetlinkKernel>,
        sweeper: Sweeper,
        pacing: Pacing,
        reporter: Reporter,
    ) -> Self {
        let clock = Clock::new(pacing);
        let repairs = Repairs::new(clock.started);
        Self { proxy, sweeper, clock, intrusions: None, repairs, reporter }
    }

    /// Takes in events and commits, until the sender is gone.
    pub fn run(mut self, mut events: Receiver<Event>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => {
                error!(%error, "cannot start the timer of the programming thread");
                return;
            }
        };
        runtime.block_on(async {
            let mut open = true;
            while open {
                let input = self.next(&mut events).await;
                let came = Instant::now();
                match input {
                    Input::Event(event) => self.proxy.observe(event),
                    Input::Intrusion(intrusion) => self.repairs.add(intrusion),
                    Input::Due => {}
                    Input::Closed => open = false,
                }
                open &= self.take_queued(&mut events);
                self.reporter.took_in(&mut self.proxy, came);
                self.act();
            }
        });
    }

    async fn next(&mut self, events: &mut Receiver<Event>) -> Input {
        let due = [self.clock.deadline(&self.proxy), self.repairs.due()];
        let due = due.into_iter().flatten().min();
        let timer = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        let intrusion = async {
            let next = match &mut self.intrusions {
                Some(intrusions) => intrusions.recv().await,
                None => None,
            };
            match next {
                Some(intrusion) => intrusion,
                // Said by the thread that ended.
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = events.recv() => event.map_or(Input::Closed, Input::Event),
            intrusion = intrusion => Input::Intrusion(intrusion),
            () = timer => Input::Due,
        }
    }

    /// Takes in what is queued already; false if the sender is gone.
    fn take_queued(&mut self, events: &mut Receiver<Event>) -> bool {
        loop {
            match events.try_recv() {
                Ok(event) => self.proxy.observe(event),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Does what is due.
    fn act(&mut self) {
        let began = Instant::now();
        if self.repairs.due().is_some_and(|due| began >= due) {
            let outcome = self.proxy.repair();
            self.reporter.repaired(&mut self.proxy, began.elapsed(), &outcome);
            self.repairs.done(began, Instant::now(), &outcome);
        }
        self.clock.act(&mut self.proxy, &mut self.reporter);
        if let Some(sweep) = self.proxy.take_sweep() {
            self.sweeper.sweep(sweep);
        }
        if self.clock.synced && self.intrusions.is_none() {
            self.watch_others();
        }
    }

    /// Begins to watch for changes that others make, behind the first commit. If there was one before
    /// it is watched, everything is read once more.
    fn watch_others(&mut self) {
        let kernel = self.proxy.kernel_mut();
        let before = kernel.generation().ok();
        let watching = kernel.monitor().map_err(|error| error.to_string()).and_then(|monitor| {
            drift::watch(monitor).map_err(|error| format!("cannot start a thread: {error}"))
        });
        match watching {
            Ok(intrusions) => self.intrusions = Some(intrusions),
            Err(error) => {
                error!(error, "changes that others make to our tables will not be seen");
                // Closed from the start, so that this is said once.
                self.intrusions = Some(tokio::sync::mpsc::channel(1).1);
            }
        }
        if before.is_none() || before != kernel.generation().ok() {
            self.repairs.add(Intrusion::default());
        }
    }
}

/// What was done when, and so what is due.
struct Clock {
    pacing: Pacing,
    started: Instant,
    /// No commit before this.
    next: Instant,
    /// The pause after the next failure.
    retry: Duration,
    last_commit: Instant,
    synced: bool,
    said_waiting: Instant,
}

impl Clock {
    fn new(pacing: Pacing) -> Self {
        let now = Instant::now();
        Self {
            pacing,
            started: now,
            next: now,
            retry: FIRST_RETRY,
            last_commit: now,
            synced: false,
            said_waiting: now,
        }
    }

    /// When something has to be done, if no event comes first.
    fn deadline<K: Kernel>(&self, proxy: &Proxy<K>) -> Option<Instant> {
        if !proxy.is_complete() {
            return Some(self.said_waiting + WAITING);
        }
        if proxy.is_stale() {
            return Some(self.next);
        }
        proxy.has_idle().then(|| self.last_commit + COLLECT_AFTER)
    }

    /// Does what is due.
    fn act<K: Kernel>(&mut self, proxy: &mut Proxy<K>, reporter: &mut Reporter) {
        let now = Instant::now();
        if !proxy.is_complete() {
            if now >= self.said_waiting + WAITING {
                self.said_waiting = now;
                let missing = proxy.state().missing();
                info!(?missing, "waiting for the first complete list; nothing is programmed yet");
            }
        } else if proxy.is_stale() {
            if now >= self.next {
                let outcome = proxy.commit();
                reporter.committed(proxy, now.elapsed(), &outcome);
                self.committed(now, outcome, proxy.state().count(Kind::Service));
            }
        } else if proxy.has_idle() && now >= self.last_commit + COLLECT_AFTER {
            self.last_commit = now;
            let outcome = proxy.collect_idle();
            reporter.collected(proxy, &outcome);
            if let Err(error) = outcome {
                debug!(%error, "idle chains stay for now");
            }
        }
    }

    fn committed(
        &mut self,
        began: Instant,
        outcome: Result<Committed, CommitError>,
        services: usize,
    ) {
        let now = Instant::now();
        let took = now - began;
        self.last_commit = now;
        match outcome {
            Ok(done) => {
                self.next = now + (took * PAUSE).max(self.pacing.min_sync_period);
                self.retry = FIRST_RETRY;
                let Committed { operations, applied, set_aside, .. } = done;
                let bytes = applied.bytes;
                if !self.synced {
                    self.synced = true;
                    let after = now - self.started;
                    info!(services, operations, bytes, set_aside, ?took, ?after, "synced");
                } else if done.adopted {
                    info!(services, operations, bytes, set_aside, ?took, "synced again");
                } else {
                    debug!(operations, bytes, ?took, "committed");
                }
            }
            Err(error) => {
                warn!(%error, retry_in = ?self.retry, "the kernel keeps what it had");
                self.next = now + self.retry;
                self.retry = (self.retry * 2).min(self.pacing.sync_period);
            }
        }
    }
}
