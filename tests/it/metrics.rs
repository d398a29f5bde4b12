//! The metrics, as a Prometheus server reads them: the text is well-formed, what kube-proxy has is
//! there under the same names, labels and buckets, and values follow what happens.

#![allow(clippy::float_cmp, reason = "counts are whole numbers, which floats hold exactly")]

use std::collections::{BTreeMap, BTreeSet};

use crate::control_plane::User;
use crate::e2e::with_cluster;
use crate::http::get;
use crate::namespace::nft;
use crate::net::{NODE, Net, in_netns, wait_until};
use crate::objects::{CLUSTER, Svc, slice};
use crate::packets::{CIDRS, HTTP, one, run, to};
use crate::serve::Outcome;

pub(crate) type Labels = BTreeMap<String, String>;

/// A family: its type, its help text, and its samples by name and labels.
#[derive(Debug, Default)]
pub(crate) struct Family {
    pub(crate) kind: String,
    help: String,
    pub(crate) samples: Vec<(String, Labels, f64)>,
}

impl Family {
    /// The names of labels that samples of this family have, without those of histograms.
    fn label_names(&self) -> BTreeSet<BTreeSet<&str>> {
        let names = self.samples.iter().map(|(_, labels, _)| {
            labels.keys().map(String::as_str).filter(|name| *name != "le").collect()
        });
        names.collect()
    }

    /// The bounds of its buckets.
    fn buckets(&self) -> BTreeSet<&str> {
        self.samples
            .iter()
            .filter_map(|(_, labels, _)| labels.get("le"))
            .map(String::as_str)
            .collect()
    }
}

/// Reads the text format 0.0.4, strictly.
fn parsed(text: &str) -> BTreeMap<String, Family> {
    let mut families = BTreeMap::<String, Family>::new();
    let mut current = String::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let words = |rest: &str| {
            let (name, rest) = rest.split_once(' ').unwrap_or_else(|| panic!("{line}"));
            (name.to_owned(), rest.to_owned())
        };
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = words(rest);
            families.entry(name).or_default().help = help;
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = words(rest);
            let family = families.entry(name.clone()).or_default();
            assert!(family.kind.is_empty(), "twice: {line}");
            family.kind = kind;
            current = name;
        } else if !line.starts_with('#') {
            let (name, labels, value) = sample(line);
            let family = families.get_mut(&current).unwrap_or_else(|| panic!("no type: {line}"));
            let suffix = name.strip_prefix(&current).unwrap_or_else(|| panic!("not here: {line}"));
            let histogram = ["_bucket", "_sum", "_count"].contains(&suffix);
            assert_eq!(histogram, family.kind == "histogram", "{line}");
            assert!(histogram || suffix.is_empty(), "{line}");
            assert_eq!(labels.contains_key("le"), suffix == "_bucket", "{line}");
            let known = family.samples.iter().any(|(n, l, _)| (n, l) == (&name, &labels));
            assert!(!known, "twice: {line}");
            family.samples.push((name, labels, value));
        }
    }
    families
}

fn sample(line: &str) -> (String, Labels, f64) {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let value = value.parse().unwrap_or_else(|e| panic!("{line}: {e}"));
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    let known = |c: char| c.is_ascii_alphanumeric() || c == '_';
    assert!(name.chars().all(known), "{line}");
    // No label of ours holds a quote or a comma.
    let labels = labels.strip_suffix('}').unwrap().split(',').filter(|label| !label.is_empty());
    let labels = labels.map(|label| {
        let (name, value) = label.split_once('=').unwrap();
        let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
        (name.to_owned(), value.unwrap_or_else(|| panic!("{line}")).to_owned())
    });
    (name.to_owned(), labels.collect(), value)
}

