//! A guest that arrives: the destination's side of the reference VMM.

use super::{GuestDescription, prepare_guest};
use crate::engine::error_chain;
use crate::engine::vm::{DestinationVm, GuestFigures, VmError};
use crate::failpoint::failpoint;
use crate::memory::ram::GuestRam;
use crate::proto::message::{Hello, Mismatch};
use crate::report::schema::Distribution;
use crate::vmm::clock::tsc_hz;
use crate::vmm::content::Instruments;
use crate::vmm::guest::{Guest, GuestKind};
use crate::vmm::kvm::{self, KvmError};
use crate::vmm::stalls::{self, StallCounts, StallFigures};
use crate::vmm::trace::Trace;
use crate::vmm::workload::{STATUS_FAILED, STATUS_FINISHED, STATUS_RUNNING, control};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// How long the first vCPU may take to enter the guest.
const ENTER_MAX: Duration = Duration::from_secs(10);
/// How long a guest may take to make its last step when it is asked to stop.
const STOP_MAX: Duration = Duration::from_secs(20);

/// The guest of a migration as it arrives; shared by the engine and the command.
#[derive(Clone, Default)]
pub struct Arrival {
    guest: Arc<Mutex<Option<Box<dyn Guest>>>>,
    paused: Arc<AtomicBool>,
    trace: Option<Arc<Trace>>,
}

/// What the proposal says that the guest is.
pub fn description(hello: &Hello) -> Result<GuestDescription, Mismatch> {
    serde_json::from_slice(&hello.guest).map_err(|error| {
        let theirs = String::from_utf8_lossy(&hello.guest).into_owned();
        Mismatch::new("the guest's description", theirs, format!("cannot read it: {error}"))
    })
}

impl Arrival {
    /// For a guest that replays this trace, too.
    pub fn with_trace(trace: Option<Arc<Trace>>) -> Self {
        Self { trace, ..Self::default() }
    }

    /// Gives the guest described the trace that it replays.
    fn add_trace(&self, description: &mut GuestDescription) -> Result<(), Mismatch> {
        let Some(theirs) = &description.trace else { return Ok(()) };
        let ours = self.trace.as_ref().filter(|ours| ours.id().digest() == theirs.digest());
        let here = || match &self.trace {
            Some(other) => other.id().to_string(),
            None => "none, see --trace of postcopy receive".to_owned(),
        };
        let ours = ours.ok_or_else(|| Mismatch::new("the trace", theirs, here()))?;
        description.workload.trace = Some(Arc::clone(ours));
        Ok(())
    }

