//! A migration as the destination sees it.
//!
//! [`Receiver::bind`] makes the ticket, [`Receiver::run`] blocks until a guest came in
//! whole or the session failed. The session machine decides; this file does what it
//! says: prepare, serve faults, restore, run, take pages in, report.

use super::control::{self, ControlError};
use super::destination_guest::{self, GuestCommand, GuestEvent, GuestThread, Shell};
use super::destination_report;
use super::fault_book::FaultBook;
use super::install::Installer;
use super::push_in::{self, PushGate};
use super::serve::LaneError;
use super::trap_loop::{FaultCounts, Requests, TrapLoop};
use super::vm::DestinationVm;
use crate::memory::ram::GuestRam;
use crate::proto::destination::{
    DestinationAction, DestinationEvent, DestinationSession, DestinationState,
};
use crate::proto::frame::{FrameLimits, HEADER_LEN, PageRequest};
use crate::proto::ledger::DestinationLedger;
use crate::proto::message::{Hello, Mismatch, ToDestination, ToSource};
use crate::proto::page::{PAGE_SIZE, RUN_PAGES_MAX};
use crate::proto::source::{Outcome, SessionLimits};
use crate::report::merge::DestinationPart;
use crate::transport::ticket::Host;
use crate::transport::wire_io::FrameReader;
use crate::transport::{
    Identity, Lane, LaneServer, LaneSocket, LaneThread, LinkOptions, Ticket, TransportError,
    bind_ports,
};
use crate::uffd::DestinationBacking;
use quinn::{Connection, RecvStream, SendStream};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::AbortHandle;
use tracing::{debug, info, warn};

/// How often the source is told how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Runs of placed pages in one message.
const PLACED_RUNS: usize = 16 << 10;
/// How long the last message may take to be acknowledged.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// QUIC error code for a ticket that has been used.
const CLOSE_USED: u32 = 2;
/// QUIC error code for a link that comes back too late.
const CLOSE_STALE: u32 = 3;
/// QUIC error code of an orderly end.
const CLOSE_DONE: u32 = 0;
/// How long a peer with a ticket may take to propose.
const FIRST_MESSAGE: Duration = Duration::from_secs(5);
/// When the ledger is asked again after it said that pages are in hand.
const FULL_AGAIN: Duration = Duration::from_millis(1);

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
    /// Whether the guest runs under KVM, as far as userfaultfd must know; decided by
    /// the proposal's description of the guest.
    pub is_kvm: fn(&Hello) -> bool,
}

/// A destination that waits for its guest.
#[derive(Debug)]
pub struct Receiver {
    config: DestinationConfig,
    identity: Identity,
    ticket: Ticket,
    sockets: Vec<LaneSocket>,
    inputs: (UnboundedSender<Input>, UnboundedReceiver<Input>),
}

/// Asks a waiting or running session to stop; only heard before the commit.
#[derive(Clone, Debug)]
pub struct Canceller(UnboundedSender<Input>);

impl Canceller {
    /// Cancels, for this reason.
    pub fn cancel(&self, why: &str) {
        let _ = self.0.send(Input::Event(DestinationEvent::Cancel(why.into())));
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
    /// This side's part of the report.
    pub report: DestinationPart,
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
        Ok(Self { config, identity, ticket, sockets, inputs: unbounded_channel() })
    }

    /// What the sender needs.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// A handle that cancels it.
    pub fn canceller(&self) -> Canceller {
        Canceller(self.inputs.0.clone())
    }

    /// Waits for the guest and takes it in. Blocks until the session is over.
    ///
    /// # Errors
    /// Only if no thread or endpoint could be made: every other failure is an
    /// [`Outcome`].
    pub fn run(self, vm: Box<dyn DestinationVm>) -> Result<DestinationEnd, TransportError> {
        LaneThread::spawn("urgent", move || {
            let local = tokio::task::LocalSet::new();
            super::hurry();
            async move { local.run_until(async { Driver::start(self, vm)?.run().await }).await }
        })?
        .join()?
    }
}

