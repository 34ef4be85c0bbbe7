//! The pacer on a simulated bottleneck, and under arbitrary measurements.
//!
//! Discrete events: a link with an endless queue that push and urgent answers share, of one
//! guest or, in [`sharing`], of several. No loss and no congestion controller under the window.

mod sharing;

use super::*;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A bottleneck with an endless first-in-first-out queue.
#[derive(Clone, Copy, Debug)]
struct Link {
    rate_bps: u64,
    base_rtt: Duration,
    /// Acknowledgements leave in bursts of this period.
    ack_every: Duration,
    /// Each urgent answer is late by up to twice this, and one in twenty by 1-2 ms more.
    noise: Duration,
    seed: u64,
}

/// A page and its frame.
const URGENT_BYTES: u64 = 4096 + 64;
/// What times the urgent lane, and how often: as the engine does.
const PING_BYTES: u64 = 64;
const PING_EVERY_NS: u64 = 4_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Begins,
    Ends,
    Acked(u64),
    Pinged,
    Ponged(u64),
    AskedFor(u64),
    Answered(u64),
}

/// A guest whose push always has something to send, and which asks for one page after another.
#[derive(Debug)]
struct Guest {
    pacer: Pacer,
    base_rtt: Duration,
    runs: bool,
    outstanding: u64,
    acked: u64,
    /// Push and urgent bytes that arrived.
    arrived: u64,
    /// How long its faults waited, in nanoseconds.
    waits: Vec<u64>,
}

#[derive(Debug)]
struct Outcome {
    /// Delivered, of what the link could, in 0..=1.
    utilisation: f64,
    /// Of that, each guest's.
    shares: Vec<f64>,
    queue_mean: Duration,
    queue_p95: Duration,
    /// Each guest's.
    faults_p99: Vec<Duration>,
}

#[derive(Debug)]
struct Simulation {
    link: Link,
    guests: Vec<Guest>,
    now: u64,
    events: BinaryHeap<Reverse<(u64, u64, usize, Event)>>,
    scheduled: u64,
    free_at: u64,
    chunk: u64,
    random: u64,
    queues: Vec<u64>,
}

impl Simulation {
    fn new(link: Link) -> Self {
        Self {
            link,
            guests: Vec::new(),
            now: 0,
            events: BinaryHeap::new(),
            scheduled: 0,
            free_at: 0,
            // About 10 us of the link, but whole packets.
            chunk: (link.rate_bps / 8 / 100_000).clamp(1452, 24_000),
            random: link.seed,
            queues: Vec::new(),
        }
    }

    /// A guest that begins at this time, with a round trip of its own.
    fn add(&mut self, begins: Duration, base_rtt: Duration) {
        self.guests.push(Guest {
            pacer: Pacer::new(PacerConfig::default()),
            base_rtt,
            runs: false,
            outstanding: 0,
            acked: 0,
            arrived: 0,
            waits: Vec::new(),
        });
        self.at(begins.as_nanos() as u64, self.guests.len() - 1, Event::Begins);
    }

