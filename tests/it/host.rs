//! The host and a running proxy: what it sets there, what it says where it may not, and what a change
//! of the configuration does to packets.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use nftproxy::model::Family;
use nftproxy::nft::names::{ChainName, SetName};
use nftproxy::nft::netlink::{FEATURES, Feature, NetlinkKernel};
use nftproxy::nft::rule::{Chain, Rule, Selector, SlotSource, Statement};
use nftproxy::nft::transaction::Op;

use crate::namespace::{in_namespace, nft};
use crate::net::{Daemon, GATEWAY, Net, POD_B, in_netns, ip, wait_until};
use crate::objects::{CLUSTER, Svc, slice};
use crate::packets::{HTTP, to};
use crate::serve::{Outcome, tcp};

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

/// A mounted `ConfigMap`: files are links into a directory that is swapped by a link.
struct ConfigMap {
    dir: PathBuf,
    generation: u32,
}

impl ConfigMap {
    fn new(net: &Net, lines: &str) -> Self {
        let dir = net.dir.path().join("config");
        fs::create_dir(&dir).unwrap();
        let mut this = Self { dir, generation: 0 };
        this.set(lines);
        symlink("..data/config.conf", this.file()).unwrap();
        this
    }

    fn file(&self) -> PathBuf {
        self.dir.join("config.conf")
    }

    /// As the kubelet does it.
    fn set(&mut self, lines: &str) {
        self.generation += 1;
        let version = format!("..{}", self.generation);
        fs::create_dir(self.dir.join(&version)).unwrap();
        fs::write(self.dir.join(&version).join("config.conf"), format!("{HEAD}{lines}")).unwrap();
        symlink(version, self.dir.join("..data_tmp")).unwrap();
        fs::rename(self.dir.join("..data_tmp"), self.dir.join("..data")).unwrap();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn web() -> String {
    let service = Svc {
        name: "web",
        cluster_ips: &["10.96.0.10", "fd00:10:96::10"],
        ports: &[("http", "TCP", 80, 0)],
        spec: &[],
        balancer_ips: &[],
    };
    CLUSTER.to_owned() + &service.yaml() + &slice("web", "4", &HTTP, &["10.244.1.5!"])
}

/// A number of connection tracking in a namespace.
fn conntrack(netns: &str, name: &str) -> String {
    let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
    in_netns(netns, || fs::read_to_string(&path).unwrap().trim().to_owned())
}

#[test]
fn a_changed_file_changes_packets_without_a_failed_connection() {
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &web());
    let lines = |all: bool, more: &str| {
        format!(
            "clusterCIDR: 10.244.0.0/16\nmode: nftables\nnftables: {{masqueradeAll: {all}}}\n{more}"
        )
    };
    let mut map = ConfigMap::new(&net, &lines(false, ""));
    let (manifests, file) = (net.manifests(), map.file());
    let arguments = ["--manifests", text(&manifests), "--config", text(&file)];
    let arguments = [&arguments[..], &["--hostname-override", "node-1", "-v=2"]].concat();
    let daemon = Daemon::start(&net.name("node"), &arguments);

    let vip = to("10.96.0.10", 80);
    let pod = net.name("b");
    let seen = || match tcp(&pod, vip) {
        Outcome::Answered { seen, .. } => seen,
        other => panic!("{other:?}"),
    };
    assert_eq!(seen(), ip(POD_B[0]));

    let done = AtomicBool::new(false);
    let (failed, connections) = std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let (mut failed, mut connections) = (Vec::new(), 0);
            while !done.load(Ordering::Relaxed) {
                connections += 1;
                match tcp(&net.name("client"), vip) {
                    Outcome::Answered { .. } => {}
                    other => failed.push(other),
                }
            }
            (failed, connections)
        });
        for round in 0..10 {
            map.set(&lines(round % 2 == 0, ""));
            let expected = if round % 2 == 0 { GATEWAY[0] } else { POD_B[0] };
            wait_until("the change to reach packets", || seen() == ip(expected));
        }
        done.store(true, Ordering::Relaxed);
        client.join().unwrap()
    });
    println!("{connections} connections during 10 changes, {} failed", failed.len());
    assert!(failed.is_empty(), "{failed:?}");
    assert!(connections > 20, "{connections}");
    daemon.wait_for("nftables.masqueradeAll: false is now true");

    // What cannot be used changes nothing.
    map.set(&lines(true, "oomScoreAdj: much\n"));
    daemon.wait_for("oomScoreAdj: \"\\\"much\\\"\": expected a whole number, -1000 to 1000; the configuration stays");
    assert_eq!(seen(), ip(POD_B[0]));
    // Nor does a file that is away for a moment.
    fs::rename(&file, net.dir.path().join("away")).unwrap();
    daemon.wait_for(
        "cannot read it: No such file or directory (os error 2); the configuration stays",
    );
    fs::rename(net.dir.path().join("away"), &file).unwrap();

    // Host settings follow, other addresses of servers need a restart.
    let more = "metricsBindAddress: 127.0.0.1:9\nconntrack: {tcpEstablishedTimeout: 1234s}\n";
    map.set(&lines(true, more));
    daemon
        .wait_for("metricsBindAddress: 127.0.0.1:10249 is now 127.0.0.1:9: this takes effect when");
    wait_until("the change to reach packets", || seen() == ip(GATEWAY[0]));
    wait_until("the timeout to change", || {
        conntrack(&net.name("node"), "tcp_timeout_established") == "1234"
    });

    // Where node ports are served, and how pods are told, as well.
    let more = "nodePortAddresses: [all]\ndetectLocalMode: InterfaceNamePrefix\n\
                detectLocal: {interfaceNamePrefix: pod-}\n";
    map.set(&lines(false, more));
    let listed = || in_netns(&net.name("node"), || nft(&["list", "table", "ip", "nftproxy"], ""));
    wait_until("the rules to change", || {
        let listed = listed();
        listed.contains("iifname != \"pod-*\"") && !listed.contains("@nodeport-ips")
    });
    assert_eq!(seen(), ip(POD_B[0]));
}

