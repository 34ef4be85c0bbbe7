//! The driver's links: taken in when the source comes, opened when the session machine
//! says so, and let go.

use super::{CurrentLink, Driver, Input};
use crate::engine::control::ControlError;
use crate::engine::destination::demand_in::DemandLanes;
use crate::engine::destination::links::{NewLink, last_words, spawn_listener};
use crate::engine::destination::placed_out;
use crate::engine::destination::push_in::{CLOSE_USED, Opened};
use crate::engine::destination::said;
use crate::engine::lane::LaneError;
use crate::proto::destination::{DestinationEvent, DestinationSession};
use crate::proto::message::{ToDestination, ToSource};
use crate::proto::source::Outcome;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::unbounded_channel;
use tokio::task::AbortHandle;
use tracing::{info, warn};

/// QUIC error code for a link that comes back too late.
const CLOSE_STALE: u32 = 3;

impl Driver {
    /// A peer with the right ticket connected and said its first message.
    pub(super) async fn linked(&mut self, link: NewLink) {
        let NewLink { connection, mut control, control_in, first, room: _room } = link;
        match (&first, self.state()) {
            (Ok(ToDestination::Hello(hello)), None) => {
                self.gate.session.send_replace(Some(hello.session));
                self.began = Instant::now();
                let machine = DestinationSession::new(self.config.limits, Duration::ZERO);
                self.machine = Some(machine);
            }
            (Ok(ToDestination::Reattach { session, epoch, .. }), Some(_)) => {
                let may = |machine: &DestinationSession| machine.may_reattach(*session, *epoch);
                if !self.machine.as_ref().is_some_and(may) {
                    // An attempt that comes late must not cost the link that stands.
                    connection.close(CLOSE_STALE.into(), b"not a link to come back on");
                    return;
                }
                if self.link.is_some() {
                    self.link_ended(LaneError::Link("the source made a new link".into()));
                }
            }
            (Err(mismatch), None) => {
                // Not one session came of it, but the ticket was shown: it is used up.
                let _ = said::say(&mut control, &ToSource::Refuse(mismatch.clone())).await;
                last_words(&mut control, &connection).await;
                self.outcome = Some(Outcome::Aborted(mismatch.to_string()));
                return;
            }
            _ => {
                connection.close(CLOSE_USED.into(), b"this ticket has been used");
                return;
            }
        }
        self.diary.up();
        self.generation += 1;
        let generation = self.generation;
        // For the VMM that starts its vCPUs, pages come only from now on again.
        self.start_by = self.now() + self.config.limits.restore;
        let listener = spawn_listener(control_in, generation, self.input.clone());
        self.link = Some(CurrentLink { connection, control, tasks: vec![listener] });
        if let Ok(first) = first {
            self.handle(DestinationEvent::Message(first));
        }
        // What was said on a link that is gone may not have arrived.
        self.workload_end_told = false;
    }

    pub(super) fn link_ended(&mut self, error: LaneError) {
        if self.outcome.is_some() {
            return;
        }
        if let LaneError::Local(why) | LaneError::NoMemory(why) = &error {
            warn!(why, "this side failed");
        }
        info!(%error, "the link ended");
        self.watch.losing(&error);
        self.diary.lost(self.now(), &error);
        self.drop_link(&error.to_string());
        self.handle(DestinationEvent::LinkLost(error.to_string()));
        self.note_pause(&error.to_string());
    }

    /// The link may have been lost, for this reason.
    pub(super) fn note_pause(&mut self, why: &str) {
        if self.machine.as_ref().is_some_and(DestinationSession::paused) {
            self.facts.outages.lost(why);
        }
    }

    /// When the first page of the current link epoch was placed is in the figures.
    pub(super) fn note_first_placed(&mut self) {
        if let Some((epoch, Some(at))) = self.installer.as_ref().map(|i| i.first_placed()) {
            self.facts.outages.first_placed(epoch, at);
        }
    }

    pub(super) fn drop_link(&mut self, why: &str) {
        self.queues.0.borrow_mut().clear();
        if let Some(link) = self.link.take() {
            self.facts.unlinked(&link.connection);
            link.tasks.iter().for_each(AbortHandle::abort);
            let why = &why.as_bytes()[..why.len().min(256)];
            link.connection.close(1u32.into(), why);
        }
    }

    pub(super) async fn say(&mut self, message: ToSource) {
        let Some(link) = &mut self.link else { return };
        if let Err(error) = said::say(&mut link.control, &message).await {
            self.control_failed(&error);
        }
    }

    fn control_failed(&self, error: &ControlError) {
        let error = LaneError::Link(error.to_string());
        let _ = self.input.send(Input::LinkEnded { generation: self.generation, error });
    }

    /// Takes pages in and sends requests in this epoch from now on.
    pub(super) fn open_lanes(&mut self, epoch: u32) {
        self.note_first_placed();
        let (Some(installer), Some(traps), Some(link), Some(hello)) =
            (&self.installer, &self.traps, &mut self.link, &self.hello)
        else {
            return;
        };
        traps.set_epoch(epoch);
        installer.begin(epoch, &mut || traps.again());
        self.facts.outages.up(epoch, 0);
        let compressed = hello.compressed();
        let opened = Opened { installer: installer.clone(), epoch, compressed };
        self.gate.open.send_replace(Some(opened));
        let lanes = DemandLanes {
            connection: link.connection.clone(),
            installer: installer.clone(),
            traps: traps.clone(),
            epoch,
            generation: self.generation,
            input: self.input.clone(),
        };
        let mut queues = self.queues.0.borrow_mut();
        queues.clear();
        let mut outgoing = Vec::new();
        for _ in 0..=hello.vcpus {
            // The ledger has a page asked for once a link: no more than threads wait for one.
            let (queue, requests) = unbounded_channel();
            queues.push(queue);
            outgoing.push(requests);
        }
        link.tasks.push(tokio::task::spawn_local(lanes.open(outgoing)).abort_handle());
    }

    pub(super) async fn send_placed(&mut self) {
        let (Some(installer), Some(link)) = (&self.installer, &mut self.link) else { return };
        if let Err(error) = placed_out::tell(&installer.ledger, &mut link.control).await {
            return self.control_failed(&error);
        }
        let Some(traps) = &self.traps else { return };
        if let Err(error) = traps.ask_again().await {
            let _ = self.input.send(Input::LinkEnded { generation: self.generation, error });
        }
    }
}
