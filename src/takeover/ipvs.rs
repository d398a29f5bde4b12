//! What kube-proxy leaves behind in ipvs mode beside its chains: virtual servers, the link that holds
//! the addresses of Services, and sets of addresses.
//!
//! A handful of requests to three kinds of netlink, too few for a library each. Whatever makes the
//! kernel load a module is not asked before there is a sign that it is loaded.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send,
    setsockopt, socket,
};
use nix::sys::time::TimeVal;

use crate::nlmsg::{
    self, ACK, ERROR, HEADER, REQUEST, attributes, kind, messages, number, put, terminated,
};

/// The link that kube-proxy makes for the addresses of Services.
pub(super) const LINK: &str = "kube-ipvs0";

/// The sets of kube-proxy. Those of IPv6 have a `6-` behind the first dash, and are cut to the length
/// of a name.
const SETS: [&str; 17] = [
    "KUBE-LOOP-BACK",
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
    "KUBE-LOAD-BALANCER",
    "KUBE-LOAD-BALANCER-LOCAL",
    "KUBE-LOAD-BALANCER-FW",
    "KUBE-LOAD-BALANCER-SOURCE-IP",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR",
    "KUBE-NODE-PORT-TCP",
    "KUBE-NODE-PORT-LOCAL-TCP",
    "KUBE-NODE-PORT-UDP",
    "KUBE-NODE-PORT-LOCAL-UDP",
    "KUBE-NODE-PORT-SCTP-HASH",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
    "KUBE-HEALTH-CHECK-NODE-PORT",
    "KUBE-IPVS-IPS",
];

// linux/rtnetlink.h, linux/genetlink.h, linux/ip_vs.h, linux/netfilter/ipset/ip_set.h
const IFLA_IFNAME: u16 = 3;
const CTRL_FAMILY_ID: u16 = 1;
const CTRL_FAMILY_NAME: u16 = 2;
const CTRL_GET_FAMILY: u8 = 3;
const GENL_CTRL: u16 = 16;
const IPVS_FLUSH: u8 = 17;
const IPSET: u16 = 6 << 8;
const IPSET_DESTROY: u16 = 3;
const IPSET_HEADER: u16 = 12;
const IPSET_PROTOCOL: u16 = 1;
const IPSET_NAME: u16 = 2;
/// `IPSET_MAXNAMELEN`, less its NUL.
const NAME_LIMIT: usize = 31;
/// The oldest version that kernels still talk.
const IPSET_VERSION: u8 = 6;

/// The kernel answers inside the call; if it does not in so many seconds, something is broken.
const PATIENCE: i64 = 10;

/// A request failed: the kernel's number for why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub i32);

/// `IPSET_ERR_BUSY`; sets have numbers of their own.
const IN_USE: i32 = 4100;

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            IN_USE => f.write_str("a rule still uses it"),
            number => write!(f, "{}", std::io::Error::from_raw_os_error(number)),
        }
    }
}

impl std::error::Error for Refused {}

impl From<Errno> for Refused {
    fn from(errno: Errno) -> Self {
        Self(errno as i32)
    }
}

/// Whether the link is there.
pub(super) fn has_link() -> bool {
    if_nametoindex(LINK).is_ok()
}

/// Deletes it, and the addresses with it.
pub(super) fn delete_link() -> Result<(), Refused> {
    // struct ifinfomsg, all zero: the name says which.
    let mut body = vec![0; 16];
    put(&mut body, IFLA_IFNAME, &terminated(LINK));
    request(SockProtocol::NetlinkRoute, libc::RTM_DELLINK, &body).map(drop)
}

/// How many virtual servers there are, whoever made them.
pub(super) fn virtual_servers() -> usize {
    // Behind three lines of head, a server begins with its protocol and a destination with an arrow.
    let text = std::fs::read_to_string("/proc/thread-self/net/ip_vs").unwrap_or_default();
    count_virtual_servers(&text)
}

fn count_virtual_servers(text: &str) -> usize {
    let servers = ["TCP ", "UDP ", "SCTP ", "FWM "];
    text.lines().filter(|line| servers.iter().any(|start| line.starts_with(start))).count()
}

/// Removes all virtual servers, as kube-proxy's own cleanup does: they do not say who made them.
pub(super) fn flush() -> Result<(), Refused> {
    let mut body = vec![CTRL_GET_FAMILY, 1, 0, 0];
    put(&mut body, CTRL_FAMILY_NAME, &terminated("IPVS"));
    let answer = request(SockProtocol::NetlinkGeneric, GENL_CTRL, &body)?;
    let id = attributes(answer.get(4..).unwrap_or_default())
        .find_map(|(kind, value)| (kind == CTRL_FAMILY_ID).then(|| value.try_into().ok())?);
    let id = u16::from_ne_bytes(id.ok_or(Refused(libc::EBADMSG))?);
    request(SockProtocol::NetlinkGeneric, id, &[IPVS_FLUSH, 1, 0, 0]).map(drop)
}

