//! What an operator can ask the running program, on the loopback beside the metrics: `/debug/…` for
//! commands and scripts, `/` to be read in a browser. Read-only.
//!
//! All of it is computed from a copy of the state ([`crate::inspect`]), one answer at a time, on threads
//! of its own. A page of another site that has its name resolved to a loopback address could read
//! these in a browser on this host, which is why they are given only to who asks by an address.

mod page;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use http::request::Parts;
use tokio::sync::Semaphore;

use super::Reply;
use crate::commands::explain::{self, Question};
use crate::commands::list::{self, Filter};
use crate::inspect::{Inspector, Objects, Snapshot};
use crate::journal::Journal;
use crate::model::Family;
use crate::nft::{json, text};
use crate::status::Status;

/// How long `/debug/recent` waits for news, at most.
const WAIT: Duration = Duration::from_secs(30);

/// How many wait at a time.
const WAITING: usize = 16;

/// What is known from the start on.
#[derive(Clone, Debug)]
pub struct About {
    /// The node's name.
    pub node: String,
    /// Where objects come from.
    pub source: String,
    /// Settings that are not defaults: path, value, who said so.
    pub settings: Vec<[String; 3]>,
}

/// Answers to operators.
pub(super) struct Debug {
    about: About,
    inspector: Inspector,
    journal: Arc<Journal>,
    waiting: Semaphore,
}

/// The parts of a query, the last one of each name.
type Query = BTreeMap<String, String>;

/// What is computed from a copy of the state.
type Answer = Box<dyn FnOnce(Snapshot) -> Reply + Send>;

impl Debug {
    pub(super) fn new(about: About, inspector: Inspector, journal: Arc<Journal>) -> Self {
        Self { about, inspector, journal, waiting: Semaphore::new(WAITING) }
    }

    /// The answer, if the path is one of these.
    pub(super) async fn reply(&self, status: &Status, request: &Parts) -> Option<Reply> {
        let path = request.uri.path();
        if path != "/" && !path.starts_with("/debug/") {
            return None;
        }
        if !matches!(request.method, Method::GET | Method::HEAD) {
            return Some(refused(405, "GET only: nothing can be changed here"));
        }
        if !is_asked_by_address(request) {
            return Some(refused(403, "ask by an address, as 127.0.0.1, or by localhost"));
        }
        let query = request.uri.query().unwrap_or("").as_bytes();
        let query: Query = form_urlencoded::parse(query).into_owned().collect();
        match path {
            "/debug/recent" => return Some(self.recent(status, &query).await),
            "/debug/log" => return Some(Reply::text(self.journal.text())),
            _ => {}
        }
        let answer = match self.answer(path, &query, status) {
            Ok(answer) => answer?,
            Err(words) => return Some(refused(400, &words)),
        };
        Some(match self.inspector.snapshot().await {
            Ok((snapshot, turn)) => {
                let computed = tokio::task::spawn_blocking(move || {
                    // Held until the answer is made, whoever has stopped to wait for it.
                    let _turn = turn;
                    answer(snapshot)
                });
                computed.await.unwrap_or_else(|_| refused(500, "the answer could not be made"))
            }
            Err(error) => {
                let mut reply = refused(503, &error.to_string());
                reply.headers.push(("retry-after", "1".into()));
                reply
            }
        })
    }

    /// How to make the answer; None if there is no such page.
    fn answer(&self, path: &str, query: &Query, status: &Status) -> Result<Option<Answer>, String> {
        let source = self.about.source.clone();
        Ok(Some(match path {
            "/" => {
                let page = page::Frame::new(self.about.clone(), status, query);
                Box::new(move |snapshot| page.reply(&snapshot))
            }
            "/debug/services" => {
                let filter = Filter {
                    namespace: query.get("namespace").cloned(),
                    service: query.get("service").cloned(),
                    address: parsed(query, "address", "an address")?,
                    wanted: true,
                };
                Box::new(move |snapshot| {
                    let kernel = kernel_words(&snapshot);
                    as_json(&list::of_daemon(&snapshot.state, &filter, source, kernel))
                })
            }
            "/debug/ruleset" => {
                let family = match query.get("family").map(String::as_str) {
                    None => None,
                    Some("ip") => Some(Family::V4),
                    Some("ip6") => Some(Family::V6),
                    Some(other) => return Err(format!("family={other}: expected ip or ip6")),
                };
                let in_json = match query.get("output").map(String::as_str) {
                    None | Some("text") => false,
                    Some("json") => true,
                    Some(other) => return Err(format!("output={other}: expected text or json")),
                };
                Box::new(move |mut snapshot| {
                    let wanted = snapshot.wanted();
                    let families = family.as_ref().map_or(&Family::BOTH[..], std::slice::from_ref);
                    if in_json {
                        as_json(&json::ruleset(&wanted, families))
                    } else {
                        Reply::text(text::tables(&wanted, families))
                    }
                })
            }
            "/debug/explain" => explanation(query)?,
            "/debug/objects" => {
                Box::new(move |snapshot| as_json(&Objects::of(&snapshot.state, source)))
            }
            _ => return Ok(None),
        }))
    }

