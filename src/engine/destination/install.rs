//! Putting arrived pages into the guest: ledger, placer and fault book together.
//!
//! Any thread may install; the ledger's landings keep two of them off one page.

use super::copied::CopiedPages;
use super::fault_book::{Came, FaultBook};
use super::recording::Recording;
use crate::engine::lane::LaneError;
use crate::engine::lost_pages::LostPages;
use crate::failpoint::failpoint;
use crate::memory::reserve::Reserved;
use crate::proto::frame::{FrameHeader, Origin, PageKind};
use crate::proto::ledger::{DestinationLedger, Landing};
use crate::proto::page::{PAGE_SIZE, PageRun};
use crate::proto::page_set::PageSet;
use crate::uffd::{Content, PlaceError, Placer, Stop};
use nix::errno::Errno;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, TryLockError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// How often placing is tried again while an event is pending (`EAGAIN`), and how
/// long in all: the thread that reads events clears it within microseconds.
const AGAIN_PAUSE: Duration = Duration::from_micros(50);
const AGAIN_MAX: Duration = Duration::from_secs(5);

/// The most pages that are told to be zero in one go: emptying them keeps those who write to
/// the same file.
const PIECE_PAGES: u64 = 1024;

/// Pages installed, by origin.
#[derive(Debug, Default)]
pub struct Arrivals {
    /// Came with the switchover.
    pub seeded: AtomicU64,
    /// Came in answer to a fault.
    pub demanded: AtomicU64,
    /// Were pushed.
    pub pushed: AtomicU64,
    /// Came in the final drain.
    pub drained: AtomicU64,
    /// Were announced as zero.
    pub zero: AtomicU64,
    /// Were announced as holes.
    pub hole: AtomicU64,
    /// Were in place already when they were to be placed (`EEXIST`).
    pub existed: AtomicU64,
}

impl Arrivals {
    fn of(&self, kind: PageKind, origin: Origin) -> &AtomicU64 {
        match (kind, origin) {
            (PageKind::Zero, _) => &self.zero,
            (PageKind::Hole, _) => &self.hole,
            (_, Origin::Seed) => &self.seeded,
            (_, Origin::Demand) => &self.demanded,
            (_, Origin::Push | Origin::Copy) => &self.pushed,
            (_, Origin::Drain) => &self.drained,
        }
    }
}

/// What is put into pages in hand.
#[derive(Clone, Copy)]
enum Cargo<'a> {
    Bytes(Content<'a>),
    Zeros,
    /// A mark on which whoever touches them gets a memory error.
    Poison,
}

/// Installs pages; shared by the threads of all lanes.
#[derive(Debug)]
pub struct Installer {
    /// Which pages are missing, in hand, placed.
    pub ledger: DestinationLedger,
    /// Puts them into memory.
    pub placer: Placer,
    /// Who waits for them.
    pub book: FaultBook,
    /// Counters.
    pub arrivals: Arrivals,
    /// Pages whose content is lost.
    pub lost: LostPages,
    /// When what happened, if somebody wants to know.
    pub recording: Option<Recording>,
    /// What comes before the machine state, if anything does.
    pub copied: Option<CopiedPages>,
    reserved: Reserved,
    full: UnboundedSender<()>,
    full_told: AtomicBool,
    current: RwLock<Current>,
}

/// The link epoch whose pages are welcome.
#[derive(Debug, Default)]
struct Current {
    epoch: u32,
    first_placed: OnceLock<Instant>,
}

impl Installer {
    /// An installer for a guest of which every page is missing. `full` is told once
    /// when none is any more.
    pub fn new(
        ledger: DestinationLedger,
        (placer, reserved): (Placer, Reserved),
        book: FaultBook,
        copied: Option<CopiedPages>,
        full: UnboundedSender<()>,
        recording: Option<Recording>,
    ) -> Arc<Self> {
        let full_told = AtomicBool::new(false);
        let arrivals = Arrivals::default();
        let lost = LostPages::default();
        let current = RwLock::default();
        Arc::new(Self {
            ledger,
            placer,
            book,
            arrivals,
            lost,
            recording,
            copied,
            reserved,
            full,
            full_told,
            current,
        })
    }

