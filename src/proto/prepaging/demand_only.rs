//! No pre-paging: pages go when they are asked for, until a drain sends the rest.
//! The floor that the other policies are measured against.

use super::{Fault, LinkState, Origin, Policy, Suggestion, Unsent, run_around};

/// Pushes nothing until [`drain`](Policy::drain), then all that is left in
/// rising order.
#[derive(Clone, Debug, Default)]
pub struct DemandOnly {
    /// Where the drain goes on; `None` before it began.
    drain_from: Option<u64>,
}

impl DemandOnly {
    /// A policy that waits for its drain.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Policy for DemandOnly {
    fn name(&self) -> &'static str {
        "demand-only"
    }

    fn fault(&mut self, _: Fault) {}

    fn late_hit(&mut self, _: Fault) {}

    fn link(&mut self, _: LinkState) {}

    fn drain(&mut self) {
        self.drain_from.get_or_insert(0);
    }

    fn next(&mut self, unsent: &dyn Unsent, pages_max: u32) -> Option<Suggestion> {
        let from = self.drain_from.as_mut()?;
        let run = run_around(unsent, *from, pages_max)?;
        *from = run.end();
        Some(Suggestion { run, origin: Origin::Drain })
    }
}
