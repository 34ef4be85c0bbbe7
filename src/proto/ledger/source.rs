//! The source's ledger: every page is sent at most once in a link epoch.
//!
//! `Unsent -> Claimed -> Sent`. The urgent server and the pushers take pages
//! only here, by an atomic test-and-set, so one of them gets a page and the
//! others learn that it is on its way. A [`Claim`] is the permit to build page
//! frames; it cannot be copied. Claim late, when the frame can go out at once:
//! until then the urgent lane cannot have the page.
//!
//! # Epochs
//!
//! An aborted commit and a lost link void every claim made before. Each epoch
//! therefore has bits of its own, and a claim keeps those of the epoch that it
//! was made in: whatever becomes of an old claim, it can only mark bits that
//! nobody reads any more. The lock below guards nothing but the pointer to the
//! current epoch's bits, and is held to copy or to replace that pointer.
//!
//! What the ledger cannot do is to call back a frame. An old claim still permits
//! building one; so frames of an epoch go only to that epoch's connection
//! ([`Claim::epoch`] says which).

use super::LinkEpoch;
use crate::proto::bitmap::{AtomicBitmap, low_bits};
use crate::proto::page::{PageIndex, PageRun};
use crate::proto::placed::{PlacedError, PlacedPages};
use crate::proto::prepaging::Unsent;
use crate::proto::sync::{Arc, AtomicU64, Ordering, RwLock};
use std::fmt;
use std::sync::PoisonError;

/// What hands out claims: the [`SourceLedger`], and whatever stands in for it
/// where an engine is tested.
///
/// Only a ledger makes a [`Claim`], so an implementation that breaks the rule
/// on purpose (to see that a checker notices) is built from honest parts: asking
/// a second ledger when the first says no hands a page out twice.
pub trait Claims {
    /// Claims one page for the urgent lane; `None` if it is claimed or sent
    /// already (a late hit), or out of range.
    fn claim(&self, page: PageIndex) -> Option<Claim>;
    /// Claims the first maximal stretch of unsent pages inside `run`.
    fn claim_within(&self, run: PageRun) -> Option<Claim>;
    /// The first unsent page at or after `from`.
    fn next_unsent(&self, from: PageIndex) -> Option<PageIndex>;
    /// The last unsent page at or before `from`.
    fn prev_unsent(&self, from: PageIndex) -> Option<PageIndex>;
    /// How many pages are unsent.
    fn unsent(&self) -> u64;
    /// Whether `page` is unsent.
    fn is_unsent(&self, page: PageIndex) -> bool;
}

/// Which of a guest's pages are unsent, claimed and sent.
pub struct SourceLedger {
    pages: u64,
    current: RwLock<Arc<Epoch>>,
    sent_twice: Arc<AtomicU64>,
}

/// The bits of one link epoch.
struct Epoch {
    number: LinkEpoch,
    claimed: AtomicBitmap,
    sent: AtomicBitmap,
    /// The clear bits of `claimed`. Never below their true number, so that it
    /// cannot wrap: it falls after a claim and rises before a hand-back.
    unsent: AtomicU64,
    sent_count: AtomicU64,
    sent_twice: Arc<AtomicU64>,
}

/// How many pages are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceCounts {
    /// Neither claimed nor sent.
    pub unsent: u64,
    /// Claimed and not yet sent.
    pub claimed: u64,
    /// Sent in this epoch, or placed at the destination before it.
    pub sent: u64,
    /// Pages that were marked as sent although they were, since the ledger was
    /// made. It is counted apart from the claims, to check them: it must be 0.
    pub sent_twice: u64,
}

/// Pages of a guest that writes meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unwritten {
    /// Sent, and not written since.
    pub sent: u64,
    /// Unsent, and not written since.
    pub unsent: u64,
    /// Written, sent or not.
    pub written: u64,
}

