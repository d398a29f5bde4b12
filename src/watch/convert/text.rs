//! Reading addresses the way Kubernetes reads them, and showing foreign text safely.
//!
//! Whatever an object holds may end up in a log line, so it is escaped and cut here, once, instead
//! of at every message.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Longest foreign text a message repeats.
const SHOWN: usize = 64;

/// Longest name of an object the API server accepts.
const NAME_LIMIT: usize = 253;

/// A foreign text in quotes, escaped, and cut when it is long.
#[must_use]
pub(in crate::watch) fn shown(text: &str) -> String {
    shown_up_to(text, SHOWN)
}

/// Like [`shown`], without the quotes and with room for a whole message of a foreign library.
#[must_use]
pub(in crate::watch) fn one_line(text: &str) -> String {
    let mut line = String::new();
    for (taken, c) in text.trim().chars().enumerate() {
        if taken == 400 {
            line.push('…');
            break;
        }
        // A line break inside a library's message reads best as a space; anything else that could
        // move a terminal's cursor is escaped.
        match c {
            '\n' | '\t' => line.push(' '),
            c if c.is_control() => line.extend(c.escape_unicode()),
            c => line.push(c),
        }
    }
    line
}

fn shown_up_to(text: &str, limit: usize) -> String {
    let mut out = String::from("\"");
    for (taken, c) in text.chars().enumerate() {
        if taken == limit {
            let _ = write!(out, "…\" ({} characters)", text.chars().count());
            return out;
        }
        out.extend(c.escape_debug());
    }
    out.push('"');
    out
}

/// What is wrong with the name of an object or a namespace, if anything. The API server allows no
/// more than this; a manifest can hold anything, and names end up in comments and set names.
pub(in crate::watch) fn name_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("is missing")
    } else if name.len() > NAME_LIMIT {
        Some("is longer than 253 characters")
    } else if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:".contains(&b)) {
        Some("holds other characters than letters, digits, '-', '.', '_' and ':'")
    } else {
        None
    }
}

/// An address as Kubernetes accepts it: leading zeros in an IPv4 part are decimal digits without
/// weight, and an IPv4-mapped IPv6 address is the IPv4 address.
pub(in crate::watch) fn address(text: &str) -> Option<IpAddr> {
    let address = text.parse().ok().or_else(|| sloppy(text))?;
    Some(match address {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, IpAddr::V4),
        IpAddr::V4(_) => address,
    })
}

/// The second reading of an address that the standard library refuses.
fn sloppy(text: &str) -> Option<IpAddr> {
    let (head, quad) = match text.rfind(':') {
        Some(colon) => text.split_at(colon + 1),
        None => ("", text),
    };
    let mut octets = [0u8; 4];
    let mut parts = quad.split('.');
    for octet in &mut octets {
        let digits = parts.next()?;
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let digits = digits.trim_start_matches('0');
        *octet = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    }
    if parts.next().is_some() {
        return None;
    }
    let quad = Ipv4Addr::from(octets);
    if head.is_empty() {
        return Some(quad.into());
    }
    format!("{head}{quad}").parse::<Ipv6Addr>().ok().map(IpAddr::V6)
}

/// A network as Kubernetes accepts it; bits beyond the prefix are dropped.
pub(in crate::watch) fn network(text: &str) -> Option<IpNet> {
    let (host, prefix) = text.split_once('/')?;
    if prefix.is_empty() || !prefix.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let prefix: u8 = prefix.parse().ok()?;
    let written: IpAddr = host.parse().ok().or_else(|| sloppy(host))?;
    let (host, prefix) = match written {
        IpAddr::V6(v6) if prefix >= 96 => match v6.to_ipv4_mapped() {
            Some(v4) => (IpAddr::V4(v4), prefix - 96),
            None => (written, prefix),
        },
        _ => (written, prefix),
    };
    IpNet::new(host, prefix).ok().map(|net| net.trunc())
}

/// Why packets cannot be sent to an address, if they cannot. The API server refuses these; a
/// manifest can hold them, and a rule for them would bend the node's own traffic.
pub(in crate::watch) fn address_fault(address: IpAddr) -> Option<&'static str> {
    if address.is_unspecified() {
        Some("the unspecified address")
    } else if address.is_loopback() {
        Some("a loopback address")
    } else if address.is_multicast() {
        Some("a multicast address")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_the_way_kubernetes_reads_them() {
        for (text, expected) in [
            ("10.0.0.1", Some("10.0.0.1")),
            ("010.000.000.001", Some("10.0.0.1")),
            ("0010.08.0.09", Some("10.8.0.9")),
            ("fd00::1", Some("fd00::1")),
            ("64:ff9b::010.0.0.1", Some("64:ff9b::10.0.0.1")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("10.0.0", None),
            ("10.0.0.1.2", None),
            ("10.0.0.256", None),
            ("10.0.0.1 ", None),
            ("+1.0.0.1", None),
            ("fe80::1%eth0", None),
            ("", None),
        ] {
            assert_eq!(address(text), expected.map(|e| e.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn networks_are_truncated_and_checked() {
        for (text, expected) in [
            ("10.1.2.3/8", Some("10.0.0.0/8")),
            ("010.1.2.3/08", Some("10.0.0.0/8")),
            ("fd00::1/64", Some("fd00::/64")),
            ("::ffff:10.1.2.3/120", Some("10.1.2.0/24")),
            ("10.1.2.3", None),
            ("10.1.2.3/33", None),
            ("10.1.2.3/+8", None),
            ("10.1.2.3/", None),
            ("fd00::/129", None),
        ] {
            assert_eq!(network(text), expected.map(|e| e.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn foreign_text_is_escaped_and_cut() {
        assert_eq!(shown("a\nb\u{1b}[31m"), r#""a\nb\u{1b}[31m""#);
        let long = shown(&"x".repeat(5000));
        assert!(long.len() < 100 && long.ends_with("(5000 characters)"), "{long}");
        assert_eq!(one_line("a\n  b\u{7}"), "a   b\\u{7}");
    }
}
