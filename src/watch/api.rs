//! The API server as a source of events.
//!
//! One task for each kind runs `kube`'s watcher, which lists, watches, resumes where a connection
//! broke off, and lists again when the server no longer knows that place. This module decides what
//! to ask for, turns what comes into [`Event`]s, and paces and explains failures.
//!
//! Lists come object by object, so that none is ever held as a whole. To `kube` they are streamed; on the
//! wire they are one list each, from the server's cache and compressed (`protobuf::list`), which costs it a
//! fraction of a stream. A server without protobuf is asked for streams, and where it has none, for lists.

mod beat;
mod connect;
mod incoming;
mod outage;
mod place;
mod protobuf;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, RandomState};
use std::ops::RangeInclusive;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::runtime::utils::Backoff as _;
use kube::runtime::watcher::{self, DefaultBackoff, watcher};
use kube::{Api, Client, Resource as _};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use self::connect::observed;
pub use self::connect::{ClientError, client, measured_clients, starts_programs};
use self::incoming::Incoming;
use self::outage::{Connection, Report, Trouble};
use self::place::Place;
use super::convert::{HEADLESS_LABEL, PROXY_NAME_LABEL, name_of, one_line};
use super::notices::Notices;
use super::{Causes, ProblemLog, Watched};
use crate::model::{Event, Kind, NamespacedName, Notice, Problem, Standing, Topic};

/// How long the server may be silent while it streams a list. One that does not know streaming takes
/// the request for a watch, and would be silent for ever after the first objects.
const STREAMING_PATIENCE: Duration = Duration::from_secs(30);

/// Failures in a row after which a watch is not resumed but begun anew. A server may never accept the
/// place where the watch stopped.
const RESUMPTIONS: u32 = 10;

/// What is watched.
pub const KINDS: usize = 4;

/// For how many seconds a watch is asked for; how many of these is left to chance, so that nodes that began
/// together do not ask together for ever. A stream that has not ended five seconds later leads nowhere,
/// however open its connection is: by HTTP/1 nothing else tells it from one of a kind that does not change.
pub const RENEWAL: RangeInclusive<u32> = 240..=300;

/// How long a kind that the server does not know is left alone.
const LONG_PAUSE: Duration = Duration::from_secs(300);

/// What all kinds share.
#[derive(Debug)]
struct Shared {
    connection: Arc<Connection>,
    /// Whether the server is believed to stream lists.
    streams: AtomicBool,
    renewal: RangeInclusive<u32>,
    notices: Notices,
}

impl Default for Shared {
    fn default() -> Self {
        let notices = Notices::default();
        let streams = AtomicBool::new(true);
        Self { connection: Arc::default(), streams, renewal: RENEWAL, notices }
    }
}

impl Shared {
    /// Said once, by whichever kind notices first.
    fn stop_streaming(&self, reason: &str) {
        if self.streams.swap(false, Ordering::Relaxed) {
            tracing::info!(reason, "the API server does not stream lists; using ordinary ones");
        }
    }
}

