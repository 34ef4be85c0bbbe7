//! Guest memory as one process hands it to another: files, and where in them each region
//! lies.
//!
//! [`MemoryFiles`] is what a VMM gives away, [`take_over`] what the fault-server makes of
//! it. What of it can be judged without looking at a file is judged by
//! [`check_region_files`], on both sides.

use crate::memory::huge::BLOCK_BYTES;
use crate::memory::hugetlb;
use crate::memory::ram::{GuestRam, RamError};
use crate::proto::layout::MemoryLayout;
use crate::proto::page::PAGE_SIZE;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use vm_memory::FileOffset;

/// The most files that a guest's memory lies in.
pub const MEMORY_FILES_MAX: usize = 16;

/// Where a region of guest memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionFile {
    /// Which of the files handed over, from 0.
    pub file: u32,
    /// Where in the file the region begins, in bytes.
    pub offset: u64,
}

/// Why guest memory cannot be handed over, or not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// Not one place for each region.
    #[error("{places} places are named for {regions} memory regions")]
    Places {
        /// Places named.
        places: usize,
        /// Regions of the layout.
        regions: usize,
    },
    /// More than [`MEMORY_FILES_MAX`].
    #[error("memory region {region} lies in file {file}; there are at most {MEMORY_FILES_MAX}")]
    TooManyFiles {
        /// The region.
        region: usize,
        /// Its file.
        file: u64,
    },
    /// A file that no region lies in, though a later one is named.
    #[error("no memory region lies in file {0}, though files are numbered on from 0")]
    UnusedFile(usize),
    /// An offset that is not a page's, or from which the region goes beyond all files.
    #[error("memory region {region} cannot begin at offset {offset:#x} of a file")]
    Offset {
        /// The region.
        region: usize,
        /// The offset named.
        offset: u64,
    },
    /// Two regions with the same bytes of the same file.
    #[error("memory regions {0} and {1} share bytes of a file")]
    Overlap(usize, usize),
    /// A region without a file cannot be handed to another process.
    #[error("memory region {0} lies in no file; use memfds, mapped shared")]
    NoFile(usize),
    /// Other than as many files as the regions name.
    #[error("{got} memory files were handed over; the regions name {expected}")]
    FileCount {
        /// Files handed over.
        got: usize,
        /// Files named.
        expected: usize,
    },
    /// A file is no memfd that can be sealed against shrinking, so that reading it could
    /// kill this process.
    #[error("memory file {file} cannot be sealed against shrinking")]
    Seal {
        /// Which.
        file: usize,
        /// The kernel's answer.
        #[source]
        source: nix::Error,
    },
    /// A file cannot be looked at.
    #[error("memory file {file} cannot be looked at")]
    LookAt {
        /// Which.
        file: usize,
        /// The kernel's answer.
        #[source]
        source: nix::Error,
    },
    /// A file that is made of huge pages of another size.
    #[error(
        "memory file {file} is made of huge pages of {actual} bytes; only those of 2 MiB are supported"
    )]
    HugePageSize {
        /// Which.
        file: usize,
        /// Their size.
        actual: u64,
    },
    /// A region that has a part of a huge page.
    #[error(
        "memory file {file} is made of huge pages, and region {region} does not begin and end where \
         they do (2 MiB)"
    )]
    HugeUnaligned {
        /// Which.
        file: usize,
        /// The region.
        region: usize,
    },
    /// A file that ends before its region does.
    #[error("memory file {file} has {actual} bytes; region {region} ends at {expected}")]
    FileTooShort {
        /// Which.
        file: usize,
        /// Its size.
        actual: u64,
        /// The region.
        region: usize,
        /// Where it ends.
        expected: u64,
    },
    /// The memory cannot be mapped.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// Checks where the regions of `layout` are said to lie; returns how many files there are.
