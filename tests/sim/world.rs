//! The world: a virtual clock, the queue of what is going to happen, and the
//! parties, each in a file of its own: [source](super::source_side),
//! [destination](super::destination_side), [VMM](super::vmm), network and guest.

use crate::checker::Checker;
use crate::destination_side::{Destination, DestinationStep};
use crate::faults::{self, Fault, Plan, When};
use crate::guest::Guest;
use crate::ledgers::Ledger;
use crate::network::{ConnectionId, IDLE_MAX, Lane, Network, Packet, Side};
use crate::random::Random;
use crate::source_side::{Source, SourceStep};
use crate::trace::Trace;
use crate::vmm::{Keeper, Vmm, VmmStep};
use postcopy::proto::destination::DestinationState;
use postcopy::proto::source::{Outcome, SessionLimits};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

/// After the last fault, and the guest's workload, a session is over within its patience and
/// this time: the longest chain of limits and some for the delays.
const END_WITHIN: Duration = Duration::from_secs(40);
/// Once the guest is committed, after the last fault and the workload, all its pages are
/// there within this time.
const WHOLE_WITHIN: Duration = Duration::from_secs(10);
/// More events than any honest run has.
const EVENTS_MAX: u64 = 300_000;

/// A deliberate fault in a party, for which the checker has to raise its voice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    None,
    /// The destination places pages without asking its ledger.
    PlaceAgain,
    /// The VMM takes its guest back without looking at the commit word.
    IgnoreWord,
    /// The destination runs its guest when the link is lost while it is in doubt.
    RunInDoubt,
    /// The source marks pages as sent and does not send them.
    LosePushFrame,
    /// The source says Commit before the word is written.
    CommitBeforeWord,
    /// After an abort the claims stay, and the lanes stay open.
    KeepClaims,
    /// The source does not tell the destination that it has aborted.
    MuteAbort,
    /// The source comes back in the epoch that it was in.
    EpochNotRaised,
    /// The destination takes in frames of a link that is gone.
    OldFrames,
    /// The set of placed pages lacks one.
    PlacedLacksOne,
    /// The set of placed pages has one that is missing.
    PlacedHasOneMore,
    /// The source's ledger stays in the old epoch.
    LedgerNotResumed,
    /// What was asked for on a link that is gone is not asked for again.
    ForgetRequests,
    /// A fault on a placed page wakes nobody.
    NoWake,
    /// The destination is full with a page missing.
    FullTooEarly,
    /// The source lets go when everything is sent.
    SentIsArrived,
    /// The destination takes the end of a link for the end of the session.
    EndIsDone,
    /// The source answers a request for a page that is on its way.
    SendTwice,
    /// No time limit ever comes to its end.
    NoTimers,
    /// The source gives up after the handshake's limit or sooner, not after the patience.
    Impatient,
    /// The keeper leaves the word of a client that has died as it is.
    KeeperSleeps,
    /// The VMM forgets a page that was written while memory was copied.
    WrittenForgotten,
    /// The set of valid pages has one that was written, or never copied.
    ValidHasOneMore,
    /// The destination says that all pages have landed when some have not.
    LandedTooEarly,
}

#[derive(Debug)]
pub enum Event {
    Deliver {
        connection: ConnectionId,
        lane: Lane,
        to: Side,
        packet: Packet,
    },
    /// A side notices that a connection is dead.
    Notice {
        connection: ConnectionId,
        side: Side,
    },
    Timer {
        side: Side,
        incarnation: u32,
        at: Duration,
    },
    Source {
        incarnation: u32,
        step: SourceStep,
    },
    Destination {
        step: DestinationStep,
    },
    Vmm(VmmStep),
    Vcpu {
        generation: u32,
        vcpu: usize,
    },
}

