//! The destination's ledger: every page is placed exactly once.
//!
//! `Missing -> Requested -> Placing -> Placed`, and pages known to be zero and
//! removed ones. `Placing` is exclusive: who lands a page has a
//! [`Landing`], which cannot be copied, and nobody else gets one until it is
//! placed or handed back. On memory that is written through an alias nothing
//! else keeps two threads from writing one page.
//!
//! # Why no wake-up is lost
//!
//! A page's whole state is four bits of one atomic word, and every change is one
//! compare-and-swap of that word. So all that happens to a page has one order,
//! and each pair of events needs only be looked at in both orders. The rule that
//! the caller keeps is that **[`Landing::placed`] is called after the waiters
//! were woken**: by the placing ioctl itself, or by a UFFDIO_WAKE where that
//! failed with EEXIST or was told not to wake.
//!
//! * *fault, then land.* The page is `Requested`, lands, and the ioctl wakes
//!   everybody whose event was read, for their wait began before it.
//! * *land, then fault.* The fault finds `Placing` and is told to wait. Its wait
//!   began before its event was read. If the ioctl comes after that, it wakes
//!   the waiter. If it came before, the wait began after it, and the kernel lets
//!   nobody sleep at a page that is mapped.
//! * *placed, then fault.* The event was read before the placement or crossed
//!   it, or the kernel has dropped the mapping since. It is answered
//!   [`Wake`](FaultAnswer::Wake), and waking once too often does no harm.
//! * *fault while in hand, then handed back.* The page goes back to `Requested`,
//!   not to `Missing`; the next landing wakes the waiter.
//! * *fault, then `mark_zero`.* The mark finds `Requested`, takes the page in
//!   hand and returns the landing: whoever marked places the zeros.
//! * *`mark_zero`, then fault.* The fault finds known zero, and whoever read it
//!   gets the landing. So a page that is zero is answered here, whichever came
//!   first, and whether or not the source answers the request, which it may find
//!   to be a late hit.
//! * *two faults.* One of them requests; the other waits. Two threads never both
//!   request a page.
//! * *land or `mark_zero`, twice.* The second finds the page `Placing` or later
//!   and skips it.
//! * *removed while in hand.* The page is `Removed`, whatever its placer does.
//!   If the guest's memory is unmapped after the placement, the next fault finds
//!   `Removed` and gets zeros; if before, the old bytes stay mapped, which a page
//!   that was given back may show.
//!
//! # What finishing means
//!
//! A known zero page over memory that was never written need not be placed:
//! once the memory is unregistered it reads as zero by itself. So it counts as
//! settled.
//!
//! A poisoned page, whose bytes the source could not read, is landed as any other and then
//! marked so that touching it is an error. It is settled: nothing better will come.

use super::landing::{Cargo, Landing, Landings, Taken};
use super::page_state::{Kind, OnFault, PageState, Refusal};
use super::state_table::{StateTable, StateWord, change_each_word, word_end};
use crate::proto::bitmap::AtomicBitmap;
use crate::proto::page::{PageIndex, PageRun};
use crate::proto::page_set::PageSet;
use crate::proto::sync::{AtomicU64, Ordering};
use std::fmt;

/// Which of a guest's pages are missing, requested, in hand and placed.
pub struct DestinationLedger {
    pages: u64,
    states: StateTable,
    duplicates: AtomicU64,
    unwanted: AtomicU64,
    /// Every page that was ever placed: kept apart from the states, to check them.
    witness: AtomicBitmap,
    placed_twice: AtomicU64,
}

/// Pages that the guest does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{run:?} reaches past the last of {pages} pages")]
pub struct OutOfRange {
    /// What was asked for.
    pub run: PageRun,
    /// How many pages there are.
    pub pages: u64,
}

/// What to do about a fault.
#[derive(Debug)]
#[must_use = "somebody stands still at the page"]
pub enum FaultAnswer<'a> {
    /// The page was missing and is requested now: ask the source for it.
    Request,
    /// It is requested already or in somebody's hand: its placement wakes.
    Wait,
    /// It is placed: wake whoever waits at it (UFFDIO_WAKE). Shared memory that
    /// is registered for minor faults needs more: the kernel may have dropped the
    /// mapping of a page that it keeps (reclaim does), and a mere wake-up would
    /// fault for ever. Map it again (UFFDIO_CONTINUE), and wake on EEXIST.
    Wake,
    /// It reads as zero: place zeros. If the page was removed before, it may
    /// turn out to be mapped (EEXIST): wake, and call it placed.
    Zero(Landing<'a>),
}

