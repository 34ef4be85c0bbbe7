//! The floors of moving memory within a process.

use super::trapped::Trapped;
use super::{Measured, PAGES};
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use crate::report::latency::Latencies;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Memory that is copied: more than a processor's caches hold.
const COPIED_BYTES: usize = 64 << 20;
/// Pages between two looks at the clock, which takes as long as a part of a page.
const COPIED_PAGES: usize = 256;
/// Pages of a run that is placed.
const PLACED_PAGES: u64 = 64;

/// Copying pages.
pub fn memcpy(time: Duration) -> anyhow::Result<Measured> {
    let from = vec![1u8; COPIED_BYTES];
    let mut to = vec![2u8; COPIED_BYTES];
    let block = COPIED_PAGES * PAGE_SIZE;
    let mut times = Latencies::new();
    let began = Instant::now();
    while began.elapsed() < time {
        for (from, to) in from.chunks_exact(block).zip(to.chunks_exact_mut(block)) {
            let before = Instant::now();
            for (from, to) in from.chunks_exact(PAGE_SIZE).zip(to.chunks_exact_mut(PAGE_SIZE)) {
                to.copy_from_slice(black_box(from));
                black_box(&*to);
            }
            times.record(before.elapsed() / COPIED_PAGES as u32);
            if began.elapsed() >= time {
                break;
            }
        }
    }
    Measured::of_times(&times)
}

/// Placing pages for which nobody waits.
pub fn place(time: Duration) -> anyhow::Result<Measured> {
    let content = vec![7u8; PLACED_PAGES as usize * PAGE_SIZE];
    let mut times = Latencies::new();
    let began = Instant::now();
    while began.elapsed() < time {
        let memory = Trapped::new(PAGES)?;
        for first in (0..PAGES).step_by(PLACED_PAGES as usize) {
            let Some(run) = PageRun::new(PageIndex::new(first), PLACED_PAGES) else { break };
            let before = Instant::now();
            let placed = memory.placer.place(run, &content)?;
            times.record(before.elapsed() / PLACED_PAGES as u32);
            anyhow::ensure!(placed.is_complete(), "a page was there already");
            if began.elapsed() >= time {
                break;
            }
        }
    }
    Measured::of_times(&times)
}
