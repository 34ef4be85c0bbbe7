//! Faults in huge pages: who waits in one waits for all of its pages.

use super::{Requests, TrapLoop, violation};
use crate::engine::lane::LaneError;
use crate::proto::ledger::{FaultAnswer, Landing};
use crate::proto::page::{PageRun, RUN_PAGES_MAX};
use crate::proto::page_set::PageSet;
use std::sync::atomic::Ordering;

/// What the pages of a huge page call for, now that somebody waits for them.
struct Found<'a> {
    /// Nobody has asked for these yet.
    missing: PageSet,
    /// Others are on their way, or in hand: who places the last one wakes.
    awaited: bool,
    /// These are zero, and in hand here.
    zeros: Vec<Landing<'a>>,
}

impl<R: Requests> TrapLoop<R> {
    /// A fault in `block`, which is in the book by its first page. Pages of it that are placed are
    /// no reason to wake: nothing is mapped before the last one is.
    pub(super) fn fault_in_block(
        &self,
        block: PageRun,
        vcpu: Option<u16>,
        new: bool,
    ) -> Result<(), LaneError> {
        let (counts, book) = (&self.counts, &self.installer.book);
        let found = self.look_at(block)?;
        if !found.missing.is_empty() {
            // One fault, however many requests it takes.
            counts.wait(&counts.requests, vcpu);
            book.asked(block.first());
            self.ask_for(&found.missing, vcpu);
        } else if found.awaited {
            // A wait that goes on is counted, and timed, by its beginning.
            if new {
                counts.wait(&counts.waits, vcpu);
            }
        } else if !found.zeros.is_empty() {
            if new {
                counts.local.fetch_add(1, Ordering::Relaxed);
                book.strike(block.first());
            }
        } else {
            if new && book.strike(block.first()) {
                counts.crossed.fetch_add(1, Ordering::Relaxed);
            } else if new {
                // Mapped after it was entered: its wait is in the figures.
                counts.wait(&counts.waits, vcpu);
            }
            return self.wake(block);
        }
        self.place_zeros(found.zeros)
    }

    /// Asks for what is missing of a block in which somebody waits, on a new link, and places what
    /// is known to be zero.
    pub(super) fn look_after(&self, block: PageRun) -> Result<(), LaneError> {
        let found = self.look_at(block)?;
        self.ask_for(&found.missing, None);
        if found.missing.is_empty() && !found.awaited && found.zeros.is_empty() {
            return self.wake(block);
        }
        self.place_zeros(found.zeros)
    }

    fn look_at(&self, block: PageRun) -> Result<Found<'_>, LaneError> {
        let (missing, awaited, zeros) = (PageSet::new(), false, Vec::new());
        let mut found = Found { missing, awaited, zeros };
        for page in block.pages() {
            match self.installer.ledger.fault(page).map_err(violation)? {
                FaultAnswer::Request => found.missing.insert(PageRun::single(page)),
                FaultAnswer::Wait => found.awaited = true,
                FaultAnswer::Wake => {}
                FaultAnswer::Zero(landing) => found.zeros.push(landing),
            }
        }
        Ok(found)
    }

    fn ask_for(&self, pages: &PageSet, vcpu: Option<u16>) {
        let parts = pages.runs().flat_map(|run| run.pieces(u64::from(RUN_PAGES_MAX)));
        parts.for_each(|part| self.ask(part, vcpu));
    }

    fn place_zeros(&self, zeros: Vec<Landing<'_>>) -> Result<(), LaneError> {
        zeros.into_iter().try_for_each(|landing| self.place_zero(landing))
    }
}
