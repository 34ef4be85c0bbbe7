//! Descriptors and threads run out, on either side, before the commit and after it: a start or
//! a migration that fails with its reason, or one that goes on when there are some again.
//! Nothing hangs, nothing panics, no guest is lost.

use super::harness::{
    Ended, Guest, MIGRATION, POSTCOPY, Receiver, Running, SOON, poll, processes_with, read_report,
    restarted,
};
use super::keeper::{FAST, Move, check_resumed, kill_process, nothing_left};
use nix::sys::signal::Signal;
use postcopy::attach::client::{AttachError, Attached};
use postcopy::engine::operator::Request;
use postcopy::operator::client::ask;
use postcopy::operator::socket_path;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// How the kernel says that there is no descriptor, and no thread or process.
const NO_DESCRIPTOR: &str = "Too many open files";
const NO_THREAD: &str = "Resource temporarily unavailable";
/// So low a limit that nothing can be opened: every process here has these three.
const NOTHING: u64 = 3;

/// A shell that does `first` and becomes the program under test.
fn after(first: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &format!("{first} && exec \"$0\" \"$@\""), POSTCOPY]);
    command
}

/// A process with its limit on open descriptors.
struct Descriptors {
    pid: i32,
    before: u64,
}

impl Descriptors {
    /// Takes a running process all that it could still open.
    fn take(pid: i32) -> Self {
        let before = limit(pid, NOTHING);
        Self { pid, before }
    }

    fn give_back(self) {
        limit(self.pid, self.before);
    }
}

/// Sets the limit on open descriptors of `pid`, and returns what it was.
fn limit(pid: i32, most: u64) -> u64 {
    use nix::libc::{RLIMIT_NOFILE, prlimit, rlimit};
    let mut was = rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: null is no new limit; `was` is one, and exclusive.
    let asked = unsafe { prlimit(pid, RLIMIT_NOFILE, std::ptr::null(), &mut was) };
    let new = rlimit { rlim_cur: most, ..was };
    // SAFETY: `new` is a limit, and null takes no old one.
    let set = unsafe { prlimit(pid, RLIMIT_NOFILE, &new, std::ptr::null_mut()) };
    assert_eq!((asked, set), (0, 0), "{pid}: {}", std::io::Error::last_os_error());
    was.rlim_cur
}

/// A group of processes that may have so many threads between them.
struct Threads(PathBuf);

impl Threads {
    /// None, and says so, where this is not root or the kernel has no such controller.
    fn at_most(name: &str, most: impl ToString) -> Option<Self> {
        let folder = format!("/sys/fs/cgroup/pids/postcopy-test-{name}-{}", std::process::id());
        if let Err(error) = std::fs::create_dir(&folder) {
            eprintln!("SKIPPED: no group with a limit on threads at {folder}: {error}");
            return None;
        }
        let group = Self(folder.into());
        group.set(most);
        Some(group)
    }

    fn set(&self, most: impl ToString) {
        std::fs::write(self.0.join("pids.max"), most.to_string()).expect("our group");
    }

    /// The program under test, as one of the group.
    fn command(&self) -> Command {
        after(&format!("echo $$ > {}/cgroup.procs", self.0.display()))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Whoever was killed a moment ago may still be in it.
        let gone = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            std::fs::remove_dir(&self.0).is_ok()
        });
        if !gone {
            eprintln!("{} is left", self.0.display());
        }
    }
}

/// What a fault server that may lack something has come to; whether its guest has moved.
fn moved(ended: &Ended, lack: &str, least: usize) -> bool {
    match ended.code {
        Some(0) => true,
        Some(1 | 3) => {
            let words = ["this process could take only", lack];
            assert!(words.iter().any(|it| ended.stderr.contains(it)), "{least}: {ended:?}");
            false
        }
        _ => panic!("{least}: {ended:?}"),
    }
}

/// A fault server is started with more and more of something, until it has enough of it.
fn until_a_fault_server_has_enough(
    guest: Guest,
    host: &str,
    lack: &str,
    with: impl Fn(usize) -> Option<(Command, Option<Threads>)>,
) {
    for most in 4..80 {
        let receiver = Receiver::start_with(&["--public-host", host]);
        let Some((command, _group)) = with(most) else { return };
        let ended = guest.migrate_as(command, &receiver.ticket, &[]).wait(MIGRATION);
        nothing_left(&guest);
        if moved(&ended, lack, most) {
            assert_eq!(receiver.report()["verified"], true);
            return guest.has_left();
        }
        guest.runs_on();
    }
    panic!("never enough");
}

