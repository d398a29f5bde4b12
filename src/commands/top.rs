//! `nftproxy top`: connections a second by Service port and endpoint, as they are made.
//!
//! Two readings of the kernel's counters, a while apart, make a board. Nothing is asked of the daemon:
//! the names are those of the objects, read once, and again when something is dialled that they do not
//! explain.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::CommandError;
use super::connections::{Reader, names};
use super::objects::{Gathered, gather, is_given};
use super::text::{Paint, count, cut, cut_service};
use crate::config::Config;
use crate::connections::{Connections, address_of};
use crate::nft::connection::Connection;

/// What is said where connections are not counted.
pub const OFF: &str = "connections are not counted here: run nftproxy with --counters, or with \
                       `nftproxy: {counters: true}` in its configuration\n";

/// Objects are not read again sooner than this.
const NAMES_EVERY: Duration = Duration::from_secs(10);

/// What the columns of numbers take of a line.
const NUMBERS: usize = 23;

/// How many endpoints of a Service port are shown, where not everything fits.
const ENDPOINTS: usize = 3;

/// What happened between two readings.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Board {
    /// This node.
    pub node: String,
    /// How long it was between them.
    pub interval_seconds: f64,
    /// New connections a second, of all.
    pub connections_per_second: f64,
    /// Why names are missing, if they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unnamed: Option<String>,
    /// Service ports with connections in the last hour, those with most new ones first.
    pub services: Vec<PortRate>,
}

/// The connections of a Service port.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PortRate {
    /// `namespace/name`; None if no Service is known that serves it.
    pub service: Option<String>,
    /// Name of the port; empty if it has none. Without a Service: what was dialled.
    pub port: String,
    /// Its protocol.
    pub protocol: String,
    /// New connections a second.
    pub connections_per_second: f64,
    /// Connections that the kernel counted: of each endpoint since its first, or since the first after
    /// an hour without.
    pub connections: u64,
    /// Who answered.
    pub endpoints: Vec<EndpointRate>,
}

/// The connections of an endpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EndpointRate {
    /// Address and port.
    pub endpoint: String,
    /// New connections a second.
    pub connections_per_second: f64,
    /// Connections that the kernel counted.
    pub connections: u64,
}

/// Two readings under way.
pub struct Top<'a> {
    config: &'a Config,
    reader: Reader,
    node: String,
    names: Connections,
    named_at: Instant,
    unnamed: Option<String>,
    before: HashMap<Connection, u64>,
    read_at: Instant,
}

impl<'a> Top<'a> {
    /// Takes the first reading. None if connections are not counted.
    pub async fn begin(config: &'a Config) -> Result<Option<Self>, CommandError> {
        let mut reader = Reader::open()?;
        if !reader.read()?.is_on() {
            return Ok(None);
        }
        let (names, node, unnamed) = match gather(config).await {
            Ok(Gathered { state, .. }) => (names(&state), state.node_facts().name.clone(), None),
            Err(error) if is_given(&config.source) => return Err(error.into()),
            Err(error) => {
                (Connections::default(), config.node_name.clone(), Some(error.to_string()))
            }
        };
        let (named_at, read_at) = (Instant::now(), Instant::now());
        let before = reader.read()?.connections.into_iter().collect();
        Ok(Some(Self { config, reader, node, names, named_at, unnamed, before, read_at }))
    }

    /// Takes another reading. None if connections are no longer counted.
    pub async fn next(&mut self) -> Result<Option<Board>, CommandError> {
        let counters = self.reader.read()?;
        if !counters.is_on() {
            return Ok(None);
        }
        let now = Instant::now();
        let after = counters.connections;
        let unknown = after.iter().any(|(connection, _)| self.names.port_of(connection).is_none());
        if unknown && self.unnamed.is_none() && self.named_at.elapsed() >= NAMES_EVERY {
            // What cannot be had now is shown without a name.
            if let Ok(gathered) = gather(self.config).await {
                self.names = names(&gathered.state);
            }
            self.named_at = Instant::now();
        }
        let elapsed = now - self.read_at;
        let board = Board {
            node: self.node.clone(),
            unnamed: self.unnamed.clone(),
            ..board(&self.before, &after, &self.names, elapsed)
        };
        self.read_at = now;
        if counters.complete {
            self.before = after.into_iter().collect();
        } else {
            self.before.extend(after);
        }
        Ok(Some(board))
    }
}