#[test]
fn connection_tracking_is_set_as_kube_proxy_sets_it() {
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &web());
    let node = net.name("node");
    let max = conntrack(&node, "max");
    let manifests = net.manifests();
    let arguments = ["--manifests", text(&manifests), "--conntrack-udp-timeout", "17s"];
    let arguments = [&arguments[..], &["--conntrack-tcp-be-liberal", "--init-only"]].concat();
    // Alone, it programs nothing.
    let mut once = Command::new("ip");
    once.args(["netns", "exec", &node, env!("CARGO_BIN_EXE_nftproxy")]).args(&arguments);
    let output = once.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("nf_conntrack_udp_timeout: 30 is now 17"), "{said}");
    assert_eq!(in_netns(&node, || nft(&["list", "tables"], "")), "");
    let set = |name: &str| conntrack(&node, name);
    assert_eq!(set("tcp_timeout_established"), "86400");
    assert_eq!(set("tcp_timeout_close_wait"), "3600");
    assert_eq!((set("udp_timeout"), set("tcp_be_liberal")), ("17".into(), "1".into()));
    assert_eq!(set("max"), max, "this test must not change the machine");
    // What is right is left alone.
    let said = String::from_utf8(once.output().unwrap().stderr).unwrap();
    assert!(!said.contains("is now"), "{said}");
}

#[test]
fn where_the_host_is_read_only_services_are_served_all_the_same() {
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &web());
    let script =
        "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec \"$@\"";
    let by = ["unshare", "-m", "sh", "-c", script, "sh"];
    let manifests = net.manifests();
    let arguments = ["--manifests", text(&manifests), "--hostname-override", "node-1"];
    let daemon = Daemon::spawn_by(&net.name("node"), &by, &arguments);
    daemon.wait_for("synced");
    let log = daemon.log();
    let warnings: Vec<_> = log.lines().filter(|line| line.contains("WARN")).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    assert!(
        warnings[0].contains("nf_conntrack_tcp_timeout_established from 432000 to 86400")
            && warnings[0].contains("Read-only file system"),
        "{log}"
    );
    assert!(matches!(tcp(&net.name("b"), to("10.96.0.10", 80)), Outcome::Answered { .. }));
    // Where that is all that was asked for, it is an error.
    let mut once = Command::new("ip");
    once.args(["netns", "exec", &net.name("node")]).args(by).arg(env!("CARGO_BIN_EXE_nftproxy"));
    let output = once.args(arguments).arg("--init-only").output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("ERROR cannot change /proc/sys/"));
}

