//! Servers that say who they are and whom they saw, and clients that ask them.
//!
//! A TCP server answers every line (and greets, so that a client need not ask); a UDP server answers
//! every datagram. SCTP has no sockets on every kernel, so its client sends an INIT chunk by hand and
//! the server answers with an INIT ACK.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockaddrStorage, recvfrom, setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::net::{enter, in_netns, patient};

/// Every server listens on these ports.
pub(crate) const PORTS: [u16; 3] = [8080, 8081, 53];

/// How long a client waits before it calls a packet lost.
pub(crate) fn patience() -> Duration {
    patient(Duration::from_millis(400))
}

/// What a client met.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// Who answered, on which port, and the source address it saw.
    Answered { by: String, port: u16, seen: IpAddr },
    /// Port unreachable.
    Refused,
    /// No answer.
    TimedOut,
}

/// Starts the servers of one pod on threads in its namespace; they are listening on return.
pub(crate) fn start(netns: &str, who: &str) {
    for port in PORTS {
        listen(netns, who, port);
    }
    let (sender, ready) = std::sync::mpsc::channel();
    for family in [Domain::IPV4, Domain::IPV6] {
        let (netns, who, sender) = (netns.to_owned(), who.to_owned(), sender.clone());
        std::thread::spawn(move || {
            enter(&netns);
            let socket = sctp_socket(family);
            sender.send(()).unwrap();
            answer_sctp(&socket, family, &who);
        });
    }
    for _ in 0..2 {
        ready.recv_timeout(patient(Duration::from_secs(5))).expect("the servers of a pod start");
    }
}

/// Starts a TCP and a UDP server on a port of all addresses; they are listening on return.
pub(crate) fn listen(netns: &str, who: &str, port: u16) {
    let (sender, ready) = std::sync::mpsc::channel();
    let (netns, who) = (netns.to_owned(), who.to_owned());
    std::thread::spawn(move || {
        enter(&netns);
        let tcp = TcpListener::bind(("::", port)).unwrap();
        let udp = UdpSocket::bind(("::", port)).unwrap();
        let name = who.clone();
        std::thread::spawn(move || answer_udp(&udp, &name, port));
        sender.send(()).unwrap();
        for stream in tcp.incoming().flatten() {
            answer_tcp(stream, &who, port);
        }
    });
    ready.recv_timeout(patient(Duration::from_secs(5))).expect("a server starts");
}

fn greeting(who: &str, port: u16, peer: SocketAddr) -> String {
    format!("{who} {port} {}\n", peer.ip().to_canonical())
}

fn answer_tcp(mut stream: TcpStream, who: &str, port: u16) {
    let Ok(peer) = stream.peer_addr() else { return };
    let text = greeting(who, port, peer);
    if stream.write_all(text.as_bytes()).is_err() || port != 8081 {
        return;
    }
    // On this port connections stay.
    std::thread::spawn(move || {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        while let Some(Ok(_)) = lines.next() {
            if stream.write_all(text.as_bytes()).is_err() {
                return;
            }
        }
    });
}

fn answer_udp(socket: &UdpSocket, who: &str, port: u16) {
    let mut buffer = [0; 64];
    while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
        // A peer that is gone is no reason to stop.
        drop(socket.send_to(greeting(who, port, peer).as_bytes(), peer));
    }
}

fn parsed(text: &str) -> Outcome {
    let mut words = text.split_whitespace();
    let (by, port, seen) = (words.next(), words.next(), words.next());
    let answer = (by.unwrap(), port.unwrap().parse().unwrap(), seen.unwrap().parse().unwrap());
    Outcome::Answered { by: answer.0.into(), port: answer.1, seen: answer.2 }
}

fn outcome_of(error: &std::io::Error) -> Outcome {
    match error.kind() {
        ErrorKind::ConnectionRefused => Outcome::Refused,
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::TimedOut,
        _ => panic!("unexpected: {error}"),
    }
}

/// Opens a connection from a namespace.
pub(crate) fn tcp(netns: &str, to: SocketAddr) -> Outcome {
    in_netns(netns, || tcp_here(to))
}

/// Opens a connection from the namespace this thread is in.
pub(crate) fn tcp_here(to: SocketAddr) -> Outcome {
    tcp_from(None, to)
}

