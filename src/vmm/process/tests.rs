//! The process guest: run, stopped, carried over and checked by the independent
//! checker.

mod trace;

use super::*;
use crate::checker::{CheckFailure, CheckParams, CheckSummary, Guess, VcpuProblem, check};
use crate::memory::ram::Backing;
use crate::proto::layout::MemoryLayout;
use crate::proto::page::{PAGE_SIZE, PageRun};
use crate::vmm::content::Instruments;
use crate::vmm::stalls::GuestFigures;
use crate::vmm::workload::{MachineForm, Pattern, SYSTEM_PAGES, control};
use rand::{Rng, SeedableRng};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use userfaultfd::{FeatureFlags, RegisterMode, Uffd, UffdBuilder};

/// 16 MiB.
const PAGES: u64 = 4096;
const ZERO_PAGES: u64 = 100;

/// Aborts the process if the test that holds it takes too long.
struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    fn start(test: &'static str) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&done);
        std::thread::spawn(move || {
            std::thread::park_timeout(Duration::from_secs(120));
            if !seen.load(Ordering::SeqCst) {
                eprintln!("{test} hangs");
                std::process::abort();
            }
        });
        Self(done)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn workload(pattern: Pattern, vcpus: u32) -> Workload {
    let (seed, zero_pages) = (0xC0FFEE + u64::from(vcpus), ZERO_PAGES);
    let form = MachineForm::default();
    Workload { pattern, seed, vcpus, think_ns: 0, step_limit: 0, zero_pages, form, trace: None }
}

fn memory(backing: Backing) -> Arc<GuestRam> {
    Arc::new(GuestRam::new(MemoryLayout::flat(PAGES).unwrap(), backing).unwrap())
}

fn all_pages() -> PageRun {
    PageRun::new(PageIndex::new(0), PAGES).unwrap()
}

fn content(guest: &ProcessGuest) -> Vec<u8> {
    let mut bytes = vec![0; all_pages().bytes()];
    guest.ram.read_run(all_pages(), &mut bytes);
    bytes
}

fn instruments(guest: &ProcessGuest, vcpu: u32) -> Instruments<'_> {
    Instruments::new(&guest.ram, vcpu)
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited too long: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Lets each vCPU make so many more steps.
fn steps(guest: &ProcessGuest, more: u64) {
    for vcpu in 0..guest.workload.vcpus {
        let instruments = instruments(guest, vcpu);
        let target = instruments.get(control::STEPS) + more;
        wait_until("steps", || {
            assert_eq!(guest.failure(), None);
            instruments.get(control::STEPS) >= target
        });
    }
}

/// Asks the guest to finish, and checks it, its steps taken from its registers.
fn finish_and_check(guest: &mut ProcessGuest) -> Result<CheckSummary, CheckFailure> {
    for vcpu in 0..guest.workload.vcpus {
        instruments(guest, vcpu).set(control::STOP_REQUEST, 1);
    }
    wait_until("all vCPUs to end", || guest.ended());
    let (_, registers) = guest.board.registers().unwrap();
    let params = CheckParams {
        pages: PAGES,
        vcpus: guest.workload.vcpus,
        seed: guest.workload.seed,
        pattern: serde_json::from_value(serde_json::to_value(guest.workload.pattern).unwrap())
            .unwrap(),
        touches: trace::pages(&guest.workload),
        zero_pages: guest.workload.zero_pages,
        kvm: None,
        expect_steps: Some(registers.iter().map(|registers| registers.step).collect()),
    };
    check(&params, content(guest).as_slice())
}

fn cause(error: &GuestError) -> &ProcessError {
    error.source.downcast_ref().unwrap()
}

#[test]
fn the_checker_agrees_with_every_pattern() {
    let _watchdog = Watchdog::start("the_checker_agrees_with_every_pattern");
    for pattern in Pattern::ALL {
        for vcpus in [1, 2] {
            let ram = memory(Backing::Memfd);
            let mut guest = ProcessGuest::new(ram, workload(pattern, vcpus)).unwrap();
            guest.resume().unwrap();
            steps(&guest, 50_000);
            let summary = finish_and_check(&mut guest)
                .unwrap_or_else(|failure| panic!("{pattern:?}, {vcpus} vCPUs: {failure}"));
            assert_eq!(summary.pages_compared, PAGES);
            assert_eq!(summary.zero_pages, ZERO_PAGES);
            assert_eq!(summary.steps.len(), vcpus as usize);
            assert!(summary.steps.iter().all(|&steps| steps >= 50_000));
            assert!(summary.visits >= 12_500 * u64::from(vcpus));
        }
    }
}

/// Pauses the guest and moves it to new memory.
fn migrate(guest: &mut ProcessGuest) -> ProcessGuest {
    guest.pause().unwrap();
    let state = guest.capture().unwrap();
    let ram = memory(Backing::Memfd);
    let mut moved = ProcessGuest::prepare(Arc::clone(&ram), guest.workload.clone()).unwrap();
    ram.write_run(all_pages(), &content(guest));
    moved.restore(&state).unwrap();
    moved.resume().unwrap();
    moved
}

#[test]
fn a_guest_moved_at_random_moments_stays_right() {
    let _watchdog = Watchdog::start("a_guest_moved_at_random_moments_stays_right");
    let mut random = rand::rngs::StdRng::seed_from_u64(1);
    for pattern in [Pattern::PointerChase, Pattern::Strided, Pattern::ReadModifyWrite] {
        let ram = memory(Backing::Memfd);
        let mut guest = ProcessGuest::new(ram, workload(pattern, 2)).unwrap();
        guest.resume().unwrap();
        for _ in 0..8 {
            std::thread::sleep(Duration::from_micros(random.random_range(0..3000)));
            let moved = migrate(&mut guest);
            if random.random_bool(0.3) {
                // Aborted: the source goes on as if nothing had been.
                drop(moved);
                guest.resume().unwrap();
            } else {
                guest = moved;
            }
        }
        steps(&guest, 1000);
        let summary =
            finish_and_check(&mut guest).unwrap_or_else(|failure| panic!("{pattern:?}: {failure}"));
        assert_eq!(summary.pages_compared, PAGES);
    }
}

#[test]
fn nothing_runs_while_the_guest_is_paused() {
    let _watchdog = Watchdog::start("nothing_runs_while_the_guest_is_paused");
    let ram = memory(Backing::Memfd);
    let mut guest = ProcessGuest::new(ram, workload(Pattern::Random, 2)).unwrap();
    assert_eq!(guest.first_entry(), None);
    let before = Instant::now();
    guest.resume().unwrap();
    steps(&guest, 100);
    assert!(guest.first_entry().unwrap() >= before);
    for _ in 0..50 {
        guest.pause().unwrap();
        let first = content(&guest);
        let second = content(&guest);
        assert!(first == second, "a paused guest wrote to its memory");
        let resumed = Instant::now();
        guest.resume().unwrap();
        steps(&guest, 1);
        assert!(guest.first_entry().unwrap() >= resumed);
    }
    finish_and_check(&mut guest).unwrap();
}

#[test]
fn the_step_limit_is_kept_exactly() {
    let _watchdog = Watchdog::start("the_step_limit_is_kept_exactly");
    let limited = Workload { step_limit: 10_001, ..workload(Pattern::HotSetWithScan, 2) };
    let mut guest = ProcessGuest::new(memory(Backing::Memfd), limited).unwrap();
    guest.resume().unwrap();
    wait_until("the step limit", || guest.ended());
    // A guest that has ended can still be moved, and is still at its end.
    let mut moved = migrate(&mut guest);
    let summary = finish_and_check(&mut moved).unwrap();
    assert_eq!(summary.steps, [10_001, 10_001]);
    assert_eq!(moved.failure(), None);
}

#[test]
fn a_page_left_behind_is_called_stale() {
    let _watchdog = Watchdog::start("a_page_left_behind_is_called_stale");
    // Runs without the steps' own checks of words 0 and 4 to 131 ever noticing.
    let ram = memory(Backing::Memfd);
    let mut guest = ProcessGuest::new(ram, workload(Pattern::ReadModifyWrite, 1)).unwrap();
    guest.resume().unwrap();
    steps(&guest, 50_000);
    guest.pause().unwrap();
    let stale = PageRun::single(PageIndex::new(SYSTEM_PAGES + 1000));
    let mut bytes = [0; PAGE_SIZE];
    guest.ram.read_run(stale, &mut bytes);
    guest.resume().unwrap();
    steps(&guest, 200_000);
    guest.pause().unwrap();
    guest.ram.write_run(stale, &bytes);
    guest.resume().unwrap();
    let failure = finish_and_check(&mut guest).unwrap_err();
    let content = failure.content().unwrap();
    assert_eq!((content.wrong_pages, content.guesses.stale), (1, 1), "{failure}");
    assert_eq!(content.first.page, stale.first().get());
    assert!(matches!(content.first.guess, Guess::Stale { .. }));
}

#[test]
fn a_guest_finds_a_wrong_word_itself() {
    let _watchdog = Watchdog::start("a_guest_finds_a_wrong_word_itself");
    let wrong = PageIndex::new(SYSTEM_PAGES + 77);
    let corrupted = |pattern, word: usize, value: u64| {
        let ram = memory(Backing::Memfd);
        let mut guest = ProcessGuest::new(ram, workload(pattern, 1)).unwrap();
        let mut bytes = [0; PAGE_SIZE];
        guest.ram.read_run(PageRun::single(wrong), &mut bytes);
        bytes[8 * word..8 * word + 8].copy_from_slice(&value.to_le_bytes());
        guest.ram.write_run(PageRun::single(wrong), &bytes);
        guest.resume().unwrap();
        wait_until("the check to fail", || guest.ended());
        let failure = guest.failure().unwrap();
        assert!(failure.contains(&format!("word {word} of page 589 is {value:#x}")), "{failure}");
        match finish_and_check(&mut guest) {
            Err(CheckFailure::Vcpu {
                problem: VcpuProblem::SelfCheck { page, found, .. }, ..
            }) => {
                assert_eq!((page, found), (wrong.get(), value));
            }
            other => panic!("{other:?}"),
        }
    };
    corrupted(Pattern::Sequential, 0, 5);
    corrupted(Pattern::Random, 50, 6);
    // A cursor from damaged memory must not lead out of the slice.
    corrupted(Pattern::PointerChase, 2, u64::MAX);
}

#[test]
fn a_tail_page_that_is_not_zero_is_found() {
    let _watchdog = Watchdog::start("a_tail_page_that_is_not_zero_is_found");
    let ram = memory(Backing::Memfd);
    let mut guest = ProcessGuest::new(ram, workload(Pattern::Random, 1)).unwrap();
    let tail = PageRun::new(PageIndex::new(PAGES - ZERO_PAGES), ZERO_PAGES).unwrap();
    guest.ram.write_run(tail, &vec![1; tail.bytes()]);
    guest.resume().unwrap();
    wait_until("the check to fail", || guest.ended());
    assert!(guest.failure().unwrap().contains("where 0x0 must be"));
}

#[test]
fn a_stale_control_page_ends_the_vcpu_at_once() {
    let _watchdog = Watchdog::start("a_stale_control_page_ends_the_vcpu_at_once");
    let ram = memory(Backing::Memfd);
    let mut guest = ProcessGuest::new(ram, workload(Pattern::Random, 1)).unwrap();
    let page = PageRun::single(control_page(0));
    let mut stale = [0; PAGE_SIZE];
    guest.ram.read_run(page, &mut stale);
    guest.resume().unwrap();
    steps(&guest, 10);
    guest.pause().unwrap();
    guest.ram.write_run(page, &stale);
    guest.resume().unwrap();
    wait_until("the vCPU to end", || guest.ended());
    let failure = guest.failure().unwrap();
    assert!(failure.contains("word 1 of page 16 is 0x0"), "{failure}");
}

#[test]
fn calls_out_of_order_are_refused_by_name() {
    let _watchdog = Watchdog::start("calls_out_of_order_are_refused_by_name");
    let workload = workload(Pattern::Random, 1);
    let mut guest = ProcessGuest::new(memory(Backing::Memfd), workload.clone()).unwrap();
    let first = guest.capture().unwrap();
    guest.resume().unwrap();
    assert!(matches!(cause(&guest.resume().unwrap_err()), ProcessError::Running));
    assert!(matches!(cause(&guest.capture().unwrap_err()), ProcessError::Running));
    assert!(matches!(cause(&guest.restore(&first).unwrap_err()), ProcessError::HasRun));
    guest.pause().unwrap();
    guest.pause().unwrap();
    assert!(matches!(cause(&guest.restore(&first).unwrap_err()), ProcessError::HasRun));

    let mut prepared = ProcessGuest::prepare(memory(Backing::Memfd), workload.clone()).unwrap();
    assert!(matches!(cause(&prepared.resume().unwrap_err()), ProcessError::NoState));
    assert!(matches!(cause(&prepared.capture().unwrap_err()), ProcessError::NoState));
    let refused = prepared.restore(&first[..30]).unwrap_err();
    assert!(matches!(cause(&refused), ProcessError::State(StateError::Truncated { .. })));
    assert!(matches!(cause(&prepared.resume().unwrap_err()), ProcessError::NoState));

    let five = Workload { vcpus: 5, ..workload };
    let refused = ProcessGuest::new(memory(Backing::Memfd), five).unwrap_err();
    assert!(matches!(cause(&refused), ProcessError::Workload(WorkloadError::Vcpus(5))));
}

#[test]
fn preparing_and_restoring_touch_no_memory() {
    let _watchdog = Watchdog::start("preparing_and_restoring_touch_no_memory");
    let workload = workload(Pattern::Zipf, 2);
    let mut source = ProcessGuest::new(memory(Backing::Memfd), workload.clone()).unwrap();
    let state = source.capture().unwrap();
    let ram = memory(Backing::Memfd);
    let mut guest = ProcessGuest::prepare(Arc::clone(&ram), workload).unwrap();
    guest.restore(&state).unwrap();
    assert_eq!(guest.machine(), source.machine());
    drop(guest);
    let blocks = nix::sys::stat::fstat(ram.memfd().unwrap().as_fd()).unwrap().st_blocks;
    assert_eq!(blocks, 0, "memory was allocated");
}

#[test]
fn vcpu_threads_have_names_and_seeds() {
    let guest = ProcessGuest::new(memory(Backing::Memfd), workload(Pattern::Zipf, 2)).unwrap();
    for (vcpu, thread) in guest.vcpu_threads().into_iter().enumerate() {
        let name = std::fs::read_to_string(format!("/proc/self/task/{thread}/comm")).unwrap();
        assert_eq!(name.trim(), format!("vcpu-{vcpu}"));
    }
    assert_eq!(guest.seeds().iter().map(|page| page.get()).collect::<Vec<_>>(), [16, 17, 18, 19]);
}

/// A userfaultfd for faults of this process's own threads, where that is allowed.
fn userfaultfd(test: &str) -> Option<Uffd> {
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).require_features(FeatureFlags::empty());
    let uffd = builder.create();
    uffd.inspect_err(|error| println!("{test}: skipped, userfaultfd cannot be used: {error}")).ok()
}