/// What the driver waits for.
enum Input {
    Event(DestinationEvent),
    Linked(Box<NewLink>),
    Heard { generation: u64, message: ToDestination },
    LinkEnded { generation: u64, error: LaneError },
    PushEnded(LaneError),
    TrapsEnded(LaneError),
    Guest(GuestEvent),
}

/// A connection that has said its first message.
#[derive(Debug)]
struct NewLink {
    connection: Connection,
    control: SendStream,
    control_in: RecvStream,
    first: Result<ToDestination, Mismatch>,
}

/// The link in use.
struct CurrentLink {
    connection: Connection,
    control: SendStream,
    tasks: Vec<AbortHandle>,
}

/// The queues of the demand streams, one for each vCPU and one for the rest.
#[derive(Clone, Default)]
struct DemandQueues(Rc<std::cell::RefCell<Vec<UnboundedSender<PageRequest>>>>);

impl Requests for DemandQueues {
    fn ask(&self, request: PageRequest) {
        let queues = self.0.borrow();
        let own = request.vcpu.and_then(|vcpu| queues.get(usize::from(vcpu)));
        if let Some(queue) = own.or(queues.last()) {
            // A closed queue belongs to a lost link; what was asked is asked again then.
            let _ = queue.send(request);
        }
    }
}

struct Driver {
    config: DestinationConfig,
    began: Instant,
    machine: Option<DestinationSession>,
    hello: Option<Box<Hello>>,
    link: Option<CurrentLink>,
    generation: u64,
    inputs: UnboundedReceiver<Input>,
    input: UnboundedSender<Input>,
    guest: GuestThread,
    ram: Option<Arc<GuestRam>>,
    installer: Option<Arc<Installer>>,
    faults: Arc<FaultCounts>,
    traps: Option<Rc<TrapLoop<DemandQueues>>>,
    trap_task: Option<AbortHandle>,
    queues: DemandQueues,
    gate: Arc<PushGate>,
    push_lanes: Vec<LaneThread<Result<(), TransportError>>>,
    full: (UnboundedSender<()>, UnboundedReceiver<()>),
    next_progress: Duration,
    workload_ended: bool,
    workload_end_told: bool,
    /// The vCPUs were told to run.
    started: bool,
    outcome: Option<Outcome>,
    facts: destination_report::Facts,
}

impl Driver {
    fn start(receiver: Receiver, vm: Box<dyn DestinationVm>) -> Result<Self, TransportError> {
        let Receiver { config, identity, sockets, inputs: (input, inputs), .. } = receiver;
        let mut sockets = sockets.into_iter();
        let urgent = sockets.next().expect("bind_ports binds the urgent port first");
        let server = LaneServer::listen(urgent, &identity, Lane::Urgent, config.link.clone())?;
        tokio::task::spawn_local(accept_links(server, input.clone()));
        let gate = Arc::new(PushGate::default());
        let mut push_lanes = Vec::new();
        for (index, socket) in (0u8..).zip(sockets) {
            let (identity, options) = (identity.clone(), config.link.clone());
            let (gate, input) = (gate.clone(), input.clone());
            let ended = move |error| drop(input.send(Input::PushEnded(error)));
            push_lanes.push(LaneThread::spawn(format!("push-{index}"), move || {
                push_in::receive_lane(socket, identity, index, options, gate, ended)
            })?);
        }
        let to_driver = input.clone();
        let guest =
            destination_guest::spawn(vm, move |event| to_driver.send(Input::Guest(event)).is_ok())
                .map_err(|source| TransportError::Io {
                    what: "start the guest's thread",
                    source,
                })?;
        Ok(Self {
            config,
            began: Instant::now(),
            machine: None,
            hello: None,
            link: None,
            generation: 0,
            inputs,
            input,
            guest,
            ram: None,
            installer: None,
            faults: Arc::default(),
            traps: None,
            trap_task: None,
            queues: DemandQueues::default(),
            gate,
            push_lanes,
            full: unbounded_channel(),
            next_progress: Duration::ZERO,
            workload_ended: false,
            workload_end_told: false,
            started: false,
            outcome: None,
            facts: destination_report::Facts::default(),
        })
    }

