//! What clients have of a Service: bytes a second, and requests and answers, over connections that stay and over
//! a new one for each. The ways to an endpoint take turns, so that whatever else the machine does is the same
//! for all.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::field::Field;
use super::packets::quantile;

/// A request, and an answer.
const MESSAGE: [u8; 64] = [7; 64];

/// Connections at once, each with a request under way.
pub(crate) const KEPT: usize = 8;

/// Clients at once that make a connection for each request.
pub(crate) const CLIENTS: usize = 4;

/// For how long the servers wait before they look whether they are still needed.
const LOOK: Duration = Duration::from_millis(50);

/// Gigabits a second of one connection from the outside, by way of each address.
#[expect(clippy::disallowed_methods, reason = "a bench reads the clock")]
pub(crate) fn throughput<const N: usize>(
    field: &Field,
    to: [SocketAddr; N],
    rounds: u32,
    each: Duration,
) -> [f64; N] {
    while_served(field, 1, swallow, || {
        medians((0..rounds).flat_map(|_| 0..N), |way| {
            let mut stream = TcpStream::connect(to[way]).expect("a connection by the Service");
            let (data, mut sent, began) = (vec![0; 128 << 10], 0_u64, Instant::now());
            while began.elapsed() < each {
                sent += stream.write(&data).expect("writing") as u64;
            }
            #[expect(clippy::cast_precision_loss, reason = "a figure")]
            let rate = sent as f64 * 8.0 / 1e9 / began.elapsed().as_secs_f64();
            rate
        })
    })
}

/// Requests a second over established connections, by way of each address. Every turn has connections of its own,
/// and each way is first in turn: which processors clients and servers come to sit on makes more of a difference
/// than the way.
#[expect(clippy::disallowed_methods, reason = "a bench reads the clock")]
pub(crate) fn kept<const N: usize>(
    field: &Field,
    to: [SocketAddr; N],
    rounds: u32,
    each: Duration,
) -> [f64; N] {
    let turn = |way: usize| {
        let mut connections = [to[way]; KEPT].map(connect);
        let (mut answered, began) = (0, Instant::now());
        while began.elapsed() < each {
            for connection in &mut connections {
                connection.write_all(&MESSAGE).expect("a request");
            }
            for connection in &mut connections {
                answer(connection);
                answered += 1;
            }
        }
        f64::from(answered) / began.elapsed().as_secs_f64()
    };
    let each_first = |_| (0..N).flat_map(|first| (0..N).cycle().skip(first).take(N));
    while_served(field, KEPT, echo, || medians((0..rounds).flat_map(each_first), turn))
}

/// Requests a second with a connection for each, by way of the addresses of each list. The node forgets the
/// connections behind every turn: what it remembers of one way is not to be at the cost of the next.
#[expect(clippy::disallowed_methods, reason = "a bench reads the clock")]
pub(crate) fn single<const N: usize>(
    field: &Field,
    to: &[Vec<SocketAddr>; N],
    rounds: u32,
    each: Duration,
) -> [f64; N] {
    medians((0..rounds).flat_map(|_| 0..N), |way| {
        let to = &to[way];
        let rate = while_served(field, CLIENTS, echo, || {
            let began = Instant::now();
            let client = |number: usize| {
                let (mut answered, mut to) = (0, to.iter().cycle().skip(number));
                while began.elapsed() < each {
                    let mut connection = connect(*to.next().expect("there are some"));
                    connection.write_all(&MESSAGE).expect("a request");
                    answer(&mut connection);
                    answered += 1;
                }
                answered
            };
            let answered: u32 = thread::scope(|scope| {
                let clients = (0..CLIENTS).map(|number| scope.spawn(move || client(number)));
                let clients = clients.collect::<Vec<_>>().into_iter();
                clients.map(|client| client.join().expect("a client ends")).sum()
            });
            f64::from(answered) / began.elapsed().as_secs_f64()
        });
        field.output("node", &["conntrack", "-F"]);
        rate
    })
}

/// Takes these ways in turn, and tells the middle of what each came to.
fn medians<const N: usize>(
    ways: impl Iterator<Item = usize>,
    mut turn: impl FnMut(usize) -> f64,
) -> [f64; N] {
    let mut seen = [const { Vec::new() }; N];
    ways.for_each(|way| seen[way].push(turn(way)));
    seen.map(|mut seen| quantile(&mut seen, 0.5))
}

/// Runs `body` outside while the backends serve on port 8080, so many connections at once.
fn while_served<T: Send>(
    field: &Field,
    servers: usize,
    serve: fn(TcpStream),
    body: impl FnOnce() -> T + Send,
) -> T {
    let needed = AtomicBool::new(true);
    let listener = field.within("backends", || {
        let listener = TcpListener::bind("0.0.0.0:8080").expect("a port of our own");
        SockRef::from(&listener).set_read_timeout(Some(LOOK)).expect("a socket");
        listener
    });
    thread::scope(|scope| {
        for _ in 0..servers {
            scope.spawn(|| {
                while needed.load(Ordering::Relaxed) {
                    let Ok((connection, _)) = listener.accept() else { continue };
                    connection.set_read_timeout(None).expect("a socket");
                    serve(connection);
                }
            });
        }
        let _until_here = Until(&needed);
        field.within("outside", body)
    })
}

/// A drop says that the servers are not needed any more: they would be waited for if the clients fail, too.
struct Until<'a>(&'a AtomicBool);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

fn echo(mut connection: TcpStream) {
    let mut message = MESSAGE;
    while connection.read_exact(&mut message).is_ok() && connection.write_all(&message).is_ok() {}
}

fn swallow(mut connection: TcpStream) {
    let mut buffer = vec![0; 1 << 20];
    while connection.read(&mut buffer).is_ok_and(|len| len > 0) {}
}

fn connect(to: SocketAddr) -> TcpStream {
    let connection = TcpStream::connect(to).expect("a connection");
    connection.set_nodelay(true).expect("a socket");
    connection
}

fn answer(connection: &mut TcpStream) {
    let mut message = [0; MESSAGE.len()];
    connection.read_exact(&mut message).expect("an answer");
}
