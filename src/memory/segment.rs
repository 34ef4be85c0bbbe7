//! [`Segment`]: one region of guest memory as this process has it mapped, and why a
//! region cannot be one.
//!
//! A segment knows an address, a file and a run of page numbers. It does not know its
//! neighbours; [`GuestRam`](super::ram::GuestRam) does.

use super::huge::BLOCK_BYTES;
use super::hugetlb;
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use nix::sys::stat::fstat;
use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;
use vm_memory::{FileOffset, GuestMemoryRegion, GuestRegionMmap};

/// Why a region of memory cannot be a guest's.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// It does not begin or end at a page.
    #[error("it is not made of whole pages of {PAGE_SIZE} bytes, or does not lie on them")]
    Unaligned,
    /// The mapping cannot be read and written.
    #[error("it is mapped read-only; memory of a guest that is to run must be writable")]
    ReadOnly,
    /// A private mapping of a file: what the guest wrote is not in the file, and what it did
    /// not write is not in the mapping.
    #[error(
        "it is a private mapping of a file; map the file shared (MAP_SHARED), or use anonymous \
         memory"
    )]
    PrivateFile,
    /// Shared memory whose file is not known: nothing tells which of its pages exist.
    #[error("it is shared memory without a file; use a memfd, or private memory")]
    SharedAnonymous,
    /// Huge pages without a file, which are not mapped a second time to write to.
    #[error(
        "it is made of huge pages without a file; only those in a shared file of hugetlbfs are \
         supported"
    )]
    Huge,
    /// Huge pages of another size.
    #[error("it is made of huge pages of {actual} bytes; only those of 2 MiB are supported")]
    HugePageSize {
        /// The size.
        actual: u64,
    },
    /// A part of a huge page.
    #[error("it is made of huge pages, and does not begin and end where they do (2 MiB)")]
    HugeUnaligned,
    /// A file that ends before the region does.
    #[error("its file has {actual} bytes and the region needs {expected}")]
    FileTooShort {
        /// The file's size.
        actual: u64,
        /// Where the region ends in the file.
        expected: u64,
    },
    /// Its file cannot be looked at.
    #[error("its file cannot be looked at")]
    File(#[source] nix::Error),
    /// Another region has the same bytes of the same file.
    #[error("it shares bytes of its file with the region at {other:#x}")]
    FilesOverlap {
        /// Where that one begins.
        other: u64,
    },
}

/// A run of guest pages that lies in one piece in this process's address space.
#[derive(Debug)]
pub struct Segment {
    run: PageRun,
    start: NonNull<u8>,
    region: Arc<GuestRegionMmap>,
    huge: bool,
}

