//! The running daemon: a source of events and the thread that programs the kernel, from start to stop.
//!
//! Sources run on the tokio runtime and send events through a bounded channel to
//! [`crate::program`], which has a thread of its own and blocks in `sendmsg` without holding up a
//! watch.

use std::sync::Arc;

use tokio::sync::mpsc::{Sender, UnboundedReceiver, WeakSender, channel};
use tracing::{info, warn};

use crate::config::{Config, Source};
use crate::conntrack::Sweeper;
use crate::host;
use crate::metrics::RestClient;
use crate::model::{Event, Family};
use crate::nft::netlink::{NetlinkKernel, OpenError};
use crate::program::{Pacing, Program};
use crate::reconcile::Proxy;
use crate::server::{self, BindError, Listen, ListenFailure};
use crate::state::State;
use crate::status::{HealthCheckChange, Reporter, Status};
use crate::watch::api::{self, ClientError};
use crate::watch::manifests::{ManifestError, Manifests};
use crate::watch::notices::{self, Notice};

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

/// Runs until SIGTERM or SIGINT. The tables stay in force afterwards.
pub async fn run(config: Config) -> Result<(), RunError> {
    let (sender, events) = channel(QUEUE);
    let (opened, open_outcome) = tokio::sync::oneshot::channel();
    let (ended, mut end) = tokio::sync::oneshot::channel::<()>();
    let state = State::new(config.settings.clone(), host::node_facts(&config.node_name));
    let pacing =
        Pacing { min_sync_period: config.min_sync_period, sync_period: config.sync_period };
    let mut families = vec![Family::V4];
    families.extend(host::has_ipv6().then_some(Family::V6));
    let status = Arc::new(Status::new(families, config.sync_period));
    let (reporter, health_checks) = Reporter::new(status.clone());
    let swept = status.clone();
    let owning = config.table_owner;
    let thread = std::thread::Builder::new().name("program".into()).spawn(move || {
        match open(owning, swept) {
            Err(error) => drop(opened.send(Err(error))),
            Ok((kernel, sweeper)) => {
                drop(opened.send(Ok(())));
                Program::new(Proxy::new(state, kernel), sweeper, pacing, reporter).run(events);
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
    let rest_client = status.metrics.rest_client.clone();
    let servers = serve(&config, status, health_checks);
    tokio::select! {
        signal = stopped() => info!(signal = signal?, "stopping; the tables stay in force"),
        // Sources end with an error only, and only before they are under way.
        outcome = watch(config.source, config.node_name, sender, rest_client) => outcome?,
        error = servers => return Err(error.into()),
        _ = &mut end => return Err(RunError::Ended),
    }
    // With the source, the sender is gone: the thread ends behind its last commit.
    thread.join().map_err(|_| RunError::Ended)
}

/// Serves probes and metrics; returns only if that cannot be and is a reason to end.
fn serve(
    config: &Config,
    status: Arc<Status>,
    health_checks: UnboundedReceiver<HealthCheckChange>,
) -> impl Future<Output = BindError> + use<> {
    let listen = Listen {
        healthz: config.healthz_bind_address,
        metrics: config.metrics_bind_address,
        hard_fail: config.bind_address_hard_fail,
    };
    let node = config.node_name.clone();
    let notices = notices::start(&config.source, &config.node_name, &status.metrics.rest_client);
    server::serve(listen, status, configz(config), health_checks, move |failure| {
        let ListenFailure { service, address, reason } = failure;
        notices.give(Notice {
            // The words of kube-proxy.
            note: format!(
                "node {node} failed to start healthcheck \"{service}\" on port {}: listen \
                     {address}: {reason}",
                address.port()
            ),
            service,
            reason: "FailedToStartServiceHealthcheck",
            action: "Listen",
        });
    })
}

/// What the programming thread works with; both stay in the network namespace they are opened in.
fn open(owning: bool, status: Arc<Status>) -> Result<(NetlinkKernel, Sweeper), RunError> {
    let kernel = if owning { NetlinkKernel::open_owning()? } else { NetlinkKernel::open()? };
    let start = |source| RunError::System { step: "start a thread", source };
    let sweeper = Sweeper::start_reporting(move |pass| status.swept(pass)).map_err(start)?;
    Ok((kernel, sweeper))
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
    metrics: RestClient,
) -> Result<(), RunError> {
    match source {
        Source::Manifests(dir) => Manifests::new(dir, node_name).run(events).await?,
        Source::Api { kubeconfig, master } => {
            let (kubeconfig, master) = (kubeconfig.as_deref(), master.as_deref());
            let client = api::measured_client(kubeconfig, master, metrics).await?;
            api::run(client, node_name, events).await;
        }
    }
    Ok(())
}

/// The text of `/configz`: what kube-proxy's has under the same names, as far as it has an effect here.
fn configz(config: &Config) -> String {
    let address = |address: Option<std::net::SocketAddr>| {
        address.map_or_else(String::new, |address| address.to_string())
    };
    let seconds = |period: std::time::Duration| format!("{}s", period.as_secs_f64());
    serde_json::json!({ "kubeproxy.config.k8s.io": {
        "kind": "KubeProxyConfiguration",
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "mode": "nftables",
        "hostnameOverride": config.node_name,
        "healthzBindAddress": address(config.healthz_bind_address),
        "metricsBindAddress": address(config.metrics_bind_address),
        "bindAddressHardFail": config.bind_address_hard_fail,
        "nftables": {
            "masqueradeBit": config.settings.masquerade_mark.trailing_zeros(),
            "masqueradeAll": config.settings.masquerade_all,
            "syncPeriod": seconds(config.sync_period),
            "minSyncPeriod": seconds(config.min_sync_period),
        },
    }})
    .to_string()
}
