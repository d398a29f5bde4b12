//! The lengths of a Service's source ranges.
//!
//! A set that finds ranges among keys of several fields is dear to change (`pipapo`: each element that
//! goes is searched for from the first one on). Here it is a set of plain keys, which is asked once for
//! each length that a range can have; so a chain is named after the lengths that it asks for, and
//! Services whose ranges have the same ones share it.

use std::fmt;
use std::str::FromStr;

use super::UnknownName;

/// Lengths of prefixes, 1 to 128, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrefixLengths(u128);

impl PrefixLengths {
    /// How many fit into a chain's name at most (of three digits each).
    pub const MAX: u32 = 60;

    /// These lengths; None if there are none, or others than 1 to 128 among them.
    #[must_use]
    pub fn new(lengths: impl IntoIterator<Item = u8>) -> Option<Self> {
        let mut bits = 0;
        for length in lengths {
            bits |= 1_u128.checked_shl(u32::from(length.checked_sub(1)?))?;
        }
        (bits != 0).then_some(Self(bits))
    }

    /// The lengths, the shortest one first.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (1..=128).filter(move |length| self.0 >> (length - 1) & 1 == 1)
    }

    /// How many there are.
    #[must_use]
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }
}

/// `24-32`
impl fmt::Display for PrefixLengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, length) in self.iter().enumerate() {
            write!(f, "{}{length}", if index == 0 { "" } else { "-" })?;
        }
        Ok(())
    }
}

impl FromStr for PrefixLengths {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        let lengths: Option<Vec<u8>> = text.split('-').map(|length| length.parse().ok()).collect();
        lengths.and_then(Self::new).ok_or(UnknownName)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_read_as_they_are_written() {
        let lengths = PrefixLengths::new([32, 1, 128, 24, 24]).unwrap();
        assert_eq!((lengths.to_string().as_str(), lengths.count()), ("1-24-32-128", 4));
        assert_eq!("1-24-32-128".parse(), Ok(lengths));
        for wrong in ["", "0", "129", "24-", "24-x", "300"] {
            assert_eq!(wrong.parse::<PrefixLengths>(), Err(UnknownName), "{wrong}");
        }
        assert_eq!(PrefixLengths::new([]), None);
    }
}
