//! What an operator asks of the running program: its pages on the loopback, the commands that go by
//! them, and the plugin of kubectl. Compared with what the same commands say of the same objects.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::commands::{Done, done, example};
use crate::http::{Page, get, request};
use crate::net::{NODE, Net, wait_until};
use crate::objects::{CLUSTER, Svc, slice};
use crate::packets::{CIDRS, run, to};

const PROGRAM: &str = env!("CARGO_BIN_EXE_nftproxy");

fn inside() -> SocketAddr {
    to("127.0.0.1", 10249)
}

fn page(net: &Net, path: &str) -> Page {
    get(net, "node", inside(), path).expect("the metrics server listens")
}

fn value(net: &Net, path: &str) -> Value {
    let page = page(net, path);
    assert_eq!(page.code, 200, "{path}: {}", page.body);
    page.json()
}

/// A command on the node.
fn on_node(net: &Net, arguments: &[&str]) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &net.name("node"), PROGRAM]).args(arguments);
    command
}

/// The same, to its end, on the objects that the daemon is given, but without the daemon.
fn beside(net: &Net, arguments: &[&str]) -> Done {
    let manifests = net.manifests();
    let given = ["--hostname-override", "node-1", "--cluster-cidr", CIDRS, "--manifests"];
    done(on_node(net, arguments).args(given).arg(manifests))
}

fn nft(net: &Net, arguments: &[&str]) {
    let command = ["netns", "exec", &net.name("node"), "nft"];
    assert!(Command::new("ip").args(command).args(arguments).status().unwrap().success());
}

#[test]
fn pages_say_what_commands_say_of_the_same_objects() {
    let Some(net) = Net::new() else { return };
    net.write("all.yaml", &example());
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let json = |done: Done| -> Value {
        assert!(done.code < 2, "{}", done.err);
        serde_json::from_str(&done.out).unwrap()
    };
    let listed = json(beside(&net, &["list", "--wanted", "-o", "json"]));
    let services = value(&net, "/debug/services");
    assert_eq!(services["services"], listed["services"]);
    assert_eq!(services["services"].as_array().unwrap().len(), 6);
    assert_eq!((&services["node"], &services["ports"]), (&"node-1".into(), &6.into()));
    let narrowed = value(&net, "/debug/services?namespace=default&service=dns");
    assert_eq!(narrowed["services"].as_array().unwrap().len(), 1);
    assert_eq!(page(&net, "/debug/ruleset").body, beside(&net, &["render"]).out);
    for family in ["ip", "ip6"] {
        let rendered = beside(&net, &["render", "--family", family]).out;
        assert_eq!(page(&net, &format!("/debug/ruleset?family={family}")).body, rendered);
    }
    let rendered = json(beside(&net, &["render", "-o", "json", "--family", "ip"]));
    assert_eq!(value(&net, "/debug/ruleset?output=json&family=ip"), rendered);
    for (target, from) in [
        ("10.96.0.10:80", "10.244.1.5"),
        ("192.0.2.10:30080", "198.51.100.1"),
        ("10.96.0.53:53/udp", "10.244.1.5"),
        ("[fd00:10:96::99]:53/udp", "fd00::1"),
        ("10.96.0.99:1", "10.244.1.5"),
    ] {
        let command = ["explain", target, "--from", from, "--wanted", "-o", "json"];
        let mut beside = json(beside(&net, &command));
        let path = format!("/debug/explain?target={target}&from={from}");
        let mut explained = value(&net, &path);
        for explanation in [&mut beside, &mut explained] {
            explanation["tables"].take();
        }
        assert_eq!(explained, beside, "{target} from {from}");
        let text = page(&net, &format!("{path}&output=text"));
        assert_eq!(text.headers["content-type"], "text/plain; charset=utf-8");
        assert!(text.body.starts_with(&explained["target"].as_str().unwrap().to_owned()));
    }
}

