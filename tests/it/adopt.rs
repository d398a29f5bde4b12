//! What a start finds in the real kernel, and what it makes of it: its own tables are adopted without
//! an operation, whatever differs is repaired in one transaction, and a table of our name that is not
//! ours is replaced.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nftproxy::model::{Event, Family, Protocol};
use nftproxy::nft::dataplane::Options;
use nftproxy::nft::element::{Backend, ElementId, Key, Value};
use nftproxy::nft::kernel::Kernel as _;
use nftproxy::nft::names::SetName;
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::nft::text;
use nftproxy::nft::transaction::{Op, Transaction};
use nftproxy::reconcile::{Committed, Proxy};
use nftproxy::settings::Settings;
use nftproxy::state::State;
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

use crate::model::{all_listed, example, node, settings, state};
use crate::namespace::{in_namespace, nft};
use crate::parity::listed;

/// A start of the program: its first commit.
fn start(events: Vec<Event>) -> (Proxy<NetlinkKernel>, Committed) {
    let mut proxy = Proxy::new(state(), NetlinkKernel::open().unwrap());
    events.into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
    let done = proxy.commit().unwrap();
    (proxy, done)
}

#[test]
fn a_restart_with_the_same_objects_sends_nothing() {
    in_namespace(|| {
        assert!(start(example()).1.operations > 0);
        let before = listed();
        let (_, done) = start(example());
        assert_eq!((done.operations, done.applied.bytes), (0, 0));
        assert_eq!(listed(), before);
    });
}

/// Counters are adopted as they are, and come and go without touching anything else.
#[test]
fn counting_is_switched_by_a_restart() {
    let start = |counters| {
        let state = State::new(Settings { counters, ..settings() }, node());
        let mut proxy = Proxy::new(state, NetlinkKernel::open().unwrap());
        example().into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
        proxy.commit().unwrap()
    };
    in_namespace(|| {
        start(false);
        let off = listed();
        // A set, two chains, and three rules in each are one operation; of both families.
        assert_eq!(start(true).operations, 10);
        let pair =
            "10.96.0.10 . tcp . 80 . 10.244.1.5 . 8080 counter packets 7 bytes 420 timeout 1h";
        nft(&["add", "element", "ip", "nftproxy", "connections", &format!("{{ {pair} }}")], "");
        let kept =
            || nft(&["list", "set", "ip", "nftproxy", "connections"], "").contains("packets 7 ");
        assert!(kept());
        assert_eq!(start(true).operations, 0);
        assert!(kept());
        assert!(start(false).operations > 0);
        assert_eq!(listed(), off);
    });
}

#[test]
fn whatever_differs_is_repaired() {
    let damages = [
        "delete element ip nftproxy services { 10.96.0.10 . tcp . 80 }",
        "delete element ip nftproxy endpoints { 10.96.0.10 . tcp . 80 . 0 }",
        "flush map ip nftproxy endpoints",
        "flush map ip6 nftproxy services",
        "flush chain ip nftproxy dispatch",
        "flush ruleset",
        "delete table ip6 nftproxy",
        "add element ip nftproxy cluster-ips { 10.96.7.7 }",
        "add element ip nftproxy service-cidrs { 10.200.0.0/16 }",
        "delete element ip nftproxy service-cidrs { 10.96.0.0/12 }",
        "add chain ip nftproxy mine; add rule ip nftproxy mine drop",
        "add rule ip nftproxy nat-prerouting counter",
        "insert rule ip nftproxy lb-2 drop",
        "add set ip nftproxy mine { type ipv4_addr; }",
        "add element ip nftproxy no-endpoints { 10.96.0.10 . tcp . 81 : drop }",
        "add chain ip nftproxy lb-77",
        "add chain ip nftproxy external-3; add rule ip nftproxy external-3 goto lb-3",
    ];
    for damage in damages {
        in_namespace(|| {
            drop(start(example()));
            let before = listed();
            nft(&["-f", "-"], damage);
            assert_ne!(listed(), before, "{damage}");
            let (_, done) = start(example());
            assert!(done.operations > 0 && done.adopted, "{damage}");
            assert_eq!(listed(), before, "{damage}");
        });
    }
}

#[test]
fn a_table_of_our_name_made_by_someone_else_is_replaced_at_once() {
    let foreign = "add table ip nftproxy
        add set ip nftproxy cluster-ips { type inet_service; }
        add chain ip nftproxy c { type filter hook forward priority 0; policy accept; }
        add rule ip nftproxy c counter
        add table ip other
        add chain ip other c
        add rule ip other c counter";
    in_namespace(|| {
        drop(start(example()));
        let wanted = nft(&["list", "table", "ip", "nftproxy"], "");
        nft(&["-f", "-"], "delete table ip nftproxy");
        nft(&["-f", "-"], foreign);
        let (_, done) = start(example());
        assert!(done.operations > 0);
        assert_eq!(nft(&["list", "table", "ip", "nftproxy"], ""), wanted);
        assert!(nft(&["list", "table", "ip", "other"], "").contains("counter"), "others' stay");
    });
}

