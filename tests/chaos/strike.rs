//! Has a failure happen, at its moment, and takes down what proves that it did.

use super::commit_word::Decision;
use super::evidence::{Ns, PointLog};
use super::harness::{SOON, poll};
use super::moments::Moment;
use super::plan::{Failure, Hit, Phase};
use super::scene::Scene;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use postcopy::attach::monotonic_ns;
use postcopy::transport::relay::{Relay, Way};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A moment that has not come by then does not come.
const MOMENT_MAX: Duration = Duration::from_secs(25);
/// How often a moment is looked for.
const LOOK_EVERY: Duration = Duration::from_micros(300);

/// What is known of a hit.
#[derive(Debug)]
pub enum Struck {
    /// It struck between these two times.
    Yes {
        from: Ns,
        to: Ns,
        /// What stood still meanwhile: a process, at a point.
        held: Option<(i32, String)>,
        /// No link stood, and a side had noticed.
        without_link: bool,
    },
    /// It did not, and why.
    No(String),
}

impl Struck {
    /// Whether it happened at all, wherever.
    pub fn did(&self) -> bool {
        matches!(self, Self::Yes { .. })
    }
}

/// Failures that end by themselves, in threads that end then.
#[derive(Default)]
pub struct Pending(Vec<JoinHandle<()>>);

impl Pending {
    fn after(&mut self, time: Duration, undo: impl FnOnce() + Send + 'static) {
        self.0.push(std::thread::spawn(move || {
            std::thread::sleep(time);
            undo();
        }));
    }

    /// Waits until all of them have ended.
    pub fn over(&mut self) {
        for thread in self.0.drain(..) {
            thread.join().expect("nothing in it panics");
        }
    }
}

/// Has `hit` happen.
pub fn strike(scene: &mut Scene, hit: &Hit, pending: &mut Pending) -> Struck {
    match hit.moment {
        Moment::At(point) => match wait_for_point(scene, point) {
            Some(passed) => at_point(scene, hit, pending, passed.pid, point),
            None => Struck::No(format!("nobody came to {point}")),
        },
        Moment::Within(point, after, _) => match wait_for_point(scene, point) {
            Some(passed) => {
                let due = passed.at + after.as_nanos() as u64;
                std::thread::sleep(Duration::from_nanos(due.saturating_sub(monotonic_ns())));
                now(scene, hit.failure, pending)
            }
            None => Struck::No(format!("nobody came to {point}")),
        },
        Moment::After(time) => {
            std::thread::sleep(time.saturating_sub(scene.began.elapsed()));
            now(scene, hit.failure, pending)
        }
        Moment::Share(percent) => match wait_for_share(scene, percent) {
            true => now(scene, hit.failure, pending),
            false => Struck::No(format!("{percent} % never left")),
        },
        Moment::LinkLost(percent) => match wait_for_share(scene, percent) {
            true => without_link(scene, hit, pending),
            false => Struck::No(format!("{percent} % never left")),
        },
    }
}

