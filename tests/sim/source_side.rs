//! The source's host: what its engine does around the session machine, the urgent
//! server and the pusher. Its fault-server can die; memory, commit word and the
//! stored link epoch outlive it.

use crate::copying::{self, Copying};
use crate::faults::Fault;
use crate::ledgers::{Ledger, View};
use crate::network::{ConnectionId, Lane, Packet, Side};
use crate::random::Random;
use crate::vmm::{self, Keeper, VmmStep};
use crate::world::{Event, Sabotage, World};
use postcopy::proto::frame::{FrameHeader, FrameLimits, Origin, PageKind, PageRequest};
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::ledger::{Claim, LinkEpoch};
use postcopy::proto::message::{
    CommitRecord, Hello, SessionId, ToDestination, ToSource, body_len, encode,
};
use postcopy::proto::page::PageIndex;
use postcopy::proto::page::{PAGE_SIZE, PageRun};
use postcopy::proto::placed::PlacedPages;
use postcopy::proto::prepaging;
use postcopy::proto::prepaging::{Policy, PolicyConfig, PolicyKind};
use postcopy::proto::source::{Outcome, SourceAction, SourceEvent, SourceSession, SourceState};
use postcopy::proto::switchover::SwitchoverConfig;
use std::sync::Arc;
use std::time::Duration;

pub const SESSION: SessionId = SessionId([7; 16]);
/// Push lanes of a connection.
const PUSH_LANES: u64 = 3;
/// More actions than any one event calls for.
pub const ACTIONS_MAX: u32 = 12;

pub struct Source<L> {
    pub session: Option<SourceSession>,
    pub connection: Option<ConnectionId>,
    pub memory: Vec<u64>,
    /// Counts the processes: what an earlier one had under way is gone.
    pub incarnation: u32,
    /// The destination may rightly never learn that the guest stayed here.
    pub may_leave_in_doubt: bool,
    /// What is copied before the guest moves.
    pub copying: Copying,
    switchover: SwitchoverConfig,
    pub ledger: Arc<L>,
    policy_kind: PolicyKind,
    policy: Box<dyn Policy>,
    lanes_open: bool,
    /// Requests that wait, unread, until the lanes are open.
    held: Vec<(ConnectionId, Lane, [u8; 24])>,
    push_chain: u32,
    stored_epoch: u32,
    released: bool,
    frame_lost: bool,
    performed: u64,
    armed: Option<Duration>,
}

#[derive(Debug)]
pub enum SourceStep {
    Dial {
        epoch: u32,
        answer_within: Duration,
    },
    DialFailed {
        epoch: u32,
    },
    Linked {
        connection: ConnectionId,
    },
    StartLog,
    Look,
    Copy {
        chain: u32,
    },
    /// A page that is to be copied goes out as it was when it was claimed.
    SendCopy {
        claim: Claim,
        version: u64,
        lane: Lane,
    },
    Paused,
    PauseFailed,
    StateSent,
    WriteWord,
    Push {
        chain: u32,
    },
    /// A claim that was held for a moment goes out.
    Send {
        claim: Claim,
        lane: Lane,
        origin: Origin,
    },
    /// The supervisor starts a new fault-server.
    Restart,
    Ping,
}

impl<L: Ledger> Source<L> {
    pub fn new(memory: Vec<u64>, random: &mut Random) -> Self {
        let pages = memory.len() as u64;
        let policy_kind = random.pick(&PolicyKind::ALL);
        Self {
            session: None,
            connection: None,
            memory,
            incarnation: 0,
            may_leave_in_doubt: false,
            copying: Copying::default(),
            switchover: copying::draw(random),
            ledger: Arc::new(L::new(pages)),
            policy_kind,
            policy: policy_kind.build(PolicyConfig::new(pages)),
            lanes_open: false,
            held: Vec::new(),
            push_chain: 0,
            stored_epoch: 0,
            released: false,
            frame_lost: false,
            performed: 0,
            armed: None,
        }
    }

    /// The link epoch that the last process has come to.
    pub fn epoch(&self) -> u32 {
        self.stored_epoch
    }

    pub fn state(&self) -> Option<SourceState> {
        self.session.as_ref().map(SourceSession::state)
    }
}

