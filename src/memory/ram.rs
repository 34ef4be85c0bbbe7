//! [`GuestRam`]: the mapped regions of a guest's memory and what backs them.
//!
//! It knows addresses and file descriptors; it does not know which pages are
//! valid (the ledgers do) nor how a missing page is trapped (`uffd` does).

use crate::proto::layout::MemoryLayout;
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// What a guest's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory. It cannot be handed to another process.
    Anonymous,
    /// One memfd that holds all regions one after another, mapped shared: page
    /// `i` is at file offset `i * 4096`.
    Memfd,
}

/// A failure to make or map guest memory.
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
        source: nix::Error,
    },
    /// A file handed over as guest memory is shorter than the layout.
    #[error("the guest memory file has {actual} bytes; the layout needs {expected}")]
    FileTooShort {
        /// The file's size.
        actual: u64,
        /// The layout's size.
        expected: u64,
    },
}

/// A stretch of this process's address space, unmapped on drop.
#[derive(Debug)]
struct Mapping {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: a mapping is a range of addresses that it alone will unmap; what is
// read or written through it is governed by the users of `GuestRam`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and `len` came from mmap and are unmapped only here.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

/// A guest's memory, mapped as one contiguous range of host addresses in page
/// order (the gaps between regions exist only in guest physical addresses).
#[derive(Debug)]
pub struct GuestRam {
    layout: MemoryLayout,
    mapping: Mapping,
    memfd: Option<OwnedFd>,
}

impl GuestRam {
    /// New, zeroed memory.
    pub fn new(layout: MemoryLayout, backing: Backing) -> Result<Self, RamError> {
        let bytes = layout.bytes();
        match backing {
            Backing::Memfd => {
                let failed = |source| RamError::Memfd { bytes, source };
                let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
                let memfd = memfd_create(c"guest-memory", flags).map_err(failed)?;
                nix::unistd::ftruncate(&memfd, bytes as i64).map_err(failed)?;
                Self::map_memfd(layout, memfd, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
            }
            Backing::Anonymous => {
                let len = length(bytes)?;
                let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
                let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
                // SAFETY: a new anonymous mapping at an address of the kernel's choice.
                let start = unsafe { mmap_anonymous(None, len, protection, flags) }
                    .map_err(|source| RamError::Map { bytes, source })?;
                let mapping = Mapping { start, len: len.get() };
                // Pages are trapped one by one; a huge page would hide 511 traps.
                // SAFETY: the range is the mapping made above.
                let _ = unsafe { madvise(start, len.get(), MmapAdvise::MADV_NOHUGEPAGE) };
                Ok(Self { layout, mapping, memfd: None })
            }
        }
    }

    /// Maps a memfd that another process handed over, for reading only, so that a
    /// write through it is a fault and not a silent change of a frozen guest.
    pub fn attach_read_only(layout: MemoryLayout, memfd: OwnedFd) -> Result<Self, RamError> {
        Self::map_memfd(layout, memfd, ProtFlags::PROT_READ)
    }

    fn map_memfd(
        layout: MemoryLayout,
        memfd: OwnedFd,
        protection: ProtFlags,
    ) -> Result<Self, RamError> {
        let expected = layout.bytes();
        let actual = nix::sys::stat::fstat(&memfd)
            .map_err(|source| RamError::Map { bytes: expected, source })?
            .st_size as u64;
        if actual < expected {
            return Err(RamError::FileTooShort { actual, expected });
        }
        let mapping = map_shared(&memfd, expected, protection)?;
        Ok(Self { layout, mapping, memfd: Some(memfd) })
    }

    /// A second, writable mapping of the same memfd, at other addresses.
    pub fn alias(&self) -> Option<Result<GuestRam, RamError>> {
        let memfd = self.memfd.as_ref()?.try_clone().ok()?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        Some(Self::map_memfd(self.layout.clone(), memfd, protection))
    }

    /// The regions.
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// The memfd behind it, if there is one.
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(AsFd::as_fd)
    }

    /// Where the mapping begins.
    pub fn host_start(&self) -> NonNull<u8> {
        self.mapping.start.cast()
    }

    /// The bytes mapped.
    pub fn len(&self) -> usize {
        self.mapping.len
    }

    /// Never: a layout has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The host address of a page.
    ///
    /// # Panics
    /// If the layout has no such page: callers have checked what a peer sent.
    pub fn page_ptr(&self, page: PageIndex) -> NonNull<u8> {
        assert!(page.get() < self.layout.pages(), "{page} is not in the layout");
        // SAFETY: in bounds of the mapping by the check above.
        unsafe { self.host_start().add(page.as_usize() * PAGE_SIZE) }
    }

    /// The page that a host address of this mapping lies in.
    pub fn page_of_host(&self, address: usize) -> Option<PageIndex> {
        let offset = address.checked_sub(self.host_start().as_ptr() as usize)?;
        (offset < self.mapping.len).then(|| PageIndex::new((offset / PAGE_SIZE) as u64))
    }

    /// Copies a run out. The content is torn if the guest writes to it meanwhile.
    ///
    /// # Panics
    /// If the run is not in the layout, or `into` is not of its size.
    pub fn read_run(&self, run: PageRun, into: &mut [u8]) {
        assert!(run.end() <= self.layout.pages() && into.len() == run.bytes());
        let from = self.page_ptr(run.first());
        // SAFETY: both ranges are of this length and valid; guest memory and an
        // exclusive slice of ours do not overlap.
        unsafe { from.copy_to_nonoverlapping(NonNull::from(into).cast(), run.bytes()) };
    }

    /// Copies a run in. Only for memory that is not registered with userfaultfd,
    /// or an alias of it: the thread would wait for itself.
    ///
    /// # Panics
    /// If the run is not in the layout, or `from` is not of its size.
    pub fn write_run(&self, run: PageRun, from: &[u8]) {
        assert!(run.end() <= self.layout.pages() && from.len() == run.bytes());
        let to = self.page_ptr(run.first());
        // SAFETY: as in `read_run`.
        unsafe { to.copy_from_nonoverlapping(NonNull::from(from).cast(), run.bytes()) };
    }
}

/// A run of a frozen guest's pages, readable as bytes without a copy.
#[derive(Debug)]
pub struct FrozenRun {
    ram: Arc<GuestRam>,
    run: PageRun,
}

impl FrozenRun {
    /// The bytes of `run`; `None` if it is not in the layout.
    ///
    /// # Safety
    /// Nothing may write to these pages as long as the value lives: the guest is
    /// paused here for good, or until every such value is gone.
    pub unsafe fn new(ram: Arc<GuestRam>, run: PageRun) -> Option<Self> {
        (run.end() <= ram.layout.pages()).then_some(Self { ram, run })
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

fn length(bytes: u64) -> Result<NonZeroUsize, RamError> {
    usize::try_from(bytes)
        .ok()
        .and_then(NonZeroUsize::new)
        .ok_or(RamError::Map { bytes, source: nix::Error::EINVAL })
}

fn map_shared(memfd: &OwnedFd, bytes: u64, protection: ProtFlags) -> Result<Mapping, RamError> {
    let len = length(bytes)?;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { mmap(None, len, protection, flags, memfd, 0) }
        .map_err(|source| RamError::Map { bytes, source })?;
    Ok(Mapping { start, len: len.get() })
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
