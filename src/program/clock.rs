//! When to commit.
//!
//! - Nothing is committed before every kind was listed once.
//! - A change is committed at once while commits are cheap, and later the more they cost, so that
//!   programming never takes more than a fixed share of one core for long, whatever the size.
//! - After a failure it is tried again with growing pauses, up to `syncPeriod`. A single object that
//!   the kernel refuses is tried again as well, with longer pauses.
//!
//! It is apart from the thread's inputs, so that it can be tried on a kernel in memory, in time that a
//! test makes pass.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use crate::config::Live;
use crate::model::Kind;
use crate::nft::kernel::Kernel;
use crate::reconcile::{CommitError, Committed, Proxy};
use crate::status::Reporter;

/// A commit has to be paid for by a pause of this many times the processor time that it took.
const PAUSE: u32 = 5;

/// So much may be owed: a commit that costs less is followed by the next at once.
const CREDIT: Duration = Duration::from_millis(5);

/// More is not owed for one commit; the first of a big cluster is not to hold up the second.
const MOST: Duration = Duration::from_millis(100);

/// Shared chains nobody uses are removed when nothing was committed for so long.
const COLLECT_AFTER: Duration = Duration::from_secs(2);

/// How long start-up waits before it says what for, and how often it says so again.
const WAITING: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];

/// How long the first commit waits for the ranges of the Node's pods, as in kube-proxy.
const POD_CIDR_PATIENCE: Duration = Duration::from_secs(300);

/// First pause after a failed commit; doubled up to `syncPeriod`.
const FIRST_RETRY: Duration = Duration::from_millis(100);

/// First pause before what the kernel refuses of single objects is tried again; doubled up to
/// [`SYNC_PERIODS`] times `syncPeriod`, since everything is read back for it.
const FIRST_AGAIN: Duration = Duration::from_secs(1);

/// See [`FIRST_AGAIN`].
const SYNC_PERIODS: u32 = 10;

/// Such a pause is at least this many times what the last commit took.
const SHARE_OF_AGAIN: u32 = 50;

/// When to commit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pacing {
    /// Least time between the end of a commit and the next.
    min_sync_period: Duration,
    /// Longest time between a failed commit and the next.
    sync_period: Duration,
}

impl From<&Live> for Pacing {
    fn from(live: &Live) -> Self {
        Self { min_sync_period: live.min_sync_period, sync_period: live.sync_period }
    }
}

/// The processor time that commits took and pauses have not paid for yet. Not the time that passed:
/// on a busy machine that is mostly the work of others, who are not helped by waiting longer.
#[derive(Debug)]
struct Debt {
    owed: Duration,
    at: Instant,
}

impl Debt {
    fn owe(&mut self, cost: Duration, now: Instant) {
        let paid = (now - self.at) / PAUSE;
        self.owed = (self.owed.saturating_sub(paid) + cost).min(CREDIT + MOST);
        self.at = now;
    }

    /// When there is credit again.
    fn due(&self) -> Instant {
        self.at + self.owed.saturating_sub(CREDIT) * PAUSE
    }
}

/// What this thread has used of a processor, in the kernel, too.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// What was done when, and so what is due.
pub(super) struct Clock {
    pub(super) pacing: Pacing,
    pub(super) started: Instant,
    debt: Debt,
    /// No commit before this.
    next: Instant,
    /// The pause after the next failure.
    retry: Duration,
    last_commit: Instant,
    last_took: Duration,
    /// When to take up again what the kernel refused.
    again: Option<Instant>,
    /// The pause after the next such refusal.
    again_pause: Duration,
    pub(super) synced: bool,
    /// When to say what start-up waits for.
    say_waiting: Instant,
}

impl Clock {
    pub(super) fn new(pacing: Pacing) -> Self {
        let now = Instant::now();
        Self {
            pacing,
            started: now,
            debt: Debt { owed: Duration::ZERO, at: now },
            next: now,
            retry: FIRST_RETRY,
            last_commit: now,
            last_took: Duration::ZERO,
            again: None,
            again_pause: FIRST_AGAIN,
            synced: false,
            say_waiting: now + WAITING[0],
        }
    }

