//! The Maglev table: backends over slots so that a client's slot keeps its backend when others come
//! and go.
//!
//! The algorithm is that of "Maglev: A Fast and Reliable Software Network Load Balancer" (Eisenbud
//! et al., NSDI 2016, section 3.4): every backend has a permutation of the slots of its own, and they
//! take turns, each taking the first of its slots that is free. The table depends on the set of
//! backends alone, so every node has the same one.

use std::hash::Hasher as _;
use std::net::IpAddr;

use fnv::FnvHasher;

use crate::nft::element::Backend;

/// Table sizes: primes, so that every step runs through all slots. The paper asks for a hundred slots
/// for each backend, so that none has more than 1 % above its share. Here each slot is an element in the kernel,
/// which takes 0.7 µs to make, and 0.1 KB: up to 10 backends have a hundred, 64 have 16. There are two sizes only,
/// since where a Service grows from one to the other, its clients are dealt out anew.
const SIZES: [(usize, usize); 2] = [(64, 1_021), (usize::MAX, 16_381)];

/// The backend of every slot. `backends` must be sorted; one that is listed several times takes as
/// many slots a turn. Empty if there are none.
#[must_use]
pub fn table(backends: &[Backend]) -> Vec<Backend> {
    let size = SIZES.iter().find(|(most, _)| backends.len() <= *most).map_or(0, |(_, size)| *size);
    if backends.is_empty() || size == 0 {
        return Vec::new();
    }
    let mut slots: Vec<Option<Backend>> = vec![None; size];
    let mut turns: Vec<Turn> = backends.iter().map(|backend| Turn::new(*backend, size)).collect();
    let mut free = size;
    loop {
        for turn in &mut turns {
            turn.skip_taken(&slots);
            slots[turn.slot] = Some(turn.backend);
            free -= 1;
            if free == 0 {
                return slots.into_iter().flatten().collect();
            }
        }
    }
}

/// A backend's way through its permutation.
struct Turn {
    backend: Backend,
    slot: usize,
    step: usize,
    size: usize,
}

impl Turn {
    fn new(backend: Backend, size: usize) -> Self {
        let size_64 = size as u64;
        let within = |hash: u64, modulus: u64| usize::try_from(hash % modulus).unwrap_or_default();
        let slot = within(hash(&backend, 0), size_64);
        let step = within(hash(&backend, 1), size_64 - 1) + 1;
        Self { backend, slot, step, size }
    }

    /// Moves on to the first slot of the permutation that is free.
    fn skip_taken(&mut self, slots: &[Option<Backend>]) {
        while slots[self.slot].is_some() {
            self.slot = (self.slot + self.step) % self.size;
        }
    }
}

/// FNV-1a with a final mix (that of `SplitMix64`). It must be the same on every node and in every
/// version, which the standard library's hasher does not promise.
fn hash(backend: &Backend, seed: u8) -> u64 {
    let mut hasher = FnvHasher::default();
    hasher.write(&[seed]);
    match backend.address {
        IpAddr::V4(v4) => hasher.write(&v4.octets()),
        IpAddr::V6(v6) => hasher.write(&v6.octets()),
    }
    hasher.write(&backend.port.to_be_bytes());
    let hash = hasher.finish();
    let mixed = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    fn backends(hosts: impl IntoIterator<Item = u8>) -> Vec<Backend> {
        let backend = |host| Backend { address: Ipv4Addr::new(10, 0, 0, host).into(), port: 80 };
        hosts.into_iter().map(backend).collect()
    }

    fn shares(table: &[Backend]) -> BTreeMap<Backend, usize> {
        table.iter().fold(BTreeMap::new(), |mut shares, backend| {
            *shares.entry(*backend).or_default() += 1;
            shares
        })
    }

    #[test]
    fn every_backend_has_its_share() {
        for n in [1, 2, 3, 5, 8] {
            let table = table(&backends(0..n));
            for share in shares(&table).values() {
                assert!(share.abs_diff(table.len() / usize::from(n)) <= 1, "{n}: {share}");
            }
        }
        let weighted = table(&backends([1, 1, 1, 2]));
        assert_eq!(shares(&weighted).into_values().collect::<Vec<_>>(), [766, 255]);
        assert!(table(&[]).is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// Backends with weights, and one of them that leaves.
        #[test]
        fn slots_are_dealt_out_by_weight_and_none_by_weight_0(
            weights in proptest::collection::btree_map(any::<u8>(), 0..4_usize, 2..40),
            which in any::<proptest::sample::Index>(),
        ) {
            let listed = |without: Option<u8>| -> Vec<Backend> {
                let there = weights.iter().filter(|(host, _)| Some(**host) != without);
                backends(there.flat_map(|(host, weight)| std::iter::repeat_n(*host, *weight)))
            };
            let all = listed(None);
            let before = table(&all);
            // As its weight says, to a slot for each time it is listed. 0 has none.
            let shares = shares(&before);
            for (host, weight) in &weights {
                let share = shares.get(&backends([*host])[0]).copied().unwrap_or_default();
                let least = before.len().checked_div(all.len()).unwrap_or_default() * weight;
                prop_assert!((least..=least + weight).contains(&share), "{share} of {weights:?}");
            }
            let gone = *weights.keys().nth(which.index(weights.len())).unwrap();
            if weights[&gone] == 0 {
                prop_assert_eq!(before, table(&listed(Some(gone))));
            }
        }
    }

    /// The paper's figure 12 shows a few per cent. That is an average: of three backends, two of which go
    /// through the table by the same steps, a third of the other slots was seen to move.
    #[test]
    fn one_backend_less_moves_its_own_clients_and_few_others() {
        let (mut moved, mut others) = (0, 0);
        for n in 2..=40 {
            for first in 0..10 {
                let hosts = || (0..n).map(|i| first + 6 * i);
                let gone = first + 6 * (n / 2);
                let before = table(&backends(hosts()));
                let after = table(&backends(hosts().filter(|host| *host != gone)));
                assert_eq!(before.len(), after.len());
                let own = backends([gone])[0];
                let kept = before.iter().zip(&after).filter(|(b, _)| **b != own);
                others += kept.clone().count();
                moved += kept.filter(|(b, a)| b != a).count();
            }
        }
        assert!(moved * 20 < others, "{moved} of {others}");
        assert!(moved > 0);
    }

    #[test]
    fn the_table_is_the_same_in_every_version() {
        // Clients would move at an upgrade otherwise.
        let hosts: Vec<u8> = table(&backends([1, 2, 3]))
            .iter()
            .take(12)
            .map(|backend| match backend.address {
                IpAddr::V4(v4) => v4.octets()[3],
                IpAddr::V6(_) => unreachable!(),
            })
            .collect();
        assert_eq!(hosts, [2, 1, 1, 2, 2, 1, 2, 2, 1, 2, 3, 1]);
    }
}
