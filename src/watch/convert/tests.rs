//! Objects that make no sense: what is said about them, and that the rest of them counts.
//!
//! Objects are written as JSON and decoded with the client library's types, as they arrive from the
//! API server, so that a test can hold whatever a server could send.

mod anything;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use serde_json::{Value, json};

use super::*;
use crate::model::{self, Family, SessionAffinity, TrafficPolicy};

/// Puts values into an object, each at its JSON pointer.
fn with(mut object: Value, changes: &[(&str, Value)]) -> Value {
    for (pointer, value) in changes {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        let parent = object.pointer_mut(parent).unwrap_or_else(|| panic!("no {parent}"));
        match parent {
            Value::Array(list) if key == "-" => list.push(value.clone()),
            Value::Array(list) => list[key.parse::<usize>().unwrap()] = value.clone(),
            Value::Object(map) => drop(map.insert(key.to_owned(), value.clone())),
            other => panic!("{other} has no parts"),
        }
    }
    object
}

fn lines(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

fn web() -> Value {
    json!({
        "metadata": { "name": "web", "namespace": "default" },
        "spec": {
            "type": "NodePort",
            "clusterIP": "10.96.0.10",
            "clusterIPs": ["10.96.0.10", "fd00:10:96::10"],
            "ipFamilies": ["IPv4", "IPv6"],
            "ports": [
                { "name": "http", "protocol": "TCP", "port": 80, "nodePort": 30080 },
                { "name": "dns", "protocol": "UDP", "port": 53 },
            ],
        },
        "status": { "loadBalancer": { "ingress": [{ "ip": "203.0.113.7" }] } },
    })
}

fn convert_service(changes: &[(&str, Value)]) -> (Option<model::Service>, Vec<String>) {
    let object: core::Service = serde_json::from_value(with(web(), changes)).unwrap();
    let (service, problems) = service(&object);
    (service, lines(&problems))
}

#[test]
fn a_service_without_fault_is_converted_whole() {
    let (service, problems) = convert_service(&[]);
    assert_eq!(problems, [""; 0]);
    let service = service.unwrap();
    assert_eq!(service.cluster_ips.len(), 2);
    assert_eq!(service.ports.len(), 2);
    assert_eq!(service.ports[0].node_port.map(NonZeroU16::get), Some(30080));
    assert_eq!(service.load_balancer_ips, ["203.0.113.7".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(service.external_traffic_policy, TrafficPolicy::Cluster);
}

/// Changes to [`web`] that make one fault of it; what is said about it; and what is left, as
/// `ClusterIPs/external IPs/balancer IPs/ports`.
type Fault<'a> = (&'a [(&'a str, Value)], &'a str, &'a str);

fn each_costs_the_part_it_is_in(cases: &[Fault<'_>]) {
    for (changes, said, left) in cases {
        let (service, problems) = convert_service(changes);
        assert_eq!(problems.len(), 1, "{said}: {problems:#?}");
        let said = format!("Service default/web: {said}");
        assert!(problems[0].starts_with(&said), "expected {said}\nfound    {}", problems[0]);
        assert!(!problems[0].contains(char::is_control), "{}", problems[0]);
        let s = service.expect(&said);
        let counts =
            [s.cluster_ips.len(), s.external_ips.len(), s.load_balancer_ips.len(), s.ports.len()];
        assert_eq!(counts.map(|n| n.to_string()).join("/"), *left, "{said}");
    }
}

#[test]
fn a_fault_in_a_port_costs_that_port() {
    let port = |port: Value| ("/spec/ports/0", port);
    let long = "n".repeat(64);
    let too_long = format!("spec.ports[0].name: {long:?} is longer than 63 characters");
    each_costs_the_part_it_is_in(&[
        (
            &[port(json!({ "name": "http", "port": 70000 }))],
            "spec.ports[0].port: 70000 is not a port number (1 to 65535); the port is skipped",
            "2/0/1/1",
        ),
        (
            &[port(json!({ "name": "http", "port": 0 }))],
            "spec.ports[0].port: 0 is not a port number",
            "2/0/1/1",
        ),
        (
            &[port(json!({ "name": "http", "port": -1 }))],
            "spec.ports[0].port: -1 is not a port number",
            "2/0/1/1",
        ),
        (
            &[port(json!({ "name": "http", "port": i32::MIN }))],
            "spec.ports[0].port: -2147483648 is not a port number",
            "2/0/1/1",
        ),
        (
            &[port(json!({ "name": "http", "port": 80, "nodePort": 65536 }))],
            "spec.ports[0].nodePort: 65536 is not a port number (1 to 65535); the port is served \
             without a node port",
            "2/0/1/2",
        ),
        (
            &[port(json!({ "name": "http", "port": 80, "protocol": "QUIC" }))],
            "spec.ports[0].protocol: \"QUIC\" is none of TCP, UDP and SCTP; the port is skipped",
            "2/0/1/1",
        ),
        (
            &[port(json!({ "name": "http", "port": 80, "protocol": "tcp" }))],
            "spec.ports[0].protocol: \"tcp\" is none of",
            "2/0/1/1",
        ),
        (
            &[port(json!({ "name": "a b", "port": 80 }))],
            "spec.ports[0].name: \"a b\" holds other characters than",
            "2/0/1/1",
        ),
        (
            &[port(json!({ "name": "x\" ; flush ruleset #", "port": 80 }))],
            "spec.ports[0].name: \"x\\\" ; flush ruleset #\" holds other characters than",
            "2/0/1/1",
        ),
        (&[port(json!({ "name": long, "port": 80 }))], &too_long, "2/0/1/1"),
        (
            &[("/spec/ports/-", json!({ "name": "dns", "protocol": "UDP", "port": 54 }))],
            "spec.ports[2].name: an earlier port has the name \"dns\" and protocol udp, too; this \
             one is skipped",
            "2/0/1/2",
        ),
        (
            &[("/spec/ports/-", json!({ "name": "again", "port": 80 }))],
            "spec.ports[2].port: an earlier port has 80/tcp, too; this one is skipped",
            "2/0/1/2",
        ),
        (
            &[
                ("/spec/ports/-", json!({ "name": "c", "port": 82, "nodePort": 30123 })),
                ("/spec/ports/-", json!({ "name": "d", "port": 83, "nodePort": 30123 })),
            ],
            "spec.ports[3].nodePort: an earlier port has 30123/tcp, too; this one is served without \
             a node port",
            "2/0/1/4",
        ),
    ]);
}

#[test]
fn a_fault_in_an_address_costs_that_address() {
    each_costs_the_part_it_is_in(&[
        (
            &[("/spec/type", json!("Magic"))],
            "spec.type: \"Magic\" is none of ClusterIP, NodePort, LoadBalancer and ExternalName; \
             it counts as ClusterIP",
            "2/0/1/2",
        ),
        (
            &[("/spec/clusterIPs/1", json!("10.96.0.11"))],
            "spec.clusterIPs[1]: 10.96.0.11 is not of the family spec.ipFamilies[1] says; it is \
             ignored",
            "1/0/1/2",
        ),
        (
            &[("/spec/clusterIPs/1", json!("10.96.0.11")), ("/spec/ipFamilies/1", json!("IPv4"))],
            "spec.clusterIPs[1]: 10.96.0.11 is a second one of its family; ignored",
            "1/0/1/2",
        ),
        (
            &[("/spec/ipFamilies/1", json!("IPv7"))],
            "spec.ipFamilies[1]: \"IPv7\" is neither IPv4 nor IPv6; it is ignored",
            "1/0/1/2",
        ),
        (
            &[("/spec/clusterIPs/0", json!("10.96.0.256"))],
            "spec.clusterIPs[0]: \"10.96.0.256\" is not an IP address; it is ignored",
            "1/0/1/2",
        ),
        (
            &[("/spec/clusterIPs/0", json!("127.0.0.1"))],
            "spec.clusterIPs[0]: 127.0.0.1 is a loopback address, not one to dial; it is ignored",
            "1/0/1/2",
        ),
        (
            &[("/spec/clusterIPs/1", json!("ff02::1"))],
            "spec.clusterIPs[1]: ff02::1 is a multicast address",
            "1/0/1/2",
        ),
        (
            &[("/spec/ipFamilies", json!([]))],
            "spec.ipFamilies: is empty although there are several ClusterIPs; only spec.clusterIP \
             counts",
            "1/0/1/2",
        ),
        (
            &[("/spec/externalIPs", json!(["198.51.100.1", "example.org", "198.51.100.1"]))],
            "spec.externalIPs[1]: \"example.org\" is not an IP address; it is ignored",
            "2/1/1/2",
        ),
        (
            &[("/spec/externalIPs", json!(["0.0.0.0", "fd00::1"]))],
            "spec.externalIPs[0]: 0.0.0.0 is the unspecified address",
            "2/1/1/2",
        ),
        (
            &[("/status/loadBalancer/ingress/0", json!({ "ip": "203.0.113.7/32" }))],
            "status.loadBalancer.ingress[0].ip: \"203.0.113.7/32\" is not an IP address",
            "2/0/0/2",
        ),
        (
            &[("/status/loadBalancer/ingress/0", json!({ "ip": "203.0.113.7", "ipMode": "DSR" }))],
            "status.loadBalancer.ingress[0].ipMode: \"DSR\" is neither VIP nor Proxy; the entry is \
             ignored",
            "2/0/0/2",
        ),
        (
            &[("/spec/clusterIP", json!("\u{1b}[2J")), ("/spec/clusterIPs/0", json!("\u{1b}[2J"))],
            "spec.clusterIPs[0]: \"\\u{1b}[2J\" is not an IP address",
            "1/0/1/2",
        ),
    ]);
}

#[test]
fn an_unknown_word_or_number_costs_what_it_would_say() {
    each_costs_the_part_it_is_in(&[
        (
            &[("/spec/externalTrafficPolicy", json!("Nearby"))],
            "spec.externalTrafficPolicy: \"Nearby\" is neither Cluster nor Local; it counts as \
             Cluster",
            "2/0/1/2",
        ),
        (
            &[("/spec/internalTrafficPolicy", json!("local"))],
            "spec.internalTrafficPolicy: \"local\" is neither Cluster nor Local",
            "2/0/1/2",
        ),
        (
            &[("/spec/sessionAffinity", json!("Cookie"))],
            "spec.sessionAffinity: \"Cookie\" is neither ClientIP nor None; it counts as None",
            "2/0/1/2",
        ),
        (
            &[
                ("/spec/sessionAffinity", json!("ClientIP")),
                ("/spec/sessionAffinityConfig", json!({ "clientIP": { "timeoutSeconds": 86401 } })),
            ],
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is not a timeout (1 to \
             86400 seconds); 10800 is used",
            "2/0/1/2",
        ),
        (
            &[("/spec/loadBalancerSourceRanges", json!(["10.0.0.0/8", " 10.0.0.0/33"]))],
            "spec.loadBalancerSourceRanges[1]: \" 10.0.0.0/33\" is not a CIDR like 10.0.0.0/8",
            "2/0/1/2",
        ),
        (
            &[
                ("/spec/type", json!("LoadBalancer")),
                ("/spec/externalTrafficPolicy", json!("Local")),
                ("/spec/healthCheckNodePort", json!(99999)),
            ],
            "spec.healthCheckNodePort: 99999 is not a port number (1 to 65535); no health check is \
             served for the Service",
            "2/0/1/2",
        ),
    ]);
}

#[test]
fn unknown_words_count_as_the_default() {
    let (service, _) = convert_service(&[
        ("/spec/externalTrafficPolicy", json!("Nearby")),
        ("/spec/internalTrafficPolicy", json!("Nearby")),
        ("/spec/sessionAffinity", json!("Cookie")),
    ]);
    let service = service.unwrap();
    assert_eq!(service.external_traffic_policy, TrafficPolicy::Cluster);
    assert_eq!(service.internal_traffic_policy, TrafficPolicy::Cluster);
    assert_eq!(service.session_affinity, SessionAffinity::None);
    for seconds in [-5, 0, 86_401, i32::MAX] {
        let (service, problems) = convert_service(&[
            ("/spec/sessionAffinity", json!("ClientIP")),
            ("/spec/sessionAffinityConfig", json!({ "clientIP": { "timeoutSeconds": seconds } })),
        ]);
        assert_eq!(problems.len(), 1);
        let affinity = service.unwrap().session_affinity;
        assert_eq!(affinity, SessionAffinity::ClientIp { timeout: 10_800 });
    }
}

#[test]
fn services_that_are_for_nobody_here_are_left_out_in_silence() {
    let cases: [&[(&str, Value)]; 6] = [
        &[("/spec/clusterIP", json!("None"))],
        &[("/spec/clusterIP", json!(""))],
        &[("/spec/clusterIP", Value::Null)],
        &[("/spec/type", json!("ExternalName"))],
        &[("/metadata/labels", json!({ PROXY_NAME_LABEL: "" }))],
        &[("/spec", Value::Null)],
    ];
    for changes in cases {
        assert_eq!(convert_service(changes), (None, Vec::new()), "{changes:?}");
    }
}

#[test]
fn a_service_with_no_address_left_is_not_served_and_says_so() {
    let nonsense = ("/spec/clusterIPs", json!(["nonsense", "127.0.0.1"]));
    let (service, problems) = convert_service(&[nonsense]);
    assert_eq!(service, None);
    assert_eq!(
        problems,
        [
            "Service default/web: spec.clusterIPs[0]: \"nonsense\" is not an IP address; it is \
             ignored",
            "Service default/web: spec.clusterIPs[1]: 127.0.0.1 is a loopback address, not one to \
             dial; it is ignored",
            "Service default/web: spec.clusterIP: no usable ClusterIP is left; the Service is not \
             served",
        ]
    );
}

#[test]
fn an_object_without_a_proper_name_is_ignored_and_says_so() {
    let long = "n".repeat(254);
    for (name, fault) in [
        (json!(null), "is missing"),
        (json!(""), "is missing"),
        (json!("a/b"), "holds other characters than"),
        (json!("a\nb"), "holds other characters than"),
        (json!("wéb"), "holds other characters than"),
        (json!(long), "is longer than 253 characters"),
    ] {
        let (service, problems) = convert_service(&[("/metadata/name", name)]);
        assert_eq!(service, None);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with("Service \"default\"/\""), "{}", problems[0]);
        assert!(problems[0].contains(&format!(": metadata.name: {fault}")), "{}", problems[0]);
        assert!(problems[0].ends_with("; the object is ignored"), "{}", problems[0]);
        assert!(problems[0].len() < 300 && !problems[0].contains('\n'), "{}", problems[0]);
    }
    let (_, problems) = convert_service(&[("/metadata/namespace", Value::Null)]);
    assert!(problems[0].contains("metadata.namespace: is missing"), "{problems:?}");
}

#[test]
fn thousands_of_faults_are_counted_not_listed() {
    let ports: Vec<_> = (0..5000).map(|_| json!({ "port": 70000 })).collect();
    let mut all = ports;
    all.push(json!({ "name": "good", "port": 80 }));
    let (service, problems) = convert_service(&[("/spec/ports", all.into())]);
    assert_eq!(service.unwrap().ports.len(), 1);
    assert_eq!(problems.len(), 21);
    assert_eq!(problems[20], "Service default/web: has 4980 further problems, not listed");
}

fn web_slice() -> Value {
    json!({
        "metadata": {
            "name": "web-1",
            "namespace": "default",
            "labels": { "kubernetes.io/service-name": "web" },
        },
        "addressType": "IPv4",
        "ports": [
            { "name": "http", "protocol": "TCP", "port": 8080 },
            { "name": "dns", "protocol": "UDP", "port": 53 },
        ],
        "endpoints": [
            { "addresses": ["10.244.1.5"], "nodeName": "node-1" },
            { "addresses": ["10.244.2.9"], "nodeName": "node-2" },
        ],
    })
}

fn convert_slice(changes: &[(&str, Value)]) -> (Option<model::EndpointSlice>, Vec<String>) {
    let object = serde_json::from_value(with(web_slice(), changes)).unwrap();
    let (slice, problems) = endpoint_slice(&object, "node-1");
    (slice, lines(&problems))
}

/// What is said, and what is left, as `ports/endpoints`.
#[test]
fn one_fault_in_a_slice_costs_the_part_it_is_in() {
    let first = |address: &str| ("/endpoints/0/addresses", json!([address]));
    let cases: [((&str, Value), &str, &str); 14] = [
        (
            first("fd00::1"),
            "endpoints[0].addresses[0]: \"fd00::1\" is not an IPv4 address as the slice's \
             addressType says; the endpoint is skipped",
            "2/1",
        ),
        (first("pod-1"), "endpoints[0].addresses[0]: \"pod-1\" is not an IP address", "2/1"),
        (first(""), "endpoints[0].addresses[0]: \"\" is not an IP address", "2/1"),
        (first("127.0.0.1"), "endpoints[0].addresses[0]: \"127.0.0.1\" is a loopback", "2/1"),
        (first("224.0.0.1"), "endpoints[0].addresses[0]: \"224.0.0.1\" is a multicast", "2/1"),
        (first("0.0.0.0"), "endpoints[0].addresses[0]: \"0.0.0.0\" is the unspecified", "2/1"),
        (
            ("/ports/0/port", json!(70000)),
            "ports[0].port: 70000 is not a port number (1 to 65535); the port is skipped",
            "1/2",
        ),
        (("/ports/0/port", json!(-8080)), "ports[0].port: -8080 is not a port number", "1/2"),
        (
            ("/ports/0/protocol", json!("ICMP")),
            "ports[0].protocol: \"ICMP\" is none of TCP, UDP and SCTP; the port is skipped",
            "1/2",
        ),
        (("/ports/0/name", json!("a;b")), "ports[0].name: \"a;b\" holds other", "1/2"),
        (
            ("/ports/-", json!({ "name": "http", "port": 1 })),
            "ports[2].name: an earlier port has the name \"http\" and protocol tcp, too; this one \
             is skipped",
            "2/2",
        ),
        (
            ("/addressType", json!("IPX")),
            "addressType: \"IPX\" is none of IPv4, IPv6 and FQDN; the slice is ignored",
            "none",
        ),
        (
            ("/metadata/labels", json!({})),
            "metadata.labels[kubernetes.io/service-name]: is missing, so that the slice belongs to \
             no Service; it is ignored",
            "none",
        ),
        (
            ("/metadata/labels", json!({ "kubernetes.io/service-name": "../web" })),
            "metadata.labels[kubernetes.io/service-name]: holds other characters",
            "none",
        ),
    ];
    for (change, said, left) in cases {
        let (slice, problems) = convert_slice(&[change]);
        let said = format!("EndpointSlice default/web-1: {said}");
        assert_eq!(problems.len(), 1, "{said}: {problems:#?}");
        assert!(problems[0].starts_with(&said), "expected {said}\nfound    {}", problems[0]);
        let counts = slice.map(|s| format!("{}/{}", s.ports.len(), s.endpoints.len()));
        assert_eq!(counts.as_deref().unwrap_or("none"), left, "{said}");
    }
}

#[test]
fn a_slice_that_no_proxy_needs_is_left_out_in_silence() {
    let label = json!({ "kubernetes.io/service-name": "web", HEADLESS_LABEL: "" });
    for change in [("/metadata/labels", label), ("/addressType", json!("FQDN"))] {
        assert_eq!(convert_slice(std::slice::from_ref(&change)), (None, Vec::new()), "{change:?}");
    }
}

#[test]
fn what_a_slice_leaves_open_has_a_meaning() {
    // All ports, no name, no address: nothing to serve, and no fault.
    for change in [
        ("/ports/0/port", Value::Null),
        ("/ports/0/port", json!(0)),
        ("/ports/0/name", Value::Null),
    ] {
        let (slice, problems) = convert_slice(&[change]);
        assert_eq!((slice.unwrap().ports.len(), problems.len()), (1, 0));
    }
    let (slice, problems) = convert_slice(&[("/endpoints/0", json!({ "addresses": [] }))]);
    assert_eq!((slice.unwrap().endpoints.len(), problems.len()), (1, 0));
    let (slice, problems) = convert_slice(&[("/ports", Value::Null), ("/endpoints", json!([]))]);
    let slice = slice.unwrap();
    assert_eq!((slice.ports.len(), slice.endpoints.len(), problems.len()), (0, 0, 0));
    // Only the first address counts; conditions default to ready and serving.
    let endpoint = json!({
        "addresses": ["010.244.001.7", "nonsense"],
        "conditions": { "ready": null },
        "hints": { "forZones": [] },
    });
    let (slice, problems) = convert_slice(&[("/endpoints/0", endpoint)]);
    assert_eq!(problems, [""; 0]);
    let endpoint = &slice.unwrap().endpoints[0];
    assert_eq!(endpoint.address, std::net::IpAddr::from([10, 244, 1, 7]));
    assert!(endpoint.ready && endpoint.serving && !endpoint.terminating && !endpoint.local);
    assert_eq!(endpoint.hints, None);
}

#[test]
fn facts_of_a_node_that_make_no_sense_are_left_out() {
    let object: core::Node = serde_json::from_value(json!({
        "metadata": { "name": "Node-1", "labels": { ZONE_LABEL: "" } },
        "spec": { "podCIDRs": ["10.244.1.0/24", "10.244.1.0/24", "fd00::/129"] },
        "status": { "addresses": [
            { "type": "ExternalIP", "address": "203.0.113.1" },
            { "type": "InternalIP", "address": "192.0.2.10" },
            { "type": "InternalIP", "address": "node-1.example.org" },
            { "type": "Hostname", "address": "node-1" },
            { "type": "Nonsense", "address": "?" },
        ] },
    }))
    .unwrap();
    let (facts, problems) = node(&object);
    let facts = facts.unwrap();
    assert_eq!(facts.name, "node-1");
    assert_eq!(
        facts.addresses,
        ["192.0.2.10", "203.0.113.1"].map(|a| a.parse::<std::net::IpAddr>().unwrap())
    );
    assert_eq!(facts.primary(Family::V4), Some([192, 0, 2, 10].into()));
    assert_eq!(facts.pod_cidrs.len(), 1);
    assert_eq!(facts.zone, None);
    assert_eq!(
        lines(&problems),
        [
            "Node Node-1: status.addresses[2].address: \"node-1.example.org\" is not an IP \
             address; it is ignored",
            "Node Node-1: spec.podCIDRs[2]: \"fd00::/129\" is not a CIDR like 10.0.0.0/8; it is \
             ignored",
        ]
    );
}

#[test]
fn ranges_of_a_service_cidr_that_make_no_sense_are_left_out() {
    let object: networking::ServiceCIDR = serde_json::from_value(json!({
        "metadata": { "name": "kubernetes" },
        "spec": { "cidrs": ["10.96.0.1/12", "ten", "fd00:10:96::/108"] },
    }))
    .unwrap();
    let (cidr, problems) = service_cidr(&object);
    let cidrs: Vec<_> = cidr.unwrap().cidrs.iter().map(ToString::to_string).collect();
    assert_eq!(cidrs, ["10.96.0.0/12", "fd00:10:96::/108"]);
    assert_eq!(
        lines(&problems),
        ["ServiceCIDR kubernetes: spec.cidrs[1]: \"ten\" is not a CIDR like 10.0.0.0/8; it is \
             ignored"]
    );
}
