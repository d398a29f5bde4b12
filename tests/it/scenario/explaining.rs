//! What `explain` says of every case of the table must be what the table says, which real packets do
//! ([`super::nftproxy_does_what_the_table_says`]).

use std::net::SocketAddr;

use serde_json::Value;

use super::proxies::{Nftproxy, Proxy as _};
use super::table::{Case, Met, Protocol};
use super::world::{HOST_NETWORK_ELSEWHERE, Objects, Setting, build};
use super::{asking, cases};
use crate::http::get;
use crate::net::{NODE, Net, POD_A, POD_B, REMOTE, ip};

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

/// Asked of the daemon, which explains by the same rules as the command and is quicker to ask; that what the
/// kernel holds is explained the same is for [`crate::explain`].
fn explain(net: &Net, case: &Case, family: usize) -> Value {
    let to = case.to.address(family);
    let protocol = match case.protocol {
        Protocol::Tcp | Protocol::Echo => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("target", &format!("{to}/{protocol}"));
    if case.from != "node" {
        let interface =
            if case.from == "client" { "eth0".into() } else { format!("pod-{}", case.from) };
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

#[test]
fn every_case_of_the_table_is_explained_as_it_is() {
    let Some(net) = Net::new() else { return };
    build(&net);
    let mut proxy = Nftproxy::new(&net);
    let (mut asked, mut wrong) = (0, Vec::new());
    for setting in Setting::ALL {
        proxy.start(setting, &Objects::default());
        let open: Vec<_> = cases()
            // A ping has no port to be explained.
            .filter(|(_, case)| case.setting == setting && case.protocol != Protocol::Echo)
            .flat_map(|(number, case)| case.families.iter().map(move |f| (number, case, *f)))
            .collect();
        wrong
            .extend(open.iter().filter_map(|(number, case, f)| objection(&net, *number, case, *f)));
        asked += open.len();
    }
    wrong.sort();
    assert!(wrong.is_empty(), "{} of {asked}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(asked > 250, "{asked}");
}
