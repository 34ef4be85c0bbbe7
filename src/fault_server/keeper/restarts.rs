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

/// The starts of the last minute.
#[derive(Debug, Default)]
pub struct Restarts(VecDeque<Instant>);

impl Restarts {
    /// When the next start is due, if one is needed `now`: at once after a long time, later
    /// the more of them there were. None if there were too many.
    pub fn due(&mut self, now: Instant) -> Option<Instant> {
        while self.0.front().is_some_and(|&start| now.duration_since(start) >= WINDOW) {
            self.0.pop_front();
        }
        let Some(last) = self.0.back() else { return Some(now) };
        if self.0.len() >= STARTS_MAX {
            return None;
        }
        let doubled = PAUSE_MIN * (1 << (self.0.len() - 1));
        Some(now.max(*last + doubled.min(PAUSE_MAX)))
    }

    /// Counts a start.
    pub fn started(&mut self, now: Instant) {
        self.0.push_back(now);
    }

    /// Starts of the last minute.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Forgets them all: somebody has looked after it.
    pub fn forgive(&mut self) {
        self.0.clear();
    }
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
