//! Memory whose missing pages are trapped, and a thread that touches them: a guest without a
//! migration.

use crate::memory::ram::{Backing, GuestRam};
use crate::proto::layout::MemoryLayout;
use crate::proto::page::PageIndex;
use crate::uffd::{DestinationBacking, Placer, Trap, UffdOptions, register};
use std::sync::Arc;

/// Anonymous memory under userfaultfd; with it goes the trap.
pub struct Trapped {
    ram: Arc<GuestRam>,
    pub trap: Trap,
    pub placer: Placer,
}

impl Trapped {
    pub fn new(pages: u64) -> anyhow::Result<Self> {
        let ram = Arc::new(GuestRam::new(MemoryLayout::flat(pages)?, Backing::Anonymous)?);
        let (backing, options) = (DestinationBacking::Anonymous, UffdOptions::for_process());
        // SAFETY: the memory is new, and nothing holds a reference into it: `touch` reads it
        // through a raw pointer.
        let (trap, placer) = unsafe { register(ram.clone(), backing, options) }?;
        Ok(Self { ram, trap, placer })
    }

    /// Reads a page's first byte as a guest does. It waits until somebody else places the page.
    pub fn touch(&self, page: u64) -> u8 {
        // SAFETY: the page is in the layout and mapped for as long as `self` is there, and is
        // read without a reference.
        unsafe { self.ram.page_ptr(PageIndex::new(page)).as_ptr().read_volatile() }
    }
}
