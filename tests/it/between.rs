//! A server between the program and the API server, which spoils what it passes on: answers with
//! errors, cuts streams, delays, doubles and reorders events, and says things that are no events.
//!
//! It speaks HTTP without TLS to the program, so that it can tell events apart, and asks the real
//! server as the user it stands for.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::{Request, Response};
use http_body_util::channel::{Channel, Sender};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Collected, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::broadcast;

use crate::control_plane::{ControlPlane, User};
use crate::e2e::eventually;
use crate::net::enter;

/// What the program watches.
const KINDS: usize = 4;

type Out = BoxBody<Bytes, std::io::Error>;

/// What is done to what passes. Resources are named as in a URL; the empty name stands for all.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    /// Requests for these are answered with a code.
    pub(crate) refuse: Vec<(&'static str, u16)>,
    /// Lists of these are empty.
    pub(crate) empty: Vec<&'static str>,
    /// How long each event is held back.
    pub(crate) delay: Duration,
    /// Each event comes twice.
    pub(crate) double: bool,
    /// An event changes places with the next one, if that is about another object.
    pub(crate) reorder: bool,
}

/// What is done to all open streams at once.
#[derive(Clone, Debug)]
pub(crate) enum Blow {
    /// They end.
    End,
    /// They break off within the next event.
    BreakInside,
    /// They say that they are too far behind, and end.
    Gone,
    /// They say this on a line of its own.
    Say(String),
}

/// The server.
pub(crate) struct Between {
    pub(crate) url: String,
    faults: Arc<Mutex<Faults>>,
    blows: broadcast::Sender<Blow>,
}

impl Between {
    /// Starts it at an address of a namespace; it stands for a user.
    pub(crate) fn start(netns: &str, at: IpAddr, plane: &ControlPlane, user: User) -> Self {
        let faults = Arc::new(Mutex::new(Faults::default()));
        let (blows, _) = broadcast::channel(16);
        let (to_us, address) = std::sync::mpsc::channel();
        let kubeconfig = plane.kubeconfig(user);
        let (netns, theirs) = (netns.to_owned(), (faults.clone(), blows.clone()));
        std::thread::spawn(move || {
            enter(&netns);
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let client = nftproxy::watch::api::client(Some(&kubeconfig), None).await.unwrap();
                let listener = TcpListener::bind(SocketAddr::new(at, 0)).await.unwrap();
                to_us.send(listener.local_addr().unwrap()).unwrap();
                // It ends with the test process.
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let (client, theirs) = (client.clone(), theirs.clone());
                    tokio::spawn(async move {
                        let service = service_fn(move |request| {
                            let (client, (faults, blows)) = (client.clone(), theirs.clone());
                            async move {
                                Ok::<_, Infallible>(pass(client, faults, &blows, request).await)
                            }
                        });
                        let http = hyper::server::conn::http1::Builder::new();
                        // A stream that breaks off is an error here.
                        drop(http.serve_connection(TokioIo::new(stream), service).await);
                    });
                }
            });
        });
        let address: SocketAddr = address.recv().expect("it listens");
        Self { url: format!("http://{address}"), faults, blows }
    }

    /// From now on, this is done.
    pub(crate) fn set(&self, faults: Faults) {
        *self.faults.lock().unwrap() = faults;
    }

    /// Does this to the streams of all kinds, when they are open.
    pub(crate) fn strike(&self, blow: Blow) {
        self.all_open();
        self.blows.send(blow).expect("there are receivers");
    }

    /// The same, and from now on this is done.
    pub(crate) fn strike_and_set(&self, blow: Blow, faults: Faults) {
        self.all_open();
        self.set(faults);
        self.blows.send(blow).expect("there are receivers");
    }

    fn all_open(&self) {
        eventually("all kinds to be watched", || match self.blows.receiver_count() {
            0..KINDS => Err("too few are".to_owned()),
            _ => Ok(()),
        });
        // The program asks ever more rarely for streams that last less than a second.
        std::thread::sleep(Duration::from_millis(1200));
    }
}

fn text(code: u16, body: String) -> Response<Out> {
    let body = Full::new(Bytes::from(body)).map_err(|never| match never {}).boxed();
    Response::builder().status(code).header("content-type", "application/json").body(body).unwrap()
}

fn status(code: u16, reason: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "made up by the test", "reason": reason, "code": code,
    })
}

