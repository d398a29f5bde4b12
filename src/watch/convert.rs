//! Kubernetes objects to the model: the only place where it is known what their fields mean.
//!
//! Every function is total. An object that is not for a proxy becomes `None`, silently; a part that
//! makes no sense is left out and named in a [`Problem`], and the rest of the object counts. The API
//! server refuses most of these objects, but a manifest, an older server or an aggregated one may
//! hand them out, and one bad object must never stop another one.

mod service;
mod slice;
mod text;

use std::collections::HashSet;
use std::fmt::Display;
use std::num::NonZeroU16;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub use self::service::service;
pub use self::slice::endpoint_slice;
use self::text::{address, name_fault, network};
pub(in crate::watch) use self::text::{one_line, shown};
use crate::model::{Kind, NamespacedName, NodeFacts, Problem, Protocol, ServiceCidr};

/// On a Service: another proxy serves it. Any value counts, the empty one too.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// On an EndpointSlice: its Service is headless, so that no proxy needs it.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// On a Service: how connections are spread.
const SCHEDULER_ANNOTATION: &str = "nftproxy.dev/scheduler";
/// On an EndpointSlice: weights of its endpoints, `ADDRESS=WEIGHT` with commas between.
const WEIGHTS_ANNOTATION: &str = "nftproxy.dev/weights";
/// On a Node: its zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// On a Node: the cluster autoscaler is about to remove it. Any value and effect counts.
const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// Problems of one object that are listed one by one.
const LISTED_PROBLEMS: usize = 20;

/// What is wrong with one object, as it is found. The object's name is only written out when there
/// is something to say.
struct Findings {
    kind: Kind,
    name: NamespacedName,
    found: Vec<Problem>,
    unlisted: usize,
}

impl Findings {
    fn new(kind: Kind, name: &NamespacedName) -> Self {
        Self { kind, name: name.clone(), found: Vec::new(), unlisted: 0 }
    }

    fn add(&mut self, field: impl Display, message: impl Display) {
        if self.found.len() == LISTED_PROBLEMS {
            self.unlisted += 1;
            return;
        }
        self.found.push(Problem {
            object: format!("{} {}", self.kind, self.name),
            field: field.to_string(),
            message: message.to_string(),
        });
    }

    fn into_problems(mut self) -> Vec<Problem> {
        if self.unlisted > 0 {
            self.found.push(Problem {
                object: format!("{} {}", self.kind, self.name),
                field: String::new(),
                message: format!("has {} further problems, not listed", self.unlisted),
            });
        }
        self.found
    }
}

/// The name of an object of a kind, refused when it is missing or could not be an object's name.
pub fn name_of(kind: Kind, metadata: &ObjectMeta) -> Result<NamespacedName, Problem> {
    let name = metadata.name.as_deref().unwrap_or_default();
    let namespace = match kind {
        Kind::Service | Kind::EndpointSlice => {
            Some(metadata.namespace.as_deref().unwrap_or_default())
        }
        Kind::ServiceCidr | Kind::Node => None,
    };
    let faults = [Some(("metadata.name", name)), namespace.map(|n| ("metadata.namespace", n))];
    for (field, text) in faults.into_iter().flatten() {
        if let Some(fault) = name_fault(text) {
            return Err(Problem {
                object: match namespace {
                    Some(namespace) => format!("{kind} {}/{}", shown(namespace), shown(name)),
                    None => format!("{kind} {}", shown(name)),
                },
                field: field.to_owned(),
                message: format!("{fault}; the object is ignored"),
            });
        }
    }
    Ok(match namespace {
        Some(namespace) => NamespacedName::new(namespace, name),
        None => NamespacedName::cluster_scoped(name),
    })
}

fn has_label(metadata: &ObjectMeta, label: &str) -> bool {
    metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(label))
}

fn annotation<'a>(metadata: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

/// A number that is not a port, and what happens instead.
struct NotAPort(i32, &'static str);

impl Display for NotAPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is not a port number (1 to 65535); {}", self.0, self.1)
    }
}

/// A protocol no proxy knows.
struct NotAProtocol<'a>(Option<&'a str>);

impl Display for NotAProtocol<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = shown(self.0.unwrap_or_default());
        write!(f, "{text} is none of TCP, UDP and SCTP; the port is skipped")
    }
}

fn port_number(number: i32) -> Option<NonZeroU16> {
    u16::try_from(number).ok().and_then(NonZeroU16::new)
}

