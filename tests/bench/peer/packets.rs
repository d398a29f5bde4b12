//! Packets: what a new connection costs on its way through the node, and when the first datagram
//! reaches a new endpoint.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::field::{Field, OUTSIDE};

/// SYNs that are timed together: few, so that most of the times are free of others' work.
const CHUNK: usize = 100;

/// The nodes that SYNs are sent through.
pub(crate) const WAYS: [&str; 4] = ["node", "floor", "random", "plain"];

/// Drops and counts what arrives at the backends: how they answer is nobody's business here.
const SINK: &str = "table ip sink {
    counter arrived { }
    chain prerouting {
        type filter hook prerouting priority -300
        iifname node tcp dport 8080 counter name arrived
        tcp dport 8080 tcp flags syn drop
    }
}
";

fn arrived(field: &Field) -> f64 {
    field.counted("backends", "sink", "arrived")[0]
}

/// When SYNs to all of these first arrived; None if not in time.
#[expect(clippy::disallowed_methods, reason = "a bench reads the clock")]
pub(crate) fn until_programmed(
    field: &Field,
    destinations: &[SocketAddrV4],
    patience: Duration,
) -> Option<Instant> {
    field.nft("backends", SINK);
    let (began, mut before, mut port) = (Instant::now(), 0.0, 40_000);
    let all = f64::from(u32::try_from(destinations.len()).expect("few"));
    let found = loop {
        let sent = Instant::now();
        if sent.duration_since(began) > patience {
            break None;
        }
        let once = [destinations.to_vec(), Vec::new(), Vec::new(), Vec::new()];
        field.within("outside", || send_syns(&once, port, &mut [const { Vec::new() }; 4]));
        let now = arrived(field);
        if now - before >= all {
            break Some(sent);
        }
        (before, port) = (now, if port < 60_000 { port + 1 } else { 40_000 });
        // Ever more rarely: each is a connection in the node's table for two minutes, which must not fill.
        thread::sleep(Duration::from_millis(10).max(began.elapsed() / 100));
    };
    field.nft("backends", "delete table ip sink\n");
    found
}

/// Microseconds of a SYN through each of the nodes, and the share that arrived of those through the
/// first: one for each destination, in several rounds, each connection a new one. The nodes take turns,
/// so that whatever else the machine does is the same for all.
pub(crate) fn syn_cost(
    field: &Field,
    destinations: &[Vec<SocketAddrV4>; 4],
    rounds: u16,
) -> ([f64; 4], f64) {
    static SOURCE_PORT: AtomicU16 = AtomicU16::new(1024);
    field.nft("backends", SINK);
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..rounds {
        let port = SOURCE_PORT.fetch_add(1, Ordering::Relaxed);
        field.within("outside", || send_syns(destinations, port, &mut times));
        // The tables of connections would fill.
        for node in WAYS {
            field.output(node, &["conntrack", "-F"]);
        }
    }
    let arrived = arrived(field);
    field.nft("backends", "delete table ip sink\n");
    let sent = f64::from(rounds) * f64::from(u32::try_from(destinations[0].len()).expect("few"));
    (times.map(|mut times| quantile(&mut times, 0.2)), arrived / sent)
}

#[expect(clippy::disallowed_methods, reason = "a bench reads the clock")]
fn send_syns(destinations: &[Vec<SocketAddrV4>; 4], source_port: u16, times: &mut [Vec<f64>; 4]) {
    let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))).expect("needs root");
    let source: Ipv4Addr = OUTSIDE.parse().expect("an address");
    let packets = destinations.each_ref().map(|destinations| -> Vec<_> {
        destinations.iter().map(|to| (syn(source, source_port, *to), (*to).into())).collect()
    });
    for start in (0..packets[0].len()).step_by(CHUNK) {
        for (packets, times) in packets.iter().zip(&mut *times) {
            let Some(chunk) = packets.get(start..packets.len().min(start + CHUNK)) else {
                continue;
            };
            let began = Instant::now();
            for (packet, to) in chunk {
                raw.send_to(packet, to).expect("sending a SYN");
            }
            let count = u32::try_from(chunk.len()).expect("few");
            times.push(began.elapsed().as_secs_f64() * 1e6 / f64::from(count));
        }
    }
}

