//! Guest memory in several pieces under the real userfaultfd: what a VMM has already made,
//! with regions that lie anywhere in the process and in files of their own.
#![cfg(feature = "io")]

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MmapAdvise, madvise};
use postcopy::memory::ram::GuestRam;
use postcopy::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use postcopy::uffd::DestinationBacking::{self, Anonymous, MemfdContinue, MemfdCopy};
use postcopy::uffd::open::open;
use postcopy::uffd::{OpenError, Placed, Placer, Trap, TrapEvent, UffdOptions, register};
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const PAGE: u64 = PAGE_SIZE as u64;
/// First page in guest physical memory, and pages. The second begins where the first ends.
const REGIONS: [(u64, u64); 4] = [(0, 5), (5, 1), (64, 7), (1 << 20, 3)];
const PAGES: u64 = 16;

#[test]
fn a_run_across_regions_is_placed_and_found_by_the_guests_own_addresses() {
    let Some(_limit) = begin() else { return };
    for backing in [Anonymous, MemfdContinue, MemfdCopy] {
        let guest = Guest::new(backing);
        let start = Arc::new(Barrier::new(PAGES as usize + 1));
        let readers: Vec<_> = (0..PAGES)
            .map(|page| {
                let (ram, start) = (guest.ram.clone(), start.clone());
                thread::spawn(move || {
                    start.wait();
                    let mut content = vec![0; PAGE_SIZE];
                    ram.read_run(run(page, 1), &mut content);
                    content
                })
            })
            .collect();
        start.wait();
        let mut waiting = std::collections::BTreeSet::new();
        while waiting.len() < PAGES as usize {
            for event in guest.events() {
                let TrapEvent::Fault { page, .. } = event else { panic!("{event:?}") };
                waiting.insert(page.get());
            }
        }
        assert!(waiting.into_iter().eq(0..PAGES));
        // All regions but the last page, in one go; then a zero page.
        let most = run(0, PAGES - 1);
        let placed = guest.placer.place(most, &content(most)).unwrap();
        assert_eq!(placed, Placed { pages: most.count(), stop: None }, "{backing}");
        assert_eq!(guest.placer.place_zero(run(PAGES - 1, 1)).unwrap().pages, 1);
        guest.placer.wake(run(0, PAGES)).unwrap();
        let mut expected = content(most);
        expected.resize(PAGES as usize * PAGE_SIZE, 0);
        let read: Vec<u8> = readers.into_iter().flat_map(|of| of.join().unwrap()).collect();
        assert!(read == expected, "{backing}");
        let mut seen = Vec::new();
        for (first, pages) in REGIONS {
            let mut region = vec![0; (pages * PAGE) as usize];
            guest.memory.read_slice(&mut region, GuestAddress(first * PAGE)).unwrap();
            seen.extend(region);
        }
        assert!(seen == expected, "{backing}");
        guest.placer.unregister().unwrap();
        assert_eq!(guest.trapped_regions(), 0);
    }
}

#[test]
fn zero_pages_and_a_stop_go_across_regions() {
    let Some(_limit) = begin() else { return };
    for backing in [Anonymous, MemfdCopy] {
        let guest = Guest::new(backing);
        assert_eq!(guest.placer.place_zero(run(4, 3)).unwrap().pages, 3, "{backing}");
        // The pages before are placed, up to the first that is there.
        let whole = run(2, 8);
        let placed = guest.placer.place(whole, &content(whole)).unwrap();
        assert_eq!((placed.pages, placed.is_complete()), (2, false), "{backing}");
        let behind = run(7, 9);
        assert!(guest.placer.place(behind, &content(behind)).unwrap().is_complete());
        let mut read = vec![0; behind.bytes()];
        guest.ram.read_run(behind, &mut read);
        assert!(read == content(behind));
    }
}

#[test]
fn memory_given_back_is_told_by_page_in_every_region() {
    let Some(_limit) = begin() else { return };
    let guest = Guest::new(Anonymous);
    assert!(guest.placer.place(run(0, PAGES), &content(run(0, PAGES))).unwrap().is_complete());
    for (segment, (_, pages)) in guest.ram.segments().iter().zip(REGIONS) {
        let (start, bytes) = (segment.start().as_ptr() as usize, segment.bytes());
        let advising = thread::spawn(move || {
            let start = std::ptr::NonNull::new(start as *mut _).unwrap();
            // SAFETY: a whole mapping, to which there are no references.
            unsafe { madvise(start, bytes, MmapAdvise::MADV_DONTNEED) }.unwrap();
        });
        let mut removed = Vec::new();
        while removed.is_empty() {
            removed = guest.events();
        }
        advising.join().unwrap();
        assert_eq!(segment.run().count(), pages);
        assert_eq!(removed, [TrapEvent::Removed(segment.run())]);
    }
}

