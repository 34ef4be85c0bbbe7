//! The time-stamp counter: its rate, and the guest's view of it.
//!
//! Both reference guests measure with `rdtsc`. The rate is measured here; what
//! the guests do with the ticks is in [`workload`](super::workload).

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::sync::OnceLock;
use std::time::Duration;

/// This machine's time-stamp counter, now.
#[inline]
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has `rdtsc`, and Linux leaves it enabled.
    #[allow(unused_unsafe)]
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
}

/// Ticks a second of this machine's time-stamp counter, at least 1. The first call
/// measures it for 20 ms against `CLOCK_MONOTONIC_RAW`; later calls know it.
pub fn tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| {
        let (from_ns, from_ticks) = simultaneous();
        std::thread::sleep(Duration::from_millis(20));
        let (to_ns, to_ticks) = simultaneous();
        let ns = u128::from(to_ns.saturating_sub(from_ns).max(1));
        let ticks = u128::from(to_ticks.saturating_sub(from_ticks));
        ((ticks * 1_000_000_000 / ns) as u64).max(1)
    })
}

/// A reading of both clocks at (nearly) the same time: the narrowest of several,
/// because the thread may lose its processor between the two.
fn simultaneous() -> (u64, u64) {
    (0..16)
        .map(|_| {
            let before = ticks();
            let ns = nanoseconds(ClockId::CLOCK_MONOTONIC_RAW);
            let width = ticks().wrapping_sub(before);
            (width, ns, before.wrapping_add(width / 2))
        })
        .min()
        .map_or((0, 0), |(_, ns, ticks)| (ns, ticks))
}

fn nanoseconds(clock: ClockId) -> u64 {
    // Linux has had both clocks that are asked for here since 2.6.28.
    clock_gettime(clock).map_or(0, |time| Duration::from(time).as_nanos() as u64)
}

/// `ticks` of a counter of `hz` in nanoseconds, saturating.
pub fn ticks_to_ns(ticks: u64, hz: u64) -> u64 {
    let ns = u128::from(ticks) * 1_000_000_000 / u128::from(hz.max(1));
    ns.min(u128::from(u64::MAX)) as u64
}

/// `ns` nanoseconds in ticks of a counter of `hz`, saturating.
pub fn ns_to_ticks(ns: u64, hz: u64) -> u64 {
    let ticks = u128::from(ns) * u128::from(hz) / 1_000_000_000;
    ticks.min(u128::from(u64::MAX)) as u64
}

/// The time-stamp counter as the process guest sees it: this machine's, moved by
/// an offset, so that the guest's time goes on when it comes to another machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestClock {
    offset: u64,
}

/// A guest's clock at one moment, to set it again somewhere else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockRecord {
    /// Identifies one start of one machine; empty if unknown.
    boot: String,
    /// The guest's clock minus this machine's.
    offset: u64,
    /// The guest's clock.
    ticks: u64,
    /// `CLOCK_REALTIME` then, in nanoseconds.
    realtime_ns: u64,
}

impl GuestClock {
    /// The guest's time.
    #[inline]
    pub fn now(self) -> u64 {
        ticks().wrapping_add(self.offset)
    }

    /// The clock as it stands.
    pub fn record(self) -> ClockRecord {
        ClockRecord {
            boot: boot_id(),
            offset: self.offset,
            ticks: self.now(),
            realtime_ns: nanoseconds(ClockId::CLOCK_REALTIME),
        }
    }

    /// The clock that goes on from `record`: exactly on the same machine, as exactly
    /// as the two machines agree on the time of day on another one. It never goes
    /// back.
    pub fn resume(record: &ClockRecord) -> Self {
        if !record.boot.is_empty() && record.boot == boot_id() {
            return Self { offset: record.offset };
        }
        let now_ns = nanoseconds(ClockId::CLOCK_REALTIME);
        let elapsed = ns_to_ticks(now_ns.saturating_sub(record.realtime_ns), tsc_hz());
        Self { offset: record.ticks.wrapping_add(elapsed).wrapping_sub(ticks()) }
    }
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn the_rate_agrees_with_the_system_clock() {
        let hz = tsc_hz();
        let (start, first) = (Instant::now(), ticks());
        std::thread::sleep(Duration::from_millis(50));
        let by_counter = ticks_to_ns(ticks() - first, hz) as f64;
        let by_system = start.elapsed().as_nanos() as f64;
        assert!((by_counter / by_system - 1.0).abs() < 0.05, "{by_counter} and {by_system} ns");
    }

    #[test]
    fn ticks_and_nanoseconds_convert_both_ways_without_overflow() {
        assert_eq!(ticks_to_ns(3_000, 3_000_000_000), 1_000);
        assert_eq!(ns_to_ticks(1_000, 3_000_000_000), 3_000);
        assert_eq!(ticks_to_ns(u64::MAX, 1), u64::MAX);
        assert_eq!(ns_to_ticks(u64::MAX, u64::MAX), u64::MAX);
        assert_eq!(ticks_to_ns(5, 0), 5_000_000_000);
    }

    #[test]
    fn a_guests_clock_goes_on_where_it_comes_to() {
        let clock = GuestClock { offset: 1 << 40 };
        assert_eq!(GuestClock::resume(&clock.record()), clock);

        let mut elsewhere = clock.record();
        elsewhere.boot = "another machine".into();
        elsewhere.ticks = 1 << 50;
        elsewhere.realtime_ns -= 1_000_000_000;
        let passed = GuestClock::resume(&elsewhere).now() - elsewhere.ticks;
        assert!((tsc_hz()..2 * tsc_hz()).contains(&passed), "{passed} ticks in a second");

        elsewhere.realtime_ns = u64::MAX;
        assert!(GuestClock::resume(&elsewhere).now() >= elsewhere.ticks, "time went back");
    }
}
