//! What the destination knows of a migration, for the report.

use super::copied::CopiedPages;
use super::guest::RunFigures;
use super::install::Installer;
use super::push_in::PushGate;
use super::trap_loop::FaultCounts;
use crate::engine::outage::Outages;
use crate::engine::process_figures::{cpu_us, peak_rss_bytes};
use crate::proto::ledger::DestinationCounts;
use crate::proto::page::PageIndex;
use crate::proto::timeline::{Stamp, Timeline};
use crate::report::merge::DestinationPart;
use crate::report::schema::{Blocktime, FaultHops, GuestSteps, Pages, WireBytes};
use quinn::Connection;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Facts that are gone once they were used.
#[derive(Debug, Default)]
pub struct Facts {
    /// Losses of the link.
    pub outages: Outages,
    /// The guest's own figures.
    pub guest: Option<RunFigures>,
    counts: Option<DestinationCounts>,
    wire_in: u64,
    wire_out: u64,
}

impl Facts {
    /// The ledger's last word.
    pub fn drained(&mut self, counts: DestinationCounts) {
        self.counts = Some(counts);
    }

    /// A connection is given up: its byte counts go with it.
    pub fn unlinked(&mut self, connection: &Connection) {
        let stats = connection.stats();
        self.wire_in += stats.udp_rx.bytes;
        self.wire_out += stats.udp_tx.bytes;
    }
}

/// Where the figures are.
pub struct Sources<'a> {
    /// See [`Facts`].
    pub facts: &'a Facts,
    /// Faults by kind.
    pub faults: &'a FaultCounts,
    /// Pages by origin, latencies.
    pub installer: Option<&'a Installer>,
    /// When what happened.
    pub timeline: Option<&'a Timeline>,
    /// Push lanes.
    pub gate: &'a PushGate,
    /// The urgent connection, if it still stands.
    pub connection: Option<&'a Connection>,
}

/// The destination's part of the report.
pub fn part(sources: &Sources<'_>) -> DestinationPart {
    let Sources { facts, faults, installer, timeline, gate, connection } = sources;
    let micros = |from, to| Some(timeline.as_ref()?.between(from, to)?.as_micros() as u64);
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let run = facts.guest.as_ref();
    let book = installer.map(|installer| installer.book.figures());
    // A request that met its page on the way was no network fault after all.
    let late = book.as_ref().map_or(0, |book| book.late_answers);
    let urgent = connection.map(Connection::stats);
    let (urgent_in, urgent_out) =
        urgent.map_or((0, 0), |stats| (stats.udp_rx.bytes, stats.udp_tx.bytes));
    let [push_in, push_out] = gate.wire_bytes();
    DestinationPart {
        restore_us: micros(Stamp::StateReceived, Stamp::Restored),
        resume_us: micros(Stamp::Committed, Stamp::Running),
        target_brownout_us: micros(Stamp::Running, Stamp::Drained),
        pages: installer.map(|installer| pages(installer, facts)).unwrap_or_default(),
        pages_a_fault: installer.and_then(pages_a_fault),
        network_faults: Some(get(&faults.requests).saturating_sub(late)),
        late_hits: Some(get(&faults.waits) + late),
        unattributed_faults: Some(get(&faults.unattributed)),
        local_faults: Some(get(&faults.local)),
        fault_latency_ns: book.as_ref().map(|book| book.latency.summary()),
        fault_hops_ns: book.as_ref().map_or_else(FaultHops::default, |book| FaultHops {
            ask: Some(book.hops.ask.summary()),
            answer: Some(book.hops.answer.summary()),
            serve: None,
            place: Some(book.hops.place.summary()),
        }),
        blocktime_us: book.as_ref().map(|book| Blocktime {
            total: book.blocktime.iter().sum::<Duration>().as_micros() as u64,
            per_vcpu: book.blocktime.iter().map(|time| time.as_micros() as u64).collect(),
        }),
        guest_max_gap_us: run.and_then(|run| Some(run.guest.max_gap?.as_micros() as u64)),
        guest_stall_ns: run.and_then(|run| run.guest.stalls.clone()),
        guest_steps: GuestSteps {
            during_target_brownout: run.and_then(|run| run.steps_in_brownout),
            steady_per_second: run.and_then(|run| run.steady_per_second),
            us_to_90_percent: run.and_then(|run| Some(run.until_90_percent?.as_micros() as u64)),
        },
        epochs: Some(facts.outages.ended() + 1),
        outages: facts.outages.of_destination(),
        wire_bytes: WireBytes {
            to_destination: Some(facts.wire_in + urgent_in + push_in),
            to_source: Some(facts.wire_out + urgent_out + push_out),
        },
        cpu_us: cpu_us(),
        peak_rss_bytes: peak_rss_bytes(),
        verified: None,
    }
}

/// If that is more than one.
fn pages_a_fault(installer: &Installer) -> Option<u64> {
    let unit = installer.placer.unit_of(PageIndex::new(0)).count();
    (unit > 1).then_some(unit)
}

fn pages(installer: &Installer, facts: &Facts) -> Pages {
    let get = |counter: &AtomicU64| Some(counter.load(Ordering::Relaxed));
    let counts = facts.counts.unwrap_or_else(|| installer.ledger.counts());
    let arrivals = &installer.arrivals;
    Pages {
        total: Some(installer.ledger.pages()),
        zero: get(&arrivals.zero),
        hole: get(&arrivals.hole),
        poisoned: Some(installer.lost.pages()),
        seeded: get(&arrivals.seeded),
        demanded: get(&arrivals.demanded),
        pushed: get(&arrivals.pushed),
        drained: get(&arrivals.drained),
        precopied: installer.copied.as_ref().map(CopiedPages::valid),
        resent_after_link_loss: None,
        sent_twice: None,
        // A page that was there when it was placed, by the ledger's or by the kernel's count.
        placed_twice: Some(
            counts.placed_twice + counts.duplicates + arrivals.existed.load(Ordering::Relaxed),
        ),
    }
}
