//! The book of open faults: who waits for which page since when, and what the
//! waiting came to.
//!
//! Only for figures: whether a page must be asked for is the ledger's decision.

use crate::proto::page::{PageIndex, PageRun};
use crate::report::latency::Latencies;
use nix::unistd::Pid;
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
    thread: Pid,
    vcpu: Option<u16>,
    since: Instant,
    /// The source was asked for the page because of it.
    asked: bool,
    /// When that was handed to the link.
    sent: Option<Instant>,
    /// When some of what it waits for came in answer, if that is more than a page.
    answered: Option<Instant>,
}

/// How a page came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// In answer to a request; all of it was there at this time.
    InAnswer(Instant),
    /// Not at all: it was known here to be zero.
    Known,
    /// By itself.
    Unasked,
}

/// What waiting for pages came to.
#[derive(Clone, Debug)]
pub struct FaultFigures {
    /// From reading a fault until its page was placed, of network faults and late hits.
    pub latency: Latencies,
    /// Where that time went, of faults whose page came in answer.
    pub hops: Hops,
    /// Each vCPU's standstill.
    pub blocktime: Vec<Duration>,
    /// Pages that were asked for and had been on their way: they came, but not in answer.
    pub late_answers: u64,
}

/// See [`FaultHops`](crate::report::schema::FaultHops).
#[derive(Clone, Debug, Default)]
pub struct Hops {
    /// Until the request was handed to the link.
    pub ask: Latencies,
    /// From then until the page was there.
    pub answer: Latencies,
    /// From then until it was placed.
    pub place: Latencies,
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
        let (latency, hops) = (Latencies::new(), Hops::default());
        let figures = FaultFigures { latency, hops, blocktime, late_answers: 0 };
        Self { open: AtomicUsize::new(0), book: Mutex::new(Book { open: Vec::new(), figures }) }
    }

    /// Enters a fault of `thread`. To be called *before* the ledger is asked, so that a
    /// placement in between finds it. `false` if that thread's fault on that page is open
    /// already: a wait that was interrupted, by a signal say, and goes on. It is one wait.
    pub fn enter(&self, page: PageIndex, thread: Pid, vcpu: Option<u16>, since: Instant) -> bool {
        let mut book = self.lock();
        if book.open.iter().any(|fault| fault.page == page && fault.thread == thread) {
            return false;
        }
        if book.open.len() < OPEN_MAX {
            let fault =
                OpenFault { page, thread, vcpu, since, asked: false, sent: None, answered: None };
            book.open.push(fault);
            self.open.store(book.open.len(), Ordering::SeqCst);
        }
        true
    }

    /// The source is asked for `page`, because of the fault that was entered last on it.
    pub fn asked(&self, page: PageIndex) {
        let mut book = self.lock();
        match book.open.iter_mut().rfind(|fault| fault.page == page) {
            Some(fault) => fault.asked = true,
            // It has been placed since it was entered, and nobody had asked yet.
            None => book.figures.late_answers += 1,
        }
    }

    /// The request for `page` was handed to the link at `now`.
    pub fn sent(&self, page: PageIndex, now: Instant) {
        let mut book = self.lock();
        // Its page may have come by itself meanwhile.
        if let Some(fault) = book.open.iter_mut().find(|fault| fault.page == page && fault.asked) {
            fault.sent.get_or_insert(now);
        }
    }

    /// Pages of `unit`, whose first page is what is waited for, have come in answer at `now`; the
    /// others may come by themselves.
    pub fn answered(&self, unit: PageRun, now: Instant) {
        if unit.count() == 1 || self.open.load(Ordering::SeqCst) == 0 {
            return;
        }
        for fault in self.lock().open.iter_mut().filter(|fault| unit.contains(fault.page)) {
            fault.answered = Some(now);
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
    pub fn placed(&self, run: PageRun, came: Came, now: Instant) {
        if self.open.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut book = self.lock();
        let Book { open, figures } = &mut *book;
        open.retain(|fault| {
            let closed = run.contains(fault.page);
            if closed {
                let waited = now.saturating_duration_since(fault.since);
                let came = fault.answered.map_or(came, Came::InAnswer);
                figures.latency.record(waited);
                figures.late_answers += u64::from(fault.asked && came == Came::Unasked);
                if let (Came::InAnswer(arrived), Some(sent)) = (came, fault.sent) {
                    let hops = &mut figures.hops;
                    hops.ask.record(sent.saturating_duration_since(fault.since));
                    hops.answer.record(arrived.saturating_duration_since(sent));
                    hops.place.record(now.saturating_duration_since(arrived));
                }
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

    /// The pages that somebody waits for.
    pub fn waited_for(&self) -> Vec<PageIndex> {
        self.lock().open.iter().map(|fault| fault.page).collect()
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

    /// The thread of a vCPU.
    fn thread(vcpu: u16) -> Pid {
        Pid::from_raw(100 + i32::from(vcpu))
    }

    #[test]
    fn a_fault_is_struck_out_or_in_the_figures_and_never_both() {
        let book = FaultBook::new(1);
        let page = PageIndex::new(7);
        let since = Instant::now();
        book.enter(page, thread(0), Some(0), since);
        assert!(book.strike(page));
        assert_eq!(book.figures().latency.summary().count, 0);

        // Placed between its entry and the ledger's answer that it was placed.
        book.enter(page, thread(0), Some(0), since);
        let arrived = Came::InAnswer(since + Duration::from_millis(1));
        book.placed(PageRun::single(page), arrived, since + Duration::from_millis(2));
        assert!(!book.strike(page));
        for _look in 0..2 {
            let figures = book.figures();
            assert_eq!(figures.latency.summary().count, 1);
            assert_eq!(figures.blocktime, [Duration::from_millis(2)]);
        }
    }

    #[test]
    fn a_page_that_was_asked_for_and_comes_otherwise_was_on_its_way() {
        let book = FaultBook::new(2);
        let now = Instant::now();
        let [asked, answered, crossed] = [3, 4, 5].map(PageIndex::new);
        for page in [asked, answered] {
            book.enter(page, thread(0), Some(0), now);
            book.asked(page);
            book.enter(page, thread(1), Some(1), now);
        }
        // Another fault on the page is none more that asked.
        book.placed(PageRun::single(asked), Came::Unasked, now);
        book.placed(PageRun::single(answered), Came::InAnswer(now), now);
        assert_eq!(book.figures().late_answers, 1);
        // Pushed between the ledger's answer and the asking.
        book.enter(crossed, thread(0), Some(0), now);
        book.placed(PageRun::single(crossed), Came::Unasked, now);
        book.asked(crossed);
        assert_eq!(book.figures().late_answers, 2);
        assert_eq!(book.figures().latency.summary().count, 5);
    }

    #[test]
    fn the_hops_of_a_fault_are_its_latency() {
        let book = FaultBook::new(2);
        let since = Instant::now();
        let at = |micros| since + Duration::from_micros(micros);
        let [answered, pushed] = [3, 4].map(PageIndex::new);
        for page in [answered, pushed] {
            book.enter(page, thread(0), Some(0), since);
            book.asked(page);
            // Another one waits for it, too; it asked nobody.
            book.enter(page, thread(1), Some(1), at(5));
            book.sent(page, at(10));
        }
        book.placed(PageRun::single(answered), Came::InAnswer(at(70)), at(100));
        book.placed(PageRun::single(pushed), Came::Unasked, at(100));
        // It had come before this was sent.
        book.sent(pushed, at(110));
        let figures = book.figures();
        assert_eq!(figures.latency.count(), 4);
        let hops = [figures.hops.ask, figures.hops.answer, figures.hops.place];
        let means = hops.map(|hop| (hop.count(), hop.summary().mean));
        assert_eq!(means, [(1, Some(10_000)), (1, Some(60_000)), (1, Some(30_000))]);
    }

    #[test]
    fn a_fault_that_is_answered_in_part_was_none_on_its_way() {
        let book = FaultBook::new(1);
        let since = Instant::now();
        let at = |micros| since + Duration::from_micros(micros);
        let unit = PageRun::new(PageIndex::new(512), 512).unwrap();
        book.enter(unit.first(), thread(0), Some(0), since);
        book.asked(unit.first());
        book.sent(unit.first(), at(10));
        book.answered(PageRun::new(PageIndex::new(1024), 512).unwrap(), at(20));
        book.answered(unit, at(60));
        // Its last page was pushed.
        book.placed(unit, Came::Unasked, at(100));
        let figures = book.figures();
        assert_eq!((figures.late_answers, figures.hops.answer.summary().mean), (0, Some(50_000)));
        assert_eq!(figures.latency.summary().mean, Some(100_000));
    }

    #[test]
    fn a_fault_that_is_raised_again_is_one_wait() {
        let book = FaultBook::new(2);
        let page = PageIndex::new(7);
        let since = Instant::now();
        assert!(book.enter(page, thread(0), Some(0), since));
        for again in 1..10_000 {
            assert!(!book.enter(page, thread(0), Some(0), since + Duration::from_micros(again)));
        }
        assert!(book.enter(page, thread(1), Some(1), since + Duration::from_millis(1)));
        let arrived = Came::InAnswer(since + Duration::from_millis(3));
        book.placed(PageRun::single(page), arrived, since + Duration::from_millis(3));
        let figures = book.figures();
        assert_eq!(figures.latency.summary().count, 2);
        assert_eq!(figures.blocktime, [3, 2].map(Duration::from_millis));
        assert!(book.enter(page, thread(0), Some(0), since));
    }
}
