//! Answers made by hand; that a real server's are read is for `tests/it/protobuf.rs`.

use std::sync::Mutex;

use http::StatusCode;
use http_body_util::StreamBody;
use hyper::body::Frame;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::messages::RawExtension;
use super::*;

/// A field of a message: its number, and what it holds.
pub(super) fn field(number: u32, content: impl AsRef<[u8]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::bytes::encode(number, &content.as_ref().to_vec(), &mut bytes);
    bytes
}

fn number(number: u32, value: i32) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::int32::encode(number, &value, &mut bytes);
    bytes
}

fn wrapped(api_version: &str, kind: &str, raw: Vec<u8>) -> Vec<u8> {
    let type_meta = TypeMeta { api_version: api_version.into(), kind: kind.into() };
    let unknown = Unknown { type_meta: Some(type_meta), raw: raw.into() };
    [MAGIC, &unknown.encode_to_vec()].concat()
}

fn event(kind: &str, object: Vec<u8>) -> Vec<u8> {
    let object = Some(RawExtension { raw: object.into() });
    let message = WatchEvent { kind: kind.into(), object }.encode_to_vec();
    [&u32::try_from(message.len()).unwrap().to_be_bytes()[..], &message].concat()
}

/// A slice with a name, a field that nobody knows, and an endpoint.
fn slice(name: &str) -> Vec<u8> {
    let metadata =
        [field(1, name), field(3, "default"), field(6, "17"), field(17, "who manages it")];
    let endpoint = [field(1, "10.0.0.1"), field(2, number(1, 0)), field(8, "")];
    let port = [field(1, ""), number(3, 8080)];
    let slice = [
        field(1, metadata.concat()),
        field(2, endpoint.concat()),
        field(3, port.concat()),
        field(4, "IPv4"),
    ];
    slice.concat()
}

fn slice_in_json(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default", "resourceVersion": "17"},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": false}, "hints": {}}],
        "ports": [{"name": "", "port": 8080}],
    })
}

fn slice_event(name: &str) -> Vec<u8> {
    event("ADDED", wrapped("discovery.k8s.io/v1", "EndpointSlice", slice(name)))
}

fn typed(mut object: Value, api_version: &str, kind: &str) -> Value {
    object["apiVersion"] = api_version.into();
    object["kind"] = kind.into();
    object
}

const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";

/// What a client gets of an answer in these pieces, and what it asked for then and the next time.
async fn answered(
    path_and_query: &str,
    status: StatusCode,
    encoding: &'static str,
    pieces: Vec<Vec<u8>>,
) -> (Result<String, String>, [Option<String>; 2]) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noting = asked.clone();
    let server = tower::service_fn(move |request: Request<Body>| {
        let accept = request.headers().get(ACCEPT).map(|value| value.to_str().unwrap().to_owned());
        noting.lock().unwrap().push(accept);
        let frames = pieces
            .clone()
            .into_iter()
            .map(|piece| Ok::<_, Infallible>(Frame::data(Bytes::from(piece))));
        let answer = Response::builder().status(status).header(CONTENT_TYPE, encoding);
        let answer = answer.body(StreamBody::new(futures::stream::iter(frames))).unwrap();
        async { Ok::<_, Infallible>(answer) }
    });
    let client = in_protobuf(Client::new(server, "default"));
    let ask = || Request::get(path_and_query).body(Body::empty()).unwrap();
    let answer = match client.send(ask()).await {
        Ok(answer) => {
            assert_eq!(answer.status(), status);
            let body = answer.into_body().collect().await.map_err(|error| error.to_string());
            body.map(|body| String::from_utf8(body.to_bytes().to_vec()).unwrap())
        }
        Err(error) => Err(error.to_string()),
    };
    let _ = client.send(ask()).await;
    let asked = asked.lock().unwrap().clone().try_into().unwrap();
    (answer, asked)
}

fn both(accept: &str) -> [Option<String>; 2] {
    [Some(accept.to_owned()), Some(accept.to_owned())]
}

