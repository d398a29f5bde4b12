//! What the settings come down to on this node: checked, and in the types that the program works with.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::value::{Type, Value, split};
use super::values::{Origin, Values, default, given};
use super::{Config, ConfigError, Field, Flags, Live, Log, Remark, Source};
use crate::host::{self, Conntrack};
use crate::model::Family;
use crate::nft::dataplane::Loopback;
use crate::nft::rule::InterfaceName;
use crate::settings::{DetectLocal, NodePortAddresses, Settings};

/// Resolves everything. What is derived from something else is written back, so that it is shown.
pub(super) fn resolve(
    flags: &Flags,
    values: &mut Values,
    remarks: &mut Vec<Remark>,
) -> Result<Config, ConfigError> {
    check_mode(values, remarks);
    check_gates(values, remarks)?;
    let node_name = node_name(values)?;
    let bind_address = bind_address(values)?;
    let healthz_bind_address = Listener::HEALTH.address(flags, values, bind_address)?;
    let metrics_bind_address = Listener::METRICS.address(flags, values, bind_address)?;
    let loopback = if localhost_node_ports(values, remarks) {
        Loopback::NodePorts
    } else {
        Loopback::Untouched
    };
    let settings = Settings {
        loopback,
        counters: values.bool("nftproxy.counters"),
        masquerade_mark: 1 << values.int("nftables.masqueradeBit"),
        masquerade_all: values.bool("nftables.masqueradeAll"),
        detect_local: detect_local(values, remarks)?,
        node_port_addresses: node_port_addresses(values)?,
        node_address: Some(bind_address).filter(|address| !address.is_unspecified()),
    };
    let (min_sync_period, sync_period) = periods(values)?;
    let source = match values.text("nftproxy.manifests") {
        "" => {
            let some = |path: &str| Some(values.text(path)).filter(|text| !text.is_empty());
            Source::Api {
                kubeconfig: some("clientConnection.kubeconfig").map(Into::into),
                master: some("nftproxy.master").map(Into::into),
            }
        }
        dir => Source::Manifests(dir.into()),
    };
    Ok(Config {
        node_name,
        source,
        table_owner: values.bool("nftproxy.tableOwner"),
        keep_kube_proxy_rules: values.bool("nftproxy.keepKubeProxyRules"),
        healthz_bind_address,
        metrics_bind_address,
        bind_address_hard_fail: values.bool("bindAddressHardFail"),
        log: Log {
            verbosity: values.int("logging.verbosity").try_into().unwrap_or(u8::MAX),
            json: values.text("logging.format") == "json",
        },
        live: Live {
            settings,
            min_sync_period,
            sync_period,
            conntrack: conntrack(values),
            oom_score_adj: i32::try_from(values.int("oomScoreAdj")).expect("checked by its type"),
        },
    })
}

/// Says that the mode is another one, and lets the section of that mode count where the one of nftables
/// says nothing: who comes from iptables has written there what is meant.
fn check_mode(values: &mut Values, remarks: &mut Vec<Remark>) {
    let mode = values.text("mode").to_owned();
    if mode != "nftables" && values.is_set("mode") && !mode.is_empty() {
        let mut message = format!("{mode}: nftables is used, as always here");
        if values.list("nodePortAddresses").is_empty() {
            message += "; node ports are served on the node's primary addresses, where this mode \
                        serves them on all (nodePortAddresses: [all])";
        }
        remarks.push(Remark::note(values.get("mode").origin.to_string(), message));
    }
    let pairs = [
        ("nftables.masqueradeAll", "iptables.masqueradeAll"),
        ("nftables.masqueradeBit", "iptables.masqueradeBit"),
        ("nftables.minSyncPeriod", "iptables.minSyncPeriod"),
        ("nftables.syncPeriod", "iptables.syncPeriod"),
    ];
    for (ours, theirs) in pairs {
        let other = values.get(theirs).clone();
        // Written out, false and 0s are also what Go leaves where nothing was said.
        let is_open = !values.is_set(ours) || values.get(ours).value.is_zero();
        let counts = match other.origin {
            Origin::Default | Origin::Host => false,
            // kube-proxy has no flags of their own for the periods of nftables.
            Origin::Flag(_) => mode != "nftables" || ours.ends_with("Period"),
            Origin::File(..) => mode != "nftables",
        };
        if is_open && counts && !other.value.is_zero() {
            values.settle(ours, other.value, other.origin);
        } else if !counts && other.asks_for_more_than(&default(field(theirs))) {
            let message = format!("{} has no effect: the mode is nftables", other.value);
            remarks.push(Remark::note(other.origin.to_string(), message));
        }
    }
}

fn field(path: &str) -> &'static Field {
    Field::at(path).expect("a path of the table")
}

