//! What an operator may have done to the source's session, and what it does there.
//!
//! [`consequence`](SourceSession::consequence) says whether a command is possible and what
//! it costs; the events themselves do nothing in a state in which it is not.

use super::recovery::TAKEN_BACK;
use super::{Link, Outcome, SourceAction, SourceSession, SourceState};
use crate::proto::operator::{Command, Consequence, Risk, Whereabouts};
use crate::proto::switchover::Planner;
use std::time::Duration;

impl SourceSession {
    /// What follows from `command` now.
    ///
    /// # Errors
    /// Why it is not possible.
    pub fn consequence(&self, command: Command) -> Result<Consequence, &'static str> {
        match command {
            Command::Switch => self.switch_costs(),
            Command::Hold | Command::GoOn => self.hold_costs(),
            Command::Limit => self.limit_costs(),
            Command::Redirect => self.redirect_costs(),
            Command::GiveUp => self.give_up_costs(),
            Command::TakeBack => self.take_back_costs(),
        }
    }

    /// Where the guest is.
    pub fn whereabouts(&self) -> Whereabouts {
        use SourceState as S;
        match self.state {
            S::Connecting
            | S::Negotiating
            | S::Copying
            | S::Pausing
            | S::Unpausing
            | S::Retracting => Whereabouts::Source,
            S::CopyingRest | S::Blackout | S::Committing => Whereabouts::Nowhere,
            S::Committed | S::TakingBack => Whereabouts::InDoubt,
            S::Brownout | S::Releasing => Whereabouts::Destination,
            // How it ended says more.
            S::Over => Whereabouts::InDoubt,
        }
    }

    fn switch_costs(&self) -> Result<Consequence, &'static str> {
        use SourceState as S;
        match self.state {
            S::Copying if !self.planner().is_some_and(Planner::is_ordered) => {
                Ok(Consequence::harmless(
                    "the guest is paused and moves; what was not copied of its memory follows it",
                ))
            }
            S::Copying => Err("it is about to move"),
            S::Connecting | S::Negotiating => Err("the two sides have not agreed yet"),
            S::CopyingRest => Err("it is paused, and moves when what is left has been copied"),
            S::Over => Err("the session is over"),
            S::Unpausing | S::Retracting => Err("the migration is being aborted"),
            _ => Err("the guest has been paused already"),
        }
    }

    fn hold_costs(&self) -> Result<Consequence, &'static str> {
        use SourceState as S;
        match self.state {
            S::Copying => Ok(Consequence::harmless(
                "pages are copied, or not; the guest runs on at the source",
            )),
            S::Committed | S::Brownout => Ok(Consequence::harmless(
                "pages are pushed, or not; those that a vCPU waits for are sent in any case",
            )),
            S::CopyingRest => Err("the guest stands still until its memory has been copied"),
            S::Over => Err("the session is over"),
            S::Releasing => Err("the destination has all pages"),
            _ => Err("no pages are copied or pushed now"),
        }
    }

    fn limit_costs(&self) -> Result<Consequence, &'static str> {
        match self.state {
            SourceState::Over => Err("the session is over"),
            _ => Ok(Consequence::harmless("the new limits hold from now on")),
        }
    }

    fn redirect_costs(&self) -> Result<Consequence, &'static str> {
        use SourceState as S;
        match (self.state, self.link) {
            (S::Committed | S::Brownout | S::Retracting, Link::Dialing) => {
                Ok(Consequence::harmless("the destination is looked for there at once"))
            }
            (S::Committed | S::Brownout | S::Retracting, Link::Up | Link::Reattaching) => {
                let text = "the link that stands is kept; the destination is looked for there \
                            once it is lost";
                Ok(Consequence::harmless(text))
            }
            (S::TakingBack, _) => Err("the guest is being taken back"),
            (S::Releasing, _) => Err("the destination has all pages"),
            (S::Over, _) => Err("the session is over"),
            _ => Err("before the commit a session is not moved to another address; give it up, \
                      and start another one"),
        }
    }

    fn give_up_costs(&self) -> Result<Consequence, &'static str> {
        use SourceState as S;
        match self.state {
            S::Connecting
            | S::Negotiating
            | S::Copying
            | S::Pausing
            | S::CopyingRest
            | S::Blackout => Ok(Consequence::harmless(
                "the migration is aborted, and the guest runs on at the source",
            )),
            S::Retracting => Ok(Consequence::harmless(
                "the guest runs on at the source; a destination that is in doubt is not told, \
                 and gives up by itself",
            )),
            S::Committed => Ok(Consequence::risky(
                Risk::LoseTheGuest,
                "nobody serves the destination any more: if it runs the guest, it is lost there \
                 for want of memory. Its VMM here, if it is alive, still has it, paused and whole; \
                 nothing resumes it there but take-back",
            )),
            S::Brownout => Ok(Consequence::risky(
                Risk::LoseTheGuest,
                "the guest runs at the destination, and the pages that are still missing there are \
                 freed here: it stands still for ever at the first one that it touches, and is lost",
            )),
            S::Unpausing => Err("the migration is being aborted already"),
            S::Committing => Err("the commit is being recorded: ask again"),
            S::TakingBack => Err("the guest is being taken back: ask again"),
            S::Releasing => Err("the destination has all pages: there is nothing to give up"),
            S::Over => Err("the session is over"),
        }
    }

    fn take_back_costs(&self) -> Result<Consequence, &'static str> {
        use SourceState as S;
        match (self.state, self.link) {
            (S::Committed, Link::Dialing) => Ok(Consequence::risky(
                Risk::TwoRunningGuests,
                "the guest runs on at the source, from where it was paused, and a destination that \
                 comes back is told to drop it. If the destination runs it after all, there are two \
                 running guests that both believe to be the only one: make sure that its host is \
                 down or cut off for good, or that it has been given up there",
            )),
            (S::Committed, Link::Up | Link::Reattaching) => Err(
                "the destination is connected and about to run the guest: wait, or have it given \
                     up there first",
            ),
            (
                S::Connecting
                | S::Negotiating
                | S::Copying
                | S::Pausing
                | S::Unpausing
                | S::CopyingRest
                | S::Blackout,
                _,
            ) => Err("the guest was not committed: to give up leaves it running here"),
            (S::Committing, _) => Err("the commit is being recorded: ask again"),
            (S::Retracting, _) => Err("the guest runs here already"),
            (S::Brownout | S::Releasing, _) => {
                Err("the guest was heard to run at the destination: its VMM here may be gone, and \
                     the memory here is older than the guest")
            }
            (S::TakingBack, _) => Err("it is being taken back"),
            (S::Over, _) => Err("the session is over"),
        }
    }

    /// There is another address. The patience begins anew: somebody is at work.
    pub(super) fn redirected(&mut self, now: Duration) {
        use SourceState as S;
        let looks = matches!(self.state, S::Committed | S::Brownout | S::Retracting);
        if looks && self.link == Link::Dialing {
            self.deadline = None;
            self.backoff = Duration::ZERO;
            self.dial_again(now);
        }
    }

    pub(super) fn cancel(&mut self, now: Duration, why: String) {
        use SourceState as S;
        match self.state {
            S::Connecting
            | S::Negotiating
            | S::Copying
            | S::Pausing
            | S::CopyingRest
            | S::Blackout => self.abort(now, why),
            S::Retracting => self.finish_aborted(now),
            // Too late (or already on its way out): the guest is the destination's.
            S::Unpausing
            | S::Committing
            | S::Committed
            | S::TakingBack
            | S::Brownout
            | S::Releasing
            | S::Over => {}
        }
    }

    pub(super) fn given_up(&mut self, now: Duration, why: String) {
        use SourceState as S;
        match self.state {
            S::Connecting
            | S::Negotiating
            | S::Copying
            | S::Pausing
            | S::CopyingRest
            | S::Blackout
            | S::Retracting => {
                self.cancel(now, why);
            }
            S::Committed => {
                let why = format!(
                    "{why}, with the commit in doubt: if the destination runs the guest, it is \
                     lost there; its VMM here, if it is alive, has it paused"
                );
                self.push(SourceAction::DiscardMemory);
                self.finish(now, Outcome::Lost(why));
            }
            S::Brownout => {
                let why = format!(
                    "{why}, while the guest ran at the destination with pages missing: they are \
                     freed here"
                );
                self.push(SourceAction::DiscardMemory);
                self.finish(now, Outcome::Lost(why));
            }
            S::Unpausing | S::Committing | S::TakingBack | S::Releasing | S::Over => {}
        }
    }

    pub(super) fn take_back(&mut self, now: Duration) {
        if self.state == SourceState::Committed && self.link == Link::Dialing {
            self.push(SourceAction::TakeBackGuest);
            self.enter(SourceState::TakingBack, Some(now + self.limits.restore));
        }
    }

    /// The commit is undone: nothing says any more that the guest is the destination's.
    pub(super) fn taken_back(&mut self, now: Duration) {
        self.committed = None;
        self.push(SourceAction::ResumeGuest);
        self.retract_taken_back(now);
    }

    /// The commit stands, as before.
    pub(super) fn not_taken_back(&mut self, now: Duration) {
        self.enter(SourceState::Committed, None);
        self.dial_again(now);
    }

    /// Tells the destination, for as long as one that is away is waited for otherwise.
    pub(super) fn retract_taken_back(&mut self, now: Duration) {
        self.retract(now, TAKEN_BACK.into());
        self.deadline = Some(now + self.limits.recovery);
    }
}
