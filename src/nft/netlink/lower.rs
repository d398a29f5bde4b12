//! Rules as instructions of the kernel's register machine.
//!
//! [`lower`] turns a rule's statements into them, registers included, the way nft would. A dumped rule is
//! compared with a wanted one, so the values here are the ones the kernel dumps: registers in their
//! canonical numbering, ranges and flags it would fill in filled in.

use std::net::IpAddr;

use nftnl::nftnl_sys as sys;

use super::instruction::Instruction;
use crate::model::Family;
use crate::nft::element::padded_len;
use crate::nft::names::{AffinityName, CONNECTIONS, KeyField};
use crate::nft::rule::{
    COUNTED_BY, COUNTED_FOR, HASH_SEED, InterfaceName, Rule, Selector, SlotSource, Statement, masks,
};

/// The register that starts at this byte of the register file, as the kernel numbers it: the four
/// registers of 16 bytes, and the 4-byte ones between their starts.
fn register(offset: u32) -> u32 {
    if offset.is_multiple_of(16) {
        libc::NFT_REG_1.cast_unsigned() + offset / 16
    } else {
        libc::NFT_REG32_00.cast_unsigned() + offset / 4
    }
}

const FIRST: u32 = 0;
const NAT_MAP_IPS: u32 = 1;
const NAT_PROTO_SPECIFIED: u32 = 2;
const NAT_PROTO_RANDOM_FULLY: u32 = 16;
const CT_STATE_NEW: u32 = 8;
const CT_STATUS_DST_NAT: u32 = 32;
/// `NFT_FIB_RESULT_ADDRTYPE` and `NFTA_FIB_F_SADDR` of the kernel's headers.
const FIB_ADDRESS_TYPE: u32 = 3;
const FIB_SADDR: u32 = 1;
const FIB_DADDR: u32 = 2;
/// Keys of conntrack's tuples that libc does not name (`enum nft_ct_keys`).
const CT_PROTO_SRC: libc::c_int = 11;
const CT_PROTO_DST: libc::c_int = 12;
const CT_SRC_IP: libc::c_int = 19;
const CT_DST_IP: libc::c_int = 20;
const CT_SRC_IP6: libc::c_int = 21;
const CT_DST_IP6: libc::c_int = 22;
const CT_DIR_ORIGINAL: libc::c_int = 0;
const CT_DIR_REPLY: libc::c_int = 1;
const HASH_JENKINS: u32 = 0;
/// How far behind the hash a source address is loaded that is hashed: where nft has it, so that a
/// table loaded from text is the same.
const HASHED: u32 = 20;
/// Where the data of an affinity map's element is loaded, behind its key.
const DATA: u32 = 16;
/// Length of an interface's name in a register.
const INTERFACE_NAME: usize = 16;
const ICMP_PORT_UNREACHABLE: libc::c_int = 3;
const ICMPV6_PORT_UNREACHABLE: libc::c_int = 4;

/// The instructions of a rule.
pub(super) fn lower(rule: &Rule, family: Family) -> Vec<Instruction> {
    rule.statements.iter().flat_map(|statement| lower_statement(statement, family)).collect()
}

