//! From what the kernel holds to what is wanted: the transaction of a start-up or a repair.
//!
//! A table that is ours is adopted: only the difference is sent, and an unchanged restart sends
//! nothing. A table of our name that is not ours, or has another layout, is replaced within the same
//! transaction, so that there is no moment without rules.
//!
//! There are packets without them all the same, if few: those that are in the midst of a hook. The
//! kernel hooks the new table's chains in while it prepares the transaction, in front of the old ones of
//! the same priority. A packet that comes to the new chain before the commit, where it is still empty,
//! and to the old one behind it, where the rules or the elements they look up are gone, is translated by
//! neither; nor is one that came to the hook before it had the new chain, and to the old one behind the
//! commit. So a second table stands in: [`stand_in`] makes it, of everything that is wanted, before
//! the other is replaced, and it goes when every packet that may need it has passed.

use std::collections::BTreeMap;

use super::element::{ElementId, Value};
use super::kernel::{ChainState, Loaded, LoadedTable, Ownership, SetState};
use super::names::{CONNECTIONS, ChainName, LAYOUT, SetName};
use super::ruleset::Ruleset;
use super::transaction::{Op, Transaction};
use crate::model::Family;

/// Why a table of our name was not adopted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// It has no comment of ours, or names another layout; this is what it has instead.
    Layout(Option<String>),
    /// A set or map of our name is defined differently or holds elements that are not ours.
    Set(String),
    /// Anybody may change it, and it is to be owned.
    Unowned,
}

impl std::fmt::Display for Foreign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Layout(None) => write!(f, "it does not carry the comment \"{LAYOUT}\""),
            Self::Layout(Some(found)) => {
                write!(f, "it carries the comment {found:?} instead of \"{LAYOUT}\"")
            }
            Self::Unowned => f.write_str("everybody may change it"),
            Self::Set(name) => write!(f, "its set {name} is not one that nftproxy makes"),
        }
    }
}

/// Whether a table can be adopted; if not, why.
#[must_use]
pub fn foreign(table: &LoadedTable) -> Option<Foreign> {
    if table.comment.as_deref() != Some(LAYOUT) {
        return Some(Foreign::Layout(table.comment.clone()));
    }
    if table.ownership == Ownership::Never {
        return Some(Foreign::Unowned);
    }
    let odd = table.sets.iter().find(|(_, state)| **state != SetState::Same);
    odd.map(|(name, _)| Foreign::Set(name.clone()))
}

/// The operations that turn `loaded` into `wanted`.
#[must_use]
pub fn diff(loaded: &Loaded, wanted: Ruleset) -> Transaction {
    changes(loaded, wanted, &Family::BOTH)
}

/// The families whose table is replaced as a whole.
pub fn replaced(loaded: &Loaded) -> impl Iterator<Item = Family> + '_ {
    loaded.tables.iter().filter(|(_, table)| foreign(table).is_some()).map(|(family, _)| *family)
}

/// The operations that make the tables that stand in while those of these families are replaced; one
/// that an earlier try left is made anew.
///
/// Their chains come behind the tables' own, of whichever layout: what is remembered of clients is in
/// those, as long as they have it, and connections are counted there alone.
#[must_use]
pub fn stand_in(loaded: &Loaded, mut wanted: Ruleset, families: &[Family]) -> Transaction {
    wanted.options.counters = false;
    // One that is there carries no comment, so to speak.
    let left = loaded.stand_ins.iter().map(|family| (*family, LoadedTable::default()));
    let left = Loaded { tables: left.collect(), ..Loaded::default() };
    let mut transaction = changes(&left, wanted, families);
    for op in &mut transaction.ops {
        if let Op::AddChain(_, chain) = op
            && let Some(base) = &mut chain.base
        {
            base.priority += 1;
        }
    }
    transaction
}

