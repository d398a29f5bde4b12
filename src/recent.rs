//! What was programmed lately, and for whom: the last batches, for an operator to read.
//!
//! The thread that programs the kernel leaves here what it has at hand anyway: the first operations of
//! each batch and the first objects it was for. Nothing is put into words before somebody asks.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::contribution::Contributor;
use crate::nft::netlink::Intrusion;
use crate::nft::text;
use crate::nft::transaction::Op;

/// Batches that are kept.
const BATCHES: usize = 256;

/// Operations of a batch that are kept.
const OPERATIONS: usize = 12;

/// Objects of a batch that are named.
const OBJECTS: usize = 8;

/// What a commit was about, without time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    objects: Vec<Contributor>,
    more_objects: usize,
    operations: Vec<Op>,
}

impl Trace {
    /// A commit for these objects, with these operations.
    #[must_use]
    pub fn new(objects: &[Contributor], mut operations: Vec<Op>) -> Self {
        operations.truncate(OPERATIONS);
        // Thousands of batches may come and go until one is looked at, and the first can be huge.
        operations.shrink_to_fit();
        Self {
            objects: objects.iter().take(OBJECTS).cloned().collect(),
            more_objects: objects.len().saturating_sub(OBJECTS),
            operations,
        }
    }

    /// Those of the first operations that are looked at to tell for whom a batch was.
    #[must_use]
    pub fn telling(operations: &[Op]) -> &[Op] {
        &operations[..operations.len().min(OPERATIONS)]
    }
}

/// Why a batch was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Objects changed.
    Change,
    /// Everything was read back and compared: at the start, or after a commit that failed.
    Sync,
    /// Somebody else changed the tables.
    Repair(Intrusion),
    /// Something stood idle.
    Collection,
}

/// One batch, or the attempt at one.
#[derive(Clone, Debug)]
pub struct Batch {
    /// When it was in force.
    pub at: Timestamp,
    /// Why it was made.
    pub cause: Cause,
    /// What it was about.
    pub trace: Trace,
    /// Operations in all.
    pub operations: usize,
    /// What went over the socket.
    pub bytes: usize,
    /// How long it took.
    pub took: Duration,
    /// How long the oldest change had waited by its end.
    pub waited: Option<Duration>,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// A batch in words.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BatchRow {
    /// Counted from the start of the program, from 1 on.
    pub number: u64,
    /// When it was in force.
    pub at: Timestamp,
    /// `change`, `sync`, `repair` or `collection`.
    pub cause: String,
    /// The process whose changes were put right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// The first of the objects it was for.
    pub objects: Vec<String>,
    /// How many further ones.
    pub more_objects: usize,
    /// Operations in all.
    pub operations: usize,
    /// What went over the socket.
    pub bytes: usize,
    /// How long it took, in milliseconds.
    pub took_ms: f64,
    /// From the first event that it waited for until it was in force, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_to_kernel_ms: Option<f64>,
    /// The first operations, as nft text behind `+` or `-`.
    pub changes: Vec<String>,
    /// How many further operations.
    pub more_changes: usize,
    /// Why it failed, if it did; the kernel keeps what it had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What `/debug/recent` answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RecentRows {
    /// When the program started; another value means that it was started anew.
    pub started: Timestamp,
    /// Number of the newest batch.
    pub newest: u64,
    /// Objects that the kernel refuses to change.
    pub set_aside: Vec<String>,
    /// Batches, the oldest first.
    pub batches: Vec<BatchRow>,
}

/// The last batches.
#[derive(Debug)]
pub struct Recent {
    started: Timestamp,
    held: Mutex<Held>,
    newest: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Held {
    /// With their numbers.
    batches: VecDeque<(u64, Arc<Batch>)>,
    set_aside: Vec<Contributor>,
}

impl Recent {
    /// None yet.
    #[must_use]
    pub fn new(started: Timestamp) -> Self {
        Self { started, held: Mutex::default(), newest: watch::Sender::new(0) }
    }

    /// When the program started.
    #[must_use]
    pub fn started(&self) -> Timestamp {
        self.started
    }

