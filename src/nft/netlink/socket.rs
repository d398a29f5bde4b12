//! The netlink socket: buffers, sending, answers, dumps.
//!
//! The kernel handles a request inside `sendmsg`, so every answer is there when the call returns and
//! the socket never has to wait: it is non-blocking, and an empty queue is the end of the answers.
//! No message asks for an ack of its own (256 of them overflow a receive buffer, and they say
//! "parsed", not "committed"); refusals come unasked.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use mnl::mnl_sys;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{NetlinkAddr, getsockname, setsockopt, sockopt};

use crate::nlmsg::{DONE, DUMP_INTERRUPTED, ERROR, HEADER, attributes, flags, kind, number};

/// Largest single receive: netlink dumps come in pieces of at most 32 KiB, answers are small.
const RECEIVE: usize = 64 << 10;

/// Send buffer to start with; grown when a batch is larger.
const SEND: usize = 4 << 20;

/// Receive buffer: room for tens of thousands of refusals.
const RECEIVE_QUEUE: usize = 8 << 20;

/// The socket could not be opened or set up.
#[derive(Debug, thiserror::Error)]
#[error("opening the netlink socket: cannot {step}: {source}{}", hint(source))]
pub struct OpenError {
    /// What was being done.
    pub step: &'static str,
    /// The system's reason.
    pub source: io::Error,
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => " (needs CAP_NET_ADMIN)",
        Some(libc::EPROTONOSUPPORT) => " (needs the kernel module nfnetlink)",
        _ => "",
    }
}

/// An open, bound netfilter netlink socket.
pub(super) struct NetlinkSocket {
    socket: mnl::Socket,
    /// Present size of the send buffer.
    send_buffer: usize,
    /// Where messages are received, aligned for `nlmsghdr`.
    receive: Vec<u64>,
}

impl std::fmt::Debug for NetlinkSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NetlinkSocket")
            .field("send_buffer", &self.send_buffer)
            .finish_non_exhaustive()
    }
}

/// The kernel's answer to one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// Of the message it answers.
    pub sequence: u32,
    /// 0: accepted.
    pub errno: i32,
    /// The kernel's words, if any.
    pub message: Option<String>,
    /// Offset of the offending attribute in the message, if the kernel tells.
    pub offset: Option<usize>,
}

impl NetlinkSocket {
    pub(super) fn open() -> Result<Self, OpenError> {
        let fail = |step| move |source| OpenError { step, source };
        let socket = mnl::Socket::new(mnl::Bus::Netfilter).map_err(fail("open it"))?;
        let mut this = Self { socket, send_buffer: 0, receive: vec![0; RECEIVE / 8] };
        fcntl(this.fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(|e| fail("make it non-blocking")(e.into()))?;
        this.netlink_option(libc::NETLINK_CAP_ACK).map_err(fail("set NETLINK_CAP_ACK"))?;
        this.netlink_option(libc::NETLINK_EXT_ACK).map_err(fail("set NETLINK_EXT_ACK"))?;
        this.grow_send_buffer(SEND).map_err(fail("raise the send buffer"))?;
        setsockopt(&this.fd(), sockopt::RcvBufForce, &RECEIVE_QUEUE)
            .map_err(|e| fail("raise the receive buffer")(e.into()))?;
        Ok(this)
    }

    #[expect(unsafe_code, reason = "mnl hands out a raw descriptor only")]
    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor stays open as long as `self.socket`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }

    /// The address the kernel gave it, unique in the network namespace.
    pub(super) fn address(&self) -> Result<u32, OpenError> {
        getsockname::<NetlinkAddr>(self.socket.as_raw_fd())
            .map(|address| address.pid())
            .map_err(|errno| OpenError { step: "read its address", source: errno.into() })
    }

