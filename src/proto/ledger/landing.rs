//! Pages in somebody's hand, to be placed, and the iterator that takes them out
//! of the [`DestinationLedger`]; and what they are landed for. Placing them is the holder's business.

use super::DestinationLedger;
use super::state_table::is_word_border;
use crate::proto::page::{PageIndex, PageRun};
use std::fmt;

/// A run of pages that are the holder's alone to place.
///
/// Wake before [`placed`](Self::placed): a placing ioctl wakes by itself, but
/// not if it fails with EEXIST. When placing must be retried (EAGAIN), keep the
/// landing and retry. [`hand_back`](Self::hand_back) is for giving up, and
/// dropping a landing does the same; the ledger is then not full, and not
/// [`finish`](DestinationLedger::finish)ed, until somebody lands the pages again.
#[must_use = "a landing that is dropped hands its pages back, and who waits for them waits on"]
pub struct Landing<'a> {
    ledger: &'a DestinationLedger,
    run: PageRun,
    settled: bool,
}

impl<'a> Landing<'a> {
    /// The pages of `run`, which the caller has just taken in hand.
    pub(super) fn new(ledger: &'a DestinationLedger, run: PageRun) -> Self {
        Self { ledger, run, settled: false }
    }

    /// The pages to place.
    pub fn run(&self) -> PageRun {
        self.run
    }

    /// All pages are in place, and who waited for them was woken.
    pub fn placed(mut self) {
        self.settled = true;
        self.ledger.note_placed(self.run);
    }

    /// All pages are lost: they are marked so that whoever touches one gets a memory error,
    /// and who waited for them was woken.
    pub fn poisoned(mut self) {
        self.settled = true;
        self.ledger.note_poisoned(self.run);
    }

    /// The first `pages` pages are in place, and who waited for them was woken.
    /// Returns the others, still in hand; `None` if there are none.
    ///
    /// A number above that of the run, which no honest placement reports, is
    /// taken for no progress.
    pub fn placed_some(self, pages: u64) -> Option<Landing<'a>> {
        self.some(pages, Self::placed)
    }

    /// The same for pages that are [`poisoned`](Self::poisoned).
    pub fn poisoned_some(self, pages: u64) -> Option<Landing<'a>> {
        self.some(pages, Self::poisoned)
    }

    fn some(mut self, pages: u64, settle: fn(Self)) -> Option<Landing<'a>> {
        if pages == self.run.count() {
            settle(self);
            return None;
        }
        let first = self.run.first();
        let rest = self.run.count().checked_sub(pages);
        let rest = rest.and_then(|rest| PageRun::new(first.checked_add(pages)?, rest));
        if let (Some(done), Some(rest)) = (PageRun::new(first, pages), rest) {
            settle(Landing::new(self.ledger, done));
            self.run = rest;
        }
        Some(self)
    }

    /// Gives the pages up: they are missing again, those that were requested
    /// before or meanwhile are requested again, and those known to be zero still
    /// are. Nobody is woken. Their bytes come again only if the holder keeps them
    /// or the source resumes from a set without them; for zero pages, or if in
    /// doubt, wake the run: who waits then faults again.
    pub fn hand_back(self) -> PageRun {
        self.run
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        if !self.settled {
            self.ledger.note_handed_back(self.run);
        }
    }
}

impl fmt::Debug for Landing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Landing({:?})", self.run)
    }
}

/// The landings of a run, in rising order. Each is taken when it is asked for:
/// pages that the iterator has not come to are not in hand.
#[derive(Debug)]
#[must_use = "nothing is landed until it is asked for"]
pub struct Landings<'a> {
    ledger: &'a DestinationLedger,
    next: u64,
    end: u64,
    cargo: Cargo,
}

impl<'a> Landings<'a> {
    /// The landings of `run`, which is in range.
    pub(super) fn new(ledger: &'a DestinationLedger, run: PageRun, cargo: Cargo) -> Self {
        Self { ledger, next: run.first().get(), end: run.end(), cargo }
    }
}

impl<'a> Iterator for Landings<'a> {
    type Item = Landing<'a>;

    fn next(&mut self) -> Option<Landing<'a>> {
        while self.next < self.end {
            let taken = self.ledger.take(self.next, self.end, self.cargo);
            let first = self.next + taken.skipped;
            self.next = first + taken.count;
            if taken.count == 0 {
                continue;
            }
            // A stretch goes on over the border of a word if it begins at once.
            while self.next < self.end && is_word_border(self.next) {
                match self.ledger.take_at(self.next, self.end) {
                    0 => break,
                    more => self.next += more,
                }
            }
            let run = PageRun::new(PageIndex::new(first), self.next - first)?;
            return Some(Landing::new(self.ledger, run));
        }
        None
    }
}

/// What lands on pages.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cargo {
    Bytes,
    /// Nothing: pages are only held.
    Nothing,
}

/// The stretch that was taken in hand, and how many pages came before it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Taken {
    pub(super) skipped: u64,
    pub(super) count: u64,
}