    async fn run(mut self) -> Result<DestinationEnd, TransportError> {
        loop {
            while let Some(action) = self.machine.as_mut().and_then(|m| m.poll_action()) {
                debug!(action = action.name(), "destination");
                self.perform(action).await;
            }
            if self.outcome.is_some() {
                break;
            }
            self.tell_workload_end().await;
            let wake = tokio::time::Instant::from_std(self.began + self.wake_at());
            tokio::select! {
                biased;
                Some(input) = self.inputs.recv() => self.take(input).await,
                Some(()) = self.full.1.recv() => self.ledger_full(),
                _ = tokio::time::sleep_until(wake) => self.tick().await,
            }
        }
        self.end().await
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn handle(&mut self, event: DestinationEvent) {
        let now = self.now();
        if let Some(machine) = &mut self.machine {
            machine.handle(now, event);
        }
    }

    fn state(&self) -> Option<DestinationState> {
        self.machine.as_ref().map(DestinationSession::state)
    }

    fn wake_at(&self) -> Duration {
        match &self.machine {
            None => self.config.ticket_life,
            Some(machine) => machine.timeout().unwrap_or(Duration::MAX).min(self.next_progress),
        }
    }

    async fn tick(&mut self) {
        if self.machine.is_none() && self.now() >= self.config.ticket_life {
            self.outcome = Some(Outcome::Aborted("the ticket expired and nobody came".into()));
            return;
        }
        self.handle(DestinationEvent::Timer);
        self.next_progress = self.now() + PROGRESS_EVERY;
        if self.state() == Some(DestinationState::Running) {
            self.say_progress().await;
        }
    }

    async fn say_progress(&mut self) {
        let Some(installer) = &self.installer else { return };
        let settled = installer.ledger.pages() - installer.ledger.missing();
        let network_faults = self.faults.requests.load(Ordering::Relaxed);
        let pushed_bytes = self.gate.pushed_bytes.load(Ordering::Relaxed);
        self.say(ToSource::Progress { settled, network_faults, pushed_bytes }).await;
    }

    async fn take(&mut self, input: Input) {
        match input {
            Input::Event(DestinationEvent::Cancel(why)) if self.machine.is_none() => {
                self.outcome = Some(Outcome::Aborted(why));
            }
            Input::Event(event) => self.handle(event),
            Input::Linked(link) => self.linked(*link).await,
            Input::Heard { generation, message } if generation == self.generation => {
                let ping = matches!(message, ToDestination::Ping(_));
                self.handle(DestinationEvent::Message(message));
                if ping && self.state() == Some(DestinationState::Running) {
                    self.say_progress().await;
                }
            }
            Input::LinkEnded { generation, error } if generation == self.generation => {
                self.link_ended(error);
            }
            // From a link that was replaced since.
            Input::Heard { .. } | Input::LinkEnded { .. } => {}
            Input::PushEnded(error) => self.link_ended(error),
            Input::TrapsEnded(error) => {
                let why = format!("faults of the guest can no longer be served: {error}");
                self.outcome = Some(Outcome::Lost(why));
            }
            Input::Guest(event) => self.guest_event(event).await,
        }
    }

    /// A peer with the right ticket connected and said its first message.
    async fn linked(&mut self, link: NewLink) {
        let NewLink { connection, mut control, control_in, first } = link;
        match (&first, self.state()) {
            (Ok(ToDestination::Hello(_)), None) => {
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
                let _ = control::say(&mut control, &ToSource::Refuse(mismatch.clone())).await;
                last_words(&mut control, &connection).await;
                self.outcome = Some(Outcome::Aborted(mismatch.to_string()));
                return;
            }
            _ => {
                connection.close(CLOSE_USED.into(), b"this ticket has been used");
                return;
            }
        }
        self.generation += 1;
        let generation = self.generation;
        let listener = spawn_listener(control_in, generation, self.input.clone());
        self.link = Some(CurrentLink { connection, control, tasks: vec![listener] });
        if let Ok(first) = first {
            self.handle(DestinationEvent::Message(first));
        }
        // What was said on a link that is gone may not have arrived.
        self.workload_end_told = false;
    }

    fn link_ended(&mut self, error: LaneError) {
        if self.outcome.is_some() {
            return;
        }
        if let LaneError::Local(why) = &error {
            warn!(why, "this side failed");
        }
        info!(%error, "the link ended");
        self.drop_link(&error.to_string());
        self.handle(DestinationEvent::LinkLost(error.to_string()));
    }

    fn drop_link(&mut self, why: &str) {
        self.queues.0.borrow_mut().clear();
        if let Some(link) = self.link.take() {
            self.facts.unlinked(&link.connection);
            link.tasks.iter().for_each(AbortHandle::abort);
            let why = &why.as_bytes()[..why.len().min(256)];
            link.connection.close(1u32.into(), why);
        }
    }

    async fn perform(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Prepare(hello) => {
                self.hello = Some(hello.clone());
                let kvm = (self.config.is_kvm)(&hello);
                let backing = self.config.backing;
                self.guest.tell(GuestCommand::Prepare { hello, backing, kvm });
            }
            DestinationAction::Say(message) => self.say(message).await,
            DestinationAction::OpenLanes { epoch } => self.open_lanes(epoch),
            DestinationAction::DropLink(why) => self.drop_link(&why),
            DestinationAction::Restore(state) => {
                self.facts.switchover_bytes = state.len() as u64;
                self.guest.tell(GuestCommand::Restore(state));
            }
            DestinationAction::RunGuest => {
                self.started = true;
                self.guest.tell(GuestCommand::Run);
            }
            DestinationAction::SendPlaced => self.send_placed().await,
            DestinationAction::Unregister => self.unregister(),
            DestinationAction::MakeReport => self.guest.tell(GuestCommand::Figures),
            DestinationAction::DropGuest => self.unregister(),
            DestinationAction::Finish(outcome) => self.outcome = Some(outcome),
        }
    }

