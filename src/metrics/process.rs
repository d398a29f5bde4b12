//! The metrics about the process that every Prometheus client has, read from `/proc/self` at the
//! scrape.

use std::fs;

use prometheus::{Counter, Gauge};

use super::{Register, registered};

/// Ticks of a second in `/proc`, the same on every Linux.
const TICKS: f64 = 100.0;

/// `process_…`
#[derive(Debug)]
pub(super) struct Process {
    cpu: Counter,
    open_files: Gauge,
    max_files: Gauge,
    resident: Gauge,
    virtual_memory: Gauge,
    max_virtual_memory: Gauge,
    started: Gauge,
    threads: Gauge,
}

impl Process {
    pub(super) fn new(register: &Register) -> Self {
        let gauge = |name: &str, help: &str| registered(register, Gauge::new(name, help));
        Self {
            cpu: registered(
                register,
                Counter::new(
                    "process_cpu_seconds_total",
                    "Total user and system CPU time spent in seconds.",
                ),
            ),
            open_files: gauge("process_open_fds", "Number of open file descriptors."),
            max_files: gauge("process_max_fds", "Maximum number of open file descriptors."),
            resident: gauge("process_resident_memory_bytes", "Resident memory size in bytes."),
            virtual_memory: gauge("process_virtual_memory_bytes", "Virtual memory size in bytes."),
            max_virtual_memory: gauge(
                "process_virtual_memory_max_bytes",
                "Maximum amount of virtual memory available in bytes.",
            ),
            started: gauge(
                "process_start_time_seconds",
                "Start time of the process since unix epoch in seconds.",
            ),
            threads: gauge("process_threads", "Number of OS threads in the process."),
        }
    }

    /// Reads what there is to read. What cannot be read keeps its value.
    pub(super) fn read(&self) {
        let file = |name: &str| fs::read_to_string(format!("/proc/{name}")).unwrap_or_default();
        let (stat, status, limits) = (file("self/stat"), file("self/status"), file("self/limits"));
        if let Some(seconds) = cpu_seconds(&stat) {
            // Two scrapes at once could bring an older value after a newer one.
            self.cpu.inc_by((seconds - self.cpu.get()).max(0.0));
        }
        let set = |gauge: &Gauge, value: Option<f64>| {
            if let Some(value) = value {
                gauge.set(value);
            }
        };
        set(&self.started, started(&stat, &file("stat")));
        set(&self.resident, kilobytes(&status, "VmRSS:").map(|k| k * 1024.0));
        set(&self.virtual_memory, kilobytes(&status, "VmSize:").map(|k| k * 1024.0));
        set(&self.threads, kilobytes(&status, "Threads:"));
        set(&self.max_files, limit(&limits, "Max open files"));
        set(&self.max_virtual_memory, limit(&limits, "Max address space"));
        let open = fs::read_dir("/proc/self/fd").ok();
        // One of them is the directory that is being read.
        let count = open.map(|files| u32::try_from(files.count().saturating_sub(1)));
        set(&self.open_files, count.and_then(Result::ok).map(f64::from));
    }
}

/// The fields of `stat` behind the program's name, which may hold anything; the first is field 3.
fn fields(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace()
}

fn cpu_seconds(stat: &str) -> Option<f64> {
    let mut times = fields(stat).skip(11);
    let mut next = || times.next()?.parse::<f64>().ok();
    Some((next()? + next()?) / TICKS)
}

fn started(stat: &str, system: &str) -> Option<f64> {
    let since_boot: f64 = fields(stat).nth(19)?.parse().ok()?;
    let boot = system.lines().find_map(|line| line.strip_prefix("btime "))?;
    Some(boot.trim().parse::<f64>().ok()? + since_boot / TICKS)
}

fn kilobytes(status: &str, field: &str) -> Option<f64> {
    let rest = status.lines().find_map(|line| line.strip_prefix(field))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// The soft limit. Go's client writes the largest number for no limit.
fn limit(limits: &str, name: &str) -> Option<f64> {
    let rest = limits.lines().find_map(|line| line.strip_prefix(name))?;
    match rest.split_whitespace().next()? {
        "unlimited" => Some(18_446_744_073_709_551_615.0),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_understood() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 9 0 0 0 150 50 0 0 20 0 4 0 12345 9 9";
        assert_eq!(cpu_seconds(stat), Some(2.0));
        assert_eq!(started(stat, "cpu 1\nbtime 1000\nprocesses 5\n"), Some(1123.45));
        assert_eq!(kilobytes("VmSize:\t  12 kB\nVmRSS:\t  10 kB\n", "VmRSS:"), Some(10.0));
        let limits = "Max open files            1024                 4096                 files\n\
                      Max address space         unlimited            unlimited            bytes\n";
        assert_eq!(limit(limits, "Max open files"), Some(1024.0));
        assert!(limit(limits, "Max address space").unwrap() > 1e19);
        assert_eq!(cpu_seconds(""), None);
    }

    #[test]
    fn this_process_can_be_read() {
        let process = Process::new(&Register::default());
        process.read();
        for gauge in [&process.open_files, &process.max_files, &process.resident, &process.started]
        {
            assert!(gauge.get() > 0.0, "{gauge:?}");
        }
        assert!(process.started.get() > 1.6e9);
    }
}
