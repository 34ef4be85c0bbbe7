//! Child processes with hard limits and captured output.
//!
//! Not a test by itself. Every wait has a deadline; when one passes, the whole process
//! group is killed and the test fails with everything that the process has said.

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use postcopy::attach::client::Attached;
use postcopy::attach::message::Status;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The binary under test.
pub const POSTCOPY: &str = env!("CARGO_BIN_EXE_postcopy");
/// For whatever takes a moment, on a machine that does many other things.
pub const SOON: Duration = Duration::from_secs(20);
/// For a whole migration of a small guest.
pub const MIGRATION: Duration = Duration::from_secs(60);
/// The most migrations at a time.
const PERMITS: usize = 2;
/// How often something is looked at that cannot be waited for.
const POLL: Duration = Duration::from_millis(5);

static FREE: (Mutex<usize>, Condvar) = (Mutex::new(PERMITS), Condvar::new());

/// The right to run a guest.
pub struct Permit(());

/// Waits until fewer than two migrations run.
pub fn permit() -> Permit {
    let free = lock(&FREE.0);
    let mut free = FREE.1.wait_while(free, |free| *free == 0).unwrap_or_else(|e| e.into_inner());
    *free -= 1;
    Permit(())
}

impl Drop for Permit {
    fn drop(&mut self) {
        *lock(&FREE.0) += 1;
        FREE.1.notify_one();
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A time limit that is not used up while the whole machine stands still, as a virtual one does
/// for half a minute when its host takes a snapshot of it: what is waited for stands still, too.
pub struct TimeLimit {
    left: Duration,
    looked_at: Instant,
}

impl TimeLimit {
    /// The most that counts between two looks. What is asked in between may take its time.
    const STEP_MAX: Duration = Duration::from_secs(1);

    /// From now on.
    pub fn new(left: Duration) -> Self {
        Self { left, looked_at: Instant::now() }
    }

    /// What is left of it. To be asked several times a second.
    pub fn left(&mut self) -> Duration {
        let now = Instant::now();
        self.left = self.left.saturating_sub((now - self.looked_at).min(Self::STEP_MAX));
        self.looked_at = now;
        self.left
    }

    /// Whether nothing is left of it.
    pub fn is_over(&mut self) -> bool {
        self.left().is_zero()
    }
}

/// Asks `question` until it has an answer.
pub fn poll<T>(what: &str, within: Duration, mut question: impl FnMut() -> Option<T>) -> T {
    let mut limit = TimeLimit::new(within);
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(!limit.is_over(), "{what}: not within {within:?}");
        std::thread::sleep(POLL);
    }
}

/// The lines of one output of a process, as they come.
#[derive(Clone, Default)]
struct Output(Arc<(Mutex<OutputState>, Condvar)>);

#[derive(Default)]
struct OutputState {
    lines: Vec<String>,
    taken: usize,
    ended: bool,
}

impl Output {
    /// Of which nothing comes here.
    fn elsewhere() -> Self {
        let output = Self::default();
        lock(&output.0.0).ended = true;
        output
    }

    fn of(stream: impl Read + Send + 'static) -> Self {
        let output = Self::default();
        let to = output.clone();
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                lock(&to.0.0).lines.push(text);
                to.0.1.notify_all();
                line.clear();
            }
            lock(&to.0.0).ended = true;
            to.0.1.notify_all();
        });
        output
    }

    /// The next line, or `None` at the end or after `within`.
    fn next(&self, within: Duration) -> Option<String> {
        let waits = |state: &OutputState| state.taken == state.lines.len() && !state.ended;
        let mut state = self.wait_while(within, waits);
        let line = state.lines.get(state.taken).cloned();
        state.taken += usize::from(line.is_some());
        line
    }

    /// All of it, once it has ended.
    fn all(&self) -> String {
        let state = self.wait_while(Duration::from_secs(2), |state| !state.ended);
        state.lines.join("\n")
    }

    fn so_far(&self) -> String {
        lock(&self.0.0).lines.join("\n")
    }

    fn wait_while(
        &self,
        within: Duration,
        waits: impl Fn(&OutputState) -> bool,
    ) -> MutexGuard<'_, OutputState> {
        let mut limit = TimeLimit::new(within);
        let mut state = lock(&self.0.0);
        while waits(&state) && !limit.is_over() {
            let step = limit.left().min(Duration::from_millis(200));
            (state, _) = self.0.1.wait_timeout(state, step).unwrap_or_else(|e| e.into_inner());
        }
        state
    }
}

