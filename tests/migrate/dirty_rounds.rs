//! Dirty rounds of a real guest against copies of its memory: what a round leaves out
//! is missing in a copy that follows the rounds, and what it adds is found by the guest's
//! own counts of its visits.

use super::harness::{Guest, SOON, poll};
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2};
use kvm_ioctls::Kvm;
use postcopy::attach::client::{Attached, DirtyLog};
use postcopy::memory::ram::GuestRam;
use postcopy::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use postcopy::uffd::WriteLog;
use postcopy::vmm::content::Instruments;
use postcopy::vmm::workload::{
    MACHINE_PAGES_FIRST, STATUS_FINISHED, SYSTEM_PAGES, control, control_page,
};
use std::collections::BTreeSet;

/// A guest's memory, page by page.
pub fn image(ram: &GuestRam) -> Vec<Vec<u8>> {
    (0..ram.layout().pages()).map(|page| content(ram, page)).collect()
}

fn content(ram: &GuestRam, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_SIZE];
    ram.read_run(PageRun::single(PageIndex::new(page)), &mut bytes);
    bytes
}

/// The pages that differ.
pub fn difference(one: &[Vec<u8>], other: &[Vec<u8>]) -> Vec<usize> {
    assert_eq!(one.len(), other.len());
    (0..one.len()).filter(|&page| one[page] != other[page]).collect()
}

/// How often the guest wrote to this page of its arena, as it counts itself.
fn visits(page: &[u8]) -> u64 {
    u64::from_le_bytes(page[8..16].try_into().expect("eight bytes"))
}

fn take(log: &DirtyLog) -> BTreeSet<u64> {
    let words = log.bitmap.take_all().map(|word| word.expect("no bit beyond the end"));
    words
        .flat_map(|(first, bits)| {
            (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| first.get() + bit)
        })
        .collect()
}

/// A round into an empty bitmap.
fn round(attached: &mut Attached, log: &DirtyLog) -> BTreeSet<u64> {
    let round = attached.dirty_round().expect("a round");
    assert!(log.started_at_ns <= round.began_at_ns && round.began_at_ns <= round.ended_at_ns);
    let pages = take(log);
    assert_eq!(round.pages, pages.len() as u64);
    pages
}

/// Whether page `page` of a guest whose workload scans is one that it may have touched: all
/// but the part of the slices that its scans have not come to.
fn touched(ram: &GuestRam, vcpus: u32, page: u64) -> bool {
    let own = 16..16 + 2 * u64::from(vcpus);
    if own.contains(&page) || (MACHINE_PAGES_FIRST..SYSTEM_PAGES).contains(&page) {
        return true;
    }
    (0..vcpus).any(|vcpu| {
        let instruments = Instruments::new(ram, vcpu);
        let [slice, pages, cursor, tail] =
            [control::SLICE, control::SLICE_PAGES, control::CURSOR, control::TAIL]
                .map(|index| instruments.get(index));
        assert!(instruments.get(control::STEPS) / 8 < pages, "the scan has begun anew");
        page >= tail || (slice..slice + cursor.max(pages / 16)).contains(&page)
    })
}

