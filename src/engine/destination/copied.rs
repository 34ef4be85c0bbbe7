//! Pages that come before the machine state, of a guest that runs on at the source and may
//! write to them again.
//!
//! They are written to the guest's files and not mapped, so the ledger knows nothing of them,
//! and to discard one is to forget it. When the guest has been paused the source says which
//! are valid; those alone are ever mapped: the first time somebody touches them, or by a
//! thread that begins when the guest runs.

use super::install::Installer;
use crate::engine::lane::LaneError;
use crate::failpoint::failpoint;
use crate::proto::bitmap::AtomicBitmap;
use crate::proto::frame::{FrameHeader, PageKind};
use crate::proto::placed::PlacedPages;
use crate::uffd::Content;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tracing::warn;

/// Nobody waits for pages.
const NOBODY: u64 = u64::MAX;
/// Pages that are mapped in one go: that keeps whoever faults in the same memory.
const MAP_PAGES: u64 = 256;

/// What came before the machine state.
pub struct CopiedPages {
    /// Pages that are zero, by the last that came of them: holes in the file.
    zero: AtomicBitmap,
    /// Pages that came, those counted again that came again.
    came: AtomicU64,
    /// How many of them somebody waits for.
    awaited: AtomicU64,
    /// Told when they are there.
    landed: Box<dyn Fn(u64) + Send + Sync>,
    /// The source has said which are valid: none comes any more.
    over: AtomicBool,
    /// How many were valid.
    valid: AtomicU64,
}

impl std::fmt::Debug for CopiedPages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CopiedPages").finish_non_exhaustive()
    }
}

impl CopiedPages {
    /// None yet, of a guest of so many pages; `landed` is told once for each
    /// [`wait_for`](Self::wait_for).
    pub fn new(pages: u64, landed: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self {
            zero: AtomicBitmap::new(pages),
            came: AtomicU64::new(0),
            awaited: AtomicU64::new(NOBODY),
            landed: Box::new(landed),
            over: AtomicBool::new(false),
            valid: AtomicU64::new(0),
        }
    }

    /// Has `landed` told when so many pages have come in all.
    pub fn wait_for(&self, pages: u64) {
        self.awaited.store(pages, Ordering::SeqCst);
        self.tell();
    }

    /// Pages that have come, those counted again that came again, as long as they do.
    pub fn coming(&self) -> Option<u64> {
        let over = self.over.load(Ordering::Relaxed);
        (!over).then(|| self.came.load(Ordering::Relaxed))
    }

    /// How many of the guest's pages were valid.
    pub fn valid(&self) -> u64 {
        self.valid.load(Ordering::Relaxed)
    }

    fn add(&self, pages: u64) {
        self.came.fetch_add(pages, Ordering::SeqCst);
        self.tell();
    }

    /// Whoever comes last, of who adds and who begins to wait, sees both.
    fn tell(&self) {
        let awaited = self.awaited.load(Ordering::SeqCst);
        let there = awaited != NOBODY && self.came.load(Ordering::SeqCst) >= awaited;
        let swap =
            |from| self.awaited.compare_exchange(from, NOBODY, Ordering::SeqCst, Ordering::SeqCst);
        if there && swap(awaited).is_ok() {
            (self.landed)(awaited);
        }
    }
}

impl Installer {
    /// Writes a frame of pages that come before the machine state. The source sends a page again
    /// only when what it sent before has landed; one that does not keeps to that spoils its own
    /// guest.
    pub(super) fn copy(&self, frame: &FrameHeader, content: Content<'_>) -> Result<(), LaneError> {
        let copied = self.copied.as_ref().filter(|of| !of.over.load(Ordering::SeqCst));
        let Some(copied) = copied else {
            let why = format!("{:?} comes to be copied, which was not agreed upon", frame.run);
            return Err(LaneError::Violation(why));
        };
        failpoint!("destination::before_copy_written", return Err(super::install::broken()));
        match frame.kind {
            PageKind::Raw => {
                self.placer.write_unmapped(frame.run, content).map_err(super::install::local)?;
                copied.zero.clear_run(frame.run);
            }
            PageKind::Zero | PageKind::Hole => {
                self.placer.give_back(frame.run).map_err(super::install::local)?;
                copied.zero.set_run(frame.run);
            }
            PageKind::Compressed | PageKind::Poison => {
                let why = format!("a page of kind {:?} comes to be copied", frame.kind);
                return Err(LaneError::Violation(why));
            }
        }
        copied.add(frame.run.count());
        failpoint!("destination::after_copy_written", return Err(super::install::broken()));
        Ok(())
    }

    /// Takes the source's word on which of the pages that came before are valid, and returns
    /// those of them that have content, which may be mapped from now on. It reads and changes
    /// bits.
    pub fn take_valid(&self, valid: &PlacedPages) -> Result<PlacedPages, LaneError> {
        let out_of_range = |error| LaneError::Violation(format!("{error}"));
        let Some(copied) = &self.copied else { return Ok(PlacedPages::new(self.ledger.pages())) };
        copied.over.store(true, Ordering::SeqCst);
        copied.valid.store(valid.count(), Ordering::Relaxed);
        let (zero, data) = valid.split(&copied.zero);
        for run in zero.runs() {
            // Nobody waits yet: the guest is not here.
            self.ledger.mark_zero(run).map_err(out_of_range)?;
        }
        for run in data.runs() {
            for landing in self.ledger.land(run).map_err(out_of_range)? {
                landing.placed();
            }
        }
        self.tell_if_full();
        Ok(data)
    }

    /// Maps pages that are valid, on a thread of its own, until `over`. What it has not come to
    /// is mapped when it is touched.
    pub fn map_copied(self: &Arc<Self>, data: PlacedPages, over: Arc<AtomicBool>) {
        let installer = self.clone();
        let map = move || {
            crate::engine::defer();
            for run in data.runs().flat_map(|run| run.pieces(MAP_PAGES)) {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                // One that was given back meanwhile ends its piece; the others are found.
                if let Err(error) = installer.placer.map_present(run) {
                    warn!(%error, "pages are mapped when they are touched, and not before");
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("map-copied".into()).spawn(map) {
            warn!(%error, "no thread to map pages: they are mapped when they are touched");
        }
    }
}
