//! The corpus: one small manifest file in, the whole table as text out, one snapshot each.
//!
//! A snapshot is nft text, so that a change of behaviour is a diff that a reviewer can read; and nft
//! itself checks every one of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nftproxy::model::{Family, NodeFacts};
use nftproxy::nft::dataplane::Loopback;
use nftproxy::nft::element::{ElementId, Key, Value};
use nftproxy::nft::fake::FakeKernel;
use nftproxy::nft::rule::InterfaceName;
use nftproxy::nft::ruleset::Ruleset;
use nftproxy::nft::{json, text};
use nftproxy::reconcile::Proxy;
use nftproxy::settings::{DetectLocal, NodePortAddresses, Settings};
use nftproxy::state::State;
use nftproxy::watch::manifests::Manifests;

use crate::model::{node, settings};
use crate::namespace::{in_namespace, nft};

/// What the manifests in a file ask for on `node-1`, and what was wrong with them.
pub(crate) fn wanted(manifests: &str, settings: Settings) -> (Ruleset, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("case.yaml"), manifests).unwrap();
    let read = Manifests::new(dir.path().to_owned(), "node-1".to_owned()).read();
    let (events, problems) = read.unwrap();
    // What an interface of the host has beside the addresses of the Node object.
    let interfaces = vec!["192.0.2.10".parse().unwrap(), "203.0.113.10".parse().unwrap()];
    let facts = NodeFacts { interfaces, ..node() };
    let mut proxy = Proxy::new(State::new(settings, facts), FakeKernel::default());
    events.into_iter().for_each(|event| proxy.observe(event));
    (proxy.wanted(), problems.iter().map(ToString::to_string).collect())
}

pub(crate) fn snapshots() -> insta::Settings {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(concat!(env!("CARGO_MANIFEST_DIR"), "/snapshots"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings
}

/// Which families a fixture is about, as its second line says.
fn families(manifests: &str) -> &'static [Family] {
    match manifests.lines().nth(1) {
        Some("# family: ip") => &[Family::V4],
        Some("# family: ip6") => &[Family::V6],
        Some("# family: both") => &Family::BOTH,
        other => panic!("the second line names the family, found {other:?}"),
    }
}

/// More slots than a reader takes in: of a Maglev table.
const MANY: usize = 1_000;
/// So many of them are shown.
const SHOWN: u16 = 16;

/// Leaves out most slots of such tables, and says whose they are.
fn shorten(ruleset: &mut Ruleset) -> String {
    let mut tables: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
    let frontend = |id: &ElementId| match id.key {
        Key::Slot(address, protocol, port, slot) => {
            Some((format!("{} {{ {address} . {protocol} . {port} . … }}", id.set), slot))
        }
        Key::NodePortSlot(protocol, port, slot) => {
            Some((format!("{} {{ {protocol} . {port} . … }}", id.set), slot))
        }
        _ => None,
    };
    for (id, value) in &ruleset.elements {
        if let Some((frontend, _)) = frontend(id) {
            *tables.entry(frontend).or_default().entry(value.to_string()).or_default() += 1;
        }
    }
    tables.retain(|_, shares| shares.values().sum::<usize>() >= MANY);
    let elements = std::mem::take(&mut ruleset.elements).into_iter();
    let is_shown = |(id, _): &(ElementId, Value)| {
        frontend(id).is_none_or(|(frontend, slot)| slot < SHOWN || !tables.contains_key(&frontend))
    };
    ruleset.elements = elements.filter(is_shown).collect();
    let mut text = String::new();
    for (frontend, shares) in tables {
        let slots: usize = shares.values().sum();
        text += &format!("# {frontend}: {slots} slots, the first {SHOWN} are below\n");
        for (backend, share) in shares {
            text += &format!("#     {backend}: {share}\n");
        }
    }
    text
}

fn check(name: &str, manifests: &str, settings: Settings) {
    let (mut ruleset, problems) = wanted(manifests, settings);
    let tables = shorten(&mut ruleset);
    let about = manifests.lines().next().unwrap();
    let mut text = format!("{about}\n");
    for problem in problems {
        text.push_str(&format!("# reported: {problem}\n"));
    }
    text.push_str(&tables);
    for &family in families(manifests) {
        text.push_str(&text::table(&ruleset, family));
        text.push('\n');
    }
    snapshots().bind(|| insta::assert_snapshot!(name, text));
    in_namespace(|| drop(nft(&["-c", "-f", "-"], &text)));
}

#[test]
fn every_fixture_renders_what_its_snapshot_shows() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut names: Vec<_> = fs::read_dir(fixtures).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    assert!(!names.is_empty());
    for path in names {
        let name = path.file_stem().unwrap().to_str().unwrap();
        check(name, &fs::read_to_string(&path).unwrap(), settings());
    }
}

