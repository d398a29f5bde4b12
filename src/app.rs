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

use std::time::Duration;

use tokio::sync::mpsc::{Receiver, Sender, WeakSender, channel, error::TryRecvError};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use crate::config::{Config, Source};
use crate::conntrack::Sweeper;
use crate::host;
use crate::model::Event;
use crate::nft::kernel::Kernel;
use crate::nft::netlink::{NetlinkKernel, OpenError};
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

/// How often start-up says what it waits for.
const WAITING: Duration = Duration::from_secs(10);

/// First pause after a failed commit; doubled up to `syncPeriod`.
const FIRST_RETRY: Duration = Duration::from_millis(100);

/// The daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The kernel cannot be reached.
    #[error(transparent)]
    Kernel(#[from] OpenError),
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
pub async fn run(config: Config) -> Result<(), RunError> {
    let (sender, events) = channel(QUEUE);
    let (opened, open_outcome) = tokio::sync::oneshot::channel();
    let (ended, mut end) = tokio::sync::oneshot::channel::<()>();
    let state = State::new(config.settings.clone(), host::node_facts(&config.node_name));
    let pacing =
        Pacing { min_sync_period: config.min_sync_period, sync_period: config.sync_period };
    let thread = std::thread::Builder::new().name("program".into()).spawn(move || {
        match open() {
            Err(error) => drop(opened.send(Err(error))),
            Ok((kernel, sweeper)) => {
                drop(opened.send(Ok(())));
                program(Proxy::new(state, kernel), &sweeper, events, pacing);
            }
        }
        drop(ended);
    });
    let thread = thread.map_err(|source| RunError::System { step: "start a thread", source })?;
    open_outcome.await.map_err(|_| RunError::Ended)??;

    info!(node = config.node_name, source = %config.source, "starting");
    follow_host(sender.downgrade())?;
    tokio::select! {
        signal = stopped() => info!(signal = signal?, "stopping; the tables stay in force"),
        // Sources end with an error only, and only before they are under way.
        outcome = watch(config.source, config.node_name, sender) => outcome?,
        _ = &mut end => return Err(RunError::Ended),
    }
    // With the source, the sender is gone: the thread ends behind its last commit.
    thread.join().map_err(|_| RunError::Ended)
}

/// What the programming thread works with; both stay in the network namespace they are opened in.
fn open() -> Result<(NetlinkKernel, Sweeper), RunError> {
    let kernel = NetlinkKernel::open()?;
    let start = |source| RunError::System { step: "start a thread", source };
    Ok((kernel, Sweeper::start().map_err(start)?))
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
pub struct Pacing {
    /// Least time between the end of a commit and the next.
    pub min_sync_period: Duration,
    /// Longest time between a failed commit and the next.
    pub sync_period: Duration,
}

/// Takes in events and commits, until the sender is gone.
fn program<K: Kernel>(
    mut proxy: Proxy<K>,
    sweeper: &Sweeper,
    mut events: Receiver<Event>,
    pacing: Pacing,
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
        let mut clock = Clock::new(pacing);
        let mut open = true;
        while open {
            match clock.deadline(&proxy) {
                None => match events.recv().await {
                    Some(event) => proxy.observe(event),
                    None => open = false,
                },
                Some(deadline) => match tokio::time::timeout_at(deadline, events.recv()).await {
                    Ok(Some(event)) => proxy.observe(event),
                    Ok(None) => open = false,
                    Err(_) => {}
                },
            }
            open &= take_queued(&mut proxy, &mut events);
            clock.act(&mut proxy);
            if let Some(sweep) = proxy.take_sweep() {
                sweeper.sweep(sweep);
            }
        }
    });
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
    fn act<K: Kernel>(&mut self, proxy: &mut Proxy<K>) {
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
