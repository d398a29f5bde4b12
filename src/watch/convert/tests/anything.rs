//! Everything the types can hold: nothing panics, and what comes out can be programmed.

use proptest::prelude::*;

use super::*;

fn text() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!("")),
        any::<String>().prop_map(Value::from),
        "[0-9a-f:./]{0,12}".prop_map(Value::from),
        prop::sample::select(vec![
            "None",
            "TCP",
            "UDP",
            "Local",
            "ClientIP",
            "IPv4",
            "IPv6",
            "10.96.0.1",
            "::1",
            "fd00::1",
            "NodePort",
            "LoadBalancer",
            "VIP",
            "http",
            "10.0.0.0/0",
        ])
        .prop_map(Value::from),
    ]
}

fn number() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<i32>().prop_map(Value::from),
        (0..70_000).prop_map(Value::from)
    ]
}

/// Strings where there have to be some.
fn texts() -> impl Strategy<Value = Value> {
    let plain = text().prop_map(|v| if v.is_null() { json!("x") } else { v });
    prop::collection::vec(plain, 0..4).prop_map(Value::from)
}

fn ports() -> impl Strategy<Value = Value> {
    let port = (text(), text(), any::<i32>(), number()).prop_map(|(name, protocol, port, node)| {
        json!({ "name": name, "protocol": protocol, "port": port, "nodePort": node })
    });
    prop::collection::vec(port, 0..4).prop_map(Value::from)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_service_is_converted_or_refused(
        (name, kind, first, policy, affinity) in (text(), text(), text(), text(), text()),
        (ips, families, external, ranges) in (texts(), texts(), texts(), texts()),
        (ports, timeout, health) in (ports(), number(), number()),
    ) {
        let object: core::Service = serde_json::from_value(json!({
            "metadata": { "name": name, "namespace": "default" },
            "spec": {
                "type": kind, "clusterIP": first, "clusterIPs": ips, "ipFamilies": families,
                "externalIPs": external, "loadBalancerSourceRanges": ranges, "ports": ports,
                "externalTrafficPolicy": policy, "internalTrafficPolicy": policy,
                "sessionAffinity": affinity, "healthCheckNodePort": health,
                "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": timeout } },
            },
        })).unwrap();
        let (service, problems) = service(&object);
        for problem in problems {
            prop_assert!(problem.object.starts_with("Service "));
            prop_assert!(!problem.to_string().contains(char::is_control));
        }
        if let Some(service) = service {
            prop_assert!(!service.cluster_ips.is_empty());
            let dialled = service.cluster_ips.iter().chain(&service.external_ips);
            for ip in dialled {
                prop_assert!(!ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast());
            }
            prop_assert!(service.ports.iter().all(|port| port.port > 0));
        }
    }

    #[test]
    fn any_slice_is_converted_or_refused(
        (name, owner, kind, addresses) in (text(), text(), text(), texts()),
        (port_name, protocol, port, node_name) in (text(), text(), number(), text()),
    ) {
        let owner = owner.as_str().unwrap_or_default();
        let object: discovery::EndpointSlice = serde_json::from_value(json!({
            "metadata": {
                "name": name, "namespace": "default",
                "labels": { "kubernetes.io/service-name": owner },
            },
            "addressType": kind.as_str().unwrap_or_default(),
            "ports": [{ "name": port_name, "protocol": protocol, "port": port }],
            "endpoints": [{ "addresses": addresses, "nodeName": node_name }],
        })).unwrap();
        let (slice, problems) = endpoint_slice(&object, "node-1");
        for problem in problems {
            prop_assert!(problem.object.starts_with("EndpointSlice "));
            prop_assert!(!problem.to_string().contains(char::is_control));
        }
        if let Some(slice) = slice {
            prop_assert!(slice.endpoints.iter().all(|e| Family::of(e.address) == slice.family));
        }
    }
}