impl<L: Ledger> World<L> {
    pub fn start_source(&mut self) {
        let layout = MemoryLayout::flat(self.pages).expect("a small guest");
        let hello = Hello::new(SESSION, layout, "sim".into());
        let mut limits = self.limits;
        if self.sabotage == Sabotage::Impatient {
            limits.recovery = Duration::from_millis(500);
        }
        let session = SourceSession::new(hello, limits, self.now);
        if copying::gives_up(&self.source.switchover) {
            self.harm();
        }
        self.source.session = Some(session.with_switchover(self.source.switchover));
        self.perform_source_actions();
        self.soon(20_000, Event::Source { incarnation: 0, step: SourceStep::Ping });
    }

    pub fn source_step(&mut self, step: SourceStep) {
        let quiet = matches!(
            step,
            SourceStep::Push { .. }
                | SourceStep::Send { .. }
                | SourceStep::Copy { .. }
                | SourceStep::SendCopy { .. }
        );
        if !quiet {
            self.trace.line(self.now, format_args!("source step {step:?}"));
        }
        match step {
            SourceStep::Dial { epoch, answer_within } => self.dial(epoch, answer_within),
            SourceStep::DialFailed { epoch } => {
                if self.source.session.as_ref().is_some_and(|s| s.epoch() == epoch) {
                    self.source_event(SourceEvent::LinkLost("no connection".into()));
                }
            }
            SourceStep::Linked { connection } => self.linked(connection),
            SourceStep::StartLog => self.log_starts(),
            SourceStep::Look => self.look_at_round(),
            SourceStep::Copy { chain } => self.copy(chain),
            SourceStep::SendCopy { claim, version, lane } => self.send_copy(claim, version, lane),
            SourceStep::Paused => {
                self.fold_written();
                self.source_event(SourceEvent::Paused);
            }
            SourceStep::PauseFailed => self.source_event(SourceEvent::PauseFailed("no".into())),
            SourceStep::StateSent => self.source_event(SourceEvent::StateSent),
            SourceStep::WriteWord => {
                let won = self.vmm.word == vmm::UNDECIDED;
                if won && self.random.percent(1) {
                    self.harm();
                    return self.source_event(SourceEvent::CommitFailed("no".into()));
                }
                if won {
                    self.vmm.word = vmm::COMMITTED;
                    self.checker.writes_word(vmm::COMMITTED);
                    self.committed_at = self.now;
                }
                self.source_event(SourceEvent::CommitWord(won));
            }
            SourceStep::Push { chain } => self.push(chain),
            SourceStep::Send { claim, lane, origin } => self.send_claim(claim, lane, origin),
            SourceStep::Restart => self.restart(),
            SourceStep::Ping => {
                if let Some(connection) = self.source.connection.filter(|_| self.source.lanes_open)
                {
                    let ping = encode(&ToDestination::Ping(1));
                    self.send(connection, Lane::Control, Side::Destination, Packet::Message(ping));
                }
                if self.source_is_alive() {
                    let incarnation = self.source.incarnation;
                    self.soon(200_000, Event::Source { incarnation, step: SourceStep::Ping });
                }
            }
        }
    }

    /// Feeds the machine and does what it asks for.
    pub fn source_event(&mut self, event: SourceEvent) {
        let Some(session) = &mut self.source.session else { return };
        self.trace.line(self.now, format_args!("source {:?} <- {event:?}", session.state()));
        session.handle(self.now, event);
        self.perform_source_actions();
    }

    fn perform_source_actions(&mut self) {
        let mut actions = 0;
        while let Some(action) = self.source.session.as_mut().and_then(|s| s.poll_action()) {
            self.source.performed += 1;
            actions += 1;
            if actions > ACTIONS_MAX {
                return self.checker.fail("the source's machine has no end of actions");
            }
            if self.dies_before_action(self.source.performed) {
                return self.fail_with(Fault::CrashSource);
            }
            self.trace.line(self.now, format_args!("source -> {action:?}"));
            self.perform_for_source(action);
        }
        let incarnation = self.source.incarnation;
        let timeout = self.source.session.as_ref().and_then(SourceSession::timeout);
        if self.sabotage == Sabotage::NoTimers {
            return;
        }
        if let Some(at) = timeout.filter(|_| timeout != self.source.armed) {
            self.at(at.max(self.now), Event::Timer { side: Side::Source, incarnation, at });
        }
        self.source.armed = timeout;
    }

    pub fn source_timer(&mut self, incarnation: u32, at: Duration) {
        if incarnation == self.source.incarnation && self.source.armed == Some(at) {
            self.source.armed = None;
            self.source_event(SourceEvent::Timer);
        }
    }

