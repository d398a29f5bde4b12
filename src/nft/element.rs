//! Elements of the sets and maps: typed keys and values, and the bytes the kernel keeps them as.
//!
//! A key is fixed-size and `Copy`, because tens of thousands of them are compared, sorted and kept
//! for every Service. The byte layout is here, beside the type, and used by both directions: what is
//! sent and what is dumped.

mod rank;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, IpSubnets, Ipv4Subnets, Ipv6Subnets};

use super::names::{ChainName, DataType, KeyField, SetName};
use crate::model::{Family, Protocol};

/// Which element: family, set and key. The order is that of the table's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ElementId {
    /// The table.
    pub family: Family,
    /// The set or map in it.
    pub set: SetName,
    /// The key in that.
    pub key: Key,
}

/// The key of an element, one variant for each shape that [`SetName::key`] names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// `daddr . l4proto . dport`
    Frontend(IpAddr, Protocol, u16),
    /// `daddr . l4proto . dport . first . last` of a range of source addresses, truncated to its prefix.
    Sources(IpAddr, Protocol, u16, IpNet),
    /// `daddr . l4proto . dport . slot`
    Slot(IpAddr, Protocol, u16, u16),
    /// `l4proto . dport`
    NodePort(Protocol, u16),
    /// `l4proto . dport . slot`
    NodePortSlot(Protocol, u16, u16),
    /// `addr`
    Address(IpAddr),
    /// `addr . addr`
    Pair(IpAddr, IpAddr),
    /// `daddr . dport`, where the protocol is the map's.
    AddressPort(IpAddr, u16),
    /// `dport`, likewise.
    Port(u16),
    /// `l4proto . dport . backend`
    NodePortBackend(Protocol, u16, Backend),
    /// `first-last`, both included.
    Range(IpAddr, IpAddr),
}

/// What an element maps to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Value {
    /// Nothing: the element of a set.
    None,
    /// `goto` a chain.
    Goto(ChainName),
    /// `jump` to a chain, to come back if nothing there decides.
    Jump(ChainName),
    /// Drop the packet.
    Drop,
    /// A backend.
    Backend(Backend),
}

/// Many elements, by their keys. A list and no tree: it is made at once, of hundreds of thousands, and
/// then read in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Elements(Vec<(ElementId, Value)>);

impl Elements {
    /// The value of an element.
    #[must_use]
    pub fn get(&self, id: &ElementId) -> Option<&Value> {
        let index = self.0.binary_search_by(|(other, _)| other.cmp(id)).ok()?;
        Some(&self.0[index].1)
    }

    /// The elements from this one on, in order.
    #[must_use]
    pub fn from(&self, first: &ElementId) -> &[(ElementId, Value)] {
        &self.0[self.0.partition_point(|(id, _)| id < first)..]
    }

    /// All of them, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, (ElementId, Value)> {
        self.0.iter()
    }
}

/// Of several values for one key, the last one counts.
impl FromIterator<(ElementId, Value)> for Elements {
    fn from_iter<I: IntoIterator<Item = (ElementId, Value)>>(elements: I) -> Self {
        let mut list: Vec<_> = elements.into_iter().collect();
        list.sort_by_cached_key(|(id, _)| id.rank());
        for alike in list.chunk_by_mut(|(a, _), (b, _)| a.rank() == b.rank()) {
            alike.sort_by_key(|(id, _)| *id);
        }
        list.dedup_by(|(next, value), (id, kept)| {
            let same = next == id;
            if same {
                std::mem::swap(value, kept);
            }
            same
        });
        Self(list)
    }
}

impl IntoIterator for Elements {
    type Item = (ElementId, Value);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a> IntoIterator for &'a Elements {
    type Item = &'a (ElementId, Value);
    type IntoIter = std::slice::Iter<'a, (ElementId, Value)>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Where a connection is sent: address and port of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// The endpoint's address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

/// A key or value in the kernel's own layout: every field padded to four bytes, network order, but
/// for the slot, which `numgen` writes in host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes {
    data: [u8; Self::MAX],
    len: usize,
}

impl Bytes {
    /// Longest key: an IPv6 address, protocol, port and a range of sources. (The kernel has room for 64.)
    pub const MAX: usize = 56;

