//! Whose connections the kernel counted: from pairs of addresses to Service ports and endpoints.
//!
//! The kernel's counters begin when a pair is first seen, end an hour after its last connection, and
//! are gone with a table that is replaced. What is told of them only grows: each reading is compared
//! with the one before, and a counter that is less than it was has begun anew. What was counted before
//! this began is not told, so that a restart does not tell again what the run before told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use crate::frontend::{Frontend, Frontends, frontends};
use crate::model::{EndpointSlice, Family, NamespacedName, Protocol, Service};
use crate::nft::connection::{Connection, Counters};
use crate::nft::element::Backend;

/// How many endpoints are told one by one; each is a time series. Connections of further ones still
/// count for their Service ports.
pub const MAX_ENDPOINTS: usize = 20_000;

/// How much is remembered of readings that were not complete: each can bring other pairs, and Services
/// come and go meanwhile. Both families' sets are full with half as many.
const MAX_REMEMBERED: usize = 1 << 18;

/// A port of a Service, of both families.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    /// The Service.
    pub service: NamespacedName,
    /// Name of the port; empty if it has none.
    pub name: Box<str>,
    /// Its protocol.
    pub protocol: Protocol,
}

/// An endpoint of a port.
pub type Endpoint = (Arc<Port>, SocketAddr);

/// What a Service port is dialled by, and who may answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// The port.
    pub port: Arc<Port>,
    /// The frontends that the Service owns.
    pub frontends: Vec<Frontend>,
    /// Every endpoint that slices name, whether it is chosen or not.
    pub endpoints: BTreeSet<SocketAddr>,
}

/// The ports of a Service.
#[must_use]
pub fn served(service: &Service, slices: &[&EndpointSlice], owners: &Frontends) -> Vec<Served> {
    let of_port = |port: &crate::model::ServicePort| {
        let all = Family::BOTH.into_iter().flat_map(|family| frontends(service, port, family));
        let own = |frontend: &Frontend| owners.owner(*frontend) == Some(&service.name);
        let endpoints = slices.iter().flat_map(|slice| {
            let numbers =
                slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
            numbers.flat_map(|p| slice.endpoints.iter().map(|e| SocketAddr::new(e.address, p.port)))
        });
        Served {
            port: Arc::new(Port {
                service: service.name.clone(),
                name: port.name.clone(),
                protocol: port.protocol,
            }),
            frontends: all.map(|(frontend, _)| frontend).filter(own).collect(),
            endpoints: endpoints.collect(),
        }
    };
    service.ports.iter().map(of_port).collect()
}

/// What is served, and what was read last.
#[derive(Debug, Default)]
pub struct Connections {
    services: BTreeMap<NamespacedName, Vec<Served>>,
    owners: HashMap<Frontend, Arc<Port>>,
    /// Frontends that went since the last reading: what was counted for them before belongs to them.
    former: HashMap<Frontend, Arc<Port>>,
    /// The last reading. None until there was one, if there may have been counters before.
    seen: Option<HashMap<Connection, u64>>,
    /// The sets that it is of.
    sets: [Option<(u64, u64)>; 2],
    told: BTreeSet<Endpoint>,
    told_ports: BTreeSet<Arc<Port>>,
}

/// What a reading brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// New connections of Service ports.
    pub ports: BTreeMap<Arc<Port>, u64>,
    /// The same of their endpoints, as far as those are told.
    pub endpoints: BTreeMap<Endpoint, u64>,
    /// Ports that do not exist any more.
    pub gone_ports: Vec<Arc<Port>>,
    /// Endpoints that do not exist any more, an hour after their last connection.
    pub gone_endpoints: Vec<Endpoint>,
    /// Endpoints that had connections and are not told, because others are.
    pub left_out: usize,
    /// New connections to what no Service serves: other programs translate, too.
    pub foreign: u64,
}

impl Connections {
    /// Nothing is served yet. `before` are the counters that there are; None if that is not known.
    #[must_use]
    pub fn new(before: Option<&Counters>) -> Self {
        let mut this = Self::default();
        if let Some(before) = before {
            this.seen = Some(HashMap::new());
            this.remember(before);
        }
        this
    }

    fn remember(&mut self, counters: &Counters) {
        let seen = self.seen.get_or_insert_default();
        if counters.complete {
            seen.clear();
        }
        seen.extend(counters.connections.iter().copied());
        self.sets = counters.sets.map(|set| set.map(|set| set.handle));
    }

