//! [`Walker`]: makes a vCPU's steps as [`workload`](crate::vmm::workload) lays down.
//!
//! It knows the patterns, the checks and the instruments; threads, pausing and the
//! state's envelope are elsewhere.

use super::words::GuestWords;
use crate::memory::ram::GuestRam;
use crate::proto::page::PageIndex;
use crate::vmm::clock::{GuestClock, ns_to_ticks, ticks_to_ns, tsc_hz};
use crate::vmm::content::{G, fill, mix, tag, vseed};
use crate::vmm::trace::Touch;
use crate::vmm::workload::*;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Lanes of the strided pattern, and pages from one step to the next in a lane.
const STRIDE: u64 = 16;

/// What a vCPU of this guest has in place of processor registers: all that its next
/// step depends on, memory apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    /// Steps completed.
    pub(super) step: u64,
    pub(super) cursor: u64,
    pub(super) lane: u64,
    /// The step with which a trace was begun anew.
    pub(super) trace_start: u64,
    pub(super) status: Status,
    /// The next step begins no earlier than this, on the guest's clock; 0: not known yet.
    pub(super) not_before: u64,
    pub(super) instruments: Counters,
}

/// The part of the instruments that is not the histogram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counters {
    seen: u64,
    first_step: u64,
    max_gap: u64,
    last_end: u64,
    stalls: u64,
    stall_sum: u64,
}

/// How far a vCPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Status {
    Running,
    Finished,
    Failed(WrongWord),
}

/// A word of guest memory that is not what the vCPU must find there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WrongWord {
    page: u64,
    word: u64,
    expected: u64,
    found: u64,
}

impl fmt::Display for WrongWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { page, word, expected, found } = self;
        write!(f, "word {word} of page {page} is {found:#x} where {expected:#x} must be")
    }
}

impl Registers {
    /// Those of a vCPU that has made no step.
    pub(super) fn first() -> Self {
        Self {
            step: 0,
            cursor: 0,
            lane: 0,
            trace_start: 0,
            status: Status::Running,
            not_before: 0,
            instruments: Counters::default(),
        }
    }

    /// Whether they are possible in a slice of `pages` pages.
    pub(super) fn plausible(&self, pages: u64) -> bool {
        self.cursor < pages && self.lane < STRIDE && self.trace_start <= self.step
    }

    /// Begins the trace anew, if this is the first time that the guest has moved.
    pub(super) fn begin_trace_anew(&mut self) {
        if self.trace_start == 0 {
            (self.trace_start, self.not_before) = (self.step, 0);
        }
    }
}

/// One vCPU's program: where its pages are and how it picks among them.
#[derive(Debug)]
pub(super) struct Walker {
    memory: GuestWords,
    pattern: Pattern,
    seed: u64,
    vseed: u64,
    slice: Slice,
    tail: u64,
    tail_pages: u64,
    control: PageIndex,
    histogram: PageIndex,
    /// Of the trace; none in another pattern.
    touches: Arc<[Touch]>,
}

impl Walker {
    /// The program of `vcpu`. The workload fits the memory. Touches no guest memory.
    pub(super) fn new(ram: &Arc<GuestRam>, workload: &Workload, vcpu: u32) -> Self {
        let layout = ram.layout();
        Self {
            memory: GuestWords::new(Arc::clone(ram)),
            pattern: workload.pattern,
            seed: workload.seed,
            vseed: vseed(workload.seed, vcpu),
            slice: workload.slice(layout, vcpu),
            tail: workload.tail(layout).get(),
            tail_pages: workload.zero_pages,
            control: control_page(vcpu),
            histogram: histogram_page(vcpu),
            touches: workload.trace.as_ref().map_or_else(Arc::default, |of| of.touches(vcpu)),
        }
    }

    /// Makes steps until `stop` is set, the workload ends or a word is wrong.
    pub(super) fn run(&self, registers: &mut Registers, clock: GuestClock, stop: &AtomicBool) {
        if let Err(wrong) = self.steps(registers, clock, stop) {
            self.set(control::FAILED_PAGE, wrong.page);
            self.set(control::FAILED_EXPECTED, wrong.expected);
            self.set(control::FAILED_FOUND, wrong.found);
            self.set(control::STATUS, STATUS_FAILED);
            registers.status = Status::Failed(wrong);
        }
    }

