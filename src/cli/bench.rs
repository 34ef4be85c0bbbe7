//! `postcopy bench`: many migrations, measured alike.

use super::guest_args::kind_for;
use clap::Args;
use postcopy::bench::machine::{Machine, Program};
use postcopy::bench::matrix::Matrix;
use postcopy::bench::plan::{Conditions, Plan};
use postcopy::bench::{self, Display, table};
use postcopy::program::output;
use postcopy::program::signals::complain;
use postcopy::program::units::{parse_memory, parse_time};
use postcopy::proto::compression::CompressMode;
use postcopy::proto::prepaging::PolicyKind;
use postcopy::proto::switchover::{Mode, SwitchoverConfig};
use postcopy::trial::LinkShape;
use postcopy::uffd::DestinationBacking;
use postcopy::vmm::choice::WorkloadChoice;
use postcopy::vmm::guest::GuestKind;
use postcopy::vmm::trace::{Trace, TraceError, TraceId};
use postcopy::vmm::workload::Pattern;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// Runs every combination of what is listed, several times and interleaved, each as a
/// migration between processes of its own that is verified, and beside them floors: what this
/// machine needs for the least that a fault consists of. Prints a table of medians; the folder
/// gets the same as JSON, with every run, and as a page with plots, results.html.
///
/// Without arguments it takes a few minutes; with --full hours. Interrupted, it leaves what it
/// has, and the same command with --out goes on. A run that fails is shown with its reason, the
/// others go on, and the exit code is not 0.
#[derive(Debug, Args)]
pub struct Bench {
    /// All workloads, policies and backings, three modes, three sizes of memory and of vCPUs,
    /// four links: what a list below does not say otherwise.
    #[arg(long)]
    full: bool,
    /// Kinds of guest [default: kvm where it works, and process if a workload is a trace].
    #[arg(long, value_enum, value_delimiter = ',', value_name = "GUEST,..")]
    guest: Vec<GuestKind>,
    /// What the guests do: patterns, and trace:FILE, as for `postcopy run`
    /// [default: random,sequential].
    #[arg(long, value_delimiter = ',', value_name = "PATTERN,..")]
    workload: Vec<WorkloadChoice>,
    /// When memory moves: post-copy, pre-copy, hybrid, stop-and-copy or auto, as for `postcopy
    /// migrate`. All but post-copy are measured with memfd-continue only, and a pre-copy that
    /// does not come to an end is a run that fails [default: post-copy; with --full hybrid and
    /// auto, too].
    #[arg(long, value_delimiter = ',', value_name = "MODE,..")]
    mode: Vec<Mode>,
    /// Pre-paging policies [default: demand-only,bubbling].
    #[arg(long, value_delimiter = ',', value_name = "POLICY,..")]
    policy: Vec<PolicyKind>,
    /// Guest memory, for instance 128M,1G [default: 128M].
    #[arg(long, value_delimiter = ',', value_parser = parse_memory, value_name = "SIZE,..")]
    memory: Vec<u64>,
    /// Virtual CPUs, 1 to 4 [default: 1].
    #[arg(long, value_delimiter = ',', value_name = "N,..",
          value_parser = clap::value_parser!(u32).range(1..=4))]
    vcpus: Vec<u32>,
    /// What memory is made of at the destination [default: memfd-continue].
    #[arg(long, value_enum, value_delimiter = ',', value_name = "BACKING,..")]
    backing: Vec<DestinationBacking>,
    /// Push connections, 1 to 8 [default: 1].
    #[arg(long, value_delimiter = ',', value_name = "N,..",
          value_parser = clap::value_parser!(u8).range(1..=8))]
    push_lanes: Vec<u8>,
    /// Links: loopback, or RATE:ROUND-TRIP:LOSS of an emulated one, with - for what is not
    /// limited [default: loopback,1Gbit:1ms].
    #[arg(long, value_delimiter = ',', value_name = "LINK,..")]
    link: Vec<LinkShape>,
    /// How often each cell is run.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=999))]
    runs: u32,
    /// Decides the order of the cells in each round.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The folder for results; one of an earlier run with the same arguments goes on
    /// [default: postcopy-bench-TIME].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Try runs again that failed before.
    #[arg(long)]
    retry: bool,
    /// Do not compare the guests' pages in the end.
    #[arg(long)]
    no_verify: bool,
    /// No first run of each cell that is recorded for the plots, and not counted.
    #[arg(long)]
    no_record: bool,
    /// Least time from one step of a vCPU to its next, in nanoseconds.
    #[arg(long, default_value_t = 0, value_name = "NS")]
    think_ns: u64,
    /// Part of the memory that is zero, in percent.
    #[arg(long, default_value_t = 0, value_name = "PERCENT",
          value_parser = clap::value_parser!(u64).range(0..=90))]
    zero: u64,
    /// Rounds of the hybrid mode.
    #[arg(long, default_value_t = SwitchoverConfig::default().rounds, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(SwitchoverConfig::ROUNDS_MAX)))]
    rounds: u32,
    /// How long a guest may stand still where that can be chosen, in pre-copy and auto.
    #[arg(long, default_value = "300ms", value_parser = parse_time, value_name = "TIME")]
    max_downtime: Duration,
    /// Compress pushed pages: auto, always or never.
    #[arg(long, default_value_t, value_name = "MODE")]
    compress: CompressMode,
    /// Make huge pages of each guest's memory in the end; it runs on until that is done.
    #[arg(long, conflicts_with = "no_verify")]
    huge_pages: bool,
    /// How long a guest runs before it is migrated.
    #[arg(long, default_value = "200ms", value_parser = parse_time, value_name = "TIME")]
    run_before: Duration,
    /// How long it runs on after all its memory came.
    #[arg(long, default_value = "100ms", value_parser = parse_time, value_name = "TIME")]
    run_after: Duration,
    /// After how long on the destination the demand-only policy pushes what is left.
    #[arg(long, default_value = "1s", value_parser = parse_time, value_name = "TIME")]
    drain_after: Duration,
    /// What no single migration may outlast, the start and end of its processes included.
    #[arg(long, default_value = "2m", value_parser = parse_time, value_name = "TIME")]
    limit: Duration,
    /// How long each floor is measured, each round.
    #[arg(long, default_value = "300ms", value_parser = parse_time, value_name = "TIME")]
    floor_time: Duration,
    /// Only the table and errors.
    #[arg(long)]
    quiet: bool,
}