#[test]
fn a_commit_that_meets_a_changed_table_repairs_all_of_it() {
    in_namespace(|| {
        let (mut proxy, _) = start(example());
        let before = listed();
        nft(&["-f", "-"], "flush ruleset");
        // Any change makes the next commit; here one that comes back to the same.
        let mut dns = example();
        dns.retain(|event| matches!(event, Event::EndpointSlice(slice) if slice.name.as_str() == "default/dns-4"));
        let Event::EndpointSlice(mut shorter) = dns[0].clone() else { unreachable!() };
        shorter.endpoints.truncate(1);
        proxy.observe(Event::EndpointSlice(shorter));
        assert!(proxy.commit().unwrap().adopted);
        proxy.observe(dns.remove(0));
        assert!(!proxy.commit().unwrap().adopted);
        proxy.collect_idle().unwrap();
        assert_eq!(listed(), before);
    });
}

#[test]
fn a_refused_operation_is_named_by_the_kernel() {
    in_namespace(|| {
        let (mut proxy, _) = start(example());
        let plan = |proxy: &mut Proxy<NetlinkKernel>| proxy.plan().unwrap();
        assert!(plan(&mut proxy).is_empty());
        nft(&["-f", "-"], "delete element ip nftproxy endpoints { 10.96.0.53 . udp . 53 . 1 }");
        let missing = plan(&mut proxy);
        let (op, object) = missing.first().unwrap();
        assert_eq!(object.as_ref().unwrap().to_string(), "Service default/dns");
        assert_eq!(
            text::op(op),
            "add element ip nftproxy endpoints { 10.96.0.53 . udp . 53 . 1 : 10.244.1.7 . 53 }"
        );
        // Removing what is there and what is not: the kernel names the second.
        use nftproxy::nft::transaction::{Op, Transaction};
        let Op::AddElement(id, value) = op else { panic!("{op:?}") };
        let there = {
            let loaded = proxy.kernel_mut().load(&Options::default()).unwrap();
            let table = &loaded.tables[&id.family];
            table
                .elements
                .iter()
                .find(|(found, _)| found.set == id.set)
                .map(|(a, b)| (*a, b.clone()))
                .unwrap()
        };
        let ops = vec![Op::DeleteElement(there.0, there.1), Op::DeleteElement(*id, value.clone())];
        let error = proxy.kernel_mut().apply(&Transaction { ops }).unwrap_err();
        let nftproxy::nft::kernel::ApplyError::Refused { refusals } = error else {
            panic!("{error}")
        };
        assert_eq!((refusals[0].op, refusals[0].errno), (Some(1), libc::ENOENT), "{refusals:?}");
    });
}

/// The kernel makes the hash table of a map larger or smaller a moment after a commit, which reorders
/// the elements under whoever reads them. How often that meets a reading is up to chance; more often
/// on one processor, where the kernel's thread waits for the reader's.
#[test]
fn a_table_is_read_whole_right_after_a_big_commit() {
    let elements: BTreeMap<_, _> = (0..2000_u16)
        .map(|slot| {
            let key = Key::Slot([10, 96, 0, 10].into(), Protocol::Tcp, 80, slot);
            let [high, low] = slot.to_be_bytes();
            let address = [10, 0, high, low].into();
            let id = ElementId { family: Family::V4, set: SetName::Endpoints, key };
            (id, Value::Backend(Backend { address, port: 80 }))
        })
        .collect();
    let change = |op: fn(ElementId, Value) -> Op| Transaction {
        ops: elements.iter().map(|(id, value)| op(*id, value.clone())).collect(),
    };
    let (add, delete) = (change(Op::AddElement), change(Op::DeleteElement));
    in_namespace(|| {
        let (_, mut kernel) = (start(vec![]), NetlinkKernel::open().unwrap());
        let mut one = CpuSet::new();
        one.set(sched_getcpu().unwrap()).unwrap();
        sched_setaffinity(Pid::from_raw(0), &one).unwrap();
        let end = Instant::now() + Duration::from_secs(3);
        let (mut rounds, mut bad) = (0, Vec::new());
        while Instant::now() < end {
            rounds += 1;
            kernel.apply(&add).unwrap();
            let loaded = kernel.load(&Options::default()).unwrap();
            let read = &loaded.tables[&Family::V4].elements;
            let missing = elements.iter().filter(|(id, value)| read.get(id) != Some(value)).count();
            if missing > 0 {
                bad.push((rounds, missing));
            }
            kernel.apply(&delete).unwrap();
        }
        assert!(bad.is_empty(), "of {rounds} rounds, these (round, missing): {bad:?}");
    });
}