#[test]
fn pages_are_for_this_host_and_change_nothing() {
    let Some(net) = Net::new() else { return };
    net.write("all.yaml", CLUSTER);
    let daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let paths =
        ["/", "/debug/services", "/debug/ruleset", "/debug/recent", "/debug/log", "/debug/objects"];
    let sent = |head: &str| {
        let text = format!("{head}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        request(&net, "node", inside(), &text).unwrap().code
    };
    for path in paths {
        for (host, code) in [("127.0.0.1:10249", 200), ("[::1]", 200), ("localhost:1", 200)]
            .into_iter()
            .chain([("x", 403), ("evil.example", 403), ("127.0.0.1.evil.example:10249", 403)])
        {
            assert_eq!(
                sent(&format!("GET {path} HTTP/1.1\r\nHost: {host}")),
                code,
                "{path} {host}"
            );
        }
        assert_eq!(sent(&format!("POST {path} HTTP/1.1\r\nHost: 127.0.0.1")), 405);
    }
    let wrong = [
        "/debug/explain",
        "/debug/explain?target=x",
        "/debug/explain?target=10.96.0.10:80&from=fd00::1",
        "/debug/ruleset?family=ipx",
        "/debug/ruleset?output=yaml",
        "/debug/services?address=x",
        "/debug/recent?after=x",
    ];
    for path in wrong {
        assert_eq!(sent(&format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1")), 400, "{path}");
    }
    assert_eq!(sent("GET /debug/nothing HTTP/1.1\r\nHost: 127.0.0.1"), 404);
    daemon.terminate();
    // Where others could ask, there are none.
    let _daemon = run(&net, &["--cluster-cidr", CIDRS, "--metrics-bind-address", "0.0.0.0"]);
    for path in paths {
        assert_eq!(get(&net, "client", to(NODE[0], 10249), path).unwrap().code, 404, "{path}");
        assert_eq!(get(&net, "node", inside(), path).unwrap().code, 404, "{path}");
    }
    let events = done(&mut on_node(&net, &["events", "--metrics-bind-address", "0.0.0.0"]));
    events.failed_saying(&["loopback only", "0.0.0.0:10249"]);
}

#[test]
fn commands_take_names_from_the_daemon() {
    let Some(net) = Net::new() else { return };
    let nobody = done(&mut on_node(&net, &["list", "--wanted"]));
    nobody.failed_saying(&["no nftproxy answers on 127.0.0.1:10249", "refused"]);
    net.write("all.yaml", &example());
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let json = |command: &mut Command| -> Value {
        let done = done(command.args(["-o", "json"]));
        assert_eq!(done.code, 0, "{}{}", done.out, done.err);
        serde_json::from_str(&done.out).unwrap()
    };
    let mut listed = json(&mut on_node(&net, &["list"]));
    let source = listed["source"].take();
    assert!(source.as_str().unwrap().starts_with("nftproxy on 127.0.0.1:10249 ("), "{source}");
    let mut given: Value =
        serde_json::from_str(&beside(&net, &["list", "-o", "json"]).out).unwrap();
    given["source"].take();
    assert_eq!(listed, given);
    assert_eq!(listed["kernel"], "asked");
    // Its settings as well: without them, nobody would be known to be a pod.
    let explained = json(&mut on_node(&net, &["explain", "10.96.0.10:80", "--from", "10.244.1.6"]));
    assert_eq!(explained["service"]["service"], "default/web");
    assert_eq!(explained["tables"], "what the kernel holds");
    assert_eq!(explained["notes"], Value::Array(Vec::new()));
    let diff = done(&mut on_node(&net, &["diff"]));
    assert_eq!(diff.code, 0, "{}", diff.out);
    let check = done(&mut on_node(&net, &["check"]));
    assert!(check.out.contains("3 Services from nftproxy on 127.0.0.1:10249"), "{}", check.out);
}

#[test]
fn batches_are_told_with_their_causes_as_they_happen() {
    let Some(net) = Net::new() else { return };
    net.write("all.yaml", &example());
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let mut child = on_node(&net, &["events", "-o", "json"])
        .env_remove("RUST_LOG")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut batch = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    let first = batch();
    assert_eq!((&first["number"], &first["cause"]), (&1.into(), &"sync".into()));
    assert!(first["operations"].as_u64().unwrap() > 100, "{first}");
    net.write("more.yaml", &slice("dns", "more", &[("dns", "UDP", 53)], &["10.244.1.9"]));
    let change = batch();
    assert_eq!(change["cause"], "change", "{change}");
    assert_eq!(change["objects"], serde_json::json!(["Service default/dns"]));
    let added = change["changes"].as_array().unwrap().iter();
    let added: Vec<_> = added.filter(|c| c.as_str().unwrap().contains("10.244.1.9")).collect();
    assert_eq!(added.len(), 1, "{change}");
    assert!(added[0].as_str().unwrap().starts_with("+ add element ip nftproxy endpoints"));
    assert!(change["event_to_kernel_ms"].as_f64().unwrap() > 0.0);
    let element = "{ 10.96.0.10 . tcp . 80 . 0 }";
    nft(&net, &["delete", "element", "ip", "nftproxy", "endpoints", element]);
    let mut repair = batch();
    while repair["cause"] == "collection" {
        repair = batch();
    }
    assert_eq!(repair["cause"], "repair", "{repair}");
    assert!(repair["author"].as_str().unwrap().starts_with("nft (process "), "{repair}");
    assert_eq!(repair["objects"], serde_json::json!(["Service default/web"]));
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    child.wait().unwrap();
    // The page answers at once when there is something new, and in time when not.
    let newest = value(&net, "/debug/recent")["newest"].as_u64().unwrap();
    let waited = value(&net, &format!("/debug/recent?after={newest}&wait=1"));
    assert_eq!(waited["batches"], Value::Array(Vec::new()));
    let text = done(&mut on_node(&net, &["watch", "--no-follow", "--last", "100"]));
    assert_eq!(text.code, 0, "{}", text.err);
    for words in ["sync\n", "change: Service default/dns\n", "repair after nft (process "] {
        assert!(text.out.contains(words), "{words:?} is not in {}", text.out);
    }
}

/// Elements that are open, by name; panics at markup that does not fit together.
fn outline(html: &str) -> BTreeMap<String, usize> {
    let mut open = Vec::new();
    let mut seen = BTreeMap::new();
    let mut rest = html.trim_start_matches("<!doctype html>");
    while let Some(at) = rest.find('<') {
        assert!(!rest[..at].contains('>'), "a lone >: {}", &rest[..at]);
        let end = rest.find('>').expect("a tag ends");
        let tag = &rest[at + 1..end];
        assert!(!tag.contains('<'), "a tag in a tag: {tag}");
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name), "closed before {}", rest.trim());
            continue;
        }
        let name = tag.split_whitespace().next().unwrap().to_owned();
        *seen.entry(name.clone()).or_default() += 1;
        if name == "style" {
            rest = &rest[rest.find("</style>").unwrap()..];
        }
        if !["meta", "input", "br"].contains(&name.as_str()) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "left open: {open:?}");
    seen
}

