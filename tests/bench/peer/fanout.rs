//! What many nodes ask of one API server: streams of changes, as many as there are nodes, and lists. Each
//! watcher has a connection of its own, reads what comes, and looks at nothing. In JSON, and in Kubernetes'
//! protobuf, as both proxies ask; lists compressed, too.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use http_body_util::BodyExt as _;
use kube::Client;
use kube::client::Body;
use tokio::task::JoinSet;

use super::cluster::Cluster;
use super::control_plane::ControlPlane;
use super::report::{machine, significant};

/// Changes a second, and for how long.
const RATE: u32 = 50;
const LASTING: Duration = Duration::from_secs(10);

/// How many watch.
const CROWDS: [usize; 3] = [0, 100, 400];

const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
const SELECTOR: &str = "labelSelector=%21service.kubernetes.io%2Fheadless";

/// How objects are written on the wire.
#[derive(Clone, Copy)]
enum Encoding {
    Json,
    Protobuf,
}

impl Encoding {
    fn accept(self, watch: bool) -> &'static str {
        match (self, watch) {
            (Self::Json, _) => "application/json",
            (Self::Protobuf, true) => "application/vnd.kubernetes.protobuf;stream=watch",
            (Self::Protobuf, false) => "application/vnd.kubernetes.protobuf",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Json => "JSON",
            Self::Protobuf => "protobuf",
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy)]
struct Parameters {
    query: &'static str,
    compressed: bool,
}

impl Parameters {
    fn of(query: &'static str) -> Self {
        Self { query, compressed: false }
    }
}

/// Measures, prints and writes the table.
pub(crate) async fn run(plane: &ControlPlane, cluster: &Cluster) {
    let mut text = String::from(
        "| watchers of EndpointSlices | encoding | changes | bytes for each and change | server's CPU for \
         each and change |\n| ---: | --- | ---: | ---: | ---: |\n",
    );
    let mut alone = 0.0;
    let mut version = 0;
    for encoding in [Encoding::Json, Encoding::Protobuf] {
        for crowd in CROWDS {
            if crowd == 0 && version > 0 {
                continue;
            }
            version += 1;
            let received = Arc::new(AtomicU64::new(0));
            let mut watchers = watch(plane, encoding, crowd, &received).await;
            let (before, cpu) = (received.load(Ordering::Relaxed), cpu_seconds(plane));
            let changes = change(cluster, version).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            let bytes = received.load(Ordering::Relaxed) - before;
            let cpu = (cpu_seconds(plane) - cpu) / f64::from(changes);
            watchers.shutdown().await;
            if crowd == 0 {
                alone = cpu;
                let _ =
                    writeln!(text, "| 0 | | {changes} | | {} ms in all |", significant(cpu * 1e3));
                continue;
            }
            let each = f64::from(u32::try_from(crowd).expect("few"));
            #[expect(clippy::cast_precision_loss, reason = "a figure")]
            let bytes = bytes as f64 / f64::from(changes) / each;
            let _ = writeln!(
                text,
                "| {crowd} | {} | {changes} | {} | {} µs |",
                encoding.name(),
                significant(bytes),
                significant((cpu - alone) / each * 1e6)
            );
        }
    }
    text.push_str(
        "\n| list of EndpointSlices | encoding | bytes | took | server's CPU |\n\
         | --- | --- | ---: | ---: | ---: |\n",
    );
    for (how, parameters) in [
        ("at once", Parameters::of("resourceVersion=0")),
        (
            "streamed",
            Parameters::of(
                "watch=true&sendInitialEvents=true&allowWatchBookmarks=true&\
                 resourceVersionMatch=NotOlderThan&timeoutSeconds=3",
            ),
        ),
    ] {
        for (encoding, compressed) in
            [(Encoding::Json, false), (Encoding::Protobuf, false), (Encoding::Protobuf, true)]
        {
            let (cpu, began) = (cpu_seconds(plane), now());
            let received = Arc::new(AtomicU64::new(0));
            let client = plane.client().await;
            let parameters = Parameters { compressed, ..parameters };
            let last = read(&client, encoding, parameters, &received).await.unwrap_or(began);
            let _ = writeln!(
                text,
                "| {how} | {}{} | {} MB | {} s | {} s |",
                encoding.name(),
                if compressed { ", gzip" } else { "" },
                significant(megabytes(received.load(Ordering::Relaxed))),
                significant((last - began).as_secs_f64()),
                significant(cpu_seconds(plane) - cpu)
            );
        }
    }
    println!("{text}");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/results");
    let text = format!(
        "# What watchers cost the API server\n\n{} {} Services × {} endpoints. Made by `tests/bench/run \
         --fanout`: a real kube-apiserver, and clients on the same machine; {RATE} changes a second.\n\n{text}",
        machine(),
        cluster.services,
        cluster.endpoints
    );
    std::fs::write(folder.join("fanout.md"), text).expect("the folder is there");
}

