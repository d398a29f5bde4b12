//! Objects and manifests to the ruleset: an object that makes no sense costs nothing but itself.

use std::fs;

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use nftproxy::model::{Event, Problem, Protocol};
use nftproxy::nft::element::{Backend, Key, Value as Element};
use nftproxy::nft::fake::FakeKernel;
use nftproxy::nft::text as nft_text;
use nftproxy::reconcile::Proxy;
use nftproxy::watch::convert;
use nftproxy::watch::manifests::Manifests;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{cases, is_one_line, list, number, object, one_of, text, value};
use crate::model::{all_listed, state};

const SEEDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fuzz/seeds/objects.txt");

const NAMES: &[&str] = &["web", "web", "dns", "a.b", "a_b", "a:b", "0", "UPPER", "drop"];
const NAMESPACES: &[&str] = &["default", "default", "kube-system", "x"];
const PORT_NAMES: &[&str] = &["", "http", "dns", "a-b", "a.b", "a:b", "1"];
const PROTOCOLS: &[&str] = &["TCP", "TCP", "UDP", "SCTP", "", "tcp", "ICMP"];
const ADDRESSES: &[&str] = &[
    "10.96.0.1",
    "10.96.0.2",
    "010.096.000.003",
    "fd00:10:96::1",
    "::ffff:10.96.0.4",
    "203.0.113.1",
    "198.51.100.1",
    "192.0.2.10",
    "10.244.1.5",
    "10.244.2.9",
    "fd00:10:244:1::5",
    "None",
    "0.0.0.0",
    "127.0.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1%eth0",
    "ff02::1",
    "10.0.0.0/8",
];
const RANGES: &[&str] = &[
    "10.0.0.0/8",
    "10.244.0.0/16",
    "192.0.2.0/24",
    "0.0.0.0/0",
    "::/0",
    "fd00::/8",
    "10.1.2.3/32",
    "::ffff:10.0.0.0/104",
    "10.0.0.0/33",
    " 10.2.0.0/16 ",
];

fn metadata(
    labels: &'static [&'static str],
    annotations: &'static [&'static str],
) -> BoxedStrategy<Value> {
    let map = |known: &'static [&'static str]| {
        let names = one_of(known);
        let values = one_of(&[
            "random",
            "round-robin",
            "source-hash",
            "maglev",
            "web",
            "dns",
            "10.244.1.5=3",
            "10.244.1.5=0, 10.244.2.9=65536",
            "=",
            "2026-11-25T10:00:00Z",
            "not-a-time",
        ]);
        value(proptest::collection::btree_map(names, values, 0..3))
    };
    object(vec![
        ("name", value(one_of(NAMES))),
        ("namespace", value(one_of(NAMESPACES))),
        ("labels", map(labels)),
        ("annotations", map(annotations)),
        ("creationTimestamp", value(one_of(&["2026-11-25T10:00:00Z", "1969-01-01T00:00:00Z"]))),
        (
            "deletionTimestamp",
            value(proptest::option::weighted(0.1, one_of(&["2026-11-25T10:00:00Z"]))),
        ),
    ])
}

fn port(of_slice: bool) -> BoxedStrategy<Value> {
    let mut fields = vec![
        ("name", value(one_of(PORT_NAMES))),
        ("protocol", value(one_of(PROTOCOLS))),
        ("port", number()),
    ];
    if !of_slice {
        fields.push(("nodePort", number()));
    }
    object(fields)
}

