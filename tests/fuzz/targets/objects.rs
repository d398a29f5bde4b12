//! A JSON list of objects as an API server sends them, and then without every other one: the tables in the end
//! are those of a fresh start.
#![no_main]

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use libfuzzer_sys::fuzz_target;
use nftproxy::model::{Event, Kind, NodeFacts, Problem};
use nftproxy::nft::dataplane::FIRST_LOCAL_SLOT;
use nftproxy::nft::element::{ElementId, Key};
use nftproxy::nft::fake::FakeKernel;
use nftproxy::reconcile::Proxy;
use nftproxy::settings::Settings;
use nftproxy::state::State;
use nftproxy::watch::convert;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// What is made of an object; None if it has not the shape of its kind.
fn converted(object: &Value) -> Option<(Option<Event>, Vec<Problem>)> {
    fn read<K: DeserializeOwned, T>(
        object: &Value,
        convert: impl FnOnce(&K) -> (Option<T>, Vec<Problem>),
        event: fn(T) -> Event,
    ) -> Option<(Option<Event>, Vec<Problem>)> {
        let (converted, problems) = convert(&serde_json::from_value(object.clone()).ok()?);
        Some((converted.map(event), problems))
    }
    match object["kind"].as_str()? {
        "Service" => read::<Service, _>(object, convert::service, Event::Service),
        "EndpointSlice" => {
            let convert = |slice: &EndpointSlice| convert::endpoint_slice(slice, "node-1");
            read(object, convert, Event::EndpointSlice)
        }
        "ServiceCIDR" => read::<ServiceCIDR, _>(object, convert::service_cidr, Event::ServiceCidr),
        "Node" => read::<Node, _>(object, convert::node, Event::Node),
        _ => None,
    }
}

fn gone(event: &Event) -> Option<Event> {
    match event {
        Event::Service(service) => Some(Event::Gone(Kind::Service, service.name.clone())),
        Event::EndpointSlice(slice) => Some(Event::Gone(Kind::EndpointSlice, slice.name.clone())),
        Event::ServiceCidr(cidr) => Some(Event::Gone(Kind::ServiceCidr, cidr.name.clone())),
        _ => None,
    }
}

fn proxy(events: impl IntoIterator<Item = Event>) -> Proxy<FakeKernel> {
    let state = State::new(Settings::default(), NodeFacts::default());
    let mut proxy = Proxy::new(state, FakeKernel::default());
    events.into_iter().chain(Kind::ALL.map(Event::Listed)).for_each(|event| proxy.observe(event));
    assert_eq!(proxy.commit().expect("the kernel takes it").set_aside, 0);
    proxy
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(objects) = serde_json::from_slice::<Vec<Value>>(bytes) else { return };
    let mut events = Vec::new();
    for (event, problems) in objects.iter().filter_map(converted) {
        for problem in problems {
            assert!(!problem.to_string().contains('\n'), "{problem}");
        }
        events.extend(event);
    }
    let mut changed = proxy(events.clone());
    let taken: Vec<_> = events.iter().step_by(2).filter_map(gone).collect();
    taken.iter().for_each(|event| changed.observe(event.clone()));
    changed.commit().expect("the kernel takes it");
    let left = events.into_iter().filter(|event| gone(event).is_none_or(|gone| !taken.contains(&gone)));
    let mut fresh = proxy(left);
    // What the slots of a frontend hold; their order is that of history.
    let held = |proxy: &mut Proxy<FakeKernel>| {
        let wanted = proxy.wanted();
        let any_slot = |key| match key {
            Key::Slot(address, protocol, port, slot) => {
                Key::Slot(address, protocol, port, slot / FIRST_LOCAL_SLOT)
            }
            Key::NodePortSlot(protocol, port, slot) => {
                Key::NodePortSlot(protocol, port, slot / FIRST_LOCAL_SLOT)
            }
            key => key,
        };
        let elements = wanted.elements.iter();
        let mut elements: Vec<_> = elements
            .map(|(id, value)| (ElementId { key: any_slot(id.key), ..*id }, value.clone()))
            .collect();
        elements.sort();
        (elements, wanted.shared_chains, wanted.affinities)
    };
    assert_eq!(held(&mut changed), held(&mut fresh));
});
