//! Further features of Services at the packet: session affinity, source ranges, where node ports are
//! served, how pods are told from others, and the schedulers. The
//! numbers are rows of [`crate::scenario`], where what the table says is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use ipnet::IpNet;

use crate::namespace::nft;
use crate::net::{
    CLIENT, Daemon, GATEWAY, NODE, NODE_SECOND, Net, POD_B, REMOTE_GATEWAY, in_netns, wait_until,
};
use crate::objects::{CLUSTER, Svc, addresses, slice};
use crate::packets::{CIDRS, HTTP, answered, many, one, run, to};
use crate::serve::{Outcome, udp};

/// A Service in both families with every kind of frontend.
const WEB: Svc<'_> = Svc {
    name: "web",
    cluster_ips: &["10.96.0.10", "fd00:10:96::10"],
    ports: &[("http", "TCP", 80, 30080)],
    spec: &[],
    balancer_ips: &["203.0.113.7", "fd00:203::7"],
};
const EXTERNAL: &str = "externalIPs: [198.51.100.7, \"fd00:198::7\"]";

/// Every endpoint of a list in both families, each as `a`, `b` or `remote`.
fn endpoints(who: &[&str]) -> String {
    slice("web", "4", &HTTP, &addresses(who, 0)) + &slice("web", "6", &HTTP, &addresses(who, 1))
}

fn frontends(family: usize) -> [SocketAddr; 4] {
    [
        to(["10.96.0.10", "fd00:10:96::10"][family], 80),
        to(NODE[family], 30080),
        to(["203.0.113.7", "fd00:203::7"][family], 80),
        to(["198.51.100.7", "fd00:198::7"][family], 80),
    ]
}

fn by(outcome: Outcome) -> String {
    match outcome {
        Outcome::Answered { by, .. } => by,
        other => format!("{other:?}"),
    }
}

/// Who answered over many connections to several frontends.
fn who(net: &Net, from: &str, to: &[SocketAddr]) -> BTreeSet<String> {
    (0..12).flat_map(|_| to.iter().map(|to| by(one(net, from, *to)))).collect()
}

fn only(who: BTreeSet<String>) -> String {
    assert_eq!(who.len(), 1, "{who:?}");
    who.into_iter().next().unwrap()
}

#[test]
fn a_client_keeps_its_endpoint_over_all_frontends_of_a_port() {
    let Some(net) = Net::new() else { return };
    let spec = [EXTERNAL, "sessionAffinity: ClientIP"];
    let objects =
        |who: &[&str]| CLUSTER.to_owned() + &Svc { spec: &spec, ..WEB }.yaml() + &endpoints(who);
    net.write("web.yaml", &objects(&["a", "b", "remote"]));
    let mut daemon = run(&net, &["--cluster-cidr", CIDRS]);
    for family in [0, 1] {
        let frontends = frontends(family);
        let mut kept = BTreeMap::new();
        for from in ["client", "b", "node"] {
            // 103, 104: the first choice holds for every frontend.
            kept.insert(from, only(who(&net, from, &frontends)));
        }
        let still = |net: &Net| {
            for (from, kept) in &kept {
                assert_eq!(only(who(net, from, &frontends)), *kept, "{from}");
            }
        };
        // 108: a restart keeps it, and so do endpoints that come and go beside it.
        daemon.kill9();
        daemon = run(&net, &["--cluster-cidr", CIDRS]);
        still(&net);
        let chosen = kept["client"].clone();
        let other = ["a", "b", "remote"].into_iter().find(|name| *name != chosen).unwrap();
        net.write("web.yaml", &objects(&[&chosen, other]));
        wait_until("the third endpoint to go", || {
            let listed = list(&net, family, "endpoints");
            !listed.contains(". 2 :")
        });
        assert_eq!(only(who(&net, "client", &frontends)), chosen);
        // 107: when the endpoint goes, its clients choose anew, and keep that.
        net.write("web.yaml", &objects(&[other]));
        wait_until("the endpoint to go", || by(one(&net, "client", frontends[0])) == other);
        net.write("web.yaml", &objects(&["a", "b", "remote"]));
        wait_until("it to come back", || list(&net, family, "endpoints").contains(". 2 :"));
        assert_eq!(only(who(&net, "client", &frontends)), other);
    }
}

