//! Chains. What a chain contains follows from its name alone, so that a ruleset need only say which
//! chains there are, and a chain of the kernel can be compared with what it should be.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::{PortName, PrefixLengths, UnknownName};

/// By what a frontend is found: decides which maps it is looked up in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Entry {
    /// An address of the Service.
    Address,
    /// A node port.
    NodePort,
}

/// Which backends of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum List {
    /// Those of any node.
    Cluster,
    /// Those of this node.
    Local,
}

/// How one of several backends is picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pick {
    /// By a random number.
    Random,
    /// By a hash of the client's address.
    SourceHash,
    /// In turn. The kernel keeps the turn in the rule, so that a port has a chain of its own.
    RoundRobin,
}

/// Picks one of `n` slots of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selection {
    /// What the frontend is found by.
    pub entry: Entry,
    /// The backends to pick from.
    pub list: List,
    /// How.
    pub pick: Pick,
    /// The number of slots, at least 1.
    pub n: u16,
}

/// Where the backend of a client is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Memory {
    /// For frontends that reach any node.
    Cluster,
    /// For frontends that reach this node only.
    Local,
    /// For both; for the second only if the backend is on this node.
    Both,
}

/// Traffic by the kind of frontend that was dialled, as in `internalTrafficPolicy` and
/// `externalTrafficPolicy`: decides who is masqueraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Traffic {
    /// To a ClusterIP: clients that are no pods.
    Internal,
    /// To any other frontend: everybody, unless the external policy is Local.
    External,
}

/// What the chains of one Service port do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortChain {
    /// Picks a backend in turn: `round-robin-2/…`.
    Select(Selection),
    /// Takes the backend that the client had last, else picks one: `sticky-lb-2/…`.
    Sticky(Selection),
    /// Marks what is to be masqueraded, then picks in turn: `external-round-robin-2/…`.
    Enter(Traffic, Selection),
    /// Marks it, then takes the backend that the client had last, else picks one: `external-sticky-lb-2/…`.
    EnterSticky(Traffic, Selection),
    /// Remembers the backend of a client for so many seconds: `record-10800s/…`.
    Record(Memory, u32),
}

/// A chain. Those of Services exist while one needs them; almost all of them are shared by Services
/// with the same number of backends. Tens of thousands of elements name one, so that what few need is
/// behind a pointer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainName {
    /// Picks a backend: `lb-2`, `nodeport-lb-local-1`, `hash-3`.
    Select(Selection),
    /// Marks what is to be masqueraded, then picks a backend: `internal-lb-2`, `external-hash-3`.
    Enter(Traffic, Selection),
    /// A chain that belongs to one Service port.
    OfPort(Arc<(PortName, PortChain)>),
    /// Sets the mark that postrouting masquerades by.
    MarkForMasquerade,
    /// Marks those of a ClusterIP's clients that are to be masqueraded.
    MarkInternal,
    /// Leads a client of the cluster to the backends of any node.
    ShortCircuit,
    /// The same for node ports.
    NodeportShortCircuit,
    /// Tells clients of a frontend address under a Local policy apart.
    ExternalLocalByClient,
    /// The same for node ports.
    NodeportExternalLocalByClient,
    /// Has a frontend address under a Local policy.
    ExternalLocal,
    /// The same for node ports.
    NodeportExternalLocal,
    /// Lets only the allowed sources of a load balancer's address pass, where these are ranges of such
    /// lengths: `restricted-24-32`.
    Restricted(Arc<PrefixLengths>),
    /// Those of them that may pass.
    RestrictedAllowed,
    /// Looks a new connection up in the maps.
    Dispatch,
    /// Looks up what was dialled among the addresses of Services.
    DispatchServices,
    /// The same among node ports.
    DispatchNodeports,
    /// The same among addresses with source ranges.
    DispatchRestricted,
    /// Refuses a connection nobody can answer.
    NoEndpoint,
    /// Refuses unused ports of ClusterIPs, drops what goes to unallocated ones.
    ClusterIpsCheck,
    /// Remembers the backends of clients of Services with session affinity.
    AffinityRecord,
    /// The same for clients of node ports.
    AffinityRecordNodeport,
    /// Looks at the destinations of new connections once they are translated.
    NewConnection,
    /// Base chain, filter input.
    FilterInput,
    /// Base chain, filter forward.
    FilterForward,
    /// Base chain, filter output.
    FilterOutput,
    /// Base chain, nat prerouting.
    NatPrerouting,
    /// Base chain, nat output.
    NatOutput,
    /// Base chain, nat input.
    NatInput,
    /// Base chain, nat postrouting.
    NatPostrouting,
    /// Base chain that counts connections, nat input.
    CountInput,
    /// Base chain that counts connections, nat postrouting.
    CountPostrouting,
}

