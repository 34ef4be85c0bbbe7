//! The destination's host: what its engine does around the session machine, the
//! page receivers and the fault handler.

use crate::copying::Copied;
use crate::ledgers::Ledger;
use crate::network::{ConnectionId, Lane, Packet, Side};
use crate::source_side::ACTIONS_MAX;
use crate::world::{Event, Sabotage, World};
use postcopy::proto::destination::{
    DestinationAction, DestinationEvent, DestinationSession, DestinationState,
};
use postcopy::proto::frame::{FrameHeader, FrameLimits, Origin, PageKind, PageRequest};
use postcopy::proto::ledger::{DestinationLedger, FaultAnswer};
use postcopy::proto::message::{Mismatch, ToDestination, ToSource, encode};
use postcopy::proto::page::{PageIndex, PageRun};
use postcopy::proto::placed::PlacedMessages;
use postcopy::proto::source::Outcome;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

/// How long a vCPU may stand still at a page that is there.
const ASLEEP_MAX: Duration = Duration::from_millis(500);

pub struct Destination {
    pub session: Option<DestinationSession>,
    pub connection: Option<ConnectionId>,
    /// A page that is not mapped is `None`.
    pub memory: Vec<Option<u64>>,
    pub running: bool,
    pub crashed: bool,
    /// What came before the guest.
    pub copied: Copied,
    pub ledger: Rc<DestinationLedger>,
    lanes_open: bool,
    /// Frames that wait, unread, until the lanes are open.
    held: Vec<(ConnectionId, [u8; 24], Vec<u64>)>,
    /// Pages that restoring will touch, the next one last.
    restoring: Vec<u64>,
    /// Placed pages whose mapping the kernel has dropped.
    pub unmapped: BTreeSet<u64>,
    unregistered: bool,
    told_full: bool,
    told_end: bool,
    armed: Option<Duration>,
}

#[derive(Debug)]
pub enum DestinationStep {
    Prepared,
    Refused,
    /// Restoring goes on.
    Restore,
    RestoreFailed,
    Run,
    Entered,
    LedgerFull,
    ReportReady,
    /// Pages whose placement had to be put off.
    Retry {
        run: PageRun,
        versions: Vec<u64>,
    },
    Progress,
}

impl Destination {
    pub fn new(pages: u64) -> Self {
        Self {
            session: None,
            connection: None,
            memory: vec![None; pages as usize],
            running: false,
            crashed: false,
            copied: Copied::default(),
            ledger: Rc::new(DestinationLedger::new(pages)),
            lanes_open: false,
            held: Vec::new(),
            restoring: Vec::new(),
            unmapped: BTreeSet::new(),
            unregistered: false,
            told_full: false,
            told_end: false,
            armed: None,
        }
    }

    pub fn state(&self) -> Option<DestinationState> {
        self.session.as_ref().map(DestinationSession::state)
    }

    /// Whether somebody listens here.
    pub fn accepts(&self) -> bool {
        !self.crashed && self.state() != Some(DestinationState::Over)
    }

    pub fn missing(&self) -> u64 {
        self.ledger.missing()
    }

    /// Pages that arrived again, as the ledger counts them.
    pub fn duplicates(&self) -> u64 {
        self.ledger.counts().duplicates
    }
}