#[test]
fn the_status_page_says_what_there_is_and_markup_stays_text() {
    let Some(net) = Net::new() else { return };
    let many: String = (0..250)
        .map(|n| {
            let ip = format!("10.97.0.{n}");
            Svc {
                name: &format!("many-{n:03}"),
                cluster_ips: &[&ip],
                ports: &[("", "TCP", 80, 0)],
                spec: &[],
                balancer_ips: &[],
            }
            .yaml()
        })
        .collect();
    net.write("all.yaml", &(example() + &many));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    // Of all that is shown, nobody checks the names of processes.
    let named = net.dir.path().join("<i>nft<");
    fs::copy("/usr/sbin/nft", &named).unwrap();
    let command = ["netns", "exec", &net.name("node"), named.to_str().unwrap()];
    let delete = "delete element ip nftproxy endpoints { 10.96.0.10 . tcp . 80 . 0 }";
    assert!(Command::new("ip").args(command).arg(delete).status().unwrap().success());
    let asked = |query: &str| {
        let text = format!("GET /{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n");
        let page = request(&net, "node", inside(), &text).unwrap();
        assert_eq!(page.code, 200, "{}", page.body);
        assert_eq!(page.headers["content-type"], "text/html; charset=utf-8");
        let policy = &page.headers["content-security-policy"];
        assert!(policy.starts_with("default-src 'none'"), "{policy}");
        let seen = outline(&page.body);
        for word in ["script", "img", "link", "iframe", "object"] {
            assert!(!seen.contains_key(word), "{word}: {}", page.body);
        }
        for words in ["src=", "http:", "https:", "url(", "@import"] {
            assert!(!page.body.contains(words), "{words}: {}", page.body);
        }
        page.body
    };
    wait_until("the repair", || asked("").contains("repair after"));
    let whole = asked("");
    for words in [
        "nftproxy on node-1",
        "default/dns:dns",
        "10.244.1.6:53",
        "nobody answers",
        ">healthy<",
        "<b class=\"attention\">&#60;i&#62;nft&#60; (process ",
        "clusterCIDR",
        "1 to 200 of 256",
        "page 1 of 2",
        "?page=2#services",
    ] {
        assert!(whole.contains(words), "{words:?} is not in {whole}");
    }
    let found = asked("?q=dns");
    assert!(found.contains("default/dns") && !found.contains("default/web:"), "{found}");
    assert!(found.contains("1 to 1 of 1 found among 256"), "{found}");
    let searched = asked("?q=%22%3E%3Cscript%3Ealert(1)%3C/script%3E&page=-1");
    assert!(searched.contains("None of 256"), "{searched}");
    assert!(
        searched.contains("value=\"&#34;&#62;&#60;script&#62;alert(1)&#60;/script&#62;\""),
        "{searched}"
    );
    let last = asked("?page=99");
    assert!(last.contains("201 to 256 of 256") && last.contains("page 2 of 2"), "{last}");
}

