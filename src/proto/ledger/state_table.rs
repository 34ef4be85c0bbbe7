//! The states of all pages at the destination, sixteen to an atomic word, and the
//! counters that follow them. It knows the states but not the events; see
//! [`DestinationLedger`](super::DestinationLedger).

use super::page_state::PageState;
use crate::proto::page::{PageIndex, PageRun};
use crate::proto::sync::{AtomicU64, Ordering};

const WORD_PAGES: u64 = (u64::BITS / PageState::BITS) as u64;

/// A state for each of a fixed number of pages, at first `Missing`.
pub(super) struct StateTable {
    pages: u64,
    /// Those past the last page stay 0.
    words: Box<[AtomicU64]>,
    /// The pages that are not settled; never below their true number.
    unsettled: AtomicU64,
    /// The pages that somebody places; never below their true number.
    in_hand: AtomicU64,
}

impl StateTable {
    pub(super) fn new(pages: u64) -> Self {
        let words = (0..pages.div_ceil(WORD_PAGES)).map(|_| AtomicU64::new(0)).collect();
        Self { pages, words, unsettled: AtomicU64::new(pages), in_hand: AtomicU64::new(0) }
    }

    pub(super) fn unsettled(&self) -> u64 {
        self.unsettled.load(Ordering::Acquire)
    }

    pub(super) fn in_hand(&self) -> u64 {
        self.in_hand.load(Ordering::Acquire)
    }

    /// The state of `page`, which is in range.
    pub(super) fn get(&self, page: PageIndex) -> PageState {
        self.load(page.get()).get(page)
    }

    /// Shows every page in rising order, each word as it is at one time.
    pub(super) fn each(&self, mut see: impl FnMut(PageIndex, PageState)) {
        self.each_word(|run, word| word.pages(run).for_each(|(page, state)| see(page, state)));
    }

    /// Shows the state of every page, and of how many neighbours at once if they are alike, each
    /// word as it is at one time.
    pub(super) fn each_stretch(&self, mut see: impl FnMut(PageState, u64)) {
        self.each_word(|run, word| match word.uniform() {
            Some(state) => see(state, run.count()),
            None => word.pages(run).for_each(|(_, state)| see(state, 1)),
        });
    }

    /// Shows every word in rising order, and which pages it is of.
    fn each_word(&self, mut see: impl FnMut(PageRun, StateWord)) {
        if let Some(all) = PageRun::new(PageIndex::new(0), self.pages) {
            change_each_word(all, |run| see(run, self.load(run.first().get())));
        }
    }

    /// For the pages from `first` on, which begins a word, sets a bit in `bits` (the
    /// lowest of the first word is `first`'s) where the state is `wanted`.
    pub(super) fn fill(&self, first: u64, bits: &mut [u64], wanted: impl Fn(PageState) -> bool) {
        const GROUPS: usize = (u64::BITS as u64 / WORD_PAGES) as usize;
        // Neighbours are mostly alike: the last answer is kept.
        let mut last = (StateWord(0), StateWord(0).mask(&wanted));
        let from = (first / WORD_PAGES) as usize;
        let groups = self.words.get(from..).unwrap_or_default().chunks(GROUPS);
        for (bits, group) in bits.iter_mut().zip(groups) {
            for (index, cell) in group.iter().enumerate() {
                let word = StateWord(cell.load(Ordering::Acquire));
                if word != last.0 {
                    last = (word, word.mask(&wanted));
                }
                *bits |= last.1 << (index as u64 * WORD_PAGES);
            }
        }
    }

    /// Changes the states of `run`, which lies in one word, at once. `next` may
    /// be called several times for a page, of which the last time counts, or once for pages
    /// that are alike. Returns the word before and after.
    pub(super) fn change(
        &self,
        run: PageRun,
        mut next: impl FnMut(PageState) -> PageState,
    ) -> (StateWord, StateWord) {
        self.change_word(run.first().get(), |before| {
            if let (WORD_PAGES, Some(state)) = (run.count(), before.uniform()) {
                return StateWord::all(next(state));
            }
            let mut after = before;
            for (page, state) in before.pages(run) {
                after.set(page, next(state));
            }
            after
        })
    }

