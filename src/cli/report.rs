//! Commands that do not answer in one text: what is told as it happens, and what is written to a file.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::process::ExitCode;

use super::args::{BundleArgs, EventsArgs};
use super::log::Voice;
use super::{CliError, runtime};
use crate::commands::CommandError;
use crate::commands::bundle::{self, Bundle};
use crate::commands::events::{self, Question};

pub(super) fn events(args: EventsArgs) -> Result<ExitCode, CliError> {
    let EventsArgs { last, no_follow, output, configuration } = args;
    let config = configuration.load(Voice::Answer)?.config;
    let question = Question { last, follow: !no_follow, output: output.output };
    let told = events::events(&config, question, |text| {
        let mut out = anstream::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => Ok(ControlFlow::Continue(())),
            // A reader like `head` had enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
            Err(source) => Err(CliError::System { step: "write to standard output", source }),
        }
    });
    runtime()?.block_on(told)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn bundle(args: BundleArgs) -> Result<ExitCode, CliError> {
    let BundleArgs { output, configuration } = args;
    let loaded = configuration.load(Voice::Answer)?;
    let mut stderr = std::io::stderr();
    let watched = stderr.is_terminal();
    let made = bundle::bundle(&loaded, |part| {
        if watched {
            // Whoever waits may know for what.
            drop(writeln!(stderr, "{part} ..."));
        }
    });
    let Bundle { name, bytes, missing } = runtime()?.block_on(made).map_err(CommandError::from)?;
    let mut stdout = std::io::stdout().lock();
    if output.as_ref().is_some_and(|path| path.as_os_str() == "-") {
        let write = |source| CliError::System { step: "write to standard output", source };
        stdout.write_all(&bytes).and_then(|()| stdout.flush()).map_err(write)?;
        return Ok(ExitCode::SUCCESS);
    }
    let path = output.unwrap_or_else(|| PathBuf::from(name));
    // Names and addresses of a cluster are not for everybody on this host.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let written = file.and_then(|mut file| file.write_all(&bytes));
    written.map_err(|source| CliError::File { path: path.clone(), source })?;
    let mut text = format!("wrote {} ({} bytes)\n", path.display(), bytes.len());
    for part in &missing {
        let _ = writeln!(text, "without {part}");
    }
    super::print(&text)?;
    Ok(ExitCode::SUCCESS)
}
