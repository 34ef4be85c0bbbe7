//! The control stream: whole messages over one QUIC stream.

use crate::proto::message::{self, MessageError};
use quinn::{RecvStream, SendStream};
use serde::Serialize;

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

/// Sends one message.
pub async fn say<M: Serialize>(stream: &mut SendStream, message: &M) -> Result<(), ControlError> {
    stream
        .write_chunk(message::encode(message).into())
        .await
        .map_err(|error| ControlError::Link(super::link_words(error)))
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
