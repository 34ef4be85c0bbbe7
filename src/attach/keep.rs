//! A keeper's end of the attach protocol: it serves the memory of a guest that it does not
//! have to one fault-server after another, each of which goes on where the last one died.
//!
//! Who follows, and when, is the [`Succession`]'s to say. That there is one fault-server
//! at a time is this module's: the next one is let in, or started, when the last one's
//! connection has ended.

use super::commit_word::CommitWord;
use super::server::{AttachedVm, ServeEnd, Server, ServerError, one_line};
use super::session::{Attempt, Ending, Session, SessionError};
use super::socket::Connection;
use crate::failpoint::failpoint;
use std::time::{Duration, Instant};

/// How long a fault-server that was started may take to say Hello, on a busy host.
const START_MAX: Duration = Duration::from_secs(30);

/// How a client of a keeper has gone.
#[derive(Clone, Copy, Debug)]
pub struct Gone {
    /// The guest was given to the destination. If not, it is its VMM's from now on.
    pub committed: bool,
    /// It has said that it ends.
    pub on_purpose: bool,
    /// It had taken the session over, and not only looked.
    pub was_at_work: bool,
}

/// Who comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Whoever comes by itself until then; for any time if there is no limit.
    Wait(Option<Instant>),
    /// Whoever comes until then; else one is to be started.
    Start(Instant),
}

/// Decides who follows a fault-server that is gone.
pub trait Succession {
    /// One is gone; or none could be started, if there was none.
    fn next(&mut self, gone: Option<Gone>) -> Next;
    /// Starts a fault-server; the socket to it, if that worked.
    fn start(&mut self) -> Option<Connection>;
}

impl Server {
    /// Serves what a fault-server left to a keeper: the memory of a guest whose commit
    /// word is `word`. `first` is that fault-server's own connection; while one is there
    /// nobody else is let in. Returns when somebody says that nobody needs the memory, or
    /// when the guest is its VMM's and nobody came in time.
    pub fn keep(
        &self,
        first: Connection,
        vm: &mut dyn AttachedVm,
        word: CommitWord,
        succession: &mut dyn Succession,
    ) -> Result<ServeEnd, ServerError> {
        let mut attempt = Attempt::kept(word);
        // The first one has brought the session.
        let mut was_at_work = true;
        let (mut client, mut hello_max) = (first, self.patience.hello);
        loop {
            let on_purpose = match Session::new(self, client, &mut attempt, vm).run(hello_max) {
                Ok(Ending::Released) => return Ok(ServeEnd::Released),
                Ok(Ending::Stopped) => return Ok(ServeEnd::Stopped),
                Ok(Ending::GivenBack) => return Ok(ServeEnd::GivenBack),
                Ok(Ending::Left) => true,
                Err(SessionError::Server(error)) => return Err(error),
                Err(error) => {
                    tracing::info!("the fault-server is gone: {}", one_line(&error));
                    false
                }
            };
            was_at_work |= attempt.was_taken_over();
            failpoint!("keeper::before_abort_word");
            let committed = attempt.is_committed();
            if !committed {
                failpoint!("keeper::after_abort_word");
            }
            let gone = Gone { committed, on_purpose, was_at_work };
            was_at_work = false;
            let mut next = succession.next(Some(gone));
            (client, hello_max) = loop {
                let (until, starts) = match next {
                    Next::Wait(until) => (until, false),
                    Next::Start(at) => (Some(at), true),
                };
                if starts && !gone.committed {
                    // The guest may be migrated anew at any time, with a keeper of its own at
                    // this place; who tells the old destination needs no path to here.
                    self.listener.hide();
                }
                match self.next_client(until)? {
                    Some(client) => break (client, self.patience.hello),
                    None if !starts => return Ok(ServeEnd::GivenBack),
                    None => {}
                }
                match succession.start() {
                    Some(client) => break (client, START_MAX),
                    None => next = succession.next(None),
                }
            };
        }
    }
}
