//! Somebody else's hand in the tables, while the daemon runs: seen at once, put right, and named.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::namespace::{has_owned_tables, lacks, nft};
use crate::net::{Daemon, GATEWAY, Net, in_netns, wait_until};
use crate::objects::{CLUSTER, Svc, slice};
use crate::packets::{CIDRS, HTTP, answered, one, run, to};

fn start(net: &Net, arguments: &[&str]) -> Daemon {
    let web = Svc {
        name: "web",
        cluster_ips: &["10.96.0.10", "fd00:10:96::10"],
        ports: &[("http", "TCP", 80, 30080)],
        spec: &[],
        balancer_ips: &[],
    };
    let endpoints = slice("web", "4", &HTTP, &["10.244.1.5!"])
        + &slice("web", "6", &HTTP, &["fd00:10:244:1::5!"]);
    net.write("web.yaml", &(CLUSTER.to_owned() + &web.yaml() + &endpoints));
    run(net, &[&["--cluster-cidr", CIDRS], arguments].concat())
}

/// Both tables as nft lists them, without what cannot be the same: the numbers of objects.
fn listed(net: &Net) -> String {
    in_netns(&net.name("node"), || nft(&["list", "ruleset"], ""))
}

fn foreign(net: &Net, commands: &str) {
    in_netns(&net.name("node"), || nft(&["-f", "-"], commands));
}

#[test]
fn what_others_change_is_put_right_and_said() {
    let Some(net) = Net::new() else { return };
    let mut daemon = start(&net, &[]);
    let before = listed(&net);
    let damages = [
        "delete element ip nftproxy services { 10.96.0.10 . tcp . 80 }",
        "flush map ip6 nftproxy endpoints",
        "add element ip nftproxy cluster-ips { 10.96.7.7 }",
        "add rule ip nftproxy dispatch drop",
        "add chain ip nftproxy mine; add rule ip nftproxy mine drop",
        "delete table ip6 nftproxy",
        "flush ruleset",
    ];
    for damage in damages {
        // One that has not seen others: several in a row are put right ever more slowly.
        drop(daemon);
        daemon = start(&net, &[]);
        foreign(&net, damage);
        let began = Instant::now();
        wait_until(damage, || listed(&net) == before);
        eprintln!("{damage}: put right {:?} later at most", began.elapsed());
        daemon.wait_for("somebody else changed our tables");
        for (family, vip) in ["10.96.0.10", "fd00:10:96::10"].into_iter().enumerate() {
            assert_eq!(one(&net, "client", to(vip, 80)), answered("a", 8080, GATEWAY[family]));
        }
    }
    let log = daemon.log();
    assert!(log.contains("process=\"nft\""), "{log}");
    // Our own commits are none, and neither are those to other tables.
    let said = log.matches("our tables").count();
    foreign(&net, "add table ip theirs; add chain ip theirs c");
    net.write("other.yaml", &slice("web", "5", &HTTP, &["10.244.1.6!"]));
    wait_until("another endpoint", || listed(&net).contains("10.244.1.6"));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(daemon.log().matches("our tables").count(), said, "{}", daemon.log());
}

#[test]
fn two_programs_that_undo_each_other_do_not_do_so_all_the_time() {
    let Some(net) = Net::new() else { return };
    let daemon = start(&net, &[]);
    let node = net.name("node");
    // A loop that deletes whatever is there, for three seconds.
    let script = "for i in $(seq 150); do nft flush map ip nftproxy services; sleep 0.02; done";
    let status = Command::new("ip").args(["netns", "exec", &node, "sh", "-c", script]).status();
    assert!(status.unwrap().success());
    let repairs = daemon.log().matches("they are put right").count();
    assert!((2..20).contains(&repairs), "{repairs} repairs\n{}", daemon.log());
    wait_until("the last repair", || {
        listed(&net).contains("10.96.0.10 . tcp . 80 : goto internal-lb-1")
    });
    assert_eq!(one(&net, "client", to("10.96.0.10", 80)), answered("a", 8080, GATEWAY[0]));
}

/// Whether nft is allowed to do something in the node's namespace.
fn allowed(net: &Net, commands: &str) -> bool {
    let netns = net.name("node");
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &netns, "nft"]).args(commands.split(' '));
    command.output().unwrap().status.success()
}

#[test]
fn an_owned_table_is_out_of_reach_and_outlives_its_owner() {
    let Some(net) = Net::new() else { return };
    // A table from before cannot be owned: it is replaced in one step.
    drop(start(&net, &[]));
    let daemon = start(&net, &["--table-owner"]);
    let before = listed(&net);
    if !has_owned_tables() {
        lacks("tables that are owned and persist (6.9 and later have them)");
        // It works without them, and says so.
        daemon.wait_for("this kernel knows no owned tables that persist");
        assert!(!before.contains("flags owner"), "{before}");
        assert_eq!(one(&net, "client", to("10.96.0.10", 80)), answered("a", 8080, GATEWAY[0]));
        foreign(&net, "flush map ip nftproxy services");
        wait_until("it to be put right", || listed(&net) == before);
        return;
    }
    assert!(before.contains("flags owner"), "{before}");
    assert!(!allowed(&net, "flush map ip nftproxy services"));
    assert!(!allowed(&net, "delete table ip nftproxy"));
    let _ = allowed(&net, "flush ruleset");
    let vip = to("10.96.0.10", 80);
    let answer = answered("a", 8080, GATEWAY[0]);
    assert_eq!(one(&net, "client", vip), answer);
    assert_eq!(listed(&net), before);
    assert!(!allowed(&net, "delete table ip6 nftproxy"));
    // Left behind, it is in force, and the next owner takes it as it is.
    daemon.kill9();
    assert_eq!(one(&net, "client", vip), answer);
    let daemon = start(&net, &["--table-owner"]);
    assert!(daemon.log().contains("adopting the table found"), "{}", daemon.log());
    assert_eq!(listed(&net), before);
    assert!(!allowed(&net, "flush map ip nftproxy services"));
    net.write("other.yaml", &slice("web", "5", &HTTP, &["10.244.1.6!"]));
    wait_until("another endpoint", || listed(&net).contains("10.244.1.6"));
    daemon.terminate();
    // Without an owner, anybody may remove it, and one that does not want to own it may use it.
    let daemon = start(&net, &[]);
    assert!(allowed(&net, "flush map ip nftproxy services"));
    wait_until("it to be put right", || listed(&net).contains("10.96.0.10 . tcp . 80 : goto"));
    drop(daemon);
    let cleanup = in_netns(&net.name("node"), || {
        Command::new(env!("CARGO_BIN_EXE_nftproxy")).arg("cleanup").status().unwrap()
    });
    assert!(cleanup.success());
    assert!(!listed(&net).contains("nftproxy"));
}