    fn new() -> Self {
        Self { data: [0; Self::MAX], len: 0 }
    }

    fn field(mut self, field: &[u8]) -> Self {
        self.data[self.len..self.len + field.len()].copy_from_slice(field);
        self.len += field.len().next_multiple_of(4);
        self
    }

    fn address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => self.field(&v4.octets()),
            IpAddr::V6(v6) => self.field(&v6.octets()),
        }
    }

    fn protocol(self, protocol: Protocol) -> Self {
        self.field(&[protocol.number()])
    }

    fn port(self, port: u16) -> Self {
        self.field(&port.to_be_bytes())
    }

    fn slot(self, slot: u16) -> Self {
        self.field(&u32::from(slot).to_ne_bytes())
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.data[..self.len]
    }
}

impl Key {
    /// The key as the kernel keeps it; of a range, its first one.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        let bytes = Bytes::new();
        match *self {
            Self::Frontend(a, proto, port) => bytes.address(a).protocol(proto).port(port),
            Self::Slot(a, proto, port, slot) => {
                bytes.address(a).protocol(proto).port(port).slot(slot)
            }
            Self::NodePort(proto, port) => bytes.protocol(proto).port(port),
            Self::NodePortSlot(proto, port, slot) => bytes.protocol(proto).port(port).slot(slot),
            Self::Address(a) | Self::Range(a, _) => bytes.address(a),
            Self::Pair(a, b) => bytes.address(a).address(b),
            Self::Sources(a, proto, port, net) => {
                let frontend = bytes.address(a).protocol(proto).port(port);
                frontend.address(net.network()).address(net.broadcast())
            }
            Self::AddressPort(a, port) => bytes.address(a).port(port),
            Self::NodePortBackend(proto, port, backend) => {
                bytes.protocol(proto).port(port).address(backend.address).port(backend.port)
            }
            Self::Port(port) => {
                let mut bytes = bytes.port(port);
                bytes.len = PORT_LEN;
                bytes
            }
        }
    }

    /// The key that closes a range in the kernel: the first address behind it. None if the key is
    /// no range, or the range reaches the end of the address space.
    #[must_use]
    pub fn range_end(&self) -> Option<Bytes> {
        let Self::Range(_, last) = *self else { return None };
        let behind = match last {
            IpAddr::V4(v4) => IpAddr::V4(Ipv4Addr::from(u32::from(v4).checked_add(1)?)),
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6).checked_add(1)?)),
        };
        Some(Bytes::new().address(behind))
    }

    /// Reads a key of a set that is no interval set. None if the bytes are not of that shape.
    #[must_use]
    pub fn from_bytes(family: Family, set: SetName, bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader { bytes };
        let key = match set.key() {
            [KeyField::Address, KeyField::Protocol, KeyField::Port] => {
                Self::Frontend(reader.address(family)?, reader.protocol()?, reader.port()?)
            }
            [KeyField::Address, KeyField::Protocol, KeyField::Port, KeyField::Slot] => Self::Slot(
                reader.address(family)?,
                reader.protocol()?,
                reader.port()?,
                reader.slot()?,
            ),
            [
                KeyField::Address,
                KeyField::Protocol,
                KeyField::Port,
                KeyField::Address,
                KeyField::Address,
            ] => {
                let frontend = (reader.address(family)?, reader.protocol()?, reader.port()?);
                let range = prefix(reader.address(family)?, reader.address(family)?)?;
                Self::Sources(frontend.0, frontend.1, frontend.2, range)
            }
            [KeyField::Protocol, KeyField::Port] => {
                Self::NodePort(reader.protocol()?, reader.port()?)
            }
            [KeyField::Protocol, KeyField::Port, KeyField::Slot] => {
                Self::NodePortSlot(reader.protocol()?, reader.port()?, reader.slot()?)
            }
            [KeyField::Address] => Self::Address(reader.address(family)?),
            [KeyField::Address, KeyField::Address] => {
                Self::Pair(reader.address(family)?, reader.address(family)?)
            }
            [KeyField::Address, KeyField::Port] => {
                Self::AddressPort(reader.address(family)?, reader.port()?)
            }
            [KeyField::Protocol, KeyField::Port, KeyField::Address, KeyField::Port] => {
                let (protocol, port) = (reader.protocol()?, reader.port()?);
                let backend = Backend { address: reader.address(family)?, port: reader.port()? };
                Self::NodePortBackend(protocol, port, backend)
            }
            [KeyField::Port] => {
                return bytes.try_into().ok().map(|port| Self::Port(u16::from_be_bytes(port)));
            }
            _ => return None,
        };
        reader.bytes.is_empty().then_some(key)
    }
}

