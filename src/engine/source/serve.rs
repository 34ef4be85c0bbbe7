//! The source's urgent lane: page requests in, pages out, answered inline.

use super::zero_scan::KnownZeros;
use crate::engine::lane::LaneError;
use crate::engine::lost_pages::LostPages;
use crate::failpoint::failpoint;
use crate::memory::guarded::{Guarded, Look};
use crate::memory::ram::{FrozenRun, GuestRam};
use crate::proto::frame::{FrameHeader, FrameLimits, HEADER_LEN, Origin, PageKind, PageRequest};
use crate::proto::ledger::{Claim, SourceLedger};
use crate::proto::page::{PageIndex, PageRun};
use crate::proto::prepaging::Fault;
use crate::report::latency::Latencies;
use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A fault as the pre-paging policy is told of it.
#[derive(Clone, Copy, Debug)]
pub enum FaultNote {
    /// The page was sent in answer.
    Network(Fault),
    /// The page was on its way already.
    Late(Fault),
}

/// Pages sent, by origin, and faults seen.
#[derive(Debug, Default)]
pub struct SourceFigures {
    /// Sent with the switchover.
    pub seeded: AtomicU64,
    /// Sent in answer to a fault.
    pub demanded: AtomicU64,
    /// Pushed by the policy.
    pub pushed: AtomicU64,
    /// Pushed by the final drain.
    pub drained: AtomicU64,
    /// Copied before the guest ran at the destination; those counted again that were copied
    /// again.
    pub copied: AtomicU64,
    /// Announced as zero.
    pub zero: AtomicU64,
    /// Announced as holes.
    pub hole: AtomicU64,
    /// Announced as lost.
    pub poisoned: AtomicU64,
    /// From reading a request until its page was handed to the link.
    pub served: Mutex<Latencies>,
}

/// What all threads of the source share.
#[derive(Debug)]
pub struct SourceShared {
    /// Which pages are unsent, claimed, sent.
    pub ledger: SourceLedger,
    /// The guest's memory; nobody writes to it once it is served.
    pub ram: Arc<GuestRam>,
    /// How it is looked at: pages of it may turn out to be lost.
    pub guarded: Guarded,
    /// Those that did.
    pub lost: LostPages,
    /// Pages that are zero, as far as is known.
    pub known: KnownZeros,
    /// Counters.
    pub figures: SourceFigures,
    /// Notes to the policy.
    pub notes: crossbeam_channel::Sender<FaultNote>,
    /// Wakes a push lane that has nothing to do.
    pub push_wake: tokio::sync::Notify,
    /// When the session began: the time base of faults.
    pub began: Instant,
}

impl SourceShared {
    /// Nothing is sent yet of `ram`; what the policy is to hear goes to `notes`.
    ///
    /// # Errors
    /// Memory cannot be read in a way that a lost page does not end the process.
    pub fn new(
        ram: Arc<GuestRam>,
        notes: crossbeam_channel::Sender<FaultNote>,
    ) -> std::io::Result<Self> {
        let pages = ram.layout().pages();
        Ok(Self {
            ledger: SourceLedger::new(pages),
            known: KnownZeros::new(ram.clone()).map_err(std::io::Error::other)?,
            ram,
            guarded: Guarded::new()?,
            lost: LostPages::default(),
            figures: SourceFigures::default(),
            notes,
            push_wake: tokio::sync::Notify::new(),
            began: Instant::now(),
        })
    }

    /// What a request of `epoch` is checked against.
    pub fn limits(&self, epoch: u32) -> FrameLimits {
        FrameLimits { pages: self.ram.layout().pages(), epoch, compressed: false }
    }

    fn content(&self, claim: &Claim) -> Bytes {
        // SAFETY: pages are framed only after the guest was paused, and if it is ever
        // resumed here, only after the lanes are closed. That nothing else writes meanwhile
        // is what a VMM promises to `SourceBuilder::new`; memory of another process is mapped
        // from files that it has promised to leave as they are.
        let run = unsafe { FrozenRun::new(self.ram.clone(), claim.run()) };
        Bytes::from_owner(run.expect("a claim lies in one segment"))
    }