/// A process of the binary under test. Its whole group is killed at the end.
pub struct Running {
    name: String,
    child: Child,
    stdout: Output,
    stderr: Output,
}

/// A process that has ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; `None` if it was killed.
    pub code: Option<i32>,
    /// Everything it printed.
    pub stdout: String,
    /// Everything it said.
    pub stderr: String,
}

impl Running {
    /// Starts `postcopy` with these arguments.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_as(Command::new(POSTCOPY), arguments)
    }

    /// The same, as `command` says: as another user, in another namespace.
    pub fn start_as(command: Command, arguments: &[&str]) -> Self {
        let mut running = Self::start_into(command, arguments, [Stdio::piped(), Stdio::piped()]);
        running.stdout = Output::of(running.child.stdout.take().expect("piped"));
        running.stderr = Output::of(running.child.stderr.take().expect("piped"));
        running
    }

    /// The same with these for standard output and error, of which nothing is known here.
    pub fn start_into(
        mut command: Command,
        arguments: &[&str],
        [stdout, stderr]: [Stdio; 2],
    ) -> Self {
        // The parent is this thread: whatever is left ends with its test.
        command.arg("--die-with-parent").args(arguments);
        command.env_remove("POSTCOPY_LOG").env_remove("RUST_LOG").env_remove("RUST_BACKTRACE");
        command.stdin(Stdio::piped()).stdout(stdout).stderr(stderr);
        command.process_group(0);
        let child = command.spawn().expect("the binary under test starts");
        let name = arguments.join(" ");
        Self { name, child, stdout: Output::elsewhere(), stderr: Output::elsewhere() }
    }

    /// The next line that it prints.
    pub fn line(&mut self) -> String {
        match self.stdout.next(SOON) {
            Some(line) => line,
            None => self.fail("printed no further line"),
        }
    }

    /// The next line that it prints; none if it ends without.
    pub fn line_if_any(&mut self) -> Option<String> {
        self.stdout.next(SOON)
    }

    /// Waits until it has said something with `text` in it.
    pub fn says(&mut self, text: &str) {
        loop {
            match self.stderr.next(SOON) {
                Some(line) if line.contains(text) => return,
                Some(_) => {}
                None => self.fail(&format!("never said {text:?}")),
            }
        }
    }

    /// Writes to its standard input and ends that. It may stop reading early.
    pub fn feed(&mut self, bytes: &[u8]) {
        if let Some(mut stdin) = self.child.stdin.take() {
            let _ = stdin.write_all(bytes);
        }
    }

    /// Waits for its end, and until `others`, who may write to its outputs, have ended, too.
    pub fn wait_with_others(mut self, within: Duration, others: impl Fn() -> bool) -> Ended {
        self.wait_code_within(within);
        poll("the end of those who follow a process", within, || others().then_some(()));
        self.wait(SOON)
    }

    /// Waits for its end.
    pub fn wait(mut self, within: Duration) -> Ended {
        self.child.stdin.take();
        let mut limit = TimeLimit::new(within);
        let status = loop {
            match self.child.try_wait().expect("a child can be waited for") {
                Some(status) => break status,
                None if limit.is_over() => self.fail(&format!("ran for {within:?}")),
                None => std::thread::sleep(POLL),
            }
        };
        let (stdout, stderr) = (self.stdout.all(), self.stderr.all());
        assert!(!stderr.contains("panicked"), "{} panicked:\n{stderr}", self.name);
        Ended { code: status.code(), stdout, stderr }
    }

    /// Waits until it is gone; whether by a kill, and not by itself.
    pub fn wait_killed(&mut self) -> bool {
        self.wait_code().is_none()
    }

    /// Waits until it is gone, and leaves it where it is; its exit code, if it has one.
    pub fn wait_code(&mut self) -> Option<i32> {
        self.wait_code_within(SOON)
    }

    /// As [`wait_code`](Self::wait_code), for one that has a reason to stay for a while.
    pub fn wait_code_within(&mut self, within: Duration) -> Option<i32> {
        poll("the end of a process", within, || self.code_so_far())
    }

    /// Its exit code, if it has ended, and if it has one.
    pub fn code_so_far(&mut self) -> Option<Option<i32>> {
        Some(self.child.try_wait().expect("a child can be waited for")?.code())
    }

    /// All that it has said, now that it has ended.
    pub fn last_stderr(&self) -> String {
        self.stderr.all()
    }

    /// All that it has said so far.
    pub fn stderr(&self) -> String {
        self.stderr.so_far()
    }

    /// How many lines with `text` in them it has said.
    pub fn said_count(&self, text: &str) -> usize {
        lock(&self.stderr.0.0).lines.iter().filter(|line| line.contains(text)).count()
    }

    /// Whether it has said something with `text` in it.
    pub fn said_so_far(&self, text: &str) -> bool {
        self.stderr.so_far().contains(text)
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until this `postcopy migrate` has its guest's memory mapped. (Attaching to
    /// see whether somebody is attached would keep it out.)
    pub fn is_attached(&mut self) {
        let maps = format!("/proc/{}/maps", self.child.id());
        poll("an attached migration", SOON, || {
            std::fs::read_to_string(&maps).ok().filter(|maps| maps.contains("memfd:")).map(drop)
        });
    }

    /// Waits for its end, which must be a good one.
    pub fn succeed(self, within: Duration) -> Ended {
        let name = self.name.clone();
        let ended = self.wait(within);
        assert_eq!(ended.code, Some(0), "{name}\n{}\n{}", ended.stdout, ended.stderr);
        ended
    }

    /// Kills its whole group, as `kill -9` does.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }

    /// Stops its whole group where it is, as a host that hangs does.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// The number of its process, and of its group.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends its whole group a signal, without waiting for what comes of it.
    pub fn signal(&self, signal: Signal) {
        // It has not been waited for, so the number is still its own.
        let group = Pid::from_raw(self.child.id() as i32);
        if let Err(error) = killpg(group, signal) {
            eprintln!("cannot send {signal} to {}: {error}", self.name);
        }
    }

    fn fail(&mut self, what: &str) -> ! {
        self.kill();
        let (stdout, stderr) = (self.stdout.so_far(), self.stderr.so_far());
        panic!("{} {what}\nstdout:\n{stdout}\nstderr:\n{stderr}", self.name);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let ended = matches!(self.child.try_wait(), Ok(Some(_)));
        if !ended {
            self.kill();
        }
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.name, self.stderr.so_far());
        }
    }
}