    /// What the first commit waits for.
    fn waits_for<K: Kernel>(&self, proxy: &Proxy<K>) -> Option<String> {
        let missing = proxy.state().missing();
        if !missing.is_empty() {
            Some(format!("the first complete list of {missing:?}"))
        } else if !self.synced
            && proxy.state().lacks_pod_cidrs()
            && Instant::now() < self.started + POD_CIDR_PATIENCE
        {
            Some(
                "the Node's spec.podCIDRs, by which detectLocalMode: NodeCIDR tells its pods"
                    .into(),
            )
        } else {
            None
        }
    }

    /// When something has to be done, if no event comes first.
    pub(super) fn deadline<K: Kernel>(&self, proxy: &Proxy<K>) -> Option<Instant> {
        if self.waits_for(proxy).is_some() {
            return Some(self.say_waiting);
        }
        if proxy.is_stale() {
            return Some(self.next);
        }
        let collect = proxy.has_idle().then(|| self.last_commit + COLLECT_AFTER);
        collect.into_iter().chain(self.again).min()
    }

    /// Does what is due.
    pub(super) fn act<K: Kernel>(&mut self, proxy: &mut Proxy<K>, reporter: &mut Reporter) {
        let now = Instant::now();
        if self.again.is_some_and(|again| now >= again) {
            self.again = None;
            proxy.retry_set_aside();
        }
        if let Some(what) = self.waits_for(proxy) {
            proxy.prepare();
            if now >= self.say_waiting {
                self.say_waiting = now + WAITING[1];
                info!("waiting for {what}; nothing is programmed yet");
            }
        } else if proxy.is_stale() {
            if now >= self.next {
                if !self.synced && proxy.state().lacks_pod_cidrs() {
                    error!(
                        "the Node has no spec.podCIDRs after {POD_CIDR_PATIENCE:?}: Services are \
                         served, but until it has some, what comes from outside of the cluster to a \
                         ClusterIP is not masqueraded"
                    );
                }
                if !self.synced && !proxy.state().has_node() {
                    let node = &proxy.state().node_facts().name;
                    info!(
                        %node,
                        "there is no Node object of this name: its addresses are the host's, and it is in \
                         no zone; --hostname-override gives another name"
                    );
                }
                let before = processor_time();
                let outcome = proxy.commit();
                self.debt.owe(processor_time().saturating_sub(before), Instant::now());
                reporter.committed(proxy, now.elapsed(), &outcome);
                self.committed(now, outcome, proxy.state().count(Kind::Service));
            }
        } else if proxy.has_idle() && now >= self.last_commit + COLLECT_AFTER {
            self.last_commit = now;
            let outcome = proxy.collect_idle();
            reporter.collected(proxy, now.elapsed(), &outcome);
            match outcome {
                Ok(Committed { operations, .. }) => debug!(operations, "removed what stood idle"),
                Err(error) => debug!(%error, "idle chains stay for now"),
            }
        }
        self.plan_again(proxy);
    }

