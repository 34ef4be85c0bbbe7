//! [`KvmError`]: what can go wrong between this process and KVM, by name.

use super::envelope::EnvelopeError;
use super::tables::LayoutUnsupported;
use crate::proto::message::Mismatch;
use crate::vmm::workload::WorkloadError;
use std::time::Duration;

/// A failure of the KVM guest.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// KVM is not there, not allowed, or lacks what the guest needs.
    #[error("KVM cannot be used: {0}")]
    Unavailable(String),
    /// An ioctl failed.
    #[error("{call} failed")]
    Call {
        /// The ioctl's name.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A failure that concerns one vCPU.
    #[error("vCPU {vcpu}")]
    Vcpu {
        /// Which.
        vcpu: u32,
        /// How.
        #[source]
        source: Box<KvmError>,
    },
    /// An MSR that could be read when the vCPU was made cannot be read now.
    #[error("KVM_GET_MSRS refuses MSR {0:#x}")]
    ReadMsr(u32),
    /// An MSR in a guest's state is refused by this host.
    #[error("KVM_SET_MSRS refuses MSR {0:#x}")]
    WriteMsr(u32),
    /// More MSRs than KVM takes at a time.
    #[error("{0} MSRs are more than KVM takes")]
    TooManyMsrs(usize),
    /// This host cannot show the guest the processor that it has seen so far.
    #[error(transparent)]
    Processor(#[from] Mismatch),
    /// The guest's tables cannot describe its memory.
    #[error(transparent)]
    Layout(#[from] LayoutUnsupported),
    /// The workload does not fit the memory.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// A state that is not one, or not one for this guest.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// A signal could not be prepared or sent.
    #[error("cannot {action} the signal that stops vCPUs")]
    Signal {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// A thread could not be made.
    #[error("cannot start a vCPU thread")]
    Thread(#[source] std::io::Error),
    /// A vCPU did not stop: it waits in the kernel for a page of guest memory.
    #[error("vCPU {vcpu} did not stop within {waited:?}: it may wait for a missing page")]
    NotStopping {
        /// Which.
        vcpu: u32,
        /// For how long it was waited for.
        waited: Duration,
    },
    /// A vCPU thread gave no answer.
    #[error("vCPU {vcpu} gave no answer within {waited:?}: it may wait for a missing page")]
    NoAnswer {
        /// Which.
        vcpu: u32,
        /// For how long it was waited for.
        waited: Duration,
    },
    /// A call that makes no sense in the guest's present phase.
    #[error("the guest is {is}; this needs it {needed}")]
    Phase {
        /// What it is.
        is: &'static str,
        /// What it would have to be.
        needed: &'static str,
    },
    /// An entry of a dirty ring that names no page.
    #[error("a dirty ring names page {page} of memory slot {slot}, which is not there")]
    DirtyRing {
        /// The memory slot.
        slot: usize,
        /// The page in it.
        page: usize,
    },
    /// A round of a dirty log that was not started.
    #[error("its writes are not logged")]
    NotLogging,
    /// A vCPU ended in an error earlier.
    #[error("a vCPU has failed: {0}")]
    Failed(String),
}

/// Names the vCPU in a failure of it.
pub(super) fn of_vcpu(vcpu: u32) -> impl Fn(KvmError) -> KvmError {
    move |error| KvmError::Vcpu { vcpu, source: error.into() }
}

/// Names the ioctl in a failure of it.
pub(super) fn call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { call, source }
}
