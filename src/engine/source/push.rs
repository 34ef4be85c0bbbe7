//! The source's push lanes: the pre-paging policy's suggestions, claimed late and
//! sent as page frames.

use super::copy::Round;
use super::serve::{FaultNote, SourceShared};
use crate::engine::lane::LaneError;
use crate::failpoint::failpoint;
use crate::proto::frame::{Origin, PageKind};
use crate::proto::pacing::Pacer;
use crate::proto::page::{PageIndex, PageRun};
use crate::proto::prepaging::{self, LinkState, Policy, Suggestion};
use crossbeam_channel::Receiver;
use quinn::{Connection, SendStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// How long an idle lane sleeps at most before it asks the policy again.
const IDLE: Duration = Duration::from_millis(20);

/// What the push lanes share beyond the source's common part.
#[derive(Debug)]
pub struct PushShared {
    /// The common part.
    pub source: Arc<SourceShared>,
    /// Decides what to push next.
    pub policy: Mutex<Box<dyn Policy>>,
    /// Decides how much may be outstanding.
    pub pacer: Mutex<Pacer>,
    /// Faults on their way to the policy.
    pub notes: Receiver<FaultNote>,
    /// Holes and zero pages found by the scan.
    pub zeros: Receiver<(PageRun, PageKind)>,
    /// Push lanes that share the window.
    pub lanes: u64,
    /// What is copied before the switchover.
    pub round: Round,
}

/// Locks for a few instructions; figures and hints survive a panic elsewhere.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl PushShared {
    /// Pushes on one lane until the link is gone. Never returns `Ok`.
    pub async fn push(
        &self,
        connection: &Connection,
        stream: &mut SendStream,
        epoch: u32,
    ) -> Result<(), LaneError> {
        loop {
            let window = lock(&self.pacer).window_bytes();
            connection.set_send_window((window / self.lanes).max(1));
            let busy = if !self.round.is_over() {
                let pages_max = lock(&self.pacer).run_pages();
                self.copy(stream, u64::from(pages_max), epoch).await?
            } else if let Ok((run, kind)) = self.zeros.try_recv() {
                self.push_zeros(stream, run, kind, epoch).await?;
                true
            } else if let Some(suggestion) = self.suggestion() {
                self.push_run(stream, suggestion, epoch).await?;
                true
            } else {
                false
            };
            if !busy {
                self.round.idle.notify_one();
                let _ = tokio::time::timeout(IDLE, self.source.push_wake.notified()).await;
                if let Some(error) = connection.close_reason() {
                    return Err(LaneError::lost(error));
                }
            }
        }
    }

    fn suggestion(&self) -> Option<Suggestion> {
        let mut policy = lock(&self.policy);
        for note in self.notes.try_iter() {
            match note {
                FaultNote::Network(fault) => policy.fault(fault),
                FaultNote::Late(fault) => policy.late_hit(fault),
            }
        }
        let (link, pages_max) = {
            let pacer = lock(&self.pacer);
            let (rtt, base_rtt) = (pacer.rtt(), pacer.base_rtt());
            (LinkState { rtt, base_rtt, rate_bps: pacer.rate_bps() }, pacer.run_pages())
        };
        policy.link(link);
        policy.next(&self.source.ledger, pages_max)
    }

    async fn push_run(
        &self,
        stream: &mut SendStream,
        suggestion: Suggestion,
        epoch: u32,
    ) -> Result<(), LaneError> {
        let origin = match suggestion.origin {
            prepaging::Origin::Push => Origin::Push,
            prepaging::Origin::Drain => Origin::Drain,
        };
        // Pages are sent from where they lie, so a frame's must lie in one piece.
        let (_, run) = self.source.ram.first_part(suggestion.run);
        failpoint!("source::before_push_claimed", return Err(broken()));
        let mut rest = Some(run);
        while let Some(run) = rest {
            let (part, kind) = self.source.known.first_part(run);
            if let Some(claim) = self.source.ledger.claim_within(part) {
                failpoint!("source::after_push_claimed", return Err(broken()));
                return match kind {
                    PageKind::Raw => self.source.send(stream, claim, origin, epoch).await,
                    kind => self.source.send_as(stream, claim, kind, origin, epoch).await,
                };
            }
            let left = run.end().saturating_sub(part.end());
            rest = PageRun::new(PageIndex::new(part.end()), left);
        }
        // Another lane or a request was faster: the policy is asked anew.
        Ok(())
    }

    async fn push_zeros(
        &self,
        stream: &mut SendStream,
        run: PageRun,
        kind: PageKind,
        epoch: u32,
    ) -> Result<(), LaneError> {
        failpoint!("source::before_zeros_claimed", return Err(broken()));
        while let Some(claim) = self.source.ledger.claim_within(run) {
            failpoint!("source::after_zeros_claimed", return Err(broken()));
            self.source.send_as(stream, claim, kind, Origin::Push, epoch).await?;
        }
        Ok(())
    }
}

#[cfg(feature = "failpoints")]
pub(super) fn broken() -> LaneError {
    LaneError::Link("a failpoint".into())
}
