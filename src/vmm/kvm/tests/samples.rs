//! States of every format version that was ever written, kept as files: what one
//! program wrote, every later one must read.

use super::*;

#[test]
#[ignore = "writes a sample of the current format; for a new version of it only"]
fn write_a_sample() {
    let mut guest = KvmGuest::new(memory(flat()), workload(Pattern::Random, 2, 0)).unwrap();
    guest.resume().unwrap();
    wait_until(&guest, |vcpu| word(&guest, vcpu, control::STEPS) > 1000);
    guest.pause().unwrap();
    let path = format!(
        "{}/tests/samples/kvm-state-v{}.bin",
        env!("CARGO_MANIFEST_DIR"),
        envelope::VERSION
    );
    std::fs::write(path, guest.capture().unwrap()).unwrap();
}
