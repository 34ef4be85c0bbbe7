//! The destination's driver: what the session machine says is done here: prepare, serve
//! faults, restore, run, take pages in, report.

mod copying;
mod linking;
mod operating;
mod telling;

use super::collapse::Collapsing;
use super::demand_in::DemandQueues;
use super::fault_book::FaultBook;
use super::guest::{self, GuestCommand, GuestEvent, GuestThread, Shell};
use super::install::Installer;
use super::links::{NewLink, accept_links, last_words};
use super::push_in::{self, PushEnd, PushGate};
use super::recording::Recording;
use super::trap_loop::{FaultCounts, TrapLoop};
use super::{DestinationConfig, DestinationEnd, Receiver, Recorded, report};
use crate::engine::event::{Event, Watch};
use crate::engine::lane::LaneError;
use crate::engine::operator::{Asked, LinkDiary};
use crate::engine::vm::DestinationVm;
use crate::failpoint::failpoint;
use crate::memory::ram::GuestRam;
use crate::proto::destination::{
    DestinationAction, DestinationEvent, DestinationSession, DestinationState,
};
use crate::proto::ledger::DestinationLedger;
use crate::proto::message::{Hello, Mismatch, ToDestination};
use crate::proto::placed::PlacedPages;
use crate::proto::source::Outcome;
use crate::report::merge::DestinationPart;
use crate::transport::{Lane, LaneServer, LaneThread, TransportError};
use quinn::{Connection, SendStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::AbortHandle;
use tracing::{Instrument, Span, debug, info, info_span, warn};

/// How often the source is told how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// QUIC error code of an orderly end.
const CLOSE_DONE: u32 = 0;
/// When the ledger is asked again after it said that pages are in hand.
const FULL_AGAIN: Duration = Duration::from_millis(1);

/// What the driver waits for. Each kind has a bound: new links, what is heard and what others ask
/// for by their room; what the guest's thread says, by what it was told to do; and of each link,
/// and of each push lane, there is one end at a time.
pub enum Input {
    Cancel { why: String, _room: OwnedSemaphorePermit },
    Linked(Box<NewLink>),
    Heard { generation: u64, message: ToDestination, _room: OwnedSemaphorePermit },
    LinkEnded { generation: u64, error: LaneError },
    PushEnded(PushEnd),
    TrapsEnded(LaneError),
    Landed { pages: u64 },
    Guest(GuestEvent),
    Operator(Asked),
}

/// The link in use.
struct CurrentLink {
    connection: Connection,
    control: SendStream,
    tasks: Vec<AbortHandle>,
}

pub struct Driver {
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
    /// Told once by the installer, once when the guest runs, and again by whoever found that
    /// it was not so yet.
    full: (UnboundedSender<()>, UnboundedReceiver<()>),
    next_progress: Duration,
    workload_ended: bool,
    workload_end_told: bool,
    /// The vCPUs were told to run.
    started: bool,
    /// When the VMM must have started them.
    start_by: Duration,
    /// Pages that came before the guest and are to be mapped once it runs.
    data: Option<PlacedPages>,
    /// They need not be any more.
    mapped: Arc<AtomicBool>,
    outcome: Option<Outcome>,
    phase: Option<(Option<DestinationState>, Span)>,
    facts: report::Facts,
    watch: Watch,
    diary: LinkDiary,
}

impl Driver {
    pub fn start(receiver: Receiver, vm: Box<dyn DestinationVm>) -> Result<Self, TransportError> {
        let Receiver { config, identity, sockets, inputs: (input, inputs), watch, .. } = receiver;
        let mut sockets = sockets.into_iter();
        let urgent = sockets.next().expect("bind_ports binds the urgent port first");
        let server = LaneServer::listen(urgent, &identity, Lane::Urgent, config.link.clone())?;
        tokio::task::spawn_local(accept_links(server, input.clone()));
        let gate = Arc::new(PushGate::default());
        let mut push_lanes = Vec::new();
        for (index, socket) in (0u8..).zip(sockets) {
            let (identity, options) = (identity.clone(), config.link.clone());
            let (gate, input) = (gate.clone(), input.clone());
            let end = PushEnd::default();
            let ended = move |epoch, error| {
                if end.put(epoch, error) {
                    let _ = input.send(Input::PushEnded(end.clone()));
                }
            };
            push_lanes.push(LaneThread::spawn(format!("push-{index}"), move || {
                crate::engine::defer();
                push_in::receive_lane(socket, identity, index, options, gate, ended)
            })?);
        }
        let to_driver = input.clone();
        let guest = guest::spawn(vm, move |event| to_driver.send(Input::Guest(event)).is_ok())
            .map_err(|source| TransportError::Io { what: "start the guest's thread", source })?;
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
            start_by: Duration::MAX,
            data: None,
            mapped: Arc::default(),
            outcome: None,
            phase: None,
            facts: report::Facts::default(),
            watch,
            diary: LinkDiary::default(),
        })
    }

    pub async fn run(self) -> Result<DestinationEnd, TransportError> {
        self.drive().instrument(info_span!("migration", side = "destination")).await
    }

    async fn drive(mut self) -> Result<DestinationEnd, TransportError> {
        loop {
            while let Some(action) = self.machine.as_mut().and_then(|m| m.poll_action()) {
                debug!(action = action.name(), "destination");
                let phase = self.phase();
                self.perform(action).instrument(phase).await;
            }
            if self.outcome.is_some() {
                break;
            }
            self.tell_watcher();
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

    /// A VMM that does not come back from starting its vCPUs must not hold the session for
    /// ever. Without a link it may be waiting for a page: then the link's limit counts.
    fn check_start(&mut self) {
        let starting = self.state() == Some(DestinationState::Starting) && self.link.is_some();
        if starting && self.now() >= self.start_by {
            let why = format!("its vCPUs did not start within {:?}", self.config.limits.restore);
            self.handle(DestinationEvent::GuestFailed(why));
        }
    }

    async fn tick(&mut self) {
        if self.machine.is_none() && self.now() >= self.config.ticket_life {
            self.outcome = Some(Outcome::Aborted("the ticket expired and nobody came".into()));
            return;
        }
        self.handle(DestinationEvent::Timer);
        self.check_start();
        self.next_progress = self.now() + PROGRESS_EVERY;
        self.tell_progress();
        if self.takes_pages() {
            self.say_progress().await;
        }
    }

    async fn take(&mut self, input: Input) {
        match input {
            Input::Cancel { why, _room } if self.machine.is_none() => {
                self.outcome = Some(Outcome::Aborted(why));
            }
            Input::Cancel { why, _room } => self.handle(DestinationEvent::Cancel(why)),
            Input::Linked(link) => self.linked(*link).await,
            Input::Heard { generation, message, _room } if generation == self.generation => {
                let ping = matches!(message, ToDestination::Ping(_));
                self.handle(DestinationEvent::Message(message));
                if ping && self.takes_pages() {
                    self.say_progress().await;
                }
            }
            Input::LinkEnded { generation, error } if generation == self.generation => {
                self.link_ended(error);
            }
            // From a link that was replaced since.
            Input::Heard { .. } | Input::LinkEnded { .. } => {}
            Input::PushEnded(end) => {
                let of = self.machine.as_ref().map(DestinationSession::epoch);
                if let Some((_, error)) = end.take().filter(|(epoch, _)| Some(*epoch) == of) {
                    self.link_ended(error);
                }
            }
            Input::TrapsEnded(error) => {
                let why = format!("faults of the guest can no longer be served: {error}");
                self.handle(DestinationEvent::GuestFailed(why));
            }
            Input::Landed { pages } => self.handle(DestinationEvent::Landed { pages }),
            Input::Guest(event) => self.guest_event(event).await,
            Input::Operator(asked) => self.operate(asked),
        }
    }

    async fn perform(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Prepare(hello) => {
                self.hello = Some(hello.clone());
                let kvm = (self.config.is_kvm)(&hello);
                let (backing, overcommit) = (self.config.backing, self.config.overcommit);
                let users = self.config.users.clone();
                self.guest.tell(GuestCommand::Prepare { hello, backing, overcommit, kvm, users });
            }
            DestinationAction::Say(message) => self.say(message).await,
            DestinationAction::OpenLanes { epoch } => self.open_lanes(epoch),
            DestinationAction::DropLink(why) => {
                self.watch.losing(&why);
                self.diary.lost(self.now(), &why);
                self.drop_link(&why);
                self.note_pause(&why);
            }
            DestinationAction::AwaitCopied { pages } => self.await_copied(pages),
            DestinationAction::TakeValid(valid) => self.take_valid(&valid),
            DestinationAction::Restore(state) => self.guest.tell(GuestCommand::Restore(state)),
            DestinationAction::RunGuest => self.start_guest(GuestCommand::Run),
            DestinationAction::KeepPaused => {
                // Nobody is going to ask for pages.
                self.workload_ended = true;
                self.start_guest(GuestCommand::KeepPaused);
            }
            DestinationAction::SendPlaced => self.send_placed().await,
            DestinationAction::Unregister => self.unregister(),
            DestinationAction::MakeReport => self.guest.tell(GuestCommand::Figures),
            DestinationAction::DropGuest => self.unregister(),
            DestinationAction::Finish(outcome) => self.outcome = Some(outcome),
        }
    }

    fn start_guest(&mut self, how: GuestCommand) {
        self.started = true;
        self.start_by = self.now() + self.config.limits.restore;
        self.guest.tell(how);
        self.map_copied();
    }

    async fn guest_event(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Prepared(shell) => self.prepared(*shell),
            GuestEvent::Refused(mismatch) => self.handle(DestinationEvent::Refused(mismatch)),
            GuestEvent::Restored => self.handle(DestinationEvent::Restored),
            GuestEvent::RestoreFailed(why) => self.handle(DestinationEvent::RestoreFailed(why)),
            GuestEvent::Entered(at) => {
                self.recording().inspect(|recording| recording.entered(at));
                let at = at.saturating_duration_since(self.began);
                self.handle(DestinationEvent::Entered(at));
                // Nothing may have been missing at all.
                if self.installer.as_ref().is_some_and(|i| i.ledger.missing() == 0) {
                    let _ = self.full.0.send(());
                }
            }
            GuestEvent::RunFailed(why) => {
                let why = format!("its vCPUs cannot be started: {why}");
                self.handle(DestinationEvent::GuestFailed(why));
            }
            GuestEvent::WorkloadEnded => self.workload_ended = true,
            GuestEvent::Figures(figures) => {
                self.facts.guest = Some(*figures);
                self.note_first_placed();
                let report = self.report().to_json();
                self.handle(DestinationEvent::ReportReady(report));
            }
        }
    }

    fn prepared(&mut self, shell: Shell) {
        let Shell { ram, trap, placer, reserved, threads } = shell;
        let ledger = DestinationLedger::new(ram.layout().pages());
        let book = FaultBook::new(threads.len());
        let recording = self.config.record.then(|| Recording::new(ledger.pages()));
        let full = self.full.0.clone();
        let placing = (placer, reserved);
        let installer = Installer::new(ledger, placing, book, self.copied(), full, recording);
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

    fn recording(&self) -> Option<&Recording> {
        self.installer.as_ref()?.recording.as_ref()
    }

    /// When what happened, once no thread has anything to add.
    fn recorded(&self) -> Option<Recorded> {
        let run = self.facts.guest.as_ref();
        let history = run.map_or(&[][..], |run| &run.history);
        Some(self.recording()?.take(history, run.and_then(|run| run.steady_per_second)))
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
                let settled = counts.placed + counts.zero + counts.removed + counts.poisoned;
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
        failpoint!("destination::before_unregistered");
        self.mapped.store(true, Ordering::Relaxed);
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
        report::part(&report::Sources {
            facts: &self.facts,
            faults: &self.faults,
            installer: self.installer.as_deref(),
            timeline: self.machine.as_ref().map(DestinationSession::timeline),
            gate: &self.gate,
            connection: self.link.as_ref().map(|link| &link.connection),
        })
    }

    /// Begins to make huge pages of a guest's memory that is complete, if somebody wants it.
    fn collapsing(&self, outcome: &Outcome) -> Option<Collapsing> {
        let wanted = self.config.huge_pages && *outcome == Outcome::Completed;
        let (ram, installer) = self.ram.clone().zip(self.installer.as_ref()).filter(|_| wanted)?;
        Collapsing::start(ram, &installer.ledger)
            .inspect_err(|error| warn!(%error, "the guest keeps small pages"))
            .ok()
    }

    /// Lets every thread go and hands the guest over.
    async fn end(mut self) -> Result<DestinationEnd, TransportError> {
        let outcome = self.outcome.take().unwrap_or(Outcome::Aborted("cancelled".into()));
        info!(?outcome, "the session is over");
        self.tell_progress();
        self.tell_watcher();
        self.note_first_placed();
        let report = self.report();
        if let Some(mut link) = self.link.take() {
            last_words(&mut link.control, &link.connection).await;
            link.connection.close(CLOSE_DONE.into(), b"done");
        }
        // A guest that may be running must stay trapped: without the trap its missing pages
        // would read as zero, and it would go on with wrong memory. It stands still instead.
        let never_runs = !self.started && outcome != Outcome::Completed;
        if never_runs {
            // Nobody may wait for a page that will not come.
            self.unregister();
        }
        self.gate.over.send_replace(true);
        for lane in std::mem::take(&mut self.push_lanes) {
            if let Err(error) = lane.join().and_then(|ended| ended) {
                warn!(%error, "a push lane ended badly");
            }
        }
        let recorded = self.recorded();
        if let Some(installer) = self.installer.as_ref().filter(|_| never_runs) {
            installer.abandon();
        }
        let collapsing = self.collapsing(&outcome);
        let name = "guest".to_owned();
        let message = format!("it does not come back from the VMM; the session: {outcome:?}");
        let vm = self.guest.end().ok_or(TransportError::ThreadPanicked { name, message })?;
        self.watch.tell(Event::Ended(outcome.clone()));
        let lost = self.installer.filter(|installer| installer.lost.pages() > 0);
        let poisoned = lost.map(|of| of.poisoned_set()).unwrap_or_default();
        Ok(DestinationEnd { outcome, vm, ram: self.ram, poisoned, report, recorded, collapsing })
    }
}
