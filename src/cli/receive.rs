//! `postcopy receive`: take a guest in.

use anyhow::{Context, anyhow};
use clap::Args;
use postcopy::host::arrival::{self, Arrival};
use postcopy::memory::ram::GuestRam;
use postcopy::operator::desk::Desk;
use postcopy::program::exit::{Failure, Side, both, write_report};
use postcopy::program::output;
use postcopy::program::signals::{complain, on_interrupt};
use postcopy::program::units::parse_time;
use postcopy::proto::layout::Region;
use postcopy::proto::page::{PageIndex, PageRun};
use postcopy::proto::source::Outcome;
use postcopy::report::human::render;
use postcopy::report::merge::Heading;
use postcopy::report::schema::{self, Guest as GuestSection, HugePages, Link, Mode, Report};
use postcopy::transport::ticket::Host;
use postcopy::uffd::DestinationBacking;
use postcopy::vmm::choice::WorkloadChoice;
use postcopy::vmm::guest::{Guest, GuestKind};
use postcopy::vmm::stalls::StallCounts;
use postcopy::vmm::trace::Trace;
use postcopy::vmm::workload::Pattern;
use postcopy::{Collapsing, DestinationBuilder, Event};
use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often something is looked at that cannot be waited for.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Prints a ticket, waits for a guest, takes it in and goes on running it.
#[derive(Debug, Args)]
pub struct Receive {
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    listen: IpAddr,
    /// UDP port of the urgent lane; push lanes take those after it. 0: any free ones.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Name or address that goes into the ticket, if it is not the one listened on.
    #[arg(long, value_name = "HOST")]
    public_host: Option<Host>,
    /// Push connections, each with a thread of its own on both sides.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    push_lanes: u8,
    /// What the guest's memory is made of here.
    #[arg(long, value_enum, default_value = "memfd-continue")]
    backing: DestinationBacking,
    /// Take guests that this host's memory does not hold. Else memory for every page is
    /// reserved before the guest is paused, and what turns out to be zero is given back. Huge
    /// pages (--backing hugetlb) are reserved all the same, and none is given back.
    #[arg(long)]
    overcommit: bool,
    /// Make transparent huge pages of the guest's memory once all of it is here, in the
    /// background: whoever touches a block of 2 MiB that becomes one waits for some
    /// milliseconds. What came of it is in this side's report. Needs Linux 6.1.
    #[arg(long)]
    huge_pages: bool,
    /// How long the ticket is good.
    #[arg(long, default_value = "10m", value_parser = parse_time, value_name = "TIME")]
    ticket_life: Duration,
    /// How long to wait for a lost link, or for the source's word whether it committed the
    /// guest. Then it is given up for lost; until then nothing is. Give the source the same.
    /// [default: 10m]
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    patience: Option<Duration>,
    /// Let a guest run that was paused where it comes from, once all its memory is here;
    /// without it such a guest stays paused.
    #[arg(long)]
    unpause: bool,
    /// Stop the guest so long after all its memory came, and compare every page with
    /// what it must hold; without it the guest runs until it is interrupted. One that is paused
    /// makes the rest of its step for that.
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    verify_after: Option<Duration>,
    /// The trace that the guest replays, if its workload is one: the file that the source has,
    /// since a trace does not travel with the guest.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Where to make a socket (mode 0600) for `postcopy session --operator`.
    #[arg(long, value_name = "PATH")]
    operator: Option<PathBuf>,
    /// Record when each fault came and each run of pages was placed, in 16 bytes each.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Write this side's report as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Only the ticket and errors.
    #[arg(long)]
    quiet: bool,
}

