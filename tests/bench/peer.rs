//! The real program beside the real kube-proxy, on the same objects of the same kube-apiserver, in the
//! same namespaces, one after the other: how soon everything is programmed, how soon one change takes
//! effect, what a storm of changes costs, and what packets pay.
//!
//! `tests/bench/run` builds what it takes and starts it. Arguments: SERVICES ENDPOINTS [--quick], or
//! --growth with any number of such pairs, or --fanout with one. The ratios of one run are the figure; absolute times are those of
//! one machine at one time.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]
#![expect(clippy::disallowed_methods, reason = "a bench reads the clock")]

#[path = "peer/cluster.rs"]
mod cluster;
#[path = "../it/control_plane.rs"]
#[expect(dead_code, reason = "shared with the tests, which need more of it")]
mod control_plane;
#[path = "peer/etcd.rs"]
mod etcd;
#[path = "peer/fanout.rs"]
mod fanout;
#[path = "peer/field.rs"]
mod field;
#[path = "peer/growth.rs"]
mod growth;
#[path = "peer/packets.rs"]
mod packets;
#[path = "peer/proxy.rs"]
mod proxy;
#[path = "peer/report.rs"]
mod report;
#[path = "peer/requests.rs"]
mod requests;
#[path = "../it/wakeups.rs"]
mod wakeups;

use std::net::{SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt as _};
use tokio::runtime::Runtime;

use self::cluster::{
    Cluster, PROBES, Told, awaited_ip, cluster_ip, endpoint_ip, floor_ip, plain_ip, probe_ip,
};
use self::control_plane::{ControlPlane, User};
use self::field::{Field, OUTSIDE};
use self::packets::{Arrival, Await, quantile, syn_cost, until_programmed, while_sleeping};
use self::proxy::{Proxy, Which, waits};
use self::report::{Figures, Report};

/// Changes a second in the storm.
const RATE: u64 = 200;

/// Services that are looked at to know when all are programmed.
const SAMPLE: usize = 200;

/// Services that requests with a connection each go to: several, as one has not ports enough for so many.
const CALLED: usize = 64;

/// The longest that a first sync may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// The longest that one after a restart may take.
const RESTART_PATIENCE: Duration = Duration::from_secs(180);

/// How much is measured; nothing where it says 0.
#[derive(Clone, Copy)]
struct Extent {
    changes: usize,
    storm: Duration,
    idle: Duration,
    /// For how long wake-ups are counted.
    rest: Duration,
    syn_rounds: u16,
    stream_rounds: u32,
    stream: Duration,
}

const FULL: Extent = Extent {
    changes: 100,
    storm: Duration::from_secs(60),
    idle: Duration::from_secs(20),
    rest: Duration::from_secs(60),
    syn_rounds: 12,
    stream_rounds: 7,
    stream: Duration::from_millis(700),
};

const QUICK: Extent = Extent {
    changes: 5,
    storm: Duration::from_secs(5),
    idle: Duration::from_secs(2),
    rest: Duration::from_secs(5),
    syn_rounds: 3,
    stream_rounds: 1,
    stream: Duration::from_millis(200),
};

/// Of many sizes, what grows with them.
const GROWTH: Extent = Extent {
    changes: 20,
    storm: Duration::ZERO,
    idle: Duration::from_secs(5),
    rest: Duration::ZERO,
    syn_rounds: 4,
    stream_rounds: 0,
    stream: Duration::ZERO,
};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let sizes: Vec<usize> = arguments.iter().filter_map(|argument| argument.parse().ok()).collect();
    let asked = |option: &str| arguments.iter().any(|argument| argument == option);
    if asked("--fanout") {
        let (services, endpoints) = match sizes[..] {
            [services, endpoints] => (services, endpoints),
            _ => (10_000, 5),
        };
        let world = World::new(services, endpoints);
        return world.runtime.block_on(fanout::run(&world.plane, &world.cluster));
    }
    if asked("--growth") {
        let sizes = sizes.chunks_exact(2).map(|size| (size[0], size[1]));
        assert!(growth::run(sizes), "every Service must have been programmed, at each size");
        return;
    }
    if asked(growth::ONE) {
        let (services, endpoints) = (sizes[0], sizes[1]);
        measure(services, endpoints, GROWTH, growth::tell);
        return;
    }
    let (services, endpoints) = match sizes[..] {
        [services, endpoints] => (services, endpoints),
        _ if quick => (300, 3),
        _ => (10_000, 5),
    };
    let [ours, peer] = measure(services, endpoints, if quick { QUICK } else { FULL }, |_| ());
    let report = Report { services, endpoints, quick, ours, peer };
    report.print();
    assert!(report.works(), "every Service must have been programmed by both");
    report.write();
}

