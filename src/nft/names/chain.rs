//! Chains. What a chain contains follows from its name alone, so that a ruleset need only say which
//! chains there are, and a chain of the kernel can be compared with what it should be.

mod text;

use std::sync::Arc;

use super::{AffinityName, PortName, PrefixLengths};

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

impl Traffic {
    /// Both of them.
    pub const BOTH: [Self; 2] = [Self::Internal, Self::External];
}

/// How a frontend comes to one of its backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// Picks a backend: `lb-2`, `nodeport-lb-local-1`, `hash-3`, `round-robin-2`.
    Select(Selection),
    /// Marks what is to be masqueraded, then picks a backend: `internal-lb-2`, `external-hash-3`.
    Enter(Traffic, Selection),
    /// Under externalTrafficPolicy Local, picks one of all backends for clients of the cluster, and for
    /// others one of so many on this node, which can be 0: `external-local-lb-3-1`.
    ExternalLocal(Selection, u16),
}

/// What the chains of one Service port do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortChain {
    /// Picks a backend in turn: `external-round-robin-2/…`.
    Way(Way),
    /// Takes the backend that the client had last, if any: `sticky/…`, `sticky-local/…`.
    Sticky(List),
    /// Marks what is to be masqueraded, then takes that backend: `external-sticky/…`.
    EnterSticky(Traffic, List),
    /// Takes it as clients under a Local policy may: `external-local-sticky/…`.
    ExternalLocalSticky,
    /// Remembers the backend of a client for so many seconds: `record-10800s/…`.
    Record(Memory, u32),
}

