//! The timeline: when each step of a migration happened, on one side's clock.

use std::time::Duration;

/// A step of a migration. Each is stamped once, by the session machine of its side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Stamp {
    /// Either side: the session began.
    Begin,
    /// Either side: both agreed on the proposal.
    Agreed,
    /// Source: the VMM was asked to pause the vCPUs; the blackout begins.
    PauseAsked,
    /// Source: every vCPU is paused and its state is captured.
    Captured,
    /// Source: the state was handed to the link.
    StateSent,
    /// Destination: the state arrived.
    StateReceived,
    /// Destination: the state is restored.
    Restored,
    /// Source: the destination is ready for the commit.
    ReadySeen,
    /// Either side: the commit was made (source) or arrived (destination).
    Committed,
    /// Destination: the first vCPU entered the guest. Source: it was told so.
    Running,
    /// Either side: the destination's ledger is full.
    Drained,
    /// Either side: the session is over.
    End,
}

const ALL: [Stamp; 12] = [
    Stamp::Begin,
    Stamp::Agreed,
    Stamp::PauseAsked,
    Stamp::Captured,
    Stamp::StateSent,
    Stamp::StateReceived,
    Stamp::Restored,
    Stamp::ReadySeen,
    Stamp::Committed,
    Stamp::Running,
    Stamp::Drained,
    Stamp::End,
];
const STAMPS: usize = ALL.len();

/// The stamps of one side, as time since the session began there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    at: [Option<Duration>; STAMPS],
}

impl Timeline {
    /// Stamps a step; a second stamp of the same step is ignored.
    pub fn stamp(&mut self, stamp: Stamp, now: Duration) {
        self.at[stamp as usize].get_or_insert(now);
    }

    /// When the step happened, if it did.
    pub fn at(&self, stamp: Stamp) -> Option<Duration> {
        self.at[stamp as usize]
    }

    /// The steps that were made, in the order in which they are listed.
    pub fn steps(&self) -> impl Iterator<Item = (Stamp, Duration)> {
        ALL.into_iter().filter_map(|stamp| Some((stamp, self.at(stamp)?)))
    }

    /// The time from one step to another; `None` unless both happened.
    pub fn between(&self, from: Stamp, to: Stamp) -> Option<Duration> {
        self.at(to)?.checked_sub(self.at(from)?)
    }
}
