//! The source's driver: what the session machine says is done here, in the order in
//! which a migration goes: connect, propose, pause, send the state, commit, serve and
//! push, release.

mod copying;
mod keeping;
mod linking;
mod operating;
mod pushing;
mod telling;

use super::copy::Round;
use super::guest::{self, GuestCommand, GuestThread};
use super::journal::{Beginning, Journal};
use super::link::Link;
use super::push::{PushShared, lock};
use super::serve::{SourceShared, send_pages};
use super::{SourceConfig, SourceEnd, report};
use crate::engine::event::{Event, Watch};
use crate::engine::lane::LaneError;
use crate::engine::operator::{Asked, LinkDiary};
use crate::engine::vm::{Captured, SourceVm};
use crate::failpoint::failpoint;
use crate::memory::dirty_bitmap::DirtyBitmap;
use crate::memory::ram::GuestRam;
use crate::proto::compression::{CompressMode, Compression};
use crate::proto::frame::{Origin, PageKind};
use crate::proto::ledger::LinkEpoch;
use crate::proto::message::{FEATURE_COMPRESSION, Hello, ToDestination, ToSource};
use crate::proto::pacing::{Pacer, PacerConfig};
use crate::proto::page::{PAGE_SIZE, PageRun};
use crate::proto::prepaging::PolicyConfig;
use crate::proto::source::{Outcome, SourceAction, SourceEvent, SourceSession, SourceState};
use crate::transport::TransportError;
use copying::CopyingTimes;
use pushing::PushLane;
use quinn::SendStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::task::JoinHandle;
use tracing::{Instrument, Span, debug, info, info_span, warn};

/// How often the urgent lane is timed while pages are pushed.
const PING_EVERY: Duration = Duration::from_millis(4);
/// The most fault notes that wait for the policy.
const NOTES_MAX: usize = 4096;
/// The most runs of zero pages that wait to be sent.
const ZERO_RUNS_MAX: usize = 1024;
/// How often the watcher is called at least.
const WATCH_EVERY: Duration = Duration::from_millis(100);
/// QUIC error code of a close that the session machine asked for.
const CLOSE_DONE: u32 = 0;
/// How long the last message may take to be acknowledged.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What the driver waits for. Each kind has a bound: what is heard and what others ask for by
/// its room; what the guest's thread says, by what it was told to do; and of each link, and of each
/// of its lanes, there is one end.
pub enum Input {
    Event(SourceEvent),
    Cancel { why: String, _room: OwnedSemaphorePermit },
    Linked(Box<Link>),
    Heard { epoch: u32, message: ToSource, _room: OwnedSemaphorePermit },
    Captured(Captured),
    Logging(Arc<DirtyBitmap>),
    Written,
    LinkEnded { epoch: u32, error: LaneError },
    Operator(Asked),
}

/// A stream whose unsent bytes are forgotten with it: they lie in the guest's memory.
struct ResetOnDrop(SendStream);

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        let _ = self.0.reset(CLOSE_DONE.into());
    }
}

pub struct Driver {
    config: SourceConfig,
    machine: SourceSession,
    journal: Option<Box<dyn Journal>>,
    shared: Arc<SourceShared>,
    push: Arc<PushShared>,
    zeros: Option<crossbeam_channel::Sender<(PageRun, PageKind)>>,
    inputs: UnboundedReceiver<Input>,
    input: UnboundedSender<Input>,
    guest: GuestThread,
    push_lanes: Vec<PushLane>,
    link: Option<Link>,
    /// As the last link's handshake measured it.
    rtt: Option<Duration>,
    lane_tasks: Vec<JoinHandle<()>>,
    dial: Option<JoinHandle<()>>,
    captured: Option<Captured>,
    watch: Watch,
    settled: u64,
    network_faults: u64,
    wire_bytes: u64,
    /// To connect again, while the link is lost.
    attempts: u32,
    pinging: bool,
    next_ping: Duration,
    drain_at: Option<Duration>,
    /// The guest was heard to run at the destination, in this process or one before it.
    ran: bool,
    next_watch: Duration,
    outcome: Option<Outcome>,
    phase: Option<(SourceState, Span)>,
    figures: report::Observed,
    copying: CopyingTimes,
    diary: LinkDiary,
    /// What failed on this side when a link was lost last, or not made.
    failed_here: Option<String>,
    /// Who waits to hear whether the guest is taken back.
    taking_back: Option<Asked>,
}

