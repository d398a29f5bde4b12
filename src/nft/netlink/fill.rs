//! How full the affinity maps are: the one thing in the tables that packets decide.
//!
//! Asked for by scrapes, on a socket of its own, so that commits never wait for it. Kernels from 6.16
//! on say how many elements a set has. Before, they have to be listed, which is given up after a
//! while: what is told then is true of the maps that were reached.

use std::time::Duration;

use nftnl::nftnl_sys as sys;

use super::ffi::Set;
use super::socket::NetlinkSocket;
use super::{affinity, dump, now};
use crate::model::Family;
use crate::nft::kernel::LoadError;
use crate::nft::names::{AffinityName, TABLE};
use crate::nft::rule::AFFINITY_SIZE;
use crate::nlmsg::{GENMSG, HEADER, find};

/// `NFTA_SET_COUNT`, which libc does not know.
const SET_COUNT: u16 = 20;

/// The affinity maps of a family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AffinityFill {
    /// How many there are.
    pub maps: usize,
    /// Clients in all of them.
    pub entries: usize,
    /// Clients in the fullest one, of [`AFFINITY_SIZE`].
    pub fullest: usize,
}

impl AffinityFill {
    /// How full the fullest one is, from 0 to 1.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        let fullest = u32::try_from(self.fullest).unwrap_or(u32::MAX);
        f64::from(fullest) / f64::from(AFFINITY_SIZE)
    }
}

/// Looks at the affinity maps, in the order of [`Family::BOTH`]. Where the kernel does not count, no
/// more maps are listed when the time is over.
pub fn affinity_fill(budget: Duration) -> Result<[AffinityFill; 2], LoadError> {
    let fail = |step| move |source| LoadError::Socket { step, source };
    let mut socket = NetlinkSocket::open()
        .map_err(|error| LoadError::Socket { step: error.step, source: error.source })?;
    let until = now() + budget;
    let mut all = [AffinityFill::default(); 2];
    for (fill, family) in all.iter_mut().zip(Family::BOTH) {
        let mut found: Vec<(AffinityName, Option<u32>)> = Vec::new();
        let listed = socket.dump(&dump::sets_request(family), |message| {
            let Some(set) = Set::parse(message) else { return };
            if set.get_str(sys::NFTNL_SET_TABLE).as_deref() == Some(TABLE)
                && let Some(name) = set.get_str(sys::NFTNL_SET_NAME)
                && let Ok(name) = name.parse()
            {
                found.push((name, counted(message)));
            }
        });
        match listed {
            Ok(_) => {}
            // There is no table yet.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(fail("list sets")(error)),
        }
        fill.maps = found.len();
        for (name, count) in found {
            let entries = match count {
                Some(count) => count as usize,
                None if now() < until => affinity::count(&mut socket, family, &name)?,
                None => break,
            };
            fill.entries += entries;
            fill.fullest = fill.fullest.max(entries);
        }
    }
    Ok(all)
}

/// What the kernel says of the number of elements, if it does.
fn counted(message: &[u8]) -> Option<u32> {
    let value = find(message.get(HEADER + GENMSG..)?, SET_COUNT)?;
    Some(u32::from_be_bytes(value.try_into().ok()?))
}
