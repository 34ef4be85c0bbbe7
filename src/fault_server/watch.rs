//! An eye on the keeper. The migration goes on without it, but must not stay without: a new
//! one is started in the place of one that has ended.

use super::holding::{Holding, Keeper};
use super::keeper::{self, KeeperCommand, KeeperError, Restarts};
use super::legacy::Legacy;
use crate::attach::commit_word::Decision;
use crate::engine::error_chain;
use crate::engine::event::Phase;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Instant;
use tracing::{info, warn};

/// How a keeper is made.
#[derive(Debug)]
pub(super) struct Making {
    pub command: KeeperCommand,
    /// The control socket of the guest's VMM.
    pub control: PathBuf,
    pub legacy: Legacy,
}

impl Making {
    pub fn start(&self) -> Result<Keeper, KeeperError> {
        keeper::start(&self.command, &self.control, &self.legacy)
    }
}

#[derive(Debug)]
enum State {
    /// It is there, at the other end of this socket.
    There(OwnedFd),
    /// It has ended.
    Ended,
    /// Another one is being started.
    Coming(Receiver<Result<Keeper, KeeperError>>),
    /// Nobody is looked after any more.
    GivenUp,
}

/// Notices a keeper's end, and replaces it.
#[derive(Debug)]
pub(super) struct KeeperWatch {
    holding: Holding,
    making: Arc<Making>,
    restarts: Restarts,
    state: State,
    /// Why there was none to be had.
    why_none: Option<String>,
}

impl KeeperWatch {
    /// Watches the keeper of `holding`.
    pub fn new(holding: Holding, making: Making) -> Self {
        let state = holding.socket().map_or(State::Ended, State::There);
        let (making, restarts) = (Arc::new(making), Restarts::default());
        Self { holding, making, restarts, state, why_none: None }
    }

    /// Looks, and does what is to be done; never waits.
    pub fn look(&mut self, phase: Phase) {
        let aborted = self.making.legacy.word().decision() == Decision::Aborted;
        if phase == Phase::Release || aborted || self.holding.is_left() {
            return;
        }
        match &mut self.state {
            State::There(socket) if ended(socket) => {
                warn!(
                    "the keeper has ended: until another one is there, a death of this process \
                     loses the guest"
                );
                self.state = State::Ended;
            }
            State::Ended => match self.restarts.due(Instant::now()) {
                Some(due) if due <= Instant::now() => self.start(),
                Some(_) => {}
                None => {
                    warn!("keepers end too often; none is started any more");
                    self.state = State::GivenUp;
                }
            },
            State::Coming(answer) => match answer.try_recv() {
                Ok(Ok(keeper)) => {
                    info!("a keeper holds the guest's memory again");
                    self.restarts.started(Instant::now());
                    self.why_none = None;
                    self.holding.renew(keeper);
                    self.state = self.holding.socket().map_or(State::Ended, State::There);
                }
                Ok(Err(error)) => self.failed(error_chain(&error)),
                Err(TryRecvError::Disconnected) => self.failed("its start broke off".into()),
                Err(TryRecvError::Empty) => {}
            },
            State::There(_) | State::GivenUp => {}
        }
    }

    /// There was none to be had, which may pass.
    fn failed(&mut self, why: String) {
        self.restarts.failed(Instant::now());
        self.state = State::Ended;
        // Once, however long it takes.
        if self.why_none.as_ref() != Some(&why) {
            warn!(why, "no other keeper can be started, which is tried again");
            self.why_none = Some(why);
        }
    }

    /// Starts one, on a thread of its own: faults are served on this one.
    fn start(&mut self) {
        let (tell, answer) = channel();
        let making = self.making.clone();
        let make = move || {
            let _ = tell.send(making.start());
        };
        let thread = std::thread::Builder::new().name("keeper's start".into()).spawn(make);
        match thread {
            Ok(_) => self.state = State::Coming(answer),
            Err(error) => self.failed(format!("no thread to start it on: {error}")),
        }
    }
}

fn ended(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}
