//! Changes of our tables by others, and when they are put right.
//!
//! The kernel tells every commit; a thread of its own waits for those of others that touch our tables.
//! The first is answered at once. Two programs that undo each other's work would do so for ever, so
//! that a repair soon after another waits longer each time.

use std::time::Duration;

use tokio::sync::mpsc::{Receiver, channel};
use tokio::time::Instant;
use tracing::{debug, error, warn};

use crate::nft::netlink::{Intrusion, Monitor};
use crate::reconcile::{CommitError, Committed};

/// Intrusions on their way; further ones are taken with the next repair.
const QUEUE: usize = 16;

/// Repairs that follow each other within this time are slowed down.
const FLAPPING: Duration = Duration::from_secs(10);

/// The pause after the second of such repairs; doubled up to [`FLAPPING`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// A repair is followed by a pause of at least this many times what it took.
const SHARE: u32 = 5;

/// Starts a thread that reports intrusions.
pub fn watch(mut monitor: Monitor) -> std::io::Result<Receiver<Intrusion>> {
    let (sender, receiver) = channel(QUEUE);
    std::thread::Builder::new().name("drift".into()).spawn(move || {
        loop {
            match monitor.wait() {
                Ok(intrusion) => {
                    if sender.blocking_send(intrusion).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    error!(%error, "changes that others make to our tables are no longer seen");
                    return;
                }
            }
        }
    })?;
    Ok(receiver)
}

/// What is to be put right, and when.
#[derive(Debug)]
pub struct Repairs {
    waiting: Option<Intrusion>,
    not_before: Instant,
    last: Option<Instant>,
    pause: Duration,
}

impl Repairs {
    /// Nothing to do yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { waiting: None, not_before: now, last: None, pause: Duration::ZERO }
    }

    /// Somebody changed our tables.
    pub fn add(&mut self, intrusion: Intrusion) {
        let earlier = self.waiting.take().map_or(0, |earlier| earlier.changes);
        self.waiting = Some(Intrusion { changes: earlier + intrusion.changes, ..intrusion });
    }

    /// When to put it right.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.waiting.as_ref().map(|_| self.not_before)
    }

    /// What is to be put right.
    #[must_use]
    pub fn waiting(&self) -> Option<&Intrusion> {
        self.waiting.as_ref()
    }

    /// It was tried. A repair that failed is due again.
    pub fn done(&mut self, began: Instant, now: Instant, outcome: &Result<Committed, CommitError>) {
        let took = now - began;
        let flapping = self.last.replace(now).is_some_and(|last| began - last < FLAPPING);
        self.pause =
            if flapping { (self.pause * 2).clamp(FIRST_PAUSE, FLAPPING) } else { Duration::ZERO };
        self.not_before = now + (took * SHARE).max(self.pause);
        let Some(intrusion) = self.waiting.take() else { return };
        let Intrusion { changes, process, pid } = &intrusion;
        let process = process.as_deref().unwrap_or("unknown");
        match outcome {
            Ok(done) if done.operations > 0 => {
                let operations = done.operations;
                warn!(
                    process,
                    pid,
                    changes,
                    operations,
                    ?took,
                    "somebody else changed our tables; they are put right"
                );
            }
            Ok(_) => debug!(process, pid, changes, "somebody else touched our tables"),
            Err(error) => {
                warn!(process, pid, changes, %error, "somebody else changed our tables");
                self.waiting = Some(intrusion);
                self.pause = self.pause.max(FIRST_PAUSE);
                self.not_before = now + self.pause;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_repair_is_due_at_once_and_flapping_ones_ever_later() {
        let mut now = Instant::now();
        let mut repairs = Repairs::new(now);
        assert_eq!(repairs.due(), None);
        let mut pauses = Vec::new();
        for _ in 0..10 {
            repairs.add(Intrusion::default());
            let due = repairs.due().unwrap();
            pauses.push((due - now).as_millis());
            now = due.max(now);
            repairs.done(now, now, &Ok(Committed::default()));
            assert_eq!(repairs.due(), None);
        }
        assert_eq!(pauses, [0, 0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000]);
        // A quiet time makes it fast again.
        now += FLAPPING * 2;
        repairs.add(Intrusion::default());
        assert!(repairs.due().unwrap() <= now);
        repairs.done(now, now, &Ok(Committed::default()));
        repairs.add(Intrusion::default());
        assert!(repairs.due().unwrap() <= now);
    }

    #[test]
    fn what_failed_is_due_again_and_what_comes_meanwhile_is_added() {
        let now = Instant::now();
        let mut repairs = Repairs::new(now);
        repairs.add(Intrusion { changes: 1, ..Intrusion::default() });
        repairs.add(Intrusion { changes: 2, process: Some("nft".into()), pid: Some(7) });
        let waiting = repairs.waiting.clone().unwrap();
        assert_eq!((waiting.changes, waiting.pid), (3, Some(7)));
        let source = crate::nft::kernel::ApplyError::Socket {
            step: "send the batch",
            source: std::io::ErrorKind::OutOfMemory.into(),
        };
        repairs.done(now, now, &Err(CommitError::Apply { operations: 1, source }));
        assert_eq!(repairs.due(), Some(now + FIRST_PAUSE));
    }
}
