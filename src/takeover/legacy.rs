//! iptables as it was before nf_tables: read and changed by its own programs, as its kernel interface
//! replaces whole tables and is theirs alone to know.
//!
//! Only tables that the kernel already has are looked at: asking for another one would make it.

use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::process::{Command, Output, Stdio};

use super::chains::{Chain, Plan, TABLES};
use crate::model::Family;

/// The tables could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum LegacyError {
    /// None of the programs is there.
    #[error("{0} is not installed here")]
    Missing(String),
    /// The program failed.
    #[error("{program}: {reason}")]
    Failed {
        /// Its name.
        program: String,
        /// What it said, or why it could not be started.
        reason: String,
    },
}

/// A table as `iptables-save` prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) name: String,
    /// A rule is named by its text behind `-A CHAIN`.
    pub(super) chains: Vec<Chain<String>>,
}

/// Which of the tables in question a family has. The kernel shows that to root alone.
pub(super) fn tables(family: Family) -> std::io::Result<Vec<&'static str>> {
    let path = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    let names = match std::fs::read_to_string(path) {
        // The kernel has no such thing.
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        read => read?,
    };
    Ok(TABLES.into_iter().filter(|table| names.lines().any(|name| name == *table)).collect())
}

/// Reads the tables of a family.
pub(super) fn read(family: Family, tables: &[&str]) -> Result<Vec<Table>, LegacyError> {
    let program = program(family, "save")?;
    let mut all = Vec::new();
    for table in tables {
        let output = run(&program, &["-t", table], "")?;
        all.extend(parse(&String::from_utf8_lossy(&output.stdout)));
    }
    Ok(all)
}

/// Carries out a plan for one table, as a whole.
pub(super) fn remove(
    family: Family,
    table: &str,
    plan: &Plan<'_, String>,
) -> Result<(), LegacyError> {
    let program = program(family, "restore")?;
    // Another program may hold the lock.
    run(&program, &["--noflush", "-w", "5"], &script(table, plan)).map(drop)
}

fn prefix(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

/// The program of this name that is for the old tables.
fn program(family: Family, action: &str) -> Result<String, LegacyError> {
    let prefix = prefix(family);
    let own = format!("{prefix}-legacy-{action}");
    if run(&own, &["--version"], "").is_ok() {
        return Ok(own);
    }
    // Where there is no other kind, it goes without the word.
    let plain = format!("{prefix}-{action}");
    match run(&plain, &["--version"], "") {
        Ok(output) if !String::from_utf8_lossy(&output.stdout).contains("nf_tables") => Ok(plain),
        _ => Err(LegacyError::Missing(own)),
    }
}

fn run(program: &str, arguments: &[&str], input: &str) -> Result<Output, LegacyError> {
    let fail = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => LegacyError::Missing(program.to_owned()),
        _ => LegacyError::Failed { program: program.to_owned(), reason: error.to_string() },
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(fail)?;
    // Nobody writes to its output before it has read all of this; an input that it does not want to
    // read shows in how it ends.
    let _ = child.stdin.take().expect("it is piped").write_all(input.as_bytes());
    let output = child.wait_with_output().map_err(fail)?;
    if output.status.success() {
        return Ok(output);
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words = words.lines().find(|line| !line.trim().is_empty());
    let reason = words.map_or_else(|| output.status.to_string(), str::to_owned);
    Err(LegacyError::Failed { program: program.to_owned(), reason })
}

/// Reads the text of `iptables-save`.
pub(super) fn parse(text: &str) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(Table { name: name.to_owned(), chains: Vec::new() });
        }
        let Some(table) = tables.last_mut() else { continue };
        if let Some(declared) = line.strip_prefix(':') {
            let mut words = declared.split(' ');
            let name = words.next().unwrap_or_default().to_owned();
            let policy = words.next().unwrap_or("-");
            let (base, drops) = (policy != "-", policy == "DROP");
            table.chains.push(Chain { name, base, drops, jumps: Vec::new() });
        } else if let Some((chain, rule)) = appended(line)
            && let Some(target) = target(rule)
            && let Some(chain) = table.chains.iter_mut().find(|c| c.name == chain)
        {
            chain.jumps.push((rule.to_owned(), target.to_owned()));
        }
    }
    tables
}

