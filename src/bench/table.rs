//! [`render`]: the results as a table for a terminal. A line a cell, the medians of its runs; what
//! else there is is in the JSON.

use super::floors::{Floor, Found};
use super::plan::RECORDED_ROUND;
use super::results::{CellResults, Results, RunResults};
use super::statistics::Spread;
use std::fmt::Write;

/// How a value is written.
pub type Written = fn(f64) -> String;

/// A heading, a figure, and how it is written.
type Column = (&'static str, &'static str, Written);

/// How long the guest waits.
const WAITS: &[Column] = &[
    ("stall p50", "stall_p50_ns", nanos),
    ("stall p99", "stall_p99_ns", nanos),
    ("stall max", "stall_max_ns", nanos),
    ("fault p50", "fault_p50_ns", nanos),
    ("fault p99", "fault_p99_ns", nanos),
    ("faults/s", "faults_per_second", count),
    ("late", "late_hit_share", percent),
    ("downtime", "downtime_us", micros),
];

/// What the ways of moving trade against the downtime; nothing of it if memory only follows.
const TRADES: &[Column] = &[
    ("blocked", "blocktime_us", waits),
    ("faults", "faults", count),
    ("precopied", "precopied_share", percent),
    ("sent", "sent_to_memory", times),
    ("rounds", "copy_rounds", count),
];

/// How fast it is.
const RATES: &[Column] = &[
    ("total", "total_us", micros),
    ("pages/s", "pages_per_second", count),
    ("rate", "wire_bits_per_second", rate),
    ("x floor", "stall_p50_to_tcp_fault", times),
];

/// The table, with the floors above and the failures below it.
pub fn render(results: &Results) -> String {
    let mut text = String::new();
    floors(results, &mut text);
    let names = Names::of(results);
    if !names.common.is_empty() {
        let _ = writeln!(text, "all cells: {}", names.common.join(" "));
    }
    let copies = results.cells.iter().any(|cell| cell.cell.mode.copies());
    let trades = if copies { TRADES } else { &[] };
    let columns = [WAITS, trades, RATES].concat();
    let mut rows = vec![headings(&columns)];
    rows.extend(results.cells.iter().zip(&names.own).map(|(cell, name)| row(cell, name, &columns)));
    align(&rows, &mut text);
    let _ = writeln!(
        text,
        "medians; stall: the guest's clock; late: hits on a page on its way, among faults; x floor: \
         stall p50 by the floor tcp-fault, below 1 where most slow steps waited for no page"
    );
    if copies {
        let _ = writeln!(
            text,
            "blocked: waits for pages, all vCPUs together; precopied: pages that were there when the \
             guest came; sent: pages sent in all, as a multiple of the guest's; rounds: of copying"
        );
    }
    for cell in &results.cells {
        for (round, failed) in cell.failures() {
            let _ = writeln!(text, "failed, round {round}: {}: {}", cell.name, failed.reason);
        }
    }
    let runs = results.runs;
    if runs.missing() > 0 {
        let (missing, planned) = (runs.missing(), runs.planned);
        let _ = writeln!(text, "not finished: {missing} of {planned} runs are missing");
    }
    text
}

fn floors(results: &Results, text: &mut String) {
    let mut rows = Vec::new();
    for floor in Floor::ALL {
        let (name, what) = (floor.name().to_owned(), floor.what().to_owned());
        let found = results.floors.spread.get(&floor);
        let value = match found {
            Some(spread) => floor_value(floor, spread),
            None => {
                let mut rounds = results.floors.rounds.values();
                match rounds.find_map(|of| of.0.get(&floor)) {
                    Some(Found::Failed(why)) => format!("failed: {why}"),
                    _ => continue,
                }
            }
        };
        rows.push(vec![format!("floor {name}"), value, what]);
    }
    if !rows.is_empty() {
        align(&rows, text);
        text.push('\n');
    }
}

fn floor_value(floor: Floor, spread: &Spread) -> String {
    let write = if floor.is_rate() { rate } else { nanos };
    let Spread { median, min, max, .. } = *spread;
    match spread.count {
        1 => write(median),
        _ => format!("{} ({} to {})", write(median), write(min), write(max)),
    }
}

/// The cells' names, apart into what all have in common and what each has of its own.
pub struct Names {
    /// In the order of a full name.
    pub common: Vec<String>,
    /// For each cell; its full name if there is nothing in which cells differ.
    pub own: Vec<String>,
}

