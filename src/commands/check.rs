//! `nftproxy check`: whether this host is in order, before nftproxy runs here and while it does.
//!
//! Every finding says what was looked at, how it is, and what to do if that is not good. What the
//! kernel can do is not derived from its version, but tried: see `trial`.

mod host;
mod leftovers;
mod listeners;
mod text;
mod trial;

use std::collections::BTreeSet;

use serde::Serialize;

use self::host::HostFiles;
use super::objects::{Gathered, gather, is_given};
use super::tables::Tables;
use super::text::count;
use super::{Answer, CommandError, Output, Verdict, json};
use crate::config::Config;
use crate::contribution::Contributor;
use crate::model::Family;
use crate::nft::names::{LAYOUT, TABLE};
use crate::nft::netlink::NetlinkKernel;
use crate::nft::rule::AFFINITY_SIZE;
use crate::reconcile::Proxy;
use crate::state::State;

/// The whole answer.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The worst of the findings.
    pub verdict: Verdict,
    /// Everything that was looked at.
    pub findings: Vec<Finding>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about, in a word or two.
    pub about: &'static str,
    /// How good it is.
    pub verdict: Verdict,
    /// How it is.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Finding {
    fn good(about: &'static str, found: impl Into<String>) -> Self {
        Self { about, verdict: Verdict::Good, found: found.into(), advice: None }
    }

    fn attention(about: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        let (found, advice) = (found.into(), Some(advice.into()));
        Self { about, verdict: Verdict::Attention, found, advice }
    }

    fn bad(about: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Bad, ..Self::attention(about, found, advice) }
    }
}

/// Affinity maps with fewer free places than one in so many are named.
const NEARLY_FULL: usize = 10;

/// Answers.
pub async fn check(config: &Config, output: Output) -> Result<Answer, CommandError> {
    let mut findings = Vec::new();
    let state = match gather(config).await {
        Ok(Gathered { state, source }) => {
            let services = count(state.services().count(), "Service");
            findings.push(Finding::good("objects", format!("{services} from {source}")));
            Some(state)
        }
        Err(error) if is_given(&config.source) => {
            let advice =
                "nftproxy keeps what is in force, and changes nothing until it can read them";
            findings.push(Finding::bad("objects", error.to_string(), advice));
            None
        }
        Err(error) => {
            let advice = "give --kubeconfig or --manifests, for Services to be looked at, too";
            findings.push(Finding::attention("objects", error.to_string(), advice));
            None
        }
    };
    let node = match &state {
        Some(state) => state.node_facts().clone(),
        None => crate::host::node_facts(&config.node_name),
    };
    let families: Vec<Family> = Family::BOTH
        .into_iter()
        .filter(|f| *f == Family::V4 || node.addresses.iter().any(|a| Family::of(*a) == *f))
        .collect();
    findings.extend(HostFiles::system().findings(&families));
    if let Some(state) = &state {
        findings.extend(of_node(state));
        findings.extend(listeners::findings(std::path::Path::new("/proc"), state));
    }
    let options = config.live.settings.options(&node);
    match Tables::load(&state.as_ref().map_or(options, State::options)) {
        Err(error) => findings.push(Finding::bad(
            "permission",
            format!("the kernel does not show its tables: {error}"),
            "run as root, or with CAP_NET_ADMIN in this network namespace",
        )),
        Ok(mut tables) => {
            findings.push(Finding::good("permission", "the kernel can be asked, and told"));
            findings.extend(of_tables(&mut tables));
            findings.extend(leftovers::findings(&mut tables.kernel));
            findings.extend(of_affinity(&mut tables));
            findings.extend(of_kernel(tables.kernel, state));
        }
    }
    let verdict = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Good);
    let report = Report { verdict, findings };
    let text = match output {
        Output::Json => json(&report),
        Output::Text => text::write(&report),
    };
    Ok(Answer { text, verdict })
}

/// Whether the node is known well enough for what depends on it.
fn of_node(state: &State) -> Vec<Finding> {
    let node = state.node_facts();
    if node.addresses.is_empty() {
        return vec![Finding::attention(
            "node",
            format!("no address of node {} is known", node.name),
            "node ports are served on all addresses; see that the Node object exists, and that \
             --hostname-override names it",
        )];
    }
    let addresses: Vec<_> = node.addresses.iter().map(ToString::to_string).collect();
    vec![Finding::good("node", format!("{} with {}", node.name, addresses.join(", ")))]
}

