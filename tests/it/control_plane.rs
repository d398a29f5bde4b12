//! A real control plane, for tests that need the API as it is: etcd and kube-apiserver alone.
//!
//! A mock answers what its author believes; the real server validates, defaults, allocates
//! ClusterIPs, ends watches and enforces RBAC. As no controllers and no kubelets run beside it, a
//! test is the only author of what the proxy sees: it writes Services, EndpointSlices and Nodes
//! itself, with [`ControlPlane::apply`]. The programs are built by `tests/control-plane/build`.
//!
//! Both programs are children in the network namespace of the thread that starts them (whose `lo`
//! must be up). Everything they write is in one temporary folder, which goes when they go.

use std::error::Error;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Service, ServiceAccount};
use kube::api::{
    Api, DeleteParams, DynamicObject, GetParams, ListParams, Patch, PatchParams, PostParams,
    TypeMeta,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, Request};
use kube::discovery::{ApiCapabilities, Scope};
use kube::{Client, Config, Discovery};
use serde_json::{Value, json};
use tempfile::TempDir;

/// It takes about five seconds on an idle machine.
const READY_WITHIN: Duration = Duration::from_secs(120);

const WRITABLE: &str = "the temporary folder can be written to";

/// Who asks. RBAC is on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum User {
    /// May do everything.
    Admin,
    /// The user that the server's own roles let watch what a kube-proxy watches.
    KubeProxy,
    /// The service account `nftproxy` in `kube-system`, which may do what a test grants it.
    ServiceAccount,
}

impl User {
    const ALL: [Self; 3] = [Self::Admin, Self::KubeProxy, Self::ServiceAccount];

    fn name_and_groups(self) -> (&'static str, &'static str) {
        match self {
            Self::Admin => ("admin", "system:masters"),
            Self::KubeProxy => ("system:kube-proxy", "system:authenticated"),
            Self::ServiceAccount => (
                "system:serviceaccount:kube-system:nftproxy",
                "system:serviceaccounts,system:serviceaccounts:kube-system",
            ),
        }
    }

    fn token(self) -> String {
        format!("token-of-{self:?}")
    }
}

/// The two programs, while they run. A drop ends them.
pub(crate) struct ControlPlane {
    address: SocketAddr,
    etcd_port: u16,
    // Fields are dropped in this order: no program outlives its folder.
    apiserver: Option<Process>,
    another: Option<Process>,
    etcd: Option<Process>,
    peer_port: u16,
    folder: TempDir,
}

impl ControlPlane {
    /// Starts both programs, the API server on a free port of `bind`, and waits until it is ready.
    /// Panics with the ends of their logs if it does not get ready.
    pub(crate) async fn start(bind: IpAddr) -> Self {
        let folder = tempfile::Builder::new().prefix("control-plane.").tempdir().expect(WRITABLE);
        let [etcd_port, peer_port, port] =
            free_ports([Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into(), bind]);
        write_credentials(folder.path());
        let address = SocketAddr::new(bind, port);
        let mut this = Self {
            address,
            etcd_port,
            peer_port,
            apiserver: None,
            another: None,
            etcd: None,
            folder,
        };
        this.start_etcd();
        this.start_apiserver().await;
        this
    }

    /// Starts etcd again after [`Self::kill_etcd`], with the same data.
    pub(crate) fn start_etcd(&mut self) {
        let [client_url, peer_url] =
            [self.etcd_port, self.peer_port].map(|port| format!("http://127.0.0.1:{port}"));
        self.etcd = Some(Process::start(
            "etcd",
            self.folder.path(),
            &[
                &format!("--data-dir={}", self.folder.path().join("etcd").display()),
                "--unsafe-no-fsync",
                "--log-level=warn",
                &format!("--listen-client-urls={client_url}"),
                &format!("--advertise-client-urls={client_url}"),
                &format!("--listen-peer-urls={peer_url}"),
                &format!("--initial-advertise-peer-urls={peer_url}"),
                &format!("--initial-cluster=default={peer_url}"),
            ],
        ));
    }

