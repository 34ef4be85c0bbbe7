//! The source's push lanes: the pre-paging policy's suggestions, claimed late and
//! sent as page frames.

use super::copy::Round;
use super::serve::{FaultNote, SourceShared};
use super::shrink::Shrinker;
use crate::engine::lane::LaneError;
use crate::failpoint::failpoint;
use crate::proto::compression::Compression;
use crate::proto::frame::{HEADER_LEN, Origin, PageKind};
use crate::proto::pacing::Pacer;
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use crate::proto::prepaging::{self, LinkState, Policy, Suggestion};
use crate::proto::rate::RateLimit;
use crossbeam_channel::Receiver;
use quinn::{Connection, SendStream};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::time::MissedTickBehavior;

/// How long an idle lane sleeps at most before it asks the policy again.
const IDLE: Duration = Duration::from_millis(20);
/// How often the window is followed while a frame waits for room in it.
const WINDOW_EVERY: Duration = Duration::from_millis(2);

/// What the push lanes share beyond the source's common part.
#[derive(Debug)]
pub struct PushShared {
    /// The common part.
    pub source: Arc<SourceShared>,
    /// Decides what to push next.
    pub policy: Mutex<Box<dyn Policy>>,
    /// Decides how much may be outstanding.
    pub pacer: Mutex<Pacer>,
    /// Decides what is compressed.
    pub compression: Mutex<Compression>,
    /// Faults on their way to the policy.
    pub notes: Receiver<FaultNote>,
    /// Holes and zero pages found by the scan.
    pub zeros: Receiver<(PageRun, PageKind)>,
    /// Push lanes that share the window.
    pub lanes: u64,
    /// What is copied before the switchover.
    pub round: Round,
    /// How fast all lanes together may send.
    pub rate: Mutex<RateLimit>,
    /// Nothing is to be sent just now.
    pub held: AtomicBool,
}

