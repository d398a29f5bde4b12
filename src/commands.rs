//! The commands of an operator: what is served, what happens to a packet, whether this host is in order.
//!
//! Each that answers in text and in JSON first makes a plain value of what it found (which is also its
//! JSON), and then a text of that, so that the two cannot tell different things. None but `cleanup`
//! changes anything.

pub mod bundle;
pub mod check;
pub mod cleanup;
pub mod daemon;
pub mod diff;
pub mod endpoints;
pub mod events;
pub mod explain;
pub mod list;
pub mod manual;
pub mod render;
pub mod top;

mod connections;
mod objects;
mod tables;
mod text;

pub use self::connections::CountersError;
pub use self::daemon::DaemonError;
pub use self::objects::GatherError;
pub use self::tables::{Tables, TablesError};

use crate::host::PrivilegeError;
use crate::nft::kernel::ApplyError;
use crate::watch::manifests::ManifestError;

/// In which form a command answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people: aligned, within 80 columns where names allow it.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// A command's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What goes to standard output; colours are taken out where that is no terminal.
    pub text: String,
    /// How good the news is.
    pub verdict: Verdict,
}

/// What an answer amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Something to look at; or nobody answers.
    Attention,
    /// Something is broken.
    Bad,
}

/// Why a command could not answer.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The objects cannot be had.
    #[error(transparent)]
    Objects(#[from] GatherError),
    /// The daemon does not answer.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The archive cannot be made.
    #[error(transparent)]
    Bundle(#[from] bundle::BundleError),
    /// The kernel's tables cannot be had.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// The kernel's counters cannot be had.
    #[error(transparent)]
    Counters(#[from] CountersError),
    /// The process may not do what it takes.
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    /// The manifests cannot be read.
    #[error(transparent)]
    Manifests(#[from] ManifestError),
    /// Only manifests can be rendered.
    #[error("render needs --manifests PATH: a file or a directory of them")]
    NoManifests,
    /// Some of the tables could not be removed; each was named.
    #[error("{} of the tables could not be removed", .0.len())]
    Cleanup(Vec<ApplyError>),
    /// Not everything of kube-proxy's could be removed; what was said.
    #[error("{0} steps failed; what they were to remove may still be there")]
    KubeProxy(usize),
    /// What is asked about makes no sense.
    #[error(transparent)]
    Target(#[from] explain::TargetError),
    /// Neither the kernel nor any object is at hand.
    #[error("{tables}; and there are no objects to go by: {objects}")]
    Nothing {
        /// Why not the kernel.
        tables: String,
        /// Why no objects.
        objects: GatherError,
    },
}

fn json(value: &impl serde::Serialize) -> String {
    let text = serde_json::to_string_pretty(value).expect("plain values are JSON");
    text + "\n"
}
