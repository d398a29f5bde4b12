//! The command line as its users meet it: what each command prints, where, and with which exit code;
//! and what it says when it cannot do what it was asked.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::namespace::{in_namespace, nft, own_table};
use crate::net::wait_until;
use crate::objects::{CLUSTER, Svc, slice};
use crate::parity::{listed, listed_by};

const PROGRAM: &str = env!("CARGO_BIN_EXE_nftproxy");
const NODE: [&str; 2] = ["--hostname-override", "node-1"];

/// What a command did.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Done {
    /// It failed with a single line that holds these words.
    pub(crate) fn failed_saying(&self, words: &[&str]) {
        let Self { code, out, err } = self;
        assert_eq!((*code, out.as_str()), (2, ""), "{err}");
        assert_eq!(err.lines().count(), 1, "one line:\n{err}");
        assert!(err.contains(" ERROR "), "{err}");
        for word in words {
            assert!(err.contains(word), "{word:?} is not in {err}");
        }
    }
}

pub(crate) fn done(command: &mut Command) -> Done {
    let output = command.env_remove("RUST_LOG").stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let code = output.status.code().expect("it ends by itself");
    Done { code, out: text(output.stdout), err: text(output.stderr) }
}

pub(crate) fn nftproxy(arguments: &[&str]) -> Done {
    done(Command::new(PROGRAM).args(arguments))
}

/// The same without some capabilities, which root would have.
pub(crate) fn nftproxy_without(capabilities: &[&str], arguments: &[&str]) -> Done {
    let dropped: Vec<_> = capabilities.iter().map(|name| format!("-{name}")).collect();
    let dropped = dropped.join(",");
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", &dropped, "--inh-caps", &dropped, PROGRAM]);
    done(command.args(arguments))
}

/// Three Services: one with everything in both families, one over UDP, one without endpoints.
pub(crate) fn example() -> String {
    let web = Svc {
        name: "web",
        cluster_ips: &["10.96.0.10", "fd00:10:96::10"],
        ports: &[("http", "TCP", 80, 30080), ("metrics", "TCP", 9090, 0)],
        spec: &["externalTrafficPolicy: Local", "externalIPs: [198.51.100.7]"],
        balancer_ips: &["203.0.113.7", "fd00:203::7"],
    };
    let dns = Svc {
        name: "dns",
        cluster_ips: &["10.96.0.53"],
        ports: &[("dns", "UDP", 53, 0)],
        spec: &[],
        balancer_ips: &[],
    };
    let empty = Svc { name: "empty", cluster_ips: &["fd00:10:96::99"], ..dns };
    let ports = [("http", "TCP", 8080), ("metrics", "TCP", 9090)];
    CLUSTER.to_owned()
        + &web.yaml()
        + &slice("web", "4", &ports, &["10.244.1.5!", "10.244.2.9"])
        + &slice("web", "6", &ports, &["fd00:10:244:1::5!", "fd00:10:244:2::9", "fd00::7"])
        + &dns.yaml()
        + &slice("dns", "4", &[("dns", "UDP", 53)], &["10.244.1.6!", "10.244.1.7!", "10.244.2.6"])
        + &empty.yaml()
}

/// A directory with a manifest in it.
pub(crate) fn manifests(text: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("all.yaml"), text).unwrap();
    let path = dir.path().display().to_string();
    (dir, path)
}

/// Runs the daemon until it has synced, and ends it: everything it said.
pub(crate) fn synced(arguments: &[&str]) -> String {
    let mut child = Command::new(PROGRAM)
        .args(arguments)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    for line in lines.by_ref() {
        said += &(line.unwrap() + "\n");
        if said.contains(" synced ") {
            break;
        }
    }
    assert!(said.contains(" synced "), "it ended before it had synced:\n{said}");
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    lines.for_each(|line| said += &(line.unwrap() + "\n"));
    assert_eq!(child.wait().unwrap().code(), Some(0), "{said}");
    assert!(said.contains("SIGTERM") && said.contains("the tables stay in force"), "{said}");
    said
}

