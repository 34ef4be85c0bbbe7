//! What outlives this process: that which the journal keeps; and when the drain is due, which is
//! counted through all the processes of a session.

use super::super::journal::Journal;
use super::super::push::lock;
use super::Driver;
use std::time::Duration;
use tracing::{info, warn};

impl Driver {
    /// Has the journal keep something, if there is one. The session goes on without.
    pub(super) fn keep(&mut self, what: impl FnOnce(&mut dyn Journal) -> std::io::Result<()>) {
        if let Some(journal) = &mut self.journal
            && let Err(error) = what(journal.as_mut())
        {
            warn!(%error, "no other process can go on with this session: its record is old");
        }
    }

    /// The guest is heard to run at the destination. A process before this one may have heard
    /// it already.
    pub(super) fn runs(&mut self, now: Duration) {
        if !std::mem::replace(&mut self.ran, true) {
            self.drain_at = self.config.drain_after.map(|after| now + after);
            self.keep(|journal| journal.guest_runs());
        }
    }

    /// Pushes all that is left from now on.
    pub(super) fn drain(&mut self, why: &str) {
        self.drain_at = None;
        info!(why, "draining");
        lock(&self.push.policy).drain();
        self.shared.push_wake.notify_one();
    }
}
