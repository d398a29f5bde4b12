//! Numbers in `/proc` and `/sys`: read, compared, and written only if they differ.
//!
//! In a container they are often read-only, and often right already; only a write that is needed and
//! refused is worth a word. Which of the files belong to the network namespace is the kernel's choice.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The files, below a root so that tests have their own.
#[derive(Clone, Debug)]
pub struct Sysctl {
    root: PathBuf,
}

/// A number could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// It cannot be read, or is no number.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// The system's reason.
        source: io::Error,
    },
    /// It is another and cannot be written.
    #[error("cannot change {path} from {found} to {wanted}: {source}")]
    Write {
        /// The file.
        path: String,
        /// What it is.
        found: i64,
        /// What it was to be.
        wanted: i64,
        /// The system's reason.
        source: io::Error,
    },
}

const ROUTE_LOCALNET: &str = "/proc/sys/net/ipv4/conf/all/route_localnet";

/// What was found and what it is now.
pub(super) type Change = (i64, i64);

impl Default for Sysctl {
    fn default() -> Self {
        Self::below(Path::new("/"))
    }
}

impl Sysctl {
    /// The files below a directory.
    #[must_use]
    pub fn below(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The text of a file.
    pub(super) fn text(&self, path: &str) -> io::Result<String> {
        fs::read_to_string(self.root.join(path.trim_start_matches('/')))
    }

    /// Makes it this number. Returns what changed, if anything did.
    pub(super) fn set(&self, path: &str, wanted: i64) -> Result<Option<Change>, SysctlError> {
        self.change(path, wanted, |found| found == wanted)
    }

    /// Makes it at least this number.
    pub(super) fn raise(&self, path: &str, wanted: i64) -> Result<Option<Change>, SysctlError> {
        self.change(path, wanted, |found| found >= wanted)
    }

    fn change(
        &self,
        path: &str,
        wanted: i64,
        is_right: impl Fn(i64) -> bool,
    ) -> Result<Option<Change>, SysctlError> {
        let read = |source| SysctlError::Read { path: path.to_owned(), source };
        let text = self.text(path).map_err(read)?;
        let found: i64 = text.trim().parse().map_err(|_| {
            read(io::Error::new(io::ErrorKind::InvalidData, format!("it is {:?}", text.trim())))
        })?;
        if is_right(found) {
            return Ok(None);
        }
        let file = self.root.join(path.trim_start_matches('/'));
        // Not created where it is missing, and written with one call.
        let written =
            fs::OpenOptions::new().write(true).truncate(true).open(file).and_then(|mut file| {
                io::Write::write_all(&mut file, wanted.to_string().as_bytes())
            });
        match written {
            Ok(()) => Ok(Some((found, wanted))),
            Err(source) => Err(SysctlError::Write { path: path.to_owned(), found, wanted, source }),
        }
    }

    /// Lets connections to 127.0.0.0/8 leave the host once they are translated.
    pub fn route_loopback(&self) -> Result<(), SysctlError> {
        self.set(ROUTE_LOCALNET, 1).map(drop)
    }

    /// Whether the kernel routes addresses in 127.0.0.0/8.
    #[must_use]
    pub fn routes_loopback(&self) -> bool {
        self.text(ROUTE_LOCALNET).is_ok_and(|text| text.trim() != "0")
    }

    /// Sets how readily the kernel ends this process when memory runs out.
    pub fn set_oom_score_adj(&self, score: i32) -> Result<(), SysctlError> {
        self.set("/proc/self/oom_score_adj", score.into()).map(drop)
    }
}

impl SysctlError {
    /// The reason, without the file.
    pub(super) fn reason(&self) -> String {
        let (Self::Read { source, .. } | Self::Write { source, .. }) = self;
        source.to_string()
    }
}
