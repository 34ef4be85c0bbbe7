//! [`Attached`]: the fault-server's end of an attach conversation.
//!
//! Every call is one request and its answer, and blocks for at most
//! [`REPLY_TIMEOUT`]. Dropping an `Attached` closes the conversation: unless the
//! commit word says committed, the VMM then takes the guest back and lets it run.

use super::commit_word::{CommitWord, CommitWordError, Committed};
use super::handover::{HandoverError, check_region_files, take_over};
use super::message::{
    CAPABILITY_DIRTY_LOG, CAPABILITY_KEEP_RECORD, CAPABILITY_SESSION_RECORD, DirtyRound, GuestInfo,
    Message, MessageError, Paused, REPLY_BYTES_MAX, Reply, Request, Status, VERSION, Welcome,
    reason,
};
use super::socket::{Connection, SocketError, connect};
use crate::failpoint::failpoint;
use crate::memory::dirty_bitmap::{DirtyBitmap, DirtyBitmapError};
use crate::memory::ram::GuestRam;
use crate::proto::layout::MemoryLayout;
use crate::proto::page::PageIndex;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The longest wait for an answer of the VMM.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a full queue of clients is tried.
const QUEUE_LOOK: Duration = Duration::from_millis(10);

/// A guest in another process, with its memory mapped here.
#[derive(Debug)]
pub struct Attached {
    /// Its memory, mapped read-only. It stays when the VMM's process ends.
    pub ram: Arc<GuestRam>,
    /// The machine configuration that the destination must have.
    pub machine: String,
    /// What the guest is.
    pub guest: GuestInfo,
    /// The word that decides where the guest runs: `commit` it before Commit leaves.
    pub word: Arc<CommitWord>,
    capabilities: Vec<String>,
    connection: Connection,
    path: Option<PathBuf>,
    within: Duration,
}

/// The log of a guest's writes, since it was started.
#[derive(Clone, Debug)]
pub struct DirtyLog {
    /// Which pages were written; [`Attached::dirty_round`] fills it. Take a page's bit out
    /// before its content is read.
    pub bitmap: Arc<DirtyBitmap>,
    /// Each write after this moment will be in a round:
    /// [`monotonic_ns`](super::monotonic_ns).
    pub started_at_ns: u64,
}

