//! A benchmark from its plan to its results: round by round, cell by cell.

use super::cell::Cell;
use super::floors::Floors;
use super::machine::load_average;
use super::matrix::order;
use super::page;
use super::plan::{Plan, RECORDED_ROUND};
use super::results::Results;
use super::store::{self, Failed, Outcome, RUN_SCHEMA, Run, Store};
use super::table;
use crate::engine::destination::Recorded;
use crate::program::exit::{Failure, code, one_line};
use crate::program::output;
use crate::report::schema::Report;
use crate::trial::{self, Limit};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How the user is told what goes on.
pub struct Display {
    bar: Option<ProgressBar>,
    quiet: bool,
}

impl Display {
    /// A bar on a terminal, else a line a run; nothing if `quiet`.
    pub fn new(quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let style =
                ProgressStyle::with_template("[{bar:20}] {pos}/{len}, {eta} left, {wide_msg}")
                    .expect("the template is a constant that is well-formed")
                    .progress_chars("=> ");
            ProgressBar::no_length().with_style(style)
        });
        Self { bar, quiet }
    }

    fn length(&self, runs: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(runs);
            bar.enable_steady_tick(Duration::from_millis(200));
        }
    }

    /// What is done now.
    fn now(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
        }
    }

    /// A run was made just now, or `earlier`.
    fn done(&self, earlier: bool) {
        match &self.bar {
            // What was there before says nothing of how long the others take.
            Some(bar) if earlier => {
                bar.inc(1);
                bar.reset_eta();
            }
            Some(bar) => bar.inc(1),
            None => {}
        }
    }

    /// A line beside the bar.
    fn note(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None if self.quiet => {}
            None => output::err(line),
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Runs what of `plan` is not in `folder` yet, until `stop` is set; writes the results of all
/// that is there. Runs that failed before are tried again if `retry`.
///
/// # Errors
/// A folder that cannot be used. Runs that fail are in the results.
pub fn bench(
    plan: Plan,
    folder: &Path,
    retry: bool,
    display: &Display,
    stop: &Arc<AtomicBool>,
) -> anyhow::Result<Results> {
    let store = Store::open(folder, plan)?;
    let plan = store.plan();
    display.length(plan.runs());
    for round in plan.all_rounds() {
        run_round(&store, round, retry, display, stop)?;
    }
    display.finish();
    let results = Results::of(&store)?;
    store::write(&folder.join("results.json"), &results)?;
    store::write_text(&folder.join("results.txt"), &table::render(&results))?;
    let record = |cell: &Cell| Recorded::read(&store.record_path(cell)).ok();
    store::write_text(&folder.join("results.html"), &page::render(&results, record)?)?;
    Ok(results)
}

fn run_round(
    store: &Store,
    round: u32,
    retry: bool,
    display: &Display,
    stop: &Arc<AtomicBool>,
) -> anyhow::Result<()> {
    let plan = store.plan();
    let mut missing = Vec::new();
    for index in order(plan.cells.len(), round, plan.seed) {
        let cell = &plan.cells[index];
        match store.run(round, cell)?.map(|run| run.outcome) {
            None => missing.push(cell),
            Some(Outcome::Failed(_)) if retry => {
                store.forget_run(round, cell)?;
                missing.push(cell);
            }
            Some(_) => display.done(true),
        }
    }
    let stopped = || stop.load(Ordering::SeqCst);
    let counts = round != RECORDED_ROUND;
    if counts && !missing.is_empty() && !stopped() && store.floors(round)?.is_none() {
        let time = Duration::from_millis(plan.conditions.floor_ms);
        let floors = Floors::measure(time, |floor| display.now(&format!("floor {floor}")));
        store.keep_floors(round, &floors)?;
    }
    for cell in missing {
        if stopped() {
            return Ok(());
        }
        display.now(&format!("round {round}: {cell}"));
        let record = (!counts).then(|| store.record_path(cell));
        let run = run_cell(plan, round, cell, record, stop);
        // What was cut short says nothing.
        if stopped() {
            return Ok(());
        }
        store.keep_run(&run)?;
        display.done(false);
        match &run.outcome {
            Outcome::Failed(Failed { reason, .. }) => {
                display.note(&format!("round {round}: {cell}: failed: {reason}"));
            }
            Outcome::Completed(_) if display.bar.is_none() => {
                display.note(&format!("round {round}: {cell}: {} ms", run.took_ms));
            }
            Outcome::Completed(_) => {}
        }
    }
    Ok(())
}

/// Runs a cell once.
fn run_cell(
    plan: &Plan,
    round: u32,
    cell: &Cell,
    record: Option<PathBuf>,
    stop: &Arc<AtomicBool>,
) -> Run {
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (began, load_average) = (Instant::now(), load_average());
    let limit = Limit::new(Duration::from_millis(plan.conditions.limit_ms), stop.clone());
    let outcome = match migrate(plan, cell, record, limit) {
        Ok(report) => Outcome::Completed(Box::new(report)),
        Err(error) => Outcome::Failed(Failed { reason: one_line(&error), code: code(&error) }),
    };
    Run {
        schema: RUN_SCHEMA.to_owned(),
        round,
        cell: cell.clone(),
        at_unix_ms: at.as_millis() as u64,
        took_ms: began.elapsed().as_millis() as u64,
        load_average,
        outcome,
    }
}

fn migrate(
    plan: &Plan,
    cell: &Cell,
    record: Option<PathBuf>,
    limit: Limit,
) -> anyhow::Result<Report> {
    let mut trial = cell.trial(&plan.conditions);
    if let Some(path) = record {
        trial.destination.extend(["--record".into(), path.into_os_string()]);
    }
    let report = trial.prepare(limit)?.migrate()?.finish()?;
    trial::check(&report, plan.conditions.verify)?;
    Ok(report)
}

/// How a benchmark with these results ends: by the worst of what its runs failed of.
pub fn verdict(results: &Results, folder: &Path) -> anyhow::Result<()> {
    let failed: Vec<&Failed> =
        results.cells.iter().flat_map(|cell| cell.failures().map(|(_, failed)| failed)).collect();
    let (all, count) = (results.runs.planned, failed.len());
    if failed.iter().any(|failed| failed.code == Failure::Wrong(String::new()).code()) {
        return Err(Failure::Wrong(format!("{count} of {all} runs failed")).into());
    }
    if count > 0 {
        anyhow::bail!("{count} of {all} runs failed");
    }
    if results.runs.missing() > 0 {
        let (missing, at) = (results.runs.missing(), folder.display());
        anyhow::bail!("interrupted, {missing} of {all} runs are missing; --out {at} goes on");
    }
    Ok(())
}
