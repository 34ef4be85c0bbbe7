//! The driver's links: made when the session machine says so, listened to, and let go.

use super::{CLOSE_DONE, Driver, Input, ResetOnDrop};
use crate::engine::control::{self, ControlError};
use crate::engine::lane::LaneError;
use crate::engine::source::link::PushCommand;
use crate::engine::source::serve::answer_requests;
use crate::engine::source::{link, said};
use crate::proto::message::{ToDestination, ToSource};
use crate::proto::source::SourceEvent;
use crate::transport::LinkOptions;
use quinn::RecvStream;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tracing::warn;

/// The least that a hello's round trip is taken for: the peer's own work is part of it.
const RTT_MIN: Duration = Duration::from_millis(10);
/// Round trips that an answer may take at least.
const ANSWER_RTTS: u32 = 6;

impl Driver {
    pub(super) async fn connect(&mut self, epoch: u32, after: Duration, answer_within: Duration) {
        self.drop_link("a new link is made").await;
        self.keep(|journal| journal.dials(epoch));
        self.diary.dials(self.now() + after);
        let (config, input) = (self.config.clone(), self.input.clone());
        let session = self.machine.session();
        let options = self.options(answer_within);
        let lanes: Vec<_> = self.push_lanes.iter().map(|lane| lane.commands.clone()).collect();
        let dial = tokio::task::spawn_local(async move {
            tokio::time::sleep(after).await;
            let input_of = match link::dial(&config, &options, session, epoch, &lanes).await {
                Ok(link) => Input::Linked(Box::new(link)),
                Err(error) => Input::LinkEnded { epoch, error },
            };
            let _ = input.send(input_of);
        });
        if let Some(replaced) = self.dial.replace(dial) {
            replaced.abort();
        }
    }

    /// The link is lost, or could not be made.
    pub(super) fn link_ended(&mut self, now: Duration, error: LaneError) {
        if let LaneError::Local(why) = &error
            && self.machine.paused()
            && self.failed_here.as_ref() != Some(why)
        {
            // Once, however often it is tried: no descriptors, say, which may pass.
            warn!(why, "this side failed");
            self.failed_here = Some(why.clone());
        }
        self.watch.losing(&error);
        self.diary.lost(now, &error);
        let event = match error {
            LaneError::Violation(why) => SourceEvent::Violation(why),
            error => SourceEvent::LinkLost(error.to_string()),
        };
        self.machine.handle(now, event);
    }

    /// How to connect: where the round trip is known, a lost hello is sent again soon.
    fn options(&self, answer_within: Duration) -> LinkOptions {
        let link = &self.config.link;
        let rtt = self.rtt.map(|rtt| rtt.max(RTT_MIN));
        let answer = answer_within.max(rtt.unwrap_or(link.rtt_initial) * ANSWER_RTTS);
        LinkOptions {
            rtt_initial: rtt.unwrap_or(link.rtt_initial),
            answer_timeout: answer.min(link.answer_timeout),
            ..link.clone()
        }
    }

    /// No page leaves any more, and none that is in a send buffer is read again: the
    /// guest may change its memory from now on. The control stream stays.
    pub(super) async fn close_lanes(&mut self) {
        for task in self.lane_tasks.drain(..) {
            task.abort();
            let _ = task.await;
        }
        if let Some(link) = &mut self.link {
            let _ = link.seeds.reset(CLOSE_DONE.into());
            link.demand.clear();
        }
    }

    pub(super) async fn drop_link(&mut self, why: &str) {
        self.close_lanes().await;
        if let Some(link) = self.link.take() {
            self.figures.unlinked(&link.transport.connection);
            link.transport.connection.close(CLOSE_DONE.into(), why.as_bytes());
        }
    }

    /// No page leaves any more, on any lane, and no connection is made: the guest may change
    /// its memory from now on.
    pub(super) async fn stop_serving(&mut self, why: &str) {
        if let Some(dial) = self.dial.take() {
            dial.abort();
            let _ = dial.await;
        }
        self.drop_link(why).await;
        for lane in &self.push_lanes {
            let (done, stopped) = oneshot::channel();
            let _ = lane.commands.send(PushCommand::Stop { done }).await;
            // One that has ended sends nothing, either.
            let _ = stopped.await;
        }
    }

    pub(super) async fn say(&mut self, message: ToDestination) {
        let Some(link) = &mut self.link else { return };
        if let Err(error) = said::say(&mut link.control, &message).await {
            let (epoch, error) = (link.epoch, LaneError::Link(error.to_string()));
            let _ = self.input.send(Input::LinkEnded { epoch, error });
        }
    }

    /// Answers page requests from now on. Before the guest is paused nobody asks.
    pub(super) fn open_lanes(&mut self, epoch: u32) {
        self.diary.up();
        self.failed_here = None;
        let Some(link) = &mut self.link else { return };
        for (pages, mut requests) in link.demand.drain(..) {
            let (shared, input) = (self.shared.clone(), self.input.clone());
            let answer = async move {
                let mut pages = ResetOnDrop(pages);
                let ended = answer_requests(&shared, epoch, &mut requests, &mut pages.0).await;
                if let Err(error) = ended {
                    let _ = input.send(Input::LinkEnded { epoch, error });
                }
            };
            self.lane_tasks.push(tokio::task::spawn_local(answer));
        }
    }
}

pub(super) fn spawn_listener(mut control: RecvStream, epoch: u32, input: UnboundedSender<Input>) {
    tokio::task::spawn_local(async move {
        let ear = control::ear();
        let error = loop {
            let Ok(_room) = ear.clone().acquire_owned().await else { return };
            let heard = control::hear(&mut control).await;
            let decoded = heard.and_then(|body| Ok(ToSource::decode(&body)?));
            match decoded {
                Ok(message) => {
                    if input.send(Input::Heard { epoch, message, _room }).is_err() {
                        return;
                    }
                }
                Err(error) => break error,
            }
        };
        let error = match error {
            ControlError::Link(why) => LaneError::Link(why),
            ControlError::Message(error) => LaneError::Violation(error.to_string()),
        };
        let _ = input.send(Input::LinkEnded { epoch, error });
    });
}
