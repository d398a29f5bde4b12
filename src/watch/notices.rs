//! Kubernetes Events: what the owner of a Service has to know, said where owners look.
//!
//! A courtesy that nothing depends on: it never holds anybody up, is paced, and is left out if the
//! server does not take it. Everything said here is in the log as well.
//!
//! What is the same on every node is one Event, however many nodes there are: its name follows from
//! what it says, so that the server refuses it to all but the first. What changes faster than once a
//! minute is told as it is then, and what went wrong and right again meanwhile not at all.

mod queue;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use fnv::FnvHasher;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::{Instant, sleep_until, timeout};

use self::queue::{Queue, Telling};
use super::{Causes, api};
use crate::config::Source;
use crate::metrics::RestClient;
use crate::model::{Notice, Topic};

/// Notices on their way; more than these at once are dropped.
const QUEUE: usize = 1024;

/// How long the server may take for one.
const PATIENCE: Duration = Duration::from_secs(10);

/// The same Event is not made twice in a time of this length.
const SAME_WITHIN: i64 = 600;

/// The server refuses longer ones.
const MAX_NOTE: usize = 1000;

/// Where notices are given.
#[derive(Clone, Debug, Default)]
pub struct Notices(Option<Sender<Notice>>);

impl Notices {
    #[cfg(test)]
    pub(super) fn to(sender: Sender<Notice>) -> Self {
        Self(Some(sender))
    }

    /// Gives one, without waiting.
    pub fn give(&self, notice: Notice) {
        let Some(sender) = &self.0 else { return };
        if let Err(error) = sender.try_send(notice) {
            tracing::debug!(%error, "an Event is left out");
        }
    }
}

/// Publishes notices from now on, at the API server that the source is. To be called in a tokio
/// runtime. Without an API server nobody reads them.
#[must_use]
pub fn start(source: &Source, node_name: &str, metrics: &RestClient) -> Notices {
    let Source::Api { kubeconfig, master } = source.clone() else { return Notices::default() };
    let (sender, receiver) = channel(QUEUE);
    let (node_name, metrics) = (node_name.to_owned(), metrics.clone());
    tokio::spawn(async move {
        let (kubeconfig, master) = (kubeconfig.as_deref(), master.as_deref());
        // The watches say what is wrong with it.
        if let Ok([client]) = api::measured_clients(kubeconfig, master, metrics).await {
            publish(client, node_name, receiver).await;
        }
    });
    Notices(Some(sender))
}

async fn publish(client: Client, node: String, mut notices: Receiver<Notice>) {
    let mut hasher = DefaultHasher::new();
    node.hash(&mut hasher);
    let mut queue = Queue::new(hasher.finish());
    let mut denied = false;
    loop {
        let due = async {
            match queue.due() {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            notice = notices.recv() => match notice {
                Some(notice) => queue.add(notice, Instant::now()),
                None => return,
            },
            () = due => {
                let Some(telling) = queue.take(Instant::now()) else { continue };
                let event = event(&telling, &node, Timestamp::now());
                let outcome = create(&client, &event).await;
                match &outcome {
                    Outcome::Taken => denied = false,
                    Outcome::Denied(reason) if !denied => {
                        denied = true;
                        tracing::warn!(
                            "Events cannot be made ({reason}); owners of Services are told in this log \
                             alone; the ClusterRole needs {{apiGroups: [\"events.k8s.io\"], resources: \
                             [\"events\"], verbs: [\"create\"]}}"
                        );
                    }
                    Outcome::Denied(reason) | Outcome::Failed(reason) | Outcome::Useless(reason) => {
                        tracing::debug!(reason, "an Event was not taken");
                    }
                }
                queue.done(telling, &outcome, Instant::now());
            }
        }
    }
}

/// What became of an Event.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// The server has it, perhaps from another node.
    Taken,
    /// We may not.
    Denied(String),
    /// There is no place for it, and will be none.
    Useless(String),
    /// It may be taken later.
    Failed(String),
}

async fn create(client: &Client, event: &Event) -> Outcome {
    let namespace = event.metadata.namespace.as_deref().unwrap_or("default");
    let events = Api::<Event>::namespaced(client.clone(), namespace);
    let status = match timeout(PATIENCE, events.create(&PostParams::default(), event)).await {
        Ok(Ok(_)) => return Outcome::Taken,
        Ok(Err(kube::Error::Api(status))) => status,
        Ok(Err(error)) => return Outcome::Failed(Causes(&error).to_string()),
        Err(_) => return Outcome::Failed(format!("no answer within {PATIENCE:?}")),
    };
    let reason = format!("{}: {}", status.code, status.message);
    match status.code {
        409 => Outcome::Taken,
        // With this code, too, it is said that a namespace is about to go.
        403 if status.message.contains("being terminated") => Outcome::Useless(reason),
        401 | 403 => Outcome::Denied(reason),
        400..=428 => Outcome::Useless(reason),
        _ => Outcome::Failed(reason),
    }
}

/// The words of a topic: the reason while it stands, the reason when it is over, the action.
fn words(topic: Topic) -> [&'static str; 3] {
    match topic {
        Topic::Conflict => ["FrontendConflict", "FrontendConflictResolved", "Program"],
        Topic::Partly => ["ServedPartly", "ServedFully", "Program"],
        Topic::Invalid => ["InvalidField", "InvalidFieldCorrected", "Read"],
        Topic::Refused => ["RefusedByKernel", "AcceptedByKernel", "Program"],
        // The words of kube-proxy.
        Topic::HealthCheck => {
            ["FailedToStartServiceHealthcheck", "StartedServiceHealthcheck", "Listen"]
        }
    }
}