impl Receive {
    /// Receives a guest.
    pub fn run(self) -> anyhow::Result<()> {
        let trace = self.trace.as_deref().map(Trace::load).transpose()?;
        let mut destination = DestinationBuilder::new()
            .listen(self.listen)
            .port(self.port)
            .push_lanes(usize::from(self.push_lanes))
            .ticket_life(self.ticket_life)
            .backing(self.backing)
            .record(self.record.is_some())
            .overcommit(self.overcommit)
            .huge_pages(self.huge_pages)
            .is_kvm(|hello| {
                arrival::description(hello).is_ok_and(|guest| guest.kind == GuestKind::Kvm)
            });
        if let Some(patience) = self.patience {
            destination = destination.patience(patience);
        }
        if let Some(host) = &self.public_host {
            destination = destination.public_host(host.to_string());
        }
        if !self.quiet {
            destination = destination.on_event(|event| match event {
                Event::Paused { why } => {
                    output::err(&format!(
                        "the link is lost: {why}; waiting for the source to come back"
                    ));
                }
                Event::LinkUp { epoch: 1.. } => output::err("the link is back"),
                _ => {}
            });
        }
        let receiver = destination.build()?;
        let desk = self.operator.as_ref().map(|path| Desk::open(path, receiver.operator()));
        let desk = desk.transpose().context("cannot make the operator socket")?;
        // This may wait for its reader: before somebody has read it nobody can come.
        writeln!(std::io::stdout(), "{}", receiver.ticket()).context("cannot print the ticket")?;
        let interrupted = Arc::new(AtomicBool::new(false));
        let canceller = receiver.canceller();
        let seen = interrupted.clone();
        let stop = move || {
            seen.store(true, Ordering::SeqCst);
            canceller.cancel("interrupted by the user");
        };
        // What it has of a guest goes with it.
        on_interrupt("postcopy", stop, || {});
        let arrival = Arrival::with_trace(trace.map(Arc::new));
        let end = receiver.run(Box::new(arrival.clone()))?;
        drop(desk);
        if let (Some(path), Some(recorded)) = (&self.record, &end.recorded) {
            // No figure of a migration is worth the guest that it has brought.
            recorded.write(path).unwrap_or_else(|error| {
                complain("postcopy", &format!("no recording {}: {error}", path.display()));
            });
        }
        let guest = arrival.take();
        let mut report = end.report;
        if let Err(failure) = Failure::of(&end.outcome, Side::Destination) {
            let report = whole_report(report, &end.outcome, None, self.backing);
            return self.end(&report, Err(failure.into()));
        }
        let mut guest = guest.ok_or_else(|| anyhow!("the engine lost the guest"))?;
        let stalls = arrival::stalls(guest.as_ref());
        let mut paused = arrival.came_paused();
        self.say(match paused {
            true => "the guest is here with all its memory, paused as it came",
            false => "the guest runs here with all its memory",
        });
        if paused && self.unpause {
            guest.resume()?;
            self.say("it runs now");
            paused = false;
        }
        let huge_pages = |guest: &dyn Guest| {
            end.collapsing.map(|collapsing| collapsed(collapsing, guest, &stalls, &interrupted))
        };
        let (huge_pages, verified) = match self.verify_after {
            Some(after) => {
                sleep_unless(&interrupted, after);
                let huge_pages = huge_pages(guest.as_ref());
                if paused {
                    guest.resume()?;
                }
                (huge_pages, Some(self.verify(guest.as_mut())))
            }
            None => {
                self.run_on(guest.as_ref(), &interrupted);
                (huge_pages(guest.as_ref()), None)
            }
        };
        report.verified = verified.as_ref().map(Result::is_ok);
        let mut report = whole_report(report, &end.outcome, Some(guest.as_ref()), self.backing);
        report.huge_pages = huge_pages;
        report.guest.was_paused = Some(arrival.came_paused());
        if !self.quiet {
            output::out(&render(&report));
        }
        self.end(&report, verified.unwrap_or(Ok(())))
    }

    fn say(&self, line: &str) {
        if !self.quiet {
            output::out(line);
        }
    }

    fn run_on(&self, guest: &dyn Guest, interrupted: &AtomicBool) {
        self.say("interrupt (ctrl-c) to end it");
        while !interrupted.load(Ordering::SeqCst) && guest.failure().is_none() {
            std::thread::sleep(Duration::from_millis(50));
        }
        if let Some(why) = guest.failure() {
            complain("postcopy", &format!("the guest stopped: {why}"));
        }
    }

