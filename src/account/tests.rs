//! What is told of a Service is what its present objects say, and once when it is gone.

use std::sync::Arc;

use super::*;
use crate::connections::Port;
use crate::model::{Endpoint, Protocol, Scheduler, ServicePort, SessionAffinity, SlicePort};

fn name(text: &str) -> NamespacedName {
    NamespacedName::new("default", text)
}

fn service(policies: [TrafficPolicy; 2]) -> Service {
    let port = |name: &str, port| ServicePort {
        name: name.into(),
        protocol: Protocol::Tcp,
        port,
        node_port: NonZeroU16::new(30000 + port),
    };
    Service {
        name: name("web"),
        created: 0,
        cluster_ips: vec![[10, 96, 0, 10].into()],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        ports: vec![port("http", 80), port("admin", 81)],
        internal_traffic_policy: policies[0],
        external_traffic_policy: policies[1],
        session_affinity: SessionAffinity::None,
        source_ranges: Vec::new(),
        scheduler: Scheduler::Random,
        health_check_node_port: NonZeroU16::new(32000),
    }
}

/// An endpoint in letters: `L` local, `r` ready, `s` serving, `t` terminating, `0` of no weight.
fn slice(endpoints: &[(u8, &str)]) -> EndpointSlice {
    let endpoint = |&(host, words): &(u8, &str)| Endpoint {
        ready: words.contains('r'),
        serving: words.contains('s'),
        terminating: words.contains('t'),
        local: words.contains('L'),
        weight: u16::from(!words.contains('0')),
        ..Endpoint::new([10, 244, 1, host].into())
    };
    let port = |name: &str| SlicePort { name: name.into(), protocol: Protocol::Tcp, port: 8080 };
    EndpointSlice {
        name: name("web-1"),
        service: name("web"),
        family: Family::V4,
        ports: vec![port("http"), port("other")],
        endpoints: endpoints.iter().map(endpoint).collect(),
        last_change_trigger: None,
    }
}

fn counted(endpoints: &[(u8, &str)]) -> Option<usize> {
    let service = service([TrafficPolicy::Cluster, TrafficPolicy::Local]);
    let slice = slice(endpoints);
    let local = local(&service, &[&slice, &slice], &NodeFacts::default());
    let check = local.health_check.unwrap();
    assert_eq!((check.port.get(), check.endpoints[1]), (32000, None), "no IPv6 Service");
    check.endpoints[0]
}

#[test]
fn ready_endpoints_of_this_node_count_once_each() {
    assert_eq!(counted(&[]), Some(0));
    assert_eq!(counted(&[(1, "Lrs"), (2, "Lrs"), (3, "rs")]), Some(2)); // 124
    assert_eq!(counted(&[(1, "Lst"), (2, "Ls")]), Some(0)); // 125
    assert_eq!(counted(&[(1, "Lrst")]), Some(1), "published although it is not ready");
    assert_eq!(counted(&[(1, "Lrs0")]), Some(0), "drained by its weight");
    let mut without_port = slice(&[(1, "Lrs")]);
    without_port.ports.clear();
    let service = service([TrafficPolicy::Cluster; 2]);
    let local = local(&service, &[&without_port], &NodeFacts::default());
    assert_eq!(local.health_check.unwrap().endpoints, [Some(0), None]);
}

#[test]
fn ports_without_a_local_endpoint_are_counted_by_policy() {
    use TrafficPolicy::{Cluster, Local};
    let counted = |policies, endpoints: &[(u8, &str)]| {
        let service = service(policies);
        let local = local(&service, &[&slice(endpoints)], &NodeFacts::default());
        let WithoutEndpoints { internal, external } = local.without_endpoints[0];
        assert_eq!(local.without_endpoints[1], WithoutEndpoints::default());
        (internal, external)
    };
    assert_eq!(counted([Local, Local], &[(1, "rs")]), (1, 1), "port admin has none anywhere");
    assert_eq!(counted([Local, Cluster], &[(1, "rs")]), (1, 0));
    assert_eq!(counted([Cluster, Local], &[(1, "rs")]), (0, 1));
    assert_eq!(counted([Cluster, Cluster], &[(1, "rs")]), (0, 0));
    assert_eq!(counted([Local, Local], &[(1, "rs"), (2, "Lrs")]), (0, 0));
    assert_eq!(counted([Local, Local], &[(1, "rs"), (2, "Lst")]), (0, 0));
    assert_eq!(counted([Local, Local], &[(2, "L")]), (0, 0));
    // The external policy is nothing to a port that has no frontend outside.
    let mut service = service([Cluster, Local]);
    service.ports.iter_mut().for_each(|port| port.node_port = None);
    let local = local(&service, &[&slice(&[(1, "rs")])], &NodeFacts::default());
    assert_eq!(local.without_endpoints, [WithoutEndpoints::default(); 2]);
}

