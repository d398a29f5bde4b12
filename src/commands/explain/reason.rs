//! Why: the rules that applied, put into the words of Services and policies.

use serde::Serialize;

use super::{Target, kind_of};
use crate::commands::endpoints::EndpointRow;
use crate::commands::text::count;
use crate::frontend::{Frontend, FrontendKind};
use crate::model::{Family, Scheduler, Service, ServicePort, SessionAffinity, TrafficPolicy};
use crate::nft::dataplane::{Detector, NodePorts};
use crate::nft::element::{ElementId, Key};
use crate::nft::interpret::{Fate, Origin, Outcome, Packet, Step};
use crate::nft::names::{ChainName, Pick, SetName, Way};
use crate::nft::ruleset::Ruleset;
use crate::state::State;

/// The Service that serves an address, in words.
#[derive(Clone, Debug, Serialize)]
pub struct Named {
    /// `namespace/name`.
    pub service: String,
    /// Name of the port; empty if it has none.
    pub port: String,
    /// Number of the port.
    pub number: u16,
    /// What of the Service was dialled: `ClusterIP`, `NodePort`, `ExternalIP` or `LoadBalancer`.
    pub kind: &'static str,
    /// The policy that applies, `internalTrafficPolicy` or `externalTrafficPolicy` and its value.
    pub policy: String,
    /// Whether that is `Local`.
    #[serde(skip)]
    pub local: bool,
    /// How an endpoint is picked.
    pub scheduler: &'static str,
    /// For how many seconds a client keeps its endpoint.
    pub affinity_seconds: Option<u32>,
    /// Sources that may pass; empty if all may.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source_ranges: Vec<String>,
}

/// What is being dialled: an address of a Service, or a node port.
pub(super) fn served<'a>(
    state: &'a State,
    ruleset: &Ruleset,
    target: &Target,
) -> Option<(&'a Service, &'a ServicePort, FrontendKind)> {
    let family = Family::of(target.address);
    let (protocol, port) = target.port?;
    let address = Frontend::Address(target.address, protocol, port);
    let node_port = Frontend::NodePort(family, protocol, port);
    let serves_node_ports = || match ruleset.options.node_ports[usize::from(family == Family::V6)] {
        NodePorts::Listed => {
            let key = Key::Address(target.address);
            ruleset.elements.get(&ElementId { family, set: SetName::NodeportIps, key }).is_some()
        }
        NodePorts::All => {
            state.node_facts().interfaces.contains(&target.address) && !target.address.is_loopback()
        }
    };
    kind_of(state, address, family)
        .or_else(|| kind_of(state, node_port, family).filter(|_| serves_node_ports()))
}

/// The word of the API for a kind of frontend.
pub(in crate::commands) fn kind_word(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "ClusterIP",
        FrontendKind::LoadBalancer => "LoadBalancer",
        FrontendKind::ExternalIp => "ExternalIP",
        FrontendKind::NodePort => "NodePort",
    }
}

/// The annotation's word for a scheduler.
pub(in crate::commands) fn scheduler_word(scheduler: Scheduler) -> &'static str {
    match scheduler {
        Scheduler::Random => "random",
        Scheduler::RoundRobin => "round-robin",
        Scheduler::SourceHash => "source-hash",
        Scheduler::Maglev => "maglev",
    }
}

pub(super) fn named(state: &State, ruleset: &Ruleset, target: &Target) -> Option<Named> {
    let (service, port, kind) = served(state, ruleset, target)?;
    let (field, policy) = if kind.is_external() {
        ("externalTrafficPolicy", service.external_traffic_policy)
    } else {
        ("internalTrafficPolicy", service.internal_traffic_policy)
    };
    let ranges = service.source_ranges_of(Family::of(target.address));
    Some(Named {
        service: service.name.to_string(),
        port: port.name.to_string(),
        number: port.port,
        kind: kind_word(kind),
        policy: format!("{field}: {policy:?}"),
        local: policy == TrafficPolicy::Local,
        scheduler: scheduler_word(service.scheduler),
        affinity_seconds: match service.session_affinity {
            SessionAffinity::None => None,
            SessionAffinity::ClientIp { timeout } => Some(timeout),
        },
        source_ranges: match kind {
            FrontendKind::LoadBalancer => ranges.map(|range| range.to_string()).collect(),
            _ => Vec::new(),
        },
    })
}