/// How many pages are in which state, and what went wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DestinationCounts {
    /// Neither here nor known to be zero, requested or not, in hand or not.
    pub missing: u64,
    /// Of the missing ones, those that somebody waits for.
    pub requested: u64,
    /// In place.
    pub placed: u64,
    /// Known to be zero, and not placed.
    pub zero: u64,
    /// Given back by the guest.
    pub removed: u64,
    /// Lost: whoever touches one gets a memory error.
    pub poisoned: u64,
    /// Being placed; each is in one of the numbers above, too.
    pub in_hand: u64,
    /// Pages that arrived again, ever; 0 unless a link was lost.
    pub duplicates: u64,
    /// Pages that arrived after the guest had given them back, ever.
    pub unwanted: u64,
    /// Pages that were placed over a placement, ever. It is counted apart from
    /// the states, to check them: it must be 0.
    pub placed_twice: u64,
}

/// Why the ledger is not full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{missing} pages are missing and {in_hand} are still being placed")]
pub struct Unfinished {
    /// Pages that are not settled.
    pub missing: u64,
    /// Pages in somebody's hand.
    pub in_hand: u64,
}

/// The proof that no page is missing and none is in hand. Only
/// [`DestinationLedger::finish`] makes one.
#[derive(Debug)]
#[must_use = "the proof is there to be told to the source"]
pub struct Drained {
    counts: DestinationCounts,
}

impl Drained {
    /// The counts at that time.
    pub fn counts(&self) -> DestinationCounts {
        self.counts
    }
}

impl DestinationLedger {
    /// A ledger of `pages` missing pages. It takes five bits a page.
    pub fn new(pages: u64) -> Self {
        Self {
            pages,
            states: StateTable::new(pages),
            duplicates: AtomicU64::new(0),
            unwanted: AtomicU64::new(0),
            witness: AtomicBitmap::new(pages),
            placed_twice: AtomicU64::new(0),
        }
    }

