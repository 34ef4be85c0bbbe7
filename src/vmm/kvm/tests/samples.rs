//! States of every format version that was ever written, kept as files: what one
//! program wrote, every later one must read.
//!
//! `kvm-state-v1.bin` was written by the first program with that format, before its guest
//! had a clock: two vCPUs at CPL 3, random pattern, 1412 pages beside the tail.

use super::*;

const V1: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/samples/kvm-state-v1.bin"));

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

#[test]
fn a_state_of_version_1_is_read_as_it_was_written() {
    let state = envelope::open(V1, 2).unwrap();
    let msr = |vcpu: usize, index| {
        let mut msrs = state.vcpus[vcpu].msrs.iter();
        msrs.find(|msr| msr.index == index).map(|msr| msr.data)
    };
    // Stopped in the midst of a step: RIP, and the steps made.
    let stopped = [(0x4004_457D, 0xA55F), (0x4004_429F, 0x14DF)];
    for (vcpu, (of, (rip, steps))) in state.vcpus.iter().zip(stopped).enumerate() {
        assert_eq!((of.regs.rip, of.regs.r13, of.regs.r9), (rip, steps, 0xC0FFEE));
        assert_eq!(of.regs.r15, 0x4001_0000 + 0x2000 * vcpu as u64);
        assert_eq!((of.sregs.cr3, of.sregs.efer), (0x4_0000, 0xD01));
        assert_eq!((of.sregs.cs.selector, of.sregs.tr.selector), (0x33, 0x40));
        assert_eq!((of.xcrs.xcrs[0].value, of.tsc_khz, of.msrs.len()), (7, 2_100_000, 44));
        assert_eq!(msr(vcpu, 0x277), Some(0x0007_0406_0007_0406));
        assert!(!of.has_clock());
    }
    assert_eq!(msr(0, 0x10), Some(0x16FA_4BA3_5646));
    assert_eq!(msr(1, 0x10), Some(0x16FA_4BA2_0D24));
    // Nothing was added on the way.
    assert_eq!(envelope::seal(&state).unwrap(), V1);
}

#[test]
fn a_state_of_version_1_runs_on_where_its_processor_can_be_shown() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(60);
    let state = envelope::open(V1, 2).unwrap();
    let processor = Processor {
        cpuid: state.vcpus[0].cpuid.clone(),
        msrs: state.vcpus[0].msrs.iter().map(|msr| msr.index).collect(),
        tsc_khz: state.vcpus[0].tsc_khz,
    };
    let workload = workload(Pattern::Random, 2, 0);
    let ram = memory(flat());
    let mut guest = match KvmGuest::prepare_with(Arc::clone(&ram), workload.clone(), &processor) {
        Ok(guest) => guest,
        Err(error) => {
            let cause = error.source.downcast_ref::<KvmError>();
            let Some(KvmError::Processor(mismatch)) = cause else { panic!("{error:?}") };
            println!("skipped: {mismatch}");
            return;
        }
    };
    // Memory as this program makes it at the beginning. The sample's program lay at other
    // addresses, so it does not go on from its RIP, but from its own entry.
    drop(KvmGuest::new(Arc::clone(&ram), workload.clone()).unwrap());
    guest.restore(V1).unwrap();
    assert_eq!(guest.phase, Phase::Paused);
    // What KVM gives back is what it was given.
    let again = envelope::open(&guest.capture().unwrap(), 2).unwrap();
    for (was, is) in state.vcpus.iter().zip(&again.vcpus) {
        assert_eq!(was.regs, is.regs);
        assert_eq!((was.sregs.cr0, was.sregs.cs), (is.sregs.cr0, is.sregs.cs));
        let counter_apart = |of: &state::VcpuState| {
            of.msrs.iter().filter(|msr| msr.index != 0x10).copied().collect::<Vec<_>>()
        };
        assert_eq!(counter_apart(was), counter_apart(is));
    }
}
