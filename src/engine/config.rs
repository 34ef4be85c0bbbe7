//! [`ConfigError`]: what is wrong with what a builder was told, by the field's name.

use crate::memory::ram::RamError;
use crate::memory::users::MemoryUserError;
use crate::proto::source::{BACKOFF_MIN, SessionLimits};
use crate::transport::lanes::{UDP_PAYLOAD_MAX, UDP_PAYLOAD_MIN};
use crate::transport::{LinkOptions, TransportError};
use std::fmt;
use std::time::Duration;

/// Why a builder builds nothing. Nothing was begun and the guest was not touched.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A field has a value that cannot be.
    #[error("{field}: {why}")]
    Field {
        /// The builder's method.
        field: &'static str,
        /// What is wrong with the value.
        why: String,
    },
    /// The guest's memory is of a kind that cannot be migrated.
    #[error("memory")]
    Memory(#[from] RamError),
    /// Something uses the guest's memory in a way that does not go with a migration.
    #[error("memory")]
    MemoryUser(#[from] MemoryUserError),
    /// The destination's ports, keys or ticket cannot be made.
    #[error("listen")]
    Listen(#[source] TransportError),
}

impl ConfigError {
    /// Something is wrong with `field`.
    pub(super) fn field(field: &'static str, why: impl fmt::Display) -> Self {
        Self::Field { field, why: why.to_string() }
    }
}

/// `value` must be within `from..=to`.
pub(super) fn check_range<T: PartialOrd + fmt::Display>(
    field: &'static str,
    value: T,
    from: T,
    to: T,
) -> Result<(), ConfigError> {
    if value < from || value > to {
        return Err(ConfigError::field(field, format!("{value} is not in {from} to {to}")));
    }
    Ok(())
}

/// The longest time limit of a session. Times are added up, so none may be without end.
const LIMIT_MAX: Duration = Duration::from_secs(24 * 3600);

/// A time limit of nothing would end every session at once.
pub(super) fn check_time(
    field: &'static str,
    time: Duration,
    most: Duration,
) -> Result<(), ConfigError> {
    if time.is_zero() {
        return Err(ConfigError::field(field, "it is zero"));
    }
    check_at_most(field, time, most)
}

fn check_at_most(field: &'static str, time: Duration, most: Duration) -> Result<(), ConfigError> {
    if time > most {
        return Err(ConfigError::field(field, format!("{time:?} is longer than {most:?}")));
    }
    Ok(())
}

/// When all that is left is pushed, if it is to be.
pub(super) fn check_drain_after(after: Option<Duration>) -> Result<(), ConfigError> {
    check_at_most("drain_after", after.unwrap_or_default(), LIMIT_MAX)
}

/// The time limits and link settings of either side.
pub(super) fn check_session(limits: &SessionLimits, link: &LinkOptions) -> Result<(), ConfigError> {
    check_time("limits.handshake", limits.handshake, LIMIT_MAX)?;
    check_time("limits.restore", limits.restore, LIMIT_MAX)?;
    check_time("limits.recovery", limits.recovery, LIMIT_MAX)?;
    if limits.backoff_max < BACKOFF_MIN {
        let why = format!("{:?} is shorter than {BACKOFF_MIN:?}", limits.backoff_max);
        return Err(ConfigError::field("limits.backoff_max", why));
    }
    check_at_most("limits.backoff_max", limits.backoff_max, LIMIT_MAX)?;
    check_time("link.handshake_timeout", link.handshake_timeout, LIMIT_MAX)?;
    check_time("link.keep_alive", link.keep_alive, LIMIT_MAX)?;
    check_at_most("link.idle_timeout", link.idle_timeout, LIMIT_MAX)?;
    if link.idle_timeout <= link.keep_alive {
        let why = "it is not longer than link.keep_alive: every quiet link would be lost";
        return Err(ConfigError::field("link.idle_timeout", why));
    }
    if let Some(mtu) = link.mtu_max {
        check_range("link.mtu_max", mtu, UDP_PAYLOAD_MIN, UDP_PAYLOAD_MAX)?;
    }
    Ok(())
}

/// A text that travels in one message must fit it.
pub(super) fn check_length(
    field: &'static str,
    bytes: usize,
    most: usize,
) -> Result<(), ConfigError> {
    if bytes > most {
        return Err(ConfigError::field(field, format!("{bytes} bytes are more than {most}")));
    }
    Ok(())
}
