//! What many nodes ask of one API server: streams of changes, as many as there are nodes, and lists. Each
//! watcher has a connection of its own, reads what comes, and looks at nothing. In JSON, and in Kubernetes'
//! protobuf, as both proxies ask; compressed, too, which a server does with lists, and with watches that
//! begin with one.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use http_body_util::BodyExt as _;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::ListParams;
use kube::client::Body;
use kube::{Api, Client};
use tokio::task::JoinSet;

use super::cluster::Cluster;
use super::control_plane::ControlPlane;
use super::report::{machine, significant};

/// Changes a second, and for how long.
const RATE: u32 = 50;
const LASTING: Duration = Duration::from_secs(10);

/// How many watch.
const CROWDS: [usize; 2] = [100, 400];

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
#[derive(Clone)]
struct Parameters {
    encoding: Encoding,
    query: String,
    compressed: bool,
}

impl Parameters {
    fn encoding(&self) -> String {
        format!("{}{}", self.encoding.name(), if self.compressed { ", gzip" } else { "" })
    }
}

/// How a watch begins.
#[derive(Clone, Copy)]
enum Beginning {
    /// Behind what is known, by a list or another watch. So all watches of nftproxy begin, and of kube-proxy
    /// all but the first.
    Resumed,
    /// With all that there is, streamed. So begins kube-proxy's first.
    Streamed,
}

/// The watches that are compared, each at every size of [`CROWDS`].
const WATCHES: [(Beginning, Encoding, bool); 5] = [
    (Beginning::Resumed, Encoding::Json, false),
    (Beginning::Resumed, Encoding::Protobuf, false),
    (Beginning::Resumed, Encoding::Protobuf, true),
    (Beginning::Streamed, Encoding::Protobuf, false),
    (Beginning::Streamed, Encoding::Protobuf, true),
];

const STREAM: &str = "watch=true&sendInitialEvents=true&allowWatchBookmarks=true&\
                      resourceVersionMatch=NotOlderThan";

