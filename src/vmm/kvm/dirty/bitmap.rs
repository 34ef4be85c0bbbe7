//! KVM's bitmap of each memory slot: a bit for each page, set when it is written.
//!
//! `KVM_GET_DIRTY_LOG` returns it and, unless that was told not to, clears it and takes away
//! write access to its pages, in one go. With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` that is
//! `KVM_CLEAR_DIRTY_LOG`'s, for a part of the pages at a time: a vCPU that needs the lock of
//! the machine's page tables waits for a part and not for the whole.

use super::slots;
use crate::proto::page::PageRun;
use crate::vmm::kvm::error::{KvmError, call};
use crate::vmm::kvm::machine::Machine;
use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1};
use kvm_ioctls::VmFd;
use std::os::fd::AsRawFd;

/// How many pages are cleared at a time; KVM wants whole words.
const CLEAR_PAGES: usize = 64 * CLEAR_WORDS;
const CLEAR_WORDS: usize = 256;

nix::ioctl_readwrite!(kvm_clear, KVMIO, 0xC0, kvm_clear_dirty_log);

/// When KVM takes a page out of its bitmap.
#[derive(Clone, Copy, Debug)]
pub enum Clearing {
    /// When the bitmap is read.
    AtOnce,
    /// When it is told to.
    InParts {
        /// Whether all bits are set, and no page protected, when logging begins.
        initially_set: bool,
    },
}

impl Clearing {
    /// Completes the beginning of a log: nothing is logged after this.
    pub fn begin(self, machine: &Machine) -> Result<(), KvmError> {
        if let Self::InParts { initially_set: true } = self {
            // KVM has protected nothing: here it does so, part by part.
            for (slot, run) in slots(machine) {
                let mut all = vec![u64::MAX; run.count().div_ceil(64) as usize];
                clear(machine.vm(), slot, run, &mut all)?;
            }
        }
        Ok(())
    }

    /// Takes what was written out of the log of a slot with these pages: a bit for each.
    pub fn take(self, vm: &VmFd, slot: u32, run: PageRun) -> Result<Vec<u64>, KvmError> {
        let log = vm.get_dirty_log(slot, run.bytes());
        let mut log = log.map_err(call("KVM_GET_DIRTY_LOG"))?;
        if let Self::InParts { .. } = self {
            // What is written between the two calls is cleared only if it was set before, and
            // whoever takes its bit reads the page after this.
            clear(vm, slot, run, &mut log)?;
        }
        Ok(log)
    }
}

/// Clears the bits in KVM's log that are set in `log`, and protects those pages.
fn clear(vm: &VmFd, slot: u32, run: PageRun, log: &mut [u64]) -> Result<(), KvmError> {
    let parts = log.chunks_mut(CLEAR_WORDS).zip((0..run.count()).step_by(CLEAR_PAGES));
    for (part, first_page) in parts.filter(|(part, _)| part.iter().any(|word| *word != 0)) {
        let num_pages = (run.count() - first_page).min(CLEAR_PAGES as u64) as u32;
        let dirty_bitmap = part.as_mut_ptr().cast();
        let mut range = kvm_clear_dirty_log {
            slot,
            num_pages,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap },
        };
        // SAFETY: the structure is the one that the ioctl takes, and its bitmap has a bit for
        // each of its pages, in whole words.
        let cleared = unsafe { kvm_clear(vm.as_raw_fd(), &mut range) };
        cleared
            .map_err(|errno| call("KVM_CLEAR_DIRTY_LOG")(kvm_ioctls::Error::new(errno as i32)))?;
    }
    Ok(())
}
