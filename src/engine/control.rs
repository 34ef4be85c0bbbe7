//! The control stream: whole messages over one QUIC stream.

use crate::proto::message::{self, MessageError};
use quinn::{RecvStream, SendStream};
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// Why no further message came.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The link is gone.
    #[error("{0}")]
    Link(String),
    /// The peer sent what no honest peer sends.
    #[error(transparent)]
    Message(#[from] MessageError),
}

/// How long a peer may leave no room for a message. While a session waits for room it
/// hears nothing and keeps no time limit, so a peer that reads nothing is a lost link. Enough
/// for the largest state on a slow link, and no more than its restoring may take.
const ROOM_MAX: Duration = Duration::from_secs(30);
/// Messages of a peer that were read and not yet handled; the rest waits in the stream's
/// window. A hostile one would else fill this side's memory while it is busy.
const HEARD_MAX: usize = 8;

/// Bounds what was heard and not yet handled: a message holds a permit until then.
pub fn ear() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(HEARD_MAX))
}

/// Sends one message.
pub async fn say<M: Serialize>(stream: &mut SendStream, message: &M) -> Result<(), ControlError> {
    let written = stream.write_chunk(message::encode(message).into());
    match tokio::time::timeout(ROOM_MAX, written).await {
        Ok(written) => written.map_err(|error| ControlError::Link(super::link_words(error))),
        Err(_) => Err(ControlError::Link("the peer takes no messages".into())),
    }
}

/// Receives one message's body.
pub async fn hear(stream: &mut RecvStream) -> Result<Vec<u8>, ControlError> {
    let link = |error: quinn::ReadExactError| match error {
        quinn::ReadExactError::FinishedEarly(_) => {
            ControlError::Link("the peer ended the control stream".into())
        }
        quinn::ReadExactError::ReadError(error) => ControlError::Link(super::link_words(error)),
    };
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await.map_err(link)?;
    let mut body = vec![0; message::body_len(prefix)?];
    stream.read_exact(&mut body).await.map_err(link)?;
    Ok(body)
}
