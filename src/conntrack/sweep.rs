//! What to look for among the flows, and the judgement on one of them.
//!
//! The rule is that of kube-proxy: a flow to a frontend stays while the
//! endpoint that answers it is serving, whatever policies would choose for a new flow now. Beyond it,
//! flows of a frontend that lost all its endpoints are stale as well, those of node ports included;
//! and a node port is one on an address it is served on, so that a pod's flow to the same port
//! number of a foreign host stays.

use std::collections::btree_map::{BTreeMap, Entry};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::frontend::Frontend;
use crate::model::{Family, NamespacedName, Protocol};

/// One direction of a flow, as its packets look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Where they come from.
    pub source: SocketAddr,
    /// Where they go.
    pub destination: SocketAddr,
}

/// An entry of the kernel's connection tracking table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The protocol number of the IP header.
    pub protocol: u8,
    /// The tracking zone; 0 is the only one our rules see.
    pub zone: u16,
    /// As the client sends: its destination is what was dialled.
    pub original: Tuple,
    /// As the answers come: their source is the endpoint, or what was dialled if nothing was
    /// translated. It is filled in from the first packet on, answered or not.
    pub reply: Tuple,
    /// The kernel's own mark of this entry, to tell it from a later one between the same ends.
    pub id: Option<u32>,
}

/// Who may answer a frontend: sorted, each once. Made by [`endpoints`].
pub type Endpoints = Arc<[SocketAddr]>;

/// Endpoints in any order.
pub fn endpoints(list: impl IntoIterator<Item = SocketAddr>) -> Endpoints {
    let mut list: Vec<_> = list.into_iter().collect();
    list.sort_unstable();
    list.dedup();
    list.into()
}

/// Addresses of the node on which node ports are served.
pub type NodePortAddresses = Arc<[IpAddr]>;

/// How a frontend stands since the commit.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Standing {
    /// It is ours, and these may answer; perhaps nobody.
    Served(Endpoints),
    /// It is nobody's: what we translated is stale, what was never translated is not our business.
    Gone,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Item {
    /// For the log; not known for what an earlier run left.
    service: Option<NamespacedName>,
    standing: Standing,
    /// Whether flows may be stale by it, or it only has to be known to a sweep that came before.
    sought: bool,
}

impl Item {
    fn is_stale(&self, flow: &Flow) -> bool {
        let answering = flow.reply.source;
        match &self.standing {
            Standing::Served(by) => by.binary_search(&answering).is_err(),
            Standing::Gone => answering != flow.original.destination,
        }
    }
}

/// The UDP frontends whose flows may be stale, and how each stands now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    frontends: BTreeMap<Frontend, Item>,
    node_port_addresses: NodePortAddresses,
}

/// What the kernel can leave out of a listing beforehand: UDP flows of a family, to one address or
/// port if all frontends share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The family.
    pub family: Family,
    /// The address dialled.
    pub address: Option<IpAddr>,
    /// The port dialled.
    pub port: Option<u16>,
}

impl Sweep {
    /// Nothing to look for yet.
    #[must_use]
    pub fn new(node_port_addresses: NodePortAddresses) -> Self {
        Self { frontends: BTreeMap::new(), node_port_addresses }
    }

    /// Flows to a frontend that none of these answers are stale. Frontends of other protocols than
    /// UDP are ignored.
    pub fn served(&mut self, frontend: Frontend, service: &NamespacedName, by: Endpoints) {
        self.set(frontend, Some(service.clone()), Standing::Served(by), true);
    }

    /// The endpoints of a frontend changed so that no flow is stale by it. A sweep that waits or runs
    /// has to know, or it would take flows to the new ones for stale.
    pub fn amended(&mut self, frontend: Frontend, service: &NamespacedName, by: Endpoints) {
        self.set(frontend, Some(service.clone()), Standing::Served(by), false);
    }

    /// Flows that were translated at this frontend are stale.
    pub fn gone(&mut self, frontend: Frontend, service: Option<&NamespacedName>) {
        self.set(frontend, service.cloned(), Standing::Gone, true);
    }

    fn set(
        &mut self,
        frontend: Frontend,
        service: Option<NamespacedName>,
        standing: Standing,
        sought: bool,
    ) {
        let (Frontend::Address(_, protocol, _) | Frontend::NodePort(_, protocol, _)) = frontend;
        if protocol == Protocol::Udp {
            self.put(frontend, Item { service, standing, sought });
        }
    }

    fn put(&mut self, frontend: Frontend, mut item: Item) {
        match self.frontends.entry(frontend) {
            Entry::Vacant(vacant) => drop(vacant.insert(item)),
            Entry::Occupied(mut before) => {
                item.sought |= before.get().sought;
                before.insert(item);
            }
        }
    }

