//! What the running kernel can do, found out by asking it, not by its version: distributions take
//! features out, and back-port them.
//!
//! The question is a batch that makes a table with one rule for each feature, and ends with an
//! operation that cannot succeed. The kernel looks at every operation, says which it refuses, loads the
//! modules it needs, and then takes all of it back: no packet and no listing ever sees the table.

use std::collections::BTreeSet;

use super::{Batch, NetlinkKernel, encode, send};
use crate::model::{Family, Protocol};
use crate::nft::kernel::{ApplyError, Refusal};
use crate::nft::names::{AffinityName, ChainName, List, PortName, SetName};
use crate::nft::rule::{Base, BaseKind, Chain, Hook, Rule, Selector, SlotSource, Statement};
use crate::nft::transaction::{Op, Transaction};

/// A feature of the kernel that the tables need.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// What it is, in the words of the kernel's configuration and of nft.
    pub name: &'static str,
    /// What goes without it; None if nothing can be programmed.
    pub only: Option<&'static str>,
    /// What a kernel with it accepts.
    pub ops: fn(Family) -> Vec<Op>,
}

/// A feature that the kernel does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Its name.
    pub feature: &'static str,
    /// The families that it is missing in.
    pub families: Vec<Family>,
    /// What goes without it; None if nothing can be programmed.
    pub only: Option<&'static str>,
    /// The kernel's reason.
    pub reason: String,
}

/// What it is and what that costs.
impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let families: Vec<_> = self.families.iter().map(ToString::to_string).collect();
        let (name, families) = (self.feature, families.join(" and "));
        let cost = self.only.unwrap_or("without it no Service can be programmed");
        write!(f, "the kernel lacks {name} ({families}): {cost} ({})", self.reason)
    }
}

/// All features, those first that others build upon.
pub const FEATURES: &[Feature] = &[
    Feature {
        name: "nf_tables for this family (CONFIG_NF_TABLES_IPV4, CONFIG_NF_TABLES_IPV6)",
        only: None,
        ops: |family| {
            vec![
                Op::AddTable(family),
                Op::AddChain(family, Box::new(chain(ChainName::Dispatch, None, None))),
            ]
        },
    },
    Feature {
        name: "maps of verdicts and of concatenated keys",
        only: None,
        ops: |family| {
            let plain = SetName::ALL.into_iter().filter(|set| !set.is_interval());
            plain.map(|set| Op::AddSet(family, set)).collect()
        },
    },
    Feature {
        name: "sets of ranges",
        only: None,
        ops: |family| {
            [SetName::ServiceCidrs, SetName::LocalPods].map(|s| Op::AddSet(family, s)).into()
        },
    },
    Feature {
        name: "filter chains",
        only: None,
        ops: |family| {
            let base = Base { kind: BaseKind::Filter, hook: Hook::Forward, priority: 0 };
            vec![Op::AddChain(family, Box::new(chain(ChainName::FilterForward, Some(base), None)))]
        },
    },
    Feature {
        name: "nat chains (CONFIG_NFT_NAT)",
        only: None,
        ops: |family| vec![Op::AddChain(family, Box::new(postrouting(None)))],
    },
    Feature {
        name: "masquerading with random ports (CONFIG_NFT_MASQ)",
        only: None,
        ops: |family| {
            vec![Op::AddRules(
                family,
                Box::new(postrouting(Some(Rule::new([Statement::Masquerade])))),
            )]
        },
    },
    Feature {
        name: "connection tracking, its state and original direction (CONFIG_NFT_CT)",
        only: None,
        ops: |family| {
            let original = vec![Selector::OriginalDaddr, Selector::OriginalDport];
            vec![
                rule(family, [Statement::CtStateNew]),
                rule(family, [Statement::CtStatusDnat]),
                rule(
                    family,
                    [
                        Statement::L4Proto(Protocol::Tcp),
                        Statement::Vmap(original, SetName::AffinityRecordTcp),
                    ],
                ),
            ]
        },
    },
    Feature {
        name: "routing look-ups (fib: CONFIG_NFT_FIB_IPV4, CONFIG_NFT_FIB_IPV6)",
        only: None,
        ops: |family| {
            vec![rule(family, [Statement::FromThisHost]), rule(family, [Statement::ToThisHost])]
        },
    },
    Feature {
        name: "random numbers and translation by map (numgen: CONFIG_NFT_NUMGEN, CONFIG_NFT_NAT)",
        only: None,
        ops: |family| vec![rule(family, [pick(SlotSource::Random)])],
    },
    Feature {
        name: "refusals (CONFIG_NFT_REJECT)",
        only: None,
        ops: |family| vec![rule(family, [Statement::Reject])],
    },
    Feature {
        name: "packet marks",
        only: None,
        ops: |family| {
            let bit = 1 << 14;
            vec![
                rule(family, [Statement::MarkClear(bit), Statement::MarkOr(bit)]),
                rule(family, [Statement::MarkXor(bit)]),
            ]
        },
    },
    Feature {
        name: "maps that packets fill, with timeouts (dynset)",
        only: Some("without it Services with sessionAffinity: ClientIP are left out"),
        ops: |family| {
            let port: PortName = "default/probe/tcp".parse().expect("a name of a port");
            let name = AffinityName { port, list: List::Cluster };
            vec![
                Op::AddAffinity(family, name.clone()),
                rule(
                    family,
                    [
                        Statement::L4Proto(Protocol::Tcp),
                        Statement::Remember(name.clone(), 10),
                        Statement::DnatSticky(name),
                    ],
                ),
            ]
        },
    },
    Feature {
        name: "hashes of addresses (jhash: CONFIG_NFT_HASH)",
        only: Some("without it Services with the scheduler source-hash are left out"),
        ops: |family| vec![rule(family, [pick(SlotSource::SourceHash)])],
    },
];

