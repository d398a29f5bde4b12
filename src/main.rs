//! Process entry: the command line in, an exit code out.
//!
//! 0: done, and the answer is good; 1: the answer is that something differs, or nobody answers; 2: it
//! failed, the command line is wrong, or `check` found something bad.

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