struct Queued {
    at: Duration,
    number: u64,
    event: Event,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// How a run ended.
#[derive(Debug)]
pub struct Verdict {
    pub failure: Option<String>,
    pub source: Option<Outcome>,
    pub destination: Option<Outcome>,
    pub digest: (u64, u64),
    pub last_lines: String,
    /// What was seen to happen, and how often.
    pub marks: BTreeMap<String, u64>,
}

pub struct World<L> {
    pub now: Duration,
    pub random: Random,
    pub pages: u64,
    pub limits: SessionLimits,
    pub sabotage: Sabotage,
    pub network: Network,
    pub guest: Guest,
    pub vmm: Vmm,
    pub source: Source<L>,
    pub destination: Destination,
    pub checker: Checker,
    pub trace: Trace,
    pub marks: BTreeMap<String, u64>,
    queue: BinaryHeap<Reverse<Queued>>,
    queued: u64,
    steps: u64,
    plans: Vec<Plan>,
    /// The destination could not go on with a guest which it may have been given.
    pub may_be_lost: bool,
    last_fault: Duration,
    pub committed_at: Duration,
    /// Something went wrong before the commit, so that an abort is no wonder.
    harmed: bool,
    /// How long the faults lasted, all together.
    disturbed: Duration,
    /// A side's process stands still until then.
    stalled_until: [Duration; 2],
}

impl<L: Ledger> World<L> {
    pub fn new(seed: u64, sabotage: Sabotage, print: bool) -> Self {
        let mut random = Random::new(seed);
        // Now and then more than one part of the set of placed pages.
        let large = random.percent(2);
        let pages = if large { 9_000 } else { random.pick(&[1, 32, 64, 128, 512]) };
        let long = random.percent(5);
        let plans = faults::draw(&mut random, long);
        let network = Network::new(random.fork());
        let guest = Guest::new(pages, random.fork());
        // Versions of the beginning are above all that the guest will write.
        let never_written = random.pick(&[0, 10, 60]);
        let memory: Vec<u64> = (0..pages)
            .map(|page| if random.percent(never_written) { 0 } else { u64::MAX - page })
            .collect();
        // The usual patience outlasts every fault.
        let patience = random.pick(&[60, 60, 60, 600]);
        let recovery = Duration::from_secs(patience);
        let limits = SessionLimits { recovery, ..SessionLimits::default() };
        let mut world = Self {
            now: Duration::ZERO,
            pages,
            limits,
            sabotage,
            network,
            guest,
            vmm: Vmm::default(),
            checker: Checker::new(&memory),
            source: Source::new(memory, &mut random),
            destination: Destination::new(pages),
            trace: Trace::new(print),
            marks: BTreeMap::new(),
            queue: BinaryHeap::new(),
            queued: 0,
            steps: 0,
            plans,
            may_be_lost: false,
            last_fault: Duration::ZERO,
            committed_at: Duration::ZERO,
            harmed: false,
            disturbed: Duration::ZERO,
            stalled_until: [Duration::ZERO; 2],
            random,
        };
        let plans = world.plans.clone();
        world
            .trace
            .line(world.now, format_args!("{pages} pages, patience {patience} s, {plans:?}"));
        world.start_vcpus();
        world.start_source();
        world
    }

    /// Runs until nothing is left to happen.
    pub fn run(mut self) -> Verdict {
        let mut over_at = None;
        while self.checker.failure().is_none() {
            self.inject();
            let Some(Reverse(next)) = self.queue.pop() else { break };
            self.now = next.at;
            self.steps += 1;
            self.happen(next.event);
            if over_at.is_none() && self.is_over() {
                over_at = Some(self.now);
            }
            if self.steps > EVENTS_MAX {
                self.checker.fail("too many events: something goes round in circles");
            }
            let quiet_since = self.last_fault.max(self.network.outage_until);
            let within = self.limits.recovery + END_WITHIN;
            let bound = quiet_since.max(self.guest.workload_max) + within;
            if over_at.is_none() && self.now > bound {
                self.checker.fail(format!("not over {within:?} after the last fault"));
            }
            self.look_for_progress(quiet_since);
        }
        if self.checker.failure().is_none() {
            self.judge(over_at.is_some());
        }
        Verdict {
            failure: self.checker.failure().map(str::to_string),
            source: self.checker.outcome(Side::Source).cloned(),
            destination: self.checker.outcome(Side::Destination).cloned(),
            digest: self.trace.digest(),
            last_lines: self.trace.last_lines(),
            marks: self.marks,
        }
    }

    /// Once the guest is the destination's and nothing is in the way, its pages come.
    fn look_for_progress(&mut self, quiet_since: Duration) {
        // A policy may wait for the workload, which goes on only where the guest runs.
        let from = quiet_since.max(self.committed_at) + self.guest.workload_max;
        let due = self.vmm.committed() && self.now > from + WHOLE_WITHIN;
        if due && !self.patience_may_be_over() && self.destination.missing() > 0 {
            let missing = self.destination.missing();
            self.checker.fail(format!(
                "{missing} pages are missing, and the workload is not over, {WHOLE_WITHIN:?} \
                 after the last fault"
            ));
        }
    }

