//! From kube-proxy to nftproxy and back, with the real kube-proxy in each of its modes that this kernel
//! can run, while a client connects without a pause and others hold connections.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::control_plane::{self, User};
use crate::e2e::{A, CIDRS, Cluster, Connecting, eventually, lines, said, service, with_cluster};
use crate::namespace::{in_namespace, skip};
use crate::net::{Daemon, NODE, Net, in_netns, ip};
use crate::objects::{CLUSTER, Svc, slice};

/// The real thing, on the node.
struct KubeProxy {
    child: Child,
    log: std::path::PathBuf,
}

/// How kube-proxy programs the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Nftables,
    /// With the programs whose names end so.
    Iptables(&'static str),
}

impl KubeProxy {
    fn start(cluster: &Cluster<'_>, mode: Mode) -> Self {
        let dir = cluster.net.dir.path();
        let kubeconfig = cluster.plane.kubeconfig(User::KubeProxy);
        let (name, path) = match mode {
            Mode::Nftables => ("nftables", String::new()),
            Mode::Iptables(kind) => ("iptables", format!("{}:", programs(dir, kind).display())),
        };
        let config = dir.join("kube-proxy.yaml");
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
             mode: {name}\nhostnameOverride: node-1\nclusterCIDR: {CIDRS}\n\
             clientConnection: {{ kubeconfig: {} }}\nconntrack: {{ maxPerCore: 0 }}\n\
             iptables: {{ minSyncPeriod: 100ms }}\nnftables: {{ minSyncPeriod: 100ms }}\n",
            kubeconfig.display()
        );
        fs::write(&config, text).unwrap();
        let log = dir.join("kube-proxy.log");
        let file = File::create(&log).unwrap();
        let child = Command::new("ip")
            .args(["netns", "exec", &cluster.net.name("node")])
            .args(["setpriv", "--pdeathsig", "TERM", "--"])
            .arg(control_plane::find("kube-proxy").unwrap())
            .arg(format!("--config={}", config.display()))
            .arg("--v=2")
            .env("PATH", path + &std::env::var("PATH").unwrap())
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Self { child, log }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Stops it as a node would. Its rules stay.
    fn stop(mut self) {
        self.terminate();
    }

    fn terminate(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id().try_into().unwrap()), Signal::SIGTERM);
        self.child.wait().unwrap();
    }
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.terminate();
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("kube-proxy:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
        }
    }
}

/// A folder with iptables of one kind under its plain names.
fn programs(dir: &Path, kind: &str) -> std::path::PathBuf {
    let folder = dir.join(kind);
    if !folder.exists() {
        fs::create_dir(&folder).unwrap();
        for program in ["iptables", "ip6tables"] {
            for action in ["", "-save", "-restore"] {
                let target = format!("/usr/sbin/xtables-{kind}-multi");
                symlink(target, folder.join(format!("{program}{action}"))).unwrap();
            }
        }
    }
    folder
}

/// Runs a program on the node; what it printed.
fn on_node(net: &Net, command: &[&str]) -> String {
    let output =
        Command::new("ip").args(["netns", "exec", &net.name("node")]).args(command).output();
    let output = output.unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {words}");
    String::from_utf8(output.stdout).unwrap() + &words
}

/// Everything that is in the kernel of kube-proxy's in a mode, as its own programs print it.
fn leftovers(net: &Net, mode: Mode) -> Vec<String> {
    let text = match mode {
        Mode::Nftables => on_node(net, &["nft", "list", "tables"]),
        Mode::Iptables(kind) => {
            let save = |program| on_node(net, &[&format!("{program}-{kind}-save")]);
            save("iptables") + &save("ip6tables")
        }
    };
    let theirs = |line: &&str| line.contains("KUBE-") || line.contains("kube-proxy");
    text.lines().filter(theirs).map(str::to_owned).collect()
}

/// A connection that stays.
struct Established {
    stream: TcpStream,
    lines: std::io::Lines<BufReader<TcpStream>>,
}

impl Established {
    fn open(net: &Net, from: &str, to: SocketAddr) -> Self {
        let stream = in_netns(&net.name(from), || TcpStream::connect(to).unwrap());
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        lines.next().unwrap().unwrap();
        Self { stream, lines }
    }

    fn is_alive(&mut self) {
        self.stream.write_all(b"still there?\n").unwrap();
        self.lines.next().expect("the connection is open").expect("and answers");
    }
}

const VIP: &str = "10.96.0.10";

/// A Service with ports for short and for long connections, and one without endpoints.
fn objects(cluster: &Cluster<'_>) {
    let web = Svc {
        ports: &[("http", "TCP", 80, 30080), ("stay", "TCP", 81, 30081)],
        spec: &["ipFamilyPolicy: RequireDualStack"],
        ..service("web", &[VIP, "fd00:10:96::10"])
    };
    let ports = [("http", "TCP", 8080), ("stay", "TCP", 8081)];
    cluster.apply(CLUSTER.split("---\n").next().unwrap());
    cluster.apply(&web.yaml());
    cluster.apply(&service("none", &["10.96.0.11"]).yaml());
    cluster.apply(&slice("web", "4", &ports, &[A, "10.244.2.9"]));
    cluster.apply(&slice("web", "6", &ports, &["fd00:10:244:1::5!"]));
}

