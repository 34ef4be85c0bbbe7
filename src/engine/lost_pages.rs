//! Pages whose content is lost: counted, and the first of them named.

use crate::proto::layout::MemoryLayout;
use crate::proto::page::PageRun;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tracing::warn;

/// The most runs that are named, in the log and as events; the others are counted only.
const NAMED_MAX: u64 = 64;

/// Pages that the source could not read, as either side comes to know of them.
#[derive(Debug, Default)]
pub struct LostPages {
    pages: AtomicU64,
    runs: AtomicU64,
    untold: Mutex<Vec<(u64, u64)>>,
}

impl LostPages {
    /// The pages of `run` are lost.
    pub fn note(&self, run: PageRun, layout: &MemoryLayout) {
        self.pages.fetch_add(run.count(), Ordering::Relaxed);
        let named = self.runs.fetch_add(1, Ordering::Relaxed);
        if named >= NAMED_MAX {
            if named == NAMED_MAX {
                warn!("more pages of guest memory are lost; they are counted and not named");
            }
            return;
        }
        let address = layout.address_of(run.first()).map_or(0, |address| address.0);
        warn!(
            address = format_args!("{address:#x}"),
            pages = run.count(),
            "guest memory cannot be read at the source and is lost"
        );
        self.lock().push((address, run.count()));
    }

    /// How many there are.
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// Guest physical address and pages of those runs that nobody was told of yet.
    pub fn take_untold(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::page::PageIndex;

    #[test]
    fn the_first_are_named_by_guest_address_and_all_are_counted() {
        let layout = MemoryLayout::pc((4 << 30) / 4096).unwrap();
        let (lost, above_the_gap) = (LostPages::default(), PageIndex::new((3 << 30) / 4096 + 1));
        lost.note(PageRun::new(above_the_gap, 3).unwrap(), &layout);
        assert_eq!(lost.take_untold(), [((4 << 30) + 4096, 3)]);
        for _ in 0..1000 {
            lost.note(PageRun::single(PageIndex::new(7)), &layout);
        }
        assert_eq!(lost.take_untold(), [(7 * 4096, 1); NAMED_MAX as usize - 1]);
        assert_eq!((lost.pages(), lost.take_untold()), (1003, vec![]));
    }
}
