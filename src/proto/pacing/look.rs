//! [`Looks`]: when the window is cut to look under the queue.
//!
//! What push has in the bottleneck's queue stands there all the time, and is not to be told from
//! the way itself. Under it one looks by sending hardly anything, as BBR (Cardwell et al., 2017)
//! and LEDBAT++ do. Others who push over the same link hide the base just as well, so all have to
//! look at the same time, and nothing tells them to but the queue:
//!
//! * Each one looks when its start-up has ended, and then after 1, 2, 4, 8, 10, 10... seconds.
//! * Whoever sees the queue fall without having cut anything *looks along*: somebody else
//!   is looking, and for both there is more to be seen then.
//!
//! A look lasts until others had the time to see it, and to look along, and round trips were
//! measured since. That is paid for with throughput, so at most a twentieth of the time is spent on
//! looks of one's own, and a fortieth on looking along: on busy cores noise is taken for it.

use std::time::Duration;

/// The pause before the second look, and the longest one.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long a look is: three round trips are measured, some milliseconds apart, beside those in
/// which others see it and the queue passes.
const SAMPLED: Duration = Duration::from_millis(12);
const ROUND_TRIPS: u32 = 2;
/// Beside two round trips, how long the queue may take to be there again after a look.
const FILLED: Duration = Duration::from_millis(4);
/// A pause is so many times as long as a look at least.
const SHARE: u32 = 20;
/// So is the time between two looks along: what was taken for others' may have been noise.
const SHARE_ALONG: u32 = 40;

/// When to look.
#[derive(Clone, Debug)]
pub(super) struct Looks {
    /// Since when it is looked.
    since: Option<Duration>,
    ended: Duration,
    /// How long after that the next one begins.
    pause: Duration,
    /// When another one's look was last joined.
    along: Option<Duration>,
}

impl Default for Looks {
    fn default() -> Self {
        Self { since: None, ended: Duration::ZERO, pause: PAUSE_MIN, along: None }
    }
}

impl Looks {
    /// Whether the window is cut.
    pub(super) fn is_on(&self) -> bool {
        self.since.is_some()
    }

    /// Cuts it from now on.
    pub(super) fn begin(&mut self, now: Duration) {
        self.since.get_or_insert(now);
    }

    /// Cuts it because others have, unless that was so just now, or the queue is only not yet
    /// what it was before the last look.
    pub(super) fn look_along(&mut self, now: Duration, rtt: Duration) {
        let filled = now.saturating_sub(self.ended) >= FILLED + 2 * rtt;
        let long_ago = |at| now.saturating_sub(at) >= SHARE_ALONG * takes(rtt);
        if filled && self.along.is_none_or(long_ago) {
            self.along = Some(now);
            self.begin(now);
        }
    }

    /// Ends a look that has lasted long enough, and says so; or begins one that is due.
    pub(super) fn ended(&mut self, now: Duration, rtt: Duration) -> bool {
        match self.since {
            Some(since) if now.saturating_sub(since) >= takes(rtt) => {
                (self.since, self.ended) = (None, now);
                return true;
            }
            None if now.saturating_sub(self.ended) >= self.pause.max(SHARE * takes(rtt)) => {
                self.pause = (2 * self.pause).min(PAUSE_MAX);
                self.begin(now);
            }
            _ => {}
        }
        false
    }
}

fn takes(rtt: Duration) -> Duration {
    SAMPLED + ROUND_TRIPS * rtt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// The beginnings of all looks within `time`, if each is measured every millisecond.
    fn begins(looks: &mut Looks, rtt: Duration, time: Duration) -> Vec<Duration> {
        let mut found = Vec::new();
        for now in (1..=time.as_millis() as u64).map(ms) {
            let before = looks.is_on();
            looks.ended(now, rtt);
            found.extend((!before && looks.is_on()).then_some(now));
        }
        found
    }

    #[test]
    fn looks_are_further_and_further_apart_and_never_more_than_a_part_of_the_time() {
        // 14 ms each, and the pauses begin when they end.
        let found = begins(&mut Looks::default(), ms(1), ms(40_000));
        assert_eq!(found, [1_000, 3_014, 7_028, 15_042, 25_056, 35_070].map(ms));
        // 812 ms each: 16 s are twenty times as much.
        let found = begins(&mut Looks::default(), ms(400), ms(60_000));
        assert_eq!(found, [16_240, 33_292, 50_344].map(ms));
    }

    #[test]
    fn others_looks_are_joined_at_once_but_not_again_and_again() {
        let mut looks = Looks::default();
        looks.begin(ms(100));
        assert!(!looks.ended(ms(113), ms(1)) && looks.is_on());
        assert!(looks.ended(ms(114), ms(1)) && !looks.is_on());
        looks.look_along(ms(119), ms(1));
        assert!(!looks.is_on(), "its own window has not filled the queue again");
        looks.look_along(ms(120), ms(1));
        assert!(looks.is_on() && looks.ended(ms(134), ms(1)));
        looks.look_along(ms(679), ms(1));
        assert!(!looks.is_on(), "it was 559 ms ago");
        looks.look_along(ms(680), ms(1));
        assert!(looks.is_on());
    }
}
