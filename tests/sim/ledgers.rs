//! What the simulated source claims pages from: the real ledger, and one whose
//! claim is broken on purpose, to see that the checker notices.

use postcopy::proto::ledger::{
    Claim, Claims, LinkEpoch, ResumeError, SourceLedger, StaleEpoch, Unwritten,
};
use postcopy::proto::page::{PageIndex, PageRun};
use postcopy::proto::placed::PlacedPages;
use postcopy::proto::prepaging::Unsent;
use std::sync::atomic::{AtomicU64, Ordering};

/// A ledger that the source can be run with.
pub trait Ledger: Claims {
    fn new(pages: u64) -> Self;
    fn void(&self, epoch: LinkEpoch) -> Result<(), StaleEpoch>;
    fn resume_from(&self, placed: PlacedPages, epoch: LinkEpoch) -> Result<u64, ResumeError>;
    fn keep_unwritten(&self, written: &mut dyn FnMut(u64) -> u64) -> PlacedPages;
    fn count_unwritten(&self, written: &mut dyn FnMut(u64) -> u64) -> Unwritten;
    /// Pages that are claimed and not sent.
    fn claimed(&self) -> u64;
}

impl Ledger for SourceLedger {
    fn new(pages: u64) -> Self {
        Self::new(pages)
    }

    fn void(&self, epoch: LinkEpoch) -> Result<(), StaleEpoch> {
        self.void(epoch)
    }

    fn resume_from(&self, placed: PlacedPages, epoch: LinkEpoch) -> Result<u64, ResumeError> {
        self.resume_from(placed, epoch)
    }

    fn keep_unwritten(&self, written: &mut dyn FnMut(u64) -> u64) -> PlacedPages {
        self.keep_unwritten(written)
    }

    fn count_unwritten(&self, written: &mut dyn FnMut(u64) -> u64) -> Unwritten {
        self.count_unwritten(written)
    }

    fn claimed(&self) -> u64 {
        self.counts().claimed
    }
}

/// A ledger whose test-and-set is none: every so often it hands out a page that
/// it has handed out before.
pub struct BrokenLedger {
    first: SourceLedger,
    second: SourceLedger,
    refused: AtomicU64,
}

impl BrokenLedger {
    /// Whether this refusal is one of those that turn into a second claim.
    fn slips(&self) -> bool {
        self.refused.fetch_add(1, Ordering::Relaxed).is_multiple_of(8)
    }
}

impl Ledger for BrokenLedger {
    fn new(pages: u64) -> Self {
        let (first, second) = (SourceLedger::new(pages), SourceLedger::new(pages));
        Self { first, second, refused: AtomicU64::new(0) }
    }

    fn void(&self, epoch: LinkEpoch) -> Result<(), StaleEpoch> {
        self.second.void(epoch)?;
        self.first.void(epoch)
    }

    fn resume_from(&self, placed: PlacedPages, epoch: LinkEpoch) -> Result<u64, ResumeError> {
        self.second.resume_from(placed.clone(), epoch)?;
        self.first.resume_from(placed, epoch)
    }

    fn keep_unwritten(&self, written: &mut dyn FnMut(u64) -> u64) -> PlacedPages {
        self.first.keep_unwritten(written)
    }

    fn count_unwritten(&self, written: &mut dyn FnMut(u64) -> u64) -> Unwritten {
        self.first.count_unwritten(written)
    }

    fn claimed(&self) -> u64 {
        self.first.counts().claimed
    }
}

impl Claims for BrokenLedger {
    fn claim(&self, page: PageIndex) -> Option<Claim> {
        let claim = self.first.claim(page);
        if claim.is_none() && self.slips() { self.second.claim(page) } else { claim }
    }

    fn claim_within(&self, run: PageRun) -> Option<Claim> {
        self.first.claim_within(run)
    }

    fn next_unsent(&self, from: PageIndex) -> Option<PageIndex> {
        self.first.next_unsent(from)
    }

    fn prev_unsent(&self, from: PageIndex) -> Option<PageIndex> {
        self.first.prev_unsent(from)
    }

    fn unsent(&self) -> u64 {
        self.first.unsent()
    }

    fn is_unsent(&self, page: PageIndex) -> bool {
        self.first.is_unsent(page)
    }
}

/// A ledger as the pre-paging policies see it.
pub struct View<'a, L> {
    pub ledger: &'a L,
    pub pages: u64,
}

impl<L: Ledger> Unsent for View<'_, L> {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn is_unsent(&self, page: PageIndex) -> bool {
        self.ledger.is_unsent(page)
    }

    fn next_unsent(&self, from: PageIndex) -> Option<PageIndex> {
        self.ledger.next_unsent(from)
    }

    fn prev_unsent(&self, from: PageIndex) -> Option<PageIndex> {
        self.ledger.prev_unsent(from)
    }
}
