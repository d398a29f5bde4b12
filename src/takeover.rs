//! Taking a node over from kube-proxy: what it left behind in the kernel, and its removal.
//!
//! kube-proxy leaves its rules in force when it stops. They answer for Services until our tables do, so
//! that nothing is removed before the first commit. From then on ours come first (of two chains with
//! the same hook and priority the kernel calls the younger one first), and theirs go without a packet
//! noticing. Established connections are remembered by connection tracking, not by rules; only those
//! that ipvs made end with it.
//!
//! - nftables mode: the tables `ip kube-proxy` and `ip6 kube-proxy`.
//! - iptables mode: chains and the rules that lead to them, as `chains` decides; those of
//!   `iptables-nft` by netlink, those of `iptables-legacy` by its own programs.
//! - ipvs mode: virtual servers, a link, sets, and chains likewise.
//!
//! What cannot be removed is said and keeps nothing else from being removed.

mod chains;
mod ipvs;
mod legacy;

use std::collections::BTreeMap;
use std::fmt;

use tracing::{error, info, warn};

pub use self::chains::Purpose;
use self::chains::{Chain, Plan, TABLES, is_kube_proxys, plan};
use crate::model::Family;
use crate::nft::kernel::{ApplyError, LoadError};
use crate::nft::netlink::{ForeignOp, ForeignTable, NetlinkKernel, OpenError};

/// kube-proxy's table in nftables mode.
pub const TABLE: &str = "kube-proxy";

/// How often a removal is tried again when somebody else changes the same table.
const ATTEMPTS: u32 = 5;

/// Which kind of iptables a table belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// `iptables-nft`
    Nft,
    /// `iptables-legacy`
    Legacy,
}

/// Something that kube-proxy left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leftover {
    /// Its table of nftables mode.
    Table(Family),
    /// Chains of iptables or ipvs mode.
    Chains {
        /// The kind of iptables.
        backend: Backend,
        /// The table's family.
        family: Family,
        /// The table.
        table: String,
        /// How many chains.
        count: usize,
    },
    /// Virtual servers of ipvs mode.
    VirtualServers(usize),
    /// The link of ipvs mode.
    Link,
    /// A set of ipvs mode.
    Set(String),
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(family) => write!(f, "nftables mode: the table {family} {TABLE}"),
            Self::Chains { backend, family, table, count } => {
                let program = program(*backend, *family);
                let chains = if *count == 1 { "chain" } else { "chains" };
                write!(f, "iptables or ipvs mode: {count} {chains} in {program} -t {table}")
            }
            Self::VirtualServers(count) => write!(f, "ipvs mode: virtual servers, {count} of them"),
            Self::Link => write!(f, "ipvs mode: the link {}", ipvs::LINK),
            Self::Set(name) => write!(f, "ipvs mode: the ipset {name}"),
        }
    }
}

fn program(backend: Backend, family: Family) -> &'static str {
    match (backend, family) {
        (Backend::Nft, Family::V4) => "iptables-nft",
        (Backend::Nft, Family::V6) => "ip6tables-nft",
        (Backend::Legacy, Family::V4) => "iptables-legacy",
        (Backend::Legacy, Family::V6) => "ip6tables-legacy",
    }
}

/// Whether programs of iptables will be asked: only about tables that are there.
#[must_use]
pub fn needs_iptables() -> bool {
    Family::BOTH
        .into_iter()
        .any(|family| legacy::tables(family).is_ok_and(|tables| !tables.is_empty()))
}

/// A place where something may be left that cannot be looked at, or something that cannot be removed.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// No socket.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The kernel does not tell.
    #[error("reading the tables of others: {0}")]
    Load(#[from] LoadError),
    /// A table of nftables mode stays.
    #[error("cannot remove the table {family} {TABLE}: {source}")]
    Table {
        /// Its family.
        family: Family,
        /// The kernel's answer.
        source: ApplyError,
    },
    /// Chains of `iptables-nft` stay.
    #[error("cannot remove the chains of {}: {source}", program(Backend::Nft, *family))]
    Chains {
        /// Their family.
        family: Family,
        /// The kernel's answer.
        source: ApplyError,
    },
    /// Whether there are old tables at all is not shown.
    #[error(
        "cannot tell whether there are tables of {}: {source}; run `nftproxy cleanup --kube-proxy` as \
         root if kube-proxy ran in iptables or ipvs mode",
        program(Backend::Legacy, *family)
    )]
    Hidden {
        /// Their family.
        family: Family,
        /// Why not.
        source: std::io::Error,
    },
    /// The old tables cannot be read or changed.
    #[error(
        "there are tables of {} ({tables}), and what kube-proxy may have left in them cannot be {step}: \
         {source}; `nftproxy cleanup --kube-proxy` where that program is installed removes it, as does \
         `kube-proxy --cleanup`",
        program(Backend::Legacy, *family)
    )]
    Legacy {
        /// Their family.
        family: Family,
        /// Which there are.
        tables: String,
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: legacy::LegacyError,
    },
    /// A step of ipvs mode failed.
    #[error("cannot {step}: {source}")]
    Ipvs {
        /// What was tried.
        step: String,
        /// The kernel's answer.
        source: ipvs::Refused,
    },
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// Everything that kube-proxy left.
    pub leftovers: Vec<Leftover>,
    /// Where more may be.
    pub unknown: Vec<TakeoverError>,
}

