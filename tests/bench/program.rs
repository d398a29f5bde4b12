//! How long it takes to program the kernel: from model values, through the real path, into an empty
//! network namespace; beside the bare kernel time, which is one `sendmsg` of the very same bytes,
//! encoded before, into another empty namespace.
//!
//! The same for a small change: one endpoint more (`+1`), which changes a verdict, so that the kernel
//! walks all of them again; and one endpoint in the place of another (`swap`).
//!
//! `cargo bench --bench program -- [SERVICES ENDPOINTS]`, as root. Absolute times differ from machine
//! to machine; the ratio to the bare kernel is the figure. `--quick` runs a small size, to see that
//! it works.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]
#![expect(unsafe_code, reason = "an allocator that counts is one")]
#![expect(clippy::disallowed_methods, reason = "a bench reads the clock")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nftproxy::model::{
    Endpoint, EndpointSlice, Event, Family, Kind, NamespacedName, NodeFacts, Protocol, Scheduler,
    Service, ServicePort, SessionAffinity, SlicePort, TrafficPolicy,
};
use nftproxy::nft::dataplane::Options;
use nftproxy::nft::kernel::{Applied, ApplyError, Kernel, LoadError, Loaded};
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::nft::transaction::Transaction;
use nftproxy::reconcile::Proxy;
use nftproxy::settings::Settings;
use nftproxy::state::State;
use nix::sched::{CloneFlags, unshare};

/// How often a small change is measured.
const CHANGES: usize = 200;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let sizes = match &arguments[..] {
        [quick] if quick == "--quick" => vec![(500, 3)],
        [services, endpoints] => vec![(number(services), number(endpoints))],
        _ => vec![(1_000, 10), (10_000, 5), (5_000, 50), (45_000, 1)],
    };
    println!(
        "{:>10} | {:>9} {:>9} {:>5} {:>8} | {:>8} {:>8} {:>8} {:>6} | {:>8} {:>8} {:>6} | {:>7} {:>7}",
        "size",
        "sync ms",
        "bare ms",
        "ratio",
        "bytes",
        "+1 p50",
        "bare p50",
        "p99 ms",
        "allocs",
        "swap p50",
        "bare p50",
        "allocs",
        "RSS MB",
        "peak MB",
    );
    for (services, endpoints) in sizes {
        // A process of its own for each size, so that memory figures are its own.
        if arguments.len() == 2 || arguments.len() == 1 {
            measure(services, endpoints);
        } else {
            let program = std::env::current_exe().expect("the path of this program");
            let run = std::process::Command::new(program)
                .args([services.to_string(), endpoints.to_string()])
                .output()
                .expect("starting a measurement");
            let text = String::from_utf8_lossy(&run.stdout);
            for line in text.lines().skip(1) {
                println!("{line}");
            }
            eprint!("{}", String::from_utf8_lossy(&run.stderr));
            assert!(run.status.success(), "measuring {services} x {endpoints} failed");
        }
    }
}

fn number(text: &str) -> usize {
    text.parse().expect("SERVICES and ENDPOINTS are numbers")
}

fn name(index: usize) -> NamespacedName {
    NamespacedName::new("default", &format!("service-{index}"))
}

fn service(index: usize) -> Service {
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 1)) + bits(index));
    Service {
        name: name(index),
        created: 0,
        cluster_ips: vec![address.into()],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Cluster,
        session_affinity: SessionAffinity::None,
        source_ranges: Vec::new(),
        scheduler: Scheduler::Random,
        health_check_node_port: None,
    }
}

fn bits(index: usize) -> u32 {
    u32::try_from(index).expect("fewer than 4 billion")
}

