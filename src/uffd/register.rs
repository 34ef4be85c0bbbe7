//! Putting a guest's memory under `userfaultfd`, and taking it out again.
//!
//! One `Registration` is shared by the [`Trap`] and all [`Placer`]s. It does
//! not read events and places nothing.

use super::blocks::Blocks;
use super::open::{Descriptor, OpenError, UffdOptions, open};
use super::place::Placer;
use super::trap::Trap;
use crate::memory::ram::{Backing, GuestRam, RamError};
use crate::memory::segment::Segment;
use crate::memory::users;
use crate::proto::page::{PAGE_SIZE, PageIndex};
use clap::ValueEnum;
use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, madvise};
use nix::unistd::{Whence, lseek};
use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use userfaultfd::{IoctlFlags, RegisterMode, Uffd};
use userfaultfd_sys as sys;

/// What the destination's memory is made of, and how pages get into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum DestinationBacking {
    /// Private anonymous memory, filled by `UFFDIO_COPY`.
    Anonymous,
    /// A memfd: pages are written into the file and then mapped by
    /// `UFFDIO_CONTINUE`. Other processes can map the same memory, and pages
    /// that are already in the file need no second copy.
    MemfdContinue,
    /// A memfd filled by `UFFDIO_COPY`. The file must have no pages before:
    /// those are mapped without a trap.
    MemfdCopy,
    /// A memfd of huge pages of 2 MiB (hugetlbfs), from the host's pool. Pages are written through
    /// a second mapping, and those of a huge page appear together, by `UFFDIO_CONTINUE`: a fault
    /// waits until the last one has come.
    Hugetlb,
}

impl DestinationBacking {
    /// The kind of guest memory to make for it.
    pub const fn ram(self) -> Backing {
        match self {
            Self::Anonymous => Backing::Anonymous,
            Self::MemfdContinue | Self::MemfdCopy => Backing::Memfd,
            Self::Hugetlb => Backing::Hugetlb,
        }
    }

    /// How the pages of memory that is there already get into it: by CONTINUE if it has
    /// files, else by COPY. (What is only partly in files, or partly of huge pages, cannot be
    /// registered.)
    pub fn of(ram: &GuestRam) -> Self {
        let any = |is: fn(&Segment) -> bool| ram.segments().iter().any(is);
        match (any(Segment::is_huge), any(|segment| segment.file().is_some())) {
            (true, _) => Self::Hugetlb,
            (false, true) => Self::MemfdContinue,
            (false, false) => Self::Anonymous,
        }
    }

    /// Whether pages can come before the guest does, and come again if it writes them meanwhile.
    pub const fn takes_copies(self) -> bool {
        matches!(self, Self::MemfdContinue)
    }

    /// Whether a segment is of the kind of memory that this is.
    fn fits(self, segment: &Segment) -> bool {
        segment.file().is_some() == (self != Self::Anonymous)
            && segment.is_huge() == (self == Self::Hugetlb)
    }

    /// What userfaultfd must be able to do with it.
    pub(super) const fn needed_features(self) -> u64 {
        match self {
            Self::Anonymous => 0,
            Self::MemfdCopy => sys::UFFD_FEATURE_MISSING_SHMEM,
            Self::MemfdContinue => sys::UFFD_FEATURE_MISSING_SHMEM | sys::UFFD_FEATURE_MINOR_SHMEM,
            Self::Hugetlb => {
                sys::UFFD_FEATURE_MISSING_HUGETLBFS | sys::UFFD_FEATURE_MINOR_HUGETLBFS
            }
        }
    }

    /// The faults that are trapped. With CONTINUE both kinds are needed. With
    /// MISSING alone, a page of the file is mapped without an event as soon as it
    /// exists, half written or stale as it may be. With MINOR alone, a page that
    /// does not exist yet is read as zero without an event.
    fn register_mode(self) -> RegisterMode {
        match self {
            Self::Anonymous | Self::MemfdCopy => RegisterMode::MISSING,
            Self::MemfdContinue | Self::Hugetlb => RegisterMode::MISSING | RegisterMode::MINOR,
        }
    }

    fn needed_ioctls(self) -> u64 {
        const ZEROPAGE: u64 = 1 << sys::_UFFDIO_ZEROPAGE;
        let fill = match self {
            Self::Anonymous | Self::MemfdCopy => ZEROPAGE | 1 << sys::_UFFDIO_COPY,
            Self::MemfdContinue => ZEROPAGE | 1 << sys::_UFFDIO_CONTINUE,
            Self::Hugetlb => 1 << sys::_UFFDIO_CONTINUE,
        };
        1 << sys::_UFFDIO_WAKE | fill
    }
}

impl fmt::Display for DestinationBacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Anonymous => "anonymous",
            Self::MemfdContinue => "memfd-continue",
            Self::MemfdCopy => "memfd-copy",
            Self::Hugetlb => "hugetlb",
        })
    }
}

