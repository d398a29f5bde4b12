//! What single changes come to: how many operations, in which order, and what is left of one that the kernel
//! refuses.

use std::collections::BTreeMap;
use std::net::IpAddr;

use nftproxy::model::{Event, Family, Kind, Protocol, Scheduler, Service, SessionAffinity};
use nftproxy::nft::dataplane::Options;
use nftproxy::nft::element::{Backend, ElementId, Key, Value};
use nftproxy::nft::fake::{Failure, FakeKernel};
use nftproxy::nft::kernel::{Applied, ApplyError, Kernel, LoadError, Loaded, Refusal};
use nftproxy::nft::names::SetName;
use nftproxy::nft::transaction::{Op, Transaction};
use nftproxy::reconcile::Proxy;
use nftproxy::settings::Settings;

use crate::history::committed;
use crate::model::{all_listed, example, name, port, service, settings, slice, state};

fn web(endpoints: &[&str]) -> [Event; 2] {
    [
        Event::Service(service("web", &["10.96.0.10"], &[port("", Protocol::Tcp, 80, 0)])),
        Event::EndpointSlice(slice("web", "4", &[("", Protocol::Tcp, 8080)], endpoints)),
    ]
}

#[test]
fn an_endpoint_more_is_two_elements_and_its_replacement_one() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    for event in example().into_iter().chain(web(&["10.0.0.1", "10.0.0.2"])).chain(all_listed()) {
        proxy.observe(event);
    }
    committed(&mut proxy);
    let ops = |proxy: &mut Proxy<FakeKernel>, endpoints: &[&str]| {
        web(endpoints).into_iter().for_each(|event| proxy.observe(event));
        proxy.commit().unwrap().operations
    };
    // A new slot, and the verdict replaced; internal-lb-3 is there for dns.
    assert_eq!(ops(&mut proxy, &["10.0.0.1", "10.0.0.2", "10.0.0.3"]), 3);
    assert_eq!(ops(&mut proxy, &["10.0.0.1", "10.0.0.4", "10.0.0.3"]), 2);
    // The first goes: the last takes its slot.
    assert_eq!(ops(&mut proxy, &["10.0.0.4", "10.0.0.3"]), 5);
    assert_eq!(ops(&mut proxy, &["10.0.0.3", "10.0.0.4"]), 0);
}

#[test]
fn chains_alone_are_something_to_collect() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    let alone = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"];
    for event in example().into_iter().chain(web(&alone)).chain(all_listed()) {
        proxy.observe(event);
    }
    committed(&mut proxy);
    assert!(!proxy.has_idle());
    proxy.observe(Event::Gone(Kind::Service, name("web")));
    proxy.commit().unwrap();
    assert!(proxy.has_idle());
    assert!(proxy.collect_idle().unwrap().operations > 0);
    assert!(!proxy.has_idle());
}

/// However many there are: of one Service, or of others.
#[test]
fn a_source_range_more_is_one_element() {
    let with = |name: &str, last: u8, ranges: std::ops::Range<u16>| {
        let addresses = [format!("10.96.1.{last}"), format!("203.0.113.{last}")];
        let ports = [port("", Protocol::Tcp, 80, 0)];
        let range = |n: u16| format!("172.16.{}.{}/28", n >> 4, (n & 15) << 4).parse().unwrap();
        Event::Service(Service {
            source_ranges: ranges.map(range).collect(),
            ..service(name, &addresses.each_ref().map(String::as_str), &ports)
        })
    };
    let endpoint = |name: &str| {
        Event::EndpointSlice(slice(name, "4", &[("", Protocol::Tcp, 8080)], &["10.0.0.1"]))
    };
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    proxy.observe(with("many", 1, 0..1_000));
    proxy.observe(endpoint("many"));
    for last in 10..210 {
        let name = format!("some-{last}");
        proxy.observe(with(&name, last, 0..20));
        proxy.observe(endpoint(&name));
    }
    all_listed().for_each(|event| proxy.observe(event));
    committed(&mut proxy);
    let ranges = |proxy: &mut Proxy<FakeKernel>| {
        proxy.kernel_mut().elements().filter(|(id, _)| id.set == SetName::SourceRanges).count()
    };
    assert_eq!(ranges(&mut proxy), 1_000 + 200 * 20);
    let mut ops = |event: Event| {
        proxy.observe(event);
        proxy.commit().unwrap().operations
    };
    assert_eq!(ops(with("many", 1, 0..1_001)), 1);
    assert_eq!(ops(with("some-10", 10, 0..21)), 1);
    assert_eq!(ops(with("some-10", 10, 1..21)), 1);
    // One of another length needs a chain that asks for it, with its rules; the frontend goes there.
    let Event::Service(mut longer) = with("some-11", 11, 0..20) else { unreachable!() };
    longer.source_ranges.push("198.51.100.7/32".parse().unwrap());
    assert_eq!(ops(Event::Service(longer.clone())), 5);
    longer.name = name("some-12");
    longer.cluster_ips = vec!["10.96.1.12".parse().unwrap()];
    longer.load_balancer_ips = vec!["203.0.113.12".parse().unwrap()];
    assert_eq!(ops(Event::Service(longer)), 3);
    // One Service more: its ClusterIP and two verdicts, two endpoints.
    ops(endpoint("new"));
    let new = ops(with("new", 250, 0..20));
    assert_eq!(new, 25);
    assert_eq!(ops(Event::Gone(Kind::Service, name("new"))), new);
}

