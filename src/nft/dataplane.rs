//! The data plane: what every chain contains. This is the one place where a rule exists: here those of the chains
//! that every table has, in `service` those of the chains that Services lead to.
//!
//! Some habits of these rules are load-bearing:
//! - *Two tries.* A lookup that races with a commit can miss: the packet drew a slot from the old
//!   number of backends that the new one no longer has, or (kernels before 6.12.48, 6.16.8, 6.17) met
//!   an element between its removal and its replacement. So the dispatch looks up twice, and every
//!   selection ends with a second draw that is slot 0, which a frontend with backends always has.
//!   (`tests/it/flips.rs` would see it.)
//! - *Checks after translation.* No-endpoint and ClusterIP checks run in the filter hooks at priority
//!   0, behind nat: they only see packets that were not translated.
//! - *Nothing for what is not asked for.* Source ranges are asked by the chain that a frontend leads to, not in a
//!   hook of their own: nat chains see the first packet of a connection only, so that neither established
//!   connections nor Services without ranges pay for them.

mod options;
mod service;

pub use self::options::{Detector, Loopback, NodePorts, Options};
pub use self::service::FIRST_LOCAL_SLOT;
use self::service::{along, of_port, restricted};

use super::names::{ChainName, Entry, SetName};
use super::rule::{Base, BaseKind, Chain, Hook, InterfaceName, Rule, Selector, Statement};
use crate::model::{Family, Protocol};

/// What shapes the rules of one family.
struct Shape<'a> {
    options: &'a Options,
    detector: &'a Detector,
    node_ports: NodePorts,
    loopback: Loopback,
}

impl Shape<'_> {
    /// Matches packets of pods; None if they cannot be told from others.
    fn is_from_pod(&self) -> Option<Statement> {
        match self.detector {
            Detector::None => None,
            Detector::LocalPods => Some(Statement::In(vec![Selector::Saddr], SetName::LocalPods)),
            Detector::Interface(name) => Some(Statement::FromInterface(name.clone())),
        }
    }

    fn is_not_from_pod(&self) -> Option<Statement> {
        match self.detector {
            Detector::None => None,
            Detector::LocalPods => {
                Some(Statement::NotIn(vec![Selector::Saddr], SetName::LocalPods))
            }
            Detector::Interface(name) => Some(Statement::NotFromInterface(name.clone())),
        }
    }

    /// Matches packets to an address that serves node ports.
    fn to_node_port_address(&self) -> Vec<Statement> {
        match self.node_ports {
            NodePorts::Listed => vec![Statement::In(vec![Selector::Daddr], SetName::NodeportIps)],
            NodePorts::All => vec![Statement::ToThisHost, Statement::NotToLoopback],
        }
    }

    /// Matches connections that were dialled at such an address and translated, as far as that can be
    /// told by then: where all addresses of the host serve node ports, by not being a ClusterIP.
    fn dialled_node_port_address(&self) -> Vec<Statement> {
        let dialled = vec![Selector::OriginalDaddr];
        match self.node_ports {
            NodePorts::Listed => vec![Statement::In(dialled, SetName::NodeportIps)],
            NodePorts::All => vec![Statement::NotIn(dialled, SetName::ClusterIps)],
        }
    }
}

const FRONTEND: [Selector; 3] = [Selector::Daddr, Selector::L4Proto, Selector::Dport];
const NODE_PORT: [Selector; 2] = [Selector::L4Proto, Selector::Dport];

/// The chain of this name.
#[must_use]
pub fn chain(name: ChainName, family: Family, options: &Options) -> Chain {
    let index = usize::from(family == Family::V6);
    let shape = Shape {
        options,
        detector: &options.detect_local[index],
        node_ports: options.node_ports[index],
        loopback: match family {
            Family::V4 => options.loopback,
            Family::V6 => Loopback::Untouched,
        },
    };
    Chain { base: base(&name), rules: rules(&name, &shape), name }
}

/// Where the base chains attach. Priorities are those of kube-proxy: dstnat -100, filter 0; but srcnat is
/// one before 100, ahead of the masquerading of network plugins: a connection whose source is decided
/// passes no further nat chain, and would not be remembered.
fn base(name: &ChainName) -> Option<Base> {
    let (kind, hook, priority) = match name {
        ChainName::FilterInput => (BaseKind::Filter, Hook::Input, 0),
        ChainName::FilterForward => (BaseKind::Filter, Hook::Forward, 0),
        ChainName::FilterOutput => (BaseKind::Filter, Hook::Output, 0),
        ChainName::NatPrerouting => (BaseKind::Nat, Hook::Prerouting, -100),
        ChainName::NatOutput => (BaseKind::Nat, Hook::Output, -100),
        ChainName::NatInput => (BaseKind::Nat, Hook::Input, 99),
        ChainName::NatPostrouting => (BaseKind::Nat, Hook::Postrouting, 99),
        // Before our own, for the same reason.
        ChainName::CountInput => (BaseKind::Nat, Hook::Input, 98),
        ChainName::CountPostrouting => (BaseKind::Nat, Hook::Postrouting, 98),
        _ => return None,
    };
    Some(Base { kind, hook, priority })
}

