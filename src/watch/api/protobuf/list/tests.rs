//! Lists made by hand, in pieces, compressed or not. That a real server's are read is for the tests that run
//! one.

use std::convert::Infallible;
use std::io::Write as _;
use std::sync::Mutex;

use flate2::Compression;
use flate2::write::GzEncoder;
use http::StatusCode;
use http::header::{ACCEPT, CONTENT_TYPE};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use kube::Client;
use proptest::prelude::*;
use serde_json::Value;

use super::super::messages::Unknown;
use super::super::tests::field;
use super::super::{PROTOBUF, in_protobuf};
use super::*;

const STREAMED: &str = "/apis/discovery.k8s.io/v1/endpointslices?watch=true&timeoutSeconds=290\
                        &labelSelector=%21a%2Fb&allowWatchBookmarks=true&sendInitialEvents=true\
                        &resourceVersionMatch=NotOlderThan&resourceVersion=0";
const AT_ONCE: &str =
    "/apis/discovery.k8s.io/v1/endpointslices?labelSelector=%21a%2Fb&resourceVersion=0";

fn slice(name: &str) -> Vec<u8> {
    field(2, [field(1, field(1, name)), field(4, "IPv4")].concat())
}

fn metadata(version: &str) -> Vec<u8> {
    field(1, field(2, version))
}

fn wrapped(kind: &str, raw: Vec<u8>) -> Vec<u8> {
    let type_meta = TypeMeta { api_version: "discovery.k8s.io/v1".into(), kind: kind.into() };
    let unknown = Unknown { type_meta: Some(type_meta), raw: raw.into() };
    // What is behind the object says how it is encoded.
    [MAGIC, &unknown.encode_to_vec(), &field(3, ""), &field(4, "x")].concat()
}

fn list(names: &[&str]) -> Vec<u8> {
    let items = names.iter().flat_map(|name| slice(name));
    wrapped("EndpointSliceList", metadata("5").into_iter().chain(items).collect())
}

fn compressed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn cut(bytes: &[u8], at: &[usize]) -> Vec<Vec<u8>> {
    let mut at: Vec<_> = at.iter().map(|at| at % (bytes.len() + 1)).collect();
    at.extend([0, bytes.len()]);
    at.sort_unstable();
    at.windows(2).map(|cut| bytes[cut[0]..cut[1]].to_vec()).collect()
}

/// What came of an answer, and what was asked for: address, encoding and compression.
type Came = (Result<(Vec<Value>, bool), String>, Vec<(String, Option<String>, Option<String>)>);

