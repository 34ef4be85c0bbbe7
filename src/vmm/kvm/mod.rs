//! The KVM reference guest: a virtual machine whose program works through its memory by
//! the specification in [`workload`](super::workload).
//!
//! It is no machine for operating systems: no firmware, no kernel, no devices but the
//! in-kernel interrupt controllers, timers and clock. Its program runs in long mode, at CPL 3
//! with a few stubs of two or three instructions at CPL 0, or at CPL 0 altogether.
//!
//! | file | concept |
//! |---|---|
//! | `machine` | the VM: memory slots, interrupt controllers, vCPUs |
//! | `processor`, `features` | what processor the guest sees, and whether a host can show it |
//! | `tables` | the guest's address space, page and descriptor tables |
//! | `payload`, `payload_asm` | the guest's program |
//! | `image` | its memory at the beginning |
//! | `boot` | a vCPU's first registers |
//! | `dirty` | the log of what was written |
//! | `vcpu` | a vCPU's thread: run, kick, park |
//! | `signals` | kicking a thread, losing memory |
//! | `state` | capture and restore |
//! | `envelope` | a state's format on its way |
//!
//! The process's SIGRTMIN belongs to this module once a guest was made, and SIGBUS
//! passes through it.

mod boot;
mod dirty;
pub mod envelope;
mod error;
mod features;
pub mod image;
mod machine;
mod payload;
mod payload_asm;
pub mod processor;
mod signals;
pub mod state;
mod tables;
mod vcpu;

pub use error::KvmError;
pub use tables::LayoutUnsupported;

use super::guest::{DirtyLogChoice, Guest, GuestError, GuestKind};
use super::workload::Workload;
use crate::memory::dirty_bitmap::DirtyBitmap;
use crate::memory::ram::GuestRam;
use crate::proto::page::PageIndex;
use dirty::DirtyLog;
use machine::Machine;
use nix::unistd::Pid;
use processor::Processor;
use state::{GuestState, VmState};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vcpu::{FirstEntry, Vcpu};

/// How long `pause` waits for a vCPU that does not stop.
pub const PAUSE_WAIT_MAX: Duration = Duration::from_secs(10);
/// How long `capture` and `restore` wait for a vCPU's thread.
pub const STATE_WAIT_MAX: Duration = Duration::from_secs(30);
/// The most seed pages that a guest names.
const SEEDS_MAX: usize = 32;

/// Says in one line why there can be no KVM guest here, if so.
pub fn kvm_available() -> Result<(), String> {
    machine::open().map(drop).map_err(|error| error.to_string())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Made for a destination: there is nothing to run yet.
    Prepared,
    /// Its state is complete, and it does not run.
    Paused,
    /// It runs, or was told to stop and has not done so in time.
    Running,
    /// A restore failed half-way.
    Broken,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Prepared => "prepared",
            Phase::Paused => "paused",
            Phase::Running => "running",
            Phase::Broken => "half restored",
        }
    }
}

/// A virtual machine under KVM.
///
/// Dropping it ends its threads. Before that, memory registered with userfaultfd should
/// be unregistered, or its faults be served by another thread than the one that drops:
/// the kernel's own accesses to a missing page can be waited for, but not interrupted.
pub struct KvmGuest {
    /// Before `machine`: the threads end while the memory slots stand.
    vcpus: Vec<Vcpu>,
    machine: Machine,
    workload: Workload,
    first_entry: Arc<FirstEntry>,
    phase: Phase,
    dirty_log: DirtyLog,
}

impl KvmGuest {
    /// A guest at its beginning: memory filled, vCPUs set up, to be started by `resume`.
    pub fn new(ram: Arc<GuestRam>, workload: Workload) -> Result<Self, GuestError> {
        Self::with_dirty_log(ram, workload, DirtyLogChoice::Auto)
    }

