//! The book of open faults: who waits for which page since when, and what the
//! waiting came to.
//!
//! Only for figures: whether a page must be asked for is the ledger's decision.

use crate::proto::page::{PageIndex, PageRun};
use crate::report::latency::Latencies;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The most faults kept open at once; further ones are not timed. A thread has at most
/// one open fault, so this bounds what a VMM with many threads costs.
const OPEN_MAX: usize = 4096;

/// A fault that was read and whose page is not placed yet.
#[derive(Clone, Copy, Debug)]
struct OpenFault {
    page: PageIndex,
    vcpu: Option<u16>,
    since: Instant,
}

/// What waiting for pages came to.
#[derive(Clone, Debug)]
pub struct FaultFigures {
    /// From reading a fault until its page was placed, of network faults and late hits.
    pub latency: Latencies,
    /// Each vCPU's standstill.
    pub blocktime: Vec<Duration>,
}

#[derive(Debug)]
struct Book {
    open: Vec<OpenFault>,
    figures: FaultFigures,
}

/// Open faults, shared between the thread that reads faults and those that place pages.
#[derive(Debug)]
pub struct FaultBook {
    open: AtomicUsize,
    book: Mutex<Book>,
}

impl FaultBook {
    /// An empty book for a guest with this many vCPUs.
    pub fn new(vcpus: usize) -> Self {
        let blocktime = vec![Duration::ZERO; vcpus];
        let figures = FaultFigures { latency: Latencies::new(), blocktime };
        Self { open: AtomicUsize::new(0), book: Mutex::new(Book { open: Vec::new(), figures }) }
    }

    /// Enters a fault. To be called *before* the ledger is asked, so that a placement
    /// in between finds it.
    pub fn enter(&self, page: PageIndex, vcpu: Option<u16>, since: Instant) {
        let mut book = self.lock();
        if book.open.len() < OPEN_MAX {
            book.open.push(OpenFault { page, vcpu, since });
            self.open.store(book.open.len(), Ordering::SeqCst);
        }
    }

    /// Strikes the fault out that was entered last on `page`: the ledger had the page
    /// already, or answered without the source. `false` if its page was placed since it was
    /// entered, so that it is in the figures as one that waited.
    pub fn strike(&self, page: PageIndex) -> bool {
        let mut book = self.lock();
        let entered = book.open.iter().rposition(|fault| fault.page == page);
        if let Some(index) = entered {
            book.open.swap_remove(index);
        }
        self.open.store(book.open.len(), Ordering::SeqCst);
        entered.is_some()
    }

    /// Closes the faults on the pages of `run`, placed at `now`.
    pub fn placed(&self, run: PageRun, now: Instant) {
        if self.open.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut book = self.lock();
        let Book { open, figures } = &mut *book;
        open.retain(|fault| {
            let closed = run.contains(fault.page);
            if closed {
                let waited = now.saturating_duration_since(fault.since);
                figures.latency.record(waited);
                if let Some(total) =
                    fault.vcpu.and_then(|vcpu| figures.blocktime.get_mut(usize::from(vcpu)))
                {
                    *total += waited;
                }
            }
            !closed
        });
        self.open.store(book.open.len(), Ordering::SeqCst);
    }

    /// The figures so far.
    pub fn figures(&self) -> FaultFigures {
        self.lock().figures.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Book> {
        // Figures survive a panic of another thread.
        self.book.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_struck_out_or_in_the_figures_and_never_both() {
        let book = FaultBook::new(1);
        let page = PageIndex::new(7);
        let since = Instant::now();
        book.enter(page, Some(0), since);
        assert!(book.strike(page));
        assert_eq!(book.figures().latency.summary().count, 0);

        // Placed between its entry and the ledger's answer that it was placed.
        book.enter(page, Some(0), since);
        book.placed(PageRun::single(page), since + Duration::from_millis(2));
        assert!(!book.strike(page));
        for _look in 0..2 {
            let figures = book.figures();
            assert_eq!(figures.latency.summary().count, 1);
            assert_eq!(figures.blocktime, [Duration::from_millis(2)]);
        }
    }
}
