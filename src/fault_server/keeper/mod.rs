//! The keeper: a small process that holds a guest's memory, its commit word and the
//! session's record, so that no death of another process loses them.
//!
//! [`start`] makes one before the guest is paused; [`run`] is its life, from `main` of
//! whatever program it is started as. It is an attach server on the socket beside the
//! VMM's ([`socket_path`]), with one client at a time, the first of which is the fault
//! server that started it. It maps no guest memory. If its client dies in the middle of a
//! session, it starts another one ([`RestartCommand`]). It ends when it is told to; and when
//! the fault server is gone and the guest was not given away, since the VMM has it then.

mod process;
mod restarts;
mod supervisor;

use super::holding::Keeper;
use super::legacy::Legacy;
use super::record::RecordError;
use crate::attach::client::{AttachError, Attached};
use crate::attach::commit_word::{CommitWordError, Decision};
use crate::attach::handover::HandoverError;
use crate::attach::listener::sweep;
use crate::attach::server::ServerError;
use crate::attach::socket::{Connection, SocketError};
use crate::failpoint::failpoint;
pub use process::{run, run_if_asked};
pub(super) use restarts::Restarts;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
pub use supervisor::RestartCommand;

/// The first argument of a program that is to be a keeper.
pub const ARGUMENT: &str = "--keep-guest-memory";
/// How it shows in a list of processes.
const NAME: &str = "postcopy-keeper";
/// How long either side of the hand-over waits for the other.
const HAND_OVER_MAX: Duration = Duration::from_secs(10);
/// The most bytes of a message of the hand-over.
const MESSAGE_MAX: usize = 64 << 10;
/// How long the kernel and a keeper may take to notice that a fault server is dead.
const NOTICE_MAX: Duration = Duration::from_secs(2);

/// The program that is started as a keeper.
#[derive(Clone, Debug)]
pub struct KeeperCommand {
    /// The program. Its `main` calls [`run_if_asked`] first, or [`run`] when it finds
    /// `arguments`.
    pub program: PathBuf,
    /// Its arguments; the socket's path follows them, for those who look at processes.
    pub arguments: Vec<OsString>,
    /// What it starts where a fault server has died in the middle of a session. None: the
    /// memory is held until an operator has somebody go on.
    pub restart: Option<RestartCommand>,
}

