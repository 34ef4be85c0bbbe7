//! After a lost link, or a process that died: what a session does to find the destination
//! again, to learn what it has, and to take a commit back.

use super::{BACKOFF_MIN, Link, Outcome, SessionLimits, SourceAction, SourceSession, SourceState};
use crate::proto::message::{CommitRecord, SessionId, ToDestination, cut};
use crate::proto::placed::PlacedPages;
use crate::proto::timeline::{Stamp, Timeline};
use std::collections::VecDeque;
use std::time::Duration;

/// Why a destination is told that the guest is not its own after a commit.
pub(super) const TAKEN_BACK: &str =
    "the source's operator took the guest back, which was not heard to run at the destination";
/// How long an attempt to connect again may be left without any answer.
const ANSWER: Duration = Duration::from_millis(300);
/// How long every [`PATIENT_EVERY`]th one may: the other side may only be busy. A peer that is
/// slower than this would not keep a link alive either.
const ANSWER_SLOW: Duration = Duration::from_millis(1200);
const PATIENT_EVERY: u32 = 4;

impl SourceSession {
    /// A session that was committed by a process that has died since: it connects in
    /// a link epoch after `last_epoch` and learns from the destination what is missing.
    pub fn recover(
        record: CommitRecord,
        last_epoch: u32,
        pages: u64,
        limits: SessionLimits,
        now: Duration,
    ) -> Self {
        let mut machine = Self::restarted(record.session, last_epoch, limits, now);
        machine.state = SourceState::Committed;
        machine.committed = Some(record);
        machine.pages = pages;
        machine.dial_again(now);
        machine
    }

    /// A session of which the process that died knew already that the destination has every
    /// page: there is nothing left to lose. It tells the destination so if it finds it, and
    /// ends completed whether or not it does.
    pub fn recover_drained(
        record: CommitRecord,
        last_epoch: u32,
        pages: u64,
        limits: SessionLimits,
        now: Duration,
    ) -> Self {
        let mut machine = Self::recover(record, last_epoch, pages, limits, now);
        machine.drained = true;
        machine.deadline = Some(now + limits.handshake);
        machine
    }

    /// A session whose process has died before the commit, once the VMM has taken its
    /// guest back (the commit word says so): it connects only to tell the destination,
    /// which may be in doubt, and ends aborted whether or not it gets through.
    pub fn recover_aborted(
        session: SessionId,
        last_epoch: u32,
        limits: SessionLimits,
        now: Duration,
    ) -> Self {
        let mut machine = Self::restarted(session, last_epoch, limits, now);
        machine.retract(now, "the fault-server died before the commit".into());
        machine
    }

    /// The same, of a session that was committed before an operator took the guest back.
    pub fn recover_taken_back(
        session: SessionId,
        last_epoch: u32,
        limits: SessionLimits,
        now: Duration,
    ) -> Self {
        let mut machine = Self::restarted(session, last_epoch, limits, now);
        machine.retract_taken_back(now);
        machine
    }

