//! Objects on the wire in Kubernetes' protobuf: less than half of the bytes that they are in JSON, and a
//! third of the API server's work for a list, of which thousands of nodes ask at once when they are
//! upgraded.
//!
//! `kube` reads JSON only, and so this sits below it: it asks for protobuf, and hands on in JSON what it reads,
//! an event as soon as it is whole. That is the fields that the proxy goes by, and no other: who manages
//! which field is often half of an object. So all that is known about objects and their faults stays in one
//! place, and a server that answers in JSON all the same is handed on as it is. What cannot be read as
//! protobuf ends the answer, and JSON is asked for from then on.

mod lines;
mod list;
mod messages;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Buf as _, BytesMut};
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use kube::Client;
use kube::client::Body;
use prost::Message;
use serde::Serialize;
use thiserror::Error;

use self::lines::{Lines, Read};
pub(super) use self::list::AtOnce;
use self::list::{Objects, at_once};
use self::messages::{Bookmark, List, Status, TypeMeta, Unknown, WatchEvent};
use super::place::{is_watch, streams_list};

/// What comes before every wrapped object.
const MAGIC: &[u8] = b"k8s\0";

/// The longest event that is taken: objects are stored in etcd, which takes 1.5 MiB.
const LONGEST_EVENT: usize = 16 << 20;

const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

/// What is asked for: protobuf, and what a server without it would give.
const PREFERENCE: HeaderValue =
    HeaderValue::from_static("application/vnd.kubernetes.protobuf,application/json");