/// Opens a connection from the namespace this thread is in, and from one of its addresses.
pub(crate) fn tcp_from(source: Option<IpAddr>, to: SocketAddr) -> Outcome {
    tcp_at(source.map(|source| SocketAddr::new(source, 0)), to)
}

/// The same from a port of it.
pub(crate) fn tcp_at(source: Option<SocketAddr>, to: SocketAddr) -> Outcome {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    if let Some(source) = source {
        socket.set_reuse_address(true).unwrap();
        socket.bind(&SockAddr::from(source)).unwrap();
    }
    // Ends with a reset, so that no server is left with a TIME-WAIT. Masquerading picks ports at
    // random: a SYN that meets the TIME-WAIT of another client can be lost without anybody's fault.
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    // Where all namespaces are on one machine, a refusal can be there before `connect` has let go of
    // the socket. TCP then takes it for a passing fault and tries again a second later; the error
    // queue holds it at once.
    match to {
        SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true).unwrap(),
        SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true).unwrap(),
    }
    socket.set_nonblocking(true).unwrap();
    match socket.connect(&SockAddr::from(to)) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return outcome_of(&error),
        Ok(()) => unreachable!("a non-blocking connect has to wait for an answer"),
    }
    let mut wait = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    let patience = PollTimeout::try_from(patience()).unwrap();
    if poll(&mut wait, patience).unwrap() == 0 {
        return Outcome::TimedOut;
    }
    let refused = wait[0].revents().unwrap().contains(PollFlags::POLLERR);
    match socket.take_error().unwrap() {
        Some(error) => return outcome_of(&error),
        None if refused => return Outcome::Refused,
        None => {}
    }
    socket.set_nonblocking(false).unwrap();
    // The test must not hang; an accepted connection answers at once.
    socket.set_read_timeout(Some(patient(Duration::from_secs(5)))).unwrap();
    let mut text = [0; 128];
    match TcpStream::from(socket).read(&mut text) {
        Ok(len) => parsed(std::str::from_utf8(&text[..len]).unwrap()),
        Err(error) => outcome_of(&error),
    }
}

/// Sends a datagram from a new socket in a namespace.
pub(crate) fn udp(netns: &str, to: SocketAddr) -> Outcome {
    in_netns(netns, || udp_on(&udp_socket(to)))
}

/// A connected socket in the namespace this thread is in.
pub(crate) fn udp_socket(to: SocketAddr) -> UdpSocket {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    socket.connect(to).unwrap();
    socket
}

/// Sends a datagram on a connected socket.
pub(crate) fn udp_on(socket: &UdpSocket) -> Outcome {
    socket.set_read_timeout(Some(patience())).unwrap();
    match socket.send(b"?") {
        // A rule of this host refused or dropped it; which of them, the answer tells.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
        Err(error) => return outcome_of(&error),
        Ok(_) => {}
    }
    let mut text = [0; 128];
    match socket.recv(&mut text) {
        Ok(len) => parsed(std::str::from_utf8(&text[..len]).unwrap()),
        Err(error) => outcome_of(&error),
    }
}

/// Sends an ICMP echo request from the namespace this thread is in.
pub(crate) fn echo_here(to: SocketAddr) -> Outcome {
    let (domain, protocol, request) = match to {
        SocketAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8),
        SocketAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
    socket.set_read_timeout(Some(patience())).unwrap();
    // Connected, it is told of errors.
    socket.connect(&SockAddr::from(SocketAddr::new(to.ip(), 0))).unwrap();
    // Type, code, checksum (for IPv6 the kernel writes it), identifier, number.
    let mut packet = [request, 0, 0, 0, 0x5e, 0xed, 0, 1];
    if to.is_ipv4() {
        let words = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
        let sum: u32 = words.sum();
        let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        packet[2..4].copy_from_slice(&(!folded).to_be_bytes());
    }
    match socket.send(&packet) {
        // As in `udp_on`: dropped or refused on its way out.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
        Err(error) => return outcome_of(&error),
        Ok(_) => {}
    }
    let mut buffer = [0; 128];
    loop {
        // A raw IPv4 socket sees the IP header, too.
        match (&socket).read(&mut buffer) {
            Ok(len) if to.is_ipv4() && len >= 28 && buffer[20] == 0 => break,
            Ok(len) if to.is_ipv6() && len >= 8 && buffer[0] == 129 => break,
            Ok(_) => {}
            Err(error) => return outcome_of(&error),
        }
    }
    Outcome::Answered { by: "echo".into(), port: 0, seen: to.ip() }
}

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;

