//! Holes and zero pages of a paused guest, for the push lanes.

use crate::failpoint::failpoint;
use crate::memory::ram::GuestRam;
use crate::memory::scan::{self, ScanError, ZeroScan};
use crate::proto::frame::PageKind;
use crate::proto::page::PageRun;
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
