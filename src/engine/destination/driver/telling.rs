//! What whoever watches the destination is told, and what the source is told of how far
//! it is.

use super::Driver;
use crate::engine::destination::copied::CopiedPages;
use crate::engine::destination::install::Installer;
use crate::engine::event::{Event, Pause, Phase, Progress};
use crate::proto::destination::DestinationState;
use crate::proto::message::ToSource;
use crate::proto::page::PAGE_SIZE;
use crate::proto::timeline::Timeline;
use std::sync::atomic::Ordering;
use tracing::{Span, info_span};

impl Driver {
    /// The span of the phase that the session is in.
    pub(super) fn phase(&mut self) -> Span {
        let state = self.state();
        if self.phase.as_ref().is_none_or(|(of, _)| *of != state) {
            self.phase = Some((state, info_span!("phase", ?state)));
        }
        self.phase.as_ref().map_or_else(Span::none, |(_, span)| span.clone())
    }

    pub(super) fn tell_watcher(&mut self) {
        let phase = self.public_phase();
        let nothing = Timeline::default();
        let (timeline, epoch) = match &self.machine {
            Some(machine) => (machine.timeline(), machine.epoch()),
            None => (&nothing, 0),
        };
        self.watch.observe(phase, timeline, self.link.is_some().then_some(epoch));
        if let Some(installer) = &self.installer {
            self.watch.lost(&installer.lost);
        }
    }

    /// Where the migration is, for whoever watches.
    fn public_phase(&self) -> Phase {
        match &self.machine {
            None => Phase::Waiting,
            // It has all its pages: nothing waits for the link but the farewell.
            Some(machine) if machine.paused() && machine.state() != DestinationState::Full => {
                Phase::Paused
            }
            Some(machine) => Phase::from(machine.state()),
        }
    }

    pub(super) fn tell_progress(&mut self) {
        let Some(installer) = &self.installer else { return };
        let demanded = installer.arrivals.demanded.load(Ordering::Relaxed) * PAGE_SIZE as u64;
        let progress = Progress {
            phase: self.public_phase(),
            settled: settled(installer),
            pages: installer.ledger.pages(),
            network_faults: self.faults.requests.load(Ordering::Relaxed),
            wire_bytes: self.gate.pushed_bytes.load(Ordering::Relaxed) + demanded,
            elapsed: self.now(),
            paused: self
                .facts
                .outages
                .open()
                .map(|(since, _)| Pause { lasts: since.elapsed(), attempts: 0 }),
        };
        self.watch.tell(Event::Progress(progress));
    }

    pub(super) async fn say_progress(&mut self) {
        let Some(installer) = &self.installer else { return };
        let settled = settled(installer);
        let network_faults = self.faults.requests.load(Ordering::Relaxed);
        let pushed_bytes = self.gate.pushed_bytes.load(Ordering::Relaxed);
        self.say(ToSource::Progress { settled, network_faults, pushed_bytes }).await;
    }

    pub(super) async fn tell_workload_end(&mut self) {
        let running = self.state() == Some(DestinationState::Running) && self.link.is_some();
        if self.workload_ended && running && !self.workload_end_told {
            self.workload_end_told = true;
            self.say(ToSource::WorkloadEnded).await;
        }
    }
}

/// Pages that are here for good, or, before the guest is, that have come.
fn settled(installer: &Installer) -> u64 {
    let pages = installer.ledger.pages();
    let coming = installer.copied.as_ref().and_then(CopiedPages::coming);
    coming.map_or_else(|| pages - installer.ledger.missing(), |come| come.min(pages))
}
