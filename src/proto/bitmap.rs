//! A fixed-size bitmap, a bit a page, that many threads set and clear without a
//! lock.
//!
//! It knows nothing of what a bit means; the ledgers do. Every operation on a
//! run is atomic word by word (64 pages), not as a whole.

use super::page::{PageIndex, PageRun};
use super::sync::{AtomicU64, Ordering};

const WORD_PAGES: u64 = 64;

/// One bit for each of a fixed number of pages.
pub struct AtomicBitmap {
    words: Box<[AtomicU64]>,
    pages: u64,
}

impl AtomicBitmap {
    /// A bitmap of `pages` clear bits.
    pub fn new(pages: u64) -> Self {
        let words = (0..pages.div_ceil(WORD_PAGES)).map(|_| AtomicU64::new(0)).collect();
        Self { words, pages }
    }

    /// A bitmap of `pages` bits from words with the same bits, those past the last page clear.
    pub(super) fn from_words(pages: u64, words: Vec<u64>) -> Self {
        debug_assert_eq!(words.len() as u64, pages.div_ceil(WORD_PAGES));
        Self { words: words.into_iter().map(AtomicU64::new).collect(), pages }
    }

    /// How many pages it has bits for.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether the bit of `page` is set; `false` past the end.
    pub fn is_set(&self, page: PageIndex) -> bool {
        page.get() < self.pages && self.load(page.get() / WORD_PAGES) & bit(page) != 0
    }

    /// Test-and-set: `true` if this call set the bit, `false` if it was set
    /// already or lies past the end.
    pub fn set(&self, page: PageIndex) -> bool {
        if page.get() >= self.pages {
            return false;
        }
        let word = &self.words[(page.get() / WORD_PAGES) as usize];
        word.fetch_or(bit(page), Ordering::AcqRel) & bit(page) == 0
    }

    /// Sets the bits of `run`, one operation a word, and returns how many of
    /// them this call set. Pages past the end are left out.
    pub fn set_run(&self, run: PageRun) -> u64 {
        self.masks(run)
            .map(|(word, mask)| {
                let before = word.fetch_or(mask, Ordering::AcqRel);
                u64::from((mask & !before).count_ones())
            })
            .sum()
    }

    /// Clears the bits of `run`, one operation a word, and returns how many of
    /// them this call cleared. Pages past the end are left out.
    pub fn clear_run(&self, run: PageRun) -> u64 {
        self.masks(run)
            .map(|(word, mask)| {
                let before = word.fetch_and(!mask, Ordering::AcqRel);
                u64::from((mask & before).count_ones())
            })
            .sum()
    }

    /// Sets the first maximal stretch of clear bits inside `within` and returns
    /// it; `None` if all of them are set.
    ///
    /// A word is taken by compare-and-swap, not by `fetch_or`: what `fetch_or`
    /// won beside a page that another thread took meanwhile would have to be
    /// cleared again, and whoever looked in between would take those bits for
    /// somebody's. Here no bit is ever set that the caller does not get.
    pub fn take_clear_stretch(&self, within: PageRun) -> Option<PageRun> {
        let end = within.end().min(self.pages);
        let mut first = within.first().get();
        let mut taken = 0;
        while taken == 0 {
            first = self.next_clear_below(first, end)?;
            taken = self.take_from(first, end);
        }
        while (first + taken).is_multiple_of(WORD_PAGES) && first + taken < end {
            match self.take_from(first + taken, end) {
                0 => break,
                more => taken += more,
            }
        }
        PageRun::new(PageIndex::new(first), taken)
    }

    /// The first page at or after `from` whose bit is clear.
    pub fn next_clear(&self, from: PageIndex) -> Option<PageIndex> {
        self.next_clear_below(from.get(), self.pages).map(PageIndex::new)
    }

    /// The last page at or before `from` whose bit is clear.
    pub fn prev_clear(&self, from: PageIndex) -> Option<PageIndex> {
        let from = from.get().min(self.pages.checked_sub(1)?);
        let mut index = from / WORD_PAGES;
        let mut clear = !self.load(index) & (u64::MAX >> (WORD_PAGES - 1 - from % WORD_PAGES));
        while clear == 0 {
            index = index.checked_sub(1)?;
            clear = !self.load(index);
        }
        Some(PageIndex::new(index * WORD_PAGES + u64::from(clear.ilog2())))
    }

    /// How many bits are set, by counting them: exact only while nobody writes.
    pub fn count_set(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }

    /// Its words as they are now, one after the other.
    pub(super) fn loads(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().map(|word| word.load(Ordering::Acquire))
    }

    /// How many bits are set that are clear in `words`, a bitmap of the same pages.
    pub(super) fn count_set_beside(&self, words: &[u64]) -> u64 {
        let pairs = self.words.iter().zip(words);
        pairs.map(|(word, not)| u64::from((word.load(Ordering::Acquire) & !not).count_ones())).sum()
    }

    /// Takes the clear bits from exactly `first` on, up to `end` or the end of
    /// the word. Returns how many; 0 if the bit of `first` is set.
    fn take_from(&self, first: u64, end: u64) -> u64 {
        let word = &self.words[(first / WORD_PAGES) as usize];
        let offset = first % WORD_PAGES;
        let room = (WORD_PAGES - offset).min(end - first);
        let mut seen = word.load(Ordering::Acquire);
        loop {
            let clear = u64::from((!seen >> offset).trailing_ones()).min(room);
            if clear == 0 {
                return 0;
            }
            let wanted = seen | (low_bits(clear) << offset);
            match word.compare_exchange_weak(seen, wanted, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return clear,
                Err(now) => seen = now,
            }
        }
    }

