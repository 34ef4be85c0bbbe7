//! The operator socket: a Unix socket at which a running session is inspected, redirected,
//! given up, or has its guest taken back.
//!
//! [`desk`] serves it, [`client`] asks. One request and one answer a connection, each a
//! `u32` length, little-endian, and as many bytes of JSON:
//! [`Request`](crate::engine::operator::Request) and
//! [`Answer`](crate::engine::operator::Answer). It is for the same user or root only, as
//! the attach socket is, whose framing it shares.
//!
//! Its threads are its own: a client that is silent, or slow, costs a session nothing.

pub mod client;
pub mod desk;

use std::path::{Path, PathBuf};
use std::time::Duration;

/// The most bytes of a request. A ticket's line fits in.
pub const REQUEST_BYTES_MAX: usize = 4096;
/// The most bytes of an answer.
pub const ANSWER_BYTES_MAX: usize = 64 << 10;
/// How long a client may take to say its request, or to take its answer.
pub const CLIENT_MAX: Duration = Duration::from_secs(2);
/// The most clients at a time; one more is let go without an answer.
pub const CLIENTS_MAX: usize = 8;

/// Where the source of the guest behind `control` is asked: the same name and `.operator`.
pub fn socket_path(control: &Path) -> PathBuf {
    let mut path = control.as_os_str().to_owned();
    path.push(".operator");
    path.into()
}

/// A message with its length.
fn framed(body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32).to_le_bytes(), body].concat()
}
