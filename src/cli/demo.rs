//! `postcopy demo`: the whole life of a migration on one machine, verified.

use super::cut::{self, Cut, Made};
use super::guest_args::GuestArgs;
use anyhow::{Context, anyhow};
use clap::Args;
use postcopy::fault_server::arguments::PolicyArgs;
use postcopy::program::exit::{Failure, both, write_report};
use postcopy::program::output;
use postcopy::program::units::{parse_rate, parse_share, parse_time};
use postcopy::report::human::render;
use postcopy::report::schema::Report;
use postcopy::transport::Ticket;
use postcopy::transport::relay::{self, Relay, RelayConfig};
use postcopy::uffd::DestinationBacking;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Starts a guest under load, a destination and a fault server as processes of their
/// own, migrates the guest over loopback, lets it run on, and compares every page.
#[derive(Debug, Args)]
pub struct Demo {
    #[command(flatten)]
    guest: GuestArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    /// What the guest's memory is made of at the destination.
    #[arg(long, value_enum, default_value = "memfd-continue")]
    backing: DestinationBacking,
    /// Push connections.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    push_lanes: u8,
    /// Bandwidth of an emulated link, for instance 1Gbit.
    #[arg(long, value_parser = parse_rate, value_name = "RATE")]
    bandwidth: Option<u64>,
    /// Round trip of an emulated link, for instance 1ms.
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    rtt: Option<Duration>,
    /// Packets that an emulated link loses, for instance 1%.
    #[arg(long, value_parser = parse_share, value_name = "SHARE")]
    loss: Option<f64>,
    /// Take the emulated link down AFTER the guest has left the source, and up again FOR
    /// later; several times if given several times, each counted from the same beginning.
    #[arg(long, value_name = "AFTER:FOR")]
    cut: Vec<Cut>,
    /// How long both sides wait for a link that was lost.
    #[arg(long, default_value = "10m", value_parser = parse_time, value_name = "TIME")]
    patience: Duration,
    /// How long the guest runs before it is migrated.
    #[arg(long, default_value = "500ms", value_parser = parse_time, value_name = "TIME")]
    run_before: Duration,
    /// How long it runs on after all its memory came.
    #[arg(long, default_value = "500ms", value_parser = parse_time, value_name = "TIME")]
    run_after: Duration,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Only errors.
    #[arg(long)]
    quiet: bool,
}

impl Demo {
    /// Runs the demonstration.
    pub fn run(self) -> anyhow::Result<()> {
        let folder = tempfile::Builder::new().prefix("postcopy-demo-").tempdir()?;
        let control = folder.path().join("control");
        let from_source = folder.path().join("source.json");
        let from_destination = folder.path().join("destination.json");

        let kind = self.guest.kind();
        let mut guest = Process::start("guest", |command| {
            command.arg("run").arg("--control").arg(&control);
            command.args(self.guest.to_arguments(kind));
        })?;
        self.say(&guest.line()?);

        let mut destination = Process::start("destination", |command| {
            command.arg("receive").arg("--quiet").arg("--report").arg(&from_destination);
            command.args(["--push-lanes", &self.push_lanes.to_string()]);
            command.args(["--backing", &self.backing.to_string()]);
            command.args(["--patience", &self.patience()]);
            let after = humantime::format_duration(self.run_after).to_string();
            command.args(["--verify-after", &after]);
        })?;
        let ticket: Ticket = destination.line()?.trim().parse()?;
        self.say(&format!("destination waits as process {}", destination.child.id()));
        let (ticket, relay) = self.relayed(ticket)?;

        std::thread::sleep(self.run_before);
        let mut source = Process::start("fault server", |command| {
            command.arg("migrate").arg("--control").arg(&control);
            command.args(["--ticket", "-"]).arg("--report").arg(&from_source);
            command.args(self.policy.to_arguments());
            command.args(["--patience", &self.patience()]);
            // All processes of a demonstration end with it; a keeper outlives its makers.
            command.arg("--no-keeper");
            if self.quiet {
                command.arg("--quiet");
            }
            command.stdin(Stdio::piped()).stdout(Stdio::null());
        })?;
        source.tell(&ticket.to_string())?;
        self.say(&format!("fault server runs as process {}", source.child.id()));
        let cuts = match relay.clone().filter(|_| !self.cut.is_empty()) {
            Some(relay) => Some(self.cuts(&mut guest, relay)?),
            None => None,
        };
        source.succeed()?;
        guest.succeed()?;
        destination.succeed()?;

        let mut report = read_report(&from_source)?;
        report.verified = read_report(&from_destination)?.verified;
        report.guest.backing = self.backing.to_string();
        report.link.bandwidth_limit_bps = self.bandwidth;
        self.say(&render(&report));
        if let Some(cuts) = cuts {
            let made = cuts.join().map_err(|_| anyhow!("the cuts ended badly"))??;
            self.say(&cut::render(&made, &report, self.bandwidth));
        }
        let mut wrong = report.check();
        if report.verified != Some(true) {
            wrong.insert(0, "the destination did not verify the guest".into());
        }
        let session = match wrong.is_empty() {
            true => Ok(()),
            false => Err(Failure::Wrong(wrong.join("; ")).into()),
        };
        both("postcopy", session, write_report(&report, self.report.as_deref()))
    }

