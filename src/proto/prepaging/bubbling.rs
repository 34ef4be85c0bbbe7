//! Adaptive pre-paging by bubbling: pages around the last faults first.
//!
//! After Hines and Gopalan, "Post-copy based live virtual machine migration using
//! adaptive pre-paging and dynamic self-ballooning" (VEE 2009): each fault is a
//! *pivot*, around which a *bubble* of sent pages grows in both directions. A few
//! pivots are kept, the oldest is retired, bubbles that meet become one, and when
//! no bubble can grow the rest goes out linearly.
//!
//! What differs from the paper, and why (measured with the model in `model.rs` and with
//! traces of real guests):
//!
//! * **The newest pivot gets the whole link**, not a share of it, until the next
//!   event. A guest that waits is near its last fault; on a gigabit link some 30
//!   pages pass between two faults of one vCPU, too few to share. Older pivots are
//!   where to go on once the newest bubble cannot grow.
//! * **A bubble may lean.** Faults and late hits that follow each other upward (or
//!   downward) are a reader moving that way; growing the other way would halve the
//!   rate at which it is fed. Such a bubble becomes a *stream*: it grows on that side
//!   only, over whatever is sent, to the end of memory. It has the whole link for
//!   as long as its reader makes the last event, so it is ahead by all that the link carries.
//! * **Late hits count.** They bring no page closer but say where the guest is. A
//!   reader that is fed just too slowly makes late hits *only*.
//! * **One vCPU at a time.** When several vCPUs wait, halving the link between them
//!   lets all of them wait until the end; serving one first lets that one go early
//!   and delays no other's end. So pivots of the vCPU in *focus* go first, and the
//!   focus moves on when that vCPU has made none of the last [`FOCUS_EVENTS`]
//!   events. Another vCPU's fault gets a few neighbours only.
//!
//! A bubble that does not stream leaps over [`LEAP_PAGES_MAX`] sent pages at most:
//! what lies behind is no neighbour of the fault any more.

use super::{
    Fault, LinkState, Origin, PIVOTS_MAX, Policy, PolicyConfig, Suggestion, Unsent, run_around,
    run_down, run_up,
};
use crate::proto::page::{PAGE_SIZE, PageRun};
use std::cmp::Reverse;

/// The first run above a pivot. First touches cluster at 64 KiB and 2 MiB, more often upward.
const NEIGHBOURS_UP: u32 = 32;
/// The first run below it, so that a long one above does not delay it.
const NEIGHBOURS_DOWN: u32 = 16;
/// The pages that go at once around a fault of a vCPU out of focus.
const NEIGHBOURS_OTHER: u32 = 8;
/// Events after which a vCPU that made none of them is out of focus.
const FOCUS_EVENTS: u64 = 40;
/// The most sent pages that a bubble's edge leaps over: 2 MiB.
const LEAP_PAGES_MAX: u64 = 512;
/// How far apart two events may be to show a direction, and how far outside a
/// bubble an event still belongs to it.
const NEAR_PAGES: u64 = 64;
/// Two events so close count twice for the direction: 64 KiB.
const STEP_PAGES: u64 = 16;
/// The lean from which a bubble is a stream.
const STREAM_LEAN: i8 = 2;
/// Where leaning ends.
const LEAN_MAX: i8 = 4;

/// Pushes around the last faults; see the module's text.
#[derive(Clone, Debug)]
pub struct Bubbling {
    pages: u64,
    pivots_max: usize,
    pivots: Vec<Pivot>,
    /// Events heard, which orders pivots by age.
    events: u64,
    /// The vCPU whose pivots go first; `None` is one too, of all unattributed faults.
    focus: Option<u32>,
    /// The last event of that vCPU.
    focused_at: u64,
    /// Where the linear push goes on when no bubble can grow.
    cursor: u64,
    /// How far apart two events of one stream may be.
    stream_near: u64,
}

