//! What a commit amounts to for others than the kernel: connection tracking, metrics and owners.

use std::cell::Cell;
use std::rc::Rc;

use nftproxy::model::{Event, Kind, Protocol};
use nftproxy::nft::dataplane::Options;
use nftproxy::nft::element::{ElementId, Key, Value};
use nftproxy::nft::fake::FakeKernel;
use nftproxy::nft::kernel::{Applied, ApplyError, Kernel, LoadError, Loaded, Refusal};
use nftproxy::nft::names::SetName;
use nftproxy::nft::transaction::{Op, Transaction};
use nftproxy::recent::Trace;
use nftproxy::reconcile::Proxy;
use nftproxy::settings::Settings;

use crate::history::committed;
use crate::model::{all_listed, name, port, service, settings, slice, state};

/// A Service of one port and one node port, over UDP or TCP, with these endpoints.
fn served(name: &str, last: u8, protocol: Protocol, endpoints: &[&str]) -> [Event; 2] {
    let node_port = 30000 + u16::from(last);
    let ports = [port("", protocol, 53, node_port)];
    [
        Event::Service(service(name, &[&format!("10.96.0.{last}")], &ports)),
        Event::EndpointSlice(slice(name, "4", &[("", protocol, 5353)], endpoints)),
    ]
}

/// How many frontends the commits since the last call may have left flows at.
fn swept(proxy: &mut Proxy<FakeKernel>) -> usize {
    proxy.take_sweep().map_or(0, |sweep| sweep.sought())
}

fn observed(proxy: &mut Proxy<FakeKernel>, events: impl IntoIterator<Item = Event>) {
    events.into_iter().for_each(|event| proxy.observe(event));
    committed(proxy);
}

#[test]
fn flows_are_looked_for_where_a_udp_service_lost_an_endpoint_or_was_not_there() {
    let dns = |endpoints: &[&str]| served("dns", 10, Protocol::Udp, endpoints);
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    let web = served("web", 11, Protocol::Tcp, &["10.0.0.1"]);
    let events = dns(&["10.0.0.1", "10.0.0.2"]).into_iter().chain(web).chain(all_listed());
    observed(&mut proxy, events);
    // Its ClusterIP and its node port.
    assert_eq!(swept(&mut proxy), 2);
    assert_eq!(swept(&mut proxy), 0, "nothing since");
    observed(&mut proxy, dns(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]));
    assert_eq!(swept(&mut proxy), 0, "no flow is stale by one more");
    observed(&mut proxy, served("web", 11, Protocol::Tcp, &["10.0.0.9"]));
    assert_eq!(swept(&mut proxy), 0, "over TCP both ends notice");
    observed(&mut proxy, dns(&["10.0.0.1"]));
    assert_eq!(swept(&mut proxy), 2);
    // What is read back and is as it should be says nothing new; what was missing does.
    proxy.collect_idle().unwrap();
    proxy.repair().unwrap();
    assert_eq!(swept(&mut proxy), 0);
    let id = *proxy.kernel_mut().elements().find(|(id, _)| id.set == SetName::Endpoints).unwrap().0;
    assert!(proxy.kernel_mut().tamper(&id));
    proxy.repair().unwrap();
    assert_eq!(swept(&mut proxy), 2);
    observed(&mut proxy, [Event::Gone(Kind::Service, name("dns"))]);
    assert_eq!(swept(&mut proxy), 2);
}

#[test]
fn a_start_looks_for_flows_at_what_it_finds_in_the_tables_and_nobody_has_any_more() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    let dns = served("dns", 10, Protocol::Udp, &["10.0.0.1"]);
    let log = served("log", 11, Protocol::Udp, &["10.0.0.1"]);
    observed(&mut proxy, dns.clone().into_iter().chain(log).chain(all_listed()));
    let kernel = proxy.kernel_mut().clone();
    let mut restarted = Proxy::new(state(), kernel);
    observed(&mut restarted, dns.into_iter().chain(all_listed()));
    assert_eq!(swept(&mut restarted), 4);
}

#[test]
fn a_start_numbers_backends_as_the_tables_have_them_and_changes_nothing() {
    let web = |endpoints: &[&str]| served("web", 10, Protocol::Tcp, endpoints);
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    let events = web(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    observed(&mut proxy, events.into_iter().chain(all_listed()));
    observed(&mut proxy, web(&["10.0.0.2", "10.0.0.3"]));
    observed(&mut proxy, web(&["10.0.0.2", "10.0.0.3", "10.0.0.4"]));
    proxy.collect_idle().unwrap();
    let mut restarted = Proxy::new(state(), proxy.kernel_mut().clone());
    let events = web(&["10.0.0.2", "10.0.0.3", "10.0.0.4"]);
    events.into_iter().chain(all_listed()).for_each(|event| restarted.observe(event));
    assert!(restarted.plan().unwrap().is_empty());
    assert_eq!(restarted.commit().unwrap().operations, 0);
}

#[test]
fn what_waits_is_what_was_changed_and_not_committed() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    assert!(!proxy.is_complete() && !proxy.counts());
    all_listed().for_each(|event| proxy.observe(event));
    assert!(proxy.is_complete());
    committed(&mut proxy);
    let web = served("web", 10, Protocol::Tcp, &["10.0.0.1"]);
    web.clone().into_iter().for_each(|event| proxy.observe(event));
    proxy.observe(served("other", 11, Protocol::Tcp, &[])[0].clone());
    // Said once more, it changes nothing.
    proxy.observe(web[0].clone());
    let account = proxy.account_mut();
    assert_eq!((account.seen().services, account.waiting().services), (3, 2));
    proxy.take_trace();
    proxy.commit().unwrap();
    assert_eq!(proxy.account_mut().waiting().services, 0);
    assert_ne!(proxy.take_trace(), Trace::default());
    assert_eq!(proxy.take_trace(), Trace::default());
    proxy.configure(Settings { counters: true, ..settings() });
    proxy.commit().unwrap();
    assert!(proxy.counts());
    assert_eq!(proxy.account_mut().take_served().len(), 2);
    observed(&mut proxy, [Event::Gone(Kind::Service, name("web"))]);
    let gone = proxy.account_mut().take_served();
    assert_eq!(gone, [(name("web"), Vec::new())].into());
}