pub fn check_region_files(
    layout: &MemoryLayout,
    places: &[RegionFile],
) -> Result<usize, HandoverError> {
    let regions = layout.regions().len();
    if places.len() != regions {
        return Err(HandoverError::Places { places: places.len(), regions });
    }
    let mut used = [false; MEMORY_FILES_MAX];
    let mut taken: Vec<(u32, u64, u64)> = Vec::new();
    for (region, (place, (_, run))) in places.iter().zip(layout.region_runs()).enumerate() {
        let RegionFile { file, offset } = *place;
        let too_many = HandoverError::TooManyFiles { region, file: file.into() };
        *used.get_mut(file as usize).ok_or(too_many)? = true;
        let end = offset.checked_add(run.bytes() as u64).filter(|end| *end <= i64::MAX as u64);
        let end = end.filter(|_| offset.is_multiple_of(PAGE_SIZE as u64));
        let end = end.ok_or(HandoverError::Offset { region, offset })?;
        let shares = |&(other, start, other_end): &(u32, u64, u64)| {
            other == file && offset < other_end && start < end
        };
        if let Some(other) = taken.iter().position(shares) {
            return Err(HandoverError::Overlap(other, region));
        }
        taken.push((file, offset, end));
    }
    let count = used.iter().rposition(|&used| used).map_or(0, |last| last + 1);
    match used[..count].iter().position(|&used| !used) {
        Some(unused) => Err(HandoverError::UnusedFile(unused)),
        None => Ok(count),
    }
}

/// A guest's memory as its VMM gives it away.
#[derive(Clone, Debug)]
pub struct MemoryFiles<'a> {
    regions: Vec<RegionFile>,
    files: Vec<BorrowedFd<'a>>,
}

impl<'a> MemoryFiles<'a> {
    /// The files that `ram` lies in.
    ///
    /// # Errors
    /// Memory without files, or in more than [`MEMORY_FILES_MAX`].
    pub fn of(ram: &'a GuestRam) -> Result<Self, HandoverError> {
        let mut regions = Vec::new();
        let mut files: Vec<&Arc<File>> = Vec::new();
        for (region, segment) in ram.segments().iter().enumerate() {
            let place = segment.file().ok_or(HandoverError::NoFile(region))?;
            let known = files.iter().position(|file| Arc::ptr_eq(file, place.arc()));
            let file = known.unwrap_or_else(|| {
                files.push(place.arc());
                files.len() - 1
            });
            regions.push(RegionFile { file: file as u32, offset: place.start() });
        }
        check_region_files(ram.layout(), &regions)?;
        Ok(Self { regions, files: files.into_iter().map(|file| file.as_fd()).collect() })
    }

    /// The same from its parts, as another process has handed them over.
    ///
    /// # Errors
    /// If the regions do not lie in these files.
    pub fn new(
        layout: &MemoryLayout,
        regions: Vec<RegionFile>,
        files: Vec<BorrowedFd<'a>>,
    ) -> Result<Self, HandoverError> {
        let expected = check_region_files(layout, &regions)?;
        if files.len() != expected {
            return Err(HandoverError::FileCount { got: files.len(), expected });
        }
        Ok(Self { regions, files })
    }

    /// Where each region lies, in the layout's order.
    pub fn regions(&self) -> &[RegionFile] {
        &self.regions
    }

    /// The files.
    pub fn files(&self) -> &[BorrowedFd<'a>] {
        &self.files
    }
}

