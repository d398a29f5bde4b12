//! A netlink socket to ctnetlink: datagrams out, datagrams in, one buffer for life.

use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send,
    setsockopt, socket,
};
use nix::sys::time::TimeVal;

/// The largest piece the kernel makes of a listing.
const BUFFER: usize = 32 << 10;

/// The kernel answers inside the call; if it does not in so many seconds, something is broken.
const PATIENCE: i64 = 10;

#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    buffer: Box<[u8]>,
}

impl Socket {
    pub(super) fn open() -> Result<Self, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let netfilter = SockProtocol::NetlinkNetFilter;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, netfilter)?;
        // Connected to the kernel, it takes messages from nobody else.
        connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&fd, ReceiveTimeout, &TimeVal::new(PATIENCE, 0))?;
        Ok(Self { fd, buffer: vec![0; BUFFER].into() })
    }

    /// Sends requests; the kernel has carried them out when this returns, a listing excepted.
    pub(super) fn send(&self, requests: &[u8]) -> Result<(), Errno> {
        loop {
            match send(self.fd.as_raw_fd(), requests, MsgFlags::empty()) {
                Ok(sent) if sent == requests.len() => return Ok(()),
                Ok(_) => return Err(Errno::EMSGSIZE),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Waits for the next datagram.
    pub(super) fn receive(&mut self) -> Result<&[u8], Errno> {
        self.receive_with(MsgFlags::empty())
    }

    /// The next datagram, if one is there already.
    pub(super) fn receive_queued(&mut self) -> Result<Option<&[u8]>, Errno> {
        match self.receive_with(MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => Ok(None),
            received => received.map(Some),
        }
    }

    fn receive_with(&mut self, flags: MsgFlags) -> Result<&[u8], Errno> {
        loop {
            // MSG_TRUNC: the length it had, even if it did not fit.
            match recv(self.fd.as_raw_fd(), &mut self.buffer, flags | MsgFlags::MSG_TRUNC) {
                Ok(len) => return self.buffer.get(..len).ok_or(Errno::EMSGSIZE),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}
