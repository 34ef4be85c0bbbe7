//! [`render`]: the results as one page: HTML that is also well-formed XML, without scripts and
//! without anything that is loaded from elsewhere.

use super::cell::Cell;
use super::floors::{Floor, Found};
use super::plots::history::History;
use super::plots::{Plot, PlotError, arrival, latency, over_time, overview};
use super::results::{CellResults, Results};
use super::table::{self, Written, nanos, rate};
use crate::engine::destination::Recorded;
use std::fmt::Write;

/// The most cells whose recordings are drawn: a page has to be opened.
const DRAWN_MAX: usize = 32;

const STYLE: &str = "body{font:14px/1.5 sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;\
    color:#222}h1{font-size:1.5em}h2{font-size:1.2em;margin-top:2em}h3{font-size:1em}\
    pre{overflow-x:auto;font-size:12px;background:#f6f6f6;padding:1em}table{border-collapse:\
    collapse}td,th{padding:2px 12px 2px 0;text-align:left;vertical-align:top}.plots{display:flex;\
    flex-wrap:wrap;gap:8px}.failed{color:#c43c2c}";

/// Figures that are drawn for all cells: name, title, and how a value is written.
const OVERVIEW: &[(&str, &str, Written)] = &[
    ("stall_p50_ns", "Stall, median, by the guest's clock", nanos),
    ("stall_p99_ns", "Stall, 99 %, by the guest's clock", nanos),
    ("fault_p50_ns", "Fault, median", nanos),
    ("total_us", "Whole migration", micros),
    ("downtime_us", "Downtime", micros),
    ("blocktime_us", "Waits for pages, all vCPUs together", micros),
    ("faults", "Network faults and late hits", table::count),
    ("precopied_share", "Pages that were there when the guest came", percent),
    ("sent_to_memory", "Pages sent, as a multiple of the guest's", table::times),
    ("copy_rounds", "Rounds of copying", table::count),
    ("wire_bits_per_second", "Rate", rate),
    ("late_hit_share", "Late hits among faults", percent),
];

/// The page; `record` finds a cell's recording.
pub fn render(
    results: &Results,
    record: impl Fn(&Cell) -> Option<Recorded>,
) -> Result<String, PlotError> {
    let mut page = String::from("<!DOCTYPE html>\n");
    let html = &mut page;
    // Writing to a string does not fail.
    let _ = writeln!(
        html,
        "<html lang=\"en\"><head><meta charset=\"utf-8\"/><title>postcopy bench</title>\
         <style>{STYLE}</style></head><body>"
    );
    heading(results, html);
    let _ = writeln!(html, "<h2>Results</h2>\n<pre>{}</pre>", escaped(&table::render(results)));
    floors(results, html);
    let _ = writeln!(
        html,
        "<h2>Cells</h2>\n<p>Medians of the counted runs; lines from the least to the largest.</p>"
    );
    let bars = OVERVIEW
        .iter()
        .map(|(figure, title, written)| overview::bars(results, figure, title, *written));
    plots(bars, html)?;
    let mut drawn = 0;
    for cell in &results.cells {
        let history = match drawn < DRAWN_MAX {
            true => record(&cell.cell).and_then(|recorded| History::of(&recorded)),
            false => None,
        };
        drawn += usize::from(history.is_some());
        section(cell, history.as_ref(), html)?;
    }
    if drawn == DRAWN_MAX {
        let _ = writeln!(html, "<p>Recordings of further cells are not drawn.</p>");
    }
    meanings(results, html);
    page.push_str("</body></html>\n");
    Ok(page)
}

fn heading(results: &Results, html: &mut String) {
    let plan = &results.plan;
    let (machine, program) = (&plan.machine, &plan.program);
    let unknown = || "unknown".to_owned();
    let build = if program.debug_assertions { "with debug assertions" } else { "release" };
    let memory = machine.memory_bytes.map(|bytes| indicatif::HumanBytes(bytes).to_string());
    let virtual_machine = match machine.virtual_machine {
        Some(true) => ", a virtual machine",
        _ => "",
    };
    let rows = [
        (
            "Program",
            format!(
                "postcopy {}, {build}, checksum {}",
                program.version,
                program.crc32.clone().unwrap_or_else(unknown)
            ),
        ),
        (
            "Machine",
            format!(
                "{}, {} cores, {}, {}{virtual_machine}",
                machine.processor.clone().unwrap_or_else(unknown),
                machine.cores.map_or_else(unknown, |cores| cores.to_string()),
                memory.unwrap_or_else(unknown),
                machine.kernel.clone().unwrap_or_else(unknown),
            ),
        ),
        (
            "Runs",
            format!(
                "{} of {} completed, {} failed; {} a cell, order by seed {}{}",
                results.runs.completed,
                results.runs.planned,
                results.runs.failed,
                plan.rounds,
                plan.seed,
                if plan.conditions.record {
                    ", and one of each recorded and not counted"
                } else {
                    ""
                },
            ),
        ),
        (
            "Verified",
            match plan.conditions.verify {
                true => "every page of every run that completed".to_owned(),
                false => "no".to_owned(),
            },
        ),
    ];
    let copies = results.cells.iter().any(|cell| cell.cell.mode.copies());
    let copying = copies.then(|| {
        let conditions = &plan.conditions;
        let most = micros(conditions.max_downtime_us as f64);
        (
            "Copying",
            format!(
                "hybrid: --rounds {}; pre-copy and auto: --max-downtime {most}",
                conditions.hybrid_rounds
            ),
        )
    });
    html.push_str("<h1>postcopy bench</h1>\n<table>\n");
    for (name, value) in rows.into_iter().chain(copying) {
        let _ = writeln!(html, "<tr><th>{name}</th><td>{}</td></tr>", escaped(&value));
    }
    html.push_str("</table>\n");
}

