//! The rules of huge pages, each shown on the real kernel: what userfaultfd does with memory of
//! hugetlbfs, what the file system tells of it, and what the placer makes of that.
#![cfg(feature = "io")]

#[path = "migrate/huge_page_pool.rs"]
mod huge_page_pool;

use huge_page_pool::Pool;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MmapAdvise, madvise};
use nix::sys::stat::fstat;
use nix::unistd::{Whence, lseek, pipe};
use postcopy::memory::guarded::{Guarded, Look};
use postcopy::memory::hugetlb::{self, PoolError, blocks_of};
use postcopy::memory::ram::{Backing, GuestRam, RamError};
use postcopy::memory::scan::{Holes, Kind, ZeroScan};
use postcopy::memory::users;
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use postcopy::uffd::DestinationBacking::{Anonymous, Hugetlb, MemfdContinue};
use postcopy::uffd::open::open;
use postcopy::uffd::{
    OpenError, Placed, Placer, RegisterError, Stop, Trap, TrapEvent, UffdOptions, register,
};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use userfaultfd::{FeatureFlags, RegisterMode, Uffd, UffdBuilder};
use userfaultfd_sys as sys;

/// Pages of a huge page.
const BLOCK: u64 = 512;

#[test]
fn a_huge_page_is_mapped_as_a_whole_and_a_fault_in_it_is_one_at_its_beginning() {
    let Some(_limit) = begin(2) else { return };
    let guest = Guest::new(2);
    let reader = guest.reader(BLOCK + 77);
    let fault = guest.event();
    assert!(
        matches!(fault, TrapEvent::Fault { page, minor: true, .. } if page.get() == BLOCK),
        "{fault:?}"
    );
    write_byte(&guest.alias, BLOCK + 77, 3);
    let uffd = guest.raw_uffd();
    for bytes in [PAGE_SIZE, 1 << 20] {
        assert!(uffd.r#continue(guest.address(BLOCK), bytes, true).is_err(), "{bytes} bytes");
    }
    assert!(!reader.is_finished());
    uffd.r#continue(guest.address(BLOCK), 2 << 20, true).unwrap();
    assert_eq!(reader.join().unwrap()[0], 3);
    // Nor is there an operation for zeros, so that a page is zero because its block is new.
    // SAFETY: memory of ours that nobody uses.
    assert!(unsafe { uffd.zeropage(guest.address(0), 2 << 20, true) }.is_err());
}

#[test]
fn with_one_kind_of_faults_alone_a_huge_page_appears_without_an_event() {
    let Some(_limit) = begin(2) else { return };
    let both = sys::UFFD_FEATURE_MISSING_HUGETLBFS | sys::UFFD_FEATURE_MINOR_HUGETLBFS;
    for (mode, page, expected) in [(RegisterMode::MISSING, 0, 7), (RegisterMode::MINOR, BLOCK, 0)] {
        let ram = memory(2);
        let alias = ram.alias().unwrap().unwrap();
        write_byte(&alias, 0, 7);
        let uffd = UffdBuilder::new()
            .require_features(FeatureFlags::from_bits_retain(both))
            .user_mode_only(false)
            .non_blocking(true)
            .create()
            .unwrap();
        let start = ram.segments()[0].start();
        uffd.register_with_mode(start.as_ptr().cast(), ram.segments()[0].bytes(), mode).unwrap();
        let read = thread::spawn(move || byte(&ram, page, 0));
        assert_eq!(read.join().unwrap(), expected, "{mode:?}");
        assert!(uffd.read_event().unwrap().is_none());
    }
}

#[test]
fn nothing_but_pread_tells_of_a_hole_without_filling_it() {
    let Some((_limit, pool)) = begin_with(2) else { return };
    let ram = memory(4);
    let (file, _) = ram.segments()[0].file_at(PageIndex::new(0)).unwrap();
    assert_eq!(lseek(file, 0, Whence::SeekData), Ok(0), "a hole is data to it");
    let mut bytes = [1; PAGE_SIZE];
    use std::os::unix::fs::FileExt;
    file.read_exact_at(&mut bytes, 3 << 20).unwrap();
    assert_eq!(bytes, [0; PAGE_SIZE]);
    pool.has_free(2);
    assert_eq!(file.write_at(&bytes, 0).unwrap_err().raw_os_error(), Some(nix::libc::EINVAL));

    // What is in the file is not what is mapped here.
    let other = ram.alias().unwrap().unwrap();
    write_byte(&other, 0, 1);
    let mut resident = [0u8; BLOCK as usize];
    let start = ram.page_ptr(PageIndex::new(0)).as_ptr();
    // SAFETY: a mapped range, with a byte for each page.
    let asked = unsafe { nix::libc::mincore(start.cast(), 2 << 20, resident.as_mut_ptr()) };
    assert_eq!((asked, resident[0] & 1), (0, 0));

    // Reading a hole takes a page; where there is none, it is an error and not the end.
    let guarded = Guarded::new().unwrap();
    assert_eq!(guarded.look(&ram, PageIndex::new(BLOCK)), Look::Zero);
    pool.has_free(0);
    assert_eq!(guarded.look(&ram, PageIndex::new(2 * BLOCK)), Look::Unreadable);
    assert!(guarded.write(&ram, PageIndex::new(5), 100, &[9; 5000]), "it is there");
    assert_eq!([byte(&ram, 5, 99), byte(&ram, 5, 100), byte(&ram, 6, 1003)], [0, 9, 9]);
    assert!(!guarded.write(&ram, PageIndex::new(3 * BLOCK), 0, &[9; 10]), "it is not");
}

#[test]
fn a_scan_finds_what_is_zero_and_takes_nothing_from_the_pool() {
    let Some((_limit, pool)) = begin_with(2) else { return };
    let ram = memory(5);
    // Two blocks have content: one in its last byte.
    write_byte(&ram, BLOCK + 3, 1);
    let last = ram.page_ptr(PageIndex::new(4 * BLOCK - 1)).as_ptr().wrapping_add(PAGE_SIZE - 1);
    // SAFETY: a byte of the mapping.
    unsafe { last.write_volatile(1) };
    pool.has_free(0);
    let mut found = Vec::new();
    let mut scan = ZeroScan::new(ram.clone()).unwrap();
    while let Some(runs) = scan.next(1000).unwrap() {
        found.extend(runs);
    }
    let pages = |wanted: Kind| -> Vec<u64> {
        let runs = found.iter().filter(|(_, kind)| *kind == wanted);
        runs.flat_map(|(run, _)| run.pages()).map(PageIndex::get).collect()
    };
    let block = |number: u64| number * BLOCK..(number + 1) * BLOCK;
    let holes: Vec<u64> = [0, 2, 4].into_iter().flat_map(block).collect();
    assert_eq!(pages(Kind::Hole), holes);
    let zeros = block(1).chain(block(3)).filter(|page| ![BLOCK + 3, 4 * BLOCK - 1].contains(page));
    assert_eq!(pages(Kind::Zero), zeros.collect::<Vec<_>>());

    let known = Holes::new(ram.clone()).unwrap();
    assert_eq!(known.first_part(run(100, 64)).unwrap(), (run(100, 412), true));
    assert_eq!(known.first_part(run(BLOCK + 500, 64)).unwrap(), (run(BLOCK + 500, 12), false));
    let blocks = fstat(ram.memfd().unwrap()).unwrap().st_blocks;
    assert_eq!(blocks, 2 * (2 << 20) / 512, "the scan took memory");
}

#[test]
fn pages_of_many_lanes_appear_with_the_last_one_of_their_huge_page() {
    const BLOCKS: u64 = 8;
    const LANES: u64 = 4;
    let Some(_limit) = begin(BLOCKS) else { return };
    let guest = Arc::new(Guest::new(BLOCKS));
    let start = Arc::new(Barrier::new((LANES + BLOCKS) as usize));
    let readers: Vec<_> = (0..BLOCKS)
        .map(|block| {
            let (ram, start) = (guest.ram.clone(), start.clone());
            thread::spawn(move || {
                start.wait();
                let mut content = vec![0; BLOCK as usize * PAGE_SIZE];
                ram.read_run(run(block * BLOCK, BLOCK), &mut content);
                assert!(content == content_of(run(block * BLOCK, BLOCK)), "block {block}");
            })
        })
        .collect();
    let lanes = (0..LANES).map(|lane| {
        let (placer, start) = (guest.placer.clone(), start.clone());
        thread::spawn(move || {
            start.wait();
            let (mut page, mut turn) = (0, 0);
            while page < BLOCKS * BLOCK {
                // Of 1 to 64 pages, over the borders of huge ones, too.
                let run = run(page, (turn * 7 % 64 + 1).min(BLOCKS * BLOCK - page));
                if turn % LANES == lane {
                    // Every fifth page is zero.
                    for part in run.pages().map(PageRun::single) {
                        let placed = match part.first().get() % 5 {
                            0 => placer.place_zero(part),
                            _ => placer.place(part, &content_of(part)),
                        };
                        assert_eq!(placed.unwrap(), Placed { pages: 1, stop: None });
                    }
                }
                (page, turn) = (run.end(), turn + 1);
            }
        })
    });
    for thread in lanes.collect::<Vec<_>>().into_iter().chain(readers) {
        thread.join().unwrap();
    }
    let all: Vec<PageRun> = guest.placer.opened(run(0, BLOCKS * BLOCK)).collect();
    assert_eq!(all, blocks_of(run(0, BLOCKS * BLOCK)).collect::<Vec<_>>());
    guest.placer.unregister().unwrap();
}

#[test]
fn a_run_over_a_border_is_placed_in_both_huge_pages() {
    let Some(_limit) = begin(2) else { return };
    let guest = Guest::new(2);
    let middle = run(BLOCK - 10, 30);
    assert_eq!(guest.placer.place(middle, &content_of(middle)).unwrap().pages, 30);
    assert_eq!(guest.placer.opened(middle).count(), 0);
    let reader = guest.reader(BLOCK - 1);
    assert!(matches!(guest.event(), TrapEvent::Fault { .. }));
    // A wake maps nothing that is not whole.
    guest.placer.wake(run(0, BLOCK)).unwrap();
    assert!(matches!(guest.event(), TrapEvent::Fault { .. }), "trapped anew");
    assert_eq!(guest.placer.place_zero(run(0, BLOCK - 10)).unwrap().pages, BLOCK - 10);
    let expected = content_of(PageRun::single(PageIndex::new(BLOCK - 1)));
    assert_eq!(reader.join().unwrap(), [expected[0], expected[PAGE_SIZE - 1]]);
    assert_eq!(guest.placer.opened(middle).collect::<Vec<_>>(), [run(0, BLOCK)]);
    assert_eq!([byte(&guest.ram, 0, 0), byte(&guest.ram, BLOCK - 11, 5)], [0, 0]);

    // The kernel's accesses wait as well, and a mapping that was dropped is made again.
    let reading = guest.kernel_read(BLOCK + 1);
    assert!(matches!(guest.event(), TrapEvent::Fault { .. }));
    guest.zeros(run(BLOCK + 20, BLOCK - 20));
    assert!(reading.join().unwrap().is_ok());
    guest.advise(BLOCK, BLOCK, MmapAdvise::MADV_DONTNEED).unwrap();
    let reader = guest.reader(BLOCK + 2);
    assert!(matches!(guest.event(), TrapEvent::Fault { minor: true, .. }));
    guest.placer.wake(run(BLOCK, BLOCK)).unwrap();
    let expected = content_of(PageRun::single(PageIndex::new(BLOCK + 2)));
    assert_eq!(reader.join().unwrap()[0], expected[0]);
    assert_eq!(guest.events(), []);
}

#[test]
fn a_lost_page_costs_its_huge_page_and_no_other() {
    let Some(_limit) = begin(2) else { return };
    if !open(UffdOptions::for_process(), Hugetlb).unwrap().can_poison() {
        println!("SKIPPED: this kernel has no UFFDIO_POISON (Linux 6.6)");
        return;
    }
    let guest = Guest::new(2);
    assert_eq!(guest.placer.place(run(0, 9), &content_of(run(0, 9))).unwrap().pages, 9);
    let waiting = guest.kernel_read(3);
    assert!(matches!(guest.event(), TrapEvent::Fault { .. }));
    assert_eq!(guest.placer.poison(run(20, 2)).unwrap(), Placed { pages: 2, stop: None });
    assert_eq!(waiting.join().unwrap(), Err(Errno::EFAULT));
    // The others still come, and nothing maps them over the mark.
    guest.zeros(run(9, 11));
    assert_eq!(guest.placer.poison(run(22, 1)).unwrap(), Placed { pages: 1, stop: None });
    guest.zeros(run(23, BLOCK - 23));
    guest.placer.wake(run(0, BLOCK)).unwrap();
    let is_lost = |page| guest.kernel_read(page).join().unwrap() == Err(Errno::EFAULT);
    assert!(is_lost(3) && is_lost(511));
    guest.zeros(run(BLOCK, BLOCK));
    assert!(!is_lost(BLOCK));
    guest.placer.unregister().unwrap();
    assert!(is_lost(3) && is_lost(20) && !is_lost(BLOCK + 5));
    assert_eq!(guest.events(), []);
}

#[test]
fn what_a_guest_gave_back_is_zero_and_waits_for_its_event() {
    let Some((_limit, pool)) = begin_with(2) else { return };
    let options = UffdOptions { remove_events: true, ..UffdOptions::for_process() };
    let guest = Arc::new(Guest::over(memory(2), options));
    let all = run(0, BLOCK);
    assert_eq!(guest.placer.place(all, &content_of(all)).unwrap().pages, BLOCK);
    assert_eq!(guest.placer.place_zero(run(BLOCK, BLOCK - 1)).unwrap().pages, BLOCK - 1);
    let remover = guest.clone();
    let removing = thread::spawn(move || remover.advise(0, BLOCK, MmapAdvise::MADV_REMOVE));
    guest.wait_readable();
    // The last page of a huge one is put back in hand until the event was read.
    let last = run(2 * BLOCK - 1, 1);
    for _ in 0..3 {
        let placed = guest.placer.place_zero(last).unwrap();
        assert_eq!(placed, Placed { pages: 0, stop: Some(Stop::Again) });
    }
    assert_eq!(guest.placer.opened(last).count(), 0);
    assert_eq!(guest.events(), [TrapEvent::Removed(all)]);
    guest.placer.removed(all);
    removing.join().unwrap().unwrap();
    assert_eq!(guest.placer.place_zero(last).unwrap(), Placed { pages: 1, stop: None });
    assert_eq!(guest.placer.opened(last).count(), 1);

    pool.has_free(1);
    let reader = guest.reader(7);
    assert!(matches!(guest.event(), TrapEvent::Fault { minor: false, .. }));
    assert_eq!(guest.placer.opened(all).count(), 0);
    for page in all.pages() {
        assert_eq!(guest.placer.place_zero(PageRun::single(page)).unwrap().pages, 1);
    }
    assert_eq!(reader.join().unwrap(), [0; 2]);
    pool.has_free(0);
    assert_eq!(guest.events(), []);
}

#[test]
fn huge_pages_that_cannot_be_had_are_refused_by_their_number() {
    let Some((_limit, pool)) = begin_with(3) else { return };
    let goes_on = AtomicBool::new(false);
    let five = GuestRam::new(layout(5), Backing::Hugetlb).unwrap();
    let refused = hugetlb::reserve(&five, &goes_on).unwrap_err();
    assert!(matches!(refused, PoolError::TooFew { needed: 5, got: 3, .. }), "{refused}");
    assert!(refused.to_string().contains("vm.nr_hugepages is 2 too low"), "{refused}");
    drop(five);
    let three = GuestRam::new(layout(3), Backing::Hugetlb).unwrap();
    hugetlb::reserve(&three, &goes_on).unwrap();
    hugetlb::reserve(&three, &goes_on).unwrap();
    pool.has_free(0);
    let stopped = hugetlb::reserve(&three, &AtomicBool::new(true)).unwrap_err();
    assert!(matches!(stopped, PoolError::Stopped));
}

#[test]
fn memory_of_huge_pages_is_what_it_says_or_refused() {
    let Some(_limit) = begin(1) else { return };
    let odd = GuestRam::new(MemoryLayout::flat(BLOCK + 1).unwrap(), Backing::Hugetlb).unwrap_err();
    assert!(matches!(odd, RamError::HugePages { start: 0, .. }), "{odd}");
    let huge = memory(1);
    assert!(huge.segments()[0].is_huge());
    users::check(&huge, &[]).unwrap();
    users::check_can_be_trapped(&huge).unwrap();
    let small = Arc::new(GuestRam::new(layout(1), Backing::Memfd).unwrap());
    let none = Arc::new(GuestRam::new(layout(1), Backing::Anonymous).unwrap());
    for (ram, backing) in
        [(&huge, MemfdContinue), (&huge, Anonymous), (&small, Hugetlb), (&none, Hugetlb)]
    {
        // SAFETY: nobody else has this memory.
        let refused = unsafe { register(ram.clone(), backing, UffdOptions::for_process()) };
        assert!(matches!(refused, Err(RegisterError::OtherBacking(named)) if named == backing));
    }
    // What only a VMM can make: a part of a huge page.
    use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, mmap::MmapRegionBuilder};
    let (start, file) = (huge.segments()[0].start(), huge.segments()[0].file().unwrap().clone());
    // SAFETY: half of a mapping that lives to the end of the test.
    let part =
        unsafe { MmapRegionBuilder::<()>::new(1 << 20).with_raw_mmap_pointer(start.as_ptr()) }
            .with_file_offset(file)
            .with_mmap_prot(nix::libc::PROT_READ | nix::libc::PROT_WRITE)
            .with_mmap_flags(nix::libc::MAP_SHARED)
            .build()
            .unwrap();
    let region = GuestRegionMmap::new(part, GuestAddress(0)).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    let refused = GuestRam::from_guest_memory(memory).unwrap_err();
    let RamError::Region { source, .. } = refused else { panic!("{refused}") };
    assert!(source.to_string().contains("begin and end"), "{source}");
}

