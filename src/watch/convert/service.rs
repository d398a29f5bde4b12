//! Services: which addresses and ports clients dial, and under which policies.

use std::collections::HashSet;
use std::net::IpAddr;
use std::num::NonZeroU16;

use k8s_openapi::api::core::v1::{Service, ServiceSpec};

use super::text::{address, address_fault};
use super::{
    Findings, NotAPort, PROXY_NAME_LABEL, SCHEDULER_ANNOTATION, annotation, has_label, name_of,
    networks, port_number, shown,
};
use crate::model::{
    self, Family, Kind, Problem, Scheduler, ServicePort, SessionAffinity, TrafficPolicy,
};

/// What the API server fills in for `sessionAffinityConfig.clientIP.timeoutSeconds`.
const DEFAULT_AFFINITY_TIMEOUT: u32 = 10_800;
/// The longest such timeout it accepts.
const MAX_AFFINITY_TIMEOUT: u32 = 86_400;

/// A Service, or `None` if it is not for a proxy: headless, without a ClusterIP, `ExternalName`, or
/// labelled for another proxy.
#[must_use]
pub fn service(object: &Service) -> (Option<model::Service>, Vec<Problem>) {
    let name = match name_of(Kind::Service, &object.metadata) {
        Ok(name) => name,
        Err(problem) => return (None, vec![problem]),
    };
    let Some(spec) = &object.spec else { return (None, Vec::new()) };
    let service_type = spec.type_.as_deref().unwrap_or("ClusterIP");
    if has_label(&object.metadata, PROXY_NAME_LABEL)
        || service_type == "ExternalName"
        || matches!(spec.cluster_ip.as_deref(), None | Some("" | "None"))
    {
        return (None, Vec::new());
    }

    let mut problems = Findings::new(Kind::Service, &name);
    if !matches!(service_type, "ClusterIP" | "NodePort" | "LoadBalancer") {
        problems.add(
            "spec.type",
            format_args!(
                "{} is none of ClusterIP, NodePort, LoadBalancer and ExternalName; it counts as \
                 ClusterIP",
                shown(service_type)
            ),
        );
    }
    let cluster_ips = cluster_ips(spec, &mut problems);
    if cluster_ips.is_empty() {
        problems.add("spec.clusterIP", "no usable ClusterIP is left; the Service is not served");
        return (None, problems.into_problems());
    }

    let external = matches!(service_type, "NodePort" | "LoadBalancer")
        || spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty());
    let external_policy = traffic_policy(
        spec.external_traffic_policy.as_deref(),
        "spec.externalTrafficPolicy",
        &mut problems,
    );
    let external_policy = if external { external_policy } else { TrafficPolicy::Cluster };
    let internal_policy = traffic_policy(
        spec.internal_traffic_policy.as_deref(),
        "spec.internalTrafficPolicy",
        &mut problems,
    );

    let service = model::Service {
        created: object
            .metadata
            .creation_timestamp
            .as_ref()
            .map_or(0, |created| created.0.as_second()),
        cluster_ips,
        external_ips: external_ips(spec, &mut problems),
        load_balancer_ips: load_balancer_ips(object, &mut problems),
        ports: service_ports(spec, &mut problems),
        internal_traffic_policy: internal_policy,
        external_traffic_policy: external_policy,
        session_affinity: session_affinity(spec, &mut problems),
        source_ranges: networks(
            spec.load_balancer_source_ranges.as_deref(),
            "spec.loadBalancerSourceRanges",
            "the entry is ignored, and with no entry left the Service is open to all sources",
            &mut problems,
        ),
        scheduler: scheduler(object, &mut problems),
        health_check_node_port: (service_type == "LoadBalancer"
            && external_policy == TrafficPolicy::Local)
            .then(|| health_check_node_port(spec, &mut problems))
            .flatten(),
        name,
    };
    (Some(service), problems.into_problems())
}