#[test]
fn the_older_service_keeps_a_contested_frontend_and_the_next_takes_over() {
    let claim = |name: &str, cluster_ip: &str, created: i64| {
        let ports = [port("", Protocol::Tcp, 80, 0)];
        Event::Service(Service { created, ..service(name, &[cluster_ip, "198.51.100.1"], &ports) })
    };
    let endpoint = |name: &str, address: &str| {
        Event::EndpointSlice(slice(name, "4", &[("", Protocol::Tcp, 8080)], &[address]))
    };
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    let answer = |proxy: &mut Proxy<FakeKernel>| {
        proxy.commit().unwrap();
        let key = Key::Slot([198, 51, 100, 1].into(), Protocol::Tcp, 80, 0);
        let id = ElementId { family: Family::V4, set: SetName::Endpoints, key };
        let found = proxy.kernel_mut().elements().find(|(found, _)| **found == id);
        found.map(|(_, value)| value.clone())
    };
    let backend =
        |last: u8| Some(Value::Backend(Backend { address: [10, 244, 0, last].into(), port: 8080 }));
    all_listed().for_each(|event| proxy.observe(event));
    proxy.observe(claim("young", "10.96.0.2", 20));
    proxy.observe(endpoint("young", "10.244.0.2"));
    assert_eq!(answer(&mut proxy), backend(2));
    proxy.observe(claim("old", "10.96.0.1", 10));
    proxy.observe(endpoint("old", "10.244.0.1"));
    assert_eq!(answer(&mut proxy), backend(1));
    // The younger one changing does not matter.
    proxy.observe(claim("young", "10.96.0.2", 20));
    proxy.observe(endpoint("young", "10.244.0.3"));
    assert_eq!(answer(&mut proxy), backend(1));
    // While nobody could answer for the older one, the younger one serves.
    let none = |name: &str| Event::EndpointSlice(slice(name, "4", &[], &[]));
    proxy.observe(none("old"));
    assert_eq!(answer(&mut proxy), backend(3));
    proxy.observe(none("young"));
    assert_eq!(answer(&mut proxy), None);
    proxy.observe(endpoint("young", "10.244.0.3"));
    assert_eq!(answer(&mut proxy), backend(3));
    proxy.observe(Event::Gone(Kind::Service, name("young")));
    assert_eq!(answer(&mut proxy), None);
    proxy.observe(claim("young", "10.96.0.2", 20));
    assert_eq!(answer(&mut proxy), backend(3));
    proxy.observe(endpoint("old", "10.244.0.1"));
    assert_eq!(answer(&mut proxy), backend(1));
    proxy.observe(Event::Gone(Kind::Service, name("old")));
    assert_eq!(answer(&mut proxy), backend(3));
}

