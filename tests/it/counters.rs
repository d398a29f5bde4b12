//! Counting connections: real ones, by every way to a Service, are told of the Service port that was
//! dialled and of the endpoint that accepted them, in metrics, in `list` and by `top`; whatever happens
//! to endpoints, tables and the program meanwhile.

#![allow(
    clippy::float_cmp,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts are whole numbers, which floats hold exactly"
)]

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::commands::{Done, done};
use crate::metrics::{Family, scrape};
use crate::net::{CLIENT, Daemon, NODE, Net, in_netns, patient, wait_until};
use crate::objects::{CLUSTER, Svc, slice};
use crate::packets::{CIDRS, HTTP, run, to};
use crate::serve::{Outcome, tcp_here, udp_on};

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];

const WEB: Svc<'_> = Svc {
    name: "web",
    cluster_ips: &VIPS,
    ports: &[("http", "TCP", 80, 30080), ("dns", "UDP", 53, 0)],
    spec: &[],
    balancer_ips: &[],
};

const STICKY: Svc<'_> = Svc {
    name: "sticky",
    cluster_ips: &["10.96.0.20", "fd00:10:96::20"],
    ports: &[("http", "TCP", 80, 0)],
    spec: &["sessionAffinity: ClientIP"],
    balancer_ips: &[],
};

const ENDPOINTS: [&[&str]; 2] =
    [&["10.244.1.5!", "10.244.2.9"], &["fd00:10:244:1::5!", "fd00:10:244:2::9"]];

fn slices(service: &str, endpoints: [&[&str]; 2]) -> String {
    let ports = [HTTP[0], ("dns", "UDP", 53)];
    slice(service, "4", &ports, endpoints[0]) + &slice(service, "6", &ports, endpoints[1])
}

fn write(net: &Net, web: [&[&str]; 2]) {
    let all = CLUSTER.to_owned()
        + &WEB.yaml()
        + &slices("web", web)
        + &STICKY.yaml()
        + &slices("sticky", ENDPOINTS);
    net.write("all.yaml", &all);
}

/// Connections by Service, port and who accepted them, as the servers said.
type Accepted = BTreeMap<(&'static str, &'static str, String), u64>;

/// The endpoint by which a pod is known, of the family that was dialled.
fn endpoint(by: &str, port: u16, six: bool) -> String {
    match (by, six) {
        ("a", false) => format!("10.244.1.5:{port}"),
        ("remote", false) => format!("10.244.2.9:{port}"),
        ("a", true) => format!("[fd00:10:244:1::5]:{port}"),
        ("remote", true) => format!("[fd00:10:244:2::9]:{port}"),
        _ => panic!("{by} is no endpoint"),
    }
}

/// Sends a datagram of a flow of its own: a port that was used before would be that flow still.
fn datagram(net: &Net, to: SocketAddr) -> Outcome {
    static PORT: AtomicU16 = AtomicU16::new(10_000);
    in_netns(&net.name("b"), || {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = UdpSocket::bind((any, PORT.fetch_add(1, Ordering::Relaxed))).unwrap();
        socket.connect(to).unwrap();
        udp_on(&socket)
    })
}

/// Dials the Services in all ways.
fn dial(net: &Net, accepted: &mut Accepted) {
    let mut note = |service, port, outcome, six| {
        let Outcome::Answered { by, port: number, .. } = outcome else {
            panic!("{service}: {outcome:?}")
        };
        *accepted.entry((service, port, endpoint(&by, number, six))).or_default() += 1;
    };
    for (family, vip) in VIPS.into_iter().enumerate() {
        let six = family == 1;
        for _ in 0..10 {
            let ways =
                [("b", to(vip, 80)), ("node", to(vip, 80)), ("client", to(NODE[family], 30080))];
            for (from, dialled) in ways {
                let outcome = in_netns(&net.name(from), || tcp_here(dialled));
                note("web", "http", outcome, six);
            }
            note("web", "dns", datagram(net, to(vip, 53)), six);
            let sticky = to(STICKY.cluster_ips[family], 80);
            note("sticky", "http", in_netns(&net.name("b"), || tcp_here(sticky)), six);
        }
    }
}

fn counted(families: &BTreeMap<String, Family>) -> Accepted {
    let known = |labels: &BTreeMap<String, String>| match (&*labels["service"], &*labels["port"]) {
        ("web", "http") => ("web", "http"),
        ("web", "dns") => ("web", "dns"),
        ("sticky", "http") => ("sticky", "http"),
        other => panic!("{other:?}"),
    };
    let Some(family) = families.get("nftproxy_endpoint_connections_total") else {
        return Accepted::new();
    };
    assert_eq!(family.kind, "counter");
    let mut counted = Accepted::new();
    for (_, labels, value) in &family.samples {
        assert_eq!(labels["namespace"], "default");
        let (service, port) = known(labels);
        assert_eq!(labels["protocol"], if port == "dns" { "udp" } else { "tcp" });
        counted.insert((service, port, labels["endpoint"].clone()), *value as u64);
    }
    // A Service port has what its endpoints have.
    let mut sums = BTreeMap::<_, u64>::new();
    for ((service, port, _), value) in &counted {
        *sums.entry((*service, *port)).or_default() += value;
    }
    let ports = &families["nftproxy_service_connections_total"].samples;
    for (_, labels, value) in ports {
        let sum = sums.remove(&known(labels)).unwrap_or(0);
        assert!(*value as u64 >= sum, "{labels:?}: {value}, and of its endpoints {sum}");
    }
    assert!(sums.is_empty(), "{sums:?}");
    counted
}

