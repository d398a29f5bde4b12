//! From events to commits: the state, the ledger and the kernel, tied together.
//!
//! Nothing here reads a clock, nor waits, but for packets to pass where a table is replaced (`send`);
//! when to commit is decided by [`crate::program`], which drives this, as do the benches and the packet
//! tests. A commit that the kernel refuses is first answered by reading back what the kernel really holds
//! and sending the difference: that cures every case in which someone else changed our tables. If an
//! operation is refused even then, the contributor it came from is set aside ([`crate::quarantine`]) and
//! everything else is committed.

mod blame;
mod send;

use std::collections::{BTreeMap, BTreeSet};

use tracing::{debug, info, warn};

use self::send::{apply, put_up, take_down};
use crate::account::{Account, count_elements};
use crate::conntrack::{Serving, Sweep};
use crate::contribution::{Contribution, Contributor};
use crate::frontend::Frontend;
use crate::ledger::{Ledger, Staged};
use crate::model::{Event, NamespacedName, Notice, Problem};
use crate::nft::dataplane::Options;
use crate::nft::diff::{Foreign, diff, foreign};
use crate::nft::element::{ElementId, Key};
use crate::nft::kernel::{Applied, ApplyError, Kernel, LoadError, Loaded};
use crate::nft::names::{LAYOUT, LAYOUTS};
use crate::nft::ruleset::Ruleset;
use crate::nft::transaction::Op;
use crate::quarantine::{MAX_SET_ASIDE, Quarantine};
use crate::recent::Trace;
use crate::settings::Settings;
use crate::state::State;

/// How often a commit reads back the tables because their elements were others than it was told.
const MAX_READINGS: usize = 5;

/// The proxy of one node, without time.
#[derive(Debug)]
pub struct Proxy<K> {
    state: State,
    kernel: K,
    /// None until the tables were adopted.
    ledger: Option<Ledger>,
    /// What was computed for the first commit before it can be; None from then on.
    prepared: Option<Prepared>,
    /// The kernel may hold something else than is wanted beside what the ledger tells: an answer was
    /// lost, for instance, or rules have to be others.
    in_doubt: bool,
    options: Options,
    /// Contributors whose operations the kernel refuses; they keep what they had.
    quarantine: Quarantine,
    /// Who answers every UDP frontend as of the last commit.
    serving: Serving,
    /// What the last commit amounts to.
    account: Account,
    /// What was last said about a contributor, so that it is said once.
    reported: BTreeMap<Contributor, Vec<Problem>>,
    /// What the owners of Services have to know, since this was last asked for.
    notices: Vec<Notice>,
    /// What the last commit was about.
    trace: Trace,
}

/// Contributions as of the events so far, but for those that are stale.
type Prepared = BTreeMap<Contributor, (Contribution, Vec<Problem>)>;

/// What a commit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Operations in the transaction; 0 if nothing had to change.
    pub operations: usize,
    /// What went over the socket.
    pub applied: Applied,
    /// Whether the kernel was read back for it.
    pub adopted: bool,
    /// Contributors set aside by it.
    pub set_aside: usize,
}

/// A commit that has to be tried again. The kernel holds what it held before.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// What the kernel holds could not be read.
    #[error("reading back the tables: {0}")]
    Load(#[from] LoadError),
    /// The kernel did not take the change.
    #[error("committing {operations} operations: {source}")]
    Apply {
        /// Size of the transaction.
        operations: usize,
        /// The kernel's answer.
        source: ApplyError,
    },
}

impl<K: Kernel> Proxy<K> {
    /// A proxy that has seen nothing yet.
    pub fn new(state: State, kernel: K) -> Self {
        Self {
            options: state.options(),
            state,
            kernel,
            ledger: None,
            prepared: Some(Prepared::default()),
            in_doubt: false,
            serving: Serving::default(),
            account: Account::default(),
            quarantine: Quarantine::default(),
            reported: BTreeMap::new(),
            notices: Vec::new(),
            trace: Trace::default(),
        }
    }

    /// Takes in an event.
    pub fn observe(&mut self, event: Event) {
        let listed = match event {
            Event::Listed(kind) => Some((kind, self.state.count(kind))),
            _ => None,
        };
        self.take_in(event);
        if let Some((kind, before)) = listed {
            let after = self.state.count(kind);
            if blame::is_suspicious(before, after) {
                warn!(%kind, before, after, "a new list names less than half of what was known; what it does not name is removed");
            }
        }
    }

