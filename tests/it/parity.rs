//! Text and netlink say the same: one ruleset, loaded as text by nft in one namespace and as a batch
//! in another, is listed the same by nft.

use nftproxy::model::{Event, Family, Protocol, Service, SessionAffinity};
use nftproxy::nft::dataplane::Loopback;
use nftproxy::nft::diff::diff;
use nftproxy::nft::element::{ElementId, Key, Value as Element};
use nftproxy::nft::fake::FakeKernel;
use nftproxy::nft::kernel::{Kernel, Loaded};
use nftproxy::nft::names::{AffinityName, ChainName, SetName};
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::nft::rule::InterfaceName;
use nftproxy::nft::ruleset::Ruleset;
use nftproxy::nft::text;
use nftproxy::nft::transaction::{Op, Transaction};
use nftproxy::reconcile::Proxy;
use nftproxy::settings::{DetectLocal, NodePortAddresses, Settings};
use nftproxy::state::State;
use serde_json::Value;

use crate::model::{all_listed, example, node, port, service, settings, slice};
use crate::namespace::{in_namespace, nft, refused};

/// Everything that settings can bring into the rules.
fn all_settings() -> [Settings; 4] {
    [
        Settings { loopback: Loopback::NodePorts, ..settings() },
        Settings { loopback: Loopback::Guarded, ..settings() },
        Settings { counters: true, ..settings() },
        Settings {
            detect_local: DetectLocal::Interface(InterfaceName::Prefix("veth".into())),
            node_port_addresses: NodePortAddresses::Ranges(vec![
                "0.0.0.0/0".parse().unwrap(),
                "::/0".parse().unwrap(),
            ]),
            ..settings()
        },
    ]
}

fn wanted(events: Vec<Event>) -> Ruleset {
    wanted_with(settings(), events)
}

fn wanted_with(settings: Settings, events: Vec<Event>) -> Ruleset {
    let mut proxy = Proxy::new(State::new(settings, node()), FakeKernel::default());
    for event in events.into_iter().chain(all_listed()) {
        proxy.observe(event);
    }
    proxy.wanted()
}

/// The ruleset as nft's JSON, without what cannot agree: handles, and the order of elements.
pub(crate) fn listed() -> Value {
    listed_by(&["ruleset"])
}

/// Like [`listed`], for what `nft list` is to list.
pub(crate) fn listed_by(what: &[&str]) -> Value {
    let arguments = [&["-j", "list"], what].concat();
    let mut listing: Value = serde_json::from_str(&nft(&arguments, "")).unwrap();
    let objects = listing["nftables"].as_array_mut().unwrap();
    objects.retain(|object| object.get("metainfo").is_none());
    for object in objects.iter_mut().flat_map(|o| o.as_object_mut().unwrap().values_mut()) {
        let object = object.as_object_mut().unwrap();
        object.remove("handle");
        if let Some(Value::Array(elements)) = object.get_mut("elem") {
            elements.sort_by_key(ToString::to_string);
        }
    }
    objects.sort_by_key(ToString::to_string);
    listing
}

#[test]
fn text_and_netlink_make_the_same_tables() {
    compare(&wanted(example()));
}

#[test]
fn whatever_the_settings_are() {
    for settings in all_settings() {
        compare(&wanted_with(settings, Vec::new()));
    }
}

/// nft 1.0.6 (Debian 12) aborts at the statement that remembers an IPv6 client with an address and a port; 1.1.3
/// (Debian 13) takes it. Where it does abort, nothing else of the text is in the way.
#[test]
fn ipv6_clients_are_remembered_by_the_text_as_well_where_nft_knows_how() {
    let web = service("web", &["fd00:10:96::10"], &[port("", Protocol::Tcp, 80, 0)]);
    let session_affinity = SessionAffinity::ClientIp { timeout: 600 };
    let endpoints = slice("web", "6", &[("", Protocol::Tcp, 8080)], &["fd00:10:244:1::5!"]);
    let ruleset = wanted(vec![
        Event::Service(Service { session_affinity, ..web }),
        Event::EndpointSlice(endpoints),
    ]);
    let text = text::ruleset(&ruleset);
    let mut refusal = None;
    in_namespace(|| refusal = refused(&text));
    let Some(refusal) = refusal else { return compare(&ruleset) };
    assert!(refusal.contains("Assertion `dreg < ctx->reg_low' failed"), "{refusal}");
    let remembers = |line: &&str| line.contains("update @affinity/");
    let without: Vec<_> = text.lines().filter(|line| !remembers(line)).collect();
    assert!(without.len() < text.lines().count());
    in_namespace(|| drop(nft(&["-f", "-"], &without.join("\n"))));
}