/// Those of kube-proxy's sets that are there.
pub(super) fn sets() -> Result<Vec<String>, Refused> {
    if !Path::new("/sys/module/ip_set").exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for name in set_names() {
        match ipset(IPSET_HEADER, &name) {
            Ok(()) => found.push(name),
            Err(Refused(libc::ENOENT)) => {}
            Err(refused) => return Err(refused),
        }
    }
    Ok(found)
}

fn set_names() -> impl Iterator<Item = String> {
    let six = |name: &str| {
        let mut name = name.replacen('-', "-6-", 1);
        name.truncate(NAME_LIMIT);
        name
    };
    SETS.iter().flat_map(move |name| [(*name).to_owned(), six(name)])
}

/// Destroys a set, which no rule may use any more.
pub(super) fn destroy_set(name: &str) -> Result<(), Refused> {
    ipset(IPSET_DESTROY, name)
}

fn ipset(command: u16, name: &str) -> Result<(), Refused> {
    let mut body = vec![0, 0, 0, 0]; // struct nfgenmsg
    put(&mut body, IPSET_PROTOCOL, &[IPSET_VERSION]);
    put(&mut body, IPSET_NAME, &terminated(name));
    request(SockProtocol::NetlinkNetFilter, IPSET | command, &body).map(drop)
}

/// Sends one request on a socket of its own and waits for the acknowledgement. Returns what came
/// before it, without its header.
fn request(protocol: SockProtocol, kind: u16, body: &[u8]) -> Result<Vec<u8>, Refused> {
    let socket: OwnedFd =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::new(PATIENCE, 0))?;
    let mut bytes = Vec::new();
    let start = nlmsg::begin(&mut bytes, kind, REQUEST | ACK, 0);
    bytes.extend_from_slice(body);
    nlmsg::end(&mut bytes, start);
    send(socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
    let mut buffer = vec![0; 16 << 10];
    let mut answer = Vec::new();
    loop {
        let len = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Err(Errno::EINTR) => continue,
            received => received?,
        };
        if let Some(outcome) = read(&buffer[..len], &mut answer) {
            return outcome.map(|()| answer);
        }
    }
}

/// Takes in the messages of a datagram; the outcome if the acknowledgement is among them.
fn read(datagram: &[u8], answer: &mut Vec<u8>) -> Option<Result<(), Refused>> {
    for message in messages(datagram) {
        if kind(message) != ERROR {
            answer.extend_from_slice(&message[HEADER..]);
            continue;
        }
        let code = i32::from_ne_bytes(number(message, HEADER)?);
        return Some(if code == 0 { Ok(()) } else { Err(Refused(code.saturating_neg())) });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_servers_are_counted_by_the_lines_that_begin_with_a_protocol() {
        let text = "IP Virtual Server version 1.2.1 (size=4096)\n\
                    Prot LocalAddress:Port Scheduler Flags\n  \
                    -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n\
                    TCP  0A600001:01BB rr \n  \
                    -> C0000202:192B      Masq    1      0          0         \n\
                    UDP  [fd00:0010:0096:0000:0000:0000:0000:000a]:0035 rr \n\
                    TCP  0A60000A:0050 rr persistent 10800 FFFFFFFF\n";
        assert_eq!(count_virtual_servers(text), 3);
        assert_eq!(count_virtual_servers(""), 0);
    }

    #[test]
    fn an_answer_is_what_comes_before_the_acknowledgement() {
        let message = |kind: u16, body: &[u8]| {
            let mut bytes = u32::try_from(HEADER + body.len()).unwrap().to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend_from_slice(body);
            bytes
        };
        let mut answer = Vec::new();
        assert_eq!(read(&message(16, &[1, 2, 3, 4]), &mut answer), None);
        let ack = [0_i32.to_ne_bytes(), [0; 4]].concat();
        assert_eq!(read(&message(ERROR, &ack), &mut answer), Some(Ok(())));
        assert_eq!(answer, [1, 2, 3, 4]);
        let refusal = [(-libc::ENOENT).to_ne_bytes(), [0; 4]].concat();
        let refused = read(&message(ERROR, &refusal), &mut answer);
        assert_eq!(refused, Some(Err(Refused(libc::ENOENT))));
        assert_eq!(read(&[9, 0, 0, 0, 2], &mut answer), None);
    }

    proptest::proptest! {
        #[test]
        fn any_answer_is_read_to_an_end(bytes: Vec<u8>, text: String) {
            let mut answer = Vec::new();
            let _ = read(&bytes, &mut answer);
            assert!(answer.len() <= bytes.len());
            assert!(count_virtual_servers(&text) <= text.lines().count());
        }
    }
}
