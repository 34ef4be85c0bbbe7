//! [`DirtyLog`]: which pages of the machine were written, by one of KVM's three logs.
//!
//! KVM logs what vCPUs write and what it writes itself on their account (a clock page,
//! steal time), page by page of 4 KiB. It does not see what this process writes through
//! its own mapping: that is the caller's to add. To notice a write, KVM takes away write access
//! to the page, so the guest pays for a fault on each page's first write of each round.
//!
//! | file | log |
//! |---|---|
//! | `bitmap` | KVM's bitmap of each memory slot, read and cleared at once or one after the other |
//! | `ring` | a ring for each vCPU, into which KVM puts each page that is written |
//!
//! Which one is settled when the machine is made: rings must be there before its vCPUs, and
//! with them there are no bitmaps.

mod bitmap;
mod ring;

pub use ring::Rings;

use super::error::{KvmError, call};
use super::machine::Machine;
use crate::memory::dirty_bitmap::DirtyBitmap;
use crate::proto::page::{PageIndex, PageRun};
use crate::vmm::guest::DirtyLogChoice;
use bitmap::Clearing;
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use std::sync::Arc;

/// A machine's log, settled and not begun.
#[derive(Clone, Copy, Debug)]
pub enum Method {
    /// KVM's bitmaps.
    Bitmap(Clearing),
    /// Rings of so many bytes.
    Ring(usize),
}

impl Method {
    /// Settles how the writes of a machine with so many pages are logged, before it has vCPUs.
    ///
    /// # Errors
    /// If KVM does not have what was chosen.
    pub fn settle(vm: &VmFd, choice: DirtyLogChoice, pages: u64) -> Result<Self, KvmError> {
        match choice {
            DirtyLogChoice::Bitmap => Ok(Self::Bitmap(Clearing::AtOnce)),
            DirtyLogChoice::Manual => manual(vm)?
                .ok_or_else(|| lacks("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "the manual dirty log")),
            DirtyLogChoice::Ring => ring(vm, pages)?
                .ok_or_else(|| lacks("KVM_CAP_DIRTY_LOG_RING_ACQ_REL", "the dirty ring")),
            DirtyLogChoice::Auto => Ok(manual(vm)?.unwrap_or(Self::Bitmap(Clearing::AtOnce))),
        }
    }
}

fn lacks(capability: &str, what: &str) -> KvmError {
    KvmError::Unavailable(format!("it lacks {capability}, which {what} needs"))
}

/// Has KVM clear its bitmap only when it is told to, if it offers that.
fn manual(vm: &VmFd) -> Result<Option<Method>, KvmError> {
    let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()) as u32;
    if offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
        return Ok(None);
    }
    let initially_set = offered & KVM_DIRTY_LOG_INITIALLY_SET;
    let flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | initially_set;
    enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags.into())
        .map_err(call("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))?;
    Ok(Some(Method::Bitmap(Clearing::InParts { initially_set: initially_set != 0 })))
}

/// Has KVM make a ring for each vCPU that the machine gets, if it offers that.
fn ring(vm: &VmFd, pages: u64) -> Result<Option<Method>, KvmError> {
    let bytes_max = vm.check_extension_raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into());
    let bytes = ring::bytes_for(pages).min(usize::try_from(bytes_max).unwrap_or(0));
    if bytes == 0 {
        return Ok(None);
    }
    enable(vm, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, bytes as u64)
        .map_err(call("KVM_CAP_DIRTY_LOG_RING_ACQ_REL"))?;
    Ok(Some(Method::Ring(bytes)))
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    let mut capability = kvm_enable_cap { cap, ..kvm_enable_cap::default() };
    capability.args[0] = argument;
    vm.enable_cap(&capability)
}

/// Where KVM's log is.
#[derive(Clone)]
enum Source {
    Bitmap(Clearing),
    Rings(Arc<Rings>),
}

/// Whether a machine's writes are logged, and how.
pub struct DirtyLog {
    source: Source,
    on: bool,
}

impl DirtyLog {
    /// The log of a machine with these vCPUs; nothing is logged yet.
    pub fn new(machine: &Machine, vcpus: &[VcpuFd]) -> Result<Self, KvmError> {
        let source = match machine.dirty_method() {
            Method::Bitmap(clearing) => Source::Bitmap(clearing),
            Method::Ring(bytes) => Source::Rings(Arc::new(Rings::new(machine, vcpus, bytes)?)),
        };
        Ok(Self { source, on: false })
    }

    /// The rings, which a vCPU's thread must empty when its own is full.
    pub fn rings(&self) -> Option<Arc<Rings>> {
        match &self.source {
            Source::Bitmap(_) => None,
            Source::Rings(rings) => Some(Arc::clone(rings)),
        }
    }

    /// Begins to log, with nothing logged.
    pub fn start(&mut self, machine: &Machine) -> Result<(), KvmError> {
        // KVM keeps the log of a slot that is logged already, and drops it with the flag.
        self.stop(machine)?;
        self.on = true;
        let started = match &self.source {
            Source::Bitmap(clearing) => log_slots(machine).and_then(|()| clearing.begin(machine)),
            Source::Rings(rings) => rings.forget().and_then(|()| log_slots(machine)),
        };
        started.inspect_err(|_| {
            // Some slots may be logged; the first failure is the one to tell.
            let _ = self.stop(machine);
        })
    }

    /// Folds what was written since the last round into `bitmap`, and with it the pages
    /// that this process wrote; returns how many pages those are together.
    ///
    /// On a processor that logs writes in a buffer of its own, what a running vCPU wrote last
    /// may be in the next round.
    pub fn round(
        &self,
        machine: &Machine,
        by_this_process: &[PageIndex],
        bitmap: &DirtyBitmap,
    ) -> Result<u64, KvmError> {
        if !self.on {
            return Err(KvmError::NotLogging);
        }
        let mut pages = 0;
        let mut fold = |run: PageRun, mut log: Vec<u64>| {
            mark(&mut log, run, by_this_process);
            pages += bitmap.fold(run, &log);
        };
        match &self.source {
            Source::Bitmap(clearing) => {
                for (slot, run) in slots(machine) {
                    fold(run, clearing.take(machine.vm(), slot, run)?);
                }
            }
            Source::Rings(rings) => {
                slots(machine).zip(rings.take()?).for_each(|((_, run), log)| fold(run, log));
            }
        }
        Ok(pages)
    }

    /// Logs no more.
    pub fn stop(&mut self, machine: &Machine) -> Result<(), KvmError> {
        if self.on {
            machine.set_slots(0)?;
            self.on = false;
        }
        Ok(())
    }
}

fn log_slots(machine: &Machine) -> Result<(), KvmError> {
    machine.set_slots(KVM_MEM_LOG_DIRTY_PAGES)
}

/// The machine's memory slots and their pages.
fn slots(machine: &Machine) -> impl Iterator<Item = (u32, PageRun)> {
    (0..).zip(machine.ram().layout().region_runs()).map(|(slot, (_, run))| (slot, run))
}

/// Sets the bits of those `pages` that are in `run`, whose log this is.
fn mark(log: &mut [u64], run: PageRun, pages: &[PageIndex]) {
    for page in pages.iter().filter(|page| run.contains(**page)) {
        let bit = page.get() - run.first().get();
        if let Some(word) = log.get_mut((bit / 64) as usize) {
            *word |= 1 << (bit % 64);
        }
    }
}
