//! What of the configuration shapes the rules: the same Services have other chains under another.

use serde::{Deserialize, Serialize};

use crate::nft::rule::InterfaceName;

/// What of the configuration shapes the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The packet mark bit that asks postrouting to masquerade; exactly one bit is set.
    pub masquerade_mark: u32,
    /// Masquerade everything that goes to a ClusterIP.
    pub masquerade_all: bool,
    /// How pods are told from other sources, by family (IPv4, IPv6).
    pub detect_local: [Detector; 2],
    /// Which addresses of the node serve node ports, by family.
    pub node_ports: [NodePorts; 2],
    /// Count connections by frontend and backend.
    pub counters: bool,
    /// What becomes of 127.0.0.0/8. There is no such thing for `::1`, which the kernel never routes.
    pub loopback: Loopback,
}

/// How a pod is told from other sources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Detector {
    /// Not at all: no source is masqueraded on its way to a ClusterIP.
    #[default]
    None,
    /// Its address is in `local-pods`.
    LocalPods,
    /// Its packets come in by this interface.
    Interface(InterfaceName),
}

/// Addresses of the node that serve node ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodePorts {
    /// Those in `nodeport-ips`.
    #[default]
    Listed,
    /// All but loopback.
    All,
}

/// What the rules have to do with loopback addresses of IPv4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Loopback {
    /// Nothing.
    #[default]
    Untouched,
    /// The kernel still routes them, since node ports were served there: others are kept from them.
    Guarded,
    /// The node itself reaches node ports there; others are kept from them.
    NodePorts,
}

impl Loopback {
    /// What follows on `before`: while the kernel routes loopback addresses because of what was, the
    /// guard stays.
    #[must_use]
    pub fn after(self, before: Self, routed: bool) -> Self {
        let guarded = routed && before != Self::Untouched;
        if self == Self::Untouched && guarded { Self::Guarded } else { self }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            masquerade_mark: 1 << 14,
            masquerade_all: false,
            detect_local: Default::default(),
            node_ports: Default::default(),
            counters: false,
            loopback: Loopback::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Loopback::{Guarded, NodePorts, Untouched};

    #[test]
    fn loopback_stays_guarded_while_it_is_routed_because_of_what_was() {
        for (now, before, routed, after) in [
            (Untouched, Untouched, true, Untouched),
            (Untouched, NodePorts, true, Guarded),
            (Untouched, Guarded, true, Guarded),
            (Untouched, NodePorts, false, Untouched),
            (NodePorts, Untouched, false, NodePorts),
            (NodePorts, Guarded, true, NodePorts),
        ] {
            assert_eq!(now.after(before, routed), after, "{now:?} after {before:?}");
        }
    }
}
