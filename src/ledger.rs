//! Who asks for which element, and what changes when that changes.
//!
//! The ledger mirrors what was committed. Staging new contributions compares them with the previous
//! ones of the same contributors only, so the cost is that of the change; the ledger itself moves on
//! when the kernel has accepted the result, and a refused transaction leaves no trace in it.
//!
//! Elements of [shared] sets and shared chains are counted: the first claim adds, the last one
//! removes. A chain nobody claims any more stays until it is collected, since Services tend to come
//! back to a number of endpoints they just left, and since a kernel before 6.2 refuses to remove a
//! chain together with the element that went to it. Affinity maps, which such chains look into, stay
//! with them.
//!
//! Beside the chain for so many endpoints stand spare ones for one endpoint more and for one less. When a
//! rule that looks into a map is the first of its chain to do so, the kernel walks all elements of the map
//! (`nf_tables_bind_set`; measured: 0.4 µs each, 0.17 s for 430,000), which no update is to wait for. In a
//! table that is made anew, the maps are empty yet; later, spare chains come when chains are collected.
//!
//! [shared]: crate::nft::names::SetName::is_shared

use std::collections::{BTreeMap, BTreeSet};

use crate::contribution::{Affinity, Contribution, Contributor};
use crate::model::Family;
use crate::nft::dataplane::Options;
use crate::nft::element::{Backend, ElementId, Value};
use crate::nft::names::{AffinityName, ChainName};
use crate::nft::ruleset::Ruleset;
use crate::nft::transaction::{Change, Op, Transaction};

/// The committed contributions.
#[derive(Debug, Default)]
pub struct Ledger {
    contributions: BTreeMap<Contributor, Contribution>,
    /// How many contributors claim an element of a shared set.
    shared: BTreeMap<ElementId, u32>,
    /// How many contributors claim a shared chain; 0 while it is spare, or until it is collected.
    chains: BTreeMap<(Family, ChainName), u32>,
    /// Those with 0 that are not spare.
    idle_chains: BTreeSet<(Family, ChainName)>,
    /// Spare ones that are not there yet.
    missing_chains: BTreeSet<(Family, ChainName)>,
    /// The affinity maps that exist.
    affinities: BTreeMap<AffinityKey, AffinityMap>,
    /// Those that nobody claims, or that are not settled.
    open_affinities: BTreeSet<AffinityKey>,
}

type AffinityKey = (Family, AffinityName);

/// An affinity map of the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct AffinityMap {
    /// The backends that clients may be held to; None while nobody claims the map.
    backends: Option<Box<[Backend]>>,
    /// Whether clients were forgotten since the last collection. A packet that was under way then can
    /// have brought one back, so they are forgotten once more.
    unsettled: bool,
}

/// Contributions on their way to the kernel.
#[derive(Debug, Default)]
pub struct Staged {
    contributions: Vec<(Contributor, Contribution)>,
    /// What changes; sorted.
    elements: Vec<(ElementId, Change)>,
    shared: BTreeMap<ElementId, i64>,
    chains: BTreeMap<(Family, ChainName), i64>,
    new_chains: Vec<(Family, ChainName)>,
    collected: Vec<(Family, ChainName)>,
    /// The affinity maps that change, as they will be.
    affinities: BTreeMap<AffinityKey, AffinityMap>,
    new_affinities: Vec<AffinityKey>,
    forgotten: Vec<AffinityKey>,
    collected_affinities: Vec<AffinityKey>,
}

