//! Transparent huge pages: memory mapped so that it can have them, and blocks of small
//! pages made into one each.

use super::ram::GuestRam;
use super::segment::Segment;
use crate::proto::page::{PAGE_SIZE, PageRun};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::num::NonZero;
use std::ptr::NonNull;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

/// The bytes of a huge page: x86-64 maps this much by one entry of a page middle directory.
pub const BLOCK_BYTES: usize = 2 << 20;
/// The pages of a block.
pub const BLOCK_PAGES: u64 = (BLOCK_BYTES / PAGE_SIZE) as u64;
/// How often memory is mapped anew: another thread may map something in between.
const TRIES: usize = 8;

/// Maps memory where it can have huge pages: each block of the file at a whole multiple of
/// [`BLOCK_BYTES`]. The kernel sees to that by itself only for some memory without a file
/// (Linux 6.7). Where it cannot be had the memory is somewhere else, and has no huge pages.
pub(super) fn map(
    file: Option<FileOffset>,
    bytes: usize,
    protection: i32,
    flags: i32,
) -> Result<MmapRegion, MmapRegionError> {
    let offset = file.as_ref().map_or(0, FileOffset::start) as usize;
    let map = || MmapRegion::build(file.clone(), bytes, protection, flags);
    let fits = |region: &MmapRegion| {
        let start = region.as_ptr() as usize;
        bytes < BLOCK_BYTES || start.wrapping_sub(offset).is_multiple_of(BLOCK_BYTES)
    };
    // Those that do not fit stay until there is one that does: they fill the gaps that the
    // kernel would choose again.
    let mut unfit = Vec::new();
    while unfit.len() < TRIES {
        let region = map()?;
        if fits(&region) {
            return Ok(region);
        }
        unfit.push(region);
        let _gap = Gap::new(bytes, offset);
        let region = map()?;
        if fits(&region) {
            return Ok(region);
        }
        unfit.push(region);
    }
    drop(unfit);
    map()
}

/// Free addresses between two pieces that are taken.
struct Gap([(usize, usize); 2]);

impl Gap {
    /// One of so many bytes that begins where `offset` can be mapped by a huge page; `None` if
    /// there is no room.
    fn new(bytes: usize, offset: usize) -> Option<Self> {
        let all = NonZero::new(bytes.checked_add(BLOCK_BYTES)?)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping, of which nobody knows.
        let start = unsafe { mmap_anonymous(None, all, ProtFlags::PROT_NONE, flags) }.ok()?;
        let start = start.as_ptr() as usize;
        let begin = start + offset.wrapping_sub(start) % BLOCK_BYTES;
        unmap(begin, bytes);
        let end = begin + bytes;
        Some(Self([(start, begin - start), (end, start + all.get() - end)]))
    }
}

impl Drop for Gap {
    fn drop(&mut self) {
        for (start, bytes) in self.0 {
            unmap(start, bytes);
        }
    }
}

/// Frees a part of a [`Gap`]'s mapping.
fn unmap(start: usize, bytes: usize) {
    if let (Some(start), true) = (NonNull::new(start as *mut c_void), bytes > 0) {
        // SAFETY: a part of a mapping that the gap made, and nobody has looked into.
        let _ = unsafe { munmap(start, bytes) };
    }
}

/// The blocks of a segment that could be a huge page each, by where they are mapped; none of
/// memory that is made of huge pages.
pub fn blocks(segment: &Segment) -> impl Iterator<Item = PageRun> + use<> {
    let start = segment.start().as_ptr() as usize;
    let skipped = ((start.next_multiple_of(BLOCK_BYTES) - start) / PAGE_SIZE) as u64;
    let run = segment.run();
    let small = if segment.is_huge() { 0 } else { run.count() };
    let whole = small.saturating_sub(skipped) / BLOCK_PAGES;
    (0..whole).filter_map(move |block| {
        PageRun::new(run.first().checked_add(skipped + block * BLOCK_PAGES)?, BLOCK_PAGES)
    })
}