fn lower_statement(statement: &Statement, family: Family) -> Vec<Instruction> {
    match statement {
        Statement::CtStateNew => ct_bits(libc::NFT_CT_STATE, CT_STATE_NEW),
        Statement::CtStatusDnat => ct_bits(libc::NFT_CT_STATUS, CT_STATUS_DST_NAT),
        Statement::FromThisHost => fib_is_local(FIB_SADDR),
        Statement::ToThisHost => fib_is_local(FIB_DADDR),
        Statement::NotToLoopback => loopback(Selector::Daddr, libc::NFT_CMP_NEQ, family),
        Statement::ToLoopback => loopback(Selector::Daddr, libc::NFT_CMP_EQ, family),
        Statement::FromLoopback => loopback(Selector::Saddr, libc::NFT_CMP_EQ, family),
        Statement::NotToInterface(name) => {
            interface(libc::NFT_META_OIFNAME, libc::NFT_CMP_NEQ, name)
        }
        Statement::FromInterface(name) => interface(libc::NFT_META_IIFNAME, libc::NFT_CMP_EQ, name),
        Statement::NotFromInterface(name) => {
            interface(libc::NFT_META_IIFNAME, libc::NFT_CMP_NEQ, name)
        }
        Statement::L4Proto(protocol) => vec![
            load_one(Selector::L4Proto, family, register(FIRST)),
            compare(libc::NFT_CMP_EQ, &[protocol.number()]),
        ],
        Statement::In(key, set) => {
            let mut list = load(key, family);
            list.push(lookup(set.as_str(), None, 0));
            list
        }
        Statement::NotIn(key, set) => {
            let mut list = load(key, family);
            list.push(lookup(set.as_str(), None, libc::NFT_LOOKUP_F_INV));
            list
        }
        Statement::Vmap(key, map) => {
            let mut list = load(key, family);
            list.push(lookup(map.as_str(), Some(libc::NFT_REG_VERDICT.cast_unsigned()), 0));
            list
        }
        Statement::Dnat(key, map) => {
            let mut list = load(key, family);
            list.push(lookup(map.as_str(), Some(register(FIRST)), 0));
            list.push(dnat(family));
            list
        }
        Statement::DnatSticky(affinity) => vec![
            load_one(Selector::Saddr, family, register(FIRST)),
            lookup(&affinity.to_string(), Some(register(FIRST)), 0),
            dnat(family),
        ],
        Statement::Remember(affinity, seconds) => remember(affinity, *seconds, family),
        Statement::Count => {
            let mut list = load(&COUNTED_BY, family);
            let counter = Instruction::new(c"counter")
                .long(sys::NFTNL_EXPR_CTR_BYTES, 0)
                .long(sys::NFTNL_EXPR_CTR_PACKETS, 0);
            list.push(update(CONNECTIONS, COUNTED_FOR).inner(sys::NFTNL_EXPR_DYNSET_EXPR, counter));
            list
        }
        Statement::MarkClear(bits) => {
            vec![load_mark(), change(*bits, 0), compare(libc::NFT_CMP_EQ, &0_u32.to_ne_bytes())]
        }
        Statement::MarkOr(bits) => vec![load_mark(), change(!bits, *bits), store_mark()],
        Statement::MarkXor(bits) => vec![load_mark(), change(u32::MAX, *bits), store_mark()],
        Statement::Masquerade => {
            vec![
                Instruction::new(c"masq")
                    .number(sys::NFTNL_EXPR_MASQ_FLAGS, NAT_PROTO_RANDOM_FULLY),
            ]
        }
        Statement::Jump(chain) => vec![verdict(libc::NFT_JUMP, Some(&chain.to_string()))],
        Statement::Goto(chain) => vec![verdict(libc::NFT_GOTO, Some(&chain.to_string()))],
        Statement::Return => vec![verdict(libc::NFT_RETURN, None)],
        Statement::Accept => vec![verdict(libc::NF_ACCEPT, None)],
        Statement::Drop => vec![verdict(libc::NF_DROP, None)],
        Statement::Reject => vec![
            Instruction::new(c"reject")
                .constant(sys::NFTNL_EXPR_REJECT_TYPE, libc::NFT_REJECT_ICMP_UNREACH)
                .byte(
                    sys::NFTNL_EXPR_REJECT_CODE,
                    match family {
                        Family::V4 => ICMP_PORT_UNREACHABLE,
                        Family::V6 => ICMPV6_PORT_UNREACHABLE,
                    },
                ),
        ],
    }
}

/// Loads selectors one behind the other, as the kernel wants the key of a concatenation.
fn load(selectors: &[Selector], family: Family) -> Vec<Instruction> {
    let mut offset = FIRST;
    let mut list = Vec::with_capacity(selectors.len() + 2);
    for &selector in selectors {
        if let Selector::Slot { source: SlotSource::SourceHash, modulus, offset: first } = selector
        {
            let (from, into) = (register(offset + HASHED), register(offset));
            list.push(load_one(Selector::Saddr, family, from));
            list.push(hash(from, into, padded_len(family, KeyField::Address), modulus, first));
        } else {
            list.push(load_one(selector, family, register(offset)));
            list.extend(mask(selector, family, register(offset)));
        }
        let field = match selector {
            Selector::Saddr
            | Selector::SaddrFirst(_)
            | Selector::SaddrLast(_)
            | Selector::Daddr
            | Selector::OriginalDaddr
            | Selector::ReplySaddr => KeyField::Address,
            Selector::L4Proto => KeyField::Protocol,
            Selector::Dport | Selector::OriginalDport | Selector::ReplySport => KeyField::Port,
            Selector::Slot { .. } => KeyField::Slot,
        };
        offset += padded_len(family, field);
    }
    list
}