    /// Sends claimed pages that lie in one segment: with content, or as lost where they
    /// cannot be read, in as many frames as that takes. `compress` is shown the content of each,
    /// and may return it compressed.
    pub async fn send(
        &self,
        stream: &mut SendStream,
        claim: Claim,
        origin: Origin,
        epoch: u32,
        mut compress: impl FnMut(&[u8]) -> Option<Bytes>,
    ) -> Result<(), LaneError> {
        let mut rest = Some(claim);
        while let Some(mut claim) = rest {
            let readable = self.guarded.readable(&self.ram, claim.run());
            if readable == 0 {
                rest = claim.split_off(self.unreadable(claim.run()));
                self.send_as(stream, claim, PageKind::Poison, origin, epoch).await?;
                continue;
            }
            rest = claim.split_off(readable);
            let content = self.content(&claim);
            let (header, content) = match compress(&content) {
                Some(block) => {
                    (FrameHeader::for_compressed(&claim, block.len(), origin, epoch), block)
                }
                None => (FrameHeader::for_claim(&claim, PageKind::Raw, origin, epoch), content),
            };
            self.send_frame(stream, claim, header, content).await?;
        }
        Ok(())
    }

    /// How many pages of `run`, whose first one cannot be read, cannot be.
    fn unreadable(&self, run: PageRun) -> u64 {
        let pages = run.pages().skip(1).map(PageRun::single);
        let lost = pages.take_while(|page| self.guarded.readable(&self.ram, *page) == 0);
        1 + lost.count() as u64
    }

    /// Announces the claimed pages in one frame, without content.
    pub async fn send_as(
        &self,
        stream: &mut SendStream,
        claim: Claim,
        kind: PageKind,
        origin: Origin,
        epoch: u32,
    ) -> Result<(), LaneError> {
        if kind == PageKind::Poison {
            self.lost.note(claim.run(), self.ram.layout());
        }
        let header = FrameHeader::for_claim(&claim, kind, origin, epoch);
        self.send_frame(stream, claim, header, Bytes::new()).await
    }

    async fn send_frame(
        &self,
        stream: &mut SendStream,
        claim: Claim,
        header: FrameHeader,
        content: Bytes,
    ) -> Result<(), LaneError> {
        let (kind, origin) = (header.kind, header.origin);
        let mut frame = [Bytes::copy_from_slice(&header.encode()), content];
        stream.write_all_chunks(&mut frame).await.map_err(LaneError::lost)?;
        match (origin, kind) {
            (Origin::Seed, _) => failpoint!("source::after_seed_sent"),
            (Origin::Demand, _) => failpoint!("source::after_demand_sent"),
            (_, PageKind::Zero | PageKind::Hole) => {
                failpoint!("source::after_zeros_sent");
            }
            _ => failpoint!("source::after_push_sent"),
        }
        self.sent(claim, kind, origin);
        Ok(())
    }

    /// Sends the claimed pages with this content, which is nobody else's: the guest may change
    /// them meanwhile.
    pub async fn send_copy(
        &self,
        stream: &mut SendStream,
        claim: Claim,
        content: Bytes,
        epoch: u32,
    ) -> Result<(), LaneError> {
        let kind = if content.is_empty() { PageKind::Zero } else { PageKind::Raw };
        let header = FrameHeader::for_claim(&claim, kind, Origin::Copy, epoch);
        let mut frame = [Bytes::copy_from_slice(&header.encode()), content];
        stream.write_all_chunks(&mut frame).await.map_err(LaneError::lost)?;
        failpoint!("source::after_copy_sent");
        self.sent(claim, kind, Origin::Copy);
        Ok(())
    }

    /// Counts the claimed pages as sent.
    fn sent(&self, claim: Claim, kind: PageKind, origin: Origin) {
        let pages = claim.run().count();
        let counter = match (kind, origin) {
            (_, Origin::Copy) => &self.figures.copied,
            (PageKind::Zero, _) => &self.figures.zero,
            (PageKind::Hole, _) => &self.figures.hole,
            (PageKind::Poison, _) => &self.figures.poisoned,
            (_, Origin::Seed) => &self.figures.seeded,
            (_, Origin::Demand) => &self.figures.demanded,
            (_, Origin::Push) => &self.figures.pushed,
            (_, Origin::Drain) => &self.figures.drained,
        };
        counter.fetch_add(pages, Ordering::Relaxed);
        claim.sent();
    }
}

