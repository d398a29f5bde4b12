//! How often the threads of a process wake up, and how often nftproxy is to at most when nothing happens: as often as
//! the list in `deploy/docs/observe.md` says.

use std::collections::BTreeMap;
use std::fs;

const LIST: &str = include_str!("../../deploy/docs/observe.md");

/// What the last column of the list is headed.
const HEADING: &str = "| wake-ups a minute |";

/// How often each thread of a process has gone to sleep of its own accord, by name; those of one name together.
pub(crate) fn so_far(process: u32) -> BTreeMap<String, f64> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("the process runs");
    let mut threads = BTreeMap::new();
    for task in tasks.flatten() {
        let read = |name| fs::read_to_string(task.path().join(name));
        // A thread may end meanwhile.
        let (Ok(name), Ok(status)) = (read("comm"), read("status")) else { continue };
        let slept = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let slept: f64 = slept.and_then(|n| n.trim().parse().ok()).expect("the kernel says so");
        *threads.entry(name.trim().to_owned()).or_default() += slept;
    }
    threads
}

/// How often a second everything on the list wakes nftproxy at most.
pub(crate) fn listed() -> f64 {
    let rows = LIST.lines().skip_while(|line| !line.ends_with(HEADING)).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    let last = |row: &str| row.trim_end_matches('|').rsplit('|').next()?.trim().parse::<f64>().ok();
    let all: Option<Vec<_>> = rows.map(last).collect();
    let a_minute: f64 = all.expect("numbers in the last column").iter().sum();
    assert!(a_minute > 0.0, "no list under {HEADING:?}");
    a_minute / 60.0
}