/// The ClusterIP of each family the Service has. `ipFamilies` decides; an object from before that
/// field existed has one ClusterIP, of whichever family it is.
fn cluster_ips(spec: &ServiceSpec, problems: &mut Findings) -> Vec<IpAddr> {
    let first = spec.cluster_ip.as_slice();
    let listed = spec.cluster_ips.as_deref().filter(|ips| !ips.is_empty()).unwrap_or(first);
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let mut ips: Vec<IpAddr> = Vec::new();

    if families.is_empty() {
        if listed.len() > 1 {
            problems.add(
                "spec.ipFamilies",
                "is empty although there are several ClusterIPs; only spec.clusterIP counts",
            );
        }
        for text in first {
            if let Some(ip) = frontend_address(text, || "spec.clusterIP".to_owned(), problems) {
                ips.push(ip);
            }
        }
        return ips;
    }

    for (i, family) in families.iter().enumerate() {
        let family = match family.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            other => {
                problems.add(
                    format_args!("spec.ipFamilies[{i}]"),
                    format_args!("{} is neither IPv4 nor IPv6; it is ignored", shown(other)),
                );
                continue;
            }
        };
        let field = || format!("spec.clusterIPs[{i}]");
        // The API server allocates asynchronously when a Service becomes dual-stack, so that a
        // family without an address is no fault.
        let Some(text) = listed.get(i) else { continue };
        let Some(ip) = frontend_address(text, field, problems) else { continue };
        if Family::of(ip) != family {
            problems.add(
                field(),
                format_args!("{ip} is not of the family spec.ipFamilies[{i}] says; it is ignored"),
            );
        } else if ips.iter().any(|known| Family::of(*known) == family) {
            problems.add(field(), format_args!("{ip} is a second one of its family; ignored"));
        } else {
            ips.push(ip);
        }
    }
    ips
}

/// An address clients dial, or a problem.
fn frontend_address(
    text: &str,
    field: impl FnOnce() -> String,
    problems: &mut Findings,
) -> Option<IpAddr> {
    let Some(ip) = address(text) else {
        problems.add(field(), format_args!("{} is not an IP address; it is ignored", shown(text)));
        return None;
    };
    if let Some(fault) = address_fault(ip) {
        problems.add(field(), format_args!("{ip} is {fault}, not one to dial; it is ignored"));
        return None;
    }
    Some(ip)
}

fn external_ips(spec: &ServiceSpec, problems: &mut Findings) -> Vec<IpAddr> {
    let mut ips = Vec::new();
    for (i, text) in spec.external_ips.iter().flatten().enumerate() {
        match frontend_address(text, || format!("spec.externalIPs[{i}]"), problems) {
            Some(ip) if !ips.contains(&ip) => ips.push(ip),
            _ => {}
        }
    }
    ips
}

fn load_balancer_ips(object: &Service, problems: &mut Findings) -> Vec<IpAddr> {
    let status = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.as_deref()).unwrap_or_default();
    let mut ips = Vec::new();
    for (i, entry) in ingress.iter().enumerate() {
        // An entry with a host name only is reached through DNS, never through this node's rules.
        let Some(text) = entry.ip.as_deref().filter(|ip| !ip.is_empty()) else { continue };
        match entry.ip_mode.as_deref() {
            None | Some("" | "VIP") => {}
            Some("Proxy") => continue,
            Some(other) => {
                problems.add(
                    format_args!("status.loadBalancer.ingress[{i}].ipMode"),
                    format_args!("{} is neither VIP nor Proxy; the entry is ignored", shown(other)),
                );
                continue;
            }
        }
        let field = || format!("status.loadBalancer.ingress[{i}].ip");
        match frontend_address(text, field, problems) {
            Some(ip) if !ips.contains(&ip) => ips.push(ip),
            _ => {}
        }
    }
    ips
}

