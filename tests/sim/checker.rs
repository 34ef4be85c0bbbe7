//! The checker: what must hold, whatever the network and the processes do.
//!
//! It knows nothing of the session machines and the ledgers. It is told what could
//! be seen from outside (a guest starts or stops, a page is sent, placed, read or
//! written, a side ends) and keeps a model of its own: one version number a page.

use crate::network::Side;
use crate::vmm::{ABORTED, COMMITTED, RUNNING, TAKEN_BACK, UNDECIDED};
use postcopy::proto::source::Outcome;

#[derive(Debug)]
pub struct Checker {
    runs_at: Option<Side>,
    word: u64,
    /// What every page holds, as the guest's own writes say.
    model: Vec<u64>,
    /// The same, when the guest was paused for the switchover.
    at_pause: Option<Vec<u64>>,
    sent_in: Vec<Option<u32>>,
    placed: Vec<bool>,
    /// Which of them were when the destination told what it has, last.
    told_placed: Vec<bool>,
    /// The link epoch that the destination is in.
    epoch: u32,
    ran_at_destination: bool,
    guest_dropped: bool,
    vmm_died: bool,
    /// The source has told its VMM to resume the guest.
    given_back: bool,
    /// An operator said that the destination does not run the guest, and it did. What two
    /// guests do is not judged.
    two_guests: bool,
    outcomes: [Option<Outcome>; 2],
    failure: Option<String>,
}

impl Checker {
    /// A guest with these pages that runs at the source.
    pub fn new(memory: &[u64]) -> Self {
        Self {
            runs_at: Some(Side::Source),
            word: 0,
            model: memory.to_vec(),
            at_pause: None,
            sent_in: vec![None; memory.len()],
            placed: vec![false; memory.len()],
            told_placed: vec![false; memory.len()],
            epoch: 0,
            ran_at_destination: false,
            guest_dropped: false,
            vmm_died: false,
            given_back: false,
            two_guests: false,
            outcomes: [None, None],
            failure: None,
        }
    }

