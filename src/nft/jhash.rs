//! The kernel's `jhash`, which picks the slot of a source address.
//!
//! Here so that [`super::interpret`] can say which backend a client gets. It is Bob Jenkins' lookup3
//! as in `include/linux/jhash.h`, for a machine of little byte order, where the kernel reads the
//! address in words of the machine.

use std::net::IpAddr;

const INITIAL: u32 = 0xdead_beef;

/// The slot, of `modulus` ones, that `jhash saddr mod modulus seed seed` gives an address.
#[must_use]
pub fn slot(address: IpAddr, modulus: u16, seed: u32) -> u16 {
    let hash = match address {
        IpAddr::V4(v4) => jhash(&v4.octets(), seed),
        IpAddr::V6(v6) => jhash(&v6.octets(), seed),
    };
    // `reciprocal_scale`: the hash as a fraction of its range.
    let scaled = (u64::from(hash) * u64::from(modulus)) >> 32;
    u16::try_from(scaled).unwrap_or(0)
}

fn jhash(key: &[u8], seed: u32) -> u32 {
    let start = INITIAL.wrapping_add(u32::try_from(key.len()).unwrap_or(0)).wrapping_add(seed);
    let mut state = [start; 3];
    let mut rest = key;
    while rest.len() > 12 {
        let (head, tail) = rest.split_at(12);
        absorb(&mut state, head);
        mix(&mut state);
        rest = tail;
    }
    absorb(&mut state, rest);
    finish(&mut state);
    state[2]
}

/// Adds up to twelve bytes, the missing ones being zeros.
fn absorb(state: &mut [u32; 3], bytes: &[u8]) {
    for (word, chunk) in state.iter_mut().zip(bytes.chunks(4)) {
        let mut padded = [0; 4];
        padded[..chunk.len()].copy_from_slice(chunk);
        *word = word.wrapping_add(u32::from_le_bytes(padded));
    }
}

fn mix(state: &mut [u32; 3]) {
    for (turn, by) in [4, 6, 8, 16, 19, 4].into_iter().enumerate() {
        let (one, two, three) = (turn % 3, (turn + 1) % 3, (turn + 2) % 3);
        state[one] = state[one].wrapping_sub(state[three]) ^ state[three].rotate_left(by);
        state[three] = state[three].wrapping_add(state[two]);
    }
}

fn finish(state: &mut [u32; 3]) {
    for (turn, by) in [14, 11, 25, 16, 4, 14, 24].into_iter().enumerate() {
        let (target, other) = ((turn + 2) % 3, (turn + 1) % 3);
        state[target] = (state[target] ^ state[other]).wrapping_sub(state[other].rotate_left(by));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published test values of lookup3's `hashlittle`, which jhash is for keys that are not empty.
    #[test]
    fn hashes_what_lookup3_does() {
        let text = b"Four score and seven years ago";
        assert_eq!(jhash(text, 0), 0x1777_0551);
        assert_eq!(jhash(text, 1), 0xcd62_8161);
    }

    #[test]
    fn every_slot_is_in_range() {
        for modulus in [1, 2, 3, 7, 2039, u16::MAX] {
            for last in 0..=u8::MAX {
                assert!(slot([10, 244, 1, last].into(), modulus, 0x6e66_7470) < modulus);
            }
        }
    }

    #[test]
    fn every_slot_comes_up() {
        let slots = (0..=u8::MAX).map(|last| slot([10, 244, 1, last].into(), 7, 0x6e66_7470));
        assert_eq!(slots.collect::<std::collections::BTreeSet<_>>(), (0..7).collect());
    }
}
