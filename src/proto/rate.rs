//! A limit on how fast pages are pushed: bytes by time, no more than a moment ahead.
//!
//! Pure: the caller says what time it is and what it has sent, and is told how long to wait
//! before it sends more. What is sent to a vCPU that waits is not counted here.

use std::time::Duration;

/// Time that was not used is worth so much later: what a sleep is late by.
const CREDIT: Duration = Duration::from_millis(5);

/// How much of a second goes out in one go at most.
const STEP_MS: u64 = 10;

/// At most so many bits a second.
///
/// In any stretch of time `t` at most `rate * (t + 5 ms)` and what one call of
/// [`sent`](Self::sent) reports go out.
#[derive(Clone, Debug, Default)]
pub struct RateLimit {
    bps: Option<u64>,
    /// When what was sent is paid for.
    paid: Duration,
}

impl RateLimit {
    /// The limit from now on, in bits a second (at least 1); `None` is none.
    pub fn set(&mut self, now: Duration, bps: Option<u64>) {
        if self.bps != bps {
            (self.bps, self.paid) = (bps.map(|bps| bps.max(1)), now);
        }
    }

    /// The limit, in bits a second.
    pub fn bps(&self) -> Option<u64> {
        self.bps
    }

    /// The most bytes to report in one call: more would be a burst of its own.
    pub fn bytes_max(&self) -> Option<u64> {
        Some(self.bps? / 8 / (1000 / STEP_MS))
    }

    /// So many bytes are on their way.
    pub fn sent(&mut self, now: Duration, bytes: u64) {
        let Some(bps) = self.bps else { return };
        let nanos = u128::from(bytes) * 8_000_000_000 / u128::from(bps);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.paid = self.paid.max(now.saturating_sub(CREDIT)).saturating_add(cost);
    }

    /// How long to wait before anything else is sent.
    pub fn wait(&self, now: Duration) -> Duration {
        if self.bps.is_none() { Duration::ZERO } else { self.paid.saturating_sub(now) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whoever waits as told, and a little longer, neither exceeds the limit nor stays far
        /// below it.
        #[test]
        fn the_limit_is_kept_and_used(
            bps in 1_000_000u64..10_000_000_000,
            frames in prop::collection::vec((1u64..260_000, 0u64..3_000), 50..300),
        ) {
            let mut limit = RateLimit::default();
            limit.set(Duration::ZERO, Some(bps));
            let (mut now, mut sent) = (Duration::ZERO, Vec::new());
            for (bytes, late_us) in frames {
                let wait = limit.wait(now);
                // A sleep is late, where there is one.
                let late = if wait.is_zero() { 0 } else { late_us };
                now += wait + Duration::from_micros(late);
                limit.sent(now, bytes);
                sent.push((now, bytes));
            }
            let most = 260_000.0;
            for (index, (from, _)) in sent.iter().enumerate() {
                let mut bytes = 0.0;
                for (at, more) in &sent[index..] {
                    bytes += *more as f64;
                    let allowed = (*at - *from + CREDIT).as_secs_f64() * bps as f64 / 8.0 + most;
                    prop_assert!(bytes <= allowed * 1.0001, "{bytes} of {allowed}");
                }
            }
            // Being late is made up for as long as it is not by more than the credit.
            let all: u64 = sent.iter().map(|(_, bytes)| bytes).sum();
            let took = limit.paid.as_secs_f64();
            prop_assert!(all as f64 * 8.0 >= took * bps as f64 * 0.999, "{all} bytes in {took} s");
        }
    }

    #[test]
    fn without_a_limit_nobody_waits_and_a_new_one_forgets_what_was_owed() {
        let mut limit = RateLimit::default();
        limit.sent(Duration::ZERO, u64::MAX);
        assert_eq!(limit.wait(Duration::ZERO), Duration::ZERO);
        limit.set(Duration::ZERO, Some(0));
        limit.sent(Duration::ZERO, u64::MAX);
        assert!(limit.wait(Duration::from_secs(1)) > Duration::from_secs(1 << 30));
        limit.set(Duration::from_secs(1), Some(8_000));
        limit.sent(Duration::from_secs(1), 1000);
        let wait = limit.wait(Duration::from_secs(1));
        assert!(wait <= Duration::from_secs(1) && wait > Duration::from_millis(900), "{wait:?}");
        limit.set(Duration::from_secs(1), None);
        assert_eq!(limit.wait(Duration::from_secs(1)), Duration::ZERO);
    }
}
