//! The kernel does not do as asked, for a reason of its own: the answer is a retry or to leave a single
//! object out, nothing is half done, and when the cause is gone everything is programmed.

use libc::{
    EACCES, EAGAIN, EBUSY, EEXIST, EINTR, EINVAL, ENFILE, ENOBUFS, ENOENT, ENOMEM, ENOSPC, EPERM,
};
use nftproxy::contribution::Contributor;
use nftproxy::model::{Event, Kind, Notice, Protocol, Service, Standing, Topic, TrafficPolicy};
use nftproxy::nft::dataplane::Options;
use nftproxy::nft::element::{ElementId, Key};
use nftproxy::nft::fake::{Failure, FakeKernel};
use nftproxy::nft::kernel::{Applied, ApplyError, Kernel, LoadError, Loaded, Refusal};
use nftproxy::nft::transaction::{Op, Transaction};
use nftproxy::reconcile::Proxy;
use nftproxy::settings::Settings;
use proptest::prelude::*;

use crate::history::{Objects, Step, any_step, fresh, normal};
use crate::model::{all_listed, name, port, service, settings, slice, state};

/// Errors that speak of the process or the machine.
const SYSTEM: [i32; 6] = [EACCES, EAGAIN, EINTR, ENOBUFS, ENOMEM, EPERM];
/// Errors that may be an object's own.
const OBJECT: [i32; 6] = [EBUSY, EEXIST, EINVAL, ENFILE, ENOENT, ENOSPC];

/// Number `n` of many Services, with one endpoint.
fn events(n: u8) -> [Event; 2] {
    let named = format!("s-{n}");
    let address = format!("10.96.1.{n}");
    let endpoint = format!("10.244.2.{n}");
    [
        Event::Service(service(&named, &[&address], &[port("", Protocol::Tcp, 80, 0)])),
        Event::EndpointSlice(slice(&named, "4", &[("", Protocol::Tcp, 8080)], &[&endpoint])),
    ]
}

/// Refuses elements, each for itself, as the kernel does.
struct Refusing<F> {
    kernel: FakeKernel,
    /// The error number, if this one is refused.
    refuses: F,
}

impl<F: FnMut(&ElementId) -> Option<i32>> Kernel for Refusing<F> {
    fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
        self.kernel.load(options)
    }

    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        let refused = transaction.ops.iter().enumerate().filter_map(|(index, op)| {
            let Op::AddElement(id, _) = op else { return None };
            let errno = (self.refuses)(id)?;
            Some(Refusal { op: Some(index), errno, message: None })
        });
        let refusals: Vec<_> = refused.collect();
        if refusals.is_empty() {
            self.kernel.apply(transaction)
        } else {
            Err(ApplyError::Refused { refusals })
        }
    }

    fn apply_to_stand_in(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.kernel.apply_to_stand_in(transaction)
    }

    fn let_packets_pass(&mut self) {}
}

fn of_service(id: &ElementId, n: u8) -> bool {
    matches!(id.key, Key::Frontend(address, ..) | Key::Slot(address, ..)
        if address == std::net::IpAddr::from([10, 96, 1, n]))
}

fn is_programmed<K: Kernel>(proxy: &mut Proxy<K>) -> bool {
    !proxy.has_refused() && proxy.plan().unwrap().is_empty()
}

#[test]
fn a_failure_of_the_moment_is_tried_again_and_leaves_nobody_out() {
    let all = SYSTEM.into_iter().flat_map(|errno| {
        [Failure::Refuse(0, errno), Failure::Refuse(1, errno), Failure::Send(errno)]
    });
    for failure in all {
        let mut proxy = Proxy::new(state(), FakeKernel::default());
        events(1).into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
        proxy.commit().unwrap();
        let before = proxy.kernel_mut().dump();
        events(2).into_iter().for_each(|event| proxy.observe(event));
        // The change, and the same over what is read back.
        proxy.kernel_mut().fail = vec![failure; 2];
        proxy.commit().unwrap_err();
        assert_eq!(proxy.kernel_mut().dump(), before, "{failure:?}");
        assert!(proxy.is_stale() && !proxy.has_refused(), "{failure:?}");
        proxy.commit().unwrap();
        assert!(is_programmed(&mut proxy), "{failure:?}");
        assert_eq!(proxy.take_notices(), [], "{failure:?}");
    }
}

