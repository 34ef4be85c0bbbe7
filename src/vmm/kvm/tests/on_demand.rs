//! The guest over memory whose pages come when they are asked for, late, or never.

use super::*;
use nix::sys::mman::{MmapAdvise, madvise};
use std::ffi::c_void;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use userfaultfd::{Event, Uffd, UffdBuilder};

/// Whether there is a userfaultfd to test with that traps the kernel's accesses too.
fn userfaultfd() -> bool {
    let made = UffdBuilder::new().user_mode_only(false).create();
    if let Err(error) = &made {
        println!("skipped: no userfaultfd for kernel faults: {error}");
    }
    made.is_ok()
}

fn register(ram: &GuestRam) -> Uffd {
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).non_blocking(true).user_mode_only(false);
    let uffd = builder.create().unwrap();
    for segment in ram.segments() {
        uffd.register(segment.start().as_ptr().cast(), segment.bytes()).unwrap();
    }
    uffd
}

/// Places a missing page of `ram`.
fn place(uffd: &Uffd, source: &GuestRam, ram: &GuestRam, page: PageIndex) {
    let (from, to) = (source.page_ptr(page).as_ptr(), ram.page_ptr(page).as_ptr());
    // SAFETY: both are whole pages; `to` is registered and missing.
    unsafe { uffd.copy(from as *const c_void, to.cast(), PAGE_SIZE, true) }.unwrap();
}

fn unregister(uffd: &Uffd, ram: &GuestRam) {
    for segment in ram.segments() {
        uffd.unregister(segment.start().as_ptr().cast(), segment.bytes()).unwrap();
    }
}

/// Serves the faults of `ram` from `source`, on a thread, while the test runs.
struct Pager {
    served: Arc<AtomicU64>,
    holding: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<HashSet<u64>>,
}

impl Pager {
    /// Holds back, while `holding` is set, the page `held`, or all pages.
    fn start(ram: Arc<GuestRam>, source: Arc<GuestRam>, held: Option<PageIndex>) -> Self {
        let uffd = register(&ram);
        let served = Arc::new(AtomicU64::new(0));
        let holding = Arc::new(AtomicBool::new(held.is_some()));
        let over = Arc::new(AtomicBool::new(false));
        let flags = [&holding, &over].map(Arc::clone);
        let count = Arc::clone(&served);
        let body = move || serve_faults(&uffd, &ram, &source, held, &count, &flags);
        Self { served, holding, over, thread: std::thread::spawn(body) }
    }

