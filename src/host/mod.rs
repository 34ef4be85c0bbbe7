//! The reference VMM's process: a [`Guest`] behind the attach protocol on the source,
//! and behind the engine's [`DestinationVm`](crate::engine::vm::DestinationVm) on the
//! destination. A VMM of your own takes this module's place.

pub mod arrival;
pub mod departure;

use crate::memory::ram::GuestRam;
use crate::vmm::guest::{DirtyLogChoice, Guest, GuestError, GuestKind};
use crate::vmm::kvm::KvmGuest;
use crate::vmm::kvm::processor::Processor;
use crate::vmm::process::ProcessGuest;
use crate::vmm::trace::TraceId;
use crate::vmm::workload::Workload;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The reference VMM's description of a guest, as JSON in the proposal: what the
/// destination must make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestDescription {
    /// Which guest.
    pub kind: GuestKind,
    /// What it does, and on what machine.
    pub workload: Workload,
    /// The trace that it replays, if it replays one: what is in it the destination must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<TraceId>,
    /// The processor that it sees, if it is a virtual one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processor: Option<Processor>,
}

impl GuestDescription {
    /// As it travels.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a description is plain data")
    }
}

/// A new guest with its first memory content, ready to start, whose writes are logged as
/// chosen once they are.
///
/// # Errors
/// Also a log that there is not for a guest of this kind.
pub fn new_guest(
    kind: GuestKind,
    ram: Arc<GuestRam>,
    workload: Workload,
    dirty_log: DirtyLogChoice,
) -> Result<Box<dyn Guest>, GuestError> {
    Ok(match (kind, dirty_log) {
        (GuestKind::Kvm, _) => Box::new(KvmGuest::with_dirty_log(ram, workload, dirty_log)?),
        (GuestKind::Process, DirtyLogChoice::Auto) => Box::new(ProcessGuest::new(ram, workload)?),
        (GuestKind::Process, of_kvm) => {
            let action = format!("log its writes by {:?}", of_kvm.name());
            return Err(GuestError { kind, action, source: "that log is one of KVM's".into() });
        }
    })
}

/// The guest described, without state, over memory whose pages are missing.
pub fn prepare_guest(
    description: GuestDescription,
    ram: Arc<GuestRam>,
) -> Result<Box<dyn Guest>, GuestError> {
    let GuestDescription { kind, workload, processor, .. } = description;
    Ok(match (kind, processor) {
        (GuestKind::Kvm, Some(processor)) => {
            Box::new(KvmGuest::prepare_with(ram, workload, &processor)?)
        }
        (GuestKind::Kvm, None) => Box::new(KvmGuest::prepare(ram, workload)?),
        (GuestKind::Process, _) => Box::new(ProcessGuest::prepare(ram, workload)?),
    })
}

#[cfg(test)]
mod tests;
