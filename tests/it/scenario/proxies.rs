//! The proxies that the scenario table can be asked of: nftproxy, from manifests, and the real
//! kube-proxy in nftables mode, from a real API server.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::runtime::Runtime;

use super::services;
use super::world::{Objects, Setting};
use crate::control_plane::{self, ControlPlane, User};
use crate::net::{CLIENT, Daemon, Net, ip};
use crate::serve::{Outcome, tcp};

/// A proxy on the node of a [`Net`].
pub(crate) trait Proxy {
    /// What it is called in a report.
    fn title(&self) -> String;

    /// How long it may take until it has done what it is to do.
    fn patience(&self) -> Duration;

    /// Ends what runs, makes these objects all there are, and starts anew; it has synced on return.
    fn start(&mut self, setting: Setting, objects: &Objects);

    /// Makes these all objects there are, and does not wait.
    fn update(&mut self, objects: &Objects);

    /// Ends at once and starts again, with the same configuration and objects.
    fn restart(&mut self);

    /// Whether it explains what it does.
    fn explains(&self) -> bool {
        false
    }
}

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                    mode: nftables\nhostnameOverride: node-1\n";

fn configuration(setting: Setting, nftables: &str, lines: &str) -> String {
    let all = setting.masquerade_all();
    format!("{HEAD}{}nftables: {{ masqueradeAll: {all}, {nftables} }}\n{lines}", setting.lines())
}

pub(crate) struct Nftproxy<'a> {
    net: &'a Net,
    setting: Setting,
    daemon: Option<Daemon>,
}

impl<'a> Nftproxy<'a> {
    pub(crate) fn new(net: &'a Net) -> Self {
        Self { net, setting: Setting::Base, daemon: None }
    }

    fn run(&mut self) {
        let config = self.net.dir.path().join("config.conf");
        fs::write(&config, configuration(self.setting, "minSyncPeriod: 0s", "")).unwrap();
        let manifests = self.net.manifests();
        let arguments = [
            "run",
            "--manifests",
            manifests.to_str().unwrap(),
            "--config",
            config.to_str().unwrap(),
        ];
        self.daemon = Some(Daemon::start(&self.net.name("node"), &arguments));
    }
}

impl Proxy for Nftproxy<'_> {
    fn title(&self) -> String {
        "nftproxy".into()
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(10)
    }

    fn start(&mut self, setting: Setting, objects: &Objects) {
        if let Some(daemon) = self.daemon.take() {
            daemon.terminate();
        }
        self.setting = setting;
        self.update(objects);
        self.run();
    }

    fn update(&mut self, objects: &Objects) {
        let all = objects
            .all(self.setting)
            .iter()
            .map(|object| format!("{object}\n---\n"))
            .collect::<String>();
        self.net.write("all.yaml", &all);
    }

    fn restart(&mut self) {
        self.daemon.take().expect("it runs").kill9();
        self.run();
    }

    fn explains(&self) -> bool {
        true
    }
}

/// kube-proxy and what it watches.
pub(crate) struct KubeProxy<'a> {
    net: &'a Net,
    plane: ControlPlane,
    runtime: Runtime,
    setting: Setting,
    /// By kind and name.
    applied: BTreeMap<(String, String), Value>,
    child: Option<Child>,
}

/// For those settings under which ServiceCIDRs are not to be seen: the API server has one always.
const LIMITED_ROLE: &str = "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\n\
    metadata: { name: limited }\nrules:\n\
    - { apiGroups: [\"\"], resources: [services, nodes], verbs: [get, list, watch] }\n\
    - { apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch] }\n\
    - { apiGroups: [\"\", events.k8s.io], resources: [events], verbs: [create, patch, update] }\n\
    ---\n\
    apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\n\
    metadata: { name: limited }\n\
    roleRef: { apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: limited }\n\
    subjects: [{ kind: ServiceAccount, namespace: kube-system, name: nftproxy }]\n";

fn program() -> std::path::PathBuf {
    control_plane::find("kube-proxy").expect("the real kube-proxy")
}

