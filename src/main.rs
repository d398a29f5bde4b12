//! Process entry: the command line in, an exit code out.
//!
//! 0: done; 1: `diff` found a difference, and nothing else; 2: it failed, or the command line is wrong.

use std::process::ExitCode;

use nftproxy::cli::Cli;
use tracing::error;

fn main() -> ExitCode {
    match Cli::of_process().execute() {
        Ok(code) => code,
        Err(failure) => {
            error!("{failure}");
            // As with `diff` and `cmp`: 1 is an answer, 2 is trouble.
            ExitCode::from(2)
        }
    }
}
