//! [`Placer`]: putting pages into registered memory and waking who waits.
//!
//! It never touches the registered mapping: content goes in by ioctl, by
//! `pwritev` to the memfd, or through another mapping of it (`blocks`). It does not know which pages are placed; whoever calls
//! it owns the pages of a run exclusively (the ledger's `Placing`) until it returns.

use super::blocks::Blocks;
use super::content::Content;
use super::ioctl;
use super::register::{DestinationBacking, Registration, errno_of};
use crate::proto::layout::MemoryLayout;
use crate::proto::page::{PAGE_SIZE, PageRun};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use std::ffi::c_void;
use std::io::IoSlice;
use std::num::NonZero;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use userfaultfd_sys as sys;

/// Pieces that one system call takes: a frame of 64 pages in datagrams of 9,000 bytes has 30.
const PIECES_A_WRITE: usize = 32;

/// How far a placement came.
#[must_use = "a placement may stop early, and what is left must be placed again"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// How many pages from the run's first one on were placed, and their waiters
    /// woken.
    pub pages: u64,
    /// Why it ended before the run's end; `None` if all pages were placed.
    pub stop: Option<Stop>,
}

/// Why a placement ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The kernel takes no pages now (`EAGAIN`): an event such as
    /// [`Removed`](super::TrapEvent::Removed) has not been read yet. Placing the
    /// rest works once it is; that must be left to another thread or to later if
    /// the caller is the one that reads events.
    Again,
    /// The page after those placed is there already (`EEXIST`), and was left as
    /// it is. Outside recovery this is a mistake of the caller's, to be counted.
    /// The rest goes on behind that page.
    Exists,
}

impl Placed {
    /// Whether the whole run was placed.
    pub fn is_complete(self) -> bool {
        self.stop.is_none()
    }

    /// The pages of `run` that were not placed, a page that exists included.
    pub fn rest(self, run: PageRun) -> Option<PageRun> {
        PageRun::new(run.first().checked_add(self.pages)?, run.count().checked_sub(self.pages)?)
    }
}

/// A placement that failed for good.
#[derive(Debug, thiserror::Error)]
#[error("{operation} failed for {run:?} after {placed} pages")]
pub struct PlaceError {
    /// What was tried, by the kernel's name.
    pub operation: &'static str,
    /// The pages.
    pub run: PageRun,
    /// How many of them were placed before.
    pub placed: u64,
    /// The kernel's answer. `ENOENT` and `ESRCH`: the memory is unregistered,
    /// unmapped, or its process is gone. `ENOMEM` and `ENOSPC`: no memory.
    #[source]
    pub source: Errno,
}

/// The writing end of a registration. Clones are the same; any number of threads
/// may place disjoint runs at once.
#[derive(Clone, Debug)]
pub struct Placer {
    registration: Arc<Registration>,
}

impl Placer {
    pub(super) fn new(registration: Arc<Registration>) -> Self {
        Self { registration }
    }

    /// What the memory is made of.
    pub fn backing(&self) -> DestinationBacking {
        self.registration.backing()
    }

    /// Its huge pages, if it is made of them.
    pub(super) fn blocks(&self) -> Option<&Blocks> {
        self.registration.blocks()
    }

    /// The pages of each region.
    pub fn segments(&self) -> impl Iterator<Item = PageRun> {
        self.registration.ram().segments().iter().map(|segment| segment.run())
    }

    /// The memory's layout.
    pub fn layout(&self) -> &MemoryLayout {
        self.registration.ram().layout()
    }