// --- What the tests are written with.

/// Ends the process if a test takes too long: a thread that waits for a page
/// cannot be stopped otherwise.
struct Limit(#[allow(dead_code)] Sender<()>);

/// Starts a test's watchdog and gets so many huge pages. `None`, and a line that says so, where
/// they or userfaultfd cannot be had.
fn begin_with(blocks: u64) -> Option<(Limit, Pool)> {
    match open(UffdOptions::for_process(), Hugetlb) {
        Ok(_) => {}
        Err(
            refused @ (OpenError::NotPermitted { .. }
            | OpenError::NotInKernel
            | OpenError::MissingFeatures(_)),
        ) => {
            println!("SKIPPED: {refused}");
            return None;
        }
        Err(error) => panic!("{error}"),
    }
    let pool = Pool::of(blocks)?;
    let (limit, ended) = channel();
    let test = thread::current().name().unwrap_or("a test").to_owned();
    thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{test} hangs");
            std::process::abort();
        }
    });
    Some((Limit(limit), pool))
}

fn begin(blocks: u64) -> Option<impl Sized> {
    begin_with(blocks)
}

struct Guest {
    ram: Arc<GuestRam>,
    alias: GuestRam,
    trap: Trap,
    placer: Placer,
}

impl Guest {
    /// All of it is reserved.
    fn new(blocks: u64) -> Self {
        Self::over(memory(blocks), UffdOptions::for_process())
    }

