//! The timer by which connections are asked for signs of life: all of them at once.
//!
//! Each connection has its own time for that, so that a node on which nothing happens would wake up for one after
//! the other. Here they share a beat, and are asked at the last one before their time: never later than they would
//! have been. The beat began with the process, so that nodes do not beat together.

use std::pin::Pin;
use std::sync::LazyLock;
use std::time::Duration;

use hyper::rt::{Sleep, Timer};
use hyper_util::rt::TokioTimer;
use tokio::time::Instant;

static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Sleeps until the beat before a deadline. What is further away than the next beat can be is no time to ask, but
/// the time by which there must be an answer, and stays.
#[derive(Clone)]
pub(super) struct OnBeat {
    apart: Duration,
    timer: TokioTimer,
}

impl OnBeat {
    /// With so much time between two beats.
    pub(super) fn new(apart: Duration) -> Self {
        Self { apart, timer: TokioTimer::new() }
    }

    fn beat_before(&self, deadline: Instant, now: Instant) -> Instant {
        if deadline > now + self.apart {
            return deadline;
        }
        let since = deadline.saturating_duration_since(*FIRST).as_nanos() % self.apart.as_nanos();
        // Less than the time between two beats.
        deadline - Duration::from_nanos(u64::try_from(since).unwrap_or(0))
    }
}

impl Timer for OnBeat {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    fn sleep_until(&self, deadline: std::time::Instant) -> Pin<Box<dyn Sleep>> {
        self.timer.sleep_until(self.beat_before(deadline.into(), Instant::now()).into())
    }

    fn reset(&self, sleep: &mut Pin<Box<dyn Sleep>>, deadline: std::time::Instant) {
        self.timer.reset(sleep, self.beat_before(deadline.into(), Instant::now()).into());
    }

    fn now(&self) -> std::time::Instant {
        self.timer.now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_asked_between_two_beats_is_asked_at_the_first_and_answers_have_their_time() {
        let (apart, tick) = (Duration::from_secs(14), Duration::from_nanos(1));
        let timer = OnBeat::new(apart);
        let beat = *FIRST + 1000 * apart;
        for past in [Duration::ZERO, tick, apart / 2, apart.saturating_sub(tick)] {
            // Whether it is yet to come, or is over already.
            for now in [beat + past - apart, beat, beat + past] {
                assert_eq!(timer.beat_before(beat + past, now), beat);
            }
            let answer = beat + past + apart + tick;
            assert_eq!(timer.beat_before(answer, beat + past), answer);
        }
    }
}
