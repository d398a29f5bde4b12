//! The host's addresses, while they change.
//!
//! Primary addresses count where no Node object tells them: with a directory of manifests, or while
//! the Node is not there. Addresses of interfaces decide where node ports are served when they are
//! configured by ranges; nothing but the kernel tells when one comes or goes.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;
use std::{fs, io};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::sync::mpsc::WeakSender;
use tracing::warn;

use crate::model::{Event, Family, HostFacts, NodeFacts};

/// Whether this host has IPv6 at all.
#[must_use]
pub fn has_ipv6() -> bool {
    std::path::Path::new("/proc/net/if_inet6").exists()
}

/// Node facts as far as the host tells them now.
#[must_use]
pub fn node_facts(name: &str) -> NodeFacts {
    let HostFacts { addresses, interfaces } = host_facts().unwrap_or_default();
    NodeFacts { name: name.to_owned(), addresses, interfaces, ..NodeFacts::default() }
}

/// Of each family the first global address of the interface with the default route, or else of the
/// first interface that has one; and the addresses of all interfaces.
fn host_facts() -> io::Result<HostFacts> {
    let all = interface_addresses()?;
    let first = |family: Family| {
        let default = default_interface(family)?;
        let of_family = |(_, a): &&(String, IpAddr)| Family::of(*a) == family && is_global(*a);
        let preferred =
            all.iter().filter(of_family).find(|(interface, _)| Some(interface) == default.as_ref());
        let found = preferred.or_else(|| all.iter().find(of_family));
        Ok(found.map(|(_, address)| *address))
    };
    let firsts: io::Result<Vec<_>> = Family::BOTH.into_iter().map(first).collect();
    let addresses = firsts?.into_iter().flatten().collect();
    let mut interfaces: Vec<_> = all.into_iter().map(|(_, address)| address).collect();
    interfaces.sort_unstable();
    interfaces.dedup();
    Ok(HostFacts { addresses, interfaces })
}

/// Reads until it can be: what cannot be read, for want of memory or of a descriptor, is not gone.
fn read_at_last<T>(mut read: impl FnMut() -> io::Result<T>, pause: Duration) -> T {
    let mut said = false;
    loop {
        match read() {
            Ok(found) => return found,
            Err(error) => {
                if !std::mem::replace(&mut said, true) {
                    warn!(%error, retry_in = ?pause, "the host's addresses cannot be read; those that are known stay");
                }
                std::thread::sleep(pause);
            }
        }
    }
}

/// The host's addresses cannot be followed.
#[derive(Debug, thiserror::Error)]
#[error("cannot follow the host's addresses: cannot {step}: {source}")]
pub struct FollowError {
    /// What was being done.
    step: &'static str,
    /// The system's reason.
    source: io::Error,
}

/// Sends the host's addresses now and whenever they have changed, until there is no receiver. Blocks
/// in between, for which it needs a thread of its own.
pub fn follow(events: &WeakSender<Event>) -> Result<(), FollowError> {
    let fail = |step| move |errno: Errno| FollowError { step, source: errno.into() };
    let socket = address_changes().map_err(fail("open a netlink socket"))?;
    let mut known = None;
    loop {
        let facts = read_at_last(host_facts, RETRY);
        if known.as_ref() != Some(&facts) {
            known = Some(facts.clone());
            let events = events.upgrade();
            if events.is_none_or(|events| events.blocking_send(Event::Host(facts)).is_err()) {
                return Ok(());
            }
        }
        receive(&socket, MsgFlags::empty()).map_err(fail("wait for a change"))?;
        std::thread::sleep(SETTLE);
        // What changed is read anew: messages can be lost, and one change can cause many.
        while receive(&socket, MsgFlags::MSG_DONTWAIT).is_ok() {}
    }
}

/// How long after a failure the addresses are read again.
const RETRY: Duration = Duration::from_secs(1);

/// Changes often come several at a time.
const SETTLE: Duration = Duration::from_millis(20);

/// A socket that gets a message for every address that comes or goes.
fn address_changes() -> nix::Result<OwnedFd> {
    let protocol = SockProtocol::NetlinkRoute;
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    let groups = (libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR).cast_unsigned();
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}

/// Takes one message off the socket. That some were lost is as good as one.
fn receive(socket: &OwnedFd, flags: MsgFlags) -> nix::Result<()> {
    let mut buffer = [0; 8192];
    loop {
        match recv(socket.as_raw_fd(), &mut buffer, flags) {
            Ok(_) | Err(Errno::ENOBUFS) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Whether others can reach it.
fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}

/// Addresses by interface, in the system's order.
fn interface_addresses() -> io::Result<Vec<(String, IpAddr)>> {
    let found = nix::ifaddrs::getifaddrs()?.filter_map(|interface| {
        let address = interface.address?;
        let address = address
            .as_sockaddr_in()
            .map(|v4| IpAddr::V4(v4.ip()))
            .or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))?;
        Some((interface.interface_name, address))
    });
    Ok(found.collect())
}

/// The interface of the default route with the lowest metric.
fn default_interface(family: Family) -> io::Result<Option<String>> {
    let path = match family {
        Family::V4 => "/proc/net/route",
        Family::V6 => "/proc/net/ipv6_route",
    };
    let routes = match fs::read_to_string(path) {
        // A host without the family.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        routes => routes?,
    };
    let parse = |line| match family {
        Family::V4 => ipv4_default(line),
        Family::V6 => ipv6_default(line),
    };
    let defaults: BTreeMap<u32, String> = routes.lines().filter_map(parse).collect();
    Ok(defaults.into_values().next())
}

/// `Iface Destination Gateway Flags RefCnt Use Metric Mask …`, numbers in hex but for the metric.
fn ipv4_default(line: &str) -> Option<(u32, String)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [interface, "00000000", _, _, _, _, metric, "00000000", ..] = fields[..] else {
        return None;
    };
    Some((metric.parse().ok()?, interface.to_owned()))
}

/// `destination length source length gateway metric refs use flags interface`, numbers in hex.
fn ipv6_default(line: &str) -> Option<(u32, String)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [destination, "00", _, _, _, metric, _, _, _, interface] = fields[..] else { return None };
    let any = u128::from_str_radix(destination, 16).ok()?;
    // The kernel lists an unreachable default on the loopback interface.
    (Ipv6Addr::from(any).is_unspecified() && interface != "lo")
        .then_some((u32::from_str_radix(metric, 16).ok()?, interface.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_cannot_be_read_are_read_again_and_not_taken_for_gone() {
        let mut answers = vec![Ok(7), Err(Errno::ENFILE.into()), Err(Errno::ENOMEM.into())];
        assert_eq!(read_at_last(|| answers.pop().unwrap(), Duration::ZERO), 7);
        assert!(answers.is_empty());
    }

    #[test]
    fn default_routes_are_told_from_others() {
        let default = "eth0\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0";
        assert_eq!(ipv4_default(default), Some((100, "eth0".into())));
        let subnet = "eth0\t0000A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0";
        assert_eq!(ipv4_default(subnet), None);
        let zeros = "00000000000000000000000000000000";
        let six = format!("{zeros} 00 {zeros} 00 {zeros} 00000400 00000001 00000000 00000003 eth0");
        assert_eq!(ipv6_default(&six), Some((1024, "eth0".into())));
        assert_eq!(ipv6_default(&six.replace("eth0", "lo")), None);
    }
}
