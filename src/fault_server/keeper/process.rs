//! A keeper's life, from the hand-over to its end.

use super::super::record::{RecordFile, SessionRecord};
use super::supervisor::{Idle, Orders, Outputs, RestartCommand, Supervisor};
use super::{
    ARGUMENT, HAND_OVER_MAX, KeeperError, MESSAGE_MAX, OK, framed, system, take_standard_input,
};
use crate::attach::commit_word::CommitWord;
use crate::attach::handover::{MemoryFiles, check_region_files};
use crate::attach::message::{Paused, Status};
use crate::attach::server::{AttachedVm, Description, ServeEnd, Server};
use crate::attach::socket::{Connection, Received, SocketError};
use crate::failpoint::failpoint;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

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

/// The life of a keeper, which [`start`](super::start) has started with a socket as standard input. It
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
    let orders = connection.receive(MESSAGE_MAX, HAND_OVER_MAX)?;
    let prepared = || -> Result<_, KeeperError> {
        let (server, kept, word) = prepare(&path, record, memory)?;
        let supervisor = Supervisor::new(take(orders)?, kept.record.share()?, kept.idle.clone());
        Ok((server, kept, word, supervisor))
    };
    let (server, mut kept, word, mut supervisor) = match prepared() {
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
    Ok(server.keep(connection, &mut kept, word, &mut supervisor)?)
}

/// Leaves the session, the terminal and the process group of whoever started it; returns
/// the socket to it.
fn leave_home() -> Result<UnixStream, KeeperError> {
    // Fails only for the leader of a group, which is at home nowhere else.
    let _ = nix::unistd::setsid();
    let _ = nix::sys::prctl::set_name(c"postcopy-keeper");
    close_inherited().map_err(system("close what was inherited"))?;
    let socket = take_standard_input().map_err(system("take the socket over"))?;
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
    Ok((Server::bind(path)?, Kept { memory, record, idle: Idle::default() }, word))
}

/// What is to be started in a fault server's place, if something is.
fn take(orders: Received) -> Result<Option<Orders>, KeeperError> {
    let command = postcard::from_bytes(&orders.bytes);
    let command: Option<RestartCommand> = command.map_err(KeeperError::Orders)?;
    let Some(command) = command else {
        let [] = orders.descriptors()?;
        return Ok(None);
    };
    let [stdout, stderr] = orders.descriptors()?;
    Ok(Some(Orders { command, outputs: Outputs { stdout, stderr } }))
}

/// A guest of which only the memory is here.
struct Kept {
    memory: Vec<OwnedFd>,
    record: RecordFile,
    idle: Idle,
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
        Status { running: false, steps: 0, failure: self.idle.borrow().clone() }
    }

    fn reset_instruments(&mut self) -> Result<(), String> {
        Err(ONLY_MEMORY.into())
    }

    fn stop(&mut self) {}

    fn record(&self) -> Option<BorrowedFd<'_>> {
        Some(self.record.memfd())
    }
}
