//! The objects under `deploy/kustomize/base`, taken at their word: a real API server accepts them, and
//! the program is started as the DaemonSet says (its arguments, the files of the ConfigMap where they
//! are mounted, the token of the ServiceAccount) under what the DaemonSet leaves it: one capability, no
//! new privileges, a read-only root and `/proc/sys`. Only the container itself and its seccomp filter
//! are missing.
//!
//! Then every verb of the ClusterRole is taken away in turn. One that nobody misses does not belong
//! there.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::e2e::{Cluster, eventually, lines, said, with_cluster};
use crate::http::get;
use crate::net::{Daemon, NODE, Net, in_netns};
use crate::objects::{CLUSTER, Svc, slice};
use crate::packets::{HTTP, one, to};
use crate::serve::Outcome;

const BASE: &str = "deploy/kustomize/base";
const ACCOUNT: &str = "system:serviceaccount:kube-system:nftproxy";
const PORT: u16 = 32101;

fn text(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn parsed(path: &str) -> Value {
    serde_saphyr::from_str(&text(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn base(name: &str) -> Value {
    parsed(&format!("{BASE}/{name}.yaml"))
}

/// The one container of a pod template.
fn container(workload: &Value) -> &Value {
    let containers = workload["spec"]["template"]["spec"]["containers"].as_array().unwrap();
    assert_eq!(containers.len(), 1);
    &containers[0]
}

/// A pod of the DaemonSet on `node-1`, without a container around it.
struct Pod {
    daemonset: Value,
    /// What is mounted: `config`, and `account` for the service account.
    files: TempDir,
}

impl Pod {
    fn new(cluster: &Cluster<'_>) -> Self {
        let files = tempfile::tempdir().unwrap();
        let config = base("configmap");
        assert_eq!(config["metadata"]["namespace"], "kube-system");
        for folder in ["config", "account"] {
            std::fs::create_dir(files.path().join(folder)).unwrap();
        }
        let put = |path: &str, text: &str| std::fs::write(files.path().join(path), text).unwrap();
        for (key, text) in config["data"].as_object().unwrap() {
            // The one thing that has to be set.
            let text = text.as_str().unwrap();
            let address = cluster.plane.address().to_string();
            put(&format!("config/{key}"), &text.replace("API-SERVER:6443", &address));
        }
        let token = cluster.runtime.block_on(cluster.plane.token("kube-system", "nftproxy"));
        put("account/token", &token);
        put("account/ca.crt", &std::fs::read_to_string(cluster.plane.certificate()).unwrap());
        Self { daemonset: base("daemonset"), files }
    }

    /// Starts the program as the DaemonSet says, and does not wait for it.
    fn start(&self, cluster: &Cluster<'_>) -> Daemon {
        let container = container(&self.daemonset);
        let mounts = container["volumeMounts"].as_array().unwrap();
        assert_eq!(mounts.len(), 1, "{mounts:?}");
        let mounted_at = mounts[0]["mountPath"].as_str().unwrap();
        let rights = &container["securityContext"];
        assert_eq!(rights["capabilities"]["drop"], json!(["ALL"]));
        assert_eq!(rights["allowPrivilegeEscalation"], false);
        assert_eq!(rights["readOnlyRootFilesystem"], true);
        assert_eq!(rights["runAsUser"], 0);
        assert_eq!(rights.get("privileged"), None);
        let added = rights["capabilities"]["add"].as_array().unwrap();
        let added = added.iter().map(|name| format!(",+{}", name.as_str().unwrap().to_lowercase()));
        let capabilities = format!("-all{}", added.collect::<String>());
        // `ip netns exec` has given this a mount namespace of its own.
        let script = r#"
            files=$1 mounted_at=$2 capabilities=$3
            shift 3
            mount -t tmpfs none /var/lib
            mkdir -p "$mounted_at"
            cp "$files"/config/* "$mounted_at"
            mount -t tmpfs none /var/run
            mkdir -p /var/run/secrets/kubernetes.io/serviceaccount
            cp "$files"/account/* /var/run/secrets/kubernetes.io/serviceaccount
            mount --bind /proc/sys /proc/sys
            mount -o remount,bind,ro /proc/sys
            mount -o remount,bind,ro /
            exec setpriv --bounding-set="$capabilities" --inh-caps=-all --no-new-privs -- "$@"
        "#;
        let files = self.files.path().to_str().unwrap();
        let by = ["sh", "-euc", script, "sh", files, mounted_at, &capabilities];
        let arguments = container["args"].as_array().unwrap();
        let arguments =
            arguments.iter().map(|a| a.as_str().unwrap().replace("$(NODE_NAME)", "node-1"));
        let mut arguments: Vec<String> = arguments.collect();
        arguments.push("--v=2".into()); // for what is said of Events
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Daemon::spawn_by(&cluster.net.name("node"), &by, &arguments)
    }

    /// What a kubelet on this node is told by a probe.
    fn probe(&self, cluster: &Cluster<'_>, probe: &str) -> u16 {
        let container = container(&self.daemonset);
        let asked = &container[probe]["httpGet"];
        let ports = container["ports"].as_array().unwrap();
        let port = ports.iter().find(|port| port["name"] == asked["port"]).unwrap();
        let port = port["containerPort"].as_u64().unwrap().try_into().unwrap();
        let path = asked["path"].as_str().unwrap();
        get(cluster.net, "node", to(NODE[0], port), path).expect("it listens").code
    }
}

/// A verb that the role grants.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Grant {
    group: String,
    resource: String,
    verb: String,
}

fn grants(role: &Value) -> Vec<Grant> {
    let words = |value: &Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
    };
    let mut grants = Vec::new();
    for rule in role["rules"].as_array().unwrap() {
        for group in words(&rule["apiGroups"]) {
            for resource in words(&rule["resources"]) {
                grants.extend(words(&rule["verbs"]).into_iter().map(|verb| Grant {
                    group: group.clone(),
                    resource: resource.clone(),
                    verb,
                }));
            }
        }
    }
    grants
}

/// Lets the account do these and nothing else, and waits until the server goes by it.
fn grant(cluster: &Cluster<'_>, all: &[Grant], without: Option<&Grant>) {
    let mut role = base("clusterrole");
    let rules = all.iter().filter(|grant| Some(*grant) != without).map(
        |Grant { group, resource, verb }| {
            json!({ "apiGroups": [group], "resources": [resource], "verbs": [verb] })
        },
    );
    role["rules"] = rules.collect();
    cluster.apply(&role.to_string());
    for grant in all {
        let wanted = Some(grant) != without;
        eventually(&format!("{grant:?} to be {wanted}"), || {
            if may(cluster, grant) == wanted { Ok(()) } else { Err("not yet".into()) }
        });
    }
}

fn may(cluster: &Cluster<'_>, Grant { group, resource, verb }: &Grant) -> bool {
    let asked = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(ACCOUNT.into()),
            resource_attributes: Some(ResourceAttributes {
                group: Some(group.clone()),
                resource: Some(resource.clone()),
                verb: Some(verb.clone()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    cluster.runtime.block_on(async {
        let reviews: Api<SubjectAccessReview> = Api::all(cluster.plane.client().await);
        let answer = reviews.create(&PostParams::default(), &asked).await.unwrap();
        answer.status.unwrap().allowed
    })
}

#[test]
fn the_daemonset_runs_with_the_rights_it_has_and_needs_all_of_them() {
    with_cluster(|cluster| {
        cluster.apply(CLUSTER.split("---\n").next().unwrap());
        let listed = base("kustomization");
        for file in listed["resources"].as_array().unwrap() {
            cluster.apply(&text(&format!("{BASE}/{}", file.as_str().unwrap())));
        }
        let pod = Pod::new(cluster);
        let all = grants(&base("clusterrole"));
        it_serves_and_complains_of_nothing(cluster, &pod);
        events_need_their_right(cluster, &pod, &all);
        let of_verb =
            |verb: &str| -> Vec<&Grant> { all.iter().filter(|grant| grant.verb == verb).collect() };
        for missing in [of_verb("list"), of_verb("watch")].concat() {
            it_says_what_it_may_not(cluster, &pod, &all, missing);
        }
        let shown = ["watch", "list", "create"];
        assert!(all.iter().all(|grant| shown.contains(&grant.verb.as_str())), "{all:?}");
    });
}

fn it_serves_and_complains_of_nothing(cluster: &Cluster<'_>, pod: &Pod) {
    let web = Svc {
        name: "web",
        cluster_ips: &["10.96.0.10"],
        ports: &[("http", "TCP", 80, 0)],
        spec: &[],
        balancer_ips: &[],
    };
    cluster.apply(&web.yaml());
    cluster.endpoints("web", &["10.244.1.6!"]);
    let daemon = pod.start(cluster);
    said(&daemon, "synced");
    cluster.answers("10.96.0.10", 80, &["b"]);
    cluster.endpoints("web", &["10.244.1.5!"]);
    cluster.answers("10.96.0.10", 80, &["a"]);
    for probe in ["livenessProbe", "readinessProbe"] {
        assert_eq!(pod.probe(cluster, probe), 200, "{probe}");
    }
    // What a container without privileges cannot do, and what is not configured.
    let expected = ["the host keeps what it has"];
    let mut complaints = lines(&daemon, "WARN");
    complaints.extend(lines(&daemon, "ERROR"));
    complaints.retain(|line| !expected.iter().any(|words| line.contains(words)));
    assert_eq!(complaints, [""; 0], "{}", daemon.log());
    daemon.terminate();
}

/// Without a right to one kind the log names it; the lists of the two without which no table can be made are
/// waited for.
fn it_says_what_it_may_not(cluster: &Cluster<'_>, pod: &Pod, all: &[Grant], missing: &Grant) {
    grant(cluster, all, Some(missing));
    let daemon = pod.start(cluster);
    said(&daemon, &format!("not allowed to list or watch {} (403:", missing.resource));
    let needed = ["services", "endpointslices"].contains(&missing.resource.as_str());
    if needed && missing.verb == "list" {
        assert_eq!(lines(&daemon, "synced"), [""; 0], "{missing:?}: {}", daemon.log());
    } else {
        said(&daemon, "synced");
    }
    grant(cluster, all, None);
    said(&daemon, "serves the kind again");
    said(&daemon, "synced");
    assert_eq!(lines(&daemon, "not allowed").len(), 1, "{missing:?}: {}", daemon.log());
    daemon.terminate();
}

/// A health-check node port that is taken makes an Event.
fn events_need_their_right(cluster: &Cluster<'_>, pod: &Pod, all: &[Grant]) {
    let check = format!("healthCheckNodePort: {PORT}");
    let balanced = Svc {
        name: "balanced",
        cluster_ips: &["10.96.0.11", "fd00:10:96::11"],
        ports: &[("http", "TCP", 80, 0)],
        spec: &["ipFamilyPolicy: RequireDualStack", "externalTrafficPolicy: Local", &check],
        balancer_ips: &["203.0.113.11"],
    };
    let _taken = in_netns(&cluster.net.name("node"), || {
        NODE.map(|address| TcpListener::bind(to(address, PORT)).unwrap())
    });
    cluster.apply(&balanced.yaml());
    let are_made = || -> bool {
        cluster.runtime.block_on(async {
            let events: Api<Event> = Api::namespaced(cluster.plane.client().await, "default");
            let events = events.list(&ListParams::default()).await.unwrap();
            events
                .into_iter()
                .any(|event| event.reporting_controller.as_deref() == Some("nftproxy"))
        })
    };
    let create = all.iter().find(|grant| grant.verb == "create").unwrap();
    for missing in [None, Some(create)] {
        grant(cluster, all, missing);
        cluster.runtime.block_on(async {
            let events: Api<Event> = Api::namespaced(cluster.plane.client().await, "default");
            events
                .delete_collection(&DeleteParams::default(), &ListParams::default())
                .await
                .unwrap();
        });
        let daemon = pod.start(cluster);
        if missing.is_none() {
            eventually("an Event", || are_made().then_some(()).ok_or_else(|| daemon.log()));
        } else {
            said(&daemon, "Events cannot be made");
            assert!(!are_made());
        }
        assert_eq!(lines(&daemon, "Events cannot be made").len(), usize::from(missing.is_some()));
        daemon.terminate();
    }
    grant(cluster, all, None);
    cluster.delete("Service", "balanced");
}

/// As the unit file starts it on a host: a user of its own, with one ambient capability.
#[test]
fn an_ordinary_user_with_one_capability_suffices() {
    let unit = text("deploy/systemd/nftproxy.service");
    let says = |line: &str| assert!(unit.lines().any(|l| l == line), "{line}");
    says("AmbientCapabilities=CAP_NET_ADMIN");
    says("CapabilityBoundingSet=CAP_NET_ADMIN");
    says("NoNewPrivileges=yes");
    says("User=nftproxy");
    let Some(net) = Net::new() else { return };
    net.write("cluster.yaml", CLUSTER);
    let web = Svc {
        name: "web",
        cluster_ips: &["10.96.0.10"],
        ports: &[("http", "TCP", 80, 30080)],
        spec: &[],
        balancer_ips: &[],
    };
    net.write("web.yaml", &(web.yaml() + &slice("web", "4", &HTTP, &["10.244.1.5!"])));
    // The program and the manifests where that user can read them.
    let folder = tempfile::tempdir().unwrap();
    let script = r#"
        folder=$1 manifests=$2 program=$3
        shift 3
        mount -t tmpfs -o mode=0755 none "$folder"
        cp "$program" "$folder/nftproxy"
        cp -r "$manifests" "$folder/manifests"
        chmod -R a+rX "$folder"
        only=-all,+net_admin
        exec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=$only --ambient-caps=$only \
            --bounding-set=$only --no-new-privs -- "$folder/nftproxy" "$@"
    "#;
    let folder = folder.path().to_str().unwrap();
    let manifests = net.manifests();
    let by = ["sh", "-euc", script, "sh", folder, manifests.to_str().unwrap()];
    let read = format!("--manifests={folder}/manifests");
    let daemon =
        Daemon::spawn_by(&net.name("node"), &by, &["run", &read, "--hostname-override=node-1"]);
    said(&daemon, "synced");
    let answered = one(&net, "client", to(NODE[0], 30080));
    assert!(matches!(answered, Outcome::Answered { .. }), "{answered:?}");
    // What the kernel shows to root alone is not taken for absent.
    let checked = in_netns(&net.name("node"), || {
        let mut command = Command::new("unshare");
        command.arg("--mount").args(by).arg(env!("CARGO_BIN_EXE_nftproxy"));
        command.args(["check", &read, "--hostname-override=node-1"]);
        command.output().unwrap()
    });
    let checked = String::from_utf8([checked.stdout, checked.stderr].concat()).unwrap();
    let hidden = "cannot tell whether there are tables of iptables-legacy";
    let has_legacy = Path::new("/proc/net/ip_tables_names").exists();
    let words = checked.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(words.contains(hidden), has_legacy, "{checked}");
    // Without, it says what is missing.
    let without = script.replace("only=-all,+net_admin", "only=-all");
    let by = ["sh", "-euc", &without, "sh", folder, manifests.to_str().unwrap()];
    let refused =
        Daemon::spawn_by(&net.name("node"), &by, &["run", &read, "--hostname-override=node-1"]);
    said(&refused, "CAP_NET_ADMIN");
}

#[test]
fn what_is_said_in_several_places_is_said_alike() {
    let version = env!("CARGO_PKG_VERSION");
    let image = json!(format!("nftproxy:{version}"));
    let daemonset = base("daemonset");
    let job = parsed("deploy/kustomize/cleanup/job.yaml");
    let ours = container(&daemonset);
    let theirs = container(&job);
    assert_eq!((&ours["image"], &theirs["image"]), (&image, &image));
    assert_eq!(ours["securityContext"], theirs["securityContext"]);
    for overlay in ["kubeadm", "cluster"] {
        let overlay = parsed(&format!("deploy/kustomize/overlays/{overlay}/kustomization.yaml"));
        assert_eq!(overlay["images"][0]["newTag"], version);
    }
    let chart = parsed("deploy/helm/nftproxy/Chart.yaml");
    assert_eq!((&chart["version"], &chart["appVersion"]), (&json!(version), &json!(version)));
    // What the chart adds to the name of the program is its own; the rules are not.
    let rules = |path: &str| {
        let lines = text(path);
        let lines = lines.lines().skip_while(|line| *line != "rules:").skip(1);
        let lines = lines.take_while(|line| line.starts_with("  "));
        lines.filter(|line| !line.trim().starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
    };
    let ours = rules(&format!("{BASE}/clusterrole.yaml"));
    assert_eq!(ours.len(), 12);
    assert_eq!(ours, rules("deploy/helm/nftproxy/templates/rbac.yaml"));
}
