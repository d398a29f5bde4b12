//! The real kernel, over one netlink socket that stays open for life.
//!
//! A transaction becomes one buffer, sent with one call, answered before that call returns; what the
//! kernel refuses is mapped back to the operation by the message's sequence number and the offset in
//! it. Everything `unsafe` of the crate is in this folder, but for a call that sets the allocator
//! (`host::memory`): `ffi` wraps libnftnl's objects, `batch` writes messages, `socket` sends them.

mod affinity;
mod batch;
mod connections;
mod dump;
mod encode;
mod ffi;
mod fill;
mod foreign;
mod instruction;
mod lower;
mod monitor;
mod probe;
mod socket;
mod userdata;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

pub use self::connections::ReadCounters;
pub use self::fill::{AffinityFill, affinity_fill};
pub use self::foreign::{ForeignChain, ForeignOp, ForeignTable};
pub use self::monitor::{Intrusion, Monitor};
pub use self::probe::{FEATURES, Feature, Missing, ProbeError};
pub use self::socket::OpenError;

use self::batch::Batch;
use self::monitor::Subscription;
use self::socket::{Answer, NetlinkSocket};
use super::dataplane::Options;
use super::element::Backend;
use super::kernel::{Applied, ApplyError, Kernel, LoadError, Loaded, Refusal};
use super::names::{AffinityName, STAND_IN, TABLE};
use super::transaction::{Op, Transaction};
use crate::model::Family;

/// The nf_tables of the network namespace it was opened in.
#[derive(Debug)]
pub struct NetlinkKernel {
    socket: NetlinkSocket,
    /// Kept between commits, so that small ones allocate nothing.
    buffer: Vec<u8>,
    /// Whether the tables are to be owned by this socket.
    owning: bool,
    /// Of the monitor, if there is one.
    subscription: Subscription,
    /// Whether others committed while it was paused.
    unheard: bool,
}

/// `NFT_TABLE_F_PERSIST`: the table outlives its owner. Since Linux 6.9.
const PERSIST: u32 = 4;
/// The same with `NFT_TABLE_F_OWNER`: nobody but the socket that made the table may change it.
const OWNED: u32 = PERSIST | 2;

/// Buffers up to this size are kept for the next commit.
const KEPT_BUFFER: usize = 1 << 20;

/// Operations of a transaction that the monitor is not told of: the kernel would take longer to tell than to
/// pause it.
const LARGE: usize = 128;

/// No packet takes as long through a hook, which is a matter of microseconds: not even if whoever sends it has
/// to wait for a processor in between, as can be where the kernel is preemptible.
const UNDER_WAY: Duration = Duration::from_millis(100);

impl NetlinkKernel {
    /// Opens the socket. Needs `CAP_NET_ADMIN` in the namespace's user namespace.
    pub fn open() -> Result<Self, OpenError> {
        Ok(Self {
            socket: NetlinkSocket::open()?,
            buffer: Vec::new(),
            owning: false,
            subscription: Subscription::default(),
            unheard: false,
        })
    }

    /// The same for tables that nobody else may change while this socket is open. They outlive it, and
    /// are claimed by the next that is opened so. Goes on without where the kernel cannot do that.
    pub fn open_owning() -> Result<Self, OpenError> {
        Ok(Self { owning: true, ..Self::open()? })
    }

    fn table_flags(&self) -> u32 {
        if self.owning { OWNED } else { 0 }
    }

    /// Receives what others commit from now on, but for what [`Self::take_unheard`] tells.
    pub fn monitor(&mut self) -> Result<Monitor, OpenError> {
        let monitor = Monitor::open(self.socket.address()?)?;
        self.subscription = monitor.subscription();
        Ok(monitor)
    }

    /// Whether others have committed something that the monitor was not told of, since the last time
    /// that this was asked.
    pub fn take_unheard(&mut self) -> bool {
        std::mem::take(&mut self.unheard)
    }

    /// The number of the last commit of anyone in the network namespace.
    pub fn generation(&mut self) -> Result<u32, LoadError> {
        dump::generation(&mut self.socket)
    }

    /// The clients that an affinity map remembers, and the backend that each is held to.
    pub fn clients(
        &mut self,
        family: Family,
        name: &AffinityName,
    ) -> Result<BTreeMap<IpAddr, Backend>, LoadError> {
        affinity::clients(&mut self.socket, family, name)
    }

    /// Encodes a transaction without sending it, for benches that time the kernel alone.
    #[must_use]
    pub fn encode(transaction: &Transaction) -> Vec<u8> {
        encode::batch(transaction, Batch::begin(TABLE, Vec::new()), 0).finish().bytes
    }

    /// Sends a batch made by [`Self::encode`].
    pub fn send_encoded(&mut self, bytes: &[u8]) -> Result<(), ApplyError> {
        exchange(&mut self.socket, bytes, |_| None)
    }
}

