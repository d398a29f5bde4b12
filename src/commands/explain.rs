//! `nftproxy explain`: what happens on this node to a packet that opens a connection, and why.
//!
//! The rules are those that the kernel holds, where it can be asked, or else those that the objects ask
//! for; they are followed by [`crate::nft::interpret`], and Services and policies are named by the
//! objects. So the answer does not depend on what nftproxy believes to have programmed.

mod question;
mod reason;
mod senders;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

pub use self::question::{Question, Target, TargetError};
use self::reason::Because;
pub use self::reason::Named;
pub(super) use self::reason::{kind_word, scheduler_word};
use self::senders::{others, packet};
use super::endpoints::{EndpointRow, endpoints};
use super::objects::{GatherError, gather, is_given};
use super::tables::Tables;
use super::{Answer, CommandError, Output, Verdict, json};
use crate::config::Config;
use crate::frontend::{Frontend, FrontendKind, frontends};
use crate::host;
use crate::model::{Family, NodeFacts};
use crate::nft::dataplane;
use crate::nft::element::{Backend, ElementId, Value};
use crate::nft::fake::FakeKernel;
use crate::nft::interpret::{Fate, Origin, Outcome, Packet, Step, World, interpret};
use crate::nft::names::AffinityName;
use crate::nft::ruleset::Ruleset;
use crate::reconcile::Proxy;
use crate::state::State;

/// The whole answer.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// What was dialled.
    pub target: String,
    /// Who dialled.
    pub from: String,
    /// `this host`, or `the network`.
    pub origin: &'static str,
    /// In one line.
    pub summary: String,
    /// Which tables were followed.
    pub tables: String,
    /// What stands in the way of a complete answer.
    pub notes: Vec<String>,
    /// The Service that serves the address, if names are at hand.
    pub service: Option<Named>,
    /// Everything that can happen.
    pub outcomes: Vec<OutcomeRow>,
    /// The ways through the chains that outcomes take; more than one only where they part.
    pub paths: Vec<Vec<StepRow>>,
    /// Endpoints of the Service that cannot be met, and why.
    pub left_out: Vec<LeftOut>,
    /// The same question for others.
    pub others: Vec<Other>,
}

/// One thing that can happen.
#[derive(Clone, Debug, Serialize)]
pub struct OutcomeRow {
    /// Its share of such connections, 0 to 1.
    pub share: f64,
    /// `passes`, `rejected` or `dropped`.
    pub fate: &'static str,
    /// Where it goes.
    pub to: Option<String>,
    /// Whether it was translated to there.
    pub translated: bool,
    /// Whether that is this host itself.
    pub here: bool,
    /// Whether the source becomes an address of this host.
    pub masqueraded: bool,
    /// Why it is refused, or why (not) masqueraded.
    pub why: String,
    /// The elements of which one is drawn.
    pub elements: Vec<String>,
    /// The affinity map that remembers the client.
    pub remembered_in: Option<String>,
    /// Index in `paths`.
    pub path: usize,
}

/// One rule that applies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StepRow {
    /// The base chain under way.
    pub base: String,
    /// The chain.
    pub chain: String,
    /// The rule as nft shows it.
    pub rule: String,
    /// The elements it met, as nft shows them.
    pub elements: Vec<String>,
}

/// An endpoint that cannot be met.
#[derive(Clone, Debug, Serialize)]
pub struct LeftOut {
    /// Address and port.
    pub endpoint: String,
    /// Why.
    pub why: String,
}

/// The same question for somebody else.
#[derive(Clone, Debug, Serialize)]
pub struct Other {
    /// Who.
    pub from: String,
    /// What happens, in one line.
    pub summary: String,
}

/// What the explanation is drawn from.
struct Known {
    ruleset: Ruleset,
    /// The objects, if they could be had.
    proxy: Option<Proxy<FakeKernel>>,
    tables: Option<Tables>,
    node: NodeFacts,
    origin: String,
    notes: Vec<String>,
}

/// Answers.
pub async fn explain(
    config: &Config,
    question: &Question,
    output: Output,
) -> Result<Answer, CommandError> {
    question.check()?;
    let mut known = known(config, question).await?;
    let explanation = answer(&mut known, question);
    let answered = explanation.outcomes.iter().any(|outcome| outcome.translated);
    let verdict = if answered { Verdict::Good } else { Verdict::Attention };
    let text = match output {
        Output::Json => json(&explanation),
        Output::Text => text::write(&explanation),
    };
    Ok(Answer { text, verdict })
}