/// What somebody may have meant who dialled what no Service serves.
pub(super) fn near_miss(state: &State, ruleset: &Ruleset, target: &Target) -> Vec<String> {
    let Target { address, port } = *target;
    let family = Family::of(address);
    let mut notes = Vec::new();
    for service in state.services() {
        let numbers = |port: &ServicePort| format!("{}/{}", port.port, port.protocol);
        let addresses = [&service.cluster_ips, &service.external_ips, &service.load_balancer_ips];
        if addresses.iter().any(|list| list.contains(&address)) {
            let ports: Vec<_> = service.ports.iter().map(numbers).collect();
            notes.push(format!(
                "{address} is an address of Service {}, whose ports are {}",
                service.name,
                ports.join(", ")
            ));
        }
        let is_endpoint = |slice: &&crate::model::EndpointSlice| {
            slice.endpoints.iter().any(|endpoint| endpoint.address == address)
        };
        if state.slices_of(&service.name).iter().any(is_endpoint) {
            notes.push(format!("{address} is an endpoint of Service {}", service.name));
        }
    }
    if let Some((protocol, port)) = port
        && let Some((service, ..)) =
            kind_of(state, Frontend::NodePort(family, protocol, port), family)
    {
        let served = ruleset.elements_of(family, SetName::NodeportIps);
        let served: Vec<_> = served.map(|(id, _)| id.key.to_string()).collect();
        let served = if served.is_empty() { "this host's".into() } else { served.join(", ") };
        notes.push(format!(
            "{port} is a node port of Service {}, but node ports are served on these addresses only: {served}",
            service.name
        ));
    }
    notes.truncate(NEAR_MISSES);
    notes
}

/// How many near misses are named.
const NEAR_MISSES: usize = 5;

/// What reasons are drawn from.
#[derive(Clone, Copy)]
pub(super) struct Because<'a> {
    pub(super) ruleset: &'a Ruleset,
    pub(super) service: Option<&'a Named>,
    pub(super) target: &'a Target,
    pub(super) packet: &'a Packet,
}

