//! Configuration: what the user wrote, in flags and in a `KubeProxyConfiguration` file, and what it
//! means on this node.
//!
//! The file is the one kube-proxy reads, with an optional block `nftproxy:` for what only this program
//! has. Everything goes one way: `field` says what there is, `file` and the command line what was
//! written, `values` which of it counts, `resolve` what it means; `effective` shows it, and `follow`
//! does all of it again when the file changes. Fields that cannot have an effect here are accepted and
//! named; values that would have one and are not supported are refused, because a proxy that ignores
//! them would do something else than the user believes.

mod effective;
mod field;
mod file;
pub mod follow;
mod resolve;
mod value;
mod values;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use self::effective::{Format, configz, document, given, show};
pub use self::field::{Effect, FIELDS, Field, LONE_FLAGS, LoneFlag};
pub use self::value::{Type, Value};
pub use self::values::{Origin, Setting, Values};

use crate::host::{self, Conntrack};
use crate::settings::Settings;

/// What the program runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This node's name.
    pub node_name: String,
    /// Where objects come from.
    pub source: Source,
    /// Own the tables, so that nobody else can change them.
    pub table_owner: bool,
    /// Leave alone what kube-proxy left behind.
    pub keep_kube_proxy_rules: bool,
    /// Address of the health server.
    pub healthz_bind_address: Option<SocketAddr>,
    /// Address of the metrics server.
    pub metrics_bind_address: Option<SocketAddr>,
    /// Whether the program ends if one of them cannot listen.
    pub bind_address_hard_fail: bool,
    /// The log.
    pub log: Log,
    /// What can change while it runs.
    pub live: Live,
}

/// What can change while the program runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Live {
    /// What the data plane is to be like.
    pub settings: Settings,
    /// Least time between two commits.
    pub min_sync_period: Duration,
    /// Longest time between a failed commit and the next try.
    pub sync_period: Duration,
    /// What connection tracking is to be like.
    pub conntrack: Conntrack,
    /// How readily the kernel ends this process when memory runs out.
    pub oom_score_adj: i32,
}

/// How to log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// As klog counts.
    pub verbosity: u8,
    /// JSON lines instead of text.
    pub json: bool,
}

/// Where objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory of manifests.
    Manifests(PathBuf),
    /// The API server of a kubeconfig file, or of the cluster this runs in.
    Api {
        /// The file; None for the in-cluster configuration.
        kubeconfig: Option<PathBuf>,
        /// Overrides the server's address.
        master: Option<String>,
    },
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Manifests(dir) => write!(f, "manifests in {}", dir.display()),
            Self::Api { kubeconfig: Some(file), .. } => {
                write!(f, "API server of {}", file.display())
            }
            Self::Api { kubeconfig: None, .. } => write!(f, "API server of this cluster"),
        }
    }
}

/// What was given on the command line.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// `--config`
    pub config: Option<PathBuf>,
    /// The flags of [`FIELDS`] and [`LONE_FLAGS`], each with what was said, in order.
    pub given: BTreeMap<&'static str, Vec<String>>,
}

/// A configuration that cannot be used. One line: what, where, what was expected.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot read it: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not a `KubeProxyConfiguration`.
    #[error("{}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Field and expectation.
        reason: String,
    },
    /// A value that cannot be used.
    #[error("{origin}: {value:?}: {expected}")]
    Value {
        /// Flag, or file and field.
        origin: String,
        /// What was found.
        value: String,
        /// What was expected.
        expected: String,
    },
    /// The node's name is not known.
    #[error(transparent)]
    Hostname(#[from] host::HostnameError),
}

/// Something about the configuration that the user may want to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// The flag, or the file and field.
    pub origin: String,
    /// What about it.
    pub message: String,
    /// Whether it is probably not what the user meant.
    pub is_warning: bool,
}

impl Remark {
    fn note(origin: impl Into<String>, message: impl Into<String>) -> Self {
        let one_line = |text: String| {
            if text.contains(char::is_control) { escaped(&text) } else { text }
        };
        let (origin, message) = (one_line(origin.into()), one_line(message.into()));
        Self { origin, message, is_warning: false }
    }

    fn warning(origin: impl Into<String>, message: impl Into<String>) -> Self {
        Self { is_warning: true, ..Self::note(origin, message) }
    }

    /// One line of the log.
    pub fn log(&self) {
        let Self { origin, message, is_warning } = self;
        if *is_warning {
            tracing::warn!("{origin}: {message}");
        } else {
            tracing::info!("{origin}: {message}");
        }
    }
}

/// The text without what could end a line, or do something to a terminal: names and values of a file can
/// hold anything.
fn escaped(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            line.extend(c.escape_debug());
        } else {
            line.push(c);
        }
    }
    line
}

/// A configuration with where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// What it means.
    pub config: Config,
    /// What was said.
    pub values: Values,
    /// What is to be said about it.
    pub remarks: Vec<Remark>,
}

/// Reads the file, if there is one, and resolves everything.
pub fn load(flags: &Flags) -> Result<Loaded, ConfigError> {
    let mut remarks = Vec::new();
    let file = flags.config.as_ref().map(|path| file::read(path, &mut remarks)).transpose()?;
    finish(flags, file.as_ref(), remarks)
}

fn finish(
    flags: &Flags,
    file: Option<&file::File>,
    mut remarks: Vec<Remark>,
) -> Result<Loaded, ConfigError> {
    let mut values = Values::merge(flags, file, &mut remarks)?;
    let config = resolve::resolve(flags, &mut values, &mut remarks)?;
    Ok(Loaded { config, values, remarks })
}
