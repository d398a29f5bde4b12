//! What an operator reads: the texts of `list` and `explain` as the snapshots hold them, whether `list`
//! and `check` notice what is wrong, and that none of them changes anything.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::commands::{done, example, manifests, nftproxy, nftproxy_without, synced};
use crate::namespace::{in_namespace, nft};
use crate::net::sysctl;
use crate::objects::Svc;
use crate::render::snapshots;

const PROGRAM: &str = env!("CARGO_BIN_EXE_nftproxy");
const NODE: [&str; 2] = ["--hostname-override", "node-1"];
const PODS: [&str; 2] = ["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/56"];

/// Runs a command over a fixture, which it names as a user in the repository would.
fn over(fixture: &str, arguments: &[&str]) -> crate::commands::Done {
    let path = format!("tests/fixtures/{fixture}.yaml");
    let mut command = Command::new(PROGRAM);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.args(arguments).args(["--manifests", &path]).args(NODE).args(PODS);
    done(&mut command)
}

/// Text fits a terminal of 80 columns, but for single words that are longer.
fn fits(text: &str) {
    for line in text.lines() {
        let alone = line.trim_start().split(' ').count() <= 2;
        assert!(line.chars().count() <= 80 || alone, "{} columns: {line}", line.chars().count());
        assert_eq!(line.trim_end(), line, "blanks at the end: {line:?}");
    }
}

/// An explanation without the rules and elements below its chains: those are whole lines, as nft shows them.
fn without_rules(explained: &str) -> String {
    let mut quotes = false;
    let said = explained.lines().filter(|line| {
        let is_chain = line.trim_start().starts_with("chain ");
        quotes = is_chain || quotes && line.starts_with(' ');
        is_chain || !quotes
    });
    said.map(|line| format!("{line}\n")).collect()
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn every_fixture_is_listed_within_80_columns_and_the_same_in_json() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut names: Vec<_> = fs::read_dir(fixtures).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    let mut all = String::new();
    for path in &names {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let listed = over(name, &["list", "--wanted"]);
        assert_eq!(listed.code, 0, "{name}: {}", listed.err);
        fits(&listed.out);
        assert!(!listed.out.contains('\x1b'), "colours where nobody sees them");
        let json = parsed(&over(name, &["list", "--wanted", "--output", "json"]).out);
        let services = json["services"].as_array().unwrap();
        let blocks = listed.out.split("\n\n").count() - 1;
        assert_eq!(blocks, services.len(), "{name}: {}", listed.out);
        for endpoint in services.iter().flat_map(|s| s["endpoints"].as_array().unwrap()) {
            assert!(listed.out.contains(endpoint["endpoint"].as_str().unwrap()));
        }
        all += &format!("$ nftproxy list\n{}\n", listed.out);
    }
    snapshots().bind(|| insta::assert_snapshot!("operator--list", all));
}

#[test]
fn a_listing_can_be_narrowed() {
    let (_dir, path) = manifests(&example());
    let listed = |filter: &[&str]| -> Vec<String> {
        let arguments =
            [&["list", "--wanted", "--output", "json", "--manifests", &path], &NODE[..], filter];
        let done = nftproxy(&arguments.concat());
        assert_eq!(done.code, 0, "{}", done.err);
        let services = parsed(&done.out)["services"].clone();
        let name =
            |s: &Value| format!("{}:{} {}", s["service"], s["port"], s["family"]).replace('"', "");
        services.as_array().unwrap().iter().map(name).collect()
    };
    let web = [
        "default/web:http IPv4",
        "default/web:http IPv6",
        "default/web:metrics IPv4",
        "default/web:metrics IPv6",
    ];
    assert_eq!(listed(&[]).len(), 6);
    assert_eq!(listed(&["--service", "web"]), web);
    assert_eq!(listed(&["--namespace", "default"]).len(), 6);
    assert_eq!(listed(&["--namespace", "other"]), [""; 0]);
    // An address that is dialled, and one of an endpoint.
    assert_eq!(listed(&["--address", "10.96.0.53"]), ["default/dns:dns IPv4"]);
    assert_eq!(listed(&["--address", "10.244.1.7"]), ["default/dns:dns IPv4"]);
    assert_eq!(listed(&["--address", "fd00:203::7"]), [web[1], web[3]]);
}

