//! The destination's control messages, each with a failpoint before and behind it.

use crate::engine::control::{self, ControlError};
use crate::failpoint::failpoint;
use crate::proto::message::ToSource;
use quinn::SendStream;

/// Sends one message.
pub async fn say(stream: &mut SendStream, message: &ToSource) -> Result<(), ControlError> {
    match message {
        ToSource::Accept { .. } => failpoint!("destination::before_accept_sent", return lost()),
        ToSource::Refuse(_) => failpoint!("destination::before_refuse_sent", return lost()),
        ToSource::Ready => failpoint!("destination::before_ready_sent", return lost()),
        ToSource::Running { .. } => failpoint!("destination::before_running_sent", return lost()),
        ToSource::Placed { .. } => failpoint!("destination::before_placed_sent", return lost()),
        ToSource::Drained { .. } => failpoint!("destination::before_drained_sent", return lost()),
        ToSource::Report(_) => failpoint!("destination::before_report_sent", return lost()),
        ToSource::Abort { .. } => failpoint!("destination::before_abort_sent", return lost()),
        ToSource::Lost { .. } => failpoint!("destination::before_lost_sent", return lost()),
        ToSource::Landed { .. } => failpoint!("destination::before_landed_sent", return lost()),
        ToSource::Progress { .. } | ToSource::WorkloadEnded | ToSource::Pong(_) => {}
    }
    control::say(stream, message).await?;
    #[cfg(feature = "failpoints")]
    if !matches!(message, ToSource::Progress { .. } | ToSource::WorkloadEnded | ToSource::Pong(_)) {
        tokio::time::sleep(crate::failpoint::ON_ITS_WAY).await;
    }
    match message {
        ToSource::Accept { .. } => failpoint!("destination::after_accept_sent", return lost()),
        ToSource::Refuse(_) => failpoint!("destination::after_refuse_sent", return lost()),
        ToSource::Ready => failpoint!("destination::after_ready_sent", return lost()),
        ToSource::Running { .. } => failpoint!("destination::after_running_sent", return lost()),
        ToSource::Placed { .. } => failpoint!("destination::after_placed_sent", return lost()),
        ToSource::Drained { .. } => failpoint!("destination::after_drained_sent", return lost()),
        ToSource::Report(_) => failpoint!("destination::after_report_sent", return lost()),
        ToSource::Abort { .. } => failpoint!("destination::after_abort_sent", return lost()),
        ToSource::Lost { .. } => failpoint!("destination::after_lost_sent", return lost()),
        ToSource::Landed { .. } => failpoint!("destination::after_landed_sent", return lost()),
        ToSource::Progress { .. } | ToSource::WorkloadEnded | ToSource::Pong(_) => {}
    }
    Ok(())
}

#[cfg(feature = "failpoints")]
fn lost() -> Result<(), ControlError> {
    Err(ControlError::Link("a failpoint".into()))
}
