//! Everything at once for a chosen time: Services, policies, node addresses and ServiceCIDRs change, the
//! program is killed, its memory is short or gone, its clock jumps, its tables are flushed, its API server is
//! killed, and clients connect all the while. What was promised stands beside what was seen.
//!
//! `SOAK_SECONDS` says for how long; `tests/soak/run` is the long run.

mod begun;
mod blows;
mod churn;
mod flow;
mod report;

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant, SystemTime};

use tokio::runtime::Runtime;

use self::blows::{BLOWS, Clock, Memory, REPAIR};
use self::churn::{DIALLED, Dialled, beside, dialled};
use self::flow::Flow;
use self::report::{Done, Seen};
use crate::control_plane::{ControlPlane, User};
use crate::e2e::{Cluster, said, with_cluster};
use crate::flips::Raise;
use crate::net::{Daemon, NODE, Net, in_netns, ip, number, patient, sysctl};
use crate::objects::CLUSTER;
use crate::restart::{Random, arguments};
use crate::serve::{Outcome, sctp, tcp_here, udp_on, udp_socket};

const PODS: [&str; 3] = ["a", "b", "remote"];
/// By then what a flush left behind is swept away, also if the program is killed before and starts again.
const SWEPT: Duration = Duration::from_secs(20);
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
    /// From when until when tables were gone.
    gone: Mutex<Vec<[SystemTime; 2]>>,
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

    /// How long after the tables were back a flow was still there that had begun while they were not, so that
    /// nobody translates it; None if it is another.
    fn left_by_a_flush(&self, flow: &Flow) -> Option<Duration> {
        let gone = self.gone.lock().unwrap();
        let [_, back] = gone.iter().find(|[from, until]| (from..=until).contains(&&flow.began))?;
        (!flow.is_translated()).then(|| back.elapsed().unwrap_or_default())
    }

    /// Connects without a pause, by one protocol.
    fn dial(&self, protocol: &'static str, family: usize) {
        let netns = self.net.name("client");
        // With the address that a datagram came from.
        let once = |to: SocketAddr| match protocol {
            "tcp" => (in_netns(&netns, || tcp_here(to)), None),
            "udp" => in_netns(&netns, || {
                let socket = udp_socket(to);
                (udp_on(&socket), socket.local_addr().ok())
            }),
            _ => match sctp(&netns, to, &PODS) {
                Some(by) => (Outcome::Answered { by, port: 8080, seen: to.ip() }, None),
                None => (Outcome::TimedOut, None),
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
            let (mut outcome, mut from) = once(to);
            let mut again = false;
            if outcome == Outcome::TimedOut {
                again = true;
                (outcome, from) = once(to);
            }
            let answered = matches!(outcome, Outcome::Answered { .. });
            let from = from.filter(|_| !answered && !self.in_repair(began));
            let flow = from.and_then(|from| Flow::of(&self.net.name("node"), from, to));
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
                    if let Some(after) = flow.as_ref().and_then(|flow| self.left_by_a_flush(flow)) {
                        seen.met += 1;
                        seen.met_after = seen.met_after.max(after);
                    } else {
                        let failure = format!("{protocol} {to}: {other:?}, {flow:?}");
                        *seen.failed.entry(failure).or_default() += 1;
                    }
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
        // So that of each flow is known when it began.
        in_netns(&self.net.name("node"), || sysctl("netfilter/nf_conntrack_timestamp", "1"));
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
            // Until everything was done once, on a machine however busy.
            while (began.elapsed() < time || done.blows < BLOWS)
                && !threads.iter().any(ScopedJoinHandle::is_finished)
            {
                std::thread::sleep(Duration::from_millis(random.below(500)));
                // For the last part one process lives: what grows, grows in it.
                let killing = began.elapsed() < time.mul_f64(0.4) || done.blows < BLOWS;
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
        assert!(seen.met_after < patient(SWEPT), "{:?} after a flush", seen.met_after);
        assert!(equal, "{differs}");
        let all_protocols =
            seen.connections.len() == 3 && seen.connections.values().all(|count| *count > 100);
        assert!(all_protocols, "{:?}", seen.connections);
        done.assert_at_rest();
        done.assert_each_was_dealt([
            self.memory.is_some(),
            self.clock.is_some(),
            self.api.is_some(),
        ]);
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
        gone: Mutex::default(),
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