#[test]
fn an_answer_that_is_lost_and_tables_that_cannot_be_read_change_nothing_in_the_end() {
    for errno in [EINTR, EAGAIN, ENOBUFS, ENOMEM] {
        let mut proxy = Proxy::new(state(), FakeKernel::default());
        events(1).into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
        // At the start, nothing may be sent before it is known what there is.
        proxy.kernel_mut().fail_load = vec![errno];
        proxy.commit().unwrap_err();
        assert!(proxy.kernel_mut().applied.is_empty());
        proxy.commit().unwrap();
        // It is in force, and nobody knows; and then nobody can look.
        events(2).into_iter().for_each(|event| proxy.observe(event));
        proxy.kernel_mut().fail = vec![Failure::Answer(errno)];
        proxy.kernel_mut().fail_load = vec![errno];
        proxy.commit().unwrap_err();
        let in_force = proxy.kernel_mut().dump();
        assert!(proxy.is_stale());
        proxy.commit().unwrap();
        assert!(is_programmed(&mut proxy));
        assert_eq!(proxy.kernel_mut().dump(), in_force);
    }
}

/// What was asked for is taken back before anybody knows that it is in force.
#[test]
fn what_is_in_force_unknown_to_us_goes_when_it_is_no_longer_wanted() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    events(1).into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
    proxy.commit().unwrap();
    let before = proxy.kernel_mut().dump();
    events(2).into_iter().for_each(|event| proxy.observe(event));
    proxy.kernel_mut().fail = vec![Failure::Answer(ENOBUFS)];
    proxy.kernel_mut().fail_load = vec![ENOBUFS];
    proxy.commit().unwrap_err();
    assert_ne!(proxy.kernel_mut().dump(), before);
    proxy.observe(Event::Gone(Kind::Service, name("s-2")));
    proxy.commit().unwrap();
    assert_eq!(proxy.kernel_mut().dump(), before);
    assert!(!proxy.is_stale() && is_programmed(&mut proxy));
}

#[test]
fn one_refused_operation_costs_its_service_alone_until_the_cause_is_gone() {
    for errno in OBJECT.into_iter().chain(SYSTEM) {
        let trouble = std::rc::Rc::new(std::cell::Cell::new(true));
        let stands = trouble.clone();
        let refuses = move |id: &ElementId| (stands.get() && of_service(id, 2)).then_some(errno);
        let mut proxy = Proxy::new(state(), Refusing { kernel: FakeKernel::default(), refuses });
        events(1).into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
        proxy.commit().unwrap();
        (2..=3).flat_map(events).for_each(|event| proxy.observe(event));
        // What may be the system's is tried as a whole twice more.
        let tries = if SYSTEM.contains(&errno) { 2 } else { 0 };
        for _ in 0..tries {
            proxy.commit().unwrap_err();
            assert_eq!(proxy.set_aside_count(), 0);
        }
        assert_eq!(proxy.commit().unwrap().set_aside, 1, "errno {errno}");
        let has = |proxy: &mut Proxy<Refusing<_>>, n| {
            proxy.kernel_mut().kernel.elements().any(|(id, _)| of_service(id, n))
        };
        assert_eq!([1, 2, 3].map(|n| has(&mut proxy, n)), [true, false, true]);
        let notices = proxy.take_notices();
        let [Notice { service, topic: Topic::Refused, standing: Standing::Is(said), .. }] =
            &notices[..]
        else {
            panic!("{notices:?}")
        };
        assert_eq!((service, said.len()), (&name("s-2"), 1));
        // Others change meanwhile. Tried again in vain, it is not told again.
        events(4).into_iter().for_each(|event| proxy.observe(event));
        assert!(!proxy.commit().unwrap().adopted);
        proxy.retry_set_aside();
        while proxy.commit().is_err() {}
        assert_eq!((proxy.set_aside_count(), proxy.take_notices()), (1, vec![]));
        // Nobody changes it: it is enough that the cause is gone.
        trouble.set(false);
        proxy.retry_set_aside();
        proxy.commit().unwrap();
        assert!(has(&mut proxy, 2) && is_programmed(&mut proxy), "errno {errno}");
        let over = Notice::new(name("s-2"), Topic::Refused, Standing::Over);
        assert_eq!(proxy.take_notices(), [over]);
    }
}