    /// Pages of `epoch` are welcome from now on and no others. When this returns, none of
    /// another epoch is on its way into memory: what the ledger holds as placed stays
    /// complete, whatever still lies in the buffers of the link before. `again` is called
    /// as by [`install`](Self::install), for a page in hand may be waiting for just that.
    pub fn begin(&self, epoch: u32, again: &mut dyn FnMut()) {
        loop {
            let mut current = match self.current.try_write() {
                Ok(current) => current,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    again();
                    std::thread::sleep(AGAIN_PAUSE);
                    continue;
                }
            };
            if current.epoch != epoch {
                *current = Current { epoch, first_placed: OnceLock::new() };
            }
            return;
        }
    }

    /// The current link epoch and when its first page was placed.
    pub fn first_placed(&self) -> (u32, Option<Instant>) {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        (current.epoch, current.first_placed.get().copied())
    }

    /// Installs a frame that was received whole at `arrived`, in pieces that keep nobody else for
    /// long.
    pub async fn install(
        &self,
        frame: &FrameHeader,
        content: Content<'_>,
        arrived: Instant,
        again: &mut impl FnMut(),
    ) -> Result<(), LaneError> {
        let (mut piece, mut rest) = frame.split(PIECE_PAGES);
        loop {
            self.install_piece(&piece, content, arrived, again)?;
            let Some(left) = rest else { return Ok(()) };
            // The link's acknowledgements have their turn.
            tokio::task::yield_now().await;
            (piece, rest) = left.split(PIECE_PAGES);
        }
    }

    /// Installs a frame. `again` is called when the kernel takes no page
    /// before pending events are read; who reads events reads them there.
    fn install_piece(
        &self,
        frame: &FrameHeader,
        content: Content<'_>,
        arrived: Instant,
        again: &mut dyn FnMut(),
    ) -> Result<(), LaneError> {
        // Held across the placement by lanes that do not exclude each other; only a new link
        // epoch waits for them.
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        if frame.epoch != current.epoch {
            let (of, now) = (frame.epoch, current.epoch);
            return Err(LaneError::Link(format!("a page of link epoch {of}; this is {now}")));
        }
        if frame.origin == Origin::Copy {
            return self.copy(frame, content);
        }
        let came = match frame.origin {
            Origin::Demand => Came::InAnswer(arrived),
            _ => Came::Unasked,
        };
        let out_of_range = |error| LaneError::Violation(format!("{error}"));
        failpoint!(
            frame.origin == Origin::Seed => "destination::before_seed_landed",
            "destination::before_page_landed",
            return Err(broken())
        );
        match frame.kind {
            PageKind::Raw => {
                let counter = self.arrivals.of(frame.kind, frame.origin);
                for landing in self.ledger.land(frame.run).map_err(out_of_range)? {
                    failpoint!(
                        frame.origin == Origin::Seed => "destination::after_seed_landed",
                        "destination::after_page_landed",
                        return Err(broken())
                    );
                    counter.fetch_add(landing.run().count(), Ordering::Relaxed);
                    let first = landing.run().first().as_usize() - frame.run.first().as_usize();
                    self.place(
                        landing,
                        Cargo::Bytes(content.behind(first * PAGE_SIZE)),
                        came,
                        again,
                    )?;
                }
            }
            PageKind::Poison => {
                for landing in self.ledger.land(frame.run).map_err(out_of_range)? {
                    if self.has_pages() {
                        // A page that exists could be mapped over the mark (UFFDIO_CONTINUE).
                        self.placer.give_back(landing.run()).map_err(local)?;
                    }
                    self.lost.note(landing.run(), self.placer.layout());
                    self.place(landing, Cargo::Poison, came, again)?;
                }
            }
            // Whoever reads frames has it decompressed.
            PageKind::Compressed => {
                let why = format!("{:?} came compressed", frame.run);
                return Err(LaneError::Local(why));
            }
            PageKind::Zero | PageKind::Hole => {
                self.give_back(frame.run)?;
                let counter = self.arrivals.of(frame.kind, frame.origin);
                counter.fetch_add(frame.run.count(), Ordering::Relaxed);
                let landings = match self.reserved {
                    // A huge page is mapped when all of it is placed: that waits for no fault.
                    Reserved::InPool => {
                        self.ledger.land(frame.run).map_err(out_of_range)?.collect()
                    }
                    _ => self.ledger.mark_zero(frame.run).map_err(out_of_range)?,
                };
                for landing in landings {
                    failpoint!("destination::after_zeros_landed", return Err(broken()));
                    self.place(landing, Cargo::Zeros, came, again)?;
                }
            }
        }
        if let Reserved::Elsewhere(weight) = &self.reserved {
            weight.lower_to(self.ledger.missing());
        }
        current.first_placed.get_or_init(Instant::now);
        if let Some(recording) = &self.recording {
            recording.placed(frame, Instant::now());
        }
        failpoint!(
            frame.origin == Origin::Seed => "destination::after_seed_installed",
            "destination::after_page_installed",
            return Err(broken())
        );
        self.tell_if_full();
        Ok(())
    }

    /// Gives back what is in the guest's files for the pages of `run`, which are zero:
    /// before anybody hears of it, for a page that was touched then may have been written to.
    fn give_back(&self, run: PageRun) -> Result<(), LaneError> {
        if !self.has_pages() {
            return Ok(());
        }
        let out_of_range = |error| LaneError::Violation(format!("{error}"));
        for held in self.ledger.hold(run).map_err(out_of_range)? {
            self.placer.give_back(held.run()).map_err(local)?;
            // Who faults meanwhile is remembered, and told with the others; but for one whose page
            // was removed meanwhile, and who was told to wait for this.
            let run = held.hand_back();
            self.placer.wake_unplaced(run).map_err(local)?;
        }
        Ok(())
    }

    /// Places zeros, for a fault on a page that is known to be zero.
    pub fn place_zero(
        &self,
        landing: Landing<'_>,
        again: &mut dyn FnMut(),
    ) -> Result<(), LaneError> {
        failpoint!(
            "destination::before_zero_placed",
            return Err(LaneError::NoMemory("a failpoint".into()))
        );
        self.place(landing, Cargo::Zeros, Came::Known, again)?;
        self.tell_if_full();
        Ok(())
    }

    /// Whether pages are in the guest's files that are not placed: reserved, or copied.
    fn has_pages(&self) -> bool {
        matches!(self.reserved, Reserved::InPlace) || self.copied.is_some()
    }

    /// Nobody ran with this memory, nor will: frees what is in a VMM's own files.
    pub fn abandon(&self) {
        if !self.has_pages() && !matches!(self.reserved, Reserved::InPool) {
            return;
        }
        for segment in self.placer.segments() {
            if let Err(error) = self.placer.give_back(segment) {
                tracing::warn!(%error, "memory that was reserved stays reserved");
            }
        }
    }

    /// The pages that give a memory error, for their content is lost, or that of another one in
    /// the same huge page.
    pub fn poisoned_set(&self) -> PageSet {
        let mut set = PageSet::new();
        for page in self.ledger.poisoned_set().runs().flat_map(PageRun::pages) {
            set.insert(self.placer.unit_of(page));
        }
        set
    }

    /// Wakes who waits for a page that is placed.
    pub fn wake(&self, run: PageRun) -> Result<(), LaneError> {
        self.placer.wake(run).map_err(local)
    }

    /// Tells that no page is missing, once.
    pub fn tell_if_full(&self) {
        if self.ledger.missing() == 0 && !self.full_told.swap(true, Ordering::SeqCst) {
            let _ = self.full.send(());
        }
    }

    fn place(
        &self,
        landing: Landing<'_>,
        cargo: Cargo<'_>,
        came: Came,
        again: &mut dyn FnMut(),
    ) -> Result<(), LaneError> {
        let whole = landing.run();
        if let Came::InAnswer(arrived) = came {
            // Before it is placed: whoever places the last page of a huge page ends the wait.
            self.book.answered(self.placer.unit_of(whole.first()), arrived);
        }
        let mut landing = Some(landing);
        let mut waiting_since = None;
        while let Some(part) = landing.take() {
            let run = part.run();
            let done = whole.count() - run.count();
            let placed = match cargo {
                Cargo::Bytes(content) => {
                    let left = content.behind(done as usize * PAGE_SIZE);
                    self.placer.place(run, left.up_to(run.bytes()))
                }
                Cargo::Zeros => self.placer.place_zero(run),
                Cargo::Poison => self.placer.poison(run),
            };
            let placed = placed.map_err(local)?;
            failpoint!("destination::after_placed");
            let mut pages = placed.pages;
            match placed.stop {
                None => {}
                Some(Stop::Exists) => {
                    // There already: whoever waits for it must still be woken.
                    if let Some(page) = run.first().checked_add(pages) {
                        self.wake(PageRun::single(page))?;
                        self.arrivals.existed.fetch_add(1, Ordering::Relaxed);
                        pages += 1;
                    }
                }
                Some(Stop::Again) => {
                    let since = *waiting_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > AGAIN_MAX {
                        let why = format!("{run:?} cannot be placed: events stay pending");
                        return Err(LaneError::Local(why));
                    }
                    again();
                    std::thread::sleep(AGAIN_PAUSE);
                }
            }
            landing = match cargo {
                Cargo::Bytes(_) | Cargo::Zeros => part.placed_some(pages),
                Cargo::Poison => part.poisoned_some(pages),
            };
        }
        for opened in self.placer.opened(whole) {
            self.book.placed(opened, came, Instant::now());
        }
        Ok(())
    }
}

#[cfg(feature = "failpoints")]
pub(super) fn broken() -> LaneError {
    LaneError::Local("a failpoint".into())
}

pub(super) fn local(error: PlaceError) -> LaneError {
    let why = crate::engine::error_chain(&error);
    match error.source {
        Errno::ENOMEM | Errno::ENOSPC => LaneError::NoMemory(why),
        _ => LaneError::Local(why),
    }
}