impl Backend {
    /// The backend as the kernel keeps it.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        Bytes::new().address(self.address).port(self.port)
    }

    /// Reads a backend. None if the bytes are not of that shape.
    #[must_use]
    pub fn from_bytes(family: Family, bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader { bytes };
        let backend = Self { address: reader.address(family)?, port: reader.port()? };
        reader.bytes.is_empty().then_some(backend)
    }
}

/// Length in the kernel of a field that is padded to whole registers.
#[must_use]
pub fn padded_len(family: Family, field: KeyField) -> u32 {
    match (field, family) {
        (KeyField::Address, Family::V6) => 16,
        _ => 4,
    }
}

/// A port that is a key alone, which is not padded.
const PORT_LEN: usize = 2;

/// Length of a set's keys in the kernel. A key of one field is not padded.
#[must_use]
pub fn key_len(family: Family, set: SetName) -> u32 {
    if let [KeyField::Port] = set.key() {
        return 2;
    }
    set.key().iter().map(|&field| padded_len(family, field)).sum()
}

/// Length of a set's data in the kernel.
#[must_use]
pub fn data_len(family: Family, set: SetName) -> u32 {
    match set.data() {
        DataType::None | DataType::Verdict => 0,
        DataType::Backend => {
            padded_len(family, KeyField::Address) + padded_len(family, KeyField::Port)
        }
    }
}

/// Takes the fields of a key or value one after the other.
pub(super) struct Reader<'a> {
    pub(super) bytes: &'a [u8],
}

impl Reader<'_> {
    /// Takes a field and its padding, which is zero in all that is ours: with another, it is another key
    /// to the kernel.
    fn field<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.bytes.split_at_checked(N.next_multiple_of(4))?;
        self.bytes = rest;
        let (field, padding) = field.split_at(N);
        padding.iter().all(|&byte| byte == 0).then(|| field.try_into().ok())?
    }

    pub(super) fn address(&mut self, family: Family) -> Option<IpAddr> {
        Some(match family {
            Family::V4 => IpAddr::from(self.field::<4>()?),
            Family::V6 => IpAddr::from(self.field::<16>()?),
        })
    }

    pub(super) fn protocol(&mut self) -> Option<Protocol> {
        let [number] = self.field::<1>()?;
        Protocol::from_number(number)
    }

    pub(super) fn port(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.field()?))
    }

    fn slot(&mut self) -> Option<u16> {
        u32::from_ne_bytes(self.field()?).try_into().ok()
    }
}

/// The key as nft writes it.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frontend(a, proto, port) => write!(f, "{a} . {proto} . {port}"),
            Self::Slot(a, proto, port, slot) => write!(f, "{a} . {proto} . {port} . {slot}"),
            Self::NodePort(proto, port) => write!(f, "{proto} . {port}"),
            Self::NodePortSlot(proto, port, slot) => write!(f, "{proto} . {port} . {slot}"),
            Self::Sources(a, proto, port, net) => {
                write!(f, "{a} . {proto} . {port} . {} . {}", net.network(), net.broadcast())
            }
            Self::AddressPort(a, port) => write!(f, "{a} . {port}"),
            Self::Port(port) => write!(f, "{port}"),
            Self::NodePortBackend(proto, port, backend) => {
                write!(f, "{proto} . {port} . {backend}")
            }
            Self::Address(a) => write!(f, "{a}"),
            Self::Pair(a, b) => write!(f, "{a} . {b}"),
            Self::Range(first, last) => match prefix(*first, *last) {
                Some(net) if net.prefix_len() == net.max_prefix_len() => write!(f, "{first}"),
                Some(net) => write!(f, "{net}"),
                None => write!(f, "{first}-{last}"),
            },
        }
    }
}