/// An epoch that is not later than the ledger's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{asked} is not later than the ledger's {current}")]
pub struct StaleEpoch {
    /// The epoch that was to begin.
    pub asked: LinkEpoch,
    /// The ledger's epoch.
    pub current: LinkEpoch,
}

/// Why a ledger does not resume.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError {
    /// The epoch is not a new one.
    #[error("the source ledger cannot resume")]
    StaleEpoch(#[from] StaleEpoch),
    /// Parts of the set of placed pages are missing.
    #[error("the set of placed pages is not whole")]
    NotWhole(#[from] PlacedError),
    /// The set of placed pages is that of another guest.
    #[error("the set of placed pages is that of {theirs} pages; the guest has {pages}")]
    OtherGuest {
        /// The set's.
        theirs: u64,
        /// The ledger's.
        pages: u64,
    },
}

impl SourceLedger {
    /// A ledger of `pages` unsent pages, in the first epoch. It takes two bits a
    /// page, and as much again while claims of an older epoch are about.
    pub fn new(pages: u64) -> Self {
        let sent_twice = Arc::new(AtomicU64::new(0));
        let epoch = Epoch::new(LinkEpoch::FIRST, PlacedPages::new(pages), sent_twice.clone());
        Self { pages, current: RwLock::new(Arc::new(epoch)), sent_twice }
    }

    /// How many pages the guest has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The current epoch.
    pub fn epoch(&self) -> LinkEpoch {
        self.current().number
    }

    /// Claims one page on demand. `None` if it is claimed or sent already (a
    /// late hit: the answer is on its way) or out of range.
    pub fn claim(&self, page: PageIndex) -> Option<Claim> {
        let epoch = self.current();
        epoch.claimed.set(page).then(|| Claim::new(epoch, PageRun::single(page)))
    }

    /// Claims the first maximal stretch of unsent pages inside `run`, by one
    /// atomic operation for every 64 of them; `None` if there is none.
    pub fn claim_within(&self, run: PageRun) -> Option<Claim> {
        let epoch = self.current();
        let stretch = epoch.claimed.take_clear_stretch(run)?;
        Some(Claim::new(epoch, stretch))
    }

    /// How many pages are unsent: not claimed. Constant time; a claim or a
    /// hand-back under way may not be in it yet, which makes it too high, never
    /// too low.
    pub fn unsent(&self) -> u64 {
        self.current().unsent.load(Ordering::Acquire)
    }

    /// Whether `page` is unsent; `false` if it is out of range.
    pub fn is_unsent(&self, page: PageIndex) -> bool {
        page.get() < self.pages && !self.current().claimed.is_set(page)
    }

    /// The first unsent page at or after `from`. It reads a word for every 64
    /// pages that it passes.
    pub fn next_unsent(&self, from: PageIndex) -> Option<PageIndex> {
        self.current().claimed.next_clear(from)
    }

    /// The last unsent page at or before `from`.
    pub fn prev_unsent(&self, from: PageIndex) -> Option<PageIndex> {
        self.current().claimed.prev_clear(from)
    }

    /// How many pages are in which state. Constant time, and like
    /// [`unsent`](Self::unsent) it lags behind what is under way.
    pub fn counts(&self) -> SourceCounts {
        let epoch = self.current();
        // In this order a page on its way through the states is counted as
        // claimed, and the sum is always right.
        let sent = epoch.sent_count.load(Ordering::Acquire);
        let unsent = epoch.unsent.load(Ordering::Acquire);
        let claimed = self.pages.saturating_sub(sent).saturating_sub(unsent);
        SourceCounts { unsent, claimed, sent, sent_twice: self.sent_twice.load(Ordering::Acquire) }
    }

    /// Before the switchover: all pages are unsent again but those that were sent and not
    /// `written` since; that is asked for each 64 pages in rising order, lowest bit first. Returns
    /// the pages that stay sent. The epoch goes on. No claim of it may be out: its pages
    /// would be sent twice.
    pub fn keep_unwritten(&self, mut written: impl FnMut(u64) -> u64) -> PlacedPages {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let sent = (0..).zip(current.sent.loads()).map(|(index, sent)| sent & !written(index));
        let kept = PlacedPages::of_words(self.pages, sent.collect());
        *current = Arc::new(Epoch::new(current.number, kept.clone(), self.sent_twice.clone()));
        kept
    }

    /// Before the switchover: how many pages are sent, and how many unsent, without those
    /// that are `written`, which is asked for as by [`keep_unwritten`](Self::keep_unwritten).
    pub fn count_unwritten(&self, mut written: impl FnMut(u64) -> u64) -> Unwritten {
        let epoch = self.current();
        let mut counts = Unwritten::default();
        for (index, (sent, claimed)) in (0..).zip(epoch.sent.loads().zip(epoch.claimed.loads())) {
            let written = written(index);
            let here = low_bits(self.pages - index * 64);
            counts.written += u64::from((written & here).count_ones());
            counts.sent += u64::from((sent & !written).count_ones());
            counts.unsent += u64::from((!claimed & !written & here).count_ones());
        }
        counts
    }

    /// Begins `epoch` with every page unsent: the commit was aborted, nothing of
    /// what was sent counts, and outstanding claims no longer mark anything.
    ///
    /// # Errors
    /// [`StaleEpoch`] if `epoch` is not later than the current one; then nothing
    /// has changed.
    pub fn void(&self, epoch: LinkEpoch) -> Result<(), StaleEpoch> {
        self.begin(epoch, PlacedPages::new(self.pages)).map(|_| ())
    }

    /// Begins `epoch` after a lost link: the pages in `placed` are sent, all
    /// others unsent. Returns how many pages will be sent again: those that were
    /// marked as sent and did not arrive.
    ///
    /// The destination owns the guest by now, so its word on what it has is
    /// taken: it may name pages that were never sent (the guest gave them back).
    ///
    /// # Errors
    /// [`ResumeError`] if `epoch` is not later than the current one, or `placed`
    /// is not whole or another guest's; then nothing has changed.
    pub fn resume_from(&self, placed: PlacedPages, epoch: LinkEpoch) -> Result<u64, ResumeError> {
        if placed.pages() != self.pages {
            return Err(ResumeError::OtherGuest { theirs: placed.pages(), pages: self.pages });
        }
        placed.complete()?;
        let again = self.current().sent.count_set_beside(placed.words());
        self.begin(epoch, placed)?;
        Ok(again)
    }

    /// Replaces the current epoch by one in which the pages of `sent` are sent;
    /// returns the old one.
    fn begin(&self, number: LinkEpoch, sent: PlacedPages) -> Result<Arc<Epoch>, StaleEpoch> {
        let stale = |current| StaleEpoch { asked: number, current };
        if self.epoch() >= number {
            return Err(stale(self.epoch()));
        }
        // The bits are made outside the lock; so whether the epoch is still a
        // new one is asked again inside.
        let new = Arc::new(Epoch::new(number, sent, self.sent_twice.clone()));
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if current.number >= number {
            return Err(stale(current.number));
        }
        Ok(std::mem::replace(&mut *current, new))
    }

    fn current(&self) -> Arc<Epoch> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Claims for SourceLedger {
    fn claim(&self, page: PageIndex) -> Option<Claim> {
        self.claim(page)
    }

    fn claim_within(&self, run: PageRun) -> Option<Claim> {
        self.claim_within(run)
    }

    fn next_unsent(&self, from: PageIndex) -> Option<PageIndex> {
        self.next_unsent(from)
    }

    fn prev_unsent(&self, from: PageIndex) -> Option<PageIndex> {
        self.prev_unsent(from)
    }

    fn unsent(&self) -> u64 {
        self.unsent()
    }

    fn is_unsent(&self, page: PageIndex) -> bool {
        self.is_unsent(page)
    }
}

impl Unsent for SourceLedger {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn is_unsent(&self, page: PageIndex) -> bool {
        self.is_unsent(page)
    }

    fn next_unsent(&self, from: PageIndex) -> Option<PageIndex> {
        self.next_unsent(from)
    }

    fn prev_unsent(&self, from: PageIndex) -> Option<PageIndex> {
        self.prev_unsent(from)
    }
}

impl fmt::Debug for SourceLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("SourceLedger");
        debug.field("pages", &self.pages).field("epoch", &self.epoch());
        debug.field("counts", &self.counts()).finish()
    }
}