impl Ledger {
    /// Compares contributions with the committed ones. A contributor without anything to ask for
    /// is staged as an empty contribution.
    #[must_use]
    pub fn stage(&self, contributions: Vec<(Contributor, Contribution)>) -> Staged {
        let mut staged = Staged::default();
        let nothing = Contribution::default();
        for (contributor, after) in &contributions {
            let before = self.contributions.get(contributor).unwrap_or(&nothing);
            for (item, left, came) in compare(&before.elements, &after.elements) {
                if item.set.is_shared() {
                    *staged.shared.entry(item).or_default() += step(left, came);
                } else {
                    let change = Change { from: left.cloned(), to: came.cloned() };
                    staged.elements.push((item, change));
                }
            }
            self.stage_rest(before, after, &mut staged);
        }
        for (&id, &delta) in &staged.shared {
            let before = self.shared.get(&id).copied().unwrap_or(0);
            let exists = |count: u32| (count > 0).then_some(Value::None);
            let change = Change { from: exists(before), to: exists(moved(before, delta)) };
            staged.elements.push((id, change));
        }
        // One that goes from a contributor to another is one change.
        staged.elements.sort_by_key(|(id, _)| *id);
        staged.elements.dedup_by(|(next, change), (id, kept)| {
            let same = next == id;
            if same {
                kept.from = change.from.take().or(kept.from.take());
                kept.to = change.to.take().or(kept.to.take());
            }
            same
        });
        staged.elements.retain(|(_, change)| change.from != change.to);
        staged.new_chains = staged
            .chains
            .keys()
            .filter(|chain| !self.chains.contains_key(chain))
            .cloned()
            .collect();
        staged.contributions = contributions;
        staged
    }

    /// Everything there is, on a ledger that has nothing: [`Staged::ruleset`] says what is wanted.
    /// Elements stay where they are, as there can be hundreds of thousands.
    #[must_use]
    pub fn stage_all(contributions: Vec<(Contributor, Contribution)>) -> Staged {
        let mut staged = Staged::default();
        let nothing = Contribution::default();
        let mut shared = Vec::new();
        for (_, after) in &contributions {
            shared.extend(after.elements.iter().map(|(id, _)| *id).filter(|id| id.set.is_shared()));
            Self::default().stage_rest(&nothing, after, &mut staged);
        }
        shared.sort_unstable();
        let claims = shared.chunk_by(|a, b| a == b).map(|claims| (claims[0], count(claims.len())));
        staged.shared = claims.collect();
        let spare = staged.chains.keys().flat_map(neighbours);
        let chains: BTreeSet<_> = staged.chains.keys().cloned().chain(spare).collect();
        staged.new_chains = chains.into_iter().collect();
        staged.contributions = contributions;
        staged
    }

    /// Chains and affinity maps of one contributor.
    fn stage_rest(&self, before: &Contribution, after: &Contribution, staged: &mut Staged) {
        for chain in before.chains.iter().filter(|&c| after.chains.binary_search(c).is_err()) {
            *staged.chains.entry(chain.clone()).or_default() -= 1;
        }
        for chain in after.chains.iter().filter(|&c| before.chains.binary_search(c).is_err()) {
            *staged.chains.entry(chain.clone()).or_default() += 1;
        }
        self.stage_affinities(&before.affinities, &after.affinities, staged);
    }

    /// An affinity map belongs to one Service port, so that there is nothing to count.
    fn stage_affinities(&self, before: &[Affinity], after: &[Affinity], staged: &mut Staged) {
        let key = |affinity: &Affinity| (affinity.family, affinity.name.clone());
        for affinity in before.iter().filter(|affinity| !after.contains(affinity)) {
            staged.affinities.insert(key(affinity), AffinityMap::default());
        }
        for affinity in after.iter().filter(|affinity| !before.contains(affinity)) {
            let key = key(affinity);
            let backends = Some(affinity.backends.clone());
            let mut unsettled = false;
            match self.affinities.get(&key) {
                None => staged.new_affinities.push(key.clone()),
                Some(map) => {
                    // An idle map still holds the clients of the backends that it had.
                    let stays = |backend| affinity.backends.binary_search(backend).is_ok();
                    let kept = map.backends.as_ref().is_some_and(|list| list.iter().all(stays));
                    unsettled = map.unsettled || !kept;
                    if !kept {
                        staged.forgotten.push(key.clone());
                    }
                }
            }
            staged.affinities.insert(key, AffinityMap { backends, unsettled });
        }
    }

