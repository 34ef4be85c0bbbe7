//! One cell of the matrix: a small guest is migrated by real processes, one of which comes
//! upon a failure at one point; then it is looked for, and every page of it compared.

use super::arranged::{self, Arranged};
use super::harness::{Guest, MIGRATION, POSTCOPY, Receiver, SOON, TimeLimit, check_report};
use super::harness::{poll, processes_with, read_report};
use super::table::{Expected, KINDS, Place};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use postcopy::attach::client::Attached;
use postcopy::failpoint::{Point, Process};
use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// For how long a stalled process is stopped: longer than a link may be silent.
const STALL: Duration = Duration::from_millis(2500);
/// Shorter than in life, but longer than a stall or a cut.
const LIMITS: &str = "handshake=4000 restore=6000 recovery=8000";
/// A cell that is not over by then is killed.
const CELL_MAX: Duration = Duration::from_secs(90);
/// How long a guest that runs nowhere may take to run again.
const RUNS_AGAIN: Duration = Duration::from_secs(4);
/// By this variable a cell's processes are known, whoever their parent is.
const MARK: &str = "POSTCOPY_FAILPOINT_CELL";
/// Some pages of it are zero.
const GUEST: [&str; 8] =
    ["--guest", "process", "--memory", "16M", "--think-ns", "2000", "--zero", "20"];

/// A point, a kind of failure, and what must come of it.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Where.
    pub point: Point,
    /// What.
    pub kind: &'static str,
    /// What comes of it.
    pub expected: Expected,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.point.name, self.kind)
    }
}

/// The processes of one cell, and what they share.
struct Stage {
    mark: String,
    log: PathBuf,
    /// What goes wrong: the point, and what is arranged for it.
    points: Vec<Arranged>,
    over: Arc<AtomicBool>,
}

/// How the panic of a cell begins whose migration passed without its point.
pub const NOT_REACHED: &str = "the point was not reached";

impl Cell {
    /// Runs it; panics if it comes to something that the table does not say.
    pub fn run(&self) -> String {
        let folder = super::harness::folder();
        let stage = Stage::new(self, folder.path());
        let found = self.play(&stage);
        stage.left_nothing_behind();
        found
    }