    fn steps(
        &self,
        registers: &mut Registers,
        clock: GuestClock,
        stop: &AtomicBool,
    ) -> Result<(), WrongWord> {
        if registers.status != Status::Running {
            return Ok(());
        }
        self.check_control_page(registers)?;
        let think = self.get(control::THINK);
        let threshold = self.get(control::STALL_THRESHOLD);
        let paced = think != 0 || !self.touches.is_empty();
        self.set(control::TRACE_START, registers.trace_start);
        let now = clock.now();
        let first = now.saturating_add(self.wait(registers));
        if registers.not_before == 0 {
            registers.not_before = first;
        }
        // A clock that was set back must not hold the guest up.
        registers.not_before = registers.not_before.min(first.max(now.saturating_add(think)));
        while !stop.load(Ordering::Relaxed) {
            if self.get(control::INSTRUMENT_REQUEST) != registers.instruments.seen {
                self.clear_instruments(registers);
            }
            let limit = self.get(control::STEP_LIMIT);
            let enough = limit != 0 && registers.step >= limit;
            if enough || self.get(control::STOP_REQUEST) != 0 {
                registers.status = Status::Finished;
                self.set(control::STATUS, STATUS_FINISHED);
                return Ok(());
            }
            if paced && !is_time(registers.not_before, clock) {
                continue;
            }
            let start = clock.now();
            let visited = self.visit(registers)?;
            let end = clock.now();
            self.count(&mut registers.instruments, start, end, threshold);
            (registers.cursor, registers.lane) = visited;
            registers.step += 1;
            registers.not_before =
                start.wrapping_add(think).max(end.wrapping_add(self.wait(registers)));
            self.set(control::CURSOR, registers.cursor);
            self.set(control::LANE, registers.lane);
            self.set(control::STEPS, registers.step);
        }
        Ok(())
    }

    /// The control page must tell of the same vCPU, at the same step, as the
    /// registers: a page lost or stale after a migration shows up here, not as
    /// nonsense later on.
    fn check_control_page(&self, registers: &Registers) -> Result<(), WrongWord> {
        for (index, expected) in [
            (control::MAGIC, CONTROL_MAGIC),
            (control::SEED, self.seed),
            (control::VSEED, self.vseed),
            (control::PATTERN, self.pattern as u64),
            (control::SLICE, self.slice.first.get()),
            (control::SLICE_PAGES, self.slice.pages),
            (control::TAIL, self.tail),
            (control::TAIL_PAGES, self.tail_pages),
            (control::WRITE_MASK, self.pattern.write_mask()),
            (control::STATUS, STATUS_RUNNING),
            (control::STEPS, registers.step),
            (control::CURSOR, registers.cursor),
            (control::LANE, registers.lane),
        ] {
            self.expect(self.control, index, expected)?;
        }
        Ok(())
    }

    /// Makes one step's accesses; gives the cursor and lane after it.
    #[inline]
    fn visit(&self, registers: &Registers) -> Result<(u64, u64), WrongWord> {
        let s = registers.step;
        let h = mix(self.vseed.wrapping_add(s.wrapping_mul(G)));
        let (page, cursor, lane) = self.pick(registers, h)?;
        let page = PageIndex::new(page);
        let tag = tag(self.seed, page.get());
        self.expect(page, 0, tag)?;
        let probe = 4 + s % 128;
        self.expect(page, probe as usize, fill(tag, probe))?;
        if self.tail_pages != 0 && self.touches.is_empty() && s.is_multiple_of(64) {
            let page = PageIndex::new(self.tail + mulhi(mix(h), self.tail_pages));
            self.expect(page, (s / 64 % 512) as usize, 0)?;
        }
        if s & self.pattern.write_mask() == 0 {
            // Only this thread writes to the page: loads and stores suffice.
            let visits = self.memory.word(page, 1);
            let c = visits.load(Ordering::Relaxed);
            let word = self.memory.word(page, 256 + (c % 256) as usize);
            word.store(word.load(Ordering::Relaxed).wrapping_add(tag), Ordering::Relaxed);
            visits.store(c.wrapping_add(1), Ordering::Release);
        }
        Ok((cursor, lane))
    }

    /// Ticks that the next step must leave between the end of the one before and itself.
    #[inline]
    fn wait(&self, registers: &Registers) -> u64 {
        if self.touches.is_empty() {
            return 0;
        }
        ns_to_ticks(self.touch(registers).wait_us.saturating_mul(1000), tsc_hz())
    }

