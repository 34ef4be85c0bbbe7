//! The rules of placing pages, each shown on the real userfaultfd. Where the
//! design rests on what the kernel does wrong for us, that is shown too, so that
//! a kernel that changes is noticed.
#![cfg(feature = "io")]

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MmapAdvise, madvise};
use nix::sys::stat::fstat;
use nix::unistd::{Pid, gettid, pipe};
use postcopy::memory::ram::{Backing, GuestRam};
use postcopy::memory::reserve::reserve_files;
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use postcopy::uffd::DestinationBacking::{Anonymous, MemfdContinue, MemfdCopy};
use postcopy::uffd::open::open;
use postcopy::uffd::{
    DestinationBacking, OpenError, PlaceError, Placed, Placer, RegisterError, Stop, Trap,
    TrapEvent, UffdOptions, register,
};
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use userfaultfd::{FeatureFlags, RegisterMode, Uffd, UffdBuilder};
use userfaultfd_sys as sys;

const BACKINGS: [DestinationBacking; 3] = [Anonymous, MemfdContinue, MemfdCopy];
const ALL: Placed = Placed { pages: 1, stop: None };

#[test]
fn a_run_stops_at_a_page_that_exists_and_keeps_its_content() {
    let Some(_limit) = begin() else { return };
    for backing in [Anonymous, MemfdCopy] {
        let guest = Guest::new(backing, 16);
        assert_eq!(guest.placer.place(run(5, 1), &filled(1, 0xAA)).unwrap(), ALL);

        let whole = run(2, 8);
        let placed = guest.placer.place(whole, &filled(8, 0xBB)).unwrap();
        assert_eq!(placed, Placed { pages: 3, stop: Some(Stop::Exists) }, "{backing}");
        assert_eq!(placed.rest(whole), Some(run(5, 5)));
        assert_eq!(guest.first_bytes(2, 4), [0xBB, 0xBB, 0xBB, 0xAA], "{backing}");

        let placed = guest.placer.place(run(5, 1), &filled(1, 0xCC)).unwrap();
        assert_eq!(placed, Placed { pages: 0, stop: Some(Stop::Exists) });
        assert_eq!(guest.placer.place(run(6, 4), &filled(4, 0xBB)).unwrap().pages, 4);
        assert_eq!(guest.first_bytes(5, 2), [0xAA, 0xBB], "{backing}");
        assert_eq!(guest.events(), []);
    }
}

#[test]
fn continue_reports_a_page_that_is_mapped_but_cannot_keep_its_content() {
    let Some(_limit) = begin() else { return };
    let guest = Guest::new(MemfdContinue, 4);
    assert_eq!(guest.placer.place(run(1, 1), &filled(1, 0xAA)).unwrap(), ALL);
    let placed = guest.placer.place(run(0, 3), &filled(3, 0xBB)).unwrap();
    assert_eq!(placed, Placed { pages: 1, stop: Some(Stop::Exists) });
    // This is why the ledger must own a page before it is placed.
    assert_eq!(guest.first_bytes(0, 2), [0xBB, 0xBB]);
}

#[test]
fn with_missing_alone_a_half_written_memfd_page_is_mapped_without_an_event() {
    let Some(_limit) = begin() else { return };
    let (ram, uffd) = raw_memfd(RegisterMode::MISSING);
    write_half(&ram, 1);
    let read = thread::spawn(move || (ram_byte(&ram, 1, 0), ram_byte(&ram, 1, PAGE_SIZE - 1)));
    assert_eq!(read.join().unwrap(), (7, 0), "half a page was read");
    assert!(uffd.read_event().unwrap().is_none());
}

#[test]
fn with_minor_alone_a_hole_is_read_as_zero_without_an_event() {
    let Some(_limit) = begin() else { return };
    let (ram, uffd) = raw_memfd(RegisterMode::MINOR);
    let read = thread::spawn(move || ram_byte(&ram, 1, 0));
    assert_eq!(read.join().unwrap(), 0, "a hole was read");
    assert!(uffd.read_event().unwrap().is_none());
}

#[test]
fn with_both_a_hole_and_a_half_written_page_are_trapped() {
    let Some(_limit) = begin() else { return };
    let guest = Guest::new(MemfdContinue, 4);
    write_half(&guest.ram, 2);
    for (page, expected) in [(1, false), (2, true)] {
        let reader = guest.reader(page);
        let TrapEvent::Fault { page: at, minor, .. } = guest.event() else { panic!() };
        assert_eq!((at.get(), minor), (page, expected));
        assert_eq!(guest.placer.place(run(page, 1), &filled(1, 9)).unwrap(), ALL);
        assert_eq!(reader.join().unwrap(), [9; 2]);
    }
}

