//! Rounds: each has a seed, a hard limit, and leaves no process behind.

use super::harness::{Guest, POSTCOPY, Receiver, check_report, poll, read_report};
use super::harness::{MIGRATION, SOON};
use postcopy::transport::Ticket;
use postcopy::transport::relay::{Relay, RelayConfig, targets};
use postcopy::vmm::kvm::kvm_available;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Rounds of each test, unless told otherwise.
const ROUNDS: u64 = 3;
/// A round that is not over by then is killed, and the tests with it.
const ROUND_MAX: Duration = Duration::from_secs(100);
/// By this variable a round's processes are known, whoever their parent is.
const MARK: &str = "POSTCOPY_TORTURE_ROUND";

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// One round of a test.
pub struct Round {
    /// Decides all that is drawn.
    pub seed: u64,
    /// Draws it.
    pub random: StdRng,
    mark: String,
    _limit: Sender<()>,
}

/// Runs `round` as often as asked for, with a seed for each, one after another.
pub fn rounds<T>(name: &str, mut round: impl FnMut(&mut Round) -> T) -> Vec<T> {
    let count = number("POSTCOPY_TORTURE_ROUNDS").unwrap_or(ROUNDS);
    // Even, so that what depends on the seed's parity comes up as often as it can.
    let first =
        number("POSTCOPY_TORTURE_SEED").unwrap_or_else(|| rand::random_range(0..1 << 30) * 2);
    let seeds = first..first + count;
    let run = |seed| {
        let mut of = Round::new(name, seed);
        println!("{name}: seed {seed} begins");
        let result = round(&mut of);
        of.left_nothing_behind();
        result
    };
    seeds.map(run).collect()
}

impl Round {
    /// A round of the test `name`.
    pub fn new(name: &str, seed: u64) -> Self {
        let mark = format!("{}-{name}-{seed}", std::process::id());
        let (limit, over) = channel::<()>();
        let marked = mark.clone();
        std::thread::spawn(move || {
            if over.recv_timeout(ROUND_MAX) == Err(RecvTimeoutError::Timeout) {
                eprintln!("round {marked} is not over after {ROUND_MAX:?}: all of it is killed");
                for pid in processes(&marked) {
                    let pid = nix::unistd::Pid::from_raw(pid);
                    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
                }
                std::process::abort();
            }
        });
        Self { seed, random: StdRng::seed_from_u64(seed), mark, _limit: limit }
    }

    /// The binary under test, to be run as a part of this round.
    pub fn postcopy(&self) -> Command {
        let mut command = Command::new(POSTCOPY);
        command.env(MARK, &self.mark);
        command
    }

    /// A time of up to `most`.
    pub fn up_to(&mut self, most: Duration) -> Duration {
        self.random.random_range(Duration::ZERO..=most)
    }

    /// A guest of `mebibytes`, drawn from the seed: a virtual machine, or a process where
    /// there is no KVM.
    pub fn guest(&mut self, mebibytes: u64) -> Guest {
        let kind = match kvm_available() {
            Ok(()) => "kvm",
            Err(why) => {
                eprintln!("KVM does not work here ({why}): a process is tortured instead");
                "process"
            }
        };
        let workloads = ["random", "zipf", "read-modify-write", "pointer-chase", "sequential"];
        let workload = workloads[self.random.random_range(0..workloads.len())];
        let vcpus = self.random.random_range(1..=2).to_string();
        let (memory, seed) = (format!("{mebibytes}M"), self.seed.to_string());
        Guest::start_as(
            self.postcopy(),
            &[
                ["--guest", kind, "--memory", &memory, "--vcpus", &vcpus],
                ["--workload", workload, "--seed", &seed, "--think-ns", "20000"],
            ]
            .concat(),
        )
    }

    /// A link to the destination of `ticket`, and the ticket by way of it.
    pub fn link(&self, ticket: &str, megabits: u64, rtt: Duration) -> (Relay, String) {
        let ticket: Ticket = ticket.parse().expect("the binary prints tickets");
        let config = RelayConfig {
            bandwidth_bps: Some(megabits * 1_000_000),
            rtt,
            seed: self.seed,
            ..RelayConfig::default()
        };
        let targets = targets(IpAddr::V4(Ipv4Addr::LOCALHOST), &ticket);
        let relay = Relay::spawn(config, &targets).expect("a relay");
        let ticket = relay.redirect(&ticket).expect("as many ports").to_string();
        (relay, ticket)
    }

    /// A destination that compares every page with the independent checker's.
    pub fn receiver(&self, arguments: &[&str]) -> Receiver {
        Receiver::start_as(self.postcopy(), arguments)
    }

    /// Migrates a guest that something was done to, and has it verified at its new place:
    /// every page is right, and it can still leave.
    pub fn is_whole(&self, guest: Guest) {
        let receiver = self.receiver(&[]);
        let report = guest.path("last.json");
        let migration = guest.migrate_as(self.postcopy(), &receiver.ticket, &["--report", &report]);
        migration.succeed(MIGRATION);
        let mut whole = read_report(&report);
        guest.has_left();
        whole["verified"] = receiver.report()["verified"].clone();
        check_report(&whole);
    }

    /// Checks that no process of this round is left.
    pub fn left_nothing_behind(&self) {
        poll("the end of every process of a round", SOON, || {
            processes(&self.mark).is_empty().then_some(())
        });
    }
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

#[test]
fn a_round_that_panics_leaves_nothing_running() {
    let round = Round::new("panics", 1);
    let panicked = std::panic::catch_unwind(|| {
        let guest = Guest::start_as(round.postcopy(), &["--guest", "process", "--memory", "16M"]);
        let receiver = round.receiver(&[]);
        let migration = guest.migrate_as(round.postcopy(), &receiver.ticket, &[]);
        // The harshest case: one hangs, as if it were stopped by a debugger.
        guest.process.freeze();
        // A process's environment can be read only a moment after its execve let its starter go on.
        poll("three processes that bear the round's mark", SOON, || {
            (processes(&round.mark).len() >= 3).then_some(())
        });
        let _ = (migration, receiver);
        panic!("as planned");
    });
    assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"as planned"));
    round.left_nothing_behind();
}