#[test]
fn what_is_running_lists_like_what_is_rendered() {
    let (dir, path) = manifests(&example());
    let file = dir.path().join("all.yaml").display().to_string();
    for masquerading in
        [&["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/56"][..], &["--masquerade-all"]]
    {
        let rendered =
            nftproxy(&[&["render", "--manifests", &file], &NODE[..], masquerading].concat());
        assert_eq!((rendered.code, rendered.err.as_str()), (0, ""));
        let tables = || ["ip", "ip6"].map(|family| listed_by(&["table", family, "nftproxy"]));
        let (mut running, mut loaded) = (None, None);
        in_namespace(|| {
            synced(&[&["run", "--manifests", &path], &NODE[..], masquerading].concat());
            running = Some(tables());
        });
        in_namespace(|| {
            nft(&["-f", "-"], &rendered.out);
            loaded = Some(tables());
        });
        if let (Some(running), Some(loaded)) = (running, loaded) {
            for (running, loaded) in running.iter().zip(&loaded) {
                let pretty = |v| serde_json::to_string_pretty(v).unwrap();
                assert!(running == loaded, "{}\n{}", pretty(running), pretty(loaded));
            }
        }
    }
}

#[test]
fn one_family_can_be_rendered_alone() {
    let (_dir, path) = manifests(&example());
    let render = |more: &[&str]| {
        let done = nftproxy(&[&["render", "--manifests", &path], &NODE[..], more].concat());
        assert_eq!((done.code, done.err.as_str()), (0, ""));
        done.out
    };
    let (both, ip, ip6) = (render(&[]), render(&["--family", "ip"]), render(&["--family", "ip6"]));
    assert!(ip.starts_with("table ip nftproxy {") && !ip.contains("fd00"), "{ip}");
    assert!(ip6.starts_with("table ip6 nftproxy {") && !ip6.contains("10.96."), "{ip6}");
    assert!(both.contains(ip.trim()) && both.contains(ip6.trim()));
}

#[test]
fn a_file_that_cannot_be_used_is_named_and_fails_the_rendering() {
    let (dir, path) = manifests(&example());
    fs::write(dir.path().join("bad.yaml"), "kind: [\n").unwrap();
    let done = nftproxy(&[&["render", "--manifests", &path], &NODE[..]].concat());
    assert_eq!(done.code, 2);
    assert!(done.out.contains("10.96.0.10 . tcp . 80"), "the rest is there");
    let lines: Vec<_> = done.err.lines().collect();
    assert!(lines[0].contains(" WARN ") && lines[0].contains("bad.yaml"), "{}", done.err);
    assert!(lines[1].contains("1 of the manifest files could not be used"), "{}", done.err);
    assert_eq!(lines.len(), 2, "{}", done.err);
    // A part of an object is no reason to fail.
    let absurd = example().replace("port: 9090", "port: 90900");
    fs::write(dir.path().join("all.yaml"), absurd).unwrap();
    fs::remove_file(dir.path().join("bad.yaml")).unwrap();
    let done = nftproxy(&[&["render", "--manifests", &path], &NODE[..]].concat());
    assert_eq!(done.code, 0);
    assert!(done.err.contains("Service default/web") && done.err.contains("90900"), "{}", done.err);
    assert!(done.out.contains("10.96.0.10 . tcp . 80") && !done.out.contains("9090"));
}

