//! The guest against a plain model of its specification, which shares no code with it
//! but the names of words and patterns.

use super::*;
use crate::memory::ram::Backing;
use crate::proto::layout::{GuestAddress, MemoryLayout, Region};
use crate::proto::page::{PAGE_SIZE, PageRun};
use crate::vmm::content::Instruments;
use crate::vmm::workload::{
    Cpl, MachineForm, PageTables, Pattern, STATUS_FAILED, STATUS_FINISHED, STATUS_RUNNING, control,
};
use std::collections::HashSet;
use std::sync::mpsc::{Sender, channel};

mod bad_states;
mod clock;
mod dirty;
mod forms;
mod on_demand;
mod samples;

const G: u64 = 0x9E37_79B9_7F4A_7C15;
const PAGES: u64 = 512 + 1000;
const ZERO: u64 = 100;

fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}

fn stream(seed: u64, i: u64) -> u64 {
    mix(seed.wrapping_add(i.wrapping_mul(G)))
}

fn mulhi(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 64) as u64
}

/// All words of a guest, by page.
type Memory = Vec<[u64; 512]>;

/// The first page of the arena.
fn arena(workload: &Workload, pages: u64) -> u64 {
    512 + if workload.form.page_tables == PageTables::Small { pages.div_ceil(512) } else { 0 }
}

/// What memory holds after each vCPU has made so many steps; system pages that are the
/// machine's or the guest's own are left at 0 and not compared.
fn model(workload: &Workload, pages: u64, steps: &[u64]) -> Memory {
    let vcpus = u64::from(workload.vcpus);
    let arena = arena(workload, pages);
    let n = (pages - workload.zero_pages - arena) / vcpus;
    let mut memory: Memory = vec![[0; 512]; pages as usize];
    for page in 0..pages - workload.zero_pages {
        let tag = stream(workload.seed, page) | 1;
        let words = &mut memory[page as usize];
        *words = std::array::from_fn(|i| stream(tag, i as u64));
        [words[0], words[1], words[2]] = [tag, 0, 0];
        let (owner, k) = (page.wrapping_sub(arena) / n, page.wrapping_sub(arena) % n);
        if page >= arena && owner < vcpus {
            let increment = stream(workload.seed, owner + 1) | 1;
            let mut next = k;
            loop {
                next = next.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(increment);
                next %= n.next_power_of_two();
                if next < n {
                    break;
                }
            }
            words[2] = next;
        }
    }
    for vcpu in 0..vcpus {
        let (slice, vseed) = (arena + vcpu * n, stream(workload.seed, vcpu + 1));
        let (mut cursor, mut lane) = (0, 0);
        let scan = |cursor: &mut u64| {
            let k = *cursor;
            *cursor = (k + 1) % n;
            k
        };
        for s in 0..steps[vcpu as usize] {
            let h = stream(vseed, s);
            let k = match workload.pattern {
                Pattern::Sequential => scan(&mut cursor),
                Pattern::Strided => {
                    let k = cursor;
                    cursor += 16;
                    if cursor >= n {
                        lane = (lane + 1) % 16;
                        cursor = lane;
                    }
                    k
                }
                Pattern::Random | Pattern::ReadModifyWrite => mulhi(h, n),
                Pattern::Zipf => {
                    let u = h >> 32;
                    let u = (u * u) >> 32;
                    let u = (u * u) >> 32;
                    mulhi(stream(vseed, (u * n) >> 32), n)
                }
                Pattern::HotSetWithScan if s % 8 == 7 => scan(&mut cursor),
                Pattern::HotSetWithScan => mulhi(h, (n / 16).max(1)),
                Pattern::Trace => unreachable!("the KVM guest refuses it"),
                Pattern::PointerChase => {
                    let k = cursor;
                    cursor = memory[(slice + k) as usize][2];
                    k
                }
            };
            let writes = workload.pattern == Pattern::ReadModifyWrite || s % 4 == 0;
            if writes {
                let words = &mut memory[(slice + k) as usize];
                let at = 256 + (words[1] % 256) as usize;
                words[at] = words[at].wrapping_add(words[0]);
                words[1] += 1;
            }
        }
    }
    memory
}

