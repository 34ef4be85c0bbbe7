//! The processes of one migration, and the link between them. Whatever happens, all of them
//! are gone at the end: they bear a mark, and a limit is set.

use super::commit_word::CommitWord;
use super::evidence::{PointLog, stamps};
use super::harness::{Guest, POSTCOPY, Receiver, Running, SOON, poll, processes_with};
use super::plan::{Plan, Who};
use super::two_guests::SourceGuest;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use postcopy::failpoint::{POINTS, Process};
use postcopy::transport::Ticket;
use postcopy::transport::relay::{Relay, RelayConfig, targets};
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A migration that is not over by then hangs: all of it is killed.
const MIGRATION_MAX: Duration = Duration::from_secs(150);
/// By this variable a migration's processes are known, whoever their parent is.
const MARK: &str = "POSTCOPY_CHAOS_MIGRATION";
/// Nobody wants to wait for ten minutes for a destination whose source is gone for good.
const PATIENCE: [&str; 2] = ["--patience", "25s"];
/// So that a side says when it has lost its link.
const LOG: [&str; 2] = ["--log", "postcopy=info"];

/// Kills what is left of a migration after its limit.
struct Limit {
    mark: String,
    expired: Arc<AtomicBool>,
    _until: Sender<()>,
}

impl Limit {
    fn new(mark: String) -> Self {
        let (until, over) = channel::<()>();
        let expired = Arc::new(AtomicBool::new(false));
        let (marked, flag) = (mark.clone(), expired.clone());
        std::thread::spawn(move || {
            if over.recv_timeout(MIGRATION_MAX) == Err(RecvTimeoutError::Timeout) {
                eprintln!("chaos: {marked} is not over after {MIGRATION_MAX:?}: it is killed");
                flag.store(true, Ordering::SeqCst);
                kill_all(&marked);
            }
        });
        Self { mark, expired, _until: until }
    }
}

/// A migration that is under way.
pub struct Scene {
    pub plan: Plan,
    pub log: PointLog,
    pub guest: Guest,
    pub receiver: Receiver,
    pub relay: Arc<Relay>,
    /// Every fault server that was started; the last one is at work.
    pub servers: Vec<Running>,
    pub word: CommitWord,
    pub source_guest: SourceGuest,
    pub began: Instant,
    ticket: String,
    folder: Arc<TempDir>,
    limit: Limit,
}

impl Scene {
    /// Starts everything but the migration.
    pub fn prepare(plan: Plan, attempt: u64) -> Self {
        let mark = format!("{}-{}-{attempt}", std::process::id(), plan.seed);
        let limit = Limit::new(mark);
        let folder = Arc::new(super::harness::folder());
        let log = PointLog::at(folder.path().join("points"));
        let marked = |process| command(&plan, &limit.mark, &log, process);
        let arguments: Vec<&str> = plan.guest.iter().map(String::as_str).collect();
        let guest = Guest::start_unlimited(marked(Process::Vmm), &[&LOG, &arguments[..]].concat());
        let lanes = plan.push_lanes.to_string();
        let arguments = ["--push-lanes", &lanes, "--backing", plan.backing];
        let arguments = [&LOG, &PATIENCE, &arguments[..]].concat();
        let receiver = Receiver::start_as(marked(Process::Destination), &arguments);
        let (relay, ticket) = link(&plan, &receiver.ticket);
        let pid = guest.process.pid();
        let word = CommitWord::of(pid);
        let source_guest = SourceGuest::of(pid, CommitWord::of(pid));
        Self {
            log,
            guest,
            receiver,
            relay: Arc::new(relay),
            servers: Vec::new(),
            word,
            source_guest,
            began: Instant::now(),
            ticket,
            folder,
            limit,
            plan,
        }
    }

    /// Starts the migration.
    pub fn migrate(&mut self) {
        let report = self.report();
        let policy = ["--policy", self.plan.policy, "--drain-after", "700ms"];
        let arguments = [&LOG, &PATIENCE, &["--report", &report][..], &policy[..]].concat();
        let migration = self.guest.migrate_as(self.source(), &self.ticket, &arguments);
        self.began = Instant::now();
        self.servers.push(migration);
    }

    /// Starts another fault server, as a supervisor does when one has died.
    pub fn resume(&mut self) {
        let (report, control) = (self.report(), self.guest.control());
        let resume = ["migrate", "--quiet", "--control", &control, "--resume"];
        let arguments = [&resume[..], &LOG, &["--report", &report][..]].concat();
        self.servers.push(Running::start_as(self.source(), &arguments));
    }