#[test]
fn a_service_that_is_left_out_keeps_what_it_had_when_rules_change() {
    let refuses = |id: &ElementId| matches!(id.key, Key::Slot(.., 1)).then_some(EINVAL);
    let mut proxy = Proxy::new(state(), Refusing { kernel: FakeKernel::default(), refuses });
    events(1).into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
    proxy.commit().unwrap();
    let two = slice("s-1", "4", &[("", Protocol::Tcp, 8080)], &["10.244.2.1", "10.244.2.2"]);
    proxy.observe(Event::EndpointSlice(two));
    assert_eq!(proxy.commit().unwrap().set_aside, 1);
    let held = |proxy: &mut Proxy<Refusing<_>>| -> Vec<_> {
        let elements = proxy.kernel_mut().kernel.elements();
        elements.filter(|(id, _)| of_service(id, 1)).map(|(id, _)| *id).collect()
    };
    let before = held(&mut proxy);
    assert!(!before.is_empty());
    proxy.configure(Settings { masquerade_all: true, ..settings() });
    proxy.observe(events(2)[0].clone());
    proxy.commit().unwrap();
    assert_eq!((held(&mut proxy), proxy.set_aside_count()), (before, 1));
}

#[test]
fn what_hits_everybody_leaves_nobody_out() {
    for errno in SYSTEM {
        let trouble = std::rc::Rc::new(std::cell::Cell::new(false));
        let stands = trouble.clone();
        let refuses = move |_: &ElementId| stands.get().then_some(errno);
        let mut proxy = Proxy::new(state(), Refusing { kernel: FakeKernel::default(), refuses });
        all_listed().for_each(|event| proxy.observe(event));
        proxy.commit().unwrap();
        let before = proxy.kernel_mut().kernel.dump();
        trouble.set(true);
        (0..200).flat_map(events).for_each(|event| proxy.observe(event));
        for _ in 0..10 {
            proxy.commit().unwrap_err();
            assert_eq!((proxy.set_aside_count(), proxy.take_notices()), (0, vec![]));
        }
        // New chains, to which nothing leads, are all that may be there of it.
        let now = proxy.kernel_mut().kernel.dump();
        let is_chain = |line: &str| line.contains(" chain ") && line.contains("lb-");
        assert!(now.lines().all(|line| before.contains(line) || is_chain(line)));
        trouble.set(false);
        proxy.commit().unwrap();
        assert!(is_programmed(&mut proxy));
    }
}

