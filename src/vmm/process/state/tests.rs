//! Tests of the process guest's machine state.

use super::*;
use crate::vmm::clock::GuestClock;
use crate::vmm::workload::MachineForm;
use proptest::prelude::*;

const PAGES: u64 = 4096;

fn workload() -> Workload {
    Workload {
        pattern: Pattern::Zipf,
        seed: 7,
        vcpus: 2,
        think_ns: 0,
        step_limit: 0,
        zero_pages: 64,
        form: MachineForm::default(),
        trace: None,
    }
}

fn state() -> State {
    let mut second = Registers::first();
    (second.step, second.cursor, second.lane) = (u64::MAX, 1234, 15);
    State {
        pages: PAGES,
        pattern: Pattern::Zipf,
        seed: 7,
        zero_pages: 64,
        clock: GuestClock::default().record(),
        vcpus: vec![Registers::first(), second],
    }
}

fn sealed() -> Vec<u8> {
    state().seal().unwrap()
}

fn open(bytes: &[u8]) -> Result<State, StateError> {
    State::open(bytes, &workload(), PAGES)
}

#[test]
fn a_state_comes_back_as_it_was() {
    let state = state();
    assert_eq!(open(&state.seal().unwrap()), Ok(state));
}

#[test]
fn a_truncated_state_is_refused_at_every_length() {
    let bytes = sealed();
    for length in 0..bytes.len() {
        let refused = open(&bytes[..length]).unwrap_err();
        assert!(matches!(refused, StateError::Truncated { actual, .. } if actual == length));
    }
}

#[test]
fn each_flipped_bit_is_noticed() {
    let bytes = sealed();
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(open(&flipped).is_err(), "bit {bit} was flipped");
    }
}

#[test]
fn other_versions_architectures_lengths_and_files_are_refused_by_name() {
    let with = |at: usize, new: &[u8]| {
        let mut bytes = sealed();
        bytes[at..at + new.len()].copy_from_slice(new);
        open(&bytes).unwrap_err()
    };
    assert_eq!(with(0, b"ELF"), StateError::Magic);
    assert_eq!(with(8, &[1, 0]), StateError::Version(1));
    assert_eq!(with(10, &[183, 0]), StateError::Architecture(183));
    assert_eq!(with(12, &[0xFF; 4]), StateError::TooLarge(u32::MAX as usize));
    assert!(matches!(with(16, &[0; 4]), StateError::Checksum { expected: 0, .. }));
    let mut longer = sealed();
    longer.extend([0; 3]);
    assert_eq!(open(&longer), Err(StateError::Trailing(3)));
}

#[test]
fn a_state_of_another_guest_is_refused_by_what_differs() {
    let differs = |state: State| match open(&state.seal().unwrap()).unwrap_err() {
        StateError::Workload { field, .. } => field,
        StateError::Vcpus { expected: 2, .. } => "vCPUs",
        other => panic!("{other}"),
    };
    let state = state();
    assert_eq!(differs(State { seed: 8, ..state.clone() }), "seed");
    assert_eq!(differs(State { pages: 1, ..state.clone() }), "number of pages");
    assert_eq!(differs(State { zero_pages: 1, ..state.clone() }), "number of zero pages");
    assert_eq!(differs(State { pattern: Pattern::Random, ..state.clone() }), "pattern");
    for vcpus in [0, 1, 3, 100] {
        let vcpus = vec![Registers::first(); vcpus];
        assert_eq!(differs(State { vcpus, ..state.clone() }), "vCPUs");
    }
    let huge = State { vcpus: vec![Registers::first(); 5000], ..state };
    assert!(matches!(huge.seal(), Err(StateError::TooLarge(_))));
}

proptest! {
    /// Bytes from anywhere, even with a right checksum, are parsed or refused.
    #[test]
    fn no_payload_makes_it_panic(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut bytes = sealed();
        bytes.truncate(12);
        bytes.extend((payload.len() as u32).to_le_bytes());
        let checksum = checksum(&bytes, &payload);
        bytes.extend(checksum.to_le_bytes());
        bytes.extend(payload);
        let _ = open(&bytes);
    }
}
