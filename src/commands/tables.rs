//! The tables that the kernel holds, as a ruleset to look into.

use std::collections::BTreeMap;

use crate::model::Family;
use crate::nft::dataplane::{Detector, NodePorts, Options};
use crate::nft::diff::foreign;
use crate::nft::kernel::{ChainState, Kernel as _, LoadError, Loaded, LoadedTable};
use crate::nft::names::{CONNECTIONS, ChainName, SetName, TABLE};
use crate::nft::netlink::{NetlinkKernel, OpenError};
use crate::nft::ruleset::Ruleset;

/// Why the kernel's tables cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TablesError {
    /// The kernel cannot be asked.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It was asked in vain.
    #[error("reading back the tables: {0}")]
    Load(#[from] LoadError),
}

/// The tables of this network namespace.
#[derive(Debug)]
pub struct Tables {
    /// Everything that was found.
    pub loaded: Loaded,
    /// The same as a ruleset; holds what nftproxy's own tables have.
    pub ruleset: Ruleset,
    /// The connection it was read by.
    pub(super) kernel: NetlinkKernel,
}

impl Tables {
    /// Reads them. `options` is what the rules should be like; where they are not, others are tried
    /// that fit what was found.
    pub fn load(options: &Options) -> Result<Self, TablesError> {
        let mut kernel = NetlinkKernel::open()?;
        let mut loaded = kernel.load(options)?;
        let mut options = options.clone();
        for guess in guesses(&options, &loaded) {
            if loaded.tables.values().all(|table| differing(table).next().is_none()) {
                break;
            }
            let again = kernel.load(&guess)?;
            if again.tables.values().map(|t| differing(t).count()).sum::<usize>()
                < loaded.tables.values().map(|t| differing(t).count()).sum::<usize>()
            {
                (loaded, options) = (again, guess);
            }
        }
        let ruleset = ruleset(&loaded, options);
        Ok(Self { loaded, ruleset, kernel })
    }

    /// Whether there is a table of a family that is nftproxy's; if not, what is there.
    #[must_use]
    pub fn missing(&self, family: Family) -> Option<String> {
        let Some(table) = self.loaded.tables.get(&family) else {
            return Some(format!("the kernel has no table {family} {TABLE}: nothing is in force"));
        };
        let foreign = foreign(table)?;
        Some(format!("the kernel's table {family} {TABLE} is not nftproxy's: {foreign}"))
    }

    /// What of a family's table is not as nftproxy makes it.
    #[must_use]
    pub fn changed(&self, family: Family) -> Option<String> {
        let chains: Vec<_> = differing(self.loaded.tables.get(&family)?).collect();
        (!chains.is_empty()).then(|| {
            format!(
                "chains of the kernel are not as nftproxy writes them with this configuration: {}; \
                 give the flags that the daemon runs with",
                chains.join(", ")
            )
        })
    }
}

fn differing(table: &LoadedTable) -> impl Iterator<Item = &str> {
    let differs = |(_, state): &(&String, &ChainState)| **state != ChainState::Same;
    table.chains.iter().filter(differs).map(|(name, _)| name.as_str())
}

/// Other options that the daemon may have been started with, as far as the elements tell.
fn guesses(options: &Options, loaded: &Loaded) -> Vec<Options> {
    let holds = |family: Family, set: SetName| {
        let table = loaded.tables.get(&family);
        table.is_some_and(|table| table.elements.keys().any(|id| id.set == set))
    };
    let detect_local = Family::BOTH.map(|family| {
        if holds(family, SetName::LocalPods) { Detector::LocalPods } else { Detector::None }
    });
    let node_ports = Family::BOTH.map(|family| {
        if holds(family, SetName::NodeportIps) { NodePorts::Listed } else { NodePorts::All }
    });
    let counters = loaded.tables.values().any(|table| table.sets.contains_key(CONNECTIONS));
    let like =
        Options { detect_local, node_ports, counters, masquerade_all: false, ..options.clone() };
    let all = Options { masquerade_all: true, ..like.clone() };
    [like, all].into_iter().filter(|guess| guess != options).collect()
}

fn ruleset(loaded: &Loaded, options: Options) -> Ruleset {
    let mut ruleset = Ruleset { options, ..Ruleset::default() };
    let mut elements = Vec::new();
    for (&family, table) in loaded.tables.iter().filter(|(_, table)| foreign(table).is_none()) {
        elements.extend(table.elements.iter().map(|(id, value)| (*id, value.clone())));
        let names = table.chains.keys().filter_map(|name| name.parse::<ChainName>().ok());
        ruleset.shared_chains.extend(names.filter(ChainName::is_shared).map(|name| (family, name)));
        let affinities = table.affinities.iter();
        let affinities: BTreeMap<_, _> = affinities
            .map(|(name, held)| ((family, name.clone()), held.iter().copied().collect()))
            .collect();
        ruleset.affinities.extend(affinities);
    }
    ruleset.elements = elements.into_iter().collect();
    ruleset
}