    /// Whether a side may rightly have given up.
    fn patience_may_be_over(&self) -> bool {
        let patience = self.limits.recovery * 3 / 4;
        self.may_be_lost || self.disturbed > patience || self.checker.overridden()
    }

    /// Something is going wrong.
    pub fn harm(&mut self) {
        self.harmed |= self.vmm.word == 0;
    }

    fn is_over(&self) -> bool {
        self.checker.outcome(Side::Source).is_some()
            && (self.destination.session.is_none()
                || self.checker.outcome(Side::Destination).is_some())
    }

    fn judge(&mut self, over: bool) {
        if !over {
            let states = format!("{:?}, {:?}", self.source.state(), self.destination.state());
            return self.checker.fail(format!("nothing happens any more, and not over: {states}"));
        }
        let lost = |outcome: Option<&Outcome>| matches!(outcome, Some(Outcome::Lost(_)));
        let source_lost = lost(self.checker.outcome(Side::Source));
        let destination_lost = lost(self.checker.outcome(Side::Destination));
        let may_be_lost = self.patience_may_be_over();
        if self.checker.two_guests() {
            self.mark("two guests after an override".into());
        }
        let aborted = |outcome: Option<&Outcome>| matches!(outcome, Some(Outcome::Aborted(_)));
        let one_aborted = aborted(self.checker.outcome(Side::Source))
            || aborted(self.checker.outcome(Side::Destination));
        if one_aborted && !self.harmed && !self.checker.overridden() {
            return self.checker.fail("aborted, and nothing had gone wrong before the commit");
        }
        let completed = matches!(self.checker.outcome(Side::Source), Some(Outcome::Completed));
        if completed && destination_lost {
            return self.checker.fail("the source completes what the destination has lost");
        }
        if source_lost && !may_be_lost {
            return self.checker.fail("the source gave the guest up");
        }
        // A source that has aborted stays only so long to tell it.
        let untold = aborted(self.checker.outcome(Side::Source))
            && self.disturbed > self.limits.handshake * 3 / 4;
        let in_doubt = self.source.may_leave_in_doubt || untold;
        if destination_lost && !may_be_lost && !in_doubt {
            return self.checker.fail("the destination gave the guest up");
        }
        let duplicates = self.destination.duplicates();
        if self.source.epoch() == 0 && duplicates > 0 {
            return self.checker.fail(format!("{duplicates} pages came twice on one link"));
        }
        // A guest that is lost has no memory to compare.
        let aborted = matches!(self.checker.outcome(Side::Source), Some(Outcome::Aborted(_)));
        if aborted || !(source_lost || destination_lost) {
            self.checker.all_over(&self.source.memory, &self.destination.memory);
        }
    }

    pub fn after(&mut self, delay: Duration, event: Event) {
        self.at(self.now + delay, event);
    }

    pub fn at(&mut self, at: Duration, event: Event) {
        self.queued += 1;
        self.queue.push(Reverse(Queued { at, number: self.queued, event }));
    }

    /// Something takes place after up to so many microseconds.
    pub fn soon(&mut self, micros_max: u64, event: Event) {
        let delay = self.random.micros(0, micros_max);
        self.after(delay, event);
    }

    /// Up to so many microseconds; now and then longer than any limit allows.
    pub fn slowly(&mut self, micros_max: u64) -> Duration {
        let late = self.random.percent(1);
        if late {
            self.harm();
        }
        self.random.micros(0, if late { 45_000_000 } else { micros_max })
    }

    pub fn send(&mut self, connection: ConnectionId, lane: Lane, to: Side, packet: Packet) {
        match self.network.send(self.now, connection, lane, to) {
            Some(at) => self.at(at, Event::Deliver { connection, lane, to, packet }),
            None => self.trace.line(self.now, format_args!("lost, on {connection}: {packet:02x?}")),
        }
    }

    /// Breaks a connection.
    pub fn cut(&mut self, connection: ConnectionId) {
        for (side, at) in self.network.cut(self.now, connection) {
            self.at(at, Event::Notice { connection, side });
        }
    }

