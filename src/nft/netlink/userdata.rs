//! Notes that nft itself keeps in the kernel's userdata fields, so that it lists our table as if it
//! had written it: the table's comment, byte orders, and for a key field without a type of its own
//! (the slot) the expressions that `typeof` names.
//!
//! The numbers are nft's internal enumerations. They are stable in practice but no ABI, so they are
//! all here, and a test compares the bytes with those the installed nft writes.

use nftnl::nftnl_sys as sys;

use super::ffi::Userdata;
use crate::model::Family;
use crate::nft::names::{DataType, KeyField, SetName};

// enum byteorder; 0, "not one order", for concatenations, whose fields know their own, and verdicts
const MIXED: u32 = 0;
const BIG_ENDIAN: u32 = 2;

// enum expr_types
const EXPR_PAYLOAD: u32 = 7;
const EXPR_META: u32 = 9;
const EXPR_CONCAT: u32 = 13;
const EXPR_NUMGEN: u32 = 23;

// enum proto_desc_id, and the field's position in its description
const PROTO_TH: u32 = 11;
const TH_DPORT: u32 = 2;
const PROTO_IP: u32 = 12;
const IP_DADDR: u32 = 12;
const PROTO_IP6: u32 = 13;
const IP6_DADDR: u32 = 9;

/// Attribute in each expression: what kind it is, and its own attributes.
const KIND: u8 = 0;
const DATA: u8 = 1;

fn small(kind: u32) -> u8 {
    u8::try_from(kind).expect("userdata types are bytes")
}

/// Userdata of the table: its comment.
pub(super) fn table(comment: &str) -> Vec<u8> {
    let mut userdata = Userdata::new();
    userdata.put_str(small(sys::NFTNL_UDATA_TABLE_COMMENT), comment);
    userdata.bytes()
}

/// Userdata of a set or map.
pub(super) fn set(set: SetName, family: Family) -> Vec<u8> {
    let mut userdata = Userdata::new();
    let key_order = if set.key().len() > 1 { MIXED } else { BIG_ENDIAN };
    userdata.put_u32(small(sys::NFTNL_UDATA_SET_KEYBYTEORDER), key_order);
    if set.data() != DataType::None {
        userdata.put_u32(small(sys::NFTNL_UDATA_SET_DATABYTEORDER), MIXED);
    }
    if set.key().contains(&KeyField::Slot) {
        let data = [KeyField::Address, KeyField::Port];
        let key = small(sys::NFTNL_UDATA_SET_KEY_TYPEOF);
        userdata.nest(key, |nest| concatenation(nest, set.key(), family));
        let value = small(sys::NFTNL_UDATA_SET_DATA_TYPEOF);
        userdata.nest(value, |nest| concatenation(nest, &data, family));
    }
    if set.data() != DataType::None {
        userdata.put_u32(small(sys::NFTNL_UDATA_SET_DATA_INTERVAL), 0);
    }
    userdata.bytes()
}

/// Userdata of an affinity map.
pub(super) fn affinity() -> Vec<u8> {
    let mut userdata = Userdata::new();
    userdata.put_u32(small(sys::NFTNL_UDATA_SET_KEYBYTEORDER), BIG_ENDIAN);
    userdata.put_u32(small(sys::NFTNL_UDATA_SET_DATABYTEORDER), MIXED);
    userdata.put_u32(small(sys::NFTNL_UDATA_SET_DATA_INTERVAL), 0);
    userdata.bytes()
}

/// Userdata of the set that counts connections.
pub(super) fn connections() -> Vec<u8> {
    let mut userdata = Userdata::new();
    userdata.put_u32(small(sys::NFTNL_UDATA_SET_KEYBYTEORDER), MIXED);
    userdata.bytes()
}

fn concatenation(userdata: &mut Userdata, fields: &[KeyField], family: Family) {
    userdata.put_u32(KIND, EXPR_CONCAT);
    userdata.nest(DATA, |nest| {
        for (number, &field) in (0_u8..).zip(fields) {
            nest.nest(number, |nest| expression(nest, field, family));
        }
    });
}

fn expression(userdata: &mut Userdata, field: KeyField, family: Family) {
    let (kind, attributes): (u32, &[u32]) = match (field, family) {
        (KeyField::Address, Family::V4) => (EXPR_PAYLOAD, &[PROTO_IP, IP_DADDR]),
        (KeyField::Address, Family::V6) => (EXPR_PAYLOAD, &[PROTO_IP6, IP6_DADDR]),
        (KeyField::Port, _) => (EXPR_PAYLOAD, &[PROTO_TH, TH_DPORT]),
        (KeyField::Protocol, _) => (EXPR_META, &[16]), // NFT_META_L4PROTO
        (KeyField::Slot, _) => (EXPR_NUMGEN, &[1, 65536, 0]), // random, modulus, offset
    };
    userdata.put_u32(KIND, kind);
    userdata.nest(DATA, |nest| {
        for (number, &value) in (0_u8..).zip(attributes) {
            nest.put_u32(number, value);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What nft 1.0.6 writes for the IPv4 `endpoints` map, taken from `nft --debug=mnl`.
    const NFT_ENDPOINTS: &str = "000400000000010400000000\
        036000040d00000001580014000407000000010c00040c00000001040c000000\
        010e00040900000001060004100000000214000407000000010c00040b000000010402000000\
        031a0004170000000112000401000000010400000100020400000000\
        043400040d000000012c0014000407000000010c00040c00000001040c000000\
        0114000407000000010c00040b000000010402000000060400000000";

    #[test]
    fn the_endpoints_map_carries_the_bytes_that_nft_writes() {
        let ours = set(SetName::Endpoints, Family::V4);
        let hex: Vec<_> = ours.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex.concat(), NFT_ENDPOINTS);
    }
}
