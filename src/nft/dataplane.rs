//! The data plane: what every chain contains. This is the one place where a rule exists.
//!
//! Two habits of these rules are load-bearing and measured (`DESIGN.md` section 2):
//! - *Two tries.* A lookup that races with a commit can miss: the packet drew a slot from the old
//!   number of backends that the new one no longer has, or (kernels before 6.12.48, 6.16.8, 6.17) met
//!   an element between its removal and its replacement. So the dispatch looks up twice, and every
//!   selection ends with a second draw that is slot 0, which a frontend with backends always has.
//! - *Checks after translation.* No-endpoint and ClusterIP checks run in the filter hooks at priority
//!   0, behind nat: they only see packets that were not translated.

use super::names::{ChainName, SetName};
use super::rule::{Base, BaseKind, Chain, Hook, Rule, Selector, Statement};
use crate::model::Family;

/// What of the configuration shapes the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The packet mark bit that asks postrouting to masquerade; exactly one bit is set.
    pub masquerade_mark: u32,
    /// Masquerade everything that goes to a ClusterIP.
    pub masquerade_all: bool,
    /// Whether sources in `local-pods` are told from others, by family (IPv4, IPv6). Without that, no
    /// source is masqueraded on its way to a ClusterIP.
    pub detect_local: [bool; 2],
}

impl Default for Options {
    fn default() -> Self {
        Self { masquerade_mark: 1 << 14, masquerade_all: false, detect_local: [false; 2] }
    }
}

impl Options {
    fn detects_local(&self, family: Family) -> bool {
        self.detect_local[usize::from(family == Family::V6)]
    }
}

const FRONTEND: [Selector; 3] = [Selector::Daddr, Selector::L4Proto, Selector::Dport];
const NODE_PORT: [Selector; 2] = [Selector::L4Proto, Selector::Dport];

/// The chain of this name.
#[must_use]
pub fn chain(name: ChainName, family: Family, options: &Options) -> Chain {
    Chain { name, base: base(name), rules: rules(name, family, options) }
}

/// Where the base chains attach. Priorities are those of kube-proxy: dstnat -100, filter 0,
/// srcnat 100.
fn base(name: ChainName) -> Option<Base> {
    let (kind, hook, priority) = match name {
        ChainName::FilterInput => (BaseKind::Filter, Hook::Input, 0),
        ChainName::FilterForward => (BaseKind::Filter, Hook::Forward, 0),
        ChainName::FilterOutput => (BaseKind::Filter, Hook::Output, 0),
        ChainName::NatPrerouting => (BaseKind::Nat, Hook::Prerouting, -100),
        ChainName::NatOutput => (BaseKind::Nat, Hook::Output, -100),
        ChainName::NatPostrouting => (BaseKind::Nat, Hook::Postrouting, 100),
        _ => return None,
    };
    Some(Base { kind, hook, priority })
}

fn rules(name: ChainName, family: Family, options: &Options) -> Vec<Rule> {
    use Statement::{
        CtStateNew, CtStatusDnat, Drop, In, Jump, MarkClear, MarkOr, MarkXor, Masquerade, Reject,
        Return, Vmap,
    };
    let mark = options.masquerade_mark;
    match name {
        ChainName::Lb(n) => select(&FRONTEND, n, 0, SetName::Endpoints),
        ChainName::LbLocal(n) => select(&FRONTEND, n, FIRST_LOCAL_SLOT, SetName::Endpoints),
        ChainName::NodeportLb(n) => select(&NODE_PORT, n, 0, SetName::NodeportEndpoints),
        ChainName::NodeportLbLocal(n) => {
            select(&NODE_PORT, n, FIRST_LOCAL_SLOT, SetName::NodeportEndpoints)
        }
        ChainName::External(n) => masquerade_then(ChainName::Lb(n)),
        ChainName::Nodeport(n) => masquerade_then(ChainName::NodeportLb(n)),
        ChainName::MarkForMasquerade => vec![Rule::new([MarkOr(mark)])],
        ChainName::ExternalLocal => {
            let (cluster, local) = (SetName::ServicesCluster, SetName::ServicesLocal);
            by_client(&FRONTEND, cluster, local, options.detects_local(family))
        }
        ChainName::NodeportExternalLocal => {
            let (cluster, local) = (SetName::NodeportsCluster, SetName::NodeportsLocal);
            by_client(&NODE_PORT, cluster, local, options.detects_local(family))
        }
        ChainName::Dispatch => dispatch(family, options),
        ChainName::NoEndpoint => vec![Rule::new([Reject])],
        ChainName::ClusterIpsCheck => vec![
            Rule::new([In(vec![Selector::Daddr], SetName::ClusterIps), Reject])
                .comment("no such port on this ClusterIP"),
            Rule::new([In(vec![Selector::Daddr], SetName::ServiceCidrs), Drop])
                .comment("ClusterIP not allocated"),
        ],
        ChainName::FilterInput => vec![
            Rule::new([
                CtStateNew,
                In(vec![Selector::Daddr], SetName::NodeportIps),
                Vmap(NODE_PORT.into(), SetName::NoEndpointNodeports),
            ]),
            Rule::new([CtStateNew, Vmap(FRONTEND.into(), SetName::NoEndpoints)]),
        ],
        ChainName::FilterForward | ChainName::FilterOutput => vec![
            Rule::new([CtStateNew, Vmap(FRONTEND.into(), SetName::NoEndpoints)]),
            Rule::new([CtStateNew, Jump(ChainName::ClusterIpsCheck)]),
        ],
        ChainName::NatPrerouting | ChainName::NatOutput => {
            vec![Rule::new([Jump(ChainName::Dispatch)])]
        }
        ChainName::NatPostrouting => vec![
            Rule::new([
                CtStatusDnat,
                In(vec![Selector::Saddr, Selector::Daddr], SetName::Hairpin),
                Masquerade,
            ])
            .comment("a pod that was given itself"),
            Rule::new([MarkClear(mark), Return]),
            Rule::new([MarkXor(mark)]),
            Rule::new([Masquerade]),
        ],
    }
}