    async fn say(&mut self, message: ToSource) {
        let Some(link) = &mut self.link else { return };
        if let Err(error) = control::say(&mut link.control, &message).await {
            let error = LaneError::Link(error.to_string());
            let _ = self.input.send(Input::LinkEnded { generation: self.generation, error });
        }
    }

    async fn tell_workload_end(&mut self) {
        let running = self.state() == Some(DestinationState::Running) && self.link.is_some();
        if self.workload_ended && running && !self.workload_end_told {
            self.workload_end_told = true;
            self.say(ToSource::WorkloadEnded).await;
        }
    }

    async fn guest_event(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Prepared(shell) => self.prepared(*shell),
            GuestEvent::Refused(mismatch) => self.handle(DestinationEvent::Refused(mismatch)),
            GuestEvent::Restored => self.handle(DestinationEvent::Restored),
            GuestEvent::RestoreFailed(why) => self.handle(DestinationEvent::RestoreFailed(why)),
            GuestEvent::Entered(at) => {
                let at = at.saturating_duration_since(self.began);
                self.handle(DestinationEvent::Entered(at));
                // Nothing may have been missing at all.
                if self.installer.as_ref().is_some_and(|i| i.ledger.missing() == 0) {
                    let _ = self.full.0.send(());
                }
            }
            GuestEvent::RunFailed(why) => {
                self.outcome = Some(Outcome::Lost(format!("the guest does not run here: {why}")));
            }
            GuestEvent::WorkloadEnded => self.workload_ended = true,
            GuestEvent::Figures(figures) => {
                self.facts.guest = Some(*figures);
                let report = self.report().to_json();
                self.handle(DestinationEvent::ReportReady(report));
            }
        }
    }

    fn prepared(&mut self, shell: Shell) {
        let Some(hello) = self.hello.clone() else { return };
        if shell.machine != hello.machine {
            let field = "the machine configuration";
            let mismatch = Mismatch::new(field, &hello.machine, &shell.machine);
            // No vCPU of it ever ran: its memory can go as it is.
            let _ = shell.placer.unregister();
            return self.handle(DestinationEvent::Refused(mismatch));
        }
        let Shell { ram, trap, placer, threads, .. } = shell;
        let ledger = DestinationLedger::new(ram.layout().pages());
        let book = FaultBook::new(threads.len());
        let installer = Installer::new(ledger, placer, book, self.full.0.clone());
        let traps =
            TrapLoop::new(trap, installer.clone(), self.faults.clone(), self.queues.clone());
        let traps = match traps {
            Ok(traps) => traps,
            Err(error) => {
                let mismatch = Mismatch::new("memory traps", "needed", error);
                return self.handle(DestinationEvent::Refused(mismatch));
            }
        };
        traps.set_vcpus(&threads);
        let (serving, input) = (traps.clone(), self.input.clone());
        let serve = async move {
            let error = serving.run().await;
            let _ = input.send(Input::TrapsEnded(error));
        };
        self.trap_task = Some(tokio::task::spawn_local(serve).abort_handle());
        self.installer = Some(installer);
        self.traps = Some(traps);
        self.ram = Some(ram);
        self.handle(DestinationEvent::Prepared);
    }

    /// Takes pages in and sends requests in this epoch from now on.
    fn open_lanes(&mut self, epoch: u32) {
        let (Some(installer), Some(traps), Some(link), Some(hello)) =
            (&self.installer, &self.traps, &mut self.link, &self.hello)
        else {
            return;
        };
        traps.set_epoch(epoch);
        self.gate.open.send_replace(Some((installer.clone(), epoch)));
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
            let (queue, requests) = unbounded_channel();
            queues.push(queue);
            outgoing.push(requests);
        }
        link.tasks.push(tokio::task::spawn_local(lanes.open(outgoing)).abort_handle());
    }

    async fn send_placed(&mut self) {
        let Some(installer) = self.installer.clone() else { return };
        let placed = installer.ledger.placed_set();
        let mut parts: Vec<Vec<u8>> = placed
            .chunks(PLACED_RUNS)
            .map(|part| {
                let mut bytes = Vec::new();
                part.encode(&mut bytes);
                bytes
            })
            .collect();
        if parts.is_empty() {
            let mut nothing = Vec::new();
            placed.encode(&mut nothing);
            parts.push(nothing);
        }
        let last_index = parts.len() - 1;
        for (index, part) in parts.into_iter().enumerate() {
            self.say(ToSource::Placed { part, last: index == last_index }).await;
        }
        if let Some(traps) = &self.traps {
            traps.ask_again();
        }
    }

    fn ledger_full(&mut self) {
        let Some(installer) = &self.installer else { return };
        if self.state() != Some(DestinationState::Running) {
            // Told again when the guest runs.
            return;
        }
        match installer.ledger.finish() {
            Ok(drained) => {
                let counts = drained.counts();
                let settled = counts.placed + counts.zero + counts.removed;
                self.facts.drained(counts);
                self.handle(DestinationEvent::LedgerFull { settled });
            }
            Err(unfinished) => {
                debug!(%unfinished, "not full yet");
                let full = self.full.0.clone();
                tokio::task::spawn_local(async move {
                    tokio::time::sleep(FULL_AGAIN).await;
                    let _ = full.send(());
                });
            }
        }
    }

    fn unregister(&mut self) {
        let unregistered = self.installer.as_ref().map(|i| i.placer.unregister());
        if let Some(Err(error)) = unregistered {
            warn!(%error, "the guest's memory is still trapped");
        }
        if let Some(task) = self.trap_task.take() {
            task.abort();
        }
        self.traps = None;
    }

    fn report(&self) -> DestinationPart {
        destination_report::part(&destination_report::Sources {
            facts: &self.facts,
            faults: &self.faults,
            installer: self.installer.as_deref(),
            timeline: self.machine.as_ref().map(DestinationSession::timeline),
            gate: &self.gate,
            connection: self.link.as_ref().map(|link| &link.connection),
        })
    }

    /// Lets every thread go and hands the guest over.
    async fn end(mut self) -> Result<DestinationEnd, TransportError> {
        let outcome = self.outcome.take().unwrap_or(Outcome::Aborted("cancelled".into()));
        info!(?outcome, "the session is over");
        let report = self.report();
        if let Some(mut link) = self.link.take() {
            last_words(&mut link.control, &link.connection).await;
            link.connection.close(CLOSE_DONE.into(), b"done");
        }
        // A guest that may be running must stay trapped: without the trap its missing pages
        // would read as zero, and it would go on with wrong memory. It stands still instead.
        let may_run = self.started && outcome != Outcome::Completed;
        if !may_run && outcome != Outcome::Completed {
            // Nobody may wait for a page that will not come.
            self.unregister();
        }
        self.gate.over.send_replace(true);
        for lane in std::mem::take(&mut self.push_lanes) {
            if let Err(error) = lane.join().and_then(|ended| ended) {
                warn!(%error, "a push lane ended badly");
            }
        }
        let name = "guest".to_owned();
        let message = "see above".to_owned();
        let vm = self.guest.end().ok_or(TransportError::ThreadPanicked { name, message })?;
        Ok(DestinationEnd { outcome, vm, ram: self.ram, report })
    }
}

