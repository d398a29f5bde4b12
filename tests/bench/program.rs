//! How long it takes to program the kernel: from model values, through the real path, into an empty
//! network namespace; beside the bare kernel time, which is one `sendmsg` of the very same bytes,
//! encoded before, into another empty namespace.
//!
//! `cargo bench --bench program -- [SERVICES ENDPOINTS]`, as root. Absolute times differ from machine
//! to machine; the ratio to the bare kernel is the figure. `--quick` runs a small size, to see that
//! it works.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]
#![expect(clippy::disallowed_methods, reason = "a bench reads the clock")]

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use nftproxy::model::{
    Endpoint, EndpointSlice, Event, Family, Kind, NamespacedName, NodeFacts, Protocol, Scheduler,
    Service, ServicePort, SessionAffinity, SlicePort, TrafficPolicy,
};
use nftproxy::nft::diff::diff;
use nftproxy::nft::kernel::Loaded;
use nftproxy::nft::netlink::NetlinkKernel;
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
        "{:>13} {:>9} {:>9} {:>6} {:>9} {:>9} {:>9} {:>9} {:>8}",
        "size", "sync", "bare", "ratio", "bytes", "+1 p50", "+1 p99", "swap p50", "RSS"
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

fn proxy(kernel: NetlinkKernel) -> Proxy<NetlinkKernel> {
    Proxy::new(State::new(Settings::default(), NodeFacts::default()), kernel)
}

fn feed(proxy: &mut Proxy<NetlinkKernel>, services: usize, endpoints: usize) {
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

fn measure(services: usize, endpoints: usize) {
    let mut proxy = proxy(namespace());
    feed(&mut proxy, services, endpoints);
    let began = Instant::now();
    let done = proxy.commit().expect("the first commit");
    let sync = began.elapsed();
    let resident = resident_mib();

    // One endpoint more, then one less, in a Service after the other.
    let (mut more, mut swapped) = (Vec::new(), Vec::new());
    for change in 0..CHANGES.min(services) {
        let index = change * services / CHANGES.min(services);
        more.push(timed(&mut proxy, slice(index, endpoints, 0, endpoints + 1)));
        timed(&mut proxy, slice(index, endpoints, 0, endpoints));
        swapped.push(timed(&mut proxy, slice(index, endpoints, 1, endpoints)));
    }

    let bare = bare(services, endpoints);
    more.sort();
    swapped.sort();
    println!(
        "{:>13} {:>9} {:>9} {:>6.2} {:>9} {:>9} {:>9} {:>9} {:>5} MiB",
        format!("{services} x {endpoints}"),
        millis(sync),
        millis(bare),
        sync.as_secs_f64() / bare.as_secs_f64(),
        done.applied.bytes,
        millis(more[more.len() / 2]),
        millis(more[more.len() * 99 / 100]),
        millis(swapped[swapped.len() / 2]),
        resident,
    );
}

/// From the event to the end of the commit.
fn timed(proxy: &mut Proxy<NetlinkKernel>, slice: EndpointSlice) -> Duration {
    let began = Instant::now();
    proxy.observe(Event::EndpointSlice(slice));
    let done = proxy.commit().expect("a small commit");
    let took = began.elapsed();
    assert!(done.operations > 0 && !done.adopted, "a change must be a change");
    took
}

/// The same first batch, encoded before, into another empty namespace.
fn bare(services: usize, endpoints: usize) -> Duration {
    let mut kernel = namespace();
    let mut proxy = proxy(NetlinkKernel::open().expect("a netlink socket"));
    feed(&mut proxy, services, endpoints);
    let bytes = NetlinkKernel::encode(&diff(&Loaded::default(), &proxy.wanted()));
    drop(proxy);
    let began = Instant::now();
    kernel.send_encoded(&bytes).expect("the bare batch");
    began.elapsed()
}

fn millis(duration: Duration) -> String {
    format!("{:.3} ms", duration.as_secs_f64() * 1e3)
}

/// Resident memory of this process.
fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a VmRSS line");
    let kib: u64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number");
    kib / 1024
}
