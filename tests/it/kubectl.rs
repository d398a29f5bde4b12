//! What the pages tell operators to do to a cluster, done as it stands there, in blocks and within
//! sentences: by the real kubectl, kustomize and Helm, against a real API server, on what the real kubeadm
//! has made, with Kubernetes' own controllers.
//!
//! Only the scheduler and the kubelets of two nodes are played: they bind pods, say that they are ready,
//! and let them go. So what has to be in a pod is left out, and named ([`NEEDS_A_KUBELET`]).

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::control_plane::{self, ControlPlane, User};
use crate::docs::root;
use crate::e2e::{Cluster, eventually, with_cluster};
use crate::namespace::skip;
use crate::net::CLIENT;

const PROGRAMS: [&str; 5] = ["kube-controller-manager", "kubeadm", "kubectl", "helm", "kustomize"];
const NODES: [&str; 2] = ["worker-1", "worker-2"];
/// What the pages leave to who reads them, and what it is here.
const CHOICES: [(&str, &str); 2] = [("REPOSITORY", "example/nftproxy"), ("TAG", "v9")];
/// Lines with these words ask something of a pod, or of a node.
const NEEDS_A_KUBELET: [&str; 5] =
    [" exec ", " logs $POD", " logs POD", "/proxy/healthz", "curl http://"];
/// Blocks and commands for a cluster that are not run, by what they begin with, and why.
const NOT_RUN: [(&str, &str); 2] = [
    ("{ printf 'apiVersion: monitoring.coreos.com", "its kind is made by the operator"),
    ("kubectl -n kube-system edit clusterconfig k0s", "its kind is made by k0s"),
];
/// What the API server says that has found the pod, and has no kubelet to ask for its log.
const NO_KUBELET: &str = "no preferred addresses found";
/// The configuration of a new cluster, as kubeadm takes it.
const KUBEADM: &str = "apiVersion: kubeadm.k8s.io/v1beta4\nkind: InitConfiguration\n\
    localAPIEndpoint: { advertiseAddress: ADDRESS, bindPort: PORT }\n---\n\
    apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\nkubernetesVersion: VERSION\n\
    controlPlaneEndpoint: ADDRESS:PORT\nnetworking: { podSubnet: 10.244.0.0/16 }\n";

/// What in the pages is for a cluster, and which of it was run.
struct Pages {
    blocks: Vec<String>,
    /// Commands within sentences.
    commands: BTreeSet<String>,
    run: Mutex<BTreeSet<String>>,
}

impl Pages {
    fn read() -> Self {
        let (mut blocks, mut commands) = (Vec::new(), BTreeSet::new());
        for page in crate::docs::pages() {
            let text = fs::read_to_string(page).unwrap();
            let (mut block, mut sentences, mut is_session) = (String::new(), String::new(), false);
            for line in text.lines().chain([""]) {
                is_session ^= line.starts_with("```");
                match line.strip_prefix("    ") {
                    Some(line) => block += &format!("{line}\n"),
                    None => blocks.push(std::mem::take(&mut block)),
                }
                if !is_session && !line.starts_with("    ") {
                    sentences += &format!("{} ", line.trim_start_matches("```").trim());
                }
            }
            let quoted = sentences.split('`').skip(1).step_by(2);
            commands.extend(quoted.filter(|s| s.starts_with("kubectl ")).map(str::to_owned));
        }
        let is_run = ["kubectl ", "helm ", "kubeadm.k8s.io"];
        blocks.retain(|block| is_run.iter().any(|words| block.contains(words)));
        assert!(blocks.len() > 10 && commands.len() > 20, "{blocks:#?} {commands:#?}");
        Self { blocks, commands, run: Mutex::default() }
    }

    /// The block that begins so, but for what needs a kubelet.
    fn block(&self, beginning: &str) -> String {
        let mut found = self.blocks.iter().filter(|block| block.starts_with(beginning));
        let block = found.next().unwrap_or_else(|| panic!("no block {beginning:?}"));
        assert!(found.next().is_none(), "there are two of {beginning:?}");
        self.run.lock().unwrap().insert(block.clone());
        let mut block: String = block
            .split_inclusive('\n')
            .filter(|line| !NEEDS_A_KUBELET.iter().any(|words| line.contains(words)))
            .collect();
        for (choice, chosen) in CHOICES {
            block = block.replace(choice, chosen);
        }
        block
    }