/// A guest restored into memory trapped by `uffd` that has all pages but `missing`, and
/// the content of all.
fn trapped(source: &mut ProcessGuest, uffd: &Uffd, missing: PageIndex) -> (ProcessGuest, Vec<u8>) {
    let state = source.capture().unwrap();
    let bytes = content(source);
    let ram = memory(Backing::Anonymous);
    let all = &ram.segments()[0];
    let start = all.start().as_ptr().cast();
    uffd.register_with_mode(start, all.bytes(), RegisterMode::MISSING).unwrap();
    for page in all_pages().pages().filter(|&page| page != missing) {
        place(uffd, &ram, &bytes, page);
    }
    let mut guest = ProcessGuest::prepare(ram, source.workload.clone()).unwrap();
    guest.restore(&state).unwrap();
    (guest, bytes)
}

fn place(uffd: &Uffd, ram: &GuestRam, bytes: &[u8], page: PageIndex) {
    let from = &bytes[page.as_usize() * PAGE_SIZE..][..PAGE_SIZE];
    // SAFETY: one page of `bytes` to one page of registered guest memory.
    let copied = unsafe {
        uffd.copy(from.as_ptr().cast(), ram.page_ptr(page).as_ptr().cast(), PAGE_SIZE, true)
    };
    assert_eq!(copied.unwrap(), PAGE_SIZE);
}

