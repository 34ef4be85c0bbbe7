//! [`Latencies`]: a histogram of times with bounded memory and a bounded error.
//!
//! Each thread has its own and they are added up at the end: recording takes no
//! lock and shares no cache line.

use super::schema::Distribution;
use hdrhistogram::Histogram;
use std::time::Duration;

/// The largest time told apart; a longer one counts as this in the quantiles, but
/// not in the mean and the maximum.
pub const NANOS_MAX: u64 = 60_000_000_000;
/// Quantiles are right to this many digits.
const DIGITS: u8 = 3;

/// Times from 1 ns to 60 s, to three digits, in about 220 KB whatever their number.
#[derive(Clone, Debug)]
pub struct Latencies {
    histogram: Histogram<u64>,
    sum_ns: u128,
    max_ns: u64,
}

impl Latencies {
    /// No times yet.
    pub fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, NANOS_MAX, DIGITS)
            .expect("the bounds are constants that the histogram accepts");
        Self { histogram, sum_ns: 0, max_ns: 0 }
    }

    /// Adds one time.
    pub fn record(&mut self, time: Duration) {
        self.record_ns(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Adds one time, in nanoseconds.
    pub fn record_ns(&mut self, nanos: u64) {
        self.histogram.saturating_record(nanos.clamp(1, NANOS_MAX));
        self.sum_ns += u128::from(nanos);
        self.max_ns = self.max_ns.max(nanos);
    }

    /// Adds all times of another histogram.
    pub fn merge(&mut self, other: &Latencies) {
        self.histogram.add(&other.histogram).expect("all have the same bounds");
        self.sum_ns += other.sum_ns;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The time that the share `quantile`, from 0 to 1, is not above; none if there
    /// are no times.
    pub fn quantile_ns(&self, quantile: f64) -> Option<u64> {
        (self.count() > 0).then(|| self.histogram.value_at_quantile(quantile).min(self.max_ns))
    }

    /// Their figures for the report, in nanoseconds.
    pub fn summary(&self) -> Distribution {
        let count = self.count();
        if count == 0 {
            return Distribution::default();
        }
        Distribution {
            count,
            mean: Some((self.sum_ns / u128::from(count)) as u64),
            p50: self.quantile_ns(0.5),
            p90: self.quantile_ns(0.9),
            p99: self.quantile_ns(0.99),
            p999: self.quantile_ns(0.999),
            max: Some(self.max_ns),
        }
    }
}

impl Default for Latencies {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_right_to_three_digits_and_the_extremes_exactly() {
        let mut latencies = Latencies::new();
        for micros in 1..=10_000u64 {
            latencies.record(Duration::from_micros(micros));
        }
        let summary = latencies.summary();
        assert_eq!(summary.count, 10_000);
        assert_eq!(summary.mean, Some(5_000_500));
        assert_eq!(summary.max, Some(10_000_000));
        for (found, exact) in
            [(summary.p50, 5e6), (summary.p90, 9e6), (summary.p99, 9.9e6), (summary.p999, 9.99e6)]
        {
            let found = found.unwrap() as f64;
            assert!((found - exact).abs() / exact < 1e-3, "{found} instead of {exact}");
        }
    }

    #[test]
    fn histograms_of_threads_add_up() {
        let mut whole = Latencies::new();
        let mut merged = Latencies::new();
        let parts: Vec<Latencies> = std::thread::scope(|scope| {
            let record = |thread: u64| {
                move || {
                    let mut part = Latencies::new();
                    (0..1000).for_each(|i| part.record_ns(thread * 1_000_000 + i * i));
                    part
                }
            };
            let threads: Vec<_> = (0..4).map(|thread| scope.spawn(record(thread))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        parts.iter().for_each(|part| merged.merge(part));
        for thread in 0..4 {
            (0..1000).for_each(|i| whole.record_ns(thread * 1_000_000 + i * i));
        }
        assert_eq!(merged.summary(), whole.summary());
        assert_eq!(merged.count(), 4000);
    }

    #[test]
    fn no_time_and_endless_times_are_counted_and_kept_in_bounds() {
        let mut latencies = Latencies::new();
        assert_eq!(latencies.summary(), Distribution::default());
        assert_eq!(latencies.quantile_ns(0.5), None);
        latencies.record(Duration::ZERO);
        assert_eq!(latencies.summary().max, Some(0));
        assert_eq!(latencies.summary().p50, Some(0));
        latencies.record(Duration::MAX);
        latencies.record(Duration::MAX);
        let summary = latencies.summary();
        assert_eq!((summary.count, summary.max), (3, Some(u64::MAX)));
        assert!(summary.p999.unwrap() >= NANOS_MAX && summary.p999.unwrap() < NANOS_MAX * 2);
    }
}
