//! Migrations of a guest that does nothing, with pages of one kind, with and without
//! compression, in turns; every page is compared.
//!
//! ```text
//! cargo bench --bench compression -- --runs 3 --memory 512MiB --content text --link 1Gbit:1ms
//! ```
//!
//! `text` are lines of a log, `half` pages of which one half is noise and the other zero, `noise`
//! what cannot become smaller. Source, destination and the emulated link are threads of this
//! process, so processor time is that of all three.

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use postcopy::program::units::parse_memory;
use postcopy::report::schema::Report;
use postcopy::transport::relay::{Relay, RelayConfig, targets};
use postcopy::trial::LinkShape;
use postcopy::uffd::open::{UffdOptions, open};
use postcopy::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use postcopy::{
    Captured, CompressMode, DestinationBuilder, DestinationVm, Hello, Mismatch, Outcome,
    SourceBuilder, SourceVm, VmError,
};
use std::net::{IpAddr, Ipv4Addr};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;

/// Migrations with and without compression, in turns.
#[derive(Debug, Parser)]
struct Arguments {
    /// The guest's memory.
    #[arg(long, default_value = "512MiB", value_parser = parse_memory)]
    memory: u64,
    /// What its pages hold.
    #[arg(long, value_enum, default_value = "text")]
    content: Content,
    /// `loopback`, or RATE:ROUND-TRIP of an emulated link.
    #[arg(long, default_value = "1Gbit:1ms")]
    link: LinkShape,
    /// Which modes are compared.
    #[arg(long, value_delimiter = ',', default_value = "never,auto,always")]
    modes: Vec<CompressMode>,
    /// Migrations of each.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Only see that it works: one run of a small guest.
    #[arg(long)]
    test: bool,
    /// Cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
    /// Cargo passes on the names of the benches that are wanted.
    #[arg(hide = true)]
    filter: Option<String>,
}

/// What pages hold.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Content {
    Text,
    Half,
    Noise,
}

impl Content {
    fn page(self, page: u64) -> Vec<u8> {
        // Another multiplier than the step's, or pages would be each other's, moved by a word.
        let mut state = page.wrapping_mul(0xD6E8_FEB8_6659_FD93);
        let mut word = || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let x = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            x ^ (x >> 31)
        };
        match self {
            Self::Noise => (0..PAGE / 8).flat_map(|_| word().to_le_bytes()).collect(),
            Self::Half => {
                let half = (0..PAGE / 16).flat_map(|_| word().to_le_bytes());
                half.chain(std::iter::repeat_n(0, PAGE / 2)).collect()
            }
            Self::Text => {
                let mut text = String::with_capacity(PAGE + 100);
                while text.len() < PAGE {
                    let drawn = word();
                    let (user, status) = (drawn % 4999, 200 + drawn % 4 * 101);
                    let line = format!(
                        "{:08x} INFO http: served user {user} with status {status} in {} us\n",
                        drawn >> 32,
                        drawn >> 48
                    );
                    text.push_str(&line);
                }
                text.truncate(PAGE);
                text.into_bytes()
            }
        }
    }
}

struct Still;