proptest! {
    #[test]
    fn events_are_lines_wherever_the_stream_is_cut(cuts in prop::collection::vec(0..700_usize, 0..12)) {
        let names = ["web-1", "", "ünïcode \"quoted\""];
        let mut whole: Vec<u8> = names.iter().flat_map(|name| slice_event(name)).collect();
        let metadata = [field(6, "99"), field(12, [field(1, "k8s.io/initial-events-end"), field(2, "true")].concat())];
        let object = wrapped("discovery.k8s.io/v1", "EndpointSlice", field(1, metadata.concat()));
        whole.extend(event("BOOKMARK", object));
        let status = [field(2, "Failure"), field(3, "too old"), field(4, "Expired"), number(6, 410)];
        whole.extend(event("ERROR", wrapped("v1", "Status", status.concat())));

        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(whole.len())).collect();
        cuts.extend([0, whole.len()]);
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|cut| whole[cut[0]..cut[1]].to_vec()).collect();
        let watch = format!("{SLICES}?watch=true");
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (lines, asked) = runtime.block_on(answered(&watch, StatusCode::OK, PROTOBUF, pieces));
        prop_assert_eq!(asked, both("application/vnd.kubernetes.protobuf,application/json"));
        let lines = lines.unwrap();
        let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        prop_assert_eq!(events.len(), names.len() + 2);
        for (event, name) in events.iter().zip(names) {
            prop_assert_eq!(&event["type"], "ADDED");
            let mut object = slice_in_json(name);
            if name.is_empty() {
                object["metadata"].as_object_mut().unwrap().remove("name");
            }
            prop_assert_eq!(&event["object"], &typed(object, "discovery.k8s.io/v1", "EndpointSlice"));
        }
        let bookmark = json!({"metadata": {
            "resourceVersion": "99", "annotations": {"k8s.io/initial-events-end": "true"},
        }});
        prop_assert_eq!(&events[3]["object"], &typed(bookmark, "discovery.k8s.io/v1", "EndpointSlice"));
        let status = json!({"status": "Failure", "message": "too old", "reason": "Expired", "code": 410});
        prop_assert_eq!(&events[4]["object"], &typed(status, "v1", "Status"));
    }

    #[test]
    fn nothing_that_a_server_could_send_is_the_end_of_the_program(
        noise in prop::collection::vec(any::<u8>(), 0..200),
        at in 0..200_usize,
        watch: bool,
    ) {
        let mut bytes = if watch { slice_event("web") } else { wrapped("v1", "ServiceList", slice("web")) };
        let at = at.min(bytes.len());
        bytes.splice(at..bytes.len().min(at + noise.len() / 2), noise);
        let path = if watch { format!("{SLICES}?watch=true") } else { SLICES.to_owned() };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (answer, _) = runtime.block_on(answered(&path, StatusCode::OK, PROTOBUF, vec![bytes]));
        for line in answer.iter().flat_map(|answer| answer.lines()) {
            prop_assert!(serde_json::from_str::<Value>(line).is_ok(), "{}", line);
        }
    }
}

#[tokio::test]
async fn a_list_is_one_object() {
    let list = [
        field(1, [field(2, "5"), field(3, "more")].concat()),
        field(2, slice("a")),
        field(2, slice("b")),
    ];
    let list = wrapped("discovery.k8s.io/v1", "EndpointSliceList", list.concat());
    let (answer, _) = answered(SLICES, StatusCode::OK, PROTOBUF, vec![list]).await;
    let answer: Value = serde_json::from_str(&answer.unwrap()).unwrap();
    let expected = json!({
        "metadata": {"resourceVersion": "5", "continue": "more"},
        "items": [slice_in_json("a"), slice_in_json("b")],
    });
    assert_eq!(answer, typed(expected, "discovery.k8s.io/v1", "EndpointSliceList"));
}

#[tokio::test]
async fn a_refusal_is_understood() {
    let details = [field(1, "endpointslices"), number(5, 3)];
    let status =
        [field(2, "Failure"), field(4, "Forbidden"), field(5, details.concat()), number(6, 403)];
    let status = wrapped("v1", "Status", status.concat());
    let watch = format!("{SLICES}?watch=true");
    let (answer, _) = answered(&watch, StatusCode::FORBIDDEN, PROTOBUF, vec![status]).await;
    let answer: Value = serde_json::from_str(&answer.unwrap()).unwrap();
    assert_eq!(answer["code"], 403);
    assert_eq!(answer["details"]["retryAfterSeconds"], 3);
}

#[tokio::test]
async fn what_is_json_and_what_is_no_object_is_left_alone() {
    let text = || vec![b"{\"kind\":".to_vec(), b"\"EndpointSliceList\"}".to_vec()];
    let (answer, _) = answered(SLICES, StatusCode::OK, "application/json", text()).await;
    assert_eq!(answer.unwrap(), "{\"kind\":\"EndpointSliceList\"}");
    let (_, asked) = answered("/version", StatusCode::OK, "application/json", text()).await;
    assert_eq!(asked, [None, None]);
}

#[tokio::test]
async fn what_makes_no_sense_ends_the_answer_and_is_asked_for_in_json_from_then_on() {
    let watch = format!("{SLICES}?watch=true");
    let pod = event("ADDED", wrapped("v1", "Pod", Vec::new()));
    let unwrapped = event("ADDED", slice("web"));
    let huge = vec![0xff; 8];
    let torn_message = event("ADDED", wrapped("v1", "Service", vec![0x0a, 0x7f, 1]));
    for (bad, message) in [
        (pod, "an object of kind \"Pod\""),
        (unwrapped, "an object without the four bytes that begin every one"),
        (huge, "an event of 4294967295 bytes"),
        (torn_message, "a message that is none: "),
    ] {
        let pieces = vec![[slice_event("web"), bad].concat()];
        let (answer, asked) = answered(&watch, StatusCode::OK, PROTOBUF, pieces).await;
        let error = answer.unwrap_err();
        assert!(error.contains(message), "{error}");
        assert_eq!(asked[1], None, "{error}");
    }
    // A stream that is cut says nothing about its encoding.
    let cut = slice_event("web")[..20].to_vec();
    let (answer, asked) = answered(&watch, StatusCode::OK, PROTOBUF, vec![cut]).await;
    assert!(answer.unwrap_err().contains("an end within an event"));
    assert!(asked[1].is_some());
}