/// Connections and new ones.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    all: u64,
    new: u64,
}

impl Sum {
    fn add(&mut self, other: Self) {
        self.all += other.all;
        self.new += other.new;
    }
}

/// Service, port and protocol.
type Name = (Option<String>, String, String);

fn board(
    before: &HashMap<Connection, u64>,
    after: &[(Connection, u64)],
    names: &Connections,
    elapsed: Duration,
) -> Board {
    let seconds = elapsed.as_secs_f64();
    let rate = |new: u64| {
        let new = u32::try_from(new).unwrap_or(u32::MAX);
        if seconds > 0.0 { f64::from(new) / seconds } else { 0.0 }
    };
    let mut ports: BTreeMap<Name, BTreeMap<SocketAddr, Sum>> = BTreeMap::new();
    for (connection, all) in after {
        let known = before.get(connection).filter(|before| *before <= all);
        let sum = Sum { all: *all, new: all - known.unwrap_or(&0) };
        let protocol = connection.protocol.to_string();
        let name = if let Some(port) = names.port_of(connection) {
            (Some(port.service.to_string()), port.name.to_string(), protocol)
        } else {
            let dialled = SocketAddr::new(connection.address, connection.port);
            (None, dialled.to_string(), protocol)
        };
        let endpoints = ports.entry(name).or_default();
        endpoints.entry(address_of(connection.backend)).or_default().add(sum);
    }
    let mut all = 0;
    let port_rate = |((service, port, protocol), endpoints): (Name, BTreeMap<SocketAddr, Sum>)| {
        let mut total = Sum::default();
        for sum in endpoints.values() {
            total.add(*sum);
        }
        all += total.new;
        let mut endpoints: Vec<_> = endpoints.into_iter().collect();
        endpoints.sort_by_key(|(address, sum)| (std::cmp::Reverse((sum.new, sum.all)), *address));
        let endpoints = endpoints.into_iter().map(|(address, sum)| EndpointRate {
            endpoint: address.to_string(),
            connections_per_second: rate(sum.new),
            connections: sum.all,
        });
        let row = PortRate {
            service,
            port,
            protocol,
            connections_per_second: rate(total.new),
            connections: total.all,
            endpoints: endpoints.collect(),
        };
        (total, row)
    };
    let mut rows: Vec<_> = ports.into_iter().map(port_rate).collect();
    // Stable: those of the same number stay in the order of their names.
    rows.sort_by_key(|(total, _)| std::cmp::Reverse((total.new, total.all)));
    Board {
        interval_seconds: seconds,
        connections_per_second: rate(all),
        services: rows.into_iter().map(|(_, row)| row).collect(),
        ..Board::default()
    }
}

