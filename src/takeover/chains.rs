//! Which chains of iptables are kube-proxy's, and how they can go. Decisions only.
//!
//! The names are those that kube-proxy's own cleanup removes, in iptables and in ipvs mode. Others
//! that begin alike are the kubelet's and stay: `KUBE-FIREWALL`, `KUBE-MARK-DROP`,
//! `KUBE-KUBELET-CANARY`, `KUBE-IPTABLES-HINT`. A chain that somebody else's rule leads to cannot go,
//! and with it stays what it leads to itself. (What other programs use is `KUBE-MARK-MASQ`; the mark
//! it sets is the one that our own postrouting masquerades.)

use std::collections::BTreeMap;

/// The tables of iptables in which kube-proxy has chains.
pub(super) const TABLES: [&str; 3] = ["filter", "nat", "mangle"];

/// Chains that the kernel's own chains lead to.
const ENTRIES: [&str; 9] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    FORWARDING,
    "KUBE-PROXY-FIREWALL",
    // ipvs mode
    "KUBE-NODE-PORT",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
];

/// Chains that those lead to; or nobody, in the case of the canary.
const OTHERS: [&str; 4] =
    ["KUBE-MARK-MASQ", "KUBE-PROXY-CANARY", "KUBE-LOAD-BALANCER", "KUBE-SOURCE-RANGES-FIREWALL"];

/// Chains of one Service port or endpoint each.
const PREFIXES: [&str; 6] =
    ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-"];

/// Accepts what was marked for masquerading and what belongs to known connections.
const FORWARDING: &str = "KUBE-FORWARD";

/// A chain of a table, however it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Chain<R> {
    pub(super) name: String,
    /// Whether the kernel itself calls it.
    pub(super) base: bool,
    /// Whether packets that reach its end are dropped.
    pub(super) drops: bool,
    /// Rules that lead to other chains: what names the rule, and the chain.
    pub(super) jumps: Vec<(R, String)>,
}

/// Why everything is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Services are ours now: nothing goes that they need.
    TakeOver,
    /// Nothing of kube-proxy's is wanted on this node.
    Cleanup,
}

/// How kube-proxy's chains of a table go.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan<'a, R> {
    /// Rules of others' chains that lead to them: the chain, and what names the rule.
    pub(super) rules: Vec<(&'a str, &'a R)>,
    /// The chains, each to be flushed before any of them is deleted.
    pub(super) chains: Vec<&'a str>,
    /// Chains that stay, and why.
    pub(super) stay: BTreeMap<&'a str, String>,
}

pub(super) fn is_kube_proxys(chain: &str) -> bool {
    ENTRIES.contains(&chain)
        || OTHERS.contains(&chain)
        || PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

/// What has to be done in a table.
pub(super) fn plan<R>(chains: &[Chain<R>], purpose: Purpose) -> Plan<'_, R> {
    let (theirs, others): (Vec<_>, Vec<_>) =
        chains.iter().partition(|chain| is_kube_proxys(&chain.name));
    let theirs: BTreeMap<&str, &Chain<R>> =
        theirs.into_iter().map(|chain| (chain.name.as_str(), chain)).collect();
    let mut rules = Vec::new();
    let mut stay = BTreeMap::new();
    for chain in others {
        for (rule, target) in &chain.jumps {
            let target = target.as_str();
            if !theirs.contains_key(target) {
                continue;
            }
            if target == FORWARDING && chain.drops && purpose == Purpose::TakeOver {
                let what = "and this chain lets through what Services need";
                stay.insert(target, format!("the policy of {} is DROP, {what}", chain.name));
            } else if chain.base && ENTRIES.contains(&target) {
                rules.push((chain.name.as_str(), rule));
            } else {
                stay.insert(target, format!("a rule in {} leads to it", chain.name));
            }
        }
    }
    // What stays holds what it leads to.
    let mut open: Vec<&str> = stay.keys().copied().collect();
    while let Some(name) = open.pop() {
        for (_, target) in &theirs[name].jumps {
            if theirs.contains_key(target.as_str()) && !stay.contains_key(target.as_str()) {
                stay.insert(target, format!("{name} stays and leads to it"));
                open.push(target);
            }
        }
    }
    let chains = theirs.into_keys().filter(|name| !stay.contains_key(name)).collect();
    Plan { rules, chains, stay }
}
