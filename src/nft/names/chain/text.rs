//! Names of chains as the kernel has them, written and read back.

use std::fmt;
use std::str::FromStr;

use super::{ChainName, Entry, List, Memory, Pick, PortChain, Selection, Traffic, Way};
use crate::nft::names::{PrefixLengths, UnknownName};

/// As the beginning of a chain's name.
impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Internal => "internal-",
            Self::External => "external-",
        })
    }
}

impl Traffic {
    /// Reads what [`fmt::Display`] writes off the beginning of a chain's name.
    fn strip(name: &str) -> (Option<Self>, &str) {
        for traffic in Self::BOTH {
            if let Some(rest) = name.strip_prefix(&*traffic.to_string()) {
                return (Some(traffic), rest);
            }
        }
        (None, name)
    }
}

/// Within a chain's name.
impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster => "",
            Self::Local => "-local",
        })
    }
}

/// Without the port, which comes last in a chain's name.
impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entry = match self.entry {
            Entry::Address => "",
            Entry::NodePort => "nodeport-",
        };
        let pick = match self.pick {
            Pick::Random => "lb",
            Pick::SourceHash => "hash",
            Pick::RoundRobin => "round-robin",
        };
        write!(f, "{entry}{pick}{}-{}", self.list, self.n)
    }
}

impl Selection {
    /// Reads what [`fmt::Display`] writes.
    fn parse(text: &str) -> Option<Self> {
        let (entry, rest) = match text.strip_prefix("nodeport-") {
            Some(rest) => (Entry::NodePort, rest),
            None => (Entry::Address, text),
        };
        let (rest, number) = rest.rsplit_once('-')?;
        let (list, pick) = match rest.strip_suffix("-local") {
            Some(pick) => (List::Local, pick),
            None => (List::Cluster, rest),
        };
        let pick = match pick {
            "lb" => Pick::Random,
            "hash" => Pick::SourceHash,
            "round-robin" => Pick::RoundRobin,
            _ => return None,
        };
        Some(Self { entry, list, pick, n: number.parse().ok()? })
    }
}

/// What chains under externalTrafficPolicy Local begin with.
const EXTERNAL_LOCAL: &str = "external-local-";

/// What chains begin with that let only some sources pass.
const RESTRICTED: &str = "restricted-";

/// Without the port, which comes last in a chain's name.
impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Select(selection) => write!(f, "{selection}"),
            Self::Enter(traffic, selection) => write!(f, "{traffic}{selection}"),
            Self::ExternalLocal(selection, here) => write!(f, "{EXTERNAL_LOCAL}{selection}-{here}"),
        }
    }
}

impl Way {
    /// Reads what [`fmt::Display`] writes.
    fn parse(text: &str) -> Option<Self> {
        if let Some(rest) = text.strip_prefix(EXTERNAL_LOCAL) {
            let (selection, here) = rest.rsplit_once('-')?;
            let all = Selection::parse(selection).filter(|s| s.list == List::Cluster)?;
            return Some(Self::ExternalLocal(all, here.parse().ok()?));
        }
        let (traffic, rest) = Traffic::strip(text);
        let selection = Selection::parse(rest)?;
        Some(match traffic {
            Some(traffic) => Self::Enter(traffic, selection),
            None => Self::Select(selection),
        })
    }

    fn is_in_turn(self) -> bool {
        self.selection().pick == Pick::RoundRobin
    }
}

/// Likewise.
impl fmt::Display for PortChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Way(way) => write!(f, "{way}"),
            Self::Sticky(list) => write!(f, "sticky{list}"),
            Self::EnterSticky(traffic, list) => write!(f, "{traffic}sticky{list}"),
            Self::ExternalLocalSticky => write!(f, "{EXTERNAL_LOCAL}sticky"),
            Self::Record(memory, timeout) => {
                let memory = match memory {
                    Memory::Cluster => "",
                    Memory::Local => "-local",
                    Memory::Both => "-both",
                };
                write!(f, "record{memory}-{timeout}s")
            }
        }
    }
}

impl PortChain {
    /// Reads what [`fmt::Display`] writes.
    fn parse(kind: &str) -> Option<Self> {
        if let Some(rest) = kind.strip_prefix("record-") {
            let (memory, rest) = match rest.split_once('-') {
                Some(("local", rest)) => (Memory::Local, rest),
                Some(("both", rest)) => (Memory::Both, rest),
                _ => (Memory::Cluster, rest),
            };
            return Some(Self::Record(memory, rest.strip_suffix('s')?.parse().ok()?));
        }
        if kind.strip_prefix(EXTERNAL_LOCAL) == Some("sticky") {
            return Some(Self::ExternalLocalSticky);
        }
        let (traffic, rest) = Traffic::strip(kind);
        let list = match rest {
            "sticky" => List::Cluster,
            "sticky-local" => List::Local,
            _ => return Way::parse(kind).filter(|way| way.is_in_turn()).map(Self::Way),
        };
        Some(match traffic {
            Some(traffic) => Self::EnterSticky(traffic, list),
            None => Self::Sticky(list),
        })
    }
}

impl fmt::Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Way(way) => write!(f, "{way}"),
            Self::OfPort(chain) => write!(f, "{}/{}", chain.1, chain.0),
            Self::Restricted(chain) => match &**chain {
                (lengths, None) => write!(f, "{RESTRICTED}{lengths}"),
                (lengths, Some(next)) => write!(f, "{RESTRICTED}{lengths}-{next}"),
            },
            fixed => f.write_str(fixed.fixed().unwrap_or_default()),
        }
    }
}

impl FromStr for ChainName {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        let mut fixed = Self::FIXED.into_iter().chain(Self::COUNTING);
        if let Some(fixed) = fixed.find(|chain| chain.fixed() == Some(name)) {
            return Ok(fixed);
        }
        let chain = match name.strip_prefix(RESTRICTED) {
            Some(rest) => restricted(rest),
            None => of_service(name),
        };
        // `lb-02` and `lb-+2` parse, but are not names we write.
        chain.filter(|chain| chain.to_string() == name).ok_or(UnknownName)
    }
}

/// Reads `24-32-external-lb-2`.
fn restricted(text: &str) -> Option<ChainName> {
    let next = text.find(|c: char| c.is_ascii_lowercase() && c != PrefixLengths::MASK);
    let (lengths, next) = match next {
        Some(at) => (text[..at].strip_suffix('-')?, Some(of_service(&text[at..])?)),
        None => (text, None),
    };
    Some(ChainName::restricted(lengths.parse().ok()?, next))
}

/// Reads the name of a chain that Services lead to.
fn of_service(name: &str) -> Option<ChainName> {
    if let Some((kind, port)) = name.split_once('/') {
        return Some(ChainName::of_port(&port.parse().ok()?, PortChain::parse(kind)?));
    }
    Way::parse(name).filter(|way| !way.is_in_turn()).map(ChainName::Way)
}
