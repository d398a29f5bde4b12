//! Everything at once for a chosen time: Services, policies, node addresses and ServiceCIDRs change, the
//! program is killed and its memory is short, its tables are flushed, and clients connect all the while. What
//! was promised stands beside what was seen.
//!
//! `SOAK_SECONDS` says for how long; `tests/soak/run` is the long run. Not here: the API server going away
//! (`e2e`), and jumps of the clock. The program measures time by the monotonic clock, and a jump of the other
//! one cannot be had for one process without changing the machine's.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::flips::Raise;
use crate::namespace::{nft, refused};
use crate::net::{
    Daemon, NODE, Net, in_netns, ip, ip_batch_in, number, patient, wait_until, write_manifest,
};
use crate::objects::{CLUSTER, Svc, slice};
use crate::restart::{Random, arguments};
use crate::serve::{Outcome, sctp, tcp_here, udp};

/// What is dialled: who may answer, who always does, and the last part of its addresses.
struct Dialled {
    name: &'static str,
    pods: [&'static str; 2],
    number: u16,
}

const DIALLED: [Dialled; 2] = [
    Dialled { name: "web", pods: ["a", "b"], number: 10 },
    Dialled { name: "api", pods: ["remote", "b"], number: 20 },
];
const BESIDE: u64 = 24;
const PODS: [&str; 3] = ["a", "b", "remote"];

/// The program's memory. The debug build needs about half of it.
const MEMORY: u64 = 96 << 20;
/// What fails until a flushed table is back was not promised; nor are the answers of connections that were made
/// until then, which nobody translates back.
const REPAIR: Duration = Duration::from_secs(1);

fn address(pod: &str, family: usize) -> &'static str {
    match (pod, family) {
        ("a", 0) => "10.244.1.5!",
        ("a", _) => "fd00:10:244:1::5!",
        ("b", 0) => "10.244.1.6!",
        ("b", _) => "fd00:10:244:1::6!",
        (_, 0) => "10.244.2.9",
        (_, _) => "fd00:10:244:2::9",
    }
}

/// A Service that is dialled, with the first of its pods and perhaps the other, and anything that may change
/// without a connection noticing.
fn dialled(service: &Dialled, random: &mut Random) -> String {
    let Dialled { name, pods, number } = service;
    let addresses = [format!("10.96.0.{number}"), format!("fd00:10:96::{number}")];
    let affinity = ["sessionAffinity: None", "sessionAffinity: ClientIP"];
    let external = format!("externalIPs: [\"198.51.100.{number}\", \"fd00:198::{number}\"]");
    let ports = [
        ("tcp", "TCP", 80, 30000 + number),
        ("udp", "UDP", 80, 30000 + number),
        ("sctp", "SCTP", 80, 30000 + number),
    ];
    let mut text = Svc {
        name,
        cluster_ips: &addresses.each_ref().map(String::as_str),
        ports: &ports,
        spec: &[affinity[usize::from(random.below(3) == 0)], &external],
        balancer_ips: &[],
    }
    .yaml();
    let scheduler = ["random", "round-robin", "source-hash", "maglev"][random.index(4)];
    let annotated = format!("annotations: {{ nftproxy.dev/scheduler: {scheduler} }}, namespace");
    text = text.replacen("namespace", &annotated, 1);
    let pods = &pods[..=random.index(2)];
    for family in [0, 1] {
        let addresses: Vec<_> = pods.iter().map(|pod| address(pod, family)).collect();
        let ports = [("tcp", "TCP", 8080), ("udp", "UDP", 8080), ("sctp", "SCTP", 8080)];
        text += &slice(name, &family.to_string(), &ports, &addresses);
    }
    text
}

