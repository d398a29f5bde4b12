//! A wire between the program and an API server: it passes on bytes and knows nothing of what they mean.
//! It can be led to another server, as by a balancer, and go dead while both ends believe it is open.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::spawn;

/// One end is listened on; the other is where it leads.
pub(crate) struct Wire {
    pub(crate) address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    to: SocketAddr,
    /// How often it was led elsewhere or went dead.
    turn: u32,
    /// Connections begun by now pass nothing on any more.
    dead_until: u32,
    open: Vec<TcpStream>,
}

impl Wire {
    /// Begins at an address of the namespace of this thread.
    pub(crate) fn new(at: IpAddr, to: SocketAddr) -> Self {
        let listener = TcpListener::bind((at, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Mutex::new(Shared { to, turn: 0, dead_until: 0, open: Vec::new() }));
        let theirs = shared.clone();
        // It ends with the test process, in this thread's namespace.
        spawn(move || {
            for ours in listener.incoming().flatten() {
                let to = theirs.lock().unwrap().to;
                let Ok(server) = TcpStream::connect(to) else { continue };
                let turn = {
                    let mut shared = theirs.lock().unwrap();
                    shared.open.extend([ours.try_clone().unwrap(), server.try_clone().unwrap()]);
                    shared.turn
                };
                let back = (server.try_clone().unwrap(), ours.try_clone().unwrap());
                for (from, to) in [(ours, server), back] {
                    let shared = theirs.clone();
                    spawn(move || pass(from, to, turn, &shared));
                }
            }
        });
        Self { address, shared }
    }

    /// Cuts what is open; from now on it leads there.
    pub(crate) fn lead_to(&self, server: SocketAddr) {
        let mut shared = self.shared.lock().unwrap();
        (shared.to, shared.turn) = (server, shared.turn + 1);
        for stream in shared.open.drain(..) {
            // Either side may have gone.
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    /// Whatever is open stays so, and nothing passes on it any more.
    pub(crate) fn swallow(&self) {
        let mut shared = self.shared.lock().unwrap();
        shared.turn += 1;
        shared.dead_until = shared.turn;
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, turn: u32, shared: &Mutex<Shared>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if turn >= shared.lock().unwrap().dead_until && to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    drop(to.shutdown(Shutdown::Both));
}
