//! The program as it runs on a node: the real binary, a real kube-apiserver and etcd, and real
//! connections through the namespaces of [`Net`].
//!
//! The control plane runs where the outside client is. As it takes seconds to start, one serves all
//! phases of one test; each phase makes its own Services and says what it depends on. What happens in
//! the API is seen in who answers a connection, or that nobody does.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;

use crate::control_plane::{self, ControlPlane, User};
use crate::namespace::skip;
use crate::net::{CLIENT, Daemon, NODE, Net, enter, in_netns, ip, tcp_counter, write_manifest};
use crate::objects::{CLUSTER, Svc, slice};
use crate::serve::{Outcome, tcp};

pub(crate) const CIDRS: &str = "10.244.0.0/16,fd00:10:244::/56";
pub(crate) const HTTP: [(&str, &str, u16); 1] = [("http", "TCP", 8080)];
pub(crate) const A: &str = "10.244.1.5!";
const B: &str = "10.244.1.6!";
pub(crate) const REMOTE: &str = "10.244.2.9";

/// The longest pause between two tries of a watch is a minute.
const PATIENCE: Duration = Duration::from_secs(90);

/// A node, a control plane, and what asks it.
pub(crate) struct Cluster<'a> {
    pub(crate) net: &'a Net,
    pub(crate) plane: ControlPlane,
    pub(crate) runtime: Runtime,
}

/// Runs `body` in the namespace of the outside client, with a control plane there. None, said loudly,
/// where there can be no namespaces or are no programs.
pub(crate) fn with_cluster(body: impl FnOnce(&mut Cluster<'_>) + Send) {
    let Some(net) = Net::new() else { return };
    for program in ["etcd", "kube-apiserver"] {
        if let Err(reason) = control_plane::find(program) {
            return skip(&reason);
        }
    }
    in_netns(&net.name("client"), || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let plane = runtime.block_on(ControlPlane::start(ip(CLIENT[0])));
        body(&mut Cluster { net: &net, plane, runtime });
    });
}

