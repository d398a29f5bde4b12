//! Process entry: the command line in, an exit code out.
//!
//! 0: done; 1: `diff` found a difference, or a command failed; 2: the command line is wrong.

use std::process::ExitCode;

use nftproxy::cli::Cli;
use tracing::error;

fn main() -> ExitCode {
    match Cli::of_process().execute() {
        Ok(code) => code,
        Err(failure) => {
            error!("{failure}");
            ExitCode::FAILURE
        }
    }
}
