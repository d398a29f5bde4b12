//! What `explain` says of every case of the table must be what the table says, which real packets do
//! ([`super::nftproxy_does_what_the_table_says`]); and before and after every change over time it must say
//! what the next packet then meets.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Command;

use serde_json::Value;

use super::changes::list;
use super::proxies::{Nftproxy, Proxy as _};
use super::table::{Case, How, Met, Protocol, ROWS};
use super::world::{HOST_NETWORK_ELSEWHERE, Objects, Setting, build};
use super::{asking, cases};
use crate::http::get;
use crate::net::{NODE, Net, POD_A, POD_B, REMOTE, ip};

/// Rows that `explain` is not asked of here, and why.
const NOT_ASKED: &[(u8, &str)] = &[
    (55, "node ports on localhost: `explain.rs` asks, under nftproxy's own flag"),
    (56, "as 55"),
    (100, "of the API server's admission: no packet"),
    (124, "the health servers are programs of the host: `health.rs`"),
    (125, "as 124"),
    (126, "as 124"),
    (127, "as 124"),
];

/// What is explained of one possible outcome, in the words of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    /// It is translated to this one, at this port, and is masqueraded or not.
    Sent(&'static str, u16, bool),
    LeftAlone,
    Refused,
    Dropped,
}

fn said(outcome: &Value, family: usize) -> Said {
    match outcome["fate"].as_str().unwrap() {
        "rejected" => return Said::Refused,
        "dropped" => return Said::Dropped,
        "passes" if outcome["translated"] == false => return Said::LeftAlone,
        _ => {}
    }
    let to: SocketAddr = outcome["to"].as_str().unwrap().parse().unwrap();
    let all = [("a", POD_A), ("b", POD_B), ("remote", REMOTE), ("host", NODE)];
    // What is said to be `remote` in the table answers for the other node, too.
    let all = all.into_iter().chain([("remote", HOST_NETWORK_ELSEWHERE)]);
    let mut found = all.filter(|(_, addresses)| ip(addresses[family]) == to.ip());
    let (by, _) = found.next().unwrap_or_else(|| panic!("nobody has {to}"));
    Said::Sent(by, to.port(), outcome["masqueraded"] == true)
}

/// Whether somebody who was told this meets that.
fn leads_to(said: &Said, met: Met, case: &Case, family: usize) -> bool {
    match (said, met) {
        // The sender of an INIT is not told whom the server saw.
        (Said::Sent(by, 8080, _), Met::Own(who)) if case.protocol == Protocol::Sctp => *by == who,
        (Said::Sent(by, 8080, false), Met::Own(who))
        | (Said::Sent(by, 8080, true), Met::Masq(who))
        | (Said::Sent(by, 8081, false), Met::Own8081(who))
        | (Said::Sent(by, 8081, true), Met::Masq8081(who)) => *by == who,
        (Said::LeftAlone, Met::Untouched(_))
        | (Said::Refused, Met::Refused)
        | (Said::Dropped, Met::Lost) => true,
        // Nobody of this host listens there.
        (Said::LeftAlone, Met::Refused) => case.to.address(family).ip().is_loopback(),
        // Nobody accepts what comes from its own address: the other node's pod, given itself.
        (Said::Sent(by, _, false), Met::Lost) => *by == case.from,
        _ => false,
    }
}

/// As it is asked about.
fn target(to: SocketAddr, protocol: Protocol) -> String {
    match protocol {
        Protocol::Tcp => to.to_string(),
        Protocol::Udp => format!("{to}/udp"),
        Protocol::Sctp => format!("{to}/sctp"),
        Protocol::Echo => format!("{}/icmp", to.ip()),
    }
}

/// The node's interface that packets from a namespace come in by; None for those of the node itself.
fn interface(from: &str) -> Option<String> {
    match from {
        "node" => None,
        "client" => Some("eth0".into()),
        pod => Some(format!("pod-{pod}")),
    }
}

/// Asked of the daemon, which explains by the same rules as the command and is quicker to ask; that what the
/// kernel holds is explained the same is for [`crate::explain`].
fn explain(net: &Net, case: &Case, family: usize) -> Value {
    let to = case.to.address(family);
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("target", &target(to, case.protocol));
    if let Some(interface) = interface(case.from) {
        query.append_pair("from", &asking::own(case.from, to).to_string());
        query.append_pair("interface", &interface);
    }
    let daemon = crate::packets::to("127.0.0.1", 10249);
    get(net, "node", daemon, &format!("/debug/explain?{}", query.finish())).unwrap().json()
}

