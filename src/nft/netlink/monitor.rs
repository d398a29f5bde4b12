//! Who else changes our tables: the kernel's notifications of nf_tables commits.
//!
//! The kernel tells every commit of the network namespace: first what it changed, then its number and
//! the process it came from. Messages carry the address of the socket that asked, which tells our own
//! commits from those of others; a process id would not, as the kernel names it in its own numbering
//! and a container has another one.
//!
//! While anybody listens, the kernel makes a message of a page for every object and element, and keeps
//! all of them until the commit is done (`nf_tables_setelem_notify`): 4 KiB of memory for each, and the
//! commit takes 1.7 times as long (measured, 70,000 operations). So a large commit of our own pauses the
//! [`Subscription`]; whether others committed meanwhile tells the number of the generation.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname,
    recv, setsockopt, socket, sockopt,
};
use tracing::error;

use super::socket::OpenError;
use crate::nft::names::TABLE;
use crate::nlmsg::{GENMSG, HEADER, attributes, kind, messages, number};

/// Room for the notifications of our own commits, which come here, too.
const QUEUE: usize = 8 << 20;

/// Largest piece: notifications of a commit are joined up to a page or two.
const RECEIVE: usize = 64 << 10;

/// `NFNLGRP_NFTABLES` as a bit.
const GROUP: u32 = 1 << (libc::NFNLGRP_NFTABLES - 1);

/// The table's name is the first attribute of every kind of object.
const OBJECT_TABLE: u16 = 1;
const GEN_PROCESS: u16 = 2;
const GEN_NAME: u16 = 3;

/// A change of our tables that somebody else made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intrusion {
    /// Objects and elements in the kernel's account of it; 0 if it was lost.
    pub changes: usize,
    /// Name of the process, as far as the kernel tells.
    pub process: Option<String>,
    /// Its id as the kernel numbers processes.
    pub pid: Option<u32>,
}

/// Receives the notifications of a network namespace.
#[derive(Debug)]
pub struct Monitor {
    socket: Arc<OwnedFd>,
    /// The address of the socket that our own commits come from.
    own: u32,
    buffer: Vec<u8>,
    /// Changes of our tables in the commit that is being told.
    changes: usize,
}

