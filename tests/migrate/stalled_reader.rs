//! Standard output and error that are full, and whose reader has stopped reading without going
//! away: no program waits for it, neither in the middle of a migration nor at its end.

use super::harness::{
    Guest, MIGRATION, POSTCOPY, Receiver, Running, SOON, check_report, folder, permit, poll,
    read_report,
};
use super::keeper::{FAST, Move, check_resumed, nothing_left};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use postcopy::attach::client::Attached;
use std::fs::OpenOptions;
use std::io::{ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A pipe of a page whose two ends stay open.
struct Pipe {
    read: PipeReader,
    write: PipeWriter,
}

impl Pipe {
    fn new() -> Self {
        let (read, write) = std::io::pipe().expect("a pipe");
        fcntl(&write, FcntlArg::F_SETPIPE_SZ(4096)).expect("a small pipe");
        Self { read, write }
    }

    fn full() -> Self {
        let pipe = Self::new();
        pipe.fill();
        pipe
    }

    /// Writes until nothing fits any more.
    fn fill(&self) {
        // Opened once more: that it does not block is nothing to the process that has it.
        let mut file = OpenOptions::new()
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(format!("/proc/self/fd/{}", self.write.as_raw_fd()))
            .expect("the pipe's other name");
        loop {
            match file.write(b"x") {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("a pipe cannot be filled: {error}"),
            }
        }
    }

    /// The first line in it.
    fn line(&mut self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            self.read.read_exact(&mut byte).expect("a line");
            line.push(byte[0]);
        }
        String::from_utf8(line).expect("text").trim_end().to_owned()
    }

    fn to_write(&self) -> Stdio {
        self.write.try_clone().expect("a descriptor").into()
    }
}

/// Full from the beginning, and never read.
struct Stalled([Pipe; 2]);

impl Stalled {
    fn new() -> Self {
        Self([Pipe::full(), Pipe::full()])
    }

    /// Starts `postcopy`, which has more to say than fits anywhere.
    fn start(&self, arguments: &[&str]) -> Running {
        let outputs = self.0.each_ref().map(Pipe::to_write);
        let arguments = [&["--log", "trace"], arguments].concat();
        Running::start_into(Command::new(POSTCOPY), &arguments, outputs)
    }

    fn migrate(&self, guest: &Guest, ticket: &str, report: &str) -> Running {
        let control = guest.control();
        let migrate = ["migrate", "--control", &control, "--ticket", ticket];
        self.start(&[&migrate, &["--report", report][..]].concat())
    }
}

#[test]
fn a_fault_server_whose_outputs_nobody_reads_moves_its_guest_and_ends() {
    let guest = Guest::start();
    let receiver = Receiver::start();
    let (outputs, report) = (Stalled::new(), guest.path("report.json"));
    outputs.migrate(&guest, &receiver.ticket, &report).succeed(MIGRATION);
    let mut source = read_report(&report);
    nothing_left(&guest);
    guest.has_left();
    source["verified"] = receiver.report()["verified"].clone();
    check_report(&source);
}

#[test]
fn a_destination_whose_outputs_nobody_reads_takes_its_guest_in_and_ends() {
    let guest = Guest::start();
    let (mut stdout, stderr) = (Pipe::new(), Pipe::full());
    let report = guest.path("destination.json");
    let receive = ["--log", "trace", "receive", "--verify-after", "300ms", "--report", &report];
    let outputs = [stdout.to_write(), stderr.to_write()];
    let process = Running::start_into(Command::new(POSTCOPY), &receive, outputs);
    let ticket = stdout.line();
    stdout.fill();
    let at_source = guest.path("report.json");
    guest.migrate(&ticket, &["--report", &at_source]).succeed(MIGRATION);
    process.succeed(MIGRATION);
    let mut source = read_report(&at_source);
    source["verified"] = read_report(&report)["verified"].clone();
    check_report(&source);
    guest.has_left();
}

#[test]
fn a_vmm_whose_outputs_nobody_reads_gives_its_guest_away_and_ends() {
    let _permit = permit();
    let (folder, outputs) = (folder(), Stalled::new());
    let path = |name: &str| folder.path().join(name).to_str().expect("a plain name").to_owned();
    let (control, report) = (path("control"), path("report.json"));
    let run = ["run", "--control", &control, "--guest", "process", "--memory", "16M"];
    let process = outputs.start(&run);
    poll("a guest that can be attached to", SOON, || Attached::connect(&control).ok());
    let receiver = Receiver::start();
    let migrate = ["migrate", "--control", &control, "--no-keeper", "--quiet"];
    let to = ["--ticket", &receiver.ticket, "--report", &report];
    Running::start(&[&migrate[..], &to].concat()).succeed(MIGRATION);
    process.succeed(SOON);
    let mut source = read_report(&report);
    source["verified"] = receiver.report()["verified"].clone();
    check_report(&source);
}

#[test]
fn a_keeper_whose_words_nobody_reads_starts_another_fault_server() {
    let mut moved = Move::prepare(FAST, Duration::from_millis(2));
    let outputs = Stalled::new();
    let mut migration = outputs.migrate(&moved.guest, &moved.ticket, &moved.report);
    moved.vmm_leaves();
    moved.until(25);
    migration.kill();
    poll("a report", MIGRATION, || Path::new(&moved.report).exists().then_some(()));
    check_resumed(&moved.verified());
}

#[test]
fn a_demonstration_that_nobody_watches_comes_to_its_end() {
    let _permit = permit();
    let (folder, outputs) = (folder(), Stalled::new());
    let report = folder.path().join("report.json");
    let report = report.to_str().expect("a plain name");
    let guest = ["--guest", "process", "--memory", "16M", "--think-ns", "2000"];
    let demo = outputs.start(&[&["demo", "--report", report], &guest[..]].concat());
    demo.succeed(MIGRATION);
    check_report(&read_report(report));
}

#[test]
fn an_error_that_nobody_reads_is_an_exit_code_all_the_same() {
    let (folder, outputs) = (folder(), Stalled::new());
    let control = folder.path().join("nobody");
    let control = control.to_str().expect("a plain name");
    let began = Instant::now();
    let mut process = outputs.start(&["migrate", "--control", control, "--resume"]);
    assert_eq!(process.wait_code(), Some(1));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn what_was_said_while_nobody_read_is_there_for_whoever_reads_again() {
    let _permit = permit();
    let (folder, mut outputs) = (folder(), Stalled::new());
    let control = folder.path().join("control");
    let control = control.to_str().expect("a plain name");
    let run = ["run", "--control", control, "--guest", "process", "--memory", "16M"];
    let mut process = outputs.start(&run);
    poll("a guest that can be attached to", SOON, || Attached::connect(control).ok());
    assert!(process.runs());
    let line = outputs.0[0].line();
    assert!(line.trim_start_matches('x').starts_with("process guest of 16 MiB runs"), "{line}");
    process.kill();
}
