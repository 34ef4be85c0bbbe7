//! An operator's end of the socket: one request, one answer.

use super::{ANSWER_BYTES_MAX, CLIENT_MAX, framed};
use crate::attach::socket::{Connection, SocketError, connect};
use crate::engine::operator::{Answer, Request};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long an answer may take; the VMM may be asked for it.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// How often a full queue of clients is tried.
const QUEUE_LOOK: Duration = Duration::from_millis(10);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens there.
    #[error("no session can be asked at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The conversation broke. What was asked for may have been done.
    #[error("the session did not answer; ask for its status")]
    Broke(#[from] SocketError),
    /// The answer is none.
    #[error("what answers there is no session of this version")]
    Answer(#[source] serde_json::Error),
}

/// Asks whoever serves the socket at `path`.
///
/// # Errors
/// If nobody is there, or answers.
pub fn ask(path: &Path, request: &Request) -> Result<Answer, AskError> {
    let deadline = Instant::now() + CLIENT_MAX;
    let stream = loop {
        match connect(path) {
            Ok(Some(stream)) => break stream,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(QUEUE_LOOK),
            Ok(None) => return Err(SocketError::Timeout.into()),
            Err(source) => return Err(AskError::Connect { path: path.to_owned(), source }),
        }
    };
    let mut connection = Connection::new(stream)?;
    let body = serde_json::to_vec(request).map_err(AskError::Answer)?;
    connection.send(&framed(&body), &[], CLIENT_MAX)?;
    let received = connection.receive(ANSWER_BYTES_MAX, ANSWER_MAX)?;
    let body = received.bytes.clone();
    let [] = received.descriptors::<0>()?;
    serde_json::from_slice(&body).map_err(AskError::Answer)
}
