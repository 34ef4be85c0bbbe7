//! Adaptive pre-paging by bubbling: pages around the last faults first.
//!
//! After Hines and Gopalan, "Post-copy based live virtual machine migration using
//! adaptive pre-paging and dynamic self-ballooning" (VEE 2009): each fault is a
//! *pivot*, around which a *bubble* of sent pages grows in both directions. A few
//! pivots are kept, the newest is served first, the oldest is retired, bubbles
//! that meet become one, and when no bubble can grow the rest goes out linearly.
//!
//! Three things differ from the paper, each for a reason:
//!
//! * **A bubble may lean.** Faults and late hits that keep coming on one side of
//!   a pivot's last event are a reader moving that way. Growing the other way
//!   then halves the rate at which the reader is fed, so after
//!   [`STREAM_LEAN`] such events in a row the bubble is a *stream*: it grows on
//!   that side only and is kept two round trips of the reader's own pace ahead of it,
//!   before anything else is pushed; a page asked for from further behind is late anyway.
//! * **Late hits count.** A late hit brings no page closer, but it says where the
//!   guest is. A reader that is fed just too slowly makes *only* late hits, so without them it would
//!   look as if it had stopped.
//! * **The first 64 KiB on each side go first.** First touches of guest physical
//!   memory cluster at 64 KiB and 2 MiB. With one vCPU waiting, a gigabit link carries some 30
//!   pages a fault; a longer first run would spend them all on one side.
//!
//! A bubble does not leap over more than [`LEAP_PAGES_MAX`] sent pages, for what
//! lies behind is no neighbour of the fault any more.

use super::{
    Fault, LinkState, Origin, PIVOTS_MAX, Policy, PolicyConfig, Suggestion, Unsent, run_around,
    run_down, run_up,
};
use crate::proto::page::{PAGE_SIZE, PageRun};
use std::cmp::Reverse;
use std::time::Duration;

/// What goes above a pivot before anything else.
const NEIGHBOUR_PAGES_UP: u32 = 32;
/// And below it.
const NEIGHBOUR_PAGES_DOWN: u32 = 16;
fn env(name: &str, default: u64) -> u64 { std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default) }
/// The most sent pages that a bubble's edge leaps over: 2 MiB.
const LEAP_PAGES_MAX: u64 = 512;
/// Events in a row on one side that make a bubble a stream.
const STREAM_LEAN: i8 = 2;
/// Where the count of such events stops.
const LEAN_MAX: i8 = 4;
/// How far outside a bubble a fault may lie and still tell of its direction.
const NEAR_PAGES: u64 = 64;
/// An event so close to the last one counts twice: 64 KiB.
const STEP_PAGES: u64 = 16;
/// The least that a stream is kept ahead of its reader.
const AHEAD_PAGES_MIN: u64 = 128;
/// The most (16 MiB): a pace is only an estimate.
const AHEAD_PAGES_MAX: u64 = 4096;

/// Pushes around the last faults; see the module's text.
#[derive(Clone, Debug)]
pub struct Bubbling {
    pages: u64,
    pivots_max: usize,
    pivots: Vec<Pivot>,
    /// Events heard, which orders pivots by age.
    events: u64,
    /// Turns given, which makes the round robin.
    turns: u64,
    /// Where the linear push goes on when no bubble can grow.
    cursor: u64,
    link: Option<LinkState>,
    focus: Option<u32>,
    focused_at: u64,
}

