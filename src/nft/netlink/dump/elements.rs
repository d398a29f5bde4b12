//! The elements of a set or map, read until they are all there.
//!
//! The generation does not tell everything. A big map is sent in pieces, and each goes on where the last one
//! ended by walking the map from its start and counting. Behind a commit that changed a map's size,
//! the kernel moves its elements to a larger or smaller hash table, without a new generation or a
//! mark in the dump: the order is another one then, and some elements come twice and others never.
//! But each walk meets every element at least once, those on their way twice, so that an answer is
//! never shorter than the map: one in which nothing comes twice is whole, any other is asked for
//! again. (What a refused transaction of somebody else adds and takes back just then can still hide
//! an element. It is sent again then, which the kernel accepts of one that it holds.)

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nftnl::nftnl_sys as sys;
use tracing::debug;

use super::ATTEMPTS;
use crate::model::Family;
use crate::nft::element::{Backend, ElementId, Key, Value};
use crate::nft::kernel::LoadError;
use crate::nft::names::{DataType, SetName};
use crate::nft::netlink::ffi::ElementRef;

/// One answer to the question for a set's elements.
pub(super) struct Reading<'a> {
    family: Family,
    set: SetName,
    elements: &'a mut BTreeMap<ElementId, Value>,
    starts: Vec<IpAddr>,
    ends: Vec<IpAddr>,
    /// Whether every element was one of ours.
    pub(super) understood: bool,
    /// How many elements came that had come before.
    pub(super) repeated: usize,
}

/// Reads a set until nothing comes twice. False if an element was not understood.
pub(super) fn whole(
    family: Family,
    set: SetName,
    elements: &mut BTreeMap<ElementId, Value>,
    mut read: impl FnMut(&mut Reading<'_>) -> Result<(), LoadError>,
) -> Result<bool, LoadError> {
    for _ in 0..ATTEMPTS {
        let (starts, ends) = (Vec::new(), Vec::new());
        let (understood, repeated) = (true, 0);
        let mut reading = Reading { family, set, elements, starts, ends, understood, repeated };
        read(&mut reading)?;
        reading.close();
        let Reading { understood, repeated, .. } = reading;
        if repeated == 0 {
            return Ok(understood);
        }
        debug!(%family, %set, repeated, "elements moved while they were read, reading them again");
        elements.retain(|id, _| (id.family, id.set) != (family, set));
    }
    Err(LoadError::Moving { family, set, attempts: ATTEMPTS })
}

impl Reading<'_> {
    pub(super) fn add(&mut self, element: &ElementRef<'_>) {
        let Self { family, set, .. } = *self;
        if set.is_interval() {
            match bound(element, family, set) {
                Some((address, true)) => self.ends.push(address),
                Some((address, false)) => self.starts.push(address),
                None => self.understood = false,
            }
        } else if let Some((key, value)) = read(element, family, set) {
            self.insert(key, value);
        } else {
            self.understood = false;
        }
    }

    fn insert(&mut self, key: Key, value: Value) {
        let id = ElementId { family: self.family, set: self.set, key };
        self.repeated += usize::from(self.elements.insert(id, value).is_some());
    }

    fn close(&mut self) {
        let (starts, ends) = (std::mem::take(&mut self.starts), std::mem::take(&mut self.ends));
        for range in ranges(starts, ends, self.family) {
            self.insert(range, Value::None);
        }
    }
}

fn read(element: &ElementRef<'_>, family: Family, set: SetName) -> Option<(Key, Value)> {
    let (key, len) = element.get_data::<64>(sys::NFTNL_SET_ELEM_KEY)?;
    let key = Key::from_bytes(family, set, &key[..len])?;
    let value = match set.data() {
        DataType::None => Value::None,
        DataType::Verdict => {
            let code = element.get_u32(sys::NFTNL_SET_ELEM_VERDICT)?.cast_signed();
            let chain = || element.get_str(sys::NFTNL_SET_ELEM_CHAIN)?.parse().ok();
            match code {
                libc::NF_DROP => Value::Drop,
                libc::NFT_GOTO => Value::Goto(chain()?),
                libc::NFT_JUMP => Value::Jump(chain()?),
                _ => return None,
            }
        }
        DataType::Backend => {
            let (data, len) = element.get_data::<64>(sys::NFTNL_SET_ELEM_DATA)?;
            Value::Backend(Backend::from_bytes(family, &data[..len])?)
        }
    };
    Some((key, value))
}

