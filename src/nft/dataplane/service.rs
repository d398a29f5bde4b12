//! The chains that verdicts lead to: what becomes of a connection to a frontend.
//!
//! Each is one way through: who is masqueraded, whose source is in a range, who may reach which endpoints, and
//! which one of them it is. None looks into a map of verdicts again ([`super::look_up`] says why), so that what a
//! frontend asks for is all in the name of the chain it leads to.

use super::{FRONTEND, NODE_PORT, Shape, again};
use crate::nft::names::{
    AffinityName, ChainName, Entry, List, Memory, Pick, PortChain, PortName, PrefixLengths,
    Selection, SetName, Traffic, Way,
};
use crate::nft::rule::{Rule, Selector, SlotSource, Statement};

/// Who is to be masqueraded is asked by the chain that the frontend leads to, and not in the dispatch by
/// the address: the set of ClusterIPs is large, and to look into it costs more than anything else that a
/// new connection meets (0.3 of 5.2 µs, measured).
fn enter(traffic: Traffic) -> Rule {
    let mark = match traffic {
        Traffic::Internal => ChainName::MarkInternal,
        Traffic::External => ChainName::MarkForMasquerade,
    };
    Rule::new([Statement::Jump(mark)])
}

/// The chains that come to a backend this way, of a port if they are its own.
pub(super) fn along(port: Option<&PortName>, way: Way, shape: &Shape<'_>) -> Vec<Rule> {
    let to = |selection| Statement::Goto(ChainName::way(port, Way::Select(selection)));
    match way {
        Way::Select(selection) => select(selection),
        Way::Enter(traffic, selection) => vec![enter(traffic), Rule::new([to(selection)])],
        Way::ExternalLocal(selection, here) => {
            // Where there is nobody, it is not to be looked up once more, nor taken for a node port.
            let all = if selection.n > 0 { to(selection) } else { Statement::Accept };
            let here = match selection.here(here) {
                Some(here) => Rule::new([to(here)]),
                None => Rule::new([Statement::Accept]).comment("no endpoint on this node"),
            };
            external_local(all, here, shape)
        }
    }
}

/// The chains of one Service port.
pub(super) fn of_port(port: &PortName, chain: PortChain, shape: &Shape<'_>) -> Vec<Rule> {
    match chain {
        PortChain::Way(way) => along(Some(port), way, shape),
        PortChain::Sticky(list) => vec![sticky(port, list)],
        PortChain::EnterSticky(traffic, list) => vec![enter(traffic), sticky(port, list)],
        PortChain::ExternalLocalSticky => {
            let sticky = |list| ChainName::of_port(port, PortChain::Sticky(list));
            let [all, here] =
                [List::Cluster, List::Local].map(|list| Statement::Goto(sticky(list)));
            external_local(all, Rule::new([here]), shape)
        }
        PortChain::Record(memory, timeout) => record(port, memory, timeout),
    }
}

/// Takes the backend that the client had last. Whoever had none comes back to the dispatch, to be looked up
/// as a new client: what is to be changed when an endpoint comes or goes is an element then, and no chain of
/// the port's own.
fn sticky(port: &PortName, list: List) -> Rule {
    let affinity = AffinityName { port: port.clone(), list };
    Rule::new([Statement::L4Proto(port.protocol()), Statement::DnatSticky(affinity)])
}

/// Slots from here on are the backends on this node.
pub const FIRST_LOCAL_SLOT: u16 = 32768;

/// Picks one of `n` backends; a pick that met no element is followed by the first slot.
fn select(selection: Selection) -> Vec<Rule> {
    let (frontend, map) = match selection.entry {
        Entry::Address => (FRONTEND.as_slice(), SetName::Endpoints),
        Entry::NodePort => (NODE_PORT.as_slice(), SetName::NodeportEndpoints),
    };
    let offset = match selection.list {
        List::Cluster => 0,
        List::Local => FIRST_LOCAL_SLOT,
    };
    let source = match selection.pick {
        Pick::Random => SlotSource::Random,
        Pick::SourceHash => SlotSource::SourceHash,
        Pick::RoundRobin => SlotSource::Increment,
    };
    [(source, selection.n), (SlotSource::Random, 1)]
        .into_iter()
        .map(|(source, modulus)| {
            let slot = Selector::Slot { source, modulus, offset };
            Rule::new([Statement::Dnat([frontend, &[slot]].concat(), map)])
        })
        .collect()
}

/// Asks for a range of each length, and for all of them once more: where a range gives way to one of
/// another length, a packet can ask for the first when it is gone, and have asked for the other before
/// it came. Whoever may pass where there is nobody to pass to is refused behind the translation.
pub(super) fn restricted(lengths: PrefixLengths, next: Option<&ChainName>) -> Vec<Rule> {
    let pass = next.map_or(Statement::Return, |next| Statement::Goto(next.clone()));
    let allowed = lengths.iter().map(|length| {
        let range = [Selector::SaddrFirst(length), Selector::SaddrLast(length)];
        let key = [FRONTEND.as_slice(), &range].concat();
        Rule::new([Statement::In(key, SetName::SourceRanges), pass.clone()])
    });
    let allowed: Vec<_> = allowed.collect();
    let again = allowed.clone().into_iter().map(again);
    let others = Rule::new([Statement::Drop]).comment("not in loadBalancerSourceRanges");
    allowed.into_iter().chain(again).chain([others]).collect()
}

/// Under externalTrafficPolicy Local, pods and the node itself reach any endpoint, as if the traffic
/// had come in on a node that has one (the node's own is masqueraded); everybody else reaches those
/// of this node only, and keeps the source address.
fn external_local(all: Statement, here: Rule, shape: &Shape<'_>) -> Vec<Rule> {
    let mut rules = Vec::new();
    if let Some(from_pod) = shape.is_from_pod() {
        rules.push(Rule::new([from_pod, all.clone()]));
    }
    let mark = Statement::Jump(ChainName::MarkForMasquerade);
    rules.push(Rule::new([Statement::FromThisHost, mark]));
    rules.push(Rule::new([Statement::FromThisHost, all]));
    rules.push(here);
    rules
}

/// A backend of this node counts for connections that are held to this node, too, whichever way it
/// was chosen. Every backend of this node is in `hairpin`, paired with itself.
fn record(port: &PortName, memory: Memory, timeout: u32) -> Vec<Rule> {
    let remember = |list| Statement::Remember(AffinityName { port: port.clone(), list }, timeout);
    let any = Rule::new([remember(List::Cluster)]);
    let local = Rule::new([remember(List::Local)]);
    match memory {
        Memory::Cluster => vec![any],
        Memory::Local => vec![local],
        Memory::Both => {
            let here = Statement::In(vec![Selector::Daddr, Selector::Daddr], SetName::Hairpin);
            vec![any, Rule::new([here, remember(List::Local)])]
        }
    }
}