    /// Whether it says nothing at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty()
    }

    /// How many frontends there are whose flows have to be looked at.
    #[must_use]
    pub fn sought(&self) -> usize {
        self.frontends.values().filter(|item| item.sought).count()
    }

    /// Takes in a later sweep: of a frontend in both, how it stands last matters.
    pub fn merge(&mut self, later: Self) {
        for (frontend, item) in later.frontends {
            self.put(frontend, item);
        }
        self.node_port_addresses = later.node_port_addresses;
    }

    /// Adds what an earlier sweep, which failed, still has to find.
    pub fn merge_earlier(&mut self, mut earlier: Self) {
        if !self.is_empty() {
            earlier.merge(std::mem::take(self));
        }
        *self = earlier;
    }

    /// Drops what only a sweep before this one had to know.
    pub fn forget_amendments(&mut self) {
        self.frontends.retain(|_, item| item.sought);
    }

    /// The narrowest filter that lets pass every flow of a family that may be stale; None if there is
    /// nothing to look for in it.
    #[must_use]
    pub fn filter(&self, family: Family) -> Option<Filter> {
        let sought = self.frontends.iter().filter(|(_, item)| item.sought);
        let dialled = sought.filter_map(|(frontend, _)| match *frontend {
            Frontend::Address(address, _, port) => {
                (Family::of(address) == family).then_some((Some(address), port))
            }
            Frontend::NodePort(f, _, port) => (f == family).then_some((None, port)),
        });
        dialled.map(|(address, port)| Filter { family, address, port: Some(port) }).reduce(
            |one, other| Filter {
                family,
                address: one.address.filter(|_| one.address == other.address),
                port: one.port.filter(|_| one.port == other.port),
            },
        )
    }

    /// Whose stale flow this is; None if it is to stay.
    #[must_use]
    pub fn stale(&self, flow: &Flow) -> Option<Culprit<'_>> {
        if flow.protocol != Protocol::Udp.number() || flow.zone != 0 {
            return None;
        }
        let dialled = flow.original.destination;
        let (address, port) = (dialled.ip(), dialled.port());
        // As in the table: the address and port first, the node port second.
        let at_address = Frontend::Address(address, Protocol::Udp, port);
        let (frontend, item) = self.frontends.get_key_value(&at_address).or_else(|| {
            let node_port = Frontend::NodePort(Family::of(address), Protocol::Udp, port);
            let found = self.frontends.get_key_value(&node_port)?;
            self.node_port_addresses.contains(&address).then_some(found)
        })?;
        let stale = item.sought && item.is_stale(flow);
        stale.then_some(Culprit { frontend, service: item.service.as_ref() })
    }

    /// Whether this later sweep says that a flow is to stay which an earlier one called stale.
    #[must_use]
    pub fn acquits(&self, flow: &Flow, culprit: Culprit<'_>) -> bool {
        self.frontends.get(culprit.frontend).is_some_and(|item| !item.is_stale(flow))
    }
}

/// Where a stale flow was going.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Culprit<'a> {
    /// Its Service, if known.
    pub service: Option<&'a NamespacedName>,
    /// What was dialled.
    pub frontend: &'a Frontend,
}

/// The name in the log: the Service, or else what was dialled.
impl std::fmt::Display for Culprit<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.service {
            Some(service) => service.fmt(f),
            None => self.frontend.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VIP: &str = "10.96.0.10:53";

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn name() -> NamespacedName {
        NamespacedName::new("kube-system", "dns")
    }

    fn frontend(text: &str) -> Frontend {
        Frontend::Address(at(text).ip(), Protocol::Udp, at(text).port())
    }

    fn node_port(port: u16) -> Frontend {
        Frontend::NodePort(Family::V4, Protocol::Udp, port)
    }

    /// A UDP flow of one client, by what was dialled and who answers.
    fn flow(dialled: &str, answering: &str) -> Flow {
        let client = at("10.244.1.6:40000");
        Flow {
            protocol: 17,
            zone: 0,
            original: Tuple { source: client, destination: at(dialled) },
            reply: Tuple { source: at(answering), destination: client },
            id: Some(7),
        }
    }

    fn sweep() -> Sweep {
        Sweep::new(Arc::new([at("192.0.2.10:0").ip()]))
    }