    /// A Service has these ports now; none if it is gone.
    pub fn serve(&mut self, service: &NamespacedName, served: Vec<Served>) {
        let before = self.services.remove(service).unwrap_or_default();
        for Served { port, frontends, .. } in before {
            for frontend in frontends {
                // Another Service may own it by now.
                if self.owners.get(&frontend).is_some_and(|owner| owner.service == *service) {
                    self.owners.remove(&frontend);
                    self.former.insert(frontend, port.clone());
                }
            }
        }
        for Served { port, frontends, .. } in &served {
            self.owners.extend(frontends.iter().map(|frontend| (*frontend, port.clone())));
        }
        if !served.is_empty() {
            self.services.insert(service.clone(), served);
        }
    }

    /// The Service port that a connection was made to, as the tables dispatch it: by the address that
    /// was dialled, else as a node port.
    #[must_use]
    pub fn port_of<'a>(&'a self, connection: &Connection) -> Option<&'a Arc<Port>> {
        let Connection { address, protocol, port, .. } = *connection;
        let dialled = [
            Frontend::Address(address, protocol, port),
            Frontend::NodePort(Family::of(address), protocol, port),
        ];
        let of = |owners: &'a HashMap<Frontend, Arc<Port>>| {
            dialled.iter().find_map(|frontend| owners.get(frontend))
        };
        of(&self.owners).or_else(|| of(&self.former))
    }

    /// Takes in a reading.
    pub fn read(&mut self, counters: &Counters) -> Reading {
        let mut reading = Reading::default();
        let mut left_out = BTreeSet::new();
        if self.seen.is_none() {
            if counters.complete {
                self.remember(counters);
            }
            return reading;
        }
        let sets = counters.sets.map(|set| set.map(|set| set.handle));
        let mut alive = BTreeSet::new();
        for (connection, count) in &counters.connections {
            let number = usize::from(Family::of(connection.address) == Family::V6);
            let same = self.sets[number] == sets[number];
            let seen = self.seen.as_ref().filter(|_| same).and_then(|seen| seen.get(connection));
            let new = count - seen.filter(|before| *before <= count).unwrap_or(&0);
            let Some(port) = self.port_of(connection).cloned() else {
                reading.foreign += new;
                continue;
            };
            let endpoint = (port, address_of(connection.backend));
            if new > 0 {
                *reading.ports.entry(endpoint.0.clone()).or_default() += new;
                if self.told.contains(&endpoint) || self.told.len() < MAX_ENDPOINTS {
                    self.told.insert(endpoint.clone());
                    *reading.endpoints.entry(endpoint.clone()).or_default() += new;
                } else {
                    left_out.insert(endpoint.clone());
                }
            }
            alive.insert(endpoint);
        }
        reading.left_out = left_out.len();
        self.told_ports.extend(reading.ports.keys().cloned());
        for (family, same) in Family::BOTH.into_iter().zip([0, 1].map(|n| self.sets[n] == sets[n]))
        {
            // What a reading that is not complete leaves standing is of the old set.
            if !same && let Some(seen) = &mut self.seen {
                seen.retain(|connection, _| Family::of(connection.address) != family);
            }
        }
        self.remember(counters);
        if counters.complete {
            self.former.clear();
            self.forget(&alive, &mut reading);
        } else {
            self.limit(MAX_REMEMBERED);
        }
        let Self { services, told_ports, .. } = self;
        told_ports.retain(|port| {
            let stays = served_by(services, port).is_some();
            if !stays {
                reading.gone_ports.push(port.clone());
            }
            stays
        });
        reading
    }

    /// Lets go of what has become too much. What is not known is told from the next reading on.
    fn limit(&mut self, most: usize) {
        if self.former.len() > most {
            self.former.clear();
        }
        if self.seen.as_ref().is_some_and(|seen| seen.len() > most) {
            self.seen = None;
        }
    }

    /// Lets go of endpoints that are no more.
    fn forget(&mut self, alive: &BTreeSet<Endpoint>, reading: &mut Reading) {
        let Self { services, told, .. } = self;
        told.retain(|endpoint| {
            let (port, address) = endpoint;
            let stays = served_by(services, port)
                .is_some_and(|s| s.endpoints.contains(address) || alive.contains(endpoint));
            if !stays {
                reading.gone_endpoints.push(endpoint.clone());
            }
            stays
        });
    }
}

fn served_by<'a>(
    services: &'a BTreeMap<NamespacedName, Vec<Served>>,
    port: &Port,
) -> Option<&'a Served> {
    services.get(&port.service)?.iter().find(|served| *served.port == *port)
}