/// The urgent connection's page streams on this side.
struct DemandLanes {
    connection: Connection,
    installer: Arc<Installer>,
    traps: Rc<TrapLoop<DemandQueues>>,
    epoch: u32,
    generation: u64,
    input: UnboundedSender<Input>,
}

impl DemandLanes {
    /// Accepts the streams that the source has opened, and serves them.
    async fn open(self, outgoing: Vec<UnboundedReceiver<PageRequest>>) {
        if let Err(error) = self.serve(outgoing).await {
            let _ = self.input.send(Input::LinkEnded { generation: self.generation, error });
        }
    }

    async fn serve(&self, outgoing: Vec<UnboundedReceiver<PageRequest>>) -> Result<(), LaneError> {
        let lost = |error: quinn::ConnectionError| LaneError::Link(super::link_words(error));
        let mut serving = tokio::task::JoinSet::new();
        let mut seeds = self.connection.accept_uni().await.map_err(lost)?;
        greeted(&mut seeds).await?;
        serving.spawn_local(self.receive(seeds));
        let mut outgoing: Vec<_> = outgoing.into_iter().map(Some).collect();
        for _ in 0..outgoing.len() {
            let (requests, mut pages) = self.connection.accept_bi().await.map_err(lost)?;
            let index = usize::from(greeted(&mut pages).await?);
            let queue = outgoing.get_mut(index).and_then(Option::take);
            let queue = queue.ok_or_else(|| {
                LaneError::Violation(format!("demand stream {index} opened twice or too many"))
            })?;
            serving.spawn_local(self.receive(pages));
            serving.spawn_local(send_requests(queue, requests));
        }
        while let Some(ended) = serving.join_next().await {
            ended.map_err(|error| LaneError::Local(error.to_string()))??;
        }
        Ok(())
    }