/// Waits until metrics say what the servers said: they are looked at once a second.
fn agree(net: &Net, accepted: &Accepted) {
    let began = Instant::now();
    loop {
        let found = counted(&scrape(net));
        if found == *accepted {
            return;
        }
        let total = |all: &Accepted| all.values().sum::<u64>();
        let late = began.elapsed() > patient(Duration::from_secs(10));
        let kernel = || nft(net, &["list", "ruleset"]);
        assert!(
            !late && total(&found) <= total(accepted),
            "told: {found:#?}, accepted: {accepted:#?}, kernel: {}",
            kernel()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn start(net: &Net) -> Daemon {
    run(net, &["--cluster-cidr", CIDRS, "--counters"])
}

fn command(net: &Net, arguments: &[&str]) -> Done {
    let dir = net.manifests();
    let source = ["--manifests", dir.to_str().unwrap(), "--hostname-override", "node-1"];
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &net.name("node"), env!("CARGO_BIN_EXE_nftproxy")]);
    done(command.args(arguments).args(source))
}

fn nft(net: &Net, arguments: &[&str]) -> String {
    let node = net.name("node");
    let output =
        Command::new("ip").args(["netns", "exec", &node, "nft"]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn counters_equal_what_servers_accepted() {
    let Some(net) = Net::new() else { return };
    write(&net, ENDPOINTS);
    let daemon = start(&net);
    // A network plugin that masquerades, and comes after: of one priority the last comer is first, and a
    // connection whose source is decided passes no further nat chain.
    nft(&net, &["add", "table", "ip", "plugin"]);
    let hook = "{ type nat hook postrouting priority 100; policy accept; }";
    nft(&net, &["add", "chain", "ip", "plugin", "post", hook]);
    nft(&net, &["add", "rule", "ip", "plugin", "post", "ip", "saddr", CLIENT[0], "masquerade"]);
    let mut accepted = Accepted::new();
    dial(&net, &mut accepted);
    assert_eq!(accepted.values().sum::<u64>(), 100);
    agree(&net, &accepted);

    // An endpoint goes and comes; what it had stays, until the last of it was told.
    write(&net, [&["10.244.1.5!"], &["fd00:10:244:1::5!"]]);
    let elements = |families: &BTreeMap<String, Family>| {
        let samples = &families["nftproxy_elements"].samples;
        let found =
            samples.iter().find(|(_, l, _)| l["object"] == "endpoints" && l["ip_family"] == "IPv4");
        found.unwrap().2 as u64
    };
    wait_until("an endpoint to go", || elements(&scrape(&net)) == 4);
    dial(&net, &mut accepted);
    agree(&net, &accepted);
    write(&net, ENDPOINTS);
    wait_until("it to come", || elements(&scrape(&net)) == 6);
    dial(&net, &mut accepted);
    agree(&net, &accepted);

    // The table is replaced.
    nft(&net, &["delete", "table", "ip", "nftproxy"]);
    daemon.wait_for("they are put right");
    dial(&net, &mut accepted);
    agree(&net, &accepted);

    // The program is: it tells what comes from then on, of the table that it adopts.
    let before = nft(&net, &["-s", "list", "ruleset"]);
    daemon.terminate();
    let daemon = start(&net);
    assert!(daemon.log().contains("operations=0"), "{}", daemon.log());
    assert_eq!(nft(&net, &["-s", "list", "ruleset"]), before);
    let mut accepted = Accepted::new();
    agree(&net, &accepted);
    dial(&net, &mut accepted);
    agree(&net, &accepted);

    // A Service that is gone has no series.
    net.write("all.yaml", &(CLUSTER.to_owned() + &STICKY.yaml() + &slices("sticky", ENDPOINTS)));
    accepted.retain(|(service, ..), _| *service == "sticky");
    wait_until("its series to go", || counted(&scrape(&net)) == accepted);
    let families = scrape(&net);
    assert!(
        families["nftproxy_service_connections_total"]
            .samples
            .iter()
            .all(|(_, labels, _)| labels["service"] == "sticky")
    );
    assert_eq!(families["nftproxy_foreign_connections_total"].samples[0].2, 0.0);
}

/// Off, there is nothing of it; switched on and off while it runs, no connection is lost.
#[test]
fn counting_is_switched_live() {
    let Some(net) = Net::new() else { return };
    write(&net, ENDPOINTS);
    let config = net.dir.path().join("config.yaml");
    let switch = |on: bool| {
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
             clusterCIDR: {CIDRS}\nnftproxy: {{ counters: {on} }}\n"
        );
        let written = net.dir.path().join(".written");
        fs::write(&written, text).unwrap();
        fs::rename(written, &config).unwrap();
    };
    switch(false);
    let _daemon = run(&net, &["--config", config.to_str().unwrap()]);
    let off = nft(&net, &["-s", "list", "ruleset"]);
    assert!(!off.contains("connections") && !off.contains("counter"), "{off}");
    let text =
        |net: &Net| scrape(net).into_keys().filter(|name| name.contains("_connection")).count();
    assert_eq!(text(&net), 0);
    assert_eq!(command(&net, &["top", "--once"]).code, 1);
    let said = command(&net, &["top", "--once"]).out;
    assert!(said.lines().count() == 1 && said.contains("--counters"), "{said}");
    assert!(!command(&net, &["list"]).out.contains("connections"));

    let dialling = |until: &(dyn Fn() -> bool + Sync)| {
        std::thread::scope(|scope| {
            let client = scope.spawn(|| {
                in_netns(&net.name("b"), || {
                    let mut made = 0_u64;
                    loop {
                        let last = until();
                        let outcome = tcp_here(to(VIPS[0], 80));
                        assert!(matches!(outcome, Outcome::Answered { .. }), "{outcome:?}");
                        made += 1;
                        if last {
                            return made;
                        }
                    }
                })
            });
            client.join().unwrap()
        })
    };
    for _ in 0..3 {
        switch(true);
        dialling(&|| nft(&net, &["-s", "list", "ruleset"]).contains("counter"));
        switch(false);
        dialling(&|| nft(&net, &["-s", "list", "ruleset"]) == off);
    }
    switch(true);
    wait_until("it to count", || nft(&net, &["list", "ruleset"]).contains("update @connections"));
    let mut accepted = Accepted::new();
    dial(&net, &mut accepted);
    // What was counted in the earlier times may have been told as well.
    let sum: u64 = accepted.values().sum();
    wait_until("it to be told", || counted(&scrape(&net)).values().sum::<u64>() >= sum);
    switch(false);
    wait_until("nobody's connections to be told", || {
        let families = scrape(&net);
        let told = ["nftproxy_service_connections_total", "nftproxy_endpoint_connections_total"];
        told.iter().all(|name| families.get(*name).is_none_or(|family| family.samples.is_empty()))
    });
}

#[test]
fn list_and_top_show_connections_by_name() {
    let Some(net) = Net::new() else { return };
    write(&net, ENDPOINTS);
    let _daemon = start(&net);
    let mut accepted = Accepted::new();
    dial(&net, &mut accepted);
    let listed: Value =
        serde_json::from_str(&command(&net, &["list", "--counters", "-o", "json"]).out).unwrap();
    let mut found = Accepted::new();
    for row in listed["services"].as_array().unwrap() {
        let service = if row["service"] == "default/web" { "web" } else { "sticky" };
        let port = if row["port"] == "http" { "http" } else { "dns" };
        let mut sum = 0;
        for endpoint in row["endpoints"].as_array().unwrap() {
            let number = endpoint["connections"].as_u64().unwrap();
            sum += number;
            let name = endpoint["endpoint"].as_str().unwrap().to_owned();
            found.insert((service, port, name), number);
        }
        assert_eq!(row["connections"], sum);
    }
    found.retain(|_, number| *number > 0);
    assert_eq!(found, accepted);
    let text = command(&net, &["list"]).out;
    assert!(text.contains("tcp  IPv4  30 connections  "), "{text}");

    // Dialled in between.
    let (json, made) = std::thread::scope(|scope| {
        let top =
            scope.spawn(|| command(&net, &["top", "--once", "--interval", "3s", "-o", "json"]));
        std::thread::sleep(std::time::Duration::from_secs(1));
        let mut made = Accepted::new();
        dial(&net, &mut made);
        (top.join().unwrap(), made)
    });
    assert_eq!(json.code, 0, "{}", json.err);
    let board: Value = serde_json::from_str(&json.out).unwrap();
    let seconds = board["interval_seconds"].as_f64().unwrap();
    let mut shown = Accepted::new();
    for row in board["services"].as_array().unwrap() {
        let service = if row["service"] == "default/web" { "web" } else { "sticky" };
        let port = if row["port"] == "http" { "http" } else { "dns" };
        for endpoint in row["endpoints"].as_array().unwrap() {
            let rate = endpoint["connections_per_second"].as_f64().unwrap();
            let name = endpoint["endpoint"].as_str().unwrap().to_owned();
            shown.insert((service, port, name), (rate * seconds).round() as u64);
        }
    }
    shown.retain(|_, number| *number > 0);
    assert_eq!(shown, made);
    let text = command(&net, &["top", "--once", "--interval", "100ms"]).out;
    assert!(text.starts_with("node-1: 0.0 connections/s over 0."), "{text}");
    assert!(text.contains("default/web:http tcp\n") && text.contains("  -> 10.244.2.9:8080\n"));
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let refused = command(&net, &["top", "--interval", "1ms"]);
    assert!(refused.code == 2 && refused.err.contains("100ms"), "{}", refused.err);
}
