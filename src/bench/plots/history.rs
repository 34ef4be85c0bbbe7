//! [`History`]: what a recording tells of each wait and of each page's arrival.

use crate::engine::destination::{EventKind, Recorded};
use std::collections::BTreeMap;

/// A vCPU that waited for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// When its fault was read, in nanoseconds since the first vCPU entered the guest.
    pub from_ns: u64,
    /// How long until the page was placed.
    pub took_ns: u64,
    /// Whether the page was on its way already, and not asked for because of this fault.
    pub late: bool,
}

/// Pages that were placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When, in nanoseconds since the first vCPU entered the guest.
    pub at_ns: u64,
    /// The first of them.
    pub page: u32,
    /// How many.
    pub count: u16,
    /// Why they came.
    pub kind: EventKind,
}

/// A recording, from the first vCPU's entry on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Pages of the guest.
    pub pages: u64,
    /// Waits for the network, by the time of their end.
    pub waits: Vec<Wait>,
    /// Pages with content, by the time of their arrival.
    pub arrivals: Vec<Arrival>,
    /// When the last page was placed.
    pub end_ns: u64,
    /// The guest's steps over time.
    pub steps: Vec<(u64, u64)>,
    /// Its steps a second with all its memory.
    pub steady_per_second: Option<u64>,
}

impl History {
    /// Of this recording; nothing if the guest never ran.
    pub fn of(recorded: &Recorded) -> Option<Self> {
        let entered = recorded.entered_ns?;
        let since = |at: u64| at.saturating_sub(entered);
        let mut history = Self {
            pages: recorded.pages,
            steps: recorded.steps.iter().map(|(at, steps)| (since(*at), *steps)).collect(),
            steady_per_second: recorded.steady_per_second,
            ..Self::default()
        };
        // Faults that no page has answered yet, by page.
        let mut open: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        for event in &recorded.events {
            let (at, page) = (event.at_ns, event.page);
            if event.kind == EventKind::Fault {
                open.entry(page).or_default().push(at);
                continue;
            }
            let to = u64::from(page) + u64::from(event.count);
            let answered: Vec<u32> = open
                .range(page..)
                .take_while(|(page, _)| u64::from(**page) < to)
                .map(|(page, _)| *page)
                .collect();
            for page in answered {
                let waited = open.remove(&page).unwrap_or_default();
                // Answered without the source.
                if matches!(event.kind, EventKind::Zero | EventKind::Hole) {
                    continue;
                }
                history.waits.extend(waited.into_iter().enumerate().map(|(nth, from)| Wait {
                    from_ns: since(from),
                    took_ns: at.saturating_sub(from),
                    late: nth > 0 || event.kind != EventKind::Demand,
                }));
            }
            if !matches!(event.kind, EventKind::Zero | EventKind::Hole | EventKind::Poison) {
                let (at_ns, count, kind) = (since(at), event.count, event.kind);
                history.arrivals.push(Arrival { at_ns, page, count, kind });
                history.end_ns = history.end_ns.max(at_ns);
            }
        }
        // What is open now crossed with the placement of its page, and did not wait.
        Some(history)
    }

    /// The time that the plots show: until the last page was placed.
    pub fn span_ns(&self) -> u64 {
        self.end_ns.max(1)
    }

    /// Sums what `of` gives for times, over each of `bins` equal parts of the span.
    pub fn binned(&self, bins: usize, of: impl Iterator<Item = (u64, f64)>) -> Vec<f64> {
        let mut sums = vec![0.0; bins];
        for (at, value) in of {
            let bin = u128::from(at) * bins as u128 / u128::from(self.span_ns());
            if let Some(sum) = sums.get_mut((bin as usize).min(bins.saturating_sub(1))) {
                *sum += value;
            }
        }
        sums
    }
}

#[cfg(test)]
pub(in crate::bench) mod tests {
    use super::*;
    use crate::engine::destination::RecordedEvent;

    /// A small recording with each kind of wait.
    pub fn recorded() -> Recorded {
        let event = |at_us: u64, kind, page, count| RecordedEvent {
            at_ns: at_us * 1000,
            page,
            count,
            kind,
            vcpu: None,
        };
        Recorded {
            pages: 256,
            dropped: 0,
            entered_ns: Some(100_000),
            steady_per_second: Some(1_000_000),
            events: vec![
                event(50, EventKind::Seed, 0, 2),
                // A network fault, and another vCPU's on the same page.
                event(110, EventKind::Fault, 7, 1),
                event(130, EventKind::Fault, 7, 1),
                event(160, EventKind::Demand, 7, 1),
                // One on a page that was on its way, one on a hole, one that crossed.
                event(170, EventKind::Fault, 20, 1),
                event(175, EventKind::Fault, 200, 1),
                event(180, EventKind::Push, 16, 64),
                event(190, EventKind::Hole, 192, 64),
                event(195, EventKind::Fault, 30, 1),
                event(200, EventKind::Drain, 100, 20),
            ],
            steps: vec![(110_000, 10), (150_000, 20), (200_000, 70)],
        }
    }

    #[test]
    fn each_wait_is_a_network_fault_or_a_late_hit_or_none() {
        let history = History::of(&recorded()).unwrap();
        let waits: Vec<_> =
            history.waits.iter().map(|wait| (wait.from_ns, wait.took_ns, wait.late)).collect();
        assert_eq!(
            waits,
            [(10_000, 50_000, false), (30_000, 30_000, true), (70_000, 10_000, true)]
        );
        let kinds: Vec<_> = history.arrivals.iter().map(|of| (of.at_ns, of.kind)).collect();
        assert_eq!(
            kinds,
            [
                (0, EventKind::Seed),
                (60_000, EventKind::Demand),
                (80_000, EventKind::Push),
                (100_000, EventKind::Drain),
            ]
        );
        assert_eq!(history.end_ns, 100_000);
        assert_eq!(history.steps[0], (10_000, 10));
        let arrivals = history.arrivals.iter().map(|of| (of.at_ns, f64::from(of.count)));
        assert_eq!(history.binned(4, arrivals), [2.0, 0.0, 1.0, 84.0]);
        assert_eq!(History::of(&Recorded { entered_ns: None, ..recorded() }), None);
    }
}