/// The slice of a Service with endpoints `first .. first + count`.
fn slice(index: usize, per_service: usize, first: usize, count: usize) -> EndpointSlice {
    let base = u32::from(Ipv4Addr::new(10, 128, 0, 1)) + bits(index * (per_service + 8));
    let endpoint = |n: usize| Endpoint {
        address: Ipv4Addr::from(base + bits(n)).into(),
        ready: true,
        serving: true,
        terminating: false,
        local: n == 0 && index.is_multiple_of(100),
        weight: 1,
        hints: None,
    };
    EndpointSlice {
        name: NamespacedName::new("default", &format!("service-{index}-abcde")),
        service: name(index),
        family: Family::V4,
        ports: vec![SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: (first..first + count).map(endpoint).collect(),
        last_change_trigger: None,
    }
}

fn proxy<K: Kernel>(kernel: K) -> Proxy<K> {
    Proxy::new(State::new(Settings::default(), NodeFacts::default()), kernel)
}

fn feed<K: Kernel>(proxy: &mut Proxy<K>, services: usize, endpoints: usize) {
    for index in 0..services {
        proxy.observe(Event::Service(service(index)));
        proxy.observe(Event::EndpointSlice(slice(index, endpoints, 0, endpoints)));
    }
    for kind in Kind::ALL {
        proxy.observe(Event::Listed(kind));
    }
}

fn namespace() -> NetlinkKernel {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (needs root)");
    NetlinkKernel::open().expect("a netlink socket")
}

/// What one size took, through the program or bare.
#[derive(Default)]
struct Run {
    sync: Duration,
    bytes: usize,
    more: Vec<Duration>,
    swapped: Vec<Duration>,
}

fn measure(services: usize, endpoints: usize) {
    let mut run = Run::default();
    let mut proxy = proxy(namespace());
    feed(&mut proxy, services, endpoints);
    let began = Instant::now();
    run.bytes = proxy.commit().expect("the first commit").applied.bytes;
    run.sync = began.elapsed();
    let (resident, peak) = (memory("VmRSS:"), memory("VmHWM:"));

    let (mut more_allocations, mut swap_allocations) = (0, 0);
    for [more, less, swap] in changes(services, endpoints) {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        run.more.push(timed(&mut proxy, more));
        more_allocations = more_allocations.max(ALLOCATIONS.load(Ordering::Relaxed) - before);
        timed(&mut proxy, less);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        run.swapped.push(timed(&mut proxy, swap));
        swap_allocations = swap_allocations.max(ALLOCATIONS.load(Ordering::Relaxed) - before);
    }
    drop(proxy);

    let mut bare = bare(services, endpoints);
    assert_eq!(run.bytes, bare.bytes, "the bare kernel gets the very same batch");
    for times in [&mut run.more, &mut run.swapped, &mut bare.more, &mut bare.swapped] {
        times.sort();
    }
    println!(
        "{:>10} | {:>9} {:>9} {:>5.2} {:>8} | {:>8} {:>8} {:>8} {:>6} | {:>8} {:>8} {:>6} | {:>7.1} {:>7.1}",
        format!("{services}x{endpoints}"),
        millis(run.sync),
        millis(bare.sync),
        run.sync.as_secs_f64() / bare.sync.as_secs_f64(),
        run.bytes,
        millis(run.more[run.more.len() / 2]),
        millis(bare.more[bare.more.len() / 2]),
        millis(run.more[run.more.len() * 99 / 100]),
        more_allocations,
        millis(run.swapped[run.swapped.len() / 2]),
        millis(bare.swapped[bare.swapped.len() / 2]),
        swap_allocations,
        resident,
        peak,
    );
}

/// In one Service after the other: one endpoint more, one less, one in the place of another.
fn changes(services: usize, endpoints: usize) -> impl Iterator<Item = [EndpointSlice; 3]> {
    let count = CHANGES.min(services);
    (0..count).map(move |change| {
        let index = change * services / count;
        [(0, endpoints + 1), (0, endpoints), (1, endpoints)]
            .map(|(first, count)| slice(index, endpoints, first, count))
    })
}

/// From the event to the end of the commit.
fn timed<K: Kernel>(proxy: &mut Proxy<K>, slice: EndpointSlice) -> Duration {
    let began = Instant::now();
    proxy.observe(Event::EndpointSlice(slice));
    let done = proxy.commit().expect("a small commit");
    let took = began.elapsed();
    assert!(done.operations > 0 && !done.adopted, "a change must be a change");
    took
}

/// Takes every transaction and keeps its bytes. New chains go ahead of the change that needs them, so
/// that a commit can be two.
#[derive(Default)]
struct Recorder(Vec<Vec<u8>>);

impl Kernel for Recorder {
    fn load(&mut self, _: &Options) -> Result<Loaded, LoadError> {
        Ok(Loaded::default())
    }

    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, ApplyError> {
        self.0.push(NetlinkKernel::encode(transaction));
        Ok(Applied::default())
    }
}

/// The same batches, encoded before, into another empty namespace.
fn bare(services: usize, endpoints: usize) -> Run {
    let mut proxy = proxy(Recorder::default());
    feed(&mut proxy, services, endpoints);
    proxy.commit().expect("a recorder takes everything");
    let mut commits = vec![std::mem::take(&mut proxy.kernel_mut().0)];
    for slice in changes(services, endpoints).flatten() {
        timed(&mut proxy, slice);
        commits.push(std::mem::take(&mut proxy.kernel_mut().0));
    }
    drop(proxy);

    let mut kernel = namespace();
    let mut send = |batches: &Vec<Vec<u8>>| {
        let began = Instant::now();
        for bytes in batches {
            kernel.send_encoded(bytes).expect("the bare batch");
        }
        began.elapsed()
    };
    let (first, others) = commits.split_first().expect("the first commit");
    let bytes = first.iter().map(Vec::len).sum();
    let mut run = Run { sync: send(first), bytes, ..Run::default() };
    for change in others.chunks(3) {
        let [more, less, swap] = change else { unreachable!("three changes of each Service") };
        run.more.push(send(more));
        send(less);
        run.swapped.push(send(swap));
    }
    run
}

fn millis(duration: Duration) -> String {
    format!("{:.3}", duration.as_secs_f64() * 1e3)
}

/// A figure of this process's memory, in MB.
fn memory(name: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let line = status.lines().find(|line| line.starts_with(name)).expect("the line is there");
    let kib = line.split_whitespace().nth(1).and_then(|n| n.parse::<u32>().ok()).expect("a number");
    f64::from(kib) * 1024.0 / 1e6
}

/// Allocations since the start, by Rust code; those of libnftnl are not seen.
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}