/// What is not as the table says, in words.
fn objection(net: &Net, number: u8, case: &Case, family: usize) -> Option<String> {
    let answer = explain(net, case, family);
    let outcomes = answer["outcomes"].as_array().unwrap();
    let said: Vec<_> = outcomes.iter().map(|outcome| said(outcome, family)).collect();
    let is_met = |met: &Met| said.iter().any(|said| leads_to(said, *met, case, family));
    let is_right = |said: &Said| case.expected.iter().any(|met| leads_to(said, *met, case, family));
    let all_met = if case.one_of { said.len() == 1 } else { case.expected.iter().all(is_met) };
    if all_met && !said.is_empty() && said.iter().all(is_right) {
        return None;
    }
    let (from, to, expected) = (case.from, case.to.address(family), case.expected);
    let setting = case.setting;
    Some(format!(
        "{number}: {from} to {to}, {setting:?}: explained {said:?}, expected {expected:?}: {}",
        answer["summary"]
    ))
}

/// What is explained at a step of the changes over time, of the next packet.
#[derive(Debug)]
pub(super) struct Explained {
    /// As [`asking::words`] puts what is met; `left alone` for what is not translated.
    pub(super) words: String,
    /// Who is said to answer, or why nobody does.
    pub(super) by: String,
    /// Whether that is because the client is remembered.
    pub(super) remembered: bool,
}

/// Asked of the command, which goes by what the kernel holds: that knows who was here before. The client
/// is a namespace, by an address of it or its own.
pub(super) fn of_kernel(
    net: &Net,
    (namespace, address): (&str, Option<&str>),
    to: SocketAddr,
    protocol: Protocol,
) -> Explained {
    let from = address.map_or_else(|| asking::own(namespace, to), ip);
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &net.name("node"), env!("CARGO_BIN_EXE_nftproxy")]);
    command.args(["explain", &target(to, protocol), "--output", "json"]);
    if let Some(interface) = interface(namespace) {
        command.args(["--from", &from.to_string(), "--interface", &interface]);
    }
    let output = command.env_remove("RUST_LOG").output().unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(answer["tables"], "what the kernel holds", "{answer:#}");
    let outcomes = answer["outcomes"].as_array().unwrap();
    let remembered = outcomes.iter().filter(|outcome| !outcome["remembered_in"].is_null()).count();
    assert!(remembered == 0 || remembered == outcomes.len(), "{answer:#}");
    let (mut words, mut by) = (BTreeSet::new(), BTreeSet::new());
    for outcome in outcomes {
        let nobody = match said(outcome, usize::from(to.is_ipv6())) {
            Said::Sent(name, port, masqueraded) => {
                let port = if port == 8080 { String::new() } else { format!(":{port}") };
                words.insert(format!("{name}{port} {}", if masqueraded { "masq" } else { "own" }));
                by.insert(name.to_owned());
                continue;
            }
            Said::LeftAlone => "left alone",
            Said::Refused => "refused",
            Said::Dropped => "lost",
        };
        words.insert(nobody.to_owned());
        by.insert(nobody.to_owned());
    }
    Explained { words: list(&words), by: list(&by), remembered: remembered > 0 }
}

#[test]
fn every_row_is_explained_or_it_is_said_why_not() {
    for row in ROWS {
        let why_not = NOT_ASKED.iter().find(|(number, _)| *number == row.number);
        // That the others are asked is for those who ask.
        assert_eq!(why_not.is_some(), matches!(row.how, How::Absent(_)), "row {}", row.number);
    }
}

#[test]
fn every_case_of_the_table_is_explained_as_it_is() {
    let Some(net) = Net::new() else { return };
    build(&net);
    let mut proxy = Nftproxy::new(&net);
    let (mut asked, mut rows, mut wrong) = (0, BTreeSet::new(), Vec::new());
    for setting in Setting::ALL {
        proxy.start(setting, &Objects::default());
        let open: Vec<_> = cases()
            .filter(|(_, case)| case.setting == setting)
            .flat_map(|(number, case)| case.families.iter().map(move |f| (number, case, *f)))
            .collect();
        wrong
            .extend(open.iter().filter_map(|(number, case, f)| objection(&net, *number, case, *f)));
        asked += open.len();
        rows.extend(open.iter().map(|(number, ..)| *number));
    }
    wrong.sort();
    assert!(wrong.is_empty(), "{} of {asked}:\n{}", wrong.len(), wrong.join("\n"));
    let with_cases = ROWS.iter().filter(|row| matches!(row.how, How::Cases(_)));
    assert_eq!(rows, with_cases.map(|row| row.number).collect());
    assert!(asked > 250, "{asked}");
}
