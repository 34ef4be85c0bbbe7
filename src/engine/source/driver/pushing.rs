//! The driver's push lanes: their threads, when they begin, and the scan that tells them what
//! is zero.

use super::super::link::{self, PushCommand};
use super::super::zero_scan::scan_zeros;
use super::{Driver, Input};
use crate::engine::error_chain;
use crate::engine::lane::LaneError;
use crate::proto::source::SourceEvent;
use crate::transport::LaneThread;
use tokio::sync::mpsc::{Sender, channel};
use tracing::warn;

/// The most commands that wait for a push lane: those of some attempts to connect, if its
/// thread stands still, say in a page of memory that takes long to read.
const PUSH_COMMANDS_MAX: usize = 16;

/// A push lane's thread and how it is told things.
pub(super) struct PushLane {
    pub commands: Sender<PushCommand>,
    pub thread: LaneThread<()>,
}

impl Driver {
    /// Looks for holes and zero pages while the guest is on its way: the set is only
    /// right once nothing writes any more.
    fn spawn_zero_scan(&mut self) {
        let Some(zeros) = self.zeros.take() else { return };
        let (ram, shared) = (self.shared.ram.clone(), self.shared.clone());
        let scan = move || {
            let scanned = scan_zeros(ram, &shared.known, |run, kind| {
                let sent = zeros.send((run, kind)).is_ok();
                shared.push_wake.notify_one();
                sent
            });
            if let Err(error) = scanned {
                // Pages that are not known to be zero are simply sent.
                warn!(error = error_chain(&error), "the scan for zero pages ended early");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("zero-scan".into()).spawn(scan) {
            warn!(%error, "no thread for the scan for zero pages");
        }
    }

    pub(super) fn start_push(&mut self) {
        self.pinging = true;
        // Not earlier: it takes a core for a time that grows with the memory, which has
        // no place in the blackout.
        self.spawn_zero_scan();
        self.push.round.give_way();
        self.limit_bandwidth();
        self.start_lanes();
    }

    /// Has the lanes send pages, of whichever kind it is time for.
    pub(super) fn start_lanes(&mut self) {
        let epoch = self.machine.epoch();
        for lane in &self.push_lanes {
            if let Err(error) = lane.commands.try_send(PushCommand::Start { epoch }) {
                let error = LaneError::Local(format!("a push lane takes no commands: {error}"));
                let _ = self.input.send(Input::LinkEnded { epoch, error });
            }
        }
    }

    pub(super) fn spawn_push_lanes(&mut self) {
        for index in 0..self.config.ticket.push_lanes() as u8 {
            let (commands, receiver) = channel(PUSH_COMMANDS_MAX);
            let (push, input) = (self.push.clone(), self.input.clone());
            let ended = move |epoch, error| {
                let _ = input.send(Input::LinkEnded { epoch, error });
            };
            let lane = LaneThread::spawn(format!("push-{index}"), move || {
                crate::engine::defer();
                link::push_lane(push, index, receiver, ended)
            });
            match lane {
                Ok(thread) => self.push_lanes.push(PushLane { commands, thread }),
                Err(error) => {
                    let why = format!("cannot start push lane {index}: {}", error_chain(&error));
                    self.machine.handle(self.now(), SourceEvent::Cancel(why));
                }
            }
        }
    }
}
