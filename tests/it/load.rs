//! Clients that connect without a pause, and connections that stay, while something is done to the program or its
//! tables. What is lost, refused or begun twice is counted, by the kernel as well.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nftproxy::model::Family;

use crate::flips::{connect, vip};
use crate::net::{Net, enter, in_netns, ip, ip_batch_in, tcp_counter};

/// An address of its own that a client connects from, each time from another port; and where to.
pub(crate) type Dialled = (IpAddr, SocketAddr);

#[derive(Default)]
pub(crate) struct Progress {
    pub(crate) connections: AtomicU64,
    failures: Mutex<BTreeMap<String, u64>>,
    pub(crate) changes: AtomicU64,
    pub(crate) stop: AtomicBool,
}

/// Clients that connect; and connections that stay, one of each family.
pub(crate) struct Load {
    netns: String,
    pub(crate) progress: Arc<Progress>,
    threads: Vec<JoinHandle<()>>,
    repeated: u64,
    refused: u64,
    established: Vec<(TcpStream, BufReader<TcpStream>)>,
}

/// Refusals that a namespace was sent by ICMP, of both families.
pub(crate) fn refusals(netns: &str) -> u64 {
    in_netns(netns, || {
        let read = |file| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
        let v4 = read("snmp");
        let mut rows = v4.lines().filter(|line| line.starts_with("Icmp:"));
        let (names, values) = (rows.next().unwrap(), rows.next().unwrap());
        let mut pairs = names.split_whitespace().zip(values.split_whitespace());
        let (_, v4) = pairs.find(|(name, _)| *name == "InDestUnreachs").unwrap();
        let v6 = read("snmp6");
        let v6 = v6.lines().find_map(|line| line.strip_prefix("Icmp6InDestUnreachs")).unwrap();
        [v4, v6].map(|count| count.trim().parse::<u64>().unwrap()).iter().sum()
    })
}

fn repeated_syns(netns: &str) -> u64 {
    tcp_counter(netns, "TCPSynRetrans")
}

/// What became of all connections.
pub(crate) struct Outcome {
    pub(crate) connections: u64,
    /// SYNs that were sent again.
    pub(crate) repeated: u64,
}

impl Load {
    /// Has each client connect, with a pause behind each connection. Port 81 of the Service is where connections
    /// stay.
    pub(crate) fn start(net: &Net, dialled: &[Dialled], pause: Duration) -> Self {
        let netns = net.name("client");
        let open = |family| {
            let to = SocketAddr::new(ip(vip(family)), 81);
            let stream = in_netns(&netns, || TcpStream::connect(to).unwrap());
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            reader.read_line(&mut String::new()).unwrap();
            (stream, reader)
        };
        let established = Family::BOTH.map(open).into();
        let progress = Arc::new(Progress::default());
        let (repeated, refused) = (repeated_syns(&netns), refusals(&netns));
        let threads = dialled.iter().map(|&(from, to)| {
            let (netns, progress) = (netns.clone(), progress.clone());
            std::thread::spawn(move || {
                enter(&netns);
                dial(from, to, pause, &progress);
            })
        });
        let threads = threads.collect();
        Self { netns, progress, threads, repeated, refused, established }
    }

    /// Ends, and panics if any connection failed, was refused or began twice. How many there were.
    pub(crate) fn none_failed(self) -> u64 {
        let Outcome { connections, repeated } = self.none_refused();
        assert_eq!(repeated, 0, "of {connections}");
        connections
    }

    /// Ends, and panics if any connection failed or was refused. What is refused need not fail: TCP begins it again
    /// a second later, if the refusal is there before it has let go of the socket.
    pub(crate) fn none_refused(mut self) -> Outcome {
        self.progress.stop.store(true, Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
        let connections = self.progress.connections.load(Relaxed);
        let failures = self.progress.failures.lock().unwrap().clone();
        let repeated = repeated_syns(&self.netns) - self.repeated;
        let refused = refusals(&self.netns) - self.refused;
        eprintln!(
            "{connections} connections, {failures:?}, {repeated} SYNs sent again, {refused} refused"
        );
        assert_eq!((failures.len(), refused), (0, 0), "{failures:?} of {connections}");
        for (stream, reader) in &mut self.established {
            stream.write_all(b"still there?\n").unwrap();
            assert!(reader.read_line(&mut String::new()).unwrap() > 0, "it was closed");
        }
        Outcome { connections, repeated }
    }
}

/// Gives the client's namespace an address that clients connect from.
pub(crate) fn source(net: &Net, address: &str) -> IpAddr {
    let from = ip(address);
    let length = if from.is_ipv4() { 24 } else { 64 };
    ip_batch_in(&net.name("client"), &format!("addr replace {address}/{length} dev eth0 nodad\n"));
    from
}

fn dial(from: IpAddr, to: SocketAddr, pause: Duration, progress: &Progress) {
    // A port comes again after a minute or so; what is remembered of its last use is gone by then.
    for port in (2_000..64_000).cycle() {
        if progress.stop.load(Relaxed) {
            return;
        }
        if let Err(error) = connect(SocketAddr::new(from, port), to) {
            *progress.failures.lock().unwrap().entry(error.to_string()).or_default() += 1;
        }
        progress.connections.fetch_add(1, Relaxed);
        std::thread::sleep(pause);
    }
}
