//! A kernel in memory, for tests: it keeps the tables as typed values and refuses what the real one
//! would refuse, with the same error numbers. Property tests run thousands of transactions on it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;

use super::dataplane::{self, Options};
use super::element::{Backend, ElementId, Value};
use super::kernel::{
    Applied, ApplyError, ChainState, Kernel, LoadError, Loaded, LoadedTable, Ownership, Refusal,
    SetState,
};
use super::names::{AffinityName, CONNECTIONS, LAYOUT, SetName};
use super::rule::{Chain, Rule, Statement};
use super::transaction::{Op, Transaction};
use crate::model::Family;

/// One family's table.
#[derive(Clone, Debug, Default, PartialEq)]
struct Table {
    /// Whether it is of another layout.
    foreign: bool,
    sets: BTreeSet<SetName>,
    chains: BTreeMap<String, (Chain, Vec<Rule>)>,
    elements: BTreeMap<ElementId, Value>,
    /// The backends that clients are held to.
    affinities: BTreeMap<AffinityName, BTreeSet<Backend>>,
    /// Whether it has the set that counts connections.
    counters: bool,
}

/// A kernel that holds nothing but our tables.
#[derive(Clone, Debug, Default)]
pub struct FakeKernel {
    tables: BTreeMap<Family, Table>,
    /// Those that stand in.
    stand_ins: BTreeMap<Family, Table>,
    /// Every transaction that was applied, in order.
    pub applied: Vec<Transaction>,
    /// How the next transactions fail.
    pub fail: Vec<Failure>,
    /// Errors to answer the next readings with.
    pub fail_load: Vec<i32>,
}

/// A failure that has nothing to do with what is asked for; each with its error number.
#[derive(Clone, Copy, Debug)]
pub enum Failure {
    /// The operation with this index is refused, and all others with it.
    Refuse(usize, i32),
    /// The transaction does not get to the kernel.
    Send(i32),
    /// It is applied, but the answer is lost.
    Answer(i32),
}

impl FakeKernel {
    /// Everything that is held, as text, for comparisons that a person can read.
    #[must_use]
    pub fn dump(&self) -> String {
        let mut text = String::new();
        for (family, table) in &self.tables {
            for (name, (chain, rules)) in &table.chains {
                let _ = writeln!(text, "{family} chain {name} {:?} {rules:?}", chain.base);
            }
            for (id, value) in &table.elements {
                let _ = writeln!(text, "{id} : {value}");
            }
            for (name, held) in &table.affinities {
                let _ = writeln!(text, "{family} map {name}: {held:?}");
            }
        }
        text
    }

    /// The elements held.
    pub fn elements(&self) -> impl Iterator<Item = (&ElementId, &Value)> {
        self.tables.values().flat_map(|table| &table.elements)
    }

    /// Takes an element away behind the program's back.
    pub fn tamper(&mut self, id: &ElementId) -> bool {
        self.tables.get_mut(&id.family).is_some_and(|table| table.elements.remove(id).is_some())
    }

    /// Makes the tables those of another layout.
    pub fn estrange(&mut self) {
        self.tables.values_mut().for_each(|table| table.foreign = true);
    }

    /// The elements that tables hold which stand in.
    pub fn elements_of_stand_ins(&self) -> impl Iterator<Item = (&ElementId, &Value)> {
        self.stand_ins.values().flat_map(|table| &table.elements)
    }

    /// Holds a client to a backend, as a packet would.
    pub fn remember(&mut self, family: Family, name: &AffinityName, backend: Backend) -> bool {
        let table = self.tables.get_mut(&family);
        table.and_then(|t| t.affinities.get_mut(name)).is_some_and(|held| held.insert(backend))
    }

