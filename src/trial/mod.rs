//! A trial: one migration between child processes of this program, on this machine, verified.
//! `postcopy demo` shows one, `postcopy bench` makes many.
//!
//! A guest under load, a destination and a fault server are started as users would start them,
//! with an emulated link between the two sides if one is asked for. What a trial measured is the
//! source's report, which holds the destination's part.

mod link;
mod process;

pub use link::LinkShape;

use crate::program::exit::Failure;
use crate::report::schema::Report;
use crate::transport::Ticket;
use crate::transport::relay::{self, Relay, RelayConfig};
use crate::uffd::DestinationBacking;
use anyhow::Context;
use process::Process;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// What to migrate, and how.
#[derive(Clone, Debug)]
pub struct Trial {
    /// Arguments of `postcopy run` that describe the guest.
    pub guest: Vec<String>,
    /// Arguments of `postcopy migrate` on how pages are copied and pushed.
    pub policy: Vec<String>,
    /// Further arguments of `postcopy receive`.
    pub destination: Vec<OsString>,
    /// What the guest's memory is made of at the destination.
    pub backing: DestinationBacking,
    /// Whether the destination makes huge pages of it in the end; the guest runs until then.
    pub huge_pages: bool,
    /// Push connections.
    pub push_lanes: u8,
    /// The link between the two sides.
    pub link: LinkShape,
    /// Whether there is an emulated link even if it has no shape.
    pub relayed: bool,
    /// Decides which packets an emulated link loses.
    pub seed: u64,
    /// How long both sides wait for a lost link.
    pub patience: Duration,
    /// How long the guest runs before it is migrated.
    pub run_before: Duration,
    /// How long it runs on after all its memory came.
    pub run_after: Duration,
    /// Whether every page is compared in the end.
    pub verify: bool,
    /// Where the children speak.
    pub voice: Voice,
}

/// Where the children of a trial say what they have to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Voice {
    /// On this process's standard error, with a display of the migration's progress.
    Aloud,
    /// There, but only errors.
    Quiet,
    /// Nowhere: the end of what they say becomes the reason of a failure.
    Kept,
}

/// What no wait of a trial outlasts.
#[derive(Clone, Debug, Default)]
pub struct Limit {
    until: Option<(Instant, Duration)>,
    stop: Option<Arc<AtomicBool>>,
}

impl Limit {
    /// This long from now, and not after `stop` is set.
    pub fn new(time: Duration, stop: Arc<AtomicBool>) -> Self {
        Self { until: Some((Instant::now() + time, time)), stop: Some(stop) }
    }

    fn is_endless(&self) -> bool {
        self.until.is_none() && self.stop.is_none()
    }

    /// Sleeps for so long, unless the limit comes first.
    fn sleep(&self, time: Duration) -> anyhow::Result<()> {
        const LOOK_EVERY: Duration = Duration::from_millis(20);
        let until = Instant::now() + time;
        loop {
            self.check()?;
            match until.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return Ok(()),
                left => std::thread::sleep(left.min(LOOK_EVERY)),
            }
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        if self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::SeqCst)) {
            anyhow::bail!("interrupted");
        }
        match self.until {
            Some((until, time)) if Instant::now() >= until => {
                anyhow::bail!("it did not end within {}", humantime::format_duration(time))
            }
            _ => Ok(()),
        }
    }
}

/// A trial whose guest runs and whose destination waits.
pub struct Prepared {
    trial: Trial,
    limit: Limit,
    guest: Process,
    destination: Process,
    ticket: Ticket,
    relay: Option<Arc<Relay>>,
    folder: tempfile::TempDir,
    /// What the guest's process said of itself.
    pub guest_line: String,
}

/// A trial whose migration goes on.
pub struct Migrating {
    prepared: Prepared,
    source: Process,
}

impl Trial {
    /// Starts the guest and the destination.
    pub fn prepare(self, limit: Limit) -> anyhow::Result<Prepared> {
        let folder = tempfile::Builder::new().prefix("postcopy-trial-").tempdir()?;
        let at = |name: &str| folder.path().join(name);
        let complaints = |of: &str| (self.voice == Voice::Kept).then(|| at(of));
        let mut guest = Process::start("guest", complaints("guest.stderr"), |command| {
            command.arg("run").arg("--control").arg(at("control")).args(&self.guest);
        })?;
        let guest_line = guest.line(&limit)?;
        let mut destination =
            Process::start("destination", complaints("destination.stderr"), |command| {
                command.arg("receive").arg("--quiet");
                command.arg("--report").arg(at("destination.json"));
                command.args(["--push-lanes", &self.push_lanes.to_string()]);
                command.args(["--backing", &self.backing.to_string()]);
                command.args(["--patience", &written(self.patience)]);
                if self.huge_pages {
                    command.arg("--huge-pages");
                }
                if self.verify {
                    command.args(["--verify-after", &written(self.run_after)]);
                }
                command.args(&self.destination);
            })?;
        let ticket: Ticket = destination.line(&limit)?.trim().parse()?;
        let (ticket, relay) = self.relayed(ticket)?;
        Ok(Prepared { trial: self, limit, guest, destination, ticket, relay, folder, guest_line })
    }