fn compare(ram: &GuestRam, workload: &Workload, steps: &[u64]) {
    let expected = model(workload, ram.layout().pages(), steps);
    let mut bytes = [0; PAGE_SIZE];
    for (page, expected) in (0..).zip(&expected) {
        let control = (16..16 + 2 * u64::from(workload.vcpus)).contains(&page);
        if control || (64..arena(workload, ram.layout().pages())).contains(&page) {
            continue;
        }
        ram.read_run(PageRun::single(PageIndex::new(page)), &mut bytes);
        for (i, word) in bytes.chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(word.try_into().unwrap());
            assert_eq!(word, expected[i], "page {page}, word {i}, {workload:?}, {steps:?}");
        }
    }
}

/// Whether there is a KVM to test with; if not, says so.
fn kvm() -> bool {
    let available = kvm_available();
    if let Err(reason) = &available {
        println!("skipped: {reason}");
    }
    available.is_ok()
}

/// Ends the process if a test hangs: a vCPU that waits for a page cannot be unwound.
struct Watchdog(#[expect(dead_code, reason = "its drop is the signal")] Sender<()>);

fn watchdog(seconds: u64) -> Watchdog {
    let (sender, receiver) = channel::<()>();
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    std::thread::spawn(move || {
        use std::sync::mpsc::RecvTimeoutError::Timeout;
        if receiver.recv_timeout(Duration::from_secs(seconds)) == Err(Timeout) {
            eprintln!("{test} hangs");
            std::process::abort();
        }
    });
    Watchdog(sender)
}

fn workload(pattern: Pattern, vcpus: u32, step_limit: u64) -> Workload {
    let form = MachineForm::default();
    Workload {
        pattern,
        seed: 0xC0FFEE,
        vcpus,
        think_ns: 0,
        step_limit,
        zero_pages: ZERO,
        form,
        trace: None,
    }
}

fn memory(layout: MemoryLayout) -> Arc<GuestRam> {
    Arc::new(GuestRam::new(layout, Backing::Anonymous).unwrap())
}

fn flat() -> MemoryLayout {
    MemoryLayout::flat(PAGES).unwrap()
}

fn word(guest: &KvmGuest, vcpu: u32, index: usize) -> u64 {
    Instruments::new(guest.ram(), vcpu).get(index)
}

/// Polls until `done`, or a vCPU has failed.
fn wait_until(guest: &KvmGuest, done: impl Fn(u32) -> bool) {
    while !(0..guest.workload.vcpus).all(&done) {
        assert_eq!(guest.failure(), None);
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn wait_finished(guest: &KvmGuest) -> Vec<u64> {
    wait_until(guest, |vcpu| word(guest, vcpu, control::STATUS) != STATUS_RUNNING);
    for vcpu in 0..guest.workload.vcpus {
        let found = Instruments::new(guest.ram(), vcpu);
        let told = |index| found.get(index);
        assert_eq!(
            told(control::STATUS),
            STATUS_FINISHED,
            "page {} has {:#x}, not {:#x}",
            told(control::FAILED_PAGE),
            told(control::FAILED_FOUND),
            told(control::FAILED_EXPECTED)
        );
    }
    (0..guest.workload.vcpus).map(|vcpu| word(guest, vcpu, control::STEPS)).collect()
}

fn stop(guest: &KvmGuest) -> Vec<u64> {
    for vcpu in 0..guest.workload.vcpus {
        Instruments::new(guest.ram(), vcpu).set(control::STOP_REQUEST, 1);
    }
    wait_finished(guest)
}

fn copy(from: &GuestRam, to: &GuestRam) {
    let mut bytes = [0; PAGE_SIZE];
    for page in (0..from.layout().pages()).map(PageIndex::new).map(PageRun::single) {
        from.read_run(page, &mut bytes);
        to.write_run(page, &bytes);
    }
}

#[test]
fn every_pattern_leaves_what_the_model_says() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(60);
    for pattern in Pattern::ALL {
        for vcpus in 1..=2 {
            let workload = workload(pattern, vcpus, 20_000);
            let mut guest = KvmGuest::new(memory(flat()), workload.clone()).unwrap();
            assert_eq!(guest.first_entry(), None);
            let asked = Instant::now();
            guest.resume().unwrap();
            let steps = wait_finished(&guest);
            assert!(guest.first_entry().unwrap() >= asked);
            assert_eq!(steps, vec![20_000; vcpus as usize]);
            compare(guest.ram(), &workload, &steps);
        }
    }
}

#[test]
fn odd_regions_and_four_vcpus_work_too() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(60);
    let region = |start, pages| Region { start: GuestAddress(start), pages };
    let odd =
        vec![region(0, 600), region(0x40_3000, 700), region(4 << 30, 512), region(8 << 30, 100)];
    let with_large_pages_above_the_gap = vec![region(0, 1024), region(4 << 30, 700)];
    for regions in [odd, with_large_pages_above_the_gap] {
        let layout = MemoryLayout::new(regions).unwrap();
        let workload = workload(Pattern::Random, 4, 20_000);
        let mut guest = KvmGuest::new(memory(layout), workload.clone()).unwrap();
        guest.resume().unwrap();
        let steps = wait_finished(&guest);
        compare(guest.ram(), &workload, &steps);
    }
}

#[test]
fn the_timer_ticks_on_every_vcpu_before_and_after_a_move() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(60);
    let workload = workload(Pattern::Random, 2, 0);
    let mut guest = KvmGuest::new(memory(flat()), workload.clone()).unwrap();
    guest.resume().unwrap();
    wait_until(&guest, |vcpu| word(&guest, vcpu, control::TICKS) >= 10);
    guest.pause().unwrap();
    let before = [0, 1].map(|vcpu| word(&guest, vcpu, control::TICKS));
    let state = guest.capture().unwrap();
    let other = memory(flat());
    copy(guest.ram(), &other);
    let mut restored = KvmGuest::prepare(other, workload).unwrap();
    assert_eq!(restored.machine(), guest.machine());
    drop(guest);
    restored.restore(&state).unwrap();
    restored.resume().unwrap();
    wait_until(&restored, |vcpu| {
        word(&restored, vcpu, control::TICKS) >= before[vcpu as usize] + 5
    });
}

