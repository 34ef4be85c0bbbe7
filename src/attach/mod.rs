//! How a fault-server process attaches to a VMM's process on the same host.
//!
//! The VMM listens on a Unix socket ([`server`]); the fault-server connects
//! ([`client`]), gets the guest's memory and a commit word as memfds, and from
//! then on asks: pause, resume, let go. The memory thereby outlives the VMM's
//! process. [`message`] has the messages, [`socket`] carries them and their file
//! descriptors, [`handover`] says in which files a guest's memory lies,
//! [`keep`] is the server of a process
//! that has only the memory, and [`commit_word`] decides between "the guest has left" and "the guest stays". `docs/attach.md` shows the conversation on one page.
//!
//! It does not move pages, knows no guest (that is behind
//! [`AttachedVm`](server::AttachedVm)) and never crosses hosts.

pub mod client;
pub mod commit_word;
pub mod handover;
pub mod keep;
pub mod listener;
pub mod message;
pub mod server;
mod session;
pub mod socket;

/// The host's `CLOCK_MONOTONIC` in nanoseconds: the one clock that the VMM and
/// the fault-server share. [`message::Paused::paused_at_ns`] is a reading of it.
pub fn monotonic_ns() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    // The call fails only for an unknown clock or a bad pointer.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC exists");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

#[cfg(test)]
mod tests;
