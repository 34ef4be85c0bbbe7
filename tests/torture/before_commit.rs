//! The destination, or the fault server, is killed before the commit: the guest runs on
//! at its source, whole, and can still be migrated.

use super::commit_word::{CommitWord, Decision};
use super::harness::{Guest, Running, SOON, poll};
use super::rounds::{Round, rounds};
use nix::sys::signal::Signal;
use rand::Rng;
use std::time::{Duration, Instant};

/// How often a kill may come after the commit before the test gives up.
const REDRAWN_MAX: u32 = 20;
/// So that there is something to be killed in the middle of.
const MEBIBYTES: u64 = 64;
const DEBUG: [&str; 2] = ["--log", "postcopy::engine=debug"];

/// When to kill.
#[derive(Clone, Copy, Debug)]
enum Aim {
    /// So long after the migration was asked for.
    After(Duration),
    /// So long after the source has logged this.
    Source(&'static str, Duration),
    /// So long after the destination has logged this.
    Destination(&'static str, Duration),
}

/// What a kill came upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// Nothing was committed, and nothing was afterwards.
    BeforeTheCommit,
    /// The word was undecided, but the destination's Ready was on its way: the commit was
    /// made to nobody.
    InDoubt,
    /// The commit was made.
    AfterTheCommit,
}

/// Which process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Destination,
    FaultServer,
}

/// Draws when to kill: half of the kills go where the guest runs nowhere.
fn aim(round: &mut Round, victim: Victim, rtt: Duration) -> Aim {
    let moment = Duration::from_micros(500);
    match (round.random.random_range(0..6), victim) {
        (0, _) => Aim::After(round.up_to(Duration::from_millis(40) + 5 * rtt)),
        (1, _) => Aim::Destination("OpenLanes", round.up_to(4 * moment + rtt)),
        (2, Victim::FaultServer) => Aim::Source("PauseGuest", round.up_to(4 * moment)),
        (_, Victim::FaultServer) => Aim::Source("SendState", round.up_to(2 * moment + rtt)),
        (2, Victim::Destination) => Aim::Destination("Restore", round.up_to(moment)),
        (_, Victim::Destination) => Aim::Source("SendState", round.up_to(moment + rtt / 2)),
    }
}

/// Waits until it is known whether the commit was made: until the word says so, or until
/// its fault server is gone.
fn settled(word: &CommitWord, migration: &mut Running) -> Decision {
    poll("a decision, or the end of the fault server", SOON, || {
        let runs = migration.runs();
        let decision = word.decision();
        (decision != Decision::Undecided || !runs).then_some(decision)
    })
}

/// Kills `victim` once. What was migrated too far by then is only counted. Also says
/// whether the machine state had been sent.
fn kill(round: &mut Round, victim: Victim) -> (Found, bool) {
    let rtt = [Duration::ZERO, Duration::from_millis(3), Duration::from_millis(20)];
    let rtt = rtt[round.random.random_range(0..rtt.len())];
    let at = aim(round, victim, rtt);
    let guest = round.guest(MEBIBYTES);
    let mut receiver = round.receiver(&DEBUG);
    let (_relay, ticket) = round.link(&receiver.ticket, 400, rtt);
    let word = CommitWord::of(guest.process.pid());
    let began = Instant::now();
    let mut migration = guest.migrate_as(round.postcopy(), &ticket, &DEBUG);
    match at {
        Aim::After(time) => std::thread::sleep(time),
        Aim::Source(line, more) => {
            migration.says(line);
            std::thread::sleep(more);
        }
        Aim::Destination(line, more) => {
            receiver.process.says(line);
            std::thread::sleep(more);
        }
    }
    let process = match victim {
        Victim::Destination => &mut receiver.process,
        Victim::FaultServer => &mut migration,
    };
    process.signal(Signal::SIGKILL);
    let at_kill = word.decision();
    let when = began.elapsed();
    let killed = process.wait_killed();
    let blackout = migration.said_so_far("SendState");
    let found = match (at_kill, settled(&word, &mut migration)) {
        (Decision::Committed | Decision::Running, _) => Found::AfterTheCommit,
        (_, Decision::Committed | Decision::Running) => Found::InDoubt,
        _ => Found::BeforeTheCommit,
    };
    println!(
        "before_commit: seed {}: {victim:?} killed {when:?} after the start ({at:?}), \
         {rtt:?} round trip, state {}sent: {found:?}{}",
        round.seed,
        if blackout { "" } else { "not " },
        if killed { "" } else { ", and it had ended by itself" },
    );
    if found == Found::BeforeTheCommit {
        assert!(killed, "{victim:?} ended by itself before the commit");
        match victim {
            Victim::Destination => source_goes_on(round, guest, migration),
            Victim::FaultServer => {
                guest.runs_on();
                assert!(!receiver.process.said_so_far("RunGuest"), "the guest runs twice");
                round.is_whole(guest);
                assert!(!receiver.process.said_so_far("RunGuest"), "the guest runs twice");
            }
        }
    }
    (found, blackout)
}

/// The guest is whole at its source, and the fault server says so.
fn source_goes_on(round: &Round, guest: Guest, migration: Running) {
    // The fault server, which has let go of the guest, may look for the destination still.
    guest.runs_on();
    round.is_whole(guest);
    if !round.seed.is_multiple_of(4) {
        // It is looking for the destination, for ten seconds; no user needs to wait for that.
        migration.signal(Signal::SIGINT);
    }
    let ended = migration.wait(SOON);
    assert_eq!(ended.code, Some(3), "{ended:?}");
    let last = ended.stderr.lines().last().unwrap_or_default();
    assert!(last.contains("the guest runs on here"), "{ended:?}");
}

fn killed_before_the_commit(name: &str, victim: Victim) {
    let mut redrawn = Vec::new();
    let blackouts = rounds(name, |round| {
        for _ in 0..REDRAWN_MAX {
            match kill(round, victim) {
                (Found::BeforeTheCommit, blackout) => return blackout,
                (late, _) => redrawn.push(late),
            }
        }
        panic!("{REDRAWN_MAX} kills came after the commit");
    });
    let of = blackouts.len();
    let narrow = blackouts.iter().filter(|blackout| **blackout).count();
    let doubt = redrawn.iter().filter(|found| **found == Found::InDoubt).count();
    println!(
        "{name}: {of} kills before the commit, {narrow} of them in the blackout; redrawn: \
         {doubt} in doubt, {} after the commit",
        redrawn.len() - doubt,
    );
    // A few rounds may be anything.
    assert!(of < 10 || narrow * 4 >= of, "only {narrow} of {of} kills were in the blackout");
}

#[test]
fn before_commit_the_destination_may_die() {
    killed_before_the_commit("before_commit_destination", Victim::Destination);
}

#[test]
fn before_commit_the_fault_server_may_die() {
    killed_before_the_commit("before_commit_fault_server", Victim::FaultServer);
}