/// Switches that would change something here.
fn check_gates(values: &Values, remarks: &mut Vec<Remark>) -> Result<(), ConfigError> {
    let origin = &values.get("featureGates").origin;
    for (gate, on) in values.switches("featureGates") {
        let (gate, on) = (gate.as_str(), *on);
        let mut warn = |message: &str| {
            remarks.push(Remark::warning(format!("{origin}.{gate}"), format!("{on}: {message}")));
        };
        match (gate, on) {
            ("AllowServiceExternalIPs", false) => {
                return Err(ConfigError::Value {
                    origin: format!("{origin}.{gate}"),
                    value: on.to_string(),
                    expected: "external IPs are always served; expected true".into(),
                });
            }
            ("PreferSameTrafficDistribution", false) => {
                warn("hints of EndpointSlices for nodes are always followed");
            }
            ("MultiCIDRServiceAllocator", false) => warn("ServiceCIDRs are always followed"),
            _ => {}
        }
    }
    Ok(())
}

fn node_name(values: &mut Values) -> Result<String, ConfigError> {
    let path = "hostnameOverride";
    let given = values.text(path);
    if given.is_empty() {
        let name = host::node_name()?;
        values.settle(path, Value::Text(name.clone()), Origin::Host);
        return Ok(name);
    }
    let name = given.trim().to_lowercase();
    if name.is_empty() {
        return values.refuse(path, "expected a node name");
    }
    let origin = values.get(path).origin.clone();
    values.settle(path, Value::Text(name.clone()), origin);
    Ok(name)
}

fn bind_address(values: &Values) -> Result<IpAddr, ConfigError> {
    match values.text("bindAddress").trim().parse() {
        Ok(address) => Ok(address),
        Err(_) => values.refuse("bindAddress", "expected an IP address"),
    }
}

/// One of the two HTTP servers.
struct Listener {
    path: &'static str,
    port_flag: &'static str,
    port: u16,
    hosts: [&'static str; 2],
}

impl Listener {
    const HEALTH: Self = Self {
        path: "healthzBindAddress",
        port_flag: "healthz-port",
        port: 10256,
        hosts: ["0.0.0.0", "[::]"],
    };
    const METRICS: Self = Self {
        path: "metricsBindAddress",
        port_flag: "metrics-port",
        port: 10249,
        hosts: ["127.0.0.1", "[::1]"],
    };

