//! The typed values as nft text, through the templates under `templates/`.
//!
//! `nft -f` loads it into what the netlink batch makes, and `nft list` shows it back much the same.
//! No label or annotation of an object reaches the text, and names only if they are letters, digits
//! and a few signs ([`super::names::PortName`]), so there is nothing to escape.

use std::fmt::{self, Write as _};

use askama::Template;

use super::connection::CONNECTION;
use super::element::Value;
use super::names::{AffinityName, CONNECTIONS, DataType, KeyField, LAYOUT, SetName, TABLE};
use super::rule::{
    AFFINITY_SIZE, Base, BaseKind, CONNECTIONS_SIZE, COUNTED_BY, COUNTED_FOR, Chain, HASH_SEED,
    Hook, Rule, Selector, SlotSource, Statement, masks,
};
use super::ruleset::Ruleset;
use super::transaction::Op;
use crate::model::Family;

#[derive(Template)]
#[template(path = "table.nft", escape = "none")]
struct TableText<'a> {
    family: Family,
    table: &'a str,
    layout: &'a str,
    sets: Vec<SetText>,
    affinities: Vec<&'a AffinityName>,
    affinity_definition: String,
    affinity_size: u32,
    /// Definition of the set that counts connections, if there is one.
    counters: Option<String>,
    counters_size: u32,
    chains: Vec<ChainText>,
}

struct SetText {
    kind: &'static str,
    name: SetName,
    definition: String,
    interval: bool,
    /// Elements, joined; empty if there are none.
    elements: String,
}

struct ChainText {
    name: String,
    base: Option<Base>,
    rules: Vec<String>,
}

/// The table of a family as nft text.
#[must_use]
pub fn table(ruleset: &Ruleset, family: Family) -> String {
    let sets = SetName::ALL.into_iter().map(|name| SetText {
        kind: kind(name),
        name,
        definition: definition(name, family),
        interval: name.is_interval(),
        elements: elements(ruleset, family, name),
    });
    let chains = ruleset.chains(family).map(|chain: Chain| ChainText {
        name: chain.name.to_string(),
        base: chain.base,
        rules: chain.rules.iter().map(|r| rule(r, family)).collect(),
    });
    let text = TableText {
        family,
        table: TABLE,
        layout: LAYOUT,
        sets: sets.collect(),
        affinities: ruleset.affinities_of(family).collect(),
        affinity_definition: affinity_definition(family),
        affinity_size: AFFINITY_SIZE,
        counters: ruleset.counts().then(|| counters_definition(family)),
        counters_size: CONNECTIONS_SIZE,
        chains: chains.collect(),
    };
    text.render().expect("writing to a string does not fail")
}

/// Both tables as nft text.
#[must_use]
pub fn ruleset(ruleset: &Ruleset) -> String {
    tables(ruleset, &Family::BOTH)
}

/// The tables of these families as nft text.
#[must_use]
pub fn tables(ruleset: &Ruleset, families: &[Family]) -> String {
    families.iter().map(|&family| table(ruleset, family)).collect::<Vec<_>>().join("\n")
}

fn affinity_definition(family: Family) -> String {
    let [address, port] = [KeyField::Address, KeyField::Port].map(|f| type_name(f, family));
    format!("type {address} : {address} . {port}")
}

fn counters_definition(family: Family) -> String {
    let fields = CONNECTION.map(|field| type_name(field, family));
    format!("type {}", fields.join(" . "))
}

fn kind(set: SetName) -> &'static str {
    if set.data() == DataType::None { "set" } else { "map" }
}