    /// A command within a sentence.
    fn command<'a>(&self, command: &'a str) -> &'a str {
        assert!(self.commands.contains(command), "no {command:?}");
        self.run.lock().unwrap().insert(command.to_owned());
        command
    }

    /// Whether a block or command is to be run, and was not yet.
    fn is_open(&self, text: &str) -> bool {
        let left_out = NOT_RUN.iter().any(|(beginning, _)| text.starts_with(beginning));
        !left_out && !self.run.lock().unwrap().contains(text)
    }

    /// Nothing was forgotten.
    fn all_were_run(&self) {
        for (beginning, _) in NOT_RUN {
            let mut all = self.blocks.iter().chain(&self.commands);
            assert!(all.any(|text| text.starts_with(beginning)), "it is gone: {beginning}");
        }
        let mut all = self.blocks.iter().chain(&self.commands);
        let open = all.find(|text| self.is_open(text));
        assert_eq!(open, None, "run, or named in NOT_RUN");
    }
}

/// Where commands are given: a copy of the repository's `deploy`, and a user who may do everything.
struct Desk {
    folder: tempfile::TempDir,
    path: String,
    kubeconfig: PathBuf,
}

impl Desk {
    fn new(plane: &ControlPlane) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut copy = Command::new("cp");
        copy.arg("-r").arg(root().join("deploy")).arg(folder.path());
        assert!(output(&mut copy).status.success());
        let mut path: Vec<_> = PROGRAMS
            .map(|name| control_plane::find(name).unwrap().parent().unwrap().to_owned())
            .into();
        path.dedup();
        path.push(folder.path().join("deploy"));
        path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
        let path = std::env::join_paths(path).unwrap().into_string().unwrap();
        Self { folder, path, kubeconfig: plane.kubeconfig(User::Admin) }
    }

    fn output(&self, commands: &str) -> Output {
        let mut shell = Command::new("timeout");
        shell.args(["150", "bash", "-euo", "pipefail", "-c", commands]).stdin(Stdio::null());
        shell.current_dir(self.folder.path()).env("PATH", &self.path).env("NODE", NODES[0]);
        shell.env("KUBECONFIG", &self.kubeconfig).env("HOME", self.folder.path());
        output(&mut shell)
    }

    /// Runs commands, which must succeed; what they print.
    fn does(&self, commands: &str) -> String {
        let output = self.output(commands);
        let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
        assert!(output.status.success(), "{}: {out}{err}\n{commands}", output.status);
        out.into_owned()
    }

    /// Which proxies' pods are on a node.
    fn proxies_on(&self, node: &str) -> Vec<String> {
        let listed = self.does(&format!(
            "kubectl -n kube-system get pods --field-selector spec.nodeName={node} -o json"
        ));
        let listed: Value = serde_json::from_str(&listed).unwrap();
        let label = |pod: &Value| {
            let labels = &pod["metadata"]["labels"];
            let name = labels["app.kubernetes.io/name"].as_str().or(labels["k8s-app"].as_str());
            name.map(str::to_owned)
        };
        let pods = listed["items"].as_array().unwrap().iter();
        let mut names: Vec<_> =
            pods.filter(|pod| pod["status"]["phase"] == "Running").filter_map(label).collect();
        names.sort();
        names
    }

    /// The pod of nftproxy that runs on the first node.
    fn pod(&self) -> String {
        let listed = self.does(
            "kubectl -n kube-system get pod -o name -l app.kubernetes.io/name=nftproxy \
             --field-selector spec.nodeName=$NODE",
        );
        listed.trim().strip_prefix("pod/").expect("there is one").to_owned()
    }

    fn has(&self, proxies: [&str; 2]) {
        eventually(&format!("{proxies:?} on {NODES:?}"), || {
            let seen = NODES.map(|node| self.proxies_on(node).join(", "));
            if seen == proxies { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    }
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Binds pods to the nodes that they are for, says that they run, or have run, and lets them go.
async fn play_kubelets(plane: &ControlPlane, end: &AtomicBool) {
    let pods: Api<Pod> = Api::namespaced(plane.client().await, "kube-system");
    while !end.load(Ordering::Relaxed) {
        for pod in pods.list(&ListParams::default()).await.unwrap() {
            let name = pod.metadata.name.clone().unwrap();
            // Any may be gone meanwhile, or changed by a controller: there is another turn.
            if let Some(node) = to_bind(&pod) {
                let target = json!({ "apiVersion": "v1", "kind": "Node", "name": node });
                let binding = json!({
                    "apiVersion": "v1", "kind": "Binding", "metadata": { "name": name }, "target": target,
                });
                let by = PostParams::default();
                let _: Result<Value, _> =
                    pods.create_subresource("binding", &name, &by, &binding).await;
            } else if pod.metadata.deletion_timestamp.is_some() {
                let _ = pods.delete(&name, &DeleteParams::default().grace_period(0)).await;
            } else if pod.status.is_none_or(|status| status.phase.as_deref() == Some("Pending")) {
                let is_job = pod.metadata.labels.unwrap_or_default().contains_key("job-name");
                let phase = if is_job { "Succeeded" } else { "Running" };
                let ready = json!({ "type": "Ready", "status": "True" });
                let status = json!({ "status": { "phase": phase, "conditions": [ready] } });
                let _ = pods
                    .patch_status(&name, &PatchParams::default(), &Patch::Strategic(status))
                    .await;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The node that a DaemonSet's pod is for, if nobody has bound it.
fn to_bind(pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    if spec.node_name.is_some() {
        return None;
    }
    let affinity = spec.affinity.as_ref()?.node_affinity.as_ref()?;
    let required = affinity.required_during_scheduling_ignored_during_execution.as_ref()?;
    let fields = required.node_selector_terms.first()?.match_fields.as_ref()?;
    fields.first()?.values.as_ref()?.first().cloned()
}

/// A node as a kubelet registers it.
fn node(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": name, "labels": { "kubernetes.io/os": "linux" } },
        "status": { "conditions": [{ "type": "Ready", "status": "True" }] },
    })
}

/// kubeadm knows the fields of the configuration that is shown, and is strict.
fn takes_the_configuration(pages: &Pages, desk: &Desk) {
    let shown = pages.block("apiVersion: kubeadm.k8s.io/v1beta4");
    let write = |name: &str, text: &str| fs::write(desk.folder.path().join(name), text).unwrap();
    write("shown.yaml", &shown);
    desk.does("kubeadm config validate --config shown.yaml");
    write("misspelt.yaml", &shown.replace("disabled: true", "disable: true"));
    desk.does("! kubeadm config validate --config misspelt.yaml");
}

/// What there is where kubeadm has run: its configuration, what it reads of the control plane's own node
/// before an upgrade, and kube-proxy.
fn made_by_kubeadm(cluster: &Cluster<'_>, desk: &Desk) {
    let version = desk.does("kubeadm version -o short").trim().to_owned();
    let [address, port] = [CLIENT[0].to_owned(), cluster.plane.address().port().to_string()];
    let configuration =
        KUBEADM.replace("ADDRESS", &address).replace("PORT", &port).replace("VERSION", &version);
    fs::write(desk.folder.path().join("kubeadm.yaml"), configuration).unwrap();
    let name = nix::sys::utsname::uname().unwrap().nodename().to_string_lossy().to_lowercase();
    let mut own = node(&name);
    // No proxy is to be put there.
    own["metadata"]["labels"] = json!({ "kubernetes.io/os": "none", "nftproxy.dev/node": "none" });
    own["metadata"]["annotations"] =
        json!({ "kubeadm.alpha.kubernetes.io/cri-socket": "unix:///none" });
    cluster.apply(&own.to_string());
    let apiserver = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("kube-apiserver-{name}"), "namespace": "kube-system",
            "labels": { "component": "kube-apiserver", "tier": "control-plane" },
            "annotations": {
                "kubeadm.kubernetes.io/kube-apiserver.advertise-address.endpoint":
                    format!("{address}:{port}"),
            },
        },
        "spec": {
            "nodeName": name,
            "containers": [{ "name": "kube-apiserver", "image": format!("kube-apiserver:{version}") }],
        },
    });
    cluster.apply(&apiserver.to_string());
    desk.does(
        "kubeadm init phase upload-config all --config kubeadm.yaml --kubeconfig $KUBECONFIG",
    );
    desk.does("kubeadm init phase addon kube-proxy --config kubeadm.yaml --kubeconfig $KUBECONFIG");
}

#[test]
fn a_cluster_is_migrated_rolled_back_and_installed_as_the_pages_say() {
    for program in PROGRAMS {
        if let Err(reason) = control_plane::find(program) {
            return skip(&reason);
        }
    }
    let pages = Pages::read();
    with_cluster(|cluster| {
        let cluster = &*cluster;
        for name in NODES {
            cluster.apply(&node(name).to_string());
        }
        let desk = Desk::new(&cluster.plane);
        let kubeconfig = desk.kubeconfig.display();
        let _controllers = cluster.plane.start_controllers(&[
            &format!("--kubeconfig={kubeconfig}"),
            "--controllers=daemonset-controller,garbage-collector-controller,job-controller",
            "--leader-elect=false",
            "--secure-port=0",
        ]);
        let end = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut runtime = tokio::runtime::Builder::new_current_thread();
                let runtime = runtime.enable_all().build().unwrap();
                runtime.block_on(play_kubelets(&cluster.plane, &end));
            });
            // The kubelets have to end with a failure, too.
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                takes_the_configuration(&pages, &desk);
                made_by_kubeadm(cluster, &desk);
                migrate(&pages, &desk);
                look_after(&pages, &desk);
                roll_back(&pages, &desk);
                install(&pages, &desk);
            }));
            end.store(true, Ordering::Relaxed);
            if let Err(panic) = done {
                std::panic::resume_unwind(panic);
            }
        });
    });
    pages.all_were_run();
}

