//! The source's urgent lane: page requests in, pages out, answered inline.

use super::zero_scan::KnownZeros;
use crate::engine::lane::LaneError;
use crate::failpoint::failpoint;
use crate::memory::ram::{FrozenRun, GuestRam};
use crate::memory::scan::is_zero;
use crate::proto::frame::{FrameHeader, FrameLimits, HEADER_LEN, Origin, PageKind, PageRequest};
use crate::proto::ledger::{Claim, SourceLedger};
use crate::proto::page::PageIndex;
use crate::proto::prepaging::Fault;
use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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
    /// Announced as zero.
    pub zero: AtomicU64,
    /// Announced as holes.
    pub hole: AtomicU64,
}

/// What all threads of the source share.
#[derive(Debug)]
pub struct SourceShared {
    /// Which pages are unsent, claimed, sent.
    pub ledger: SourceLedger,
    /// The guest's memory; nobody writes to it once it is served.
    pub ram: Arc<GuestRam>,
    /// Pages that are zero, as far as the scan has come.
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
    /// What a frame or request of `epoch` is checked against.
    pub fn limits(&self, epoch: u32) -> FrameLimits {
        FrameLimits { pages: self.ram.layout().pages(), epoch }
    }

    /// The claimed pages as a frame: header and content.
    pub fn frame(&self, claim: &Claim, kind: PageKind, origin: Origin, epoch: u32) -> [Bytes; 2] {
        let header = FrameHeader::for_claim(claim, kind, origin, epoch);
        let content = if kind == PageKind::Raw { self.content(claim) } else { Bytes::new() };
        [Bytes::copy_from_slice(&header.encode()), content]
    }

    fn content(&self, claim: &Claim) -> Bytes {
        // SAFETY: pages are framed only after the guest was paused, and if it is ever
        // resumed here, only after the lanes are closed. That nothing else writes meanwhile
        // is what a VMM promises to `SourceBuilder::new`; memory of another process is mapped
        // from files that it has promised to leave as they are.
        let run = unsafe { FrozenRun::new(self.ram.clone(), claim.run()) };
        Bytes::from_owner(run.expect("a claim lies in one segment"))
    }

    /// Counts the claimed pages as sent.
    pub fn sent(&self, claim: Claim, kind: PageKind, origin: Origin) {
        let pages = claim.run().count();
        let counter = match (kind, origin) {
            (PageKind::Zero, _) => &self.figures.zero,
            (PageKind::Hole, _) => &self.figures.hole,
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
        let request = PageRequest::parse(&bytes, limits)?;
        for page in request.run.pages() {
            let sent = send_page(shared, epoch, pages, page, Origin::Demand).await?;
            note(shared, &request, page, sent);
        }
    }
}

/// Sends one page unless it is on its way already; tells whether it was sent now.
pub async fn send_page(
    shared: &SourceShared,
    epoch: u32,
    stream: &mut SendStream,
    page: PageIndex,
    origin: Origin,
) -> Result<bool, LaneError> {
    failpoint!(
        origin == Origin::Seed => "source::before_seed_claimed",
        "source::before_demand_claimed",
        return Err(broken())
    );
    let Some(claim) = shared.ledger.claim(page) else { return Ok(false) };
    failpoint!(
        origin == Origin::Seed => "source::after_seed_claimed",
        "source::after_demand_claimed",
        return Err(broken())
    );
    let mut frame = shared.frame(&claim, PageKind::Raw, origin, epoch);
    let mut kind = PageKind::Raw;
    if is_zero(&frame[1]) {
        kind = PageKind::Zero;
        frame = shared.frame(&claim, kind, origin, epoch);
    }
    stream.write_all_chunks(&mut frame).await.map_err(LaneError::lost)?;
    failpoint!(
        origin == Origin::Seed => "source::after_seed_sent",
        "source::after_demand_sent",
        return Err(broken())
    );
    shared.sent(claim, kind, origin);
    Ok(true)
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
    let _ = shared.notes.try_send(note);
    shared.push_wake.notify_one();
}