/// The Event by which a node tells.
fn event(telling: &Telling, by: &str, now: Timestamp) -> Event {
    let full = telling.service.as_str();
    let (namespace, name) = full.split_once('/').unwrap_or(("default", full));
    let [stands, over, action] = words(telling.topic);
    let of_all_nodes = telling.topic.is_of_all_nodes();
    let note = match (telling.sentences.is_empty(), of_all_nodes) {
        (true, true) => "what was reported before is no longer so".to_owned(),
        (true, false) => format!("node {by}: what was reported before is no longer so"),
        // kube-proxy's begins with the node by itself.
        (false, _) if telling.topic == Topic::HealthCheck => joined(&telling.sentences),
        (false, true) => joined(&telling.sentences),
        (false, false) => format!("node {by}: {}", joined(&telling.sentences)),
    };
    let note: String = note.chars().take(MAX_NOTE).collect();
    let reason = if telling.sentences.is_empty() { over } else { stands };
    // The same on nodes of another version, too, which the standard library's hasher does not promise.
    let mut hasher = FnvHasher::default();
    hasher.write(&(now.as_second() / SAME_WITHIN).to_be_bytes());
    let own = if of_all_nodes { "" } else { by };
    for text in [reason, &note, own] {
        hasher.write(text.as_bytes());
        hasher.write(&[0]);
    }
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{:016x}", hasher.finish())),
            namespace: Some(namespace.into()),
            ..ObjectMeta::default()
        },
        action: Some(action.into()),
        event_time: Some(MicroTime(now)),
        note: Some(note),
        reason: Some(reason.into()),
        regarding: Some(ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Service".into()),
            namespace: Some(namespace.into()),
            name: Some(name.into()),
            // The uid is not kept; kube-proxy gives the name in its place, which `kubectl describe`
            // does not ask for.
            ..ObjectReference::default()
        }),
        reporting_controller: Some("nftproxy".into()),
        reporting_instance: Some(by.chars().take(128).collect()),
        type_: Some(if telling.sentences.is_empty() { "Normal" } else { "Warning" }.into()),
        ..Event::default()
    }
}

/// Sentences, as many as there is room for.
fn joined(sentences: &[String]) -> String {
    let mut text = String::new();
    for (i, sentence) in sentences.iter().enumerate() {
        let more = sentences.len() - i;
        if i > 0 && text.len() + sentence.len() > MAX_NOTE - 100 {
            return format!("{text}; and {more} more, see the log of nftproxy");
        }
        text += if i > 0 { "; " } else { "" };
        text += sentence;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NamespacedName;

    fn telling(topic: Topic, sentences: &[&str]) -> Telling {
        let sentences = sentences.iter().map(|text| (*text).to_owned()).collect();
        Telling { service: NamespacedName::new("shop", "web"), topic, sentences }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_so_on_all_nodes_is_one_event_and_what_is_of_one_is_its_own() {
        let now = at("2026-11-25T10:00:00Z");
        let name = |telling: &Telling, node, now| event(telling, node, now).metadata.name.unwrap();
        let conflict = telling(Topic::Conflict, &["a is served by b"]);
        assert_eq!(name(&conflict, "node-1", now), name(&conflict, "node-2", now));
        let soon = at("2026-11-25T10:09:59Z");
        assert_eq!(name(&conflict, "node-1", now), name(&conflict, "node-1", soon));
        let later = at("2026-11-25T10:10:00Z");
        assert_ne!(name(&conflict, "node-1", now), name(&conflict, "node-1", later));
        let other = telling(Topic::Conflict, &["a is served by c"]);
        assert_ne!(name(&conflict, "node-1", now), name(&other, "node-1", now));
        let refused = telling(Topic::Refused, &["no"]);
        assert_ne!(name(&refused, "node-1", now), name(&refused, "node-2", now));
        let event = event(&refused, "node-1", now);
        assert_eq!(event.note.as_deref(), Some("node node-1: no"));
    }

    #[test]
    fn an_event_is_about_the_service_and_says_as_much_as_the_server_takes() {
        let long = "x".repeat(300);
        let sentences = [&*long; 7];
        let event = event(&telling(Topic::Invalid, &sentences), "node-1", Timestamp::now());
        let regarding = event.regarding.unwrap();
        assert_eq!(regarding.namespace.as_deref(), Some("shop"));
        assert_eq!(regarding.name.as_deref(), Some("web"));
        assert_eq!(event.type_.as_deref(), Some("Warning"));
        let note = event.note.unwrap();
        assert!(note.len() <= MAX_NOTE, "the server's limit is 1024");
        assert!(note.ends_with("; and 5 more, see the log of nftproxy"), "{note}");
    }

    #[test]
    fn that_it_is_over_is_an_event_as_well() {
        let event = event(&telling(Topic::Conflict, &[]), "node-1", Timestamp::now());
        assert_eq!(event.type_.as_deref(), Some("Normal"));
        assert_eq!(event.reason.as_deref(), Some("FrontendConflictResolved"));
    }
}
