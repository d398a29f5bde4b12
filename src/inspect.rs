//! A look into the running program: a copy of what it knows, handed over by the thread that programs
//! the kernel when somebody asks.
//!
//! The copy shares its objects with the original ([`crate::state`]), so that making it holds up commits
//! for a moment only, whatever is then computed from it on the time of who asked. One asks at a time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::contribution::Contributor;
use crate::ledger::Ledger;
use crate::model::{Event, NodeFacts, Problem};
use crate::nft::kernel::Kernel;
use crate::nft::ruleset::Ruleset;
use crate::reconcile::Proxy;
use crate::settings::Settings;
use crate::state::State;

/// How long somebody waits for a turn and for the copy.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the program knew at one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// The objects and the node.
    pub state: State,
    /// Whose changes the kernel refuses.
    pub set_aside: BTreeSet<Contributor>,
    /// What is wrong with objects.
    pub problems: Vec<Problem>,
    /// Whether something is waiting to be committed.
    pub is_stale: bool,
}

impl Snapshot {
    /// Makes the copy.
    #[must_use]
    pub fn of<K: Kernel>(proxy: &Proxy<K>) -> Self {
        Self {
            state: proxy.state().clone(),
            set_aside: proxy.refused().cloned().collect(),
            problems: proxy.problems().cloned().collect(),
            is_stale: proxy.is_stale(),
        }
    }

    /// Both tables as the objects ask for them, without what is set aside.
    pub fn wanted(&mut self) -> Ruleset {
        let all = self.state.all_contributions().into_iter();
        let all = all.filter(|(contributor, ..)| !self.set_aside.contains(contributor));
        let all = all.map(|(contributor, contribution, _)| (contributor, contribution)).collect();
        Ledger::stage_all(all).ruleset(self.state.options())
    }
}

/// Everything that another process needs to know the same: what `/debug/objects` answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct Objects {
    /// The program's version. Others may understand something else by the rest.
    pub nftproxy: String,
    /// What the daemon's objects are from.
    pub source: String,
    /// How the tables are to be.
    pub settings: Settings,
    /// The node as the host tells it.
    pub host: NodeFacts,
    /// What makes the state.
    pub events: Vec<Event>,
}

impl Objects {
    /// Those of a state.
    #[must_use]
    pub fn of(state: &State, source: String) -> Self {
        Self {
            nftproxy: env!("CARGO_PKG_VERSION").to_owned(),
            source,
            settings: state.settings().clone(),
            host: state.host_facts(),
            events: state.events().collect(),
        }
    }

    /// The state again.
    #[must_use]
    pub fn into_state(self) -> State {
        let mut state = State::new(self.settings, self.host);
        for event in self.events {
            state.observe(event);
        }
        state
    }
}

/// Somebody who wants a copy.
pub type Request = oneshot::Sender<Snapshot>;

/// Why there is no copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InspectError {
    /// Others are served.
    #[error("somebody else is being answered; try again")]
    Busy,
    /// The programming thread does not answer.
    #[error("the thread that programs the kernel is busy; try again")]
    Silent,
}

/// Asks for copies, one at a time.
#[derive(Clone, Debug)]
pub struct Inspector {
    requests: mpsc::Sender<Request>,
    turn: Arc<Semaphore>,
}

impl Inspector {
    /// An inspector, and where its requests come out.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<Request>) {
        let (requests, receiver) = mpsc::channel(1);
        (Self { requests, turn: Arc::new(Semaphore::new(1)) }, receiver)
    }

    /// A copy, and the turn, which ends when it is dropped.
    pub async fn snapshot(&self) -> Result<(Snapshot, OwnedSemaphorePermit), InspectError> {
        let turn = tokio::time::timeout(PATIENCE, self.turn.clone().acquire_owned()).await;
        let turn = turn.map_err(|_| InspectError::Busy)?.map_err(|_| InspectError::Silent)?;
        let copy = async {
            let (sender, receiver) = oneshot::channel();
            self.requests.send(sender).await.ok()?;
            receiver.await.ok()
        };
        let copy = tokio::time::timeout(PATIENCE, copy).await;
        Ok((copy.ok().flatten().ok_or(InspectError::Silent)?, turn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::fake::FakeKernel;

    fn snapshot() -> Snapshot {
        let state = State::new(Settings::default(), NodeFacts::default());
        Snapshot::of(&Proxy::new(state, FakeKernel::default()))
    }

    #[tokio::test(start_paused = true)]
    async fn one_is_answered_at_a_time_and_nobody_waits_for_ever() {
        let (inspector, mut requests) = Inspector::new();
        let asked = inspector.clone();
        let first = tokio::spawn(async move { asked.snapshot().await });
        assert!(requests.recv().await.unwrap().send(snapshot()).is_ok());
        let first = first.await.unwrap().unwrap();
        // It is being put into words.
        assert_eq!(inspector.snapshot().await.unwrap_err(), InspectError::Busy);
        drop(first);
        assert_eq!(inspector.snapshot().await.unwrap_err(), InspectError::Silent);
        drop(requests);
        assert_eq!(inspector.snapshot().await.unwrap_err(), InspectError::Silent);
    }
}