#[test]
fn the_machine_text_does_not_depend_on_the_processor_asked() {
    if !kvm() {
        return;
    }
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    let this_thread = Pid::from_raw(0);
    let allowed = sched_getaffinity(this_thread).unwrap();
    let mut texts = HashSet::new();
    for cpu in (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap()) {
        let mut only = CpuSet::new();
        only.set(cpu).unwrap();
        sched_setaffinity(this_thread, &only).unwrap();
        let guest = KvmGuest::prepare(memory(flat()), workload(Pattern::Random, 2, 0)).unwrap();
        texts.insert(guest.machine());
    }
    assert_eq!(texts.len(), 1, "{texts:?}");
}

#[test]
fn a_request_clears_the_instruments_between_two_steps() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(60);
    let mut workload = workload(Pattern::Random, 1, 0);
    workload.think_ns = 50_000;
    let mut guest = KvmGuest::new(memory(flat()), workload).unwrap();
    let instruments = |guest: &KvmGuest, index| word(guest, 0, index);
    // Each visit a stall.
    Instruments::new(guest.ram(), 0).set(control::STALL_THRESHOLD, 0);
    let begun = Instant::now();
    guest.resume().unwrap();
    wait_until(&guest, |_| instruments(&guest, control::STEPS) >= 1000);
    assert!(begun.elapsed() >= Duration::from_micros(50 * 1000));
    guest.pause().unwrap();
    let stalls: u64 = Instruments::new(guest.ram(), 0).stalls().iter().sum();
    assert!(stalls >= 999);
    assert!(instruments(&guest, control::STALL_SUM) > 0);
    assert!(instruments(&guest, control::MAX_GAP) > 0);
    let steps = instruments(&guest, control::STEPS);
    Instruments::new(guest.ram(), 0).set(control::INSTRUMENT_REQUEST, 7);
    guest.resume().unwrap();
    wait_until(&guest, |_| instruments(&guest, control::INSTRUMENT_SEEN) == 7);
    stop(&guest);
    let cleared_at = instruments(&guest, control::INSTRUMENT_STEP);
    assert!((steps..=steps + 1).contains(&cleared_at));
    let since = instruments(&guest, control::STEPS) - cleared_at;
    assert_eq!(instruments(&guest, control::STALLS), since);
    assert_eq!(Instruments::new(guest.ram(), 0).stalls().iter().sum::<u64>(), since);
}

