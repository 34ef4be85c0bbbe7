//! [`GuestFigures`]: what the guest's own instruments say, in time units.
//!
//! The guest counts in ticks (see [`workload`](super::workload)); this turns the
//! words of all its vCPUs into the figures of a report.

use super::clock::ticks_to_ns;
use super::content::Instruments;
use super::workload::{STALL_BUCKETS, control, stall_bucket_floor};
use crate::memory::ram::GuestRam;
use serde::{Deserialize, Serialize};

/// Stalls: visits that took longer than a native page fault, all vCPUs together, in
/// nanoseconds of the guest's clock. The percentiles and the maximum are those of a
/// histogram with eight buckets an octave: up to an eighth too large, never too
/// small.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StallFigures {
    /// How many.
    pub count: u64,
    /// Their mean.
    pub mean: u64,
    /// Half of them were no longer.
    pub p50: u64,
    /// 99 in 100 were no longer.
    pub p99: u64,
    /// None was longer.
    pub max: u64,
}

/// How many stalls there were of which length, in ticks, all vCPUs together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StallCounts {
    buckets: [u64; STALL_BUCKETS],
    sum: u64,
}

impl StallCounts {
    /// Those since the instruments were last cleared. While the guest runs, the last ones may be
    /// missing. Waits for the control and histogram pages if they are missing.
    pub fn read(ram: &GuestRam, vcpus: u32) -> Self {
        let (mut buckets, mut sum) = ([0u64; STALL_BUCKETS], 0u64);
        for vcpu in 0..vcpus {
            let instruments = Instruments::new(ram, vcpu);
            // First: the buckets take longer, and the guest goes on.
            sum = sum.saturating_add(instruments.get(control::STALL_SUM));
            for (total, count) in buckets.iter_mut().zip(instruments.stalls()) {
                *total = total.saturating_add(count);
            }
        }
        Self { buckets, sum }
    }

    /// Those that are not in `earlier`, which was read before.
    pub fn since(mut self, earlier: &Self) -> Self {
        for (count, before) in self.buckets.iter_mut().zip(earlier.buckets) {
            *count = count.saturating_sub(before);
        }
        self.sum = self.sum.saturating_sub(earlier.sum);
        self
    }

    /// Their figures, for a clock of `tsc_hz` ticks a second.
    pub fn figures(&self, tsc_hz: u64) -> StallFigures {
        StallFigures::of(&self.buckets, self.sum, 0, tsc_hz)
    }
}

/// The instruments of all vCPUs since they were last cleared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFigures {
    /// Stalls, in nanoseconds.
    pub stalls: StallFigures,
    /// The longest time from the end of one step to the end of the next one, of any
    /// vCPU, in microseconds, rounded up.
    pub max_gap_us: u64,
    /// Steps completed by each vCPU since its start.
    pub steps: Vec<u64>,
    /// `steps` of each vCPU when its instruments were last cleared.
    pub steps_when_cleared: Vec<u64>,
}

impl GuestFigures {
    /// Reads the instruments of `vcpus` vCPUs whose clock has `tsc_hz` ticks a second.
    /// While the guest runs the figures may be a step apart from each other. Waits for
    /// the control and histogram pages if they are missing.
    pub fn read(ram: &GuestRam, vcpus: u32, tsc_hz: u64) -> Self {
        let StallCounts { buckets, sum } = StallCounts::read(ram, vcpus);
        let mut max_gap = 0;
        let mut figures = Self::default();
        for vcpu in 0..vcpus {
            let instruments = Instruments::new(ram, vcpu);
            max_gap = max_gap.max(instruments.get(control::MAX_GAP));
            figures.steps.push(instruments.get(control::STEPS));
            figures.steps_when_cleared.push(instruments.get(control::INSTRUMENT_STEP));
        }
        figures.stalls = StallFigures::of(&buckets, sum, max_gap, tsc_hz);
        figures.max_gap_us = ticks_to_ns(max_gap, tsc_hz).div_ceil(1000);
        figures
    }
}

