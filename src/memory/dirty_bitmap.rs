//! [`DirtyBitmap`]: which pages of a guest were written, in memory that two processes
//! share.
//!
//! One bit a page in layout order: page `i` is bit `i % 64` of the `u64` number `i / 64`,
//! in the host's byte order. Whoever sees writes sets bits with an atomic OR, whoever
//! copies the pages clears them with an atomic swap, at any time and without a lock. So
//! that no write is lost, a page's bit is cleared *before* its content is read.
//!
//! It is no log: it knows neither who wrote nor when, and how writes are noticed is the
//! VMM's.

use crate::proto::bitmap::low_bits;
use crate::proto::layout::{MemoryLayout, PAGES_MAX};
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a VMM says that cannot tell which pages were written.
pub(crate) const NO_DIRTY_LOG: &str = "this VMM cannot tell which pages were written";

const BITS: u64 = u64::BITS as u64;

/// A bit for each page of a guest, in a memfd.
#[derive(Debug)]
pub struct DirtyBitmap {
    start: NonNull<c_void>,
    pages: u64,
    memfd: OwnedFd,
}

/// A bitmap that could not be made or mapped.
#[derive(Debug, thiserror::Error)]
pub enum DirtyBitmapError {
    /// A system call failed.
    #[error("cannot {action} the dirty bitmap of {pages} pages")]
    System {
        /// What was tried: "make", "size", "seal", "map".
        action: &'static str,
        /// How many pages it was for.
        pages: u64,
        /// The kernel's answer.
        #[source]
        source: nix::Error,
    },
    /// The file handed over could change its size under the mapping, or is no memfd.
    #[error("the dirty bitmap's file is not a memfd sealed against shrinking and growing")]
    NotSealed,
    /// The file handed over does not have the size of this guest's bitmap.
    #[error("the dirty bitmap's file has {actual} bytes, not {expected}")]
    Size {
        /// The file's size.
        actual: u64,
        /// The size that the guest's pages make.
        expected: u64,
    },
}

/// A bit that stands for no page: the bitmap is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the dirty bitmap has bits beyond its last page ({bits:#x} in its last word)")]
pub struct StrayBits {
    /// Those bits.
    pub bits: u64,
}

impl DirtyBitmap {
    /// The size of the file for a guest of `pages` pages: whole words, then whole pages.
    pub const fn file_bytes(pages: u64) -> u64 {
        (pages.div_ceil(BITS) * 8).next_multiple_of(PAGE_SIZE as u64)
    }

