//! Tables that cannot be adopted are replaced as a whole, time after time, while clients send as fast as they can
//! to ClusterIPs and node ports: no connection is refused, and no datagram is lost.
//!
//! The library's own proxy is started in a thread on the node, once for each upgrade. Before it, the tables are
//! given a set that no layout has: they serve as before, and are as foreign to the next start as those of another
//! layout ([`crate::restart`] has such). `SOAK_UPGRADES` says how often.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nftproxy::model::{Event, Family, Protocol};
use nftproxy::nft::dataplane::Options;
use nftproxy::nft::fake::{Failure, FakeKernel};
use nftproxy::nft::kernel::{Applied, ApplyError, Kernel, LoadError, Loaded};
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::nft::transaction::{Op, Transaction};
use nftproxy::reconcile::{Committed, Proxy};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use socket2::{Domain, Socket, Type};

use crate::flips::{ENDPOINTS, Raise, serve, vip};
use crate::load::{Load, Outcome, refusals, source};
use crate::model::{all_listed, example, port, service, slice, state};
use crate::namespace::{in_namespace, nft};
use crate::net::{NODE, Net, enter, in_netns, ip, number, patient, sysctl, wait_until};

/// The Service with all endpoints, in both families.
fn web() -> Vec<Event> {
    let ports = [
        port("http", Protocol::Tcp, 80, 30080),
        port("stay", Protocol::Tcp, 81, 30081),
        port("datagrams", Protocol::Udp, 80, 30080),
    ];
    let vips = Family::BOTH.map(vip);
    let mut events = vec![Event::Service(service("web", &vips, &ports))];
    for (i, (_, addresses, number)) in ENDPOINTS.into_iter().enumerate() {
        let numbers = [
            ("http", Protocol::Tcp, number),
            ("stay", Protocol::Tcp, 8081),
            ("datagrams", Protocol::Udp, number),
        ];
        events.extend(addresses.into_iter().zip(["4", "6"]).map(|(address, family)| {
            Event::EndpointSlice(slice("web", &format!("{family}-{i}"), &numbers, &[address]))
        }));
    }
    events
}

/// A start of the program: its first commit.
fn start(events: Vec<Event>) -> Committed {
    let mut proxy = Proxy::new(state(), NetlinkKernel::open().unwrap());
    events.into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
    proxy.commit().unwrap()
}

fn listed() -> String {
    nft(&["list", "ruleset"], "")
}

/// Has the next start take the tables for foreign ones.
fn estrange() {
    let sets = Family::BOTH.map(|f| format!("add set {f} nftproxy of-old {{ type mark; }}"));
    nft(&["-f", "-"], &sets.join("\n"));
}

/// A network with the tables in force; and the tables.
fn prepare() -> Option<(Net, String)> {
    let net = Net::new()?;
    let wanted = in_netns(&net.name("node"), || {
        start(web());
        // What is remembered of flows and of connections that were reset need not stay for long.
        sysctl("netfilter/nf_conntrack_tcp_timeout_close", "1");
        sysctl("netfilter/nf_conntrack_udp_timeout", "1");
        listed()
    });
    Some((net, wanted))
}

/// Replaces the tables so often.
fn upgrade(net: &Net, wanted: &str) -> u32 {
    let upgrades = number("SOAK_UPGRADES", 10_u32);
    in_netns(&net.name("node"), || {
        for _ in 0..upgrades {
            estrange();
            let Committed { operations, adopted, set_aside, .. } = start(web());
            assert!(adopted && operations > 0 && set_aside == 0, "{operations} {set_aside}");
            assert_eq!(listed(), wanted);
        }
    });
    upgrades
}

#[test]
fn tables_that_are_replaced_refuse_no_connection() {
    let Some((net, wanted)) = prepare() else { return };
    drop(serve(&net));
    let dialled = [
        ("192.0.2.100", vip(Family::V4), 80),
        ("fd00:192::100", vip(Family::V6), 80),
        ("192.0.2.101", NODE[0], 30080),
        ("fd00:192::101", NODE[1], 30080),
    ];
    let dialled =
        dialled.map(|(from, to, port)| (source(&net, from), SocketAddr::new(ip(to), port)));
    let load = Load::start(&net, &dialled, Duration::ZERO);
    let upgrades = upgrade(&net, &wanted);
    // Of so many connections in a row, a SYN in half a million is sent again also where nothing is replaced: what
    // is lost is told by datagrams.
    let Outcome { connections, repeated } = load.none_refused();
    eprintln!("{upgrades} upgrades, {connections} connections meanwhile, {repeated} begun twice");
}