/// It is in the refusal, and another one each time.
#[test]
fn the_number_of_a_refused_operation_is_no_other_reason() {
    struct Refusing(FakeKernel);
    impl Kernel for Refusing {
        fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
            self.0.load(options)
        }
        fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
            let web = |id: &ElementId| matches!(id.key, Key::Frontend(a, ..) if a == std::net::IpAddr::from([10, 96, 0, 200]));
            let refused = transaction
                .ops
                .iter()
                .position(|op| matches!(op, Op::AddElement(id, _) if web(id)));
            let Some(op) = refused else { return self.0.apply(transaction) };
            let refusal = Refusal { op: Some(op), errno: libc::EINVAL, message: None };
            Err(ApplyError::Refused { refusals: vec![refusal] })
        }
        fn apply_to_stand_in(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
            self.0.apply_to_stand_in(transaction)
        }
        fn let_packets_pass(&mut self) {}
    }
    let mut proxy = Proxy::new(state(), Refusing(FakeKernel::default()));
    all_listed().for_each(|event| proxy.observe(event));
    proxy.commit().unwrap();
    let mut told = |events: Vec<Event>| {
        events.into_iter().for_each(|event| proxy.observe(event));
        proxy.retry_set_aside();
        assert_eq!(proxy.commit().unwrap().set_aside, 1);
        proxy.take_notices().len()
    };
    assert_eq!(told(served("web", 200, Protocol::Tcp, &["10.0.0.1"]).into()), 1);
    assert_eq!(told(served("before", 10, Protocol::Tcp, &["10.0.0.1"]).into()), 0);
}

/// A kernel whose tables somebody else changes all the time, and which refuses what follows from that.
struct Restless {
    kernel: FakeKernel,
    readings: Rc<Cell<u16>>,
}

impl Kernel for Restless {
    fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
        self.readings.set(self.readings.get() + 1);
        let mut loaded = self.kernel.load(options)?;
        for (family, table) in &mut loaded.tables {
            let key = Key::NodePort(Protocol::Tcp, self.readings.get());
            let id = ElementId { family: *family, set: SetName::Nodeports, key };
            table.elements.insert(id, Value::Drop);
        }
        Ok(loaded)
    }

    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        if self.readings.get() == 0 {
            return self.kernel.apply(transaction);
        }
        let refusal = Refusal { op: Some(0), errno: libc::ENOENT, message: None };
        assert!(!transaction.is_empty());
        Err(ApplyError::Refused { refusals: vec![refusal] })
    }

    fn apply_to_stand_in(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.kernel.apply_to_stand_in(transaction)
    }

    fn let_packets_pass(&mut self) {}
}

#[test]
fn tables_that_never_stand_still_are_read_a_few_times_and_not_for_ever() {
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    observed(
        &mut proxy,
        served("web", 10, Protocol::Tcp, &["10.0.0.1"]).into_iter().chain(all_listed()),
    );
    let readings = Rc::new(Cell::new(0));
    let kernel = Restless { kernel: proxy.kernel_mut().clone(), readings: readings.clone() };
    let mut proxy = Proxy::new(state(), kernel);
    all_listed().for_each(|event| proxy.observe(event));
    // Nobody here asked for what is refused, so that the commit fails in the end.
    proxy.commit().unwrap_err();
    // The first, one behind each refusal that may be for that, and one behind the last.
    assert_eq!(readings.get(), 6);
}

#[test]
fn a_commit_tells_of_all_that_was_sent_for_it() {
    let mut proxy = Proxy::new(state(), Counting::default());
    all_listed().for_each(|event| proxy.observe(event));
    served("web", 10, Protocol::Tcp, &["10.0.0.1"])
        .into_iter()
        .for_each(|event| proxy.observe(event));
    proxy.commit().unwrap();
    proxy.kernel_mut().sent = Vec::new();
    served("web", 10, Protocol::Tcp, &["10.0.0.1", "10.0.0.2", "10.0.0.3"])
        .into_iter()
        .for_each(|event| proxy.observe(event));
    let done = proxy.commit().unwrap();
    // Chains ahead, then the change.
    let sent = &proxy.kernel_mut().sent;
    assert_eq!(sent.len(), 2);
    assert_eq!(done.applied.messages, sent[0].messages + sent[1].messages);
    assert_eq!(done.applied.bytes, sent[0].bytes + sent[1].bytes);
}

/// A kernel that says how much it was sent.
#[derive(Default)]
struct Counting {
    kernel: FakeKernel,
    sent: Vec<Applied>,
}

impl Kernel for Counting {
    fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
        self.kernel.load(options)
    }

    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.kernel.apply(transaction)?;
        let messages = transaction.ops.len();
        self.sent.push(Applied { messages, bytes: messages * 100 });
        Ok(Applied { messages, bytes: messages * 100 })
    }

    fn apply_to_stand_in(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.kernel.apply_to_stand_in(transaction)
    }

    fn let_packets_pass(&mut self) {}
}
