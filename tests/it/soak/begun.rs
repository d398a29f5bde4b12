//! What was begun while there were no tables: somebody else removed them, and they are put right. It was not
//! translated, the kernel remembers it so, and it has to be forgotten.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

use super::RANGES;
use super::blows::forget_begun;
use crate::e2e::eventually;
use crate::flips::Raise;
use crate::http::get;
use crate::namespace::{nft, refused};
use crate::net::{CLIENT, Daemon, NODE, Net, enter, in_netns, ip, number, wait_until};
use crate::objects::{CLUSTER, Svc, slice};
use crate::restart::arguments;
use crate::serve::{Outcome, tcp_at, udp_on, udp_socket};

/// Somebody else's table that needs connection tracking, so that it goes on without ours.
const OTHER: &str =
    "table ip other { chain c { type filter hook input priority 0; ct state new accept; }; }
     table ip6 other { chain c { type filter hook input priority 0; ct state new accept; }; }\n";

fn spawn(net: &Net) -> Daemon {
    let mut arguments = arguments(net);
    arguments.extend(["--nodeport-addresses", RANGES].map(str::to_owned));
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    Daemon::spawn(&net.name("node"), &arguments)
}

/// A Service with one endpoint, whose tables are gone while something is tried, and then back. Somebody else
/// needs connection tracking, so that it goes on.
fn while_there_are_no_tables<T>(meanwhile: impl FnOnce(&Net) -> T, then: impl FnOnce(&Net, T)) {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    let service = Svc {
        name: "web",
        cluster_ips: &[ADDRESS],
        ports: &[("tcp", "TCP", 80, 0), ("udp", "UDP", 80, 0)],
        spec: &[],
        balancer_ips: &[],
    };
    let ports = [("tcp", "TCP", 8080), ("udp", "UDP", 8080)];
    net.write("web.yaml", &(service.yaml() + &slice("web", "4", &ports, &["10.244.1.5!"])));
    let daemon = spawn(&net);
    // The flows that there were at the start are looked at.
    daemon.wait_for("looked for stale UDP flows");
    daemon.signal(Signal::SIGSTOP);
    let node = net.name("node");
    in_netns(&node, || nft(&["-f", "-"], &format!("{OTHER}delete table ip nftproxy")));
    let found = meanwhile(&net);
    daemon.signal(Signal::SIGCONT);
    in_netns(&node, || {
        let map = "list map ip nftproxy services";
        wait_until("the tables to be back", || refused(map).is_none());
    });
    then(&net, found);
}

const ADDRESS: &str = "10.96.0.10";
const ADDRESS6: &str = "fd00:10:96::10";

/// What it costs beyond the time until it is put right: connection tracking, if somebody else needs it, too,
/// remembers connections that were begun meanwhile without a translation, and takes another from the same port
/// for one of them. Where nobody does, that is so only while the tables are made: the kernel has their hooks
/// before it has their rules.
#[test]
fn a_connection_begun_while_there_were_no_tables_fails_until_it_is_forgotten() {
    let dial = |net: &Net, port| {
        let from = SocketAddr::new(ip(CLIENT[0]), port);
        let to = SocketAddr::new(ip(ADDRESS), 80);
        let outcome = in_netns(&net.name("client"), || tcp_at(Some(from), to));
        matches!(outcome, Outcome::Answered { .. })
    };
    while_there_are_no_tables(
        |net| assert!(!dial(net, 45001), "nothing translates"),
        |net, ()| {
            assert_eq!([45000, 45001].map(|port| dial(net, port)), [true, false]);
            assert_eq!(forget_begun(&net.name("node")), 1);
            assert_eq!([45000, 45001].map(|port| dial(net, port)), [true; 2]);
        },
    );
}

/// A client that keeps sending from one port would otherwise be sent nowhere for ever.
#[test]
fn a_udp_flow_begun_while_there_were_no_tables_is_swept_when_they_are_back() {
    while_there_are_no_tables(
        |net| {
            let to = SocketAddr::new(ip(ADDRESS), 80);
            let socket = in_netns(&net.name("client"), || udp_socket(to));
            assert!(!matches!(udp_on(&socket), Outcome::Answered { .. }), "nothing translates");
            socket
        },
        |_, socket| {
            wait_until("the flow to be translated", || {
                matches!(udp_on(&socket), Outcome::Answered { .. })
            });
        },
    );
}

/// Ports that datagrams come from: few, so that each meets what it left behind.
const PORTS: u16 = 61;

/// What those who send know.
#[derive(Default)]
struct Attack {
    stop: AtomicBool,
    sent: AtomicU64,
    /// Where their ports begin: others each time the tables go, so that flows begin then.
    first_port: AtomicU16,
}

/// A datagram that was not answered, and when.
struct Unanswered {
    began: Instant,
    ended: Instant,
    what: String,
}

