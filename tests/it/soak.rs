//! Everything at once for a chosen time: Services, policies, node addresses and ServiceCIDRs change, the
//! program is killed, its memory is short or gone, its clock jumps, its tables are flushed, its API server is
//! killed, and clients connect all the while. What was promised stands beside what was seen.
//!
//! `SOAK_SECONDS` says for how long; `tests/soak/run` is the long run.

mod blows;
mod churn;
mod report;

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::runtime::Runtime;

use self::blows::{Clock, Memory, REPAIR, forget_begun};
use self::churn::{DIALLED, Dialled, beside, dialled};
use self::report::{Done, Seen};
use crate::control_plane::{ControlPlane, User};
use crate::e2e::{Cluster, said, with_cluster};
use crate::flips::Raise;
use crate::namespace::{nft, refused};
use crate::net::{CLIENT, Daemon, NODE, Net, in_netns, ip, number, patient, wait_until};
use crate::objects::{CLUSTER, Svc, slice};
use crate::restart::{Random, arguments};
use crate::serve::{Outcome, sctp, tcp_at, tcp_here, udp, udp_on, udp_socket};

const PODS: [&str; 3] = ["a", "b", "remote"];
const RANGES: &str = "192.0.2.0/24,fd00:192::/64";

/// An API server, and what its future runs on.
struct Api<'a> {
    plane: Mutex<&'a mut ControlPlane>,
    runtime: &'a Runtime,
}

struct Soak<'a> {
    net: &'a Net,
    /// What the program and its commands are told, and what has to be in its log.
    arguments: Vec<String>,
    api: Option<&'a Api<'a>>,
    memory: Option<Memory>,
    clock: Option<Clock>,
    seen: Mutex<Seen>,
    /// When a flushed table was back last; None while it is not.
    restored: Mutex<Option<Instant>>,
    stop: AtomicBool,
}

