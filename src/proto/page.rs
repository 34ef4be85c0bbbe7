//! Page numbers and runs of pages.
//!
//! A [`PageIndex`] counts guest pages from 0 across all memory regions of a
//! [`MemoryLayout`](super::layout::MemoryLayout); it is neither a guest address
//! nor a host address, and has no arithmetic operators, so that the three cannot
//! be mixed up by accident.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in a guest page. The wire names the page size, so that another one is
/// refused by name; this engine moves 4 KiB pages.
pub const PAGE_SIZE: usize = 4096;

/// The most pages that one frame or one placement carries (256 KiB).
pub const RUN_PAGES_MAX: u32 = 64;

/// The number of a guest page, counted over all regions from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(u64);

impl PageIndex {
    /// The page with this number.
    pub const fn new(index: u64) -> Self {
        Self(index)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The number as an index into a table that has an entry a page.
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }

    /// The page `pages` further on, or `None` past the end of the number space.
    pub const fn checked_add(self, pages: u64) -> Option<Self> {
        match self.0.checked_add(pages) {
            Some(index) => Some(Self(index)),
            None => None,
        }
    }
}

impl fmt::Debug for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}", self.0)
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {}", self.0)
    }
}

/// Consecutive pages: `count` of them from `first`, at least one, and never past
/// the end of the number space.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRun {
    first: PageIndex,
    count: u64,
}

impl PageRun {
    /// The run of `count` pages from `first`; `None` if it is empty or overflows.
    pub const fn new(first: PageIndex, count: u64) -> Option<Self> {
        if count == 0 || first.0.checked_add(count).is_none() {
            return None;
        }
        Some(Self { first, count })
    }

    /// A run of one page.
    pub const fn single(page: PageIndex) -> Self {
        Self { first: page, count: 1 }
    }

    /// Its first page.
    pub const fn first(self) -> PageIndex {
        self.first
    }

    /// How many pages it has; never 0.
    pub const fn count(self) -> u64 {
        self.count
    }

    /// The number after its last page.
    pub const fn end(self) -> u64 {
        self.first.0 + self.count
    }

    /// Its bytes in memory or, uncompressed, on the wire.
    pub const fn bytes(self) -> usize {
        self.count as usize * PAGE_SIZE
    }

    /// Whether `page` is in it.
    pub const fn contains(self, page: PageIndex) -> bool {
        page.0 >= self.first.0 && page.0 < self.end()
    }

    /// Its pages in rising order.
    pub fn pages(self) -> impl DoubleEndedIterator<Item = PageIndex> {
        (self.first.0..self.end()).map(PageIndex)
    }

    /// The same run in pieces of `most` pages, the last of which may be shorter.
    ///
    /// # Panics
    /// If `most` is 0.
    pub fn pieces(self, most: u64) -> impl Iterator<Item = Self> {
        let pieces = (0..self.count.div_ceil(most)).map(move |piece| piece * most);
        pieces.map(move |behind| Self {
            first: PageIndex(self.first.0 + behind),
            count: most.min(self.count - behind),
        })
    }
}

impl fmt::Debug for PageRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}+{}", self.first.0, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runs_pieces_are_its_pages_in_order_and_none_is_too_long() {
        let run = |first, count| PageRun::new(PageIndex::new(first), count).unwrap();
        let pieces = |most| run(10, 7).pieces(most).collect::<Vec<_>>();
        assert_eq!(pieces(3), [run(10, 3), run(13, 3), run(16, 1)]);
        assert_eq!(pieces(1).len(), 7);
        assert_eq!(pieces(7), [run(10, 7)]);
        assert_eq!(pieces(u64::MAX), [run(10, 7)]);
    }
}