/// Checks what a Prometheus server takes for granted of histograms.
fn check_histograms(families: &BTreeMap<String, Family>) {
    for (name, family) in families.iter().filter(|(_, family)| family.kind == "histogram") {
        let mut before = BTreeMap::<Labels, (f64, f64)>::new();
        let mut counts = BTreeMap::<Labels, f64>::new();
        for (sample, labels, value) in &family.samples {
            let mut labels = labels.clone();
            if let Some(bound) = labels.remove("le") {
                let bound: f64 = bound.replace('+', "").parse().unwrap();
                let last = before.insert(labels, (bound, *value));
                let rises = last.is_none_or(|(b, v)| b < bound && v <= *value);
                assert!(rises, "{name}: {last:?} before {bound} {value}");
            } else if sample.ends_with("_count") {
                counts.insert(labels, *value);
            }
        }
        let last = before.into_iter().map(|(labels, (bound, value))| {
            assert!(bound.is_infinite(), "{name}");
            (labels, value)
        });
        assert_eq!(last.collect::<BTreeMap<_, _>>(), counts, "{name}");
    }
}

const KUBE_PROXY: &str = include_str!("reference/kube-proxy-1.37.2-metrics.txt");

/// What kube-proxy has and this program does not, with the reason. A name that ends in `_` stands for
/// all that begin so.
const LEFT_OUT: &[(&str, &str)] = &[
    ("go_", "there is no Go runtime"),
    ("aggregator_", "of the API server's library, always 0 in kube-proxy"),
    ("apiserver_", "of the API server's library, always 0 in kube-proxy"),
    ("cardinality_enforcement_unexpected_categorizations_total", "of the metrics library"),
    ("disabled_metrics_total", "of the metrics library"),
    ("hidden_metrics_total", "of the metrics library"),
    ("registered_metrics_total", "of the metrics library"),
    ("kubernetes_build_info", "this is no build of Kubernetes: nftproxy_build_info"),
    ("kubernetes_feature_enabled", "there are no feature gates"),
    ("process_network_", "of the whole network namespace, not of the process"),
    ("rest_client_exec_plugin_", "of Go's client"),
    ("rest_client_rate_limiter_duration_seconds", "the client has no rate limiter"),
    ("rest_client_request_size_bytes", "the client does not tell"),
    ("rest_client_response_size_bytes", "the client does not tell"),
    ("rest_client_transport_", "of Go's client"),
];

/// Those of kube-proxy that a scrape only shows once they have happened.
const ON_FAILURE: [&str; 2] = [
    "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
    "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
];

fn text(net: &Net) -> String {
    let mut page = None;
    wait_until("it to listen", || {
        page = get(net, "node", to("127.0.0.1", 10249), "/metrics");
        page.is_some()
    });
    let page = page.unwrap();
    assert_eq!(page.code, 200);
    assert_eq!(page.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    page.body
}

pub(crate) fn scrape(net: &Net) -> BTreeMap<String, Family> {
    let families = parsed(&text(net));
    check_histograms(&families);
    families
}

/// The one sample of a name that has these labels.
fn value(families: &BTreeMap<String, Family>, name: &str, labels: &[(&str, &str)]) -> f64 {
    let samples = families.values().flat_map(|family| &family.samples);
    let found: Vec<f64> = samples
        .filter(|(n, l, _)| {
            n == name && labels.iter().all(|(k, v)| l.get(*k).is_some_and(|x| x == v))
        })
        .map(|(.., value)| *value)
        .collect();
    assert_eq!(found.len(), 1, "{name} {labels:?}: {found:?}");
    found[0]
}

const WEB: Svc<'_> = Svc {
    name: "web",
    cluster_ips: &["10.96.0.10", "fd00:10:96::10"],
    ports: &[("http", "TCP", 80, 30080), ("dns", "UDP", 53, 0)],
    spec: &[],
    balancer_ips: &[],
};

const HTTP_PORT: [(&str, &str, u16, u16); 1] = [("http", "TCP", 80, 30080)];

