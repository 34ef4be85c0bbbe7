//! [`Progress`]: how a migration is getting on, shown while it goes on.
//!
//! On a terminal one line that is redrawn; elsewhere plain lines, at most one a
//! second and one at each change of phase; or nothing. It goes to standard error,
//! and has no clock: the time is in each [`Snapshot`].

use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// Plain lines come no closer together than this.
const LINE_INTERVAL: Duration = Duration::from_secs(1);
/// The terminal's line is redrawn no more often.
const REDRAW_INTERVAL: Duration = Duration::from_millis(50);

/// Whether there is a display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgressMode {
    /// A redrawn line on a terminal, plain lines elsewhere.
    Auto,
    /// Nothing.
    Quiet,
}

/// Where a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The phase, in the field's word: "handshake", "blackout", "target brownout".
    pub phase: &'static str,
    /// Pages that the destination has.
    pub pages_done: u64,
    /// Pages in all.
    pub pages_total: u64,
    /// Bytes on the wire so far.
    pub bytes: u64,
    /// Network faults so far.
    pub network_faults: u64,
    /// Time since the migration began.
    pub elapsed: Duration,
    /// For how long there has been no link, and how often a new one was tried, while it is so.
    pub paused: Option<(Duration, u32)>,
}

/// The display of one migration.
pub struct Progress {
    display: Display,
    eta: Eta,
    /// The most pages shown: pages that a pre-copy must send again are not undone.
    done: u64,
    rate: Rate,
    /// What was shown last, and when.
    last: Option<(&'static str, Duration)>,
}

enum Display {
    Quiet,
    Bar(ProgressBar),
    Lines { out: Box<dyn Write + Send> },
}

impl Progress {
    /// A display on standard error.
    pub fn new(mode: ProgressMode) -> Self {
        let stderr = std::io::stderr();
        Self::with(match mode {
            ProgressMode::Quiet => Display::Quiet,
            ProgressMode::Auto if stderr.is_terminal() => {
                Display::Bar(bar(ProgressDrawTarget::stderr()))
            }
            ProgressMode::Auto => Display::Lines { out: Box::new(stderr) },
        })
    }

    fn with(display: Display) -> Self {
        Self { display, eta: Eta::default(), done: 0, rate: Rate::default(), last: None }
    }

    /// Shows where the migration stands, if it is time to. Cheap to call often.
    pub fn update(&mut self, now: Snapshot) {
        let interval = match self.display {
            Display::Quiet => return,
            Display::Bar(_) => REDRAW_INTERVAL,
            Display::Lines { .. } => LINE_INTERVAL,
        };
        self.done = self.done.max(now.pages_done.min(now.pages_total));
        let eta = self.eta.update(now.elapsed, self.done, now.pages_total);
        let rate = self.rate.update(now.elapsed, now.bytes);
        let due = self.last.is_none_or(|(phase, at)| {
            phase != now.phase || now.elapsed.saturating_sub(at) >= interval
        });
        if !due {
            return;
        }
        self.last = Some((now.phase, now.elapsed));
        let figures = figures(&now, self.done, rate, eta);
        match &mut self.display {
            Display::Quiet => {}
            Display::Bar(bar) => {
                bar.set_prefix(now.phase);
                bar.set_length(now.pages_total);
                bar.set_position(self.done);
                bar.set_message(figures);
            }
            Display::Lines { out } => {
                let seconds = now.elapsed.as_secs_f64();
                // A display that cannot be written must not end a migration.
                let _ = writeln!(out, "{seconds:7.1} s  {:<15}  {figures}", now.phase);
            }
        }
    }

    /// Says something beside the line that it redraws.
    pub fn note(&mut self, line: &str) {
        match &mut self.display {
            Display::Quiet => {}
            Display::Bar(bar) => bar.println(line),
            Display::Lines { out } => {
                let _ = writeln!(out, "{line}");
            }
        }
    }

    /// Ends the display with a last line.
    pub fn finish(self, message: &str) {
        match self.display {
            Display::Quiet => {}
            Display::Bar(bar) => {
                bar.finish_and_clear();
                let _ = writeln!(std::io::stderr(), "{message}");
            }
            Display::Lines { mut out } => {
                let _ = writeln!(out, "{message}");
            }
        }
    }
}

fn bar(target: ProgressDrawTarget) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>15} [{bar:10}] {wide_msg}")
        .expect("the template is a constant that is well-formed")
        .progress_chars("=> ");
    let bar = ProgressBar::with_draw_target(None, target);
    bar.set_style(style);
    bar
}

fn figures(now: &Snapshot, done: u64, rate: Option<f64>, eta: Option<Duration>) -> String {
    let percent = (u128::from(done) * 100).checked_div(u128::from(now.pages_total)).unwrap_or(0);
    let mut text = format!("{percent:3} %");
    if let Some((lasts, attempts)) = now.paused {
        let seconds = lasts.as_secs_f64();
        text += &format!(", no link for {seconds:.1} s, connecting again, attempt {attempts}");
    } else if let Some(eta) = eta {
        text += &format!(", {} s left", eta.as_secs_f64().ceil());
    }
    text += &format!(", {} pages", HumanCount(done));
    if let Some(rate) = rate {
        text += &format!(", {}/s", HumanBytes(rate as u64));
    }
    text + &format!(", {} faults", HumanCount(now.network_faults))
}

/// Bytes a second, smoothed over about a second.
#[derive(Debug, Default)]
struct Rate {
    last: Option<(Duration, u64)>,
    smoothed: Option<f64>,
}

