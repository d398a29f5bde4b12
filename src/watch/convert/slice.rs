//! EndpointSlices: who may answer, with every unset condition resolved.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use k8s_openapi::api::discovery::v1::{self as discovery, EndpointSlice};

use super::text::{address, address_fault, name_fault};
use super::{Findings, HEADLESS_LABEL, WEIGHTS_ANNOTATION, annotation, has_label, name_of, shown};
use crate::model::{self, Endpoint, Family, Hints, Kind, NamespacedName, Problem, SlicePort};

/// Largest weight of an endpoint: each is an element in the kernel.
const MAX_WEIGHT: u16 = 1000;

/// On an EndpointSlice: when the change was made that it was last written for.
const TRIGGER_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// On an EndpointSlice: the Service it belongs to.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// An EndpointSlice, or `None` if no proxy needs it: of FQDN addresses, of a headless Service, or of
/// no Service at all. `node_name` decides which endpoints are local.
#[must_use]
pub fn endpoint_slice(
    object: &EndpointSlice,
    node_name: &str,
) -> (Option<model::EndpointSlice>, Vec<Problem>) {
    let name = match name_of(Kind::EndpointSlice, &object.metadata) {
        Ok(name) => name,
        Err(problem) => return (None, vec![problem]),
    };
    if has_label(&object.metadata, HEADLESS_LABEL) || object.address_type == "FQDN" {
        return (None, Vec::new());
    }
    let mut problems = Findings::new(Kind::EndpointSlice, &name);
    let family = match object.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        other => {
            problems.add(
                "addressType",
                format_args!(
                    "{} is none of IPv4, IPv6 and FQDN; the slice is ignored",
                    shown(other)
                ),
            );
            return (None, problems.into_problems());
        }
    };
    let label = object.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL));
    let owner = label.map(String::as_str).unwrap_or_default();
    if let Some(fault) = name_fault(owner) {
        problems.add(
            format_args!("metadata.labels[{SERVICE_NAME_LABEL}]"),
            format_args!("{fault}, so that the slice belongs to no Service; it is ignored"),
        );
        return (None, problems.into_problems());
    }

    let weights = weights(object, &mut problems);
    let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
    let slice = model::EndpointSlice {
        service: NamespacedName::new(namespace, owner),
        family,
        ports: slice_ports(object, &mut problems),
        endpoints: object
            .endpoints
            .iter()
            .enumerate()
            .filter_map(|(i, e)| endpoint(e, i, family, node_name, &weights, &mut problems))
            .collect(),
        last_change_trigger: last_change_trigger(object),
        name,
    };
    (Some(slice), problems.into_problems())
}

/// Nothing but a measurement depends on it, so that an unreadable one is as good as none.
fn last_change_trigger(object: &EndpointSlice) -> Option<u64> {
    let time: jiff::Timestamp = annotation(&object.metadata, TRIGGER_ANNOTATION)?.parse().ok()?;
    u64::try_from(time.as_millisecond()).ok()
}

/// The weights that the annotation gives to addresses. An address that is not in the slice is no
/// fault: the annotation may come first.
fn weights(object: &EndpointSlice, problems: &mut Findings) -> HashMap<IpAddr, u16> {
    let text = annotation(&object.metadata, WEIGHTS_ANNOTATION).unwrap_or_default();
    let entries = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    let mut weights = HashMap::new();
    for entry in entries {
        let parsed = entry.split_once('=').and_then(|(ip, weight)| {
            let weight = weight.trim().parse().ok().filter(|weight| *weight <= MAX_WEIGHT)?;
            Some((address(ip.trim())?, weight))
        });
        if let Some((ip, weight)) = parsed {
            weights.insert(ip, weight);
        } else {
            problems.add(
                format_args!("metadata.annotations[{WEIGHTS_ANNOTATION}]"),
                format_args!(
                    "{} is no ADDRESS=WEIGHT with a weight of 0 to {MAX_WEIGHT}; it is ignored",
                    shown(entry)
                ),
            );
        }
    }
    weights
}

fn slice_ports(object: &EndpointSlice, problems: &mut Findings) -> Vec<SlicePort> {
    let listed = object.ports.as_deref().unwrap_or_default();
    let mut ports = Vec::with_capacity(listed.len());
    let mut names = HashSet::new();
    for (i, port) in listed.iter().enumerate() {
        let field = |of: &str| format!("ports[{i}].{of}");
        // Without a number a port means "all ports", which no proxy can serve.
        let (Some(name), Some(number @ (..=-1 | 1..))) = (port.name.as_deref(), port.port) else {
            continue;
        };
        let protocol = port.protocol.as_deref();
        let known = super::port(name, number, protocol, field, &mut names, problems);
        let Some((number, protocol)) = known else { continue };
        ports.push(SlicePort { name: name.into(), protocol, port: number });
    }
    ports
}

fn endpoint(
    object: &discovery::Endpoint,
    index: usize,
    family: Family,
    node_name: &str,
    weights: &HashMap<IpAddr, u16>,
    problems: &mut Findings,
) -> Option<Endpoint> {
    let text = object.addresses.first()?;
    let fault = match address(text) {
        None => "is not an IP address",
        Some(ip) if Family::of(ip) != family => match family {
            Family::V4 => "is not an IPv4 address as the slice's addressType says",
            Family::V6 => "is not an IPv6 address as the slice's addressType says",
        },
        Some(ip) => match address_fault(ip) {
            None => {
                let weight = weights.get(&ip).copied().unwrap_or(1);
                return Some(resolved(object, ip, weight, node_name));
            }
            Some("a loopback address") => "is a loopback address",
            Some("a multicast address") => "is a multicast address",
            Some(_) => "is the unspecified address",
        },
    };
    problems.add(
        format_args!("endpoints[{index}].addresses[0]"),
        format_args!("{} {fault}; the endpoint is skipped", shown(text)),
    );
    None
}

/// The endpoint with everything unset replaced by what that means.
fn resolved(
    object: &discovery::Endpoint,
    address: IpAddr,
    weight: u16,
    node_name: &str,
) -> Endpoint {
    let conditions = object.conditions.as_ref();
    let hints = object.hints.as_ref().map(|hints| Hints {
        zones: hints.for_zones.iter().flatten().map(|zone| zone.name.as_str().into()).collect(),
        nodes: hints.for_nodes.iter().flatten().map(|node| node.name.as_str().into()).collect(),
    });
    Endpoint {
        address,
        ready: conditions.and_then(|c| c.ready).unwrap_or(true),
        serving: conditions.and_then(|c| c.serving).unwrap_or(true),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        local: object.node_name.as_deref() == Some(node_name),
        weight,
        hints: hints.filter(|h| !h.zones.is_empty() || !h.nodes.is_empty()).map(Box::new),
    }
}
