//! The lengths of a Service's source ranges.
//!
//! A set that finds ranges among keys of several fields is dear to change (`pipapo`: each element that
//! goes is searched for from the first one on). Here it is a set of plain keys, which is asked once for
//! each length that a range can have; so a chain is named after the lengths that it asks for, and
//! Services whose ranges have the same ones can share it.

use std::fmt;
use std::str::FromStr;

use super::UnknownName;

/// Lengths of prefixes, 1 to 128, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrefixLengths(u128);

impl PrefixLengths {
    /// How many a chain's name lists at most: there has to be room for that of a Service.
    const LISTED: u32 = 12;

    /// What more of them are written as begins with: a number in hexadecimal, whose lowest bit is length 1.
    pub const MASK: char = 'x';

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
}

/// `24-32`
impl fmt::Display for PrefixLengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.count_ones() > Self::LISTED {
            return write!(f, "{}{:X}", Self::MASK, self.0);
        }
        for (index, length) in self.iter().enumerate() {
            write!(f, "{}{length}", if index == 0 { "" } else { "-" })?;
        }
        Ok(())
    }
}

impl FromStr for PrefixLengths {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        if let Some(mask) = text.strip_prefix(Self::MASK) {
            let bits = u128::from_str_radix(mask, 16).map_err(|_| UnknownName)?;
            return if bits == 0 { Err(UnknownName) } else { Ok(Self(bits)) };
        }
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
        assert_eq!(lengths.to_string(), "1-24-32-128");
        assert_eq!("1-24-32-128".parse(), Ok(lengths));
        let many = |last| PrefixLengths::new(1..=last).unwrap();
        for (lengths, written) in [
            (many(12), "1-2-3-4-5-6-7-8-9-10-11-12".to_owned()),
            (many(13), "x1FFF".to_owned()),
            (many(128), format!("x{}", "F".repeat(32))),
        ] {
            assert_eq!(lengths.to_string(), written);
            assert_eq!(written.parse(), Ok(lengths));
        }
        for wrong in ["", "0", "129", "24-", "24-x", "300", "x", "x0", "xG", "x-1"] {
            assert_eq!(wrong.parse::<PrefixLengths>(), Err(UnknownName), "{wrong}");
        }
        assert_eq!(PrefixLengths::new([]), None);
    }
}
