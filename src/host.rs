//! What the host itself tells about the node: its name and addresses.
//!
//! Used where no Node object says it: with a directory of manifests, or while the Node is not there.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv6Addr};

use crate::model::{Family, NodeFacts};

/// The host's name cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the host's name: {0}; give it with --hostname-override")]
pub struct HostnameError(String);

/// The host's name, lower case, as the kubelet takes it for the Node's name.
pub fn node_name() -> Result<String, HostnameError> {
    let name = nix::unistd::gethostname().map_err(|errno| HostnameError(errno.to_string()))?;
    let name = name.to_string_lossy().trim().to_lowercase();
    if name.is_empty() { Err(HostnameError("it is empty".into())) } else { Ok(name) }
}

/// Node facts as far as the host knows them: of each family the first global address of the
/// interface with the default route, or else of the first interface that has one.
#[must_use]
pub fn node_facts(name: &str) -> NodeFacts {
    let addresses = interface_addresses();
    let first = |family: Family| {
        let default = default_interface(family);
        let of_family = |(_, a): &&(String, IpAddr)| Family::of(*a) == family;
        let preferred = addresses
            .iter()
            .filter(of_family)
            .find(|(interface, _)| Some(interface) == default.as_ref());
        preferred.or_else(|| addresses.iter().find(of_family)).map(|(_, address)| *address)
    };
    NodeFacts {
        name: name.to_owned(),
        addresses: Family::BOTH.into_iter().filter_map(first).collect(),
        ..NodeFacts::default()
    }
}

/// Addresses that others can reach, by interface, in the system's order.
fn interface_addresses() -> Vec<(String, IpAddr)> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    let global = |address: &IpAddr| match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    };
    interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let address = address
                .as_sockaddr_in()
                .map(|v4| IpAddr::V4(v4.ip()))
                .or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))?;
            Some((interface.interface_name, address))
        })
        .filter(|(_, address)| global(address))
        .collect()
}

/// The interface of the default route with the lowest metric.
fn default_interface(family: Family) -> Option<String> {
    let path = match family {
        Family::V4 => "/proc/net/route",
        Family::V6 => "/proc/net/ipv6_route",
    };
    let routes = fs::read_to_string(path).ok()?;
    let parse = |line| match family {
        Family::V4 => ipv4_default(line),
        Family::V6 => ipv6_default(line),
    };
    let defaults: BTreeMap<u32, String> = routes.lines().filter_map(parse).collect();
    defaults.into_values().next()
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