#[test]
fn a_vcpu_that_waits_for_a_page_is_named_and_the_guest_runs_on() {
    let _watchdog = Watchdog::start("a_vcpu_that_waits_for_a_page_is_named");
    let Some(uffd) = userfaultfd("a_vcpu_that_waits_for_a_page_is_named_and_the_guest_runs_on")
    else {
        return;
    };
    let mut workload = workload(Pattern::Sequential, 2);
    workload.step_limit = 50_000;
    let mut source = ProcessGuest::new(memory(Backing::Memfd), workload.clone()).unwrap();
    // The tenth page of vCPU 1.
    let slice = workload.slice(source.ram.layout(), 1);
    let missing = slice.first.checked_add(10).unwrap();
    let (mut guest, bytes) = trapped(&mut source, &uffd, missing);
    guest.resume().unwrap();
    let event = uffd.read_event().unwrap().unwrap();
    let userfaultfd::Event::Pagefault { addr, .. } = event else { panic!("{event:?}") };
    assert_eq!(guest.ram.page_of_host(addr as usize), Some(missing));

    guest.pause_wait = Duration::from_millis(50);
    let refused = guest.pause().unwrap_err();
    let ProcessError::Vcpu(VcpuError::NotStopped { vcpus, .. }) = cause(&refused) else {
        panic!("{refused:?}")
    };
    assert_eq!(vcpus, &[1]);
    // As before the pause: the other vCPU makes steps until its end.
    let free = instruments(&guest, 0);
    wait_until("vCPU 0 to run on", || free.get(control::STEPS) == 50_000);
    assert_eq!(instruments(&guest, 1).get(control::STEPS), 10);

    place(&uffd, &guest.ram, &bytes, missing);
    wait_until("vCPU 1 to run on", || guest.ended());
    guest.pause().unwrap();
    let figures = GuestFigures::read(&guest.ram, 2, tsc_hz());
    assert!(figures.stalls.max >= 50_000_000, "the wait is a stall: {figures:?}");
    assert!(figures.max_gap_us >= 50_000, "and a gap: {figures:?}");
    finish_and_check(&mut guest).unwrap();
}

