//! Removal of UDP flows that connection tracking would keep sending to an endpoint that is gone.
//!
//! Translation is decided once for a flow, by its first packet. A UDP flow lives as long as its client
//! keeps sending, so after its endpoint went it would be sent nowhere for ever, and one that began
//! before its Service had rules would never reach an endpoint. Such flows are deleted from the
//! kernel's table; the next datagram of the same socket is a new flow, and is balanced anew. TCP and
//! SCTP flows are never touched: their ends notice, and decide themselves.
//!
//! Two halves. Pure: [`Serving`] remembers which endpoints every UDP frontend may be answered by, and
//! turns what a commit changed into a [`Sweep`], which judges a [`Flow`]. I/O: [`Sweeper`], a thread
//! that lists the kernel's flows, filtered in the kernel, judges them one by one as they come, and
//! deletes the stale ones, while commits go on.

mod flows;
mod message;
mod serving;
mod socket;
mod sweep;
mod sweeper;

pub use flows::SweepError;
pub use serving::{Serving, serving_endpoints, udp_frontends};
pub use sweep::{Culprit, Endpoints, Filter, Flow, NodePortAddresses, Sweep, Tuple, endpoints};
pub use sweeper::{Counters, Pass, Sweeper};

/// Reads bytes as answers to a listing.
#[cfg(fuzzing)]
pub(crate) fn fuzz(bytes: &[u8]) {
    message::messages(bytes).for_each(drop);
}