    pub fn source_early_timer(&mut self) {
        self.source_event(SourceEvent::Timer);
    }

    pub fn source_finds_violation(&mut self) {
        if self.source.connection.is_some() {
            self.source_event(SourceEvent::Violation("nonsense on a page lane".into()));
        }
    }

    fn perform_for_source(&mut self, action: SourceAction) {
        let incarnation = self.source.incarnation;
        let step = |step| Event::Source { incarnation, step };
        match action {
            SourceAction::Connect { epoch, after, answer_within } => {
                self.source.stored_epoch = epoch;
                if epoch > 0 {
                    self.mark("dials again".into());
                }
                self.close_source_link();
                self.after(after, step(SourceStep::Dial { epoch, answer_within }));
            }
            SourceAction::DropLink(_) => {
                if let Some(connection) = self.source.connection {
                    self.close_source_link();
                    // The engine hears of the closing it asked for, too.
                    self.source_lost_link(connection, "closed here");
                }
            }
            SourceAction::Say(ToDestination::Abort { .. })
                if self.sabotage == Sabotage::MuteAbort => {}
            SourceAction::Say(mut message) => {
                if let (ToDestination::Reattach { epoch, .. }, Sabotage::EpochNotRaised) =
                    (&mut message, self.sabotage)
                {
                    *epoch = 0;
                }
                if let Some(connection) = self.source.connection {
                    let bytes = Packet::Message(encode(&message));
                    self.send(connection, Lane::Control, Side::Destination, bytes);
                }
            }
            SourceAction::OpenLanes { .. } => {
                self.source.lanes_open = true;
                for (connection, lane, request) in std::mem::take(&mut self.source.held) {
                    if Some(connection) == self.source.connection {
                        self.serve(lane, request);
                    }
                }
            }
            SourceAction::StartDirtyLog => self.soon(2_000, step(SourceStep::StartLog)),
            SourceAction::LookAtRound => self.soon(2_000, step(SourceStep::Look)),
            SourceAction::StartRound => self.start_round(),
            SourceAction::CutRound => self.cut_round(),
            SourceAction::SendValid => self.send_valid(),
            SourceAction::PauseGuest => {
                let delay = self.slowly(2_000);
                self.vmm.pausing = true;
                if self.vmm.keeper == Keeper::NotStarted {
                    self.vmm.keeper = Keeper::Holds;
                }
                self.after(delay, Event::Vmm(VmmStep::Pause { incarnation }));
            }
            SourceAction::SendState => {
                let state = encode(&ToDestination::State {
                    was_paused: self.guest.was_paused,
                    state: vec![0x5a; 40],
                });
                if let Some(connection) = self.source.connection {
                    let packet = Packet::Message(state);
                    self.send(connection, Lane::Control, Side::Destination, packet);
                }
                for _ in 0..self.random.below(4) {
                    let page = PageIndex::new(self.random.below(self.pages));
                    if let Some(claim) = self.source.ledger.claim(page) {
                        self.send_claim(claim, Lane::Push(0), Origin::Seed);
                    }
                }
                self.soon(300, step(SourceStep::StateSent));
            }
            SourceAction::WriteCommitWord => {
                if self.sabotage == Sabotage::CommitBeforeWord {
                    let commit = ToDestination::Commit(CommitRecord { session: SESSION, epoch: 0 });
                    self.perform_for_source(SourceAction::Say(commit));
                }
                self.soon(300, step(SourceStep::WriteWord));
            }
            SourceAction::TakeBackGuest | SourceAction::DiscardMemory => {
                unreachable!("nobody here operates: a wrong word of his is two running guests")
            }
            SourceAction::ResumeGuest if self.sabotage == Sabotage::KeepClaims => {
                self.checker.gives_back();
                self.soon(2_000, Event::Vmm(VmmStep::Resume));
            }
            SourceAction::ResumeGuest => {
                self.source.lanes_open = false;
                self.source.copying = Copying::default();
                self.checker.gives_back();
                if let Err(error) = self.source.ledger.void(LinkEpoch::new(u32::MAX)) {
                    self.checker.fail(format!("the claims cannot be voided: {error}"));
                }
                self.soon(2_000, Event::Vmm(VmmStep::Resume));
            }
            SourceAction::ResumeLedger(placed) => self.resume_ledger(placed),
            SourceAction::StartPush => {
                self.source.push_chain += 1;
                let chain = self.source.push_chain;
                self.soon(1_000, step(SourceStep::Push { chain }));
            }
            SourceAction::ReleaseGuest => {
                if self.vmm.word == vmm::COMMITTED {
                    self.vmm.word = vmm::RUNNING;
                    self.checker.writes_word(vmm::RUNNING);
                }
                self.vmm.released = true;
                self.checker.releases_guest();
            }
            SourceAction::ReleaseMemory => {
                self.source.released = true;
                self.checker.releases_memory(self.destination.missing());
            }
            SourceAction::Finish(outcome) => {
                self.source_ends(outcome);
                if let Some(connection) = self.source.connection {
                    self.send(connection, Lane::Control, Side::Destination, Packet::Close);
                }
                self.source.connection = None;
            }
        }
    }

