//! Whose changes the kernel refuses, and what a refusal is taken for.
//!
//! A cause of the whole system (no memory, no permission) says nothing about the object whose operation
//! happens to meet it: such a transaction is tried again as a whole first, and nobody is left out for
//! what hits everybody. Any other refusal, and one that stays, is taken for the object's own: it keeps
//! what it had, the rest is committed, and it is tried again when it changes and from time to time.

use std::collections::BTreeMap;

use crate::contribution::Contributor;
use crate::nft::kernel::Refusal;

/// How many contributors one commit may set aside before it gives up until the next try.
pub const MAX_SET_ASIDE: usize = 100;

/// How often in a row a transaction is tried as a whole.
const TRIES: u32 = 3;

/// Contributors whose operations the kernel refused, each with its reason.
#[derive(Debug, Default)]
pub struct Quarantine {
    set_aside: BTreeMap<Contributor, String>,
    /// Taken up again by the next commit.
    on_trial: BTreeMap<Contributor, String>,
    /// Transactions in a row that were refused for a cause of the system.
    failures: u32,
}

impl Quarantine {
    /// Whether a contributor is left out.
    #[must_use]
    pub fn contains(&self, contributor: &Contributor) -> bool {
        self.set_aside.contains_key(contributor)
    }

    /// Those that are left out.
    pub fn iter(&self) -> impl Iterator<Item = &Contributor> {
        self.set_aside.keys()
    }

    /// How many are left out.
    #[must_use]
    pub fn len(&self) -> usize {
        self.set_aside.len()
    }

    /// Whether nobody was refused and not accepted since.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.set_aside.is_empty() && self.on_trial.is_empty()
    }

    /// Leaves a contributor out. Whether that is news: it was not, or for another reason.
    pub fn put(&mut self, contributor: &Contributor, reason: String) -> bool {
        let before = self.on_trial.remove(contributor);
        let before = self.set_aside.insert(contributor.clone(), reason).or(before);
        before.as_ref() != self.set_aside.get(contributor)
    }

    /// A contributor changed: what the kernel refused may be gone.
    pub fn release(&mut self, contributor: &Contributor) {
        if let Some((contributor, reason)) = self.set_aside.remove_entry(contributor) {
            self.on_trial.insert(contributor, reason);
        }
    }

    /// Takes up all of them again, and says who that is.
    pub fn release_all(&mut self) -> Vec<Contributor> {
        let all = std::mem::take(&mut self.set_aside);
        let names = all.keys().cloned().collect();
        self.on_trial.extend(all);
        names
    }

    /// A commit succeeded. Those that it took up again.
    pub fn settle(&mut self) -> Vec<Contributor> {
        self.failures = 0;
        std::mem::take(&mut self.on_trial).into_keys().collect()
    }

    /// Whether a refusal is not to be taken for that of so many contributors alone.
    pub fn blames_the_system(&mut self, refusals: &[Refusal], contributors: usize) -> bool {
        if !refusals.iter().all(|refusal| is_of_the_system(refusal.errno)) {
            return false;
        }
        self.failures += 1;
        self.failures < TRIES || contributors > MAX_SET_ASIDE
    }
}

/// Whether an error speaks of the process or the machine, and not of what was asked for.
fn is_of_the_system(errno: i32) -> bool {
    use libc::{EACCES, EAGAIN, EINTR, EMFILE, ENOBUFS, ENOMEM, EPERM};
    [EACCES, EAGAIN, EINTR, EMFILE, ENOBUFS, ENOMEM, EPERM].contains(&errno)
}

#[cfg(test)]
mod tests {
    use libc::{EBUSY, ENOMEM};

    use super::*;

    #[test]
    fn one_that_is_taken_up_again_is_news_only_if_it_is_refused_for_another_reason() {
        let mut quarantine = Quarantine::default();
        let node = Contributor::Node;
        assert!(quarantine.is_empty());
        assert!(quarantine.put(&node, "busy".into()));
        assert!(!quarantine.put(&node, "busy".into()));
        assert!(quarantine.put(&node, "full".into()));
        for all in [false, true] {
            assert!(quarantine.contains(&node) && quarantine.len() == 1);
            if all {
                assert_eq!(quarantine.release_all(), [Contributor::Node]);
            } else {
                quarantine.release(&node);
            }
            assert_eq!((quarantine.contains(&node), quarantine.len()), (false, 0));
            assert!(!quarantine.is_empty(), "nothing was accepted yet");
            assert!(!quarantine.put(&node, "full".into()));
        }
        assert_eq!(quarantine.iter().collect::<Vec<_>>(), [&node]);
        assert_eq!(quarantine.settle(), [], "it is left out");
        quarantine.release(&node);
        assert_eq!(quarantine.settle(), [node]);
        assert!(quarantine.is_empty());
    }

    #[test]
    fn what_is_of_the_system_is_tried_as_a_whole_and_again_if_it_hits_too_many() {
        let refused = |errno| Refusal { op: None, errno, message: None };
        let of_system = [refused(ENOMEM), refused(ENOMEM)];
        let mut quarantine = Quarantine::default();
        for _ in 0..2 {
            assert!(!quarantine.blames_the_system(&[refused(ENOMEM), refused(EBUSY)], 1));
            let tries = [1; 3].map(|count| quarantine.blames_the_system(&of_system, count));
            assert_eq!(tries, [true, true, false]);
            assert!(!quarantine.blames_the_system(&of_system, MAX_SET_ASIDE));
            assert!(quarantine.blames_the_system(&of_system, MAX_SET_ASIDE + 1));
            quarantine.settle();
        }
    }
}