impl Default for KeeperCommand {
    /// This very program, as [`run_if_asked`] expects it. It starts nothing.
    fn default() -> Self {
        Self { program: "/proc/self/exe".into(), arguments: vec![ARGUMENT.into()], restart: None }
    }
}

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// No process.
    #[error("cannot start {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The process ended, or does not speak as a keeper does.
    #[error("it does not answer")]
    HandOver(#[from] SocketError),
    /// It has no socket, say.
    #[error("it cannot keep the memory: {0}")]
    Refused(String),
    /// Its memory.
    #[error("what it was handed is no guest's memory")]
    Memory(#[from] HandoverError),
    /// What was handed over is no guest.
    #[error("what it was handed is no guest")]
    CommitWord(#[from] CommitWordError),
    /// The same of the record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// What it is to start.
    #[error("what it is to start in a fault server's place cannot be understood")]
    Orders(#[source] postcard::Error),
    /// It was started and cannot be attached to.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Nobody is there.
    #[error("there is no keeper at {}", .0.display())]
    Nobody(PathBuf),
    /// A keeper is at work for another session.
    #[error("a keeper is there already: {0}")]
    Occupied(Occupied),
    /// The keeper's own end.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The kernel's reason.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What a keeper that is there is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Occupied {
    /// A fault server is attached.
    #[error("a fault server is attached to it")]
    Busy,
    /// It waits.
    #[error("it holds the memory of a guest that was given to a destination; see --resume")]
    Committed,
}

/// Where the keeper of the guest behind `control` listens: the same name and `.keeper`.
pub fn socket_path(control: &Path) -> PathBuf {
    let mut path = control.as_os_str().to_owned();
    path.push(".keeper");
    path.into()
}

/// A keeper that is there, and has no other client. One that a dead fault server left may
/// take a moment to notice.
pub fn connect(path: &Path) -> Result<Attached, AttachError> {
    let deadline = Instant::now() + NOTICE_MAX;
    loop {
        match Attached::connect(path) {
            // The second: it ended a moment ago, with us in its queue.
            Err(
                AttachError::Refused { .. }
                | AttachError::Socket { source: SocketError::Closed, .. },
            ) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            done => return done,
        }
    }
}

/// The keeper that has started this process, at the other end of standard input. Nothing
/// that is started from here has it as its own.
pub(super) fn at_standard_input() -> Result<Attached, AttachError> {
    let broke = |source| AttachError::Socket { request: "Hello", source };
    let taken = take_standard_input().map_err(|error| {
        let source = nix::Error::from_raw(error.raw_os_error().unwrap_or_default());
        broke(SocketError::System { action: "take over", source })
    })?;
    Attached::over(Connection::new(UnixStream::from(taken)).map_err(broke)?)
}

/// What standard input was; it leads nowhere from now on.
fn take_standard_input() -> io::Result<OwnedFd> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let nothing = std::fs::File::open("/dev/null")?;
    nix::unistd::dup2_stdin(&nothing)?;
    Ok(socket)
}

/// Whether a keeper is at `path`, and what it does. None if it keeps nothing that anybody
/// can go on with.
pub fn look(path: &Path) -> Option<Occupied> {
    match connect(path) {
        Ok(keeper) if is_vmms(keeper.word.decision()) => None,
        Ok(_) => Some(Occupied::Committed),
        Err(AttachError::Refused { .. }) => Some(Occupied::Busy),
        Err(_) => None,
    }
}

/// Whether the guest is its VMM's, so that a keeper is only there for a destination in doubt.
fn is_vmms(decision: Decision) -> bool {
    matches!(decision, Decision::Aborted | Decision::TakenBack)
}

/// Has the keeper at `path` let go of what it holds: an operator's word that the guest is
/// lost, and that nobody will go on with its session.
///
/// # Errors
/// If there is none, or a fault server is at work.
pub fn discard(path: &Path) -> Result<(), KeeperError> {
    match connect(path) {
        Ok(keeper) => Ok(keeper.stop("its operator discards the guest's memory")?),
        Err(AttachError::Connect { .. }) => Err(KeeperError::Nobody(path.to_owned())),
        Err(AttachError::Refused { .. }) => Err(KeeperError::Occupied(Occupied::Busy)),
        Err(error) => Err(error.into()),
    }
}

/// Starts a keeper for the guest whose VMM listens, or listened, at `control`.
///
/// # Errors
/// If there is none: the guest should not be paused then.
pub fn start(
    command: &KeeperCommand,
    control: &Path,
    legacy: &Legacy,
) -> Result<Keeper, KeeperError> {
    let path = at_any_directory(socket_path(control));
    make_room(&path)?;
    failpoint!("source::before_keeper_started", return Err(SocketError::Closed.into()));
    let (ours, theirs) = UnixStream::pair().map_err(system("make a pair of sockets"))?;
    let mut process = Command::new(&command.program)
        .arg0(NAME)
        .args(&command.arguments)
        .arg(&path)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|source| KeeperError::Start { program: command.program.clone(), source })?;
    match hand_over(ours, &path, legacy, command.restart.as_ref()) {
        Ok(kept) => {
            let (pid, at) = (process.id(), path.clone());
            tracing::info!(pid, path = %path.display(), "a keeper holds the guest's memory");
            Ok(Keeper::new(kept, at, Some(process)))
        }
        Err(error) => {
            // Nobody has paused the guest for it.
            let _ = process.kill();
            let _ = process.wait();
            sweep(&path);
            Err(error)
        }
    }
}

/// The path as a process finds it that leaves the working directory, unless it is too long
/// then for a socket's.
pub(super) fn at_any_directory(path: PathBuf) -> PathBuf {
    let absolute = std::path::absolute(&path).ok();
    let fits = |path: &PathBuf| nix::sys::socket::UnixAddr::new(path).is_ok();
    absolute.filter(fits).unwrap_or(path)
}

fn hand_over(
    socket: UnixStream,
    path: &Path,
    legacy: &Legacy,
    restart: Option<&RestartCommand>,
) -> Result<Attached, KeeperError> {
    let mut connection = Connection::new(socket)?;
    failpoint!("source::before_hand_over", return Err(SocketError::Closed.into()));
    let path = framed(path.as_os_str().as_bytes());
    connection.send(&path, &[legacy.record().memfd()], HAND_OVER_MAX)?;
    let memory_and_word = [legacy.memory(), vec![legacy.word().memfd()]].concat();
    connection.send(&framed(MEMORY), &memory_and_word, HAND_OVER_MAX)?;
    let orders = framed(&postcard::to_allocvec(&restart).map_err(KeeperError::Orders)?);
    let (stdout, stderr) = (io::stdout(), io::stderr());
    let outputs = [stdout.as_fd(), stderr.as_fd()];
    connection.send(&orders, if restart.is_some() { &outputs } else { &[] }, HAND_OVER_MAX)?;
    let answer = connection.receive(MESSAGE_MAX, HAND_OVER_MAX)?.bytes;
    if answer != OK {
        return Err(KeeperError::Refused(String::from_utf8_lossy(&answer).into_owned()));
    }
    failpoint!("source::after_hand_over", return Err(SocketError::Closed.into()));
    Ok(Attached::over(connection)?)
}

/// The message that memory and commit word come with; the one before has the socket's path,
/// and the record comes with it.
const MEMORY: &[u8] = b"memory";
/// The keeper's answer when it has all it needs.
const OK: &[u8] = b"kept";

/// Ends a keeper that only stayed for the sake of a destination in doubt: that one waits
/// for as long as its patience lasts, and the guest is to be moved now.
fn make_room(path: &Path) -> Result<(), KeeperError> {
    let keeper = match connect(path) {
        Ok(keeper) => keeper,
        Err(AttachError::Connect { .. }) => return Ok(()),
        Err(AttachError::Refused { .. }) => return Err(KeeperError::Occupied(Occupied::Busy)),
        // It ended a moment ago, with us in its queue.
        Err(AttachError::Socket { source: SocketError::Closed, .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if !is_vmms(keeper.word.decision()) {
        return Err(KeeperError::Occupied(Occupied::Committed));
    }
    keeper.stop("another migration begins")?;
    let deadline = Instant::now() + NOTICE_MAX;
    while path.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A message of the hand-over with its length.
fn framed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
}

fn system(action: &'static str) -> impl Fn(io::Error) -> KeeperError {
    move |source| KeeperError::System { action, source }
}
