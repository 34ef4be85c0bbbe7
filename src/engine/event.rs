//! [`Event`]: what whoever watches a migration is told, the same on both sides.
//!
//! Nothing here decides anything: the events are read off the session machine after
//! each of its steps.

use super::lost_pages::LostPages;
use crate::proto::destination::DestinationState;
use crate::proto::source::{Outcome, SourceState};
use crate::proto::timeline::{Stamp, Timeline};
use std::fmt;
use std::time::Duration;

/// Where a migration is, in the field's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Destination: nobody has come yet.
    Waiting,
    /// The two sides agree; the guest runs at the source.
    Handshake,
    /// The guest runs at the source, and its memory is being copied.
    SourceBrownout,
    /// The guest runs nowhere. The destination begins to count when the state arrives.
    Blackout,
    /// The guest runs at the destination, and pages are missing.
    TargetBrownout,
    /// The guest is committed and no link stands: both sides keep all that they have, and the
    /// source tries to connect again. At the destination the guest runs, as far as it has its
    /// pages, unless the commit is in doubt there.
    Paused,
    /// All pages are there, or the migration has failed: the two sides let go.
    Release,
}

impl Phase {
    /// Its name for people and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Handshake => "handshake",
            Self::SourceBrownout => "source brownout",
            Self::Blackout => "blackout",
            Self::TargetBrownout => "target brownout",
            Self::Paused => "paused",
            Self::Release => "release",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl From<SourceState> for Phase {
    fn from(state: SourceState) -> Self {
        match state {
            SourceState::Connecting | SourceState::Negotiating => Self::Handshake,
            SourceState::Copying => Self::SourceBrownout,
            SourceState::CopyingRest
            | SourceState::Pausing
            | SourceState::Unpausing
            | SourceState::Blackout
            | SourceState::Committing
            | SourceState::Committed
            | SourceState::TakingBack => Self::Blackout,
            SourceState::Brownout => Self::TargetBrownout,
            SourceState::Retracting | SourceState::Releasing | SourceState::Over => Self::Release,
        }
    }
}

impl From<DestinationState> for Phase {
    fn from(state: DestinationState) -> Self {
        match state {
            DestinationState::Waiting => Self::Waiting,
            DestinationState::Preparing | DestinationState::Agreed => Self::Handshake,
            DestinationState::Restoring
            | DestinationState::InDoubt
            | DestinationState::Starting => Self::Blackout,
            DestinationState::Running => Self::TargetBrownout,
            DestinationState::Full | DestinationState::Failed | DestinationState::Over => {
                Self::Release
            }
        }
    }
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// Pages that the destination has; at the source, as the destination said last.
    pub settled: u64,
    /// Pages of the guest.
    pub pages: u64,
    /// Network faults, in the same way.
    pub network_faults: u64,
    /// Bytes of pages that the destination has received, in the same way.
    pub wire_bytes: u64,
    /// Since the session began.
    pub elapsed: Duration,
    /// Set while it is paused.
    pub paused: Option<Pause>,
}

/// A committed guest without a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// For how long there has been none.
    pub lasts: Duration,
    /// How often this side has tried to connect again; the destination does not.
    pub attempts: u32,
}

/// Something happened. More kinds may come.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The migration is in this phase now.
    Phase(Phase),
    /// A link stands. The first one has epoch 0, each one that replaces a lost link the
    /// next number.
    LinkUp {
        /// Its epoch.
        epoch: u32,
    },
    /// The link is lost. While the guest is in its blackout or runs at the destination, the
    /// source makes a new one.
    LinkLost {
        /// Its epoch.
        epoch: u32,
        /// What ended it.
        why: String,
    },
    /// The link of a committed guest is lost: the migration is paused, and goes on by itself
    /// with the next [`Event::LinkUp`]. It ends when the patience of this side is over.
    Paused {
        /// What ended the link.
        why: String,
    },
    /// A step was made: [`Stamp::Captured`] when the guest is paused at the source,
    /// [`Stamp::Committed`] when it must never run there again, [`Stamp::Running`] when its
    /// first vCPU runs at the destination, and others.
    Step {
        /// Which.
        step: Stamp,
        /// When, since the session began on this side.
        at: Duration,
    },
    /// Pages of guest memory that the source could not read: at the destination, touching one
    /// is a memory error. Told of the first 64 runs of such pages; the report counts all.
    MemoryLost {
        /// The guest physical address of the first one.
        address: u64,
        /// How many there are from there on.
        pages: u64,
    },
    /// How far it is; some times a second.
    Progress(Progress),
    /// The session is over; nothing follows.
    Ended(Outcome),
}