/// `[1:60] -A CHAIN …`: the chain and the rest. Counters stand in front if they were asked for.
fn appended(line: &str) -> Option<(&str, &str)> {
    let counted = line.strip_prefix('[').and_then(|rest| rest.split_once("] "));
    counted.map_or(line, |(_, rest)| rest).strip_prefix("-A ")?.split_once(' ')
}

/// The chain a rule leads to: what follows `-j` or `-g` outside of quotes.
fn target(rule: &str) -> Option<&str> {
    let mut quoted = false;
    let mut escaped = false;
    let mut wanted = false;
    let mut start = 0;
    for (at, character) in rule.char_indices().chain([(rule.len(), ' ')]) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => {
                let word = &rule[start..at];
                if wanted {
                    return Some(word);
                }
                wanted = word == "-j" || word == "-g";
                start = at + 1;
            }
            _ => {}
        }
    }
    None
}

/// Input of `iptables-restore --noflush`: a chain that is declared is flushed.
pub(super) fn script(table: &str, plan: &Plan<'_, String>) -> String {
    let mut text = format!("*{table}\n");
    for chain in &plan.chains {
        let _ = writeln!(text, ":{chain} - [0:0]");
    }
    for (chain, rule) in &plan.rules {
        let _ = writeln!(text, "-D {chain} {rule}");
    }
    for chain in &plan.chains {
        let _ = writeln!(text, "-X {chain}");
    }
    text + "COMMIT\n"
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::chains::{Purpose, plan};
    use super::*;

    /// Of kube-proxy v1.37.2 in iptables mode, on a node of the test network, by `iptables-legacy-save`.
    const SAVED: &str = include_str!("../../tests/it/reference/kube-proxy-1.37.2.iptables-save");

    /// The script for a table of a text.
    fn script_of(text: &str, table: &str, purpose: Purpose) -> String {
        let tables = parse(text);
        let found = tables.iter().find(|found| found.name == table).unwrap();
        script(table, &plan(&found.chains, purpose))
    }

    fn lines<'a>(script: &'a str, start: &str) -> Vec<&'a str> {
        script.lines().filter_map(|line| line.strip_prefix(start)).collect()
    }

    #[test]
    fn rules_of_the_kernels_chains_go_word_by_word_and_chains_are_flushed_before() {
        let script = script_of(SAVED, "mangle", Purpose::TakeOver);
        assert_eq!(script, "*mangle\n:KUBE-PROXY-CANARY - [0:0]\n-X KUBE-PROXY-CANARY\nCOMMIT\n");
        let nat = script_of(SAVED, "nat", Purpose::TakeOver);
        let expected = [
            "PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES",
            "OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES",
            "POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING",
        ];
        assert_eq!(lines(&nat, "-D "), expected);
        // Everything that is declared in this table is kube-proxy's.
        let declared = SAVED.split("*nat").nth(1).unwrap().lines();
        let declared: BTreeSet<_> =
            declared.filter_map(|line| line.strip_prefix(':')?.strip_suffix(" - [0:0]")).collect();
        assert_eq!(declared.len(), 15);
        assert_eq!(lines(&nat, "-X ").into_iter().collect::<BTreeSet<_>>(), declared);
        let flushed =
            lines(&nat, ":").into_iter().map(|line| line.strip_suffix(" - [0:0]").unwrap());
        assert_eq!(flushed.collect::<BTreeSet<_>>(), declared);
    }

    #[test]
    fn what_is_the_kubelets_stays() {
        let text = SAVED
            .replace(
                ":KUBE-SERVICES - [0:0]\n",
                ":KUBE-SERVICES - [0:0]\n:KUBE-MARK-DROP - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n\
                 :KUBE-IPTABLES-HINT - [0:0]\n-A KUBE-SERVICES -j KUBE-MARK-DROP\n",
            )
            .replace("-A INPUT -j KUBE-FIREWALL", "[7:420] -A INPUT -j KUBE-FIREWALL");
        for table in ["filter", "nat"] {
            let script = script_of(&text, table, Purpose::Cleanup);
            let mine = ["KUBE-FIREWALL", "KUBE-MARK-DROP", "KUBE-KUBELET", "KUBE-IPTABLES-HINT"];
            for name in mine {
                assert!(!script.contains(name), "{name} in {script}");
            }
            assert!(script.contains("-X KUBE-SERVICES\n"));
        }
    }

    #[test]
    fn a_chain_that_somebody_elses_rule_leads_to_stays_with_what_it_leads_to() {
        let text = SAVED.replace(
            "-A PREROUTING",
            "-A CNI-SETMARK -m comment --comment \"-j KUBE-SERVICES \\\" -j\" -j KUBE-MARK-MASQ\n\
             -A MINE -g KUBE-SVC-CS3DQ6LQU5GXEY2W\n-A PREROUTING",
        );
        let text =
            text.replace(":KUBE-MARK-MASQ", ":CNI-SETMARK - [0:0]\n:MINE - [0:0]\n:KUBE-MARK-MASQ");
        let tables = parse(&text);
        let nat = tables.iter().find(|table| table.name == "nat").unwrap();
        let plan = plan(&nat.chains, Purpose::Cleanup);
        let stay: Vec<_> = plan.stay.iter().map(|(chain, why)| format!("{chain}: {why}")).collect();
        let expected = [
            "KUBE-MARK-MASQ: a rule in CNI-SETMARK leads to it",
            "KUBE-SEP-2CJYZDINEJRAITQ4: KUBE-SVC-CS3DQ6LQU5GXEY2W stays and leads to it",
            "KUBE-SEP-UYH42M7YNHVOELEZ: KUBE-SVC-CS3DQ6LQU5GXEY2W stays and leads to it",
            "KUBE-SVC-CS3DQ6LQU5GXEY2W: a rule in MINE leads to it",
        ];
        assert_eq!(stay, expected);
        assert_eq!(plan.chains.len(), 15 - 4);
        assert_eq!(plan.rules.len(), 3);
    }

    #[test]
    fn where_nothing_is_forwarded_by_default_the_chain_that_allows_it_outlives_a_take_over() {
        let text = SAVED.replace(":FORWARD ACCEPT", ":FORWARD DROP");
        let script = script_of(&text, "filter", Purpose::TakeOver);
        assert!(!script.contains("KUBE-FORWARD"), "{script}");
        assert_eq!(lines(&script, "-D ").len(), 8);
        assert!(script.contains("-X KUBE-SERVICES\n"));
        for script in [
            script_of(&text, "filter", Purpose::Cleanup),
            script_of(SAVED, "filter", Purpose::TakeOver),
        ] {
            assert!(script.contains("-X KUBE-FORWARD\n"), "{script}");
            assert_eq!(lines(&script, "-D ").len(), 9);
        }
    }

    #[test]
    fn any_text_is_read_without_panic() {
        for text in
            ["", "*", ":x", "*nat\n:", "*nat\n:a - [0:0]\n-A a -j", "[1:2] -A\n*nat\n-A b \"\\"]
        {
            let _ = parse(text);
        }
        assert_eq!(target("-m comment --comment \"say \\\"-j X\\\"\" -j Y --nflog"), Some("Y"));
        assert_eq!(target("-j"), None);
    }

    proptest::proptest! {
        /// Nothing that stands in the tables becomes a command of its own.
        #[test]
        fn a_script_is_flushes_removals_and_nothing_else(
            lines in proptest::collection::vec(
                "(\\*[a-z]{0,3}|:KUBE-SERVICES|:[A-Z-]{0,9}|-A (INPUT|KUBE-SERVICES)|\\[1:2\\] -A [A-Z]{0,3})\
                 ( (- \\[0:0\\]|-j KUBE-SERVICES|-j|-g KUBE-SVC-A|\"[ a-zA-Z\\\\-]{0,9}\"?|COMMIT|\\PC{0,9})){0,4}",
                0..12,
            ),
        ) {
            for table in parse(&lines.join("\n")) {
                for purpose in [Purpose::TakeOver, Purpose::Cleanup] {
                    let script = script("nat", &plan(&table.chains, purpose));
                    let mut commands = script.lines();
                    assert_eq!((commands.next(), commands.next_back()), (Some("*nat"), Some("COMMIT")));
                    for command in commands {
                        let known = [":KUBE-", "-D ", "-X KUBE-"];
                        assert!(known.iter().any(|known| command.starts_with(known)), "{script}");
                    }
                }
            }
        }
    }
}