impl ChainName {
    /// The chains that always exist, in the order of the table's text.
    pub const FIXED: [Self; 25] = [
        Self::MarkForMasquerade,
        Self::MarkInternal,
        Self::ShortCircuit,
        Self::NodeportShortCircuit,
        Self::ExternalLocalByClient,
        Self::NodeportExternalLocalByClient,
        Self::ExternalLocal,
        Self::NodeportExternalLocal,
        Self::DispatchRestricted,
        Self::RestrictedAllowed,
        Self::DispatchServices,
        Self::DispatchNodeports,
        Self::Dispatch,
        Self::NoEndpoint,
        Self::ClusterIpsCheck,
        Self::AffinityRecord,
        Self::AffinityRecordNodeport,
        Self::NewConnection,
        Self::FilterInput,
        Self::FilterForward,
        Self::FilterOutput,
        Self::NatPrerouting,
        Self::NatOutput,
        Self::NatInput,
        Self::NatPostrouting,
    ];

    /// The chains that exist where connections are counted.
    pub const COUNTING: [Self; 2] = [Self::CountInput, Self::CountPostrouting];

    /// The whole name of a chain that does not depend on Services.
    fn fixed(&self) -> Option<&'static str> {
        Some(match self {
            Self::Select(_) | Self::Enter(..) | Self::OfPort(_) | Self::Restricted(_) => {
                return None;
            }
            Self::MarkForMasquerade => "mark-for-masquerade",
            Self::MarkInternal => "mark-internal",
            Self::ShortCircuit => "short-circuit",
            Self::NodeportShortCircuit => "nodeport-short-circuit",
            Self::ExternalLocalByClient => "external-local-by-client",
            Self::NodeportExternalLocalByClient => "nodeport-external-local-by-client",
            Self::ExternalLocal => "external-local",
            Self::NodeportExternalLocal => "nodeport-external-local",
            Self::RestrictedAllowed => "restricted-allowed",
            Self::Dispatch => "dispatch",
            Self::DispatchServices => "dispatch-services",
            Self::DispatchNodeports => "dispatch-nodeports",
            Self::DispatchRestricted => "dispatch-restricted",
            Self::NoEndpoint => "no-endpoint",
            Self::ClusterIpsCheck => "cluster-ips-check",
            Self::AffinityRecord => "affinity-record",
            Self::AffinityRecordNodeport => "affinity-record-nodeport",
            Self::NewConnection => "new-connection",
            Self::FilterInput => "filter-input",
            Self::FilterForward => "filter-forward",
            Self::FilterOutput => "filter-output",
            Self::NatPrerouting => "nat-prerouting",
            Self::NatOutput => "nat-output",
            Self::NatInput => "nat-input",
            Self::NatPostrouting => "nat-postrouting",
            Self::CountInput => "count-input",
            Self::CountPostrouting => "count-postrouting",
        })
    }

    /// Whether the chain exists only while a Service needs it.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.fixed().is_none()
    }

    /// The port that the chain belongs to, if it belongs to one.
    #[must_use]
    pub fn port(&self) -> Option<&PortName> {
        match self {
            Self::OfPort(chain) => Some(&chain.0),
            _ => None,
        }
    }

    /// A chain of a port.
    #[must_use]
    pub fn of_port(port: &PortName, chain: PortChain) -> Self {
        Self::OfPort(Arc::new((port.clone(), chain)))
    }

    /// The chain that picks a backend, `port` being the port that it is for.
    #[must_use]
    pub fn select(port: Option<&PortName>, selection: Selection) -> Self {
        match port.filter(|_| selection.pick == Pick::RoundRobin) {
            Some(port) => Self::of_port(port, PortChain::Select(selection)),
            None => Self::Select(selection),
        }
    }

    /// The chain that this one leads to, which has to exist, too.
    #[must_use]
    pub fn next(&self) -> Option<Self> {
        match self {
            Self::Enter(_, selection) => Some(Self::Select(*selection)),
            Self::OfPort(chain) => match chain.1 {
                PortChain::Enter(_, selection)
                | PortChain::Sticky(selection)
                | PortChain::EnterSticky(_, selection) => {
                    Some(Self::select(Some(&chain.0), selection))
                }
                PortChain::Select(_) | PortChain::Record(..) => None,
            },
            _ => None,
        }
    }

    /// The shared chains that Services with one backend more than this one's need, or one less.
    pub fn neighbours(&self) -> impl Iterator<Item = Self> {
        let selection = match self {
            Self::Select(selection) | Self::Enter(_, selection) => Some(*selection),
            _ => None,
        };
        let random = selection.filter(|selection| selection.pick == Pick::Random).into_iter();
        let numbers = |n: u16| [n.checked_add(1), n.checked_sub(1)].into_iter().flatten();
        random.flat_map(move |selection| {
            let others = numbers(selection.n).filter(|n| *n > 0);
            others.map(move |n| match self {
                Self::Enter(traffic, _) => Self::Enter(*traffic, Selection { n, ..selection }),
                _ => Self::Select(Selection { n, ..selection }),
            })
        })
    }
}

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
        for traffic in [Self::Internal, Self::External] {
            if let Some(rest) = name.strip_prefix(&*traffic.to_string()) {
                return (Some(traffic), rest);
            }
        }
        (None, name)
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
        let list = match self.list {
            List::Cluster => "",
            List::Local => "-local",
        };
        write!(f, "{entry}{pick}{list}-{}", self.n)
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

