//! Memory for a guest's pages, taken from the host before any of them comes, so that a
//! guest that was committed never lacks it.
//!
//! Pages that go into a file are made there beforehand, empty. Where a page must not exist
//! before it comes, a [`Counterweight`] of the same size is held instead, and gets lighter
//! as pages come.

use super::ram::GuestRam;
use crate::proto::page::PAGE_SIZE;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, TryLockError};

/// Taken in one call: a signal undoes the call that it interrupts.
const STEP_BYTES: u64 = 64 << 20;
/// By how much a counterweight is lighter than what is missing, and the steps in which it
/// gets lighter: pages are placed before they are counted as placed.
const AHEAD_PAGES: u64 = 512;

/// Memory that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot reserve {bytes} bytes of memory for the guest")]
pub struct ReserveError {
    /// How much was wanted.
    pub bytes: u64,
    /// The kernel's answer.
    #[source]
    pub source: Errno,
}

/// How a guest's memory is reserved.
#[derive(Debug)]
pub enum Reserved {
    /// Not at all.
    Nothing,
    /// Its pages exist in the guest's files, empty.
    InPlace,
    /// As much memory is held elsewhere as is missing here.
    Elsewhere(Counterweight),
}

/// Makes all pages of the guest's files that do not exist. They are zero, and not mapped. It
/// takes about 0.1 s a GiB.
///
/// # Errors
/// The host or a control group does not have the memory.
pub fn reserve_files(ram: &GuestRam) -> Result<(), ReserveError> {
    let bytes = ram.layout().bytes();
    for segment in ram.segments() {
        let file = segment.file_at(segment.run().first());
        let taken = file
            .ok_or(Errno::EBADF)
            .and_then(|(file, begin)| take(file.as_fd(), begin..begin + segment.bytes() as u64));
        taken.map_err(|source| ReserveError { bytes, source })?;
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
    /// Holds the memory of `missing` pages, less what is let go ahead.
    ///
    /// # Errors
    /// The host or a control group does not have the memory.
    pub fn new(missing: u64) -> Result<Self, ReserveError> {
        let pages = missing.saturating_sub(AHEAD_PAGES);
        let bytes = pages * PAGE_SIZE as u64;
        let failed = |source| ReserveError { bytes, source };
        let file = memfd_create(c"reserved", MFdFlags::MFD_CLOEXEC).map_err(failed)?;
        take(file.as_fd(), 0..bytes).map_err(failed)?;
        Ok(Self { file, pages: AtomicU64::new(pages), lowering: Mutex::new(()) })
    }

    /// So many pages are missing still. What is held for others is let go, in steps of 2 MiB.
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

fn take(file: std::os::fd::BorrowedFd<'_>, bytes: std::ops::Range<u64>) -> Result<(), Errno> {
    let mut at = bytes.start;
    while at < bytes.end {
        let step = STEP_BYTES.min(bytes.end - at);
        match fallocate(file, FallocateFlags::empty(), at as i64, step as i64) {
            Ok(()) => at += step,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::Backing;
    use crate::proto::layout::{GuestAddress, MemoryLayout, Region};
    use nix::sys::stat::fstat;

    fn held(file: impl AsFd) -> u64 {
        fstat(file).unwrap().st_blocks as u64 * 512
    }

    #[test]
    fn files_of_all_regions_get_their_pages_and_nothing_in_them() {
        let region = |start, pages| Region { start: GuestAddress(start), pages };
        let layout = MemoryLayout::new(vec![region(0, 700), region(1 << 32, 300)]).unwrap();
        let ram = GuestRam::new(layout, Backing::Memfd).unwrap();
        assert_eq!(held(ram.memfd().unwrap()), 0);
        reserve_files(&ram).unwrap();
        assert_eq!(held(ram.memfd().unwrap()), 1000 * PAGE_SIZE as u64);
    }

    #[test]
    fn memory_without_files_is_not_reserved_in_place() {
        let region = Region { start: GuestAddress(0), pages: 1 };
        let layout = MemoryLayout::new(vec![region]).unwrap();
        let ram = GuestRam::new(layout, Backing::Anonymous).unwrap();
        assert_eq!(reserve_files(&ram).unwrap_err().source, Errno::EBADF);
    }

    #[test]
    fn a_counterweight_is_never_heavier_than_what_is_missing_nor_much_lighter() {
        let total = 10_000;
        let weight = Counterweight::new(total).unwrap();
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
        assert_eq!(Counterweight::new(AHEAD_PAGES).unwrap().pages(), 0);
    }
}
