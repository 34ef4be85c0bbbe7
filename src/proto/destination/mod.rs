//! The destination's session machine: from the first message to the last page.
//!
//! ```mermaid
//! stateDiagram-v2
//!   Waiting --> Preparing: Hello / make memory, VM, vCPUs, traps
//!   Preparing --> Agreed: prepared / Accept
//!   Agreed --> Agreed: Copied, Valid / pages that come before the state
//!   Agreed --> Restoring: State / restore
//!   Restoring --> InDoubt: restored / Ready
//!   InDoubt --> Starting: Commit / run the guest, or keep it paused
//!   Starting --> Running: a vCPU entered, or none is to / Running
//!   Running --> Full: no page is missing / Drained
//!   Full --> Over: Released / report
//!   InDoubt --> Over: Abort
//!   Running --> Over: the guest cannot go on / Lost
//!   Running --> Failed: the same, without a link
//!   Running --> Over: Reattach without a commit, which was undone / Lost
//!   Failed --> Over: Reattach / Lost
//!   Waiting --> Over: any failure up to Restoring leaves the guest at the source
//! ```
//!
//! In `InDoubt` this side cannot know whether the source committed: it neither runs
//! the guest nor forgets it, but waits for the source to come back. From `Starting`
//! on the guest is here; a lost link only stalls vCPUs that need a missing page. In
//! `Full` the source is still waited for: it would take the guest for lost if it never
//! heard that it has nothing more to give.
//!
//! A guest that cannot go on here, from `InDoubt` on, is lost: the source hears why, at
//! once or in `Failed` when it has come back, and does not look for this side in vain.
//!
//! The contract is that of the [source's machine](super::source), with the same rule
//! for links: only the connection that the machine was last told of, by its first
//! message, has a say. When the source comes back before the loss of the old link was
//! noticed, and [`may_reattach`](DestinationSession::may_reattach) says yes, `LinkLost`
//! is fed first and then the `Reattach`.

mod copied;
mod operator;
mod terms;

use copied::Copied;
pub use terms::{DestinationAction, DestinationEvent, DestinationState};

use super::message::{CommitRecord, SessionId, ToDestination, ToSource, cut};
use super::source::{Outcome, SessionLimits};
use super::timeline::{Stamp, Timeline};
use std::collections::VecDeque;
use std::time::Duration;

/// The destination's session machine.
#[derive(Debug)]
pub struct DestinationSession {
    state: DestinationState,
    session: Option<SessionId>,
    limits: SessionLimits,
    epoch: u32,
    linked: bool,
    released: bool,
    /// Whether the guest was paused by its user, and stays so.
    was_paused: bool,
    /// What comes before the machine state, if anything does.
    copied: Option<Copied>,
    /// Pages settled, once the ledger is full; it may be before the guest runs.
    full: Option<u64>,
    /// Why the guest cannot go on, in `Failed`.
    failure: String,
    deadline: Option<Duration>,
    actions: VecDeque<DestinationAction>,
    timeline: Timeline,
}

impl DestinationSession {
    /// A session whose first connection stands.
    pub fn new(limits: SessionLimits, now: Duration) -> Self {
        let mut timeline = Timeline::default();
        timeline.stamp(Stamp::Begin, now);
        Self {
            state: DestinationState::Waiting,
            session: None,
            limits,
            epoch: 0,
            linked: true,
            released: false,
            was_paused: false,
            copied: None,
            full: None,
            failure: String::new(),
            deadline: Some(now + limits.handshake),
            actions: VecDeque::new(),
            timeline,
        }
    }

    /// Where the session is.
    pub fn state(&self) -> DestinationState {
        self.state
    }

    /// The current link epoch.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Whether a link stands.
    pub fn linked(&self) -> bool {
        self.linked
    }

    /// Whether the guest is, or may be, this side's and no link stands: this side keeps all that
    /// it has and waits for the source to come back.
    pub fn paused(&self) -> bool {
        use DestinationState as S;
        let ours = matches!(self.state, S::InDoubt | S::Starting | S::Running | S::Full);
        ours && !self.linked
    }

