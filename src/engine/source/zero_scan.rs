//! Holes and zero pages of a paused guest, for the push lanes.
//!
//! Each run is pushed when it is found. What was found is remembered, too: pages of it that a
//! lost link swallowed are announced again, and not sent with their zeros.

use crate::failpoint::failpoint;
use crate::memory::ram::GuestRam;
use crate::memory::scan::{self, ScanError, ZeroScan};
use crate::proto::bitmap::AtomicBitmap;
use crate::proto::frame::PageKind;
use crate::proto::page::{PageIndex, PageRun};
use std::sync::Arc;

/// Pages that the zero scan looks at between two looks at its end.
const SCAN_PAGES: u64 = 4096;

/// Finds holes and zero pages and hands each run to `found`, until it says `false`.
pub fn scan_zeros(
    ram: Arc<GuestRam>,
    mut found: impl FnMut(PageRun, PageKind) -> bool,
) -> Result<(), ScanError> {
    // As if no hole and no zero page had been found: they are sent as they are.
    failpoint!("source::before_zero_scan", return Ok(()));
    let mut scan = ZeroScan::new(ram)?;
    while let Some(runs) = scan.next(SCAN_PAGES)? {
        for (run, kind) in runs {
            let kind = match kind {
                scan::Kind::Zero => PageKind::Zero,
                scan::Kind::Hole => PageKind::Hole,
            };
            if !found(run, kind) {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// What the scan has found so far: two bits a page.
pub struct KnownZeros {
    zero: AtomicBitmap,
    hole: AtomicBitmap,
}

impl std::fmt::Debug for KnownZeros {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KnownZeros").finish_non_exhaustive()
    }
}

impl KnownZeros {
    /// Nothing is known of a guest with so many pages.
    pub fn new(pages: u64) -> Self {
        Self { zero: AtomicBitmap::new(pages), hole: AtomicBitmap::new(pages) }
    }

    /// The pages of `run` are zero pages, or holes.
    pub fn add(&self, run: PageRun, kind: PageKind) {
        match kind {
            PageKind::Zero => self.zero.set_run(run),
            PageKind::Hole => self.hole.set_run(run),
            PageKind::Raw | PageKind::Compressed | PageKind::Poison => 0,
        };
    }

    /// The first pages of `run` that are of one kind. If they are zero, those behind `run` that
    /// are, too, come with them: to announce many costs no more than to announce one.
    pub fn first_part(&self, run: PageRun) -> (PageRun, PageKind) {
        let first = run.first();
        for (bits, kind) in [(&self.zero, PageKind::Zero), (&self.hole, PageKind::Hole)] {
            if bits.is_set(first) {
                let end = bits.next_clear(first).map_or(bits.pages(), PageIndex::get);
                return (until(run, end), kind);
            }
        }
        let known = |page: &PageIndex| self.zero.is_set(*page) || self.hole.is_set(*page);
        let end = run.pages().find(known).map_or(run.end(), PageIndex::get);
        (until(run, end), PageKind::Raw)
    }
}

/// From where `run` begins to `end`, which is behind that.
fn until(run: PageRun, end: u64) -> PageRun {
    PageRun::new(run.first(), end - run.first().get()).unwrap_or(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_cut_where_its_kind_changes_and_zeros_go_on_behind_it() {
        let run = |first, count| PageRun::new(PageIndex::new(first), count).unwrap();
        let known = KnownZeros::new(100);
        assert_eq!(known.first_part(run(3, 60)), (run(3, 60), PageKind::Raw));
        known.add(run(10, 20), PageKind::Zero);
        known.add(run(30, 70), PageKind::Hole);
        assert_eq!(known.first_part(run(3, 60)), (run(3, 7), PageKind::Raw));
        assert_eq!(known.first_part(run(12, 3)), (run(12, 18), PageKind::Zero));
        assert_eq!(known.first_part(run(99, 1)), (run(99, 1), PageKind::Hole));
        assert_eq!(known.first_part(run(30, 1)), (run(30, 70), PageKind::Hole));
    }
}
