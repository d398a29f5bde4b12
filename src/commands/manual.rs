//! Shell completions and man pages, made from the same description that the command line is read by.

use std::path::Path;

use clap::Command;
use clap_complete::Shell;

/// Name of the program.
const NAME: &str = "nftproxy";

/// The completion script for a shell.
#[must_use]
pub fn completions(mut command: Command, shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, NAME, &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// The man page of the program, in roff.
pub fn page(command: Command) -> std::io::Result<String> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command).render(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Writes the man pages of the program and of each of its commands into a directory.
pub fn pages(command: Command, dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    clap_mangen::generate_to(command.disable_help_subcommand(true), dir)
}