#[test]
fn a_refused_service_is_left_out_and_everything_else_committed() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    for event in example().into_iter().chain(all_listed()) {
        proxy.observe(event);
    }
    committed(&mut proxy);
    let before = proxy.kernel_mut().elements().count();
    web(&["10.0.0.1"]).into_iter().for_each(|event| proxy.observe(event));
    // The batch is refused, and so is the same change after reading back.
    let last = {
        let plan = proxy.plan().unwrap();
        plan.iter().position(|(op, _)| format!("{op:?}").contains("10.96.0.10")).unwrap()
    };
    proxy.kernel_mut().fail = vec![Failure::Refuse(last, libc::ENFILE); 2];
    proxy.observe(Event::EndpointSlice(slice(
        "dns",
        "4",
        &[("dns", Protocol::Udp, 53)],
        &["10.244.1.6!", "10.244.1.7!"],
    )));
    let done = proxy.commit().unwrap();
    assert!(done.adopted);
    assert_eq!(done.set_aside, 1);
    assert!(proxy.kernel_mut().elements().count() < before, "dns lost an endpoint");
    // It is tried again when it changes.
    web(&["10.0.0.2"]).into_iter().for_each(|event| proxy.observe(event));
    assert_eq!(proxy.commit().unwrap().set_aside, 0);
    let web = Key::Frontend([10, 96, 0, 10].into(), Protocol::Tcp, 80);
    assert!(proxy.kernel_mut().elements().any(|(id, _)| id.key == web));
}

#[test]
fn an_element_that_vanished_is_put_back_when_a_commit_meets_it() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    for event in web(&["10.0.0.1", "10.0.0.2"]).into_iter().chain(all_listed()) {
        proxy.observe(event);
    }
    committed(&mut proxy);
    let key = Key::Slot([10, 96, 0, 10].into(), Protocol::Tcp, 80, 1);
    let id = ElementId { family: Family::V4, set: SetName::Endpoints, key };
    assert!(proxy.kernel_mut().tamper(&id));
    web(&["10.0.0.1"]).into_iter().for_each(|event| proxy.observe(event));
    assert!(proxy.commit().unwrap().adopted);
    assert_eq!(
        proxy.kernel_mut().elements().filter(|(id, _)| matches!(id.key, Key::Slot(..))).count(),
        1
    );
}

/// Found by `any_history_ends_like_a_fresh_start`: other rules were forgotten until the next event.
#[test]
fn a_repair_brings_rules_that_wait_to_be_committed() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    for event in web(&["10.0.0.1"]).into_iter().chain(all_listed()) {
        proxy.observe(event);
    }
    committed(&mut proxy);
    proxy.configure(Settings { masquerade_all: true, ..settings() });
    assert!(proxy.is_stale());
    proxy.repair().unwrap();
    assert!(!proxy.is_stale());
    assert!(proxy.plan().unwrap().is_empty());
}

#[test]
fn a_chain_is_there_before_anything_leads_to_it() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    all_listed().for_each(|event| proxy.observe(event));
    web(&["10.0.0.1"]).into_iter().for_each(|event| proxy.observe(event));
    committed(&mut proxy);
    // Those for one endpoint more and one less are there already, as it takes the kernel long where maps are
    // large; and once there is time, their next ones. What is not needed any more goes.
    let makes_chains = |op: &Op| matches!(op, Op::AddChain(..) | Op::AddRules(..));
    let lb = |proxy: &mut Proxy<FakeKernel>| -> String {
        let dump = proxy.kernel_mut().dump();
        let lines = dump.lines().filter(|line| line.contains(" chain ") && line.contains(" lb-"));
        lines.map(|line| line.split(" lb-").nth(1).unwrap()[..1].to_owned()).collect()
    };
    let all = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
    for (endpoints, chains) in [(2, "123"), (3, "234"), (2, "123"), (1, "12"), (2, "123")] {
        let before = proxy.kernel_mut().applied.len();
        web(&all[..endpoints]).into_iter().for_each(|event| proxy.observe(event));
        committed(&mut proxy);
        let applied = &proxy.kernel_mut().applied[before..];
        assert!(!applied.iter().flat_map(|batch| &batch.ops).any(makes_chains), "{applied:?}");
        proxy.collect_idle().unwrap();
        assert_eq!(lb(&mut proxy), chains);
    }
    let before = proxy.kernel_mut().applied.len();
    let four = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"];
    web(&four).into_iter().for_each(|event| proxy.observe(event));
    committed(&mut proxy);
    // A packet on its way sees new elements, but of a chain made with them only the empty beginning.
    let applied = &proxy.kernel_mut().applied[before..];
    let [first, then] = applied else { panic!("{applied:?}") };
    assert!(first.ops.iter().all(makes_chains), "{first:?}");
    assert!(!then.ops.iter().any(makes_chains), "{then:?}");
    // The next Service of that size finds it.
    let other = service("other", &["10.96.0.11"], &[port("", Protocol::Tcp, 80, 0)]);
    proxy.observe(Event::Service(other));
    let slice = slice("other", "4", &[("", Protocol::Tcp, 80)], &four);
    proxy.observe(Event::EndpointSlice(slice));
    committed(&mut proxy);
    assert_eq!(proxy.kernel_mut().applied.len(), before + 3);
}

