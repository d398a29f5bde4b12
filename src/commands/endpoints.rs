//! Every endpoint that the slices of a Service name for one of its ports, chosen or not.

use serde::Serialize;

use super::text::count;
use crate::model::{Endpoint, Family, Service, ServicePort};
use crate::nft::element::Backend;
use crate::selection::{Candidate, Selection, Uses, select};
use crate::state::State;

/// An endpoint of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "the API's own conditions, and what follows")]
pub struct EndpointRow {
    /// Address and port.
    pub endpoint: String,
    /// Condition `ready`.
    pub ready: bool,
    /// Condition `serving`.
    pub serving: bool,
    /// Condition `terminating`.
    pub terminating: bool,
    /// Whether it is on this node.
    pub local: bool,
    /// Its share of new connections, compared with others.
    pub weight: u16,
    /// Zones it is hinted for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub zones: Vec<String>,
    /// Whether clients that may reach any node can be given it.
    pub serves_cluster: bool,
    /// Whether clients that are held to this node can be given it.
    pub serves_local: bool,
    /// Connections that the kernel counted, where it counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
    #[serde(skip)]
    pub(super) backend: Backend,
}

impl EndpointRow {
    /// Its conditions in a word.
    #[must_use]
    pub fn condition(&self) -> &'static str {
        match (self.ready, self.serving, self.terminating) {
            (_, _, true) if self.serving => "terminating, serving",
            (_, _, true) => "terminating",
            (true, ..) => "ready",
            _ => "not ready",
        }
    }

    /// What an operator wants to know of it, besides its address.
    #[must_use]
    pub fn remarks(&self) -> String {
        let mut words = vec![self.condition().to_owned()];
        words.extend(self.local.then(|| "local".to_owned()));
        words.extend((self.weight != 1).then(|| format!("weight {}", self.weight)));
        words.extend((!self.zones.is_empty()).then(|| format!("zone {}", self.zones.join("+"))));
        words.extend(self.connections.map(|number| count(number, "connection")));
        words.join(", ")
    }
}

/// Which lists a port's frontends are served from when all of them are asked for.
const ALL: Uses = Uses { cluster: true, local: true };

/// The endpoints of a port in a family, sorted.
pub(super) fn endpoints(
    state: &State,
    service: &Service,
    port: &ServicePort,
    family: Family,
) -> Vec<EndpointRow> {
    let slices = state.slices_of(&service.name);
    let chosen = select(port, family, ALL, slices.iter().copied(), state.node_facts());
    let mut rows = Vec::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        let numbers =
            slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
        for number in numbers {
            rows.extend(slice.endpoints.iter().map(|e| row(e, number.port, &chosen)));
        }
    }
    // Of several mentions of one endpoint the best one counts, as in the selection.
    rows.sort_by_key(|row| (row.backend, row.terminating, !row.ready, !row.serving, !row.local));
    rows.dedup_by_key(|row| row.backend);
    rows
}

fn row(endpoint: &Endpoint, port: u16, chosen: &Selection) -> EndpointRow {
    let backend = Backend { address: endpoint.address, port };
    let is_in = |list: &[Candidate]| list.binary_search_by_key(&backend, |c| c.backend).is_ok();
    let hints = endpoint.hints.as_ref();
    EndpointRow {
        endpoint: std::net::SocketAddr::new(endpoint.address, port).to_string(),
        ready: endpoint.ready,
        serving: endpoint.serving,
        terminating: endpoint.terminating,
        local: endpoint.local,
        weight: endpoint.weight,
        zones: hints.map_or_else(Vec::new, |h| h.zones.iter().map(ToString::to_string).collect()),
        serves_cluster: is_in(&chosen.cluster),
        serves_local: is_in(&chosen.local),
        connections: None,
        backend,
    }
}
