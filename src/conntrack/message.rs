//! The messages of ctnetlink, as bytes: listing flows, deleting one, and what the kernel answers.
//!
//! Four message types with a dozen attributes, in safe code, rather than a C library for them. Lengths
//! that come from outside are never trusted: what cannot be read is left out, and counted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::sweep::{Filter, Flow, Tuple};
use crate::model::{Family, Protocol};
use crate::nlmsg::{
    self, DONE, DUMP, DUMP_INTERRUPTED, ERROR, GENMSG, HEADER, NESTED, REQUEST, attributes, number,
    put,
};

/// `NFNL_SUBSYS_CTNETLINK << 8`
const CTNETLINK: u16 = 1 << 8;
/// What a listed flow comes as.
const NEW: u16 = CTNETLINK;
const GET: u16 = CTNETLINK | 1;
const DELETE: u16 = CTNETLINK | 2;

// enum ctattr_type
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
// enum ctattr_tuple
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const TUPLE_ZONE: u16 = 3;
// enum ctattr_ip
const V4_SRC: u16 = 1;
const V4_DST: u16 = 2;
const V6_SRC: u16 = 3;
const V6_DST: u16 = 4;
// enum ctattr_l4proto
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;
// enum ctattr_filter, and the bits of its flags: which fields of the tuple must be equal.
const FILTER_ORIG_FLAGS: u16 = 1;
const MATCH_IP_DST: u32 = 1 << 1;
const MATCH_PROTO_NUM: u32 = 1 << 3;
const MATCH_PROTO_DST_PORT: u32 = 1 << 5;

/// One message of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// A flow of a listing.
    Flow(Flow),
    /// A flow without ports (ICMP), or one that cannot be read.
    Other,
    /// The end of a listing; an error number if it broke off, else 0.
    Done(i32),
    /// The answer to the request of this sequence number: an error number, or 0.
    Answer { sequence: u32, errno: i32 },
}

/// The messages of a datagram, and for each whether it says that the listing is not consistent.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = (Message, bool)> {
    nlmsg::messages(datagram).map(|message| {
        let body = &message[HEADER..];
        let errno = || {
            number(body, 0).map_or(libc::EBADMSG, |raw| i32::from_ne_bytes(raw).saturating_neg())
        };
        let content = match nlmsg::kind(message) {
            NEW => flow(body).map_or(Message::Other, Message::Flow),
            // Old kernels end with an empty message.
            DONE if body.is_empty() => Message::Done(0),
            DONE => Message::Done(errno()),
            ERROR => {
                let sequence = number(body, 12).map_or(0, u32::from_ne_bytes);
                Message::Answer { sequence, errno: errno() }
            }
            _ => Message::Other,
        };
        (content, nlmsg::flags(message) & DUMP_INTERRUPTED != 0)
    })
}

/// A request to list flows; `in_kernel` asks the kernel to apply the whole filter, not the family
/// alone.
pub(super) fn list(sequence: u32, filter: &Filter, in_kernel: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    message(&mut bytes, GET, REQUEST | DUMP, sequence, filter.family, |bytes| {
        if !in_kernel {
            return;
        }
        let mut matching = MATCH_PROTO_NUM;
        nested(bytes, TUPLE_ORIG, |bytes| {
            // Kernels that filter compare IPv6 addresses the wrong way round (seen on 6.18): they
            // would leave out exactly the flows asked for.
            if let Some(address @ IpAddr::V4(_)) = filter.address {
                matching |= MATCH_IP_DST;
                nested(bytes, TUPLE_IP, |bytes| destination(bytes, address));
            }
            nested(bytes, TUPLE_PROTO, |bytes| {
                put(bytes, PROTO_NUM, &[Protocol::Udp.number()]);
                if let Some(port) = filter.port {
                    matching |= MATCH_PROTO_DST_PORT;
                    put(bytes, PROTO_DST_PORT, &port.to_be_bytes());
                }
            });
        });
        nested(bytes, FILTER, |bytes| {
            put(bytes, FILTER_ORIG_FLAGS, &matching.to_ne_bytes());
        });
    });
    bytes
}

/// Appends a request to delete a flow: the entry itself, not a later one between the same ends. A
/// request without a tuple would delete everything, so the tuple is not optional here. Success is
/// not acknowledged, failure always is.
pub(super) fn delete(bytes: &mut Vec<u8>, sequence: u32, flow: &Flow) {
    let Flow { protocol, original, id, .. } = *flow;
    let family = Family::of(original.destination.ip());
    message(bytes, DELETE, REQUEST, sequence, family, |bytes| {
        nested(bytes, TUPLE_ORIG, |bytes| tuple(bytes, protocol, &original));
        if let Some(id) = id {
            put(bytes, ID, &id.to_be_bytes());
        }
    });
}