impl<L: Ledger> World<L> {
    pub fn destination_step(&mut self, step: DestinationStep) {
        self.trace.line(self.now, format_args!("destination step {step:?}"));
        match step {
            DestinationStep::Prepared => self.destination_event(DestinationEvent::Prepared),
            DestinationStep::Refused => {
                let mismatch = Mismatch::new("the sky", "blue", "grey");
                self.destination_event(DestinationEvent::Refused(mismatch));
            }
            DestinationStep::Restore => self.restore(),
            DestinationStep::RestoreFailed => {
                self.destination_event(DestinationEvent::RestoreFailed("no".into()));
            }
            DestinationStep::Run => {
                self.destination.running = true;
                self.checker.starts(Side::Destination);
                self.start_vcpus();
                self.soon(500, Event::Destination { step: DestinationStep::Entered });
            }
            DestinationStep::Entered => {
                self.destination_event(DestinationEvent::Entered(self.now));
                // The workload may have ended before anybody could be told.
                self.destination_workload_ended();
            }
            DestinationStep::LedgerFull => {
                let settled = self.pages;
                self.destination_event(DestinationEvent::LedgerFull { settled });
            }
            DestinationStep::ReportReady => {
                self.destination_event(DestinationEvent::ReportReady(b"{}".to_vec()));
            }
            DestinationStep::Retry { run, versions } => {
                if self.sabotage == Sabotage::PlaceAgain {
                    run.pages().zip(&versions).for_each(|(p, v)| self.place(p.get(), *v));
                } else if !self.destination.memory.is_empty() {
                    self.land(run, versions);
                }
            }
            DestinationStep::Progress => {
                self.look_for_sleepers();
                let progress =
                    ToSource::Progress { settled: 1, network_faults: 2, pushed_bytes: 3 };
                // The engine says it with its answers to pings, once the guest runs.
                if self.destination.state() == Some(DestinationState::Running) {
                    self.destination_says(&progress);
                }
                if self.destination.accepts() {
                    let step = DestinationStep::Progress;
                    self.soon(200_000, Event::Destination { step });
                }
            }
        }
    }

    pub fn destination_event(&mut self, event: DestinationEvent) {
        let Some(session) = &mut self.destination.session else { return };
        self.trace.line(self.now, format_args!("destination {:?} <- {event:?}", session.state()));
        session.handle(self.now, event);
        let mut actions = 0;
        while let Some(action) = self.destination.session.as_mut().and_then(|s| s.poll_action()) {
            self.trace.line(self.now, format_args!("destination -> {action:?}"));
            actions += 1;
            if actions > ACTIONS_MAX {
                return self.checker.fail("the destination's machine has no end of actions");
            }
            self.perform_for_destination(action);
        }
        let timeout = self.destination.session.as_ref().and_then(DestinationSession::timeout);
        if self.sabotage == Sabotage::NoTimers {
            return;
        }
        if let Some(at) = timeout.filter(|_| timeout != self.destination.armed) {
            let side = Side::Destination;
            self.at(at.max(self.now), Event::Timer { side, incarnation: 0, at });
        }
        self.destination.armed = timeout;
    }

    /// Its vCPUs, or its traps, are at their end; before there is a doubt, it aborts.
    pub fn guest_fails(&mut self) {
        use DestinationState as S;
        let state = self.destination.state();
        self.may_be_lost |= matches!(state, Some(S::InDoubt | S::Starting | S::Running));
        self.destination_event(DestinationEvent::GuestFailed("a vCPU broke".into()));
    }

    pub fn destination_early_timer(&mut self) {
        self.destination_event(DestinationEvent::Timer);
    }

    pub fn destination_timer(&mut self, at: Duration) {
        if self.destination.armed == Some(at) {
            self.destination.armed = None;
            self.destination_event(DestinationEvent::Timer);
        }
    }