    /// Ends both programs, keeps a copy of what they know, and starts them again.
    pub(crate) async fn back_up(&mut self) {
        self.with_data_at_rest(["etcd", "backup"]).await;
    }

    /// Ends both programs, and starts them with what they knew at the time of the copy.
    pub(crate) async fn restore(&mut self) {
        self.with_data_at_rest(["backup", "etcd"]).await;
    }

    async fn with_data_at_rest(&mut self, [from, to]: [&str; 2]) {
        self.apiserver = None;
        self.etcd = None;
        let [from, to] = [from, to].map(|name| self.folder.path().join(name));
        if to.exists() {
            fs::remove_dir_all(&to).expect(WRITABLE);
        }
        let copy = Command::new("cp").arg("-a").args([&from, &to]).output().expect("there is cp");
        assert!(copy.status.success(), "{}", String::from_utf8_lossy(&copy.stderr));
        self.start_etcd();
        self.start_apiserver().await;
    }

    /// Starts the API server again after [`Self::kill_apiserver`], at the same address and with the
    /// same data and certificate, and waits until it is ready.
    pub(crate) async fn start_apiserver(&mut self) {
        assert!(self.apiserver.is_none(), "the API server runs already");
        self.apiserver = Some(self.apiserver_at(self.address));
        self.wait_for(self.address).await;
    }

    /// Starts another API server beside the first, on the same data, and tells where it is.
    pub(crate) async fn start_another(&mut self) -> SocketAddr {
        let [port] = free_ports([self.address.ip()]);
        let address = SocketAddr::new(self.address.ip(), port);
        self.another = Some(self.apiserver_at(address));
        self.wait_for(address).await;
        address
    }

    fn apiserver_at(&self, address: SocketAddr) -> Process {
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        // The family of the first range has to be that of the advertised address.
        let mut ranges = ["10.96.0.0/12", "fd00:10:96::/108"];
        if address.is_ipv6() {
            ranges.reverse();
        }
        // It becomes the endpoint of the Service `kubernetes`, for which loopback is refused. Left
        // out, it would be looked for by way of a default route, which a namespace need not have.
        let advertised = match address.ip() {
            IpAddr::V4(ip) if ip.is_loopback() || ip.is_unspecified() => "192.0.2.1".into(),
            IpAddr::V6(ip) if ip.is_loopback() || ip.is_unspecified() => "2001:db8::1".into(),
            ip => ip.to_string(),
        };
        let flags = [
            format!("--etcd-servers=http://{}", self.etcd()),
            format!("--bind-address={}", address.ip()),
            format!("--secure-port={}", address.port()),
            format!("--advertise-address={advertised}"),
            format!("--cert-dir={}", path("certificates")),
            format!("--service-cluster-ip-range={}", ranges.join(",")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", path("service-account.key")),
            format!("--service-account-signing-key-file={}", path("service-account.key")),
            format!("--token-auth-file={}", path("tokens.csv")),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--allow-privileged=true".to_owned(), // kube-proxy is
            "--disable-admission-plugins=ServiceAccount".to_owned(), // pods would wait for a controller
        ];
        let flags = flags.each_ref().map(String::as_str);
        Process::start("kube-apiserver", self.folder.path(), &flags)
    }

    async fn wait_for(&mut self, address: SocketAddr) {
        if let Err(reason) = self.ready(address).await {
            let logs = self.apiserver.iter().chain(&self.etcd).map(Process::end_of_log);
            panic!("no control plane: {reason}\n{}", logs.collect::<String>());
        }
    }

    /// Ends the API server at once, as a crash would; etcd stays.
    pub(crate) fn kill_apiserver(&mut self) {
        assert!(self.apiserver.take().is_some(), "the API server does not run");
    }

    /// Starts controllers; they end with what is returned.
    pub(crate) fn start_controllers(&self, flags: &[&str]) -> Process {
        Process::start("kube-controller-manager", self.folder.path(), flags)
    }

    /// Where etcd is.
    pub(crate) fn etcd(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.etcd_port).into()
    }

