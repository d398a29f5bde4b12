//! The objects of the cluster, read once: from where the user says, or else from the nftproxy that runs
//! on this node, or else from the cluster this runs in.

use std::time::Duration;

use tokio::sync::mpsc::channel;

use super::daemon::{Daemon, DaemonError};
use crate::app::{self, RunError};
use crate::config::{Config, Source};
use crate::host;
use crate::metrics::Metrics;
use crate::state::State;
use crate::watch::notices::Notices;

/// How long a source may take to name every object. An API server that does not answer is asked again
/// and again without end; somebody who waits at a terminal is to be told.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why the objects cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    /// The source says why.
    #[error(transparent)]
    Source(#[from] RunError),
    /// Nobody said where they are from, and neither is there.
    #[error("{daemon} And {source}")]
    Nowhere {
        /// Why not from the daemon.
        daemon: DaemonError,
        /// Why not from the cluster this runs in.
        source: Box<GatherError>,
    },
    /// It does not answer.
    #[error("{origin}: no complete answer within {} seconds; missing: {missing}", PATIENCE.as_secs())]
    Silent {
        /// Which source.
        origin: Source,
        /// The kinds that were not listed.
        missing: String,
    },
}

/// Whether the user said where objects are from; else it is worth a try, and no more.
pub(super) fn is_given(source: &Source) -> bool {
    !matches!(source, Source::Api { kubeconfig: None, master: None })
}

/// Objects, and who named them.
pub(super) struct Gathered {
    pub(super) state: State,
    /// In words.
    pub(super) source: String,
}

/// Everything that there is.
pub(super) async fn gather(config: &Config) -> Result<Gathered, GatherError> {
    let read = async {
        let state = read(config).await?;
        Ok(Gathered { state, source: config.source.to_string() })
    };
    if is_given(&config.source) {
        return read.await;
    }
    match of_daemon(config).await {
        Ok(gathered) => Ok(gathered),
        Err(daemon) => {
            read.await.map_err(|source| GatherError::Nowhere { daemon, source: Box::new(source) })
        }
    }
}

async fn of_daemon(config: &Config) -> Result<Gathered, DaemonError> {
    let daemon = Daemon::of(config)?;
    let objects = daemon.objects().await?;
    let source = format!("nftproxy on {} ({})", daemon.at(), objects.source);
    Ok(Gathered { state: objects.into_state(), source })
}

/// Everything that a source names.
async fn read(config: &Config) -> Result<State, GatherError> {
    let mut state = State::new(config.live.settings.clone(), host::node_facts(&config.node_name));
    let (sender, mut events) = channel(64);
    // Nobody reads these counts: the process ends with the answer.
    let metrics = Metrics::default().rest_client;
    let (origin, node_name) = (config.source.clone(), config.node_name.clone());
    let source = tokio::spawn(app::watch(origin, node_name, sender, metrics, Notices::default()));
    let listing = async {
        while !state.is_complete() {
            let Some(event) = events.recv().await else { return false };
            state.observe(event);
        }
        true
    };
    match tokio::time::timeout(PATIENCE, listing).await {
        Ok(true) => {
            source.abort();
            Ok(state)
        }
        Ok(false) => {
            let outcome = source.await.unwrap_or(Ok(()));
            Err(outcome
                .and(Err::<State, _>(RunError::Ended))
                .map_or_else(|e| e, |_| RunError::Ended)
                .into())
        }
        Err(_) => {
            source.abort();
            let missing: Vec<_> = state.missing().iter().map(ToString::to_string).collect();
            Err(GatherError::Silent { origin: config.source.clone(), missing: missing.join(", ") })
        }
    }
}
