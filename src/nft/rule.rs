//! Rules as typed statements.
//!
//! Only the statements the data plane uses exist, so each of the two renderings is one exhaustive
//! match, and a statement that one of them forgot does not compile. Addresses are always those of
//! the table's family, which is why no statement names one.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::names::{AffinityName, ChainName, SetName};
use crate::model::{Family, Protocol};

/// A value of the packet, or one made for it, that is compared or looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selector {
    /// Source address of the network header.
    Saddr,
    /// The first address of the range that the source is in, of prefixes of this length.
    SaddrFirst(u8),
    /// The last one.
    SaddrLast(u8),
    /// Destination address of the network header.
    Daddr,
    /// Transport protocol.
    L4Proto,
    /// Destination port of the transport header.
    Dport,
    /// Destination address of the packet that opened the connection, before translation.
    OriginalDaddr,
    /// Destination port of that packet.
    OriginalDport,
    /// Source address that answers come from: of a translated connection, its backend's.
    ReplySaddr,
    /// Source port that they come from.
    ReplySport,
    /// A number in `offset .. offset + modulus`.
    Slot {
        /// Where it comes from.
        source: SlotSource,
        /// How many numbers there are.
        modulus: u16,
        /// The first of them.
        offset: u16,
    },
}

/// The masks of an address's network and host part, for prefixes of this length; None if an address is
/// a prefix of its own.
pub(super) fn masks(family: Family, length: u8) -> Option<(IpAddr, IpAddr)> {
    let zero = match family {
        Family::V4 => IpAddr::from([0; 4]),
        Family::V6 => IpAddr::from([0; 16]),
    };
    let prefix = IpNet::new(zero, length).ok().filter(|net| length < net.max_prefix_len())?;
    Some((prefix.netmask(), prefix.hostmask()))
}

/// The name of a network interface, or what several names begin with. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum InterfaceName {
    /// Just this one.
    Whole(Arc<str>),
    /// All that begin so.
    Prefix(Arc<str>),
}

impl InterfaceName {
    /// What is compared.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Whole(name) | Self::Prefix(name) => name,
        }
    }
}

/// As [`InterfaceName`] is displayed.
impl From<String> for InterfaceName {
    fn from(text: String) -> Self {
        match text.strip_suffix('*') {
            Some(prefix) => Self::Prefix(prefix.into()),
            None => Self::Whole(text.into()),
        }
    }
}

impl From<InterfaceName> for String {
    fn from(name: InterfaceName) -> Self {
        name.to_string()
    }
}

/// As nft writes it, without the quotes.
impl std::fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Whole(name) => f.write_str(name),
            Self::Prefix(name) => write!(f, "{name}*"),
        }
    }
}

/// Seed of the source hash. It is fixed, so that every node and every start picks the same.
pub const HASH_SEED: u32 = 0x6e66_7470;

/// How many clients an affinity map remembers: what the kernel gives a map that packets fill. Further
/// clients are not remembered.
pub const AFFINITY_SIZE: u32 = 65535;

/// How many pairs of a frontend and a backend are counted: the same limit. Connections of further
/// pairs are not.
pub const CONNECTIONS_SIZE: u32 = AFFINITY_SIZE;

/// For how many seconds after its last connection a pair's counter is kept.
pub const COUNTED_FOR: u32 = 3600;

/// What a connection is counted by: what was dialled, and who answers.
pub const COUNTED_BY: [Selector; 5] = [
    Selector::OriginalDaddr,
    Selector::L4Proto,
    Selector::OriginalDport,
    Selector::ReplySaddr,
    Selector::ReplySport,
];

/// How a slot is picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotSource {
    /// By chance.
    Random,
    /// One after the other; the counter belongs to the rule.
    Increment,
    /// By a hash of the source address, the same on every node.
    SourceHash,
}

