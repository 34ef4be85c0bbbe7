//! Either process killed at each point of a migration: the guest runs on, or is
//! given away, and never both; and its memory stays.
//!
//! The process to be killed is this test binary again, running one of the two
//! ignored tests below. It says when it has reached its point and then waits to be
//! killed, so nothing depends on time.

use super::*;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

const POINT: &str = "POSTCOPY_TEST_ATTACH_POINT";
const SOCKET: &str = "POSTCOPY_TEST_ATTACH_SOCKET";

struct Victim {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Victim {
    fn start(test: &str, path: &std::path::Path, point: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "--test-threads=1"])
            .arg(format!("attach::tests::killed::{test}"))
            .env(POINT, point)
            .env(SOCKET, path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Waits until it has reached its point.
    fn reached(mut self) -> Self {
        // libtest writes the test's name before it without a line feed.
        let found = self.lines.find(|line| line.as_ref().unwrap().ends_with("reached"));
        assert!(found.is_some(), "the child ended before it reached its point");
        self
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Says that the point is reached and waits for the end: the parent kills this
/// process, or dies itself, which closes the pipe.
fn reached() -> ! {
    println!("reached");
    let _ = std::io::stdin().read_line(&mut String::new());
    std::process::exit(3);
}

fn told() -> Option<(String, PathBuf)> {
    let told = std::env::var(POINT).ok().zip(std::env::var_os(SOCKET).map(PathBuf::from));
    if told.is_none() {
        println!("skipped: does something only as a child of the tests in this file");
    }
    told
}

#[test]
#[ignore = "the fault-server's half, started and killed by the tests in this file"]
fn client() {
    let Some((point, path)) = told() else { return };
    let mut attached = Attached::connect(path).unwrap();
    if point == "attached" {
        reached();
    }
    if point == "tracking" {
        attached.start_dirty_log().unwrap();
        reached();
    }
    attached.pause().unwrap();
    if point == "paused" {
        reached();
    }
    let _proof = attached.word.commit().unwrap();
    reached();
}

#[test]
#[ignore = "the VMM's half, started and killed by the tests in this file"]
fn vmm() {
    let Some((_, path)) = told() else { return };
    let server = Server::bind(path).unwrap();
    let (events, _events) = channel();
    std::thread::spawn(move || server.serve(&mut MockVm::new(events)).unwrap());
    reached();
}

#[test]
fn a_client_killed_before_it_commits_leaves_a_running_guest() {
    let served = Served::new();
    Victim::start("client", &served.path, "attached").reached().kill();
    let mut next = served.attach();
    assert!(next.status().unwrap().running);
    drop(next);
    Victim::start("client", &served.path, "paused").reached().kill();
    served.expect(Event::Paused);
    served.expect(Event::Resumed);
    assert_eq!(served.stop().0, []);
}

#[test]
fn a_client_killed_while_it_tracks_writes_leaves_a_guest_that_is_not_tracked() {
    let writes = dirty::Writes::tracking();
    let served = Served::with(Patience::default(), |vm| vm.writes = writes.clone());
    let victim = Victim::start("client", &served.path, "tracking").reached();
    served.expect(Event::LogStarted);
    assert!(writes.on());
    victim.kill();
    served.expect(Event::LogStopped);
    assert!(!writes.on());
    assert_eq!(served.stop().0, []);
}

#[test]
fn a_client_killed_after_it_committed_leaves_a_paused_guest_for_its_successor() {
    let served = Served::new();
    Victim::start("client", &served.path, "committed").reached().kill();
    served.expect(Event::Paused);
    // The next client is answered only after the server has dealt with the last one's
    // death: whatever it would have done to the guest, it has done.
    let mut next = served.attach();
    assert!(!next.status().unwrap().running);
    assert_eq!(next.word.decision(), Decision::Committed);
    assert_eq!(next.pause().unwrap().state, b"state", "the same capture, for the destination");
    let proof = next.word.commit().unwrap();
    // Killed again, and again it does not run.
    drop(next);
    let mut last = served.attach();
    assert!(!last.status().unwrap().running);
    last.committed(&proof).unwrap();
    let (end, _) = served.thread.join().unwrap();
    assert_eq!(end.unwrap(), ServeEnd::Released);
    let events: Vec<_> = served.events.try_iter().collect();
    assert_eq!(events, [Event::Released], "never resumed");
}

#[test]
fn the_memory_and_the_word_outlive_a_vmm_that_is_killed() {
    let _watchdog = Watchdog::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("attach");
    let vmm = Victim::start("vmm", &path, "serving").reached();
    let mut attached = Attached::connect(&path).unwrap();
    assert_eq!(attached.guest.pid, vmm.child.id());
    attached.pause().unwrap();
    let proof = attached.word.commit().unwrap();
    vmm.kill();
    assert!(attached.committed(&proof).is_err());
    assert_eq!(attached.word.decision(), Decision::Committed);
    for page in 0..PAGES {
        let mut content = [0; PAGE_SIZE];
        attached.ram.read_run(PageRun::single(PageIndex::new(page)), &mut content);
        assert_eq!(content, [page as u8 + 1; PAGE_SIZE]);
    }
    // And the next VMM may listen at the same path.
    let vmm = Victim::start("vmm", &path, "serving").reached();
    assert!(Attached::connect(&path).unwrap().status().unwrap().running);
    vmm.kill();
}
