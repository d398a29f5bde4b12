//! The objects: the Services that are measured, and those that are watched
//! for how soon a change takes effect.

use std::collections::HashMap;
use std::fmt::Debug;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ListParams, PostParams, WatchEvent, WatchParams};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::control_plane::ControlPlane;
use super::etcd::Writer;

/// How long after a request that failed it is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// Services over UDP whose changes are timed.
pub(crate) const PROBES: usize = 32;

/// Which slices are those of the probes.
const PROBE_LABEL: &str = "nftproxy.dev/bench-probe";

/// When another client of the server was told of an awaited address: what the server needs for that
/// is no proxy's doing.
#[derive(Clone, Default)]
pub(crate) struct Told(Arc<Mutex<HashMap<Ipv4Addr, Instant>>>);

impl Told {
    pub(crate) fn of(&self, awaited: Ipv4Addr) -> Option<Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&awaited).copied()
    }

    #[expect(clippy::disallowed_methods, reason = "a bench reads the clock")]
    fn hear(&self, slice: &EndpointSlice) {
        let now = Instant::now();
        let addresses = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
        let awaited = addresses.filter_map(|a| a.parse().ok()).filter(|a| *a >= awaited_ip(0));
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for address in awaited {
            told.entry(address).or_insert(now);
        }
    }
}

/// The objects, and who writes them.
#[derive(Clone)]
pub(crate) struct Cluster {
    client: Client,
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
}

fn number(index: usize) -> u32 {
    u32::try_from(index).expect("fewer than 4 billion")
}

/// The ClusterIP of a Service.
pub(crate) fn cluster_ip(index: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 1, 0)) + number(index))
}

/// Its like in the floor tables: in the first, or the second with random ports.
pub(crate) fn floor_ip(index: usize, random: bool) -> Ipv4Addr {
    let first = if random { Ipv4Addr::new(10, 48, 1, 0) } else { Ipv4Addr::new(10, 64, 1, 0) };
    Ipv4Addr::from(u32::from(first) + number(index))
}

/// And one that no table knows.
pub(crate) fn plain_ip(index: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 32, 1, 0)) + number(index))
}

pub(crate) fn probe_ip(index: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 111, 0, 1)) + number(index))
}

/// An endpoint of a Service; those from `endpoints` on are for changes.
pub(crate) fn endpoint_ip(index: usize, endpoint: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 0)) + number(index * 64) + number(endpoint))
}

/// The address that the probe of this number waits for.
pub(crate) fn awaited_ip(number_of_probe: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 250, 0, 1)) + number(number_of_probe))
}

fn service(name: &str, ip: Ipv4Addr, protocol: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": ip, "ports": [{"name": "p", "port": 80, "protocol": protocol}]},
    })
}

fn slice(name: &str, protocol: &str, addresses: &[Ipv4Addr]) -> Value {
    let endpoints: Vec<_> = addresses
        .iter()
        .map(|ip| json!({"addresses": [ip], "conditions": {"ready": true}, "nodeName": "other"}))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{name}-x"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "ports": [{"name": "p", "port": 8080, "protocol": protocol}],
        "endpoints": endpoints,
    })
}