    /// A new bitmap for the pages of `layout`, all clear, in a new memfd whose size
    /// cannot change any more.
    pub fn create(layout: &MemoryLayout) -> Result<Self, DirtyBitmapError> {
        let pages = layout.pages();
        let failed = |action| move |source| DirtyBitmapError::System { action, pages, source };
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let memfd = memfd_create(c"dirty-bitmap", flags).map_err(failed("make"))?;
        let bytes = Self::file_bytes(pages);
        nix::unistd::ftruncate(&memfd, bytes as i64).map_err(failed("size"))?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).map_err(failed("seal"))?;
        Self::map(memfd, pages)
    }

    /// Maps the bitmap that another process made for the pages of `layout`.
    pub fn from_fd(memfd: OwnedFd, layout: &MemoryLayout) -> Result<Self, DirtyBitmapError> {
        let seals =
            fcntl(&memfd, FcntlArg::F_GET_SEALS).map_err(|_| DirtyBitmapError::NotSealed)?;
        let needed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        if !SealFlag::from_bits_retain(seals).contains(needed) {
            return Err(DirtyBitmapError::NotSealed);
        }
        let pages = layout.pages();
        let actual = nix::sys::stat::fstat(&memfd)
            .map_err(|source| DirtyBitmapError::System { action: "look at", pages, source })?
            .st_size as u64;
        let expected = Self::file_bytes(pages);
        if actual != expected {
            return Err(DirtyBitmapError::Size { actual, expected });
        }
        Self::map(memfd, pages)
    }

    fn map(memfd: OwnedFd, pages: u64) -> Result<Self, DirtyBitmapError> {
        debug_assert!(pages <= PAGES_MAX);
        let failed = |source| DirtyBitmapError::System { action: "map", pages, source };
        let len = usize::try_from(Self::file_bytes(pages)).ok().and_then(NonZeroUsize::new);
        let len = len.ok_or(nix::Error::EINVAL).map_err(failed)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; the file has this
        // length and is sealed against losing it.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, &memfd, 0) };
        Ok(Self { start: start.map_err(failed)?, pages, memfd })
    }

    /// The memfd, to be handed to the other process.
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// How many pages it has bits for.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many words hold those bits.
    pub fn words(&self) -> u64 {
        self.pages.div_ceil(BITS)
    }

    /// Says that `page` was written.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn set(&self, page: PageIndex) {
        assert!(page.get() < self.pages, "{page} has no bit");
        self.or(page.get() / BITS, 1 << (page.get() % BITS));
    }

    /// Says that all pages of `run` were written.
    ///
    /// # Panics
    /// If the run is not in the bitmap.
    pub fn set_run(&self, run: PageRun) {
        assert!(run.end() <= self.pages, "{run:?} has no bits");
        let mut next = run.first().get();
        while next < run.end() {
            let (index, bit) = (next / BITS, next % BITS);
            let count = (run.end() - next).min(BITS - bit);
            self.or(index, low_bits(count) << bit);
            next += count;
        }
    }

    /// Says which pages of `run` were written: bit `i` of `bits`, counted as in the bitmap
    /// itself, stands for the run's page `i`. Bits beyond the run are ignored. Returns how
    /// many bits of the run there were, set before or not.
    ///
    /// # Panics
    /// If the run is not in the bitmap, or `bits` is too short for it.
    pub fn fold(&self, run: PageRun, bits: &[u64]) -> u64 {
        let len = run.count();
        assert!(run.end() <= self.pages && len <= bits.len() as u64 * BITS, "{run:?}");
        let (first, shift) = (run.first().get() / BITS, run.first().get() % BITS);
        let mut count = 0;
        for (index, &word) in (0..len.div_ceil(BITS)).zip(bits) {
            let word = word & low_bits(len - index * BITS);
            count += u64::from(word.count_ones());
            self.or(first + index, word << shift);
            if shift != 0 {
                self.or(first + index + 1, word >> (BITS - shift));
            }
        }
        count
    }

    /// Sets bits of word `index`, which may lie past the end if there are none.
    fn or(&self, index: u64, bits: u64) {
        // A read of a clear word must not allocate its page, nor a write dirty it.
        if bits != 0 {
            // Releases what the writer knows of the pages; see `take`.
            self.word(index).fetch_or(bits, Ordering::Release);
        }
    }

    /// The bits of word `index`, which stay; those that stand for no page are left out.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn look(&self, index: u64) -> u64 {
        self.word(index).load(Ordering::Acquire) & low_bits(self.pages - index * BITS)
    }

    /// Whether `page` was written; `false` if there is no such page.
    pub fn contains(&self, page: PageIndex) -> bool {
        page.get() < self.pages && self.look(page.get() / BITS) >> (page.get() % BITS) & 1 == 1
    }

    /// Takes the pages of word `index` out of the bitmap: their bits are clear from here
    /// on, and their content is to be read after this.
    ///
    /// # Errors
    /// [`StrayBits`] if the other process has set bits that stand for no page.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn take(&self, index: u64) -> Result<u64, StrayBits> {
        let word = self.word(index);
        if word.load(Ordering::Relaxed) == 0 {
            return Ok(0);
        }
        // Acquires what the writer of the bits knew, and is itself not moved behind the
        // reads of the pages' content.
        let bits = word.swap(0, Ordering::AcqRel);
        match bits & !low_bits(self.pages - index * BITS) {
            0 => Ok(bits),
            bits => Err(StrayBits { bits }),
        }
    }

    /// Takes all pages out, word by word as the iterator goes on: the first page of each
    /// word that had any, and its bits.
    pub fn take_all(&self) -> impl Iterator<Item = Result<(PageIndex, u64), StrayBits>> + '_ {
        (0..self.words()).filter_map(|index| match self.take(index) {
            Ok(0) => None,
            Ok(bits) => Some(Ok((PageIndex::new(index * BITS), bits))),
            Err(stray) => Some(Err(stray)),
        })
    }

    fn word(&self, index: u64) -> &AtomicU64 {
        assert!(index < self.words(), "word {index} of {}", self.words());
        // SAFETY: in bounds of the mapping by the check above and aligned; mapped until
        // drop, and both processes touch it only with atomic operations. Any bit pattern
        // is a valid `u64`.
        unsafe { self.start.cast::<AtomicU64>().add(index as usize).as_ref() }
    }
}

// SAFETY: the mapping is owned, and its words are only used atomically.
unsafe impl Send for DirtyBitmap {}
// SAFETY: as above.
unsafe impl Sync for DirtyBitmap {}