    /// Whether a [`ToDestination::Reattach`] on a new connection is this session's,
    /// in a later epoch. If not, that connection is to be closed and nothing else: an
    /// attempt that comes late must not cost the link that stands.
    pub fn may_reattach(&self, session: SessionId, epoch: u32) -> bool {
        Some(session) == self.session && epoch > self.epoch && self.state != DestinationState::Over
    }

    /// When each step happened.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Takes in what happened at `now`.
    pub fn handle(&mut self, now: Duration, event: DestinationEvent) {
        use DestinationEvent as E;
        use DestinationState as S;
        if self.state == S::Over {
            return;
        }
        match (self.state, event) {
            (_, E::LinkLost(why)) => self.link_lost(now, why),
            (_, E::Timer) => self.timer(now),
            (_, E::Cancel(why)) => self.cancel(now, why),
            (_, E::GiveUp(why)) => self.given_up(now, why),
            (_, E::GuestFailed(why)) => self.guest_failed(now, why),

            (S::Preparing, E::Prepared) => {
                self.timeline.stamp(Stamp::Agreed, now);
                self.push(DestinationAction::OpenLanes { epoch: self.epoch });
                self.say(ToSource::Accept { version: super::message::PROTOCOL_VERSION });
                // The source pauses and captures first: its own time is not ours to limit
                // tightly.
                self.enter(S::Agreed, Some(now + self.limits.restore));
            }
            (S::Preparing, E::Refused(mismatch)) => {
                let why = mismatch.to_string();
                self.say(ToSource::Refuse(mismatch));
                self.finish_aborted(now, why);
            }
            (S::Restoring, E::Restored) => {
                self.timeline.stamp(Stamp::Restored, now);
                self.say(ToSource::Ready);
                self.enter(S::InDoubt, Some(now + self.limits.recovery));
            }
            (S::Restoring, E::RestoreFailed(why)) => self.abort(now, why),
            (S::Starting, E::Entered(at)) => {
                self.timeline.stamp(Stamp::Running, at);
                self.enter(S::Running, self.deadline);
                self.say_running();
                if let Some(settled) = self.full {
                    self.drained(now, settled);
                }
            }
            (S::Agreed, E::Landed { pages }) => self.say(ToSource::Landed { pages }),
            (S::Running, E::LedgerFull { settled }) => self.drained(now, settled),
            // Until the vCPUs run nobody is told: the guest may still stay at the source.
            (_, E::LedgerFull { settled }) => self.full = Some(settled),
            (S::Full, E::ReportReady(report)) if self.released => {
                self.say(ToSource::Report(report));
                self.finish(now, Outcome::Completed);
            }
            // A late echo of something asked for before.
            (
                _,
                E::Prepared
                | E::Refused(_)
                | E::Restored
                | E::RestoreFailed(_)
                | E::Entered(_)
                | E::ReportReady(_)
                | E::Landed { .. },
            ) => {}

            // Without a link only the first message of a new one counts; anything else
            // is left over from one that was given up.
            (_, E::Message(message))
                if !self.linked && !matches!(message, ToDestination::Reattach { .. }) => {}
            (_, E::Message(message)) => self.message(now, message),
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<DestinationAction> {
        self.actions.pop_front()
    }

    /// When [`DestinationEvent::Timer`] is due, if nothing happens before.
    pub fn timeout(&self) -> Option<Duration> {
        self.deadline
    }

    fn message(&mut self, now: Duration, message: ToDestination) {
        use DestinationState as S;
        use ToDestination as M;
        match (self.state, message) {
            (S::Waiting, M::Hello(hello)) => {
                self.session = Some(hello.session);
                self.copied = Copied::of(&hello);
                self.push(DestinationAction::Prepare(Box::new(hello)));
                self.enter(S::Preparing, None);
            }
            (S::Agreed, M::Copied { pages }) if self.copied.is_some() => {
                self.copies_on(now);
                self.push(DestinationAction::AwaitCopied { pages });
            }
            (S::Agreed, M::Valid { part, last }) => self.valid_part(now, &part, last),
            (S::Agreed, M::State { was_paused, state })
                if self.copied.as_ref().is_none_or(Copied::is_told) =>
            {
                self.was_paused = was_paused;
                self.timeline.stamp(Stamp::StateReceived, now);
                self.push(DestinationAction::Restore(state));
                self.enter(S::Restoring, None);
            }
            (S::InDoubt, M::Commit(record)) => self.committed(now, record),
            (
                S::InDoubt | S::Starting | S::Running | S::Full | S::Failed,
                M::Reattach { session, epoch, committed },
            ) => self.reattached(now, session, epoch, committed),
            (S::Full, M::Released) => {
                self.released = true;
                self.push(DestinationAction::MakeReport);
            }
            (_, M::Ping(token)) => {
                self.copies_on(now);
                self.say(ToSource::Pong(token));
            }
            (S::Starting | S::Running | S::Full, M::Abort { reason }) => {
                self.violated(now, format!("it wanted to abort after the commit: {reason}"));
            }
            (_, M::Abort { reason }) => {
                // The source waits to hear that nobody is in doubt.
                self.say(ToSource::Abort { reason: reason.clone() });
                self.finish_aborted(now, format!("the source aborted: {reason}"));
            }
            (_, message) => {
                let name = name_of(&message);
                self.violated(now, format!("{name} does not belong into {:?}", self.state));
            }
        }
    }

    fn committed(&mut self, now: Duration, record: CommitRecord) {
        if Some(record.session) != self.session {
            return self.violated(now, "the commit record names another session".into());
        }
        self.timeline.stamp(Stamp::Committed, now);
        self.push(match self.was_paused {
            false => DestinationAction::RunGuest,
            true => DestinationAction::KeepPaused,
        });
        self.enter(DestinationState::Starting, None);
    }

    fn reattached(
        &mut self,
        now: Duration,
        session: SessionId,
        epoch: u32,
        committed: Option<CommitRecord>,
    ) {
        if !self.may_reattach(session, epoch) {
            let why = format!("link epoch {epoch} of session {session} is not one to come back in");
            return self.violated(now, why);
        }
        if self.state == DestinationState::Failed {
            self.linked = true;
            return self.lost(now);
        }
        if committed.is_none() && self.state != DestinationState::InDoubt {
            if self.released {
                return self.violated(now, "it came back without the commit it had made".into());
            }
            self.linked = true;
            return self.revoked(now);
        }
        self.epoch = epoch;
        self.linked = true;
        self.deadline = None;
        self.push(DestinationAction::OpenLanes { epoch });
        self.push(DestinationAction::SendPlaced);
        match self.state {
            DestinationState::InDoubt => match committed {
                Some(record) => self.committed(now, record),
                None => self.deadline = Some(now + self.limits.recovery),
            },
            DestinationState::Running => self.say_running(),
            DestinationState::Full => {
                self.say_running();
                self.say_drained();
                self.deadline = Some(now + self.limits.recovery);
            }
            _ => {}
        }
    }

    fn drained(&mut self, now: Duration, settled: u64) {
        self.timeline.stamp(Stamp::Drained, now);
        self.full = Some(settled);
        self.push(DestinationAction::Unregister);
        self.say_drained();
        self.enter(DestinationState::Full, Some(now + self.limits.recovery));
    }

    fn say_drained(&mut self) {
        if let Some(settled) = self.full {
            self.say(ToSource::Drained { settled });
        }
    }

    fn say_running(&mut self) {
        let micros =
            |from, to| self.timeline.between(from, to).map_or(0, |time| time.as_micros() as u64);
        self.say(ToSource::Running {
            restore_us: micros(Stamp::StateReceived, Stamp::Restored),
            resume_us: micros(Stamp::Committed, Stamp::Running),
            held_us: micros(Stamp::StateReceived, Stamp::Running),
        });
    }

    fn link_lost(&mut self, now: Duration, why: String) {
        use DestinationState as S;
        // The loss that is known already, heard of in another way, extends no limit.
        if !std::mem::replace(&mut self.linked, false) {
            return;
        }
        match self.state {
            S::Waiting | S::Preparing | S::Agreed | S::Restoring => {
                self.finish_aborted(now, format!("the link was lost: {why}"));
            }
            // The source knows that nothing is missing: it will not come back.
            S::Full if self.released => self.finish(now, Outcome::Completed),
            S::InDoubt | S::Starting | S::Running | S::Full => {
                self.deadline = Some(now + self.limits.recovery);
            }
            S::Failed | S::Over => {}
        }
    }

    fn violated(&mut self, now: Duration, why: String) {
        let why = format!("the source broke the protocol: {why}");
        match self.state {
            DestinationState::InDoubt
            | DestinationState::Starting
            | DestinationState::Running
            | DestinationState::Full
            | DestinationState::Failed => {
                self.push(DestinationAction::DropLink(cut(why.clone())));
                self.link_lost(now, why);
            }
            _ => self.abort(now, why),
        }
    }

    fn timer(&mut self, now: Duration) {
        use DestinationState as S;
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        match self.state {
            S::Waiting => self.abort(now, "no proposal came in time".into()),
            S::Agreed => self.abort(now, "the machine state did not come in time".into()),
            S::InDoubt => {
                let why = "the source never said whether it committed; the guest did not run here";
                self.finish(now, Outcome::Lost(why.into()));
            }
            S::Starting | S::Running if !self.linked => {
                let why = "the link did not come back; pages of the guest are missing";
                self.finish(now, Outcome::Lost(why.into()));
            }
            S::Full => self.finish(now, Outcome::Completed),
            S::Failed => self.lost(now),
            S::Preparing | S::Restoring | S::Starting | S::Running | S::Over => {}
        }
    }

    fn cancel(&mut self, now: Duration, why: String) {
        use DestinationState as S;
        match self.state {
            S::Waiting | S::Preparing | S::Agreed | S::Restoring => self.abort(now, why),
            // The guest may be, or is, ours: it is not thrown away on a key press.
            S::InDoubt | S::Starting | S::Running | S::Full | S::Over => {}
            S::Failed => self.lost(now),
        }
    }

    fn guest_failed(&mut self, now: Duration, why: String) {
        use DestinationState as S;
        match self.state {
            S::Waiting | S::Preparing | S::Agreed | S::Restoring => self.abort(now, why),
            S::InDoubt | S::Starting | S::Running => {
                self.failure = why;
                if self.linked {
                    return self.lost(now);
                }
                self.enter(S::Failed, self.deadline);
            }
            // It has all its memory, or is given up already.
            S::Full | S::Failed | S::Over => {}
        }
    }

    fn lost(&mut self, now: Duration) {
        let why = std::mem::take(&mut self.failure);
        self.say(ToSource::Lost { reason: cut(why.clone()) });
        self.finish(now, Outcome::Lost(why));
    }

    fn abort(&mut self, now: Duration, why: String) {
        self.say(ToSource::Abort { reason: cut(why.clone()) });
        self.finish_aborted(now, why);
    }

    fn finish_aborted(&mut self, now: Duration, why: String) {
        self.push(DestinationAction::DropGuest);
        self.finish(now, Outcome::Aborted(why));
    }

    fn finish(&mut self, now: Duration, outcome: Outcome) {
        self.timeline.stamp(Stamp::End, now);
        self.push(DestinationAction::Finish(outcome));
        self.enter(DestinationState::Over, None);
    }

    fn say(&mut self, message: ToSource) {
        if self.linked {
            self.push(DestinationAction::Say(message));
        }
    }

    fn enter(&mut self, state: DestinationState, deadline: Option<Duration>) {
        self.state = state;
        self.deadline = deadline;
    }

    fn push(&mut self, action: DestinationAction) {
        self.actions.push_back(action);
    }
}

fn name_of(message: &ToDestination) -> &'static str {
    match message {
        ToDestination::Hello(_) => "Hello",
        ToDestination::State { .. } => "State",
        ToDestination::Commit(_) => "Commit",
        ToDestination::Reattach { .. } => "Reattach",
        ToDestination::Released => "Released",
        ToDestination::Abort { .. } => "Abort",
        ToDestination::Ping(_) => "Ping",
        ToDestination::Copied { .. } => "Copied",
        ToDestination::Valid { .. } => "Valid",
    }
}