/// Asks a server that answers so, and that in the second place, if it is asked once more.
async fn answered(answers: Vec<(StatusCode, &'static str, bool, Vec<Vec<u8>>)>) -> Came {
    let (asked, answers) = (Arc::new(Mutex::new(Vec::new())), Arc::new(answers));
    let noting = asked.clone();
    let server = tower::service_fn(move |request: Request<Body>| {
        let said =
            |name| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let mut noting = noting.lock().unwrap();
        let (status, encoding, zipped, pieces) = answers[noting.len()].clone();
        noting.push((request.uri().to_string(), said(ACCEPT), said(ACCEPT_ENCODING)));
        let frames =
            pieces.into_iter().map(|piece| Ok::<_, Infallible>(Frame::data(Bytes::from(piece))));
        let mut answer = Response::builder().status(status).header(CONTENT_TYPE, encoding);
        if zipped {
            answer = answer.header(CONTENT_ENCODING, "gzip");
        }
        let answer = answer.body(StreamBody::new(futures::stream::iter(frames))).unwrap();
        async { Ok::<_, Infallible>(answer) }
    });
    let client = in_protobuf(Client::new(server, "default"));
    let request = Request::get(STREAMED).header(ACCEPT, "application/json").body(Body::empty());
    let came = match client.send(request.unwrap()).await {
        Err(error) => Err(error.to_string()),
        Ok(answer) => {
            let at_once = answer.extensions().get::<AtOnce>().is_some();
            let mut lines = Vec::new();
            let mut body = std::pin::pin!(answer.into_body());
            loop {
                match body.frame().await {
                    None => break Ok(lines),
                    Some(Err(error)) => break Err(error.to_string()),
                    Some(Ok(frame)) => lines.extend_from_slice(frame.data_ref().unwrap()),
                }
            }
            .map(|lines| {
                let lines = lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
                (lines.map(|line| serde_json::from_slice(line).unwrap()).collect(), at_once)
            })
        }
    };
    let asked = asked.lock().unwrap().clone();
    (came, asked)
}

fn in_pieces(zipped: bool, pieces: Vec<Vec<u8>>) -> Came {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(answered(vec![(StatusCode::OK, PROTOBUF, zipped, pieces)]))
}

/// The events that a streamed list of these objects would have.
fn events(names: &[&str]) -> Vec<Value> {
    let added = names.iter().map(|name| {
        let object = json!({
            "metadata": { "name": name }, "addressType": "IPv4", "endpoints": [], "ports": [],
        });
        json!({ "type": "ADDED", "object": object })
    });
    let end = json!({ "type": "BOOKMARK", "object": { "kind": "", "apiVersion": "", "metadata": {
        "resourceVersion": "5", "annotations": { "k8s.io/initial-events-end": "true" },
    }}});
    added.chain([end]).collect()
}

proptest! {
    #[test]
    fn a_list_is_told_as_events_wherever_the_answer_is_cut(
        count in 0..5_usize,
        zipped: bool,
        cuts in prop::collection::vec(any::<usize>(), 0..12),
    ) {
        let names = &["a", "web-1", "ünïcode \"quoted\"", "b", "c"][..count];
        let bytes = if zipped { compressed(&list(names)) } else { list(names) };
        let (came, asked) = in_pieces(zipped, cut(&bytes, &cuts));
        prop_assert_eq!(came.unwrap(), (events(names), true));
        let accept = "application/vnd.kubernetes.protobuf,application/json".to_owned();
        prop_assert_eq!(asked, [(AT_ONCE.to_owned(), Some(accept), Some("gzip".to_owned()))]);
    }

    #[test]
    fn one_that_breaks_off_is_never_taken_for_a_whole_one(zipped: bool, end in any::<usize>()) {
        let names = ["a", "b", "c"];
        let mut bytes = list(&names);
        // What says how it is encoded may be missing.
        bytes.truncate(bytes.len() - 5);
        let bytes = if zipped { compressed(&bytes) } else { bytes };
        let came = in_pieces(zipped, vec![bytes[..end % bytes.len()].to_vec()]).0;
        prop_assert!(came.unwrap_err().contains("an end within an event"));
    }

    #[test]
    fn nothing_that_a_server_could_send_is_the_end_of_the_program(
        noise in prop::collection::vec(any::<u8>(), 0..200),
        at in any::<usize>(),
        zipped: bool,
    ) {
        let mut bytes = list(&["a", "b"]);
        if zipped {
            bytes = compressed(&bytes);
        }
        let at = at % bytes.len();
        bytes.splice(at..bytes.len().min(at + noise.len() / 2), noise);
        let _ = in_pieces(zipped, vec![bytes]);
    }
}

#[tokio::test]
async fn what_is_no_list_is_an_error() {
    let whole = |raw| wrapped("EndpointSliceList", raw);
    let torn_object = [metadata("5"), field(2, [0x0a, 0x7f, 1])].concat();
    let number = [metadata("5"), vec![0x18, 1]].concat();
    let huge = [MAGIC, &[0x12, 0xff, 0xff, 0xff, 0x7f, 0x12, 0xff, 0xff, 0xff, 0x70][..]].concat();
    let runs_over = [MAGIC, &field(1, field(2, "EndpointSliceList")), &[0x12, 2, 0x12, 9][..]];
    let more = field(1, [field(2, "5"), field(3, "more")].concat());
    let bad = [
        (b"nonsense".to_vec(), "without the four bytes"),
        (wrapped("EndpointSlice", [metadata("5"), slice("a")].concat()), "kind \"EndpointSlice\""),
        (wrapped("PodList", [metadata("5"), slice("a")].concat()), "kind \"Pod\""),
        (whole(torn_object), "a message that is none"),
        (whole(number), "field 3 of a type that no list has"),
        (whole(vec![0xff; 30]), "a message that is none"),
        (huge, "an event of"),
        (runs_over.concat(), "an event of 9 bytes"),
        (whole(slice("a")), "without a version"),
        (whole([more, slice("a")].concat()), "a part of one"),
    ];
    for (bytes, said) in bad {
        let pieces = vec![bytes];
        let (came, _) = answered(vec![(StatusCode::OK, PROTOBUF, false, pieces)]).await;
        let error = came.unwrap_err();
        assert!(error.contains(said), "{said}: {error}");
    }
    let (came, _) =
        answered(vec![(StatusCode::OK, PROTOBUF, true, vec![b"not compressed".to_vec()])]).await;
    assert!(came.unwrap_err().contains("a compression that is none"));
}

#[tokio::test]
async fn a_server_that_has_json_only_is_asked_for_the_stream() {
    let json = "application/json";
    let list = vec![br#"{ "kind": "EndpointSliceList", "items": [] }"#.to_vec()];
    let stream = vec![b"{\"type\":\"BOOKMARK\"}\n".to_vec()];
    let answers = vec![(StatusCode::OK, json, false, list), (StatusCode::OK, json, false, stream)];
    let (came, asked) = answered(answers).await;
    assert_eq!(came.unwrap(), (vec![json!({ "type": "BOOKMARK" })], false));
    assert_eq!(asked[1], (STREAMED.to_owned(), Some(json.to_owned()), None));
}

#[tokio::test]
async fn a_refusal_is_passed_on() {
    let raw = [field(2, "Failure"), field(4, "Forbidden"), vec![0x30, 0x93, 0x03]].concat();
    let refused = (StatusCode::FORBIDDEN, PROTOBUF, false, vec![wrapped("Status", raw)]);
    let (came, asked) = answered(vec![refused]).await;
    let (said, at_once) = came.unwrap();
    assert_eq!((&said[0]["code"], at_once), (&json!(403), false));
    assert_eq!(asked.len(), 1);
}
