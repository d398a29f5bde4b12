//! The running daemon: a source, a thread that programs the kernel, and the time between commits.
//!
//! Sources run on the tokio runtime and send events through a bounded channel. State, ledger and
//! netlink socket live on one thread of their own, which blocks in `sendmsg` without holding up a
//! watch, and which is the only place that decides *when* to commit:
//!
//! - nothing before every kind was listed once;
//! - the first change at once, and the next no sooner than a few times what the last commit took, so
//!   that programming never takes more than a fixed share of one core, whatever the size;
//! - after a failure with growing pauses, up to `syncPeriod`.
//!
//! A changed configuration comes by a channel of its own, of which only the last value counts.

use std::time::Duration;

use tokio::sync::mpsc::{Receiver, Sender, WeakSender, channel, error::TryRecvError};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use crate::config::{self, Flags, Live, Loaded, Source};
use crate::conntrack::Sweeper;
use crate::host::{self, PrivilegeError};
use crate::model::Event;
use crate::nft::kernel::Kernel;
use crate::nft::netlink::{FEATURES, NetlinkKernel, OpenError};
use crate::reconcile::{CommitError, Committed, Proxy};
use crate::state::State;
use crate::watch::api::{self, ClientError};
use crate::watch::manifests::{ManifestError, Manifests};

/// Events on their way; a source that is faster than the state waits.
const QUEUE: usize = 4096;

/// A commit is followed by a pause of this many times what it took.
const PAUSE: u32 = 5;

/// Shared chains nobody uses are removed when nothing was committed for so long.
const COLLECT_AFTER: Duration = Duration::from_secs(2);

/// How long start-up waits before it says what for, and how often it says so again.
const WAITING: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];

/// How long the first commit waits for the ranges of the Node's pods, as in kube-proxy.
const POD_CIDR_PATIENCE: Duration = Duration::from_secs(300);

/// First pause after a failed commit; doubled up to `syncPeriod`.
const FIRST_RETRY: Duration = Duration::from_millis(100);

/// The daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The process may not do what it is for.
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    /// The kernel cannot be reached.
    #[error(transparent)]
    Kernel(#[from] OpenError),
    /// The kernel cannot hold the tables; what it lacks was said.
    #[error("this kernel cannot hold the tables: {0} features are missing")]
    Features(usize),
    /// The host refuses what it was to be prepared with.
    #[error("{0}")]
    Host(String),
    /// The API server's address or credentials cannot be read.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The manifests cannot be read.
    #[error(transparent)]
    Manifests(#[from] ManifestError),
    /// A thread cannot be started, or a signal not be caught.
    #[error("cannot {step}: {source}")]
    System {
        /// What was being done.
        step: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The programming thread is gone.
    #[error("the thread that programs the kernel ended unexpectedly")]
    Ended,
}

/// Runs until SIGTERM or SIGINT. The tables stay in force afterwards.
pub async fn run(flags: Flags, loaded: Loaded) -> Result<(), RunError> {
    host::check_privileges()?;
    let config = loaded.config.clone();
    let (sender, events) = channel(QUEUE);
    let (live_sender, live) = watch::channel(config.live.clone());
    let (opened, open_outcome) = tokio::sync::oneshot::channel();
    let (ended, mut end) = tokio::sync::oneshot::channel::<()>();
    let state = State::new(config.live.settings.clone(), host::node_facts(&config.node_name));
    let thread = std::thread::Builder::new().name("program".into()).spawn(move || {
        match open() {
            Err(error) => drop(opened.send(Err(error))),
            Ok((kernel, sweeper)) => {
                drop(opened.send(Ok(())));
                program(Proxy::new(state, kernel), &sweeper, events, live);
            }
        }
        drop(ended);
    });
    let thread = thread.map_err(|source| RunError::System { step: "start a thread", source })?;
    open_outcome.await.map_err(|_| RunError::Ended)??;
    if let Err(refused) = prepare_host(&config.live) {
        warn!("{refused}; the host keeps what it has (once with all privileges: --init-only)");
    }

    info!(node = config.node_name, source = %config.source, "starting");
    follow_host(sender.downgrade())?;
    follow_config(flags, loaded, live_sender)?;
    tokio::select! {
        signal = stopped() => info!(signal = signal?, "stopping; the tables stay in force"),
        // Sources end with an error only, and only before they are under way.
        outcome = watch(config.source, config.node_name, sender) => outcome?,
        _ = &mut end => return Err(RunError::Ended),
    }
    // With the source, the sender is gone: the thread ends behind its last commit.
    thread.join().map_err(|_| RunError::Ended)
}

/// What needs all privileges, and nothing else: `--init-only`.
pub fn prepare(live: &Live) -> Result<(), RunError> {
    host::check_privileges()?;
    open_kernel()?;
    prepare_host(live).map_err(RunError::Host)?;
    info!("the host is prepared; no Service was programmed");
    Ok(())
}

/// Sets what the host is to have. What it refuses is in the error; everything else is done. Behind the
/// probe, with which the kernel has loaded connection tracking.
fn prepare_host(live: &Live) -> Result<(), String> {
    let sysctl = host::Sysctl::default();
    if let Err(error) = sysctl.set_oom_score_adj(live.oom_score_adj) {
        debug!(%error, "the kernel may end this process like any other when memory runs out");
    }
    let refused = live.conntrack.apply(&sysctl);
    if refused.is_empty() { Ok(()) } else { Err(host::describe(&refused)) }
}

/// What the programming thread works with; both stay in the network namespace they are opened in.
fn open() -> Result<(NetlinkKernel, Sweeper), RunError> {
    let kernel = open_kernel()?;
    let start = |source| RunError::System { step: "start a thread", source };
    Ok((kernel, Sweeper::start().map_err(start)?))
}

/// Opens the kernel and asks it for its features.
fn open_kernel() -> Result<NetlinkKernel, RunError> {
    let mut kernel = NetlinkKernel::open()?;
    match kernel.probe(FEATURES) {
        Err(error) => warn!("{error}; going on without"),
        Ok(missing) => {
            let (needed, partial): (Vec<_>, Vec<_>) =
                missing.iter().partition(|missing| missing.only.is_none());
            for missing in partial {
                warn!("{missing}");
            }
            for missing in &needed {
                error!("{missing}");
            }
            if !needed.is_empty() {
                return Err(RunError::Features(needed.len()));
            }
        }
    }
    Ok(kernel)
}

/// Follows the configuration's file.
fn follow_config(flags: Flags, loaded: Loaded, live: watch::Sender<Live>) -> Result<(), RunError> {
    if flags.config.is_none() {
        return Ok(());
    }
    let mut conntrack = loaded.config.live.conntrack.clone();
    let thread = std::thread::Builder::new().name("config".into()).spawn(move || {
        config::follow::follow(&flags, loaded, |new| {
            if new.conntrack != conntrack {
                conntrack = new.conntrack.clone();
                if let Err(refused) = prepare_host(new) {
                    warn!("{refused}; the host keeps what it has");
                }
            }
            live.send(new.clone()).is_ok()
        });
    });
    thread.map(drop).map_err(|source| RunError::System { step: "start a thread", source })
}

/// Follows the host's addresses. Everything else works without, so that a failure is said and no more.
fn follow_host(events: WeakSender<Event>) -> Result<(), RunError> {
    let thread = std::thread::Builder::new().name("host".into()).spawn(move || {
        if let Err(error) = host::follow(&events) {
            warn!(%error, "node ports stay on the addresses that the host had at start");
        }
    });
    thread.map(drop).map_err(|source| RunError::System { step: "start a thread", source })
}

async fn stopped() -> Result<&'static str, RunError> {
    use tokio::signal::unix::{SignalKind, signal};
    let fail = |source| RunError::System { step: "wait for signals", source };
    let mut terminate = signal(SignalKind::terminate()).map_err(fail)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fail)?;
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    })
}

