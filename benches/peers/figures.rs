//! The figures of one migration, and a table of many: medians, ranges, and the ratio of each
//! of QEMU's runs to our own run next to it.

use postcopy::vmm::stalls::StallFigures;
use serde::Serialize;
use std::fmt::Write;
use std::time::Duration;

/// What one migration was like; what does not exist or was not told is `None`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// From the command to migrate until both sides have it for completed.
    pub total_us: Option<u64>,
    /// From the pause at the source until the guest was resumed at the destination.
    pub downtime_us: Option<u64>,
    /// From there until both sides have it for completed: all memory is there.
    pub brownout_us: Option<u64>,
    /// Faults for which a page was asked of the source, or awaited on its way.
    pub faults: Option<u64>,
    /// How long the vCPU stood still for pages, as the destination's VMM counts it.
    pub blocktime_us: Option<u64>,
    /// The guest's own count of visits that took long, in nanoseconds: QEMU's from the pause
    /// on, ours from a moment before.
    pub stalls: Option<StallFigures>,
    /// Steps that the guest made during the brownout.
    pub steps: Option<u64>,
    /// Bytes that the source sent, as it counts them: QEMU's stream before encryption, our
    /// datagrams after it.
    pub bytes: Option<u64>,
}

/// How a figure is written.
#[derive(Clone, Copy)]
enum Unit {
    Microseconds,
    Nanoseconds,
    Count,
    Bytes,
}

/// One line of the table.
struct Row {
    name: &'static str,
    unit: Unit,
    of: fn(&Figures) -> Option<f64>,
}

fn stalls(of: &Figures, value: impl Fn(&StallFigures) -> u64) -> Option<f64> {
    of.stalls.as_ref().map(|stalls| value(stalls) as f64)
}

const ROWS: [Row; 14] = [
    Row { name: "total", unit: Unit::Microseconds, of: |of| Some(of.total_us? as f64) },
    Row { name: "downtime", unit: Unit::Microseconds, of: |of| Some(of.downtime_us? as f64) },
    Row {
        name: "pause until all is there",
        unit: Unit::Microseconds,
        of: |of| Some((of.downtime_us? + of.brownout_us?) as f64),
    },
    Row { name: "faults", unit: Unit::Count, of: |of| Some(of.faults? as f64) },
    Row { name: "blocktime", unit: Unit::Microseconds, of: |of| Some(of.blocktime_us? as f64) },
    Row {
        name: "blocktime a fault",
        unit: Unit::Microseconds,
        of: |of| Some(of.blocktime_us? as f64 / of.faults.filter(|faults| *faults > 0)? as f64),
    },
    Row { name: "guest: stalls", unit: Unit::Count, of: |of| stalls(of, |of| of.count) },
    Row {
        name: "guest: stalled in all",
        unit: Unit::Nanoseconds,
        of: |of| stalls(of, |of| of.count * of.mean),
    },
    Row { name: "guest: stall, mean", unit: Unit::Nanoseconds, of: |of| stalls(of, |of| of.mean) },
    Row { name: "guest: stall, median", unit: Unit::Nanoseconds, of: |of| stalls(of, |of| of.p50) },
    Row { name: "guest: stall, 99 %", unit: Unit::Nanoseconds, of: |of| stalls(of, |of| of.p99) },
    Row {
        name: "guest: stall, longest",
        unit: Unit::Nanoseconds,
        of: |of| stalls(of, |of| of.max),
    },
    Row { name: "guest: steps meanwhile", unit: Unit::Count, of: |of| Some(of.steps? as f64) },
    Row { name: "bytes sent", unit: Unit::Bytes, of: |of| Some(of.bytes? as f64) },
];

/// QEMU's run and ours next to it.
pub struct Pair {
    /// QEMU's.
    pub qemu: Figures,
    /// Ours.
    pub ours: Figures,
}

/// The table of a mode's pairs: medians, with the least and the most in brackets.
pub fn table(mode: &str, pairs: &[Pair]) -> String {
    let mut text = String::new();
    let cancelled = pairs.iter().filter(|pair| pair.qemu.total_us.is_none()).count();
    if cancelled > 0 {
        let _ = writeln!(text, "{cancelled} of {} of QEMU's runs were cancelled", pairs.len());
    }
    let heading = format!("QEMU {mode}");
    let _ = writeln!(text, "{:24}  {heading:32}  {:32}  QEMU / ours", "", "postcopy");
    for row in &ROWS {
        let values = |of: fn(&Pair) -> &Figures| -> Vec<f64> {
            pairs.iter().filter_map(|pair| (row.of)(of(pair))).collect()
        };
        let (qemu, ours) = (values(|pair| &pair.qemu), values(|pair| &pair.ours));
        let ratios = pairs.iter().filter_map(|pair| {
            let (qemu, ours) = ((row.of)(&pair.qemu)?, (row.of)(&pair.ours)?);
            (ours > 0.0).then(|| qemu / ours)
        });
        let value = |value| written(value, row.unit);
        let _ = writeln!(
            text,
            "{:24}  {:32}  {:32}  {}",
            row.name,
            spread(qemu, value),
            spread(ours, value),
            spread(ratios.collect(), |ratio| format!("{ratio:.2}")),
        );
    }
    text
}

/// The median, and the range if there are several.
fn spread(mut values: Vec<f64>, written: impl Fn(f64) -> String) -> String {
    values.sort_by(f64::total_cmp);
    let (Some(first), Some(last)) = (values.first(), values.last()) else {
        return "-".into();
    };
    let middle = values.len() / 2;
    let median = match values.len() % 2 {
        0 => (values[middle - 1] + values[middle]) / 2.0,
        _ => values[middle],
    };
    match values.len() {
        1 => written(median),
        _ => format!("{} ({} to {})", written(median), written(*first), written(*last)),
    }
}

fn written(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Count => format!("{value:.0}"),
        Unit::Bytes => format!("{:.1} MiB", value / f64::from(1 << 20)),
        Unit::Microseconds => time(value * 1e3),
        Unit::Nanoseconds => time(value),
    }
}

/// A time of so many nanoseconds.
fn time(ns: f64) -> String {
    match ns {
        1e9.. => format!("{:.2} s", ns / 1e9),
        1e7.. => format!("{:.0} ms", ns / 1e6),
        1e6.. => format!("{:.1} ms", ns / 1e6),
        _ => format!("{:.0} us", ns / 1e3),
    }
}

impl Figures {
    /// In one line.
    pub fn brief(&self) -> String {
        let time = |us: Option<u64>| {
            us.map_or("-".into(), |us| format!("{:?}", Duration::from_micros(us)))
        };
        format!("total {}, downtime {}", time(self.total_us), time(self.downtime_us))
    }
}
