//! What a process of this program may do, what those can do who reach its ports, and what it never tells.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sched::CloneFlags;

use crate::http::get;
use crate::namespace::lacks;
use crate::net::{Daemon, NODE, Net, in_netns, patient, wait_until};
use crate::objects::{CLUSTER, Svc};
use crate::packets::{run, to};

const NET_BIND_SERVICE: u64 = 1 << 10;
const NET_ADMIN: u64 = 1 << 12;
const NET_RAW: u64 = 1 << 13;
const SYS_RESOURCE: u64 = 1 << 24;

/// Fields of the status of each thread of a process.
fn of_all_threads(daemon: &Daemon, field: &str) -> BTreeSet<u64> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let statuses =
        tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok());
    let value = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap().to_owned();
        u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
    };
    statuses.map(value).collect()
}

fn is_confined(daemon: &Daemon, may: u64) {
    // `nftproxy`, two workers, and threads for programming, for the host and for others' changes.
    let threads = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap().count();
    assert!(threads >= 5, "{threads}");
    for (field, expected) in [
        ("CapEff", may),
        ("CapPrm", may),
        ("CapBnd", may),
        ("CapInh", 0),
        ("CapAmb", 0),
        ("NoNewPrivs", 1),
        // By filters.
        ("Seccomp", 2),
    ] {
        assert_eq!(of_all_threads(daemon, field), [expected].into(), "{field}");
    }
}

#[test]
fn the_daemon_keeps_no_capability_that_it_does_not_need_and_can_gain_none() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    // What takes privileges beside changing tables: a low port, and sysctls.
    let config = net.dir.path().join("config.conf");
    let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                oomScoreAdj: -998\nhealthzBindAddress: 0.0.0.0:256\nbindAddressHardFail: true\n\
                conntrack: { tcpEstablishedTimeout: 1h17m }\nnftproxy: { localhostNodePorts: true }\n";
    fs::write(&config, text).unwrap();
    let daemon = run(&net, &["--config", config.to_str().unwrap()]);
    is_confined(&daemon, NET_ADMIN | NET_BIND_SERVICE);
    let node = net.name("node");
    let sysctl = |key: &str| {
        in_netns(&node, || {
            fs::read_to_string(format!("/proc/sys/net/{key}")).unwrap().trim().to_owned()
        })
    };
    wait_until("loopback to be routed", || sysctl("ipv4/conf/all/route_localnet") == "1");
    assert_eq!(sysctl("netfilter/nf_conntrack_tcp_timeout_established"), "4620");
    let adjusted = fs::read_to_string(format!("/proc/{}/oom_score_adj", daemon.pid())).unwrap();
    // Root of a container may not have it either.
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
    let may = u64::from_str_radix(own, 16).unwrap() & SYS_RESOURCE != 0;
    assert_eq!(adjusted.trim(), if may { "-998" } else { "0" });
    assert_eq!(get(&net, "client", to(NODE[0], 256), "/healthz").unwrap().code, 200);
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
    drop(daemon);
    // Where the old iptables has tables, they are looked into, for which its program opens a raw socket.
    let made =
        in_netns(&node, || Command::new("iptables-legacy").args(["-t", "nat", "-L"]).output());
    if made.is_ok_and(|made| made.status.success()) {
        let daemon = run(&net, &[]);
        is_confined(&daemon, NET_ADMIN | NET_BIND_SERVICE | NET_RAW);
    } else {
        lacks("ip_tables");
    }
}

/// What a system call that cannot be had fails with.
fn refused<T>(outcome: std::io::Result<T>) -> Option<i32> {
    outcome.err().and_then(|error| error.raw_os_error())
}