/// Why attaching, or a request, did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Nobody listens there.
    #[error("cannot connect to a VMM at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The VMM speaks another version.
    #[error("the VMM speaks version {theirs} of the attach protocol, this is version {VERSION}")]
    Version {
        /// Its version.
        theirs: u16,
    },
    /// The VMM wants no conversation now.
    #[error("the VMM refused: {why}")]
    Refused {
        /// Why.
        why: String,
    },
    /// The VMM could not do it; nothing has changed.
    #[error("the VMM failed to answer {request}: {why}")]
    Failed {
        /// What was asked.
        request: &'static str,
        /// Why.
        why: String,
    },
    /// The conversation broke.
    #[error("the conversation with the VMM broke at {request}")]
    Socket {
        /// What was asked.
        request: &'static str,
        /// The cause.
        #[source]
        source: SocketError,
    },
    /// Bytes that are no answer, or a request that is too long.
    #[error("bad message at {request}")]
    Message {
        /// What was asked.
        request: &'static str,
        /// The cause.
        #[source]
        source: MessageError,
    },
    /// An answer to another question.
    #[error("the VMM answered {request} with {reply}")]
    Unexpected {
        /// What was asked.
        request: &'static str,
        /// What came.
        reply: &'static str,
    },
    /// A seed page outside of the layout.
    #[error("the VMM named {page} as a seed; the guest has {pages} pages")]
    Seed {
        /// The page named.
        page: PageIndex,
        /// The pages there are.
        pages: u64,
    },
    /// The guest's memory cannot be taken over.
    #[error("cannot use the guest memory handed over")]
    Memory(#[from] HandoverError),
    /// The VMM lacks a capability.
    #[error("the VMM lacks the capability {0}")]
    Lacks(&'static str),
    /// The dirty bitmap cannot be mapped.
    #[error("cannot use the dirty bitmap handed over")]
    DirtyBitmap(#[from] DirtyBitmapError),
    /// More pages written than there are.
    #[error("the VMM counted {counted} pages written; the guest has {pages}")]
    DirtyPages {
        /// The pages counted.
        counted: u64,
        /// The pages there are.
        pages: u64,
    },
    /// The commit word cannot be mapped.
    #[error("cannot use the commit word handed over")]
    CommitWord(#[from] CommitWordError),
}

impl Attached {
    /// Connects to the VMM that listens at `path`, and maps its guest's memory.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, AttachError> {
        Self::connect_within(path.as_ref(), REPLY_TIMEOUT)
    }

    /// The same with another limit on each wait.
    pub(crate) fn connect_within(path: &Path, within: Duration) -> Result<Self, AttachError> {
        let broke = |source| AttachError::Socket { request: "Hello", source };
        let deadline = Instant::now() + within;
        let stream = loop {
            match connect(path) {
                Ok(Some(stream)) => break stream,
                Ok(None) if Instant::now() < deadline => std::thread::sleep(QUEUE_LOOK),
                Ok(None) => return Err(broke(SocketError::Timeout)),
                Err(source) => {
                    return Err(AttachError::Connect { path: path.to_owned(), source });
                }
            }
        };
        let attached = Self::greet(Connection::new(stream).map_err(broke)?, within)?;
        Ok(Self { path: Some(path.to_owned()), ..attached })
    }

    /// The same over a connection that stands.
    pub fn over(connection: Connection) -> Result<Self, AttachError> {
        Self::greet(connection, REPLY_TIMEOUT)
    }

    fn greet(mut connection: Connection, within: Duration) -> Result<Self, AttachError> {
        let request = "Hello";
        let broke = |source| AttachError::Socket { request, source };
        match send(&mut connection, &Request::hello(), within) {
            // A VMM that refuses may have closed before the greeting left; what it
            // said can still be read.
            Ok(()) | Err(AttachError::Socket { source: SocketError::Closed, .. }) => {}
            Err(error) => return Err(error),
        }
        let received = connection.receive(REPLY_BYTES_MAX, within).map_err(broke)?;
        let reply = Reply::decode(&received.bytes)
            .map_err(|source| AttachError::Message { request, source })?;
        let welcome = match reply {
            Reply::Welcome(welcome) if welcome.version == VERSION => welcome,
            Reply::Welcome(welcome) => {
                return Err(AttachError::Version { theirs: welcome.version });
            }
            Reply::Refused { version, .. } if version != VERSION => {
                return Err(AttachError::Version { theirs: version });
            }
            Reply::Refused { why, .. } => return Err(AttachError::Refused { why }),
            other => return Err(AttachError::Unexpected { request, reply: other.name() }),
        };
        let Welcome { layout, memory, machine, guest, capabilities, .. } = *welcome;
        let files = check_region_files(&layout, &memory)?;
        let mut descriptors = received.all_descriptors(files + 1).map_err(broke)?;
        let none = SocketError::Descriptors { got: 0, more: false, expected: files + 1 };
        let word = descriptors.pop().ok_or(none).map_err(broke)?;
        let ram = Arc::new(take_over(layout, &memory, descriptors)?);
        let word = Arc::new(CommitWord::from_fd(word)?);
        Ok(Self { ram, machine, guest, word, capabilities, connection, path: None, within })
    }

    /// Where the guest's memory lies.
    pub fn layout(&self) -> &MemoryLayout {
        self.ram.layout()
    }

    /// Stops the guest and captures its state. Until [`CommitWord::commit`], closing
    /// the conversation or being silent for longer than the VMM's patience lets it run
    /// on; [`Attached::status`] is a sign of life. Asked again, also by a later client
    /// of a committed migration, it gives the same capture.
    pub fn pause(&mut self) -> Result<Paused, AttachError> {
        let paused = match self.ask(&Request::Pause)? {
            Reply::Paused(paused) => *paused,
            other => return Err(unexpected("Pause", &other)),
        };
        let pages = self.layout().pages();
        failpoint!(
            "source::after_pause",
            return Err(AttachError::Seed { page: PageIndex::new(pages), pages })
        );
        match paused.seeds.iter().find(|page| page.get() >= pages) {
            Some(&page) => Err(AttachError::Seed { page, pages }),
            None => Ok(paused),
        }
    }

    /// Gives the guest back: it runs on in the VMM. Fails if the word says committed.
    pub fn resume(mut self) -> Result<(), AttachError> {
        match self.ask(&Request::Resume)? {
            Reply::Resumed => Ok(()),
            other => Err(unexpected("Resume", &other)),
        }
    }

    /// Tells the VMM that the guest has left, so that it lets go; its process may
    /// exit. The memory stays mapped here.
    pub fn committed(&mut self, _proof: &Committed) -> Result<(), AttachError> {
        match self.ask(&Request::Committed)? {
            Reply::Released => Ok(()),
            other => Err(unexpected("Committed", &other)),
        }
    }

    /// The first half of [`Attached::committed`]: what has been said is heard for as long as
    /// the conversation stands, also by a VMM that does not answer now.
    pub(crate) fn say_committed(&mut self, _proof: &Committed) -> Result<(), AttachError> {
        send(&mut self.connection, &Request::Committed, self.within)
    }

    /// The second half, which may be tried again if it was silent.
    pub(crate) fn hear_released(&mut self, within: Duration) -> Result<(), AttachError> {
        match self.hear("Committed", within)?.0 {
            Reply::Released => Ok(()),
            other => Err(unexpected("Committed", &other)),
        }
    }

    /// Has the guest clear its instruments.
    pub fn reset_instruments(&mut self) -> Result<(), AttachError> {
        match self.ask(&Request::ResetInstruments)? {
            Reply::InstrumentsReset => Ok(()),
            other => Err(unexpected("ResetInstruments", &other)),
        }
    }

    /// How the guest is.
    pub fn status(&mut self) -> Result<Status, AttachError> {
        match self.ask(&Request::Status)? {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected("Status", &other)),
        }
    }

    /// The same with another limit. After an error the conversation is of no further use: the
    /// answer may still come.
    pub(crate) fn status_within(&mut self, within: Duration) -> Result<Status, AttachError> {
        send(&mut self.connection, &Request::Status, within)?;
        match self.hear("Status", within)?.0 {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected("Status", &other)),
        }
    }

    /// Whether the VMM can tell which pages were written.
    pub fn has_dirty_log(&self) -> bool {
        self.can(CAPABILITY_DIRTY_LOG)
    }

    /// Has the VMM remember which pages are written, while the guest runs. What was
    /// written before does not count: read every page once after this. It ends with
    /// [`Attached::stop_dirty_log`], with the conversation, or when a round fails.
    pub fn start_dirty_log(&mut self) -> Result<DirtyLog, AttachError> {
        if !self.has_dirty_log() {
            return Err(AttachError::Lacks(CAPABILITY_DIRTY_LOG));
        }
        match self.exchange(&Request::StartDirtyLog)? {
            (Reply::DirtyLogStarted { started_at_ns }, Some(bitmap)) => {
                let bitmap = Arc::new(DirtyBitmap::from_fd(bitmap, self.layout())?);
                Ok(DirtyLog { bitmap, started_at_ns })
            }
            (other, _) => Err(unexpected("StartDirtyLog", &other)),
        }
    }

    /// Has the VMM put the pages written since the last round into the bitmap. After
    /// [`Attached::pause`] one round has all that was written until
    /// [`Paused::frozen_at_ns`], and the next ones have nothing.
    ///
    /// # Errors
    /// After [`AttachError::Failed`] the log has ended, and any page may have been written.
    pub fn dirty_round(&mut self) -> Result<DirtyRound, AttachError> {
        let round = match self.ask(&Request::DirtyRound)? {
            Reply::DirtyRound(round) => round,
            other => return Err(unexpected("DirtyRound", &other)),
        };
        let pages = self.layout().pages();
        if round.pages > pages {
            return Err(AttachError::DirtyPages { counted: round.pages, pages });
        }
        Ok(round)
    }

    /// Has the VMM remember no more.
    pub fn stop_dirty_log(&mut self) -> Result<(), AttachError> {
        match self.ask(&Request::StopDirtyLog)? {
            Reply::DirtyLogStopped => Ok(()),
            other => Err(unexpected("StopDirtyLog", &other)),
        }
    }

    /// Whether a session's record is there: at a keeper always, at a VMM if a fault-server
    /// has left one there and has gone after it committed the guest.
    pub fn has_record(&self) -> bool {
        self.can(CAPABILITY_SESSION_RECORD)
    }

    /// Has a VMM hold the record of the session, for a fault-server that comes later. One
    /// of which that cannot be asked is left alone.
    pub fn keep_record(&mut self, record: BorrowedFd<'_>) -> Result<(), AttachError> {
        if !self.can(CAPABILITY_KEEP_RECORD) {
            return Ok(());
        }
        let request = Request::KeepRecord;
        send_with(&mut self.connection, &request, &[record], self.within)?;
        match self.hear(request.name(), self.within)?.0 {
            Reply::RecordKept => Ok(()),
            other => Err(unexpected("KeepRecord", &other)),
        }
    }

    /// Tells a keeper that this fault-server ends on purpose: nobody is started in its
    /// place, and the memory is held on.
    pub fn leave(mut self) -> Result<(), AttachError> {
        match self.ask(&Request::Leave)? {
            Reply::Left => Ok(()),
            other => Err(unexpected("Leave", &other)),
        }
    }

    fn can(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|name| name == capability)
    }

    /// The record of the session that the memory belongs to. Whoever asks a keeper for it
    /// goes on with the session.
    pub fn record(&mut self) -> Result<OwnedFd, AttachError> {
        if !self.has_record() {
            return Err(AttachError::Lacks(CAPABILITY_SESSION_RECORD));
        }
        match self.exchange(&Request::Record)? {
            (Reply::Record, Some(record)) => Ok(record),
            (other, _) => Err(unexpected("Record", &other)),
        }
    }

    /// The conversation's socket, to watch for its end.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// Where the conversation began, if it began at a path.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Has the VMM end the guest and exit. An operator's step: after a commit it takes
    /// the memory away from a fault-server that was to be started again.
    pub fn stop(mut self, why: &str) -> Result<(), AttachError> {
        match self.ask(&Request::Stop { why: reason(why) })? {
            Reply::Stopping => Ok(()),
            other => Err(unexpected("Stop", &other)),
        }
    }

    pub(super) fn ask(&mut self, request: &Request) -> Result<Reply, AttachError> {
        self.exchange(request).map(|(reply, _none)| reply)
    }

    /// A request, its answer, and the descriptor that belongs to it, if one does.
    fn exchange(&mut self, request: &Request) -> Result<(Reply, Option<OwnedFd>), AttachError> {
        send(&mut self.connection, request, self.within)?;
        self.hear(request.name(), self.within)
    }

    fn hear(
        &mut self,
        name: &'static str,
        within: Duration,
    ) -> Result<(Reply, Option<OwnedFd>), AttachError> {
        let broke = |source| AttachError::Socket { request: name, source };
        let received = self.connection.receive(REPLY_BYTES_MAX, within).map_err(broke)?;
        let reply = Reply::decode(&received.bytes)
            .map_err(|source| AttachError::Message { request: name, source })?;
        let descriptor = if let Reply::DirtyLogStarted { .. } | Reply::Record = reply {
            let [only] = received.descriptors().map_err(broke)?;
            Some(only)
        } else {
            let [] = received.descriptors().map_err(broke)?;
            None
        };
        match reply {
            Reply::Failed { why } => Err(AttachError::Failed { request: name, why }),
            reply => Ok((reply, descriptor)),
        }
    }
}

fn send(
    connection: &mut Connection,
    request: &Request,
    within: Duration,
) -> Result<(), AttachError> {
    send_with(connection, request, &[], within)
}

fn send_with(
    connection: &mut Connection,
    request: &Request,
    descriptors: &[BorrowedFd<'_>],
    within: Duration,
) -> Result<(), AttachError> {
    let name = request.name();
    let bytes =
        request.encode().map_err(|source| AttachError::Message { request: name, source })?;
    connection
        .send(&bytes, descriptors, within)
        .map_err(|source| AttachError::Socket { request: name, source })
}

fn unexpected(request: &'static str, reply: &Reply) -> AttachError {
    AttachError::Unexpected { request, reply: reply.name() }
}