/// Whether the writes of such a guest can be logged so here; if not, a line says why.
pub fn has_log(kind: &str, log: &str) -> bool {
    let of_kvm = |capability: u32| match Kvm::new() {
        Ok(kvm) if kvm.check_extension_raw(capability.into()) > 0 => Ok(()),
        Ok(_) => Err(format!("KVM lacks capability {capability}")),
        Err(why) => Err(format!("there is no KVM: {why}")),
    };
    let available = match (kind, log) {
        ("process", _) => WriteLog::available().map_err(|why| why.to_string()),
        (_, "manual") => of_kvm(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
        (_, "ring") => of_kvm(KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
        _ => Ok(()),
    };
    if let Err(why) = &available {
        println!("SKIPPED: the writes of a {kind} guest cannot be logged by {log} here: {why}");
    }
    available.is_ok()
}

/// Follows a guest's rounds with a copy of its memory until the guest is paused. No page
/// that was written may be missing from the rounds. KVM also names a page when it first
/// maps it, be it for reading; the process guest's log names one also when it is about to be
/// written, and after that. More than that neither may add.
fn a_copy_that_follows_the_rounds_is_complete(kind: &str, log: &str, vcpus: u32) {
    if !has_log(kind, log) {
        return;
    }
    let workload = if vcpus == 1 { "random" } else { "hot-set-with-scan" };
    // So many steps that the scans do not come round.
    let arguments = ["--memory", "64M", "--think-ns", "200000", "--zero", "10", "--steps", "50000"];
    let vcpus_text = vcpus.to_string();
    let guest = ["--guest", kind, "--dirty-log", log, "--vcpus", &vcpus_text];
    let guest = [&guest[..], &["--workload", workload], &arguments].concat();
    let guest = Guest::start_with(&guest);
    let mut attached = guest.attach();
    let ram = attached.ram.clone();
    // Some steps must lie before, that are not to be seen.
    makes_steps(&mut attached, 1000);
    let before = image(&ram);
    let log = attached.start_dirty_log().expect("a log of its writes");
    let mut copy = image(&ram);
    let mut named = vec![0; copy.len()];
    let mut follow = |pages: BTreeSet<u64>| {
        for page in pages.into_iter().map(|page| page as usize) {
            copy[page] = content(&ram, page as u64);
            named[page] += 1;
        }
    };
    for _ in 0..8 {
        makes_steps(&mut attached, 200);
        let pages = round(&mut attached, &log);
        assert!(pages.contains(&control_page(0).get()));
        follow(pages);
    }
    makes_steps(&mut attached, 200);
    attached.pause().expect("a paused guest");
    let frozen = image(&ram);
    let last = round(&mut attached, &log);
    assert!(!last.is_empty());
    follow(last);
    assert_eq!(difference(&copy, &frozen), [0; 0], "pages that no round named");
    assert_eq!(round(&mut attached, &log), BTreeSet::new(), "the guest is paused");

    for (page, &named) in named.iter().enumerate() {
        if page as u64 >= SYSTEM_PAGES {
            let written = visits(&frozen[page]) - visits(&before[page]);
            assert!(named <= written + 1, "page {page}: named {named}, written {written} times");
            assert!(kind == "kvm" || named == 0 || written > 0, "page {page} was not written");
        }
        if workload == "hot-set-with-scan" && named > 0 {
            assert!(touched(&ram, vcpus, page as u64), "page {page} was never touched");
        }
    }
    attached.resume().expect("a guest that runs on");
    guest.runs_on();
}

fn makes_steps(attached: &mut Attached, steps: u64) {
    let from = attached.status().expect("a status").steps;
    poll("a guest at work", SOON, || {
        (attached.status().expect("a status").steps >= from + steps).then_some(())
    });
}

#[test]
fn a_copy_that_follows_the_bitmap_is_complete() {
    a_copy_that_follows_the_rounds_is_complete("kvm", "bitmap", 1);
}

#[test]
fn a_copy_that_follows_the_bitmap_of_two_vcpus_is_complete() {
    a_copy_that_follows_the_rounds_is_complete("kvm", "bitmap", 2);
}

#[test]
fn a_copy_that_follows_the_bitmap_cleared_in_parts_is_complete() {
    a_copy_that_follows_the_rounds_is_complete("kvm", "manual", 1);
}

#[test]
fn a_copy_that_follows_the_bitmap_cleared_in_parts_of_two_vcpus_is_complete() {
    a_copy_that_follows_the_rounds_is_complete("kvm", "manual", 2);
}

#[test]
fn a_copy_that_follows_the_rings_is_complete() {
    a_copy_that_follows_the_rounds_is_complete("kvm", "ring", 1);
}

#[test]
fn a_copy_that_follows_the_rings_of_two_vcpus_is_complete() {
    a_copy_that_follows_the_rounds_is_complete("kvm", "ring", 2);
}

#[test]
fn a_copy_that_follows_a_process_guest_is_complete() {
    a_copy_that_follows_the_rounds_is_complete("process", "auto", 1);
}

#[test]
fn a_copy_that_follows_a_process_guest_of_two_vcpus_is_complete() {
    a_copy_that_follows_the_rounds_is_complete("process", "auto", 2);
}

fn what_the_vmm_itself_writes_is_in_the_round(kind: &str, log: &str) {
    if !has_log(kind, log) {
        return;
    }
    let guest = ["--guest", kind, "--dirty-log", log, "--memory", "16M", "--steps", "5000"];
    let guest = Guest::start_with(&guest);
    let mut attached = guest.attach();
    let ram = attached.ram.clone();
    poll("a guest that has finished", SOON, || {
        (Instruments::new(&ram, 0).get(control::STATUS) == STATUS_FINISHED).then_some(())
    });
    let log = attached.start_dirty_log().expect("a log of its writes");
    // It may still be on its way out of its program.
    poll("a guest that rests", SOON, || round(&mut attached, &log).is_empty().then_some(()));
    let before = image(&ram);
    attached.reset_instruments().expect("a guest that has finished needs not be waited for");
    assert_eq!(difference(&before, &image(&ram)), [control_page(0).as_usize()]);
    assert_eq!(round(&mut attached, &log), BTreeSet::from([control_page(0).get()]));
    assert_eq!(round(&mut attached, &log), BTreeSet::new());
}

#[test]
fn what_the_vmm_of_a_kvm_guest_itself_writes_is_in_the_round() {
    for log in ["bitmap", "manual", "ring"] {
        what_the_vmm_itself_writes_is_in_the_round("kvm", log);
    }
}

#[test]
fn what_the_vmm_of_a_process_guest_itself_writes_is_in_the_round() {
    what_the_vmm_itself_writes_is_in_the_round("process", "auto");
}
