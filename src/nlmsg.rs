//! Netlink messages as bytes, read and written: where one ends and the next begins, and the attributes in
//! one.
//!
//! What nf_tables, connection tracking and the others asked have in common. It is here once, in safe
//! code, as lengths that come from outside are never trusted: whatever does not fit ends the reading.

/// Length of `struct nlmsghdr`, behind which the payload begins.
pub(crate) const HEADER: usize = 16;

/// Length of `struct nfgenmsg`, which netfilter's messages begin with, their attributes behind it.
pub(crate) const GENMSG: usize = 4;

/// `NLMSG_ERROR`: the answer to a request, 0 for success.
pub(crate) const ERROR: u16 = 2;
/// `NLMSG_DONE`: the end of a dump.
pub(crate) const DONE: u16 = 3;
/// `NLM_F_DUMP_INTR`: what is dumped changed meanwhile.
pub(crate) const DUMP_INTERRUPTED: u16 = 0x10;

/// `NLM_F_REQUEST`, which every message to the kernel has.
pub(crate) const REQUEST: u16 = 0x1;
/// `NLM_F_ACK`: success is answered, too.
pub(crate) const ACK: u16 = 0x4;
/// `NLM_F_DUMP`: everything of a kind is listed.
pub(crate) const DUMP: u16 = 0x300;
/// `NLA_F_NESTED`, in the type of an attribute that holds others.
pub(crate) const NESTED: u16 = 0x8000;

/// Some bytes at an offset, for a number in whichever order.
pub(crate) fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// `nlmsg_type`.
pub(crate) fn kind(message: &[u8]) -> u16 {
    number(message, 4).map_or(0, u16::from_ne_bytes)
}

/// `nlmsg_flags`.
pub(crate) fn flags(message: &[u8]) -> u16 {
    number(message, 6).map_or(0, u16::from_ne_bytes)
}

/// The messages of a datagram, each with its header.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(number(datagram, 0)?) as usize;
        let message = datagram.get(..len).filter(|message| message.len() >= HEADER)?;
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in a buffer: type without flags, and value.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(number(bytes, 0)?));
        let kind = u16::from_ne_bytes(number(bytes, 2)?) & 0x3fff;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of a type.
pub(crate) fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Begins a message: its header, with no address, which stands for the kernel. Returns where it stands.
pub(crate) fn begin(bytes: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32) -> usize {
    let start = bytes.len();
    bytes.extend([0; 4]); // the length, known at the end
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    start
}

/// Ends the message that begins there.
pub(crate) fn end(bytes: &mut [u8], start: usize) {
    let len = u32::try_from(bytes.len() - start).expect("little more than an attribute");
    bytes[start..start + 4].copy_from_slice(&len.to_ne_bytes());
}

/// Opens an attribute, whose value is what is appended until it is closed. Returns where it stands.
pub(crate) fn open(bytes: &mut Vec<u8>, kind: u16) -> usize {
    let start = bytes.len();
    bytes.extend([0; 2]); // the length, known at the end
    bytes.extend(kind.to_ne_bytes());
    start
}

/// Closes the attribute that stands there, and pads it to four bytes.
pub(crate) fn close(bytes: &mut Vec<u8>, start: usize) {
    let len = u16::try_from(bytes.len() - start).expect("an attribute is at most 64 KiB");
    bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Appends an attribute.
pub(crate) fn put(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let start = open(bytes, kind);
    bytes.extend_from_slice(value);
    close(bytes, start);
}

/// A text as attributes hold it: closed by a NUL.
pub(crate) fn terminated(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            prop_assert!(messages(&bytes).count() <= bytes.len() / HEADER);
            prop_assert!(attributes(&bytes).count() <= bytes.len() / 4);
        }
    }

    #[test]
    fn what_is_put_is_read_back() {
        let mut bytes = Vec::new();
        put(&mut bytes, 7, &terminated("four"));
        put(&mut bytes, 8, &[]);
        assert_eq!(attributes(&bytes).collect::<Vec<_>>(), [(7, &b"four\0"[..]), (8, &[])]);
    }

    #[test]
    fn messages_are_padded_to_four_bytes() {
        let mut datagram = vec![0; 40];
        datagram[0] = 17;
        datagram[20] = 20;
        assert_eq!(messages(&datagram).map(<[u8]>::len).collect::<Vec<_>>(), [17, 20]);
    }
}