fn floors(results: &Results, html: &mut String) {
    if results.floors.rounds.is_empty() {
        return;
    }
    html.push_str(
        "<h2>Floors</h2>\n<table>\n<tr><th>floor</th><th>round</th><th>median</th>\
                   <th>99 %</th><th>what</th></tr>\n",
    );
    for floor in Floor::ALL {
        let write = if floor.is_rate() { rate } else { nanos };
        for (round, floors) in &results.floors.rounds {
            let (median, most) = match floors.0.get(&floor) {
                Some(Found::Measured(of)) => (write(of.p50), of.p99.map(write).unwrap_or_default()),
                Some(Found::Failed(why)) => (format!("failed: {why}"), String::new()),
                None => continue,
            };
            let (median, what) = (escaped(&median), escaped(floor.what()));
            let _ = writeln!(
                html,
                "<tr><td>{floor}</td><td>{round}</td><td>{median}</td><td>{most}</td>\
                 <td>{what}</td></tr>"
            );
        }
    }
    html.push_str("</table>\n");
}

/// A cell: what its runs failed of, and how its recorded run went.
fn section(
    cell: &CellResults,
    history: Option<&History>,
    html: &mut String,
) -> Result<(), PlotError> {
    if history.is_none() && cell.failures().next().is_none() {
        return Ok(());
    }
    let _ = writeln!(html, "<h3>{}</h3>", escaped(&cell.name));
    for (round, failed) in cell.failures() {
        let reason = escaped(&failed.reason);
        let _ = writeln!(html, "<p class=\"failed\">Round {round} failed: {reason}</p>");
    }
    let Some(history) = history else { return Ok(()) };
    let all = [
        latency::distribution(history),
        arrival::map(history),
        over_time::pages(history),
        over_time::faults(history),
        over_time::progress(history),
        over_time::late_hits(history),
    ];
    plots(all.into_iter(), html)
}

fn plots(all: impl Iterator<Item = Plot>, html: &mut String) -> Result<(), PlotError> {
    html.push_str("<div class=\"plots\">\n");
    for plot in all {
        if let Some(svg) = plot? {
            let _ = writeln!(html, "<div>{svg}</div>");
        }
    }
    html.push_str("</div>\n");
    Ok(())
}

fn meanings(results: &Results, html: &mut String) {
    html.push_str("<h2>What the figures are</h2>\n<table>\n");
    for (name, meaning) in &results.figures {
        let (unit, what) = (escaped(&meaning.unit), escaped(&meaning.what));
        let _ = writeln!(html, "<tr><td>{name}</td><td>{unit}</td><td>{what}</td></tr>");
    }
    html.push_str("</table>\n");
}

/// Text as it stands in HTML and XML; what XML cannot hold is left out.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => escaped.push(c),
        }
    }
    escaped
}

fn micros(value: f64) -> String {
    nanos(value * 1e3)
}

fn percent(value: f64) -> String {
    format!("{:.0} %", value * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plots::history::tests::recorded;
    use crate::bench::results::tests::results;

    #[test]
    fn the_page_is_well_formed_and_loads_nothing() {
        let mut results = results();
        let failed = results.cells[1].runs.iter_mut().find_map(|run| run.failed.as_mut()).unwrap();
        failed.reason = "<script>&\u{1b}[31m \"it\"".into();
        let first = results.cells[0].cell.clone();
        let page = render(&results, |cell| (*cell == first).then(recorded)).unwrap();
        let parsed = roxmltree::Document::parse_with_options(
            &page,
            roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() },
        );
        let parsed = parsed.unwrap_or_else(|error| panic!("{error}"));
        let text: Vec<&str> = parsed.descendants().filter_map(|node| node.text()).collect();
        assert!(text.iter().any(|text| text.contains("<script>&[31m \"it\"")), "{text:?}");
        for word in ["Which page came when", "How long faults waited", "The guest's progress"] {
            assert!(text.iter().any(|text| text.contains(word)), "no {word:?}");
        }
        let elements: Vec<&str> = parsed.descendants().map(|node| node.tag_name().name()).collect();
        assert!(elements.iter().filter(|name| **name == "svg").count() >= 10, "{elements:?}");
        for loads in ["script", "link", "img", "image", "iframe", "use", "a"] {
            assert!(!elements.contains(&loads), "it has <{loads}>");
        }
        assert!(!page.contains("url("));
    }
}