/// Runs a source until it is aborted.
pub async fn watch(
    source: Source,
    node_name: String,
    events: Sender<Event>,
) -> Result<(), RunError> {
    match source {
        Source::Manifests(dir) => Manifests::new(dir, node_name).run(events).await?,
        Source::Api { kubeconfig, master } => {
            let client = api::client(kubeconfig.as_deref(), master.as_deref()).await?;
            api::run(client, node_name, events).await;
        }
    }
    Ok(())
}

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

/// Takes in events and commits, until the sender is gone.
fn program<K: Kernel>(
    mut proxy: Proxy<K>,
    sweeper: &Sweeper,
    mut events: Receiver<Event>,
    mut live: watch::Receiver<Live>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            error!(%error, "cannot start the timer of the programming thread");
            return;
        }
    };
    runtime.block_on(async {
        let mut clock = Clock::new(Pacing::from(&*live.borrow_and_update()));
        let mut open = true;
        while open {
            let deadline = clock.deadline(&proxy);
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => proxy.observe(event),
                    None => open = false,
                },
                Ok(()) = live.changed() => {
                    let live = live.borrow_and_update();
                    clock.pacing = Pacing::from(&*live);
                    proxy.configure(live.settings.clone());
                }
                () = until(deadline) => {}
            }
            open &= take_queued(&mut proxy, &mut events);
            clock.act(&mut proxy);
            if let Some(sweep) = proxy.take_sweep() {
                sweeper.sweep(sweep);
            }
        }
    });
}

/// Waits for a moment, or for ever if there is none.
async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Takes in what is queued already; false if the sender is gone.
fn take_queued<K: Kernel>(proxy: &mut Proxy<K>, events: &mut Receiver<Event>) -> bool {
    loop {
        match events.try_recv() {
            Ok(event) => proxy.observe(event),
            Err(TryRecvError::Empty) => return true,
            Err(TryRecvError::Disconnected) => return false,
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
    /// When to say what start-up waits for.
    say_waiting: Instant,
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
        proxy.has_idle().then(|| self.last_commit + COLLECT_AFTER)
    }

    /// Does what is due.
    fn act<K: Kernel>(&mut self, proxy: &mut Proxy<K>) {
        let now = Instant::now();
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
                let outcome = proxy.commit();
                self.committed(now, outcome, proxy.state().service_count());
            }
        } else if proxy.has_idle() && now >= self.last_commit + COLLECT_AFTER {
            self.last_commit = now;
            if let Err(error) = proxy.collect_idle() {
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
