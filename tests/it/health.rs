//! Health of the proxy, the node and single Services, as probes and load balancers see it. Numbers
//! are rows of `tests/scenario-comparison.md`.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, ListParams};

use crate::control_plane::User;
use crate::e2e::with_cluster;
use crate::http::{Page, get, request};
use crate::net::{CLIENT, Daemon, NODE, NODE_SECOND, Net, in_netns, wait_until};
use crate::objects::{CLUSTER, Svc, slice};
use crate::packets::{CIDRS, HTTP, answered, one, run, to};

const PORT: u16 = 32100;

/// A load balancer's Service in both families, with a health check.
fn service(name: &str, number: u8, port: u16) -> String {
    let four = format!("10.96.0.{number}");
    let six = format!("fd00:10:96::{number}");
    let check = format!("healthCheckNodePort: {port}");
    Svc {
        name,
        cluster_ips: &[&four, &six],
        ports: &[("http", "TCP", 80, 30000 + u16::from(number)), ("more", "TCP", 81, 0)],
        spec: &["externalTrafficPolicy: Local", &check],
        balancer_ips: &[&format!("203.0.113.{number}"), &format!("fd00:203::{number}")],
    }
    .yaml()
}

fn health(net: &Net, path: &str) -> Page {
    get(net, "client", to(NODE[0], 10256), path).expect("the health server listens")
}

/// What a load balancer hears of a Service: the code, and the weight.
fn check(net: &Net, at: SocketAddr) -> Option<(u16, usize)> {
    let page = get(net, "client", at, "/any/path")?;
    let weight = page.headers["x-load-balancing-endpoint-weight"].parse().unwrap();
    let body = page.json();
    assert_eq!(body["localEndpoints"], weight);
    assert_eq!(page.code == 200, weight > 0 && body["serviceProxyHealthy"] == true, "{page:?}");
    Some((page.code, weight))
}

/// Waits until load balancers hear this on both of the node's addresses.
fn hears(net: &Net, port: u16, expected: [Option<(u16, usize)>; 2]) {
    let addresses = NODE.map(|node| to(node, port));
    let mut heard = [None; 2];
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(10) {
        heard = addresses.map(|at| check(net, at));
        if heard == expected {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{addresses:?}: {heard:?}, expected {expected:?}");
}

fn config(net: &Net, fields: &str) -> String {
    let path = net.dir.path().join("config.conf");
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    std::fs::write(&path, format!("{head}{fields}")).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_service_is_checked_by_its_endpoints_here() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    net.write("web.yaml", &service("web", 10, PORT));
    let four = |endpoints: &[&str]| net.write("web-4.yaml", &slice("web", "4", &HTTP, endpoints));
    four(&["10.244.1.5!"]);
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    // 124; the families count apart.
    hears(&net, PORT, [Some((200, 1)), Some((503, 0))]);
    let page = get(&net, "client", to(NODE[0], PORT), "/").unwrap();
    assert_eq!(
        page.body,
        "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": true\n}"
    );
    let post = "POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    assert_eq!(request(&net, "client", to(NODE[0], PORT), post).unwrap().body, page.body);
    assert_eq!(check(&net, to(NODE_SECOND, PORT)), None, "node ports are on the primary address");
    // 125
    four(&["10.244.1.5! serving terminating", "10.244.1.6!  serving terminating"]);
    hears(&net, PORT, [Some((503, 0)), Some((503, 0))]);
    four(&["10.244.1.5! ready serving", "10.244.1.6! ready serving", "10.244.2.9"]);
    net.write("web-6.yaml", &slice("web", "6", &HTTP, &["fd00:10:244:1::5!"]));
    hears(&net, PORT, [Some((200, 2)), Some((200, 1))]);
}

#[test]
fn health_check_ports_open_and_close_with_their_services() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    net.write("web.yaml", &service("web", 10, PORT));
    let endpoints = |name| slice(name, "4", &HTTP, &["10.244.1.5!"]);
    net.write("endpoints.yaml", &(endpoints("web") + &endpoints("api")));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let open = [Some((200, 1)), Some((503, 0))];
    hears(&net, PORT, open);
    // A new Service, beside.
    net.write("api.yaml", &service("api", 11, PORT + 1));
    hears(&net, PORT + 1, open);
    // Another port.
    net.write("web.yaml", &service("web", 10, PORT + 2));
    hears(&net, PORT + 2, open);
    hears(&net, PORT, [None, None]);
    // Two Services change places at once.
    let swapped = service("web", 10, PORT + 1) + &service("api", 11, PORT + 2);
    std::fs::remove_file(net.manifests().join("web.yaml")).unwrap();
    net.write("api.yaml", &swapped);
    let name = |port| {
        let page = get(&net, "client", to(NODE[0], port), "/")?;
        Some(page.json()["service"]["name"].as_str().unwrap().to_owned())
    };
    let began = Instant::now();
    wait_until("the ports to change hands", || {
        // One opens when the other closes, and not at the next try.
        assert!(began.elapsed() < Duration::from_secs(4), "it took a second try");
        name(PORT + 1).as_deref() == Some("web") && name(PORT + 2).as_deref() == Some("api")
    });
    // No health check any more, and no Service.
    let without = service("web", 10, 0).replace("  healthCheckNodePort: 0\n", "");
    net.write("api.yaml", &without.replace("Policy: Local", "Policy: Cluster"));
    hears(&net, PORT + 1, [None, None]);
    hears(&net, PORT + 2, [None, None]);
}