fn migrate(pages: &Pages, desk: &Desk) {
    desk.has(["kube-proxy", "kube-proxy"]);
    desk.does(&pages.block("kubectl -n kube-system get daemonset kube-proxy -o json"));
    desk.does(&pages.block("(cd deploy/kustomize/overlays/kubeadm &&"));
    desk.has(["kube-proxy", "kube-proxy"]);
    let one_node = pages.block("NODE=worker-1");
    desk.does(&one_node);
    desk.has(["nftproxy", "kube-proxy"]);
    let image = "kubectl -n kube-system get daemonset nftproxy -o \
                 'jsonpath={.spec.template.spec.containers[0].image}'";
    assert_eq!(desk.does(image), "example/nftproxy:v9");
    // The pod is found.
    desk.does(&(pages.block("POD=$(kubectl -n kube-system get pod -o name -l app.kubernetes.io/name=nftproxy --field") + "test -n \"$POD\"\n"));
    the_plugin_finds_the_pod(pages, desk);

    desk.does(&pages.block("kubectl label node $NODE nftproxy.dev/node=prepare --overwrite"));
    desk.has(["kube-proxy", "kube-proxy"]);
    let jobs = "kubectl -n kube-system wait job --for=condition=Complete --timeout=60s \
                -l app.kubernetes.io/name=nftproxy-cleanup -o 'jsonpath={.spec.template.spec.nodeName}'";
    assert_eq!(desk.does(jobs), NODES[0]);
    desk.does("kubectl -n kube-system delete jobs --all");

    desk.does(&one_node);
    desk.does(&pages.block("for NODE in $(kubectl get nodes -l '!nftproxy.dev/node'"));
    desk.has(["nftproxy", "nftproxy"]);

    desk.does(&pages.block("kubectl -n kube-system delete daemonset kube-proxy"));
    desk.does("kubectl label nodes --all nftproxy.dev/node-");
    desk.has(["nftproxy", "nftproxy"]);
    kubeadm_keeps_kube_proxy_away(pages, desk);
    desk.has(["nftproxy", "nftproxy"]);

    desk.does(&pages.block("for FILE in config.conf kubeconfig.conf"));
    desk.has(["nftproxy", "nftproxy"]);
    let configuration = desk.does(
        "kubectl -n kube-system get configmap nftproxy -o 'go-template={{index .data \"config.conf\"}}'",
    );
    assert!(configuration.contains("clusterCIDR: 10.244.0.0/16"), "{configuration}");
}

