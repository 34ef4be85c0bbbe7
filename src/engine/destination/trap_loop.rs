//! The destination's fault loop: traps in, page requests out.
//!
//! It runs on the urgent lane's thread, next to what places the answers, so that a
//! fault costs no hand-over between threads.

mod blocks;

use super::install::Installer;
use crate::engine::lane::LaneError;
use crate::failpoint::failpoint;
use crate::proto::frame::PageRequest;
use crate::proto::ledger::{FaultAnswer, Landing};
use crate::proto::page::{PageIndex, PageRun};
use crate::uffd::{BATCH_EVENTS_MAX, Trap, TrapEvent};
use nix::unistd::Pid;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// When memory that there was none of is asked for again.
const MEMORY_AGAIN: Duration = Duration::from_millis(20);

/// Faults seen.
#[derive(Debug, Default)]
pub struct FaultCounts {
    /// Asked the source.
    pub requests: AtomicU64,
    /// On a page that was asked for already, or in hand.
    pub waits: AtomicU64,
    /// Of all that had to wait for the network: raised by no vCPU thread.
    pub unattributed: AtomicU64,
    /// Answered without the source: zero pages and holes.
    pub local: AtomicU64,
    /// On a page that was placed by the time the fault was read.
    pub crossed: AtomicU64,
}

