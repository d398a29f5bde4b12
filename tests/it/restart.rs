//! The program stops, is killed, is replaced by another version, and starts again, while clients
//! connect without a pause and others hold connections: none of them notices.
//!
//! How often it is killed is `SOAK_KILLS`, and how often upgraded `SOAK_UPGRADES`; a normal run takes
//! a few, and `tests/soak/run` many. `SOAK_SEED` repeats a run, as far as the machine does.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nftproxy::model::Family;
use nftproxy::nft::names::LAYOUT;

use crate::flips::{ENDPOINTS, connect, serve, vip};
use crate::namespace::nft;
use crate::net::{
    Daemon, Net, enter, in_netns, ip, ip_batch_in, sysctl, tcp_counter, wait_until, write_manifest,
};
use crate::objects::{CLUSTER, Svc, slice};

/// Addresses that clients connect from, by family; each has all ports.
const SOURCES: [&str; 2] = ["192.0.2.100", "fd00:192::100"];

/// Services that change beside the one that is dialled.
const BESIDE: usize = 30;

fn times(variable: &str, usually: u32) -> u32 {
    std::env::var(variable).map_or(usually, |text| text.parse().expect(variable))
}

/// Numbers that look random; the seed is printed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let seed = std::env::var("SOAK_SEED").map_or(now.as_secs(), |s| s.parse().unwrap());
        eprintln!("SOAK_SEED={seed}");
        Self(seed | 1)
    }

    pub(crate) fn seeded(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

#[derive(Default)]
struct Progress {
    connections: AtomicU64,
    failures: Mutex<BTreeMap<String, u64>>,
    changes: AtomicU64,
    stop: AtomicBool,
}

/// Clients that connect, one of each family; and connections that stay.
struct Load {
    netns: String,
    progress: Arc<Progress>,
    threads: Vec<JoinHandle<()>>,
    repeated: u64,
    refused: u64,
    established: Vec<(TcpStream, BufReader<TcpStream>)>,
}

/// Refusals that a namespace was sent by ICMP, of both families.
fn refusals(netns: &str) -> u64 {
    in_netns(netns, || {
        let read = |file| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
        let v4 = read("snmp");
        let mut rows = v4.lines().filter(|line| line.starts_with("Icmp:"));
        let (names, values) = (rows.next().unwrap(), rows.next().unwrap());
        let mut pairs = names.split_whitespace().zip(values.split_whitespace());
        let (_, v4) = pairs.find(|(name, _)| *name == "InDestUnreachs").unwrap();
        let v6 = read("snmp6");
        let v6 = v6.lines().find_map(|line| line.strip_prefix("Icmp6InDestUnreachs")).unwrap();
        [v4, v6].map(|count| count.trim().parse::<u64>().unwrap()).iter().sum()
    })
}

fn repeated_syns(netns: &str) -> u64 {
    ["TCPSynRetrans", "TCPTimeouts"].map(|name| tcp_counter(netns, name)).iter().sum()
}

impl Load {
    fn start(net: &Net) -> Self {
        let netns = net.name("client");
        let open = |family| {
            let to = SocketAddr::new(ip(vip(family)), 81);
            let stream = in_netns(&netns, || TcpStream::connect(to).unwrap());
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            reader.read_line(&mut String::new()).unwrap();
            (stream, reader)
        };
        let established = Family::BOTH.map(open).into();
        let progress = Arc::new(Progress::default());
        let (repeated, refused) = (repeated_syns(&netns), refusals(&netns));
        let threads = Family::BOTH.map(|family| {
            let (netns, progress) = (netns.clone(), progress.clone());
            let from = ip(SOURCES[usize::from(family == Family::V6)]);
            let to = SocketAddr::new(ip(vip(family)), 80);
            std::thread::spawn(move || {
                enter(&netns);
                dial(from, to, &progress);
            })
        });
        Self { netns, progress, threads: threads.into(), repeated, refused, established }
    }

    /// Ends, and panics if any connection failed. How many there were.
    fn none_failed(self) -> u64 {
        let (connections, refused) = self.only_refused();
        assert_eq!(refused, 0, "of {connections}");
        connections
    }

    /// Ends, and panics if any connection failed or began twice, but those that somebody refused: how many there
    /// were, and how many of them. What is refused fails, or TCP begins it again a second later, if the refusal
    /// is there before it has let go of the socket.
    fn only_refused(mut self) -> (u64, u64) {
        self.progress.stop.store(true, Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
        let connections = self.progress.connections.load(Relaxed);
        let failures = self.progress.failures.lock().unwrap().clone();
        let repeated = repeated_syns(&self.netns) - self.repeated;
        let failed: u64 = failures.values().sum();
        let failed_refused: u64 = failures.get(REFUSED).copied().unwrap_or_default();
        let refused = refusals(&self.netns) - self.refused;
        eprintln!(
            "{connections} connections, {failed} failed, {repeated} SYNs sent again, {refused} refused"
        );
        // A SYN that is sent again counts in both counters.
        let explained = (failed_refused, 2 * refused.saturating_sub(failed_refused));
        assert_eq!((failed, repeated), explained, "{failures:?} of {connections}");
        for (stream, reader) in &mut self.established {
            stream.write_all(b"still there?\n").unwrap();
            assert!(reader.read_line(&mut String::new()).unwrap() > 0, "it was closed");
        }
        (connections, refused)
    }
}

const REFUSED: &str = "Connection refused (os error 111)";

fn dial(from: IpAddr, to: SocketAddr, progress: &Progress) {
    // A port comes again after a minute or so; what is remembered of its last use is gone by then.
    for port in (2_000..64_000).cycle() {
        if progress.stop.load(Relaxed) {
            return;
        }
        if let Err(error) = connect(SocketAddr::new(from, port), to) {
            *progress.failures.lock().unwrap().entry(error.to_string()).or_default() += 1;
        }
        progress.connections.fetch_add(1, Relaxed);
        // The program needs the processors, too.
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// The Service that is dialled: with some of its endpoints, always with the first.
fn web(used: u64) -> String {
    let vips = [vip(Family::V4), vip(Family::V6)];
    let web = Svc {
        name: "web",
        cluster_ips: &vips,
        ports: &[("http", "TCP", 80, 30080), ("stay", "TCP", 81, 30081)],
        spec: &[],
        balancer_ips: &[],
    };
    let mut text = CLUSTER.to_owned() + &web.yaml();
    for (i, (_, addresses, port)) in ENDPOINTS.into_iter().enumerate() {
        if i > 0 && used >> i & 1 == 0 {
            continue;
        }
        for (address, name) in addresses.into_iter().zip(["4", "6"]) {
            let ports = [("http", "TCP", port), ("stay", "TCP", 8081)];
            text += &slice("web", &format!("{name}-{i}"), &ports, &[address]);
        }
    }
    text
}

/// Services that nobody dials, each time with other endpoints and frontends.
fn beside(round: u64) -> String {
    let mut text = String::new();
    for i in 0..BESIDE {
        let name = format!("beside-{i}");
        let address = format!("10.97.{}.{}", round % 3, i + 1);
        let service = Svc {
            name: &name,
            cluster_ips: &[&address],
            ports: &[("http", "TCP", 80, 0)],
            spec: &[],
            balancer_ips: &[],
        };
        text += &service.yaml();
        let endpoints: Vec<_> =
            (0..=(round + i as u64) % 4).map(|e| format!("10.244.2.{}", e + 20)).collect();
        let endpoints: Vec<_> = endpoints.iter().map(String::as_str).collect();
        text += &slice(&name, "4", &[("http", "TCP", 9001)], &endpoints);
    }
    text
}

/// A network whose clients do not pile up state, with the Service in its manifests.
fn prepare(net: &Net) {
    drop(serve(net));
    for (source, len) in SOURCES.into_iter().zip([24, 64]) {
        ip_batch_in(&net.name("client"), &format!("addr add {source}/{len} dev eth0 nodad\n"));
    }
    net.write("web.yaml", &web(u64::MAX));
    net.write("beside.yaml", &beside(0));
}

pub(crate) fn arguments(net: &Net) -> Vec<String> {
    let dir = net.manifests().to_str().unwrap().to_owned();
    ["run", "-v=2", "--manifests", &dir, "--hostname-override", "node-1"].map(str::to_owned).into()
}

fn spawn(net: &Net) -> Daemon {
    let arguments = arguments(net);
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    Daemon::spawn(&net.name("node"), &arguments)
}

/// Starts it and waits until it has synced.
fn start(net: &Net) -> Daemon {
    let daemon = spawn(net);
    daemon.wait_for("synced");
    // Connections end with a reset; what is remembered of them need not stay for long.
    in_netns(&net.name("node"), || sysctl("netfilter/nf_conntrack_tcp_timeout_close", "1"));
    daemon
}

/// Whether the kernel holds what the manifests ask for.
fn is_as_asked_for(net: &Net) -> (bool, String) {
    command(net, "diff")
}

/// Whether a command finds nothing, and what it says.
fn command(net: &Net, command: &str) -> (bool, String) {
    let mut arguments = arguments(net);
    arguments[0] = command.into();
    let node = net.name("node");
    let command = ["netns", "exec", &node, env!("CARGO_BIN_EXE_nftproxy")];
    let output = Command::new("ip").args(command).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success(), text + &String::from_utf8_lossy(&output.stderr))
}

/// Changes the manifests without a pause, at random.
fn change(net: &Net, progress: &Arc<Progress>, mut random: Random) -> JoinHandle<()> {
    let (dir, progress) = (net.manifests(), progress.clone());
    std::thread::spawn(move || {
        while !progress.stop.load(Relaxed) {
            let round = progress.changes.fetch_add(1, Relaxed);
            write_manifest(&dir, "web.yaml", &web(random.below(32)));
            if round % 3 == 0 {
                write_manifest(&dir, "beside.yaml", &beside(round / 3));
            }
            std::thread::sleep(Duration::from_millis(random.below(40)));
        }
    })
}

#[test]
fn killed_at_any_moment_it_costs_no_connection() {
    let Some(net) = Net::new() else { return };
    prepare(&net);
    let kills = times("SOAK_KILLS", 10);
    let mut random = Random::new();
    start(&net).kill9();
    let load = Load::start(&net);
    let changing = change(&net, &load.progress, Random(random.below(u64::MAX) | 1));
    let (mut before_sync, mut commits) = (0, 0);
    for _ in 0..kills {
        let daemon = spawn(&net);
        // It takes about a third of that to the first commit; with many kills each moment gets some.
        let limit = [250_000, 1_000_000][usize::from(random.below(2) == 0)];
        let moment = random.below(limit);
        std::thread::sleep(Duration::from_micros(moment));
        let log = daemon.log();
        daemon.kill9();
        before_sync += u32::from(!log.contains("synced"));
        commits += log.matches("operations=").count();
        let wrong: Vec<_> = log.lines().filter(|line| line.contains("WARN")).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
    let daemon = start(&net);
    let changes = load.progress.changes.load(Relaxed);
    load.none_failed();
    changing.join().unwrap();
    eprintln!(
        "{kills} kills, {before_sync} of them before the first commit; {changes} changes of the manifests, \
         {commits} commits"
    );
    wait_until("the last change to be programmed", || is_as_asked_for(&net).0);
    drop(daemon);
}

#[test]
fn stopped_it_leaves_everything_in_force_and_finds_it_again() {
    let Some(net) = Net::new() else { return };
    prepare(&net);
    let daemon = start(&net);
    let load = Load::start(&net);
    let before = in_netns(&net.name("node"), || nft(&["list", "ruleset"], ""));
    daemon.terminate();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(in_netns(&net.name("node"), || nft(&["list", "ruleset"], "")), before);
        let again = start(&net);
        assert!(again.log().contains("operations=0"), "{}", again.log());
        again.terminate();
    }
    load.none_failed();
}

/// But for a packet that is looked at in the very moment: what the old table's chains look up is gone when the
/// new table is there, and the kernel has asked the new table's chains before. It is refused, as it seems to be for
/// no port of a Service; with a thousand connections a second one in about three hundred upgrades.
#[test]
fn an_upgrade_to_another_layout_costs_no_connection() {
    let Some(net) = Net::new() else { return };
    prepare(&net);
    let upgrades = times("SOAK_UPGRADES", 5);
    let node = net.name("node");
    let daemon = start(&net);
    let wanted = in_netns(&node, || nft(&["list", "ruleset"], ""));
    daemon.terminate();
    // The tables of another version: with another number, and something that this one does not have.
    let mut older = wanted.replace(LAYOUT, "nftproxy layout 0");
    assert_eq!(older.matches("nftproxy layout 0").count(), 2);
    for family in Family::BOTH {
        let _ = writeln!(
            older,
            "add chain {family} nftproxy of-old\nadd rule {family} nftproxy of-old drop"
        );
    }
    let (mut connections, mut refused) = (0, 0);
    for _ in 0..upgrades {
        let replace = "delete table ip nftproxy\ndelete table ip6 nftproxy\n".to_owned() + &older;
        in_netns(&node, || nft(&["-f", "-"], &replace));
        let (_, said) = command(&net, "check");
        assert_eq!(said.matches("\"nftproxy layout 0\" instead of").count(), 2, "{said}");
        let load = Load::start(&net);
        std::thread::sleep(Duration::from_millis(50));
        let daemon = start(&net);
        let (_, said) = command(&net, "check");
        let is = format!("is as nftproxy makes it ({LAYOUT})");
        assert_eq!(said.matches(&is).count(), 2, "{said}");
        assert_eq!(in_netns(&node, || nft(&["list", "ruleset"], "")), wanted);
        let log = daemon.log();
        assert_eq!(log.matches("replacing the table of another version").count(), 2, "{log}");
        assert!(!log.contains("WARN"), "{log}");
        daemon.terminate();
        let (more, of_them) = load.only_refused();
        // One of each family: they are replaced at once.
        assert!(of_them <= 2, "{of_them} of {more}");
        connections += more;
        refused += of_them;
    }
    eprintln!(
        "{upgrades} upgrades, {connections} connections meanwhile, none lost, {refused} refused at first"
    );
}