/// Of one priority the last comer is first, and a connection whose source is decided passes no further
/// nat chain.
#[test]
fn a_plugin_that_masquerades_takes_nobody_from_the_endpoint_it_had() {
    let Some(net) = Net::new() else { return };
    let spec = [EXTERNAL, "sessionAffinity: ClientIP"];
    let web = Svc { spec: &spec, ..WEB };
    net.write("web.yaml", &(CLUSTER.to_owned() + &web.yaml() + &endpoints(&["a", "b", "remote"])));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    for (family, table) in ["ip", "ip6"].into_iter().enumerate() {
        let plugin = format!(
            "add table {table} plugin
             add chain {table} plugin post {{ type nat hook postrouting priority 100; policy accept; }}
             add chain {table} plugin in {{ type nat hook input priority 100; policy accept; }}
             add rule {table} plugin post {table} saddr {} masquerade",
            CLIENT[family]
        );
        in_netns(&net.name("node"), || nft(&["-f", "-"], &plugin));
        only(who(&net, "client", &frontends(family)));
    }
}

/// A set or map of the node's table as nft shows it.
fn list(net: &Net, family: usize, map: &str) -> String {
    let family = ["ip", "ip6"][family];
    in_netns(&net.name("node"), || nft(&["list", "map", family, "nftproxy", map], ""))
}

