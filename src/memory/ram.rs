//! [`GuestRam`]: the mapped regions of a guest's memory and what backs them.
//!
//! It knows addresses and file descriptors; it does not know which pages are
//! valid (the ledgers do) nor how a missing page is trapped (`uffd` does).

use super::huge::{self, BLOCK_BYTES};
use super::segment::{Access, Segment, SegmentError};
use crate::proto::layout::{GuestAddress, LayoutError, MemoryLayout, Region};
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MmapAdvise, madvise};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use vm_memory::{
    FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// What a guest's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory. It cannot be handed to another process.
    Anonymous,
    /// One memfd that holds all regions one after another, mapped shared: page
    /// `i` is at file offset `i * 4096`.
    Memfd,
    /// The same of huge pages, of hugetlbfs. They come from the host's pool, and whoever touches
    /// one when that is empty gets `SIGBUS`: [`reserve`](super::hugetlb::reserve) them.
    Hugetlb,
}

/// A failure to make, map or take over guest memory.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// A memfd could not be made or sized.
    #[error("cannot make a memfd of {bytes} bytes for guest memory")]
    Memfd {
        /// The size asked for.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        source: nix::Error,
    },
    /// Memory could not be mapped.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// The size asked for.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// Memory of huge pages that is not made of whole ones.
    #[error(
        "the memory region at {start:#x} has {bytes} bytes, and memory of hugetlbfs is made of \
         whole pages of 2 MiB"
    )]
    HugePages {
        /// The region's first guest physical address.
        start: u64,
        /// Its size.
        bytes: u64,
    },
    /// The regions make no layout.
    #[error("the memory regions make no layout")]
    Layout(#[from] LayoutError),
    /// A region is not of a kind that can be migrated.
    #[error("the memory region at {start:#x} cannot be migrated")]
    Region {
        /// Its first guest physical address.
        start: u64,
        /// Why not.
        #[source]
        source: SegmentError,
    },
    /// What was in the memory cannot be thrown away.
    #[error("cannot empty the memory region at {start:#x}")]
    Discard {
        /// The region's first guest physical address.
        start: u64,
        /// The kernel's answer.
        #[source]
        source: nix::Error,
    },
    /// Files handed over that are not one for each region.
    #[error("{files} files were handed over for {regions} memory regions")]
    Files {
        /// The files.
        files: usize,
        /// The regions.
        regions: usize,
    },
}

/// A guest's memory: the regions of a [`GuestMemoryMmap`], each a [`Segment`] of pages
/// that are numbered on through all of them.
///
/// It keeps the mappings alive, and so does every [`GuestMemoryMmap`] that came in or
/// goes out.
#[derive(Debug)]
pub struct GuestRam {
    layout: MemoryLayout,
    pages: u64,
    segments: Box<[Segment]>,
    memory: GuestMemoryMmap,
}