/// Namespaces, and a control plane outside with all the objects.
struct World {
    cluster: Cluster,
    plane: ControlPlane,
    runtime: Runtime,
    field: Field,
}

impl World {
    fn new(services: usize, endpoints: usize) -> Self {
        let field = Field::new();
        // Threads that are made from here on are there, too.
        field::enter(&field.name("outside"));
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.enable_all().worker_threads(2).build().expect("a runtime");
        let outside = OUTSIDE.parse().expect("an address");
        let mut plane = runtime.block_on(ControlPlane::start(outside));
        let began = Instant::now();
        let cluster = runtime.block_on(Cluster::load(&mut plane, services, endpoints));
        println!("{services} Services x {endpoints} written in {:.0?}", began.elapsed());
        until_calm(plane.apiserver_id());
        Self { cluster, plane, runtime, field }
    }
}

/// Waits until the API server has done what so many new objects give it to do, such as to look after every
/// ClusterIP: it would be at the cost of whoever is measured first.
fn until_calm(apiserver: u32) {
    const AT_MOST: u32 = 180;
    for _ in 0..AT_MOST {
        let before = proxy::cpu_seconds(apiserver);
        std::thread::sleep(Duration::from_secs(1));
        if proxy::cpu_seconds(apiserver) - before < 0.1 {
            return;
        }
    }
    println!("the API server is still busy after {AT_MOST} s");
}

/// Ours and the peer's, with a control plane of their own; each is told of as soon as it is measured.
fn measure(
    services: usize,
    endpoints: usize,
    extent: Extent,
    told: impl Fn(&Figures),
) -> [Figures; 2] {
    let World { cluster, plane, runtime, field } = &World::new(services, endpoints);
    let heard = runtime.block_on(async { cluster.listen() });
    let port = plane.address().port();
    let bench = Bench { field, runtime, port, cluster, told: heard, extent };

    bench.load_floor();
    let kubeconfig = plane.kubeconfig(User::Admin);
    [Which::Nftproxy, Which::KubeProxy].map(|which| {
        let figures = bench.run(which, &kubeconfig);
        told(&figures);
        figures
    })
}

struct Bench<'a> {
    field: &'a Field,
    runtime: &'a Runtime,
    /// Of the API server.
    port: u16,
    cluster: &'a Cluster,
    told: Told,
    extent: Extent,
}

/// How soon changes took effect, in seconds: since the server acknowledged the write, and since
/// another client was told of it. NaN if not within 30 s.
#[derive(Default)]
struct Lags {
    acknowledged: Vec<f64>,
    told: Vec<f64>,
    /// How long of that no datagram was sent that could have shown it.
    blind: Vec<f64>,
}

impl Lags {
    fn quantiles(mut self) -> [[f64; 2]; 3] {
        [&mut self.acknowledged, &mut self.told, &mut self.blind]
            .map(|lags| [quantile(lags, 0.5), quantile(lags, 0.99)])
    }

    fn missed(&self) -> usize {
        self.acknowledged.iter().filter(|lag| lag.is_nan()).count()
    }
}

/// From one to the other, in seconds.
fn since(earlier: Instant, later: Instant) -> f64 {
    match later.checked_duration_since(earlier) {
        Some(after) => after.as_secs_f64(),
        None => -(earlier - later).as_secs_f64(),
    }
}

