//! Which notices are told, and when. Knows times, but not what time it is.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::Outcome;
use crate::model::{NamespacedName, Notice, Standing, Topic};

/// Between two Events.
const PAUSE: Duration = Duration::from_millis(200);

/// Between two of a Service on one topic.
const SAME_PAUSE: Duration = Duration::from_secs(60);

/// Nodes that have to tell the same wait for different parts of this, so that one comes first.
const SPREAD: Duration = Duration::from_secs(5);

/// After an Event that could not be delivered.
const FAILED_PAUSE: Duration = Duration::from_secs(30);

/// After one that we may not make.
const DENIED_PAUSE: Duration = Duration::from_secs(600);

/// How often an Event is tried.
const TRIES: u32 = 3;

/// Topics of Services that are remembered.
const LIMIT: usize = 4096;

/// What is to be told; without a sentence, that it is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Telling {
    pub(super) service: NamespacedName,
    pub(super) topic: Topic,
    pub(super) sentences: Vec<String>,
}

/// A topic of a Service.
#[derive(Debug, Default)]
struct Subject {
    /// How it is, part by part.
    parts: BTreeMap<String, Vec<String>>,
    /// What was told last.
    told: Vec<String>,
    told_at: Option<Instant>,
    /// When to tell how it is.
    due: Option<Instant>,
    tries: u32,
}

impl Subject {
    fn sentences(&self) -> Vec<String> {
        self.parts.values().flatten().cloned().collect()
    }
}

/// What waits to be told.
#[derive(Debug)]
pub(super) struct Queue {
    subjects: BTreeMap<(NamespacedName, Topic), Subject>,
    spread: Duration,
    /// Nothing is told before this.
    next: Option<Instant>,
}

impl Queue {
    /// Nothing to tell. The number is the node's own.
    pub(super) fn new(node: u64) -> Self {
        // Less than SPREAD.
        let spread = Duration::from_millis(node % 5000).min(SPREAD);
        Self { subjects: BTreeMap::new(), spread, next: None }
    }

    /// Takes in a notice.
    pub(super) fn add(&mut self, notice: Notice, now: Instant) {
        let key = (notice.service, notice.topic);
        if !self.subjects.contains_key(&key) {
            if !matches!(notice.standing, Standing::Is(_)) {
                return;
            }
            if self.subjects.len() >= LIMIT {
                // What is over may be forgotten.
                self.subjects
                    .retain(|_, subject| subject.due.is_some() || !subject.told.is_empty());
                // So may what was told longest ago: of some of it, the end may never have come here.
                let settled = self.subjects.iter().filter(|(_, subject)| subject.due.is_none());
                let oldest = settled.min_by_key(|(_, subject)| subject.told_at);
                let oldest = oldest.map(|(key, _)| key.clone());
                if self.subjects.len() >= LIMIT
                    && let Some(oldest) = oldest
                {
                    self.subjects.remove(&oldest);
                }
            }
            if self.subjects.len() >= LIMIT {
                tracing::debug!(service = %key.0, "too much to tell: an Event is left out");
                return;
            }
        }
        let spread = if key.1.is_of_all_nodes() { self.spread } else { Duration::ZERO };
        let subject = self.subjects.entry(key.clone()).or_default();
        match notice.standing {
            Standing::Is(sentences) => {
                subject.parts.insert(notice.part, sentences);
            }
            Standing::Over => {
                subject.parts.remove(&notice.part);
            }
            Standing::Gone => {
                self.subjects.remove(&key);
                return;
            }
        }
        if subject.sentences() == subject.told {
            subject.due = None;
        } else if subject.due.is_none() {
            let pause = subject.told_at.map(|at| at + SAME_PAUSE);
            subject.due = Some(pause.map_or(now + spread, |pause| pause.max(now + spread)));
            subject.tries = 0;
        }
    }

    /// When there is something to tell.
    pub(super) fn due(&self) -> Option<Instant> {
        let first = self.subjects.values().filter_map(|subject| subject.due).min()?;
        Some(self.next.map_or(first, |next| next.max(first)))
    }

    /// Something that is due.
    pub(super) fn take(&mut self, now: Instant) -> Option<Telling> {
        if self.next.is_some_and(|next| now < next) {
            return None;
        }
        let due = self.subjects.iter().filter(|(_, subject)| subject.due.is_some_and(|d| d <= now));
        let ((service, topic), subject) = due.min_by_key(|(_, subject)| subject.due)?;
        Some(Telling { service: service.clone(), topic: *topic, sentences: subject.sentences() })
    }

