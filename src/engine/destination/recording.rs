//! [`Recording`]: when each fault was read and when each run of pages was placed, for whoever
//! wants to see how a migration went and not only what it came to.
//!
//! It is off unless asked for; the fault path then has a branch more. On, an event costs an
//! atomic addition and two stores into memory that was touched before. It has room for so many
//! events and no more; those that come later are counted. What is kept in the end is
//! [`Recorded`].

use super::record_file::{EventKind, Recorded, RecordedEvent};
use crate::proto::frame::{FrameHeader, Origin, PageKind};
use crate::proto::page::PageIndex;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The most events of a recording: 64 MiB.
pub const EVENTS_MAX: u64 = 4 << 20;
/// Room beyond a fault and a run for each page: for what is placed again, or waited for twice.
const MORE_EVENTS: u64 = 4096;

/// Events as they happen, on any thread.
#[derive(Debug)]
pub struct Recording {
    began: Instant,
    pages: u64,
    next: AtomicU64,
    /// A time, and [`RecordedEvent`] without it; all zero where nothing was written.
    slots: Box<[[AtomicU64; 2]]>,
    entered: OnceLock<Instant>,
}

impl Recording {
    /// For a guest of so many pages.
    pub fn new(pages: u64) -> Self {
        let room = pages.saturating_mul(2).saturating_add(MORE_EVENTS).min(EVENTS_MAX);
        Self::with_room(pages, room as usize)
    }

    fn with_room(pages: u64, room: usize) -> Self {
        let slots = (0..room).map(|_| [AtomicU64::new(0), AtomicU64::new(0)]).collect();
        let (began, next, entered) = (Instant::now(), AtomicU64::new(0), OnceLock::new());
        Self { began, pages, next, slots, entered }
    }

    /// A fault was read.
    pub fn fault(&self, page: PageIndex, vcpu: Option<u16>, at: Instant) {
        self.event(EventKind::Fault, page.get(), 1, vcpu, at);
    }

    /// What a frame brought was placed.
    pub fn placed(&self, frame: &FrameHeader, at: Instant) {
        let kind = match (frame.kind, frame.origin) {
            (PageKind::Zero, _) => EventKind::Zero,
            (PageKind::Hole, _) => EventKind::Hole,
            (PageKind::Poison, _) => EventKind::Poison,
            (_, Origin::Seed) => EventKind::Seed,
            (_, Origin::Demand) => EventKind::Demand,
            (_, Origin::Push) => EventKind::Push,
            (_, Origin::Drain) => EventKind::Drain,
            // It is not placed then.
            (_, Origin::Copy) => return,
        };
        let (mut first, mut left) = (frame.run.first().get(), frame.run.count());
        // Only runs of zeros and holes are longer than one event.
        while left > 0 {
            let count = left.min(u64::from(u16::MAX));
            self.event(kind, first, count as u16, None, at);
            (first, left) = (first + count, left - count);
        }
    }

    /// The first vCPU entered the guest.
    pub fn entered(&self, at: Instant) {
        self.entered.get_or_init(|| at);
    }

    fn event(&self, kind: EventKind, page: u64, count: u16, vcpu: Option<u16>, at: Instant) {
        let slot = self.next.fetch_add(1, Ordering::Relaxed);
        // A page that cannot be written down is as one too many: 2^32 pages are 16 TiB.
        let (Some([time, what]), Ok(page)) = (self.slots.get(slot as usize), u32::try_from(page))
        else {
            return;
        };
        let vcpu = vcpu.and_then(|vcpu| u8::try_from(vcpu).ok());
        let event = RecordedEvent { at_ns: self.since(at), page, count, kind, vcpu };
        time.store(event.at_ns, Ordering::Relaxed);
        what.store(event.packed(), Ordering::Relaxed);
    }

