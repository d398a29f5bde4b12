//! The thread that programs the kernel: it takes in events, and does what is due.
//!
//! State, ledger and netlink socket live here and nowhere else.
//! - When to commit is the business of `clock`.
//! - What others do to the tables is put right ([`crate::drift`]).
//! - A changed configuration is taken over between two commits.

mod clock;

use std::time::Duration;

use tokio::sync::mpsc::{Receiver, error::TryRecvError};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, error, warn};

use self::clock::{Clock, Pacing};
use crate::config::Live;
use crate::conntrack::Sweeper;
use crate::drift::{self, Repairs};
use crate::host::Sysctl;
use crate::inspect::{Request, Snapshot};
use crate::model::{Event, Family};
use crate::nft::dataplane::{LOOPBACK_GUARD, Loopback};
use crate::nft::netlink::{Intrusion, NetlinkKernel};
use crate::reconcile::Proxy;
use crate::status::Reporter;

/// How long events gather while lists come: thousands of them, for each of which the thread would wake up.
const LISTING: Duration = Duration::from_millis(1);

/// The state of the thread.
pub struct Program {
    proxy: Proxy<NetlinkKernel>,
    sweeper: Sweeper,
    clock: Clock,
    live: watch::Receiver<Live>,
    /// From the first commit on: that one would only fill it.
    intrusions: Option<Receiver<Intrusion>>,
    repairs: Repairs,
    after_sync: Option<Box<dyn FnOnce() + Send>>,
    /// What the tables and the host have for loopback addresses.
    loopback: Loopback,
    /// Whether the kernel is to route them, which it may behind the commit that keeps others from them.
    routing_due: bool,
    reporter: Reporter,
    /// From those who want to look into it.
    requests: Option<Receiver<Request>>,
}

/// What there is to do next.
enum Input {
    Event(Event),
    Intrusion(Intrusion),
    /// The configuration changed.
    Live,
    /// Somebody wants to know what is known.
    Request(Request),
    Due,
    /// Nobody will send any more events.
    Closed,
}

impl Program {
    /// Nothing done yet.
    #[must_use]
    pub fn new(
        proxy: Proxy<NetlinkKernel>,
        sweeper: Sweeper,
        mut live: watch::Receiver<Live>,
        reporter: Reporter,
    ) -> Self {
        let wanted = live.borrow_and_update().clone();
        let clock = Clock::new(Pacing::from(&wanted));
        let repairs = Repairs::new(clock.started);
        let mut this = Self {
            proxy,
            sweeper,
            clock,
            live,
            intrusions: None,
            repairs,
            after_sync: None,
            loopback: Loopback::Untouched,
            routing_due: false,
            reporter,
            requests: None,
        };
        this.loopback = this.loopback_of_former_run();
        this.configure(&wanted);
        this
    }

    /// What the tables that are in force have for loopback addresses.
    fn loopback_of_former_run(&mut self) -> Loopback {
        if !Sysctl::default().routes_loopback() {
            // Then they are nobody's business, and the rules need not be read.
            return Loopback::Untouched;
        }
        match self.proxy.kernel_mut().has_rule(Family::V4, LOOPBACK_GUARD) {
            Ok(true) => Loopback::Guarded,
            Ok(false) => Loopback::Untouched,
            Err(error) => {
                warn!(%error, "cannot tell whether loopback addresses are guarded");
                Loopback::Untouched
            }
        }
    }

    /// Takes over a configuration.
    fn configure(&mut self, live: &Live) {
        self.clock.pacing = Pacing::from(live);
        let mut settings = live.settings.clone();
        let routed = Sysctl::default().routes_loopback();
        settings.loopback = settings.loopback.after(self.loopback, routed);
        if settings.loopback == Loopback::Guarded {
            // Somebody else may rely on it by now.
            warn!(
                "node ports are no longer served on 127.0.0.1, but net.ipv4.conf.all.route_localnet is \
                 still 1: others are kept from loopback addresses until it is 0"
            );
        }
        self.loopback = settings.loopback;
        self.routing_due = self.loopback == Loopback::NodePorts;
        self.proxy.configure(settings);
    }

    /// Has something done once, when the tables are in force.
    #[must_use]
    pub fn after_sync(mut self, then: impl FnOnce() + Send + 'static) -> Self {
        self.after_sync = Some(Box::new(then));
        self
    }

    /// Answers those who want to look into it.
    #[must_use]
    pub fn answering(mut self, requests: Receiver<Request>) -> Self {
        self.requests = Some(requests);
        self
    }