fn service() -> BoxedStrategy<Value> {
    let addresses = || list(value(one_of(ADDRESSES)), 3);
    let policy = || value(one_of(&["Cluster", "Local", "local"]));
    let timeout = object(vec![("timeoutSeconds", number())]);
    let spec = object(vec![
        ("type", value(one_of(&["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]))),
        ("clusterIP", value(one_of(ADDRESSES))),
        ("clusterIPs", addresses()),
        ("externalIPs", addresses()),
        ("ports", list(port(false), 4)),
        ("sessionAffinity", value(one_of(&["None", "ClientIP", "Cookie"]))),
        ("sessionAffinityConfig", object(vec![("clientIP", timeout)])),
        ("internalTrafficPolicy", policy()),
        ("externalTrafficPolicy", policy()),
        ("loadBalancerSourceRanges", list(value(one_of(RANGES)), 3)),
        ("healthCheckNodePort", number()),
    ]);
    let ingress = object(vec![
        ("ip", value(one_of(ADDRESSES))),
        ("ipMode", value(one_of(&["VIP", "Proxy", "vip"]))),
    ]);
    let balancer = object(vec![("ingress", list(ingress, 3))]);
    whole(
        "v1",
        "Service",
        metadata(
            &["service.kubernetes.io/service-proxy-name"],
            &["nftproxy.dev/scheduler", "nftproxy.dev/scheduler"],
        ),
        vec![("spec", spec), ("status", object(vec![("loadBalancer", balancer)]))],
    )
}

fn slice() -> BoxedStrategy<Value> {
    let condition = || value(any::<Option<bool>>());
    let named = || object(vec![("name", value(one_of(&["zone-a", "zone-b", "node-1"])))]);
    let endpoint = object(vec![
        ("addresses", list(value(one_of(ADDRESSES)), 2)),
        ("nodeName", value(one_of(&["node-1", "node-2"]))),
        (
            "conditions",
            object(vec![
                ("ready", condition()),
                ("serving", condition()),
                ("terminating", condition()),
            ]),
        ),
        ("hints", object(vec![("forZones", list(named(), 2)), ("forNodes", list(named(), 2))])),
    ]);
    whole(
        "discovery.k8s.io/v1",
        "EndpointSlice",
        metadata(
            &[
                "kubernetes.io/service-name",
                "kubernetes.io/service-name",
                "kubernetes.io/service-name",
                "service.kubernetes.io/headless",
            ],
            &["nftproxy.dev/weights", "endpoints.kubernetes.io/last-change-trigger-time"],
        ),
        vec![
            ("addressType", value(one_of(&["IPv4", "IPv4", "IPv6", "FQDN"]))),
            ("ports", list(port(true), 3)),
            ("endpoints", list(endpoint, 4)),
        ],
    )
}

fn node() -> BoxedStrategy<Value> {
    let address = object(vec![
        ("type", value(one_of(&["InternalIP", "ExternalIP", "Hostname"]))),
        ("address", value(one_of(ADDRESSES))),
    ]);
    let taint = object(vec![
        ("key", value(one_of(&["ToBeDeletedByClusterAutoscaler"]))),
        ("effect", value(one_of(&["NoSchedule"]))),
    ]);
    whole(
        "v1",
        "Node",
        metadata(&["topology.kubernetes.io/zone"], &["x"]),
        vec![
            (
                "spec",
                object(vec![
                    ("podCIDR", value(one_of(RANGES))),
                    ("podCIDRs", list(value(one_of(RANGES)), 2)),
                    ("taints", list(taint, 1)),
                ]),
            ),
            ("status", object(vec![("addresses", list(address, 4))])),
        ],
    )
    // A Node of another name is left alone.
    .prop_map(|mut node| {
        if node["metadata"]["name"] == "web" {
            node["metadata"]["name"] = json!("node-1");
        }
        node
    })
    .boxed()
}

fn service_cidr() -> BoxedStrategy<Value> {
    let cidrs = object(vec![("cidrs", list(value(one_of(RANGES)), 3))]);
    whole("networking.k8s.io/v1", "ServiceCIDR", metadata(&["x"], &["x"]), vec![("spec", cidrs)])
}

fn whole(
    version: &'static str,
    kind: &'static str,
    metadata: BoxedStrategy<Value>,
    mut fields: Vec<(&'static str, BoxedStrategy<Value>)>,
) -> BoxedStrategy<Value> {
    fields.push(("metadata", metadata));
    object(fields)
        .prop_map(move |mut object| {
            object["apiVersion"] = json!(version);
            object["kind"] = json!(kind);
            object
        })
        .boxed()
}

fn any_object() -> BoxedStrategy<Value> {
    prop_oneof![4 => service(), 4 => slice(), 1 => node(), 1 => service_cidr()].boxed()
}

/// A Service and its endpoint that nothing is wrong with, out of the way of all others.
fn innocent() -> [Value; 2] {
    [
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": "innocent", "namespace": "innocent" },
            "spec": { "clusterIP": "10.111.0.1", "clusterIPs": ["10.111.0.1"], "ports": [{ "port": 80 }] },
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": "innocent-4", "namespace": "innocent",
                "labels": { "kubernetes.io/service-name": "innocent" },
            },
            "addressType": "IPv4",
            "ports": [{ "name": "", "port": 8080 }],
            "endpoints": [{ "addresses": ["10.222.0.1"] }],
        }),
    ]
}

/// Takes in what objects amount to, commits, and returns the proxy. Panics if the innocent Service is not
/// served, or a complaint is not one line.
fn served(events: Vec<Event>, problems: &[Problem]) -> Proxy<FakeKernel> {
    for problem in problems {
        assert!(is_one_line(&problem.to_string()), "{problem:?}");
    }
    let mut proxy = Proxy::new(state(), FakeKernel::default());
    for event in events.into_iter().chain(all_listed()) {
        proxy.observe(event);
    }
    let done = proxy.commit().unwrap();
    assert_eq!(done.set_aside, 0, "the kernel refused an object");
    let slot = Key::Slot([10, 111, 0, 1].into(), Protocol::Tcp, 80, 0);
    let backend = Backend { address: [10, 222, 0, 1].into(), port: 8080 };
    let answers = |(id, value): (&nftproxy::nft::element::ElementId, &Element)| {
        id.key == slot && *value == Element::Backend(backend)
    };
    assert!(
        proxy.kernel_mut().elements().any(answers),
        "the innocent Service is not served: {problems:?}\n{}",
        proxy.kernel_mut().dump()
    );
    proxy
}

/// Text in which nothing foreign can stand: no control characters but line ends and tabs, quotes in pairs
/// around plain words, and braces that close.
pub(super) fn is_contained(text: &str) -> Result<(), String> {
    let mut depth = 0_i32;
    for line in text.lines() {
        let mut quoted = false;
        for c in line.chars() {
            // Between quotes anything can stand that does not end them.
            let plain = c.is_ascii_alphanumeric() || " \t\"_-.:/,@{}!=<>&|^#()*".contains(c);
            let closed = c.is_ascii_graphic() && c != '\\';
            if !(plain || quoted && closed || line.ends_with("policy accept;")) {
                return Err(format!("{c:?} in {line:?}"));
            }
            match c {
                '"' => quoted = !quoted,
                '{' if !quoted => depth += 1,
                '}' if !quoted => depth -= 1,
                _ => {}
            }
        }
        if quoted {
            return Err(format!("an open quote in {line:?}"));
        }
    }
    if depth == 0 { Ok(()) } else { Err(format!("{depth} braces are open")) }
}

/// An object as the API server would hand it out.
fn converted(object: &Value) -> Option<(Option<Event>, Vec<Problem>)> {
    let object = object.clone();
    Some(match object["kind"].as_str()? {
        "Service" => {
            let (event, problems) =
                convert::service(&serde_json::from_value::<Service>(object).ok()?);
            (event.map(Event::Service), problems)
        }
        "EndpointSlice" => {
            let slice = serde_json::from_value::<EndpointSlice>(object).ok()?;
            let (event, problems) = convert::endpoint_slice(&slice, "node-1");
            (event.map(Event::EndpointSlice), problems)
        }
        "ServiceCIDR" => {
            let cidr = serde_json::from_value::<ServiceCIDR>(object).ok()?;
            let (event, problems) = convert::service_cidr(&cidr);
            (event.map(Event::ServiceCidr), problems)
        }
        _ => {
            let (event, problems) = convert::node(&serde_json::from_value::<Node>(object).ok()?);
            (event.map(Event::Node), problems)
        }
    })
}

proptest! {
    #![proptest_config(cases(400, SEEDS))]

    #[test]
    fn objects_of_the_api_make_a_table_or_a_line_of_complaint(
        objects in proptest::collection::vec(any_object(), 1..8),
    ) {
        let all = objects.iter().chain(&innocent()).filter_map(converted).collect::<Vec<_>>();
        let problems: Vec<_> = all.iter().flat_map(|(_, problems)| problems.clone()).collect();
        let events = all.into_iter().filter_map(|(event, _)| event).collect();
        let wanted = served(events, &problems).wanted();
        prop_assert_eq!(is_contained(&nft_text::ruleset(&wanted)), Ok(()));
    }

    #[test]
    fn manifests_make_a_table_or_a_line_of_complaint(
        objects in proptest::collection::vec(any_object(), 1..8),
        file in text("[a-z]{1,6}\\.(yaml|yml|json)"),
        noise in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..2),
    ) {
        let dir = tempfile::tempdir().unwrap();
        for (i, object) in objects.iter().enumerate() {
            fs::write(dir.path().join(format!("{i}.yaml")), object.to_string()).unwrap();
        }
        // One file of many objects, with a byte changed here and there, under any name that a file can have.
        let mut bytes: Vec<u8> = objects.iter().flat_map(|o| format!("{o}\n---\n").into_bytes()).collect();
        for (at, byte) in noise {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if !file.is_empty() && !file.contains(['/', '\0']) {
            // Not every text can be one.
            let _ = fs::write(dir.path().join(file), bytes);
        }
        for (i, object) in innocent().iter().enumerate() {
            fs::write(dir.path().join(format!("innocent-{i}.json")), object.to_string()).unwrap();
        }
        let mut manifests = Manifests::new(dir.path().to_owned(), "node-1".into());
        let (events, problems) = manifests.read().unwrap();
        let wanted = served(events, &problems).wanted();
        prop_assert_eq!(is_contained(&nft_text::ruleset(&wanted)), Ok(()));
    }

    #[test]
    fn any_bytes_are_a_manifest_or_a_line_of_complaint(
        bytes in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..300),
            "[\\[\\]{}&*!|>'\"%@:,#\\-? \na-c0-9]{0,200}".prop_map(String::into_bytes),
        ],
        json in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(if json { "x.json" } else { "x.yaml" }), bytes).unwrap();
        for (i, object) in innocent().iter().enumerate() {
            fs::write(dir.path().join(format!("innocent-{i}.json")), object.to_string()).unwrap();
        }
        let mut manifests = Manifests::new(dir.path().to_owned(), "node-1".into());
        let (events, problems) = manifests.read().unwrap();
        served(events, &problems);
    }
}