    #[test]
    fn a_flow_stays_while_its_endpoint_serves() {
        let mut sweep = sweep();
        sweep.served(frontend(VIP), &name(), endpoints([at("10.244.1.5:53")]));
        assert_eq!(sweep.stale(&flow(VIP, "10.244.1.5:53")), None);
        for stale in ["10.244.1.7:53", "10.244.1.5:54", VIP] {
            let culprit = sweep.stale(&flow(VIP, stale)).expect(stale);
            assert_eq!(culprit.to_string(), "kube-system/dns");
        }
        // Not dialled here, whoever answers.
        assert_eq!(sweep.stale(&flow("10.96.0.10:54", "10.244.1.7:53")), None);
        assert_eq!(sweep.stale(&flow("10.96.0.11:53", "10.244.1.7:53")), None);
        // A zone of someone else's.
        assert_eq!(sweep.stale(&Flow { zone: 3, ..flow(VIP, "10.244.1.7:53") }), None);
    }

    #[test]
    fn without_endpoints_every_flow_is_stale() {
        let mut sweep = sweep();
        sweep.served(frontend(VIP), &name(), endpoints([]));
        sweep.served(node_port(30053), &name(), endpoints([]));
        for (dialled, answering) in [
            (VIP, "10.244.1.5:53"),
            (VIP, VIP),
            ("192.0.2.10:30053", "10.244.1.5:53"),
            ("192.0.2.10:30053", "192.0.2.10:30053"),
        ] {
            assert!(sweep.stale(&flow(dialled, answering)).is_some(), "{dialled} {answering}");
        }
    }

    #[test]
    fn of_a_frontend_that_is_gone_only_translated_flows_are_stale() {
        let mut sweep = sweep();
        sweep.gone(frontend(VIP), None);
        sweep.gone(node_port(30053), Some(&name()));
        let culprit = sweep.stale(&flow(VIP, "10.244.1.5:53")).unwrap();
        assert_eq!(culprit.to_string(), "10.96.0.10:53/udp");
        assert!(sweep.stale(&flow("192.0.2.10:30053", "10.244.1.5:53")).is_some());
        assert_eq!(sweep.stale(&flow(VIP, VIP)), None);
        assert_eq!(sweep.stale(&flow("192.0.2.10:30053", "192.0.2.10:30053")), None);
    }

    #[test]
    fn a_node_port_is_one_on_its_addresses_and_behind_a_frontend_with_an_address() {
        let mut sweep = sweep();
        sweep.served(node_port(30053), &name(), endpoints([at("10.244.1.5:53")]));
        sweep.served(frontend("192.0.2.10:30054"), &name(), endpoints([at("10.244.1.6:53")]));
        sweep.served(node_port(30054), &name(), endpoints([at("10.244.1.5:53")]));
        assert!(sweep.stale(&flow("192.0.2.10:30053", "10.244.1.7:53")).is_some());
        assert_eq!(sweep.stale(&flow("192.0.2.10:30053", "10.244.1.5:53")), None);
        // A pod's flow to a host somewhere; another address of the node.
        assert_eq!(sweep.stale(&flow("198.51.100.1:30053", "198.51.100.1:30053")), None);
        assert_eq!(sweep.stale(&flow("192.0.2.11:30053", "10.244.1.7:53")), None);
        assert_eq!(sweep.stale(&flow("192.0.2.10:30054", "10.244.1.6:53")), None);
        assert!(sweep.stale(&flow("192.0.2.10:30054", "10.244.1.5:53")).is_some());
    }