impl fmt::Display for PortChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Select(selection) => write!(f, "{selection}"),
            Self::Sticky(selection) => write!(f, "sticky-{selection}"),
            Self::Enter(traffic, selection) => write!(f, "{traffic}{selection}"),
            Self::EnterSticky(traffic, selection) => write!(f, "{traffic}sticky-{selection}"),
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

impl fmt::Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Select(selection) => write!(f, "{selection}"),
            Self::Enter(traffic, selection) => write!(f, "{traffic}{selection}"),
            Self::OfPort(chain) => write!(f, "{}/{}", chain.1, chain.0),
            Self::Restricted(lengths) => write!(f, "restricted-{lengths}"),
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
        let chain = match name.split_once('/') {
            Some((kind, port)) => {
                port_chain(kind).map(|chain| Ok(Self::of_port(&port.parse()?, chain)))
            }
            None => shared_chain(name).map(Ok),
        };
        let chain = chain.unwrap_or(Err(UnknownName))?;
        // `lb-02` and `lb-+2` parse, but are not names we write.
        if chain.to_string() == name { Ok(chain) } else { Err(UnknownName) }
    }
}

fn shared_chain(name: &str) -> Option<ChainName> {
    if let Some(lengths) = name.strip_prefix("restricted-") {
        return Some(ChainName::Restricted(Arc::new(lengths.parse().ok()?)));
    }
    let (traffic, rest) = Traffic::strip(name);
    let selection = Selection::parse(rest).filter(|s| s.pick != Pick::RoundRobin)?;
    Some(match traffic {
        Some(traffic) => ChainName::Enter(traffic, selection),
        None => ChainName::Select(selection),
    })
}

fn port_chain(kind: &str) -> Option<PortChain> {
    if let Some(rest) = kind.strip_prefix("record-") {
        let (memory, rest) = match rest.split_once('-') {
            Some(("local", rest)) => (Memory::Local, rest),
            Some(("both", rest)) => (Memory::Both, rest),
            _ => (Memory::Cluster, rest),
        };
        return Some(PortChain::Record(memory, rest.strip_suffix('s')?.parse().ok()?));
    }
    let (traffic, rest) = Traffic::strip(kind);
    let (sticky, rest) = match rest.strip_prefix("sticky-") {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let selection = Selection::parse(rest)?;
    Some(match (traffic, sticky) {
        (None, true) => PortChain::Sticky(selection),
        (Some(traffic), true) => PortChain::EnterSticky(traffic, selection),
        _ if selection.pick != Pick::RoundRobin => return None,
        (None, false) => PortChain::Select(selection),
        (Some(traffic), false) => PortChain::Enter(traffic, selection),
    })
}
