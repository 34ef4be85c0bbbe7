//! The source's guest thread: everything of the VMM that may block.

use super::driver::Input;
use crate::engine::error_chain;
use crate::engine::vm::{Captured, SourceVm, VmError};
use crate::proto::message::STATE_MAX;
use crate::proto::source::SourceEvent;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;
use tracing::warn;

/// How long the VMM may take to come back from its last call.
const END_MAX: Duration = Duration::from_secs(30);
const PANICKED: &str = "the thread that drives its VMM panicked";

/// What the guest thread is told.
pub enum GuestCommand {
    ResetInstruments,
    StartDirtyLog,
    DirtyRound,
    Pause,
    Commit,
    TakeBack,
    GivenUp,
    Resume,
    Release,
    Drained,
    Aborted,
}

/// The VMM, and why its guest does not run on though it should.
type Ended = (Box<dyn SourceVm>, Option<String>);

/// The thread on which the VMM is called.
pub struct GuestThread {
    commands: crossbeam_channel::Sender<GuestCommand>,
    thread: std::thread::JoinHandle<Ended>,
}

impl GuestThread {
    /// Tells it something; done in order.
    pub fn tell(&self, command: GuestCommand) {
        // One that is gone has said so.
        let _ = self.commands.send(command);
    }

    /// Lets it end and takes the VMM back, with the reason why the guest of an aborted
    /// migration does not run on, if it does not.
    pub async fn end(self) -> (Option<Box<dyn SourceVm>>, Option<String>) {
        drop(self.commands);
        let asked = Instant::now();
        while !self.thread.is_finished() {
            if asked.elapsed() > END_MAX {
                tracing::error!("the VMM does not answer; it is left behind");
                return (None, Some("its VMM does not come back from a call".into()));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        match self.thread.join() {
            Ok((vm, stranded)) => (Some(vm), stranded),
            Err(_) => (None, Some(PANICKED.into())),
        }
    }
}

/// Tells the session, which waits for an answer, that none comes any more.
struct SaysWhenItPanics(UnboundedSender<Input>);

impl Drop for SaysWhenItPanics {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Whichever it does not wait for is nothing to it.
            let _ = self.0.send(Input::Event(SourceEvent::PauseFailed(PANICKED.into())));
            let _ = self.0.send(Input::Event(SourceEvent::CommitFailed(PANICKED.into())));
            let _ = self.0.send(Input::Event(SourceEvent::TakeBackFailed(PANICKED.into())));
        }
    }
}

/// Pauses the guest; if its writes are remembered, all of them are told then.
fn pause(vm: &mut dyn SourceVm, logging: bool) -> Result<Captured, VmError> {
    let captured = vm.pause()?;
    if logging && let Err(error) = vm.dirty_round() {
        vm.resume().map_err(|also| format!("{error}; and then: {also}"))?;
        return Err(error);
    }
    Ok(captured)
}

/// Starts the thread on which the VMM is called: its calls may block.
pub fn spawn(
    mut vm: Box<dyn SourceVm>,
    input: UnboundedSender<Input>,
) -> std::io::Result<GuestThread> {
    // One for each step of the session, which then waits for its answer.
    let (sender, commands) = crossbeam_channel::unbounded();
    let said = |error: VmError| error_chain(error.as_ref());
    let run = move || {
        let _guard = SaysWhenItPanics(input.clone());
        crate::engine::hurry();
        let mut stranded = None;
        let mut logging = false;
        for command in commands {
            let event = match command {
                GuestCommand::ResetInstruments => {
                    vm.reset_instruments();
                    continue;
                }
                GuestCommand::StartDirtyLog => match vm.start_dirty_log() {
                    Ok(bitmap) => {
                        logging = true;
                        Input::Logging(bitmap)
                    }
                    Err(error) => Input::Event(SourceEvent::DirtyLogFailed(said(error))),
                },
                GuestCommand::DirtyRound => match vm.dirty_round() {
                    Ok(()) => Input::Written,
                    Err(error) => Input::Event(SourceEvent::DirtyLogFailed(said(error))),
                },
                GuestCommand::Pause => match pause(vm.as_mut(), logging) {
                    Ok(captured) if captured.state.len() <= STATE_MAX => Input::Captured(captured),
                    // The destination would refuse it, in the blackout. Nobody has seen this
                    // capture, so the guest may simply go on.
                    Ok(captured) => {
                        stranded = vm.resume().err().map(said);
                        let bytes = captured.state.len();
                        let why =
                            format!("the machine state has {bytes} bytes, more than {STATE_MAX}");
                        Input::Event(SourceEvent::PauseFailed(why))
                    }
                    Err(error) => Input::Event(SourceEvent::PauseFailed(said(error))),
                },
                GuestCommand::Commit => match vm.commit() {
                    Ok(written) => Input::Event(SourceEvent::CommitWord(written)),
                    Err(error) => Input::Event(SourceEvent::CommitFailed(said(error))),
                },
                GuestCommand::TakeBack => Input::Event(match vm.take_back() {
                    Ok(()) => SourceEvent::TakenBack,
                    Err(error) => SourceEvent::TakeBackFailed(said(error)),
                }),
                GuestCommand::GivenUp => {
                    if let Err(error) = vm.given_up() {
                        warn!(error = said(error), "the guest's memory may still be held here");
                    }
                    continue;
                }
                GuestCommand::Resume => match vm.resume() {
                    Ok(()) => continue,
                    Err(error) => {
                        stranded = Some(said(error));
                        continue;
                    }
                },
                GuestCommand::Release => {
                    if let Err(error) = vm.release() {
                        warn!(error = said(error), "the VMM was not told that it may go");
                    }
                    continue;
                }
                GuestCommand::Drained => {
                    if let Err(error) = vm.drained() {
                        warn!(error = said(error), "the guest's memory may still be held here");
                    }
                    continue;
                }
                GuestCommand::Aborted => {
                    let gone = vm.aborted().err().map(said);
                    stranded = stranded.or(gone);
                    continue;
                }
            };
            if input.send(event).is_err() {
                break;
            }
        }
        (vm, stranded)
    };
    let thread = std::thread::Builder::new().name("guest".into()).spawn(run)?;
    Ok(GuestThread { commands: sender, thread })
}