impl Ended {
    /// Checks that it failed with this code and said one line with all of `parts`.
    pub fn failed_with(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        let lines: Vec<&str> = self.stderr.lines().collect();
        assert!(lines.len() == 1 && lines[0].starts_with("postcopy: "), "not one line: {self:#?}");
        for part in parts {
            assert!(lines[0].contains(part), "nothing of {part:?} in {:?}", lines[0]);
        }
    }
}

/// A folder and a guest that runs in a `postcopy run` of its own.
pub struct Guest {
    folder: TempDir,
    /// Its process.
    pub process: Running,
    _keeper: KeeperSweep,
    _permit: Option<Permit>,
}

/// Kills the keeper of a guest at the end: one that holds a guest's memory for a fault
/// server to come outlives all other processes. So does the fault server that it has started.
struct KeeperSweep {
    control: String,
    keeper: String,
}

impl Drop for KeeperSweep {
    fn drop(&mut self) {
        // Each starts the other one.
        for _ in 0..20 {
            let left = [processes_with(&self.keeper), restarted(&self.control)].concat();
            if left.is_empty() {
                return;
            }
            for pid in left {
                let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            std::thread::sleep(POLL);
        }
    }
}

/// The processes that run and have `argument` among their arguments.
pub fn processes_with(argument: &str) -> Vec<i32> {
    processes_with_all(&[argument])
}

/// The fault servers that the keeper of the guest at `control` has started.
pub fn restarted(control: &str) -> Vec<i32> {
    processes_with_all(&[control, "--restarted"])
}

fn processes_with_all(arguments: &[&str]) -> Vec<i32> {
    let has = |pid: &i32| {
        // That of a process that has ended and was not waited for is empty.
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let parts: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        arguments.iter().all(|argument| parts.contains(&argument.as_bytes()))
    };
    let folders = std::fs::read_dir("/proc").expect("a /proc").flatten();
    folders.filter_map(|folder| folder.file_name().to_str()?.parse().ok()).filter(has).collect()
}

impl Guest {
    /// A small process guest.
    pub fn start() -> Self {
        Self::start_with(&["--guest", "process", "--memory", "16M", "--think-ns", "2000"])
    }

