//! [`DirtyLog`]: which pages of the machine were written, from KVM's log of each memory
//! slot.
//!
//! KVM logs what vCPUs write and what it writes itself on their account (a clock page,
//! steal time), page by page of 4 KiB. It does not see what this process writes through
//! its own mapping: that is the caller's to add. Switching the log on has KVM take away
//! write access to all memory, so the guest pays for a fault on each page's first write of
//! each round.

use super::error::{KvmError, call};
use super::machine::Machine;
use crate::memory::dirty_bitmap::DirtyBitmap;
use crate::proto::page::{PageIndex, PageRun};
use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;

/// Whether a machine's writes are logged.
#[derive(Debug, Default)]
pub struct DirtyLog {
    on: bool,
}

impl DirtyLog {
    /// Begins to log, with nothing logged.
    pub fn start(&mut self, machine: &Machine) -> Result<(), KvmError> {
        // KVM keeps the log of a slot that is logged already, and drops it with the flag.
        self.stop(machine)?;
        self.on = true;
        machine.set_slots(KVM_MEM_LOG_DIRTY_PAGES).inspect_err(|_| {
            // Some slots may be logged; the first failure is the one to tell.
            let _ = self.stop(machine);
        })
    }

    /// Folds what was written since the last round into `bitmap`, and with it the pages
    /// that this process wrote; returns how many pages those are together.
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
        for (slot, (_, run)) in (0..).zip(machine.ram().layout().region_runs()) {
            let log = machine.vm().get_dirty_log(slot, run.bytes());
            let mut log = log.map_err(call("KVM_GET_DIRTY_LOG"))?;
            mark(&mut log, run, by_this_process);
            pages += bitmap.fold(run, &log);
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

/// Sets the bits of those `pages` that are in `run`, whose log this is.
fn mark(log: &mut [u64], run: PageRun, pages: &[PageIndex]) {
    for page in pages.iter().filter(|page| run.contains(**page)) {
        let bit = page.get() - run.first().get();
        if let Some(word) = log.get_mut((bit / 64) as usize) {
            *word |= 1 << (bit % 64);
        }
    }
}