#[test]
fn a_taken_health_check_port_is_said_and_tried_again() {
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &(CLUSTER.to_owned() + &service("web", 10, PORT)));
    net.write("web-4.yaml", &slice("web", "4", &HTTP, &["10.244.1.5!"]));
    let listen = |address: &str| {
        let at = to(address, PORT);
        in_netns(&net.name("node"), || TcpListener::bind(at).unwrap())
    };
    let (taken, other) = (listen(NODE[0]), listen("127.0.0.1"));
    let daemon = run(&net, &["--cluster-cidr", CIDRS]);
    daemon.wait_for("cannot open the health-check node port");
    // The other family does not wait for this one, and traffic for neither.
    wait_until("the other family to listen", || check(&net, to(NODE[1], PORT)) == Some((503, 0)));
    assert_eq!(health(&net, "/healthz").code, 200);
    drop(taken);
    hears(&net, PORT, [Some((200, 1)), Some((503, 0))]);
    let said = daemon.log().matches("cannot open the health-check node port").count();
    assert_eq!(said, 1, "{}", daemon.log());
    drop(other);
}

#[test]
fn a_node_that_leaves_is_not_sent_traffic_and_not_restarted() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    net.write("web.yaml", &service("web", 10, PORT));
    net.write("web-4.yaml", &slice("web", "4", &HTTP, &["10.244.1.5!"]));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let verdict = |eligible: bool| {
        wait_until("/healthz to say what the node is", || {
            health(&net, "/healthz").json()["nodeEligible"] == eligible
        });
        let page = health(&net, "/healthz");
        assert_eq!(page.code, if eligible { 200 } else { 503 }, "{page:?}");
        assert_eq!(page.json()["healthy"], true);
        let page = health(&net, "/livez");
        assert_eq!((page.code, &page.json()["nodeEligible"]), (200, &serde_json::Value::Null));
        // Whether a Service has endpoints here is another matter.
        assert_eq!(check(&net, to(NODE[0], PORT)), Some((200, 1)));
    };
    verdict(true);
    for family in ["IPv4", "IPv6"] {
        let status = &health(&net, "/livez").json()["status"][family];
        assert_eq!(status["healthy"], true);
        assert!(status["lastUpdated"].as_str().unwrap().starts_with("20"), "{status}");
    }
    // 127
    let taint = "spec: { taints: [{ key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule }], ";
    net.write("cluster.yaml", &CLUSTER.replace("spec: { podCIDRs", &format!("{taint}podCIDRs")));
    verdict(false);
    let other = "spec: { unschedulable: true, taints: [{ key: other, effect: NoExecute }], ";
    net.write("cluster.yaml", &CLUSTER.replace("spec: { podCIDRs", &format!("{other}podCIDRs")));
    verdict(true);
    let deleted = "{ name: node-1, deletionTimestamp: \"2026-01-02T03:04:05Z\" }";
    net.write("cluster.yaml", &CLUSTER.replace("{ name: node-1 }", deleted));
    verdict(false);
    net.write("cluster.yaml", CLUSTER);
    verdict(true);
    std::fs::remove_file(net.manifests().join("cluster.yaml")).unwrap();
    verdict(false);
    let page = health(&net, "/other");
    assert_eq!((page.code, page.body.as_str()), (404, "404 page not found\n"));
    // Go's listener for 0.0.0.0 takes both families.
    assert_eq!(get(&net, "client", to(NODE[1], 10256), "/livez").unwrap().code, 200);
}