    /// Takes in the pages of one stream until the link is gone.
    fn receive(&self, stream: RecvStream) -> impl Future<Output = Result<(), LaneError>> + 'static {
        let (installer, traps, epoch) = (self.installer.clone(), self.traps.clone(), self.epoch);
        async move {
            let limits = FrameLimits { pages: installer.ledger.pages(), epoch };
            let content_max = RUN_PAGES_MAX as usize * PAGE_SIZE;
            let mut frames = FrameReader::new(stream, HEADER_LEN, content_max);
            loop {
                let next = frames.next(|header| push_in::parse(header, limits));
                let Some(frame) = next.await.map_err(push_in::wire)? else {
                    return Err(LaneError::Link("the source ended a page stream".into()));
                };
                let content = frame.payload.into_bytes();
                installer.install(&frame.header, &content, &mut || traps.again())?;
            }
        }
    }
}

/// Sends the requests of one queue until its link is gone.
async fn send_requests(
    mut queue: UnboundedReceiver<PageRequest>,
    mut stream: SendStream,
) -> Result<(), LaneError> {
    while let Some(request) = queue.recv().await {
        stream
            .write_all(&request.encode())
            .await
            .map_err(|error| LaneError::Link(super::link_words(error)))?;
    }
    Ok(())
}

/// Reads the index that a stream begins with.
async fn greeted(stream: &mut RecvStream) -> Result<u16, LaneError> {
    let mut index = [0; 2];
    stream
        .read_exact(&mut index)
        .await
        .map_err(|error| LaneError::Link(super::link_words(error)))?;
    Ok(u16::from_le_bytes(index))
}

