//! [`Outages`]: when a link was lost after the commit and when the next one stood, for
//! progress and report.
//!
//! Nothing here decides anything. Times are of `CLOCK_MONOTONIC`, which all processes of a
//! host share, so that whoever runs both sides on one host can compare them.

use crate::report::schema::{Outage, OutageTimes};
use std::time::{Duration, Instant};

/// Outages that are kept; of more only the last is, in the place of the last one kept.
const KEPT_MAX: usize = 128;

/// One outage.
#[derive(Clone, Debug)]
struct Entry {
    why: String,
    lost_at: Instant,
    up_at: Option<Instant>,
    epoch: Option<u32>,
    attempts: u32,
    resent: Option<u64>,
    first_placed_at: Option<Instant>,
}

/// The outages of a session, as one side saw them.
#[derive(Debug, Default)]
pub struct Outages {
    entries: Vec<Entry>,
    ended: u32,
}

impl Outages {
    /// The link is lost now, and was not before.
    pub fn lost(&mut self, why: &str) {
        if self.open().is_some() {
            return;
        }
        if self.entries.len() == KEPT_MAX {
            self.entries.pop();
        }
        self.entries.push(Entry {
            why: why.to_owned(),
            lost_at: Instant::now(),
            up_at: None,
            epoch: None,
            attempts: 0,
            resent: None,
            first_placed_at: None,
        });
    }

    /// So many pages are to be sent again after the outage that lasts.
    pub fn resent(&mut self, pages: u64) {
        if let Some(entry) = self.entries.last_mut() {
            entry.resent = Some(pages);
        }
    }

    /// A link of `epoch` stands, after so many attempts.
    pub fn up(&mut self, epoch: u32, attempts: u32) {
        if let Some(entry) = self.entries.last_mut().filter(|entry| entry.up_at.is_none()) {
            (entry.up_at, entry.epoch) = (Some(Instant::now()), Some(epoch));
            entry.attempts = attempts;
            self.ended += 1;
        }
    }

    /// The first page after the outage before `epoch` was placed.
    pub fn first_placed(&mut self, epoch: u32, at: Instant) {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.epoch == Some(epoch)) {
            entry.first_placed_at = Some(at);
        }
    }

    /// Since when the link is gone, if it is, and why.
    pub fn open(&self) -> Option<(Instant, &str)> {
        let last = self.entries.last().filter(|entry| entry.up_at.is_none())?;
        Some((last.lost_at, &last.why))
    }

    /// How many have ended.
    pub fn ended(&self) -> u32 {
        self.ended
    }

    /// As the source's report has them.
    pub fn of_source(&self) -> Vec<Outage> {
        self.entries
            .iter()
            .map(|entry| Outage {
                epoch: entry.epoch,
                why: Some(entry.why.clone()),
                attempts: Some(entry.attempts),
                resent_pages: entry.resent,
                source: Some(times(entry)),
                destination: None,
            })
            .collect()
    }

    /// As the destination's report has them. It holds no text: it goes to the peer.
    pub fn of_destination(&self) -> Vec<Outage> {
        self.entries
            .iter()
            .map(|entry| Outage {
                epoch: entry.epoch,
                destination: Some(times(entry)),
                ..Outage::default()
            })
            .collect()
    }
}

fn times(entry: &Entry) -> OutageTimes {
    OutageTimes {
        lost_at_us: monotonic_us(entry.lost_at),
        up_at_us: entry.up_at.and_then(monotonic_us),
        first_placed_at_us: entry.first_placed_at.and_then(monotonic_us),
    }
}

/// `at` as microseconds of `CLOCK_MONOTONIC`.
fn monotonic_us(at: Instant) -> Option<u64> {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC;
    let now = Duration::from(nix::time::clock_gettime(clock).ok()?);
    now.checked_sub(at.elapsed()).map(|at| at.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_one_however_often_it_is_told_of_and_the_number_kept_is_bounded() {
        let mut outages = Outages::default();
        outages.lost("first");
        outages.lost("an attempt that failed");
        assert_eq!(outages.open().map(|(_, why)| why), Some("first"));
        outages.resent(7);
        outages.up(3, 2);
        outages.up(4, 0);
        outages.first_placed(3, Instant::now());
        assert!(outages.open().is_none());
        let [told] = &outages.of_source()[..] else { panic!("one") };
        assert_eq!((told.epoch, told.attempts, told.resent_pages), (Some(3), Some(2), Some(7)));
        let times = told.source.as_ref().unwrap();
        assert!(times.lost_at_us <= times.up_at_us && times.up_at_us <= times.first_placed_at_us);
        for epoch in 4..1000 {
            outages.lost("again");
            outages.up(epoch, 1);
        }
        assert_eq!(outages.ended(), 997);
        assert_eq!(outages.of_destination().len(), KEPT_MAX);
        assert_eq!(outages.of_destination().last().unwrap().epoch, Some(999));
    }
}