/// Services that nobody dials, of all kinds.
fn beside(random: &mut Random) -> String {
    let mut text = String::new();
    for i in 0..BESIDE {
        if random.below(4) == 0 {
            continue;
        }
        let name = format!("beside-{i}");
        let address = format!("10.97.{}.{}", random.below(3), i + 1);
        let policy = |random: &mut Random| ["Cluster", "Local"][random.index(2)];
        let spec = [
            format!("internalTrafficPolicy: {}", policy(random)),
            format!("externalTrafficPolicy: {}", policy(random)),
            format!("sessionAffinity: {}", ["None", "ClientIP"][random.index(2)]),
            format!("loadBalancerSourceRanges: [10.{}.0.0/16]", random.below(9)),
            format!("healthCheckNodePort: {}", 31000 + i),
        ];
        text += &Svc {
            name: &name,
            cluster_ips: &[&address],
            ports: &[("http", "TCP", 80, 30100 + u16::try_from(i).unwrap())],
            spec: &spec.each_ref().map(String::as_str),
            balancer_ips: &[&format!("203.0.113.{}", i + 1)],
        }
        .yaml();
        let endpoints = (0..random.below(5)).map(|e| format!("10.244.{}.{}", e % 2 + 1, e + 20));
        let endpoints: Vec<_> = endpoints.collect();
        let endpoints: Vec<_> = endpoints.iter().map(String::as_str).collect();
        text += &slice(&name, "4", &[("http", "TCP", 8080)], &endpoints);
    }
    text
}

impl Random {
    fn index(&mut self, limit: u64) -> usize {
        usize::try_from(self.below(limit)).unwrap()
    }
}

#[derive(Default)]
struct Seen {
    connections: BTreeMap<&'static str, u64>,
    /// No answer at first: the second try was answered.
    asked_again: u64,
    /// Failed while a flushed table was put right.
    in_repair: u64,
    failed: BTreeMap<String, u64>,
    misrouted: BTreeMap<String, u64>,
    changes: u64,
}

struct Soak<'a> {
    net: &'a Net,
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

    /// Changes everything that can change, without a pause.
    fn change(&self, mut random: Random) {
        let dir = self.net.manifests();
        let node = self.net.name("node");
        let mut extra = false;
        while !self.is_over() {
            match random.below(12) {
                0..5 => {
                    let service = &DIALLED[random.index(2)];
                    write_manifest(
                        &dir,
                        &format!("{}.yaml", service.name),
                        &dialled(service, &mut random),
                    );
                }
                5..8 => write_manifest(&dir, "beside.yaml", &beside(&mut random)),
                8 | 9 => {
                    let verb = if extra { "del" } else { "add" };
                    extra = !extra;
                    ip_batch_in(&node, &format!("addr {verb} 192.0.2.77/24 dev eth0\n"));
                }
                _ => write_manifest(
                    &dir,
                    "cidr.yaml",
                    &format!(
                        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {{ name: more }}\n\
                         spec: {{ cidrs: [10.{}.0.0/16] }}\n",
                        97 + random.below(3)
                    ),
                ),
            }
            self.seen.lock().unwrap().changes += 1;
            std::thread::sleep(Duration::from_millis(random.below(60)));
        }
    }
}

impl Soak<'_> {
    /// Does something to the program, or to its tables.
    fn disturb(
        &self,
        daemon: &mut Daemon,
        memory: Option<&Memory>,
        random: &mut Random,
        killing: bool,
        done: &mut Done,
    ) {
        let node = self.net.name("node");
        match random.below(4) {
            0 if killing => {
                daemon.end(Signal::SIGKILL);
                *daemon = spawn(self.net, memory);
                done.kills += 1;
                if random.below(2) == 0 {
                    daemon.wait_for("synced");
                }
            }
            1 if killing => {
                daemon.end(Signal::SIGTERM);
                *daemon = spawn(self.net, memory);
                done.stops += 1;
            }
            2 => {
                daemon.wait_for("synced");
                *self.restored.lock().unwrap() = None;
                let began = Instant::now();
                in_netns(&node, || {
                    nft(&["flush", "ruleset"], "");
                    let map = "list map ip6 nftproxy services";
                    wait_until("the tables to be back", || refused(map).is_none());
                });
                done.longest = done.longest.max(began.elapsed());
                // What was begun meanwhile is remembered without a translation for two minutes, and meets
                // whoever dials from the same port again.
                let delete = ["conntrack", "-D", "-p", "tcp", "--state", "SYN_SENT"];
                let deleted =
                    Command::new("ip").args(["netns", "exec", &node]).args(delete).output();
                // There may have been none.
                assert!(matches!(deleted.unwrap().status.code(), Some(0 | 1)));
                *self.restored.lock().unwrap() = Some(Instant::now());
                done.flushes += 1;
                std::thread::sleep(patient(REPAIR));
            }
            3 => {
                daemon.wait_for("synced");
                // Nobody dials it: it goes without anybody missing it.
                let element = "add element ip nftproxy cluster-ips { 10.99.99.99 }";
                in_netns(&node, || nft(&["-f", "-"], element));
                done.additions += 1;
            }
            _ => {}
        }
    }
}

