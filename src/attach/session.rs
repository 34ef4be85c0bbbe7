//! One client's conversation with the VMM, and the migration attempt that it is
//! part of.
//!
//! An [`Attempt`] is one commit word and what was captured under it. It ends with
//! the client that made it, unless the word says committed: then it waits, paused,
//! for the next client, a fault-server that was started again. The socket and the
//! choice of clients are the [`Server`]'s.

use super::commit_word::{AlreadyCommitted, CommitWord, Decision};
use super::message::{
    CAPABILITY_DIRTY_LOG, CAPABILITY_KEEP_RECORD, CAPABILITY_SESSION_RECORD, DirtyRound, MAGIC,
    Message, MessageError, Paused, REQUEST_BYTES_MAX, Reply, Request, VERSION, Welcome, reason,
};
use super::monotonic_ns;
use super::server::{AttachedVm, Server, ServerError, Wake, one_line};
use super::socket::{Connection, SocketError};
use crate::failpoint::failpoint;
use crate::memory::dirty_bitmap::{DirtyBitmap, NO_DIRTY_LOG};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// How a conversation came to a good end.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The guest has left.
    Released,
    /// The guest was stopped.
    Stopped,
    /// The client aborted, and the guest runs.
    GivenBack,
    /// The client of a keeper has ended on purpose.
    Left,
}

