//! The fault server: attach to a VMM's guest and move it, holding the guest's memory
//! until the destination has it all: once committed, it does not need the VMM's process.
//!
//! [`FaultServer::attach`], then [`FaultServer::run`]. The `fault-server` program and
//! `postcopy migrate` are this with a display; neither is needed to use it.

pub mod arguments;

use crate::attach::client::{AttachError, Attached};
use crate::engine::attached::{AttachedVmm, GivenAway};
use crate::engine::event::Event;
use crate::engine::source::{Canceller, Migration, SourceConfig, SourceEnd};
use crate::proto::prepaging::PolicyKind;
use crate::proto::source::SessionLimits;
use crate::transport::{LinkOptions, Ticket, TransportError};
use std::path::Path;
use std::time::Duration;

/// Which pages are pushed, and when.
#[derive(Clone, Debug, Default)]
pub struct PushPlan {
    /// The pre-paging policy.
    pub policy: PolicyKind,
    /// Pivots of the bubbling policy.
    pub pivots: Option<usize>,
    /// When to push all that is left, counted from the guest's first instruction at the
    /// destination.
    pub drain_after: Option<Duration>,
}

/// Why a fault server cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum FaultServerError {
    /// There is no VMM, or it does not hand its guest over.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The guest left before.
    #[error(transparent)]
    GivenAway(#[from] GivenAway),
}

/// A fault server that is attached to its guest and has not begun to move it.
#[derive(Debug)]
pub struct FaultServer {
    vmm: AttachedVmm,
    migration: Migration,
}

impl FaultServer {
    /// Attaches to the VMM whose control socket is at `control`; the guest runs on.
    ///
    /// # Errors
    /// As [`Attached::connect`], and if the VMM's guest has left already.
    pub fn attach(
        control: &Path,
        ticket: Ticket,
        plan: PushPlan,
    ) -> Result<Self, FaultServerError> {
        let attached = Attached::connect(control)?;
        let config = source_config(&attached, ticket, plan);
        let migration = Migration::new(config, attached.ram.clone());
        Ok(Self { vmm: AttachedVmm::new(attached)?, migration })
    }

    /// A handle that stops it, for as long as nothing is committed.
    pub fn canceller(&self) -> Canceller {
        self.migration.canceller()
    }

    /// Moves the guest. Blocks until the session is over; `watch` is called with each
    /// event, and must return at once.
    ///
    /// # Errors
    /// As [`Migration::run`]: only if no thread could be made.
    pub fn run(
        self,
        watch: impl FnMut(Event) + Send + 'static,
    ) -> Result<SourceEnd, TransportError> {
        let mut end = self.migration.on_event(watch).run(Box::new(self.vmm))?;
        // Nobody asks the VMM for anything any more: the conversation ends here.
        end.vm = None;
        Ok(end)
    }
}

/// What the engine must know, from what the VMM says of its guest.
fn source_config(attached: &Attached, ticket: Ticket, plan: PushPlan) -> SourceConfig {
    let guest = attached.guest.clone();
    SourceConfig {
        ticket,
        link: LinkOptions::default(),
        limits: SessionLimits::default(),
        policy: plan.policy,
        pivots: plan.pivots,
        drain_after: plan.drain_after,
        machine: attached.machine.clone(),
        workload: workload_name(&guest.workload_json),
        guest: guest.workload_json.into_bytes(),
        vcpus: guest.vcpus as u16,
        guest_kind: guest.kind,
    }
}

/// The name of the guest's workload, for the report, if its VMM gives it one.
fn workload_name(description: &str) -> Option<String> {
    let description: serde_json::Value = serde_json::from_str(description).ok()?;
    Some(description.pointer("/workload/pattern")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_of_any_vmm_may_have_a_workload_without_a_name() {
        let named = r#"{"kind":"kvm","workload":{"pattern":"random","seed":1}}"#;
        assert_eq!(workload_name(named).as_deref(), Some("random"));
        for other in ["", "not JSON", "{}", "[1]", r#"{"workload":{"pattern":7}}"#] {
            assert_eq!(workload_name(other), None, "{other}");
        }
    }
}
