//! One buffer with all messages of a transaction, and the way back from an answer to an operation.

use std::ffi::c_char;

use nftnl::NlMsg;

use super::ffi::Room;
use crate::nft::names::TABLE;
use crate::nlmsg::{self, ACK, GENMSG, HEADER, NESTED, REQUEST, attributes, put};

/// A batch being written.
pub(super) struct Batch {
    /// The table that its operations are about.
    pub(super) table: &'static str,
    pub(super) bytes: Vec<u8>,
    /// Of each message: where it starts, and the (first) operation it carries, if any.
    index: Vec<Position>,
}

struct Position {
    start: usize,
    operation: Option<usize>,
    /// Whether each of its elements is an operation.
    elements: bool,
}

const ELEMENT_LIST: u16 = 3;

/// `NFNL_SUBSYS_NFTABLES`
const NFTABLES: u16 = 10;

/// The begin message's number; the others follow it.
const FIRST_SEQUENCE: u32 = 1;

impl Batch {
    /// Starts a batch about a table, in a buffer, which is cleared.
    pub(super) fn begin(table: &'static str, mut buffer: Vec<u8>) -> Self {
        buffer.clear();
        let mut this = Self { table, bytes: buffer, index: Vec::new() };
        this.write(None, Room::begin_batch);
        this
    }

    /// One message outside of a batch: a request.
    pub(super) fn single(build: impl FnOnce(&mut Room, u32)) -> Vec<u8> {
        let mut this = Self { table: TABLE, bytes: Vec::new(), index: Vec::new() };
        this.write(None, build);
        this.bytes
    }

    /// Ends it. The end message asks for an ack, which kernels from 6.10 on give.
    pub(super) fn finish(mut self) -> Self {
        self.write(None, Room::end_batch);
        let end = self.index.last().expect("just written").start;
        self.set_flags(end, |flags| flags | ACK);
        self
    }

    /// Adds a message of nftnl's own types. They ask for an ack each, which is taken out again.
    pub(super) fn add(&mut self, operation: usize, message: &impl NlMsg, kind: nftnl::MsgType) {
        self.write(Some(operation), |room, sequence| {
            #[expect(unsafe_code, reason = "nftnl writes into a raw buffer")]
            // SAFETY: there is room for the largest message.
            unsafe {
                message.write(room.place().cast(), sequence, kind);
            }
        });
        let start = self.index.last().expect("just written").start;
        self.set_flags(start, |flags| flags & !ACK);
    }

    /// Lets `build` write one message at the end of the buffer, with this sequence number.
    #[expect(unsafe_code, reason = "libnftnl writes into a raw buffer")]
    pub(super) fn write(&mut self, operation: Option<usize>, build: impl FnOnce(&mut Room, u32)) {
        let start = self.bytes.len();
        let room = nftnl::nft_nlmsg_maxsize() as usize;
        self.bytes.reserve(room);
        let sequence = self.next_sequence();
        let free = self.bytes.spare_capacity_mut().as_mut_ptr().cast::<c_char>();
        // SAFETY: reserved above. A header of length 0 would be found out below.
        unsafe { free.write_bytes(0, HEADER) };
        // SAFETY: reserved above, and the buffer is not touched before `build` is through.
        build(&mut unsafe { Room::at(free) }, sequence);
        // SAFETY: `build` wrote a netlink message, whose header is its first 16 bytes.
        let header = unsafe { free.cast::<libc::nlmsghdr>().read_unaligned() };
        let len = (header.nlmsg_len as usize).next_multiple_of(4);
        assert!((HEADER..=room).contains(&len), "a message of {len} bytes was written");
        // SAFETY: the first `len` bytes were written: messages are multiples of four bytes long,
        // padded by libnftnl, and the room was reserved.
        unsafe { self.bytes.set_len(start + len) };
        self.index.push(Position { start, operation, elements: false });
    }