#[test]
fn an_account_follows_its_services() {
    let mut account = Account::default();
    let check = HealthCheck { port: NonZeroU16::new(32000).unwrap(), endpoints: [Some(1), None] };
    let missing = WithoutEndpoints { internal: 1, external: 2 };
    let web = Local {
        health_check: Some(check),
        without_endpoints: [missing, WithoutEndpoints::default()],
    };
    account.update(&name("web"), web);
    account.update(&name("plain"), Local::default());
    account.update(&name("other"), Local { health_check: None, ..web });
    assert_eq!(account.without_endpoints()[0], WithoutEndpoints { internal: 2, external: 4 });
    assert_eq!(account.take_health_checks(), [(name("web"), Some(check))].into());
    account.update(&name("web"), web);
    assert_eq!(account.take_health_checks(), BTreeMap::new(), "nothing changed");
    account.retain(|service| *service == name("other"));
    assert_eq!(account.without_endpoints()[0], missing);
    assert_eq!(account.take_health_checks(), [(name("web"), None)].into());
}

#[test]
fn elements_are_counted_by_object() {
    use crate::nft::element::{Key, Value};
    let id = |family, set, host: u8| ElementId {
        family,
        set,
        key: Key::Address([10, 0, 0, host].into()),
    };
    let add = |id| Op::AddElement(id, Value::None);
    let delete = |id| Op::DeleteElement(id, Value::None);
    let ips = |host| id(Family::V4, SetName::ClusterIps, host);
    let others = id(Family::V6, SetName::ClusterIps, 9);
    let mut account = Account::default();
    account.apply(&[add(ips(1)), add(ips(2)), add(others), delete(ips(1)), add(ips(3))]);
    let counted = [((Family::V4, SetName::ClusterIps), 2), ((Family::V6, SetName::ClusterIps), 1)];
    assert_eq!(account.take_elements(), counted);
    assert_eq!(account.take_elements(), [], "nothing changed");
    let pods = id(Family::V4, SetName::LocalPods, 1);
    let found = [ips(1), ips(2), ips(3), pods];
    account.set_elements(count_elements(&found));
    let ip_count = ((Family::V4, SetName::ClusterIps), 3);
    let pod_count = ((Family::V4, SetName::LocalPods), 1);
    let gone = ((Family::V6, SetName::ClusterIps), 0);
    let mut taken = account.take_elements();
    taken.sort_unstable();
    let mut expected = [ip_count, pod_count, gone];
    expected.sort_unstable();
    assert_eq!(taken, expected);
}

#[test]
fn changes_wait_until_they_are_committed() {
    let mut account = Account::default();
    let mut slice = slice(&[]);
    slice.last_change_trigger = Some(5);
    for changes in [true, false, true] {
        let waiting = account.observe(&Event::EndpointSlice(slice.clone())).unwrap();
        if changes {
            account.waits(waiting);
        }
    }
    let came = Event::Service(service([TrafficPolicy::Cluster; 2]));
    for event in [came, Event::Gone(Kind::Service, name("web"))] {
        let waiting = account.observe(&event).unwrap();
        account.waits(waiting);
    }
    assert!(account.observe(&Event::Gone(Kind::Node, name("n"))).is_none());
    assert!(account.observe(&Event::Listed(Kind::Service)).is_none());
    assert_eq!(account.seen(), Changes { services: 2, endpoint_slices: 3 });
    assert_eq!(account.waiting(), Changes { services: 2, endpoint_slices: 2 });
    account.settle();
    assert_eq!(account.waiting(), Changes::default());
    assert_eq!(account.take_triggers(), [(Family::V4, 5), (Family::V4, 5)]);
    assert_eq!(account.take_triggers(), []);
}

#[test]
fn triggers_of_changes_that_wait_are_bounded() {
    let mut account = Account::default();
    let slice = EndpointSlice { last_change_trigger: Some(5), ..slice(&[]) };
    for _ in 0..=MAX_TRIGGERS {
        let waiting = account.observe(&Event::EndpointSlice(slice.clone())).unwrap();
        account.waits(waiting);
    }
    assert_eq!(account.take_triggers().len(), MAX_TRIGGERS);
}

#[test]
fn what_connections_are_counted_by_is_told_when_it_changes_and_once_when_it_is_gone() {
    let mut account = Account::default();
    let port = Port { service: name("web"), name: "http".into(), protocol: Protocol::Tcp };
    let served =
        vec![Served { port: Arc::new(port), frontends: Vec::new(), endpoints: BTreeSet::new() }];
    account.count(&name("web"), served.clone());
    account.count(&name("other"), served.clone());
    account.count(&name("plain"), Vec::new());
    let told = [(name("other"), served.clone()), (name("web"), served)];
    assert_eq!(account.take_served(), told.into());
    assert_eq!(account.take_served(), BTreeMap::new(), "nothing changed");
    account.retain(|service| *service == name("other"));
    assert_eq!(account.take_served(), [(name("web"), Vec::new())].into());
    account.count(&name("web"), Vec::new());
    assert_eq!(account.take_served(), BTreeMap::new(), "it is gone already");
}