    /// Whose process has to run for the event to happen.
    fn side_of(&self, event: &Event) -> Option<Side> {
        match event {
            Event::Deliver { to, .. } => Some(*to),
            Event::Notice { side, .. } | Event::Timer { side, .. } => Some(*side),
            Event::Source { .. } => Some(Side::Source),
            Event::Destination { .. } => Some(Side::Destination),
            Event::Vcpu { .. } => self.destination.running.then_some(Side::Destination),
            Event::Vmm(_) => None,
        }
    }

    fn happen(&mut self, event: Event) {
        if let Some(side) = self.side_of(&event) {
            let until = self.stalled_until[side as usize];
            if self.now < until {
                return self.at(until, event);
            }
        }
        match event {
            Event::Deliver { connection, lane, to, packet } => {
                let old = self.sabotage == Sabotage::OldFrames
                    && matches!(packet, Packet::Frame(..))
                    && self.destination.state() == Some(DestinationState::Running);
                if !old && !self.network.arrives(self.now, connection, lane, to) {
                    return;
                }
                match to {
                    Side::Source => self.source_receives(connection, lane, packet),
                    Side::Destination => self.destination_receives(connection, lane, packet),
                }
            }
            Event::Notice { connection, side } => {
                if self.network.usable(connection, side) {
                    self.network.give_up(connection, side);
                    match side {
                        Side::Source => self.source_lost_link(connection, "it went silent"),
                        Side::Destination => self.destination_lost_link(connection),
                    }
                }
            }
            Event::Timer { side: Side::Source, incarnation, at } => {
                self.source_timer(incarnation, at);
            }
            Event::Timer { side: Side::Destination, at, .. } => self.destination_timer(at),
            Event::Source { incarnation, step } => {
                if incarnation == self.source.incarnation {
                    self.source_step(step);
                }
            }
            Event::Destination { step } => {
                if !self.destination.crashed {
                    self.destination_step(step);
                }
            }
            Event::Vmm(step) => self.vmm_step(step),
            Event::Vcpu { generation, vcpu } => {
                if generation == self.guest.generation {
                    self.vcpu_step(vcpu);
                }
            }
        }
    }

    pub fn start_vcpus(&mut self) {
        self.guest.generation += 1;
        for vcpu in 0..self.guest.vcpus.len() {
            self.wake_vcpu(vcpu);
        }
    }

    pub fn wake_vcpu(&mut self, vcpu: usize) {
        self.guest.vcpus[vcpu].blocked = false;
        let (rest, generation) = (self.guest.rest(), self.guest.generation);
        self.after(rest, Event::Vcpu { generation, vcpu });
    }

    fn vcpu_step(&mut self, vcpu: usize) {
        let Some(access) = self.guest.wants(vcpu) else {
            return self.destination_workload_ended();
        };
        let page = access.page as usize;
        let side = if self.destination.running { Side::Destination } else { Side::Source };
        if side == Side::Destination && !self.destination_has(access.page, Some(vcpu)) {
            return;
        }
        let holds = match side {
            Side::Source => self.source.memory[page],
            Side::Destination => self.destination.memory[page].unwrap_or(0),
        };
        if access.write {
            let version = self.guest.new_version();
            self.checker.writes(side, access.page, version);
            match side {
                Side::Source => {
                    self.source.memory[page] = version;
                    self.source.copying.writes(page);
                }
                Side::Destination => self.destination.memory[page] = Some(version),
            }
        } else {
            self.checker.reads(side, access.page, holds);
        }
        self.guest.done(vcpu);
        self.wake_vcpu(vcpu);
    }

    fn inject(&mut self) {
        let mut due = Vec::new();
        let (steps, source, destination) =
            (self.steps, self.source.state(), self.destination.state());
        self.plans.retain_mut(|plan| {
            match plan.when {
                When::Source(state, after) if source == Some(state) => {
                    plan.when = When::Step(steps + after);
                }
                When::Destination(state, after) if destination == Some(state) => {
                    plan.when = When::Step(steps + after);
                }
                _ => {}
            }
            let now = matches!(plan.when, When::Step(at) if at <= steps);
            if now {
                due.push(plan.fault);
            }
            !now
        });
        due.into_iter().for_each(|fault| self.fail_with(fault));
    }

