//! The numbering of a frontend's backends.
//!
//! The kernel draws a number and looks the backend up by it, so numbers must be 0..N without holes;
//! and every number that changes its backend is an element to replace. So a backend keeps its slot
//! while it lives: a newcomer takes the slot of one that left, further vacancies are filled with the
//! last backends (swap-remove), further newcomers are appended. One endpoint more, less or replaced
//! is at most two element changes, whatever N is. A backend with a weight is one with several slots.

use std::cmp::Ordering;
use std::collections::BTreeMap;
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
    /// are vacant until the first [`update`](Self::update).
    #[must_use]
    pub fn adopted(found: impl IntoIterator<Item = (u16, Backend)>) -> Self {
        let mut backends = Vec::new();
        for (slot, backend) in found {
            let slot = usize::from(slot);
            if slot < MAX_BACKENDS {
                backends.resize(slot, VACANT);
                backends.push(backend);
            }
        }
        Self(backends)
    }

    /// A numbering that is determined by other means, slot by slot.
    #[must_use]
    pub fn table(backends: Vec<Backend>) -> Self {
        Self(backends)
    }

    /// The backends, in the order of their slots.
    #[must_use]
    pub fn as_slice(&self) -> &[Backend] {
        &self.0
    }

    /// Moves to another list of backends, which must be sorted. One that is listed several times gets
    /// as many slots.
    pub fn update(&mut self, wanted: &[Backend]) {
        let mut held = self.0.clone();
        held.sort_unstable();
        let (mut leaving, coming) = difference(&held, wanted);
        // Of a backend with several slots, the last ones go.
        let mut vacant = Vec::new();
        for (slot, backend) in self.0.iter().enumerate().rev() {
            if leaving.is_empty() {
                break;
            }
            if let Some(count) = leaving.get_mut(backend) {
                *count -= 1;
                if *count == 0 {
                    leaving.remove(backend);
                }
                vacant.push(slot);
            }
        }
        let mut coming = coming.into_iter();
        let filled = vacant.len().min(coming.len());
        for (slot, newcomer) in vacant.drain(vacant.len() - filled..).rev().zip(coming.by_ref()) {
            self.0[slot] = newcomer;
        }
        for slot in vacant {
            self.0.swap_remove(slot);
        }
        self.0.reserve_exact(coming.len());
        self.0.extend(coming);
        self.0.shrink_to(self.0.len() * 2);
    }
}

/// What two sorted lists do not share: how often each backend leaves, and those that come.
fn difference(held: &[Backend], wanted: &[Backend]) -> (BTreeMap<Backend, u32>, Vec<Backend>) {
    let (mut leaving, mut coming) = (BTreeMap::new(), Vec::new());
    let (mut held, mut wanted) = (held.iter().peekable(), wanted.iter().peekable());
    loop {
        let order = match (held.peek(), wanted.peek()) {
            (None, None) => return (leaving, coming),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(left), Some(right)) => left.cmp(right),
        };
        if order.is_le()
            && let Some(backend) = held.next()
            && order.is_lt()
        {
            *leaving.entry(*backend).or_default() += 1;
        }
        if order.is_ge()
            && let Some(backend) = wanted.next()
            && order.is_gt()
        {
            coming.push(*backend);
        }
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

    #[test]
    fn what_is_beyond_the_slots_of_a_list_is_not_adopted() {
        let [one, two] = backends(&[1, 2])[..] else { unreachable!() };
        let last = u16::try_from(MAX_BACKENDS).unwrap();
        assert_eq!(Slots::adopted([(0, one), (last, two)]).0, [one]);
        assert_eq!(Slots::adopted([(last - 1, two)]).0.len(), MAX_BACKENDS);
    }

    proptest! {
        #[test]
        fn holds_just_what_is_wanted_and_moves_little(
            mut from in proptest::collection::vec(0..30_u8, 0..40),
            mut to in proptest::collection::vec(0..30_u8, 0..40),
        ) {
            from.sort_unstable();
            to.sort_unstable();
            let before = backends(&from);
            let after = updated(&from, &to);
            let mut sorted = after.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, backends(&to));

            let (leaving, coming) = difference(&before, &backends(&to));
            let left = leaving.values().map(|count| *count as usize).sum::<usize>();
            let came = coming.len();
            let changed = (0..before.len().max(after.len()))
                .filter(|&slot| before.get(slot) != after.get(slot))
                .count();
            prop_assert!(changed <= came.max(left) + left.saturating_sub(came));
        }
    }
}
