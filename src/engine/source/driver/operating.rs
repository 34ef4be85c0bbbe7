//! What an operator asks of the source.

use super::super::push::lock;
use super::Driver;
use crate::engine::event::Phase;
use crate::engine::operator::{
    Answer, Asked, GIVEN_UP, Limits, Refusal, Request, SessionStatus, allowed, commands, micros,
};
use crate::proto::operator::Command;
use crate::proto::source::{SourceEvent, SourceState};
use crate::transport::redirect::redirected;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tracing::info;

impl Driver {
    /// Answers a request, at once or when the VMM has answered.
    pub(super) fn operate(&mut self, asked: Asked) {
        let answer = match &asked.request {
            Request::Status => Ok(Answer::Status(Box::new(self.status()))),
            Request::Switch => {
                allowed(self.machine.consequence(Command::Switch), None).map(|text| {
                    info!("the operator has the guest move now");
                    self.machine.handle(self.now(), SourceEvent::Switch);
                    Answer::Done { text }
                })
            }
            Request::Hold => self.hold(Command::Hold, true),
            Request::GoOn => self.hold(Command::GoOn, false),
            Request::Limit(limits) => self.limit(limits),
            Request::Redirect { to } => self.redirect(&to.clone()),
            Request::GiveUp { acknowledged } => {
                allowed(self.machine.consequence(Command::GiveUp), *acknowledged).map(|text| {
                    info!("the operator gives the session up: {text}");
                    self.machine.handle(self.now(), SourceEvent::GiveUp(GIVEN_UP.into()));
                    Answer::Done { text }
                })
            }
            Request::TakeBack { acknowledged } => {
                match allowed(self.machine.consequence(Command::TakeBack), *acknowledged) {
                    Ok(text) => {
                        info!("the operator takes the guest back: {text}");
                        self.machine.handle(self.now(), SourceEvent::TakeBack);
                        self.taking_back = Some(asked);
                        return;
                    }
                    Err(refusal) => Err(refusal),
                }
            }
        };
        asked.answer(answer.unwrap_or_else(Answer::Refused));
    }

    fn hold(&mut self, command: Command, held: bool) -> Result<Answer, Refusal> {
        let text = allowed(self.machine.consequence(command), None)?;
        info!(held, "the operator holds pages back, or lets them go");
        self.push.held.store(held, Ordering::SeqCst);
        self.shared.push_wake.notify_waiters();
        Ok(Answer::Done { text })
    }

    fn limit(&mut self, wanted: &Limits) -> Result<Answer, Refusal> {
        let text = allowed(self.machine.consequence(Command::Limit), None)?;
        info!(?wanted, "the operator's limits");
        let limits = &mut self.config.switchover;
        let none_if_zero = |limit: u64| Some(limit).filter(|limit| *limit > 0);
        if let Some(bps) = wanted.max_bandwidth {
            limits.max_bandwidth = none_if_zero(bps);
        }
        if let Some(bps) = wanted.max_postcopy_bandwidth {
            limits.max_postcopy_bandwidth = none_if_zero(bps);
        }
        if let Some(planner) = self.machine.planner_mut() {
            if let Some(most) = wanted.max_downtime_us {
                planner.set_max_downtime(Duration::from_micros(most));
            }
            if let Some(most) = wanted.max_total_us {
                planner.set_max_total(none_if_zero(most).map(Duration::from_micros));
            }
        }
        self.limit_bandwidth();
        Ok(Answer::Done { text })
    }

    /// The limit that holds now.
    pub(super) fn limit_bandwidth(&self) {
        let bps = self.config.switchover.bandwidth(self.push.round.is_over());
        lock(&self.push.rate).set(self.now(), bps);
    }

    /// Tells an operator who waits for it what came of taking the guest back.
    pub(super) fn answer_take_back(&mut self, event: &SourceEvent) {
        let answer = match event {
            SourceEvent::TakenBack => {
                let text = "the guest is its VMM's again and runs on; the destination is told, if \
                            it comes back";
                Answer::Done { text: text.into() }
            }
            SourceEvent::TakeBackFailed(why) => {
                Answer::Refused(Refusal::Failed { why: why.clone() })
            }
            _ => return,
        };
        if let Some(asked) = self.taking_back.take() {
            asked.answer(answer);
        }
    }

    fn redirect(&mut self, to: &str) -> Result<Answer, Refusal> {
        let text = allowed(self.machine.consequence(Command::Redirect), None)?;
        let ticket = redirected(&self.config.ticket, to)
            .map_err(|error| Refusal::Wrong { why: error.to_string() })?;
        let address = ticket.address();
        info!(address, "the operator redirects the session");
        self.keep(|journal| journal.redirected(&ticket.to_string()));
        self.config.ticket = ticket;
        self.machine.handle(self.now(), SourceEvent::Redirected);
        Ok(Answer::Done { text: format!("the destination's address is {address}: {text}") })
    }

    fn status(&self) -> SessionStatus {
        let (now, machine) = (self.now(), &self.machine);
        let guest = machine.whereabouts();
        let mut status = SessionStatus {
            side: "source".into(),
            session: Some(machine.session().to_string()),
            phase: Phase::from(machine.state()).to_string(),
            state: format!("{:?}", machine.state()),
            guest,
            guest_words: guest.words().into(),
            epoch: machine.epoch(),
            linked: false,
            paused_us: None,
            why_paused: None,
            last_attempt: None,
            next_attempt_us: None,
            patience_left_us: None,
            pages_settled: self.settled,
            pages_total: self.shared.ram.layout().pages(),
            network_faults: self.network_faults,
            held: self.push.held.load(Ordering::SeqCst),
            max_bandwidth_bps: lock(&self.push.rate).bps(),
            peer: Some(self.config.ticket.address()),
            elapsed_us: micros(now),
            commands: commands(|command| machine.consequence(command)),
        };
        let linked = machine.linked() && machine.state() != SourceState::TakingBack;
        self.diary.tell(now, linked, &mut status);
        if !linked {
            status.patience_left_us = machine.timeout().map(|at| micros(at.saturating_sub(now)));
        }
        status
    }
}