fn protocol(text: Option<&str>) -> Option<Protocol> {
    match text {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

/// An unnamed port is fine; a named one is a DNS label, at most 63 characters.
fn port_name_fault(name: &str) -> Option<&'static str> {
    match name.len() {
        0 => None,
        1..=63 => name_fault(name),
        _ => Some("is longer than 63 characters"),
    }
}

/// What a port of a Service and one of a slice have in common: number and protocol, if they are some and no
/// earlier port has the same name and protocol.
fn port<'a>(
    name: &'a str,
    number: i32,
    protocol: Option<&str>,
    field: impl Fn(&str) -> String,
    names: &mut HashSet<(&'a str, Protocol)>,
    problems: &mut Findings,
) -> Option<(u16, Protocol)> {
    if let Some(fault) = port_name_fault(name) {
        problems.add(field("name"), format_args!("{} {fault}; the port is skipped", shown(name)));
        return None;
    }
    let Some(valid) = port_number(number) else {
        problems.add(field("port"), NotAPort(number, "the port is skipped"));
        return None;
    };
    let Some(known) = self::protocol(protocol) else {
        problems.add(field("protocol"), NotAProtocol(protocol));
        return None;
    };
    if !names.insert((name, known)) {
        problems.add(
            field("name"),
            format_args!(
                "an earlier port has the name {} and protocol {known}, too; this one is skipped",
                shown(name)
            ),
        );
        return None;
    }
    Some((valid.get(), known))
}

fn networks(
    listed: Option<&[String]>,
    field: &'static str,
    otherwise: &'static str,
    problems: &mut Findings,
) -> Vec<IpNet> {
    let mut networks = Vec::new();
    for (i, text) in listed.unwrap_or_default().iter().enumerate() {
        match network(text.trim()) {
            Some(net) if networks.contains(&net) => {}
            Some(net) => networks.push(net),
            None => problems.add(
                format_args!("{field}[{i}]"),
                format_args!("{} is not a CIDR like 10.0.0.0/8; {otherwise}", shown(text)),
            ),
        }
    }
    networks
}

/// The facts of a Node, or `None` if its name is none.
#[must_use]
pub fn node(object: &Node) -> (Option<NodeFacts>, Vec<Problem>) {
    let name = match name_of(Kind::Node, &object.metadata) {
        Ok(name) => name,
        Err(problem) => return (None, vec![problem]),
    };
    let mut problems = Findings::new(Kind::Node, &name);
    let listed = object.status.as_ref().and_then(|status| status.addresses.as_deref());
    let mut addresses = Vec::new();
    for wanted in ["InternalIP", "ExternalIP"] {
        for (i, entry) in listed.unwrap_or_default().iter().enumerate() {
            if entry.type_ != wanted {
                continue;
            }
            match address(&entry.address) {
                Some(ip) if addresses.contains(&ip) => {}
                Some(ip) => addresses.push(ip),
                None => problems.add(
                    format_args!("status.addresses[{i}].address"),
                    format_args!("{} is not an IP address; it is ignored", shown(&entry.address)),
                ),
            }
        }
    }
    let spec = object.spec.as_ref();
    // podCIDR is podCIDRs[0] of objects from before there were two families.
    let (pod_cidrs, field) = match spec.and_then(|spec| spec.pod_cidrs.as_deref()) {
        Some(cidrs) if !cidrs.is_empty() => (cidrs, "spec.podCIDRs"),
        _ => (spec.map(|spec| spec.pod_cidr.as_slice()).unwrap_or_default(), "spec.podCIDR"),
    };
    let facts = NodeFacts {
        name: name.as_str().to_lowercase(),
        addresses,
        interfaces: Vec::new(), // the host tells
        pod_cidrs: networks(Some(pod_cidrs), field, "it is ignored", &mut problems),
        zone: object
            .metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(ZONE_LABEL))
            .filter(|zone| !zone.is_empty())
            .cloned(),
        leaving: object.metadata.deletion_timestamp.is_some()
            || spec
                .and_then(|spec| spec.taints.as_ref())
                .is_some_and(|taints| taints.iter().any(|t| t.key == TO_BE_DELETED_TAINT)),
    };
    (Some(facts), problems.into_problems())
}

/// A ServiceCIDR, or `None` if its name is none. Its status is not looked at: a range that is about
/// to go still has ClusterIPs.
#[must_use]
pub fn service_cidr(object: &ServiceCIDR) -> (Option<ServiceCidr>, Vec<Problem>) {
    let name = match name_of(Kind::ServiceCidr, &object.metadata) {
        Ok(name) => name,
        Err(problem) => return (None, vec![problem]),
    };
    let mut problems = Findings::new(Kind::ServiceCidr, &name);
    let listed = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref());
    let cidrs = networks(listed, "spec.cidrs", "it is ignored", &mut problems);
    (Some(ServiceCidr { name, cidrs }), problems.into_problems())
}

#[cfg(test)]
mod tests;