/// Each transaction has the kernel walk all verdicts.
#[test]
fn what_was_led_nowhere_before_comes_with_its_chains_at_once() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    all_listed().for_each(|event| proxy.observe(event));
    committed(&mut proxy);
    let sent = |proxy: &mut Proxy<FakeKernel>, session_affinity, endpoints: &[&str]| {
        let [Event::Service(service), slice] = web(endpoints) else { unreachable!() };
        let before = proxy.kernel_mut().applied.len();
        proxy.observe(Event::Service(Service { session_affinity, ..service }));
        proxy.observe(slice);
        committed(proxy);
        proxy.kernel_mut().applied.len() - before
    };
    let affinity = SessionAffinity::ClientIp { timeout: 600 };
    // Nobody can answer, so that it is refused; then somebody can.
    assert_eq!(sent(&mut proxy, affinity, &[]), 1);
    assert_eq!(sent(&mut proxy, affinity, &["10.0.0.1"]), 1);
    proxy.collect_idle().unwrap();
    // It is led elsewhere: to two, as others are whose clients are not remembered, and then as all others are.
    assert_eq!(sent(&mut proxy, affinity, &["10.0.0.1", "10.0.0.2"]), 1);
    assert_eq!(sent(&mut proxy, SessionAffinity::None, &["10.0.0.1", "10.0.0.2"]), 1);
    // Back to a chain that asks for the client's last endpoint, which has gone since.
    proxy.collect_idle().unwrap();
    assert_eq!(sent(&mut proxy, affinity, &["10.0.0.1", "10.0.0.2"]), 2);
    assert_eq!(sent(&mut proxy, SessionAffinity::None, &["10.0.0.1", "10.0.0.2"]), 1);
    // Nowhere, and back to where it was.
    assert_eq!(sent(&mut proxy, SessionAffinity::None, &[]), 1);
    assert_eq!(sent(&mut proxy, SessionAffinity::None, &["10.0.0.1", "10.0.0.2"]), 1);
}

/// A kernel that refuses one backend.
struct Refusing(FakeKernel, IpAddr);

impl Kernel for Refusing {
    fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
        self.0.load(options)
    }

    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        let refused = |op: &Op| matches!(op, Op::AddElement(_, Value::Backend(backend)) if backend.address == self.1);
        let Some(op) = transaction.ops.iter().position(refused) else {
            return self.0.apply(transaction);
        };
        let refusal = Refusal { op: Some(op), errno: libc::ENFILE, message: None };
        Err(ApplyError::Refused { refusals: vec![refusal] })
    }

    fn apply_to_stand_in(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.0.apply_to_stand_in(transaction)
    }

    fn let_packets_pass(&mut self) {}
}

#[test]
fn a_refused_change_leaves_no_trace_of_the_chains_made_for_it() {
    let mut proxy = Proxy::new(state(), Refusing(FakeKernel::default(), [10, 0, 0, 2].into()));
    all_listed().for_each(|event| proxy.observe(event));
    web(&["10.0.0.1"]).into_iter().for_each(|event| proxy.observe(event));
    proxy.commit().unwrap();
    let before = proxy.kernel_mut().0.dump();
    // The chain for two is made; the change that needs it is refused, and again after reading back.
    web(&["10.0.0.1", "10.0.0.2"]).into_iter().for_each(|event| proxy.observe(event));
    assert_eq!(proxy.commit().unwrap().set_aside, 1);
    assert_eq!(proxy.kernel_mut().0.dump(), before);
    // The same at a start, which takes over what is there; the refused Service has nothing then.
    let kernel = proxy.kernel_mut().0.clone();
    let mut started = Proxy::new(state(), Refusing(kernel, [10, 0, 0, 2].into()));
    all_listed().for_each(|event| started.observe(event));
    web(&["10.0.0.1", "10.0.0.2"]).into_iter().for_each(|event| started.observe(event));
    assert_eq!(started.commit().unwrap().set_aside, 1);
    assert!(!started.kernel_mut().0.dump().contains("chain lb-"));
    // It changes, and is committed as if nothing had been.
    web(&["10.0.0.1", "10.0.0.3"]).into_iter().for_each(|event| proxy.observe(event));
    let done = proxy.commit().unwrap();
    assert_eq!((done.adopted, done.set_aside), (false, 0));
    proxy.collect_idle().unwrap();
    assert!(proxy.plan().unwrap().is_empty());
}

