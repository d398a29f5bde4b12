//! What is done to the program, its tables, its memory, its clock and its API server.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;

use super::report::Done;
use super::{Api, Soak};
use crate::e2e::{eventually, said};
use crate::http::get;
use crate::namespace::{nft, refused};
use crate::net::{Daemon, NODE, Net, in_netns, ip, patient, wait_until};
use crate::restart::Random;

/// The program's memory. The debug build needs about half of it.
const MEMORY: u64 = 96 << 20;
/// What fails until a flushed table is back was not promised; nor are the answers of connections that were made
/// until then, which nobody translates back.
pub(super) const REPAIR: Duration = Duration::from_secs(1);

/// Kinds of what can be done.
pub(super) const BLOWS: u64 = 7;

impl Soak<'_> {
    /// Does something to the program, or to what is around it; at first, everything once.
    pub(super) fn disturb(
        &self,
        daemon: &mut Daemon,
        random: &mut Random,
        killing: bool,
        done: &mut Done,
    ) {
        let first = done.blows;
        done.blows += 1;
        match if first < BLOWS { first } else { random.below(BLOWS) } {
            0 if killing => {
                daemon.end(Signal::SIGKILL);
                *daemon = self.spawn();
                done.kills += 1;
                if random.below(2) == 0 {
                    said(daemon, "synced");
                }
            }
            1 if killing => {
                daemon.end(Signal::SIGTERM);
                *daemon = self.spawn();
                done.stops += 1;
            }
            2 => self.flush(daemon, done),
            3 => {
                said(daemon, "synced");
                // Nobody dials it: it goes without anybody missing it.
                let element = "add element ip nftproxy cluster-ips { 10.99.99.99 }";
                in_netns(&self.net.name("node"), || nft(&["-f", "-"], element));
                done.additions += 1;
            }
            4 if killing => {
                if let Some(memory) = &self.memory {
                    let to_death = done.starved == 0 || random.below(2) == 0;
                    self.starve(memory, daemon, to_death, done);
                }
            }
            5 => {
                if let Some(clock) = &self.clock {
                    self.jump(clock, daemon, random, done);
                }
            }
            6 => {
                if let Some(api) = self.api {
                    self.end_api(api, daemon, killing, random, done);
                }
            }
            _ => {}
        }
    }

    fn flush(&self, daemon: &Daemon, done: &mut Done) {
        let node = self.net.name("node");
        said(daemon, "synced");
        *self.restored.lock().unwrap() = None;
        let (began, from) = (Instant::now(), SystemTime::now());
        in_netns(&node, || {
            nft(&["flush", "ruleset"], "");
            // A repair is followed by a pause of five times what it took, which is long on a busy machine.
            eventually("the tables to be back", || {
                refused("list map ip6 nftproxy services").map_or(Ok(()), Err)
            });
        });
        self.gone.lock().unwrap().push([from, SystemTime::now()]);
        done.longest = done.longest.max(began.elapsed());
        // What was begun meanwhile is remembered without a translation for two minutes, and meets
        // whoever dials from the same port again.
        done.begun += forget_begun(&node);
        *self.restored.lock().unwrap() = Some(Instant::now());
        done.flushes += 1;
        std::thread::sleep(patient(REPAIR));
    }

    /// Draws the limit of memory close, until room is made or the kernel ends the program; gives it back, and
    /// starts the program again, as a kubelet would.
    fn starve(&self, memory: &Memory, daemon: &mut Daemon, to_death: bool, done: &mut Done) {
        said(daemon, "synced");
        let met = memory.met();
        let began = Instant::now();
        let long_enough = |met_now| !to_death && met_now > met && began.elapsed() > patient(REPAIR);
        while began.elapsed() < Duration::from_secs(5)
            && memory.killed() == done.starved
            && !long_enough(memory.met())
        {
            // Version 1 refuses what cannot be given back. Then there is no more than what is used.
            let usage = memory.usage();
            drop(memory.limit(usage - usage / 16).or_else(|_| memory.limit(usage)));
            std::thread::sleep(Duration::from_millis(20));
        }
        if self.start_again(memory, daemon, done) {
            // Once more where there is no room, before there is.
            std::thread::sleep(Duration::from_millis(500));
        }
        memory.limit(MEMORY).expect("more is not refused");
        done.squeezes += u32::from(memory.met() > met);
        done.dying += u32::from(memory.killed() > done.starved && !daemon.has_ended());
        // The kernel may be about to choose somebody.
        std::thread::sleep(patient(Duration::from_millis(200)));
        self.start_again(memory, daemon, done);
        said(daemon, "synced");
    }

    /// Starts the program again if the kernel ended it for want of memory. Who was chosen may take a while to be
    /// gone, on a busy machine.
    fn start_again(&self, memory: &Memory, daemon: &mut Daemon, done: &mut Done) -> bool {
        if memory.killed() == done.starved {
            return false;
        }
        wait_until("the program that was chosen to be gone", || daemon.has_ended());
        done.starved += 1;
        *daemon = self.spawn();
        true
    }

    /// Sets the program's wall clock, and nobody else's.
    fn jump(&self, clock: &Clock, daemon: &Daemon, random: &mut Random, done: &mut Done) {
        said(daemon, "synced");
        // Beyond these, a certificate is not valid, and the API server cannot be asked again.
        let (back, ahead) = if self.api.is_some() { (1800, 86_400) } else { (10 << 25, 10 << 25) };
        let seconds =
            i64::try_from(random.below(back + ahead)).unwrap() - i64::try_from(back).unwrap();
        clock.set(seconds);
        done.jumps += 1;
        done.farthest = done.farthest.max(seconds.abs());
        let at = std::net::SocketAddr::new(ip(NODE[0]), 10256);
        wait_until("the program to see it", || {
            let page = get(self.net, "client", at, "/healthz").expect("it serves");
            assert_eq!(page.code, 200, "{}", page.body);
            let now: jiff::Timestamp =
                page.json()["currentTime"].as_str().unwrap().parse().unwrap();
            let apart = now.as_second() - jiff::Timestamp::now().as_second();
            (apart - seconds).abs() < 30
        });
    }

    /// Ends the API server at once, perhaps with etcd, and starts it again a while later.
    fn end_api(
        &self,
        api: &Api<'_>,
        daemon: &mut Daemon,
        killing: bool,
        random: &mut Random,
        done: &mut Done,
    ) {
        // Nothing is asked of it meanwhile.
        let mut plane = api.plane.lock().unwrap();
        let began = Instant::now();
        let etcd = random.below(3) == 0;
        plane.kill_apiserver();
        if etcd {
            plane.kill_etcd();
        }
        std::thread::sleep(Duration::from_millis(random.below(3000)));
        if killing && random.below(2) == 0 {
            daemon.end(Signal::SIGKILL);
            *daemon = self.spawn();
            done.kills += 1;
        }
        if etcd {
            plane.start_etcd();
        }
        api.runtime.block_on(plane.start_apiserver());
        done.api_kills[0] += 1;
        done.api_kills[1] += u32::from(etcd);
        done.api_away = done.api_away.max(began.elapsed());
    }
}

