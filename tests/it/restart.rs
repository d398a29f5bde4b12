//! The program stops, is killed, is replaced by another version, and starts again, while clients
//! connect without a pause and others hold connections: none of them notices.
//!
//! How often it is killed is `SOAK_KILLS`, and how often upgraded `SOAK_UPGRADES`; a normal run takes
//! a few, and `tests/soak/run` many. `SOAK_SEED` repeats a run, as far as the machine does.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nftproxy::model::Family;
use nftproxy::nft::names::LAYOUT;

use crate::flips::{ENDPOINTS, serve, vip};
use crate::load::{Load, Progress, source};
use crate::namespace::nft;
use crate::net::{Daemon, Net, in_netns, ip, sysctl, wait_until, write_manifest};
use crate::objects::{CLUSTER, Svc, slice};

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
    net.write("web.yaml", &web(u64::MAX));
    net.write("beside.yaml", &beside(0));
}

/// A client of each family, which leaves the processors to the program at times.
fn load(net: &Net) -> Load {
    let clients = [("192.0.2.100", Family::V4), ("fd00:192::100", Family::V6)];
    let dialled =
        clients.map(|(from, family)| (source(net, from), SocketAddr::new(ip(vip(family)), 80)));
    Load::start(net, &dialled, Duration::from_micros(500))
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
    let load = load(&net);
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
    let load = load(&net);
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
    let mut random = Random::new();
    let mut connections = 0;
    for upgrade in 0..upgrades {
        let replace = "delete table ip nftproxy\ndelete table ip6 nftproxy\n".to_owned() + &older;
        in_netns(&node, || nft(&["-f", "-"], &replace));
        let (_, said) = command(&net, "check");
        assert_eq!(said.matches("\"nftproxy layout 0\" instead of").count(), 2, "{said}");
        let load = load(&net);
        std::thread::sleep(Duration::from_millis(50));
        // Every other time it is killed half way, and the next start has to go on from there.
        let killed = upgrade % 2 == 1;
        if killed {
            let daemon = spawn(&net);
            std::thread::sleep(Duration::from_millis(random.below(500)));
            daemon.kill9();
        }
        let daemon = start(&net);
        let (_, said) = command(&net, "check");
        let is = format!("is as nftproxy makes it ({LAYOUT})");
        assert_eq!(said.matches(&is).count(), 2, "{said}");
        assert_eq!(in_netns(&node, || nft(&["list", "ruleset"], "")), wanted);
        let log = daemon.log();
        let replaced = log.matches("replacing the table of another version").count();
        assert!(replaced == 2 || killed && replaced == 0, "{log}");
        assert!(!log.contains("WARN"), "{log}");
        daemon.terminate();
        connections += load.none_failed();
    }
    eprintln!("{upgrades} upgrades, {connections} connections meanwhile, none lost or refused");
}
