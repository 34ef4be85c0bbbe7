//! Placing pages in memory of huge pages, which the kernel maps as a whole.
//!
//! Pages come one by one. Each is written through a second mapping of the same files, which is
//! not trapped, and counted; with the last one of a huge page that is mapped where the guest is
//! trapped, and who waits in it is woken. Until then nobody sees anything of it. hugetlbfs has no
//! `write`, and neither `UFFDIO_COPY` nor `UFFDIO_ZEROPAGE` of less than all of it: a page of zeros
//! is one that is left as it is, for the huge pages are fresh from the pool.

use super::content::Content;
use super::place::{PlaceError, Placed, Placer, Stop};
use super::register::{DestinationBacking, RegisterError};
use crate::memory::guarded::Guarded;
use crate::memory::huge::BLOCK_PAGES;
use crate::memory::hugetlb::{self, blocks_of};
use crate::memory::ram::GuestRam;
use crate::proto::bitmap::AtomicBitmap;
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use nix::errno::Errno;
use std::sync::atomic::{AtomicU32, Ordering};

/// The huge pages of a registration: which small pages are in which.
pub(super) struct Blocks {
    /// The same memory, not trapped.
    alias: GuestRam,
    guarded: Guarded,
    /// Small pages that are in. A bit is set, and cleared, together with the count below.
    here: AtomicBitmap,
    /// How many small pages of each block are not in.
    missing: Box<[AtomicU32]>,
    /// A bit for each block that has a page that is lost: it is never mapped.
    lost: AtomicBitmap,
    /// A bit for each block that is mapped, or poisoned: nobody waits there any more.
    open: AtomicBitmap,
}

impl std::fmt::Debug for Blocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blocks").field("open", &self.open.count_set()).finish_non_exhaustive()
    }
}

impl Blocks {
    /// Those of `ram`, which is all of huge pages, with nothing in them.
    pub(super) fn new(ram: &GuestRam) -> Result<Self, RegisterError> {
        let pages = ram.layout().pages();
        let blocks = pages.div_ceil(BLOCK_PAGES);
        let alias = ram.alias().ok_or(RegisterError::OtherBacking(DestinationBacking::Hugetlb))?;
        let guarded = Guarded::new().map_err(RegisterError::Guard)?;
        Ok(Self {
            alias: alias.map_err(RegisterError::Alias)?,
            guarded,
            here: AtomicBitmap::new(pages),
            missing: (0..blocks).map(|_| AtomicU32::new(BLOCK_PAGES as u32)).collect(),
            lost: AtomicBitmap::new(blocks),
            open: AtomicBitmap::new(blocks),
        })
    }

    /// Puts content into pages of one block.
    fn write(&self, part: PageRun, content: Content<'_>) -> Result<(), Errno> {
        let mut offset = 0;
        for piece in content.pieces() {
            // Memory that was reserved is there, unless somebody has punched a hole since.
            if !self.guarded.write(&self.alias, part.first(), offset, piece) {
                return Err(Errno::ENOSPC);
            }
            offset += piece.len();
        }
        Ok(())
    }

    /// The pages of `part`, all of one block, are in; whether the block is whole. Of any threads
    /// that put pages, exactly one that put some is told so, and sees what all have written.
    fn put(&self, part: PageRun) -> bool {
        let new = self.here.set_run(part) as u32;
        self.missing[index(part)].fetch_sub(new, Ordering::AcqRel) == new
    }

    /// They are not, after all. By whoever has just put them.
    fn take_back(&self, part: PageRun) {
        let gone = self.here.clear_run(part) as u32;
        self.missing[index(part)].fetch_add(gone, Ordering::AcqRel);
    }

    fn is_whole(&self, block: PageRun) -> bool {
        self.missing[index(block)].load(Ordering::Acquire) == 0
    }

    fn is_lost(&self, block: PageRun) -> bool {
        self.lost.is_set(bit(block))
    }

    /// Whether nobody waits in `block`: it is mapped, or lost.
    pub(super) fn is_open(&self, block: PageRun) -> bool {
        self.open.is_set(bit(block))
    }
}

/// The number of the block that a run begins in.
fn index(run: PageRun) -> usize {
    (run.first().get() / BLOCK_PAGES) as usize
}

fn bit(run: PageRun) -> PageIndex {
    PageIndex::new(index(run) as u64)
}

/// `run`, split where one block ends and another begins.
fn parts(run: PageRun) -> impl Iterator<Item = PageRun> {
    blocks_of(run).filter_map(move |block| {
        let first = block.first().max(run.first());
        PageRun::new(first, block.end().min(run.end()) - first.get())
    })
}

/// The block that a page, or a run inside it, is in.
fn block_of(run: PageRun) -> PageRun {
    blocks_of(run).next().unwrap_or(run)
}

impl Placer {
    /// The pages that the kernel maps, and wakes, together with `page`: a fault on any of them is
    /// reported, and ends, as one on all.
    pub fn unit_of(&self, page: PageIndex) -> PageRun {
        match self.blocks() {
            Some(_) => block_of(PageRun::single(page)),
            None => PageRun::single(page),
        }
    }

