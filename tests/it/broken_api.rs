//! Trouble with the API server: whatever comes over the wire, what is programmed stays right or stays
//! as it was, and is right again when the trouble is over; meanwhile no connection fails.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::between::{Between, Blow, Faults};
use crate::control_plane::User;
use crate::e2e::{
    A, Answer, Cluster, Connecting, HTTP, REMOTE, lines, said, service, with_cluster,
};
use crate::net::{CLIENT, Daemon, ip};
use crate::objects::{CLUSTER, slice};

const STEADY: &str = "10.96.0.40";
const MOVING: &str = "10.96.0.41";

/// Another endpoint, and who answers then.
fn moves(cluster: &Cluster<'_>, round: usize) {
    let (endpoint, name) = if round.is_multiple_of(2) { (A, "a") } else { (REMOTE, "remote") };
    cluster.endpoints("moving", &[endpoint]);
    cluster.answers(MOVING, 80, &[name]);
}

type Phase = fn(&Cluster<'_>, &Between, &Daemon);

/// Goes through phases while connections are made, and one more behind that. They mostly wait, so that two
/// tests take half the time.
fn meanwhile_connecting(phases: &[(&str, Phase)], behind: Phase) {
    with_cluster(|cluster| {
        cluster.apply(CLUSTER.split("---\n").next().unwrap());
        let between = Between::start(
            &cluster.net.name("client"),
            ip(CLIENT[0]),
            &cluster.plane,
            User::KubeProxy,
        );
        let kubeconfig = cluster.plane.kubeconfig_at(User::KubeProxy, &between.url);
        for (name, address) in [("steady", STEADY), ("moving", MOVING)] {
            cluster.apply(&service(name, &[address]).yaml());
        }
        cluster.endpoints("steady", &[A, REMOTE]);
        let daemon = cluster.spawn_with(&kubeconfig);
        said(&daemon, "synced");
        cluster.answers(STEADY, 80, &["a", "remote"]);
        let connecting = Connecting::start(cluster.net, SocketAddr::new(ip(STEADY), 80));
        for (name, phase) in phases {
            let began = Instant::now();
            phase(cluster, &between, &daemon);
            eprintln!("{name}: {:?}", began.elapsed());
        }
        eprintln!("{} connections meanwhile, none failed", connecting.none_failed());
        assert_eq!(lines(&daemon, SUSPICIOUS), [""; 0], "so far nothing was suspicious");
        behind(cluster, &between, &daemon);
        assert_eq!(lines(&daemon, "panicked"), [""; 0]);
        daemon.terminate();
    });
}

#[test]
fn however_streams_end_and_events_come_no_connection_fails_and_the_end_is_right() {
    let phases: [(&str, Phase); 3] = [
        ("streams are cut", streams_are_cut),
        ("places are forgotten", places_are_forgotten),
        ("events are late, doubled and out of order", events_are_late_doubled_and_out_of_order),
    ];
    meanwhile_connecting(&phases, a_list_is_empty);
}

#[test]
fn whatever_the_api_server_says_no_connection_fails_and_the_end_is_right() {
    let phases: [(&str, Phase); 2] =
        [("nonsense is said", nonsense_is_said), ("requests are refused", requests_are_refused)];
    meanwhile_connecting(&phases, |_, _, _| ());
}

/// What is said of a list that lost much.
const SUSPICIOUS: &str = "names less than half of what was known";

/// Longer than it takes to try again, and to commit what that brought.
const UNCHANGED: Duration = Duration::from_millis(1700);

fn streams_are_cut(cluster: &Cluster<'_>, between: &Between, _: &Daemon) {
    for round in 0..4 {
        between.strike(Blow::End);
        moves(cluster, round);
    }
    for round in 0..4 {
        between.strike(Blow::BreakInside);
        moves(cluster, round);
    }
}

fn places_are_forgotten(cluster: &Cluster<'_>, between: &Between, _: &Daemon) {
    for round in 0..3 {
        between.strike(Blow::Gone);
        moves(cluster, round);
    }
    // As the answer to every request.
    between.strike_and_set(Blow::End, Faults { refuse: vec![("", 410)], ..Faults::default() });
    cluster.endpoints("moving", &[A, REMOTE]);
    let before = cluster.table("ip");
    std::thread::sleep(UNCHANGED);
    cluster.still_has("ip", &before);
    between.set(Faults::default());
    cluster.answers(MOVING, 80, &["a", "remote"]);
}

fn events_are_late_doubled_and_out_of_order(cluster: &Cluster<'_>, between: &Between, _: &Daemon) {
    between.strike_and_set(
        Blow::Gone,
        Faults { delay: Duration::from_millis(700), ..Faults::default() },
    );
    for round in 0..2 {
        moves(cluster, round);
    }
    between.strike_and_set(Blow::Gone, Faults { double: true, reorder: true, ..Faults::default() });
    // Many objects, so that there is something to mix up; some go again at once.
    let all = (0..20).map(|i| {
        let (name, address) = (format!("s-{i}"), format!("10.96.1.{i}"));
        let endpoint = if i % 2 == 0 { A } else { REMOTE };
        service(&name, &[&address]).yaml() + &slice(&name, "4", &HTTP, &[endpoint])
    });
    cluster.apply(&all.collect::<String>());
    for i in (0..20).step_by(3) {
        cluster.delete("Service", &format!("s-{i}"));
    }
    for i in 0..20 {
        let address = format!("10.96.1.{i}");
        match i {
            i if i % 3 == 0 => cluster.meets("client", &address, 80, &Answer::Lost),
            i if i % 2 == 0 => cluster.answers(&address, 80, &["a"]),
            _ => cluster.answers(&address, 80, &["remote"]),
        }
    }
    between.set(Faults::default());
}

fn nonsense_is_said(cluster: &Cluster<'_>, between: &Between, daemon: &Daemon) {
    let long = format!("{:?}", "x".repeat(3 << 20));
    let said = [
        "<html><body>502 Bad Gateway</body></html>",
        "{}",
        "null",
        "{\"type\":\"ADDED\",\"object\":",
        "{\"type\":\"ADDED\",\"object\":{\"kind\":\"Service\",\"metadata\":{\"name\":7}}}",
        "{\"type\":\"DELETED\",\"object\":{}}",
        "{\"type\":\"BOOKMARK\",\"object\":{\"metadata\":{}}}",
        "{\"type\":\"ERROR\",\"object\":{\"code\":500,\"status\":\"Failure\",\"message\":\"\\u0000\"}}",
        "",
        "\u{0}\u{1}\u{2}",
        &long,
    ];
    let before = cluster.table("ip");
    for (round, line) in said.into_iter().enumerate() {
        between.strike(Blow::Say(line.to_owned()));
        if round == 0 {
            std::thread::sleep(Duration::from_secs(1));
            cluster.still_has("ip", &before);
        }
        moves(cluster, round);
    }
    let longest = daemon.log().lines().map(str::len).max().unwrap_or(0);
    assert!(longest < 2000, "a line of {longest} bytes in the log");
}

fn requests_are_refused(cluster: &Cluster<'_>, between: &Between, daemon: &Daemon) {
    for (resource, code, words) in [
        ("endpointslices", 401, "does not accept our credentials"),
        ("services", 403, "not allowed to list or watch services"),
        ("endpointslices", 500, "the API server answered 500"),
        ("", 429, "the API server answered 429"),
    ] {
        let before = (cluster.table("ip"), lines(daemon, "WARN").len());
        between.strike_and_set(
            Blow::Gone,
            Faults { refuse: vec![(resource, code)], ..Faults::default() },
        );
        said(daemon, words);
        cluster.endpoints("moving", &[A]);
        std::thread::sleep(UNCHANGED);
        if resource != "services" {
            cluster.still_has("ip", &before.0);
        }
        between.set(Faults::default());
        cluster.answers(MOVING, 80, &["a"]);
        let told = lines(daemon, "WARN").len() - before.1;
        assert!(told <= 5, "{told} warnings for one refusal: {}", daemon.log());
        cluster.endpoints("moving", &[REMOTE]);
        cluster.answers(MOVING, 80, &["remote"]);
    }
}

fn a_list_is_empty(cluster: &Cluster<'_>, between: &Between, daemon: &Daemon) {
    // Without its endpoints a Service refuses; without itself, its address is nobody's.
    for (number, (resource, meets)) in
        [("services", Answer::Lost), ("endpointslices", Answer::Refused)].into_iter().enumerate()
    {
        between.strike_and_set(Blow::Gone, Faults { empty: vec![resource], ..Faults::default() });
        // It is said, and it counts.
        cluster.meets("client", STEADY, 80, &meets);
        between.strike_and_set(Blow::Gone, Faults::default());
        cluster.answers(STEADY, 80, &["a", "remote"]);
        let told = lines(daemon, SUSPICIOUS);
        assert_eq!(told.len(), number + 1, "{told:?}");
        assert!(told[number].contains("after=0") && told[number].contains("WARN"), "{told:?}");
    }
}

#[test]
fn a_server_restored_from_an_old_backup_is_believed() {
    with_cluster(|cluster| {
        cluster.apply(CLUSTER.split("---\n").next().unwrap());
        cluster.apply(
            &(service("steady", &[STEADY]).yaml() + &service("short", &["10.96.0.42"]).yaml()),
        );
        cluster.endpoints("steady", &[A]);
        cluster.endpoints("short", &[A]);
        let daemon = cluster.start(User::KubeProxy);
        cluster.answers(STEADY, 80, &["a"]);
        cluster.runtime.block_on(cluster.plane.back_up());
        // What the backup does not know: a change, a deletion, a new Service; and many versions.
        for round in 0..30 {
            cluster.endpoints("steady", &[if round % 2 == 0 { A } else { REMOTE }]);
        }
        cluster.delete("Service", "short");
        cluster.apply(&service("moving", &[MOVING]).yaml());
        cluster.endpoints("moving", &[REMOTE]);
        cluster.answers(STEADY, 80, &["remote"]);
        cluster.answers(MOVING, 80, &["remote"]);
        cluster.meets("client", "10.96.0.42", 80, &Answer::Lost);
        let began = Instant::now();
        cluster.runtime.block_on(cluster.plane.restore());
        let (back, began) = (began.elapsed(), Instant::now());
        cluster.answers(STEADY, 80, &["a"]);
        cluster.meets("client", MOVING, 80, &Answer::Lost);
        cluster.answers("10.96.0.42", 80, &["a"]);
        eprintln!(
            "the server was back after {back:?}, its state in force {:?} later",
            began.elapsed()
        );
        // Changes are followed from there, although their versions were seen before.
        cluster.endpoints("steady", &[REMOTE]);
        cluster.answers(STEADY, 80, &["remote"]);
        daemon.terminate();
    });
}
