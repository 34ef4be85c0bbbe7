//! How much push may be under way: the send window of the push lanes.
//!
//! Push and urgent lane have sockets of their own but share the bottleneck's queue,
//! and whatever push has in that queue a network fault waits for. So push must fill the link and
//! keep the queue short. [`Pacer`] is a pure controller for that; it sends and
//! measures nothing itself. Choosing *which* pages go is
//! [`prepaging`](super::prepaging)'s part.
//!
//! Its signal is delay, as in TCP Vegas (Brakmo, O'Malley, Peterson, SIGCOMM 1994) and LEDBAT
//! (RFC 6817): the urgent lane's round trip above the least one seen lately is the
//! queue. The window is moved linearly towards the size at which the queue is
//! [`Pacer::target`]:
//!
//! ```text
//! window += GAIN * rate * (target - delay)       every two round trips or 4 ms
//! window += window / 8                           if delay is below a quarter of target
//! ```
//!
//! * `delay` is the *least* of the last few samples, never a single one: on busy
//!   cores single ones are late by milliseconds without any queue on the link, and a queue delays
//!   all of them.
//! * `target` is a quarter of the base round trip, but at least a millisecond, for so
//!   long are bursts of acknowledgements and scheduling noise, and at most 5 ms: so at 1 Gbit/s. It
//!   falls with the fourth root of the rate, because others push over the same link. They all see
//!   the same queue; with one target for all, whoever has a larger part of the link would keep it.
//!   Whose part is smaller wants a longer queue, and grows until all have the same, whatever the
//!   link's rate is (as in Swift, Kumar et al., SIGCOMM 2020).
//! * A start-up phase doubles the window, as slow start does, until there is a queue
//!   or the window is twice what the measured rate needs. It looks at every second round only:
//!   what is delivered in the first one was sent before the doubling.
//! * Without urgent samples the window holds: nobody waits, and nothing is known.
//! * The delivery rate bounds the window on both sides, so that neither a push lane
//!   with nothing to send opens it without end nor noise closes it: what lies
//!   between is the controller's.
//! * A queue that always stands hides the true base, and the queue of others does so from the
//!   beginning: who comes late and takes it for a part of the base starves those who were there. So
//!   the pacer cuts its window now and then to look under the queue, and looks along when others
//!   do: `pacing/look.rs`.

mod look;
#[cfg(test)]
mod simulation;

use super::page::{PAGE_SIZE, RUN_PAGES_MAX};
use look::Looks;
use std::collections::VecDeque;
use std::time::Duration;

/// Share of the error that one step corrects. The effect of a step is seen one or two
/// steps later, and an integrator with a lag of two is stable below 0.6.
const GAIN: f64 = 0.25;
/// The shortest step and the shortest round over which deliveries are counted:
/// acknowledgements come in bursts of up to a millisecond.
const STEP_MIN: Duration = Duration::from_millis(4);
/// Samples that a step needs, and the most that it looks at.
const SAMPLES_MIN: usize = 3;
const SAMPLES_MAX: usize = 8;
/// Rounds whose best counts as the delivery rate.
const ROUNDS_MAX: usize = 10;
/// Bounds of the queue's target.
const TARGET_MIN: Duration = Duration::from_millis(1);
const TARGET_MAX: Duration = Duration::from_millis(5);
/// What acknowledgements may be late by without any queue: the peer's ack delay
/// and some scheduling.
const ACK_DELAY: Duration = Duration::from_millis(1);
/// How far the window may be above what the rate and these times ask for, so that a rate
/// that is still rising is found. What is beyond it is only waited for by faults.
const SLACK: f64 = 1.25;
/// What the base round trip is taken for before it is known.
const RTT_UNKNOWN: Duration = Duration::from_millis(1);
/// How long a base round trip is believed: one to two of these.
const BASE_EPOCH: Duration = Duration::from_secs(15);
/// The part of the window that is left for a look under the queue, and its least size: hardly
/// any queue may be one's own, or a base far below the target is found too long, and with it one's
/// part of the link.
const LOOK_DIVISOR: f64 = 16.0;
const LOOK_BYTES_MIN: u64 = PAGE_SIZE as u64;
/// Where others let their queue go it falls at once by their part of it, and by more than noise.
const FALL_DIVISOR: u32 = 4;
const FALL_MIN: Duration = Duration::from_micros(200);
/// The rate at which the queue's target is not scaled, in bits a second, and the least and the
/// most that it is scaled by: what 16 Gbit/s and 62 Mbit/s give.
const TARGET_RATE_BPS: f64 = 1e9;
const TARGET_SCALE_MIN: f64 = 0.5;
const TARGET_SCALE_MAX: f64 = 2.0;
/// The least window, as time at the best rate seen for long. When busy cores delay
/// urgent answers and acknowledgements alike, the window shrinks, and with it the rate that
/// bounds it: this ends that spiral.
const PEAK_SHARE: Duration = Duration::from_micros(250);
/// How long that best rate is remembered before it is halved.
const PEAK_HALF_LIFE: Duration = Duration::from_secs(10);

