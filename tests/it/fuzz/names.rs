//! The rendered text: whatever objects are called, nft reads it, and makes of it what the program would
//! have made by netlink.

use nftproxy::model::{Event, NamespacedName, Protocol, Service, SessionAffinity};
use nftproxy::nft::fake::FakeKernel;
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::nft::rule::InterfaceName;
use nftproxy::nft::text;
use nftproxy::reconcile::Proxy;
use nftproxy::settings::{DetectLocal, NodePortAddresses, Settings};
use nftproxy::state::State;
use nftproxy::watch::convert;
use proptest::prelude::*;
use serde_json::json;

use super::objects::is_contained;
use super::{cases, one_of};
use crate::model::{all_listed, node, settings};
use crate::namespace::{in_namespace, nft};

const SEEDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fuzz/seeds/names.txt");

/// Names that conversion may accept, among them nft's own words.
fn name() -> BoxedStrategy<String> {
    let words: &[&str] = &[
        "drop",
        "elements",
        "type",
        "policy",
        "ip",
        "tcp",
        "10.96.0.1",
        "0",
        "-",
        ".",
        "..",
        "_",
        "a:b",
        "a-",
        "A",
        "record-5",
        "affinity",
        "lb-2",
        "all",
        "default",
    ];
    prop_oneof![
        2 => proptest::sample::select(words).prop_map(str::to_owned),
        2 => "[A-Za-z0-9._:-]{1,12}",
        1 => "[A-Za-z0-9._-]{60,63}",
        1 => one_of(&["web"]),
    ]
    .boxed()
}

/// A Service and a slice as the API has them, with these names, and what makes an object of its own.
fn named(i: usize, names: &[String; 4], sticky: bool, scheduler: &str) -> Vec<Event> {
    let [namespace, service, port, slice] = names;
    let object = json!({
        "metadata": {
            "name": service, "namespace": namespace,
            "labels": { slice.as_str(): port }, "annotations": {
                "nftproxy.dev/scheduler": scheduler, port.as_str(): service,
            },
        },
        "spec": {
            "type": "LoadBalancer", "clusterIP": format!("10.96.0.{i}"),
            "clusterIPs": [format!("10.96.0.{i}"), format!("fd00:10:96::{i}")],
            "ports": [{ "name": port, "port": 80, "protocol": "UDP", "nodePort": 30000 + i }],
            "sessionAffinity": if sticky { "ClientIP" } else { "None" },
            "externalTrafficPolicy": if i.is_multiple_of(2) { "Local" } else { "Cluster" },
            "loadBalancerSourceRanges": ["10.0.0.0/8", "fd00::/16"],
        },
        "status": { "loadBalancer": { "ingress": [{ "ip": format!("203.0.113.{i}") }] } },
    });
    let service = convert::service(&serde_json::from_value(object).unwrap()).0;
    let slices = [("IPv4", "10.244.1.5"), ("IPv6", "fd00:10:244:1::5")].map(|(family, address)| {
        let object = json!({
            "metadata": {
                "name": format!("s{i}-{family}"), "namespace": namespace,
                "labels": { "kubernetes.io/service-name": names[1] },
            },
            "addressType": family,
            "ports": [{ "name": port, "port": 8080, "protocol": "UDP" }],
            "endpoints": [{ "addresses": [address], "nodeName": "node-1" }],
        });
        convert::endpoint_slice(&serde_json::from_value(object).unwrap(), "node-1").0
    });
    let service = service.map(Event::Service).into_iter();
    service.chain(slices.into_iter().flatten().map(Event::EndpointSlice)).collect()
}

fn proxies(settings: &Settings, events: &[Event]) -> Proxy<FakeKernel> {
    let mut proxy = Proxy::new(State::new(settings.clone(), node()), FakeKernel::default());
    for event in events.iter().cloned().chain(all_listed()) {
        proxy.observe(event);
    }
    proxy
}

fn any_settings() -> BoxedStrategy<Settings> {
    // What the configuration lets through.
    let interface = ("[a-zA-Z0-9._@-]{1,14}", any::<bool>()).prop_map(|(name, whole)| {
        DetectLocal::Interface(if whole {
            InterfaceName::Whole(name.into())
        } else {
            InterfaceName::Prefix(name.into())
        })
    });
    let detect = prop_oneof![
        2 => Just(settings().detect_local),
        1 => Just(DetectLocal::NodeCidr),
        2 => interface,
    ];
    let all =
        NodePortAddresses::Ranges(vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()]);
    let scope = prop_oneof![Just(NodePortAddresses::Primary), Just(all)];
    (detect, scope, any::<bool>(), 0..32_u32)
        .prop_map(|(detect_local, node_port_addresses, masquerade_all, bit)| Settings {
            masquerade_mark: 1 << bit,
            masquerade_all,
            detect_local,
            node_port_addresses,
            ..settings()
        })
        .boxed()
}

proptest! {
    #![proptest_config(cases(40, SEEDS))]

    #[test]
    fn the_text_loads_whatever_objects_are_called_and_is_what_netlink_makes(
        names in proptest::collection::vec(
            ([name(), name(), name(), name()], any::<bool>(), one_of(&["random", "round-robin", "source-hash", "maglev"])),
            1..5,
        ),
        settings in any_settings(),
    ) {
        let named = |(i, (names, sticky, scheduler)): (usize, &([String; 4], bool, String))| {
            named(i + 1, names, *sticky, scheduler)
        };
        let events: Vec<Event> = names.iter().enumerate().flat_map(named).collect();
        let text = text::ruleset(&proxies(&settings, &events).wanted());
        prop_assert_eq!(is_contained(&text), Ok(()));
        in_namespace(|| {
            nft(&["-c", "-f", "-"], &text);
            nft(&["-f", "-"], &text);
            let mut proxy = Proxy::new(State::new(settings.clone(), node()), NetlinkKernel::open().unwrap());
            for event in events.iter().cloned().chain(all_listed()) {
                proxy.observe(event);
            }
            let plan = proxy.plan().unwrap();
            assert!(plan.is_empty(), "{plan:?}\n{text}");
        });
    }

    /// A name of an affinity map or of a chain is read back as the same port's, or there is none.
    #[test]
    fn a_name_is_nobody_elses(a in [name(), name(), name()], b in [name(), name(), name()]) {
        let port = |[namespace, service, port]: &[String; 3]| {
            nftproxy::nft::names::PortName::new(&NamespacedName::new(namespace, service), Protocol::Tcp, port)
        };
        let accepted = |[namespace, service, port]: &[String; 3]| {
            let object = json!({
                "metadata": { "name": service, "namespace": namespace },
                "spec": { "clusterIP": "10.96.0.1", "ports": [{ "name": port, "port": 80 }], "sessionAffinity": "ClientIP" },
            });
            let (service, _) = convert::service(&serde_json::from_value(object).unwrap());
            service.is_some_and(|Service { ports, session_affinity, .. }| {
                !ports.is_empty() && session_affinity != SessionAffinity::None
            })
        };
        if accepted(&a) && accepted(&b)
            && let (Some(one), Some(other)) = (port(&a), port(&b))
        {
            prop_assert_eq!(one == other, a == b, "{} and {}", one, other);
        }
    }
}