/// A bubble and what is known about the reader that it grows around.
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
    /// When that was.
    last_at: Duration,
    /// Who made it.
    vcpu: Option<u32>,
    /// The number of that event.
    event: u64,
    /// Events in a row upward (positive) or downward (negative).
    lean: i8,
    /// The reader's pace in pages a second, while it moves one way.
    pace: f64,
    /// How far a stream is kept ahead of its reader, in pages.
    ahead: u64,
    /// Pages that it may push before pivots without credit.
    credit: u64,
    /// When it had its last turn; 0 asks for the next one.
    turn: u64,
    /// Which way a bubble that does not lean grows next.
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
        let pivots_max = env("K", config.pivots_max as u64).clamp(1, 64) as usize;
        Self {
            pages: config.pages,
            pivots_max,
            pivots: Vec::with_capacity(pivots_max + 1),
            events: 0,
            turns: 0,
            cursor: 0,
            link: None,
            focus: None,
            focused_at: 0,
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
        self.events += 1;
        if fault.vcpu == self.focus {
            self.focused_at = self.events;
        } else if self.events - self.focused_at > env("FEVENTS", 16) || self.focused_at == 0 {
            self.focus = fault.vcpu;
            self.focused_at = self.events;
        }
        let focused = fault.vcpu == self.focus || env("FOCUS", 1) == 0;
        let credit = if focused { env("CREDIT", 48) } else { env("OCREDIT", 16) };
        let near = self.near_pages();
        let newest = self.newest_of(fault.vcpu);
        match self.nearest(page) {
            Some(index) => {
                let (pages, rtt) = (self.pages, self.rtt());
                let pivot = &mut self.pivots[index];
                if newest == Some(index) {
                    pivot.vote(page, fault.at, near);
                }
                if !late && (pivot.contains(page) || pivot.streams().is_some()) {
                    // An unsent page inside: the bubble has a hole here.
                    pivot.centre(page, pages);
                }
                if pivot.streams().is_some() {
                    pivot.hear(fault, self.events);
                    pivot.follow(page, pages, rtt);
                    self.merge(index);
                } else if pivot.contains(page) {
                    pivot.hear(fault, self.events);
                    pivot.credit = credit;
                } else {
                    // The bubble has not got there yet, and the page may be the edge of
                    // something else: a pivot of its own, that inherits the direction.
                    let mut moved = Pivot::new(fault, self.events);
                    moved.credit = credit;
                    if newest == Some(index) {
                        (moved.lean, moved.pace) = (pivot.lean, pivot.pace);
                    }
                    (pivot.lean, pivot.credit) = (0, 0);
                    self.admit(moved);
                }
            }
            None => {
                let mut pivot = Pivot::new(fault, self.events);
                pivot.credit = credit;
                if late {
                    // Its neighbours are likely to be on their way as well.
                    pivot.credit = env("LATE", 0);
                }
                self.admit(pivot);
            }
        }
        if !late {
            self.cursor = page;
        }
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

    /// The pivot where this vCPU's last event was.
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

    /// Whose turn it is: a pivot that has credit before those that have none, then
    /// the one whose last turn is longest ago, then the newest.
    fn whose_turn(&self) -> Option<usize> {
        (0..self.pivots.len()).filter(|&index| self.pivots[index].can_grow()).min_by_key(|&index| {
            let pivot = &self.pivots[index];
            let focused = pivot.vcpu == self.focus || env("FOCUS", 1) == 0;
            let fresh = pivot.credit > 0 && pivot.streams().is_none();
            let class = match (fresh, focused, pivot.credit > 0) { (true, _, _) => 0, (_, true, true) => 1, (_, true, false) => 2, (_, false, true) => 3, _ => 4u64 };
            let class = if env("FLAT", 0) == 1 { match class { 2 => 1, 4 => 3, c => c } } else { class };
            let second = match env("SECOND", 0) { 0 => u64::MAX - pivot.event, 1 => u64::MAX - pivot.turn, _ => pivot.turn };
            (class, second, Reverse(pivot.event))
        })
    }

    fn rtt(&self) -> Duration {
        self.link.map_or(Duration::from_millis(1), |link| link.rtt)
    }

    /// How far apart two events of one reader may be: as much as is under way.
    fn near_pages(&self) -> u64 {
        let rate = self.link.map_or(0, |link| link.rate_bps);
        let pages_a_second = (rate / 8 / PAGE_SIZE as u64) as f64;
        let under_way = (self.rtt().as_secs_f64() + 0.001) * pages_a_second;
        (2.0 * under_way).clamp(128.0, 2048.0) as u64
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

    fn link(&mut self, link: LinkState) {
        self.link = Some(link);
    }

    /// Changes nothing: it pushes all the time.
    fn drain(&mut self) {}

    fn next(&mut self, unsent: &dyn Unsent, pages_max: u32) -> Option<Suggestion> {
        if pages_max == 0 {
            return None;
        }
        // Each pass hands out a run or closes one side of one bubble.
        while let Some(index) = self.whose_turn() {
            let pivot = &mut self.pivots[index];
            if let Some(run) = pivot.grow(unsent, pages_max) {
                self.turns += 1;
                pivot.turn = self.turns;
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
    fn new(fault: Fault, event: u64) -> Self {
        let page = fault.page.get();
        Self {
            low: page,
            high: page + 1,
            low_done: page == 0,
            high_done: false,
            last: page,
            last_at: fault.at,
            vcpu: fault.vcpu,
            event,
            lean: 0,
            pace: 0.0,
            ahead: 0,
            credit: env("CREDIT",48),
            turn: 0,
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

    /// Takes in where its reader is now, as a sign of where it goes.
    fn vote(&mut self, page: u64, at: Duration, near: u64) {
        let distance = page.abs_diff(self.last);
        if distance == 0 {
            return;
        }
        let up = page > self.last;
        let on_track = match self.streams() {
            Some(Direction::Up) => up && (distance <= near || page + near >= self.high),
            Some(Direction::Down) => !up && (distance <= near || page <= self.low + near),
            None => distance <= NEAR_PAGES,
        };
        if !on_track {
            self.lean = 0;
            self.ahead = 0;
            return;
        }
        let weight = if distance <= STEP_PAGES { 2 } else { 1 };
        let vote = if up { weight } else { -weight };
        let turned = self.lean * vote < 0;
        self.lean = if turned { vote } else { (self.lean + vote).clamp(-LEAN_MAX, LEAN_MAX) };
        let elapsed = at.saturating_sub(self.last_at).as_secs_f64().max(1e-6);
        let pace = distance as f64 / elapsed;
        self.pace = if self.pace == 0.0 || turned { pace } else { (self.pace + pace) / 2.0 };
    }

    /// Begins anew around `page`.
    fn centre(&mut self, page: u64, pages: u64) {
        (self.low, self.low_done) = (page, page == 0);
        (self.high, self.high_done) = (page + 1, page + 1 >= pages);
    }

    /// Takes in an event in or near the bubble.
    fn hear(&mut self, fault: Fault, event: u64) {
        (self.last, self.last_at) = (fault.page.get(), fault.at);
        (self.vcpu, self.event) = (fault.vcpu, event);
        self.turn = 0;
    }

    /// As a stream: goes on from the reader's place, and far enough ahead of it.
    fn follow(&mut self, page: u64, pages: u64, rtt: Duration) {
        let paced = (2.0 * self.pace * rtt.as_secs_f64()) as u64;
        self.ahead = (2 * self.ahead).max(paced).clamp(AHEAD_PAGES_MIN, AHEAD_PAGES_MAX);
        let ahead = self.ahead;
        let up = self.lean > 0;
        if up {
            self.low = self.low.min(page);
            if page >= self.high {
                self.high = page + 1;
                self.high_done = self.high >= pages;
            }
            self.credit = (page + ahead).saturating_sub(self.high);
        } else {
            self.high = self.high.max(page + 1);
            if page < self.low {
                self.low = page;
                self.low_done = page == 0;
            }
            self.credit = (self.low + ahead).saturating_sub(page);
        }
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
        let leap_max = if self.streams().is_some() { u64::MAX } else { LEAP_PAGES_MAX };
        let fresh = self.credit > 0 && self.streams().is_none();
        let pages_max = match direction {
            Direction::Up if fresh => pages_max.min(env("UP",32).min(self.credit.max(8)) as u32),
            Direction::Down if fresh => pages_max.min(env("DOWN",16).min(self.credit.max(8)) as u32),
            _ => pages_max,
        };
        let run = match direction {
            Direction::Up => run_up(unsent, self.high, pages_max)
                .filter(|run| run.first().get() - self.high <= leap_max),
            Direction::Down => self
                .low
                .checked_sub(1)
                .and_then(|from| run_down(unsent, from, pages_max))
                .filter(|run| self.low - run.end() <= leap_max),
        };
        if run.is_none() && self.streams().is_some() {
            // All that its reader can come to is sent.
            (self.low_done, self.high_done) = (true, true);
        }
        match (run, direction) {
            (Some(run), Direction::Up) => self.high = run.end(),
            (Some(run), Direction::Down) => self.low = run.first().get(),
            (None, Direction::Up) => self.high_done = true,
            (None, Direction::Down) => self.low_done = true,
        }
        self.up_next = direction == Direction::Down;
        self.credit = self.credit.saturating_sub(run.map_or(0, PageRun::count));
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
