//! The source's VMM in another process, reached through the attach protocol; and the
//! keeper beside it, which holds the memory of a guest whose VMM has gone.

use super::error_chain;
use super::vm::{Captured, SourceVm, VmError};
use crate::attach::client::{AttachError, Attached};
use crate::attach::commit_word::{CommitWord, Committed, Decision};
use crate::attach::message::Status;
use crate::attach::socket::SocketError;
use crate::failpoint::failpoint;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// How long a keeper's process may take to end once it has said that it will.
const KEEPER_END_MAX: Duration = Duration::from_secs(2);
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

/// A keeper of the guest's memory, attached to.
#[derive(Debug)]
pub struct Keeper {
    attached: Attached,
    /// Says when its process has ended, if it is a child of this one.
    ended: Option<Receiver<()>>,
}

impl Keeper {
    /// The keeper behind `attached`; `process`, if it is a child of this one, which may live
    /// on for long: nothing of it stays in the list of processes whenever it ends.
    pub fn new(attached: Attached, process: Option<Child>) -> Self {
        let (tell, ended) = channel();
        let reap = |mut process: Child| {
            let reaper = std::thread::Builder::new().name("keeper's end".into());
            let wait = move || {
                let _ = process.wait();
                let _ = tell.send(());
            };
            reaper.spawn(wait).ok().map(|_thread| ended)
        };
        Self { attached, ended: process.and_then(reap) }
    }

    /// Its socket, on which nothing but its end comes unasked.
    pub fn socket(&self) -> std::io::Result<OwnedFd> {
        self.attached.socket().try_clone_to_owned()
    }

    /// Nobody needs the memory any more.
    fn drained(mut self, proof: &Committed) -> Result<(), AttachError> {
        let told = self.attached.committed(proof);
        drop(self.attached);
        wait_for(self.ended);
        told
    }

    /// The operator has given the guest up.
    fn discard(self) -> Result<(), AttachError> {
        let told = self.attached.stop("its operator gave the guest up");
        wait_for(self.ended);
        told
    }

    /// The VMM has its guest.
    fn aborted(self) -> Result<(), AttachError> {
        let told = self.attached.resume();
        wait_for(self.ended);
        told
    }
}

/// Waits for a keeper's process, which has said that it ends.
fn wait_for(ended: Option<Receiver<()>>) {
    if let Some(ended) = ended {
        let _ = ended.recv_timeout(KEEPER_END_MAX);
    }
}

/// A VMM that this process is attached to.
#[derive(Debug)]
pub struct AttachedVmm {
    vmm: Option<Attached>,
    keeper: Option<Keeper>,
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
            Decision::Undecided | Decision::Aborted => {
                let vmm = Self::nobody(&attached, attached.path().map(Path::to_owned));
                Ok(Self { vmm: Some(attached), ..vmm })
            }
            Decision::Committed
            | Decision::Running
            | Decision::TakenBack
            | Decision::Damaged(_) => Err(GivenAway),
        }
    }

    /// The same, with a keeper that is told when the memory may go.
    pub fn kept_by(mut self, keeper: Keeper) -> Self {
        self.keeper = Some(keeper);
        self
    }

    /// What is left of a guest whose commit word has decided, for a session that is gone on
    /// with: its keeper. `control` is the socket of its VMM, which may still be there, and is
    /// not looked for before it is needed.
    pub fn left(keeper: Keeper, control: PathBuf) -> Self {
        let left = Self::nobody(&keeper.attached, Some(control));
        Self { keeper: Some(keeper), ..left }
    }

    /// The guest of `attached`, without anybody to talk to.
    fn nobody(attached: &Attached, control: Option<PathBuf>) -> Self {
        Self {
            vmm: None,
            keeper: None,
            word: attached.word.clone(),
            control,
            pid: attached.guest.pid,
            resumed: false,
            releasing: false,
        }
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

    fn pause(&mut self) -> Result<Captured, VmError> {
        failpoint!("source::before_pause", return Err("a failpoint".into()));
        let paused = self.attached()?.pause()?;
        failpoint!("source::after_pause", return Err("a failpoint".into()));
        Ok(Captured {
            state: paused.state,
            seeds: paused.seeds,
            pause: Duration::from_micros(paused.pause_us),
            capture: Duration::from_micros(paused.capture_us),
        })
    }

    fn commit(&mut self) -> Result<bool, VmError> {
        failpoint!("source::before_commit_word", return Err("a failpoint".into()));
        let written = self.word.commit().is_ok();
        failpoint!("source::after_commit_word");
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
        failpoint!("source::before_resume", return Err("a failpoint".into()));
        let vmm = self.vmm.take().ok_or("the VMM was left already")?;
        let told = match vmm.word.decision() {
            // It loses patience with a fault-server that is silent, and has then resumed it.
            Decision::Aborted => None,
            _ => Some(vmm.resume()),
        };
        // The next migration of this guest needs one of its own, and may begin while this
        // one is still telling its destination.
        self.leave_keeper();
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
        vmm.hear_released(LOOK_MAX)?;
        failpoint!("source::after_release");
        self.vmm = None;
        Ok(())
    }

    fn drained(&mut self) -> Result<(), VmError> {
        failpoint!("source::before_keeper_released", return Err("a failpoint".into()));
        let proof = self.proof()?;
        let kept = self.keeper.take().map_or(Ok(()), |keeper| keeper.drained(&proof));
        failpoint!("source::after_keeper_released");
        if (self.vmm.is_some() || !self.releasing)
            && let Err(error) = self.release()
        {
            let error = error_chain(error.as_ref());
            tracing::warn!(error, "the VMM does not answer; it is left with a guest that is gone");
        }
        Ok(kept?)
    }

    fn given_up(&mut self) -> Result<(), VmError> {
        match self.keeper.take() {
            Some(keeper) => Ok(keeper.discard()?),
            None => Ok(()),
        }
    }

    fn aborted(&mut self) -> Result<(), VmError> {
        self.leave_keeper();
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