    fn source_ends(&mut self, outcome: Outcome) {
        let missing = self.destination.missing();
        self.checker.ends(Side::Source, outcome, missing);
    }

    fn resume_ledger(&mut self, placed: PlacedPages) {
        self.mark("resumed".into());
        if self.sabotage == Sabotage::LedgerNotResumed {
            return;
        }
        let epoch = self.source.session.as_ref().map_or(0, SourceSession::epoch);
        if let Err(error) = self.source.ledger.resume_from(placed, LinkEpoch::new(epoch)) {
            self.checker.fail(format!("the source's ledger does not resume: {error}"));
        }
    }

    fn dial(&mut self, epoch: u32, answer_within: Duration) {
        let incarnation = self.source.incarnation;
        let mut delay = self.network.handshake();
        let unlucky = self.random.percent(if epoch == 0 { 1 } else { 10 });
        if unlucky {
            self.harm();
        }
        let up = self.now >= self.network.outage_until;
        let reachable = up && self.destination.accepts() && !unlucky;
        let step = if reachable {
            SourceStep::Linked { connection: self.network.connect(epoch) }
        } else {
            if self.random.percent(50) {
                // Nobody even says no.
                delay = answer_within;
            }
            SourceStep::DialFailed { epoch }
        };
        self.after(delay, Event::Source { incarnation, step });
    }

    fn linked(&mut self, connection: ConnectionId) {
        let epoch = self.network.epoch(connection);
        if !self.source_is_alive()
            || self.source.session.as_ref().is_some_and(|s| s.epoch() != epoch)
        {
            return self.cut(connection);
        }
        self.source.connection = Some(connection);
        self.source.lanes_open = false;
        self.source_event(SourceEvent::LinkUp);
    }

    /// Closes what is left of the link, if anything.
    fn close_source_link(&mut self) {
        self.source.lanes_open = false;
        if let Some(connection) = self.source.connection.take() {
            self.network.give_up(connection, Side::Source);
            self.cut(connection);
        }
    }

    /// A connection is over; it counts only if it is the current one.
    pub fn source_lost_link(&mut self, connection: ConnectionId, why: &str) {
        let epoch = self.network.epoch(connection);
        if self.source.connection == Some(connection) {
            self.source.connection = None;
            self.source.lanes_open = false;
        }
        if self.source.session.as_ref().is_some_and(|s| s.epoch() == epoch) {
            self.source_event(SourceEvent::LinkLost(why.into()));
        }
    }

    pub fn source_receives(&mut self, connection: ConnectionId, lane: Lane, packet: Packet) {
        if self.source.connection != Some(connection) {
            return;
        }
        match packet {
            Packet::Message(bytes) => {
                let length = body_len([bytes[0], bytes[1], bytes[2], bytes[3]]);
                assert_eq!(length, Ok(bytes.len() - 4));
                match ToSource::decode(&bytes[4..]) {
                    Ok(message) => {
                        if message == ToSource::WorkloadEnded {
                            self.source.policy.drain();
                        }
                        self.source_event(SourceEvent::Message(message));
                    }
                    Err(error) => self.checker.fail(format!("to the source: {error}")),
                }
            }
            Packet::Request(request) if self.source.lanes_open => self.serve(lane, request),
            Packet::Request(request) => {
                self.mark("request before the lanes are open".into());
                self.source.held.push((connection, lane, request));
            }
            Packet::Close => {
                self.network.give_up(connection, Side::Source);
                self.source_lost_link(connection, "the destination closed it");
            }
            Packet::Frame(..) => self.checker.fail("a frame comes to the source"),
        }
    }

