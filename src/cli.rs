//! The command line: what can be asked, and the commands that answer at once.

mod flags;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use tokio::sync::mpsc::channel;
use tracing::{error, info, warn};

use self::flags::FieldArgs;
use crate::app::{self, RunError};
use crate::config::{self, Config, ConfigError, Flags, Loaded, Log, Remark, Source};
use crate::host::{self, PrivilegeError};
use crate::metrics::Metrics;
use crate::model::Family;
use crate::nft::dataplane::LOOPBACK_GUARD;
use crate::nft::fake::FakeKernel;
use crate::nft::kernel::{ApplyError, Kernel as _, LoadError};
use crate::nft::names::TABLE;
use crate::nft::netlink::{NetlinkKernel, OpenError};
use crate::nft::text;
use crate::nft::transaction::{Op, Transaction};
use crate::reconcile::Proxy;
use crate::state::State;
use crate::takeover::{self, Purpose};
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
}

const EXAMPLES: &str = "\
Examples:
  nftproxy run --manifests DIR            try it: Services from YAML files, no cluster needed
  nftproxy run --kubeconfig ~/.kube/config
  nftproxy render --manifests FILE        the tables as nft text; no root needed
  nftproxy diff --manifests DIR           what running would change in the kernel
  nftproxy config --config FILE           what the configuration comes down to
  nftproxy cleanup                        remove the tables
  nftproxy cleanup --kube-proxy           remove what kube-proxy left behind
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
    /// Print the effective configuration: every setting, its value, and who said so.
    Config(ConfigArgs),
    /// Remove the tables `ip nftproxy` and `ip6 nftproxy`. Services stop working on this node, unless
    /// kube-proxy runs again.
    Cleanup(CleanupArgs),
}

#[derive(Args, Debug)]
struct CleanupArgs {
    /// Remove what kube-proxy left behind in any of its modes, and leave nftproxy's tables alone.
    #[arg(long)]
    kube_proxy: bool,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Args, Debug)]
struct RunArgs {
    /// A KubeProxyConfiguration file (v1alpha1). As in kube-proxy it wins over flags, but for
    /// --hostname-override, --master, --manifests and those of the log.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set up what needs all privileges (limits of connection tracking), program nothing, and end.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", action = ArgAction::Set, value_name = "BOOL")]
    init_only: bool,
    /// Remove nftproxy's tables and what kube-proxy left behind, and end.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", action = ArgAction::Set, value_name = "BOOL")]
    cleanup: bool,
    /// Write the effective configuration to this file, and end.
    #[arg(long, value_name = "FILE")]
    write_config_to: Option<PathBuf>,
    #[command(flatten)]
    fields: FieldArgs,
}

#[derive(Args, Debug)]
struct ConfigArgs {
    #[command(flatten)]
    run: RunArgs,
    /// How to print it.
    #[arg(long, value_enum, default_value_t = OutputArg::Text)]
    output: OutputArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OutputArg {
    Text,
    Json,
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
    /// Verbosity, as for `run`.
    #[arg(short = 'v', long = "v", value_name = "NUMBER", default_value_t = 0)]
    verbosity: u8,
    /// Format of the log on standard error.
    #[arg(long = "logging-format", alias = "log-format", value_enum, default_value_t = LogFormat::Text)]
    format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
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
    /// What needs all privileges is not there.
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
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
    /// Not everything of kube-proxy's could be removed; what was said.
    #[error("{0} steps failed; what they were to remove may still be there")]
    KubeProxy(usize),
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
    fn flags(&self) -> Flags {
        Flags { config: self.config.clone(), given: self.fields.0.clone() }
    }

    /// Reads the configuration and starts the log it asks for.
    fn load(&self, quiet: bool) -> Result<Loaded, CliError> {
        let loaded = self.load_silently(quiet)?;
        loaded.remarks.iter().for_each(Remark::log);
        Ok(loaded)
    }

    /// The same, with the remarks left to say.
    fn load_silently(&self, quiet: bool) -> Result<Loaded, CliError> {
        match config::load(&self.flags()) {
            Ok(loaded) => {
                start_log(loaded.config.log, quiet);
                Ok(loaded)
            }
            Err(error) => {
                start_log(Log::default(), quiet);
                Err(error.into())
            }
        }
    }
}

impl Cli {
    /// The command line of this process. Ends it if that is wrong, or asks for help.
    #[must_use]
    pub fn of_process() -> Self {
        Self::parse_from(flags::normalized(std::env::args_os()))
    }

