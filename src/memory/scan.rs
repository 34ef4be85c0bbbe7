//! [`ZeroScan`]: finding the pages of a paused guest that are zero, bit by bit.
//!
//! It runs after the pause, beside the sending of other pages; nothing is kept
//! that grows with memory, and nothing is allocated by looking. It does not know
//! which pages were sent, and a scan of a guest that runs would be stale at once.
//!
//! How it tells a hole from data:
//! * A memfd is asked with `mincore`, a short stretch at a time, and with `SEEK_DATA` where
//!   a page is not resident. `SEEK_HOLE` would walk all data up to the next hole in one
//!   system call, 55 ms for 4 GiB in which nothing else runs on that core, and a vCPU's
//!   fault may have to wait for just that core. A hole is never read through the
//!   mapping, since that would allocate it; data is, which is several times faster than
//!   `pread` because a page's first bytes mostly settle it.
//! * For private anonymous memory, `/proc/self/pagemap` tells which pages were
//!   ever touched. Reading one that was not would map the shared zero page, which
//!   costs page tables only, but for all of memory they add up.
//! * Of hugetlbfs nothing tells a hole. A huge page is read once, by `pread`, up to its first
//!   content. One that has none is taken for a hole: reading it through the mapping could
//!   take a page from the pool.

use super::guarded::{Guarded, Look};
use super::huge::BLOCK_PAGES;
use super::hugetlb;
use super::ram::GuestRam;
use super::segment::Segment;
use crate::proto::bitmap::AtomicBitmap;
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// How far one question to the kernel goes at most.
const STEP_PAGES: u64 = 512;
/// And how far the first one about an extent of data goes.
const ASK_PAGES: u64 = 8;

/// Why a page is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// It is allocated and all its bytes are zero.
    Zero,
    /// It was never touched, or was given back.
    Hole,
}

/// A failure to look at the memory.
#[derive(Debug, thiserror::Error)]
#[error("cannot tell holes from data at {at} of guest memory")]
pub struct ScanError {
    /// Where.
    at: PageIndex,
    /// The kernel's answer.
    #[source]
    source: io::Error,
}

/// Where guest memory has holes, by the kernel's word: no page is read, but of hugetlbfs.
pub struct Holes {
    ram: Arc<GuestRam>,
    /// Only if some memory has no file.
    pagemap: Option<File>,
    /// Pages of those huge pages that were found to have content. Only if there are some.
    content: Option<AtomicBitmap>,
}

/// A walk over guest memory, in rising page order, that finds all zero pages.
pub struct ZeroScan {
    holes: Holes,
    guarded: Guarded,
    /// The next page to look at.
    next: u64,
    /// The end of the extent of data that `next` is in; nothing is known behind it.
    data_end: u64,
    /// How much data is asked for next: more where there was as much, since what is asked of
    /// pages that are not there costs the kernel a search for each.
    ask: u64,
}

impl Holes {
    /// Those of `ram`.
    ///
    /// # Errors
    /// The kernel does not tell of memory that has no file.
    pub fn new(ram: Arc<GuestRam>) -> Result<Self, ScanError> {
        let pagemap = if ram.segments().iter().all(|segment| segment.file().is_some()) {
            None
        } else {
            let at = PageIndex::new(0);
            let opened = File::open("/proc/self/pagemap");
            Some(opened.map_err(|source| ScanError { at, source })?)
        };
        let huge = ram.segments().iter().any(Segment::is_huge);
        let content = huge.then(|| AtomicBitmap::new(ram.layout().pages()));
        Ok(Self { ram, pagemap, content })
    }