    /// A guest of these arguments.
    pub fn start_with(arguments: &[&str]) -> Self {
        Self::start_as(Command::new(POSTCOPY), arguments)
    }

    /// The same, as `command` says.
    pub fn start_as(command: Command, arguments: &[&str]) -> Self {
        Self::start_permitted(Some(permit()), command, arguments)
    }

    /// The same, for a test that itself limits how many guests run.
    pub fn start_unlimited(command: Command, arguments: &[&str]) -> Self {
        Self::start_permitted(None, command, arguments)
    }

    /// A second small guest, under the first one's permit: a test that waited for another
    /// one while it holds one could wait for ever.
    pub fn start_another(&self) -> Self {
        let arguments = ["--guest", "process", "--memory", "16M", "--think-ns", "2000"];
        Self::start_permitted(None, Command::new(POSTCOPY), &arguments)
    }

    fn start_permitted(permit: Option<Permit>, command: Command, arguments: &[&str]) -> Self {
        let folder = folder();
        let control = folder.path().join("control");
        let control = control.to_str().expect("a temporary folder has a plain name").to_owned();
        let mut process =
            Running::start_as(command, &[&["run", "--control", &control], arguments].concat());
        let line = process.line();
        assert!(line.contains("runs as process"), "{line}");
        let _keeper = KeeperSweep { keeper: format!("{control}.keeper"), control };
        Self { folder, process, _keeper, _permit: permit }
    }

    /// A path for a file beside the control socket.
    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().expect("as above").to_owned()
    }

    /// Its control socket.
    pub fn control(&self) -> String {
        self.path("control")
    }

    /// A conversation with its process, at which a client that has just gone may still be.
    pub fn attach(&self) -> Attached {
        poll("attaching to the guest", SOON, || Attached::connect(self.control()).ok())
    }

    /// Checks that it runs: that it makes steps.
    pub fn runs_on(&self) {
        let mut attached = self.attach();
        let status = |attached: &mut Attached| -> Status { attached.status().expect("a status") };
        let before = status(&mut attached);
        assert!(before.running && before.failure.is_none(), "{before:?}");
        poll("a guest that makes steps", SOON, || {
            let now = status(&mut attached);
            assert!(now.running && now.failure.is_none(), "{now:?}");
            (now.steps > before.steps).then_some(())
        });
    }

    /// Where its keeper listens.
    pub fn keeper(&self) -> String {
        self.path("control.keeper")
    }

    /// Starts `postcopy migrate --resume` of this guest.
    pub fn resume(&self, arguments: &[&str]) -> Running {
        let control = self.control();
        let resume = ["migrate", "--quiet", "--control", &control, "--resume"];
        Running::start(&[&resume, arguments].concat())
    }

    /// Starts `postcopy migrate` of this guest.
    pub fn migrate(&self, ticket: &str, arguments: &[&str]) -> Running {
        self.migrate_as(Command::new(POSTCOPY), ticket, arguments)
    }

    /// The same, as `command` says.
    pub fn migrate_as(&self, command: Command, ticket: &str, arguments: &[&str]) -> Running {
        let control = self.control();
        let migrate = ["migrate", "--quiet", "--control", &control, "--ticket", ticket];
        Running::start_as(command, &[&migrate, arguments].concat())
    }

    /// Checks that its process ends well, now that the guest has left.
    pub fn has_left(self) {
        self.process.succeed(SOON);
    }