#[test]
fn a_page_of_the_memfd_that_is_known_to_be_valid_needs_no_content() {
    let Some(_limit) = begin() else { return };
    let ram = memory(Backing::Memfd, 4);
    // Pre-copied before registration, even through the mapping that is registered.
    ram.write_run(run(0, 3), &filled(3, 5));
    let guest = Guest::over(ram, MemfdContinue, UffdOptions::for_process());
    let reader = guest.reader(1);
    assert!(matches!(guest.event(), TrapEvent::Fault { minor: true, .. }));
    guest.placer.map_present(run(1, 1)).unwrap();
    assert_eq!(reader.join().unwrap(), [5; 2]);
    // One that is mapped is passed over, and a hole maps nothing: it is missing.
    guest.placer.map_present(run(1, 3)).unwrap();
    assert_eq!(guest.first_bytes(2, 1), [5]);
    let reader = guest.reader(3);
    assert!(matches!(guest.event(), TrapEvent::Fault { minor: false, .. }));
    assert_eq!(guest.placer.place(run(3, 1), &filled(1, 7)).unwrap(), ALL);
    assert_eq!(reader.join().unwrap(), [7; 2]);
    // A page that is stale is written over.
    assert_eq!(guest.placer.place(run(0, 1), &filled(1, 6)).unwrap(), ALL);
    assert_eq!(guest.first_bytes(0, 1), [6]);

    let copied = Guest::new(MemfdCopy, 1);
    let refused = copied.placer.map_present(run(0, 1)).unwrap_err();
    assert_eq!(refused.source, Errno::EOPNOTSUPP);
}

#[test]
fn whoever_waits_for_a_placed_page_runs_on_after_a_wake() {
    let Some(_limit) = begin() else { return };
    for backing in BACKINGS {
        let guest = Guest::new(backing, 4);
        let reader = guest.reader(1);
        assert!(matches!(guest.event(), TrapEvent::Fault { .. }));
        // The page appears, and the thread is not told.
        let uffd = guest.raw_uffd();
        if backing == MemfdContinue {
            write_half(&guest.ram, 1);
            uffd.r#continue(guest.address(1), PAGE_SIZE, false).unwrap();
        } else {
            let content = filled(1, 7);
            // SAFETY: a page of content for a page of ours that is missing.
            unsafe {
                uffd.copy(content.as_ptr().cast(), guest.address(1), PAGE_SIZE, false).unwrap();
            }
        }
        assert!(!reader.is_finished());
        guest.placer.wake(run(1, 1)).unwrap();
        assert_eq!(reader.join().unwrap()[0], 7, "{backing}");
    }
}

#[test]
fn a_placed_memfd_page_whose_mapping_was_dropped_faults_again_and_a_wake_maps_it() {
    let Some(_limit) = begin() else { return };
    let guest = Guest::new(MemfdContinue, 4);
    assert_eq!(guest.placer.place(run(0, 4), &filled(4, 3)).unwrap().pages, 4);
    // MADV_DONTNEED drops the mapping, as reclaim does; the memfd keeps its page.
    guest.advise(1, 1, MmapAdvise::MADV_DONTNEED).unwrap();
    let reader = guest.reader(1);
    let fault = guest.event();
    assert!(matches!(fault, TrapEvent::Fault { minor: true, .. }), "{fault:?}");
    // A wake alone makes it fault again.
    guest.raw_uffd().wake(guest.address(1), PAGE_SIZE).unwrap();
    assert_eq!(guest.event(), fault);
    // The neighbours are mapped: that is no mistake here.
    guest.placer.wake(run(0, 4)).unwrap();
    assert_eq!(reader.join().unwrap(), [3; 2]);
    assert_eq!(guest.events(), []);
}

#[test]
fn dontneed_leaves_the_stale_page_of_a_memfd_and_remove_does_not() {
    let Some(_limit) = begin() else { return };
    let guest = Guest::new(MemfdCopy, 4);
    assert_eq!(guest.placer.place(run(0, 2), &filled(2, 3)).unwrap().pages, 2);
    guest.advise(0, 1, MmapAdvise::MADV_DONTNEED).unwrap();
    guest.advise(1, 1, MmapAdvise::MADV_REMOVE).unwrap();
    assert_eq!(guest.reader(0).join().unwrap(), [3; 2], "stale, and no event");
    let reader = guest.reader(1);
    assert!(matches!(guest.event(), TrapEvent::Fault { minor: false, .. }));
    assert_eq!(guest.placer.place_zero(run(1, 1)).unwrap(), ALL);
    assert_eq!(reader.join().unwrap(), [0; 2]);
}