    /// The first pages of `run` that are alike, and whether they are a hole, which may go on
    /// behind `run`. It takes a run that lies in one segment.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn first_part(&self, run: PageRun) -> Result<(PageRun, bool), ScanError> {
        let first = run.first().get();
        let data = self.look(first, run.count())?;
        let is_hole = data.start > first;
        let end = if is_hole { data.start } else { data.end };
        Ok((PageRun::new(run.first(), end - first).unwrap_or(run), is_hole))
    }

    /// The data at or behind `page`, up to where it is sure to be data, `most` pages of it at
    /// most; up to it there is a hole. It is empty where nothing is known yet but the hole before
    /// it. It does not go beyond a segment.
    fn look(&self, page: u64, most: u64) -> Result<Range<u64>, ScanError> {
        let segment = self.ram.segment_of(PageIndex::new(page));
        let end = segment.run().end();
        let most = most.min(STEP_PAGES);
        if let Some(content) = self.content.as_ref().filter(|_| segment.is_huge()) {
            return Ok(look_in_block(content, segment, page, most));
        }
        if segment.file().is_some() {
            let start = data_in_file(segment, page)?.unwrap_or(end);
            let data_end = if start < end { resident_until(segment, start, most)? } else { end };
            return Ok(start..data_end);
        }
        let Some(pagemap) = &self.pagemap else { return Ok(page..end) };
        let start = touched(pagemap, segment, page, STEP_PAGES, true)?;
        let data_end =
            if start < end { touched(pagemap, segment, start, most, false)? } else { end };
        Ok(start..data_end)
    }
}

impl ZeroScan {
    /// A scan of all of `ram`.
    ///
    /// # Errors
    /// As of [`Holes::new`], or memory cannot be read so that a lost page ends nothing.
    pub fn new(ram: Arc<GuestRam>) -> Result<Self, ScanError> {
        let guarded =
            Guarded::new().map_err(|source| ScanError { at: PageIndex::new(0), source })?;
        Ok(Self { holes: Holes::new(ram)?, guarded, next: 0, data_end: 0, ask: ASK_PAGES })
    }

    /// The next zero pages, in rising order, neighbours of a kind as one run.
    ///
    /// It looks at `budget_pages` pages of data at most (at least one), an extent
    /// counting as a page however long a hole it is; the list may therefore be
    /// empty, and has `budget_pages` entries at most. `None` after the last page.
    pub fn next(&mut self, budget_pages: u64) -> Result<Option<Vec<(PageRun, Kind)>>, ScanError> {
        let pages = self.holes.ram.layout().pages();
        if self.next == pages {
            return Ok(None);
        }
        let mut found = Vec::new();
        let mut budget = budget_pages.max(1);
        while self.next < pages && budget > 0 {
            if self.next == self.data_end {
                budget -= 1;
                let data = self.holes.look(self.next, self.ask)?;
                let whole = data.end - data.start >= self.ask;
                self.ask = if whole { (2 * self.ask).min(STEP_PAGES) } else { ASK_PAGES };
                if self.holes.content.is_some() {
                    // To find a hole there took as long as to look at its pages.
                    budget = budget.saturating_sub(data.start - self.next);
                }
                push(&mut found, self.next, data.start, Kind::Hole);
                (self.next, self.data_end) = (data.start, data.end);
                continue;
            }
            let end = self.data_end.min(self.next.saturating_add(budget));
            budget -= end - self.next;
            for page in self.next..end {
                if self.page_is_zero(page) {
                    push(&mut found, page, page + 1, Kind::Zero);
                }
            }
            self.next = end;
        }
        Ok(Some(found))
    }

    /// How many pages have been looked at.
    pub fn position(&self) -> u64 {
        self.next
    }

    fn page_is_zero(&self, page: u64) -> bool {
        self.guarded.look(&self.holes.ram, PageIndex::new(page)) == Look::Zero
    }
}

/// [`Holes::look`] in a segment of huge pages: all of one is data, or a hole.
fn look_in_block(content: &AtomicBitmap, segment: &Segment, page: u64, most: u64) -> Range<u64> {
    let first = segment.run().first().get();
    let begin = page - (page - first) % BLOCK_PAGES;
    let end = begin + BLOCK_PAGES;
    if !content.is_set(PageIndex::new(page)) {
        let block = PageRun::new(PageIndex::new(begin), BLOCK_PAGES);
        let Some(block) = block.filter(|block| hugetlb::has_content(segment, *block)) else {
            return end..end;
        };
        content.set_run(block);
    }
    page..end.min(page + most)
}

