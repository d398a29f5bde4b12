//! Configuration: what the user wrote, in flags and in a `KubeProxyConfiguration` file, and what it
//! means on this node.
//!
//! The file is the one kube-proxy reads. Fields that cannot have an effect here are accepted and
//! named; values that would have an effect and are not supported yet are refused, because a proxy
//! that ignores them would do something else than the user believes.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;

use crate::host;
use crate::nft::rule::InterfaceName;
use crate::settings::{DetectLocal, NodePortAddresses, Settings};

/// What the program runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This node's name.
    pub node_name: String,
    /// Where objects come from.
    pub source: Source,
    /// What the data plane is to be like.
    pub settings: Settings,
    /// Own the tables, so that nobody else can change them.
    pub table_owner: bool,
    /// Least time between two commits.
    pub min_sync_period: Duration,
    /// Longest time between a failed commit and the next try.
    pub sync_period: Duration,
    /// Where `/healthz` and `/livez` are served; None for nowhere.
    pub healthz_bind_address: Option<SocketAddr>,
    /// Where `/metrics` is served; None for nowhere.
    pub metrics_bind_address: Option<SocketAddr>,
    /// Whether it is fatal if that cannot be.
    pub bind_address_hard_fail: bool,
}

/// Where objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory of manifests.
    Manifests(PathBuf),
    /// The API server of a kubeconfig file, or of the cluster this runs in.
    Api {
        /// The file; None for the in-cluster configuration.
        kubeconfig: Option<PathBuf>,
        /// Overrides the server's address.
        master: Option<String>,
    },
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Manifests(dir) => write!(f, "manifests in {}", dir.display()),
            Self::Api { kubeconfig: Some(file), .. } => {
                write!(f, "API server of {}", file.display())
            }
            Self::Api { kubeconfig: None, .. } => write!(f, "API server of this cluster"),
        }
    }
}

/// What was given on the command line; a flag that was given wins over the file.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// `--config`
    pub config: Option<PathBuf>,
    /// `--manifests`
    pub manifests: Option<PathBuf>,
    /// `--kubeconfig`
    pub kubeconfig: Option<PathBuf>,
    /// `--master`
    pub master: Option<String>,
    /// `--hostname-override`
    pub hostname_override: Option<String>,
    /// `--cluster-cidr`
    pub cluster_cidr: Option<String>,
    /// `--masquerade-all`
    pub masquerade_all: bool,
    /// `--table-owner`
    pub table_owner: bool,
    /// `--localhost-node-ports`
    pub localhost_node_ports: bool,
}

/// A configuration that cannot be used. One line: what, where, what was expected.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot read it: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not a `KubeProxyConfiguration`.
    #[error("{}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Field and expectation.
        reason: String,
    },
    /// A value that cannot be used.
    #[error("{origin}: {value:?}: {expected}")]
    Value {
        /// Flag, or file and field.
        origin: String,
        /// What was found.
        value: String,
        /// What was expected.
        expected: String,
    },
    /// The node's name is not known.
    #[error(transparent)]
    Hostname(#[from] host::HostnameError),
}

