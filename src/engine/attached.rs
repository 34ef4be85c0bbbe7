//! The source's VMM in another process, reached through the attach protocol.

use super::error_chain;
use super::vm::{Captured, SourceVm, VmError};
use crate::attach::client::{AttachError, Attached};
use crate::attach::commit_word::{CommitWord, Committed, Decision};
use crate::attach::message::Status;
use crate::attach::socket::SocketError;
use crate::failpoint::failpoint;
use crate::memory::dirty_bitmap::DirtyBitmap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a VMM may take to answer where the session can go on without.
const LOOK_MAX: Duration = Duration::from_secs(2);

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

/// Whoever holds the guest's memory beside the VMM.
pub trait Beside: Send + std::fmt::Debug {
    /// The VMM has its guest, and nobody else needs the memory. May be called twice.
    fn given_back(&mut self);
    /// The operator has given the guest up: nobody is to go on with it.
    fn given_up(&mut self) -> Result<(), VmError>;
}

/// A VMM that this process is attached to.
#[derive(Debug)]
pub struct AttachedVmm {
    vmm: Option<Attached>,
    beside: Option<Box<dyn Beside>>,
    word: Arc<CommitWord>,
    /// The VMM's control socket, where it is looked for again.
    control: Option<PathBuf>,
    /// The VMM's process, as it says itself: another one may listen there by now.
    pid: u32,
    /// Whether it has said that it lets the guest run on.
    resumed: bool,
    /// Whether it was told that it may go, and has not answered yet.
    releasing: bool,
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
            Decision::Undecided | Decision::Aborted => Ok(Self::committed(attached)),
            Decision::Committed
            | Decision::Running
            | Decision::TakenBack
            | Decision::Damaged(_) => Err(GivenAway),
        }
    }

    /// A VMM that holds a guest which was committed before, for a session that is gone on
    /// with.
    pub fn committed(attached: Attached) -> Self {
        let control = attached.path().map(Path::to_owned);
        let nobody = Self::left(attached.word.clone(), attached.guest.pid, control);
        Self { vmm: Some(attached), ..nobody }
    }

    /// The same, with `beside` told when the VMM has its guest back.
    pub fn held_by(mut self, beside: Box<dyn Beside>) -> Self {
        self.beside = Some(beside);
        self
    }

    /// A guest whose commit word has decided, for a session that is gone on with. `control`
    /// is the socket of its VMM, process `pid`, which may still be there, and is not looked
    /// for before it is needed.
    pub fn left(word: Arc<CommitWord>, pid: u32, control: Option<PathBuf>) -> Self {
        let (vmm, beside) = (None, None);
        Self { vmm, beside, word, control, pid, resumed: false, releasing: false }
    }

    fn attached(&mut self) -> Result<&mut Attached, VmError> {
        self.vmm.as_mut().ok_or_else(|| "the VMM was left already".into())
    }

    /// Asks the VMM, over a new conversation, whether its guest runs on.
    fn look_again(&self) -> Result<(), VmError> {
        let control = self.control.as_ref().ok_or(VmmGone)?;
        match Attached::connect_within(control, LOOK_MAX) {
            Ok(mut vmm) if vmm.guest.pid == self.pid => runs(vmm.status()?),
            Ok(_another) => Err(VmmGone.into()),
            // Somebody moves it already.
            Err(AttachError::Refused { .. }) => Ok(()),
            Err(AttachError::Connect { .. }) => Err(VmmGone.into()),
            Err(error) => Err(error.into()),
        }
    }

    /// Finds the VMM of a session that is gone on with, if it has not left.
    fn find_vmm(&mut self) -> Result<(), VmError> {
        let (None, Some(control)) = (&self.vmm, &self.control) else { return Ok(()) };
        match Attached::connect_within(control, LOOK_MAX) {
            // Another guest may be there by now.
            Ok(vmm) => self.vmm = Some(vmm).filter(|vmm| vmm.word.is(&self.word)),
            Err(AttachError::Connect { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Tells the VMM that its guest has left, if it is there.
    fn say_committed(&mut self, proof: &Committed) -> Result<(), VmError> {
        // Before the VMM lets go: it can be taken back until here.
        self.word.running()?;
        if !self.releasing {
            self.find_vmm()?;
        }
        if let Some(vmm) = self.vmm.as_mut().filter(|_| !self.releasing) {
            vmm.say_committed(proof)?;
        }
        self.releasing = true;
        Ok(())
    }

    fn given_back(&mut self) {
        if let Some(beside) = &mut self.beside {
            beside.given_back();
        }
    }

    /// What lets go, lets go on the strength of this.
    fn proof(&self) -> Result<Committed, VmError> {
        match self.word.decision() {
            Decision::Committed | Decision::Running => Ok(self.word.commit()?),
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

    fn start_dirty_log(&mut self) -> Result<Arc<DirtyBitmap>, VmError> {
        failpoint!("source::before_dirty_log", return Err("a failpoint".into()));
        Ok(self.attached()?.start_dirty_log()?.bitmap)
    }

    fn dirty_round(&mut self) -> Result<(), VmError> {
        failpoint!("source::before_dirty_round", return Err("a failpoint".into()));
        self.attached()?.dirty_round()?;
        Ok(())
    }

    fn pause(&mut self) -> Result<Captured, VmError> {
        failpoint!("source::before_pause", return Err("a failpoint".into()));
        let paused = match self.attached()?.pause() {
            Ok(paused) => paused,
            // It says itself that its guest runs on.
            Err(error @ AttachError::Failed { .. }) => return Err(error.into()),
            Err(error) => {
                // The guest may be paused all the same. A VMM takes it back when the
                // conversation ends, and before it lets anybody else in.
                self.vmm = None;
                return Err(error.into());
            }
        };
        Ok(Captured {
            state: paused.state,
            seeds: paused.seeds,
            pause: Duration::from_micros(paused.pause_us),
            capture: Duration::from_micros(paused.capture_us),
            was_paused: paused.was_paused,
        })
    }

    fn commit(&mut self) -> Result<bool, VmError> {
        failpoint!("source::before_commit_word", return Err("a failpoint".into()));
        let written = self.word.commit().is_ok();
        failpoint!("source::after_commit_word");
        if !written {
            // The VMM has its guest already, or a keeper took this process for dead: then the
            // VMM takes it back when the conversation ends, which is not to be waited for.
            self.vmm = None;
        }
        Ok(written)
    }

    /// The VMM must be there and answer: it has the guest. It is not asked, since a VMM that
    /// hangs could otherwise do it long after the session has gone on; it lets the guest run
    /// on when it reads the word, at the latest when this process has gone.
    fn take_back(&mut self) -> Result<(), VmError> {
        if self.releasing {
            return Err("its VMM was told already that it may go".into());
        }
        self.find_vmm()?;
        let mut vmm = self.vmm.take().ok_or(VmmGone)?;
        // One that does not answer is looked for anew when it is needed.
        let status = vmm.status_within(LOOK_MAX)?;
        self.vmm = Some(vmm);
        if let Some(why) = status.failure {
            return Err(format!("its VMM says: {why}").into());
        }
        let _theirs = self.word.take_back()?;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        failpoint!("source::before_resume");
        let vmm = self.vmm.take().ok_or("the VMM was left already")?;
        let told = match vmm.word.decision() {
            // It loses patience with a fault-server that is silent, and has then resumed it.
            Decision::Aborted => None,
            _ => Some(vmm.resume()),
        };
        self.given_back();
        match told {
            Some(Ok(())) => {}
            None | Some(Err(AttachError::Socket { source: SocketError::Closed, .. })) => {
                self.look_again()?;
            }
            Some(Err(error)) => return Err(error.into()),
        }
        self.resumed = true;
        failpoint!("source::after_resume");
        Ok(())
    }

    /// Does not wait for a VMM that hangs: the conversation stays, and it hears it once it
    /// does not any more.
    fn release(&mut self) -> Result<(), VmError> {
        failpoint!("source::before_release", return Err("a failpoint".into()));
        let proof = self.proof()?;
        self.say_committed(&proof)?;
        let Some(vmm) = &mut self.vmm else { return Ok(()) };
        let heard = vmm.hear_released(LOOK_MAX);
        if let Err(AttachError::Socket { source, .. }) = &heard
            && !matches!(source, SocketError::Timeout)
        {
            // The conversation has broken, and the VMM waits for another one.
            self.vmm = None;
            self.releasing = false;
        }
        heard?;
        failpoint!("source::after_release");
        self.vmm = None;
        Ok(())
    }

    fn drained(&mut self) -> Result<(), VmError> {
        let _proof = self.proof()?;
        if (self.vmm.is_some() || !self.releasing)
            && let Err(error) = self.release()
        {
            let error = error_chain(error.as_ref());
            tracing::warn!(error, "the VMM does not answer; it is left with a guest that is gone");
        }
        Ok(())
    }

    fn given_up(&mut self) -> Result<(), VmError> {
        self.beside.as_mut().map_or(Ok(()), |beside| beside.given_up())
    }

    fn aborted(&mut self) -> Result<(), VmError> {
        self.given_back();
        if self.resumed {
            return Ok(());
        }
        if self.word.decision() == Decision::TakenBack {
            // Whoever took it back may not have come to having it resumed.
            self.find_vmm()?;
            if self.vmm.is_some() {
                return self.resume();
            }
        }
        match self.vmm.as_mut().map(Attached::status) {
            Some(Ok(status)) => runs(status),
            // It may have dropped this connection only, and be there for others.
            Some(Err(_)) | None => {
                self.vmm = None;
                self.look_again()
            }
        }
    }
}

/// Whether a guest runs on, as its VMM says.
fn runs(now: Status) -> Result<(), VmError> {
    match now.failure {
        Some(why) => Err(format!("its VMM says: {why}").into()),
        None if !now.running => Err("its VMM says that it does not run".into()),
        None => Ok(()),
    }
}