#[test]
fn a_guest_can_be_dropped_while_a_vcpu_waits_for_a_page() {
    let _watchdog = Watchdog::start("a_guest_can_be_dropped_while_a_vcpu_waits_for_a_page");
    let Some(uffd) = userfaultfd("a_guest_can_be_dropped_while_a_vcpu_waits_for_a_page") else {
        return;
    };
    let workload = workload(Pattern::Sequential, 1);
    let mut source = ProcessGuest::new(memory(Backing::Memfd), workload).unwrap();
    let missing = PageIndex::new(SYSTEM_PAGES);
    let (mut guest, bytes) = trapped(&mut source, &uffd, missing);
    guest.resume().unwrap();
    uffd.read_event().unwrap().unwrap();
    let ram = Arc::clone(&guest.ram);
    drop(guest);
    assert!(Arc::strong_count(&ram) > 1, "the thread that waits holds the memory");
    place(&uffd, &ram, &bytes, missing);
    wait_until("the thread to end", || Arc::strong_count(&ram) == 1);
}

#[test]
fn a_thinking_guest_keeps_its_pace_without_burning_a_processor() {
    let _watchdog = Watchdog::start("a_thinking_guest_keeps_its_pace");
    let thinking = Workload { think_ns: 20_000_000, ..workload(Pattern::Random, 1) };
    let mut guest = ProcessGuest::new(memory(Backing::Memfd), thinking).unwrap();
    let thread = guest.vcpu_threads()[0];
    guest.resume().unwrap();
    let start = Instant::now();
    steps(&guest, 10);
    let elapsed = start.elapsed();
    assert!(elapsed >= Duration::from_millis(9 * 20), "10 steps in {elapsed:?}");
    let schedule = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap();
    let on_processor: u64 = schedule.split_whitespace().next().unwrap().parse().unwrap();
    assert!(on_processor < elapsed.as_nanos() as u64 / 4, "{on_processor} ns in {elapsed:?}");

    // Thinking is no part of a visit, and a pause does not wait for it to end.
    guest.pause().unwrap();
    let figures = GuestFigures::read(&guest.ram, 1, tsc_hz());
    assert!(figures.max_gap_us >= 20_000, "{figures:?}");
    assert!(figures.stalls.p50 < 20_000_000, "{figures:?}");
}

