//! Bad input and bad company, met by the real program: what it is told makes no sense, goes away, or
//! is enormous, and its tables are made or unmade by somebody else. Connections go on all the while.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use nftproxy::nft::names::LAYOUT;

use crate::namespace::{nft, own_table};
use crate::net::{CLIENT, Daemon, Net, in_netns, ip, wait_until};
use crate::objects::{CLUSTER, Svc, slice};
use crate::serve::{Outcome, tcp};

const HTTP: [(&str, &str, u16); 1] = [("http", "TCP", 8080)];

fn arguments(net: &Net) -> Vec<String> {
    let dir = net.manifests().display().to_string();
    ["run", "--manifests", &dir, "--hostname-override", "node-1"].map(str::to_owned).into()
}

fn start(net: &Net) -> Daemon {
    let arguments = arguments(net);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Daemon::start(&net.name("node"), &arguments)
}

/// A Service on port 80 without anything special.
fn service(name: &str, address: &str) -> String {
    let service = Svc {
        name,
        cluster_ips: &[address],
        ports: &[("http", "TCP", 80, 0)],
        spec: &[],
        balancer_ips: &[],
    };
    service.yaml()
}

/// `web` in both families, answered by these pods.
fn web(four: &str, six: &str) -> String {
    CLUSTER.to_owned()
        + &service("web", VIPS[0])
        + &slice("web", "4", &HTTP, &[four])
        + &service("web-six", VIPS[1])
        + &slice("web-six", "6", &HTTP, &[six])
}

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];

/// Who answers the client at an address.
fn answer(net: &Net, address: &str) -> Outcome {
    tcp(&net.name("client"), SocketAddr::new(ip(address), 80))
}

fn by(pod: &str, family: usize) -> Outcome {
    Outcome::Answered { by: pod.into(), port: 8080, seen: ip(CLIENT[family]) }
}

fn until_answered(net: &Net, address: &str, expected: &Outcome) {
    wait_until(&format!("{address} to be {expected:?}"), || answer(net, address) == *expected);
}

#[test]
fn absurd_objects_cost_nothing_but_themselves() {
    let Some(net) = Net::new() else { return };
    let absurd = Svc {
        name: "absurd",
        cluster_ips: &["10.96.0.20"],
        ports: &[("http", "TCP", 80, 0)],
        spec: &["externalTrafficPolicy: Nearby", "externalIPs: [\"example.org\", \"127.0.0.1\"]"],
        balancer_ips: &["203.0.113.7/24"],
    };
    let absurd = absurd.yaml().replace(
        "  ports:\n",
        "  ports:\n    - { name: big, protocol: TCP, port: 70000 }\n    - { name: odd, protocol: \
         QUIC, port: 81 }\n",
    );
    // The IPv6 address makes `slice` write an IPv6 slice.
    let mixed = slice("absurd", "4", &HTTP, &["fd00:10:244:1::6!", "10.244.1.5!"])
        .replace("addressType: IPv6", "addressType: IPv4");
    net.write("absurd.yaml", &(absurd + &mixed));
    net.write("web.yaml", &web("10.244.1.6!", "fd00:10:244:1::6!"));
    let daemon = start(&net);
    for (object, field, message) in [
        ("document 1, Service default/absurd", "spec.ports[0].port", "70000 is not a port number"),
        ("document 1, Service default/absurd", "spec.ports[1].protocol", "QUIC"),
        ("document 1, Service default/absurd", "spec.externalIPs[0]", "example.org"),
        ("document 1, Service default/absurd", "spec.externalIPs[1]", "a loopback address"),
        ("document 1, Service default/absurd", "spec.externalTrafficPolicy", "Nearby"),
        ("document 1, Service default/absurd", "status.loadBalancer.ingress[0].ip", "203.0.113.7"),
        (
            "document 2, EndpointSlice default/absurd-4",
            "endpoints[0].addresses[0]",
            "is not an IPv4 address",
        ),
    ] {
        let log = daemon.log();
        let said = log.lines().any(|line| {
            line.contains(" WARN ")
                && line.contains(&format!("absurd.yaml, {object}"))
                && line.contains(&format!("field=\"{field}\""))
                && line.contains(message)
        });
        assert!(said, "nothing about {field} in\n{log}");
    }
    assert_eq!(answer(&net, "10.96.0.20"), by("a", 0), "the rest of the absurd Service");
    assert_eq!(answer(&net, VIPS[0]), by("b", 0));
    assert_eq!(answer(&net, VIPS[1]), by("b", 1));

    // A file becomes garbage: what it said stays, and other files count.
    net.write("absurd.yaml", "kind: Service\n\tthis: is no YAML\n");
    daemon.wait_for("last good state stays in force");
    net.write("web.yaml", &web("10.244.1.5!", "fd00:10:244:1::5!"));
    until_answered(&net, VIPS[0], &by("a", 0));
    assert_eq!(answer(&net, "10.96.0.20"), by("a", 0));
    net.write("absurd.yaml", &(service("absurd", "10.96.0.21") + &mixed));
    until_answered(&net, "10.96.0.21", &by("a", 0));
}

