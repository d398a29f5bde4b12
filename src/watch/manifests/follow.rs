//! Noticing that a directory changed, soon but not too soon.
//!
//! Editors write a file several times, and tools truncate it first and fill it later. A change is
//! passed on when the directory has been quiet for a moment, and a file that is open for writing is
//! held back until it is closed. Kernel notifications can be missed (network file systems, targets
//! of symlinks elsewhere, no inotify instance left), so there is a slow poll underneath.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind, RenameMode};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

/// How long the directory has to be quiet.
const QUIET: Duration = Duration::from_millis(20);
/// How long a change waits for quiet at most.
const LONGEST_WAIT: Duration = Duration::from_millis(200);
/// How long a file that somebody writes to is held back after the last write.
const WRITER_PATIENCE: Duration = Duration::from_secs(1);
/// How often the directory is looked at without a notification.
const POLL: Duration = Duration::from_secs(10);
/// How often, when there are no notifications.
const POLL_ONLY: Duration = Duration::from_secs(1);

/// Files to look at.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// To be read again, whatever their time stamps say: two writes can fall into one tick.
    pub(super) changed: BTreeSet<OsString>,
    /// To be left alone for now: somebody is writing to them.
    pub(super) held: BTreeSet<OsString>,
}

/// A directory that is watched.
pub(super) struct Follower {
    /// Watches for as long as it lives; `None` if notifications cannot be had.
    watcher: Option<RecommendedWatcher>,
    seen: Arc<Seen>,
}

/// What notifications said since it was last asked for.
#[derive(Default)]
struct Seen {
    files: Mutex<Files>,
    news: Notify,
}

#[derive(Default)]
struct Files {
    changed: BTreeSet<OsString>,
    /// Being written to, and when last.
    written: BTreeMap<OsString, Instant>,
    /// Number of notifications so far.
    count: u64,
}

impl Follower {
    /// Watches a directory. Without notifications it is polled.
    pub(super) fn new(dir: &Path) -> Self {
        let seen = Arc::<Seen>::default();
        let watcher = notify::recommended_watcher({
            let seen = seen.clone();
            move |event| seen.take(event)
        })
        .and_then(|mut watcher| {
            watcher.watch(dir, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        let watcher = watcher
            .inspect_err(|error| {
                tracing::warn!(
                    dir = %dir.display(),
                    %error,
                    "no notifications of changes; looking every second"
                );
            })
            .ok();
        Self { watcher, seen }
    }

    /// Waits until there may be something to read.
    pub(super) async fn next(&self) -> Touched {
        let writer_done = self.seen.lock().written.values().min().map(|t| *t + WRITER_PATIENCE);
        let poll = if self.watcher.is_some() { POLL } else { POLL_ONLY };
        let poll = Instant::now() + poll;
        tokio::select! {
            () = self.seen.news.notified() => {}
            () = sleep_until(writer_done.map_or(poll, |done| done.min(poll))) => {}
        }
        let deadline = Instant::now() + LONGEST_WAIT;
        loop {
            let before = self.seen.lock().count;
            sleep(QUIET).await;
            if self.seen.lock().count == before || Instant::now() >= deadline {
                break;
            }
        }
        let mut files = self.seen.lock();
        let now = Instant::now();
        let mut touched = Touched { changed: std::mem::take(&mut files.changed), ..<_>::default() };
        files.written.retain(|name, last| {
            let held = now.duration_since(*last) < WRITER_PATIENCE;
            let list = if held { &mut touched.held } else { &mut touched.changed };
            list.insert(name.clone());
            held
        });
        touched.changed.retain(|name| !touched.held.contains(name));
        touched
    }
}

impl Seen {
    fn lock(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, event: notify::Result<notify::Event>) {
        let mut files = self.lock();
        if let Ok(event) = event {
            let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
            // Our own reading is an access, too.
            if matches!(event.kind, EventKind::Access(_)) && event.kind != closed {
                return;
            }
            for name in event.paths.iter().filter_map(|path| path.file_name()) {
                match event.kind {
                    EventKind::Modify(ModifyKind::Data(_)) => {
                        files.written.insert(name.to_owned(), Instant::now());
                    }
                    EventKind::Modify(ModifyKind::Name(RenameMode::Both)) => {}
                    _ => {
                        if event.kind == closed
                            || matches!(event.kind, EventKind::Modify(ModifyKind::Name(_)))
                            || matches!(event.kind, EventKind::Remove(_))
                        {
                            files.written.remove(name);
                        }
                        files.changed.insert(name.to_owned());
                    }
                }
            }
        }
        // An error is news, too: something may have been missed.
        files.count += 1;
        drop(files);
        self.news.notify_one();
    }
}