#[test]
fn nothing_is_placed_until_a_removal_was_read() {
    let Some(_limit) = begin() else { return };
    for backing in BACKINGS {
        let options = UffdOptions { remove_events: true, ..UffdOptions::for_process() };
        let guest = Guest::over(memory(backing.ram(), 8), backing, options);
        assert_eq!(guest.placer.place(run(4, 2), &filled(2, 1)).unwrap().pages, 2);

        let advice = match backing {
            Anonymous => MmapAdvise::MADV_DONTNEED,
            MemfdContinue | MemfdCopy | DestinationBacking::Hugetlb => MmapAdvise::MADV_REMOVE,
        };
        let guest = Arc::new(guest);
        let remover = Arc::clone(&guest);
        let removing = thread::spawn(move || remover.advise(4, 2, advice));
        guest.wait_readable();

        let again = Placed { pages: 0, stop: Some(Stop::Again) };
        assert_eq!(guest.placer.place(run(0, 2), &filled(2, 2)).unwrap(), again, "{backing}");
        assert_eq!(again.rest(run(0, 2)), Some(run(0, 2)));
        assert_eq!(guest.placer.place_zero(run(2, 1)).unwrap(), again, "{backing}");
        guest.placer.wake(run(4, 2)).unwrap();
        assert!(!removing.is_finished());

        assert_eq!(guest.event(), TrapEvent::Removed(run(4, 2)));
        removing.join().unwrap().unwrap();
        assert_eq!(guest.placer.place(run(0, 2), &filled(2, 2)).unwrap().pages, 2, "{backing}");
        assert_eq!(guest.placer.place_zero(run(2, 1)).unwrap(), ALL, "{backing}");

        // What was removed is trapped again, and its old content is gone. A wake for
        // it (its placement was known, its removal not yet) only gives a new event.
        let early = guest.reader(4);
        let fault = guest.event();
        guest.placer.wake(run(4, 2)).unwrap();
        assert_eq!(guest.event(), fault, "{backing}");
        assert_eq!(guest.placer.place_zero(run(4, 1)).unwrap(), ALL);
        assert_eq!(early.join().unwrap(), [0; 2]);
        let reader = guest.reader(5);
        assert!(matches!(guest.event(), TrapEvent::Fault { minor: false, .. }), "{backing}");
        assert_eq!(guest.placer.place_zero(run(5, 1)).unwrap(), ALL);
        assert_eq!(reader.join().unwrap(), [0; 2]);
    }
}

#[test]
fn a_fault_tells_the_page_the_thread_and_whether_it_writes() {
    let Some(_limit) = begin() else { return };
    for backing in BACKINGS {
        let guest = Guest::new(backing, 8);
        for write in [false, true] {
            let page = 3 + u64::from(write);
            let ram = Arc::clone(&guest.ram);
            let toucher = thread::spawn(move || {
                let at = ram.page_ptr(PageIndex::new(page)).as_ptr().wrapping_add(100);
                // SAFETY: a byte of the mapping; the thread that answers is another.
                unsafe {
                    if write { at.write_volatile(8) } else { assert_eq!(at.read_volatile(), 4) }
                };
                gettid()
            });
            let fault = guest.event();
            assert_eq!(guest.placer.place(run(page, 1), &filled(1, 4)).unwrap(), ALL);
            let thread = toucher.join().unwrap();
            let page = PageIndex::new(page);
            assert_eq!(fault, TrapEvent::Fault { page, write, minor: false, thread }, "{backing}");
        }
        assert_eq!(ram_byte(&guest.ram, 4, 100), 8);
        assert_eq!(ram_byte(&guest.ram, 4, 99), 4);
    }
}

#[test]
fn accesses_by_the_kernel_are_trapped() {
    let Some(_limit) = begin() else { return };
    for backing in BACKINGS {
        let guest = Guest::new(backing, 4);
        let (thread, writer) = guest.kernel_read(1);
        let page = PageIndex::new(1);
        let thread = thread.recv().unwrap();
        assert_eq!(guest.event(), TrapEvent::Fault { page, write: false, minor: false, thread });
        assert_eq!(guest.placer.place(run(1, 1), &filled(1, 6)).unwrap(), ALL);
        assert_eq!(writer.join().unwrap(), Ok(vec![6; 64]), "{backing}");

        let ram = Arc::clone(&guest.ram);
        let reader = thread::spawn(move || {
            let (from, to) = pipe().unwrap();
            assert_eq!(nix::unistd::write(to, &[5; 64]), Ok(64));
            let into = ram.page_ptr(PageIndex::new(2)).as_ptr();
            // SAFETY: 64 bytes of the mapping, which the kernel writes to.
            let read = unsafe { nix::libc::read(from.as_raw_fd(), into.cast(), 64) };
            Errno::result(read).unwrap()
        });
        let fault = guest.event();
        assert!(matches!(fault, TrapEvent::Fault { write: true, .. }), "{fault:?}");
        assert_eq!(guest.placer.place(run(2, 1), &filled(1, 6)).unwrap(), ALL);
        assert_eq!(reader.join().unwrap(), 64);
        let bytes = [ram_byte(&guest.ram, 2, 63), ram_byte(&guest.ram, 2, 64)];
        assert_eq!(bytes, [5, 6], "{backing}");
    }
}