#[test]
fn what_no_proxy_needs_is_refused_and_everything_else_works() {
    let Some(net) = Net::new() else { return };
    let socket = |domain: i32, kind| refused(socket2::Socket::new(domain.into(), kind, None));
    let (stream, raw) = (socket2::Type::STREAM, socket2::Type::RAW);
    let program = || refused(Command::new("true").status());
    for programs in [true, false] {
        // It is for this thread, and goes with it.
        in_netns(&net.name("node"), || {
            // As root that may do all: it is not for want of a capability.
            let before = (program(), socket(libc::AF_PACKET, raw));
            assert_eq!(before, (None, None));
            nftproxy::host::refuse_system_calls(programs).unwrap();
            assert_eq!(program(), (!programs).then_some(libc::EPERM));
            let denied = Some(libc::EPERM);
            assert_eq!(socket(libc::AF_PACKET, raw), denied);
            assert_eq!(socket(libc::AF_ALG, socket2::Type::SEQPACKET), denied);
            assert_eq!(socket(libc::AF_VSOCK, stream), denied);
            let file = fs::File::open("/proc/self/ns/net").unwrap();
            let calls: [(&str, nix::Result<()>); 7] = [
                ("unshare", nix::sched::unshare(CloneFlags::CLONE_NEWNET)),
                ("setns", nix::sched::setns(file, CloneFlags::CLONE_NEWNET)),
                ("mount", nix::mount::umount("/nowhere")),
                ("chroot", nix::unistd::chroot("/")),
                ("ptrace", nix::sys::ptrace::traceme()),
                ("sethostname", nix::unistd::sethostname("x")),
                ("reboot", nix::sys::reboot::set_cad_enabled(true)),
            ];
            for (name, outcome) in calls {
                assert_eq!(outcome, Err(nix::errno::Errno::EPERM), "{name}");
            }
            // What it lives by.
            std::thread::spawn(|| ()).join().unwrap();
            for domain in [libc::AF_INET, libc::AF_INET6, libc::AF_UNIX] {
                assert_eq!(socket(domain, stream), None);
            }
            assert_eq!(socket(libc::AF_NETLINK, raw), None);
        });
    }
}

