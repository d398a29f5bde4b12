//! What connection tracking is to be like: its limit, sized by the host, and its timeouts.
//!
//! The rules are those of kube-proxy 1.37: the limit is raised and never lowered, and what is
//! computed from the number of CPUs ends at a million, which is some 320 MB of entries: earlier releases made
//! sixteen millions of it on a machine with 512 CPUs.

use std::time::Duration;

use tracing::info;

use super::sysctl::{Change, Sysctl, SysctlError};

/// What connection tracking is to be like. A zero leaves alone what the host has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conntrack {
    /// Connections for each CPU.
    pub max_per_core: u32,
    /// Connections at least, unless `max_per_core` is 0.
    pub min: u32,
    /// Accept TCP segments outside of the window.
    pub tcp_be_liberal: bool,
    /// Timeout of established TCP connections.
    pub tcp_established_timeout: Duration,
    /// Timeout of TCP connections in `CLOSE_WAIT`.
    pub tcp_close_wait_timeout: Duration,
    /// Timeout of UDP flows that were not answered.
    pub udp_timeout: Duration,
    /// Timeout of UDP flows that were.
    pub udp_stream_timeout: Duration,
}

/// No more than this by the number of CPUs; `min` may ask for more.
const MOST_BY_CPUS: u64 = 1 << 20;

const NETFILTER: &str = "/proc/sys/net/netfilter/nf_conntrack_";
const BUCKETS: &str = "/sys/module/nf_conntrack/parameters/hashsize";

impl Conntrack {
    /// The limit of tracked connections on a host with so many CPUs; None leaves it alone.
    #[must_use]
    pub fn limit(&self, cpus: u32) -> Option<u64> {
        let by_cpus = (u64::from(self.max_per_core) * u64::from(cpus)).min(MOST_BY_CPUS);
        (self.max_per_core > 0).then(|| by_cpus.max(self.min.into()))
    }

    /// Makes it so. Returns what the host refuses; everything else is done.
    #[must_use]
    pub fn apply(&self, sysctl: &Sysctl) -> Vec<SysctlError> {
        let mut errors = Vec::new();
        let mut note = |path: &str, outcome: Result<Option<Change>, SysctlError>| match outcome {
            Ok(None) => true,
            Ok(Some((from, to))) => {
                info!("{path}: {from} is now {to}");
                true
            }
            Err(error) => {
                errors.push(error);
                false
            }
        };
        if let Some(limit) = self.limit(cpus(sysctl)) {
            let limit = i64::try_from(limit).expect("a product of two smaller numbers");
            let path = format!("{NETFILTER}max");
            // A table that is not to grow needs no more buckets.
            if note(&path, sysctl.raise(&path, limit)) {
                note(BUCKETS, sysctl.raise(BUCKETS, limit / 4));
            }
        }
        let timeouts = [
            ("tcp_timeout_established", self.tcp_established_timeout),
            ("tcp_timeout_close_wait", self.tcp_close_wait_timeout),
            ("udp_timeout", self.udp_timeout),
            ("udp_timeout_stream", self.udp_stream_timeout),
        ];
        for (name, timeout) in timeouts.into_iter().filter(|(_, timeout)| !timeout.is_zero()) {
            // Less than a second must not become none.
            let seconds = timeout.as_secs().max(1).try_into().unwrap_or(i64::from(i32::MAX));
            let path = format!("{NETFILTER}{name}");
            note(&path, sysctl.set(&path, seconds));
        }
        if self.tcp_be_liberal {
            let path = format!("{NETFILTER}tcp_be_liberal");
            note(&path, sysctl.set(&path, 1));
        }
        errors
    }
}

/// How many CPUs the host has online. The limit is the host's, so that a quota or CPU set of this
/// process does not count.
fn cpus(sysctl: &Sysctl) -> u32 {
    let online = sysctl.text("/sys/devices/system/cpu/online").ok();
    online.and_then(|text| count_cpus(&text)).unwrap_or_else(|| {
        std::thread::available_parallelism().map_or(1, |n| n.get().try_into().unwrap_or(u32::MAX))
    })
}

/// `0-7,9` are nine.
fn count_cpus(ranges: &str) -> Option<u32> {
    let mut count = 0_u32;
    for part in ranges.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        count = count.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    Some(count)
}

