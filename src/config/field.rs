//! Every setting there is: where it stands in a `KubeProxyConfiguration`, which flag of kube-proxy's
//! says the same, what it takes, and what becomes of it here.
//!
//! One table, so that reading files, parsing flags, help, `nftproxy config` and the tests cannot
//! disagree: a field that is in it is effective or has a reason why it is not, and one that is not in
//! it is reported as unknown. Names, types and defaults are those of Kubernetes 1.37.

use super::value::Type;

/// What a setting does in this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It has one, and a change of the file takes effect at once.
    Live,
    /// It has one from the start on; a change needs a restart.
    Start,
    /// It has none, because of this.
    None(&'static str),
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its path in the file.
    pub path: &'static str,
    /// The flag, without dashes.
    pub flag: Option<&'static str>,
    /// What it takes.
    pub ty: Type,
    /// What counts where nothing is said, as a flag would say it.
    pub default: &'static str,
    /// Whether a zero value in a file stands for the default: Go cannot tell it from nothing.
    pub zero_is_default: bool,
    /// What it does.
    pub effect: Effect,
    /// For the help text.
    pub help: &'static str,
}

impl Field {
    const fn new(path: &'static str, ty: Type, default: &'static str) -> Self {
        let effect = Effect::None("");
        Self { path, flag: None, ty, default, zero_is_default: false, effect, help: "" }
    }

    const fn flag(self, flag: &'static str) -> Self {
        Self { flag: Some(flag), ..self }
    }

    const fn zero_is_default(self) -> Self {
        Self { zero_is_default: true, ..self }
    }

    const fn live(self, help: &'static str) -> Self {
        Self { effect: Effect::Live, help, ..self }
    }

    const fn start(self, help: &'static str) -> Self {
        Self { effect: Effect::Start, help, ..self }
    }

    const fn none(self, reason: &'static str) -> Self {
        Self { effect: Effect::None(reason), ..self }
    }

    /// Whether its flag wins over the file. kube-proxy lets only a few flags do so.
    #[must_use]
    pub fn is_flag_first(&self) -> bool {
        self.path == "hostnameOverride"
            || self.path.starts_with("logging.")
            || self.path.starts_with("nftproxy.")
    }

    /// The setting at this path of the file.
    #[must_use]
    pub fn at(path: &str) -> Option<&'static Self> {
        FIELDS.iter().find(|field| field.path == path)
    }
}

const INT32: Type = Type::Int(0, i32::MAX as i64);
const IPVS: &str = "ipvs is not used: every Service is served by nftables";
const WINDOWS: &str = "it concerns Windows only";
const CLIENT: &str = "the client reads JSON, and sends a request only to begin a list or a watch";
const LOG: &str = "lines are written to standard error as they come";