    fn since(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.began).as_nanos() as u64
    }

    /// All of it, in order of time, once nobody records any more; `steps` are the guest's, by
    /// the time since its first entry.
    pub fn take(&self, steps: &[(Duration, u64)], steady_per_second: Option<u64>) -> Recorded {
        let mut events: Vec<_> = self
            .slots
            .iter()
            .take(self.next.load(Ordering::Relaxed) as usize)
            .filter_map(|[time, what]| {
                let what = what.load(Ordering::Relaxed);
                RecordedEvent::unpacked(time.load(Ordering::Relaxed), what)
            })
            .collect();
        events.sort_by_key(|event| event.at_ns);
        let dropped = self.next.load(Ordering::Relaxed).saturating_sub(events.len() as u64);
        let entered_ns = self.entered.get().map(|at| self.since(*at));
        let from = entered_ns.unwrap_or(0);
        let steps = steps.iter().map(|(at, steps)| (from + at.as_nanos() as u64, *steps));
        let steps = steps.collect();
        Recorded { pages: self.pages, dropped, entered_ns, steady_per_second, events, steps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::frame::PageKind;
    use crate::proto::page::PageRun;

    fn frame(kind: PageKind, origin: Origin, first: u64, count: u64) -> FrameHeader {
        let run = PageRun::new(PageIndex::new(first), count).unwrap();
        FrameHeader { kind, origin, run, epoch: 0, content_len: 0 }
    }

    #[test]
    fn what_happened_is_found_in_order_of_time() {
        let recording = Recording::new(100_000);
        let at = |micros| recording.began + Duration::from_micros(micros);
        recording.placed(&frame(PageKind::Raw, Origin::Push, 64, 32), at(30));
        recording.fault(PageIndex::new(7), Some(1), at(10));
        recording.fault(PageIndex::new(9), None, at(15));
        recording.placed(&frame(PageKind::Raw, Origin::Demand, 7, 1), at(20));
        recording.placed(&frame(PageKind::Hole, Origin::Push, 10, 70_000), at(40));
        recording.entered(at(5));
        let steps = [(Duration::from_micros(1), 100), (Duration::from_micros(2), 200)];
        let recorded = recording.take(&steps, Some(1_000_000));
        let seen: Vec<_> = recorded
            .events
            .iter()
            .map(|event| (event.at_ns / 1000, event.page, event.count, event.kind, event.vcpu))
            .collect();
        assert_eq!(
            seen,
            [
                (10, 7, 1, EventKind::Fault, Some(1)),
                (15, 9, 1, EventKind::Fault, None),
                (20, 7, 1, EventKind::Demand, None),
                (30, 64, 32, EventKind::Push, None),
                (40, 10, 65_535, EventKind::Hole, None),
                (40, 65_545, 4465, EventKind::Hole, None),
            ]
        );
        assert_eq!((recorded.pages, recorded.dropped), (100_000, 0));
        assert_eq!(recorded.entered_ns, Some(5000));
        assert_eq!(recorded.steps, [(6000, 100), (7000, 200)]);
    }

    #[test]
    fn what_there_is_no_room_for_is_counted() {
        let recording = Recording::with_room(16, 2);
        for page in 0..5 {
            recording.fault(PageIndex::new(page), None, Instant::now());
        }
        let recorded = recording.take(&[], None);
        assert_eq!((recorded.events.len(), recorded.dropped), (2, 3));
    }

    #[test]
    fn a_thread_costs_no_other_its_events() {
        let recording = Recording::new(200_000);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let recording = &recording;
                scope.spawn(move || {
                    for page in (thread..200_000).step_by(4) {
                        recording.fault(PageIndex::new(page), Some(thread as u16), Instant::now());
                    }
                });
            }
        });
        let recorded = recording.take(&[], None);
        let mut pages: Vec<_> = recorded.events.iter().map(|event| event.page).collect();
        pages.sort_unstable();
        assert_eq!(pages, (0..200_000).collect::<Vec<_>>());
        assert!(recorded.events.iter().all(|event| event.vcpu == Some((event.page % 4) as u8)));
    }
}