    fn patience(&self) -> String {
        humantime::format_duration(self.patience).to_string()
    }

    fn say(&self, line: &str) {
        if !self.quiet {
            output::out(line.trim_end());
        }
    }

    /// Has the link cut, from when the guest's VMM says that the guest has left it.
    fn cuts(
        &self,
        guest: &mut Process,
        relay: Arc<Relay>,
    ) -> anyhow::Result<JoinHandle<anyhow::Result<Vec<Made>>>> {
        let mut lines = guest.lines.take().ok_or_else(|| anyhow!("the guest says nothing"))?;
        let cuts = self.cut.clone();
        let make = move || {
            // Nothing, if the guest never leaves: its process ends with the demonstration.
            match lines.read_line(&mut String::new())? {
                0 => Ok(Vec::new()),
                _ => cut::make(&relay, &cuts),
            }
        };
        Ok(std::thread::Builder::new().name("cuts".into()).spawn(make)?)
    }

    /// Puts an emulated link between the two sides, if one was asked for.
    fn relayed(&self, ticket: Ticket) -> anyhow::Result<(Ticket, Option<Arc<Relay>>)> {
        let emulated = self.bandwidth.is_some() || self.rtt.is_some() || self.loss.is_some();
        if !emulated && self.cut.is_empty() {
            return Ok((ticket, None));
        }
        let targets = relay::targets(IpAddr::V4(Ipv4Addr::LOCALHOST), &ticket);
        let config = RelayConfig {
            bandwidth_bps: self.bandwidth,
            rtt: self.rtt.unwrap_or_default(),
            loss: self.loss.unwrap_or_default(),
            seed: self.guest.seed,
            ..RelayConfig::default()
        };
        let relay = Relay::spawn(config, &targets).context("cannot make the emulated link")?;
        let ticket = relay.redirect(&ticket)?;
        Ok((ticket, Some(Arc::new(relay))))
    }
}

fn read_report(path: &Path) -> anyhow::Result<Report> {
    let text =
        std::fs::read(path).with_context(|| format!("there is no report at {}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

/// A child process that does not outlive this one.
struct Process {
    name: &'static str,
    child: Child,
    lines: Option<BufReader<ChildStdout>>,
}

impl Process {
    fn start(name: &'static str, arguments: impl FnOnce(&mut Command)) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--die-with-parent").stdin(Stdio::null()).stdout(Stdio::piped());
        arguments(&mut command);
        let mut child = command.spawn().with_context(|| format!("cannot start the {name}"))?;
        let lines = child.stdout.take().map(BufReader::new);
        Ok(Self { name, child, lines })
    }

    /// The next line that it prints.
    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        if let Some(lines) = &mut self.lines {
            lines.read_line(&mut line)?;
        }
        if line.is_empty() {
            let status = self.child.wait()?;
            return Err(Failure::of_child(status.code(), self.name));
        }
        Ok(line)
    }

    fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        if let Some(mut stdin) = self.child.stdin.take() {
            writeln!(stdin, "{line}")?;
        }
        Ok(())
    }

    fn succeed(&mut self) -> anyhow::Result<()> {
        let status = self.child.wait()?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::of_child(status.code(), self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already unless something failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