    /// Migrates it to `receiver`, and has it verified there: the last proof that nothing
    /// before did it any harm.
    pub fn migrates_to(self, receiver: Receiver) {
        let report = self.path("report.json");
        self.migrate(&receiver.ticket, &["--report", &report]).succeed(MIGRATION);
        let mut source = read_report(&report);
        self.has_left();
        source["verified"] = receiver.report()["verified"].clone();
        check_report(&source);
    }
}

/// A `postcopy receive` and its ticket.
pub struct Receiver {
    /// Its process.
    pub process: Running,
    /// What it printed.
    pub ticket: String,
    folder: TempDir,
}

impl Receiver {
    /// One that verifies what it received.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with more arguments.
    pub fn start_with(arguments: &[&str]) -> Self {
        Self::start_as(Command::new(POSTCOPY), arguments)
    }

    /// The same, as `command` says.
    pub fn start_as(command: Command, arguments: &[&str]) -> Self {
        let folder = folder();
        // It may be run as a user who may not write into our folders.
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777))
            .expect("our folder");
        let report = folder.path().join("report.json");
        let report = report.to_str().expect("a temporary folder has a plain name");
        let mut receive = vec!["receive", "--quiet", "--report", report];
        if !arguments.contains(&"--verify-after") {
            receive.extend(["--verify-after", "300ms"]);
        }
        let mut process = Running::start_as(command, &[&receive, arguments].concat());
        let ticket = process.line();
        Self { process, ticket, folder }
    }

    /// Waits for its end, which must be a good one, and reads its report.
    pub fn report(self) -> Value {
        self.process.succeed(MIGRATION);
        read_report(self.folder.path().join("report.json"))
    }

    /// Its report, once it has ended.
    pub fn report_so_far(&self) -> Value {
        read_report(self.folder.path().join("report.json"))
    }

    /// Waits for its end, which must be a failure: see [`Ended::failed_with`].
    pub fn fails_with(self, code: i32, parts: &[&str]) {
        self.process.wait(SOON).failed_with(code, parts);
    }
}

/// A folder that goes with its owner, and that other users may look into.
pub fn folder() -> TempDir {
    tempfile::Builder::new().prefix("postcopy-test-").tempdir().expect("a temporary folder")
}

/// A report as plain JSON.
pub fn read_report(path: impl AsRef<Path>) -> Value {
    let path: PathBuf = path.as_ref().into();
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).expect("a report is JSON")
}

/// Checks what must be true of the report of every undisturbed migration.
pub fn check_report(report: &Value) {
    let pages = |name: &str| -> u64 {
        let count = &report["pages"][name];
        count.as_u64().unwrap_or_else(|| panic!("no count of {name} pages: {report:#}"))
    };
    assert_eq!(report["schema"], "postcopy-report/1");
    assert_eq!(report["outcome"], "completed", "{report:#}");
    assert_eq!(report["verified"], true, "{report:#}");
    for zero in ["sent_twice", "placed_twice", "resent_after_link_loss"] {
        assert_eq!(pages(zero), 0, "{zero}: {report:#}");
    }
    let origins = ["seeded", "demanded", "pushed", "drained", "zero", "hole"];
    let sum: u64 = origins.iter().map(|origin| pages(origin)).sum();
    // Only where some were copied before the guest moved.
    let copied = report["pages"]["precopied"].as_u64().unwrap_or(0);
    assert_eq!(sum + copied, pages("total"), "{report:#}");
    let memory = report["guest"]["memory_bytes"].as_u64();
    assert_eq!(memory, Some(pages("total") * 4096), "{report:#}");
    assert!(report["downtime_us"].as_u64().is_some_and(|us| us > 0), "{report:#}");
    let hops = |name: &str| report["fault_hops_ns"][name]["count"].as_u64().unwrap_or(0);
    let answered = hops("answer");
    assert_eq!([hops("ask"), hops("place")], [answered; 2], "{report:#}");
    // Two vCPUs may wait for one page, and one of them has asked.
    assert!(answered <= pages("demanded") + pages("zero"), "{report:#}");
    // Of a huge page up to 64 are asked for at once.
    let asked = if report["pages_a_fault"].is_null() { 1 } else { 64 };
    assert!(hops("serve") * asked >= pages("demanded"), "{report:#}");
}