    /// Places the pages of `run` with this content.
    ///
    /// `UFFDIO_COPY` never changes a page that exists. With
    /// [`DestinationBacking::MemfdContinue`] there is no such protection: the
    /// content is written first, also over pages that the guest has changed
    /// since. The caller must know that they are not placed. With
    /// [`DestinationBacking::Hugetlb`] pages are placed when they are written, and who waits is
    /// woken with the last one of a huge page.
    ///
    /// # Panics
    /// If the run is not in the layout, or `content` is not of its size.
    pub fn place<'a>(
        &self,
        run: PageRun,
        content: impl Into<Content<'a>>,
    ) -> Result<Placed, PlaceError> {
        let content = content.into();
        self.check(run);
        assert_eq!(content.len(), run.bytes(), "content of {run:?}");
        match (self.backing(), self.blocks()) {
            (_, Some(blocks)) => self.place_in_blocks(blocks, run, Some(content)),
            (DestinationBacking::Anonymous | DestinationBacking::MemfdCopy, None) => {
                let mut page = [0; PAGE_SIZE];
                self.fill("UFFDIO_COPY", run, |part| {
                    let done = part.first().as_usize() - run.first().as_usize();
                    let content = content.behind(done * PAGE_SIZE).up_to(part.bytes());
                    self.copy(part, content.first_pages(&mut page))
                })
            }
            (DestinationBacking::MemfdContinue | DestinationBacking::Hugetlb, None) => {
                self.write(run, content)?;
                self.map(run)
            }
        }
    }

    /// Places zero pages.
    ///
    /// In private memory they cost nothing until written. In a memfd each takes
    /// memory, so a hole is better left alone until a fault asks for it: it is
    /// zero after [`unregister`](Self::unregister) anyway. A page that is in the
    /// memfd already, mapped or not, gives [`Stop::Exists`]; where its content is
    /// known to be stale, [`place`](Self::place) zeros. In a huge page it is left as it is, and
    /// that is zero where nobody has written to it.
    ///
    /// # Panics
    /// If the run is not in the layout.
    pub fn place_zero(&self, run: PageRun) -> Result<Placed, PlaceError> {
        self.check(run);
        if let Some(blocks) = self.blocks() {
            return self.place_in_blocks(blocks, run, None);
        }
        self.fill("UFFDIO_ZEROPAGE", run, |rest| {
            let mut request =
                sys::uffdio_zeropage { range: self.range(rest), mode: 0, zeropage: 0 };
            // SAFETY: the argument is the structure that the ioctl reads and writes,
            // and `register`'s caller allows missing pages to appear.
            let done = unsafe { ioctl::zeropage(self.raw_fd(), &mut request) };
            progress(done, request.zeropage, rest)
        })
    }

    /// Writes content into the memfd and maps nothing, for pages that are only to be seen once
    /// they are known to be valid. Only for [`DestinationBacking::MemfdContinue`].
    ///
    /// # Panics
    /// If the run is not in the layout, or `content` is not of its size.
    pub fn write_unmapped<'a>(
        &self,
        run: PageRun,
        content: impl Into<Content<'a>>,
    ) -> Result<(), PlaceError> {
        let content = content.into();
        self.check(run);
        assert_eq!(content.len(), run.bytes(), "content of {run:?}");
        if self.backing() != DestinationBacking::MemfdContinue {
            let source = Errno::EOPNOTSUPP;
            return Err(PlaceError { operation: "pwritev", run, placed: 0, source });
        }
        self.write(run, content)
    }

    /// Maps pages whose content is in the memfd already, as far as they are not mapped, and
    /// wakes who waits for them. A page that is not there ends it. Only for
    /// [`DestinationBacking::MemfdContinue`], and only for pages known to be valid: the guest
    /// sees whatever is in the file.
    ///
    /// # Panics
    /// If the run is not in the layout.
    pub fn map_present(&self, run: PageRun) -> Result<(), PlaceError> {
        self.check(run);
        if self.backing() != DestinationBacking::MemfdContinue {
            let source = Errno::EOPNOTSUPP;
            return Err(PlaceError { operation: "UFFDIO_CONTINUE", run, placed: 0, source });
        }
        self.map_again(run)
    }

    /// Wakes who waits for pages that are placed: their fault and the placement
    /// crossed.
    ///
    /// With [`DestinationBacking::MemfdContinue`] the kernel may also have
    /// dropped the mapping of a placed page (under memory pressure, say), and the
    /// next access is a minor fault again. So the pages are mapped again first;
    /// waking alone would let the thread fault for ever. Where mapping is not
    /// possible now (a removal is not read yet), the thread is woken all the same
    /// and gives a new event.
    ///
    /// # Panics
    /// If the run is not in the layout.
    pub fn wake(&self, run: PageRun) -> Result<(), PlaceError> {
        self.check(run);
        match self.blocks() {
            Some(blocks) => self.open_again(blocks, run)?,
            None if self.backing() == DestinationBacking::MemfdContinue => self.map_again(run)?,
            None => {}
        }
        self.wake_unplaced(run)
    }

    /// Lets whoever waits in `run` look again: a thread whose page is still missing is trapped
    /// anew. For pages that are not placed, in place of [`wake`](Self::wake).
    ///
    /// # Panics
    /// If the run is not in the layout.
    pub fn wake_unplaced(&self, run: PageRun) -> Result<(), PlaceError> {
        self.check(run);
        // A fault in a huge page is one at its beginning.
        let (first, last) = (self.unit_of(run.first()), run.pages().next_back());
        let end = last.map_or(run.end(), |last| self.unit_of(last).end());
        let run = PageRun::new(first.first(), end - first.first().get()).unwrap_or(run);
        for (_, part) in self.registration.ram().parts(run) {
            let woken = self.registration.uffd().wake(self.address(part), part.bytes());
            woken.map_err(|error| {
                let source = errno_of(&error);
                PlaceError { operation: "UFFDIO_WAKE", run: part, placed: 0, source }
            })?;
        }
        Ok(())
    }

    /// Gives the memory of pages back that were reserved in the guest's files and are not
    /// needed, for they are zero: they are holes afterwards. Nobody else may place them
    /// meanwhile, and none is placed: what is in them is lost. To be called for whole huge pages.
    ///
    /// # Panics
    /// If the run is not in the layout.
    pub fn give_back(&self, run: PageRun) -> Result<(), PlaceError> {
        self.check(run);
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for (segment, part) in self.registration.ram().parts(run) {
            let failed =
                |source| PlaceError { operation: "fallocate", run: part, placed: 0, source };
            let (file, at) = segment.file_at(part.first()).ok_or(failed(Errno::EBADF))?;
            // No event comes of it, as would of a MADV_REMOVE.
            fallocate(file, hole, at as i64, part.bytes() as i64).map_err(failed)?;
        }
        Ok(())
    }

    /// Ends trapping for all threads; everybody who waits runs on. Pages that are
    /// not placed become zero, without a word: call it when the ledger is full,
    /// or when the guest will never run here.
    pub fn unregister(&self) -> Result<(), Errno> {
        self.registration.unregister()
    }

    /// Gives pages up, for their content is lost: whoever waits for one or touches it, now
    /// and after [`unregister`](Self::unregister), gets `SIGBUS`, and its thread is no longer
    /// stuck in the kernel. (KVM passes it on, or `KVM_RUN` ends with `EFAULT`.) A page that
    /// is placed gives [`Stop::Exists`].
    ///
    /// It holds for this mapping, and in a memfd only for a hole, which the page stays:
    /// `UFFDIO_CONTINUE` maps a page that exists in spite of the mark. Of a huge page all is given
    /// up with any page in it.
    ///
    /// # Panics
    /// If the run is not in the layout.
    pub fn poison(&self, run: PageRun) -> Result<Placed, PlaceError> {
        self.check(run);
        let poison = |run| match self.registration.can_poison() {
            true => self.mark(run),
            false => self.cover(run),
        };
        match self.blocks() {
            Some(blocks) => self.poison_blocks(blocks, run, poison),
            None => poison(run),
        }
    }

    fn mark(&self, run: PageRun) -> Result<Placed, PlaceError> {
        self.fill("UFFDIO_POISON", run, |rest| {
            let mut request = sys::uffdio_poison { range: self.range(rest), mode: 0, updated: 0 };
            // SAFETY: the argument is the structure that the ioctl reads and writes; the
            // pages have no content yet that anybody could have a reference to.
            let done = unsafe { ioctl::poison(self.raw_fd(), &mut request) };
            progress(done, request.updated, rest)
        })
    }

    /// The same where the kernel has no `UFFDIO_POISON` (before Linux 6.6): an empty file is
    /// mapped over the pages, which is an error to touch. It looks at no page that is there.
    ///
    /// # Panics
    /// If the run is not in the layout.
    pub fn cover(&self, run: PageRun) -> Result<Placed, PlaceError> {
        self.check(run);
        let failed = |source| PlaceError { operation: "mmap", run, placed: 0, source };
        let empty = memfd_create(c"lost-memory", MFdFlags::MFD_CLOEXEC).map_err(failed)?;
        for (_, part) in self.registration.ram().parts(run) {
            let at = NonZero::new(self.address(part) as usize).zip(NonZero::new(part.bytes()));
            let (at, bytes) = at.ok_or(failed(Errno::EFAULT))?;
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
            // SAFETY: it replaces whole pages of the guest's mapping, which are missing, so
            // that nobody can have a reference to them; the mapping as a whole is unmapped
            // by its owner as before.
            unsafe { mmap(Some(at), bytes, protection, flags, &empty, 0) }.map_err(failed)?;
            // Whoever waits here looks again, and finds no userfaultfd any more.
            let woken = self.registration.uffd().wake(self.address(part), part.bytes());
            woken.map_err(|error| failed(errno_of(&error)))?;
        }
        Ok(Placed { pages: run.count(), stop: None })
    }

    /// One `UFFDIO_COPY` of the first pages of `run`, which has no fewer; returns the bytes
    /// copied.
    fn copy(&self, run: PageRun, content: &[u8]) -> Result<u64, Errno> {
        let bytes = content.len();
        let (from, to) = (content.as_ptr().cast(), self.address(run));
        // SAFETY: as many bytes of `content` are read as it has, the run is no shorter, and the
        // kernel only fills pages of ours that are missing, which `register`'s caller allows.
        match unsafe { self.registration.uffd().copy(from, to, bytes, true) } {
            Ok(copied) => Ok(copied as u64),
            // A count above the request is the kernel's -EAGAIN, read as unsigned.
            Err(userfaultfd::Error::PartiallyCopied(copied)) if copied <= bytes => {
                Ok(copied as u64)
            }
            Err(error) => Err(errno_of(&error)),
        }
    }

    /// Puts content into the memfd. `pwritev` does it in about half the time of a
    /// second mapping, whose every page costs a fault and a page table entry.
    fn write(&self, run: PageRun, content: Content<'_>) -> Result<(), PlaceError> {
        let failed = |source| PlaceError { operation: "pwritev", run, placed: 0, source };
        let mut rest = content;
        for (segment, part) in self.registration.ram().parts(run) {
            let mut here = rest.up_to(part.bytes());
            rest = rest.behind(part.bytes());
            let (file, mut at) = segment.file_at(part.first()).ok_or(failed(Errno::EBADF))?;
            while !here.is_empty() {
                let mut room = [IoSlice::new(&[]); PIECES_A_WRITE];
                match nix::sys::uio::pwritev(file, here.slices(&mut room), at as i64) {
                    Ok(0) => return Err(failed(Errno::EIO)),
                    Ok(written) => {
                        here = here.behind(written);
                        at += written as u64;
                    }
                    Err(Errno::EINTR) => {}
                    Err(errno) => return Err(failed(errno)),
                }
            }
        }
        Ok(())
    }

    /// Maps pages of the memfd and wakes who waits for them.
    pub(super) fn map(&self, run: PageRun) -> Result<Placed, PlaceError> {
        self.fill("UFFDIO_CONTINUE", run, |rest| {
            let to = self.address(rest);
            let mapped = self.registration.uffd().r#continue(to, rest.bytes(), true);
            mapped.map_err(|error| errno_of(&error))
        })
    }

    /// Maps those pages of a placed run that are not mapped, as far as possible.
    fn map_again(&self, run: PageRun) -> Result<(), PlaceError> {
        let mut rest = Some(run);
        while let Some(run) = rest {
            rest = match self.map(run) {
                // A page that is mapped: go on behind it.
                Ok(placed @ Placed { stop: Some(Stop::Exists), .. }) => {
                    Placed { pages: placed.pages + 1, stop: None }.rest(run)
                }
                Ok(Placed { stop: None | Some(Stop::Again), .. }) => None,
                // Removed since (a hole). Whoever waits faults anew, as missing.
                Err(PlaceError { source: Errno::EFAULT, .. }) => None,
                // Covered: nobody is trapped there any more.
                Err(PlaceError { source: Errno::ENOENT, .. }) => None,
                Err(error) => return Err(error),
            };
        }
        Ok(())
    }

    /// Repeats an operation for what is left of `run` as long as it gets on. The
    /// kernel reports a stop in the middle of a run as a short count; the reason
    /// shows when it is asked again.
    fn fill(
        &self,
        operation: &'static str,
        run: PageRun,
        mut attempt: impl FnMut(PageRun) -> Result<u64, Errno>,
    ) -> Result<Placed, PlaceError> {
        let mut placed = Placed { pages: 0, stop: None };
        while let Some(rest) = placed.rest(run) {
            // The kernel takes no range that goes beyond a mapping.
            let (_, part) = self.registration.ram().first_part(rest);
            placed.stop = match attempt(part) {
                Ok(bytes) if bytes >= PAGE_SIZE as u64 => {
                    placed.pages += bytes / PAGE_SIZE as u64;
                    continue;
                }
                Ok(_) | Err(Errno::EAGAIN) => Some(Stop::Again),
                Err(Errno::EEXIST) => Some(Stop::Exists),
                Err(source) => {
                    return Err(PlaceError { operation, run, placed: placed.pages, source });
                }
            };
            break;
        }
        Ok(placed)
    }

    fn check(&self, run: PageRun) {
        let pages = self.registration.ram().layout().pages();
        assert!(run.end() <= pages, "{run:?} is not in the layout");
    }

    fn address(&self, run: PageRun) -> *mut c_void {
        self.registration.ram().page_ptr(run.first()).as_ptr().cast()
    }

    fn range(&self, run: PageRun) -> sys::uffdio_range {
        sys::uffdio_range { start: self.address(run) as u64, len: run.bytes() as u64 }
    }

    fn raw_fd(&self) -> i32 {
        self.registration.uffd().as_raw_fd()
    }
}

/// The bytes done by an ioctl that reports a short count along with `EAGAIN`.
fn progress(result: Result<i32, Errno>, done_bytes: i64, run: PageRun) -> Result<u64, Errno> {
    let done = u64::try_from(done_bytes).unwrap_or(0);
    match result {
        Ok(_) => Ok(done),
        Err(Errno::EAGAIN) if done > 0 && done <= run.bytes() as u64 => Ok(done),
        Err(errno) => Err(errno),
    }
}