impl Driver {
    pub fn new(
        config: SourceConfig,
        ram: Arc<GuestRam>,
        vm: Box<dyn SourceVm>,
        (beginning, journal): (Beginning, Option<Box<dyn Journal>>),
        inputs: (UnboundedSender<Input>, UnboundedReceiver<Input>),
        watch: Watch,
    ) -> Result<Self, TransportError> {
        let layout = ram.layout().clone();
        let pages = layout.pages();
        let push_ports = config.ticket.push_lanes();
        let machine = match beginning {
            Beginning::New(session) => {
                let compresses = config.compress != CompressMode::Never;
                let hello = Hello {
                    features: if compresses { FEATURE_COMPRESSION } else { 0 },
                    guest: config.guest.clone(),
                    vcpus: config.vcpus,
                    push_lanes: push_ports as u16,
                    ..Hello::new(session, layout, config.machine.clone())
                };
                SourceSession::new(hello, config.limits, Duration::ZERO)
                    .with_switchover(config.switchover)
            }
            Beginning::Left(left) => left.machine(pages, config.limits),
        };
        let (notes_tx, notes) = crossbeam_channel::bounded(NOTES_MAX);
        let (zeros_tx, zeros) = crossbeam_channel::bounded(ZERO_RUNS_MAX);
        let shared = SourceShared::new(ram, notes_tx);
        let shared = Arc::new(shared.map_err(|source| TransportError::Io {
            what: "prepare to read memory that may fail",
            source,
        })?);
        let mut policy = PolicyConfig::new(pages);
        if let Some(pivots) = config.pivots {
            policy.pivots_max = pivots;
        }
        let push = Arc::new(PushShared {
            source: shared.clone(),
            policy: std::sync::Mutex::new(config.policy.build(policy)),
            pacer: std::sync::Mutex::new(Pacer::new(PacerConfig::default())),
            compression: std::sync::Mutex::new(Compression::new(config.compress)),
            notes,
            zeros,
            lanes: push_ports.max(1) as u64,
            round: Round::default(),
            rate: std::sync::Mutex::default(),
            held: AtomicBool::new(false),
        });
        if machine.planner().is_none() {
            push.round.give_way();
        }
        let (input, inputs) = inputs;
        let guest = guest::spawn(vm, input.clone())
            .map_err(|source| TransportError::Io { what: "start the guest's thread", source })?;
        let drain_at = |ran| Some(config.drain_after?.saturating_sub(ran));
        let drain_at = beginning.ran_for().and_then(drain_at);
        Ok(Self {
            config,
            machine,
            journal,
            shared,
            push,
            zeros: Some(zeros_tx),
            inputs,
            input,
            guest,
            push_lanes: Vec::new(),
            link: None,
            rtt: None,
            lane_tasks: Vec::new(),
            dial: None,
            captured: None,
            watch,
            settled: 0,
            network_faults: 0,
            wire_bytes: 0,
            attempts: 0,
            pinging: false,
            next_ping: Duration::ZERO,
            drain_at,
            ran: beginning.ran_for().is_some(),
            next_watch: Duration::ZERO,
            outcome: None,
            phase: None,
            figures: report::Observed::of(matches!(beginning, Beginning::Left(_))),
            copying: CopyingTimes::default(),
            diary: LinkDiary::default(),
            failed_here: None,
            taking_back: None,
        })
    }

    pub async fn run(self) -> SourceEnd {
        let session = self.machine.session();
        self.drive().instrument(info_span!("migration", side = "source", %session)).await
    }

    async fn drive(mut self) -> SourceEnd {
        self.spawn_push_lanes();
        self.limit_bandwidth();
        let copied = self.push.clone();
        loop {
            while let Some(action) = self.machine.poll_action() {
                debug!(?action, state = ?self.machine.state());
                let phase = self.phase();
                self.perform(action).instrument(phase).await;
            }
            self.note_pause();
            if self.outcome.is_some() {
                break;
            }
            self.tell_watcher();
            let wake_at = self.wake_at();
            let wake = tokio::time::Instant::from_std(self.shared.began + wake_at);
            tokio::select! {
                biased;
                Some(input) = self.inputs.recv() => self.take(input),
                () = copied.round.idle.notified() => self.lanes_idle(),
                _ = tokio::time::sleep_until(wake) => self.tick().await,
            }
        }
        self.end().await
    }

    fn now(&self) -> Duration {
        self.shared.began.elapsed()
    }