#[test]
fn a_diff_names_both_sides_and_says_by_its_exit_code_whether_there_is_one() {
    let (_dir, path) = manifests(&example());
    let diff = || nftproxy(&[&["diff", "--manifests", &path], &NODE[..]].concat());
    in_namespace(|| {
        let before = listed();
        let done = diff();
        assert_eq!((done.code, done.err.as_str()), (1, ""));
        let mut lines = done.out.lines();
        let kernel = "--- kernel: tables ip nftproxy and ip6 nftproxy of this network namespace";
        assert_eq!(lines.next().unwrap(), kernel);
        assert_eq!(lines.next().unwrap(), format!("+++ wanted: manifests in {path}, node node-1"));
        assert!(lines.all(|line| line.starts_with("+ ")), "{}", done.out);
        let element = "+ add element ip nftproxy services { 10.96.0.53 . udp . 53 : goto internal-lb-3 }    # \
                       Service default/dns\n";
        assert!(done.out.contains(element), "{}", done.out);
        assert_eq!(listed(), before, "a diff changes nothing");

        let rendered = nftproxy(&[&["render", "--manifests", &path], &NODE[..]].concat());
        nft(&["-f", "-"], &rendered.out);
        let done = diff();
        assert_eq!((done.code, done.err.as_str()), (0, ""));
        let same =
            format!("the kernel's tables are what is wanted (manifests in {path}, node node-1)\n");
        assert_eq!(done.out, same);

        let damage = "delete element ip nftproxy endpoints { 10.96.0.53 . udp . 53 . 1 };
            add element ip6 nftproxy cluster-ips { fd00:10:96::7 }";
        nft(&["-f", "-"], damage);
        let before = listed();
        let done = diff();
        assert_eq!((done.code, done.err.as_str()), (1, ""));
        let changes: Vec<_> = done.out.lines().skip(2).collect();
        assert_eq!(
            changes,
            [
                "- delete element ip6 nftproxy cluster-ips { fd00:10:96::7 }",
                "+ add element ip nftproxy endpoints { 10.96.0.53 . udp . 53 . 1 : 10.244.1.7 . 53 \
                 }    # Service default/dns",
            ]
        );
        assert_eq!(listed(), before, "a diff changes nothing");
    });
}

#[test]
fn cleanup_removes_our_tables_and_no_others() {
    let (_dir, path) = manifests(&example());
    in_namespace(|| {
        let done = nftproxy(&["cleanup"]);
        assert_eq!((done.code, done.out.as_str()), (0, ""), "{}", done.err);
        for family in ["ip", "ip6"] {
            assert!(
                done.err.contains(&format!("there is no table {family} nftproxy")),
                "{}",
                done.err
            );
        }
        nft(&["-f", "-"], "add table ip other; add table inet nftproxy");
        let before = listed();
        let rendered = nftproxy(&[&["render", "--manifests", &path], &NODE[..]].concat());
        nft(&["-f", "-"], &rendered.out);
        // As an upgrade leaves it that is killed half way.
        nft(&["-f", "-"], "add table ip nftproxy-stand-in");
        let done = nftproxy(&["cleanup"]);
        assert_eq!(done.code, 0);
        for table in ["ip nftproxy", "ip6 nftproxy", "ip nftproxy-stand-in"] {
            assert!(done.err.contains(&format!("removed table {table}\n")), "{}", done.err);
        }
        assert_eq!(listed(), before);
    });
}

#[test]
fn cleanup_goes_on_when_a_table_cannot_be_removed() {
    in_namespace(|| {
        // A table that another program owns, for as long as it lives.
        let (mut owner, stdin) = own_table(Command::new("nft"));
        wait_until("the owned table", || {
            nft(&["list", "tables"], "").contains("table ip nftproxy")
        });
        nft(&["-f", "-"], "add table ip6 nftproxy");
        let done = nftproxy(&["cleanup"]);
        drop(stdin);
        owner.wait().unwrap();
        assert_eq!(done.code, 2, "{done:?}");
        let refused = "cannot remove table ip nftproxy: an operation was refused by the kernel, \
                       first: Operation not permitted";
        assert!(done.err.contains(refused), "{}", done.err);
        assert!(done.err.contains("removed table ip6 nftproxy"), "{}", done.err);
        assert!(done.err.contains("1 of the tables could not be removed"), "{}", done.err);
    });
}

fn config(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("config.conf");
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    fs::write(&path, format!("{head}{text}")).unwrap();
    path
}