/// Lets the kernel put huge pages into the segment wherever its settings leave that to
/// advice. A kernel without them knows no such advice.
pub fn allow(segment: &Segment) {
    // SAFETY: a whole mapping; no content changes.
    let advised =
        unsafe { madvise(segment.start().cast(), segment.bytes(), MmapAdvise::MADV_HUGEPAGE) };
    if let Err(errno) = advised {
        tracing::debug!(%errno, "no advice on huge pages");
    }
}

/// Makes `block` one huge page, without a change to its content, whatever the system's settings
/// for huge pages are. Who touches it meanwhile waits. Nothing is done where it is one already.
///
/// # Errors
/// As in madvise(2) and the kernel's `madvise_collapse_errno`: `EAGAIN`, `EBUSY` and `ENOMEM`
/// where pages were in use, the control group is full, or there is no free block of memory:
/// another try may succeed. `EINVAL` where none will: the memory was never written to, is
/// advised against huge pages or not aligned with its file; or the kernel is older than 6.1.
///
/// # Panics
/// If the block is not in the layout.
pub fn collapse(ram: &GuestRam, block: PageRun) -> Result<(), Errno> {
    let (_, part) = ram.first_part(block);
    let start = ram.page_ptr(block.first()).as_ptr().cast();
    // SAFETY: within a mapping, which `ram` keeps; no content changes. (nix does not have
    // this advice.)
    Errno::result(unsafe { libc::madvise(start, part.bytes(), libc::MADV_COLLAPSE) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::Backing;
    use crate::proto::layout::{GuestAddress, MemoryLayout, Region};
    use crate::proto::page::PageIndex;

    const BACKINGS: [Backing; 2] = [Backing::Anonymous, Backing::Memfd];

    #[test]
    fn memory_is_mapped_where_its_file_can_have_huge_pages() {
        // Other mappings, of odd sizes, move the ends of the gaps.
        for pages in [512, 513, 1500, 4096, 5001] {
            let region = |start, pages| Region { start: GuestAddress(start), pages };
            let regions = vec![region(0, pages), region(1 << 32, 2 * pages)];
            let ram = GuestRam::new(MemoryLayout::new(regions).unwrap(), Backing::Memfd).unwrap();
            for segment in ram.segments() {
                let offset = segment.file().unwrap().start() as usize;
                let start = segment.start().as_ptr() as usize;
                assert_eq!(start % BLOCK_BYTES, offset % BLOCK_BYTES, "{pages} pages");
            }
        }
    }

    #[test]
    fn blocks_are_aligned_and_whole() {
        for pages in [511, 512, 1024, 1500] {
            let layout = MemoryLayout::flat(pages).unwrap();
            let ram = GuestRam::new(layout, Backing::Memfd).unwrap();
            let blocks: Vec<_> = blocks(&ram.segments()[0]).collect();
            for block in &blocks {
                let start = ram.page_ptr(block.first()).as_ptr() as usize;
                assert!(start.is_multiple_of(BLOCK_BYTES) && block.end() <= pages);
                assert_eq!(block.bytes(), BLOCK_BYTES);
            }
            assert_eq!(blocks.len() as u64, pages / 512, "{pages} pages");
        }
    }

    #[test]
    fn a_block_that_becomes_a_huge_page_keeps_its_content() {
        for backing in BACKINGS {
            let ram = GuestRam::new(MemoryLayout::flat(2048).unwrap(), backing).unwrap();
            let segment = &ram.segments()[0];
            let block = blocks(segment).next().unwrap();
            let content: Vec<u8> = (0..BLOCK_BYTES).map(|at| (at / 7 % 251) as u8).collect();
            ram.write_run(block, &content);
            allow(segment);
            match collapse(&ram, block) {
                Ok(()) => {}
                Err(errno) => println!("SKIPPED: no huge pages here for {backing:?}: {errno}"),
            }
            let mut after = vec![0; BLOCK_BYTES];
            ram.read_run(block, &mut after);
            assert!(content == after, "{backing:?}");
        }
    }

    #[test]
    fn what_cannot_be_a_huge_page_is_refused() {
        let ram = GuestRam::new(MemoryLayout::flat(2048).unwrap(), Backing::Anonymous).unwrap();
        let block = PageRun::new(PageIndex::new(512), 512).unwrap();
        // Never written to.
        assert_eq!(collapse(&ram, block), Err(Errno::EINVAL));
    }
}
