//! A migration as the destination sees it.
//!
//! [`Receiver::bind`] makes the ticket, [`Receiver::run`] blocks until a guest came in
//! whole or the session failed. The session machine decides; `driver` does what it
//! says.

mod builder;
mod collapse;
mod copied;
mod demand_in;
mod driver;
mod fault_book;
mod guest;
mod install;
mod links;
mod placed_out;
mod push_in;
mod record_file;
mod recording;
mod report;
mod said;
mod trap_loop;

use super::event::{Event, Watch};
use super::operator::Operator;
use super::room::Room;
use super::vm::DestinationVm;
use crate::memory::ram::GuestRam;
use crate::memory::users::MemoryUser;
use crate::proto::message::Hello;
use crate::proto::page_set::PageSet;
use crate::proto::source::{Outcome, SessionLimits};
use crate::report::merge::DestinationPart;
use crate::transport::ticket::Host;
use crate::transport::{
    Identity, LaneSocket, LaneThread, LinkOptions, Ticket, TransportError, bind_ports,
};
use crate::uffd::DestinationBacking;
pub use builder::DestinationBuilder;
pub use collapse::Collapsing;
use driver::{Driver, Input};
pub use record_file::{EventKind, RecordError, Recorded, RecordedEvent};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// What a destination needs to know.
#[derive(Clone, Debug)]
pub struct DestinationConfig {
    /// The address to listen on.
    pub listen: IpAddr,
    /// The urgent lane's port; push lanes take those after it. 0: any.
    pub port: u16,
    /// The host that goes into the ticket, if it is not the address above.
    pub public_host: Option<Host>,
    /// Push lanes, 1 to 8.
    pub push_lanes: usize,
    /// Socket and QUIC settings.
    pub link: LinkOptions,
    /// Time limits.
    pub limits: SessionLimits,
    /// How long the ticket is good.
    pub ticket_life: Duration,
    /// What guest memory is made of here.
    pub backing: DestinationBacking,
    /// The memory for the guest need not be there; none is reserved.
    pub overcommit: bool,
    /// Whether to make huge pages of the guest's memory once it is all here.
    pub huge_pages: bool,
    /// Whether the guest runs under KVM, as far as userfaultfd must know; decided by
    /// the proposal's description of the guest.
    pub is_kvm: fn(&Hello) -> bool,
    /// Users of guest memory that only the VMM knows of.
    pub users: Vec<MemoryUser>,
    /// Whether to keep when each fault was read and each run of pages placed.
    pub record: bool,
}

/// A destination that waits for its guest.
#[derive(Debug)]
pub struct Receiver {
    config: DestinationConfig,
    identity: Identity,
    ticket: Ticket,
    sockets: Vec<LaneSocket>,
    /// Bounded by `room`, and by what the driver has begun.
    inputs: (UnboundedSender<Input>, UnboundedReceiver<Input>),
    room: Room,
    watch: Watch,
}

/// Asks a waiting or running session to stop; only heard before the commit.
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

/// How it ended.
pub struct DestinationEnd {
    /// The session machine's word.
    pub outcome: Outcome,
    /// The VMM, with the guest if it came.
    pub vm: Box<dyn DestinationVm>,
    /// The guest's memory, if the session came so far.
    pub ram: Option<Arc<GuestRam>>,
    /// Pages whose content is lost, because the source could not read them, and all others of the
    /// same huge page if the memory is of hugetlbfs: touching one
    /// through this memory is a memory error. It is so in this mapping only; in a file that
    /// is behind it they are holes, which another process, or a later migration from here by
    /// another process, would take for zero.
    pub poisoned: PageSet,
    /// This side's part of the report.
    pub report: DestinationPart,
    /// When what happened, if that was to be kept.
    pub recorded: Option<Recorded>,
    /// Huge pages being made of the guest's memory, if that was asked for and the guest came:
    /// [`DestinationBuilder::huge_pages`].
    pub collapsing: Option<Collapsing>,
}

impl Receiver {
    /// Binds the ports and makes the ticket.
    ///
    /// # Errors
    /// A port in use, or no way to make keys or sockets.
    pub fn bind(config: DestinationConfig) -> Result<Self, TransportError> {
        let sockets = bind_ports(config.listen, config.port, config.push_lanes, &config.link)?;
        let expires = SystemTime::now() + config.ticket_life;
        let expires = expires.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let identity = Identity::generate(expires)?;
        let ports: Vec<u16> = sockets.iter().map(|socket| socket.local_addr().port()).collect();
        let host = config.public_host.clone().unwrap_or(Host::from(config.listen));
        let ticket = identity.ticket(host, ports[0], ports[1..].to_vec()).map_err(|error| {
            TransportError::Setup { what: "the ticket", detail: error.to_string() }
        })?;
        let (inputs, watch) = (unbounded_channel(), Watch::default());
        let room = Room::default();
        Ok(Self { config, identity, ticket, sockets, inputs, room, watch })
    }

    /// Has `on_event` called with each event, on the thread that serves faults: it must
    /// return at once.
    pub fn on_event(mut self, on_event: impl FnMut(Event) + Send + 'static) -> Self {
        self.watch.set(Box::new(on_event));
        self
    }

    /// What the sender needs.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
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

    /// Waits for the guest and takes it in. Blocks until the session is over.
    ///
    /// # Errors
    /// Only if no thread or endpoint could be made: every other failure is an
    /// [`Outcome`].
    pub fn run(self, vm: Box<dyn DestinationVm>) -> Result<DestinationEnd, TransportError> {
        LaneThread::spawn("urgent", move || {
            super::hurry();
            async move { Driver::start(self, vm)?.run().await }
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
