//! `postcopy check` on the memory of guests that have done their work: accepted as it
//! is, and refused with exit code 5 once a byte of it is flipped.

use super::harness::{Ended, Guest, Running, SOON, poll};
use postcopy::memory::ram::GuestRam;
use postcopy::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use postcopy::vmm::content::Instruments;
use postcopy::vmm::workload::{STATUS_FINISHED, control};

const STEPS: &str = "5000";

/// All memory of a guest, once each of its vCPUs rests.
fn finished(guest: &Guest, vcpus: u32) -> Vec<u8> {
    let attached = guest.attach();
    let ram: &GuestRam = &attached.ram;
    poll("the end of the workload", SOON, || {
        let status = |vcpu| Instruments::new(ram, vcpu).get(control::STATUS);
        (0..vcpus).all(|vcpu| status(vcpu) == STATUS_FINISHED).then_some(())
    });
    let pages = ram.layout().pages();
    let mut memory = vec![0; pages as usize * PAGE_SIZE];
    let all = PageRun::new(PageIndex::new(0), pages).expect("a guest has memory");
    ram.read_run(all, &mut memory);
    memory
}

fn check(memory: &[u8], arguments: &str) -> Ended {
    let mut checker = Running::start(&arguments.split_whitespace().collect::<Vec<_>>());
    checker.feed(memory);
    checker.wait(SOON)
}

fn a_flipped_byte_is_found(kind: &str, arguments: &str) {
    let start = "--memory 8M --vcpus 2 --workload zipf --zero 20 --steps 5000 --seed 77";
    let start = format!("--guest {kind} {start}");
    let guest = Guest::start_with(&start.split_whitespace().collect::<Vec<_>>());
    let mut memory = finished(&guest, 2);
    let good = format!(
        "check --pages 2048 --vcpus 2 --seed 77 --workload zipf --zero-pages 409 \
        --expect-steps {STEPS},{STEPS} {arguments}"
    );

    let accepted = check(&memory, &good);
    assert_eq!(accepted.code, Some(0), "{accepted:?}");
    assert!(accepted.stdout.starts_with("verified: "), "{accepted:?}");

    // In the arena's middle, in its last byte, and in a page that must be zero.
    for at in [1000 * PAGE_SIZE + 123, 1639 * PAGE_SIZE - 1, 2047 * PAGE_SIZE] {
        memory[at] ^= 0x10;
        let refused = check(&memory, &good);
        memory[at] ^= 0x10;
        assert_eq!(refused.code, Some(5), "byte {at}: {refused:?}");
        let page = format!("{}", at / PAGE_SIZE);
        assert!(refused.stderr.starts_with("postcopy: verification failed: "), "{refused:?}");
        assert!(refused.stderr.contains(&page), "page {page} is not named: {refused:?}");
    }

    // Other mistakes of the same kind: a page that is missing, one too many, another
    // seed, and steps that are known to have been made and were not.
    let short = check(&memory[..memory.len() - PAGE_SIZE], &good);
    assert_eq!(short.code, Some(5), "{short:?}");
    let long = check(&[&memory[..], &[0]].concat(), &good);
    assert_eq!(long.code, Some(5), "{long:?}");
    for wrong in [good.replace("--seed 77", "--seed 78"), good.replace(STEPS, "5001")] {
        let refused = check(&memory, &wrong);
        assert_eq!(refused.code, Some(5), "{wrong}: {refused:?}");
    }
    let missing = check(&[], &format!("{good} /no/such/file"));
    missing.failed_with(1, &["cannot open /no/such/file", "No such file"]);
}

#[test]
fn a_flipped_byte_of_a_process_is_found() {
    a_flipped_byte_is_found("process", "");
}

#[test]
fn a_flipped_byte_of_a_virtual_machine_is_found() {
    a_flipped_byte_is_found("kvm", "--kvm");
}
