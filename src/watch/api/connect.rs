//! The client of the API server: with whose credentials, how patient, and what is noted of every
//! answer.
//!
//! `kube`'s watcher says nothing when a watch is established again, and asks again at once when a
//! server ends one. Both are made up for below it, where every request passes.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt as _;
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::runtime::utils::Backoff as _;
use kube::runtime::watcher::DefaultBackoff;
use kube::{Client, Config};
use thiserror::Error;
use tokio::time::{Instant, timeout};
use tower::{BoxError, ServiceBuilder};

use super::beat::OnBeat;
use super::outage::{Report, locked};
use super::place::{Place, is_watch};
use super::protobuf::{AtOnce, in_protobuf};
use crate::metrics::RestClient;
use crate::watch::convert::{one_line, shown};

/// A watch that a server ends sooner than this after granting it is begun again with growing pauses.
const SHORT: Duration = Duration::from_secs(1);

/// How long the beginning of an answer is waited for: a server gives up after a minute.
const ANSWERS_WITHIN: Duration = Duration::from_secs(75);

/// Credentials that are not believed are read again no more often than this.
const RENEW_EVERY: Duration = Duration::from_secs(5);

/// How often a connection in use is asked for a sign of life: a watch may have nothing to say for long, and
/// balancers cut what is silent for 20 s.
const ASKED_EVERY: Duration = Duration::from_secs(14);

/// How long that is waited for. It is longer, by which [`OnBeat`] tells the two.
const GIVEN_WITHIN: Duration = Duration::from_secs(16);

/// So much of an answer can be under way or wait here. A server that has to wait with a list is rid of it after a
/// minute, whole or not, and a node that is busy may take longer to read it.
const WINDOW: u32 = 32 << 20;

/// Why there is no client for the API server.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Neither a kubeconfig nor a master was given, and this is no pod with a service account.
    #[error(
        "no API server is given, and this is no pod with a service account ({0}): give --kubeconfig FILE, \
         --master URL, or --manifests PATH"
    )]
    InCluster(#[source] InClusterError),
    /// The kubeconfig could not be read.
    #[error("cannot read the kubeconfig {}: {}", path.display(), reason(source))]
    ReadKubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<KubeconfigError>,
    },
    /// The kubeconfig names something that is not there.
    #[error("cannot use the kubeconfig {}: {}", path.display(), reason(source))]
    UseKubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<KubeconfigError>,
    },
    /// The master is no URL of a server.
    #[error("the master {master} is not a URL like https://10.0.0.1:6443: {reason}")]
    Master {
        /// As given.
        master: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificates, keys or tokens could not be loaded.
    #[error("cannot set up the client of the API server: {0}")]
    Build(#[source] Box<kube::Error>),
}

impl From<kube::Error> for ClientError {
    fn from(error: kube::Error) -> Self {
        Self::Build(Box::new(error))
    }
}

/// A client of the API server: by the kubeconfig, at the master, or with the pod's service account
/// when neither is given. The master overrides the server of the kubeconfig.
pub async fn client(
    kubeconfig: Option<&Path>,
    master: Option<&str>,
) -> Result<Client, ClientError> {
    let config = config(kubeconfig, master).await?;
    Way::new(&config)?.client(&config)
}

/// So many of them, with every request counted, and with credentials that are read again when the server
/// does not believe them. None uses a connection of another.
pub async fn measured_clients<const N: usize>(
    kubeconfig: Option<&Path>,
    master: Option<&str>,
    metrics: RestClient,
) -> Result<[Client; N], ClientError> {
    let config = config(kubeconfig, master).await?;
    let host: Arc<str> = config.cluster_url.authority().map_or("", |host| host.as_str()).into();
    let way = Way::new(&config)?;
    let mut clients = Vec::with_capacity(N);
    for _ in 0..N {
        let renewable = Renewable {
            kubeconfig: kubeconfig.map(Path::to_owned),
            master: master.map(str::to_owned),
            client: Mutex::new((way.client(&config)?, None)),
        };
        clients.push(measured(renewable, host.clone(), metrics.clone()));
    }
    Ok(clients.try_into().unwrap_or_else(|_| unreachable!("as many as were made")))
}

fn measured(renewable: Renewable, host: Arc<str>, metrics: RestClient) -> Client {
    let namespace = renewable.client().default_namespace().to_owned();
    let renewable = Arc::new(renewable);
    let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
        let (renewable, metrics, host) = (renewable.clone(), metrics.clone(), host.clone());
        async move {
            let (method, began) = (request.method().clone(), Instant::now());
            let client = renewable.client();
            let answer = client.send(request).await;
            let code = answer.as_ref().ok().map(|response| response.status().as_u16());
            metrics.observe(method.as_str(), &host, code, began.elapsed());
            if code == Some(401) {
                renewable.renew().await;
            }
            answer
        }
    });
    Client::new(service, namespace)
}

