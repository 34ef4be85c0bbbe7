//! The write log against what the writers themselves have counted, and against a copy that
//! follows it.

use super::super::register::{DestinationBacking, register};
use super::*;
use crate::memory::ram::Backing;
use crate::proto::layout::{GuestAddress, MemoryLayout, Region};
use crate::proto::page::{PAGE_SIZE, PageIndex};
use crate::uffd::UffdOptions;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What this kernel cannot do is skipped, with a line that says so.
fn can_log() -> bool {
    let available = WriteLog::available();
    if let Err(why) = &available {
        println!("SKIPPED: writes cannot be logged here: {why}");
    }
    available.is_ok()
}

/// Memory in two regions, the first of so many pages and the second of 700.
fn memory(pages: u64, backing: Backing) -> Arc<GuestRam> {
    let regions = vec![
        Region { start: GuestAddress(0), pages },
        Region { start: GuestAddress(1 << 32), pages: 700 },
    ];
    Arc::new(GuestRam::new(MemoryLayout::new(regions).unwrap(), backing).unwrap())
}

fn word(ram: &GuestRam, page: u64, index: usize) -> &AtomicU64 {
    assert!(index < PAGE_SIZE / 8);
    let start = ram.page_ptr(PageIndex::new(page)).cast::<AtomicU64>();
    // SAFETY: aligned and in the mapping; the tests write to it with atomic operations only.
    unsafe { start.add(index).as_ref() }
}

fn write(ram: &GuestRam, page: u64) {
    word(ram, page, 7).fetch_add(1, Ordering::Relaxed);
}

fn taken(log: &mut WriteLog) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    log.take(|run| {
        for page in run.pages() {
            assert!(pages.insert(page.get()), "{page} twice in a scan");
        }
    })
    .unwrap();
    pages
}

fn all(ram: &GuestRam) -> PageRun {
    PageRun::new(PageIndex::new(0), ram.layout().pages()).unwrap()
}

#[test]
fn what_is_written_is_taken_once() {
    if !can_log() {
        return;
    }
    for backing in [Backing::Memfd, Backing::Anonymous] {
        let ram = memory(1000, backing);
        // Written before, read before, and never there before: all the same.
        [1, 2, 1500].into_iter().for_each(|page| write(&ram, page));
        word(&ram, 3, 0).load(Ordering::Relaxed);
        let mut log = WriteLog::start(Arc::clone(&ram)).unwrap();
        assert_eq!(taken(&mut log), BTreeSet::new());
        [2, 3, 4, 999, 1000, 1699].into_iter().for_each(|page| write(&ram, page));
        assert_eq!(taken(&mut log), BTreeSet::from([2, 3, 4, 999, 1000, 1699]));
        assert_eq!(taken(&mut log), BTreeSet::new());
        let mut random = rand::rngs::StdRng::seed_from_u64(1);
        for round in 0..100 {
            let writes = random.random_range(0..200);
            let pages: BTreeSet<u64> = (0..writes).map(|_| random.random_range(0..1700)).collect();
            for page in &pages {
                write(&ram, *page);
            }
            assert_eq!(taken(&mut log), pages, "round {round}");
        }
    }
}

#[test]
fn a_page_that_is_only_read_is_not_taken() {
    if !can_log() {
        return;
    }
    for backing in [Backing::Memfd, Backing::Anonymous] {
        let ram = memory(1000, backing);
        write(&ram, 5);
        let mut log = WriteLog::start(Arc::clone(&ram)).unwrap();
        for page in 0..1000 {
            word(&ram, page, 3).load(Ordering::Relaxed);
        }
        assert_eq!(taken(&mut log), BTreeSet::new());
    }
}