    /// What a process that has died leaves of its session: no link, and a name.
    pub(super) fn restarted(
        session: SessionId,
        last_epoch: u32,
        limits: SessionLimits,
        now: Duration,
    ) -> Self {
        let mut machine = Self {
            state: SourceState::Retracting,
            session,
            hello: None,
            committed: None,
            limits,
            epoch: last_epoch,
            link: Link::Dialing,
            placed: None,
            pages: 0,
            backoff: Duration::ZERO,
            dialed_at: Duration::ZERO,
            attempts: 0,
            deadline: None,
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
        machine
    }

    pub(super) fn reattach(&mut self) {
        self.link = Link::Reattaching;
        self.placed = None;
        self.push(SourceAction::Say(ToDestination::Reattach {
            session: self.session,
            epoch: self.epoch,
            committed: self.committed,
        }));
        if self.state == SourceState::Retracting {
            self.link = Link::Up;
            self.say_abort();
        }
    }

    pub(super) fn placed_part(&mut self, now: Duration, part: &[u8], last: bool) {
        let mut placed = self.placed.take().unwrap_or_else(|| PlacedPages::new(self.pages));
        let taken = placed.take(part).and_then(|()| if last { placed.complete() } else { Ok(()) });
        if let Err(error) = taken {
            return self.violated(now, format!("its set of placed pages: {error}"));
        }
        if !last {
            self.placed = Some(placed);
        } else {
            self.link = Link::Up;
            self.backoff = Duration::ZERO;
            self.attempts = 0;
            if self.state == SourceState::Releasing {
                // Drained follows, and is answered.
                return self.enter(self.state, Some(now + self.limits.restore));
            }
            self.deadline = None;
            self.push(SourceAction::ResumeLedger(placed));
            self.push(SourceAction::OpenLanes { epoch: self.epoch });
            self.push(SourceAction::StartPush);
        }
    }

    pub(super) fn link_lost(&mut self, now: Duration, why: String) {
        use SourceState as S;
        self.link = Link::Dialing;
        self.unlinked.clone_from(&why);
        match self.state {
            S::Connecting | S::Negotiating => self.abort(now, why),
            S::Copying | S::Pausing | S::CopyingRest => {
                self.abort(now, format!("the link was lost: {why}"));
            }
            S::Blackout => {
                self.push(SourceAction::ResumeGuest);
                self.retract(now, format!("the link was lost: {why}"));
            }
            S::Retracting => self.dial_again(now),
            // The word decides; the link is looked at after it.
            S::Committing | S::TakingBack => {}
            S::Committed | S::Brownout => self.dial_again(now),
            // The destination has all pages. It may not have heard that it is released, and
            // would wait for that; or it has, and is not there any more.
            S::Releasing => {
                let give_up = now + self.limits.handshake;
                self.deadline = Some(self.deadline.map_or(give_up, |at| at.min(give_up)));
                self.dial_again(now);
            }
            S::Unpausing | S::Over => {}
        }
    }

    /// The time is over in which a link had to come back.
    pub(super) fn stayed_without_link(&mut self, now: Duration) {
        if self.drained {
            // The destination needs nothing; only its report is missing.
            return self.complete(now);
        }
        let why = "the link did not come back after the commit";
        let why = match self.unlinked.as_str() {
            "" => why.to_owned(),
            last => format!("{why} (at last: {last})"),
        };
        self.finish(now, Outcome::Lost(why));
    }

    pub(super) fn dial_again(&mut self, now: Duration) {
        self.link = Link::Dialing;
        let most = if self.drained { self.limits.handshake } else { self.limits.recovery };
        self.deadline.get_or_insert(now + most);
        // A stored epoch may be any number; the destination refuses one that is not new.
        self.epoch = self.epoch.saturating_add(1);
        self.attempts = self.attempts.saturating_add(1);
        let epoch = self.epoch;
        // An attempt that was left without an answer has lasted longer than the pause: the
        // next one follows it at once.
        let pause = jittered(self.backoff, self.session, epoch);
        let begins = now.max(self.dialed_at + pause);
        self.dialed_at = begins;
        self.backoff = (self.backoff * 2).clamp(BACKOFF_MIN, self.limits.backoff_max);
        let patient = self.attempts.is_multiple_of(PATIENT_EVERY);
        let answer_within = if patient { ANSWER_SLOW } else { ANSWER };
        self.push(SourceAction::Connect { epoch, after: begins - now, answer_within });
    }

    /// The guest stays here, and the destination may be in doubt about that.
    pub(super) fn retract(&mut self, now: Duration, why: String) {
        self.abort_reason = why;
        self.enter(SourceState::Retracting, Some(now + self.limits.handshake));
        match self.link {
            Link::Up => self.say_abort(),
            Link::Dialing | Link::Reattaching => self.dial_again(now),
        }
    }

    pub(super) fn say_abort(&mut self) {
        if self.link == Link::Up {
            let reason = cut(self.abort_reason.clone());
            self.push(SourceAction::Say(ToDestination::Abort { reason }));
        }
    }
}

/// Between a half and all of `pause`, so that the sessions of many guests, whose links were
/// lost at once, do not all come back in the same moments. The chance is the session's name,
/// which was drawn at random: the same session waits the same times.
fn jittered(pause: Duration, session: SessionId, epoch: u32) -> Duration {
    let [low, high] = [0, 8].map(|at| {
        session.0[at..at + 8].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    });
    // splitmix64's last steps: every bit of its input has a say in every bit of the output.
    let mut mixed = low
        .wrapping_add(high.wrapping_mul(0xd6e8_feb8_6659_fd93))
        .wrapping_add(u64::from(epoch).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    pause / 2 + (pause / 2).mul_f64((mixed >> 11) as f64 / (1u64 << 53) as f64)
}
