//! A transaction as netlink messages.

use nftnl::nftnl_sys as sys;
use nftnl::{ChainType, Hook, MsgType, Policy, ProtoFamily};

use super::affinity;
use super::batch::Batch;
use super::ffi::{self, Element, Set, Table, c_string};
use super::instruction::lower;
use super::userdata;
use crate::model::Family;
use crate::nft::element::{ElementId, Key, Value, data_len, key_len};
use crate::nft::names::{DataType, KeyField, LAYOUT, SetName, TABLE};
use crate::nft::rule::{self, BaseKind, Chain};
use crate::nft::transaction::{Op, Transaction};

/// Bytes of elements in one message. Their list is an attribute, so at most 64 KiB.
const ELEMENTS: usize = 60_000;

/// The most that an element takes: two keys of 40 bytes, data or the name of a shared chain, and the
/// headers around them. The name of a Service port comes on top.
const ELEMENT: usize = 200;

/// The kernel's flag of sets with keys of several fields (`NFT_SET_CONCAT`); only where those are
/// ranges it makes a difference.
const CONCAT: u32 = 0x80;

const DATA_TYPE_VERDICT: u32 = 0xffff_ff00;

/// Adds every operation to a batch that was begun; tables that it adds have these flags.
pub(super) fn batch(transaction: &Transaction, mut batch: Batch, table_flags: u32) -> Batch {
    let mut ops = transaction.ops.as_slice();
    while let Some(op) = ops.first() {
        let index = transaction.ops.len() - ops.len();
        let run = run(op, ops);
        let (now, later) = ops.split_at(run);
        ops = later;
        match op {
            Op::AddTable(family) => add_table(&mut batch, index, *family, table_flags),
            Op::DeleteTable(family) => batch.add(index, &table(*family), MsgType::Del),
            Op::AddSet(family, set) => add_set(&mut batch, index, *family, *set),
            Op::AddAffinity(family, name) => affinity::add(&mut batch, index, *family, name),
            Op::DeleteAffinity(family, name) => affinity::delete(&mut batch, index, *family, name),
            // Done when the rest is in force.
            Op::Forget(..) => {}
            Op::AddChain(family, chain) => add_chain(&mut batch, index, *family, chain),
            Op::AddRules(family, chain) => add_rules(&mut batch, index, *family, chain),
            Op::FlushChain(family, name) => {
                let table = table(*family);
                let chain = nftnl::Chain::new(c_string(name), &table);
                // A removal that names no rule removes all of the chain.
                batch.add(index, &nftnl::Rule::new(&chain), MsgType::Del);
            }
            Op::DeleteChain(family, name) => {
                let table = table(*family);
                batch.add(index, &nftnl::Chain::new(c_string(name), &table), MsgType::Del);
            }
            Op::AddElement(id, _) => elements(&mut batch, index, *id, now, true),
            Op::DeleteElement(id, _) => elements(&mut batch, index, *id, now, false),
        }
    }
    batch
}

/// How many operations from the first on go into its message.
fn run(op: &Op, ops: &[Op]) -> usize {
    let mut room = ELEMENTS;
    let fits = |next: &&Op| {
        let name = match next {
            Op::AddElement(_, Value::Goto(chain)) => chain.port().map_or(0, |p| p.as_str().len()),
            _ => 0,
        };
        let fits = room.checked_sub(ELEMENT + name);
        room = fits.unwrap_or(0);
        fits.is_some() && joins(op, next)
    };
    ops.iter().take_while(fits).count().max(1)
}