    /// The removal of shared chains and affinity maps that nobody claims; and spare chains that are missing.
    #[must_use]
    pub fn collect(&self) -> Staged {
        let collected = self.idle_chains.iter().cloned().collect();
        let new_chains = self.missing_chains.iter().cloned().collect();
        let mut staged = Staged { new_chains, collected, ..Staged::default() };
        for key in &self.open_affinities {
            match self.affinities.get(key) {
                Some(map) if map.backends.is_some() => {
                    let settled = AffinityMap { unsettled: false, ..map.clone() };
                    staged.forgotten.push(key.clone());
                    staged.affinities.insert(key.clone(), settled);
                }
                _ => staged.collected_affinities.push(key.clone()),
            }
        }
        staged
    }

    /// Whether there is something to [`collect`](Self::collect).
    #[must_use]
    pub fn has_idle(&self) -> bool {
        !self.idle_chains.is_empty()
            || !self.missing_chains.is_empty()
            || !self.open_affinities.is_empty()
    }

    /// Moves on to what the kernel has accepted.
    pub fn accept(&mut self, staged: Staged) {
        if self.shared.is_empty() {
            let counts = staged.shared.iter().map(|(id, delta)| (*id, moved(0, *delta)));
            self.shared = counts.filter(|(_, count)| *count > 0).collect();
        } else {
            self.move_shared(staged.shared);
        }

        self.move_chains(staged.chains, staged.new_chains, staged.collected);
        for (key, map) in staged.affinities {
            if map.backends.is_none() || map.unsettled {
                self.open_affinities.insert(key.clone());
            } else {
                self.open_affinities.remove(&key);
            }
            self.affinities.insert(key, map);
        }
        for key in staged.collected_affinities {
            self.open_affinities.remove(&key);
            self.affinities.remove(&key);
        }
        let mut contributions = staged.contributions;
        if self.contributions.is_empty() {
            contributions.retain(|(_, contribution)| *contribution != Contribution::default());
            self.contributions = contributions.into_iter().collect();
            return;
        }
        for (contributor, contribution) in contributions {
            if contribution == Contribution::default() {
                self.contributions.remove(&contributor);
            } else {
                self.contributions.insert(contributor, contribution);
            }
        }
    }

    fn move_chains(
        &mut self,
        claims: BTreeMap<(Family, ChainName), i64>,
        new: Vec<(Family, ChainName)>,
        collected: Vec<(Family, ChainName)>,
    ) {
        for (chain, delta) in &claims {
            let count = self.chains.entry(chain.clone()).or_default();
            *count = moved(*count, *delta);
        }
        for chain in &new {
            self.chains.entry(chain.clone()).or_default();
        }
        for chain in &collected {
            self.chains.remove(chain);
        }
        for chain in claims.into_keys().chain(new).chain(collected) {
            neighbours(&chain).chain([chain.clone()]).for_each(|chain| self.sort_chain(chain));
        }
    }

    /// Takes note of whether a chain is idle, or a spare one that is missing.
    fn sort_chain(&mut self, chain: (Family, ChainName)) {
        let is_claimed = |chain| self.chains.get(&chain).is_some_and(|claims| *claims > 0);
        let is_spare = neighbours(&chain).any(is_claimed);
        let found = self.chains.get(&chain);
        self.idle_chains.remove(&chain);
        self.missing_chains.remove(&chain);
        match (found, is_spare) {
            (None, true) => drop(self.missing_chains.insert(chain)),
            (Some(0), false) => drop(self.idle_chains.insert(chain)),
            _ => {}
        }
    }

    fn move_shared(&mut self, shared: BTreeMap<ElementId, i64>) {
        for (id, delta) in shared {
            let count = moved(self.shared.get(&id).copied().unwrap_or(0), delta);
            if count == 0 {
                self.shared.remove(&id);
            } else {
                self.shared.insert(id, count);
            }
        }
    }

    /// What a contributor has committed.
    #[must_use]
    pub fn contribution(&self, contributor: &Contributor) -> Option<&Contribution> {
        self.contributions.get(contributor)
    }
}