impl Board {
    /// For people: no line is wider than `width`, and there are no more of them than `height`.
    #[must_use]
    pub fn text(&self, width: usize, height: usize) -> String {
        let endpoints: usize = self.services.iter().map(|port| port.endpoints.len()).sum();
        let head = format!(
            "{}: {:.1} connections/s over {:.1}s to {}, {}",
            self.node,
            self.connections_per_second,
            self.interval_seconds,
            count(self.services.len(), "Service port"),
            count(endpoints, "endpoint"),
        );
        let mut lines = vec![cut(&head, width)];
        lines.extend(self.unnamed.as_ref().map(|why| cut(&format!("without names: {why}"), width)));
        let columns = cut("   CONN/S       TOTAL  SERVICE PORT, ENDPOINTS", width);
        lines.push(Paint::Bold.on(&columns));
        let row = |rate: f64, total: u64, name: &str| {
            cut(&format!("{rate:>9.1}  {total:>10}  {name}"), width)
        };
        // If not everything fits, a Service with many endpoints does not hide the others.
        let all = lines.len() + self.services.len() + endpoints;
        let shown = if all > height { ENDPOINTS } else { usize::MAX };
        for port in &self.services {
            let room = width.saturating_sub(NUMBERS);
            let name = match &port.service {
                Some(service) if port.port.is_empty() => {
                    cut_service(service, &format!(" {}", port.protocol), room)
                }
                Some(service) => {
                    cut_service(service, &format!(":{} {}", port.port, port.protocol), room)
                }
                None => format!("{} {}, of no known Service", port.port, port.protocol),
            };
            lines.push(row(port.connections_per_second, port.connections, &name));
            lines.extend(port.endpoints.iter().take(shown).map(|endpoint| {
                let name = format!("  -> {}", endpoint.endpoint);
                row(endpoint.connections_per_second, endpoint.connections, &name)
            }));
            if port.endpoints.len() > shown {
                let more = port.endpoints.len() - shown;
                lines.push(cut(&format!("{:NUMBERS$}  and {more} more", ""), width));
            }
        }
        if lines.len() > height {
            let left_out = lines.len() - height.saturating_sub(1);
            lines.truncate(height.saturating_sub(1));
            lines.push(cut(&format!("  and {left_out} more lines"), width));
        }
        lines.join("\n") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connections::{Port, Served};
    use crate::frontend::Frontend;
    use crate::model::{NamespacedName, Protocol};
    use crate::nft::element::Backend;

    fn connection(ip: u8, host: u8) -> Connection {
        let backend = Backend { address: [10, 244, 1, host].into(), port: 8080 };
        let address = [10, 96, 0, ip].into();
        Connection { address, protocol: Protocol::Tcp, port: 80, backend }
    }

    fn example(name: &str) -> Board {
        let mut names = Connections::default();
        let service = NamespacedName::new("default", name);
        let port = Port { service, name: "http".into(), protocol: Protocol::Tcp };
        let served = Served {
            port: port.clone().into(),
            frontends: vec![Frontend::Address([10, 96, 0, 1].into(), Protocol::Tcp, 80)],
            endpoints: std::collections::BTreeSet::new(),
        };
        names.serve(&port.service, vec![served]);
        let before = [(connection(1, 5), 10), (connection(2, 5), 7)].into();
        let after = [(connection(1, 5), 11), (connection(1, 6), 4), (connection(2, 5), 3)];
        let board = board(&before, &after, &names, Duration::from_secs(2));
        Board { node: "node-1".into(), ..board }
    }

    #[test]
    fn rates_are_what_is_new_over_time() {
        let board = example("web");
        let rates: Vec<_> = board
            .services
            .iter()
            .map(|p| (p.service.as_deref(), &*p.port, p.connections_per_second, p.connections))
            .collect();
        // The counter of the other one began anew.
        assert_eq!(rates, [(Some("default/web"), "http", 2.5, 15), (None, "10.96.0.2:80", 1.5, 3)]);
        let endpoints = &board.services[0].endpoints;
        let endpoints: Vec<_> =
            endpoints.iter().map(|e| (&*e.endpoint, e.connections_per_second)).collect();
        assert_eq!(endpoints, [("10.244.1.6:8080", 2.0), ("10.244.1.5:8080", 0.5)]);
        assert!((board.connections_per_second - 4.0).abs() < 1e-9);
    }

    #[test]
    fn a_long_name_is_cut_where_it_tells_least() {
        let text = example(&format!("{}-z", "long".repeat(30))).text(80, 24);
        let name = "  default/longlonglonglonglong…glonglonglonglong-z:http tcp";
        assert!(text.contains(name), "{text}");
    }

    #[test]
    fn a_board_fits_its_terminal() {
        let board = example(&"long".repeat(30));
        for (width, height) in [(80, 24), (200, 24), (20, 3), (1, 1)] {
            let text = board.text(width, height);
            let plain = text.replace("\x1b[1m", "").replace("\x1b[0m", "");
            assert!(plain.lines().all(|line| line.chars().count() <= width), "{text}");
            assert!(plain.lines().count() <= height, "{text}");
        }
        assert!(board.text(80, 4).ends_with("  and 4 more lines\n"), "{}", board.text(80, 4));
        let endpoint = |n: u8| EndpointRate {
            endpoint: format!("10.244.1.{n}:8080"),
            connections_per_second: 1.0,
            connections: 1,
        };
        let mut board = board;
        board.services[0].endpoints = (0..30).map(endpoint).collect();
        let text = board.text(80, 24);
        let more = text.lines().find(|line| line.ends_with("  and 27 more")).unwrap();
        assert_eq!(more.find("and"), Some(NUMBERS + 2));
        assert!(text.contains("10.96.0.2:80"), "the next one is seen: {text}");
    }
}