    /// Stops the guest between two steps and has the checker compare its memory.
    fn verify(&self, guest: &mut dyn Guest) -> anyhow::Result<()> {
        let steps = arrival::finish(guest)
            .map_err(|error| Failure::Wrong(format!("the guest's own checks: {error}")))?;
        let workload = guest.workload().clone();
        let choice = match (workload.pattern, &self.trace) {
            (Pattern::Trace, Some(file)) => WorkloadChoice::Trace(file.clone()),
            (pattern, _) => WorkloadChoice::Pattern(pattern),
        };
        let steps: Vec<String> = steps.iter().map(u64::to_string).collect();
        let mut checker = Command::new(std::env::current_exe()?);
        checker
            .args(["--die-with-parent", "check"])
            .args(["--pages", &guest.ram().layout().pages().to_string()])
            .args(["--vcpus", &workload.vcpus.to_string()])
            .args(["--seed", &workload.seed.to_string()])
            .args(["--workload", &choice.to_string()])
            .args(["--zero-pages", &workload.zero_pages.to_string()])
            .args(["--expect-steps", &steps.join(",")]);
        if guest.kind() == GuestKind::Kvm {
            let region = |region: &Region| format!("{:#x}:{}", region.start.0, region.pages);
            let regions: Vec<_> = guest.ram().layout().regions().iter().map(region).collect();
            checker.args(["--kvm", "--page-tables", workload.form.page_tables.name()]);
            checker.args(["--regions", &regions.join(",")]);
        }
        checker.stdin(Stdio::piped());
        if self.quiet {
            checker.stdout(Stdio::null());
        }
        let mut child = checker.spawn().context("cannot start the checker")?;
        let stdin = child.stdin.take().ok_or_else(|| anyhow!("the checker has no input"))?;
        let poured = pour(guest.ram(), stdin);
        let status = child.wait()?;
        match (status.code(), poured) {
            (Some(0), poured) => Ok(poured?),
            // It has said what is wrong; that it then stopped reading is no news.
            (Some(5), _) => Err(Failure::Wrong("see above".into()).into()),
            (_, Err(error)) => Err(error).context("cannot pass memory to the checker"),
            (code, Ok(())) => Err(anyhow!("the checker ended with {code:?}")),
        }
    }

    fn end(&self, report: &Report, session: anyhow::Result<()>) -> anyhow::Result<()> {
        both("postcopy", session, write_report(report, self.report.as_deref()))
    }
}

/// Writes all of a stopped guest's memory, in page order.
fn pour(ram: &GuestRam, mut into: impl Write) -> std::io::Result<()> {
    const PAGES: u64 = 256;
    let pages = ram.layout().pages();
    let mut first = 0;
    let mut buffer = Vec::new();
    while let Some(run) = PageRun::new(PageIndex::new(first), PAGES.min(pages - first)) {
        buffer.resize(run.bytes(), 0);
        ram.read_run(run, &mut buffer);
        into.write_all(&buffer)?;
        first = run.end();
    }
    Ok(())
}

/// Waits for huge pages, unless the guest is to end before, and tells what came of them;
/// `before` are the stalls that the guest had counted when they were begun with.
fn collapsed(
    collapsing: Collapsing,
    guest: &dyn Guest,
    before: &StallCounts,
    interrupted: &AtomicBool,
) -> HugePages {
    while !collapsing.is_finished() {
        if interrupted.load(Ordering::SeqCst) || guest.failure().is_some() {
            break;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let stalls = arrival::stalls_since(guest, before);
    HugePages { guest_stall_ns: Some(stalls), ..collapsing.stop() }
}

fn sleep_unless(interrupted: &AtomicBool, time: Duration) {
    let until = std::time::Instant::now() + time;
    while std::time::Instant::now() < until && !interrupted.load(Ordering::SeqCst) {
        std::thread::sleep(LOOK_EVERY.min(time));
    }
}

fn whole_report(
    part: postcopy::report::merge::DestinationPart,
    outcome: &Outcome,
    guest: Option<&dyn Guest>,
    backing: DestinationBacking,
) -> Report {
    let (outcome, reason) = match outcome {
        Outcome::Completed if part.epochs.is_some_and(|epochs| epochs > 1) => {
            (schema::Outcome::Recovered, None)
        }
        Outcome::Completed => (schema::Outcome::Completed, None),
        Outcome::Aborted(why) => (schema::Outcome::Aborted, Some(why.clone())),
        Outcome::Lost(why) => (schema::Outcome::Lost, Some(why.clone())),
    };
    let guest = GuestSection {
        kind: guest.map_or("none", |guest| guest.kind().name()).into(),
        memory_bytes: guest.map_or(0, |guest| guest.ram().layout().bytes()),
        page_size: 4096,
        vcpus: guest.map_or(0, |guest| guest.workload().vcpus),
        backing: backing.to_string(),
        workload: None,
        was_paused: None,
    };
    let link = Link { encrypted: true, ..Link::default() };
    // Of the modes that copy before, this side knows only what is left when they have.
    let mode = match part.pages.precopied {
        None => Mode::PostCopy,
        copied if copied == part.pages.total => Mode::PreCopy,
        Some(_) => Mode::Hybrid,
    };
    let (policy, switchover) = (None, None);
    let heading = Heading { outcome, reason, mode, policy, guest, link, switchover };
    Report::of_destination(heading, part)
}
