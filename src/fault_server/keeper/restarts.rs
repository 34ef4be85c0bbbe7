//! [`Restarts`]: when a fault server that died is started again, and when it has died too
//! often for that. Pure: the time is passed in.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// So many starts within [`WINDOW`] are too many.
pub const STARTS_MAX: usize = 10;
/// What is longer ago than this is forgiven.
pub const WINDOW: Duration = Duration::from_secs(60);
/// The pause before the second start of a series; it doubles with each further one.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// The starts of the last minute, and those since the last one that came to nothing.
#[derive(Debug, Default)]
pub struct Restarts {
    starts: VecDeque<Instant>,
    failed: u32,
    /// Not before then, because of those.
    again: Option<Instant>,
}

impl Restarts {
    /// When the next start is due, if one is needed `now`: at once after a long time, later
    /// the more of them there were. None if there were too many.
    pub fn due(&mut self, now: Instant) -> Option<Instant> {
        while self.starts.front().is_some_and(|&start| now.duration_since(start) >= WINDOW) {
            self.starts.pop_front();
        }
        let again = self.again.map_or(now, |again| now.max(again));
        let Some(last) = self.starts.back() else { return Some(again) };
        if self.starts.len() >= STARTS_MAX {
            return None;
        }
        Some(again.max(*last + pause(self.starts.len() as u32 - 1)))
    }

    /// Counts a start.
    pub fn started(&mut self, now: Instant) {
        self.starts.push_back(now);
        (self.failed, self.again) = (0, None);
    }

    /// A start came to nothing: there was no process, or no descriptor for it. That is tried
    /// again for as long as it takes, and is none of those that are too many.
    pub fn failed(&mut self, now: Instant) {
        self.again = Some(now + pause(self.failed));
        self.failed = self.failed.saturating_add(1);
    }

    /// Starts of the last minute.
    pub fn count(&self) -> usize {
        self.starts.len()
    }

    /// Forgets them all: somebody has looked after it.
    pub fn forgive(&mut self) {
        *self = Self::default();
    }
}

/// The pause after so many.
fn pause(before: u32) -> Duration {
    (PAUSE_MIN * (1 << before.min(10))).min(PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_start_is_due_at_once_and_each_further_one_later() {
        let (mut restarts, began) = (Restarts::default(), Instant::now());
        let mut now = began;
        let mut pauses = Vec::new();
        // One that dies as soon as it is started.
        while let Some(due) = restarts.due(now) {
            pauses.push((due - now).as_millis());
            now = due;
            restarts.started(now);
        }
        assert_eq!(pauses, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        assert_eq!(restarts.count(), STARTS_MAX);
        assert_eq!(restarts.due(began + WINDOW - Duration::from_millis(1)), None);
        // When the first ones are forgiven there is room again.
        let later = began + WINDOW;
        assert_eq!(restarts.due(later), Some(later));
        restarts.forgive();
        assert_eq!(restarts.due(began), Some(began));
    }

    #[test]
    fn one_for_which_there_is_no_process_is_tried_for_as_long_as_it_takes() {
        let (mut restarts, began) = (Restarts::default(), Instant::now());
        restarts.started(began);
        let (mut now, mut pauses) = (began, Vec::new());
        for _ in 0..100 {
            let due = restarts.due(now).expect("it is tried");
            pauses.push((due - now).as_millis());
            now = due;
            restarts.failed(now);
        }
        assert_eq!(pauses[..8], [100, 100, 200, 400, 800, 1600, 3200, 5000]);
        assert!(pauses[8..].iter().all(|&pause| pause == 5000), "{pauses:?}");
        // The next one that there is a process for is as good as the first.
        let due = restarts.due(now).expect("it is tried");
        restarts.started(due);
        assert_eq!(restarts.count(), 1);
        assert_eq!(restarts.due(due), Some(due + PAUSE_MIN));
    }

    #[test]
    fn one_that_lives_for_a_while_is_started_again_at_once_for_ever() {
        let (mut restarts, mut now) = (Restarts::default(), Instant::now());
        for _ in 0..100 {
            assert_eq!(restarts.due(now), Some(now));
            restarts.started(now);
            now += Duration::from_secs(10);
        }
        assert!(restarts.count() < STARTS_MAX);
    }
}
