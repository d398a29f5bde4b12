//! The kernel's counters of connections, with names from the objects.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::connections::{Connections, Port, address_of};
use crate::model::Family;
use crate::nft::connection::Counters;
use crate::nft::kernel::LoadError;
use crate::nft::netlink::{OpenError, ReadCounters};
use crate::state::State;

/// How long one reading may take.
const READ_FOR: Duration = Duration::from_secs(5);

/// The kernel cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum CountersError {
    /// At all.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// This time.
    #[error("reading the counters: {0}")]
    Read(#[from] LoadError),
}

/// A reader that stays open.
pub(super) struct Reader(ReadCounters);

impl Reader {
    pub(super) fn open() -> Result<Self, CountersError> {
        Ok(Self(ReadCounters::open()?))
    }

    pub(super) fn read(&mut self) -> Result<Counters, CountersError> {
        Ok(self.0.read(READ_FOR)?)
    }
}

/// Who is dialled by what, as far as the objects tell.
pub(super) fn names(state: &State) -> Connections {
    let mut names = Connections::default();
    for service in state.services() {
        names.serve(&service.name, state.served(&service.name));
    }
    names
}

/// Connections of every Service port in a family, by endpoint; None where none are counted.
pub(super) type Counted = BTreeMap<(Port, Family), BTreeMap<SocketAddr, u64>>;

/// What is counted now, in the ports of the objects.
pub(super) fn counted(state: &State) -> Result<Option<Counted>, CountersError> {
    let counters = Reader::open()?.read()?;
    if !counters.is_on() {
        return Ok(None);
    }
    let names = names(state);
    let mut counted = Counted::new();
    for (connection, count) in &counters.connections {
        if let Some(port) = names.port_of(connection) {
            let of_port = (Port::clone(port), Family::of(connection.address));
            let endpoints = counted.entry(of_port).or_default();
            *endpoints.entry(address_of(connection.backend)).or_default() += count;
        }
    }
    Ok(Some(counted))
}