    fn perform_for_destination(&mut self, action: DestinationAction) {
        let step = |step| Event::Destination { step };
        match action {
            DestinationAction::Prepare(_) => {
                let refuse = self.random.percent(1);
                if refuse {
                    self.harm();
                }
                let next =
                    if refuse { DestinationStep::Refused } else { DestinationStep::Prepared };
                let delay = self.slowly(3_000);
                self.after(delay, step(next));
                self.soon(20_000, step(DestinationStep::Progress));
            }
            DestinationAction::Say(message) => self.destination_says(&message),
            DestinationAction::OpenLanes { .. } => {
                self.destination.lanes_open = true;
                for (connection, header, versions) in std::mem::take(&mut self.destination.held) {
                    if Some(connection) == self.destination.connection {
                        self.take_frame(header, versions);
                    }
                }
            }
            DestinationAction::DropLink(_) => {
                if let Some(connection) = self.destination.connection {
                    self.close_destination_link();
                    self.destination_lost_link(connection);
                }
            }
            DestinationAction::AwaitCopied { pages } => self.await_copied(pages),
            DestinationAction::TakeValid(valid) => self.take_valid(&valid),
            DestinationAction::Restore(state) => {
                if state != [0x5a; 40] {
                    self.checker.fail("the machine state arrives changed");
                }
                if self.random.percent(1) {
                    self.harm();
                    return self.soon(1_000, step(DestinationStep::RestoreFailed));
                }
                self.destination.restoring =
                    (0..self.random.below(6)).map(|_| self.random.below(self.pages)).collect();
                let delay = self.slowly(1_000);
                self.after(delay, step(DestinationStep::Restore));
            }
            DestinationAction::RunGuest | DestinationAction::KeepPaused => {
                if self.guest.was_paused != (action == DestinationAction::KeepPaused) {
                    self.checker.fail(format!("{action:?}, and the guest was otherwise"));
                }
                self.soon(500, step(DestinationStep::Run));
            }
            DestinationAction::SendPlaced => self.send_placed(),
            DestinationAction::Unregister => {
                match self.destination.ledger.finish() {
                    _ if self.sabotage == Sabotage::FullTooEarly => {}
                    Ok(proof) if proof.counts().placed_twice == 0 => {}
                    Ok(_) => self.checker.fail("the ledger says a page was placed twice"),
                    Err(error) => self.checker.fail(format!("unregistered early: {error}")),
                }
                self.destination.unregistered = true;
                // The kernel lets go whoever still waits.
                (0..self.guest.vcpus.len()).for_each(|vcpu| self.wake_if_blocked(vcpu));
            }
            DestinationAction::MakeReport => {
                self.soon(1_000, step(DestinationStep::ReportReady));
            }
            DestinationAction::DropGuest => self.checker.drops_guest(),
            DestinationAction::Finish(outcome) => {
                self.destination_ends(outcome);
                if let Some(connection) = self.destination.connection.take() {
                    self.send(connection, Lane::Control, Side::Source, Packet::Close);
                }
            }
        }
    }

    fn destination_ends(&mut self, outcome: Outcome) {
        let missing = self.destination.missing();
        self.checker.ends(Side::Destination, outcome, missing);
    }

    fn destination_says(&mut self, message: &ToSource) {
        if let Some(connection) = self.destination.connection {
            let packet = Packet::Message(encode(message));
            self.send(connection, Lane::Control, Side::Source, packet);
        }
    }

    /// Tells the source what need not come again, and asks again for what was
    /// asked for on the link that is gone.
    fn send_placed(&mut self) {
        let ledger = self.destination.ledger.clone();
        let mut messages = PlacedMessages::new(self.pages);
        self.checker.tells_placed();
        let sabotage = self.sabotage;
        let placed = |first: PageIndex, bits: &mut [u64]| {
            ledger.fill_placed(first, bits);
            let word = bits.iter_mut().find(|word| **word != 0 && **word != u64::MAX);
            match (sabotage, word) {
                (Sabotage::PlacedLacksOne, Some(word)) => *word &= *word - 1,
                (Sabotage::PlacedHasOneMore, Some(word)) => *word |= *word + 1,
                _ => {}
            }
        };
        while let Some(part) = messages.next(1, placed) {
            let last = messages.is_done();
            self.destination_says(&ToSource::Placed { part, last });
        }
        let mut requested = vec![0; self.pages.div_ceil(64) as usize];
        ledger.fill_requested(PageIndex::new(0), &mut requested);
        let is_requested = |page: &u64| requested[(page / 64) as usize] >> (page % 64) & 1 == 1;
        let forgets = self.sabotage == Sabotage::ForgetRequests;
        for page in (0..self.pages).filter(is_requested).filter(|_| !forgets) {
            self.request(PageIndex::new(page), None);
        }
        // What was said on the old link may never have arrived.
        self.destination.told_end = false;
        self.destination_workload_ended();
    }