    /// When to look up at the latest: a time limit, a ping, the drain, the display.
    fn wake_at(&self) -> Duration {
        let ping = self.pinging.then_some(self.next_ping);
        [self.machine.timeout(), ping, self.drain_at, Some(self.next_watch)]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(self.next_watch)
    }

    async fn tick(&mut self) {
        let now = self.now();
        if self.machine.timeout().is_some_and(|at| at <= now) {
            self.machine.handle(now, SourceEvent::Timer);
        }
        if self.drain_at.is_some_and(|at| at <= now) {
            self.drain("the time given by --drain-after is over");
        }
        if self.pinging && self.next_ping <= now {
            self.next_ping = now + PING_EVERY;
            self.say(ToDestination::Ping(now.as_nanos() as u64)).await;
        }
    }

    fn take(&mut self, input: Input) {
        let now = self.now();
        match input {
            Input::Event(event) => {
                self.answer_take_back(&event);
                self.machine.handle(now, event);
            }
            Input::Cancel { why, _room } => self.machine.handle(now, SourceEvent::Cancel(why)),
            Input::Operator(asked) => self.operate(asked),
            // Made for an epoch that has passed.
            Input::Linked(link) if link.epoch != self.machine.epoch() => {}
            Input::Linked(mut link) => {
                if let Some(control) = link.control_in.take() {
                    linking::spawn_listener(control, link.epoch, self.input.clone());
                }
                // The queue that push will build is not there yet.
                let rtt_initial = Some(link.transport.connection.rtt());
                let config = PacerConfig { rtt_initial, ..PacerConfig::default() };
                *lock(&self.push.pacer) = Pacer::new(config);
                lock(&self.push.compression).new_link(now);
                self.rtt = rtt_initial;
                self.link = Some(*link);
                if self.machine.state() == SourceState::Connecting {
                    // While the two sides agree, and not when the pause is asked for: it
                    // waits for a step of each vCPU, which is no part of the downtime.
                    self.guest.tell(GuestCommand::ResetInstruments);
                }
                self.machine.handle(now, SourceEvent::LinkUp);
            }
            Input::Logging(written) => {
                self.push.round.log(written);
                self.machine.handle(now, SourceEvent::DirtyLogStarted);
            }
            Input::Written => self.looked(now),
            Input::Captured(captured) => {
                self.captured = Some(captured);
                self.machine.handle(now, SourceEvent::Paused);
            }
            Input::Heard { epoch, message, _room } if epoch == self.machine.epoch() => {
                self.heard(now, message);
            }
            Input::LinkEnded { epoch, error } if epoch == self.machine.epoch() => {
                self.link_ended(now, error);
            }
            // From a link that was replaced since.
            Input::Heard { .. } | Input::LinkEnded { .. } => {}
        }
    }

    fn heard(&mut self, now: Duration, message: ToSource) {
        match &message {
            ToSource::Pong(sent_ns) => {
                let rtt = now.saturating_sub(Duration::from_nanos(*sent_ns));
                lock(&self.push.pacer).on_urgent_rtt(now, rtt);
            }
            ToSource::Progress { settled, network_faults, pushed_bytes } => {
                lock(&self.push.pacer).on_push_delivered(now, *pushed_bytes);
                self.settled = (*settled).min(self.shared.ram.layout().pages());
                self.network_faults = *network_faults;
                let demanded = self.shared.figures.demanded.load(Ordering::Relaxed);
                self.wire_bytes = pushed_bytes.saturating_add(demanded * PAGE_SIZE as u64);
            }
            ToSource::Landed { .. } => self.copying.landed = Some(now),
            ToSource::WorkloadEnded => self.drain("the workload ended"),
            ToSource::Running { .. } if self.machine.state() == SourceState::Committed => {
                self.runs(now);
            }
            _ => {}
        }
        self.machine.handle(now, SourceEvent::Message(message));
    }

