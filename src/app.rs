//! The running daemon: a source of events and the thread that programs the kernel, from start to stop.
//!
//! Sources run on the tokio runtime and send events through a bounded channel to
//! [`crate::program`], which has a thread of its own and blocks in `sendmsg` without holding up a
//! watch.

use tokio::sync::mpsc::{Sender, WeakSender, channel};
use tracing::{info, warn};

use crate::config::{Config, Source};
use crate::conntrack::Sweeper;
use crate::host;
use crate::model::Event;
use crate::nft::netlink::{NetlinkKernel, OpenError};
use crate::program::{Pacing, Program};
use crate::reconcile::Proxy;
use crate::state::State;
use crate::watch::api::{self, ClientError};
use crate::watch::manifests::{ManifestError, Manifests};

/// Events on their way; a source that is faster than the state waits.
const QUEUE: usize = 4096;

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
    let owning = config.table_owner;
    let thread = std::thread::Builder::new().name("program".into()).spawn(move || {
        match open(owning) {
            Err(error) => drop(opened.send(Err(error))),
            Ok((kernel, sweeper)) => {
                drop(opened.send(Ok(())));
                Program::new(Proxy::new(state, kernel), sweeper, pacing).run(events);
            }
        }
        drop(ended);
    });
    let thread = thread.map_err(|source| RunError::System { step: "start a thread", source })?;
    open_outcome.await.map_err(|_| RunError::Ended)??;

    info!(node = config.node_name, source = %config.source, "starting");
    if config.settings.localhost_node_ports
        && let Err(error) = host::route_loopback()
    {
        warn!(%error, "node ports are not served on 127.0.0.1");
    }
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
fn open(owning: bool) -> Result<(NetlinkKernel, Sweeper), RunError> {
    let kernel = if owning { NetlinkKernel::open_owning()? } else { NetlinkKernel::open()? };
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