/// Whether two operations go into one message. Ranges do not: each is two elements, and an answer
/// must lead back to one operation.
fn joins(first: &Op, next: &Op) -> bool {
    let ((Op::AddElement(a, _), Op::AddElement(b, _))
    | (Op::DeleteElement(a, _), Op::DeleteElement(b, _))) = (first, next)
    else {
        return false;
    };
    (a.family, a.set) == (b.family, b.set) && !matches!(a.key, Key::Range(..))
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

fn table(family: Family) -> nftnl::Table {
    nftnl::Table::new(c_string(TABLE), proto_family(family))
}

fn add_table(batch: &mut Batch, index: usize, family: Family, flags: u32) {
    let mut table = Table::new();
    table.set_str(sys::NFTNL_TABLE_NAME, TABLE);
    table.set_u32(sys::NFTNL_TABLE_FLAGS, flags);
    table.set_data(sys::NFTNL_TABLE_USERDATA, &userdata::table(LAYOUT));
    batch.write(Some(index), |buffer, sequence| {
        let kind = libc::NFT_MSG_NEWTABLE;
        let header = ffi::header(buffer, kind, nfproto(family), libc::NLM_F_CREATE, sequence);
        #[expect(unsafe_code, reason = "libnftnl writes the message")]
        // SAFETY: the header stands in a buffer from `Batch::write`.
        unsafe {
            table.build(header);
        }
    });
}

/// The kernel's flags of a set.
pub(super) fn set_flags(set: SetName) -> u32 {
    let map = if set.data() == DataType::None { 0 } else { libc::NFT_SET_MAP };
    let interval = if set.is_interval() { libc::NFT_SET_INTERVAL } else { 0 };
    let concat = if set.is_interval() && set.key().len() > 1 { CONCAT } else { 0 };
    (map | interval).cast_unsigned() | concat
}

/// Lengths of the fields of a key, unpadded: what the kernel looks ranges up by.
fn field_lens(set: SetName, family: Family) -> Vec<u8> {
    let len = |field: &KeyField| match (field, family) {
        (KeyField::Address, Family::V6) => 16,
        (KeyField::Address, Family::V4) | (KeyField::Slot, _) => 4,
        (KeyField::Protocol, _) => 1,
        (KeyField::Port, _) => 2,
    };
    set.key().iter().map(len).collect()
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
    set.set_str(sys::NFTNL_SET_TABLE, TABLE);
    set.set_str(sys::NFTNL_SET_NAME, name.as_str());
    // Named sets are referred to by name; the number only has to be there.
    set.set_u32(sys::NFTNL_SET_ID, index.try_into().unwrap_or(u32::MAX));
    set.set_u32(sys::NFTNL_SET_FLAGS, set_flags(name));
    set.set_u32(sys::NFTNL_SET_KEY_TYPE, data_type(name.key(), family));
    set.set_u32(sys::NFTNL_SET_KEY_LEN, key_len(family, name));
    if set_flags(name) & CONCAT != 0 {
        set.set_data(sys::NFTNL_SET_DESC_CONCAT, &field_lens(name, family));
    }
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
    batch.write(Some(index), |buffer, sequence| {
        let header = ffi::header(buffer, kind, nfproto(family), flags, sequence);
        #[expect(unsafe_code, reason = "libnftnl writes the message")]
        // SAFETY: the header stands in a buffer from `Batch::write`.
        unsafe {
            set.build(header);
        }
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
    let table = table(family);
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
    let table = table(family);
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

/// Elements of one set, in one message.
fn elements(batch: &mut Batch, index: usize, id: ElementId, ops: &[Op], add: bool) {
    let mut set = Set::new();
    set.set_str(sys::NFTNL_SET_TABLE, TABLE);
    set.set_str(sys::NFTNL_SET_NAME, id.set.as_str());
    for op in ops {
        let (Op::AddElement(id, value) | Op::DeleteElement(id, value)) = op else { continue };
        set.add(element(&id.key, if add { value } else { &Value::None }));
        if let Some(end) = id.key.range_end() {
            let mut closing = Element::new();
            let flag = libc::NFT_SET_ELEM_INTERVAL_END.cast_unsigned();
            closing.set_u32(sys::NFTNL_SET_ELEM_FLAGS, flag);
            closing.set_data(sys::NFTNL_SET_ELEM_KEY, end.as_slice());
            set.add(closing);
        }
    }
    let (kind, flags) = if add {
        (libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE)
    } else {
        (libc::NFT_MSG_DELSETELEM, 0)
    };
    let several = ops.len() > 1;
    element_message(batch, Some((index, several)), id.family, set, kind, flags);
}

/// A message about elements of a set. Of the operations it carries the first is numbered; if they are
/// several, each is one element.
pub(super) fn element_message(
    batch: &mut Batch,
    operations: Option<(usize, bool)>,
    family: Family,
    mut set: Set,
    kind: libc::c_int,
    flags: libc::c_int,
) {
    let build = |buffer, sequence| {
        let header = ffi::header(buffer, kind, nfproto(family), flags, sequence);
        #[expect(unsafe_code, reason = "libnftnl writes the message")]
        // SAFETY: the header stands in a buffer from `Batch::write`, and ELEMENTS fit a message.
        unsafe {
            set.build_elements(header);
        }
    };
    match operations {
        Some((first, true)) => batch.write_elements(first, build),
        Some((only, false)) => batch.write(Some(only), build),
        None => batch.write(None, build),
    }
}

fn element(key: &Key, value: &Value) -> Element {
    let mut element = Element::new();
    element.set_data(sys::NFTNL_SET_ELEM_KEY, key.bytes().as_slice());
    if let Some(last) = key.last_bytes() {
        element.set_data(sys::NFTNL_SET_ELEM_KEY_END, last.as_slice());
    }
    match value {
        Value::None => {}
        Value::Goto(chain) => {
            let code = libc::NFT_GOTO.cast_unsigned();
            element.set_u32(sys::NFTNL_SET_ELEM_VERDICT, code);
            element.set_str(sys::NFTNL_SET_ELEM_CHAIN, &c_string(&chain.to_string()));
        }
        Value::Drop => {
            element.set_u32(sys::NFTNL_SET_ELEM_VERDICT, libc::NF_DROP.cast_unsigned());
        }
        Value::Backend(backend) => {
            element.set_data(sys::NFTNL_SET_ELEM_DATA, backend.bytes().as_slice());
        }
    }
    element
}