/// Looks for what kube-proxy left in this network namespace. Changes nothing.
#[must_use]
pub fn find() -> Found {
    let mut found = Found::default();
    let nft = NetlinkKernel::open().map_err(TakeoverError::from);
    if let Err(error) = nft.and_then(|mut kernel| find_nft(&mut kernel, &mut found.leftovers)) {
        found.unknown.push(error);
    }
    for family in Family::BOTH {
        match legacy_tables(family) {
            Err(error) => found.unknown.push(error),
            Ok(tables) => found.leftovers.extend(tables.into_iter().filter_map(|table| {
                chains_of(Backend::Legacy, family, &table.name, &table.chains)
            })),
        }
    }
    if ipvs::has_link() {
        let servers = ipvs::virtual_servers();
        found.leftovers.extend((servers > 0).then_some(Leftover::VirtualServers(servers)));
        found.leftovers.push(Leftover::Link);
    }
    match ipvs::sets() {
        Ok(sets) => found.leftovers.extend(sets.into_iter().map(Leftover::Set)),
        Err(source) => {
            found.unknown.push(TakeoverError::Ipvs { step: "look for ipsets".into(), source });
        }
    }
    found
}

fn find_nft(kernel: &mut NetlinkKernel, into: &mut Vec<Leftover>) -> Result<(), TakeoverError> {
    for table in kernel.foreign_tables()? {
        if table.name == TABLE {
            into.push(Leftover::Table(table.family));
        } else if TABLES.contains(&table.name.as_str()) {
            let chains = nft_chains(kernel, &table)?;
            into.extend(chains_of(Backend::Nft, table.family, &table.name, &chains));
        }
    }
    Ok(())
}

fn chains_of<R>(
    backend: Backend,
    family: Family,
    table: &str,
    chains: &[Chain<R>],
) -> Option<Leftover> {
    let count = chains.iter().filter(|chain| is_kube_proxys(&chain.name)).count();
    (count > 0).then(|| Leftover::Chains { backend, family, table: table.to_owned(), count })
}

fn nft_chains(
    kernel: &mut NetlinkKernel,
    table: &ForeignTable,
) -> Result<Vec<Chain<u64>>, LoadError> {
    let chains = kernel.foreign_chains(table)?.into_iter();
    let chain = |chain: crate::nft::netlink::ForeignChain| Chain {
        name: chain.name,
        base: chain.base,
        drops: chain.drops,
        jumps: chain.jumps,
    };
    Ok(chains.map(chain).collect())
}

fn legacy_tables(family: Family) -> Result<Vec<legacy::Table>, TakeoverError> {
    let tables =
        legacy::tables(family).map_err(|source| TakeoverError::Hidden { family, source })?;
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let fail = |source| legacy_error(family, &tables, "read", source);
    legacy::read(family, &tables).map_err(fail)
}

fn legacy_error(
    family: Family,
    tables: &[&str],
    step: &'static str,
    source: legacy::LegacyError,
) -> TakeoverError {
    TakeoverError::Legacy { family, tables: tables.join(", "), step, source }
}

/// Looks for what kube-proxy left and removes it; each step is said. How many steps failed.
#[must_use]
pub fn remove(purpose: Purpose) -> usize {
    let found = find();
    for leftover in &found.leftovers {
        info!("kube-proxy left: {leftover}");
    }
    let mut errors = found.unknown;
    let mut staying = 0;
    let mut take = |outcome: Result<usize, TakeoverError>| match outcome {
        Ok(chains) => staying += chains,
        Err(error) => errors.push(error),
    };
    match NetlinkKernel::open() {
        Err(error) => take(Err(error.into())),
        Ok(mut kernel) => {
            for leftover in &found.leftovers {
                if let Leftover::Table(family) = leftover {
                    take(remove_table(&mut kernel, *family).map(|()| 0));
                }
            }
            for family in families(&found.leftovers, Backend::Nft) {
                take(remove_nft_chains(&mut kernel, family, purpose));
            }
        }
    }
    for family in families(&found.leftovers, Backend::Legacy) {
        take(remove_legacy_chains(family, purpose));
    }
    remove_ipvs(&found.leftovers, &mut errors);
    for error in &errors {
        match purpose {
            // It is in nobody's way: our tables come first.
            Purpose::TakeOver => warn!("{error}"),
            Purpose::Cleanup => error!("{error}"),
        }
    }
    match (found.leftovers.len(), errors.len() + staying) {
        (0, 0) if purpose == Purpose::Cleanup => info!("kube-proxy left nothing on this node"),
        (0, 0) => {}
        (_, 0) => info!("what kube-proxy left is removed"),
        _ if errors.is_empty() => info!("what kube-proxy left is removed, but for what stays"),
        _ => {}
    }
    errors.len()
}

