//! [`Desk`]: a session's end of the operator socket.
//!
//! One thread waits for clients, and one for each client hears its request, asks the
//! session, and tells the answer; all have limits.

use super::{ANSWER_BYTES_MAX, CLIENT_MAX, CLIENTS_MAX, REQUEST_BYTES_MAX, framed};
use crate::attach::listener::{ListenError, PrivateListener};
use crate::attach::socket::{Connection, SocketError};
use crate::engine::operator::{Answer, Operator, Refusal, Request};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a path is tried at which somebody else still listens.
const AGAIN: Duration = Duration::from_millis(200);

/// An open operator socket. Its file goes when this is dropped.
#[derive(Debug)]
pub struct Desk {
    /// Its end tells the thread to end.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    /// Each client that has said its request holds one of the others.
    asking: Arc<()>,
}

/// Why there is no desk.
#[derive(Debug, thiserror::Error)]
pub enum DeskError {
    /// No socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// No thread, say.
    #[error("cannot serve the operator socket")]
    System(#[from] io::Error),
}

impl Desk {
    /// Serves `operator` at `path`.
    ///
    /// # Errors
    /// If there can be no socket, or another process listens there.
    pub fn open(path: &Path, operator: Operator) -> Result<Self, DeskError> {
        let listener = PrivateListener::bind(path)?;
        Self::start(move |stop, asking| serve(&listener, &operator, &stop, &asking))
    }

    /// The same, without waiting, and from when the path is free: a session that is over but
    /// for its last words may still be there. If there can be no socket, a warning says so, and
    /// it is tried again: it may be for want of descriptors.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn open_when_free(path: PathBuf, operator: Operator) -> Result<Self, DeskError> {
        Self::start(move |stop, asking| {
            let mut said = false;
            loop {
                match PrivateListener::bind(&path) {
                    Ok(listener) => return serve(&listener, &operator, &stop, &asking),
                    Err(ListenError::InUse(_)) => {}
                    Err(error) if !said => {
                        let why = crate::engine::error_chain(&error);
                        tracing::warn!(why, "no operator can ask this session anything so far");
                        said = true;
                    }
                    Err(_) => {}
                }
                let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
                let again = PollTimeout::try_from(AGAIN).unwrap_or(PollTimeout::NONE);
                if poll(&mut fds, again).is_ok_and(|ready| ready > 0) {
                    return;
                }
            }
        })
    }

    fn start(run: impl FnOnce(UnixStream, Arc<()>) + Send + 'static) -> Result<Self, DeskError> {
        let (ours, theirs) = UnixStream::pair()?;
        let asking = Arc::new(());
        let of_clients = asking.clone();
        let run = move || run(theirs, of_clients);
        let thread = std::thread::Builder::new().name("operator".into()).spawn(run)?;
        Ok(Self { stop: Some(ours), thread: Some(thread), asking })
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Whoever ended the session is to hear that it has ended.
        let deadline = Instant::now() + CLIENT_MAX;
        while Arc::strong_count(&self.asking) > 1 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Takes clients in until `stop` ends, or nobody can be waited for.
fn serve(listener: &PrivateListener, operator: &Operator, stop: &UnixStream, asking: &Arc<()>) {
    // Each client holds one of the others.
    let room = Arc::new(());
    loop {
        let mut fds = [
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return tracing::warn!(%error, "the operator socket is closed"),
        }
        if fds[0].any().unwrap_or(true) {
            return;
        }
        let connection = match listener.accept() {
            None => continue,
            Some(Ok(connection)) => connection,
            Some(Err(error)) => {
                tracing::warn!("operator not accepted: {}", crate::engine::error_chain(&error));
                continue;
            }
        };
        if Arc::strong_count(&room) > CLIENTS_MAX {
            tracing::warn!("too many operators at once; one was let go");
            continue;
        }
        let (operator, room, asking) = (operator.clone(), room.clone(), Arc::downgrade(asking));
        let attend = move || {
            if let Err(error) = attend(connection, &operator, &asking) {
                tracing::info!("operator dropped: {}", crate::engine::error_chain(&error));
            }
            drop(room);
        };
        if let Err(error) = std::thread::Builder::new().name("operator's".into()).spawn(attend) {
            tracing::warn!(%error, "no thread for an operator");
        }
    }
}

/// One client: a request, and its answer.
fn attend(
    mut connection: Connection,
    operator: &Operator,
    asking: &Weak<()>,
) -> Result<(), SocketError> {
    let received = connection.receive(REQUEST_BYTES_MAX, CLIENT_MAX)?;
    let _asking = asking.upgrade();
    let body = received.bytes.clone();
    let [] = received.descriptors::<0>()?;
    let answer = match serde_json::from_slice(&body) {
        Ok(request) => {
            let pid = connection.peer_pid().unwrap_or_default();
            let request: Request = request;
            tracing::info!(pid, request = request.name(), "an operator asks");
            operator.ask(request)
        }
        Err(error) => Answer::Refused(Refusal::Wrong { why: format!("no such request: {error}") }),
    };
    let body = serde_json::to_vec(&answer).unwrap_or_default();
    if body.len() > ANSWER_BYTES_MAX {
        let (bytes, max) = (body.len(), ANSWER_BYTES_MAX);
        return Err(SocketError::TooLong { bytes, max });
    }
    connection.send(&framed(&body), &[], CLIENT_MAX)
}
