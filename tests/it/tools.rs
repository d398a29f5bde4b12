//! Other tools that work on the same kernel: what nft lists loads over itself, and a firewall that loads its
//! own rules again leaves ours alone.

use std::process::{Command, Output, Stdio};

use crate::model::{all_listed, example};
use crate::namespace::{in_namespace, nft};
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

#[test]
fn a_firewall_that_loads_its_rules_again_leaves_ours_alone() {
    with_example(|is_in_force| {
        let before = nft(&["list", "tables"], "");
        // As firewalld: a table of its own, made anew as a whole.
        let firewalld = "table inet firewalld\ndelete table inet firewalld\ntable inet firewalld {\n\
                         chain filter_INPUT { type filter hook input priority filter + 10; policy accept; }\n\
                         chain nat_PREROUTING { type nat hook prerouting priority dstnat + 10; }\n}\n";
        for _ in 0..2 {
            nft(&["-f", "-"], firewalld);
            is_in_force();
        }
        // As ufw: chains of iptables flushed, deleted and restored, and the policies set.
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