/// Sends datagrams from a few ports to a ClusterIP and a node port.
fn send(net: &Net, family: usize, at: &Attack) -> Vec<Unanswered> {
    let Attack { stop, sent, first_port } = at;
    enter(&net.name("client"));
    let mut unanswered = Vec::new();
    for n in 0.. {
        if stop.load(Relaxed) {
            break;
        }
        let from = first_port.load(Relaxed) + n % PORTS;
        let from = SocketAddr::new(ip(CLIENT[family]), from);
        let cluster_ip = SocketAddr::new(ip([ADDRESS, ADDRESS6][family]), 80);
        let to = [cluster_ip, SocketAddr::new(ip(NODE[family]), 30080)][usize::from(n % 2)];
        let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None).unwrap();
        // What another test starts has the last socket as well, until it becomes its program.
        wait_until("the port to be free", || socket.bind(&from.into()).is_ok());
        socket.connect(&to.into()).unwrap();
        let socket = socket.into();
        let began = Instant::now();
        let mut outcome = udp_on(&socket);
        if outcome == Outcome::TimedOut {
            // Late on a busy machine, perhaps.
            outcome = udp_on(&socket);
        }
        sent.fetch_add(1, Relaxed);
        if !matches!(outcome, Outcome::Answered { .. }) {
            let what = format!("{from} to {to}: {outcome:?}");
            unanswered.push(Unanswered { began, ended: Instant::now(), what });
        }
    }
    unanswered
}

/// Tables go again and again; from when the flows were looked at behind each repair, until they go the next
/// time, every datagram is answered. `SOAK_FLUSHES` says how often.
#[test]
fn every_datagram_is_answered_once_the_flows_were_looked_at_behind_a_repair() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    let service = Svc {
        name: "web",
        cluster_ips: &[ADDRESS, ADDRESS6],
        ports: &[("udp", "UDP", 80, 30080)],
        spec: &["ipFamilyPolicy: RequireDualStack"],
        balancer_ips: &[],
    };
    let slices = [("4", "10.244.1.5!"), ("6", "fd00:10:244:1::5!")]
        .map(|(suffix, address)| slice("web", suffix, &[("udp", "UDP", 8080)], &[address]));
    net.write("web.yaml", &(service.yaml() + &slices.concat()));
    let daemon = spawn(&net);
    daemon.wait_for("synced");
    let node = net.name("node");
    // Passes that went to their end, one for each family.
    let passes = || -> u64 {
        let page = get(&net, "node", "127.0.0.1:10249".parse().unwrap(), "/metrics").unwrap();
        let line = page.body.lines().find(|l| l.starts_with("nftproxy_conntrack_sweeps_total "));
        line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
    };
    wait_until("flows to be looked at", || passes() == 2);
    let attack = Attack { first_port: AtomicU16::new(10_000), ..Attack::default() };
    let (unanswered, gone) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let mut longest = [Duration::ZERO; 2];
    let rounds = number("SOAK_FLUSHES", 6_u64);
    std::thread::scope(|scope| {
        for family in [0, 1] {
            let (net, attack, unanswered) = (&net, &attack, &unanswered);
            scope.spawn(move || {
                let found = send(net, family, attack);
                unanswered.lock().unwrap().extend(found);
            });
        }
        let _stop = Raise(&attack.stop);
        for round in 0..rounds {
            let before = passes();
            attack.first_port.fetch_add(PORTS, Relaxed);
            let began = Instant::now();
            in_netns(&node, || {
                match round % 2 {
                    0 => nft(&["flush", "ruleset"], ""),
                    _ => nft(
                        &["-f", "-"],
                        &format!("{OTHER}delete table ip nftproxy\ndelete table ip6 nftproxy"),
                    ),
                };
                // Repairs in a row are followed by growing pauses.
                eventually("the tables to be back", || {
                    let map = |family| refused(&format!("list map {family} nftproxy services"));
                    map("ip").or_else(|| map("ip6")).map_or(Ok(()), Err)
                });
            });
            let back = Instant::now();
            wait_until("flows to be looked at", || passes() >= before + 2);
            let looked = Instant::now();
            gone.lock().unwrap().push([began, looked]);
            longest = [longest[0].max(back - began), longest[1].max(looked - back)];
            let so_far = attack.sent.load(Relaxed);
            wait_until("every port to have sent", || attack.sent.load(Relaxed) > so_far + 400);
        }
    });
    let gone = gone.into_inner().unwrap();
    let (meanwhile, lost): (Vec<_>, Vec<_>) =
        unanswered.into_inner().unwrap().into_iter().partition(|u| {
            gone.iter().any(|[began, looked]| u.began <= *looked && u.ended >= *began)
        });
    eprintln!(
        "{rounds} times without tables; of {} datagrams {} not answered until flows were looked at, {} \
         after it; tables back in {:.1?} at most, flows looked at {:.1?} later",
        attack.sent.into_inner(),
        meanwhile.len(),
        lost.len(),
        longest[0],
        longest[1]
    );
    let lost: Vec<_> = lost.into_iter().map(|unanswered| unanswered.what).collect();
    assert!(lost.is_empty(), "{lost:#?}");
    let log = daemon.log();
    assert!(log.contains("removed stale UDP flows"), "nothing was begun meanwhile: {log}");
}
