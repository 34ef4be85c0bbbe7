//! The source's guest thread: everything of the VMM that may block.

use super::driver::Input;
use crate::engine::error_chain;
use crate::engine::vm::{SourceVm, VmError};
use crate::proto::source::SourceEvent;
use tokio::sync::mpsc::UnboundedSender;
use tracing::warn;

/// What the guest thread is told.
pub enum GuestCommand {
    ResetInstruments,
    Pause,
    Commit,
    Resume,
    Release,
    Drained,
    Aborted,
}

/// The VMM, and why its guest does not run on though it should.
pub type Ended = (Box<dyn SourceVm>, Option<String>);

/// The thread on which the VMM is called: its calls may block. It ends with the reason
/// why the guest of an aborted migration does not run on, if it does not.
pub fn spawn(
    mut vm: Box<dyn SourceVm>,
    commands: crossbeam_channel::Receiver<GuestCommand>,
    input: UnboundedSender<Input>,
) -> std::io::Result<std::thread::JoinHandle<Ended>> {
    let said = |error: VmError| error_chain(error.as_ref());
    let run = move || {
        crate::engine::hurry();
        let mut stranded = None;
        for command in commands {
            let event = match command {
                GuestCommand::ResetInstruments => {
                    vm.reset_instruments();
                    continue;
                }
                GuestCommand::Pause => match vm.pause() {
                    Ok(captured) => Input::Captured(captured),
                    Err(error) => Input::Event(SourceEvent::PauseFailed(said(error))),
                },
                GuestCommand::Commit => match vm.commit() {
                    Ok(written) => Input::Event(SourceEvent::CommitWord(written)),
                    // The VMM cannot be asked any more: whoever holds the word decided.
                    Err(error) => {
                        warn!(error = said(error), "the commit word could not be written");
                        Input::Event(SourceEvent::CommitWord(false))
                    }
                },
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
    std::thread::Builder::new().name("guest".into()).spawn(run)
}