impl Soak<'_> {
    fn is_over(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// Whether a table was being put right at this time or after it.
    fn in_repair(&self, began: Instant) -> bool {
        self.restored.lock().unwrap().is_none_or(|restored| began < restored + patient(REPAIR))
    }

    /// Connects without a pause, by one protocol.
    fn dial(&self, protocol: &'static str, family: usize) {
        let netns = self.net.name("client");
        let once = |to: SocketAddr| match protocol {
            "tcp" => in_netns(&netns, || tcp_here(to)),
            "udp" => udp(&netns, to),
            _ => match sctp(&netns, to, &PODS) {
                Some(by) => Outcome::Answered { by, port: 8080, seen: to.ip() },
                None => Outcome::TimedOut,
            },
        };
        for n in 0.. {
            if self.is_over() {
                return;
            }
            let Dialled { name, pods, number } = &DIALLED[n % 2];
            let (address, port) = match (n / 2 % 3, family) {
                (0, 0) => (format!("10.96.0.{number}"), 80),
                (0, _) => (format!("fd00:10:96::{number}"), 80),
                (1, 0) => (format!("198.51.100.{number}"), 80),
                (1, _) => (format!("fd00:198::{number}"), 80),
                _ => (NODE[family].to_owned(), 30000 + number),
            };
            let to = SocketAddr::new(ip(&address), port);
            let began = Instant::now();
            let mut outcome = once(to);
            let mut again = false;
            if outcome == Outcome::TimedOut {
                again = true;
                outcome = once(to);
            }
            let mut seen = self.seen.lock().unwrap();
            *seen.connections.entry(protocol).or_default() += 1;
            match outcome {
                Outcome::Answered { by, .. } if pods.contains(&by.as_str()) => {
                    seen.asked_again += u64::from(again);
                }
                Outcome::Answered { by, .. } => {
                    *seen.misrouted.entry(format!("{name} at {to}: {by}")).or_default() += 1;
                }
                _ if self.in_repair(began) => seen.in_repair += 1,
                other => {
                    *seen.failed.entry(format!("{protocol} {to}: {other:?}")).or_default() += 1;
                }
            }
            drop(seen);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn spawn(&self) -> Daemon {
        let arguments: Vec<_> = self.arguments.iter().map(String::as_str).collect();
        let by = self.clock.as_ref().map(Clock::starting).unwrap_or_default();
        let by: Vec<_> = by.iter().map(String::as_str).collect();
        let daemon = Daemon::spawn_by(&self.net.name("node"), &by, &arguments);
        if let Some(memory) = &self.memory {
            // From here, as `ip netns exec` has a `/sys` of its own. What it has by then is little.
            memory.add(daemon.pid());
        }
        daemon
    }

    /// Everything for so long, and what is to be seen at the end.
    fn run(&self, time: Duration, random: &mut Random) {
        let mut daemon = self.spawn();
        said(&daemon, "synced");
        let mut done = Done::default();
        std::thread::scope(|scope| {
            let seed = random.below(u64::MAX) | 1;
            let mut threads = vec![scope.spawn(move || match self.api {
                Some(api) => self.change_by_api(api, Random::seeded(seed)),
                None => self.change(Random::seeded(seed)),
            })];
            for protocol in ["tcp", "udp", "sctp"] {
                let families = [0, 1].into_iter();
                threads.extend(
                    families.map(|family| scope.spawn(move || self.dial(protocol, family))),
                );
            }
            // Also when something panics here: the scope waits for its threads.
            let stop = Raise(&self.stop);
            let began = Instant::now();
            while began.elapsed() < time && !threads.iter().any(ScopedJoinHandle::is_finished) {
                std::thread::sleep(Duration::from_millis(random.below(500)));
                // For the last part one process lives: what grows, grows in it.
                let killing = began.elapsed() < time.mul_f64(0.4);
                self.disturb(&mut daemon, random, killing, &mut done);
                if !killing {
                    let minutes = began.elapsed().as_secs_f64() / 60.0;
                    done.sizes.push((minutes, memory(&daemon, "RssAnon:"), files(&daemon)));
                }
            }
            drop(stop);
            for thread in threads {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            }
        });
        self.judge(&daemon, time, &done);
    }

    fn judge(&self, daemon: &Daemon, time: Duration, done: &Done) {
        // The longest pause of a watch that meets no API server is half a minute.
        let within = patient(Duration::from_secs(if self.api.is_some() { 60 } else { 10 }));
        let mut differs = String::new();
        let began = Instant::now();
        let equal = loop {
            let (equal, text) = self.same_as_fresh();
            if equal || began.elapsed() > within {
                break equal;
            }
            differs = text;
            std::thread::sleep(Duration::from_millis(100));
        };
        let seen = self.seen.lock().unwrap();
        eprintln!("{} s: {}", time.as_secs(), done.report(&seen, equal, memory(daemon, "VmRSS:")));
        assert!(
            seen.failed.is_empty() && seen.misrouted.is_empty(),
            "{:#?} {:#?}",
            seen.failed,
            seen.misrouted
        );
        assert!(equal, "{differs}");
        let all_protocols =
            seen.connections.len() == 3 && seen.connections.values().all(|count| *count > 100);
        assert!(all_protocols, "{:?}", seen.connections);
        done.assert_at_rest();
        assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    }

    /// What a fresh look at the objects would change.
    fn same_as_fresh(&self) -> (bool, String) {
        let node = self.net.name("node");
        let output = Command::new("ip")
            .args(["netns", "exec", &node, env!("CARGO_BIN_EXE_nftproxy"), "diff"])
            .args(&self.arguments[1..])
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Memory of the program in KiB: `VmRSS`, or `RssAnon`, which is without the parts of its file that were read
/// in: those come and go as others need memory.
fn memory(daemon: &Daemon, which: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(which)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Its open files.
fn files(daemon: &Daemon) -> u64 {
    fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count() as u64
}

fn soak<'a>(net: &'a Net, api: Option<&'a Api<'a>>, mut arguments: Vec<String>) -> Soak<'a> {
    arguments.extend(["--nodeport-addresses", RANGES].map(str::to_owned));
    Soak {
        net,
        arguments,
        api,
        memory: Memory::new(),
        clock: Clock::new(net),
        seen: Mutex::default(),
        restored: Mutex::new(Some(Instant::now())),
        stop: AtomicBool::new(false),
    }
}

#[test]
fn everything_at_once_keeps_what_is_promised() {
    let Some(net) = Net::new() else { return };
    let mut random = Random::new();
    let time = Duration::from_secs(number("SOAK_SECONDS", 12));
    net.write("cluster.yaml", CLUSTER);
    for service in &DIALLED {
        net.write(&format!("{}.yaml", service.name), &dialled(service, &mut random));
    }
    net.write("beside.yaml", &beside(&mut random));
    soak(&net, None, arguments(&net)).run(time, &mut random);
}

#[test]
fn everything_at_once_through_an_api_server_that_is_killed() {
    with_cluster(|cluster| {
        let mut random = Random::new();
        let time = Duration::from_secs(number("SOAK_SECONDS", 12));
        cluster.apply(CLUSTER.split("---\n").next().unwrap());
        for service in &DIALLED {
            cluster.apply(&dialled(service, &mut random));
        }
        let mut arguments = cluster.arguments(User::KubeProxy);
        arguments.insert(0, "run".to_owned());
        let Cluster { net, plane, runtime } = cluster;
        let api = Api { plane: Mutex::new(plane), runtime };
        soak(net, Some(&api), arguments).run(time, &mut random);
    });
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
    let daemon = soak(&net, None, arguments(&net)).spawn();
    // The flows that there were at the start are looked at.
    daemon.wait_for("looked for stale UDP flows");
    daemon.signal(Signal::SIGSTOP);
    let node = net.name("node");
    let gone =
        "table ip other { chain c { type filter hook input priority 0; ct state new accept; }; }
                delete table ip nftproxy";
    in_netns(&node, || nft(&["-f", "-"], gone));
    let found = meanwhile(&net);
    daemon.signal(Signal::SIGCONT);
    in_netns(&node, || {
        let map = "list map ip nftproxy services";
        wait_until("the tables to be back", || refused(map).is_none());
    });
    then(&net, found);
}

const ADDRESS: &str = "10.96.0.10";

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