    fn take_in(&mut self, event: Event) {
        let waiting = self.account.observe(&event);
        let touched = self.state.observe(event);
        if let Some(waiting) = waiting.filter(|_| !touched.is_empty()) {
            self.account.waits(waiting);
        }
        for contributor in touched {
            // It changed: what the kernel refused may be gone.
            self.quarantine.release(&contributor);
        }
        // Everything will be read back. Names of Services that come and go need not be kept until then,
        // which can be long.
        if self.reads_back() && self.prepared.is_none() {
            self.state.settle();
        }
    }

    /// Computes for the first commit what can be before all is listed: objects come slower than that. What
    /// changes again is computed again.
    pub fn prepare(&mut self) {
        let Some(prepared) = &mut self.prepared else { return };
        for (contributor, contribution, problems) in self.state.stale_contributions() {
            if contribution == Contribution::default() && problems.is_empty() {
                prepared.remove(&contributor);
            } else {
                prepared.insert(contributor, (contribution, problems));
            }
        }
        self.state.settle();
    }

    /// Takes over other settings.
    pub fn configure(&mut self, settings: Settings) {
        self.state.configure(settings);
    }

    /// Whether every kind of object was listed, so that committing is safe.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.state.is_complete()
    }

    /// Whether something waits to be committed.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.state.is_stale() || self.reads_back()
    }

    /// Whether the next commit is one of everything.
    fn reads_back(&self) -> bool {
        self.ledger.is_none() || self.in_doubt
    }

    /// Whether the tables count connections.
    #[must_use]
    pub fn counts(&self) -> bool {
        self.options.counters
    }

    /// The state, for reading.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What the last commit amounts to.
    pub fn account_mut(&mut self) -> &mut Account {
        &mut self.account
    }

    /// How many objects the kernel refuses to change.
    #[must_use]
    pub fn set_aside_count(&self) -> usize {
        self.quarantine.len()
    }

    /// Whether the kernel refused something that was not accepted since.
    #[must_use]
    pub fn has_refused(&self) -> bool {
        !self.quarantine.is_empty()
    }

    /// Has the next commit take up again what the kernel refused: the cause may be gone.
    pub fn retry_set_aside(&mut self) {
        for contributor in self.quarantine.release_all() {
            self.state.touch(contributor);
        }
    }

    /// What the owners of Services have to know, since the last call.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Whose changes the kernel refuses.
    pub fn refused(&self) -> impl Iterator<Item = &Contributor> {
        self.quarantine.iter()
    }

    /// What is wrong with objects.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.reported.values().flatten()
    }

    /// What the last commit was about, once.
    pub fn take_trace(&mut self) -> Trace {
        std::mem::take(&mut self.trace)
    }

    /// The kernel, for tests and benches.
    pub fn kernel_mut(&mut self) -> &mut K {
        &mut self.kernel
    }

    /// Brings the kernel to what the events so far ask for.
    pub fn commit(&mut self) -> Result<Committed, CommitError> {
        // The node's pod ranges may have become known or changed family: rules are others then.
        self.in_doubt |= self.state.options() != self.options;
        if !self.reads_back() {
            let stale = self.state.stale_contributions();
            let mut stale = self.accepted(stale);
            let contributors: Vec<_> = stale.iter().map(|(name, _)| name.clone()).collect();
            stale.extend(self.kept_beside(&stale));
            let ledger = self.ledger.as_mut().expect("looked at above");
            let staged = ledger.stage(stale);
            let mut transaction = staged.transaction(&self.options);
            match apply(&mut self.kernel, &mut transaction) {
                Ok(done) => {
                    ledger.accept(staged);
                    self.state.settle();
                    self.let_go();
                    self.account.apply(&transaction.ops);
                    self.trace = Trace::new(&contributors, transaction.ops);
                    self.serve(contributors);
                    return Ok(done);
                }
                Err(refused) => {
                    warn!(reason = %refused, "commit failed, reading back what the kernel holds");
                }
            }
        }
        self.adopt()
    }

    /// Brings the kernel to the same after somebody else changed our tables.
    pub fn repair(&mut self) -> Result<Committed, CommitError> {
        self.adopt()
    }

    /// Whether shared chains or affinity maps stand idle, and could be collected.
    #[must_use]
    pub fn has_idle(&self) -> bool {
        self.ledger.as_ref().is_some_and(Ledger::has_idle)
    }

    /// Removes shared chains and affinity maps that nobody uses any more.
    pub fn collect_idle(&mut self) -> Result<Committed, CommitError> {
        let Some(ledger) = self.ledger.as_mut() else { return Ok(Committed::default()) };
        let staged = ledger.collect();
        let mut transaction = staged.transaction(&self.options);
        let outcome = apply(&mut self.kernel, &mut transaction);
        match &outcome {
            Ok(_) => {
                ledger.accept(staged);
                self.trace = Trace::new(&[], transaction.ops);
            }
            Err(CommitError::Apply { source: ApplyError::Refused { .. }, .. }) => {}
            Err(_) => self.in_doubt = true,
        }
        outcome
    }

    /// Everything that is wanted now, as one value.
    pub fn wanted(&mut self) -> Ruleset {
        let all = self.state.all_contributions();
        let all = self.accepted(all);
        Ledger::stage_all(all).ruleset(self.state.options())
    }

    /// What a commit would do now, if the kernel was read back for it; and for whom, as far as one
    /// object alone asks for it. Changes nothing.
    pub fn plan(&mut self) -> Result<Vec<(Op, Option<Contributor>)>, LoadError> {
        let options = self.state.options();
        let loaded = self.kernel.load(&options)?;
        self.adopt_slots(&loaded);
        let staged = self.stage_all();
        let transaction = diff(&loaded, staged.ruleset(options));
        let named = |op: Op| {
            let contributor = staged.contributor(&op).cloned();
            (op, contributor)
        };
        Ok(transaction.ops.into_iter().map(named).collect())
    }

    fn adopt_slots(&mut self, loaded: &Loaded) {
        for (family, table) in loaded.tables.iter().filter(|(_, t)| foreign(t).is_none()) {
            // Backends may be numbered otherwise there.
            self.prepared = None;
            self.state.adopt_slots(*family, &table.elements);
        }
    }

    /// Reads back what the kernel holds and sends the difference to what is wanted.
    fn adopt(&mut self) -> Result<Committed, CommitError> {
        let first = self.ledger.is_none();
        // Also what fails may have taken effect, if only the answer was lost.
        self.in_doubt = true;
        // Nothing is stale behind this, so that rules that wait for a commit are part of it.
        self.options = self.state.options();
        let mut loaded = self.kernel.load(&self.options)?;
        if first {
            report_found(&loaded);
            self.adopt_slots(&loaded);
        }
        let (mut set_aside, mut readings) = (0, 1);
        loop {
            let staged = self.stage_all();
            let ruleset = staged.ruleset(self.options.clone());
            let elements = count_elements(ruleset.elements.iter().map(|(id, _)| id));
            let up =
                put_up(&mut self.kernel, &mut loaded, || staged.ruleset(self.options.clone()))?;
            let mut transaction = diff(&loaded, ruleset);
            match apply(&mut self.kernel, &mut transaction) {
                Ok(done) => {
                    // At the start it is for everybody.
                    let telling = Trace::telling(if first { &[] } else { &transaction.ops });
                    let objects: BTreeSet<_> =
                        telling.iter().filter_map(|op| staged.contributor(op)).cloned().collect();
                    let objects: Vec<_> = objects.into_iter().collect();
                    self.trace = Trace::new(&objects, transaction.ops);
                    let mut ledger = Ledger::default();
                    ledger.accept(staged);
                    self.ledger = Some(ledger);
                    let gone = take_down(&mut self.kernel, &loaded.stand_ins);
                    self.in_doubt = gone.is_err();
                    self.state.settle();
                    self.let_go();
                    self.account.set_elements(elements);
                    self.serve_all(&loaded);
                    if done.operations > 0 {
                        self.serving.look_again();
                    }
                    let applied = up + done.applied + gone?;
                    return Ok(Committed { applied, set_aside, adopted: true, ..done });
                }
                Err(CommitError::Apply { source: ApplyError::Refused { refusals }, .. }) => {
                    // New chains may be there already.
                    let found = std::mem::replace(&mut loaded, self.kernel.load(&self.options)?);
                    if readings < MAX_READINGS && !same_elements(&found, &loaded) {
                        readings += 1;
                        debug!(reason = %refusals[0], "refused, but the elements are others than were read");
                        continue;
                    }
                    let guilty = self.guilty(&staged, &transaction, &refusals);
                    let count = set_aside + guilty.len();
                    if guilty.is_empty()
                        || set_aside >= MAX_SET_ASIDE
                        || self.quarantine.blames_the_system(&refusals, count)
                    {
                        let operations = transaction.ops.len();
                        let source = ApplyError::Refused { refusals };
                        return Err(CommitError::Apply { operations, source });
                    }
                    set_aside = count;
                    self.set_aside(guilty);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// What the commits since the last call may have left behind in connection tracking.
    pub fn take_sweep(&mut self) -> Option<Sweep> {
        self.serving.take()
    }

    /// Takes note of what contributors have committed.
    fn serve(&mut self, contributors: impl IntoIterator<Item = Contributor>) {
        self.account.settle();
        for contributor in contributors {
            match contributor {
                Contributor::Node => {
                    self.serving.set_node_port_addresses(self.state.node_port_addresses());
                }
                Contributor::Service(name) => {
                    self.account.update(&name, self.state.local(&name));
                    self.serving.update(&name, self.state.udp_frontends(&name));
                    let counts = self.options.counters;
                    let served = if counts { self.state.served(&name) } else { Vec::new() };
                    self.account.count(&name, served);
                }
            }
        }
    }

    /// The same after everything was committed over tables that were found.
    fn serve_all(&mut self, loaded: &Loaded) {
        let accountable = self.state.accountable();
        let accountable: Vec<_> = accountable.filter(|c| !self.quarantine.contains(c)).collect();
        self.serve(accountable);
        let Self { state, quarantine, serving, account, .. } = self;
        let counts = |name: &NamespacedName| {
            state.is_accountable(name) || quarantine.contains(&Contributor::Service(name.clone()))
        };
        account.retain(counts);
        serving.retain(counts);
        let found = loaded.tables.values().filter(|table| foreign(table).is_none());
        serving.found(found.flat_map(|table| table.elements.keys()).filter_map(frontend_of));
    }

    /// All contributions, on an empty ledger. One that is set aside keeps what it has committed.
    fn stage_all(&mut self) -> Staged {
        self.prepare();
        let mut all = match self.prepared.take() {
            Some(prepared) => {
                prepared.into_iter().map(|(c, (of, problems))| (c, of, problems)).collect()
            }
            None => self.state.all_contributions(),
        };
        all.extend(self.silent_now());
        let mut all = self.accepted(all);
        all.extend(self.kept_beside(&all));
        Ledger::stage_all(all)
    }
}

/// Whether two readings found the same elements. If not, a refusal between them is no object's fault.
fn same_elements(first: &Loaded, second: &Loaded) -> bool {
    let [first, second] = [first, second].map(|loaded| loaded.tables.values());
    first.flat_map(|table| &table.elements).eq(second.flat_map(|table| &table.elements))
}

/// The frontend that an element is about, if it is a dispatch or a refusal.
fn frontend_of(id: &ElementId) -> Option<Frontend> {
    match id.key {
        Key::Frontend(address, protocol, port) => Some(Frontend::Address(address, protocol, port)),
        Key::NodePort(protocol, port) => Some(Frontend::NodePort(id.family, protocol, port)),
        _ => None,
    }
}

/// Says what start-up found in the kernel under our name.
fn report_found(loaded: &Loaded) {
    for (family, table) in &loaded.tables {
        let (chains, sets, elements) = (table.chains.len(), table.sets.len(), table.elements.len());
        match foreign(table) {
            None => info!(%family, chains, sets, elements, "adopting the table found"),
            Some(Foreign::Layout(Some(layout))) if layout.starts_with(LAYOUTS) => info!(
                %family,
                chains,
                sets,
                "replacing the table of another version ({layout:?} by {LAYOUT:?}) as a whole"
            ),
            Some(why) => warn!(
                %family,
                chains,
                sets,
                "a table of our name was made by someone else ({why}): replacing it as a whole"
            ),
        }
    }
}
