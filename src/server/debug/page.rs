//! The status page: what a person wants to see first, in one file that needs nothing else.

use std::borrow::Borrow;

use askama::Template;
use jiff::Timestamp;

use super::{About, Query};
use crate::commands::list::{self, Filter, PortRow};
use crate::inspect::Snapshot;
use crate::model::Kind;
use crate::recent::BatchRow;
use crate::server::Reply;
use crate::status::Status;

/// Service ports on one page; more are on further ones.
const PORTS: usize = 200;

/// Endpoints of a port that are named.
const ENDPOINTS: usize = 100;

/// Batches that are shown.
const BATCHES: usize = 8;

/// Repairs that are shown, and other lists that can be long.
const LISTED: usize = 20;

/// Nothing of the page itself may load or run anything.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; \
                      base-uri 'none'; frame-ancestors 'none'";

/// All of the page but what is computed from a copy of the state.
pub(super) struct Frame {
    about: About,
    health: Health,
    started: Timestamp,
    batches: Vec<BatchRow>,
    /// What to look for in names and addresses.
    search: String,
    /// The page, from 1 on.
    number: usize,
}

struct Health {
    healthy: bool,
    eligible: bool,
    last_commit: Option<Timestamp>,
}

#[derive(Template)]
#[template(path = "status.html")]
struct Page<'a> {
    version: &'a str,
    about: &'a About,
    health: &'a Health,
    now: String,
    running: String,
    last_commit: String,
    is_stale: bool,
    services: usize,
    slices: usize,
    batches: Vec<&'a BatchRow>,
    repairs: Vec<&'a BatchRow>,
    set_aside: Vec<String>,
    problems: Vec<String>,
    more_problems: usize,
    search: &'a str,
    ports: usize,
    found: usize,
    first: usize,
    rows: &'a [PortRow],
    number: usize,
    pages: usize,
}

impl Frame {
    pub(super) fn new(about: About, status: &Status, query: &Query) -> Self {
        let recent = status.recent.after(0);
        let health = Health {
            healthy: status.is_healthy(),
            eligible: status.is_eligible(),
            last_commit: status.last_commit(),
        };
        Self {
            about,
            health,
            started: recent.started,
            batches: recent.batches,
            search: query.get("q").map(|text| text.trim().to_owned()).unwrap_or_default(),
            number: query.get("page").and_then(|text| text.parse().ok()).unwrap_or(1),
        }
    }

    pub(super) fn reply(&self, snapshot: &Snapshot) -> Reply {
        let text = self.text(snapshot);
        let mut reply = Reply::new(200, "text/html; charset=utf-8", text);
        reply.headers.push(("content-security-policy", POLICY.to_owned()));
        reply.headers.push(("referrer-policy", "no-referrer".to_owned()));
        reply.headers.push(("cache-control", "no-store".to_owned()));
        reply
    }

    fn text(&self, snapshot: &Snapshot) -> String {
        let Snapshot { state, set_aside, problems, is_stale } = snapshot;
        let listing = list::of_daemon(state, &Filter::default(), String::new(), "");
        let mut rows = listing.services;
        rows.retain(|row| self.finds(row));
        let found = rows.len();
        let pages = found.div_ceil(PORTS).max(1);
        let number = self.number.clamp(1, pages);
        let first = (number - 1) * PORTS;
        let shown = &rows[first..found.min(first + PORTS)];
        let now = Timestamp::now();
        let newest = || self.batches.iter().rev();
        let page = Page {
            version: env!("CARGO_PKG_VERSION"),
            about: &self.about,
            health: &self.health,
            now: clock(now),
            running: ago(self.started, now),
            last_commit: self
                .health
                .last_commit
                .map_or_else(|| "none yet".to_owned(), |at| format!("{} ago", ago(at, now))),
            is_stale: *is_stale,
            services: state.count(Kind::Service),
            slices: state.count(Kind::EndpointSlice),
            batches: newest().take(BATCHES).collect(),
            repairs: newest().filter(|batch| batch.cause == "repair").take(LISTED).collect(),
            set_aside: set_aside.iter().map(ToString::to_string).collect(),
            problems: problems.iter().take(LISTED).map(ToString::to_string).collect(),
            more_problems: problems.len().saturating_sub(LISTED),
            search: &self.search,
            ports: listing.ports,
            found,
            first,
            rows: shown,
            number,
            pages,
        };
        page.render().expect("writing to a string does not fail")
    }

    fn finds(&self, row: &PortRow) -> bool {
        let has = |text: &str| text.contains(&self.search);
        self.search.is_empty()
            || has(&row.service)
            || row.frontends.iter().any(|frontend| has(&frontend.frontend))
            || row.endpoints.iter().any(|endpoint| has(&endpoint.endpoint))
    }
}

/// The link to another page of the same search.
fn link(search: &str, number: usize) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    if !search.is_empty() {
        query.append_pair("q", search);
    }
    query.append_pair("page", &number.to_string());
    format!("?{}#services", query.finish())
}

fn clock(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// The time of a day.
fn time(at: &Timestamp) -> String {
    at.strftime("%H:%M:%S%.3f").to_string()
}

/// A length of time, in the largest unit or two.
fn ago(from: Timestamp, to: Timestamp) -> String {
    let seconds = to.duration_since(from).as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86400, seconds % 86400 / 3600),
    }
}

/// `1 operation`, `2 operations`.
fn counted(number: impl Borrow<usize>, what: &str) -> String {
    let number = *number.borrow();
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// How many of a port's endpoints can be met at all.
fn answering(row: &PortRow) -> usize {
    row.endpoints.iter().filter(|e| e.serves_cluster || e.serves_local).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_are_short() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let lengths = [0, 59, 60, 3600, 90_061].map(|seconds| ago(at(0), at(seconds)));
        assert_eq!(lengths, ["0 s", "59 s", "1 min", "1 h 0 min", "1 d 1 h"]);
        assert_eq!(ago(at(9), at(0)), "0 s");
        assert_eq!(time(&at(61)), "00:01:01.000");
    }

    #[test]
    fn a_search_stays_in_the_links() {
        assert_eq!(link("", 2), "?page=2#services");
        assert_eq!(link("a&b <", 3), "?q=a%26b+%3C&page=3#services");
    }
}