impl Bench {
    /// Runs the benchmark.
    pub fn run(self) -> anyhow::Result<()> {
        let matrix = self.matrix();
        let plan = self.plan(&matrix)?;
        let folder = self.out.clone().unwrap_or_else(new_folder);
        if !self.quiet {
            if let Some(left_out) = matrix.left_out() {
                output::err(&format!("left out: {left_out}"));
            }
            output::err(&format!(
                "{} cells, {} runs each, in an order by seed {}; results go to {}",
                plan.cells.len(),
                plan.rounds,
                plan.seed,
                folder.display()
            ));
        }
        let stop = Arc::new(AtomicBool::new(false));
        stop_on_interrupt(stop.clone());
        let display = Display::new(self.quiet);
        let results = bench::bench(plan, &folder, self.retry, &display, &stop)?;
        output::out(table::render(&results).trim_end());
        bench::verdict(&results, &folder)
    }

    fn plan(&self, matrix: &Matrix) -> anyhow::Result<Plan> {
        Ok(Plan {
            rounds: self.runs,
            seed: self.seed,
            conditions: Conditions {
                think_ns: self.think_ns,
                zero_percent: self.zero,
                guest_seed: 1,
                hybrid_rounds: self.rounds,
                // A year at most, as all times.
                max_downtime_us: self.max_downtime.as_micros() as u64,
                compress: self.compress,
                huge_pages: self.huge_pages,
                run_before_ms: millis(self.run_before),
                run_after_ms: millis(self.run_after),
                drain_after_ms: millis(self.drain_after),
                verify: !self.no_verify,
                limit_ms: millis(self.limit),
                floor_ms: millis(self.floor_time),
                record: !self.no_record,
            },
            cells: matrix.cells()?,
            traces: self.traces()?,
            program: Program::here(),
            machine: Machine::here(),
        })
    }