#[test]
fn affinity_ends_with_its_timeout_and_is_renewed_by_use() {
    let Some(net) = Net::new() else { return };
    let spec =
        ["sessionAffinity: ClientIP", "sessionAffinityConfig: { clientIP: { timeoutSeconds: 2 } }"];
    let web = CLUSTER.to_owned() + &Svc { spec: &spec, ..WEB }.yaml();
    net.write("web.yaml", &(web + &endpoints(&["a", "b", "remote"])));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let vip = frontends(0)[0];
    // Used every half second, it lasts longer than two seconds.
    let mut seen = BTreeSet::new();
    for _ in 0..8 {
        seen.insert(by(one(&net, "client", vip)));
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
    only(seen);
    // 109: left alone for longer, the choice is made anew.
    let before = by(one(&net, "client", vip));
    wait_until("another endpoint to be chosen", || {
        wait_until("the entry to time out", || {
            !list(&net, 0, "affinity/default/web/tcp/http").contains("192.0.2.2")
        });
        by(one(&net, "client", vip)) != before
    });
}

#[test]
fn affinity_under_local_policies_and_for_endpoints_on_the_node_itself() {
    let Some(net) = Net::new() else { return };
    let spec = [
        EXTERNAL,
        "sessionAffinity: ClientIP",
        "externalTrafficPolicy: Local",
        "healthCheckNodePort: 32000",
    ];
    let objects =
        |who: &[&str]| CLUSTER.to_owned() + &Svc { spec: &spec, ..WEB }.yaml() + &endpoints(who);
    net.write("web.yaml", &objects(&["a", "b", "remote"]));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    for family in [0, 1] {
        let [vip, outside @ ..] = frontends(family);
        // Clients from outside are held to one endpoint of this node.
        let chosen = only(who(&net, "client", &outside));
        assert!(["a", "b"].contains(&chosen.as_str()), "{chosen}");
        // Pods are held to one of any node.
        only(who(&net, "b", &[vip, outside[0], outside[1], outside[2]]));
    }
    net.write("web.yaml", &objects(&["host", "a", "b", "remote"]));
    wait_until("the host to be chosen by somebody", || {
        // Forgotten by hand, so that the choice is made again.
        in_netns(&net.name("node"), || {
            nft(&["flush", "map", "ip", "nftproxy", "affinity/default/web/tcp/http"], "")
        });
        by(one(&net, "client", frontends(0)[0])) == "host"
    });
    assert_eq!(only(who(&net, "client", &frontends(0)[..1])), "host");
}

/// An address of the node, an external or a load balancer's one, has a port of a Service of the number that
/// is another one's node port. With and without affinity of the first, whose endpoint is none of the other's.
#[test]
fn a_client_of_an_address_is_not_taken_for_one_of_a_node_port_of_the_same_number() {
    let Some(net) = Net::new() else { return };
    let sticky = "sessionAffinity: ClientIP";
    let external = format!("externalIPs: [{:?}, {:?}]", NODE[0], NODE[1]);
    let service = |name, last, spec: &[&str], balancer_ips: &[&str], port, node_port| {
        let vips = [format!("10.96.0.{last}"), format!("fd00:10:96::{last}")];
        let vips = [&*vips[0], &*vips[1]];
        let ports = [("http", "TCP", port, node_port)];
        Svc { name, cluster_ips: &vips, ports: &ports, spec, balancer_ips }.yaml()
    };
    let vips = ["10.96.0.21", "fd00:10:96::21"];
    let balancers = ["203.0.113.7", "fd00:203::7"];
    let second = [NODE_SECOND, GATEWAY[1]];
    let all = "nodePortAddresses: [\"0.0.0.0/0\", \"::/0\"]\n";
    let both = format!(
        "nodePortAddresses: [\"192.0.2.8/29\", \"{}/128\", \"{}/128\"]\n",
        NODE[1], second[1]
    );
    let cases: [(_, &[&str], &[&str]); 5] = [
        (vips, &[], &[]),
        (NODE, &[&external], &[]),
        (NODE, &[&external, sticky], &[]),
        (balancers, &[], &balancers),
        (balancers, &[sticky], &balancers),
    ];
    for (config, (addresses, spec, balancer_ips)) in
        [all, &both].into_iter().flat_map(|config| cases.map(|case| (config, case)))
    {
        let objects = [
            CLUSTER.to_owned(),
            service("by-address", 21, spec, balancer_ips, 30081, 0),
            slice("by-address", "4", &HTTP, &["10.244.1.5!"]),
            slice("by-address", "6", &HTTP, &["fd00:10:244:1::5!"]),
            service("by-node-port", 22, &[sticky], &[], 80, 30081),
            slice("by-node-port", "4", &HTTP, &["10.244.1.6!"]),
            slice("by-node-port", "6", &HTTP, &["fd00:10:244:1::6!"]),
        ];
        net.write("web.yaml", &objects.concat());
        let daemon = configured(&net, config);
        for family in [0, 1] {
            let what = format!("{} {spec:?} {config}", addresses[family]);
            assert_eq!(by(one(&net, "client", to(addresses[family], 30081))), "a", "{what}");
            let node_port = to(second[family], 30081);
            assert_eq!(by(one(&net, "client", node_port)), "b", "{what}");
            // Those of the node port are remembered.
            let map = "affinity/default/by-node-port/tcp/http";
            assert!(list(&net, family, map).contains(CLIENT[family]), "{what}");
            assert_eq!(by(one(&net, "client", node_port)), "b", "{what}");
        }
        daemon.terminate();
        // With whom it remembers.
        for table in ["ip", "ip6"] {
            in_netns(&net.name("node"), || nft(&["delete", "table", table, "nftproxy"], ""));
        }
    }
}

#[test]
fn an_address_with_nobody_here_is_not_taken_for_a_node_port_of_the_same_number() {
    let Some(net) = Net::new() else { return };
    let external = format!("externalIPs: [{:?}]", NODE[0]);
    let by_address = Svc {
        name: "by-address",
        cluster_ips: &["10.96.0.21"],
        ports: &[("http", "TCP", 30081, 30082)],
        spec: &[&external, "externalTrafficPolicy: Local"],
        balancer_ips: &[],
    };
    let by_node_port = Svc {
        name: "by-node-port",
        cluster_ips: &["10.96.0.22"],
        ports: &[("http", "TCP", 80, 30081)],
        spec: &[],
        balancer_ips: &[],
    };
    let objects = [
        CLUSTER.to_owned(),
        by_address.yaml(),
        slice("by-address", "4", &HTTP, &["10.244.2.9"]),
        by_node_port.yaml(),
        slice("by-node-port", "4", &HTTP, &["10.244.1.6!"]),
    ];
    net.write("web.yaml", &objects.concat());
    let _daemon = configured(&net, "nodePortAddresses: [0.0.0.0/0]\n");
    assert_eq!(by(one(&net, "client", to(NODE_SECOND, 30081))), "b");
    assert_eq!(one(&net, "client", to(NODE[0], 30081)), Outcome::TimedOut);
}

#[test]
fn a_full_affinity_map_lets_new_clients_through() {
    let Some(net) = Net::new() else { return };
    let spec = ["sessionAffinity: ClientIP"];
    let web = CLUSTER.to_owned() + &Svc { spec: &spec, ..WEB }.yaml();
    net.write("web.yaml", &(web + &endpoints(&["a", "b"])));
    let daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let vip = frontends(0)[0];
    in_netns(&net.name("node"), || {
        let clients: Vec<_> = (0..65_535_u32)
            .map(|n| format!("{} : 10.244.1.5 . 8080", std::net::Ipv4Addr::from(n + 0x0b00_0000)))
            .collect();
        let text = clients.join(",\n");
        let map = "add element ip nftproxy affinity/default/web/tcp/http";
        nft(&["-f", "-"], &format!("{map} {{ {text} }}"));
    });
    let seen = who(&net, "client", &[vip, vip]);
    assert_eq!(seen, BTreeSet::from(["a".to_owned(), "b".to_owned()]));
    // Clients of an endpoint that leaves are forgotten, however many they are.
    let web = CLUSTER.to_owned() + &Svc { spec: &spec, ..WEB }.yaml();
    net.write("web.yaml", &(web + &endpoints(&["b"])));
    wait_until("the clients to be forgotten", || {
        !list(&net, 0, "affinity/default/web/tcp/http").contains("11.0.0.1")
    });
    assert_eq!(only(who(&net, "client", &[vip])), "b");
    drop(daemon);
}

fn guarded(ranges: &str, spec: &[&str], who: &[&str]) -> String {
    let ranges = format!("loadBalancerSourceRanges: [{ranges}]");
    let spec: Vec<&str> = spec.iter().copied().chain([ranges.as_str()]).collect();
    CLUSTER.to_owned() + &Svc { spec: &spec, ..WEB }.yaml() + &endpoints(who)
}

#[test]
fn a_thousand_ranges_on_one_service_and_many_services_with_some() {
    let Some(net) = Net::new() else { return };
    let ranges: Vec<String> =
        (0..1000).map(|n| format!("172.{}.{}.0/24", 16 + n / 250, n % 250)).collect();
    let mut all = guarded(&(ranges.join(", ") + ", 192.0.2.2/32"), &[], &["a"]);
    for service in 0..200 {
        let ranges: Vec<String> = (0..20).map(|n| format!("10.{service}.{n}.0/24")).collect();
        let ranges = format!("loadBalancerSourceRanges: [{}]", ranges.join(", "));
        let (name, vip) = (format!("web-{service}"), format!("10.96.1.{service}"));
        let balancer = format!("203.0.113.{}", 20 + service);
        let svc = Svc {
            name: &name,
            cluster_ips: &[&vip],
            spec: &[&ranges],
            balancer_ips: &[&balancer],
            ports: &[("http", "TCP", 80, 0)],
        };
        all += &svc.yaml();
        all += &slice(&name, "4", &HTTP, &["10.244.1.5!"]);
    }
    net.write("web.yaml", &all);
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let balancer = frontends(0)[2];
    assert_eq!(one(&net, "client", balancer), answered("a", 8080, GATEWAY[0]));
    assert_eq!(one(&net, "b", balancer), Outcome::TimedOut);
    // The pod 10.244.1.6 is in none of the ranges of any of the others either.
    assert_eq!(one(&net, "b", to("203.0.113.100", 80)), Outcome::TimedOut);
}

/// The sibling of each prefix that an address is in: together everybody but that address.
fn everybody_but(address: &str) -> String {
    let address: IpAddr = address.parse().unwrap();
    let longest = IpNet::from(address).max_prefix_len();
    let sibling = |length: u8| {
        let mut above = IpNet::new(address, length - 1).unwrap().subnets(length).unwrap();
        format!("\"{}\"", above.find(|half| !half.contains(&address)).unwrap())
    };
    (1..=longest).map(sibling).collect::<Vec<_>>().join(", ")
}

#[test]
fn ranges_of_every_length_that_there_is() {
    let Some(net) = Net::new() else { return };
    // The client has an address beside it in the same range of every other length.
    let ranges = everybody_but("192.0.2.2") + ", " + &everybody_but("fd00:192::2");
    net.write("web.yaml", &guarded(&ranges, &[], &["a"]));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    for family in [0, 1] {
        let balancer = frontends(family)[2];
        assert_eq!(one(&net, "client", balancer), Outcome::TimedOut);
        assert_eq!(one(&net, "b", balancer), answered("a", 8080, GATEWAY[family]));
        assert_eq!(one(&net, "node", balancer), answered("a", 8080, GATEWAY[family]));
    }
    let lengths = in_netns(&net.name("node"), || {
        nft(&["list", "set", "ip", "nftproxy", "source-ranges"], "")
    });
    assert!(lengths.contains("0.0.0.0 . 127.255.255.255"), "{lengths}");
    assert!(lengths.contains("192.0.2.3 . 192.0.2.3"), "{lengths}");
}

/// Runs with a configuration file that has these further lines.
fn configured(net: &Net, lines: &str) -> Daemon {
    let config = net.dir.path().join("config.conf");
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    std::fs::write(&config, format!("{head}{lines}")).unwrap();
    run(net, &["--config", config.to_str().unwrap()])
}

fn ip_command(net: &Net, arguments: &str) {
    let mut command = Command::new("ip");
    command.args(["-n", &net.name("node")]).args(arguments.split(' '));
    assert!(command.status().unwrap().success(), "ip {arguments}");
}

#[test]
fn node_ports_are_served_where_the_configuration_says() {
    let Some(net) = Net::new() else { return };
    let web = |spec| CLUSTER.to_owned() + &Svc { spec, ..WEB }.yaml();
    net.write("web.yaml", &(web(&[]) + &endpoints(&["a"])));
    let second = to(NODE_SECOND, 30080);
    let yes = |family: usize| answered("a", 8080, GATEWAY[family]);
    // 52: all addresses of IPv4. IPv6, without a range, likewise.
    let daemon = configured(&net, "nodePortAddresses: [0.0.0.0/0]\n");
    for from in ["client", "b"] {
        assert_eq!(one(&net, from, second), yes(0));
        assert_eq!(one(&net, from, to(NODE[0], 30080)), yes(0));
        assert_eq!(one(&net, from, to(NODE[1], 30080)), yes(1));
        assert_eq!(one(&net, from, to(GATEWAY[0], 30080)), yes(0));
    }
    // 54: never loopback.
    assert_eq!(one(&net, "node", to("127.0.0.1", 30080)), Outcome::Refused);
    assert_eq!(one(&net, "node", to("::1", 30080)), Outcome::Refused);
    assert_eq!(one(&net, "node", second), yes(0));
    daemon.terminate();
    // 53: one range. An address of it that comes later is served as soon as it is there.
    let daemon = configured(&net, "nodePortAddresses: [192.0.2.11/32, 192.0.2.64/26]\n");
    assert_eq!(one(&net, "client", second), yes(0));
    assert_eq!(one(&net, "client", to(NODE[0], 30080)), Outcome::Refused);
    ip_command(&net, "addr add 192.0.2.77/24 dev eth0");
    let added = to("192.0.2.77", 30080);
    wait_until("the new address to be served", || one(&net, "client", added) == yes(0));
    // Nobody is there to answer: refused where node ports are served, left alone elsewhere.
    net.write("web.yaml", &web(&[]));
    wait_until("nobody to be left", || one(&net, "client", added) == Outcome::Refused);
    net.write("web.yaml", &(web(&[]) + &endpoints(&["a"])));
    wait_until("somebody to be there", || one(&net, "client", added) == yes(0));
    ip_command(&net, "addr del 192.0.2.77/24 dev eth0");
    wait_until("the address to be left", || {
        let listed = in_netns(&net.name("node"), || {
            nft(&["list", "set", "ip", "nftproxy", "nodeport-ips"], "")
        });
        !listed.contains("192.0.2.77")
    });
    daemon.terminate();
    // Affinity holds on all addresses, too.
    let sticky = Svc { spec: &["sessionAffinity: ClientIP"], ..WEB };
    let sticky = CLUSTER.to_owned() + &sticky.yaml() + &endpoints(&["a", "b", "remote"]);
    net.write("web.yaml", &sticky);
    let _daemon = configured(&net, "nodePortAddresses: [0.0.0.0/0, \"::/0\"]\n");
    for family in [0, 1] {
        let there = [to(NODE[family], 30080), to(GATEWAY[family], 30080), frontends(family)[0]];
        only(who(&net, "client", &there));
    }
}

/// The comment of the rules that keep others from loopback addresses.
const GUARD: &str = "loopback is for this host alone";

#[test]
fn node_ports_on_loopback_are_opt_in_and_for_the_node_alone() {
    let Some(net) = Net::new() else { return };
    let web = CLUSTER.to_owned() + &WEB.yaml();
    net.write("web.yaml", &(web.clone() + &endpoints(&["a", "remote", "host"])));
    let daemon = run(&net, &["--cluster-cidr", CIDRS, "--localhost-node-ports"]);
    let loopback = to("127.0.0.1", 30080);
    let seen: BTreeSet<Outcome> = many(&net, "node", loopback).into_keys().collect();
    let all = [("a", GATEWAY[0]), ("remote", REMOTE_GATEWAY[0]), ("host", NODE[0])]
        .map(|(by, seen)| answered(by, 8080, seen));
    assert_eq!(seen, all.into());
    assert_eq!(one(&net, "node", to("127.0.0.1", 8080)), answered("host", 8080, "127.0.0.1"));
    // What is routed now is still for the node alone: neither its own ports nor node ports.
    let route = |arguments: &str| {
        let mut command = Command::new("ip");
        command.args(["-n", &net.name("client")]).args(arguments.split(' '));
        assert!(command.status().unwrap().success(), "ip {arguments}");
    };
    in_netns(&net.name("client"), || {
        std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1").unwrap();
    });
    route("route del local 127.0.0.0/8 dev lo table local");
    route("route del local 127.0.0.1 dev lo table local");
    route("route add 127.0.0.0/8 via 192.0.2.10 src 192.0.2.2");
    assert_eq!(one(&net, "client", to("127.0.0.1", 8080)), Outcome::TimedOut);
    // Nobody is left: refused, as on any other address.
    net.write("web.yaml", &web);
    wait_until("nobody to be left", || one(&net, "node", loopback) == Outcome::Refused);
    daemon.terminate();
    // Without the flag nothing is served there; while the kernel routes it, others are kept from it.
    net.write("web.yaml", &(web + &endpoints(&["a"])));
    let guarded = || in_netns(&net.name("node"), || nft(&["list", "ruleset"], "")).contains(GUARD);
    let daemon = run(&net, &["--cluster-cidr", CIDRS]);
    daemon.wait_for("net.ipv4.conf.all.route_localnet is still 1");
    assert_eq!(one(&net, "node", loopback), Outcome::Refused);
    assert_eq!(one(&net, "client", to("127.0.0.1", 8080)), Outcome::TimedOut);
    assert!(guarded());
    daemon.terminate();
    let mut cleanup = Command::new(env!("CARGO_BIN_EXE_nftproxy"));
    let cleanup = in_netns(&net.name("node"), || cleanup.arg("cleanup").output().unwrap());
    let said = String::from_utf8_lossy(&cleanup.stderr).into_owned();
    assert!(said.contains("route_localnet is still 1"), "{said}");
    run(&net, &["--cluster-cidr", CIDRS, "--localhost-node-ports"]).terminate();
    assert!(guarded());
    // Where the kernel does not route it, nothing has to be kept off.
    in_netns(&net.name("node"), || {
        std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "0").unwrap();
    });
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    wait_until("the guard to go", || !guarded());
    assert_eq!(one(&net, "client", to("127.0.0.1", 8080)), Outcome::TimedOut);
}