    fn next_clear_below(&self, from: u64, end: u64) -> Option<u64> {
        let mut base = from - from % WORD_PAGES;
        let mut within = u64::MAX << (from % WORD_PAGES);
        while base < end {
            let clear = !self.load(base / WORD_PAGES) & within;
            if clear != 0 {
                let page = base + u64::from(clear.trailing_zeros());
                return (page >= from && page < end).then_some(page);
            }
            base += WORD_PAGES;
            within = u64::MAX;
        }
        None
    }

    /// The words that hold the bits of `run`, with the bits in them.
    fn masks(&self, run: PageRun) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let end = run.end().min(self.pages);
        let mut next = run.first().get();
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let offset = next % WORD_PAGES;
            let count = (WORD_PAGES - offset).min(end - next);
            let word = &self.words[(next / WORD_PAGES) as usize];
            next += count;
            Some((word, low_bits(count) << offset))
        })
    }

    fn load(&self, word: u64) -> u64 {
        self.words[word as usize].load(Ordering::Acquire)
    }
}

fn bit(page: PageIndex) -> u64 {
    1 << (page.get() % WORD_PAGES)
}

/// A word whose lowest `count` bits are set, or all of them if it has no more. `count`
/// is not 0.
pub(crate) fn low_bits(count: u64) -> u64 {
    u64::MAX >> (WORD_PAGES - count.min(WORD_PAGES))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun::new(PageIndex::new(first), count).unwrap()
    }

    #[test]
    fn a_stretch_ends_at_the_first_set_bit_and_goes_over_word_borders() {
        let bitmap = AtomicBitmap::new(300);
        assert!(bitmap.set(PageIndex::new(200)));
        assert_eq!(bitmap.take_clear_stretch(run(10, 250)), Some(run(10, 190)));
        assert_eq!(bitmap.take_clear_stretch(run(10, 250)), Some(run(201, 59)));
        assert_eq!(bitmap.take_clear_stretch(run(10, 250)), None);
        assert_eq!(bitmap.take_clear_stretch(run(0, u64::MAX)), Some(run(0, 10)));
        assert_eq!(bitmap.take_clear_stretch(run(0, u64::MAX)), Some(run(260, 40)));
        assert_eq!(bitmap.take_clear_stretch(run(300, 5)), None);
        assert_eq!(bitmap.count_set(), 300);
    }

    #[test]
    fn nothing_past_the_end_is_set_or_found() {
        let bitmap = AtomicBitmap::new(65);
        assert!(!bitmap.set(PageIndex::new(65)));
        assert_eq!(bitmap.set_run(run(60, 100)), 5);
        assert_eq!(bitmap.next_clear(PageIndex::new(60)), None);
        assert_eq!(bitmap.next_clear(PageIndex::new(u64::MAX)), None);
        assert_eq!(bitmap.prev_clear(PageIndex::new(u64::MAX)), Some(PageIndex::new(59)));
        assert_eq!(AtomicBitmap::new(0).prev_clear(PageIndex::new(0)), None);
        assert_eq!(AtomicBitmap::new(0).next_clear(PageIndex::new(0)), None);
    }

    proptest! {
        #[test]
        fn it_behaves_as_a_set_of_numbers(
            pages in 1u64..300,
            steps in prop::collection::vec((0u8..4, 0u64..320, 1u64..150), 1..60),
        ) {
            let bitmap = AtomicBitmap::new(pages);
            let mut model = BTreeSet::new();
            for (what, first, count) in steps {
                let run = run(first, count);
                let inside: Vec<u64> = (first..first + count).filter(|p| *p < pages).collect();
                match what {
                    0 => {
                        let news = inside.iter().filter(|p| model.insert(**p)).count();
                        prop_assert_eq!(bitmap.set_run(run), news as u64);
                    }
                    1 => {
                        let gone = inside.iter().filter(|p| model.remove(*p)).count();
                        prop_assert_eq!(bitmap.clear_run(run), gone as u64);
                    }
                    2 => {
                        let fresh = first < pages && model.insert(first);
                        prop_assert_eq!(bitmap.set(PageIndex::new(first)), fresh);
                    }
                    _ => {
                        let stretch: Vec<u64> = inside
                            .iter()
                            .copied()
                            .skip_while(|p| model.contains(p))
                            .take_while(|p| !model.contains(p))
                            .collect();
                        let taken = bitmap.take_clear_stretch(run);
                        let taken = taken.map_or(vec![], |run| (run.first().get()..run.end()).collect());
                        prop_assert_eq!(&taken, &stretch);
                        model.extend(stretch);
                    }
                }
                let next = (first..pages).find(|p| !model.contains(p)).map(PageIndex::new);
                prop_assert_eq!(bitmap.next_clear(PageIndex::new(first)), next);
                let prev = (0..pages).take_while(|p| *p <= first).filter(|p| !model.contains(p)).last();
                prop_assert_eq!(bitmap.prev_clear(PageIndex::new(first)), prev.map(PageIndex::new));
                prop_assert_eq!(bitmap.is_set(PageIndex::new(first)), model.contains(&first));
                prop_assert_eq!(bitmap.count_set(), model.len() as u64);
            }
        }
    }
}