    /// Where it listens; None if it is turned off.
    fn address(
        &self,
        flags: &Flags,
        values: &mut Values,
        bind_address: IpAddr,
    ) -> Result<Option<SocketAddr>, ConfigError> {
        let (mut port, mut origin) = (self.port, values.get(self.path).origin.clone());
        // As in kube-proxy, the port alone is only heard if there is no file.
        let port_given = given(flags, self.port_flag, Type::Int(0, 65535)).transpose()?;
        if let (Some(Value::Int(given)), None) = (port_given, &flags.config) {
            port = u16::try_from(given).expect("checked by its type");
            if !values.is_set(self.path) {
                origin = Origin::Flag(self.port_flag);
            }
        }
        let written = values.text(self.path).trim();
        let is_off = port == 0 || written.is_empty() && values.is_set(self.path);
        let address = if is_off {
            None
        } else if written.is_empty() {
            let host = self.hosts[usize::from(bind_address.is_ipv6())];
            Some(format!("{host}:{port}").parse().expect("a host of the table"))
        } else {
            let bare = written.trim_start_matches('[').trim_end_matches(']');
            let with_port = bare.parse().map(|address: IpAddr| SocketAddr::new(address, port));
            match written.parse().or(with_port) {
                Ok(address) if SocketAddr::port(&address) != 0 => Some(address),
                _ => return values.refuse(self.path, "expected an address like 0.0.0.0:10256"),
            }
        };
        let shown = address.map(|address| address.to_string()).unwrap_or_default();
        values.settle(self.path, Value::Text(shown), origin);
        Ok(address)
    }
}

fn detect_local(values: &Values, remarks: &mut Vec<Remark>) -> Result<DetectLocal, ConfigError> {
    Ok(match values.text("detectLocalMode") {
        "NodeCIDR" => DetectLocal::NodeCidr,
        "BridgeInterface" => {
            let name = interface(values, "detectLocal.bridgeInterface")?;
            DetectLocal::Interface(InterfaceName::Whole(name))
        }
        "InterfaceNamePrefix" => {
            let name = interface(values, "detectLocal.interfaceNamePrefix")?;
            // Only one name begins with so many bytes, and nft does not take a `*` behind them.
            let whole = name.len() == LONGEST_INTERFACE;
            let name = if whole { InterfaceName::Whole(name) } else { InterfaceName::Prefix(name) };
            DetectLocal::Interface(name)
        }
        _ => {
            let ranges = cluster_ranges(values)?;
            if ranges.is_empty() {
                remarks.push(Remark::note(
                    "clusterCIDR",
                    "nothing is set, so that pods are not told from other sources: what comes from \
                     outside of the cluster to a ClusterIP is not masqueraded",
                ));
            }
            DetectLocal::ClusterCidr(ranges)
        }
    })
}

fn cluster_ranges(values: &Values) -> Result<Vec<IpNet>, ConfigError> {
    let expected = "expected a range like 10.244.0.0/16, or one of each family with a comma";
    let mut ranges: Vec<IpNet> = Vec::new();
    for item in split(values.text("clusterCIDR")) {
        let Ok(range) = item.parse() else {
            return values.refuse_part("clusterCIDR", item, expected);
        };
        ranges.push(range);
    }
    let of = |family| ranges.iter().filter(|range| Family::of(range.addr()) == family).count();
    if Family::BOTH.into_iter().any(|family| of(family) > 1) {
        return values.refuse("clusterCIDR", expected);
    }
    Ok(ranges)
}

/// The longest name of a network interface that the kernel takes: `IFNAMSIZ`, less its NUL.
const LONGEST_INTERFACE: usize = 15;

/// The name of a network interface, or what it begins with.
fn interface(values: &Values, path: &str) -> Result<Arc<str>, ConfigError> {
    let name = values.text(path);
    let known = |byte: u8| byte.is_ascii_graphic() && !b"/:*\"\\".contains(&byte);
    if (1..=LONGEST_INTERFACE).contains(&name.len()) && name.bytes().all(known) {
        return Ok(name.into());
    }
    values.refuse(path, "expected an interface name of 1 to 15 characters")
}

/// Every address of both families.
const ALL: [&str; 2] = ["0.0.0.0/0", "::/0"];

const LOCALHOST: [&str; 2] = ["127.0.0.0/8", "::1/128"];

/// Node ports are served on 127.0.0.1 if our own setting says so, or if they are by kube-proxy: then
/// the list names the loopback, by keyword or, with the gate, by range.
fn localhost_node_ports(values: &mut Values, remarks: &mut Vec<Remark>) -> bool {
    let own = "nftproxy.localhostNodePorts";
    let list = values.list("nodePortAddresses");
    let gate = values.switches("featureGates").get("KubeProxyNFTablesLocalhostNodePorts").copied();
    let is_loopback = |item: &String| {
        item.parse().is_ok_and(|range: IpNet| range.addr().is_loopback() && range.prefix_len() > 0)
    };
    let named = list.iter().any(|item| item.trim() == "localhost")
        || gate == Some(true) && list.iter().any(is_loopback);
    if named {
        let origin = values.get("nodePortAddresses").origin.clone();
        let message = "localhost: node ports are served on 127.0.0.1, and not on ::1";
        remarks.push(Remark::note(origin.to_string(), message));
        if !values.bool(own) {
            values.settle(own, Value::Bool(true), origin);
        }
    }
    values.bool(own)
}

fn node_port_addresses(values: &Values) -> Result<NodePortAddresses, ConfigError> {
    let path = "nodePortAddresses";
    let (mut ranges, mut primary) = (Vec::<IpNet>::new(), false);
    for item in values.list(path) {
        match item.trim() {
            "primary" => primary = true,
            "all" => ranges.extend(ALL.map(|all| all.parse::<IpNet>().expect("a range"))),
            // Addresses of the loopback are no others' to dial: of the ranges themselves none is left.
            "localhost" => {
                ranges.extend(LOCALHOST.map(|all| all.parse::<IpNet>().expect("a range")));
            }
            item => {
                let Ok(range) = item.parse() else {
                    let expected = "expected ranges like 192.0.2.0/24, primary, or all";
                    return values.refuse_part(path, item, expected);
                };
                ranges.push(range);
            }
        }
    }
    Ok(match (primary, ranges.is_empty()) {
        (_, true) => NodePortAddresses::Primary,
        (false, false) => NodePortAddresses::Ranges(ranges),
        (true, false) => NodePortAddresses::PrimaryAnd(ranges),
    })
}

fn periods(values: &Values) -> Result<(Duration, Duration), ConfigError> {
    let least = values.duration("nftables.minSyncPeriod");
    let longest = values.duration("nftables.syncPeriod");
    if longest.is_zero() {
        return values.refuse("nftables.syncPeriod", "expected more than 0s");
    }
    if least > longest {
        return values.refuse("nftables.minSyncPeriod", "expected no more than syncPeriod");
    }
    Ok((least, longest))
}

fn conntrack(values: &Values) -> Conntrack {
    let number = |path| u32::try_from(values.int(path)).expect("checked by its type");
    Conntrack {
        max_per_core: number("conntrack.maxPerCore"),
        min: number("conntrack.min"),
        tcp_be_liberal: values.bool("conntrack.tcpBeLiberal"),
        tcp_established_timeout: values.duration("conntrack.tcpEstablishedTimeout"),
        tcp_close_wait_timeout: values.duration("conntrack.tcpCloseWaitTimeout"),
        udp_timeout: values.duration("conntrack.udpTimeout"),
        udp_stream_timeout: values.duration("conntrack.udpStreamTimeout"),
    }
}
