//! How long it takes to program the kernel: from model values, through the real path, into an empty
//! network namespace; beside the bare kernel time, which is one `sendmsg` of the very same bytes,
//! encoded before, into another empty namespace.
//!
//! The same for a small change: one endpoint more (`+1`), which changes a verdict, so that the kernel
//! walks all of them again; and one endpoint in the place of another (`swap`).
//!
//! `mixed` is 2,000 Services of all kinds, with node ports, affinity and source ranges ([`objects`]); for it,
//! what an update takes is shown by kind, too.
//!
//! `cargo bench --bench program -- [SERVICES ENDPOINTS | mixed]`, as root. Absolute times differ from machine
//! to machine; the ratio to the bare kernel is the figure. `--quick` runs a small size, to see that
//! it works.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]
#![expect(unsafe_code, reason = "an allocator that counts is one")]
#![expect(clippy::disallowed_methods, reason = "a bench reads the clock")]

#[path = "program/objects.rs"]
mod objects;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nftproxy::model::{Event, Kind, NodeFacts};
use nftproxy::nft::dataplane::Options;
use nftproxy::nft::kernel::{Applied, ApplyError, Kernel, LoadError, Loaded};
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::nft::transaction::Transaction;
use nftproxy::reconcile::Proxy;
use nftproxy::settings::Settings;
use nftproxy::state::State;
use nix::sched::{CloneFlags, unshare};

use self::objects::{Size, What};

/// How often a small change is measured.
const CHANGES: usize = 200;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let sizes = match &arguments[..] {
        [quick] if quick == "--quick" => vec![Size::plain(500, 3), Size::mixed(100)],
        [mixed] if mixed == "mixed" => vec![Size::mixed(2_000)],
        [services, endpoints] => vec![Size::plain(number(services), number(endpoints))],
        _ => vec![
            Size::plain(1_000, 10),
            Size::plain(10_000, 5),
            Size::plain(5_000, 50),
            Size::plain(45_000, 1),
            Size::mixed(2_000),
        ],
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
    for size in sizes {
        // A process of its own for each size, so that memory figures are its own.
        if arguments.len() == 2 || arguments.len() == 1 {
            measure(size);
        } else {
            let program = std::env::current_exe().expect("the path of this program");
            let run = std::process::Command::new(program)
                .args(size.arguments())
                .output()
                .expect("starting a measurement");
            let text = String::from_utf8_lossy(&run.stdout);
            for line in text.lines().skip(1) {
                println!("{line}");
            }
            eprint!("{}", String::from_utf8_lossy(&run.stderr));
            assert!(run.status.success(), "measuring {size:?} failed");
        }
    }
}

fn number(text: &str) -> usize {
    text.parse().expect("SERVICES and ENDPOINTS are numbers")
}

fn proxy<K: Kernel>(kernel: K) -> Proxy<K> {
    Proxy::new(State::new(Settings::default(), NodeFacts::default()), kernel)
}