/// An endpoint as it is written.
#[must_use]
pub fn address_of(backend: Backend) -> SocketAddr {
    SocketAddr::new(backend.address, backend.port)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nft::connection::CounterSet;

    fn name(text: &str) -> NamespacedName {
        NamespacedName::new("default", text)
    }

    fn port(service: &str) -> Arc<Port> {
        let protocol = Protocol::Tcp;
        Arc::new(Port { service: name(service), name: "http".into(), protocol })
    }

    fn at(host: u8) -> SocketAddr {
        SocketAddr::new([10, 244, 1, host].into(), 8080)
    }

    /// A Service with the ClusterIP 10.96.0.`ip`, the node port 30000 + `ip`, and these endpoints.
    fn service(service: &str, ip: u8, hosts: &[u8]) -> Vec<Served> {
        let frontends = vec![
            Frontend::Address([10, 96, 0, ip].into(), Protocol::Tcp, 80),
            Frontend::NodePort(Family::V4, Protocol::Tcp, 30000 + u16::from(ip)),
        ];
        let endpoints = hosts.iter().copied().map(at).collect();
        vec![Served { port: port(service), frontends, endpoints }]
    }

    fn dialled(address: [u8; 4], port: u16, host: u8) -> Connection {
        let backend = Backend { address: at(host).ip(), port: 8080 };
        Connection { address: address.into(), protocol: Protocol::Tcp, port, backend }
    }

    fn to(ip: u8, host: u8) -> Connection {
        dialled([10, 96, 0, ip], 80, host)
    }

    fn all(connections: &[(Connection, u64)]) -> Counters {
        of_set(1, connections)
    }

    fn of_set(handle: u64, connections: &[(Connection, u64)]) -> Counters {
        let set = CounterSet { handle: (handle, 1), pairs: connections.len() };
        Counters { connections: connections.to_vec(), sets: [Some(set), None], complete: true }
    }

    fn some(connections: &[(Connection, u64)]) -> Counters {
        Counters { complete: false, ..all(connections) }
    }

    #[test]
    fn connections_are_told_of_the_port_that_was_dialled_and_of_who_answered() {
        let mut connections = Connections::new(Some(&all(&[])));
        connections.serve(&name("web"), service("web", 1, &[5, 6]));
        connections.serve(&name("api"), service("api", 2, &[5]));
        let node_port = dialled([192, 0, 2, 10], 30001, 5);
        let host_port = dialled([192, 0, 2, 10], 8080, 5);
        let counters =
            [(to(1, 5), 3), (to(1, 6), 4), (to(2, 5), 1), (node_port, 2), (host_port, 9)];
        let reading = connections.read(&all(&counters));
        assert_eq!(reading.ports, [(port("web"), 9), (port("api"), 1)].into());
        let endpoints = [((port("web"), at(5)), 5), ((port("web"), at(6)), 4)];
        let api = ((port("api"), at(5)), 1);
        assert_eq!(reading.endpoints, endpoints.into_iter().chain([api]).collect());
        assert_eq!(reading.foreign, 9);
        assert_eq!(connections.read(&all(&counters)), Reading::default());
    }

    #[test]
    fn what_was_counted_before_is_not_told_again() {
        let mut known = Connections::new(Some(&all(&[(to(1, 5), 3)])));
        known.serve(&name("web"), service("web", 1, &[5]));
        assert_eq!(known.read(&all(&[(to(1, 5), 5)])).ports, [(port("web"), 2)].into());
        let mut unknown = Connections::new(None);
        unknown.serve(&name("web"), service("web", 1, &[5]));
        assert_eq!(unknown.read(&some(&[(to(1, 5), 3)])), Reading::default(), "not all of them");
        assert_eq!(unknown.read(&all(&[(to(1, 5), 3)])), Reading::default());
        assert_eq!(unknown.read(&all(&[(to(1, 5), 5)])).ports, [(port("web"), 2)].into());
    }

    #[test]
    fn an_endpoint_is_told_while_it_exists_or_its_counter_does() {
        let mut connections = Connections::new(Some(&all(&[])));
        connections.serve(&name("web"), service("web", 1, &[5]));
        connections.read(&all(&[(to(1, 5), 3)]));
        // Idle for an hour, and still there.
        assert_eq!(connections.read(&all(&[])), Reading::default());
        connections.read(&all(&[(to(1, 5), 1)]));
        connections.serve(&name("web"), service("web", 1, &[6]));
        let last = connections.read(&all(&[(to(1, 5), 4)]));
        assert_eq!(last.endpoints, [((port("web"), at(5)), 3)].into(), "its last connections");
        assert_eq!(connections.read(&some(&[])).gone_endpoints, [], "perhaps not all were read");
        assert_eq!(connections.read(&all(&[])).gone_endpoints, [(port("web"), at(5))]);
        assert_eq!(connections.read(&all(&[])), Reading::default());
    }

    #[test]
    fn a_service_that_goes_takes_its_last_connections_along() {
        let mut connections = Connections::new(Some(&all(&[])));
        connections.serve(&name("web"), service("web", 1, &[5]));
        connections.read(&all(&[(to(1, 5), 3)]));
        // The other one has its ClusterIP before it is known to have lost it.
        connections.serve(&name("new"), service("new", 1, &[5]));
        connections.serve(&name("web"), Vec::new());
        let reading = connections.read(&all(&[(to(1, 5), 4)]));
        assert_eq!(reading.ports, [(port("new"), 1)].into());
        assert_eq!(reading.gone_ports, [port("web")]);
        connections.serve(&name("new"), Vec::new());
        let reading = connections.read(&all(&[(to(1, 5), 6)]));
        assert_eq!((reading.ports, reading.foreign), ([(port("new"), 2)].into(), 0));
        assert_eq!(reading.gone_ports, [port("new")]);
        assert_eq!(connections.read(&all(&[(to(1, 5), 7)])).foreign, 1);
    }

    #[test]
    fn readings_that_are_never_complete_do_not_pile_up() {
        let mut connections = Connections::new(Some(&all(&[])));
        let mut gone = 0;
        for ip in 1..=200 {
            connections.serve(&name(&format!("s-{ip}")), service(&format!("s-{ip}"), ip, &[5]));
            gone += connections.read(&some(&[(to(ip, 5), 3)])).gone_ports.len();
            connections.serve(&name(&format!("s-{ip}")), Vec::new());
        }
        assert_eq!((gone, connections.told_ports.len()), (199, 1), "the last is told of still");
        assert_eq!(
            (connections.former.len(), connections.seen.as_ref().unwrap().len()),
            (400, 200)
        );
        connections.limit(400);
        assert_eq!(connections.former.len(), 400);
        connections.limit(200);
        assert_eq!((connections.former.len(), connections.seen.is_some()), (0, true));
        connections.limit(199);
        assert_eq!(connections.seen, None, "told from the next complete reading on");
    }

    #[test]
    fn further_endpoints_than_are_told_one_by_one_count_for_their_port() {
        let mut connections = Connections::new(Some(&all(&[])));
        connections.serve(&name("web"), service("web", 1, &[]));
        let connection = |host: usize| {
            let address = std::net::Ipv4Addr::from(u32::try_from(host).unwrap()).into();
            (Connection { backend: Backend { address, port: 8080 }, ..to(1, 5) }, 1)
        };
        let counters: Vec<_> = (0..=MAX_ENDPOINTS).map(connection).collect();
        let reading = connections.read(&all(&counters));
        assert_eq!((reading.endpoints.len(), reading.left_out), (MAX_ENDPOINTS, 1));
        assert_eq!(reading.ports.into_values().sum::<u64>(), counters.len() as u64);
    }

    proptest! {
        /// Whatever the kernel's counters do, sums of what is told never exceed what was counted.
        #[test]
        fn every_connection_is_told_once(
            steps in proptest::collection::vec((0_u64..5, 0_u8..4, any::<bool>()), 1..40)
        ) {
            let mut connections = Connections::new(Some(&all(&[])));
            connections.serve(&name("web"), service("web", 1, &[5]));
            let (mut kernel, mut made, mut told, mut set) = (0, 0, 0, 1);
            for (new, what, complete) in steps {
                kernel += new;
                made += new;
                let counters = [(to(1, 5), kernel)];
                let counters = of_set(set, if kernel > 0 { &counters } else { &[] });
                let reading = connections.read(&Counters { complete, ..counters });
                told += reading.ports.values().sum::<u64>();
                prop_assert_eq!(told, made);
                match what {
                    0 => {
                        // It aged, and that was seen.
                        kernel = 0;
                        connections.read(&of_set(set, &[]));
                    }
                    // Its table was replaced.
                    1 => (kernel, set) = (0, set + 1),
                    2 => connections.serve(&name("web"), service("web", 1, &[6])),
                    _ => connections.serve(&name("web"), service("web", 1, &[5, 6])),
                }
            }
        }
    }
}
