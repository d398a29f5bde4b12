//! Health-check node ports: one listener for every Service that has one, on each address that node
//! ports are served on, open exactly as long as there is the Service.
//!
//! The two families count apart: a load balancer that reaches the node by IPv6 wants to know of IPv6
//! endpoints. A port that is taken is said once in the log and to the owner of the Service, and tried
//! again until it is free.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::listener::{RETRY, Scope, bind, serve as serve_listener};
use super::{Answers, Reply};
use crate::account::HealthCheck;
use crate::model::{Family, NamespacedName};
use crate::status::{Addresses, HealthCheckChange, Status};

/// A health-check node port that cannot be opened, or can after all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenFailure {
    /// The Service it belongs to.
    pub service: NamespacedName,
    /// Address and port.
    pub address: SocketAddr,
    /// The system's reason; None if it is open now.
    pub reason: Option<String>,
}

/// Connections of one port at a time; there can be hundreds of ports.
const MAX_CONNECTIONS: usize = 32;

/// Which Service, and where.
type Place = (NamespacedName, SocketAddr);

/// What is asked for, and what is open.
struct Ports<F> {
    status: Arc<Status>,
    addresses: Addresses,
    /// What the Services ask for, with the numbers of endpoints that listeners read.
    wanted: BTreeMap<NamespacedName, (HealthCheck, [Arc<AtomicUsize>; 2])>,
    open: BTreeMap<Place, JoinHandle<()>>,
    /// Could not be opened; tried again.
    failed: BTreeMap<Place, io::ErrorKind>,
    failures: F,
}

/// Opens and closes ports as told. When nobody tells any more, they stay as they are until this is
/// dropped.
pub async fn serve(
    status: Arc<Status>,
    mut changes: UnboundedReceiver<HealthCheckChange>,
    failures: impl FnMut(ListenFailure) + Send,
) {
    let mut ports = Ports {
        status,
        addresses: [Some(Vec::new()), Some(Vec::new())],
        wanted: BTreeMap::new(),
        open: BTreeMap::new(),
        failed: BTreeMap::new(),
        failures,
    };
    let mut retry = tokio::time::interval(RETRY);
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            count = changes.recv_many(&mut batch, 1024) => {
                if count == 0 {
                    return std::future::pending().await;
                }
                let touched = batch.drain(..).flat_map(|change| ports.take_in(change)).collect();
                let nothing_failed = ports.failed.is_empty();
                ports.follow(&touched).await;
                if nothing_failed {
                    // Ticks that nobody waited for would all come at once.
                    retry.reset();
                }
            }
            _ = retry.tick(), if !ports.failed.is_empty() => {
                let again: BTreeSet<_> = ports.failed.keys().map(|(name, _)| name.clone()).collect();
                ports.follow(&again).await;
            }
        }
    }
}

impl<F: FnMut(ListenFailure)> Ports<F> {
    /// Takes note of a change; returns whose ports may have to change.
    fn take_in(&mut self, change: HealthCheckChange) -> Vec<NamespacedName> {
        match change {
            HealthCheckChange::Addresses(addresses) => {
                self.addresses = addresses;
                self.wanted.keys().cloned().collect()
            }
            HealthCheckChange::Service(name, None) => {
                self.wanted.remove(&name);
                vec![name]
            }
            HealthCheckChange::Service(name, Some(check)) => {
                let (known, counts) =
                    self.wanted.entry(name.clone()).or_insert_with(|| (check, Default::default()));
                *known = check;
                for (count, endpoints) in counts.iter().zip(check.endpoints) {
                    count.store(endpoints.unwrap_or(0), Ordering::Relaxed);
                }
                vec![name]
            }
        }
    }

    /// The addresses a Service is to be served on, each with its family's number of endpoints.
    fn places(&self, name: &NamespacedName) -> BTreeMap<SocketAddr, Arc<AtomicUsize>> {
        let Some((check, counts)) = self.wanted.get(name) else { return BTreeMap::new() };
        let mut places = BTreeMap::new();
        for (index, family) in Family::BOTH.into_iter().enumerate() {
            if check.endpoints[index].is_none() || !self.status.families().contains(&family) {
                continue;
            }
            let all = match family {
                Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
                Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
            };
            let addresses = self.addresses[index].clone().unwrap_or_else(|| vec![all]);
            places.extend(addresses.into_iter().map(|address| {
                (SocketAddr::new(address, check.port.get()), counts[index].clone())
            }));
        }
        places
    }