/// Watches all kinds and sends what happens, until the receiver is gone. Dropping the future stops
/// the watches. Owners of Services are given notice of what makes no sense. Each kind has a client of its
/// own, which must not share connections with others, and asks for `renewal` seconds at a time.
pub async fn run(
    clients: [Client; KINDS],
    node_name: String,
    renewal: RangeInclusive<u32>,
    events: mpsc::Sender<Event>,
    notices: Notices,
) {
    let shared = Arc::new(Shared { renewal, notices, ..Shared::default() });
    let node_name: Arc<str> = node_name.into();
    let mut watches = JoinSet::new();
    let [services, slices, cidrs, nodes] = clients;
    watches.spawn(Watch::<Service>::new(&services, &node_name, &shared, &events).run());
    watches.spawn(Watch::<EndpointSlice>::new(&slices, &node_name, &shared, &events).run());
    watches.spawn(Watch::<ServiceCIDR>::new(&cidrs, &node_name, &shared, &events).run());
    watches.spawn(Watch::<Node>::new(&nodes, &node_name, &shared, &events).run());
    drop((services, slices, cidrs, nodes, shared, events));
    while let Some(ended) = watches.join_next().await {
        if let Err(error) = ended
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

/// The receiver of the events is gone, and with it the reason to watch.
struct Closed;

/// How a watch goes on after an error.
enum Next {
    /// Where it was.
    Resume,
    /// With a listing.
    Anew,
}

/// The watch of one kind.
struct Watch<K> {
    api: Api<Incoming<K>>,
    node_name: Arc<str>,
    shared: Arc<Shared>,
    report: Arc<Report>,
    events: mpsc::Sender<Event>,
    problems: ProblemLog,
    /// Objects whose problems the owner of a Service was given notice of.
    noticed: BTreeMap<NamespacedName, NamespacedName>,
    /// Those of them that the present list has not named.
    unlisted: BTreeSet<NamespacedName>,
    backoff: DefaultBackoff,
    /// Errors since something last worked.
    failures: u32,
    /// Times in a row that the server said that the kind is not for us.
    denials: u32,
    place: Arc<Place>,
    /// The consumer was told that the kind cannot be had.
    unavailable: bool,
}

/// How far the present watcher has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The server has not answered yet.
    Asking,
    /// The list is begun, and nothing of it was seen.
    Begun,
    /// The list is coming.
    Listing,
    /// The list is complete; changes are coming.
    Watching,
}

impl<K: Watched> Watch<K> {
    fn new(
        client: &Client,
        node_name: &Arc<str>,
        shared: &Arc<Shared>,
        events: &mpsc::Sender<Event>,
    ) -> Self {
        let report = Arc::new(Report::new(
            K::KIND,
            K::group(&()).into_owned(),
            K::plural(&()).into_owned(),
            shared.connection.clone(),
        ));
        let place = Arc::new(Place::default());
        Self {
            api: Api::all(observed(client.clone(), report.clone(), place.clone())),
            node_name: node_name.clone(),
            shared: shared.clone(),
            report,
            events: events.clone(),
            problems: ProblemLog::default(),
            noticed: BTreeMap::new(),
            unlisted: BTreeSet::new(),
            backoff: DefaultBackoff::default(),
            failures: 0,
            denials: 0,
            place,
            unavailable: false,
        }
    }

    async fn run(mut self) {
        // Each turn is a new watcher, which begins by listing.
        while self.watch().await.is_ok() {}
    }

    /// What to ask the server for.
    fn config(&self, streaming: bool) -> watcher::Config {
        let renewal = &self.shared.renewal;
        let spread = u64::from(renewal.end() - renewal.start()) + 1;
        // The keys are random, which is all that is asked for.
        let chance = RandomState::new().hash_one(K::KIND) % spread;
        let seconds = renewal.start() + u32::try_from(chance).unwrap_or(0);
        let config = watcher::Config::default().timeout(seconds);
        let config = match K::KIND {
            Kind::Service => {
                config.labels(&format!("!{PROXY_NAME_LABEL}")).fields("spec.clusterIP!=None")
            }
            Kind::EndpointSlice => config.labels(&format!("!{HEADLESS_LABEL}")),
            Kind::ServiceCidr => config,
            Kind::Node => config.fields(&format!("metadata.name={}", self.node_name)),
        };
        if streaming {
            config.streaming_lists()
        } else {
            // Without a limit: a server answers "any version, 500 at a time" from its database,
            // and "any version" from its cache.
            watcher::Config { page_size: None, ..config.any_semantic() }
        }
    }

    /// One watcher, until the watch has to begin anew.
    async fn watch(&mut self) -> Result<(), Closed> {
        let streaming = self.shared.streams.load(Ordering::Relaxed);
        let mut stream = pin!(watcher(self.api.clone(), self.config(streaming)));
        let mut phase = Phase::Asking;
        loop {
            let patience = if streaming && matches!(phase, Phase::Begun | Phase::Listing) {
                STREAMING_PATIENCE
            } else {
                Duration::MAX
            };
            let next = tokio::select! {
                next = tokio::time::timeout(patience, stream.next()) => next,
                () = self.events.closed() => return Err(Closed),
            };
            match next {
                Err(_) => {
                    self.shared.stop_streaming("no end of the list within 30 s of silence");
                    return Ok(());
                }
                // The watcher's stream has no end.
                Ok(None) => return Ok(()),
                Ok(Some(Ok(event))) => self.accept(event, &mut phase).await?,
                Ok(Some(Err(error))) => match self.failed(&error, phase, streaming).await? {
                    Next::Resume => {}
                    Next::Anew => return Ok(()),
                },
            }
        }
    }

    async fn accept(
        &mut self,
        event: watcher::Event<Incoming<K>>,
        phase: &mut Phase,
    ) -> Result<(), Closed> {
        match event {
            watcher::Event::Init => {
                if matches!(phase, Phase::Begun | Phase::Listing) {
                    self.report.failed(&Trouble::CutShort);
                }
                *phase = Phase::Begun;
            }
            watcher::Event::InitApply(object) => {
                self.begin_listing(phase).await?;
                self.deliver(object).await?;
            }
            watcher::Event::InitDone => {
                self.begin_listing(phase).await?;
                *phase = Phase::Watching;
                self.unavailable = false;
                self.works();
                // They went while nobody was told.
                for name in std::mem::take(&mut self.unlisted) {
                    self.problems.report(&format!("{} {name}", K::KIND), &[]);
                    self.forget(&name);
                }
                self.send(Event::Listed(K::KIND)).await?;
            }
            watcher::Event::Apply(object) => {
                self.works();
                self.place.passed(object.meta(), false);
                self.deliver(object).await?;
            }
            watcher::Event::Delete(object) => {
                self.works();
                self.place.passed(object.meta(), true);
                if let Ok(name) = name_of(K::KIND, object.meta()) {
                    self.problems.report(&format!("{} {name}", K::KIND), &[]);
                    self.forget(&name);
                    self.send(Event::Gone(K::KIND, name)).await?;
                }
            }
        }
        Ok(())
    }

    /// The watcher says that a list begins before it has asked for it, and says it again at every
    /// attempt; it is passed on when there is an answer.
    async fn begin_listing(&mut self, phase: &mut Phase) -> Result<(), Closed> {
        if *phase != Phase::Listing {
            *phase = Phase::Listing;
            self.unlisted = self.noticed.keys().cloned().collect();
            self.send(Event::Listing(K::KIND)).await?;
        }
        Ok(())
    }

    fn works(&mut self) {
        self.report.works();
        self.denials = 0;
        if self.failures > 0 {
            self.failures = 0;
            self.backoff.reset();
        }
    }

    async fn send(&self, event: Event) -> Result<(), Closed> {
        self.events.send(event).await.map_err(|_| Closed)
    }

    /// Converts an object and passes it on. One that cannot be decoded is left as it is known.
    async fn deliver(&mut self, object: Incoming<K>) -> Result<(), Closed> {
        let name = name_of(K::KIND, object.meta());
        if let Ok(name) = &name {
            self.unlisted.remove(name);
        }
        let key = match &name {
            Ok(name) => format!("{} {name}", K::KIND),
            Err(problem) => problem.object.clone(),
        };
        let object = match object {
            Incoming::Decoded(object) => object,
            Incoming::Undecodable(fault) => {
                let problem = Problem {
                    object: key.clone(),
                    field: fault.field,
                    message: format!(
                        "{}; what was known of the object stays in force",
                        one_line(&fault.message)
                    ),
                };
                self.problems.report(&key, std::slice::from_ref(&problem));
                return match name {
                    Ok(name) if K::KIND == Kind::Service => {
                        self.notice(&name, &name, &[problem]);
                        self.send(Event::Unreadable(K::KIND, name)).await
                    }
                    Ok(name) => self.send(Event::Unreadable(K::KIND, name)).await,
                    Err(_) => Ok(()),
                };
            }
        };
        let (event, problems) = object.event(&self.node_name);
        drop(object);
        self.problems.report(&key, &problems);
        if let Ok(name) = &name {
            match &event {
                Some(Event::EndpointSlice(slice)) => self.notice(name, &slice.service, &problems),
                _ if K::KIND == Kind::Service => self.notice(name, name, &problems),
                _ => {}
            }
        }
        match (event, name) {
            (Some(event), _) => self.send(event).await,
            (None, Ok(name)) => self.send(Event::Gone(K::KIND, name)).await,
            (None, Err(_)) => Ok(()),
        }
    }

    /// Tells the owner of a Service what makes no sense in an object of it, or no longer does.
    fn notice(&mut self, object: &NamespacedName, service: &NamespacedName, problems: &[Problem]) {
        if self.noticed.get(object).is_some_and(|before| before != service) {
            self.forget(object);
        }
        let standing = if problems.is_empty() {
            if self.noticed.remove(object).is_none() {
                return;
            }
            Standing::Over
        } else {
            if self.noticed.len() >= ProblemLog::LIMIT {
                return;
            }
            self.noticed.insert(object.clone(), service.clone());
            // The Service is what it is about; other objects have to be named.
            let said = |problem: &Problem| match (&*problem.field, K::KIND) {
                ("", Kind::Service) => problem.message.clone(),
                (field, Kind::Service) => format!("{field}: {}", problem.message),
                _ => problem.to_string(),
            };
            Standing::Is(problems.iter().map(said).collect())
        };
        let part = part(K::KIND, object);
        let notice = Notice::new(service.clone(), Topic::Invalid, standing);
        self.shared.notices.give(Notice { part, ..notice });
    }

    /// An object is gone, or another Service's.
    fn forget(&mut self, object: &NamespacedName) {
        let Some(service) = self.noticed.remove(object) else { return };
        let standing = if K::KIND == Kind::Service { Standing::Gone } else { Standing::Over };
        let part = part(K::KIND, object);
        self.shared.notices.give(Notice { part, ..Notice::new(service, Topic::Invalid, standing) });
    }

    /// Says what went wrong, waits, and decides how to go on.
    async fn failed(
        &mut self,
        error: &watcher::Error,
        phase: Phase,
        streaming: bool,
    ) -> Result<Next, Closed> {
        let connection = self.shared.connection.clone();
        let back = connection.back();
        let trouble = Trouble::of(error);
        if streaming && phase != Phase::Watching && trouble.refuses_streaming() {
            self.shared.stop_streaming(&one_line(&error.to_string()));
            return Ok(Next::Anew);
        }
        let denied = matches!(trouble, Trouble::Forbidden(_) | Trouble::NotServed);
        self.denials = if denied { self.denials + 1 } else { 0 };
        // A server that starts says so of what it grants and serves a moment later.
        let hasty = self.denials == 1;
        if hasty {
            self.backoff.reset();
        }
        match &trouble {
            // Connections do break; a watch goes on where it was, or the next request says why not.
            Trouble::BrokenOff(error) if phase == Phase::Watching => {
                tracing::debug!(kind = %K::KIND, error = %Causes(*error), "the watch broke off");
            }
            _ if hasty => tracing::debug!(kind = %K::KIND, %error, "denied once"),
            trouble => self.report.failed(trouble),
        }
        let optional = matches!(K::KIND, Kind::ServiceCidr | Kind::Node);
        if optional && denied && !hasty && !self.unavailable {
            self.unavailable = true;
            self.send(Event::Unavailable(K::KIND)).await?;
        }

        self.failures += 1;
        // What may have been said last after an outage that made tries rare.
        if phase == Phase::Watching && matches!(trouble, Trouble::Expired) {
            self.backoff.reset();
        }
        let mut pause = self.backoff.next().unwrap_or(LONG_PAUSE);
        // All servers have the other kinds.
        if K::KIND == Kind::ServiceCidr && matches!(trouble, Trouble::NotServed) && !hasty {
            pause = LONG_PAUSE;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = back, if matches!(trouble, Trouble::Unreachable(_)) => self.backoff.reset(),
            () = self.events.closed() => return Err(Closed),
        }
        // A broken list must not be completed: what was lost from it would count as gone. A change
        // that could not be read is lost, too. And 410 in answer to a request, rather than in the
        // stream, is not understood by the watcher.
        let broken_list = matches!(phase, Phase::Begun | Phase::Listing);
        let lost = matches!(trouble, Trouble::Expired | Trouble::Undecodable(_) | Trouble::NoEvent);
        if broken_list || lost || self.failures.is_multiple_of(RESUMPTIONS) {
            return Ok(Next::Anew);
        }
        Ok(Next::Resume)
    }
}

/// What a notice about an object is told from others of the same Service by.
fn part(kind: Kind, object: &NamespacedName) -> String {
    if kind == Kind::Service { String::new() } else { object.to_string() }
}

#[cfg(test)]
mod tests;
