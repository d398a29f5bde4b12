//! A node on which nothing happens.

use std::thread::sleep;
use std::time::Duration;

use crate::control_plane::User;
use crate::e2e::{A, service, with_cluster};
use crate::objects::CLUSTER;
use crate::wakeups::{listed, so_far};

/// What was put off at the start is done by then.
const SETTLED: Duration = Duration::from_secs(10);

/// Long enough for everything that comes once a minute.
const WATCHED: Duration = Duration::from_secs(60);

#[test]
fn nothing_wakes_it_but_what_is_listed() {
    with_cluster(|cluster| {
        cluster.apply(CLUSTER);
        cluster.apply(&service("web", &["10.96.0.40"]).yaml());
        cluster.endpoints("web", &[A]);
        let daemon = cluster.start(User::KubeProxy);
        sleep(SETTLED);
        let before = so_far(daemon.pid());
        sleep(WATCHED);
        let mut woke = so_far(daemon.pid());
        for (thread, slept) in &mut woke {
            *slept -= before.get(thread).copied().unwrap_or(0.0);
        }
        for thread in ["program", "conntrack", "host", "drift"] {
            assert_eq!(woke.get(thread), Some(&0.0), "{thread} waits for news: {woke:?}");
        }
        let a_second = woke.values().sum::<f64>() / WATCHED.as_secs_f64();
        assert!(a_second > 0.0, "it asks for signs of life: {woke:?}");
        assert!(a_second <= listed(), "{a_second} a second, listed are {}: {woke:?}", listed());
    });
}
