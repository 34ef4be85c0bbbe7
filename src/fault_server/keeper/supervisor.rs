//! [`Supervisor`]: has a keeper start a new fault server where the last one died.
//!
//! The keeper is the one process that outlives VMM, fault server and whoever started
//! these, and that notices at once when its client is gone. All that it does for it is one
//! `spawn`; nothing is allocated by the size of a guest.

use super::super::record::RecordFile;
use super::restarts::{Restarts, STARTS_MAX, WINDOW};
use crate::attach::keep::{Gone, Next, Succession};
use crate::attach::socket::Connection;
use crate::program::output::{FAREWELL, Line, voice_to};
use crate::program::voice::Voice;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// The program that goes on with a session whose fault server has died: the keeper starts
/// it with a socket to itself as standard input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartCommand {
    /// The program. It calls [`FaultServer::restarted`](crate::fault_server::FaultServer::restarted).
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

/// Where fault servers that a keeper starts write: where the first one did.
#[derive(Debug)]
pub(super) struct Outputs {
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// What is to be started, and what its outputs are.
#[derive(Debug)]
pub(super) struct Orders {
    pub command: RestartCommand,
    pub outputs: Outputs,
}

/// Why nobody is at work on a session, for whoever asks.
pub(super) type Idle = Rc<RefCell<Option<String>>>;

/// Who follows a fault server that is gone.
pub(super) struct Supervisor {
    orders: Option<Orders>,
    /// For words to where fault servers write, since there is one: no fault server is started by a
    /// thread that waits for a reader.
    voice: Option<Voice<Line>>,
    record: RecordFile,
    restarts: Restarts,
    /// Whether somebody should be at work: not after one that ended on purpose, or too many
    /// that did not.
    wanted: bool,
    child: Option<Child>,
    /// Until when a session that was aborted is of use to somebody.
    until: Option<Instant>,
    idle: Idle,
}

impl Supervisor {
    pub fn new(orders: Option<Orders>, record: RecordFile, idle: Idle) -> Self {
        let wanted = orders.is_some();
        let (restarts, child, until) = (Restarts::default(), None, None);
        // Made before there is anything to say: it may be for want of threads or descriptors that
        // there is.
        let voice = orders.as_ref().and_then(|orders| {
            voice_to("voice", File::from(orders.outputs.stderr.try_clone().ok()?)).ok()
        });
        Self { orders, voice, record, restarts, wanted, child, until, idle }
    }

    /// How long a session that was aborted may still be of use to somebody.
    fn linger(&self) -> Duration {
        let in_doubt = self.record.newest().ok().filter(|newest| newest.state_left);
        // After that a destination as patient as this side has given up by itself.
        in_doubt.map_or(Duration::ZERO, |newest| newest.plan.patience())
    }

    fn due(&mut self) -> Option<Instant> {
        let due = self.wanted.then(|| self.restarts.due(Instant::now())).flatten();
        if self.wanted && due.is_none() {
            self.wanted = false;
            let why = format!(
                "its fault server has died {STARTS_MAX} times within {WINDOW:?}, and is not \
                 started again; the memory is held for --resume or --discard"
            );
            self.say(&why);
            *self.idle.borrow_mut() = Some(why);
        }
        due
    }

    /// One line where the fault servers write theirs. Nobody may read there any more.
    fn say(&self, what: &str) {
        if let Some(voice) = &self.voice {
            voice.say(Line::word(&format!("postcopy-keeper: {what}")));
        }
    }

    /// Nobody is left of what was started last, when another one is to follow.
    fn bury(&mut self, on_purpose: bool) {
        let Some(mut child) = self.child.take() else { return };
        if on_purpose {
            // It has things to say yet. Nothing of it stays in the list of processes.
            let wait = move || child.wait();
            let _ = std::thread::Builder::new().name("burial".into()).spawn(wait);
            return;
        }
        // Its socket is closed: if it is not dead, it must not go on beside the next one.
        let _ = child.kill();
        if let Ok(status) = child.wait() {
            self.say(&format!("the fault server, process {}, has gone: {status}", child.id()));
        }
    }

    fn spawn(&mut self) -> io::Result<Connection> {
        let orders = self.orders.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new(&orders.command.program)
            .args(&orders.command.arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(orders.outputs.stdout.try_clone()?))
            .stderr(Stdio::from(orders.outputs.stderr.try_clone()?))
            .process_group(0)
            .spawn()?;
        self.restarts.started(Instant::now());
        let number = self.restarts.count();
        self.say(&format!(
            "the fault server is gone; process {} goes on with the session (start {number} \
             within {WINDOW:?}, at most {STARTS_MAX})",
            child.id(),
        ));
        self.child = Some(child);
        Connection::new(ours).map_err(io::Error::other)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // The keeper's end.
        if let Some(voice) = &self.voice {
            voice.finish(FAREWELL);
        }
    }
}

impl Succession for Supervisor {
    fn next(&mut self, gone: Option<Gone>) -> Next {
        let now = Instant::now();
        if let Some(gone) = gone {
            if gone.on_purpose {
                self.wanted = false;
                *self.idle.borrow_mut() = Some("its fault server has ended; see --resume".into());
                // Whoever reads there waits for the end of all that write there, and this may
                // stay for long.
                self.voice = None;
                self.orders = self.orders.take().map(Orders::mute);
            } else if gone.was_at_work && self.orders.is_some() {
                if !std::mem::replace(&mut self.wanted, true) {
                    self.restarts.forgive();
                }
                *self.idle.borrow_mut() = None;
            }
            if !gone.committed {
                let linger = self.linger();
                self.until.get_or_insert(now + linger);
            }
        }
        self.bury(gone.is_some_and(|gone| gone.on_purpose));
        if self.until.is_some_and(|until| until <= now) {
            return Next::Wait(self.until);
        }
        match self.due() {
            Some(at) => Next::Start(at),
            None => Next::Wait(self.until),
        }
    }

    fn start(&mut self) -> Option<Connection> {
        match self.spawn() {
            Ok(connection) => {
                *self.idle.borrow_mut() = None;
                Some(connection)
            }
            Err(error) => {
                self.restarts.failed(Instant::now());
                let why = format!("no fault server can be started, which is tried again: {error}");
                let said = self.idle.replace(Some(why.clone()));
                // Once, however long it takes.
                if said.as_ref() != Some(&why) {
                    self.say(&why);
                }
                None
            }
        }
    }
}

impl Orders {
    /// The same, and nothing that is written is read.
    fn mute(self) -> Self {
        let null = || File::options().write(true).open("/dev/null").map(OwnedFd::from);
        match (null(), null()) {
            (Ok(stdout), Ok(stderr)) => Self { outputs: Outputs { stdout, stderr }, ..self },
            _ => self,
        }
    }
}