#[test]
fn what_kube_proxy_has_is_there_under_the_same_names_labels_and_buckets() {
    let reference = parsed(KUBE_PROXY);
    assert!(reference.len() > 50, "the reference was read");
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &(CLUSTER.to_owned() + &WEB.yaml()));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let ours = scrape(&net);
    let left_out = |name: &str| {
        LEFT_OUT
            .iter()
            .any(|(left, _)| name == *left || left.ends_with('_') && name.starts_with(left))
    };
    for (name, theirs) in &reference {
        if left_out(name) {
            assert!(!ours.contains_key(name), "{name} is there, and said to be left out");
            continue;
        }
        if name.starts_with("rest_client_") {
            continue; // only with an API server
        }
        let ours = ours.get(name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!((&ours.kind, &ours.help), (&theirs.kind, &theirs.help), "{name}");
        assert_eq!(ours.label_names(), theirs.label_names(), "{name}");
        assert_eq!(ours.buckets(), theirs.buckets(), "{name}");
    }
    for (left, _) in LEFT_OUT {
        assert!(reference.keys().any(|name| name.starts_with(left)), "{left} is nobody's");
    }
    for name in ON_FAILURE {
        assert_eq!(ours[name].label_names(), [["ip_family"].into()].into(), "{name}");
    }
    let extra = ours.keys().filter(|name| !reference.contains_key(*name));
    let extra: Vec<_> = extra.filter(|name| !ON_FAILURE.contains(&name.as_str())).collect();
    assert!(
        extra.iter().all(|name| name.starts_with("nftproxy_") || *name == "process_threads"),
        "{extra:?}"
    );
}

