//! Where it is measured: network namespaces.
//!
//! ```text
//!   outside ──┬── node ───┬── backends
//!             ├── floor ──┤      every endpoint of 10.128.0.0/9
//!             ├── random ─┤
//!             └── plain ──┘
//! ```
//!
//! The control plane and the clients are outside, the proxy is on `node`. What a packet costs there is
//! compared with other ways, measured in turn with it: by a node that has only the least table there can
//! be, by one whose least table gives connections random ports, as both proxies do, and by one that has
//! none.

use std::fs::File;
use std::process::{Command, Stdio};
use std::thread;

use nix::sched::{CloneFlags, setns};

/// The outside, where the control plane listens.
pub(crate) const OUTSIDE: &str = "192.0.2.2";

/// The nodes: name, network outside and inside, and the destinations that are reached by way of it.
const NODES: [(&str, &str, &str, &str); 4] = [
    ("node", "192.0.2", "198.51.100", "default"),
    ("floor", "192.0.3", "198.51.101", "10.64.0.0/12"),
    ("random", "192.0.5", "198.51.103", "10.48.0.0/12"),
    ("plain", "192.0.4", "198.51.102", "10.32.0.0/12"),
];
const NAMES: [&str; 6] = ["outside", "node", "floor", "random", "plain", "backends"];

/// The namespaces; they go with this value.
pub(crate) struct Field {
    prefix: String,
}

impl Field {
    pub(crate) fn new() -> Self {
        let field = Self { prefix: prefix(std::process::id()) };
        for name in NAMES {
            run("ip", &["netns", "add", &field.name(name)]);
            field.ip(name, &["link", "set", "lo", "up"]);
        }
        for (node, outside, inside, destinations) in NODES {
            for (peer, network) in [("outside", outside), ("backends", inside)] {
                let (here, there) = (field.name(node), field.name(peer));
                let link = ["link", "add", peer, "netns", &here, "type", "veth"];
                run("ip", &[&link[..], &["peer", "name", node, "netns", &there]].concat());
                for (name, device, host) in [(node, peer, 10), (peer, node, 2)] {
                    let address = format!("{network}.{host}/24");
                    field.ip(name, &["address", "add", &address, "dev", device]);
                    field.ip(name, &["link", "set", device, "up"]);
                }
            }
            let (from, to) = (format!("{outside}.10"), format!("{inside}.2"));
            field.ip("outside", &["route", "add", destinations, "via", &from]);
            for endpoints in ["10.128.0.0/9", "10.32.0.0/12"] {
                field.ip(node, &["route", "add", endpoints, "via", &to]);
            }
            field.within(node, || {
                std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("a sysctl of our own");
            });
        }
        // The datagrams that show when a change takes effect are thousands of connections a second. They
        // are not to fill the table of connections, which proxies search when a UDP endpoint goes.
        field.within("node", || {
            let timeout = "/proc/sys/net/netfilter/nf_conntrack_udp_timeout";
            std::fs::write(timeout, "1").expect("a sysctl of our own");
        });
        field.ip("backends", &["route", "add", "default", "via", "198.51.100.10"]);
        field.ip("backends", &["route", "add", "local", "10.128.0.0/9", "dev", "lo"]);
        field
    }

    /// Full name of a namespace.
    pub(crate) fn name(&self, short: &str) -> String {
        format!("{}{short}", self.prefix)
    }

    fn ip(&self, namespace: &str, arguments: &[&str]) {
        run("ip", &[&["-n", &self.name(namespace)], arguments].concat());
    }

    /// Runs `body` on a thread in a namespace; threads that it starts are there, too.
    pub(crate) fn within<T: Send>(&self, namespace: &str, body: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let there = scope.spawn(|| {
                enter(&self.name(namespace));
                body()
            });
            there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Loads a ruleset in a namespace.
    pub(crate) fn nft(&self, namespace: &str, ruleset: &str) {
        use std::io::Write as _;
        let name = self.name(namespace);
        let mut nft = Command::new("ip")
            .args(["netns", "exec", &name, "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("nft is installed");
        let mut input = nft.stdin.take().expect("piped");
        input.write_all(ruleset.as_bytes()).expect("nft reads its input");
        drop(input);
        assert!(nft.wait().expect("nft ends").success(), "nft refused:\n{ruleset:.1000}");
    }

    /// Packets and bytes that a named counter has seen.
    pub(crate) fn counted(&self, namespace: &str, table: &str, counter: &str) -> [f64; 2] {
        let listing = self.output(namespace, &["nft", "list", "counter", "ip", table, counter]);
        ["packets ", "bytes "].map(|what| {
            let number = listing.split(what).nth(1).and_then(|rest| rest.split_whitespace().next());
            number.and_then(|n| n.parse().ok()).expect("a counter")
        })
    }

    /// What a command in a namespace prints.
    pub(crate) fn output(&self, namespace: &str, command: &[&str]) -> String {
        let name = self.name(namespace);
        let output = Command::new("ip").args(["netns", "exec", &name]).args(command).output();
        String::from_utf8_lossy(&output.expect("ip is installed").stdout).into_owned()
    }
}

impl Drop for Field {
    fn drop(&mut self) {
        remove(std::process::id());
    }
}

fn prefix(process: u32) -> String {
    format!("nftp-bench-{process}-")
}

/// Removes what is left of the namespaces of a process.
pub(crate) fn remove(process: u32) {
    for name in NAMES {
        let name = format!("{}{name}", prefix(process));
        // One that panicked has removed them itself.
        let _ = Command::new("ip").args(["netns", "delete", &name]).stderr(Stdio::null()).status();
    }
}

/// Moves this thread into a named namespace.
pub(crate) fn enter(name: &str) {
    let file = File::open(format!("/run/netns/{name}")).expect("the namespace exists");
    setns(file, CloneFlags::CLONE_NEWNET).expect("entering it (needs root)");
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().expect("it is installed");
    assert!(status.success(), "{program} {} failed", arguments.join(" "));
}