impl Epoch {
    fn new(number: LinkEpoch, sent: PlacedPages, sent_twice: Arc<AtomicU64>) -> Self {
        let (pages, count) = (sent.pages(), sent.count());
        Self {
            number,
            claimed: AtomicBitmap::from_words(pages, sent.words().to_vec()),
            sent: AtomicBitmap::from_words(pages, sent.into_words()),
            unsent: AtomicU64::new(pages - count),
            sent_count: AtomicU64::new(count),
            sent_twice,
        }
    }
}

/// The permit to send a run of pages, and the only one to build frames of them.
///
/// It belongs to the epoch that it was made in, needs no borrow of the ledger,
/// and may go to another thread.
///
/// Dropping it without [`sent`](Self::sent) hands the pages back to unsent. A
/// request for them that came meanwhile was taken for a late hit, so whoever
/// gives up a claim offers its pages again as if they had been asked for.
#[must_use = "a claim that is dropped hands its pages back"]
pub struct Claim {
    epoch: Arc<Epoch>,
    run: PageRun,
    settled: bool,
}

impl Claim {
    /// The permit for `run`, whose bits the caller has just set.
    fn new(epoch: Arc<Epoch>, run: PageRun) -> Self {
        epoch.unsent.fetch_sub(run.count(), Ordering::AcqRel);
        Self { epoch, run, settled: false }
    }

