//! [`WriteLog`]: which pages of guest memory were written through this process's mapping, as
//! the kernel remembers it by itself.
//!
//! The memory is registered for write protection with `UFFD_FEATURE_WP_ASYNC`: the first write
//! to a protected page costs its thread a fault, in which the kernel lifts the protection and
//! goes on, without an event. `PAGEMAP_SCAN` then finds the pages that are not protected any
//! more and protects them again, both under the lock of their page table, so that a write falls
//! into this scan or into the next. (A scan between a thread's fault and its write finds the
//! page, and so does the next one.)
//!
//! It sees every write through the mapping, whoever makes it: a thread of this process, or the
//! kernel for one (a system call that reads into guest memory). It does not see:
//! * writes through *another* mapping of the same file, or to the file itself, of this process
//!   or of another one;
//! * writes of the kernel or of a device to pages that it has pinned before (`O_DIRECT`, vhost,
//!   registered buffers of io_uring).

use super::ioctl;
use super::open::{OpenError, open_for_write_log};
use super::register::errno_of;
use crate::memory::ram::GuestRam;
use crate::proto::page::PageRun;
use nix::errno::Errno;
use std::ffi::c_void;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use userfaultfd::{RegisterMode, Uffd};
use userfaultfd_sys as sys;

/// How much is protected by a call: others that want to change the address space wait meanwhile.
const PROTECT_BYTES_MAX: usize = 256 << 20;
/// How many runs of written pages a scan can return at a time.
const RUNS_MAX: usize = 4096;
const PAGEMAP: &str = "/proc/self/pagemap";

/// Why writes cannot be logged.
#[derive(Debug, thiserror::Error)]
pub enum WriteLogError {
    /// There is no such userfaultfd.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The kernel's view of this process's pages cannot be opened.
    #[error("cannot open {PAGEMAP}")]
    Pagemap(#[source] std::io::Error),
    /// The kernel refused. `EBUSY` from "register" means that the memory is under another
    /// userfaultfd.
    #[error("cannot {action} {bytes} bytes of guest memory")]
    Memory {
        /// What was tried: "register", "write-protect", "scan", "unregister".
        action: &'static str,
        /// How many bytes it was for.
        bytes: usize,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
}

fn memory(action: &'static str, bytes: usize) -> impl Fn(Errno) -> WriteLogError {
    move |source| WriteLogError::Memory { action, bytes, source }
}

/// A log of the writes to guest memory, from its making until it is stopped or dropped.
#[derive(Debug)]
pub struct WriteLog {
    /// While it is open the memory stays registered.
    uffd: Uffd,
    pagemap: File,
    ram: Arc<GuestRam>,
    found: Vec<sys::page_region>,
}

impl WriteLog {
    /// Whether this kernel has what it takes (Linux 6.7), or why not.
    ///
    /// # Errors
    /// What is missing.
    pub fn available() -> Result<(), WriteLogError> {
        Self::open().map(drop)
    }

    fn open() -> Result<(Uffd, File), WriteLogError> {
        // The kernel that has WP_ASYNC has PAGEMAP_SCAN, too.
        let uffd = open_for_write_log()?;
        Ok((uffd, File::open(PAGEMAP).map_err(WriteLogError::Pagemap)?))
    }

    /// Begins to log the writes to `ram`, with none logged. It takes page tables for all of
    /// the memory, 2 MiB for each GiB, but no memory for pages that are holes.
    ///
    /// # Errors
    /// A kernel that cannot, or memory that is under userfaultfd already; nothing is logged
    /// then.
    pub fn start(ram: Arc<GuestRam>) -> Result<Self, WriteLogError> {
        let (uffd, pagemap) = Self::open()?;
        for segment in ram.segments() {
            let (start, bytes) = (segment.start().as_ptr(), segment.bytes());
            uffd.register_with_mode(start.cast(), bytes, RegisterMode::WRITE_PROTECT)
                .map_err(|error| memory("register", bytes)(errno_of(&error)))?;
            // A scan would protect what is mapped, and pass by where there is no page table
            // yet, or one that a huge page takes the place of: a page written there and
            // unmapped again before the next scan would be lost to the log. This protects
            // those as well, in small pages.
            for offset in (0..bytes).step_by(PROTECT_BYTES_MAX) {
                let chunk = PROTECT_BYTES_MAX.min(bytes - offset);
                let at = start.wrapping_add(offset).cast::<c_void>();
                uffd.write_protect(at, chunk)
                    .map_err(|error| memory("write-protect", chunk)(errno_of(&error)))?;
            }
        }
        let found = vec![sys::page_region::default(); RUNS_MAX];
        Ok(Self { uffd, pagemap, ram, found })
    }

    /// Takes the pages that were written since they were taken last, or since the start, out of
    /// the log, and hands them to `written`, in runs that do not overlap. A page may be written
    /// again as soon as it is handed over; it is in the log again then.
    ///
    /// # Errors
    /// If the kernel fails, pages may be lost: the log is of no use any more.
    pub fn take(&mut self, mut written: impl FnMut(PageRun)) -> Result<(), WriteLogError> {
        for segment in self.ram.segments() {
            let start = segment.start().as_ptr() as u64;
            let end = start + segment.bytes() as u64;
            let mut next = start;
            while next < end {
                let failed = memory("scan", (end - next) as usize);
                let mut scan = sys::pm_scan_arg {
                    size: size_of::<sys::pm_scan_arg>() as u64,
                    // Without the second, memory that is not registered would be passed by.
                    flags: sys::PM_SCAN_WP_MATCHING | sys::PM_SCAN_CHECK_WPASYNC,
                    start: next,
                    end,
                    vec: self.found.as_mut_ptr() as u64,
                    vec_len: self.found.len() as u64,
                    category_mask: sys::PAGE_IS_WRITTEN,
                    return_mask: sys::PAGE_IS_WRITTEN,
                    ..sys::pm_scan_arg::default()
                };
                // SAFETY: the structure is the one that the ioctl takes, and `vec` has room for
                // as many regions as it says, for which any bits are valid. The range is a
                // mapping of ours, whose content the ioctl does not change.
                let count = unsafe { ioctl::pagemap_scan(self.pagemap.as_raw_fd(), &mut scan) };
                let count = count.map_err(&failed)? as usize;
                let found = self.found.get(..count).ok_or_else(|| failed(Errno::EPROTO))?;
                for region in found {
                    let (from, to) = (region.start as usize, region.end as usize);
                    self.ram.runs_between(from, to).for_each(&mut written);
                }
                // It stops early when there is no room for more.
                if scan.walk_end <= next {
                    return Err(failed(Errno::EPROTO));
                }
                next = scan.walk_end;
            }
        }
        Ok(())
    }

    /// Logs no more, and lifts all protection. Dropping does the same, without an answer.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn stop(self) -> Result<(), WriteLogError> {
        let mut stopped = Ok(());
        for segment in self.ram.segments() {
            let start = segment.start().as_ptr().cast();
            let unregistered = self.uffd.unregister(start, segment.bytes());
            let failed = memory("unregister", segment.bytes());
            stopped = stopped.and(unregistered.map_err(|error| failed(errno_of(&error))));
        }
        stopped
    }
}

#[cfg(test)]
mod tests;