#[test]
fn explanations_are_what_the_snapshots_hold() {
    let cases: [(&str, &[&str], i32); 12] = [
        ("cluster-ip", &["10.96.0.10:80", "--from", "10.244.1.5"], 0),
        ("cluster-ip", &["10.96.0.10:81", "--from", "10.244.1.5"], 1),
        ("no-endpoints", &["10.96.0.99:80", "--from", "10.244.1.5"], 1),
        ("external-local", &["192.0.2.10:30080", "--from", "198.18.0.1"], 0),
        ("external-local", &["192.0.2.11:30080", "--from", "198.18.0.1"], 1),
        ("external-local-elsewhere", &["192.0.2.10:30080", "--from", "198.18.0.1"], 1),
        ("source-ranges", &["203.0.113.7:80", "--from", "198.51.100.1"], 1),
        ("session-affinity", &["10.96.0.10:80", "--from", "10.244.7.7"], 0),
        ("scheduler-source-hash", &["10.96.0.10:80", "--from", "10.244.7.7"], 0),
        ("dual-stack", &["[fd00:10:96::10]:80", "--from", "fd00:10:244:1::5"], 0),
        ("cluster-ip", &["10.96.0.10/icmp", "--from", "10.244.1.5"], 1),
        ("dual-stack", &["[fd00:192::10]/icmp", "--from", "fd00:10:244:1::5"], 1),
    ];
    let mut all = String::new();
    for (fixture, question, code) in cases {
        let explained = over(fixture, &[&["explain", "--wanted"], question].concat());
        assert_eq!(explained.code, code, "{fixture}: {}{}", explained.out, explained.err);
        fits(&without_rules(&explained.out));
        all += &format!("$ nftproxy explain {}\n{}\n", question.join(" "), explained.out);
    }
    snapshots().bind(|| insta::assert_snapshot!("operator--explain", all));
}

#[test]
fn questions_that_make_no_sense_are_answered_with_what_would() {
    let targets = ["10.96.0.10", "10.96.0.10:http", "fd00::1:80:", "web:80", "10.96.0.10:80/gre"];
    for target in targets.into_iter().chain(["10.96.0.10:80/icmp", "web/icmp", "10.96.0.10:0"]) {
        let done = nftproxy(&["explain", target]);
        assert_eq!((done.code, done.out.as_str()), (2, ""), "{target}");
        assert!(done.err.contains("expected"), "{}", done.err);
    }
    let mixed = over("cluster-ip", &["explain", "10.96.0.10:80", "--from", "fd00::1"]);
    mixed.failed_saying(&["fd00::1 cannot dial 10.96.0.10"]);
    let nothing = nftproxy_without(&["net_admin"], &["explain", "10.96.0.10:80"]);
    nothing.failed_saying(&["CAP_NET_ADMIN", "give --kubeconfig FILE"]);
    let nowhere = nftproxy(&["list", "--manifests", "/does/not/exist"]);
    nowhere.failed_saying(&["/does/not/exist"]);
}

#[test]
fn a_listing_says_what_is_not_in_force() {
    let (_dir, path) = manifests(&example());
    let list = [&["list", "--manifests", &path], &NODE[..], &PODS].concat();
    in_namespace(|| {
        synced(&[&["run", "--manifests", &path], &NODE[..], &PODS].concat());
        let before = nft(&["list", "ruleset"], "");
        let listed = nftproxy(&list);
        assert_eq!(listed.code, 0, "{}", listed.out);
        assert_eq!(listed.out.matches("in force").count(), 6, "{}", listed.out);
        assert_eq!(nft(&["list", "ruleset"], ""), before);
        nft(&["delete", "element", "ip", "nftproxy", "services", "{ 10.96.0.53 . udp . 53 }"], "");
        let listed = nftproxy(&list);
        assert_eq!(listed.code, 1, "{}", listed.out);
        let block =
            listed.out.split("\n\n").find(|block| block.starts_with("default/dns")).unwrap();
        assert!(block.contains("NOT IN FORCE"), "{}", listed.out);
        assert_eq!(listed.out.matches("NOT IN FORCE").count(), 1, "{}", listed.out);
        // And what follows from it is explained, with a word about the objects.
        let explain =
            ["explain", "10.96.0.53:53/udp", "--from", "10.244.1.9", "--manifests", &path];
        let explained = nftproxy(&[&explain, &NODE[..], &PODS].concat());
        assert_eq!(explained.code, 1, "{}", explained.out);
        assert!(
            explained.out.contains("=> refused: 10.96.0.53 is a ClusterIP"),
            "{}",
            explained.out
        );
        assert!(explained.out.contains("the objects ask for something else"), "{}", explained.out);
    });
}

