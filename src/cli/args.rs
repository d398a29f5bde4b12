//! What can be written on the command line, in the types that clap reads it into.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Subcommand, ValueEnum};

use super::flags::FieldArgs;
use crate::commands::Output;
use crate::commands::explain::Target;
use crate::config::{Flags, Log, Type, Value};
use crate::model::Family;

pub(super) const EXAMPLES: &str = "\
Examples:
  nftproxy run --manifests DIR            try it: Services from YAML files, no cluster needed
  nftproxy run --kubeconfig ~/.kube/config
  nftproxy render --manifests FILE        the tables as nft text; no root needed
  nftproxy diff --manifests DIR           what running would change in the kernel
  nftproxy config --config FILE           what the configuration comes down to
  nftproxy explain 10.96.0.10:80 --from 10.244.1.5
                                          what happens to this packet here, and why
  nftproxy list --namespace default       Services, who answers, and whether it is in force
  nftproxy top                            connections a second, with --counters of the daemon
  nftproxy check                          is this host in order, and what to do if not
  nftproxy events                         what is being programmed, and why, as it happens
  nftproxy bundle                         an archive for whoever is to help, without secrets
  nftproxy cleanup                        remove the tables
  nftproxy cleanup --kube-proxy           remove what kube-proxy left behind
  nft list table ip nftproxy              see what is programmed

