//! [`Server`]: the VMM's end of the attach protocol.
//!
//! One client at a time, on the caller's thread; a second one is refused while the
//! first is attached. Whatever a client does or fails to do, there are two ends
//! only: the commit word says committed and the guest never runs here again, or the
//! server has turned it to aborted and the guest runs on. What a guest is, and how
//! it is stopped, is behind [`AttachedVm`]; one client's conversation is in
//! `session`.

use super::commit_word::CommitWordError;
use super::handover::MemoryFiles;
use super::listener::{ListenError, PrivateListener};
use super::message::{GuestInfo, Paused, Reply, Status};
use super::session::{Attempt, Ending, Session, SessionError};
use super::socket::{Connection, SocketError, poll_timeout};
use crate::memory::dirty_bitmap::{DirtyBitmap, NO_DIRTY_LOG};
use crate::proto::layout::MemoryLayout;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// A guest as the attach server handles it.
pub trait AttachedVm {
    /// What a client is told about it. The same each time.
    fn describe(&self) -> Description;
    /// The memfds that its memory lies in: [`MemoryFiles::of`].
    fn memory(&self) -> MemoryFiles<'_>;
    /// Stops the vCPUs and captures their state. From [`Paused::frozen_at_ns`] on nothing
    /// writes to the guest's memory: no device, no thread, no later look at the guest.
    /// After an error the guest runs, as before: the implementation undoes what it did.
    fn pause_and_capture(&mut self) -> Result<Paused, String>;
    /// Lets the guest go on as it was before [`AttachedVm::pause_and_capture`].
    fn resume(&mut self) -> Result<(), String>;
    /// The guest has left for good: nothing of this process may run it or write to
    /// its memory again.
    fn released(&mut self);
    /// How it is.
    fn status(&mut self) -> Status;
    /// Has the guest clear its instruments; returns when it has done so. Not called
    /// while the guest is paused.
    fn reset_instruments(&mut self) -> Result<(), String>;
    /// Ends the guest.
    fn stop(&mut self);
    /// Whether it can tell which pages were written. If not, the next three are not
    /// called.
    fn has_dirty_log(&self) -> bool {
        false
    }
    /// Begins to remember which pages are written, by vCPUs, devices, or this process
    /// itself, with none remembered. Called while the guest runs. If it remembers already
    /// (stopping has failed), it forgets and begins again.
    fn start_dirty_log(&mut self) -> Result<(), String> {
        Err(NO_DIRTY_LOG.to_owned())
    }
    /// Folds the pages written since it was asked last into `into`, and forgets them;
    /// returns how many there were. Called while the guest runs, or once it is frozen.
    fn dirty_round(&mut self, into: &DirtyBitmap) -> Result<u64, String> {
        let _ = into;
        Err(NO_DIRTY_LOG.to_owned())
    }
    /// Remembers no more, so that the guest runs at its full speed.
    fn stop_dirty_log(&mut self) -> Result<(), String> {
        Err(NO_DIRTY_LOG.to_owned())
    }
    /// The record of the session that the memory belongs to, if this is a keeper of it.
    fn record(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// What a guest is, and where its memory lies for it.
#[derive(Clone, Debug)]
pub struct Description {
    /// Where its memory lies.
    pub layout: MemoryLayout,
    /// The machine configuration that the destination must have.
    pub machine: String,
    /// What it is.
    pub guest: GuestInfo,
}

/// How long the server waits.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a new client's Hello.
    pub hello: Duration,
    /// For the rest of a message that has begun, and for room to send one.
    pub message: Duration,
    /// For a sign of life of a client that has paused the guest and not committed.
    /// Then the server takes the guest back.
    pub paused: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            hello: Duration::from_secs(2),
            message: Duration::from_secs(5),
            paused: Duration::from_secs(60),
        }
    }
}

/// How [`Server::serve`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServeEnd {
    /// The guest has left; the process may exit.
    Released,
    /// A client had the guest stopped.
    Stopped,
    /// Of a keeper: the guest was not given away, and its VMM has it.
    GivenBack,
}

