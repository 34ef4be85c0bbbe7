//! What whoever watches the source is told: phases, links, steps and progress, and the
//! spans of the log.

use super::{Driver, WATCH_EVERY};
use crate::engine::event::{Event, Phase, Progress};
use tracing::{Span, info_span};

impl Driver {
    /// The span of the phase that the session is in.
    pub(super) fn phase(&mut self) -> Span {
        let state = self.machine.state();
        if self.phase.as_ref().is_none_or(|(of, _)| *of != state) {
            self.phase = Some((state, info_span!("phase", ?state)));
        }
        self.phase.as_ref().map_or_else(Span::none, |(_, span)| span.clone())
    }

    pub(super) fn tell_watcher(&mut self) {
        let phase = Phase::from(self.machine.state());
        let epoch = self.link.as_ref().map(|link| link.epoch);
        self.watch.observe(phase, self.machine.timeline(), epoch);
        if self.now() >= self.next_watch {
            self.next_watch = self.now() + WATCH_EVERY;
            self.tell_progress();
        }
    }

    pub(super) fn tell_progress(&mut self) {
        self.watch.tell(Event::Progress(Progress {
            phase: Phase::from(self.machine.state()),
            settled: self.settled,
            pages: self.shared.ram.layout().pages(),
            network_faults: self.network_faults,
            wire_bytes: self.wire_bytes,
            elapsed: self.now(),
        }));
    }

    /// Notes when the link is lost after the commit, and when the next one stands.
    pub(super) fn note_pause(&mut self) {
        match (self.machine.paused(), self.figures.outages.open()) {
            (true, None) => {
                let why = self.watch.why_lost().to_owned();
                self.figures.outages.lost(&why);
                self.attempts = self.machine.attempts();
            }
            (true, Some(_)) => self.attempts = self.machine.attempts(),
            (false, Some(_)) if self.machine.linked() => {
                self.figures.outages.up(self.machine.epoch(), self.attempts);
            }
            (false, _) => {}
        }
    }
}