    /// A command as a part of this migration, at which nothing goes wrong by plan.
    pub fn plain(&self) -> Command {
        let mut command = Command::new(POSTCOPY);
        command.env(MARK, &self.limit.mark);
        command
    }

    fn source(&self) -> Command {
        command(&self.plan, &self.limit.mark, &self.log, Process::Source)
    }

    /// Where the source's report is.
    pub fn report(&self) -> String {
        let path = self.folder.path().join("source.json");
        path.to_str().expect("a temporary folder has a plain name").to_owned()
    }

    /// The fault server that was started last.
    pub fn server(&mut self) -> &mut Running {
        self.servers.last_mut().expect("a migration was started")
    }

    /// The number of a process that is to be struck, if it runs.
    pub fn pid_of(&mut self, who: Who) -> Option<i32> {
        let of = |process: &mut Running| process.runs().then(|| process.pid() as i32);
        match who {
            Who::FaultServer => of(self.servers.last_mut()?),
            Who::Vmm => of(&mut self.guest.process),
            Who::Destination => of(&mut self.receiver.process),
            Who::Keeper => processes_with(&self.guest.keeper()).first().copied(),
        }
    }

    /// Becomes true if it is killed because it hangs.
    pub fn expired(&self) -> Arc<AtomicBool> {
        self.limit.expired.clone()
    }

    /// Its folder, for whoever needs the log when all is over.
    pub fn folder(&self) -> Arc<TempDir> {
        self.folder.clone()
    }

    /// The share of what is to be sent that has left the source's host, in percent.
    pub fn share_sent(&self) -> u64 {
        let bytes = self.relay.stats().to_target.forwarded_bytes;
        bytes * 100 / (self.plan.pages_with_content() * 4096).max(1)
    }

    /// By which its processes are known.
    pub fn mark(&self) -> String {
        self.limit.mark.clone()
    }
}

/// Fails unless every process that bears `mark` is gone.
pub fn left_nothing_behind(mark: &str) {
    poll("the end of every process of a migration", SOON, || {
        processes(mark).is_empty().then_some(())
    });
}

/// Kills every process that bears `mark`.
pub fn kill_all(mark: &str) {
    for pid in processes(mark) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// The binary under test, with what is planned for this process of it. A keeper has the
/// environment of the fault server.
fn command(plan: &Plan, mark: &str, log: &PointLog, process: Process) -> Command {
    let mut points: Vec<(&str, String)> = Vec::new();
    for hit in &plan.hits {
        points.extend(hit.moment.failpoint());
    }
    for stamp in stamps() {
        if !points.iter().any(|(point, _)| *point == stamp) {
            points.push((stamp, "delay 0".to_owned()));
        }
    }
    let here = |point: &str| {
        let known = POINTS.iter().find(|known| known.name == point);
        let of = known.unwrap_or_else(|| panic!("{point} is no failpoint")).process;
        of == process || (of == Process::Keeper && process == Process::Source)
    };
    let actions: Vec<String> = points
        .iter()
        .filter(|(point, _)| here(point))
        .map(|(point, action)| format!("{point}=return({action})"))
        .collect();
    let mut command = Command::new(POSTCOPY);
    command
        .env(MARK, mark)
        .env("POSTCOPY_FAILPOINT_LOG", log.path())
        .env("FAILPOINTS", actions.join(";"));
    command
}

fn link(plan: &Plan, ticket: &str) -> (Relay, String) {
    let ticket: Ticket = ticket.parse().expect("the binary prints tickets");
    let config = RelayConfig {
        bandwidth_bps: Some(plan.megabits * 1_000_000),
        rtt: plan.rtt,
        loss: plan.loss,
        seed: plan.seed,
        ..RelayConfig::default()
    };
    let targets = targets(IpAddr::V4(Ipv4Addr::LOCALHOST), &ticket);
    let relay = Relay::spawn(config, &targets).expect("a relay");
    let ticket = relay.redirect(&ticket).expect("as many ports").to_string();
    (relay, ticket)
}

/// The processes whose environment has this mark.
fn processes(mark: &str) -> Vec<i32> {
    let wanted = format!("{MARK}={mark}").into_bytes();
    let marked = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == wanted)
    };
    let folders = std::fs::read_dir("/proc").expect("a /proc").flatten();
    let pids = folders.filter_map(|folder| folder.file_name().to_str()?.parse().ok());
    pids.filter(marked).collect()
}