#[test]
fn memory_that_the_vmm_still_holds_stays_trapped_until_it_goes() {
    let Some(_limit) = begin() else { return };
    for backing in [Anonymous, MemfdContinue] {
        let guest = Guest::new(backing);
        let regions = REGIONS.len();
        assert_eq!(guest.trapped_regions(), regions);
        let Guest { ram, trap, placer, memory, starts } = guest;
        drop((trap, placer, ram));
        assert_eq!(trapped(&starts), regions, "{backing}: missing pages would read as zero");
        drop(memory);
        assert_eq!(trapped(&starts), 0);
    }
}

struct Guest {
    ram: Arc<GuestRam>,
    trap: Trap,
    placer: Placer,
    memory: GuestMemoryMmap,
    starts: Vec<usize>,
}

impl Guest {
    fn new(backing: DestinationBacking) -> Self {
        let memory = vmm_memory(backing);
        let ram = Arc::new(GuestRam::from_guest_memory(memory.clone()).unwrap());
        let starts = ram.segments().iter().map(|of| of.start().as_ptr() as usize).collect();
        let options = UffdOptions { remove_events: true, ..UffdOptions::for_process() };
        // SAFETY: these tests use raw pointers only.
        let (trap, placer) = unsafe { register(ram.clone(), backing, options) }.unwrap();
        Self { ram, trap, placer, memory, starts }
    }

    /// The next events, waited for.
    fn events(&self) -> Vec<TrapEvent> {
        let mut fds = [PollFd::new(self.trap.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(20_000u16)), Ok(1), "no event came");
        let mut events = Vec::new();
        self.trap.read(&mut events).unwrap();
        events
    }

    fn trapped_regions(&self) -> usize {
        trapped(&self.starts)
    }
}

/// Memory as a VMM makes it: private, or a file for each two regions, the later one first.
fn vmm_memory(backing: DestinationBacking) -> GuestMemoryMmap {
    let files = [0, 1].map(|_| {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(PAGES * PAGE).unwrap();
        Arc::new(file)
    });
    let regions = (0..).zip(REGIONS).map(|(index, (first, pages))| {
        let offset = if index % 2 == 0 { PAGES - pages } else { 1 } * PAGE;
        let file = FileOffset::from_arc(files[index / 2].clone(), offset);
        let file = (backing != Anonymous).then_some(file);
        let start = GuestAddress(first * PAGE);
        GuestRegionMmap::from_range(start, (pages * PAGE) as usize, file).unwrap()
    });
    GuestMemoryMmap::from_regions(regions.collect()).unwrap()
}

fn run(first: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex::new(first), count).unwrap()
}

/// Content that differs from page to page and word to word.
fn content(run: PageRun) -> Vec<u8> {
    let words = run.pages().flat_map(|page| {
        (0..PAGE / 8).map(move |word| (page.get() << 9 | word).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    });
    words.flat_map(|word| (word | 1).to_le_bytes()).collect()
}

/// How many of the mappings that hold these addresses are trapped by the kernel.
fn trapped(addresses: &[usize]) -> usize {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut range = 0..0;
    let mut found = 0;
    for line in maps.lines() {
        let bounds = line.split(' ').next().and_then(|range| range.split_once('-'));
        let parsed = bounds
            .map(|(from, to)| (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16)));
        if let Some((Ok(from), Ok(to))) = parsed {
            range = from..to;
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && flags.split_whitespace().any(|flag| flag == "um")
        {
            found += addresses.iter().filter(|address| range.contains(address)).count();
        }
    }
    found
}

/// Ends the process if a test hangs; the test is over when it is dropped.
#[expect(dead_code, reason = "dropping it ends the watch, and lets the next test begin")]
struct Limit(Sender<()>, MutexGuard<'static, ()>);

/// Addresses that one test has unmapped are those of another one's memory next, and it looks at
/// what is trapped there.
static ALONE: Mutex<()> = Mutex::new(());

/// `None` where there is no userfaultfd to test with, which it says.
fn begin() -> Option<Limit> {
    match open(UffdOptions::for_process(), MemfdContinue) {
        Ok(_) => {}
        Err(refused @ (OpenError::NotPermitted { .. } | OpenError::NotInKernel)) => {
            println!("SKIPPED: {refused}");
            return None;
        }
        Err(error) => panic!("{error}"),
    }
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (limit, ended) = channel::<()>();
    let test = thread::current().name().unwrap_or("a test").to_owned();
    thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{test} hangs");
            std::process::abort();
        }
    });
    Some(Limit(limit, alone))
}