/// The same of a destination.
fn until_a_destination_has_enough(
    guest: Guest,
    lack: &str,
    with: impl Fn(usize) -> Option<(Command, Option<Threads>)>,
) {
    for most in 4..80 {
        let Some((command, _group)) = with(most) else { return };
        let receive = ["receive", "--quiet", "--verify-after", "300ms"];
        let mut receiver = Running::start_as(command, &receive);
        let Some(ticket) = receiver.line_if_any() else {
            assert!(!moved(&receiver.wait(SOON), lack, most), "moved without a ticket");
            continue;
        };
        let source = guest.migrate(&ticket, &[]).wait(MIGRATION);
        let ended = receiver.wait(MIGRATION);
        let here = moved(&ended, lack, most);
        match source.code {
            Some(0) if here => return guest.has_left(),
            // The guest is there; only nobody could be started to compare its memory.
            Some(0) => {
                assert!(ended.stderr.contains("cannot start the checker"), "{most}: {ended:?}");
                return guest.has_left();
            }
            Some(3) => assert!(!here, "{most}: {source:?} {ended:?}"),
            _ => panic!("{most}: {source:?} {ended:?}"),
        }
        guest.runs_on();
    }
    panic!("never enough");
}

fn descriptors(most: usize) -> Option<(Command, Option<Threads>)> {
    Some((after(&format!("ulimit -n {most}")), None))
}

#[test]
fn with_too_few_descriptors_a_fault_server_leaves_its_guest_where_it_runs() {
    // The system's resolver would only say that it knows no such name.
    until_a_fault_server_has_enough(Guest::start(), "127.0.0.1", NO_DESCRIPTOR, descriptors);
}

#[test]
fn with_too_few_descriptors_a_destination_takes_no_guest() {
    until_a_destination_has_enough(Guest::start(), NO_DESCRIPTOR, descriptors);
}

#[test]
fn with_too_few_threads_a_fault_server_leaves_its_guest_where_it_runs() {
    let with = |most: usize| {
        // Of its own: what has ended counts until somebody has waited for it.
        let group = Threads::at_most(&format!("source-{most}"), most - 3)?;
        Some((group.command(), Some(group)))
    };
    // So that a look-up, which takes a thread, is among what it does.
    until_a_fault_server_has_enough(Guest::start(), "localhost", NO_THREAD, with);
}

#[test]
fn with_too_few_threads_a_destination_takes_no_guest() {
    let with = |most: usize| {
        let group = Threads::at_most(&format!("destination-{most}"), most - 3)?;
        Some((group.command(), Some(group)))
    };
    until_a_destination_has_enough(Guest::start(), NO_THREAD, with);
}

#[test]
fn a_source_without_descriptors_connects_again_when_there_are_some() {
    let mut moved = Move::prepare(FAST, Duration::from_millis(2));
    let mut migration = moved.migrate(&[]);
    moved.vmm_leaves();
    moved.until(25);
    moved.relay.blackhole(true);
    let taken = Descriptors::take(migration.pid() as i32);
    migration.says(NO_DESCRIPTOR);
    moved.relay.blackhole(false);
    // Some attempts, over a link that stands.
    std::thread::sleep(Duration::from_secs(3));
    assert!(migration.runs());
    assert_eq!(migration.said_count(NO_DESCRIPTOR), 1, "{}", migration.stderr());
    taken.give_back();
    migration.succeed(MIGRATION);
    let report = read_report(&moved.report);
    assert_eq!(report["outcome"], "recovered", "{report:#}");
    assert!(report["outages"][0]["attempts"].as_u64() > Some(2), "{report:#}");
    moved.verified();
}

#[test]
fn a_source_that_gets_no_descriptors_gives_up_with_the_reason() {
    let mut moved = Move::prepare(FAST, Duration::from_millis(2));
    let migration = moved.migrate(&["--patience", "4s"]);
    moved.vmm_leaves();
    moved.until(25);
    moved.relay.blackhole(true);
    let _taken = Descriptors::take(migration.pid() as i32);
    std::thread::sleep(Duration::from_secs(2));
    moved.relay.blackhole(false);
    let ended = migration.wait(SOON);
    assert_eq!(ended.code, Some(4), "{ended:?}");
    let last = ended.stderr.lines().last().unwrap_or_default();
    assert!(last.contains("did not come back") && last.contains(NO_DESCRIPTOR), "{ended:?}");
    // All is there for whoever goes on.
    assert_eq!(processes_with(&moved.guest.keeper()).len(), 1);
    moved.guest.resume(&["--report", &moved.report]).succeed(MIGRATION);
    check_resumed(&moved.verified());
}

#[test]
fn a_destination_needs_no_descriptors_to_be_found_again() {
    let mut moved = Move::prepare(FAST, Duration::from_millis(2));
    let migration = moved.migrate(&[]);
    moved.vmm_leaves();
    moved.until(25);
    let taken = Descriptors::take(moved.receiver.process.pid() as i32);
    moved.relay.blackhole(true);
    std::thread::sleep(Duration::from_millis(2500));
    moved.relay.blackhole(false);
    let bytes = || moved.relay.stats().to_target.forwarded_bytes;
    let before = bytes();
    poll("pages over a new link", SOON, || (bytes() > before + (2 << 20)).then_some(()));
    // For its report.
    taken.give_back();
    migration.succeed(MIGRATION);
    assert_eq!(read_report(&moved.report)["outcome"], "recovered");
    moved.verified();
}

