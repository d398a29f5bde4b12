//! What the process may do, asked before it tries: a missing capability would otherwise be seen as a
//! refusal of some first step that does not name it.

use std::fs;

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
