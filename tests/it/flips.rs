//! No connection is lost while the table changes under it: clients connect without a pause while
//! the Service they dial gains and loses endpoints thousands of times.
//!
//! The library's own proxy is driven in a thread on the node, so that one commit follows the other;
//! the daemon would pace itself. Every connection has an address and port of its own, so that no
//! remembered translation can stand in for a new choice. A lost or refused SYN shows as a connect
//! that fails, or in the kernel's count of repeated SYNs.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::Sender;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use nftproxy::model::{Event, Family, Kind, Protocol};
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::reconcile::{Committed, Proxy};
use nftproxy::settings::Settings;
use nftproxy::state::State;
use socket2::{Domain, Socket, Type};

use crate::model::{all_listed, name, node, port, service, slice};
use crate::net::{
    Net, POD_A, POD_B, REMOTE, enter, in_netns, ip, ip_batch_in, number, patient, sysctl,
    tcp_counter, wait_until,
};

/// Connections in one phase, at least. Fewer where a kernel is emulated (tests/kernels).
static CONNECTIONS: LazyLock<u64> = LazyLock::new(|| number("NFTPROXY_TEST_FLIPS", 20_000));
/// Commits meanwhile, at least.
static COMMITS: LazyLock<u64> = LazyLock::new(|| *CONNECTIONS * 3 / 10);
/// Shared chains that nobody uses are removed now and then, and made again at the next flip. The
/// daemon does so when nothing was committed for a while; here that is a moment.
const COLLECT_EVERY: u64 = 21;
const COLLECT_AFTER: Duration = Duration::from_millis(1);
/// Threads that connect.
const CLIENTS: u16 = 3;
/// Ports a client connects from, each once in a phase.
const SOURCE_PORTS: std::ops::Range<u16> = 2_000..64_000;
/// How long a connect may take. Every SYN that is lost costs a second.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// A phase takes a few seconds; one that takes longer than this failed.
const PHASE_WITHIN: Duration = Duration::from_secs(60);

/// The endpoints of the Service: namespace, address by family, port.
pub(crate) const ENDPOINTS: [(&str, [&str; 2], u16); 5] = [
    ("a", POD_A, 9001),
    ("b", POD_B, 9001),
    ("remote", REMOTE, 9001),
    ("a", POD_A, 9002),
    ("b", POD_B, 9002),
];

/// Connections that each endpoint was given.
pub(crate) type Accepted = Arc<[AtomicU64; ENDPOINTS.len()]>;

/// A time of flips.
struct Phase {
    family: Family,
    /// The endpoints after each flip, one bit each; over and over.
    flips: &'static [u8],
    /// Whether another Service is made before each flip and deleted after it.
    beside: bool,
}

const ONE_AND_TWO: &[u8] = &[0b00001, 0b00011];
/// All sizes, growing and shrinking at either end, and with endpoints replaced.
const ONE_TO_FIVE: &[u8] = &[
    0b00001, 0b00011, 0b00111, 0b01111, 0b11111, 0b11110, 0b11100, 0b11000, 0b10000, 0b00001,
    0b11111, 0b00010, 0b10101, 0b01010, 0b00100, 0b11011,
];

/// What happened in a phase.
#[derive(Debug)]
struct Outcome {
    connections: u64,
    flips: u64,
    beside: u64,
    failures: BTreeMap<String, u64>,
    accepted: [u64; ENDPOINTS.len()],
    repeated_syns: u64,
    timeouts: u64,
}

pub(crate) fn vip(family: Family) -> &'static str {
    if family == Family::V4 { "10.96.0.10" } else { "fd00:10:96::10" }
}

/// Starts a server for each endpoint that accepts and forgets.
pub(crate) fn serve(net: &Net) -> Accepted {
    let accepted = Accepted::default();
    for (i, (pod, _, port)) in ENDPOINTS.into_iter().enumerate() {
        let listener: TcpListener = in_netns(&net.name(pod), || {
            // A queue that cannot overflow: a SYN that a busy server drops is not what is counted.
            sysctl("core/somaxconn", "65535");
            let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::new(ip("::"), port).into()).unwrap();
            socket.listen(65535).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket.into()
        });
        let accepted = accepted.clone();
        std::thread::spawn(move || {
            loop {
                // Many at a time: a thread that wakes for each takes the time they need.
                std::thread::sleep(Duration::from_millis(10));
                while listener.accept().is_ok() {
                    accepted[i].fetch_add(1, Relaxed);
                }
            }
        });
    }
    accepted
}

/// The proxy on the node, and the Service's endpoints as it knows them.
struct Flipper {
    proxy: Proxy<NetlinkKernel>,
    family: Family,
    endpoints: u8,
    flips: u64,
    beside: u64,
}

