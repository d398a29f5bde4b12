//! What was read of the files of a directory, and whose word counts for an object that several name.
//!
//! No file is looked at here: new states of files come in, and what changes by them comes out.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;

use super::decode::{Contents, label};
use crate::model::{Event, Kind, NamespacedName, Problem};

/// An object, wherever it is written.
type Key = (Kind, NamespacedName);

/// What tells one state of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// A file, and what of it is in force.
#[derive(Debug, Default)]
pub(super) struct ManifestFile {
    pub(super) stamp: Option<Stamp>,
    /// Its objects, by its last good state.
    pub(super) objects: BTreeMap<Key, Option<Event>>,
    pub(super) ignored: usize,
    /// What was said about it.
    pub(super) problems: Vec<Problem>,
    /// Whether its present state does not count.
    pub(super) broken: bool,
}

impl ManifestFile {
    /// A file that counts. Of an object it holds twice, the first one does.
    pub(super) fn good(contents: Contents) -> Self {
        let Contents { objects, mut problems, ignored } = contents;
        let mut by_key = BTreeMap::new();
        for object in objects {
            let key = (object.kind, object.name);
            match by_key.entry(key) {
                Entry::Vacant(entry) => {
                    entry.insert(object.event);
                }
                Entry::Occupied(entry) => problems.push(Problem {
                    object: format!("{} {}", entry.key().0, entry.key().1),
                    field: String::new(),
                    message: "is twice in one file; the first one counts".to_owned(),
                }),
            }
        }
        Self { stamp: None, objects: by_key, ignored, problems, broken: false }
    }
}

/// What a look at the directory brought.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) events: Vec<Event>,
    /// Problems that were not there before.
    pub(super) problems: Vec<Problem>,
    /// Files that count again.
    pub(super) mended: Vec<String>,
}

/// The files, and who says what of them.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) files: BTreeMap<OsString, ManifestFile>,
    /// Which files hold an object; the first one's counts.
    claims: BTreeMap<Key, BTreeSet<OsString>>,
    /// Which of them were reported as second ones.
    doubled: BTreeMap<Key, BTreeSet<OsString>>,
}

impl Held {
    /// Puts new states of files in force, all at once, so that an object that moved from one file
    /// to another never goes.
    pub(super) fn replace(&mut self, fresh: BTreeMap<OsString, Option<ManifestFile>>) -> Changes {
        let mut changes = Changes::default();
        let mut keys: BTreeSet<Key> = BTreeSet::new();
        for (name, file) in &fresh {
            let old = self.files.get(name);
            keys.extend(old.into_iter().chain(file).flat_map(|file| file.objects.keys().cloned()));
        }
        let before: Vec<Option<Event>> = keys.iter().map(|key| self.in_force(key)).collect();

        for (name, file) in fresh {
            if let Some(old) = self.files.get(&name) {
                for key in old.objects.keys() {
                    if let Some(claims) = self.claims.get_mut(key) {
                        claims.remove(&name);
                    }
                }
            }
            let Some(file) = file else {
                self.files.remove(&name);
                continue;
            };
            for key in file.objects.keys() {
                self.claims.entry(key.clone()).or_default().insert(name.clone());
            }
            let old = self.files.get(&name);
            let said = old.map(|old| old.problems.as_slice()).unwrap_or_default();
            changes.problems.extend(file.problems.iter().filter(|p| !said.contains(p)).cloned());
            if old.is_some_and(|old| old.broken) && !file.broken {
                changes.mended.push(label(&name));
            }
            self.files.insert(name, file);
        }

        for (key, before) in keys.into_iter().zip(before) {
            let now = self.in_force(&key);
            self.report_doubles(&key, &mut changes.problems);
            match now {
                now if now == before => {}
                Some(event) => changes.events.push(event),
                None => changes.events.push(Event::Gone(key.0, key.1)),
            }
        }
        changes
    }

    /// What the first file that holds an object says about it.
    fn in_force(&self, key: &Key) -> Option<Event> {
        let first = self.claims.get(key)?.first()?;
        self.files.get(first)?.objects.get(key)?.clone()
    }

    /// Says that an object is in several files, once for each file that does not count.
    fn report_doubles(&mut self, key: &Key, problems: &mut Vec<Problem>) {
        let claims = self.claims.get(key).filter(|claims| !claims.is_empty());
        let Some(claims) = claims else {
            self.claims.remove(key);
            self.doubled.remove(key);
            return;
        };
        let mut names = claims.iter();
        let Some(first) = names.next() else { return };
        let others: BTreeSet<OsString> = names.cloned().collect();
        if others.is_empty() {
            self.doubled.remove(key);
            return;
        }
        let said = self.doubled.get(key);
        for other in others.iter().filter(|other| said.is_none_or(|said| !said.contains(*other))) {
            problems.push(Problem {
                object: format!("{}, {} {}", label(other), key.0, key.1),
                field: String::new(),
                message: format!(
                    "is in {}, too, and that one counts; this one takes over when that one goes",
                    label(first)
                ),
            });
        }
        self.doubled.insert(key.clone(), others);
    }
}
