//! The log on standard error: one line an event. Its last lines are kept, too.

use std::sync::Arc;

use anstream::{AutoStream, ColorChoice};
use tracing_subscriber::fmt::writer::MakeWriterExt as _;

use crate::config::Log;
use crate::journal::Journal;

/// Where the client says that it cannot read its file of certificates again.
const CA_BUNDLE: &str = "kube_client::client::tls=warn";

/// How much a command says beside its answer, unless more is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Voice {
    /// Everything that happens.
    Events,
    /// What is wrong.
    Warnings,
    /// The same, but not what is wrong between objects that are not asked about: the daemon has said
    /// it, and `check` does.
    Answer,
}

pub(super) fn start(log: Log, voice: Voice) -> Arc<Journal> {
    use tracing_subscriber::EnvFilter;
    // The client library has an error line for every try; what it means is said once by `watch`.
    let level = match log.verbosity {
        0 if voice == Voice::Warnings => "warn,kube_client=off",
        0 if voice == Voice::Answer => "warn,nftproxy::reconcile=error,kube_client=off",
        0 | 1 => "info,kube_client=off",
        2 | 3 => "info,nftproxy=debug,kube_client=off",
        4 | 5 => "debug",
        _ => "trace",
    };
    // What goes wrong with the API server is said by `watch::api`, once and in full; the client says it
    // at every attempt, several times, and without what to do.
    let level = match log.verbosity {
        0..=3 => format!("{level},kube_runtime=off,kube_client::client=off,{CA_BUNDLE}"),
        _ => level.to_owned(),
    };
    let journal = Arc::new(Journal::default());
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr.and(journal.clone()))
        .with_target(false)
        // Nobody may read standard error any more, and to say so there would end the program.
        .log_internal_errors(false)
        // As for answers: on a terminal, unless NO_COLOR says no.
        .with_ansi(AutoStream::choice(&std::io::stderr()) != ColorChoice::Never);
    if log.json {
        subscriber.json().init();
    } else {
        subscriber.init();
    }
    journal
}