fn tuple(bytes: &mut Vec<u8>, protocol: u8, tuple: &Tuple) {
    nested(bytes, TUPLE_IP, |bytes| {
        match tuple.source.ip() {
            IpAddr::V4(v4) => put(bytes, V4_SRC, &v4.octets()),
            IpAddr::V6(v6) => put(bytes, V6_SRC, &v6.octets()),
        }
        destination(bytes, tuple.destination.ip());
    });
    nested(bytes, TUPLE_PROTO, |bytes| {
        put(bytes, PROTO_NUM, &[protocol]);
        put(bytes, PROTO_SRC_PORT, &tuple.source.port().to_be_bytes());
        put(bytes, PROTO_DST_PORT, &tuple.destination.port().to_be_bytes());
    });
}

fn destination(bytes: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => put(bytes, V4_DST, &v4.octets()),
        IpAddr::V6(v6) => put(bytes, V6_DST, &v6.octets()),
    }
}

/// Appends a message: `nlmsghdr`, `nfgenmsg`, and what `body` appends.
fn message(
    bytes: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    family: Family,
    body: impl FnOnce(&mut Vec<u8>),
) {
    let start = nlmsg::begin(bytes, kind, flags, sequence);
    bytes.extend([family_number(family), 0, 0, 0]);
    body(bytes);
    nlmsg::end(bytes, start);
}

fn family_number(family: Family) -> u8 {
    let number = match family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    };
    u8::try_from(number).expect("address families are small numbers")
}

fn nested(bytes: &mut Vec<u8>, kind: u16, body: impl FnOnce(&mut Vec<u8>)) {
    let start = nlmsg::open(bytes, kind | NESTED);
    body(bytes);
    nlmsg::close(bytes, start);
}

/// Reads a listed flow, behind the message header.
fn flow(body: &[u8]) -> Option<Flow> {
    let (mut original, mut reply, mut id, mut zone) = (None, None, None, 0);
    for (kind, value) in attributes(body.get(GENMSG..)?) {
        match kind {
            TUPLE_ORIG => original = Some(read_tuple(value)?),
            TUPLE_REPLY => reply = Some(read_tuple(value)?),
            ID => id = Some(u32::from_be_bytes(number(value, 0)?)),
            ZONE => zone = u16::from_be_bytes(number(value, 0)?),
            _ => {}
        }
    }
    let (original, reply) = (original?, reply?);
    // A zone may be given for one direction only.
    let zone = [zone, original.zone, reply.zone].into_iter().find(|z| *z != 0).unwrap_or(0);
    let protocol = original.protocol;
    Some(Flow { protocol, zone, original: original.tuple, reply: reply.tuple, id })
}

struct ReadTuple {
    protocol: u8,
    zone: u16,
    tuple: Tuple,
}

fn read_tuple(bytes: &[u8]) -> Option<ReadTuple> {
    let (mut source, mut destination) = (None, None);
    let (mut protocol, mut source_port, mut destination_port) = (None, None, None);
    let mut zone = 0;
    for (kind, value) in attributes(bytes) {
        match kind {
            TUPLE_IP => {
                for (kind, value) in attributes(value) {
                    match kind {
                        V4_SRC => source = Some(v4(value)?),
                        V4_DST => destination = Some(v4(value)?),
                        V6_SRC => source = Some(v6(value)?),
                        V6_DST => destination = Some(v6(value)?),
                        _ => {}
                    }
                }
            }
            TUPLE_PROTO => {
                for (kind, value) in attributes(value) {
                    match kind {
                        PROTO_NUM => protocol = value.first().copied(),
                        PROTO_SRC_PORT => source_port = Some(u16::from_be_bytes(number(value, 0)?)),
                        PROTO_DST_PORT => {
                            destination_port = Some(u16::from_be_bytes(number(value, 0)?));
                        }
                        _ => {}
                    }
                }
            }
            TUPLE_ZONE => zone = u16::from_be_bytes(number(value, 0)?),
            _ => {}
        }
    }
    Some(ReadTuple {
        protocol: protocol?,
        zone,
        tuple: Tuple {
            source: SocketAddr::new(source?, source_port?),
            destination: SocketAddr::new(destination?, destination_port?),
        },
    })
}

fn v4(value: &[u8]) -> Option<IpAddr> {
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?).into())
}

