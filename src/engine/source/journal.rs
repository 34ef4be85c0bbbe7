//! What a session leaves behind for a process that is to go on with it.
//!
//! The engine says what there is to be kept, and when; where it is kept is up to whoever
//! implements [`Journal`].

use crate::proto::message::{CommitRecord, SessionId};
use crate::proto::source::{SessionLimits, SourceSession};
use std::io;
use std::time::Duration;

/// Keeps what a session must not lose with its process. Each call returns when it is kept;
/// it is made on the session's thread, and the second one while the guest is being paused, so
/// that it takes none of the blackout that the pause does not take anyway.
pub trait Journal: Send + std::fmt::Debug {
    /// A connection of this link epoch is about to be made.
    fn dials(&mut self, epoch: u32) -> io::Result<()>;
    /// The destination is looked for at another address: this is its ticket now.
    fn redirected(&mut self, ticket: &str) -> io::Result<()>;
    /// The guest is told to pause: its state follows, and the destination may be in doubt
    /// from then on.
    fn guest_pauses(&mut self) -> io::Result<()>;
    /// The guest's first instruction at the destination has been heard of.
    fn guest_runs(&mut self) -> io::Result<()>;
    /// The destination has every page. What is left to do is to tell it that it may forget
    /// the source, and to hear its report.
    fn drained(&mut self) -> io::Result<()>;
}

/// How a session begins.
#[derive(Clone, Copy, Debug)]
pub enum Beginning {
    /// Anew.
    New(SessionId),
    /// As one that another process has left.
    Left(Left),
}

impl Beginning {
    /// How long ago the guest was heard to run at the destination, if it was.
    pub(super) fn ran_for(&self) -> Option<Duration> {
        match self {
            Self::New(_) => None,
            Self::Left(left) => left.runs_for,
        }
    }
}

/// What a process that has died left of its session.
#[derive(Clone, Copy, Debug)]
pub struct Left {
    /// The session.
    pub session: SessionId,
    /// The last link epoch in which it tried to connect.
    pub last_epoch: u32,
    /// Whether the guest is the destination's, by the commit word; if not, it is its VMM's.
    pub committed: bool,
    /// How long ago the guest's first instruction at the destination was heard of, if it was.
    pub runs_for: Option<Duration>,
    /// Whether the destination has said that it has every page.
    pub drained: bool,
    /// Whether it is its VMM's because an operator took it back after the commit.
    pub taken_back: bool,
}

impl Left {
    /// The machine that goes on with it.
    pub(super) fn machine(&self, pages: u64, limits: SessionLimits) -> SourceSession {
        let Self { session, last_epoch, committed, taken_back, .. } = *self;
        if taken_back {
            return SourceSession::recover_taken_back(session, last_epoch, limits, Duration::ZERO);
        }
        if !committed {
            return SourceSession::recover_aborted(session, last_epoch, limits, Duration::ZERO);
        }
        // A link that is lost before the commit ends the session, so there was one only.
        let record = CommitRecord { session, epoch: 0 };
        if self.drained {
            return SourceSession::recover_drained(
                record,
                last_epoch,
                pages,
                limits,
                Duration::ZERO,
            );
        }
        SourceSession::recover(record, last_epoch, pages, limits, Duration::ZERO)
    }
}