fn wait_for_point(scene: &mut Scene, point: &str) -> Option<super::evidence::Passed> {
    let deadline = Instant::now() + MOMENT_MAX;
    loop {
        if let Some(passed) = scene.log.of(point) {
            return Some(passed);
        }
        let aborted = scene.word.decision() == Decision::Aborted;
        let over = aborted || (!scene.receiver.process.runs() && !scene.is_served());
        if over || Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn wait_for_share(scene: &mut Scene, percent: u64) -> bool {
    let deadline = Instant::now() + MOMENT_MAX;
    while scene.share_sent() < percent {
        if !scene.is_served() || Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    true
}

/// A process stops itself at `point`; only here it is told to go on.
fn at_point(
    scene: &mut Scene,
    hit: &Hit,
    pending: &mut Pending,
    pid: i32,
    point: &'static str,
) -> Struck {
    let stands = || poll("a process that stops", SOON, || is_stopped(pid)?.then_some(()));
    stands();
    let struck = now(scene, hit.failure, pending);
    let is_victim = |scene: &mut Scene, who| scene.pid_of(who) == Some(pid);
    match (hit.failure, struck) {
        // It was killed where it stood: nobody else could have let it go on.
        (Failure::Kill(_), Struck::Yes { from, to, without_link, .. }) if !is_running(pid) => {
            let held = Some((pid, format!("killed at {point}")));
            Struck::Yes { from, to, held, without_link }
        }
        (failure, struck) => {
            let still = is_stopped(pid) == Some(true);
            // One who is to hang for a while goes on after that.
            if !matches!(failure, Failure::Stop(who, _) if is_victim(scene, who)) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
            }
            match struck {
                Struck::Yes { from, to, without_link, .. } if still => {
                    let held = Some((pid, format!("held at {point}")));
                    Struck::Yes { from, to, held, without_link }
                }
                other => other,
            }
        }
    }
}

/// Cuts the link, waits until a side has noticed, and only then has the failure happen.
fn without_link(scene: &mut Scene, hit: &Hit, pending: &mut Pending) -> Struck {
    if !matches!(scene.word.decision(), Decision::Committed | Decision::Running) {
        return Struck::No("nothing was committed".to_owned());
    }
    let losses = |scene: &Scene| scene.receiver.process.said_count("the link ended");
    scene.relay.blackhole(true);
    let before = losses(scene);
    let deadline = Instant::now() + Duration::from_secs(8);
    while losses(scene) == before {
        if Instant::now() > deadline || !scene.is_served() {
            scene.relay.blackhole(false);
            return Struck::No("nobody noticed that the link was down".to_owned());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let struck = now(scene, hit.failure, pending);
    // Up again in its own time, so that whoever was struck comes back before or after it.
    let relay = scene.relay.clone();
    let way_back = scene.plan.restart_after * 2;
    let rest = match hit.failure {
        Failure::HalfOpen(_, time) => time,
        _ => way_back,
    };
    pending.after(rest, move || relay.blackhole(false));
    match struck {
        Struck::Yes { from, to, held, .. } => Struck::Yes { from, to, held, without_link: true },
        no => no,
    }
}

/// Has a failure happen now.
fn now(scene: &mut Scene, failure: Failure, pending: &mut Pending) -> Struck {
    let relay = scene.relay.clone();
    let from = monotonic_ns();
    let done = |from| Struck::Yes { from, to: monotonic_ns(), held: None, without_link: false };
    match failure {
        Failure::Kill(who) => {
            let Some(pid) = scene.pid_of(who) else {
                return Struck::No(format!("there was no {who:?} any more"));
            };
            if kill(Pid::from_raw(pid), Signal::SIGKILL).is_err() {
                return Struck::No(format!("the {who:?} had just ended"));
            }
            let struck = done(from);
            // Its threads end one after the other, its first one perhaps not as the last.
            poll("the end of a killed process", SOON, || (!is_running(pid)).then_some(()));
            struck
        }
        Failure::Stop(who, time) => {
            let Some(pid) = scene.pid_of(who) else {
                return Struck::No(format!("there was no {who:?} any more"));
            };
            if kill(Pid::from_raw(pid), Signal::SIGSTOP).is_err() {
                return Struck::No(format!("the {who:?} had just ended"));
            }
            pending.after(time, move || {
                let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
            });
            done(from)
        }
        Failure::Cut(time) => {
            relay.blackhole(true);
            pending.after(time, move || relay.blackhole(false));
            done(from)
        }
        Failure::HalfOpen(way, time) => {
            // If it is cut wholly, the other direction comes back alone.
            let other = if way == Way::ToTarget { Way::ToClient } else { Way::ToTarget };
            relay.cut(way, true);
            relay.cut(other, false);
            pending.after(time, move || relay.cut(way, false));
            done(from)
        }
        Failure::Lane(lane, time) => {
            cut_lane(&relay, lane, true);
            pending.after(time, move || cut_lane(&relay, lane, false));
            done(from)
        }
        Failure::Rebind => {
            relay.rebind();
            done(from)
        }
    }
}

fn cut_lane(relay: &Arc<Relay>, lane: usize, down: bool) {
    relay.cut_port(lane, Way::ToTarget, down);
    relay.cut_port(lane, Way::ToClient, down);
}

/// The state of a process or thread, by its path in `/proc`.
fn state(path: &str) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{path}/stat")).ok()?;
    // The name in front is in parentheses, and may hold anything.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Whether a process stops, or has stopped: one of its threads has. That is the one at the
/// point, or one that it has stopped: it signals itself, and goes no further. (Others may still
/// wait in the kernel, for a page or a disk.)
fn is_stopped(pid: i32) -> Option<bool> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let mut states = threads.filter_map(|thread| {
        let name = thread.file_name();
        state(&format!("{pid}/task/{}", name.to_str()?))
    });
    Some(states.any(|state| state == 'T'))
}

fn is_running(pid: i32) -> bool {
    !matches!(state(&pid.to_string()), None | Some('Z' | 'X'))
}

/// Lets whoever stopped at a point that nobody looks at any more go on, until it is dropped.
pub struct GoOn {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl GoOn {
    /// Points that were not passed yet are disarmed at once.
    pub fn everybody(log: &PointLog, planned: Vec<&'static str>) -> Self {
        log.disarm(planned.into_iter());
        let over = Arc::new(AtomicBool::new(false));
        let (until, log) = (over.clone(), log.clone());
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                for passed in log.read().iter().filter(|passed| passed.action == "stall") {
                    if is_stopped(passed.pid) == Some(true) {
                        let _ = kill(Pid::from_raw(passed.pid), Signal::SIGCONT);
                    }
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for GoOn {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The phase that a strike was in, proven, and by what; or why nothing proves it.
pub fn prove(struck: &Struck, log: &PointLog) -> Result<(Phase, String), String> {
    let Struck::Yes { from, to, held, without_link } = struck else {
        let Struck::No(why) = struck else { unreachable!() };
        return Err(why.clone());
    };
    if *without_link {
        return Ok((Phase::Paused, "the link was lost, and down until after it".to_owned()));
    }
    let phase = super::evidence::phase_of(&log.read(), *from, *to)?;
    let how = match held {
        Some((pid, how)) => format!("process {pid} {how}"),
        None => format!("{} us between the stamps", (to - from) / 1000),
    };
    Ok((phase, how))
}