fn any_failure() -> impl Strategy<Value = Failure> {
    let errno = proptest::sample::select([SYSTEM, OBJECT].concat());
    (0..3_u8, 0..12_usize, errno).prop_map(|(how, op, errno)| match how {
        0 => Failure::Refuse(op, errno),
        1 => Failure::Send(errno),
        _ => Failure::Answer(errno),
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever fails on the way: when nothing fails any more, the table is that of a fresh start, and
    /// nothing has to change for that.
    #[test]
    fn any_failures_on_the_way_are_made_up_for(
        steps in proptest::collection::vec((any_step(), proptest::option::of(any_failure())), 1..50),
    ) {
        let mut proxy = Proxy::new(state(), FakeKernel::default());
        let mut objects = Objects::default();
        all_listed().for_each(|event| proxy.observe(event));
        for (step, failure) in steps {
            proxy.kernel_mut().fail.extend(failure);
            match step {
                Step::Event(event) => {
                    objects.observe(&event);
                    proxy.observe(event);
                }
                Step::Commit => drop(proxy.commit()),
                Step::Collect => drop(proxy.collect_idle()),
                // Histories without failures have them.
                Step::Settings(_) | Step::Relist(_) | Step::Tamper(_) => {}
            }
        }
        proxy.kernel_mut().fail.clear();
        proxy.retry_set_aside();
        prop_assert_eq!(proxy.commit().unwrap().set_aside, 0);
        proxy.collect_idle().unwrap();
        let left = proxy.plan().unwrap();
        prop_assert!(!proxy.has_refused() && left.is_empty(), "{:?}", left);
        let mut fresh = fresh(&objects.0);
        prop_assert_eq!(normal(proxy.kernel_mut()), normal(fresh.kernel_mut()));
    }
}

/// A Service that is set aside keeps what it had; but not what became another's meanwhile, which would go
/// with it in the end.
#[test]
fn what_a_service_that_is_set_aside_had_can_be_anothers() {
    let claim = |name: &str, address: &str, policy| {
        let ports = [port("", Protocol::Tcp, 81, 0)];
        let service = service(name, &[address], &ports);
        Event::Service(Service { internal_traffic_policy: policy, ..service })
    };
    let endpoint = slice("c", "4", &[("", Protocol::Tcp, 8080)], &["10.244.0.1"]);
    for is_read_back in [false, true] {
        let mut proxy = Proxy::new(state(), FakeKernel::default());
        // Nobody answers for the one, and nobody here for the other: both refuse, but one by dropping.
        proxy.observe(claim("a", "10.96.0.1", TrafficPolicy::Cluster));
        proxy.observe(claim("c", "10.96.0.1", TrafficPolicy::Local));
        proxy.observe(Event::EndpointSlice(endpoint.clone()));
        all_listed().for_each(|event| proxy.observe(event));
        proxy.commit().unwrap();
        // The other is refused what it asks for, and again over what is read back.
        let elsewhere = claim("c", "10.96.0.2", TrafficPolicy::Cluster);
        proxy.kernel_mut().fail = vec![Failure::Refuse(0, EBUSY); 2];
        proxy.observe(elsewhere.clone());
        assert_eq!(proxy.commit().unwrap().set_aside, 1);
        assert_eq!(proxy.refused().collect::<Vec<_>>(), [&Contributor::Service(name("c"))]);
        if is_read_back {
            proxy.repair().unwrap();
        }
        proxy.retry_set_aside();
        assert_eq!(proxy.commit().unwrap().set_aside, 0);
        proxy.collect_idle().unwrap();
        assert_eq!(proxy.plan().unwrap(), [], "{is_read_back}");
    }
}

/// What the owners learn of frontends that several Services name.
#[test]
fn the_owner_of_a_service_that_loses_a_frontend_learns_of_it_and_that_it_is_over() {
    let claim = |name: &str, cluster_ip: &str, created: i64| {
        let ports = [port("", Protocol::Tcp, 80, 0)];
        Event::Service(Service { created, ..service(name, &[cluster_ip, "198.51.100.1"], &ports) })
    };
    let endpoint = |name: &str, endpoints: &[&str]| {
        Event::EndpointSlice(slice(name, "4", &[("", Protocol::Tcp, 8080)], endpoints))
    };
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    all_listed().for_each(|event| proxy.observe(event));
    let mut after = |event: Event| {
        proxy.observe(event);
        proxy.commit().unwrap();
        let notices = proxy.take_notices().into_iter();
        notices
            .map(|Notice { service, topic, standing, .. }| {
                assert_eq!(topic, Topic::Conflict);
                let standing = match standing {
                    Standing::Is(said) => said.join("; "),
                    other => format!("{other:?}"),
                };
                format!("{service}: {standing}")
            })
            .collect::<Vec<_>>()
    };
    let served_by = |by: &str| {
        format!(
            "198.51.100.1:80/tcp is served by Service default/{by}, which is older, or which alone has \
             endpoints; this one takes over when that goes"
        )
    };
    assert_eq!(after(claim("young", "10.96.0.2", 20)), [""; 0]);
    assert_eq!(after(endpoint("young", &["10.244.0.2"])), [""; 0]);
    // The older one comes; as long as nobody answers for it, it is the one that waits.
    let waits = format!("default/old: {}", served_by("young"));
    assert_eq!(after(claim("old", "10.96.0.1", 10)), std::slice::from_ref(&waits));
    let lost = format!("default/young: {}", served_by("old"));
    assert_eq!(
        after(endpoint("old", &["10.244.0.1"])),
        ["default/old: Over".to_owned(), lost.clone()]
    );
    assert_eq!(after(endpoint("old", &["10.244.0.1", "10.244.0.3"])), [""; 0], "nothing new");
    assert_eq!(after(endpoint("old", &[])), [waits, "default/young: Over".to_owned()]);
    assert_eq!(after(endpoint("old", &["10.244.0.1"])), ["default/old: Over".to_owned(), lost]);
    // It goes, or it is the loser that goes.
    assert_eq!(after(Event::Gone(Kind::Service, name("old"))), ["default/young: Over"]);
    assert_eq!(after(claim("old", "10.96.0.1", 10)).len(), 1);
    assert_eq!(after(Event::Gone(Kind::Service, name("young"))), ["default/young: Gone"]);
}

/// Otherwise it would be kept for as long as the program lives, for each Service that ever was.
#[test]
fn what_was_said_of_a_service_goes_with_it_also_while_tables_are_read_back() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    let claim = |name: &str| {
        Event::Service(service(name, &["10.96.0.1"], &[port("", Protocol::Tcp, 80, 0)]))
    };
    ["a", "b"].map(claim).into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
    proxy.commit().unwrap();
    assert_eq!(proxy.problems().count(), 1, "both claim an address");
    assert!(matches!(proxy.take_notices()[..], [Notice { standing: Standing::Is(_), .. }]));
    proxy.observe(Event::Gone(Kind::Service, name("b")));
    proxy.repair().unwrap();
    assert_eq!(proxy.problems().next(), None);
    let [Notice { service, standing: Standing::Gone, topic: Topic::Conflict, .. }] =
        &proxy.take_notices()[..]
    else {
        panic!("it is over");
    };
    assert_eq!(*service, name("b"));
}

#[test]
fn of_more_endpoints_than_there_are_slots_the_first_are_used_and_it_is_said() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    let mut heavy = slice("web", "4", &[("", Protocol::Tcp, 8080)], &["10.0.0.1", "10.0.0.2"]);
    heavy.endpoints.iter_mut().for_each(|endpoint| endpoint.weight = 20_000);
    let web = service("web", &["10.96.0.1"], &[port("", Protocol::Tcp, 80, 0)]);
    for event in [Event::Service(web), Event::EndpointSlice(heavy)].into_iter().chain(all_listed())
    {
        proxy.observe(event);
    }
    proxy.commit().unwrap();
    let said: Vec<_> = proxy.problems().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "Service default/web: spec.ports: port \"\" has 40000 endpoints (counted by their weights), \
          the first 32768 are used"
        ]
    );
    let slots = proxy.kernel_mut().elements().filter(|(id, _)| matches!(id.key, Key::Slot(..)));
    assert_eq!(slots.count(), 32_768);
}