/// A client that can be made anew from its files. `kube` reads a token's file again once a minute of the
/// wall clock, which may be set back by hours: by then, the token it knows would long have expired.
struct Renewable {
    kubeconfig: Option<PathBuf>,
    master: Option<String>,
    /// And when it was last made anew.
    client: Mutex<(Client, Option<Instant>)>,
}

impl Renewable {
    fn client(&self) -> Client {
        locked(&self.client).0.clone()
    }

    /// For the next request.
    async fn renew(&self) {
        let now = Instant::now();
        {
            let mut held = locked(&self.client);
            if held.1.is_some_and(|last| now < last + RENEW_EVERY) {
                return;
            }
            held.1 = Some(now);
        }
        match client(self.kubeconfig.as_deref(), self.master.as_deref()).await {
            Ok(client) => locked(&self.client).0 = client,
            Err(error) => tracing::debug!(%error, "the credentials cannot be read again"),
        }
    }
}

/// How clients reach the server. What is believed of it is read once for all of them: where the kubeconfig
/// names no authority, these are the certificates of the system, some hundred files.
enum Way {
    Direct(TimeoutConnector<HttpsConnector<HttpConnector>>),
    /// `kube` knows what a client is built with that goes by a proxy.
    Proxy,
}

impl Way {
    fn new(config: &Config) -> Result<Self, ClientError> {
        match &config.proxy_url {
            None => Ok(Self::Direct(connector(config)?)),
            Some(_) => Ok(Self::Proxy),
        }
    }

    fn client(&self, config: &Config) -> Result<Client, ClientError> {
        let client = match self {
            Self::Direct(connector) => direct(config, connector.clone()),
            Self::Proxy => Client::try_from(config.clone()),
        };
        Ok(in_protobuf(client?))
    }
}

fn connector(config: &Config) -> kube::Result<TimeoutConnector<HttpsConnector<HttpConnector>>> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    let mut tls = HttpsConnectorBuilder::new()
        .with_tls_config(config.rustls_client_config()?)
        .https_or_http();
    if let Some(name) = config.tls_server_name.clone() {
        let name = name.try_into().map_err(|error| kube::Error::Service(Box::new(error)))?;
        tls = tls.with_server_name_resolver(FixedServerNameResolver::new(name));
    }
    let mut connector = TimeoutConnector::new(tls.enable_all_versions().wrap_connector(tcp));
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    connector.set_reset_reader_on_write(config.reset_reader_on_write);
    Ok(connector)
}

/// As `kube` makes a client, but of a connection that is asked for a sign of life, for which it takes HTTP/2.
fn direct(
    config: &Config,
    connector: TimeoutConnector<HttpsConnector<HttpConnector>>,
) -> kube::Result<Client> {
    let http = legacy::Client::builder(TokioExecutor::new())
        .timer(OnBeat::new(ASKED_EVERY))
        .http2_keep_alive_interval(ASKED_EVERY)
        .http2_keep_alive_timeout(GIVEN_WITHIN)
        .http2_initial_stream_window_size(WINDOW)
        .http2_initial_connection_window_size(WINDOW)
        .build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace.clone()))
}

