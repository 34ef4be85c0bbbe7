//! Whoever dies after the commit, the guest's memory is there until the destination has
//! it: in the fault server, and in a keeper for the fault server that comes after it.
//!
//! The links are slow, so that there is a middle to do things in; what has left the source
//! by then is counted by the link and not by any of the processes.

use super::commit_word::{CommitWord, Decision};
use super::fakes::FakeDestination;
use super::harness::{
    Guest, MIGRATION, Receiver, Running, SOON, check_report, poll, processes_with, read_report,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use postcopy::fault_server::keeper;
use postcopy::fault_server::record::RecordFile;
use postcopy::proto::message::{self, ToDestination, ToSource};
use postcopy::transport::Ticket;
use postcopy::transport::relay::{Relay, RelayConfig, targets};
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::time::{Duration, Instant};

/// Of the guests here, none of whose pages is zero.
const MEMORY: u64 = 32 << 20;
const PAGES: u64 = MEMORY / 4096;
/// All of the memory takes 3.5 s.
pub const FAST: u64 = 80;
/// 28 s.
pub const SLOW: u64 = 10;

/// A guest, where it goes, and the link in between.
pub struct Move {
    pub guest: Guest,
    pub receiver: Receiver,
    pub relay: Relay,
    /// What the link's queue holds at most: 20 ms.
    queued: u64,
    pub ticket: String,
    pub report: String,
}

impl Move {
    pub fn prepare(megabits: u64, rtt: Duration) -> Self {
        let bandwidth = megabits * 1_000_000;
        let guest =
            Guest::start_with(&["--guest", "process", "--memory", "32M", "--think-ns", "20000"]);
        let receiver = Receiver::start();
        let ticket: Ticket = receiver.ticket.parse().expect("a ticket");
        let config = RelayConfig { bandwidth_bps: Some(bandwidth), rtt, ..RelayConfig::default() };
        let targets = targets(IpAddr::V4(Ipv4Addr::LOCALHOST), &ticket);
        let relay = Relay::spawn(config, &targets).expect("a relay");
        let ticket = relay.redirect(&ticket).expect("as many ports").to_string();
        let report = guest.path("report.json");
        Self { guest, receiver, relay, queued: bandwidth / 8 / 50, ticket, report }
    }

    pub fn migrate(&self, arguments: &[&str]) -> Running {
        let report = ["--report", &self.report];
        self.guest.migrate(&self.ticket, &[&report, arguments].concat())
    }

    /// The process that keeps the guest's memory.
    pub fn keeper(&self) -> i32 {
        let found = poll("a keeper", SOON, || {
            let keepers = processes_with(&self.guest.keeper());
            (!keepers.is_empty()).then_some(keepers)
        });
        assert_eq!(found.len(), 1, "more than one keeper");
        found[0]
    }

    /// The most bytes of pages that can have left the source's host.
    pub fn left(&self) -> u64 {
        self.relay.stats().to_target.forwarded_bytes + self.queued
    }

    /// Waits until so many percent of the memory have come to the destination's host.
    pub fn until(&self, percent: u64) {
        poll("pages on the link", SOON, || {
            let bytes = self.relay.stats().to_target.forwarded_bytes;
            (bytes > MEMORY * percent / 100).then_some(())
        });
        assert!(self.left() < MEMORY * 9 / 10, "there is no middle left");
    }

    /// Waits until the VMM has ended well.
    pub fn vmm_leaves(&mut self) {
        assert_eq!(self.guest.process.wait_code(), Some(0));
    }

    /// The source's report, once the destination has verified every page and no process and
    /// no socket is left.
    pub fn verified(mut self) -> Value {
        if self.guest.process.runs() {
            self.vmm_leaves();
        }
        nothing_left(&self.guest);
        let mut whole = read_report(&self.report);
        let destination = self.receiver.report();
        assert_eq!(destination["verified"], true, "{destination:#}");
        whole["verified"] = destination["verified"].clone();
        whole
    }
}

/// Waits until no keeper is left, and no socket of anybody who has ended well.
pub fn nothing_left(guest: &Guest) {
    poll("the keeper's end", SOON, || processes_with(&guest.keeper()).is_empty().then_some(()));
    let keeper = guest.keeper();
    assert!(!std::path::Path::new(&keeper).exists(), "{keeper} is left");
}

pub fn kill_process(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it runs");
}

/// What must be true of a report when the fault server has lived through it all. (On a
/// busy machine the emulated link may be silent for so long that it counts as lost.)
pub fn check_moved(report: &Value) {
    if report["outcome"] != "recovered" {
        return check_report(report);
    }
    assert!(report["link"]["epochs"].as_u64() >= Some(2), "{report:#}");
    assert_eq!(report["verified"], true, "{report:#}");
    assert_eq!(report["pages"]["placed_twice"], 0, "{report:#}");
}

/// What a report of a session that was gone on with may say, and what it cannot know.
pub fn check_resumed(report: &Value) {
    assert_eq!(report["outcome"], "recovered", "{report:#}");
    assert_eq!(report["verified"], true, "{report:#}");
    assert!(report["link"]["epochs"].as_u64().is_some_and(|epochs| epochs >= 2), "{report:#}");
    let unknown = [
        "/downtime_us",
        "/switchover_bytes",
        "/total_us",
        "/phases_us/handshake",
        "/downtime_parts_us/pause",
        "/pages/resent_after_link_loss",
        "/pages/sent_twice",
        "/cpu_us/source",
    ];
    for field in unknown {
        assert_eq!(report.pointer(field), None, "nobody knows {field}: {report:#}");
    }
    // Where each page came from the destination knows.
    let count = |name: &str| report["pages"][name].as_u64().expect("a count of pages");
    let origins = ["seeded", "demanded", "pushed", "drained", "zero", "hole"];
    let sum: u64 = origins.iter().map(|origin| count(origin)).sum();
    assert!(sum >= PAGES && count("total") == PAGES, "{report:#}");
    assert_eq!(count("placed_twice"), 0, "{report:#}");
}

#[test]
fn the_vmm_leaves_as_soon_as_the_guest_runs_elsewhere() {
    for keeper in [&[][..], &["--no-keeper"]] {
        let mut moved = Move::prepare(FAST, Duration::ZERO);
        let migration = moved.migrate(keeper);
        moved.vmm_leaves();
        let left = moved.left();
        assert!(left < MEMORY / 10, "{left} of {MEMORY} bytes had left");
        let kept = processes_with(&moved.guest.keeper()).len();
        assert_eq!(kept, usize::from(keeper.is_empty()));
        migration.succeed(MIGRATION);
        check_moved(&moved.verified());
    }
}

#[test]
fn a_fault_server_killed_in_the_middle_is_replaced_by_another() {
    let mut moved = Move::prepare(FAST, Duration::from_millis(2));
    let mut migration = moved.migrate(&["--no-supervise"]);
    moved.vmm_leaves();
    moved.until(25);
    migration.kill();
    // The keeper is all that is left; a new migration would be another guest's.
    let again = moved.guest.migrate(&moved.ticket, &[]).wait(SOON);
    again.failed_with(1, &["was given to a destination", "--resume"]);

    // And a second time.
    let mut resumed = moved.guest.resume(&[]);
    moved.until(50);
    resumed.kill();
    // The epoch was kept before the destination could hear of it.
    let mut keeper = keeper::connect(moved.guest.keeper().as_ref()).expect("a keeper");
    let record = RecordFile::open(keeper.record().expect("a record")).expect("a whole record");
    assert!(record.record().last_epoch >= 1 && record.record().state_left, "{record:?}");
    drop(keeper);
    moved.guest.resume(&["--report", &moved.report]).succeed(MIGRATION);
    let report = moved.verified();
    check_resumed(&report);
    assert!(report["link"]["epochs"].as_u64() >= Some(3), "{report:#}");
}

#[test]
fn a_keeper_killed_in_the_middle_costs_a_warning() {
    let mut moved = Move::prepare(FAST, Duration::ZERO);
    let mut migration = moved.migrate(&[]);
    moved.vmm_leaves();
    kill_process(moved.keeper());
    migration.says("the keeper has ended");
    assert!(moved.left() < MEMORY * 9 / 10, "it was told too late");
    migration.succeed(MIGRATION);
    check_moved(&moved.verified());
}

#[test]
fn a_keeper_holds_nothing_of_whoever_started_it() {
    // A pipe that children inherit, as a supervisor's is.
    let (_reader, writer) = nix::unistd::pipe().expect("a pipe");
    let pipe = std::fs::read_link(format!("/proc/self/fd/{}", writer.as_raw_fd())).expect("ours");
    let holds = |pid: i32| {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("a process of ours");
        open.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|file| file == pipe))
    };
    let mut moved = Move::prepare(FAST, Duration::ZERO);
    let migration = moved.migrate(&[]);
    moved.vmm_leaves();
    let keeper = moved.keeper();
    assert!(holds(migration.pid() as i32), "its starter does not have it, either");
    assert!(!holds(keeper));
    let folder = std::fs::read_link(format!("/proc/{keeper}/cwd")).expect("it is there");
    assert_eq!(folder, std::path::Path::new("/"));
    migration.succeed(MIGRATION);
    check_moved(&moved.verified());
}

