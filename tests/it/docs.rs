//! What is written under `deploy/docs` and in the README is true: references are made from the
//! program's own tables, quoted rules are rules of the example, links lead somewhere, and sessions
//! answer what they show ([`crate::walkthrough`]).
//!
//! `INSTA_UPDATE=always` writes anew what is made by these tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nftproxy::config::{Effect, FIELDS, Field, LONE_FLAGS, Type};
use nftproxy::metrics::{Description, Metrics};

use crate::commands::manifests;
use crate::objects::{Svc, slice};

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Whether files are to be written anew.
pub(crate) fn is_renewing() -> bool {
    std::env::var_os("INSTA_UPDATE").is_some_and(|value| value == "always")
}

/// Holds a file to a text.
pub(crate) fn holds(path: &str, text: &str) {
    let file = root().join(path);
    let found = fs::read_to_string(&file).unwrap_or_default();
    if found == text {
        return;
    }
    if is_renewing() {
        fs::write(file, text).unwrap();
        return;
    }
    let mut lines = found.lines().zip(text.lines()).enumerate();
    let line = lines.find(|(_, (found, text))| found != text);
    panic!(
        "{path} is stale: {line:?}, {} and {} lines (INSTA_UPDATE=always renews it)",
        found.lines().count(),
        text.lines().count()
    );
}

const MADE: &str = "<!-- Made by tests/it/docs.rs from the program's own tables; INSTA_UPDATE=always renews it. -->";

/// In a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;")
}

fn code(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("`{text}`") }
}

/// Every Markdown file that users read.
pub(crate) fn pages() -> Vec<PathBuf> {
    let listed = fs::read_dir(root().join("deploy/docs")).unwrap();
    let docs = listed.map(|entry| entry.unwrap().path());
    let mut pages: Vec<_> =
        docs.filter(|path| path.extension().is_some_and(|e| e == "md")).collect();
    pages.extend(
        ["README.md", "deploy/README.md", "deploy/monitoring/runbook.md"].map(|p| root().join(p)),
    );
    pages.sort();
    pages
}

#[test]
fn the_reference_of_metrics_is_made_from_the_metrics() {
    let metrics = Metrics::default();
    let mut all = metrics.described().to_vec();
    all.sort();
    let (own, shared): (Vec<_>, Vec<_>) =
        all.iter().partition(|metric| metric.name.starts_with("nftproxy_"));
    let table = |metrics: &[&Description]| -> String {
        let row = |metric: &&Description| {
            let Description { name, kind, labels, help } = metric;
            let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
            let help = help.strip_prefix("[ALPHA] ").unwrap_or(help);
            format!("| `{name}` | {kind} | {} | {} |\n", labels.join(", "), cell(help))
        };
        let rows: String = metrics.iter().map(row).collect();
        format!("| metric | type | labels | |\n| --- | --- | --- | --- |\n{rows}")
    };
    let text = format!(
        "{MADE}\n\n# Metrics\n\n\
         `/metrics` on `metricsBindAddress` (127.0.0.1:10249), in Prometheus' text format 0.0.4. Dashboard, alerts and how to\n\
         scrape: [observe](observe.md#monitoring).\n\n\
         {} metrics. A metric with labels is there from its first value on. Histograms have `_bucket`, `_sum` and `_count`.\n\n\
         ## Only in nftproxy\n\n{}\n\
         ## As in kube-proxy\n\n\
         Name, type, labels, buckets and help text are those of kube-proxy 1.37 in nftables mode, so that what was made for it\n\
         goes on working. What kube-proxy has and nftproxy has not is about Go, or about kube-proxy's own ways:\n\
         `tests/it/metrics.rs` has the list, with a reason for each.\n\n{}",
        all.len(),
        table(&own),
        table(&shared),
    );
    holds("deploy/docs/metrics.md", &text);
}