/// A failure that ends the server, not just a client.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// There is no socket to serve at.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The sockets cannot be waited for.
    #[error("cannot wait for attach clients")]
    Wait(#[source] nix::Error),
    /// No commit word can be made.
    #[error("cannot prepare for attach clients")]
    CommitWord(#[from] CommitWordError),
    /// A guest that was taken back does not run.
    #[error("the migration was aborted, and the guest cannot be resumed: {why}")]
    Resume {
        /// Why.
        why: String,
    },
}

/// A socket at which fault-servers attach. Its file goes when it is dropped.
#[derive(Debug)]
pub struct Server {
    pub(super) listener: PrivateListener,
    pub(super) patience: Patience,
}

/// What there is to do for a session.
pub(super) enum Wake {
    /// The client has something to say, or has left.
    Client,
    /// The time is over.
    Silence,
}

impl Server {
    /// Listens at `path`, with a socket that only this user may connect to. A socket
    /// left there by a VMM that is gone is replaced.
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, ServerError> {
        let listener = PrivateListener::bind(path.as_ref())?;
        Ok(Self { listener, patience: Patience::default() })
    }

    /// The same server with other limits on waiting.
    pub fn with_patience(mut self, patience: Patience) -> Self {
        self.patience = patience;
        self
    }

    /// Serves one client after another until the guest has left or is stopped. After
    /// an error the guest may be paused.
    pub fn serve(&self, vm: &mut dyn AttachedVm) -> Result<ServeEnd, ServerError> {
        let mut attempt = Attempt::new()?;
        loop {
            let Some(connection) = self.next_client(None)? else { continue };
            let pid = connection.peer_pid().unwrap_or_default();
            match Session::new(self, connection, &mut attempt, vm).run(self.patience.hello) {
                Ok(Ending::Released) => return Ok(ServeEnd::Released),
                Ok(Ending::Stopped) => return Ok(ServeEnd::Stopped),
                Ok(Ending::GivenBack | Ending::Left) => {
                    tracing::info!(pid, "attach client gave the guest back");
                }
                Err(SessionError::Server(error)) => return Err(error),
                Err(SessionError::Socket(SocketError::Closed)) => {
                    tracing::info!(pid, "attach client left");
                }
                Err(error) => tracing::warn!(pid, "attach client dropped: {}", one_line(&error)),
            }
            attempt = attempt.settle(vm)?;
        }
    }

    /// The next client; none if it has not come at `deadline`.
    pub(super) fn next_client(
        &self,
        deadline: Option<Instant>,
    ) -> Result<Option<Connection>, ServerError> {
        loop {
            let timeout = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
                None => PollTimeout::NONE,
                Some(Duration::ZERO) => return Ok(None),
                Some(left) => poll_timeout(left),
            };
            let mut fds = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(ServerError::Wait(errno)),
            }
            if let Some(connection) = self.accept() {
                return Ok(Some(connection));
            }
        }
    }

    /// Waits until `client` has something to say, and refuses others meanwhile.
    pub(super) fn wait(
        &self,
        client: &Connection,
        within: Option<Duration>,
    ) -> Result<Wake, ServerError> {
        let deadline = within.map(|within| Instant::now() + within);
        loop {
            let timeout = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
                None => PollTimeout::NONE,
                Some(Duration::ZERO) => return Ok(Wake::Silence),
                Some(left) => poll_timeout(left),
            };
            // In this order: if this client left and then another one came, seeing the other
            // means seeing that this one has left.
            let mut fds = [
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(client.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(ServerError::Wait(errno)),
            }
            let [other_waits, client_ready] = fds.map(|fd| fd.any().unwrap_or(true));
            if client_ready {
                return Ok(Wake::Client);
            }
            if other_waits && let Some(mut other) = self.accept() {
                let refusal = Reply::refused("another client is attached to this guest");
                let sent = super::session::send(&mut other, &refusal, &[], Duration::ZERO);
                let pid = other.peer_pid().unwrap_or_default();
                tracing::info!(pid, told = sent.is_ok(), "second attach client refused");
            }
        }
    }

    fn accept(&self) -> Option<Connection> {
        match self.listener.accept()? {
            Ok(connection) => Some(connection),
            Err(error) => {
                tracing::warn!("attach client not accepted: {}", one_line(&error));
                None
            }
        }
    }
}

/// An error and its causes.
pub(super) fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}