/// Locks for a few instructions; figures and hints survive a panic elsewhere.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl PushShared {
    /// Copies and pushes on one lane until the link is gone. Never returns `Ok`.
    pub async fn push(
        &self,
        connection: &Connection,
        stream: &mut SendStream,
        epoch: u32,
        shrinker: &mut Shrinker,
    ) -> Result<(), LaneError> {
        let mut overhead = Overhead::default();
        let mut look_up = tokio::time::interval(WINDOW_EVERY);
        look_up.set_missed_tick_behavior(MissedTickBehavior::Delay);
        shrinker.idle(&self.compression);
        loop {
            let wait = lock(&self.rate).wait(self.source.began.elapsed());
            let held = self.held.load(Ordering::SeqCst);
            if held || !wait.is_zero() {
                if held {
                    shrinker.idle(&self.compression);
                }
                self.idle(connection, wait).await?;
                continue;
            }
            self.follow_window(connection);
            let sent = {
                let mut frame = pin!(self.send_one(stream, epoch, shrinker));
                // A frame may be far larger than the window of a moment, and would leave through
                // it bit by bit.
                loop {
                    tokio::select! {
                        biased;
                        sent = &mut frame => break sent?,
                        _ = look_up.tick() => self.follow_window(connection),
                    }
                }
            };
            let Some(bytes) = sent else {
                shrinker.idle(&self.compression);
                self.round.idle.notify_one();
                self.idle(connection, Duration::ZERO).await?;
                continue;
            };
            let mut rate = lock(&self.rate);
            if rate.bps().is_some() {
                let bytes = overhead.on_the_wire(bytes, connection);
                rate.sent(self.source.began.elapsed(), bytes);
            }
        }
    }

    fn follow_window(&self, connection: &Connection) {
        let window = lock(&self.pacer).window_bytes();
        connection.set_send_window((window / self.lanes).max(1));
    }

    /// Waits until `wait` is over; without one, until somebody says that there is something to do.
    /// Never for long: the link may end meanwhile.
    async fn idle(&self, connection: &Connection, wait: Duration) -> Result<(), LaneError> {
        if wait.is_zero() {
            let _ = tokio::time::timeout(IDLE, self.source.push_wake.notified()).await;
        } else {
            tokio::time::sleep(wait.min(IDLE)).await;
        }
        connection.close_reason().map_or(Ok(()), |error| Err(LaneError::lost(error)))
    }

    /// Sends what is next; returns the bytes that it took on the stream, `None` if there is nothing.
    async fn send_one(
        &self,
        stream: &mut SendStream,
        epoch: u32,
        shrinker: &mut Shrinker,
    ) -> Result<Option<u64>, LaneError> {
        if !self.round.is_over() {
            let pages_max = self.pages_max(lock(&self.pacer).run_pages());
            return self.copy(stream, u64::from(pages_max), epoch).await;
        }
        if let Ok((run, kind)) = self.zeros.try_recv() {
            return self.push_zeros(stream, run, kind, epoch).await.map(Some);
        }
        match self.suggestion() {
            Some(suggestion) => self.push_run(stream, suggestion, epoch, shrinker).await.map(Some),
            None => Ok(None),
        }
    }

    fn suggestion(&self) -> Option<Suggestion> {
        let mut policy = lock(&self.policy);
        for note in self.notes.try_iter() {
            match note {
                FaultNote::Network(fault) => policy.fault(fault),
                FaultNote::Late(fault) => policy.late_hit(fault),
            }
        }
        let (link, pages_max) = {
            let pacer = lock(&self.pacer);
            let (rtt, base_rtt) = (pacer.rtt(), pacer.base_rtt());
            (LinkState { rtt, base_rtt, rate_bps: pacer.rate_bps() }, pacer.run_pages())
        };
        policy.link(link);
        policy.next(&self.source.ledger, self.pages_max(pages_max))
    }

    /// So many pages, or fewer if they would be a burst beyond the limit.
    fn pages_max(&self, pages: u32) -> u32 {
        let most = lock(&self.rate).bytes_max().map(|bytes| bytes / PAGE_SIZE as u64);
        pages.min(most.map_or(u32::MAX, |most| most.max(1) as u32))
    }

    async fn push_run(
        &self,
        stream: &mut SendStream,
        suggestion: Suggestion,
        epoch: u32,
        shrinker: &mut Shrinker,
    ) -> Result<u64, LaneError> {
        let origin = match suggestion.origin {
            prepaging::Origin::Push => Origin::Push,
            prepaging::Origin::Drain => Origin::Drain,
        };
        // Pages are sent from where they lie, so a frame's must lie in one piece.
        let (_, run) = self.source.ram.first_part(suggestion.run);
        failpoint!("source::before_push_claimed", return Err(broken()));
        let mut rest = Some(run);
        while let Some(run) = rest {
            let (part, kind) = self.source.known.first_part(run);
            if let Some(claim) = self.source.ledger.claim_within(part) {
                failpoint!("source::after_push_claimed", return Err(broken()));
                let (began, bytes) = (self.source.began, claim.run().bytes());
                let mut on_stream = frame_bytes(claim.run(), kind);
                if kind != PageKind::Raw {
                    self.source.send_as(stream, claim, kind, origin, epoch).await?;
                    return Ok(on_stream);
                }
                let compress = |pages: &[u8]| {
                    let block = shrinker.shrink(&self.compression, began, pages);
                    on_stream -= block.as_ref().map_or(0, |block| pages.len() - block.len()) as u64;
                    block
                };
                self.source.send(stream, claim, origin, epoch, compress).await?;
                let steady = || lock(&self.pacer).is_steady();
                shrinker.sent(&self.compression, began, bytes, steady);
                return Ok(on_stream);
            }
            let left = run.end().saturating_sub(part.end());
            rest = PageRun::new(PageIndex::new(part.end()), left);
        }
        // Another lane or a request was faster: the policy is asked anew.
        Ok(0)
    }

    async fn push_zeros(
        &self,
        stream: &mut SendStream,
        run: PageRun,
        kind: PageKind,
        epoch: u32,
    ) -> Result<u64, LaneError> {
        failpoint!("source::before_zeros_claimed", return Err(broken()));
        let mut bytes = 0;
        while let Some(claim) = self.source.ledger.claim_within(run) {
            failpoint!("source::after_zeros_claimed", return Err(broken()));
            bytes += frame_bytes(claim.run(), kind);
            self.source.send_as(stream, claim, kind, Origin::Push, epoch).await?;
        }
        Ok(bytes)
    }
}

/// What a frame takes on its stream.
pub(super) fn frame_bytes(run: PageRun, kind: PageKind) -> u64 {
    let content = if kind == PageKind::Raw { run.bytes() } else { 0 };
    (HEADER_LEN + content) as u64
}

/// What a lane's streams take on the wire: headers of QUIC, UDP and IP, and what was lost and is
/// sent again, as its connection has measured them.
#[derive(Debug, Default)]
struct Overhead {
    written: u64,
}

impl Overhead {
    /// Of IPv4 and UDP.
    const HEADERS: u64 = 28;
    /// It is measured by no fewer bytes.
    const MEASURED: u64 = 4 << 20;

    /// What so many bytes, written to the stream, come to.
    fn on_the_wire(&mut self, bytes: u64, connection: &Connection) -> u64 {
        self.written += bytes;
        let sent = connection.stats().udp_tx;
        let sent = sent.bytes + sent.datagrams * Self::HEADERS;
        if sent < Self::MEASURED {
            return bytes;
        }
        // What waits to be sent makes it look like less.
        (u128::from(bytes) * u128::from(sent.max(self.written)) / u128::from(self.written)) as u64
    }
}

#[cfg(feature = "failpoints")]
pub(super) fn broken() -> LaneError {
    LaneError::Link("a failpoint".into())
}