    /// The urgent server: answers on the lane that the request came on.
    fn serve(&mut self, lane: Lane, request: [u8; 24]) {
        let Some(session) = &self.source.session else { return };
        let limits = FrameLimits { pages: self.pages, epoch: session.epoch(), compressed: false };
        let request = match PageRequest::parse(&request, limits) {
            Ok(request) => request,
            Err(error) => return self.checker.fail(format!("to the source: {error}")),
        };
        for page in request.run.pages() {
            let vcpu = request.vcpu.map(u32::from);
            let fault = prepaging::Fault { page, vcpu, at: self.now };
            match self.source.ledger.claim(page) {
                Some(claim) => {
                    self.source.policy.fault(fault);
                    self.send_or_hold(claim, lane, Origin::Demand);
                }
                None => {
                    self.mark("late hit".into());
                    if self.sabotage == Sabotage::SendTwice {
                        self.send_unclaimed(page, lane);
                    }
                    self.source.policy.late_hit(fault);
                }
            }
        }
    }

    fn push(&mut self, chain: u32) {
        let pushing =
            matches!(self.source.state(), Some(SourceState::Committed | SourceState::Brownout));
        if chain != self.source.push_chain || self.source.connection.is_none() || !pushing {
            return;
        }
        let ledger = self.source.ledger.clone();
        let view = View { ledger: &*ledger, pages: self.pages };
        let pages_max = self.random.between(1, 16) as u32;
        let suggestion = self.source.policy.next(&view, pages_max);
        if let Some(suggestion) = suggestion {
            let origin = match suggestion.origin {
                prepaging::Origin::Push => Origin::Push,
                prepaging::Origin::Drain => Origin::Drain,
            };
            while let Some(claim) = ledger.claim_within(suggestion.run) {
                let lane = Lane::Push(self.random.below(PUSH_LANES) as u16);
                self.send_or_hold(claim, lane, origin);
            }
        }
        let pause = if suggestion.is_some() { 500 } else { 10_000 };
        let incarnation = self.source.incarnation;
        self.soon(pause, Event::Source { incarnation, step: SourceStep::Push { chain } });
    }

    fn send_or_hold(&mut self, claim: Claim, lane: Lane, origin: Origin) {
        if self.random.percent(20) {
            let step = SourceStep::Send { claim, lane, origin };
            self.soon(2_000, Event::Source { incarnation: self.source.incarnation, step });
        } else {
            self.send_claim(claim, lane, origin);
        }
    }

    /// Builds the frames of a claim and sends them on its epoch's connection; a
    /// claim of another epoch is void.
    fn send_claim(&mut self, claim: Claim, lane: Lane, origin: Origin) {
        let Some(connection) = self.source.connection else { return };
        let epoch = self.network.epoch(connection);
        if claim.epoch() != LinkEpoch::new(epoch) {
            return self.mark("claim of an epoch that is over".into());
        }
        if !self.source.lanes_open {
            return self.mark("claim on lanes that are closed".into());
        }
        let mut rest = Some(claim);
        while let Some(mut claim) = rest {
            let holds = |page: PageIndex| self.source.memory[page.as_usize()];
            let zero = holds(claim.run().first()) == 0;
            let alike = claim.run().pages().take_while(|page| (holds(*page) == 0) == zero).count();
            rest = claim.split_off(alike as u64);
            let kind = match (zero, claim.run().first().get() % 2) {
                (false, _) => PageKind::Raw,
                (true, 0) => PageKind::Zero,
                (true, _) => PageKind::Hole,
            };
            let header = FrameHeader::for_claim(&claim, kind, origin, epoch);
            let versions: Vec<u64> = claim.run().pages().map(holds).collect();
            for (page, version) in claim.run().pages().zip(&versions) {
                self.checker.sends(epoch, page.get(), *version);
            }
            self.trace.line(self.now, format_args!("source frame {header:?}"));
            claim.sent();
            if self.sabotage == Sabotage::SentIsArrived && self.source.ledger.unsent() == 0 {
                // All is sent: why wait for the destination's word?
                self.perform_for_source(SourceAction::ReleaseMemory);
            }
            let lose = self.sabotage == Sabotage::LosePushFrame
                && origin == Origin::Push
                && !self.source.frame_lost;
            if lose {
                self.source.frame_lost = true;
                continue;
            }
            let content = if kind == PageKind::Raw { versions } else { Vec::new() };
            let packet = Packet::Frame(header.encode(), content);
            self.send(connection, lane, Side::Destination, packet);
        }
    }

