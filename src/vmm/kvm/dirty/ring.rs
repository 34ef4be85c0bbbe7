//! [`Rings`]: a ring for each vCPU, into which KVM puts the number of each page that is
//! written.
//!
//! Whoever empties a ring marks its entries as collected; `KVM_RESET_DIRTY_RINGS` then takes
//! write access to their pages away again and frees the entries. It costs by the pages written
//! and not by the size of the guest. A vCPU whose ring is nearly full leaves the guest, and its
//! thread empties the rings itself: what it finds waits here for the next round.
//!
//! Collecting and resetting are done under one lock. So what is in `written` when the lock is
//! free is protected again, and may be handed over.

use super::slots;
use crate::proto::page::PageRun;
use crate::vmm::kvm::error::{KvmError, call};
use crate::vmm::kvm::machine::Machine;
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_dirty_gfn};
use kvm_ioctls::{VcpuFd, VmFd};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Pages that a ring has room for, at least and at most. KVM wants a power of two; the least
/// must be more than it keeps for itself, some 600.
const ENTRIES: std::ops::RangeInclusive<u64> = 1 << 12..=1 << 16;

/// Written by KVM: the entry has a page.
const DIRTY: u32 = 1 << 0;
/// Written by whoever has collected the page.
const COLLECTED: u32 = 1 << 1;

nix::ioctl_none!(kvm_reset, KVMIO, 0xC7);

/// The bytes of a ring for a guest of so many pages: it has room for a quarter of them, so that
/// few vCPUs must leave the guest for it.
pub fn bytes_for(pages: u64) -> usize {
    let entries = (pages / 4).clamp(*ENTRIES.start(), *ENTRIES.end()).next_power_of_two();
    entries as usize * size_of::<kvm_dirty_gfn>()
}

/// The rings of a machine, and what was found in them.
pub struct Rings {
    vm: Arc<VmFd>,
    collected: Mutex<Collected>,
}

struct Collected {
    rings: Vec<Ring>,
    /// The pages of each slot.
    slots: Vec<PageRun>,
    /// A bit for each page of each slot, as in KVM's own bitmaps.
    written: Vec<Vec<u64>>,
}

impl Rings {
    /// Maps the rings, of `bytes` each, of a machine's vCPUs.
    pub(super) fn new(machine: &Machine, vcpus: &[VcpuFd], bytes: usize) -> Result<Self, KvmError> {
        let rings = vcpus.iter().map(|fd| Ring::map(fd, bytes)).collect::<Result<_, _>>()?;
        let slots: Vec<PageRun> = slots(machine).map(|(_, run)| run).collect();
        let written = slots.iter().map(none_of).collect();
        let collected = Mutex::new(Collected { rings, slots, written });
        Ok(Self { vm: machine.shared_vm(), collected })
    }

    /// Empties the rings, so that a vCPU whose ring was full can go on.
    pub fn empty(&self) -> Result<(), KvmError> {
        self.collect().map(drop)
    }

    /// Forgets what was written so far.
    pub(super) fn forget(&self) -> Result<(), KvmError> {
        self.take().map(drop)
    }

    /// Takes what was written: for each slot a bit for each page.
    pub(super) fn take(&self) -> Result<Vec<Vec<u64>>, KvmError> {
        let mut collected = self.collect()?;
        let none = collected.slots.iter().map(none_of).collect();
        Ok(std::mem::replace(&mut collected.written, none))
    }

    fn collect(&self) -> Result<MutexGuard<'_, Collected>, KvmError> {
        let mut collected = self.collected.lock().unwrap_or_else(PoisonError::into_inner);
        collected.empty_rings()?;
        loop {
            // SAFETY: the ioctl has no argument.
            match unsafe { kvm_reset(self.vm.as_raw_fd()) } {
                Ok(_) => return Ok(collected),
                // A vCPU's thread was kicked: some entries may be left.
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    let error = kvm_ioctls::Error::new(errno as i32);
                    return Err(call("KVM_RESET_DIRTY_RINGS")(error));
                }
            }
        }
    }
}

fn none_of(run: &PageRun) -> Vec<u64> {
    vec![0; run.count().div_ceil(64) as usize]
}

impl Collected {
    fn empty_rings(&mut self) -> Result<(), KvmError> {
        for ring in &mut self.rings {
            while let Some((slot, page)) = ring.next() {
                let pages = self.slots.get(slot).map_or(0, |run| run.count());
                let word = self.written.get_mut(slot).and_then(|log| log.get_mut(page / 64));
                match word.filter(|_| (page as u64) < pages) {
                    Some(word) => *word |= 1 << (page % 64),
                    None => return Err(KvmError::DirtyRing { slot, page }),
                }
            }
        }
        Ok(())
    }
}

/// A vCPU's ring, as it is mapped.
struct Ring {
    start: NonNull<kvm_dirty_gfn>,
    entries: usize,
    next: usize,
}

// SAFETY: the mapping is owned, and its entries are used by one thread at a time.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, bytes: usize) -> Result<Self, KvmError> {
        let failed =
            |errno: Errno| call("mapping a dirty ring")(kvm_ioctls::Error::new(errno as i32));
        let length = NonZeroUsize::new(bytes).ok_or_else(|| failed(Errno::EINVAL))?;
        // SAFETY: the descriptor is open for as long as it is borrowed here.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE;
        // SAFETY: a new mapping at an address of the kernel's choice; it keeps the vCPU, and
        // so the ring, alive.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, fd, offset) };
        let entries = bytes / size_of::<kvm_dirty_gfn>();
        Ok(Self { start: start.map_err(failed)?.cast(), entries, next: 0 })
    }

    /// Collects the next page: its slot, and its number in there.
    fn next(&mut self) -> Option<(usize, usize)> {
        // SAFETY: in bounds of the mapping, and aligned as KVM has it.
        let entry = unsafe { self.start.add(self.next) };
        // SAFETY: in the mapping, which lives as long as `self`; KVM and this side access the
        // flags as a whole, atomically.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry.as_ptr()).flags) };
        // Acquires what KVM wrote of the entry.
        if flags.load(Ordering::Acquire) & (DIRTY | COLLECTED) != DIRTY {
            return None;
        }
        // SAFETY: as above; KVM leaves an entry that is dirty alone until it is collected.
        let (slot, page) = unsafe { ((*entry.as_ptr()).slot, (*entry.as_ptr()).offset) };
        // Gives the entry back only after it was read.
        flags.store(COLLECTED, Ordering::Release);
        self.next = (self.next + 1) % self.entries;
        // The upper half is the address space, of which this machine has one.
        Some(((slot & 0xFFFF) as usize, page as usize))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let bytes = self.entries * size_of::<kvm_dirty_gfn>();
        // SAFETY: the mapping was made by `map` with this length and ends here.
        let _ = unsafe { munmap(self.start.cast(), bytes) };
    }
}

/// What the offset counts: pages of the host.
const PAGE: i64 = crate::proto::page::PAGE_SIZE as i64;