#[test]
fn a_vmm_that_hangs_after_the_commit_holds_nobody_up() {
    // So that the guest does not run yet when the commit can be seen here.
    let moved = Move::prepare(FAST, Duration::from_millis(200));
    let word = CommitWord::of(moved.guest.process.pid());
    let migration = moved.migrate(&[]);
    word.committed();
    moved.guest.process.signal(Signal::SIGSTOP);
    let began = Instant::now();
    migration.succeed(MIGRATION);
    // An answer of the VMM is waited for 30 s elsewhere.
    assert!(began.elapsed() < Duration::from_secs(20), "it took {:?}", began.elapsed());
    assert_eq!(moved.receiver.report()["verified"], true);
    moved.guest.process.signal(Signal::SIGCONT);
}

#[test]
fn vmm_and_fault_server_may_both_die_after_the_commit() {
    // So that the guest does not run yet when the commit can be seen here.
    let mut moved = Move::prepare(FAST, Duration::from_millis(200));
    let word = CommitWord::of(moved.guest.process.pid());
    let mut migration = moved.migrate(&["--no-supervise"]);
    word.committed();
    moved.guest.process.signal(Signal::SIGKILL);
    assert!(moved.guest.process.wait_killed(), "the VMM had left before");
    moved.until(20);
    migration.kill();
    moved.guest.resume(&["--report", &moved.report]).succeed(MIGRATION);
    check_resumed(&moved.verified());
}