/// Datagrams that are on their way at most: more than so many might be dropped where they wait for a processor.
const ON_THEIR_WAY: usize = 500;

/// Counts what comes to the endpoints, by family.
fn count_datagrams(net: &Net) -> Arc<[AtomicU64; 2]> {
    let counts = Arc::<[AtomicU64; 2]>::default();
    for (pod, _, port) in ENDPOINTS {
        let socket = in_netns(&net.name(pod), || {
            let socket = Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
            setsockopt(&socket, RcvBufForce, &(8 << 20)).unwrap();
            socket.bind(&SocketAddr::new(ip("::"), port).into()).unwrap();
            std::net::UdpSocket::from(socket)
        });
        let counts = counts.clone();
        // It ends with the test process.
        std::thread::spawn(move || {
            while let Ok((_, from)) = socket.recv_from(&mut [0; 16]) {
                let mapped = from.ip().to_canonical().is_ipv4();
                counts[usize::from(!mapped)].fetch_add(1, Relaxed);
            }
        });
    }
    counts
}

/// Sends datagrams, each from another port, so that each is a flow of its own. How many, and how many of them
/// never came.
fn send(from: IpAddr, to: SocketAddr, came: &AtomicU64, stop: &AtomicBool) -> (u64, u64) {
    let mut ports = (2_000..64_000).cycle();
    let (mut sent, mut lost) = (0, 0);
    let before = came.load(Relaxed);
    while !stop.load(Relaxed) {
        for port in ports.by_ref().take(ON_THEIR_WAY) {
            let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None).unwrap();
            socket.bind(&SocketAddr::new(from, port).into()).unwrap();
            sent += u64::try_from(socket.send_to(b"?", &to.into()).unwrap()).unwrap();
        }
        let until = Instant::now() + patient(Duration::from_secs(2));
        let missing = || sent - lost - (came.load(Relaxed) - before);
        while missing() > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_micros(50));
        }
        lost += missing();
    }
    (sent, lost)
}

#[test]
fn tables_that_are_replaced_lose_no_datagram() {
    let Some((net, wanted)) = prepare() else { return };
    let client = net.name("client");
    let came = count_datagrams(&net);
    let dialled = [
        (source(&net, "192.0.2.100"), SocketAddr::new(ip(vip(Family::V4)), 80)),
        (source(&net, "fd00:192::101"), SocketAddr::new(ip(NODE[1]), 30080)),
    ];
    // Whoever is to be reached is known to the link by then.
    for ((_, to), came) in dialled.iter().zip(&*came) {
        wait_until("datagrams to come through", || {
            let domain = Domain::for_address(*to);
            in_netns(&client, || {
                let socket = Socket::new(domain, Type::DGRAM, None).unwrap();
                socket.send_to(b"?", &(*to).into()).unwrap();
            });
            came.load(Relaxed) > 100
        });
    }
    std::thread::sleep(Duration::from_millis(200));
    let refused = refusals(&client);
    let stop = AtomicBool::new(false);
    let (upgrades, outcomes) = std::thread::scope(|scope| {
        let send = |((from, to), came)| {
            let (client, stop) = (&client, &stop);
            scope.spawn(move || {
                enter(client);
                send(from, to, came, stop)
            })
        };
        let senders: Vec<_> = dialled.into_iter().zip(&*came).map(send).collect();
        let raise = Raise(&stop);
        let upgrades = upgrade(&net, &wanted);
        drop(raise);
        let outcomes: Vec<_> = senders.into_iter().map(|sender| sender.join().unwrap()).collect();
        (upgrades, outcomes)
    });
    let refused = refusals(&client) - refused;
    eprintln!("{upgrades} upgrades, datagrams sent and lost {outcomes:?}, {refused} refused");
    assert!(outcomes.iter().all(|(sent, _)| *sent > 0));
    assert_eq!((outcomes.iter().map(|(_, lost)| lost).sum::<u64>(), refused), (0, 0));
}

/// A kernel that writes down how a table is replaced, and looks whether what stands in is whole.
#[derive(Default)]
struct Watched {
    kernel: FakeKernel,
    done: Vec<&'static str>,
    /// Which of the next transactions fails, and how.
    fails: Option<(usize, Failure)>,
}

impl Watched {
    fn of(kernel: FakeKernel) -> Self {
        Self { kernel, ..Self::default() }
    }

    fn count_down(&mut self) {
        self.fails = match self.fails.take() {
            Some((0, failure)) => {
                self.kernel.fail.push(failure);
                None
            }
            fails => fails.map(|(left, failure)| (left - 1, failure)),
        };
    }
}