fn load_one(selector: Selector, family: Family, register: u32) -> Instruction {
    let network = libc::NFT_PAYLOAD_NETWORK_HEADER;
    match (selector, family) {
        (Selector::Saddr | Selector::SaddrFirst(_) | Selector::SaddrLast(_), Family::V4) => {
            payload(network, 12, 4, register)
        }
        (Selector::Daddr, Family::V4) => payload(network, 16, 4, register),
        (Selector::Saddr | Selector::SaddrFirst(_) | Selector::SaddrLast(_), Family::V6) => {
            payload(network, 8, 16, register)
        }
        (Selector::Daddr, Family::V6) => payload(network, 24, 16, register),
        (Selector::Dport, _) => payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2, register),
        (Selector::L4Proto, _) => Instruction::new(c"meta")
            .constant(sys::NFTNL_EXPR_META_KEY, libc::NFT_META_L4PROTO)
            .number(sys::NFTNL_EXPR_META_DREG, register),
        (Selector::OriginalDaddr, Family::V4) => tuple(CT_DST_IP, CT_DIR_ORIGINAL, register),
        (Selector::OriginalDaddr, Family::V6) => tuple(CT_DST_IP6, CT_DIR_ORIGINAL, register),
        (Selector::OriginalDport, _) => tuple(CT_PROTO_DST, CT_DIR_ORIGINAL, register),
        (Selector::ReplySaddr, Family::V4) => tuple(CT_SRC_IP, CT_DIR_REPLY, register),
        (Selector::ReplySaddr, Family::V6) => tuple(CT_SRC_IP6, CT_DIR_REPLY, register),
        (Selector::ReplySport, _) => tuple(CT_PROTO_SRC, CT_DIR_REPLY, register),
        (Selector::Slot { source, modulus, offset }, _) => Instruction::new(c"numgen")
            .number(sys::NFTNL_EXPR_NG_DREG, register)
            .constant(
                sys::NFTNL_EXPR_NG_TYPE,
                match source {
                    SlotSource::Increment => libc::NFT_NG_INCREMENTAL,
                    SlotSource::Random | SlotSource::SourceHash => libc::NFT_NG_RANDOM,
                },
            )
            .number(sys::NFTNL_EXPR_NG_MODULUS, modulus.into())
            .number(sys::NFTNL_EXPR_NG_OFFSET, offset.into()),
    }
}

/// Makes the first or last address of its range of a source address, in its register.
fn mask(selector: Selector, family: Family, register: u32) -> Option<Instruction> {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let ((network, host), last) = match selector {
        Selector::SaddrFirst(length) => (masks(family, length)?, false),
        Selector::SaddrLast(length) => (masks(family, length)?, true),
        _ => return None,
    };
    let (network, mut xor) = (octets(network), octets(host));
    if !last {
        xor.fill(0);
    }
    Some(bitwise(register, &network, &xor))
}

/// Hashes the `len` bytes from one register on into a number of another.
fn hash(from: u32, into: u32, len: u32, modulus: u16, offset: u16) -> Instruction {
    Instruction::new(c"hash")
        .number(sys::NFTNL_EXPR_HASH_SREG, from)
        .number(sys::NFTNL_EXPR_HASH_DREG, into)
        .number(sys::NFTNL_EXPR_HASH_LEN, len)
        .number(sys::NFTNL_EXPR_HASH_MODULUS, modulus.into())
        .number(sys::NFTNL_EXPR_HASH_SEED, HASH_SEED)
        .number(sys::NFTNL_EXPR_HASH_OFFSET, offset.into())
        .number(sys::NFTNL_EXPR_HASH_TYPE, HASH_JENKINS)
}

