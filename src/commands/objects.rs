//! The objects of the cluster, read once.

use std::time::Duration;

use tokio::sync::mpsc::channel;

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

/// Everything that a source names.
pub(super) async fn gather(config: &Config) -> Result<State, GatherError> {
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