/// A chain. Those of Services exist while one needs them; almost all of them are shared by Services
/// with the same number of backends. Tens of thousands of elements name one, so that what few need is
/// behind a pointer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainName {
    /// Picks a backend, otherwise than in turn.
    Way(Way),
    /// A chain that belongs to one Service port.
    OfPort(Arc<(PortName, PortChain)>),
    /// Lets only the allowed sources of a load balancer's address pass, where these are ranges of such
    /// lengths, and leads them on, if there is anybody: `restricted-24-32-external-lb-2`.
    Restricted(Arc<(PrefixLengths, Option<ChainName>)>),
    /// Sets the mark that postrouting masquerades by.
    MarkForMasquerade,
    /// Marks those of a ClusterIP's clients that are to be masqueraded.
    MarkInternal,
    /// Looks a new connection up in the maps.
    Dispatch,
    /// Looks up what was dialled among the addresses of Services.
    DispatchServices,
    /// The same among node ports.
    DispatchNodeports,
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
    pub const FIXED: [Self; 17] = [
        Self::MarkForMasquerade,
        Self::MarkInternal,
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
            Self::Way(_) | Self::OfPort(_) | Self::Restricted(_) => return None,
            Self::MarkForMasquerade => "mark-for-masquerade",
            Self::MarkInternal => "mark-internal",
            Self::Dispatch => "dispatch",
            Self::DispatchServices => "dispatch-services",
            Self::DispatchNodeports => "dispatch-nodeports",
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

    /// A chain of a port.
    #[must_use]
    pub fn of_port(port: &PortName, chain: PortChain) -> Self {
        Self::OfPort(Arc::new((port.clone(), chain)))
    }

    /// The chain that lets only sources in ranges of such lengths pass, on to another if there is one.
    #[must_use]
    pub fn restricted(lengths: PrefixLengths, next: Option<Self>) -> Self {
        Self::Restricted(Arc::new((lengths, next)))
    }

    /// The chain that goes this way, `port` being the port that it is for.
    #[must_use]
    pub fn way(port: Option<&PortName>, way: Way) -> Self {
        match port.filter(|_| way.selection().pick == Pick::RoundRobin) {
            Some(port) => Self::of_port(port, PortChain::Way(way)),
            None => Self::Way(way),
        }
    }

    /// The chains that this one leads to, or its neighbours do: they have to exist, too.
    pub fn next(&self) -> impl Iterator<Item = Self> {
        let along = |port, way: Way| way.next().map(|next| Some(Self::way(port, next?)));
        let next = match self {
            Self::Way(way) => along(None, *way),
            Self::Restricted(chain) => [chain.1.clone(), None],
            Self::OfPort(chain) => {
                let port = &chain.0;
                let sticky = |list| Some(Self::of_port(port, PortChain::Sticky(list)));
                match chain.1 {
                    PortChain::Way(way) => along(Some(port), way),
                    PortChain::ExternalLocalSticky => [sticky(List::Cluster), sticky(List::Local)],
                    PortChain::Sticky(_) | PortChain::EnterSticky(..) | PortChain::Record(..) => {
                        [None, None]
                    }
                }
            }
            _ => [None, None],
        };
        next.into_iter().flatten()
    }

    /// The shared chains that Services need that have one backend more than this one's, or one less; where
    /// those of this node count by themselves, one there or elsewhere.
    #[must_use]
    pub fn neighbours(&self) -> Vec<Self> {
        match self {
            Self::Way(way) => way.neighbours().into_iter().map(Self::Way).collect(),
            Self::Restricted(chain) => {
                let inner = chain.1.as_ref().map_or_else(Vec::new, Self::neighbours);
                inner.into_iter().map(|next| Self::restricted(chain.0, Some(next))).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The affinity maps that it asks, or that those ask that it leads to.
    #[must_use]
    pub fn asks(&self) -> Vec<AffinityName> {
        if let Self::OfPort(chain) = self
            && let PortChain::Sticky(list) | PortChain::EnterSticky(_, list) = chain.1
        {
            return vec![AffinityName { port: chain.0.clone(), list }];
        }
        self.next().flat_map(|next| next.asks()).collect()
    }

    /// Whether it is for clients of a frontend under externalTrafficPolicy Local.
    #[must_use]
    pub fn is_external_local(&self) -> bool {
        match self {
            Self::Way(Way::ExternalLocal(..)) => true,
            Self::OfPort(chain) => matches!(
                chain.1,
                PortChain::Way(Way::ExternalLocal(..)) | PortChain::ExternalLocalSticky
            ),
            _ => false,
        }
    }
}

impl Way {
    /// What it picks from; where clients are told apart, for those that may reach any backend.
    #[must_use]
    pub fn selection(self) -> Selection {
        match self {
            Self::Select(selection)
            | Self::Enter(_, selection)
            | Self::ExternalLocal(selection, _) => selection,
        }
    }

    /// The ways that this one leads on to, or its neighbours do.
    fn next(self) -> [Option<Self>; 2] {
        match self {
            Self::Select(_) => [None, None],
            Self::Enter(_, selection) => [Some(Self::Select(selection)), None],
            Self::ExternalLocal(all, here) => {
                let here = all.here(here.max(u16::from(all.is_spared())));
                [Some(all).filter(|all| all.n > 0), here].map(|next| Some(Self::Select(next?)))
            }
        }
    }

    /// Those for one backend more or less.
    fn neighbours(self) -> Vec<Self> {
        let selection = self.selection();
        let numbers = [selection.n.checked_add(1), selection.n.checked_sub(1)];
        let numbers = numbers.into_iter().flatten().filter(|n| selection.is_spared() && *n > 0);
        let others = numbers.map(|n| Selection { n, ..selection });
        match self {
            Self::Select(_) => others.map(Self::Select).collect(),
            Self::Enter(traffic, _) => others.map(|other| Self::Enter(traffic, other)).collect(),
            Self::ExternalLocal(_, here) => {
                let more_or_less = |other: Selection| {
                    let moved = here.checked_add_signed(if other.n > selection.n { 1 } else { -1 });
                    let numbers = [Some(here), moved].into_iter().flatten();
                    numbers.map(move |here| Self::ExternalLocal(other, here))
                };
                others.flat_map(more_or_less).collect()
            }
        }
    }
}

impl Selection {
    /// Whether there are spare chains for another number of backends.
    fn is_spared(self) -> bool {
        self.pick == Pick::Random && self.n > 0
    }

    /// The selection among so many backends of this node, if there is any.
    #[must_use]
    pub fn here(self, n: u16) -> Option<Self> {
        (n > 0).then_some(Self { list: List::Local, n, ..self })
    }
}