/// All settings, by their place in the file.
pub const FIELDS: &[Field] = &[
    Field::new("bindAddress", Type::Text, "0.0.0.0")
        .flag("bind-address")
        .zero_is_default()
        .live("Take this for the node's primary address of its family. Nothing is bound to it"),
    Field::new("bindAddressHardFail", Type::Bool, "false")
        .flag("bind-address-hard-fail")
        .start("End if the health or metrics server cannot listen"),
    Field::new("clientConnection.acceptContentTypes", Type::Text, "").none(CLIENT),
    Field::new("clientConnection.burst", INT32, "10")
        .flag("kube-api-burst")
        .zero_is_default()
        .none(CLIENT),
    Field::new("clientConnection.contentType", Type::Text, "application/vnd.kubernetes.protobuf")
        .flag("kube-api-content-type")
        .zero_is_default()
        .none(CLIENT),
    Field::new("clientConnection.kubeconfig", Type::Text, "").flag("kubeconfig").start(
        "Take objects from the API server this file names. Without it: from the cluster this runs in",
    ),
    Field::new("clientConnection.qps", Type::Float, "5")
        .flag("kube-api-qps")
        .zero_is_default()
        .none(CLIENT),
    Field::new("clusterCIDR", Type::Text, "").flag("cluster-cidr").live(
        "Addresses of the cluster's pods, one range of each family: other sources are masqueraded on \
         their way to a ClusterIP",
    ),
    Field::new("configSyncPeriod", Type::Duration, "15m0s")
        .flag("config-sync-period")
        .zero_is_default()
        .none("watches are followed without a timer"),
    Field::new("conntrack.maxPerCore", INT32, "32768").flag("conntrack-max-per-core").live(
        "Raise the limit of tracked connections to so many for each CPU; 0 leaves it alone",
    ),
    Field::new("conntrack.min", INT32, "131072")
        .flag("conntrack-min")
        .live("Least limit of tracked connections, unless it is left alone"),
    Field::new("conntrack.tcpBeLiberal", Type::Bool, "false")
        .flag("conntrack-tcp-be-liberal")
        .live("Accept TCP segments outside of the window"),
    Field::new("conntrack.tcpCloseWaitTimeout", Type::Duration, "1h0m0s")
        .flag("conntrack-tcp-timeout-close-wait")
        .live("Timeout of TCP connections in CLOSE_WAIT; 0 leaves it alone"),
    Field::new("conntrack.tcpEstablishedTimeout", Type::Duration, "24h0m0s")
        .flag("conntrack-tcp-timeout-established")
        .live("Timeout of established TCP connections; 0 leaves it alone"),
    Field::new("conntrack.udpStreamTimeout", Type::Duration, "0s")
        .flag("conntrack-udp-timeout-stream")
        .live("Timeout of UDP flows that were answered; 0 leaves it alone"),
    Field::new("conntrack.udpTimeout", Type::Duration, "0s")
        .flag("conntrack-udp-timeout")
        .live("Timeout of UDP flows that were not answered; 0 leaves it alone"),
    Field::new("detectLocal.bridgeInterface", Type::Text, "")
        .flag("pod-bridge-interface")
        .live("Interface of the pods, for the mode BridgeInterface"),
    Field::new("detectLocal.interfaceNamePrefix", Type::Text, "")
        .flag("pod-interface-name-prefix")
        .live("What names of the pods' interfaces begin with, for the mode InterfaceNamePrefix"),
    Field::new(
        "detectLocalMode",
        Type::OneOf(&["", "ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"]),
        "ClusterCIDR",
    )
    .flag("detect-local-mode")
    .zero_is_default()
    .live("How traffic of pods is told from other traffic"),
    Field::new("enableProfiling", Type::Bool, "false")
        .flag("profiling")
        .none("there is no Go runtime to profile"),
    Field::new("featureGates", Type::Switches, "")
        .flag("feature-gates")
        .start("Switches of kube-proxy. Those that would change something here are reported"),
    Field::new("healthzBindAddress", Type::Text, "")
        .flag("healthz-bind-address")
        .zero_is_default()
        .start("Address of the health server, 0.0.0.0:10256 if not given; as a flag, \"\" turns it off"),
    Field::new("hostnameOverride", Type::Text, "")
        .flag("hostname-override")
        .start("Name of this node's Node object. Without it: the host's name"),
    Field::new("iptables.localhostNodePorts", Type::Bool, "true")
        .flag("iptables-localhost-nodeports")
        .none("as in kube-proxy's nftables mode; nftproxy.localhostNodePorts is for that"),
    Field::new("iptables.masqueradeAll", Type::Bool, "false")
        .live("As nftables.masqueradeAll, if the mode is not nftables"),
    Field::new("iptables.masqueradeBit", Type::Int(0, 31), "14")
        .flag("iptables-masquerade-bit")
        .live("As nftables.masqueradeBit, if the mode is not nftables and that is not set"),
    Field::new("iptables.minSyncPeriod", Type::Duration, "0s")
        .flag("iptables-min-sync-period")
        .live("As nftables.minSyncPeriod, if the mode is not nftables and that is not set"),
    Field::new("iptables.syncPeriod", Type::Duration, "30s")
        .flag("iptables-sync-period")
        .zero_is_default()
        .live("As nftables.syncPeriod, if the mode is not nftables and that is not set"),
    Field::new("ipvs.excludeCIDRs", Type::List, "").flag("ipvs-exclude-cidrs").none(IPVS),
    Field::new("ipvs.minSyncPeriod", Type::Duration, "0s").flag("ipvs-min-sync-period").none(IPVS),
    Field::new("ipvs.scheduler", Type::Text, "").flag("ipvs-scheduler").none(
        "ipvs is not used; a Service names its scheduler by an annotation",
    ),
    Field::new("ipvs.strictARP", Type::Bool, "false")
        .flag("ipvs-strict-arp")
        .none("no address of a Service is put on an interface, so that none is answered for by ARP"),
    Field::new("ipvs.syncPeriod", Type::Duration, "30s")
        .flag("ipvs-sync-period")
        .zero_is_default()
        .none(IPVS),
    Field::new("ipvs.tcpFinTimeout", Type::Duration, "0s").flag("ipvs-tcpfin-timeout").none(IPVS),
    Field::new("ipvs.tcpTimeout", Type::Duration, "0s").flag("ipvs-tcp-timeout").none(IPVS),
    Field::new("ipvs.udpTimeout", Type::Duration, "0s").flag("ipvs-udp-timeout").none(IPVS),
    // A number of nanoseconds or a duration.
    Field::new("logging.flushFrequency", Type::Any, "5s")
        .flag("log-flush-frequency")
        .zero_is_default()
        .none(LOG),
    Field::new("logging.format", Type::OneOf(&["", "text", "json"]), "text")
        .flag("logging-format")
        .zero_is_default()
        .start("Format of the log on standard error: text or json"),
    Field::new("logging.options.json.infoBufferSize", Type::Any, "0")
        .flag("log-json-info-buffer-size")
        .none(LOG),
    Field::new("logging.options.json.splitStream", Type::Bool, "false")
        .flag("log-json-split-stream")
        .none(LOG),
    Field::new("logging.options.text.infoBufferSize", Type::Any, "0")
        .flag("log-text-info-buffer-size")
        .none(LOG),
    Field::new("logging.options.text.splitStream", Type::Bool, "false")
        .flag("log-text-split-stream")
        .none(LOG),
    Field::new("logging.verbosity", INT32, "0").flag("v").start(
        "Verbosity: 0 or 1 for events, 2 to 3 for every commit, 4 and more for everything",
    ),
    Field::new("logging.vmodule", Type::Any, "")
        .flag("vmodule")
        .none("the modules are others; RUST_LOG filters by them"),
    Field::new("metricsBindAddress", Type::Text, "")
        .flag("metrics-bind-address")
        .zero_is_default()
        .start("Address of the metrics server, 127.0.0.1:10249 if not given; \"\" as a flag turns it off"),
    Field::new("mode", Type::OneOf(&["", "iptables", "ipvs", "nftables"]), "")
        .flag("proxy-mode")
        .live("Always nftables here. Where it says iptables, that section counts, too"),
    Field::new("nftables.masqueradeAll", Type::Bool, "false")
        .flag("masquerade-all")
        .live("Masquerade all traffic to ClusterIPs"),
    Field::new("nftables.masqueradeBit", Type::Int(0, 31), "14")
        .live("The bit of the packet mark that asks for masquerading"),
    Field::new("nftables.minSyncPeriod", Type::Duration, "0s")
        .live("Least time between two commits; 0 leaves it to what commits cost"),
    Field::new("nftables.syncPeriod", Type::Duration, "30s")
        .zero_is_default()
        .live("Longest time between a failed commit and the next"),
    Field::new("nftproxy.counters", Type::Bool, "false").flag("counters").live(
        "Count connections by Service port and by endpoint: in metrics, in `nftproxy list`, and for \
         `nftproxy top`",
    ),
    Field::new("nftproxy.keepKubeProxyRules", Type::Bool, "false").flag("keep-kube-proxy-rules").start(
        "Leave alone what kube-proxy left behind. Otherwise it is removed when the own tables are in \
         force (not with manifests: other Services of the node may still need it)",
    ),
    Field::new("nftproxy.localhostNodePorts", Type::Bool, "false").flag("localhost-node-ports").live(
        "Serve node ports on 127.0.0.1, too, for processes on this node. Turns on the sysctl \
         net.ipv4.conf.all.route_localnet, and keeps others from reaching loopback addresses by it",
    ),
    Field::new("nftproxy.manifests", Type::Text, "").flag("manifests").start(
        "Take objects from this YAML or JSON file, or from all of them in this directory, and follow \
         their changes",
    ),
    Field::new("nftproxy.master", Type::Text, "")
        .flag("master")
        .start("Address of the API server, instead of the one the kubeconfig names"),
    Field::new("nftproxy.tableOwner", Type::Bool, "false").flag("table-owner").start(
        "Own the tables: nobody else can change them while this runs, root included. They stay in force \
         afterwards. Needs Linux 6.9",
    ),
    Field::new("nodePortAddresses", Type::List, "").flag("nodeport-addresses").live(
        "Ranges of the node's addresses that serve node ports, or primary, all, localhost; primary if \
         not given",
    ),
    Field::new("oomScoreAdj", Type::Int(-1000, 1000), "-999")
        .flag("oom-score-adj")
        .live("How readily the kernel ends this process when memory runs out"),
    Field::new("portRange", Type::Text, "")
        .flag("proxy-port-range")
        .none("no port of the host is bound for a Service"),
    Field::new("showHiddenMetricsForVersion", Type::Text, "")
        .flag("show-hidden-metrics-for-version")
        .none("no metric is hidden"),
    Field::new("windowsRunAsService", Type::Bool, "false").flag("windows-service").none(WINDOWS),
    Field::new("winkernel.enableDSR", Type::Bool, "false").flag("enable-dsr").none(WINDOWS),
    Field::new("winkernel.forwardHealthCheckVip", Type::Bool, "false")
        .flag("forward-healthcheck-vip")
        .none(WINDOWS),
    Field::new("winkernel.networkName", Type::Text, "").flag("network-name").none(WINDOWS),
    Field::new("winkernel.rootHnsEndpointName", Type::Text, "")
        .flag("root-hnsendpoint-name")
        .none(WINDOWS),
    Field::new("winkernel.sourceVip", Type::Text, "").flag("source-vip").none(WINDOWS),
];