/// Answers the page requests of one demand stream until the link is gone.
pub async fn answer_requests(
    shared: &SourceShared,
    epoch: u32,
    requests: &mut RecvStream,
    pages: &mut SendStream,
) -> Result<(), LaneError> {
    let limits = shared.limits(epoch);
    let mut bytes = [0; HEADER_LEN];
    loop {
        requests.read_exact(&mut bytes).await.map_err(LaneError::lost)?;
        let read = Instant::now();
        let request = PageRequest::parse(&bytes, limits)?;
        let sent = send_pages(shared, epoch, pages, request.run, Origin::Demand).await?;
        if sent {
            let served = &shared.figures.served;
            served.lock().unwrap_or_else(PoisonError::into_inner).record(read.elapsed());
        }
        note(shared, &request, request.run.first(), sent);
    }
}

/// Sends those pages of `run` that are not on their way already; tells whether any was sent now.
pub async fn send_pages(
    shared: &SourceShared,
    epoch: u32,
    stream: &mut SendStream,
    run: PageRun,
    origin: Origin,
) -> Result<bool, LaneError> {
    let behind = |end: u64| PageRun::new(PageIndex::new(end), run.end().saturating_sub(end));
    let (mut sent, mut rest) = (false, Some(run));
    while let Some(left) = rest {
        failpoint!(
            origin == Origin::Seed => "source::before_seed_claimed",
            "source::before_demand_claimed",
            return Err(broken())
        );
        // Pages are sent from where they lie, so a frame's must lie in one piece.
        let (_, here) = shared.ram.first_part(left);
        let Some(claim) = shared.ledger.claim_within(here) else {
            rest = behind(here.end());
            continue;
        };
        failpoint!(
            origin == Origin::Seed => "source::after_seed_claimed",
            "source::after_demand_claimed",
            return Err(broken())
        );
        rest = behind(claim.run().end());
        send_claimed(shared, epoch, stream, claim, origin).await?;
        sent = true;
    }
    Ok(sent)
}

/// Sends claimed pages that lie in one segment, each in the way that is known for it.
async fn send_claimed(
    shared: &SourceShared,
    epoch: u32,
    stream: &mut SendStream,
    claim: Claim,
    origin: Origin,
) -> Result<(), LaneError> {
    let mut rest = Some(claim);
    while let Some(mut claim) = rest {
        let (part, kind) = shared.known.first_part(claim.run());
        rest = claim.split_off(part.count().min(claim.run().count()));
        let kind = match kind {
            // For one page it is worth a look.
            PageKind::Raw if claim.run().count() == 1 => {
                match shared.guarded.look(&shared.ram, claim.run().first()) {
                    Look::Zero => PageKind::Zero,
                    Look::Data | Look::Unreadable => PageKind::Raw,
                }
            }
            kind => kind,
        };
        match kind {
            // Somebody waits for it, or will at once: it is not worth a delay.
            PageKind::Raw => shared.send(stream, claim, origin, epoch, |_| None).await?,
            kind => shared.send_as(stream, claim, kind, origin, epoch).await?,
        }
    }
    Ok(())
}

#[cfg(feature = "failpoints")]
fn broken() -> LaneError {
    LaneError::Link("a failpoint".into())
}

fn note(shared: &SourceShared, request: &PageRequest, page: PageIndex, sent: bool) {
    let vcpu = request.vcpu.map(u32::from);
    let fault = Fault { page, vcpu, at: shared.began.elapsed() };
    // The channel is bounded: a policy that does not keep up misses hints, not pages.
    let note = if sent { FaultNote::Network(fault) } else { FaultNote::Late(fault) };
    // Nor is an idle one woken: it has nothing left to push, whatever faults.
    let _ = shared.notes.try_send(note);
}
