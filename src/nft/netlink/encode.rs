//! A transaction as netlink messages.

use std::fmt::Write as _;

use nftnl::nftnl_sys as sys;
use nftnl::{ChainType, Hook, MsgType, Policy, ProtoFamily};

use super::affinity;
use super::batch::{Batch, Message};
use super::ffi::{Set, Table, c_string};
use super::lower::lower;
use super::{connections, userdata};
use crate::model::Family;
use crate::nft::element::{Bytes, ElementId, Key, Value, data_len, key_len};
use crate::nft::names::{ChainName, DataType, KeyField, LAYOUT, SetName};
use crate::nft::rule::{self, BaseKind, Chain};
use crate::nft::transaction::{Op, Transaction};

/// The most that the elements of one message take: their list is an attribute, whose length is 16 bits.
const ELEMENTS: usize = 65_000;

/// The most that an element takes: a key of 56 bytes, the name of a chain and the headers around them.
const ELEMENT: usize = 400;

const DATA_TYPE_VERDICT: u32 = 0xffff_ff00;

/// Adds every operation to a batch that was begun; tables that it adds have these flags.
pub(super) fn batch(transaction: &Transaction, mut batch: Batch, table_flags: u32) -> Batch {
    let mut ops = transaction.ops.as_slice();
    while let Some((op, others)) = ops.split_first() {
        let index = transaction.ops.len() - ops.len();
        let mut later = others;
        match op {
            Op::AddTable(family) => add_table(&mut batch, index, *family, table_flags),
            Op::DeleteTable(family) => {
                let table = table(&batch, *family);
                batch.add(index, &table, MsgType::Del);
            }
            Op::AddSet(family, set) => add_set(&mut batch, index, *family, *set),
            Op::AddAffinity(family, name) => affinity::add(&mut batch, index, *family, name),
            Op::DeleteAffinity(family, name) => affinity::delete(&mut batch, index, *family, name),
            Op::AddCounters(family) => connections::add(&mut batch, index, *family),
            Op::DeleteCounters(family) => connections::delete(&mut batch, index, *family),
            // Done when the rest is in force.
            Op::Forget(..) => {}
            Op::AddChain(family, chain) => add_chain(&mut batch, index, *family, chain),
            Op::AddRules(family, chain) => add_rules(&mut batch, index, *family, chain),
            Op::FlushChain(family, name) => {
                let table = table(&batch, *family);
                let chain = nftnl::Chain::new(c_string(name), &table);
                // A removal that names no rule removes all of the chain.
                batch.add(index, &nftnl::Rule::new(&chain), MsgType::Del);
            }
            Op::DeleteChain(family, name) => {
                let table = table(&batch, *family);
                batch.add(index, &nftnl::Chain::new(c_string(name), &table), MsgType::Del);
            }
            Op::AddElement(..) | Op::DeleteElement(..) => {
                let sent = elements(&mut batch, index, ops);
                later = &ops[sent..];
            }
        }
        ops = later;
    }
    batch
}

/// nf_tables' number of a family.
pub(super) fn nfproto(family: Family) -> u16 {
    proto_family(family) as u16
}

fn proto_family(family: Family) -> ProtoFamily {
    match family {
        Family::V4 => ProtoFamily::Ipv4,
        Family::V6 => ProtoFamily::Ipv6,
    }
}

/// The table that a batch is about.
fn table(batch: &Batch, family: Family) -> nftnl::Table {
    nftnl::Table::new(c_string(batch.table), proto_family(family))
}

fn add_table(batch: &mut Batch, index: usize, family: Family, flags: u32) {
    let mut table = Table::new();
    table.set_str(sys::NFTNL_TABLE_NAME, batch.table);
    table.set_u32(sys::NFTNL_TABLE_FLAGS, flags);
    table.set_data(sys::NFTNL_TABLE_USERDATA, &userdata::table(LAYOUT));
    batch.write(Some(index), |room, sequence| {
        let kind = libc::NFT_MSG_NEWTABLE;
        table.build(room.header(kind, nfproto(family), libc::NLM_F_CREATE, sequence));
    });
}

/// The kernel's flags of a set.
pub(super) fn set_flags(set: SetName) -> u32 {
    let map = if set.data() == DataType::None { 0 } else { libc::NFT_SET_MAP };
    let interval = if set.is_interval() { libc::NFT_SET_INTERVAL } else { 0 };
    (map | interval).cast_unsigned()
}

