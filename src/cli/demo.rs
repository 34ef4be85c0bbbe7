//! `postcopy demo`: the whole life of a migration on one machine, verified.

use super::cut::{self, Cut, Made};
use super::guest_args::GuestArgs;
use anyhow::anyhow;
use clap::Args;
use postcopy::fault_server::arguments::{PolicyArgs, SwitchoverArgs};
use postcopy::program::exit::{both, write_report};
use postcopy::program::output;
use postcopy::program::units::{parse_rate, parse_share, parse_time};
use postcopy::report::human::render;
use postcopy::transport::relay::Relay;
use postcopy::trial::{self, Limit, LinkShape, Migrating, Trial, Voice};
use postcopy::uffd::DestinationBacking;
use std::path::PathBuf;
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
    #[command(flatten)]
    switchover: SwitchoverArgs,
    /// What the guest's memory is made of at the destination.
    #[arg(long, value_enum, default_value = "memfd-continue")]
    backing: DestinationBacking,
    /// Make huge pages of it there in the end; the guest runs on until that is done.
    #[arg(long)]
    huge_pages: bool,
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
        let prepared = self.trial().prepare(Limit::default())?;
        self.say(&prepared.guest_line);
        self.say(&format!("destination waits as process {}", prepared.destination_id()));
        let mut migrating = prepared.migrate()?;
        self.say(&format!("fault server runs as process {}", migrating.source_id()));
        let cuts = match migrating.relay().filter(|_| !self.cut.is_empty()) {
            Some(relay) => Some(self.cuts(&mut migrating, relay)?),
            None => None,
        };
        let report = migrating.finish()?;
        self.say(&render(&report));
        if let Some(cuts) = cuts {
            let made = cuts.join().map_err(|_| anyhow!("the cuts ended badly"))??;
            self.say(&cut::render(&made, &report, self.bandwidth));
        }
        let session = trial::check(&report, true).map_err(Into::into);
        both("postcopy", session, write_report(&report, self.report.as_deref()))
    }

    fn trial(&self) -> Trial {
        Trial {
            guest: self.guest.to_arguments(self.guest.kind()),
            policy: [self.policy.to_arguments(), self.switchover.to_arguments()].concat(),
            destination: self.guest.workload.destination_arguments(),
            backing: self.backing,
            huge_pages: self.huge_pages,
            push_lanes: self.push_lanes,
            link: LinkShape { bandwidth_bps: self.bandwidth, rtt: self.rtt, loss: self.loss },
            relayed: !self.cut.is_empty(),
            seed: self.guest.seed,
            patience: self.patience,
            run_before: self.run_before,
            run_after: self.run_after,
            verify: true,
            voice: if self.quiet { Voice::Quiet } else { Voice::Aloud },
        }
    }

    fn say(&self, line: &str) {
        if !self.quiet {
            output::out(line.trim_end());
        }
    }

    /// Has the link cut, from when the guest's VMM says that the guest has left it.
    fn cuts(
        &self,
        migrating: &mut Migrating,
        relay: Arc<Relay>,
    ) -> anyhow::Result<JoinHandle<anyhow::Result<Vec<Made>>>> {
        let lines = migrating.guest_lines().ok_or_else(|| anyhow!("the guest says nothing"))?;
        let cuts = self.cut.clone();
        let make = move || {
            // Nothing, if the guest never leaves: its process ends with the demonstration.
            match lines.recv() {
                Err(_) => Ok(Vec::new()),
                Ok(_) => cut::make(&relay, &cuts),
            }
        };
        Ok(std::thread::Builder::new().name("cuts".into()).spawn(make)?)
    }
}