    /// It was told, or not.
    pub(super) fn done(&mut self, telling: Telling, outcome: &Outcome, now: Instant) {
        let pause = match outcome {
            Outcome::Taken | Outcome::Useless(_) => PAUSE,
            Outcome::Denied(_) => DENIED_PAUSE,
            Outcome::Failed(_) => FAILED_PAUSE,
        };
        self.next = Some(now + pause);
        let key = (telling.service, telling.topic);
        let Some(subject) = self.subjects.get_mut(&key) else { return };
        subject.tries += 1;
        let settled = match outcome {
            Outcome::Taken | Outcome::Useless(_) => true,
            Outcome::Denied(_) => false,
            Outcome::Failed(_) => subject.tries >= TRIES,
        };
        if settled {
            subject.due = None;
            subject.told = telling.sentences;
            subject.told_at = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(name: &str, topic: Topic, part: &str, standing: Standing) -> Notice {
        let part = part.to_owned();
        Notice { part, ..Notice::new(NamespacedName::new("x", name), topic, standing) }
    }

    fn is(text: &str) -> Standing {
        Standing::Is(vec![text.to_owned()])
    }

    /// Tells everything that is due until then: what, and after how many seconds.
    fn told(queue: &mut Queue, began: Instant, until: u64) -> Vec<(u64, String)> {
        let mut told = Vec::new();
        while let Some(due) = queue.due().filter(|due| *due <= began + Duration::from_secs(until)) {
            let telling = queue.take(due).unwrap();
            let text = format!("{}: {}", telling.service, telling.sentences.join("; "));
            told.push(((due - began).as_secs(), text));
            queue.done(telling, &Outcome::Taken, due);
        }
        told
    }

    #[test]
    fn a_notice_is_told_once_and_that_it_is_over_once() {
        let mut queue = Queue::new(2000);
        let now = Instant::now();
        // Nothing was told that could be over.
        queue.add(notice("a", Topic::Conflict, "", Standing::Over), now);
        assert_eq!(queue.due(), None);
        queue.add(notice("a", Topic::Conflict, "", is("one")), now);
        assert_eq!(told(&mut queue, now, 100), [(2, "x/a: one".into())], "after the node's share");
        queue.add(notice("a", Topic::Conflict, "", is("one")), now);
        assert_eq!(queue.due(), None);
        queue.add(notice("a", Topic::Conflict, "", Standing::Over), now);
        assert_eq!(told(&mut queue, now, 100), [(62, "x/a: ".into())]);
        queue.add(notice("a", Topic::Conflict, "", Standing::Over), now);
        assert_eq!(queue.due(), None);
        // Nobody is there to be told.
        queue.add(notice("a", Topic::Conflict, "", is("two")), now);
        queue.add(notice("a", Topic::Conflict, "", Standing::Gone), now);
        assert_eq!(queue.due(), None);
    }

    #[test]
    fn what_changes_quickly_is_told_as_it_is_once_a_minute() {
        let mut queue = Queue::new(0);
        let began = Instant::now();
        let mut all = Vec::new();
        for second in 0..120 {
            let now = began + Duration::from_secs(second);
            let standing = if second % 2 == 0 { is("one") } else { Standing::Over };
            queue.add(notice("a", Topic::Conflict, "", standing), now);
            all.extend(told(&mut queue, began, second));
        }
        // One that is back before it is said to be gone was never gone.
        assert_eq!(all, [(0, "x/a: one".into()), (61, "x/a: ".into())]);
        assert_eq!(queue.due(), None, "it ends as it was told");
    }

    #[test]
    fn parts_of_a_service_are_told_together_and_services_apart() {
        let mut queue = Queue::new(0);
        let now = Instant::now();
        for i in 0..50 {
            queue.add(notice("a", Topic::Invalid, &format!("{i:02}"), is("bad")), now);
            queue.add(notice(&format!("b-{i:02}"), Topic::Refused, "", is("no")), now);
        }
        let told = told(&mut queue, now, 100);
        assert_eq!(told.len(), 51);
        assert_eq!(told.last().unwrap().0, 10, "five a second");
        assert_eq!(told.iter().filter(|(_, text)| text.matches("bad").count() == 50).count(), 1);
    }

    #[test]
    fn without_the_right_it_is_asked_for_seldom_and_what_fails_is_given_up() {
        let now = Instant::now();
        let mut queue = Queue::new(0);
        for name in ["a", "b", "c"] {
            queue.add(notice(name, Topic::Refused, "", is("no")), now);
        }
        let mut tries = 0;
        let mut at = now;
        while let Some(due) = queue.due().filter(|due| *due <= now + Duration::from_secs(3600)) {
            at = due;
            tries += 1;
            let telling = queue.take(due).unwrap();
            queue.done(telling, &Outcome::Denied("403".into()), due);
        }
        assert_eq!(tries, 7, "every ten minutes of an hour");
        // Granted, everything is told.
        assert_eq!(told(&mut queue, at, 700).len(), 3);

        queue.add(notice("d", Topic::Refused, "", is("no")), at);
        let mut tries = 0;
        while let Some(due) = queue.due() {
            tries += 1;
            let telling = queue.take(due).unwrap();
            queue.done(telling, &Outcome::Failed("500".into()), due);
        }
        assert_eq!(tries, TRIES);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut queue = Queue::new(0);
        for i in 0..2 * LIMIT {
            queue.add(notice(&format!("s-{i}"), Topic::Refused, "", is("no")), Instant::now());
        }
        assert_eq!(queue.subjects.len(), LIMIT);
    }

    #[test]
    fn what_was_told_longest_ago_makes_room_for_what_is_new() {
        let mut queue = Queue::new(0);
        let now = Instant::now();
        for i in 0..LIMIT {
            queue.add(notice(&format!("s-{i:04}"), Topic::Refused, "", is("no")), now);
        }
        assert_eq!(told(&mut queue, now, 3600).len(), LIMIT);
        queue.add(notice("late", Topic::Refused, "", is("no")), now + Duration::from_secs(3600));
        assert_eq!(told(&mut queue, now, 3700), [(3600, "x/late: no".into())]);
        assert_eq!(queue.subjects.len(), LIMIT);
        assert!(!queue.subjects.keys().any(|(name, _)| name.as_str() == "x/s-0000"));
    }
}