/// Called with each event, on the thread that serves faults: it must return at once.
pub(super) type OnEvent = Box<dyn FnMut(Event) + Send>;

/// Sees what changed, and tells it.
#[derive(Default)]
pub(super) struct Watch {
    on_event: Option<OnEvent>,
    phase: Option<Phase>,
    epoch: Option<u32>,
    told: Timeline,
    why_lost: String,
    why_paused: String,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("watched", &self.on_event.is_some()).finish_non_exhaustive()
    }
}

impl Watch {
    /// Tells `on_event` from now on.
    pub(super) fn set(&mut self, on_event: OnEvent) {
        self.on_event = Some(on_event);
    }

    /// Tells an event.
    pub(super) fn tell(&mut self, event: Event) {
        if let Some(on_event) = &mut self.on_event {
            on_event(event);
        }
    }

    /// Tells which pages were found to be lost since this was called last.
    pub(super) fn lost(&mut self, lost: &LostPages) {
        for (address, pages) in lost.take_untold() {
            self.tell(Event::MemoryLost { address, pages });
        }
    }

    /// Why the link is about to be given up, for when that shows.
    pub(super) fn losing(&mut self, why: &impl ToString) {
        self.why_lost = why.to_string();
    }

    /// Why the link is, or was, about to be given up last.
    pub(super) fn why_lost(&self) -> &str {
        &self.why_lost
    }

    /// Tells what is new: the session is in `phase`, has made the steps of `timeline`, and
    /// has a link of `epoch`, if it has one.
    pub(super) fn observe(&mut self, phase: Phase, timeline: &Timeline, epoch: Option<u32>) {
        if self.on_event.is_none() {
            return;
        }
        if self.epoch != epoch {
            if let Some(epoch) = self.epoch {
                let why = std::mem::take(&mut self.why_lost);
                self.why_paused.clone_from(&why);
                self.tell(Event::LinkLost { epoch, why });
            }
            if let Some(epoch) = epoch {
                // Why an attempt before it came to nothing is no reason of its end.
                self.why_lost.clear();
                self.tell(Event::LinkUp { epoch });
            }
            self.epoch = epoch;
        }
        for (step, at) in timeline.steps() {
            if self.told.at(step).is_none() {
                self.told.stamp(step, at);
                self.tell(Event::Step { step, at });
            }
        }
        if self.phase != Some(phase) {
            self.phase = Some(phase);
            self.tell(Event::Phase(phase));
            if phase == Phase::Paused {
                let why = std::mem::take(&mut self.why_paused);
                self.tell(Event::Paused { why });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn each_change_is_told_once_and_a_link_that_replaces_another_loses_it_first() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let mut watch = Watch::default();
        let into = told.clone();
        watch.set(Box::new(move |event| into.lock().unwrap().push(event)));
        let mut timeline = Timeline::default();
        let at = Duration::from_millis(3);
        timeline.stamp(Stamp::Agreed, at);
        for _ in 0..2 {
            watch.observe(Phase::Handshake, &timeline, Some(0));
        }
        watch.losing(&"timed out");
        watch.observe(Phase::Handshake, &timeline, Some(1));
        watch.observe(Phase::Blackout, &timeline, None);
        watch.losing(&"an attempt that came to nothing");
        watch.observe(Phase::Blackout, &timeline, Some(2));
        watch.observe(Phase::Blackout, &timeline, None);
        let expected = [
            Event::LinkUp { epoch: 0 },
            Event::Step { step: Stamp::Agreed, at },
            Event::Phase(Phase::Handshake),
            Event::LinkLost { epoch: 0, why: "timed out".into() },
            Event::LinkUp { epoch: 1 },
            Event::LinkLost { epoch: 1, why: String::new() },
            Event::Phase(Phase::Blackout),
            Event::LinkUp { epoch: 2 },
            Event::LinkLost { epoch: 2, why: String::new() },
        ];
        assert_eq!(*told.lock().unwrap(), expected);
    }
}
