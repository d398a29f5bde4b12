//! Rules as typed statements.
//!
//! Only the statements the data plane uses exist, so each of the two renderings is one exhaustive
//! match, and a statement that one of them forgot does not compile. Addresses are always those of
//! the table's family, which is why no statement names one.

use super::names::{ChainName, SetName};

/// A value of the packet, or one made for it, that is compared or looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selector {
    /// Source address of the network header.
    Saddr,
    /// Destination address of the network header.
    Daddr,
    /// Transport protocol.
    L4Proto,
    /// Destination port of the transport header.
    Dport,
    /// A random number in `offset .. offset + modulus`.
    Random {
        /// How many numbers there are to draw from.
        modulus: u16,
        /// The first of them.
        offset: u16,
    },
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
    /// Replaces the source by an address of the outgoing interface and a random port.
    Masquerade,
    /// Runs another chain, then goes on.
    Jump(ChainName),
    /// Goes on in another chain, not coming back.
    Goto(ChainName),
    /// Ends this chain.
    Return,
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
