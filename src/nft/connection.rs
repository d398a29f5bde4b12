//! What connections are counted by: what was dialled, and who answered.
//!
//! The elements of the set `connections` are made by packets and age, so that they are no part of a
//! ruleset. Only their keys are understood here, in the layout that [`super::element`] describes.

use std::net::IpAddr;

use super::element::{Backend, Reader, padded_len};
use super::names::KeyField;
use crate::model::{Family, Protocol};

/// The fields of a key, as [`super::rule::COUNTED_BY`] has them.
pub const CONNECTION: [KeyField; 5] =
    [KeyField::Address, KeyField::Protocol, KeyField::Port, KeyField::Address, KeyField::Port];

/// A pair of a frontend and a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Connection {
    /// The address that was dialled; of a node port, the node's.
    pub address: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The port that was dialled.
    pub port: u16,
    /// The endpoint that it was translated to.
    pub backend: Backend,
}

impl Connection {
    /// Length of a key in the kernel.
    #[must_use]
    pub fn len(family: Family) -> u32 {
        CONNECTION.iter().map(|&field| padded_len(family, field)).sum()
    }

    /// Reads a key. None if the bytes are not of that shape.
    #[must_use]
    pub fn from_bytes(family: Family, bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader { bytes };
        let connection = Self {
            address: reader.address(family)?,
            protocol: reader.protocol()?,
            port: reader.port()?,
            backend: Backend { address: reader.address(family)?, port: reader.port()? },
        };
        reader.bytes.is_empty().then_some(connection)
    }
}

/// The counters of both families, as they were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// How many connections each pair had since its counter began.
    pub connections: Vec<(Connection, u64)>,
    /// The sets they are in, in the order of [`Family::BOTH`]; None where nothing is counted.
    pub sets: [Option<CounterSet>; 2],
    /// Whether this is all of them: else the time was over.
    pub complete: bool,
}

/// The set of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterSet {
    /// The kernel's numbers of the table and of the set in it: another set has others, even if it has
    /// the same name.
    pub handle: (u64, u64),
    /// How many pairs it has.
    pub pairs: usize,
}

impl Counters {
    /// Whether connections are counted at all.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.sets.iter().any(Option::is_some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_field_by_field() {
        let mut bytes = vec![10, 96, 0, 10, 6, 0, 0, 0, 0, 80, 0, 0, 10, 244, 1, 5, 31, 144, 0, 0];
        assert_eq!(bytes.len(), Connection::len(Family::V4) as usize);
        let read = Connection::from_bytes(Family::V4, &bytes).unwrap();
        assert_eq!(read.address, IpAddr::from([10, 96, 0, 10]));
        assert_eq!((read.protocol, read.port), (Protocol::Tcp, 80));
        assert_eq!(read.backend, Backend { address: [10, 244, 1, 5].into(), port: 8080 });
        assert_eq!(Connection::from_bytes(Family::V6, &bytes), None);
        bytes.push(0);
        assert_eq!(Connection::from_bytes(Family::V4, &bytes), None);
    }

    #[test]
    fn connections_are_counted_where_either_family_has_the_set() {
        let set = Some(CounterSet { handle: (1, 2), pairs: 0 });
        for (sets, is_on) in [([None, None], false), ([set, None], true), ([None, set], true)] {
            assert_eq!(Counters { sets, ..Counters::default() }.is_on(), is_on);
        }
    }
}