/// One end of a range: its address, and whether it is the end.
fn bound(element: &ElementRef<'_>, family: Family, set: SetName) -> Option<(IpAddr, bool)> {
    let (key, len) = element.get_data::<64>(sys::NFTNL_SET_ELEM_KEY)?;
    let Key::Address(address) = Key::from_bytes(family, set, &key[..len])? else { return None };
    let flags = element.get_u32(sys::NFTNL_SET_ELEM_FLAGS).unwrap_or(0);
    Some((address, flags & libc::NFT_SET_ELEM_INTERVAL_END.cast_unsigned() != 0))
}

/// Pairs starts with ends: each range reaches to the address before the next end, or to the end of
/// the address space. nft writes an end at address zero that closes nothing.
fn ranges(mut starts: Vec<IpAddr>, mut ends: Vec<IpAddr>, family: Family) -> Vec<Key> {
    starts.sort_unstable();
    ends.sort_unstable();
    let last = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::BROADCAST),
        Family::V6 => IpAddr::V6(Ipv6Addr::from(u128::MAX)),
    };
    let before = |address: IpAddr| match address {
        IpAddr::V4(v4) => IpAddr::V4(Ipv4Addr::from(u32::from(v4).saturating_sub(1))),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6).saturating_sub(1))),
    };
    let range = |start: IpAddr| {
        let end = ends.get(ends.partition_point(|&end| end <= start));
        Key::Range(start, end.map_or(last, |&end| before(end)))
    };
    starts.into_iter().map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_paired_whatever_the_order() {
        let ip = |last: u8| IpAddr::from([10, 0, 0, last]);
        let zero = [0, 0, 0, 0].into();
        let found = ranges(vec![ip(16), ip(8)], vec![ip(20), zero, ip(16)], Family::V4);
        assert_eq!(found, [Key::Range(ip(8), ip(15)), Key::Range(ip(16), ip(19))]);
        let open = ranges(vec![ip(8)], vec![zero], Family::V4);
        assert_eq!(open, [Key::Range(ip(8), [255, 255, 255, 255].into())]);
    }

    /// Reads a map of whose answers each lists these hosts.
    fn answered(
        answers: &[&[u8]],
        elements: &mut BTreeMap<ElementId, Value>,
    ) -> (Result<bool, LoadError>, usize) {
        let mut asked = 0;
        let outcome = whole(Family::V4, SetName::ClusterIps, elements, |reading| {
            let answer = answers[asked.min(answers.len() - 1)];
            for &host in answer {
                reading.insert(address(host), Value::None);
            }
            asked += 1;
            Ok(())
        });
        (outcome, asked)
    }

    fn address(host: u8) -> Key {
        Key::Address([10, 96, 0, host].into())
    }

    #[test]
    fn an_answer_with_an_element_twice_is_asked_for_again() {
        let other = ElementId { family: Family::V6, set: SetName::ClusterIps, key: address(9) };
        let mut elements = BTreeMap::from([(other, Value::None)]);
        // Three elements that moved: the third is missing, or is there with another one twice.
        let (outcome, asked) = answered(&[&[1, 2, 2], &[2, 1, 3, 1], &[3, 1, 2]], &mut elements);
        assert_eq!((outcome.unwrap(), asked), (true, 3));
        let keys: Vec<_> = elements.into_keys().map(|id| (id.family, id.key)).collect();
        let read = [1, 2, 3].map(|host| (Family::V4, address(host)));
        assert_eq!(keys, [&read[..], &[(Family::V6, address(9))]].concat());
    }

    #[test]
    fn nothing_of_an_answer_that_was_not_whole_is_kept() {
        let mut elements = BTreeMap::new();
        let (outcome, asked) = answered(&[&[1, 2, 2], &[3]], &mut elements);
        assert_eq!((outcome.unwrap(), asked, elements.len()), (true, 2, 1));
    }

    #[test]
    fn elements_that_never_rest_are_an_error() {
        let mut elements = BTreeMap::new();
        let (outcome, asked) = answered(&[&[1, 1]], &mut elements);
        assert_eq!(asked, ATTEMPTS as usize);
        assert_eq!(
            outcome.unwrap_err().to_string(),
            "the kernel kept moving the elements of the ip map cluster-ips while they were read (20 attempts)"
        );
    }
}