/// What a setting takes, in words.
fn kind(ty: Type) -> String {
    match ty {
        Type::Bool => "true or false".into(),
        Type::Int(0, max) if max == i64::from(i32::MAX) => "number".into(),
        Type::Int(min, max) => format!("{min} to {max}"),
        Type::Float => "number".into(),
        Type::Duration => "duration".into(),
        Type::Text => "text".into(),
        Type::OneOf(words) => {
            let words: Vec<_> =
                words.iter().filter(|word| !word.is_empty()).map(|w| code(w)).collect();
            words.join(", ")
        }
        Type::List => "list".into(),
        Type::Switches => "`Name: true` pairs".into(),
        Type::Any => "anything".into(),
    }
}

#[test]
fn the_reference_of_settings_is_made_from_the_settings() {
    let flag =
        |field: &Field| field.flag.map(|flag| code(&format!("--{flag}"))).unwrap_or_default();
    let (mut with, mut without, mut own) = (String::new(), String::new(), String::new());
    for field in FIELDS {
        let Field { path, ty, default, help, .. } = field;
        let when = match field.effect {
            Effect::None(reason) => {
                without += &format!("| `{path}` | {} | {} |\n", flag(field), cell(reason));
                continue;
            }
            Effect::Live => "at once",
            Effect::Start => "restart",
        };
        let rows = if path.starts_with("nftproxy.") { &mut own } else { &mut with };
        *rows += &format!(
            "| `{path}` | {} | {} | {} | {when} | {} |\n",
            flag(field),
            kind(*ty),
            code(default),
            cell(help)
        );
    }
    let mut lone = String::new();
    for flag in LONE_FLAGS {
        let what = flag
            .without_effect
            .map_or(flag.help.to_owned(), |why| format!("without effect: {why}"));
        lone += &format!("| `--{}` | {} |\n", flag.flag, cell(&what));
    }
    let head = "| field | flag | takes | default | a change takes effect | |\n| --- | --- | --- | --- | --- | --- |\n";
    let text = format!(
        "{MADE}\n\n# Configuration\n\n\
         `--config FILE` takes the `KubeProxyConfiguration` (v1alpha1) that kube-proxy takes, unchanged; nftproxy's own settings are\n\
         in a block `nftproxy:` of it. Every flag of kube-proxy's parses. `nftproxy config` prints every setting, its value, and who\n\
         said so.\n\n\
         - **Who wins.** As in kube-proxy: with a file, flags are left out with a warning, but for `--hostname-override`,\n\
         \u{20} `--master`, `--manifests`, those of `nftproxy.…` and those of the log.\n\
         - **A changed file** (a `ConfigMap` as well) is read again. What is marked *at once* takes effect without touching\n\
         \u{20} connections; for the rest the log asks for a restart. A file that cannot be used changes nothing.\n\
         - **A value that kube-proxy would act upon and nftproxy cannot** is an error with file, field and expectation. Unknown\n\
         \u{20} fields are reported, and left out.\n\n\
         ## nftproxy's own\n\n{head}{own}\n\
         ## kube-proxy's, with effect\n\n{head}{with}\n\
         ## kube-proxy's, without effect\n\nThey are accepted, and the log says so where they are set to something.\n\n\
         | field | flag | why it has none |\n| --- | --- | --- |\n{without}\n\
         ## Flags that no field says\n\nBeside `--config`, `--init-only`, `--cleanup`, `--write-config-to` and `--version`, which are kube-proxy's as well.\n\n\
         | flag | |\n| --- | --- |\n{lone}"
    );
    holds("deploy/docs/configuration.md", &text);
}

#[test]
fn the_reference_of_commands_is_what_help_says() {
    let help = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_nftproxy")).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}");
        String::from_utf8(output.stdout).unwrap().replace(env!("CARGO_PKG_VERSION"), "VERSION")
    };
    let top = help(&["--help"]);
    let listed = top.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed = listed.take_while(|line| !line.is_empty());
    let names = listed.filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next());
    let names: Vec<_> = names.filter(|name| *name != "help").map(str::to_owned).collect();
    assert!(names.len() >= 13, "{names:?}");
    let trimmed = |text: &str| -> String {
        text.lines().map(|line| format!("{}\n", line.trim_end())).collect::<String>()
    };
    let examples = top.split_once("Examples:").map_or("", |(_, rest)| rest);
    let mut text = format!(
        "{MADE}\n\n# Commands\n\n\
         What each is for, with real answers: [a walk through](walkthrough.md). Settings are in [configuration](configuration.md), and\n\
         every command that has to see things as the daemon does takes them; `--help` lists all, `nftproxy man --dir DIR` writes\n\
         man pages, `nftproxy completions SHELL` a script for the shell.\n\n```text\nExamples:{}```\n",
        trimmed(examples)
    );
    for name in &names {
        text += &format!("\n## {name}\n\n```text\n{}```\n", trimmed(&help(&[name, "-h"])));
    }
    holds("deploy/docs/commands.md", &text);
}