#[test]
fn a_manifest_of_four_megabytes_is_served_and_followed() {
    let Some(net) = Net::new() else { return };
    // As if `kubectl get -o yaml` had been saved: most of it is annotations.
    let annotation = "x".repeat(3800);
    let objects = |pod: &str| {
        let one = |i: usize| {
            let name = format!("s{i}");
            let address = format!("10.96.{}.{}", 1 + i / 250, 1 + i % 250);
            let annotated = format!("namespace: default, annotations: {{ last: {annotation} }} }}");
            service(&name, &address).replace("namespace: default }", &annotated)
                + &slice(&name, "4", &HTTP, &[pod])
        };
        (0..1000).map(one).collect::<String>()
    };
    let text = objects("10.244.1.5!");
    assert!(text.len() > 4 << 20, "{}", text.len());
    net.write("all.yaml", &text);
    let arguments = arguments(&net);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let daemon = Daemon::spawn(&net.name("node"), &arguments);
    // The tests' build is a slow one.
    let patient = |what: &str, condition: &dyn Fn() -> bool| {
        let began = Instant::now();
        while !condition() {
            assert!(began.elapsed() < Duration::from_secs(60), "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    patient("the first sync", &|| daemon.log().contains("synced"));
    for address in ["10.96.1.1", "10.96.4.250"] {
        assert_eq!(answer(&net, address), by("a", 0));
    }
    net.write("all.yaml", &objects("10.244.1.6!"));
    patient("the change", &|| answer(&net, "10.96.4.250") == by("b", 0));
    assert_eq!(answer(&net, "10.96.1.1"), by("b", 0));
}

#[test]
fn a_manifest_directory_that_disappears_takes_nothing_along() {
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &web("10.244.1.5!", "fd00:10:244:1::5!"));
    let daemon = start(&net);
    assert_eq!(answer(&net, VIPS[0]), by("a", 0));

    let aside = net.manifests().with_extension("aside");
    fs::rename(net.manifests(), &aside).unwrap();
    daemon.wait_for("the manifests cannot be read; what is in force stays");
    assert_eq!(answer(&net, VIPS[0]), by("a", 0));
    assert_eq!(answer(&net, VIPS[1]), by("a", 1));
    // It is back with a change, and is followed again.
    fs::rename(&aside, net.manifests()).unwrap();
    net.write("web.yaml", &web("10.244.1.6!", "fd00:10:244:1::6!"));
    daemon.wait_for("the manifests are back");
    until_answered(&net, VIPS[0], &by("b", 0));
    net.write("web.yaml", &web("10.244.1.5!", "fd00:10:244:1::5!"));
    until_answered(&net, VIPS[1], &by("a", 1));

    // Removed with everything in it, and made anew.
    fs::remove_dir_all(net.manifests()).unwrap();
    wait_until("the second loss to be noticed", || {
        daemon.log().matches("what is in force stays").count() == 2
    });
    assert_eq!(answer(&net, VIPS[0]), by("a", 0));
    fs::create_dir(net.manifests()).unwrap();
    net.write("web.yaml", &web("10.244.1.6!", "fd00:10:244:1::6!"));
    until_answered(&net, VIPS[0], &by("b", 0));
}

/// Our table in nft's words.
fn listed(net: &Net, family: &str) -> String {
    in_netns(&net.name("node"), || nft(&["list", "table", family, "nftproxy"], ""))
}

#[test]
fn a_table_of_our_name_made_by_someone_else_is_replaced() {
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &web("10.244.1.5!", "fd00:10:244:1::5!"));
    let daemon = start(&net);
    let wanted = ["ip", "ip6"].map(|family| listed(&net, family));
    daemon.terminate();
    let with_names_of_ours = "
        add table ip nftproxy
        add set ip nftproxy cluster-ips { type inet_service; flags interval; }
        add element ip nftproxy cluster-ips { 1-1024 }
        add map ip nftproxy services { type ipv4_addr : verdict; }
        add map ip nftproxy mine { type ipv4_addr : ipv4_addr; }
        add element ip nftproxy mine { 10.96.0.10 : 192.0.2.2 }
        add chain ip nftproxy lb-1
        add rule ip nftproxy lb-1 drop
        add chain ip nftproxy dispatch { type filter hook forward priority -10; policy drop; }
        add chain ip nftproxy theirs { type nat hook prerouting priority -150; policy accept; }
        add rule ip nftproxy theirs ip daddr 10.96.0.10 dnat to ip daddr map @mine
        add element ip nftproxy services { 10.96.0.10 : jump lb-1 }";
    let with_our_comment = &format!(
        "
        add table ip nftproxy {{ comment \"{LAYOUT}\"; }}
        add chain ip nftproxy guard {{ type filter hook forward priority -10; policy drop; }}
        add chain ip nftproxy filter-forward {{ type filter hook forward priority 5; policy drop; }}
        add chain ip nftproxy nat-prerouting
        add rule ip nftproxy nat-prerouting accept
        add map ip nftproxy endpoints {{ type ipv4_addr : ipv4_addr; }}"
    );
    let others = "
        add table inet other
        add set inet other services { type ipv4_addr; elements = { 10.96.0.10 }; }
        add chain inet other dispatch { type filter hook forward priority 7; policy accept; }
        add rule inet other dispatch counter";
    for (foreign, said) in [
        (with_names_of_ours, "it does not carry the comment"),
        (with_our_comment, "its set endpoints is not one that nftproxy makes"),
    ] {
        let foreign = format!("flush ruleset{others}{foreign}");
        in_netns(&net.name("node"), || nft(&["-f", "-"], &foreign));
        assert_ne!(answer(&net, VIPS[0]), by("a", 0), "the foreign table is in the way");
        let daemon = start(&net);
        let log = daemon.log();
        let warned = log.lines().any(|line| {
            line.contains(" WARN ") && line.contains("made by someone else") && line.contains(said)
        });
        assert!(warned, "{log}");
        assert_eq!(answer(&net, VIPS[0]), by("a", 0));
        assert_eq!(answer(&net, VIPS[1]), by("a", 1));
        assert_eq!(["ip", "ip6"].map(|family| listed(&net, family)), wanted);
        let kept = in_netns(&net.name("node"), || nft(&["list", "table", "inet", "other"], ""));
        assert!(kept.contains("counter packets") && kept.contains("10.96.0.10"), "{kept}");
        daemon.terminate();
    }
}

#[test]
fn a_table_that_someone_else_owns_is_waited_for() {
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &web("10.244.1.5!", "fd00:10:244:1::5!"));
    // The kernel lets nobody else touch it, for as long as the owner lives.
    let mut nft_there = Command::new("ip");
    nft_there.args(["netns", "exec", &net.name("node"), "nft"]);
    let (mut owner, stdin) = own_table(nft_there);
    let tables = || in_netns(&net.name("node"), || nft(&["list", "tables"], ""));
    wait_until("the owned table", || tables().contains("nftproxy"));
    let arguments = arguments(&net);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let daemon = Daemon::spawn(&net.name("node"), &arguments);
    daemon.wait_for("the kernel keeps what it had");
    drop(stdin);
    owner.wait().unwrap();
    daemon.wait_for("synced");
    let log = daemon.log();
    assert!(log.contains("Operation not permitted"), "{log}");
    assert!(!log.contains("left out"), "no object is to blame:\n{log}");
    assert_eq!(answer(&net, VIPS[0]), by("a", 0));
    assert_eq!(answer(&net, VIPS[1]), by("a", 1));
}

#[test]
fn what_someone_else_did_to_our_table_is_undone_by_a_restart() {
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &web("10.244.1.5!", "fd00:10:244:1::5!"));
    let daemon = start(&net);
    let wanted = listed(&net, "ip");
    daemon.kill9();
    assert_eq!(answer(&net, VIPS[0]), by("a", 0), "the tables outlive the program");
    for damage in [
        "add chain ip nftproxy mine { type filter hook forward priority -10; policy drop; }",
        "insert rule ip nftproxy dispatch drop",
        "add chain ip nftproxy lb-9; add rule ip nftproxy lb-9 drop; \
         delete element ip nftproxy services { 10.96.0.10 . tcp . 80 }; \
         add element ip nftproxy services { 10.96.0.10 . tcp . 80 : goto lb-9 }",
        "delete element ip nftproxy endpoints { 10.96.0.10 . tcp . 80 . 0 }; \
         add element ip nftproxy endpoints { 10.96.0.10 . tcp . 80 . 0 : 10.244.7.7 . 8080 }",
    ] {
        in_netns(&net.name("node"), || nft(&["-f", "-"], damage));
        assert_eq!(answer(&net, VIPS[0]), Outcome::TimedOut, "{damage}");
        let daemon = start(&net);
        assert_eq!(answer(&net, VIPS[0]), by("a", 0), "{damage}");
        assert_eq!(listed(&net, "ip"), wanted, "{damage}");
        daemon.kill9();
    }
}
