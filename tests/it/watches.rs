//! Where a watch goes on, and where everything is listed: real API servers, and a wire in between.
//!
//! A list that was not needed costs a server of thousands of nodes dearly, and one that was is the only way
//! to learn of what it no longer tells. So both are counted here.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use nftproxy::model::{Event, Kind};
use nftproxy::watch::api;
use nftproxy::watch::notices::Notices;
use tokio::sync::mpsc::Receiver;
use tokio::time::timeout;

use crate::control_plane::User;
use crate::e2e::{A, Cluster, REMOTE, service, with_cluster};
use crate::net::{CLIENT, ip};
use crate::objects::CLUSTER;
use crate::wire::Wire;

/// A watch.
struct Watching {
    events: Receiver<Event>,
    /// How often each kind was listed.
    lists: BTreeMap<Kind, u32>,
}

impl Watching {
    fn start(cluster: &Cluster<'_>, server: SocketAddr, renewal: RangeInclusive<u32>) -> Self {
        let url = format!("https://{server}");
        let kubeconfig = cluster.plane.kubeconfig_at(User::KubeProxy, &url);
        let (sender, events) = tokio::sync::mpsc::channel(1000);
        cluster.runtime.block_on(async {
            let client = async || api::client(Some(&kubeconfig), None).await.unwrap();
            let clients = [client().await, client().await, client().await, client().await];
            let node = "node-1".to_owned();
            tokio::spawn(api::run(clients, node, renewal, sender, Notices::default()));
        });
        Self { events, lists: BTreeMap::new() }
    }

    /// Follows for so long, or until there is this.
    fn until(
        &mut self,
        cluster: &Cluster<'_>,
        time: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> bool {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let next = async { timeout(left, self.events.recv()).await };
            let Ok(event) = cluster.runtime.block_on(next) else { return false };
            let event = event.expect("it watches");
            if let Event::Listed(kind) = event {
                *self.lists.entry(kind).or_default() += 1;
            }
            if wanted(&event) {
                return true;
            }
        }
    }

    fn hears(&mut self, cluster: &Cluster<'_>, wanted: impl Fn(&Event) -> bool) {
        assert!(self.until(cluster, Duration::from_secs(60), wanted), "{:?}", self.lists);
    }

    /// Changes both, and follows until both changes came.
    fn sees_changes(&mut self, cluster: &Cluster<'_>, round: u16) {
        let endpoint = if round.is_multiple_of(2) { A } else { REMOTE };
        cluster.endpoints("web", &[endpoint]);
        self.hears(cluster, |event| {
            matches!(event, Event::EndpointSlice(slice) if slice.endpoints.iter().any(|e| {
                e.address == ip(endpoint.trim_end_matches('!'))
            }))
        });
        let name = format!("s-{round}");
        cluster.apply(&service(&name, &[&format!("10.96.2.{round}")]).yaml());
        let name = format!("default/{name}");
        self.hears(
            cluster,
            |event| matches!(event, Event::Service(service) if service.name.as_str() == name),
        );
    }
}

#[test]
fn a_watch_goes_on_where_it_can_and_lists_where_it_must() {
    with_cluster(|cluster| {
        cluster.apply(
            &(CLUSTER.split("---\n").next().unwrap().to_owned()
                + "---\n"
                + &service("web", &["10.96.0.40"]).yaml()),
        );
        let first = cluster.plane.address();
        let second = cluster.runtime.block_on(cluster.plane.start_another());
        let wire = Wire::new(ip(CLIENT[0]), first);
        // It comes to its end every few seconds.
        let mut watching = Watching::start(cluster, wire.address, 2..=3);
        for _ in 0..4 {
            watching.hears(cluster, |event| matches!(event, Event::Listed(_)));
        }
        let once: BTreeMap<_, _> =
            [Kind::Service, Kind::EndpointSlice, Kind::ServiceCidr, Kind::Node]
                .map(|k| (k, 1))
                .into();
        assert_eq!(watching.lists, once);
        // Watches end, four times each at least, and go on.
        watching.until(cluster, Duration::from_secs(14), |_| false);
        watching.sees_changes(cluster, 1);
        assert_eq!(watching.lists, once, "nothing was listed again");

        // One of several servers goes: what changed since the list is known at the other.
        wire.lead_to(second);
        cluster.plane.kill_apiserver();
        cluster.runtime.block_on(cluster.plane.start_apiserver());
        watching.sees_changes(cluster, 2);
        let of = |watching: &Watching, kind| watching.lists[&kind];
        assert_eq!(of(&watching, Kind::Service), 1, "{:?}", watching.lists);
        assert_eq!(of(&watching, Kind::EndpointSlice), 1, "{:?}", watching.lists);
        // And back, to one that was started anew meanwhile and knows what happened since.
        wire.lead_to(first);
        watching.sees_changes(cluster, 3);
        assert_eq!(of(&watching, Kind::Service), 1, "{:?}", watching.lists);
        assert_eq!(of(&watching, Kind::EndpointSlice), 1, "{:?}", watching.lists);

        // The wire goes dead, and both ends believe that it is open.
        wire.swallow();
        let began = Instant::now();
        watching.sees_changes(cluster, 4);
        eprintln!("a dead wire is left after {:?}; lists: {:?}", began.elapsed(), watching.lists);
        // The stream is given up sooner, but the connection for want of a sign of life alone.
        assert!(began.elapsed() < Duration::from_secs(50), "{:?}", began.elapsed());
        // The same with a watch that lasts as long as usual.
        drop(watching);
        let mut watching = Watching::start(cluster, wire.address, api::RENEWAL);
        watching.sees_changes(cluster, 5);
        wire.swallow();
        let began = Instant::now();
        watching.sees_changes(cluster, 6);
        eprintln!("by a watch that lasts after {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(50), "{:?}", began.elapsed());
    });
}