    /// The traces that were listed: a file that is another one later makes another plan.
    fn traces(&self) -> Result<BTreeMap<PathBuf, TraceId>, TraceError> {
        let files = self.workload.iter().filter_map(|of| of.trace());
        files.map(|file| Ok((file.to_owned(), Trace::load(file)?.id().clone()))).collect()
    }

    /// What was listed, and the defaults for what was not.
    fn matrix(&self) -> Matrix {
        let link = |text: &str| text.parse::<LinkShape>().expect("a constant that is a link");
        let quick = Matrix {
            guests: vec![],
            workloads: [Pattern::Random, Pattern::Sequential].map(WorkloadChoice::Pattern).into(),
            modes: vec![Mode::PostCopy],
            policies: vec![PolicyKind::DemandOnly, PolicyKind::Bubbling],
            memories: vec![128 << 20],
            vcpus: vec![1],
            backings: vec![DestinationBacking::MemfdContinue],
            push_lanes: vec![1],
            links: vec![LinkShape::default(), link("1Gbit:1ms")],
        };
        let defaults = match self.full {
            false => quick,
            true => Matrix {
                guests: vec![],
                workloads: Pattern::ALL.map(WorkloadChoice::Pattern).to_vec(),
                // Those that come to an end whatever a guest writes, and in which the policies
                // matter.
                modes: vec![Mode::PostCopy, Mode::Hybrid, Mode::Auto],
                policies: PolicyKind::ALL.to_vec(),
                memories: vec![128 << 20, 512 << 20, 2 << 30],
                vcpus: vec![1, 2, 4],
                backings: vec![
                    DestinationBacking::Anonymous,
                    DestinationBacking::MemfdContinue,
                    DestinationBacking::MemfdCopy,
                ],
                push_lanes: vec![1],
                links: ["loopback", "10Gbit:100us", "1Gbit:1ms", "1Gbit:10ms:0.1%"]
                    .map(link)
                    .to_vec(),
            },
        };
        let mut guests = self.guest.clone();
        if guests.is_empty() {
            guests.push(kind_for(&self.workload));
        }
        Matrix {
            guests,
            workloads: listed(&self.workload, defaults.workloads),
            modes: listed(&self.mode, defaults.modes),
            policies: listed(&self.policy, defaults.policies),
            memories: listed(&self.memory, defaults.memories),
            vcpus: listed(&self.vcpus, defaults.vcpus),
            backings: listed(&self.backing, defaults.backings),
            push_lanes: listed(&self.push_lanes, defaults.push_lanes),
            links: listed(&self.link, defaults.links),
        }
    }
}

fn listed<T: Clone>(list: &[T], default: Vec<T>) -> Vec<T> {
    if list.is_empty() { default } else { list.to_vec() }
}

fn millis(time: Duration) -> u64 {
    // Times on the command line are a year at most.
    time.as_millis() as u64
}

/// A folder named by the time.
fn new_folder() -> PathBuf {
    let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    format!("postcopy-bench-{}", now.replace(':', "-")).into()
}

/// The first interrupt ends the benchmark with what it has; a second one at once.
fn stop_on_interrupt(stop: Arc<AtomicBool>) {
    /// What comes so soon is the same interrupt: timeout(1) sends it to the process and to its
    /// group.
    const SAME: Duration = Duration::from_millis(300);
    let mut first: Option<Instant> = None;
    let handler = move || match first {
        None => {
            first = Some(Instant::now());
            stop.store(true, Ordering::SeqCst);
            complain("postcopy", "interrupted; what is finished is kept");
        }
        Some(at) if at.elapsed() < SAME => {}
        Some(_) => {
            complain("postcopy", "interrupted twice");
            output::farewell();
            std::process::exit(130);
        }
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        complain("postcopy", &format!("interrupts are not handled: {error}"));
    }
}