/// Bounds of a [`Pacer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacerConfig {
    /// The least window in bytes, but for looks under the queue.
    pub window_min: u64,
    /// The greatest, in bytes. It limits the rate on long fat links to itself per round trip.
    pub window_max: u64,
    /// The window before anything is known, in bytes.
    pub window_initial: u64,
    /// A round trip measured before any push, such as the handshake's. Without it the
    /// first samples already stand behind push, and on slow links the base is taken
    /// for too long at first.
    pub rtt_initial: Option<Duration>,
}

impl Default for PacerConfig {
    fn default() -> Self {
        Self {
            window_min: 32 << 10,
            window_max: 16 << 20,
            window_initial: 64 << 10,
            rtt_initial: None,
        }
    }
}

/// Decides how many bytes of push may be claimed and not yet acknowledged.
///
/// All times count from the same beginning, such as the session's.
#[derive(Clone, Debug)]
pub struct Pacer {
    config: PacerConfig,
    /// In bytes.
    window: f64,
    phase: Phase,
    base: BaseRtt,
    /// The urgent samples since the last step, at most `SAMPLES_MAX`.
    samples: VecDeque<Duration>,
    /// The least of the samples of the last step, and of the one before.
    recent: Option<Duration>,
    before: Option<Duration>,
    stepped_at: Duration,
    rate: DeliveryRate,
    looks: Looks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Doubling. `rounds` were seen since the last doubling.
    Startup {
        rounds: u32,
    },
    Steady,
}

impl Pacer {
    /// A pacer that knows nothing yet.
    pub fn new(config: PacerConfig) -> Self {
        Self {
            config,
            window: config.window_initial as f64,
            phase: Phase::Startup { rounds: 0 },
            base: BaseRtt { now: config.rtt_initial, ..BaseRtt::default() },
            samples: VecDeque::with_capacity(SAMPLES_MAX),
            recent: None,
            before: None,
            stepped_at: Duration::ZERO,
            rate: DeliveryRate::default(),
            looks: Looks::default(),
        }
    }

    /// The bytes of push that may be under way now.
    pub fn window_bytes(&self) -> u64 {
        let max = self.config.window_max.max(self.config.window_min);
        if self.looks.is_on() {
            return ((self.window / LOOK_DIVISOR) as u64).max(LOOK_BYTES_MIN).min(max);
        }
        (self.window as u64).clamp(self.config.window_min, max)
    }

    /// Whether the start-up is over: the window is about as large as the link wants it.
    pub fn is_steady(&self) -> bool {
        self.phase == Phase::Steady
    }

    /// What the push lanes deliver, in bits a second; 0 if not known yet.
    pub fn rate_bps(&self) -> u64 {
        (self.rate.bytes_a_second() * 8.0) as u64
    }

    /// The round trip without a queue; a millisecond if nothing is known.
    pub fn base_rtt(&self) -> Duration {
        self.base.get().unwrap_or(RTT_UNKNOWN)
    }

    /// The round trip now: the least of the last few samples.
    pub fn rtt(&self) -> Duration {
        let least = self.samples.iter().min().copied();
        match (least, self.recent) {
            (Some(least), Some(recent)) if self.samples.len() < SAMPLES_MIN => least.min(recent),
            (least, recent) => least.or(recent).unwrap_or_else(|| self.base_rtt()),
        }
    }