fn rules(name: &ChainName, shape: &Shape<'_>) -> Vec<Rule> {
    use Statement::{
        Accept, CtStateNew, CtStatusDnat, Drop, Goto, In, Jump, MarkOr, NotIn, Reject, ToLoopback,
        Vmap,
    };
    let mark = shape.options.masquerade_mark;
    match name {
        ChainName::Way(way) => along(None, *way, shape),
        ChainName::OfPort(chain) => of_port(&chain.0, chain.1, shape),
        ChainName::Restricted(chain) => restricted(chain.0, chain.1.as_ref()),
        ChainName::MarkForMasquerade => vec![Rule::new([MarkOr(mark)])],
        ChainName::MarkInternal => mark_internal(shape),
        ChainName::DispatchServices => {
            look_up(&FRONTEND, [SetName::Services, SetName::ServicesNewClients])
        }
        ChainName::DispatchNodeports => {
            look_up(&NODE_PORT, [SetName::Nodeports, SetName::NodeportsNewClients])
        }
        ChainName::Dispatch => dispatch(shape),
        ChainName::NoEndpoint => vec![Rule::new([Reject])],
        ChainName::ClusterIpsCheck => vec![
            Rule::new([In(vec![Selector::Daddr], SetName::ClusterIps), Reject])
                .comment("no such port on this ClusterIP"),
            Rule::new([In(vec![Selector::Daddr], SetName::ServiceCidrs), Drop])
                .comment("ClusterIP not allocated"),
        ],
        ChainName::AffinityRecord => {
            let mut rules = Vec::from(affinity_record(Entry::Address));
            let mut node_port = shape.dialled_node_port_address();
            node_port.push(Goto(ChainName::AffinityRecordNodeport));
            rules.push(Rule::new(node_port));
            rules
        }
        ChainName::AffinityRecordNodeport => affinity_record(Entry::NodePort).into(),
        // An endpoint can be a ClusterIP, and is refused as one. That is asked of the few ranges they are
        // from (where none is known, it is routed): nearly all that is translated goes elsewhere, and the
        // other sets are large.
        ChainName::NewConnection => vec![
            Rule::new([CtStatusDnat, NotIn(vec![Selector::Daddr], SetName::ServiceCidrs), Accept]),
            Rule::new([Vmap(FRONTEND.into(), SetName::NoEndpoints)]),
            Rule::new([Goto(ChainName::ClusterIpsCheck)]),
        ],
        ChainName::FilterInput => {
            let mut node_port = vec![CtStateNew];
            node_port.extend(shape.to_node_port_address());
            let refuse = Vmap(NODE_PORT.into(), SetName::NoEndpointNodeports);
            node_port.push(refuse.clone());
            let mut rules = vec![
                Rule::new(node_port),
                Rule::new([CtStateNew, Vmap(FRONTEND.into(), SetName::NoEndpoints)]),
            ];
            if shape.loopback != Loopback::Untouched {
                rules.extend(guard_loopback());
            }
            if shape.loopback == Loopback::NodePorts {
                rules.push(Rule::new([CtStateNew, ToLoopback, refuse]));
            }
            rules
        }
        ChainName::FilterForward | ChainName::FilterOutput => {
            vec![Rule::new([CtStateNew, Jump(ChainName::NewConnection)])]
        }
        ChainName::NatPrerouting | ChainName::NatOutput => {
            vec![Rule::new([Jump(ChainName::Dispatch)])]
        }
        // A connection to a backend in the host's own network never reaches postrouting.
        ChainName::NatInput => remembered(shape).into(),
        ChainName::NatPostrouting => postrouting(shape),
        ChainName::CountInput | ChainName::CountPostrouting => counted().into(),
    }
}

