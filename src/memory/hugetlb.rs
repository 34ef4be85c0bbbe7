//! Memory of hugetlbfs: huge pages of [`BLOCK_BYTES`] from the host's pool, in a file.
//!
//! The kernel makes, maps and frees such a page as a whole, and only in a file that is mapped:
//! there is no `write`. Nothing tells a hole from data (`SEEK_DATA` says data, `mincore` only
//! what this process has mapped), and reading a hole through a mapping takes a page from the
//! pool, or ends in `SIGBUS` if that is empty. `pread` reads a hole without that.

use super::huge::{BLOCK_BYTES, BLOCK_PAGES};
use super::ram::GuestRam;
use super::segment::Segment;
use crate::proto::page::{PageIndex, PageRun};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

/// How much is read at once to find content.
const READ_BYTES: usize = 64 << 10;

/// Why a guest has no huge pages.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The pool has too few.
    #[error(
        "{needed} huge pages of 2 MiB are needed and the host's pool gave {got}: vm.nr_hugepages is \
         {} too low",
        needed.saturating_sub(*got)
    )]
    TooFew {
        /// Pages that are needed in all.
        needed: u64,
        /// Pages that there were.
        got: u64,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// Nobody wants them any more.
    #[error("the migration was stopped while huge pages were reserved")]
    Stopped,
}

/// The size of the pages that a file is made of, if it is one of hugetlbfs.
///
/// # Errors
/// It cannot be looked at.
pub fn page_bytes(file: impl AsFd) -> nix::Result<Option<u64>> {
    let system = fstatfs(file)?;
    let huge = system.filesystem_type() == HUGETLBFS_MAGIC;
    Ok(huge.then(|| system.block_size() as u64))
}

/// Makes all huge pages of the guest's files, zeroed, until `stop` says so; it takes some 0.1 s
/// a GiB. From then on nobody who touches the memory can find the pool empty.
///
/// # Errors
/// The pool has too few (also where the kernel fails otherwise: its answer is the source); what was
/// taken of it stays in the files.
pub fn reserve(ram: &GuestRam, stop: &AtomicBool) -> Result<(), PoolError> {
    let needed = ram.layout().bytes() / BLOCK_BYTES as u64;
    let blocks = ram.segments().iter().flat_map(|segment| blocks_of(segment.run()));
    for (got, block) in (0..).zip(blocks) {
        if stop.load(Ordering::Relaxed) {
            return Err(PoolError::Stopped);
        }
        make(ram, block).map_err(|source| PoolError::TooFew { needed, got, source })?;
    }
    Ok(())
}

/// Has the huge page made that `block` is, if it is not there.
///
/// # Errors
/// The kernel's: `ENOSPC` if the pool has none.
///
/// # Panics
/// If the block is not in the layout.
pub fn make(ram: &GuestRam, block: PageRun) -> Result<(), Errno> {
    let (file, at) = ram.segment_of(block.first()).file_at(block.first()).ok_or(Errno::EBADF)?;
    loop {
        match fallocate(file, FallocateFlags::empty(), at as i64, block.bytes() as i64) {
            Err(Errno::EINTR) => {}
            made => return made,
        }
    }
}

/// The huge pages that `run` has to do with, whole ones. In memory that is all of huge pages
/// they begin at multiples of their size, in page numbers as well.
pub fn blocks_of(run: PageRun) -> impl Iterator<Item = PageRun> + use<> {
    let first = run.first().get() / BLOCK_PAGES;
    let blocks = run.end().div_ceil(BLOCK_PAGES) - first;
    (first..first + blocks)
        .filter_map(move |block| PageRun::new(PageIndex::new(block * BLOCK_PAGES), BLOCK_PAGES))
}

/// Whether there is content in a part of a segment, or none that can be told from a hole: then
/// it must not be read through a mapping. What cannot be read counts as content.
pub(super) fn has_content(segment: &Segment, part: PageRun) -> bool {
    let Some((file, at)) = segment.file_at(part.first()) else { return true };
    let mut bytes = vec![0; READ_BYTES];
    (0..part.bytes()).step_by(READ_BYTES).any(|done| {
        let wanted = READ_BYTES.min(part.bytes() - done);
        let read = file.read_exact_at(&mut bytes[..wanted], at + done as u64);
        read.is_err() || bytes[..wanted].iter().any(|byte| *byte != 0)
    })
}