fn run(net: &Net, arguments: &[&str]) -> String {
    let program = env!("CARGO_BIN_EXE_nftproxy");
    on_node(net, &[&[program], arguments].concat())
}

fn serves(cluster: &Cluster<'_>) {
    cluster.answers(VIP, 80, &["a", "remote"]);
    cluster.answers("fd00:10:96::10", 80, &["a"]);
    cluster.answers(NODE[0], 30080, &["a", "remote"]);
    cluster.answers("10.96.0.11", 80, &[]);
}

/// kube-proxy, then nftproxy, then kube-proxy again.
fn there_and_back(cluster: &Cluster<'_>, mode: Mode) {
    let net = cluster.net;
    let kube_proxy = KubeProxy::start(cluster, mode);
    serves(cluster);
    let found = leftovers(net, mode);
    assert!(found.len() > 1, "{found:?}");
    let held = |from, address: &str, port| {
        Established::open(net, from, SocketAddr::new(ip(address), port))
    };
    let mut by_theirs =
        [held("b", VIP, 81), held("client", VIP, 81), held("client", NODE[0], 30081)];
    let connecting = Connecting::start(net, SocketAddr::new(ip(VIP), 80));

    // Stopped, it leaves all of it.
    kube_proxy.stop();
    serves(cluster);
    assert_eq!(leftovers(net, mode).len(), found.len());

    // Asked to leave it alone, nftproxy does.
    let mut arguments = vec!["run".to_owned()];
    arguments.extend(cluster.arguments(User::KubeProxy));
    let daemon = spawn(net, &[arguments.clone(), vec!["--keep-kube-proxy-rules".into()]].concat());
    said(&daemon, "it stays");
    daemon.terminate();
    assert_eq!(leftovers(net, mode).len(), found.len());

    // Else it takes over: first its tables, then the removal.
    let daemon = spawn(net, &arguments);
    said(&daemon, "what kube-proxy left is removed");
    let log = daemon.log();
    assert!(log.find("synced") < log.find("kube-proxy left:"), "{log}");
    assert_eq!(lines(&daemon, "WARN"), [""; 0]);
    let rest = leftovers(net, mode);
    let kubelets = |line: &String| line.contains("KUBE-FIREWALL");
    assert!(rest.iter().all(kubelets), "{rest:#?}");
    assert_eq!(rest.is_empty(), mode == Mode::Nftables, "the kubelet's stay: {rest:?}");
    serves(cluster);
    by_theirs.iter_mut().for_each(Established::is_alive);
    let mut by_ours = [held("b", VIP, 81), held("client", VIP, 81), held("client", NODE[0], 30081)];

    // The way back. kube-proxy leaves our tables alone.
    let kube_proxy = KubeProxy::start(cluster, mode);
    eventually("kube-proxy to have programmed the Service", || {
        let text = match mode {
            Mode::Nftables => on_node(net, &["nft", "list", "ruleset"]),
            Mode::Iptables(_) => leftovers(net, mode).join("\n"),
        };
        let theirs = text.split("table ip ").find(|table| table.contains("kube-proxy"));
        let done = match mode {
            Mode::Nftables => theirs.is_some_and(|table| table.contains("default/web")),
            Mode::Iptables(_) => text.contains("default/web"),
        };
        if done { Ok(()) } else { Err(text) }
    });
    daemon.terminate();
    serves(cluster);
    run(net, &["cleanup"]);
    assert!(!on_node(net, &["nft", "list", "tables"]).contains("nftproxy"));
    serves(cluster);
    by_theirs.iter_mut().chain(&mut by_ours).for_each(Established::is_alive);
    let count = connecting.none_failed();
    eprintln!("{mode:?}: {count} connections on the way to nftproxy and back, none failed");

    kube_proxy.stop();
    let said = run(net, &["cleanup", "--kube-proxy"]);
    assert!(said.contains("what kube-proxy left is removed"), "{said}");
    assert!(leftovers(net, mode).iter().all(kubelets));
    assert!(run(net, &["--cleanup"]).contains("kube-proxy left nothing on this node"));
}

/// What iptables saved on a node under kube-proxy v1.37.2, and what else may be on one: the kubelet's
/// chains, one of a CNI plugin that uses the mark, and nothing forwarded by default.
fn saved() -> String {
    let text = include_str!("reference/kube-proxy-1.37.2.iptables-save");
    // Counters of a kind that would have to be made first.
    let text: String = text.split_inclusive('\n').filter(|line| !line.contains("nfacct")).collect();
    text.replace(
        ":KUBE-MARK-MASQ - [0:0]\n",
        ":KUBE-MARK-MASQ - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n:CNI-SETMARK - [0:0]\n\
         -A CNI-SETMARK -j KUBE-MARK-MASQ\n",
    )
    .replacen(":FORWARD ACCEPT", ":FORWARD DROP", 1)
}