#[test]
fn a_missing_capability_is_named() {
    let Some(net) = Net::new() else { return };
    let by = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"];
    let manifests = net.manifests();
    for command in [&["run", "--manifests", text(&manifests)][..], &["cleanup"]] {
        let output = Command::new("ip")
            .args(["netns", "exec", &net.name("node")])
            .args(by)
            .arg(env!("CARGO_BIN_EXE_nftproxy"))
            .args(command)
            .env_remove("RUST_LOG")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{said}");
        let errors: Vec<_> = said.lines().filter(|line| line.contains("ERROR")).collect();
        assert_eq!(errors.len(), 1, "{said}");
        assert!(errors[0].contains("lacks the capability CAP_NET_ADMIN"), "{said}");
    }
}

#[test]
fn the_kernel_is_asked_and_left_as_it_was() {
    in_namespace(|| {
        let mut kernel = NetlinkKernel::open().unwrap();
        assert_eq!(kernel.probe(FEATURES).unwrap(), []);
        assert_eq!(nft(&["list", "ruleset"], ""), "");
        // Beside a table of our name, whatever is in it.
        nft(
            &["-f", "-"],
            "table ip nftproxy { set endpoints { type ipv4_addr; elements = { 192.0.2.1 }; }; }",
        );
        let before = nft(&["list", "ruleset"], "");
        assert_eq!(kernel.probe(FEATURES).unwrap(), []);
        assert_eq!(nft(&["list", "ruleset"], ""), before);

        // A question that no kernel can say yes to.
        let none_of_nothing = |family: Family| {
            let slot = Selector::Slot { source: SlotSource::Random, modulus: 0, offset: 0 };
            let key = vec![Selector::Daddr, Selector::L4Proto, Selector::Dport, slot];
            let rules = vec![Rule::new([Statement::Dnat(key, SetName::Endpoints)])];
            let chain = Chain { name: ChainName::Dispatch, base: None, rules };
            vec![Op::AddRules(family, Box::new(chain))]
        };
        let impossible =
            Feature { name: "magic", only: Some("nothing goes"), ops: none_of_nothing };
        let features: Vec<_> = FEATURES.iter().copied().chain([impossible]).collect();
        let missing = kernel.probe(&features).unwrap();
        assert_eq!(missing.len(), 1, "{missing:?}");
        let line = missing[0].to_string();
        assert!(line.starts_with("the kernel lacks magic (ip and ip6): nothing goes ("), "{line}");
        assert_eq!(nft(&["list", "ruleset"], ""), before);
    });
}

#[test]
fn the_first_commit_waits_for_the_ranges_of_the_node() {
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &web());
    let manifests = net.manifests();
    let arguments = ["--manifests", text(&manifests), "--hostname-override", "node-9"];
    let arguments = [&arguments[..], &["--detect-local-mode=NodeCIDR"]].concat();
    let daemon = Daemon::spawn(&net.name("node"), &arguments);
    daemon.wait_for("waiting for the Node's spec.podCIDRs, by which detectLocalMode: NodeCIDR");
    assert_eq!(in_netns(&net.name("node"), || nft(&["list", "tables"], "")), "");
    let node =
        "apiVersion: v1\nkind: Node\nmetadata: {name: node-9}\nspec: {podCIDRs: [10.244.1.0/24]}\n";
    net.write("node.yaml", node);
    daemon.wait_for("synced");
    let listed =
        in_netns(&net.name("node"), || nft(&["list", "set", "ip", "nftproxy", "local-pods"], ""));
    assert!(listed.contains("10.244.1.0/24"), "{listed}");
}
