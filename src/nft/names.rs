//! Names of sets, maps and chains, as closed types: a misspelt name does not compile, and what the
//! kernel lists can be read back into the same values.
//!
//! Almost all names are the same on every node. What belongs to one Service port alone (its session
//! affinity, a counter for round robin) carries that port's name behind a slash, so that a listing
//! says whose it is: `affinity/default/web/tcp/http`.

mod chain;
mod lengths;
mod set;

use std::fmt;
use std::sync::Arc;

pub use chain::{ChainName, Entry, List, Memory, Pick, PortChain, Selection, Traffic, Way};
pub use lengths::PrefixLengths;
pub use set::{DataType, KeyField, SetName};

use crate::model::{NamespacedName, Protocol};

/// Name of the one table a family has.
pub const TABLE: &str = "nftproxy";

/// Name of a second table, which stands in while that one is replaced by one of another layout
/// ([`super::diff::stand_in`]).
pub const STAND_IN: &str = "nftproxy-stand-in";

/// Comment on the table. It marks a table as ours and says which layout of sets, maps and chains is
/// in it; a table without it, or with another number, is replaced as a whole at start-up.
pub const LAYOUT: &str = "nftproxy layout 3";

/// Name of the set that counts connections, where that is asked for. Packets fill it, as they do the
/// affinity maps, so that it is none of [`SetName`].
pub const CONNECTIONS: &str = "connections";

/// What that comment begins with in every version.
pub const LAYOUTS: &str = "nftproxy layout ";

/// Longest name of a set or chain: `NFT_NAME_MAXLEN` of the kernel, less its NUL.
const NAME_LIMIT: usize = 255;

/// Room for what stands before the port's name: `restricted-`, 12 lengths of up to three digits, and
/// `-external-local-round-robin-32768-32768/`. The longest name that the API server lets a port have is 148.
const PREFIX_ROOM: usize = 105;

/// The name is not one of this program's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a name of nftproxy's table")]
pub struct UnknownName;

/// A port of a Service as part of a name: `namespace/name/protocol/port`, without the last part for an
/// unnamed port. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortName(Arc<str>);

impl PortName {
    /// The name of a Service's port. None if it would be too long for the kernel or hold characters
    /// that nft does not read; the API server allows neither, but a manifest can hold anything.
    #[must_use]
    pub fn new(service: &NamespacedName, protocol: Protocol, port: &str) -> Option<Self> {
        let slash = if port.is_empty() { "" } else { "/" };
        format!("{service}/{protocol}{slash}{port}").parse().ok()
    }

    /// The protocol, which is part of the name.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        let part = self.0.split('/').nth(2);
        part.and_then(protocol_named).expect("checked when the name was made")
    }
}

fn protocol_named(name: &str) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|p| p.to_string() == name)
}

impl std::str::FromStr for PortName {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        let known = |c: u8| c.is_ascii_alphanumeric() || b"-._/".contains(&c);
        let fits = name.len() + PREFIX_ROOM <= NAME_LIMIT && name.bytes().all(known);
        let parts: Vec<&str> = name.split('/').collect();
        let [namespace, service, protocol] = parts.get(..3).ok_or(UnknownName)? else {
            return Err(UnknownName);
        };
        let whole = !namespace.is_empty()
            && !service.is_empty()
            && protocol_named(protocol).is_some()
            && parts.len() <= 4
            && parts.get(3).is_none_or(|port| !port.is_empty());
        if fits && whole { Ok(Self(name.into())) } else { Err(UnknownName) }
    }
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A map that remembers which client has which backend of a Service port. It has elements that only
/// packets make, so nothing of them is in a ruleset.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AffinityName {
    /// Whose clients.
    pub port: PortName,
    /// Which of the port's lists the backends are from: a client that may reach any endpoint and one
    /// that is held to this node are remembered apart.
    pub list: List,
}

/// `affinity/…` or `affinity-local/…`
impl fmt::Display for AffinityName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = match self.list {
            List::Cluster => "affinity",
            List::Local => "affinity-local",
        };
        write!(f, "{prefix}/{}", self.port)
    }
}

impl std::str::FromStr for AffinityName {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        let (prefix, port) = name.split_once('/').ok_or(UnknownName)?;
        let list = match prefix {
            "affinity" => List::Cluster,
            "affinity-local" => List::Local,
            _ => return Err(UnknownName),
        };
        Ok(Self { port: port.parse()?, list })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(text: &str) -> PortName {
        text.parse().unwrap()
    }

