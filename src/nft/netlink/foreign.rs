//! Tables of others: what a take-over has to know of them, and the removal of what is in them.
//!
//! Of a foreign rule only its place and the chain it leads to matter, whatever else is in it: those are
//! plain attributes of a message, read and written here without libnftnl's objects. That covers what
//! `iptables-nft` makes, too, whose rules are full of expressions that only it can print.

use super::NetlinkKernel;
use super::batch::{Batch, message};
use super::encode::nfproto;
use crate::model::Family;
use crate::nft::kernel::{ApplyError, LoadError};
use crate::nft::names::TABLE;
use crate::nlmsg::{DUMP, HEADER, REQUEST, attributes, find, put, terminated};

/// A table of somebody else.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ForeignTable {
    /// Its family; those of tables for both or for other families are not listed.
    pub family: Family,
    /// Its name.
    pub name: String,
}

/// A chain in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForeignChain {
    /// Its name.
    pub name: String,
    /// Whether the kernel itself calls it.
    pub base: bool,
    /// Whether packets that reach its end are dropped.
    pub drops: bool,
    /// Rules that lead to other chains: the rule's handle, and the chain.
    pub jumps: Vec<(u64, String)>,
}

/// A removal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForeignOp {
    /// A whole table.
    DeleteTable(ForeignTable),
    /// One rule of a chain, by its handle.
    DeleteRule(ForeignTable, String, u64),
    /// All rules of a chain.
    FlushChain(ForeignTable, String),
    /// A chain that is empty and that nothing leads to.
    DeleteChain(ForeignTable, String),
}

impl ForeignOp {
    fn table(&self) -> &ForeignTable {
        match self {
            Self::DeleteTable(table)
            | Self::DeleteRule(table, ..)
            | Self::FlushChain(table, _)
            | Self::DeleteChain(table, _) => table,
        }
    }
}

// The attributes of tables, chains and rules as linux/netfilter/nf_tables.h numbers them.
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VERDICT: u16 = 2;
const VERDICT_CHAIN: u16 = 2;

/// `NF_DROP`
const DROP: u32 = 0;

impl NetlinkKernel {
    /// The tables of the families `ip` and `ip6`, ours among them.
    pub fn foreign_tables(&mut self) -> Result<Vec<ForeignTable>, LoadError> {
        let mut tables = Vec::new();
        for family in Family::BOTH {
            self.foreign(libc::NFT_MSG_GETTABLE, family, &[], "list tables", |content| {
                let name = text(content, TABLE_NAME).unwrap_or_default();
                tables.push(ForeignTable { family, name });
            })?;
        }
        Ok(tables)
    }

    /// The chains of a table with the rules that lead from one to another.
    pub fn foreign_chains(&mut self, table: &ForeignTable) -> Result<Vec<ForeignChain>, LoadError> {
        let mut chains: Vec<ForeignChain> = Vec::new();
        let family = table.family;
        self.foreign(libc::NFT_MSG_GETCHAIN, family, &[], "list chains", |content| {
            // A dump of chains is one of all tables.
            if text(content, CHAIN_TABLE).as_deref() == Some(&table.name) {
                chains.push(ForeignChain {
                    name: text(content, CHAIN_NAME).unwrap_or_default(),
                    base: find(content, CHAIN_HOOK).is_some(),
                    drops: find(content, CHAIN_POLICY) == Some(&DROP.to_be_bytes()),
                    jumps: Vec::new(),
                });
            }
        })?;
        chains.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut filter = Vec::new();
        put(&mut filter, RULE_TABLE, &terminated(&table.name));
        self.foreign(libc::NFT_MSG_GETRULE, family, &filter, "list rules", |content| {
            if text(content, RULE_TABLE).as_deref() != Some(&table.name) {
                return;
            }
            let chain = text(content, RULE_CHAIN).unwrap_or_default();
            let Ok(at) = chains.binary_search_by(|c| c.name.cmp(&chain)) else { return };
            let handle = find(content, RULE_HANDLE).and_then(|bytes| bytes.try_into().ok());
            let rule = handle.map_or(0, u64::from_be_bytes);
            let to = targets(find(content, RULE_EXPRESSIONS).unwrap_or_default());
            chains[at].jumps.extend(to.map(|target| (rule, target)));
        })?;
        Ok(chains)
    }

