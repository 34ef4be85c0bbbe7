//! States that a guest must refuse by name, whatever is wrong with them.

use super::*;
use envelope::EnvelopeError;

fn cause(error: GuestError) -> KvmError {
    *error.source.downcast::<KvmError>().expect("an error of the KVM guest")
}

fn one() -> Workload {
    workload(Pattern::Random, 1, 0)
}

/// The state of a guest with `vcpus` vCPUs that has not run.
fn sealed(vcpus: u32) -> Vec<u8> {
    let workload = workload(Pattern::Random, vcpus, 0);
    KvmGuest::new(memory(flat()), workload).unwrap().capture().unwrap()
}

/// Has a prepared guest take `state`, which it must refuse, and drops it.
fn refused(state: &[u8]) -> KvmError {
    let mut guest = KvmGuest::prepare(memory(flat()), one()).unwrap();
    let error = cause(guest.restore(state).unwrap_err());
    assert!(guest.resume().is_err(), "it runs without a state");
    let begun = Instant::now();
    drop(guest);
    assert!(begun.elapsed() < Duration::from_secs(10));
    error
}

#[test]
fn a_state_that_is_damaged_or_foreign_is_refused_by_name() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(60);
    let state = sealed(1);
    let with = |at: usize, value: u8| {
        let mut bytes = state.clone();
        bytes[at] = value;
        match refused(&bytes) {
            KvmError::Envelope(error) => error,
            error => panic!("{error:?}"),
        }
    };
    assert!(matches!(with(0, b'Q'), EnvelopeError::Magic));
    assert!(matches!(with(8, 200), EnvelopeError::Version(200)));
    assert!(matches!(with(10, 2), EnvelopeError::Architecture(2)));
    for at in [20, 400, state.len() - 1] {
        assert!(matches!(with(at, state[at] ^ 0x10), EnvelopeError::Checksum { .. }));
    }
    for length in [0, 7, 19, 20, 4096, state.len() - 1] {
        let error = refused(&state[..length]);
        assert!(matches!(error, KvmError::Envelope(EnvelopeError::Truncated { .. })), "{error:?}");
    }
    let error = refused(&[state.as_slice(), &[0]].concat());
    assert!(matches!(error, KvmError::Envelope(EnvelopeError::Trailing(1))), "{error:?}");
    let error = refused(&sealed(2));
    let vcpus = EnvelopeError::Vcpus { expected: 1, actual: 2 }.to_string();
    assert_eq!(error.to_string(), vcpus);
}

#[test]
fn a_state_that_kvm_refuses_is_told_by_the_ioctl_and_the_vcpu() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(60);
    let state = sealed(1);
    let spoilt = |spoil: &dyn Fn(&mut state::VcpuState)| {
        let mut opened = envelope::open(&state, 1).unwrap();
        spoil(&mut opened.vcpus[0]);
        match refused(&envelope::seal(&opened).unwrap()) {
            KvmError::Vcpu { vcpu: 0, source } => *source,
            error => panic!("{error:?}"),
        }
    };
    // Paging without protection; long mode without PAE.
    let error = spoilt(&|vcpu| vcpu.sregs.cr0 &= !1);
    assert!(matches!(error, KvmError::Call { call: "KVM_SET_SREGS", .. }), "{error:?}");
    let error = spoilt(&|vcpu| vcpu.sregs.cr4 &= !(1 << 5));
    assert!(matches!(error, KvmError::Call { call: "KVM_SET_SREGS", .. }), "{error:?}");
    // No address; an MSR that there is not.
    const LSTAR: u32 = 0xC000_0082;
    let error = spoilt(&|vcpu| {
        let lstar = vcpu.msrs.iter_mut().find(|msr| msr.index == LSTAR).expect("no LSTAR");
        lstar.data = 1 << 63;
    });
    assert!(matches!(error, KvmError::WriteMsr(LSTAR)), "{error:?}");
    let error = spoilt(&|vcpu| vcpu.msrs[0].index = 0xDEAD_0000);
    assert!(matches!(error, KvmError::WriteMsr(0xDEAD_0000)), "{error:?}");
    // The x87 state is always enabled.
    let error = spoilt(&|vcpu| vcpu.xcrs.xcrs[0].value = 0);
    assert!(matches!(error, KvmError::Call { call: "KVM_SET_XCRS", .. }), "{error:?}");
    let error = spoilt(&|vcpu| vcpu.events.flags = u32::MAX);
    assert!(matches!(error, KvmError::Call { call: "KVM_SET_VCPU_EVENTS", .. }), "{error:?}");
    let error = spoilt(&|vcpu| vcpu.mp_state.mp_state = 77);
    assert!(matches!(error, KvmError::Call { call: "KVM_SET_MP_STATE", .. }), "{error:?}");
    let error = spoilt(&|vcpu| vcpu.debug_regs.flags = 1);
    assert!(matches!(error, KvmError::Call { call: "KVM_SET_DEBUGREGS", .. }), "{error:?}");
}