impl Kernel for Watched {
    fn load(&mut self, options: &Options) -> Result<Loaded, LoadError> {
        self.kernel.load(options)
    }

    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.count_down();
        let replaces = transaction.ops.iter().any(|op| matches!(op, Op::DeleteTable(_)));
        let outcome = self.kernel.apply(transaction);
        if replaces {
            self.done.push("replaced");
            let kernel = &self.kernel;
            let whole = || kernel.elements().eq(kernel.elements_of_stand_ins());
            // Unless there is no room for it.
            let stands_in = kernel.elements_of_stand_ins().next().is_some();
            assert!(outcome.is_err() || !stands_in || whole());
        }
        outcome
    }

    fn apply_to_stand_in(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.count_down();
        let adds = transaction.ops.iter().any(|op| matches!(op, Op::AddTable(_)));
        self.done.push(if adds { "stands in" } else { "gone" });
        self.kernel.apply_to_stand_in(transaction)
    }

    fn let_packets_pass(&mut self) {
        self.done.push("packets passed");
    }
}

fn started(kernel: Watched) -> Proxy<Watched> {
    let mut proxy = Proxy::new(state(), kernel);
    example().into_iter().chain(all_listed()).for_each(|event| proxy.observe(event));
    proxy
}

/// The tables of the example, and the same of another layout.
fn of_another_layout() -> (String, FakeKernel) {
    let mut proxy = started(Watched::default());
    proxy.commit().unwrap();
    let Watched { kernel, done, .. } = proxy.kernel_mut();
    assert!(done.is_empty(), "there was nothing to replace: {done:?}");
    let wanted = kernel.dump();
    kernel.estrange();
    (wanted, kernel.clone())
}

fn is_as_wanted(proxy: &mut Proxy<Watched>, wanted: &str) -> bool {
    assert!(proxy.plan().unwrap().is_empty() && !proxy.is_stale());
    let kernel = &mut proxy.kernel_mut().kernel;
    kernel.load(&Options::default()).unwrap().stand_ins.is_empty() && kernel.dump() == wanted
}

#[test]
fn a_second_table_stands_in_from_before_a_table_is_replaced_until_packets_have_passed() {
    let (wanted, foreign) = of_another_layout();
    let mut proxy = started(Watched::of(foreign));
    assert!(proxy.commit().unwrap().operations > 0);
    let steps = ["stands in", "packets passed", "replaced", "packets passed", "gone"];
    assert_eq!(proxy.kernel_mut().done, steps);
    assert!(is_as_wanted(&mut proxy, &wanted));
}

#[test]
fn an_upgrade_that_fails_or_is_killed_half_way_is_completed_by_the_next_try() {
    let (wanted, foreign) = of_another_layout();
    let failures =
        [Failure::Refuse(0, libc::ENOMEM), Failure::Send(libc::EIO), Failure::Answer(libc::EIO)];
    for failing in 0..3 {
        for failure in failures {
            // See below.
            if matches!((failing, failure), (0, Failure::Refuse(..))) {
                continue;
            }
            for killed in [false, true] {
                let fails = Some((failing, failure));
                let mut proxy = started(Watched { fails, ..Watched::of(foreign.clone()) });
                proxy.commit().unwrap_err();
                assert!(proxy.is_stale(), "{failing} {failure:?}");
                if killed {
                    proxy = started(Watched::of(proxy.kernel_mut().kernel.clone()));
                }
                proxy.commit().unwrap();
                assert!(is_as_wanted(&mut proxy, &wanted), "{failing} {failure:?} {killed}");
            }
        }
    }
}

#[test]
fn where_there_is_no_room_for_a_second_table_a_table_is_replaced_without() {
    let (wanted, foreign) = of_another_layout();
    let fails = Some((0, Failure::Refuse(0, libc::ENOMEM)));
    let mut proxy = started(Watched { fails, ..Watched::of(foreign) });
    proxy.commit().unwrap();
    assert_eq!(proxy.kernel_mut().done, ["stands in", "replaced"]);
    assert!(is_as_wanted(&mut proxy, &wanted));
}

#[test]
fn a_table_that_was_left_to_stand_in_goes_at_the_next_start() {
    in_namespace(|| {
        assert!(start(example()).operations > 0);
        let wanted = listed();
        nft(&["-f", "-"], "add table ip nftproxy-stand-in; add chain ip nftproxy-stand-in c");
        assert_eq!(start(example()).operations, 0);
        assert_eq!(listed(), wanted);
    });
}