impl Because<'_> {
    /// What happens, in one line.
    pub(super) fn summary(&self, outcomes: &[Outcome]) -> String {
        let picked = |outcome: &&Outcome| {
            outcome.pick.is_some() && matches!(outcome.fate, Fate::Passes { .. })
        };
        let answering: Vec<_> = outcomes.iter().filter(picked).collect();
        let Some(first) = answering.first() else {
            let outcome = &outcomes[0];
            return match outcome.fate {
                Fate::Dropped => format!("dropped: {}", self.why(outcome)),
                Fate::Rejected => format!("refused: {}", self.why(outcome)),
                Fate::Passes { .. } => format!("not translated: {}", self.why(outcome)),
            };
        };
        let who = match &first.pick {
            Some(pick) if answering.len() == 1 => {
                let held =
                    if pick.remembered.is_some() { ", which remembers the client" } else { "" };
                format!(
                    "sent to {}{held}",
                    std::net::SocketAddr::new(pick.backend.address, pick.backend.port)
                )
            }
            _ => format!("sent to one of {}", count(answering.len(), "endpoint")),
        };
        let masqueraded =
            answering.iter().filter(|o| matches!(o.fate, Fate::Passes { masqueraded: true, .. }));
        let seen = match masqueraded.count() {
            0 => "seen from its own address",
            all if all == answering.len() => "seen from an address of this node",
            _ => "some see an address of this node, others the client's",
        };
        let lost = outcomes.len() - answering.len();
        let rest = if lost > 0 { "; some are refused or lost" } else { "" };
        format!("{who}, {seen}{rest}")
    }

    /// Why an outcome is what it is.
    pub(super) fn why(&self, outcome: &Outcome) -> String {
        match outcome.fate {
            Fate::Dropped | Fate::Rejected => self.why_refused(outcome),
            Fate::Passes { here, .. } if outcome.pick.is_none() => {
                let where_to =
                    if here { "goes to this host's own programs" } else { "is routed as it is" };
                match self.target.port {
                    Some(_) => {
                        format!("no Service has {}; the packet {where_to}", self.target)
                    }
                    None if here => "Services are ports; this host answers pings itself".into(),
                    None => format!("Services are ports; the ping {where_to}"),
                }
            }
            Fate::Passes { masqueraded: true, .. } => self.why_masqueraded(outcome),
            Fate::Passes { here, masqueraded: false, .. } => {
                self.why_not_masqueraded(outcome, here)
            }
        }
    }

    fn why_refused(&self, outcome: &Outcome) -> String {
        let target = self.target;
        let Some(last) = outcome.steps.last() else { return "by a rule".into() };
        match &last.chain {
            ChainName::Restricted(_) => {
                let (source, ranges) = (self.packet.source, SetName::SourceRanges);
                format!("{source} is not in the Service's loadBalancerSourceRanges ({ranges})")
            }
            ChainName::NoEndpoint => {
                let who =
                    self.service.map_or("the Service".into(), |s| format!("Service {}", s.service));
                format!("{who} has no endpoint that could answer")
            }
            ChainName::ClusterIpsCheck if outcome.fate == Fate::Rejected => match target.port {
                Some((protocol, port)) => format!(
                    "{} is a ClusterIP, but no Service has port {port}/{protocol} on it",
                    target.address
                ),
                None => format!(
                    "{} is a ClusterIP: no machine has it, and only ports of its Service are served",
                    target.address
                ),
            },
            ChainName::ClusterIpsCheck => {
                format!("{} is in the range of ClusterIPs, but no Service has it", target.address)
            }
            _ => {
                let policy = self.service.map_or("a Local policy", |s| s.policy.as_str());
                format!("{policy}, and no endpoint on this node could answer; others could")
            }
        }
    }

    fn why_masqueraded(&self, outcome: &Outcome) -> String {
        let hairpin = |step: &Step| {
            step.chain == ChainName::NatPostrouting
                && step.elements.iter().any(|id| id.set == SetName::Hairpin)
        };
        if outcome.steps.iter().any(hairpin) {
            return "the client is given itself, and could not take an answer from its own address"
                .into();
        }
        self.why_marked(outcome).unwrap_or_else(|| "the packet carries the mark".into())
    }

    /// Why the packet was marked, if it was.
    fn why_marked(&self, outcome: &Outcome) -> Option<String> {
        let source = self.packet.source;
        let mut pairs = outcome.steps.windows(2);
        let marking = |pair: &[Step]| {
            (pair[1].chain == ChainName::MarkForMasquerade).then(|| pair[0].chain.clone())
        };
        Some(match pairs.find_map(marking)? {
            ChainName::MarkInternal if self.ruleset.options.masquerade_all => {
                "all traffic to ClusterIPs is (masqueradeAll)".into()
            }
            ChainName::MarkInternal => match self.detector() {
                Detector::Interface(name) => {
                    format!("it goes to a ClusterIP and did not come in by {name}")
                }
                _ => format!("it goes to a ClusterIP, and {source} is no pod's (local-pods)"),
            },
            chain if chain.is_external_local() => {
                format!("externalTrafficPolicy: Local, but {source} is this host's own")
            }
            _ => "externalTrafficPolicy: Cluster, the endpoint may be on another node".into(),
        })
    }

    fn why_not_masqueraded(&self, outcome: &Outcome, here: bool) -> String {
        if let Some(why) = self.why_marked(outcome)
            && here
        {
            return format!("delivered to this host before it would be masqueraded ({why})");
        }
        let external_local = outcome.steps.iter().any(|step| step.chain.is_external_local());
        let to_cluster_ip = self.service.map(|service| service.kind == "ClusterIP");
        match (to_cluster_ip, self.detector()) {
            _ if external_local => {
                let pod = self.packet.origin != Origin::Host && self.is_pod();
                if pod {
                    "externalTrafficPolicy: Local, and the client is a pod".into()
                } else {
                    "externalTrafficPolicy: Local keeps the client's address".into()
                }
            }
            (_, Detector::None) => "pods are not told from others (no cluster CIDR)".into(),
            (_, Detector::Interface(name)) => format!("it came in by {name}, from a pod"),
            (_, Detector::LocalPods) => format!("{} is a pod's (local-pods)", self.packet.source),
        }
    }

    fn detector(&self) -> &Detector {
        let family = Family::of(self.target.address);
        &self.ruleset.options.detect_local[usize::from(family == Family::V6)]
    }

    fn is_pod(&self) -> bool {
        let family = Family::of(self.target.address);
        let source = self.packet.source;
        let mut pods = self.ruleset.elements_of(family, SetName::LocalPods);
        pods.any(|(id, _)| matches!(id.key, Key::Range(first, last) if first <= source && source <= last))
    }

    /// Why an endpoint of the Service cannot be met.
    pub(super) fn left_out(&self, row: &EndpointRow, outcomes: &[Outcome]) -> String {
        let held =
            |outcome: &Outcome| outcome.pick.as_ref().is_some_and(|pick| pick.remembered.is_some());
        let held_here = self.service.is_some_and(|service| service.local);
        let usable = row.serves_cluster || row.serves_local;
        if outcomes.iter().any(held) && usable {
            "the client is remembered at another one".into()
        } else if row.weight == 0 {
            "weight 0".into()
        } else if !row.ready {
            row.condition().into()
        } else if self.refused_before(outcomes) {
            "the packet is refused before it is sent to anybody".into()
        } else if held_here && !row.local {
            "ready, but not on this node".into()
        } else if by_hash(outcomes) {
            "the hash of the client's address picks another one".into()
        } else if !row.serves_cluster {
            "ready, but hinted for another zone or node".into()
        } else {
            "ready, but the tables followed do not have it".into()
        }
    }

    /// Whether the packet never got as far as a choice of endpoints.
    fn refused_before(&self, outcomes: &[Outcome]) -> bool {
        let held_here = self.service.is_some_and(|service| service.local);
        outcomes.iter().all(|outcome| !matches!(outcome.fate, Fate::Passes { .. })) && !held_here
    }
}

fn by_hash(outcomes: &[Outcome]) -> bool {
    // The chains of a port's own pick in turn.
    let hashed = |step: &Step| match &step.chain {
        ChainName::Way(Way::Select(selection)) => selection.pick == Pick::SourceHash,
        _ => false,
    };
    outcomes.iter().any(|outcome| outcome.steps.iter().any(hashed))
}
