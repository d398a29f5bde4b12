//! The running daemon: a source of events and the thread that programs the kernel, from start to stop.
//!
//! Sources run on the tokio runtime and send events through a bounded channel to
//! [`crate::program`], which has a thread of its own and blocks in `sendmsg` without holding up a
//! watch. A changed configuration goes there by a channel of its own, of which only the last value
//! counts.

use std::pin::pin;
use std::sync::Arc;

use tokio::sync::mpsc::{Sender, UnboundedReceiver, WeakSender, channel};
use tokio::sync::watch;
use tracing::{debug, error, info, warn};

use crate::config::{self, Config, Flags, Live, Loaded, Source};
use crate::conntrack::Sweeper;
use crate::host::{self, ConfineError, PrivilegeError};
use crate::inspect::Inspector;
use crate::journal::Journal;
use crate::metrics::RestClient;
use crate::model::{Event, Family, Notice, Standing, Topic};
use crate::nft::netlink::{FEATURES, NetlinkKernel, OpenError};
use crate::program::Program;
use crate::reconcile::Proxy;
use crate::server::{self, About, BindError, Inside, Listen, ListenFailure};
use crate::state::State;
use crate::status::{HealthCheckChange, Reporter, Status};
use crate::takeover::{self, Purpose};
use crate::watch::api::{self, ClientError};
use crate::watch::manifests::{ManifestError, Manifests};
use crate::watch::notices::{self, Notices};

/// Events on their way; a source that is faster than the state waits.
const QUEUE: usize = 4096;

