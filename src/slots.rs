//! The numbering of a frontend's backends.
//!
//! The kernel draws a number and looks the backend up by it, so numbers must be 0..N without holes;
//! and every number that changes its backend is an element to replace. So a backend keeps its slot
//! while it lives: a newcomer takes the slot of one that left, further vacancies are filled with the
//! last backends (swap-remove), further newcomers are appended. One endpoint more, less or replaced
//! is at most two element changes, whatever N is.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use crate::nft::dataplane::FIRST_LOCAL_SLOT;
use crate::nft::element::Backend;

/// A frontend has two lists, each of which has half of the slots.
pub const MAX_BACKENDS: usize = FIRST_LOCAL_SLOT as usize;

/// Stands for no backend: nothing can be sent to port 0.
const VACANT: Backend = Backend { address: IpAddr::V4(Ipv4Addr::UNSPECIFIED), port: 0 };

/// Backends by slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slots(Vec<Backend>);

impl Slots {
    /// Takes over a numbering found in the kernel, in ascending order. Slots that are missing there
    /// are vacant until the first [`update`](Self::update), and so are those of a backend that is
    /// there twice.
    #[must_use]
    pub fn adopted(found: impl IntoIterator<Item = (u16, Backend)>) -> Self {
        let (mut backends, mut seen) = (Vec::new(), BTreeSet::new());
        for (slot, backend) in found {
            let slot = usize::from(slot);
            if slot < MAX_BACKENDS && seen.insert(backend) {
                backends.resize(slot, VACANT);
                backends.push(backend);
            }
        }
        Self(backends)
    }

    /// The backends, in the order of their slots.
    #[must_use]
    pub fn as_slice(&self) -> &[Backend] {
        &self.0
    }

    /// Moves to another list of backends, which must be sorted and free of duplicates.
    pub fn update(&mut self, wanted: &[Backend]) {
        if self.0.is_empty() {
            self.0.extend_from_slice(wanted);
            return;
        }
        let mut held: Vec<Backend> = self.0.clone();
        held.sort_unstable();
        let mut new = wanted.iter().filter(|backend| held.binary_search(backend).is_err());

        let mut vacant = Vec::new();
        for (slot, backend) in self.0.iter_mut().enumerate() {
            if wanted.binary_search(backend).is_err() {
                match new.next() {
                    Some(newcomer) => *backend = *newcomer,
                    None => vacant.push(slot),
                }
            }
        }
        for slot in vacant.into_iter().rev() {
            self.0.swap_remove(slot);
        }
        self.0.extend(new);
        self.0.shrink_to(self.0.len() * 2);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    fn backends(hosts: &[u8]) -> Vec<Backend> {
        let host = |&h: &u8| Backend { address: Ipv4Addr::new(10, 0, 0, h).into(), port: 80 };
        hosts.iter().map(host).collect()
    }

    fn updated(from: &[u8], to: &[u8]) -> Vec<Backend> {
        let mut slots = Slots::adopted((0..).zip(backends(from)));
        slots.update(&backends(to));
        slots.0
    }

    #[test]
    fn a_newcomer_takes_the_place_of_one_that_left() {
        assert_eq!(updated(&[1, 2, 3], &[1, 3, 9]), backends(&[1, 9, 3]));
    }

    #[test]
    fn the_last_one_fills_a_vacancy() {
        assert_eq!(updated(&[1, 2, 3, 4], &[1, 3, 4]), backends(&[1, 4, 3]));
        assert_eq!(updated(&[1, 2, 3, 4], &[3]), backends(&[3]));
    }

    #[test]
    fn newcomers_are_appended_in_order() {
        assert_eq!(updated(&[5], &[1, 2, 5]), backends(&[5, 1, 2]));
        assert_eq!(updated(&[], &[1, 2, 5]), backends(&[1, 2, 5]));
    }

    #[test]
    fn what_is_missing_in_the_kernel_is_put_back_where_it_was() {
        let [one, two, three] = backends(&[1, 2, 3])[..] else { unreachable!() };
        let mut slots = Slots::adopted([(0, one), (2, three), (3, one)]);
        slots.update(&[one, two, three]);
        assert_eq!(slots.0, [one, two, three]);
    }

    proptest! {
        #[test]
        fn holds_just_what_is_wanted_and_moves_little(
            from in proptest::collection::btree_set(any::<u8>(), 0..40),
            to in proptest::collection::btree_set(any::<u8>(), 0..40),
        ) {
            let (from, to): (Vec<u8>, Vec<u8>) = (from.into_iter().collect(), to.into_iter().collect());
            let before = backends(&from);
            let after = updated(&from, &to);
            let mut sorted = after.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, backends(&to));

            let left = from.iter().filter(|host| !to.contains(host)).count();
            let came = to.iter().filter(|host| !from.contains(host)).count();
            let changed = (0..before.len().max(after.len()))
                .filter(|&slot| before.get(slot) != after.get(slot))
                .count();
            prop_assert!(changed <= came.max(left) + left.saturating_sub(came));
        }
    }
}