impl FaultCounts {
    /// One more of `counter`, which are waits for the network.
    fn wait(&self, counter: &AtomicU64, vcpu: Option<u16>) {
        counter.fetch_add(1, Ordering::Relaxed);
        if vcpu.is_none() {
            self.unattributed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Where requests go: written by the fault loop, sent by the demand streams' tasks.
pub trait Requests {
    /// Queues a request on the stream of its vCPU.
    fn ask(&self, request: PageRequest);
}

/// Reads faults and decides with the ledger what each needs.
pub struct TrapLoop<R> {
    trap: AsyncFd<Trap>,
    installer: Arc<Installer>,
    counts: Arc<FaultCounts>,
    vcpus: RefCell<HashMap<Pid, u16>>,
    requests: R,
    epoch: std::cell::Cell<u32>,
    events: RefCell<Vec<TrapEvent>>,
    /// It was said that there is no memory.
    without_memory: std::cell::Cell<bool>,
}

impl<R: Requests> TrapLoop<R> {
    /// A loop over this trap; must be made inside the urgent lane's runtime.
    pub fn new(
        trap: Trap,
        installer: Arc<Installer>,
        counts: Arc<FaultCounts>,
        requests: R,
    ) -> std::io::Result<Rc<Self>> {
        // SAFETY: the trap's descriptor stays the same and open as long as the trap lives,
        // which the `AsyncFd` owns.
        let trap = unsafe { AsyncFd::register_with_interest(trap, Interest::READABLE) };
        Ok(Rc::new(Self {
            trap: trap?,
            installer,
            counts,
            vcpus: RefCell::default(),
            requests,
            epoch: std::cell::Cell::new(0),
            events: RefCell::default(),
            without_memory: std::cell::Cell::new(false),
        }))
    }

    /// Says which kernel thread is which vCPU.
    pub fn set_vcpus(&self, threads: &[Pid]) {
        let numbered = threads.iter().zip(0u16..).map(|(thread, vcpu)| (*thread, vcpu));
        *self.vcpus.borrow_mut() = numbered.collect();
    }

    /// Requests carry this link epoch from now on.
    pub fn set_epoch(&self, epoch: u32) {
        self.epoch.set(epoch);
    }

    /// Serves faults until the descriptor fails.
    pub async fn run(&self) -> LaneError {
        loop {
            let mut ready = match self.trap.readable().await {
                Ok(ready) => ready,
                Err(error) => return LaneError::Local(format!("userfaultfd: {error}")),
            };
            match self.drain() {
                // Less than a full batch: what comes now makes the descriptor readable anew.
                Ok(read) if read < BATCH_EVENTS_MAX => ready.clear_ready(),
                // Arrived pages have their turn between two full batches.
                Ok(_) => tokio::task::yield_now().await,
                Err(error) => return error,
            }
        }
    }

    /// Reads one batch of events and acts on each; returns how many there were.
    pub fn drain(&self) -> Result<usize, LaneError> {
        // `again` below may come back here while a batch is being worked on.
        failpoint!(
            "destination::before_fault_read",
            return Err(LaneError::Local("a failpoint".into()))
        );
        let mut events = std::mem::take(&mut *self.events.borrow_mut());
        events.clear();
        let read = self
            .trap
            .get_ref()
            .read(&mut events)
            .map_err(|error| LaneError::Local(crate::engine::error_chain(&error)))?;
        let now = Instant::now();
        for event in &events {
            self.event(event, now)?;
        }
        *self.events.borrow_mut() = events;
        Ok(read)
    }

    fn event(&self, event: &TrapEvent, now: Instant) -> Result<(), LaneError> {
        match *event {
            TrapEvent::Fault { page, thread, .. } => self.fault(page, thread, now),
            TrapEvent::Removed(run) => {
                let landings = self.installer.ledger.removed(run).map_err(violation)?;
                self.installer.placer.removed(run);
                for landing in landings {
                    self.place_zero(landing)?;
                }
                self.installer.tell_if_full();
                Ok(())
            }
            TrapEvent::Unexpected(what) => {
                tracing::warn!(what, "an unexpected event from userfaultfd");
                Ok(())
            }
        }
    }

    fn fault(&self, page: PageIndex, thread: Pid, now: Instant) -> Result<(), LaneError> {
        let vcpu = self.vcpus.borrow().get(&thread).copied();
        let unit = self.installer.placer.unit_of(page);
        let page = unit.first();
        let waits = |counter: &AtomicU64| self.counts.wait(counter, vcpu);
        // First the book, then the ledger: see `FaultBook::enter`.
        let new = self.installer.book.enter(page, thread, vcpu, now);
        if let Some(recording) = self.installer.recording.as_ref().filter(|_| new) {
            recording.fault(page, vcpu, now);
        }
        failpoint!("destination::before_fault_answered");
        if unit.count() > 1 {
            return self.fault_in_block(unit, vcpu, new);
        }
        match self.installer.ledger.fault(page).map_err(violation)? {
            FaultAnswer::Request => {
                waits(&self.counts.requests);
                self.installer.book.asked(page);
                self.ask(unit, vcpu);
            }
            FaultAnswer::Wait if new => waits(&self.counts.waits),
            // A wait that goes on is counted, and timed, by its beginning.
            FaultAnswer::Wait => {}
            FaultAnswer::Wake => {
                if new && self.installer.book.strike(page) {
                    // It was copied before the guest came, as a rule, and is not mapped yet.
                    let copied = self.installer.copied.is_some();
                    let counter = if copied { &self.counts.local } else { &self.counts.crossed };
                    counter.fetch_add(1, Ordering::Relaxed);
                } else if new {
                    // Placed after it was entered: its wait is in the figures.
                    waits(&self.counts.waits);
                }
                self.wake(unit)?;
            }
            FaultAnswer::Zero(landing) => {
                if new {
                    self.counts.local.fetch_add(1, Ordering::Relaxed);
                    self.installer.book.strike(page);
                }
                self.place_zero(landing)?;
            }
        }
        Ok(())
    }

    /// Places zeros.
    fn place_zero(&self, landing: Landing<'_>) -> Result<(), LaneError> {
        let run = landing.run();
        let placed = self.installer.place_zero(landing, &mut || self.again());
        self.or_later(run, placed)
    }

    /// Wakes who waits for pages that are placed.
    fn wake(&self, run: PageRun) -> Result<(), LaneError> {
        self.or_later(run, self.installer.wake(run))
    }

    /// Where there is no memory now, not even for a mapping, whoever waits looks again later.
    /// It must not end the loop: no link brings these pages anew.
    fn or_later(&self, run: PageRun, done: Result<(), LaneError>) -> Result<(), LaneError> {
        let Err(LaneError::NoMemory(why)) = done else { return done };
        if !self.without_memory.replace(true) {
            tracing::warn!(why, "this host has no memory for a page; it is tried again");
        }
        let installer = self.installer.clone();
        tokio::task::spawn_local(async move {
            tokio::time::sleep(MEMORY_AGAIN).await;
            if let Err(error) = installer.placer.wake_unplaced(run) {
                tracing::warn!(%error, "who waits for a page is not woken");
            }
        });
        Ok(())
    }

    /// Asks the source for pages, no more than a request has.
    fn ask(&self, run: PageRun, vcpu: Option<u16>) {
        let epoch = self.epoch.get();
        self.requests.ask(PageRequest { run, vcpu, epoch });
    }

    /// Asks again for everything whose answer the lost link swallowed; and answers those who
    /// wait for pages that it had told to be zero, if it broke before they were placed.
    pub async fn ask_again(&self) -> Result<(), LaneError> {
        let ledger = &self.installer.ledger;
        super::placed_out::ask_again(ledger, |run| self.ask(run, None)).await;
        for page in self.installer.book.waited_for() {
            let unit = self.installer.placer.unit_of(page);
            if unit.count() > 1 {
                self.look_after(unit)?;
                continue;
            }
            match ledger.fault(page).map_err(violation)? {
                FaultAnswer::Zero(landing) => self.place_zero(landing)?,
                FaultAnswer::Wake => self.wake(unit)?,
                FaultAnswer::Request => self.ask(unit, None),
                FaultAnswer::Wait => {}
            }
        }
        Ok(())
    }

    /// Reads pending events while a placement waits for just that.
    pub fn again(&self) {
        if let Err(error) = self.drain() {
            tracing::error!(%error, "reading pending events");
        }
    }
}

fn violation(error: impl std::fmt::Display) -> LaneError {
    LaneError::Local(error.to_string())
}