/// `type …` or, where a field has no type of its own, `typeof …`.
fn definition(set: SetName, family: Family) -> String {
    if set.key().contains(&KeyField::Slot) {
        let key: Vec<_> = set.key().iter().map(|&f| type_of(f, family)).collect();
        return format!(
            "typeof {} : {} . {}",
            key.join(" . "),
            type_of(KeyField::Address, family),
            type_of(KeyField::Port, family)
        );
    }
    let key: Vec<_> = set.key().iter().map(|&f| type_name(f, family)).collect();
    let key = key.join(" . ");
    match set.data() {
        DataType::Verdict => format!("type {key} : verdict"),
        DataType::None | DataType::Backend => format!("type {key}"),
    }
}

pub(super) fn type_name(field: KeyField, family: Family) -> &'static str {
    match (field, family) {
        (KeyField::Address, Family::V4) => "ipv4_addr",
        (KeyField::Address, Family::V6) => "ipv6_addr",
        (KeyField::Protocol, _) => "inet_proto",
        (KeyField::Port, _) => "inet_service",
        (KeyField::Slot, _) => "integer",
    }
}

fn type_of(field: KeyField, family: Family) -> &'static str {
    match (field, family) {
        (KeyField::Address, Family::V4) => "ip daddr",
        (KeyField::Address, Family::V6) => "ip6 daddr",
        (KeyField::Protocol, _) => "meta l4proto",
        (KeyField::Port, _) => "th dport",
        (KeyField::Slot, _) => "numgen random mod 65536",
    }
}

fn elements(ruleset: &Ruleset, family: Family, set: SetName) -> String {
    let mut text = String::new();
    for (id, value) in ruleset.elements_of(family, set) {
        if !text.is_empty() {
            text.push_str(",\n\t\t\t     ");
        }
        write!(text, "{}", id.key).expect("writing to a string does not fail");
        if *value != Value::None {
            write!(text, " : {value}").expect("writing to a string does not fail");
        }
    }
    text
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            BaseKind::Filter => "filter",
            BaseKind::Nat => "nat",
        };
        let hook = match self.hook {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        };
        write!(f, "type {kind} hook {hook} priority {}; policy accept;", self.priority)
    }
}

/// A rule as nft text.
#[must_use]
pub fn rule(rule: &Rule, family: Family) -> String {
    let mut words: Vec<_> = rule.statements.iter().map(|s| statement(s, family)).collect();
    words.extend(rule.comment.map(|comment| format!("comment \"{comment}\"")));
    words.join(" ")
}

fn statement(statement: &Statement, family: Family) -> String {
    let key = |selectors: &[Selector]| joined(selectors, family);
    match statement {
        Statement::CtStateNew => "ct state new".into(),
        Statement::CtStatusDnat => "ct status dnat".into(),
        Statement::FromThisHost => "fib saddr type local".into(),
        Statement::ToThisHost => "fib daddr type local".into(),
        Statement::NotToLoopback => format!("{family} daddr != {}", loopback(family)),
        Statement::ToLoopback => format!("{family} daddr {}", loopback(family)),
        Statement::FromLoopback => format!("{family} saddr {}", loopback(family)),
        Statement::NotToInterface(name) => format!("oifname != \"{name}\""),
        Statement::FromInterface(name) => format!("iifname \"{name}\""),
        Statement::NotFromInterface(name) => format!("iifname != \"{name}\""),
        Statement::L4Proto(protocol) => format!("meta l4proto {protocol}"),
        Statement::In(selectors, set) => format!("{} @{set}", key(selectors)),
        Statement::NotIn(selectors, set) => format!("{} != @{set}", key(selectors)),
        Statement::MarkClear(bits) => format!("meta mark & {bits:#010x} == 0x00000000"),
        Statement::MarkOr(bits) => format!("meta mark set meta mark | {bits:#010x}"),
        Statement::MarkXor(bits) => format!("meta mark set meta mark ^ {bits:#010x}"),
        Statement::Vmap(selectors, map) => format!("{} vmap @{map}", key(selectors)),
        Statement::Dnat(selectors, map) => {
            format!("dnat {family} to {} map @{map}", key(selectors))
        }
        Statement::DnatSticky(affinity) => {
            format!("dnat {family} to {family} saddr map @{affinity}")
        }
        Statement::Remember(affinity, seconds) => format!(
            "update @{affinity} {{ {family} saddr timeout {seconds}s : {family} daddr . th dport }}"
        ),
        Statement::Count => {
            format!(
                "update @{CONNECTIONS} {{ {} timeout {COUNTED_FOR}s counter }}",
                key(&COUNTED_BY)
            )
        }
        Statement::Masquerade => "masquerade fully-random".into(),
        Statement::Jump(chain) => format!("jump {chain}"),
        Statement::Goto(chain) => format!("goto {chain}"),
        Statement::Return => "return".into(),
        Statement::Accept => "accept".into(),
        Statement::Reject => "reject".into(),
        Statement::Drop => "drop".into(),
    }
}

