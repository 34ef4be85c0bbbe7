//! Huge pages for a guest that has arrived: its memory came in small pages, and is made into
//! blocks of 2 MiB in the background while it runs.

use crate::memory::huge;
use crate::memory::ram::GuestRam;
use crate::proto::ledger::DestinationLedger;
use crate::proto::page::PageRun;
use crate::report::latency::Latencies;
use crate::report::schema::HugePages;
use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a block is tried again that the kernel could not collapse just then.
const RETRIES: u32 = 3;
/// How long before those are tried again, all of them.
const RETRY_AFTER: Duration = Duration::from_millis(300);
/// Between two blocks the thread rests for so much of what the last one took: vCPUs may have to
/// do what they could not meanwhile, and no core is without a break.
const REST: f64 = 0.5;
/// But not for longer: where cores are busy, others have had theirs while the call went on.
const REST_MAX: Duration = Duration::from_millis(3);

/// Huge pages being made of a guest's memory. It goes on by itself, dropped or not, for as long as
/// somebody else holds the memory.
#[must_use = "what it comes to is told to whoever waits for it"]
#[derive(Debug)]
pub struct Collapsing {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<HugePages>,
}

impl Collapsing {
    /// Begins, in a thread of its own, with every block of `ram` that is worth it.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(super) fn start(ram: Arc<GuestRam>, ledger: &DestinationLedger) -> std::io::Result<Self> {
        let blocks = ram.segments().iter().flat_map(huge::blocks);
        let blocks = blocks.filter(|block| ledger.is_dense(*block)).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let worker = Worker { ram, stop: stop.clone(), began: Instant::now() };
        let run = move || {
            crate::engine::defer();
            worker.run(blocks)
        };
        let thread = std::thread::Builder::new().name("huge-pages".into()).spawn(run)?;
        Ok(Self { stop, thread })
    }

    /// Whether every block was tried.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for its end, and tells what it came to.
    pub fn wait(self) -> HugePages {
        // It has nothing that panics.
        self.thread.join().unwrap_or_default()
    }

    /// Ends it behind the block that it is at, which takes milliseconds, and tells what it came
    /// to.
    pub fn stop(self) -> HugePages {
        self.stop.store(true, Ordering::Relaxed);
        self.wait()
    }
}

struct Worker {
    ram: Arc<GuestRam>,
    stop: Arc<AtomicBool>,
    began: Instant,
}

impl Worker {
    fn run(self, blocks: Vec<PageRun>) -> HugePages {
        self.ram.segments().iter().for_each(huge::allow);
        let mut calls = Latencies::new();
        let mut figures = HugePages { blocks: blocks.len() as u64, ..HugePages::default() };
        let mut left = blocks;
        for attempt in 0..=RETRIES {
            if left.is_empty() || (attempt > 0 && !self.rest(RETRY_AFTER)) {
                break;
            }
            left = self.try_each(left, &mut figures, &mut calls);
        }
        figures.total_us = self.since_begin_us();
        figures.call_ns = calls.summary();
        figures.cpu_us = cpu_us();
        let HugePages { blocks, collapsed, refused, failed, total_us, .. } = figures;
        tracing::info!(blocks, collapsed, refused, failed, total_us, "huge pages");
        figures
    }

    /// Tries each block once; those that may go another time are left.
    fn try_each(
        &self,
        blocks: Vec<PageRun>,
        figures: &mut HugePages,
        calls: &mut Latencies,
    ) -> Vec<PageRun> {
        let mut again = Vec::new();
        for block in blocks {
            if self.is_over() {
                break;
            }
            let asked = Instant::now();
            let answer = huge::collapse(&self.ram, block);
            let took = asked.elapsed();
            calls.record(took);
            match answer {
                Ok(()) => {
                    figures.collapsed += 1;
                    if figures.collapsed == (figures.blocks * 9).div_ceil(10) {
                        figures.us_to_90_percent = Some(self.since_begin_us());
                    }
                }
                Err(Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM) => again.push(block),
                Err(errno) => {
                    tracing::debug!(%errno, ?block, "no huge page");
                    figures.refused += 1;
                }
            }
            self.rest(took.mul_f64(REST).min(REST_MAX));
        }
        figures.failed = again.len() as u64;
        again
    }

    /// Waits for so long; `false` if it is over before.
    fn rest(&self, time: Duration) -> bool {
        const LOOK_EVERY: Duration = Duration::from_millis(50);
        let until = Instant::now() + time;
        while !self.is_over() {
            match until.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return true,
                left => std::thread::sleep(left.min(LOOK_EVERY)),
            }
        }
        false
    }

    /// Somebody says so, or nobody else has the memory any more: the VM has ended.
    fn is_over(&self) -> bool {
        let alone = Arc::strong_count(&self.ram) == 1 && self.ram.is_only_holder();
        alone || self.stop.load(Ordering::Relaxed)
    }

    fn since_begin_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }
}

/// Processor time of this thread, in microseconds.
fn cpu_us() -> Option<u64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok()?;
    Some(Duration::from(time).as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::Backing;
    use crate::proto::layout::MemoryLayout;
    use crate::proto::page::PageIndex;

    /// Memory in which all but the last of eight blocks has content, as its ledger says.
    fn arrived() -> (Arc<GuestRam>, DestinationLedger) {
        let pages = 8 * 512;
        let layout = MemoryLayout::flat(pages).unwrap();
        let ram = Arc::new(GuestRam::new(layout, Backing::Memfd).unwrap());
        let ledger = DestinationLedger::new(pages);
        let content = PageRun::new(PageIndex::new(0), 7 * 512).unwrap();
        ram.write_run(content, &vec![7; content.bytes()]);
        for landing in ledger.land(content).unwrap() {
            landing.placed();
        }
        let rest = PageRun::new(PageIndex::new(content.end()), 512).unwrap();
        assert!(ledger.mark_zero(rest).unwrap().is_empty());
        (ram, ledger)
    }

    #[test]
    fn blocks_with_content_are_tried_and_told_of() {
        let (ram, ledger) = arrived();
        let figures = Collapsing::start(ram.clone(), &ledger).unwrap().wait();
        assert_eq!(figures.blocks, 7);
        assert_eq!(figures.collapsed + figures.refused + figures.failed, 7, "{figures:?}");
        assert!(figures.call_ns.count >= 7 && figures.us_to_90_percent <= Some(figures.total_us));
    }

    #[test]
    fn it_ends_when_told_to_and_with_the_last_other_holder_of_the_memory() {
        let (ram, ledger) = arrived();
        let figures = Collapsing::start(ram.clone(), &ledger).unwrap().stop();
        assert!(figures.collapsed + figures.refused + figures.failed <= 7, "{figures:?}");
        let worker = Worker { ram, stop: Arc::default(), began: Instant::now() };
        assert!(worker.is_over(), "nobody else has it");
        let held = worker.ram.guest_memory();
        assert!(!worker.is_over());
        drop(held);
        let blocks = worker.ram.segments().iter().flat_map(huge::blocks).collect();
        let figures = worker.run(blocks);
        assert_eq!((figures.blocks, figures.call_ns.count), (8, 0));
    }
}