impl Flipper {
    /// Programs the Service with its first endpoint. The thread is in the node's namespace.
    fn start(phase: &Phase) -> Self {
        let state = State::new(Settings::default(), node());
        let proxy = Proxy::new(state, NetlinkKernel::open().unwrap());
        let mut this = Self { proxy, family: phase.family, endpoints: 0, flips: 0, beside: 0 };
        let web = service("web", &[vip(this.family)], &[port("", Protocol::Tcp, 80, 0)]);
        this.proxy.observe(Event::Service(web));
        all_listed().for_each(|event| this.proxy.observe(event));
        this.set(phase.flips[0]);
        this.proxy.commit().unwrap();
        this
    }

    /// Gives the Service these endpoints: each is a slice of its own, as their ports differ.
    fn set(&mut self, endpoints: u8) {
        for (i, (_, addresses, port)) in ENDPOINTS.into_iter().enumerate() {
            let (before, after) = (self.endpoints >> i & 1, endpoints >> i & 1);
            let suffix = i.to_string();
            if before < after {
                let address = addresses[usize::from(self.family == Family::V6)];
                let slice = slice("web", &suffix, &[("", Protocol::Tcp, port)], &[address]);
                self.proxy.observe(Event::EndpointSlice(slice));
            } else if before > after {
                let gone = Event::Gone(Kind::EndpointSlice, name(&format!("web-{suffix}")));
                self.proxy.observe(gone);
            }
        }
        self.endpoints = endpoints;
    }

    /// Commits; the kernel must take the change as it is, and there must be one.
    fn commit(&mut self) {
        let Committed { operations, adopted, set_aside, .. } = self.proxy.commit().unwrap();
        assert!(operations > 0 && !adopted && set_aside == 0, "{operations} {adopted} {set_aside}");
    }

    fn flip(&mut self, endpoints: u8, beside: bool) {
        if beside {
            let address = if self.family == Family::V4 { "10.96.0.11" } else { "fd00:10:96::11" };
            let ports = [port("", Protocol::Tcp, 80, 0), port("x", Protocol::Udp, 53, 30053)];
            let numbers = [("", Protocol::Tcp, 9001), ("x", Protocol::Udp, 53)];
            let at = ENDPOINTS
                .map(|(_, addresses, _)| addresses[usize::from(self.family == Family::V6)]);
            let used = &at[..=usize::try_from(self.beside / 2 % 3).unwrap()];
            self.proxy.observe(Event::Service(service("other", &[address], &ports)));
            self.proxy.observe(Event::EndpointSlice(slice("other", "x", &numbers, used)));
            self.commit();
            self.beside += 1;
        }
        self.set(endpoints);
        self.commit();
        self.flips += 1;
        if beside {
            self.proxy.observe(Event::Gone(Kind::Service, name("other")));
            self.commit();
            self.beside += 1;
        }
        if self.flips.is_multiple_of(COLLECT_EVERY) {
            std::thread::sleep(COLLECT_AFTER);
            self.proxy.collect_idle().unwrap();
        }
    }
}

/// Connects and resets, once: no state stays behind on either side.
pub(crate) fn connect(from: SocketAddr, to: SocketAddr) -> std::io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_user_timeout(Some(CONNECT_WITHIN))?;
    socket.bind(&from.into())?;
    socket.connect(&to.into())
}

/// What the threads of a phase tell each other.
#[derive(Default)]
struct Progress {
    connections: AtomicU64,
    commits: AtomicU64,
    failures: Mutex<BTreeMap<String, u64>>,
    /// The clients have done their part.
    done: AtomicBool,
    /// The proxy is gone, whether by a panic or not.
    over: AtomicBool,
}

/// Sets a flag when it goes, also in a panic.
pub(crate) struct Raise<'a>(pub(crate) &'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Flips until the clients are done: how often, and how often the other Service changed.
fn flip(phase: &Phase, progress: &Progress, ready: Sender<()>) -> (u64, u64) {
    let _raise = Raise(&progress.over);
    let mut flipper = Flipper::start(phase);
    // Connections end with a reset; what is remembered of them need not pile up.
    sysctl("netfilter/nf_conntrack_tcp_timeout_close", "1");
    ready.send(()).unwrap();
    drop(ready);
    for endpoints in phase.flips.iter().cycle().skip(1) {
        flipper.flip(*endpoints, phase.beside);
        progress.commits.store(flipper.flips + flipper.beside, Relaxed);
        if progress.done.load(Relaxed) {
            break;
        }
    }
    // The kernel holds what the proxy believes.
    flipper.proxy.collect_idle().unwrap();
    assert_eq!(flipper.proxy.plan().unwrap(), []);
    (flipper.flips, flipper.beside)
}

