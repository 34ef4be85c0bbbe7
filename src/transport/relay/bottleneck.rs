//! One direction of a link in virtual time: when does a datagram arrive, if at all?
//!
//! No clock and no IO: the caller says when each datagram came. All times are
//! nanoseconds of one monotonic clock.

use super::{QueueLimit, RelayConfig};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// A rate, a queue, a delay and a loss.
#[derive(Debug)]
pub(super) struct Bottleneck {
    bandwidth_bps: Option<u64>,
    queue: QueueLimit,
    delay_ns: u64,
    loss: f64,
    rng: StdRng,
    /// When the last datagram accepted will have left the queue.
    busy_until_ns: u64,
}

/// What becomes of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It arrives at the other end at this time, never before an earlier one.
    Arrives(u64),
    /// The queue is full.
    QueueFull,
    /// It goes over the link and is lost.
    Lost,
}

impl Bottleneck {
    /// One direction of `config`'s link; each direction has its own `stream` of chance.
    pub(super) fn new(config: &RelayConfig, stream: u64) -> Self {
        Self {
            bandwidth_bps: config.bandwidth_bps,
            queue: config.queue,
            delay_ns: (config.rtt / 2).as_nanos() as u64,
            loss: config.loss,
            rng: StdRng::seed_from_u64(config.seed.wrapping_mul(2).wrapping_add(stream)),
            busy_until_ns: 0,
        }
    }

    /// The fate of a datagram of `bytes`, headers included, that came at `arrived_ns`.
    pub(super) fn offer(&mut self, arrived_ns: u64, bytes: u64) -> Fate {
        // Drawn for each datagram, so that a datagram's luck depends on its number alone.
        let lost = self.rng.random_bool(self.loss);
        let start_ns = arrived_ns.max(self.busy_until_ns);
        if let Some(bps) = self.bandwidth_bps {
            let waiting_ns = start_ns - arrived_ns;
            if self.is_full(waiting_ns, bytes, bps) {
                return Fate::QueueFull;
            }
            self.busy_until_ns = start_ns + transmission_ns(bytes, bps);
        } else {
            self.busy_until_ns = start_ns;
        }
        if lost { Fate::Lost } else { Fate::Arrives(self.busy_until_ns + self.delay_ns) }
    }

    fn is_full(&self, waiting_ns: u64, bytes: u64, bps: u64) -> bool {
        match self.queue {
            QueueLimit::Time(limit) => u128::from(waiting_ns) > limit.as_nanos(),
            QueueLimit::Bytes(limit) => {
                let waiting = u128::from(waiting_ns) * u128::from(bps) / 8_000_000_000;
                waiting > 0 && waiting + u128::from(bytes) > u128::from(limit)
            }
        }
    }
}

/// Rounded up: a link is never faster than it says.
fn transmission_ns(bytes: u64, bps: u64) -> u64 {
    (u128::from(bytes) * 8_000_000_000).div_ceil(u128::from(bps)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    const GIGABIT: u64 = 1_000_000_000;

    fn bottleneck(queue: QueueLimit, loss: f64) -> Bottleneck {
        let config = RelayConfig {
            bandwidth_bps: Some(GIGABIT),
            rtt: Duration::from_millis(2),
            loss,
            queue,
            ..RelayConfig::default()
        };
        Bottleneck::new(&config, 0)
    }

    #[test]
    fn an_idle_link_adds_transmission_and_delay() {
        let mut link = bottleneck(QueueLimit::Time(Duration::from_millis(20)), 0.0);
        assert_eq!(link.offer(5_000, 9000), Fate::Arrives(5_000 + 72_000 + 1_000_000));
        // The second waits for the first.
        assert_eq!(link.offer(5_000, 9000), Fate::Arrives(5_000 + 144_000 + 1_000_000));
        // An idle spell earns no credit.
        assert_eq!(link.offer(9_000_000, 9000), Fate::Arrives(9_072_000 + 1_000_000));
    }

    #[test]
    fn the_queue_drops_at_its_tail() {
        let accepted = |mut link: Bottleneck| {
            (0..1000).filter(|_| link.offer(0, 9000) != Fate::QueueFull).count()
        };
        // 20 ms at 72 us each, and the one that is being sent.
        let by_time = bottleneck(QueueLimit::Time(Duration::from_millis(20)), 0.0);
        assert_eq!(accepted(by_time), 20_000 / 72 + 1);
        let by_bytes = bottleneck(QueueLimit::Bytes(90_000), 0.0);
        assert_eq!(accepted(by_bytes), 10);
        // A queue smaller than a datagram still lets an idle link send it.
        let tiny = bottleneck(QueueLimit::Bytes(100), 0.0);
        assert_eq!(accepted(tiny), 1);
    }

    #[test]
    fn loss_follows_rate_and_seed() {
        let fates = |seed: u64| {
            let config = RelayConfig { loss: 0.1, seed, ..RelayConfig::default() };
            let mut link = Bottleneck::new(&config, 0);
            (0..20_000).map(|at| link.offer(at, 1000)).collect::<Vec<_>>()
        };
        let one = fates(1);
        assert_eq!(one, fates(1));
        assert_ne!(one, fates(2));
        let lost = one.iter().filter(|fate| **fate == Fate::Lost).count();
        assert!((1_850..=2_150).contains(&lost), "{lost} of 20000 at 10 %");
    }

    proptest! {
        #[test]
        fn order_is_kept_and_the_rate_is_never_exceeded(
            datagrams in prop::collection::vec((0_u64..200_000, 28_u64..9000), 1..200)
        ) {
            let mut link = bottleneck(QueueLimit::Time(Duration::from_millis(5)), 0.0);
            let (mut now, mut first, mut last, mut bits) = (0, None, 0, 0);
            for (pause, bytes) in datagrams {
                now += pause;
                if let Fate::Arrives(at) = link.offer(now, bytes) {
                    prop_assert!(at >= last && at >= now + 1_000_000);
                    first.get_or_insert(at - transmission_ns(bytes, GIGABIT));
                    (last, bits) = (at, bits + bytes * 8);
                }
            }
            prop_assert!(u128::from(bits) <= u128::from(last - first.unwrap_or(last)));
        }
    }
}
