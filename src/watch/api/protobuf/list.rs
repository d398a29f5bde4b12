//! A list that is asked for at once, and told as the stream of it.
//!
//! `kube` has lists streamed, as a watch that begins with everything there is: then no list is ever held as a
//! whole. But a server sends such a stream event by event, each encoded and flushed on its own, and up to
//! Kubernetes 1.36 not compressed. The same objects as one list cost it a fifth of the processor time, and
//! compressed less than a tenth of the bytes (figures in `deploy/docs/scale.md`). And nothing keeps a client from
//! reading a list as it comes, too. So a list is what is asked for here, and each of its objects is handed on
//! as an event as soon as it is whole; the bookmark that ends a streamed list follows the last one. Then the
//! answer ends, like that to a watch whose time is up, and the watch is asked for from there.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::{Buf as _, BytesMut};
use flate2::write::GzDecoder;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING};
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Response, Uri};
use hyper::body::Bytes;
use kube::client::Body;
use prost::Message as _;
use prost::encoding::{WireType, decode_key, decode_varint};
use serde_json::json;

use super::lines::{Lines, Read};
use super::messages::{ListMeta, TypeMeta};
use super::{LONGEST_EVENT, MAGIC, Unreadable, write_of_kind};

const GZIP: HeaderValue = HeaderValue::from_static("gzip");

/// What only a stream is asked with.
const OF_STREAMS: [&str; 5] =
    ["watch", "sendInitialEvents", "allowWatchBookmarks", "resourceVersionMatch", "timeoutSeconds"];

/// On an answer: it is a list at once, which ends with its last object, and no watch that was cut short.
#[derive(Clone, Copy)]
pub(in crate::watch::api) struct AtOnce;

/// The request for a whole list in the place of one for the stream of it: from the server's memory, as that
/// one is.
pub(super) fn at_once(streamed: &Request<Body>) -> Request<Body> {
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = whole(streamed.uri());
    request.headers_mut().clone_from(streamed.headers());
    request.headers_mut().insert(ACCEPT_ENCODING, GZIP);
    request.extensions_mut().clone_from(streamed.extensions());
    request
}

fn whole(uri: &Uri) -> Uri {
    let is_of_streams =
        |said: &&str| OF_STREAMS.contains(&said.split_once('=').map_or(*said, |(name, _)| name));
    let query = uri.query().unwrap_or_default().split('&').filter(|said| !is_of_streams(said));
    let query = query.collect::<Vec<_>>().join("&");
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = PathAndQuery::try_from(format!("{}?{query}", uri.path())).ok();
    // There is no more in it than there was.
    Uri::from_parts(parts).unwrap_or_else(|_| uri.clone())
}

/// The objects of a list, told as events as they come.
pub(super) struct Objects {
    /// Where the answer is compressed.
    inflating: Option<GzDecoder<Vec<u8>>>,
    /// The beginning of a field that is not whole yet.
    waiting: BytesMut,
    within: Within,
    types: TypeMeta,
    metadata: ListMeta,
}

/// What the next bytes are a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Within {
    /// The four bytes before everything.
    Magic,
    /// What the list is wrapped in.
    Wrapper,
    /// The list, of which so many bytes are to come.
    List(usize),
    /// What is behind the last object.
    Behind,
}

impl Objects {
    pub(super) fn of(answer: Response<Body>, plain: Arc<AtomicBool>) -> Response<Lines<Self>> {
        let (mut parts, body) = answer.into_parts();
        let compressed = parts.headers.remove(CONTENT_ENCODING).is_some_and(|said| said == GZIP);
        parts.extensions.insert(AtOnce);
        let objects = Self {
            inflating: compressed.then(|| GzDecoder::new(Vec::new())),
            waiting: BytesMut::new(),
            within: Within::Magic,
            types: TypeMeta::default(),
            metadata: ListMeta::default(),
        };
        Response::from_parts(parts, Lines::of(body, objects, plain))
    }

    /// What is no longer compressed. (The last of it stays behind until more comes, or nothing more.)
    fn inflated(&mut self) {
        if let Some(inflating) = &mut self.inflating {
            self.waiting.extend_from_slice(inflating.get_ref());
            inflating.get_mut().clear();
        }
    }

