//! Copying pages while the guest runs, or before its state leaves: what the push lanes do
//! until the switchover.
//!
//! A round goes once through all pages, in rising order, all lanes together, and sends those
//! that are unsent and were not written since it began. The content is taken out first: the
//! guest may change it while it is being encrypted. If that tears it, the page is among those
//! that were written, and is sent again.

use super::push::{PushShared, frame_bytes};
use crate::engine::lane::LaneError;
use crate::failpoint::failpoint;
use crate::memory::dirty_bitmap::DirtyBitmap;
use crate::proto::frame::{HEADER_LEN, Origin, PageKind};
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use bytes::Bytes;
use quinn::SendStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::Notify;

/// How far a round is.
#[derive(Debug, Default)]
pub struct Round {
    /// The guest has left, or there never was to be a round: lanes push what the policy says.
    over: AtomicBool,
    /// A round goes on.
    on: AtomicBool,
    /// The next page to look at.
    next: AtomicU64,
    /// Lanes that take pages on, or have some.
    lanes: AtomicUsize,
    /// Which pages were written, if somebody remembers.
    written: OnceLock<Arc<DirtyBitmap>>,
    /// Told by a lane that finds nothing more to send.
    pub idle: Notify,
}

impl Round {
    /// From now on these pages are told to be written: the log begins once in a migration.
    pub fn log(&self, written: Arc<DirtyBitmap>) {
        let first = self.written.set(written);
        debug_assert!(first.is_ok(), "a second log");
    }

    /// What is told to be written, if anything is.
    pub fn written(&self) -> Option<&DirtyBitmap> {
        self.written.get().map(Arc::as_ref)
    }

    /// Begins a round.
    pub fn begin(&self) {
        self.next.store(0, Ordering::SeqCst);
        self.on.store(true, Ordering::SeqCst);
    }

    /// There are no rounds any more: lanes push what the policy says.
    pub fn give_way(&self) {
        self.end();
        self.over.store(true, Ordering::SeqCst);
    }

    /// Whether there are none any more.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// No more pages of it are claimed.
    pub fn end(&self) {
        self.on.store(false, Ordering::SeqCst);
    }

    /// Counts a lane, before it looks for pages, until it has sent what it has taken on.
    fn enter(&self) -> InHand<'_> {
        self.lanes.fetch_add(1, Ordering::SeqCst);
        InHand(self)
    }

    /// Whether all lanes have gone through so many pages, or through as many as they were to, and
    /// have none in hand. Lanes are looked at last: one that comes later finds no page.
    fn is_through(&self, pages: u64) -> bool {
        let through = self.next.load(Ordering::SeqCst) >= pages || !self.is_on();
        through && self.lanes.load(Ordering::SeqCst) == 0
    }

    /// Whether it goes on.
    fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }
}

/// A lane that may have pages in hand.
#[derive(Debug)]
struct InHand<'a>(&'a Round);

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        self.0.lanes.fetch_sub(1, Ordering::SeqCst);
    }
}

impl PushShared {
    /// Whether the round's pages have all been sent, or as many as were to be.
    pub fn has_copied(&self) -> bool {
        self.round.is_through(self.source.ledger.pages())
    }

    /// Sends the next pages of the round; returns the bytes that they took, `None` if there are
    /// no more.
    pub(super) async fn copy(
        &self,
        stream: &mut SendStream,
        pages_max: u64,
        epoch: u32,
    ) -> Result<Option<u64>, LaneError> {
        let _in_hand = self.round.enter();
        let Some(run) = self.next_run(pages_max) else { return Ok(None) };
        let mut bytes = 0;
        let mut rest = Some(run);
        while let Some(run) = rest {
            let (_, part) = self.source.ram.first_part(run);
            let (part, kind) = self.source.known.first_part_now(part);
            // A hole may go on behind what this lane has taken on: the others need not go there.
            self.round.next.fetch_max(part.end(), Ordering::SeqCst);
            bytes += self.copy_part(stream, part, kind, epoch).await?;
            let left = run.end().saturating_sub(part.end());
            rest = PageRun::new(PageIndex::new(part.end()), left);
        }
        Ok(Some(bytes))
    }

