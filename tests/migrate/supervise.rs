//! Whenever the fault server is killed, another one goes on by itself, and does all that
//! the first one had promised: every page, the report, and an end without remains.

use super::commit_word::{CommitWord, Decision};
use super::fakes::FakeDestination;
use super::harness::{Guest, MIGRATION, Receiver, SOON, poll, processes_with, restarted};
use super::keeper::{FAST, Move, SLOW, check_resumed, kill_process, nothing_left};
use nix::sys::signal::Signal;
use postcopy::attach::client::{AttachError, Attached};
use postcopy::proto::message::{ToDestination, ToSource};
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// Waits for the fault server that was started in the place of one that died, other than
/// `before`.
fn successor(guest: &Guest, before: &[i32]) -> i32 {
    poll("another fault server", SOON, || {
        let found = restarted(&guest.control());
        found.into_iter().find(|pid| !before.contains(pid))
    })
}

/// Waits for the report that whoever is at work writes, and for every page's verification.
fn finished(moved: Move) -> Value {
    poll("a report", MIGRATION, || Path::new(&moved.report).exists().then_some(()));
    moved.verified()
}

#[test]
fn a_fault_server_killed_in_the_middle_is_started_again_by_itself() {
    let mut moved = Move::prepare(FAST, Duration::from_millis(2));
    let mut migration = moved.migrate(&[]);
    moved.vmm_leaves();
    moved.until(25);
    migration.signal(Signal::SIGKILL);
    // It says so where the dead one wrote.
    migration.says("goes on with the session");
    assert!(migration.wait_killed());
    let second = successor(&moved.guest, &[]);
    // While it is there, there is room for no other.
    let again = moved.guest.resume(&[]).wait(SOON);
    again.failed_with(1, &["a fault server is at work"]);
    moved.until(50);
    // By an abort, and at the same time.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(second), Signal::SIGABRT).expect("it runs");
    let third = successor(&moved.guest, &[second]);
    assert_ne!(second, third);
    let report = finished(moved);
    check_resumed(&report);
    assert!(report["link"]["epochs"].as_u64() >= Some(3), "{report:#}");
}

#[test]
fn a_successor_serves_a_guest_whose_vmm_died_with_its_fault_server() {
    // So that the guest does not run yet when the commit can be seen here.
    let mut moved = Move::prepare(FAST, Duration::from_millis(200));
    let word = CommitWord::of(moved.guest.process.pid());
    let mut migration = moved.migrate(&[]);
    word.committed();
    moved.guest.process.signal(Signal::SIGKILL);
    migration.kill();
    assert!(moved.guest.process.wait_killed(), "the VMM had left before");
    check_resumed(&finished(moved));
}

#[test]
fn a_destination_in_doubt_is_told_by_itself() {
    let guest = Guest::start();
    let mut destination = FakeDestination::listen();
    let mut migration = guest.migrate(&destination.ticket, &[]);
    destination.takes_state();
    migration.kill();
    let first = destination.comes();
    let reattach = matches!(&first, ToDestination::Reattach { epoch: 1, committed: None, .. });
    assert!(reattach, "{first:?}");
    let second = destination.hear();
    assert!(matches!(second, Ok(ToDestination::Abort { .. })), "{second:?}");
    destination.say(&ToSource::Abort { reason: "so be it".into() });
    nothing_left(&guest);
    guest.runs_on();
    guest.migrates_to(Receiver::start());
}

#[test]
fn a_guest_that_stays_is_migrated_while_its_old_destination_is_still_looked_for() {
    let guest = Guest::start();
    let mut destination = FakeDestination::listen();
    let mut migration = guest.migrate(&destination.ticket, &[]);
    let word = CommitWord::of(guest.process.pid());
    destination.takes_state();
    destination.vanish();
    migration.kill();
    poll("the VMM's decision", SOON, || (word.decision() == Decision::Aborted).then_some(()));
    successor(&guest, &[]);
    guest.migrates_to(Receiver::start());
}

