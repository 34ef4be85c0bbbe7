//! Guests that the destination cannot take although both sides had agreed: a machine
//! state that is damaged, foreign or refused, and vCPUs that do not start.
//!
//! The guest is a real one in a `postcopy run` of its own, and so is the destination;
//! only one side's engine runs in the test, with the one step changed.

use super::harness::{Guest, Receiver, SOON};
use postcopy::DestinationBuilder;
use postcopy::attach::client::Attached;
use postcopy::engine::attached::AttachedVmm;
use postcopy::engine::source::{Migration, SourceConfig};
use postcopy::engine::vm::{Captured, DestinationVm, SourceVm, VmError};
use postcopy::host::arrival::Arrival;
use postcopy::proto::message::{Hello, Mismatch};
use postcopy::proto::prepaging::PolicyKind;
use postcopy::proto::source::{Outcome, SessionLimits};
use postcopy::transport::LinkOptions;
use std::sync::mpsc::channel;
use std::time::Instant;
use vm_memory::GuestMemoryMmap;

/// Where the envelopes of both guests have these: they are the same but for the magic.
const VERSION: usize = 8;
const ARCHITECTURE: usize = 10;
const CHECKSUM: std::ops::Range<usize> = 16..20;

type Alter = fn(&mut Vec<u8>);

/// A VMM whose machine state arrives otherwise than it was captured.
struct Altering {
    vmm: AttachedVmm,
    alter: Alter,
}

impl SourceVm for Altering {
    fn pause(&mut self) -> Result<Captured, VmError> {
        let mut captured = self.vmm.pause()?;
        (self.alter)(&mut captured.state);
        Ok(captured)
    }
    fn commit(&mut self) -> Result<bool, VmError> {
        self.vmm.commit()
    }
    fn resume(&mut self) -> Result<(), VmError> {
        self.vmm.resume()
    }
    fn release(&mut self) -> Result<(), VmError> {
        self.vmm.release()
    }
}

/// Runs something that blocks until it is over, under a limit.
fn limited<T: Send + 'static>(what: &str, run: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = channel();
    std::thread::spawn(move || done.send(run()));
    result.recv_timeout(SOON).unwrap_or_else(|_| panic!("{what}: not over within {SOON:?}"))
}

/// Migrates a guest whose state is altered on its way; how that ends at the source.
fn migrate(guest: &Guest, ticket: &str, alter: Alter) -> Outcome {
    let attached: Attached = guest.attach();
    let info = attached.guest.clone();
    let config = SourceConfig {
        ticket: ticket.parse().expect("the binary prints tickets"),
        link: LinkOptions::default(),
        limits: SessionLimits::default(),
        policy: PolicyKind::Bubbling,
        pivots: None,
        drain_after: None,
        switchover: Default::default(),
        compress: Default::default(),
        machine: attached.machine.clone(),
        guest: info.workload_json.into_bytes(),
        vcpus: info.vcpus as u16,
        guest_kind: info.kind,
        workload: None,
    };
    let migration = Migration::new(config, attached.ram.clone());
    let vmm = AttachedVmm::new(attached).expect("a guest that never left");
    let vm = Box::new(Altering { vmm, alter });
    limited("a migration", move || migration.run(vm).expect("threads").outcome)
}

/// Gives an altered content its right checksum.
fn reseal(state: &mut [u8]) {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&state[..CHECKSUM.start]);
    hasher.update(&state[CHECKSUM.end..]);
    state[CHECKSUM].copy_from_slice(&hasher.finalize().to_le_bytes());
}

/// Each of these states is refused with its reason, on both sides, and costs the guest
/// nothing.
fn refused(kind: &str, cases: &[(Alter, &str)]) {
    let guest = ["--guest", kind, "--memory", "16M", "--think-ns", "2000", "--vcpus", "2"];
    let guest = Guest::start_with(&guest);
    for (alter, why) in cases {
        let receiver = Receiver::start();
        let outcome = migrate(&guest, &receiver.ticket, *alter);
        let Outcome::Aborted(said) = &outcome else { panic!("{why}: {outcome:?}") };
        let named = said.contains("the destination aborted") && said.contains(why);
        assert!(named, "nothing of {why:?} in {said:?}");
        guest.runs_on();
        receiver.fails_with(3, &[why, "no guest is here"]);
    }
    // Its memory, too, is as if nothing had been.
    guest.migrates_to(Receiver::start());
}

#[test]
fn a_bad_state_of_a_process_is_refused_and_the_guest_runs_on() {
    refused(
        "process",
        &[
            (|state| state.truncate(state.len() - 1), "the state is truncated"),
            (|state| state.truncate(7), "the state is truncated: 7 of 20 bytes"),
            (|state| state.clear(), "the state is truncated: 0 of 20 bytes"),
            (|state| state.push(0), "1 bytes follow the state"),
            (|state| state[20] ^= 1, "the state's checksum is"),
            (|state| *state.last_mut().expect("a state") ^= 0x80, "the state's checksum is"),
            (|state| state[VERSION] = 1, "the state has version 1; version 2 is understood"),
            (|state| state[ARCHITECTURE] = 183, "the state is of architecture 183"),
            (|state| state[0] = b'Q', "the bytes are not the state of a process guest"),
            (
                |state| {
                    // More pages than this guest has, properly sealed.
                    state[20] ^= 1;
                    reseal(state);
                },
                "the state's number of pages is",
            ),
        ],
    );
}