    /// The page that a step visits, and the cursor and lane after it.
    #[inline]
    fn pick(&self, registers: &Registers, h: u64) -> Result<(u64, u64, u64), WrongWord> {
        let n = self.slice.pages;
        let &Registers { step, cursor, lane, .. } = registers;
        let next = if cursor + 1 == n { 0 } else { cursor + 1 };
        let (k, cursor, lane) = match self.pattern {
            Pattern::Trace => return Ok((self.touch(registers).page, cursor, lane)),
            Pattern::Sequential => (cursor, next, lane),
            Pattern::Strided if cursor + STRIDE < n => (cursor, cursor + STRIDE, lane),
            Pattern::Strided => {
                let lane = (lane + 1) % STRIDE;
                (cursor, lane, lane)
            }
            Pattern::Random | Pattern::ReadModifyWrite => (mulhi(h, n), cursor, lane),
            Pattern::Zipf => (self.zipf(h), cursor, lane),
            Pattern::HotSetWithScan if step % 8 == 7 => (cursor, next, lane),
            Pattern::HotSetWithScan => (mulhi(h, (n / 16).max(1)), cursor, lane),
            Pattern::PointerChase => {
                let page = PageIndex::new(self.slice.first.get() + cursor);
                let successor = self.memory.word(page, 2).load(Ordering::Relaxed);
                if successor >= n {
                    let (page, expected) = (page.get(), n - 1);
                    return Err(WrongWord { page, word: 2, expected, found: successor });
                }
                (cursor, successor, lane)
            }
        };
        Ok((self.slice.first.get() + k, cursor, lane))
    }

    /// The touch of a trace that the next step is.
    #[inline]
    fn touch(&self, registers: &Registers) -> Touch {
        let since = registers.step - registers.trace_start;
        self.touches[(since % self.touches.len() as u64) as usize]
    }

    fn zipf(&self, h: u64) -> u64 {
        let mut u = h >> 32;
        u = (u * u) >> 32;
        u = (u * u) >> 32;
        let rank = (u * self.slice.pages) >> 32;
        mulhi(mix(self.vseed.wrapping_add(rank.wrapping_mul(G))), self.slice.pages)
    }

    #[inline]
    fn expect(&self, page: PageIndex, word: usize, expected: u64) -> Result<(), WrongWord> {
        let found = self.memory.word(page, word).load(Ordering::Relaxed);
        if found == expected {
            return Ok(());
        }
        Err(WrongWord { page: page.get(), word: word as u64, expected, found })
    }

    #[inline]
    fn count(&self, counters: &mut Counters, start: u64, end: u64, threshold: u64) {
        let gap = end.saturating_sub(counters.last_end);
        if counters.last_end != 0 && gap > counters.max_gap {
            counters.max_gap = gap;
            self.set(control::MAX_GAP, gap);
        }
        counters.last_end = end;
        self.set(control::LAST_END, end);
        // The counters of two processors may differ by a little.
        let spent = end.saturating_sub(start);
        if spent > threshold {
            let bucket = self.memory.word(self.histogram, stall_bucket(spent));
            bucket.store(bucket.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            counters.stalls += 1;
            counters.stall_sum = counters.stall_sum.wrapping_add(spent);
            self.set(control::STALLS, counters.stalls);
            self.set(control::STALL_SUM, counters.stall_sum);
        }
    }

    #[cold]
    fn clear_instruments(&self, registers: &mut Registers) {
        let counters = Counters {
            seen: self.get(control::INSTRUMENT_REQUEST),
            first_step: registers.step,
            last_end: registers.instruments.last_end,
            ..Counters::default()
        };
        for bucket in 0..STALL_BUCKETS {
            self.memory.word(self.histogram, bucket).store(0, Ordering::Relaxed);
        }
        self.set(control::STALLS, 0);
        self.set(control::STALL_SUM, 0);
        self.set(control::MAX_GAP, 0);
        self.set(control::INSTRUMENT_STEP, counters.first_step);
        self.set(control::INSTRUMENT_SEEN, counters.seen);
        registers.instruments = counters;
    }

    #[inline]
    fn control(&self, index: usize) -> &AtomicU64 {
        self.memory.word(self.control, index)
    }

    #[inline]
    fn get(&self, index: usize) -> u64 {
        self.control(index).load(Ordering::Acquire)
    }

    #[inline]
    fn set(&self, index: usize, value: u64) {
        self.control(index).store(value, Ordering::Release);
    }
}

#[inline]
fn mulhi(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 64) as u64
}

/// Whether it is that time on the guest's clock. If not, it comes nearer: most of a long
/// wait is slept, so that an idle guest does not burn a processor, a nap at a time, so that
/// the caller sees what it is asked for meanwhile.
fn is_time(time: u64, clock: GuestClock) -> bool {
    /// As long as a pause may have to wait.
    const NAP: Duration = Duration::from_millis(1);
    /// Spun at the end of a wait: more than a timer is late by.
    const SPIN: Duration = Duration::from_micros(100);
    let left = time.saturating_sub(clock.now());
    if left == 0 {
        return true;
    }
    let left = Duration::from_nanos(ticks_to_ns(left, tsc_hz()));
    if left > SPIN {
        std::thread::sleep((left - SPIN).min(NAP));
    } else {
        std::hint::spin_loop();
    }
    false
}
