//! An API server that answers what the test tells it to, and a log to read.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::channel::{Channel, Sender};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::watch::api::place::Line;

type Answer = Result<Response<Channel<Bytes, io::Error>>, io::Error>;

/// The requests of one client, in their order.
pub(super) struct Server {
    requests: mpsc::UnboundedReceiver<Asked>,
    connection: Connection,
}

/// The number of the connection on which answers come.
#[derive(Clone, Default)]
struct Connection(Arc<AtomicU16>);

impl Connection {
    fn is_lost(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn line(&self) -> Line {
        Line(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), self.0.load(Ordering::Relaxed)))
    }
}

/// A request that waits for its answer.
pub(super) struct Asked {
    pub(super) uri: String,
    answer: oneshot::Sender<Answer>,
    connection: Connection,
}

/// The body of an answer that goes on.
pub(super) struct Stream(Sender<Bytes, io::Error>, Connection);

/// A client, and the server it talks to.
pub(super) fn server() -> (Client, Server) {
    let (sender, requests) = mpsc::unbounded_channel();
    let connection = Connection::default();
    let its = connection.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        let (answer, answered) = oneshot::channel();
        let uri = request.uri().to_string();
        let sent = sender.send(Asked { uri, answer, connection: its.clone() });
        async move {
            let gone = || io::Error::new(io::ErrorKind::ConnectionRefused, "connection refused");
            sent.map_err(|_| gone())?;
            answered.await.map_err(|_| gone())?
        }
    });
    (Client::new(service, "default"), Server { requests, connection })
}

impl Server {
    /// The next request; there must be one within half an hour.
    pub(super) async fn asked(&mut self) -> Asked {
        let asked = timeout(Duration::from_secs(1800), self.requests.recv()).await;
        asked.expect("a request").expect("a client")
    }

    /// The next request, which must be one for a list as a stream.
    pub(super) async fn asked_for_stream(&mut self) -> Asked {
        let asked = self.asked().await;
        assert!(asked.says("watch=true") && asked.says("sendInitialEvents=true"), "{}", asked.uri);
        asked
    }

    /// The next request, which must be one for changes after a version.
    pub(super) async fn asked_for_changes(&mut self, version: u32) -> Asked {
        let asked = self.asked().await;
        assert!(asked.says("watch=true") && !asked.says("sendInitialEvents"), "{}", asked.uri);
        assert!(asked.says(&format!("resourceVersion={version}")), "{}", asked.uri);
        asked
    }

    /// The next request, which must be one for an ordinary list.
    pub(super) async fn asked_for_list(&mut self) -> Asked {
        let asked = self.asked().await;
        assert!(!asked.says("watch=true"), "{}", asked.uri);
        asked
    }

    /// What comes from now on comes on another connection.
    pub(super) fn is_connected_to_again(&self) {
        self.connection.is_lost();
    }

    /// Asserts that there is no request for so long.
    pub(super) async fn is_left_alone(&mut self, for_so_long: Duration) {
        if let Ok(Some(asked)) = timeout(for_so_long, self.requests.recv()).await {
            panic!("asked for {}", asked.uri);
        }
    }
}

impl Asked {
    /// Whether the query has this parameter.
    pub(super) fn says(&self, parameter: &str) -> bool {
        let query = self.uri.split_once('?').map_or("", |(_, query)| query);
        query.split('&').any(|said| said == parameter || said.starts_with(&format!("{parameter}=")))
    }

    fn answer(self, code: u16) -> Stream {
        let (sender, body) = Channel::new(1024);
        let mut response = Response::builder().status(code).body(body).unwrap();
        response.extensions_mut().insert(self.connection.line());
        self.answer.send(Ok(response)).expect("the client waits");
        Stream(sender, self.connection)
    }

    /// Begins an answer that goes on.
    pub(super) fn begin(self) -> Stream {
        self.answer(200)
    }

    /// Answers with an error.
    pub(super) fn refuse(self, code: u16, message: &str) {
        self.answer(code).text(&status(code, message));
    }

    /// Answers with a whole list.
    pub(super) fn list(self, version: u32, items: &[Value]) {
        let metadata = json!({ "resourceVersion": version.to_string() });
        self.answer(200).text(&json!({ "metadata": metadata, "items": items }));
    }

    /// Does not answer at all.
    pub(super) fn reset(self) {
        self.connection.is_lost();
        let error = io::Error::new(io::ErrorKind::ConnectionReset, "connection reset by peer");
        self.answer.send(Err(error)).expect("the client waits");
    }
}

impl Stream {
    pub(super) fn text(&mut self, value: &Value) {
        let line = Bytes::from(format!("{value}\n"));
        self.0.try_send(Frame::data(line)).expect("the client reads");
    }

    pub(super) fn event(&mut self, what: &str, object: &Value) {
        self.text(&json!({ "type": what, "object": object }));
    }

    /// Says that the list is complete.
    pub(super) fn complete(&mut self, version: u32) {
        let metadata = json!({
            "resourceVersion": version.to_string(),
            "annotations": { "k8s.io/initial-events-end": "true" },
        });
        self.event("BOOKMARK", &json!({ "kind": "X", "apiVersion": "v1", "metadata": metadata }));
    }

    /// Says how far the server has come.
    pub(super) fn bookmark(&mut self, version: u32) {
        let metadata = json!({ "resourceVersion": version.to_string() });
        self.event("BOOKMARK", &json!({ "kind": "X", "apiVersion": "v1", "metadata": metadata }));
    }

    /// Breaks off, as a connection does.
    pub(super) fn break_off(self) {
        self.1.is_lost();
        self.0.abort(io::Error::new(io::ErrorKind::ConnectionReset, "connection reset by peer"));
    }
}

/// A `Status` object.
pub(super) fn status(code: u16, message: &str) -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
            "reason": "", "message": message })
}

/// What was logged on this thread.
#[derive(Clone, Default)]
pub(super) struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// Collects what this thread logs from now on, from `info` upwards.
    pub(super) fn start() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter("off,nftproxy=info")
            .with_ansi(false)
            .without_time()
            .with_writer(move || writer.clone());
        (log, tracing::subscriber::set_default(subscriber.finish()))
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// How many lines hold these words.
    pub(super) fn count(&self, words: &str) -> usize {
        self.text().lines().filter(|line| line.contains(words)).count()
    }
}
