//! The source's session machine: from the first connection to the last message.
//!
//! ```mermaid
//! stateDiagram-v2
//!   Connecting --> Negotiating: link up / Hello
//!   Negotiating --> Copying: Accept / rounds of pre-copy, if there are to be any
//!   Negotiating --> Pausing: Accept / pause the guest
//!   Copying --> Pausing: the planner has had enough / pause the guest
//!   Pausing --> CopyingRest: paused / copy what is left, if that is to be before
//!   CopyingRest --> Blackout: Landed / State
//!   Pausing --> Blackout: paused / State
//!   Blackout --> Committing: Ready / write the commit word
//!   Committing --> Committed: word written / Commit
//!   Committed --> Brownout: Running / the VMM may go
//!   Committed --> TakingBack: an operator, without a link / undo the commit
//!   TakingBack --> Retracting: undone / resume the guest, Abort
//!   TakingBack --> Committed: it cannot be
//!   Brownout --> Releasing: Drained / the memory may go, Released
//!   Releasing --> Over: Report, or nobody there any more to say it
//!   Connecting --> Over: any failure up to Pausing leaves the guest at the source
//!   Pausing --> Unpausing: a failure / the guest is resumed once it is paused
//!   Blackout --> Retracting: a failure / resume the guest, Abort
//!   Committing --> Retracting: not recorded / resume the guest, Abort
//!   Committing --> Retracting: the VMM had aborted already / Abort
//!   Retracting --> Over: Abort, or nobody there to say it
//! ```
//!
//! Before the commit word is written every failure aborts and the guest runs on at
//! the source. After it the guest is never resumed here: a lost link is replaced by
//! a new one, in a new link epoch, as long as the limits allow.
//!
//! A destination that was given the state may be in doubt whether the guest is its
//! own. So a source that aborts after that point resumes its guest at once, and then
//! stays a while to make sure that the destination hears of it.
//!
//! What comes from a link ([`SourceEvent::LinkUp`], `LinkLost`, `Message`,
//! `Violation`) is to be fed only while the epoch it was made for is the session's
//! [`epoch`](SourceSession::epoch): a link that was replaced, or given up by
//! `DropLink`, may still have something to say that would be taken for the new one's.
//!
//! The contract is quinn-proto's: `handle` takes what happened and when, then
//! `poll_action` is called until it returns `None`, then `timeout` tells when to
//! call `handle` with [`SourceEvent::Timer`] at the latest.

mod copying;
mod hearing;
mod operator;
mod recovery;
mod terms;

use copying::Copying;
pub use terms::{
    Outcome, RESERVING_PER_GIB, SessionLimits, SourceAction, SourceEvent, SourceState,
};

use crate::proto::message::{CommitRecord, FEATURE_COPY, Hello, SessionId, ToDestination, cut};
use crate::proto::placed::PlacedPages;
use crate::proto::switchover::{Planner, SwitchoverConfig};
use crate::proto::timeline::{Stamp, Timeline};
use std::collections::VecDeque;
use std::time::Duration;

/// The first time between the beginnings of two attempts to connect again; it doubles up to
/// [`SessionLimits::backoff_max`].
pub const BACKOFF_MIN: Duration = Duration::from_millis(10);

/// The link, as far as this side knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Up,
    /// A connection is being made.
    Dialing,
    /// Connected again and `Reattach` sent; the set of placed pages is coming in.
    Reattaching,
}

/// The source's session machine.
#[derive(Debug)]
pub struct SourceSession {
    state: SourceState,
    session: SessionId,
    hello: Option<Hello>,
    committed: Option<CommitRecord>,
    limits: SessionLimits,
    epoch: u32,
    link: Link,
    /// What has come of the set of placed pages, while it is coming.
    placed: Option<PlacedPages>,
    pages: u64,
    backoff: Duration,
    /// When the last attempt to connect again began, and how many there were since a link stood.
    dialed_at: Duration,
    attempts: u32,
    deadline: Option<Duration>,
    abort_reason: String,
    /// Why the destination gave the guest up, if it did while the commit was being made.
    lost: Option<String>,
    /// Why the link, or the last attempt to make another, came to its end.
    unlinked: String,
    /// The destination had every page before this process began.
    drained: bool,
    /// What is copied before the guest runs there, if anything is.
    copying: Option<Copying>,
    actions: VecDeque<SourceAction>,
    timeline: Timeline,
    report: Option<Vec<u8>>,
}