/// All that was refused as one line: it is one cause almost always.
#[must_use]
pub fn describe(errors: &[SysctlError]) -> String {
    let reason = errors.first().map(SysctlError::reason).unwrap_or_default();
    let one_reason = errors.iter().all(|error| error.reason() == reason);
    let each = |error: &SysctlError| match error {
        SysctlError::Write { path, found, wanted, .. } if one_reason => {
            format!("{path} from {found} to {wanted}")
        }
        other => other.to_string(),
    };
    let list: Vec<_> = errors.iter().map(each).collect();
    let is_written = matches!(errors.first(), Some(SysctlError::Write { .. }));
    if one_reason && is_written {
        format!("cannot change {}: {reason}", list.join(", "))
    } else {
        list.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn host(cpus: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let files = [
            ("proc/sys/net/netfilter/nf_conntrack_max", "262144"),
            ("proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established", "432000"),
            ("proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait", "3600"),
            ("proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal", "0"),
            ("proc/sys/net/netfilter/nf_conntrack_udp_timeout", "30"),
            ("proc/sys/net/netfilter/nf_conntrack_udp_timeout_stream", "120"),
            ("sys/module/nf_conntrack/parameters/hashsize", "65536"),
            ("sys/devices/system/cpu/online", cpus),
        ];
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        dir
    }

    fn read(root: &Path, path: &str) -> String {
        fs::read_to_string(root.join(path)).unwrap().trim().to_owned()
    }

    fn defaults() -> Conntrack {
        Conntrack {
            max_per_core: 32768,
            min: 131_072,
            tcp_established_timeout: Duration::from_secs(86400),
            tcp_close_wait_timeout: Duration::from_secs(3600),
            ..Conntrack::default()
        }
    }

    #[test]
    fn the_limit_follows_the_cpus_up_to_a_million() {
        let limit = |cpus| defaults().limit(cpus);
        assert_eq!(limit(1), Some(131_072));
        assert_eq!(limit(8), Some(262_144));
        assert_eq!(limit(512), Some(1 << 20));
        assert_eq!(Conntrack { max_per_core: 0, ..defaults() }.limit(8), None);
        assert_eq!(Conntrack { min: 4_000_000, ..defaults() }.limit(512), Some(4_000_000));
        assert_eq!(count_cpus("0-7,9\n"), Some(9));
        assert_eq!(count_cpus("0\n"), Some(1));
        assert_eq!(count_cpus("x"), None);
    }

    #[test]
    fn values_are_written_where_they_differ_and_limits_only_raised() {
        let root = host("0-15");
        let sysctl = Sysctl::below(root.path());
        let in_netfilter =
            |name: &str| read(root.path(), &format!("proc/sys/net/netfilter/nf_conntrack_{name}"));
        assert!(defaults().apply(&sysctl).is_empty());
        assert_eq!(in_netfilter("max"), "524288");
        assert_eq!(read(root.path(), "sys/module/nf_conntrack/parameters/hashsize"), "131072");
        assert_eq!(in_netfilter("tcp_timeout_established"), "86400");
        assert_eq!(in_netfilter("udp_timeout"), "30");
        assert_eq!(in_netfilter("tcp_be_liberal"), "0");

        let small = Conntrack { max_per_core: 1, min: 1, ..Conntrack::default() };
        assert!(small.apply(&sysctl).is_empty());
        assert_eq!(in_netfilter("max"), "524288");
        assert_eq!(in_netfilter("tcp_timeout_established"), "86400");
        let liberal = Conntrack { tcp_be_liberal: true, ..Conntrack::default() };
        assert!(liberal.apply(&sysctl).is_empty());
        assert_eq!(in_netfilter("tcp_be_liberal"), "1");
    }

    #[test]
    fn what_is_refused_is_one_line_and_the_rest_is_done() {
        let root = host("0-15");
        fs::remove_file(root.path().join("proc/sys/net/netfilter/nf_conntrack_max")).unwrap();
        let errors = defaults().apply(&Sysctl::below(root.path()));
        assert_eq!(
            describe(&errors),
            "cannot read /proc/sys/net/netfilter/nf_conntrack_max: No such file or directory (os error 2)"
        );
        let established = "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
        assert_eq!(read(root.path(), established), "86400");
        let refused = |path: &str, found, wanted| SysctlError::Write {
            path: path.into(),
            found,
            wanted,
            source: std::io::Error::from_raw_os_error(libc::EROFS),
        };
        assert_eq!(
            describe(&[refused("/a", 1, 2), refused("/b", 3, 4)]),
            "cannot change /a from 1 to 2, /b from 3 to 4: Read-only file system (os error 30)"
        );
    }
}