    fn at(&mut self, time: u64, guest: usize, event: Event) {
        self.scheduled += 1;
        self.events.push(Reverse((time, self.scheduled, guest, event)));
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.random >> 33) % below.max(1)
    }

    fn lateness(&mut self) -> u64 {
        let noise = self.random(2 * self.link.noise.as_nanos() as u64);
        let spike = self.link.noise > Duration::ZERO && self.random(20) == 0;
        noise + if spike { 1_000_000 + self.random(1_000_000) } else { 0 }
    }

    /// Puts `bytes` into the bottleneck's queue; when the last of them leaves it.
    fn transmit(&mut self, bytes: u64) -> u64 {
        let takes = bytes * 8 * 1_000_000_000 / self.link.rate_bps;
        self.free_at = self.free_at.max(self.now) + takes;
        self.free_at
    }

    fn push(&mut self, index: usize) {
        let every = (self.link.ack_every.as_nanos() as u64).max(1);
        loop {
            let guest = &mut self.guests[index];
            let room = guest.outstanding + self.chunk <= guest.pacer.window_bytes();
            if !guest.runs || !room {
                return;
            }
            guest.outstanding += self.chunk;
            let base = guest.base_rtt.as_nanos() as u64;
            let acked_at = (self.transmit(self.chunk) + base).next_multiple_of(every);
            self.at(acked_at, index, Event::Acked(self.chunk));
        }
    }

    fn handle(&mut self, index: usize, event: Event) {
        let now = self.now;
        let queue = self.free_at.saturating_sub(now);
        let guest = &mut self.guests[index];
        let base = guest.base_rtt.as_nanos() as u64;
        match event {
            Event::Begins => {
                // The handshake's round trip is a little long, and stands in the queue of others.
                let rtt = Duration::from_nanos(base + queue) + Duration::from_micros(100);
                let config = PacerConfig { rtt_initial: Some(rtt), ..PacerConfig::default() };
                (guest.pacer, guest.runs) = (Pacer::new(config), true);
                self.at(now, index, Event::Pinged);
                self.at(now + base, index, Event::AskedFor(now));
            }
            Event::Ends => guest.runs = false,
            Event::Acked(bytes) => {
                guest.outstanding -= bytes;
                guest.acked += bytes;
                guest.arrived += bytes;
            }
            Event::Pinged if guest.runs => {
                let ponged_at = self.lateness() + self.transmit(PING_BYTES) + base;
                self.at(ponged_at, index, Event::Ponged(now));
                // Timers have a granularity of a millisecond.
                let next_at = now + PING_EVERY_NS + self.random(1_000_000);
                self.at(next_at, index, Event::Pinged);
            }
            Event::Ponged(pinged_at) => {
                let at = Duration::from_nanos(now);
                guest.pacer.on_urgent_rtt(at, Duration::from_nanos(now - pinged_at));
                // The answer is followed by an account.
                guest.pacer.on_push_delivered(at, guest.acked);
            }
            Event::AskedFor(asked_at) if guest.runs => {
                guest.arrived += URGENT_BYTES;
                self.queues.push(queue);
                let answered_at = self.lateness() + self.transmit(URGENT_BYTES) + base / 2;
                self.at(answered_at, index, Event::Answered(asked_at));
            }
            Event::Answered(asked_at) => {
                guest.waits.push(now - asked_at);
                let asks_at = now + self.random(1_000_000);
                self.at(asks_at + base / 2, index, Event::AskedFor(asks_at));
            }
            Event::Pinged | Event::AskedFor(_) => {}
        }
    }

    fn run_until(&mut self, end: Duration) {
        let end = end.as_nanos() as u64;
        while let Some(&Reverse((time, _, guest, event))) = self.events.peek() {
            if time > end {
                break;
            }
            self.events.pop();
            self.now = time;
            self.handle(guest, event);
            self.push(guest);
        }
        self.now = end;
    }

    /// What happens from now on, for `time`.
    fn measure(&mut self, time: Duration) -> Outcome {
        let before: Vec<u64> = self.guests.iter().map(|guest| guest.arrived).collect();
        self.queues.clear();
        self.guests.iter_mut().for_each(|guest| guest.waits.clear());
        self.run_until(Duration::from_nanos(self.now) + time);
        let possible = self.link.rate_bps as f64 / 8.0 * time.as_secs_f64();
        let arrived = |(guest, before): (&Guest, u64)| (guest.arrived - before) as f64 / possible;
        let shares: Vec<f64> = self.guests.iter().zip(before).map(arrived).collect();
        let mean = self.queues.iter().sum::<u64>() / self.queues.len() as u64;
        Outcome {
            utilisation: shares.iter().sum(),
            shares,
            queue_mean: Duration::from_nanos(mean),
            queue_p95: percentile(&mut self.queues, 95),
            faults_p99: self
                .guests
                .iter_mut()
                .map(|guest| percentile(&mut guest.waits, 99))
                .collect(),
        }
    }
}

fn percentile(values: &mut [u64], percent: usize) -> Duration {
    values.sort_unstable();
    let value = values.get(values.len() * percent / 100).copied();
    Duration::from_nanos(value.unwrap_or_default())
}

fn link(rate_bps: u64, base_rtt_us: u64) -> Link {
    Link {
        rate_bps,
        base_rtt: Duration::from_micros(base_rtt_us),
        ack_every: Duration::ZERO,
        noise: Duration::ZERO,
        seed: 1,
    }
}

/// Long enough for some 40 round trips.
fn warm_up(link: Link) -> Duration {
    Duration::from_millis(300) + 40 * link.base_rtt
}

#[test]
fn it_fills_the_link_and_keeps_the_queue_near_the_target() {
    for rate_bps in [100_000_000, 1_000_000_000, 10_000_000_000, 20_000_000_000] {
        for base_rtt_us in [20, 200, 1_000, 10_000, 50_000] {
            for ack_every in [Duration::ZERO, Duration::from_millis(1)] {
                let link = Link { ack_every, ..link(rate_bps, base_rtt_us) };
                let config = PacerConfig::default();
                let mut simulation = settled(link);
                let time = Duration::from_secs(1) + 10 * link.base_rtt;
                let outcome = simulation.measure(time);
                let target = simulation.guests[0].pacer.target();
                println!(
                    "{rate_bps:12} bit/s {base_rtt_us:6} us acks {ack_every:?}: {outcome:.3?}, target {target:?}"
                );
                // The window's upper bound is one of the rate as well.
                let limit = config.window_max as f64 * 8.0
                    / (link.base_rtt + ack_every).as_secs_f64()
                    / rate_bps as f64;
                assert!(outcome.utilisation > 0.9 * limit.min(1.0), "{link:?} {outcome:?}");
                // The least window and a packet are a queue of their own on slow links.
                let least = config.window_min as f64 * 8.0 / rate_bps as f64;
                let bound = 2 * target + Duration::from_secs_f64(least);
                assert!(outcome.queue_mean < bound, "{link:?} {outcome:?} {bound:?}");
            }
        }
    }
}