#[test]
fn a_copy_that_follows_threads_at_random_pages_is_complete() {
    const PAGES: u64 = 3000;
    const ROUNDS: u64 = 100;
    if !can_log() {
        return;
    }
    for backing in [Backing::Memfd, Backing::Anonymous] {
        let ram = memory(PAGES - 700, backing);
        // What is written and what is read of it must also be pages that are not there yet.
        (0..PAGES).filter(|page| page % 3 == 0).for_each(|page| write(&ram, page));
        let mut log = WriteLog::start(Arc::clone(&ram)).unwrap();
        let mut copy = vec![0; all(&ram).bytes()];
        ram.read_run(all(&ram), &mut copy);
        let writes: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        let mut named = vec![0; PAGES as usize];
        let mut follow = |log: &mut WriteLog| {
            let mut count = 0;
            log.take(|run| {
                for page in run.pages() {
                    let start = page.as_usize() * PAGE_SIZE;
                    ram.read_run(PageRun::single(page), &mut copy[start..start + PAGE_SIZE]);
                    named[page.as_usize()] += 1;
                    count += 1;
                }
            })
            .unwrap();
            count
        };
        let stop = AtomicBool::new(false);
        let mut rounds = 0;
        std::thread::scope(|scope| {
            for writer in 0..3 {
                let (ram, writes, stop) = (&ram, &writes, &stop);
                scope.spawn(move || {
                    let mut random = rand::rngs::StdRng::seed_from_u64(writer);
                    while !stop.load(Ordering::Relaxed) {
                        // One part of the memory is written often, another rarely or never.
                        let end = random.random_range(1..PAGES - 10);
                        let page = random.random_range(0..end);
                        let index = random.random_range(0..PAGE_SIZE / 8);
                        writes[page as usize].fetch_add(1, Ordering::Relaxed);
                        word(ram, page, index).fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            // A scan finds nothing when no writer has a processor.
            while rounds < ROUNDS {
                rounds += u64::from(follow(&mut log) > 0);
            }
            stop.store(true, Ordering::Relaxed);
        });
        follow(&mut log);
        let mut content = vec![0; copy.len()];
        ram.read_run(all(&ram), &mut content);
        let differing = copy.chunks(PAGE_SIZE).zip(content.chunks(PAGE_SIZE)).enumerate();
        let lost: Vec<_> =
            differing.filter(|(_, (one, other))| one != other).map(|(page, _)| page).collect();
        assert_eq!(lost, [0; 0], "pages written and in no round");
        // Named before a write that was about to be made, and once more behind it: that may be.
        let written = writes.iter().map(|writes| writes.load(Ordering::Relaxed) > 0);
        let unwritten: Vec<_> = (0..PAGES).zip(&named).zip(written).collect();
        let unwritten = unwritten.iter().filter(|((_, named), written)| **named > 0 && !written);
        assert_eq!(unwritten.count(), 0, "pages in a round and not written");
        assert_eq!(taken(&mut log), BTreeSet::new());
    }
}

#[test]
fn more_runs_than_a_scan_returns_at_a_time_are_taken_all() {
    if !can_log() {
        return;
    }
    let pages = 2 * RUNS_MAX as u64 + 100;
    let ram = memory(pages, Backing::Memfd);
    let mut log = WriteLog::start(Arc::clone(&ram)).unwrap();
    let odd = || (0..pages + 700).filter(|page| page % 2 == 1);
    odd().for_each(|page| write(&ram, page));
    assert_eq!(taken(&mut log), odd().collect());
    assert_eq!(taken(&mut log), BTreeSet::new());
}

#[test]
fn what_the_kernel_writes_for_a_thread_is_taken() {
    if !can_log() {
        return;
    }
    let ram = memory(1000, Backing::Memfd);
    write(&ram, 10);
    let mut log = WriteLog::start(Arc::clone(&ram)).unwrap();
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&[1; 3 * PAGE_SIZE]).unwrap();
    let into = ram.page_ptr(PageIndex::new(10)).as_ptr();
    // SAFETY: three whole pages of guest memory, to which there are no references.
    let read = unsafe { nix::libc::read(reader.as_raw_fd(), into.cast(), 3 * PAGE_SIZE) };
    assert_eq!(read, 3 * PAGE_SIZE as isize);
    assert_eq!(taken(&mut log), BTreeSet::from([10, 11, 12]));
}

#[test]
fn a_written_page_that_is_unmapped_is_still_taken() {
    if !can_log() {
        return;
    }
    let ram = memory(1000, Backing::Memfd);
    let mut log = WriteLog::start(Arc::clone(&ram)).unwrap();
    [20, 22].into_iter().for_each(|page| write(&ram, page));
    let start = ram.page_ptr(PageIndex::new(20)).cast();
    let advice = nix::sys::mman::MmapAdvise::MADV_DONTNEED;
    // SAFETY: pages of a shared mapping: their content stays in the file.
    unsafe { nix::sys::mman::madvise(start, 4 * PAGE_SIZE, advice) }.unwrap();
    let found = taken(&mut log);
    assert_eq!(found, BTreeSet::from([20, 22]));
    assert_eq!(word(&ram, 22, 7).load(Ordering::Relaxed), 1);
}

#[test]
fn what_is_written_through_another_mapping_is_not_seen() {
    if !can_log() {
        return;
    }
    let ram = memory(1000, Backing::Memfd);
    let alias = ram.alias().unwrap().unwrap();
    let mut log = WriteLog::start(Arc::clone(&ram)).unwrap();
    write(&alias, 8);
    write(&ram, 9);
    assert_eq!(taken(&mut log), BTreeSet::from([9]));
}

#[test]
fn a_log_that_is_stopped_or_dropped_can_be_started_anew() {
    if !can_log() {
        return;
    }
    let ram = memory(1000, Backing::Memfd);
    for stopped in [true, false] {
        let log = WriteLog::start(Arc::clone(&ram)).unwrap();
        write(&ram, 1);
        match stopped {
            true => log.stop().unwrap(),
            false => drop(log),
        }
        write(&ram, 2);
    }
    let mut log = WriteLog::start(Arc::clone(&ram)).unwrap();
    assert_eq!(taken(&mut log), BTreeSet::new());
    write(&ram, 2);
    assert_eq!(taken(&mut log), BTreeSet::from([2]));
}

#[test]
fn memory_under_another_userfaultfd_is_refused() {
    if !can_log() {
        return;
    }
    let ram = memory(1000, Backing::Memfd);
    let options = UffdOptions { kernel_faults: false, ..UffdOptions::for_process() };
    // SAFETY: there are no references to the memory, and nobody touches it meanwhile.
    let registered =
        unsafe { register(Arc::clone(&ram), DestinationBacking::MemfdContinue, options) };
    let (_trap, placer) = registered.unwrap();
    let refused = WriteLog::start(Arc::clone(&ram)).unwrap_err();
    let busy =
        WriteLogError::Memory { action: "register", bytes: 1000 * PAGE_SIZE, source: Errno::EBUSY };
    assert_eq!(format!("{refused:?}"), format!("{busy:?}"));
    placer.unregister().unwrap();
    WriteLog::start(ram).unwrap();
}