    /// The first thing that went wrong.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    pub fn fail(&mut self, what: impl Into<String>) {
        self.failure.get_or_insert(what.into());
    }

    /// Whether the guest is the destination's.
    fn committed(&self) -> bool {
        matches!(self.word, COMMITTED | RUNNING)
    }

    /// Whether an operator has taken the guest back after the commit.
    pub fn overridden(&self) -> bool {
        self.word == TAKEN_BACK
    }

    /// Whether it was wrong to do so.
    pub fn two_guests(&self) -> bool {
        self.two_guests
    }

    pub fn outcome(&self, side: Side) -> Option<&Outcome> {
        self.outcomes[side as usize].as_ref()
    }

    pub fn starts(&mut self, side: Side) {
        if let Some(other) = self.runs_at {
            if self.overridden() && other != side {
                self.two_guests = true;
            } else {
                self.fail(format!("the guest starts at the {side:?} and runs at the {other:?}"));
            }
        }
        match side {
            Side::Source if self.committed() => self.fail("the source resumes after the commit"),
            Side::Destination if !(self.committed() || self.overridden()) => {
                self.fail("the destination runs a guest that was not committed");
            }
            Side::Destination if self.ran_at_destination => self.fail("a second start"),
            Side::Destination if self.guest_dropped => self.fail("a dropped guest runs"),
            _ => {}
        }
        self.ran_at_destination |= side == Side::Destination;
        self.runs_at = Some(side);
        if side == Side::Source {
            self.at_pause = None;
        }
    }

    /// The source tells its VMM to resume the guest.
    pub fn gives_back(&mut self) {
        self.given_back = true;
    }

    /// The source's VMM dies; `true` if the guest ran there and is lost.
    pub fn vmm_dies(&mut self) -> bool {
        self.vmm_died = true;
        let lost = self.runs_at == Some(Side::Source);
        if lost {
            self.runs_at = None;
        }
        lost
    }

    /// The destination has taken up a link.
    pub fn links(&mut self, epoch: u32) {
        if epoch < self.epoch {
            self.fail(format!("link epoch {epoch} comes after {}", self.epoch));
        }
        self.epoch = epoch;
    }

    /// The destination tells the source which pages it has.
    pub fn tells_placed(&mut self) {
        self.told_placed.clone_from(&self.placed);
    }

    /// The destination takes pages in that came on a link.
    pub fn takes_frame(&mut self, epoch: u32) {
        if epoch != self.epoch {
            self.fail(format!("a frame of link epoch {epoch} is taken in {}", self.epoch));
        }
    }

    pub fn pauses(&mut self) {
        if self.runs_at != Some(Side::Source) {
            self.fail("a guest is paused that does not run at the source");
        }
        self.runs_at = None;
        self.at_pause = Some(self.model.clone());
    }

    pub fn writes_word(&mut self, value: u64) {
        let allowed = match value {
            COMMITTED | ABORTED => self.word == UNDECIDED,
            TAKEN_BACK | RUNNING => self.word == COMMITTED,
            _ => false,
        };
        if !allowed {
            self.fail(format!("the commit word goes from {} to {value}", self.word));
        }
        if value == COMMITTED && self.runs_at.is_some() {
            self.fail("a commit while the guest runs");
        }
        self.word = value;
    }

    pub fn reads(&mut self, side: Side, page: u64, seen: u64) {
        self.acts(side);
        let expected = self.model[page as usize];
        if seen != expected && !self.two_guests {
            self.fail(format!("the guest reads version {seen} of page {page}, not {expected}"));
        }
    }

    pub fn writes(&mut self, side: Side, page: u64, version: u64) {
        self.acts(side);
        self.model[page as usize] = version;
    }

    fn acts(&mut self, side: Side) {
        if self.runs_at != Some(side) && !self.two_guests {
            self.fail(format!("a vCPU acts at the {side:?}; the guest is at {:?}", self.runs_at));
        }
    }

    /// The restored devices read a page in the blackout.
    pub fn restore_reads(&mut self, page: u64, seen: u64) {
        // The source may have taken its guest back without the destination's knowing.
        let Some(frozen) = &self.at_pause else { return };
        if frozen[page as usize] != seen {
            self.fail(format!("restoring reads version {seen} of page {page}"));
        }
    }

    /// A page leaves the source; `version` is 0 for a page said to be zero.
    pub fn sends(&mut self, epoch: u32, page: u64, version: u64) {
        if self.given_back {
            self.fail(format!("page {page} is sent after the guest was given back"));
        }
        // Nothing that is sent after the word was aborted can ever count.
        if self.two_guests || matches!(self.word, ABORTED | TAKEN_BACK) {
            return;
        }
        match &self.at_pause {
            None => return self.fail(format!("page {page} is sent while its guest may run")),
            Some(frozen) if frozen[page as usize] != version => {
                return self.fail(format!("page {page} is sent with version {version}"));
            }
            Some(_) => {}
        }
        let before = self.sent_in[page as usize].replace(epoch);
        if before.is_some_and(|before| before >= epoch) {
            self.fail(format!("page {page} is sent in epoch {epoch} after {before:?}"));
        }
        if epoch > 0 && self.told_placed[page as usize] {
            self.fail(format!("page {page} is sent again, which the destination has"));
        }
    }

    /// A page becomes visible to the destination's guest.
    pub fn places(&mut self, page: u64, version: u64) {
        if std::mem::replace(&mut self.placed[page as usize], true) {
            self.fail(format!("page {page} is placed twice"));
        }
        if let Some(frozen) = &self.at_pause
            && frozen[page as usize] != version
        {
            self.fail(format!("page {page} is placed with version {version}"));
        }
    }

    /// The destination takes a page for zero that came before its guest.
    pub fn is_zero(&mut self, page: u64) {
        if self.at_pause.as_ref().is_some_and(|frozen| frozen[page as usize] != 0) {
            self.fail(format!("page {page} is placed with version 0"));
        }
    }

    pub fn drops_guest(&mut self) {
        self.guest_dropped = true;
        if self.runs_at == Some(Side::Destination) {
            self.fail("the destination drops a guest that runs there");
        }
    }

    /// The source's memory goes: nothing may be missing elsewhere.
    /// The VMM may exit from here on: a guest that does not run elsewhere is lost.
    pub fn releases_guest(&mut self) {
        if self.runs_at != Some(Side::Destination) {
            self.fail(format!("the VMM is let go while the guest runs at {:?}", self.runs_at));
        }
    }

    pub fn releases_memory(&mut self, missing: u64) {
        if (missing > 0 || self.runs_at != Some(Side::Destination)) && !self.two_guests {
            self.fail(format!("the source lets go while {missing} pages are missing"));
        }
    }

    /// `missing` pages are neither placed at the destination nor known to be zero.
    pub fn ends(&mut self, side: Side, outcome: Outcome, missing: u64) {
        if let Some(before) = &self.outcomes[side as usize] {
            let what = format!("the {side:?} ends with {outcome:?} after {before:?}");
            return self.fail(what);
        }
        match &outcome {
            Outcome::Completed if missing > 0 => {
                self.fail(format!("the {side:?} completes and {missing} pages are missing"));
            }
            Outcome::Aborted(_) if self.committed() => {
                self.fail(format!("the {side:?} ends aborted after the commit"));
            }
            Outcome::Completed if !self.ran_at_destination => {
                self.fail(format!("the {side:?} completes and no guest ran"));
            }
            _ => {}
        }
        let peer = &self.outcomes[side.peer() as usize];
        if let (Outcome::Completed, Some(Outcome::Aborted(_)))
        | (Outcome::Aborted(_), Some(Outcome::Completed)) = (&outcome, peer)
            && !self.overridden()
        {
            let what = format!("the {side:?} ends with {outcome:?}, its peer with {peer:?}");
            self.fail(what);
        }
        self.outcomes[side as usize] = Some(outcome);
    }

    /// Nothing happens any more: `source` and `destination` are the two memories.
    pub fn all_over(&mut self, source: &[u64], destination: &[Option<u64>]) {
        let committed = self.committed();
        let home = if committed { Side::Destination } else { Side::Source };
        if self.two_guests || (self.vmm_died && !committed) {
            return;
        }
        if self.runs_at != Some(home) {
            return self.fail(format!("at the end the guest is at {:?}", self.runs_at));
        }
        for (page, expected) in self.model.clone().into_iter().enumerate() {
            // What the destination never mapped reads as zero.
            let found = if committed { destination[page].unwrap_or(0) } else { source[page] };
            if found != expected {
                self.fail(format!("at the end page {page} holds {found}, not {expected}"));
            }
        }
    }
}
