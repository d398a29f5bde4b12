//! Affinity maps: which packets fill and the program only looks through.
//!
//! Entries come and go by packets and by time, so nothing about them can be part of a transaction
//! that takes effect as one. Clients of a backend that left are forgotten behind the commit: their
//! entries are found in a dump, of which nothing but their keys is kept, and deleted; if one of them
//! timed out meanwhile, the kernel refuses and the map is looked through again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use nftnl::nftnl_sys as sys;

use super::batch::Batch;
use super::dump;
use super::encode::{data_type, delete_keys, set_message};
use super::ffi::Set;
use super::socket::NetlinkSocket;
use super::userdata;
use crate::model::Family;
use crate::nft::element::{Backend, padded_len};
use crate::nft::kernel::{ApplyError, LoadError};
use crate::nft::names::{AffinityName, KeyField, TABLE};
use crate::nft::rule::AFFINITY_SIZE;

/// How often a map is looked through while its entries time out under the deletion.
const ATTEMPTS: u32 = 20;

/// Entries of one message.
const ENTRIES: usize = 500;

const FLAGS: libc::c_int = libc::NFT_SET_MAP | libc::NFT_SET_TIMEOUT | libc::NFT_SET_EVAL;

const DATA: [KeyField; 2] = [KeyField::Address, KeyField::Port];

fn named(table: &str, name: &AffinityName) -> Set {
    let mut set = Set::new();
    set.set_str(sys::NFTNL_SET_TABLE, table);
    set.set_str(sys::NFTNL_SET_NAME, &name.to_string());
    set
}

fn data_len(family: Family) -> u32 {
    DATA.iter().map(|&field| padded_len(family, field)).sum()
}

pub(super) fn add(batch: &mut Batch, index: usize, family: Family, name: &AffinityName) {
    let mut set = named(batch.table, name);
    set.set_u32(sys::NFTNL_SET_ID, index.try_into().unwrap_or(u32::MAX));
    set.set_u32(sys::NFTNL_SET_FLAGS, FLAGS.cast_unsigned());
    set.set_u32(sys::NFTNL_SET_KEY_TYPE, data_type(&[KeyField::Address], family));
    set.set_u32(sys::NFTNL_SET_KEY_LEN, padded_len(family, KeyField::Address));
    set.set_u32(sys::NFTNL_SET_DATA_TYPE, data_type(&DATA, family));
    set.set_u32(sys::NFTNL_SET_DATA_LEN, data_len(family));
    // No size: a map of a known size is allocated whole, of 65535 entries a megabyte. Without, the
    // kernel sets the same limit and allocates as it grows.
    set.set_data(sys::NFTNL_SET_USERDATA, &userdata::affinity());
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    set_message(batch, index, family, set, libc::NFT_MSG_NEWSET, flags);
}

pub(super) fn delete(batch: &mut Batch, index: usize, family: Family, name: &AffinityName) {
    let set = named(batch.table, name);
    set_message(batch, index, family, set, libc::NFT_MSG_DELSET, 0);
}

/// Whether a map of the kernel is defined as [`add`] would.
pub(super) fn is_defined(set: &Set, family: Family) -> bool {
    set.get_u32(sys::NFTNL_SET_FLAGS) == FLAGS.cast_unsigned()
        && set.get_u32(sys::NFTNL_SET_KEY_LEN) == padded_len(family, KeyField::Address)
        && set.get_u32(sys::NFTNL_SET_DATA_LEN) == data_len(family)
        // The kernel sets it when a rule begins to fill the map.
        && [0, AFFINITY_SIZE].contains(&set.get_u32(sys::NFTNL_SET_DESC_SIZE))
}

/// The backends that clients are held to.
pub(super) fn backends(
    socket: &mut NetlinkSocket,
    family: Family,
    name: &AffinityName,
) -> Result<BTreeSet<Backend>, LoadError> {
    let mut held = BTreeSet::new();
    entries(socket, family, name, |_, backend| {
        held.insert(backend);
    })?;
    Ok(held)
}

/// The clients of a map, and the backend that each is held to.
pub(super) fn clients(
    socket: &mut NetlinkSocket,
    family: Family,
    name: &AffinityName,
) -> Result<BTreeMap<IpAddr, Backend>, LoadError> {
    let mut clients = BTreeMap::new();
    entries(socket, family, name, |key, backend| {
        if let Some(client) = address(key) {
            clients.insert(client, backend);
        }
    })?;
    Ok(clients)
}

fn address(key: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(key).map(IpAddr::from);
    four.or_else(|_| <[u8; 16]>::try_from(key).map(IpAddr::from)).ok()
}

/// How many entries a map has, by counting them.
pub(super) fn count(
    socket: &mut NetlinkSocket,
    family: Family,
    name: &AffinityName,
) -> Result<usize, LoadError> {
    let mut count = 0;
    entries(socket, family, name, |_, _| count += 1)?;
    Ok(count)
}

/// Hands on every entry: its key as the kernel has it, and the backend.
fn entries(
    socket: &mut NetlinkSocket,
    family: Family,
    name: &AffinityName,
    mut each: impl FnMut(&[u8], Backend),
) -> Result<(), LoadError> {
    let request = dump::elements_request(family, named(TABLE, name));
    let outcome = socket.dump(&request, |message| {
        Set::parse_elements(message, |element| {
            if let Some((key, key_len)) = element.get_data::<16>(sys::NFTNL_SET_ELEM_KEY)
                && let Some((data, len)) = element.get_data::<64>(sys::NFTNL_SET_ELEM_DATA)
                && let Some(backend) = Backend::from_bytes(family, &data[..len])
            {
                each(&key[..key_len], backend);
            }
        });
    });
    // Entries change under every dump; one that is missed is found by the next.
    outcome.map(|_| ()).map_err(|source| LoadError::Socket { step: "list an affinity map", source })
}

/// Clients could not be forgotten.
#[derive(Debug, thiserror::Error)]
pub(super) enum ForgetError {
    #[error(transparent)]
    List(#[from] LoadError),
    #[error(transparent)]
    Delete(ApplyError),
    #[error("its entries kept timing out under the deletion ({ATTEMPTS} attempts)")]
    Unstable,
}

/// Deletes the entries of a map that hold clients to backends other than `keep`; returns how many.
pub(super) fn forget(
    socket: &mut NetlinkSocket,
    family: Family,
    name: &AffinityName,
    keep: &[Backend],
) -> Result<usize, ForgetError> {
    for _ in 0..ATTEMPTS {
        let mut stale: Vec<Vec<u8>> = Vec::new();
        entries(socket, family, name, |key, backend| {
            if keep.binary_search(&backend).is_err() {
                stale.push(key.to_vec());
            }
        })?;
        if stale.is_empty() {
            return Ok(0);
        }
        let mut batch = Batch::begin(TABLE, Vec::new());
        for keys in stale.chunks(ENTRIES) {
            let keys = keys.iter().map(Vec::as_slice);
            delete_keys(&mut batch, family, &name.to_string(), keys);
        }
        match super::send(socket, &batch.finish()) {
            Ok(()) => return Ok(stale.len()),
            Err(error) if error.is(libc::ENOENT) => {}
            Err(error) => return Err(ForgetError::Delete(error)),
        }
    }
    Err(ForgetError::Unstable)
}