#[test]
fn with_user_mode_faults_only_the_kernels_accesses_fail() {
    let Some(_limit) = begin() else { return };
    for backing in BACKINGS {
        let options = UffdOptions { kernel_faults: false, ..UffdOptions::for_process() };
        let guest = Guest::over(memory(backing.ram(), 4), backing, options);
        let (_, writer) = guest.kernel_read(1);
        assert_eq!(writer.join().unwrap(), Err(Errno::EFAULT), "{backing}");
        assert_eq!(guest.events(), []);
        let reader = guest.reader(1);
        assert!(matches!(guest.event(), TrapEvent::Fault { .. }));
        assert_eq!(guest.placer.place(run(1, 1), &filled(1, 6)).unwrap(), ALL);
        assert_eq!(reader.join().unwrap(), [6; 2]);
    }
}

#[test]
fn zero_pages_are_placed_in_every_backing_and_take_memory_in_a_memfd_only() {
    let Some(_limit) = begin() else { return };
    for backing in BACKINGS {
        let guest = Guest::new(backing, 64);
        let kib = || guest.ram.memfd().map(|memfd| fstat(memfd).unwrap().st_blocks / 2);
        let before = kib();
        assert_eq!(guest.placer.place(run(40, 1), &filled(1, 9)).unwrap(), ALL);
        let reader = guest.reader(7);
        assert!(matches!(guest.event(), TrapEvent::Fault { .. }));
        let placed = guest.placer.place_zero(run(0, 64)).unwrap();
        assert_eq!(placed, Placed { pages: 40, stop: Some(Stop::Exists) }, "{backing}");
        assert_eq!(reader.join().unwrap(), [0; 2]);
        assert_eq!(guest.placer.place_zero(run(41, 23)).unwrap().pages, 23);
        let expected: Vec<u8> = (0..64).map(|page| if page == 40 { 9 } else { 0 }).collect();
        assert_eq!(guest.first_bytes(0, 64), expected);
        assert_eq!(kib(), before.map(|kib| kib + 64 * 4), "{backing}");
        // They are ordinary pages to write to.
        // SAFETY: a byte of the mapping, in a page that is placed.
        unsafe { guest.ram.page_ptr(PageIndex::new(3)).write_volatile(1) };
        assert_eq!(guest.first_bytes(2, 3), [0, 1, 0]);
        assert_eq!(guest.events(), []);
    }
}

#[test]
fn a_zero_page_over_a_stale_one_is_refused_and_can_be_placed_as_content() {
    let Some(_limit) = begin() else { return };
    let ram = memory(Backing::Memfd, 2);
    ram.write_run(run(0, 2), &filled(2, 5));
    let guest = Guest::over(ram, MemfdContinue, UffdOptions::for_process());
    let placed = guest.placer.place_zero(run(0, 2)).unwrap();
    assert_eq!(placed, Placed { pages: 0, stop: Some(Stop::Exists) });
    assert_eq!(guest.placer.place(run(0, 2), &filled(2, 0)).unwrap().pages, 2);
    assert_eq!(guest.first_bytes(0, 2), [0, 0]);
}

#[test]
fn two_threads_place_while_another_reads_all_and_every_byte_is_right() {
    const PAGES: u64 = 1024;
    let Some(_limit) = begin() else { return };
    for backing in BACKINGS {
        let guest = Arc::new(Guest::new(backing, PAGES));
        let start = Arc::new(Barrier::new(3));
        let reading = {
            let (ram, start) = (Arc::clone(&guest.ram), Arc::clone(&start));
            thread::spawn(move || {
                start.wait();
                // In an order that meets the placers at both ends.
                for step in 0..PAGES {
                    let page = if step % 2 == 0 { step / 2 } else { PAGES - 1 - step / 2 };
                    let mut content = vec![0; PAGE_SIZE];
                    ram.read_run(run(page, 1), &mut content);
                    assert!(content == content_of(run(page, 1)), "page {page}");
                }
            })
        };
        let placing = [0, 1].map(|lane| {
            let (placer, start) = (guest.placer.clone(), Arc::clone(&start));
            thread::spawn(move || {
                start.wait();
                // Runs of 1 to 16 pages; every second one is this thread's.
                let (mut page, mut turn) = (0, 0);
                while page < PAGES {
                    let run = run(page, (turn * 7 % 16 + 1).min(PAGES - page));
                    if turn % 2 == lane {
                        let placed = placer.place(run, &content_of(run)).unwrap();
                        assert_eq!(placed, Placed { pages: run.count(), stop: None });
                    }
                    (page, turn) = (run.end(), turn + 1);
                }
            })
        });
        for thread in placing.into_iter().chain([reading]) {
            thread.join().unwrap();
        }
        guest.placer.unregister().unwrap();
        let mut all = vec![0; PAGES as usize * PAGE_SIZE];
        guest.ram.read_run(run(0, PAGES), &mut all);
        assert!(all == content_of(run(0, PAGES)), "{backing}");
    }
}