    /// The vCPUs may have come to the end of their workload.
    pub fn destination_workload_ended(&mut self) {
        let may_say = self.destination.state() >= Some(DestinationState::Running)
            && self.destination.running
            && self.guest.workload_ended();
        if may_say && !self.destination.told_end {
            self.destination.told_end = true;
            self.destination_says(&ToSource::WorkloadEnded);
        }
    }

    pub fn destination_receives(&mut self, connection: ConnectionId, lane: Lane, packet: Packet) {
        let current = self.destination.connection == Some(connection);
        match packet {
            Packet::Message(bytes) if current => match ToDestination::decode(&bytes[4..]) {
                Ok(message) => self.destination_event(DestinationEvent::Message(message)),
                Err(error) => self.checker.fail(format!("to the destination: {error}")),
            },
            Packet::Message(bytes) => self.first_message(connection, &bytes[4..]),
            Packet::Frame(header, versions) if current && self.destination.lanes_open => {
                self.take_frame(header, versions);
            }
            Packet::Frame(header, versions) if self.sabotage == Sabotage::OldFrames => {
                let epoch = self.network.epoch(connection);
                self.take_frame_of(epoch, header, versions);
            }
            Packet::Frame(header, versions) => {
                self.destination.held.push((connection, header, versions));
            }
            Packet::Close => {
                self.network.give_up(connection, Side::Destination);
                self.destination_lost_link(connection);
            }
            Packet::Request(_) => {
                self.checker.fail(format!("a request comes to the destination on {lane:?}"));
            }
        }
    }

    /// A connection says what it is for.
    fn first_message(&mut self, connection: ConnectionId, body: &[u8]) {
        let message = match ToDestination::decode_first(body) {
            Ok(Ok(message)) => message,
            other => return self.checker.fail(format!("a connection begins with {other:?}")),
        };
        match (&message, &self.destination.session) {
            (ToDestination::Hello(_), None) if !self.destination.crashed => {
                let session = DestinationSession::new(self.limits, self.now);
                self.destination.session = Some(session);
            }
            (ToDestination::Reattach { session, epoch, .. }, Some(machine))
                if machine.may_reattach(*session, *epoch) =>
            {
                if machine.linked() {
                    self.marks.entry("back before the loss was noticed".into()).or_insert(1);
                    self.close_destination_link();
                    let why = "the source has come back on a new one";
                    self.destination_event(DestinationEvent::LinkLost(why.into()));
                }
            }
            _ => {
                self.trace.line(self.now, format_args!("unwanted: {message:?}"));
                if self.destination.connection.is_some() {
                    self.mark("unwanted connection beside one that stands".into());
                }
                self.mark("unwanted connection".into());
                self.network.give_up(connection, Side::Destination);
                return self.cut(connection);
            }
        }
        self.destination.connection = Some(connection);
        self.checker.links(self.network.epoch(connection));
        self.destination_event(DestinationEvent::Message(message));
    }

    fn close_destination_link(&mut self) {
        self.destination.lanes_open = false;
        if let Some(connection) = self.destination.connection.take() {
            self.network.give_up(connection, Side::Destination);
            self.cut(connection);
        }
    }

    /// A connection is over; it counts only if it is the current one.
    pub fn destination_lost_link(&mut self, connection: ConnectionId) {
        if self.destination.connection == Some(connection) {
            self.destination.connection = None;
            self.destination.lanes_open = false;
            if self.sabotage == Sabotage::EndIsDone
                && self.destination.state() == Some(DestinationState::Running)
            {
                // A stream that ends has brought everything, has it not?
                self.destination.session = None;
                return self.destination_ends(Outcome::Completed);
            }
            self.destination_event(DestinationEvent::LinkLost("it went silent".into()));
            let in_doubt = self.destination.state() == Some(DestinationState::InDoubt);
            if in_doubt && self.sabotage == Sabotage::RunInDoubt {
                self.soon(500, Event::Destination { step: DestinationStep::Run });
            }
        }
    }

