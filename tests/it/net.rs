//! A node and its surroundings in network namespaces, for tests that send real packets.
//!
//! ```text
//!   client ── 192.0.2.0/24 ── node ──┬── pod a   10.244.1.5   fd00:10:244:1::5
//!   192.0.2.2   .10 and .11          ├── pod b   10.244.1.6   fd00:10:244:1::6
//!   fd00:192::2   ::10               └── remote  10.244.2.9   fd00:10:244:2::9   (another node's pod)
//! ```
//!
//! Pods hang on routed point-to-point links, so that every packet between them passes the node's
//! hooks and a source address seen by a server is the one it really came with. Namespaces carry the
//! process id in their names and go with the value that made them, also when a test panics; threads
//! of servers end with the process.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

use crate::namespace::skip;
use crate::serve;

/// Addresses of the node towards the client; node ports are served on the first of each family.
pub(crate) const NODE: [&str; 2] = ["192.0.2.10", "fd00:192::10"];
pub(crate) const NODE_SECOND: &str = "192.0.2.11";
pub(crate) const CLIENT: [&str; 2] = ["192.0.2.2", "fd00:192::2"];
/// Addresses of the node towards its pods and towards the remote pod: what masqueraded traffic
/// comes from.
pub(crate) const GATEWAY: [&str; 2] = ["10.244.1.1", "fd00:10:244:1::1"];
pub(crate) const REMOTE_GATEWAY: [&str; 2] = ["198.18.0.1", "fd00:198:18::1"];
pub(crate) const POD_A: [&str; 2] = ["10.244.1.5", "fd00:10:244:1::5"];
pub(crate) const POD_B: [&str; 2] = ["10.244.1.6", "fd00:10:244:1::6"];
pub(crate) const REMOTE: [&str; 2] = ["10.244.2.9", "fd00:10:244:2::9"];

/// The namespaces of one test.
pub(crate) struct Net {
    prefix: String,
    /// Manifests and logs.
    pub(crate) dir: tempfile::TempDir,
}