    fn perform(tables: &mut BTreeMap<Family, Table>, op: &Op) -> Result<(), i32> {
        match op {
            Op::AddTable(family) => {
                tables.entry(*family).or_default();
                Ok(())
            }
            Op::DeleteTable(family) => tables.remove(family).map(drop).ok_or(libc::ENOENT),
            Op::AddSet(family, set) => {
                let table = tables.get_mut(family).ok_or(libc::ENOENT)?;
                table.sets.insert(*set).then_some(()).ok_or(libc::EEXIST)
            }
            Op::AddAffinity(family, name) => {
                let table = tables.get_mut(family).ok_or(libc::ENOENT)?;
                match table.affinities.insert(name.clone(), BTreeSet::new()) {
                    None => Ok(()),
                    Some(_) => Err(libc::EEXIST),
                }
            }
            Op::DeleteAffinity(family, name) => {
                let table = tables.get_mut(family).ok_or(libc::ENOENT)?;
                if table.looks_into(name) {
                    return Err(libc::EBUSY);
                }
                table.affinities.remove(name).map(drop).ok_or(libc::ENOENT)
            }
            Op::AddCounters(family) => {
                let table = tables.get_mut(family).ok_or(libc::ENOENT)?;
                let had = std::mem::replace(&mut table.counters, true);
                if had { Err(libc::EEXIST) } else { Ok(()) }
            }
            Op::DeleteCounters(family) => {
                let table = tables.get_mut(family).ok_or(libc::ENOENT)?;
                if table.counts() {
                    return Err(libc::EBUSY);
                }
                let had = std::mem::replace(&mut table.counters, false);
                if had { Ok(()) } else { Err(libc::ENOENT) }
            }
            Op::Forget(family, name, keep) => {
                let table = tables.get_mut(family).ok_or(libc::ENOENT)?;
                let held = table.affinities.get_mut(name).ok_or(libc::ENOENT)?;
                held.retain(|backend| keep.binary_search(backend).is_ok());
                Ok(())
            }
            Op::AddChain(family, chain) => {
                let table = tables.get_mut(family).ok_or(libc::ENOENT)?;
                let empty = (Chain { rules: Vec::new(), ..(**chain).clone() }, Vec::new());
                match table.chains.insert(chain.name.to_string(), empty) {
                    None => Ok(()),
                    Some(_) => Err(libc::EEXIST),
                }
            }
            Op::AddRules(family, chain) => {
                let table = tables.get_mut(family).ok_or(libc::ENOENT)?;
                for rule in &chain.rules {
                    table.resolves(rule)?;
                }
                let name = chain.name.to_string();
                let (_, rules) = table.chains.get_mut(&name).ok_or(libc::ENOENT)?;
                rules.extend(chain.rules.iter().cloned());
                Ok(())
            }
            Op::FlushChain(family, name) => {
                let table = tables.get_mut(family).ok_or(libc::ENOENT)?;
                table.chains.get_mut(name).ok_or(libc::ENOENT)?.1.clear();
                Ok(())
            }
            Op::DeleteChain(family, name) => {
                let table = tables.get_mut(family).ok_or(libc::ENOENT)?;
                let (_, rules) = table.chains.get(name).ok_or(libc::ENOENT)?;
                if !rules.is_empty() || table.refers_to(name) {
                    return Err(libc::EBUSY);
                }
                table.chains.remove(name);
                Ok(())
            }
            Op::AddElement(id, value) => {
                let table = tables.get_mut(&id.family).ok_or(libc::ENOENT)?;
                if !table.sets.contains(&id.set) {
                    return Err(libc::ENOENT);
                }
                if let Value::Goto(chain) | Value::Jump(chain) = value
                    && !table.chains.contains_key(&chain.to_string())
                {
                    return Err(libc::ENOENT);
                }
                match table.elements.insert(*id, value.clone()) {
                    Some(old) if old != *value => Err(libc::EEXIST),
                    _ => Ok(()),
                }
            }
            Op::DeleteElement(id, _) => {
                let table = tables.get_mut(&id.family).ok_or(libc::ENOENT)?;
                table.elements.remove(id).map(drop).ok_or(libc::ENOENT)
            }
        }
    }
}

impl Table {
    /// Every set and chain a rule names must exist.
    fn resolves(&self, rule: &Rule) -> Result<(), i32> {
        let found = rule.statements.iter().all(|statement| match statement {
            Statement::In(_, set)
            | Statement::NotIn(_, set)
            | Statement::Vmap(_, set)
            | Statement::Dnat(_, set) => self.sets.contains(set),
            Statement::Jump(chain) | Statement::Goto(chain) => {
                self.chains.contains_key(&chain.to_string())
            }
            Statement::DnatSticky(name) | Statement::Remember(name, _) => {
                self.affinities.contains_key(name)
            }
            Statement::Count => self.counters,
            _ => true,
        });
        found.then_some(()).ok_or(libc::ENOENT)
    }