/// A control group with little memory, of version 1 or 2, if this machine lets us make one.
struct Memory(PathBuf);

impl Memory {
    fn new() -> Option<Self> {
        let name = format!("nftp-soak-{}", std::process::id());
        for (root, limit) in [
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", "memory.max"),
            ("/sys/fs/cgroup/unified", "memory.max"),
        ] {
            let dir = Path::new(root).join(&name);
            if !Path::new(root).join("cgroup.procs").exists() || fs::create_dir(&dir).is_err() {
                continue;
            }
            if dir.join(limit).exists() && fs::write(dir.join(limit), MEMORY.to_string()).is_ok() {
                return Some(Self(dir));
            }
            drop(fs::remove_dir(&dir));
        }
        eprintln!("no control group can be made here: memory is not short");
        None
    }

    /// How often the limit was met.
    fn met(&self) -> String {
        let of = |name: &str| fs::read_to_string(self.0.join(name)).ok();
        let met = of("memory.failcnt").or_else(|| of("memory.events")).unwrap_or_default();
        met.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        drop(fs::remove_dir(&self.0));
    }
}

fn spawn(net: &Net, memory: Option<&Memory>) -> Daemon {
    let arguments = arguments(net);
    let mut arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    arguments.extend(["--nodeport-addresses", RANGES]);
    let daemon = Daemon::spawn(&net.name("node"), &arguments);
    if let Some(Memory(dir)) = memory {
        // From here, as `ip netns exec` has a `/sys` of its own. What it has by then is little.
        fs::write(dir.join("cgroup.procs"), daemon.pid().to_string()).unwrap();
    }
    daemon
}

const RANGES: &str = "192.0.2.0/24,fd00:192::/64";

