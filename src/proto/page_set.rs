//! A set of page numbers as maximal runs: what a scan for zero pages yields, among
//! others. It is a plain value, not a concurrent structure; see
//! [`AtomicBitmap`](super::bitmap::AtomicBitmap). The set of placed pages, which goes
//! over the wire, is a bitmap: [`placed`](super::placed).

use super::page::{PageIndex, PageRun};
use std::fmt;

/// A set of pages: maximal runs in rising order.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    /// Rising, and with at least one page between any two.
    runs: Vec<PageRun>,
    count: u64,
}

impl PageSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// The set of all pages from 0 to `pages`.
    pub fn all(pages: u64) -> Self {
        PageRun::new(PageIndex::new(0), pages).into_iter().collect()
    }

    /// How many pages are in it.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether no page is in it.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The number after its last page; 0 if it is empty.
    pub fn end(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.end())
    }

    /// Its maximal runs in rising order.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = PageRun> + DoubleEndedIterator + '_ {
        self.runs.iter().copied()
    }

    /// Whether `page` is in it.
    pub fn contains(&self, page: PageIndex) -> bool {
        let after = self.runs.partition_point(|run| run.first() <= page);
        after > 0 && self.runs[after - 1].contains(page)
    }

    /// Adds the pages of `run`. Constant time if it lies at or after the end, so
    /// that a set built in rising order is built in linear time.
    pub fn insert(&mut self, run: PageRun) {
        // What `run` overlaps or touches becomes one run with it.
        let from = if run.first().get() > self.end() {
            self.runs.len()
        } else {
            self.runs.partition_point(|old| old.end() < run.first().get())
        };
        let to = from + self.runs[from..].partition_point(|old| old.first().get() <= run.end());
        let touched = &self.runs[from..to];
        let first = touched.first().map_or(run.first(), |old| old.first().min(run.first()));
        let end = touched.last().map_or(run.end(), |old| old.end().max(run.end()));
        let replaced: u64 = touched.iter().map(|old| old.count()).sum();
        let Some(merged) = PageRun::new(first, end - first.get()) else {
            return; // Not reached: `end` is past `first`, and no run overflows.
        };
        self.count = self.count - replaced + merged.count();
        match to - from {
            0 => self.runs.insert(from, merged),
            _ => {
                self.runs[from] = merged;
                self.runs.drain(from + 1..to);
            }
        }
    }

    /// The pages that are in this set or in `other`, in linear time.
    pub fn union(&self, other: &Self) -> Self {
        let (mut left, mut right) = (self.runs().peekable(), other.runs().peekable());
        let mut union = Self::new();
        loop {
            let next = match (left.peek(), right.peek()) {
                (Some(a), Some(b)) if a.first() <= b.first() => left.next(),
                (_, Some(_)) => right.next(),
                (_, None) => left.next(),
            };
            match next {
                // The first pages rise, so this touches no run but the last.
                Some(run) => union.insert(run),
                None => return union,
            }
        }
    }

    /// The pages from 0 to `pages` that are not in this set.
    pub fn complement(&self, pages: u64) -> Self {
        let mut complement = Self::new();
        let mut next = 0;
        for run in self.runs() {
            let end = run.first().get().min(pages);
            complement.insert_range(next, end);
            next = run.end();
        }
        complement.insert_range(next, pages);
        complement
    }

    fn insert_range(&mut self, first: u64, end: u64) {
        let count = end.saturating_sub(first);
        if let Some(run) = PageRun::new(PageIndex::new(first), count) {
            self.insert(run);
        }
    }
}

impl FromIterator<PageRun> for PageSet {
    fn from_iter<I: IntoIterator<Item = PageRun>>(runs: I) -> Self {
        let mut set = Self::new();
        set.extend(runs);
        set
    }
}

impl Extend<PageRun> for PageSet {
    fn extend<I: IntoIterator<Item = PageRun>>(&mut self, runs: I) {
        for run in runs {
            self.insert(run);
        }
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(&self.runs).finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun::new(PageIndex::new(first), count).unwrap()
    }

    fn set(runs: &[(u64, u64)]) -> PageSet {
        runs.iter().map(|(first, count)| run(*first, *count)).collect()
    }

    #[test]
    fn runs_that_touch_become_one() {
        assert_eq!(set(&[(5, 2), (0, 3), (3, 2)]), set(&[(0, 7)]));
        assert_eq!(set(&[(0, 1), (2, 1), (4, 1), (1, 4)]).runs().count(), 1);
        assert_eq!(set(&[(0, 1), (2, 1)]).runs().count(), 2);
        assert_eq!(set(&[(10, 5), (0, 100)]).count(), 100);
    }

    fn pages() -> impl Strategy<Value = BTreeSet<u64>> {
        let runs = prop::collection::vec((0u64..400, 1u64..20), 0..40);
        runs.prop_map(|runs| {
            runs.into_iter().flat_map(|(first, count)| first..first + count).collect()
        })
    }

    fn of(pages: &BTreeSet<u64>) -> PageSet {
        pages.iter().map(|page| run(*page, 1)).collect()
    }

    proptest! {
        #[test]
        fn it_behaves_as_a_set_of_numbers(
            runs in prop::collection::vec((0u64..400, 1u64..40), 0..60),
            other in pages(),
        ) {
            let mut model = BTreeSet::new();
            let mut built = PageSet::new();
            for (first, count) in runs {
                built.insert(run(first, count));
                model.extend(first..first + count);
                prop_assert_eq!(&built, &of(&model));
                prop_assert_eq!(built.count(), model.len() as u64);
            }
            for page in 0..450 {
                prop_assert_eq!(built.contains(PageIndex::new(page)), model.contains(&page));
            }
            prop_assert_eq!(built.union(&of(&other)), of(&model.union(&other).copied().collect()));
            for pages in [0, 1, 200, 500] {
                let rest: BTreeSet<u64> = (0..pages).filter(|it| !model.contains(it)).collect();
                prop_assert_eq!(built.complement(pages), of(&rest));
            }
        }
    }
}