/// Accepts urgent connections for as long as the session lives; each is announced with
/// its first message.
async fn accept_links(mut server: LaneServer, input: UnboundedSender<Input>) {
    loop {
        let connection = match server.accept().await {
            Ok(link) => link.connection,
            Err(error) => return warn!(%error, "the urgent lane accepts no more"),
        };
        let input = input.clone();
        tokio::task::spawn_local(async move {
            match tokio::time::timeout(FIRST_MESSAGE, first_message(&connection)).await {
                Ok(Ok((control, control_in, first))) => {
                    let link = NewLink { connection, control, control_in, first };
                    let _ = input.send(Input::Linked(Box::new(link)));
                }
                Ok(Err(error)) => {
                    info!(%error, "a connection without a proposal");
                    connection.close(1u32.into(), error.to_string().as_bytes());
                }
                Err(_) => connection.close(1u32.into(), b"no proposal came in time"),
            }
        });
    }
}

async fn first_message(
    connection: &Connection,
) -> Result<(SendStream, RecvStream, Result<ToDestination, Mismatch>), ControlError> {
    let opened = connection.accept_bi().await;
    let (control, mut control_in) =
        opened.map_err(|error| ControlError::Link(super::link_words(error)))?;
    let body = control::hear(&mut control_in).await?;
    let first = ToDestination::decode_first(&body)?;
    Ok((control, control_in, first))
}

/// Gives what was said last the time to arrive.
async fn last_words(control: &mut SendStream, connection: &Connection) {
    let _ = control.finish();
    let heard = async {
        let _ = control.stopped().await;
        // The source closes when it has read everything.
        let _ = connection.closed().await;
    };
    let _ = tokio::time::timeout(LAST_WORDS, heard).await;
}

fn spawn_listener(
    mut control: RecvStream,
    generation: u64,
    input: UnboundedSender<Input>,
) -> AbortHandle {
    tokio::task::spawn_local(async move {
        let error = loop {
            let heard = control::hear(&mut control).await;
            match heard.and_then(|body| Ok(ToDestination::decode(&body)?)) {
                Ok(message) => {
                    if input.send(Input::Heard { generation, message }).is_err() {
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
        let _ = input.send(Input::LinkEnded { generation, error });
    })
    .abort_handle()
}