/// A flag of kube-proxy's that no field of the file says.
#[derive(Clone, Copy, Debug)]
pub struct LoneFlag {
    /// The flag, without dashes.
    pub flag: &'static str,
    /// What it takes.
    pub ty: Type,
    /// Why it has no effect; None if it has one.
    pub without_effect: Option<&'static str>,
    /// For the help text.
    pub help: &'static str,
}

const fn lone(flag: &'static str, ty: Type, why: &'static str) -> LoneFlag {
    LoneFlag { flag, ty, without_effect: Some(why), help: "" }
}

const fn port(flag: &'static str, help: &'static str) -> LoneFlag {
    LoneFlag { flag, ty: Type::Int(0, 65535), without_effect: None, help }
}

const IDENTITY: &str = "the machine's identity is not used";

/// Flags that only stand on the command line. `--config`, `--cleanup`, `--init-only`,
/// `--write-config-to` and `--version` are the command line's own.
pub const LONE_FLAGS: &[LoneFlag] = &[
    port(
        "healthz-port",
        "Port of the health server; 0 turns it off. Better: --healthz-bind-address",
    ),
    port(
        "metrics-port",
        "Port of the metrics server; 0 turns it off. Better: --metrics-bind-address",
    ),
    lone("boot-id-file", Type::Text, IDENTITY),
    lone("machine-id-file", Type::Text, IDENTITY),
    lone("add-dir-header", Type::Bool, LOG),
    lone("alsologtostderr", Type::Bool, LOG),
    lone("log-backtrace-at", Type::Text, LOG),
    lone("log-dir", Type::Text, LOG),
    lone("log-file", Type::Text, LOG),
    lone("log-file-max-size", Type::Text, LOG),
    lone("logtostderr", Type::Bool, LOG),
    lone("one-output", Type::Bool, LOG),
    lone("skip-headers", Type::Bool, LOG),
    lone("skip-log-headers", Type::Bool, LOG),
    lone("stderrthreshold", Type::Text, LOG),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_field_is_named_once_and_says_what_becomes_of_it() {
        let mut seen = BTreeSet::new();
        let flags = FIELDS.iter().filter_map(|field| field.flag);
        let flags = flags.chain(LONE_FLAGS.iter().map(|flag| flag.flag));
        for name in flags.chain(FIELDS.iter().map(|field| field.path)) {
            assert!(seen.insert(name.to_owned()), "{name} twice");
        }
        for field in FIELDS {
            if !field.default.is_empty() {
                field.ty.parse(field.default).unwrap_or_else(|e| panic!("{}: {e}", field.path));
            }
            match field.effect {
                Effect::None(reason) => assert!(!reason.is_empty(), "{}: why?", field.path),
                Effect::Live | Effect::Start => {
                    assert!(!field.help.is_empty(), "{}: no help", field.path);
                }
            }
        }
    }
}
