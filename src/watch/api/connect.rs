//! The client of the API server: with whose credentials, how patient, and what is noted of every
//! answer.
//!
//! `kube`'s watcher says nothing when a watch is established again, and asks again at once when a
//! server ends one. Both are made up for below it, where every request passes.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::runtime::utils::Backoff as _;
use kube::runtime::watcher::DefaultBackoff;
use kube::{Client, Config};
use thiserror::Error;
use tokio::time::Instant;

use super::outage::{Report, locked};
use crate::metrics::RestClient;
use crate::watch::convert::{one_line, shown};

/// A watch that a server ends sooner than this after granting it is begun again with growing pauses.
const SHORT: Duration = Duration::from_secs(1);

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

/// A client of the API server: by the kubeconfig, at the master, or with the pod's service account
/// when neither is given. The master overrides the server of the kubeconfig.
pub async fn client(
    kubeconfig: Option<&Path>,
    master: Option<&str>,
) -> Result<Client, ClientError> {
    client_for(config(kubeconfig, master).await?)
}

/// The same, with every request counted.
pub async fn measured_client(
    kubeconfig: Option<&Path>,
    master: Option<&str>,
    metrics: RestClient,
) -> Result<Client, ClientError> {
    let config = config(kubeconfig, master).await?;
    let host: Arc<str> = config.cluster_url.authority().map_or("", |host| host.as_str()).into();
    let client = client_for(config)?;
    let namespace = client.default_namespace().to_owned();
    let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
        let (client, metrics, host) = (client.clone(), metrics.clone(), host.clone());
        async move {
            let (method, began) = (request.method().clone(), Instant::now());
            let answer = client.send(request).await;
            let code = answer.as_ref().ok().map(|response| response.status().as_u16());
            metrics.observe(method.as_str(), &host, code, began.elapsed());
            answer
        }
    });
    Ok(Client::new(service, namespace))
}

fn client_for(config: Config) -> Result<Client, ClientError> {
    Client::try_from(config).map_err(|error| ClientError::Build(Box::new(error)))
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
    // A quiet watch gets a bookmark every minute, so that two minutes of silence mean that the
    // other end is gone. Without this it takes the watcher five to find out.
    config.read_timeout = Some(Duration::from_secs(120));
    config.reset_reader_on_write = true;
    // The client's own retries go on for minutes without a word; the watch loop has its own.
    config.default_retry = false;
    Ok(config)
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

/// A client that tells the report of every answer, and does not ask again at once for a watch that
/// the server keeps ending.
pub(super) fn observed(client: Client, report: Arc<Report>) -> Client {
    let namespace = client.default_namespace().to_owned();
    let pace = Arc::new(Pace::default());
    let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
        let (client, report, pace) = (client.clone(), report.clone(), pace.clone());
        async move {
            let watch = request.uri().query().is_some_and(|query| query.contains("watch=true"));
            if watch && let Some(pause) = pace.pause() {
                tokio::time::sleep(pause).await;
            }
            let answer = client.send(request).await;
            if let Ok(response) = &answer {
                let good = response.status().is_success();
                if watch && good {
                    pace.granted();
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
