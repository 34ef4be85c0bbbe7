//! Guests of different sizes, and one that is mostly holes: what of a migration grows with
//! memory, and what does not.
//!
//! ```text
//! cargo bench --bench scale -- --runs 5 --shapes 1GiB,8GiB,256GiB:sparse
//! ```
//!
//! A sparse guest has two pages of data in each 2 MiB. Source and destination are processes of
//! their own. The guest reads its data pages in no order, 20 us apart, from the moment at which
//! it runs at the destination. After each migration all data is compared, and the pages that
//! are there are counted: none may be a hole that was filled.

mod guest;
mod shape;
mod side;

use anyhow::{Context, ensure};
use clap::Parser;
use postcopy::memory::limits::check_can_hold;
use postcopy::proto::page::PAGE_SIZE;
use postcopy::report::schema::Report;
use postcopy::uffd::open::{UffdOptions, open};
use serde::Deserialize;
use shape::Shape;
use std::fmt::Write;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};

/// Migrations of guests of different sizes, in turns.
#[derive(Debug, Parser)]
struct Arguments {
    /// Guests: their memory, and `:sparse` for two pages of data in each 2 MiB.
    #[arg(long, value_delimiter = ',', default_value = "1GiB,8GiB,256GiB:sparse")]
    shapes: Vec<Shape>,
    /// Migrations of each.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Only see that it works: one run of small ones.
    #[arg(long)]
    test: bool,
    /// Cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
    /// Cargo passes on the names of the benches that are wanted.
    #[arg(hide = true)]
    filter: Option<String>,
    /// Be the source, with this ticket, of the only shape.
    #[arg(long, hide = true)]
    source: Option<String>,
    /// Be the destination of the only shape.
    #[arg(long, hide = true)]
    destination: bool,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.filter.as_ref().is_some_and(|filter| !"scale".contains(filter.as_str())) {
        return ExitCode::SUCCESS;
    }
    if arguments.test {
        arguments.runs = 1;
        arguments.shapes =
            ["64MiB", "16GiB:sparse"].map(|shape| shape.parse().expect("a shape")).into();
    }
    let done = match (&arguments.source, arguments.shapes.as_slice()) {
        (Some(ticket), [shape]) => side::source(*shape, ticket),
        (None, [shape]) if arguments.destination => side::destination(*shape),
        _ => measure(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scale: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What the source tells.
#[derive(Debug, Deserialize)]
struct Sent {
    report: Report,
    engine_bytes: u64,
    grown_bytes: u64,
    page_table_bytes: u64,
}

/// What the destination tells.
#[derive(Debug, Deserialize)]
struct Received {
    engine_bytes: u64,
    page_table_bytes: u64,
}

fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    if let Err(error) =
        open(UffdOptions::for_process(), postcopy::DestinationBacking::MemfdContinue)
    {
        println!("SKIPPED: no guest can be taken in here: {error}");
        return Ok(());
    }
    let fits = |shape: &Shape| {
        // Both sides have it.
        let fits = check_can_hold(2 * shape.data_pages() * PAGE_SIZE as u64);
        fits.inspect_err(|error| println!("SKIPPED: {shape}: {error}")).is_ok()
    };
    let shapes: Vec<Shape> = arguments.shapes.iter().copied().filter(fits).collect();
    let mut runs: Vec<Vec<(Sent, Received)>> = shapes.iter().map(|_| vec![]).collect();
    for _ in 0..arguments.runs {
        for (shape, runs) in shapes.iter().zip(&mut runs) {
            let run = migrate(*shape).with_context(|| format!("a guest of {shape}"))?;
            println!("  {shape}: {}", figures(&[&run])?);
            runs.push(run);
        }
    }
    println!("medians of {}:", arguments.runs);
    for (shape, runs) in shapes.iter().zip(&runs) {
        println!("  {shape}: {}", figures(&runs.iter().collect::<Vec<_>>())?);
    }
    Ok(())
}

/// One migration. Both processes are killed if anything fails.
fn migrate(shape: Shape) -> anyhow::Result<(Sent, Received)> {
    let shape = shape.to_string();
    let mut destination = Running::start(&["--shapes", &shape, "--destination"])?;
    let ticket = destination.line().context("the destination")?;
    let mut source = Running::start(&["--shapes", &shape, "--source", &ticket])?;
    let sent = serde_json::from_str(&source.line().context("the source")?)?;
    let received = serde_json::from_str(&destination.line().context("the destination")?)?;
    Ok((sent, received))
}

/// A child process, killed with this value.
struct Running(Child, BufReader<std::process::ChildStdout>);

impl Running {
    fn start(arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command.args(arguments).stdout(Stdio::piped()).spawn()?;
        let output = child.stdout.take().context("no pipe")?;
        Ok(Self(child, BufReader::new(output)))
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        ensure!(self.1.read_line(&mut line)? > 0, "it ended without a word");
        Ok(line.trim().to_owned())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The medians of some runs of one shape, in one line.
fn figures(runs: &[&(Sent, Received)]) -> anyhow::Result<String> {
    let mut line = String::new();
    let median = |of: &dyn Fn(&(Sent, Received)) -> Option<u64>| {
        let mut all: Vec<u64> = runs.iter().filter_map(|run| of(run)).collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied().context("a report without a figure")
    };
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let downtime = median(&|(sent, _)| sent.report.downtime_us)?;
    let brownout = median(&|(sent, _)| sent.report.phases_us.target_brownout)?;
    let total = median(&|(sent, _)| sent.report.total_us)?;
    let wire = median(&|(sent, _)| sent.report.wire_bytes.to_destination)?;
    write!(line, "downtime {:.2} ms, ", downtime as f64 / 1e3)?;
    write!(line, "all memory there after {:.3} s, ", brownout as f64 / 1e6)?;
    write!(line, "in all {:.3} s, {:.0} MiB sent; ", total as f64 / 1e6, mib(wire))?;
    let engines = [
        median(&|(sent, _)| Some(sent.engine_bytes))?,
        median(&|(_, received)| Some(received.engine_bytes))?,
    ];
    let tables = [
        median(&|(sent, _)| Some(sent.page_table_bytes))?,
        median(&|(_, received)| Some(received.page_table_bytes))?,
    ];
    let [source, destination] = engines.map(mib);
    write!(line, "memory but the guest's {source:.0} MiB, {destination:.0} MiB; ")?;
    let [source, destination] = tables.map(mib);
    write!(line, "page tables {source:.0} MiB, {destination:.0} MiB; ")?;
    let grown = median(&|(sent, _)| Some(sent.grown_bytes))?;
    write!(line, "source's guest grown by {:.0} MiB", mib(grown))?;
    Ok(line)
}