    /// Whether the guest came paused. This does not know whether it was let run since.
    pub fn came_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// Takes the guest out, if it came.
    pub fn take(&self) -> Option<Box<dyn Guest>> {
        self.lock().take()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Box<dyn Guest>>> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DestinationVm for Arrival {
    fn prepare(&mut self, hello: &Hello, memory: GuestMemoryMmap) -> Result<String, Mismatch> {
        let mut description = description(hello)?;
        self.add_trace(&mut description)?;
        let GuestDescription { kind, ref workload, .. } = description;
        let refuse = |why: String| Mismatch::new("the guest", kind.name(), why);
        let ram = GuestRam::from_guest_memory(memory);
        let ram = Arc::new(ram.map_err(|error| refuse(error_chain(&error)))?);
        workload.check(ram.layout()).map_err(|error| refuse(error_chain(&error)))?;
        if workload.vcpus != u32::from(hello.vcpus) {
            return Err(Mismatch::new("vCPUs", hello.vcpus, workload.vcpus));
        }
        if kind == GuestKind::Kvm {
            kvm::kvm_available().map_err(refuse)?;
        }
        // Measured before the blackout, not in it.
        tsc_hz();
        failpoint!("vmm::before_prepare", return Err(refuse("a failpoint".into())));
        let guest = prepare_guest(description, ram).map_err(|error| {
            match error.source.downcast_ref::<KvmError>() {
                // It names what differs better than any text around it.
                Some(KvmError::Processor(mismatch)) => mismatch.clone(),
                _ => refuse(error_chain(&error)),
            }
        })?;
        failpoint!("vmm::after_prepare", return Err(refuse("a failpoint".into())));
        let machine = guest.machine();
        *self.lock() = Some(guest);
        Ok(machine)
    }

    fn vcpu_threads(&self) -> Vec<Pid> {
        self.lock().as_ref().map(|guest| guest.vcpu_threads()).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VmError> {
        let mut guest = self.lock();
        let guest = guest.as_mut().ok_or("there is no guest to restore")?;
        failpoint!("vmm::before_restore", return Err("a failpoint".into()));
        guest.restore(state)?;
        failpoint!("vmm::after_restore", return Err("a failpoint".into()));
        Ok(())
    }

    fn resume(&mut self) -> Result<Instant, VmError> {
        let mut guest = self.lock();
        let guest = guest.as_mut().ok_or("there is no guest to resume")?;
        failpoint!("vmm::before_enter", return Err("a failpoint".into()));
        guest.resume()?;
        failpoint!("vmm::after_enter", return Err("a failpoint".into()));
        let asked = Instant::now();
        loop {
            if let Some(entered) = guest.first_entry() {
                return Ok(entered);
            }
            if let Some(why) = guest.failure() {
                return Err(why.into());
            }
            if asked.elapsed() > ENTER_MAX {
                return Err("no vCPU entered the guest in time".into());
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    fn keep_paused(&mut self) -> Result<(), VmError> {
        self.paused.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn workload_ended(&mut self) -> bool {
        let guest = self.lock();
        let Some(guest) = guest.as_ref() else { return false };
        instruments(guest.as_ref()).all(|of| of.get(control::STATUS) != STATUS_RUNNING)
    }

    fn steps(&mut self) -> Option<u64> {
        let guest = self.lock();
        let guest = guest.as_ref()?;
        Some(instruments(guest.as_ref()).map(|of| of.get(control::STEPS)).sum())
    }

    fn figures(&mut self) -> GuestFigures {
        let guest = self.lock();
        let Some(guest) = guest.as_ref() else { return GuestFigures::default() };
        let vcpus = guest.workload().vcpus;
        let figures = stalls::GuestFigures::read(guest.ram(), vcpus, tsc_hz());
        GuestFigures {
            max_gap: Some(Duration::from_micros(figures.max_gap_us)),
            stalls: Some(distribution(&figures.stalls)),
        }
    }
}

/// The control pages of a guest whose control pages are placed.
fn instruments(guest: &dyn Guest) -> impl Iterator<Item = Instruments<'_>> {
    let ram = guest.ram();
    (0..guest.workload().vcpus).map(|vcpu| Instruments::new(ram, vcpu))
}

/// The stalls that a guest whose control pages are placed has counted so far.
pub fn stalls(guest: &dyn Guest) -> StallCounts {
    StallCounts::read(guest.ram(), guest.workload().vcpus)
}

/// Those that it has counted since.
pub fn stalls_since(guest: &dyn Guest, before: &StallCounts) -> Distribution {
    distribution(&stalls(guest).since(before).figures(tsc_hz()))
}

fn distribution(of: &StallFigures) -> Distribution {
    Distribution {
        count: of.count,
        mean: Some(of.mean),
        p50: Some(of.p50),
        p99: Some(of.p99),
        max: Some(of.max),
        ..Distribution::default()
    }
}

/// Asks each vCPU to stop between two steps, waits for it, and stops the guest.
/// Returns the steps that each vCPU made.
///
/// # Errors
/// A vCPU that found a wrong word in memory, or that does not stop.
pub fn finish(guest: &mut dyn Guest) -> Result<Vec<u64>, VmError> {
    for of in instruments(guest) {
        of.set(control::STOP_REQUEST, 1);
    }
    let asked = Instant::now();
    loop {
        if let Some(why) = guest.failure() {
            return Err(why.into());
        }
        let statuses: Vec<u64> = instruments(guest).map(|of| of.get(control::STATUS)).collect();
        if let Some(vcpu) = statuses.iter().position(|status| *status == STATUS_FAILED) {
            let of = Instruments::new(guest.ram(), vcpu as u32);
            return Err(format!(
                "vCPU {vcpu} found a wrong word in page {}: expected {:#x}, found {:#x}",
                of.get(control::FAILED_PAGE),
                of.get(control::FAILED_EXPECTED),
                of.get(control::FAILED_FOUND),
            )
            .into());
        }
        if statuses.iter().all(|status| *status == STATUS_FINISHED) {
            break;
        }
        if asked.elapsed() > STOP_MAX {
            return Err(format!("vCPUs did not finish their step in time: {statuses:?}").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    guest.pause()?;
    Ok(instruments(guest).map(|of| of.get(control::STEPS)).collect())
}
