//! What is wrong, and whose fault it is: problems of objects and refusals of the kernel, told in the log and
//! to the owners of Services, each once.

use std::collections::{BTreeMap, BTreeSet};

use tracing::{debug, error, info, warn};

use super::Proxy;
use crate::contribution::{Contribution, Contributor};
use crate::ledger::Staged;
use crate::model::{NamespacedName, Notice, Problem, Standing, Topic};
use crate::nft::kernel::{Kernel, Refusal};
use crate::nft::text;
use crate::nft::transaction::{Op, Transaction};

/// From so many objects on, a list that loses most of them is worth a word.
const SUSPICIOUS: usize = 10;

/// Whether a list that leaves so many of the objects that there were is worth one. It may be so, and then
/// it counts; or a server was restored from an old backup.
pub(super) fn is_suspicious(before: usize, after: usize) -> bool {
    before >= SUSPICIOUS && after < before / 2
}

impl<K: Kernel> Proxy<K> {
    /// Whose operations were refused, each with the first of them. Nobody's, if the table itself was
    /// refused: everything in it is refused along with it.
    pub(super) fn guilty(
        &self,
        staged: &Staged,
        transaction: &Transaction,
        refusals: &[Refusal],
    ) -> BTreeMap<Contributor, (String, Refusal)> {
        let mut guilty = BTreeMap::new();
        let operation = |refusal: &Refusal| transaction.ops.get(refusal.op?);
        let table = |op: &Op| {
            matches!(op, Op::DeleteTable(_) | Op::AddTable(_) | Op::AddSet(..) | Op::AddCounters(_))
        };
        if refusals.iter().filter_map(operation).any(table) {
            return guilty;
        }
        for refusal in refusals {
            let Some(op) = operation(refusal) else { continue };
            let Some(contributor) = staged.contributor(op) else { continue };
            if !self.quarantine.contains(contributor) {
                guilty
                    .entry(contributor.clone())
                    .or_insert_with(|| (text::op(op), refusal.clone()));
            }
        }
        guilty
    }

    /// Leaves contributors out, each said when it begins, and when the reason is another one.
    pub(super) fn set_aside(&mut self, guilty: BTreeMap<Contributor, (String, Refusal)>) {
        for (contributor, (operation, refusal)) in guilty {
            // Its number is another one each time.
            let reason = Refusal { op: None, ..refusal }.to_string();
            if !self.quarantine.put(&contributor, reason.clone()) {
                debug!(object = %contributor, operation, reason, "the kernel refuses it still");
                continue;
            }
            error!(
                object = %contributor,
                operation,
                reason,
                "the kernel refuses this object's change; it keeps what it had, and is tried again"
            );
            if let Contributor::Service(service) = contributor {
                let note = format!(
                    "the kernel refuses the Service's change ({operation}: {reason}); it keeps what it had \
                     there, and is tried again"
                );
                self.notices.push(Notice::new(service, Topic::Refused, Standing::Is(vec![note])));
            }
        }
    }

    /// The kernel took everything that was not set aside for this commit.
    pub(super) fn let_go(&mut self) {
        for contributor in self.quarantine.settle() {
            info!(object = %contributor, "the kernel accepts this object's change");
            if let Contributor::Service(service) = contributor {
                let standing = self.over(&service);
                self.notices.push(Notice::new(service, Topic::Refused, standing));
            }
        }
    }

    /// What there was to say about a Service is no longer so.
    fn over(&self, service: &NamespacedName) -> Standing {
        if self.state.service_named(service).is_some() { Standing::Over } else { Standing::Gone }
    }

    /// Services that are gone, but about which something was said: they ask for nothing.
    pub(super) fn silent_now(&self) -> Vec<(Contributor, Contribution, Vec<Problem>)> {
        let gone = self.reported.keys().filter(|contributor| match contributor {
            Contributor::Node => false,
            Contributor::Service(service) => self.state.service_named(service).is_none(),
        });
        gone.map(|contributor| (contributor.clone(), Contribution::default(), Vec::new())).collect()
    }

    /// What those that are set aside have committed, without what others claim by now: the frontend of
    /// one can be another's since.
    pub(super) fn kept_beside(
        &self,
        others: &[(Contributor, Contribution)],
    ) -> Vec<(Contributor, Contribution)> {
        let Some(ledger) = self.ledger.as_ref().filter(|_| !self.quarantine.is_empty()) else {
            return Vec::new();
        };
        let claimed = others.iter().flat_map(|(_, contribution)| &contribution.elements);
        let claimed: BTreeSet<_> =
            claimed.map(|(id, _)| *id).filter(|id| !id.set.is_shared()).collect();
        let kept = self.quarantine.iter().filter_map(|contributor| {
            let Contribution { elements, chains, affinities } =
                ledger.contribution(contributor)?.clone();
            let elements = elements.into_iter().filter(|(id, _)| !claimed.contains(id)).collect();
            Some((contributor.clone(), Contribution { elements, chains, affinities }))
        });
        kept.collect()
    }

    /// Reports the problems of contributions that are new, and leaves out those set aside.
    pub(super) fn accepted(
        &mut self,
        contributions: Vec<(Contributor, Contribution, Vec<Problem>)>,
    ) -> Vec<(Contributor, Contribution)> {
        let mut list = Vec::with_capacity(contributions.len());
        for (contributor, contribution, problems) in contributions {
            let known = self.reported.remove(&contributor).unwrap_or_default();
            for problem in problems.iter().filter(|problem| !known.contains(problem)) {
                // A conflict is about no field.
                let field = Some(&*problem.field).filter(|field| !field.is_empty());
                warn!(object = problem.object, field, "{}", problem.message);
            }
            if let Contributor::Service(service) = &contributor
                && problems != known
            {
                for topic in [Topic::Conflict, Topic::Partly] {
                    let (was, is) = (about(topic, &known), about(topic, &problems));
                    if was != is {
                        let standing =
                            if is.is_empty() { self.over(service) } else { Standing::Is(is) };
                        self.notices.push(Notice::new(service.clone(), topic, standing));
                    }
                }
            }
            if !problems.is_empty() {
                self.reported.insert(contributor.clone(), problems);
            }
            if !self.quarantine.contains(&contributor) {
                list.push((contributor, contribution));
            }
        }
        list
    }
}

/// What the problems of a contribution say on a topic. Without a field it is about a frontend that is
/// another Service's.
fn about(topic: Topic, problems: &[Problem]) -> Vec<String> {
    let of_topic = |problem: &&Problem| problem.field.is_empty() == (topic == Topic::Conflict);
    let said = |problem: &Problem| match &*problem.field {
        "" => problem.message.clone(),
        field => format!("{field}: {}", problem.message),
    };
    problems.iter().filter(of_topic).map(said).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_that_loses_more_than_half_of_many_is_worth_a_word() {
        assert!(is_suspicious(10, 4) && is_suspicious(100, 0) && is_suspicious(31, 14));
        assert!(!is_suspicious(9, 0) && !is_suspicious(10, 5) && !is_suspicious(31, 15));
        assert!(!is_suspicious(100, 100) && !is_suspicious(10, 20));
    }
}
