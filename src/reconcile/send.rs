//! How a change is sent, so that every packet meets the tables before it or those behind it.

use std::collections::BTreeSet;

use tracing::warn;

use super::{CommitError, Committed};
use crate::model::Family;
use crate::nft::diff::{replaced, stand_in};
use crate::nft::kernel::{Applied, ApplyError, Kernel, Loaded};
use crate::nft::ruleset::Ruleset;
use crate::nft::transaction::{Op, Transaction};

/// Sends a transaction. Where it leads elsewhere what was led somewhere before, new chains, and sets they
/// need, go first, as one of their own: a packet keeps the generation of rules it began with, in which a
/// chain made later is empty, but its lookups see the elements of the new one. If it meets one that leads
/// to a chain of the same transaction, it falls through. Nothing refers to the chains yet, so that the
/// change itself is still one transaction.
///
/// What was led nowhere before may meet an empty chain: it falls through as if it had found nothing, since
/// behind a rule that looks for a verdict comes another one, if any. Each transaction has the kernel walk all
/// verdicts, so that one of them is half of the time.
pub(super) fn apply<K: Kernel>(
    kernel: &mut K,
    transaction: &mut Transaction,
) -> Result<Committed, CommitError> {
    let operations = transaction.ops.len();
    let mut send = |transaction: &Transaction| {
        if transaction.is_empty() {
            return Ok(Applied::default());
        }
        kernel.apply(transaction).map_err(|source| CommitError::Apply { operations, source })
    };
    let ahead = ahead(&transaction.ops);
    let ahead = Transaction { ops: transaction.ops.drain(..ahead).collect() };
    let first = send(&ahead);
    if first.is_err() {
        transaction.ops.splice(..0, ahead.ops);
    }
    let (first, then) = (first?, send(transaction)?);
    Ok(Committed { operations, applied: first + then, adopted: false, set_aside: 0 })
}

/// How many operations are to go ahead of the others.
fn ahead(ops: &[Op]) -> usize {
    let unused = |op: &&Op| {
        matches!(
            op,
            Op::AddSet(..)
                | Op::AddAffinity(..)
                | Op::AddCounters(_)
                | Op::AddChain(..)
                | Op::AddRules(..)
        )
    };
    let leads_elsewhere = |op: &Op| match op {
        Op::DeleteElement(id, _) => id.set.leads_on(),
        // Of a chain that has rules already.
        Op::AddRules(..) => true,
        _ => false,
    };
    let unused = ops.iter().take_while(unused).count();
    if unused > 0 && ops[unused..].iter().any(leads_elsewhere) { unused } else { 0 }
}

/// Puts up tables that stand in for those that are replaced, if any is; behind it, every packet that comes to a
/// hook meets them. Where the kernel has no room for both, the replacement does without: better a connection that
/// is refused in that moment than a node that stays behind.
pub(super) fn put_up<K: Kernel>(
    kernel: &mut K,
    loaded: &mut Loaded,
    wanted: impl FnOnce() -> Ruleset,
) -> Result<Applied, CommitError> {
    let families: Vec<_> = replaced(loaded).collect();
    if families.is_empty() {
        return Ok(Applied::default());
    }
    match send_to_stand_in(kernel, &stand_in(loaded, wanted(), &families)) {
        Ok(applied) => {
            loaded.stand_ins.extend(families);
            kernel.let_packets_pass();
            Ok(applied)
        }
        Err(CommitError::Apply { source: ApplyError::Refused { refusals }, .. }) => {
            let reason = &refusals[0];
            warn!(%reason, "no second table stands in while the table is replaced");
            Ok(Applied::default())
        }
        Err(error) => Err(error),
    }
}

/// Takes them down, when the packets have passed that met what was replaced.
pub(super) fn take_down<K: Kernel>(
    kernel: &mut K,
    families: &BTreeSet<Family>,
) -> Result<Applied, CommitError> {
    if families.is_empty() {
        return Ok(Applied::default());
    }
    kernel.let_packets_pass();
    let ops = families.iter().copied().map(Op::DeleteTable).collect();
    send_to_stand_in(kernel, &Transaction { ops })
}

fn send_to_stand_in<K: Kernel>(
    kernel: &mut K,
    transaction: &Transaction,
) -> Result<Applied, CommitError> {
    let operations = transaction.ops.len();
    let sent = kernel.apply_to_stand_in(transaction);
    sent.map_err(|source| CommitError::Apply { operations, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Protocol;
    use crate::nft::dataplane::{Options, chain};
    use crate::nft::element::{ElementId, Key, Value};
    use crate::nft::names::{ChainName, SetName};

    #[test]
    fn chains_go_ahead_where_something_is_led_elsewhere() {
        let family = Family::V4;
        let chain = |name| Box::new(chain(name, family, &Options::default()));
        let new = || chain(ChainName::MarkInternal);
        let chains = || vec![Op::AddChain(family, new()), Op::AddRules(family, new())];
        let id = |set| {
            let key = Key::Frontend([10, 96, 0, 10].into(), Protocol::Tcp, 80);
            ElementId { family, set, key }
        };
        let to = || Value::Goto(ChainName::MarkInternal);
        let gone = |set| Op::DeleteElement(id(set), to());
        let there = || Op::AddElement(id(SetName::Services), to());
        let old = ChainName::Dispatch;
        for (then, count) in [
            (vec![], 0),
            (vec![there()], 0),
            (vec![gone(SetName::NoEndpoints), there()], 0),
            (vec![gone(SetName::Endpoints), there()], 0),
            (vec![gone(SetName::Services), there()], 2),
            (vec![gone(SetName::AffinityRecordTcp), there()], 2),
            (vec![Op::FlushChain(family, old.to_string())], 0),
            (vec![Op::FlushChain(family, old.to_string()), Op::AddRules(family, chain(old))], 2),
        ] {
            let ops = [chains(), then].concat();
            assert_eq!(ahead(&ops), count, "{ops:?}");
        }
        let ops = [vec![Op::AddTable(family)], chains(), vec![there()]].concat();
        assert_eq!(ahead(&ops), 0, "a new table comes at once");
    }
}