fn chain(name: ChainName, base: Option<Base>, rule: Option<Rule>) -> Chain {
    Chain { name, base, rules: rule.into_iter().collect() }
}

fn postrouting(rule: Option<Rule>) -> Chain {
    let base = Base { kind: BaseKind::Nat, hook: Hook::Postrouting, priority: 100 };
    chain(ChainName::NatPostrouting, Some(base), rule)
}

/// A rule in a chain that nothing leads to.
fn rule(family: Family, statements: impl Into<Vec<Statement>>) -> Op {
    Op::AddRules(family, Box::new(chain(ChainName::Dispatch, None, Some(Rule::new(statements)))))
}

/// Translates to one of several backends.
fn pick(source: SlotSource) -> Statement {
    let slot = Selector::Slot { source, modulus: 2, offset: 0 };
    let key = vec![Selector::Daddr, Selector::L4Proto, Selector::Dport, slot];
    Statement::Dnat(key, SetName::Endpoints)
}

/// The features could not be asked for.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The question was not answered.
    #[error("cannot ask the kernel for its features: {0}")]
    Ask(#[source] ApplyError),
    /// The kernel took what it has to refuse; the table was removed again.
    #[error("the kernel accepted a batch that asks for the impossible")]
    Accepted,
}

/// A table under which ours are not touched.
const SCRATCH: &str = "nftprobe";

impl NetlinkKernel {
    /// Which of these features the kernel lacks. Changes nothing.
    pub fn probe(&mut self, features: &[Feature]) -> Result<Vec<Missing>, ProbeError> {
        let mut ops = Vec::new();
        let mut asked = Vec::new();
        for family in Family::BOTH {
            for feature in features {
                let of_feature = (feature.ops)(family);
                asked.extend(of_feature.iter().map(|_| (feature, family)));
                ops.extend(of_feature);
            }
        }
        ops.push(Op::DeleteChain(Family::V4, "impossible".into()));
        let batch =
            encode::batch(&Transaction { ops }, Batch::begin(SCRATCH, Vec::new()), 0).finish();
        match send(&mut self.socket, &batch) {
            Err(ApplyError::Refused { refusals }) => missing(&asked, &refusals),
            Err(error) => Err(ProbeError::Ask(error)),
            Ok(()) => {
                self.remove_scratch();
                Err(ProbeError::Accepted)
            }
        }
    }