#[test]
fn a_wrong_word_and_an_exception_are_found() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(60);
    let mut guest = KvmGuest::new(memory(flat()), workload(Pattern::Sequential, 1, 0)).unwrap();
    let page = PageIndex::new(512 + 300);
    let run = PageRun::single(page);
    let mut bytes = [0; PAGE_SIZE];
    guest.ram().read_run(run, &mut bytes);
    bytes[0] ^= 4;
    guest.ram().write_run(run, &bytes);
    guest.resume().unwrap();
    wait_until(&guest, |vcpu| word(&guest, vcpu, control::STATUS) == STATUS_FAILED);
    assert_eq!(word(&guest, 0, control::FAILED_PAGE), page.get());
    let differ = word(&guest, 0, control::FAILED_EXPECTED) ^ word(&guest, 0, control::FAILED_FOUND);
    assert_eq!(differ, 4);
    assert_eq!(word(&guest, 0, control::STEPS), 300);

    let mut guest = KvmGuest::new(memory(flat()), workload(Pattern::Random, 1, 0)).unwrap();
    Instruments::new(guest.ram(), 0).set(control::PATTERN, 99);
    guest.resume().unwrap();
    while guest.failure().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let failure = guest.failure().unwrap();
    assert!(failure.contains("exception 6"), "{failure}");
    assert!(guest.pause().is_err());
    assert!(guest.capture().is_err());
}

/// Runs a guest with one word changed until it finds it: the failure's page, expected
/// and found word. Memory must be as the model has it after the steps before.
fn find_wrong_word(pattern: Pattern, page: u64, index: usize, value: u64) -> [u64; 3] {
    let workload = workload(pattern, 1, 0);
    let mut guest = KvmGuest::new(memory(flat()), workload.clone()).unwrap();
    let run = PageRun::single(PageIndex::new(page));
    let mut bytes = [0; PAGE_SIZE];
    guest.ram().read_run(run, &mut bytes);
    let right: [u8; 8] = bytes[8 * index..][..8].try_into().unwrap();
    bytes[8 * index..][..8].copy_from_slice(&value.to_le_bytes());
    guest.ram().write_run(run, &bytes);
    guest.resume().unwrap();
    wait_until(&guest, |vcpu| word(&guest, vcpu, control::STATUS) == STATUS_FAILED);
    guest.ram().read_run(run, &mut bytes);
    bytes[8 * index..][..8].copy_from_slice(&right);
    guest.ram().write_run(run, &bytes);
    compare(guest.ram(), &workload, &[word(&guest, 0, control::STEPS)]);
    [control::FAILED_PAGE, control::FAILED_EXPECTED, control::FAILED_FOUND]
        .map(|index| word(&guest, 0, index))
}