    /// The queue that is aimed at, as the time that it takes to pass.
    pub fn target(&self) -> Duration {
        let target = (self.base_rtt() / 4).clamp(TARGET_MIN, TARGET_MAX);
        match self.rate.bytes_a_second() * 8.0 {
            rate if rate > 0.0 => {
                let scale = (TARGET_RATE_BPS / rate).sqrt().sqrt();
                target.mul_f64(scale.clamp(TARGET_SCALE_MIN, TARGET_SCALE_MAX))
            }
            _ => target,
        }
    }

    /// How long the runs should be that are claimed at a time: a millisecond of the
    /// link, and 16 to 64 pages.
    pub fn run_pages(&self) -> u32 {
        let pages = self.rate.bytes_a_second() * 0.001 / PAGE_SIZE as f64;
        (pages as u32).clamp(16, RUN_PAGES_MAX)
    }

    /// Takes in a round trip of the urgent lane that ended at `now`. To be called every few
    /// milliseconds at least.
    pub fn on_urgent_rtt(&mut self, now: Duration, rtt: Duration) {
        let rtt = rtt.max(Duration::from_micros(1));
        self.base.sample(now, rtt);
        if self.phase == Phase::Steady && !self.looks.is_on() && self.others_let_go(rtt) {
            self.looks.look_along(now, self.rtt());
        }
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.samples.push_back(rtt);
        self.look_under_the_queue(now);
        self.step(now);
    }

    /// Takes in that the peer has acknowledged `bytes_acked_total` bytes of push
    /// since the beginning. To be called every few milliseconds at least.
    pub fn on_push_delivered(&mut self, now: Duration, bytes_acked_total: u64) {
        let round_min = self.rtt().max(STEP_MIN);
        if self.rate.delivered(now, bytes_acked_total, round_min) {
            self.start_up(now);
            self.bound();
        }
        self.look_under_the_queue(now);
    }

    /// One round of deliveries ended: goes on doubling, or ends the start-up.
    fn start_up(&mut self, now: Duration) {
        let Phase::Startup { rounds } = self.phase else { return };
        if rounds == 0 {
            self.phase = Phase::Startup { rounds: 1 };
            return;
        }
        // A window that is not yet spread over the round trip goes out in a burst, which is a
        // queue for its own length: up to a round trip while the link is not full.
        let burst = self.target().max(self.base_rtt());
        let queued = self.delay().is_some_and(|delay| delay > burst);
        let bdp = self.rate.bytes_a_second() * (self.base_rtt() + ACK_DELAY / 2).as_secs_f64();
        let largest = self.window >= self.config.window_max as f64;
        if queued || largest || self.window > 2.0 * bdp {
            self.phase = Phase::Steady;
            self.looks.begin(now);
            self.window =
                self.rate.bytes_a_second() * (self.base_rtt() + self.target()).as_secs_f64();
            return;
        }
        self.window *= 2.0;
        self.phase = Phase::Startup { rounds: 0 };
    }

    fn step(&mut self, now: Duration) {
        let period = (2 * self.rtt()).max(STEP_MIN);
        if self.samples.len() < SAMPLES_MIN || now.saturating_sub(self.stepped_at) < period {
            return;
        }
        self.stepped_at = now;
        if self.looks.is_on() {
            // What the queue was before, others' looks are known by.
            self.samples.clear();
            return;
        }
        self.before = self.recent;
        self.recent = self.samples.iter().min().copied();
        if self.phase == Phase::Steady {
            let delay = self.delay().unwrap_or_default().as_secs_f64();
            let error = self.target().as_secs_f64() - delay;
            let change = GAIN * self.rate.bytes_a_second() * error;
            // With no queue worth the name the link may have far more to give.
            let empty = delay < self.target().as_secs_f64() / 4.0;
            let change = if empty { self.window / 8.0 } else { change };
            self.window += change.clamp(-self.window / 4.0, self.window / 8.0);
            self.bound();
        }
        self.samples.clear();
    }

