//! The source's VMM in another process, reached through the attach protocol.

use super::vm::{Captured, SourceVm, VmError};
use crate::attach::client::Attached;
use crate::attach::commit_word::{Committed, Decision};
use std::time::Duration;

/// The guest left in an earlier migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest was given to a destination in an earlier migration and may be running there; \
     this VMM only holds its memory"
)]
pub struct GivenAway;

/// A VMM that this process is attached to.
#[derive(Debug)]
pub struct AttachedVmm {
    attached: Option<Attached>,
    committed: Option<Committed>,
}

impl AttachedVmm {
    /// Drives the VMM behind `attached`.
    ///
    /// # Errors
    /// [`GivenAway`] if its guest was committed before: the VMM would hand out the same
    /// capture again, for a fault-server that goes on with the same migration, and a
    /// second destination would run the guest a second time.
    pub fn new(attached: Attached) -> Result<Self, GivenAway> {
        match attached.word.decision() {
            Decision::Undecided | Decision::Aborted => {
                Ok(Self { attached: Some(attached), committed: None })
            }
            Decision::Committed | Decision::Damaged(_) => Err(GivenAway),
        }
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
        // It loses patience with a fault-server that is silent, and has then resumed it.
        if attached.word.decision() == Decision::Aborted {
            return Ok(());
        }
        Ok(attached.resume()?)
    }

    fn release(&mut self) -> Result<(), VmError> {
        let proof = self.committed.take().ok_or("there was no commit")?;
        self.attached()?.committed(&proof)?;
        self.attached = None;
        Ok(())
    }
}
