//! The source's VMM in another process, reached through the attach protocol; and the
//! keeper beside it, which holds the memory of a guest whose VMM has gone.

use super::vm::{Captured, SourceVm, VmError};
use crate::attach::client::{AttachError, Attached};
use crate::attach::commit_word::{CommitWord, Committed, Decision};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a keeper's process may take to end once it has said that it will.
const KEEPER_END_MAX: Duration = Duration::from_secs(2);

/// The guest left in an earlier migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest was given to a destination in an earlier migration and may be running there; \
     this VMM only holds its memory"
)]
pub struct GivenAway;

/// A guest whose migration was aborted and whose VMM is no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its VMM is gone, and the guest with it")]
pub struct VmmGone;

/// A keeper of the guest's memory, attached to.
#[derive(Debug)]
pub struct Keeper {
    attached: Attached,
    process: Option<Child>,
}

impl Keeper {
    /// The keeper behind `attached`; `process`, if it is a child of this one.
    pub fn new(attached: Attached, process: Option<Child>) -> Self {
        Self { attached, process }
    }

    /// Its socket, on which nothing but its end comes unasked.
    pub fn socket(&self) -> std::io::Result<OwnedFd> {
        self.attached.socket().try_clone_to_owned()
    }

    /// Nobody needs the memory any more.
    fn drained(mut self, proof: &Committed) -> Result<(), AttachError> {
        let told = self.attached.committed(proof);
        self.reap();
        told
    }

    /// The VMM has its guest.
    fn aborted(self) -> Result<(), AttachError> {
        let told = self.attached.resume();
        Self::reap_process(self.process);
        told
    }

    fn reap(self) {
        drop(self.attached);
        Self::reap_process(self.process);
    }

    /// Nothing of a child stays in the list of processes.
    fn reap_process(process: Option<Child>) {
        let Some(mut process) = process else { return };
        let deadline = Instant::now() + KEEPER_END_MAX;
        while matches!(process.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A VMM that this process is attached to.
#[derive(Debug)]
pub struct AttachedVmm {
    vmm: Option<Attached>,
    keeper: Option<Keeper>,
    word: Arc<CommitWord>,
    /// The VMM's control socket, where a session is gone on with.
    control: Option<PathBuf>,
}

impl AttachedVmm {
    /// Drives the VMM behind `attached`.
    ///
    /// # Errors
    /// [`GivenAway`] if its guest was committed before: the VMM would hand out the same
    /// capture again, and a second destination would run the guest a second time. A
    /// session that was committed is gone on with by [`AttachedVmm::left`].
    pub fn new(attached: Attached) -> Result<Self, GivenAway> {
        match attached.word.decision() {
            Decision::Undecided | Decision::Aborted => {
                let word = attached.word.clone();
                Ok(Self { vmm: Some(attached), keeper: None, word, control: None })
            }
            Decision::Committed | Decision::Damaged(_) => Err(GivenAway),
        }
    }

    /// The same, with a keeper that is told when the memory may go.
    pub fn kept_by(mut self, keeper: Keeper) -> Self {
        self.keeper = Some(keeper);
        self
    }

    /// What is left of a guest whose commit word has decided, for a session that is gone on
    /// with: its keeper, and its VMM if that is still there. `control` is the VMM's socket.
    pub fn left(keeper: Keeper, vmm: Option<Attached>, control: PathBuf) -> Self {
        let word = keeper.attached.word.clone();
        Self { vmm, keeper: Some(keeper), word, control: Some(control) }
    }

    fn attached(&mut self) -> Result<&mut Attached, VmError> {
        self.vmm.as_mut().ok_or_else(|| "the VMM was left already".into())
    }

    /// Whether there is a VMM that can have its guest.
    fn vmm_is_there(&mut self) -> bool {
        match (&mut self.vmm, &self.control) {
            // It may have dropped this connection only, and be there for others.
            (Some(vmm), _) => vmm.status().is_ok() || vmm.is_listening(),
            (None, Some(control)) => UnixStream::connect(control).is_ok(),
            // It was asked to let the guest run on, and has answered.
            (None, None) => true,
        }
    }

    /// The guest is its VMM's, and its memory needs no keeper.
    fn leave_keeper(&mut self) {
        if let Some(keeper) = self.keeper.take()
            && let Err(error) = keeper.aborted()
        {
            tracing::debug!(%error, "the keeper was not told that it may go");
        }
    }

    /// What lets go, lets go on the strength of this.
    fn proof(&self) -> Result<Committed, VmError> {
        match self.word.decision() {
            Decision::Committed => Ok(self.word.commit()?),
            _ => Err("there was no commit".into()),
        }
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
        Ok(self.word.commit().is_ok())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        let attached = self.vmm.take().ok_or("the VMM was left already")?;
        // It loses patience with a fault-server that is silent, and has then resumed it.
        let resumed = match attached.word.decision() {
            Decision::Aborted => Ok(()),
            _ => attached.resume(),
        };
        // The next migration of this guest needs one of its own, and may begin while this
        // one is still telling its destination.
        self.leave_keeper();
        Ok(resumed?)
    }

    fn release(&mut self) -> Result<(), VmError> {
        let proof = self.proof()?;
        // A session that is gone on with may find that its VMM left long ago.
        let Some(mut vmm) = self.vmm.take() else { return Ok(()) };
        Ok(vmm.committed(&proof)?)
    }

    fn drained(&mut self) -> Result<(), VmError> {
        let proof = self.proof()?;
        match self.keeper.take() {
            Some(keeper) => Ok(keeper.drained(&proof)?),
            None => Ok(()),
        }
    }

    fn aborted(&mut self) -> Result<(), VmError> {
        self.leave_keeper();
        if self.vmm_is_there() { Ok(()) } else { Err(VmmGone.into()) }
    }
}
