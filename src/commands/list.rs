//! `nftproxy list`: every Service port with what is dialled, the policies, and who answers.
//!
//! As terse as `ipvsadm -Ln`, with names. It says what the objects ask for, and, where the kernel can
//! be asked, whether the kernel holds that.

mod text;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::endpoints::{EndpointRow, endpoints};
use super::explain::{kind_word, scheduler_word};
use super::objects::gather;
use super::{Answer, CommandError, Output, Verdict, json};
use crate::config::Config;
use crate::contribution::Contributor;
use crate::frontend::{Frontend, FrontendKind, frontends};
use crate::model::{Family, Service, ServicePort, SessionAffinity, TrafficPolicy};
use crate::nft::fake::FakeKernel;
use crate::nft::kernel::{Kernel, LoadError};
use crate::nft::netlink::NetlinkKernel;
use crate::nft::transaction::Op;
use crate::reconcile::Proxy;
use crate::state::State;

/// Which Services to list; what is not given does not narrow.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Their namespace.
    pub namespace: Option<String>,
    /// Their name.
    pub service: Option<String>,
    /// An address that they are dialled on, or that one of their endpoints has.
    pub address: Option<IpAddr>,
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
    /// What is dialled.
    pub frontends: Vec<FrontendRow>,
    /// Who could answer, and who cannot.
    pub endpoints: Vec<EndpointRow>,
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
    let state = gather(config).await?;
    let (state, differing, kernel) = match NetlinkKernel::open() {
        Ok(kernel) => {
            let mut proxy = Proxy::new(state, kernel);
            match differing(&mut proxy) {
                Ok(differing) => (proxy, Some(differing), "asked".to_owned()).into_parts(),
                Err(error) => (proxy, None, format!("not asked: {error}")).into_parts(),
            }
        }
        Err(error) => {
            let proxy = Proxy::new(state, FakeKernel::default());
            (proxy, None, format!("not asked: {error}")).into_parts()
        }
    };
    let mut rows: Vec<PortRow> =
        state.services().flat_map(|service| rows(&state, service, differing.as_ref())).collect();
    let ports = rows.len();
    rows.retain(|row| filter.admits(row));
    let well = rows.iter().all(|row| row.in_kernel != Some(InKernel::Differs));
    let listing = Listing {
        source: config.source.to_string(),
        node: config.node_name.clone(),
        kernel,
        ports,
        services: rows,
    };
    let verdict = if well { Verdict::Good } else { Verdict::Attention };
    let text = match output {
        Output::Json => json(&listing),
        Output::Text => text::write(&listing),
    };
    Ok(Answer { text, verdict })
}