fn service_ports(spec: &ServiceSpec, problems: &mut Findings) -> Vec<ServicePort> {
    let listed = spec.ports.as_deref().unwrap_or_default();
    let mut ports: Vec<ServicePort> = Vec::with_capacity(listed.len());
    let mut names = HashSet::new();
    let mut numbers = HashSet::new();
    let mut node_ports = HashSet::new();
    for (i, port) in listed.iter().enumerate() {
        let field = |of: &str| format!("spec.ports[{i}].{of}");
        let name = port.name.as_deref().unwrap_or_default();
        let protocol = port.protocol.as_deref();
        let known = super::port(name, port.port, protocol, field, &mut names, problems);
        let Some((number, protocol)) = known else { continue };
        if !numbers.insert((number, protocol)) {
            problems.add(
                field("port"),
                format_args!("an earlier port has {number}/{protocol}, too; this one is skipped"),
            );
            continue;
        }
        let node_port = match port.node_port {
            None | Some(0) => None,
            Some(number) => {
                let valid = port_number(number);
                if valid.is_none() {
                    problems.add(
                        field("nodePort"),
                        NotAPort(number, "the port is served without a node port"),
                    );
                }
                valid.filter(|number| {
                    let first = node_ports.insert((*number, protocol));
                    if !first {
                        problems.add(
                            field("nodePort"),
                            format_args!(
                                "an earlier port has {number}/{protocol}, too; this one is served \
                                 without a node port"
                            ),
                        );
                    }
                    first
                })
            }
        };
        ports.push(ServicePort { name: name.into(), protocol, port: number, node_port });
    }
    ports
}

fn traffic_policy(
    text: Option<&str>,
    field: &'static str,
    problems: &mut Findings,
) -> TrafficPolicy {
    match text {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            problems.add(
                field,
                format_args!("{} is neither Cluster nor Local; it counts as Cluster", shown(other)),
            );
            TrafficPolicy::Cluster
        }
    }
}

fn scheduler(object: &Service, problems: &mut Findings) -> Scheduler {
    match annotation(&object.metadata, SCHEDULER_ANNOTATION) {
        None | Some("random") => Scheduler::Random,
        Some("round-robin") => Scheduler::RoundRobin,
        Some("source-hash") => Scheduler::SourceHash,
        Some("maglev") => Scheduler::Maglev,
        Some(other) => {
            problems.add(
                format_args!("metadata.annotations[{SCHEDULER_ANNOTATION}]"),
                format_args!(
                    "{} is none of random, round-robin, source-hash and maglev; it counts as random",
                    shown(other)
                ),
            );
            Scheduler::Random
        }
    }
}

fn session_affinity(spec: &ServiceSpec, problems: &mut Findings) -> SessionAffinity {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return SessionAffinity::None,
        Some("ClientIP") => {}
        Some(other) => {
            problems.add(
                "spec.sessionAffinity",
                format_args!("{} is neither ClientIP nor None; it counts as None", shown(other)),
            );
            return SessionAffinity::None;
        }
    }
    let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
    let Some(seconds) = config.and_then(|c| c.timeout_seconds) else {
        return SessionAffinity::ClientIp { timeout: DEFAULT_AFFINITY_TIMEOUT };
    };
    let valid = u32::try_from(seconds).ok().filter(|s| (1..=MAX_AFFINITY_TIMEOUT).contains(s));
    if valid.is_none() {
        problems.add(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format_args!(
                "{seconds} is not a timeout (1 to {MAX_AFFINITY_TIMEOUT} seconds); \
                 {DEFAULT_AFFINITY_TIMEOUT} is used"
            ),
        );
    }
    SessionAffinity::ClientIp { timeout: valid.unwrap_or(DEFAULT_AFFINITY_TIMEOUT) }
}

fn health_check_node_port(spec: &ServiceSpec, problems: &mut Findings) -> Option<NonZeroU16> {
    // The API server always assigns one; in a manifest, no number asks for no health check.
    let number = spec.health_check_node_port.filter(|number| *number != 0)?;
    let valid = port_number(number);
    if valid.is_none() {
        problems.add(
            "spec.healthCheckNodePort",
            NotAPort(number, "no health check is served for the Service"),
        );
    }
    valid
}