/// Everything in an archive, by name without its directory.
fn unpacked(bytes: &[u8]) -> BTreeMap<String, String> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(bytes));
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().into_owned();
        let mut parts = path.components();
        parts.next();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        (parts.as_path().display().to_string(), text)
    });
    entries.collect()
}

#[test]
fn a_bundle_holds_what_is_needed() {
    let Some(net) = Net::new() else { return };
    net.write("all.yaml", &example());
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let file = net.dir.path().join("bundle.tar.gz");
    let written = done(on_node(&net, &["bundle", "--output"]).arg(&file));
    assert_eq!((written.code, written.err.as_str()), (0, ""), "{}", written.out);
    assert!(written.out.starts_with(&format!("wrote {} (", file.display())), "{}", written.out);
    assert_eq!(written.out.lines().count(), 1, "nothing is missing: {}", written.out);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let files = unpacked(&fs::read(&file).unwrap());
    for (name, words) in [
        ("version.txt", "kernel "),
        ("config.txt", "clusterCIDR"),
        ("check.txt", "3 Services from nftproxy on"),
        ("list.txt", "default/web:http"),
        ("list.json", "\"kernel\": \"asked\""),
        ("kernel.nft", "table ip6 nftproxy {"),
        ("diff.txt", "the kernel's tables are what is wanted"),
        ("sysctls.txt", "net.ipv4.ip_forward = 1\n"),
        ("daemon/recent.json", "\"cause\":\"sync\""),
        ("daemon/ruleset.nft", "table ip nftproxy {"),
        ("daemon/services.json", "default/dns"),
        ("daemon/status.html", "nftproxy on node-1"),
        ("daemon/metrics.txt", "nftproxy_services 3"),
        ("daemon/log.txt", " synced services=3 "),
    ] {
        let text = files.get(name).unwrap_or_else(|| panic!("{name} is not in {:?}", files.keys()));
        assert!(text.contains(words), "{words:?} is not in {name}: {text}");
    }
    assert_eq!(files.len(), 14, "{:?}", files.keys());
    // As we write them from the kernel, the tables are as the daemon wants them.
    assert_eq!(files["kernel.nft"].trim(), files["daemon/ruleset.nft"].trim());
    let again = done(on_node(&net, &["bundle", "--output"]).arg(&file));
    again.failed_saying(&["bundle.tar.gz", "exists"]);
}