    /// The process of the API server, which runs.
    #[allow(dead_code, reason = "for the benches")]
    pub(crate) fn apiserver_id(&self) -> u32 {
        self.apiserver.as_ref().expect("it runs").child.id()
    }

    /// Ends etcd at once, as a crash would.
    pub(crate) fn kill_etcd(&mut self) {
        assert!(self.etcd.take().is_some(), "etcd does not run");
    }

    /// Where the API server is, as `address:port`.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificate by which clients know the API server.
    pub(crate) fn certificate(&self) -> PathBuf {
        self.folder.path().join("certificates/apiserver.crt")
    }

    /// A token of a service account, as a kubelet asks for one.
    pub(crate) async fn token(&self, namespace: &str, account: &str) -> String {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client().await, namespace);
        let asked = TokenRequest::default();
        let made = accounts.create_token_request(account, &PostParams::default(), &asked).await;
        let made = made.unwrap_or_else(|error| panic!("no token for {account}: {error}"));
        made.status.expect("the server fills it in").token
    }

    /// Writes a kubeconfig file for a user.
    pub(crate) fn kubeconfig(&self, user: User) -> PathBuf {
        let path = self.folder.path().join(format!("{user:?}.kubeconfig"));
        fs::write(&path, self.kubeconfig_of(user).to_string()).expect(WRITABLE);
        path
    }

    /// The same, with another address in the place of the server's.
    pub(crate) fn kubeconfig_at(&self, user: User, server: &str) -> PathBuf {
        let path = self.folder.path().join(format!("{user:?}-elsewhere.kubeconfig"));
        let mut kubeconfig = self.kubeconfig_of(user);
        let cluster = &mut kubeconfig["clusters"][0]["cluster"];
        if server.starts_with("https:") {
            cluster["server"] = json!(server);
        } else {
            *cluster = json!({ "server": server });
        }
        fs::write(&path, kubeconfig.to_string()).expect(WRITABLE);
        path
    }

    /// A new client of the admin. It belongs to the runtime in which it is made.
    pub(crate) async fn client(&self) -> Client {
        self.client_of(User::Admin).await.unwrap_or_else(|error| panic!("no client: {error}"))
    }

    /// Makes the objects of a YAML text, or changes them to be as told there. A `status` is written,
    /// too: as a whole, since no controller has a part in it.
    pub(crate) async fn apply(&self, yaml: &str) {
        let client = self.client().await;
        let kinds = kinds(&client).await;
        let objects: Vec<DynamicObject> = serde_saphyr::from_multiple(yaml)
            .unwrap_or_else(|error| panic!("not Kubernetes objects: {error}\n{yaml}"));
        for mut object in objects {
            let types = object.types.clone().unwrap_or_default();
            let name = object.metadata.name.clone().expect("an object has a name");
            let resource = kinds.resolve_typemeta(&types).unwrap_or_else(|| {
                panic!("the server has no {} {}", types.api_version, types.kind)
            });
            let api = api(&client, &resource, object.metadata.namespace.as_deref());
            let status = object.data.as_object_mut().and_then(|fields| fields.remove("status"));
            let field_manager = PatchParams::apply("nftproxy-tests").force();
            let mut result = api.patch(&name, &field_manager, &Patch::Apply(&object)).await;
            if let (Ok(made), Some(status)) = (&mut result, status) {
                // No patch: it could not tell a Node's two addresses of type InternalIP apart.
                made.data["status"] = status;
                result = api.replace_status(&name, &PostParams::default(), made).await;
            }
            result.unwrap_or_else(|error| panic!("cannot apply {} {name}: {error}", types.kind));
        }
    }

    /// Deletes an object; the namespace of one that has none is not looked at.
    pub(crate) async fn delete(&self, kind: &str, namespace: &str, name: &str) {
        let client = self.client().await;
        let resource = kind_named(&client, kind).await;
        api(&client, &resource, Some(namespace))
            .delete(name, &DeleteParams::default())
            .await
            .unwrap_or_else(|error| panic!("cannot delete {kind} {namespace}/{name}: {error}"));
    }

    /// An object as the server has it.
    pub(crate) async fn get(&self, kind: &str, namespace: &str, name: &str) -> DynamicObject {
        let client = self.client().await;
        let resource = kind_named(&client, kind).await;
        api(&client, &resource, Some(namespace))
            .get(name)
            .await
            .unwrap_or_else(|error| panic!("cannot get {kind} {namespace}/{name}: {error}"))
    }

    /// All objects of a kind, each a manifest.
    pub(crate) async fn list(&self, kind: &str) -> Vec<DynamicObject> {
        let client = self.client().await;
        let (resource, _) = kind_named(&client, kind).await;
        let all = Api::<DynamicObject>::all_with(client, &resource)
            .list(&ListParams::default())
            .await
            .unwrap_or_else(|error| panic!("cannot list {kind}: {error}"));
        // Items of a list do not say what they are.
        let types = TypeMeta { api_version: resource.api_version, kind: resource.kind };
        let named = |object| DynamicObject { types: Some(types.clone()), ..object };
        all.items.into_iter().map(named).collect()
    }

    /// Which version the server at another address of this control plane says it has.
    pub(crate) async fn version_at(&self, server: &str) -> Result<String, Box<dyn Error>> {
        let mut kubeconfig = self.kubeconfig_of(User::Admin);
        kubeconfig["clusters"][0]["cluster"]["server"] = json!(server);
        let client = client_by(kubeconfig).await?;
        Ok(client.apiserver_version().await?.git_version)
    }

    fn kubeconfig_of(&self, user: User) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "test", "cluster": {
                "server": format!("https://{}", self.address),
                "certificate-authority": self.certificate(),
            }}],
            "users": [{ "name": "test", "user": { "token": user.token() } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
            "current-context": "test",
        })
    }

    /// A new client of a user. It belongs to the runtime in which it is made.
    pub(crate) async fn client_of(&self, user: User) -> Result<Client, Box<dyn Error>> {
        client_by(self.kubeconfig_of(user)).await
    }

    async fn ready(&mut self, address: SocketAddr) -> Result<(), String> {
        let mut last_error = String::new();
        let ready = async {
            loop {
                match self.answer(address).await {
                    Ok(()) => return Ok(()),
                    Err(error) => last_error = error.to_string(),
                }
                for process in
                    self.apiserver.iter_mut().chain(&mut self.another).chain(&mut self.etcd)
                {
                    if let Ok(Some(status)) = process.child.try_wait() {
                        return Err(format!("{status}, log {}", process.log.display()));
                    }
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(READY_WITHIN, ready)
            .await
            .unwrap_or_else(|_| Err(format!("not ready within {READY_WITHIN:?}: {last_error}")))
    }

    /// Asks for what may come last: the server does not wait for its own Service to say that it is
    /// ready, but only with that one are there a namespace `default` and ClusterIPs for others.
    async fn answer(&self, address: SocketAddr) -> Result<(), Box<dyn Error>> {
        let mut kubeconfig = self.kubeconfig_of(User::Admin);
        kubeconfig["clusters"][0]["cluster"]["server"] = json!(format!("https://{address}"));
        let client = client_by(kubeconfig).await?;
        client.request_text(Request::new("").get("readyz", &GetParams::default())?).await?;
        Api::<Service>::namespaced(client, "default").get("kubernetes").await?;
        Ok(())
    }
}

/// A child that ends with its owner, and with the test process in whatever way that one ends.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
    /// The thread that started the child ends when this is dropped.
    _starter: mpsc::Sender<()>,
}

impl Process {
    fn start(program: &str, folder: &Path, arguments: &[&str]) -> Self {
        let path = find(program).unwrap_or_else(|reason| panic!("no {program}: {reason}"));
        let log = folder.join(format!("{program}.log"));
        let file = File::options().create(true).append(true).open(&log).expect(WRITABLE);
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(path).args(arguments);
        let same_file = file.try_clone().expect("there are file descriptors left");
        command.stdin(Stdio::null()).stdout(file).stderr(same_file);
        // The kernel sends that signal when the *thread* that started the child ends, and a test's
        // thread may end before others are done with the control plane. So it is one that lives as
        // long as the child. Being started here it is in the caller's network namespace.
        let (to_owner, child) = mpsc::channel();
        let (starter, ended) = mpsc::channel();
        std::thread::spawn(move || {
            let _ = to_owner.send(command.spawn());
            let _ = ended.recv();
        });
        let child = child.recv().expect("the thread sends").unwrap_or_else(|error| {
            panic!("cannot start {program} by setpriv (package util-linux): {error}")
        });
        Self { child, log, _starter: starter }
    }

    fn end_of_log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(30)..].join("\n");
        format!("--- {}\n{end}\n", self.log.display())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Either fails only if it has ended before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the server knows, with the group, the plural and the scope of every kind.
async fn kinds(client: &Client) -> Discovery {
    Discovery::new(client.clone()).run_aggregated().await.expect("the server lists its kinds")
}

async fn kind_named(client: &Client, kind: &str) -> (ApiResource, ApiCapabilities) {
    let kinds = kinds(client).await;
    // The core group, which has no name, is the first.
    let mut found = kinds.groups_alphabetical().into_iter();
    let found = found.find_map(|group| group.recommended_kind(kind));
    found.unwrap_or_else(|| panic!("the server has no {kind}"))
}

async fn client_by(kubeconfig: Value) -> Result<Client, Box<dyn Error>> {
    let kubeconfig: Kubeconfig = serde_json::from_value(kubeconfig)?;
    let options = KubeConfigOptions::default();
    Ok(Client::try_from(Config::from_custom_kubeconfig(kubeconfig, &options).await?)?)
}

fn api(
    client: &Client,
    (resource, capabilities): &(ApiResource, ApiCapabilities),
    namespace: Option<&str>,
) -> Api<DynamicObject> {
    let (client, namespace) = (client.clone(), namespace.unwrap_or("default"));
    match capabilities.scope {
        Scope::Cluster => Api::all_with(client, resource),
        Scope::Namespaced => Api::namespaced_with(client, namespace, resource),
    }
}

/// Finds one of the programs that `tests/control-plane/build` makes, or says how to make it.
pub(crate) fn find(program: &str) -> Result<PathBuf, String> {
    let provided = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let built = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("control-plane").join("bin");
    let places: Vec<_> =
        provided.into_iter().chain([built]).map(|folder| folder.join(program)).collect();
    places.iter().find(|path| path.exists()).cloned().ok_or_else(|| {
        format!("there is none of {places:?}; run `tests/control-plane/build {program}`")
    })
}

/// The key that signs service accounts' tokens, and the tokens of [`User::ALL`].
fn write_credentials(folder: &Path) {
    let key = Command::new("openssl")
        .args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"])
        .arg(folder.join("service-account.key"))
        .output()
        .expect("openssl is installed");
    assert!(key.status.success(), "openssl: {}", String::from_utf8_lossy(&key.stderr));
    let line = |user: User| {
        let (name, groups) = user.name_and_groups();
        format!("{},{name},{user:?},\"{groups}\"\n", user.token())
    };
    fs::write(folder.join("tokens.csv"), User::ALL.map(line).concat()).expect(WRITABLE);
}

/// Ports that nobody listens on at these addresses. Nothing keeps them free until they are used; that
/// the kernel gives just these to somebody else meanwhile is unlikely.
fn free_ports<const N: usize>(addresses: [IpAddr; N]) -> [u16; N] {
    let listeners = addresses.map(|ip| {
        TcpListener::bind((ip, 0)).unwrap_or_else(|error| panic!("cannot listen on {ip}: {error}"))
    });
    listeners.map(|listener| listener.local_addr().expect("a listener has an address").port())
}