    async fn perform(&mut self, action: SourceAction) {
        match action {
            SourceAction::Connect { epoch, after, answer_within } => {
                self.connect(epoch, after, answer_within).await;
            }
            SourceAction::DropLink(why) => {
                self.watch.losing(&why);
                self.diary.lost(self.now(), &why);
                self.drop_link(&why).await;
            }
            SourceAction::Say(message) => self.say(message).await,
            SourceAction::OpenLanes { epoch } => self.open_lanes(epoch),
            SourceAction::StartDirtyLog => self.guest.tell(GuestCommand::StartDirtyLog),
            SourceAction::LookAtRound => self.guest.tell(GuestCommand::DirtyRound),
            SourceAction::StartRound => self.start_round(),
            SourceAction::CutRound => self.push.round.end(),
            SourceAction::SendValid => self.send_valid().await,
            SourceAction::PauseGuest => {
                self.guest.tell(GuestCommand::Pause);
                self.keep(|journal| journal.guest_pauses());
            }
            SourceAction::SendState => self.send_state().await,
            SourceAction::WriteCommitWord => self.guest.tell(GuestCommand::Commit),
            SourceAction::TakeBackGuest => {
                self.stop_serving("the operator takes the guest back").await;
                self.guest.tell(GuestCommand::TakeBack);
            }
            SourceAction::DiscardMemory => self.guest.tell(GuestCommand::GivenUp),
            SourceAction::ResumeGuest => {
                self.close_lanes().await;
                self.push.round.end();
                let next = LinkEpoch::new(self.machine.epoch() + 1);
                if let Err(error) = self.shared.ledger.void(next) {
                    warn!(%error, "claims stay as they are");
                }
                self.guest.tell(GuestCommand::Resume);
            }
            SourceAction::ResumeLedger(placed) => {
                failpoint!("source::before_ledger_resumed");
                let epoch = LinkEpoch::new(self.machine.epoch());
                match self.shared.ledger.resume_from(placed, epoch) {
                    Ok(again) => {
                        self.figures.resent += again;
                        self.figures.outages.resent(again);
                        info!(pages = again, "sending again what the lost link did not deliver");
                    }
                    Err(error) => warn!(%error, "the ledger was not resumed"),
                }
            }
            SourceAction::StartPush => self.start_push(),
            SourceAction::ReleaseGuest => self.guest.tell(GuestCommand::Release),
            SourceAction::ReleaseMemory => {
                self.keep(|journal| journal.drained());
                self.guest.tell(GuestCommand::Drained);
            }
            SourceAction::Finish(outcome) => self.outcome = Some(outcome),
        }
    }

    async fn send_state(&mut self) {
        let Some(captured) = &mut self.captured else { return };
        let state = std::mem::take(&mut captured.state);
        let (seeds, was_paused) = (captured.seeds.clone(), captured.was_paused);
        self.figures.switchover_bytes = state.len() as u64;
        self.say(ToDestination::State { was_paused, state }).await;
        let epoch = self.machine.epoch();
        if let Some(link) = &mut self.link {
            for page in seeds {
                let page = PageRun::single(page);
                let sent = send_pages(&self.shared, epoch, &mut link.seeds, page, Origin::Seed);
                if let Err(error) = sent.await {
                    let _ = self.input.send(Input::LinkEnded { epoch, error });
                    return;
                }
            }
        }
        self.machine.handle(self.now(), SourceEvent::StateSent);
    }

    /// Lets every thread go and puts the report together.
    async fn end(mut self) -> SourceEnd {
        let outcome = self.outcome.take().expect("the loop ends with an outcome");
        info!(?outcome, "the session is over");
        self.tell_progress();
        let phase = self.public_phase();
        let epoch = self.link.as_ref().map(|link| link.epoch);
        self.watch.observe(phase, self.machine.timeline(), epoch);
        self.watch.lost(&self.shared.lost);
        if let Some(dial) = self.dial.take() {
            // It holds the push lanes' commands, and they end only without them: joined
            // while it lives, they would never end.
            dial.abort();
            let _ = dial.await;
        }
        if let Some(mut link) = self.link.take() {
            self.figures.unlinked(&link.transport.connection);
            // What was said last should still arrive; not everybody listens.
            let _ = link.control.finish();
            let _ = tokio::time::timeout(LAST_WORDS, link.control.stopped()).await;
            link.transport.close(CLOSE_DONE, "done").await;
        }
        for lane in std::mem::take(&mut self.push_lanes) {
            drop(lane.commands);
            if let Err(error) = lane.thread.join() {
                warn!(%error, "a push lane ended badly");
            }
        }
        if let Outcome::Aborted(_) = outcome {
            self.guest.tell(GuestCommand::Aborted);
        }
        let (vm, stranded) = self.guest.end().await;
        let report = report::report(&report::Facts {
            config: &self.config,
            machine: &self.machine,
            shared: &self.shared,
            pacer: &lock(&self.push.pacer),
            compression: &lock(&self.push.compression),
            captured: self.captured.as_ref(),
            observed: &self.figures,
            outcome: &outcome,
            stranded: stranded.as_deref(),
        });
        self.watch.tell(Event::Ended(outcome.clone()));
        SourceEnd { outcome, vm, report, stranded }
    }
}