    /// Sends a page that somebody else has claimed: no ledger allows it.
    fn send_unclaimed(&mut self, page: PageIndex, lane: Lane) {
        let Some(connection) = self.source.connection else { return };
        let epoch = self.network.epoch(connection);
        let version = self.source.memory[page.as_usize()];
        self.checker.sends(epoch, page.get(), version);
        let (kind, origin) = (PageKind::Raw, Origin::Demand);
        let run = PageRun::single(page);
        let header = FrameHeader { kind, origin, epoch, run, content_len: PAGE_SIZE };
        let packet = Packet::Frame(header.encode(), vec![version]);
        self.send(connection, lane, Side::Destination, packet);
    }

    pub fn cancel_source(&mut self) {
        // Who is too impatient for the destination to hear of it leaves it in doubt.
        self.source.may_leave_in_doubt |= self.source.state() == Some(SourceState::Retracting);
        self.source_event(SourceEvent::Cancel("the user said so".into()));
    }

    /// Whether there is a fault-server that has not come to its end.
    fn source_is_alive(&self) -> bool {
        self.source.session.is_some() && self.checker.outcome(Side::Source).is_none()
    }

    /// The fault-server dies with all it had under way.
    pub fn crash_source(&mut self) {
        if !self.source_is_alive() {
            return;
        }
        self.trace.line(self.now, format_args!("the fault-server dies"));
        if self.source.incarnation > 0 {
            self.mark("the fault-server dies again".into());
            if self.source.session.as_ref().is_some_and(|session| !session.linked()) {
                self.mark("the fault-server dies again before it is back".into());
            }
        }
        self.source.incarnation += 1;
        self.source.session = None;
        self.source.armed = None;
        self.source.held.clear();
        self.source.copying = Copying::default();
        self.close_source_link();
        self.soon(50_000, Event::Vmm(VmmStep::ServerGone));
        self.soon(50_000, Event::Vmm(VmmStep::KeeperLeft));
        let incarnation = self.source.incarnation;
        let step = SourceStep::Restart;
        self.soon(1_000_000, Event::Source { incarnation, step });
    }

    fn restart(&mut self) {
        let (incarnation, limits) = (self.source.incarnation, self.limits);
        if self.source.released {
            // All was done but the report: there is nothing to recover.
            return self.source_ends(Outcome::Completed);
        }
        let recorded = self.vmm.keeper == Keeper::Holds;
        match self.vmm.word {
            // Who aborts the word has not noticed yet.
            vmm::UNDECIDED if recorded || !self.vmm.dead => {
                let step = SourceStep::Restart;
                return self.soon(100_000, Event::Source { incarnation, step });
            }
            vmm::COMMITTED | vmm::RUNNING if recorded => {}
            vmm::COMMITTED | vmm::RUNNING => {
                self.may_be_lost = true;
                self.mark("lost with fault-server and keeper".into());
                return self.source_ends(Outcome::Lost("no memory is left".into()));
            }
            vmm::ABORTED | vmm::TAKEN_BACK if recorded => {
                let epoch = self.source.stored_epoch;
                let session = if self.vmm.word == vmm::TAKEN_BACK {
                    SourceSession::recover_taken_back(SESSION, epoch, limits, self.now)
                } else {
                    SourceSession::recover_aborted(SESSION, epoch, limits, self.now)
                };
                self.mark("restart after an abort".into());
                self.source.session = Some(session);
                return self.perform_source_actions();
            }
            _ => {
                // Nobody knows any more whom there would be to tell.
                self.source.may_leave_in_doubt = true;
                return self.source_ends(Outcome::Aborted("no record is left".into()));
            }
        }
        let record = CommitRecord { session: SESSION, epoch: 0 };
        let mut epoch = self.source.stored_epoch;
        if self.random.percent(10) {
            // The store was not quite up to date: the destination's epoch is ahead.
            epoch = epoch.saturating_sub(self.random.below(4) as u32);
            self.mark("restart with an old epoch".into());
        }
        self.mark("restart".into());
        self.source.ledger = Arc::new(L::new(self.pages));
        self.source.policy = self.source.policy_kind.build(PolicyConfig::new(self.pages));
        let pages = self.pages;
        let session = SourceSession::recover(record, epoch, pages, limits, self.now);
        self.source.session = Some(session);
        self.perform_source_actions();
    }
}
