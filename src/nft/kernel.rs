//! The boundary to the kernel: one trait with two implementations, the real one ([`super::netlink`])
//! and one in memory that refuses what the kernel would refuse ([`super::fake`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::dataplane::Options;
use super::element::{Backend, ElementId, Value};
use super::names::{AffinityName, SetName};
use super::transaction::Transaction;
use crate::model::Family;

/// What holds the tables.
pub trait Kernel {
    /// Reads back both tables, all of them or an error. `options` tell which rules a chain of ours should have.
    fn load(&mut self, options: &Options) -> Result<Loaded, LoadError>;

    /// Applies a transaction, all of it or nothing; then it forgets clients, which is repeated until it
    /// succeeds or is given up.
    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError>;

    /// The same for the table that stands in ([`super::diff::stand_in`]).
    fn apply_to_stand_in(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError>;

    /// Waits until every packet that is in a hook by now has left it: none of them may know what was just
    /// committed.
    fn let_packets_pass(&mut self);
}

/// What the kernel holds under our name; a family is absent if it has no table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// The tables that exist.
    pub tables: BTreeMap<Family, LoadedTable>,
    /// Where there is one that stands in.
    pub stand_ins: BTreeSet<Family>,
}

/// One table as found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadedTable {
    /// The table's comment; ours names the layout.
    pub comment: Option<String>,
    /// Whether it belongs to whom it should.
    pub ownership: Ownership,
    /// The sets and maps, by name.
    pub sets: BTreeMap<String, SetState>,
    /// The chains, by name.
    pub chains: BTreeMap<String, ChainState>,
    /// The elements of our sets.
    pub elements: BTreeMap<ElementId, Value>,
    /// The affinity maps, and the backends that clients are held to in each.
    pub affinities: BTreeMap<AffinityName, BTreeSet<Backend>>,
}

/// Whether the kernel lets others change a table, and whether that is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ownership {
    /// As wanted.
    #[default]
    Right,
    /// It is to be owned, and can be: a former owner left it behind. Adding it again does that.
    Claimable,
    /// It is to be owned, which the kernel allows for a new table only.
    Never,
}

/// How a set of the kernel compares with ours of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetState {
    /// Same key and data, and every element was understood.
    Same,
    /// Another definition, or an element that is not one of ours.
    Differs,
    /// We have no set of that name.
    Unknown,
}

/// How a chain of the kernel compares with ours of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainState {
    /// Same attachment and rules.
    Same,
    /// Same attachment, other rules.
    RulesDiffer,
    /// Attached elsewhere or not at all.
    BaseDiffers,
    /// We have no chain of that name.
    Unknown,
}

/// What a successful commit took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Netlink messages sent.
    pub messages: usize,
    /// Their bytes.
    pub bytes: usize,
}

impl std::ops::Add for Applied {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { messages: self.messages + other.messages, bytes: self.bytes + other.bytes }
    }
}

/// A transaction that did not take effect.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The kernel refused operations; nothing was applied.
    #[error("{} refused by the kernel, first: {}", count(refusals.len()), refusals[0])]
    Refused {
        /// What was refused and why, in the order of the transaction; never empty.
        refusals: Vec<Refusal>,
    },
    /// The batch could not be handed over, or its answer not be read.
    #[error("cannot {step}: {source}")]
    Socket {
        /// What was being done.
        step: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl ApplyError {
    /// Whether everything that was refused was so for this reason.
    #[must_use]
    pub fn is(&self, errno: i32) -> bool {
        let Self::Refused { refusals } = self else { return false };
        refusals.iter().all(|refusal| refusal.errno == errno)
    }
}

fn count(n: usize) -> String {
    if n == 1 { "an operation was".into() } else { format!("{n} operations were") }
}

/// One refused operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Index in the transaction, if the kernel's answer names one.
    pub op: Option<usize>,
    /// The error number.
    pub errno: i32,
    /// The kernel's own words (extended ack), if it had any.
    pub message: Option<String>,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", io::Error::from_raw_os_error(self.errno))?;
        if let Some(message) = &self.message {
            write!(f, ": {message}")?;
        }
        if let Some(op) = self.op {
            write!(f, " (operation {op})")?;
        }
        Ok(())
    }
}

/// The tables could not be read back.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A request could not be sent or its answer not be received.
    #[error("cannot {step}: {source}")]
    Socket {
        /// What was being done.
        step: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The ruleset changed at every attempt to read it.
    #[error("the ruleset kept changing while it was read ({attempts} attempts)")]
    Unstable {
        /// How often it was tried.
        attempts: u32,
    },
    /// Elements of a set came twice at every attempt, so that others may be missing.
    #[error(
        "the kernel kept moving the elements of the {family} map {set} while they were read ({attempts} attempts)"
    )]
    Moving {
        /// Whose table.
        family: Family,
        /// The set or map.
        set: SetName,
        /// How often it was tried.
        attempts: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_in_one_line() {
        let refusal = |op, message: Option<&str>| Refusal {
            op,
            errno: libc::ENOENT,
            message: message.map(str::to_owned),
        };
        let one = ApplyError::Refused { refusals: vec![refusal(None, None)] };
        let why = "No such file or directory (os error 2)";
        assert_eq!(
            one.to_string(),
            format!("an operation was refused by the kernel, first: {why}")
        );
        let refusals = vec![refusal(Some(3), Some("no set")), refusal(Some(4), None)];
        let two = ApplyError::Refused { refusals };
        assert_eq!(
            two.to_string(),
            format!("2 operations were refused by the kernel, first: {why}: no set (operation 3)")
        );
        assert!(two.is(libc::ENOENT) && !two.is(libc::EBUSY));
    }
}