    /// The same, its writes logged as chosen, once they are.
    ///
    /// # Errors
    /// Also if KVM does not have that log.
    pub fn with_dirty_log(
        ram: Arc<GuestRam>,
        workload: Workload,
        dirty_log: DirtyLogChoice,
    ) -> Result<Self, GuestError> {
        Self::make(ram, workload, None, Phase::Paused, dirty_log)
            .map_err(failed("create the machine"))
    }

    /// A guest to put a state into: everything exists, and neither this nor anything
    /// before `restore` touches guest memory. It sees this host's processor.
    pub fn prepare(ram: Arc<GuestRam>, workload: Workload) -> Result<Self, GuestError> {
        Self::make(ram, workload, None, Phase::Prepared, DirtyLogChoice::Auto)
            .map_err(failed("prepare the machine"))
    }

    /// The same for a guest that has seen `processor` so far, and goes on seeing it.
    ///
    /// # Errors
    /// With a [`KvmError::Processor`] as its source if this host cannot show it.
    pub fn prepare_with(
        ram: Arc<GuestRam>,
        workload: Workload,
        processor: &Processor,
    ) -> Result<Self, GuestError> {
        Self::make(ram, workload, Some(processor), Phase::Prepared, DirtyLogChoice::Auto)
            .map_err(failed("prepare the machine"))
    }

    fn make(
        ram: Arc<GuestRam>,
        workload: Workload,
        processor: Option<&Processor>,
        phase: Phase,
        dirty_log: DirtyLogChoice,
    ) -> Result<Self, KvmError> {
        let (machine, fds) = Machine::create(Arc::clone(&ram), &workload, processor, dirty_log)?;
        if phase == Phase::Paused {
            image::write(&ram, &workload, machine.tsc_hz())?;
            machine.set_up(&fds)?;
        }
        let dirty_log = DirtyLog::new(&machine, &fds)?;
        let first_entry = Arc::new(FirstEntry::new());
        let start = |(vcpu, fd)| {
            let (ram, first_entry) = (Arc::clone(&ram), Arc::clone(&first_entry));
            Vcpu::start(vcpu, fd, machine.shape(vcpu), ram, first_entry, dirty_log.rings())
        };
        let vcpus = (0..).zip(fds).map(start).collect::<Result<_, _>>()?;
        Ok(Self { vcpus, machine, workload, first_entry, phase, dirty_log })
    }

    fn require(&self, phases: &[Phase], needed: &'static str) -> Result<(), KvmError> {
        if let Some(reason) = self.failure() {
            return Err(KvmError::Failed(reason));
        }
        if phases.contains(&self.phase) {
            return Ok(());
        }
        Err(KvmError::Phase { is: self.phase.name(), needed })
    }

    fn stop_vcpus(&self, limit: Duration) -> Result<(), KvmError> {
        self.vcpus.iter().try_for_each(Vcpu::kick)?;
        let deadline = Instant::now() + limit;
        let left = || deadline.saturating_duration_since(Instant::now());
        let parked = self.vcpus.iter().try_for_each(|vcpu| vcpu.wait_parked(left()));
        parked.map_err(|error| match error {
            // What was left for it of the time that all of them had says nothing.
            KvmError::NotStopping { vcpu, .. } => KvmError::NotStopping { vcpu, waited: limit },
            error => error,
        })
    }

    /// The same; if one of them does not stop, all run on.
    fn stop_all_or_none(&self, limit: Duration) -> Result<(), KvmError> {
        let stopped = self.stop_vcpus(limit);
        if stopped.is_err() {
            self.vcpus.iter().try_for_each(Vcpu::run_on)?;
        }
        stopped
    }

    fn take_state(&self) -> Result<Vec<u8>, KvmError> {
        self.require(&[Phase::Paused], "paused")?;
        let answers = self.vcpus.iter().map(Vcpu::capture).collect::<Result<Vec<_>, _>>()?;
        let vm = VmState::capture(self.machine.vm())?;
        let vcpus = answers.into_iter().map(|answer| answer.wait(STATE_WAIT_MAX));
        let state = GuestState { vm, vcpus: vcpus.collect::<Result<_, _>>()? };
        Ok(envelope::seal(&state)?)
    }

