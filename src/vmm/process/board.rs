//! [`Board`]: where the vCPU threads and their guest meet: who runs, who is parked,
//! with which registers. It knows neither steps nor memory.

use super::walker::{Registers, Status};
use crate::vmm::clock::GuestClock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a pause waits for the vCPUs: one may be waiting for a page.
pub const PAUSE_WAIT: Duration = Duration::from_secs(10);

/// Why vCPUs cannot be paused, resumed or captured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VcpuError {
    /// Some vCPUs did not stop. All run on as before.
    #[error("vCPUs {vcpus:?} did not stop in {waited:?}: they wait for a page that does not come")]
    NotStopped {
        /// Which ones.
        vcpus: Vec<usize>,
        /// How long the pause waited.
        waited: Duration,
    },
    /// A vCPU's thread panicked; its registers are lost.
    #[error("the thread of vCPU {0} panicked; its state is lost")]
    Lost(usize),
}

/// What a vCPU's thread is to do: make steps from here.
pub(super) struct Job {
    pub(super) registers: Registers,
    pub(super) clock: GuestClock,
}

#[derive(Debug)]
struct Seat {
    /// As they were when the vCPU was last parked.
    registers: Registers,
    /// Ordered to run and not parked since.
    running: bool,
    /// The order is still to be taken up.
    ordered: bool,
    /// The thread panicked.
    lost: bool,
    /// The thread is about to end.
    left: bool,
}

#[derive(Debug)]
struct Seats {
    vcpus: Vec<Seat>,
    clock: GuestClock,
    first_entry: Option<Instant>,
    quit: bool,
}

#[derive(Debug)]
pub(super) struct Board {
    seats: Mutex<Seats>,
    changed: Condvar,
    /// Polled at each step. Changed only with `seats` locked.
    stop: AtomicBool,
}

impl Board {
    /// A board of parked vCPUs at their first step.
    pub(super) fn new(vcpus: u32) -> Self {
        let seat = |_| Seat {
            registers: Registers::first(),
            running: false,
            ordered: false,
            lost: false,
            left: false,
        };
        let seats = Seats {
            vcpus: (0..vcpus).map(seat).collect(),
            clock: GuestClock::default(),
            first_entry: None,
            quit: false,
        };
        Self { seats: Mutex::new(seats), changed: Condvar::new(), stop: AtomicBool::new(false) }
    }

    /// No thread panics with the lock held, but a poisoned board is still whole.
    fn lock(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, at most for `most`.
    fn wait_for(
        &self,
        most: Duration,
        mut done: impl FnMut(&Seats) -> bool,
    ) -> MutexGuard<'_, Seats> {
        let pending = |seats: &mut Seats| !done(seats);
        self.changed
            .wait_timeout_while(self.lock(), most, pending)
            .map_or_else(|poisoned| poisoned.into_inner().0, |(seats, _)| seats)
    }

    // The guest's side.

    /// Stops all vCPUs between two steps, or none.
    pub(super) fn pause(&self, most: Duration) -> Result<(), VcpuError> {
        self.stop_all(true);
        let mut seats = self.wait_for(most, |seats| seats.vcpus.iter().all(|seat| !seat.running));
        let vcpus: Vec<usize> =
            (0..seats.vcpus.len()).filter(|&v| seats.vcpus[v].running).collect();
        if vcpus.is_empty() {
            return Ok(());
        }
        self.stop.store(false, Ordering::SeqCst);
        for seat in seats.vcpus.iter_mut().filter(|seat| !seat.running && !seat.lost) {
            (seat.running, seat.ordered) = (true, true);
        }
        drop(seats);
        self.changed.notify_all();
        Err(VcpuError::NotStopped { vcpus, waited: most })
    }

    fn stop_all(&self, stop: bool) {
        let _seats = self.lock();
        self.stop.store(stop, Ordering::SeqCst);
    }

    /// Lets all vCPUs run. They are parked.
    pub(super) fn resume(&self) -> Result<(), VcpuError> {
        let mut seats = self.lock();
        seats.none_lost()?;
        self.stop.store(false, Ordering::SeqCst);
        seats.first_entry = None;
        for seat in &mut seats.vcpus {
            (seat.running, seat.ordered) = (true, true);
        }
        drop(seats);
        self.changed.notify_all();
        Ok(())
    }