fn sctp_socket(domain: Domain) -> Socket {
    Socket::new(domain, Type::RAW, Some(Protocol::from(132))).unwrap()
}

/// An SCTP packet with one INIT or INIT ACK chunk. The answer's tag carries the server's name.
fn sctp_packet(from: u16, to: u16, verification: u32, chunk: u8, tag: u32) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(from.to_be_bytes());
    packet.extend(to.to_be_bytes());
    packet.extend(verification.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend([chunk, 0, 0, 20]);
    packet.extend(tag.to_be_bytes());
    packet.extend(65536_u32.to_be_bytes());
    packet.extend([0, 1, 0, 1]);
    packet.extend(1_u32.to_be_bytes());
    let sum = crc32c(&packet).to_le_bytes();
    packet[8..12].copy_from_slice(&sum);
    packet
}

/// The checksum of SCTP (RFC 9260 appendix A), bit by bit: these packets are few and short.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

/// Receives a packet: who sent it, and its SCTP part. A raw IPv4 socket sees the IP header, too.
fn sctp_receive(socket: &Socket, domain: Domain) -> nix::Result<(SocketAddr, Vec<u8>)> {
    let mut buffer = [0; 512];
    let (len, from) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer)?;
    let from = from.expect("a raw socket names the sender");
    let v4 = from.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    let from = v4.unwrap_or_else(|| IpAddr::V6(from.as_sockaddr_in6().unwrap().ip()));
    let header = if domain == Domain::IPV4 { usize::from(buffer[0] & 15) * 4 } else { 0 };
    Ok((SocketAddr::new(from, 0), buffer[header..len].to_vec()))
}

fn number(packet: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([packet[at], packet[at + 1]])
}

fn tag(packet: &[u8]) -> u32 {
    u32::from_be_bytes(packet[16..20].try_into().unwrap())
}

fn tag_of(who: &str) -> u32 {
    who.bytes().fold(7, |tag: u32, byte| tag.wrapping_mul(31).wrapping_add(byte.into()))
}

fn answer_sctp(socket: &Socket, domain: Domain, who: &str) {
    while let Ok((from, packet)) = sctp_receive(socket, domain) {
        let to_us = packet.len() >= 20 && packet[12] == INIT;
        if to_us && PORTS.contains(&number(&packet, 2)) {
            let (from_port, to_port) = (number(&packet, 2), number(&packet, 0));
            let answer = sctp_packet(from_port, to_port, tag(&packet), INIT_ACK, tag_of(who));
            drop(socket.send_to(&answer, &SockAddr::from(from)));
        }
    }
}

/// Opens an association from a namespace: who answered, or None. Refusals do not reach a raw socket.
pub(crate) fn sctp(netns: &str, to: SocketAddr, names: &[&str]) -> Option<String> {
    in_netns(netns, || {
        let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = sctp_socket(domain);
        socket.set_read_timeout(Some(patience())).unwrap();
        // A tuple of its own for each try: connection tracking remembers the others.
        static TRIES: AtomicU16 = AtomicU16::new(0);
        let port = 20000 + TRIES.fetch_add(1, Ordering::Relaxed) % 20000;
        let packet = sctp_packet(port, to.port(), 0, INIT, 0x5eed);
        match socket.send_to(&packet, &SockAddr::from(SocketAddr::new(to.ip(), 0))) {
            // A rule of this host refused or dropped it.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return None,
            sent => sent.unwrap(),
        };
        loop {
            let (from, packet) = sctp_receive(&socket, domain).ok()?;
            // An answer that is not translated back is none.
            let is_answer = packet.len() >= 20 && packet[12] == INIT_ACK;
            if is_answer
                && number(&packet, 2) == port
                && (from.ip(), number(&packet, 0)) == (to.ip(), to.port())
            {
                assert_eq!(u32::from_be_bytes(packet[4..8].try_into().unwrap()), 0x5eed);
                let found = names.iter().find(|name| tag_of(name) == tag(&packet));
                return Some((*found.expect("a server of ours")).to_owned());
            }
        }
    })
}