#[test]
fn the_kernel_is_explained_without_objects_and_whatever_flags_it_was_programmed_with() {
    let (_dir, path) = manifests(&example());
    in_namespace(|| {
        synced(&[&["run", "--manifests", &path], &NODE[..], &PODS].concat());
        let explained =
            nftproxy(&["explain", "10.96.0.10:80", "--from", "10.244.9.9", "-o", "json"]);
        assert_eq!(explained.code, 0, "{}", explained.err);
        let answer = parsed(&explained.out);
        assert_eq!(answer["tables"], "what the kernel holds");
        assert_eq!(answer["service"], Value::Null);
        assert_eq!(answer["summary"], "sent to one of 2 endpoints, seen from its own address");
        nft(&["flush", "chain", "ip", "nftproxy", "dispatch"], "");
        let explained = nftproxy(&["explain", "10.96.0.10:80", "--from", "10.244.9.9"]);
        let said: String = explained.out.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            said.contains("are not as nftproxy writes them") && said.contains("dispatch"),
            "{said}"
        );
        nft(&["delete", "table", "ip", "nftproxy"], "");
        let explained = nftproxy(&["explain", "10.96.0.10:80", "--from", "10.244.9.9"]);
        assert_eq!(explained.code, 1);
        assert!(explained.out.contains("the kernel has no table ip nftproxy"), "{}", explained.out);
    });
}

/// The verdicts of a check by what they are about, worst last; and its exit code.
fn checked(arguments: &[&str]) -> (Vec<(String, String)>, i32, String) {
    let done = nftproxy(&[&["check", "--output", "json"], arguments].concat());
    let report = parsed(&done.out);
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let findings = report["findings"].as_array().unwrap();
    let verdicts: Vec<_> =
        findings.iter().map(|f| (text(&f["about"]), text(&f["verdict"]))).collect();
    for finding in findings {
        assert_eq!(finding["verdict"] == "good", finding["advice"] == Value::Null, "{finding}");
    }
    let worst = match done.code {
        0 => "good",
        1 => "attention",
        _ => "bad",
    };
    assert_eq!(report["verdict"], worst);
    let has = |verdict: &str| verdicts.iter().any(|(_, v)| v == verdict);
    assert_eq!(done.code, if has("bad") { 2 } else { i32::from(has("attention")) });
    (verdicts, done.code, done.out)
}

#[test]
fn a_check_finds_what_is_wrong_and_changes_nothing() {
    let (_dir, path) = manifests(&example());
    let with = [&["--manifests", &path], &NODE[..], &PODS].concat();
    in_namespace(|| {
        let is = |about: &str, verdict: &str| {
            let (verdicts, _, out) = checked(&with);
            let of: Vec<_> =
                verdicts.iter().filter(|(a, _)| a == about).map(|(_, v)| v.as_str()).collect();
            assert!(!of.is_empty() && of.iter().all(|v| *v == verdict), "{about}: {of:?} in {out}");
        };
        sysctl("ipv4/ip_forward", "0");
        sysctl("ipv6/conf/all/forwarding", "0");
        is("forwarding", "bad");
        sysctl("ipv4/ip_forward", "1");
        sysctl("ipv6/conf/all/forwarding", "1");
        is("forwarding", "good");
        is("tables", "attention");
        is("in force", "attention");
        is("kernel", "good");
        assert_eq!(nft(&["list", "ruleset"], ""), "", "a check leaves nothing behind");
        synced(&[&["run"], &with[..]].concat());
        let before = nft(&["list", "ruleset"], "");
        for about in
            ["objects", "permission", "tables", "in force", "kernel", "leftovers", "Services"]
        {
            is(about, "good");
        }
        assert_eq!(nft(&["list", "ruleset"], ""), before);
        nft(&["add", "table", "ip6", "kube-proxy"], "");
        is("leftovers", "attention");
        nft(&["add", "rule", "ip", "nftproxy", "dispatch", "accept"], "");
        let (verdicts, ..) = checked(&with);
        assert!(verdicts.contains(&("tables".into(), "attention".into())), "{verdicts:?}");
        assert!(verdicts.contains(&("tables".into(), "good".into())), "{verdicts:?}");
        is("in force", "attention");
    });
    // Without the right to ask.
    let done = nftproxy_without(&["net_admin"], &["check"]);
    assert_eq!(done.code, 2, "{}", done.out);
    assert!(done.out.contains("BAD   permission"), "{}", done.out);
    fits(&done.out);
    let conflict = over("conflict", &["check", "--output", "json"]);
    let findings = parsed(&conflict.out)["findings"].clone();
    let found = findings.as_array().unwrap().iter().find(|f| f["about"] == "Services").unwrap();
    assert!(found["found"].as_str().unwrap().contains("default/old"), "{found}");
}