#[test]
fn instruments_are_cleared_on_request_and_the_gap_spans_a_move() {
    let _watchdog = Watchdog::start("instruments_are_cleared_on_request");
    let ram = memory(Backing::Memfd);
    let mut guest = ProcessGuest::new(ram, workload(Pattern::Random, 1)).unwrap();
    guest.resume().unwrap();
    steps(&guest, 1000);
    guest.pause().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    guest.resume().unwrap();
    steps(&guest, 1);
    assert!(GuestFigures::read(&guest.ram, 1, tsc_hz()).max_gap_us >= 300_000);

    let words = instruments(&guest, 0);
    words.set(control::INSTRUMENT_REQUEST, 1);
    wait_until("the request to be followed", || words.get(control::INSTRUMENT_SEEN) == 1);
    guest.pause().unwrap();
    let cleared = GuestFigures::read(&guest.ram, 1, tsc_hz());
    assert!(cleared.max_gap_us < 300_000, "{cleared:?}");
    assert!(cleared.steps_when_cleared[0] >= 1000);

    let mut moved = migrate(&mut guest);
    steps(&moved, 1);
    moved.pause().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let mut moved = migrate(&mut moved);
    steps(&moved, 1);
    assert!(GuestFigures::read(&moved.ram, 1, tsc_hz()).max_gap_us >= 300_000);
    finish_and_check(&mut moved).unwrap();
}
