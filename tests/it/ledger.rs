//! Any order of events with the same final objects ends in the same table as a fresh start, every
//! transaction on the way is one the kernel accepts, and a restart finds nothing to do.

mod affinity;
mod changes;
mod told;

use std::collections::BTreeMap;

use nftproxy::inspect::Objects as Told;
use nftproxy::model::{Event, Family, Kind};
use nftproxy::nft::dataplane::Options;
use nftproxy::nft::fake::FakeKernel;
use nftproxy::nft::names::SetName;
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::nft::text;
use nftproxy::reconcile::Proxy;
use nftproxy::state::State;
use proptest::prelude::*;

use crate::fuzz::cases;
use crate::history::{
    ALL_SETTINGS, Objects, Step, Wanted, accepted, any_step, committed, fresh, identity, kind_of,
    normal,
};
use crate::model::{all_listed, node, state};
use crate::namespace::in_namespace;

/// Histories that once ended otherwise.
const SEEDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fuzz/seeds/ledger.txt");

proptest! {
    #![proptest_config(cases(400, SEEDS))]

    #[test]
    fn what_is_computed_before_all_is_listed_ends_like_a_fresh_start(steps in proptest::collection::vec(any_step(), 1..60)) {
        let mut proxy = Proxy::new(state(), FakeKernel::default());
        let mut wanted = Wanted::new();
        for step in steps {
            match step {
                Step::Event(event) => wanted.observe(&mut proxy, event),
                Step::Settings(number) => wanted.configure(&mut proxy, number),
                _ => proxy.prepare(),
            }
        }
        all_listed().for_each(|event| proxy.observe(event));
        committed(&mut proxy);
        let mut fresh = wanted.fresh();
        prop_assert_eq!(normal(proxy.kernel_mut()), normal(fresh.kernel_mut()));
        prop_assert!(proxy.plan().unwrap().is_empty());
    }

    #[test]
    fn any_history_ends_like_a_fresh_start(steps in proptest::collection::vec(any_step(), 1..60)) {
        let mut proxy = Proxy::new(state(), FakeKernel::default());
        let mut wanted = Wanted::new();
        let mut rules = proxy.state().options();
        all_listed().for_each(|event| proxy.observe(event));
        committed(&mut proxy);
        for step in steps {
            match step {
                Step::Event(event) => wanted.observe(&mut proxy, event),
                Step::Settings(number) => wanted.configure(&mut proxy, number),
                Step::Relist(kind) => {
                    proxy.observe(Event::Listing(kind));
                    for event in wanted.objects.0.values().filter(|event| kind_of(event) == Some(kind)) {
                        proxy.observe(event.clone());
                    }
                    proxy.observe(Event::Listed(kind));
                }
                Step::Commit => accepted(&mut proxy, &mut rules)?,
                Step::Collect => {
                    proxy.collect_idle().unwrap();
                }
                Step::Tamper(which) => {
                    let kernel = proxy.kernel_mut();
                    let ids: Vec<_> = kernel.elements().map(|(id, _)| *id).collect();
                    if !ids.is_empty() {
                        prop_assert!(kernel.tamper(&ids[which.index(ids.len())]));
                        prop_assert_eq!(proxy.repair().unwrap().set_aside, 0);
                        rules = proxy.state().options();
                        prop_assert!(proxy.plan().unwrap().is_empty());
                    }
                }
            }
        }
        accepted(&mut proxy, &mut rules)?;
        proxy.collect_idle().unwrap();
        prop_assert!(proxy.plan().unwrap().is_empty());

        let mut fresh = wanted.fresh();
        prop_assert_eq!(normal(proxy.kernel_mut()), normal(fresh.kernel_mut()));
        let chains = |dump: String| -> Vec<String> {
            dump.lines().filter(|l| l.contains(" chain ")).map(Into::into).collect()
        };
        prop_assert_eq!(chains(proxy.kernel_mut().dump()), chains(fresh.kernel_mut().dump()));

        // A restart adopts: nothing to do, not even renumbering.
        let kernel = proxy.kernel_mut().clone();
        let before = kernel.dump();
        let Wanted { objects: Objects(objects), settings } = wanted;
        let mut restarted = Proxy::new(State::new(settings, node()), kernel);
        for event in objects.values().cloned().chain(all_listed()) {
            restarted.observe(event);
            restarted.prepare();
        }
        let done = restarted.commit().unwrap();
        prop_assert_eq!(done.operations, 0, "{:?}", restarted.kernel_mut().applied.last());
        prop_assert_eq!(restarted.kernel_mut().dump(), before);

        // A relist that names everything again changes nothing; one that names nothing empties it.
        proxy.observe(Event::Listing(Kind::Service));
        for event in objects.values().filter(|e| matches!(e, Event::Service(_))) {
            proxy.observe(event.clone());
        }
        proxy.observe(Event::Listed(Kind::Service));
        prop_assert_eq!(proxy.commit().unwrap().operations, 0);
        proxy.observe(Event::Listing(Kind::Service));
        proxy.observe(Event::Listed(Kind::Service));
        proxy.commit().unwrap();
        let left = proxy.kernel_mut().elements().filter(|(id, _)| id.set == SetName::Services);
        prop_assert_eq!(left.count(), 0);
    }

    /// What commands are told of the running program makes the same tables.
    #[test]
    fn what_is_told_to_commands_asks_for_the_same(
        steps in proptest::collection::vec(any_step(), 1..30),
    ) {
        let mut proxy = Proxy::new(state(), FakeKernel::default());
        all_listed().for_each(|event| proxy.observe(event));
        for step in steps {
            match step {
                Step::Event(event) => proxy.observe(event),
                Step::Settings(number) => proxy.configure(ALL_SETTINGS[number]()),
                _ => {}
            }
        }
        let told = Told::of(proxy.state(), "here".into());
        let told: Told = serde_json::from_str(&serde_json::to_string(&told).unwrap()).unwrap();
        let mut again = Proxy::new(told.into_state(), FakeKernel::default());
        let (wanted, again) = (proxy.wanted(), again.wanted());
        for family in Family::BOTH {
            prop_assert_eq!(text::table(&wanted, family), text::table(&again, family));
        }
    }

    #[test]
    fn a_start_over_any_table_ends_like_a_fresh_start(
        one in proptest::collection::vec(any_step(), 1..30),
        other in proptest::collection::vec(any_step(), 1..30),
    ) {
        let objects = |steps: Vec<Step>| -> BTreeMap<String, Event> {
            steps.into_iter().filter_map(|step| match step {
                Step::Event(event) => identity(&event).filter(|(_, there)| *there).map(|(id, _)| (id, event)),
                _ => None,
            }).collect()
        };
        let (one, other) = (objects(one), objects(other));
        let mut over = Proxy::new(state(), fresh(&one).kernel_mut().clone());
        for event in other.values().cloned().chain(all_listed()) {
            over.observe(event);
        }
        committed(&mut over);
        prop_assert_eq!(normal(over.kernel_mut()), normal(fresh(&other).kernel_mut()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 40, ..cases(25, SEEDS) })]

    /// What the fake kernel accepts, the real one does: a sample of the histories above.
    #[test]
    fn the_real_kernel_accepts_any_history(steps in proptest::collection::vec(any_step(), 20..80)) {
        in_namespace(|| {
            let mut proxy = Proxy::new(state(), NetlinkKernel::open().unwrap());
            all_listed().for_each(|event| proxy.observe(event));
            let mut rules = proxy.state().options();
            let commit = |proxy: &mut Proxy<NetlinkKernel>, rules: &mut Options| {
                let before = std::mem::replace(rules, proxy.state().options());
                let done = proxy.commit().unwrap();
                assert!(!done.adopted || before != *rules, "the kernel refused a transaction");
                assert_eq!(done.set_aside, 0);
            };
            proxy.commit().unwrap();
            for step in &steps {
                match step {
                    Step::Event(event) => proxy.observe(event.clone()),
                    Step::Settings(number) => proxy.configure(ALL_SETTINGS[*number]()),
                    Step::Relist(kind) => proxy.observe(Event::Listed(*kind)),
                    Step::Commit => commit(&mut proxy, &mut rules),
                    Step::Collect => {
                        proxy.collect_idle().unwrap();
                    }
                    Step::Tamper(_) => {
                        assert_eq!(proxy.repair().unwrap().set_aside, 0);
                        rules = proxy.state().options();
                    }
                }
            }
            commit(&mut proxy, &mut rules);
            proxy.collect_idle().unwrap();
            let left = proxy.plan().unwrap();
            let left: Vec<_> = left.iter().map(|(op, _)| text::op(op)).collect();
            assert!(left.is_empty(), "{left:#?}");
        });
    }
}
