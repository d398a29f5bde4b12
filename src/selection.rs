//! Which endpoints may answer for a Service port, and for whom.
//!
//! Pure: the Service port, its policies, the slices of its Service and the node in, two sorted lists
//! out. The result does not depend on the order slices arrived in, so that every node and every
//! restart sees the same lists. The rules are those of kube-proxy: the
//! *cluster* list serves whoever may reach any endpoint, and topology hints narrow it; the *local* list
//! serves traffic under a Local policy, which hints never touch. In either, endpoints that are
//! terminating but still serving stand in when none is ready.

use crate::model::{Endpoint, EndpointSlice, Family, Hints, NodeFacts, ServicePort};
use crate::nft::element::Backend;

/// An endpoint that may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Address and port.
    pub backend: Backend,
    /// Whether it runs on this node.
    pub local: bool,
    /// How many slots it gets.
    pub weight: u16,
}

/// Which lists the policies of a Service port ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uses {
    /// The internal policy is Cluster, or there are external frontends.
    pub cluster: bool,
    /// The internal policy is Local, or the external one is and there are external frontends.
    pub local: bool,
}

/// The endpoints of a Service port in a family; sorted by address and port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// For traffic that may reach any endpoint.
    pub cluster: Vec<Candidate>,
    /// For traffic under a Local policy.
    pub local: Vec<Candidate>,
    /// Whether anybody anywhere could answer: decides between dropping, where traffic under a Local
    /// policy should have gone to another node, and refusing.
    pub any: bool,
}

/// One mention of an endpoint in a slice.
#[derive(Clone, Copy)]
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

    /// Whether new connections may go there at all, if only for want of others.
    fn can_answer(&self) -> bool {
        self.endpoint.ready || ending(self.endpoint)
    }

    fn candidate(&self) -> Candidate {
        let Endpoint { local, weight, .. } = *self.endpoint;
        Candidate { backend: self.backend, local, weight }
    }
}

/// The endpoints that new connections to the port may be sent to.
#[must_use]
pub fn select<'a>(
    port: &ServicePort,
    family: Family,
    uses: Uses,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    node: &NodeFacts,
) -> Selection {
    let mentions = mentions(port, family, slices);
    let chosen = |usable: &dyn Fn(&Endpoint) -> bool| -> Vec<Candidate> {
        mentions.iter().filter(|m| usable(m.endpoint)).map(Mention::candidate).collect()
    };
    let first = |preferred: Vec<Candidate>, otherwise: &dyn Fn(&Endpoint) -> bool| {
        if preferred.is_empty() { chosen(otherwise) } else { preferred }
    };

    let mut selection = Selection::default();
    if uses.cluster {
        let topology = topology(&mentions, node);
        let near = chosen(&|endpoint| endpoint.ready && topology.admits(endpoint.hints.as_deref()));
        selection.cluster = first(near, &ending);
    }
    if uses.local {
        let here = chosen(&|endpoint| endpoint.local && endpoint.ready);
        selection.local = first(here, &|endpoint| endpoint.local && ending(endpoint));
    }
    selection.any =
        !selection.cluster.is_empty() || uses.local && mentions.iter().any(Mention::can_answer);
    selection
}

/// Whether anybody anywhere could answer for the port, whatever its policies are.
#[must_use]
pub fn anybody<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a EndpointSlice>,
) -> bool {
    mentions(port, family, slices).iter().any(Mention::can_answer)
}

fn ending(endpoint: &Endpoint) -> bool {
    endpoint.serving && endpoint.terminating
}

/// Every endpoint once, sorted.
fn mentions<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a EndpointSlice>,
) -> Vec<Mention<'a>> {
    let mut mentions = Vec::new();
    for slice in slices.filter(|slice| slice.family == family) {
        let numbers = slice
            .ports
            .iter()
            .filter(|p| p.name == port.name && p.protocol == port.protocol)
            .map(|p| p.port);
        for number in numbers {
            // One that is drained by its weight is as good as gone.
            let endpoints = slice.endpoints.iter().filter(|endpoint| endpoint.weight > 0);
            mentions.extend(endpoints.map(|endpoint| Mention {
                backend: Backend { address: endpoint.address, port: number },
                endpoint,
            }));
        }
    }
    mentions.sort_unstable_by_key(|mention| (mention.backend, mention.rank()));
    mentions.dedup_by_key(|mention| mention.backend);
    mentions
}

