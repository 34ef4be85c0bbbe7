//! KVM's clock and the time stolen, as the guest has them in its memory.

use super::*;
use std::sync::atomic::{Ordering, fence};

/// `pvclock_vcpu_time_info`.
#[derive(Clone, Copy, Debug)]
struct Clock {
    version: u32,
    counter: u64,
    nanoseconds: u64,
    multiplier: u32,
    shift: i8,
    flags: u8,
}

impl Clock {
    /// Reads it as the guest's kernel would: again while it is being written.
    fn read(guest: &KvmGuest, vcpu: u32) -> Self {
        let start = guest.ram().page_ptr(tables::clock_page(vcpu)).as_ptr().cast::<u64>();
        // SAFETY: four aligned words of guest memory, which is read atomically.
        let word = |index| unsafe {
            std::sync::atomic::AtomicU64::from_ptr(start.add(index)).load(Ordering::Acquire)
        };
        loop {
            let version = word(0) as u32;
            fence(Ordering::SeqCst);
            let [counter, nanoseconds, rest] = [word(1), word(2), word(3)];
            fence(Ordering::SeqCst);
            if version.is_multiple_of(2) && version == word(0) as u32 {
                let [multiplier, shift, flags] = [rest, rest >> 32, rest >> 40];
                let (multiplier, shift, flags) = (multiplier as u32, shift as i8, flags as u8);
                return Self { version, counter, nanoseconds, multiplier, shift, flags };
            }
        }
    }

    /// What it says at the time-stamp counter `now`.
    fn at(self, now: u64) -> u64 {
        let ticks = now.wrapping_sub(self.counter);
        let ticks = if self.shift < 0 { ticks >> -self.shift } else { ticks << self.shift };
        self.nanoseconds + ((u128::from(ticks) * u128::from(self.multiplier)) >> 32) as u64
    }
}

const GUEST_STOPPED: u8 = 2;

/// Whether this KVM has a clock for guests; if not, says so.
fn has_clock() -> bool {
    let guest = KvmGuest::prepare(memory(flat()), workload(Pattern::Random, 1, 0)).unwrap();
    let (clock, _) = features::offers_clock_and_steal_time(&guest.machine.processor().cpuid);
    if !clock {
        println!("skipped: KVM offers no clock here");
    }
    clock
}

/// The last visit's end by the guest's own time-stamp counter: what it could have read
/// then.
fn last_counter(guest: &KvmGuest, vcpu: u32) -> u64 {
    word(guest, vcpu, control::LAST_END)
}

#[test]
fn the_guests_clock_goes_on_across_a_move_and_tells_that_it_stood() {
    if !kvm() || !has_clock() {
        return;
    }
    let _watchdog = watchdog(60);
    let workload = workload(Pattern::Random, 2, 0);
    let mut guest = KvmGuest::new(memory(flat()), workload.clone()).unwrap();
    guest.resume().unwrap();
    for _ in 0..5 {
        wait_until(&guest, |vcpu| Clock::read(&guest, vcpu).version != 0);
        let reached = word(&guest, 0, control::STEPS);
        wait_until(&guest, |vcpu| word(&guest, vcpu, control::STEPS) > reached + 500);
        guest.pause().unwrap();
        let before = [0, 1].map(|vcpu| {
            let clock = Clock::read(&guest, vcpu);
            (clock, clock.at(last_counter(&guest, vcpu)))
        });
        let state = guest.capture().unwrap();
        let other = memory(flat());
        copy(guest.ram(), &other);
        // Cleared here, as a guest's watchdog does: it must be set anew.
        for vcpu in 0..2 {
            let page = PageRun::single(tables::clock_page(vcpu));
            let mut bytes = [0; PAGE_SIZE];
            other.read_run(page, &mut bytes);
            bytes[29] &= !GUEST_STOPPED;
            other.write_run(page, &bytes);
        }
        let restoring = Instant::now();
        let mut next = KvmGuest::prepare(other, workload.clone()).unwrap();
        next.restore(&state).unwrap();
        next.resume().unwrap();
        wait_until(&next, |vcpu| {
            Clock::read(&next, vcpu).version != before[vcpu as usize].0.version
                && word(&next, vcpu, control::STEPS) > word(&guest, vcpu, control::STEPS)
        });
        for vcpu in 0..2 {
            let (_, read_before) = before[vcpu as usize];
            let clock = Clock::read(&next, vcpu);
            let read_after = clock.at(last_counter(&next, vcpu));
            assert!(clock.nanoseconds >= read_before, "{clock:?} after {read_before}");
            assert!(read_after >= read_before, "{read_after} after {read_before}");
            // Nor does it leap: between the two lie a part of one process's life.
            let most = Duration::from_nanos(read_after - read_before);
            assert!(most < restoring.elapsed() + Duration::from_secs(5), "{most:?}");
            assert_eq!(clock.flags & GUEST_STOPPED, GUEST_STOPPED, "{clock:?}");
        }
        guest = next;
    }
    let steps = stop(&guest);
    compare(guest.ram(), &workload, &steps);
}

#[test]
fn a_guest_that_was_only_paused_is_told_so() {
    if !kvm() || !has_clock() {
        return;
    }
    let _watchdog = watchdog(60);
    let mut guest = KvmGuest::new(memory(flat()), workload(Pattern::Random, 1, 0)).unwrap();
    guest.resume().unwrap();
    wait_until(&guest, |vcpu| Clock::read(&guest, vcpu).version != 0);
    assert_eq!(Clock::read(&guest, 0).flags & GUEST_STOPPED, 0, "it never stood");
    guest.pause().unwrap();
    guest.resume().unwrap();
    wait_until(&guest, |vcpu| Clock::read(&guest, vcpu).flags & GUEST_STOPPED != 0);
}

#[test]
fn the_seeds_include_the_areas_that_the_kernel_writes() {
    if !kvm() || !has_clock() {
        return;
    }
    let mut guest = KvmGuest::new(memory(flat()), workload(Pattern::Random, 2, 0)).unwrap();
    let seeds = guest.seeds();
    assert!(seeds.len() <= SEEDS_MAX);
    let state = envelope::open(&guest.capture().unwrap(), 2).unwrap();
    for (vcpu, state) in (0..).zip(&state.vcpus) {
        assert!(state.has_clock());
        for index in [state::MSR_SYSTEM_TIME, state::MSR_STEAL_TIME] {
            let named = state.msrs.iter().find(|msr| msr.index == index).unwrap().data & !63;
            let page = GuestAddress(named & !(PAGE_SIZE as u64 - 1));
            let page = guest.ram().layout().page_at(page).unwrap();
            assert_eq!(page, tables::clock_page(vcpu));
            assert!(seeds.contains(&page));
        }
    }
}
