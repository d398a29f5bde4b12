//! The numbering of backends that the kernel holds: taken over at the start, so that a restart renumbers
//! nothing.

use std::collections::BTreeMap;
use std::ops::Range;

use super::State;
use super::objects::Known;
use crate::contribution::Lists;
use crate::frontend::{Frontend, frontends};
use crate::model::Family;
use crate::nft::dataplane::FIRST_LOCAL_SLOT;
use crate::nft::element::{ElementId, Key, Value};
use crate::nft::names::SetName;
use crate::slots::Slots;

impl State {
    /// Takes over the numbering of backends that the kernel holds in a family, so that a restart
    /// renumbers nothing. All frontends of a port share its lists; the first that has one in the kernel tells.
    pub fn adopt_slots(&mut self, family: Family, elements: &BTreeMap<ElementId, Value>) {
        let Self { objects, frontends: owners, .. } = self;
        for (name, holding) in objects.holdings() {
            let Some(Known { object: service, .. }) = &holding.service else { continue };
            for port in &service.ports {
                let mut lists = Lists::default();
                let all = frontends(service, port, family).into_iter();
                for (frontend, _) in all.filter(|(f, _)| owners.owner(*f) == Some(name)) {
                    let held = |slots| held_slots(elements, family, frontend, slots);
                    if lists.cluster.as_slice().is_empty() {
                        lists.cluster = held(0..FIRST_LOCAL_SLOT);
                    }
                    if lists.local.as_slice().is_empty() {
                        lists.local = held(FIRST_LOCAL_SLOT..u16::MAX);
                    }
                }
                *holding.slots.lists(family, port) = lists;
            }
        }
    }
}

/// The backends of a frontend in these slots, numbered from the first of them.
fn held_slots(
    elements: &BTreeMap<ElementId, Value>,
    family: Family,
    frontend: Frontend,
    slots: Range<u16>,
) -> Slots {
    let id = |slot| match frontend {
        Frontend::Address(address, protocol, port) => ElementId {
            family,
            set: SetName::Endpoints,
            key: Key::Slot(address, protocol, port, slot),
        },
        Frontend::NodePort(_, protocol, port) => ElementId {
            family,
            set: SetName::NodeportEndpoints,
            key: Key::NodePortSlot(protocol, port, slot),
        },
    };
    let found = elements.range(id(slots.start)..id(slots.end));
    Slots::adopted(found.filter_map(|(id, value)| match (id.key, value) {
        (Key::Slot(.., slot) | Key::NodePortSlot(.., slot), Value::Backend(backend)) => {
            Some((slot - slots.start, *backend))
        }
        _ => None,
    }))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::num::NonZeroU16;

    use super::super::tests::{name, service, slice};
    use super::*;
    use crate::model::{Endpoint, Event, NodeFacts, Protocol, TrafficPolicy};
    use crate::nft::element::Backend;
    use crate::settings::Settings;

    fn backend(host: u8) -> Backend {
        Backend { address: [10, 244, 0, host].into(), port: 8000 }
    }

    /// The elements of the endpoints of a frontend: a host for each slot.
    fn held(key: impl Fn(u16) -> (SetName, Key), hosts: &[u8], first: u16) -> Elements {
        let slots = (first..).zip(hosts);
        let element = |(slot, host): (u16, &u8)| {
            let (set, key) = key(slot);
            (ElementId { family: Family::V4, set, key }, Value::Backend(backend(*host)))
        };
        slots.map(element).collect()
    }

    type Elements = BTreeMap<ElementId, Value>;

    fn at_address(slot: u16) -> (SetName, Key) {
        let address = IpAddr::from([10, 96, 0, 1]);
        (SetName::Endpoints, Key::Slot(address, Protocol::Tcp, 80, slot))
    }

    fn at_node_port(slot: u16) -> (SetName, Key) {
        (SetName::NodeportEndpoints, Key::NodePortSlot(Protocol::Tcp, 30080, slot))
    }

    /// The elements of endpoints that a state asks for which has taken over those of the kernel. Hosts 1
    /// to 4 are on this node.
    fn asked(kernel: &Elements) -> Elements {
        let mut state = State::new(Settings::default(), NodeFacts::default());
        let mut web = service("web", 1, &[80]);
        web.ports[0].node_port = NonZeroU16::new(30080);
        web.external_traffic_policy = TrafficPolicy::Local;
        let mut slice = slice("web-1", "web", &[80]);
        let [one] = &slice.endpoints[..] else { unreachable!() };
        let endpoint = |host: u8| Endpoint {
            address: [10, 244, 0, host].into(),
            local: host < 5,
            ..one.clone()
        };
        slice.endpoints = (1..=6).map(endpoint).collect();
        state.observe(Event::Service(web));
        state.observe(Event::EndpointSlice(slice));
        state.adopt_slots(Family::V4, kernel);
        let all = state.all_contributions().into_iter().flat_map(|(_, asked, _)| asked.elements);
        all.filter(|(_, value)| matches!(value, Value::Backend(_))).collect()
    }

    #[test]
    fn a_start_numbers_backends_as_the_kernel_has_them() {
        let (cluster, local) = ([6, 3, 1, 2, 5, 4], [4, 2, 3, 1]);
        let mut kernel = held(at_address, &cluster, 0);
        kernel.extend(held(at_node_port, &cluster, 0));
        kernel.extend(held(at_node_port, &local, FIRST_LOCAL_SLOT));
        assert_eq!(asked(&kernel), kernel);
        // One frontend is enough to tell, whichever it is; and what is none of ours tells nothing.
        for key in [at_address as fn(u16) -> _, at_node_port] {
            let mut some = held(key, &cluster, 0);
            some.extend(held(at_node_port, &local, FIRST_LOCAL_SLOT));
            assert_eq!(asked(&some), kernel);
        }
        let strange = held(
            |slot| (SetName::Endpoints, Key::Slot([10, 96, 0, 9].into(), Protocol::Tcp, 80, slot)),
            &cluster,
            0,
        );
        assert_eq!(asked(&strange), asked(&Elements::new()));
        assert_ne!(asked(&strange), kernel);
    }

    #[test]
    fn the_numbering_of_a_frontend_that_another_service_has_tells_nothing() {
        let mut state = State::new(Settings::default(), NodeFacts::default());
        for (text, last, created) in [("old", 1, 1), ("young", 2, 2)] {
            let external_ips = vec![[198, 51, 100, 1].into()];
            let mut slice = slice(text, text, &[80]);
            let [one] = &slice.endpoints[..] else { unreachable!() };
            let endpoint =
                |host: u8| Endpoint { address: [10, 244, 0, host].into(), ..one.clone() };
            slice.endpoints = [1, 2].map(endpoint).into();
            state.observe(Event::Service(crate::model::Service {
                created,
                external_ips,
                ..service(text, last, &[80])
            }));
            state.observe(Event::EndpointSlice(slice));
        }
        let contested = IpAddr::from([198, 51, 100, 1]);
        let key = |slot| (SetName::Endpoints, Key::Slot(contested, Protocol::Tcp, 80, slot));
        state.adopt_slots(Family::V4, &held(key, &[2, 1], 0));
        let first = |state: &mut State, text: &str| {
            let holding = state.objects.holding(&name(text)).unwrap();
            let port = holding.service.as_ref().unwrap().object.ports[0].clone();
            holding.slots.lists(Family::V4, &port).cluster.as_slice().first().copied()
        };
        assert_eq!(first(&mut state, "old"), Some(backend(2)));
        assert_eq!(first(&mut state, "young"), None);
    }
}