    /// Changes the states in the word of `page`, which is in range. This is the
    /// one place where states change, and the counters with them. A counter
    /// rises before its pages do and falls after them, so that it never misses a
    /// page and never wraps.
    pub(super) fn change_word(
        &self,
        page: u64,
        mut next: impl FnMut(StateWord) -> StateWord,
    ) -> (StateWord, StateWord) {
        let cell = &self.words[(page / WORD_PAGES) as usize];
        let mut before = self.load(page);
        loop {
            let after = next(before);
            if after == before {
                return (before, after);
            }
            let unsettled = Change::of(before, after, |state| !state.is_settled());
            let in_hand = Change::of(before, after, |state| state.placing);
            unsettled.rise(&self.unsettled);
            in_hand.rise(&self.in_hand);
            match cell.compare_exchange_weak(before.0, after.0, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => {
                    unsettled.fall(&self.unsettled);
                    in_hand.fall(&self.in_hand);
                    return (before, after);
                }
                Err(now) => {
                    unsettled.undo_rise(&self.unsettled);
                    in_hand.undo_rise(&self.in_hand);
                    before = StateWord(now);
                }
            }
        }
    }

    /// The word of `page`.
    fn load(&self, page: u64) -> StateWord {
        StateWord(self.words[(page / WORD_PAGES) as usize].load(Ordering::Acquire))
    }
}

/// The states of 16 pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct StateWord(u64);

impl StateWord {
    /// The lowest bit of each state.
    const EACH: u64 = u64::MAX / PageState::MASK;

    pub(super) fn get(self, page: PageIndex) -> PageState {
        PageState::from_bits(self.0 >> Self::shift(page))
    }

    pub(super) fn set(&mut self, page: PageIndex, state: PageState) {
        self.0 &= !(PageState::MASK << Self::shift(page));
        self.0 |= state.bits() << Self::shift(page);
    }

    /// That of pages which are all in this state.
    fn all(state: PageState) -> Self {
        Self(state.bits() * Self::EACH)
    }

    /// The state of all its pages, if they are alike, as in memory with much of one kind.
    fn uniform(self) -> Option<PageState> {
        let first = self.0 & PageState::MASK;
        (self.0 == first * Self::EACH).then(|| PageState::from_bits(first))
    }

    /// Whether a page of `run`, which lies in this word, is in such a state.
    pub(super) fn any(self, run: PageRun, wanted: impl Fn(PageState) -> bool) -> bool {
        match self.uniform() {
            Some(state) => wanted(state),
            None => self.pages(run).any(|(_, state)| wanted(state)),
        }
    }

    /// The states of `run`, which lies in this word.
    pub(super) fn pages(self, run: PageRun) -> impl Iterator<Item = (PageIndex, PageState)> {
        run.pages().map(move |page| (page, self.get(page)))
    }

    /// A bit for each page whose state is wanted.
    fn mask(self, wanted: impl Fn(PageState) -> bool) -> u64 {
        let bit = |page| u64::from(wanted(self.get(PageIndex::new(page)))) << page;
        (0..WORD_PAGES).map(bit).fold(0, |mask, bit| mask | bit)
    }

    fn count(self, wanted: impl Fn(PageState) -> bool) -> u64 {
        if let Some(state) = self.uniform() {
            return u64::from(wanted(state)) * WORD_PAGES;
        }
        let pages = (0..WORD_PAGES).map(PageIndex::new);
        pages.filter(|page| wanted(self.get(*page))).count() as u64
    }

    fn shift(page: PageIndex) -> u32 {
        (page.get() % WORD_PAGES) as u32 * PageState::BITS
    }
}

/// By how much a counter changes with a word.
struct Change {
    before: u64,
    after: u64,
}

impl Change {
    fn of(before: StateWord, after: StateWord, counted: impl Fn(PageState) -> bool) -> Self {
        Self { before: before.count(&counted), after: after.count(&counted) }
    }

    fn rise(&self, counter: &AtomicU64) {
        if self.after > self.before {
            counter.fetch_add(self.after - self.before, Ordering::AcqRel);
        }
    }

    fn undo_rise(&self, counter: &AtomicU64) {
        if self.after > self.before {
            counter.fetch_sub(self.after - self.before, Ordering::AcqRel);
        }
    }

    fn fall(&self, counter: &AtomicU64) {
        if self.after < self.before {
            counter.fetch_sub(self.before - self.after, Ordering::AcqRel);
        }
    }
}

/// Whether a word begins with `page`.
pub(super) fn is_word_border(page: u64) -> bool {
    page.is_multiple_of(WORD_PAGES)
}

/// The number after the last page in the word of `page`.
pub(super) fn word_end(page: u64) -> u64 {
    page - page % WORD_PAGES + WORD_PAGES
}

/// Calls `change` with the parts of `run` that lie in one word each.
pub(super) fn change_each_word(run: PageRun, mut change: impl FnMut(PageRun)) {
    let mut next = run.first().get();
    while next < run.end() {
        let end = word_end(next).min(run.end());
        if let Some(part) = PageRun::new(PageIndex::new(next), end - next) {
            change(part);
        }
        next = end;
    }
}