/// A bubble, and what is known about the reader that it grows around.
#[derive(Clone, Debug)]
struct Pivot {
    /// The bubble's first page.
    low: u64,
    /// The page after its last one.
    high: u64,
    /// Nothing is left to push below it, or it is too far off.
    low_done: bool,
    /// The same above it.
    high_done: bool,
    /// The page of the last event.
    last: u64,
    /// Who made it.
    vcpu: Option<u32>,
    /// The number of that event.
    event: u64,
    /// The weight of the last events in a row upward (positive) or downward (negative).
    lean: i8,
    /// Pages around a new fault that are still to go before anything else.
    neighbours: u32,
    /// Which way a bubble that does not stream grows next.
    up_next: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

impl Bubbling {
    /// A policy without pivots: it begins linearly at page 0.
    pub fn new(config: PolicyConfig) -> Self {
        let pivots_max = config.pivots_max.clamp(1, PIVOTS_MAX);
        Self {
            pages: config.pages,
            pivots_max,
            pivots: Vec::with_capacity(pivots_max + 1),
            events: 0,
            focus: None,
            focused_at: 0,
            cursor: 0,
            stream_near: 2 * NEAR_PAGES,
        }
    }

    /// How many pivots it has now, at most `pivots_max`.
    pub fn pivots(&self) -> usize {
        self.pivots.len()
    }

    #[cfg(test)]
    pub(super) fn bubbles_are_apart(&self) -> bool {
        let pairs = |a: usize| (0..a).map(move |b| (a, b));
        (0..self.pivots.len())
            .flat_map(pairs)
            .all(|(a, b)| !self.pivots[a].touches(&self.pivots[b]))
    }

    fn event(&mut self, fault: Fault, late: bool) {
        let page = fault.page.get();
        if page >= self.pages {
            return;
        }
        if !late {
            self.cursor = page;
        }
        self.events += 1;
        let mut neighbours = self.refocus(fault.vcpu);
        let newest = self.newest_of(fault.vcpu);
        let mut fresh = Pivot::new(fault, self.events, self.pages);
        if let Some(index) = self.nearest(page) {
            let pivot = &mut self.pivots[index];
            if newest == Some(index) {
                pivot.vote(page, self.stream_near);
            }
            let inside = pivot.contains(page);
            if inside || pivot.streams().is_some() {
                pivot.hear(fault, self.events, neighbours);
                if !late || !inside {
                    // Either the bubble has a hole here, or its reader has overtaken it.
                    pivot.centre(page, self.pages);
                }
                return self.merge(index);
            }
            // The bubble has not got there yet, and the page may be the edge of
            // something else: a pivot of its own, that inherits the direction.
            if newest == Some(index) {
                fresh.lean = pivot.lean;
            }
            (pivot.lean, pivot.neighbours) = (0, 0);
        } else if late {
            // Its neighbours are likely to be on their way as well.
            neighbours = 0;
        }
        fresh.neighbours = neighbours;
        self.admit(fresh);
    }

    /// Takes in that `vcpu` waits; says how many pages around its fault go first.
    fn refocus(&mut self, vcpu: Option<u32>) -> u32 {
        let idle = self.events - self.focused_at > FOCUS_EVENTS || self.focused_at == 0;
        if vcpu != self.focus && !idle {
            return NEIGHBOURS_OTHER;
        }
        (self.focus, self.focused_at) = (vcpu, self.events);
        NEIGHBOURS_UP + NEIGHBOURS_DOWN
    }

    /// The pivot whose bubble holds `page`, or nearly so; of several the newest.
    fn nearest(&self, page: u64) -> Option<usize> {
        (0..self.pivots.len())
            .filter(|&index| self.pivots[index].distance(page) <= NEAR_PAGES)
            .min_by_key(|&index| {
                let pivot = &self.pivots[index];
                (!pivot.contains(page), Reverse(pivot.event))
            })
    }

    /// The pivot where this vCPU's last event was. Only there does another one show a
    /// direction: in a region that is hit at random, some older event always
    /// lies close by.
    fn newest_of(&self, vcpu: Option<u32>) -> Option<usize> {
        (0..self.pivots.len())
            .filter(|&index| self.pivots[index].vcpu == vcpu)
            .max_by_key(|&index| self.pivots[index].event)
    }

