//! Manifests as a source of events: a directory of them, or a single file.
//!
//! It serves nodes without an API server, tests, and "what would this do". The files are the API:
//! what they say is in force, and a file that cannot be read changes nothing until it can. Only
//! differences are sent, so that touching a file is not an event.

mod decode;
mod follow;
mod held;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc;

use self::decode::{Fault, SIZE_LIMIT, decode, label, refused};
use self::follow::{Follower, Touched};
use self::held::{Changes, Held, ManifestFile, Stamp};
use super::log;
use crate::model::{Event, Kind, Problem};

/// How often a directory that disappeared is looked for.
const LOOK_FOR_DIRECTORY: Duration = Duration::from_secs(1);

/// Why manifests cannot be used at all.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// The directory could not be listed, or the file not be found.
    #[error("cannot read the manifests in {}: {source}", path.display())]
    Unreadable {
        /// The directory or file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The manifests of one directory, or one of its files.
#[derive(Debug)]
pub struct Manifests {
    /// As it was given: a directory, or a file.
    path: PathBuf,
    /// The directory that is looked at.
    dir: PathBuf,
    /// The one file of it that counts, if `path` is a file.
    only: Option<OsString>,
    node_name: String,
    /// What was read of it.
    held: Held,
    /// Which directory was read: device and inode.
    identity: Option<(u64, u64)>,
}

impl Manifests {
    /// The manifests in the directory or file `path`, for the node of this name. Nothing is read
    /// yet.
    #[must_use]
    pub fn new(path: PathBuf, node_name: String) -> Self {
        Self {
            dir: path.clone(),
            path,
            only: None,
            node_name,
            held: Held::default(),
            identity: None,
        }
    }

    /// Reads everything: a listing of all four kinds, and what is wrong with the files.
    pub fn read(&mut self) -> Result<(Vec<Event>, Vec<Problem>), ManifestError> {
        *self = Self::new(std::mem::take(&mut self.path), std::mem::take(&mut self.node_name));
        self.find();
        let changes = self.rescan(&Touched::default()).map_err(|source| self.unreadable(source))?;

        let mut events = Vec::with_capacity(changes.events.len() + 8);
        let mut objects = changes.events.into_iter().peekable();
        for kind in Kind::ALL {
            events.push(Event::Listing(kind));
            // The objects come sorted by kind.
            while let Some(event) = objects.next_if(|event| kind_of(event) == kind) {
                events.push(event);
            }
            events.push(Event::Listed(kind));
        }
        tracing::info!(
            path = %self.path.display(),
            files = self.held.files.len(),
            objects = events.len() - 2 * Kind::ALL.len(),
            ignored = self.held.files.values().map(|file| file.ignored).sum::<usize>(),
            "read the manifests"
        );
        if self.held.files.is_empty() {
            tracing::warn!(
                path = %self.path.display(),
                "there is no file *.yaml, *.yml or *.json: no Service is served"
            );
        }
        Ok((events, changes.problems))
    }

    fn unreadable(&self, source: io::Error) -> ManifestError {
        ManifestError::Unreadable { path: self.path.clone(), source }
    }

    /// Tells a file from a directory. A file is looked at in its directory, where it can be replaced
    /// without being away for a moment.
    fn find(&mut self) {
        if let Some(name) = self.path.file_name().filter(|_| self.path.is_file()) {
            let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
            self.dir = parent.unwrap_or(Path::new(".")).to_owned();
            self.only = Some(name.to_owned());
        }
    }

    /// Reads everything, then sends what changes until the receiver is gone. Problems are logged.
    pub async fn run(mut self, events: mpsc::Sender<Event>) -> Result<(), ManifestError> {
        let found = blocking(&mut self, |this| {
            this.find();
            this.list().map(drop)
        });
        // What cannot be read cannot be watched either, which need not be said.
        found.await.map_err(|source| self.unreadable(source))?;
        // Before the first read, so that no change falls between the two.
        let mut follower = Follower::new(&self.dir);
        let (listing, problems) = blocking(&mut self, Self::read).await?;
        let first = Changes { events: listing, problems, mended: Vec::new() };
        if send(first, &events).await.is_err() {
            return Ok(());
        }
        let mut touched = None;
        loop {
            let look_at = if let Some(touched) = touched.take() {
                touched
            } else {
                tokio::select! {
                    touched = follower.next() => touched,
                    () = events.closed() => return Ok(()),
                }
            };
            let identity = self.identity;
            match blocking(&mut self, move |this| this.rescan(&look_at)).await {
                Ok(changes) => {
                    if send(changes, &events).await.is_err() {
                        return Ok(());
                    }
                    if self.identity != identity {
                        // Another directory of the same name; the old watch sees the old one.
                        follower = Follower::new(&self.dir);
                        touched = Some(Touched::default());
                    }
                }
                Err(error) => {
                    tracing::warn!(
                        path = %self.path.display(),
                        %error,
                        "the manifests cannot be read; what is in force stays"
                    );
                    loop {
                        tokio::select! {
                            () = tokio::time::sleep(LOOK_FOR_DIRECTORY) => {}
                            () = events.closed() => return Ok(()),
                        }
                        if self.list().is_ok() {
                            break;
                        }
                    }
                    tracing::info!(path = %self.path.display(), "the manifests are back");
                    follower = Follower::new(&self.dir);
                    touched = Some(Touched::default());
                }
            }
        }
    }

    /// How many files do not count in their present state; each was reported.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.held.files.values().filter(|file| file.broken).count()
    }

    /// Looks at the directory and reads what changed. An error means that nothing is known about
    /// the files, and nothing was changed.
    fn rescan(&mut self, touched: &Touched) -> io::Result<Changes> {
        let identity = identity(&self.dir)?;
        let listed = self.list()?;

        let mut fresh: BTreeMap<OsString, Option<ManifestFile>> = BTreeMap::new();
        for (name, stamp) in &listed {
            let known = self.held.files.get(name);
            let same = known.is_some_and(|file| file.stamp == *stamp);
            if touched.held.contains(name) || (same && !touched.changed.contains(name)) {
                continue;
            }
            fresh.insert(name.clone(), Some(self.look_into(name, *stamp)));
        }
        for name in self.held.files.keys() {
            if !listed.contains_key(name) && !touched.held.contains(name) {
                fresh.insert(name.clone(), None);
            }
        }
        // Files that vanish together with their directory were not removed by anybody.
        if self::identity(&self.dir)? != identity {
            return Err(io::Error::other("it was replaced while it was read"));
        }
        self.identity = Some(identity);
        Ok(self.held.replace(fresh))
    }

    /// The files that count. One without a stamp cannot be looked at, and reading it will say why.
    fn list(&self) -> io::Result<BTreeMap<OsString, Option<Stamp>>> {
        if let Some(name) = &self.only {
            // Without its only file, the source is away, as a directory can be.
            let metadata = fs::metadata(self.dir.join(name))?;
            return Ok([(name.clone(), Some(Stamp::of(&metadata)))].into());
        }
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let hidden = name.as_encoded_bytes().starts_with(b".");
            let extension = Path::new(&name).extension().and_then(OsStr::to_str);
            if hidden || !matches!(extension, Some("yaml" | "yml" | "json")) {
                continue;
            }
            match fs::metadata(self.dir.join(&name)) {
                Ok(metadata) if metadata.is_dir() => {}
                Ok(metadata) => {
                    files.insert(name, Some(Stamp::of(&metadata)));
                }
                // Removed since it was listed, or a symlink to nothing: a ConfigMap that lost a key.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(_) => {
                    files.insert(name, None);
                }
            }
        }
        Ok(files)
    }

    /// Reads a file. One that does not count keeps the objects it had.
    fn look_into(&self, name: &OsStr, stamp: Option<Stamp>) -> ManifestFile {
        let shown = label(name);
        let known = self.held.files.get(name);
        let had_objects = known.is_some_and(|file| !file.objects.is_empty());
        let read = read_file(&self.dir.join(name)).and_then(|bytes| {
            // `> file` is the first half of many ways to write one.
            if had_objects && bytes.is_empty() {
                return Err("is empty; remove it to remove its objects".to_owned());
            }
            Ok(bytes)
        });
        let contents = match read {
            Ok(bytes) => decode(&shown, &bytes, &self.node_name),
            Err(message) => Err(Fault { place: shown.clone(), field: String::new(), message }),
        };
        match contents {
            Ok(contents) => ManifestFile { stamp, ..ManifestFile::good(contents) },
            Err(fault) => ManifestFile {
                stamp,
                objects: known.map(|file| file.objects.clone()).unwrap_or_default(),
                ignored: known.map_or(0, |file| file.ignored),
                problems: vec![refused(&fault, had_objects)],
                broken: true,
            },
        }
    }
}

