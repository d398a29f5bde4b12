//! The maps of clients with session affinity: when there is one, and whose clients it may hold.

use nftproxy::contribution::Contributor;
use nftproxy::model::{Event, Protocol, Service, SessionAffinity, TrafficPolicy};
use nftproxy::nft::fake::{Failure, FakeKernel};
use nftproxy::nft::transaction::Op;
use nftproxy::reconcile::Proxy;

use crate::history::committed;
use crate::model::{all_listed, name, port, service, slice, state};

/// A packet that was on its way when the backend went may remember it afterwards.
#[test]
fn clients_of_a_backend_that_went_are_forgotten_at_once_and_once_more() {
    let with = |name: &str, last: u8, endpoints: &[&str]| {
        let address = format!("10.96.0.{last}");
        let service = Service {
            session_affinity: SessionAffinity::ClientIp { timeout: 10 },
            ..service(name, &[&address], &[port("", Protocol::Tcp, 80, 0)])
        };
        let slice = slice(name, "4", &[("", Protocol::Tcp, 8080)], endpoints);
        [Event::Service(service), Event::EndpointSlice(slice)]
    };
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    let web = with("web", 12, &["10.0.0.1", "10.0.0.2"]);
    web.into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
    committed(&mut proxy);
    // How many maps were told to forget by what was applied last.
    let forgotten = |proxy: &mut Proxy<FakeKernel>| {
        let last = proxy.kernel_mut().applied.last().unwrap();
        last.ops.iter().filter(|op| matches!(op, Op::Forget(..))).count()
    };
    // As many as before: no chain is left over. One less, and one more: there is.
    let others =
        [(&["10.0.0.1", "10.0.0.3"][..], 1), (&["10.0.0.1"], 1), (&["10.0.0.1", "10.0.0.2"], 0)];
    for (endpoints, meanwhile) in others {
        with("web", 12, endpoints).into_iter().for_each(|event| proxy.observe(event));
        proxy.commit().unwrap();
        assert_eq!(forgotten(&mut proxy), meanwhile, "{endpoints:?}");
        assert!(proxy.has_idle());
        proxy.collect_idle().unwrap();
        assert_eq!(forgotten(&mut proxy), meanwhile, "{endpoints:?}");
        assert!(!proxy.has_idle());
    }
}

#[test]
fn an_affinity_map_goes_when_nobody_claims_it_and_only_then() {
    let sticky = |name: &str, last: u8, session_affinity| {
        let addresses = [format!("10.96.0.{last}"), format!("203.0.113.{last}")];
        let addresses = addresses.each_ref().map(String::as_str);
        Event::Service(Service {
            session_affinity,
            external_traffic_policy: TrafficPolicy::Local,
            ..service(name, &addresses, &[port("", Protocol::Tcp, 80, 0)])
        })
    };
    let endpoints = |name: &str, endpoints: &[&str]| {
        Event::EndpointSlice(slice(name, "4", &[("", Protocol::Tcp, 8080)], endpoints))
    };
    let held = SessionAffinity::ClientIp { timeout: 10 };
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    for (name, last) in [("web", 12), ("other", 13)] {
        proxy.observe(sticky(name, last, held));
        proxy.observe(endpoints(name, &["10.0.0.1!"]));
    }
    all_listed().for_each(|event| proxy.observe(event));
    committed(&mut proxy);
    let mut left = |event: Event| {
        proxy.observe(event);
        proxy.commit().unwrap();
        proxy.collect_idle().unwrap();
        assert!(!proxy.has_idle());
        let dump = proxy.kernel_mut().dump();
        ["other", "web"].map(|name| dump.matches(&format!("/default/{name}/tcp: ")).count())
    };
    // An endpoint elsewhere changes the map of the Cluster policy alone.
    assert_eq!(left(endpoints("web", &["10.0.0.1!", "10.0.0.2"])), [2, 2]);
    assert_eq!(left(sticky("web", 12, SessionAffinity::None)), [2, 0]);
}

#[test]
fn who_is_refused_an_affinity_map_is_left_out_and_no_other() {
    let sticky = |name: &str, last: u8| {
        let address = format!("10.96.0.{last}");
        let service = Service {
            session_affinity: SessionAffinity::ClientIp { timeout: 10 },
            ..service(name, &[&address], &[port("", Protocol::Tcp, 80, 0)])
        };
        let slice = slice(name, "4", &[("", Protocol::Tcp, 8080)], &["10.0.0.1"]);
        [Event::Service(service), Event::EndpointSlice(slice)]
    };
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    all_listed().for_each(|event| proxy.observe(event));
    committed(&mut proxy);
    for (name, last) in [("a", 12), ("b", 13), ("c", 14)] {
        sticky(name, last).into_iter().for_each(|event| proxy.observe(event));
    }
    let refused = {
        let plan = proxy.plan().unwrap();
        let of_b =
            |op: &Op| matches!(op, Op::AddAffinity(_, name) if name.to_string().contains("/b/"));
        plan.iter().position(|(op, _)| of_b(op)).unwrap()
    };
    // The batch is refused, and so is the same change after reading back.
    proxy.kernel_mut().fail = vec![Failure::Refuse(refused, libc::ENFILE); 2];
    assert_eq!(proxy.commit().unwrap().set_aside, 1);
    assert!(proxy.has_refused());
    assert_eq!(proxy.refused().collect::<Vec<_>>(), [&Contributor::Service(name("b"))]);
}
