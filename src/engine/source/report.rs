//! The whole report, put together at the source.

use super::SourceConfig;
use super::serve::SourceShared;
use crate::engine::outage::Outages;
use crate::engine::process_figures::{cpu_us, peak_rss_bytes};
use crate::engine::vm::Captured;
use crate::proto::compression::{Compression, Switch};
use crate::proto::pacing::Pacer;
use crate::proto::page::PAGE_SIZE;
use crate::proto::source::{Outcome, SourceSession};
use crate::proto::switchover::{self, Planner, RoundEnd};
use crate::proto::timeline::Stamp;
use crate::report::merge::{DestinationPart, Heading, SourcePart};
use crate::report::schema::{self, Guest, Link, Mode, Pages, Report, Round, Switchover};
use quinn::Connection;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tracing::warn;

/// Facts that are gone once they were used.
#[derive(Debug, Default)]
pub struct Observed {
    /// Bytes of machine state sent.
    pub switchover_bytes: u64,
    /// Pages sent again in a later link epoch.
    pub resent: u64,
    /// Losses of the link.
    pub outages: Outages,
    /// Another process began the session: what happened before this one is not known.
    pub resumed: bool,
    /// Pages that were valid at the destination before the guest was.
    pub valid: Option<u64>,
    mtu: Option<u16>,
}

impl Observed {
    /// Nothing yet.
    pub fn of(resumed: bool) -> Self {
        Self { resumed, ..Self::default() }
    }

    /// A connection is given up: what it knew of the path goes with it.
    pub fn unlinked(&mut self, connection: &Connection) {
        self.mtu = Some(connection.stats().path.current_mtu);
    }
}

/// Where the figures are.
pub struct Facts<'a> {
    /// What was asked for.
    pub config: &'a SourceConfig,
    /// When what happened, and the destination's part.
    pub machine: &'a SourceSession,
    /// Counters and the ledger.
    pub shared: &'a SourceShared,
    /// The link as measured.
    pub pacer: &'a Pacer,
    /// What was compressed, and why.
    pub compression: &'a Compression,
    /// The pause.
    pub captured: Option<&'a Captured>,
    /// See [`Observed`].
    pub observed: &'a Observed,
    /// How it ended.
    pub outcome: &'a Outcome,
    /// Why the guest of an aborted migration does not run on, if it does not.
    pub stranded: Option<&'a str>,
}

/// The report of the whole migration.
pub fn report(facts: &Facts<'_>) -> Report {
    let destination = facts.machine.destination_report().and_then(|json| {
        DestinationPart::from_json(json)
            .inspect_err(|error| warn!(%error, "no report from the destination"))
            .ok()
    });
    Report::merge(heading(facts), source_part(facts), destination)
}

fn heading(facts: &Facts<'_>) -> Heading {
    let (outcome, reason) = match facts.outcome {
        Outcome::Completed if facts.observed.outages.ended() > 0 || facts.observed.resumed => {
            (schema::Outcome::Recovered, None)
        }
        Outcome::Completed => (schema::Outcome::Completed, None),
        Outcome::Aborted(why) => {
            let stranded =
                facts.stranded.map(|also| format!("; the guest does not run on: {also}"));
            (schema::Outcome::Aborted, Some(why.clone() + &stranded.unwrap_or_default()))
        }
        Outcome::Lost(why) => (schema::Outcome::Lost, Some(why.clone())),
    };
    let config = facts.config;
    let layout = facts.shared.ram.layout();
    Heading {
        outcome,
        reason,
        mode: mode(facts),
        switchover: facts.machine.planner().map(|planner| switchover(planner, facts)),
        policy: Some(config.policy.name().into()),
        guest: Guest {
            kind: config.guest_kind.clone(),
            memory_bytes: layout.bytes(),
            page_size: PAGE_SIZE as u64,
            vcpus: u32::from(config.vcpus),
            backing: "memfd".into(),
            workload: config.workload.clone(),
            was_paused: facts.captured.map(|captured| captured.was_paused),
        },
        link: Link {
            encrypted: true,
            push_lanes: Some(config.ticket.push_lanes() as u32),
            rtt_us: Some(facts.pacer.base_rtt().as_micros() as u64),
            mtu: facts.observed.mtu.map(u64::from),
            bandwidth_limit_bps: None,
            epochs: Some(facts.observed.outages.ended() + 1),
        },
    }
}