impl SourceSession {
    /// A session that is to propose `hello`.
    pub fn new(hello: Hello, limits: SessionLimits, now: Duration) -> Self {
        let mut machine = Self {
            state: SourceState::Connecting,
            session: hello.session,
            pages: hello.layout.pages(),
            hello: Some(hello),
            committed: None,
            limits,
            epoch: 0,
            link: Link::Dialing,
            placed: None,
            backoff: Duration::ZERO,
            dialed_at: Duration::ZERO,
            attempts: 0,
            deadline: Some(now + limits.handshake),
            abort_reason: String::new(),
            lost: None,
            unlinked: String::new(),
            drained: false,
            copying: None,
            actions: VecDeque::new(),
            timeline: Timeline::default(),
            report: None,
        };
        machine.timeline.stamp(Stamp::Begin, now);
        machine.push(SourceAction::Connect {
            epoch: 0,
            after: Duration::ZERO,
            answer_within: limits.handshake,
        });
        machine
    }

    /// The same, with memory copied before the guest runs at the destination, as `config` says.
    pub fn with_switchover(mut self, config: SwitchoverConfig) -> Self {
        if let Some(hello) = self.hello.as_mut().filter(|_| config.copies()) {
            hello.features |= FEATURE_COPY;
            self.copying = Some(Copying::new(Planner::new(config, self.pages)));
        }
        self
    }

    /// What was decided of the switchover, and why; `None` if there is nothing to decide.
    pub fn planner(&self) -> Option<&Planner> {
        self.copying.as_ref().map(|copying| &copying.planner)
    }

    /// Where the session is.
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// The migration's name.
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// The current link epoch.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Whether a link stands and the lanes are open.
    pub fn linked(&self) -> bool {
        self.link == Link::Up
    }

    /// Whether the guest is committed and no link stands: this side keeps all that it has and
    /// tries to connect again.
    pub fn paused(&self) -> bool {
        matches!(self.state, SourceState::Committed | SourceState::Brownout) && !self.linked()
    }

    /// How often it has tried to connect again since a link stood.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// When each step happened.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// The destination's part of the report, once it came.
    pub fn destination_report(&self) -> Option<&[u8]> {
        self.report.as_deref()
    }

