//! Whether the kernel takes something, without doing it.
//!
//! The operations are sent in one batch with a last one that cannot succeed: the kernel looks at each,
//! says what it refuses, and takes all of it back. So every rule, map and expression is tried in the
//! kernel that is to run it, and nobody sees anything change.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use super::Finding;
use crate::contribution::Contributor;
use crate::model::{Family, NamespacedName, Protocol};
use crate::nft::dataplane::Options;
use crate::nft::diff::diff;
use crate::nft::element::{ElementId, Key, Value};
use crate::nft::kernel::{ApplyError, Kernel as _, Loaded, Refusal};
use crate::nft::names::{
    AffinityName, ChainName, Entry, List, Memory, Pick, PortChain, PortName, Selection, SetName,
    TABLE,
};
use crate::nft::netlink::NetlinkKernel;
use crate::nft::ruleset::Ruleset;
use crate::nft::text;
use crate::nft::transaction::{Op, Transaction};

/// What the kernel refuses of these operations, of which none takes effect.
fn refused(kernel: &mut NetlinkKernel, mut ops: Vec<Op>) -> Result<Vec<Refusal>, ApplyError> {
    // No Service has port 0, so that there is nothing to remove, whatever stands before.
    let key = Key::Frontend(IpAddr::V4(Ipv4Addr::UNSPECIFIED), Protocol::Tcp, 0);
    let impossible = ElementId { family: Family::V4, set: SetName::Services, key };
    let last = ops.len();
    ops.push(Op::DeleteElement(impossible, Value::Drop));
    match kernel.apply(&Transaction { ops }) {
        Ok(_) => Ok(Vec::new()),
        Err(ApplyError::Refused { refusals }) => {
            Ok(refusals.into_iter().filter(|refusal| refusal.op != Some(last)).collect())
        }
        Err(error) => Err(error),
    }
}

/// A ruleset with a chain and a map of every kind.
fn everything(options: &Options) -> Ruleset {
    let mut ruleset = Ruleset { options: options.clone(), ..Ruleset::default() };
    let service = NamespacedName::new("nftproxy", "check");
    let port = PortName::new(&service, Protocol::Tcp, "check").expect("a name that fits");
    let select = |pick| Selection { entry: Entry::Address, list: List::Cluster, pick, n: 2 };
    let sticky = PortChain::Sticky(select(Pick::Random));
    let chains = [
        ChainName::Select(select(Pick::Random)),
        ChainName::External(select(Pick::Random)),
        ChainName::Select(select(Pick::SourceHash)),
        ChainName::of_port(&port, PortChain::Select(select(Pick::RoundRobin))),
        ChainName::of_port(&port, sticky),
        ChainName::of_port(&port, PortChain::Record(Memory::Cluster, 10800)),
    ];
    for family in Family::BOTH {
        ruleset.shared_chains.extend(chains.iter().map(|chain| (family, chain.clone())));
        let affinity = AffinityName { port: port.clone(), list: List::Cluster };
        ruleset.affinities.insert((family, affinity), Box::default());
    }
    ruleset
}

/// Whether the kernel knows everything that nftproxy makes rules of. Where tables of our name are there
/// it is not tried: they are in use, and show it themselves.
pub(super) fn of_rules(kernel: &mut NetlinkKernel, options: &Options) -> Finding {
    let mut is_there =
        |family| kernel.table_names(family).map(|names| names.iter().any(|n| n == TABLE));
    match Family::BOTH.map(&mut is_there) {
        [Ok(false), Ok(false)] => {}
        [Err(error), _] | [_, Err(error)] => {
            return Finding::bad("kernel", error.to_string(), "look again");
        }
        _ => return Finding::good("kernel", "not tried out, as tables of nftproxy are there"),
    }
    let ops = diff(&Loaded::default(), &everything(options)).ops;
    let named = |refusal: &Refusal| match refusal.op.and_then(|op| ops.get(op)) {
        Some(op) => format!("{refusal}: {}", text::op(op).lines().next().unwrap_or_default()),
        None => refusal.to_string(),
    };
    match refused(kernel, ops.clone()) {
        Err(error) => Finding::bad("kernel", error.to_string(), "look again"),
        Ok(refusals) if refusals.is_empty() => {
            Finding::good("kernel", "it takes every kind of rule and map that nftproxy makes")
        }
        Ok(refusals) => Finding::bad(
            "kernel",
            format!(
                "it refuses {} kinds of rules or maps; first, {}",
                refusals.len(),
                named(&refusals[0])
            ),
            "nftproxy needs Linux 5.13 or newer with nf_tables, nft_nat, nft_masq, nft_fib, \
             nft_numgen, nft_hash and nft_reject, built in or as modules that can be loaded",
        ),
    }
}

/// The objects of which the kernel would refuse something: the daemon sets them aside.
pub(super) fn of_plan(
    kernel: &mut NetlinkKernel,
    plan: &[(Op, Option<Contributor>)],
) -> Vec<Finding> {
    if plan.is_empty() {
        return Vec::new();
    }
    let ops: Vec<Op> = plan.iter().map(|(op, _)| op.clone()).collect();
    let refusals = match refused(kernel, ops) {
        Ok(refusals) => refusals,
        Err(error) => return vec![Finding::bad("refused", error.to_string(), "look again")],
    };
    // The tables are owned by a running nftproxy, which nobody else can change.
    if refusals.iter().all(|refusal| refusal.errno == libc::EPERM) {
        return Vec::new();
    }
    let mut named = BTreeSet::new();
    let mut findings = Vec::new();
    for refusal in &refusals {
        let Some((op, contributor)) = refusal.op.and_then(|op| plan.get(op)) else { continue };
        let who = contributor.as_ref().map_or_else(|| "nobody's own".into(), ToString::to_string);
        if named.insert(who.clone()) {
            let errno = io::Error::from_raw_os_error(refusal.errno);
            findings.push(Finding::bad(
                "refused",
                format!("{who}: {}: {errno}", text::op(op).lines().next().unwrap_or_default()),
                "nftproxy leaves this object out and serves all others; change the object",
            ));
        }
    }
    findings
}