/// The first page of data at or behind `page` in its segment.
fn data_in_file(segment: &Segment, page: u64) -> Result<Option<u64>, ScanError> {
    let at = PageIndex::new(page);
    let Some((file, offset)) = segment.file_at(at) else { return Ok(Some(page)) };
    match lseek(file, offset as i64, Whence::SeekData) {
        // It may be in another segment's part of the file, or behind all of them.
        Ok(found) => Ok(segment.page_of_file(found as u64).map(PageIndex::get)),
        // No data behind here. What the file has lost since it was mapped is no hole: it
        // cannot be read, which shows when it is.
        Err(Errno::ENXIO) => {
            let lost = segment.first_behind_file(at);
            let lost = lost.map_err(|source| ScanError { at, source: source.into() })?;
            Ok(lost.map(PageIndex::get))
        }
        Err(errno) => Err(ScanError { at, source: errno.into() }),
    }
}

/// How far data surely goes from the data page `page` on, `most` pages at most. A page that
/// is not resident may be a hole or swapped out; `SEEK_DATA` tells, and is asked next.
fn resident_until(segment: &Segment, page: u64, most: u64) -> Result<u64, ScanError> {
    let count = (segment.run().end() - page).min(most) as usize;
    if count == 1 {
        // As for a page that is demanded: nothing is left to ask.
        return Ok(page + 1);
    }
    let mut resident = [0u8; STEP_PAGES as usize];
    let start = segment.address_of(PageIndex::new(page));
    // SAFETY: the range is mapped, and there is a byte for each of its pages.
    let done = unsafe {
        libc::mincore(start as *mut libc::c_void, count * PAGE_SIZE, resident.as_mut_ptr())
    };
    if done != 0 {
        let source = io::Error::last_os_error();
        return Err(ScanError { at: PageIndex::new(page), source });
    }
    let resident = resident[..count].iter().take_while(|of| **of & 1 == 1).count();
    Ok(page + resident.max(1) as u64)
}

/// The first page at or behind `page` that was ever touched, or was not; or an earlier
/// page if that is `most` pages away, so that a step stays short: the next step then goes on
/// from there.
fn touched(
    pagemap: &File,
    segment: &Segment,
    page: u64,
    most: u64,
    wanted: bool,
) -> Result<u64, ScanError> {
    const ENTRY: usize = 8;
    const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
    let at = PageIndex::new(page);
    let number = (segment.address_of(at) / PAGE_SIZE) as u64;
    let count = (segment.run().end() - page).min(most);
    let mut entries = [0; STEP_PAGES as usize * ENTRY];
    let entries = &mut entries[..count as usize * ENTRY];
    pagemap
        .read_exact_at(entries, number * ENTRY as u64)
        .map_err(|source| ScanError { at, source })?;
    let (entries, _) = entries.as_chunks::<ENTRY>();
    let touched = |entry: &[u8; ENTRY]| u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0;
    let found = entries.iter().position(|entry| touched(entry) == wanted);
    Ok(page + found.map_or(count, |index| index as u64))
}