#[test]
fn a_step_that_fails_writes_nothing() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(60);
    let seed = workload(Pattern::Random, 1, 0).seed;
    // Step 0 writes, and looks into the tail.
    let page = PAGES - ZERO + mulhi(mix(stream(stream(seed, 1), 0)), ZERO);
    for pattern in [Pattern::Random, Pattern::ReadModifyWrite] {
        assert_eq!(find_wrong_word(pattern, page, 0, 9), [page, 0, 9]);
    }
    let n = PAGES - ZERO - 512;
    for wrong in [n, n + 1, u64::MAX] {
        let found = find_wrong_word(Pattern::PointerChase, 512, 2, wrong);
        assert_eq!(found, [512, n - 1, wrong]);
    }
}

#[test]
fn a_guest_moves_on_from_wherever_it_was_stopped() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(100);
    let moves = if cfg!(debug_assertions) { 30 } else { 300 };
    for vcpus in 1..=2 {
        let workload = workload(Pattern::ALL[4 + vcpus as usize], vcpus, 0);
        let mut guest = KvmGuest::new(memory(flat()), workload.clone()).unwrap();
        guest.resume().unwrap();
        for turn in 0..moves {
            let moment = stream(u64::from(vcpus), turn) % 3000;
            std::thread::sleep(Duration::from_micros(moment));
            guest.pause().unwrap();
            if turn % 3 == 0 {
                // An aborted migration.
                guest.resume().unwrap();
                guest.pause().unwrap();
            }
            let state = guest.capture().unwrap();
            let other = memory(flat());
            let mut next = KvmGuest::prepare(Arc::clone(&other), workload.clone()).unwrap();
            copy(guest.ram(), &other);
            next.restore(&state).unwrap();
            next.resume().unwrap();
            guest = next;
        }
        let reached = word(&guest, 0, control::STEPS);
        wait_until(&guest, |vcpu| word(&guest, vcpu, control::STEPS) > reached + 1000);
        let steps = stop(&guest);
        compare(guest.ram(), &workload, &steps);
        // A finished guest can be moved as well, and stays finished.
        guest.pause().unwrap();
        let state = guest.capture().unwrap();
        let other = memory(flat());
        copy(guest.ram(), &other);
        let mut next = KvmGuest::prepare(other, workload.clone()).unwrap();
        next.restore(&state).unwrap();
        next.resume().unwrap();
        while next.first_entry().is_none() {
            std::thread::yield_now();
        }
        next.pause().unwrap();
        assert_eq!(wait_finished(&next), steps);
        compare(next.ram(), &workload, &steps);
    }
}

#[test]
fn calls_out_of_order_and_foreign_states_are_refused() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(60);
    let one = workload(Pattern::Random, 1, 0);
    let mut guest = KvmGuest::new(memory(flat()), one.clone()).unwrap();
    let cause = |error: GuestError| error.source.to_string();
    let state = guest.capture().unwrap();
    assert!(cause(guest.restore(&state).unwrap_err()).contains("needs it prepared"));
    guest.resume().unwrap();
    assert!(cause(guest.capture().unwrap_err()).contains("is running"));
    assert!(cause(guest.resume().unwrap_err()).contains("is running"));
    guest.pause().unwrap();
    guest.pause().unwrap();

    let mut two = KvmGuest::prepare(memory(flat()), workload(Pattern::Random, 2, 0)).unwrap();
    assert!(cause(two.restore(&state).unwrap_err()).contains("1 vCPUs; this guest has 2"));
    let mut other = KvmGuest::prepare(memory(flat()), one).unwrap();
    assert!(cause(other.resume().unwrap_err()).contains("is prepared"));
    assert!(cause(other.restore(&state[..state.len() - 1]).unwrap_err()).contains("cut off"));
    let mut foreign = envelope::open(&state, 1).unwrap();
    foreign.vcpus[0].cpuid[0].ebx ^= 1;
    let foreign = envelope::seal(&foreign).unwrap();
    assert!(cause(other.restore(&foreign).unwrap_err()).contains("CPUID"));
    // A refused state leaves the guest as it was.
    other.restore(&state).unwrap();
}