#[test]
fn many_waiting_threads_are_read_as_a_batch() {
    let Some(_limit) = begin() else { return };
    let guest = Guest::new(Anonymous, 128);
    let readers: Vec<_> = (0..100).map(|page| guest.reader(page)).collect();
    let mut events = Vec::new();
    let mut largest = 0;
    while events.len() < 100 {
        guest.wait_readable();
        let count = guest.trap.read(&mut events).unwrap();
        assert!(count <= 64);
        largest = largest.max(count);
    }
    let mut pages: Vec<u64> = events
        .iter()
        .map(|event| match event {
            TrapEvent::Fault { page, .. } => page.get(),
            other => panic!("{other:?}"),
        })
        .collect();
    pages.sort_unstable();
    assert_eq!(pages, (0..100).collect::<Vec<_>>());
    assert_eq!(guest.placer.place(run(0, 100), &filled(100, 2)).unwrap().pages, 100);
    for reader in readers {
        assert_eq!(reader.join().unwrap(), [2; 2]);
    }
    assert_eq!(guest.events(), []);
}

#[test]
fn the_trap_is_readable_in_an_event_loop() {
    let Some(_limit) = begin() else { return };
    let Guest { ram, trap, placer } = Guest::new(Anonymous, 4);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        // SAFETY: a trap owns its descriptor, and it stays the same until the end.
        let trap = unsafe { AsyncFd::register_with_interest(trap, Interest::READABLE) }.unwrap();
        for page in 0..3 {
            let reader = reader(&ram, page);
            let mut events = Vec::new();
            while events.is_empty() {
                let mut ready = trap.readable().await.unwrap();
                if trap.get_ref().read(&mut events).unwrap() == 0 {
                    ready.clear_ready();
                }
            }
            assert_eq!(events.len(), 1);
            assert_eq!(placer.place(run(page, 1), &filled(1, 4)).unwrap(), ALL);
            assert_eq!(reader.join().unwrap(), [4; 2]);
        }
    });
}

#[test]
fn unregistering_lets_everybody_run_on_and_ends_placing() {
    let Some(_limit) = begin() else { return };
    for backing in BACKINGS {
        let guest = Guest::new(backing, 4);
        let reader = guest.reader(1);
        assert!(matches!(guest.event(), TrapEvent::Fault { .. }));
        guest.placer.unregister().unwrap();
        assert_eq!(reader.join().unwrap(), [0; 2], "what was not placed is zero");
        let error = guest.placer.place(run(2, 1), &filled(1, 1)).unwrap_err();
        assert_eq!((error.source, error.placed), (Errno::ENOENT, 0), "{backing}: {error}");
        let error = guest.placer.place_zero(run(3, 1)).unwrap_err();
        assert_eq!(error.source, Errno::ENOENT, "{backing}: {error}");
    }
}

#[test]
fn memory_in_use_stays_trapped_if_its_registration_is_dropped_unfinished() {
    let Some(_limit) = begin() else { return };
    for backing in BACKINGS {
        let Guest { ram, trap, placer } = Guest::new(backing, 4);
        assert!(is_trapped(&ram));
        drop(trap);
        drop(placer);
        assert!(is_trapped(&ram), "{backing}: missing pages would be read as zero");

        let Guest { ram, trap, placer } = Guest::new(backing, 4);
        placer.unregister().unwrap();
        assert!(!is_trapped(&ram));
        drop((trap, placer));
    }
}

