//! kube-proxy's flags, made from the table of settings, and read the way kube-proxy reads them.
//!
//! A `DaemonSet` made for kube-proxy must work with this program's name in it. So every flag of the table
//! parses, with `--flag value`, `--flag=value` and, for switches, `--flag` alone; given twice, the last
//! one counts. What a value must look like is checked with the rest of the configuration.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::config::{Effect, FIELDS, LONE_FLAGS, Type};

/// What was given of the flags of the table.
#[derive(Clone, Debug, Default)]
pub(super) struct FieldArgs(pub(super) BTreeMap<&'static str, Vec<String>>);

/// Above the flags that have an effect.
pub(super) const HEADING: &str = "Configuration";

/// A flag of the table.
struct Flag {
    name: &'static str,
    ty: Type,
    help: String,
    has_effect: bool,
}

fn flags() -> impl Iterator<Item = Flag> {
    let fields = FIELDS.iter().filter_map(|field| {
        let (help, has_effect) = match field.effect {
            Effect::None(reason) => (format!("Without effect: {reason}"), false),
            Effect::Live | Effect::Start => (format!("{} [{}]", field.help, field.path), true),
        };
        Some(Flag { name: field.flag?, ty: field.ty, help, has_effect })
    });
    let lone = LONE_FLAGS.iter().map(|flag| {
        let reason = flag.without_effect;
        let help = reason.map_or(flag.help.into(), |reason| format!("Without effect: {reason}"));
        Flag { name: flag.flag, ty: flag.ty, help, has_effect: reason.is_none() }
    });
    fields.chain(lone)
}

fn arg(flag: Flag) -> Arg {
    let value = match flag.ty {
        _ if flag.name == "v" => "LEVEL",
        _ if flag.name == "manifests" => "PATH",
        _ if flag.name == "kubeconfig" => "FILE",
        _ if flag.name == "master" => "URL",
        Type::Bool => "BOOL",
        Type::Int(..) | Type::Float => "NUMBER",
        Type::Duration => "DURATION",
        Type::List => "LIST",
        Type::Switches => "NAME=BOOL,...",
        Type::OneOf(_) | Type::Text | Type::Any => "TEXT",
    };
    let mut arg = Arg::new(flag.name)
        .long(flag.name)
        .value_name(value)
        .action(ArgAction::Append)
        .allow_hyphen_values(true)
        .help(flag.help)
        .hide_short_help(!flag.has_effect)
        .help_heading(if flag.has_effect { HEADING } else { "Accepted for kube-proxy" });
    if flag.ty == Type::Bool {
        arg = arg.num_args(0..=1).require_equals(true).default_missing_value("true");
    }
    match flag.name {
        "v" => arg.short('v'),
        "logging-format" => arg.alias("log-format"),
        "hostname-override" => arg.env("NFTPROXY_HOSTNAME_OVERRIDE"),
        "manifests" => arg.conflicts_with_all(["kubeconfig", "master"]),
        _ => arg,
    }
}

impl FromArgMatches for FieldArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut this = Self::default();
        this.update_from_arg_matches(matches)?;
        Ok(this)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for flag in flags() {
            if let Some(values) = matches.get_many::<String>(flag.name) {
                self.0.insert(flag.name, values.cloned().collect());
            }
        }
        Ok(())
    }
}

impl Args for FieldArgs {
    fn augment_args(command: Command) -> Command {
        flags().fold(command, |command, flag| command.arg(arg(flag)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Long flags as kube-proxy takes them, with underscores as well, and with one dash as Go programs of
/// old did.
pub(super) fn normalized(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    args.map(|arg| arg.to_str().and_then(normal).unwrap_or(arg)).collect()
}

fn normal(arg: &str) -> Option<OsString> {
    let written = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'))?;
    let (name, value) = match written.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (written, None),
    };
    let name = name.replace('_', "-");
    if name == "version" {
        // kube-proxy's takes `raw` as well.
        return Some("--version".into());
    }
    let own = ["config", "init-only", "cleanup", "write-config-to", "log-format"];
    let known = name.len() > 1 && (own.contains(&&*name) || flags().any(|flag| flag.name == name));
    let value = value.map(|value| format!("={value}")).unwrap_or_default();
    known.then(|| OsStr::new(&format!("--{name}{value}")).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_taken_in_the_spellings_of_go() {
        let cases = [
            ("--cluster_cidr=10.0.0.0/8", "--cluster-cidr=10.0.0.0/8"),
            ("-cluster-cidr", "--cluster-cidr"),
            ("--version=raw", "--version"),
            ("--log_dir=a_b", "--log-dir=a_b"),
            ("-v=2", "-v=2"),
            ("--v=2", "--v=2"),
            ("--no_such", "--no_such"),
            ("-h", "-h"),
            ("a_b", "a_b"),
        ];
        for (given, expected) in cases {
            let args = normalized([OsString::from(given)].into_iter());
            assert_eq!(args, [OsString::from(expected)]);
        }
    }
}
