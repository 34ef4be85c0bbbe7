//! The source's VMM hangs or is killed after the commit: the guest's memory is in the
//! fault server's hands, and nothing of the migration needs the VMM any more.

use super::commit_word::CommitWord;
use super::harness::{MIGRATION, check_report, read_report};
use super::rounds::{Round, rounds};
use nix::sys::signal::Signal;
use rand::Rng;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// What the emulated link's queue holds at most, in time.
const QUEUE: Duration = Duration::from_millis(20);
/// How often a VMM may be gone before it could be killed.
const REDRAWN_MAX: u32 = 20;

/// One kill.
struct Killed {
    /// The share of pages that had not left the source's host, in percent.
    unsent: u64,
    /// How often the VMM had ended by itself before.
    redrawn: u32,
}

/// Kills a VMM after the commit, or returns `None` if it was too late for that.
fn kill(round: &mut Round) -> Option<u64> {
    let mebibytes = [64, 64, 96, 128, 256][round.random.random_range(0..5)];
    let megabits = round.random.random_range(200..=400u64);
    let rtt = round.up_to(Duration::from_millis(4));
    let whole_transfer = Duration::from_millis(mebibytes * 8 * 1049 / megabits);
    // Half of them at once; the others hang first, for up to the whole transfer.
    let hangs = round.seed % 2 == 1;
    let after = if hangs { whole_transfer } else { Duration::from_millis(2) };
    let after = round.up_to(after);
    let before = round.up_to(Duration::from_millis(300));

    let mut guest = round.guest(mebibytes);
    let receiver = round.receiver(&[]);
    let (relay, ticket) = round.link(&receiver.ticket, megabits, rtt);
    let word = CommitWord::of(guest.process.pid());
    std::thread::sleep(before);
    let report = guest.path("report.json");
    let migration = guest.migrate_as(round.postcopy(), &ticket, &["--report", &report]);

    word.committed();
    let committed = Instant::now();
    if hangs {
        guest.process.freeze();
    }
    std::thread::sleep(after);
    guest.process.signal(Signal::SIGKILL);
    let killed = committed.elapsed();
    // What left the source's host is in the relay's counters or in its queue; no page is
    // smaller on the wire than in memory, since none of them is zero.
    let queued = megabits * 1_000_000 / 8 * QUEUE.as_millis() as u64 / 1000;
    let left = relay.stats().to_target.forwarded_bytes + queued;
    let pages = mebibytes << 20 >> 12;
    let unsent = pages.saturating_sub(left.div_ceil(PAGE)) * 100 / pages;

    // It may have ended by itself just before.
    let in_time = guest.process.wait_killed();
    migration.succeed(MIGRATION);
    let mut whole = read_report(&report);
    whole["verified"] = receiver.report()["verified"].clone();
    check_report(&whole);
    assert_eq!(whole["pages"]["total"], pages, "{whole:#}");
    let bytes = whole["wire_bytes"]["to_destination"].as_u64().expect("bytes sent");
    assert!(bytes > pages * PAGE * 9 / 10, "what is unsent cannot be told from bytes: {whole:#}");

    let outcome = if in_time { "killed" } else { "gone by itself, too late for a kill" };
    println!(
        "after_commit: seed {}: {mebibytes} MiB, {megabits} Mbit/s, VMM {outcome} {killed:?} \
         after the commit{}, {unsent} % of pages unsent; completed, verified",
        round.seed,
        if hangs { " in which it hung" } else { "" },
    );
    in_time.then_some(unsent)
}

#[test]
fn after_commit_the_vmm_is_not_needed() {
    let kills = rounds("after_commit", |round| {
        for redrawn in 0..REDRAWN_MAX {
            if let Some(unsent) = kill(round) {
                return Killed { unsent, redrawn };
            }
        }
        panic!("{REDRAWN_MAX} times the VMM was gone before it could be killed");
    });
    let early = kills.iter().filter(|kill| kill.unsent >= 90).count();
    let redrawn: u32 = kills.iter().map(|kill| kill.redrawn).sum();
    let of = kills.len();
    println!("after_commit: {of} kills, {early} with 90 % unsent or more; {redrawn} redrawn");
    // One round may be anything.
    assert!(of == 1 || early * 2 >= of, "only {early} of {of} kills had 90 % unsent");
}