#[test]
fn a_prefix_stands_for_all_names_that_begin_so() {
    let Some(net) = Net::new() else { return };
    let web = CLUSTER.to_owned() + &WEB.yaml();
    net.write("web.yaml", &(web + &endpoints(&["a"])));
    let prefix = "detectLocalMode: InterfaceNamePrefix\ndetectLocal: { interfaceNamePrefix: po }\n";
    let _daemon = configured(&net, prefix);
    assert_eq!(one(&net, "b", frontends(0)[0]), answered("a", 8080, POD_B[0]));
    assert_eq!(one(&net, "client", frontends(0)[0]), answered("a", 8080, GATEWAY[0]));
}

fn scheduled(scheduler: &str, who: &[&str], weights: &str) -> String {
    let annotate = |text: String, key: &str, value: &str, after: &str| {
        text.replace(after, &format!("annotations: {{ nftproxy.dev/{key}: \"{value}\" }}, {after}"))
    };
    let web = annotate(WEB.yaml(), "scheduler", scheduler, "namespace: default }");
    let slices = endpoints(who).replace(
        "  namespace: default\n  labels",
        &format!("  namespace: default\n  annotations: {{ nftproxy.dev/weights: \"{weights}\" }}\n  labels"),
    );
    assert!(web.contains(scheduler) && slices.contains(weights));
    CLUSTER.to_owned() + &web + &slices
}