/// `KubeProxyConfiguration`, v1alpha1: the fields that have an effect.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct File {
    api_version: String,
    kind: String,
    mode: String,
    hostname_override: String,
    #[serde(rename = "clusterCIDR")]
    cluster_cidr: String,
    detect_local_mode: String,
    detect_local: DetectLocalFields,
    node_port_addresses: Option<Vec<String>>,
    client_connection: ClientConnection,
    nftables: Nftables,
    healthz_bind_address: String,
    metrics_bind_address: String,
    bind_address_hard_fail: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DetectLocalFields {
    bridge_interface: String,
    interface_name_prefix: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ClientConnection {
    kubeconfig: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Nftables {
    masquerade_bit: Option<u32>,
    masquerade_all: bool,
    min_sync_period: Option<String>,
    sync_period: Option<String>,
}

/// Reads the file, if there is one, and resolves everything. The second value are remarks for the
/// log: fields of the file that have no effect.
pub fn resolve(flags: &Flags) -> Result<(Config, Vec<String>), ConfigError> {
    let mut remarks = Vec::new();
    let file = match &flags.config {
        Some(path) => read(path, &mut remarks)?,
        None => File::default(),
    };
    let path = flags.config.clone().unwrap_or_default();
    let origin = |field: &str| format!("{}: {field}", path.display());

    let overridden = flags
        .hostname_override
        .as_deref()
        .or(Some(file.hostname_override.as_str()).filter(|name| !name.is_empty()));
    let node_name = match overridden {
        None => host::node_name()?,
        Some(name) if name.trim().is_empty() => {
            return Err(ConfigError::Value {
                origin: "--hostname-override".into(),
                value: name.into(),
                expected: "expected a node name".into(),
            });
        }
        Some(name) => name.trim().to_lowercase(),
    };
    let source = match &flags.manifests {
        Some(dir) => Source::Manifests(dir.clone()),
        None => Source::Api {
            kubeconfig: flags.kubeconfig.clone().or_else(|| {
                let file = &file.client_connection.kubeconfig;
                (!file.is_empty()).then(|| file.into())
            }),
            master: flags.master.clone(),
        },
    };
    let (cidr_origin, cidrs) = match &flags.cluster_cidr {
        Some(cidrs) => ("--cluster-cidr".to_owned(), cidrs.clone()),
        None => (origin("clusterCIDR"), file.cluster_cidr.clone()),
    };
    let detect_local = detect_local(&file, origin, (&cidr_origin, &cidrs))?;
    let node_port_addresses = node_port_addresses(&file, origin)?;
    check_supported(&file, origin)?;
    let bit = file.nftables.masquerade_bit.unwrap_or(14);
    if bit > 31 {
        return Err(ConfigError::Value {
            origin: origin("nftables.masqueradeBit"),
            value: bit.to_string(),
            expected: "expected 0 to 31".into(),
        });
    }
    let duration = |field: &str, text: &Option<String>, default: Duration| match text {
        None => Ok(default),
        Some(text) => parse_duration(text).ok_or_else(|| ConfigError::Value {
            origin: origin(field),
            value: text.clone(),
            expected: "expected a duration like 1s or 1m30s".into(),
        }),
    };
    let listen = |field: &str, text: &str, default: &str| {
        let text = if text.is_empty() { default } else { text };
        text.parse::<SocketAddr>().map_err(|_| ConfigError::Value {
            origin: origin(field),
            value: text.to_owned(),
            expected: format!("expected an address and a port like {default}"),
        })
    };
    let nft = &file.nftables;
    let config = Config {
        node_name,
        source,
        settings: Settings {
            masquerade_mark: 1 << bit,
            masquerade_all: flags.masquerade_all || nft.masquerade_all,
            detect_local,
            node_port_addresses,
            localhost_node_ports: flags.localhost_node_ports,
        },
        table_owner: flags.table_owner,
        min_sync_period: duration("nftables.minSyncPeriod", &nft.min_sync_period, Duration::ZERO)?,
        sync_period: duration("nftables.syncPeriod", &nft.sync_period, Duration::from_secs(30))?
            .max(Duration::from_secs(1)),
        healthz_bind_address: Some(listen(
            "healthzBindAddress",
            &file.healthz_bind_address,
            "0.0.0.0:10256",
        )?),
        metrics_bind_address: Some(listen(
            "metricsBindAddress",
            &file.metrics_bind_address,
            "127.0.0.1:10249",
        )?),
        bind_address_hard_fail: file.bind_address_hard_fail,
    };
    Ok((config, remarks))
}

fn detect_local(
    file: &File,
    origin: impl Fn(&str) -> String,
    cidrs: (&str, &str),
) -> Result<DetectLocal, ConfigError> {
    Ok(match file.detect_local_mode.as_str() {
        "" | "ClusterCIDR" => DetectLocal::ClusterCidr(parse_cidrs(cidrs.0, cidrs.1)?),
        "NodeCIDR" => DetectLocal::NodeCidr,
        "BridgeInterface" => {
            let (field, name) =
                ("detectLocal.bridgeInterface", &file.detect_local.bridge_interface);
            DetectLocal::Interface(InterfaceName::Whole(interface(origin(field), name)?))
        }
        "InterfaceNamePrefix" => {
            let field = "detectLocal.interfaceNamePrefix";
            let name = &file.detect_local.interface_name_prefix;
            DetectLocal::Interface(InterfaceName::Prefix(interface(origin(field), name)?))
        }
        other => {
            return Err(ConfigError::Value {
                origin: origin("detectLocalMode"),
                value: other.into(),
                expected: "expected ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix"
                    .into(),
            });
        }
    })
}

fn node_port_addresses(
    file: &File,
    origin: impl Fn(&str) -> String,
) -> Result<NodePortAddresses, ConfigError> {
    let scope = file.node_port_addresses.as_deref().unwrap_or_default();
    if scope.is_empty() || scope == ["primary"] {
        return Ok(NodePortAddresses::Primary);
    }
    let parsed: Result<Vec<IpNet>, _> = scope.iter().map(|range| range.parse()).collect();
    parsed.map(NodePortAddresses::Ranges).map_err(|_| ConfigError::Value {
        origin: origin("nodePortAddresses"),
        value: scope.join(","),
        expected: "expected ranges like 192.0.2.0/24, or primary alone".into(),
    })
}

/// Refuses values that kube-proxy acts upon and this program does not yet.
fn check_supported(file: &File, origin: impl Fn(&str) -> String) -> Result<(), ConfigError> {
    let refuse = |field: &str, value: String, expected: &str| {
        Err(ConfigError::Value { origin: origin(field), value, expected: expected.into() })
    };
    if !["", "nftables", "iptables", "ipvs"].contains(&file.mode.as_str()) {
        return refuse("mode", file.mode.clone(), "expected nftables (always used here)");
    }
    Ok(())
}

fn read(path: &Path, remarks: &mut Vec<String>) -> Result<File, ConfigError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.into(), source })?;
    let fail = |reason: String| ConfigError::Parse { path: path.into(), reason };
    let mut value: serde_json::Value =
        serde_saphyr::from_str(&text).map_err(|error| fail(first_line(&error.to_string())))?;
    if value.is_null() {
        // An empty file has no kind.
        value = serde_json::Value::Object(serde_json::Map::new());
    }
    let mut ignored = Vec::new();
    let mut note = |field: serde_ignored::Path<'_>| ignored.push(field.to_string());
    let tracked = serde_ignored::Deserializer::new(&value, &mut note);
    let file: File = serde_path_to_error::deserialize(tracked)
        .map_err(|error| fail(format!("{}: {}", error.path(), error.inner())))?;
    if file.kind != "KubeProxyConfiguration" || !file.api_version.starts_with("kubeproxy.config") {
        let (kind, version) = (file.kind, file.api_version);
        return Err(fail(format!(
            "kind: {kind:?} of {version:?}, expected KubeProxyConfiguration of \
             kubeproxy.config.k8s.io/v1alpha1"
        )));
    }
    if !["", "nftables"].contains(&file.mode.as_str()) {
        remarks.push(format!("{}: mode: {}: nftables is used", path.display(), file.mode));
    }
    if !ignored.is_empty() {
        remarks.push(format!("{}: without effect here: {}", path.display(), ignored.join(", ")));
    }
    Ok(file)
}