/// Slots from here on are the backends on this node.
pub const FIRST_LOCAL_SLOT: u16 = 32768;

/// Draws one of `n` backends; a draw that met no element is followed by the first slot.
fn select(frontend: &[Selector], n: u16, offset: u16, map: SetName) -> Vec<Rule> {
    [n, 1]
        .into_iter()
        .map(|modulus| {
            let mut key = frontend.to_vec();
            key.push(Selector::Random { modulus, offset });
            Rule::new([Statement::Dnat(key, map)])
        })
        .collect()
}

/// Under externalTrafficPolicy Local, pods and the node itself reach any endpoint, as if the traffic
/// had come in on a node that has one (the node's own is masqueraded); everybody else reaches those
/// of this node only, and keeps the source address.
fn by_client(frontend: &[Selector], cluster: SetName, local: SetName, detect: bool) -> Vec<Rule> {
    let take = |map| Statement::Vmap(frontend.to_vec(), map);
    let from_pod =
        Rule::new([Statement::In(vec![Selector::Saddr], SetName::LocalPods), take(cluster)]);
    let mark = Statement::Jump(ChainName::MarkForMasquerade);
    let from_host = Rule::new([Statement::FromThisHost, take(cluster)]);
    let from_outside = Rule::new([take(local)]);
    let twice = |rule: Rule| [rule.clone(), rule.comment("second try")];
    let mut rules = Vec::new();
    if detect {
        rules.extend(twice(from_pod));
    }
    rules.push(Rule::new([Statement::FromThisHost, mark]));
    rules.extend(twice(from_host));
    rules.extend(twice(from_outside));
    rules
}

fn masquerade_then(selection: ChainName) -> Vec<Rule> {
    vec![
        Rule::new([Statement::Jump(ChainName::MarkForMasquerade)]),
        Rule::new([Statement::Goto(selection)]),
    ]
}

fn dispatch(family: Family, options: &Options) -> Vec<Rule> {
    let to_cluster_ip = || Statement::In(vec![Selector::Daddr], SetName::ClusterIps);
    let mark = || Statement::Jump(ChainName::MarkForMasquerade);
    let mut rules = Vec::new();
    if options.masquerade_all {
        rules.push(Rule::new([to_cluster_ip(), mark()]));
    } else if options.detects_local(family) {
        let from_elsewhere = Statement::NotIn(vec![Selector::Saddr], SetName::LocalPods);
        rules.push(Rule::new([to_cluster_ip(), from_elsewhere, mark()]));
    }
    let services = Rule::new([Statement::Vmap(FRONTEND.into(), SetName::Services)]);
    let node_ports = Rule::new([
        Statement::In(vec![Selector::Daddr], SetName::NodeportIps),
        Statement::Vmap(NODE_PORT.into(), SetName::Nodeports),
    ]);
    rules.extend([
        services.clone(),
        services.comment("second try: a lookup that races with a commit can miss"),
        node_ports.clone(),
        node_ports.comment("second try"),
    ]);
    rules
}