/// The tables as they are.
fn of_tables(tables: &mut Tables) -> Vec<Finding> {
    let mut findings = Vec::new();
    for family in Family::BOTH {
        if tables.loaded.tables.contains_key(&family) {
            if let Some(foreign) = tables.missing(family) {
                let advice = "at its start nftproxy replaces the table, all at once";
                findings.push(Finding::attention("tables", foreign, advice));
            } else if let Some(changed) = tables.changed(family) {
                findings.push(Finding::attention("tables", changed, "see `nftproxy diff`"));
            } else {
                let of_family =
                    tables.ruleset.elements.iter().filter(|(id, _)| id.family == family);
                let elements = count(of_family.count(), "element");
                let found =
                    format!("{family} {TABLE} is as nftproxy makes it ({LAYOUT}), with {elements}");
                findings.push(Finding::good("tables", found));
            }
        } else {
            let found = format!("there is no table {family} {TABLE}: no Service works by it");
            findings.push(Finding::attention("tables", found, "start nftproxy"));
        }
    }
    findings
}

/// Maps that soon cannot remember further clients.
fn of_affinity(tables: &mut Tables) -> Vec<Finding> {
    let names: Vec<_> = tables.ruleset.affinities.keys().cloned().collect();
    if names.is_empty() {
        return Vec::new();
    }
    let limit = usize::try_from(AFFINITY_SIZE).unwrap_or(usize::MAX);
    let mut findings = Vec::new();
    for (family, name) in &names {
        match tables.kernel.clients(*family, name) {
            Ok(clients) if limit - clients.len().min(limit) < limit / NEARLY_FULL => {
                findings.push(Finding::attention(
                    "affinity",
                    format!(
                        "{family} {name} remembers {} of at most {limit} clients",
                        clients.len()
                    ),
                    "further clients are served, but not remembered: shorten \
                     sessionAffinityConfig.clientIP.timeoutSeconds",
                ));
            }
            Ok(_) => {}
            Err(error) => findings.push(Finding::attention(
                "affinity",
                format!("{family} {name}: {error}"),
                "look again",
            )),
        }
    }
    if findings.is_empty() {
        let maps = count(names.len(), "map");
        findings.push(Finding::good("affinity", format!("{maps}, none of them nearly full")));
    }
    findings
}

/// What the kernel says to what nftproxy would have it do.
fn of_kernel(mut kernel: NetlinkKernel, state: Option<State>) -> Vec<Finding> {
    let mut findings = trial::of_features(&mut kernel);
    let Some(mut state) = state else { return findings };
    let problems: Vec<_> =
        state.all_contributions().into_iter().flat_map(|(_, _, problems)| problems).collect();
    for problem in &problems {
        let advice = "change the object; everything else is served";
        findings.push(Finding::attention("Services", problem.to_string(), advice));
    }
    if problems.is_empty() {
        findings.push(Finding::good("Services", "no two of them claim the same address and port"));
    }
    let mut proxy = Proxy::new(state, kernel);
    match proxy.plan() {
        Err(error) => {
            findings.push(Finding::bad("kernel", error.to_string(), "look again"));
        }
        Ok(plan) => {
            findings.extend(trial::of_plan(proxy.kernel_mut(), &plan));
            findings.push(pending(&plan));
        }
    }
    findings
}

/// What a commit would do.
fn pending(plan: &[(crate::nft::transaction::Op, Option<Contributor>)]) -> Finding {
    if plan.is_empty() {
        return Finding::good("in force", "the kernel holds what the objects ask for");
    }
    let objects: BTreeSet<_> =
        plan.iter().filter_map(|(_, contributor)| contributor.clone()).collect();
    let names: Vec<_> = objects.iter().take(3).map(ToString::to_string).collect();
    let more = objects.len().saturating_sub(names.len());
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    Finding::attention(
        "in force",
        format!(
            "the kernel does not hold what the objects ask for: {}, for {}{more}",
            count(plan.len(), "operation"),
            names.join(", "),
        ),
        "if nftproxy runs and this stays, see its log; `nftproxy diff` shows each operation",
    )
}
