//! What was promised beside what was seen.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

#[derive(Default)]
pub(super) struct Seen {
    pub(super) connections: BTreeMap<&'static str, u64>,
    /// No answer at first: the second try was answered.
    pub(super) asked_again: u64,
    /// Datagrams that met a flow of a flush which was not swept away yet, and how long after the flush at most.
    pub(super) met: u64,
    pub(super) met_after: Duration,
    /// Failed while a flushed table was put right.
    pub(super) in_repair: u64,
    pub(super) failed: BTreeMap<String, u64>,
    pub(super) misrouted: BTreeMap<String, u64>,
    pub(super) changes: u64,
}

/// What was done.
#[derive(Default)]
pub(super) struct Done {
    pub(super) blows: u64,
    pub(super) kills: u32,
    pub(super) stops: u32,
    pub(super) flushes: u32,
    pub(super) additions: u32,
    /// Connections begun meanwhile that the kernel remembered without a translation.
    pub(super) begun: usize,
    /// Until flushed tables were back.
    pub(super) longest: Duration,
    /// The limit of memory was drawn so close that there had to be room made.
    pub(super) squeezes: u32,
    /// Ended by the kernel for want of memory, and started again; of these, chosen and not gone yet when there was
    /// memory again.
    pub(super) starved: u64,
    pub(super) dying: u32,
    /// Steps of the wall clock, and the largest in seconds.
    pub(super) jumps: u32,
    pub(super) farthest: i64,
    /// Ends of the API server, and how many of them took etcd along.
    pub(super) api_kills: [u32; 2],
    /// The longest time without an API server.
    pub(super) api_away: Duration,
    /// Minutes, KiB of its own memory, and open files of the process that was not killed.
    pub(super) sizes: Vec<(f64, u64, u64)>,
}

impl Done {
    pub(super) fn report(&self, seen: &Seen, equal: bool, resident: u64) -> String {
        let Self { kills, stops, flushes, additions, longest, squeezes, starved, sizes, .. } = self;
        // By then what is remembered of the last batches is as much as it will be.
        let sizes = &sizes[sizes.len() / 2..];
        let (kib, files) = (slope(sizes, |size| size.1), slope(sizes, |size| size.2));
        let minutes = sizes.last().map_or(0.0, |last| last.0 - sizes[0].0);
        let sum = |of: &BTreeMap<String, u64>| of.values().sum::<u64>().to_string();
        let mut report = format!(
            "{kills} times kill -9, {stops} SIGTERM, {flushes} nft flush ruleset, {additions} foreign \
             elements, {squeezes} times short of memory and {starved} times ended for want of it ({} not gone \
             yet when there was some), {} jumps of the clock by up to {} s, {} times kill -9 of the API server ({} with etcd, {:.1?} away at most), \
             {} changes\n",
            self.dying,
            self.jumps,
            self.farthest,
            self.api_kills[0],
            self.api_kills[1],
            self.api_away,
            seen.changes
        );
        for (what, promised, found) in [
            ("connections", "", format!("{:?}", seen.connections)),
            ("failed", "0", sum(&seen.failed)),
            ("answered by another Service's endpoint", "0", sum(&seen.misrouted)),
            ("answered at the second try", "", seen.asked_again.to_string()),
            ("failed while a flush was put right", "", seen.in_repair.to_string()),
            ("met a flow of a flush before it was swept", "", seen.met.to_string()),
            ("longest time after the flush", "20 s at most", format!("{:.1?}", seen.met_after)),
            ("longest time until tables were back", "", format!("{longest:.1?}")),
            ("begun then and never translated", "", self.begun.to_string()),
            ("table as a fresh one at the end", "true", equal.to_string()),
            ("resident memory", "96 MiB at most", format!("{} MiB", resident >> 10)),
            (
                "slope of what is its own, KiB a minute",
                "0",
                format!("{kib:.0} in {minutes:.1} min"),
            ),
            ("slope of open files, a minute", "0", format!("{files:.1}")),
        ] {
            let _ = writeln!(report, "  {what:40} promised {promised:15} seen {found}");
        }
        report
    }

    /// Nothing was left out that can be done here: of memory, the clock and the API server, those that there are.
    pub(super) fn assert_each_was_dealt(&self, [memory, clock, api]: [bool; 3]) {
        let always = [self.kills, self.stops, self.flushes, self.additions];
        let missing = always.contains(&0)
            || memory && self.squeezes == 0
            || clock && self.jumps == 0
            || api && self.api_kills[0] == 0;
        assert!(!missing, "something was not done");
    }

    /// Memory comes to rest: what it takes most in the second half is what it took in the first. Ports for
    /// health checks come and go with Services, and what a commit takes depends on how much it is of.
    pub(super) fn assert_at_rest(&self) {
        let half = self.sizes.len() / 2;
        let most = |sizes: &[(f64, u64, u64)]| {
            let most =
                |of: fn(&(f64, u64, u64)) -> u64| sizes.iter().map(of).max().unwrap_or_default();
            (most(|size| size.1), most(|size| size.2))
        };
        let (before, after) = (most(&self.sizes[..half]), most(&self.sizes[half..]));
        let rests = after.0 <= before.0 + (24 << 10) && after.1 <= before.1 + 100;
        assert!(rests, "{before:?} {after:?}");
    }
}

/// By how much a value grows in a minute: least squares.
fn slope(sizes: &[(f64, u64, u64)], of: fn(&(f64, u64, u64)) -> u64) -> f64 {
    let float = |value: u64| f64::from(u32::try_from(value).unwrap());
    let n = float(sizes.len() as u64);
    let mean = |of: &dyn Fn(&(f64, u64, u64)) -> f64| sizes.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(&|size| size.0), mean(&|size| float(of(size))));
    let covariance: f64 = sizes.iter().map(|size| (size.0 - x) * (float(of(size)) - y)).sum();
    let variance: f64 = sizes.iter().map(|size| (size.0 - x).powi(2)).sum();
    if variance > 0.0 { covariance / variance } else { 0.0 }
}