fn v6(value: &[u8]) -> Option<IpAddr> {
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A listed flow, as the kernel would write it.
    fn listed(flow: &Flow) -> Vec<u8> {
        let mut bytes = Vec::new();
        let family = Family::of(flow.original.destination.ip());
        message(&mut bytes, NEW, 2, 1, family, |bytes| {
            nested(bytes, TUPLE_ORIG, |bytes| tuple(bytes, flow.protocol, &flow.original));
            nested(bytes, TUPLE_REPLY, |bytes| tuple(bytes, flow.protocol, &flow.reply));
            if let Some(id) = flow.id {
                put(bytes, ID, &id.to_be_bytes());
            }
            if flow.zone != 0 {
                put(bytes, ZONE, &flow.zone.to_be_bytes());
            }
        });
        bytes
    }

    fn read(datagram: &[u8]) -> Vec<(Message, bool)> {
        messages(datagram).collect()
    }

    prop_compose! {
        fn flows()(
            v6 in any::<bool>(),
            hosts in any::<[u128; 4]>(),
            ports in any::<[u16; 4]>(),
            protocol in any::<u8>(),
            zone in any::<u16>(),
            id in any::<Option<u32>>(),
        ) -> Flow {
            let end = |i: usize| {
                let host = if v6 {
                    IpAddr::V6(hosts[i].into())
                } else {
                    let [a, b, c, d, ..] = hosts[i].to_be_bytes();
                    IpAddr::from([a, b, c, d])
                };
                SocketAddr::new(host, ports[i])
            };
            let original = Tuple { source: end(0), destination: end(1) };
            Flow { protocol, zone, original, reply: Tuple { source: end(2), destination: end(3) }, id }
        }
    }

    proptest! {
        #[test]
        fn a_flow_is_read_as_it_was_written(list in prop::collection::vec(flows(), 0..4)) {
            let datagram: Vec<u8> = list.iter().flat_map(listed).collect();
            let expected: Vec<_> = list.into_iter().map(|f| (Message::Flow(f), false)).collect();
            prop_assert_eq!(read(&datagram), expected);
        }

        #[test]
        fn anything_is_read_without_panic(
            flow in flows(),
            noise in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = listed(&flow);
            for (at, value) in noise {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(cut.index(bytes.len() + 1));
            let _ = read(&bytes);
        }

        #[test]
        fn a_deletion_names_the_flow_and_nothing_but_it(flow in flows()) {
            let mut bytes = vec![0xff; 8];
            delete(&mut bytes, 5, &flow);
            let request = &bytes[8..];
            prop_assert_eq!(number(request, 0).map(u32::from_ne_bytes), Some(u32::try_from(request.len()).unwrap()));
            let found: Vec<_> = attributes(&request[HEADER + 4..]).collect();
            prop_assert_eq!(found[0].0, TUPLE_ORIG);
            let read = read_tuple(found[0].1).unwrap();
            prop_assert_eq!((read.protocol, read.tuple), (flow.protocol, flow.original));
            let id = flow.id.map(u32::to_be_bytes);
            let rest: Vec<_> = id.iter().map(|id| (ID, &id[..])).collect();
            prop_assert_eq!(&found[1..], &rest[..]);
        }
    }

    #[test]
    fn ends_and_answers_are_told_apart() {
        let with = |kind: u16, flags: u16, body: &[u8]| {
            let mut bytes = Vec::new();
            message(&mut bytes, kind, flags, 9, Family::V4, |bytes| {
                bytes.truncate(HEADER);
                bytes.extend(body);
            });
            read(&bytes)
        };
        assert_eq!(with(DONE, 2, &[0; 4]), [(Message::Done(0), false)]);
        assert_eq!(with(DONE, 2, &[]), [(Message::Done(0), false)]);
        let broken = (-libc::EINTR).to_ne_bytes();
        let interrupted = [(Message::Done(libc::EINTR), true)];
        assert_eq!(with(DONE, 2 | DUMP_INTERRUPTED, &broken), interrupted);
        let mut answer = (-libc::ENOENT).to_ne_bytes().to_vec();
        answer.extend([16, 0, 0, 0, 2, 1, 1, 0, 77, 0, 0, 0, 0, 0, 0, 0]);
        let refused = Message::Answer { sequence: 77, errno: libc::ENOENT };
        assert_eq!(with(ERROR, 0, &answer), [(refused, false)]);
    }

    #[test]
    fn a_listing_asks_the_kernel_to_filter_or_does_not() {
        let filter = Filter {
            family: Family::V4,
            address: Some(IpAddr::from([10, 96, 0, 10])),
            port: Some(53),
        };
        let plain = list(1, &filter, false);
        assert_eq!(plain.len(), HEADER + 4);
        assert_eq!(plain[HEADER], 2);
        let full = list(1, &filter, true);
        let kinds: Vec<u16> = attributes(&full[HEADER + 4..]).map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [TUPLE_ORIG, FILTER]);
        assert!(full.windows(4).any(|bytes| bytes == [10, 96, 0, 10]));
        let six = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x53);
        let six = Filter { family: Family::V6, address: Some(six.into()), port: Some(53) };
        assert!(!list(1, &six, true).windows(2).any(|bytes| bytes == [0xfd, 0]));
    }

    /// Found by tests/fuzz.
    #[test]
    fn an_error_number_without_a_positive_one_is_read() {
        let mut datagram = vec![0; 20];
        datagram[0] = 20;
        datagram[4..6].copy_from_slice(&DONE.to_ne_bytes());
        datagram[16..].copy_from_slice(&i32::MIN.to_ne_bytes());
        let read: Vec<_> = messages(&datagram).collect();
        assert_eq!(read, [(Message::Done(i32::MAX), false)]);
    }
}