/// With the kernel's poison where it has it, and without.
#[test]
fn a_page_that_is_lost_is_an_error_and_not_a_wait_also_after_the_end() {
    let Some(_limit) = begin() else { return };
    let can_poison = open(UffdOptions::for_process(), Anonymous).unwrap().can_poison();
    if !can_poison {
        println!("SKIPPED: this kernel has no UFFDIO_POISON (Linux 6.6)");
    }
    type Poison = fn(&Placer, PageRun) -> Result<Placed, PlaceError>;
    let poison: &[(&str, Poison)] = &[("cover", Placer::cover), ("poison", Placer::poison)];
    for ((how, poison), backing) in
        poison.iter().flat_map(|how| BACKINGS.map(|backing| (how, backing)))
    {
        let guest = Guest::new(backing, 8);
        // The kernel's access gives an error where the guest's would give SIGBUS.
        let (_, waiting) = guest.kernel_read(1);
        assert!(matches!(guest.event(), TrapEvent::Fault { .. }));
        let three = Placed { pages: 3, stop: None };
        assert_eq!(poison(&guest.placer, run(1, 3)).unwrap(), three, "{how} {backing}");
        assert_eq!(waiting.join().unwrap(), Err(Errno::EFAULT), "{how} {backing}");
        let is_lost = |page| guest.kernel_read(page).1.join().unwrap() == Err(Errno::EFAULT);
        assert!(is_lost(1) && is_lost(3), "{how} {backing}");
        assert_eq!(guest.events(), []);
        guest.placer.wake(run(1, 3)).unwrap();
        assert!(is_lost(2), "{how} {backing}");

        assert_eq!(guest.placer.place(run(4, 1), &filled(1, 4)).unwrap(), ALL);
        if *how == "poison" && can_poison {
            let exists = Placed { pages: 0, stop: Some(Stop::Exists) };
            assert_eq!(guest.placer.poison(run(4, 1)).unwrap(), exists, "{backing}");
            assert_eq!(guest.placer.poison(run(5, 2)).unwrap().pages, 2);
            assert!(is_lost(5));
        }
        guest.placer.unregister().unwrap();
        assert_eq!(guest.first_bytes(0, 1), [0]);
        assert_eq!(guest.first_bytes(4, 1), [4]);
        assert!((1..4).all(is_lost), "{how} {backing}: it reads as zero after the end");
        assert_eq!(guest.first_bytes(7, 1), [0]);
    }
}

/// Memory that is reserved in a memfd: its pages exist, and are not placed.
#[test]
fn a_lost_page_stays_lost_only_if_what_was_reserved_for_it_is_given_back() {
    let Some(_limit) = begin() else { return };
    if !open(UffdOptions::for_process(), MemfdContinue).unwrap().can_poison() {
        return println!("SKIPPED: this kernel has no UFFDIO_POISON (Linux 6.6)");
    }
    let guest = Guest::new(MemfdContinue, 8);
    reserve_files(&guest.ram, &AtomicBool::new(false)).unwrap();
    let (_, waiting) = guest.kernel_read(3);
    assert!(matches!(guest.event(), TrapEvent::Fault { minor: true, .. }), "it is trapped");
    assert_eq!(guest.placer.place(run(3, 1), &filled(1, 3)).unwrap(), ALL);
    assert!(waiting.join().unwrap().is_ok());

    let read = |page| guest.kernel_read(page).1.join().unwrap();
    assert_eq!(guest.placer.poison(run(1, 1)).unwrap(), ALL);
    assert_eq!(read(1), Err(Errno::EFAULT));
    // What the kernel does, and what must not come of it.
    guest.placer.wake(run(1, 1)).unwrap();
    assert!(read(1).is_ok(), "a page that exists is mapped in spite of the mark");

    guest.placer.give_back(run(2, 1)).unwrap();
    assert_eq!(guest.placer.poison(run(2, 1)).unwrap(), ALL);
    guest.placer.wake(run(2, 1)).unwrap();
    assert_eq!(read(2), Err(Errno::EFAULT));
    guest.placer.unregister().unwrap();
}

#[test]
fn memory_of_another_kind_is_refused() {
    let Some(_limit) = begin() else { return };
    for (ram, backing) in [
        (Backing::Memfd, Anonymous),
        (Backing::Anonymous, MemfdCopy),
        (Backing::Anonymous, MemfdContinue),
    ] {
        // SAFETY: nobody else has this memory.
        let refused = unsafe { register(memory(ram, 1), backing, UffdOptions::for_process()) };
        assert!(matches!(refused, Err(RegisterError::OtherBacking(named)) if named == backing));
    }
}

#[test]
fn a_memfd_that_has_pages_cannot_be_filled_by_copy() {
    let Some(_limit) = begin() else { return };
    let ram = memory(Backing::Memfd, 8);
    ram.write_run(run(6, 1), &filled(1, 0));
    // SAFETY: nobody else has this memory.
    let refused = unsafe { register(ram, MemfdCopy, UffdOptions::for_process()) };
    let error = refused.err().expect("page 6 would be mapped without a trap");
    assert!(matches!(error, RegisterError::NotEmpty { page } if page.get() == 6), "{error}");
}

