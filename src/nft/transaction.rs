//! An ordered list of operations that the kernel takes as one: all of it, or nothing.
//!
//! The order within is what the kernel's references ask for: sets and chains before rules, rules and
//! chains before the elements that go to them, removals of elements before additions (a map element
//! cannot change its value, only be replaced), and chains last to go, with the maps they look into
//! behind them.

use super::dataplane::{self, Options};
use super::element::{Backend, ElementId, Value};
use super::names::{AffinityName, ChainName, SetName};
use super::rule::Chain;
use crate::model::Family;

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Creates the table of a family.
    AddTable(Family),
    /// Removes the table of a family with everything in it.
    DeleteTable(Family),
    /// Creates a set or map.
    AddSet(Family, SetName),
    /// Creates an affinity map, empty.
    AddAffinity(Family, AffinityName),
    /// Removes an affinity map that nothing refers to, with all clients in it.
    DeleteAffinity(Family, AffinityName),
    /// Forgets the clients of an affinity map that are held to other backends than these (sorted).
    /// Packets fill the map meanwhile, so this alone is done when everything else is in force.
    Forget(Family, AffinityName, Box<[Backend]>),
    /// Creates the set that counts connections, empty.
    AddCounters(Family),
    /// Removes it, when nothing refers to it any more.
    DeleteCounters(Family),
    /// Declares a chain, still empty.
    AddChain(Family, Box<Chain>),
    /// Appends all rules of a chain.
    AddRules(Family, Box<Chain>),
    /// Removes all rules of a chain.
    FlushChain(Family, String),
    /// Removes an empty chain that nothing refers to.
    DeleteChain(Family, String),
    /// Adds an element.
    AddElement(ElementId, Value),
    /// Removes an element, which had this value.
    DeleteElement(ElementId, Value),
}

impl Op {
    /// Whether something goes by it, rather than comes.
    #[must_use]
    pub fn removes(&self) -> bool {
        match self {
            Self::AddTable(_)
            | Self::AddSet(..)
            | Self::AddAffinity(..)
            | Self::AddCounters(_)
            | Self::AddChain(..)
            | Self::AddRules(..)
            | Self::AddElement(..) => false,
            Self::DeleteTable(_)
            | Self::DeleteAffinity(..)
            | Self::Forget(..)
            | Self::DeleteCounters(_)
            | Self::FlushChain(..)
            | Self::DeleteChain(..)
            | Self::DeleteElement(..) => true,
        }
    }
}

/// Operations in the order they are sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// The operations.
    pub ops: Vec<Op>,
}

impl Transaction {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Declares chains and then fills them, so that they may refer to each other.
    pub(crate) fn add_chains(
        &mut self,
        chains: impl Iterator<Item = (Family, ChainName)> + Clone,
        options: &Options,
    ) {
        let chain = |name, family| Box::new(dataplane::chain(name, family, options));
        let built = chains.map(|(family, name)| (family, chain(name, family)));
        self.ops.extend(built.clone().map(|(family, chain)| Op::AddChain(family, chain)));
        self.ops.extend(built.map(|(family, chain)| Op::AddRules(family, chain)));
    }

    /// Removes what is no longer wanted or is to be another, then adds what is new.
    pub(crate) fn change_elements(&mut self, changes: &[(ElementId, Change)]) {
        let from = |(id, change): &(ElementId, Change)| Some((*id, change.from.clone()?));
        let to = |(id, change): &(ElementId, Change)| Some((*id, change.to.clone()?));
        let removed = changes.iter().filter_map(from);
        self.ops.extend(removed.map(|(id, value)| Op::DeleteElement(id, value)));
        let added = changes.iter().filter_map(to);
        self.ops.extend(added.map(|(id, value)| Op::AddElement(id, value)));
    }

    /// Empties chains, then removes them: they may refer to each other until then.
    pub(crate) fn delete_chains(&mut self, chains: impl Iterator<Item = (Family, String)> + Clone) {
        self.ops.extend(chains.clone().map(|(family, name)| Op::FlushChain(family, name)));
        self.ops.extend(chains.map(|(family, name)| Op::DeleteChain(family, name)));
    }
}

/// What an element was and is to be, which is another; None where it does not exist.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// In the kernel.
    pub from: Option<Value>,
    /// Wanted.
    pub to: Option<Value>,
}