// SAFETY: the pointer is to the mapping of `region`, which lives as long as this value and
// may itself be sent and shared; what is read or written there is up to the users of
// `GuestRam`.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// The segment of `region`, whose first page has the number `first`.
    pub(super) fn new(
        region: Arc<GuestRegionMmap>,
        first: PageIndex,
        access: Access,
    ) -> Result<Self, SegmentError> {
        let aligned = |value: u64| value.is_multiple_of(PAGE_SIZE as u64);
        let start = NonNull::new(region.as_ptr()).ok_or(SegmentError::Unaligned)?;
        let offset = region.file_offset().map_or(0, FileOffset::start);
        let run = PageRun::new(first, region.len() / PAGE_SIZE as u64);
        let all = [region.start_addr().0, region.len(), start.as_ptr() as u64, offset];
        let Some(run) = run.filter(|_| all.into_iter().all(aligned)) else {
            return Err(SegmentError::Unaligned);
        };
        if access == Access::Write && region.prot() & libc::PROT_WRITE == 0 {
            return Err(SegmentError::ReadOnly);
        }
        let shared = region.flags() & libc::MAP_SHARED != 0;
        match region.file_offset() {
            None if shared => return Err(SegmentError::SharedAnonymous),
            Some(_) if !shared => return Err(SegmentError::PrivateFile),
            Some(file) => check_length(file, region.len())?,
            None => {}
        }
        let huge = match region.file_offset() {
            Some(file) => is_huge(file)?,
            None => false,
        };
        let said = region.flags() & libc::MAP_HUGETLB != 0 || region.is_hugetlbfs() == Some(true);
        if said && !huge {
            return Err(SegmentError::Huge);
        }
        let whole = |value: u64| value.is_multiple_of(BLOCK_BYTES as u64);
        if huge && ![region.len(), start.as_ptr() as u64, offset].into_iter().all(whole) {
            return Err(SegmentError::HugeUnaligned);
        }
        Ok(Self { run, start, region, huge })
    }

    /// The pages that it holds.
    pub fn run(&self) -> PageRun {
        self.run
    }

    /// Where it is mapped.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Whether it is made of huge pages, of hugetlbfs.
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// The bytes mapped.
    pub fn bytes(&self) -> usize {
        self.run.bytes()
    }

    /// The file behind it and where in the file it begins, if it is shared memory.
    pub fn file(&self) -> Option<&FileOffset> {
        self.region.file_offset()
    }

    /// The file behind it and where in it `page` of this segment is.
    pub fn file_at(&self, page: PageIndex) -> Option<(&File, u64)> {
        let file = self.file()?;
        Some((file.file(), file.start() + self.offset_of(page) as u64))
    }

    /// The page that an offset in its file is in, if it is one of this segment.
    pub(super) fn page_of_file(&self, offset: u64) -> Option<PageIndex> {
        let pages = offset.checked_sub(self.file()?.start())? / PAGE_SIZE as u64;
        self.run.first().checked_add(pages).filter(|page| self.run.contains(*page))
    }

    /// The first page at or behind `page` that its file does not reach any more, though it
    /// did when this segment was made.
    pub(super) fn first_behind_file(&self, page: PageIndex) -> nix::Result<Option<PageIndex>> {
        let Some(file) = self.file() else { return Ok(None) };
        let size = fstat(file.file())?.st_size as u64;
        let pages = size.saturating_sub(file.start()).div_ceil(PAGE_SIZE as u64);
        let lost = self.run.first().checked_add(pages).map(|lost| lost.max(page));
        Ok(lost.filter(|lost| self.run.contains(*lost)))
    }

    /// The page that a host address lies in, if it is one of this segment.
    #[inline]
    pub(super) fn page_of_host(&self, address: usize) -> Option<PageIndex> {
        let offset = address.checked_sub(self.start.as_ptr() as usize)?;
        let pages = (offset / PAGE_SIZE) as u64;
        self.run.first().checked_add(pages).filter(|page| self.run.contains(*page))
    }

    /// The pages of this segment between two host addresses.
    pub(super) fn run_between(&self, start: usize, end: usize) -> Option<PageRun> {
        let base = self.start.as_ptr() as usize;
        let first = start.max(base) - base;
        let end = end.min(base + self.bytes()).checked_sub(base)?.div_ceil(PAGE_SIZE) as u64;
        let first = (first / PAGE_SIZE) as u64;
        let run = PageRun::new(PageIndex::new(first), end.checked_sub(first)?)?;
        PageRun::new(self.run.first().checked_add(first)?, run.count())
    }

    /// Where `page`, which is one of this segment, lies in it.
    #[inline]
    pub(super) fn offset_of(&self, page: PageIndex) -> usize {
        (page.get() - self.run.first().get()) as usize * PAGE_SIZE
    }

    /// The host address of `page`, which is one of this segment.
    pub(super) fn address_of(&self, page: PageIndex) -> usize {
        self.start.as_ptr() as usize + self.offset_of(page)
    }

    /// The region that it is.
    pub(super) fn region(&self) -> &Arc<GuestRegionMmap> {
        &self.region
    }

    /// An error if both have bytes of one file.
    pub(super) fn check_apart(&self, other: &Segment) -> Result<(), SegmentError> {
        let (Some(mine), Some(theirs)) = (self.file(), other.file()) else { return Ok(()) };
        let ends = |file: &FileOffset, of: &Segment| file.start() + of.bytes() as u64;
        let apart = ends(mine, self) <= theirs.start() || ends(theirs, other) <= mine.start();
        if apart || !same_file(mine, theirs)? {
            return Ok(());
        }
        Err(SegmentError::FilesOverlap { other: other.region.start_addr().0 })
    }
}

/// What the mapping of a segment must allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// A frozen guest's memory.
    Read,
    /// A guest runs in it.
    Write,
}

fn check_length(file: &FileOffset, bytes: u64) -> Result<(), SegmentError> {
    let actual = fstat(file.file()).map_err(SegmentError::File)?.st_size as u64;
    match file.start().checked_add(bytes) {
        Some(expected) if actual >= expected => Ok(()),
        expected => {
            let expected = expected.unwrap_or(u64::MAX);
            Err(SegmentError::FileTooShort { actual, expected })
        }
    }
}

/// Whether the file is one of huge pages.
fn is_huge(file: &FileOffset) -> Result<bool, SegmentError> {
    match hugetlb::page_bytes(file.file()).map_err(SegmentError::File)? {
        Some(actual) if actual != BLOCK_BYTES as u64 => Err(SegmentError::HugePageSize { actual }),
        size => Ok(size.is_some()),
    }
}

fn same_file(one: &FileOffset, other: &FileOffset) -> Result<bool, SegmentError> {
    if Arc::ptr_eq(one.arc(), other.arc()) {
        return Ok(true);
    }
    let identity = |file: &FileOffset| {
        fstat(file.file()).map(|stat| (stat.st_dev, stat.st_ino)).map_err(SegmentError::File)
    };
    Ok(identity(one)? == identity(other)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn a_range_of_addresses_is_clipped_to_the_segment() {
        let region = GuestRegionMmap::from_range(GuestAddress(0), 8 * PAGE_SIZE, None).unwrap();
        let first = PageIndex::new(100);
        let segment = Segment::new(Arc::new(region), first, Access::Write).unwrap();
        let base = segment.start().as_ptr() as usize;
        let run = |first: u64, count| PageRun::new(PageIndex::new(100 + first), count);
        let between = |from: isize, to: isize| {
            let at = |pages: isize| base.wrapping_add_signed(pages * PAGE_SIZE as isize);
            segment.run_between(at(from), at(to))
        };
        assert_eq!(between(2, 5), run(2, 3));
        assert_eq!(between(-3, 1), run(0, 1));
        assert_eq!(between(7, 20), run(7, 1));
        assert_eq!(between(8, 9), None);
        assert_eq!(between(-2, 0), None);
        assert_eq!(between(-4, -2), None);
        assert_eq!(between(3, 3), None);
    }
}
