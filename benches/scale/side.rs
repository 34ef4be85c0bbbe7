//! The two sides of one migration, each a process of its own, so that what it takes of memory
//! can be told.

use crate::guest::{Still, Touching};
use crate::shape::Shape;
use anyhow::{Context, bail, ensure};
use postcopy::proto::page::PAGE_SIZE;
use postcopy::{DestinationBuilder, Outcome, SourceBuilder, Ticket};
use serde_json::json;
use std::fs;
use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Between two touches of the guest's only vCPU.
const THINK: Duration = Duration::from_micros(20);

/// Makes a guest and sends it; prints the report.
pub fn source(shape: Shape, ticket: &str) -> anyhow::Result<()> {
    let memory = shape.memory()?;
    shape.fill(&memory)?;
    let before = Resident::now()?;
    // SAFETY: nothing writes to the memory any more.
    let builder = unsafe { SourceBuilder::new(memory, ticket.parse::<Ticket>()?) };
    let end = builder.machine("scale").guest(shape.to_string()).build()?.run(Box::new(Still))?;
    ensure!(end.outcome == Outcome::Completed, "{:?}", end.outcome);
    let (after, data) = (Resident::now()?, shape.data_pages() * PAGE_SIZE as u64);
    println!(
        "{}",
        json!({
            "report": end.report,
            "engine_bytes": after.peak.saturating_sub(data.min(before.shared)),
            "grown_bytes": after.shared.saturating_sub(before.shared),
            "page_table_bytes": after.page_tables,
        })
    );
    Ok(())
}

/// Prints a ticket, takes the guest in, lets it run, compares its memory; prints what it took.
pub fn destination(shape: Shape) -> anyhow::Result<()> {
    let builder = DestinationBuilder::new().is_kvm(|_| false).overcommit(shape.is_sparse());
    let receiver = builder.build()?;
    println!("{}", receiver.ticket());
    std::io::stdout().flush()?;
    let vm = Touching::new(shape, THINK);
    let (over, wrong) = (vm.over.clone(), vm.wrong.clone());
    let end = receiver.run(Box::new(vm))?;
    let resident = Resident::now()?;
    over.store(true, Ordering::Relaxed);
    ensure!(end.outcome == Outcome::Completed, "{:?}", end.outcome);
    ensure!(wrong.load(Ordering::Relaxed) == 0, "the guest read what it had not written");
    shape.check(&*end.ram.context("a guest without memory")?)?;
    println!(
        "{}",
        json!({
            "engine_bytes": resident.peak.saturating_sub(resident.shared),
            "page_table_bytes": resident.page_tables,
        })
    );
    Ok(())
}

/// What a process has in memory, in bytes.
struct Resident {
    /// The most there ever was, guest memory included.
    peak: u64,
    /// Shared memory: the guest's.
    shared: u64,
    page_tables: u64,
}

impl Resident {
    fn now() -> anyhow::Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let bytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            match kib {
                Some(kib) => Ok(kib << 10),
                None => bail!("no {name} in /proc/self/status"),
            }
        };
        let (peak, shared) = (bytes("VmHWM")?, bytes("RssShmem")?);
        Ok(Self { peak, shared, page_tables: bytes("VmPTE")? })
    }
}