impl StallFigures {
    /// From a histogram, the sum of what it counts, and a bound on each (0: none), all in
    /// ticks.
    pub fn of(buckets: &[u64; STALL_BUCKETS], sum: u64, bound: u64, tsc_hz: u64) -> Self {
        let count = buckets.iter().fold(0u64, |total, &count| total.saturating_add(count));
        if count == 0 {
            return Self::default();
        }
        // A stall lies inside of a gap, and none is longer than all together.
        let bound = if bound == 0 { sum } else { bound.min(sum) };
        // The least value that at least `rank` stalls do not exceed, as far as known.
        let at_rank = |rank: u64| {
            let mut seen = 0u64;
            let bucket = buckets.iter().position(|&count| {
                seen = seen.saturating_add(count);
                seen >= rank
            });
            let bucket = bucket.unwrap_or(STALL_BUCKETS - 1);
            ticks_to_ns(ceiling(bucket).min(bound).max(stall_bucket_floor(bucket)), tsc_hz)
        };
        let rank = |percent: u64| (u128::from(count) * u128::from(percent)).div_ceil(100) as u64;
        let max = at_rank(count);
        Self {
            count,
            // Of a guest that runs, the sum may have a stall that the buckets do not have yet.
            mean: ticks_to_ns(sum / count, tsc_hz).min(max),
            p50: at_rank(rank(50)),
            p99: at_rank(rank(99)),
            max,
        }
    }
}

/// The most ticks that fall into `bucket`.
fn ceiling(bucket: usize) -> u64 {
    match bucket {
        // Buckets 8 to 23 are never used.
        0..8 => bucket as u64,
        8..24 => 7,
        _ if bucket + 1 < STALL_BUCKETS => stall_bucket_floor(bucket + 1) - 1,
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::Backing;
    use crate::proto::layout::MemoryLayout;
    use crate::proto::page::{PAGE_SIZE, PageRun};
    use crate::vmm::workload::{histogram_page, stall_bucket};

    #[test]
    fn each_duration_lies_between_its_buckets_floor_and_ceiling() {
        for ticks in (0..5000).chain([1 << 33, (1 << 50) + 12345, u64::MAX]) {
            let bucket = stall_bucket(ticks);
            assert!((stall_bucket_floor(bucket)..=ceiling(bucket)).contains(&ticks), "{ticks}");
        }
    }

    #[test]
    fn the_figures_are_those_of_the_stalls_that_were_counted() {
        let ram = GuestRam::new(MemoryLayout::flat(512).unwrap(), Backing::Memfd).unwrap();
        // 99 stalls of 10,000 ticks on vCPU 0, one of 1,000,000 on vCPU 1; 2 ticks a ns.
        for (vcpu, ticks, count) in [(0, 10_000u64, 99u64), (1, 1_000_000, 1)] {
            let mut page = [0u8; PAGE_SIZE];
            page[stall_bucket(ticks) * 8..][..8].copy_from_slice(&count.to_le_bytes());
            ram.write_run(PageRun::single(histogram_page(vcpu)), &page);
            let instruments = Instruments::new(&ram, vcpu);
            instruments.set(control::STALLS, count);
            instruments.set(control::STALL_SUM, ticks * count);
            instruments.set(control::MAX_GAP, ticks + 100);
            instruments.set(control::STEPS, 500 + u64::from(vcpu));
        }
        let figures = GuestFigures::read(&ram, 2, 2_000_000_000);
        let StallFigures { count, mean, p50, p99, max } = figures.stalls;
        assert_eq!((count, mean), (100, 9_950));
        assert!((5_000..=5_625).contains(&p50) && p50 == p99, "p50 {p50}, p99 {p99}");
        assert_eq!(max, 500_050, "the longest gap is a bound");
        assert_eq!(figures.max_gap_us, 501);
        assert_eq!(figures.steps, [500, 501]);
        let counts = StallCounts::read(&ram, 2);
        let unbounded = counts.figures(2_000_000_000);
        assert_eq!((unbounded.count, unbounded.mean, unbounded.p99), (count, mean, p99));
        assert!((500_000..=562_500).contains(&unbounded.max), "{unbounded:?}");
        assert_eq!(counts.clone().since(&counts).figures(1), StallFigures::default());
        assert_eq!(figures.steps_when_cleared, [0, 0]);
    }

    #[test]
    fn a_stall_that_only_the_sum_has_makes_no_mean_above_the_longest() {
        let mut buckets = [0; STALL_BUCKETS];
        buckets[stall_bucket(10_000)] = 1;
        let figures = StallFigures::of(&buckets, 10_000 + 500_000, 0, 1_000_000_000);
        assert!((10_000..=11_250).contains(&figures.max), "{figures:?}");
        assert_eq!((figures.count, figures.mean), (1, figures.max));
    }

    #[test]
    fn no_stall_gives_zeroes() {
        let ram = GuestRam::new(MemoryLayout::flat(512).unwrap(), Backing::Memfd).unwrap();
        let figures = GuestFigures::read(&ram, 1, 1);
        assert_eq!(figures.stalls, StallFigures::default());
    }
}
