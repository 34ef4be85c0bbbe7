//! The service manager (systemd) that started this program, if one did: its descriptor
//! store, which holds what a keeper would, and what it is told of how things stand.
//!
//! With `FDSTORE=1` a service gives descriptors to its manager, which holds them while the
//! process is down and passes them to the next one, as it does sockets (`LISTEN_FDS`). That
//! one finds its session there. See sd_notify(3), sd_listen_fds(3).

use super::legacy::Legacy;
use crate::attach::commit_word::{CommitWord, CommitWordError};
use crate::engine::event::{Event, Phase};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sd_notify::NotifyState;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// Begins the name of each descriptor of ours.
const PREFIX: &str = "postcopy-";
const WORD: &str = "commit-word";
const RECORD: &str = "record";
const MEMORY: &str = "memory-";
/// How long the manager may take to have taken what was sent.
const BARRIER_MAX: Duration = Duration::from_secs(10);
/// A status line at most so often.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// Why the descriptor store is of no use.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No `NOTIFY_SOCKET`.
    #[error(
        "no service manager has started this program: without one, start it without \
         --descriptor-store"
    )]
    NoManager,
    /// `FDSTORE` is missing, though this manager tells it.
    #[error("the unit has no descriptor store: FileDescriptorStoreMax= is 0")]
    NoStore,
    /// What was sent, or came.
    #[error("cannot {action} the service manager's descriptors")]
    System {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Some of ours are there and others not.
    #[error("the descriptor store has no {0}")]
    Missing(String),
    /// The word.
    #[error(transparent)]
    CommitWord(#[from] CommitWordError),
}

/// What the manager has passed on.
#[derive(Debug)]
pub(super) struct Inherited {
    /// In the order of their numbers.
    pub memory: Vec<OwnedFd>,
    pub word: CommitWord,
    pub record: OwnedFd,
}

impl Inherited {
    /// What is there of ours. None: this is the session's first process.
    pub fn take() -> Result<Option<Self>, StoreError> {
        let failed = |source| StoreError::System { action: "take over", source };
        let named = sd_notify::listen_fds_with_names().map_err(failed)?;
        let ours = named.filter_map(|(fd, name)| Some((fd, name.strip_prefix(PREFIX)?.to_owned())));
        let mut ours: Vec<(String, OwnedFd)> = ours
            .map(|(fd, name)| {
                // SAFETY: the manager has opened it for this process, which takes each
                // number once: nobody else in it knows of these.
                (name, unsafe { OwnedFd::from_raw_fd(fd) })
            })
            .collect();
        if ours.is_empty() {
            return Ok(None);
        }
        let mut take = |name: &str| {
            let found = ours.iter().position(|(other, _)| other == name);
            Some(ours.swap_remove(found?).1)
        };
        let missing = |name: &str| StoreError::Missing(format!("{PREFIX}{name}"));
        let word = CommitWord::from_fd(take(WORD).ok_or_else(|| missing(WORD))?)?;
        let record = take(RECORD).ok_or_else(|| missing(RECORD))?;
        let memory = (0..).map_while(|number| take(&format!("{MEMORY}{number}"))).collect();
        Ok(Some(Self { memory, word, record }))
    }
}

/// Descriptors in the manager's store, until the session is over.
#[derive(Debug)]
pub(super) struct Stored {
    names: Vec<String>,
}

impl Stored {
    /// Checks that there is a manager, and, as far as it can be seen, a store.
    pub fn check() -> Result<(), StoreError> {
        if std::env::var_os("NOTIFY_SOCKET").is_none() {
            return Err(StoreError::NoManager);
        }
        // Told since systemd 254.
        match std::env::var("FDSTORE") {
            Ok(most) if most == "0" => Err(StoreError::NoStore),
            _ => Ok(()),
        }
    }

    /// Gives `legacy` to the manager; returns when it has it. What is stored twice is there
    /// once.
    pub fn put(legacy: &Legacy) -> Result<Self, StoreError> {
        let mut names = Vec::new();
        let word_and_record =
            [(WORD.to_owned(), legacy.word().memfd()), (RECORD.into(), legacy.record().memfd())];
        let memory = legacy.memory().into_iter().enumerate();
        let memory = memory.map(|(number, file)| (format!("{MEMORY}{number}"), file));
        for (name, descriptor) in memory.chain(word_and_record) {
            let name = format!("{PREFIX}{name}");
            // A memfd never hangs up.
            let poll = NotifyState::Custom("FDPOLL=0");
            send(&[NotifyState::FdStore, NotifyState::FdName(&name), poll], &[descriptor])?;
            names.push(name);
        }
        barrier()?;
        Ok(Self { names })
    }

    /// The session is over: nobody goes on with it.
    pub fn remove(&self) -> Result<(), StoreError> {
        for name in &self.names {
            send(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)], &[])?;
        }
        barrier()
    }
}

fn send(state: &[NotifyState<'_>], descriptors: &[BorrowedFd<'_>]) -> Result<(), StoreError> {
    let failed = |source| StoreError::System { action: "send", source };
    if descriptors.is_empty() {
        return sd_notify::notify(state).map_err(failed);
    }
    sd_notify::notify_with_fds(state, descriptors).map_err(failed)
}

/// Waits until the manager has read all that was sent before: it closes what comes with it.
fn barrier() -> Result<(), StoreError> {
    let failed = |source: io::Error| StoreError::System { action: "wait for", source };
    let (ours, theirs) = io::pipe().map_err(failed)?;
    send(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
    drop(theirs);
    let deadline = Instant::now() + BARRIER_MAX;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(ours.as_fd(), PollFlags::empty())];
        match poll(&mut fds, timeout) {
            Ok(0) => return Err(failed(io::ErrorKind::TimedOut.into())),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

/// Tells the manager how the session stands, on a thread of its own: a manager that does not
/// read must not hold up a fault.
#[derive(Debug)]
pub(super) struct Teller(SyncSender<String>);

impl Teller {
    /// One, if there is a manager. Begins with saying that the service is up.
    pub fn start() -> Option<Self> {
        std::env::var_os("NOTIFY_SOCKET")?;
        let (teller, lines) = sync_channel(4);
        let tell = move || tell(&lines);
        std::thread::Builder::new().name("service".into()).spawn(tell).ok()?;
        Some(Self(teller))
    }

    /// Takes note of `event`. The watchdog is fed with these and not by a clock: they come
    /// from the thread that serves faults.
    pub fn hear(&self, event: &Event) {
        let Event::Progress(now) = event else { return };
        let (settled, pages) = (now.settled, now.pages);
        let status = match now.phase {
            Phase::Handshake => "connecting to the destination".to_owned(),
            phase => format!("{phase}: {settled} of {pages} pages are at the destination"),
        };
        // A manager that is slow misses one.
        let _ = self.0.try_send(status);
    }
}

fn tell(lines: &Receiver<String>) {
    let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 4);
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    let (mut told, mut fed, mut last) = (None::<Instant>, None::<Instant>, String::new());
    let due = |at: Option<Instant>, every| at.is_none_or(|at| at.elapsed() >= every);
    loop {
        let status = match lines.recv_timeout(Duration::from_secs(60)) {
            Ok(status) => status,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => break,
        };
        if watchdog.is_some_and(|every| due(fed, every)) {
            fed = Some(Instant::now());
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        }
        if status != last && due(told, STATUS_EVERY) {
            told = Some(Instant::now());
            let _ = sd_notify::notify(&[NotifyState::Status(&status)]);
            last = status;
        }
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
}
