//! Memory for a guest's pages, taken from the host before any of them comes, so that a
//! guest that was committed never lacks it.
//!
//! Pages that go into a file are made there beforehand, empty. Where a page must not exist
//! before it comes, a [`Counterweight`] of the same size is held instead, and gets lighter
//! as pages come.

use super::hugetlb::PoolError;
use super::limits::{NotEnoughMemory, check_can_hold};
use super::ram::GuestRam;
use crate::proto::page::PAGE_SIZE;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, TryLockError};

/// The most that a counterweight is lowered by in one go, which keeps whoever does it. Nothing
/// that arrives has more pages.
const STEP_PAGES: u64 = 2 * AHEAD_PAGES;
/// Taken in one call: a signal undoes the call that it interrupts.
const STEP_BYTES: u64 = 64 << 20;
/// By how much a counterweight is lighter than what is missing, and the steps in which it
/// gets lighter: pages are placed before they are counted as placed.
const AHEAD_PAGES: u64 = 512;

/// What is needed beside the pages: for the page tables of this process and of KVM, so much of
/// the guest's memory;
const TABLES_SHARE: u64 = 256;
/// and for what is on its way.
const BUFFERS_BYTES: u64 = 8 << 20;

/// Memory that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// There is too little, of which it was looked at before it was taken: where there is, the
    /// kernel may have somebody killed for it.
    #[error(transparent)]
    Limit(#[from] NotEnoughMemory),
    /// The guest's memory is of huge pages, and they cannot be had.
    #[error(transparent)]
    HugePages(#[from] PoolError),
    /// The kernel has none.
    #[error("cannot reserve {bytes} bytes of memory for the guest")]
    Kernel {
        /// How much was wanted.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// Nobody wants it any more.
    #[error("the migration was stopped while memory was reserved")]
    Stopped,
}

/// How a guest's memory is reserved.
#[derive(Debug)]
pub enum Reserved {
    /// Not at all.
    Nothing,
    /// Its pages exist in the guest's files, empty.
    InPlace,
    /// Its huge pages do, all of them: nothing of one is given back for the pages in it that
    /// are zero.
    InPool,
    /// As much memory is held elsewhere as is missing here.
    Elsewhere(Counterweight),
}

/// Makes all pages of the guest's files that do not exist, until `stop` says so. They are zero,
/// and not mapped. It takes 0.1 to 0.4 s a GiB.
///
/// # Errors
/// The host or a control group does not have the memory; what was taken of it stays.
pub fn reserve_files(ram: &GuestRam, stop: &AtomicBool) -> Result<(), ReserveError> {
    let mut left = ram.layout().bytes();
    for segment in ram.segments() {
        let Some((file, begin)) = segment.file_at(segment.run().first()) else {
            return Err(ReserveError::Kernel { bytes: left, source: Errno::EBADF });
        };
        take(file.as_fd(), begin..begin + segment.bytes() as u64, &mut left, stop)?;
    }
    Ok(())
}

/// Memory that nobody uses, to be freed when somebody needs it.
#[derive(Debug)]
pub struct Counterweight {
    file: OwnedFd,
    /// Its pages are the file's first ones.
    pages: AtomicU64,
    lowering: Mutex<()>,
}

impl Counterweight {
    /// Holds the memory of `missing` pages, less what is let go ahead, unless `stop` says so.
    ///
    /// # Errors
    /// The host or a control group does not have the memory.
    pub fn new(missing: u64, stop: &AtomicBool) -> Result<Self, ReserveError> {
        let pages = missing.saturating_sub(AHEAD_PAGES);
        let mut bytes = pages * PAGE_SIZE as u64;
        let file = memfd_create(c"reserved", MFdFlags::MFD_CLOEXEC);
        let file = file.map_err(|source| ReserveError::Kernel { bytes, source })?;
        take(file.as_fd(), 0..bytes, &mut bytes, stop)?;
        Ok(Self { file, pages: AtomicU64::new(pages), lowering: Mutex::new(()) })
    }

    /// So many pages are missing still. What is held for others is let go, in steps of 2 MiB or
    /// somewhat more.
    pub fn lower_to(&self, missing: u64) {
        let wanted = missing.saturating_sub(AHEAD_PAGES);
        let due = |held: u64| held >= wanted + AHEAD_PAGES || (wanted == 0 && held > 0);
        if !due(self.pages.load(Ordering::Relaxed)) {
            return;
        }
        // Who finds it locked has somebody who lets go for both, or the next page will.
        let _lowering = match self.lowering.try_lock() {
            Ok(lowering) => lowering,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let held = self.pages.load(Ordering::Relaxed);
        if !due(held) {
            return;
        }
        let wanted = wanted.max(held.saturating_sub(STEP_PAGES));
        let from = (wanted * PAGE_SIZE as u64) as i64;
        let bytes = ((held - wanted) * PAGE_SIZE as u64) as i64;
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // What cannot be let go now is at the next step.
        if fallocate(&self.file, hole, from, bytes).is_ok() {
            self.pages.store(wanted, Ordering::Relaxed);
        }
    }

    /// The pages that are held.
    #[cfg(test)]
    fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }
}

/// Makes the pages of a part of a file; `left` bytes are wanted in all from here on.
fn take(
    file: BorrowedFd<'_>,
    part: Range<u64>,
    left: &mut u64,
    stop: &AtomicBool,
) -> Result<(), ReserveError> {
    let mut at = part.start;
    while at < part.end {
        if stop.load(Ordering::Relaxed) {
            return Err(ReserveError::Stopped);
        }
        // Others may be taking memory, too.
        check_can_hold(*left + *left / TABLES_SHARE + BUFFERS_BYTES)?;
        let step = STEP_BYTES.min(part.end - at);
        match fallocate(file, FallocateFlags::empty(), at as i64, step as i64) {
            Ok(()) => {
                at += step;
                *left -= step;
            }
            Err(Errno::EINTR) => {}
            Err(source) => return Err(ReserveError::Kernel { bytes: *left, source }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::limits::available;
    use crate::memory::ram::Backing;
    use crate::proto::layout::{GuestAddress, MemoryLayout, Region};
    use nix::sys::stat::fstat;

    static GOES_ON: AtomicBool = AtomicBool::new(false);

    fn held(file: impl AsFd) -> u64 {
        fstat(file).unwrap().st_blocks as u64 * 512
    }

    #[test]
    fn files_of_all_regions_get_their_pages_and_nothing_in_them() {
        let region = |start, pages| Region { start: GuestAddress(start), pages };
        let layout = MemoryLayout::new(vec![region(0, 700), region(1 << 32, 300)]).unwrap();
        let ram = GuestRam::new(layout, Backing::Memfd).unwrap();
        assert_eq!(held(ram.memfd().unwrap()), 0);
        reserve_files(&ram, &GOES_ON).unwrap();
        assert_eq!(held(ram.memfd().unwrap()), 1000 * PAGE_SIZE as u64);
    }

    #[test]
    fn memory_without_files_is_not_reserved_in_place() {
        let region = Region { start: GuestAddress(0), pages: 1 };
        let layout = MemoryLayout::new(vec![region]).unwrap();
        let ram = GuestRam::new(layout, Backing::Anonymous).unwrap();
        let refused = reserve_files(&ram, &GOES_ON);
        let Err(ReserveError::Kernel { source: Errno::EBADF, .. }) = refused else {
            panic!("{refused:?}");
        };
    }

    #[test]
    fn more_than_there_is_is_not_tried_and_what_nobody_wants_is_not_taken() {
        let (bytes, _) = available().unwrap();
        let more = Counterweight::new(bytes / PAGE_SIZE as u64 + AHEAD_PAGES, &GOES_ON);
        assert!(matches!(more, Err(ReserveError::Limit(_))), "{more:?}");
        let stopped = Counterweight::new(1 << 20, &AtomicBool::new(true));
        assert!(matches!(stopped, Err(ReserveError::Stopped)), "{stopped:?}");
    }

    #[test]
    fn a_counterweight_is_never_heavier_than_what_is_missing_nor_much_lighter() {
        let total = 10_000;
        let weight = Counterweight::new(total, &GOES_ON).unwrap();
        for missing in (0..=total).rev() {
            weight.lower_to(missing);
            let pages = weight.pages();
            assert!(pages <= missing, "{pages} for {missing}");
            assert!(pages + 2 * AHEAD_PAGES > missing, "{pages} for {missing}");
            if missing % 1000 == 0 {
                assert_eq!(held(&weight.file), pages * PAGE_SIZE as u64);
            }
        }
        assert_eq!(held(&weight.file), 0);
        // A guest smaller than what is let go ahead.
        assert_eq!(Counterweight::new(AHEAD_PAGES, &GOES_ON).unwrap().pages(), 0);
    }
}
