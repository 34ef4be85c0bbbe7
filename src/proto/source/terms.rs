//! The source session's vocabulary: its limits, states, events, actions and outcome.

use crate::proto::message::{ToDestination, ToSource};
use crate::proto::placed::PlacedPages;
use crate::proto::switchover::RoundSoFar;
use std::time::Duration;

/// What the handshake's limit is longer by for each GiB of guest memory, which the destination
/// reserves meanwhile: several times what that takes.
pub const RESERVING_PER_GIB: Duration = Duration::from_secs(1);

/// Time limits of a session.
#[derive(Clone, Copy, Debug)]
pub struct SessionLimits {
    /// From the start until both sides agree, beside [`RESERVING_PER_GIB`]; and for how long a source that aborts stays
    /// to tell a destination that may be in doubt.
    pub handshake: Duration,
    /// From the state's departure until the destination is ready, or, there, from
    /// the agreement until the state arrives; and for the VMM to come back from a pause that
    /// is called off, or from the commit.
    pub restore: Duration,
    /// The patience: how long a side without a link stays paused, or in doubt, with all it
    /// has of a committed guest before it gives up.
    pub recovery: Duration,
    /// The longest time between the beginnings of two attempts to connect again, if the first
    /// fails before.
    pub backoff_max: Duration,
}

impl SessionLimits {
    /// From the proposal of a guest with so much memory until both sides agree.
    pub(crate) fn agreement(&self, memory_bytes: u64) -> Duration {
        let gib = u32::try_from(memory_bytes >> 30).unwrap_or(u32::MAX);
        self.handshake.saturating_add(RESERVING_PER_GIB.saturating_mul(gib))
    }
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            restore: Duration::from_secs(30),
            recovery: Duration::from_secs(600),
            backoff_max: Duration::from_millis(300),
        }
    }
}

/// Where the session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// Waiting for the first connection.
    Connecting,
    /// Proposed; waiting for the answer.
    Negotiating,
    /// The guest runs here, and its memory is copied, round by round.
    Copying,
    /// The VMM is pausing the guest and taking its state.
    Pausing,
    /// As before, but the migration is off: the guest is resumed once it is paused.
    Unpausing,
    /// The guest is paused, and what is left of its memory is copied.
    CopyingRest,
    /// The state is on its way; the guest runs nowhere.
    Blackout,
    /// The destination is ready and the commit word is being written.
    Committing,
    /// The commit is made; the destination has not yet said that the guest runs.
    Committed,
    /// As before, without a link, but an operator takes the guest back: the commit is being
    /// undone.
    TakingBack,
    /// The guest runs at the destination.
    Brownout,
    /// All pages are there; waiting for the destination's report.
    Releasing,
    /// The guest is resumed here; the destination, which has its state, is to know.
    Retracting,
    /// The end.
    Over,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum SourceEvent {
    /// The connection that `Connect` asked for stands.
    LinkUp,
    /// The connection failed, or could not be made.
    LinkLost(String),
    /// The destination said something.
    Message(ToSource),
    /// The destination broke the protocol.
    Violation(String),
    /// The guest is paused and its state captured.
    Paused,
    /// The guest could not be paused, or its VMM is gone; if there is one, it runs on.
    PauseFailed(String),
    /// The VMM remembers from now on what the guest writes.
    DirtyLogStarted,
    /// It cannot, or what it remembered is lost; the guest runs on.
    DirtyLogFailed(String),
    /// The round's pages were handed to the links, or as many as there were when it was cut
    /// short; with those of all rounds before, so many were.
    RoundSent {
        /// Pages.
        pages: u64,
    },
    /// Answer to `LookAtRound`.
    Looked(RoundSoFar),
    /// The state was handed to the link.
    StateSent,
    /// The commit word is written (`true`), or the VMM had aborted before (`false`).
    CommitWord(bool),
    /// The commit could not be recorded, and will not be: the guest is still this side's.
    CommitFailed(String),
    /// The user wants no migration.
    Cancel(String),
    /// The operator has another address of the destination.
    Redirected,
    /// The operator wants the guest to move now, whatever of it has been copied.
    Switch,
    /// The operator ends the session, whatever becomes of the guest.
    GiveUp(String),
    /// The operator says that the guest does not run at the destination and never will.
    TakeBack,
    /// The commit is undone: the guest is this side's.
    TakenBack,
    /// The commit stands: its VMM is gone, say.
    TakeBackFailed(String),
    /// The time that `timeout` named has come.
    Timer,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Connect, for this link epoch, not before the pause is over. Whoever keeps the
    /// session across a restart stores the epoch first.
    Connect {
        /// The epoch to be.
        epoch: u32,
        /// How long to wait before.
        after: Duration,
        /// How long the other side may leave the attempt without any answer. What was sent
        /// into a link that is down is sent again later and later, so a new attempt finds the
        /// link's return sooner than an old one.
        answer_within: Duration,
    },
    /// Close the connection: the peer broke the protocol on it.
    DropLink(String),
    /// Send a control message.
    Say(ToDestination),
    /// Answer page requests of this epoch from now on.
    OpenLanes {
        /// The epoch.
        epoch: u32,
    },
    /// Have the VMM remember which pages the guest writes.
    StartDirtyLog,
    /// Copy all pages that are not at the destination as they are here, once. After a pause
    /// the VMM's last word of what was written comes before.
    StartRound,
    /// Ask the VMM what was written since the round began.
    LookAtRound,
    /// Send no more pages of the round.
    CutRound,
    /// Say which pages are at the destination as they are here; all others are unsent.
    SendValid,
    /// Pause the guest and capture its state.
    PauseGuest,
    /// Send the captured state, and the seeds.
    SendState,
    /// Write the commit word: the point of no return.
    WriteCommitWord,
    /// Make no connection any more, and undo the commit, if it can be.
    TakeBackGuest,
    /// The operator has given the guest up: who holds its memory here may let go.
    DiscardMemory,
    /// The claims made so far are void and the guest runs on here.
    ResumeGuest,
    /// The destination holds these pages; all others are unsent again.
    ResumeLedger(PlacedPages),
    /// Push pages from now on.
    StartPush,
    /// The guest runs elsewhere: its VMM may go. The memory is still needed here.
    ReleaseGuest,
    /// All memory is elsewhere, too: whoever holds it here may let go. Whoever keeps the
    /// session across a restart notes that nothing is left to recover.
    ReleaseMemory,
    /// The session is over; nothing follows.
    Finish(Outcome),
}

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs at the destination with all its memory.
    Completed,
    /// Nothing was moved, or an operator took the guest back: it is whole at the source.
    Aborted(String),
    /// The link never came back after the commit, or the guest cannot go on at the
    /// destination: its memory is still held at the source, and what the destination had
    /// of it there. Or an operator gave the guest up.
    Lost(String),
}

/// The name of a message, for errors.
pub(super) fn name_of(message: &ToSource) -> &'static str {
    match message {
        ToSource::Accept { .. } => "Accept",
        ToSource::Refuse(_) => "Refuse",
        ToSource::Ready => "Ready",
        ToSource::Running { .. } => "Running",
        ToSource::Placed { .. } => "Placed",
        ToSource::Progress { .. } => "Progress",
        ToSource::WorkloadEnded => "WorkloadEnded",
        ToSource::Drained { .. } => "Drained",
        ToSource::Report(_) => "Report",
        ToSource::Abort { .. } => "Abort",
        ToSource::Pong(_) => "Pong",
        ToSource::Lost { .. } => "Lost",
        ToSource::Landed { .. } => "Landed",
    }
}