impl<'a> KubeProxy<'a> {
    /// With a control plane of its own. The calling thread is in the client's namespace.
    pub(crate) fn new(net: &'a Net) -> Self {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let plane = runtime.block_on(ControlPlane::start(ip(CLIENT[0])));
        runtime.block_on(plane.apply(LIMITED_ROLE));
        let (setting, applied) = (Setting::Base, BTreeMap::new());
        Self { net, plane, runtime, setting, applied, child: None }
    }

    fn log(&self) -> std::path::PathBuf {
        self.net.dir.path().join("kube-proxy.log")
    }

    fn run(&mut self) {
        let user = match self.setting {
            Setting::NoServiceCidr => User::ServiceAccount,
            _ => User::KubeProxy,
        };
        let kubeconfig = self.plane.kubeconfig(user);
        let lines = format!(
            "clientConnection: {{ kubeconfig: {} }}\n\
             conntrack: {{ maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s }}\n",
            kubeconfig.display()
        );
        let config = self.net.dir.path().join("kube-proxy.conf");
        // Other periods than those that are waited for below are as usual.
        let nftables = "minSyncPeriod: 20ms, syncPeriod: 30s";
        fs::write(&config, configuration(self.setting, nftables, &lines)).unwrap();
        let log = File::options().create(true).append(true).open(self.log()).unwrap();
        let child = Command::new("ip")
            .args(["netns", "exec", &self.net.name("node")])
            .args(["setpriv", "--pdeathsig", "KILL", "--"])
            .arg(program())
            .arg(format!("--config={}", config.display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("ip and setpriv are installed");
        self.child = Some(child);
        self.wait();
    }

    /// Until it serves both families.
    fn wait(&mut self) {
        let began = Instant::now();
        for address in services::cluster_ip("only-a") {
            let to = std::net::SocketAddr::new(ip(&address), 80);
            while !matches!(tcp(&self.net.name("client"), to), Outcome::Answered { .. }) {
                let ended = self.child.as_mut().unwrap().try_wait().unwrap();
                let log = || fs::read_to_string(self.log()).unwrap();
                assert!(ended.is_none(), "kube-proxy ended, {ended:?}:\n{}", log());
                let waited = began.elapsed();
                assert!(waited < Duration::from_secs(60), "no answer by kube-proxy:\n{}", log());
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

impl Proxy for KubeProxy<'_> {
    fn title(&self) -> String {
        let version = Command::new(program()).arg("--version").output().unwrap();
        let version = String::from_utf8(version.stdout).unwrap();
        format!("kube-proxy {}", version.split_whitespace().last().unwrap())
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(10)
    }

    fn start(&mut self, setting: Setting, objects: &Objects) {
        self.end();
        // Nothing that a setting leaves is to be mistaken for the work of the next.
        for family in ["ip", "ip6"] {
            let node = self.net.name("node");
            let delete = ["netns", "exec", &node, "nft", "delete", "table", family, "kube-proxy"];
            drop(Command::new("ip").args(delete).stderr(Stdio::null()).status());
        }
        self.setting = setting;
        self.update(objects);
        self.run();
    }

    fn update(&mut self, objects: &Objects) {
        let word = |object: &Value, field: &str| object[field].as_str().unwrap().to_owned();
        let key = |object: &Value| (word(object, "kind"), word(&object["metadata"], "name"));
        let all = objects.all(self.setting);
        // The API server makes its ServiceCIDR itself.
        let all = all.into_iter().filter(|object| object["kind"] != "ServiceCIDR");
        let wanted: BTreeMap<_, _> = all.map(|object| (key(&object), object)).collect();
        let gone = self.applied.keys().filter(|key| !wanted.contains_key(*key));
        for (kind, name) in gone {
            self.runtime.block_on(self.plane.delete(kind, "default", name));
        }
        let changed = wanted.iter().filter(|(key, object)| self.applied.get(*key) != Some(*object));
        let text: String = changed.map(|(_, object)| format!("{object}\n---\n")).collect();
        if !text.is_empty() {
            self.runtime.block_on(self.plane.apply(&text));
        }
        self.applied = wanted;
    }

    fn restart(&mut self) {
        self.end();
        self.run();
        // The tables it left serve meanwhile, so that nothing shows when it has synced.
        std::thread::sleep(Duration::from_secs(3));
    }
}

impl Drop for KubeProxy<'_> {
    fn drop(&mut self) {
        self.end();
    }
}