#[test]
fn one_that_dies_whenever_it_is_started_is_given_up_and_the_memory_is_held() {
    let mut moved = Move::prepare(FAST, Duration::ZERO);
    let migration = moved.migrate(&[]);
    moved.vmm_leaves();
    let keeper = moved.keeper();
    let (began, mut killed) = (Instant::now(), Vec::new());
    migration.signal(Signal::SIGKILL);
    let given_up = loop {
        for pid in restarted(&moved.guest.control()) {
            kill_process(pid);
            if !killed.contains(&pid) {
                killed.push(pid);
            }
        }
        if migration.said_so_far("is not started again") {
            break began.elapsed();
        }
        assert!(began.elapsed() < MIGRATION, "{killed:?}");
        std::thread::sleep(Duration::from_millis(2));
    };
    assert_eq!(killed.len(), 10, "{killed:?}");
    assert!(given_up > Duration::from_secs(15), "without a pause between them: {given_up:?}");
    assert_eq!(processes_with(&moved.guest.keeper()), [keeper]);
    let mut attached =
        postcopy::fault_server::keeper::connect(moved.guest.keeper().as_ref()).expect("it listens");
    let idle = attached.status().expect("a status").failure.expect("nobody is at work");
    assert!(idle.contains("died 10 times"), "{idle}");
    drop(attached);
    assert!(restarted(&moved.guest.control()).is_empty(), "looking is no order to go on");
    // An operator's word goes on with it; and once one is at work it is looked after again.
    let mut resumed = moved.guest.resume(&[]);
    moved.until(30);
    resumed.kill();
    successor(&moved.guest, &killed);
    check_resumed(&finished(moved));
}

#[test]
fn an_operator_who_interrupts_twice_wants_no_successor() {
    let mut moved = Move::prepare(SLOW, Duration::ZERO);
    let mut migration = moved.migrate(&[]);
    moved.vmm_leaves();
    let keeper = moved.keeper();
    migration.signal(Signal::SIGINT);
    migration.says("only stopped before its commit");
    migration.signal(Signal::SIGINT);
    assert_eq!(migration.wait_code(), Some(130));
    std::thread::sleep(Duration::from_millis(300));
    assert!(restarted(&moved.guest.control()).is_empty());
    assert_eq!(processes_with(&moved.guest.keeper()), [keeper], "the memory is held");
    let discard = super::harness::Running::start(&[
        "migrate",
        "--control",
        &moved.guest.control(),
        "--discard",
    ]);
    discard.succeed(SOON);
    nothing_left(&moved.guest);
    moved.receiver.process.kill();
}

#[test]
fn a_keeper_that_dies_is_replaced_so_that_its_fault_server_may_die_next() {
    let mut moved = Move::prepare(FAST, Duration::from_millis(2));
    let mut migration = moved.migrate(&[]);
    moved.vmm_leaves();
    let first = moved.keeper();
    kill_process(first);
    migration.says("the keeper has ended");
    // One that refuses a second client has been handed all it needs.
    poll("another keeper", SOON, || {
        let refused = Attached::connect(moved.guest.keeper());
        matches!(refused, Err(AttachError::Refused { .. })).then_some(())
    });
    assert_ne!(moved.keeper(), first);
    assert!(moved.left() < super::keeper::MEMORY * 9 / 10, "there is no middle left");
    migration.kill();
    check_resumed(&finished(moved));
}

#[test]
fn keeper_and_fault_server_may_both_die_while_the_vmm_has_the_guest() {
    // So that the guest does not run yet when the commit can be seen here.
    let mut moved = Move::prepare(FAST, Duration::from_millis(200));
    let word = CommitWord::of(moved.guest.process.pid());
    let mut migration = moved.migrate(&[]);
    word.committed();
    // Neither has the time to replace the other.
    migration.freeze();
    kill_process(moved.keeper());
    migration.kill();
    assert!(moved.guest.process.runs(), "the VMM had left before");
    let mut resumed = moved.guest.resume(&["--report", &moved.report]);
    moved.vmm_leaves();
    // It has a keeper of its own, and so on.
    poll("a keeper", SOON, || (!processes_with(&moved.guest.keeper()).is_empty()).then_some(()));
    moved.until(20);
    resumed.kill();
    check_resumed(&finished(moved));
}