#[test]
fn values_follow_what_happens() {
    let Some(net) = Net::new() else { return };
    net.write("web.yaml", &(CLUSTER.to_owned() + &WEB.yaml()));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let four = [("ip_family", "IPv4")];
    let before = scrape(&net);
    let count = "kubeproxy_sync_proxy_rules_duration_seconds_count";
    let partial = "kubeproxy_sync_partial_proxy_rules_duration_seconds_count";
    let full = "kubeproxy_sync_full_proxy_rules_duration_seconds_count";
    assert!(value(&before, full, &four) >= 1.0);
    let services = "kubeproxy_sync_proxy_rules_service_changes_total";
    assert_eq!(value(&before, services, &[]), 1.0);
    let endpoints = "kubeproxy_sync_proxy_rules_endpoint_changes_total";
    assert_eq!(value(&before, endpoints, &[]), 0.0);
    let elements = |families: &BTreeMap<String, Family>, object| {
        value(families, "nftproxy_elements", &[("ip_family", "IPv4"), ("object", object)])
    };
    assert_eq!((elements(&before, "services"), elements(&before, "no-endpoints")), (0.0, 2.0));
    assert!(value(&before, "process_resident_memory_bytes", &[]) > 1e6);

    // A change made five seconds ago, by its own word, and before this program began.
    let made = jiff::Timestamp::now().as_second();
    let annotated = |made: i64| {
        let made = jiff::Timestamp::from_second(made).unwrap();
        let mark = format!(
            "metadata:\n  annotations: {{ endpoints.kubernetes.io/last-change-trigger-time: \"{made}\" }}\n"
        );
        slice("web", "4", &HTTP, &["10.244.1.5!", "10.244.2.9"]).replacen("metadata:\n", &mark, 1)
    };
    net.write("web-4.yaml", &annotated(made - 1000));
    wait_until("the endpoints to be programmed", || elements(&scrape(&net), "endpoints") == 2.0);
    let programmed = "kubeproxy_network_programming_duration_seconds_count";
    assert_eq!(value(&scrape(&net), programmed, &four), 0.0, "changed before the start");
    // The annotation has whole seconds, so that the second of the start is over only now.
    std::thread::sleep(std::time::Duration::from_millis(2100));
    net.write("web-4.yaml", &annotated(made + 2));
    wait_until("the change to be measured", || value(&scrape(&net), programmed, &four) == 1.0);
    let after = scrape(&net);
    assert_eq!(value(&after, programmed, &[("ip_family", "IPv6")]), 0.0);
    assert_eq!(value(&after, endpoints, &[]), 2.0);
    for gauge in ["endpoint_changes_pending", "service_changes_pending"] {
        assert_eq!(value(&after, &format!("kubeproxy_sync_proxy_rules_{gauge}"), &[]), 0.0);
    }
    assert!(value(&after, count, &four) > value(&before, count, &four));
    assert!(value(&after, partial, &four) > value(&before, partial, &four));
    let last = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
    let queued = "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds";
    assert!(value(&after, last, &four) > value(&before, last, &four));
    assert!(value(&after, last, &four) >= value(&after, queued, &four));
    assert!(value(&after, "nftproxy_event_to_kernel_seconds_count", &[]) >= 2.0);
    assert!(value(&after, "nftproxy_commit_operations_sum", &[]) > 4.0);
    assert!(value(&after, "nftproxy_commit_bytes_sum", &[]) > 1000.0);
    assert_eq!((elements(&after, "services"), elements(&after, "no-endpoints")), (1.0, 1.0));

    // Policies that find nobody here.
    let spec = ["internalTrafficPolicy: Local", "externalTrafficPolicy: Local"];
    net.write("web.yaml", &(CLUSTER.to_owned() + &Svc { spec: &spec, ..WEB }.yaml()));
    net.write("web-4.yaml", &slice("web", "4", &HTTP, &["10.244.2.9"]));
    let without = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
    for policy in ["internal", "external"] {
        wait_until("it to be counted", || {
            value(&scrape(&net), without, &[four[0], ("traffic_policy", policy)]) == 1.0
        });
    }
    // Probes, and a foreign hand.
    let healthz = |code| value(&scrape(&net), "kubeproxy_proxy_healthz_total", &[("code", code)]);
    let asked = healthz("200");
    get(&net, "client", to(NODE[0], 10256), "/healthz").unwrap();
    assert_eq!((healthz("200"), healthz("503")), (asked + 1.0, 0.0));
    let addresses = elements(&scrape(&net), "cluster-ips");
    let netns = net.name("node");
    let flush = ["netns", "exec", &netns, "nft", "flush", "set", "ip", "nftproxy", "cluster-ips"];
    assert!(std::process::Command::new("ip").args(flush).status().unwrap().success());
    let repairs = || value(&scrape(&net), "nftproxy_drift_repairs_total", &[]);
    wait_until("the repair to be counted", || repairs() >= 1.0);
    assert_eq!((elements(&scrape(&net), "cluster-ips"), addresses), (1.0, 1.0));
    // No sum that is kept is off from what is there.
    std::fs::remove_file(net.manifests().join("web-4.yaml")).unwrap();
    net.write("web.yaml", CLUSTER);
    wait_until("everything to go", || {
        let families = scrape(&net);
        ["services", "endpoints", "no-endpoints", "hairpin", "cluster-ips", "nodeports"]
            .iter()
            .all(|object| elements(&families, object) == 0.0)
            && value(&families, without, &[four[0], ("traffic_policy", "internal")]) == 0.0
            && value(&families, "nftproxy_services", &[]) == 0.0
    });
}

