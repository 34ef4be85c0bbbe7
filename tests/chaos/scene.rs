//! The processes of one migration, and the link between them. Whatever happens, all of them
//! are gone at the end: they bear a mark, and a limit is set.

use super::commit_word::{CommitWord, Decision};
use super::evidence::{PointLog, stamps};
use super::harness::{
    Ended, Guest, MIGRATION, POSTCOPY, Receiver, Running, SOON, TimeLimit, poll, processes_with,
};
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
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
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
            let mut limit = TimeLimit::new(MIGRATION_MAX);
            while over.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                if limit.is_over() {
                    eprintln!("chaos: {marked} is not over after {MIGRATION_MAX:?}: it is killed");
                    flag.store(true, Ordering::SeqCst);
                    return kill_all(&marked);
                }
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
    /// Every fault server that was started from here; the last one is at work, or one that the
    /// keeper has started since.
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
        let limit = Limit::new(mark_of(plan.seed, attempt));
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
        let alone: &[&str] = if self.plan.supervised { &[] } else { &["--no-supervise"] };
        let report = ["--report", &report];
        let arguments = [&LOG, &PATIENCE, &report[..], &policy[..], alone].concat();
        let migration = self.guest.migrate_as(self.source(), &self.ticket, &arguments);
        self.began = Instant::now();
        self.servers.push(migration);
    }

    /// Starts another fault server when one has died, as whoever supervises it does; if that
    /// is its keeper, nothing is to be done.
    pub fn resume(&mut self) {
        if self.plan.supervised {
            return;
        }
        std::thread::sleep(self.plan.restart_after);
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

    /// Whether a fault server is at work, or is to be.
    pub fn is_served(&mut self) -> bool {
        let first = self.servers.last_mut().expect("a migration was started");
        first.runs() || self.restarted().is_some() || self.keeper().is_some()
    }

    /// The fault server that the keeper started.
    fn restarted(&self) -> Option<i32> {
        let here = processes_with(&self.guest.control());
        processes_with("--restarted").into_iter().find(|pid| here.contains(pid))
    }

    fn keeper(&self) -> Option<i32> {
        processes_with(&self.guest.keeper()).first().copied()
    }

    /// Waits until no fault server and no keeper is left, and none is to come.
    pub fn servers_end(&mut self) -> Ended {
        let ended = self.servers.pop().expect("a migration was started");
        let mut ended = ended.wait_with_others(2 * MIGRATION, || {
            self.restarted().is_none() && self.keeper().is_none()
        });
        for earlier in self.servers.drain(..) {
            ended.stderr.insert_str(0, &earlier.stderr());
        }
        ended
    }

    /// Takes the guest back as an operator does who knows that its destination is dead, as
    /// soon as a fault server that is at work has noticed that its link is down.
    pub fn is_taken_back(&self) {
        let control = self.guest.control();
        let words = ["session", "take-back", "--control", &control, "--yes-it-runs-nowhere-else"];
        poll("a guest that is taken back", MIGRATION, || {
            let mut operator = Running::start_as(self.plain(), &words);
            poll("an answer to the operator", SOON, || {
                let ended = operator.code_so_far().is_some();
                (ended || self.word.decision() == Decision::TakenBack).then_some(())
            });
            let taken = self.word.decision() == Decision::TakenBack;
            // Without a fault server it stays, to tell the destination.
            while let Some(line) = operator.line_if_any() {
                if line.contains("looking for the destination") {
                    operator.signal(Signal::SIGINT);
                }
            }
            operator.wait_code();
            if !taken {
                std::thread::sleep(Duration::from_millis(100));
            }
            taken.then_some(())
        });
    }

    /// Waits until the last fault server has ended.
    pub fn server_ends(&mut self) {
        self.servers.last_mut().expect("a migration was started").wait_code_within(MIGRATION);
    }

    /// A source without a destination looks for it for ten seconds, to tell it that its guest
    /// stayed. No user needs to wait for that; one in four does.
    pub fn interrupt_one_that_looks_in_vain(&mut self) {
        let in_vain = !self.receiver.process.runs();
        if let Some(server) = self.servers.last_mut()
            && in_vain
            && server.runs()
            && !self.plan.seed.is_multiple_of(4)
        {
            server.signal(Signal::SIGINT);
        }
    }

    /// The number of a process that is to be struck, if it runs.
    pub fn pid_of(&mut self, who: Who) -> Option<i32> {
        let of = |process: &mut Running| process.runs().then(|| process.pid() as i32);
        match who {
            Who::FaultServer => of(self.servers.last_mut()?).or_else(|| self.restarted()),
            Who::Vmm => of(&mut self.guest.process),
            Who::Destination => of(&mut self.receiver.process),
            Who::Keeper => self.keeper(),
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

/// The mark of a migration of this run.
pub fn mark_of(seed: u64, attempt: u64) -> String {
    format!("{}-{seed}-{attempt}", std::process::id())
}

/// Kills every process that bears `mark`, and those that they have started meanwhile.
pub fn kill_all(mark: &str) {
    poll("the end of what was killed", SOON, || {
        let left = processes(mark);
        for pid in &left {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        left.is_empty().then_some(())
    });
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