/// How the guest was moved; one that went on with another's session knows what was asked for.
fn mode(facts: &Facts<'_>) -> Mode {
    let asked = facts.config.switchover.mode;
    match facts.machine.planner().map_or(asked, Planner::moved) {
        switchover::Mode::PostCopy => Mode::PostCopy,
        switchover::Mode::PreCopy => Mode::PreCopy,
        switchover::Mode::Hybrid | switchover::Mode::Auto => Mode::Hybrid,
        switchover::Mode::StopAndCopy => Mode::StopAndCopy,
    }
}

fn switchover(planner: &Planner, facts: &Facts<'_>) -> Switchover {
    let (config, micros) = (planner.config(), |time: Duration| time.as_micros() as u64);
    let rounds = planner.rounds().iter().map(|RoundEnd { round, why }| Round {
        sent: round.sent,
        stale: round.stale,
        took_us: micros(round.took),
        why: why.clone(),
    });
    Switchover {
        asked: config.mode.to_string(),
        max_downtime_us: micros(config.max_downtime),
        max_total_us: config.max_total.map(micros),
        rounds: rounds.collect(),
        copied: facts.shared.figures.copied.load(Ordering::Relaxed),
    }
}

fn source_part(facts: &Facts<'_>) -> SourcePart {
    if facts.observed.resumed {
        // The counters of this process are those of a part of the session. Which pages came
        // from where is then the destination's to say.
        return SourcePart {
            pages: Pages { total: Some(facts.shared.ram.layout().pages()), ..Pages::default() },
            outages: facts.observed.outages.of_source(),
            peak_rss_bytes: peak_rss_bytes(),
            ..SourcePart::default()
        };
    }
    let timeline = facts.machine.timeline();
    let micros = |from, to| Some(timeline.between(from, to)?.as_micros() as u64);
    let get = |counter: &AtomicU64| Some(counter.load(Ordering::Relaxed));
    let counts = facts.shared.ledger.counts();
    let figures = &facts.shared.figures;
    let served = figures.served.lock().unwrap_or_else(PoisonError::into_inner);
    SourcePart {
        handshake_us: micros(Stamp::Begin, Stamp::Agreed),
        source_brownout_us: micros(Stamp::Agreed, Stamp::PauseAsked),
        pause_us: facts.captured.map(|captured| captured.pause.as_micros() as u64),
        capture_us: facts.captured.map(|captured| captured.capture.as_micros() as u64),
        until_running_heard_us: micros(Stamp::PauseAsked, Stamp::Running),
        switchover_bytes: Some(facts.observed.switchover_bytes),
        total_us: micros(Stamp::Begin, Stamp::Drained),
        pages: Pages {
            total: Some(facts.shared.ram.layout().pages()),
            zero: get(&figures.zero),
            hole: get(&figures.hole),
            poisoned: get(&figures.poisoned),
            seeded: get(&figures.seeded),
            demanded: get(&figures.demanded),
            pushed: get(&figures.pushed),
            drained: get(&figures.drained),
            precopied: facts.observed.valid,
            resent_after_link_loss: Some(facts.observed.resent),
            sent_twice: Some(counts.sent_twice),
            placed_twice: None,
        },
        outages: facts.observed.outages.of_source(),
        serve_ns: Some(served.summary()),
        compression: compression(facts.compression),
        cpu_us: cpu_us(),
        peak_rss_bytes: peak_rss_bytes(),
        ..SourcePart::default()
    }
}

fn compression(of: &Compression) -> Option<schema::Compression> {
    let figures = of.figures()?;
    let switch = |switch: &Switch| schema::CompressionSwitch {
        at_us: switch.at.as_micros() as u64,
        on: switch.on,
        why: switch.why.text().into(),
        shrunk_to_percent: switch.ratio.map(|ratio| (ratio * 100.0).round() as u64),
        page_cpu_ns: switch.cost_ns.map(|cost| (cost * PAGE_SIZE as f64).round() as u64),
        link_bytes_per_second: switch.speed.map(|speed| speed as u64),
    };
    Some(schema::Compression {
        mode: of.mode().name().into(),
        pages: figures.page_bytes / PAGE_SIZE as u64,
        frames: figures.frames,
        bytes_before: figures.page_bytes,
        bytes_after: figures.sent_bytes,
        unshrunk_frames: figures.unshrunk,
        cpu_us: figures.took.as_micros() as u64,
        probes: figures.probes,
        probes_cpu_us: figures.probes_took.as_micros() as u64,
        why: of.why().map(|why| why.text().into()),
        switched: figures.switched,
        switches: figures.switches.iter().map(switch).collect(),
    })
}
