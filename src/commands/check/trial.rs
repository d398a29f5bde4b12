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
use crate::model::{Family, Protocol};
use crate::nft::element::{ElementId, Key, Value};
use crate::nft::kernel::{ApplyError, Kernel as _, Refusal};
use crate::nft::names::SetName;
use crate::nft::netlink::{FEATURES, NetlinkKernel};
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

/// Whether the kernel has every feature that the tables are made of.
pub(super) fn of_features(kernel: &mut NetlinkKernel) -> Vec<Finding> {
    let missing = match kernel.probe(FEATURES) {
        Err(error) => return vec![Finding::bad("kernel", error.to_string(), "look again")],
        Ok(missing) => missing,
    };
    let advice = "load the module, or take a kernel that has it";
    let mut findings: Vec<_> = missing
        .iter()
        .map(|missing| match missing.only {
            Some(_) => Finding::attention("kernel", missing.to_string(), advice),
            None => Finding::bad("kernel", missing.to_string(), advice),
        })
        .collect();
    if findings.is_empty() {
        let found = format!("it has all {} features that the tables are made of", FEATURES.len());
        findings.push(Finding::good("kernel", found));
    }
    findings
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