    /// Those of the pages of `run`, which were placed, at which nobody waits any more; with huge
    /// pages all pages of those that are mapped.
    pub fn opened(&self, run: PageRun) -> impl Iterator<Item = PageRun> {
        let blocks = self.blocks();
        let small = blocks.is_none().then_some(run);
        let open =
            move |of: &'_ Blocks| blocks_of(run).filter(|block| of.is_open(*block)).collect();
        let huge: Vec<PageRun> = blocks.map_or_else(Vec::new, open);
        small.into_iter().chain(huge)
    }

    /// The guest has given back the pages of `run`, and the kernel what was mapped there. To be
    /// called when [`TrapEvent::Removed`](super::TrapEvent::Removed) is read.
    pub fn removed(&self, run: PageRun) {
        let Some(blocks) = self.blocks() else { return };
        // Of a part of a huge page nothing is unmapped: the kernel clears it where it is.
        for block in parts(run).filter(|part| part.count() == BLOCK_PAGES) {
            blocks.open.clear_run(PageRun::single(bit(block)));
            blocks.take_back(block);
        }
    }

    /// [`place`](Self::place) and [`place_zero`](Self::place_zero), whose content is none.
    pub(super) fn place_in_blocks(
        &self,
        blocks: &Blocks,
        run: PageRun,
        content: Option<Content<'_>>,
    ) -> Result<Placed, PlaceError> {
        self.in_blocks(run, |part, done| {
            if let Some(content) = content {
                let content = content.behind(done).up_to(part.bytes());
                blocks.write(part, content).map_err(|source| PlaceError {
                    operation: "writing to a huge page",
                    run: part,
                    placed: 0,
                    source,
                })?;
            }
            let block = block_of(part);
            if !blocks.put(part) || blocks.is_lost(block) {
                return Ok(Placed { pages: part.count(), stop: None });
            }
            let opened = self.open_block(blocks, block);
            if let Ok(Placed { stop: None, .. }) = opened {
                return Ok(Placed { pages: part.count(), stop: None });
            }
            // All other pages stay in; these are put in again, by whoever has them in hand.
            blocks.take_back(part);
            opened.map(|opened| Placed { pages: 0, ..opened })
        })
    }

    /// Gives up the blocks that pages of `run` are in.
    pub(super) fn poison_blocks(
        &self,
        blocks: &Blocks,
        run: PageRun,
        poison: impl Fn(PageRun) -> Result<Placed, PlaceError>,
    ) -> Result<Placed, PlaceError> {
        self.in_blocks(run, |part, _| {
            let block = block_of(part);
            // First, so that nobody maps it who puts its last page in.
            blocks.lost.set(bit(block));
            if !blocks.is_open(block) {
                match poison(block)? {
                    // By another lane, for another page of it.
                    Placed { stop: None | Some(Stop::Exists), .. } => {}
                    again => return Ok(Placed { pages: 0, ..again }),
                }
                blocks.open.set(bit(block));
            }
            blocks.put(part);
            Ok(Placed { pages: part.count(), stop: None })
        })
    }

    /// Maps what is whole of the blocks of `run`.
    pub(super) fn open_again(&self, blocks: &Blocks, run: PageRun) -> Result<(), PlaceError> {
        for block in blocks_of(run).filter(|of| blocks.is_whole(*of) && !blocks.is_lost(*of)) {
            // Where it cannot be done now, whoever waits looks again.
            let _ = self.open_block(blocks, block)?;
        }
        Ok(())
    }

    /// Maps a block that is whole, and wakes who waits in it. All of it is placed, or nothing.
    fn open_block(&self, blocks: &Blocks, block: PageRun) -> Result<Placed, PlaceError> {
        let mut mapped = self.map(block);
        if let Err(PlaceError { source: Errno::EFAULT, .. }) = mapped {
            // The guest had given back all of it: what it has instead is zero.
            hugetlb::make(&blocks.alias, block).map_err(|source| PlaceError {
                operation: "fallocate",
                run: block,
                placed: 0,
                source,
            })?;
            mapped = self.map(block);
        }
        match mapped? {
            Placed { stop: Some(Stop::Again), .. } => {
                return Ok(Placed { pages: 0, stop: Some(Stop::Again) });
            }
            Placed { stop: Some(Stop::Exists), .. } => self.wake_unplaced(block)?,
            Placed { stop: None, .. } => {}
        }
        blocks.open.set(bit(block));
        Ok(Placed { pages: block.count(), stop: None })
    }

    /// Does something for the part of `run` in each block, with the bytes of the run before it, until
    /// one stops. An error behind the first part is one of the next attempt's.
    fn in_blocks(
        &self,
        run: PageRun,
        mut attempt: impl FnMut(PageRun, usize) -> Result<Placed, PlaceError>,
    ) -> Result<Placed, PlaceError> {
        let mut placed = Placed { pages: 0, stop: None };
        for part in parts(run) {
            let done = part.first().as_usize() - run.first().as_usize();
            match attempt(part, done * PAGE_SIZE) {
                Ok(of_part) => {
                    placed.pages += of_part.pages;
                    placed.stop = of_part.stop;
                }
                // What is placed must not be handed back with the rest.
                Err(_) if placed.pages > 0 => placed.stop = Some(Stop::Again),
                Err(error) => return Err(error),
            }
            if placed.stop.is_some() {
                break;
            }
        }
        Ok(placed)
    }
}
