//! Against QEMU: the same steps with the same think time through the same memory, moved by
//! stock QEMU and by `postcopy`, in turns on the same machine.
//!
//! ```text
//! cargo bench --bench peers -- --runs 5 --memory 1GiB --modes preempt,preempt-tls
//! ```
//!
//! What is compared, and what is not: QEMU's guest is a vCPU under TCG, ours a thread of a
//! process (or, with `--guest kvm`, a vCPU under KVM). Both make the steps that
//! `vmm::workload` lays down, random pages by the same seed; QEMU's runs the very program of
//! the KVM guest. Its steps are slower; the think time, the least from one step to the next,
//! hides that if it is long enough. What ours sends is always encrypted. Both run over
//! loopback, on cores that guest, source and destination share.
//!
//! Each of QEMU's runs has one of ours next to it, before it and after it by turns; after each
//! run of either the independent checker compares all of the guest's memory. Where QEMU or
//! the permission for userfaultfd is missing, one line says that all was skipped.

mod credentials;
mod figures;
mod ours;
mod payload;
mod qemu;
mod qmp;
mod rom;

use anyhow::Context;
use clap::Parser;
use figures::{Figures, Pair, table};
use payload::Load;
use postcopy::program::units::{parse_memory, parse_time};
use postcopy::uffd::open::{UffdOptions, open};
use postcopy::vmm::guest::GuestKind;
use qemu::{Mode, Qemu};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Migrations by stock QEMU and by postcopy, in turns, and the ratios of their figures.
#[derive(Debug, Parser)]
struct Arguments {
    /// Pairs of runs of each mode.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Guest memory.
    #[arg(long, default_value = "1GiB", value_parser = parse_memory, value_name = "SIZE")]
    memory: u64,
    /// How QEMU moves its guest.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "post-copy,preempt,tls,preempt-tls,pre-copy"
    )]
    modes: Vec<Mode>,
    /// How ours is moved: post-copy, pre-copy, hybrid, stop-and-copy, auto.
    #[arg(long, default_value = "post-copy", value_name = "MODE")]
    ours: String,
    /// Least time from one step of the guest to its next.
    #[arg(long, default_value = "20us", value_parser = parse_time, value_name = "TIME")]
    think: Duration,
    /// Our guest.
    #[arg(long, value_enum, default_value = "process")]
    guest: GuestKind,
    /// Seed of the memory's content and of the steps.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long a guest runs before it is moved.
    #[arg(long, default_value = "500ms", value_parser = parse_time, value_name = "TIME")]
    run_before: Duration,
    /// When a pre-copy that does not converge is cancelled.
    #[arg(long, default_value = "1m", value_parser = parse_time, value_name = "TIME")]
    pre_copy_limit: Duration,
    /// QEMU.
    #[arg(long, default_value = "qemu-system-x86_64", value_name = "PROGRAM")]
    qemu: PathBuf,
    /// Write all figures of all runs.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only see that it works: one run of each mode, 64 MiB.
    #[arg(long)]
    test: bool,
    /// Cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
    /// Cargo passes on the names of the benches that are wanted.
    #[arg(hide = true)]
    filter: Option<String>,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.filter.as_ref().is_some_and(|filter| !"peers".contains(filter.as_str())) {
        return ExitCode::SUCCESS;
    }
    if arguments.test {
        (arguments.runs, arguments.memory) = (1, 64 << 20);
        arguments.run_before = Duration::from_millis(100);
    }
    let qemu = match Qemu::find(&arguments.qemu) {
        Ok(qemu) => qemu,
        Err(why) => {
            println!("SKIPPED: nothing to compare with: {why}");
            return ExitCode::SUCCESS;
        }
    };
    if let Err(error) = open(UffdOptions::for_kvm(), postcopy::DestinationBacking::MemfdContinue) {
        println!("SKIPPED: no guest can be taken in here: {error}");
        return ExitCode::SUCCESS;
    }
    match compare(&arguments, &qemu) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peers: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compare(arguments: &Arguments, qemu: &Qemu) -> anyhow::Result<()> {
    let load = Load {
        memory: arguments.memory,
        think_ns: arguments.think.as_nanos() as u64,
        seed: arguments.seed,
    };
    let machine = machine();
    println!(
        "{}, guest under TCG, against postcopy, {}, {} guest",
        qemu.version,
        arguments.ours,
        arguments.guest.name()
    );
    println!(
        "{} MiB, 1 vCPU, random pages, think time {:?}, loopback; {machine}",
        load.memory >> 20,
        arguments.think
    );
    let mut pairs: Vec<Vec<Pair>> = arguments.modes.iter().map(|_| Vec::new()).collect();
    let mut runs = Vec::new();
    for round in 0..arguments.runs {
        for (place, mode) in arguments.modes.iter().copied().enumerate() {
            let loaded = load_average();
            let peer = || {
                let figures =
                    qemu.migrate(mode, &load, arguments.run_before, arguments.pre_copy_limit);
                figures.with_context(|| format!("QEMU, {}", mode.name()))
            };
            let own = || {
                let figures =
                    ours::migrate(arguments.guest, &arguments.ours, &load, arguments.run_before);
                figures.with_context(|| format!("postcopy, {}", arguments.ours))
            };
            let qemu_first = (round as usize + place).is_multiple_of(2);
            let pair = if qemu_first {
                let qemu = peer()?;
                Pair { qemu, ours: own()? }
            } else {
                let ours = own()?;
                Pair { qemu: peer()?, ours }
            };
            say(round, mode, &pair.qemu, &pair.ours, &loaded);
            runs.push(json!({
                "round": round, "mode": mode.name(), "load_average": loaded,
                "ours": arguments.ours, "first": if qemu_first { "qemu" } else { "postcopy" },
                "qemu": pair.qemu, "postcopy": pair.ours,
            }));
            pairs[place].push(pair);
            // After each pair: what was measured is there whatever comes next.
            write(arguments, qemu, &machine, &runs)?;
        }
    }
    for (mode, pairs) in arguments.modes.iter().zip(&pairs) {
        println!("\n{}", table(&mode.name(), pairs));
    }
    println!("Medians (least to most); a ratio is that of two runs next to each other.");
    println!("QEMU runs its guest under TCG, ours is a {} guest.", arguments.guest.name());
    Ok(())
}

fn say(round: u32, mode: Mode, qemu: &Figures, ours: &Figures, load: &str) {
    println!(
        "  {} {}: QEMU {}; postcopy {}; load average {load}",
        round + 1,
        mode.name(),
        qemu.brief(),
        ours.brief()
    );
}

fn write(arguments: &Arguments, qemu: &Qemu, machine: &str, runs: &[Value]) -> anyhow::Result<()> {
    let Some(path) = &arguments.json else { return Ok(()) };
    let all = json!({
        "schema": "postcopy-peers/1",
        "qemu": qemu.version,
        "qemu_accelerator": "tcg",
        "guest": arguments.guest.name(),
        "machine": machine,
        "memory_bytes": arguments.memory,
        "think_ns": arguments.think.as_nanos() as u64,
        "seed": arguments.seed,
        "runs": runs,
    });
    let text = serde_json::to_string_pretty(&all)?;
    fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

/// The load of the last minute, as the kernel writes it.
fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// What all of it ran on.
fn machine() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processors.lines().find_map(|line| line.strip_prefix("model name\t: "));
    let count = std::thread::available_parallelism().map_or(0, |count| count.get());
    format!("{count} cores, {}, Linux {}", model.unwrap_or("unknown"), kernel.trim())
}