    /// Keeps a batch, and what is set aside now.
    pub fn push(&self, batch: Batch, set_aside: Vec<Contributor>) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let number = *self.newest.borrow() + 1;
        if held.batches.len() == BATCHES {
            held.batches.pop_front();
        }
        held.batches.push_back((number, Arc::new(batch)));
        held.set_aside = set_aside;
        drop(held);
        self.newest.send_replace(number);
    }

    /// Tells when there are newer ones.
    #[must_use]
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    /// Those behind a number, in words.
    #[must_use]
    pub fn after(&self, number: u64) -> RecentRows {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = held.batches.back().map_or(0, |(newest, _)| *newest);
        let found: Vec<_> = held.batches.iter().filter(|(n, _)| *n > number).cloned().collect();
        let set_aside = held.set_aside.iter().map(ToString::to_string).collect();
        // Words take time, and the programming thread must not wait for them.
        drop(held);
        let batches = found.iter().map(|(number, batch)| row(*number, batch)).collect();
        RecentRows { started: self.started, newest, set_aside, batches }
    }
}

fn row(number: u64, batch: &Batch) -> BatchRow {
    let Batch { at, cause, trace, operations, bytes, took, waited, error } = batch;
    let (cause, author) = match cause {
        Cause::Change => ("change", None),
        Cause::Sync => ("sync", None),
        Cause::Collection => ("collection", None),
        Cause::Repair(intrusion) => ("repair", Some(author(intrusion))),
    };
    let ms = |duration: &Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
    BatchRow {
        number,
        at: *at,
        cause: cause.to_owned(),
        author,
        objects: trace.objects.iter().map(ToString::to_string).collect(),
        more_objects: trace.more_objects,
        operations: *operations,
        bytes: *bytes,
        took_ms: ms(took),
        event_to_kernel_ms: waited.as_ref().map(ms),
        changes: trace.operations.iter().flat_map(text::change).collect(),
        more_changes: operations.saturating_sub(trace.operations.len()),
        error: error.clone(),
    }
}

fn author(intrusion: &Intrusion) -> String {
    let process = intrusion.process.as_deref().unwrap_or("an unknown process");
    intrusion.pid.map_or_else(|| process.to_owned(), |pid| format!("{process} (process {pid})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Family, NamespacedName};

    fn batch(objects: usize, operations: usize) -> Batch {
        let object = |n| Contributor::Service(NamespacedName::new("default", &format!("s{n}")));
        let objects: Vec<_> = (0..objects).map(object).collect();
        let op = |n| Op::DeleteChain(Family::V4, format!("c{n}"));
        Batch {
            at: Timestamp::UNIX_EPOCH,
            cause: Cause::Change,
            trace: Trace::new(&objects, (0..operations).map(op).collect()),
            operations,
            bytes: 7,
            took: Duration::from_micros(1500),
            waited: None,
            error: None,
        }
    }

    #[test]
    fn what_is_kept_of_a_batch_and_of_batches_is_bounded() {
        let recent = Recent::new(Timestamp::UNIX_EPOCH);
        let newest = recent.newest();
        for _ in 0..BATCHES + 10 {
            recent.push(batch(1000, 1000), Vec::new());
        }
        assert_eq!(*newest.borrow(), 266);
        let rows = recent.after(0);
        assert_eq!((rows.newest, rows.batches.len()), (266, BATCHES));
        let last = rows.batches.last().unwrap();
        assert_eq!((last.number, last.operations, last.took_ms), (266, 1000, 1.5));
        assert_eq!((last.objects.len(), last.more_objects), (OBJECTS, 1000 - OBJECTS));
        assert_eq!((last.changes.len(), last.more_changes), (OPERATIONS, 1000 - OPERATIONS));
        assert!(last.changes[0].starts_with("- "), "{:?}", last.changes);
        assert_eq!(recent.after(264).batches.len(), 2);
        assert!(recent.after(266).batches.is_empty());
    }

    #[test]
    fn a_repair_names_its_author() {
        let pid = Some(7);
        let named = Intrusion { changes: 1, process: Some("nft".into()), pid };
        assert_eq!(author(&named), "nft (process 7)");
        assert_eq!(author(&Intrusion::default()), "an unknown process");
    }
}