async fn config(kubeconfig: Option<&Path>, master: Option<&str>) -> Result<Config, ClientError> {
    let mut config = match (kubeconfig, master) {
        (None, None) => Config::incluster().map_err(ClientError::InCluster)?,
        (None, Some(master)) => Config::new(server(master)?),
        (Some(path), master) => {
            let read = Kubeconfig::read_from(path).map_err(|source| {
                ClientError::ReadKubeconfig { path: path.to_owned(), source: Box::new(source) }
            })?;
            let options = KubeConfigOptions::default();
            let mut config =
                Config::from_custom_kubeconfig(read, &options).await.map_err(|source| {
                    ClientError::UseKubeconfig { path: path.to_owned(), source: Box::new(source) }
                })?;
            if let Some(master) = master {
                config.cluster_url = server(master)?;
            }
            config
        }
    };
    config.connect_timeout = Some(Duration::from_secs(10));
    config.write_timeout = Some(Duration::from_secs(30));
    // For lists where there is no sign of life, by HTTP/1. A server may have nothing to say in a watch of a
    // kind that does not change, not even a bookmark before its database tells it of progress, which may be
    // every ten minutes: the time that a watch is asked for is shorter than this.
    config.read_timeout = Some(Duration::from_secs(360));
    config.reset_reader_on_write = true;
    // The client's own retries go on for minutes without a word; the watch loop has its own.
    config.default_retry = false;
    Ok(config)
}

/// Whether a kubeconfig has users whose credentials a program tells. So it is taken of one that cannot be
/// read.
#[must_use]
pub fn starts_programs(kubeconfig: &Path) -> bool {
    Kubeconfig::read_from(kubeconfig).map_or(true, |kubeconfig| {
        let mut users = kubeconfig.auth_infos.iter().filter_map(|user| user.auth_info.as_ref());
        users.any(|user| user.exec.is_some() || user.auth_provider.is_some())
    })
}

/// Without the excerpt of the file that the parser adds: a kubeconfig holds secrets, and the log is
/// one line.
fn reason(error: &KubeconfigError) -> String {
    match error {
        KubeconfigError::ReadConfig(error, _) => error.to_string(),
        error => one_line(error.to_string().lines().next().unwrap_or_default()),
    }
}

/// The URL of a server, complete enough to connect to.
fn server<U>(master: &str) -> Result<U, ClientError>
where
    U: std::str::FromStr,
    U::Err: std::fmt::Display,
{
    let refused = |reason: String| ClientError::Master { master: shown(master), reason };
    if !master.starts_with("https://") && !master.starts_with("http://") {
        return Err(refused("it has no scheme".to_owned()));
    }
    master.parse().map_err(|error: U::Err| refused(error.to_string()))
}

/// A client that tells the report of every answer, does not ask again at once for a watch that the server
/// keeps ending, and does not go on where the server does not know the place.
pub(super) fn observed(client: Client, report: Arc<Report>, place: Arc<Place>) -> Client {
    let namespace = client.default_namespace().to_owned();
    let brake = Arc::new(Pace::default());
    let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
        let (client, report, brake, place) =
            (client.clone(), report.clone(), brake.clone(), place.clone());
        async move {
            let watch = is_watch(request.uri());
            if watch && let Some(pause) = brake.pause() {
                tokio::time::sleep(pause).await;
            }
            let answer = timeout(ANSWERS_WITHIN, place.ask(report.kind(), &client, request)).await;
            let answer = answer.unwrap_or_else(|late| Err(kube::Error::Service(late.into())));
            if let Ok(response) = &answer {
                let good = response.status().is_success();
                // A list at once ends when all of it is told.
                if watch && good && response.extensions().get::<AtOnce>().is_none() {
                    brake.granted();
                }
                report.answered(good);
            }
            answer
        }
    });
    Client::new(service, namespace)
}