/// A field of a tuple of the connection: of the packet that opened it, or of the answer.
fn tuple(key: libc::c_int, direction: libc::c_int, register: u32) -> Instruction {
    Instruction::new(c"ct")
        .number(sys::NFTNL_EXPR_CT_DREG, register)
        .constant(sys::NFTNL_EXPR_CT_KEY, key)
        .byte(sys::NFTNL_EXPR_CT_DIR, direction)
}

fn fib_is_local(address: u32) -> Vec<Instruction> {
    vec![
        Instruction::new(c"fib")
            .number(sys::NFTNL_EXPR_FIB_DREG, register(FIRST))
            .number(sys::NFTNL_EXPR_FIB_RESULT, FIB_ADDRESS_TYPE)
            .number(sys::NFTNL_EXPR_FIB_FLAGS, address),
        compare(libc::NFT_CMP_EQ, &u32::from(libc::RTN_LOCAL).to_ne_bytes()),
    ]
}

/// Compares an address with the loopback ones: of 127.0.0.0/8, the first byte alone tells.
fn loopback(address: Selector, op: libc::c_int, family: Family) -> Vec<Instruction> {
    let offset = if address == Selector::Saddr { 12 } else { 16 };
    match family {
        Family::V4 => vec![
            payload(libc::NFT_PAYLOAD_NETWORK_HEADER, offset, 1, register(FIRST)),
            compare(op, &[127]),
        ],
        Family::V6 => vec![
            load_one(address, family, register(FIRST)),
            compare(op, &std::net::Ipv6Addr::LOCALHOST.octets()),
        ],
    }
}

/// The whole name is compared with its padding, the beginning of one is compared alone.
fn interface(key: libc::c_int, op: libc::c_int, name: &InterfaceName) -> Vec<Instruction> {
    let mut bytes = name.as_str().as_bytes().to_vec();
    if let InterfaceName::Whole(_) = name {
        bytes.resize(INTERFACE_NAME, 0);
    }
    vec![
        Instruction::new(c"meta")
            .constant(sys::NFTNL_EXPR_META_KEY, key)
            .number(sys::NFTNL_EXPR_META_DREG, register(FIRST)),
        compare(op, &bytes),
    ]
}

/// The source address as the key; destination address and port as the data.
fn remember(affinity: &AffinityName, seconds: u32, family: Family) -> Vec<Instruction> {
    let port = register(DATA + padded_len(family, KeyField::Address));
    vec![
        load_one(Selector::Saddr, family, register(FIRST)),
        load_one(Selector::Daddr, family, register(DATA)),
        load_one(Selector::Dport, family, port),
        update(&affinity.to_string(), seconds)
            .number(sys::NFTNL_EXPR_DYNSET_SREG_DATA, register(DATA)),
    ]
}

/// Adds the element whose key is loaded to a set, or gives it such a time once more.
fn update(set: &str, seconds: u32) -> Instruction {
    Instruction::new(c"dynset")
        .number(sys::NFTNL_EXPR_DYNSET_SREG_KEY, register(FIRST))
        .constant(sys::NFTNL_EXPR_DYNSET_OP, libc::NFT_DYNSET_OP_UPDATE)
        .long(sys::NFTNL_EXPR_DYNSET_TIMEOUT, u64::from(seconds) * 1000)
        .text(sys::NFTNL_EXPR_DYNSET_SET_NAME, set)
}

fn payload(base: libc::c_int, offset: u32, len: u32, register: u32) -> Instruction {
    Instruction::new(c"payload")
        .number(sys::NFTNL_EXPR_PAYLOAD_DREG, register)
        .constant(sys::NFTNL_EXPR_PAYLOAD_BASE, base)
        .number(sys::NFTNL_EXPR_PAYLOAD_OFFSET, offset)
        .number(sys::NFTNL_EXPR_PAYLOAD_LEN, len)
}