    fn take_frame(&mut self, header: [u8; 24], versions: Vec<u64>) {
        let Some(session) = &self.destination.session else { return };
        if session.state() == DestinationState::Over {
            return;
        }
        let epoch = session.epoch();
        self.take_frame_of(epoch, header, versions);
    }

    fn take_frame_of(&mut self, epoch: u32, header: [u8; 24], versions: Vec<u64>) {
        self.checker.takes_frame(epoch);
        let limits = FrameLimits { pages: self.pages, epoch, compressed: false };
        let header = match FrameHeader::parse(&header, limits) {
            Ok(header) => header,
            Err(error) => return self.checker.fail(format!("to the destination: {error}")),
        };
        self.trace.line(self.now, format_args!("destination frame {:?}", header.run));
        if header.origin == Origin::Copy {
            return self.take_copy(&header, &versions);
        }
        if header.kind == PageKind::Raw {
            assert_eq!(versions.len() as u64, header.run.count());
            if self.sabotage == Sabotage::PlaceAgain && self.random.percent(5) {
                let step = DestinationStep::Retry { run: header.run, versions: versions.clone() };
                self.soon(20_000, Event::Destination { step });
            }
            return self.land(header.run, versions);
        }
        let ledger = self.destination.ledger.clone();
        match ledger.mark_zero(header.run) {
            Ok(waited_for) => {
                for landing in waited_for {
                    landing.run().pages().for_each(|page| self.place(page.get(), 0));
                    landing.placed();
                }
            }
            Err(error) => self.checker.fail(format!("to the destination: {error}")),
        }
        self.look_whether_full();
    }

    fn land(&mut self, run: PageRun, versions: Vec<u64>) {
        let ledger = self.destination.ledger.clone();
        let landings = match ledger.land(run) {
            Ok(landings) => landings,
            Err(error) => return self.checker.fail(format!("to the destination: {error}")),
        };
        for landing in landings {
            let at = (landing.run().first().get() - run.first().get()) as usize;
            let versions = &versions[at..at + landing.run().count() as usize];
            if self.random.percent(3) {
                // As if the kernel had said EAGAIN until we gave up.
                let run = landing.hand_back();
                let step = DestinationStep::Retry { run, versions: versions.to_vec() };
                self.soon(2_000, Event::Destination { step });
                continue;
            }
            for (page, version) in landing.run().pages().zip(versions) {
                self.place(page.get(), *version);
            }
            landing.placed();
        }
        self.look_whether_full();
    }

    fn place(&mut self, page: u64, version: u64) {
        self.checker.places(page, version);
        self.destination.memory[page as usize] = Some(version);
        self.wake_waiters(page);
    }

    fn wake_waiters(&mut self, page: u64) {
        for vcpu in 0..self.guest.vcpus.len() {
            if self.guest.vcpus[vcpu].next.is_some_and(|access| access.page == page) {
                self.wake_if_blocked(vcpu);
            }
        }
        if self.destination.restoring.last() == Some(&page) {
            self.soon(100, Event::Destination { step: DestinationStep::Restore });
        }
    }

    fn wake_if_blocked(&mut self, vcpu: usize) {
        if self.guest.vcpus[vcpu].blocked {
            self.wake_vcpu(vcpu);
        }
    }

    /// Nobody may wait at a page that is there.
    fn look_for_sleepers(&mut self) {
        for (index, vcpu) in self.guest.vcpus.iter().enumerate() {
            let page = vcpu.next.filter(|_| vcpu.blocked).map(|access| access.page);
            let there = |page: &u64| self.destination.memory[*page as usize].is_some();
            let long = self.now > vcpu.blocked_at + ASLEEP_MAX;
            if let Some(page) = page.filter(there).filter(|_| long) {
                let what = format!("vCPU {index} stands still at page {page}, which is there");
                return self.checker.fail(what);
            }
        }
    }

