//! Whether the machine itself stood still: a virtual one stands while its host takes a snapshot
//! of it, and on one that is overloaded ordinary threads wait for seconds. Nothing is excused by
//! it; but who reads of a limit that has passed must know.

use postcopy::attach::monotonic_ns;
use postcopy::transport::thread::prefer_this_thread;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long the watchers sleep.
const SLEEP: Duration = Duration::from_millis(50);
/// What they may be late by.
const LATE: Duration = Duration::from_millis(500);

/// A watcher woke up late.
#[derive(Clone, Debug)]
struct Gap {
    from_ns: u64,
    late: Duration,
    preferred: bool,
}

impl Gap {
    fn until_ns(&self) -> u64 {
        self.from_ns + (SLEEP + self.late).as_nanos() as u64
    }
}

/// Two threads that sleep, one of them in the real-time class if that is allowed: it is late
/// only when no thread runs.
pub struct Watch {
    gaps: Arc<Mutex<Vec<Gap>>>,
    over: Arc<AtomicBool>,
}

impl Watch {
    /// From now on, until it is dropped.
    pub fn begin() -> Self {
        let watch = Self { gaps: Arc::default(), over: Arc::default() };
        for wanted in [false, true] {
            let (gaps, over) = (watch.gaps.clone(), watch.over.clone());
            std::thread::spawn(move || {
                let preferred = wanted && prefer_this_thread().is_ok();
                if wanted && !preferred {
                    return;
                }
                while !over.load(Ordering::Relaxed) {
                    let from_ns = monotonic_ns();
                    std::thread::sleep(SLEEP);
                    let slept = Duration::from_nanos(monotonic_ns() - from_ns);
                    let late = slept.saturating_sub(SLEEP);
                    if late > LATE {
                        let gap = Gap { from_ns, late, preferred };
                        gaps.lock().expect("nobody panics with it").push(gap);
                    }
                }
            });
        }
        watch
    }

    /// What was seen since a time, what lasted until after it included.
    pub fn since(&self, from_ns: u64) -> String {
        let gaps = self.gaps.lock().expect("nobody panics with it");
        let lines: Vec<String> =
            gaps.iter().filter(|gap| gap.until_ns() >= from_ns).map(ToString::to_string).collect();
        if lines.is_empty() { "never".to_owned() } else { lines.join(", ") }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whom = if self.preferred { "everybody" } else { "ordinary threads" };
        let at = Duration::from_nanos(self.from_ns);
        write!(f, "{whom} for {:.1} s at {:.1} s", self.late.as_secs_f64(), at.as_secs_f64())
    }
}