/// nft's numbers of data types (`enum datatypes`), packed six bits each for a concatenation.
pub(super) fn data_type(fields: &[KeyField], family: Family) -> u32 {
    fields.iter().fold(0, |packed, field| {
        let number = match (field, family) {
            (KeyField::Slot, _) => 4,
            (KeyField::Address, Family::V4) => 7,
            (KeyField::Address, Family::V6) => 8,
            (KeyField::Protocol, _) => 12,
            (KeyField::Port, _) => 13,
        };
        packed << 6 | number
    })
}

fn add_set(batch: &mut Batch, index: usize, family: Family, name: SetName) {
    let mut set = Set::new();
    set.set_str(sys::NFTNL_SET_TABLE, batch.table);
    set.set_str(sys::NFTNL_SET_NAME, name.as_str());
    // Named sets are referred to by name; the number only has to be there.
    set.set_u32(sys::NFTNL_SET_ID, index.try_into().unwrap_or(u32::MAX));
    set.set_u32(sys::NFTNL_SET_FLAGS, set_flags(name));
    set.set_u32(sys::NFTNL_SET_KEY_TYPE, data_type(name.key(), family));
    set.set_u32(sys::NFTNL_SET_KEY_LEN, key_len(family, name));
    match name.data() {
        DataType::None => {}
        DataType::Verdict => set.set_u32(sys::NFTNL_SET_DATA_TYPE, DATA_TYPE_VERDICT),
        DataType::Backend => {
            let fields = [KeyField::Address, KeyField::Port];
            set.set_u32(sys::NFTNL_SET_DATA_TYPE, data_type(&fields, family));
            set.set_u32(sys::NFTNL_SET_DATA_LEN, data_len(family, name));
        }
    }
    set.set_data(sys::NFTNL_SET_USERDATA, &userdata::set(name, family));
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    set_message(batch, index, family, set, libc::NFT_MSG_NEWSET, flags);
}

/// A message about a set or map.
pub(super) fn set_message(
    batch: &mut Batch,
    index: usize,
    family: Family,
    mut set: Set,
    kind: libc::c_int,
    flags: libc::c_int,
) {
    batch.write(Some(index), |room, sequence| {
        set.build(room.header(kind, nfproto(family), flags, sequence));
    });
}

/// nftnl's number of a hook.
pub(super) fn hook(hook: rule::Hook) -> Hook {
    match hook {
        rule::Hook::Prerouting => Hook::PreRouting,
        rule::Hook::Input => Hook::In,
        rule::Hook::Forward => Hook::Forward,
        rule::Hook::Output => Hook::Out,
        rule::Hook::Postrouting => Hook::PostRouting,
    }
}

fn add_chain(batch: &mut Batch, index: usize, family: Family, chain: &Chain) {
    let table = table(batch, family);
    let mut message = nftnl::Chain::new(c_string(&chain.name.to_string()), &table);
    if let Some(base) = chain.base {
        message.set_hook(hook(base.hook), base.priority);
        message.set_policy(Policy::Accept);
        message.set_type(match base.kind {
            BaseKind::Filter => ChainType::Filter,
            BaseKind::Nat => ChainType::Nat,
        });
    }
    batch.add(index, &message, MsgType::Add);
}

fn add_rules(batch: &mut Batch, index: usize, family: Family, chain: &Chain) {
    let table = table(batch, family);
    let parent = nftnl::Chain::new(c_string(&chain.name.to_string()), &table);
    for rule in &chain.rules {
        let mut message = nftnl::Rule::new(&parent);
        for instruction in lower(rule, family) {
            message.add_expr(&instruction);
        }
        if let Some(comment) = rule.comment {
            message.set_comment(c_string(comment)).expect("comments are at most 128 bytes");
        }
        batch.add(index, &message, MsgType::Add);
    }
}

/// A change of an element: its key, and the value it gets; None if it is removed.
fn change(op: &Op) -> Option<(&ElementId, Option<&Value>)> {
    match op {
        Op::AddElement(id, value) => Some((id, Some(value))),
        Op::DeleteElement(id, _) => Some((id, None)),
        _ => None,
    }
}

/// Whether two changes go into one message. Ranges do not: each is two elements, and an answer must
/// lead back to one operation.
fn joins(
    (first, value): (&ElementId, Option<&Value>),
    (next, other): (&ElementId, Option<&Value>),
) -> bool {
    (first.family, first.set) == (next.family, next.set)
        && value.is_some() == other.is_some()
        && !matches!(first.key, Key::Range(..))
}