#[test]
fn a_vmm_whose_fault_server_died_at_the_commit_is_let_go_by_the_next() {
    let mut moved = Move::prepare(FAST, Duration::from_millis(200));
    let word = CommitWord::of(moved.guest.process.pid());
    let mut migration = moved.migrate(&["--no-supervise"]);
    word.committed();
    migration.kill();
    assert!(moved.guest.process.runs(), "the VMM had left before");
    assert!(!moved.guest.attach().status().expect("a status").running);
    let again = moved.guest.migrate(&moved.ticket, &[]).wait(SOON);
    again.failed_with(1, &["was given to a destination", "--resume"]);
    let resumed = moved.guest.resume(&["--report", &moved.report]);
    moved.vmm_leaves();
    assert!(moved.left() < MEMORY * 9 / 10, "it was told too late");
    resumed.succeed(MIGRATION);
    check_resumed(&moved.verified());
}

#[test]
fn a_fault_server_killed_before_the_state_left_leaves_nothing_behind() {
    let guest = Guest::start();
    let mut destination = FakeDestination::listen();
    let mut migration = guest.migrate(&destination.ticket, &[]);
    destination.proposed();
    assert_eq!(processes_with(&guest.keeper()).len(), 1);
    migration.kill();
    guest.runs_on();
    nothing_left(&guest);
    let ended = guest.resume(&[]).wait(SOON);
    ended.failed_with(1, &["there is nothing to resume: the guest runs in its VMM"]);
    guest.migrates_to(Receiver::start());
}

#[test]
fn a_destination_in_doubt_is_told_by_the_next_fault_server() {
    let guest = Guest::start();
    let mut destination = FakeDestination::listen();
    let mut migration = guest.migrate(&destination.ticket, &["--no-supervise"]);
    destination.takes_state();
    migration.kill();
    guest.runs_on();
    let resumed = guest.resume(&[]);
    let first = destination.comes();
    let reattach = matches!(&first, ToDestination::Reattach { epoch: 1, committed: None, .. });
    assert!(reattach, "{first:?}");
    let second = destination.hear();
    assert!(matches!(second, Ok(ToDestination::Abort { .. })), "{second:?}");
    destination.say(&ToSource::Abort { reason: "so be it".into() });
    let why = ["the fault-server died before the commit", "the guest runs on here"];
    resumed.wait(SOON).failed_with(3, &why);
    nothing_left(&guest);
    guest.runs_on();
    guest.migrates_to(Receiver::start());
}

/// The keeper of an aborted session stays for a while, and is not in the way.
#[test]
fn a_guest_whose_fault_server_died_in_the_blackout_is_migrated_at_once() {
    let guest = Guest::start();
    let mut destination = FakeDestination::listen();
    let mut migration = guest.migrate(&destination.ticket, &[]);
    let word = CommitWord::of(guest.process.pid());
    destination.takes_state();
    migration.kill();
    poll("the VMM's decision", SOON, || (word.decision() == Decision::Aborted).then_some(()));
    let receiver = Receiver::start();
    let (control, keeper) = (guest.control(), guest.keeper());
    guest.migrates_to(receiver);
    assert!(processes_with(&keeper).is_empty());
    assert!(![control, keeper].iter().any(|socket| std::path::Path::new(socket).exists()));
}

