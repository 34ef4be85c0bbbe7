//! The engine: threads and wiring around the pure core.
//!
//! [`source::Migration`] and [`destination::Receiver`] each drive one session machine:
//! what happens on links, in the kernel and in the guest goes in as events, what the
//! machine wants done comes out as actions. The engine branches on no page's state;
//! that is the ledgers' business.
//!
//! | thread | source | destination |
//! |---|---|---|
//! | `urgent` | session machine, control stream, answers to page requests | session machine, control stream, faults in, requests out, demanded pages placed |
//! | `push-N` | pre-paging policy, claims, page frames | pushed pages placed |
//! | `guest` | pause, capture, resume (may block) | prepare, restore, resume (may block) |
//! | `zero-scan` | holes and zero pages, after the commit | |

pub mod attached;
mod config;
mod control;
pub mod destination;
pub mod event;
mod lane;
mod lost_pages;
pub mod operator;
mod outage;
mod process_figures;
mod room;
pub mod source;
pub mod vm;

pub use config::ConfigError;

/// Why a link ended, in the words of whoever ended it.
pub(crate) fn link_words(error: impl Into<crate::transport::TransportError>) -> String {
    match error.into() {
        crate::transport::TransportError::LinkLost { detail } => detail,
        error => error.to_string(),
    }
}

/// An error and its causes in one line.
pub(crate) fn error_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut line = String::new();
    for cause in causes.map(ToString::to_string) {
        // Some errors already say what their cause says.
        if !line.ends_with(&cause) {
            line = if line.is_empty() { cause } else { format!("{line}: {cause}") };
        }
    }
    line
}

/// Puts the calling thread ahead of ordinary ones, where that is allowed: between a
/// vCPU that waits and its page there should be no queue for a core.
fn hurry() {
    if let Err(error) = crate::transport::thread::prefer_this_thread() {
        tracing::debug!(%error, "no real-time priority for a thread that vCPUs wait for");
    }
}

/// Keeps the calling thread, which moves bulk, from holding up those that wake up on its core.
fn defer() {
    if let Err(error) = crate::transport::thread::take_short_turns() {
        tracing::debug!(%error, "no short time slices for a thread of a push lane");
    }
}
