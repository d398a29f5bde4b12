//! The comparison of two proxies over the scenario table, as Markdown.

use std::fmt::Write as _;

use super::table::{How, ROWS};
use super::{Finding, Findings};

/// What there is to say where the real kube-proxy does something else, or where nothing can be seen.
const REMARKS: &[(u8, &str)] = &[
    (
        16,
        "the API server always has a ServiceCIDR; kube-proxy runs here as a user that may not see it",
    ),
    (64, "E2 is P2 itself here; a reply that goes past N1 is lost, whoever sends it"),
    (
        72,
        "the API server gives one number to two ports only if they are of one Service; of two \
         Services in manifests is a test in `tests/it/packets.rs`",
    ),
    (73, "port 30902, as the API server takes no node port 80"),
    (
        101,
        "kube-proxy: whichever it wrote last, which differs by family, node and sync; nftproxy: \
         the older of those that have endpoints, or else the first by name, on every node",
    ),
    (
        113,
        "kube-proxy deletes the entries of flows to the Service's addresses and leaves those to its \
         node port, which go on to an endpoint that is gone; nftproxy deletes both",
    ),
    (
        115,
        "kube-proxy goes by the port number and deletes the entry of a flow that it never \
         translated; nftproxy looks at the address, too: the flow is none of its business",
    ),
];

/// Rows of which kube-proxy meets one end or another, from run to run: what it met this time says nothing.
const BY_CHANCE: &[u8] = &[101];

/// Findings that are the same in both families are told once.
fn cell(findings: &[Finding], text: impl Fn(&Finding) -> &str) -> String {
    let mut parts: Vec<(String, String, Vec<usize>)> = Vec::new();
    for finding in findings {
        let setting = match finding.setting {
            super::world::Setting::Base => String::new(),
            other => format!(" ({other:?})"),
        };
        let case = format!("{}{setting}", finding.case);
        let text = text(finding).to_owned();
        match parts.iter_mut().find(|part| (&part.0, &part.1) == (&case, &text)) {
            Some(part) => part.2.extend(finding.family),
            None => parts.push((case, text, finding.family.into_iter().collect())),
        }
    }
    let lines = parts.iter().map(|(case, text, families)| {
        let family = match families[..] {
            [0] => "IPv4: ",
            [1] => "IPv6: ",
            _ => "",
        };
        format!("{case}: {family}{text}")
    });
    lines.collect::<Vec<_>>().join("<br>")
}

/// The whole file.
pub(crate) fn markdown(ours: &Findings, theirs: &Findings, titles: [String; 2]) -> String {
    let mut text = String::from(
        "# The scenario table at the packet: nftproxy and kube-proxy\n\n\
         Made by this command, which runs both on the same objects and replaces this file\n\
         (`tests/control-plane/build` makes the programs):\n\n\
         ```\n\
         cargo test --locked --test it scenario::comparison -- --ignored\n\
         ```\n\n\
         Rows and what is expected are those of `tests/it/scenario/table.rs`. *own*: the client's own\n\
         source address is seen; *masq*: an address of the node is. *beyond* and *daemon* answer what no\n\
         proxy takes: the world behind the default route, and a process of the node that listens on the\n\
         port. *lost*: no answer. All in both families, unless one is named.\n\n",
    );
    let [our_title, their_title] = titles;
    let mut table = format!(
        "| # | scenario | expected | {our_title} | {their_title} | compared |\n\
         | --- | --- | --- | --- | --- | --- |\n",
    );
    let (mut same, mut different, mut by_chance, mut absent) = (0, Vec::new(), Vec::new(), 0);
    for row in ROWS {
        let remark = REMARKS.iter().find(|(number, _)| *number == row.number).map(|(_, text)| text);
        if let How::Absent(why) = row.how {
            absent += 1;
            writeln!(table, "| {} | {} | | | | not here: {why} |", row.number, row.what).unwrap();
            continue;
        }
        let [one, other] = [ours, theirs].map(|all| &all[&row.number]);
        let seen = |finding: &Finding| finding.seen.clone();
        let equal = one.iter().map(seen).eq(other.iter().map(seen));
        let claims = other.iter().all(|finding| finding.right);
        let is_chance = claims && BY_CHANCE.contains(&row.number);
        let mut verdict = match (equal, claims) {
            _ if is_chance => "by chance".to_owned(),
            (true, true) => "same".to_owned(),
            (true, false) => "same, not as expected".to_owned(),
            (false, true) => "different, both as expected".to_owned(),
            (false, false) => "different".to_owned(),
        };
        if is_chance {
            by_chance.push(row.number.to_string());
        } else if equal {
            same += 1;
        } else {
            different.push(row.number.to_string());
        }
        if let Some(remark) = remark {
            verdict = format!("{verdict}: {remark}");
        }
        let cells = [
            cell(one, |finding| &finding.expected),
            cell(one, |finding| &finding.seen),
            cell(other, |finding| if is_chance { &finding.expected } else { &finding.seen }),
        ];
        // What is as expected need not be read three times.
        let [expected, seen, theirs] = cells;
        let short = |cell: String| if cell == expected { "as expected".to_owned() } else { cell };
        let (seen, theirs) = (short(seen), short(theirs));
        writeln!(
            table,
            "| {} | {} | {expected} | {seen} | {theirs} | {verdict} |",
            row.number, row.what
        )
        .unwrap();
    }
    writeln!(
        text,
        "{same} rows are the same, {} different ({}), {} a matter of chance with kube-proxy ({}), {absent} are \
         not here.\n",
        different.len(),
        different.join(", "),
        by_chance.len(),
        by_chance.join(", ")
    )
    .unwrap();
    text + &table
}