/// An IPv4 packet with a SYN. The kernel fills in the IP checksum; connection tracking looks at TCP's.
fn syn(source: Ipv4Addr, source_port: u16, to: SocketAddrV4) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(source_port.to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    let mut pseudo = Vec::new();
    pseudo.extend(source.octets());
    pseudo.extend(to.ip().octets());
    pseudo.extend([0, 6, 0, 20]);
    pseudo.extend(&tcp);
    let sum: u32 = pseudo.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("folded twice");
    tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
    packet.extend(source.octets());
    packet.extend(to.ip().octets());
    packet.extend(tcp);
    packet
}

/// Sends datagrams to a Service, each a new connection, until one reaches an address.
pub(crate) struct Await {
    receiver: thread::JoinHandle<Option<Arrival>>,
}

/// The first datagram that reached the address.
pub(crate) struct Arrival {
    /// When it was sent; on its way it waits for nobody.
    pub(crate) sent: Instant,
    /// How long the sender had not sent any before: on a busy machine it has to wait for its turn, and
    /// so long nothing can be seen.
    pub(crate) blind: Duration,
}

impl Await {
    /// Starts both ends. `patience` is how long it may take.
    #[expect(clippy::disallowed_methods, reason = "a bench reads the clock")]
    pub(crate) fn start(field: &Field, by: Ipv4Addr, at: Ipv4Addr, patience: Duration) -> Self {
        let socket = field.within("backends", move || {
            UdpSocket::bind((at, 8080)).expect("an address of the backends")
        });
        socket.set_read_timeout(Some(patience)).expect("a socket");
        let outside = field.name("outside");
        let receiver = thread::spawn(move || {
            let done = std::sync::Arc::new(AtomicBool::new(false));
            let stop = done.clone();
            let began = Instant::now();
            let sender = thread::spawn(move || {
                super::field::enter(&outside);
                let mut before = 0;
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(socket) = UdpSocket::bind("0.0.0.0:0") {
                        let now = nanos(began.elapsed());
                        let times = [now, now - before].map(u64::to_ne_bytes);
                        let _ = socket.send_to(times.as_flattened(), (by, 80));
                        before = now;
                    }
                    thread::sleep(Duration::from_micros(100));
                }
            });
            let mut times = [[0; 8]; 2];
            let arrived = socket.recv(times.as_flattened_mut()).is_ok();
            done.store(true, Ordering::Relaxed);
            sender.join().expect("the sender ends");
            let [sent, blind] = times.map(|time| Duration::from_nanos(u64::from_ne_bytes(time)));
            arrived.then(|| Arrival { sent: began + sent, blind })
        });
        Self { receiver }
    }

    /// None if none arrived in time.
    pub(crate) fn arrived(self) -> Option<Arrival> {
        self.receiver.join().expect("the receiver ends")
    }
}

/// Runs `body`, and tells by how many seconds a thread that does nothing but sleep woke too late
/// meanwhile: a change waits for several threads' turns one after the other, each as late as this.
#[expect(clippy::disallowed_methods, reason = "a bench reads the clock")]
pub(crate) fn while_sleeping<T>(body: impl FnOnce() -> T) -> (T, Vec<f64>) {
    const NAP: Duration = Duration::from_millis(1);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let sleeper = scope.spawn(|| {
            let mut late = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                thread::sleep(NAP);
                late.push(began.elapsed().saturating_sub(NAP).as_secs_f64());
            }
            late
        });
        let outcome = body();
        stop.store(true, Ordering::Relaxed);
        (outcome, sleeper.join().expect("the sleeper ends"))
    })
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).expect("less than centuries")
}

/// A quantile of some figures.
pub(crate) fn quantile(figures: &mut [f64], at: f64) -> f64 {
    figures.sort_by(f64::total_cmp);
    let last = figures.len().saturating_sub(1);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index within the list"
    )]
    let index = (last as f64 * at).round() as usize;
    figures.get(index).copied().unwrap_or(f64::NAN)
}
