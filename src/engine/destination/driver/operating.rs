//! What an operator asks of the destination.

use super::Driver;
use crate::engine::event::Phase;
use crate::engine::operator::{
    Answer, Asked, GIVEN_UP, Request, SessionStatus, allowed, commands, micros,
};
use crate::proto::destination::{DestinationEvent, DestinationSession};
use crate::proto::operator::{Command, Consequence, Whereabouts};
use crate::proto::source::Outcome;
use std::sync::atomic::Ordering;
use tracing::info;

impl Driver {
    /// Answers a request.
    pub(super) fn operate(&mut self, asked: Asked) {
        let answer = match &asked.request {
            Request::Status => Ok(Answer::Status(Box::new(self.status()))),
            Request::Switch | Request::Hold | Request::GoOn | Request::Limit(_) => {
                allowed(self.consequence(Command::Switch), None).map(|text| Answer::Done { text })
            }
            Request::Redirect { .. } => {
                allowed(self.consequence(Command::Redirect), None).map(|text| Answer::Done { text })
            }
            Request::TakeBack { acknowledged } => {
                allowed(self.consequence(Command::TakeBack), *acknowledged)
                    .map(|text| Answer::Done { text })
            }
            Request::GiveUp { acknowledged } => {
                allowed(self.consequence(Command::GiveUp), *acknowledged).map(|text| {
                    info!("the operator gives the session up: {text}");
                    match self.machine {
                        Some(_) => self.handle(DestinationEvent::GiveUp(GIVEN_UP.into())),
                        None => self.outcome = Some(Outcome::Aborted(GIVEN_UP.into())),
                    }
                    Answer::Done { text }
                })
            }
        };
        asked.answer(answer.unwrap_or_else(Answer::Refused));
    }

    /// What follows from `command`, also before anybody has come.
    fn consequence(&self, command: Command) -> Result<Consequence, &'static str> {
        match (&self.machine, command) {
            (Some(machine), _) => machine.consequence(command),
            (None, Command::GiveUp) => Ok(Consequence {
                text: "the ticket is good for nothing any more, and no guest is taken in",
                risk: None,
            }),
            (None, _) => Err("nobody has come yet"),
        }
    }

    fn status(&self) -> SessionStatus {
        let now = self.now();
        let machine = self.machine.as_ref();
        let guest = machine.map_or(Whereabouts::Source, DestinationSession::whereabouts);
        let ledger = self.installer.as_ref().map(|installer| &installer.ledger);
        let pages = ledger.map_or(0, |ledger| ledger.pages());
        let connection = self.link.as_ref().map(|link| &link.connection);
        let mut status = SessionStatus {
            side: "destination".into(),
            session: self.hello.as_ref().map(|hello| hello.session.to_string()),
            phase: self.state().map_or(Phase::Waiting, Phase::from).to_string(),
            state: self.state().map_or("Waiting".into(), |state| format!("{state:?}")),
            guest,
            guest_words: guest.words().into(),
            epoch: machine.map_or(0, DestinationSession::epoch),
            linked: false,
            paused_us: None,
            why_paused: None,
            last_attempt: None,
            next_attempt_us: None,
            patience_left_us: None,
            pages_settled: ledger.map_or(0, |ledger| pages - ledger.missing()),
            pages_total: pages,
            network_faults: self.faults.requests.load(Ordering::Relaxed),
            held: false,
            max_bandwidth_bps: None,
            peer: connection.map(|connection| connection.remote_address().to_string()),
            elapsed_us: micros(now),
            commands: commands(|command| self.consequence(command)),
        };
        let linked = connection.is_some();
        self.diary.tell(now, linked, &mut status);
        if !linked {
            let until = match machine {
                Some(machine) => machine.timeout(),
                None => Some(self.config.ticket_life),
            };
            status.patience_left_us = until.map(|at| micros(at.saturating_sub(now)));
        }
        status
    }
}