    fn play(&self, stage: &Stage) -> String {
        let mut guest = Guest::start_unlimited(stage.command(Process::Vmm), &GUEST);
        let debug = ["--log", "warn,postcopy::engine=debug"];
        let mut receiver = Receiver::start_as(stage.command(Process::Destination), &debug);
        let report = guest.path("report.json");
        // What dies is started again here, so that its exit code is known.
        let arguments = [&debug[..], &["--report", &report, "--no-supervise"]].concat();
        let source = || stage.command(Process::Source);
        let first = [&arguments[..], &arranged::mode(&self.point)].concat();
        let mut migration = guest.migrate_as(source(), &receiver.ticket, &first);
        let mut said = String::new();
        let mut code = migration.wait_code_within(CELL_MAX);
        for _ in 0..3 {
            said.push_str(&migration.last_stderr());
            // Killed, or it could not read what its predecessor left.
            if code.is_some() && !(code == Some(1) && said.contains("record is damaged")) {
                break;
            }
            said.push_str("\n--- and again:\n");
            let resume = ["migrate", "--quiet", "--control", &guest.control(), "--resume"];
            let resume = [&resume[..], &arguments].concat();
            migration = super::harness::Running::start_as(source(), &resume);
            code = migration.wait_code_within(CELL_MAX);
        }
        let (place, why) = find(&mut guest, &mut receiver, stage);
        let log = std::fs::read_to_string(&stage.log).unwrap_or_default();
        let story = format!(
            "{place}, exit code {code:?} ({why}); expected {:?}\n--- points:\n{log}\n--- \
                 source:\n{said}\n--- destination:\n{}\n--- VMM:\n{}",
            self.expected,
            without_pings(&receiver.process.stderr()),
            guest.process.stderr(),
        );
        let landed = log.lines().any(|line| line.split(' ').nth(2) == Some(self.point.name));
        assert!(landed, "{NOT_REACHED}: {}", story);
        assert!(!said.contains("panicked"), "a panic: {}", story);
        assert!(self.expected.allows(place, code), "not what the table says: {}", story);
        match place {
            Place::Here => {
                let runs_there = receiver.process.said_so_far("RunGuest");
                assert!(!runs_there, "the guest was run at both places: {}", story);
                stage.is_whole(guest);
            }
            Place::There => {
                let vmm_dies = self.kind == "crash" && self.point.process == Process::Vmm;
                let ended = guest.process.wait_code_within(SOON);
                let left = ended == Some(0) || (vmm_dies && ended.is_none());
                assert!(left, "the VMM ended with {ended:?}: {}", story);
                let keeper = guest.keeper();
                let mut limit = TimeLimit::new(SOON);
                while !processes_with(&keeper).is_empty() {
                    assert!(!limit.is_over(), "the keeper is left: {}", story);
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            // What is held for an operator's word is let go.
            _ => stage.kill_all(),
        }
        format!("{place}, exit code {code:?}")
    }
}

/// A log without what is said every few milliseconds.
fn without_pings(log: &str) -> String {
    let lines = log.lines().filter(|line| !line.ends_with("action=\"Say\""));
    lines.collect::<Vec<_>>().join("\n")
}

/// Where the guest is at last, and how that is known. Once the fault server has ended.
fn find(guest: &mut Guest, receiver: &mut Receiver, stage: &Stage) -> (Place, String) {
    let mut limit = TimeLimit::new(CELL_MAX / 2);
    let (mut gone_since, mut interrupted) = (None, false);
    loop {
        let vmm = guest.process.code_so_far();
        let there = receiver.process.code_so_far();
        if there == Some(Some(0)) {
            let verified = receiver.report_so_far()["verified"].clone();
            return match verified == true {
                true => (Place::There, "verified".into()),
                false => (Place::LostGuest, "it was not verified".into()),
            };
        }
        if vmm.is_none() && runs(guest) {
            // Nobody comes any more; one that is in doubt gives up by itself.
            receiver.process.signal(Signal::SIGINT);
            let ended = receiver.process.wait_code_within(SOON);
            assert_ne!(ended, Some(0), "the guest runs at both places");
            return (Place::Here, format!("the destination ended with {ended:?}"));
        }
        let why = format!("the VMM: {vmm:?}, the destination: {there:?}");
        if let (Some(_), _) | (_, Some(_)) = (vmm, there) {
            let since: Instant = *gone_since.get_or_insert_with(Instant::now);
            let settled = since.elapsed() > RUNS_AGAIN;
            // A guest that has left is awaited; one that died with its VMM will never come.
            if !interrupted && settled && there.is_none() && vmm != Some(Some(0)) {
                receiver.process.signal(Signal::SIGINT);
                interrupted = true;
            }
            match (vmm, there) {
                // It would not have ended by itself if it had not given its guest away.
                (Some(Some(0)) | None, Some(None)) if settled => {
                    return (Place::LostDestination, why);
                }
                (Some(Some(0)) | None, Some(Some(_))) if settled => {
                    return (Place::LostGuest, why);
                }
                (Some(code), Some(_)) if code != Some(0) => return (Place::LostVmm, why),
                _ => {}
            }
        }
        let story = || std::fs::read_to_string(&stage.log).unwrap_or_default();
        assert!(!limit.is_over(), "the guest is nowhere: {why}\n{}", story());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether the guest's VMM says that it runs, and it makes steps.
fn runs(guest: &Guest) -> bool {
    let Ok(mut vmm) = Attached::connect(guest.control()) else { return false };
    let Ok(before) = vmm.status() else { return false };
    if !before.running || before.failure.is_some() {
        return false;
    }
    let mut limit = TimeLimit::new(SOON);
    while !limit.is_over() {
        let Ok(now) = vmm.status() else { return false };
        if now.steps > before.steps {
            return true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    false
}

impl Stage {
    fn new(cell: &Cell, folder: &Path) -> Self {
        let action = KINDS.iter().find(|(kind, _)| *kind == cell.kind).expect("a kind").1;
        // Leaked: a few bytes for each cell of a test.
        let own: &'static str = format!("{}=return({action})", cell.point.name).leak();
        let points = [Some((cell.point.process, own)), arranged::before(&cell.point)];
        let stage = Self {
            mark: format!("{}-{cell}", std::process::id()),
            log: folder.join("points"),
            points: points.into_iter().flatten().collect(),
            over: Arc::default(),
        };
        stage.watch();
        stage
    }

    /// Lets stalled processes continue after a time, and kills all when the cell takes too
    /// long.
    fn watch(&self) {
        let (log, over, mark) = (self.log.clone(), self.over.clone(), self.mark.clone());
        std::thread::spawn(move || {
            let mut limit = TimeLimit::new(CELL_MAX);
            let mut stalled: Vec<(Instant, i32)> = Vec::new();
            let mut seen = HashSet::new();
            while !over.load(Ordering::SeqCst) {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                for line in text.lines().filter(|line| line.ends_with(" stall")) {
                    if seen.insert(line.to_owned()) {
                        let pid = line.split(' ').nth(1).and_then(|pid| pid.parse().ok());
                        stalled.push((Instant::now(), pid.expect("a process's number")));
                    }
                }
                stalled.retain(|(since, pid)| {
                    let waits = since.elapsed() < STALL;
                    if !waits {
                        let _ = kill(Pid::from_raw(*pid), Signal::SIGCONT);
                    }
                    waits
                });
                if limit.is_over() {
                    eprintln!("{mark} is not over after {CELL_MAX:?}: its processes are killed");
                    processes(&mark).into_iter().for_each(kill_process);
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
    }

    /// The binary under test, with the points of a process of this kind.
    fn command(&self, of: Process) -> Command {
        let mut command = self.plain();
        // A keeper has the environment of the fault server that starts it.
        let role = |process| match process {
            Process::Keeper => Process::Source,
            other => other,
        };
        let own = self.points.iter().filter(|(process, _)| role(*process) == of);
        let points: Vec<_> = own.map(|(_, point)| *point).collect();
        command.env("FAILPOINTS", points.join(";")).env("POSTCOPY_FAILPOINT_LOG", &self.log);
        command
    }

    /// The binary under test, with nothing that goes wrong.
    fn plain(&self) -> Command {
        let mut command = Command::new(POSTCOPY);
        command.env(MARK, &self.mark).env("POSTCOPY_TEST_LIMITS", LIMITS);
        command
    }

    /// Migrates a guest that something was done to, and has every page compared.
    fn is_whole(&self, guest: Guest) {
        let receiver = Receiver::start_as(self.plain(), &[]);
        let report = guest.path("last.json");
        let migration = guest.migrate_as(self.plain(), &receiver.ticket, &["--report", &report]);
        migration.succeed(MIGRATION);
        let mut whole = read_report(&report);
        guest.has_left();
        whole["verified"] = receiver.report()["verified"].clone();
        if whole["outcome"] == "recovered" {
            // On a machine that does too much else a link may be silent for too long.
            assert_eq!(whole["verified"], true, "{whole:#}");
        } else {
            check_report(&whole);
        }
    }

    fn left_nothing_behind(&self) {
        poll("the end of all processes", SOON, || processes(&self.mark).is_empty().then_some(()));
    }

    fn kill_all(&self) {
        processes(&self.mark).into_iter().for_each(kill_process);
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        self.kill_all();
    }
}

fn kill_process(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

/// The processes of a cell that have not ended.
fn processes(mark: &str) -> Vec<i32> {
    let wanted = format!("{MARK}={mark}");
    let has = |pid: &i32| {
        // That of a process that has ended and was not waited for is empty.
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|part| part == wanted.as_bytes())
    };
    let folders = std::fs::read_dir("/proc").expect("a /proc").flatten();
    folders.filter_map(|folder| folder.file_name().to_str()?.parse().ok()).filter(has).collect()
}
