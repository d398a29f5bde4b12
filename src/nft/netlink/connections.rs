//! The set that counts connections: which packets fill and the program only reads.
//!
//! Read by scrapes and by commands, on a socket of its own, so that commits never wait for it. The
//! messages are read without libnftnl: there can be a hundred thousand elements, and of each only the
//! key and one number count.

use std::io;
use std::time::{Duration, Instant};

use nftnl::nftnl_sys as sys;

use super::batch::Batch;
use super::encode::{data_type, set_message};
use super::ffi::Set;
use super::socket::{NetlinkSocket, OpenError};
use super::{dump, now, userdata};
use crate::model::Family;
use crate::nft::connection::{CONNECTION, Connection, CounterSet, Counters};
use crate::nft::kernel::{LoadError, SetState};
use crate::nft::names::{CONNECTIONS, TABLE};
use crate::nft::rule::CONNECTIONS_SIZE;
use crate::nlmsg::{GENMSG, HEADER, attributes, find};

const FLAGS: libc::c_int = libc::NFT_SET_TIMEOUT | libc::NFT_SET_EVAL;

fn named(table: &str) -> Set {
    let mut set = Set::new();
    set.set_str(sys::NFTNL_SET_TABLE, table);
    set.set_str(sys::NFTNL_SET_NAME, CONNECTIONS);
    set
}

pub(super) fn add(batch: &mut Batch, index: usize, family: Family) {
    let mut set = named(batch.table);
    set.set_u32(sys::NFTNL_SET_ID, index.try_into().unwrap_or(u32::MAX));
    set.set_u32(sys::NFTNL_SET_FLAGS, FLAGS.cast_unsigned());
    set.set_u32(sys::NFTNL_SET_KEY_TYPE, data_type(&CONNECTION, family));
    set.set_u32(sys::NFTNL_SET_KEY_LEN, Connection::len(family));
    // No size, as with the affinity maps: the kernel sets the same limit and allocates as it grows.
    set.set_data(sys::NFTNL_SET_USERDATA, &userdata::connections());
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    set_message(batch, index, family, set, libc::NFT_MSG_NEWSET, flags);
}

pub(super) fn delete(batch: &mut Batch, index: usize, family: Family) {
    let set = named(batch.table);
    set_message(batch, index, family, set, libc::NFT_MSG_DELSET, 0);
}

/// Whether a set of this name is defined as [`add`] would.
pub(super) fn state(set: &Set, family: Family) -> SetState {
    let same = set.get_u32(sys::NFTNL_SET_FLAGS) == FLAGS.cast_unsigned()
        && set.get_u32(sys::NFTNL_SET_KEY_LEN) == Connection::len(family)
        // The kernel sets it when a rule begins to fill the set.
        && [0, CONNECTIONS_SIZE].contains(&set.get_u32(sys::NFTNL_SET_DESC_SIZE));
    if same { SetState::Same } else { SetState::Differs }
}

/// Reads the counters of the network namespace that it was opened in.
#[derive(Debug)]
pub struct ReadCounters {
    socket: NetlinkSocket,
}

impl ReadCounters {
    /// Opens a socket for it. Needs `CAP_NET_ADMIN`.
    pub fn open() -> Result<Self, OpenError> {
        Ok(Self { socket: NetlinkSocket::open()? })
    }

    /// Reads all counters, as long as the time suffices. Each number is one that the counter had
    /// meanwhile.
    pub fn read(&mut self, budget: Duration) -> Result<Counters, LoadError> {
        let until = now() + budget;
        for _ in 0..ATTEMPTS {
            let before = self.handles()?;
            let counters = self.read_until(until, before)?;
            // The set was not another one in between.
            if self.handles()? == before {
                return Ok(counters);
            }
        }
        Err(LoadError::Unstable { attempts: ATTEMPTS })
    }

    fn read_until(
        &mut self,
        until: Instant,
        handles: [Option<(u64, u64)>; 2],
    ) -> Result<Counters, LoadError> {
        let mut counters = Counters { complete: true, ..Counters::default() };
        for (number, family) in Family::BOTH.into_iter().enumerate() {
            let Some(handle) = handles[number] else { continue };
            let request = dump::elements_request(family, named(TABLE));
            let before = counters.connections.len();
            let outcome = self.socket.dump_while(
                &request,
                |message| elements(message, family, |found| counters.connections.push(found)),
                || now() < until,
            );
            match outcome {
                // Gone since: that is found out.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) if error.kind() == io::ErrorKind::TimedOut => counters.complete = false,
                Err(source) => {
                    return Err(LoadError::Socket { step: "list the counters", source });
                }
                Ok(_) => {}
            }
            let pairs = counters.connections.len() - before;
            counters.sets[number] = Some(CounterSet { handle, pairs });
        }
        // One that moved to another place under the dump can be met twice; the later number counts.
        counters.connections.sort_unstable_by(|a, b| b.cmp(a));
        counters.connections.dedup_by_key(|(connection, _)| *connection);
        Ok(counters)
    }

    /// The kernel's numbers of table and set of each family, if it has them.
    fn handles(&mut self) -> Result<[Option<(u64, u64)>; 2], LoadError> {
        let mut handles = [None; 2];
        for (handle, family) in handles.iter_mut().zip(Family::BOTH) {
            let table = self.handle(&dump::table_request(family), TABLE_HANDLE)?;
            let set = self.handle(&dump::set_request(family, named(TABLE)), SET_HANDLE)?;
            *handle = table.zip(set);
        }
        Ok(handles)
    }

    /// The number in the answer to a request; None if there is no such object.
    fn handle(&mut self, request: &[u8], attribute: u16) -> Result<Option<u64>, LoadError> {
        let mut handle = None;
        let outcome = self.socket.dump(request, |message| {
            let content = message.get(HEADER + GENMSG..).unwrap_or_default();
            handle = find(content, attribute).and_then(|bytes| bytes.try_into().ok());
        });
        match outcome {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(source) => Err(LoadError::Socket { step: "ask for the counters", source }),
            Ok(_) => Ok(handle.map(u64::from_be_bytes)),
        }
    }
}

/// How often counters are read when the set is replaced under it.
const ATTEMPTS: u32 = 20;

// The attributes of elements and counters as linux/netfilter/nf_tables.h numbers them.
const TABLE_HANDLE: u16 = 4;
const SET_HANDLE: u16 = 16;
const LIST_ELEMENTS: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_EXPRESSION: u16 = 7;
const DATA_VALUE: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const COUNTER_PACKETS: u16 = 2;

/// Hands on the elements of a message that are understood.
fn elements(message: &[u8], family: Family, mut each: impl FnMut((Connection, u64))) {
    let list = find(message.get(HEADER + GENMSG..).unwrap_or_default(), LIST_ELEMENTS);
    for (_, element) in attributes(list.unwrap_or_default()) {
        let connection = find(element, ELEMENT_KEY)
            .and_then(|key| find(key, DATA_VALUE))
            .and_then(|key| Connection::from_bytes(family, key));
        let packets = find(element, ELEMENT_EXPRESSION)
            .and_then(|expression| find(expression, EXPRESSION_DATA))
            .and_then(|counter| find(counter, COUNTER_PACKETS))
            .and_then(|packets| packets.try_into().ok().map(u64::from_be_bytes));
        if let (Some(connection), Some(packets)) = (connection, packets) {
            each((connection, packets));
        }
    }
}
