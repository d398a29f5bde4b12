//! `nftproxy list`: every Service port with what is dialled, the policies, and who answers.
//!
//! As terse as `ipvsadm -Ln`, with names. It says what the objects ask for, and, where the kernel can
//! be asked, whether the kernel holds that.

mod text;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::connections::{Counted, counted};
use super::endpoints::{EndpointRow, endpoints};
use super::explain::{kind_word, scheduler_word};
use super::objects::{Gathered, gather};
use super::{Answer, CommandError, Output, Verdict, json};
use crate::config::Config;
use crate::connections::{Port, address_of};
use crate::contribution::Contributor;
use crate::frontend::{Frontend, FrontendKind, frontends};
use crate::model::{Family, NamespacedName, Service, ServicePort, SessionAffinity, TrafficPolicy};
use crate::nft::kernel::LoadError;
use crate::nft::netlink::NetlinkKernel;
use crate::reconcile::Proxy;
use crate::state::State;

/// What to list; what is not given does not narrow.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Their namespace.
    pub namespace: Option<String>,
    /// Their name.
    pub service: Option<String>,
    /// An address that they are dialled on, or that one of their endpoints has.
    pub address: Option<IpAddr>,
    /// Whether to go by the objects alone, and not to ask the kernel.
    pub wanted: bool,
}

/// The whole answer.
#[derive(Clone, Debug, Serialize)]
pub struct Listing {
    /// Where the objects are from.
    pub source: String,
    /// The node that they are seen from.
    pub node: String,
    /// Whether the kernel was asked; if not, why not.
    pub kernel: String,
    /// How many Service ports there are, those that are not listed included.
    pub ports: usize,
    /// The Service ports, by name.
    pub services: Vec<PortRow>,
}

/// One Service port in one family.
#[derive(Clone, Debug, Serialize)]
pub struct PortRow {
    /// `namespace/name`.
    pub service: String,
    /// Name of the port; empty if it has none.
    pub port: String,
    /// Its protocol.
    pub protocol: String,
    /// `IPv4` or `IPv6`.
    pub family: &'static str,
    /// How endpoints are picked.
    pub scheduler: &'static str,
    /// For how many seconds a client keeps its endpoint.
    pub affinity_seconds: Option<u32>,
    /// Whether the kernel holds it; None if it was not asked.
    pub in_kernel: Option<InKernel>,
    /// Connections that the kernel counted, where it counts: of each endpoint since its first, or since
    /// the first after an hour without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
    /// What is dialled.
    pub frontends: Vec<FrontendRow>,
    /// Who could answer, and who cannot.
    pub endpoints: Vec<EndpointRow>,
    #[serde(skip)]
    of: (Port, Family),
}

/// Whether the kernel holds what a Service asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum InKernel {
    /// Just that.
    InForce,
    /// Something else, or not all of it.
    Differs,
}

/// Something that is dialled.
#[derive(Clone, Debug, Serialize)]
pub struct FrontendRow {
    /// `ClusterIP`, `NodePort`, `ExternalIP` or `LoadBalancer`.
    pub kind: &'static str,
    /// Address and port, or the node port alone.
    pub frontend: String,
    /// The traffic policy that applies.
    pub policy: &'static str,
    /// How many endpoints can be met through it, by clients that the policy holds to this node if it
    /// does.
    pub answering: usize,
    /// Sources that may pass; empty if all may.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source_ranges: Vec<String>,
    /// The Service that serves it instead, because it is older.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub taken_by: Option<String>,
}

/// Answers.
pub async fn list(
    config: &Config,
    filter: &Filter,
    output: Output,
) -> Result<Answer, CommandError> {
    let Gathered { state, source } = gather(config).await?;
    let node = state.node_facts().name.clone();
    let kernel = if filter.wanted { None } else { Some(NetlinkKernel::open()) };
    let (rows, kernel) = match kernel {
        None => (rows(&state, None), "not asked".to_owned()),
        Some(Ok(kernel)) => {
            let counted = counted(&state);
            let mut proxy = Proxy::new(state, kernel);
            let (differing, mut kernel) = match differing(&mut proxy) {
                Ok(differing) => (Some(differing), "asked".to_owned()),
                Err(error) => (None, format!("not asked: {error}")),
            };
            let mut rows = rows(proxy.state(), differing.as_ref());
            match counted {
                Ok(Some(counted)) => rows.iter_mut().for_each(|row| row.count(&counted)),
                Ok(None) => {}
                Err(error) => kernel = format!("{kernel}; connections not asked: {error}"),
            }
            (rows, kernel)
        }
        Some(Err(error)) => (rows(&state, None), format!("not asked: {error}")),
    };
    let listing = narrowed(rows, filter, source, node, kernel);
    let well = listing.services.iter().all(|row| row.in_kernel != Some(InKernel::Differs));
    let verdict = if well { Verdict::Good } else { Verdict::Attention };
    let text = match output {
        Output::Json => json(&listing),
        Output::Text => text::write(&listing),
    };
    Ok(Answer { text, verdict })
}