    /// The claimed pages.
    pub fn run(&self) -> PageRun {
        self.run
    }

    /// The epoch that the claim belongs to; its frames go to this epoch's
    /// connection only.
    pub fn epoch(&self) -> LinkEpoch {
        self.epoch.number
    }

    /// Keeps the first `pages` pages and returns a claim of the others, to send
    /// a part in another way; `None`, and no change, if either would be empty.
    pub fn split_off(&mut self, pages: u64) -> Option<Claim> {
        let rest = self.run.count().checked_sub(pages)?;
        let kept = PageRun::new(self.run.first(), pages)?;
        let rest = PageRun::new(self.run.first().checked_add(pages)?, rest)?;
        self.run = kept;
        Some(Claim { epoch: self.epoch.clone(), run: rest, settled: false })
    }

    /// Marks the pages as sent, once their frames are the connection's.
    pub fn sent(mut self) {
        self.settled = true;
        let news = self.epoch.sent.set_run(self.run);
        self.epoch.sent_count.fetch_add(news, Ordering::AcqRel);
        if news != self.run.count() {
            self.epoch.sent_twice.fetch_add(self.run.count() - news, Ordering::AcqRel);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.settled {
            self.epoch.unsent.fetch_add(self.run.count(), Ordering::AcqRel);
            self.epoch.claimed.clear_run(self.run);
        }
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Claim({:?}, {})", self.run, self.epoch.number)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn page(index: u64) -> PageIndex {
        PageIndex::new(index)
    }

    #[test]
    fn marking_a_page_twice_is_counted_apart_from_the_claims() {
        let ledger = SourceLedger::new(10);
        ledger.claim(page(3)).unwrap().sent();
        // A claim that no test-and-set stands behind: what a broken one hands out.
        let forged = Claim {
            epoch: ledger.current(),
            run: PageRun::new(page(2), 3).unwrap(),
            settled: false,
        };
        forged.sent();
        assert_eq!(ledger.counts().sent_twice, 1);
        assert_eq!(ledger.counts().sent, 3);
    }
}