/// Becomes nobody in a process of its own: identities belong to a whole process.
#[test]
fn without_permission_kernel_faults_are_refused_with_advice_and_user_faults_work() {
    const NAME: &str =
        "without_permission_kernel_faults_are_refused_with_advice_and_user_faults_work";
    const AS_NOBODY: &str = "POSTCOPY_TEST_AS_NOBODY";
    let Some(_limit) = begin() else { return };
    if std::env::var_os(AS_NOBODY).is_some() {
        become_nobody();
        refused_with_advice_for_kernel_faults();
        println!("refused rightly");
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: only root can become somebody without permissions");
        return;
    }
    let setting = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    if setting.trim() != "0" {
        println!("SKIPPED: vm.unprivileged_userfaultfd permits everybody");
        return;
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", NAME])
        .args(in_module(NAME))
        .env(AS_NOBODY, "1")
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    let errors = String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success(), "{output}\n{errors}");
    assert!(output.contains("refused rightly"), "{output}\n{errors}");
}

fn become_nobody() {
    let (user, group) = (nix::unistd::Uid::from_raw(65534), nix::unistd::Gid::from_raw(65534));
    nix::unistd::setgroups(&[]).unwrap();
    nix::unistd::setresgid(group, group, group).unwrap();
    nix::unistd::setresuid(user, user, user).unwrap();
    assert_eq!(
        File::open("/dev/userfaultfd").unwrap_err().kind(),
        std::io::ErrorKind::PermissionDenied
    );
}

fn refused_with_advice_for_kernel_faults() {
    for options in [UffdOptions::for_kvm(), UffdOptions::for_process()] {
        let refused = open(options, Anonymous).unwrap_err();
        assert!(matches!(refused, OpenError::NotPermitted { kernel_faults: true, .. }));
        let text = refused.to_string();
        for advice in ["/dev/userfaultfd", "vm.unprivileged_userfaultfd=1", "CAP_SYS_PTRACE"] {
            assert!(text.contains(advice), "{text}");
        }
    }
    // The device is there and closed to us; the system call is not.
    for backing in BACKINGS {
        let options = UffdOptions { kernel_faults: false, ..UffdOptions::for_process() };
        let guest = Guest::over(memory(backing.ram(), 2), backing, options);
        let reader = guest.reader(1);
        assert!(matches!(guest.event(), TrapEvent::Fault { .. }));
        assert_eq!(guest.placer.place(run(1, 1), &filled(1, 3)).unwrap(), ALL);
        assert_eq!(reader.join().unwrap(), [3; 2]);
    }
}

// --- What the tests are written with.

/// Ends the process if a test takes too long: a thread that waits for a page
/// cannot be stopped otherwise.
struct Limit(#[allow(dead_code)] Sender<()>);

/// Starts a test's watchdog. `None`, and a line that says so, where userfaultfd
/// is not permitted.
fn begin() -> Option<Limit> {
    match open(UffdOptions::for_process(), MemfdContinue) {
        Ok(_) => {}
        Err(refused @ (OpenError::NotPermitted { .. } | OpenError::NotInKernel)) => {
            println!("SKIPPED: {refused}");
            return None;
        }
        Err(error) => panic!("{error}"),
    }
    let (limit, ended) = channel();
    let test = thread::current().name().unwrap_or("a test").to_owned();
    thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{test} hangs");
            std::process::abort();
        }
    });
    Some(Limit(limit))
}

/// The test's name as the harness knows it, wherever this file is a module.
fn in_module(name: &str) -> Vec<String> {
    let module = module_path!().split_once("::").map(|(_, module)| module);
    module.map(|module| format!("{module}::{name}")).into_iter().collect()
}

struct Guest {
    ram: Arc<GuestRam>,
    trap: Trap,
    placer: Placer,
}

impl Guest {
    fn new(backing: DestinationBacking, pages: u64) -> Self {
        Self::over(memory(backing.ram(), pages), backing, UffdOptions::for_process())
    }

    fn over(ram: Arc<GuestRam>, backing: DestinationBacking, options: UffdOptions) -> Self {
        // SAFETY: these tests use raw pointers only.
        let (trap, placer) = unsafe { register(Arc::clone(&ram), backing, options) }.unwrap();
        assert_eq!((trap.backing(), placer.backing()), (backing, backing));
        Self { ram, trap, placer }
    }

    fn wait_readable(&self) {
        let mut fds = [PollFd::new(self.trap.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(20_000u16)), Ok(1), "no event came");
    }

    /// The next event.
    fn event(&self) -> TrapEvent {
        self.wait_readable();
        let events = self.events();
        assert_eq!(events.len(), 1, "{events:?}");
        events[0]
    }

    /// The events that are there.
    fn events(&self) -> Vec<TrapEvent> {
        let mut events = Vec::new();
        self.trap.read(&mut events).unwrap();
        events
    }