/// Why an answer cannot be read.
#[derive(Debug, Error)]
enum Unreadable {
    #[error("an object without the four bytes that begin every one")]
    NoMagic,
    #[error("an object of kind {0:?}")]
    Kind(String),
    #[error("a message that is none: {0}")]
    Message(#[from] prost::DecodeError),
    #[error("an event of {0} bytes")]
    TooLong(usize),
    #[error("an end within an event")]
    Torn,
    #[error("field {0} of a type that no list has")]
    Field(u32),
    #[error("a list without a version, or a part of one")]
    Part,
    #[error("a compression that is none: {0}")]
    Compression(#[source] std::io::Error),
    #[error("an object that is not to be written in JSON: {0}")]
    Json(#[from] serde_json::Error),
}

type Error = Box<dyn std::error::Error + Send + Sync>;

/// A client that has objects of the kinds that are watched sent in protobuf, and gives them in JSON.
pub(super) fn in_protobuf(client: Client) -> Client {
    let namespace = client.default_namespace().to_owned();
    let plain = Arc::new(AtomicBool::new(false));
    let service = tower::service_fn(move |mut request: Request<Body>| {
        let (client, plain) = (client.clone(), plain.clone());
        async move {
            let watch = is_watch(request.uri());
            if asks_for_objects(&request) && !plain.load(Ordering::Relaxed) {
                let asked = request.headers_mut().insert(ACCEPT, PREFERENCE);
                if streams_list(request.uri()) {
                    let answer = client.send(at_once(&request)).await?;
                    if is_protobuf(&answer) && answer.status().is_success() {
                        return Ok(Objects::of(answer, plain).map(UnsyncBoxBody::new));
                    }
                    if !answer.status().is_success() {
                        return translated(answer, false, plain).await;
                    }
                    // It has JSON only, of which a list would have to be held as a whole.
                    plain.store(true, Ordering::Relaxed);
                    asked.map(|asked| request.headers_mut().insert(ACCEPT, asked));
                }
            }
            translated(client.send(request).await?, watch, plain).await
        }
    });
    Client::new(service, namespace)
}

fn asks_for_objects(request: &Request<Body>) -> bool {
    let kinds = ["/services", "/endpointslices", "/nodes", "/servicecidrs"];
    request.method() == Method::GET && kinds.iter().any(|kind| request.uri().path().ends_with(kind))
}

fn is_protobuf(answer: &Response<Body>) -> bool {
    let said = answer.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    said.is_some_and(|said| said.starts_with(PROTOBUF))
}

async fn translated(
    answer: Response<Body>,
    watch: bool,
    plain: Arc<AtomicBool>,
) -> kube::Result<Response<UnsyncBoxBody<Bytes, Error>>> {
    if !is_protobuf(&answer) {
        return Ok(answer.map(|body| body.map_err(Error::from).boxed_unsync()));
    }
    let (mut parts, body) = answer.into_parts();
    parts.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    parts.headers.remove(CONTENT_LENGTH);
    if watch && parts.status.is_success() {
        let events = Lines::of(body, Events::default(), plain);
        return Ok(Response::from_parts(parts, events.boxed_unsync()));
    }
    let whole = body.collect().await?.to_bytes();
    let mut json = Vec::with_capacity(2 * whole.len());
    write_object(whole, &mut json).map_err(|error| {
        give_up(&plain, &error);
        kube::Error::Service(error.into())
    })?;
    let body = Full::from(json).map_err(|never: Infallible| match never {});
    Ok(Response::from_parts(parts, body.boxed_unsync()))
}

fn give_up(plain: &AtomicBool, error: &Unreadable) {
    if !plain.swap(true, Ordering::Relaxed) {
        tracing::warn!("the API server's protobuf has {error}; asking for JSON from here on");
    }
}

/// The events of a watch, translated as they come.
#[derive(Default)]
struct Events {
    /// The beginning of an event that is not whole yet.
    waiting: BytesMut,
}

impl Read for Events {
    fn take(&mut self, data: &[u8]) -> Result<Vec<u8>, Unreadable> {
        self.waiting.extend_from_slice(data);
        let mut lines = Vec::new();
        while let Some((length, _)) = self.waiting.split_first_chunk() {
            let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
            if length > LONGEST_EVENT {
                return Err(Unreadable::TooLong(length));
            }
            if self.waiting.len() < 4 + length {
                break;
            }
            self.waiting.advance(4);
            write_event(self.waiting.split_to(length).freeze(), &mut lines)?;
        }
        Ok(lines)
    }

    fn end(&mut self) -> Result<Vec<u8>, Unreadable> {
        if self.waiting.is_empty() { Ok(Vec::new()) } else { Err(Unreadable::Torn) }
    }
}

/// An event as a line.
fn write_event(message: Bytes, json: &mut Vec<u8>) -> Result<(), Unreadable> {
    let event = WatchEvent::decode(message)?;
    json.extend_from_slice(b"{\"type\":");
    serde_json::to_writer(&mut *json, &event.kind)?;
    json.extend_from_slice(b",\"object\":");
    let (types, raw) = unwrapped(event.object.unwrap_or_default().raw)?;
    if event.kind == "BOOKMARK" {
        write::<Bookmark>(Some(&types), raw, json)?;
    } else {
        write_typed(&types, raw, json)?;
    }
    json.extend_from_slice(b"}\n");
    Ok(())
}

/// A wrapped object, be it one, a list or a status.
fn write_object(wrapped: Bytes, json: &mut Vec<u8>) -> Result<(), Unreadable> {
    let (types, raw) = unwrapped(wrapped)?;
    let Some(kind) = types.kind.strip_suffix("List") else {
        return write_typed(&types, raw, json);
    };
    let list = List::decode(raw)?;
    begin(&types, json)?;
    json.extend_from_slice(b",\"metadata\":");
    serde_json::to_writer(&mut *json, &list.metadata.unwrap_or_default())?;
    json.extend_from_slice(b",\"items\":[");
    for (number, item) in list.items.into_iter().enumerate() {
        if number > 0 {
            json.push(b',');
        }
        write_of_kind(kind, None, item, json)?;
    }
    json.extend_from_slice(b"]}");
    Ok(())
}

fn unwrapped(mut wrapped: Bytes) -> Result<(TypeMeta, Bytes), Unreadable> {
    if !wrapped.starts_with(MAGIC) {
        return Err(Unreadable::NoMagic);
    }
    wrapped.advance(MAGIC.len());
    let unknown = Unknown::decode(wrapped)?;
    Ok((unknown.type_meta.unwrap_or_default(), unknown.raw))
}

fn write_typed(types: &TypeMeta, raw: Bytes, json: &mut Vec<u8>) -> Result<(), Unreadable> {
    write_of_kind(&types.kind, Some(types), raw, json)
}

fn write_of_kind(
    kind: &str,
    types: Option<&TypeMeta>,
    raw: Bytes,
    json: &mut Vec<u8>,
) -> Result<(), Unreadable> {
    match kind {
        "Service" => write::<messages::Service>(types, raw, json),
        "EndpointSlice" => write::<messages::EndpointSlice>(types, raw, json),
        "Node" => write::<messages::Node>(types, raw, json),
        "ServiceCIDR" => write::<messages::ServiceCidr>(types, raw, json),
        "Status" => write::<Status>(types, raw, json),
        other => Err(Unreadable::Kind(other.to_owned())),
    }
}

/// Writes a message behind what says what it is, if that is to be said.
fn write<M: Message + Default + Serialize>(
    types: Option<&TypeMeta>,
    raw: Bytes,
    json: &mut Vec<u8>,
) -> Result<(), Unreadable> {
    let message = M::decode(raw)?;
    let Some(types) = types else { return Ok(serde_json::to_writer(json, &message)?) };
    begin(types, json)?;
    let from = json.len();
    serde_json::to_writer(&mut *json, &message)?;
    // Its own brace makes place for the comma.
    json[from] = b',';
    Ok(())
}

/// The beginning of an object, without its end.
fn begin(types: &TypeMeta, json: &mut Vec<u8>) -> Result<(), Unreadable> {
    serde_json::to_writer(&mut *json, types)?;
    json.pop();
    Ok(())
}

#[cfg(test)]
mod tests;