    /// Whether the source is to die before it performs this action.
    pub fn dies_before_action(&mut self, number: u64) -> bool {
        let before = self.plans.len();
        self.plans.retain(|plan| !matches!(plan.when, When::SourceAction(n) if n == number));
        self.plans.len() != before
    }

    pub fn fail_with(&mut self, fault: Fault) {
        if self.is_over() {
            return;
        }
        self.trace.line(self.now, format_args!("FAULT {fault:?}"));
        self.last_fault = self.last_fault.max(self.now);
        if fault != Fault::EarlyTimer {
            self.harm();
        }
        let name = match fault {
            Fault::Outage(_) => "Outage".into(),
            Fault::Move(_) => "Move".into(),
            Fault::LoseLane(Lane::Demand(_)) => "LoseLane(Demand)".into(),
            Fault::LoseLane(Lane::Push(_)) => "LoseLane(Push)".into(),
            Fault::Stall(side, _) => format!("Stall({side:?})"),
            fault => format!("{fault:?}"),
        };
        if let Some(state) = self.source.state() {
            self.mark(format!("{name} with the source {state:?}"));
        }
        if let Some(state) = self.destination.state() {
            self.mark(format!("{name} with the destination {state:?}"));
        }
        match fault {
            Fault::Cut => self.cut_link(),
            Fault::Outage(time) | Fault::Move(time) => {
                self.cut_link();
                self.disturbed += time;
                let until = self.now + time;
                self.network.outage_until = self.network.outage_until.max(until);
            }
            Fault::HalfOpen(deaf) => self
                .break_link(|network, now, connection| network.cut_towards(now, connection, deaf)),
            Fault::LoseLane(lane) => {
                self.break_link(|network, now, connection| network.cut_lane(now, connection, lane))
            }
            Fault::Stall(side, time) => self.stall(side, time),
            Fault::KillVmm => self.kill_vmm(),
            Fault::KillKeeper if self.vmm.keeper == Keeper::Holds => {
                self.vmm.keeper = Keeper::Dead;
            }
            Fault::KillKeeper => {}
            Fault::Override => {
                self.crash_source();
                self.operator_takes_back();
            }
            Fault::CrashSource => self.crash_source(),
            Fault::CrashDestination => self.crash_destination(),
            Fault::CancelSource => self.cancel_source(),
            Fault::CancelDestination => self.cancel_destination(),
            Fault::GuestFails => self.guest_fails(),
            Fault::TakeBack => self.vmm_step(VmmStep::TakeBack),
            Fault::Violation => self.source_finds_violation(),
            Fault::EarlyTimer => {
                self.source_early_timer();
                self.destination_early_timer();
            }
        }
    }

    pub fn mark(&mut self, what: String) {
        *self.marks.entry(what).or_default() += 1;
    }

    fn cut_link(&mut self) {
        self.break_link(|network, now, connection| network.cut(now, connection));
    }

    /// Breaks the link in some way, if there is a whole one; the sides notice in time.
    fn break_link(
        &mut self,
        how: impl Fn(&mut Network, Duration, ConnectionId) -> [(Side, Duration); 2],
    ) {
        for connection in [self.source.connection, self.destination.connection] {
            if let Some(connection) = connection.filter(|c| self.network.is_whole(*c)) {
                for (side, at) in how(&mut self.network, self.now, connection) {
                    self.at(at, Event::Notice { connection, side });
                }
            }
        }
        let noticed = self.now + Duration::from_micros(2 * IDLE_MAX);
        self.last_fault = self.last_fault.max(noticed);
    }

    /// A process is stopped for a while. If it is long, its peer takes the link for lost,
    /// and so does the process when it goes on.
    fn stall(&mut self, side: Side, time: Duration) {
        let until = self.now + time;
        self.disturbed += time;
        let stalled = &mut self.stalled_until[side as usize];
        *stalled = until.max(*stalled);
        self.last_fault = self.last_fault.max(until + Duration::from_micros(2 * IDLE_MAX));
        let idle = Duration::from_micros(IDLE_MAX);
        if time <= idle {
            return;
        }
        for connection in [self.source.connection, self.destination.connection] {
            if let Some(connection) = connection.filter(|c| self.network.is_whole(*c)) {
                for side in [Side::Source, Side::Destination] {
                    let delay = self.random.micros(0, 1_000);
                    self.at(self.now + idle + delay, Event::Notice { connection, side });
                }
            }
        }
    }
}
