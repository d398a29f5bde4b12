//! Stale UDP flows go, everything else stays: real flows through a node whose rules are written by
//! hand, so that a test decides when a rule changes and when a sweep comes.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;

use nftproxy::conntrack::{
    Counters, Endpoints, NodePortAddresses, Serving, Sweep, Sweeper, endpoints,
};
use nftproxy::frontend::Frontend;
use nftproxy::model::{Family, Protocol};

use crate::model::name;
use crate::namespace::{in_namespace, nft};
use crate::net::{
    CLIENT, Daemon, NODE, NODE_SECOND, Net, POD_A, POD_B, REMOTE, in_netns, ip, patient, wait_until,
};
use crate::objects::{CLUSTER, Svc, slice};
use crate::serve::{Outcome, udp, udp_on};

const VIP: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];

fn to(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

fn at(address: &str, port: u16) -> Frontend {
    Frontend::Address(ip(address), Protocol::Udp, port)
}

fn by(list: &[SocketAddr]) -> Endpoints {
    endpoints(list.iter().copied())
}

/// Replaces the rules of the node: what is dialled, by TCP or UDP, and which endpoint is given to new
/// flows; None refuses them.
fn rules(net: &Net, list: &[(SocketAddr, Option<SocketAddr>)]) {
    let mut text = String::new();
    for (table, v4) in [("ip", true), ("ip6", false)] {
        let (mut translations, mut refusals) = (String::new(), String::new());
        for (dialled, endpoint) in list.iter().filter(|(dialled, _)| dialled.is_ipv4() == v4) {
            let (address, port) = (dialled.ip(), dialled.port());
            let dialled =
                format!("{table} daddr {address} meta l4proto {{ tcp, udp }} th dport {port}");
            match endpoint {
                Some(endpoint) => translations += &format!("{dialled} dnat to {endpoint}\n"),
                None => refusals += &format!("{dialled} ct state new reject\n"),
            }
        }
        text += &format!(
            "add table {table} hand\ndelete table {table} hand\ntable {table} hand {{\n\
             chain prerouting-nat {{ type nat hook prerouting priority -100\n{translations}}}\n\
             chain output-nat {{ type nat hook output priority -100\n{translations}}}\n\
             chain input-filter {{ type filter hook input priority 0\n{refusals}}}\n\
             chain forward-filter {{ type filter hook forward priority 0\n\
             ct state established accept\n{refusals}}}\n}}\n"
        );
    }
    in_netns(&net.name("node"), || nft(&["-f", "-"], &text));
}

fn sweeper(net: &Net) -> Sweeper {
    in_netns(&net.name("node"), || Sweeper::start().unwrap())
}

/// Sweeps, and returns what that did.
fn swept(sweeper: &Sweeper, sweep: Option<Sweep>) -> Counters {
    let before = sweeper.counters();
    sweeper.sweep(sweep.expect("something to sweep"));
    wait_until("the sweep", || sweeper.counters().sweeps > before.sweeps);
    let after = sweeper.counters();
    assert_eq!(after.failures, before.failures);
    Counters {
        sweeps: after.sweeps - before.sweeps,
        failures: 0,
        listed: after.listed - before.listed,
        deleted: [0, 1].map(|i| after.deleted[i] - before.deleted[i]),
    }
}

/// A UDP socket of a namespace that dials one address for life.
fn dial(net: &Net, from: &str, to: SocketAddr) -> UdpSocket {
    in_netns(&net.name(from), || {
        let socket = UdpSocket::bind((if to.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).unwrap();
        socket.connect(to).unwrap();
        socket
    })
}

fn who(socket: &UdpSocket) -> String {
    match udp_on(socket) {
        Outcome::Answered { by, .. } => by,
        other => format!("{other:?}"),
    }
}

/// The flows of the calling thread's namespace, one line each, with their ids and without what
/// changes by itself.
fn flows(family: &str, protocol: &str) -> BTreeSet<String> {
    let arguments = ["-L", "-o", "id", "-f", family, "-p", protocol];
    let output = Command::new("conntrack").args(arguments).output().expect("conntrack");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let words = |line: &str| {
        let kept =
            line.split_whitespace().filter(|word| word.contains('=') && !word.starts_with("use="));
        kept.collect::<Vec<_>>().join(" ")
    };
    text.lines().map(words).collect()
}

fn node_flows(net: &Net, protocol: &str) -> BTreeSet<String> {
    in_netns(&net.name("node"), || {
        let families = ["ipv4", "ipv6"];
        families.iter().flat_map(|family| flows(family, protocol)).collect()
    })
}

/// A TCP connection that stays, and is asked line by line.
struct Asked(BufReader<TcpStream>);

impl Asked {
    fn open(net: &Net, from: &str, to: SocketAddr) -> Self {
        let stream = in_netns(&net.name(from), || TcpStream::connect(to).unwrap());
        stream.set_read_timeout(Some(patient(std::time::Duration::from_secs(5)))).unwrap();
        let mut asked = Self(BufReader::new(stream));
        asked.line();
        asked
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.split(' ').next().unwrap().to_owned()
    }

    fn ask(&mut self) -> String {
        self.0.get_mut().write_all(b"?\n").unwrap();
        self.line()
    }
}

#[test]
fn a_flow_whose_endpoint_went_reaches_another_and_nothing_else_is_touched() {
    let Some(net) = Net::new() else { return };
    let sweeper = sweeper(&net);
    let vips = VIP.map(|vip| to(vip, 8081));
    let (a, b) = (POD_A.map(|pod| to(pod, 8081)), POD_B.map(|pod| to(pod, 8081)));
    let other = VIP.map(|vip| to(vip, 53));
    let kept = [(other[0], Some(to(POD_A[0], 53))), (other[1], Some(to(POD_A[1], 53)))];
    rules(&net, &[[(vips[0], Some(a[0])), (vips[1], Some(a[1]))], kept].concat());

    let mut serving = Serving::default();
    let dns = name("dns");
    let log = name("log");
    let state = |family: usize, list: &[SocketAddr]| (at(VIP[family], 8081), by(list));
    serving.update(&dns, [state(0, &a[..1]), state(1, &a[1..])]);
    serving.update(&log, [0, 1].map(|i| (at(VIP[i], 53), by(&[to(POD_A[i], 53)]))));
    assert_eq!(swept(&sweeper, serving.take()).deleted, [0, 0]);

    let clients = [0, 1].map(|i| dial(&net, "client", vips[i]));
    let pods = [0, 1].map(|i| dial(&net, "remote", vips[i]));
    let own = [0, 1].map(|i| dial(&net, "node", vips[i]));
    let mut tcp = [0, 1].map(|i| Asked::open(&net, "client", vips[i]));
    let others = [0, 1].map(|i| dial(&net, "client", other[i]));
    // Not ours: to the pod itself, and to a server on the node.
    let direct = [0, 1].map(|i| dial(&net, "client", a[i]));
    let host = [0, 1].map(|i| dial(&net, "client", to(NODE[i], 8081)));
    let all = clients.iter().chain(&pods).chain(&own);
    for socket in all.clone().chain(&others).chain(&direct) {
        assert_eq!(who(socket), "a");
    }
    host.iter().for_each(|socket| assert_eq!(who(socket), "host"));
    tcp.iter_mut().for_each(|tcp| assert_eq!(tcp.ask(), "a"));

    // The endpoint is replaced. Established flows do not notice: that is why they must be swept.
    rules(&net, &[[(vips[0], Some(b[0])), (vips[1], Some(b[1]))], kept].concat());
    all.clone().for_each(|socket| assert_eq!(who(socket), "a"));
    let (udp_before, tcp_before) = (node_flows(&net, "udp"), node_flows(&net, "tcp"));
    serving.update(&dns, [state(0, &b[..1]), state(1, &b[1..])]);
    let done = swept(&sweeper, serving.take());
    assert_eq!(done.deleted, [3, 3]);
    // The kernel left out flows to other ports, and, of IPv4, those to other addresses: it listed the
    // six stale ones, and IPv6 flows to the pod itself and to the host.
    assert_eq!(done.listed, 8);

    let dialled = |line: &str| VIP.iter().any(|vip| line.contains(&format!(" dst={vip} ")));
    let swept_away = |line: &&String| dialled(line) && line.contains(" dport=8081 ");
    let (gone, kept): (BTreeSet<_>, BTreeSet<_>) = udp_before.iter().partition(swept_away);
    assert_eq!(gone.len(), 6);
    let after = node_flows(&net, "udp");
    assert_eq!(after.iter().collect::<BTreeSet<_>>(), kept);
    assert_eq!(node_flows(&net, "tcp"), tcp_before);
    all.for_each(|socket| assert_eq!(who(socket), "b"));
    tcp.iter_mut().for_each(|tcp| assert_eq!(tcp.ask(), "a"));
    others.iter().chain(&direct).for_each(|socket| assert_eq!(who(socket), "a"));
    host.iter().for_each(|socket| assert_eq!(who(socket), "host"));
}

#[test]
fn an_endpoint_that_serves_keeps_its_flows_wherever_new_ones_go() {
    let Some(net) = Net::new() else { return };
    let sweeper = sweeper(&net);
    let (vip, a, b) = (to(VIP[0], 53), to(POD_A[0], 53), to(POD_B[0], 53));
    rules(&net, &[(vip, Some(a))]);
    let [first, second] = [(); 2].map(|()| dial(&net, "client", vip));
    assert_eq!(who(&first), "a");
    rules(&net, &[(vip, Some(b))]);
    assert_eq!(who(&second), "b");
    // 112: terminating, but serving; a third one went.
    let mut serving = Serving::default();
    serving.update(&name("dns"), [(at(VIP[0], 53), by(&[a, b, to(REMOTE[0], 53)]))]);
    serving.take();
    serving.update(&name("dns"), [(at(VIP[0], 53), by(&[a, b]))]);
    assert_eq!(swept(&sweeper, serving.take()).deleted, [0, 0]);
    assert_eq!((who(&first), who(&second)), ("a".into(), "b".into()));
}

#[test]
fn at_zero_endpoints_flows_are_refused_and_with_the_first_one_they_reach_it() {
    let Some(net) = Net::new() else { return };
    let sweeper = sweeper(&net);
    let dialled = [to(VIP[0], 53), to(VIP[1], 53), to(NODE[0], 30053)];
    let node_port = Frontend::NodePort(Family::V4, Protocol::Udp, 30053);
    let pods = [to(POD_A[0], 53), to(POD_A[1], 53), to(POD_A[0], 53)];
    let frontends = [at(VIP[0], 53), at(VIP[1], 53), node_port];
    let state = |served: bool| {
        let by_one = move |pod| by(if served { std::slice::from_ref(pod) } else { &[] });
        frontends.into_iter().zip(pods.each_ref().map(by_one)).collect::<Vec<_>>()
    };
    let all = |endpoint: bool| {
        let rules = dialled.iter().zip(pods).map(|(to, pod)| (*to, endpoint.then_some(pod)));
        rules.collect::<Vec<_>>()
    };
    let mut serving = Serving::default();
    serving.set_node_port_addresses(Arc::new([ip(NODE[0])]));
    let sockets = dialled.map(|to| dial(&net, "client", to));

    // 114: datagrams before the Service had rules went elsewhere, and their flows with them.
    rules(&net, &[]);
    for socket in &sockets[..2] {
        assert_eq!(udp_on(socket), Outcome::TimedOut);
    }
    // On the node's own address nobody listens, which the node says; that leaves a flow, too.
    assert_eq!(udp_on(&sockets[2]), Outcome::Refused);
    rules(&net, &all(true));
    for socket in &sockets[..2] {
        assert_eq!(udp_on(socket), Outcome::TimedOut, "the untranslated flow is still in force");
    }
    serving.update(&name("dns"), state(true));
    let done = swept(&sweeper, serving.take());
    assert_eq!(done.deleted, [2, 1]);
    sockets.iter().for_each(|socket| assert_eq!(who(socket), "a"));

    // 113: all endpoints gone.
    rules(&net, &all(false));
    sockets.iter().for_each(|socket| assert_eq!(who(socket), "a"));
    serving.update(&name("dns"), state(false));
    assert_eq!(swept(&sweeper, serving.take()).deleted, [2, 1]);
    sockets.iter().for_each(|socket| assert_eq!(udp_on(socket), Outcome::Refused));
    assert_eq!(node_flows(&net, "udp"), BTreeSet::new());

    // And back.
    rules(&net, &all(true));
    serving.update(&name("dns"), state(true));
    swept(&sweeper, serving.take());
    sockets.iter().for_each(|socket| assert_eq!(who(socket), "a"));

    // The Service is deleted: nothing is translated any more, not even for these sockets.
    rules(&net, &[]);
    serving.update(&name("dns"), []);
    assert_eq!(swept(&sweeper, serving.take()).deleted, [2, 1]);
    assert_eq!(udp_on(&sockets[0]), Outcome::TimedOut);
    assert_eq!(udp_on(&sockets[2]), Outcome::Refused);
}

#[test]
fn node_port_flows_are_those_to_the_addresses_that_serve_them() {
    let Some(net) = Net::new() else { return };
    let (first, second) = (to(NODE[0], 30053), to(NODE_SECOND, 30053));
    let (a, b) = (to(POD_A[0], 53), to(POD_B[0], 53));
    let elsewhere = to("198.51.100.77", 30053);
    let node_port = Frontend::NodePort(Family::V4, Protocol::Udp, 30053);
    let one: NodePortAddresses = Arc::new([ip(NODE[0])]);
    let both: NodePortAddresses = Arc::new([ip(NODE[0]), ip(NODE_SECOND)]);
    for (scope, deleted, of_second) in [(one, 1, "a"), (both, 2, "b")] {
        let sweeper = sweeper(&net);
        rules(&net, &[(first, Some(a)), (second, Some(a))]);
        let [one, two] = [first, second].map(|to| dial(&net, "client", to));
        assert_eq!((who(&one), who(&two)), ("a".into(), "a".into()));
        // 115: a pod's flow to the same port number of a host outside is none of a node port's.
        let foreign = dial(&net, "b", elsewhere);
        assert_eq!(udp_on(&foreign), Outcome::TimedOut);
        let line = |net: &Net| {
            let flows = node_flows(net, "udp");
            flows.into_iter().filter(|line| line.contains("dst=198.51.100.77")).collect::<Vec<_>>()
        };
        let before = line(&net);

        rules(&net, &[(first, Some(b)), (second, Some(b))]);
        let mut serving = Serving::default();
        serving.set_node_port_addresses(scope);
        serving.update(&name("dns"), [(node_port, by(&[b]))]);
        assert_eq!(swept(&sweeper, serving.take()).deleted, [deleted, 0]);
        assert_eq!((who(&one), who(&two)), ("b".into(), of_second.into()));
        assert_eq!((before.len(), line(&net)), (1, before));
        in_netns(&net.name("node"), || Command::new("conntrack").arg("-F").output().unwrap());
    }
}

#[test]
fn what_went_stale_while_no_proxy_ran_is_found_at_the_start() {
    let Some(net) = Net::new() else { return };
    let (vip, gone) = (to(VIP[0], 53), to("10.96.0.11", 53));
    let (a, b) = (to(POD_A[0], 53), to(POD_B[0], 53));
    rules(&net, &[(vip, Some(a)), (gone, Some(a))]);
    let [one, two] = [vip, gone].map(|to| dial(&net, "client", to));
    assert_eq!((who(&one), who(&two)), ("a".into(), "a".into()));
    rules(&net, &[(vip, Some(b))]);
    // A start: all Services, and the frontends of the table that was found.
    let mut serving = Serving::default();
    serving.update(&name("dns"), [(at(VIP[0], 53), by(&[b]))]);
    serving.found([at(VIP[0], 53), at("10.96.0.11", 53)]);
    assert_eq!(swept(&sweeper(&net), serving.take()).deleted, [2, 0]);
    assert_eq!(who(&one), "b");
    assert_eq!(udp_on(&two), Outcome::TimedOut);
}

/// Makes many flows of one client to a virtual address in the calling thread's namespace: the port it
/// comes from, and the endpoint.
fn make_flows(protocol: &str, endpoint_of: impl Fn(u16) -> IpAddr, ports: std::ops::Range<u16>) {
    let more = if protocol == "tcp" { "--state ESTABLISHED" } else { "" };
    let mut text = String::new();
    for port in ports {
        let endpoint = endpoint_of(port);
        text += &format!(
            "-I -p {protocol} -s {client} -d {vip} --sport {port} --dport 53 -r {endpoint} \
             -q {client} --reply-port-src 53 --reply-port-dst {port} -t 600 -u SEEN_REPLY {more}\n",
            client = CLIENT[0],
            vip = VIP[0],
        );
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let output = Command::new("conntrack").arg("-R").arg(file.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn thousands_of_flows_are_swept_and_those_that_stay_are_the_same_as_before() {
    in_namespace(|| {
        let endpoint = |port: u16| ip(if port.is_multiple_of(2) { POD_A[0] } else { POD_B[0] });
        make_flows("udp", endpoint, 1000..21000);
        make_flows("tcp", endpoint, 1000..2000);
        let (udp_before, tcp_before) = (flows("ipv4", "udp"), flows("ipv4", "tcp"));
        assert_eq!((udp_before.len(), tcp_before.len()), (20000, 1000));
        let sweeper = Sweeper::start().unwrap();
        let mut sweep = Sweep::default();
        sweep.served(at(VIP[0], 53), &name("dns"), by(&[to(POD_B[0], 53)]));
        let done = swept(&sweeper, Some(sweep));
        assert_eq!((done.deleted, done.listed), ([10000, 0], 20000));
        let kept = |line: &&String| line.contains(&format!("src={} ", POD_B[0]));
        let expected: BTreeSet<_> = udp_before.iter().filter(kept).cloned().collect();
        assert_eq!(expected.len(), 10000);
        assert!(flows("ipv4", "udp") == expected);
        assert!(flows("ipv4", "tcp") == tcp_before);
    });
}

#[test]
fn what_is_committed_while_a_sweep_runs_is_not_undone_by_it() {
    const FLOWS: u16 = 60000;
    in_namespace(|| {
        make_flows("udp", |_| ip(POD_A[0]), 1000..1000 + FLOWS);
        let sweeper = Sweeper::start().unwrap();
        let mut serving = Serving::default();
        let (a, b) = (to(POD_A[0], 53), to(POD_B[0], 53));
        let count = || {
            let text = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
            text.unwrap().trim().parse::<u64>().unwrap()
        };
        serving.update(&name("dns"), [(at(VIP[0], 53), by(&[b]))]);
        sweeper.sweep(serving.take().unwrap());
        wait_until("the sweep to be under way", || count() < u64::from(FLOWS));
        serving.update(&name("dns"), [(at(VIP[0], 53), by(&[a, b]))]);
        sweeper.sweep(serving.take().unwrap());
        wait_until("the sweep", || sweeper.counters().sweeps == 1);
        let deleted = sweeper.counters().deleted[0];
        assert!(deleted > 0, "it was under way");
        assert!(deleted < u64::from(FLOWS), "it went on");
        assert_eq!(count(), u64::from(FLOWS) - deleted);
    });
}

#[test]
fn churn_costs_few_listings() {
    in_namespace(|| {
        let endpoint = |_| ip(POD_A[0]);
        make_flows("udp", endpoint, 1000..6000);
        let sweeper = Sweeper::start().unwrap();
        let mut serving = Serving::default();
        let mut asked = 0;
        for round in 0..5000_u16 {
            let [high, low] = round.to_be_bytes();
            let pod = SocketAddr::from(([10, 245, high, low], 53));
            serving.update(&name("dns"), [(at(VIP[0], 53), by(&[pod, to(POD_A[0], 53)]))]);
            if let Some(sweep) = serving.take() {
                asked += 1;
                sweeper.sweep(sweep);
            }
        }
        serving.update(&name("dns"), []);
        sweeper.sweep(serving.take().unwrap());
        wait_until("the last change to be swept", || sweeper.counters().deleted == [5000, 0]);
        assert_eq!(asked, 5000);
        let sweeps = sweeper.counters().sweeps;
        assert!(sweeps < asked / 10, "{sweeps} listings for {asked} changes");
    });
}

/// Set where a test runs once more, alone in a process of its own.
const CHILD: &str = "NFTPROXY_TEST_SWEEP_CHILD";

/// Runs a test of this file alone in a process, in the namespace of the calling thread, behind
/// another program if one is named; returns what it printed.
fn alone(name: &str, value: &str, behind: &[&str]) -> String {
    let program = std::env::current_exe().unwrap();
    let mut words: Vec<&OsStr> = behind.iter().map(OsStr::new).collect();
    words.push(program.as_os_str());
    let output = Command::new(words[0])
        .args(&words[1..])
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD, value)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{words}");
    text
}

#[test]
fn a_sweep_needs_the_same_memory_whatever_the_number_of_flows() {
    const NAME: &str = "conntrack::a_sweep_needs_the_same_memory_whatever_the_number_of_flows";
    if let Ok(stale) = std::env::var(CHILD) {
        // The child, alone in its process, in the namespace that was made for it.
        let sweeper = Sweeper::start().unwrap();
        let mut sweep = Sweep::default();
        sweep.served(at(VIP[0], 53), &name("dns"), by(&[to(POD_B[0], 53)]));
        let deleted = swept(&sweeper, Some(sweep)).deleted[0];
        assert_eq!(deleted.to_string(), stale);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        println!("{}", status.lines().find(|line| line.starts_with("VmHWM:")).unwrap());
        return;
    }
    let peak = |flows: u16| {
        let endpoint = |port: u16| ip(if port.is_multiple_of(4) { POD_B[0] } else { POD_A[0] });
        make_flows("udp", endpoint, 1000..1000 + flows);
        let text = alone(NAME, &(flows / 4 * 3).to_string(), &[]);
        let line = text.lines().find(|line| line.contains("VmHWM:")).expect("the child's figure");
        let figure = line.split_whitespace().rev().nth(1).unwrap();
        Command::new("conntrack").arg("-F").output().unwrap();
        figure.parse::<u64>().unwrap()
    };
    in_namespace(|| {
        let (few, many) = (peak(400), peak(60000));
        // 60,000 flows are 6 MB of messages, and would be as much if they were kept in some form.
        assert!(many < few + 1024, "{few} kB with few flows, {many} kB with many");
    });
}

#[test]
fn what_was_asked_for_is_done_before_the_end() {
    in_namespace(|| {
        make_flows("udp", |_| ip(POD_A[0]), 1000..1010);
        let mut sweep = Sweep::default();
        sweep.served(at(VIP[0], 53), &name("dns"), by(&[]));
        let sweeper = Sweeper::start().unwrap();
        sweeper.sweep(sweep);
        drop(sweeper);
        assert_eq!(flows("ipv4", "udp"), BTreeSet::new());
    });
}

#[test]
fn a_sweep_that_fails_is_repeated_until_it_succeeds() {
    const NAME: &str = "conntrack::a_sweep_that_fails_is_repeated_until_it_succeeds";
    if std::env::var_os(CHILD).is_some() {
        // The child has few files, and uses them up: there is no socket to be had.
        let mut hoard = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            hoard.push(file);
        }
        let sweeper = Sweeper::start().unwrap();
        let mut sweep = Sweep::default();
        sweep.served(at(VIP[0], 53), &name("dns"), by(&[]));
        sweeper.sweep(sweep);
        wait_until("two failures", || sweeper.counters().failures >= 2);
        assert_eq!(sweeper.counters().sweeps, 0);
        drop(hoard);
        wait_until("the sweep", || sweeper.counters().sweeps == 1);
        assert_eq!(sweeper.counters().deleted, [10, 0]);
        println!("repeated");
        return;
    }
    in_namespace(|| {
        make_flows("udp", |_| ip(POD_A[0]), 1000..1010);
        assert!(alone(NAME, "", &["prlimit", "--nofile=64"]).contains("repeated"));
    });
}

#[test]
fn other_clients_of_the_same_frontend_are_balanced_as_before() {
    let Some(net) = Net::new() else { return };
    let sweeper = sweeper(&net);
    let (vip, a, b) = (to(VIP[0], 53), to(POD_A[0], 53), to(POD_B[0], 53));
    rules(&net, &[(vip, Some(a))]);
    let mut serving = Serving::default();
    serving.update(&name("dns"), [(at(VIP[0], 53), by(&[a]))]);
    swept(&sweeper, serving.take());
    // A busy client never stops; it must not see more than the one moment of change.
    let busy = dial(&net, "client", vip);
    for round in 0..20 {
        let (endpoint, expected) = if round % 2 == 0 { (b, "b") } else { (a, "a") };
        rules(&net, &[(vip, Some(endpoint))]);
        serving.update(&name("dns"), [(at(VIP[0], 53), by(&[endpoint]))]);
        assert_eq!(swept(&sweeper, serving.take()).sweeps, 1);
        assert_eq!(who(&busy), expected, "round {round}");
        assert!(matches!(udp(&net.name("remote"), vip), Outcome::Answered { .. }));
    }
}

#[test]
fn the_daemon_removes_what_its_commits_left_stale() {
    let Some(net) = Net::new() else { return };
    let service = Svc {
        name: "dns",
        cluster_ips: &["10.96.0.10", "fd00:10:96::10"],
        ports: &[("dns", "UDP", 53, 30053)],
        spec: &[],
        balancer_ips: &[],
    };
    let ports = [("dns", "UDP", 53)];
    let pods = |four: &[&str], six: &[&str]| {
        slice("dns", "4", &ports, four) + &slice("dns", "6", &ports, six)
    };
    let a = pods(&["10.244.1.5!"], &["fd00:10:244:1::5!"]);
    let b = pods(&["10.244.1.6!"], &["fd00:10:244:1::6!"]);
    net.write("dns.yaml", &(CLUSTER.to_owned() + &service.yaml()));
    net.write("pods.yaml", &a);
    let dir = net.manifests();
    let arguments = ["run", "--manifests", dir.to_str().unwrap(), "--hostname-override", "node-1"];
    let start = || Daemon::start(&net.name("node"), &arguments);
    let mut daemon = start();
    let dialled = [to(VIP[0], 53), to(VIP[1], 53), to(NODE[0], 30053), to(NODE[1], 30053)];
    let sockets = dialled.map(|to| dial(&net, "client", to));
    let all = |wanted: &str| sockets.iter().all(|socket| who(socket) == wanted);
    assert!(all("a"));
    // 111: the endpoint is replaced under sockets that stay.
    net.write("pods.yaml", &b);
    wait_until("b to answer", || all("b"));
    daemon.wait_for("removed stale UDP flows flows=4 services=default/dns 4");
    // 113: scaled to zero, and up again.
    net.write("pods.yaml", &pods(&[], &[]));
    let refused = || sockets.iter().all(|socket| udp_on(socket) == Outcome::Refused);
    wait_until("everybody to be refused", refused);
    net.write("pods.yaml", &a);
    wait_until("a to answer", || all("a"));
    // What changed while no daemon ran is swept at its start.
    daemon.kill9();
    net.write("pods.yaml", &b);
    assert!(all("a"));
    daemon = start();
    wait_until("b to answer", || all("b"));
    daemon.kill9();
    net.write("pods.yaml", "");
    net.write("dns.yaml", CLUSTER);
    let _daemon = start();
    let answered = |socket| matches!(udp_on(socket), Outcome::Answered { .. });
    wait_until("nobody to answer", || !sockets.iter().any(answered));
}