impl Cluster<'_> {
    pub(crate) fn apply(&self, yaml: &str) {
        self.runtime.block_on(self.plane.apply(yaml));
    }

    pub(crate) fn delete(&self, kind: &str, name: &str) {
        self.runtime.block_on(self.plane.delete(kind, "default", name));
    }

    pub(crate) fn endpoints(&self, service: &str, endpoints: &[&str]) {
        self.apply(&slice(service, "4", &HTTP, endpoints));
    }

    pub(crate) fn arguments(&self, user: User) -> Vec<String> {
        arguments(&self.plane.kubeconfig(user))
    }

    /// Starts the program as a user, and does not wait for it.
    pub(crate) fn spawn(&self, user: User) -> Daemon {
        self.spawn_with(&self.plane.kubeconfig(user))
    }

    /// The same with a kubeconfig.
    pub(crate) fn spawn_with(&self, kubeconfig: &Path) -> Daemon {
        let all = arguments(kubeconfig);
        let arguments: Vec<_> =
            std::iter::once("run").chain(all.iter().map(String::as_str)).collect();
        Daemon::spawn(&self.net.name("node"), &arguments)
    }

    /// Starts the program as a user and waits until it has synced.
    pub(crate) fn start(&self, user: User) -> Daemon {
        let daemon = self.spawn(user);
        said(&daemon, "synced");
        daemon
    }

    /// Runs a command of the program on the node.
    pub(crate) fn command(&self, arguments: &[String]) -> Output {
        let netns = self.net.name("node");
        let command = ["netns", "exec", &netns, env!("CARGO_BIN_EXE_nftproxy")];
        Command::new("ip").args(command).args(arguments).output().unwrap()
    }

    /// The table of a family as text.
    pub(crate) fn table(&self, family: &str) -> String {
        let netns = self.net.name("node");
        let list = ["netns", "exec", &netns, "nft", "list", "table", family, "nftproxy"];
        let output = Command::new("ip").args(list).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Asserts that the table of a family is as it was.
    pub(crate) fn still_has(&self, family: &str, before: &str) {
        let now = self.table(family);
        let new: Vec<_> = now.lines().filter(|line| !before.contains(line)).collect();
        assert!(now == before, "the table {family} was changed; new lines: {new:#?}");
    }

    /// One connection from a namespace: who answered.
    pub(crate) fn ask(&self, from: &str, address: &str, port: u16) -> Answer {
        match tcp(&self.net.name(from), SocketAddr::new(ip(address), port)) {
            Outcome::Answered { by, port, .. } => Answer::By(by, port),
            Outcome::Refused => Answer::Refused,
            Outcome::TimedOut => Answer::Lost,
        }
    }

    /// Waits until connections from the client are answered by exactly these.
    pub(crate) fn answers(&self, address: &str, port: u16, by: &[&str]) {
        let expected: BTreeSet<Answer> = match by {
            [] => [Answer::Refused].into(),
            by => by.iter().map(|by| Answer::By((*by).to_owned(), 8080)).collect(),
        };
        eventually(&format!("{address}:{port} to be answered by {by:?}"), || {
            // Of three, the chance that one is not among sixty is 3 · (2/3)^60.
            let seen: BTreeSet<_> = (0..60).map(|_| self.ask("client", address, port)).collect();
            if seen == expected { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    }

    /// Waits until one connection from a namespace meets this.
    pub(crate) fn meets(&self, from: &str, address: &str, port: u16, expected: &Answer) {
        eventually(&format!("{from} to {address}:{port} to be {expected:?}"), || {
            let seen = self.ask(from, address, port);
            if seen == *expected { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    }
}

fn arguments(kubeconfig: &Path) -> Vec<String> {
    let kubeconfig = kubeconfig.to_str().unwrap();
    ["--kubeconfig", kubeconfig, "--hostname-override", "node-1", "--cluster-cidr", CIDRS]
        .map(str::to_owned)
        .into()
}

/// What a client met.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Answer {
    By(String, u16),
    Refused,
    Lost,
}

/// Waits for what must come about; panics with the last that was seen instead.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> Result<(), String>) {
    let began = Instant::now();
    while let Err(seen) = condition() {
        assert!(began.elapsed() < PATIENCE, "waited in vain for {what}; last seen: {seen}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until the log has these words.
pub(crate) fn said(daemon: &Daemon, words: &str) {
    eventually(&format!("{words:?} in the log"), || {
        let log = daemon.log();
        if log.contains(words) { Ok(()) } else { Err(log) }
    });
}

pub(crate) fn lines(daemon: &Daemon, words: &str) -> Vec<String> {
    daemon.log().lines().filter(|line| line.contains(words)).map(str::to_owned).collect()
}

pub(crate) fn service<'a>(name: &'a str, cluster_ip: &'a [&'a str]) -> Svc<'a> {
    Svc {
        name,
        cluster_ips: cluster_ip,
        ports: &[("http", "TCP", 80, 0)],
        spec: &[],
        balancer_ips: &[],
    }
}

/// A pod that connects without a break, and what it met.
///
/// It is pod `b`, whose connections are not masqueraded. Masquerading gives them ports at random, so that
/// a server soon meets one that it has in TIME-WAIT from another, with timestamps that look older
/// (`TcpExtPAWSTimewait`); such a SYN is lost without anybody's fault.
pub(crate) struct Connecting {
    netns: String,
    lost_before: u64,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u32, Vec<Outcome>)>,
}

impl Connecting {
    /// One connection after the other.
    pub(crate) fn start(net: &Net, to: SocketAddr) -> Self {
        let netns = net.name("b");
        let lost_before = tcp_counter(&netns, "TCPSynRetrans");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let inside = netns.clone();
        let thread = std::thread::spawn(move || {
            enter(&inside);
            let (mut answered, mut failed) = (0, Vec::new());
            while !stopped.load(Ordering::Relaxed) {
                match crate::serve::tcp_here(to) {
                    Outcome::Answered { .. } => answered += 1,
                    other => failed.push(other),
                }
                // Others need the processors, too.
                std::thread::sleep(Duration::from_millis(1));
            }
            (answered, failed)
        });
        Self { netns, lost_before, stop, thread }
    }

    /// Ends, and panics if any connection failed. How many there were.
    pub(crate) fn none_failed(self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        let (answered, failed) = self.thread.join().unwrap();
        assert!(failed.is_empty(), "{} of {answered} failed: {failed:?}", failed.len());
        let lost = tcp_counter(&self.netns, "TCPSynRetrans") - self.lost_before;
        assert_eq!(lost, 0, "SYNs were lost, of {answered} connections");
        assert!(answered > 200, "only {answered} connections say little");
        answered
    }
}

#[test]
fn a_node_follows_the_api_through_changes_crashes_and_missing_rights() {
    with_cluster(|cluster| {
        // The Node; the server makes its ServiceCIDR itself.
        cluster.apply(CLUSTER.split("---\n").next().unwrap());
        // Phase by phase with the rights that a cluster gives its kube-proxy anyway.
        let daemon = cluster.start(User::KubeProxy);
        assert_eq!(lines(&daemon, "WARN"), [""; 0], "those rights suffice");
        the_api_is_reached_by_its_own_cluster_ip(cluster);
        services_come_change_and_go(cluster);
        what_is_for_others_is_left_to_them(cluster);
        let daemon = a_killed_proxy_costs_no_connection(cluster, daemon);
        a_killed_apiserver_costs_nothing(cluster, &daemon);
        assert_eq!(lines(&daemon, "kube_"), [""; 0], "libraries do not speak for themselves");
        daemon.terminate();
        a_missing_right_is_named_and_waited_for(cluster);
        manifests_are_as_good_as_the_api(cluster);
    });
}

fn the_api_is_reached_by_its_own_cluster_ip(cluster: &Cluster<'_>) {
    for from in ["b", "node"] {
        let version = in_netns(&cluster.net.name(from), || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let asked = cluster.plane.version_at("https://10.96.0.1:443");
            runtime.block_on(asked).map_err(|error| error.to_string())
        });
        assert!(version.as_ref().is_ok_and(|v| v.starts_with('v')), "{from}: {version:?}");
    }
}

fn services_come_change_and_go(cluster: &Cluster<'_>) {
    let both = ["10.96.0.10", "fd00:10:96::10"];
    let web = Svc { spec: &["ipFamilyPolicy: RequireDualStack"], ..service("web", &both) };
    // 15: nobody has it yet.
    cluster.meets("b", both[0], 80, &Answer::Lost);
    cluster.apply(&web.yaml());
    // Created: without endpoints, then with one, in each family.
    cluster.answers(both[0], 80, &[]);
    cluster.answers(both[1], 80, &[]);
    cluster.endpoints("web", &[A]);
    cluster.answers(both[0], 80, &["a"]);
    cluster.apply(&slice("web", "6", &HTTP, &["fd00:10:244:1::6!"]));
    cluster.answers(both[1], 80, &["b"]);
    // Scaled up, down, to nothing and back.
    cluster.endpoints("web", &[A, B, REMOTE]);
    cluster.answers(both[0], 80, &["a", "b", "remote"]);
    cluster.endpoints("web", &[REMOTE, B]);
    cluster.answers(both[0], 80, &["b", "remote"]);
    cluster.endpoints("web", &[]);
    cluster.answers(both[0], 80, &[]);
    // A second slice counts, too, and stops to when it goes.
    cluster.endpoints("web", &[A]);
    cluster.apply(&slice("web", "more", &HTTP, &[REMOTE]));
    cluster.answers(both[0], 80, &["a", "remote"]);
    cluster.delete("EndpointSlice", "web-more");
    cluster.answers(both[0], 80, &["a"]);
    // Changed: the port of its endpoints, its own port, its type and its policy.
    cluster.apply(&slice("web", "4", &[("http", "TCP", 8081)], &[A]));
    cluster.meets("client", both[0], 80, &Answer::By("a".into(), 8081));
    let web = Svc { ports: &[("http", "TCP", 81, 0)], ..web };
    cluster.apply(&web.yaml());
    cluster.meets("client", both[0], 81, &Answer::By("a".into(), 8081));
    cluster.meets("client", both[0], 80, &Answer::Refused);
    let web = Svc { ports: &[("http", "TCP", 81, 30080)], ..web };
    cluster.apply(&web.yaml());
    cluster.endpoints("web", &[A, REMOTE]);
    cluster.answers(NODE[0], 30080, &["a", "remote"]);
    cluster.answers(NODE[1], 30080, &["b"]);
    let local = ["ipFamilyPolicy: RequireDualStack", "internalTrafficPolicy: Local"];
    let web = Svc { ports: &[("http", "TCP", 81, 0)], spec: &local, ..web };
    cluster.apply(&web.yaml());
    cluster.answers(both[0], 81, &["a"]);
    cluster.meets("client", NODE[0], 30080, &Answer::Refused);
    // An address that the server chooses.
    let mut text = service("chosen", &["10.96.0.99"]).yaml();
    text = text.lines().filter(|line| !line.contains("clusterIP")).collect::<Vec<_>>().join("\n");
    cluster.apply(&text);
    cluster.endpoints("chosen", &[B]);
    let chosen = cluster.runtime.block_on(cluster.plane.get("Service", "default", "chosen"));
    cluster.answers(chosen.data["spec"]["clusterIP"].as_str().unwrap(), 80, &["b"]);
    // Deleted: first the Service, then what it leaves behind.
    cluster.delete("Service", "web");
    for address in both {
        cluster.meets("client", address, 81, &Answer::Lost);
    }
    cluster.delete("EndpointSlice", "web-4");
    cluster.delete("EndpointSlice", "web-6");
    // Made anew, it is as it was asked for then.
    cluster.apply(&service("web", &["10.96.0.10"]).yaml());
    cluster.answers("10.96.0.10", 80, &[]);
    cluster.endpoints("web", &[A, B]);
    cluster.answers("10.96.0.10", 80, &["a", "b"]);
}

fn what_is_for_others_is_left_to_them(cluster: &Cluster<'_>) {
    let other = service("other", &["10.96.0.30"]).yaml();
    let labelled = |label: &str| {
        let labels = format!("namespace: default, labels: {{ {label}: \"\" }} }}");
        other.replacen("namespace: default }", &labels, 1)
    };
    cluster.endpoints("other", &[A]);
    cluster.apply(&other);
    cluster.answers("10.96.0.30", 80, &["a"]);
    // Whatever its value is: the label says that the Service is another proxy's.
    let away = labelled("service.kubernetes.io/service-proxy-name");
    assert_ne!(away, other);
    cluster.apply(&away);
    cluster.meets("client", "10.96.0.30", 80, &Answer::Lost);
    cluster.endpoints("other", &[B]);
    cluster.apply(&other);
    cluster.answers("10.96.0.30", 80, &["b"]);
    // Slices of headless Services do not count, and do when the label goes.
    let more = slice("other", "more", &HTTP, &[REMOTE]);
    let headless = more.replacen("labels: {", "labels: { service.kubernetes.io/headless: \"\",", 1);
    assert_ne!(headless, more);
    cluster.apply(&more);
    cluster.answers("10.96.0.30", 80, &["b", "remote"]);
    cluster.apply(&headless);
    cluster.answers("10.96.0.30", 80, &["b"]);
    cluster.apply(&more);
    cluster.answers("10.96.0.30", 80, &["b", "remote"]);
    // A headless Service is nobody's: neither it nor its endpoints are in the tables, even if no label
    // says so. A later change has passed by both.
    cluster.apply(&service("headless", &["None"]).yaml());
    cluster.apply(&slice("headless", "4", &[("http", "TCP", 9999)], &[A]));
    cluster.delete("EndpointSlice", "other-more");
    cluster.answers("10.96.0.30", 80, &["b"]);
    let table = cluster.table("ip");
    assert!(table.contains("10.96.0.30 . tcp . 80"), "{table}");
    assert!(!table.contains("9999"), "{table}");
    cluster.delete("Service", "other");
    cluster.delete("EndpointSlice", "other-4");
}

/// Killed at any time, and started again later, with changes meanwhile.
fn a_killed_proxy_costs_no_connection(cluster: &Cluster<'_>, mut daemon: Daemon) -> Daemon {
    cluster.apply(&service("steady", &["10.96.0.40"]).yaml());
    cluster.endpoints("steady", &[A, REMOTE]);
    cluster.answers("10.96.0.40", 80, &["a", "remote"]);
    let connecting = Connecting::start(cluster.net, SocketAddr::new(ip("10.96.0.40"), 80));
    for round in 0..4 {
        // Changes are on their way when it is killed, and others are missed.
        let (before, meanwhile): (&[&str], &[&str]) =
            if round % 2 == 0 { (&[REMOTE], &[A]) } else { (&[A], &[REMOTE, A]) };
        cluster.endpoints("steady", before);
        daemon.kill9();
        cluster.endpoints("steady", meanwhile);
        std::thread::sleep(Duration::from_millis(300));
        daemon = cluster.start(User::KubeProxy);
        cluster.answers("10.96.0.40", 80, if round % 2 == 0 { &["a"] } else { &["a", "remote"] });
        assert_eq!(lines(&daemon, "WARN"), [""; 0]);
    }
    let count = connecting.none_failed();
    eprintln!("{count} connections while nftproxy was killed four times, none failed");
    // With nothing to change, it changes nothing.
    daemon.kill9();
    let daemon = cluster.start(User::KubeProxy);
    assert!(lines(&daemon, "synced")[0].contains("operations=0"), "{}", daemon.log());
    daemon
}

fn a_killed_apiserver_costs_nothing(cluster: &mut Cluster<'_>, daemon: &Daemon) {
    let connecting = Connecting::start(cluster.net, SocketAddr::new(ip("10.96.0.40"), 80));
    for round in 1..=2 {
        let before = cluster.table("ip");
        cluster.plane.kill_apiserver();
        eventually("the outage to be told", || {
            let told = lines(daemon, "no answer from the API server");
            if told.len() == round { Ok(()) } else { Err(format!("{told:?}")) }
        });
        // Long enough for more tries of all kinds.
        std::thread::sleep(Duration::from_secs(3));
        cluster.still_has("ip", &before);
        cluster.answers("10.96.0.40", 80, &["a", "remote"]);
        cluster.runtime.block_on(cluster.plane.start_apiserver());
        // Without any change: that it is back is seen all the same.
        eventually("the end of the outage to be told", || {
            let told = lines(daemon, "the API server answers again");
            if told.len() == round { Ok(()) } else { Err(format!("{told:?}\n{}", daemon.log())) }
        });
        assert_eq!(lines(daemon, "no answer from the API server").len(), round);
        // The server took up the endpoint of its own Service again. What is made now is followed.
        cluster.endpoints("steady", &[REMOTE]);
        cluster.answers("10.96.0.40", 80, &["remote"]);
        let name = format!("after-{round}");
        let address = format!("10.96.0.5{round}");
        cluster.apply(&service(&name, &[&address]).yaml());
        cluster.endpoints(&name, &[B]);
        cluster.answers(&address, 80, &["b"]);
        cluster.delete("Service", &name);
        cluster.meets("client", &address, 80, &Answer::Lost);
        cluster.delete("EndpointSlice", &format!("{name}-4"));
        cluster.endpoints("steady", &[A, REMOTE]);
        cluster.answers("10.96.0.40", 80, &["a", "remote"]);
    }
    let count = connecting.none_failed();
    eprintln!("{count} connections while the API server was killed twice, none failed");
}

fn a_missing_right_is_named_and_waited_for(cluster: &Cluster<'_>) {
    let before = cluster.table("ip");
    let daemon = cluster.spawn(User::ServiceAccount);
    for resource in ["services", "endpointslices", "servicecidrs", "nodes"] {
        said(&daemon, &format!("not allowed to list or watch {resource} (403:"));
    }
    // A change it cannot see, and several tries later: what the one before it programmed stays.
    cluster.endpoints("steady", &[REMOTE]);
    std::thread::sleep(Duration::from_secs(4));
    cluster.still_has("ip", &before);
    cluster.answers("10.96.0.40", 80, &["a", "remote"]);
    let complaints = lines(&daemon, "not allowed");
    assert_eq!(complaints.len(), 4, "once each: {}", daemon.log());
    assert_eq!(lines(&daemon, "WARN"), complaints, "and nothing else");
    assert_eq!(lines(&daemon, "synced"), [""; 0]);
    // The rules as the log names them, first those without which there is nothing to program.
    let rules = |resources: &[&str]| {
        let named = complaints.iter().filter_map(|line| {
            let rule = &line[line.find("{apiGroups")?..=line.rfind('}')?];
            let wanted = resources.iter().any(|name| rule.contains(&format!("{name:?}")));
            wanted.then(|| format!("  - {rule}\n"))
        });
        let rules: String = named.collect();
        assert_eq!(rules.lines().count(), resources.len(), "{complaints:?}");
        format!(
            "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\n\
             metadata: {{ name: nftproxy }}\nrules:\n{rules}---\n"
        )
    };
    let binding = "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\n\
                   metadata: { name: nftproxy }\n\
                   roleRef: { apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: nftproxy }\n\
                   subjects: [{ kind: ServiceAccount, namespace: kube-system, name: nftproxy }]\n";
    cluster.apply(&(rules(&["services", "endpointslices"]) + binding));
    said(&daemon, "synced");
    cluster.answers("10.96.0.40", 80, &["remote"]);
    assert_eq!(lines(&daemon, "serves the kind again").len(), 2, "{}", daemon.log());
    // 15: without ServiceCIDRs nobody can tell that the address is one nobody has.
    cluster.apply(&rules(&["services", "endpointslices", "servicecidrs", "nodes"]));
    eventually("all kinds to be served", || {
        let told = lines(&daemon, "serves the kind again");
        if told.len() == 4 { Ok(()) } else { Err(daemon.log()) }
    });
    cluster.meets("client", "10.96.7.7", 80, &Answer::Lost);
    cluster.endpoints("steady", &[A]);
    cluster.answers("10.96.0.40", 80, &["a"]);
    daemon.terminate();
}

/// The same objects from files make the same tables.
fn manifests_are_as_good_as_the_api(cluster: &Cluster<'_>) {
    // Something of everything.
    let all = Svc {
        name: "everything",
        cluster_ips: &["10.96.0.60", "fd00:10:96::60"],
        ports: &[("http", "TCP", 80, 30060), ("dns", "UDP", 53, 30053)],
        spec: &["ipFamilyPolicy: RequireDualStack", "externalTrafficPolicy: Local"],
        balancer_ips: &["203.0.113.60"],
    };
    cluster.apply(&all.yaml());
    let ports = [("http", "TCP", 8080), ("dns", "UDP", 53)];
    cluster.apply(&slice("everything", "4", &ports, &[A, B, REMOTE]));
    cluster.apply(&slice("everything", "6", &ports, &["fd00:10:244:1::5!", "fd00:10:244:2::9"]));
    let daemon = cluster.start(User::KubeProxy);
    cluster.answers("10.96.0.60", 80, &["a", "b", "remote"]);
    daemon.terminate();
    let tables = [cluster.table("ip"), cluster.table("ip6")];

    let api = [vec!["diff".to_owned()], cluster.arguments(User::KubeProxy)].concat();
    let same = cluster.command(&api);
    let text = String::from_utf8_lossy(&same.stdout).into_owned();
    assert!(same.status.success() && text.contains("are what is wanted"), "{same:?}");
    for kind in ["Service", "EndpointSlice", "ServiceCIDR", "Node"] {
        let objects = cluster.runtime.block_on(cluster.plane.list(kind));
        assert!(!objects.is_empty(), "no {kind}");
        let texts: Vec<_> =
            objects.iter().map(|object| serde_json::to_string_pretty(object).unwrap()).collect();
        let text = texts.join("\n---\n") + "\n";
        write_manifest(&cluster.net.manifests(), &format!("{kind}.yaml"), &text);
    }
    let dir = cluster.net.manifests().to_str().unwrap().to_owned();
    let files = ["--manifests", &dir, "--hostname-override", "node-1", "--cluster-cidr", CIDRS];
    let files: Vec<_> = files.map(str::to_owned).into();
    let same = cluster.command(&[vec!["diff".to_owned()], files.clone()].concat());
    let text = String::from_utf8_lossy(&same.stdout).into_owned();
    assert!(same.status.success() && text.contains("are what is wanted"), "{same:?}");

    // Taken over from the API by files, and back, without an operation.
    let run: Vec<_> = std::iter::once("run").chain(files.iter().map(String::as_str)).collect();
    let daemon = Daemon::spawn(&cluster.net.name("node"), &run);
    said(&daemon, "synced");
    assert!(lines(&daemon, "synced")[0].contains("operations=0"), "{}", daemon.log());
    daemon.terminate();
    cluster.still_has("ip", &tables[0]);
    cluster.still_has("ip6", &tables[1]);
    let daemon = cluster.start(User::KubeProxy);
    assert!(lines(&daemon, "synced")[0].contains("operations=0"), "{}", daemon.log());
    daemon.terminate();
}