    /// The queue, as the least delay of the last few samples.
    fn delay(&self) -> Option<Duration> {
        let least = if self.samples.len() < SAMPLES_MIN { self.recent } else { None };
        let least = least.or_else(|| self.samples.iter().min().copied())?;
        Some(least.saturating_sub(self.base_rtt()))
    }

    /// Keeps the window within what the delivery rate allows for.
    fn bound(&mut self) {
        if self.phase == Phase::Steady {
            let rate = self.rate.bytes_a_second();
            let (base, target) = (self.base_rtt().as_secs_f64(), self.target().as_secs_f64());
            let least =
                (rate * (base + target / 2.0)).max(self.rate.peak * PEAK_SHARE.as_secs_f64());
            // With a queue the rate is the link's: what is beyond it and the target is only
            // waited for by faults, and sent again when the link is lost.
            let empty = self.delay().is_none_or(|delay| delay.as_secs_f64() < target / 2.0);
            let beyond = if empty {
                SLACK * (base + target + ACK_DELAY.as_secs_f64())
            } else {
                base + target.max(TARGET_MIN.as_secs_f64())
            };
            let most = rate * beyond;
            self.window = self.window.min(most).max(least);
        }
        let (min, max) = (self.config.window_min as f64, self.config.window_max as f64);
        self.window = self.window.min(max).max(min);
    }

    /// Whether this round trip says that others cut their windows: the queue was longer just
    /// now, and it was not this pacer that cut.
    fn others_let_go(&self, rtt: Duration) -> bool {
        let queue = |rtt: Duration| rtt.saturating_sub(self.base_rtt());
        // Of two steps: on busy cores all samples of one are late now and then.
        let Some((recent, before)) = self.recent.zip(self.before) else { return false };
        let before = queue(recent.min(before));
        before.saturating_sub(queue(rtt)) > (before / FALL_DIVISOR).max(FALL_MIN)
    }

    fn look_under_the_queue(&mut self, now: Duration) {
        if self.phase == Phase::Steady && self.looks.ended(now, self.rtt()) {
            // What was seen meanwhile says nothing of the queue that comes now.
            self.samples.clear();
        }
    }
}

/// The least round trip of this epoch and the one before.
#[derive(Clone, Debug, Default)]
struct BaseRtt {
    began: Duration,
    now: Option<Duration>,
    before: Option<Duration>,
}

impl BaseRtt {
    fn sample(&mut self, now: Duration, rtt: Duration) {
        if now.saturating_sub(self.began) >= BASE_EPOCH {
            self.began = now;
            self.before = self.now.take();
        }
        self.now = Some(self.now.map_or(rtt, |least| least.min(rtt)));
    }

    fn get(&self) -> Option<Duration> {
        self.now.into_iter().chain(self.before).min()
    }
}

/// The best delivery rate of the last rounds, in bytes a second.
#[derive(Clone, Debug, Default)]
struct DeliveryRate {
    /// When the round began and how much had been acknowledged.
    round: Option<(Duration, u64)>,
    rounds: VecDeque<f64>,
    last: f64,
    /// The best rate for a long time.
    peak: f64,
    peak_at: Duration,
}

impl DeliveryRate {
    /// Takes in an account; says whether a round ended with it.
    fn delivered(&mut self, now: Duration, total: u64, round_min: Duration) -> bool {
        let (began, before) = *self.round.get_or_insert((now, total));
        let elapsed = now.saturating_sub(began);
        if elapsed < round_min {
            return false;
        }
        self.round = Some((now, total));
        // A round without deliveries had nothing to send, or no link: it says nothing
        // about the rate.
        let Some(bytes) = total.checked_sub(before).filter(|&bytes| bytes > 0) else {
            return false;
        };
        self.last = bytes as f64 / elapsed.as_secs_f64();
        if self.rounds.len() == ROUNDS_MAX {
            self.rounds.pop_front();
        }
        self.rounds.push_back(self.last);
        if now.saturating_sub(self.peak_at) >= PEAK_HALF_LIFE {
            (self.peak, self.peak_at) = (self.peak / 2.0, now);
        }
        if self.last > self.peak {
            (self.peak, self.peak_at) = (self.last, now);
        }
        true
    }

    fn bytes_a_second(&self) -> f64 {
        self.rounds.iter().copied().fold(0.0, f64::max)
    }
}
