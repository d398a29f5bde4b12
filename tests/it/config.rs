//! Configuration: files as people have them, every field and every flag of kube-proxy's, and what a
//! change of the file does to a running proxy. The files of `tests/config` are what installers write.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use nftproxy::config::{self, Effect, FIELDS, Flags, Format, LONE_FLAGS, Loaded, Origin, Type};
use nftproxy::nft::dataplane::Loopback;
use nftproxy::nft::rule::InterfaceName;
use nftproxy::settings::{DetectLocal, NodePortAddresses};
use serde_json::{Value as Json, json};

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

fn flags(given: &[(&'static str, &str)]) -> Flags {
    let given = given.iter().map(|(flag, value)| (*flag, vec![(*value).to_owned()]));
    Flags { config: None, given: given.collect() }
}

/// Loads a file with these lines, and flags. Errors and origins name it `config.conf`.
fn load(lines: &str, given: &[(&'static str, &str)]) -> Result<Loaded, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.conf");
    fs::write(&path, format!("{HEAD}{lines}")).unwrap();
    let mut flags = flags(given);
    flags.given.entry("hostname-override").or_insert(vec!["node-1".into()]);
    flags.config = Some(path);
    let prefix = format!("{}/", dir.path().display());
    let mut loaded =
        config::load(&flags).map_err(|error| error.to_string().replace(&prefix, ""))?;
    for remark in &mut loaded.remarks {
        remark.origin = remark.origin.replace(&prefix, "");
    }
    Ok(loaded)
}

fn remarks(loaded: &Loaded) -> Vec<String> {
    let line = |r: &config::Remark| {
        format!("{} {}: {}", if r.is_warning { "warning" } else { "note" }, r.origin, r.message)
    };
    loaded.remarks.iter().map(line).collect()
}

#[test]
fn files_of_installers_load_unchanged() {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(concat!(env!("CARGO_MANIFEST_DIR"), "/snapshots/config"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| {
        insta::glob!("../config", "*.yaml", |path| {
            let mut flags = flags(&[]);
            if !fs::read_to_string(path).unwrap().contains("I-0abc") {
                flags.given.insert("hostname-override", vec!["node-1".into()]);
            }
            flags.config = Some(path.to_owned());
            let loaded = config::load(&flags).unwrap();
            let said = config::show(&loaded, Format::Text);
            let mut text: String = said
                .lines()
                .filter(|l| !l.contains("# default"))
                .map(|l| format!("{l}\n"))
                .collect();
            text.extend(remarks(&loaded).iter().map(|remark| format!("{remark}\n")));
            let file = path.file_name().unwrap().to_str().unwrap();
            insta::assert_snapshot!("config", text.replace(path.to_str().unwrap(), file));
        });
    });
}

/// Every field of `KubeProxyConfiguration` v1alpha1 as kube-proxy writes it, of Kubernetes 1.37.2.
fn written_by_kube_proxy() -> BTreeSet<String> {
    fn leaves(prefix: &str, value: &serde_json::Map<String, Json>, found: &mut BTreeSet<String>) {
        for (name, value) in value {
            let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            match value {
                Json::Object(fields) => leaves(&path, fields, found),
                _ => drop(found.insert(path)),
            }
        }
    }
    let text = include_str!("../config/kube-proxy-1.37-written.yaml");
    let Json::Object(fields) = serde_saphyr::from_str(text).unwrap() else { panic!("no map") };
    let mut found = BTreeSet::new();
    leaves("", &fields, &mut found);
    // Left out of what is written because they are empty.
    let empty = ["featureGates", "logging.vmodule", "windowsRunAsService"];
    found.extend(empty.map(str::to_owned));
    found.remove("apiVersion");
    found.remove("kind");
    found
}

#[test]
fn every_field_of_the_api_is_effective_or_has_a_reason() {
    let known: BTreeSet<_> = FIELDS.iter().map(|field| field.path.to_owned()).collect();
    let missing: Vec<_> = written_by_kube_proxy().difference(&known).cloned().collect();
    assert!(missing.is_empty(), "not in the table: {missing:?}");
    assert!(known.len() >= 60, "{}", known.len());
}

/// A value that is not the default, and valid.
fn other_value(path: &str, ty: Type) -> Json {
    match path {
        "bindAddress" => json!("192.0.2.1"),
        "healthzBindAddress" | "metricsBindAddress" => json!("192.0.2.1:9999"),
        "clusterCIDR" => json!("10.0.0.0/8"),
        "nodePortAddresses" => json!(["10.0.0.0/8"]),
        "featureGates" => json!({"PreferSameTrafficDistribution": false}),
        "detectLocalMode" => json!("NodeCIDR"),
        "iptables.localhostNodePorts" => json!(false),
        "mode" => json!("ipvs"),
        "logging.format" => json!("json"),
        _ => match ty {
            Type::Bool => json!(true),
            Type::Int(..) => json!(3),
            Type::Float => json!(1.5),
            Type::Duration => json!("7s"),
            Type::Text | Type::OneOf(_) => json!("some"),
            Type::List => json!(["10.0.0.0/8"]),
            Type::Switches => json!({"Gate": true}),
            Type::Any => json!("12k"),
        },
    }
}

/// A file with one field, by its path.
fn file_with(path: &str, value: &Json) -> String {
    let nested = path.rsplit('.').fold(value.clone(), |inner, name| json!({name: inner}));
    let Json::Object(fields) = nested else { unreachable!() };
    fields.iter().map(|(name, value)| format!("{name}: {value}\n")).collect()
}

#[test]
fn each_field_in_a_file_is_seen_or_reported() {
    let silent = load("", &[]).unwrap();
    for field in FIELDS {
        let value = other_value(field.path, field.ty);
        let loaded = load(&file_with(field.path, &value), &[])
            .unwrap_or_else(|error| panic!("{}: {error}", field.path));
        let setting = loaded.values.get(field.path);
        let said = remarks(&loaded);
        let line = said.iter().find(|line| line.contains(&format!(": {}", field.path)));
        match field.effect {
            Effect::None(reason) => {
                let line =
                    line.unwrap_or_else(|| panic!("{} is not reported: {said:?}", field.path));
                assert!(line.contains(reason), "{line}");
                assert_eq!(loaded.config, silent.config, "{} has an effect", field.path);
            }
            // Flags of these win; the one for the node's name is given by this test.
            _ if field.path == "hostnameOverride" => {}
            // Only another section's or only with another mode.
            _ if ["mode", "featureGates"].contains(&field.path) => {
                assert!(line.is_some(), "{}: {said:?}", field.path);
            }
            _ if field.path.starts_with("detectLocal.") => {
                assert!(matches!(setting.origin, Origin::File(..)));
            }
            Effect::Live => {
                assert_ne!(loaded.config.live, silent.config.live, "{} does nothing", field.path);
                if field.path != "detectLocalMode" {
                    let others = config::Config {
                        live: silent.config.live.clone(),
                        ..loaded.config.clone()
                    };
                    assert_eq!(others, silent.config, "{} needs a restart", field.path);
                }
            }
            Effect::Start => {
                assert_ne!(loaded.config, silent.config, "{} does nothing", field.path);
                assert_eq!(loaded.config.live, silent.config.live, "{} is live", field.path);
            }
        }
        // A value of another type is refused by name.
        if field.ty != Type::Any {
            let error = load(&file_with(field.path, &json!([[1]])), &[]).unwrap_err();
            let start = format!("config.conf: {}: \"[[1]]\": expected", field.path);
            assert!(error.starts_with(&start), "{error}");
        }
    }
}

#[test]
fn each_flag_of_kube_proxy_parses_and_is_seen_or_reported() {
    // `kube-proxy --help` of 1.37.2, but for those the command line has itself.
    const KUBE_PROXY: &str = "bind-address bind-address-hard-fail cluster-cidr config-sync-period \
        conntrack-max-per-core conntrack-min conntrack-tcp-be-liberal conntrack-tcp-timeout-close-wait \
        conntrack-tcp-timeout-established conntrack-udp-timeout conntrack-udp-timeout-stream \
        detect-local-mode feature-gates healthz-bind-address hostname-override \
        iptables-localhost-nodeports iptables-masquerade-bit iptables-min-sync-period \
        iptables-sync-period ipvs-exclude-cidrs ipvs-min-sync-period ipvs-scheduler ipvs-strict-arp \
        ipvs-sync-period ipvs-tcp-timeout ipvs-tcpfin-timeout ipvs-udp-timeout kube-api-burst \
        kube-api-content-type kube-api-qps kubeconfig log-flush-frequency log-json-info-buffer-size \
        log-json-split-stream log-text-info-buffer-size log-text-split-stream logging-format \
        masquerade-all master metrics-bind-address nodeport-addresses oom-score-adj \
        pod-bridge-interface pod-interface-name-prefix profiling proxy-mode \
        show-hidden-metrics-for-version v vmodule healthz-port metrics-port";
    let known: BTreeSet<_> = FIELDS
        .iter()
        .filter_map(|field| field.flag)
        .chain(LONE_FLAGS.iter().map(|flag| flag.flag))
        .collect();
    for flag in KUBE_PROXY.split_whitespace() {
        assert!(known.contains(flag), "--{flag} is not known");
    }
    let silent = config::load(&flags(&[("hostname-override", "node-1")])).unwrap();
    for field in FIELDS {
        let Some(flag) = field.flag else { continue };
        let value = match other_value(field.path, field.ty) {
            Json::String(text) => text,
            Json::Array(items) => items[0].as_str().unwrap().to_owned(),
            Json::Object(_) => "PreferSameTrafficDistribution=false".into(),
            other => other.to_string(),
        };
        let given = [("hostname-override", "node-1"), (flag, value.as_str())];
        let loaded = config::load(&flags(&given)).unwrap_or_else(|e| panic!("--{flag}: {e}"));
        let said = remarks(&loaded);
        let line = said.iter().any(|line| line.contains(&format!("-{flag}")));
        match field.effect {
            Effect::None(_) => {
                assert!(line, "--{flag} is not reported: {said:?}");
                assert_eq!(loaded.config, silent.config, "--{flag}");
            }
            _ if flag.starts_with("pod-") || ["proxy-mode", "feature-gates"].contains(&flag) => {}
            _ => assert_ne!(loaded.config, silent.config, "--{flag} does nothing"),
        }
        // On the command line, in both forms.
        let output = run(&["config", "--hostname-override", "n", &format!("--{flag}={value}")]);
        assert!(output.status.success(), "--{flag}: {}", stderr(&output));
        if field.ty != Type::Bool && flag != "hostname-override" {
            let dashes = if flag.len() == 1 { "-" } else { "--" };
            let output =
                run(&["config", "--hostname-override", "n", &format!("{dashes}{flag}"), &value]);
            assert!(output.status.success(), "--{flag}: {}", stderr(&output));
        }
    }
    for lone in LONE_FLAGS {
        let value = if lone.ty == Type::Bool { "true" } else { "7" };
        let output = run(&["config", &format!("--{}={value}", lone.flag), "--v=1"]);
        assert!(output.status.success(), "--{}: {}", lone.flag, stderr(&output));
        assert_eq!(stderr(&output).contains(lone.flag), lone.without_effect.is_some());
    }
}

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nftproxy"))
        .args(arguments)
        .env_remove("RUST_LOG")
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_file_wins_over_flags_but_for_those_that_kube_proxy_lets_win() {
    let given = [
        ("hostname-override", " Node-7 "),
        ("master", "https://192.0.2.1"),
        ("v", "5"),
        ("masquerade-all", "true"),
        ("cluster-cidr", "10.0.0.0/8"),
    ];
    let lines = "hostnameOverride: other\nclusterCIDR: 10.244.0.0/16\nlogging: {verbosity: 1}\n";
    let loaded = load(lines, &given).unwrap();
    let config = &loaded.config;
    assert_eq!(config.node_name, "node-7");
    assert_eq!(config.log.verbosity, 5);
    assert!(!config.live.settings.masquerade_all);
    let range = "10.244.0.0/16".parse().unwrap();
    assert_eq!(config.live.settings.detect_local, DetectLocal::ClusterCidr(vec![range]));
    let said = remarks(&loaded).join("\n");
    for flag in ["--masquerade-all", "--cluster-cidr"] {
        assert!(said.contains(&format!("warning {flag}: it is left out")), "{said}");
    }
    assert_eq!(loaded.values.get("nftproxy.master").origin, Origin::Flag("master"));
}

#[test]
fn addresses_of_the_servers_have_the_defaults_of_kube_proxy() {
    let of = |lines: &str, given: &[(&'static str, &str)]| {
        let config = load(lines, given).unwrap().config;
        let shown = |a: Option<std::net::SocketAddr>| a.map(|a| a.to_string()).unwrap_or_default();
        (shown(config.healthz_bind_address), shown(config.metrics_bind_address))
    };
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(of("", &[]), pair("0.0.0.0:10256", "127.0.0.1:10249"));
    assert_eq!(of("bindAddress: \"::\"\n", &[]), pair("[::]:10256", "[::1]:10249"));
    let lines = "healthzBindAddress: \"\"\nmetricsBindAddress: 192.0.2.1\n";
    assert_eq!(of(lines, &[]), pair("0.0.0.0:10256", "192.0.2.1:10249"));
    let with = |given: &[(&'static str, &str)]| {
        let config = config::load(&flags(given)).unwrap().config;
        (config.healthz_bind_address, config.metrics_bind_address)
    };
    let off = with(&[("healthz-bind-address", ""), ("metrics-port", "0")]);
    assert_eq!(off, (None, None));
    let other = with(&[("healthz-port", "9000"), ("metrics-bind-address", "[::]:9")]);
    assert_eq!(other, (Some(([0, 0, 0, 0], 9000).into()), Some("[::]:9".parse().unwrap())));
}

#[test]
fn an_error_is_one_line_with_file_field_and_expectation() {
    let cases = [
        (
            "nftables: {masqueradeBit: 40}",
            "nftables.masqueradeBit: \"40\": expected a whole number, 0 to",
        ),
        (
            "nftables: {masqueradeAll: maybe}",
            "nftables.masqueradeAll: \"\\\"maybe\\\"\": expected true or",
        ),
        ("clusterCIDR: 10.244.0.0", "clusterCIDR: \"10.244.0.0\": expected a range like"),
        (
            "clusterCIDR: 10.0.0.0/16,10.1.0.0/16",
            "clusterCIDR: \"10.0.0.0/16,10.1.0.0/16\": expected",
        ),
        (
            "detectLocalMode: Magic",
            "detectLocalMode: \"\\\"Magic\\\"\": expected ClusterCIDR, NodeCIDR, ",
        ),
        (
            "detectLocalMode: BridgeInterface",
            "detectLocal.bridgeInterface: \"\": expected an interface",
        ),
        ("mode: userspace", "mode: \"\\\"userspace\\\"\": expected iptables, ipvs or nftables"),
        (
            "nftables: {minSyncPeriod: soon}",
            "nftables.minSyncPeriod: \"\\\"soon\\\"\": expected a duration",
        ),
        (
            "nftables: {minSyncPeriod: 1m}",
            "nftables.minSyncPeriod: \"1m0s\": expected no more than",
        ),
        ("nodePortAddresses: [here]", "nodePortAddresses: \"here\": expected ranges like"),
        ("healthzBindAddress: nowhere:1", "healthzBindAddress: \"nowhere:1\": expected an address"),
        (
            "metricsBindAddress: 127.0.0.1:0",
            "metricsBindAddress: \"127.0.0.1:0\": expected an address",
        ),
        ("bindAddress: eth0", "bindAddress: \"eth0\": expected an IP address"),
        ("oomScoreAdj: 1001", "oomScoreAdj: \"1001\": expected a whole number, -1000 to 1000"),
        (
            "conntrack: {maxPerCore: -1}",
            "conntrack.maxPerCore: \"-1\": expected a whole number, 0 to",
        ),
        (
            "conntrack: {udpTimeout: -1s}",
            "conntrack.udpTimeout: \"\\\"-1s\\\"\": expected a duration",
        ),
        ("conntrack: 7", "conntrack: \"7\": expected fields"),
        (
            "featureGates: {AllowServiceExternalIPs: false}",
            "featureGates.AllowServiceExternalIPs: \"false\": external IPs are always served",
        ),
    ];
    for (line, expected) in cases {
        let error = load(&format!("{line}\n"), &[]).unwrap_err();
        assert!(error.starts_with(&format!("config.conf: {expected}")), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let other = |text: &str| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.conf");
        fs::write(&path, text).unwrap();
        config::load(&Flags { config: Some(path), ..flags(&[]) }).unwrap_err().to_string()
    };
    let error = other("kind: Pod\napiVersion: v1\n");
    assert!(error.contains("kind: \"Pod\" of \"v1\", expected KubeProxyConfiguration"), "{error}");
    for broken in ["a: [", "", "- 1\n", "just text"] {
        let error = other(broken);
        assert!(error.contains("config.conf: ") && !error.contains('\n'), "{error}");
    }
    let none = Flags { config: Some("/no/such/file".into()), ..flags(&[]) };
    let error = config::load(&none).unwrap_err().to_string();
    assert!(error.starts_with("/no/such/file: cannot read it: No such file"), "{error}");
    let error = config::load(&flags(&[("conntrack-min", "many")])).unwrap_err().to_string();
    assert!(error.starts_with("--conntrack-min: \"many\": expected a whole number"), "{error}");
}

#[test]
fn the_section_of_the_old_mode_counts_where_that_of_nftables_says_nothing() {
    let of = |lines: &str| load(lines, &[]).unwrap().config.live;
    let section = "iptables: {masqueradeAll: true, masqueradeBit: 3, syncPeriod: 10s}\n";
    let live = of(section);
    assert!(live.settings.masquerade_all);
    assert_eq!((live.settings.masquerade_mark, live.sync_period.as_secs()), (8, 10));
    let live = of(&format!("mode: nftables\n{section}"));
    assert!(!live.settings.masquerade_all);
    assert_eq!((live.settings.masquerade_mark, live.sync_period.as_secs()), (1 << 14, 30));
    let live = of(&format!("{section}nftables: {{masqueradeBit: 5}}\n"));
    assert_eq!(live.settings.masquerade_mark, 32);
    let loaded = load(section, &[]).unwrap();
    let Origin::File(_, path) = loaded.values.get("nftables.masqueradeBit").origin else {
        panic!()
    };
    assert_eq!(path, "iptables.masqueradeBit");
}

#[test]
fn keywords_of_node_port_addresses_stand_beside_ranges() {
    let of = |list: &str| {
        let loaded = load(&format!("nodePortAddresses: {list}\n"), &[]).unwrap();
        loaded.config.live.settings.node_port_addresses
    };
    let range = |text: &str| text.parse().unwrap();
    assert_eq!(of("[]"), NodePortAddresses::Primary);
    assert_eq!(of("[primary]"), NodePortAddresses::Primary);
    assert_eq!(of("[all]"), NodePortAddresses::Ranges(vec![range("0.0.0.0/0"), range("::/0")]));
    let both = NodePortAddresses::PrimaryAnd(vec![range("10.0.0.0/8")]);
    assert_eq!(of("[10.0.0.0/8, primary]"), both);

    // The loopback is served where kube-proxy serves it, and where our own setting says so.
    let on = |lines: &str| {
        load(lines, &[]).unwrap().config.live.settings.loopback == Loopback::NodePorts
    };
    let gate = "featureGates: {KubeProxyNFTablesLocalhostNodePorts: true}\n";
    assert!(!on("") && !on(gate) && !on("nodePortAddresses: [127.0.0.0/8]\n"));
    assert!(!on(&format!("{gate}nodePortAddresses: [all]\n")));
    assert!(on("nodePortAddresses: [primary, localhost]\n"));
    assert!(on(&format!("{gate}nodePortAddresses: [primary, 127.0.0.0/8]\n")));
    assert!(on("nftproxy: {localhostNodePorts: true}\n"));
}

#[test]
fn what_is_written_is_read_back_as_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/config")).unwrap() {
        let file = file.unwrap().path();
        let written = dir.path().join("written.yaml");
        let arguments = ["--config", path(&file), "--hostname-override", "n", "--write-config-to"];
        let output = run(&[&arguments[..], &[path(&written)]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let of = |path: &Path| {
            let mut flags = flags(&[("hostname-override", "n")]);
            flags.config = Some(path.to_owned());
            config::load(&flags).unwrap()
        };
        let (first, second) = (of(&file), of(&written));
        assert_eq!(first.config, second.config, "{}", file.display());
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Found by `fuzz::configuration`: a name with a line break made two lines of a remark, and a value with an
/// escape sequence reached the terminal.
#[test]
fn names_and_values_of_a_file_stay_on_their_line() {
    let lines = "\"a\\nb\": 1\nshowHiddenMetricsForVersion: \"1\\n2\"\nnftproxy: { master: \"\\e[31mred\" }\n";
    let loaded = load(lines, &[]).unwrap();
    let said = remarks(&loaded);
    assert!(
        said.iter().any(|line| line.contains(r"config.conf: a\nb: there is no such field")),
        "{said:#?}"
    );
    assert!(said.iter().all(|line| !line.contains(char::is_control)), "{said:#?}");
    let shown = config::show(&loaded, Format::Text);
    assert!(shown.contains(r"\u{1b}[31mred") && !shown.contains('\u{1b}'), "{shown}");
}

/// Found by `fuzz::names`: nft does not take a `*` behind fifteen characters, so that the listed table could
/// not be loaded.
#[test]
fn a_prefix_as_long_as_a_name_can_be_is_a_whole_name() {
    let of = |prefix: &str| {
        let mode = "detectLocalMode: InterfaceNamePrefix\n";
        let lines = format!("{mode}detectLocal: {{ interfaceNamePrefix: {prefix} }}\n");
        load(&lines, &[]).unwrap().config.live.settings.detect_local
    };
    let long = "veth-9012345678";
    assert_eq!(of(long), DetectLocal::Interface(InterfaceName::Whole(long.into())));
    assert_eq!(of(&long[..14]), DetectLocal::Interface(InterfaceName::Prefix(long[..14].into())));
}
