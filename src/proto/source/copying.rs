//! Before the guest moves: rounds of copying, and the copying of what is left in the pause.
//!
//! A round ends when its pages have been handed to the links *and* have landed, so that no
//! two contents of a page are ever on their way. What was written meanwhile is asked for
//! then, so a page that is not named is at the destination as it is here.

use super::{SourceAction, SourceSession, SourceState};
use crate::proto::message::ToDestination;
use crate::proto::switchover::{Next, Planner, RoundSoFar};
use std::time::Duration;

/// How often a round is looked at while it is sent: pages that were written since it began
/// are left out of it from then on, and the planner may cut it short. Each look has the
/// guest's writes trapped anew.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How far copying is.
#[derive(Debug)]
pub(super) struct Copying {
    pub(super) planner: Planner,
    step: Step,
    /// Looks that were asked for and not answered.
    looks: u32,
    /// Pages sent so far, in all rounds.
    pages: u64,
    /// The round is cut short.
    cut: bool,
    /// Bytes that had landed when it was last told.
    progress: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The VMM is to remember what is written.
    Log,
    /// Pages are sent.
    Sending,
    /// They have not all landed.
    Landing,
    /// They have; what was written meanwhile is being asked for.
    Looking,
}

impl Copying {
    pub(super) fn new(planner: Planner) -> Self {
        Self { planner, step: Step::Log, looks: 0, pages: 0, cut: false, progress: 0 }
    }
}

impl SourceSession {
    /// Whether what is left is copied in the pause.
    pub(super) fn copies_rest(&self) -> bool {
        self.planner().is_some_and(|planner| *planner.next() == Next::StopAndCopy)
    }

    pub(super) fn begin_copying(&mut self) {
        self.push(SourceAction::StartDirtyLog);
        self.enter(SourceState::Copying, None);
    }

    pub(super) fn log_started(&mut self, now: Duration) {
        if self.copying.as_ref().is_some_and(|copying| copying.step == Step::Log) {
            self.start_round(now);
            if self.planner().is_some_and(Planner::is_ordered) {
                self.switch();
            }
        }
    }

    fn start_round(&mut self, now: Duration) {
        let Some(copying) = &mut self.copying else { return };
        (copying.step, copying.cut) = (Step::Sending, false);
        self.push(SourceAction::StartRound);
        self.enter(SourceState::Copying, Some(now + LOOK_EVERY));
    }

    pub(super) fn start_rest(&mut self, now: Duration) {
        let Some(copying) = &mut self.copying else { return };
        copying.step = Step::Sending;
        self.push(SourceAction::StartRound);
        self.enter(SourceState::CopyingRest, Some(now + self.limits.restore));
    }

    /// The operator wants the guest to move now: what is left follows it.
    pub(super) fn switch(&mut self) {
        let Some(copying) = self.copying.as_mut().filter(|_| self.state == SourceState::Copying)
        else {
            return;
        };
        copying.planner.move_now();
        if copying.step == Step::Sending && !copying.cut {
            copying.cut = true;
            self.push(SourceAction::CutRound);
        }
    }

    /// Who decides how the guest is moved, to be told of other limits.
    pub fn planner_mut(&mut self) -> Option<&mut Planner> {
        self.copying.as_mut().map(|copying| &mut copying.planner)
    }

    /// Time to look at the round, if it is still being sent.
    pub(super) fn look(&mut self) {
        let Some(copying) = &mut self.copying else { return };
        if copying.step == Step::Sending {
            copying.looks += 1;
            self.push(SourceAction::LookAtRound);
        }
    }

    pub(super) fn round_sent(&mut self, now: Duration, pages: u64) {
        let Some(copying) = self.copying.as_mut().filter(|of| of.step == Step::Sending) else {
            return;
        };
        (copying.step, copying.pages) = (Step::Landing, pages);
        self.push(SourceAction::Say(ToDestination::Copied { pages }));
        let limit = (self.state == SourceState::CopyingRest).then(|| now + self.limits.restore);
        self.enter(self.state, limit);
    }

    pub(super) fn landed(&mut self, now: Duration, pages: u64) {
        let Some(copying) = self.copying.as_mut().filter(|of| of.step == Step::Landing) else {
            return self.violated(now, "Landed comes unasked".into());
        };
        if pages != copying.pages {
            let why = format!("{pages} pages have landed there, of {} sent", copying.pages);
            return self.violated(now, why);
        }
        copying.step = Step::Looking;
        if self.state == SourceState::CopyingRest {
            return self.send_state(now);
        }
        copying.looks += 1;
        self.push(SourceAction::LookAtRound);
    }

    pub(super) fn looked(&mut self, now: Duration, round: RoundSoFar) {
        let Some(copying) = &mut self.copying else { return };
        copying.looks = copying.looks.saturating_sub(1);
        match copying.step {
            Step::Sending => {
                if !copying.cut && copying.planner.during(&round) {
                    copying.cut = true;
                    self.push(SourceAction::CutRound);
                }
                self.deadline = Some(now + LOOK_EVERY);
            }
            // The last look only is one at the whole round.
            Step::Looking if copying.looks == 0 => match copying.planner.after(round) {
                Next::Round => self.start_round(now),
                Next::PostCopy | Next::StopAndCopy => self.pause(now),
                Next::GiveUp(why) => self.abort(now, why),
            },
            Step::Log | Step::Landing | Step::Looking => {}
        }
    }

    /// The destination takes pages in: it is waited for.
    pub(super) fn progressed(&mut self, now: Duration, pushed_bytes: u64) {
        let Some(copying) = &mut self.copying else { return };
        if pushed_bytes > copying.progress {
            copying.progress = pushed_bytes;
            self.deadline = Some(now + self.limits.restore);
        }
    }

    /// A guest that is paused and whose state has not left is resumed.
    pub(super) fn resume_if_copying_rest(&mut self) {
        if self.state == SourceState::CopyingRest {
            self.push(SourceAction::ResumeGuest);
        }
    }
}
