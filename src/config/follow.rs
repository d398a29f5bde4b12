//! Following the file: what can change while the program runs is changed, for the rest the log says
//! that a restart is needed.
//!
//! kube-proxy ends when its file is written, and does not notice that a `ConfigMap` volume was swapped:
//! that replaces a symbolic link beside the file. So the directory is watched and the content compared.
//! A file that cannot be used changes nothing; notifications can be missed, hence the slow poll.

use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tracing::{error, info, warn};

use super::field::{Effect, FIELDS};
use super::{Flags, Live, Loaded, Remark, Values, file, finish};

/// Writers do it in several steps.
const QUIET: Duration = Duration::from_millis(50);

/// How often it is read without a notification.
const POLL: Duration = Duration::from_secs(60);

/// How often, when there are no notifications.
const POLL_ONLY: Duration = Duration::from_secs(1);

/// Calls `apply` for every change that can take effect, until that returns false. Blocks, for which it
/// needs a thread of its own. Returns at once if there is no file.
pub fn follow(flags: &Flags, loaded: Loaded, mut apply: impl FnMut(&Live) -> bool) {
    let Some(path) = &flags.config else { return };
    let (sender, news) = channel();
    // Dropped, it would not watch any more.
    let watcher = watch(path, move || {
        let _ = sender.send(());
    });
    let watcher = watcher
        .inspect_err(|error| {
            let file = path.display();
            warn!(%file, %error, "no notifications of changes; looking every second");
        })
        .ok();
    let poll = if watcher.is_some() { POLL } else { POLL_ONLY };
    let mut followed = Followed::new(flags, loaded);
    loop {
        if let Some(live) = followed.look(path)
            && !apply(&live)
        {
            return;
        }
        wait(&news, poll);
    }
}

fn watch(path: &Path, notice: impl Fn() + Send + 'static) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
        // Our own reading is an access, too. An error is news: something may have been missed.
        if !event.is_ok_and(|e| matches!(e.kind, EventKind::Access(_)) && e.kind != closed) {
            notice();
        }
    })?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    watcher.watch(parent.unwrap_or(Path::new(".")), RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

/// Waits for news and for the end of them.
fn wait(news: &Receiver<()>, poll: Duration) {
    match news.recv_timeout(poll) {
        // A directory where there is always something must not hold it up.
        Ok(()) => drop((0..20).take_while(|_| news.recv_timeout(QUIET).is_ok()).count()),
        Err(RecvTimeoutError::Timeout) => {}
        // There are no notifications.
        Err(RecvTimeoutError::Disconnected) => std::thread::sleep(poll),
    }
}

/// What is in force, and what was said about the file.
struct Followed<'a> {
    flags: &'a Flags,
    loaded: Loaded,
    /// What was read last.
    text: Option<Result<String, String>>,
}

impl<'a> Followed<'a> {
    fn new(flags: &'a Flags, loaded: Loaded) -> Self {
        Self { flags, loaded, text: None }
    }

    /// Reads the file. Returns what is to take effect, if anything is.
    fn look(&mut self, path: &Path) -> Option<Live> {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string());
        if self.text.as_ref() == Some(&text) {
            return None;
        }
        self.text = Some(text.clone());
        let outcome = match text {
            Err(error) => Err(format!("{}: cannot read it: {error}", path.display())),
            Ok(text) => self.load(path, &text).map_err(|error| error.to_string()),
        };
        match outcome {
            Err(error) => {
                error!("{error}; the configuration stays as it is");
                None
            }
            Ok(loaded) => self.take(loaded),
        }
    }

    fn load(&self, path: &Path, text: &str) -> Result<Loaded, super::ConfigError> {
        let mut remarks = Vec::new();
        let file = file::parse(path, text, &mut remarks)?;
        finish(self.flags, Some(&file), remarks)
    }

    fn take(&mut self, loaded: Loaded) -> Option<Live> {
        let before = std::mem::replace(&mut self.loaded, loaded);
        let now = &self.loaded;
        now.remarks.iter().filter(|r| !before.remarks.contains(r)).for_each(Remark::log);
        for change in changes(&before.values, &now.values) {
            let Change { path, from, to, needs_restart } = change;
            if needs_restart {
                warn!("{path}: {from} is now {to}: this takes effect when nftproxy is restarted");
            } else {
                info!("{path}: {from} is now {to}");
            }
        }
        (before.config.live != now.config.live).then(|| now.config.live.clone())
    }
}

/// A setting that changed.
struct Change {
    path: &'static str,
    from: String,
    to: String,
    needs_restart: bool,
}

fn changes(before: &Values, now: &Values) -> Vec<Change> {
    let changed = FIELDS.iter().filter_map(|field| {
        let (from, to) = (&before.get(field.path).value, &now.get(field.path).value);
        let needs_restart = match field.effect {
            Effect::Live => false,
            Effect::Start => true,
            Effect::None(_) => return None,
        };
        let (from, to) = (from != to).then(|| (from.to_string(), to.to_string()))?;
        Some(Change { path: field.path, from, to, needs_restart })
    });
    changed.collect()
}