    fn admit(&mut self, pivot: Pivot) {
        self.pivots.push(pivot);
        self.merge(self.pivots.len() - 1);
        if self.pivots.len() <= self.pivots_max {
            return;
        }
        // A slow reader amid many scattered faults must not be forgotten between two
        // of its own: streams live longer.
        let grace = 4 * self.pivots_max as u64;
        let age = |pivot: &Pivot| pivot.event + pivot.streams().map_or(0, |_| grace);
        if let Some(oldest) = (0..self.pivots.len()).min_by_key(|&i| age(&self.pivots[i])) {
            self.pivots.swap_remove(oldest);
        }
    }

    /// Makes one bubble of the one at `index` and all that it touches.
    fn merge(&mut self, mut index: usize) {
        let mut other = 0;
        while other < self.pivots.len() {
            if other == index || !self.pivots[index].touches(&self.pivots[other]) {
                other += 1;
                continue;
            }
            let rank = |pivot: &Pivot| (pivot.streams().is_some(), pivot.event);
            let (keep, drop) = if rank(&self.pivots[index]) >= rank(&self.pivots[other]) {
                (index, other)
            } else {
                (other, index)
            };
            let dropped = self.pivots[drop].clone();
            self.pivots[keep].absorb(&dropped);
            self.pivots.swap_remove(drop);
            // The last pivot moved into the hole.
            index = if keep == self.pivots.len() { drop } else { keep };
            // The union may touch what neither touched.
            other = 0;
        }
    }

    /// Whose turn it is: first the neighbours of new faults, then the pivots of the
    /// focus, then all others; among equals the newest.
    fn whose_turn(&self) -> Option<usize> {
        (0..self.pivots.len()).filter(|&index| self.pivots[index].can_grow()).min_by_key(|&index| {
            let pivot = &self.pivots[index];
            let class = match pivot.streams() {
                None if pivot.neighbours > 0 => 0,
                _ if pivot.vcpu == self.focus => 1,
                _ => 2,
            };
            (class, Reverse(pivot.event))
        })
    }
}

impl Policy for Bubbling {
    fn name(&self) -> &'static str {
        "bubbling"
    }

    fn fault(&mut self, fault: Fault) {
        self.event(fault, false);
    }

    fn late_hit(&mut self, fault: Fault) {
        self.event(fault, true);
    }

    /// Late hits lie anywhere in what is under way, about a round trip of the link
    /// and a millisecond's queue: that far apart are two events of one stream.
    fn link(&mut self, link: LinkState) {
        let pages_a_second = link.rate_bps as f64 / (8 * PAGE_SIZE) as f64;
        let under_way = (link.rtt.as_secs_f64() + 0.001) * pages_a_second;
        self.stream_near = (2.0 * under_way).clamp(128.0, 2048.0) as u64;
    }

    /// Changes nothing: it pushes all the time.
    fn drain(&mut self) {}

    fn next(&mut self, unsent: &dyn Unsent, pages_max: u32) -> Option<Suggestion> {
        if pages_max == 0 {
            return None;
        }
        // Each pass hands out a run or closes a side of a bubble.
        while let Some(index) = self.whose_turn() {
            if let Some(run) = self.pivots[index].grow(unsent, pages_max) {
                self.merge(index);
                return Some(Suggestion { run, origin: Origin::Push });
            }
        }
        let run = run_around(unsent, self.cursor, pages_max)?;
        self.cursor = run.end();
        Some(Suggestion { run, origin: Origin::Push })
    }
}

impl Pivot {
    fn new(fault: Fault, event: u64, pages: u64) -> Self {
        let page = fault.page.get();
        Self {
            low: page,
            high: page + 1,
            low_done: page == 0,
            high_done: page + 1 >= pages,
            last: page,
            vcpu: fault.vcpu,
            event,
            lean: 0,
            neighbours: 0,
            up_next: true,
        }
    }

    fn contains(&self, page: u64) -> bool {
        (self.low..self.high).contains(&page)
    }

    /// Pages between the bubble and `page`; 0 for one inside or just outside.
    fn distance(&self, page: u64) -> u64 {
        if page < self.low { self.low - page - 1 } else { page.saturating_sub(self.high) }
    }

