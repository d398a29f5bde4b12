//! The place where a watch goes on, and whether the server that answers still knows it.
//!
//! A server that was restored from a backup counts its versions from there again. It takes a place that
//! it has not come to yet, keeps silent until it has, and leaves out what happened up to there: the watch
//! seems to work, and what changed since the backup is never undone. No answer tells one history of the
//! data from another. An error in between is no certain sign (four kinds ask at different moments, and the
//! server may be back before any of them does), nor is the end of a stream (a server that stops in order
//! ends it as properly as one whose time is up), nor a version that runs backwards (a busy server is past
//! the place soon).
//!
//! What is certain: a connection leads to one process, and the data of a running API server is not
//! exchanged (all are to be stopped for a restore). So each kind has a client, and with it connections, of
//! its own, and goes on without a question only on the one it had. That costs nothing in the ordinary case:
//! a watch whose time is up ends, and the next is asked for on the same connection.
//!
//! On another connection it may be a different server with the same data, as when one of several is
//! started anew. To list everything there would be a heavy load: a third of all nodes would do so at once.
//! So the watch is begun one event earlier than needed. A server that then repeats the event that was last
//! seen, with its version and the identity of its object, has everything up to there in common with us, and
//! tells whatever comes behind it. One that does not, that is silent, or that no longer remembers so much,
//! is asked for everything, and so is one of a kind of which nothing happened since its list. (Balancers cut
//! what is silent, which would cost such a kind a list each time: therefore signs of life, in `connect`.)
//!
//! It cannot be seen through a proxy that speaks HTTP itself, and keeps our connection while the server
//! behind it is exchanged. That one tells by 502, 503 or 504 that nobody was there.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream;
use http::uri::PathAndQuery;
use http::{Request, Response, StatusCode, Uri};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, BodyStream, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper_util::client::legacy::connect::HttpInfo;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

use super::outage::locked;
use crate::model::Kind;

/// How long a server may take to repeat an event: as long as one waits itself until it has caught up with
/// a version it is asked for.
const REPEATS_WITHIN: Duration = Duration::from_secs(3);

/// What an answer holds.
pub(super) type Content = UnsyncBoxBody<Bytes, kube::Error>;

/// The connection on which an answer came, told from others by our end of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line(pub(super) SocketAddr);

impl Line {
    /// None of what does not say it: that is never the one it was.
    fn of<B>(answer: &Response<B>) -> Option<Self> {
        let said = answer.extensions();
        said.get::<Self>().copied().or_else(|| Some(Self(said.get::<HttpInfo>()?.local_addr())))
    }
}

/// An event, as far as it has to be known again.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    version: u64,
    uid: Option<String>,
    deleted: bool,
}

impl Seen {
    fn from_line(line: &[u8]) -> Option<Self> {
        let event: Value = serde_json::from_slice(line).ok()?;
        let metadata = event.pointer("/object/metadata")?;
        let text = |field: &str| metadata.get(field).and_then(Value::as_str);
        Some(Self {
            version: text("resourceVersion")?.parse().ok()?,
            uid: text("uid").map(str::to_owned),
            deleted: event.get("type")? == "DELETED",
        })
    }
}

/// Where the watch of one kind is.
#[derive(Debug, Default)]
pub(super) struct Place {
    /// Where the present list came, and all that followed.
    line: Mutex<Option<Line>>,
    /// The last event since that list.
    seen: Mutex<Option<Seen>>,
}

impl Place {
    /// An event came.
    pub(super) fn passed(&self, object: &ObjectMeta, deleted: bool) {
        let version = object.resource_version.as_ref().and_then(|version| version.parse().ok());
        let seen = version.map(|version| Seen { version, uid: object.uid.clone(), deleted });
        *locked(&self.seen) = seen;
    }