/// The keeper goes when the guest has been resumed, and not when its fault server has made
/// an end of it with the destination.
#[test]
fn a_guest_is_migrated_again_while_its_last_destination_is_still_looked_for() {
    let guest = Guest::start();
    let mut destination = FakeDestination::listen();
    let mut migration = guest.migrate(&destination.ticket, &[]);
    destination.takes_state();
    destination.vanish();
    guest.runs_on();
    nothing_left(&guest);
    assert!(migration.runs(), "it is no longer looked for");
    guest.migrates_to(Receiver::start());
    let why = ["the link was lost", "the guest runs on here"];
    migration.wait(SOON).failed_with(3, &why);
}

#[test]
fn a_vmm_that_dies_before_the_commit_takes_its_guest_with_it_and_nobody_says_else() {
    let mut guest = Guest::start();
    let mut destination = FakeDestination::listen();
    let migration = guest.migrate(&destination.ticket, &[]);
    destination.proposed();
    guest.process.kill();
    destination.say(&ToSource::Accept { version: message::PROTOCOL_VERSION });
    let ended = migration.wait(SOON);
    assert_eq!(ended.code, Some(4), "{ended:?}");
    for said in ["the conversation with the VMM broke at Pause", "its VMM is gone"] {
        assert!(ended.stderr.contains(said), "nothing of {said:?} in {ended:?}");
    }
    assert!(!ended.stderr.contains("runs on here"), "{ended:?}");
    nothing_left(&guest);
    let nothing = guest.resume(&[]).wait(SOON);
    nothing.failed_with(1, &["there is nothing to resume: there is neither a VMM nor a keeper"]);
}

#[test]
fn without_a_keeper_the_guest_is_not_paused() {
    let guest = Guest::start();
    let precious = "not a socket";
    std::fs::write(guest.keeper(), precious).expect("our folder");
    let receiver = Receiver::start();
    let ended = guest.migrate(&receiver.ticket, &[]).wait(SOON);
    ended.failed_with(1, &["no keeper can be started", "not paused", "is not a socket"]);
    guest.runs_on();
    assert_eq!(std::fs::read_to_string(guest.keeper()).expect("it is there"), precious);
    guest.migrate(&receiver.ticket, &["--no-keeper"]).succeed(MIGRATION);
    assert_eq!(receiver.report()["verified"], true);
}

#[test]
fn a_keeper_is_its_users_own_and_is_let_go_by_an_operator() {
    let mut moved = Move::prepare(SLOW, Duration::ZERO);
    let mut migration = moved.migrate(&["--no-supervise"]);
    moved.vmm_leaves();
    let keeper = moved.keeper();
    let file = std::fs::metadata(moved.guest.keeper()).expect("a socket");
    let mode = std::os::unix::fs::PermissionsExt::mode(&file.permissions());
    assert!(file.file_type().is_socket() && mode & 0o7777 == 0o600, "{mode:o}");
    // No terminal's or shell's signal reaches it, and it writes nowhere.
    let stat = std::fs::read_to_string(format!("/proc/{keeper}/stat")).expect("it runs");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("a name").split_whitespace().collect();
    let (group, session, terminal) = (fields[2], fields[3], fields[4]);
    assert_eq!([group, session, terminal], [&*keeper.to_string(), &*keeper.to_string(), "0"]);
    for stream in 0..3 {
        let target = std::fs::read_link(format!("/proc/{keeper}/fd/{stream}")).expect("a stream");
        assert_eq!(target.to_str(), Some("/dev/null"));
    }
    // It has the guest's memory and does not map it.
    let maps = std::fs::read_to_string(format!("/proc/{keeper}/maps")).expect("it runs");
    assert!(!maps.contains("guest-memory") && maps.contains("commit-word"), "{maps}");

    let discard = |guest: &Guest| {
        Running::start(&["migrate", "--control", &guest.control(), "--discard"]).wait(SOON)
    };
    // While one fault server is at work there is no room for a second.
    discard(&moved.guest).failed_with(1, &["a fault server is attached"]);
    moved.guest.resume(&[]).wait(SOON).failed_with(1, &["a fault server is at work"]);
    assert!(migration.runs());
    migration.kill();
    let ended = discard(&moved.guest);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    nothing_left(&moved.guest);
    discard(&moved.guest).failed_with(1, &["there is no keeper"]);
    moved.receiver.process.kill();
}