/// Which hints an endpoint must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology<'a> {
    All,
    Node(&'a str),
    Zone(&'a str),
}

impl Topology<'_> {
    fn admits(self, hints: Option<&Hints>) -> bool {
        let named = |list: &[Box<str>], name: &str| list.iter().any(|item| **item == *name);
        match self {
            Self::All => true,
            Self::Node(name) => hints.is_some_and(|hints| named(&hints.nodes, name)),
            Self::Zone(name) => hints.is_some_and(|hints| named(&hints.zones, name)),
        }
    }
}

/// Hints count only if every ready endpoint has one of the kind and at least one is for here: a
/// cluster on its way into or out of hints must not lose endpoints by it.
fn topology<'a>(mentions: &[Mention<'_>], node: &'a NodeFacts) -> Topology<'a> {
    let ready =
        || mentions.iter().filter(|m| m.endpoint.ready).map(|m| m.endpoint.hints.as_deref());
    let complete = |kind: fn(&Hints) -> &Vec<Box<str>>| {
        ready().all(|hints| hints.is_some_and(|hints| !kind(hints).is_empty()))
    };
    let for_here = |topology: Topology<'_>| ready().any(|hints| topology.admits(hints));

    let by_node = Topology::Node(&node.name);
    if complete(|hints| &hints.nodes) && for_here(by_node) {
        return by_node;
    }
    if let Some(zone) = node.zone.as_deref() {
        let by_zone = Topology::Zone(zone);
        if complete(|hints| &hints.zones) && for_here(by_zone) {
            return by_zone;
        }
    }
    Topology::All
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::model::{NamespacedName, Protocol, SlicePort};

    const BOTH: Uses = Uses { cluster: true, local: true };

    fn port() -> ServicePort {
        ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None }
    }

    fn slice(endpoints: Vec<Endpoint>) -> EndpointSlice {
        let name = NamespacedName::new("default", "web");
        let ports = vec![SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }];
        EndpointSlice {
            name: name.clone(),
            service: name,
            family: Family::V4,
            ports,
            endpoints,
            last_change_trigger: None,
        }
    }

    fn node() -> NodeFacts {
        NodeFacts { name: "n1".into(), zone: Some("z1".into()), ..NodeFacts::default() }
    }

    /// An endpoint in words: `L` local, `r` ready, `s` serving, `t` terminating, `z1` and `n1` hints.
    fn endpoint(host: u8, words: &str) -> Endpoint {
        let has = |word: &str| words.split(' ').any(|w| w == word);
        let hints = |prefix: &str| -> Vec<Box<str>> {
            let of_kind = |w: &&str| w.starts_with(prefix) && w.len() == 2;
            words.split(' ').filter(of_kind).map(Into::into).collect()
        };
        let hints = Hints { zones: hints("z"), nodes: hints("n") };
        Endpoint {
            address: Ipv4Addr::new(10, 0, 0, host).into(),
            ready: has("r"),
            serving: has("s"),
            terminating: has("t"),
            local: has("L"),
            weight: 1,
            hints: (hints != Hints::default()).then(|| Box::new(hints)),
        }
    }

    /// The last bytes of the addresses selected for cluster and local traffic, and `any`.
    fn selected(uses: Uses, words: &[&str], node: &NodeFacts) -> (Vec<u8>, Vec<u8>, bool) {
        let endpoints = (1..).zip(words).map(|(host, words)| endpoint(host, words)).collect();
        let selection = select(&port(), Family::V4, uses, [slice(endpoints)].iter(), node);
        let hosts = |list: &[Candidate]| {
            list.iter()
                .map(|candidate| match candidate.backend.address {
                    std::net::IpAddr::V4(v4) => v4.octets()[3],
                    std::net::IpAddr::V6(_) => unreachable!(),
                })
                .collect()
        };
        (hosts(&selection.cluster), hosts(&selection.local), selection.any)
    }

    #[test]
    fn the_lists_are_those_of_the_compatibility_reference() {
        // (endpoints, cluster, local, any); the numbers are rows of `tests/scenario-comparison.md`.
        type Case<'a> = (&'a [&'a str], &'a [u8], &'a [u8], bool);
        let cases: &[Case<'_>] = &[
            (&["L r s", "r s"], &[1, 2], &[1], true),    // 1, 26, 57
            (&["L", "s"], &[], &[], false),              // 20
            (&["s t", "t"], &[1], &[], true),            // 21
            (&["s t", "r s"], &[2], &[], true),          // 22
            (&["t"], &[], &[], false),                   // 23
            (&["L r s t"], &[1], &[1], true),            // 25
            (&["r s"], &[1], &[], true),                 // 29, 58
            (&[], &[], &[], false),                      // 31, 68
            (&["L s t", "r s"], &[2], &[1], true),       // 32, 66
            (&["L s", "r s"], &[2], &[], true),          // 33
            (&["r z1", "r z2"], &[1], &[], true),        // 35
            (&["r z1", "r"], &[1, 2], &[], true),        // 36
            (&["r z2", "r z3"], &[1, 2], &[], true),     // 37
            (&["r n1 z2", "r n2 z1"], &[1], &[], true),  // 39
            (&["r n2 z2", "r n3 z1"], &[2], &[], true),  // 40
            (&["z1", "r z2"], &[2], &[], true),          // 41
            (&["s t z1", "s t z2"], &[1, 2], &[], true), // 42
            (&["L r z2", "r z1"], &[2], &[1], true),     // 44
        ];
        for (words, cluster, local, any) in cases {
            let found = selected(BOTH, words, &node());
            assert_eq!(found, (cluster.to_vec(), local.to_vec(), *any), "{words:?}");
        }
        let no_zone = NodeFacts { zone: None, ..node() };
        assert_eq!(selected(BOTH, &["r z1", "r z2"], &no_zone).0, [1, 2]); // 38
    }

    #[test]
    fn lists_that_no_policy_uses_stay_empty() {
        let local = Uses { cluster: false, local: true };
        assert_eq!(selected(local, &["r s"], &node()), (vec![], vec![], true));
        let cluster = Uses { cluster: true, local: false };
        assert_eq!(selected(cluster, &["L r s"], &node()), (vec![1], vec![], true));
    }

    #[test]
    fn a_second_mention_that_terminates_does_not_count() {
        let [gone, there] = [endpoint(1, "s t"), endpoint(1, "L r s")];
        for pair in [[gone.clone(), there.clone()], [there.clone(), gone.clone()]] {
            let slices = pair.map(|endpoint| slice(vec![endpoint]));
            let selection = select(&port(), Family::V4, BOTH, slices.iter(), &node());
            assert_eq!(selection.cluster.len(), 1);
            assert!(selection.cluster[0].local);
        }
    }

    #[test]
    fn of_two_mentions_the_one_that_is_better_off_counts() {
        let cases = [("", "r"), ("s", "r"), ("t", "s t"), ("s t", "r"), ("r", "L r"), ("r t", "r")];
        for (worse, better) in cases {
            let [worse, better] = [worse, better].map(|words| endpoint(1, words));
            let alone = [slice(vec![better.clone()])];
            let expected = select(&port(), Family::V4, BOTH, alone.iter(), &node());
            assert!(expected.any, "{better:?}");
            for pair in [[&worse, &better], [&better, &worse]] {
                let slices = pair.map(|endpoint| slice(vec![endpoint.clone()]));
                let found = select(&port(), Family::V4, BOTH, slices.iter(), &node());
                assert_eq!(found, expected, "{pair:?}");
            }
        }
    }

    #[test]
    fn an_endpoint_drained_by_its_weight_is_as_good_as_gone() {
        let drained = Endpoint { weight: 0, ..endpoint(1, "L r s") };
        let slices = [slice(vec![drained, endpoint(2, "r s")])];
        let found = select(&port(), Family::V4, BOTH, slices.iter(), &node());
        assert_eq!((found.cluster.len(), found.local.len()), (1, 0));
        assert!(!anybody(&port(), Family::V4, [slice(vec![])].iter()));
    }

    proptest! {
        #[test]
        fn a_usable_endpoint_is_never_overlooked(
            flags in proptest::collection::vec(any::<[bool; 6]>(), 0..6)
        ) {
            let endpoints: Vec<Endpoint> = (1..).zip(&flags).map(|(host, flags)| {
                let words = ["L", "r", "s", "t", "z1", "n1"];
                let words: Vec<_> = words.iter().zip(flags).filter(|(_, on)| **on).map(|(w, _)| *w).collect();
                endpoint(host, &words.join(" "))
            }).collect();
            let usable = |e: &&Endpoint| e.ready || e.serving && e.terminating;
            let found = select(&port(), Family::V4, BOTH, [slice(endpoints.clone())].iter(), &node());
            prop_assert_eq!(found.any, endpoints.iter().any(|e| usable(&e)));
            prop_assert_eq!(found.cluster.is_empty(), !found.any);
            prop_assert_eq!(
                found.local.is_empty(),
                !endpoints.iter().filter(usable).any(|e| e.local)
            );
            for candidate in found.cluster.iter().chain(&found.local) {
                let e = endpoints.iter().find(|e| e.address == candidate.backend.address).unwrap();
                prop_assert!(usable(&e));
            }
        }
    }
}