#[test]
fn connections_are_counted_where_that_is_asked_for() {
    let manifests = include_str!("../fixtures/dual-stack.yaml");
    check("dual-stack--counters", manifests, Settings { counters: true, ..settings() });
}

#[test]
fn masquerading_follows_the_configuration() {
    let manifests = include_str!("../fixtures/cluster-ip.yaml");
    check("cluster-ip--no-cluster-cidr", manifests, Settings::default());
    let all = Settings { masquerade_all: true, masquerade_mark: 1, ..settings() };
    check("cluster-ip--masquerade-all", manifests, all);
}

#[test]
fn node_ports_and_pods_are_told_as_the_configuration_says() {
    let manifests = include_str!("../fixtures/node-port.yaml");
    let ranges = |ranges: &[&str]| {
        NodePortAddresses::Ranges(ranges.iter().map(|range| range.parse().unwrap()).collect())
    };
    let all = Settings { node_port_addresses: ranges(&["0.0.0.0/0"]), ..settings() };
    check("node-port--all-addresses", manifests, all);
    let some = Settings { node_port_addresses: ranges(&["203.0.113.0/24"]), ..settings() };
    check("node-port--ranges", manifests, some);
    let localhost = Settings { loopback: Loopback::NodePorts, ..settings() };
    check("node-port--localhost", manifests, localhost);
    let prefix = DetectLocal::Interface(InterfaceName::Prefix("veth".into()));
    check(
        "node-port--pods-by-interface",
        manifests,
        Settings { detect_local: prefix, ..settings() },
    );
}

/// What differs between versions of nft, or is the kernel's: handles, what printed it, and `dynamic`,
/// which old ones do not print; comments of tables, which new ones print.
fn comparable(json: &serde_json::Value) -> Vec<serde_json::Value> {
    let all = json["nftables"].as_array().unwrap().iter();
    let mut all: Vec<_> = all.filter(|object| object.get("metainfo").is_none()).cloned().collect();
    for object in &mut all {
        let (kind, inner) = object.as_object_mut().unwrap().iter_mut().next().unwrap();
        let inner = inner.as_object_mut().unwrap();
        inner.remove("handle");
        if kind == "table" {
            inner.remove("comment");
        }
        if let Some(flags) = inner.get_mut("flags") {
            flags.as_array_mut().unwrap().retain(|flag| flag != "dynamic");
        }
        if let Some(elements) = inner.get_mut("elem") {
            // In whatever order the kernel keeps them.
            elements.as_array_mut().unwrap().sort_by_key(ToString::to_string);
        }
    }
    // Rules of a chain are in order; the rest need not be.
    all.sort_by_key(|object| {
        let of = |key: &str| object["rule"].get(key).map(ToString::to_string);
        if object.get("rule").is_some() { of("chain").unwrap() } else { object.to_string() }
    });
    all
}

/// nft lists what it loaded as we write it.
#[test]
fn the_json_is_what_nft_prints_of_the_same_tables() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let by_interface = Settings {
        detect_local: DetectLocal::Interface(InterfaceName::Prefix("veth".into())),
        loopback: Loopback::NodePorts,
        counters: true,
        ..settings()
    };
    for entry in fs::read_dir(fixtures).unwrap() {
        let manifests = fs::read_to_string(entry.unwrap().path()).unwrap();
        for settings in [settings(), by_interface.clone()] {
            let (ruleset, _) = wanted(&manifests, settings);
            for &family in families(&manifests) {
                let text = text::table(&ruleset, family);
                let ours = json::ruleset(&ruleset, &[family]);
                in_namespace(|| {
                    nft(&["-f", "-"], &text);
                    let theirs = nft(&["-j", "list", "ruleset"], "");
                    let theirs: serde_json::Value = serde_json::from_str(&theirs).unwrap();
                    let (ours, theirs) = (comparable(&ours), comparable(&theirs));
                    for (ours, mut theirs) in ours.iter().zip(theirs.clone()) {
                        // A statement that this nft has no JSON for, it prints as text.
                        let unknown =
                            theirs.get_mut("rule").and_then(|rule| rule["expr"].as_array_mut());
                        for (number, statement) in unknown.into_iter().flatten().enumerate() {
                            if statement.is_string() {
                                *statement = ours["rule"]["expr"][number].clone();
                            }
                        }
                        assert_eq!(*ours, theirs);
                    }
                    assert_eq!(ours.len(), theirs.len());
                });
            }
        }
    }
}
