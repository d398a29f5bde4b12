//! Whether this proxy and its node are fit to be sent traffic, and how that is said.
//!
//! The answers are those of kube-proxy, to the byte, because load balancers and probes read them.
//! Pure: what is known and what time it is are arguments.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::model::{Family, NamespacedName, NodeFacts};

/// How far programming has come in a family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// For how long the oldest change has been waiting; None if none is.
    pub waiting: Option<Duration>,
    /// When the last commit was.
    pub committed: Option<Timestamp>,
}

impl Progress {
    /// A proxy that has nothing to do is healthy, however long ago it did something, and so is one
    /// that has not begun.
    #[must_use]
    pub fn is_healthy(&self, patience: Duration) -> bool {
        self.waiting.is_none_or(|waiting| waiting < patience)
    }
}

/// How long a change may wait: two tries at the longest distance of one.
#[must_use]
pub fn patience(sync_period: Duration) -> Duration {
    sync_period * 2
}

/// Whether load balancers may send new traffic to the node. None: there is no Node object.
#[must_use]
pub fn is_eligible(node: Option<&NodeFacts>) -> bool {
    node.is_some_and(|node| !node.leaving)
}

/// What is answered to a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// 200 if so, else 503.
    pub good: bool,
    /// JSON.
    pub body: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    status: BTreeMap<&'static str, FamilyBody>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyBody {
    last_updated: String,
    healthy: bool,
}

/// The answer of `/healthz`, or without `eligible` of `/livez`: it is on `/healthz` that traffic
/// depends, and on `/livez` whether the process is started anew.
#[must_use]
pub fn answer(
    families: &[(Family, Progress)],
    patience: Duration,
    eligible: Option<bool>,
    now: Timestamp,
) -> Answer {
    let healthy = families.iter().all(|(_, progress)| progress.is_healthy(patience));
    let good = healthy && eligible != Some(false);
    let committed = families.iter().filter_map(|(_, progress)| progress.committed).max();
    let status = families.iter().map(|(family, progress)| {
        let healthy = progress.is_healthy(patience);
        (ip_family(*family), FamilyBody { last_updated: rfc3339(progress.committed), healthy })
    });
    let body = Body {
        // Of an idle proxy this would be long ago, which readers take for a bad sign.
        last_updated: rfc3339(if good { Some(now) } else { committed }),
        current_time: rfc3339(Some(now)),
        node_eligible: eligible,
        healthy,
        status: status.collect(),
    };
    Answer { good, body: json(&body) }
}

/// The family as kube-proxy writes it.
#[must_use]
pub fn ip_family(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// Go's zero time stands for never.
fn rfc3339(time: Option<Timestamp>) -> String {
    time.map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), |time| time.to_string())
}

fn json(body: &impl Serialize) -> String {
    serde_json::to_string(body).expect("strings and booleans can be written")
}

/// The answer on a Service's health-check node port. The weight, which is the number of endpoints,
/// goes into a header as well.
#[must_use]
pub fn service_answer(service: &NamespacedName, endpoints: usize, proxy_healthy: bool) -> Answer {
    let (namespace, name) = service.as_str().split_once('/').unwrap_or(("", service.as_str()));
    let (namespace, name) = (json(&namespace), json(&name));
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": {namespace},\n\t\t\"name\": {name}\n\t}},\n\t\
         \"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {proxy_healthy}\n}}"
    );
    Answer { good: proxy_healthy && endpoints > 0, body }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn progress(waiting: Option<u64>, committed: &str) -> Progress {
        Progress {
            waiting: waiting.map(Duration::from_secs),
            committed: (!committed.is_empty()).then(|| at(committed)),
        }
    }

    #[test]
    fn a_change_that_waits_too_long_is_unhealthy() {
        assert_eq!(patience(Duration::from_secs(30)), PATIENCE);
        for (waiting, healthy) in [
            (None, true),
            (Some(0), true),
            (Some(59), true),
            (Some(60), false),
            (Some(9999), false),
        ] {
            for committed in ["", "2026-11-25T10:00:00Z"] {
                assert_eq!(progress(waiting, committed).is_healthy(PATIENCE), healthy);
            }
        }
    }

    #[test]
    fn a_node_that_is_there_and_stays_is_eligible() {
        let node = NodeFacts::default();
        assert!(is_eligible(Some(&node)));
        assert!(!is_eligible(Some(&NodeFacts { leaving: true, ..node })));
        assert!(!is_eligible(None));
    }

    #[test]
    fn the_verdict_is_of_all_families_and_the_node() {
        let now = at("2026-11-25T10:49:06.5Z");
        let (fresh, stale) = (progress(None, ""), progress(Some(61), ""));
        for (families, eligible, good) in [
            ([fresh, fresh], Some(true), true),
            ([fresh, fresh], Some(false), false), // 127
            ([fresh, fresh], None, true),         // 127
            ([fresh, stale], Some(true), false),
            ([stale, fresh], None, false),
        ] {
            let families: Vec<_> = Family::BOTH.into_iter().zip(families).collect();
            assert_eq!(answer(&families, PATIENCE, eligible, now).good, good);
        }
    }

    #[test]
    fn the_bodies_are_those_of_kube_proxy() {
        let now = at("2026-11-25T10:49:06.339286883Z");
        let families = [
            (Family::V4, progress(None, "2026-11-25T10:49:02.341977312Z")),
            (Family::V6, progress(Some(1), "2026-11-25T10:48:59.281973402Z")),
        ];
        let status = r#""status":{"IPv4":{"lastUpdated":"2026-11-25T10:49:02.341977312Z","healthy":true},"IPv6":{"lastUpdated":"2026-11-25T10:48:59.281973402Z","healthy":true}}}"#;
        let current = r#""currentTime":"2026-11-25T10:49:06.339286883Z""#;
        assert_eq!(
            answer(&families, PATIENCE, Some(true), now).body,
            format!(
                r#"{{"lastUpdated":"2026-11-25T10:49:06.339286883Z",{current},"nodeEligible":true,"healthy":true,{status}"#
            )
        );
        assert_eq!(
            answer(&families, PATIENCE, Some(false), now).body,
            format!(
                r#"{{"lastUpdated":"2026-11-25T10:49:02.341977312Z",{current},"nodeEligible":false,"healthy":true,{status}"#
            )
        );
        assert_eq!(
            answer(&families, PATIENCE, None, now).body,
            format!(
                r#"{{"lastUpdated":"2026-11-25T10:49:06.339286883Z",{current},"healthy":true,{status}"#
            )
        );
        let never = [(Family::V4, progress(Some(60), ""))];
        assert_eq!(
            answer(&never, PATIENCE, None, now).body,
            format!(
                r#"{{"lastUpdated":"0001-01-01T00:00:00Z",{current},"healthy":false,"status":{{"IPv4":{{"lastUpdated":"0001-01-01T00:00:00Z","healthy":false}}}}}}"#
            )
        );
    }

    #[test]
    fn a_service_is_fit_if_it_has_endpoints_here_and_the_proxy_is_healthy() {
        let service = NamespacedName::new("default", "web");
        let expected = "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": true\n}";
        let found = service_answer(&service, 1, true);
        assert_eq!(found, Answer { good: true, body: expected.into() }); // 124
        let found = service_answer(&service, 0, true); // 125
        assert_eq!(found, Answer { good: false, body: expected.replace(": 1", ": 0") });
        let found = service_answer(&service, 1, false); // 126
        assert_eq!(found, Answer { good: false, body: expected.replace("true", "false") });
    }
}