/// `beyond` is where everything else would be: it takes what the node sends there, and answers nothing.
const NAMES: [&str; 6] = ["node", "client", "a", "b", "remote", "beyond"];

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Net {
    /// Builds the topology; None, said loudly, where namespaces cannot be made.
    pub(crate) fn new() -> Option<Self> {
        if !geteuid().is_root() {
            skip("namespaces need root");
            return None;
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("nftp-{}-{number}-", std::process::id());
        let net = Self { prefix, dir: tempfile::tempdir().unwrap() };
        fs::create_dir(net.manifests()).unwrap();
        net.build();
        for pod in ["a", "b", "remote"] {
            serve::start(&net.name(pod), pod);
        }
        // A server on the node itself: a pod of the host's network.
        serve::start(&net.name("node"), "host");
        Some(net)
    }

    /// Full name of a namespace: `node`, `client`, `a`, `b` or `remote`.
    pub(crate) fn name(&self, short: &str) -> String {
        format!("{}{short}", self.prefix)
    }

    pub(crate) fn manifests(&self) -> std::path::PathBuf {
        self.dir.path().join("manifests")
    }

    /// Writes a manifest as a whole: what is read is never half of it.
    pub(crate) fn write(&self, name: &str, text: &str) {
        write_manifest(&self.manifests(), name, text);
    }

    fn build(&self) {
        let mut batch = String::new();
        for short in NAMES {
            batch.push_str(&format!("netns add {}\n", self.name(short)));
        }
        ip_batch(&batch);
        for short in NAMES {
            in_netns(&self.name(short), || {
                for key in ["default", "all"] {
                    sysctl(&format!("ipv6/conf/{key}/accept_dad"), "0");
                    sysctl(&format!("ipv6/conf/{key}/dad_transmits"), "0");
                }
                if short == "node" {
                    sysctl("ipv4/ip_forward", "1");
                    sysctl("ipv6/conf/all/forwarding", "1");
                    // Every refusal is to be seen, not the first few of a second. The masks say which
                    // types are limited, by either of two limits: none, and one that nobody sends.
                    sysctl("ipv4/icmp_ratemask", "0");
                    sysctl("ipv6/icmp/ratemask", "0");
                    for key in ["default", "all"] {
                        sysctl(&format!("ipv4/conf/{key}/rp_filter"), "0");
                    }
                }
            });
        }
        let node = self.name("node");
        let mut lines = String::new();
        let mut link = |peer: &str, dev: &str, here: &[&str], there: &[(&str, &str)]| {
            let ns = self.name(peer);
            lines.push_str(&format!(
                "link add {dev} netns {node} type veth peer name eth0 netns {ns}\n"
            ));
            let mut node_lines = format!("link set {dev} up\n");
            let mut peer_lines = "link set lo up\nlink set eth0 up\n".to_owned();
            for address in here {
                node_lines.push_str(&format!("addr add {address} dev {dev} nodad\n"));
            }
            for (address, gateway) in there {
                peer_lines.push_str(&format!("addr add {address} dev eth0 nodad\n"));
                let plain = address.split('/').next().unwrap();
                if address.ends_with("/32") || address.ends_with("/128") {
                    node_lines.push_str(&format!("route add {address} dev {dev}\n"));
                    peer_lines.push_str(&format!("route add {gateway} dev eth0 src {plain}\n"));
                }
                peer_lines
                    .push_str(&format!("route add default via {gateway} dev eth0 src {plain}\n"));
            }
            (node_lines, ns, peer_lines)
        };
        let of = |own: [&str; 2], gateway: [&'static str; 2]| {
            [(format!("{}/32", own[0]), gateway[0]), (format!("{}/128", own[1]), gateway[1])]
        };
        let mut steps = Vec::new();
        let client = [("192.0.2.2/24", NODE[0]), ("fd00:192::2/64", NODE[1])];
        let node_addresses = ["192.0.2.10/24", "192.0.2.11/24", "fd00:192::10/64"];
        steps.push(link("client", "eth0", &node_addresses, &client));
        for (pod, own, gateway) in
            [("a", POD_A, GATEWAY), ("b", POD_B, GATEWAY), ("remote", REMOTE, REMOTE_GATEWAY)]
        {
            let here = [format!("{}/32", gateway[0]), format!("{}/128", gateway[1])];
            let there = of(own, gateway);
            let there = [(&*there[0].0, there[0].1), (&*there[1].0, there[1].1)];
            steps.push(link(pod, &format!("pod-{pod}"), &[&here[0], &here[1]], &there));
        }
        ip_batch(&lines);
        ip_batch_in(&node, "link set lo up\n");
        for (node_lines, ns, peer_lines) in steps {
            ip_batch_in(&node, &node_lines);
            ip_batch_in(&ns, &peer_lines);
        }
        // What the node has no better route for leaves by a link of its own: sent back to where it
        // came from, a packet would cause redirects, which use up the rate of refusals.
        let mut beyond = format!(
            "link add beyond type veth peer name eth0 netns {}\nlink set beyond up arp off\n",
            self.name("beyond")
        );
        for address in NODE {
            beyond.push_str(&format!("route add default dev beyond src {address}\n"));
        }
        ip_batch_in(&node, &beyond);
        ip_batch_in(&self.name("beyond"), "link set eth0 up\n");
        // A link that just came up loses what is sent until the kernel has taken note, which takes long on a busy
        // machine; nor are its IPv6 addresses usable at once.
        for short in NAMES {
            let show = |what: &[&str]| {
                let output = Command::new("ip").args(["-n", &self.name(short)]).args(what).output();
                String::from_utf8(output.unwrap().stdout).unwrap()
            };
            wait_until("links to be up", || {
                let shown = show(&["-o", "link", "show", "type", "veth"]);
                !shown.is_empty() && shown.lines().all(|link| link.contains(" state UP "))
            });
            wait_until("IPv6 addresses to be usable", || {
                show(&["-6", "addr", "show", "tentative"]).is_empty()
            });
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for short in NAMES {
            drop(Command::new("ip").args(["netns", "delete", &self.name(short)]).status());
        }
    }
}

/// Replaces a file in one step.
pub(crate) fn write_manifest(dir: &Path, name: &str, text: &str) {
    let hidden = dir.join(format!(".{name}"));
    fs::write(&hidden, text).unwrap();
    fs::rename(hidden, dir.join(name)).unwrap();
}

/// Sets a sysctl of the namespace the calling thread is in.
pub(crate) fn sysctl(key: &str, value: &str) {
    fs::write(format!("/proc/sys/net/{key}"), value).unwrap_or_else(|e| panic!("{key}: {e}"));
}

fn ip_batch(lines: &str) {
    run_ip(&["-batch", "-"], lines);
}

/// Runs lines of `ip -batch` in a namespace.
pub(crate) fn ip_batch_in(netns: &str, lines: &str) {
    run_ip(&["-n", netns, "-batch", "-"], lines);
}

fn run_ip(arguments: &[&str], lines: &str) {
    let mut child = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ip is installed (package iproute2)");
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments:?}: {words}\n{lines}");
}

/// Runs a closure on a thread in a namespace; sockets it opens stay in there.
pub(crate) fn in_netns<T: Send>(netns: &str, body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(netns);
            body()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Moves the calling thread into a namespace.
pub(crate) fn enter(netns: &str) {
    let path = format!("/run/netns/{netns}");
    let file = File::open(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    setns(file, CloneFlags::CLONE_NEWNET).unwrap();
}

/// A time to wait on this machine: an emulated one (tests/kernels) takes `NFTPROXY_TEST_PATIENCE`
/// times as long as others.
pub(crate) fn patient(time: Duration) -> Duration {
    static FACTOR: LazyLock<u32> = LazyLock::new(|| number("NFTPROXY_TEST_PATIENCE", 1));
    time * *FACTOR
}

/// A number above zero from the environment.
pub(crate) fn number<T: std::str::FromStr + Default + PartialEq>(name: &str, default: T) -> T {
    let Ok(text) = std::env::var(name) else { return default };
    let number = text.parse().ok().filter(|number| *number != T::default());
    number.unwrap_or_else(|| panic!("{name}={text}: not a number above zero"))
}

/// Waits for a condition that must come true soon; panics after ten seconds.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        let within = patient(Duration::from_secs(10));
        assert!(began.elapsed() < within, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `TcpExt` counter of a namespace, for instance `TCPSynRetrans`.
pub(crate) fn tcp_counter(netns: &str, name: &str) -> u64 {
    in_netns(netns, || {
        let text = fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
        let mut rows = text.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, values) = (rows.next().unwrap(), rows.next().unwrap());
        let mut pairs = names.split_whitespace().zip(values.split_whitespace());
        let (_, value) = pairs.find(|(n, _)| *n == name).unwrap();
        value.parse().unwrap()
    })
}

/// nftproxy, running in a namespace.
pub(crate) struct Daemon {
    child: Child,
    log: std::path::PathBuf,
}

impl Daemon {
    /// Starts it with arguments and waits until it has synced.
    pub(crate) fn start(netns: &str, arguments: &[&str]) -> Self {
        let daemon = Self::spawn(netns, arguments);
        wait_until("the daemon to sync", || daemon.log().contains("synced"));
        daemon
    }

    /// Starts it and does not wait.
    pub(crate) fn spawn(netns: &str, arguments: &[&str]) -> Self {
        Self::spawn_by(netns, &[], arguments)
    }

    /// The same by another program, which is given ours and its arguments.
    pub(crate) fn spawn_by(netns: &str, by: &[&str], arguments: &[&str]) -> Self {
        let log = tempfile::NamedTempFile::new().unwrap().into_temp_path().keep().unwrap();
        let child = Command::new("ip")
            .args(["netns", "exec", netns])
            .args(by)
            .arg(env!("CARGO_BIN_EXE_nftproxy"))
            .args(arguments)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self { child, log }
    }

    /// Its process: `ip netns exec` becomes the program.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it runs no more.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// What its threads wait for in the kernel, as far as that is told.
    fn whereabouts(&self) -> String {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten();
        let of = |path: std::path::PathBuf| {
            let told = |file| fs::read_to_string(path.join(file)).unwrap_or_default();
            let [name, call, stack] = ["comm", "syscall", "stack"].map(told);
            format!("{}: system call {}\n{stack}", name.trim(), call.trim())
        };
        threads.flatten().map(|thread| of(thread.path())).collect::<Vec<_>>().join("\n")
    }

    /// What it said so far.
    pub(crate) fn log(&self) -> String {
        let mut text = String::new();
        File::open(&self.log).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// Waits until the log contains these words.
    pub(crate) fn wait_for(&self, words: &str) {
        let began = Instant::now();
        while !self.log().contains(words) {
            let log = self.log();
            let within = patient(Duration::from_secs(10));
            assert!(began.elapsed() < within, "no {words:?} in the log:\n{log}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends it a signal that ends it, and waits.
    pub(crate) fn end(&mut self, signal: Signal) {
        self.signal(signal);
        drop(self.child.wait());
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap());
        let _ = kill(pid, signal);
    }

    /// Ends it at once, wherever it is.
    pub(crate) fn kill9(mut self) {
        self.end(Signal::SIGKILL);
    }

    /// Asks it to end, and waits.
    pub(crate) fn terminate(mut self) {
        self.end(Signal::SIGTERM);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        match self.child.try_wait() {
            Ok(None) => {
                if std::thread::panicking() {
                    eprintln!("where nftproxy is:\n{}", self.whereabouts());
                }
                self.end(Signal::SIGKILL);
            }
            ended if std::thread::panicking() => eprintln!("nftproxy has ended: {ended:?}"),
            _ => {}
        }
        if std::thread::panicking() {
            eprintln!("log of nftproxy:\n{}", self.log());
        }
        drop(fs::remove_file(&self.log));
    }
}

/// One of a pair of addresses by family: 0 for IPv4, 1 for IPv6.
pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
