//! What an operator sees of a running session, and has done to it: [`Operator`], the
//! handle, with its requests and answers.
//!
//! A request is an input of the session's driver like any other: it is answered between
//! two of the driver's steps, and costs the threads that serve faults nothing unless one
//! comes. Whether a command is possible, and what follows from it, the session machine
//! says; the socket at which others ask is in [`operator`](crate::operator).

use super::room::{REQUESTS_MAX, Room};
use crate::proto::operator::{Command, Consequence, Risk, Whereabouts};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long a session may take to answer; it may be waiting for its peer to take a message.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// The same where the VMM is asked.
const VMM_ANSWER_MAX: Duration = Duration::from_secs(45);
/// Why a session ended that was given up.
pub(super) const GIVEN_UP: &str = "its operator gave it up";

/// Limits that an operator changes; what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Of all pages that no vCPU waits for, in bits a second of IP packets; 0 is none.
    pub max_bandwidth: Option<u64>,
    /// The same once the guest has left; 0 is that of before.
    pub max_postcopy_bandwidth: Option<u64>,
    /// How long the guest may stand still where that is to be chosen, in microseconds.
    pub max_downtime_us: Option<u64>,
    /// How long all of it may take as far as that is to be chosen, in microseconds; 0: as long as
    /// it takes.
    pub max_total_us: Option<u64>,
}

/// What an operator asks for.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// How the session is.
    Status,
    /// Have the guest move now, whatever of it has been copied.
    Switch,
    /// Send no page that no vCPU waits for.
    Hold,
    /// Go on sending pages.
    GoOn,
    /// Change limits.
    Limit(Limits),
    /// Look for the destination somewhere else.
    Redirect {
        /// A ticket of the same destination, or `HOST[:PORT,PORT...]`.
        to: String,
    },
    /// End the session.
    GiveUp {
        /// What the operator has understood.
        acknowledged: Option<Risk>,
    },
    /// Run the guest at the source although it was committed.
    TakeBack {
        /// What the operator has understood.
        acknowledged: Option<Risk>,
    },
}

impl Request {
    /// Its name, for the log: it may have a ticket in it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Switch => "switch",
            Self::Hold => "hold",
            Self::GoOn => "go-on",
            Self::Limit(_) => "limit",
            Self::Redirect { .. } => "redirect",
            Self::GiveUp { .. } => "give-up",
            Self::TakeBack { .. } => "take-back",
        }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What comes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// How the session is.
    Status(Box<SessionStatus>),
    /// It is done.
    Done {
        /// What follows.
        text: String,
    },
    /// It is not done, and nothing has changed.
    Refused(Refusal),
}

/// Why something is not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Refusal {
    /// Not in this state.
    #[error("not possible now: {why}")]
    NotNow {
        /// Why.
        why: String,
    },
    /// Only with an acknowledgement.
    #[error("this is what follows: {consequence}. {} says that you know it", risk.flag())]
    Unacknowledged {
        /// What follows from it.
        consequence: String,
        /// What is to be acknowledged.
        risk: Risk,
    },
    /// The request makes no sense.
    #[error("{why}")]
    Wrong {
        /// Why.
        why: String,
    },
    /// It was tried.
    #[error("it failed, and the session goes on as before: {why}")]
    Failed {
        /// Why.
        why: String,
    },
    /// The session does not answer in time.
    #[error("the session is busy and may still do it: ask for its status")]
    Busy,
    /// The session has ended.
    #[error("the session is over")]
    Over,
}

