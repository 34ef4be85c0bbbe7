//! Holes and zero pages of a paused guest, for the push lanes.
//!
//! Each run is pushed when it is found. What was found is remembered, too: pages of it that a
//! lost link swallowed are announced again, and not sent with their zeros.

use crate::failpoint::failpoint;
use crate::memory::ram::GuestRam;
use crate::memory::scan::{self, Holes, ScanError, ZeroScan};
use crate::proto::bitmap::AtomicBitmap;
use crate::proto::frame::PageKind;
use crate::proto::page::{PageIndex, PageRun};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages that the zero scan looks at between two looks at its end.
const SCAN_PAGES: u64 = 4096;

/// Finds holes and zero pages, notes each run in `known` and then hands it to `found`, until that
/// says `false`.
pub fn scan_zeros(
    ram: Arc<GuestRam>,
    known: &KnownZeros,
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
            known.add(run, kind);
            if !found(run, kind) {
                return Ok(());
            }
        }
        known.scanned.store(scan.position(), Ordering::Release);
    }
    Ok(())
}

/// What is known of zero pages so far: two bits a page.
pub struct KnownZeros {
    zero: AtomicBitmap,
    hole: AtomicBitmap,
    /// All pages below were looked at.
    scanned: AtomicU64,
    holes: Holes,
}

impl std::fmt::Debug for KnownZeros {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KnownZeros").finish_non_exhaustive()
    }
}

impl KnownZeros {
    /// Nothing is known yet of `ram`.
    ///
    /// # Errors
    /// As of [`Holes::new`].
    pub fn new(ram: Arc<GuestRam>) -> Result<Self, ScanError> {
        let pages = ram.layout().pages();
        let bits = || AtomicBitmap::new(pages);
        Ok(Self { zero: bits(), hole: bits(), scanned: AtomicU64::new(0), holes: Holes::new(ram)? })
    }

    /// The pages of `run` are zero pages, or holes.
    pub fn add(&self, run: PageRun, kind: PageKind) {
        match kind {
            PageKind::Zero => self.zero.set_run(run),
            PageKind::Hole => self.hole.set_run(run),
            PageKind::Raw | PageKind::Compressed | PageKind::Poison => 0,
        };
    }

    /// The first pages of `run`, which lies in one segment, that are of one kind. If they are
    /// zero, those behind `run` that are, too, come with them: to announce many costs no more
    /// than to announce one.
    ///
    /// Where the scan has not been yet the kernel is asked: a hole that is read to be sent would
    /// take memory on both sides.
    pub fn first_part(&self, run: PageRun) -> (PageRun, PageKind) {
        let (part, kind) = self.first_noted(run);
        if kind != PageKind::Raw || part.end() <= self.scanned.load(Ordering::Acquire) {
            return (part, kind);
        }
        match self.holes.first_part(part) {
            Ok((hole, true)) => {
                self.add(hole, PageKind::Hole);
                (hole, PageKind::Hole)
            }
            Ok((data, false)) => (data, PageKind::Raw),
            // It can be sent all the same, if it can be read.
            Err(_) => (part, PageKind::Raw),
        }
    }

    /// The first pages of `run`, which lies in one segment, that are all holes or all not, as
    /// it is just now: the guest runs. Nothing is remembered.
    pub fn first_part_now(&self, run: PageRun) -> (PageRun, PageKind) {
        match self.holes.first_part(run) {
            Ok((hole, true)) => (hole, PageKind::Hole),
            Ok((data, false)) => (data, PageKind::Raw),
            Err(_) => (run, PageKind::Raw),
        }
    }

    fn first_noted(&self, run: PageRun) -> (PageRun, PageKind) {
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
    use crate::memory::ram::Backing;
    use crate::proto::layout::MemoryLayout;
    use crate::proto::page::PAGE_SIZE;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun::new(PageIndex::new(first), count).unwrap()
    }

    /// Memory without a hole.
    fn full(pages: u64) -> Arc<GuestRam> {
        let ram = GuestRam::new(MemoryLayout::flat(pages).unwrap(), Backing::Memfd).unwrap();
        ram.write_run(run(0, pages), &vec![1; pages as usize * PAGE_SIZE]);
        Arc::new(ram)
    }

    #[test]
    fn where_the_scan_has_not_been_a_hole_is_found_all_the_same_and_then_is_not_asked_for() {
        let layout = MemoryLayout::flat(1000).unwrap();
        let ram = Arc::new(GuestRam::new(layout, Backing::Memfd).unwrap());
        ram.write_run(run(10, 5), &[1; 5 * PAGE_SIZE]);
        ram.write_run(run(600, 1), &[0; PAGE_SIZE]);
        let known = KnownZeros::new(ram.clone()).unwrap();
        assert_eq!(known.first_part(run(0, 64)), (run(0, 10), PageKind::Hole));
        assert_eq!(known.first_part(run(10, 64)), (run(10, 5), PageKind::Raw));
        assert_eq!(known.first_part(run(20, 1)), (run(20, 580), PageKind::Hole));
        assert_eq!(known.first_part(run(600, 2)), (run(600, 1), PageKind::Raw));
        scan_zeros(ram.clone(), &known, |_, _| true).unwrap();
        assert_eq!(known.first_part(run(600, 2)), (run(600, 1), PageKind::Zero));
        // What the scan has passed is as it found it.
        ram.write_run(run(700, 1), &[1; PAGE_SIZE]);
        assert_eq!(known.first_part(run(700, 1)), (run(700, 300), PageKind::Hole));
    }

    #[test]
    fn a_run_is_cut_where_its_kind_changes_and_zeros_go_on_behind_it() {
        let known = KnownZeros::new(full(100)).unwrap();
        assert_eq!(known.first_part(run(3, 60)), (run(3, 60), PageKind::Raw));
        known.add(run(10, 20), PageKind::Zero);
        known.add(run(30, 70), PageKind::Hole);
        assert_eq!(known.first_part(run(3, 60)), (run(3, 7), PageKind::Raw));
        assert_eq!(known.first_part(run(12, 3)), (run(12, 18), PageKind::Zero));
        assert_eq!(known.first_part(run(99, 1)), (run(99, 1), PageKind::Hole));
        assert_eq!(known.first_part(run(30, 1)), (run(30, 70), PageKind::Hole));
    }
}