#[test]
fn no_credential_is_in_a_bundle() {
    let dir = tempfile::tempdir().unwrap();
    let secrets = ["tokenT0k3nT0k3n", "passw0rdPassw0rd", "a2V5ZGF0YWtleWRhdGE", "userU53r"];
    let [token, password, key, user] = secrets;
    let kubeconfig = |more: &str| {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             clusters: [{{ name: c, cluster: {{ server: \"http://127.0.0.1:1\" }} }}]\n\
             contexts: [{{ name: c, context: {{ cluster: c, user: u }} }}]\nusers:\n- name: u\n  user:\n    \
             token: {token}{more}\n    username: {user}\n    password: {password}\n"
        )
    };
    let bundle = |name: &str, more: &[&str]| {
        let output = Command::new(PROGRAM)
            .args([
                "bundle",
                "--output",
                "-",
                "--hostname-override",
                "node-1",
                "--kubeconfig",
                name,
            ])
            .args(more)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        let files = unpacked(&output.stdout);
        assert!(files.contains_key("missing.txt"), "{:?}", files.keys());
        for (file, text) in files {
            for secret in secrets {
                assert!(!text.contains(secret), "{secret} is in {file}: {text}");
            }
        }
    };
    // One that nobody answers to, one with a key that is none, and one that is no YAML.
    let no_key = format!("\n    client-key-data: {key}");
    for (name, more) in [("silent", ""), ("no-key", no_key.as_str()), ("broken", ": [ {")] {
        let path = dir.path().join(name);
        fs::write(&path, kubeconfig(more)).unwrap();
        bundle(path.to_str().unwrap(), &[]);
        let master = format!("http://{user}:{password}@127.0.0.1:1");
        if name == "broken" {
            bundle(path.to_str().unwrap(), &["--master", &master]);
        }
    }
}

#[test]
fn the_plugin_of_kubectl_runs_commands_in_the_pod_of_a_node() {
    let dir = tempfile::tempdir().unwrap();
    let fake = dir.path().join("kubectl");
    // Says what it was asked, and that worker-1 has a pod that goes and one that stays.
    let script = "#!/bin/sh\n\
        case \" $* \" in\n\
        *' get pods '*spec.nodeName=worker-1,*) printf '2026-01-01T00:00:00Z nftproxy-old\\n nftproxy-new\\n' ;;\n\
        *' get pods '*) ;;\n\
        *' exec '*) for word; do echo \"$word\"; done; exit 7 ;;\n\
        esac\n";
    fs::write(&fake, script).unwrap();
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
    let plugin = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubectl-nftproxy");
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let asked = |arguments: &[&str]| {
        // dash is the plainest shell there is; the plugin must not need more.
        done(Command::new("sh").arg(&plugin).args(arguments).env("PATH", &path))
    };
    let words = ["--node", "worker-1", "explain", "10.96.0.10:80", "--from", "a b"];
    let explained = asked(&words);
    assert_eq!((explained.code, explained.err.as_str()), (7, ""), "the command's own code");
    let told = "--namespace=kube-system\nexec\nnftproxy-new\n--container=nftproxy\n--\n/nftproxy\nexplain\n10.96.0.10:80\n--from\na b\n";
    assert_eq!(explained.out, told);
    let elsewhere =
        ["--context=c d", "--namespace", "net", "--node=worker-1", "list", "--node", "x"];
    let told = "--context=c d\n--namespace=net\nexec\nnftproxy-new\n--container=nftproxy\n--\n/nftproxy\nlist\n--node\nx\n";
    assert_eq!(asked(&elsewhere).out, told);
    for (arguments, words) in [
        (&["--node", "worker-2", "list"][..], "no pod of nftproxy runs on node worker-2"),
        (&["list"], "which node?"),
        (&["--node", "worker-1"], "which command?"),
        (&["--node"], "--node needs a value"),
        (&["--wrong", "list"], "unknown option --wrong"),
    ] {
        let failed = asked(arguments);
        assert_eq!((failed.code, failed.out.as_str()), (2, ""), "{arguments:?}");
        assert!(failed.err.contains(words), "{words:?} is not in {}", failed.err);
    }
    assert!(asked(&["--help"]).out.starts_with("Usage: kubectl nftproxy --node NODE"));
    if done(Command::new("sh").args(["-c", "command -v shellcheck"])).code != 0 {
        eprintln!("shellcheck is not installed; the plugin was not looked at by it");
        return;
    }
    let checked = done(Command::new("shellcheck").arg(&plugin));
    assert_eq!(checked.code, 0, "{}", checked.out);
}