    fn reader(&self, page: u64) -> JoinHandle<[u8; 2]> {
        reader(&self.ram, page)
    }

    /// A thread that has the kernel read 64 bytes of a page; the first value is
    /// its id, told before it does.
    fn kernel_read(&self, page: u64) -> (Receiver<Pid>, JoinHandle<Result<Vec<u8>, Errno>>) {
        let (tell, thread) = channel();
        let ram = Arc::clone(&self.ram);
        let working = thread::spawn(move || {
            let (from, to) = pipe().unwrap();
            let _ = tell.send(gettid()); // Not every test asks.
            let content = ram.page_ptr(PageIndex::new(page)).as_ptr();
            // SAFETY: 64 bytes of the mapping, which the kernel reads.
            let written = unsafe { nix::libc::write(to.as_raw_fd(), content.cast(), 64) };
            assert_eq!(Errno::result(written)?, 64);
            let mut bytes = vec![0; 64];
            assert_eq!(nix::unistd::read(from, &mut bytes), Ok(64));
            Ok(bytes)
        });
        (thread, working)
    }

    /// The first byte of pages that are all placed.
    fn first_bytes(&self, first: u64, count: u64) -> Vec<u8> {
        (first..first + count).map(|page| ram_byte(&self.ram, page, 0)).collect()
    }

    fn address(&self, page: u64) -> *mut std::ffi::c_void {
        self.ram.page_ptr(PageIndex::new(page)).as_ptr().cast()
    }

    fn advise(&self, first: u64, count: u64, advice: MmapAdvise) -> nix::Result<()> {
        let start = self.ram.page_ptr(PageIndex::new(first)).cast();
        // SAFETY: whole pages of the mapping, to which there are no references.
        unsafe { madvise(start, count as usize * PAGE_SIZE, advice) }
    }

    /// The same descriptor, to do what the placer has no method for.
    fn raw_uffd(&self) -> ManuallyDrop<Uffd> {
        // SAFETY: it is not closed, and lives no longer than the trap in a test.
        ManuallyDrop::new(unsafe { Uffd::from_raw_fd(self.trap.as_raw_fd()) })
    }
}

/// A thread that reads a page's first and last byte.
fn reader(ram: &Arc<GuestRam>, page: u64) -> JoinHandle<[u8; 2]> {
    let ram = Arc::clone(ram);
    thread::spawn(move || [0, PAGE_SIZE - 1].map(|byte| ram_byte(&ram, page, byte)))
}

fn run(first: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex::new(first), count).unwrap()
}

fn memory(backing: Backing, pages: u64) -> Arc<GuestRam> {
    Arc::new(GuestRam::new(MemoryLayout::flat(pages).unwrap(), backing).unwrap())
}

fn filled(pages: usize, byte: u8) -> Vec<u8> {
    vec![byte; pages * PAGE_SIZE]
}

/// Content that differs in every page and in every word of a page.
fn content_of(run: PageRun) -> Vec<u8> {
    let words = run.pages().flat_map(|page| {
        (0..PAGE_SIZE as u64 / 8)
            .map(move |word| (page.get() << 9 | word).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    });
    words.flat_map(u64::to_le_bytes).collect()
}

fn ram_byte(ram: &GuestRam, page: u64, byte: usize) -> u8 {
    let at = ram.page_ptr(PageIndex::new(page)).as_ptr().wrapping_add(byte);
    // SAFETY: a byte of the mapping.
    unsafe { at.read_volatile() }
}

/// Writes the first half of a page through a mapping that is not registered.
fn write_half(ram: &GuestRam, page: u64) {
    let alias = ram.alias().unwrap().unwrap();
    let to = alias.page_ptr(PageIndex::new(page));
    // SAFETY: half a page of the alias.
    unsafe { to.write_bytes(7, PAGE_SIZE / 2) };
}

/// Four pages of memfd, registered with a mode that this crate does not use.
fn raw_memfd(mode: RegisterMode) -> (Arc<GuestRam>, Uffd) {
    let ram = memory(Backing::Memfd, 4);
    let features = sys::UFFD_FEATURE_MISSING_SHMEM | sys::UFFD_FEATURE_MINOR_SHMEM;
    let uffd = UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .user_mode_only(false)
        .require_features(FeatureFlags::from_bits_retain(features))
        .create()
        .unwrap();
    let all = &ram.segments()[0];
    uffd.register_with_mode(all.start().as_ptr().cast(), all.bytes(), mode).unwrap();
    (ram, uffd)
}

/// Whether the kernel traps missing pages of this mapping.
fn is_trapped(ram: &GuestRam) -> bool {
    let start = format!("{:x}-", ram.segments()[0].start().as_ptr() as usize);
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).expect("the mapping");
    flags.split_whitespace().any(|flag| flag == "um")
}
