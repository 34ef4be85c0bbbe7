//! A set of page numbers as runs, and its form on the wire.
//!
//! It is what the two sides exchange after a lost link (the pages that are
//! placed) and what a scan for zero pages yields. It is a plain value, not a
//! concurrent structure; see [`AtomicBitmap`](super::bitmap::AtomicBitmap).
//!
//! # On the wire
//!
//! Every number is an unsigned LEB128 varint in its shortest form:
//!
//! ```text
//! +----------+---------+------------+-------+------------+-------+ ...
//! | runs     | first   | count - 1  | gap-1 | count - 1  | gap-1 |
//! +----------+---------+------------+-------+------------+-------+ ...
//! ```
//!
//! `gap` is the number of pages between the end of a run and the next one; it
//! is at least 1, or the two would be one run. So overlapping, adjacent or
//! falling runs cannot be written down, and a set has exactly one encoding.

use super::page::{PageIndex, PageRun};
use std::fmt;

/// A set of pages: maximal runs in rising order.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    /// Rising, and with at least one page between any two.
    runs: Vec<PageRun>,
    count: u64,
}

/// Why bytes are no page set, or not one that is wanted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageSetError {
    /// The bytes end inside a number or before the last run.
    #[error("the page set ends in the middle")]
    Truncated,
    /// Bytes after the last run.
    #[error("{0} bytes follow the page set's last run")]
    Trailing(usize),
    /// A number that is longer than need be, or larger than 64 bits.
    #[error("a number in the page set is not in its shortest form or exceeds 64 bits")]
    BadNumber,
    /// More runs than the limit.
    #[error("the page set has {runs} runs, more than {runs_max}")]
    TooManyRuns {
        /// How many it says to have.
        runs: u64,
        /// How many were allowed.
        runs_max: usize,
    },
    /// A run that reaches past the last page.
    #[error("a run of the page set reaches past the last of {pages} pages")]
    PastTheEnd {
        /// How many pages there are.
        pages: u64,
    },
    /// A part that does not come wholly after the parts before it.
    #[error("a part of the page set begins at {first}, not after the parts before it")]
    NotAfter {
        /// Where it begins.
        first: PageIndex,
    },
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

    /// This set in parts of at most `runs_max` runs (at least 1) each, in rising
    /// order, for messages of bounded size; one empty part if it is empty.
    /// [`append`](Self::append) puts them together again.
    pub fn chunks(&self, runs_max: usize) -> impl Iterator<Item = PageSet> + '_ {
        let empty = self.is_empty().then(PageSet::new);
        let parts = self.runs.chunks(runs_max.max(1)).map(|runs| PageSet {
            runs: runs.to_vec(),
            count: runs.iter().map(|run| run.count()).sum(),
        });
        empty.into_iter().chain(parts)
    }

    /// Adds a later part, in time linear in that part.
    ///
    /// # Errors
    /// [`PageSetError::NotAfter`] if it overlaps or touches this set or comes
    /// before its end; the set is then unchanged.
    pub fn append(&mut self, part: &PageSet) -> Result<(), PageSetError> {
        let Some(first) = part.runs.first().map(|run| run.first()) else {
            return Ok(());
        };
        if !self.is_empty() && first.get() <= self.end() {
            return Err(PageSetError::NotAfter { first });
        }
        self.runs.extend_from_slice(&part.runs);
        self.count += part.count;
        Ok(())
    }

    /// Writes the set to the end of `out`: at most 10 bytes and 20 bytes a run,
    /// in a guest's memory at most 5 and 10.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_number(out, self.runs.len() as u64);
        let mut next = 0;
        for run in &self.runs {
            put_number(out, run.first().get() - next);
            put_number(out, run.count() - 1);
            // Past the end and the page that is not in the set; the last run
            // may end at the very end of the number space.
            next = run.end().saturating_add(1);
        }
    }

    /// Reads a set that takes up all of `bytes`, has no page at or after
    /// `pages`, and at most `runs_max` runs. Allocates no more than 8 times the
    /// length of `bytes`.
    ///
    /// # Errors
    /// Any [`PageSetError`] but `NotAfter`.
    pub fn decode(bytes: &[u8], pages: u64, runs_max: usize) -> Result<Self, PageSetError> {
        let past_the_end = PageSetError::PastTheEnd { pages };
        let mut rest = bytes;
        let runs = take_number(&mut rest)?;
        if runs > runs_max as u64 {
            return Err(PageSetError::TooManyRuns { runs, runs_max });
        }
        // A run is at least two bytes; so what is allocated was paid for.
        if runs > rest.len() as u64 / 2 {
            return Err(PageSetError::Truncated);
        }
        let mut set = Self { runs: Vec::with_capacity(runs as usize), count: 0 };
        let mut next = 0u64;
        for _ in 0..runs {
            let first = next.checked_add(take_number(&mut rest)?);
            let count = take_number(&mut rest)?.checked_add(1);
            let run = first.zip(count).and_then(|(f, c)| PageRun::new(PageIndex::new(f), c));
            let run = run.filter(|run| run.end() <= pages).ok_or(past_the_end.clone())?;
            set.runs.push(run);
            set.count += run.count();
            next = run.end().saturating_add(1);
        }
        match rest.len() {
            0 => Ok(set),
            trailing => Err(PageSetError::Trailing(trailing)),
        }
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

fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take_number(rest: &mut &[u8]) -> Result<u64, PageSetError> {
    let mut number = 0u64;
    for place in 0..10 {
        let Some((&byte, after)) = rest.split_first() else {
            return Err(PageSetError::Truncated);
        };
        *rest = after;
        let bits = u64::from(byte & 0x7f);
        // The tenth byte holds the 64th bit and nothing else.
        if place == 9 && bits > 1 {
            return Err(PageSetError::BadNumber);
        }
        number |= bits << (7 * place);
        if byte & 0x80 == 0 {
            let padded = place > 0 && byte == 0;
            return if padded { Err(PageSetError::BadNumber) } else { Ok(number) };
        }
    }
    Err(PageSetError::BadNumber)
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

    fn encoded(set: &PageSet) -> Vec<u8> {
        let mut out = vec![];
        set.encode(&mut out);
        out
    }

    #[test]
    fn runs_that_touch_become_one() {
        assert_eq!(set(&[(5, 2), (0, 3), (3, 2)]), set(&[(0, 7)]));
        assert_eq!(set(&[(0, 1), (2, 1), (4, 1), (1, 4)]).runs().count(), 1);
        assert_eq!(set(&[(0, 1), (2, 1)]).runs().count(), 2);
        assert_eq!(set(&[(10, 5), (0, 100)]).count(), 100);
    }

    #[test]
    fn these_are_its_bytes() {
        assert_eq!(encoded(&PageSet::new()), [0]);
        assert_eq!(encoded(&set(&[(0, 1)])), [1, 0, 0]);
        let bytes = [
            3, // runs
            0, 0, // page 0
            2, 63, // pages 4 to 67
            0xbb, 0xff, 0x3f, 0xff, 0xff, 0x03, // 65,536 pages from 1,048,512
        ];
        let runs = set(&[(0, 1), (4, 64), (68 + 1 + 0xf_ffbb, 65_536)]);
        assert_eq!(encoded(&runs), bytes);
        assert_eq!(PageSet::decode(&bytes, 1 << 32, 3), Ok(runs));
    }

    #[test]
    fn hostile_bytes_are_refused_by_name() {
        use PageSetError::*;
        let decode = |bytes: &[u8]| PageSet::decode(bytes, 100, 4);
        let full = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        for (bytes, error) in [
            (&[][..], Truncated),
            (&[1], Truncated),
            (&[1, 0], Truncated),
            (&[2, 0, 0, 0], Truncated),
            (&[1, 0x80, 0x80], Truncated),
            (&[0, 0], Trailing(1)),
            (&[1, 0, 0, 7, 7], Trailing(2)),
            (&[0x80, 0], BadNumber),
            (&[1, 0x80, 0x00, 0], BadNumber),
            (&[1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02], BadNumber),
            (&[1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x81, 0], BadNumber),
            (&[5, 0, 0], TooManyRuns { runs: 5, runs_max: 4 }),
            (&full, TooManyRuns { runs: u64::MAX, runs_max: 4 }),
            (&[1, 100, 0], PastTheEnd { pages: 100 }),
            (&[1, 0, 100], PastTheEnd { pages: 100 }),
            (&[2, 0, 98, 0, 0], PastTheEnd { pages: 100 }),
            (&[&[1, 0][..], &full].concat(), PastTheEnd { pages: 100 }),
            (&[&[1][..], &full, &[0]].concat(), PastTheEnd { pages: 100 }),
            (&[&[2, 9, 9][..], &full, &[0]].concat(), PastTheEnd { pages: 100 }),
        ] {
            assert_eq!(decode(bytes), Err(error), "{bytes:?}");
        }
        assert_eq!(decode(&[1, 99, 0]), Ok(set(&[(99, 1)])));
        assert_eq!(decode(&[1, 0, 99]), Ok(PageSet::all(100)));
        // A large number of runs allocates nothing that was not paid for.
        assert_eq!(PageSet::decode(&full, 100, usize::MAX), Err(Truncated));
        // The very end of the number space.
        let last = set(&[(0, 1), (u64::MAX - 1, 1)]);
        assert_eq!(PageSet::decode(&encoded(&last), u64::MAX, 2), Ok(last));
    }

    #[test]
    fn parts_must_come_in_order() {
        let mut whole = set(&[(5, 2)]);
        for wrong in [set(&[(0, 1)]), set(&[(6, 9)]), set(&[(7, 1)])] {
            let error = whole.append(&wrong);
            assert!(matches!(error, Err(PageSetError::NotAfter { .. })));
        }
        assert_eq!(whole.append(&PageSet::new()), Ok(()));
        assert_eq!(whole.append(&set(&[(8, 1)])), Ok(()));
        assert_eq!(whole, set(&[(5, 2), (8, 1)]));
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

        #[test]
        fn what_is_encoded_is_decoded(pages in pages(), runs_max in 1usize..8) {
            let whole = of(&pages);
            let bytes = encoded(&whole);
            let runs = whole.runs().len();
            prop_assert_eq!(PageSet::decode(&bytes, whole.end(), runs), Ok(whole.clone()));
            for end in 0..bytes.len() {
                prop_assert!(PageSet::decode(&bytes[..end], whole.end(), runs).is_err());
            }
            let mut joined = PageSet::new();
            for part in whole.chunks(runs_max) {
                let part = PageSet::decode(&encoded(&part), whole.end(), runs_max);
                prop_assert_eq!(joined.append(&part.unwrap()), Ok(()));
            }
            prop_assert_eq!(joined, whole);
        }

        #[test]
        fn what_is_decoded_has_no_other_encoding(
            bytes in prop::collection::vec(prop_oneof![0u8..6, any::<u8>()], 0..24),
        ) {
            if let Ok(set) = PageSet::decode(&bytes, 1 << 32, 10) {
                prop_assert_eq!(encoded(&set), bytes);
                prop_assert!(set.end() <= 1 << 32);
                prop_assert_eq!(&set.runs().collect::<PageSet>(), &set);
            }
        }
    }
}
