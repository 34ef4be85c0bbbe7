//! The source's control messages, each with a failpoint before and behind it.

use crate::engine::control::{self, ControlError};
use crate::failpoint::failpoint;
use crate::proto::message::ToDestination;
use quinn::SendStream;

/// Sends one message.
pub async fn say(stream: &mut SendStream, message: &ToDestination) -> Result<(), ControlError> {
    match message {
        ToDestination::Hello(_) => failpoint!("source::before_hello_sent", return lost()),
        ToDestination::State { .. } => failpoint!("source::before_state_sent", return lost()),
        ToDestination::Commit(_) => failpoint!("source::before_commit_sent", return lost()),
        ToDestination::Reattach { .. } => {
            failpoint!("source::before_reattach_sent", return lost());
        }
        ToDestination::Released => failpoint!("source::before_released_sent", return lost()),
        ToDestination::Abort { .. } => failpoint!("source::before_abort_sent", return lost()),
        ToDestination::Copied { .. } => failpoint!("source::before_copied_sent", return lost()),
        ToDestination::Valid { .. } => failpoint!("source::before_valid_sent", return lost()),
        ToDestination::Ping(_) => {}
    }
    control::say(stream, message).await?;
    #[cfg(feature = "failpoints")]
    if !matches!(message, ToDestination::Ping(_)) {
        tokio::time::sleep(crate::failpoint::ON_ITS_WAY).await;
    }
    match message {
        ToDestination::Hello(_) => failpoint!("source::after_hello_sent", return lost()),
        ToDestination::State { .. } => failpoint!("source::after_state_sent", return lost()),
        ToDestination::Commit(_) => failpoint!("source::after_commit_sent", return lost()),
        ToDestination::Reattach { .. } => {
            failpoint!("source::after_reattach_sent", return lost());
        }
        ToDestination::Released => failpoint!("source::after_released_sent", return lost()),
        ToDestination::Abort { .. } => failpoint!("source::after_abort_sent", return lost()),
        ToDestination::Copied { .. } => failpoint!("source::after_copied_sent", return lost()),
        ToDestination::Valid { .. } => failpoint!("source::after_valid_sent", return lost()),
        ToDestination::Ping(_) => {}
    }
    Ok(())
}

#[cfg(feature = "failpoints")]
fn lost() -> Result<(), ControlError> {
    Err(ControlError::Link("a failpoint".into()))
}