    /// Closes what is not wanted any more, then opens what is: a port may change hands.
    async fn follow(&mut self, touched: &BTreeSet<NamespacedName>) {
        let mut wanted: BTreeMap<_, _> =
            touched.iter().map(|name| (name.clone(), self.places(name))).collect();
        let stays = |(name, address): &Place| {
            wanted.get(name).is_none_or(|places| places.contains_key(address))
        };
        self.failed.retain(|place, _| stays(place));
        let unwanted: Vec<_> = self.open.keys().filter(|place| !stays(place)).cloned().collect();
        let closed = !unwanted.is_empty();
        for place in unwanted {
            let Some(listener) = self.open.remove(&place) else { continue };
            listener.abort();
            // The port is free when the task is gone.
            drop(listener.await);
            info!(service = %place.0, address = %place.1, "closed the health-check node port");
        }
        if closed {
            // What was closed may be what another one waits for.
            let waiting = self.failed.keys().map(|(name, _)| (name.clone(), self.places(name)));
            wanted.extend(waiting.collect::<Vec<_>>());
        }
        for (name, places) in wanted {
            for (address, endpoints) in places {
                let place = (name.clone(), address);
                if !self.open.contains_key(&place) {
                    self.open(place, endpoints);
                }
            }
        }
        let open = i64::try_from(self.open.len()).unwrap_or(i64::MAX);
        self.status.metrics.own.health_check_listeners.set(open);
    }

    fn open(&mut self, place: Place, endpoints: Arc<AtomicUsize>) {
        let (service, address) = &place;
        match bind(*address, Scope::Own) {
            Ok(listener) => {
                info!(%service, %address, "opened the health-check node port");
                if self.failed.remove(&place).is_some() {
                    let (service, address) = place.clone();
                    (self.failures)(ListenFailure { service, address, reason: None });
                }
                let status = self.status.clone();
                let stopping = status.stopping();
                let pages = Arc::new(Pages { status, service: service.clone(), endpoints });
                let task = tokio::spawn(async move {
                    serve_listener(listener, MAX_CONNECTIONS, stopping, pages).await;
                });
                self.open.insert(place, task);
            }
            Err(error) => {
                self.status.metrics.own.health_check_failures.inc();
                if self.failed.insert(place.clone(), error.kind()) == Some(error.kind()) {
                    return;
                }
                warn!(
                    %service, %address, %error, retry_in = ?RETRY,
                    "cannot open the health-check node port"
                );
                let reason = Some(error.to_string());
                let (service, address) = place;
                (self.failures)(ListenFailure { service, address, reason });
            }
        }
    }
}

/// Listeners end with the server.
impl<F> Drop for Ports<F> {
    fn drop(&mut self) {
        for listener in self.open.values() {
            listener.abort();
        }
    }
}

/// Every path is answered the same: load balancers differ in what they ask.
struct Pages {
    status: Arc<Status>,
    service: NamespacedName,
    endpoints: Arc<AtomicUsize>,
}

impl Answers for Pages {
    fn reply(&self, _: &str) -> Reply {
        let endpoints = self.endpoints.load(Ordering::Relaxed);
        let mut reply = Reply::answer(self.status.service(&self.service, endpoints));
        reply.headers.push(("x-load-balancing-endpoint-weight", endpoints.to_string()));
        reply
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_port_that_is_taken_is_tried_again_no_sooner_for_a_long_time_without_a_failure() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let status = Arc::new(Status::new(vec![Family::V4], Duration::from_secs(30)));
        let (sender, changes) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(serve(status.clone(), changes, |_| {}));
        sender.send(HealthCheckChange::Addresses([Some(vec![address.ip()]), None])).unwrap();
        tokio::time::sleep(RETRY * 1000).await;
        let check =
            HealthCheck { port: address.port().try_into().unwrap(), endpoints: [Some(1), None] };
        let name = NamespacedName::new("default", "web");
        sender.send(HealthCheckChange::Service(name, Some(check))).unwrap();
        tokio::time::sleep(RETRY / 2).await;
        for tries in 1..4 {
            assert_eq!(status.metrics.own.health_check_failures.get(), tries);
            tokio::time::sleep(RETRY).await;
        }
        drop(taken);
        tokio::time::sleep(RETRY).await;
        assert_eq!(status.metrics.own.health_check_listeners.get(), 1);
    }
}
