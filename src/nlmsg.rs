//! Netlink messages as bytes: where one ends and the next begins, and the attributes in one.
//!
//! What nf_tables, connection tracking and the others asked have in common. It is here once, in safe code, as lengths
//! that come from outside are never trusted: whatever does not fit ends the reading.

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

/// Appends an attribute, padded to four bytes.
pub(crate) fn put(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = u16::try_from(4 + value.len()).expect("an attribute is short");
    bytes.extend(len.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
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