impl GuestRam {
    /// New, zeroed memory.
    pub fn new(layout: MemoryLayout, backing: Backing) -> Result<Self, RamError> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        match backing {
            Backing::Memfd | Backing::Hugetlb => {
                let huge = backing == Backing::Hugetlb;
                let partly = |run: PageRun| huge && !run.bytes().is_multiple_of(BLOCK_BYTES);
                if let Some((region, run)) = layout.region_runs().find(|of| partly(of.1)) {
                    let (start, bytes) = (region.start.0, run.bytes() as u64);
                    return Err(RamError::HugePages { start, bytes });
                }
                let memfd = Arc::new(memfd(layout.bytes(), huge)?);
                let offset = |run: PageRun| run.first().get() * PAGE_SIZE as u64;
                let file = |run| Some(FileOffset::from_arc(memfd.clone(), offset(run)));
                let files = layout.region_runs().map(|(_, run)| file(run)).collect();
                Self::map(&layout, files, protection, libc::MAP_SHARED, Access::Write)
            }
            Backing::Anonymous => {
                let files = vec![None; layout.regions().len()];
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                Self::map(&layout, files, protection, flags, Access::Write)
            }
        }
    }

    /// The memory that a VMM has already. It stays the VMM's as well: both keep it mapped.
    ///
    /// # Errors
    /// A region that is not made of whole pages, not writable, or neither private anonymous
    /// memory nor a shared mapping of a file; huge pages of another size than 2 MiB.
    pub fn from_guest_memory(memory: GuestMemoryMmap) -> Result<Self, RamError> {
        Self::over(memory, Access::Write)
    }

    /// Maps memory that another process handed over, for reading only, so that a write
    /// through it is a fault and not a silent change of a frozen guest. There is a file,
    /// and where in it the region begins, for each region of `layout`; several may have
    /// the same file.
    ///
    /// # Errors
    /// Files that do not fit the layout, or that cannot be mapped.
    pub fn attach_read_only(
        layout: MemoryLayout,
        files: Vec<FileOffset>,
    ) -> Result<Self, RamError> {
        let files = files.into_iter().map(Some).collect();
        Self::map(&layout, files, libc::PROT_READ, libc::MAP_SHARED, Access::Read)
    }

    /// A second, writable mapping of the same files, at other addresses; `None` for
    /// memory without files.
    pub fn alias(&self) -> Option<Result<GuestRam, RamError>> {
        let files: Vec<_> = self.segments.iter().map(|of| of.file().cloned()).collect();
        if files.iter().any(Option::is_none) {
            return None;
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        Some(Self::map(&self.layout, files, protection, libc::MAP_SHARED, Access::Write))
    }

    fn map(
        layout: &MemoryLayout,
        files: Vec<Option<FileOffset>>,
        protection: i32,
        flags: i32,
        access: Access,
    ) -> Result<Self, RamError> {
        if files.len() != layout.regions().len() {
            let regions = layout.regions().len();
            return Err(RamError::Files { files: files.len(), regions });
        }
        let mut regions = Vec::new();
        for ((region, run), file) in layout.region_runs().zip(files) {
            let flags = flags | libc::MAP_NORESERVE;
            let mapping = huge::map(file, run.bytes(), protection, flags)
                .map_err(|source| RamError::Map { bytes: run.bytes() as u64, source })?;
            let region = GuestRegionMmap::new(mapping, vm_memory::GuestAddress(region.start.0));
            // A layout's regions do not overflow.
            regions.extend(region);
        }
        let memory = GuestMemoryMmap::from_regions(regions).unwrap_or_default();
        Self::over(memory, access)
    }

    fn over(memory: GuestMemoryMmap, access: Access) -> Result<Self, RamError> {
        let regions = memory.iter().map(|region| Region {
            start: GuestAddress(region.start_addr().0),
            pages: region.len() / PAGE_SIZE as u64,
        });
        let regions: Vec<Region> = regions.collect();
        let mut segments: Vec<Segment> = Vec::new();
        let mut next = PageIndex::new(0);
        for region in memory.iter() {
            let start = region.start_addr().0;
            let refused = |source| RamError::Region { start, source };
            // The only way to a region that is shared.
            let taken = memory.remove_region(region.start_addr(), region.len());
            let (_, region) = taken.map_err(|_| refused(SegmentError::Unaligned))?;
            let segment = Segment::new(region, next, access).map_err(refused)?;
            for other in &segments {
                segment.check_apart(other).map_err(refused)?;
            }
            next = PageIndex::new(segment.run().end());
            segments.push(segment);
        }
        let layout = MemoryLayout::new(regions)?;
        let pages = layout.pages();
        Ok(Self { layout, pages, segments: segments.into(), memory })
    }

    /// The regions.
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// The same memory for a VMM; it stays mapped as long as either is held. Memory that
    /// was attached read-only must not be written through it.
    pub fn guest_memory(&self) -> GuestMemoryMmap {
        self.memory.clone()
    }

    /// The regions as they are mapped, in page order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The one file that holds all regions one after another, if that is how it is.
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        let (first, _) = self.segments.first()?.file_at(PageIndex::new(0))?;
        let all = self.segments.iter().all(|segment| {
            let at = segment.run().first();
            let file = segment.file_at(at);
            file.is_some_and(|(file, offset)| {
                std::ptr::eq(file, first) && offset == at.get() * PAGE_SIZE as u64
            })
        });
        all.then(|| first.as_fd())
    }

    /// Empties the memory: every page is a hole afterwards, whatever was written to it.
    ///
    /// # Safety
    /// The memory is not registered with userfaultfd, and nobody reads or writes it
    /// meanwhile or expects to find in it what was there.
    pub unsafe fn discard(&self) -> Result<(), RamError> {
        for segment in &self.segments {
            let start = segment.region().start_addr().0;
            let first = segment.run().first();
            let emptied = match segment.file_at(first) {
                Some((file, offset)) => {
                    let hole =
                        FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    fallocate(file, hole, offset as i64, segment.bytes() as i64)
                }
                None => {
                    let advice = MmapAdvise::MADV_DONTNEED;
                    // SAFETY: a whole mapping, whose content nobody expects.
                    unsafe { madvise(segment.start().cast(), segment.bytes(), advice) }
                }
            };
            emptied.map_err(|source| RamError::Discard { start, source })?;
        }
        Ok(())
    }

    /// Whether nobody else holds any of the mappings.
    pub(crate) fn is_only_holder(&self) -> bool {
        self.segments.iter().all(|segment| {
            // Held by `memory` and by the segment, and its mapping by itself and here.
            let region = segment.region();
            let mapping = region.get_mmap();
            // One that is only lent is not unmapped with the region.
            Arc::strong_count(region) == 2 && Arc::strong_count(&mapping) == 2 && mapping.owned()
        })
    }

    /// The segment that `page` is in.
    ///
    /// # Panics
    /// If the layout has no such page: callers have checked what a peer sent.
    #[inline]
    pub fn segment_of(&self, page: PageIndex) -> &Segment {
        assert!(page.get() < self.pages, "{page} is not in the layout");
        match &*self.segments {
            [only] => only,
            all => &all[all.partition_point(|of| of.run().end() <= page.get())],
        }
    }

    /// As much of `run` as lies in one segment, from its first page on, and the segment.
    ///
    /// # Panics
    /// If the first page is not in the layout.
    #[inline]
    pub fn first_part(&self, run: PageRun) -> (&Segment, PageRun) {
        let segment = self.segment_of(run.first());
        let count = run.count().min(segment.run().end() - run.first().get());
        // At least one page: the first is in the segment.
        (segment, PageRun::new(run.first(), count).unwrap_or(run))
    }

    /// `run`, split where one segment ends and another begins.
    ///
    /// # Panics
    /// When it comes to a page that is not in the layout.
    pub fn parts(&self, run: PageRun) -> impl Iterator<Item = (&Segment, PageRun)> {
        let mut rest = Some(run);
        std::iter::from_fn(move || {
            let run = rest?;
            let (segment, part) = self.first_part(run);
            let left = run.count() - part.count();
            rest = PageRun::new(PageIndex::new(part.end()), left);
            Some((segment, part))
        })
    }

    /// The host address of a page.
    ///
    /// # Panics
    /// If the layout has no such page: callers have checked what a peer sent.
    #[inline]
    pub fn page_ptr(&self, page: PageIndex) -> NonNull<u8> {
        let segment = self.segment_of(page);
        // SAFETY: in bounds of the segment's mapping: the page is one of it.
        unsafe { segment.start().add(segment.offset_of(page)) }
    }

    /// The page that a host address of one of the mappings lies in.
    #[inline]
    pub fn page_of_host(&self, address: usize) -> Option<PageIndex> {
        self.segments.iter().find_map(|segment| segment.page_of_host(address))
    }

    /// The runs of pages between two host addresses, one for each segment there.
    pub fn runs_between(&self, start: usize, end: usize) -> impl Iterator<Item = PageRun> {
        self.segments.iter().filter_map(move |segment| segment.run_between(start, end))
    }

    /// Copies a run out. The content is torn if the guest writes to it meanwhile.
    ///
    /// # Panics
    /// If the run is not in the layout, or `into` is not of its size.
    pub fn read_run(&self, run: PageRun, into: &mut [u8]) {
        assert!(run.end() <= self.pages && into.len() == run.bytes());
        let mut rest = into;
        for (_, part) in self.parts(run) {
            let (here, behind) = rest.split_at_mut(part.bytes());
            let from = self.page_ptr(part.first());
            // SAFETY: both ranges are of this length and valid; guest memory and an
            // exclusive slice of ours do not overlap.
            unsafe { from.copy_to_nonoverlapping(NonNull::from(here).cast(), part.bytes()) };
            rest = behind;
        }
    }

    /// Copies a run in. Only for memory that is not registered with userfaultfd,
    /// or an alias of it: the thread would wait for itself.
    ///
    /// # Panics
    /// If the run is not in the layout, or `from` is not of its size.
    pub fn write_run(&self, run: PageRun, from: &[u8]) {
        assert!(run.end() <= self.pages && from.len() == run.bytes());
        let mut rest = from;
        for (_, part) in self.parts(run) {
            let (here, behind) = rest.split_at(part.bytes());
            let to = self.page_ptr(part.first());
            // SAFETY: as in `read_run`.
            unsafe { to.copy_from_nonoverlapping(NonNull::from(here).cast(), part.bytes()) };
            rest = behind;
        }
    }
}