/// The prefix that is just this range, if there is one.
pub(super) fn prefix(first: IpAddr, last: IpAddr) -> Option<IpNet> {
    let mut subnets = match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) => IpSubnets::from(Ipv4Subnets::new(first, last, 0)),
        (IpAddr::V6(first), IpAddr::V6(last)) => IpSubnets::from(Ipv6Subnets::new(first, last, 0)),
        _ => return None,
    };
    subnets.next().filter(|_| subnets.next().is_none())
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} . {}", self.address, self.port)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Drop => f.write_str("drop"),
            Self::Backend(backend) => write!(f, "{backend}"),
        }
    }
}

/// `ip services: 10.96.0.10 . tcp . 80`, for messages.
impl fmt::Display for ElementId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.family, self.set, self.key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_slot_key_is_padded_and_only_its_slot_is_in_host_order() {
        let key = Key::Slot([10, 96, 0, 10].into(), Protocol::Tcp, 80, 3);
        let mut wanted = vec![10, 96, 0, 10, 6, 0, 0, 0, 0, 80, 0, 0];
        wanted.extend(3_u32.to_ne_bytes());
        assert_eq!(key.bytes().as_slice(), wanted);
    }

    #[test]
    fn a_value_is_as_long_as_what_it_maps_to() {
        let backend = Backend { address: [10, 244, 0, 1].into(), port: 8080 };
        for (family, set, length) in [
            (Family::V4, SetName::Endpoints, 8),
            (Family::V6, SetName::NodeportEndpoints, 20),
            (Family::V6, SetName::Services, 0),
            (Family::V6, SetName::Hairpin, 0),
        ] {
            assert_eq!(data_len(family, set), length);
        }
        let bytes = backend.bytes();
        assert_eq!(bytes.as_slice(), [10, 244, 0, 1, 0x1f, 0x90, 0, 0]);
        assert_eq!(Backend::from_bytes(Family::V4, bytes.as_slice()), Some(backend));
        assert_eq!(Backend::from_bytes(Family::V6, bytes.as_slice()), None);
    }

    #[test]
    fn elements_from_one_on_begin_with_it() {
        let id = |port| {
            let key = Key::NodePort(Protocol::Tcp, port);
            ElementId { family: Family::V4, set: SetName::Nodeports, key }
        };
        let elements: Elements =
            [3, 1, 2].map(|port| (id(port), Value::Drop)).into_iter().collect();
        for (first, ports) in [(0, vec![1, 2, 3]), (2, vec![2, 3]), (4, vec![])] {
            let found: Vec<_> = elements.from(&id(first)).iter().map(|(id, _)| *id).collect();
            assert_eq!(found, ports.into_iter().map(id).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_range_is_written_as_what_it_is() {
        let range = |first: [u8; 4], last: [u8; 4]| Key::Range(first.into(), last.into());
        for (key, text) in [
            (range([10, 0, 0, 1], [10, 0, 0, 1]), "10.0.0.1"),
            (range([10, 0, 0, 0], [10, 0, 255, 255]), "10.0.0.0/16"),
            (range([10, 0, 0, 1], [10, 0, 0, 2]), "10.0.0.1-10.0.0.2"),
        ] {
            assert_eq!(key.to_string(), text);
        }
        let key = Key::Frontend([10, 96, 0, 10].into(), Protocol::Tcp, 80);
        let id = ElementId { family: Family::V4, set: SetName::Services, key };
        assert_eq!(id.to_string(), "ip services: 10.96.0.10 . tcp . 80");
    }

    #[test]
    fn a_range_ends_behind_its_last_address() {
        let range = Key::Range([10, 96, 0, 0].into(), [10, 96, 255, 255].into());
        assert_eq!(range.range_end().unwrap().as_slice(), [10, 97, 0, 0]);
        let all = Key::Range([0, 0, 0, 0].into(), [255, 255, 255, 255].into());
        assert_eq!(all.range_end(), None);
    }

    fn any_key() -> impl Strategy<Value = (Family, SetName, Key)> {
        let proto = prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)];
        (
            any::<bool>(),
            0..SetName::ALL.len(),
            any::<u128>(),
            any::<u128>(),
            proto,
            any::<u16>(),
            any::<u16>(),
        )
            .prop_filter_map(
                "interval sets are read in pairs",
                |(v6, set, a, b, proto, port, slot)| {
                    let set = SetName::ALL[set];
                    let family = if v6 { Family::V6 } else { Family::V4 };
                    let ip = |bits: u128| match family {
                        Family::V4 => IpAddr::V4(Ipv4Addr::from((bits >> 96) as u32)),
                        Family::V6 => IpAddr::V6(Ipv6Addr::from(bits)),
                    };
                    let key = match set.key() {
                        [KeyField::Address, KeyField::Protocol, KeyField::Port] => {
                            Key::Frontend(ip(a), proto, port)
                        }
                        [KeyField::Address, .., KeyField::Address] if set.key().len() == 5 => {
                            let source = ip(b);
                            let longest = if source.is_ipv4() { 32 } else { 128 };
                            let net =
                                IpNet::new(source, slot.to_be_bytes()[1] % (longest + 1)).unwrap();
                            Key::Sources(ip(a), proto, port, net.trunc())
                        }
                        [KeyField::Address, KeyField::Port] => Key::AddressPort(ip(a), port),
                        [KeyField::Port] => Key::Port(port),
                        [KeyField::Address, KeyField::Protocol, ..] => {
                            Key::Slot(ip(a), proto, port, slot)
                        }
                        [KeyField::Protocol, KeyField::Port] => Key::NodePort(proto, port),
                        [KeyField::Protocol, .., KeyField::Address, KeyField::Port] => {
                            let backend = Backend { address: ip(a), port: slot };
                            Key::NodePortBackend(proto, port, backend)
                        }
                        [KeyField::Protocol, ..] => Key::NodePortSlot(proto, port, slot),
                        [KeyField::Address] => Key::Address(ip(a)),
                        _ => Key::Pair(ip(a), ip(b)),
                    };
                    Some((family, set, key))
                },
            )
    }

    #[test]
    fn a_key_with_something_in_its_padding_is_none_of_ours() {
        let read = |bytes: &[u8]| Key::from_bytes(Family::V4, SetName::Nodeports, bytes);
        let key = Key::NodePort(Protocol::Tcp, 80);
        assert_eq!(read(&[6, 0, 0, 0, 0, 80, 0, 0]), Some(key));
        assert_eq!(read(&[6, 0, 0, 1, 0, 80, 0, 0]), None);
        assert_eq!(read(&[6, 0, 0, 0, 0, 80, 0, 1]), None);
    }

    proptest! {
        #[test]
        fn keys_read_back_what_they_write((family, set, key) in any_key()) {
            let bytes = key.bytes();
            prop_assert_eq!(u32::try_from(bytes.as_slice().len()).unwrap(), key_len(family, set));
            let read = Key::from_bytes(family, set, bytes.as_slice());
            prop_assert_eq!(read, Some(key));
        }

        #[test]
        fn many_elements_are_in_the_order_of_two(all in prop::collection::vec((any_key(), any::<bool>()), 2..40)) {
            // Some differ in little: in what is behind the first bits of an address.
            let ids: Vec<_> = all
                .into_iter()
                .flat_map(|((family, set, key), again)| {
                    let near = match key {
                        Key::Slot(a, proto, port, slot) => Key::Slot(a, proto, port, !slot),
                        Key::Pair(a, b) => Key::Pair(a, if again { a } else { b }),
                        other => other,
                    };
                    [key, near].map(|key| ElementId { family, set, key })
                })
                .collect();
            let elements: Elements = ids.iter().map(|id| (*id, Value::None)).collect();
            let mut ids = ids;
            ids.sort_unstable();
            ids.dedup();
            prop_assert!(elements.iter().map(|(id, _)| id).eq(&ids), "{:?}", ids);
            for id in &ids {
                prop_assert_eq!(elements.get(id), Some(&Value::None));
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for family in Family::BOTH {
                for set in SetName::ALL {
                    let _ = Key::from_bytes(family, set, &bytes);
                }
                let _ = Backend::from_bytes(family, &bytes);
            }
        }
    }
}