    /// Takes in what happened at `now`.
    pub fn handle(&mut self, now: Duration, event: SourceEvent) {
        use SourceEvent as E;
        use SourceState as S;
        if self.state == S::Over {
            return;
        }
        match (self.state, event) {
            (S::Connecting, E::LinkUp) => self.propose(now),
            (S::Committed | S::Brownout | S::Releasing | S::Retracting, E::LinkUp)
                if self.link == Link::Dialing =>
            {
                self.reattach();
            }
            (_, E::LinkUp) => {}

            (_, E::LinkLost(why)) => self.link_lost(now, why),
            // Without a link these are left over from one that was given up.
            (_, E::Violation(_) | E::Message(_)) if self.link == Link::Dialing => {}
            (_, E::Violation(why)) => self.violated(now, why),
            (_, E::Timer) => self.timer(now),
            (_, E::Cancel(why)) => self.cancel(now, why),
            (_, E::Redirected) => self.redirected(now),
            (_, E::Switch) => self.switch(),
            (_, E::GiveUp(why)) => self.given_up(now, why),
            (_, E::TakeBack) => self.take_back(now),

            (S::Pausing, E::Paused) => self.paused_here(now),
            (S::Copying, E::DirtyLogStarted) => self.log_started(now),
            (S::Copying | S::CopyingRest | S::Blackout, E::DirtyLogFailed(why)) => {
                let why = format!("what the guest writes cannot be followed: {why}");
                self.abort(now, why);
            }
            (S::Copying | S::CopyingRest, E::RoundSent { pages }) => self.round_sent(now, pages),
            (S::Copying, E::Looked(round)) => self.looked(now, round),
            (S::Pausing, E::PauseFailed(why)) => {
                self.abort_reason = why;
                self.say_abort();
                self.finish_aborted(now);
            }
            (S::Unpausing, E::Paused) => {
                self.push(SourceAction::ResumeGuest);
                self.finish_aborted(now);
            }
            (S::Unpausing, E::PauseFailed(_)) => self.finish_aborted(now),
            (S::Blackout, E::StateSent) => self.timeline.stamp(Stamp::StateSent, now),
            (S::Committing, E::CommitWord(true)) => self.committed(now),
            (S::Committing, E::CommitWord(false)) if self.lost.is_some() => {
                // Nobody is left there to be told.
                let why = self.lost.take().unwrap_or_default();
                self.abort_reason = format!("the destination gave up: {why}");
                self.finish_aborted(now);
            }
            (S::Committing, E::CommitWord(false)) => {
                self.retract(now, "the VMM had already taken its guest back".into());
            }
            (S::Committing, E::CommitFailed(why)) => {
                let why = format!("the commit could not be recorded: {why}");
                self.push(SourceAction::ResumeGuest);
                match self.lost.take() {
                    Some(lost) => {
                        self.abort_reason = format!("{why}; the destination gave up: {lost}");
                        self.finish_aborted(now);
                    }
                    None => self.retract(now, why),
                }
            }
            (S::TakingBack, E::TakenBack) => self.taken_back(now),
            (S::TakingBack, E::TakeBackFailed(_)) => self.not_taken_back(now),
            // A late echo of something asked for before.
            (
                _,
                E::Paused
                | E::PauseFailed(_)
                | E::StateSent
                | E::CommitWord(_)
                | E::CommitFailed(_)
                | E::TakenBack
                | E::TakeBackFailed(_)
                | E::DirtyLogStarted
                | E::DirtyLogFailed(_)
                | E::RoundSent { .. }
                | E::Looked(_),
            ) => {}

            (_, E::Message(message)) => self.message(now, message),
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// When [`SourceEvent::Timer`] is due, if nothing happens before.
    pub fn timeout(&self) -> Option<Duration> {
        self.deadline
    }

    fn pause(&mut self, now: Duration) {
        self.timeline.stamp(Stamp::PauseAsked, now);
        self.push(SourceAction::PauseGuest);
        self.enter(SourceState::Pausing, None);
    }

    fn paused_here(&mut self, now: Duration) {
        self.timeline.stamp(Stamp::Captured, now);
        if self.copies_rest() {
            return self.start_rest(now);
        }
        self.send_state(now);
    }

    fn send_state(&mut self, now: Duration) {
        if self.copying.is_some() {
            self.push(SourceAction::SendValid);
        }
        self.push(SourceAction::SendState);
        self.enter(SourceState::Blackout, Some(now + self.limits.restore));
    }

    fn propose(&mut self, now: Duration) {
        self.link = Link::Up;
        let hello = self.hello.take().expect("a new session proposes once");
        let agree_by = now + self.limits.agreement(hello.layout.bytes());
        self.push(SourceAction::Say(ToDestination::Hello(hello)));
        self.enter(SourceState::Negotiating, Some(agree_by));
    }

    fn committed(&mut self, now: Duration) {
        self.timeline.stamp(Stamp::Committed, now);
        self.enter(SourceState::Committed, None);
        let record = CommitRecord { session: self.session, epoch: self.epoch };
        self.committed = Some(record);
        if let Some(why) = self.lost.take() {
            return self.finish(now, Outcome::Lost(lost_there(&why)));
        }
        if self.link == Link::Up {
            self.push(SourceAction::Say(ToDestination::Commit(record)));
            self.push(SourceAction::StartPush);
        } else {
            self.dial_again(now);
        }
    }

    fn violated(&mut self, now: Duration, why: String) {
        let why = format!("the destination broke the protocol: {why}");
        match self.state {
            SourceState::Retracting
            | SourceState::Committing
            | SourceState::Committed
            | SourceState::Brownout => {
                self.push(SourceAction::DropLink(cut(why.clone())));
                self.link_lost(now, why);
            }
            SourceState::Releasing => self.complete(now),
            SourceState::Unpausing | SourceState::TakingBack => {}
            _ => self.abort(now, why),
        }
    }

    fn timer(&mut self, now: Duration) {
        use SourceState as S;
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        match self.state {
            S::Connecting | S::Negotiating => self.abort(now, "the handshake took too long".into()),
            S::Blackout => {
                self.abort(now, "the destination did not restore the state in time".into());
            }
            S::Committed | S::Brownout => self.stayed_without_link(now),
            S::Copying => self.look(),
            S::CopyingRest => {
                self.abort(now, "the destination took no pages for too long".into());
            }
            S::Releasing => self.complete(now),
            S::Retracting => self.finish_aborted(now),
            S::Unpausing => {
                // A VMM that comes back after all finds that it is to resume.
                self.push(SourceAction::ResumeGuest);
                self.finish_aborted(now);
            }
            S::TakingBack => {
                let why = "its VMM did not say in time whether the guest is taken back: nobody \
                           knows whether it runs here";
                self.finish(now, Outcome::Lost(why.into()));
            }
            S::Committing => {
                let why = "its VMM did not say in time whether the commit is recorded; the \
                           guest is not resumed here";
                self.finish(now, Outcome::Lost(why.into()));
            }
            S::Pausing | S::Over => {}
        }
    }

    /// Ends a session before the commit, for a reason of this side; the guest is, or
    /// will be, running here.
    fn abort(&mut self, now: Duration, why: String) {
        if self.state == SourceState::Blackout {
            self.push(SourceAction::ResumeGuest);
            return self.retract(now, why);
        }
        self.abort_reason = why;
        self.say_abort();
        self.resume_if_copying_rest();
        self.unpause_and_finish(now);
    }

    /// As [`abort`](Self::abort), for a reason of the destination's: it knows.
    fn aborted_there(&mut self, now: Duration, why: String) {
        self.abort_reason = why;
        if self.state == SourceState::Blackout {
            self.push(SourceAction::ResumeGuest);
        }
        self.resume_if_copying_rest();
        self.unpause_and_finish(now);
    }

    fn unpause_and_finish(&mut self, now: Duration) {
        if self.state == SourceState::Pausing {
            return self.enter(SourceState::Unpausing, Some(now + self.limits.restore));
        }
        self.finish_aborted(now);
    }

    fn finish_aborted(&mut self, now: Duration) {
        let why = std::mem::take(&mut self.abort_reason);
        self.finish(now, Outcome::Aborted(why));
    }

    fn complete(&mut self, now: Duration) {
        self.finish(now, Outcome::Completed);
    }

    fn finish(&mut self, now: Duration, outcome: Outcome) {
        self.timeline.stamp(Stamp::End, now);
        self.push(SourceAction::Finish(outcome));
        self.enter(SourceState::Over, None);
    }

    fn enter(&mut self, state: SourceState, deadline: Option<Duration>) {
        self.state = state;
        self.deadline = deadline;
    }

    fn push(&mut self, action: SourceAction) {
        self.actions.push_back(action);
    }
}

/// The guest was given away by the commit: what is left of it here may not run.
fn lost_there(reason: &str) -> String {
    format!(
        "the guest cannot go on at the destination: {reason}; it is not resumed here, where \
         its memory is held until its VMM or keeper is told to let go"
    )
}
