//! The bytes of one manifest file to objects of the model.
//!
//! A file counts as a whole or not at all: half of an edit is nothing anybody asked for. What only
//! concerns a part of one object, such as a port of 70000, is a problem of that part.

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;

use crate::model::{Event, Kind, NamespacedName, Problem};
use crate::watch::Watched;
use crate::watch::convert::{PROXY_NAME_LABEL, name_of, one_line, shown};

/// The largest file that is read.
pub(super) const SIZE_LIMIT: u64 = 64 << 20;

/// An object of one of the four kinds.
#[derive(Debug)]
pub(super) struct Object {
    pub(super) kind: Kind,
    pub(super) name: NamespacedName,
    /// What says that it exists; `None` if it is not for this proxy.
    pub(super) event: Option<Event>,
}

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) objects: Vec<Object>,
    /// Problems of parts of objects.
    pub(super) problems: Vec<Problem>,
    /// Objects of other kinds.
    pub(super) ignored: usize,
}

/// Why a file does not count: where in it, which field, and what is wrong.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) place: String,
    pub(super) field: String,
    pub(super) message: String,
}

impl Fault {
    fn new(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { place: place.into(), field: String::new(), message: message.into() }
    }
}

/// Decodes a file. `file` is its name, as it is to be shown.
pub(super) fn decode(file: &str, bytes: &[u8], node_name: &str) -> Result<Contents, Fault> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| Fault::new(file, format!("is not UTF-8: {error}")))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let is_json =
        std::path::Path::new(file).extension().is_some_and(|extension| extension == "json");
    let documents = if is_json { json(text) } else { yaml(text) };
    let documents = documents.map_err(|message| Fault::new(file, one_line(&message)))?;

    let mut contents = Contents::default();
    for (i, document) in documents.into_iter().enumerate() {
        let place = format!("{file}, document {}", i + 1);
        take(document, None, &place, node_name, &mut contents)?;
    }
    Ok(contents)
}

fn json(text: &str) -> Result<Vec<Value>, String> {
    let documents = serde_json::Deserializer::from_str(text).into_iter();
    documents.collect::<Result<_, _>>().map_err(|error| error.to_string())
}

/// The documents of a YAML file that are not empty. The limits are there for aliases that expand
/// without end; what a file of the permitted size can hold literally is allowed.
fn yaml(text: &str) -> Result<Vec<Value>, String> {
    let literal = usize::try_from(SIZE_LIMIT).unwrap_or(usize::MAX);
    let options = serde_saphyr::options! {
        with_snippet: false,
        budget: serde_saphyr::budget! {
            max_events: literal,
            max_nodes: literal,
            max_documents: literal,
            // A label block that hundreds of objects share is fine; how much the aliases expand to
            // is limited to a million events in any case.
            enforce_alias_anchor_ratio: false,
        },
    };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|error| error.to_string())
}

/// The type of an object that a list does not repeat in its items.
#[derive(Clone, Copy)]
struct TypeMeta<'a> {
    api_version: &'a str,
    kind: &'a str,
}

/// Takes what a value holds: an object, or a list of them.
fn take(
    value: Value,
    inherited: Option<TypeMeta<'_>>,
    place: &str,
    node_name: &str,
    contents: &mut Contents,
) -> Result<(), Fault> {
    let Value::Object(mut object) = value else {
        return Err(Fault::new(place, "is not an object with apiVersion and kind"));
    };
    let mut text = |key: &str| match object.get_mut(key) {
        Some(Value::String(text)) => Some(std::mem::take(text)),
        _ => None,
    };
    // Taken out, because the typed decoders accept objects without them, and put back below.
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let known = |own: Option<&str>, inherited: Option<&str>, key: &str| match own.or(inherited) {
        Some(text) => Ok(text.to_owned()),
        None => Err(Fault::new(place, format!("has no {key}"))),
    };
    let kind = known(kind.as_deref(), inherited.map(|t| t.kind), "kind")?;
    let api_version =
        known(api_version.as_deref(), inherited.map(|t| t.api_version), "apiVersion")?;

    if let Some(item_kind) = kind.strip_suffix("List")
        && let Some(Value::Array(items)) = object.get_mut("items").map(Value::take)
    {
        let inherited = (!item_kind.is_empty())
            .then_some(TypeMeta { api_version: &api_version, kind: item_kind });
        for (i, item) in items.into_iter().enumerate() {
            take(item, inherited, &format!("{place}, item {}", i + 1), node_name, contents)?;
        }
        return Ok(());
    }

    let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
    let watched = match (group, kind.as_str()) {
        ("", "Service") => Kind::Service,
        ("", "Node") => Kind::Node,
        ("discovery.k8s.io", "EndpointSlice") => Kind::EndpointSlice,
        ("networking.k8s.io", "ServiceCIDR") => Kind::ServiceCidr,
        _ => {
            tracing::debug!(place, kind, api_version, "not a kind that is watched; ignored");
            contents.ignored += 1;
            return Ok(());
        }
    };
    object.insert("apiVersion".to_owned(), Value::String(api_version));
    object.insert("kind".to_owned(), Value::String(kind));
    if matches!(watched, Kind::Service | Kind::EndpointSlice) {
        default_namespace(&mut object);
    }
    let value = Value::Object(object);
    match watched {
        Kind::Service => {
            let service = typed::<Service>(value, place)?;
            not_defaulted(&service, place, &mut contents.problems);
            add(&service, place, node_name, contents);
        }
        Kind::EndpointSlice => {
            add(&typed::<EndpointSlice>(value, place)?, place, node_name, contents);
        }
        Kind::ServiceCidr => add(&typed::<ServiceCIDR>(value, place)?, place, node_name, contents),
        Kind::Node => add(&typed::<Node>(value, place)?, place, node_name, contents),
    }
    Ok(())
}