    pub fn look_whether_full(&mut self) {
        let full = match self.sabotage {
            Sabotage::FullTooEarly => self.destination.missing() <= 1,
            _ => self.destination.ledger.finish().is_ok(),
        };
        if !self.destination.told_full && full {
            self.destination.told_full = true;
            self.soon(300, Event::Destination { step: DestinationStep::LedgerFull });
        }
    }

    /// Whether a page can be accessed at once; if not, whoever wants it stands still
    /// until it is placed.
    pub fn destination_has(&mut self, page: u64, vcpu: Option<usize>) -> bool {
        let there = self.destination.memory[page as usize].is_some();
        let unmapped = self.destination.unmapped.contains(&page);
        if self.destination.unregistered || there && !unmapped {
            if there && self.random.percent(1) {
                self.destination.unmapped.insert(page);
            }
            return true;
        }
        if let Some(vcpu) = vcpu {
            self.guest.vcpus[vcpu].blocked = true;
            self.guest.vcpus[vcpu].blocked_at = self.now;
        }
        let index = PageIndex::new(page);
        let ledger = self.destination.ledger.clone();
        match ledger.fault(index) {
            Ok(FaultAnswer::Request) => self.request(index, vcpu),
            Ok(FaultAnswer::Wait) => {}
            Ok(FaultAnswer::Wake) if !there => {
                self.checker.fail("a placed page is not in memory");
            }
            Ok(FaultAnswer::Wake) if self.sabotage == Sabotage::NoWake => {}
            Ok(FaultAnswer::Wake) => {
                self.mark("fault on a placed page".into());
                self.destination.unmapped.remove(&page);
                self.wake_waiters(page);
            }
            Ok(FaultAnswer::Zero(landing)) => {
                self.place(page, 0);
                landing.placed();
            }
            Err(error) => self.checker.fail(format!("a fault: {error}")),
        }
        self.look_whether_full();
        false
    }

    fn request(&mut self, page: PageIndex, vcpu: Option<usize>) {
        let (Some(connection), Some(session)) =
            (self.destination.connection, &self.destination.session)
        else {
            return;
        };
        let epoch = session.epoch();
        let lane = Lane::Demand(vcpu.map_or(self.guest.vcpus.len(), |vcpu| vcpu) as u16);
        let vcpu = vcpu.map(|vcpu| vcpu as u16);
        let request = PageRequest { run: PageRun::single(page), vcpu, epoch };
        self.trace.line(self.now, format_args!("destination {request:?}"));
        self.send(connection, lane, Side::Source, Packet::Request(request.encode()));
    }

    /// Restoring touches guest memory, before the commit.
    fn restore(&mut self) {
        while let Some(page) = self.destination.restoring.last().copied() {
            if self.destination.state() != Some(DestinationState::Restoring) {
                return;
            }
            if !self.destination_has(page, None) {
                return;
            }
            let seen = self.destination.memory[page as usize].unwrap_or(0);
            self.checker.restore_reads(page, seen);
            self.destination.restoring.pop();
        }
        self.destination_event(DestinationEvent::Restored);
    }

    pub fn cancel_destination(&mut self) {
        self.destination_event(DestinationEvent::Cancel("the user said so".into()));
    }

    /// The destination's process dies. After the commit the guest would be lost,
    /// so then it is spared, and so it is while the commit is under way.
    pub fn crash_destination(&mut self) {
        use postcopy::proto::source::SourceState;
        let spared = self.vmm.committed()
            || self.checker.overridden()
            || self.source.state() == Some(SourceState::Committing);
        if spared || self.checker.outcome(Side::Destination).is_some() {
            return;
        }
        self.trace.line(self.now, format_args!("the destination dies"));
        // Its Ready may be on the way: the source commits to nobody then.
        self.may_be_lost |= self.destination.state() == Some(DestinationState::InDoubt);
        self.destination.crashed = true;
        if let Some(connection) = self.destination.connection.take() {
            self.network.silence(self.now, connection);
            self.cut(connection);
        }
        if self.destination.session.take().is_some() {
            let why = "the destination died".into();
            self.destination_ends(Outcome::Aborted(why));
        }
    }
}