    /// Does what was asked.
    pub fn execute(self) -> Result<ExitCode, CliError> {
        // A command whose result is on standard output only speaks up if something is wrong.
        match self.command.unwrap_or(Command::Run(self.run)) {
            Command::Run(args) => run(&args),
            Command::Render(args) => render(args.run.load(true)?.config, args.family),
            Command::Diff(args) => diff(args.load(true)?.config),
            Command::Config(args) => {
                let loaded = args.run.load(true)?;
                let format = match args.output {
                    OutputArg::Text => config::Format::Text,
                    OutputArg::Json => config::Format::Json,
                };
                print(&config::show(&loaded, format))?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Cleanup(CleanupArgs { kube_proxy, log }) => {
                start_log(
                    Log { verbosity: log.verbosity, json: log.format == LogFormat::Json },
                    false,
                );
                if kube_proxy { cleanup_kube_proxy() } else { cleanup() }
            }
        }
    }
}

fn run(args: &RunArgs) -> Result<ExitCode, CliError> {
    let loaded = args.load_silently(false)?;
    if args.write_config_to.is_none() {
        // Without, nothing else is worth a word.
        host::check_privileges()?;
    }
    loaded.remarks.iter().for_each(Remark::log);
    if let Some(path) = &args.write_config_to {
        let write = |source| CliError::System { step: "write the configuration", source };
        std::fs::write(path, config::document(&loaded)).map_err(write)?;
        info!(file = %path.display(), "wrote the configuration");
    } else if args.cleanup {
        let ours = cleanup();
        let theirs = cleanup_kube_proxy();
        return ours.and(theirs);
    } else if args.init_only {
        app::prepare(&loaded.config.live)?;
    } else {
        runtime()?.block_on(app::run(args.flags(), loaded))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Where the client says that it cannot read its file of certificates again.
const CA_BUNDLE: &str = "kube_client::client::tls=warn";

fn start_log(log: Log, quiet: bool) {
    use tracing_subscriber::EnvFilter;
    // The client library has an error line for every try; what it means is said once by `watch`.
    let level = match log.verbosity {
        0 if quiet => "warn,kube_client=off",
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
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    if log.json {
        subscriber.json().init();
    } else {
        subscriber.init();
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

fn render(config: Config, family: Option<FamilyArg>) -> Result<ExitCode, CliError> {
    let Source::Manifests(dir) = config.source else { return Err(CliError::NoManifests) };
    let state = State::new(config.live.settings, host::node_facts(&config.node_name));
    let mut proxy = Proxy::new(state, FakeKernel::default());
    let mut manifests = Manifests::new(dir, config.node_name);
    let (events, problems) = manifests.read()?;
    problems.iter().for_each(watch::log);
    for event in events {
        proxy.observe(event);
    }
    let ruleset = proxy.wanted();
    let text = match family {
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
    host::check_privileges()?;
    let state = State::new(config.live.settings, host::node_facts(&config.node_name));
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
    host::check_privileges()?;
    let mut kernel = NetlinkKernel::open()?;
    let guarded = kernel.has_rule(Family::V4, LOOPBACK_GUARD).unwrap_or(false);
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
    if guarded && host::Sysctl::default().routes_loopback() {
        warn!(
            "net.ipv4.conf.all.route_localnet is still 1, and nothing of nftproxy keeps others from \
             loopback addresses now: set it to 0 unless something else needs it"
        );
    }
    if errors.is_empty() { Ok(ExitCode::SUCCESS) } else { Err(CliError::Cleanup(errors)) }
}

/// Removes what kube-proxy left, likewise.
fn cleanup_kube_proxy() -> Result<ExitCode, CliError> {
    match takeover::remove(Purpose::Cleanup) {
        0 => Ok(ExitCode::SUCCESS),
        failed => Err(CliError::KubeProxy(failed)),
    }
}

fn is_absent(error: &ApplyError) -> bool {
    matches!(error, ApplyError::Refused { refusals } if refusals.iter().all(|r| r.errno == libc::ENOENT))
}