/// Adds pages `first..end`, growing the last run if they continue it.
fn push(found: &mut Vec<(PageRun, Kind)>, first: u64, end: u64, kind: Kind) {
    if let Some((last, last_kind)) = found.last_mut()
        && *last_kind == kind
        && last.end() == first
        && let Some(longer) = PageRun::new(last.first(), last.count() + (end - first))
    {
        *last = longer;
    } else if let Some(run) = PageRun::new(PageIndex::new(first), end.saturating_sub(first)) {
        found.push((run, kind));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::Backing;
    use crate::proto::layout::MemoryLayout;
    use nix::sys::stat::fstat;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun::new(PageIndex::new(first), count).unwrap()
    }

    fn write(ram: &GuestRam, page: u64, byte: usize, value: u8) {
        let mut content = [0; PAGE_SIZE];
        content[byte] = value;
        ram.write_run(run(page, 1), &content);
    }

    /// All of a scan, run ends at budget boundaries joined.
    fn scan_all(ram: &Arc<GuestRam>, budget: u64) -> Vec<(PageRun, Kind)> {
        let mut scan = ZeroScan::new(Arc::clone(ram)).unwrap();
        let mut all = Vec::new();
        let mut last = 0;
        while let Some(found) = scan.next(budget).unwrap() {
            assert!(found.len() as u64 <= budget && scan.position() >= last);
            last = scan.position();
            for (run, kind) in found {
                push(&mut all, run.first().get(), run.end(), kind);
            }
        }
        assert_eq!(scan.position(), ram.layout().pages());
        assert!(scan.next(budget).unwrap().is_none());
        all
    }

    #[test]
    fn holes_and_zero_pages_are_found_with_any_budget_and_no_hole_is_filled() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let ram = Arc::new(GuestRam::new(MemoryLayout::flat(2000).unwrap(), backing).unwrap());
            let mut expected = vec![(run(0, 3), Kind::Hole)];
            // 3: data, its last byte only. 4, 5: zero. 6: data. 7..1500: hole.
            write(&ram, 3, PAGE_SIZE - 1, 1);
            write(&ram, 4, 0, 0);
            write(&ram, 5, 0, 0);
            write(&ram, 6, 0, 1);
            write(&ram, 1500, 2048, 9);
            write(&ram, 1999, 0, 0);
            expected.push((run(4, 2), Kind::Zero));
            expected.push((run(7, 1493), Kind::Hole));
            expected.push((run(1501, 498), Kind::Hole));
            expected.push((run(1999, 1), Kind::Zero));
            let blocks = |ram: &GuestRam| ram.memfd().map(|fd| fstat(fd).unwrap().st_blocks);
            let before = blocks(&ram);
            for budget in [1, 2, 3, 7, 1000, u64::MAX] {
                let found = scan_all(&ram, budget);
                assert_eq!(found, expected, "{backing:?}, budget {budget}");
            }
            assert_eq!(blocks(&ram), before, "the scan allocated memory");
        }
    }

    #[test]
    fn a_runs_first_pages_are_told_to_be_a_hole_or_not_and_none_is_filled() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let ram = Arc::new(GuestRam::new(MemoryLayout::flat(2000).unwrap(), backing).unwrap());
            (100..110).for_each(|page| write(&ram, page, 0, 1));
            let holes = Holes::new(Arc::clone(&ram)).unwrap();
            let part = |first, count| {
                let (part, is_hole) = holes.first_part(run(first, count)).unwrap();
                (part.first().get()..part.end(), is_hole)
            };
            assert_eq!(part(100, 10), (100..110, false));
            assert_eq!(part(104, 60), (104..110, false));
            assert_eq!(part(104, 2), (104..106, false));
            // Of anonymous memory a hole's end is not always found at once.
            let (hole, is_hole) = part(90, 4);
            assert!(is_hole && hole.start == 90 && (94..=100).contains(&hole.end), "{hole:?}");
            let (hole, is_hole) = part(110, 64);
            assert!(is_hole && hole.start == 110 && (174..=2000).contains(&hole.end), "{hole:?}");
            let blocks = ram.memfd().map(|fd| fstat(fd).unwrap().st_blocks);
            assert!(blocks.is_none_or(|blocks| blocks == 10 * (PAGE_SIZE / 512) as i64));
        }
    }

    #[test]
    fn memory_that_was_never_touched_is_one_hole_and_full_memory_has_none() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let ram = Arc::new(GuestRam::new(MemoryLayout::flat(700).unwrap(), backing).unwrap());
            assert_eq!(scan_all(&ram, 10), vec![(run(0, 700), Kind::Hole)]);
            ram.write_run(run(0, 700), &vec![5; 700 * PAGE_SIZE]);
            assert_eq!(scan_all(&ram, 10), vec![]);
        }
    }

    #[test]
    fn a_file_longer_than_the_layout_is_scanned_to_the_layouts_end() {
        let long = GuestRam::new(MemoryLayout::flat(8).unwrap(), Backing::Memfd).unwrap();
        write(&long, 2, 0, 1);
        write(&long, 7, 0, 1);
        let file = long.segments()[0].file().unwrap().clone();
        let layout = MemoryLayout::flat(4).unwrap();
        let short = Arc::new(GuestRam::attach_read_only(layout, vec![file]).unwrap());
        assert_eq!(scan_all(&short, 100), vec![(run(0, 2), Kind::Hole), (run(3, 1), Kind::Hole)]);
    }
}