impl Bench<'_> {
    /// Destinations by way of each node: a Service's, the floor tables', and none's.
    fn destinations(&self) -> [Vec<SocketAddrV4>; 4] {
        let all = 0..self.cluster.services;
        [
            all.clone().map(|i| SocketAddrV4::new(cluster_ip(i), 80)).collect(),
            all.clone().map(|i| SocketAddrV4::new(floor_ip(i, false), 80)).collect(),
            all.clone().map(|i| SocketAddrV4::new(floor_ip(i, true), 80)).collect(),
            all.map(|i| SocketAddrV4::new(plain_ip(i), 8080)).collect(),
        ]
    }

    /// Endpoints, and the Services that they are of.
    fn called(&self) -> [Vec<SocketAddr>; 2] {
        let called = 0..CALLED.min(self.cluster.services);
        [
            called.clone().map(|i| SocketAddrV4::new(endpoint_ip(i, 0), 8080).into()).collect(),
            called.map(|i| SocketAddrV4::new(cluster_ip(i), 80).into()).collect(),
        ]
    }

    /// The least tables there can be, on nodes of their own.
    fn load_floor(&self) {
        for (node, random, masquerade) in
            [("floor", false, "masquerade"), ("random", true, "masquerade fully-random")]
        {
            let elements = (0..self.cluster.services)
                .map(|i| format!("{} . 80 : {} . 8080", floor_ip(i, random), endpoint_ip(i, 0)));
            let elements = elements.collect::<Vec<_>>().join(", ");
            self.field.nft(
                node,
                &format!(
                    "table ip floor {{
    map services {{
        type ipv4_addr . inet_service : ipv4_addr . inet_service
        elements = {{ {elements} }}
    }}
    chain prerouting {{
        type nat hook prerouting priority -100
        dnat ip to ip daddr . tcp dport map @services
    }}
    chain postrouting {{
        type nat hook postrouting priority 100
        {masquerade}
    }}
}}
"
                ),
            );
        }
    }

    /// Everything about one of the two.
    fn run(&self, which: Which, kubeconfig: &std::path::Path) -> Figures {
        let mut figures = Figures::default();
        self.count_bytes();
        // Programmed is what packets pass: a sample from all over, the last one among them.
        let all = self.destinations().into_iter().next().expect("the Services");
        let sample: Vec<_> =
            all.iter().rev().step_by((all.len() / SAMPLE).max(1)).copied().collect();
        let began = Instant::now();
        let proxy = Proxy::start(self.field, which, kubeconfig);
        let Some(arrived) = until_programmed(self.field, &sample, PATIENCE) else {
            assert!(which == Which::KubeProxy, "not programmed\n{}", proxy.log());
            println!("{which:?} did not program everything within {PATIENCE:?}");
            let peak_mb = proxy.peak_mb();
            proxy.end();
            self.field.nft("node", "flush ruleset\n");
            return Figures { peak_mb, ..Figures::unknown() };
        };
        figures.ready = (arrived - began).as_secs_f64();
        // It says so a little later, and may then do what it put off.
        std::thread::sleep(self.extent.idle);
        let known = proxy.syncs().len();
        figures.first_sync = proxy.syncs().into_iter().fold(f64::NAN, f64::max);
        figures.start_bytes = self.bytes();

        let (costs, arrived) = syn_cost(self.field, &self.destinations(), self.extent.syn_rounds);
        [figures.syn, figures.floor, figures.random, figures.routing] = costs;
        figures.programmed = arrived;
        let to = [SocketAddrV4::new(endpoint_ip(0, 0), 8080), SocketAddrV4::new(cluster_ip(0), 80)];
        let Extent { stream_rounds, stream, storm, .. } = self.extent;
        if stream_rounds > 0 {
            let to = to.map(SocketAddr::V4);
            [figures.direct, figures.by_service] =
                requests::throughput(self.field, to, stream_rounds, stream);
            let another = SocketAddrV4::new(endpoint_ip(1, 0), 8080).into();
            let [direct, by_service] = to;
            let to = [direct, another, by_service];
            figures.requests = requests::kept(self.field, to, stream_rounds, stream / 5);
            figures.calls = requests::single(self.field, &self.called(), stream_rounds, stream / 2);
        }

        let before = proxy.wakeups();
        std::thread::sleep(self.extent.rest);
        figures.wakeups = (proxy.wakeups() - before) / self.extent.rest.as_secs_f64();

        let go_on = AtomicBool::new(false);
        let (lags, mut late) =
            while_sleeping(|| self.changes(which, 0, self.extent.changes, &go_on));
        figures.change_late = [0.99, 1.0].map(|at| quantile(&mut late, at));
        figures.missed = lags.missed();
        [figures.change, figures.change_told, figures.change_blind] = lags.quantiles();
        let mut syncs = proxy.syncs().split_off(known.min(proxy.syncs().len()));
        figures.next_sync = quantile(&mut syncs, 0.5);

        if !storm.is_zero() {
            let (before, bytes) = (waits(self.field), self.bytes());
            let ((written, lags, cpu), mut late) = while_sleeping(|| self.storm(which, &proxy));
            figures.storm_late = [0.99, 1.0].map(|at| quantile(&mut late, at));
            figures.storm_inside = waits(self.field).since(&before);
            figures.storm_rate = written;
            figures.change_bytes = (self.bytes() - bytes) / (written * storm.as_secs_f64());
            [figures.storm, figures.storm_told, figures.storm_blind] = lags.quantiles();
            figures.storm_cpu = cpu;
        }
        figures.peak_mb = proxy.peak_mb();
        // Whatever went wrong explains figures that are odd.
        for line in proxy.log().lines().filter(|line| line.contains(" WARN ")).take(10) {
            println!("{which:?}: {line}");
        }
        // It may still do what it put off.
        std::thread::sleep(self.extent.idle);
        proxy.end();
        [figures.restart, figures.restart_operations] = self.restart(which, kubeconfig);
        self.field.nft("node", "flush ruleset\n");
        println!("{which:?}: {figures:.3?}");
        figures
    }

    /// Starts one again, with the tables that it left and objects as they were: the seconds until its first
    /// sync was done, by its own word, and of how many operations that was.
    fn restart(&self, which: Which, kubeconfig: &std::path::Path) -> [f64; 2] {
        let began = Instant::now();
        let proxy = Proxy::start(self.field, which, kubeconfig);
        while proxy.syncs().is_empty() {
            if began.elapsed() > RESTART_PATIENCE {
                return [f64::NAN; 2];
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        [began.elapsed().as_secs_f64(), proxy.operations()]
    }

    /// Begins to count what the API server sends to the node.
    fn count_bytes(&self) {
        let ruleset = format!(
            "table ip bench {{
    counter sent {{ }}
    chain input {{
        type filter hook input priority -300
        ip saddr {OUTSIDE} tcp sport {} counter name sent
    }}
}}
",
            self.port
        );
        self.field.nft("node", &ruleset);
    }

    fn bytes(&self) -> f64 {
        self.field.counted("node", "bench", "sent")[1]
    }

    /// One endpoint more in a Service after the other, until enough or told to stop.
    fn changes(&self, which: Which, first: usize, count: usize, stop: &AtomicBool) -> Lags {
        let mut lags = Lags::default();
        for change in first..first + count {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let probe = change % PROBES;
            let awaited = awaited_ip(change + if which == Which::Nftproxy { 0 } else { 4096 });
            let wait = Await::start(self.field, probe_ip(probe), awaited, Duration::from_secs(30));
            // Not in step with anybody's period.
            std::thread::sleep(Duration::from_millis(50 + 37 * (change as u64 * 7 % 11)));
            let written = self.runtime.block_on(self.cluster.probe(probe, Some(awaited)));
            let arrived = wait.arrived();
            let lag = |since_when: Option<Instant>| match (since_when, &arrived) {
                (Some(earlier), Some(Arrival { sent, .. })) => since(earlier, *sent),
                _ => f64::NAN,
            };
            self.runtime.block_on(self.cluster.probe(probe, None));
            lags.acknowledged.push(lag(Some(written)));
            lags.told.push(lag(self.told.of(awaited)));
            lags.blind.extend(arrived.map(|arrival| arrival.blind.as_secs_f64()));
        }
        lags
    }

    /// Changes all over at a steady rate, and how soon others take effect meanwhile. Returns the rate
    /// that the server took, those times, and the share of one core that the proxy used.
    fn storm(&self, which: Which, proxy: &Proxy) -> (f64, Lags, f64) {
        let (cpu, began) = (proxy.cpu_seconds(), Instant::now());
        let stop = AtomicBool::new(false);
        let written = AtomicUsize::new(0);
        let lags = std::thread::scope(|scope| {
            let lags = scope.spawn(|| self.changes(which, 2048, 1024, &stop));
            let writes = u64::from(u32::try_from(self.extent.storm.as_secs()).expect("a minute"));
            let all = usize::try_from(writes * RATE).expect("few");
            // What the proxy before it left would be no change.
            let versions = all.div_ceil(self.cluster.services);
            let first = 1 + if which == Which::Nftproxy { 0 } else { versions };
            self.runtime.block_on(async {
                let start = tokio::time::Instant::now();
                let changes = (0..writes * RATE).map(|change| {
                    let (cluster, written) = (self.cluster, &written);
                    async move {
                        tokio::time::sleep_until(
                            start + Duration::from_millis(change * 1000 / RATE),
                        )
                        .await;
                        let change = usize::try_from(change).expect("few");
                        let index = change * 7919 % cluster.services;
                        cluster.change(index, first + change / cluster.services).await;
                        written.fetch_add(1, Ordering::Relaxed);
                    }
                });
                stream::iter(changes).buffer_unordered(64).collect::<Vec<()>>().await;
            });
            stop.store(true, Ordering::Relaxed);
            lags.join().expect("the probes end")
        });
        let took = began.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a figure")]
        let rate = written.load(Ordering::Relaxed) as f64 / took;
        (rate, lags, (proxy.cpu_seconds() - cpu) / took)
    }
}