/// A rolling update stops it on a node that goes on working: nobody is to be told otherwise.
#[test]
fn a_proxy_that_stops_answers_what_was_asked_and_then_no_more() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    net.write("web.yaml", &service("web", 10, PORT));
    net.write("web-4.yaml", &slice("web", "4", &HTTP, &["10.244.1.5!"]));
    let daemon = run(&net, &["--cluster-cidr", CIDRS]);
    hears(&net, PORT, [Some((200, 1)), Some((503, 0))]);
    let places = [(to(NODE[0], 10256), "/healthz"), (to(NODE[0], PORT), "/")];
    // Connections with half a request each, an idle one, and probes without a pause.
    let mut begun: Vec<_> = in_netns(&net.name("client"), || {
        let connect = |at: SocketAddr| std::net::TcpStream::connect(at).unwrap();
        let idle = connect(places[0].0);
        let half = places.map(|(at, path)| {
            let mut stream = connect(at);
            stream.write_all(format!("GET {path} HTTP/1.1\r\nHost").as_bytes()).unwrap();
            stream
        });
        half.into_iter().chain([idle]).collect()
    });
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let probing = scope.spawn(|| {
            let mut codes = std::collections::BTreeSet::new();
            while !stop.load(Ordering::Relaxed) {
                codes.extend(get(&net, "client", places[0].0, "/healthz").map(|page| page.code));
            }
            codes
        });
        let terminating = scope.spawn(move || daemon.terminate());
        std::thread::sleep(Duration::from_millis(300));
        for stream in &mut begun[..2] {
            stream.write_all(b": x\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("it is answered, and closed");
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            assert!(answer.to_lowercase().contains("connection: close"), "{answer}");
        }
        terminating.join().unwrap();
        stop.store(true, Ordering::Relaxed);
        assert_eq!(probing.join().unwrap(), [200].into(), "as fit as before");
    });
    for (at, path) in places {
        assert_eq!(get(&net, "client", at, path), None, "nobody listens");
    }
    let seen = one(&net, "client", to("203.0.113.10", 80));
    assert_eq!(seen, answered("a", 8080, CLIENT[0]), "traffic goes on");
}

/// Tables of our name that belong to somebody else, who has to be alive for that.
fn owned_by_another(net: &Net) -> Child {
    let netns = net.name("node");
    let mut nft = Command::new("ip")
        .args(["netns", "exec", &netns, "nft", "-i"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = "delete table ip nftproxy; add table ip nftproxy { flags owner; }\n";
    nft.stdin.as_mut().unwrap().write_all(lines.as_bytes()).unwrap();
    nft
}

#[test]
fn a_proxy_that_cannot_program_is_unhealthy_until_it_can() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    net.write("web.yaml", &service("web", 10, PORT));
    net.write("web-4.yaml", &slice("web", "4", &HTTP, &["10.244.1.5!"]));
    let config = config(&net, "nftables: { syncPeriod: 1s }\n");
    let _daemon = run(&net, &["--config", &config]);
    hears(&net, PORT, [Some((200, 1)), Some((503, 0))]);
    // Nothing to do is not stale.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(health(&net, "/healthz").code, 200);

    let mut other = owned_by_another(&net);
    wait_until("the proxy to be unhealthy", || health(&net, "/livez").code == 503);
    // That more is waiting does not make it newly late.
    net.write("more.yaml", &service("more", 20, PORT + 1));
    std::thread::sleep(Duration::from_millis(300));
    for path in ["/healthz", "/livez"] {
        let page = health(&net, path);
        let body = page.json();
        assert_eq!((page.code, &body["healthy"]), (503, &serde_json::Value::Bool(false)));
        assert_eq!(body["status"]["IPv4"]["healthy"], false);
        assert!(body["lastUpdated"].as_str() < body["currentTime"].as_str(), "{body}");
    }
    hears(&net, PORT, [Some((503, 1)), Some((503, 0))]); // 126
    drop(other.stdin.take());
    other.wait().unwrap();
    hears(&net, PORT, [Some((200, 1)), Some((503, 0))]);
    assert_eq!(health(&net, "/healthz").code, 200);
}

#[test]
fn a_taken_port_is_said_once_and_tried_again_or_fatal() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    let netns = net.name("node");
    let taken = in_netns(&netns, || TcpListener::bind("0.0.0.0:10256").unwrap());
    let daemon = run(&net, &[]);
    daemon.wait_for("cannot serve health");
    drop(taken);
    wait_until("the port to be served", || {
        get(&net, "client", to(NODE[0], 10256), "/livez").is_some()
    });
    assert_eq!(daemon.log().matches("cannot serve health").count(), 1, "{}", daemon.log());
    daemon.terminate();

    let _taken = in_netns(&netns, || TcpListener::bind("0.0.0.0:10256").unwrap());
    let config = config(&net, "bindAddressHardFail: true\n");
    let (bin, dir) = (env!("CARGO_BIN_EXE_nftproxy"), net.manifests());
    let output = Command::new("ip")
        .args(["netns", "exec", &netns, bin, "run", "--config", &config, "--manifests"])
        .arg(dir)
        .output()
        .unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{log}");
    let fatal = log.lines().filter(|line| line.contains("ERROR")).collect::<Vec<_>>();
    assert_eq!(fatal.len(), 1, "{log}");
    assert!(fatal[0].contains("cannot serve health on 0.0.0.0:10256: Address"), "{log}");
}