async fn known(config: &Config, question: &Question) -> Result<Known, CommandError> {
    let family = Family::of(question.target.address);
    let mut notes = Vec::new();
    let objects = gather(config).await;
    let mut proxy = None;
    let mut source = config.source.to_string();
    let mut without = None;
    match objects {
        Ok(gathered) => {
            source = gathered.source;
            proxy = Some(Proxy::new(gathered.state, FakeKernel::default()));
        }
        Err(error @ GatherError::Source(_)) if is_given(&config.source) || question.wanted => {
            return Err(error.into());
        }
        Err(error) if question.wanted => return Err(error.into()),
        Err(error) => {
            notes
                .push(format!("no names of Services, and no endpoints that are left out: {error}"));
            without = Some(error);
        }
    }
    let node = match &proxy {
        Some(proxy) => proxy.state().node_facts().clone(),
        None => host::node_facts(&config.node_name),
    };
    let options = proxy
        .as_ref()
        .map_or_else(|| config.live.settings.options(&node), |proxy| proxy.state().options());
    let tables = if question.wanted { None } else { Some(Tables::load(&options)) };
    let wanted = proxy.as_mut().map(Proxy::wanted);
    let computed = format!("what {source} ask for on node {}", node.name);
    let mut known =
        Known { ruleset: Ruleset::default(), proxy, tables: None, node, origin: computed, notes };
    match (tables, wanted) {
        (Some(Ok(tables)), wanted) => {
            let missing = tables.missing(family);
            known.notes.extend(tables.changed(family));
            if let (Some(missing), Some(wanted)) = (&missing, wanted) {
                known.notes.insert(0, format!("{missing}; what follows is what would happen"));
                known.ruleset = wanted;
            } else {
                known.notes.extend(missing);
                known.origin = "what the kernel holds".into();
                known.ruleset = tables.ruleset.clone();
                known.tables = Some(tables);
            }
        }
        (Some(Err(error)), Some(wanted)) => {
            known.notes.push(format!("the kernel was not asked what is in force: {error}"));
            known.ruleset = wanted;
        }
        (Some(Err(error)), None) => {
            let objects = without.expect("no objects without a reason");
            return Err(CommandError::Nothing { tables: error.to_string(), objects });
        }
        (None, wanted) => known.ruleset = wanted.unwrap_or_default(),
    }
    Ok(known)
}

/// Answers from what a daemon knows and wants, which `origin` says in words.
pub(crate) fn of_daemon(
    state: State,
    wanted: Ruleset,
    origin: String,
    question: &Question,
) -> Explanation {
    let node = state.node_facts().clone();
    let proxy = Some(Proxy::new(state, FakeKernel::default()));
    let notes = Vec::new();
    answer(&mut Known { ruleset: wanted, proxy, tables: None, node, origin, notes }, question)
}

/// The same in text.
pub(crate) fn in_text(explanation: &Explanation) -> String {
    text::write(explanation)
}

fn answer(known: &mut Known, question: &Question) -> Explanation {
    let target = question.target;
    let family = Family::of(target.address);
    // The host of a node has the node's address, also where this is not run on it.
    let computed_address = known.tables.is_none().then(|| known.node.primary(family)).flatten();
    let interfaces = known.node.interfaces.clone();
    let is_local = move |address: IpAddr| {
        address.is_loopback()
            || interfaces.binary_search(&address).is_ok()
            || Some(address) == computed_address
    };
    let packet = packet(question, &known.node, &is_local);
    let mut remembered = BTreeMap::new();
    let follow = |known: &Known, packet: &Packet, remembered: &BTreeMap<AffinityName, Backend>| {
        let world = World { ruleset: &known.ruleset, is_local: &is_local, remembered };
        interpret(packet, &world)
    };
    let mut outcomes = follow(known, &packet, &remembered);
    let asked = affinities(&outcomes, &known.ruleset);
    if let Some(tables) = &mut known.tables {
        for name in &asked {
            match tables.kernel.clients(family, name) {
                Ok(clients) => {
                    let held = clients.get(&packet.source);
                    remembered.extend(held.map(|backend| (name.clone(), *backend)));
                }
                Err(error) => known.notes.push(format!("map {name}: {error}")),
            }
        }
        outcomes = follow(known, &packet, &remembered);
    } else if !asked.is_empty() {
        known.notes.push(
            "a client that was here before keeps its endpoint; who was is in the kernel only"
                .into(),
        );
    }
    let service = known
        .proxy
        .as_ref()
        .and_then(|proxy| reason::named(proxy.state(), &known.ruleset, &target));
    let because = Because {
        ruleset: &known.ruleset,
        service: service.as_ref(),
        target: &target,
        packet: &packet,
    };
    let rows = all_endpoints(known, &target);
    let summary = because.summary(&outcomes);
    let mut paths: Vec<Vec<StepRow>> = Vec::new();
    let outcome_rows: Vec<_> =
        outcomes.iter().map(|outcome| outcome_row(outcome, &because, &mut paths)).collect();
    let others = others(&packet, known, &is_local)
        .into_iter()
        .map(|(from, packet)| {
            let outcomes = follow(known, &packet, &BTreeMap::new());
            Other { from, summary: Because { packet: &packet, ..because }.summary(&outcomes) }
        })
        .collect();
    let wanted = known.proxy.as_mut().filter(|_| known.tables.is_some()).map(Proxy::wanted);
    let mut notes = known.notes.clone();
    if let Some(wanted) = wanted {
        let world = World { ruleset: &wanted, is_local: &is_local, remembered: &remembered };
        let fates = |outcomes: &[Outcome]| {
            outcomes.iter().map(|outcome| outcome.fate).collect::<BTreeSet<_>>()
        };
        if fates(&interpret(&packet, &world)) != fates(&outcomes) {
            notes.push("the objects ask for something else than the kernel does: is the daemon running? `nftproxy diff` and `nftproxy explain --wanted` show more".into());
        }
    }
    if let (None, Some(proxy)) = (&service, &known.proxy) {
        notes.extend(reason::near_miss(proxy.state(), &known.ruleset, &target));
    }
    let met = |row: &EndpointRow| {
        outcomes.iter().any(|o| o.pick.as_ref().is_some_and(|pick| pick.backend == row.backend))
    };
    let left_out = rows
        .iter()
        .filter(|row| !met(row))
        .map(|row| LeftOut {
            endpoint: row.endpoint.clone(),
            why: because.left_out(row, &outcomes),
        })
        .collect();
    Explanation {
        target: target.to_string(),
        from: packet.source.to_string(),
        origin: if packet.origin == Origin::Host { "this host" } else { "the network" },
        summary,
        tables: known.origin.clone(),
        notes,
        outcomes: outcome_rows,
        paths,
        left_out,
        others,
        service,
    }
}