/// Connects from one address until enough happened.
fn dial(from: IpAddr, to: SocketAddr, progress: &Progress) {
    let deadline = Instant::now() + patient(PHASE_WITHIN);
    for port in SOURCE_PORTS {
        let connections = progress.connections.load(Relaxed);
        let enough = connections >= *CONNECTIONS && progress.commits.load(Relaxed) >= *COMMITS;
        if enough || progress.over.load(Relaxed) {
            return;
        }
        assert!(Instant::now() < deadline, "{connections} connections and no end");
        if connections >= 2 * *CONNECTIONS {
            // The commits are behind: leave them some time.
            std::thread::sleep(Duration::from_micros(200));
        }
        if let Err(error) = connect(SocketAddr::new(from, port), to) {
            *progress.failures.lock().unwrap().entry(error.to_string()).or_default() += 1;
        }
        progress.connections.fetch_add(1, Relaxed);
    }
}

/// Gives the client namespace an address for each client of a phase.
fn sources(net: &Net, family: Family, number: u16) -> Vec<IpAddr> {
    let source = |client| {
        let last = 100 + number * CLIENTS + client;
        let (address, len) = match family {
            Family::V4 => (format!("192.0.2.{last}"), 24),
            Family::V6 => (format!("fd00:192::{last}"), 64),
        };
        ip_batch_in(&net.name("client"), &format!("addr add {address}/{len} dev eth0 nodad\n"));
        ip(&address)
    };
    (0..CLIENTS).map(source).collect()
}

fn run(net: &Net, accepted: &Accepted, number: u16, phase: &Phase) -> Outcome {
    let (client, node) = (net.name("client"), net.name("node"));
    let counters = || ["TCPSynRetrans", "TCPTimeouts"].map(|name| tcp_counter(&client, name));
    let accepts = || accepted.each_ref().map(|count| count.load(Relaxed));
    let sources = sources(net, phase.family, number);
    let to = SocketAddr::new(ip(vip(phase.family)), 80);
    let (counted, accepted_before) = (counters(), accepts());

    let progress = Progress::default();
    let (ready, started) = std::sync::mpsc::channel();
    let (flips, beside) = std::thread::scope(|scope| {
        let flipping = scope.spawn(|| {
            enter(&node);
            flip(phase, &progress, ready)
        });
        // An error: it panicked before it was ready.
        if started.recv().is_ok() {
            let dial = |from| {
                let (client, progress) = (&client, &progress);
                move || {
                    enter(client);
                    dial(from, to, progress);
                }
            };
            let clients: Vec<_> = sources.into_iter().map(|from| scope.spawn(dial(from))).collect();
            let _raise = Raise(&progress.done);
            clients.into_iter().for_each(|client| client.join().unwrap());
        }
        flipping.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });

    let connections = progress.connections.into_inner();
    let failures: BTreeMap<String, u64> = progress.failures.into_inner().unwrap();
    let accepted = || {
        let now = accepts();
        std::array::from_fn(|i| now[i] - accepted_before[i])
    };
    if failures.is_empty() {
        let all = || accepted().iter().sum::<u64>() == connections;
        let what = format!("{connections} connections to be accepted, after {flips} flips");
        wait_until(&what, all);
    }
    let [repeated_syns, timeouts] = {
        let now = counters();
        std::array::from_fn(|i| now[i] - counted[i])
    };
    let accepted = accepted();
    Outcome { connections, flips, beside, failures, accepted, repeated_syns, timeouts }
}

/// Nothing was lost, and it was put to the test: every endpoint that was ever in force got a share.
fn check(phase: &Phase, outcome: &Outcome) {
    let Outcome { connections, flips, beside, .. } = *outcome;
    assert!(connections >= *CONNECTIONS && flips + beside >= *COMMITS, "{outcome:?}");
    assert_eq!(beside, if phase.beside { 2 * flips } else { 0 }, "{outcome:?}");
    assert_eq!(outcome.failures, BTreeMap::new(), "{outcome:?}");
    assert_eq!((outcome.repeated_syns, outcome.timeouts), (0, 0), "{outcome:?}");
    let ever = phase.flips.iter().fold(0, |ever, endpoints| ever | endpoints);
    for (i, accepted) in outcome.accepted.iter().enumerate() {
        let used = ever >> i & 1 == 1;
        let least = if used { connections / 100 } else { 0 };
        assert!(*accepted >= least && (used || *accepted == 0), "endpoint {i}: {outcome:?}");
    }
}

fn flips(phases: &[Phase]) {
    let Some(net) = Net::new() else { return };
    let accepted = serve(&net);
    for (number, phase) in (0..).zip(phases) {
        let outcome = run(&net, &accepted, number, phase);
        eprintln!("{outcome:?}");
        check(phase, &outcome);
    }
}

#[test]
fn no_connection_is_lost_while_endpoints_come_and_go() {
    flips(&[
        Phase { family: Family::V4, flips: ONE_AND_TWO, beside: false },
        Phase { family: Family::V6, flips: ONE_TO_FIVE, beside: false },
    ]);
}

#[test]
fn no_connection_is_lost_while_another_service_comes_and_goes() {
    flips(&[
        Phase { family: Family::V6, flips: ONE_AND_TWO, beside: true },
        Phase { family: Family::V4, flips: ONE_TO_FIVE, beside: true },
    ]);
}
