//! `nftproxy render`: the tables that manifests ask for, as nft text or in its JSON.

use super::{CommandError, Output};
use crate::config::{Config, Source};
use crate::host;
use crate::model::Family;
use crate::nft::fake::FakeKernel;
use crate::nft::{json, text};
use crate::reconcile::Proxy;
use crate::state::State;
use crate::watch;
use crate::watch::manifests::Manifests;

/// What came of it.
#[derive(Debug)]
pub struct Rendered {
    /// The tables.
    pub text: String,
    /// How many files could not be used; each was named in the log.
    pub refused: usize,
}

/// Renders one family, or both. Needs no kernel.
pub fn render(
    config: Config,
    family: Option<Family>,
    output: Output,
) -> Result<Rendered, CommandError> {
    let Source::Manifests(dir) = config.source else { return Err(CommandError::NoManifests) };
    let state = State::new(config.live.settings, host::node_facts(&config.node_name));
    let mut proxy = Proxy::new(state, FakeKernel::default());
    let mut manifests = Manifests::new(dir, config.node_name);
    let (events, problems) = manifests.read()?;
    problems.iter().for_each(watch::log);
    for event in events {
        proxy.observe(event);
    }
    let ruleset = proxy.wanted();
    let families = family.as_ref().map_or(&Family::BOTH[..], std::slice::from_ref);
    let text = match output {
        Output::Text => text::tables(&ruleset, families),
        Output::Json => json::ruleset(&ruleset, families).to_string() + "\n",
    };
    Ok(Rendered { text, refused: manifests.refused() })
}