/// Says what there is, for those who want it to stay.
pub fn report() {
    let found = find();
    for leftover in found.leftovers {
        info!("kube-proxy left: {leftover}; it stays (`nftproxy cleanup --kube-proxy` removes it)");
    }
    for error in found.unknown {
        info!("{error}");
    }
}

/// Those families in which kube-proxy left chains of a kind.
fn families(leftovers: &[Leftover], wanted: Backend) -> impl Iterator<Item = Family> {
    Family::BOTH.into_iter().filter(move |of| {
        leftovers.iter().any(|leftover| {
            matches!(leftover, Leftover::Chains { backend, family, .. }
                if *backend == wanted && family == of)
        })
    })
}

fn remove_table(kernel: &mut NetlinkKernel, family: Family) -> Result<(), TakeoverError> {
    let table = ForeignTable { family, name: TABLE.into() };
    match kernel.remove_foreign(&[ForeignOp::DeleteTable(table)]) {
        Err(source) if !source.is(libc::ENOENT) => Err(TakeoverError::Table { family, source }),
        _ => {
            info!("removed the table {family} {TABLE}");
            Ok(())
        }
    }
}

/// Removes the chains of one family, all in one transaction. How many stay.
fn remove_nft_chains(
    kernel: &mut NetlinkKernel,
    family: Family,
    purpose: Purpose,
) -> Result<usize, TakeoverError> {
    let mut attempt = 1;
    loop {
        let mut tables = Vec::new();
        for table in kernel.foreign_tables()? {
            if table.family == family && TABLES.contains(&table.name.as_str()) {
                let chains = nft_chains(kernel, &table)?;
                tables.push((table, chains));
            }
        }
        let plans: Vec<_> =
            tables.iter().map(|(table, chains)| (table, plan(chains, purpose))).collect();
        let ops = operations(&plans);
        match kernel.remove_foreign(&ops) {
            Ok(()) => {
                for (table, plan) in &plans {
                    say(Backend::Nft, family, &table.name, plan);
                }
                return Ok(plans.iter().map(|(_, plan)| plan.stay.len()).sum());
            }
            // Somebody else changed a rule or added one meanwhile.
            Err(ApplyError::Refused { .. }) if attempt < ATTEMPTS => attempt += 1,
            Err(source) => return Err(TakeoverError::Chains { family, source }),
        }
    }
}

fn operations(plans: &[(&ForeignTable, Plan<'_, u64>)]) -> Vec<ForeignOp> {
    let mut ops = Vec::new();
    for (table, plan) in plans {
        let table = || (*table).clone();
        let rule = |(chain, rule): &(&str, &u64)| {
            ForeignOp::DeleteRule(table(), (*chain).to_owned(), **rule)
        };
        let chains = || plan.chains.iter().map(|chain| (*chain).to_owned());
        ops.extend(plan.rules.iter().map(rule));
        ops.extend(chains().map(|chain| ForeignOp::FlushChain(table(), chain)));
        ops.extend(chains().map(|chain| ForeignOp::DeleteChain(table(), chain)));
    }
    ops
}

/// The same with the programs for the old tables, table by table.
fn remove_legacy_chains(family: Family, purpose: Purpose) -> Result<usize, TakeoverError> {
    let mut staying = 0;
    for table in legacy_tables(family)? {
        let plan = plan(&table.chains, purpose);
        if !plan.chains.is_empty() || !plan.rules.is_empty() {
            let fail = |source| legacy_error(family, &[&table.name], "removed", source);
            legacy::remove(family, &table.name, &plan).map_err(fail)?;
        }
        say(Backend::Legacy, family, &table.name, &plan);
        staying += plan.stay.len();
    }
    Ok(staying)
}

fn say<R>(backend: Backend, family: Family, table: &str, plan: &Plan<'_, R>) {
    let program = program(backend, family);
    if !plan.chains.is_empty() {
        let (chains, rules) = (plan.chains.len(), plan.rules.len());
        info!(chains, rules, "removed what there was of kube-proxy's in {program} -t {table}");
    }
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (chain, reason) in &plan.stay {
        reasons.entry(reason).or_default().push(chain);
    }
    for (reason, chains) in reasons {
        warn!("{} of {program} -t {table} stays: {reason}", chains.join(", "));
    }
}

fn remove_ipvs(leftovers: &[Leftover], errors: &mut Vec<TakeoverError>) {
    // The sets come last: chains use them.
    for leftover in leftovers {
        let (step, outcome) = match leftover {
            Leftover::VirtualServers(_) => ("remove the virtual servers of ipvs", ipvs::flush()),
            Leftover::Link => ("delete the link kube-ipvs0", ipvs::delete_link()),
            Leftover::Set(name) => ("destroy an ipset", ipvs::destroy_set(name)),
            Leftover::Table(_) | Leftover::Chains { .. } => continue,
        };
        match outcome {
            Ok(()) => info!("removed {leftover}"),
            Err(source) => {
                let step = format!("{step} ({leftover})");
                errors.push(TakeoverError::Ipvs { step, source });
            }
        }
    }
}
