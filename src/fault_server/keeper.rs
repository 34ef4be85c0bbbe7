//! The keeper: a small process that holds a guest's memory, its commit word and the
//! session's record, so that no death of another process loses them.
//!
//! [`start`] makes one before the guest is paused; [`run`] is its life, from `main` of
//! whatever program it is started as. It is an attach server on the socket beside the
//! VMM's ([`socket_path`]), with one client at a time, the first of which is the fault
//! server that started it. It maps no guest memory. It ends when it is told to; and when
//! the fault server is gone and the guest was not given away, since the VMM has it then.

use super::record::{RecordError, RecordFile, SessionRecord};
use crate::attach::client::{AttachError, Attached};
use crate::attach::commit_word::{CommitWord, CommitWordError, Decision};
use crate::attach::handover::{HandoverError, MemoryFiles, check_region_files};
use crate::attach::listener::sweep;
use crate::attach::message::{Paused, Status};
use crate::attach::server::{AttachedVm, Description, ServeEnd, Server, ServerError};
use crate::attach::socket::{Connection, Received, SocketError};
use crate::engine::attached::Keeper;
use crate::failpoint::failpoint;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The first argument of a program that is to be a keeper.
pub const ARGUMENT: &str = "--keep-guest-memory";
/// How it shows in a list of processes.
const NAME: &str = "postcopy-keeper";
/// How long either side of the hand-over waits for the other.
const HAND_OVER_MAX: Duration = Duration::from_secs(10);
/// The most bytes of a message of the hand-over.
const MESSAGE_MAX: usize = 8192;
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
}