async fn pass(
    client: Client,
    faults: Arc<Mutex<Faults>>,
    blows: &broadcast::Sender<Blow>,
    request: Request<Incoming>,
) -> Response<Out> {
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let present = faults.lock().unwrap().clone();
    let concerned = |resource: &str| path.ends_with(resource);
    if let Some((_, code)) = present.refuse.iter().find(|(resource, _)| concerned(resource)) {
        return text(*code, status(*code, "Made up").to_string());
    }
    let (mut head, body) = request.into_parts();
    for name in [AUTHORIZATION, CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING] {
        head.headers.remove(name);
    }
    head.uri = head.uri.path_and_query().unwrap().as_str().parse().unwrap();
    let body = body.collect().await.map(Collected::to_bytes).unwrap_or_default();
    let request = Request::from_parts(head, Body::from(body.to_vec()));
    let Ok(answer) = client.send(request).await else {
        return text(503, status(503, "ServiceUnavailable").to_string());
    };
    let (head, body) = answer.into_parts();
    if !query.contains("watch=true") || head.status != 200 {
        let body = body.collect().await.map(Collected::to_bytes).unwrap_or_default();
        return text(head.status.as_u16(), String::from_utf8_lossy(&body).into_owned());
    }
    let (sender, receiver) = Channel::new(1);
    let empty = present.empty.iter().any(|resource| concerned(resource));
    let stream = Stream { sender, faults, empty, held: None, breaks: false };
    tokio::spawn(stream.run(body, blows.subscribe()));
    Response::builder()
        .status(200)
        .header("content-type", "application/json")
        .body(receiver.boxed())
        .unwrap()
}

/// The events of one watch on their way.
struct Stream {
    sender: Sender<Bytes, std::io::Error>,
    faults: Arc<Mutex<Faults>>,
    /// Nothing is listed.
    empty: bool,
    /// An event that waits for the next one.
    held: Option<String>,
    /// The next event breaks off.
    breaks: bool,
}

/// The stream is over.
struct Over;

impl Stream {
    async fn run(mut self, mut body: Body, mut blows: broadcast::Receiver<Blow>) {
        let mut bytes = Vec::new();
        let outcome = loop {
            let held = self.held.is_some();
            let step = tokio::select! {
                frame = body.frame() => match frame {
                    Some(Ok(frame)) => {
                        bytes.extend(frame.into_data().unwrap_or_default());
                        self.lines(&mut bytes).await
                    }
                    _ => Err(Over),
                },
                Ok(blow) = blows.recv() => self.meet(blow).await,
                () = tokio::time::sleep(Duration::from_millis(300)), if held => {
                    self.release().await
                }
            };
            if step.is_err() {
                break self;
            }
        };
        if outcome.breaks {
            outcome.sender.abort(std::io::Error::other("broken off"));
        }
    }

    async fn lines(&mut self, bytes: &mut Vec<u8>) -> Result<(), Over> {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = bytes.drain(..=end).collect();
            self.event(String::from_utf8(line).expect("the server sends UTF-8")).await?;
        }
        Ok(())
    }

    async fn event(&mut self, line: String) -> Result<(), Over> {
        let event: Value = serde_json::from_str(&line).expect("the server sends JSON");
        let bookmark = event["type"] == "BOOKMARK";
        if self.empty {
            // The first bookmark ends the list.
            if !bookmark {
                return Ok(());
            }
            self.empty = false;
        }
        let faults = self.faults.lock().unwrap().clone();
        tokio::time::sleep(faults.delay).await;
        if self.breaks {
            let half: String = line.chars().take(line.len() / 2).collect();
            self.write(half).await?;
            return Err(Over);
        }
        let name = |event: &Value| event["object"]["metadata"]["name"].clone();
        match self.held.take() {
            Some(held) => {
                let first: Value = serde_json::from_str(&held).unwrap();
                if bookmark || name(&first) == name(&event) {
                    self.write(held).await?;
                    self.write(line.clone()).await?;
                } else {
                    self.write(line.clone()).await?;
                    self.write(held).await?;
                }
            }
            None if faults.reorder && !bookmark => {
                self.held = Some(line);
                return Ok(());
            }
            None => self.write(line.clone()).await?,
        }
        if faults.double {
            self.write(line).await?;
        }
        Ok(())
    }

    async fn release(&mut self) -> Result<(), Over> {
        match self.held.take() {
            Some(line) => self.write(line).await,
            None => Ok(()),
        }
    }

    async fn meet(&mut self, blow: Blow) -> Result<(), Over> {
        match blow {
            Blow::End => Err(Over),
            Blow::BreakInside => {
                self.breaks = true;
                Ok(())
            }
            Blow::Gone => {
                let event = json!({ "type": "ERROR", "object": status(410, "Expired") });
                self.write(format!("{event}\n")).await?;
                Err(Over)
            }
            Blow::Say(line) => self.write(format!("{line}\n")).await,
        }
    }

    async fn write(&mut self, text: String) -> Result<(), Over> {
        self.sender.send_data(Bytes::from(text)).await.map_err(|_| Over)
    }
}
