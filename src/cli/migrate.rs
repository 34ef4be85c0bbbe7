//! `postcopy migrate`: attach to a guest and move it.

use super::exit::{Failure, Side};
use super::units::parse_time;
use anyhow::Context;
use clap::{Args, ValueEnum};
use postcopy::attach::client::Attached;
use postcopy::engine::attached::AttachedVmm;
use postcopy::engine::source::{Migration, SourceConfig};
use postcopy::proto::prepaging::PolicyKind;
use postcopy::proto::source::{SessionLimits, SourceState};
use postcopy::report::human::render;
use postcopy::report::progress::{Progress, ProgressMode, Snapshot};
use postcopy::transport::{LinkOptions, Ticket};
use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// Attaches to a running guest and moves it: this process is the fault server, and
/// holds the guest's memory until the destination has it all.
#[derive(Debug, Args)]
pub struct Migrate {
    /// The guest's control socket.
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
    /// The line that `postcopy receive` printed; `-` reads it from standard input, so
    /// that other users of this host do not see it.
    #[arg(long, value_name = "TICKET")]
    ticket: String,
    #[command(flatten)]
    policy: PolicyArgs,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// No progress display, no report for people.
    #[arg(long)]
    quiet: bool,
}

/// How pages are pushed.
#[derive(Clone, Debug, Args)]
pub struct PolicyArgs {
    /// Which pages are pushed before they are asked for.
    #[arg(long, value_enum, default_value = "bubbling")]
    pub policy: PolicyName,
    /// Pivots of the bubbling policy.
    #[arg(long, value_name = "K")]
    pub pivots: Option<usize>,
    /// Push all that is left after the guest ran for so long at the destination;
    /// without it the demand-only policy waits for the end of the workload.
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    pub drain_after: Option<Duration>,
}

/// The pre-paging policies by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PolicyName {
    /// Nothing; at the end a drain, counted apart.
    DemandOnly,
    /// Upward from the last fault.
    Linear,
    /// Around the last faults, in both directions.
    Bubbling,
}

impl PolicyName {
    /// The policy.
    pub fn kind(self) -> PolicyKind {
        match self {
            Self::DemandOnly => PolicyKind::DemandOnly,
            Self::Linear => PolicyKind::Linear,
            Self::Bubbling => PolicyKind::Bubbling,
        }
    }
}

impl Migrate {
    /// Migrates.
    pub fn run(self) -> anyhow::Result<()> {
        let ticket = read_ticket(&self.ticket)?;
        if ticket.looks_expired(SystemTime::now()) {
            eprintln!("postcopy: by this host's clock the ticket has expired; trying it");
        }
        let attached = Attached::connect(&self.control)
            .with_context(|| format!("cannot attach to the guest at {}", self.control.display()))?;
        let (guest, machine, ram) =
            (attached.guest.clone(), attached.machine.clone(), attached.ram.clone());
        let vmm = AttachedVmm::new(attached)?;
        let workload =
            serde_json::from_str::<postcopy::host::GuestDescription>(&guest.workload_json)
                .ok()
                .and_then(|guest| serde_json::to_value(guest.workload.pattern).ok())
                .and_then(|name| name.as_str().map(str::to_owned));
        let config = SourceConfig {
            ticket,
            link: LinkOptions::default(),
            limits: SessionLimits::default(),
            policy: self.policy.policy.kind(),
            pivots: self.policy.pivots,
            drain_after: self.policy.drain_after,
            machine,
            guest: guest.workload_json.into_bytes(),
            vcpus: guest.vcpus as u16,
            guest_kind: guest.kind,
            workload,
        };
        let mode = if self.quiet { ProgressMode::Quiet } else { ProgressMode::Auto };
        let mut display = Progress::new(mode);
        let migration = Migration::new(config, ram);
        let canceller = migration.canceller();
        super::on_interrupt(move || canceller.cancel("interrupted by the user"));
        let end = migration.run(Box::new(vmm), move |now| {
            display.update(Snapshot {
                phase: phase(now.state),
                pages_done: now.settled,
                pages_total: now.pages,
                bytes: now.wire_bytes,
                network_faults: now.network_faults,
                elapsed: now.elapsed,
            });
        })?;
        let wrong = end.report.check();
        if let Some(path) = &self.report {
            end.report
                .write(path)
                .with_context(|| format!("cannot write the report {}", path.display()))?;
        }
        if !self.quiet {
            println!("{}", render(&end.report));
        }
        Failure::of(&end.outcome, Side::Source)?;
        if !wrong.is_empty() {
            return Err(Failure::Wrong(wrong.join("; ")).into());
        }
        Ok(())
    }
}

fn read_ticket(text: &str) -> anyhow::Result<Ticket> {
    if text != "-" {
        return Ok(text.trim().parse()?);
    }
    // A ticket is a line; whatever pours in here has a limit.
    let mut line = String::new();
    std::io::stdin().take(4096).read_to_string(&mut line).context("cannot read the ticket")?;
    Ok(line.trim().parse()?)
}

fn phase(state: SourceState) -> &'static str {
    match state {
        SourceState::Connecting | SourceState::Negotiating => "handshake",
        SourceState::Pausing
        | SourceState::Unpausing
        | SourceState::Blackout
        | SourceState::Committing
        | SourceState::Committed => "blackout",
        SourceState::Brownout => "target brownout",
        SourceState::Releasing | SourceState::Over => "release",
    }
}
