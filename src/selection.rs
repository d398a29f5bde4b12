//! Which endpoints may answer for a Service port.
//!
//! Pure: the Service port, the slices of its Service and a family in, a sorted list out. The result
//! does not depend on the order slices arrived in, so that every node and every restart sees the
//! same list. Traffic policies and topology hints narrow this list; their inputs are in the model
//! ([`TrafficPolicy`](crate::model::TrafficPolicy), [`Hints`](crate::model::Hints)).

use crate::model::{Endpoint, EndpointSlice, Family, ServicePort};
use crate::nft::element::Backend;

/// An endpoint that may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Address and port.
    pub backend: Backend,
    /// Whether it runs on this node.
    pub local: bool,
}

/// One mention of an endpoint in a slice.
struct Mention<'a> {
    backend: Backend,
    endpoint: &'a Endpoint,
}

impl Mention<'_> {
    /// Of several mentions of one `ip:port`, the lowest rank counts: one that does not terminate
    /// before one that does (the rule of kube-proxy), then ready, serving and local ones first, so
    /// that the choice does not depend on the order of slices.
    fn rank(&self) -> [bool; 4] {
        let e = self.endpoint;
        [e.terminating, !e.ready, !e.serving, !e.local]
    }
}

/// The endpoints that new connections to the port may be sent to, sorted by address and port: all
/// that are ready; if there are none, those that are terminating but still serving.
#[must_use]
pub fn candidates<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a EndpointSlice>,
) -> Vec<Candidate> {
    let mut mentions: Vec<Mention<'_>> = Vec::new();
    for slice in slices.filter(|slice| slice.family == family) {
        let numbers = slice
            .ports
            .iter()
            .filter(|p| p.name == port.name && p.protocol == port.protocol)
            .map(|p| p.port);
        for number in numbers {
            mentions.extend(slice.endpoints.iter().map(|endpoint| Mention {
                backend: Backend { address: endpoint.address, port: number },
                endpoint,
            }));
        }
    }
    mentions.sort_unstable_by_key(|mention| (mention.backend, mention.rank()));
    mentions.dedup_by_key(|mention| mention.backend);

    let chosen = |usable: fn(&Endpoint) -> bool| -> Vec<Candidate> {
        mentions
            .iter()
            .filter(|mention| usable(mention.endpoint))
            .map(|m| Candidate { backend: m.backend, local: m.endpoint.local })
            .collect()
    };
    let ready = chosen(|endpoint| endpoint.ready);
    if ready.is_empty() {
        chosen(|endpoint| endpoint.serving && endpoint.terminating)
    } else {
        ready
    }
}