/// `kubectl` would put an object without a namespace there.
fn default_namespace(object: &mut serde_json::Map<String, Value>) {
    let metadata = object.get_mut("metadata").and_then(Value::as_object_mut);
    if let Some(metadata) = metadata
        && metadata.get("namespace").is_none_or(|n| n.is_null() || n.as_str() == Some(""))
    {
        metadata.insert("namespace".to_owned(), Value::String("default".to_owned()));
    }
}

/// Decodes one object; a failure names it and the field.
fn typed<K: Watched>(value: Value, place: &str) -> Result<K, Fault> {
    let text = |pointer: &str| value.pointer(pointer)?.as_str().map(str::to_owned);
    let metadata = ObjectMeta {
        name: text("/metadata/name"),
        namespace: text("/metadata/namespace"),
        ..ObjectMeta::default()
    };
    serde_path_to_error::deserialize(value).map_err(|error| Fault {
        place: format!("{place}, {}", title::<K>(&metadata)),
        field: match error.path().to_string() {
            path if path == "." => String::new(),
            path => one_line(&path),
        },
        message: one_line(&error.into_inner().to_string()),
    })
}

fn title<K: Watched>(metadata: &ObjectMeta) -> String {
    match name_of(K::KIND, metadata) {
        Ok(name) => format!("{} {name}", K::KIND),
        Err(problem) => problem.object,
    }
}

fn add<K: Watched>(object: &K, place: &str, node_name: &str, contents: &mut Contents) {
    let (event, problems) = object.event(node_name);
    contents.problems.extend(
        problems
            .into_iter()
            .map(|problem| Problem { object: format!("{place}, {}", problem.object), ..problem }),
    );
    if let Ok(name) = name_of(K::KIND, object.meta()) {
        contents.objects.push(Object { kind: K::KIND, name, event });
    }
}

/// Names what the API server would have filled in and nothing here does.
fn not_defaulted(service: &Service, place: &str, problems: &mut Vec<Problem>) {
    let Some(spec) = &service.spec else { return };
    let labels = service.metadata.labels.as_ref();
    if spec.type_.as_deref() == Some("ExternalName")
        || labels.is_some_and(|labels| labels.contains_key(PROXY_NAME_LABEL))
    {
        return;
    }
    let mut add = |field: String, message: &str| {
        problems.push(Problem {
            object: format!("{place}, {}", title::<Service>(&service.metadata)),
            field,
            message: message.to_owned(),
        });
    };
    if spec.cluster_ip.as_deref().is_none_or(str::is_empty) {
        add(
            "spec.clusterIP".to_owned(),
            "has no clusterIP; nothing assigns one here, and the Service is not served",
        );
        return;
    }
    if spec.type_.as_deref() == Some("NodePort") {
        for (i, port) in spec.ports.iter().flatten().enumerate() {
            if port.node_port.is_none_or(|number| number == 0) {
                add(
                    format!("spec.ports[{i}].nodePort"),
                    "has no nodePort; nothing assigns one here, and the port is served without",
                );
            }
        }
    }
}

/// The problem of a file that does not count.
pub(super) fn refused(fault: &Fault, had_objects: bool) -> Problem {
    let outcome = if had_objects {
        "the file's last good state stays in force"
    } else {
        "nothing of the file is in force"
    };
    Problem {
        object: fault.place.clone(),
        field: fault.field.clone(),
        message: format!("{}; {outcome}", fault.message),
    }
}

/// A file name, as it is to be shown.
pub(super) fn label(name: &std::ffi::OsStr) -> String {
    let name = name.to_string_lossy();
    let plain = name.len() <= 255 && !name.chars().any(char::is_control);
    if plain { name.into_owned() } else { shown(&name) }
}