fn settled(link: Link) -> Simulation {
    let mut simulation = Simulation::new(link);
    simulation.add(Duration::ZERO, link.base_rtt);
    simulation.run_until(warm_up(link));
    simulation
}

#[test]
fn scheduling_noise_does_not_make_it_collapse() {
    for seed in 1..=5 {
        let noise = Duration::from_micros(200);
        let ack_every = Duration::from_micros(500);
        let link = Link { noise, seed, ack_every, ..link(10_000_000_000, 50) };
        let outcome = settled(link).measure(Duration::from_millis(500));
        println!("seed {seed}: {outcome:?}");
        assert!(outcome.utilisation > 0.9, "seed {seed}: {outcome:?}");
        assert!(outcome.queue_p95 < Duration::from_millis(3), "seed {seed}: {outcome:?}");
    }
}

#[test]
fn it_follows_a_link_that_slows_down_and_recovers() {
    for base_rtt_us in [200, 1_000, 20_000] {
        let mut simulation = settled(link(1_000_000_000, base_rtt_us));
        simulation.link.rate_bps = 100_000_000;
        simulation.measure(Duration::from_secs(2));
        let slow = simulation.measure(Duration::from_secs(1));
        simulation.link.rate_bps = 1_000_000_000;
        simulation.measure(Duration::from_secs(2));
        let fast = simulation.measure(Duration::from_secs(1));
        println!("{base_rtt_us} us: slow {slow:?}, fast {fast:?}");
        assert!(slow.utilisation > 0.9 && fast.utilisation > 0.9, "{slow:?} {fast:?}");
        let target = simulation.guests[0].pacer.target();
        assert!(slow.queue_p95 < 3 * target + Duration::from_millis(3), "{slow:?}");
        assert!(fast.queue_p95 < 3 * target, "{fast:?}");
    }
}

#[test]
fn looking_under_the_queue_costs_little_and_keeps_the_base() {
    let mut simulation = settled(link(200_000_000, 2_000));
    let outcome = simulation.measure(Duration::from_secs(60));
    assert!(outcome.utilisation > 0.98, "{outcome:?}");
    // Were the queue that always stands taken for the base, it would grow by a target
    // with each epoch.
    assert!(simulation.guests[0].pacer.base_rtt() < Duration::from_micros(2_500), "{simulation:?}");
    assert!(outcome.queue_p95 < Duration::from_millis(2), "{outcome:?}");
}

#[test]
fn the_window_holds_while_nobody_asks_and_survives_a_pause_of_push() {
    let mut simulation = settled(link(1_000_000_000, 1_000));
    let mut pacer = simulation.guests[0].pacer.clone();
    let before = pacer.window_bytes();
    let mut acked = simulation.guests[0].acked;
    let mut now = Duration::from_nanos(simulation.now);
    for _ in 0..200 {
        // Full rate and not a single fault, then a pause.
        now += Duration::from_millis(1);
        acked += 125_000;
        pacer.on_push_delivered(now, acked);
        assert!(pacer.window_bytes().abs_diff(before) < before / 4, "{pacer:?}");
    }
    for _ in 0..200 {
        now += Duration::from_millis(1);
        pacer.on_push_delivered(now, acked);
    }
    assert!(pacer.window_bytes().abs_diff(before) < before / 4, "{pacer:?}");
    assert_eq!(pacer.run_pages(), 30);
    assert!(simulation.measure(Duration::from_millis(100)).utilisation > 0.9);
}

proptest::proptest! {
    #[test]
    fn the_window_stays_within_bounds_whatever_is_measured(
        samples in proptest::collection::vec(
            (proptest::bool::ANY, 0..u64::MAX / 2, proptest::num::u64::ANY, 0..100_000_000u64),
            0..300,
        ),
    ) {
        let config = PacerConfig::default();
        let mut pacer = Pacer::new(config);
        let mut now = 0;
        for (urgent, wild_now, value, passes) in samples {
            now += passes;
            // The clock is wild now and then.
            let at = Duration::from_nanos(if wild_now % 16 == 0 { wild_now } else { now });
            if urgent {
                pacer.on_urgent_rtt(at, Duration::from_nanos(value >> (value % 64)));
            } else {
                pacer.on_push_delivered(at, value >> (value % 64));
            }
            let window = pacer.window_bytes();
            let least = if pacer.looks.is_on() { LOOK_BYTES_MIN } else { config.window_min };
            proptest::prop_assert!(window >= least && window <= config.window_max);
            proptest::prop_assert!((16..=RUN_PAGES_MAX).contains(&pacer.run_pages()));
            proptest::prop_assert!(pacer.samples.len() <= SAMPLES_MAX);
            proptest::prop_assert!(pacer.rate.rounds.len() <= ROUNDS_MAX);
        }
    }
}
