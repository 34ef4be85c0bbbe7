//! [`Trap`]: reading what the guest waits for.
//!
//! It turns host addresses into pages; it decides nothing and places nothing.

use super::register::{DestinationBacking, Registration};
use crate::memory::ram::GuestRam;
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use nix::unistd::Pid;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use userfaultfd::{Event, EventBuffer, FaultKind, ReadWrite};

/// The most events that one [`Trap::read`] returns.
pub const BATCH_EVENTS_MAX: usize = 64;

/// What happened to the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrapEvent {
    /// A thread waits for a page. It waits until the page is placed, or until
    /// [`Placer::wake`](super::Placer::wake) if the page was placed in between.
    /// Several threads that wait for the same page give an event each.
    Fault {
        /// The page.
        page: PageIndex,
        /// Whether it is to be written.
        write: bool,
        /// Whether the page is in the memfd already and is only not mapped
        /// ([`DestinationBacking::MemfdContinue`]). It says nothing about the
        /// content: the page may be half written, or stale.
        minor: bool,
        /// The thread, as numbered in this process's PID namespace. It may be no
        /// vCPU: device threads and kernel workers touch guest memory too.
        thread: Pid,
    },
    /// Pages were given back: private memory now reads as zero there, a memfd
    /// too after `MADV_REMOVE`, but not after `MADV_DONTNEED`. Until this event
    /// was read, placing anything gives [`Stop::Again`](super::Stop::Again).
    Removed(PageRun),
    /// An event that was not asked for, or for memory that is not the guest's.
    /// There is nothing to do but to tell.
    Unexpected(&'static str),
}

/// A failure to read events.
#[derive(Debug, thiserror::Error)]
#[error("cannot read events from userfaultfd")]
pub struct TrapError(#[from] userfaultfd::Error);

/// The reading end of a registration. For the one thread, or task, that reads
/// events; the descriptor is readable when there are some.
pub struct Trap {
    registration: Arc<Registration>,
    // Reading needs room for raw events. There is one reader, so the lock is free.
    buffer: Mutex<EventBuffer>,
}

impl Trap {
    pub(super) fn new(registration: Arc<Registration>) -> Self {
        Self { registration, buffer: Mutex::new(EventBuffer::new(BATCH_EVENTS_MAX)) }
    }

    /// Appends up to [`BATCH_EVENTS_MAX`] events to `events` and returns how many.
    /// It never waits: 0 means that there are none now.
    pub fn read(&self, events: &mut Vec<TrapEvent>) -> Result<usize, TrapError> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let before = events.len();
        let read = self.registration.uffd().read_events(&mut buffer)?;
        events.extend(read.map(|event| translate(self.registration.ram(), event)));
        Ok(events.len() - before)
    }

    /// What the memory is made of.
    pub fn backing(&self) -> DestinationBacking {
        self.registration.backing()
    }
}

impl AsFd for Trap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.registration.uffd().as_fd()
    }
}

impl AsRawFd for Trap {
    fn as_raw_fd(&self) -> RawFd {
        self.registration.uffd().as_raw_fd()
    }
}

/// One event of a batch. A bad one must not cost the others: a fault event that
/// is lost is a thread that never runs on.
fn translate(ram: &GuestRam, event: userfaultfd::Result<Event>) -> TrapEvent {
    match event {
        Ok(Event::Pagefault { kind: FaultKind::WriteProtected, .. }) => {
            TrapEvent::Unexpected("a write-protection fault, though no page is protected")
        }
        Ok(Event::Pagefault { kind, rw, addr, thread_id }) => {
            let Some(page) = ram.page_of_host(addr as usize) else {
                return TrapEvent::Unexpected("a fault outside guest memory");
            };
            let write = rw == ReadWrite::Write;
            let minor = kind == FaultKind::Minor;
            TrapEvent::Fault { page, write, minor, thread: Pid::from_raw(thread_id.as_raw()) }
        }
        Ok(Event::Remove { start, end }) => match run_between(ram, start as usize, end as usize) {
            Some(run) => TrapEvent::Removed(run),
            None => TrapEvent::Unexpected("a removal outside guest memory"),
        },
        Ok(Event::Fork { .. }) => TrapEvent::Unexpected("a fork, though forks are not followed"),
        Ok(Event::Remap { .. }) => TrapEvent::Unexpected("guest memory was moved (mremap)"),
        Ok(Event::Unmap { .. }) => TrapEvent::Unexpected("guest memory was unmapped"),
        Err(_) => TrapEvent::Unexpected("an event of a kind that is not known"),
    }
}

/// The pages of `ram` between two host addresses.
fn run_between(ram: &GuestRam, start: usize, end: usize) -> Option<PageRun> {
    let base = ram.host_start().as_ptr() as usize;
    let first = start.max(base) - base;
    let end = end.min(base + ram.len()).checked_sub(base)?.div_ceil(PAGE_SIZE) as u64;
    let first = (first / PAGE_SIZE) as u64;
    PageRun::new(PageIndex::new(first), end.checked_sub(first)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::Backing;
    use crate::proto::layout::MemoryLayout;

    #[test]
    fn a_range_of_addresses_is_clipped_to_guest_memory() {
        let ram = GuestRam::new(MemoryLayout::flat(8).unwrap(), Backing::Anonymous).unwrap();
        let base = ram.host_start().as_ptr() as usize;
        let run = |first, count| PageRun::new(PageIndex::new(first), count);
        let between = |from: isize, to: isize| {
            let at = |pages: isize| base.wrapping_add_signed(pages * PAGE_SIZE as isize);
            run_between(&ram, at(from), at(to))
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
