//! [`ProcessGuest`]: a guest whose vCPUs are threads of this process.
//!
//! The threads run the [`workload`](super::workload)'s steps in plain mapped memory,
//! at full native speed and without KVM. What a processor keeps in its registers a
//! vCPU here keeps in `walker`'s `Registers`, outside of guest memory, so that
//! this guest, too, has a state to carry over: see `state`.

mod board;
mod dirty;
mod state;
mod walker;
mod words;

pub use board::{PAUSE_WAIT, VcpuError};
pub use state::StateError;

use super::clock::{GuestClock, tsc_hz};
use super::content::fill_memory;
use super::guest::{Guest, GuestError, GuestKind};
use super::workload::{Pattern, Workload, WorkloadError, control_page, histogram_page};
use crate::memory::dirty_bitmap::DirtyBitmap;
use crate::memory::ram::GuestRam;
use crate::proto::page::PageIndex;
use crate::uffd::{WriteLog, WriteLogError};
use board::{Board, Job};
use dirty::DirtyLog;
use nix::unistd::Pid;
use state::State;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use walker::{Registers, Walker};

/// Why a process guest cannot do what it was told to; the cause in a [`GuestError`].
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The workload does not fit the memory.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// A thread could not be started.
    #[error("the thread of vCPU {vcpu} cannot be started")]
    Spawn {
        /// The vCPU.
        vcpu: u32,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A thread ended before it told its number.
    #[error("the thread of vCPU {0} ended at once")]
    NoThread(u32),
    /// A vCPU does not stop, or is broken.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The bytes are not this guest's state.
    #[error(transparent)]
    State(#[from] StateError),
    /// Only a paused guest has a state.
    #[error("the guest runs; pause it first")]
    Running,
    /// A state can only be put into a guest that has not run.
    #[error("the guest has run already")]
    HasRun,
    /// The memory of a prepared guest is someone else's until the state is restored.
    #[error("the guest was prepared for a state and has none yet")]
    NoState,
    /// The kernel does not log its writes.
    #[error(transparent)]
    WriteLog(#[from] WriteLogError),
    /// A round of a dirty log that was not started.
    #[error("its writes are not logged")]
    NotLogging,
}

/// Where a guest is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Threads exist; registers and memory do not yet.
    Prepared,
    /// Ready for its first step here.
    Fresh,
    Running,
    Paused,
}

/// A guest made of threads of this process, one a vCPU, named `vcpu-0` and so on.
///
/// Dropping it ends the threads. A thread that waits for a missing page then is
/// left behind, with its share of the memory, until the page comes.
#[derive(Debug)]
pub struct ProcessGuest {
    workload: Workload,
    ram: Arc<GuestRam>,
    board: Arc<Board>,
    threads: Vec<(Pid, JoinHandle<()>)>,
    phase: Phase,
    pause_wait: Duration,
    dirty_log: DirtyLog,
}

fn guest_error<E: Into<ProcessError>>(action: &str) -> impl FnOnce(E) -> GuestError {
    let action = action.to_owned();
    move |error| {
        let source: Box<ProcessError> = Box::new(error.into());
        GuestError { kind: GuestKind::Process, action, source }
    }
}

impl ProcessGuest {
    /// A new guest at its first step, on the source. Writes its first content to
    /// `ram`.
    pub fn new(ram: Arc<GuestRam>, workload: Workload) -> Result<Self, GuestError> {
        let fail = guest_error::<ProcessError>("create vCPUs");
        let mut guest = Self::with_threads(ram, workload).map_err(fail)?;
        fill_memory(&guest.ram, &guest.workload, tsc_hz());
        guest.phase = Phase::Fresh;
        Ok(guest)
    }

    /// A guest whose state is still to come, on the destination. It touches no guest
    /// memory before it is resumed.
    pub fn prepare(ram: Arc<GuestRam>, workload: Workload) -> Result<Self, GuestError> {
        let fail = guest_error::<ProcessError>("prepare vCPUs");
        // Measured now, not when a vCPU first has to wait.
        tsc_hz();
        Self::with_threads(ram, workload).map_err(fail)
    }

    fn with_threads(ram: Arc<GuestRam>, workload: Workload) -> Result<Self, ProcessError> {
        workload.check_without_machine(ram.layout())?;
        let board = Arc::new(Board::new(workload.vcpus));
        let mut guest = Self {
            workload,
            ram,
            board,
            threads: Vec::new(),
            phase: Phase::Prepared,
            pause_wait: PAUSE_WAIT,
            dirty_log: DirtyLog::default(),
        };
        for vcpu in 0..guest.workload.vcpus {
            let thread = guest.spawn(vcpu)?;
            guest.threads.push(thread);
        }
        Ok(guest)
    }

    fn spawn(&self, vcpu: u32) -> Result<(Pid, JoinHandle<()>), ProcessError> {
        let walker = Walker::new(&self.ram, &self.workload, vcpu);
        let board = Arc::clone(&self.board);
        let (send, receive) = mpsc::sync_channel(1);
        let body = move || {
            // Long thinks are slept in part; wake from them in time. Without it they
            // are only less exact.
            let _ = nix::sys::prctl::set_timerslack(1);
            let _ = send.send(nix::unistd::gettid());
            vcpu_thread(&board, &walker, vcpu as usize);
        };
        let handle = std::thread::Builder::new()
            .name(format!("vcpu-{vcpu}"))
            .spawn(body)
            .map_err(|source| ProcessError::Spawn { vcpu, source })?;
        let thread = receive.recv().map_err(|_| ProcessError::NoThread(vcpu))?;
        Ok((thread, handle))
    }

    /// Whether every vCPU has stopped for good: finished, or failed.
    pub fn ended(&self) -> bool {
        self.board.ended()
    }

    fn try_pause(&mut self) -> Result<(), ProcessError> {
        if self.phase == Phase::Running {
            self.board.pause(self.pause_wait)?;
            self.phase = Phase::Paused;
        }
        Ok(())
    }

    fn try_capture(&mut self) -> Result<Vec<u8>, ProcessError> {
        match self.phase {
            Phase::Prepared => return Err(ProcessError::NoState),
            Phase::Running => return Err(ProcessError::Running),
            Phase::Fresh | Phase::Paused => {}
        }
        let (clock, vcpus) = self.board.registers()?;
        let state = State {
            pages: self.ram.layout().pages(),
            pattern: self.workload.pattern,
            seed: self.workload.seed,
            zero_pages: self.workload.zero_pages,
            clock: clock.record(),
            vcpus,
        };
        Ok(state.seal()?)
    }

    fn try_restore(&mut self, bytes: &[u8]) -> Result<(), ProcessError> {
        if !matches!(self.phase, Phase::Prepared | Phase::Fresh) {
            return Err(ProcessError::HasRun);
        }
        let layout = self.ram.layout();
        let mut state = State::open(bytes, &self.workload, layout.pages())?;
        for (vcpu, registers) in state.vcpus.iter().enumerate() {
            if !registers.plausible(self.workload.slice(layout, vcpu as u32).pages) {
                return Err(StateError::Registers(vcpu).into());
            }
        }
        if self.workload.pattern == Pattern::Trace {
            state.vcpus.iter_mut().for_each(Registers::begin_trace_anew);
        }
        self.board.load(GuestClock::resume(&state.clock), state.vcpus);
        self.phase = Phase::Fresh;
        Ok(())
    }

    fn try_resume(&mut self) -> Result<(), ProcessError> {
        match self.phase {
            Phase::Prepared => return Err(ProcessError::NoState),
            Phase::Running => return Err(ProcessError::Running),
            Phase::Fresh | Phase::Paused => {}
        }
        self.board.resume()?;
        self.phase = Phase::Running;
        Ok(())
    }
}

/// What a vCPU's thread does all its life.
fn vcpu_thread(board: &Board, walker: &Walker, vcpu: usize) {
    while let Some(Job { mut registers, clock }) = board.next_job(vcpu) {
        let run = || walker.run(&mut registers, clock, board.stop());
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err();
        board.park(vcpu, (!panicked).then_some(registers));
    }
    board.leave(vcpu);
}

impl Guest for ProcessGuest {
    fn kind(&self) -> GuestKind {
        GuestKind::Process
    }

    fn workload(&self) -> &Workload {
        &self.workload
    }

    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn machine(&self) -> String {
        let Workload { pattern, seed, vcpus, zero_pages, .. } = &self.workload;
        let pages = self.ram.layout().pages();
        let trace = self.workload.trace.as_ref().map(|trace| trace.id().digest());
        format!(
            "process guest 2, {}, {vcpus} vCPUs, {pages} pages, {zero_pages} zero pages, \
             pattern {pattern:?}{}, seed {seed:#x}",
            std::env::consts::ARCH,
            trace.unwrap_or_default(),
        )
    }

    fn vcpu_threads(&self) -> Vec<Pid> {
        self.threads.iter().map(|(thread, _)| *thread).collect()
    }

    fn seeds(&self) -> Vec<PageIndex> {
        let vcpus = 0..self.workload.vcpus;
        vcpus.flat_map(|vcpu| [control_page(vcpu), histogram_page(vcpu)]).collect()
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.try_pause().map_err(guest_error("pause vCPUs"))
    }

    fn capture(&mut self) -> Result<Vec<u8>, GuestError> {
        self.try_capture().map_err(guest_error("capture vCPUs"))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.try_restore(state).map_err(guest_error("restore vCPUs"))
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.try_resume().map_err(guest_error("resume vCPUs"))
    }

    fn first_entry(&self) -> Option<Instant> {
        self.board.first_entry()
    }

    fn failure(&self) -> Option<String> {
        self.board.failure()
    }

    fn has_dirty_log(&self) -> bool {
        WriteLog::available().is_ok()
    }

    fn start_dirty_log(&mut self) -> Result<(), GuestError> {
        self.dirty_log.start(&self.ram).map_err(guest_error("log its writes"))
    }

    fn dirty_round(
        &mut self,
        by_this_process: &[PageIndex],
        into: &DirtyBitmap,
    ) -> Result<u64, GuestError> {
        let round = self.dirty_log.round(by_this_process, into);
        round.map_err(guest_error("read the log of its writes"))
    }

    fn stop_dirty_log(&mut self) -> Result<(), GuestError> {
        self.dirty_log.stop().map_err(guest_error("stop logging its writes"))
    }
}

impl Drop for ProcessGuest {
    fn drop(&mut self) {
        /// Longer than a nap of a thinking vCPU, or a slow page.
        const LEAVE_WAIT: Duration = Duration::from_secs(2);
        self.board.quit(LEAVE_WAIT);
        for (vcpu, (thread, handle)) in self.threads.drain(..).enumerate() {
            if self.board.has_left(vcpu) {
                let _ = handle.join();
            } else {
                tracing::warn!(%thread, "a vCPU waits for a page that does not come; left behind");
            }
        }
    }
}

#[cfg(test)]
mod tests;
