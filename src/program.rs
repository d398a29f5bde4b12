//! The thread that programs the kernel: it takes in events and decides *when* to commit.
//!
//! State, ledger and netlink socket live here and nowhere else.
//! - Nothing is committed before every kind was listed once.
//! - A change is committed at once while commits are cheap, and later the more they cost, so that
//!   programming never takes more than a fixed share of one core for long, whatever the size.
//! - After a failure it is tried again with growing pauses, up to `syncPeriod`. A single object that
//!   the kernel refuses is tried again as well, with longer pauses.
//! - What others do to the tables is put right ([`crate::drift`]).
//! - A changed configuration is taken over between two commits.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc::{Receiver, error::TryRecvError};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use crate::config::Live;
use crate::conntrack::Sweeper;
use crate::drift::{self, Repairs};
use crate::host::Sysctl;
use crate::inspect::{Request, Snapshot};
use crate::model::{Event, Family, Kind};
use crate::nft::dataplane::{LOOPBACK_GUARD, Loopback};
use crate::nft::kernel::Kernel;
use crate::nft::netlink::{Intrusion, NetlinkKernel};
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
struct Pacing {
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

/// The state of the thread.
pub struct Program {
    proxy: Proxy<NetlinkKernel>,
    sweeper: Sweeper,
    clock: Clock,
    live: watch::Receiver<Live>,
    /// From the first commit on: that one would only fill it.
    intrusions: Option<Receiver<Intrusion>>,
    repairs: Repairs,
    after_sync: Option<Box<dyn FnOnce() + Send>>,
    /// What the tables and the host have for loopback addresses.
    loopback: Loopback,
    /// Whether the kernel is to route them, which it may behind the commit that keeps others from them.
    routing_due: bool,
    reporter: Reporter,
    /// From those who want to look into it.
    requests: Option<Receiver<Request>>,
}

/// What there is to do next.
enum Input {
    Event(Event),
    Intrusion(Intrusion),
    /// The configuration changed.
    Live,
    /// Somebody wants to know what is known.
    Request(Request),
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
        mut live: watch::Receiver<Live>,
        reporter: Reporter,
    ) -> Self {
        let wanted = live.borrow_and_update().clone();
        let clock = Clock::new(Pacing::from(&wanted));
        let repairs = Repairs::new(clock.started);
        let mut this = Self {
            proxy,
            sweeper,
            clock,
            live,
            intrusions: None,
            repairs,
            after_sync: None,
            loopback: Loopback::Untouched,
            routing_due: false,
            reporter,
            requests: None,
        };
        this.loopback = this.loopback_of_former_run();
        this.configure(&wanted);
        this
    }

    /// What the tables that are in force have for loopback addresses.
    fn loopback_of_former_run(&mut self) -> Loopback {
        match self.proxy.kernel_mut().has_rule(Family::V4, LOOPBACK_GUARD) {
            Ok(true) => Loopback::Guarded,
            Ok(false) => Loopback::Untouched,
            Err(error) => {
                warn!(%error, "cannot tell whether loopback addresses are guarded");
                Loopback::Untouched
            }
        }
    }

    /// Takes over a configuration.
    fn configure(&mut self, live: &Live) {
        self.clock.pacing = Pacing::from(live);
        let mut settings = live.settings.clone();
        let routed = Sysctl::default().routes_loopback();
        settings.loopback = settings.loopback.after(self.loopback, routed);
        if settings.loopback == Loopback::Guarded {
            // Somebody else may rely on it by now.
            warn!(
                "node ports are no longer served on 127.0.0.1, but net.ipv4.conf.all.route_localnet is \
                 still 1: others are kept from loopback addresses until it is 0"
            );
        }
        self.loopback = settings.loopback;
        self.routing_due = self.loopback == Loopback::NodePorts;
        self.proxy.configure(settings);
    }

    /// Has something done once, when the tables are in force.
    #[must_use]
    pub fn after_sync(mut self, then: impl FnOnce() + Send + 'static) -> Self {
        self.after_sync = Some(Box::new(then));
        self
    }

    /// Answers those who want to look into it.
    #[must_use]
    pub fn answering(mut self, requests: Receiver<Request>) -> Self {
        self.requests = Some(requests);
        self
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
                    Input::Live => {
                        let live = self.live.borrow_and_update().clone();
                        self.configure(&live);
                    }
                    // Whoever asked may have gone.
                    Input::Request(request) => {
                        drop(request.send(Snapshot::of(&self.proxy)));
                        debug!(took = ?came.elapsed(), "told what is known");
                    }
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
        let request = async {
            let next = match &mut self.requests {
                Some(requests) => requests.recv().await,
                None => None,
            };
            match next {
                Some(request) => request,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = events.recv() => event.map_or(Input::Closed, Input::Event),
            intrusion = intrusion => Input::Intrusion(intrusion),
            // Without a file there is no sender, and this never comes.
            Ok(()) = self.live.changed() => Input::Live,
            request = request => Input::Request(request),
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
            let intrusion = self.repairs.waiting().cloned().unwrap_or_default();
            let outcome = self.proxy.repair();
            self.reporter.repaired(&mut self.proxy, intrusion, began.elapsed(), &outcome);
            self.repairs.done(began, Instant::now(), &outcome);
        }
        self.clock.act(&mut self.proxy, &mut self.reporter);
        if let Some(sweep) = self.proxy.take_sweep() {
            self.sweeper.sweep(sweep);
        }
        if self.clock.synced && self.intrusions.is_none() {
            self.watch_others();
        }
        if self.routing_due && self.clock.synced && !self.proxy.is_stale() {
            self.routing_due = false;
            if let Err(error) = Sysctl::default().route_loopback() {
                warn!(%error, "node ports are not served on 127.0.0.1");
            }
        }
        if self.clock.synced
            && let Some(then) = self.after_sync.take()
        {
            then();
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
struct Clock {
    pacing: Pacing,
    started: Instant,
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
    synced: bool,
    /// When to say what start-up waits for.
    say_waiting: Instant,
}

impl Clock {
    fn new(pacing: Pacing) -> Self {
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
    fn deadline<K: Kernel>(&self, proxy: &Proxy<K>) -> Option<Instant> {
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
    fn act<K: Kernel>(&mut self, proxy: &mut Proxy<K>, reporter: &mut Reporter) {
        let now = Instant::now();
        if self.again.is_some_and(|again| now >= again) {
            self.again = None;
            proxy.retry_set_aside();
        }
        if let Some(what) = self.waits_for(proxy) {
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
            if let Err(error) = outcome {
                debug!(%error, "idle chains stay for now");
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
    use crate::model::{NamespacedName, NodeFacts, Protocol, Scheduler, Service, ServicePort};
    use crate::model::{SessionAffinity, TrafficPolicy};
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
    }

    fn web() -> Event {
        Event::Service(Service {
            name: NamespacedName::new("default", "web"),
            created: 0,
            cluster_ips: vec![[10, 96, 0, 10].into()],
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            ports: vec![ServicePort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: None,
            }],
            internal_traffic_policy: TrafficPolicy::Cluster,
            external_traffic_policy: TrafficPolicy::Cluster,
            session_affinity: SessionAffinity::None,
            source_ranges: Vec::new(),
            scheduler: Scheduler::Random,
            health_check_node_port: None,
        })
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