/// One match or action of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// The packet opens a connection.
    CtStateNew,
    /// The connection's destination was translated.
    CtStatusDnat,
    /// The source is an address of this host (a look-up in its routing tables).
    FromThisHost,
    /// The destination is.
    ToThisHost,
    /// The destination is no loopback address.
    NotToLoopback,
    /// The destination is one.
    ToLoopback,
    /// The source is one.
    FromLoopback,
    /// The packet came in by this interface. The host's own packets came in by none.
    FromInterface(InterfaceName),
    /// It came in by another one, or by none.
    NotFromInterface(InterfaceName),
    /// The packet leaves by another interface than this.
    NotToInterface(InterfaceName),
    /// The transport protocol is this.
    L4Proto(Protocol),
    /// The selectors, joined, are in a set.
    In(Vec<Selector>, SetName),
    /// The selectors, joined, are not in a set.
    NotIn(Vec<Selector>, SetName),
    /// None of these bits of the packet mark is set.
    MarkClear(u32),
    /// Sets bits of the packet mark.
    MarkOr(u32),
    /// Flips bits of the packet mark.
    MarkXor(u32),
    /// Takes the verdict a map has for the selectors; goes on if it has none.
    Vmap(Vec<Selector>, SetName),
    /// Translates the destination to the backend a map has for the selectors; goes on if none.
    Dnat(Vec<Selector>, SetName),
    /// Translates the destination to the backend that the source had last; goes on if it had none.
    DnatSticky(AffinityName),
    /// Remembers for so many seconds that the source has this destination. One that is remembered
    /// keeps its backend, for another such time; if there is no room for one more, goes on.
    Remember(AffinityName, u32),
    /// Counts a connection ([`COUNTED_BY`]); if there is no room for one more pair, goes on.
    Count,
    /// Replaces the source by an address of the outgoing interface and a random port.
    Masquerade,
    /// Runs another chain, then goes on.
    Jump(ChainName),
    /// Goes on in another chain, not coming back.
    Goto(ChainName),
    /// Ends this chain.
    Return,
    /// Ends this chain and all that led to it, so that nothing further is done to the packet here.
    Accept,
    /// Refuses with port-unreachable.
    Reject,
    /// Drops silently.
    Drop,
}

/// A rule: its statements apply in order, until one does not match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Matches and actions.
    pub statements: Vec<Statement>,
    /// Shown behind the rule by `nft list`.
    pub comment: Option<&'static str>,
}

impl Rule {
    /// A rule without comment.
    #[must_use]
    pub fn new(statements: impl Into<Vec<Statement>>) -> Self {
        Self { statements: statements.into(), comment: None }
    }

    /// The rule with a comment, at most 128 bytes without quotes.
    #[must_use]
    pub fn comment(mut self, comment: &'static str) -> Self {
        self.comment = Some(comment);
        self
    }
}

/// A chain and everything in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: ChainName,
    /// Where packets enter it, if they do so from the kernel and not from another chain.
    pub base: Option<Base>,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// Attachment of a base chain. The policy is always accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Filter or nat.
    pub kind: BaseKind,
    /// The netfilter hook.
    pub hook: Hook,
    /// Position among all base chains of the hook, lower first.
    pub priority: i32,
}

/// Type of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseKind {
    /// Sees every packet.
    Filter,
    /// Sees the first packet of a connection.
    Nat,
}

/// Netfilter hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Before routing.
    Prerouting,
    /// To this host.
    Input,
    /// Through this host.
    Forward,
    /// From this host.
    Output,
    /// After routing.
    Postrouting,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_told_as_it_is_written() {
        for (text, name, compared) in [
            ("eth0", InterfaceName::Whole("eth0".into()), "eth0"),
            ("veth*", InterfaceName::Prefix("veth".into()), "veth"),
            ("*", InterfaceName::Prefix("".into()), ""),
        ] {
            assert_eq!(name.as_str(), compared);
            assert_eq!(InterfaceName::from(text.to_owned()), name);
            assert_eq!(String::from(name), text);
        }
    }
}