/// Why memory could not be registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// There is no descriptor.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The memory is not of the kind that the backing names.
    #[error("guest memory of another kind cannot be registered as {0}")]
    OtherBacking(DestinationBacking),
    /// Pages in the memfd, which `UFFDIO_COPY` cannot replace and which are mapped
    /// without a trap.
    #[error("the memfd has pages already ({page} is one); memfd-copy needs it empty")]
    NotEmpty {
        /// The first of them.
        page: PageIndex,
    },
    /// Huge pages could not be mapped a second time, to write to them.
    #[error("cannot map guest memory a second time")]
    Alias(#[source] RamError),
    /// Nor could writing there be made safe against a pool that is empty.
    #[error("cannot handle SIGBUS")]
    Guard(#[source] std::io::Error),
    /// The mapping could not be inspected or emptied.
    #[error("cannot prepare guest memory for userfaultfd")]
    Prepare(#[source] Errno),
    /// The kernel refused the range.
    #[error("cannot register {bytes} bytes of {backing} guest memory with userfaultfd")]
    Register {
        /// What was registered.
        backing: DestinationBacking,
        /// How much of it.
        bytes: usize,
        /// The kernel's answer.
        #[source]
        source: userfaultfd::Error,
    },
    /// The kernel cannot fill memory of this kind.
    #[error(
        "userfaultfd on this kernel lacks an operation that {backing} memory needs \
         (has {offered:#x}, needs {needed:#x})"
    )]
    MissingOperations {
        /// What was registered.
        backing: DestinationBacking,
        /// The operations there are, as bits.
        offered: u64,
        /// The operations needed, as bits.
        needed: u64,
    },
}

/// Registers all of `ram`: from here on, whoever touches a page that is not
/// placed waits until a [`Placer`] places it, and the [`Trap`] tells of it.
///
/// What is in the memory already:
/// * [`DestinationBacking::MemfdContinue`] and [`DestinationBacking::Hugetlb`]: pages in the file
///   (from a pre-copy round, or reserved) are trapped too, as minor faults, whoever touched them
///   before. Huge pages must be zero.
/// * [`DestinationBacking::MemfdCopy`]: refused, the file must be empty.
/// * [`DestinationBacking::Anonymous`]: pages touched before stay as they are and
///   are not trapped; stale ones must be discarded first (`MADV_DONTNEED`).
///
/// # Safety
/// Placing a page changes memory, and any thread may do it through a safe method
/// of the [`Placer`]. What makes that sound is promised here, once: no Rust
/// reference (`&`, `&mut`, a slice) to the mapping of `ram` exists from now until
/// [`Placer::unregister`]; whoever reads or writes it does so through raw
/// pointers, as memory that a guest changes at any time.
///
/// Also, though breaking it only hangs: no thread that reads the trap or places
/// pages touches the mapping, since it would wait for itself, and no child is
/// forked to use it, since a child is not trapped.
pub unsafe fn register(
    ram: Arc<GuestRam>,
    backing: DestinationBacking,
    options: UffdOptions,
) -> Result<(Trap, Placer), RegisterError> {
    if !ram.segments().iter().all(|segment| backing.fits(segment)) {
        return Err(RegisterError::OtherBacking(backing));
    }
    let huge_pages = users::may_have_huge_pages(&ram);
    prepare(&ram, backing)?;
    let mode = backing.register_mode();
    let blocks = match backing {
        DestinationBacking::Hugetlb => Some(Blocks::new(&ram)?),
        _ => None,
    };
    let descriptor = open(options, backing)?;
    for segment in ram.segments() {
        let bytes = segment.bytes();
        let offered: IoctlFlags = descriptor
            .uffd
            .register_with_mode(segment.start().as_ptr().cast(), bytes, mode)
            .map_err(|source| RegisterError::Register { backing, bytes, source })?;
        let needed = backing.needed_ioctls();
        if offered.bits() & needed != needed {
            let offered = offered.bits();
            return Err(RegisterError::MissingOperations { backing, offered, needed });
        }
    }
    let registration = Arc::new(Registration {
        descriptor: ManuallyDrop::new(descriptor),
        ram: ManuallyDrop::new(ram),
        backing,
        blocks,
        huge_pages,
        unregistered: AtomicBool::new(false),
    });
    Ok((Trap::new(Arc::clone(&registration)), Placer::new(registration)))
}