    #[expect(unsafe_code, reason = "neither mnl nor nix know these options")]
    fn netlink_option(&self, option: libc::c_int) -> io::Result<()> {
        let mut on: libc::c_int = 1;
        let len = size_of_val(&on).try_into().expect("the size of an int");
        // SAFETY: the socket is open, and the pointer and length describe a live integer.
        let outcome = unsafe {
            mnl_sys::mnl_socket_setsockopt(
                self.socket.as_raw_socket(),
                option,
                (&raw mut on).cast(),
                len,
            )
        };
        if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// A message larger than the send buffer is refused (EMSGSIZE), and the limit an unprivileged
    /// process may set is far below a batch of thousands of Services; hence the forced form.
    fn grow_send_buffer(&mut self, size: usize) -> io::Result<()> {
        setsockopt(&self.fd(), sockopt::SndBufForce, &size)?;
        self.send_buffer = size;
        Ok(())
    }

    /// Sends messages as one datagram, which the kernel treats as one transaction if it is a batch.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        // The kernel counts its own overhead into the buffer.
        let needed = bytes.len() + (64 << 10);
        if needed > self.send_buffer {
            self.grow_send_buffer(needed)?;
        }
        let sent = self.socket.send(bytes)?;
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(io::Error::other(format!("{sent} of {} bytes were taken", bytes.len())))
        }
    }

    /// Receives the next piece, or None if nothing is queued, and hands each message on.
    fn receive(&mut self, mut each: impl FnMut(&[u8])) -> io::Result<Option<()>> {
        let (_, buffer, _) = align_to_bytes(&mut self.receive);
        match self.socket.recv(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
            Ok(messages) => {
                for message in messages {
                    each(message?);
                }
                Ok(Some(()))
            }
        }
    }

    /// All answers to what was sent last.
    pub(super) fn answers(&mut self) -> io::Result<Vec<Answer>> {
        let mut answers = Vec::new();
        while self.receive(|message| answers.extend(answer(message)))?.is_some() {}
        Ok(answers)
    }

    /// Throws away what is queued.
    pub(super) fn discard(&mut self) {
        while let Ok(Some(())) = self.receive(|_| ()) {}
    }

    /// Sends a dump request and hands on every message of the answer. Returns false if the ruleset
    /// changed meanwhile, so that the parts may not fit together.
    pub(super) fn dump(&mut self, request: &[u8], each: impl FnMut(&[u8])) -> io::Result<bool> {
        self.dump_while(request, each, || true)
    }

    /// The same, given up with `TimedOut` as soon as it is not to go on. What was not received then
    /// stays in the kernel until the next request, which throws it away.
    pub(super) fn dump_while(
        &mut self,
        request: &[u8],
        mut each: impl FnMut(&[u8]),
        go_on: impl Fn() -> bool,
    ) -> io::Result<bool> {
        self.discard();
        self.send(request)?;
        let (mut done, mut consistent, mut error) = (false, true, 0);
        while !done {
            if !go_on() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let received = self.receive(|message| {
                consistent &= flags(message) & DUMP_INTERRUPTED == 0;
                match kind(message) {
                    DONE => done = true,
                    ERROR => {
                        done = true;
                        error = answer(message).map_or(libc::EBADMSG, |answer| answer.errno);
                    }
                    _ => each(message),
                }
            })?;
            if received.is_none() && !done {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the dump ended early"));
            }
        }
        match error {
            0 => Ok(consistent),
            libc::EINTR => Ok(false),
            errno => Err(super::os_error(errno)),
        }
    }
}

const CAPPED: u16 = 0x100;
const HAS_TLVS: u16 = 0x200;

/// Reads an `NLMSG_ERROR` message: `struct nlmsgerr`, then TLVs if the flags say so.
fn answer(message: &[u8]) -> Option<Answer> {
    if kind(message) != ERROR {
        return None;
    }
    let errno = i32::from_ne_bytes(number(message, HEADER)?);
    let original = HEADER + 4;
    let original_len = u32::from_ne_bytes(number(message, original)?) as usize;
    let sequence = u32::from_ne_bytes(number(message, original + 8)?);
    let mut answer =
        Answer { sequence, errno: errno.saturating_neg(), message: None, offset: None };
    if flags(message) & HAS_TLVS != 0 {
        // Without CAPPED, the whole original message stands before the TLVs.
        let kept = if flags(message) & CAPPED == 0 { original_len } else { HEADER };
        let tlvs = message.get(original + kept.next_multiple_of(4)..).unwrap_or_default();
        for (kind, value) in attributes(tlvs) {
            match kind {
                1 => {
                    let text = value.strip_suffix(&[0]).unwrap_or(value);
                    answer.message = Some(String::from_utf8_lossy(text).into_owned());
                }
                2 => {
                    let offset = number(value, 0).map(u32::from_ne_bytes);
                    answer.offset = offset.and_then(|offset| offset.try_into().ok());
                }
                _ => {}
            }
        }
    }
    Some(answer)
}

/// The buffer as bytes that start on an eight-byte boundary.
#[expect(unsafe_code, reason = "there is no safe view of integers as bytes in std")]
fn align_to_bytes(words: &mut [u64]) -> (&mut [u64], &mut [u8], &mut [u64]) {
    // SAFETY: every byte pattern is a valid u64 and a valid u8.
    unsafe { words.align_to_mut::<u8>() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_answer_is_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let mut bytes = bytes;
            if bytes.len() >= 8 {
                bytes[4..6].copy_from_slice(&ERROR.to_ne_bytes());
            }
            let _ = answer(&bytes);
            let _ = attributes(&bytes).count();
        }
    }
}
