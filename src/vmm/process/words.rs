//! [`GuestWords`]: guest memory as the process guest's vCPUs see it.

use crate::memory::ram::GuestRam;
use crate::proto::page::PageIndex;
use crate::vmm::content::WORDS;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Guest memory as an array of 64-bit words.
///
/// The words are atomics because others look at the same memory meanwhile: the VMM
/// at the control pages, the migration engine at all of it through another mapping.
/// A thread that touches a page which userfaultfd knows to be missing waits there.
#[derive(Debug)]
pub(super) struct GuestWords {
    ram: Arc<GuestRam>,
    pages: u64,
}

impl GuestWords {
    pub(super) fn new(ram: Arc<GuestRam>) -> Self {
        let pages = ram.layout().pages();
        Self { ram, pages }
    }

    /// Word `index` of `page`.
    ///
    /// # Panics
    /// If there is no such page or word.
    #[inline]
    pub(super) fn word(&self, page: PageIndex, index: usize) -> &AtomicU64 {
        assert!(page.get() < self.pages && index < WORDS, "{page} has no word {index}");
        let start = self.ram.page_ptr(page).cast::<AtomicU64>();
        // SAFETY: a page has `WORDS` words and lies at a page boundary of a mapping that lives
        // as long as `self.ram`, so the word is inside and aligned.
        // Everything that touches guest memory while vCPUs run does so by whole aligned
        // words or only reads, so that each value is one that somebody stored.
        unsafe { start.add(index).as_ref() }
    }
}