impl Cluster {
    /// Writes everything, and has the API server begin anew: one that is told of objects by the thousand takes
    /// ClusterIPs for lost whose Services it has not heard of yet, and mends that for minutes.
    pub(crate) async fn load(plane: &mut ControlPlane, services: usize, endpoints: usize) -> Self {
        let client = plane.client().await;
        let node: Node = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"},
            "spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.10"}]},
        }))
        .expect("a Node");
        let nodes: Api<Node> = Api::all(client.clone());
        let made = nodes.create(&PostParams::default(), &node).await.expect("creating the Node");
        let mut made = made;
        made.status = node.status;
        let _ = nodes.replace_status("node-1", &PostParams::default(), &made).await;

        let this = Self { client, services, endpoints };
        let mut etcd = Writer::connect(plane.etcd()).await;
        for index in 0..services {
            let ip = cluster_ip(index);
            etcd.service(service(&format!("service-{index}"), ip, "TCP"), ip).await;
            etcd.slice(this.slice_of(index, 0)).await;
        }
        for probe in 0..PROBES {
            let ip = probe_ip(probe);
            etcd.service(service(&format!("probe-{probe}"), ip, "UDP"), ip).await;
            etcd.slice(this.probe_slice(probe, None)).await;
        }
        etcd.flush().await;
        plane.kill_apiserver();
        plane.start_apiserver().await;
        this.served::<Service>(services + PROBES).await;
        this.served::<EndpointSlice>(services + PROBES).await;
        this
    }

    /// Waits until the server has all of a kind in its cache: a consistent list of one object says how many
    /// others there are.
    async fn served<K>(&self, all: usize)
    where
        K: Resource<Scope = kube::core::NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), "default");
        for _ in 0..1500 {
            if let Ok(list) = api.list(&ListParams::default().limit(1)).await {
                let others = list.metadata.remaining_item_count.unwrap_or_default();
                // The Service `kubernetes` may be one of them.
                if usize::try_from(others).is_ok_and(|others| others + 1 >= all) {
                    return;
                }
            }
            tokio::time::sleep(RETRY).await;
        }
        panic!("the server does not serve what is in etcd");
    }

    /// Begins to watch the probes as any client would.
    pub(crate) fn listen(&self) -> Told {
        let told = Told::default();
        let (api, heard) =
            (Api::<EndpointSlice>::namespaced(self.client.clone(), "default"), told.clone());
        tokio::spawn(async move {
            // The server ends a watch after some minutes.
            loop {
                let parameters = WatchParams::default().labels(PROBE_LABEL);
                let Ok(events) = api.watch(&parameters, "0").await else {
                    // At the end there is no server, and this must not keep the runtime from ending.
                    tokio::time::sleep(RETRY).await;
                    continue;
                };
                let mut events = std::pin::pin!(events);
                while let Some(Ok(event)) = events.next().await {
                    if let WatchEvent::Added(slice) | WatchEvent::Modified(slice) = event {
                        heard.hear(&slice);
                    }
                }
            }
        });
        told
    }

    /// The slice of a Service, of which one endpoint is another in each version.
    fn slice_of(&self, index: usize, version: usize) -> Value {
        let mut addresses: Vec<_> = (0..self.endpoints).map(|e| endpoint_ip(index, e)).collect();
        if version > 0 {
            addresses[0] = endpoint_ip(index, self.endpoints + version % 8);
        }
        slice(&format!("service-{index}"), "TCP", &addresses)
    }

    fn probe_slice(&self, probe: usize, more: Option<Ipv4Addr>) -> Value {
        let base = self.services + 1 + probe;
        let mut addresses: Vec<_> = (0..self.endpoints).map(|e| endpoint_ip(base, e)).collect();
        addresses.extend(more);
        let mut slice = slice(&format!("probe-{probe}"), "UDP", &addresses);
        slice["metadata"]["labels"][PROBE_LABEL] = "".into();
        slice
    }

    async fn replace(&self, object: Value) -> Result<Instant, kube::Error> {
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), "default");
        let object: EndpointSlice = serde_json::from_value(object).expect("an EndpointSlice");
        let name = object.metadata.name.clone().expect("it has a name");
        api.replace(&name, &PostParams::default(), &object).await?;
        #[expect(clippy::disallowed_methods, reason = "a bench reads the clock")]
        Ok(Instant::now())
    }

    /// Puts another endpoint in the place of one.
    pub(crate) async fn change(&self, index: usize, version: usize) {
        let _ = self.replace(self.slice_of(index, version)).await;
    }

    /// Sets what a probed Service has beside its endpoints; returns when the server said so.
    pub(crate) async fn probe(&self, probe: usize, more: Option<Ipv4Addr>) -> Instant {
        self.replace(self.probe_slice(probe, more)).await.expect("the write of a probe")
    }
}