/// How a session is. Times are in microseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// `source` or `destination`.
    pub side: String,
    /// The session's name, once it has one.
    pub session: Option<String>,
    /// The phase of the migration.
    pub phase: String,
    /// The state of this side's session machine.
    pub state: String,
    /// Where the guest is, as far as this side knows.
    pub guest: Whereabouts,
    /// The same in words.
    pub guest_words: String,
    /// The link epoch.
    pub epoch: u32,
    /// Whether a link stands.
    pub linked: bool,
    /// For how long there has been none, since there was one.
    pub paused_us: Option<u64>,
    /// Why the link was lost.
    pub why_paused: Option<String>,
    /// What came of the last attempt to make another.
    pub last_attempt: Option<String>,
    /// When the next attempt begins; 0 if one is under way.
    pub next_attempt_us: Option<u64>,
    /// When this side gives up, unless something happens before.
    pub patience_left_us: Option<u64>,
    /// Pages that the destination has, as far as this side knows.
    pub pages_settled: u64,
    /// Pages of the guest.
    pub pages_total: u64,
    /// Network faults so far, as far as this side knows.
    pub network_faults: u64,
    /// At the source: no page is sent that no vCPU waits for, by an operator's word.
    #[serde(default)]
    pub held: bool,
    /// At the source: the limit on the pages that no vCPU waits for, in bits a second.
    #[serde(default)]
    pub max_bandwidth_bps: Option<u64>,
    /// The peer's address: where it is looked for, or where it is.
    pub peer: Option<String>,
    /// Since the session began.
    pub elapsed_us: u64,
    /// What can be done.
    pub commands: Vec<Possible>,
}

/// A command, and whether it is possible.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Possible {
    /// Which.
    pub command: Command,
    /// Whether it is possible now.
    pub possible: bool,
    /// What follows from it, or why it is not possible.
    pub text: String,
    /// What must be acknowledged.
    pub risk: Option<Risk>,
}

/// Each command, by what a session machine says of it.
pub(super) fn commands(of: impl Fn(Command) -> Result<Consequence, &'static str>) -> Vec<Possible> {
    let possible = |command| match of(command) {
        Ok(Consequence { text, risk }) => {
            Possible { command, possible: true, text: text.to_owned(), risk }
        }
        Err(why) => Possible { command, possible: false, text: why.to_owned(), risk: None },
    };
    Command::ALL.into_iter().map(possible).collect()
}

/// The text of a consequence, if the command is possible and what it risks is acknowledged.
pub fn allowed(
    of: Result<Consequence, &'static str>,
    acknowledged: Option<Risk>,
) -> Result<String, Refusal> {
    let Consequence { text, risk } = of.map_err(|why| Refusal::NotNow { why: why.to_owned() })?;
    match risk {
        // An acknowledgement of something else is none.
        Some(risk) if acknowledged != Some(risk) => {
            Err(Refusal::Unacknowledged { consequence: text.to_owned(), risk })
        }
        _ => Ok(text.to_owned()),
    }
}

/// A request on its way to the driver, which answers it once.
#[derive(Debug)]
pub struct Asked {
    /// What is asked for.
    pub request: Request,
    answer: SyncSender<Answer>,
    _room: OwnedSemaphorePermit,
}

impl Asked {
    /// A request, and where its answer comes.
    fn new(request: Request, room: OwnedSemaphorePermit) -> (Self, Receiver<Answer>) {
        // Room for the one answer: whoever gives it never waits.
        let (answer, answered) = sync_channel(1);
        (Self { request, answer, _room: room }, answered)
    }

    /// Answers. Who asked may have gone.
    pub fn answer(self, answer: Answer) {
        let _ = self.answer.try_send(answer);
    }
}

/// A handle of a session for its operator; good until the session is over.
#[derive(Clone)]
pub struct Operator {
    driver: Arc<dyn Fn(Asked) -> bool + Send + Sync>,
    room: Arc<Semaphore>,
}

impl fmt::Debug for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Operator")
    }
}

impl Operator {
    /// Hands requests to `driver`, which says whether it is still there, if its `room` has some
    /// for them.
    pub(super) fn new(room: &Room, driver: impl Fn(Asked) -> bool + Send + Sync + 'static) -> Self {
        Self { driver: Arc::new(driver), room: room.requests.clone() }
    }

    /// Asks. Blocks until the session answers, for 45 s at most.
    pub fn ask(&self, request: Request) -> Answer {
        let within = match request {
            Request::TakeBack { .. } => VMM_ANSWER_MAX,
            _ => ANSWER_MAX,
        };
        let Ok(room) = self.room.clone().try_acquire_owned() else {
            let why = format!("{REQUESTS_MAX} others have asked, and wait for an answer");
            return Answer::Refused(Refusal::NotNow { why });
        };
        let (asked, answered) = Asked::new(request, room);
        if !(self.driver)(asked) {
            return Answer::Refused(Refusal::Over);
        }
        answered.recv_timeout(within).unwrap_or_else(|error| {
            Answer::Refused(match error {
                RecvTimeoutError::Timeout => Refusal::Busy,
                RecvTimeoutError::Disconnected => Refusal::Over,
            })
        })
    }