    fn remove_scratch(&mut self) {
        let ops = Family::BOTH.map(Op::DeleteTable).into();
        let batch =
            encode::batch(&Transaction { ops }, Batch::begin(SCRATCH, Vec::new()), 0).finish();
        drop(send(&mut self.socket, &batch));
    }
}

/// What the kernel refused but the last operation, which it has to.
fn missing(asked: &[(&Feature, Family)], refusals: &[Refusal]) -> Result<Vec<Missing>, ProbeError> {
    let of_op = |refusal: &Refusal| refusal.op.and_then(|op| asked.get(op)).copied();
    if refusals.iter().any(|refusal| refusal.op.is_none()) {
        // Not about an operation: nothing of it was looked at.
        let refusals = refusals.to_vec();
        return Err(ProbeError::Ask(ApplyError::Refused { refusals }));
    }
    let mut found: Vec<Missing> = Vec::new();
    // Where the table is refused, everything in it is, too.
    let mut without_table = BTreeSet::new();
    for refusal in refusals {
        let Some((feature, family)) = of_op(refusal) else { continue };
        if without_table.contains(&family) {
            continue;
        }
        if std::ptr::eq(feature, asked[0].0) {
            without_table.insert(family);
        }
        let known = found.iter_mut().find(|missing| missing.feature == feature.name);
        match known {
            Some(missing) if missing.families.contains(&family) => {}
            Some(missing) => missing.families.push(family),
            None => found.push(Missing {
                feature: feature.name,
                families: vec![family],
                only: feature.only,
                reason: reason(refusal),
            }),
        }
    }
    Ok(found)
}

/// The kernel's answer without our numbers.
fn reason(refusal: &Refusal) -> String {
    Refusal { op: None, ..refusal.clone() }.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> Vec<(&'static Feature, Family)> {
        let pairs = |family| FEATURES.iter().map(move |feature| (feature, family));
        Family::BOTH.into_iter().flat_map(pairs).collect()
    }

    fn refusal(op: usize, errno: i32) -> Refusal {
        Refusal { op: Some(op), errno, message: None }
    }

    #[test]
    fn a_refused_feature_is_named_once_with_its_families_and_cost() {
        let asked = asked();
        let index = FEATURES.iter().position(|feature| feature.name.contains("jhash")).unwrap();
        let end = asked.len();
        let refusals = [index, index + FEATURES.len(), end].map(|op| refusal(op, libc::ENOENT));
        let lines: Vec<_> =
            missing(&asked, &refusals).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "the kernel lacks hashes of addresses (jhash: CONFIG_NFT_HASH) (ip and ip6): without it \
              Services with the scheduler source-hash are left out (No such file or directory (os \
              error 2))"
            ]
        );
        assert!(missing(&asked, &[refusal(end, libc::ENOENT)]).unwrap().is_empty());
    }

    #[test]
    fn a_family_without_tables_is_one_line() {
        let asked = asked();
        let refusals: Vec<_> =
            (FEATURES.len()..=asked.len()).map(|op| refusal(op, libc::EAFNOSUPPORT)).collect();
        let found = missing(&asked, &refusals).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((&*found[0].families, found[0].only), (&[Family::V6][..], None));
    }

    #[test]
    fn an_answer_about_the_batch_is_not_taken_for_features() {
        let refusals = [Refusal { op: None, errno: libc::EPERM, message: None }];
        assert!(missing(&asked(), &refusals).is_err());
    }
}