fn lookup(set: &str, into: Option<u32>, flags: libc::c_int) -> Instruction {
    let lookup = Instruction::new(c"lookup")
        .number(sys::NFTNL_EXPR_LOOKUP_SREG, register(FIRST))
        .text(sys::NFTNL_EXPR_LOOKUP_SET, set)
        .constant(sys::NFTNL_EXPR_LOOKUP_FLAGS, flags);
    match into {
        Some(register) => lookup.number(sys::NFTNL_EXPR_LOOKUP_DREG, register),
        None => lookup,
    }
}

/// Address in the first register, port behind it. The kernel fills in range ends and flags, so they
/// are written here.
fn dnat(family: Family) -> Instruction {
    let port = register(padded_len(family, KeyField::Address));
    let nfproto = match family {
        Family::V4 => libc::NFPROTO_IPV4,
        Family::V6 => libc::NFPROTO_IPV6,
    };
    Instruction::new(c"nat")
        .constant(sys::NFTNL_EXPR_NAT_TYPE, libc::NFT_NAT_DNAT)
        .constant(sys::NFTNL_EXPR_NAT_FAMILY, nfproto)
        .number(sys::NFTNL_EXPR_NAT_REG_ADDR_MIN, register(FIRST))
        .number(sys::NFTNL_EXPR_NAT_REG_ADDR_MAX, register(FIRST))
        .number(sys::NFTNL_EXPR_NAT_REG_PROTO_MIN, port)
        .number(sys::NFTNL_EXPR_NAT_REG_PROTO_MAX, port)
        .number(sys::NFTNL_EXPR_NAT_FLAGS, NAT_MAP_IPS | NAT_PROTO_SPECIFIED)
}

fn ct_bits(key: libc::c_int, bits: u32) -> Vec<Instruction> {
    vec![
        Instruction::new(c"ct")
            .number(sys::NFTNL_EXPR_CT_DREG, register(FIRST))
            .constant(sys::NFTNL_EXPR_CT_KEY, key),
        change(bits, 0),
        compare(libc::NFT_CMP_NEQ, &0_u32.to_ne_bytes()),
    ]
}

fn load_mark() -> Instruction {
    Instruction::new(c"meta")
        .constant(sys::NFTNL_EXPR_META_KEY, libc::NFT_META_MARK)
        .number(sys::NFTNL_EXPR_META_DREG, register(FIRST))
}

fn store_mark() -> Instruction {
    Instruction::new(c"meta")
        .constant(sys::NFTNL_EXPR_META_KEY, libc::NFT_META_MARK)
        .number(sys::NFTNL_EXPR_META_SREG, register(FIRST))
}

/// The first register as a number: `(number & mask) ^ xor`.
fn change(mask: u32, xor: u32) -> Instruction {
    bitwise(register(FIRST), &mask.to_ne_bytes(), &xor.to_ne_bytes())
}

/// `register = (register & mask) ^ xor`
fn bitwise(register: u32, mask: &[u8], xor: &[u8]) -> Instruction {
    let len = u32::try_from(mask.len()).expect("operands are short");
    Instruction::new(c"bitwise")
        .number(sys::NFTNL_EXPR_BITWISE_SREG, register)
        .number(sys::NFTNL_EXPR_BITWISE_DREG, register)
        .number(sys::NFTNL_EXPR_BITWISE_OP, 0)
        .number(sys::NFTNL_EXPR_BITWISE_LEN, len)
        .data(sys::NFTNL_EXPR_BITWISE_MASK, mask)
        .data(sys::NFTNL_EXPR_BITWISE_XOR, xor)
}

fn compare(op: libc::c_int, with: &[u8]) -> Instruction {
    Instruction::new(c"cmp")
        .number(sys::NFTNL_EXPR_CMP_SREG, register(FIRST))
        .constant(sys::NFTNL_EXPR_CMP_OP, op)
        .data(sys::NFTNL_EXPR_CMP_DATA, with)
}

fn verdict(code: libc::c_int, chain: Option<&str>) -> Instruction {
    let immediate = Instruction::new(c"immediate")
        .constant(sys::NFTNL_EXPR_IMM_DREG, libc::NFT_REG_VERDICT)
        .constant(sys::NFTNL_EXPR_IMM_VERDICT, code);
    match chain {
        Some(chain) => immediate.text(sys::NFTNL_EXPR_IMM_CHAIN, chain),
        None => immediate,
    }
}