/// So many watchers, each of which has been granted its watch.
async fn watch(
    plane: &ControlPlane,
    encoding: Encoding,
    crowd: usize,
    received: &Arc<AtomicU64>,
) -> JoinSet<()> {
    let mut watchers = JoinSet::new();
    let (granted, mut grants) = tokio::sync::mpsc::channel(crowd.max(1));
    for _ in 0..crowd {
        let (client, received, granted) = (plane.client().await, received.clone(), granted.clone());
        watchers.spawn(async move {
            let parameters =
                Parameters::of("watch=true&resourceVersion=0&allowWatchBookmarks=true");
            let _ = granted.send(()).await;
            let _ = read(&client, encoding, parameters, &received).await;
        });
    }
    for _ in 0..crowd {
        grants.recv().await;
    }
    // From version 0 on, each is sent everything first.
    let mut before = u64::MAX;
    while before != received.load(Ordering::Relaxed) {
        before = received.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    watchers
}

/// Asks for slices, and counts the bytes that come; returns when the last came.
async fn read(
    client: &Client,
    encoding: Encoding,
    Parameters { query, compressed }: Parameters,
    received: &AtomicU64,
) -> Option<Instant> {
    let mut request = http::Request::get(format!("{SLICES}?{SELECTOR}&{query}"))
        .header("accept", encoding.accept(query.contains("watch=true")));
    if compressed {
        request = request.header("accept-encoding", "gzip");
    }
    let request = request.body(Body::empty()).expect("a request");
    let answer = client.send(request).await.expect("the server answers");
    assert!(answer.status().is_success(), "{}", answer.status());
    let (mut body, mut last) = (answer.into_body(), None);
    while let Some(Ok(frame)) = body.frame().await {
        let len = frame.data_ref().map_or(0, |data| data.len() as u64);
        received.fetch_add(len, Ordering::Relaxed);
        last = Some(now());
    }
    last
}

/// Changes a slice each, at a steady rate; returns how many.
async fn change(cluster: &Cluster, version: usize) -> u32 {
    let count = RATE * u32::try_from(LASTING.as_secs()).expect("seconds");
    let began = tokio::time::Instant::now();
    let writes = (0..count).map(|number| async move {
        tokio::time::sleep_until(began + Duration::from_secs(1) * number / RATE).await;
        let index = usize::try_from(number).expect("few") * 7919 % cluster.services;
        cluster.change(index, version).await;
    });
    futures::stream::iter(writes).buffer_unordered(16).collect::<Vec<()>>().await;
    count
}

/// What the server has used so far.
fn cpu_seconds(plane: &ControlPlane) -> f64 {
    super::proxy::cpu_seconds(plane.apiserver_id())
}

#[expect(clippy::disallowed_methods, reason = "a bench reads the clock")]
fn now() -> Instant {
    Instant::now()
}

#[expect(clippy::cast_precision_loss, reason = "a figure")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
