//! A migration as the source sees it.
//!
//! [`Migration::run`] blocks until the session is over. The session machine decides;
//! `driver` does what it says.

mod builder;
mod copy;
mod driver;
mod guest;
mod journal;
mod link;
mod push;
mod report;
mod said;
mod serve;
mod shrink;
mod zero_scan;

use super::event::{Event, Watch};
use super::operator::Operator;
use super::room::Room;
use super::vm::SourceVm;
use crate::memory::ram::GuestRam;
use crate::proto::compression::CompressMode;
use crate::proto::message::SessionId;
use crate::proto::prepaging::PolicyKind;
use crate::proto::source::{Outcome, SessionLimits};
use crate::proto::switchover::SwitchoverConfig;
use crate::report::schema::Report;
use crate::transport::{LaneThread, LinkOptions, Ticket, TransportError};
pub use builder::SourceBuilder;
use driver::{Driver, Input};
pub use journal::{Beginning, Journal, Left};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// What a source needs to know.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Where to go, and with what right.
    pub ticket: Ticket,
    /// Socket and QUIC settings.
    pub link: LinkOptions,
    /// Time limits.
    pub limits: SessionLimits,
    /// The pre-paging policy.
    pub policy: PolicyKind,
    /// Pivots of the bubbling policy.
    pub pivots: Option<usize>,
    /// When to push everything that is left, whatever the policy says; counted from
    /// the moment the guest runs at the destination.
    pub drain_after: Option<Duration>,
    /// How much is copied before the guest moves.
    pub switchover: SwitchoverConfig,
    /// Whether pushed pages are compressed. Unless it is never, the destination must know how to
    /// decompress them.
    pub compress: CompressMode,
    /// The machine configuration, see [`Hello::machine`](crate::proto::message::Hello::machine).
    pub machine: String,
    /// The VMM's description of the guest, see [`Hello::guest`](crate::proto::message::Hello::guest).
    pub guest: Vec<u8>,
    /// The guest's vCPUs.
    pub vcpus: u16,
    /// The kind of guest, for the report.
    pub guest_kind: String,
    /// What the guest does, for the report.
    pub workload: Option<String>,
}

/// How it ended.
pub struct SourceEnd {
    /// The session machine's word.
    pub outcome: Outcome,
    /// The VMM; after an abort its guest runs on. `None` if one of its methods panicked, or
    /// does not return.
    pub vm: Option<Box<dyn SourceVm>>,
    /// The report, the destination's part included if it came.
    pub report: Report,
    /// Set if the migration was aborted and the guest does not run on: why not.
    pub stranded: Option<String>,
}

/// Asks a running migration to stop; only heard before the commit.
#[derive(Clone, Debug)]
pub struct Canceller {
    input: UnboundedSender<Input>,
    room: Arc<Semaphore>,
}

impl Canceller {
    /// Cancels, for this reason.
    pub fn cancel(&self, why: &str) {
        // However often it is said: those that wait to be heard say it already.
        if let Ok(room) = self.room.clone().try_acquire_owned() {
            let _ = self.input.send(Input::Cancel { why: why.into(), _room: room });
        }
    }
}

/// A migration that is ready to begin.
#[derive(Debug)]
pub struct Migration {
    config: SourceConfig,
    ram: Arc<GuestRam>,
    beginning: Beginning,
    journal: Option<Box<dyn Journal>>,
    /// Bounded by `room`, and by what the driver has begun.
    inputs: (UnboundedSender<Input>, UnboundedReceiver<Input>),
    room: Room,
    watch: Watch,
}

impl Migration {
    /// Prepares to move the guest whose memory is `ram`.
    pub fn new(config: SourceConfig, ram: Arc<GuestRam>) -> Self {
        Self::begin(config, ram, Beginning::New(SessionId(rand::random())))
    }

    /// Prepares to go on with a session that another process has left. The commit word
    /// must have decided, and nobody else may go on with it.
    pub fn resume(config: SourceConfig, ram: Arc<GuestRam>, left: Left) -> Self {
        Self::begin(config, ram, Beginning::Left(left))
    }

    fn begin(config: SourceConfig, ram: Arc<GuestRam>, beginning: Beginning) -> Self {
        let (inputs, watch) = (unbounded_channel(), Watch::default());
        let room = Room::default();
        Self { config, ram, beginning, journal: None, inputs, room, watch }
    }

    /// The same, with what another process would need in order to go on with it kept in
    /// `journal`.
    pub fn with_journal(mut self, journal: Box<dyn Journal>) -> Self {
        self.journal = Some(journal);
        self
    }

    /// The session's name.
    pub fn session(&self) -> SessionId {
        match self.beginning {
            Beginning::New(session) | Beginning::Left(Left { session, .. }) => session,
        }
    }

    /// Has `on_event` called with each event, on the thread that serves faults: it must
    /// return at once.
    pub fn on_event(mut self, on_event: impl FnMut(Event) + Send + 'static) -> Self {
        self.watch.set(Box::new(on_event));
        self
    }

    /// A handle that cancels it.
    pub fn canceller(&self) -> Canceller {
        Canceller { input: self.inputs.0.clone(), room: self.room.cancels.clone() }
    }

    /// A handle for its operator.
    pub fn operator(&self) -> Operator {
        let input = self.inputs.0.clone();
        Operator::new(&self.room, move |asked| input.send(Input::Operator(asked)).is_ok())
    }

    /// Migrates. Blocks until the session is over.
    ///
    /// # Errors
    /// Only if no thread could be made: every other failure is an [`Outcome`].
    pub fn run(self, vm: Box<dyn SourceVm>) -> Result<SourceEnd, TransportError> {
        let Self { config, ram, beginning, journal, inputs, watch, room: _ } = self;
        let begin = (beginning, journal);
        LaneThread::spawn("urgent", move || {
            super::hurry();
            async move { Ok(Driver::new(config, ram, vm, begin, inputs, watch)?.run().await) }
        })?
        .join()?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_is_cancelled_a_million_times_hears_of_it_twice() {
        let (input, mut inputs) = unbounded_channel();
        let canceller = Canceller { input, room: Room::default().cancels };
        for _ in 0..1_000_000 {
            canceller.clone().cancel("enough");
        }
        assert_eq!(inputs.len(), 2);
        // What is heard gives its place back.
        drop(inputs.try_recv());
        canceller.cancel("enough");
        assert_eq!(inputs.len(), 2);
    }
}