#[test]
fn a_server_outlives_clients_that_mean_no_good() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    let _daemon: Daemon = run(&net, &[]);
    let at = to(NODE[0], 10256);
    let idle: Vec<_> = in_netns(&net.name("client"), || {
        (0..100).map(|_| std::net::TcpStream::connect(at).unwrap()).collect()
    });
    assert_eq!(health(&net, "/livez").code, 200, "beside a hundred idle connections");
    drop(idle);
    let long =
        format!("GET /{} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "x".repeat(9000));
    assert_eq!(request(&net, "client", at, &long).unwrap().code, 404);
    let nonsense = "\u{1}\u{2}\u{3} nonsense\r\n\r\n";
    assert_eq!(request(&net, "client", at, nonsense).unwrap().code, 400);
    assert_eq!(health(&net, "/livez").code, 200);
}

#[test]
fn the_owner_of_a_service_is_told_by_an_event() {
    with_cluster(|cluster| {
        let net = cluster.net;
        cluster.apply(CLUSTER.split("---\n").next().unwrap());
        let taken = in_netns(&net.name("node"), || TcpListener::bind(to(NODE[0], PORT)).unwrap());
        let _daemon = cluster.start(User::KubeProxy);
        let check = format!("healthCheckNodePort: {PORT}");
        let web = Svc {
            name: "web",
            cluster_ips: &["10.96.0.10"],
            ports: &[("http", "TCP", 80, 0)],
            spec: &["externalTrafficPolicy: Local", &check],
            balancer_ips: &["203.0.113.10"],
        };
        cluster.apply(&web.yaml());
        cluster.endpoints("web", &["10.244.1.5!"]);
        let mut event = None;
        let began = Instant::now();
        while event.is_none() && began.elapsed() < Duration::from_secs(30) {
            event = cluster.runtime.block_on(async {
                let events: Api<Event> = Api::namespaced(cluster.plane.client().await, "default");
                let all = events.list(&ListParams::default()).await.unwrap();
                all.into_iter().find(|e| e.reporting_controller.as_deref() == Some("nftproxy"))
            });
        }
        let event = event.expect("an Event");
        assert_eq!(event.reason.as_deref(), Some("FailedToStartServiceHealthcheck"));
        assert_eq!(event.action.as_deref(), Some("Listen"));
        assert_eq!(event.type_.as_deref(), Some("Warning"));
        let regarding = event.regarding.unwrap();
        assert_eq!(
            (regarding.kind.as_deref(), regarding.namespace.as_deref(), regarding.name.as_deref()),
            (Some("Service"), Some("default"), Some("web"))
        );
        assert_eq!(
            event.note.unwrap(),
            format!(
                "node node-1 failed to start healthcheck \"default/web\" on port {PORT}: listen \
                 192.0.2.10:{PORT}: Address already in use (os error 98)"
            )
        );
        drop(taken);
        wait_until("the port to be served", || {
            get(net, "node", to(NODE[0], PORT), "/").is_some_and(|page| page.code == 200)
        });
    });
}