/// That the upgrade of kubeadm makes kube-proxy again is so, and what the page says against it helps.
fn kubeadm_keeps_kube_proxy_away(pages: &Pages, desk: &Desk) {
    let upgrade = "kubeadm upgrade apply phase addon kube-proxy $(kubeadm version -o short) \
                   --kubeconfig $KUBECONFIG";
    let made = "kubectl -n kube-system get daemonset kube-proxy --ignore-not-found -o name";
    desk.does(upgrade);
    assert_eq!(desk.does(made).trim(), "daemonset.apps/kube-proxy");
    desk.does(pages.command("kubectl -n kube-system delete daemonset kube-proxy"));
    desk.does(&pages.block("kubectl -n kube-system get configmap kubeadm-config -o yaml"));
    desk.does(upgrade);
    assert_eq!(desk.does(made), "");
}

/// kubectl runs the plugin, which runs the command in the pod of the node. Only `exec` is an answer that is
/// made up: it says what it was asked.
fn the_plugin_finds_the_pod(pages: &Pages, desk: &Desk) {
    let kubectl = control_plane::find("kubectl").unwrap();
    let fake = desk.folder.path().join("fake");
    fs::create_dir(&fake).unwrap();
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in\n*' exec '*) echo \"$@\" ;;\n*) exec {} \"$@\" ;;\nesac\n",
        kubectl.display()
    );
    fs::write(fake.join("kubectl"), script).unwrap();
    let with_fake =
        |command: &str| format!("chmod +x fake/kubectl\nexport PATH=$PWD/fake:$PATH\n{command}\n");
    let pod = desk.pod();
    for (command, arguments) in [
        ("kubectl nftproxy --node NODE explain …", "explain 10.96.0.10:80"),
        ("kubectl nftproxy --node NODE diff", "diff"),
        ("kubectl nftproxy --node NODE list", "list"),
    ] {
        let command = pages.command(command).replace("explain …", arguments);
        let asked = desk.does(&with_fake(&command.replace("NODE", NODES[0])));
        let expected = format!(
            "--namespace=kube-system exec {pod} --container=nftproxy -- /nftproxy {arguments}\n"
        );
        assert_eq!(asked, expected);
    }
    pages.command("kubectl nftproxy --node NODE …");
    let nowhere = desk.output(&with_fake("kubectl nftproxy --node worker-2 list"));
    let said = String::from_utf8_lossy(&nowhere.stderr);
    assert_eq!(nowhere.status.code(), Some(2), "{said}");
    assert!(said.contains("no pod of nftproxy runs on node worker-2"), "{said}");
}