/// Chains and rules as `iptables-save` prints them, without counters.
fn iptables(kind: &str) -> Vec<String> {
    let output = Command::new(format!("iptables-{kind}-save")).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let rules = text.lines().filter(|line| line.starts_with([':', '-', '*']));
    let plain = |line: &str| line.split(" [").next().unwrap().to_owned();
    let wanted = |line: &String| !line.starts_with('*') && !line.contains(" ACCEPT");
    let mut lines: Vec<_> = rules.map(plain).filter(wanted).collect();
    // The tables come in no fixed order.
    lines.sort_unstable();
    lines
}

#[test]
fn chains_of_the_kubelet_and_those_that_others_use_stay() {
    in_namespace(|| {
        for kind in ["nft", "legacy"] {
            let mut restore = Command::new(format!("iptables-{kind}-restore"))
                .stdin(Stdio::piped())
                .spawn()
                .expect("iptables is installed (package iptables)");
            restore.stdin.take().unwrap().write_all(saved().as_bytes()).unwrap();
            assert!(restore.wait().unwrap().success());
            assert!(iptables(kind).len() > 60);
            let cleanup = || {
                let output = Command::new(env!("CARGO_BIN_EXE_nftproxy"))
                    .args(["cleanup", "--kube-proxy"])
                    .output()
                    .unwrap();
                (output.status.code(), String::from_utf8(output.stderr).unwrap())
            };
            let (code, said) = cleanup();
            assert_eq!(code, Some(0), "{said}");
            assert!(said.contains("KUBE-MARK-MASQ of"), "{said}");
            assert!(said.contains("is removed, but for what stays"), "{said}");
            assert!(said.contains("stays: a rule in CNI-SETMARK leads to it"), "{said}");
            let mut expected = [
                ":FORWARD DROP",
                ":KUBE-FIREWALL -",
                "-A INPUT -j KUBE-FIREWALL",
                "-A OUTPUT -j KUBE-FIREWALL",
                "-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming \
                 localnet connections\" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
                ":CNI-SETMARK -",
                ":KUBE-KUBELET-CANARY -",
                ":KUBE-MARK-MASQ -",
                "-A CNI-SETMARK -j KUBE-MARK-MASQ",
                "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
            ];
            expected.sort_unstable();
            assert_eq!(iptables(kind), expected);
            // Again, with nothing to do.
            assert_eq!(cleanup().0, Some(0));
            assert_eq!(iptables(kind), expected);
        }
    });
}

#[test]
fn what_ipvs_mode_leaves_goes_and_what_cannot_go_is_named() {
    in_namespace(|| {
        let sh = |script: &str| {
            let output = Command::new("sh").args(["-ec", script]).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        // This kernel has neither ipvs nor dummy links; a link is deleted by its name, of any kind.
        sh("ip link add kube-ipvs0 type bridge
            ipset create KUBE-CLUSTER-IP hash:ip,port
            ipset create KUBE-LOOP-BACK hash:ip,port,ip
            ipset create KUBE-6-NODE-PORT-LOCAL-SCTP-HAS hash:ip,port family inet6
            ipset create MINE hash:ip
            iptables-nft -t nat -N KUBE-SERVICES
            iptables-nft -t nat -N KUBE-LOAD-BALANCER
            iptables-nft -t nat -A PREROUTING -j KUBE-SERVICES
            iptables-nft -t nat -A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-LOAD-BALANCER
            iptables-nft -N MINE
            iptables-nft -A MINE -m set --match-set KUBE-LOOP-BACK dst,dst,src -j ACCEPT");
        let program = env!("CARGO_BIN_EXE_nftproxy");
        let output = Command::new(program).args(["cleanup", "--kube-proxy"]).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        let refused =
            "cannot destroy an ipset (ipvs mode: the ipset KUBE-LOOP-BACK): a rule still uses it";
        assert!(said.contains(refused), "{said}");
        assert_eq!(said.matches("ERROR").count(), 2, "that, and the end: {said}");
        assert_eq!(sh("ipset list -n | sort"), "KUBE-LOOP-BACK\nMINE\n");
        assert!(!sh("ip link").contains("kube-ipvs0"));
        assert!(!sh("iptables-nft-save").contains("KUBE-S"));
        // Once its cause is gone, it goes.
        sh("iptables-nft -F MINE");
        assert!(
            Command::new(program).args(["cleanup", "--kube-proxy"]).status().unwrap().success()
        );
        assert_eq!(sh("ipset list -n"), "MINE\n");
    });
}

fn spawn(net: &Net, arguments: &[String]) -> Daemon {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Daemon::spawn(&net.name("node"), &arguments)
}

#[test]
fn a_node_goes_from_kube_proxy_to_nftproxy_and_back_without_losing_a_connection() {
    if let Err(reason) = control_plane::find("kube-proxy") {
        return skip(&reason);
    }
    with_cluster(|cluster| {
        objects(cluster);
        for mode in [Mode::Nftables, Mode::Iptables("nft"), Mode::Iptables("legacy")] {
            there_and_back(cluster, mode);
        }
    });
}