impl Monitor {
    pub(super) fn open(own: u32) -> Result<Self, OpenError> {
        let fail = |step| move |errno: Errno| OpenError { step, source: errno.into() };
        let flags = SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::NetlinkNetFilter;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)
            .map_err(fail("open it for notifications"))?;
        setsockopt(&socket, sockopt::RcvBufForce, &QUEUE)
            .map_err(fail("raise the receive buffer"))?;
        subscribe(&socket, GROUP).map_err(fail("subscribe to notifications"))?;
        Ok(Self { socket: Arc::new(socket), own, buffer: vec![0; RECEIVE], changes: 0 })
    }

    pub(super) fn subscription(&self) -> Subscription {
        Subscription(Arc::downgrade(&self.socket))
    }

    /// Waits until somebody else has changed our tables.
    pub fn wait(&mut self) -> io::Result<Intrusion> {
        loop {
            match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(len) => {
                    let bytes = std::mem::take(&mut self.buffer);
                    let found = self.read(&bytes[..len]);
                    self.buffer = bytes;
                    if let Some(intrusion) = found {
                        return Ok(intrusion);
                    }
                }
                Err(Errno::EINTR) => {}
                // What was lost can have been anything.
                Err(Errno::ENOBUFS) => {
                    self.changes = 0;
                    return Ok(Intrusion::default());
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Takes in some messages. Of several commits of others the last one is named.
    fn read(&mut self, bytes: &[u8]) -> Option<Intrusion> {
        let mut found: Option<Intrusion> = None;
        for message in messages(bytes) {
            let Some(content) = message.get(HEADER + GENMSG..) else { break };
            let mut content = attributes(content);
            if u32::from(kind(message)) & 0xff == libc::NFT_MSG_NEWGEN.cast_unsigned() {
                let changes = std::mem::take(&mut self.changes);
                if changes > 0 && sender(message) != self.own {
                    let earlier = found.map_or(0, |intrusion| intrusion.changes);
                    found = Some(Intrusion { changes: changes + earlier, ..author(content) });
                }
            } else if content.any(|(kind, value)| kind == OBJECT_TABLE && is_ours(value)) {
                self.changes += 1;
            }
        }
        found
    }
}

/// The subscription of a [`Monitor`], for whoever commits; the monitor may be gone.
#[derive(Debug, Default)]
pub(super) struct Subscription(Weak<OwnedFd>);

impl Subscription {
    /// Ends it until what is returned goes. None if there is none, or it goes on.
    pub(super) fn pause(&self) -> Option<Paused> {
        let socket = self.0.upgrade()?;
        subscribe(&socket, 0).ok()?;
        Some(Paused(socket))
    }
}

/// A subscription that goes on when this goes.
pub(super) struct Paused(Arc<OwnedFd>);

impl Drop for Paused {
    fn drop(&mut self) {
        if let Err(error) = subscribe(&self.0, GROUP) {
            error!(%error, "changes that others make to our tables are no longer seen");
        }
    }
}

/// A bound socket may be bound once more, to the address it has, which replaces its groups
/// (`netlink_bind`).
fn subscribe(socket: &OwnedFd, groups: u32) -> Result<(), Errno> {
    let address: NetlinkAddr = getsockname(socket.as_raw_fd())?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(address.pid(), groups))
}

fn is_ours(name: &[u8]) -> bool {
    name.strip_suffix(&[0]) == Some(TABLE.as_bytes())
}

/// `nlmsg_pid`: the socket that asked for what is told.
fn sender(message: &[u8]) -> u32 {
    number(message, 12).map_or(0, u32::from_ne_bytes)
}

fn author<'a>(attributes: impl Iterator<Item = (u16, &'a [u8])>) -> Intrusion {
    let mut intrusion = Intrusion::default();
    for (kind, value) in attributes {
        match kind {
            GEN_PROCESS => intrusion.pid = value.try_into().ok().map(u32::from_be_bytes),
            GEN_NAME => {
                let name = value.strip_suffix(&[0]).unwrap_or(value);
                intrusion.process =
                    Some(String::from_utf8_lossy(name).escape_default().to_string());
            }
            _ => {}
        }
    }
    intrusion
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nlmsg::put;

    fn message(kind: libc::c_int, sender: u32, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = vec![0; GENMSG];
        for (kind, value) in attributes {
            put(&mut body, *kind, value);
        }
        let kind = (10_u16 << 8) | u16::try_from(kind).unwrap();
        let mut bytes = u32::try_from(HEADER + body.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 6]);
        bytes.extend(sender.to_ne_bytes());
        bytes.extend(body);
        bytes
    }

    #[test]
    fn commits_of_others_to_our_tables_are_told_with_their_author() {
        let mut monitor = Monitor::open(7).unwrap();
        let element = |table: &[u8]| message(libc::NFT_MSG_DELSETELEM, 0, &[(1, table)]);
        let end = |sender| {
            let author: [(u16, &[u8]); 2] = [(2, &[0, 0, 1, 0]), (3, b"nft\0")];
            message(libc::NFT_MSG_NEWGEN, sender, &author)
        };
        let ours = element(b"nftproxy\0");
        // Our own, and one of somebody else to another table.
        assert_eq!(monitor.read(&[ours.clone(), end(7), element(b"x\0"), end(8)].concat()), None);
        // In two pieces.
        assert_eq!(monitor.read(&[ours.clone(), ours.clone()].concat()), None);
        let found = monitor.read(&end(8)).unwrap();
        let nft = Intrusion { changes: 2, process: Some("nft".into()), pid: Some(256) };
        assert_eq!(found, nft);
        assert_eq!(monitor.read(&[ours, end(7)].concat()), None);
        assert_eq!(monitor.read(&end(8)), None);
        assert_eq!(monitor.read(b"short"), None);
    }
}
