//! Other tools that work on the same kernel: what nft lists loads over itself, and firewalld, ufw and iptables
//! that load their own rules again leave ours alone.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::model::{all_listed, example};
use crate::namespace::{in_namespace, nft, skip};
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::reconcile::Proxy;

fn silent(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{command:?}: {said}");
    output
}

/// Programs the example, and hands on what finds out whether it is still in force.
fn with_example(body: impl FnOnce(&mut dyn FnMut()) + Send) {
    in_namespace(|| {
        let mut proxy = Proxy::new(crate::model::state(), NetlinkKernel::open().unwrap());
        for event in example().into_iter().chain(all_listed()) {
            proxy.observe(event);
        }
        proxy.commit().unwrap();
        body(&mut || {
            let plan = proxy.plan().unwrap();
            assert!(plan.is_empty(), "{plan:?}");
        });
    });
}

#[test]
fn what_nft_lists_is_without_errors_and_loads_over_itself() {
    with_example(|is_in_force| {
        // A client that is remembered, as packets would make it, with a time that runs.
        let maps = nft(&["list", "maps"], "");
        let affinity =
            maps.lines().find_map(|line| line.trim().strip_prefix("map affinity/")).unwrap();
        let affinity = format!("affinity/{}", affinity.trim_end_matches(" {"));
        let client = "{ 192.0.2.2 timeout 3h : 10.244.1.9 . 80 }";
        nft(&["add", "element", "ip", "nftproxy", &affinity, client], "");
        for what in
            [&["list", "ruleset"][..], &["-a", "list", "ruleset"], &["-s", "list", "ruleset"]]
        {
            silent(Command::new("nft").args(what));
        }
        // nft 1.0.6 warns that it has no JSON for the statement that remembers a client.
        nft(&["-j", "list", "ruleset"], "");
        for (family, set) in [("ip", "services"), ("ip6", "endpoints")] {
            silent(Command::new("nft").args(["list", "map", family, "nftproxy", set]));
        }
        let listed = nft(&["list", "ruleset"], "");
        assert!(listed.contains("192.0.2.2 timeout 3h expires"), "{listed}");
        let tables = "delete table ip nftproxy\ndelete table ip6 nftproxy\n";
        for before in [tables, "flush ruleset\n"] {
            nft(&["-c", "-f", "-"], &format!("{before}{listed}"));
            nft(&["-f", "-"], &format!("{before}{listed}"));
            is_in_force();
            let again = nft(&["list", "ruleset"], "");
            let without_time = |text: &str| -> Vec<String> {
                text.lines().filter(|line| !line.contains("expires")).map(str::to_owned).collect()
            };
            assert_eq!(without_time(&again), without_time(&listed));
            assert!(again.contains("192.0.2.2 timeout 3h expires"), "{again}");
        }
    });
}

/// Where firewalld and ufw are, unpacked; None, said loudly, where nobody did that.
fn firewalls() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("tools").join("firewalls");
    let there = dir.join("unpacked").exists();
    there.then_some(dir).or_else(|| {
        skip("firewalld and ufw are not there; run `tests/firewalls`");
        None
    })
}

/// Starts firewalld, without the message bus by which it is told what to do: a line makes it load its rules
/// again, and another stop.
const FIREWALLD: &str = r"
import sys
from firewall import config
config.set_default_config_paths(sys.argv[1] + '/usr/lib/firewalld')
config.set_system_config_paths(sys.argv[1] + '/etc/firewalld')
from firewall.core.fw import Firewall
firewall = Firewall()
for step in (firewall.start, firewall.reload, firewall.reload, firewall.stop):
    step()
    print(firewall.get_state(), flush=True)
    sys.stdin.readline()
";

#[test]
fn firewalld_that_starts_reloads_and_stops_leaves_our_tables_alone() {
    let Some(dir) = firewalls() else { return };
    with_example(|is_in_force| {
        let mut firewalld = Command::new("/usr/bin/python3")
            .args(["-c", FIREWALLD])
            .arg(&dir)
            .env("PYTHONPATH", dir.join("usr/lib/python3/dist-packages"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut told = firewalld.stdin.take().unwrap();
        let mut states = BufReader::new(firewalld.stdout.take().unwrap()).lines();
        for (state, there) in
            [("RUNNING", true), ("RUNNING", true), ("RUNNING", true), ("INIT", false)]
        {
            assert_eq!(states.next().expect("it answers").unwrap(), state);
            assert_eq!(nft(&["list", "tables"], "").contains("table inet firewalld"), there);
            is_in_force();
            told.write_all(b"\n").unwrap();
        }
        assert!(firewalld.wait().unwrap().success());
    });
}

#[test]
fn ufw_that_starts_reloads_and_stops_leaves_our_tables_alone() {
    let Some(dir) = firewalls() else { return };
    with_example(|is_in_force| {
        let dir = dir.to_str().unwrap();
        let reload = ("force-reload", "policy drop;");
        for (what, policy) in [("start", reload.1), reload, reload, ("stop", "policy accept;")] {
            let output = Command::new("sh")
                .arg(format!("{dir}/lib/ufw/ufw-init"))
                .args(["--rootdir", dir, "--datadir", dir, what])
                .stdin(Stdio::null())
                .output()
                .unwrap();
            assert!(output.status.success(), "{what}: {output:?}");
            let listed = nft(&["list", "table", "ip", "filter"], "");
            let chain = listed.split_once("chain INPUT {").unwrap().1.split_once('}').unwrap().0;
            assert!(chain.contains(policy), "{what}: {listed}");
            assert!(chain.contains("jump ufw-before-input"), "{what}: {listed}");
            is_in_force();
        }
    });
}

#[test]
fn iptables_whose_chains_are_flushed_leaves_our_tables_alone() {
    with_example(|is_in_force| {
        let before = nft(&["list", "tables"], "");
        for program in ["iptables-nft", "ip6tables-nft"] {
            for arguments in
                [&["-F"][..], &["-X"], &["-P", "FORWARD", "DROP"], &["-t", "nat", "-F"], &["-Z"]]
            {
                let output = Command::new(program).args(arguments).output().unwrap();
                assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
                is_in_force();
            }
        }
        let after = nft(&["list", "tables"], "");
        assert!(before.lines().all(|table| after.contains(table)), "{after}");
    });
}