/// Has the kernel forget connections that were begun and not answered; how many it forgot.
pub(super) fn forget_begun(node: &str) -> usize {
    let mut forgotten = 0;
    for family in ["ipv4", "ipv6"] {
        let delete = ["conntrack", "-D", "-f", family, "-p", "tcp", "--state", "SYN_SENT"];
        let deleted = Command::new("ip").args(["netns", "exec", node]).args(delete).output();
        let deleted = deleted.unwrap();
        // There may have been none.
        assert!(matches!(deleted.status.code(), Some(0 | 1)));
        forgotten += String::from_utf8(deleted.stdout).unwrap().lines().count();
    }
    forgotten
}

/// A control group with little memory, of version 1 or 2, if this machine lets us make one.
pub(super) struct Memory {
    dir: PathBuf,
    /// The file of the limit.
    limit: &'static str,
}

impl Memory {
    pub(super) fn new() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("nftp-soak-{}-{number}", std::process::id());
        for (root, limit) in [
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", "memory.max"),
            ("/sys/fs/cgroup/unified", "memory.max"),
        ] {
            let dir = Path::new(root).join(&name);
            if !Path::new(root).join("cgroup.procs").exists() || fs::create_dir(&dir).is_err() {
                continue;
            }
            let this = Self { dir, limit };
            if this.dir.join(limit).exists() && this.limit(MEMORY).is_ok() {
                return Some(this);
            }
        }
        eprintln!("no control group can be made here: memory is not short");
        None
    }

    pub(super) fn add(&self, pid: u32) {
        fs::write(self.dir.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    fn limit(&self, bytes: u64) -> std::io::Result<()> {
        fs::write(self.dir.join(self.limit), bytes.to_string())
    }

    fn usage(&self) -> u64 {
        let of = |name: &str| fs::read_to_string(self.dir.join(name)).ok();
        let text = of("memory.usage_in_bytes").or_else(|| of("memory.current")).unwrap();
        text.trim().parse().unwrap()
    }

    /// How many processes the kernel ended, or is about to end, for want of it.
    fn killed(&self) -> u64 {
        let of = |name: &str| fs::read_to_string(self.dir.join(name)).ok();
        let text = of("memory.oom_control").or_else(|| of("memory.events")).unwrap();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.unwrap().parse().unwrap()
    }

    /// How often the limit was met.
    fn met(&self) -> u64 {
        let of = |name: &str| fs::read_to_string(self.dir.join(name)).ok();
        if let Some(count) = of("memory.failcnt") {
            return count.trim().parse().unwrap();
        }
        let events = of("memory.events").unwrap();
        events.lines().find_map(|line| line.strip_prefix("max ")).unwrap().parse().unwrap()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        drop(fs::remove_dir(&self.dir));
    }
}

/// The wall clock of the program, by libfaketime, in its build for programs with threads: the other reads the
/// time wrong while one of them reads the file. Nothing else of the program is changed.
pub(super) struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    pub(super) fn new(net: &Net) -> Option<Self> {
        let found = fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path());
        let library = found
            .map(|dir| dir.join("faketime/libfaketimeMT.so.1"))
            .find(|library| library.exists());
        if library.is_none() {
            eprintln!("there is no libfaketime: the clock does not jump");
        }
        let this = Self { library: library?, file: net.dir.path().join("clock") };
        this.set(0);
        Some(this)
    }

    fn set(&self, seconds: i64) {
        let next = self.file.with_extension("next");
        fs::write(&next, format!("{seconds:+}\n")).unwrap();
        fs::rename(next, &self.file).unwrap();
    }

    /// What starts a program with this clock. The library ends the program if another of its number left
    /// something in `/dev/shm`, as those that are killed do: each has one of its own, in the mounts that
    /// `ip netns exec` makes.
    pub(super) fn starting(&self) -> Vec<String> {
        [
            "sh".to_owned(),
            "-c".to_owned(),
            "mount -t tmpfs shm /dev/shm && exec env \"$@\"".to_owned(),
            "sh".to_owned(),
            format!("LD_PRELOAD={}", self.library.display()),
            format!("FAKETIME_TIMESTAMP_FILE={}", self.file.display()),
            "FAKETIME_CACHE_DURATION=1".to_owned(),
            "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
            "NO_FAKE_STAT=1".to_owned(),
        ]
        .into()
    }
}
