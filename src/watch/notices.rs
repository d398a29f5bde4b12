//! Kubernetes Events: what the owner of a Service has to know, said where owners look.
//!
//! A courtesy that nothing depends on: it never holds anybody up, is paced, and is left out if the
//! server does not take it. Everything said here is in the log as well.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::{sleep, timeout};

use super::{Causes, api};
use crate::config::Source;
use crate::metrics::RestClient;
use crate::model::NamespacedName;

/// Notices on their way; more than these at once are dropped.
const QUEUE: usize = 64;

/// Between two of them.
const PAUSE: Duration = Duration::from_millis(200);

/// How long the server may take for one.
const PATIENCE: Duration = Duration::from_secs(10);

/// Something about a Service that its owner has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The Service.
    pub service: NamespacedName,
    /// Why, in one word that programs can read.
    pub reason: &'static str,
    /// What was being done, in one word.
    pub action: &'static str,
    /// What happened.
    pub note: String,
}

/// Where notices are given.
#[derive(Clone, Debug)]
pub struct Notices(Sender<Notice>);

impl Notices {
    /// Gives one, without waiting.
    pub fn give(&self, notice: Notice) {
        if let Err(error) = self.0.try_send(notice) {
            tracing::debug!(%error, "an Event is left out");
        }
    }
}

/// Publishes notices from now on, at the API server that the source is. To be called in a tokio
/// runtime. Without an API server nobody reads them.
#[must_use]
pub fn start(source: &Source, node_name: &str, metrics: &RestClient) -> Notices {
    let (sender, receiver) = channel(QUEUE);
    if let Source::Api { kubeconfig, master } = source.clone() {
        let (node_name, metrics) = (node_name.to_owned(), metrics.clone());
        tokio::spawn(async move {
            let (kubeconfig, master) = (kubeconfig.as_deref(), master.as_deref());
            // The watches say what is wrong with it.
            if let Ok(client) = api::measured_client(kubeconfig, master, metrics).await {
                publish(client, node_name, receiver).await;
            }
        });
    }
    Notices(sender)
}

async fn publish(client: Client, node_name: String, mut notices: Receiver<Notice>) {
    // The server refuses longer ones.
    let instance = node_name.chars().take(128).collect();
    let reporter = Reporter { controller: "nftproxy".into(), instance: Some(instance) };
    let recorder = Recorder::new(client, reporter);
    while let Some(notice) = notices.recv().await {
        let (reference, event) = event(&notice);
        match timeout(PATIENCE, recorder.publish(&event, &reference)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(error = %Causes(&error), "an Event was not taken"),
            Err(_) => tracing::debug!("an Event was not taken in time"),
        }
        sleep(PAUSE).await;
    }
}

fn event(notice: &Notice) -> (ObjectReference, Event) {
    let full = notice.service.as_str();
    let (namespace, name) = full.split_once('/').unwrap_or(("default", full));
    let reference = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Service".into()),
        namespace: Some(namespace.into()),
        name: Some(name.into()),
        // The uid is not kept; kube-proxy gives the name in its place, which `kubectl describe`
        // does not ask for.
        ..ObjectReference::default()
    };
    let event = Event {
        type_: EventType::Warning,
        reason: notice.reason.into(),
        note: Some(notice.note.chars().take(1000).collect()),
        action: notice.action.into(),
        secondary: None,
    };
    (reference, event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_about_the_service() {
        let (reference, event) = event(&Notice {
            service: NamespacedName::new("shop", "web"),
            reason: "FailedToStartServiceHealthcheck",
            action: "Listen",
            note: "x".repeat(2000),
        });
        assert_eq!(reference.namespace.as_deref(), Some("shop"));
        assert_eq!(reference.name.as_deref(), Some("web"));
        assert_eq!(event.note.map(|note| note.len()), Some(1000), "the server's limit is 1024");
    }
}