impl Default for KeeperCommand {
    /// This very program, as [`run_if_asked`] expects it.
    fn default() -> Self {
        Self { program: "/proc/self/exe".into(), arguments: vec![ARGUMENT.into()] }
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
            Err(AttachError::Refused { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            done => return done,
        }
    }
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

/// Starts a keeper for the guest of `attached`, whose VMM listens at `control`.
///
/// # Errors
/// If there is none: the guest should not be paused then.
pub fn start(
    command: &KeeperCommand,
    control: &Path,
    attached: &Attached,
    record: &RecordFile,
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
    match hand_over(ours, &path, attached, record) {
        Ok(kept) => {
            let (pid, path) = (process.id(), path.display());
            tracing::info!(pid, %path, "a keeper holds the guest's memory");
            Ok(Keeper::new(kept, Some(process)))
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

/// The path as a keeper finds it that leaves the working directory, unless it is too long
/// then for a socket's.
fn at_any_directory(path: PathBuf) -> PathBuf {
    let absolute = std::path::absolute(&path).ok();
    let fits = |path: &PathBuf| nix::sys::socket::UnixAddr::new(path).is_ok();
    absolute.filter(fits).unwrap_or(path)
}

fn hand_over(
    socket: UnixStream,
    path: &Path,
    attached: &Attached,
    record: &RecordFile,
) -> Result<Attached, KeeperError> {
    let mut connection = Connection::new(socket)?;
    failpoint!("source::before_hand_over", return Err(SocketError::Closed.into()));
    let memory = MemoryFiles::of(&attached.ram).map_err(AttachError::from)?;
    let path = framed(path.as_os_str().as_bytes());
    connection.send(&path, &[record.memfd()], HAND_OVER_MAX)?;
    let memory_and_word = [memory.files(), &[attached.word.memfd()]].concat();
    connection.send(&framed(MEMORY), &memory_and_word, HAND_OVER_MAX)?;
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

/// To be called first in `main`: if this process was started as a keeper, it is one until
/// its end, whose exit code this returns.
pub fn run_if_asked() -> Option<ExitCode> {
    if std::env::args_os().nth(1).as_deref() != Some(OsStr::new(ARGUMENT)) {
        return None;
    }
    Some(match run() {
        Ok(_) => ExitCode::SUCCESS,
        // Its standard error leads nowhere: whoever started it has been told.
        Err(_) => ExitCode::FAILURE,
    })
}

/// The life of a keeper, which [`start`] has started with a socket as standard input. It
/// closes every other descriptor of the process: nothing may have been opened before.
///
/// # Errors
/// If it was started otherwise, or cannot serve.
pub fn run() -> Result<ServeEnd, KeeperError> {
    let mut connection = Connection::new(leave_home()?)?;
    failpoint!("keeper::before_hand_over", return Err(SocketError::Closed.into()));
    let mut received = connection.receive(MESSAGE_MAX, HAND_OVER_MAX)?;
    let path = PathBuf::from(OsString::from_vec(std::mem::take(&mut received.bytes)));
    let [record] = received.descriptors()?;
    if path.is_absolute() {
        // Its file system can be unmounted, say.
        nix::unistd::chdir("/").map_err(|errno| system("leave the directory")(errno.into()))?;
    }
    let memory = connection.receive(MESSAGE_MAX, HAND_OVER_MAX)?;
    let (server, mut kept, word) = match prepare(&path, record, memory) {
        Ok(ready) => ready,
        Err(error) => {
            let why = crate::engine::error_chain(&error);
            let why = &why.as_bytes()[..why.len().min(MESSAGE_MAX)];
            connection.send(&framed(why), &[], HAND_OVER_MAX)?;
            return Err(error);
        }
    };
    failpoint!("keeper::before_kept_sent", return Err(SocketError::Closed.into()));
    connection.send(&framed(OK), &[], HAND_OVER_MAX)?;
    failpoint!("keeper::after_kept_sent", return Err(SocketError::Closed.into()));
    let record = kept.record.share()?;
    let linger = || linger(&record);
    Ok(server.keep(connection, &mut kept, word, linger)?)
}

/// Leaves the session, the terminal and the process group of whoever started it; returns
/// the socket to it.
fn leave_home() -> Result<UnixStream, KeeperError> {
    // Fails only for the leader of a group, which is at home nowhere else.
    let _ = nix::unistd::setsid();
    let _ = nix::sys::prctl::set_name(c"postcopy-keeper");
    close_inherited().map_err(system("close what was inherited"))?;
    let socket = io::stdin().as_fd().try_clone_to_owned();
    let socket = socket.map_err(system("take the socket over"))?;
    let nothing = std::fs::File::open("/dev/null").map_err(system("open /dev/null"))?;
    nix::unistd::dup2_stdin(&nothing)
        .map_err(|errno| system("close the standard input")(errno.into()))?;
    Ok(UnixStream::from(socket))
}

/// Whatever the starter had open for its children: a lock, or a pipe whose reader waits for
/// its end. A keeper may outlive them all.
fn close_inherited() -> io::Result<()> {
    let open = std::fs::read_dir("/proc/self/fd")?;
    let numbers = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let numbers: Vec<RawFd> = numbers.filter(|&number| number > 2).collect();
    for number in numbers {
        // The directory's own is closed by now.
        let _ = nix::unistd::close(number);
    }
    Ok(())
}

fn prepare(
    path: &Path,
    record: OwnedFd,
    memory: Received,
) -> Result<(Server, Kept, CommitWord), KeeperError> {
    let record = RecordFile::open(record)?;
    let SessionRecord { layout, memory: places, .. } = record.record();
    let files = check_region_files(layout, places)?;
    let mut memory = memory.all_descriptors(files + 1)?;
    let none = SocketError::Descriptors { got: 0, more: false, expected: files + 1 };
    let word = CommitWord::from_fd(memory.pop().ok_or(none)?)?;
    Ok((Server::bind(path)?, Kept { memory, record }, word))
}

/// How long a session that was aborted may still be of use to somebody.
fn linger(record: &RecordFile) -> Duration {
    let newest = record.memfd().try_clone_to_owned().ok().and_then(|fd| RecordFile::open(fd).ok());
    let in_doubt = newest.filter(|newest| newest.record().state_left);
    // After that a destination as patient as this side has given up by itself.
    in_doubt.map_or(Duration::ZERO, |newest| newest.record().plan.patience())
}

/// A message of the hand-over with its length.
fn framed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
}

fn system(action: &'static str) -> impl Fn(io::Error) -> KeeperError {
    move |source| KeeperError::System { action, source }
}

/// A guest of which only the memory is here.
struct Kept {
    memory: Vec<OwnedFd>,
    record: RecordFile,
}

const ONLY_MEMORY: &str = "this is a keeper: it has the guest's memory and not the guest";

impl AttachedVm for Kept {
    fn describe(&self) -> Description {
        let record = self.record.record();
        Description {
            layout: record.layout.clone(),
            machine: record.machine.clone(),
            guest: record.guest.clone(),
        }
    }

    fn memory(&self) -> MemoryFiles<'_> {
        let SessionRecord { layout, memory: places, .. } = self.record.record();
        let files = self.memory.iter().map(AsFd::as_fd).collect();
        MemoryFiles::new(layout, places.clone(), files).expect("checked when they came")
    }

    fn pause_and_capture(&mut self) -> Result<Paused, String> {
        Err(ONLY_MEMORY.into())
    }

    fn resume(&mut self) -> Result<(), String> {
        Err(ONLY_MEMORY.into())
    }

    fn released(&mut self) {}

    fn status(&mut self) -> Status {
        Status { running: false, steps: 0, failure: None }
    }

    fn reset_instruments(&mut self) -> Result<(), String> {
        Err(ONLY_MEMORY.into())
    }

    fn stop(&mut self) {}

    fn record(&self) -> Option<BorrowedFd<'_>> {
        Some(self.record.memfd())
    }
}
