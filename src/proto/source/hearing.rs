//! What the destination says, by the state that the source is in.

use super::terms::name_of;
use super::{Link, Outcome, SourceAction, SourceSession, SourceState, lost_there};
use crate::proto::message::{ToDestination, ToSource};
use crate::proto::switchover::{Next, Planner};
use crate::proto::timeline::Stamp;
use std::time::Duration;

impl SourceSession {
    pub(super) fn message(&mut self, now: Duration, message: ToSource) {
        use SourceState as S;
        use ToSource as M;
        match (self.state, message) {
            (S::Negotiating, M::Accept { .. }) => {
                self.timeline.stamp(Stamp::Agreed, now);
                self.push(SourceAction::OpenLanes { epoch: self.epoch });
                match self.planner().map(Planner::next) {
                    Some(Next::Round) => self.begin_copying(),
                    _ => self.pause(now),
                }
            }
            (S::Copying | S::CopyingRest, M::Landed { pages }) => self.landed(now, pages),
            (S::Negotiating, M::Refuse(mismatch)) => {
                self.abort_reason = mismatch.to_string();
                self.finish_aborted(now);
            }
            (S::Blackout, M::Ready) => {
                self.timeline.stamp(Stamp::ReadySeen, now);
                self.push(SourceAction::WriteCommitWord);
                self.enter(S::Committing, Some(now + self.limits.restore));
            }
            (S::Committed | S::Brownout | S::Releasing, M::Placed { part, last })
                if self.link == Link::Reattaching =>
            {
                self.placed_part(now, &part, last);
            }
            (S::Committed, M::Running { .. }) => {
                self.timeline.stamp(Stamp::Running, now);
                self.push(SourceAction::ReleaseGuest);
                self.enter(S::Brownout, self.deadline);
            }
            // Said again after a lost link.
            (S::Brownout, M::Running { .. }) => {}
            (S::Brownout, M::Drained { settled }) if settled == self.pages => {
                self.timeline.stamp(Stamp::Drained, now);
                // Released is said when nothing is left that a crash could undo.
                self.push(SourceAction::ReleaseMemory);
                self.push(SourceAction::Say(ToDestination::Released));
                self.enter(S::Releasing, Some(now + self.limits.restore));
            }
            // Said again after a lost link: it may not have heard that it is released.
            (S::Releasing, M::Running { .. }) => {}
            (S::Releasing, M::Drained { settled }) if settled == self.pages => {
                self.push(SourceAction::Say(ToDestination::Released));
            }
            (S::Releasing, M::Report(report)) => {
                self.report = Some(report);
                self.complete(now);
            }
            // Sent by the engine, at any time.
            (S::CopyingRest, M::Progress { pushed_bytes, .. }) => {
                self.progressed(now, pushed_bytes);
            }
            (
                S::Copying
                | S::CopyingRest
                | S::Pausing
                | S::Blackout
                | S::Committing
                | S::Committed
                | S::Brownout
                | S::Releasing,
                M::Progress { .. } | M::WorkloadEnded | M::Pong(_),
            ) => {}
            // The destination has heard it, too, and nobody is in doubt.
            (S::Retracting, M::Abort { .. }) => self.finish_aborted(now),
            (S::Retracting, M::Lost { reason }) => {
                self.abort_reason.push_str(&format!("; the destination says: {reason}"));
                self.finish_aborted(now);
            }
            // The word, which is being written, decides what this means.
            (S::Committing, M::Lost { reason }) => self.lost = Some(reason),
            (S::Committed | S::Brownout, M::Lost { reason }) => {
                self.finish(now, Outcome::Lost(lost_there(&reason)));
            }
            // It is over; what matters is only that the guest is resumed.
            (S::Unpausing | S::Retracting, _) => {}
            (S::Committing | S::Committed | S::Brownout | S::Releasing, M::Abort { reason }) => {
                self.violated(now, format!("it wanted to abort after the commit: {reason}"));
            }
            (_, M::Abort { reason }) => {
                self.aborted_there(now, format!("the destination aborted: {reason}"));
            }
            (_, message) => {
                let name = name_of(&message);
                self.violated(now, format!("{name} does not belong into {:?}", self.state));
            }
        }
    }
}