/// Sends a batch.
fn send(socket: &mut NetlinkSocket, batch: &Batch) -> Result<(), ApplyError> {
    exchange(socket, &batch.bytes, |answer| batch.operation(answer.sequence, answer.offset))
}

/// Sends the bytes of a batch and reads what the kernel refuses of it.
fn exchange(
    socket: &mut NetlinkSocket,
    bytes: &[u8],
    operation: impl Fn(&Answer) -> Option<usize>,
) -> Result<(), ApplyError> {
    // A late answer to an earlier request would be taken for one to this batch.
    socket.discard();
    socket.send(bytes).map_err(|source| ApplyError::Socket { step: "send the batch", source })?;
    let answers = socket
        .answers()
        .map_err(|source| ApplyError::Socket { step: "read the kernel's answer", source })?;
    let refused = answers.into_iter().filter(|answer| answer.errno != 0);
    let refusals: Vec<_> = refused
        .map(|answer| Refusal {
            op: operation(&answer),
            errno: answer.errno,
            message: answer.message,
        })
        .collect();
    if refusals.is_empty() { Ok(()) } else { Err(ApplyError::Refused { refusals }) }
}

impl Kernel for NetlinkKernel {
    fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
        dump::load(&mut self.socket, options, self.owning)
    }

    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        let outcome = self.commit(TABLE, self.table_flags(), transaction);
        match &outcome {
            Ok(_) => self.forget(transaction),
            Err(refused) => self.give_up_owning(transaction, refused),
        }
        outcome
    }

    fn apply_to_stand_in(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.commit(STAND_IN, 0, transaction)
    }

    fn let_packets_pass(&mut self) {
        sleep(UNDER_WAY);
    }
}

impl NetlinkKernel {
    /// Sends a transaction about a table; one that it adds has these flags.
    fn commit(
        &mut self,
        table: &'static str,
        flags: u32,
        transaction: &Transaction,
    ) -> Result<Applied, ApplyError> {
        if transaction.is_empty() {
            return Ok(Applied::default());
        }
        let begun = Batch::begin(table, std::mem::take(&mut self.buffer));
        let mut batch = encode::batch(transaction, begun, flags).finish();
        let mut outcome = Ok(Applied { messages: batch.messages(), bytes: batch.bytes.len() });
        // A transaction that only forgets has no messages but its begin and end.
        if batch.messages() > 2
            && let Err(refused) = self.send(&batch, transaction.ops.len() >= LARGE)
        {
            outcome = Err(refused);
        }
        if batch.bytes.capacity() <= KEPT_BUFFER {
            batch.bytes.clear();
            self.buffer = batch.bytes;
        }
        outcome
    }

    /// Sends a batch; of a large one the monitor is not told.
    fn send(&mut self, batch: &Batch, large: bool) -> Result<(), ApplyError> {
        if !large {
            return send(&mut self.socket, batch);
        }
        let before = self.generation();
        let Some(paused) = self.subscription.pause() else {
            return send(&mut self.socket, batch);
        };
        let outcome = send(&mut self.socket, batch);
        drop(paused);
        let own = u32::from(outcome.is_ok());
        let alone = match (before, self.generation()) {
            (Ok(before), Ok(after)) => before.wrapping_add(own) == after,
            _ => false,
        };
        self.unheard |= !alone;
        outcome
    }

    /// A kernel that knows no owned tables refuses them; the next try does without.
    fn give_up_owning(&mut self, transaction: &Transaction, error: &ApplyError) {
        let ApplyError::Refused { refusals } = error else { return };
        let unsupported = refusals.iter().any(|refusal| {
            let op = refusal.op.and_then(|index| transaction.ops.get(index));
            matches!(op, Some(Op::AddTable(_)))
                && [libc::EOPNOTSUPP, libc::EINVAL].contains(&refusal.errno)
        });
        if self.owning && unsupported {
            self.owning = false;
            warn!(
                "this kernel knows no owned tables that persist (6.9 and later do): anybody who may change rules may change ours"
            );
        }
    }

    /// Clients that cannot be forgotten now time out, and are looked for once more when the tables
    /// were left alone for a while: no reason to take back what was committed.
    fn forget(&mut self, transaction: &Transaction) {
        for op in &transaction.ops {
            let Op::Forget(family, name, keep) = op else { continue };
            match affinity::forget(&mut self.socket, *family, name, keep) {
                Ok(clients) => {
                    debug!(%family, map = %name, clients, "forgot clients of backends that left");
                }
                Err(error) => {
                    warn!(%family, map = %name, %error, "cannot forget the clients of backends that left");
                }
            }
        }
    }
}

/// An errno of the kernel as an error that prints its name.
fn os_error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

#[expect(
    clippy::disallowed_methods,
    reason = "readings that others wait for have a budget of time"
)]
fn now() -> Instant {
    Instant::now()
}