fn feed<K: Kernel>(proxy: &mut Proxy<K>, size: Size) {
    for index in 0..size.services {
        proxy.observe(Event::Service(size.service(index)));
        proxy.observe(Event::EndpointSlice(size.slice(index, 0, size.endpoints)));
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
    updates: Updates,
}

/// By what happened to which kind of Service.
type Updates = BTreeMap<(&'static str, What), Vec<Took>>;

fn measure(size: Size) {
    let mut run = Run::default();
    let mut proxy = proxy(namespace());
    feed(&mut proxy, size);
    let began = Instant::now();
    run.bytes = proxy.commit().expect("the first commit").applied.bytes;
    run.sync = began.elapsed();
    let (resident, peak) = (memory("VmRSS:"), memory("VmHWM:"));

    let mut allocations = BTreeMap::<What, usize>::new();
    update(&mut proxy, size, |_, kind, what, took| {
        let most = allocations.entry(what).or_default();
        *most = took.allocations.max(*most);
        run.updates.entry((kind, what)).or_default().push(took);
    });
    drop(proxy);

    let mut bare = bare(size);
    assert_eq!(run.bytes, bare.bytes, "the bare kernel gets the very same batch");
    for took in run.updates.values_mut().chain(bare.updates.values_mut()) {
        took.sort();
    }
    let all = |run: &Run, what: What| {
        let of = run.updates.iter().filter(|((_, is), _)| *is == what);
        let mut all: Vec<_> = of.flat_map(|(_, took)| took).copied().collect();
        all.sort();
        all
    };
    let [more, bare_more] = [&run, &bare].map(|run| all(run, What::EndpointMore));
    let [other, bare_other] = [&run, &bare].map(|run| all(run, What::EndpointOther));
    println!(
        "{:>10} | {:>9} {:>9} {:>5.2} {:>8} | {:>8} {:>8} {:>8} {:>6} | {:>8} {:>8} {:>6} | {:>7.1} {:>7.1}",
        size.to_string(),
        millis(run.sync),
        millis(bare.sync),
        run.sync.as_secs_f64() / bare.sync.as_secs_f64(),
        run.bytes,
        millis(half(&more)),
        millis(half(&bare_more)),
        millis(more[more.len() * 99 / 100].time),
        allocations[&What::EndpointMore],
        millis(half(&other)),
        millis(half(&bare_other)),
        allocations[&What::EndpointOther],
        resident,
        peak,
    );
    if size.mixed {
        print_by_kind(&run.updates, &bare.updates);
    }
}

/// What half of them took at most.
fn half(sorted: &[Took]) -> Duration {
    sorted[sorted.len() / 2].time
}

/// Of each kind of Service: half of the updates took no more than the first number, the bare kernel no more than
/// the second for the same, and no update more than the third.
fn print_by_kind(updates: &Updates, bare: &Updates) {
    println!("\n| kind of Service | {} |", What::ALL.map(|what| what.to_string()).join(" | "));
    println!("| --- |{}", " ---: |".repeat(What::ALL.len()));
    for kind in updates.keys().map(|(kind, _)| *kind).collect::<BTreeSet<_>>() {
        let cells = What::ALL.map(|what| {
            let Some(took) = updates.get(&(kind, what)) else { return String::new() };
            let most = took.last().expect("there is one");
            let bare = half(&bare[&(kind, what)]);
            format!("{:.2} ({:.2}) {:.2}", ms(half(took)), ms(bare), ms(most.time))
        });
        println!("| {kind} | {} |", cells.join(" | "));
    }
    let most = updates.values().flatten().map(|took| took.ran).max().expect("there is one");
    println!("\nNone of them ran for more than {} ms.", millis(most));
}

/// Does to one Service after the other what can happen to it, and tells of each. Of a mixture, to all.
fn update<K: Kernel>(
    proxy: &mut Proxy<K>,
    size: Size,
    mut note: impl FnMut(&mut Proxy<K>, &'static str, What, Took),
) {
    let count = if size.mixed { size.services } else { CHANGES.min(size.services) };
    for change in 0..count {
        let index = change * size.services / count;
        for (what, event) in size.changes(index) {
            let done = timed(proxy, event);
            note(proxy, size.kind(index), what, done);
            // The program waits longer than an endpoint takes to come back.
            if matches!(what, What::Gone | What::There) && proxy.has_idle() {
                let took = took(|| {
                    proxy.collect_idle().expect("a collection");
                });
                note(proxy, size.kind(index), What::Collected, took);
            }
        }
    }
}

/// What an update took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Took {
    time: Duration,
    /// Of which this thread ran, in the program or in the kernel. Where the two differ, it waited, or others
    /// had the processor.
    ran: Duration,
    allocations: usize,
}

/// From the event to the end of the commit.
fn timed<K: Kernel>(proxy: &mut Proxy<K>, event: Event) -> Took {
    took(|| {
        proxy.observe(event);
        let done = proxy.commit().expect("a small commit");
        assert!(done.operations > 0 && !done.adopted, "a change must be a change");
    })
}

fn took(what: impl FnOnce()) -> Took {
    let (began, ran_before) = (Instant::now(), ran());
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    what();
    Took {
        time: began.elapsed(),
        ran: ran().saturating_sub(ran_before),
        allocations: ALLOCATIONS.load(Ordering::Relaxed) - before,
    }
}

/// For how long this thread has run.
fn ran() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it writes the one structure that it is given.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(done, 0, "every thread has a clock");
    let nanoseconds = time.tv_sec * 1_000_000_000 + time.tv_nsec;
    Duration::from_nanos(u64::try_from(nanoseconds).expect("a time since the start"))
}

/// Takes every transaction and keeps its bytes. A commit can be two: new chains that something else is led to
/// go ahead.
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

    fn apply_to_stand_in(&mut self, _: &Transaction) -> Result<Applied, ApplyError> {
        unreachable!("it has no tables to replace")
    }

    fn let_packets_pass(&mut self) {}
}

/// The same batches, encoded before, into another empty namespace.
fn bare(size: Size) -> Run {
    let mut proxy = proxy(Recorder::default());
    feed(&mut proxy, size);
    proxy.commit().expect("a recorder takes everything");
    let first = std::mem::take(&mut proxy.kernel_mut().0);
    let mut updates = Vec::new();
    update(&mut proxy, size, |proxy, kind, what, _| {
        updates.push((kind, what, std::mem::take(&mut proxy.kernel_mut().0)));
    });
    drop(proxy);

    let mut kernel = namespace();
    let mut send = |batches: Vec<Vec<u8>>| {
        took(|| {
            for bytes in batches {
                kernel.send_encoded(&bytes).expect("the bare batch");
            }
        })
    };
    let bytes = first.iter().map(Vec::len).sum();
    let mut run = Run { sync: send(first).time, bytes, ..Run::default() };
    for (kind, what, batches) in updates {
        run.updates.entry((kind, what)).or_default().push(send(batches));
    }
    run
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn millis(duration: Duration) -> String {
    format!("{:.3}", ms(duration))
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