impl Staged {
    /// The operations, in order.
    #[must_use]
    pub fn transaction(&self, options: &Options) -> Transaction {
        let mut transaction = Transaction::default();
        let added = self.new_affinities.iter().cloned();
        transaction.ops.extend(added.map(|(family, name)| Op::AddAffinity(family, name)));
        transaction.add_chains(self.new_chains.iter().cloned(), options);
        transaction.change_elements(&self.elements);
        let collected = self.collected.iter().map(|(family, name)| (*family, name.to_string()));
        transaction.delete_chains(collected);
        let collected = self.collected_affinities.iter().cloned();
        transaction.ops.extend(collected.map(|(family, name)| Op::DeleteAffinity(family, name)));
        transaction.ops.extend(self.forgotten.iter().filter_map(|key| {
            let keep = self.affinities.get(key)?.backends.clone()?;
            Some(Op::Forget(key.0, key.1.clone(), keep))
        }));
        transaction
    }

    /// Everything that is wanted, if this came from [`Ledger::stage_all`].
    #[must_use]
    pub fn ruleset(&self, options: Options) -> Ruleset {
        let elements = self.contributions.iter().flat_map(|(_, c)| c.elements.iter().cloned());
        Ruleset {
            options,
            shared_chains: self.new_chains.iter().cloned().collect(),
            affinities: self
                .affinities
                .iter()
                .filter_map(|(key, map)| Some((key.clone(), map.backends.clone()?)))
                .collect(),
            elements: elements.collect(),
        }
    }

    /// Who asked for an operation, as far as one contributor alone did.
    #[must_use]
    pub fn contributor(&self, op: &Op) -> Option<&Contributor> {
        let asks = |contribution: &Contribution| match op {
            Op::AddElement(id, _) | Op::DeleteElement(id, _) => {
                contribution.elements.binary_search_by_key(id, |(id, _)| *id).is_ok()
            }
            Op::AddChain(family, chain) | Op::AddRules(family, chain) => {
                contribution.chains.binary_search(&(*family, chain.name.clone())).is_ok()
            }
            Op::AddAffinity(family, name) | Op::Forget(family, name, _) => {
                contribution.affinities.iter().any(|a| (&a.family, &a.name) == (family, name))
            }
            _ => false,
        };
        self.contributions.iter().find(|(_, contribution)| asks(contribution)).map(|(c, _)| c)
    }
}

/// The chains for one endpoint more and for one less.
fn neighbours((family, name): &(Family, ChainName)) -> impl Iterator<Item = (Family, ChainName)> {
    name.neighbours().into_iter().map(|name| (*family, name))
}

fn count(claims: usize) -> i64 {
    i64::try_from(claims).unwrap_or(i64::MAX)
}

/// A count after a change. Counts below zero would mean that a claim was removed twice.
fn moved(count: u32, delta: i64) -> u32 {
    let count = i64::from(count) + delta;
    debug_assert!(count >= 0, "a claim was removed that was never made");
    u32::try_from(count.max(0)).unwrap_or(u32::MAX)
}

fn step(left: Option<&Value>, came: Option<&Value>) -> i64 {
    i64::from(came.is_some()) - i64::from(left.is_some())
}

/// Walks two sorted lists and yields what differs: the element, its value before and after.
fn compare<'a>(
    before: &'a [(ElementId, Value)],
    after: &'a [(ElementId, Value)],
) -> impl Iterator<Item = (ElementId, Option<&'a Value>, Option<&'a Value>)> + 'a {
    let (mut before, mut after) = (before.iter().peekable(), after.iter().peekable());
    std::iter::from_fn(move || {
        loop {
            let order = match (before.peek(), after.peek()) {
                (None, None) => return None,
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some((left, _)), Some((came, _))) => left.cmp(came),
            };
            let left = if order.is_le() { before.next() } else { None };
            let came = if order.is_ge() { after.next() } else { None };
            let id = left.or(came)?.0;
            let (left, came) = (left.map(|(_, value)| value), came.map(|(_, value)| value));
            if left != came {
                return Some((id, left, came));
            }
        }
    })
}