    /// Starts a message that is written attribute by attribute.
    pub(super) fn message(
        &mut self,
        kind: libc::c_int,
        family: u16,
        flags: libc::c_int,
    ) -> Message<'_> {
        let sequence = self.next_sequence();
        let small = |number: libc::c_int| u16::try_from(number).expect("types and flags are small");
        let start = begin(&mut self.bytes, small(kind), REQUEST | small(flags), sequence, family);
        Message { batch: self, start }
    }

    fn next_sequence(&self) -> u32 {
        FIRST_SEQUENCE + u32::try_from(self.index.len()).expect("bounded by memory")
    }

    fn set_flags(&mut self, message: usize, change: impl FnOnce(u16) -> u16) {
        let field = &mut self.bytes[message + 6..message + 8];
        let flags = u16::from_ne_bytes([field[0], field[1]]);
        field.copy_from_slice(&change(flags).to_ne_bytes());
    }

    /// How many messages there are.
    pub(super) fn messages(&self) -> usize {
        self.index.len()
    }

    /// The operation that an answer is about: a message can carry many elements, of which the
    /// offset names one.
    pub(super) fn operation(&self, sequence: u32, offset: Option<usize>) -> Option<usize> {
        let number = usize::try_from(sequence.checked_sub(FIRST_SEQUENCE)?).ok()?;
        let message = self.index.get(number)?;
        let end = self.index.get(number + 1).map_or(self.bytes.len(), |next| next.start);
        let bytes = &self.bytes[message.start..end];
        let offset = offset.filter(|_| message.elements);
        Some(message.operation? + offset.and_then(|o| element_at(bytes, o)).unwrap_or(0))
    }
}

/// A message being written: its header stands in the batch.
pub(super) struct Message<'a> {
    batch: &'a mut Batch,
    start: usize,
}

/// An attribute that others are written into; where its header stands.
pub(super) struct Nest(usize);

impl Message<'_> {
    /// Writes an attribute.
    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) {
        put(&mut self.batch.bytes, kind, value);
    }

    /// Writes a string, ended by a NUL.
    pub(super) fn string(&mut self, kind: u16, value: &str) {
        let bytes = &mut self.batch.bytes;
        let start = nlmsg::open(bytes, kind);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        nlmsg::close(bytes, start);
    }

    /// Opens an attribute for others.
    pub(super) fn nest(&mut self, kind: u16) -> Nest {
        Nest(nlmsg::open(&mut self.batch.bytes, kind | NESTED))
    }

    /// How long it is so far.
    pub(super) fn len_of(&self, nest: &Nest) -> usize {
        self.batch.bytes.len() - nest.0
    }

    /// Closes it.
    #[expect(clippy::needless_pass_by_value, reason = "it is closed once")]
    pub(super) fn end(&mut self, nest: Nest) {
        nlmsg::close(&mut self.batch.bytes, nest.0);
    }

    /// Ends the message, which carries this operation, or from this one on one with each element.
    pub(super) fn finish(self, operation: Option<usize>, elements: bool) {
        let Self { batch, start } = self;
        nlmsg::end(&mut batch.bytes, start);
        batch.index.push(Position { start, operation, elements });
    }
}

/// A message of nf_tables: header, `struct nfgenmsg`, attributes.
pub(super) fn message(kind: u16, flags: u16, sequence: u32, family: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + GENMSG + body.len());
    let start = begin(&mut bytes, kind, flags, sequence, family);
    bytes.extend_from_slice(body);
    nlmsg::end(&mut bytes, start);
    bytes
}

/// Begins such a message, whose attributes follow.
fn begin(bytes: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, family: u16) -> usize {
    let start = nlmsg::begin(bytes, NFTABLES << 8 | kind, flags, sequence);
    bytes.extend([u8::try_from(family).expect("families are bytes"), 0, 0, 0]);
    start
}

/// Which element of an element message lies at this offset.
fn element_at(message: &[u8], offset: usize) -> Option<usize> {
    let mut at = HEADER + GENMSG;
    for (kind, value) in attributes(message.get(at..)?) {
        if kind == ELEMENT_LIST {
            let mut start = at + 4;
            for (index, (_, element)) in attributes(value).enumerate() {
                let end = start + (4 + element.len()).next_multiple_of(4);
                if (start..end).contains(&offset) {
                    return Some(index);
                }
                start = end;
            }
            return None;
        }
        at += (4 + value.len()).next_multiple_of(4);
    }
    None
}
