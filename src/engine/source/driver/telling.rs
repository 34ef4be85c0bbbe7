//! What whoever watches the source is told: phases, links, steps and progress, and the
//! spans of the log.

use super::{Driver, WATCH_EVERY};
use crate::engine::event::{Event, Pause, Phase, Progress};
use crate::proto::source::SourceState;
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
        let phase = self.public_phase();
        let epoch = self.link.as_ref().map(|link| link.epoch);
        self.watch.observe(phase, self.machine.timeline(), epoch);
        self.watch.lost(&self.shared.lost);
        if self.now() >= self.next_watch {
            self.next_watch = self.now() + WATCH_EVERY;
            self.tell_progress();
        }
    }

    pub(super) fn tell_progress(&mut self) {
        self.watch.tell(Event::Progress(Progress {
            phase: self.public_phase(),
            settled: self.settled,
            pages: self.shared.ram.layout().pages(),
            network_faults: self.network_faults,
            wire_bytes: self.wire_bytes,
            elapsed: self.now(),
            paused: self.figures.outages.open().map(|(since, _)| Pause {
                lasts: since.elapsed(),
                attempts: self.machine.attempts(),
            }),
        }));
    }

    /// Where the migration is, for whoever watches.
    pub(super) fn public_phase(&self) -> Phase {
        match self.machine.state() {
            _ if self.machine.paused() => Phase::Paused,
            // It has come back to a guest that was committed: the blackout is long over.
            SourceState::Committed if self.machine.epoch() > 0 => Phase::TargetBrownout,
            state => Phase::from(state),
        }
    }

    /// Notes when the link is lost after the commit, and when the next one stands.
    pub(super) fn note_pause(&mut self) {
        match (self.machine.paused(), self.figures.outages.open()) {
            (true, None) => {
                let mut why = self.watch.why_lost().to_owned();
                if why.is_empty() && self.figures.resumed {
                    why = "another process served the guest before".into();
                }
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