/// The mark is taken off again, so that it asks for nothing once a tunnel has wrapped the packet.
fn postrouting(shape: &Shape<'_>) -> Vec<Rule> {
    use Statement::{CtStatusDnat, In, MarkClear, MarkXor, Masquerade, Return};
    let mark = shape.options.masquerade_mark;
    let mut rules = Vec::from(remembered(shape));
    rules.push(
        Rule::new([
            // Others are masqueraded anyway.
            MarkClear(mark),
            CtStatusDnat,
            In(vec![Selector::Saddr, Selector::Daddr], SetName::Hairpin),
            Masquerade,
        ])
        .comment("a pod that was given itself"),
    );
    if shape.loopback == Loopback::NodePorts {
        let outside = Statement::NotToInterface(InterfaceName::Whole("lo".into()));
        rules.push(
            Rule::new([CtStatusDnat, Statement::FromLoopback, outside, Masquerade])
                .comment("a node port dialled on loopback"),
        );
    }
    rules.extend([
        Rule::new([MarkClear(mark), Return]),
        Rule::new([MarkXor(mark)]),
        Rule::new([Masquerade]),
    ]);
    rules
}

fn mark_internal(shape: &Shape<'_>) -> Vec<Rule> {
    let mark = Statement::Jump(ChainName::MarkForMasquerade);
    if shape.options.masquerade_all {
        return vec![Rule::new([mark])];
    }
    shape.is_not_from_pod().map(|elsewhere| Rule::new([elsewhere, mark])).into_iter().collect()
}

/// A chain that looks into a verdict map is entered twice, and no rule of it written twice: when a verdict
/// changes, the kernel walks all those that each rule can give, but a chain it has walked once it knows
/// (from 6.18 on). Before, it walks a chain as often as something leads there: so no verdict leads to a chain
/// that looks into a verdict map.
///
/// Clients of a Service with affinity come back from the first map if they are not remembered.
fn look_up(frontend: &[Selector], maps: [SetName; 2]) -> Vec<Rule> {
    maps.map(|map| Rule::new([Statement::Vmap(frontend.to_vec(), map)])).into()
}

fn again(rule: Rule) -> Rule {
    rule.comment("second try")
}

fn twice(rule: Rule) -> [Rule; 2] {
    [rule.clone(), again(rule)]
}

fn dispatch(shape: &Shape<'_>) -> Vec<Rule> {
    let services = Rule::new([Statement::Jump(ChainName::DispatchServices)]);
    let again = services.clone().comment("second try: a lookup that races with a commit can miss");
    let mut rules = vec![services, again];
    let node_ports = || Statement::Jump(ChainName::DispatchNodeports);
    let mut to_node_port = shape.to_node_port_address();
    to_node_port.push(node_ports());
    rules.extend(twice(Rule::new(to_node_port)));
    if shape.loopback == Loopback::NodePorts {
        rules.extend(twice(Rule::new([Statement::ToLoopback, node_ports()])));
    }
    rules
}

/// The comment of the rules that keep others from loopback addresses; tells whether a table has them.
pub const LOOPBACK_GUARD: &str = "loopback is for this host alone";

/// Where loopback addresses are routed, as translating connections to them asks for, nobody else may
/// reach them or claim to be one.
fn guard_loopback() -> [Rule; 2] {
    let lo = || InterfaceName::Whole("lo".into());
    [Statement::ToLoopback, Statement::FromLoopback].map(|loopback| {
        let outside = Statement::NotFromInterface(lo());
        Rule::new([Statement::CtStateNew, outside, loopback, Statement::Drop])
            .comment(LOOPBACK_GUARD)
    })
}

/// By the frontend that was dialled, which translation has left in the connection's original
/// direction only.
///
/// That a node port was dialled is not to be seen there: the address can be another Service's, with a
/// port of the same number. But such a connection went to an endpoint of the other Service, so that one
/// counts for a node port only if it went to an endpoint of that. (Whether a map has a key, here `services`, can be
/// asked of new kernels only.) The reply direction has the endpoint, too; `th dport` behind a protocol
/// is listed by nft 1.0.6 as what it does not read.
fn affinity_record(entry: Entry) -> [Rule; 3] {
    use Selector::{L4Proto, OriginalDaddr, OriginalDport, ReplySaddr, ReplySport};
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(|protocol| {
        let map = SetName::affinity_record(entry, protocol);
        let is = Statement::L4Proto(protocol);
        match entry {
            Entry::Address => {
                Rule::new([is, Statement::Vmap(vec![OriginalDaddr, OriginalDport], map)])
            }
            Entry::NodePort => {
                let own = vec![L4Proto, OriginalDport, ReplySaddr, ReplySport];
                let own = Statement::In(own, SetName::AffinityNodeportBackends);
                Rule::new([is, own, Statement::Vmap(vec![OriginalDport], map)])
            }
        }
    })
}

