//! The program's HTTP servers: probes, metrics, what load balancers ask about single Services, and what
//! operators ask about all of it.
//!
//! Every answer is made of what is in memory, and, but for those to operators, at once. A server whose port cannot be bound keeps
//! trying and says so once: a proxy without its health port still moves packets, so that this is
//! never a reason to stop it, unless the user wants that (`bindAddressHardFail`). Anybody can reach
//! most of these ports, so a client gets neither the time nor the number of connections to do harm.

mod debug;
mod health;
mod health_check;
mod listener;
mod metrics;

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;

pub use debug::About;
pub use health_check::{ListenFailure, serve as serve_health_checks};
pub use listener::BindError;

use crate::inspect::Inspector;
use crate::journal::Journal;
use crate::status::{HealthCheckChange, Status};

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// `/healthz` and `/livez`; None for nowhere.
    pub healthz: Option<SocketAddr>,
    /// `/metrics`; None for nowhere.
    pub metrics: Option<SocketAddr>,
    /// Whether the program ends if it cannot.
    pub hard_fail: bool,
}

/// What only this host may read, on the loopback.
#[derive(Clone, Debug)]
pub struct Inside {
    /// The text of `/configz`.
    pub configz: String,
    /// What the status page begins with.
    pub about: About,
    /// Looks into the program.
    pub inspector: Inspector,
    /// The last lines of the log.
    pub journal: Arc<Journal>,
}

/// Serves until it is aborted; returns only if a port cannot be bound and that is a reason to end.
pub async fn serve(
    listen: Listen,
    status: Arc<Status>,
    inside: Inside,
    changes: UnboundedReceiver<HealthCheckChange>,
    failures: impl FnMut(ListenFailure) + Send + 'static,
) -> BindError {
    let Listen { healthz, metrics, hard_fail } = listen;
    let mut servers = JoinSet::new();
    if let Some(address) = healthz {
        let pages = health::Pages { status: status.clone() };
        servers.spawn(listener::keep(
            "health",
            address,
            hard_fail,
            status.stopping(),
            Arc::new(pages),
        ));
    }
    if let Some(address) = metrics {
        let pages = Arc::new(self::metrics::Pages::new(status.clone(), inside, address));
        servers.spawn(listener::keep("metrics", address, hard_fail, status.stopping(), pages));
    }
    // Also if nobody can ask: what commits leave to be counted would pile up.
    servers.spawn(self::metrics::keep_looking(status.clone()));
    let health_checks = serve_health_checks(status, changes, failures);
    servers.spawn(async move {
        health_checks.await;
        std::future::pending().await
    });
    loop {
        match servers.join_next().await {
            Some(Ok(error)) => return error,
            Some(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Some(Err(_)) => {}
            None => std::future::pending().await,
        }
    }
}

/// An answer: status, header lines, body.
#[derive(Debug)]
struct Reply {
    code: u16,
    headers: Vec<(&'static str, String)>,
    body: String,
}

impl Reply {
    fn new(code: u16, content_type: &str, body: impl Into<String>) -> Self {
        let headers = vec![
            ("content-type", content_type.to_owned()),
            ("x-content-type-options", "nosniff".to_owned()),
        ];
        Self { code, headers, body: body.into() }
    }

    fn text(body: impl Into<String>) -> Self {
        Self::new(200, "text/plain; charset=utf-8", body)
    }

    fn answer(answer: crate::health::Answer) -> Self {
        Self::new(if answer.good { 200 } else { 503 }, "application/json", answer.body)
    }

    fn not_found() -> Self {
        Self::new(404, "text/plain; charset=utf-8", "404 page not found\n")
    }
}

/// What a server answers with.
trait Answers: Send + Sync + 'static {
    /// At once, whatever the method.
    fn reply(&self, path: &str) -> Reply;

    /// The same for a server that has more to look at than the path, or to wait for something.
    fn answer(&self, request: &http::request::Parts) -> impl Future<Output = Reply> + Send {
        std::future::ready(self.reply(request.uri.path()))
    }
}
