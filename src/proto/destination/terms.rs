//! The destination session's vocabulary: its states, events and actions.

use crate::proto::message::{Hello, Mismatch, ToDestination, ToSource};
use crate::proto::placed::PlacedPages;
use crate::proto::source::Outcome;
use std::time::Duration;

/// Where the session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DestinationState {
    /// No proposal yet.
    Waiting,
    /// The guest's shell is being made.
    Preparing,
    /// Faults can be served; waiting for the state.
    Agreed,
    /// The state is being restored.
    Restoring,
    /// Ready to run; whether the source committed is not known.
    InDoubt,
    /// Committed; the vCPUs are being started.
    Starting,
    /// The guest runs; pages are missing.
    Running,
    /// No page is missing; waiting for the source to know it.
    Full,
    /// The guest cannot go on here; waiting for the source, to tell it.
    Failed,
    /// The end.
    Over,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum DestinationEvent {
    /// The link was lost, or the source broke the protocol on it (it is closed then).
    LinkLost(String),
    /// The source said something.
    Message(ToDestination),
    /// The guest's shell stands.
    Prepared,
    /// The guest of the proposal cannot be made here.
    Refused(Mismatch),
    /// The state is restored.
    Restored,
    /// The state cannot be restored.
    RestoreFailed(String),
    /// The first vCPU entered the guest, at this time.
    Entered(Duration),
    /// The guest cannot go on here: its vCPUs cannot be started, or its faults can no
    /// longer be served.
    GuestFailed(String),
    /// All pages that `AwaitCopied` waits for are here.
    Landed {
        /// Its number.
        pages: u64,
    },
    /// The ledger says that no page is missing.
    LedgerFull {
        /// Pages settled.
        settled: u64,
    },
    /// The figures for the report are complete.
    ReportReady(Vec<u8>),
    /// The user wants no migration.
    Cancel(String),
    /// The operator ends the session, whatever becomes of the guest.
    GiveUp(String),
    /// The time that `timeout` named has come.
    Timer,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationAction {
    /// Make memory, VM, vCPUs and traps for this proposal, or refuse it.
    Prepare(Box<Hello>),
    /// Send a control message.
    Say(ToSource),
    /// Take in pages and send requests of this epoch from now on.
    OpenLanes {
        /// The epoch.
        epoch: u32,
    },
    /// Close the connection: the peer broke the protocol on it.
    DropLink(String),
    /// Wait until so many pages have come before the machine state.
    AwaitCopied {
        /// Pages, those counted again that came again.
        pages: u64,
    },
    /// These pages, which came before the machine state, are valid; all others are missing.
    TakeValid(PlacedPages),
    /// Restore this machine state; faults are served meanwhile.
    Restore(Vec<u8>),
    /// Let the vCPUs run.
    RunGuest,
    /// The guest is this side's, and stays as it is: its user had it paused.
    KeepPaused,
    /// Send the set of settled pages as `Placed` messages, then ask again for the
    /// pages whose requests were lost.
    SendPlaced,
    /// No page is missing: stop trapping.
    Unregister,
    /// Collect the figures for the report.
    MakeReport,
    /// Nothing of the guest may stay here.
    DropGuest,
    /// The session is over; nothing follows.
    Finish(Outcome),
}

impl DestinationAction {
    /// Its name, for logs: some carry megabytes.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Prepare(_) => "Prepare",
            Self::Say(_) => "Say",
            Self::OpenLanes { .. } => "OpenLanes",
            Self::DropLink(_) => "DropLink",
            Self::AwaitCopied { .. } => "AwaitCopied",
            Self::TakeValid(_) => "TakeValid",
            Self::Restore(_) => "Restore",
            Self::RunGuest => "RunGuest",
            Self::KeepPaused => "KeepPaused",
            Self::SendPlaced => "SendPlaced",
            Self::Unregister => "Unregister",
            Self::MakeReport => "MakeReport",
            Self::DropGuest => "DropGuest",
            Self::Finish(_) => "Finish",
        }
    }
}