#[test]
fn the_spelling_of_kube_proxy_runs() {
    let (dir, path) = manifests(&example());
    let aside = tempfile::tempdir().unwrap();
    let text = "mode: nftables\nclusterCIDR: 10.244.0.0/16\nhostnameOverride: node-7\nconfigSyncPeriod: 1h\n";
    let config = config(aside.path(), text).display().to_string();
    in_namespace(|| {
        // Apart from where objects come from, as a DaemonSet of kube-proxy has it.
        let equals = format!("--config={config}");
        for arguments in [
            ["--config", &config, "--hostname-override", "Node-1", "--v=2"],
            [&equals, "--hostname-override=node-1", "-v", "2", "--log-format=text"],
        ] {
            let said = synced(&[&arguments[..], &["--manifests", &path]].concat());
            assert!(said.contains("node=\"node-1\""), "the flag wins over the file: {said}");
            assert!(said.contains("configSyncPeriod: 1h0m0s has no effect: "), "{said}");
            assert!(nft(&["list", "table", "ip", "nftproxy"], "").contains("10.244.0.0/16"));
        }
        let json = [&["--log-format", "json", "--manifests", &path], &NODE[..]].concat();
        let mut child = Command::new(PROGRAM).args(json).stderr(Stdio::piped()).spawn().unwrap();
        let first = BufReader::new(child.stderr.as_mut().unwrap()).lines().next().unwrap().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let line: serde_json::Value = serde_json::from_str(&first).unwrap();
        assert_eq!(line["level"], "INFO", "{first}");
    });
    // With what a DaemonSet has, and no cluster: the file it names is what is missing.
    let text = "clientConnection:\n  kubeconfig: /nonexistent/kubeconfig.conf\n";
    let named = self::config(aside.path(), text).display().to_string();
    in_namespace(|| {
        let done = nftproxy(&["--config", &named, "--hostname-override", "node-1"]);
        assert_eq!(done.code, 2);
        let last = done.err.lines().last().unwrap();
        assert!(
            last.contains(" ERROR ") && last.contains("/nonexistent/kubeconfig.conf"),
            "{last}"
        );
    });
    drop(dir);
}

#[test]
fn a_configuration_that_cannot_be_used_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    // Not `run`: one that is taken by mistake would change the machine.
    let run = |path: &Path| nftproxy(&["config", "--config", path.to_str().unwrap()]);
    for (text, words) in [
        ("nftables:\n  masqueradeBit: 32\n", ["nftables.masqueradeBit", "32", "0 to 31"]),
        ("nftables:\n  minSyncPeriod: 5\n", ["nftables.minSyncPeriod", "5", "expected a"]),
        ("clusterCIDR: everything\n", ["clusterCIDR", "everything", "expected a range like"]),
        ("detectLocalMode: Magic\n", ["detectLocalMode", "Magic", "expected ClusterCIDR"]),
        ("mode: userspace\n", ["mode", "userspace", "expected iptables, ipvs or nftables"]),
        ("nftables: [\n", ["line 3", "column", "["]),
        ("kind: Again\n", ["kind", "Again", "expected KubeProxyConfiguration"]),
    ] {
        let path = config(dir.path(), text);
        let done = run(&path);
        done.failed_saying(&words);
        done.failed_saying(&[path.to_str().unwrap()]);
    }
    let other = dir.path().join("pod.yaml");
    for (text, words) in [
        ("apiVersion: v1\nkind: Pod\n", ["kind", "Pod", "expected KubeProxyConfiguration"]),
        ("", ["kind", "", "expected KubeProxyConfiguration"]),
    ] {
        fs::write(&other, text).unwrap();
        run(&other).failed_saying(&words);
    }
    fs::write(&other, [0xff, 0xfe, 0]).unwrap();
    run(&other).failed_saying(&["pod.yaml: cannot read it", "UTF-8"]);
    run(dir.path()).failed_saying(&["cannot read it: Is a directory"]);
    run(Path::new("/nonexistent")).failed_saying(&["/nonexistent: cannot read it: No such file"]);
    let cidr = ["render", "--manifests", "/tmp", "--cluster-cidr", "10.244.0.0/16,ten"];
    nftproxy(&cidr).failed_saying(&["--cluster-cidr", "\"ten\"", "expected a range like"]);
    let name = ["render", "--manifests", "/tmp", "--hostname-override", " "];
    nftproxy(&name).failed_saying(&["--hostname-override", "expected a node name"]);
}