/// The affinity maps that a client of these outcomes could be remembered in.
fn affinities(outcomes: &[Outcome], ruleset: &Ruleset) -> BTreeSet<AffinityName> {
    let met = outcomes.iter().flat_map(|outcome| &outcome.steps).flat_map(|step| &step.elements);
    let asks = |id| match ruleset.elements.get(id) {
        Some(Value::Jump(chain)) => chain.asks(),
        _ => Vec::new(),
    };
    met.flat_map(asks).collect()
}

fn all_endpoints(known: &Known, target: &Target) -> Vec<EndpointRow> {
    let Some(proxy) = &known.proxy else { return Vec::new() };
    let state = proxy.state();
    let family = Family::of(target.address);
    let found = reason::served(state, &known.ruleset, target);
    found.map_or_else(Vec::new, |(service, port, _)| endpoints(state, service, port, family))
}

fn outcome_row(
    outcome: &Outcome,
    because: &Because<'_>,
    paths: &mut Vec<Vec<StepRow>>,
) -> OutcomeRow {
    let steps: Vec<_> = outcome.steps.iter().map(|step| step_row(step, because)).collect();
    let path = paths.iter().position(|path| *path == steps).unwrap_or_else(|| {
        paths.push(steps);
        paths.len() - 1
    });
    let (fate, to, here, masqueraded) = match outcome.fate {
        Fate::Dropped => ("dropped", None, false, false),
        Fate::Rejected => ("rejected", None, false, false),
        Fate::Passes { to, here, masqueraded } => ("passes", Some(to), here, masqueraded),
    };
    let pick = outcome.pick.as_ref();
    OutcomeRow {
        share: outcome.share,
        fate,
        to: to.map(|to| SocketAddr::new(to.address, to.port).to_string()),
        translated: pick.is_some() && to.is_some(),
        here,
        masqueraded,
        why: because.why(outcome),
        elements: pick.map_or_else(Vec::new, |pick| {
            pick.elements.iter().map(|id| element(id, because.ruleset)).collect()
        }),
        remembered_in: pick.and_then(|p| p.remembered.as_ref()).map(ToString::to_string),
        path,
    }
}

fn step_row(step: &Step, because: &Because<'_>) -> StepRow {
    let family = Family::of(because.target.address);
    let chain = dataplane::chain(step.chain.clone(), family, &because.ruleset.options);
    StepRow {
        base: step.base.to_string(),
        chain: step.chain.to_string(),
        rule: crate::nft::text::rule(&chain.rules[step.rule], family),
        elements: step.elements.iter().map(|id| element(id, because.ruleset)).collect(),
    }
}

/// An element as nft shows it.
fn element(id: &ElementId, ruleset: &Ruleset) -> String {
    match ruleset.elements.get(id) {
        None | Some(Value::None) => format!("{} {{ {} }}", id.set, id.key),
        Some(value) => format!("{} {{ {} : {value} }}", id.set, id.key),
    }
}

/// Which of its frontends a Service is dialled on.
fn kind_of(
    state: &State,
    frontend: Frontend,
    family: Family,
) -> Option<(&crate::model::Service, &crate::model::ServicePort, FrontendKind)> {
    let service = state.service_named(state.owner(frontend)?)?;
    service.ports.iter().find_map(|port| {
        let all = frontends(service, port, family);
        let (_, kind) = all.into_iter().find(|(f, _)| *f == frontend)?;
        Some((service, port, kind))
    })
}
