//! The reference VMM's process: a [`Guest`] behind the attach protocol on the source,
//! and behind the engine's [`DestinationVm`](crate::engine::vm::DestinationVm) on the
//! destination. A VMM of your own takes this module's place.

pub mod arrival;
pub mod departure;

use crate::memory::ram::GuestRam;
use crate::vmm::guest::{Guest, GuestError, GuestKind};
use crate::vmm::process::ProcessGuest;
use crate::vmm::workload::Workload;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The reference VMM's description of a guest, as JSON in the proposal: what the
/// destination must make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDescription {
    /// Which guest.
    pub kind: GuestKind,
    /// What it does.
    pub workload: Workload,
}

impl GuestDescription {
    /// As it travels.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a description is plain data")
    }
}

/// A new guest with its first memory content, ready to start.
pub fn new_guest(
    kind: GuestKind,
    ram: Arc<GuestRam>,
    workload: Workload,
) -> Result<Box<dyn Guest>, GuestError> {
    Ok(match kind {
        GuestKind::Kvm => Box::new(crate::vmm::kvm::KvmGuest::new(ram, workload)?),
        GuestKind::Process => Box::new(ProcessGuest::new(ram, workload)?),
    })
}

/// A guest without state over memory whose pages are missing.
pub fn prepare_guest(
    kind: GuestKind,
    ram: Arc<GuestRam>,
    workload: Workload,
) -> Result<Box<dyn Guest>, GuestError> {
    Ok(match kind {
        GuestKind::Kvm => Box::new(crate::vmm::kvm::KvmGuest::prepare(ram, workload)?),
        GuestKind::Process => Box::new(ProcessGuest::prepare(ram, workload)?),
    })
}