    /// Sends a request, and answers 410 in place of a server that does not know the place.
    pub(super) async fn ask(
        &self,
        kind: Kind,
        client: &Client,
        request: Request<Body>,
    ) -> kube::Result<Response<Content>> {
        let resumes = is_watch(request.uri()) && !streams_list(request.uri());
        let (parts, body) = request.into_parts();
        let again = parts.clone();
        let answer = client.send(Request::from_parts(parts, body)).await?;
        if !answer.status().is_success() {
            use StatusCode as Code;
            let nobody = [Code::BAD_GATEWAY, Code::SERVICE_UNAVAILABLE, Code::GATEWAY_TIMEOUT];
            if nobody.contains(&answer.status()) {
                *locked(&self.line) = None;
            }
            return Ok(answer.map(Body::boxed_unsync));
        }
        let line = Line::of(&answer);
        if !resumes {
            *locked(&self.line) = line;
            *locked(&self.seen) = None;
            return Ok(answer.map(Body::boxed_unsync));
        }
        if line.is_some() && line == *locked(&self.line) {
            return Ok(answer.map(Body::boxed_unsync));
        }
        drop(answer);
        let Some(version) = locked(&self.seen).as_ref().map(|seen| seen.version) else {
            tracing::debug!(%kind, "another connection, and nothing to know the server by");
            return Ok(gone());
        };
        let mut again = Request::from_parts(again, Body::empty());
        *again.uri_mut() = beginning_at(again.uri(), version.saturating_sub(1));
        let mut answer = client.send(again).await?;
        if !answer.status().is_success() {
            return Ok(answer.map(Body::boxed_unsync));
        }
        let repeated = tokio::time::timeout(REPEATS_WITHIN, first_line(answer.body_mut())).await;
        let repeated = repeated.ok().flatten();
        let rest = repeated.and_then(|(first, rest)| {
            (Seen::from_line(&first) == *locked(&self.seen)).then_some(rest)
        });
        let Some(mut rest) = rest else {
            tracing::info!(
                %kind,
                "the API server does not repeat what was heard last, as one that was restored from a \
                 backup; everything is listed again"
            );
            return Ok(gone());
        };
        *locked(&self.line) = Line::of(&answer);
        // In the place of the event, which has been told: the watch is there now, and no further.
        rest.splice(0..0, bookmark(version));
        Ok(answer.map(|body| {
            let rest = stream::iter([Ok(Frame::data(rest.into()))]).chain(BodyStream::new(body));
            StreamBody::new(rest).boxed_unsync()
        }))
    }
}

/// Whether it asks for changes, or a list as a stream.
pub(super) fn is_watch(uri: &Uri) -> bool {
    says(uri, "watch=true")
}

/// Whether it asks for a list as a stream.
pub(super) fn streams_list(uri: &Uri) -> bool {
    is_watch(uri) && says(uri, "sendInitialEvents=true")
}

fn says(uri: &Uri, parameter: &str) -> bool {
    uri.query().is_some_and(|query| query.split('&').any(|said| said == parameter))
}

/// The same request for changes, from another version on.
fn beginning_at(uri: &Uri, version: u64) -> Uri {
    let changed = uri.query().unwrap_or_default().split('&').map(|said| {
        if said.starts_with("resourceVersion=") {
            format!("resourceVersion={version}")
        } else {
            said.to_owned()
        }
    });
    let query = changed.collect::<Vec<_>>().join("&");
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = PathAndQuery::try_from(format!("{}?{query}", uri.path())).ok();
    // Only the number in it is another one.
    Uri::from_parts(parts).unwrap_or_else(|_| uri.clone())
}

/// The first line of a body, and what came of the next. None if it ends before.
async fn first_line(body: &mut Body) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut bytes = Vec::new();
    loop {
        let searched = bytes.len();
        bytes.extend(body.frame().await?.ok()?.into_data().unwrap_or_default());
        if let Some(end) = bytes[searched..].iter().position(|byte| *byte == b'\n') {
            let rest = bytes.split_off(searched + end + 1);
            return Some((bytes, rest));
        }
    }
}

/// What a server says of how far it has come.
fn bookmark(version: u64) -> Vec<u8> {
    let metadata = json!({ "resourceVersion": version.to_string() });
    let object = json!({ "kind": "", "apiVersion": "", "metadata": metadata });
    format!("{}\n", json!({ "type": "BOOKMARK", "object": object })).into_bytes()
}

/// What a server says that no longer knows a place.
fn gone() -> Response<Content> {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 410,
        "reason": "Expired", "message": "another server, which may know another history",
    });
    let body = Body::from(status.to_string().into_bytes()).boxed_unsync();
    let mut answer = Response::new(body);
    *answer.status_mut() = StatusCode::GONE;
    answer
}
