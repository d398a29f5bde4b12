//! Port 10249: metrics, what dashboards and tests of kube-proxy ask beside them, and, on the loopback,
//! what operators ask.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;

use super::debug::Debug;
use super::{Answers, Inside, Reply};
use crate::metrics::CONTENT_TYPE;
use crate::model::Family;
use crate::nft::netlink::affinity_fill;
use crate::status::Status;

/// The kernel's maps are not looked at more often than this, however many scrape.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The counters of connections are looked at no less often than this: they stay for an hour.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(10 * 60);

/// How long it may take to look at the affinity maps.
const LOOK_FOR: Duration = Duration::from_millis(100);

/// Keeps looking, for as long as nobody scrapes: the kernel's counters of connections age.
pub(super) async fn keep_looking<T>(status: Arc<Status>) -> T {
    loop {
        tokio::time::sleep(LOOK_AT_LEAST_EVERY).await;
        tokio::task::block_in_place(|| status.look_at_connections());
    }
}

pub(super) struct Pages {
    status: Arc<Status>,
    /// None where others than this host could read it.
    inside: Option<(String, Debug)>,
    looked: Mutex<Option<Instant>>,
}

impl Pages {
    pub(super) fn new(status: Arc<Status>, inside: Inside, address: SocketAddr) -> Self {
        let Inside { configz, about, inspector, journal } = inside;
        let inside = address.ip().is_loopback();
        let inside = inside.then(|| (configz, Debug::new(about, inspector, journal)));
        Self { status, inside, looked: Mutex::new(None) }
    }

    fn metrics(&self) -> String {
        // Whoever comes while somebody looks gets what was seen last.
        if let Ok(mut looked) = self.looked.try_lock()
            && looked.is_none_or(|at| at.elapsed() >= LOOK_EVERY)
        {
            *looked = Some(Instant::now());
            self.look();
        }
        self.status.metrics.text()
    }

    /// Looks at what only the kernel knows.
    fn look(&self) {
        self.status.look_at_connections();
        let int = |count| i64::try_from(count).unwrap_or(i64::MAX);
        match affinity_fill(LOOK_FOR) {
            Ok(fills) => {
                for (family, fill) in Family::BOTH.into_iter().zip(fills) {
                    let gauges = self.status.metrics.own.affinity.of(family);
                    gauges.maps.set(int(fill.maps));
                    gauges.entries.set(int(fill.entries));
                    gauges.fullest.set(fill.ratio());
                }
            }
            Err(error) => debug!(%error, "the affinity maps cannot be looked at"),
        }
    }
}

impl Answers for Pages {
    fn reply(&self, path: &str) -> Reply {
        match path {
            // A hundred kilobytes of text: not on the time of the watches.
            "/metrics" => {
                Reply::new(200, CONTENT_TYPE, tokio::task::block_in_place(|| self.metrics()))
            }
            "/healthz" => Reply::text("ok"),
            "/proxyMode" => Reply::text("nftables"),
            "/configz" => self.inside.as_ref().map_or_else(Reply::not_found, |(text, _)| {
                Reply::new(200, "application/json", text.clone())
            }),
            _ => Reply::not_found(),
        }
    }

    async fn answer(&self, request: &http::request::Parts) -> Reply {
        if let Some((_, debug)) = &self.inside
            && let Some(reply) = debug.reply(&self.status, request).await
        {
            return reply;
        }
        self.reply(request.uri.path())
    }
}
