//! How long waits took: their distribution, the time by its logarithm.

use super::Plot;
use super::canvas::{Axes, DEMANDED, LATE, Line, lines};
use super::history::History;
use crate::bench::table::nanos;

/// The most points of a line.
const POINTS_MAX: usize = 400;

/// Network faults and late hits: what share of them was not longer than a time.
pub fn distribution(history: &History) -> Plot {
    let line = |name, color, late: bool| {
        let waits = history.waits.iter().filter(|wait| wait.late == late);
        let points = cumulated(waits.map(|wait| wait.took_ns).collect());
        Line { name, color, points }
    };
    let axes = Axes {
        title: "How long faults waited",
        x: "from reading the fault until the page was placed",
        y: "share of faults not longer",
        x_log: true,
        x_written: nanos,
        y_written: |share| format!("{:.0} %", share * 100.0),
    };
    lines(&axes, &[line("network faults", DEMANDED, false), line("late hits", LATE, true)])
}

/// For some of these times the share that is not above it.
fn cumulated(mut times: Vec<u64>) -> Vec<(f64, f64)> {
    times.sort_unstable();
    let all = times.len();
    let every = all.div_ceil(POINTS_MAX).max(1);
    let point = |index: usize| (times[index].max(1) as f64, (index + 1) as f64 / all as f64);
    let mut points: Vec<_> = (0..all).step_by(every).map(point).collect();
    if all > 1 && !(all - 1).is_multiple_of(every) {
        points.push(point(all - 1));
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_ends_with_all_and_has_few_points() {
        assert_eq!(cumulated(vec![]), []);
        assert_eq!(cumulated(vec![30, 10]), [(10.0, 0.5), (30.0, 1.0)]);
        let many = cumulated((1..=100_000).rev().collect());
        assert!(many.len() <= POINTS_MAX + 1, "{}", many.len());
        assert_eq!(many.last(), Some(&(100_000.0, 1.0)));
        assert!(many.is_sorted());
        let (at, share) = many[many.len() / 2];
        assert!((at / 100_000.0 - share).abs() < 1e-9, "{at} {share}");
    }
}