/// What the pages say within sentences, most of it to look at what is wrong, while nftproxy runs on every node.
fn look_after(pages: &Pages, desk: &Desk) {
    desk.does(&pages.block("kubectl -n kube-system get pods -l").replace("NODE", NODES[0]));
    let open: Vec<_> = pages.commands.iter().filter(|command| pages.is_open(command)).collect();
    for command in open {
        if command.contains("kube-proxy") {
            // It is there again in what follows.
            continue;
        }
        desk.does("kubectl -n kube-system rollout status daemonset/nftproxy");
        desk.has(["nftproxy", "nftproxy"]);
        let mut filled = pages.command(command).to_owned();
        let pod = desk.pod();
        let names = [("NODE", NODES[0]), ("POD", &pod), ("NAMESPACE", "default"), ("NAME", "web")];
        for (name, is) in names {
            filled = filled.replace(name, is);
        }
        if !command.contains(" logs ") {
            desk.does(&filled);
            continue;
        }
        let output = desk.output(&filled);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(NO_KUBELET), "{filled}: {}: {said}", output.status);
    }
    desk.has(["nftproxy", "nftproxy"]);
}

fn roll_back(pages: &Pages, desk: &Desk) {
    // Another version, and back.
    let image = "kubectl -n kube-system get daemonset nftproxy -o \
                 'jsonpath={.spec.template.spec.containers[0].image}'";
    desk.does("kubectl -n kube-system set image daemonset/nftproxy nftproxy=example/nftproxy:v10");
    desk.does("kubectl -n kube-system rollout status daemonset/nftproxy");
    desk.does(&pages.block("kubectl -n kube-system rollout undo daemonset/nftproxy"));
    assert_eq!(desk.does(image), "example/nftproxy:v9");

    desk.does(&pages.block("kubectl -n kube-system create configmap kube-proxy"));
    let all =
        pages.block("kubectl delete --cascade=foreground -k deploy/kustomize/overlays/kubeadm");
    desk.does(&all.replace("overlays/kubeadm", "overlays/cluster"));
    desk.has(["kube-proxy", "kube-proxy"]);
    desk.does("kubectl -n kube-system wait job --for=condition=Complete --timeout=60s -l app.kubernetes.io/name=nftproxy-cleanup");
}

fn install(pages: &Pages, desk: &Desk) {
    // With Helm on what kubeadm has made, one node first.
    desk.does("kubectl label node $NODE nftproxy.dev/node=true");
    desk.does(
        &pages.block(
            "helm install nftproxy deploy/helm/nftproxy --namespace kube-system --set image",
        ),
    );
    desk.has(["kube-proxy, nftproxy", "kube-proxy"]);
    desk.does("helm uninstall nftproxy --namespace kube-system --wait");
    // A cluster without kube-proxy.
    desk.does("kubectl label nodes --all nftproxy.dev/node-");
    desk.does(pages.command("kubectl -n kube-system get pods -l component=kube-proxy"));
    let both = "kubectl -n kube-system delete daemonset/kube-proxy configmap/kube-proxy";
    desk.does(pages.command(both));
    desk.has(["", ""]);
    desk.does(&pages.block("kubectl apply -k deploy/kustomize/overlays/cluster"));
    desk.does(&pages.block("kubectl -n kube-system rollout status daemonset/nftproxy\nkubectl"));
    desk.has(["nftproxy", "nftproxy"]);
    desk.does("kubectl delete -k deploy/kustomize/overlays/cluster");
    desk.has(["", ""]);
    desk.does(
        &pages.block("helm install nftproxy deploy/helm/nftproxy --namespace kube-system \\"),
    );
    desk.has(["nftproxy", "nftproxy"]);
}
