//! The command line: what can be asked, and the commands that answer at once.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tokio::sync::mpsc::channel;
use tracing::{error, info};

use crate::app::{self, RunError};
use crate::config::{self, Config, ConfigError, Flags, Source};
use crate::host;
use crate::metrics::Metrics;
use crate::model::Family;
use crate::nft::fake::FakeKernel;
use crate::nft::kernel::{ApplyError, Kernel as _, LoadError};
use crate::nft::names::TABLE;
use crate::nft::netlink::{NetlinkKernel, OpenError};
use crate::nft::text;
use crate::nft::transaction::{Op, Transaction};
use crate::reconcile::Proxy;
use crate::state::State;
use crate::watch;
use crate::watch::manifests::{ManifestError, Manifests};

/// A Kubernetes service proxy on nftables.
///
/// Runs on every node in the place of kube-proxy: watches Services, EndpointSlices, its Node and
/// ServiceCIDRs, and keeps the tables `ip nftproxy` and `ip6 nftproxy` equal to what they ask for. Every
/// change is one atomic netlink batch.
///
/// Without a command it runs like kube-proxy: `nftproxy --config F --hostname-override NODE`.
#[derive(Debug, Parser)]
#[command(version, about, args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    log: LogArgs,
}

const EXAMPLES: &str = "\
Examples:
  nftproxy run --manifests DIR            try it: Services from YAML files, no cluster needed
  nftproxy run --kubeconfig ~/.kube/config
  nftproxy render --manifests FILE        the tables as nft text; no root needed
  nftproxy diff --manifests DIR           what running would change in the kernel
  nftproxy cleanup                        remove the tables
  nft list table ip nftproxy              see what is programmed

Exit codes:
  0  done; for `diff`: nothing to change
  1  `diff` found something to change
  2  it failed, and standard error says why";

#[derive(Debug, Subcommand)]
enum Command {
    /// Watch and program, until SIGTERM. The tables stay in force afterwards.
    Run(RunArgs),
    /// Print the tables that manifests ask for, as nft text. Needs no root and no kernel.
    Render(RenderArgs),
    /// Show what running would change in the kernel, and for which object. Changes nothing.
    Diff(RunArgs),
    /// Remove the tables `ip nftproxy` and `ip6 nftproxy`. Services stop working on this node.
    Cleanup,
}

#[derive(Args, Debug)]
struct RunArgs {
    /// Take objects from this YAML or JSON file, or from all of them in this directory, and follow
    /// their changes.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["kubeconfig", "master"])]
    manifests: Option<PathBuf>,
    /// Take objects from the API server this file names. Without it: from the cluster this runs in.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Address of the API server, instead of the one the kubeconfig names.
    #[arg(long, value_name = "URL")]
    master: Option<String>,
    /// A KubeProxyConfiguration file (v1alpha1). A flag given here wins over the file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Name of this node's Node object. Without it: the host's name.
    #[arg(long, value_name = "NODE", env = "NFTPROXY_HOSTNAME_OVERRIDE")]
    hostname_override: Option<String>,
    /// Addresses of the cluster's pods, comma-separated: other sources are masqueraded on their way to
    /// a ClusterIP.
    #[arg(long, value_name = "CIDRS")]
    cluster_cidr: Option<String>,
    /// Masquerade all traffic to ClusterIPs.
    #[arg(long)]
    masquerade_all: bool,
    /// Serve node ports on 127.0.0.1, too, for processes on this node. Turns on the sysctl
    /// `net.ipv4.conf.all.route_localnet`, and keeps others from reaching loopback addresses by it.
    #[arg(long)]
    localhost_node_ports: bool,
    /// Own the tables: nobody else can change them while this runs, root included. They stay in force
    /// afterwards. Needs Linux 6.9.
    #[arg(long)]
    table_owner: bool,
}

#[derive(Args, Debug)]
struct RenderArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Print one family only.
    #[arg(long, value_enum)]
    family: Option<FamilyArg>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FamilyArg {
    Ip,
    Ip6,
}

