//! Processes of this host whose port a Service takes: their clients reach the Service instead, as with
//! kube-proxy, and nothing else tells that.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use super::Finding;
use crate::frontend::{Frontend, frontends};
use crate::model::{Family, NamespacedName, Protocol};
use crate::state::State;

/// A socket that waits for clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Listener {
    protocol: Protocol,
    address: IpAddr,
    port: u16,
}

/// The files of `/proc/net`, and the state in them of a socket that waits: `TCP_LISTEN`, and for UDP
/// `TCP_CLOSE`, which is what an unconnected one has.
const FILES: [(&str, Protocol, &str); 4] = [
    ("tcp", Protocol::Tcp, "0A"),
    ("tcp6", Protocol::Tcp, "0A"),
    ("udp", Protocol::Udp, "07"),
    ("udp6", Protocol::Udp, "07"),
];

/// Looks through the sockets of this network namespace.
pub(super) fn findings(proc: &Path, state: &State) -> Vec<Finding> {
    let mut listeners = BTreeSet::new();
    for (file, protocol, waiting) in FILES {
        let text = std::fs::read_to_string(proc.join("net").join(file)).unwrap_or_default();
        listeners.extend(parse(&text, protocol, waiting));
    }
    let mut findings = Vec::new();
    for listener in &listeners {
        for address in reached_at(*listener, state) {
            if let Some((service, frontend)) = taken_by(*listener, address, state) {
                let Listener { protocol, port, .. } = listener;
                findings.push(Finding::attention(
                    "listeners",
                    format!(
                        "a process of this host listens on {address} port {port}/{protocol}, which \
                         is {frontend} of Service {service}: clients reach the Service"
                    ),
                    "give one of them another port; `ss -lnp` names the process",
                ));
            }
        }
    }
    if findings.is_empty() {
        findings.push(Finding::good("listeners", "no Service takes the port of a process"));
    }
    findings
}

fn parse(text: &str, protocol: Protocol, waiting: &str) -> impl Iterator<Item = Listener> {
    text.lines().skip(1).filter_map(move |line| {
        let mut words = line.split_whitespace().skip(1);
        let (address, port) = words.next()?.split_once(':')?;
        let state = words.nth(1)?;
        let port = u16::from_str_radix(port, 16).ok().filter(|port| *port != 0)?;
        (state == waiting).then_some(Listener { protocol, address: parse_address(address)?, port })
    })
}

/// Words of 32 bits in the order of the host, each in hexadecimal digits.
fn parse_address(text: &str) -> Option<IpAddr> {
    let word = |text: &str| Some(u32::from_str_radix(text, 16).ok()?.to_ne_bytes());
    match text.len() {
        8 => Some(Ipv4Addr::from(word(text)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (at, place) in bytes.chunks_exact_mut(4).enumerate() {
                place.copy_from_slice(&word(text.get(at * 8..at * 8 + 8)?)?);
            }
            let six = Ipv6Addr::from(bytes);
            Some(six.to_ipv4_mapped().map_or(six.into(), IpAddr::from))
        }
        _ => None,
    }
}

/// The addresses of the host by which others reach a socket. One that is bound to all of IPv6 has those
/// of IPv4 as well, unless it asked not to, which the kernel does not show here.
fn reached_at(listener: Listener, state: &State) -> Vec<IpAddr> {
    if !listener.address.is_unspecified() {
        return vec![listener.address];
    }
    let interfaces = state.node_facts().interfaces.iter().copied();
    let all = interfaces.filter(|address| !address.is_loopback());
    all.filter(|address| listener.address.is_ipv6() || address.is_ipv4()).collect()
}

/// The Service that has this address and port, and what it has it as.
fn taken_by(
    listener: Listener,
    address: IpAddr,
    state: &State,
) -> Option<(NamespacedName, String)> {
    let Listener { protocol, port, .. } = listener;
    let family = Family::of(address);
    let own = Frontend::Address(address, protocol, port);
    if let Some(name) = state.owner(own) {
        return Some((name.clone(), describe(own, name, state)));
    }
    let node_port = Frontend::NodePort(family, protocol, port);
    let serves = match state.node_port_ips(family) {
        Some(addresses) => addresses.contains(&address),
        None => !address.is_loopback(),
    };
    let name = state.owner(node_port).filter(|_| serves)?;
    Some((name.clone(), describe(node_port, name, state)))
}

fn describe(frontend: Frontend, name: &NamespacedName, state: &State) -> String {
    use crate::frontend::FrontendKind::{ClusterIp, ExternalIp, LoadBalancer, NodePort};
    let service = state.service_named(name);
    let kind = service.and_then(|service| {
        let all = service.ports.iter().flat_map(|p| frontends(service, p, frontend.family()));
        all.into_iter().find(|(other, _)| *other == frontend).map(|(_, kind)| kind)
    });
    match kind {
        Some(ClusterIp) => "a ClusterIP",
        Some(ExternalIp) => "an external IP",
        Some(LoadBalancer) => "a load-balancer IP",
        Some(NodePort) | None => "a node port",
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_that_wait_are_told_from_others() {
        let word = |address: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(address));
        let [any, node] = [[0, 0, 0, 0], [192, 0, 2, 10]].map(word);
        let text = format!(
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n   \
             0: {any}:1F90 {any}:0000 0A 00000000:00000000 00:00000000 00000000     0\n   \
             1: {node}:7594 {any}:0000 0A 00000000:00000000 00:00000000 00000000     0\n   \
             2: {node}:7594 {node}:C350 01 00000000:00000000 00:00000000 00000000     0\n   \
             3: nonsense\n"
        );
        let found: Vec<_> = parse(&text, Protocol::Tcp, "0A").collect();
        let listener = |address: &str, port| Listener {
            protocol: Protocol::Tcp,
            address: address.parse().unwrap(),
            port,
        };
        assert_eq!(found, [listener("0.0.0.0", 8080), listener("192.0.2.10", 30100)]);
        let six: String = [[0xfd, 0, 2, 3], [0; 4], [0; 4], [0, 0, 0, 7]].map(word).concat();
        assert_eq!(parse_address(&six), Some("fd00:203::7".parse().unwrap()));
        let mapped: String =
            [[0; 4], [0; 4], [0, 0, 0xff, 0xff], [192, 0, 2, 10]].map(word).concat();
        assert_eq!(parse_address(&mapped), Some("192.0.2.10".parse().unwrap()));
        assert_eq!(parse_address("0"), None);
    }
}