#[test]
fn a_keeper_without_descriptors_starts_a_fault_server_when_there_are_some() {
    let mut moved = Move::prepare(FAST, Duration::from_millis(2));
    let mut migration = moved.migrate(&[]);
    moved.vmm_leaves();
    moved.until(25);
    let taken = Descriptors::take(moved.keeper());
    migration.signal(Signal::SIGKILL);
    migration.says("no fault server can be started, which is tried again");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(migration.said_count("no fault server can be started"), 1);
    assert!(migration.said_so_far(NO_DESCRIPTOR), "{}", migration.stderr());
    assert!(restarted(&moved.guest.control()).is_empty());
    taken.give_back();
    migration.says("goes on with the session");
    poll("a report", MIGRATION, || Path::new(&moved.report).exists().then_some(()));
    check_resumed(&moved.verified());
}

#[test]
fn without_a_process_to_be_had_a_keeper_and_a_fault_server_try_again_to_start_each_other() {
    let Some(group) = Threads::at_most("both", "max") else { return };
    let mut moved = Move::prepare(10, Duration::from_millis(2));
    let report = ["--report", &moved.report];
    let mut migration = moved.guest.migrate_as(group.command(), &moved.ticket, &report);
    moved.vmm_leaves();
    moved.until(5);
    // None can be made, whoever ends.
    group.set(0);
    let first = moved.keeper();
    kill_process(first);
    migration.says("no other keeper can be started, which is tried again");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(migration.said_count("no other keeper"), 1);
    assert!(migration.runs() && migration.said_so_far(NO_THREAD), "{}", migration.stderr());
    group.set("max");
    poll("another keeper", SOON, || {
        let refused = Attached::connect(moved.guest.keeper());
        matches!(refused, Err(AttachError::Refused { .. })).then_some(())
    });
    // And the other way round.
    group.set(0);
    migration.signal(Signal::SIGKILL);
    migration.says("no fault server can be started, which is tried again");
    std::thread::sleep(Duration::from_secs(2));
    assert!(restarted(&moved.guest.control()).is_empty());
    group.set("max");
    migration.says("goes on with the session");
    poll("a report", MIGRATION, || Path::new(&moved.report).exists().then_some(()));
    check_resumed(&moved.verified());
}

/// The time that the threads called `name` of a process have run for so far.
fn run_time(pid: u32, name: &str) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").flatten();
    let of = |task: PathBuf| -> Option<u64> {
        let comm = std::fs::read_to_string(task.join("comm")).ok()?;
        // Its first number is the time on a processor, in nanoseconds.
        let stat = std::fs::read_to_string(task.join("schedstat")).ok()?;
        (comm.trim() == name).then(|| stat.split(' ').next()?.parse().ok()).flatten()
    };
    let times: Vec<u64> = tasks.filter_map(|task| of(task.path())).collect();
    assert!(!times.is_empty(), "{pid} has no thread {name}");
    Duration::from_nanos(times.iter().sum())
}

/// Clients come to `socket`, at which the thread `name` of a process waits that has no
/// descriptors for them: it must not spin meanwhile.
fn clients_wait(process: &Running, name: &str, socket: &Path) {
    let taken = Descriptors::take(process.pid() as i32);
    let clients: Vec<_> = (0..3).map(|_| UnixStream::connect(socket).expect("a queue")).collect();
    let (began, before) = (Instant::now(), run_time(process.pid(), name));
    std::thread::sleep(Duration::from_secs(2));
    // Threads without a name have that of the first one, and those that have ended are gone.
    let ran = run_time(process.pid(), name).saturating_sub(before);
    let passed = began.elapsed();
    assert!(ran < passed / 10, "it ran for {ran:?} of {passed:?}");
    assert!(process.said_count("they cannot be taken in") <= 1, "{}", process.stderr());
    drop(clients);
    taken.give_back();
}

#[test]
fn clients_of_a_vmm_without_descriptors_wait_and_nobody_spins() {
    let guest = Guest::start();
    clients_wait(&guest.process, "postcopy", guest.control().as_ref());
    guest.runs_on();
    guest.migrates_to(Receiver::start());
}

#[test]
fn clients_of_an_operator_socket_without_descriptors_wait_and_nobody_spins() {
    let mut moved = Move::prepare(10, Duration::from_millis(2));
    let migration = moved.migrate(&[]);
    moved.vmm_leaves();
    let at = socket_path(moved.guest.control().as_ref());
    let answers = || ask(&at, &Request::Status).ok().map(drop);
    poll("an operator socket", SOON, answers);
    clients_wait(&migration, "operator", &at);
    poll("an answer", SOON, answers);
    drop(migration);
}
