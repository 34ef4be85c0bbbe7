//! `postcopy check`: the independent checker as a program of its own.

use anyhow::Context;
use clap::Args;
use postcopy::checker::{CheckMachine, CheckParams, check};
use postcopy::program::exit::Failure;
use postcopy::program::output;
use postcopy::vmm::choice::WorkloadChoice;
use postcopy::vmm::trace::Trace;
use postcopy::vmm::workload::PageTables;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

/// Recomputes what a reference guest's memory must hold, from its seed, its pattern and
/// its step counters, and compares every page. It shares no code with the guests or
/// with the migration.
#[derive(Debug, Args)]
pub struct Check {
    /// Pages of the guest.
    #[arg(long)]
    pages: u64,
    /// Its vCPUs.
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// Its seed.
    #[arg(long)]
    seed: u64,
    /// Its workload: a pattern, or trace:FILE.
    #[arg(long, value_name = "PATTERN")]
    workload: WorkloadChoice,
    /// Pages of its zero tail.
    #[arg(long, default_value_t = 0)]
    zero_pages: u64,
    /// It ran under KVM: it has tables, stacks and a program of its own, all of which but
    /// the program and what is on the stacks is compared.
    #[arg(long)]
    kvm: bool,
    /// How its page tables mapped its memory.
    #[arg(long, value_enum, default_value = "2m", requires = "kvm")]
    page_tables: PageTables,
    /// Address and pages of each of its memory regions, in order [default: those of a PC].
    #[arg(long, value_delimiter = ',', value_parser = parse_region, requires = "kvm",
          value_name = "ADDRESS:PAGES")]
    regions: Vec<(u64, u64)>,
    /// The steps that each vCPU made, if they are known from elsewhere.
    #[arg(long, value_delimiter = ',', value_name = "STEPS")]
    expect_steps: Option<Vec<u64>>,
    /// The memory in page order; standard input if absent.
    file: Option<PathBuf>,
}

impl Check {
    /// Checks.
    pub fn run(self) -> anyhow::Result<()> {
        let machine = || {
            let small_pages = self.page_tables == PageTables::Small;
            match self.regions.is_empty() {
                true => CheckMachine::pc(self.pages, small_pages),
                false => CheckMachine { regions: self.regions.clone(), small_pages },
            }
        };
        // The file is data, as the seed is: what is read of it is replayed without the guest's code.
        let (pattern, touches) = match &self.workload {
            WorkloadChoice::Pattern(_) => (self.workload.to_string(), vec![]),
            WorkloadChoice::Trace(file) => {
                let trace = Trace::load(file)?;
                let pages = |vcpu| trace.touches(vcpu).iter().map(|touch| touch.page).collect();
                ("trace".to_owned(), (0..trace.vcpus()).map(pages).collect())
            }
        };
        let params = CheckParams {
            pages: self.pages,
            vcpus: self.vcpus,
            seed: self.seed,
            pattern: pattern.parse().map_err(anyhow::Error::msg)?,
            touches,
            zero_pages: self.zero_pages,
            kvm: self.kvm.then(machine),
            expect_steps: self.expect_steps,
        };
        let memory: Box<dyn Read> = match &self.file {
            Some(path) => Box::new(
                File::open(path).with_context(|| format!("cannot open {}", path.display()))?,
            ),
            None => Box::new(std::io::stdin().lock()),
        };
        let summary = check(&params, memory).map_err(|error| Failure::Wrong(error.to_string()))?;
        output::out(&format!(
            "verified: {} pages compared, {} unmodelled; {} steps, {} visits that wrote",
            summary.pages_compared,
            summary.pages_unmodelled,
            summary.steps.iter().sum::<u64>(),
            summary.visits,
        ));
        Ok(())
    }
}

fn parse_region(text: &str) -> Result<(u64, u64), String> {
    let wrong = || format!("{text:?} is no region; one is for instance 0x100000000:262144");
    let (address, pages) = text.split_once(':').ok_or_else(wrong)?;
    let address = match address.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => address.parse(),
    };
    Ok((address.map_err(|_| wrong())?, pages.parse().map_err(|_| wrong())?))
}
