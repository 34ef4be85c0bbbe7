//! What happens at a point: looked up, written down, done.

use crate::proto::source::SessionLimits;
use fail::{FailScenario, fail_point};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, raise};
use nix::time::{ClockId, clock_gettime};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The file that each hit is written to.
const LOG: &str = "POSTCOPY_FAILPOINT_LOG";
/// Other time limits for tests: `handshake=3000 restore=5000`, in milliseconds.
const LIMITS: &str = "POSTCOPY_TEST_LIMITS";

/// How long a message takes to be on the wire, for what happens behind it.
pub const ON_ITS_WAY: Duration = Duration::from_millis(20);

/// The way of a datagram, as this process sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It leaves.
    Out,
    /// It comes in.
    In,
}

/// Until when, in monotonic nanoseconds, datagrams are dropped: on the way out, and in.
static CUT_UNTIL_NS: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

/// Whether datagrams of this direction are dropped now.
pub fn drops(direction: Direction) -> bool {
    let until = CUT_UNTIL_NS[direction as usize].load(Ordering::Relaxed);
    until != 0 && monotonic_ns() < until
}

fn cut(direction: Direction, time: Duration) {
    let until = monotonic_ns() + time.as_nanos() as u64;
    CUT_UNTIL_NS[direction as usize].store(until, Ordering::Relaxed);
}

/// Reached a point; says whether its step is to fail, which only one that `fails` can.
pub fn hit(point: &'static str, fails: bool) -> bool {
    static SETUP: Once = Once::new();
    // Points are configured for the whole life of the process.
    SETUP.call_once(|| std::mem::forget(FailScenario::setup()));
    fail_point!(point, |action| act(point, fails, action.as_deref().unwrap_or("nothing")));
    false
}

fn act(point: &str, fails: bool, action: &str) -> bool {
    let (kind, time) = action.split_once(' ').unwrap_or((action, "0"));
    let time = Duration::from_millis(time.parse().expect("an action's time is in milliseconds"));
    if !note(point, action) {
        return false;
    }
    match kind {
        "error" => {
            assert!(fails, "the step at {point} cannot fail");
            return true;
        }
        "delay" => std::thread::sleep(time),
        "crash" => signal_self(Signal::SIGKILL),
        "stall" => signal_self(Signal::SIGSTOP),
        "cut" => {
            cut(Direction::Out, time);
            cut(Direction::In, time);
        }
        "half-out" => cut(Direction::Out, time),
        "half-in" => cut(Direction::In, time),
        other => panic!("{other:?} is no action of a failpoint"),
    }
    false
}

/// Writes that `point` was reached, unless that is written already; says whether it did.
fn note(point: &str, action: &str) -> bool {
    let Some(path) = std::env::var_os(LOG) else { return true };
    let file = OpenOptions::new().read(true).append(true).create(true).open(&path);
    let file = file.unwrap_or_else(|error| panic!("the log of failpoints: {error}"));
    let mut file: Flock<File> = Flock::lock(file, FlockArg::LockExclusive)
        .unwrap_or_else(|(_, error)| panic!("the log of failpoints: {error}"));
    let mut text = String::new();
    file.read_to_string(&mut text).expect("the log of failpoints is text");
    if text.lines().any(|line| line.split(' ').nth(2) == Some(point)) {
        return false;
    }
    let line = format!("{} {} {point} {action}\n", monotonic_ns(), std::process::id());
    file.write_all(line.as_bytes()).expect("the log of failpoints can be written");
    true
}

fn signal_self(signal: Signal) {
    // To this thread, which takes it before it goes on. Another one would take a signal to the
    // process a moment later.
    raise(signal).expect("a process may signal itself");
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC exists");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// The time limits of a session: its defaults, or those of the environment.
pub fn limits() -> SessionLimits {
    let mut limits = SessionLimits::default();
    let text = std::env::var(LIMITS).unwrap_or_default();
    for part in text.split_whitespace() {
        let (name, millis) = part.split_once('=').expect("a limit is NAME=MILLISECONDS");
        let time = Duration::from_millis(millis.parse().expect("a limit is in milliseconds"));
        match name {
            "handshake" => limits.handshake = time,
            "restore" => limits.restore = time,
            "recovery" => limits.recovery = time,
            other => panic!("{other:?} is no limit of a session"),
        }
    }
    limits
}