/// The daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The process may not do what it is for.
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    /// What it may do beside cannot be given up.
    #[error(transparent)]
    Confine(#[from] ConfineError),
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
    /// A port cannot be bound, and that is a reason to end.
    #[error(transparent)]
    Bind(#[from] BindError),
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

/// Does what takes more privileges than [`run`] does, and gives them up.
pub fn confine(config: &Config) -> Result<(), RunError> {
    set_oom_score_adj(&config.live);
    let iptables = takeover::needs_iptables();
    host::confine(iptables)?;
    // Nothing is lost without it but a line of defence.
    if let Err(error) = host::refuse_system_calls(iptables || starts_programs(&config.source)) {
        warn!("{error}; all system calls can be made");
    }
    Ok(())
}

/// Whether credentials come from a program.
fn starts_programs(source: &Source) -> bool {
    let Source::Api { kubeconfig: Some(kubeconfig), .. } = source else { return false };
    api::starts_programs(kubeconfig)
}

fn set_oom_score_adj(live: &Live) {
    if let Err(error) = host::Sysctl::default().set_oom_score_adj(live.oom_score_adj) {
        debug!(%error, "the kernel may end this process like any other when memory runs out");
    }
}

/// Runs until SIGTERM or SIGINT. The tables stay in force afterwards.
pub async fn run(flags: Flags, loaded: Loaded, journal: Arc<Journal>) -> Result<(), RunError> {
    host::check_privileges()?;
    let config = loaded.config.clone();
    let (sender, events) = channel(QUEUE);
    let (live_sender, live) = watch::channel(config.live.clone());
    let (opened, open_outcome) = tokio::sync::oneshot::channel();
    let (ended, mut end) = tokio::sync::oneshot::channel::<()>();
    let state = State::new(config.live.settings.clone(), host::node_facts(&config.node_name));
    let mut families = vec![Family::V4];
    families.extend(host::has_ipv6().then_some(Family::V6));
    let status = Arc::new(Status::new(families, config.live.sync_period));
    let rest_client = status.metrics.rest_client.clone();
    let notices = notices::start(&config.source, &config.node_name, &rest_client);
    if config.live.settings.counters {
        status.count_from_here();
    }
    let (reporter, health_checks) = Reporter::new(status.clone());
    let reporter = reporter.with_notices(notices.clone());
    let swept = status.clone();
    let (inspector, requests) = Inspector::new();
    let owning = config.table_owner;
    // Other Services of the node may still need it.
    let keep_theirs = config.keep_kube_proxy_rules || matches!(config.source, Source::Manifests(_));
    let thread = std::thread::Builder::new().name("program".into()).spawn(move || {
        match open(owning, swept) {
            Err(error) => drop(opened.send(Err(error))),
            Ok((kernel, sweeper)) => {
                drop(opened.send(Ok(())));
                Program::new(Proxy::new(state, kernel), sweeper, live, reporter)
                    .answering(requests)
                    .after_sync(move || take_over(keep_theirs))
                    .run(events);
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
    let mut servers =
        pin!(serve(&loaded, status.clone(), (inspector, journal), health_checks, notices.clone()));
    follow_config(flags, loaded, live_sender)?;
    tokio::select! {
        signal = stopped() => info!(signal = signal?, "stopping; the tables stay in force"),
        // Sources end with an error only, and only before they are under way.
        outcome = watch(config.source, config.node_name, sender, rest_client, notices) => outcome?,
        error = servers.as_mut() => return Err(error.into()),
        _ = &mut end => return Err(RunError::Ended),
    }
    // With the source, the sender is gone: the thread ends behind its last commit. Until then, probes are
    // answered.
    let joined = tokio::task::spawn_blocking(move || thread.join());
    joined.await.ok().and_then(Result::ok).ok_or(RunError::Ended)?;
    status.drain().await;
    Ok(())
}

/// What needs all privileges, and nothing else: `--init-only`.
pub fn prepare(live: &Live) -> Result<(), RunError> {
    host::check_privileges()?;
    open_kernel(false)?;
    prepare_host(live).map_err(RunError::Host)?;
    info!("the host is prepared; no Service was programmed");
    Ok(())
}

/// Sets what the host is to have. What it refuses is in the error; everything else is done. Behind the
/// probe, with which the kernel has loaded connection tracking.
fn prepare_host(live: &Live) -> Result<(), String> {
    set_oom_score_adj(live);
    let refused = live.conntrack.apply(&host::Sysctl::default());
    if refused.is_empty() { Ok(()) } else { Err(host::describe(&refused)) }
}

/// Serves probes and metrics; returns only if that cannot be and is a reason to end.
fn serve(
    loaded: &Loaded,
    status: Arc<Status>,
    (inspector, journal): (Inspector, Arc<Journal>),
    health_checks: UnboundedReceiver<HealthCheckChange>,
    notices: Notices,
) -> impl Future<Output = BindError> + use<> {
    let config = &loaded.config;
    let listen = Listen {
        healthz: config.healthz_bind_address,
        metrics: config.metrics_bind_address,
        hard_fail: config.bind_address_hard_fail,
    };
    let node = config.node_name.clone();
    let inside = Inside {
        configz: config::configz(loaded),
        about: About {
            node: node.clone(),
            source: config.source.to_string(),
            settings: config::given(loaded),
        },
        inspector,
        journal,
    };
    server::serve(listen, status, inside, health_checks, move |failure| {
        let ListenFailure { service, address, reason } = failure;
        let standing = reason.map_or(Standing::Over, |reason| {
            // The words of kube-proxy.
            Standing::Is(vec![format!(
                "node {node} failed to start healthcheck \"{service}\" on port {}: listen {address}: \
                 {reason}",
                address.port()
            )])
        });
        let part = address.to_string();
        notices.give(Notice { part, ..Notice::new(service, Topic::HealthCheck, standing) });
    })
}

/// What the programming thread works with; both stay in the network namespace they are opened in.
fn open(owning: bool, status: Arc<Status>) -> Result<(NetlinkKernel, Sweeper), RunError> {
    let kernel = open_kernel(owning)?;
    let start = |source| RunError::System { step: "start a thread", source };
    let sweeper = Sweeper::start_reporting(move |pass| status.swept(pass)).map_err(start)?;
    Ok((kernel, sweeper))
}

/// Removes what kube-proxy left, on a thread of its own: with many Services it takes a while. If it is
/// to be kept, it is only told.
fn take_over(keep: bool) {
    let thread = std::thread::Builder::new().name("takeover".into()).spawn(move || {
        if keep {
            takeover::report();
        } else {
            // Each failure was said.
            let _ = takeover::remove(Purpose::TakeOver);
        }
    });
    if let Err(error) = thread {
        warn!(%error, "what kube-proxy left on this node stays: cannot start a thread");
    }
}

/// Opens the kernel and asks it for its features.
fn open_kernel(owning: bool) -> Result<NetlinkKernel, RunError> {
    let mut kernel = if owning { NetlinkKernel::open_owning()? } else { NetlinkKernel::open()? };
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
    let on_host = |live: &Live| (live.conntrack.clone(), live.oom_score_adj);
    let mut prepared = on_host(&loaded.config.live);
    let thread = std::thread::Builder::new().name("config".into()).spawn(move || {
        config::follow::follow(&flags, loaded, |new| {
            if on_host(new) != prepared {
                prepared = on_host(new);
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
            warn!(%error, "node ports stay on the addresses that the host has now");
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
    metrics: RestClient,
    notices: Notices,
) -> Result<(), RunError> {
    match source {
        Source::Manifests(dir) => Manifests::new(dir, node_name).run(events).await?,
        Source::Api { kubeconfig, master } => {
            let (kubeconfig, master) = (kubeconfig.as_deref(), master.as_deref());
            let clients = api::measured_clients(kubeconfig, master, metrics).await?;
            api::run(clients, node_name, api::RENEWAL, events, notices).await;
        }
    }
    Ok(())
}
