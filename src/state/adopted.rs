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
