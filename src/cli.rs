//! The command line: what can be asked, and who answers.

mod args;
mod flags;
mod log;
mod report;

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory as _, FromArgMatches as _, Parser};
use tracing::info;

use self::args::{
    CleanupArgs, Command, Configuration, EXAMPLES, ExplainArgs, ListArgs, OutputAndConfiguration,
    RunArgs, TopArgs,
};
use self::log::Voice;
use crate::app::{self, RunError};
use crate::commands::top::Top;
use crate::commands::{self, Answer, CommandError, Output, Verdict};
use crate::config::{self, ConfigError, Loaded, Log, Remark};
use crate::host::{self, PrivilegeError};
use crate::journal::Journal;

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
    /// A command could not answer.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// Something was rendered, but not everything that was given.
    #[error("{0} of the manifest files could not be used; what is wrong with them is said above")]
    Refused(usize),
    /// A file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The runtime cannot be started, or output not be written.
    #[error("cannot {step}: {source}")]
    System {
        /// What was being done.
        step: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl Configuration {
    /// Reads the configuration and starts the log it asks for.
    fn load(&self, voice: Voice) -> Result<Loaded, CliError> {
        let (loaded, _) = self.load_silently(voice)?;
        loaded.remarks.iter().for_each(Remark::log);
        Ok(loaded)
    }

    /// The same, with the remarks left to say, and what keeps the last lines of the log.
    fn load_silently(&self, voice: Voice) -> Result<(Loaded, Arc<Journal>), CliError> {
        match config::load(&self.flags()) {
            Ok(loaded) => {
                let journal = log::start(loaded.config.log, voice);
                Ok((loaded, journal))
            }
            Err(error) => {
                log::start(Log::default(), voice);
                Err(error.into())
            }
        }
    }
}

impl Cli {
    /// The command line of this process. Ends it if that is wrong, or asks for help.
    #[must_use]
    pub fn of_process() -> Self {
        let matches = described().get_matches_from(flags::normalized(std::env::args_os()));
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }

    /// Does what was asked.
    pub fn execute(self) -> Result<ExitCode, CliError> {
        match self.command.unwrap_or(Command::Run(self.run)) {
            Command::Run(args) => run(&args),
            Command::Cleanup(CleanupArgs { kube_proxy, log }) => {
                log::start(log.into(), Voice::Events);
                if kube_proxy {
                    commands::cleanup::kube_proxy()?;
                } else {
                    commands::cleanup::own()?;
                }
                Ok(ExitCode::SUCCESS)
            }
            // A command whose result is on standard output only speaks up if something is wrong.
            Command::Render(args) => {
                let config = args.configuration.load(Voice::Warnings)?.config;
                let rendered = commands::render::render(
                    config,
                    args.family.map(Into::into),
                    args.output.output,
                )?;
                print(&rendered.text)?;
                match rendered.refused {
                    0 => Ok(ExitCode::SUCCESS),
                    refused => Err(CliError::Refused(refused)),
                }
            }
            Command::Diff(OutputAndConfiguration { output, configuration }) => {
                let config = configuration.load(Voice::Answer)?.config;
                told(&runtime()?.block_on(commands::diff::diff(&config, output.output))?)
            }
            Command::Config(OutputAndConfiguration { output, configuration }) => {
                let loaded = configuration.load(Voice::Answer)?;
                let format = match output.output {
                    Output::Text => config::Format::Text,
                    Output::Json => config::Format::Json,
                };
                print(&config::show(&loaded, format))?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Explain(args) => explain(args),
            Command::List(args) => list(args),
            Command::Top(args) => runtime()?.block_on(top(args)),
            Command::Check(OutputAndConfiguration { output, configuration }) => {
                let config = configuration.load(Voice::Answer)?.config;
                let answer = commands::check::check(&config, output.output);
                told(&runtime()?.block_on(answer)?)
            }
            Command::Events(args) => report::events(args),
            Command::Bundle(args) => report::bundle(args),
            Command::Completions { shell } => {
                print(&commands::manual::completions(described(), shell))?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Man { dir } => man(dir.as_deref()),
        }
    }
}

/// The command line as it is read and described. Commands that only ask have all settings of the daemon,
/// but their short help names those alone that say where objects are from.
fn described() -> clap::Command {
    let source = ["config", "kubeconfig", "master", "manifests", "hostname-override"];
    Cli::command().mut_subcommands(|command| match command.get_name() {
        "run" | "config" => command,
        _ => command.mut_args(|arg| {
            let is_setting =
                arg.get_help_heading().is_some_and(|heading| heading == flags::HEADING);
            let hidden = is_setting && !source.contains(&arg.get_id().as_str());
            if hidden { arg.hide_short_help(true) } else { arg }
        }),
    })
}

fn run(args: &RunArgs) -> Result<ExitCode, CliError> {
    let (loaded, journal) = args.configuration.load_silently(Voice::Events)?;
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
        let ours = commands::cleanup::own();
        let theirs = commands::cleanup::kube_proxy();
        ours.and(theirs)?;
    } else if args.init_only {
        app::prepare(&loaded.config.live)?;
    } else {
        // While there is one thread.
        host::keep_little_memory();
        app::confine(&loaded.config)?;
        runtime()?.block_on(app::run(args.configuration.flags(), loaded, journal))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    // Two workers: one can decode while the other receives; the kernel has a thread of its own.
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| CliError::System { step: "start the runtime", source })
}

/// Prints to standard output; false if nobody reads it any more.
fn print(text: &str) -> Result<bool, CliError> {
    // Colours are for a terminal, unless NO_COLOR says no.
    let write = || {
        let mut out = anstream::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    };
    match write() {
        // A reader like `head` had enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(source) => Err(CliError::System { step: "write to standard output", source }),
        Ok(()) => Ok(true),
    }
}

/// Prints a command's answer.
fn told(answer: &Answer) -> Result<ExitCode, CliError> {
    print(&answer.text)?;
    Ok(match answer.verdict {
        Verdict::Good => ExitCode::SUCCESS,
        Verdict::Attention => ExitCode::from(1),
        Verdict::Bad => ExitCode::from(2),
    })
}

fn man(dir: Option<&std::path::Path>) -> Result<ExitCode, CliError> {
    let fail = |source| CliError::System { step: "write the man pages", source };
    match dir {
        None => drop(print(&commands::manual::page(described()).map_err(fail)?)?),
        Some(dir) => commands::manual::pages(described(), dir).map_err(fail)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn list(args: ListArgs) -> Result<ExitCode, CliError> {
    let ListArgs { namespace, service, address, wanted, output, configuration } = args;
    let config = configuration.load(Voice::Answer)?.config;
    let filter = commands::list::Filter { namespace, service, address, wanted };
    told(&runtime()?.block_on(commands::list::list(&config, &filter, output.output))?)
}

async fn top(args: TopArgs) -> Result<ExitCode, CliError> {
    let TopArgs { interval, once, output, configuration } = args;
    let config = configuration.load(Voice::Answer)?.config;
    let live = !once && std::io::stdout().is_terminal();
    let mut top = Top::begin(&config).await?;
    while let Some(under_way) = &mut top {
        tokio::time::sleep(interval).await;
        let Some(board) = under_way.next().await? else { break };
        let text = match output.output {
            // One line each, so that a reader of a stream knows where one ends.
            Output::Json => serde_json::to_string(&board).expect("plain values are JSON") + "\n",
            Output::Text if live => {
                let (width, height) = terminal_size::terminal_size()
                    .map_or((80, 24), |(width, height)| (width.0, height.0));
                // To the corner, and without what was there before. It is no colour: NO_COLOR does not
                // take it away.
                let _ = std::io::stdout().write_all(b"\x1b[H\x1b[J");
                board.text(width.into(), height.saturating_sub(1).into())
            }
            Output::Text => board.text(80, usize::MAX) + if once { "" } else { "\n" },
        };
        if !print(&text)? || once {
            return Ok(ExitCode::SUCCESS);
        }
    }
    print(commands::top::OFF)?;
    Ok(ExitCode::from(1))
}

fn explain(args: ExplainArgs) -> Result<ExitCode, CliError> {
    let ExplainArgs { target, from, interface, wanted, output, configuration } = args;
    let config = configuration.load(Voice::Answer)?.config;
    let question = commands::explain::Question { target, from, interface, wanted };
    let answer = commands::explain::explain(&config, &question, output.output);
    told(&runtime()?.block_on(answer)?)
}