/// The kind of object an event is about.
fn kind_of(event: &Event) -> Kind {
    match event {
        Event::Service(_) => Kind::Service,
        Event::EndpointSlice(_) => Kind::EndpointSlice,
        Event::ServiceCidr(_) => Kind::ServiceCidr,
        Event::Node(_) | Event::Host(_) => Kind::Node,
        Event::Listing(kind)
        | Event::Listed(kind)
        | Event::Unavailable(kind)
        | Event::Unreadable(kind, _)
        | Event::Gone(kind, _) => *kind,
    }
}

/// Logs what was found and sends what changed. An error says that the receiver is gone.
async fn send(changes: Changes, events: &mpsc::Sender<Event>) -> Result<(), ()> {
    for file in changes.mended {
        tracing::info!(file, "the file can be read again and is in force");
    }
    changes.problems.iter().for_each(log);
    for event in changes.events {
        events.send(event).await.map_err(drop)?;
    }
    Ok(())
}

/// Runs something that reads files where it holds nobody up.
async fn blocking<T: Send + 'static>(
    manifests: &mut Manifests,
    work: impl FnOnce(&mut Manifests) -> T + Send + 'static,
) -> T {
    let mut moved = std::mem::replace(manifests, Manifests::new(PathBuf::new(), String::new()));
    let done = tokio::task::spawn_blocking(move || {
        let result = work(&mut moved);
        (moved, result)
    })
    .await;
    match done {
        Ok((moved, result)) => {
            *manifests = moved;
            result
        }
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime is shutting down and will not poll this again.
        Err(_) => std::future::pending().await,
    }
}

fn identity(dir: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(dir)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Reads a file whole, if it is a regular one of a sane size. A pipe would block for ever.
fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let unreadable = |error: io::Error| format!("cannot be read: {error}");
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err("is not a regular file".to_owned());
    }
    let too_large = || format!("is larger than {} MiB", SIZE_LIMIT >> 20);
    if metadata.len() > SIZE_LIMIT {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(unreadable)?;
    file.take(SIZE_LIMIT + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > SIZE_LIMIT {
        return Err(too_large());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