/// The changes of elements from the first operation on that go into one message. Returns how many.
///
/// Almost all of what is ever sent are elements, and a first batch has hundreds of thousands of them, so
/// they are written straight into it: libnftnl would allocate each three times.
fn elements(batch: &mut Batch, index: usize, ops: &[Op]) -> usize {
    let Some(first) = ops.first().and_then(change) else { return 1 };
    let (id, value) = first;
    let (kind, flags) = match value {
        Some(_) => (libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE),
        None => (libc::NFT_MSG_DELSETELEM, 0),
    };
    let mut name = Text::default();
    let mut sent = 0;
    let table = batch.table;
    let mut message = batch.message(kind, nfproto(id.family), flags);
    message.string(attribute::LIST_SET, id.set.as_str());
    message.string(attribute::LIST_TABLE, table);
    let list = message.nest(attribute::LIST_ELEMENTS);
    for change in ops.iter().map_while(change) {
        let fits = || message.len_of(&list) + ELEMENT <= ELEMENTS;
        if sent > 0 && !(joins(first, change) && fits()) {
            break;
        }
        element(&mut message, change, &mut name);
        sent += 1;
    }
    message.end(list);
    message.finish(Some(index), sent > 1);
    sent
}

/// Attributes of messages about elements: `enum nft_set_elem_list_attributes` and the enumerations
/// below it.
mod attribute {
    pub(super) const LIST_TABLE: u16 = 1;
    pub(super) const LIST_SET: u16 = 2;
    pub(super) const LIST_ELEMENTS: u16 = 3;
    pub(super) const LIST_ELEMENT: u16 = 1;
    pub(super) const KEY: u16 = 1;
    pub(super) const DATA: u16 = 2;
    pub(super) const FLAGS: u16 = 3;
    pub(super) const VALUE: u16 = 1;
    pub(super) const VERDICT: u16 = 2;
    pub(super) const VERDICT_CODE: u16 = 1;
    pub(super) const VERDICT_CHAIN: u16 = 2;
}

fn element(message: &mut Message<'_>, (id, value): (&ElementId, Option<&Value>), name: &mut Text) {
    let entry = message.nest(attribute::LIST_ELEMENT);
    data(message, attribute::KEY, &id.key.bytes());
    match value {
        None | Some(Value::None) => {}
        Some(Value::Goto(chain)) => verdict(message, libc::NFT_GOTO, name.of(chain)),
        Some(Value::Jump(chain)) => verdict(message, libc::NFT_JUMP, name.of(chain)),
        Some(Value::Drop) => verdict(message, libc::NF_DROP, ""),
        Some(Value::Backend(backend)) => data(message, attribute::DATA, &backend.bytes()),
    }
    message.end(entry);
    if let Some(end) = id.key.range_end() {
        let entry = message.nest(attribute::LIST_ELEMENT);
        let flag = libc::NFT_SET_ELEM_INTERVAL_END.cast_unsigned();
        message.attribute(attribute::FLAGS, &flag.to_be_bytes());
        data(message, attribute::KEY, &end);
        message.end(entry);
    }
}

fn data(message: &mut Message<'_>, kind: u16, bytes: &Bytes) {
    let nest = message.nest(kind);
    message.attribute(attribute::VALUE, bytes.as_slice());
    message.end(nest);
}

fn verdict(message: &mut Message<'_>, code: libc::c_int, chain: &str) {
    let data = message.nest(attribute::DATA);
    let verdict = message.nest(attribute::VERDICT);
    message.attribute(attribute::VERDICT_CODE, &code.cast_unsigned().to_be_bytes());
    if !chain.is_empty() {
        message.string(attribute::VERDICT_CHAIN, chain);
    }
    message.end(verdict);
    message.end(data);
}

/// The name of a chain as text: written once for the many elements in a row that go to the same one.
#[derive(Default)]
struct Text {
    chain: Option<ChainName>,
    text: String,
}

impl Text {
    fn of(&mut self, chain: &ChainName) -> &str {
        if self.chain.as_ref() != Some(chain) {
            self.text.clear();
            let _ = write!(self.text, "{chain}"); // a string takes everything
            self.chain = Some(chain.clone());
        }
        &self.text
    }
}

/// A message that removes elements of a set, which fit one message.
pub(super) fn delete_keys<'a>(
    batch: &mut Batch,
    family: Family,
    set: &str,
    keys: impl IntoIterator<Item = &'a [u8]>,
) {
    let table = batch.table;
    let mut message = batch.message(libc::NFT_MSG_DELSETELEM, nfproto(family), 0);
    message.string(attribute::LIST_SET, set);
    message.string(attribute::LIST_TABLE, table);
    let list = message.nest(attribute::LIST_ELEMENTS);
    for key in keys {
        let entry = message.nest(attribute::LIST_ELEMENT);
        let nest = message.nest(attribute::KEY);
        message.attribute(attribute::VALUE, key);
        message.end(nest);
        message.end(entry);
    }
    message.end(list);
    message.finish(None, false);
}
