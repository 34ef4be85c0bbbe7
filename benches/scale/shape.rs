//! Guests of many sizes: what their memory holds, and whether it does.

use anyhow::{Context, ensure};
use postcopy::memory::ram::GuestRam;
use postcopy::program::units::parse_memory;
use postcopy::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use postcopy::vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;

/// Pages in 2 MiB.
const BLOCK: u64 = 512;
/// Data pages in each block of a sparse guest: the first two.
const SPARSE: u64 = 2;

/// How much memory, and how much of it is data: the other pages were never touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Pages of guest memory, whole blocks.
    pub pages: u64,
    /// Data pages at the beginning of each block.
    in_block: u64,
}

impl Shape {
    /// Pages that are not holes.
    pub fn data_pages(&self) -> u64 {
        self.pages / BLOCK * self.in_block
    }

    /// The data page with this number.
    pub fn data_page(&self, number: u64) -> u64 {
        number / self.in_block * BLOCK + number % self.in_block
    }

    /// Whether most of it is holes: such a guest may be larger than the host's memory.
    pub fn is_sparse(&self) -> bool {
        self.in_block < BLOCK
    }

    /// The memory of such a guest, in one file, without its data.
    pub fn memory(&self) -> anyhow::Result<GuestMemoryMmap> {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = File::from(nix::sys::memfd::memfd_create(c"scale", flags)?);
        let bytes = self.pages * PAGE_SIZE as u64;
        file.set_len(bytes)?;
        let file = Some(FileOffset::new(file, 0));
        let region = GuestRegionMmap::from_range(GuestAddress(0), bytes as usize, file)
            .context("guest memory cannot be mapped")?;
        Ok(GuestMemoryMmap::from_regions(vec![region])?)
    }

    /// Writes all data.
    pub fn fill(&self, memory: &GuestMemoryMmap) -> anyhow::Result<()> {
        for page in (0..self.data_pages()).map(|number| self.data_page(number)) {
            memory.write_slice(&content(page), GuestAddress(page * PAGE_SIZE as u64))?;
        }
        Ok(())
    }

    /// Compares every data page, and that no hole was filled.
    pub fn check(&self, ram: &GuestRam) -> anyhow::Result<()> {
        ensure!(ram.layout().pages() == self.pages, "{} pages", ram.layout().pages());
        let mut found = [0; PAGE_SIZE];
        for page in (0..self.data_pages()).map(|number| self.data_page(number)) {
            ram.read_run(PageRun::single(PageIndex::new(page)), &mut found);
            ensure!(found == content(page), "page {page} is not what it was");
        }
        let file = ram.memfd().context("guest memory is no file")?;
        let blocks = File::from(file.try_clone_to_owned()?).metadata()?.blocks();
        let allocated = blocks * 512 / PAGE_SIZE as u64;
        let data = self.data_pages();
        ensure!(allocated == data, "{allocated} pages are there, {data} of them data");
        Ok(())
    }
}

/// Nothing in it repeats within a page or from one page to the next.
fn content(page: u64) -> [u8; PAGE_SIZE] {
    let mut content = [0; PAGE_SIZE];
    let words = content.as_chunks_mut::<8>().0;
    for (number, word) in (page * 512 + 1..).zip(words) {
        let mixed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        *word = (mixed ^ (mixed >> 29)).to_le_bytes();
    }
    content
}

/// The first word of a data page.
pub fn first_word(page: u64) -> u64 {
    u64::from_le_bytes(*content(page).first_chunk().expect("a page has a word"))
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (size, in_block) = match text.strip_suffix(":sparse") {
            Some(size) => (size, SPARSE),
            None => (text, BLOCK),
        };
        let pages = parse_memory(size)? / PAGE_SIZE as u64;
        if pages == 0 || !pages.is_multiple_of(BLOCK) {
            return Err(format!("{size} is no multiple of 2 MiB"));
        }
        Ok(Self { pages, in_block })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sparse = if self.is_sparse() { ":sparse" } else { "" };
        write!(f, "{}MiB{sparse}", (self.pages * PAGE_SIZE as u64) >> 20)
    }
}
