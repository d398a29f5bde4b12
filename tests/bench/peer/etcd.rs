//! Objects written where the API server keeps them. It takes them one by one, each ClusterIP being
//! allocated with a write of its own: minutes for 10,000 Services, half an hour for 45,000. In etcd they
//! are there within seconds, and the server, which follows it, serves them as its own.

use std::net::{Ipv4Addr, SocketAddr};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

/// Writes in one transaction; etcd takes 128.
const AT_ONCE: usize = 120;

/// Objects that wait to be written.
pub(crate) struct Writer {
    requests: http1::SendRequest<Full<Bytes>>,
    waiting: Vec<Value>,
    written: u64,
}

impl Writer {
    pub(crate) async fn connect(etcd: SocketAddr) -> Self {
        let stream = TcpStream::connect(etcd).await.expect("etcd runs");
        let (requests, connection) =
            http1::handshake(TokioIo::new(stream)).await.expect("etcd speaks HTTP");
        tokio::spawn(connection);
        Self { requests, waiting: Vec::new(), written: 0 }
    }

    /// A Service with one port, which has its ClusterIP already, and the object that says so.
    pub(crate) async fn service(&mut self, mut service: Value, ip: Ipv4Addr) {
        let name = service["metadata"]["name"].as_str().expect("a name").to_owned();
        let spec = &mut service["spec"];
        spec["type"] = "ClusterIP".into();
        spec["clusterIPs"] = json!([ip]);
        spec["ipFamilies"] = json!(["IPv4"]);
        spec["ipFamilyPolicy"] = "SingleStack".into();
        spec["internalTrafficPolicy"] = "Cluster".into();
        spec["sessionAffinity"] = "None".into();
        let address = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "IPAddress",
            "metadata": {"name": ip, "labels": {
                "ipaddress.kubernetes.io/ip-family": "IPv4",
                "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
            }},
            "spec": {"parentRef": {"resource": "services", "namespace": "default", "name": name}},
        });
        self.put(&format!("ipaddresses/{ip}"), address).await;
        self.put(&format!("services/specs/default/{name}"), service).await;
    }

    pub(crate) async fn slice(&mut self, slice: Value) {
        let name = slice["metadata"]["name"].as_str().expect("a name");
        self.put(&format!("endpointslices/default/{name}"), slice).await;
    }

    async fn put(&mut self, key: &str, mut object: Value) {
        self.written += 1;
        object["metadata"]["uid"] = format!("00000000-0000-4000-8000-{:012x}", self.written).into();
        object["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
        self.waiting.push(json!({"requestPut": {
            "key": BASE64_STANDARD.encode(format!("/registry/{key}")),
            "value": BASE64_STANDARD.encode(object.to_string()),
        }}));
        if self.waiting.len() == AT_ONCE {
            self.flush().await;
        }
    }

    /// Writes what still waits.
    pub(crate) async fn flush(&mut self) {
        let body = json!({ "success": std::mem::take(&mut self.waiting) }).to_string();
        let request = hyper::Request::post("/v3/kv/txn")
            .header("host", "etcd")
            .body(Full::from(body))
            .expect("a request");
        self.requests.ready().await.expect("the connection stands");
        let answer = self.requests.send_request(request).await.expect("etcd answers");
        let status = answer.status();
        let said = answer.into_body().collect().await.expect("the whole answer").to_bytes();
        assert!(status.is_success(), "etcd: {status} {}", String::from_utf8_lossy(&said));
    }
}