/// A run of a frozen guest's pages, readable as bytes without a copy.
#[derive(Debug)]
pub struct FrozenRun {
    ram: Arc<GuestRam>,
    run: PageRun,
}

impl FrozenRun {
    /// The bytes of `run`; `None` if it does not lie in one segment.
    ///
    /// # Safety
    /// Nothing may write to these pages as long as the value lives: the guest is
    /// paused here for good, or until every such value is gone.
    pub unsafe fn new(ram: Arc<GuestRam>, run: PageRun) -> Option<Self> {
        let whole = run.end() <= ram.pages && ram.first_part(run).1 == run;
        whole.then_some(Self { ram, run })
    }
}

impl AsRef<[u8]> for FrozenRun {
    fn as_ref(&self) -> &[u8] {
        let start = self.ram.page_ptr(self.run.first());
        // SAFETY: in bounds of a mapping that `ram` keeps alive, and not written to as
        // promised to `new`.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), self.run.bytes()) }
    }
}

/// A new file in memory, all of it a hole.
fn memfd(bytes: u64, huge: bool) -> Result<File, RamError> {
    let failed = |source| RamError::Memfd { bytes, source };
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if huge {
        flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    }
    let memfd = memfd_create(c"guest-memory", flags).map_err(failed)?;
    nix::unistd::ftruncate(&memfd, bytes as i64).map_err(failed)?;
    Ok(memfd.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::MmapRegion;

    #[test]
    fn a_page_written_through_an_alias_is_read_through_the_first_mapping() {
        let layout = MemoryLayout::flat(4).unwrap();
        let ram = GuestRam::new(layout, Backing::Memfd).unwrap();
        let alias = ram.alias().unwrap().unwrap();
        let run = PageRun::new(PageIndex::new(1), 2).unwrap();
        alias.write_run(run, &[7; 8192]);
        let mut content = [0; 8192];
        ram.read_run(run, &mut content);
        assert_eq!(content, [7; 8192]);
        let address = ram.page_ptr(PageIndex::new(3)).as_ptr() as usize;
        assert_eq!(ram.page_of_host(address + 4095), Some(PageIndex::new(3)));
        assert_eq!(ram.page_of_host(address + 4096), None);
    }

    #[test]
    fn the_last_holder_of_the_mappings_is_known() {
        let ram = GuestRam::new(MemoryLayout::flat(4).unwrap(), Backing::Anonymous).unwrap();
        assert!(ram.is_only_holder());
        let memory = ram.guest_memory();
        assert!(!ram.is_only_holder());
        let mapping = memory.iter().next().unwrap().get_mmap();
        drop(memory);
        assert!(!ram.is_only_holder());
        drop(mapping);
        assert!(ram.is_only_holder());
    }

    #[test]
    fn a_mapping_that_is_only_lent_has_another_holder() {
        let (read_write, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let owner: MmapRegion = MmapRegion::build(None, 4096, read_write, flags).unwrap();
        // SAFETY: the mapping lives to the end of the test.
        let lent = unsafe { MmapRegion::build_raw(owner.as_ptr(), 4096, read_write, flags) };
        let region = GuestRegionMmap::new(lent.unwrap(), vm_memory::GuestAddress(0)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        assert!(!GuestRam::from_guest_memory(memory).unwrap().is_only_holder());
    }
}