impl SourceVm for Still {
    fn pause(&mut self) -> Result<Captured, VmError> {
        Ok(Captured { state: b"still".to_vec(), ..Captured::default() })
    }
    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    fn release(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

#[derive(Default)]
struct Taken(Option<GuestMemoryMmap>);

impl DestinationVm for Taken {
    fn prepare(&mut self, _: &Hello, memory: GuestMemoryMmap) -> Result<String, Mismatch> {
        self.0 = Some(memory);
        Ok("bench".into())
    }
    fn restore(&mut self, _: &[u8]) -> Result<(), VmError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<Instant, VmError> {
        Ok(Instant::now())
    }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.filter.as_ref().is_some_and(|filter| !"compression".contains(filter.as_str())) {
        return ExitCode::SUCCESS;
    }
    if arguments.test {
        (arguments.runs, arguments.memory) = (1, 16 << 20);
    }
    match measure(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compression: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    if let Err(error) =
        open(UffdOptions::for_process(), postcopy::DestinationBacking::MemfdContinue)
    {
        println!("SKIPPED: no guest can be taken in here: {error}");
        return Ok(());
    }
    let pages = arguments.memory / PAGE as u64;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), pages as usize * PAGE)])?;
    for page in 0..pages {
        memory.write_slice(&arguments.content.page(page), GuestAddress(page * PAGE as u64))?;
    }
    let mut totals: Vec<Vec<f64>> = arguments.modes.iter().map(|_| vec![]).collect();
    for _ in 0..arguments.runs {
        for (mode, totals) in arguments.modes.iter().zip(&mut totals) {
            let done = migrate(*mode, &memory, arguments);
            let (report, cpu) = done.with_context(|| mode.to_string())?;
            let total = report.total_us.context("a migration without an end")? as f64 / 1e6;
            println!("  {mode:6} {total:.2} s, processor {cpu:.2?}{}", compression(&report));
            totals.push(total);
        }
    }
    println!(
        "{:?} over {}, median (least to most) of {}:",
        arguments.content, arguments.link, arguments.runs
    );
    for (mode, totals) in arguments.modes.iter().zip(&mut totals) {
        totals.sort_by(f64::total_cmp);
        let [least, median, most] = [0, totals.len() / 2, totals.len() - 1].map(|at| totals[at]);
        println!("  {mode:6} {median:.2} s ({least:.2} to {most:.2})");
    }
    Ok(())
}

fn compression(report: &Report) -> String {
    let Some(of) = &report.compression else { return String::new() };
    let on = of.switches.iter().find(|switch| switch.on);
    let on = on.map(|on| format!(", on after {:.2} s", on.at_us as f64 / 1e6));
    format!(
        "; {} pages in {} %, {} ms; {} probes, {} us{}; {}",
        of.pages,
        of.bytes_after * 100 / of.bytes_before.max(1),
        of.cpu_us / 1000,
        of.probes,
        of.probes_cpu_us,
        on.unwrap_or_default(),
        of.why.as_deref().unwrap_or("as asked for"),
    )
}

/// Of this process, all its threads.
fn processor_time() -> anyhow::Result<Duration> {
    let clock = nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID;
    Ok(Duration::from(nix::time::clock_gettime(clock)?))
}

/// One migration, its pages compared, and the processor time until it was over.
fn migrate(
    mode: CompressMode,
    memory: &GuestMemoryMmap,
    arguments: &Arguments,
) -> anyhow::Result<(Report, Duration)> {
    let receiver = DestinationBuilder::new().is_kvm(|_| false).build()?;
    let mut ticket = receiver.ticket().clone();
    let link = arguments.link;
    let _relay = if link.is_loopback() {
        None
    } else {
        let config = RelayConfig {
            bandwidth_bps: link.bandwidth_bps,
            rtt: link.rtt.unwrap_or_default(),
            loss: link.loss.unwrap_or_default(),
            ..RelayConfig::default()
        };
        let ports = targets(IpAddr::V4(Ipv4Addr::LOCALHOST), &ticket);
        let relay = Relay::spawn(config, &ports)?;
        ticket = relay.redirect(&ticket)?;
        Some(relay)
    };
    // SAFETY: nothing writes to the memory any more.
    let source = unsafe { SourceBuilder::new(memory.clone(), ticket) };
    let migration = source.machine("bench").compress(mode).build()?;
    let before = processor_time()?;
    let receiving = thread::spawn(move || receiver.run(Box::new(Taken::default())));
    let end = migration.run(Box::new(Still))?;
    ensure!(end.outcome == Outcome::Completed, "{:?}", end.outcome);
    let destination =
        receiving.join().map_err(|_| anyhow::anyhow!("the destination panicked"))??;
    let cpu = processor_time()?.saturating_sub(before);
    let ram = destination.ram.context("a guest without memory")?;
    let moved = ram.guest_memory();
    let mut bytes = vec![0; PAGE];
    for page in 0..arguments.memory / PAGE as u64 {
        moved.read_slice(&mut bytes, GuestAddress(page * PAGE as u64))?;
        ensure!(bytes == arguments.content.page(page), "page {page} is another");
    }
    Ok((end.report, cpu))
}
