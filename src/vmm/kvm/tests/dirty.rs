//! Each of KVM's logs against a copy that follows it, and against the guest's own counts of
//! its visits.

use super::*;
use crate::memory::dirty_bitmap::DirtyBitmap;
use crate::vmm::guest::DirtyLogChoice;

const FIRST_PAGES: u64 = 9_001;
/// Four times as many as the smallest ring has room for.
const ALL_PAGES: u64 = 4 * 4096;

fn two_regions() -> MemoryLayout {
    MemoryLayout::new(vec![
        Region { start: GuestAddress(0), pages: FIRST_PAGES },
        Region { start: GuestAddress(1 << 32), pages: ALL_PAGES - FIRST_PAGES },
    ])
    .unwrap()
}

/// The guest, or a line that says why there is none.
fn guest(choice: DirtyLogChoice, vcpus: u32) -> Option<KvmGuest> {
    let mut workload = workload(Pattern::Random, vcpus, 0);
    workload.think_ns = 1_000;
    match KvmGuest::with_dirty_log(memory(two_regions()), workload, choice) {
        Ok(guest) => Some(guest),
        Err(error) => match error.source.downcast_ref() {
            Some(KvmError::Unavailable(why)) => {
                println!("skipped: the dirty log {}: {why}", choice.name());
                None
            }
            _ => panic!("{error:?}"),
        },
    }
}

fn run_for(guest: &KvmGuest, steps: u64) {
    let from: Vec<u64> =
        (0..guest.workload.vcpus).map(|vcpu| word(guest, vcpu, control::STEPS)).collect();
    wait_until(guest, |vcpu| word(guest, vcpu, control::STEPS) >= from[vcpu as usize] + steps);
}

fn content(ram: &GuestRam, page: PageIndex) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    ram.read_run(PageRun::single(page), &mut bytes);
    bytes
}

/// How often the guest wrote to the page, as it counts itself.
fn visits(page: &[u8; PAGE_SIZE]) -> u64 {
    u64::from_le_bytes(page[8..16].try_into().unwrap())
}

fn image(ram: &GuestRam) -> Vec<[u8; PAGE_SIZE]> {
    (0..ALL_PAGES).map(|page| content(ram, PageIndex::new(page))).collect()
}

/// A copy of a guest's memory that follows its log.
struct Follower {
    bitmap: DirtyBitmap,
    copy: Vec<[u8; PAGE_SIZE]>,
    named: Vec<u64>,
}

impl Follower {
    fn round(&mut self, guest: &mut KvmGuest) -> u64 {
        let count = guest.dirty_round(&[], &self.bitmap).unwrap();
        let mut taken = 0;
        for word in self.bitmap.take_all() {
            let (first, bits) = word.unwrap();
            for page in (0..64).filter(|bit| bits >> bit & 1 != 0).map(|bit| first.get() + bit) {
                self.copy[page as usize] = content(guest.ram(), PageIndex::new(page));
                self.named[page as usize] += 1;
                taken += 1;
            }
        }
        assert_eq!(count, taken);
        count
    }
}

fn a_copy_that_follows_the_log_is_complete(choice: DirtyLogChoice) {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(120);
    for vcpus in [1, 2] {
        let Some(mut guest) = guest(choice, vcpus) else { return };
        guest.resume().unwrap();
        // Some of what is written before must not be seen.
        run_for(&guest, 2_000);
        // A log that was on before leaves nothing behind.
        guest.start_dirty_log().unwrap();
        run_for(&guest, 2_000);
        guest.stop_dirty_log().unwrap();
        let before = image(guest.ram());
        guest.start_dirty_log().unwrap();
        let bitmap = DirtyBitmap::create(guest.ram().layout()).unwrap();
        let named = vec![0; ALL_PAGES as usize];
        let mut follower = Follower { bitmap, copy: image(guest.ram()), named };
        for _ in 0..10 {
            run_for(&guest, 400);
            follower.round(&mut guest);
        }
        // More than a ring has room for: the vCPUs must go on all the same.
        run_for(&guest, 30_000);
        let many = follower.round(&mut guest);
        assert!(many > 4096 * u64::from(vcpus), "{many} pages");
        let named = follower.named.clone();
        // So many rounds that vCPUs write in the middle of them. (And so many that one comes
        // between a fault and its write, and the page is named twice.)
        for _ in 0..500 {
            follower.round(&mut guest);
        }
        run_for(&guest, 400);
        guest.pause().unwrap();
        guest.capture().unwrap();
        assert!(follower.round(&mut guest) > 0);
        assert_eq!(follower.round(&mut guest), 0, "the guest is paused");
        let frozen = image(guest.ram());
        let lost: Vec<usize> =
            (0..frozen.len()).filter(|&page| follower.copy[page] != frozen[page]).collect();
        assert_eq!(lost, [0; 0], "pages that no round named");
        for (page, named) in named.into_iter().enumerate().skip(512) {
            // Named once when it was first mapped, be it for reading.
            let written = visits(&frozen[page]) - visits(&before[page]);
            assert!(named <= written + 1, "page {page}: named {named}, written {written} times");
        }
        guest.resume().unwrap();
        run_for(&guest, 400);
        // What was not taken is gone with the log.
        guest.stop_dirty_log().unwrap();
        guest.pause().unwrap();
        guest.start_dirty_log().unwrap();
        assert_eq!(follower.round(&mut guest), 0);
    }
}

#[test]
fn a_copy_that_follows_the_bitmap_is_complete() {
    a_copy_that_follows_the_log_is_complete(DirtyLogChoice::Bitmap);
}

#[test]
fn a_copy_that_follows_the_bitmap_cleared_in_parts_is_complete() {
    a_copy_that_follows_the_log_is_complete(DirtyLogChoice::Manual);
}

#[test]
fn a_copy_that_follows_the_rings_is_complete() {
    a_copy_that_follows_the_log_is_complete(DirtyLogChoice::Ring);
}

#[test]
fn a_round_of_no_log_is_refused() {
    if !kvm() {
        return;
    }
    for choice in [DirtyLogChoice::Bitmap, DirtyLogChoice::Manual, DirtyLogChoice::Ring] {
        let Some(mut guest) = guest(choice, 1) else { continue };
        let bitmap = DirtyBitmap::create(guest.ram().layout()).unwrap();
        let refused = guest.dirty_round(&[], &bitmap).unwrap_err();
        assert!(matches!(refused.source.downcast_ref(), Some(KvmError::NotLogging)), "{refused:?}");
    }
}