Exit codes:
  0  done; for `diff`: nothing to change; for `explain`: an endpoint would answer; for `list` and
     `check`: all is well
  1  `diff` found something to change; `explain` found nobody who would answer; `list` found
     Services that are not in force; `top` found that nothing is counted; `check` found something to look at
  2  it failed, and standard error says why; or `check` found something bad";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Watch and program, until SIGTERM. The tables stay in force afterwards.
    Run(RunArgs),
    /// Print the tables that manifests ask for, as nft text, or as `nft -j list` prints them. Needs no
    /// root and no kernel.
    Render(RenderArgs),
    /// Show what running would change in the kernel, and for which object. Changes nothing.
    Diff(OutputAndConfiguration),
    /// Print the effective configuration: every setting, its value, and who said so.
    Config(OutputAndConfiguration),
    /// Remove the tables `ip nftproxy` and `ip6 nftproxy`. Services stop working on this node, unless
    /// kube-proxy runs again.
    Cleanup(CleanupArgs),
    /// Say what happens on this node to a packet that opens a connection, rule by rule, and why.
    ///
    /// Follows the tables that the kernel holds, or, where it cannot be asked, those that the objects
    /// ask for.
    Explain(ExplainArgs),
    /// List every Service port: what is dialled, the policies, who answers, and, with root, whether
    /// the kernel holds it.
    List(ListArgs),
    /// Show connections a second by Service port and endpoint, live. Needs `--counters` of the daemon.
    ///
    /// On a terminal it is redrawn; elsewhere one block follows another. TOTAL is what the kernel counted
    /// of each endpoint since its first connection, or since the first after an hour without.
    Top(TopArgs),
    /// Check whether this host is in order for nftproxy, and say what to do if not. Changes nothing.
    Check(OutputAndConfiguration),
    /// Show what the nftproxy of this node programs, and for which objects, as it happens.
    #[command(visible_alias = "watch")]
    Events(EventsArgs),
    /// Write an archive for whoever is to help: version, configuration, findings of `check`, Services,
    /// both tables, last batches, last lines of the log, metrics, sysctls. No credentials are in it.
    Bundle(BundleArgs),
    /// Print the completion script for a shell: `nftproxy completions bash >
    /// /etc/bash_completion.d/nftproxy`.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the man page, or write those of all commands: `nftproxy man | man -l -`.
    Man {
        /// Write all pages into this directory instead.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

#[derive(Args, Debug)]
pub(super) struct CleanupArgs {
    /// Remove what kube-proxy left behind in any of its modes, and leave nftproxy's tables alone.
    #[arg(long)]
    pub(super) kube_proxy: bool,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

#[derive(Args, Debug)]
pub(super) struct OutputAndConfiguration {
    #[command(flatten)]
    pub(super) output: OutputArgs,
    #[command(flatten)]
    pub(super) configuration: Configuration,
}

#[derive(Args, Debug)]
pub(super) struct ListArgs {
    /// Only Services of this namespace.
    #[arg(long, short, value_name = "NAME")]
    pub(super) namespace: Option<String>,
    /// Only Services of this name.
    #[arg(long, short, value_name = "NAME")]
    pub(super) service: Option<String>,
    /// Only Services that are dialled on this address, or have an endpoint with it.
    #[arg(long, short, value_name = "ADDRESS")]
    pub(super) address: Option<IpAddr>,
    /// Go by the objects alone, and do not ask the kernel.
    #[arg(long)]
    pub(super) wanted: bool,
    #[command(flatten)]
    pub(super) output: OutputArgs,
    #[command(flatten)]
    pub(super) configuration: Configuration,
}

#[derive(Args, Debug)]
pub(super) struct TopArgs {
    /// Time between two readings, at least 100ms.
    #[arg(long, short, value_name = "DURATION", default_value = "1s", value_parser = interval)]
    pub(super) interval: Duration,
    /// Take two readings, show what happened between them, and end.
    #[arg(long)]
    pub(super) once: bool,
    #[command(flatten)]
    pub(super) output: OutputArgs,
    #[command(flatten)]
    pub(super) configuration: Configuration,
}

fn interval(text: &str) -> Result<Duration, String> {
    match Type::Duration.parse(text)? {
        Value::Duration(interval) if interval >= Duration::from_millis(100) => Ok(interval),
        _ => Err("expected at least 100ms".into()),
    }
}

#[derive(Args, Debug)]
pub(super) struct ExplainArgs {
    /// What is dialled: `10.96.0.10:80`, `[fd00::10]:53/udp`, `192.0.2.10:30080/sctp`; or pinged:
    /// `10.96.0.10/icmp`.
    #[arg(value_name = "ADDRESS:PORT[/PROTOCOL]")]
    pub(super) target: Target,
    /// Who dials. Without it: this host.
    #[arg(long, value_name = "ADDRESS")]
    pub(super) from: Option<IpAddr>,
    /// The interface that the packet comes in by, where pods are told by interface.
    #[arg(long, value_name = "NAME")]
    pub(super) interface: Option<String>,
    /// Go by the objects alone, not by what the kernel holds.
    #[arg(long)]
    pub(super) wanted: bool,
    #[command(flatten)]
    pub(super) output: OutputArgs,
    #[command(flatten)]
    pub(super) configuration: Configuration,
}

#[derive(Args, Debug)]
pub(super) struct EventsArgs {
    /// How many of the last batches to begin with.
    #[arg(long, value_name = "NUMBER", default_value_t = 10)]
    pub(super) last: usize,
    /// Do not go on with new ones.
    #[arg(long)]
    pub(super) no_follow: bool,
    #[command(flatten)]
    pub(super) output: OutputArgs,
    #[command(flatten)]
    pub(super) configuration: Configuration,
}

#[derive(Args, Debug)]
pub(super) struct BundleArgs {
    /// The archive, a new file; `-` for standard output. Otherwise one in this directory that is named
    /// after node and time.
    #[arg(long, short, value_name = "FILE.tar.gz")]
    pub(super) output: Option<PathBuf>,
    #[command(flatten)]
    pub(super) configuration: Configuration,
}

#[derive(Args, Debug)]
pub(super) struct OutputArgs {
    /// Form of the answer.
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    pub(super) output: Output,
}

/// What the daemon runs with, for it and for every command that has to see things as it does.
#[derive(Args, Debug)]
pub(super) struct Configuration {
    /// A KubeProxyConfiguration file (v1alpha1). As in kube-proxy it wins over flags, but for
    /// --hostname-override, --master, --manifests, those of nftproxy's own and those of the log.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    fields: FieldArgs,
}

impl Configuration {
    pub(super) fn flags(&self) -> Flags {
        Flags { config: self.config.clone(), given: self.fields.0.clone() }
    }
}

#[derive(Args, Debug)]
pub(super) struct RunArgs {
    /// Set up what needs all privileges (limits of connection tracking), program nothing, and end.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", action = ArgAction::Set, value_name = "BOOL")]
    pub(super) init_only: bool,
    /// Remove nftproxy's tables and what kube-proxy left behind, and end.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", action = ArgAction::Set, value_name = "BOOL")]
    pub(super) cleanup: bool,
    /// Write the effective configuration to this file, and end.
    #[arg(long, value_name = "FILE")]
    pub(super) write_config_to: Option<PathBuf>,
    #[command(flatten)]
    pub(super) configuration: Configuration,
}

#[derive(Args, Debug)]
pub(super) struct RenderArgs {
    #[command(flatten)]
    pub(super) configuration: Configuration,
    /// Print one family only.
    #[arg(long, value_enum)]
    pub(super) family: Option<FamilyArg>,
    #[command(flatten)]
    pub(super) output: OutputArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum FamilyArg {
    Ip,
    Ip6,
}

#[derive(Args, Debug)]
pub(super) struct LogArgs {
    /// Verbosity, as for `run`.
    #[arg(short = 'v', long = "v", value_name = "NUMBER", default_value_t = 0)]
    pub(super) verbosity: u8,
    /// Format of the log on standard error.
    #[arg(long = "logging-format", alias = "log-format", value_enum, default_value_t = LogFormat::Text)]
    pub(super) format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    Text,
    Json,
}

impl From<LogArgs> for Log {
    fn from(args: LogArgs) -> Self {
        Self { verbosity: args.verbosity, json: args.format == LogFormat::Json }
    }
}

impl From<FamilyArg> for Family {
    fn from(arg: FamilyArg) -> Self {
        match arg {
            FamilyArg::Ip => Self::V4,
            FamilyArg::Ip6 => Self::V6,
        }
    }
}