/// When the watch of a kind was last granted.
#[derive(Default)]
struct Pace(Mutex<(DefaultBackoff, Option<Instant>)>);

impl Pace {
    fn granted(&self) {
        locked(&self.0).1 = Some(Instant::now());
    }

    /// How long to wait before the next watch.
    fn pause(&self) -> Option<Duration> {
        let mut guard = locked(&self.0);
        let (backoff, granted) = &mut *guard;
        match granted.take() {
            Some(granted) if granted.elapsed() < SHORT => backoff.next(),
            Some(_) => {
                backoff.reset();
                None
            }
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use super::*;
    use crate::metrics::Metrics;
    use k8s_openapi::api::core::v1::Service;
    use kube::Api;

    /// An API server that believes one token.
    fn server(believed: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let (mut request, mut byte) = (Vec::new(), [0]);
                while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() > 0 {
                    request.extend(byte);
                }
                let token = format!("Bearer {believed}\r\n");
                let (status, body) = if String::from_utf8(request).unwrap().contains(&token) {
                    ("200 OK", r#"{ "metadata": {}, "items": [] }"#)
                } else {
                    ("401 Unauthorized", r#"{ "status": "Failure", "code": 401 }"#)
                };
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
                     connection: close\r\n\r\n{body}"
                );
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        format!("http://{address}")
    }

    #[tokio::test]
    async fn a_token_that_is_not_believed_is_read_again_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (kubeconfig, token) = (dir.path().join("kubeconfig"), dir.path().join("token"));
        let text = serde_json::json!({
            "clusters": [{ "name": "c", "cluster": { "server": server("new") } }],
            "users": [{ "name": "u", "user": { "tokenFile": token } }],
            "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
            "current-context": "x",
        });
        fs::write(&kubeconfig, text.to_string()).unwrap();
        fs::write(&token, "old").unwrap();
        let metrics = Metrics::default().rest_client;
        let [client] = measured_clients(Some(&kubeconfig), None, metrics).await.unwrap();
        let services = Api::<Service>::all(client);
        fs::write(&token, "new").unwrap();
        let refused = services.list(&kube::api::ListParams::default()).await.unwrap_err();
        assert!(matches!(refused, kube::Error::Api(status) if status.code == 401));
        services.list(&kube::api::ListParams::default()).await.unwrap();
    }

    #[tokio::test]
    async fn a_kubeconfig_that_cannot_be_used_is_named_in_one_line_without_its_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        let said = async || {
            let refused = client(Some(&path), None).await.err().expect("it cannot be used");
            let text = refused.to_string();
            assert!(!text.contains('\n') && !text.contains("sesame"), "{text}");
            text
        };
        let name = path.display().to_string();
        let text = said().await;
        assert!(text.contains(&name) && text.contains("No such file"), "{text}");
        let users = "users: [{ name: u, user: { token: sesame } }]\n";
        std::fs::write(&path, format!("{users}clusters: [\n")).unwrap();
        let text = said().await;
        assert!(text.contains(&name) && text.contains("line 2"), "{text}");
        std::fs::write(&path, format!("{users}current-context: gone\n")).unwrap();
        let text = said().await;
        assert!(text.contains(&name) && text.contains("gone"), "{text}");
    }

    #[tokio::test]
    async fn a_master_that_is_no_url_is_refused() {
        for (master, fault) in
            [("10.0.0.1:6443", "no scheme"), ("https://", ""), ("http://a b", "")]
        {
            let refused = client(None, Some(master)).await.err().expect("it is no URL").to_string();
            assert!(refused.contains(master) && refused.contains(fault), "{refused}");
        }
    }
}
