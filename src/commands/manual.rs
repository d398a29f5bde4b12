//! Shell completions and man pages, made from the same description that the command line is read by.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use clap::{Arg, Command};
use clap_complete::Shell;
use clap_mangen::Man;

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
pub fn page(command: Command) -> io::Result<String> {
    let mut command = for_manual(command);
    command.build();
    in_roff(&man(&command), command)
}

/// Writes the man pages of the program and of each of its commands into a directory.
pub fn pages(command: Command, dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let mut command = for_manual(command.mut_subcommands(for_manual));
    command.build();
    let commands = command.get_subcommands().filter(|command| !command.is_hide_set());
    for command in commands.chain([&command]) {
        let man = man(command);
        fs::write(dir.join(man.get_filename()), in_roff(&man, command.clone())?)?;
    }
    Ok(())
}

/// A command as its page describes it. What is left out of the short help has no text in a page; so the page of
/// `run` has all settings, and says for those of kube-proxy that they have no effect, and other pages refer to it.
fn for_manual(command: Command) -> Command {
    let has_all = ["run", "config"].contains(&command.get_name());
    let has_hidden = command.get_arguments().any(Arg::is_hide_short_help_set);
    let command = command.disable_help_subcommand(true).mut_args(|arg| {
        if arg.is_hide_short_help_set() && !has_all {
            arg.hide(true)
        } else {
            arg.hide_short_help(false)
        }
    });
    if has_hidden && !has_all && command.get_after_help().is_none() {
        return command.after_help("All settings of nftproxy-run(1) can be given as well.");
    }
    command
}

fn man(command: &Command) -> Man {
    let source = format!("{NAME} {}", env!("CARGO_PKG_VERSION"));
    Man::new(command.clone()).source(source)
}

/// A page; with the usage in the place of a list of all options, of which there are eighty.
fn in_roff(man: &Man, mut command: Command) -> io::Result<String> {
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    let usage = command.render_usage().to_string().replace('-', "\\-");
    let usage: Vec<_> = usage.trim_start_matches("Usage:").lines().map(str::trim).collect();
    writeln!(text, ".SH SYNOPSIS\n{}", usage.join("\n.br\n"))?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut text)?;
    }
    if command.get_after_help().is_some() || command.get_after_long_help().is_some() {
        man.render_extra_section(&mut text)?;
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}