#[derive(Args, Debug)]
struct LogArgs {
    /// Verbosity: 0 or 1 for events, 2 to 3 for every commit, 4 and more for everything.
    #[arg(short = 'v', long = "v", value_name = "LEVEL", default_value_t = 0, global = true)]
    verbosity: u8,
    /// Format of the log on standard error.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, global = true)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// A command that failed. `main` alone turns it into an exit code.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The daemon failed.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The manifests cannot be read.
    #[error(transparent)]
    Manifests(#[from] ManifestError),
    /// The kernel cannot be reached.
    #[error(transparent)]
    Kernel(#[from] OpenError),
    /// What the kernel holds cannot be read.
    #[error("reading back the tables: {0}")]
    Load(#[from] LoadError),
    /// Some of the tables could not be removed; each was named.
    #[error("{} of the tables could not be removed", .0.len())]
    Cleanup(Vec<ApplyError>),
    /// Only manifests can be rendered.
    #[error("render needs --manifests PATH: a file or a directory of them")]
    NoManifests,
    /// Something was rendered, but not everything that was given.
    #[error("{0} of the manifest files could not be used; what is wrong with them is said above")]
    Refused(usize),
    /// The runtime cannot be started, or output not be written.
    #[error("cannot {step}: {source}")]
    System {
        /// What was being done.
        step: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl RunArgs {
    fn resolve(self) -> Result<Config, CliError> {
        let flags = Flags {
            config: self.config,
            manifests: self.manifests,
            kubeconfig: self.kubeconfig,
            master: self.master,
            hostname_override: self.hostname_override,
            cluster_cidr: self.cluster_cidr,
            masquerade_all: self.masquerade_all,
            table_owner: self.table_owner,
            localhost_node_ports: self.localhost_node_ports,
        };
        let (config, remarks) = config::resolve(&flags)?;
        for remark in remarks {
            info!("{remark}");
        }
        Ok(config)
    }
}

impl Cli {
    /// Does what was asked.
    pub fn execute(self) -> Result<ExitCode, CliError> {
        let command = self.command.unwrap_or(Command::Run(self.run));
        // A command whose result is on standard output only speaks up if something is wrong.
        let quiet = matches!(command, Command::Render(_) | Command::Diff(_));
        start_log(&self.log, quiet);
        match command {
            Command::Run(args) => {
                let config = args.resolve()?;
                runtime()?.block_on(app::run(config))?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Render(args) => render(args),
            Command::Diff(args) => diff(args.resolve()?),
            Command::Cleanup => cleanup(),
        }
    }
}

/// Where the client says that it cannot read its file of certificates again.
const CA_BUNDLE: &str = "kube_client::client::tls=warn";

fn start_log(args: &LogArgs, quiet: bool) {
    use tracing_subscriber::EnvFilter;
    // The client library has an error line for every try; what it means is said once by `watch`.
    let level = match args.verbosity {
        0 if quiet => "warn,kube_client=off",
        0 | 1 => "info,kube_client=off",
        2 | 3 => "info,nftproxy=debug,kube_client=off",
        4 | 5 => "debug",
        _ => "trace",
    };
    // What goes wrong with the API server is said by `watch::api`, once and in full; the client says it
    // at every attempt, several times, and without what to do.
    let level = match args.verbosity {
        0..=3 => format!("{level},kube_runtime=off,kube_client::client=off,{CA_BUNDLE}"),
        _ => level.to_owned(),
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    match args.log_format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    // Two workers: one can decode while the other receives; the kernel has a thread of its own.
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| CliError::System { step: "start the runtime", source })
}

fn print(text: &str) -> Result<(), CliError> {
    let write = |mut out: std::io::StdoutLock<'_>| {
        out.write_all(text.as_bytes())?;
        out.flush()
    };
    match write(std::io::stdout().lock()) {
        // A reader like `head` had enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(source) => Err(CliError::System { step: "write to standard output", source }),
        Ok(()) => Ok(()),
    }
}

fn render(args: RenderArgs) -> Result<ExitCode, CliError> {
    let config = args.run.resolve()?;
    let Source::Manifests(dir) = config.source else { return Err(CliError::NoManifests) };
    let state = State::new(config.settings, host::node_facts(&config.node_name));
    let mut proxy = Proxy::new(state, FakeKernel::default());
    let mut manifests = Manifests::new(dir, config.node_name);
    let (events, problems) = manifests.read()?;
    problems.iter().for_each(watch::log);
    for event in events {
        proxy.observe(event);
    }
    let ruleset = proxy.wanted();
    let text = match args.family {
        None => text::ruleset(&ruleset),
        Some(FamilyArg::Ip) => text::table(&ruleset, Family::V4),
        Some(FamilyArg::Ip6) => text::table(&ruleset, Family::V6),
    };
    print(&text)?;
    match manifests.refused() {
        0 => Ok(ExitCode::SUCCESS),
        refused => Err(CliError::Refused(refused)),
    }
}

fn diff(config: Config) -> Result<ExitCode, CliError> {
    let state = State::new(config.settings, host::node_facts(&config.node_name));
    let mut proxy = Proxy::new(state, NetlinkKernel::open()?);
    let wanted = format!("{}, node {}", config.source, config.node_name);
    runtime()?.block_on(async {
        let (sender, mut events) = channel(64);
        let source = tokio::spawn(app::watch(
            config.source,
            config.node_name,
            sender,
            Metrics::default().rest_client,
        ));
        while !proxy.is_complete() {
            let Some(event) = events.recv().await else {
                // A source that ended has not told everything: no difference follows from it.
                return source.await.unwrap_or(Ok(())).and(Err(RunError::Ended));
            };
            proxy.observe(event);
        }
        source.abort();
        Ok(())
    })?;
    let plan = proxy.plan()?;
    if plan.is_empty() {
        print(&format!("the kernel's tables are what is wanted ({wanted})\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut lines = format!(
        "--- kernel: tables ip {TABLE} and ip6 {TABLE} of this network namespace\n+++ wanted: {wanted}\n"
    );
    for (op, contributor) in plan {
        let sign = match op {
            Op::DeleteTable(_)
            | Op::FlushChain(..)
            | Op::DeleteChain(..)
            | Op::DeleteElement(..) => '-',
            _ => '+',
        };
        for line in text::op(&op).lines() {
            let _ = write!(lines, "{sign} {line}");
            if let Some(contributor) = &contributor {
                let _ = write!(lines, "    # {contributor}");
            }
            lines.push('\n');
        }
    }
    print(&lines)?;
    Ok(ExitCode::from(1))
}

/// Removes what can be removed: one table that cannot go keeps nobody from removing the other.
fn cleanup() -> Result<ExitCode, CliError> {
    let mut kernel = NetlinkKernel::open()?;
    let mut errors = Vec::new();
    for family in Family::BOTH {
        match kernel.apply(&Transaction { ops: vec![Op::DeleteTable(family)] }) {
            Ok(_) => info!("removed table {family} {TABLE}"),
            Err(error) if is_absent(&error) => info!("there is no table {family} {TABLE}"),
            Err(error) => {
                error!("cannot remove table {family} {TABLE}: {error}");
                errors.push(error);
            }
        }
    }
    if errors.is_empty() { Ok(ExitCode::SUCCESS) } else { Err(CliError::Cleanup(errors)) }
}

fn is_absent(error: &ApplyError) -> bool {
    matches!(error, ApplyError::Refused { refusals } if refusals.iter().all(|r| r.errno == libc::ENOENT))
}