/// A kubeconfig whose credentials a program tells: it is started, and what it says is sent.
#[test]
fn credentials_of_a_program_are_had_all_the_same() {
    let Some(net) = Net::new() else { return };
    let seen = refusing(&net);
    let path = net.dir.path().join("kubeconfig");
    let told = format!(
        "{{\"apiVersion\": \"client.authentication.k8s.io/v1\", \"kind\": \"ExecCredential\", \
         \"status\": {{\"token\": \"{TOKEN}\"}}}}"
    );
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
         clusters: [{{ name: c, cluster: {{ server: \"http://127.0.0.1:6443\" }} }}]\n\
         users:\n- name: u\n  user:\n    exec:\n      apiVersion: client.authentication.k8s.io/v1\n      \
         command: echo\n      args: ['{told}']\n      interactiveMode: Never\n\
         contexts: [{{ name: c, context: {{ cluster: c, user: u }} }}]\n"
    );
    fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    let daemon = Daemon::spawn(
        &net.name("node"),
        &["run", "--hostname-override", "node-1", "--kubeconfig", path],
    );
    let authorized = |line: &String| line.contains(&format!("Bearer {TOKEN}"));
    wait_until("the token to be sent", || seen.lock().unwrap().iter().any(authorized));
    is_confined(&daemon, NET_ADMIN | NET_BIND_SERVICE);
    drop(daemon);
}

/// A process in the client's namespace that opens so many connections, sends the beginning of a request on
/// each, and waits.
struct Slow(Child);

impl Slow {
    fn new(net: &Net, port: u16, connections: usize) -> Self {
        let script = format!(
            "ulimit -Sn $(ulimit -Hn); for i in $(seq {connections}); do \
             exec {{fd}}<>/dev/tcp/{}/{port} && printf 'GET /healthz HTTP/1.1\\r\\nHost: x' >&$fd; done \
             2>/dev/null; echo done; sleep 60",
            NODE[0]
        );
        let mut child = Command::new("ip")
            .args(["netns", "exec", &net.name("client"), "bash", "-c", &script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "done\n");
        Self(child)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Found by hand: with 128 connections that sent nothing, all others waited, a probe of the kubelet as well.
#[test]
fn a_thousand_slow_clients_keep_nobody_from_an_answer() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    let daemon = run(&net, &["--metrics-bind-address", "0.0.0.0:10249"]);
    let open = || fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    let before = open();
    let ports = [(10256, "/livez"), (10249, "/metrics")];
    let _slow = ports.map(|(port, _)| Slow::new(&net, port, 1000));
    let began = Instant::now();
    for (port, path) in ports.repeat(5) {
        // It panics when nothing comes for five seconds.
        let page = get(&net, "client", to(NODE[0], port), path).expect("an answer");
        assert_eq!(page.code, 200);
    }
    // Within the time that a slow client is given for its request: none of them had to be waited for.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let after = open();
    assert!(after > before + 100 && after < before + 300, "{before} and {after} files");
    drop(daemon);
}

/// Sends this, and says what came until the connection was ended, and when that was.
fn until_ended(net: &Net, port: u16, text: &[u8]) -> (String, Duration) {
    in_netns(&net.name("client"), || {
        let mut stream = TcpStream::connect(to(NODE[0], port)).unwrap();
        stream.set_read_timeout(Some(patient(Duration::from_secs(60)))).unwrap();
        let began = Instant::now();
        // It may be ended while it is sent.
        let _ = stream.write_all(text);
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
            _ => (String::from_utf8(answer).unwrap(), began.elapsed()),
        }
    })
}

#[test]
fn a_request_has_ten_seconds_and_sixteen_kilobytes() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    let daemon = run(&net, &["--metrics-bind-address", "0.0.0.0:10249"]);
    for (port, path) in [(10256, "/livez"), (10249, "/metrics")] {
        let request = |filler: usize| {
            let filler = "x".repeat(filler);
            format!("GET {path} HTTP/1.1\r\nConnection: close\r\nFiller: {filler}\r\n\r\n")
        };
        let (answer, _) = until_ended(&net, port, request(12 << 10).as_bytes());
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let (answer, _) = until_ended(&net, port, request(64 << 10).as_bytes());
        assert!(!answer.contains(" 200 "), "{answer}");
        let (answer, after) = until_ended(&net, port, b"GET /livez HTTP/1.1\r\nHost: x");
        assert!(!answer.contains(" 200 "), "{answer}");
        assert!(after >= Duration::from_secs(9) && after < Duration::from_secs(40), "{after:?}");
    }
    drop(daemon);
}

/// Sockets that a process has, of a table of the kernel in which these columns are the state and the inode;
/// the rows of those in that state.
fn sockets(daemon: &Daemon, table: &str, [of, inode]: [usize; 2], state: &str) -> Vec<String> {
    let process = format!("/proc/{}", daemon.pid());
    let files = fs::read_dir(format!("{process}/fd")).unwrap();
    let files: BTreeSet<_> =
        files.filter_map(|file| fs::read_link(file.unwrap().path()).ok()).collect();
    let text = fs::read_to_string(format!("{process}/net/{table}")).unwrap();
    let rows = text.lines().skip(1).filter(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        let file = format!("socket:[{}]", columns[inode]);
        columns[of] == state && files.contains(std::path::Path::new(&file))
    });
    rows.map(str::to_owned).collect()
}

#[test]
fn it_listens_on_the_ports_that_are_told_and_on_nothing_else() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    let checked = Svc {
        name: "checked",
        cluster_ips: &["10.96.0.10"],
        ports: &[("http", "TCP", 80, 30080), ("dns", "UDP", 53, 30053)],
        spec: &["externalTrafficPolicy: Local", "healthCheckNodePort: 31000"],
        balancer_ips: &["203.0.113.1"],
    };
    net.write("checked.yaml", &checked.yaml());
    let daemon = run(&net, &[]);
    let listening = || -> BTreeSet<u16> {
        let of = |table| sockets(&daemon, table, [3, 9], "0A");
        let local = |row: String| row.split_whitespace().nth(1).unwrap().to_owned();
        let port = |row| u16::from_str_radix(local(row).rsplit(':').next().unwrap(), 16).unwrap();
        ["tcp", "tcp6"].into_iter().flat_map(of).map(port).collect()
    };
    wait_until("its ports", || listening() == [10249, 10256, 31000].into());
    // In this state they are bound and not connected.
    for table in ["udp", "udp6", "raw", "raw6"] {
        assert_eq!(sockets(&daemon, table, [3, 9], "07"), [""; 0], "{table}");
    }
    assert_eq!(sockets(&daemon, "unix", [3, 6], "00010000"), [""; 0]);
}

const TOKEN: &str = "t0ken-nobody-may-see";

/// An API server that refuses everything; what it was sent.
fn refusing(net: &Net) -> Arc<Mutex<Vec<String>>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let listener = in_netns(&net.name("node"), || TcpListener::bind("127.0.0.1:6443").unwrap());
    let sent = seen.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let sent = sent.clone();
            std::thread::spawn(move || {
                let mut lines =
                    BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let mut stream = stream;
                loop {
                    let head: Vec<String> =
                        lines.by_ref().take_while(|line| !line.is_empty()).collect();
                    if head.is_empty() {
                        return;
                    }
                    sent.lock().unwrap().extend(head);
                    let body = r#"{"kind":"Status","apiVersion":"v1","status":"Failure","message":"no","reason":"Forbidden","code":403}"#;
                    let answer = format!(
                        "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                        body.len()
                    );
                    if stream.write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    seen
}

#[test]
fn a_token_is_in_no_log_no_metric_and_no_configuration() {
    let Some(net) = Net::new() else { return };
    let seen = refusing(&net);
    let kubeconfig = |token: &str| {
        let path = net.dir.path().join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             clusters: [{{ name: c, cluster: {{ server: \"http://127.0.0.1:6443\" }} }}]\n\
             users:\n- name: u\n  user:\n    token: {token}\n\
             contexts: [{{ name: c, context: {{ cluster: c, user: u }} }}]\n"
        );
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let path = kubeconfig(TOKEN);
    let arguments = ["run", "--hostname-override", "node-1", "--kubeconfig", &path, "-v", "10"];
    let daemon = Daemon::spawn(&net.name("node"), &arguments);
    let authorized = |line: &String| line.contains(&format!("Bearer {TOKEN}"));
    wait_until("the token to be sent", || seen.lock().unwrap().iter().any(authorized));
    daemon.wait_for("403");
    is_confined(&daemon, NET_ADMIN | NET_BIND_SERVICE);
    let mut told = daemon.log();
    assert!(told.contains("TRACE"), "the log of everything");
    let pages = [
        (10249, "/metrics"),
        (10249, "/configz"),
        // What a support archive has of the log.
        (10249, "/debug/log"),
        (10256, "/healthz"),
    ];
    for (port, path) in pages {
        wait_until("the port to be open", || {
            get(&net, "node", to("127.0.0.1", port), path).is_some()
        });
        let body = get(&net, "node", to("127.0.0.1", port), path).unwrap().body;
        assert!(path != "/debug/log" || body.contains("TRACE"), "{body}");
        told += &body;
    }
    assert!(told.contains("rest_client_requests_total") && told.contains("kubeconfig"));
    let line = told.lines().find(|line| line.contains(TOKEN));
    assert_eq!(line, None);
    drop(daemon);
    // Nor in what is said of a file that cannot be read.
    for broken in
        [format!("[{TOKEN}"), format!("{{ {TOKEN}: {TOKEN} }}"), format!("{TOKEN}\n  x: \"{TOKEN}")]
    {
        let path = kubeconfig(&broken);
        let output = Command::new("ip")
            .args(["netns", "exec", &net.name("node"), env!("CARGO_BIN_EXE_nftproxy"), "run"])
            .args(["--hostname-override", "node-1", "--kubeconfig", &path])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("kubeconfig") && !said.contains(TOKEN), "{said}");
    }
}

/// A pipe whose reader is gone, a full disk: the log is lost, and nothing else.
#[test]
fn a_log_that_cannot_be_written_ends_nothing() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    let dir = net.manifests().display().to_string();
    let by = ["sh", "-c", "exec \"$@\" 2>/dev/full", "sh"];
    let arguments = ["run", "--manifests", &dir, "--hostname-override", "node-1", "-v", "2"];
    let mut daemon = Daemon::spawn_by(&net.name("node"), &by, &arguments);
    let log = || get(&net, "node", to("127.0.0.1", 10249), "/debug/log");
    wait_until("everything to be programmed", || {
        log().is_some_and(|log| log.body.contains(" synced "))
    });
    daemon.end(nix::sys::signal::Signal::SIGTERM);
}