    /// Plans when to take up again what the kernel refuses.
    fn plan_again<K: Kernel>(&mut self, proxy: &Proxy<K>) {
        if !proxy.has_refused() {
            self.again = None;
            self.again_pause = FIRST_AGAIN;
        } else if self.again.is_none() && proxy.set_aside_count() > 0 {
            let pause = self.again_pause.max(self.last_took * SHARE_OF_AGAIN);
            self.again = Some(Instant::now() + pause);
            self.again_pause = (self.again_pause * 2).min(self.pacing.sync_period * SYNC_PERIODS);
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
        self.last_took = took;
        match outcome {
            Ok(done) => {
                self.next = self.debt.due().max(now + self.pacing.min_sync_period);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{Event, Family, NamespacedName, NodeFacts, Protocol, Service, ServicePort};
    use crate::nft::dataplane::Options;
    use crate::nft::element::Key;
    use crate::nft::fake::FakeKernel;
    use crate::nft::kernel::{Applied, ApplyError, LoadError, Loaded, Refusal};
    use crate::nft::transaction::{Op, Transaction};
    use crate::settings::Settings;
    use crate::state::State;
    use crate::status::Status;

    /// Refuses one ClusterIP as long as it is told to.
    struct Refusing {
        kernel: FakeKernel,
        refuses: bool,
        tried: Vec<Instant>,
    }

    impl Kernel for Refusing {
        fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
            self.kernel.load(options)
        }

        fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
            let refused = |op: &Op| matches!(op, Op::AddElement(id, _) if id.key == Key::Address([10, 96, 0, 10].into()));
            match transaction.ops.iter().position(refused) {
                Some(op) if self.refuses => {
                    self.tried.push(Instant::now());
                    let refusal = Refusal { op: Some(op), errno: libc::ENFILE, message: None };
                    Err(ApplyError::Refused { refusals: vec![refusal] })
                }
                _ => self.kernel.apply(transaction),
            }
        }

        fn apply_to_stand_in(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
            self.kernel.apply_to_stand_in(transaction)
        }

        fn let_packets_pass(&mut self) {}
    }

    fn web() -> Event {
        let port =
            ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None };
        let name = NamespacedName::new("default", "web");
        Event::Service(Service::new(name, vec![[10, 96, 0, 10].into()], vec![port]))
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_kernel_refuses_is_tried_again_ever_more_rarely_until_it_is_accepted() {
        let kernel = Refusing { kernel: FakeKernel::default(), refuses: true, tried: Vec::new() };
        let state = State::new(Settings::default(), NodeFacts::default());
        let mut proxy = Proxy::new(state, kernel);
        for kind in Kind::ALL {
            proxy.observe(Event::Listed(kind));
        }
        proxy.observe(web());
        let pacing =
            Pacing { min_sync_period: Duration::ZERO, sync_period: Duration::from_secs(30) };
        let mut clock = Clock::new(pacing);
        let status = Status::new(vec![Family::V4], pacing.sync_period);
        let (mut reporter, _changes) = Reporter::new(Arc::new(status));
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(1500) {
            clock.act(&mut proxy, &mut reporter);
            tokio::time::sleep_until(clock.deadline(&proxy).expect("it is tried again")).await;
        }
        let mut pauses: Vec<_> =
            proxy.kernel_mut().tried.windows(2).map(|t| (t[1] - t[0]).as_secs()).collect();
        // What is refused is tried once more over what is read back.
        pauses.retain(|pause| *pause > 0);
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        assert_eq!(proxy.set_aside_count(), 1);

        proxy.kernel_mut().refuses = false;
        clock.act(&mut proxy, &mut reporter);
        assert_eq!((proxy.set_aside_count(), proxy.has_refused()), (0, false));
        assert!(proxy.plan().unwrap().is_empty(), "everything is programmed");
        assert_eq!(clock.deadline(&proxy), None, "nothing is left to do");
    }

    #[test]
    fn cheap_commits_follow_each_other_and_dear_ones_take_a_fixed_share() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let mut debt = Debt { owed: Duration::ZERO, at: start };
        // A few cheap ones in a row.
        for _ in 0..5 {
            debt.owe(ms(1), start);
            assert_eq!(debt.due(), start);
        }
        // Then the share counts: a sixth in the long run, with the commits' own time.
        let (mut now, mut spent) = (start, ms(5));
        while now < start + ms(10_000) {
            now = debt.due().max(now) + ms(8);
            debt.owe(ms(8), now);
            spent += ms(8);
        }
        let share = spent.as_secs_f64() / (now - start).as_secs_f64();
        assert!((0.15..0.21).contains(&share), "{share}");
        // After a while nothing is owed any more.
        now += ms(1000);
        debt.owe(ms(1), now);
        assert_eq!(debt.due(), now);
        // One that is very dear does not stop everything for long.
        debt.owe(Duration::from_secs(10), now);
        assert_eq!(debt.due(), now + MOST * PAUSE);
    }
}