    fn touches(&self, other: &Pivot) -> bool {
        self.low <= other.high && other.low <= self.high
    }

    fn streams(&self) -> Option<Direction> {
        match self.lean {
            STREAM_LEAN.. => Some(Direction::Up),
            ..0 if self.lean <= -STREAM_LEAN => Some(Direction::Down),
            _ => None,
        }
    }

    fn can_grow(&self) -> bool {
        !(self.low_done && self.high_done)
    }

    /// Takes in its reader's next event as a sign of where it goes.
    fn vote(&mut self, page: u64, stream_near: u64) {
        let distance = page.abs_diff(self.last);
        let up = page > self.last;
        let on_track = match self.streams() {
            Some(Direction::Up) => {
                up && (distance <= stream_near || page + stream_near >= self.high)
            }
            Some(Direction::Down) => {
                !up && (distance <= stream_near || page <= self.low + stream_near)
            }
            None => distance <= NEAR_PAGES,
        };
        if distance == 0 {
            return;
        }
        if !on_track {
            self.lean = 0;
            return;
        }
        let weight = if distance <= STEP_PAGES { 2 } else { 1 };
        let vote = if up { weight } else { -weight };
        self.lean = if self.lean * vote < 0 { vote } else { self.lean + vote };
        self.lean = self.lean.clamp(-LEAN_MAX, LEAN_MAX);
    }

    /// Takes in an event in or near the bubble.
    fn hear(&mut self, fault: Fault, event: u64, neighbours: u32) {
        (self.last, self.vcpu, self.event) = (fault.page.get(), fault.vcpu, event);
        self.neighbours = neighbours;
    }

    /// Begins anew around `page`.
    fn centre(&mut self, page: u64, pages: u64) {
        (self.low, self.low_done) = (page, page == 0);
        (self.high, self.high_done) = (page + 1, page + 1 >= pages);
        self.up_next = true;
    }

    /// Takes over the outer edges of `other`, which touches it.
    fn absorb(&mut self, other: &Pivot) {
        if other.low < self.low {
            (self.low, self.low_done) = (other.low, other.low_done);
        }
        if other.high > self.high {
            (self.high, self.high_done) = (other.high, other.high_done);
        }
    }

    /// The next run at one of its edges; `None` if that edge is at its end.
    fn grow(&mut self, unsent: &dyn Unsent, pages_max: u32) -> Option<PageRun> {
        let direction = self.direction();
        let streams = self.streams().is_some();
        let leap_max = if streams { u64::MAX } else { LEAP_PAGES_MAX };
        let count_max = match direction {
            _ if streams || self.neighbours == 0 => pages_max,
            Direction::Up => pages_max.min(NEIGHBOURS_UP).min(self.neighbours),
            Direction::Down => pages_max.min(NEIGHBOURS_DOWN).min(self.neighbours),
        };
        let run = match direction {
            Direction::Up => run_up(unsent, self.high, count_max)
                .filter(|run| run.first().get() - self.high <= leap_max),
            Direction::Down => self
                .low
                .checked_sub(1)
                .and_then(|from| run_down(unsent, from, count_max))
                .filter(|run| self.low - run.end() <= leap_max),
        };
        self.up_next = direction == Direction::Down;
        match (run, direction) {
            (Some(run), Direction::Up) => self.high = run.end(),
            (Some(run), Direction::Down) => self.low = run.first().get(),
            // All that the stream's reader can come to is sent.
            (None, _) if streams => (self.low_done, self.high_done) = (true, true),
            (None, Direction::Up) => self.high_done = true,
            (None, Direction::Down) => self.low_done = true,
        }
        self.neighbours = self.neighbours.saturating_sub(run.map_or(0, |run| run.count() as u32));
        run
    }

    fn direction(&self) -> Direction {
        match (self.low_done, self.high_done, self.streams()) {
            (true, false, _) => Direction::Up,
            (false, true, _) => Direction::Down,
            (_, _, Some(direction)) => direction,
            _ if self.up_next => Direction::Up,
            _ => Direction::Down,
        }
    }
}
