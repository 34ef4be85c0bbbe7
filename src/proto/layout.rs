//! Where a guest's memory lies in its physical address space.

use super::page::{PAGE_SIZE, PageIndex, PageRun};
use serde::{Deserialize, Serialize};

/// The most regions in a layout.
pub const REGIONS_MAX: usize = 64;
/// The most pages in a layout: 16 TiB of 4 KiB pages.
pub const PAGES_MAX: u64 = 1 << 32;

/// A guest physical address. No arithmetic operators, as for [`PageIndex`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GuestAddress(pub u64);

/// One stretch of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its first guest physical address, page-aligned.
    pub start: GuestAddress,
    /// Its length in pages, at least 1.
    pub pages: u64,
}

/// The guest's memory regions, in rising order and without overlap. Both sides
/// must have the same one; page numbers count through the regions in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct MemoryLayout {
    regions: Vec<Region>,
}

/// Why regions make no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No region at all.
    #[error("the memory layout has no region")]
    Empty,
    /// More than [`REGIONS_MAX`].
    #[error("the memory layout has {0} regions, more than {REGIONS_MAX}")]
    TooManyRegions(usize),
    /// An empty, unaligned or overflowing region.
    #[error("memory region {index} ({start:#x}, {pages} pages) is empty, unaligned or too large")]
    BadRegion {
        /// Its place in the list.
        index: usize,
        /// Its start.
        start: u64,
        /// Its length in pages.
        pages: u64,
    },
    /// A region that begins before the one before it ends.
    #[error("memory region {0} overlaps the one before it, or is out of order")]
    Overlap(usize),
}

impl MemoryLayout {
    /// Checks `regions` and makes a layout of them.
    pub fn new(regions: Vec<Region>) -> Result<Self, LayoutError> {
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        if regions.len() > REGIONS_MAX {
            return Err(LayoutError::TooManyRegions(regions.len()));
        }
        let mut total = 0u64;
        let mut last_end = 0u64;
        for (index, region) in regions.iter().enumerate() {
            let start = region.start.0;
            let bad = LayoutError::BadRegion { index, start, pages: region.pages };
            if region.pages == 0 || !start.is_multiple_of(PAGE_SIZE as u64) {
                return Err(bad);
            }
            if region.pages > PAGES_MAX || total + region.pages > PAGES_MAX {
                return Err(bad);
            }
            let Some(end) = start.checked_add(region.pages * PAGE_SIZE as u64) else {
                return Err(bad);
            };
            if start < last_end {
                return Err(LayoutError::Overlap(index));
            }
            total += region.pages;
            last_end = end;
        }
        Ok(Self { regions })
    }

    /// A layout of one region of `pages` pages from address 0.
    pub fn flat(pages: u64) -> Result<Self, LayoutError> {
        Self::new(vec![Region { start: GuestAddress(0), pages }])
    }

    /// The layout of a PC: from address 0, with the stretch from 3 GiB to 4 GiB
    /// left free for devices.
    pub fn pc(pages: u64) -> Result<Self, LayoutError> {
        const BELOW_GAP: u64 = (3 << 30) / PAGE_SIZE as u64;
        let mut regions = vec![Region { start: GuestAddress(0), pages: pages.min(BELOW_GAP) }];
        if pages > BELOW_GAP {
            regions.push(Region { start: GuestAddress(4 << 30), pages: pages - BELOW_GAP });
        }
        Self::new(regions)
    }

    /// The regions in order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Each region with the run of page numbers that it covers.
    pub fn region_runs(&self) -> impl Iterator<Item = (Region, PageRun)> + '_ {
        self.regions.iter().scan(0u64, |next, region| {
            let first = PageIndex::new(*next);
            *next += region.pages;
            PageRun::new(first, region.pages).map(|run| (*region, run))
        })
    }

    /// How many pages there are in all.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.pages).sum()
    }

    /// How many bytes there are in all.
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE as u64
    }

    /// The page that holds `address`, if it is memory.
    pub fn page_at(&self, address: GuestAddress) -> Option<PageIndex> {
        self.region_runs().find_map(|(region, run)| {
            let offset = address.0.checked_sub(region.start.0)? / PAGE_SIZE as u64;
            (offset < region.pages).then(|| PageIndex::new(run.first().get() + offset))
        })
    }

    /// The guest physical address of `page`, if there is such a page.
    pub fn address_of(&self, page: PageIndex) -> Option<GuestAddress> {
        self.region_runs().find(|(_, run)| run.contains(page)).map(|(region, run)| {
            GuestAddress(region.start.0 + (page.get() - run.first().get()) * PAGE_SIZE as u64)
        })
    }
}

impl<'de> Deserialize<'de> for MemoryLayout {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let regions = Vec::<Region>::deserialize(deserializer)?;
        Self::new(regions).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_addresses_map_both_ways_around_the_gap() {
        let layout = MemoryLayout::pc((5 << 30) / 4096).unwrap();
        assert_eq!(layout.regions().len(), 2);
        for page in [0, 1, 786_431, 786_432, (5 << 30) / 4096 - 1] {
            let page = PageIndex::new(page);
            let address = layout.address_of(page).unwrap();
            assert_eq!(layout.page_at(address), Some(page));
        }
        assert_eq!(layout.page_at(GuestAddress(3 << 30)), None);
        assert_eq!(layout.address_of(PageIndex::new(786_432)), Some(GuestAddress(4 << 30)));
        assert_eq!(layout.address_of(PageIndex::new((5 << 30) / 4096)), None);
    }

    #[test]
    fn bad_regions_are_refused() {
        let region = |start, pages| Region { start: GuestAddress(start), pages };
        assert_eq!(MemoryLayout::new(vec![]), Err(LayoutError::Empty));
        for bad in
            [region(1, 1), region(0, 0), region(u64::MAX - 4095, 2), region(0, PAGES_MAX + 1)]
        {
            assert!(matches!(MemoryLayout::new(vec![bad]), Err(LayoutError::BadRegion { .. })));
        }
        let overlapping = vec![region(0, 2), region(4096, 1)];
        assert_eq!(MemoryLayout::new(overlapping), Err(LayoutError::Overlap(1)));
    }
}