    /// Removes, all of it or nothing.
    pub fn remove_foreign(&mut self, ops: &[ForeignOp]) -> Result<(), ApplyError> {
        let mut batch = Batch::begin(TABLE, Vec::new());
        for (index, op) in ops.iter().enumerate() {
            let kind = match op {
                ForeignOp::DeleteTable(_) => libc::NFT_MSG_DELTABLE,
                ForeignOp::DeleteRule(..) | ForeignOp::FlushChain(..) => libc::NFT_MSG_DELRULE,
                ForeignOp::DeleteChain(..) => libc::NFT_MSG_DELCHAIN,
            };
            let mut message = batch.message(kind, nfproto(op.table().family), 0);
            match op {
                ForeignOp::DeleteTable(table) => message.string(TABLE_NAME, &table.name),
                ForeignOp::DeleteRule(table, chain, handle) => {
                    message.string(RULE_TABLE, &table.name);
                    message.string(RULE_CHAIN, chain);
                    message.attribute(RULE_HANDLE, &handle.to_be_bytes());
                }
                ForeignOp::FlushChain(table, chain) => {
                    message.string(RULE_TABLE, &table.name);
                    message.string(RULE_CHAIN, chain);
                }
                ForeignOp::DeleteChain(table, chain) => {
                    message.string(CHAIN_TABLE, &table.name);
                    message.string(CHAIN_NAME, chain);
                }
            }
            message.finish(Some(index), false);
        }
        super::send(&mut self.socket, &batch.finish())
    }

    /// Whether our table, whichever version made it, has a rule with this comment.
    pub fn has_rule(&mut self, family: Family, comment: &str) -> Result<bool, LoadError> {
        let mut found = false;
        let mut filter = Vec::new();
        put(&mut filter, RULE_TABLE, &terminated(TABLE));
        self.foreign(libc::NFT_MSG_GETRULE, family, &filter, "list rules", |content| {
            let ours = text(content, RULE_TABLE).as_deref() == Some(TABLE);
            let userdata = find(content, RULE_USERDATA).unwrap_or_default();
            let is_it = userdata.windows(comment.len()).any(|part| part == comment.as_bytes());
            found |= ours && is_it;
        })?;
        Ok(found)
    }

    fn foreign(
        &mut self,
        kind: libc::c_int,
        family: Family,
        body: &[u8],
        step: &'static str,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), LoadError> {
        let request = message(number(kind), REQUEST | DUMP, 1, nfproto(family), body);
        // What changes meanwhile is found out when it is removed.
        let outcome = self.socket.dump(&request, |message| {
            each(message.get(HEADER + 4..).unwrap_or_default());
        });
        outcome.map(|_| ()).map_err(|source| LoadError::Socket { step, source })
    }
}

fn number(kind: libc::c_int) -> u16 {
    u16::try_from(kind).expect("kinds of messages are small numbers")
}

fn text(content: &[u8], wanted: u16) -> Option<String> {
    let value = find(content, wanted)?;
    let text = value.strip_suffix(&[0]).unwrap_or(value);
    Some(String::from_utf8_lossy(text).into_owned())
}

/// The chains that a rule's expressions lead to: immediate verdicts, of which `iptables-nft` makes one.
fn targets(expressions: &[u8]) -> impl Iterator<Item = String> {
    attributes(expressions).filter_map(|(_, expression)| {
        text(expression, EXPRESSION_NAME).filter(|name| name == "immediate")?;
        let data = find(expression, EXPRESSION_DATA)?;
        let verdict = find(find(data, IMMEDIATE_DATA)?, DATA_VERDICT)?;
        text(verdict, VERDICT_CHAIN)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(kind: u16, content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put(&mut bytes, kind | 0x8000, content);
        bytes
    }

    #[test]
    fn the_chain_a_rule_leads_to_is_found_among_other_expressions() {
        let mut jump = nested(0, &[]);
        put(&mut jump, VERDICT_CHAIN, &terminated("KUBE-SERVICES"));
        let mut immediate = Vec::new();
        put(&mut immediate, 1, &terminated("immediate"));
        let data = nested(IMMEDIATE_DATA, &nested(DATA_VERDICT, &jump));
        immediate.extend(nested(EXPRESSION_DATA, &data));
        let mut counter = Vec::new();
        put(&mut counter, 1, &terminated("counter"));
        let expressions = [nested(1, &counter), nested(1, &immediate)].concat();
        assert_eq!(targets(&expressions).collect::<Vec<_>>(), ["KUBE-SERVICES"]);
        assert_eq!(targets(&expressions[..30]).count(), 0);
    }

    proptest::proptest! {
        #[test]
        fn any_expressions_are_read_to_an_end(bytes: Vec<u8>) {
            let _ = targets(&bytes).count();
            let _ = text(&bytes, CHAIN_NAME);
        }
    }
}