#[test]
fn the_help_teaches() {
    let done = nftproxy(&["--help"]);
    assert_eq!((done.code, done.err.as_str()), (0, ""));
    for words in [
        "Examples:",
        "nftproxy run --manifests DIR",
        "nft list table ip nftproxy",
        "nftproxy --config F --hostname-override NODE",
        "Exit codes:",
    ] {
        assert!(done.out.contains(words), "{words:?} is not in\n{}", done.out);
    }
    for command in ["run", "render", "diff", "cleanup"] {
        assert!(done.out.contains(&format!("\n  {command} ")), "{}", done.out);
        let own = nftproxy(&[command, "--help"]);
        assert_eq!((own.code, own.err.as_str()), (0, ""));
        // Every option says what it is for.
        let lines = own.out.lines().map(str::trim_start);
        // Not the values that one can have.
        let options = lines.filter(|line| line.starts_with('-') && !line.starts_with("- "));
        for option in options.map(|line| line.trim_start_matches("-v, ")) {
            let said = option.split_once("  ").map(|(_, said)| said.trim());
            let below = own.out.split_once(option).unwrap().1.lines().nth(1);
            let said = said.filter(|said| !said.is_empty()).or(below.map(str::trim));
            assert!(said.is_some_and(|said| said.len() > 5), "{option:?} in\n{}", own.out);
        }
    }
    assert!(nftproxy(&["--version"]).out.starts_with("nftproxy 0."));
}

#[test]
fn a_command_line_that_makes_no_sense_is_answered_with_what_would() {
    for (arguments, words) in [
        (&["rendr"][..], "a similar subcommand exists: 'render'"),
        (&["run", "--manifest", "x"], "a similar argument exists: '--manifests'"),
        (&["run", "--manifests", "x", "--kubeconfig", "y"], "cannot be used with"),
        (&["render", "--family", "ipv4"], "[possible values: ip, ip6]"),
        (&["run", "--manifests"], "a value is required for '--manifests <PATH>'"),
        (&["run", "-v", "much"], "-v: \"much\": expected a whole number"),
    ] {
        let done = nftproxy(arguments);
        assert_eq!((done.code, done.out.as_str()), (2, ""));
        assert!(done.err.contains(words), "{words:?} is not in\n{}", done.err);
    }
    nftproxy(&["render"]).failed_saying(&["render needs --manifests PATH"]);
}

#[test]
fn missing_rights_are_named() {
    let (dir, path) = manifests(&example());
    in_namespace(|| {
        let before = listed();
        let run = [&["run", "--manifests", &path], &NODE[..]].concat();
        let diff = [&["diff", "--manifests", &path], &NODE[..]].concat();
        for arguments in [&run[..], &diff, &["cleanup"]] {
            let done = nftproxy_without(&["net_admin"], arguments);
            done.failed_saying(&["lacks the capability CAP_NET_ADMIN"]);
        }
        assert_eq!(listed(), before);
        // To render takes no rights.
        let render = [&["render", "--manifests", &path], &NODE[..]].concat();
        let done = nftproxy_without(&["net_admin"], &render);
        assert_eq!((done.code, done.err.as_str()), (0, ""));
        assert_eq!(done.out, nftproxy(&render).out);

        // A directory nobody may read, and a file.
        let blind = ["dac_override", "dac_read_search"];
        let file = dir.path().join("all.yaml");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).unwrap();
        let done = nftproxy_without(&blind, &render);
        assert_eq!(done.code, 2);
        assert!(
            done.err.contains("all.yaml") && done.err.contains("Permission denied"),
            "{}",
            done.err
        );
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o000)).unwrap();
        for arguments in [&render[..], &diff, &run] {
            let done = nftproxy_without(&blind, arguments);
            let last = done.err.lines().last().unwrap();
            let expected = format!("cannot read the manifests in {path}: Permission denied");
            assert!(done.code == 2 && last.contains(&expected), "{arguments:?}: {done:?}");
        }
        assert_eq!(listed(), before);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    });
}

#[test]
fn output_that_nobody_reads_is_no_error() {
    let (_dir, path) = manifests(&example());
    let mut child = Command::new(PROGRAM)
        .args([&["render", "--manifests", &path], &NODE[..]].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(0), Vec::new()));
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = Command::new(PROGRAM)
        .args([&["render", "--manifests", &path], &NODE[..]].concat())
        .stdout(full)
        .output()
        .unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("cannot write to standard output: No space left on device"), "{err}");
}
