//! The seeded simulator: both session machines, both ledgers and the pre-paging
//! policies under a virtual clock and a network that delays, reorders and breaks,
//! with processes that die at any moment and users who change their mind.
//!
//! ```sh
//! cargo test --test sim                                  # the usual seeds
//! POSTCOPY_SIM_SEEDS=100000 cargo test --test sim        # more of them
//! POSTCOPY_SIM_SEED=17 cargo test --test sim one_seed -- --nocapture
//! ```
//!
//! The [checker] stands apart: it sees what an onlooker could see and shares no
//! code with what it checks.

mod checker;
mod destination_side;
mod faults;
mod guest;
mod ledgers;
mod network;
mod random;
mod source_side;
mod trace;
mod vmm;
mod world;

use ledgers::{BrokenLedger, Ledger};
use postcopy::proto::ledger::SourceLedger;
use postcopy::proto::source::Outcome;
use std::collections::BTreeMap;
use world::{Sabotage, Verdict, World};

const SEEDS: u64 = 4_000;

fn run<L: Ledger>(seed: u64, sabotage: Sabotage, print: bool) -> Verdict {
    World::<L>::new(seed, sabotage, print).run()
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

fn complain(seed: u64, verdict: &Verdict) {
    if let Some(failure) = &verdict.failure {
        panic!(
            "seed {seed}: {failure}\n{}replay: POSTCOPY_SIM_SEED={seed} cargo test \
             -p postcopy --no-default-features --test sim one_seed -- --nocapture",
            verdict.last_lines
        );
    }
}

fn ending(outcome: Option<&Outcome>) -> &'static str {
    match outcome {
        Some(Outcome::Completed) => "completed",
        Some(Outcome::Aborted(_)) => "aborted",
        Some(Outcome::Lost(_)) => "lost",
        None => "never began",
    }
}

#[test]
fn no_seed_breaks_a_promise() {
    let seeds = number("POSTCOPY_SIM_SEEDS").unwrap_or(SEEDS);
    let mut endings = BTreeMap::<_, u64>::new();
    let mut marks = BTreeMap::<String, u64>::new();
    for seed in 0..seeds {
        let verdict = run::<SourceLedger>(seed, Sabotage::None, false);
        complain(seed, &verdict);
        let pair = (ending(verdict.source.as_ref()), ending(verdict.destination.as_ref()));
        *endings.entry(pair).or_default() += 1;
        for (mark, count) in verdict.marks {
            *marks.entry(mark).or_default() += count;
        }
    }
    println!("source and destination: {endings:?}");
    marks.iter().for_each(|(mark, count)| println!("{count:>8} {mark}"));
    if seeds >= SEEDS {
        // A simulator in which hardly anything succeeds, or fails, tests little.
        let share = |pair| endings.get(&pair).copied().unwrap_or(0) * 100 / seeds;
        assert!(share(("completed", "completed")) >= 25, "{endings:?}");
        assert!(share(("aborted", "aborted")) >= 10, "{endings:?}");
        let unseen: Vec<_> = must_happen().filter(|mark| !marks.contains_key(mark)).collect();
        assert!(unseen.is_empty(), "in {seeds} seeds this never happened: {unseen:?}");
    }
}

/// What the usual seeds have to come across, or they are not worth much.
fn must_happen() -> impl Iterator<Item = String> {
    use postcopy::proto::destination::DestinationState as D;
    use postcopy::proto::source::SourceState as S;
    let source = [
        S::Connecting,
        S::Negotiating,
        S::Pausing,
        S::Blackout,
        S::Retracting,
        S::Committing,
        S::Committed,
        S::Brownout,
        S::Releasing,
    ];
    let destination =
        [D::Preparing, D::Agreed, D::Restoring, D::InDoubt, D::Starting, D::Running, D::Full];
    let at_source = ["Cut", "Outage", "CrashSource", "CancelSource", "TakeBack", "Violation"];
    let at_destination = ["Cut", "CrashSource", "CancelDestination"];
    let others = [
        "CrashDestination with the destination Agreed",
        "CrashDestination with the destination InDoubt",
        "GuestFails with the destination Starting",
        "GuestFails with the destination Running",
        "back before the loss was noticed",
        "claim of an epoch that is over",
        "late hit",
        "request before the lanes are open",
        "restart",
        "restart after an abort",
        "restart with an old epoch",
        "unwanted connection",
    ];
    let pairs = at_source
        .into_iter()
        .flat_map(move |fault| source.map(|state| format!("{fault} with the source {state:?}")));
    let more = at_destination.into_iter().flat_map(move |fault| {
        destination.map(|state| format!("{fault} with the destination {state:?}"))
    });
    pairs.chain(more).chain(others.map(String::from))
}

/// Replays `POSTCOPY_SIM_SEED` with its trace; without it, seed 0.
#[test]
fn one_seed() {
    let asked = number("POSTCOPY_SIM_SEED");
    let seed = asked.unwrap_or(0);
    let verdict = run::<SourceLedger>(seed, Sabotage::None, asked.is_some());
    complain(seed, &verdict);
    println!("source {:?}, destination {:?}", verdict.source, verdict.destination);
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 0..50 {
        let [first, second] =
            [(); 2].map(|()| run::<SourceLedger>(seed, Sabotage::None, false).digest);
        assert_eq!(first, second, "seed {seed}");
        let other = run::<SourceLedger>(seed + 1, Sabotage::None, false).digest;
        assert_ne!(first, other, "seeds {seed} and {}", seed + 1);
    }
}

/// The first of 1,000 seeds with which the checker notices, and what it says.
fn caught<L: Ledger>(sabotage: Sabotage) -> String {
    let found = (0..1_000).find_map(|seed| run::<L>(seed, sabotage, false).failure);
    found.expect("the checker notices nothing in 1,000 seeds")
}

#[test]
fn a_ledger_that_hands_pages_out_twice_is_caught() {
    let failure = caught::<BrokenLedger>(Sabotage::None);
    assert!(failure.contains("is sent in epoch"), "{failure}");
}

#[test]
fn a_destination_that_places_again_is_caught() {
    let failure = caught::<SourceLedger>(Sabotage::PlaceAgain);
    assert!(failure.contains("is placed twice"), "{failure}");
}

#[test]
fn a_guest_that_resumes_after_the_commit_is_caught() {
    let failure = caught::<SourceLedger>(Sabotage::IgnoreWord);
    assert!(failure.contains("starts at the Source") || failure.contains("resumes"), "{failure}");
}

#[test]
fn a_destination_that_runs_a_guest_in_doubt_is_caught() {
    let failure = caught::<SourceLedger>(Sabotage::RunInDoubt);
    let words = ["was not committed", "starts at the Destination"];
    assert!(words.iter().any(|words| failure.contains(words)), "{failure}");
}

#[test]
fn a_lost_push_frame_is_caught() {
    let failure = caught::<SourceLedger>(Sabotage::LosePushFrame);
    assert!(failure.contains("not over"), "{failure}");
}
