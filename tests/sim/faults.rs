//! What goes wrong, and when: drawn from the seed before the run begins.

use crate::network::{Lane, Side};
use crate::random::Random;
use postcopy::proto::destination::DestinationState as D;
use postcopy::proto::source::SourceState as S;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection breaks.
    Cut,
    /// The connection breaks, and none can be made for a while.
    Outage(Duration),
    /// That side hears nothing any more, but is heard.
    HalfOpen(Side),
    /// One lane is lost by itself.
    LoseLane(Lane),
    /// A side's process stands still, as one that was stopped does.
    Stall(Side, Duration),
    /// The destination has another address, which the source learns after a while.
    Move(Duration),
    /// The source's fault-server dies; its VMM and the memory live on.
    CrashSource,
    /// The source's VMM dies; the guest with it, if it runs there.
    KillVmm,
    /// The keeper dies.
    KillKeeper,
    /// The fault-server dies, and an operator takes the guest back after a commit, on his
    /// word that the destination does not run it.
    Override,
    /// The destination dies. Injected before the commit only: after it a guest
    /// does not survive this yet.
    CrashDestination,
    CancelSource,
    CancelDestination,
    /// The destination's engine finds that the guest cannot go on there.
    GuestFails,
    /// The VMM takes its guest back by itself.
    TakeBack,
    /// The source's engine finds that the destination broke the protocol.
    Violation,
    /// A timer goes off before its time.
    EarlyTimer,
}

#[derive(Clone, Copy, Debug)]
pub enum When {
    /// At this event.
    Step(u64),
    /// So many events after the source's machine came into a state.
    Source(S, u64),
    /// So many events after the destination's machine came into a state.
    Destination(D, u64),
    /// In the middle of a batch of actions, before the source performs this one.
    SourceAction(u64),
}

#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub when: When,
    pub fault: Fault,
}

/// Draws the faults of a run. `long` outages last beyond what a session endures.
pub fn draw(random: &mut Random, long: bool) -> Vec<Plan> {
    let count = random.pick(&[0, 1, 1, 2, 3, 5, 8]);
    let horizon = random.pick(&[50, 400, 1_000, 2_000]);
    (0..count)
        .map(|_| {
            let lasting = random.pick(&[300_000, 2_000_000, 10_000_000]);
            let lasting = if long { 90_000_000 } else { lasting };
            let fault = match random.below(40) {
                25..28 => Fault::HalfOpen(random.pick(&[Side::Source, Side::Destination])),
                28..31 => Fault::LoseLane(match random.below(6) {
                    0 => Lane::Control,
                    1..3 => Lane::Demand(random.below(3) as u16),
                    _ => Lane::Push(random.below(3) as u16),
                }),
                31..34 => {
                    let side = random.pick(&[Side::Source, Side::Destination]);
                    Fault::Stall(side, random.micros(1_000, lasting))
                }
                34 => Fault::Move(random.micros(1_000, lasting)),
                35..37 => Fault::KillVmm,
                37..39 => Fault::KillKeeper,
                39 => Fault::Override,
                0..7 => Fault::Cut,
                7..10 => Fault::Outage(random.micros(0, if long { 90_000_000 } else { 3_000_000 })),
                10..14 => Fault::CrashSource,
                14..16 => Fault::CrashDestination,
                16 => Fault::CancelSource,
                17 => Fault::CancelDestination,
                18..20 => Fault::TakeBack,
                20..22 => Fault::Violation,
                22 => Fault::GuestFails,
                _ => Fault::EarlyTimer,
            };
            let after = random.pick(&[0, 0, 1, 2, 5, 20]);
            let when = match random.below(8) {
                0..2 => When::Step(random.below(horizon)),
                2..5 => When::Source(random.pick(&SOURCE_STATES), after),
                5..7 => When::Destination(random.pick(&DESTINATION_STATES), after),
                _ => When::SourceAction(random.below(20)),
            };
            // Only a crash can come between two actions.
            let between = matches!(when, When::SourceAction(_));
            Plan { when, fault: if between { Fault::CrashSource } else { fault } }
        })
        .collect()
}

/// Some more than once: what comes late in a migration is seldom reached otherwise.
const SOURCE_STATES: [S; 16] = [
    S::Negotiating,
    S::Copying,
    S::Copying,
    S::CopyingRest,
    S::CopyingRest,
    S::Pausing,
    S::Unpausing,
    S::Blackout,
    S::Retracting,
    S::Committing,
    S::Committing,
    S::Committed,
    S::Committed,
    S::Brownout,
    S::Brownout,
    S::Releasing,
];

const DESTINATION_STATES: [D; 10] = [
    D::Preparing,
    D::Agreed,
    D::Restoring,
    D::InDoubt,
    D::InDoubt,
    D::Starting,
    D::Starting,
    D::Running,
    D::Full,
    D::Full,
];