/// What a heading can be linked by.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_leads_somewhere() {
    let mut links = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            if link.contains("://") {
                continue;
            }
            let (file, fragment) = link.split_once('#').unwrap_or((link, ""));
            let target =
                if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link} leads nowhere", page.display());
            links += 1;
            if fragment.is_empty() {
                continue;
            }
            let there = fs::read_to_string(&target).unwrap();
            let mut headings = there.lines().filter(|line| line.starts_with('#'));
            let found =
                headings.any(|line| anchor(line.trim_start_matches('#').trim()) == fragment);
            assert!(found, "{}: {link}: no such heading", page.display());
        }
    }
    assert!(links > 20, "{links}");
}

/// Lines of an nft block that are meant literally; `…` stands for what is left out.
fn is_in_order(quoted: &str, text: &str) -> Result<(), String> {
    let mut rest = text.lines().map(str::trim).peekable();
    let mut after_gap = true;
    for line in quoted.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line == "…" {
            after_gap = true;
            continue;
        }
        if after_gap {
            while rest.peek().is_some_and(|found| *found != line) {
                rest.next();
            }
        }
        while rest.peek() == Some(&"") {
            rest.next();
        }
        match rest.next() {
            Some(found) if found == line => {}
            found => return Err(format!("{line:?} is not there, but {found:?}")),
        }
        after_gap = false;
    }
    Ok(())
}

/// Services of the kinds that the example does not have.
fn others() -> String {
    let service = |name, cluster_ip, spec: &[&str], balancer_ips: &[&str]| {
        let cluster_ips = &[cluster_ip];
        Svc { name, cluster_ips, ports: &[("", "TCP", 80, 0)], spec, balancer_ips }.yaml()
    };
    let two = ["10.244.2.5", "10.244.2.6"];
    let endpoints = |name, endpoints: &[&str]| slice(name, "1", &[("", "TCP", 8080)], endpoints);
    let ranges = ["loadBalancerSourceRanges: [198.51.100.0/24, 192.0.2.7/32]"];
    [
        service("restricted", "10.96.0.40", &ranges, &["203.0.113.7"]),
        endpoints("restricted", &two),
        service("local", "10.96.0.45", &["externalTrafficPolicy: Local"], &["203.0.113.8"]),
        endpoints("local", &["10.244.1.5!", "10.244.1.6!", "10.244.2.7"]),
        service("sticky", "10.96.0.50", &["sessionAffinity: ClientIP"], &[]),
        endpoints("sticky", &two),
    ]
    .concat()
}

fn rendered(manifests: &str, node: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_nftproxy"))
        .args(["render", "--family", "ip", "--manifests", manifests, "--hostname-override"])
        .args([node, "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"])
        .current_dir(root())
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Every block of rules in the page that explains them is, in this order, a part of what the example
/// renders to, or those Services.
#[test]
fn the_rules_that_are_explained_are_the_rules() {
    let page = fs::read_to_string(root().join("deploy/docs/ruleset.md")).unwrap();
    let (_dir, others) = manifests(&others());
    let text = rendered("deploy/example", "demo-node") + &rendered(&others, "node-1");
    let blocks: Vec<_> =
        page.split("```nft\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() > 5, "{}", blocks.len());
    for block in blocks {
        is_in_order(block, &text).unwrap_or_else(|error| panic!("{error}, in\n{block}"));
    }
    assert!(is_in_order("table ip nftproxy {\n}", &text).is_err(), "nothing is left out unsaid");
}
