//! What happened when: pages, faults, late hits among them, and what the guest got done.

use super::Plot;
use super::canvas::{Axes, DEMANDED, LATE, Line, OTHER, PUSHED, lines};
use super::history::{Arrival, History, Wait};
use crate::bench::table::nanos;
use crate::engine::destination::EventKind;

/// Parts of the time that are told apart.
const BINS: usize = 80;

/// Pages that were placed in a second, by why they came.
pub fn pages(history: &History) -> Plot {
    let line = |name, color, of: fn(EventKind) -> bool| {
        let chosen = |arrival: &&Arrival| of(arrival.kind);
        let arrivals = history.arrivals.iter().filter(chosen);
        let values = arrivals.map(|arrival| (arrival.at_ns, f64::from(arrival.count)));
        Line { name, color, points: per_second(history, values) }
    };
    lines(
        &axes("Pages placed", "pages a second", count),
        &[
            line("pushed", PUSHED, |kind| kind == EventKind::Push),
            line("demanded", DEMANDED, |kind| kind == EventKind::Demand),
            line("drained", OTHER, |kind| kind == EventKind::Drain),
        ],
    )
}

/// Faults in a second.
pub fn faults(history: &History) -> Plot {
    let line = |name, color, late: bool| {
        let waits = history.waits.iter().filter(|wait| wait.late == late);
        Line { name, color, points: per_second(history, waits.map(|wait| (wait.from_ns, 1.0))) }
    };
    lines(
        &axes("Faults", "faults a second", count),
        &[line("network faults", DEMANDED, false), line("late hits", LATE, true)],
    )
}

/// The share of late hits among faults.
pub fn late_hits(history: &History) -> Plot {
    let bins = |of: fn(&Wait) -> bool| {
        let waits = history.waits.iter().filter(|wait| of(wait));
        history.binned(BINS, waits.map(|wait| (wait.from_ns, 1.0)))
    };
    let (late, all) = (bins(|wait| wait.late), bins(|_| true));
    let shares = late.iter().zip(&all).enumerate().filter(|(_, (_, all))| **all > 0.0);
    let points = shares.map(|(bin, (late, all))| (middle(history, bin), late / all)).collect();
    lines(
        &axes("Late hits", "share of faults", |share| format!("{:.0} %", share * 100.0)),
        &[Line { name: "late hits", color: LATE, points }],
    )
}

/// What the guest got done, beside what it does with all its memory.
pub fn progress(history: &History) -> Plot {
    let step = (history.steps.len() / BINS).max(1);
    let samples: Vec<_> = history.steps.iter().step_by(step).collect();
    let made = samples.windows(2).filter_map(|pair| {
        let [(from, before), (to, after)] = *pair else { return None };
        let took = to.checked_sub(*from).filter(|took| *took > 0)?;
        let rate = after.saturating_sub(*before) as f64 * 1e9 / took as f64;
        Some((from.midpoint(*to) as f64, rate))
    });
    let points: Vec<_> = made.collect();
    let steady = history.steady_per_second.filter(|_| !points.is_empty()).map(|rate| {
        let ends = [points.first(), points.last()].into_iter().flatten();
        ends.map(|(at, _)| (*at, rate as f64)).collect()
    });
    lines(
        &axes("The guest's progress", "steps a second", count),
        &[
            Line { name: "steps", color: PUSHED, points },
            Line { name: "with all its memory", color: OTHER, points: steady.unwrap_or_default() },
        ],
    )
}

fn axes(title: &'static str, y: &'static str, y_written: fn(f64) -> String) -> Axes {
    let x = "time since the first vCPU ran at the destination";
    Axes { title, x, y, x_log: false, x_written: nanos, y_written }
}

fn per_second(history: &History, values: impl Iterator<Item = (u64, f64)>) -> Vec<(f64, f64)> {
    let sums = history.binned(BINS, values);
    if sums.iter().all(|sum| *sum == 0.0) {
        return Vec::new();
    }
    let seconds = history.span_ns() as f64 / 1e9 / BINS as f64;
    sums.iter().enumerate().map(|(bin, sum)| (middle(history, bin), sum / seconds)).collect()
}

/// The middle of a part of the time.
fn middle(history: &History, bin: usize) -> f64 {
    (bin as f64 + 0.5) * history.span_ns() as f64 / BINS as f64
}

fn count(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.1} M", v / 1e6),
        v if v >= 1e3 => format!("{:.0} k", v / 1e3),
        v => format!("{v:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plots::history::tests::recorded;

    #[test]
    fn rates_add_up_to_what_there_was() {
        let history = History::of(&recorded()).unwrap();
        let pushed = history.arrivals.iter().filter(|of| of.kind == EventKind::Push);
        let points = per_second(&history, pushed.map(|of| (of.at_ns, f64::from(of.count))));
        let seconds = 100e-6 / BINS as f64;
        let sum: f64 = points.iter().map(|(_, rate)| rate * seconds).sum();
        assert!((sum - 64.0).abs() < 1e-6, "{sum}");
        // At 80 of 100 us, which begins the part of that number.
        let most = points.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
        assert!((most.0 - 80_625.0).abs() < 1.0, "{most:?}");
        assert_eq!(per_second(&history, std::iter::empty()), []);
    }

    #[test]
    fn every_plot_is_well_formed_and_nothing_is_no_plot() {
        let history = History::of(&recorded()).unwrap();
        let empty = History { end_ns: 1, ..History::default() };
        for (plot, word) in [
            (pages as fn(&History) -> Plot, "demanded"),
            (faults, "network faults"),
            (late_hits, "late hits"),
            (progress, "with all its memory"),
            (crate::bench::plots::latency::distribution, "late hits"),
            (crate::bench::plots::arrival::map, "page"),
        ] {
            let svg = plot(&history).unwrap().unwrap();
            let parsed = roxmltree::Document::parse(&svg).unwrap_or_else(|e| panic!("{e}: {svg}"));
            assert_eq!(parsed.root_element().tag_name().name(), "svg");
            assert!(svg.contains(word), "no {word:?} in {svg}");
            assert_eq!(plot(&empty).unwrap(), None, "{word}");
        }
    }
}