/// The name of a network interface (the kernel takes up to 15 bytes), or what it begins with.
fn interface(origin: String, name: &str) -> Result<Arc<str>, ConfigError> {
    let known = |byte: u8| byte.is_ascii_graphic() && !b"/:*\"\\".contains(&byte);
    if (1..16).contains(&name.len()) && name.bytes().all(known) {
        return Ok(name.into());
    }
    let expected = "expected an interface name of 1 to 15 characters".into();
    Err(ConfigError::Value { origin, value: name.into(), expected })
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

fn parse_cidrs(origin: &str, list: &str) -> Result<Vec<IpNet>, ConfigError> {
    let items = list.split(',').map(str::trim).filter(|item| !item.is_empty());
    items
        .map(|item| {
            item.parse().map_err(|_| ConfigError::Value {
                origin: origin.into(),
                value: item.into(),
                expected: "expected a range like 10.244.0.0/16, or one of each family with a comma"
                    .into(),
            })
        })
        .collect()
}

/// A duration as Go writes it: numbers with units h, m, s, ms, us, ns.
fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut total = Duration::ZERO;
    let mut rest = text.trim();
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_len);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = tail;
    }
    (!text.trim().is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(yaml: &str) -> Result<(Config, Vec<String>), String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.conf");
        fs::write(&path, yaml).unwrap();
        let flags = Flags {
            config: Some(path),
            hostname_override: Some("Node-1".into()),
            ..Flags::default()
        };
        let path = format!("{}/", dir.path().display());
        resolve(&flags).map_err(|error| error.to_string().replace(&path, ""))
    }

    const HEAD: &str =
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

    #[test]
    fn a_file_of_kubeadm_is_read() {
        let file = "bindAddress: 0.0.0.0\nclientConnection:\n  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf\n  qps: 0\nclusterCIDR: 10.244.0.0/16,fd00:10:244::/56\nconntrack:\n  maxPerCore: null\nmode: \"\"\nnftables:\n  masqueradeAll: false\n  masqueradeBit: null\n  minSyncPeriod: 1s\n  syncPeriod: 1m30s\nnodePortAddresses: null\n";
        let (config, remarks) = resolved(&format!("{HEAD}{file}")).unwrap();
        assert_eq!(config.node_name, "node-1");
        assert_eq!(config.min_sync_period, Duration::from_secs(1));
        assert_eq!(config.sync_period, Duration::from_secs(90));
        assert_eq!(config.settings.masquerade_mark, 0x4000);
        assert!(
            matches!(config.settings.detect_local, DetectLocal::ClusterCidr(c) if c.len() == 2)
        );
        assert_eq!(
            remarks,
            ["config.conf: without effect here: bindAddress, clientConnection.qps, conntrack"]
                .map(|r| format!("{}/{r}", remarks[0].split("/config.conf").next().unwrap()))
        );
    }

    #[test]
    fn an_error_is_one_line_with_file_field_and_expectation() {
        let cases = [
            (
                "nftables:\n  masqueradeBit: 40\n",
                "nftables.masqueradeBit: \"40\": expected 0 to 31",
            ),
            (
                "nftables:\n  masqueradeAll: maybe\n",
                "nftables.masqueradeAll: invalid type: string \"maybe\", expected a boolean",
            ),
            ("clusterCIDR: 10.244.0.0\n", "clusterCIDR: \"10.244.0.0\": expected a range like"),
            (
                "detectLocalMode: Magic\n",
                "detectLocalMode: \"Magic\": expected ClusterCIDR, NodeCIDR, BridgeInterface or",
            ),
            (
                "detectLocalMode: BridgeInterface\n",
                "detectLocal.bridgeInterface: \"\": expected an interface name",
            ),
            ("mode: userspace\n", "mode: \"userspace\": expected nftables"),
            (
                "nftables:\n  minSyncPeriod: soon\n",
                "nftables.minSyncPeriod: \"soon\": expected a duration",
            ),
            (
                "nodePortAddresses: [primary, 10.0.0.0/8]\n",
                "nodePortAddresses: \"primary,10.0.0.0/8\": expected ranges like",
            ),
        ];
        for (yaml, expected) in cases {
            let error = resolved(&format!("{HEAD}{yaml}")).unwrap_err();
            assert!(error.starts_with(&format!("config.conf: {expected}")), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        let error = resolved("kind: Pod\napiVersion: v1\n").unwrap_err();
        assert!(error.starts_with("config.conf: kind: \"Pod\" of \"v1\", expected"), "{error}");
        assert!(resolved("a: [").unwrap_err().starts_with("config.conf: "));
    }

    #[test]
    fn durations_are_those_of_go() {
        let cases = [
            ("1s", Some(1000)),
            ("1m30s", Some(90_000)),
            ("1.5s", Some(1500)),
            ("250ms", Some(250)),
            ("0s", Some(0)),
            ("0", Some(0)),
            ("", None),
            ("5", None),
            ("s", None),
            ("1x", None),
            ("-1s", None),
        ];
        for (text, millis) in cases {
            assert_eq!(parse_duration(text), millis.map(Duration::from_millis), "{text:?}");
        }
    }
}
