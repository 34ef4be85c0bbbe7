//! How a lane ends: told to the session machine by whoever serves the lane.

use crate::proto::frame::FrameError;
use crate::transport::TransportError;

/// Why a lane ended.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The link is gone.
    #[error("{0}")]
    Link(String),
    /// The peer sent what no honest peer sends.
    #[error("{0}")]
    Violation(String),
    /// The kernel refused what must succeed; the guest is incomplete.
    #[error("{0}")]
    Local(String),
    /// This host has no memory for a page now; it may have some later.
    #[error("{0}")]
    NoMemory(String),
}

impl From<FrameError> for LaneError {
    fn from(error: FrameError) -> Self {
        Self::Violation(error.to_string())
    }
}

impl LaneError {
    /// The link is gone, in the words of whoever ended it.
    pub fn lost<E: Into<TransportError>>(error: E) -> Self {
        Self::Link(super::link_words(error))
    }
}
