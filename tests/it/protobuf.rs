//! What is read of the protobuf of a real API server is what its JSON says.

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::{Client, Resource};
use nftproxy::watch::convert;
use serde::de::DeserializeOwned;

use crate::control_plane::{ControlPlane, User};

const OBJECTS: &str = r#"
apiVersion: v1
kind: Service
metadata:
  name: everything
  namespace: default
  labels: {app: web}
  annotations: {nftproxy.dev/scheduler: maglev, example.com/note: "ünïcode \"quoted\""}
spec:
  type: LoadBalancer
  ipFamilyPolicy: RequireDualStack
  externalIPs: [198.51.100.7]
  externalTrafficPolicy: Local
  internalTrafficPolicy: Local
  loadBalancerSourceRanges: [203.0.113.0/24, "2001:db8::/32"]
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 77}}
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: web, nodePort: 30080}
  - {name: dns, port: 53, targetPort: 5353, protocol: UDP}
  - {name: sig, port: 2905, protocol: SCTP}
status:
  loadBalancer:
    ingress:
    - {ip: 192.0.2.50, ipMode: VIP}
    - {ip: 192.0.2.51, ipMode: Proxy}
    - {hostname: lb.example.com}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: default}
spec: {clusterIP: None, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: elsewhere, namespace: default}
spec: {type: ExternalName, externalName: example.com}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: everything-1
  namespace: default
  labels: {kubernetes.io/service-name: everything}
  annotations:
    nftproxy.dev/weights: "10.244.1.5=3"
    endpoints.kubernetes.io/last-change-trigger-time: "2026-01-01T00:00:00Z"
addressType: IPv4
ports:
- {name: http, port: 8080}
- {name: dns, port: 5353, protocol: UDP}
- {name: ""}
endpoints:
- addresses: [10.244.1.5]
  conditions: {ready: true, serving: true, terminating: false}
  nodeName: node-1
  zone: zone-a
  hints: {forZones: [{name: zone-a}, {name: zone-b}], forNodes: [{name: node-1}]}
- addresses: [10.244.2.6]
  conditions: {ready: false, serving: true, terminating: true}
- addresses: [10.244.2.7]
  conditions: {}
- addresses: [10.244.2.8]
---
apiVersion: v1
kind: Node
metadata: {name: node-1, labels: {topology.kubernetes.io/zone: zone-a}}
spec:
  podCIDRs: [10.244.1.0/24, "fd00:10:244:1::/64"]
  podCIDR: 10.244.1.0/24
  taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule, value: "1"}]
status:
  addresses:
  - {type: InternalIP, address: 192.0.2.10}
  - {type: ExternalIP, address: 198.51.100.10}
  - {type: Hostname, address: node-1}
---
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: more}
spec: {cidrs: [10.200.0.0/16]}
"#;

/// What the proxy makes of a list and of a watch of everything, sorted: each object with its version.
async fn seen<K>(client: &Client, convert: impl Fn(&K) -> String) -> Vec<String>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug,
    K::DynamicType: Default,
{
    let api = Api::<K>::all(client.clone());
    let list = api.list(&ListParams::default()).await.expect("a list");
    let version = list.metadata.resource_version.clone().expect("a list has a version");
    let named = |how: &str, object: &K| {
        let meta = object.meta();
        format!(
            "{how} {:?} {:?} {:?}: {}",
            meta.name,
            meta.uid,
            meta.resource_version,
            convert(object)
        )
    };
    let mut seen: Vec<_> = list.items.iter().map(|object| named("listed", object)).collect();
    assert!(!seen.is_empty() && !version.is_empty());
    let mut events = Box::pin(api.watch(&WatchParams::default(), "0").await.expect("a watch"));
    for _ in 0..list.items.len() {
        match events.next().await.expect("an event").expect("a good one") {
            WatchEvent::Added(object) => seen.push(named("added", &object)),
            other => panic!("not expected: {other:?}"),
        }
    }
    seen.sort();
    seen
}

async fn everything(client: &Client) -> Vec<String> {
    let mut all = seen::<Service>(client, |o| format!("{:?}", convert::service(o))).await;
    all.extend(
        seen::<EndpointSlice>(client, |o| format!("{:?}", convert::endpoint_slice(o, "node-1")))
            .await,
    );
    all.extend(seen::<Node>(client, |o| format!("{:?}", convert::node(o))).await);
    all.extend(seen::<ServiceCIDR>(client, |o| format!("{:?}", convert::service_cidr(o))).await);
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn protobuf_says_what_json_says() {
    let plane = ControlPlane::start([127, 0, 0, 1].into()).await;
    plane.apply(OBJECTS).await;
    let kubeconfig = plane.kubeconfig(User::Admin);
    let ours = nftproxy::watch::api::client(Some(&kubeconfig), None).await.expect("a client");
    let [read, expected] = [everything(&ours).await, everything(&plane.client().await).await];
    assert!(expected.len() >= 16, "{expected:#?}");
    for (read, expected) in read.iter().zip(&expected) {
        assert_eq!(read, expected);
    }
    assert_eq!(read.len(), expected.len());

    // That it was protobuf: who manages which field is passed over.
    for (client, managed) in [(&ours, false), (&plane.client().await, true)] {
        let all = Api::<Service>::all(client.clone()).list(&ListParams::default()).await;
        let all = all.expect("a list").items;
        let any = all.iter().any(|service| service.metadata.managed_fields.is_some());
        assert_eq!(any, managed);
    }

    // Refusals are read as well.
    let kubeconfig = plane.kubeconfig(User::ServiceAccount);
    let nobody = nftproxy::watch::api::client(Some(&kubeconfig), None).await.expect("a client");
    let refused = Api::<Service>::all(nobody.clone()).list(&ListParams::default()).await;
    assert!(matches!(&refused, Err(kube::Error::Api(status)) if status.code == 403), "{refused:?}");
    let refused = Api::<Service>::all(nobody).watch(&WatchParams::default(), "0").await.err();
    assert!(
        matches!(&refused, Some(kube::Error::Api(status)) if status.code == 403),
        "{refused:?}"
    );
}
