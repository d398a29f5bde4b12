//! Where the objects come from: the API server, or a directory of manifests.
//!
//! Both speak one stream of [`Event`]s, so that nothing behind it knows which one it is. Objects are
//! converted as they arrive and dropped at once; neither source keeps a Kubernetes object. A source
//! that fails says so and goes silent: it never reports something as gone because it could not be
//! read, so that what is programmed outlives any outage.

pub mod api;
pub mod convert;
pub mod manifests;
pub mod notices;

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use serde::de::DeserializeOwned;

use crate::model::{Event, Kind, Problem};

/// A Kubernetes type that is watched, and what it becomes.
trait Watched:
    kube::Resource<DynamicType = ()> + Clone + fmt::Debug + DeserializeOwned + Send + 'static
{
    /// The kind of the model it becomes.
    const KIND: Kind;

    /// The event that says it exists, or `None` if it is not for this proxy.
    fn event(&self, node_name: &str) -> (Option<Event>, Vec<Problem>);
}

impl Watched for Service {
    const KIND: Kind = Kind::Service;

    fn event(&self, _: &str) -> (Option<Event>, Vec<Problem>) {
        let (object, problems) = convert::service(self);
        (object.map(Event::Service), problems)
    }
}

impl Watched for EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;

    fn event(&self, node_name: &str) -> (Option<Event>, Vec<Problem>) {
        let (object, problems) = convert::endpoint_slice(self, node_name);
        (object.map(Event::EndpointSlice), problems)
    }
}

impl Watched for ServiceCIDR {
    const KIND: Kind = Kind::ServiceCidr;

    fn event(&self, _: &str) -> (Option<Event>, Vec<Problem>) {
        let (object, problems) = convert::service_cidr(self);
        (object.map(Event::ServiceCidr), problems)
    }
}

/// Other nodes' objects do not concern this proxy; the API server does not send them, a manifest may
/// hold them.
impl Watched for Node {
    const KIND: Kind = Kind::Node;

    fn event(&self, node_name: &str) -> (Option<Event>, Vec<Problem>) {
        if self.metadata.name.as_deref().is_some_and(|name| name != node_name) {
            return (None, Vec::new());
        }
        let (object, problems) = convert::node(self);
        (object.map(Event::Node), problems)
    }
}

/// What the log was told about each object, so that a problem is one line when it appears and not
/// one more at every update and every listing. Bounded: past the limit it forgets everything, and
/// standing problems are said once more.
#[derive(Debug, Default)]
struct ProblemLog {
    said: BTreeMap<String, Vec<u64>>,
}

impl ProblemLog {
    /// Objects with problems that are remembered.
    const LIMIT: usize = 4096;

    /// Logs those of an object's problems that were not there when it was last seen, and gives back
    /// how many.
    fn report(&mut self, object: &str, problems: &[Problem]) -> usize {
        if problems.is_empty() {
            if !self.said.is_empty() {
                self.said.remove(object);
            }
            return 0;
        }
        let before = self.said.remove(object).unwrap_or_default();
        let mut now = Vec::with_capacity(problems.len());
        let mut logged = 0;
        for problem in problems {
            let mut hasher = DefaultHasher::new();
            (&problem.object, &problem.field, &problem.message).hash(&mut hasher);
            let hash = hasher.finish();
            if !before.contains(&hash) {
                log(problem);
                logged += 1;
            }
            now.push(hash);
        }
        if self.said.len() >= Self::LIMIT {
            self.said.clear();
        }
        self.said.insert(object.to_owned(), now);
        logged
    }
}

/// One line for one problem.
pub(crate) fn log(problem: &Problem) {
    if problem.field.is_empty() {
        tracing::warn!(object = problem.object, "{}", problem.message);
    } else {
        tracing::warn!(object = problem.object, field = problem.field, "{}", problem.message);
    }
}

/// An error with all its causes on one line. Several client errors only say "client error" at the
/// top and keep what happened below.
struct Causes<'a>(&'a (dyn std::error::Error + 'static));

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Some errors repeat their cause, others leave it out.
            if !said.contains(&text) {
                said.push_str(": ");
                said.push_str(&text);
            }
            cause = error.source();
        }
        f.write_str(&convert::one_line(&said))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(object: &str, message: &str) -> Problem {
        Problem { object: object.into(), field: String::new(), message: message.into() }
    }

    #[test]
    fn a_problem_is_said_when_it_appears_and_not_again() {
        let mut log = ProblemLog::default();
        let (a, b) = (problem("Service x/a", "one"), problem("Service x/a", "two"));
        assert_eq!(log.report("Service x/a", std::slice::from_ref(&a)), 1);
        assert_eq!(log.report("Service x/a", std::slice::from_ref(&a)), 0);
        assert_eq!(log.report("Service x/a", &[a.clone(), b]), 1);
        assert_eq!(log.report("Service x/a", &[]), 0);
        assert_eq!(log.report("Service x/a", &[a]), 1);
    }

    #[test]
    fn the_log_of_problems_is_bounded() {
        let mut log = ProblemLog::default();
        for i in 0..3 * ProblemLog::LIMIT {
            let name = format!("Service x/{i}");
            log.report(&name, &[problem(&name, "bad")]);
        }
        assert!(log.said.len() <= ProblemLog::LIMIT);
    }
}