/// Resident memory in KiB and open files of the program.
fn size(daemon: &Daemon) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let files = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    (line.trim().trim_end_matches(" kB").parse().unwrap(), files as u64)
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
    let memory = Memory::new();
    let mut daemon = spawn(&net, memory.as_ref());
    daemon.wait_for("synced");
    let soak = Soak {
        net: &net,
        seen: Mutex::default(),
        restored: Mutex::new(Some(Instant::now())),
        stop: AtomicBool::new(false),
    };
    let mut done = Done::default();
    std::thread::scope(|scope| {
        let seed = random.below(u64::MAX) | 1;
        let soak = &soak;
        let mut threads = vec![scope.spawn(move || soak.change(Random::seeded(seed)))];
        for protocol in ["tcp", "udp", "sctp"] {
            threads.extend([0, 1].map(|family| scope.spawn(move || soak.dial(protocol, family))));
        }
        // Also when something panics here: the scope waits for its threads.
        let stop = Raise(&soak.stop);
        let began = Instant::now();
        while began.elapsed() < time && !threads.iter().any(ScopedJoinHandle::is_finished) {
            std::thread::sleep(Duration::from_millis(random.below(500)));
            // For the last part one process lives: what grows, grows in it.
            let killing = began.elapsed() < time.mul_f64(0.4);
            soak.disturb(&mut daemon, memory.as_ref(), &mut random, killing, &mut done);
            if !killing {
                let (memory, files) = size(&daemon);
                done.sizes.push((began.elapsed().as_secs_f64() / 60.0, memory, files));
            }
        }
        drop(stop);
        for thread in threads {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    let mut differs = String::new();
    let began = Instant::now();
    let equal = loop {
        let (equal, text) = same_as_fresh(&net);
        if equal || began.elapsed() > patient(Duration::from_secs(10)) {
            break equal;
        }
        differs = text;
        std::thread::sleep(Duration::from_millis(100));
    };
    let seen = soak.seen.into_inner().unwrap();
    let limit = memory.as_ref().map_or("no limit".into(), |m| format!("limit met: {}", m.met()));
    eprintln!("{} s: {}", time.as_secs(), done.report(&seen, equal, size(&daemon), &limit));
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
    // Ports for health checks come and go with Services, and memory is kept for the next of them.
    let half = done.sizes.len() / 2;
    let most = |sizes: &[(f64, u64, u64)]| {
        let most = |of: fn(&(f64, u64, u64)) -> u64| sizes.iter().map(of).max().unwrap_or_default();
        (most(|size| size.1), most(|size| size.2))
    };
    let (before, after) = (most(&done.sizes[..half]), most(&done.sizes[half..]));
    assert!(after.0 <= before.0 + (24 << 10) && after.1 <= before.1 + 100, "{before:?} {after:?}");
    let dead = daemon.log().contains("panicked");
    assert!(!dead, "{}", daemon.log());
}

/// What was done.
#[derive(Default)]
struct Done {
    kills: u32,
    stops: u32,
    flushes: u32,
    additions: u32,
    /// Until flushed tables were back.
    longest: Duration,
    /// Minutes, KiB of memory, and open files of the process that was not killed.
    sizes: Vec<(f64, u64, u64)>,
}

impl Done {
    fn report(
        &self,
        seen: &Seen,
        equal: bool,
        (resident, open): (u64, u64),
        limit: &str,
    ) -> String {
        let Self { kills, stops, flushes, additions, longest, sizes } = self;
        let (kib, files) = (slope(sizes, |size| size.1), slope(sizes, |size| size.2));
        let sum = |of: &BTreeMap<String, u64>| of.values().sum::<u64>().to_string();
        let mut report = format!(
            "{kills} times kill -9, {stops} SIGTERM, {flushes} nft flush ruleset, {additions} foreign \
             elements, {} changes\n",
            seen.changes
        );
        for (what, promised, found) in [
            ("connections", "", format!("{:?}", seen.connections)),
            ("failed", "0", sum(&seen.failed)),
            ("answered by another Service's endpoint", "0", sum(&seen.misrouted)),
            ("answered at the second try", "", seen.asked_again.to_string()),
            ("failed while a flush was put right", "", seen.in_repair.to_string()),
            ("longest time for that, with nft's", "", format!("{longest:?}")),
            ("table as a fresh one at the end", "true", equal.to_string()),
            ("resident memory", "96 MiB at most", format!("{} MiB, {limit}", resident >> 10)),
            ("its slope, KiB a minute", "0", format!("{kib:.0}")),
            ("open files, and their slope", "0", format!("{open}, {files:.1}")),
        ] {
            let _ = writeln!(report, "  {what:40} promised {promised:15} seen {found}");
        }
        report
    }
}

/// What a fresh look at the manifests would change.
fn same_as_fresh(net: &Net) -> (bool, String) {
    let mut arguments = arguments(net);
    arguments[0] = "diff".into();
    let node = net.name("node");
    let output = Command::new("ip")
        .args(["netns", "exec", &node, env!("CARGO_BIN_EXE_nftproxy")])
        .args(arguments)
        .args(["--nodeport-addresses", RANGES])
        .output()
        .unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// By how much a value grows in a minute: least squares.
fn slope(sizes: &[(f64, u64, u64)], of: fn(&(f64, u64, u64)) -> u64) -> f64 {
    let float = |value: u64| f64::from(u32::try_from(value).unwrap());
    let n = float(sizes.len() as u64);
    let mean = |of: &dyn Fn(&(f64, u64, u64)) -> f64| sizes.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(&|size| size.0), mean(&|size| float(of(size))));
    let covariance: f64 = sizes.iter().map(|size| (size.0 - x) * (float(of(size)) - y)).sum();
    let variance: f64 = sizes.iter().map(|size| (size.0 - x).powi(2)).sum();
    if variance > 0.0 { covariance / variance } else { 0.0 }
}
