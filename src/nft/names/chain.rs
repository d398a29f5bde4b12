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

/// What the chains of one Service port do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortChain {
    /// Picks a backend in turn: `round-robin-2/…`.
    Select(Selection),
    /// Marks what is to be masqueraded, then picks in turn: `external-round-robin-2/…`.
    Enter(Traffic, Selection),
    /// Picks in turn as clients under a Local policy may: `external-local-round-robin-3-1/…`.
    ExternalLocal(Selection, u16),
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
    /// Picks a backend: `lb-2`, `nodeport-lb-local-1`, `hash-3`.
    Select(Selection),
    /// Marks what is to be masqueraded, then picks a backend: `internal-lb-2`, `external-hash-3`.
    Enter(Traffic, Selection),
    /// Under externalTrafficPolicy Local, picks one of all backends for clients of the cluster, and for
    /// others one of so many on this node, which can be 0: `external-local-lb-3-1`.
    ExternalLocal(Selection, u16),
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
            Self::Select(_)
            | Self::Enter(..)
            | Self::ExternalLocal(..)
            | Self::OfPort(_)
            | Self::Restricted(_) => return None,
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

    /// The chain that picks a backend, `port` being the port that it is for.
    #[must_use]
    pub fn select(port: Option<&PortName>, selection: Selection) -> Self {
        match port.filter(|_| selection.pick == Pick::RoundRobin) {
            Some(port) => Self::of_port(port, PortChain::Select(selection)),
            None => Self::Select(selection),
        }
    }

    /// The chains that this one leads to, or its neighbours do: they have to exist, too.
    pub fn next(&self) -> impl Iterator<Item = Self> {
        let select = |port, selection| Some(Self::select(port, selection));
        let both = |port, selection: Selection, here: u16| {
            let all = (selection.n > 0).then(|| Self::select(port, selection));
            let spare = u16::from(selection.is_spared());
            [all, selection.here(here.max(spare)).map(|here| Self::select(port, here))]
        };
        let next = match self {
            Self::Enter(_, selection) => [select(None, *selection), None],
            Self::ExternalLocal(selection, here) => both(None, *selection, *here),
            Self::Restricted(chain) => [chain.1.clone(), None],
            Self::OfPort(chain) => {
                let port = &chain.0;
                let sticky = |list| Some(Self::of_port(port, PortChain::Sticky(list)));
                match chain.1 {
                    PortChain::Enter(_, selection) => [select(Some(port), selection), None],
                    PortChain::ExternalLocal(selection, here) => both(Some(port), selection, here),
                    PortChain::ExternalLocalSticky => [sticky(List::Cluster), sticky(List::Local)],
                    PortChain::Select(_)
                    | PortChain::Sticky(_)
                    | PortChain::EnterSticky(..)
                    | PortChain::Record(..) => [None, None],
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
        let others = |selection: Selection| {
            let numbers = [selection.n.checked_add(1), selection.n.checked_sub(1)];
            let numbers = numbers.into_iter().flatten();
            let numbers = numbers.filter(move |n| selection.is_spared() && *n > 0);
            numbers.map(move |n| Selection { n, ..selection })
        };
        match self {
            Self::Select(selection) => others(*selection).map(Self::Select).collect(),
            Self::Enter(traffic, selection) => {
                others(*selection).map(|other| Self::Enter(*traffic, other)).collect()
            }
            Self::ExternalLocal(selection, here) => {
                let more_or_less = |other: Selection| {
                    let moved =
                        (*here).checked_add_signed(if other.n > selection.n { 1 } else { -1 });
                    [Some(*here), moved].into_iter().flatten().map(move |here| (other, here))
                };
                let all = others(*selection).flat_map(more_or_less);
                all.map(|(other, here)| Self::ExternalLocal(other, here)).collect()
            }
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
        match self {
            Self::OfPort(chain) => match chain.1 {
                PortChain::Sticky(list) | PortChain::EnterSticky(_, list) => {
                    vec![AffinityName { port: chain.0.clone(), list }]
                }
                _ => self.next().flat_map(|next| next.asks()).collect(),
            },
            Self::Restricted(_) => self.next().flat_map(|next| next.asks()).collect(),
            _ => Vec::new(),
        }
    }

    /// Whether it is for clients of a frontend under externalTrafficPolicy Local.
    #[must_use]
    pub fn is_external_local(&self) -> bool {
        match self {
            Self::ExternalLocal(..) => true,
            Self::OfPort(chain) => {
                matches!(chain.1, PortChain::ExternalLocal(..) | PortChain::ExternalLocalSticky)
            }
            _ => false,
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
