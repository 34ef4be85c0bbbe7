//! A guest that gets huge pages when all its memory has come: how much of it is mapped by
//! them, as the kernel says, and that its content is the same.

use super::harness::{Guest, MIGRATION, Receiver, SOON, check_report, poll, read_report};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs::read_to_string;

/// Bytes of the guest.
const MEMORY: u64 = 96 << 20;

/// Whether this kernel makes huge pages when it is told to; if not, says so.
fn has_huge_pages() -> bool {
    let release = read_to_string("/proc/sys/kernel/osrelease").expect("a kernel has a version");
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0u32));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let has =
        version >= (6, 1) && read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").is_ok();
    if !has {
        println!("SKIPPED: Linux {} here has no MADV_COLLAPSE", release.trim());
    }
    has
}

/// The bytes that process `pid` has mapped by huge pages, in mappings that are as large as the
/// guest.
fn mapped_huge(pid: u32) -> u64 {
    let smaps = read_to_string(format!("/proc/{pid}/smaps")).expect("a process that runs");
    let (mut large, mut kib) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (name, value) = (words.next(), words.next().and_then(|kib| kib.parse::<u64>().ok()));
        match (name, value) {
            (Some("Size:"), Some(size)) => large = size * 1024 >= MEMORY,
            (Some("AnonHugePages:" | "ShmemPmdMapped:"), Some(huge)) if large => kib += huge,
            _ => {}
        }
    }
    kib * 1024
}

fn gets_huge_pages(guest: &str, backing: &str) {
    if !has_huge_pages() {
        return;
    }
    let memory = MEMORY.to_string();
    let guest = Guest::start_with(&["--guest", guest, "--memory", &memory, "--vcpus", "2"]);
    let asked = ["--huge-pages", "--backing", backing, "--verify-after", "1h"];
    let receiver = Receiver::start_with(&asked);
    let report = guest.path("report.json");
    guest.migrate(&receiver.ticket, &["--report", &report]).succeed(MIGRATION);
    let mut source = read_report(&report);
    guest.has_left();
    let pid = receiver.process.pid();
    poll("nine tenths of the memory in huge pages", SOON, || {
        (mapped_huge(pid) >= MEMORY / 10 * 9).then_some(())
    });
    // It ends the guest now, which has run all the time, and has it verified.
    receiver.process.signal(Signal::SIGINT);
    let here = receiver.report();
    assert!(source.get("huge_pages").is_none(), "it was to wait for nothing: {source:#}");
    source["verified"] = here["verified"].clone();
    check_report(&source);

    let huge = &here["huge_pages"];
    let count = |name: &str| {
        huge.pointer(name).and_then(Value::as_u64).unwrap_or_else(|| panic!("no {name}: {here:#}"))
    };
    assert_eq!(count("/blocks"), MEMORY / (2 << 20), "{here:#}");
    assert!(count("/collapsed") >= count("/blocks") * 9 / 10, "{here:#}");
    assert!(count("/call_ns/count") >= count("/collapsed"), "{here:#}");
    assert!(count("/us_to_90_percent") <= count("/total_us"), "{here:#}");
    assert!(huge["guest_stall_ns"].is_object() && count("/cpu_us") > 0, "{here:#}");
}

#[test]
fn a_process_in_anonymous_memory_gets_huge_pages_and_keeps_its_content() {
    gets_huge_pages("process", "anonymous");
}

#[test]
fn a_process_in_a_memfd_gets_huge_pages_and_keeps_its_content() {
    gets_huge_pages("process", "memfd-continue");
}

#[test]
fn a_virtual_machine_gets_huge_pages_and_keeps_its_content() {
    gets_huge_pages("kvm", "memfd-copy");
}