    #[test]
    fn the_filter_is_as_narrow_as_the_frontends_allow() {
        let of = |frontends: &[Frontend]| {
            let mut sweep = sweep();
            for &frontend in frontends {
                sweep.served(frontend, &name(), endpoints([]));
            }
            sweep.filter(Family::V4).map(|f| (f.address.is_some(), f.port))
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[frontend("[fd00::1]:53")]), None);
        assert_eq!(of(&[frontend(VIP)]), Some((true, Some(53))));
        assert_eq!(of(&[frontend(VIP), frontend("10.96.0.10:54")]), Some((true, None)));
        assert_eq!(of(&[frontend(VIP), frontend("10.96.0.11:53")]), Some((false, Some(53))));
        assert_eq!(of(&[frontend(VIP), node_port(53)]), Some((false, Some(53))));
        assert_eq!(of(&[frontend(VIP), node_port(30053)]), Some((false, None)));
        // In whatever order they disagree and agree again.
        let three = [frontend(VIP), frontend("10.96.0.11:54"), frontend(VIP)];
        assert_eq!(of(&three), Some((false, None)));
    }

    #[test]
    fn of_merged_sweeps_the_latest_word_counts() {
        let (early, late) = (endpoints([at("10.244.1.5:53")]), endpoints([at("10.244.1.6:53")]));
        let mut first = sweep();
        first.served(frontend(VIP), &name(), early);
        first.gone(frontend("10.96.0.11:53"), None);
        let mut second = Sweep::default();
        second.served(frontend(VIP), &name(), late);
        let mut forwards = first.clone();
        forwards.merge(second.clone());
        let mut backwards = second;
        backwards.merge_earlier(first.clone());
        assert_eq!(forwards, backwards);
        assert_eq!(forwards.sought(), 2);
        assert_eq!(forwards.stale(&flow(VIP, "10.244.1.6:53")), None);
        assert!(forwards.stale(&flow(VIP, "10.244.1.5:53")).is_some());
        // An endpoint that was only added is not looked for, but it is known to those before.
        let mut amendment = sweep();
        amendment.amended(frontend(VIP), &name(), endpoints([at("10.244.1.7:53")]));
        amendment.amended(frontend("10.96.0.12:53"), &name(), endpoints([]));
        assert_eq!((amendment.sought(), amendment.filter(Family::V4)), (0, None));
        let added = flow(VIP, "10.244.1.7:53");
        let culprit = first.stale(&added).expect("the earlier sweep does not know it");
        assert!(amendment.acquits(&added, culprit));
        assert!(!amendment.acquits(&flow(VIP, "10.244.1.9:53"), culprit));
        forwards.merge(amendment.clone());
        assert_eq!(forwards.stale(&added), None);
        assert!(forwards.stale(&flow(VIP, "10.244.1.6:53")).is_some());
        assert_eq!(forwards.stale(&flow("10.96.0.12:53", "10.244.1.6:53")), None);
        forwards.forget_amendments();
        assert_eq!(forwards.sought(), 2);
        amendment.forget_amendments();
        assert!(amendment.is_empty());
        // A failed sweep that nothing came after is the same as before.
        let mut nothing = Sweep::default();
        nothing.merge_earlier(first.clone());
        assert_eq!(nothing, first);
    }

    fn addresses() -> impl Strategy<Value = SocketAddr> {
        let hosts = prop::sample::select(vec!["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"]);
        (hosts, 1_u16..4).prop_map(|(host, port)| SocketAddr::new(host.parse().unwrap(), port))
    }

    prop_compose! {
        fn flows()(
            protocol in prop::sample::select(vec![1_u8, 6, 17, 132]),
            zone in 0_u16..2,
            ends in [addresses(), addresses(), addresses(), addresses()],
        ) -> Flow {
            let [a, b, c, d] = ends;
            let original = Tuple { source: a, destination: b };
            Flow { protocol, zone, original, reply: Tuple { source: c, destination: d }, id: None }
        }
    }

    prop_compose! {
        fn sweeps()(
            parts in prop::collection::vec(
                (
                    addresses(),
                    any::<bool>(),
                    prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp]),
                    prop::option::of(prop::collection::vec(addresses(), 0..4)),
                ),
                0..8,
            ),
            node in prop::collection::vec(addresses(), 0..2),
        ) -> Sweep {
            let node = node.into_iter().map(|a| a.ip()).collect();
            let mut sweep = Sweep::new(node);
            for (address, by_node_port, protocol, by) in parts {
                let frontend = if by_node_port {
                    Frontend::NodePort(Family::of(address.ip()), protocol, address.port())
                } else {
                    Frontend::Address(address.ip(), protocol, address.port())
                };
                match by {
                    Some(by) => sweep.served(frontend, &name(), endpoints(by)),
                    None => sweep.gone(frontend, None),
                }
            }
            sweep
        }
    }

    proptest! {
        #[test]
        fn only_udp_flows_in_our_zone_to_a_swept_frontend_are_ever_stale(
            sweep in sweeps(),
            flow in flows(),
        ) {
            if let Some(culprit) = sweep.stale(&flow) {
                prop_assert_eq!((flow.protocol, flow.zone), (17, 0));
                let dialled = flow.original.destination;
                let port = match *culprit.frontend {
                    Frontend::Address(address, Protocol::Udp, port) => {
                        prop_assert_eq!(address, dialled.ip());
                        port
                    }
                    Frontend::NodePort(family, Protocol::Udp, port) => {
                        prop_assert_eq!(family, Family::of(dialled.ip()));
                        port
                    }
                    other => panic!("{other}"),
                };
                prop_assert_eq!(port, dialled.port());
                // The kernel's filter must not hide it.
                let filter = sweep.filter(Family::of(dialled.ip())).unwrap();
                prop_assert!(filter.address.is_none_or(|address| address == dialled.ip()));
                prop_assert!(filter.port.is_none_or(|port| port == dialled.port()));
            }
        }

        #[test]
        fn merging_is_associative(sweeps in [sweeps(), sweeps(), sweeps()]) {
            let [a, b, c] = sweeps;
            let mut left = a.clone();
            left.merge(b.clone());
            left.merge(c.clone());
            let mut right = b;
            right.merge(c);
            right.merge_earlier(a);
            prop_assert_eq!(left.frontends, right.frontends);
        }
    }
}
