//! The real kernel, over one netlink socket that stays open for life.
//!
//! A transaction becomes one buffer, sent with one call, answered before that call returns; what the
//! kernel refuses is mapped back to the operation by the message's sequence number and the offset in
//! it. Everything `unsafe` of the crate is in this folder: `ffi` wraps libnftnl's objects,
//! `batch` writes messages, `socket` sends them.

mod batch;
mod dump;
mod encode;
mod ffi;
mod instruction;
mod socket;
mod userdata;

use std::io;

pub use self::socket::OpenError;

use self::batch::Batch;
use self::socket::NetlinkSocket;
use super::dataplane::Options;
use super::kernel::{Applied, ApplyError, Kernel, LoadError, Loaded, Refusal};
use super::transaction::Transaction;

/// The nf_tables of the network namespace it was opened in.
#[derive(Debug)]
pub struct NetlinkKernel {
    socket: NetlinkSocket,
    /// Kept between commits, so that small ones allocate nothing.
    buffer: Vec<u8>,
}

/// Buffers up to this size are kept for the next commit.
const KEPT_BUFFER: usize = 1 << 20;

impl NetlinkKernel {
    /// Opens the socket. Needs `CAP_NET_ADMIN` in the namespace's user namespace.
    pub fn open() -> Result<Self, OpenError> {
        Ok(Self { socket: NetlinkSocket::open()?, buffer: Vec::new() })
    }

    /// Encodes a transaction without sending it, for benches that time the kernel alone.
    #[must_use]
    pub fn encode(transaction: &Transaction) -> Vec<u8> {
        encode::batch(transaction, Batch::begin(Vec::new())).finish().bytes
    }

    /// Sends a batch made by [`Self::encode`].
    pub fn send_encoded(&mut self, bytes: &[u8]) -> Result<(), ApplyError> {
        self.socket
            .send(bytes)
            .map_err(|source| ApplyError::Socket { step: "send the batch", source })?;
        let answers = self.answers()?;
        let refusals: Vec<_> = answers
            .into_iter()
            .filter(|answer| answer.errno != 0)
            .map(|answer| Refusal { op: None, errno: answer.errno, message: answer.message })
            .collect();
        if refusals.is_empty() { Ok(()) } else { Err(ApplyError::Refused { refusals }) }
    }

    fn answers(&mut self) -> Result<Vec<socket::Answer>, ApplyError> {
        self.socket
            .answers()
            .map_err(|source| ApplyError::Socket { step: "read the kernel's answer", source })
    }
}

impl Kernel for NetlinkKernel {
    fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
        dump::load(&mut self.socket, options)
    }

    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        if transaction.is_empty() {
            return Ok(Applied::default());
        }
        let mut batch =
            encode::batch(transaction, Batch::begin(std::mem::take(&mut self.buffer))).finish();
        // A late answer to an earlier request would be taken for one to this batch.
        self.socket.discard();
        let sent = self.socket.send(&batch.bytes);
        let applied = Applied { messages: batch.messages(), bytes: batch.bytes.len() };
        let outcome = match sent {
            Err(source) => Err(ApplyError::Socket { step: "send the batch", source }),
            Ok(()) => self.answers().and_then(|answers| {
                let refused = answers.iter().filter(|answer| answer.errno != 0);
                let refusals: Vec<_> = refused
                    .map(|answer| Refusal {
                        op: batch.operation(answer.sequence, answer.offset),
                        errno: answer.errno,
                        message: answer.message.clone(),
                    })
                    .collect();
                if refusals.is_empty() {
                    Ok(applied)
                } else {
                    Err(ApplyError::Refused { refusals })
                }
            }),
        };
        if batch.bytes.capacity() <= KEPT_BUFFER {
            batch.bytes.clear();
            self.buffer = batch.bytes;
        }
        outcome
    }
}

/// An errno of the kernel as an error that prints its name.
fn os_error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}