/// A daemon's own account, which does not ask the kernel.
pub(crate) fn of_daemon(state: &State, filter: &Filter, source: String, kernel: &str) -> Listing {
    narrowed(rows(state, None), filter, source, state.node_facts().name.clone(), kernel.to_owned())
}

fn narrowed(
    rows: Vec<PortRow>,
    filter: &Filter,
    source: String,
    node: String,
    kernel: String,
) -> Listing {
    let ports = rows.len();
    let services = rows.into_iter().filter(|row| filter.admits(row)).collect();
    Listing { source, node, kernel, ports, services }
}

/// The Services that a commit would change something for.
fn differing(proxy: &mut Proxy<NetlinkKernel>) -> Result<BTreeSet<NamespacedName>, LoadError> {
    let service = |(_, contributor)| match contributor {
        Some(Contributor::Service(name)) => Some(name),
        _ => None,
    };
    Ok(proxy.plan()?.into_iter().filter_map(service).collect())
}

fn rows(state: &State, differing: Option<&BTreeSet<NamespacedName>>) -> Vec<PortRow> {
    let mut rows = Vec::new();
    for service in state.services() {
        let in_kernel = differing.map(|differing| {
            if differing.contains(&service.name) { InKernel::Differs } else { InKernel::InForce }
        });
        for port in &service.ports {
            let families = Family::BOTH.into_iter().filter(|f| service.cluster_ip(*f).is_some());
            rows.extend(families.map(|family| row(state, service, port, family, in_kernel)));
        }
    }
    rows
}

fn row(
    state: &State,
    service: &Service,
    port: &ServicePort,
    family: Family,
    in_kernel: Option<InKernel>,
) -> PortRow {
    let endpoints = endpoints(state, service, port, family);
    let frontends = frontends(service, port, family).into_iter().map(|(frontend, kind)| {
        let policy = match kind {
            FrontendKind::ClusterIp => service.internal_traffic_policy,
            _ => service.external_traffic_policy,
        };
        let answers = |row: &&EndpointRow| match policy {
            TrafficPolicy::Cluster => row.serves_cluster,
            TrafficPolicy::Local => row.serves_local,
        };
        let ranges =
            service.source_ranges_of(family).filter(|_| kind == FrontendKind::LoadBalancer);
        let owner = state.owner(frontend).filter(|owner| **owner != service.name);
        FrontendRow {
            kind: kind_word(kind),
            frontend: match frontend {
                Frontend::Address(address, _, port) => SocketAddr::new(address, port).to_string(),
                Frontend::NodePort(_, _, port) => format!("*:{port}"),
            },
            policy: match policy {
                TrafficPolicy::Cluster => "Cluster",
                TrafficPolicy::Local => "Local",
            },
            answering: endpoints.iter().filter(answers).count(),
            source_ranges: ranges.map(|range| range.to_string()).collect(),
            taken_by: owner.map(ToString::to_string),
        }
    });
    PortRow {
        service: service.name.to_string(),
        port: port.name.to_string(),
        protocol: port.protocol.to_string(),
        family: match family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        },
        scheduler: scheduler_word(service.scheduler),
        affinity_seconds: match service.session_affinity {
            SessionAffinity::None => None,
            SessionAffinity::ClientIp { timeout } => Some(timeout),
        },
        in_kernel,
        connections: None,
        frontends: frontends.collect(),
        endpoints,
        of: (
            Port {
                service: service.name.clone(),
                name: port.name.clone(),
                protocol: port.protocol,
            },
            family,
        ),
    }
}

impl PortRow {
    fn count(&mut self, counted: &Counted) {
        let endpoints = counted.get(&self.of);
        // Endpoints that are gone count, too.
        self.connections = Some(endpoints.map_or(0, |all| all.values().sum()));
        for row in &mut self.endpoints {
            let found = endpoints.and_then(|all| all.get(&address_of(row.backend)));
            row.connections = Some(found.copied().unwrap_or(0));
        }
    }
}

impl Filter {
    fn admits(&self, row: &PortRow) -> bool {
        let (namespace, name) = row.service.split_once('/').unwrap_or(("", &row.service));
        let is = |wanted: &Option<String>, found: &str| {
            wanted.as_ref().is_none_or(|wanted| wanted == found)
        };
        let has = |address: IpAddr| {
            let dialled = row.frontends.iter().map(|frontend| &frontend.frontend);
            let all = dialled.chain(row.endpoints.iter().map(|endpoint| &endpoint.endpoint));
            all.filter_map(|text| text.parse::<SocketAddr>().ok()).any(|a| a.ip() == address)
        };
        is(&self.namespace, namespace) && is(&self.service, name) && self.address.is_none_or(has)
    }
}