    /// Has the missing pages placed, and tells which ones were asked for.
    fn finish(self) -> HashSet<u64> {
        self.over.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

fn serve_faults(
    uffd: &Uffd,
    ram: &GuestRam,
    source: &GuestRam,
    held: Option<PageIndex>,
    count: &AtomicU64,
    [holding, over]: &[Arc<AtomicBool>; 2],
) -> HashSet<u64> {
    let place = |page: u64| place(uffd, source, ram, PageIndex::new(page));
    let (mut placed, mut waiting) = (HashSet::new(), Vec::new());
    while !over.load(Ordering::SeqCst) {
        match uffd.read_event().unwrap() {
            Some(Event::Pagefault { addr, .. }) => {
                waiting.push(ram.page_of_host(addr as usize).unwrap());
            }
            Some(event) => panic!("unexpected {event:?}"),
            None => std::thread::sleep(Duration::from_micros(20)),
        }
        let is_holding = holding.load(Ordering::SeqCst);
        waiting.retain(|&page| {
            if is_holding && held.is_none_or(|held| held == page) {
                return true;
            }
            if placed.insert(page.get()) {
                // Counted before its user can go on.
                count.fetch_add(1, Ordering::SeqCst);
                place(page.get());
            } else {
                uffd.wake(ram.page_ptr(page).as_ptr().cast(), PAGE_SIZE).unwrap();
            }
            false
        });
    }
    (0..ram.layout().pages()).filter(|page| !placed.contains(page)).for_each(place);
    unregister(uffd, ram);
    placed
}

#[test]
fn a_guest_moves_with_its_pages_following_on_demand() {
    if !kvm() || !userfaultfd() {
        return;
    }
    let _watchdog = watchdog(100);
    for vcpus in [1, 2, 1, 2] {
        let mut workload = workload(Pattern::Random, vcpus, 0);
        workload.think_ns = 200_000;
        let mut source = KvmGuest::new(memory(flat()), workload.clone()).unwrap();
        source.resume().unwrap();
        wait_until(&source, |vcpu| word(&source, vcpu, control::STEPS) > 50);
        let ram = memory(flat());
        let pager = Pager::start(Arc::clone(&ram), Arc::clone(source.ram()), None);
        let mut target = KvmGuest::prepare(Arc::clone(&ram), workload.clone()).unwrap();
        source.pause().unwrap();
        let state = source.capture().unwrap();
        assert_eq!(pager.served.load(Ordering::SeqCst), 0, "prepare touched guest memory");
        // Restoring the MSR that names a clock touches the clock.
        let opened = envelope::open(&state, vcpus as usize).unwrap();
        let clocks = opened.vcpus.iter().filter(|vcpu| vcpu.has_clock()).count() as u64;
        target.restore(&state).unwrap();
        assert_eq!(pager.served.load(Ordering::SeqCst), clocks, "faults during restore");
        target.resume().unwrap();
        // After some ticks the pages are there that KVM itself needs to deliver one.
        wait_until(&target, |vcpu| {
            word(&target, vcpu, control::TICKS) >= word(&source, vcpu, control::TICKS) + 3
        });
        // No page comes: the vCPUs soon stand still, and can be stopped all the same.
        pager.holding.store(true, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(5));
        target.pause().unwrap();
        pager.holding.store(false, Ordering::SeqCst);
        target.resume().unwrap();
        let reached = word(&target, 0, control::STEPS);
        wait_until(&target, |vcpu| word(&target, vcpu, control::STEPS) > reached + 100);
        let faulted = pager.finish();
        let steps = stop(&target);
        compare(&ram, &workload, &steps);
        // The seeds are indeed what the first instructions need.
        for seed in target.seeds() {
            let histogram = (16..24).contains(&seed.get()) && seed.get() % 2 == 1;
            let clock = clocks == 0 && (0..vcpus).any(|vcpu| tables::clock_page(vcpu) == seed);
            assert!(histogram || clock || faulted.contains(&seed.get()), "{seed} was not needed");
        }
    }
}

#[test]
fn a_guest_is_dropped_while_its_pages_are_missing() {
    if !kvm() || !userfaultfd() {
        return;
    }
    let _watchdog = watchdog(100);
    for _ in 0..4 {
        let workload = workload(Pattern::Random, 2, 0);
        let mut source = KvmGuest::new(memory(flat()), workload.clone()).unwrap();
        let state = source.capture().unwrap();
        let ram = memory(flat());
        let pager = Pager::start(Arc::clone(&ram), Arc::clone(source.ram()), None);
        let mut target = KvmGuest::prepare(Arc::clone(&ram), workload).unwrap();
        target.restore(&state).unwrap();
        target.resume().unwrap();
        while pager.served.load(Ordering::SeqCst) < 60 {
            std::thread::sleep(Duration::from_micros(50));
        }
        pager.holding.store(true, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(5));
        let (dropped, is_dropped) = channel();
        let dropper = std::thread::spawn(move || {
            drop(target);
            let _ = dropped.send(());
        });
        let in_time = is_dropped.recv_timeout(Duration::from_secs(15));
        // Whatever happened, the pages come now: a process that waits for them in the
        // kernel could not even be killed.
        pager.finish();
        dropper.join().unwrap();
        in_time.expect("drop waits for a missing page");
    }
}

#[test]
fn a_vcpu_that_waits_in_kvm_for_a_page_hangs_neither_pause_nor_drop() {
    if !kvm() || !userfaultfd() {
        return;
    }
    let _watchdog = watchdog(60);
    let workload = workload(Pattern::Random, 1, 0);
    let mut source = KvmGuest::new(memory(flat()), workload.clone()).unwrap();
    let state = source.capture().unwrap();
    // Where KVM emulates the delivery of an interrupt, it waits for this page in a way
    // that no signal ends; where the processor delivers it, the vCPU can be stopped.
    let held = Some(tables::IDT);
    let ram = memory(flat());
    let pager = Pager::start(Arc::clone(&ram), Arc::clone(source.ram()), held);
    let mut target = KvmGuest::prepare(Arc::clone(&ram), workload).unwrap();
    target.restore(&state).unwrap();
    target.resume().unwrap();
    // Time for a tick, which cannot be delivered.
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(word(&target, 0, control::TICKS), 0);
    if let Err(error) = target.stop_vcpus(Duration::from_millis(500)) {
        assert!(matches!(error, KvmError::NotStopping { vcpu: 0, .. }), "{error}");
    }
    drop(target);
    pager.finish();
}

#[test]
fn a_pause_that_does_not_succeed_leaves_every_vcpu_running() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(60);
    let mut guest = KvmGuest::new(memory(flat()), workload(Pattern::Random, 2, 0)).unwrap();
    guest.resume().unwrap();
    let mut given_up = 0;
    for round in 0..400u64 {
        // Now and then one of them is parked when the time is over, and the other is not.
        let limit = Duration::from_micros(round % 40);
        match guest.stop_all_or_none(limit) {
            Ok(()) => guest.vcpus.iter().try_for_each(Vcpu::resume).unwrap(),
            Err(KvmError::NotStopping { .. }) => given_up += 1,
            Err(error) => panic!("{error}"),
        }
        if round % 20 == 0 {
            let steps = |vcpu| word(&guest, vcpu, control::STEPS);
            let before = [steps(0), steps(1)];
            wait_until(&guest, |vcpu| steps(vcpu) > before[vcpu as usize]);
        }
    }
    assert!(given_up > 0, "every pause succeeded");
    println!("{given_up} of 400 pauses were given up");
    guest.pause().unwrap();
}

/// `struct uffdio_poison`.
#[repr(C)]
struct Poison {
    start: u64,
    len: u64,
    mode: u64,
    updated: i64,
}

nix::ioctl_readwrite!(uffdio_poison, 0xAA, 0x08, Poison);

#[test]
fn a_lost_page_ends_the_vcpu_and_not_the_process() {
    if !kvm() || !userfaultfd() {
        return;
    }
    let _watchdog = watchdog(60);
    let workload = workload(Pattern::Sequential, 1, 0);
    let mut source = KvmGuest::new(memory(flat()), workload.clone()).unwrap();
    let state = source.capture().unwrap();
    let ram = memory(flat());
    // A page that the program reads at CPL 3; the one with the stack that an interrupt
    // is delivered to, which KVM writes itself; the root of the page tables.
    let ends = [
        (512 + 50, ["vCPU 0: memory error at page 562"; 2]),
        (tables::processor_page(0).get(), ["memory error at", "the guest shut down"]),
        (source.seeds()[0].get(), ["memory error at", "the guest shut down"]),
    ];
    for (lost, ends) in ends {
        let uffd = register(&ram);
        let mut target = KvmGuest::prepare(Arc::clone(&ram), workload.clone()).unwrap();
        // Restoring touches the clock, and nobody serves faults yet.
        place(&uffd, source.ram(), &ram, tables::clock_page(0));
        target.restore(&state).unwrap();
        target.resume().unwrap();
        while target.failure().is_none() {
            let Some(event) = uffd.read_event().unwrap() else {
                std::thread::sleep(Duration::from_micros(100));
                continue;
            };
            let Event::Pagefault { addr, .. } = event else { panic!("unexpected {event:?}") };
            let page = ram.page_of_host(addr as usize).unwrap();
            let to = ram.page_ptr(page).as_ptr();
            if page.get() == lost {
                let (start, len) = (to as u64, PAGE_SIZE as u64);
                let mut poison = Poison { start, len, mode: 0, updated: 0 };
                // SAFETY: the structure is the one that this ioctl reads and writes.
                unsafe { uffdio_poison(uffd.as_raw_fd(), &mut poison) }.unwrap();
            } else {
                place(&uffd, source.ram(), &ram, page);
            }
        }
        let failure = target.failure().unwrap();
        assert!(ends.iter().any(|end| failure.contains(end)), "{failure}");
        // First of all, so that nothing can wait for a page any more.
        unregister(&uffd, &ram);
        drop(target);
        for segment in ram.segments() {
            let (start, advice) = (segment.start().cast(), MmapAdvise::MADV_DONTNEED);
            // SAFETY: nobody uses the memory now.
            unsafe { madvise(start, segment.bytes(), advice) }.unwrap();
        }
    }
}

/// A guest at CPL 0 that is stuck on a page of its arena, which nobody serves, and the
/// page. The source keeps the content.
fn stuck_at_cpl_0() -> (KvmGuest, KvmGuest, Uffd, PageIndex) {
    let form = MachineForm { cpl: Cpl::Kernel, ..MachineForm::default() };
    let workload = Workload { form, ..workload(Pattern::Sequential, 1, 0) };
    let stuck_on = PageIndex::new(512 + 20);
    let mut source = KvmGuest::new(memory(flat()), workload.clone()).unwrap();
    let state = source.capture().unwrap();
    let ram = memory(flat());
    let uffd = register(&ram);
    for page in (0..ram.layout().pages()).map(PageIndex::new).filter(|&page| page != stuck_on) {
        place(&uffd, source.ram(), &ram, page);
    }
    let mut target = KvmGuest::prepare(Arc::clone(&ram), workload).unwrap();
    target.restore(&state).unwrap();
    target.resume().unwrap();
    let begun = Instant::now();
    loop {
        match uffd.read_event().unwrap() {
            Some(Event::Pagefault { addr, .. }) => {
                assert_eq!(ram.page_of_host(addr as usize), Some(stuck_on));
                break;
            }
            Some(event) => panic!("unexpected {event:?}"),
            None => std::thread::sleep(Duration::from_millis(1)),
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "no fault: {:?}", target.failure());
        assert_eq!(target.failure(), None);
    }
    (source, target, uffd, stuck_on)
}

/// Where KVM makes a guest's accesses itself, a kick does not end the wait for a page.
/// Where the processor makes them, at CPL 0 as well, it does.
fn cannot_be_paused(target: &KvmGuest) -> bool {
    let limit = Duration::from_millis(300);
    match target.stop_vcpus(limit) {
        Ok(()) => false,
        Err(KvmError::NotStopping { vcpu: 0, waited }) => {
            assert_eq!(waited, limit);
            true
        }
        Err(error) => panic!("{error}"),
    }
}

/// Ends the process if dropping `target` takes long.
fn drop_in_time(target: KvmGuest) {
    let (dropped, is_dropped) = channel();
    std::thread::spawn(move || {
        drop(target);
        let _ = dropped.send(());
    });
    is_dropped.recv_timeout(Duration::from_secs(15)).expect("drop hangs");
}

#[test]
#[ignore = "may hang: run as a child by a_vcpu_stuck_at_cpl_0_is_freed_by_giving_its_page_up"]
fn stuck_at_cpl_0_until_its_page_is_given_up() {
    if !kvm() || !userfaultfd() {
        return;
    }
    let (source, mut target, uffd, page) = stuck_at_cpl_0();
    if !cannot_be_paused(&target) {
        println!("this KVM's wait at CPL 0 can be interrupted");
        target.phase = Phase::Paused;
        target.resume().unwrap();
    }
    let (start, len) = (target.ram().page_ptr(page).as_ptr() as u64, PAGE_SIZE as u64);
    let mut poison = Poison { start, len, mode: 0, updated: 0 };
    // SAFETY: the structure is the one that this ioctl reads and writes.
    unsafe { uffdio_poison(uffd.as_raw_fd(), &mut poison) }.unwrap();
    let given_up = Instant::now();
    while target.failure().is_none() {
        assert!(given_up.elapsed() < Duration::from_secs(10), "the vCPU is still stuck");
        std::thread::sleep(Duration::from_millis(1));
    }
    let failure = target.failure().unwrap();
    assert!(failure.starts_with("vCPU 0: memory error at"), "{failure}");
    // By name from all calls, too.
    let error = target.pause().unwrap_err();
    assert!(matches!(error.source.downcast_ref(), Some(KvmError::Failed(_))), "{error:?}");
    // The range is still registered, and nothing waits for it.
    drop_in_time(target);
    drop(source);
}

#[test]
#[ignore = "may hang: run as a child by a_vcpu_stuck_at_cpl_0_is_freed_by_unregistering"]
fn stuck_at_cpl_0_until_unregistered() {
    if !kvm() || !userfaultfd() {
        return;
    }
    let (source, target, uffd, _) = stuck_at_cpl_0();
    let stuck = cannot_be_paused(&target);
    let ram = Arc::clone(target.ram());
    unregister(&uffd, &ram);
    // It reads zeroes now, which its own checks find; but it obeys.
    if stuck {
        target.stop_vcpus(Duration::from_secs(10)).unwrap();
    }
    drop_in_time(target);
    drop(source);
}
