//! What holds a guest's memory beside this process, a keeper or the service manager's store,
//! and how they part.

use super::service::Stored;
use crate::attach::client::{AttachError, Attached};
use crate::attach::commit_word::{CommitWord, Committed};
use crate::attach::message::{Message, Request};
use crate::engine::attached;
use crate::engine::vm::VmError;
use crate::failpoint::failpoint;
use crate::proto::source::Outcome;
use nix::sys::socket::{MsgFlags, send};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Child;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a keeper's process may take to end once it has said that it will.
const END_MAX: Duration = Duration::from_secs(2);

/// A keeper of the guest's memory, attached to.
#[derive(Debug)]
pub struct Keeper {
    attached: Attached,
    /// Where it listens.
    path: PathBuf,
    /// Says when its process has ended, if it is a child of this one.
    ended: Option<Receiver<()>>,
}

impl Keeper {
    /// The keeper behind `attached`, which listens at `path`; `process`, if it is a child of
    /// this one, which may live on for long: nothing of it stays in the list of processes
    /// whenever it ends.
    pub(super) fn new(attached: Attached, path: PathBuf, process: Option<Child>) -> Self {
        let (tell, ended) = channel();
        let reap = |mut process: Child| {
            let reaper = std::thread::Builder::new().name("keeper's end".into());
            let wait = move || {
                let _ = process.wait();
                let _ = tell.send(());
            };
            reaper.spawn(wait).ok().map(|_thread| ended)
        };
        Self { attached, path, ended: process.and_then(reap) }
    }

    /// Nobody needs the memory any more.
    fn drained(mut self, proof: &Committed) -> Result<(), AttachError> {
        let mut told = self.attached.committed(proof);
        drop(self.attached);
        if let Err(AttachError::Socket { .. }) = told
            && let Ok(mut again) = Attached::connect_within(&self.path, END_MAX)
        {
            // Only the conversation had broken: it would hold the memory for ever.
            told = again.committed(proof);
        }
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
    fn given_back(self) -> Result<(), AttachError> {
        let told = self.attached.resume();
        wait_for(self.ended);
        told
    }
}

/// Waits for a keeper's process, which has said that it ends.
fn wait_for(ended: Option<Receiver<()>>) {
    if let Some(ended) = ended {
        let _ = ended.recv_timeout(END_MAX);
    }
}

/// Who holds on to the memory of a guest that was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldBy {
    /// The keeper.
    Keeper,
    /// The service manager, in its descriptor store.
    DescriptorStore,
}

/// Whoever holds it.
#[derive(Debug)]
enum Beside {
    Keeper(Keeper),
    Store(Stored),
}

/// Whoever holds it, if somebody does, for all threads that have to do with it.
#[derive(Clone, Debug, Default)]
pub(super) struct Holding(Arc<Mutex<Option<Beside>>>);

impl Holding {
    pub fn of(keeper: Keeper) -> Self {
        Self(Arc::new(Mutex::new(Some(Beside::Keeper(keeper)))))
    }

    pub fn stored(stored: Stored) -> Self {
        Self(Arc::new(Mutex::new(Some(Beside::Store(stored)))))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Beside>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<Beside> {
        self.lock().take()
    }

    /// The socket to it, on which nothing but its end comes unasked.
    pub fn socket(&self) -> Option<OwnedFd> {
        let held = self.lock();
        let Some(Beside::Keeper(keeper)) = held.as_ref() else { return None };
        keeper.attached.socket().try_clone_to_owned().ok()
    }

    /// Another one has taken the place of one that has ended; of no use if that was left.
    pub fn renew(&self, keeper: Keeper) {
        if let Some(held) = self.lock().as_mut() {
            *held = Beside::Keeper(keeper);
        }
    }

    /// Whether there is none any more.
    pub fn is_left(&self) -> bool {
        self.lock().is_none()
    }

    /// Tells it that this process ends, and that an operator wants it so: nobody is to be
    /// started in its place. Whatever else is being said to it.
    pub fn desert(&self) {
        let Ok(bytes) = Request::Leave.encode() else { return };
        // The lock may be held by somebody who waits for an answer.
        let socket = self.0.try_lock().ok().and_then(|held| {
            let Some(Beside::Keeper(keeper)) = held.as_ref() else { return None };
            keeper.attached.socket().try_clone_to_owned().ok()
        });
        if let Some(socket) = socket {
            // A few bytes: all of them, or none.
            let _ =
                send(socket.as_raw_fd(), &bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
        }
    }

    /// The last word to it, when all that was promised is done; who holds on, if somebody
    /// does.
    pub fn part(&self, outcome: &Outcome, word: &CommitWord) -> Option<HeldBy> {
        let held = self.take()?;
        failpoint!("source::before_keeper_released");
        let lost = matches!(outcome, Outcome::Lost(_));
        let (by, parted) = match held {
            Beside::Store(_) if lost => return Some(HeldBy::DescriptorStore),
            Beside::Store(stored) => (HeldBy::DescriptorStore, tell_store(&stored)),
            Beside::Keeper(keeper) => (HeldBy::Keeper, tell_keeper(keeper, outcome, word)),
        };
        failpoint!("source::after_keeper_released");
        if let Err(error) = parted {
            tracing::warn!(error, "the guest's memory may still be held");
            return None;
        }
        lost.then_some(by)
    }
}

fn tell_store(stored: &Stored) -> Result<(), String> {
    stored.remove().map_err(|error| crate::engine::error_chain(&error))
}

fn tell_keeper(keeper: Keeper, outcome: &Outcome, word: &CommitWord) -> Result<(), String> {
    let told = match outcome {
        Outcome::Completed => match word.commit() {
            Ok(proof) => keeper.drained(&proof),
            // Nobody completes what was not committed.
            Err(_) => keeper.given_back(),
        },
        Outcome::Aborted(_) => keeper.given_back(),
        Outcome::Lost(_) => keeper.attached.leave(),
    };
    told.map_err(|error| crate::engine::error_chain(&error))
}

/// The guest is its VMM's again, and its memory needs no keeper: the next migration needs
/// one of its own, and may begin while this one is still telling its destination.
impl attached::Beside for Holding {
    fn given_up(&mut self) -> Result<(), VmError> {
        match self.take() {
            Some(Beside::Keeper(keeper)) => Ok(keeper.discard()?),
            Some(Beside::Store(stored)) => Ok(stored.remove()?),
            None => Ok(()),
        }
    }

    fn given_back(&mut self) {
        // In a store nothing is in the way of anybody, and it is needed as long as the
        // destination has not been told.
        let mut held = self.lock();
        if let Some(Beside::Keeper(keeper)) = held.take_if(|held| matches!(held, Beside::Keeper(_)))
            && let Err(error) = keeper.given_back()
        {
            tracing::debug!(%error, "the keeper was not told that it may go");
        }
    }
}