    #[test]
    fn names_read_back_what_they_write() {
        for set in SetName::ALL {
            assert_eq!(set.as_str().parse(), Ok(set));
        }
        let mut chains = [&ChainName::FIXED[..], &ChainName::COUNTING].concat();
        let port = port("a-1/b/udp/1-2");
        for pick in [Pick::Random, Pick::SourceHash, Pick::RoundRobin] {
            for entry in [Entry::Address, Entry::NodePort] {
                for list in [List::Cluster, List::Local] {
                    for n in [1, 2, 32768] {
                        let selection = Selection { entry, list, pick, n };
                        let mut ways = vec![Way::Select(selection)];
                        ways.extend(Traffic::BOTH.map(|traffic| Way::Enter(traffic, selection)));
                        if list == List::Cluster {
                            ways.extend([0, 1, 32768].map(|n| Way::ExternalLocal(selection, n)));
                        }
                        chains.extend(ways.into_iter().map(|way| ChainName::way(Some(&port), way)));
                    }
                }
            }
        }
        chains.push(ChainName::of_port(&port, PortChain::ExternalLocalSticky));
        for list in [List::Cluster, List::Local] {
            let affinity = AffinityName { port: port.clone(), list };
            assert_eq!(affinity.to_string().parse(), Ok(affinity));
            chains.push(ChainName::of_port(&port, PortChain::Sticky(list)));
            for traffic in [Traffic::Internal, Traffic::External] {
                chains.push(ChainName::of_port(&port, PortChain::EnterSticky(traffic, list)));
            }
        }
        for chain in &chains {
            assert!(chain.next().all(|next| chains.contains(&next)), "{chain}");
        }
        let external = chains.iter().filter(|chain| chain.to_string().starts_with("external-"));
        let external: Vec<_> = external.cloned().map(Some).chain([None]).collect();
        for lengths in [&[32][..], &[1, 128], &(1..=128).collect::<Vec<_>>()] {
            let lengths = PrefixLengths::new(lengths.iter().copied()).unwrap();
            chains.extend(external.iter().map(|c| ChainName::restricted(lengths, c.clone())));
        }
        for memory in [Memory::Cluster, Memory::Local, Memory::Both] {
            chains.push(ChainName::of_port(&port, PortChain::Record(memory, 10800)));
        }
        let names: std::collections::BTreeSet<_> = chains.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), chains.len(), "no two have the same name");
        for chain in chains {
            let name = chain.to_string();
            assert!(name.len() <= NAME_LIMIT);
            assert_eq!(name.parse(), Ok(chain), "{name}");
        }
    }

    #[test]
    fn there_is_no_chain_for_no_backend_and_none_for_more_than_there_are_slots() {
        let select = |n| {
            let (entry, list) = (Entry::Address, List::Cluster);
            ChainName::Way(Way::Select(Selection { entry, list, pick: Pick::Random, n }))
        };
        let neighbours = |n| select(n).neighbours();
        assert_eq!(neighbours(1), [select(2)]);
        assert_eq!(neighbours(2), [select(3), select(1)]);
        assert_eq!(neighbours(u16::MAX), [select(u16::MAX - 1)]);
    }

    /// A spare chain leads to others that are there: those that picks have, and their neighbours.
    #[test]
    fn neighbours_are_mutual_and_lead_to_chains_that_are_there() {
        let lengths = PrefixLengths::new([24]).unwrap();
        for (n, here) in [(1, 0), (1, 1), (2, 0), (2, 1), (5, 5), (0, 0), (0, 1), (9, u16::MAX)] {
            let (entry, list) = (Entry::Address, List::Cluster);
            let selection = Selection { entry, list, pick: Pick::Random, n };
            let chain = ChainName::Way(Way::ExternalLocal(selection, here));
            let mut there: Vec<_> = chain.next().collect();
            there.extend(there.clone().iter().flat_map(ChainName::neighbours));
            let neighbours = chain.neighbours();
            for neighbour in &neighbours {
                assert!(neighbour.neighbours().contains(&chain), "{chain} {neighbour}");
                assert!(neighbour.next().all(|next| there.contains(&next)), "{chain} {neighbour}");
            }
            let restricted = ChainName::restricted(lengths, Some(chain));
            let of_restricted: Vec<_> = restricted
                .neighbours()
                .into_iter()
                .flat_map(|n| n.next().collect::<Vec<_>>())
                .collect();
            assert_eq!(of_restricted, neighbours);
        }
    }

    #[test]
    fn names_of_others_are_unknown() {
        for name in [
            "",
            "lb",
            "lb-",
            "lb-02",
            "lb-+2",
            "lb-65536",
            "Lb-2",
            "dispatch-1",
            "-1",
            "lb-2/a/b/tcp",
            "sticky",
            "sticky/a/b",
            "sticky/a/b/icmp",
            "sticky/a/b/tcp/",
            "external-local-lb-2",
            "external-local-lb-local-2-1",
            "external-local-round-robin-2-1",
            "external-local-lb-2-1/a/b/tcp",
            "restricted-",
            "restricted-external-lb-2",
            "restricted-24-",
            "restricted-24external-lb-2",
            "restricted-24-restricted-24",
            "restricted-x18-external-lb-2",
            "restricted-24-dispatch",
            "record-5/a/b/tcp",
            "record-s/a/b/tcp",
            "external-",
            "external-external-lb-2",
            "external-internal-lb-2",
            "internal-2",
            "round-robin-2",
            "affinity/a/b/tcp",
            "sticky//b/tcp",
            "sticky/a//tcp",
            "sticky/a/b/icmp/http",
            "sticky/a/b/tcp/http/x",
        ] {
            assert_eq!(name.parse::<ChainName>(), Err(UnknownName), "{name:?}");
        }
        assert_eq!("Services".parse::<SetName>(), Err(UnknownName));
        assert_eq!("affinity/a/b".parse::<AffinityName>(), Err(UnknownName));
    }

    #[test]
    fn a_name_that_the_kernel_or_nft_would_not_take_is_none() {
        let name = |service: &str, port: &str| {
            PortName::new(&NamespacedName::new("default", service), Protocol::Udp, port)
        };
        assert_eq!(name("web", "http").unwrap().to_string(), "default/web/udp/http");
        assert_eq!(name("web", "").unwrap().to_string(), "default/web/udp");
        assert_eq!(name("web", "").unwrap().protocol(), Protocol::Udp);
        assert_eq!(name("a:b", "http"), None);
        assert_eq!(name(&"w".repeat(253), ""), None);
    }
}
