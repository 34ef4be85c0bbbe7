//! Upward from the last fault, as QEMU's post-copy pushes: the peer that a
//! better policy has to beat.

use super::{Fault, LinkState, Origin, Policy, PolicyConfig, Suggestion, Unsent, run_around};

/// Pushes upward from the page after the last network fault, at the end of
/// memory on from its start. Without any fault, from page 0.
#[derive(Clone, Debug)]
pub struct Linear {
    pages: u64,
    cursor: u64,
}

impl Linear {
    /// A policy that begins at page 0.
    pub fn new(config: PolicyConfig) -> Self {
        Self { pages: config.pages, cursor: 0 }
    }
}

impl Policy for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn fault(&mut self, fault: Fault) {
        if fault.page.get() < self.pages {
            self.cursor = fault.page.get();
        }
    }

    /// Ignored: QEMU's source does not move for a page that it has sent.
    fn late_hit(&mut self, _: Fault) {}

    fn link(&mut self, _: LinkState) {}

    /// Changes nothing: it pushes all the time.
    fn drain(&mut self) {}

    fn next(&mut self, unsent: &dyn Unsent, pages_max: u32) -> Option<Suggestion> {
        let run = run_around(unsent, self.cursor, pages_max)?;
        self.cursor = run.end();
        Some(Suggestion { run, origin: Origin::Push })
    }
}