    /// The clock and the registers of parked vCPUs.
    pub(super) fn registers(&self) -> Result<(GuestClock, Vec<Registers>), VcpuError> {
        let seats = self.lock();
        seats.none_lost()?;
        Ok((seats.clock, seats.vcpus.iter().map(|seat| seat.registers.clone()).collect()))
    }

    /// Sets the clock and the registers of parked vCPUs.
    pub(super) fn load(&self, clock: GuestClock, registers: Vec<Registers>) {
        let mut seats = self.lock();
        seats.clock = clock;
        for (seat, registers) in seats.vcpus.iter_mut().zip(registers) {
            seat.registers = registers;
        }
    }

    pub(super) fn first_entry(&self) -> Option<Instant> {
        self.lock().first_entry
    }

    /// Whether no vCPU will make another step.
    pub(super) fn ended(&self) -> bool {
        let ended =
            |seat: &Seat| !seat.running && (seat.lost || seat.registers.status != Status::Running);
        self.lock().vcpus.iter().all(ended)
    }

    pub(super) fn failure(&self) -> Option<String> {
        let seats = self.lock();
        let mut vcpus = seats.vcpus.iter().enumerate();
        vcpus.find_map(|(vcpu, seat)| match seat.registers.status {
            _ if seat.lost => Some(VcpuError::Lost(vcpu).to_string()),
            Status::Failed(wrong) => {
                let step = seat.registers.step;
                Some(format!("vCPU {vcpu} failed its check in step {step}: {wrong}"))
            }
            Status::Running | Status::Finished => None,
        })
    }

    /// Tells all threads to end and waits, at most for `most`, until they do.
    pub(super) fn quit(&self, most: Duration) {
        let mut seats = self.lock();
        seats.quit = true;
        self.stop.store(true, Ordering::SeqCst);
        drop(seats);
        self.changed.notify_all();
        drop(self.wait_for(most, |seats| seats.vcpus.iter().all(|seat| seat.left)));
    }

    /// Whether the thread of `vcpu` is about to end.
    pub(super) fn has_left(&self, vcpu: usize) -> bool {
        self.lock().vcpus[vcpu].left
    }

    // The vCPU threads' side.

    /// Polled between two steps.
    pub(super) fn stop(&self) -> &AtomicBool {
        &self.stop
    }

    /// Parks until there is something to do; `None` when the thread is to end.
    pub(super) fn next_job(&self, vcpu: usize) -> Option<Job> {
        let idle = |seats: &mut Seats| !seats.quit && !seats.vcpus[vcpu].ordered;
        let mut seats =
            self.changed.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        if seats.quit {
            return None;
        }
        let clock = seats.clock;
        let seat = &mut seats.vcpus[vcpu];
        seat.ordered = false;
        let registers = seat.registers.clone();
        seats.first_entry.get_or_insert_with(Instant::now);
        Some(Job { registers, clock })
    }

    /// Hands back the registers; `None` if the thread panicked.
    pub(super) fn park(&self, vcpu: usize, registers: Option<Registers>) {
        let mut seats = self.lock();
        let seat = &mut seats.vcpus[vcpu];
        seat.lost = registers.is_none();
        if let Some(registers) = registers {
            seat.registers = registers;
        }
        // It may have seen a stop that was taken back, because another did not stop.
        let unfinished = seat.registers.status == Status::Running && !seat.lost;
        seat.running = unfinished && !self.stop.load(Ordering::SeqCst);
        seat.ordered = seat.running;
        drop(seats);
        self.changed.notify_all();
    }

    /// The thread's last word.
    pub(super) fn leave(&self, vcpu: usize) {
        self.lock().vcpus[vcpu].left = true;
        self.changed.notify_all();
    }
}

impl Seats {
    fn none_lost(&self) -> Result<(), VcpuError> {
        self.vcpus.iter().position(|seat| seat.lost).map_or(Ok(()), |v| Err(VcpuError::Lost(v)))
    }
}