/// Counts a new connection, by the one rule of its protocol: nft knows what a port in the connection's
/// original direction is only behind the protocol.
///
/// Here, and not by counters of the elements that were looked up (which the kernel has as well): those go
/// with every element that a change of endpoints moves, they do not see connections that a client's
/// affinity led, and attempts that a firewall drops would be counted with each repetition. They would
/// cost 0.1 µs a connection, and this costs 1.1 (measured over 30,000 pairs; a connection takes 8.6).
fn counted() -> [Rule; 3] {
    let count = |protocol| {
        Rule::new([Statement::CtStatusDnat, Statement::L4Proto(protocol), Statement::Count])
    };
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(count)
}

/// Remembers the backend of a new connection, if the Service asks for it. Almost none does, so that
/// this is asked first. An address can be both a Service's and one that serves node ports: what is
/// dialled there is a node port only if it is no frontend of the address.
fn remembered(shape: &Shape<'_>) -> [Rule; 2] {
    use Statement::{CtStatusDnat, In, Jump, NotIn};
    let dialled = || vec![Selector::OriginalDaddr];
    let address =
        vec![CtStatusDnat, In(dialled(), SetName::AffinityIps), Jump(ChainName::AffinityRecord)];
    let mut node_port = vec![CtStatusDnat];
    node_port.extend(shape.dialled_node_port_address());
    node_port.push(NotIn(dialled(), SetName::AffinityIps));
    node_port.push(Jump(ChainName::AffinityRecordNodeport));
    [Rule::new(address), Rule::new(node_port)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::names::{
        List, Memory, Pick, PortChain, PortName, PrefixLengths, Selection, Traffic, Way,
    };

    /// What a commit is sent by relies on it: a packet that is led to a chain which is empty yet goes on as if
    /// nothing had been found. (Of the rules that remember, one alone is for a protocol.)
    #[test]
    fn behind_a_rule_that_is_led_on_by_a_verdict_comes_another_such_rule_or_nothing() {
        let remember = [ChainName::AffinityRecord, ChainName::AffinityRecordNodeport];
        let mut maps = 0;
        for name in ChainName::FIXED.into_iter().filter(|name| !remember.contains(name)) {
            let rules = chain(name.clone(), Family::V4, &Options::default()).rules;
            let first = rules.iter().position(leads_on).unwrap_or(rules.len());
            assert!(rules[first..].iter().all(leads_on), "{name}");
            maps += rules.len() - first;
        }
        // `services`, `services-new-clients`; for node ports, too.
        assert_eq!(maps, 4);
    }

    /// Or else kernels before 6.18 take the square of the number of such verdicts for a change.
    #[test]
    fn no_verdict_leads_to_a_chain_that_looks_into_a_verdict_map() {
        let port: PortName = "a/b/tcp".parse().unwrap();
        let of_port = |chain| ChainName::of_port(&port, chain);
        let mut ahead = vec![
            of_port(PortChain::ExternalLocalSticky),
            of_port(PortChain::Record(Memory::Both, 1)),
            ChainName::NoEndpoint,
        ];
        for list in [List::Cluster, List::Local] {
            ahead.extend(Traffic::BOTH.map(|t| of_port(PortChain::EnterSticky(t, list))));
        }
        for pick in [Pick::Random, Pick::SourceHash, Pick::RoundRobin] {
            for entry in [Entry::Address, Entry::NodePort] {
                let selection = Selection { entry, list: List::Cluster, pick, n: 2 };
                let mut ways = vec![Way::ExternalLocal(selection, 1)];
                ways.extend(Traffic::BOTH.map(|t| Way::Enter(t, selection)));
                ahead.extend(ways.iter().map(|way| ChainName::Way(*way)));
                ahead.extend(ways.iter().map(|way| of_port(PortChain::Way(*way))));
            }
        }
        let lengths = PrefixLengths::new([24]).unwrap();
        ahead.extend(
            ahead.clone().into_iter().map(|next| ChainName::restricted(lengths, Some(next))),
        );
        while let Some(name) = ahead.pop() {
            for statement in chain(name.clone(), Family::V4, &Options::default())
                .rules
                .into_iter()
                .flat_map(|rule| rule.statements)
            {
                match statement {
                    Statement::Vmap(..) => panic!("{name}"),
                    Statement::Jump(next) | Statement::Goto(next) => ahead.push(next),
                    _ => {}
                }
            }
        }
    }

    fn leads_on(rule: &Rule) -> bool {
        let vmap = |s: &Statement| matches!(s, Statement::Vmap(_, map) if map.leads_on());
        rule.statements.iter().any(vmap)
    }
}