    async fn recent(&self, status: &Status, query: &Query) -> Reply {
        let number = |name| parsed::<u64>(query, name, "a number");
        let (after, wait) = match (number("after"), number("wait")) {
            (Ok(after), Ok(wait)) => (after.unwrap_or(0), wait.unwrap_or(0)),
            (Err(words), _) | (_, Err(words)) => return refused(400, &words),
        };
        if wait > 0 {
            let Ok(_place) = self.waiting.try_acquire() else {
                return refused(503, "too many wait already");
            };
            let mut newest = status.recent.newest();
            let news = newest.wait_for(|newest| *newest > after);
            let wait = Duration::from_secs(wait).min(WAIT);
            // Without news in time, there are none.
            let _ = tokio::time::timeout(wait, news).await;
        }
        as_json(&status.recent.after(after))
    }
}

fn explanation(query: &Query) -> Result<Answer, String> {
    let Some(target) = parsed(query, "target", "ADDRESS:PORT[/PROTOCOL]")? else {
        return Err("target=ADDRESS:PORT[/PROTOCOL] is missing".into());
    };
    let question = Question {
        target,
        from: parsed(query, "from", "an address")?,
        interface: query.get("interface").cloned(),
        wanted: true,
    };
    question.check().map_err(|error| error.to_string())?;
    let in_text = query.get("output").is_some_and(|output| output == "text");
    Ok(Box::new(move |mut snapshot| {
        let wanted = snapshot.wanted();
        let origin = format!("what nftproxy on {} wants", snapshot.state.node_facts().name);
        let explanation = explain::of_daemon(snapshot.state, wanted, origin, &question);
        if in_text { Reply::text(explain::in_text(&explanation)) } else { as_json(&explanation) }
    }))
}

/// What a daemon can say of the kernel without asking it.
fn kernel_words(snapshot: &Snapshot) -> &'static str {
    if snapshot.is_stale {
        "not asked; the latest changes are not committed yet"
    } else {
        "not asked; everything is committed"
    }
}

/// A part of the query as a value. Nothing at all is as if it were not there: forms send that.
fn parsed<T: std::str::FromStr>(
    query: &Query,
    name: &str,
    what: &str,
) -> Result<Option<T>, String> {
    let text = query.get(name).map(|text| text.trim()).filter(|text| !text.is_empty());
    let value = text.map(|text| text.parse().map_err(|_| format!("{name}={text}: not {what}")));
    value.transpose()
}

fn is_asked_by_address(request: &Parts) -> bool {
    let Some(host) = request.headers.get("host") else { return true };
    let Ok(host) = host.to_str() else { return false };
    let Ok(authority) = host.parse::<http::uri::Authority>() else { return false };
    let name = authority.host().trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

fn refused(code: u16, words: &str) -> Reply {
    Reply::new(code, "text/plain; charset=utf-8", format!("{words}\n"))
}

fn as_json(value: &impl serde::Serialize) -> Reply {
    let text = serde_json::to_string(value).expect("plain values are JSON");
    let mut reply = Reply::new(200, "application/json", text + "\n");
    reply.headers.push(("cache-control", "no-store".into()));
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_sites_are_no_addresses() {
        let asked_by = |host: &str| {
            let request = http::Request::get("/").header("host", host).body(()).unwrap();
            is_asked_by_address(&request.into_parts().0)
        };
        for host in ["127.0.0.1:10249", "localhost", "LOCALHOST:1", "[::1]:10249", "192.0.2.1"] {
            assert!(asked_by(host), "{host}");
        }
        for host in ["evil.example:10249", "127.0.0.1.evil.example", "localhost.evil.example", ""] {
            assert!(!asked_by(host), "{host}");
        }
    }
}
