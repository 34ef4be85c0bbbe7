//! What goes wrong first, so that a point is reached, or reached at a known moment.

use postcopy::failpoint::{Point, Process};

/// A failpoint of another step: in which process, and what it is told.
pub type Arranged = (Process, &'static str);

/// The commit cannot be recorded: the source takes its guest back and tells the destination.
const RETREAT: Arranged = (Process::Source, "source::before_commit_word=return(error)");
/// The link is lost in the middle of the target brownout.
const LINK_LOST: Arranged = (Process::Source, "source::before_push_claimed=return(error)");
/// The fault server dies there.
const SERVER_DIES: Arranged = (Process::Source, "source::after_push_sent=return(crash)");
/// The fault server dies in the blackout.
const SERVER_DIES_EARLY: Arranged = (Process::Source, "source::after_state_sent=return(crash)");
/// Restoring takes a while: seeds come before Ready, and Ready half a second behind the state.
const SLOW_RESTORE: Arranged = (Process::Destination, "vmm::before_restore=return(delay 500)");
/// Pausing takes a while: what follows Accept is not there at once.
const SLOW_PAUSE: Arranged = (Process::Vmm, "vmm::before_pause=return(delay 500)");
const REFUSED: Arranged = (Process::Destination, "vmm::before_prepare=return(error)");
const NOT_RESTORED: Arranged = (Process::Destination, "vmm::before_restore=return(error)");
const NOT_STARTED: Arranged = (Process::Destination, "vmm::before_enter=return(error)");

/// How the fault server moves the guest, so that `point` is reached: some are only where memory is
/// copied before.
pub fn mode(point: &Point) -> [&'static str; 2] {
    let copies = ["dirty", "round", "copy", "copied", "landed_sent", "valid"];
    let (_, step) = point.name.split_once("::").expect("a component and a step");
    let mode = if copies.iter().any(|of| step.contains(of)) { "hybrid" } else { "post-copy" };
    ["--mode", mode]
}

/// What is to go wrong before `point`.
pub fn before(point: &Point) -> Option<Arranged> {
    let (_, step) = point.name.split_once("::").expect("a component and a step");
    Some(match (point.process, step) {
        (Process::Source, "after_state_sent") => SLOW_RESTORE,
        (Process::Source | Process::Destination, step) if step.contains("_seed_") => SLOW_RESTORE,
        (Process::Destination, "after_placed") => SLOW_RESTORE,
        (Process::Destination, "after_accept_sent") => SLOW_PAUSE,
        (Process::Source, "before_resume" | "after_resume") => RETREAT,
        (Process::Source, "before_abort_sent" | "after_abort_sent") => RETREAT,
        (Process::Vmm, step) if step.contains("abort_word") || step.contains("resume") => RETREAT,
        (Process::Keeper, "before_resumed_sent") => RETREAT,
        (Process::Keeper, step) if step.contains("abort_word") => SERVER_DIES_EARLY,
        (Process::Source, step) if step.contains("reattach") => LINK_LOST,
        (Process::Source, "before_ledger_resumed") => LINK_LOST,
        (Process::Destination, "before_placed_sent" | "after_placed_sent") => LINK_LOST,
        (Process::Source, "after_keeper_attached") => SERVER_DIES,
        (Process::Destination, step) if step.contains("refuse") => REFUSED,
        (Process::Destination, step) if step.contains("abort") => NOT_RESTORED,
        (Process::Destination, step) if step.contains("lost_sent") => NOT_STARTED,
        _ => return None,
    })
}