    fn over(ram: Arc<GuestRam>, options: UffdOptions) -> Self {
        hugetlb::reserve(&ram, &AtomicBool::new(false)).unwrap();
        let alias = ram.alias().unwrap().unwrap();
        // SAFETY: these tests use raw pointers only.
        let (trap, placer) = unsafe { register(Arc::clone(&ram), Hugetlb, options) }.unwrap();
        assert_eq!((trap.backing(), placer.backing()), (Hugetlb, Hugetlb));
        Self { ram, alias, trap, placer }
    }

    fn zeros(&self, run: PageRun) {
        let all = Placed { pages: run.count(), stop: None };
        assert_eq!(self.placer.place_zero(run).unwrap(), all);
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

    /// A thread that reads a page's first and last byte.
    fn reader(&self, page: u64) -> JoinHandle<[u8; 2]> {
        let ram = Arc::clone(&self.ram);
        thread::spawn(move || [0, PAGE_SIZE - 1].map(|at| byte(&ram, page, at)))
    }

    /// A thread that has the kernel read 64 bytes of a page.
    fn kernel_read(&self, page: u64) -> JoinHandle<Result<(), Errno>> {
        let ram = Arc::clone(&self.ram);
        thread::spawn(move || {
            let (_from, to) = pipe().unwrap();
            let content = ram.page_ptr(PageIndex::new(page)).as_ptr();
            // SAFETY: 64 bytes of the mapping, which the kernel reads.
            let written = unsafe { nix::libc::write(to.as_raw_fd(), content.cast(), 64) };
            Errno::result(written).map(drop)
        })
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

fn run(first: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex::new(first), count).unwrap()
}

fn layout(blocks: u64) -> MemoryLayout {
    MemoryLayout::flat(blocks * BLOCK).unwrap()
}

fn memory(blocks: u64) -> Arc<GuestRam> {
    Arc::new(GuestRam::new(layout(blocks), Backing::Hugetlb).unwrap())
}

/// Content that differs in every page and in every word of a page; every fifth page is zero.
fn content_of(run: PageRun) -> Vec<u8> {
    let words = run.pages().flat_map(|page| {
        (0..PAGE_SIZE as u64 / 8).map(move |word| match page.get() % 5 {
            0 => 0,
            _ => (page.get() << 9 | word).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
        })
    });
    words.flat_map(u64::to_le_bytes).collect()
}

fn byte(ram: &GuestRam, page: u64, at: usize) -> u8 {
    let at = ram.page_ptr(PageIndex::new(page)).as_ptr().wrapping_add(at);
    // SAFETY: a byte of the mapping.
    unsafe { at.read_volatile() }
}

fn write_byte(ram: &GuestRam, page: u64, value: u8) {
    // SAFETY: a byte of the mapping.
    unsafe { ram.page_ptr(PageIndex::new(page)).write_volatile(value) };
}
