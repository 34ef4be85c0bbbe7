//! An eye on the keeper: the migration goes on without it, but an operator is to know.

use crate::attach::listener::sweep;
use crate::engine::attached::Keeper;
use crate::engine::event::Phase;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

/// Notices a keeper's end.
#[derive(Debug)]
pub struct KeeperWatch {
    socket: OwnedFd,
    path: PathBuf,
    gone: bool,
}

impl KeeperWatch {
    /// Watches `keeper`, which listens at `path`. None if it cannot be watched.
    pub fn new(keeper: &Keeper, path: PathBuf) -> Option<Self> {
        let socket = keeper.socket().inspect_err(|error| {
            tracing::warn!(%error, "the keeper cannot be watched");
        });
        Some(Self { socket: socket.ok()?, path, gone: false })
    }

    /// Looks, and says so once if it has ended before it was told to.
    pub fn look(&mut self, phase: Phase) {
        if self.gone || phase == Phase::Release {
            return;
        }
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        let hung_up = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        if hung_up {
            self.gone = true;
            tracing::warn!(
                "the keeper has ended: if this process dies before the destination has all \
                 memory, the guest is lost"
            );
            // One that was killed leaves its socket's file. Not here, where faults are served:
            // the directory may be locked.
            let path = self.path.clone();
            let _ = std::thread::Builder::new().name("sweep".into()).spawn(move || sweep(&path));
        }
    }
}