/// A kernel whose next answer lacks these elements, or for which somebody adds them just then.
struct Forgetful(FakeKernel, Vec<ElementId>);

impl Kernel for Forgetful {
    fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
        let mut loaded = self.0.load(options)?;
        for id in self.1.drain(..) {
            loaded.tables.get_mut(&id.family).unwrap().elements.remove(&id).unwrap();
        }
        Ok(loaded)
    }

    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.0.apply(transaction)
    }

    fn apply_to_stand_in(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.0.apply_to_stand_in(transaction)
    }

    fn let_packets_pass(&mut self) {}
}

#[test]
fn what_the_kernel_holds_against_what_was_read_is_no_fault_of_an_object() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    all_listed().for_each(|event| proxy.observe(event));
    // The newcomer takes the first slot: [5, 2, 3].
    for endpoints in [["10.0.0.1", "10.0.0.2", "10.0.0.3"], ["10.0.0.2", "10.0.0.3", "10.0.0.5"]] {
        web(&endpoints).into_iter().for_each(|event| proxy.observe(event));
        committed(&mut proxy);
    }
    let kernel = proxy.kernel_mut().clone();
    let slot = |slot| ElementId {
        family: Family::V4,
        set: SetName::Endpoints,
        key: Key::Slot([10, 96, 0, 10].into(), Protocol::Tcp, 80, slot),
    };
    // A start that does not see the first two numbers them anew, which the kernel refuses.
    let mut restarted = Proxy::new(state(), Forgetful(kernel.clone(), vec![slot(0), slot(1)]));
    let endpoints = ["10.0.0.2", "10.0.0.3", "10.0.0.5"];
    web(&endpoints).into_iter().chain(all_listed()).for_each(|event| restarted.observe(event));
    let done = restarted.commit().unwrap();
    assert_eq!((done.set_aside, restarted.set_aside_count()), (0, 0));
    assert!(restarted.plan().unwrap().is_empty());
    let elements = |kernel: &FakeKernel| kernel.elements().count();
    assert_eq!(elements(&restarted.kernel_mut().0), elements(&kernel));
}

#[test]
fn a_maglev_service_has_the_whole_table_and_each_endpoint_its_share() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    let [Event::Service(web), endpoints] = web(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]) else {
        unreachable!()
    };
    let web = Event::Service(Service { scheduler: Scheduler::Maglev, ..web });
    [web, endpoints].into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
    committed(&mut proxy);
    let mut shares = BTreeMap::new();
    for (id, value) in proxy.kernel_mut().elements() {
        if let (Key::Slot(..), Value::Backend(backend)) = (id.key, value) {
            *shares.entry(*backend).or_insert(0) += 1;
        }
    }
    assert_eq!(shares.len(), 3);
    assert_eq!(shares.values().sum::<i32>(), 1021);
    assert!(shares.values().all(|share| (340..=341).contains(share)), "{shares:?}");
}

/// A pod of this node that can be given itself, by either Service.
#[test]
fn an_element_that_two_services_ask_for_goes_with_the_last_one() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    let other = service("other", &["10.96.0.11"], &[port("", Protocol::Tcp, 80, 0)]);
    let others = slice("other", "4", &[("", Protocol::Tcp, 80)], &["10.0.0.1!"]);
    let others = [Event::Service(other), Event::EndpointSlice(others)];
    web(&["10.0.0.1!"]).into_iter().chain(others).for_each(|event| proxy.observe(event));
    all_listed().for_each(|event| proxy.observe(event));
    committed(&mut proxy);
    let pairs = |proxy: &mut Proxy<FakeKernel>| {
        proxy.kernel_mut().elements().filter(|(id, _)| id.set == SetName::Hairpin).count()
    };
    assert_eq!(pairs(&mut proxy), 1);
    for (gone, left) in [("web", 1), ("other", 0)] {
        proxy.observe(Event::Gone(Kind::Service, name(gone)));
        committed(&mut proxy);
        assert_eq!(pairs(&mut proxy), left);
    }
}