impl Rate {
    fn update(&mut self, elapsed: Duration, count: u64) -> Option<f64> {
        let (at, had) = *self.last.get_or_insert((elapsed, count));
        let seconds = elapsed.saturating_sub(at).as_secs_f64();
        // Closer together, the grain of the clock and of the counters would show.
        if seconds >= 0.1 {
            let rate = count.saturating_sub(had) as f64 / seconds;
            self.smoothed = Some(match self.smoothed {
                None => rate,
                Some(old) => old + (rate - old) * (1.0 - (-seconds).exp()),
            });
            self.last = Some((elapsed, count));
        }
        self.smoothed
    }
}

/// The time left, as far as it can be told. It never grows: when the migration
/// becomes slower, the estimate stands still until it is true again.
#[derive(Debug, Default)]
struct Eta {
    start: Option<Duration>,
    rate: Rate,
    shown: Option<Duration>,
}

impl Eta {
    /// Before this much has been seen there is no estimate: the first one is a
    /// ceiling for all that follow.
    const OBSERVED_MIN: Duration = Duration::from_millis(500);
    /// No estimate is longer: it would be a guess.
    const ESTIMATE_MAX: Duration = Duration::from_secs(100 * 3600);

    fn update(&mut self, elapsed: Duration, done: u64, total: u64) -> Option<Duration> {
        let start = *self.start.get_or_insert(elapsed);
        let rate = self.rate.update(elapsed, done)?;
        if elapsed.saturating_sub(start) < Self::OBSERVED_MIN {
            return None;
        }
        let seconds = total.saturating_sub(done) as f64 / rate;
        let left = Duration::try_from_secs_f64(seconds).ok().filter(|&t| t < Self::ESTIMATE_MAX);
        self.shown = match (self.shown, left) {
            (Some(shown), Some(left)) => Some(shown.min(left)),
            (shown, left) => shown.or(left),
        };
        self.shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn snapshot(phase: &'static str, millis: u64, done: u64) -> Snapshot {
        Snapshot {
            phase,
            pages_done: done,
            pages_total: 100_000,
            bytes: done * 4096,
            network_faults: done / 1000,
            elapsed: Duration::from_millis(millis),
            paused: None,
        }
    }

    #[test]
    fn plain_lines_come_once_a_second_and_at_each_phase() {
        let paper = Paper::default();
        let out: Box<dyn Write + Send> = Box::new(paper.clone());
        let mut progress = Progress::with(Display::Lines { out });
        progress.update(snapshot("handshake", 0, 0));
        for millis in (1..3000).step_by(10) {
            progress.update(snapshot("target brownout", millis, millis * 20));
        }
        progress.finish("done");
        let text = String::from_utf8(paper.0.lock().unwrap().clone()).unwrap();
        insta::assert_snapshot!(text);
    }

    #[test]
    fn the_bar_of_a_terminal_has_the_same_figures() {
        let bar = bar(ProgressDrawTarget::hidden());
        let mut progress = Progress::with(Display::Bar(bar.clone()));
        progress.update(snapshot("handshake", 0, 0));
        progress.update(snapshot("target brownout", 1000, 20_000));
        progress.update(snapshot("target brownout", 1010, 21_000));
        assert_eq!((bar.position(), bar.length()), (20_000, Some(100_000)), "drawn at intervals");
        assert_eq!(bar.prefix(), "target brownout");
        let message = bar.message();
        assert_eq!(message, " 20 %, 4 s left, 20,000 pages, 78.12 MiB/s, 20 faults");
        progress.finish("done");
        assert!(bar.is_finished());
    }

    #[test]
    fn a_steady_migration_is_estimated_rightly() {
        let mut eta = Eta::default();
        for millis in (0..4000).step_by(50) {
            let left = eta.update(Duration::from_millis(millis), millis * 20, 100_000);
            assert_eq!(left.is_some(), millis >= 500, "at {millis} ms");
            if let Some(left) = left {
                let exact = 5.0 - millis as f64 / 1000.0;
                assert!((left.as_secs_f64() - exact).abs() < 0.01, "{left:?} at {millis} ms");
            }
        }
    }

    #[test]
    fn a_stall_makes_the_estimate_stand_still_and_a_finished_one_zero() {
        let mut eta = Eta::default();
        let at = Duration::from_millis;
        for i in 0..10 {
            eta.update(at(i * 100), i * 100, 2000);
        }
        let before = eta.update(at(1000), 1000, 2000).unwrap();
        for i in 11..100 {
            assert_eq!(eta.update(at(i * 100), 1000, 2000), Some(before));
        }
        assert_eq!(eta.update(at(10_000), 2000, 2000), Some(Duration::ZERO));
    }

    proptest! {
        #[test]
        fn no_estimate_is_ever_above_an_earlier_one(
            steps in proptest::collection::vec((0u64..2000, 0u64..5000), 1..200),
        ) {
            let (mut eta, mut elapsed, mut done) = (Eta::default(), Duration::ZERO, 0);
            let mut least = Duration::MAX;
            for (millis, pages) in steps {
                elapsed += Duration::from_millis(millis);
                done = (done + pages).min(100_000);
                if let Some(left) = eta.update(elapsed, done, 100_000) {
                    prop_assert!(left <= least);
                    least = left;
                } else {
                    prop_assert_eq!(least, Duration::MAX, "an estimate went away");
                }
            }
        }
    }

    #[test]
    fn pages_shown_never_become_fewer_and_nothing_divides_by_zero() {
        let paper = Paper::default();
        let out: Box<dyn Write + Send> = Box::new(paper.clone());
        let mut progress = Progress::with(Display::Lines { out });
        progress.update(snapshot("source brownout", 0, 90_000));
        progress.update(snapshot("source brownout", 2000, 80_000));
        progress.update(Snapshot { pages_total: 0, ..snapshot("blackout", 4000, 0) });
        let text = String::from_utf8(paper.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.matches("90,000 pages").count(), 3, "{text}");
    }
}