    /// The next pages that no other lane goes through, beginning with one that is to be sent.
    fn next_run(&self, pages_max: u64) -> Option<PageRun> {
        let (round, ledger) = (&self.round, &self.source.ledger);
        let mut from = round.next.load(Ordering::SeqCst);
        loop {
            if !round.is_on() || from >= ledger.pages() {
                return None;
            }
            let first = ledger.next_unsent(PageIndex::new(from));
            let first = first.map_or(ledger.pages(), PageIndex::get);
            let end = (first + pages_max).min(ledger.pages());
            let swap = round.next.compare_exchange(from, end, Ordering::SeqCst, Ordering::SeqCst);
            match swap {
                Ok(_) => return PageRun::new(PageIndex::new(first), end - first),
                Err(now) => from = now,
            }
        }
    }

    /// Sends what is unsent and unwritten of `part`, which is all holes or has none.
    async fn copy_part(
        &self,
        stream: &mut SendStream,
        part: PageRun,
        kind: PageKind,
        epoch: u32,
    ) -> Result<u64, LaneError> {
        let mut bytes = 0;
        let written = self.round.written();
        let is_written = |page: &PageIndex| written.is_some_and(|of| of.contains(*page));
        let mut pages = part.pages().peekable();
        while let Some(first) = pages.next() {
            if is_written(&first) {
                continue;
            }
            let mut count = 1;
            while pages.next_if(|page| !is_written(page)).is_some() {
                count += 1;
            }
            let Some(run) = PageRun::new(first, count) else { continue };
            while let Some(mut claim) = self.source.ledger.claim_within(run) {
                failpoint!("source::after_copy_claimed", return Err(super::push::broken()));
                if kind != PageKind::Raw {
                    bytes += frame_bytes(claim.run(), kind);
                    self.source.send_as(stream, claim, kind, Origin::Copy, epoch).await?;
                    continue;
                }
                let readable = self.source.guarded.readable(&self.source.ram, claim.run());
                if readable == 0 {
                    // It stays unsent, and is told to be lost after the switchover.
                    break;
                }
                let behind = claim.split_off(readable);
                drop(behind);
                let mut content = vec![0; claim.run().bytes()];
                self.source.ram.read_run(claim.run(), &mut content);
                let mut content = Bytes::from(content);
                let mut left = Some(claim);
                while let Some(mut claim) = left {
                    let (zero, pages) = alike(&content);
                    left = claim.split_off(pages);
                    let here = content.split_to(pages as usize * PAGE_SIZE);
                    let here = if zero { Bytes::new() } else { here };
                    bytes += (HEADER_LEN + here.len()) as u64;
                    self.source.send_copy(stream, claim, here, epoch).await?;
                }
            }
        }
        Ok(bytes)
    }
}

/// Whether the first page is zero, and how many pages from it on are as it is.
fn alike(content: &[u8]) -> (bool, u64) {
    let zero = |page: &[u8]| page.chunks_exact(16).all(|part| part == [0; 16]);
    let first = zero(&content[..PAGE_SIZE]);
    let same = content.chunks_exact(PAGE_SIZE).take_while(|page| zero(page) == first);
    (first, same.count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lane that had taken the last pages on, and not claimed them yet, was overlooked: they came
    /// when the destination had been told that there were no more.
    #[test]
    fn a_round_goes_on_until_no_lane_has_pages_in_hand() {
        for cut in [false, true] {
            let round = Round::default();
            round.begin();
            let (one, other) = (round.enter(), round.enter());
            assert!(!round.is_through(512));
            if cut {
                round.end();
            } else {
                round.next.store(512, Ordering::SeqCst);
            }
            drop(one);
            assert!(!round.is_through(512), "the other one's are on their way");
            drop(other);
            assert!(round.is_through(512));
        }
    }
}
