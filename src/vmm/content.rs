//! A reference guest's first memory content, and its instruments as read from
//! outside. Both follow the specification in [`workload`](super::workload).

use super::workload::*;
use crate::memory::ram::GuestRam;
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use std::sync::atomic::{AtomicU64, Ordering};

/// The golden-ratio increment of splitmix64.
pub const G: u64 = 0x9E37_79B9_7F4A_7C15;
/// Words in a page.
pub const WORDS: usize = PAGE_SIZE / 8;

/// The finaliser of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
/// number generators", OOPSLA 2014).
pub const fn mix(mut x: u64) -> u64 {
    x ^= x >> 30;
    x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The first word of `page`.
pub const fn tag(seed: u64, page: u64) -> u64 {
    mix(seed.wrapping_add(page.wrapping_mul(G))) | 1
}

/// Word `i` of a page with this tag, where nothing else stands.
pub const fn fill(tag: u64, i: u64) -> u64 {
    mix(tag.wrapping_add(i.wrapping_mul(G)))
}

/// The seed of `vcpu`'s step stream.
pub const fn vseed(seed: u64, vcpu: u32) -> u64 {
    mix(seed.wrapping_add((vcpu as u64 + 1).wrapping_mul(G)))
}

/// The slice-relative index after `k` in the pointer chase over `n` pages.
pub fn chase_next(vseed: u64, n: u64, k: u64) -> u64 {
    let mask = n.next_power_of_two() - 1;
    let mut x = k;
    loop {
        x = x.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(vseed | 1) & mask;
        if x < n {
            return x;
        }
    }
}

/// Writes a guest's first content: filler, slices, the written half of the tail and
/// the control pages. The KVM guest then puts its tables and code over pages
/// from [`MACHINE_PAGES_FIRST`] on.
///
/// `tick_hz` is the rate of the time-stamp counter.
pub fn fill_memory(ram: &GuestRam, workload: &Workload, tick_hz: u64) {
    let layout = ram.layout();
    let tail = workload.tail(layout).get();
    let slices: Vec<Slice> = (0..workload.vcpus).map(|v| workload.slice(layout, v)).collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let share = tail.div_ceil(threads);
    let next = AtomicU64::new(0);
    let fill = || {
        let mut words = [0u64; WORDS];
        loop {
            let first = next.fetch_add(share, Ordering::Relaxed);
            if first >= tail {
                return;
            }
            for page in first..(first + share).min(tail) {
                fill_page(&mut words, workload, &slices, page);
                write_page(ram, PageIndex::new(page), &words);
            }
        }
    };
    std::thread::scope(|scope| {
        // Where a thread cannot be made, those that are there do its share.
        let spawn = |_| std::thread::Builder::new().spawn_scoped(scope, fill).is_ok();
        (1..threads).all(spawn);
        fill();
    });
    for page in tail + workload.zero_pages / 2..layout.pages() {
        write_page(ram, PageIndex::new(page), &[0; WORDS]);
    }
    for vcpu in 0..workload.vcpus {
        write_page(ram, control_page(vcpu), &first_control(workload, ram, vcpu, tick_hz));
        write_page(ram, histogram_page(vcpu), &[0; WORDS]);
    }
}

fn fill_page(words: &mut [u64; WORDS], workload: &Workload, slices: &[Slice], page: u64) {
    let tag = tag(workload.seed, page);
    for (i, word) in words.iter_mut().enumerate() {
        *word = fill(tag, i as u64);
    }
    words[0] = tag;
    words[1] = 0;
    let owner = slices.iter().position(|slice| {
        page.checked_sub(slice.first.get()).is_some_and(|index| index < slice.pages)
    });
    words[2] = owner.map_or(0, |vcpu| {
        let slice = slices[vcpu];
        chase_next(vseed(workload.seed, vcpu as u32), slice.pages, page - slice.first.get())
    });
}

fn first_control(workload: &Workload, ram: &GuestRam, vcpu: u32, tick_hz: u64) -> [u64; WORDS] {
    /// A visit that takes longer than this is a stall: well above a native fault.
    const STALL_NS: u64 = 4_000;
    let ticks = |ns: u64| (u128::from(ns) * u128::from(tick_hz) / 1_000_000_000) as u64;
    let slice = workload.slice(ram.layout(), vcpu);
    let mut words = [0; WORDS];
    words[control::MAGIC] = CONTROL_MAGIC;
    words[control::SEED] = workload.seed;
    words[control::VSEED] = vseed(workload.seed, vcpu);
    words[control::PATTERN] = workload.pattern as u64;
    words[control::SLICE] = slice.first.get();
    words[control::SLICE_PAGES] = slice.pages;
    words[control::TAIL] = workload.tail(ram.layout()).get();
    words[control::TAIL_PAGES] = workload.zero_pages;
    words[control::WRITE_MASK] = workload.pattern.write_mask();
    words[control::THINK] = ticks(workload.think_ns);
    words[control::STEP_LIMIT] = workload.step_limit;
    words[control::STALL_THRESHOLD] = ticks(STALL_NS);
    words
}

fn write_page(ram: &GuestRam, page: PageIndex, words: &[u64; WORDS]) {
    let mut bytes = [0u8; PAGE_SIZE];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    ram.write_run(PageRun::single(page), &bytes);
}

/// A vCPU's control and histogram pages, seen through some mapping of guest memory.
///
/// On the destination of a migration the caller must know that the two pages are
/// placed (they are among the guest's seeds): a read of a missing page waits for it.
#[derive(Clone, Copy, Debug)]
pub struct Instruments<'a> {
    ram: &'a GuestRam,
    vcpu: u32,
}

impl<'a> Instruments<'a> {
    /// Those of `vcpu`.
    pub fn new(ram: &'a GuestRam, vcpu: u32) -> Self {
        Self { ram, vcpu }
    }

    fn word(&self, page: PageIndex, index: usize) -> &'a AtomicU64 {
        assert!(index < WORDS);
        // SAFETY: aligned and inside the mapping, which outlives 'a; guest and VMM
        // only access these words with whole, aligned loads and stores.
        unsafe { AtomicU64::from_ptr(self.ram.page_ptr(page).as_ptr().cast::<u64>().add(index)) }
    }

    /// A word of the control page, see [`control`].
    pub fn get(&self, index: usize) -> u64 {
        self.word(control_page(self.vcpu), index).load(Ordering::Acquire)
    }

    /// Sets a word of the control page that belongs to the VMM.
    pub fn set(&self, index: usize, value: u64) {
        self.word(control_page(self.vcpu), index).store(value, Ordering::Release);
    }

    /// The stall histogram.
    pub fn stalls(&self) -> Vec<u64> {
        let page = histogram_page(self.vcpu);
        (0..STALL_BUCKETS).map(|i| self.word(page, i).load(Ordering::Relaxed)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pointer_chase_is_one_cycle() {
        for n in [16u64, 17, 100, 1000, 1024] {
            let mut k = 0;
            for step in 1..=n {
                k = chase_next(vseed(42, 1), n, k);
                assert_eq!(k == 0, step == n, "n = {n}, step {step}");
            }
        }
    }

    #[test]
    fn stall_buckets_and_their_floors_agree() {
        for ticks in (0..4096).chain([1 << 40, u64::MAX]) {
            let bucket = stall_bucket(ticks);
            assert!(stall_bucket_floor(bucket) <= ticks);
            assert!(bucket < STALL_BUCKETS);
        }
    }
}