#[test]
fn a_bad_state_of_a_virtual_machine_is_refused_and_the_guest_runs_on() {
    refused(
        "kvm",
        &[
            (|state| state.truncate(state.len() / 2), "the guest state is cut off"),
            (|state| state.truncate(3), "the guest state is cut off: 3 bytes of 20"),
            (|state| state.push(0), "1 bytes follow the guest state"),
            (|state| state[5000] ^= 4, "the guest state is damaged: its checksum is"),
            (|state| state[VERSION] = 2, "the guest state has version 2; this program reads"),
            (|state| state[ARCHITECTURE] = 2, "the guest state is for architecture 2"),
            (|state| state[0] = b'Q', "this is not the state of a KVM guest"),
            (|state| state.resize(2 << 20, 0), "a guest state of 2097152 bytes is over the limit"),
            (
                |state| {
                    state.truncate(state.len() - 1);
                    let length = (state.len() - 20) as u32;
                    state[12..16].copy_from_slice(&length.to_le_bytes());
                    reseal(state);
                },
                "the guest state cannot be decoded",
            ),
            (|state| paging_without_protection(state), "KVM_SET_SREGS failed"),
            // What the guest's processor has and the destination's has not is no matter of
            // the state: it is refused with the machine configuration, before the pause.
        ],
    );
}

/// Registers that no processor can have, properly sealed: 64-bit paging without the
/// page tables' extension that it needs. Only KVM itself finds that out.
fn paging_without_protection(state: &mut [u8]) {
    // In `struct kvm_sregs` CR0, CR2, CR3, CR4, CR8 and EFER stand before the local
    // APIC's base address, which is always this one on the first vCPU.
    let apic_base = 0xfee0_0900_u64.to_le_bytes();
    let at = state.windows(8).position(|bytes| bytes == apic_base).expect("a first vCPU");
    let efer = u64::from_le_bytes(state[at - 8..at].try_into().expect("eight bytes"));
    assert_eq!(efer & 0x500, 0x500, "a guest in 64-bit mode, or these are other registers");
    const CR4_PAE: u8 = 1 << 5;
    assert_ne!(state[at - 24] & CR4_PAE, 0, "as above");
    state[at - 24] &= !CR4_PAE;
    reseal(state);
}

/// A destination whose vCPUs do not start.
struct NeverRuns(Arrival);

impl DestinationVm for NeverRuns {
    fn prepare(&mut self, hello: &Hello, memory: GuestMemoryMmap) -> Result<String, Mismatch> {
        self.0.prepare(hello, memory)
    }
    fn vcpu_threads(&self) -> Vec<nix::unistd::Pid> {
        self.0.vcpu_threads()
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), VmError> {
        self.0.restore(state)
    }
    fn resume(&mut self) -> Result<Instant, VmError> {
        Err("KVM_RUN failed".into())
    }
}

/// After the commit there is no way back. But both sides say why, and at once; the
/// source neither runs the guest again nor lets go of its memory.
fn vcpus_that_do_not_start(kind: &str) {
    let guest = Guest::start_with(&["--guest", kind, "--memory", "16M"]);
    let receiver = DestinationBuilder::new().build().expect("two free ports");
    let ticket = receiver.ticket().to_string();
    let arrival = Arrival::default();
    let vm = Box::new(NeverRuns(arrival.clone()));
    let migration = guest.migrate(&ticket, &[]);
    let end = limited("a destination", move || receiver.run(vm).expect("threads").outcome);
    let why = "its vCPUs cannot be started: KVM_RUN failed";
    assert_eq!(end, Outcome::Lost(why.into()));
    // Not when the patience with a lost link is over.
    let ended = migration.wait(SOON);
    ended.failed_with(4, &["the migration was lost after the commit", why, "not resumed here"]);
    let status = guest.attach().status().expect("a VMM that is still there");
    assert!(!status.running, "the guest was given away and runs again: {status:?}");
    // To migrate it anew could be to run it twice.
    let second = Receiver::start();
    let again = guest.migrate(&second.ticket, &[]).wait(SOON);
    again.failed_with(1, &["this guest was given to a destination"]);
}

#[test]
fn vcpus_of_a_process_that_do_not_start_are_told_to_the_source() {
    vcpus_that_do_not_start("process");
}

#[test]
fn vcpus_of_a_virtual_machine_that_do_not_start_are_told_to_the_source() {
    vcpus_that_do_not_start("kvm");
}
