//! The kernel's flows: one pass over those of a family, deleting what a sweep calls stale.
//!
//! A listing is judged piece by piece as the kernel hands it out, which it does no faster than it is
//! read: neither side ever holds the table, which may have millions of entries, in memory. What is
//! stale is deleted in small batches meanwhile, over a second socket, so that answers to deletions
//! and pieces of the listing cannot be mixed up.

use std::collections::BTreeMap;

use nix::errno::Errno;

use super::message::{self, Message};
use super::socket::Socket;
use super::sweep::{Culprit, Filter, Flow, Sweep};

/// Deletions sent at once; that many refusals still fit the receive buffer a socket has by default.
const BATCH: usize = 128;

/// A sweep that has to be done again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SweepError {
    /// No socket.
    #[error("cannot open a netlink socket: {}", .0.desc())]
    Open(Errno),
    /// The host's addresses, of which node ports are, cannot be read.
    #[error("cannot read the host's addresses: {}", .0.desc())]
    Addresses(Errno),
    /// The listing failed or broke off.
    #[error("cannot list the kernel's flows: {}", .0.desc())]
    List(Errno),
    /// The table changed its size under the listing, which may lack flows.
    #[error("the listing of the kernel's flows was interrupted")]
    Interrupted,
    /// A flow could not be deleted.
    #[error("cannot delete a flow: {}", .0.desc())]
    Delete(Errno),
    /// Older kernels do not delete a flow while a flowtable forwards it.
    #[error("{0} stale flows are held by a flowtable")]
    Offloaded(u64),
}

/// A flow to be deleted, and where it was going.
pub(super) type Stale<'a> = (Flow, Culprit<'a>);

/// What a pass found, also if it failed halfway.
#[derive(Debug, Default)]
pub(super) struct Found<'a> {
    /// Flows the kernel listed.
    pub(super) listed: u64,
    /// Of these, those that could not be read, or have no ports.
    pub(super) other: u64,
    /// Deleted flows, by where they went.
    pub(super) deleted: BTreeMap<Culprit<'a>, u64>,
    /// Stale flows that a flowtable holds.
    offloaded: u64,
}

/// The two sockets.
#[derive(Debug)]
pub(super) struct Flows {
    listing: Socket,
    deleting: Socket,
    sequence: u32,
    /// Kernels before 5.8 know no filter but the family, and say so or ignore it.
    filters: bool,
}

impl Flows {
    pub(super) fn open() -> Result<Self, SweepError> {
        let open = || Socket::open().map_err(SweepError::Open);
        Ok(Self { listing: open()?, deleting: open()?, sequence: 0, filters: true })
    }

    /// Deletes the stale flows of a family, but for those that `spare` takes out again: by then, more
    /// may be known. After an error the sockets are not to be used again.
    pub(super) fn pass<'a>(
        &mut self,
        sweep: &'a Sweep,
        filter: &Filter,
        spare: &dyn Fn(&mut Vec<Stale<'a>>),
        found: &mut Found<'a>,
    ) -> Result<(), SweepError> {
        match self.list(sweep, filter, spare, found) {
            Err(SweepError::List(Errno::EINVAL | Errno::EOPNOTSUPP)) if self.filters => {
                self.filters = false;
                self.list(sweep, filter, spare, found)?;
            }
            outcome => outcome?,
        }
        match found.offloaded {
            0 => Ok(()),
            count => Err(SweepError::Offloaded(count)),
        }
    }

    fn list<'a>(
        &mut self,
        sweep: &'a Sweep,
        filter: &Filter,
        spare: &dyn Fn(&mut Vec<Stale<'a>>),
        found: &mut Found<'a>,
    ) -> Result<(), SweepError> {
        self.sequence += 1;
        let request = message::list(self.sequence, filter, self.filters);
        self.listing.send(&request).map_err(SweepError::List)?;
        let mut batch = Vec::with_capacity(BATCH);
        let mut delete = |batch: &mut Vec<_>, found: &mut Found<'a>| {
            spare(batch);
            let deleted = delete(&mut self.deleting, batch, found);
            batch.clear();
            deleted
        };
        let mut consistent = true;
        loop {
            let piece = self.listing.receive().map_err(SweepError::List)?;
            for (message, interrupted) in message::messages(piece) {
                consistent &= !interrupted;
                match message {
                    Message::Flow(flow) => {
                        found.listed += 1;
                        if let Some(culprit) = sweep.stale(&flow) {
                            batch.push((flow, culprit));
                            if batch.len() == BATCH {
                                delete(&mut batch, found)?;
                            }
                        }
                    }
                    Message::Other => found.other += 1,
                    Message::Done(0) => {
                        delete(&mut batch, found)?;
                        return if consistent { Ok(()) } else { Err(SweepError::Interrupted) };
                    }
                    Message::Done(errno) | Message::Answer { errno, .. } => {
                        delete(&mut batch, found)?;
                        return Err(match Errno::from_raw(errno) {
                            Errno::EINTR => SweepError::Interrupted,
                            errno => SweepError::List(errno),
                        });
                    }
                }
            }
        }
    }
}

/// Deletes flows, at most [`BATCH`], and counts what went.
fn delete<'a>(
    socket: &mut Socket,
    batch: &[Stale<'a>],
    found: &mut Found<'a>,
) -> Result<(), SweepError> {
    if batch.is_empty() {
        return Ok(());
    }
    let mut requests = Vec::new();
    for (sequence, (flow, _)) in (0..).zip(batch) {
        message::delete(&mut requests, sequence, flow);
    }
    socket.send(&requests).map_err(SweepError::Delete)?;
    let mut kept = [false; BATCH];
    let mut refused = None;
    while let Some(piece) = socket.receive_queued().map_err(SweepError::Delete)? {
        for (message, _) in message::messages(piece) {
            let Message::Answer { sequence, errno } = message else { continue };
            if let Some(kept) = kept.get_mut(sequence as usize) {
                *kept = true;
            }
            match Errno::from_raw(errno) {
                // It ended by itself, or was listed twice.
                Errno::ENOENT => {}
                Errno::EBUSY => found.offloaded += 1,
                errno => refused = Some(errno),
            }
        }
    }
    for ((_, culprit), _) in batch.iter().zip(kept).filter(|(_, kept)| !kept) {
        *found.deleted.entry(*culprit).or_default() += 1;
    }
    refused.map_or(Ok(()), |errno| Err(SweepError::Delete(errno)))
}