impl Names {
    /// The names of these cells.
    pub fn of(results: &Results) -> Self {
        let words: Vec<Vec<&str>> =
            results.cells.iter().map(|cell| cell.name.split(' ').collect()).collect();
        let Some(first) = words.first().filter(|_| words.len() > 1) else {
            return Self { common: Vec::new(), own: words.iter().map(|of| of.join(" ")).collect() };
        };
        let is_common: Vec<bool> = (0..first.len())
            .map(|word| words.iter().all(|of| of.get(word) == first.get(word)))
            .collect();
        let pick = |of: &[&str], common: bool| -> Vec<String> {
            let picked = of.iter().zip(&is_common).filter(|(_, is)| **is == common);
            picked.map(|(word, _)| (*word).to_owned()).collect()
        };
        let own = words.iter().map(|of| pick(of, false).join(" ")).collect();
        Self { common: pick(first, true), own }
    }
}

fn headings(columns: &[Column]) -> Vec<String> {
    let headings = columns.iter().map(|(heading, ..)| (*heading).to_owned());
    ["cell", "runs"].into_iter().map(str::to_owned).chain(headings).collect()
}

fn row(cell: &CellResults, name: &str, columns: &[Column]) -> Vec<String> {
    let failed = cell.failures().count();
    let counted = |run: &&RunResults| run.failed.is_none() && run.round != RECORDED_ROUND;
    let completed = cell.runs.iter().filter(counted).count();
    let runs = match failed {
        0 => completed.to_string(),
        _ => format!("{completed}, {failed} failed"),
    };
    let figures = columns
        .iter()
        .map(|(_, name, write)| cell.median(name).map_or_else(|| "-".to_owned(), *write));
    [name.to_owned(), runs].into_iter().chain(figures).collect()
}

/// Lines of columns: the first to the left, the others to the right.
fn align(rows: &[Vec<String>], text: &mut String) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let widths = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        widths.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let left = column == 0 || (columns == 3 && column == 2);
            let _ = match left {
                true => write!(line, "{cell:<width$}  "),
                false => write!(line, "{cell:>width$}  "),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

fn scaled(value: f64, units: &[(f64, &str)]) -> String {
    let fits = units.iter().find(|(factor, _)| value >= *factor);
    let (factor, unit) = fits.or(units.last()).copied().unwrap_or((1.0, ""));
    let value = value / factor;
    let digits = match value {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}{unit}")
}

/// A time in nanoseconds.
pub fn nanos(value: f64) -> String {
    scaled(value, &[(1e9, " s"), (1e6, " ms"), (1e3, " us"), (1.0, " ns")])
}

fn micros(value: f64) -> String {
    nanos(value * 1e3)
}

/// What was waited in all: nothing, if nobody ever did.
fn waits(value: f64) -> String {
    if value > 0.0 { micros(value) } else { "0".to_owned() }
}

/// A rate in bits a second.
pub fn rate(value: f64) -> String {
    scaled(value, &[(1e9, " Gbit/s"), (1e6, " Mbit/s"), (1e3, " kbit/s"), (1.0, " bit/s")])
}

/// Pieces.
pub fn count(value: f64) -> String {
    indicatif::HumanCount(value.round() as u64).to_string()
}

fn percent(value: f64) -> String {
    format!("{:.1} %", value * 100.0)
}

/// A multiple.
pub fn times(value: f64) -> String {
    format!("{value:.2}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::tests::{results, results_of_modes};

    #[test]
    fn the_table_has_a_line_a_cell_and_says_what_failed() {
        insta::assert_snapshot!(render(&results()));
    }

    #[test]
    fn what_modes_trade_is_in_the_table_once_there_is_another_one() {
        insta::assert_snapshot!(render(&results_of_modes()));
    }

    #[test]
    fn values_are_written_with_the_unit_that_fits() {
        assert_eq!(nanos(999.0), "999 ns");
        assert_eq!(nanos(12_677.0), "12.7 us");
        assert_eq!(nanos(17_813_820.0), "17.8 ms");
        assert_eq!(nanos(0.0), "0.00 ns");
        assert_eq!(rate(1.36e9), "1.36 Gbit/s");
        assert_eq!(count(7_504_481.4), "7,504,481");
        assert_eq!(percent(0.0285), "2.9 %");
    }
}