fn loopback(family: Family) -> &'static str {
    match family {
        Family::V4 => "127.0.0.0/8",
        Family::V6 => "::1",
    }
}

fn joined(selectors: &[Selector], family: Family) -> String {
    let words: Vec<_> =
        selectors.iter().map(|&selector| self::selector(selector, family)).collect();
    words.join(" . ")
}

fn selector(selector: Selector, family: Family) -> String {
    match selector {
        Selector::Saddr => format!("{family} saddr"),
        Selector::SaddrFirst(length) => match masks(family, length) {
            Some((network, _)) => format!("{family} saddr & {network}"),
            None => format!("{family} saddr"),
        },
        Selector::SaddrLast(length) => match masks(family, length) {
            Some((_, host)) => format!("{family} saddr | {host}"),
            None => format!("{family} saddr"),
        },
        Selector::Daddr => format!("{family} daddr"),
        Selector::L4Proto => "meta l4proto".into(),
        Selector::Dport => "th dport".into(),
        Selector::OriginalDaddr => format!("ct original {family} daddr"),
        Selector::OriginalDport => "ct original proto-dst".into(),
        Selector::ReplySaddr => format!("ct reply {family} saddr"),
        Selector::ReplySport => "ct reply proto-src".into(),
        Selector::Slot { source, modulus, offset } => {
            let mut text = match source {
                SlotSource::Random => format!("numgen random mod {modulus}"),
                SlotSource::Increment => format!("numgen inc mod {modulus}"),
                SlotSource::SourceHash => {
                    format!("jhash {family} saddr mod {modulus} seed {HASH_SEED:#x}")
                }
            };
            if offset > 0 {
                let _ = write!(text, " offset {offset}");
            }
            text
        }
    }
}

/// An operation as a change: its commands, each behind a sign that says whether it brings or takes
/// something.
#[must_use]
pub fn change(op: &Op) -> Vec<String> {
    let sign = if op.removes() { '-' } else { '+' };
    self::op(op).lines().map(|line| format!("{sign} {line}")).collect()
}

