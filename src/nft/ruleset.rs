//! Everything that should be in the kernel, both families, as one ordered value.
//!
//! The content of a chain follows from its name ([`super::dataplane`]), so a ruleset only says which
//! of the shared chains and affinity maps exist. It is built whole for `render`, `diff` and the first commit; updates
//! never need it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use super::dataplane::{self, Options};
use super::element::{Backend, ElementId, Elements, Key, Value};
use super::names::{AffinityName, ChainName, SetName};
use super::rule::Chain;
use crate::model::{Family, Protocol};

/// The wanted content of both tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Shapes the rules.
    pub options: Options,
    /// The shared chains in use.
    pub shared_chains: BTreeSet<(Family, ChainName)>,
    /// The affinity maps, and the backends that clients may be held to in each (sorted).
    pub affinities: BTreeMap<(Family, AffinityName), Box<[Backend]>>,
    /// Every element.
    pub elements: Elements,
}

impl Ruleset {
    /// The chains of a family: shared ones first, as selections are what base chains lead to.
    pub fn chains(&self, family: Family) -> impl Iterator<Item = Chain> + '_ {
        self.shared_chains
            .iter()
            .filter(move |(f, _)| *f == family)
            .map(|(_, name)| name.clone())
            .chain(ChainName::FIXED)
            .chain(ChainName::COUNTING.into_iter().filter(|_| self.counts()))
            .map(move |name| dataplane::chain(name, family, &self.options))
    }

    /// Whether connections are counted.
    #[must_use]
    pub fn counts(&self) -> bool {
        self.options.counters
    }

    /// The affinity maps of a family.
    pub fn affinities_of(&self, family: Family) -> impl Iterator<Item = &AffinityName> + '_ {
        self.affinities.keys().filter(move |(f, _)| *f == family).map(|(_, name)| name)
    }

    /// The elements of one set.
    pub fn elements_of(
        &self,
        family: Family,
        set: SetName,
    ) -> impl Iterator<Item = &(ElementId, Value)> + '_ {
        // The lowest key of all: `Frontend` is the first variant, and these its lowest values.
        let key = Key::Frontend(IpAddr::V4(Ipv4Addr::UNSPECIFIED), Protocol::Tcp, 0);
        self.elements
            .from(&ElementId { family, set, key })
            .iter()
            .take_while(move |(id, _)| id.family == family && id.set == set)
    }
}
