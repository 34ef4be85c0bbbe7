//! [`Trap`]: reading what the guest waits for.
//!
//! It turns host addresses into pages; it decides nothing and places nothing.

use super::register::{DestinationBacking, Registration};
use crate::memory::ram::GuestRam;
use crate::proto::page::{PageIndex, PageRun};
use nix::unistd::Pid;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use userfaultfd::{Event, EventBuffer, FaultKind, ReadWrite};

/// The most events of the kernel's that one [`Trap::read`] takes; fewer told means that
/// there were no more.
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

    /// Reads up to [`BATCH_EVENTS_MAX`] events of the kernel's, appends what they tell to
    /// `events` and returns how many that are: one removal may be several runs of pages.
    /// It never waits: 0 means that there are none now.
    pub fn read(&self, events: &mut Vec<TrapEvent>) -> Result<usize, TrapError> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let before = events.len();
        let read = self.registration.uffd().read_events(&mut buffer)?;
        for event in read {
            translate(self.registration.ram(), event, events);
        }
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

/// Appends what one event of a batch tells. A bad one must not cost the others: a fault
/// event that is lost is a thread that never runs on.
fn translate(ram: &GuestRam, event: userfaultfd::Result<Event>, events: &mut Vec<TrapEvent>) {
    let told = match event {
        Ok(Event::Pagefault { kind: FaultKind::WriteProtected, .. }) => {
            TrapEvent::Unexpected("a write-protection fault, though no page is protected")
        }
        Ok(Event::Pagefault { kind, rw, addr, thread_id }) => {
            match ram.page_of_host(addr as usize) {
                Some(page) => TrapEvent::Fault {
                    page,
                    write: rw == ReadWrite::Write,
                    minor: kind == FaultKind::Minor,
                    thread: Pid::from_raw(thread_id.as_raw()),
                },
                None => TrapEvent::Unexpected("a fault outside guest memory"),
            }
        }
        Ok(Event::Remove { start, end }) => {
            let before = events.len();
            // The kernel tells of neighbours in its address space as one.
            let runs = ram.runs_between(start as usize, end as usize);
            events.extend(runs.map(TrapEvent::Removed));
            if events.len() > before {
                return;
            }
            TrapEvent::Unexpected("a removal outside guest memory")
        }
        Ok(Event::Fork { .. }) => TrapEvent::Unexpected("a fork, though forks are not followed"),
        Ok(Event::Remap { .. }) => TrapEvent::Unexpected("guest memory was moved (mremap)"),
        Ok(Event::Unmap { .. }) => TrapEvent::Unexpected("guest memory was unmapped"),
        Err(_) => TrapEvent::Unexpected("an event of a kind that is not known"),
    };
    events.push(told);
}
