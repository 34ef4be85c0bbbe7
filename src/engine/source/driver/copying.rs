//! The driver's part in copying memory before the guest runs at the destination.

use super::super::push::lock;
use super::super::said;
use super::{Driver, Input};
use crate::engine::lane::LaneError;
use crate::failpoint::failpoint;
use crate::proto::message::ToDestination;
use crate::proto::placed::{MESSAGE_PARTS_MAX, PlacedMessages, PlacedPages};
use crate::proto::source::{SourceEvent, SourceState};
use crate::proto::switchover::RoundSoFar;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// When the round began, and what had been copied by then.
#[derive(Debug, Default)]
pub(super) struct CopyingTimes {
    began: Duration,
    copied: u64,
    /// When its pages had landed.
    pub(super) landed: Option<Duration>,
}

impl Driver {
    /// All that is stale is unsent from now on, and the lanes go through it once.
    pub(super) fn start_round(&mut self) {
        failpoint!("source::before_round");
        self.take_written();
        let copied = self.shared.figures.copied.load(Ordering::Relaxed);
        self.copying = CopyingTimes { began: self.now(), copied, landed: None };
        self.push.round.begin();
        self.pinging = true;
        self.start_lanes();
        self.shared.push_wake.notify_waiters();
    }

    /// A lane has nothing to send: maybe none has.
    pub(super) fn lanes_idle(&mut self) {
        let copies =
            matches!(self.machine.state(), SourceState::Copying | SourceState::CopyingRest);
        if copies && self.push.has_copied() {
            let pages = self.shared.figures.copied.load(Ordering::Relaxed);
            self.machine.handle(self.now(), SourceEvent::RoundSent { pages });
        }
    }

    /// The VMM has told what was written.
    pub(super) fn looked(&mut self, now: Duration) {
        let (written, times) = (self.push.round.written(), &self.copying);
        let counts = self
            .shared
            .ledger
            .count_unwritten(|index| written.map_or(0, |written| written.look(index)));
        let round = RoundSoFar {
            sent: self.shared.figures.copied.load(Ordering::Relaxed) - times.copied,
            unsent: counts.unsent,
            written: counts.written,
            stale: self.shared.ledger.pages() - counts.sent,
            took: times.landed.unwrap_or(now).saturating_sub(times.began),
            rtt: lock(&self.push.pacer).base_rtt(),
        };
        self.machine.handle(now, SourceEvent::Looked(round));
    }

    /// Tells the destination which pages are there as they are here.
    pub(super) async fn send_valid(&mut self) {
        let valid = self.take_written();
        self.figures.valid = Some(valid.count());
        self.push.round.end();
        let Some(link) = &mut self.link else { return };
        let mut messages = PlacedMessages::new(valid.pages());
        while let Some(part) =
            messages.next(MESSAGE_PARTS_MAX, |first, bits: &mut [u64]| valid.fill(first, bits))
        {
            let message = ToDestination::Valid { part, last: messages.is_done() };
            if let Err(error) = said::say(&mut link.control, &message).await {
                let (epoch, error) = (link.epoch, LaneError::Link(error.to_string()));
                let _ = self.input.send(Input::LinkEnded { epoch, error });
                return;
            }
        }
    }

    /// What was written is stale, and unsent; returns the pages that are not.
    fn take_written(&mut self) -> PlacedPages {
        let (written, mut stray) = (self.push.round.written(), None);
        let mut take = |index| match written.map_or(Ok(0), |written| written.take(index)) {
            Ok(bits) => bits,
            Err(bits) => {
                stray = Some(bits);
                // The migration ends with this.
                0
            }
        };
        let valid = self.shared.ledger.keep_unwritten(&mut take);
        if let Some(stray) = stray {
            let event = SourceEvent::DirtyLogFailed(stray.to_string());
            self.machine.handle(self.now(), event);
        }
        valid
    }
}