#[test]
fn what_is_asked_beside_metrics_is_answered_to_this_host() {
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    let daemon = run(&net, &[]);
    let page = |path| get(&net, "node", to("127.0.0.1", 10249), path).unwrap();
    for (path, body) in [("/proxyMode", "nftables"), ("/healthz", "ok")] {
        let page = page(path);
        assert_eq!((page.code, page.body.as_str()), (200, body));
        assert_eq!(page.headers["content-type"], "text/plain; charset=utf-8");
    }
    let config = &page("/configz").json()["kubeproxy.config.k8s.io"];
    assert_eq!(config["mode"], "nftables");
    assert_eq!(config["metricsBindAddress"], "127.0.0.1:10249");
    assert_eq!(page("/debug/pprof/").code, 404);
    assert_eq!(get(&net, "client", to(NODE[0], 10249), "/metrics"), None, "loopback only");
    daemon.terminate();

    let path = net.dir.path().join("config.conf");
    let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmetricsBindAddress: 0.0.0.0:10249\n";
    std::fs::write(&path, text).unwrap();
    let _daemon = run(&net, &["--config", path.to_str().unwrap()]);
    for node in NODE {
        let page = |path| get(&net, "client", to(node, 10249), path).unwrap();
        assert_eq!(page("/metrics").code, 200);
        assert_eq!(page("/configz").code, 404, "anybody could read it");
    }
}

#[test]
fn affinity_maps_are_counted() {
    let Some(net) = Net::new() else { return };
    let sticky = Svc { spec: &["sessionAffinity: ClientIP"], ports: &HTTP_PORT, ..WEB };
    net.write("web.yaml", &(CLUSTER.to_owned() + &sticky.yaml()));
    net.write("web-4.yaml", &slice("web", "4", &HTTP, &["10.244.1.5!", "10.244.2.9"]));
    let _daemon = run(&net, &["--cluster-cidr", CIDRS]);
    let seen = |name: &str, family| {
        let name = format!("nftproxy_affinity_{name}");
        value(&scrape(&net), &name, &[("ip_family", family)])
    };
    assert!(seen("maps", "IPv4") >= 1.0);
    assert_eq!((seen("entries", "IPv4"), seen("fullest_ratio", "IPv4")), (0.0, 0.0));
    for from in ["client", "b"] {
        assert!(matches!(one(&net, from, to("10.96.0.10", 80)), Outcome::Answered { .. }));
    }
    // The kernel is asked once a second.
    wait_until("both clients to be counted", || seen("entries", "IPv4") == 2.0);
    assert!((seen("fullest_ratio", "IPv4") - 2.0 / 65535.0).abs() < 1e-9);
    assert_eq!(seen("entries", "IPv6"), 0.0);
    // A full one is seen; that it lets new clients through is tested in `features`.
    let clients: Vec<_> = (2..65_535_u32)
        .map(|n| format!("{} : 10.244.1.5 . 8080", std::net::Ipv4Addr::from(n + 0x0b00_0000)))
        .collect();
    let map = "add element ip nftproxy affinity/default/web/tcp/http";
    in_netns(&net.name("node"), || {
        nft(&["-f", "-"], &format!("{map} {{ {} }}", clients.join(",\n")))
    });
    wait_until("the full map to be seen", || seen("fullest_ratio", "IPv4") >= 1.0);
    assert_eq!(seen("entries", "IPv4"), 65_535.0);
}

#[test]
fn requests_to_the_api_server_are_counted() {
    let reference = parsed(KUBE_PROXY);
    with_cluster(|cluster| {
        cluster.apply(CLUSTER.split("---\n").next().unwrap());
        let _daemon = cluster.start(User::KubeProxy);
        let families = scrape(cluster.net);
        for name in ["rest_client_requests_total", "rest_client_request_duration_seconds"] {
            let (ours, theirs) = (&families[name], &reference[name]);
            assert_eq!((&ours.kind, &ours.help), (&theirs.kind, &theirs.help), "{name}");
            assert_eq!(ours.label_names(), theirs.label_names(), "{name}");
            assert_eq!(ours.buckets(), theirs.buckets(), "{name}");
        }
        let (_, labels, requests) = &families["rest_client_requests_total"].samples[0];
        assert_eq!((labels["code"].as_str(), labels["method"].as_str()), ("200", "GET"));
        assert!(labels["host"].starts_with("192.0.2.2:"), "{labels:?}");
        assert!(*requests >= 4.0, "one for each kind at least");
    });
}