    /// Takes in events and commits, until the sender is gone.
    pub fn run(mut self, mut events: Receiver<Event>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => {
                error!(%error, "cannot start the timer of the programming thread");
                return;
            }
        };
        runtime.block_on(async {
            let mut open = true;
            while open {
                let input = self.next(&mut events).await;
                let came = Instant::now();
                match input {
                    Input::Event(event) => self.proxy.observe(event),
                    Input::Intrusion(intrusion) => self.repairs.add(intrusion),
                    Input::Live => {
                        let live = self.live.borrow_and_update().clone();
                        self.configure(&live);
                    }
                    // Whoever asked may have gone.
                    Input::Request(request) => {
                        drop(request.send(Snapshot::of(&self.proxy)));
                        debug!(took = ?came.elapsed(), "told what is known");
                    }
                    Input::Due => {}
                    Input::Closed => open = false,
                }
                open &= self.take_queued(&mut events);
                self.reporter.took_in(&mut self.proxy, came);
                self.act();
                if open && !self.proxy.is_complete() {
                    tokio::time::sleep(LISTING).await;
                }
            }
        });
    }

    async fn next(&mut self, events: &mut Receiver<Event>) -> Input {
        let due = [self.clock.deadline(&self.proxy), self.repairs.due()];
        let due = due.into_iter().flatten().min();
        let timer = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = events.recv() => event.map_or(Input::Closed, Input::Event),
            // If that thread ends, it says so.
            intrusion = received(&mut self.intrusions) => Input::Intrusion(intrusion),
            // Without a file there is no sender, and this never comes.
            Ok(()) = self.live.changed() => Input::Live,
            request = received(&mut self.requests) => Input::Request(request),
            () = timer => Input::Due,
        }
    }

    /// Takes in what is queued already; false if the sender is gone.
    fn take_queued(&mut self, events: &mut Receiver<Event>) -> bool {
        loop {
            match events.try_recv() {
                Ok(event) => self.proxy.observe(event),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Does what is due.
    fn act(&mut self) {
        let began = Instant::now();
        if self.repairs.due().is_some_and(|due| began >= due) {
            let intrusion = self.repairs.waiting().cloned().unwrap_or_default();
            let outcome = self.proxy.repair();
            self.reporter.repaired(&mut self.proxy, intrusion, began.elapsed(), &outcome);
            self.repairs.done(began, Instant::now(), &outcome);
        }
        self.clock.act(&mut self.proxy, &mut self.reporter);
        // What others did meanwhile can have been anything.
        if self.proxy.kernel_mut().take_unheard() {
            self.repairs.add(Intrusion::default());
        }
        if let Some(sweep) = self.proxy.take_sweep() {
            self.sweeper.sweep(sweep);
        }
        if self.clock.synced && self.intrusions.is_none() {
            self.watch_others();
        }
        if self.routing_due && self.clock.synced && !self.proxy.is_stale() {
            self.routing_due = false;
            if let Err(error) = Sysctl::default().route_loopback() {
                warn!(%error, "node ports are not served on 127.0.0.1");
            }
        }
        if self.clock.synced
            && let Some(then) = self.after_sync.take()
        {
            then();
        }
    }

    /// Begins to watch for changes that others make, behind the first commit. If there was one before
    /// it is watched, everything is read once more.
    fn watch_others(&mut self) {
        let kernel = self.proxy.kernel_mut();
        let before = kernel.generation().ok();
        let watching = kernel.monitor().map_err(|error| error.to_string()).and_then(|monitor| {
            drift::watch(monitor).map_err(|error| format!("cannot start a thread: {error}"))
        });
        match watching {
            Ok(intrusions) => self.intrusions = Some(intrusions),
            Err(error) => {
                error!(error, "changes that others make to our tables will not be seen");
                // Closed from the start, so that this is said once.
                self.intrusions = Some(tokio::sync::mpsc::channel(1).1);
            }
        }
        if before.is_none() || before != kernel.generation().ok() {
            self.repairs.add(Intrusion::default());
        }
    }
}

/// What comes next; nothing ever, if there is nobody to send it.
async fn received<T>(receiver: &mut Option<Receiver<T>>) -> T {
    let next = match receiver {
        Some(receiver) => receiver.recv().await,
        None => None,
    };
    match next {
        Some(next) => next,
        None => std::future::pending().await,
    }
}