/// An operation as nft commands, one a line.
#[must_use]
pub fn op(op: &Op) -> String {
    match op {
        Op::AddTable(family) => {
            format!("add table {family} {TABLE} {{ comment \"{LAYOUT}\"; }}")
        }
        Op::DeleteTable(family) => format!("delete table {family} {TABLE}"),
        Op::AddSet(family, set) => {
            let flags = if set.is_interval() { " flags interval;" } else { "" };
            let definition = definition(*set, *family);
            format!("add {} {family} {TABLE} {set} {{ {definition};{flags} }}", kind(*set))
        }
        Op::AddAffinity(family, name) => {
            let definition = affinity_definition(*family);
            format!(
                "add map {family} {TABLE} {name} {{ {definition}; size {AFFINITY_SIZE}; \
                 flags dynamic,timeout; }}"
            )
        }
        Op::AddCounters(family) => {
            let definition = counters_definition(*family);
            format!(
                "add set {family} {TABLE} {CONNECTIONS} {{ {definition}; size {CONNECTIONS_SIZE}; \
                 flags dynamic,timeout; }}"
            )
        }
        Op::DeleteCounters(family) => format!("delete set {family} {TABLE} {CONNECTIONS}"),
        Op::DeleteAffinity(family, name) => format!("delete map {family} {TABLE} {name}"),
        Op::Forget(family, name, keep) => {
            let keep: Vec<_> = keep.iter().map(ToString::to_string).collect();
            let keep = keep.join(", ");
            format!("delete element {family} {TABLE} {name} {{ … }} # all but those of {keep}")
        }
        Op::AddChain(family, chain) => match chain.base {
            Some(base) => format!("add chain {family} {TABLE} {} {{ {base} }}", chain.name),
            None => format!("add chain {family} {TABLE} {}", chain.name),
        },
        Op::AddRules(family, chain) => {
            let rules = chain
                .rules
                .iter()
                .map(|r| format!("add rule {family} {TABLE} {} {}", chain.name, rule(r, *family)));
            rules.collect::<Vec<_>>().join("\n")
        }
        Op::FlushChain(family, chain) => format!("flush chain {family} {TABLE} {chain}"),
        Op::DeleteChain(family, chain) => format!("delete chain {family} {TABLE} {chain}"),
        Op::AddElement(id, Value::None) => {
            format!("add element {} {TABLE} {} {{ {} }}", id.family, id.set, id.key)
        }
        Op::AddElement(id, value) => {
            format!("add element {} {TABLE} {} {{ {} : {value} }}", id.family, id.set, id.key)
        }
        Op::DeleteElement(id, _) => {
            format!("delete element {} {TABLE} {} {{ {} }}", id.family, id.set, id.key)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Protocol;
    use crate::nft::dataplane::{self, Options};
    use crate::nft::element::{ElementId, Key};
    use crate::nft::names::{ChainName, List};

    #[test]
    fn what_takes_something_is_told_behind_a_minus_and_what_brings_something_behind_a_plus() {
        let family = Family::V4;
        let map = AffinityName { port: "default/web/tcp".parse().unwrap(), list: List::Cluster };
        let name = ChainName::NatInput;
        let key = Key::NodePort(Protocol::Tcp, 30080);
        let id = ElementId { family, set: SetName::NoEndpointNodeports, key };
        let chain = || Box::new(dataplane::chain(name.clone(), family, &Options::default()));
        for (op, begins) in [
            (Op::AddTable(family), "+ add table"),
            (Op::DeleteTable(family), "- delete table"),
            (Op::AddSet(family, SetName::Services), "+ add map"),
            (Op::AddAffinity(family, map.clone()), "+ add map"),
            (Op::DeleteAffinity(family, map.clone()), "- delete map"),
            (Op::Forget(family, map.clone(), Box::default()), "- delete element"),
            (Op::AddCounters(family), "+ add set"),
            (Op::DeleteCounters(family), "- delete set"),
            (Op::AddChain(family, chain()), "+ add chain"),
            (Op::AddRules(family, chain()), "+ add rule"),
            (Op::FlushChain(family, name.to_string()), "- flush chain"),
            (Op::DeleteChain(family, name.to_string()), "- delete chain"),
            (Op::AddElement(id, Value::Drop), "+ add element"),
            (Op::DeleteElement(id, Value::Drop), "- delete element"),
        ] {
            let lines = change(&op);
            assert!(!lines.is_empty() && lines.iter().all(|l| l.starts_with(begins)), "{lines:?}");
        }
    }

    #[test]
    fn the_tables_of_both_families_follow_each_other() {
        let rules = Ruleset::default();
        let [four, six] = Family::BOTH.map(|family| table(&rules, family));
        assert!(four.contains("table ip nftproxy") && six.contains("table ip6 nftproxy"));
        assert_eq!(ruleset(&rules), format!("{four}\n{six}"));
        assert_eq!(tables(&rules, &[Family::V6]), six);
    }
}