    fn put_state(&mut self, bytes: &[u8]) -> Result<(), KvmError> {
        self.require(&[Phase::Prepared], "prepared and not restored yet")?;
        let state = envelope::open(bytes, self.vcpus.len())?;
        for (vcpu, state) in state.vcpus.iter().enumerate() {
            if state.cpuid != self.machine.shape(vcpu as u32).cpuid.as_slice() {
                return Err(envelope::EnvelopeError::Cpuid(vcpu).into());
            }
        }
        self.phase = Phase::Broken;
        state.vm.restore(self.machine.vm())?;
        let pairs = self.vcpus.iter().zip(state.vcpus);
        let answers: Vec<_> = pairs.map(|(vcpu, state)| vcpu.restore(state)).collect();
        for answer in answers {
            answer?.wait(STATE_WAIT_MAX)?;
        }
        self.phase = Phase::Paused;
        Ok(())
    }
}

impl Guest for KvmGuest {
    fn kind(&self) -> GuestKind {
        GuestKind::Kvm
    }

    fn workload(&self) -> &Workload {
        &self.workload
    }

    fn ram(&self) -> &Arc<GuestRam> {
        self.machine.ram()
    }

    fn machine(&self) -> String {
        self.machine.describe()
    }

    fn vcpu_threads(&self) -> Vec<Pid> {
        self.vcpus.iter().map(Vcpu::tid).collect()
    }

    fn seeds(&self) -> Vec<PageIndex> {
        self.machine.seeds().iter().copied().take(SEEDS_MAX).collect()
    }

    fn processor(&self) -> Option<&Processor> {
        Some(self.machine.processor())
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        if self.phase == Phase::Running {
            self.stop_all_or_none(PAUSE_WAIT_MAX).map_err(failed("pause its vCPUs"))?;
            self.phase = Phase::Paused;
        }
        self.require(&[Phase::Paused], "running or paused").map_err(failed("pause"))
    }

    fn capture(&mut self) -> Result<Vec<u8>, GuestError> {
        self.take_state().map_err(failed("capture its state"))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.put_state(state).map_err(failed("restore its state"))
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.require(&[Phase::Paused], "paused").map_err(failed("resume"))?;
        self.first_entry.clear();
        self.phase = Phase::Running;
        self.vcpus.iter().try_for_each(Vcpu::resume).map_err(failed("resume its vCPUs"))
    }

    fn first_entry(&self) -> Option<Instant> {
        self.first_entry.get()
    }

    fn failure(&self) -> Option<String> {
        self.vcpus.iter().find_map(Vcpu::failure)
    }

    fn has_dirty_log(&self) -> bool {
        true
    }

    fn start_dirty_log(&mut self) -> Result<(), GuestError> {
        self.dirty_log.start(&self.machine).map_err(failed("log its writes"))
    }

    fn dirty_round(
        &mut self,
        by_this_process: &[PageIndex],
        into: &DirtyBitmap,
    ) -> Result<u64, GuestError> {
        let nudge = || match self.dirty_log.rings() {
            // KVM sees to it by itself when a bitmap is read.
            None => Ok(()),
            Some(_) => self.vcpus.iter().try_for_each(Vcpu::nudge),
        };
        let round =
            nudge().and_then(|()| self.dirty_log.round(&self.machine, by_this_process, into));
        round.map_err(failed("read the log of its writes"))
    }

    fn stop_dirty_log(&mut self) -> Result<(), GuestError> {
        self.dirty_log.stop(&self.machine).map_err(failed("stop logging its writes"))
    }
}

fn failed(action: &'static str) -> impl Fn(KvmError) -> GuestError {
    move |error| GuestError { kind: GuestKind::Kvm, action: action.into(), source: error.into() }
}

#[cfg(test)]
mod tests;