impl Drop for DirtyBitmap {
    fn drop(&mut self) {
        let len = Self::file_bytes(self.pages) as usize;
        // SAFETY: the mapping was made by `map` with this length and ends here.
        let _ = unsafe { munmap(self.start, len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn bitmap(pages: u64) -> DirtyBitmap {
        DirtyBitmap::create(&MemoryLayout::flat(pages).unwrap()).unwrap()
    }

    fn other_side(bitmap: &DirtyBitmap) -> DirtyBitmap {
        let memfd = bitmap.memfd().try_clone_to_owned().unwrap();
        DirtyBitmap::from_fd(memfd, &MemoryLayout::flat(bitmap.pages()).unwrap()).unwrap()
    }

    fn taken(bitmap: &DirtyBitmap) -> BTreeSet<u64> {
        let words = bitmap.take_all().map(Result::unwrap);
        words
            .flat_map(|(first, bits)| {
                let set = (0..64).filter(move |bit| bits >> bit & 1 != 0);
                set.map(move |bit| first.get() + bit)
            })
            .collect()
    }

    #[test]
    fn what_one_side_sets_the_other_takes_once() {
        let vmm = bitmap(130);
        let server = other_side(&vmm);
        for page in [0, 63, 64, 129] {
            vmm.set(PageIndex::new(page));
        }
        assert_eq!(taken(&server), BTreeSet::from([0, 63, 64, 129]));
        assert_eq!(taken(&server), BTreeSet::new());
        vmm.set(PageIndex::new(5));
        assert_eq!(taken(&vmm), BTreeSet::from([5]));
    }

    proptest! {
        /// Against a set of numbers.
        #[test]
        fn folding_sets_the_runs_pages_and_no_others(
            first in 0u64..200,
            pages in 1u64..200,
            behind in 0u64..70,
            before: u64,
            bits: [u64; 4],
        ) {
            let bitmap = bitmap(first + pages + behind);
            let mut expected = BTreeSet::from([before % bitmap.pages()]);
            bitmap.set(PageIndex::new(before % bitmap.pages()));
            let set: Vec<u64> =
                (0..pages).filter(|i| bits[(i / 64) as usize] >> (i % 64) & 1 != 0).collect();
            let run = PageRun::new(PageIndex::new(first), pages).unwrap();
            prop_assert_eq!(bitmap.fold(run, &bits), set.len() as u64);
            expected.extend(set.iter().map(|i| first + i));
            prop_assert_eq!(taken(&bitmap), expected);
        }

        /// Against a set of numbers.
        #[test]
        fn setting_a_run_sets_its_pages_and_no_others(
            (first, count, after) in (0u64..200, 1u64..300, 0u64..70),
            before in proptest::collection::btree_set(0u64..200, 0..5),
        ) {
            let bitmap = bitmap((first + count + after).max(200));
            let mut expected = before;
            expected.iter().for_each(|&page| bitmap.set(PageIndex::new(page)));
            bitmap.set_run(PageRun::new(PageIndex::new(first), count).unwrap());
            expected.extend(first..first + count);
            prop_assert_eq!(taken(&bitmap), expected);
        }
    }

    #[test]
    fn no_bit_is_lost_between_a_side_that_sets_and_one_that_takes() {
        const PAGES: u64 = 1000;
        let vmm = bitmap(PAGES);
        let server = other_side(&vmm);
        // Each turn sets each page once; whoever takes counts. A lost bit is a page that
        // is neither taken nor there at the end of the turn.
        let mut seen = vec![0u32; PAGES as usize];
        for _ in 0..50 {
            let mut turn = BTreeSet::new();
            std::thread::scope(|scope| {
                let setter = scope.spawn(|| {
                    for page in 0..PAGES {
                        vmm.set(PageIndex::new(page));
                    }
                });
                while !setter.is_finished() {
                    turn.extend(taken(&server));
                }
            });
            turn.extend(taken(&server));
            turn.iter().for_each(|&page| seen[page as usize] += 1);
        }
        assert!(seen.iter().all(|&times| times == 50), "{seen:?}");
    }

    #[test]
    fn bits_beyond_the_end_are_refused() {
        let vmm = bitmap(130);
        let server = other_side(&vmm);
        vmm.word(2).fetch_or(1 << 2, Ordering::Relaxed);
        vmm.set(PageIndex::new(1));
        let words: Vec<_> = server.take_all().collect();
        assert_eq!(words, [Ok((PageIndex::new(0), 2)), Err(StrayBits { bits: 4 })]);
    }

    #[test]
    fn the_size_is_whole_words_in_whole_pages() {
        for (pages, bytes) in [(1, 4096), (32_768, 4096), (32_769, 8192), (1 << 32, 512 << 20)] {
            assert_eq!(DirtyBitmap::file_bytes(pages), bytes);
        }
        // The largest guest's is mapped, and costs nothing.
        let largest = bitmap(PAGES_MAX);
        largest.set(PageIndex::new(PAGES_MAX - 1));
        assert_eq!(largest.take((PAGES_MAX - 1) / 64), Ok(1 << 63));
    }

    #[test]
    fn a_file_that_could_change_its_size_or_has_another_one_is_refused() {
        let layout = MemoryLayout::flat(8).unwrap();
        let refused = |memfd| DirtyBitmap::from_fd(memfd, &layout).unwrap_err();
        let memfd = |bytes, seals| {
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            let memfd = memfd_create(c"x", flags).unwrap();
            nix::unistd::ftruncate(&memfd, bytes).unwrap();
            fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).unwrap();
            memfd
        };
        let both = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        assert!(matches!(refused(memfd(4096, SealFlag::F_SEAL_GROW)), DirtyBitmapError::NotSealed));
        let growing = memfd(4096, SealFlag::F_SEAL_SHRINK);
        assert!(matches!(refused(growing), DirtyBitmapError::NotSealed));
        let device = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(refused(device.into()), DirtyBitmapError::NotSealed));
        for bytes in [0, 8, 8192] {
            let wrong = refused(memfd(bytes, both));
            assert!(
                matches!(wrong, DirtyBitmapError::Size { actual, expected: 4096 }
                    if actual == bytes as u64),
                "{wrong}"
            );
        }
    }
}