    fn lines(&mut self) -> Result<Vec<u8>, Unreadable> {
        let mut lines = Vec::new();
        if self.within == Within::Magic && self.waiting.len() >= MAGIC.len() {
            if !self.waiting.starts_with(MAGIC) {
                return Err(Unreadable::NoMagic);
            }
            self.waiting.advance(MAGIC.len());
            self.within = Within::Wrapper;
        }
        while self.within != Within::Magic {
            if self.within == Within::List(0) {
                self.within = Within::Behind;
            }
            let Some((number, header, length)) = field(&self.waiting)? else { break };
            if self.within == Within::Wrapper && number == 2 {
                self.waiting.advance(header);
                self.within = Within::List(length);
                continue;
            }
            let left = if let Within::List(left) = self.within { left } else { usize::MAX };
            if length > LONGEST_EVENT || header + length > left {
                return Err(Unreadable::TooLong(length));
            }
            if self.waiting.len() < header + length {
                break;
            }
            self.waiting.advance(header);
            let content = self.waiting.split_to(length).freeze();
            self.field(number, content, &mut lines)?;
            if let Within::List(left) = &mut self.within {
                *left -= header + length;
            }
        }
        Ok(lines)
    }

    fn field(
        &mut self,
        number: u32,
        content: Bytes,
        lines: &mut Vec<u8>,
    ) -> Result<(), Unreadable> {
        match (self.within, number) {
            (Within::Wrapper, 1) => self.types = TypeMeta::decode(content)?,
            (Within::List(_), 1) => self.metadata = ListMeta::decode(content)?,
            (Within::List(_), 2) => {
                let kind = self.types.kind.strip_suffix("List");
                let kind = kind.ok_or_else(|| Unreadable::Kind(self.types.kind.clone()))?;
                lines.extend_from_slice(b"{\"type\":\"ADDED\",\"object\":");
                write_of_kind(kind, None, content, lines)?;
                lines.extend_from_slice(b"}\n");
            }
            _ => {}
        }
        Ok(())
    }
}

impl Read for Objects {
    fn take(&mut self, data: &[u8]) -> Result<Vec<u8>, Unreadable> {
        match &mut self.inflating {
            None => self.waiting.extend_from_slice(data),
            Some(inflating) => {
                inflating.write_all(data).map_err(Unreadable::Compression)?;
                self.inflated();
            }
        }
        self.lines()
    }

    /// The last objects, and the bookmark behind them, if the list is whole.
    fn end(&mut self) -> Result<Vec<u8>, Unreadable> {
        if let Some(inflating) = &mut self.inflating
            && inflating.try_finish().is_err()
        {
            return Err(Unreadable::Torn);
        }
        self.inflated();
        let mut lines = self.lines()?;
        if self.within != Within::Behind || !self.waiting.is_empty() {
            return Err(Unreadable::Torn);
        }
        let ListMeta { resource_version: version, more, .. } = &self.metadata;
        if version.is_empty() || !more.is_empty() {
            return Err(Unreadable::Part);
        }
        let metadata = json!({
            "resourceVersion": version, "annotations": { "k8s.io/initial-events-end": "true" },
        });
        let object = json!({ "kind": "", "apiVersion": "", "metadata": metadata });
        lines.extend_from_slice(
            json!({ "type": "BOOKMARK", "object": object }).to_string().as_bytes(),
        );
        lines.push(b'\n');
        Ok(lines)
    }
}

/// The number of the field that comes next, and the lengths of its header and its content; None if that is
/// not told yet.
fn field(bytes: &[u8]) -> Result<Option<(u32, usize, usize)>, Unreadable> {
    /// Of two numbers.
    const LONGEST_HEADER: usize = 20;
    let mut rest = bytes;
    let header = decode_key(&mut rest).and_then(|key| Ok((key, decode_varint(&mut rest)?)));
    match header {
        Ok(((number, WireType::LengthDelimited), length)) => {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            Ok(Some((number, bytes.len() - rest.len(), length)))
        }
        Ok(((number, _), _)) => Err(Unreadable::Field(number)),
        Err(_) if bytes.len() < LONGEST_HEADER => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
