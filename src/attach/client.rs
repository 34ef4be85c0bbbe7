//! [`Attached`]: the fault-server's end of an attach conversation.
//!
//! Every call is one request and its answer, and blocks for at most
//! [`REPLY_TIMEOUT`]. Dropping an `Attached` closes the conversation: unless the
//! commit word says committed, the VMM then takes the guest back and lets it run.

use super::commit_word::{CommitWord, CommitWordError, Committed};
use super::message::{
    GuestInfo, Message, MessageError, Paused, REPLY_BYTES_MAX, Reply, Request, Status, VERSION,
    reason,
};
use super::socket::{Connection, SocketError};
use crate::memory::ram::{GuestRam, RamError};
use crate::proto::layout::MemoryLayout;
use crate::proto::page::{PAGE_SIZE, PageIndex};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vm_memory::FileOffset;

/// The longest wait for an answer of the VMM.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

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
    connection: Connection,
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
    /// The guest's memory is not a memfd that can be sealed against shrinking, so
    /// that reading it could kill this process.
    #[error("the guest memory handed over cannot be sealed against shrinking")]
    Seal(#[source] nix::Error),
    /// The guest's memory cannot be mapped.
    #[error("cannot map the guest memory handed over")]
    Ram(#[from] RamError),
    /// The commit word cannot be mapped.
    #[error("cannot use the commit word handed over")]
    CommitWord(#[from] CommitWordError),
}

impl Attached {
    /// Connects to the VMM that listens at `path`, and maps its guest's memory.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, AttachError> {
        let path = path.as_ref();
        let stream = UnixStream::connect(path)
            .map_err(|source| AttachError::Connect { path: path.to_owned(), source })?;
        let request = "Hello";
        let broke = |source| AttachError::Socket { request, source };
        let mut connection = Connection::new(stream).map_err(broke)?;
        match send(&mut connection, &Request::hello()) {
            // A VMM that refuses may have closed before the greeting left; what it
            // said can still be read.
            Ok(()) | Err(AttachError::Socket { source: SocketError::Closed, .. }) => {}
            Err(error) => return Err(error),
        }
        let received = connection.receive(REPLY_BYTES_MAX, REPLY_TIMEOUT).map_err(broke)?;
        let reply = Reply::decode(&received.bytes)
            .map_err(|source| AttachError::Message { request, source })?;
        let welcome = match reply {
            Reply::Welcome(welcome) => welcome,
            Reply::Refused { version, .. } if version != VERSION => {
                return Err(AttachError::Version { theirs: version });
            }
            Reply::Refused { why, .. } => return Err(AttachError::Refused { why }),
            other => return Err(AttachError::Unexpected { request, reply: other.name() }),
        };
        let [memory, word] = received.descriptors::<2>().map_err(broke)?;
        seal(&memory)?;
        let memory = Arc::new(File::from(memory));
        let files = welcome.layout.region_runs().map(|(_, run)| {
            FileOffset::from_arc(memory.clone(), run.first().get() * PAGE_SIZE as u64)
        });
        let files = files.collect();
        let ram = Arc::new(GuestRam::attach_read_only(welcome.layout, files)?);
        let word = Arc::new(CommitWord::from_fd(word)?);
        Ok(Self { ram, machine: welcome.machine, guest: welcome.guest, word, connection })
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

    /// Has the VMM end the guest and exit. An operator's step: after a commit it takes
    /// the memory away from a fault-server that was to be started again.
    pub fn stop(mut self, why: &str) -> Result<(), AttachError> {
        match self.ask(&Request::Stop { why: reason(why) })? {
            Reply::Stopping => Ok(()),
            other => Err(unexpected("Stop", &other)),
        }
    }

    fn ask(&mut self, request: &Request) -> Result<Reply, AttachError> {
        let name = request.name();
        let broke = |source| AttachError::Socket { request: name, source };
        send(&mut self.connection, request)?;
        let received = self.connection.receive(REPLY_BYTES_MAX, REPLY_TIMEOUT).map_err(broke)?;
        let reply = Reply::decode(&received.bytes)
            .map_err(|source| AttachError::Message { request: name, source })?;
        let [] = received.descriptors::<0>().map_err(broke)?;
        match reply {
            Reply::Failed { why } => Err(AttachError::Failed { request: name, why }),
            reply => Ok(reply),
        }
    }
}

fn send(connection: &mut Connection, request: &Request) -> Result<(), AttachError> {
    let name = request.name();
    let bytes =
        request.encode().map_err(|source| AttachError::Message { request: name, source })?;
    connection
        .send(&bytes, &[], REPLY_TIMEOUT)
        .map_err(|source| AttachError::Socket { request: name, source })
}

/// Seals the guest's memory against shrinking, so that no page of the mapping can
/// lose its file, which would end this process with SIGBUS. The size is looked at
/// afterwards.
fn seal(memory: &OwnedFd) -> Result<(), AttachError> {
    let seals = fcntl(memory, FcntlArg::F_GET_SEALS).map_err(AttachError::Seal)?;
    if SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return Ok(());
    }
    fcntl(memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))
        .map(drop)
        .map_err(AttachError::Seal)
}

fn unexpected(request: &'static str, reply: &Reply) -> AttachError {
    AttachError::Unexpected { request, reply: reply.name() }
}