    fn looks_into(&self, affinity: &AffinityName) -> bool {
        let mut rules = self.chains.values().flat_map(|(_, rules)| rules);
        rules.any(|rule| {
            rule.statements.iter().any(|statement| match statement {
                Statement::DnatSticky(name) | Statement::Remember(name, _) => name == affinity,
                _ => false,
            })
        })
    }

    fn counts(&self) -> bool {
        let mut rules = self.chains.values().flat_map(|(_, rules)| rules);
        rules.any(|rule| rule.statements.contains(&Statement::Count))
    }

    fn refers_to(&self, name: &str) -> bool {
        let by_rule = self.chains.values().flat_map(|(_, rules)| rules).any(|rule| {
            rule.statements.iter().any(|statement| match statement {
                Statement::Jump(chain) | Statement::Goto(chain) => chain.to_string() == name,
                _ => false,
            })
        });
        by_rule
            || self
                .elements
                .values()
                .any(|value| matches!(value, Value::Goto(chain) | Value::Jump(chain) if chain.to_string() == name))
    }
}

impl Kernel for FakeKernel {
    fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
        if !self.fail_load.is_empty() {
            let source = io::Error::from_raw_os_error(self.fail_load.remove(0));
            return Err(LoadError::Socket { step: "receive the tables", source });
        }
        let mut loaded = Loaded::default();
        for (&family, table) in &self.tables {
            let chains = table.chains.iter().map(|(name, (chain, rules))| {
                let wanted = dataplane::chain(chain.name.clone(), family, options);
                let state = if wanted.base != chain.base {
                    ChainState::BaseDiffers
                } else if wanted.rules == *rules {
                    ChainState::Same
                } else {
                    ChainState::RulesDiffer
                };
                (name.clone(), state)
            });
            let table = LoadedTable {
                comment: (!table.foreign).then(|| LAYOUT.into()),
                ownership: Ownership::Right,
                sets: table
                    .sets
                    .iter()
                    .map(ToString::to_string)
                    .chain(table.counters.then(|| CONNECTIONS.to_owned()))
                    .map(|name| (name, SetState::Same))
                    .collect(),
                affinities: table.affinities.clone(),
                chains: chains.collect(),
                elements: table.elements.clone(),
            };
            loaded.tables.insert(family, table);
        }
        loaded.stand_ins = self.stand_ins.keys().copied().collect();
        Ok(loaded)
    }

    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.commit(transaction, |kernel| &mut kernel.tables)
    }

    fn apply_to_stand_in(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.commit(transaction, |kernel| &mut kernel.stand_ins)
    }

    fn let_packets_pass(&mut self) {}
}

impl FakeKernel {
    fn commit(
        &mut self,
        transaction: &Transaction,
        tables_of: impl Fn(&mut Self) -> &mut BTreeMap<Family, Table>,
    ) -> Result<Applied, ApplyError> {
        let failure = (!self.fail.is_empty()).then(|| self.fail.remove(0));
        let broken = |step, errno| {
            Err(ApplyError::Socket { step, source: io::Error::from_raw_os_error(errno) })
        };
        match failure {
            Some(Failure::Refuse(op, errno)) => {
                let refusals = vec![Refusal { op: Some(op), errno, message: None }];
                return Err(ApplyError::Refused { refusals });
            }
            Some(Failure::Send(errno)) => return broken("send the batch", errno),
            Some(Failure::Answer(_)) | None => {}
        }
        let mut tables = tables_of(self).clone();
        let refused = transaction.ops.iter().enumerate().filter_map(|(index, op)| {
            let errno = Self::perform(&mut tables, op).err()?;
            Some(Refusal { op: Some(index), errno, message: None })
        });
        let refusals: Vec<_> = refused.collect();
        if !refusals.is_empty() {
            return Err(ApplyError::Refused { refusals });
        }
        *tables_of(self) = tables;
        self.applied.push(transaction.clone());
        if let Some(Failure::Answer(errno)) = failure {
            return broken("receive the answer", errno);
        }
        Ok(Applied { messages: transaction.ops.len(), bytes: 0 })
    }
}