    /// How the session is.
    ///
    /// # Errors
    /// If it is over, or does not answer.
    pub fn status(&self) -> Result<SessionStatus, Refusal> {
        match self.ask(Request::Status) {
            Answer::Status(status) => Ok(*status),
            Answer::Refused(refusal) => Err(refusal),
            Answer::Done { .. } => Err(Refusal::Busy),
        }
    }

    /// At the source: looks for the same destination somewhere else, by a ticket of it or
    /// `HOST[:PORT,PORT...]`, from the next attempt on, which is made at once. Returns what
    /// follows, in words.
    ///
    /// # Errors
    /// Why not.
    pub fn redirect(&self, to: impl Into<String>) -> Result<String, Refusal> {
        self.done(Request::Redirect { to: to.into() })
    }

    /// At the source: pauses the guest and has it move now, whatever of it has been copied.
    ///
    /// # Errors
    /// Why not.
    pub fn switch(&self) -> Result<String, Refusal> {
        self.done(Request::Switch)
    }

    /// At the source: sends no page that no vCPU waits for, until [`go_on`](Self::go_on).
    ///
    /// # Errors
    /// Why not.
    pub fn hold(&self) -> Result<String, Refusal> {
        self.done(Request::Hold)
    }

    /// At the source: goes on sending pages.
    ///
    /// # Errors
    /// Why not.
    pub fn go_on(&self) -> Result<String, Refusal> {
        self.done(Request::GoOn)
    }

    /// Ends the session: before the commit the guest runs on at the source, after it it may
    /// be lost, which has to be acknowledged. Returns what follows, in words.
    ///
    /// # Errors
    /// Why not; nothing has changed then.
    pub fn give_up(&self, acknowledged: Option<Risk>) -> Result<String, Refusal> {
        self.done(Request::GiveUp { acknowledged })
    }

    /// At the source: runs the guest here although it was committed, on the caller's word
    /// that it does not run at the destination and never will. If it does, there are two
    /// running guests, which has to be acknowledged. Returns what follows, in words.
    ///
    /// # Errors
    /// Why not; nothing has changed then.
    pub fn take_back(&self, acknowledged: Option<Risk>) -> Result<String, Refusal> {
        self.done(Request::TakeBack { acknowledged })
    }

    fn done(&self, request: Request) -> Result<String, Refusal> {
        match self.ask(request) {
            Answer::Done { text } => Ok(text),
            Answer::Refused(refusal) => Err(refusal),
            Answer::Status(_) => Err(Refusal::Busy),
        }
    }
}

/// What an operator wants to know of the link, which the session machine does not keep.
#[derive(Debug, Default)]
pub(super) struct LinkDiary {
    lost: Option<Lost>,
    next_attempt: Option<Duration>,
}

#[derive(Debug)]
struct Lost {
    since: Duration,
    why: String,
    last: Option<String>,
}

impl LinkDiary {
    /// The link, or an attempt to make one, has come to an end.
    pub(super) fn lost(&mut self, now: Duration, why: impl ToString) {
        match &mut self.lost {
            None => self.lost = Some(Lost { since: now, why: why.to_string(), last: None }),
            Some(lost) => lost.last = Some(why.to_string()),
        }
    }

    /// An attempt begins then.
    pub(super) fn dials(&mut self, at: Duration) {
        self.next_attempt = Some(at);
    }

    /// A link stands.
    pub(super) fn up(&mut self) {
        *self = Self::default();
    }

    /// Writes it down for an operator.
    pub(super) fn tell(&self, now: Duration, linked: bool, into: &mut SessionStatus) {
        into.linked = linked;
        if linked {
            return;
        }
        into.next_attempt_us = self.next_attempt.map(|at| micros(at.saturating_sub(now)));
        if let Some(Lost { since, why, last }) = &self.lost {
            into.paused_us = Some(micros(now.saturating_sub(*since)));
            (into.why_paused, into.last_attempt) = (Some(why.clone()), last.clone());
        }
    }
}

pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
