//! What the log is told when the API server does not do as asked.
//!
//! Retries go on for as long as an outage lasts, four kinds at a time; the log wants one line when
//! something breaks and one when it works again. A watch that is back says nothing by itself until
//! the next change, so recovery is read off the HTTP responses.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kube::core::Status;
use kube::runtime::watcher;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::Instant;

use crate::model::Kind;
use crate::watch::Causes;
use crate::watch::convert::one_line;

/// How often a standing complaint is repeated.
const REPEAT: Duration = Duration::from_secs(60);

/// What went wrong with a request, as far as it makes a difference.
pub(super) enum Trouble<'a> {
    /// 401: who we are was not believed.
    Unauthenticated(&'a Status),
    /// 403: we may not.
    Forbidden(&'a Status),
    /// 404: the server does not know the kind.
    NotServed,
    /// 410: too long away; everything is listed again.
    Expired,
    /// The server answered something else.
    Answered(&'a Status),
    /// The server said so inside of an answer that began well.
    Told(&'a Status),
    /// The answer made no sense.
    Undecodable(&'a (dyn std::error::Error + Send + Sync)),
    /// Something came that is no event.
    NoEvent,
    /// There was no answer.
    Unreachable(&'a kube::Error),
    /// An answer broke off. Whether the server is gone shows at the next request.
    BrokenOff(&'a kube::Error),
    /// The server ended a list before it was complete.
    CutShort,
}

impl<'a> Trouble<'a> {
    /// What an error of the watcher means.
    pub(super) fn of(error: &'a watcher::Error) -> Self {
        match error {
            watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error) => {
                match error {
                    kube::Error::Api(status) => Self::of_status(status),
                    kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) => {
                        Self::Undecodable(error)
                    }
                    _ => Self::Unreachable(error),
                }
            }
            watcher::Error::WatchFailed(error) => match error {
                kube::Error::Api(status) => Self::of_told(status),
                kube::Error::SerdeError(_) => Self::Undecodable(error),
                _ => Self::BrokenOff(error),
            },
            watcher::Error::WatchError(status) => Self::of_told(status),
            watcher::Error::NoResourceVersion => Self::Undecodable(error),
        }
    }

    fn of_told(status: &'a Status) -> Self {
        match status.code {
            410 => Self::Expired,
            // The client takes any JSON object that is no event for a status, of which all is optional.
            0 => Self::NoEvent,
            _ => Self::Told(status),
        }
    }

    fn of_status(status: &'a Status) -> Self {
        match status.code {
            401 => Self::Unauthenticated(status),
            403 => Self::Forbidden(status),
            404 => Self::NotServed,
            410 => Self::Expired,
            _ => Self::Answered(status),
        }
    }

    /// Whether this is how a server says that it does not stream lists: the request has a parameter
    /// it does not know or does not allow.
    pub(super) fn refuses_streaming(&self) -> bool {
        matches!(self, Self::Answered(status) if matches!(status.code, 400 | 405 | 406 | 422 | 501))
    }

    /// Whether the answer began well, so that another one that begins well is no news.
    fn in_answer(&self) -> bool {
        matches!(
            self,
            Self::Told(_)
                | Self::Undecodable(_)
                | Self::NoEvent
                | Self::BrokenOff(_)
                | Self::CutShort
        )
    }
}

/// The connection all kinds share.
#[derive(Debug, Default)]
pub(super) struct Connection {
    lost: Mutex<Option<Instant>>,
    back: Notify,
}

impl Connection {
    /// Ends when the server answers for the first time after an outage, from the call on. Whoever
    /// waits for a try of its own need not wait longer.
    pub(super) fn back(&self) -> Notified<'_> {
        self.back.notified()
    }

    fn lost(&self, error: &kube::Error) {
        let mut lost = locked(&self.lost);
        if lost.is_none() {
            *lost = Some(Instant::now());
            tracing::warn!(
                error = %Causes(error),
                "no answer from the API server; what is programmed stays, and it is tried again"
            );
        }
    }

    fn answered(&self) {
        let since = locked(&self.lost).take();
        if let Some(since) = since {
            self.back.notify_waiters();
            tracing::info!(after = ?since.elapsed(), "the API server answers again");
        }
    }
}

/// What was last said about one kind.
struct Complaint {
    text: String,
    said: Instant,
    stands: bool,
    in_answer: bool,
}

/// What the log knows about the watch of one kind.
pub(super) struct Report {
    kind: Kind,
    group: String,
    plural: String,
    connection: Arc<Connection>,
    complaint: Mutex<Option<Complaint>>,
}

impl Report {
    pub(super) fn new(
        kind: Kind,
        group: String,
        plural: String,
        connection: Arc<Connection>,
    ) -> Self {
        Self { kind, group, plural, connection, complaint: Mutex::new(None) }
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// The server answered; `good` if it began to do as asked.
    pub(super) fn answered(&self, good: bool) {
        self.connection.answered();
        if good {
            self.settled(false);
        }
    }

    /// What was asked for came.
    pub(super) fn works(&self) {
        self.settled(true);
    }

    fn settled(&self, in_answer: bool) {
        let mut complaint = locked(&self.complaint);
        let standing = complaint.as_mut().filter(|c| c.stands && (in_answer || !c.in_answer));
        if let Some(complaint) = standing {
            complaint.stands = false;
            tracing::info!(kind = %self.kind, "the API server serves the kind again");
        }
    }

    /// Says what went wrong, if that is news or was said long ago.
    pub(super) fn failed(&self, trouble: &Trouble<'_>) {
        let Self { kind, group, plural, .. } = self;
        let text = match trouble {
            Trouble::Unreachable(error) => return self.connection.lost(error),
            Trouble::Expired => {
                tracing::debug!(%kind, "the watch is too far behind; listing again");
                return;
            }
            Trouble::Unauthenticated(status) => format!(
                "the API server does not accept our credentials (401: {}); check the service \
                 account or the kubeconfig",
                status.message
            ),
            Trouble::Forbidden(status) => format!(
                "not allowed to list or watch {plural} (403: {}); the ClusterRole needs \
                 {{apiGroups: [{group:?}], resources: [{plural:?}], verbs: [\"list\", \"watch\"]}}",
                status.message
            ),
            Trouble::NotServed if *kind == Kind::ServiceCidr => {
                "the API server has no ServiceCIDRs (networking.k8s.io/v1, Kubernetes 1.33); \
                 packets to unallocated ClusterIPs are not dropped"
                    .to_owned()
            }
            Trouble::NotServed => format!("the API server does not know {plural} (404)"),
            Trouble::Answered(status) | Trouble::Told(status) => {
                format!("the API server answered {}: {}", status.code, status.message)
            }
            Trouble::Undecodable(error) => format!("an answer could not be decoded: {error}"),
            Trouble::NoEvent => "the API server sent something that is no event".to_owned(),
            Trouble::BrokenOff(error) => format!("an answer broke off: {}", Causes(*error)),
            Trouble::CutShort => "the API server ended a list before it was complete".to_owned(),
        };
        let text = one_line(&text);
        let mut complaint = locked(&self.complaint);
        let now = Instant::now();
        if let Some(last) = complaint.as_mut().filter(|last| last.text == text) {
            // A missing API does not come back before the server is upgraded.
            let once = matches!(trouble, Trouble::NotServed);
            if once || now.duration_since(last.said) < REPEAT {
                return;
            }
        }
        tracing::warn!(%kind, "{text}");
        let in_answer = trouble.in_answer();
        *complaint = Some(Complaint { text, said: now, stands: true, in_answer });
    }
}

/// A poisoned lock only means that a log line was interrupted.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
