//! What is asked for by a Service that is out of the ordinary.

use std::num::NonZeroU16;

use super::*;
use crate::frontend::Frontends;
use crate::model::{
    Endpoint, EndpointSlice, NodeFacts, Problem, Scheduler, SessionAffinity, SlicePort,
    TrafficPolicy,
};
use crate::nft::names::{Entry, List, Memory, Pick, PortChain, Selection, SetName, Traffic, Way};
use crate::slots::MAX_BACKENDS;

fn port(name: &str, protocol: Protocol) -> ServicePort {
    ServicePort { name: name.into(), protocol, port: 80, node_port: None }
}

fn service(name: &str) -> Service {
    let name = NamespacedName::new("default", name);
    Service::new(name, vec![[10, 96, 0, 10].into()], vec![port("http", Protocol::Tcp)])
}

/// An endpoint on this node.
fn endpoint(number: u16) -> Endpoint {
    let [high, low] = number.to_be_bytes();
    Endpoint { local: true, ..Endpoint::new([10, 244, high, low].into()) }
}

fn asked(service: &Service, endpoints: Vec<Endpoint>) -> (Contribution, Vec<Problem>) {
    let port = SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 };
    let slice = EndpointSlice {
        name: NamespacedName::new("default", "slice"),
        service: service.name.clone(),
        family: Family::V4,
        ports: vec![port],
        endpoints,
        last_change_trigger: None,
    };
    let mut owners = Frontends::default();
    owners.update(None, Some(service));
    of_service(service, &[&slice], &NodeFacts::default(), &mut PortSlots::default(), &owners)
}

#[test]
fn the_numbering_of_a_port_goes_with_it() {
    let mut slots = PortSlots::default();
    assert!(slots.is_empty());
    let kept = (Family::V4, port("http", Protocol::Tcp));
    let others = [
        (Family::V6, port("http", Protocol::Tcp)),
        (Family::V4, port("admin", Protocol::Tcp)),
        (Family::V4, port("http", Protocol::Udp)),
    ];
    for (family, port) in others.iter().chain([&kept, &kept]) {
        slots.lists(*family, port);
    }
    assert_eq!(slots.0.len(), 4);
    slots.retain_ports_of(&service("web"));
    let left: Vec<_> = slots.0.iter().map(|((f, p, name), _)| (*f, *p, &**name)).collect();
    assert_eq!(left, [(Family::V4, Protocol::Tcp, "http")]);
    slots.retain_ports_of(&Service { ports: Vec::new(), ..service("web") });
    assert!(slots.is_empty());
}

#[test]
fn a_contributor_is_told_by_what_it_is() {
    assert_eq!(Contributor::Node.to_string(), "the node");
    let web = Contributor::Service(NamespacedName::new("default", "web"));
    assert_eq!(web.to_string(), "Service default/web");
}

#[test]
fn a_list_that_is_just_full_is_no_problem_and_weights_are_named_where_they_are_the_cause() {
    let full = u16::try_from(MAX_BACKENDS).unwrap();
    let (contribution, problems) =
        asked(&service("web"), vec![Endpoint { weight: full, ..endpoint(1) }]);
    assert_eq!(problems, []);
    let slots = contribution.elements.iter().filter(|(id, _)| id.set == SetName::Endpoints);
    assert_eq!(slots.count(), MAX_BACKENDS);
    let (_, problems) = asked(&service("web"), (0..=full).map(endpoint).collect());
    let said: Vec<_> = problems.into_iter().map(|problem| problem.message).collect();
    assert_eq!(said, ["port \"http\" has 32769 endpoints, the first 32768 are used"]);
}

#[test]
fn round_robin_of_a_service_whose_name_makes_no_chain_is_a_new_choice_each_time() {
    let round_robin = |name: &str| {
        let service = Service { scheduler: Scheduler::RoundRobin, ..service(name) };
        asked(&service, vec![endpoint(1), endpoint(2)])
    };
    let selection = |pick| Selection { entry: Entry::Address, list: List::Cluster, pick, n: 2 };
    let (contribution, problems) = round_robin(&"w".repeat(253));
    assert_eq!(problems.len(), 1);
    let random = selection(Pick::Random);
    let ways = [Way::Select(random), Way::Enter(Traffic::Internal, random)];
    let chains = ways.map(ChainName::Way);
    assert_eq!(*contribution.chains, chains.map(|chain| (Family::V4, chain)));
    // A name that makes one has chains of its own.
    let (contribution, problems) = round_robin("web");
    assert_eq!(problems, []);
    assert!(contribution.chains.iter().all(|(_, chain)| matches!(chain, ChainName::OfPort(_))));
}

#[test]
fn clients_are_remembered_for_the_lists_that_policies_use_and_no_others() {
    use TrafficPolicy::{Cluster, Local};
    let remembered = |internal, external, node_port| {
        let mut service = Service {
            internal_traffic_policy: internal,
            external_traffic_policy: external,
            session_affinity: SessionAffinity::ClientIp { timeout: 10 },
            ..service("web")
        };
        service.ports[0].node_port = NonZeroU16::new(node_port);
        let (contribution, _) = asked(&service, vec![endpoint(1)]);
        let lists: Vec<_> = contribution.affinities.iter().map(|map| map.name.list).collect();
        let memory = |(_, chain): &(Family, ChainName)| match chain {
            ChainName::OfPort(chain) => match chain.1 {
                PortChain::Record(memory, 10) => Some(memory),
                _ => None,
            },
            _ => None,
        };
        let mut memories: Vec<_> = contribution.chains.iter().filter_map(memory).collect();
        memories.dedup();
        (lists, memories)
    };
    let cluster = (vec![List::Cluster], vec![Memory::Cluster]);
    let local = (vec![List::Local], vec![Memory::Local]);
    let both = (vec![List::Cluster, List::Local], vec![Memory::Both]);
    assert_eq!(remembered(Cluster, Cluster, 30000), cluster);
    assert_eq!(remembered(Cluster, Local, 0), cluster);
    assert_eq!(remembered(Local, Local, 0), local);
    assert_eq!(remembered(Local, Cluster, 0), local);
    // A client that may reach any endpoint can dial the node port, too.
    assert_eq!(remembered(Local, Local, 30000), both);
    assert_eq!(remembered(Cluster, Local, 30000), both);
}

#[test]
fn whom_nobody_can_answer_is_refused_unless_somebody_elsewhere_can() {
    use TrafficPolicy::{Cluster, Local};
    let refusal = |policy, endpoints| {
        let service = Service { internal_traffic_policy: policy, ..service("web") };
        let (contribution, _) = asked(&service, endpoints);
        let mut found = contribution.elements.iter();
        found.find(|(id, _)| id.set == SetName::NoEndpoints).map(|(_, value)| value.clone())
    };
    let refused = Some(Value::Goto(ChainName::NoEndpoint));
    let elsewhere = || Endpoint { local: false, ..endpoint(1) };
    for policy in [Cluster, Local] {
        assert_eq!(refusal(policy, Vec::new()), refused);
        assert_eq!(refusal(policy, vec![endpoint(1)]), None);
    }
    assert_eq!(refusal(Cluster, vec![elsewhere()]), None);
    assert_eq!(refusal(Local, vec![elsewhere()]), Some(Value::Drop));
}
