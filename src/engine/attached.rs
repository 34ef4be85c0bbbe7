//! The source's VMM in another process, reached through the attach protocol.

use super::vm::{Captured, SourceVm, VmError};
use crate::attach::client::Attached;
use crate::attach::commit_word::Committed;
use std::time::Duration;

/// A VMM that this process is attached to.
#[derive(Debug)]
pub struct AttachedVmm {
    attached: Option<Attached>,
    committed: Option<Committed>,
}

impl AttachedVmm {
    /// Drives the VMM behind `attached`.
    pub fn new(attached: Attached) -> Self {
        Self { attached: Some(attached), committed: None }
    }

    fn attached(&mut self) -> Result<&mut Attached, VmError> {
        self.attached.as_mut().ok_or_else(|| "the VMM was left already".into())
    }
}

impl SourceVm for AttachedVmm {
    fn reset_instruments(&mut self) {
        let reset = self.attached().and_then(|vmm| Ok(vmm.reset_instruments()?));
        if let Err(error) = reset {
            tracing::warn!(%error, "the guest's own figures include time before the migration");
        }
    }

    fn pause(&mut self) -> Result<Captured, VmError> {
        let paused = self.attached()?.pause()?;
        Ok(Captured {
            state: paused.state,
            seeds: paused.seeds,
            pause: Duration::from_micros(paused.pause_us),
            capture: Duration::from_micros(paused.capture_us),
        })
    }

    fn commit(&mut self) -> Result<bool, VmError> {
        let word = self.attached()?.word.clone();
        self.committed = word.commit().ok();
        Ok(self.committed.is_some())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        let attached = self.attached.take().ok_or("the VMM was left already")?;
        Ok(attached.resume()?)
    }

    fn release(&mut self) -> Result<(), VmError> {
        let proof = self.committed.take().ok_or("there was no commit")?;
        self.attached()?.committed(&proof)?;
        self.attached = None;
        Ok(())
    }
}
