//! What the process may do: asked before it tries, as a missing capability would otherwise be seen as a
//! refusal of some first step that does not name it; and given up for good where it is not needed.

use std::fs;

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sys::prctl;

/// The capability to change tables, as numbered in `linux/capability.h`.
const NET_ADMIN: u32 = 12;

/// The process lacks a capability.
#[derive(Debug, thiserror::Error)]
#[error(
    "the process lacks the capability CAP_NET_ADMIN, without which it cannot change nftables: run it as \
     root, or in a container with securityContext.capabilities.add: [NET_ADMIN]"
)]
pub struct PrivilegeError;

/// Fails if the process cannot change tables.
pub fn check_privileges() -> Result<(), PrivilegeError> {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    match effective_capabilities(&status) {
        Some(set) if set & 1 << NET_ADMIN == 0 => Err(PrivilegeError),
        // What cannot be told is found out by trying.
        _ => Ok(()),
    }
}

/// Privileges could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The kernel has no such thing as a process that cannot gain any.
    #[error("cannot give up gaining privileges: {0}")]
    NoNewPrivileges(#[from] Errno),
    /// It does not take the smaller sets.
    #[error("cannot give up capabilities: {0}")]
    Capabilities(#[from] CapsError),
}

/// Gives up everything but changing tables and listening on any port, for this process and whatever it
/// starts. Programs of iptables open a raw socket: `iptables` says whether they are to be started. To be
/// called before there are threads: each has capabilities of its own, and begins with those of the one that
/// started it.
pub fn confine(iptables: bool) -> Result<(), ConfineError> {
    prctl::set_no_new_privs()?;
    let mut keep = CapsHashSet::from([Capability::CAP_NET_ADMIN, Capability::CAP_NET_BIND_SERVICE]);
    keep.extend(iptables.then_some(Capability::CAP_NET_RAW));
    // First, as it takes a capability itself; a process that has not got that one cannot be root either.
    let mut others: Vec<_> = caps::all().difference(&keep).copied().collect();
    others.sort_unstable_by_key(Capability::index);
    for capability in others {
        if caps::drop(None, CapSet::Bounding, capability).is_err() {
            break;
        }
    }
    // Those of the ambient set go with those of the inheritable set.
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        let kept = caps::read(None, set)?.intersection(&keep).copied().collect();
        caps::set(None, set, &kept)?;
    }
    Ok(())
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_set_is_read() {
        let status = "Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t0000000000001000\n";
        assert_eq!(effective_capabilities(status), Some(1 << NET_ADMIN));
        assert_eq!(effective_capabilities("Name:\tx\n"), None);
    }
}