/// Measures, prints and writes the table.
pub(crate) async fn run(plane: &ControlPlane, cluster: &Cluster) {
    let mut text = String::from(
        "| watchers of EndpointSlices | the watch begins | encoding | changes | bytes for each and change | \
         server's CPU for each and change | its memory for each |\n\
         | ---: | --- | --- | ---: | ---: | ---: | ---: |\n",
    );
    let changes = change(cluster, 1).await;
    let cpu = cpu_seconds(plane);
    let changes = changes.max(change(cluster, 2).await);
    let alone = (cpu_seconds(plane) - cpu) / f64::from(changes);
    let _ = writeln!(text, "| 0 | | | {changes} | | {} ms in all | |", significant(alone * 1e3));
    let mut version = 2;
    for (beginning, encoding, compressed) in WATCHES {
        for crowd in CROWDS {
            version += 1;
            let query = match beginning {
                Beginning::Resumed => {
                    let from = place(&plane.client().await).await;
                    format!("watch=true&allowWatchBookmarks=true&resourceVersion={from}")
                }
                Beginning::Streamed => STREAM.to_owned(),
            };
            let parameters = Parameters { encoding, query, compressed };
            let received = Arc::new(AtomicU64::new(0));
            let held = memory(plane).await;
            let mut watchers = watch(plane, &parameters, crowd, &received).await;
            let (before, cpu) = (received.load(Ordering::Relaxed), cpu_seconds(plane));
            let changes = change(cluster, version).await;
            quiet(&received, crowd).await;
            let bytes = received.load(Ordering::Relaxed) - before;
            let cpu = (cpu_seconds(plane) - cpu) / f64::from(changes);
            let held = memory(plane).await - held;
            let mut cut = 0;
            while watchers.try_join_next().is_some() {
                cut += 1;
            }
            watchers.shutdown().await;
            let begins = match beginning {
                Beginning::Resumed => "where it was",
                Beginning::Streamed => "with all, streamed",
            };
            let _ = write!(text, "| {crowd} | {begins} | {} | {changes} |", parameters.encoding());
            if cut > 0 {
                let _ = writeln!(text, " the server cut {cut} of them off | | |");
                continue;
            }
            let each = f64::from(u32::try_from(crowd).expect("few"));
            #[expect(clippy::cast_precision_loss, reason = "a figure")]
            let bytes = bytes as f64 / f64::from(changes) / each;
            let _ = writeln!(
                text,
                " {} | {} µs | {} kB |",
                significant(bytes),
                significant((cpu - alone) / each * 1e6),
                significant(held / each / 1e3),
            );
        }
    }
    text.push_str(
        "\n| list of EndpointSlices | encoding | bytes | took | server's CPU |\n\
         | --- | --- | ---: | ---: | ---: |\n",
    );
    for (how, query) in [
        ("at once", "resourceVersion=0".to_owned()),
        ("streamed", format!("{STREAM}&timeoutSeconds=3")),
    ] {
        for (encoding, compressed) in
            [(Encoding::Json, false), (Encoding::Protobuf, false), (Encoding::Protobuf, true)]
        {
            let (cpu, began) = (cpu_seconds(plane), now());
            let received = Arc::new(AtomicU64::new(0));
            let client = plane.client().await;
            let parameters = Parameters { encoding, query: query.clone(), compressed };
            let body = ask(&client, &parameters).await;
            let last = read(body, &received).await.unwrap_or(began);
            let _ = writeln!(
                text,
                "| {how} | {} | {} MB | {} s | {} s |",
                parameters.encoding(),
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

/// So many watchers, each of which has been granted its watch and has nothing left to read.
async fn watch(
    plane: &ControlPlane,
    parameters: &Parameters,
    crowd: usize,
    received: &Arc<AtomicU64>,
) -> JoinSet<()> {
    let mut watchers = JoinSet::new();
    for _ in 0..crowd {
        let client = plane.client().await;
        let (body, received) = (ask(&client, parameters).await, received.clone());
        watchers.spawn(async move {
            read(body, &received).await;
        });
    }
    quiet(received, crowd).await;
    watchers
}

/// Waits until a server that may be behind has sent everything but bookmarks.
async fn quiet(received: &AtomicU64, crowd: usize) {
    let little = 20 * crowd as u64;
    loop {
        let before = received.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(1)).await;
        if received.load(Ordering::Relaxed) - before < little {
            return;
        }
    }
}

/// Asks for slices.
async fn ask(client: &Client, parameters: &Parameters) -> Body {
    let Parameters { encoding, query, compressed } = parameters;
    let mut request = http::Request::get(format!("{SLICES}?{SELECTOR}&{query}"))
        .header("accept", encoding.accept(query.contains("watch=true")));
    if *compressed {
        request = request.header("accept-encoding", "gzip");
    }
    let request = request.body(Body::empty()).expect("a request");
    let answer = client.send(request).await.expect("the server answers");
    assert!(answer.status().is_success(), "{}", answer.status());
    answer.into_body()
}

/// Counts the bytes that come; returns when the last came.
async fn read(mut body: Body, received: &AtomicU64) -> Option<Instant> {
    let mut last = None;
    while let Some(Ok(frame)) = body.frame().await {
        let len = frame.data_ref().map_or(0, |data| data.len() as u64);
        received.fetch_add(len, Ordering::Relaxed);
        last = Some(now());
    }
    last
}

/// Where a watch can go on from now.
async fn place(client: &Client) -> String {
    let slices = Api::<EndpointSlice>::all(client.clone());
    let list = slices.list(&ListParams::default().limit(1)).await.expect("a list");
    list.metadata.resource_version.expect("a list has a version")
}

/// Bytes that the server holds: what a collection leaves of its heap, and its stacks. (What is resident follows
/// that, but late, and by tens of megabytes at a time.)
async fn memory(plane: &ControlPlane) -> f64 {
    let client = plane.client().await;
    let get = async |path: &str| {
        let request = http::Request::get(path).body(Vec::new()).expect("a request");
        client.request_text(request).await.unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    get("/debug/pprof/heap?gc=1&debug=1").await;
    let metrics = get("/metrics").await;
    ["go_memstats_heap_alloc_bytes ", "go_memstats_stack_inuse_bytes "]
        .map(|name| {
            let line = metrics.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|said| said.parse::<f64>().ok()).expect("the server says so")
        })
        .iter()
        .sum()
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