    /// Puts an emulated link between the two sides, if one was asked for.
    fn relayed(&self, ticket: Ticket) -> anyhow::Result<(Ticket, Option<Arc<Relay>>)> {
        if self.link.is_loopback() && !self.relayed {
            return Ok((ticket, None));
        }
        let targets = relay::targets(IpAddr::V4(Ipv4Addr::LOCALHOST), &ticket);
        let config = RelayConfig {
            bandwidth_bps: self.link.bandwidth_bps,
            rtt: self.link.rtt.unwrap_or_default(),
            loss: self.link.loss.unwrap_or_default(),
            seed: self.seed,
            ..RelayConfig::default()
        };
        let relay = Relay::spawn(config, &targets).context("cannot make the emulated link")?;
        let ticket = relay.redirect(&ticket)?;
        Ok((ticket, Some(Arc::new(relay))))
    }
}

impl Prepared {
    /// The destination's process number.
    pub fn destination_id(&self) -> u32 {
        self.destination.id()
    }

    /// Lets the guest run for its time, and starts its migration.
    pub fn migrate(self) -> anyhow::Result<Migrating> {
        self.limit.sleep(self.trial.run_before)?;
        let at = |name: &str| self.folder.path().join(name);
        let kept = self.trial.voice == Voice::Kept;
        let complaints = kept.then(|| at("source.stderr"));
        let mut source = Process::start("fault server", complaints, |command| {
            command.arg("migrate").arg("--control").arg(at("control"));
            command.args(["--ticket", "-"]).arg("--report").arg(at("source.json"));
            command.args(&self.trial.policy);
            command.args(["--patience", &written(self.trial.patience)]);
            // All processes of a trial end with it; a keeper outlives its makers.
            command.arg("--no-keeper");
            if self.trial.voice != Voice::Aloud {
                command.arg("--quiet");
            }
            command.stdin(Stdio::piped()).stdout(Stdio::null());
        })?;
        source.tell(&self.ticket.to_string())?;
        Ok(Migrating { prepared: self, source })
    }
}

impl Migrating {
    /// The fault server's process number.
    pub fn source_id(&self) -> u32 {
        self.source.id()
    }

    /// The emulated link, if there is one.
    pub fn relay(&self) -> Option<Arc<Relay>> {
        self.prepared.relay.clone()
    }

    /// What the guest's VMM says from now on: a line when the guest has left it, then nothing.
    pub fn guest_lines(&mut self) -> Option<Receiver<String>> {
        self.prepared.guest.take_lines()
    }

    /// Waits until the guest has arrived and was compared, and returns the report.
    pub fn finish(mut self) -> anyhow::Result<Report> {
        let Prepared { trial, limit, guest, destination, folder, .. } = &mut self.prepared;
        let done = self.source.succeed(limit).and_then(|()| guest.succeed(limit));
        let done = done.and_then(|()| {
            if !trial.verify {
                // It would run the guest for ever.
                destination.interrupt()?;
            }
            destination.succeed(limit)
        });
        if let Err(error) = done {
            // The other side often knows more.
            return Err(match destination.complaint() {
                Some(said) if !format!("{error:#}").contains(&said) => {
                    error.context(format!("destination: {said}"))
                }
                _ => error,
            });
        }
        let mut report = read_report(&folder.path().join("source.json"))?;
        if trial.verify || trial.huge_pages {
            // What was found out when the session was over.
            let later = read_report(&folder.path().join("destination.json"))?;
            (report.verified, report.huge_pages) = (later.verified, later.huge_pages);
        }
        report.guest.backing = trial.backing.to_string();
        report.link.bandwidth_limit_bps = trial.link.bandwidth_bps;
        Ok(report)
    }
}

/// What is wrong with the report of a trial that was to be verified, or not.
pub fn check(report: &Report, verify: bool) -> Result<(), Failure> {
    let mut wrong = report.check();
    if verify && report.verified != Some(true) {
        wrong.insert(0, "the destination did not verify the guest".into());
    }
    if wrong.is_empty() { Ok(()) } else { Err(Failure::Wrong(wrong.join("; "))) }
}

fn written(time: Duration) -> String {
    humantime::format_duration(time).to_string()
}

fn read_report(path: &Path) -> anyhow::Result<Report> {
    let text = std::fs::read(path);
    let text = text.with_context(|| format!("there is no report at {}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}