    /// How many pages the guest has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Somebody stands still at `page`: says what to do about it.
    ///
    /// # Errors
    /// [`OutOfRange`] if there is no such page.
    pub fn fault(&self, page: PageIndex) -> Result<FaultAnswer<'_>, OutOfRange> {
        let run = PageRun::single(page);
        self.check(run)?;
        let mut answer = OnFault::Wait;
        self.states.change(run, |state| {
            let (next, what) = state.fault();
            answer = what;
            next
        });
        Ok(match answer {
            OnFault::Request => FaultAnswer::Request,
            OnFault::Wait => FaultAnswer::Wait,
            OnFault::Wake => FaultAnswer::Wake,
            OnFault::Zero => FaultAnswer::Zero(Landing::new(self, run)),
        })
    }

    /// The bytes of `run` have arrived. Yields the maximal stretches of it that
    /// are the caller's to place; it skips, and counts, pages that are being
    /// placed or were placed before.
    ///
    /// # Errors
    /// [`OutOfRange`] if some of it is no page of the guest; then nothing is
    /// landed.
    pub fn land(&self, run: PageRun) -> Result<Landings<'_>, OutOfRange> {
        self.check(run)?;
        Ok(Landings::new(self, run, Cargo::Bytes))
    }

    /// Takes in hand what of `run` has not come, to hand it back: nobody lands there meanwhile.
    /// It counts nothing as come.
    ///
    /// # Errors
    /// [`OutOfRange`] if some of it is no page of the guest; then nothing is in hand.
    pub fn hold(&self, run: PageRun) -> Result<Landings<'_>, OutOfRange> {
        self.check(run)?;
        Ok(Landings::new(self, run, Cargo::Nothing))
    }

    /// The source says that the pages of `run` are zero. They are no longer
    /// missing, and faults on them are answered here. Returns those that
    /// somebody waits for already: the caller places zeros there now. Pages that
    /// are in hand or placed are counted as duplicates.
    ///
    /// # Errors
    /// [`OutOfRange`] if some of it is no page of the guest; then nothing has
    /// changed.
    pub fn mark_zero(&self, run: PageRun) -> Result<Vec<Landing<'_>>, OutOfRange> {
        self.check(run)?;
        let mut waited_for = PageSet::new();
        change_each_word(run, |run| {
            let (before, after) =
                self.states.change(run, |state| state.mark_zero().unwrap_or(state));
            let refused = before.any(run, |state| state.mark_zero().is_err());
            if !refused && !after.any(run, |state| state.placing) {
                return;
            }
            for (page, before) in before.pages(run) {
                if let Err(refusal) = before.mark_zero() {
                    self.refused(refusal);
                } else if after.get(page).placing {
                    waited_for.insert(PageRun::single(page));
                }
            }
        });
        Ok(waited_for.runs().map(|run| Landing::new(self, run)).collect())
    }

    /// The guest has given back the pages of `run`: they read as zero and are
    /// never fetched again. Returns those that somebody waits for: the caller
    /// places zeros there now.
    ///
    /// # Errors
    /// [`OutOfRange`] if some of it is no page of the guest; then nothing has
    /// changed.
    pub fn removed(&self, run: PageRun) -> Result<Vec<Landing<'_>>, OutOfRange> {
        self.check(run)?;
        let mut waited_for = PageSet::new();
        change_each_word(run, |run| {
            let (before, after) = self.states.change(run, PageState::remove);
            for (page, before) in before.pages(run) {
                if after.get(page).placing && !before.placing {
                    waited_for.insert(PageRun::single(page));
                }
            }
        });
        Ok(waited_for.runs().map(|run| Landing::new(self, run)).collect())
    }

    /// How many pages are not settled: they keep the ledger from being full.
    /// Constant time; what is under way may still be in it.
    pub fn missing(&self) -> u64 {
        self.states.unsettled()
    }

    /// Whether `page` is placed, removed, poisoned, or zero over clean memory; `false` if
    /// it is out of range.
    pub fn is_settled(&self, page: PageIndex) -> bool {
        page.get() < self.pages && self.states.get(page).is_settled()
    }

    /// Sets the bits of the pages that the source need not send again: placed, known
    /// to be zero, removed, and poisoned. `first`, whose bit is the lowest of the first word,
    /// is a multiple of 64; bits past the last page stay as they are.
    ///
    /// For a consistent answer nothing may be in hand that will be handed back; a page
    /// in hand is not in the set and would come twice.
    pub fn fill_placed(&self, first: PageIndex, bits: &mut [u64]) {
        self.states.fill(first.get(), bits, PageState::is_settled);
    }

    /// The pages that are lost: whoever touches one gets a memory error. It reads the
    /// whole ledger.
    pub fn poisoned_set(&self) -> PageSet {
        let mut set = PageSet::new();
        self.states.each(|page, state| {
            if state.kind == Kind::Poisoned {
                set.insert(PageRun::single(page));
            }
        });
        set
    }

    /// Whether there is content in `run`, and no page that is lost or that the guest gave
    /// back: the pages may be made one larger page.
    ///
    /// # Panics
    /// If the run is not in the layout.
    pub fn is_dense(&self, run: PageRun) -> bool {
        let mut placed = false;
        run.pages().map(|page| self.states.get(page).kind).all(|kind| {
            placed |= kind == Kind::Placed;
            !matches!(kind, Kind::Poisoned | Kind::Removed)
        }) && placed
    }

    /// As [`fill_placed`](Self::fill_placed), the pages that were asked for and are
    /// neither here nor in hand. After a lost link nobody is going to answer those
    /// requests, so they are to be made again. A fault that comes meanwhile requests
    /// its page itself.
    pub fn fill_requested(&self, first: PageIndex, bits: &mut [u64]) {
        self.states
            .fill(first.get(), bits, |state| state.kind == Kind::Requested && !state.placing);
    }

    /// How many pages are in which state. It reads the whole ledger (a word for
    /// every 16 pages), and is exact only while nothing changes.
    pub fn counts(&self) -> DestinationCounts {
        let mut counts = DestinationCounts {
            duplicates: self.duplicates.load(Ordering::Acquire),
            unwanted: self.unwanted.load(Ordering::Acquire),
            placed_twice: self.placed_twice.load(Ordering::Acquire),
            ..DestinationCounts::default()
        };
        self.states.each_stretch(|state, pages| {
            counts.in_hand += u64::from(state.placing) * pages;
            match state.kind {
                Kind::Missing => counts.missing += pages,
                Kind::Requested => {
                    counts.missing += pages;
                    counts.requested += pages;
                }
                Kind::Zero => counts.zero += pages,
                Kind::Placed => counts.placed += pages,
                Kind::Removed => counts.removed += pages,
                Kind::Poisoned => counts.poisoned += pages,
            }
        });
        counts
    }

    /// The proof that every page is settled and none is in hand, from reading the
    /// whole ledger; constant time while that is plainly not so.
    ///
    /// Faults may still be read afterwards, until the memory is unregistered;
    /// they are answered with a wake-up or with zeros.
    ///
    /// # Errors
    /// [`Unfinished`], with what is left; it can be asked again.
    pub fn finish(&self) -> Result<Drained, Unfinished> {
        let missing = self.missing();
        let in_hand = self.states.in_hand();
        if missing != 0 || in_hand != 0 {
            return Err(Unfinished { missing, in_hand });
        }
        // The counters say yes; the states have the last word.
        let counts = self.counts();
        match counts {
            DestinationCounts { missing: 0, in_hand: 0, .. } => Ok(Drained { counts }),
            DestinationCounts { missing, in_hand, .. } => Err(Unfinished { missing, in_hand }),
        }
    }

    fn check(&self, run: PageRun) -> Result<(), OutOfRange> {
        let pages = self.pages;
        if run.end() <= pages { Ok(()) } else { Err(OutOfRange { run, pages }) }
    }

    fn refused(&self, refusal: Refusal) {
        let counter = match refusal {
            Refusal::Duplicate => &self.duplicates,
            Refusal::Unwanted => &self.unwanted,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes in hand the first stretch of pages from `next` on that can be landed on, inside
    /// one word and before `end`; counts what `cargo` skips.
    pub(super) fn take(&self, next: u64, end: u64, cargo: Cargo) -> Taken {
        let end = word_end(next).min(end);
        let mut taken = Taken::default();
        let (before, _) = self.states.change_word(next, |before| {
            let landable = |page: &u64| before.get(PageIndex::new(*page)).land().is_ok();
            taken.skipped = (next..end).take_while(|page| !landable(page)).count() as u64;
            let first = next + taken.skipped;
            taken.count = (first..end).take_while(landable).count() as u64;
            landed(before, first, taken.count)
        });
        if let Cargo::Bytes = cargo {
            for page in (next..next + taken.skipped).map(PageIndex::new) {
                if let Err(refusal) = before.get(page).land() {
                    self.refused(refusal);
                }
            }
        }
        taken
    }

    /// As [`take`](Self::take), but only a stretch that begins at `next`; returns
    /// how many pages it has, and skips none.
    pub(super) fn take_at(&self, next: u64, end: u64) -> u64 {
        let end = word_end(next).min(end);
        let mut count = 0;
        self.states.change_word(next, |before| {
            let landable = |page: &u64| before.get(PageIndex::new(*page)).land().is_ok();
            count = (next..end).take_while(landable).count() as u64;
            landed(before, next, count)
        });
        count
    }

    /// The pages of `run` were in hand and are placed.
    pub(super) fn note_placed(&self, run: PageRun) {
        change_each_word(run, |part| {
            let (before, _) = self.states.change(part, PageState::placed);
            for (page, state) in before.pages(part) {
                // One that the guest gave back is rightly placed again.
                if !self.witness.set(page) && state.kind != Kind::Removed {
                    self.placed_twice.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }

    /// The pages of `run` were in hand and are marked as lost.
    pub(super) fn note_poisoned(&self, run: PageRun) {
        change_each_word(run, |part| {
            self.states.change(part, PageState::poisoned);
        });
    }

    /// The pages of `run` were in hand and are given up.
    pub(super) fn note_handed_back(&self, run: PageRun) {
        change_each_word(run, |part| {
            self.states.change(part, PageState::hand_back);
        });
    }
}

/// The word with `count` pages from `first` on in hand.
fn landed(mut word: StateWord, first: u64, count: u64) -> StateWord {
    for page in (first..first + count).map(PageIndex::new) {
        if let Ok(state) = word.get(page).land() {
            word.set(page, state);
        }
    }
    word
}

impl fmt::Debug for DestinationLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("DestinationLedger");
        debug.field("pages", &self.pages).field("missing", &self.missing()).finish_non_exhaustive()
    }
}
