//! Who reaches whom, row by row of a table of scenarios (`tests/scenario-comparison.md`), at the packet.
//!
//! One runner asks every row of any proxy: of nftproxy always, and on demand of the real kube-proxy
//! too, which shows what was only read about it. A proxy is started once for each configuration, with
//! all objects of all rows; the rows that are about changes follow.

mod asking;
mod changes;
mod explaining;
mod proxies;
mod report;
mod services;
mod table;
mod world;

use std::collections::BTreeMap;
use std::time::Duration;

use self::changes::{Changes, Explanations};
use self::proxies::{KubeProxy, Nftproxy, Proxy};
use self::table::{Case, How, ROWS};
use self::world::{Objects, Setting};
use crate::net::{Net, in_netns};

/// What came of one case.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    case: String,
    setting: Setting,
    family: Option<usize>,
    expected: String,
    seen: String,
    right: bool,
}

/// By the number of the row.
type Findings = BTreeMap<u8, Vec<Finding>>;

/// All cases, with the numbers of their rows.
fn cases() -> impl Iterator<Item = (u8, Case)> {
    ROWS.iter().flat_map(|row| {
        let cases = if let How::Cases(cases) = row.how { cases } else { &[] };
        cases.iter().map(|case| (row.number, *case))
    })
}

fn run(net: &Net, proxy: &mut dyn Proxy) -> (Findings, Explanations) {
    let mut findings = Findings::new();
    // The changes come last, behind the configuration they are made under.
    let mut settings = Setting::ALL;
    settings.reverse();
    for setting in settings {
        proxy.start(setting, &Objects::default());
        let cases: Vec<_> = cases().filter(|(_, case)| case.setting == setting).collect();
        assert!(!cases.is_empty(), "no row is about {setting:?}");
        for (number, finding) in asking::ask_all(net, &cases, proxy.patience()) {
            findings.entry(number).or_default().push(finding);
        }
    }
    let (objects, found) = (Objects::default(), Vec::new());
    let explanations = Explanations::default();
    let changes = Changes { net, proxy, objects, findings: found, explanations };
    let (found, explanations) = changes.run();
    for (number, finding) in found {
        findings.entry(number).or_default().push(finding);
    }
    for row in ROWS {
        let found = findings.contains_key(&row.number);
        assert_eq!(found, !matches!(row.how, How::Absent(_)), "row {}", row.number);
    }
    (findings, explanations)
}

/// What is not as the table says, a line each.
fn wrong(findings: &Findings) -> Vec<String> {
    let all = findings.iter().flat_map(|(number, list)| list.iter().map(move |f| (number, f)));
    all.filter(|(_, finding)| !finding.right)
        .map(|(number, finding)| {
            let Finding { case, setting, family, expected, seen, .. } = finding;
            let family = ["IPv4", "IPv6"][family.unwrap_or(0)];
            format!("{number}: {case}, {setting:?}, {family}: expected {expected}; seen {seen}")
        })
        .collect()
}

#[test]
fn every_row_is_there_once() {
    let numbers: Vec<u8> = ROWS.iter().map(|row| row.number).collect();
    assert_eq!(numbers, (1..=127).collect::<Vec<u8>>());
}

#[test]
fn nftproxy_does_what_the_table_says() {
    let Some(net) = Net::new() else { return };
    world::build(&net);
    let (findings, explanations) = run(&net, &mut Nftproxy::new(&net));
    let wrong = wrong(&findings);
    assert!(
        wrong.is_empty(),
        "{} findings are not as expected:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    // What cases are about is explained in `explaining`.
    assert!(explanations.wrong.is_empty(), "{}", explanations.wrong.join("\n"));
    let over_time = ROWS.iter().filter(|row| matches!(row.how, How::OverTime));
    assert_eq!(explanations.rows, over_time.map(|row| row.number).collect());
}

/// No case is as expected by itself, but those in which a proxy has nothing to do.
#[test]
fn without_a_proxy_there_is_only_what_it_leaves_alone() {
    let Some(net) = Net::new() else { return };
    world::build(&net);
    let (alone, taken): (Vec<_>, Vec<_>) = cases().partition(|(_, case)| case.is_left_alone());
    for (cases, right) in [(alone, true), (taken, false)] {
        let found = asking::ask_all(&net, &cases, Duration::ZERO);
        let other: Vec<_> = found.iter().filter(|(_, finding)| finding.right != right).collect();
        assert!(!found.is_empty() && other.is_empty(), "right: {}: {other:#?}", !right);
    }
}

/// Runs both, and writes what they do beside what the table says.
#[test]
#[ignore = "needs the real kube-proxy, and writes tests/scenario-comparison.md"]
fn comparison() {
    let net = Net::new().expect("namespaces need root");
    world::build(&net);
    let mut nftproxy = Nftproxy::new(&net);
    let (ours, _) = run(&net, &mut nftproxy);
    let our_title = nftproxy.title();
    drop(nftproxy);
    // With namespaces of its own, so that nothing of the other is left.
    let net = Net::new().unwrap();
    world::build(&net);
    let (theirs, their_title) = in_netns(&net.name("client"), || {
        let mut kube_proxy = KubeProxy::new(&net);
        (run(&net, &mut kube_proxy).0, kube_proxy.title())
    });
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scenario-comparison.md");
    let text = report::markdown(&ours, &theirs, [our_title, their_title]);
    std::fs::write(path, text).unwrap();
    for line in wrong(&theirs) {
        eprintln!("kube-proxy, {line}");
    }
    let wrong = wrong(&ours);
    assert!(wrong.is_empty(), "nftproxy:\n{}", wrong.join("\n"));
}