fn compare(ruleset: &Ruleset) {
    let (mut by_text, mut by_netlink, mut by_operations) = (Value::Null, Value::Null, Value::Null);
    in_namespace(|| {
        let transaction = diff(&Loaded::default(), ruleset.clone());
        NetlinkKernel::open().unwrap().apply(&transaction).unwrap();
        by_netlink = listed();
    });
    assert_ne!(by_netlink, Value::Null);
    in_namespace(|| {
        nft(&["-f", "-"], &text::ruleset(ruleset));
        by_text = listed();
    });
    in_namespace(|| {
        let ops = diff(&Loaded::default(), ruleset.clone()).ops;
        let lines: Vec<_> = ops.iter().map(text::op).collect();
        nft(&["-f", "-"], &lines.join("\n"));
        by_operations = listed();
    });
    for (how, by) in [("text", by_text), ("operations", by_operations)] {
        if by != by_netlink {
            let lines = |v: &Value| serde_json::to_string_pretty(v).unwrap();
            panic!("{how}:\n{}\nnetlink:\n{}", lines(&by), lines(&by_netlink));
        }
    }
}

/// Property tests believe the fake kernel.
#[test]
fn what_the_fake_kernel_refuses_the_real_one_does() {
    let ruleset = wanted_with(Settings { counters: true, ..settings() }, example());
    let made = diff(&Loaded::default(), ruleset.clone());
    let v4 = Family::V4;
    let id = |set, key| ElementId { family: v4, set, key };
    let key = |port| Key::Frontend([10, 96, 0, 10].into(), Protocol::Tcp, port);
    let element = |port, value| Op::AddElement(id(SetName::Services, key(port)), value);
    let affinity = ruleset.affinities.keys().next().unwrap().clone();
    let other: AffinityName = "affinity/x/y/tcp/z".parse().unwrap();
    let chain = |name: ChainName| Box::new(ruleset.chains(v4).find(|c| c.name == name).unwrap());
    let dispatch = chain(ChainName::Dispatch);
    let cases = [
        (element(80, Element::Drop), libc::EEXIST),
        (element(81, Element::Goto("lb-99".parse().unwrap())), libc::ENOENT),
        (Op::DeleteElement(id(SetName::Services, key(81)), Element::Drop), libc::ENOENT),
        (Op::DeleteChain(v4, "dispatch".into()), libc::EBUSY),
        (Op::DeleteChain(v4, "none".into()), libc::ENOENT),
        (Op::FlushChain(v4, "none".into()), libc::ENOENT),
        (Op::DeleteAffinity(affinity.0, affinity.1), libc::EBUSY),
        (Op::DeleteAffinity(v4, other), libc::ENOENT),
        (Op::DeleteCounters(v4), libc::EBUSY),
    ];
    let refused = |kernel: &mut dyn Kernel, op: &Op| {
        kernel.apply(&Transaction { ops: vec![op.clone()] }).unwrap_err()
    };
    let mut fake = FakeKernel::default();
    fake.apply(&made).unwrap();
    in_namespace(|| {
        let mut real = NetlinkKernel::open().unwrap();
        real.apply(&made).unwrap();
        for (op, errno) in &cases {
            let [fake, real] = [refused(&mut fake, op), refused(&mut real, op)];
            assert!(fake.is(*errno), "{op:?}: {fake}");
            assert!(real.is(*errno), "{op:?}: {real}");
        }
        let before = fake.dump();
        let without = [
            Op::DeleteTable(v4),
            Op::AddCounters(v4),
            Op::AddRules(v4, dispatch.clone()),
            Op::AddSet(v4, SetName::Services),
        ];
        let gone = Transaction { ops: vec![Op::DeleteTable(v4)] };
        assert_eq!(fake.dump(), before, "what is refused changes nothing");
        for kernel in [&mut fake as &mut dyn Kernel, &mut real] {
            kernel.apply(&gone).unwrap();
            for op in &without {
                let error = refused(kernel, op);
                assert!(error.is(libc::ENOENT), "{op:?}: {error}");
            }
        }
    });
}

#[test]
fn a_dump_reads_back_what_either_of_them_made() {
    for counters in [false, true] {
        reads_back(&wanted_with(Settings { counters, ..settings() }, example()));
    }
}

fn reads_back(ruleset: &Ruleset) {
    let transaction = diff(&Loaded::default(), ruleset.clone());
    for by_text in [true, false] {
        in_namespace(|| {
            let mut kernel = NetlinkKernel::open().unwrap();
            if by_text {
                nft(&["-f", "-"], &text::ruleset(ruleset));
            } else {
                kernel.apply(&transaction).unwrap();
            }
            let loaded = kernel.load(&ruleset.options).unwrap();
            assert_eq!(loaded.tables.len(), 2);
            let left = diff(&loaded, ruleset.clone());
            let ops: Vec<_> = left.ops.iter().map(text::op).collect();
            assert!(left.is_empty(), "made by text: {by_text}, left to do: {ops:#?}\n{loaded:#?}");
        });
    }
}