#[test]
fn a_guest_that_took_half_a_state_takes_no_other() {
    if !kvm() {
        return;
    }
    let state = sealed(1);
    let mut opened = envelope::open(&state, 1).unwrap();
    opened.vcpus[0].sregs.cr0 &= !1;
    let mut guest = KvmGuest::prepare(memory(flat()), one()).unwrap();
    guest.restore(&envelope::seal(&opened).unwrap()).unwrap_err();
    for error in [guest.restore(&state).unwrap_err(), guest.resume().unwrap_err()] {
        let error = cause(error);
        assert!(matches!(error, KvmError::Phase { is: "half restored", .. }), "{error:?}");
    }
}

#[test]
fn a_processor_is_shown_or_refused_by_what_it_lacks() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(60);
    let guest = KvmGuest::new(memory(flat()), one()).unwrap();
    let own = guest.machine.processor().clone();
    let prepare = |processor: &Processor| KvmGuest::prepare_with(memory(flat()), one(), processor);
    let refusal = |processor: &Processor| match cause(prepare(processor).map(drop).unwrap_err()) {
        KvmError::Processor(mismatch) => (mismatch.field, mismatch.source_value),
        error => panic!("{error:?}"),
    };
    // As from an older host: this one has more to offer, and the guest does not see it.
    let leaf = |of: &mut Processor, function| {
        let entries = of.cpuid.iter();
        entries.map(|entry| entry.function).position(|of| of == function).expect("no such leaf")
    };
    let mut older = own.clone();
    let extended = leaf(&mut older, 7);
    let has = older.cpuid[extended].ebx;
    let taken = 1 << has.checked_ilog2().expect("this KVM offers nothing in leaf 7");
    older.cpuid[extended].ebx &= !taken;
    older.msrs.pop();
    let prepared = prepare(&older).unwrap();
    assert_eq!(prepared.machine.processor().msrs, older.msrs);
    assert_ne!(prepared.machine(), guest.machine());
    let shown = |processor: &Processor| {
        let log = DirtyLogChoice::Auto;
        let made = machine::Machine::create(memory(flat()), &one(), Some(processor), log).unwrap();
        let table = made.1[0].get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
        let mut entries = table.as_slice().iter();
        entries.find(|entry| (entry.function, entry.index) == (7, 0)).unwrap().ebx
    };
    if shown(&own) == has {
        assert_eq!(shown(&older), has & !taken, "the guest sees this host's processor");
    } else {
        println!("skipped in part: this KVM shows guests the hardware's CPUID, whatever is set");
    }

    let mut newer = own.clone();
    let extended = leaf(&mut newer, 7);
    assert_eq!(newer.cpuid[extended].ecx & 1 << 23, 0, "this host has Key Locker");
    newer.cpuid[extended].ecx |= 1 << 23;
    newer.cpuid[extended].edx |= 1;
    let (field, lacks) = refusal(&newer);
    assert_eq!(field, "CPU features");
    assert_eq!(lacks, "key_locker, cpuid 7.0 edx bit 0");

    let mut other = own.clone();
    other.msrs.push(0xDEAD_0000);
    assert_eq!(refusal(&other), ("MSRs".to_owned(), "0xdead0000".to_owned()));
    let mut other = own.clone();
    let vendor = leaf(&mut other, 0);
    other.cpuid[vendor].ecx ^= 1;
    assert_eq!(refusal(&other).0, "the processor's vendor");
    let mut other = own.clone();
    other.msrs = vec![0x10; 257];
    assert_eq!(refusal(&other).0, "MSRs");
    let mut other = own;
    other.cpuid.resize(257, Default::default());
    assert_eq!(refusal(&other).0, "CPUID");
}
