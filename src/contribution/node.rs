//! The contribution of the node, its configuration and the cluster's address plan: the sets that
//! describe where a packet comes from and goes to, whatever Services there are.

use ipnet::IpNet;

use super::Contribution;
use crate::model::{Family, NodeFacts, ServiceCidr};
use crate::nft::element::{ElementId, Key, Value};
use crate::nft::names::SetName;
use crate::settings::Settings;

/// The contribution of the node.
pub fn of_node<'a>(
    node: &NodeFacts,
    settings: &Settings,
    cidrs: impl Iterator<Item = &'a ServiceCidr>,
) -> Contribution {
    let mut elements = Vec::new();
    for family in Family::BOTH {
        for address in settings.node_port_ips(node, family).into_iter().flatten() {
            let key = Key::Address(address);
            elements.push((ElementId { family, set: SetName::NodeportIps, key }, Value::None));
        }
    }
    let service_cidrs: Vec<IpNet> = cidrs.flat_map(|cidr| cidr.cidrs.iter().copied()).collect();
    let local = settings.local_ranges(node);
    for (set, ranges) in [(SetName::ServiceCidrs, &*service_cidrs), (SetName::LocalPods, local)] {
        // An interval set refuses ranges that overlap.
        let ranges: Vec<IpNet> = ranges.iter().map(IpNet::trunc).collect();
        for range in IpNet::aggregate(&ranges) {
            let family = Family::of(range.addr());
            let key = Key::Range(range.network(), range.broadcast());
            elements.push((ElementId { family, set, key }, Value::None));
        }
    }
    Contribution::new(elements, Vec::new(), Vec::new())
}