fn changes(loaded: &Loaded, wanted: Ruleset, families: &[Family]) -> Transaction {
    let mut transaction = Transaction::default();
    let mut held: BTreeMap<Family, &BTreeMap<ElementId, Value>> = BTreeMap::new();
    let mut chains = Vec::new();
    let mut refill = Vec::new();
    let mut leftover = Vec::new();
    let mut last = Vec::new();

    for &family in families {
        let found = loaded.tables.get(&family);
        let adopted = found.filter(|table| foreign(table).is_none());
        if found.is_some() && adopted.is_none() {
            transaction.ops.push(Op::DeleteTable(family));
        }
        if adopted.is_none_or(|table| table.ownership == Ownership::Claimable) {
            transaction.ops.push(Op::AddTable(family));
        }
        let has = |set: SetName| adopted.is_some_and(|t| t.sets.contains_key(set.as_str()));
        let missing = SetName::ALL.into_iter().filter(|&set| !has(set));
        transaction.ops.extend(missing.map(|set| Op::AddSet(family, set)));

        let counts = adopted.is_some_and(|table| table.sets.contains_key(CONNECTIONS));
        if wanted.counts() && !counts {
            transaction.ops.push(Op::AddCounters(family));
        } else if counts && !wanted.counts() {
            last.push(Op::DeleteCounters(family));
        }
        let holds = |name| adopted.is_some_and(|table| table.affinities.contains_key(name));
        let missing = wanted.affinities_of(family).filter(|name| !holds(name)).cloned();
        transaction.ops.extend(missing.map(|name| Op::AddAffinity(family, name)));

        for chain in wanted.chains(family) {
            let name = chain.name.to_string();
            match adopted.and_then(|t| t.chains.get(&name)) {
                Some(ChainState::Same) => {}
                Some(ChainState::RulesDiffer) => refill.push((family, chain)),
                Some(ChainState::BaseDiffers | ChainState::Unknown) => {
                    transaction.delete_chains([(family, name)].into_iter());
                    chains.push((family, chain.name));
                }
                None => chains.push((family, chain.name)),
            }
        }
        if let Some(table) = adopted {
            held.insert(family, &table.elements);
            let is_wanted = |name: ChainName| {
                if ChainName::COUNTING.contains(&name) {
                    return wanted.counts();
                }
                !name.is_shared() || wanted.shared_chains.contains(&(family, name))
            };
            let unwanted = table.chains.keys().filter(|name| !name.parse().is_ok_and(is_wanted));
            leftover.extend(unwanted.map(|name| (family, name.clone())));
            for (name, held) in &table.affinities {
                match wanted.affinities.get(&(family, name.clone())) {
                    None => last.push(Op::DeleteAffinity(family, name.clone())),
                    Some(keep) if held.iter().any(|b| keep.binary_search(b).is_err()) => {
                        last.push(Op::Forget(family, name.clone(), keep.clone()));
                    }
                    Some(_) => {}
                }
            }
        }
    }

    transaction.add_chains(chains.into_iter(), &wanted.options);
    for (family, chain) in refill {
        transaction.ops.push(Op::FlushChain(family, chain.name.to_string()));
        transaction.ops.push(Op::AddRules(family, Box::new(chain)));
    }
    let holds = |id: &ElementId| held.get(&id.family)?.get(id);
    for (&id, value) in held.values().copied().flatten() {
        if wanted.elements.get(&id) != Some(value) {
            transaction.ops.push(Op::DeleteElement(id, value.clone()));
        }
    }
    let missing = wanted.elements.into_iter();
    let missing =
        missing.filter(|(id, value)| families.contains(&id.family) && holds(id) != Some(value));
    // Made in the place of the list, which is most of what there is.
    let added: Vec<Op> = missing.map(|(id, value)| Op::AddElement(id, value)).collect();
    if transaction.ops.len() < added.len() {
        let before = std::mem::replace(&mut transaction.ops, added);
        transaction.ops.splice(..0, before);
    } else {
        transaction.ops.extend(added);
    }
    transaction.delete_chains(leftover.into_iter());
    last.sort_by_key(|op| matches!(op, Op::Forget(..)));
    transaction.ops.extend(last);
    transaction
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::dataplane::Options;
    use crate::nft::element::{Backend, Key};
    use crate::nft::names::{AffinityName, List};

    #[test]
    fn a_table_that_cannot_be_adopted_is_replaced_and_it_is_said_why() {
        let ours = LoadedTable { comment: Some(LAYOUT.to_owned()), ..LoadedTable::default() };
        assert_eq!(foreign(&ours), None);
        let odd = [("services".to_owned(), SetState::Differs)].into();
        for (table, why) in [
            (
                LoadedTable { comment: None, ..ours.clone() },
                format!("it does not carry the comment \"{LAYOUT}\""),
            ),
            (
                LoadedTable { comment: Some("mine".to_owned()), ..ours.clone() },
                format!("it carries the comment \"mine\" instead of \"{LAYOUT}\""),
            ),
            (
                LoadedTable { ownership: Ownership::Never, ..ours.clone() },
                "everybody may change it".to_owned(),
            ),
            (
                LoadedTable { sets: odd, ..ours.clone() },
                "its set services is not one that nftproxy makes".to_owned(),
            ),
        ] {
            assert_eq!(foreign(&table).unwrap().to_string(), why);
            let loaded = Loaded { tables: [(Family::V4, table)].into(), ..Loaded::default() };
            assert_eq!(replaced(&loaded).collect::<Vec<_>>(), [Family::V4]);
            let wanted = Ruleset { options: Options::default(), ..Ruleset::default() };
            let ops = diff(&loaded, wanted).ops;
            let first = &ops[..2];
            assert_eq!(first, [Op::DeleteTable(Family::V4), Op::AddTable(Family::V4)]);
        }
    }

    #[test]
    fn a_chain_with_another_hook_is_made_anew_and_one_with_other_rules_filled_anew() {
        let wanted = Ruleset { options: Options::default(), ..Ruleset::default() };
        let names: Vec<_> = wanted.chains(Family::V4).map(|chain| chain.name).collect();
        let mut states: BTreeMap<_, _> =
            names.iter().map(|name| (name.to_string(), ChainState::Same)).collect();
        states.insert(names[0].to_string(), ChainState::BaseDiffers);
        states.insert(names[1].to_string(), ChainState::RulesDiffer);
        let sets = SetName::ALL.map(|set| (set.as_str().to_owned(), SetState::Same));
        let comment = Some(LAYOUT.to_owned());
        let table =
            LoadedTable { comment, sets: sets.into(), chains: states, ..LoadedTable::default() };
        let tables = Family::BOTH.map(|family| (family, table.clone())).into();
        let loaded = Loaded { tables, ..Loaded::default() };
        let ops = diff(&loaded, wanted).ops;
        for family in Family::BOTH {
            let at = |wanted: &Op| ops.iter().position(|op| op == wanted);
            let deleted = at(&Op::DeleteChain(family, names[0].to_string())).unwrap();
            let added = |op: &Op| matches!(op, Op::AddChain(f, chain) if *f == family && chain.name == names[0]);
            let added = ops.iter().position(added).unwrap();
            assert!(deleted < added, "{ops:#?}");
            assert!(at(&Op::FlushChain(family, names[1].to_string())).is_some(), "{ops:#?}");
        }
        let chains = ops.iter().filter(|op| matches!(op, Op::AddChain(..))).count();
        assert_eq!(chains, 2, "one of each family: {ops:#?}");
    }

    #[test]
    fn clients_of_backends_that_went_meanwhile_are_forgotten_and_maps_nobody_claims_removed_first()
    {
        let backend = |host| Backend { address: [10, 244, 0, host].into(), port: 8080 };
        let map = |service: &str| AffinityName {
            port: format!("default/{service}/tcp").parse().unwrap(),
            list: List::Cluster,
        };
        let held = [
            (map("gone"), [backend(1)].into()),
            (map("less"), [backend(1), backend(2)].into()),
            (map("same"), [backend(1), backend(2)].into()),
        ];
        let table = LoadedTable {
            comment: Some(LAYOUT.to_owned()),
            affinities: held.into(),
            ..LoadedTable::default()
        };
        let keep = |hosts: &[u8]| hosts.iter().copied().map(backend).collect::<Box<[_]>>();
        let wanted = Ruleset {
            affinities: [
                ((Family::V4, map("less")), keep(&[2, 3])),
                ((Family::V4, map("new")), keep(&[1])),
                ((Family::V4, map("same")), keep(&[1, 2, 3])),
            ]
            .into(),
            ..Ruleset::default()
        };
        let ops =
            diff(&Loaded { tables: [(Family::V4, table)].into(), ..Loaded::default() }, wanted).ops;
        assert!(ops.contains(&Op::AddAffinity(Family::V4, map("new"))));
        let [.., deleted, forgotten] = &ops[..] else { panic!("{ops:?}") };
        assert_eq!(*deleted, Op::DeleteAffinity(Family::V4, map("gone")));
        assert_eq!(*forgotten, Op::Forget(Family::V4, map("less"), keep(&[2, 3])));
        let of_maps =
            |op: &&Op| matches!(op, Op::AddAffinity(..) | Op::DeleteAffinity(..) | Op::Forget(..));
        assert_eq!(ops.iter().filter(of_maps).count(), 3);
    }

    #[test]
    fn what_stands_in_is_a_whole_table_whose_chains_come_later() {
        let options = Options { counters: true, ..Options::default() };
        let element = |family| {
            let key = Key::Port(80);
            (ElementId { family, set: SetName::Nodeports, key }, Value::Drop)
        };
        let elements = Family::BOTH.map(element).into_iter().collect();
        let wanted = Ruleset { options, elements, ..Ruleset::default() };
        let whole = diff(&Loaded::default(), wanted.clone()).ops;
        let loaded = Loaded { stand_ins: [Family::V6].into(), ..Loaded::default() };
        for (family, left) in [(Family::V4, false), (Family::V6, true)] {
            let mut ops = stand_in(&loaded, wanted.clone(), &[family]).ops;
            if left {
                assert_eq!(ops.remove(0), Op::DeleteTable(family));
            }
            let mut later = 0;
            for op in &mut ops {
                if let Op::AddChain(_, chain) = op
                    && let Some(base) = &mut chain.base
                {
                    later += 1;
                    base.priority -= 1;
                }
            }
            assert_eq!(later, 7, "all but those that count");
            let counts = |op: &Op| match op {
                Op::AddCounters(_) => true,
                Op::AddChain(_, chain) | Op::AddRules(_, chain) => {
                    ChainName::COUNTING.contains(&chain.name)
                }
                _ => false,
            };
            let is_of = |op: &Op| format!("{op:?}").contains(&format!("{family:?}"));
            let of_family: Vec<_> = whole.iter().filter(|op| is_of(op) && !counts(op)).collect();
            assert_eq!(ops.iter().collect::<Vec<_>>(), of_family);
        }
    }
}