#[test]
fn schedulers_and_weights_decide_who_answers() {
    let Some(net) = Net::new() else { return };
    let counts = |from: &str, to: SocketAddr| -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for (outcome, count) in many(&net, from, to) {
            *counts.entry(by(outcome)).or_default() += count;
        }
        counts
    };
    let expected = |list: &[(&str, usize)]| -> BTreeMap<String, usize> {
        list.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    };
    net.write("web.yaml", &scheduled("round-robin", &["a", "b", "remote"], ""));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    for family in [0, 1] {
        // In turn: 60 connections are 20 for each.
        for frontend in &frontends(family)[..3] {
            let each = expected(&[("a", 20), ("b", 20), ("remote", 20)]);
            assert_eq!(counts("client", *frontend), each, "{frontend}");
        }
    }
    // By weights: 3 + 1 + 0.
    let weights = "10.244.1.5=3, 10.244.1.6=1, 10.244.2.9=0, fd00:10:244:1::5=0";
    net.write("web.yaml", &scheduled("round-robin", &["a", "b", "remote"], weights));
    let vip = frontends(0)[0];
    wait_until("the weights", || counts("client", vip) == expected(&[("a", 45), ("b", 15)]));
    let six = counts("client", frontends(1)[0]);
    assert_eq!(six, expected(&[("b", 30), ("remote", 30)]));
    // By the source, the same on every frontend.
    for scheduler in ["source-hash", "maglev"] {
        net.write("web.yaml", &scheduled(scheduler, &["a", "b", "remote"], ""));
        let chain = "hash-";
        wait_until("the scheduler to change", || list(&net, 0, "services").contains(chain));
        wait_until("the scheduler to change", || {
            ["client", "remote", "b", "node"].iter().all(|from| who(&net, from, &[vip]).len() == 1)
        });
        for family in [0, 1] {
            let mut chosen = BTreeSet::new();
            for from in ["client", "remote", "a", "b", "node"] {
                let all = who(&net, from, &frontends(family)[..1]);
                // The other frontends have slots of the same numbers.
                if from == "client" {
                    assert_eq!(who(&net, from, &frontends(family)[..3]), all, "{from}");
                }
                chosen.insert(only(all));
            }
            assert!(chosen.len() > 1, "{scheduler}: everybody chose {chosen:?}");
        }
    }
    // Nobody is left: refused. A UDP port is scheduled just the same.
    let drained = "10.244.1.5=0, 10.244.1.6=0, 10.244.2.9=0";
    net.write("web.yaml", &scheduled("maglev", &["a", "b", "remote"], drained));
    wait_until("all to be drained", || one(&net, "client", vip) == Outcome::Refused);
    assert_eq!(udp(&net.name("client"), vip), Outcome::Refused);
}