/// Why a conversation ended otherwise.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("it said {0} before Hello")]
    NoHello(&'static str),
    #[error("it said Hello twice")]
    SecondHello,
    #[error("it does not speak the attach protocol")]
    Magic,
    #[error("it speaks version {0} of the attach protocol, this is version {VERSION}")]
    Version(u16),
    #[error("it paused the guest and was silent; the guest is taken back")]
    Silent,
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// A commit word, and the guest captured under it, if it was.
pub(super) struct Attempt {
    word: CommitWord,
    paused: Option<Box<Paused>>,
    /// The bitmap, while this attempt's client has writes remembered.
    dirty: Option<DirtyBitmap>,
    /// Only the guest's memory is here; it was paused, if it was, in another process.
    kept: bool,
    /// The session's record, if a fault-server has left one with this VMM.
    record: Option<OwnedFd>,
    /// A keeper's client has asked for the record since this was last looked at.
    taken_over: bool,
}

impl Attempt {
    pub(super) fn new() -> Result<Self, ServerError> {
        let word = CommitWord::create()?;
        let (paused, dirty, record) = (None, None, None);
        Ok(Self { word, paused, dirty, kept: false, record, taken_over: false })
    }

    /// The attempt of a keeper, under a word that the VMM has made.
    pub(super) fn kept(word: CommitWord) -> Self {
        let (paused, dirty, record) = (None, None, None);
        Self { word, paused, dirty, kept: true, record, taken_over: false }
    }

    /// Whether a client has taken the session over since this was asked last.
    pub(super) fn was_taken_over(&mut self) -> bool {
        std::mem::take(&mut self.taken_over)
    }

    /// Whether the guest has been given away. If not, it never will be any more.
    pub(super) fn is_committed(&self) -> bool {
        self.word.abort().is_err()
    }

    /// The attempt for the next client: this one if the guest has been given away
    /// under it, else a new one, with the guest running.
    pub(super) fn settle(mut self, vm: &mut dyn AttachedVm) -> Result<Self, ServerError> {
        self.forget_writes(vm);
        let was_paused = self.paused.is_some();
        match self.take_back(vm)? {
            Ok(()) => Self::new(),
            Err(committed) if was_paused => {
                tracing::warn!("the client is gone, but {committed}; waiting for another client");
                Ok(self)
            }
            Err(_) => {
                // No state was captured, so no destination can have any: the word was set
                // by mistake, and the guest has never stopped.
                tracing::warn!("the client committed a guest that it had not paused");
                Self::new()
            }
        }
    }

    /// Turns the word to aborted, unless an operator has turned it to taken back, and, only
    /// then, lets a paused guest run.
    fn take_back(
        &mut self,
        vm: &mut dyn AttachedVm,
    ) -> Result<Result<(), AlreadyCommitted>, ServerError> {
        if !self.kept {
            failpoint!("vmm::before_abort_word");
        }
        match self.word.abort() {
            Err(committed) => Ok(Err(committed)),
            Ok(_aborted) => {
                if !self.kept {
                    failpoint!("vmm::after_abort_word");
                }
                // Before the guest runs, so that it does so at its full speed.
                self.forget_writes(vm);
                if self.paused.take().is_some() {
                    vm.resume().map_err(|why| ServerError::Resume { why })?;
                }
                Ok(Ok(()))
            }
        }
    }

    /// Writes are remembered for a client that is there and wants it, and not for longer.
    fn forget_writes(&mut self, vm: &mut dyn AttachedVm) {
        if self.dirty.take().is_some()
            && let Err(why) = vm.stop_dirty_log()
        {
            tracing::warn!(why, "the dirty log does not stop, and may slow the guest down");
        }
    }
}

/// A client, from its Hello on.
pub(super) struct Session<'a> {
    server: &'a Server,
    connection: Connection,
    attempt: &'a mut Attempt,
    vm: &'a mut dyn AttachedVm,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        server: &'a Server,
        connection: Connection,
        attempt: &'a mut Attempt,
        vm: &'a mut dyn AttachedVm,
    ) -> Self {
        Self { server, connection, attempt, vm }
    }

    /// Answers requests until the conversation ends, which begins with a Hello within so
    /// long. After an error the attempt has
    /// yet to be settled.
    pub(super) fn run(&mut self, hello_max: Duration) -> Result<Ending, SessionError> {
        self.greet(hello_max)?;
        loop {
            self.wait_for_request()?;
            let (request, descriptor) = self.receive(self.server.patience.message)?;
            let ending = match request {
                Request::Hello { .. } => {
                    self.reply(&Reply::refused("Hello was said already"))?;
                    return Err(SessionError::SecondHello);
                }
                Request::Pause => self.pause()?,
                Request::Resume => self.resume()?,
                Request::Committed => self.committed()?,
                Request::ResetInstruments => self.reset_instruments()?,
                Request::Status => self.status()?,
                Request::Stop { why } => self.stop(&why)?,
                Request::StartDirtyLog => self.start_dirty_log()?,
                Request::DirtyRound => self.dirty_round()?,
                Request::StopDirtyLog => self.stop_dirty_log()?,
                Request::Record => self.record()?,
                Request::Leave => self.leave()?,
                Request::KeepRecord => self.keep_record(descriptor)?,
            };
            if let Some(ending) = ending {
                return Ok(ending);
            }
        }
    }

    fn greet(&mut self, hello_max: Duration) -> Result<(), SessionError> {
        let (magic, version) = match self.receive(hello_max)?.0 {
            Request::Hello { magic, version } => (magic, version),
            other => {
                self.reply(&Reply::refused("the first message must be Hello"))?;
                return Err(SessionError::NoHello(other.name()));
            }
        };
        if magic != MAGIC {
            self.reply(&Reply::refused("this is not the attach protocol"))?;
            return Err(SessionError::Magic);
        }
        if version != VERSION {
            let why = format!("version {version} is not spoken here, only {VERSION}");
            self.reply(&Reply::refused(why))?;
            return Err(SessionError::Version(version));
        }
        let description = self.vm.describe();
        let memory = self.vm.memory();
        let welcome = Reply::Welcome(Box::new(Welcome {
            version: VERSION,
            layout: description.layout,
            memory: memory.regions().to_vec(),
            machine: description.machine,
            guest: description.guest,
            capabilities: self.capabilities(),
        }));
        let descriptors = [memory.files(), &[self.attempt.word.memfd()]].concat();
        failpoint!(
            self.attempt.kept => "keeper::before_welcome_sent",
            "vmm::before_welcome_sent",
            return Err(broken())
        );
        send(&mut self.connection, &welcome, &descriptors, self.server.patience.message)?;
        failpoint!(
            self.attempt.kept => "keeper::after_welcome_sent",
            "vmm::after_welcome_sent",
            return Err(broken())
        );
        Ok(())
    }

    fn capabilities(&self) -> Vec<String> {
        let dirty_log = self.vm.has_dirty_log().then_some(CAPABILITY_DIRTY_LOG);
        let record = self.session_record().map(|_| CAPABILITY_SESSION_RECORD);
        let keep = (!self.attempt.kept).then_some(CAPABILITY_KEEP_RECORD);
        [dirty_log, record, keep].into_iter().flatten().map(str::to_owned).collect()
    }

    fn session_record(&self) -> Option<BorrowedFd<'_>> {
        self.vm.record().or(self.attempt.record.as_ref().map(AsFd::as_fd))
    }

    /// Waits without limit while the guest runs or has been given away; while it is
    /// paused and undecided, only for so long.
    fn wait_for_request(&mut self) -> Result<(), SessionError> {
        loop {
            let ours = matches!(
                self.attempt.word.decision(),
                Decision::Undecided | Decision::Aborted | Decision::TakenBack
            );
            let limit =
                (self.attempt.paused.is_some() && ours).then_some(self.server.patience.paused);
            match self.server.wait(&self.connection, limit)? {
                Wake::Client => return Ok(()),
                // The client may commit at this very moment: the word decides.
                Wake::Silence if self.attempt.take_back(self.vm)?.is_ok() => {
                    return Err(SessionError::Silent);
                }
                Wake::Silence => {}
            }
        }
    }

    fn pause(&mut self) -> Result<Option<Ending>, SessionError> {
        let paused = match self.attempt.paused.take() {
            Some(paused) => paused,
            None => match self.capture()? {
                Ok(paused) => paused,
                Err(why) => return self.reply(&Reply::failed(why)),
            },
        };
        let reply = Reply::Paused(paused);
        let sent = self.reply_paused(&reply);
        // Before any error is passed on, the attempt must know that the guest is paused.
        if let Reply::Paused(paused) = reply {
            self.attempt.paused = Some(paused);
        }
        sent
    }

    fn reply_paused(&mut self, reply: &Reply) -> Result<Option<Ending>, SessionError> {
        failpoint!("vmm::before_paused_sent", return Err(broken()));
        self.reply(reply)?;
        failpoint!("vmm::after_paused_sent", return Err(broken()));
        Ok(None)
    }

    /// The guest, paused, or why it runs on.
    fn capture(&mut self) -> Result<Result<Box<Paused>, String>, ServerError> {
        let paused = match self.vm.pause_and_capture() {
            Ok(paused) => paused,
            Err(why) => return Ok(Err(why)),
        };
        match paused.check() {
            Ok(()) => Ok(Ok(Box::new(paused))),
            Err(error) => {
                // Nobody has seen this capture, so the guest may simply go on.
                self.vm.resume().map_err(|why| ServerError::Resume { why })?;
                Ok(Err(error.to_string()))
            }
        }
    }

    fn resume(&mut self) -> Result<Option<Ending>, SessionError> {
        match self.attempt.take_back(self.vm)? {
            Ok(()) => {
                failpoint!(
                    self.attempt.kept => "keeper::before_resumed_sent",
                    "vmm::before_resumed_sent",
                    return Err(broken())
                );
                self.reply(&Reply::Resumed)?;
                Ok(Some(Ending::GivenBack))
            }
            Err(committed) => self.reply(&Reply::failed(committed.to_string())),
        }
    }

    fn committed(&mut self) -> Result<Option<Ending>, SessionError> {
        if self.attempt.paused.is_none() && !self.attempt.kept {
            return self.reply(&Reply::failed("the guest was not paused"));
        }
        if !matches!(self.attempt.word.decision(), Decision::Committed | Decision::Running) {
            return self.reply(&Reply::failed("the commit word does not say committed"));
        }
        // First the answer: if this client is gone as well, the memory must wait here for
        // the next one.
        failpoint!(
            self.attempt.kept => "keeper::before_released_sent",
            "vmm::before_released_sent",
            return Err(broken())
        );
        self.reply(&Reply::Released)?;
        failpoint!(self.attempt.kept => "keeper::after_released_sent", "vmm::after_released_sent");
        self.vm.released();
        Ok(Some(Ending::Released))
    }

    fn reset_instruments(&mut self) -> Result<Option<Ending>, SessionError> {
        if self.attempt.paused.is_some() {
            return self.reply(&Reply::failed("the guest is paused"));
        }
        match self.vm.reset_instruments() {
            Ok(()) => self.reply(&Reply::InstrumentsReset),
            Err(why) => self.reply(&Reply::failed(why)),
        }
    }

    fn status(&mut self) -> Result<Option<Ending>, SessionError> {
        let mut status = self.vm.status();
        status.failure = status.failure.map(reason);
        self.reply(&Reply::Status(status))
    }

    fn stop(&mut self, why: &str) -> Result<Option<Ending>, SessionError> {
        tracing::info!(why, "an attach client stops the guest");
        // Nobody may commit a guest that is about to end. If it is committed already, the
        // operator has decided to end what is left of it here.
        let _ = self.attempt.word.abort();
        self.vm.stop();
        // The guest has ended, whether or not the client still hears it.
        let _ = self.reply(&Reply::Stopping);
        Ok(Some(Ending::Stopped))
    }

    fn start_dirty_log(&mut self) -> Result<Option<Ending>, SessionError> {
        let refusal = if !self.vm.has_dirty_log() {
            Some(NO_DIRTY_LOG)
        } else if self.attempt.dirty.is_some() {
            Some("the dirty log was started already")
        } else if self.attempt.paused.is_some() {
            Some("the guest is paused")
        } else {
            None
        };
        if let Some(why) = refusal {
            return self.reply(&Reply::failed(why));
        }
        let bitmap = match DirtyBitmap::create(&self.vm.describe().layout) {
            Ok(bitmap) => bitmap,
            Err(error) => return self.reply(&Reply::failed(one_line(&error))),
        };
        if let Err(why) = self.vm.start_dirty_log() {
            return self.reply(&Reply::failed(why));
        }
        let reply = Reply::DirtyLogStarted { started_at_ns: monotonic_ns() };
        // Known before anything is sent: whatever fails, the log is stopped again.
        let bitmap = self.attempt.dirty.insert(bitmap);
        send(&mut self.connection, &reply, &[bitmap.memfd()], self.server.patience.message)?;
        Ok(None)
    }

    fn dirty_round(&mut self) -> Result<Option<Ending>, SessionError> {
        let Some(bitmap) = &self.attempt.dirty else {
            return self.reply(&Reply::failed("the dirty log was not started"));
        };
        let began_at_ns = monotonic_ns();
        match self.vm.dirty_round(bitmap) {
            Ok(pages) => {
                let round = DirtyRound { pages, began_at_ns, ended_at_ns: monotonic_ns() };
                self.reply(&Reply::DirtyRound(round))
            }
            Err(why) => {
                // What the failed round took out of the log may be in no bitmap.
                self.attempt.forget_writes(self.vm);
                self.reply(&Reply::failed(format!("the dirty log is lost and has ended: {why}")))
            }
        }
    }

    fn stop_dirty_log(&mut self) -> Result<Option<Ending>, SessionError> {
        if self.attempt.dirty.is_none() {
            return self.reply(&Reply::failed("the dirty log was not started"));
        }
        match self.vm.stop_dirty_log() {
            Ok(()) => {
                self.attempt.dirty = None;
                self.reply(&Reply::DirtyLogStopped)
            }
            // It stays this client's, and is stopped at the latest when that leaves.
            Err(why) => self.reply(&Reply::failed(why)),
        }
    }

    fn record(&mut self) -> Result<Option<Ending>, SessionError> {
        let record = self.vm.record().or(self.attempt.record.as_ref().map(AsFd::as_fd));
        match record {
            Some(record) => {
                let within = self.server.patience.message;
                send(&mut self.connection, &Reply::Record, &[record], within)?;
                self.attempt.taken_over = true;
                Ok(None)
            }
            None => self.reply(&Reply::failed("there is no session record here")),
        }
    }

    fn leave(&mut self) -> Result<Option<Ending>, SessionError> {
        if !self.attempt.kept {
            return self.reply(&Reply::failed("this is no keeper"));
        }
        // It has said it, whether or not it still hears the answer.
        let _ = self.reply(&Reply::Left);
        Ok(Some(Ending::Left))
    }

    fn keep_record(&mut self, record: Option<OwnedFd>) -> Result<Option<Ending>, SessionError> {
        if self.attempt.kept {
            return self.reply(&Reply::failed("a keeper has the record that it was made with"));
        }
        self.attempt.record = record;
        self.reply(&Reply::RecordKept)
    }

    /// A request, and the descriptor that belongs to it, if one does.
    fn receive(&mut self, within: Duration) -> Result<(Request, Option<OwnedFd>), SessionError> {
        let received = self.connection.receive(REQUEST_BYTES_MAX, within)?;
        let request = Request::decode(&received.bytes)?;
        if let Request::KeepRecord = request {
            let [record] = received.descriptors()?;
            return Ok((request, Some(record)));
        }
        let [] = received.descriptors::<0>()?;
        Ok((request, None))
    }

    fn reply(&mut self, reply: &Reply) -> Result<Option<Ending>, SessionError> {
        send(&mut self.connection, reply, &[], self.server.patience.message)?;
        Ok(None)
    }
}

#[cfg(feature = "failpoints")]
fn broken() -> SessionError {
    SocketError::Closed.into()
}

pub(super) fn send(
    connection: &mut Connection,
    reply: &Reply,
    descriptors: &[BorrowedFd<'_>],
    within: Duration,
) -> Result<(), SessionError> {
    Ok(connection.send(&reply.encode()?, descriptors, within)?)
}