/// Maps memory that a VMM has handed over, for reading only. Each file is sealed against
/// shrinking before its size is looked at, so that no page can vanish under the mapping.
pub fn take_over(
    layout: MemoryLayout,
    places: &[RegionFile],
    files: Vec<OwnedFd>,
) -> Result<GuestRam, HandoverError> {
    let expected = check_region_files(&layout, places)?;
    if files.len() != expected {
        return Err(HandoverError::FileCount { got: files.len(), expected });
    }
    let mut sizes = Vec::new();
    for (number, file) in files.iter().enumerate() {
        seal(file).map_err(|source| HandoverError::Seal { file: number, source })?;
        let failed = |source| HandoverError::LookAt { file: number, source };
        let huge = match hugetlb::page_bytes(file).map_err(failed)? {
            Some(actual) if actual != BLOCK_BYTES as u64 => {
                return Err(HandoverError::HugePageSize { file: number, actual });
            }
            size => size.is_some(),
        };
        sizes.push((fstat(file).map_err(failed)?.st_size as u64, huge));
    }
    let files: Vec<Arc<File>> = files.into_iter().map(|file| Arc::new(file.into())).collect();
    let mut mapped = Vec::new();
    for (region, (place, (_, run))) in places.iter().zip(layout.region_runs()).enumerate() {
        let (file, expected) = (place.file as usize, place.offset + run.bytes() as u64);
        let (actual, huge) = sizes[file];
        let whole = |bytes: u64| bytes.is_multiple_of(BLOCK_BYTES as u64);
        if huge && !(whole(place.offset) && whole(expected)) {
            return Err(HandoverError::HugeUnaligned { file, region });
        }
        if actual < expected {
            return Err(HandoverError::FileTooShort { file, actual, region, expected });
        }
        mapped.push(FileOffset::from_arc(files[file].clone(), place.offset));
    }
    Ok(GuestRam::attach_read_only(layout, mapped)?)
}

fn seal(file: &OwnedFd) -> Result<(), nix::Error> {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS)?;
    if SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return Ok(());
    }
    fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::layout::{GuestAddress, Region};

    const PAGE: u64 = PAGE_SIZE as u64;

    fn layout(pages: &[u64]) -> MemoryLayout {
        let region =
            |(index, &pages): (u64, &u64)| Region { start: GuestAddress(index << 40), pages };
        MemoryLayout::new((0..).zip(pages).map(region).collect()).unwrap()
    }

    fn check(pages: &[u64], places: &[(u32, u64)]) -> Result<usize, HandoverError> {
        let places = places.iter().map(|&(file, offset)| RegionFile { file, offset });
        check_region_files(&layout(pages), &places.collect::<Vec<_>>())
    }

    #[test]
    fn regions_lie_apart_in_files_without_gaps_in_their_numbers() {
        assert_eq!(check(&[4], &[(0, 0)]).unwrap(), 1);
        assert_eq!(check(&[4, 5], &[(0, 0), (0, 4 * PAGE)]).unwrap(), 1);
        assert_eq!(check(&[4, 5], &[(0, 5 * PAGE), (0, 0)]).unwrap(), 1);
        assert_eq!(check(&[4, 5, 6], &[(1, 0), (0, 0), (1, 7 * PAGE)]).unwrap(), 2);
        let sixteen: Vec<_> = (0..16).map(|file| (file, 0)).collect();
        assert_eq!(check(&[1; 16], &sixteen).unwrap(), 16);

        let wrong = |pages: &[u64], places: &[(u32, u64)]| check(pages, places).unwrap_err();
        use HandoverError::*;
        assert!(matches!(wrong(&[4, 5], &[(0, 0)]), Places { places: 1, regions: 2 }));
        assert!(matches!(wrong(&[4], &[(16, 0)]), TooManyFiles { region: 0, file: 16 }));
        assert!(matches!(wrong(&[4], &[(u32::MAX, 0)]), TooManyFiles { .. }));
        assert!(matches!(wrong(&[4], &[(1, 0)]), UnusedFile(0)));
        assert!(matches!(wrong(&[4, 5], &[(0, 0), (2, 0)]), UnusedFile(1)));
        assert!(matches!(wrong(&[4, 5], &[(0, 0), (0, 3 * PAGE)]), Overlap(0, 1)));
        assert!(matches!(wrong(&[4, 5], &[(0, 4 * PAGE), (0, 0)]), Overlap(0, 1)));
        assert!(matches!(wrong(&[2, 2, 9], &[(0, 2 * PAGE), (1, 0), (0, 0)]), Overlap(0, 2)));
        for offset in [1, PAGE / 2, u64::MAX, !(PAGE - 1), i64::MAX as u64 + 1 - 4 * PAGE + 1] {
            assert!(matches!(wrong(&[4], &[(0, offset)]), Offset { region: 0, .. }), "{offset:#x}");
        }
    }
}
