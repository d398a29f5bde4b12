//! Who can send a packet: the sender that was asked about, and others that the rules can treat otherwise.

use std::net::IpAddr;

use super::{Known, Question, Target};
use crate::model::{Family, NodeFacts, Protocol};
use crate::nft::element::Key;
use crate::nft::interpret::{Origin, Packet};
use crate::nft::names::SetName;

/// The packet that is asked about. Without a sender, the host itself sends it.
pub(super) fn packet(
    question: &Question,
    node: &NodeFacts,
    is_local: &dyn Fn(IpAddr) -> bool,
) -> Packet {
    let Target { address, port } = question.target;
    // What a ping has in place of a port is in no map, and neither is port 0, which no Service can have.
    let (protocol, port) = port.unwrap_or((Protocol::Tcp, 0));
    let family = Family::of(address);
    let own = || {
        let first =
            node.interfaces.iter().copied().find(|a| Family::of(*a) == family && !a.is_loopback());
        node.primary(family).or(first)
    };
    let loopback = match family {
        Family::V4 => IpAddr::from([127, 0, 0, 1]),
        Family::V6 => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
    };
    // A program that dials a loopback address does so from one.
    let own = || if address.is_loopback() { Some(loopback) } else { own() };
    let source = question.from.or_else(own).unwrap_or(loopback);
    let by_host = question.interface.is_none() && (question.from.is_none() || is_local(source));
    let origin = if by_host {
        Origin::Host
    } else {
        Origin::Interface(question.interface.as_deref().map(Into::into))
    };
    Packet { source, destination: address, protocol, port, origin }
}

/// Other senders whose packets the rules can treat in another way.
pub(super) fn others(
    packet: &Packet,
    known: &Known,
    is_local: &dyn Fn(IpAddr) -> bool,
) -> Vec<(String, Packet)> {
    let family = Family::of(packet.destination);
    let pods = || known.ruleset.elements_of(family, SetName::LocalPods).map(|(id, _)| id.key);
    let is_pod = |address: IpAddr| {
        pods().any(
            |key| matches!(key, Key::Range(first, last) if first <= address && address <= last),
        )
    };
    let by_network = |source| Packet { source, origin: Origin::Interface(None), ..packet.clone() };
    let mut list = Vec::new();
    if packet.origin != Origin::Host
        && let Some(source) = known.node.primary(family)
    {
        list.push((
            "this host".to_owned(),
            Packet { source, origin: Origin::Host, ..packet.clone() },
        ));
    }
    let asked_pod = packet.origin != Origin::Host && is_pod(packet.source);
    if let Some(Key::Range(_, last)) = pods().next()
        && !asked_pod
    {
        // The last address of a pod range is hardly ever an endpoint.
        list.push(("a pod".to_owned(), by_network(last)));
    }
    let outside = match family {
        Family::V4 => IpAddr::from([203, 0, 113, 254]),
        Family::V6 => "2001:db8::fe".parse().expect("an address"),
    };
    let asked_outside = packet.origin != Origin::Host && !asked_pod;
    if !asked_outside && !is_pod(outside) && !is_local(outside) {
        list.push(("outside".to_owned(), by_network(outside)));
    }
    list
}