/// Sees to it that no page of a memfd is mapped before it is trapped.
fn prepare(ram: &GuestRam, backing: DestinationBacking) -> Result<(), RegisterError> {
    for segment in ram.segments() {
        let first = segment.run().first();
        let Some((file, begin)) = segment.file_at(first) else {
            // A fault in a range that is empty would have the kernel make a huge page and
            // clear it, only to find that missing pages are trapped.
            advise(segment, MmapAdvise::MADV_NOHUGEPAGE);
            continue;
        };
        if backing == DestinationBacking::MemfdCopy {
            match lseek(file, begin as i64, Whence::SeekData) {
                // The file may be longer than the memory.
                Ok(offset) if (offset as u64) < begin + segment.bytes() as u64 => {
                    let pages = (offset as u64 - begin) / PAGE_SIZE as u64;
                    let page = first.checked_add(pages).unwrap_or(first);
                    return Err(RegisterError::NotEmpty { page });
                }
                Ok(_) | Err(Errno::ENXIO) => {}
                Err(errno) => return Err(RegisterError::Prepare(errno)),
            }
        }
        // What was touched through this mapping is mapped, and would not be trapped.
        // This unmaps it and leaves the file as it is. It must be done before
        // registering: as an event it would wait for its own reader.
        let start = segment.start().cast();
        // SAFETY: a whole mapping, to which no references exist; it is shared, so
        // that no content is lost.
        unsafe { madvise(start, segment.bytes(), MmapAdvise::MADV_DONTNEED) }
            .map_err(RegisterError::Prepare)?;
    }
    Ok(())
}

/// Advises on huge pages; a kernel without them knows no such advice.
fn advise(segment: &Segment, advice: MmapAdvise) {
    // SAFETY: a whole mapping; no content changes.
    let _ = unsafe { madvise(segment.start().cast(), segment.bytes(), advice) };
}

/// Guest memory under userfaultfd.
#[derive(Debug)]
pub(super) struct Registration {
    descriptor: ManuallyDrop<Descriptor>,
    ram: ManuallyDrop<Arc<GuestRam>>,
    backing: DestinationBacking,
    /// Only with [`DestinationBacking::Hugetlb`].
    blocks: Option<Blocks>,
    /// Whether each segment could have huge pages before.
    huge_pages: Vec<bool>,
    unregistered: AtomicBool,
}

impl Registration {
    pub(super) fn uffd(&self) -> &Uffd {
        &self.descriptor.uffd
    }

    pub(super) fn can_poison(&self) -> bool {
        self.descriptor.can_poison()
    }

    pub(super) fn blocks(&self) -> Option<&Blocks> {
        self.blocks.as_ref()
    }

    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    pub(super) fn backing(&self) -> DestinationBacking {
        self.backing
    }

    /// Ends trapping; every waiting thread runs on. What is missing is zero.
    pub(super) fn unregister(&self) -> Result<(), Errno> {
        let mut ended = Ok(());
        for segment in self.ram.segments() {
            let start = segment.start().as_ptr().cast();
            let unregistered = self.uffd().unregister(start, segment.bytes());
            // Whoever waits in another segment must run on all the same.
            ended = ended.and(unregistered.map_err(|error| errno_of(&error)));
        }
        ended?;
        // Nothing takes advice back; where huge pages are on for all, this has the same effect.
        let huge = self.ram.segments().iter().zip(&self.huge_pages);
        for (segment, _) in huge.filter(|(segment, may)| **may && segment.file().is_none()) {
            advise(segment, MmapAdvise::MADV_HUGEPAGE);
        }
        self.unregistered.store(true, Ordering::Release);
        Ok(())
    }
}

impl Drop for Registration {
    /// Closing the descriptor unregisters: a guest that still runs would read
    /// missing pages as zero. So without [`Registration::unregister`] it is closed
    /// only if the memory goes as well; else it is left open, and the guest stays
    /// trapped until the process ends.
    fn drop(&mut self) {
        // SAFETY: taken once, in drop.
        let ram = unsafe { ManuallyDrop::take(&mut self.ram) };
        let ended = self.unregistered.load(Ordering::Acquire);
        let memory_is_gone = Arc::into_inner(ram).is_some_and(|ram| ram.is_only_holder());
        if ended || memory_is_gone {
            // SAFETY: taken once, in drop.
            drop(unsafe { ManuallyDrop::take(&mut self.descriptor) });
        } else {
            tracing::warn!(
                "guest memory is still in use and not complete: its userfaultfd stays open, \
                 so that missing pages are not read as zero"
            );
        }
    }
}

/// The kernel's answer within an error of the `userfaultfd` crate, whose `nix` is
/// another version than ours.
pub(super) fn errno_of(error: &userfaultfd::Error) -> Errno {
    match error {
        userfaultfd::Error::CopyFailed(errno) => Errno::from_raw(*errno as i32),
        userfaultfd::Error::ZeropageFailed(errno) => Errno::from_raw(*errno as i32),
        userfaultfd::Error::SystemError(errno) => Errno::from_raw(*errno as i32),
        userfaultfd::Error::PartiallyCopied(_) => Errno::EAGAIN,
        _ => Errno::EIO,
    }
}