#[test]
fn a_process_whose_port_a_service_takes_is_found() {
    let web = Svc {
        name: "web",
        cluster_ips: &["10.96.0.10"],
        ports: &[("http", "TCP", 80, 30080)],
        spec: &["externalIPs: [192.0.2.10]"],
        balancer_ips: &[],
    };
    let (_dir, path) = manifests(&web.yaml());
    in_namespace(|| {
        for arguments in
            ["link add d0 type veth", "addr add 192.0.2.10/24 dev d0", "link set d0 up"]
        {
            let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
            assert!(status.success(), "ip {arguments}");
        }
        let found = || -> Vec<String> {
            let with = [&["check", "-o", "json", "--manifests", &path], &NODE[..]].concat();
            let findings = parsed(&nftproxy(&with).out)["findings"].clone();
            let findings =
                findings.as_array().unwrap().iter().filter(|f| f["about"] == "listeners");
            findings.map(|f| f["found"].as_str().unwrap().to_owned()).collect()
        };
        let nothing = ["no Service takes the port of a process"];
        assert_eq!(found(), nothing);
        // On another port, and on another protocol's.
        let _other = TcpListener::bind("0.0.0.0:81").unwrap();
        let _udp = UdpSocket::bind("192.0.2.10:80").unwrap();
        assert_eq!(found(), nothing);
        let external = TcpListener::bind("192.0.2.10:80").unwrap();
        let _node_port = TcpListener::bind("[::]:30080").unwrap();
        let found_both = found();
        assert_eq!(found_both.len(), 2, "{found_both:?}");
        let says = |words: &str| found_both.iter().any(|found| found.contains(words));
        assert!(says("192.0.2.10 port 80/tcp, which is an external IP of Service default/web"));
        assert!(says("192.0.2.10 port 30080/tcp, which is a node port of Service default/web"));
        drop(external);
        assert_eq!(found().len(), 1);
    });
}

#[test]
fn a_map_that_is_nearly_full_is_found() {
    let (_dir, path) = manifests(
        &fs::read_to_string(
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/session-affinity.yaml"),
        )
        .unwrap(),
    );
    let with = [&["--manifests", &path], &NODE[..]].concat();
    in_namespace(|| {
        synced(&[&["run"], &with[..]].concat());
        let of = || -> Vec<_> {
            let (verdicts, _, out) = checked(&with);
            let of = verdicts.into_iter().filter(|(about, _)| about == "affinity");
            of.map(|(_, verdict)| (verdict, out.clone())).collect()
        };
        assert_eq!(of()[0].0, "good");
        let listed = nft(&["list", "maps"], "");
        let map = listed.lines().find_map(|line| line.trim().strip_prefix("map affinity/"));
        let map = format!("affinity/{}", map.unwrap().trim_end_matches(" {"));
        let clients: Vec<_> = (0..60_000_u32)
            .map(|n| format!("{} : 10.244.1.5 . 8080", std::net::Ipv4Addr::from(n + 0x0b00_0000)))
            .collect();
        let text = format!("add element ip nftproxy {map} {{ {} }}", clients.join(",\n"));
        nft(&["-f", "-"], &text);
        let found = of();
        assert_eq!(found[0].0, "attention");
        assert!(found[0].1.contains("remembers 60000 of at most 65535 clients"), "{}", found[0].1);
    });
}

#[test]
fn completions_and_man_pages_know_every_command() {
    let commands =
        ["run", "render", "diff", "cleanup", "explain", "list", "check", "top", "events", "bundle"];
    for shell in ["bash", "zsh", "fish"] {
        let script = nftproxy(&["completions", shell]);
        assert_eq!((script.code, script.err.as_str()), (0, ""));
        assert!(commands.iter().all(|command| script.out.contains(command)), "{shell}");
    }
    let script = nftproxy(&["completions", "bash"]).out;
    let dir = tempfile::tempdir().unwrap();
    // By a file: as an argument it would be too long.
    let file = dir.path().join("nftproxy.bash");
    fs::write(&file, script).unwrap();
    let read = Command::new("bash").arg("-n").arg(&file).output().unwrap();
    assert_eq!((read.status.code(), &*read.stderr), (Some(0), &[][..]));
    let page = nftproxy(&["man"]);
    assert!(page.code == 0 && page.out.contains(".TH nftproxy 1"), "{}", page.err);
    assert_eq!(nftproxy(&["man", "--dir", dir.path().to_str().unwrap()]).code, 0);
    for command in commands {
        let page = dir.path().join(format!("nftproxy-{command}.1"));
        let page = fs::read_to_string(page).unwrap();
        assert!(page.contains(".SH OPTIONS"), "{command}");
        // What can be given is said, and everything that is named has a text.
        let synopsis = page.lines().skip_while(|line| *line != ".SH SYNOPSIS").nth(1).unwrap();
        assert!(synopsis.starts_with(&format!("nftproxy {command} [OPTIONS]")), "{synopsis}");
        let options = page.split(".TP\n").skip(1);
        for (option, text) in options.map(|option| option.split_once('\n').unwrap()) {
            let is_said = !text.is_empty() && !text.starts_with(['.', '\n']);
            assert!(is_said, "{command}: {option}: {text:?}");
        }
    }
}
