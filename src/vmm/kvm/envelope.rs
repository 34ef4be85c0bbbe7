//! The envelope of a KVM guest's state on its way to another process: what it is, for
//! which architecture, how long, and whether it arrived whole.
//!
//! ```text
//! byte  0         8         10        12            16            20
//!       +---------+---------+---------+-------------+-------------+------------------+
//!       | magic   | version | archi-  | length of   | CRC-32 of   | GuestState, in   |
//!       | PCKVMST | 1       | tecture | the content | all but     | postcard         |
//!       | and 0   |         | 1: x86  |             | itself      |                  |
//!       +---------+---------+---------+-------------+-------------+------------------+
//!         8 bytes   u16       u16       u32           u32           length bytes
//! ```
//!
//! Integers are little-endian. The kernel's structures are in the content as the bytes
//! that KVM gave. Nothing is allocated by a number that was read before the checksum
//! was found right, and nothing at all for more than [`STATE_BYTES_MAX`].

use super::state::GuestState;

/// The most bytes that an enveloped state may have.
pub const STATE_BYTES_MAX: usize = 1 << 20;
/// The format's version.
pub const VERSION: u16 = 1;

const MAGIC: [u8; 8] = *b"PCKVMST\0";
const X86_64: u16 = 1;
const HEADER_BYTES: usize = 20;
const CHECKSUM: std::ops::Range<usize> = 16..20;

/// Bytes that are not a state which this guest can take.
#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    /// More than [`STATE_BYTES_MAX`], in fact or by its own account.
    #[error("a guest state of {0} bytes is over the limit of {STATE_BYTES_MAX}")]
    TooLarge(usize),
    /// Ends before it should.
    #[error("the guest state is cut off: {actual} bytes of {expected}")]
    Truncated {
        /// Bytes there should be, as far as known.
        expected: usize,
        /// Bytes there are.
        actual: usize,
    },
    /// Goes on after its end.
    #[error("{0} bytes follow the guest state")]
    Trailing(usize),
    /// No KVM guest's state.
    #[error("this is not the state of a KVM guest")]
    Magic,
    /// A version that this program does not know.
    #[error("the guest state has version {0}; this program reads version {VERSION}")]
    Version(u16),
    /// Another architecture's.
    #[error("the guest state is for architecture {0}; this host is x86_64 ({X86_64})")]
    Architecture(u16),
    /// Damaged on its way.
    #[error("the guest state is damaged: its checksum is {actual:#010x}, not {expected:#010x}")]
    Checksum {
        /// As told by the envelope.
        expected: u32,
        /// As computed.
        actual: u32,
    },
    /// The checksum is right, but the content is no state.
    #[error("the guest state cannot be decoded")]
    Content(#[source] postcard::Error),
    /// The state could not be encoded.
    #[error("the guest state cannot be encoded")]
    Encode(#[source] postcard::Error),
    /// For a guest with another number of vCPUs.
    #[error("the guest state has {actual} vCPUs; this guest has {expected}")]
    Vcpus {
        /// This guest's.
        expected: usize,
        /// The state's.
        actual: usize,
    },
    /// More entries in a list than KVM knows.
    #[error("vCPU {vcpu}'s state has {actual} {what}, more than {max}")]
    TooMany {
        /// Which vCPU.
        vcpu: usize,
        /// Of what.
        what: &'static str,
        /// How many.
        actual: usize,
        /// How many there may be.
        max: usize,
    },
    /// The guest saw another processor than this one would show it.
    #[error("vCPU {0} ran on a processor with other CPUID values than this guest's")]
    Cpuid(usize),
}

/// Puts a state into its envelope.
pub fn seal(state: &GuestState) -> Result<Vec<u8>, EnvelopeError> {
    let mut bytes = Vec::with_capacity(64 << 10);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&X86_64.to_le_bytes());
    bytes.extend_from_slice(&[0; HEADER_BYTES - 12]);
    let mut bytes = postcard::to_extend(state, bytes).map_err(EnvelopeError::Encode)?;
    if bytes.len() > STATE_BYTES_MAX {
        return Err(EnvelopeError::TooLarge(bytes.len()));
    }
    let length = (bytes.len() - HEADER_BYTES) as u32;
    bytes[12..16].copy_from_slice(&length.to_le_bytes());
    let checksum = checksum(&bytes);
    bytes[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
    Ok(bytes)
}

/// Takes a state for `vcpus` vCPUs out of its envelope.
pub fn open(bytes: &[u8], vcpus: usize) -> Result<GuestState, EnvelopeError> {
    if bytes.len() > STATE_BYTES_MAX {
        return Err(EnvelopeError::TooLarge(bytes.len()));
    }
    let Some((header, content)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        let (expected, actual) = (HEADER_BYTES, bytes.len());
        return Err(EnvelopeError::Truncated { expected, actual });
    };
    let [m0, m1, m2, m3, m4, m5, m6, m7, v0, v1, a0, a1, l0, l1, l2, l3, c0, c1, c2, c3] = *header;
    if [m0, m1, m2, m3, m4, m5, m6, m7] != MAGIC {
        return Err(EnvelopeError::Magic);
    }
    let version = u16::from_le_bytes([v0, v1]);
    if version != VERSION {
        return Err(EnvelopeError::Version(version));
    }
    let architecture = u16::from_le_bytes([a0, a1]);
    if architecture != X86_64 {
        return Err(EnvelopeError::Architecture(architecture));
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > STATE_BYTES_MAX - HEADER_BYTES {
        return Err(EnvelopeError::TooLarge(length));
    }
    if content.len() < length {
        let (expected, actual) = (HEADER_BYTES + length, bytes.len());
        return Err(EnvelopeError::Truncated { expected, actual });
    }
    if content.len() > length {
        return Err(EnvelopeError::Trailing(content.len() - length));
    }
    let (expected, actual) = (u32::from_le_bytes([c0, c1, c2, c3]), checksum(bytes));
    if expected != actual {
        return Err(EnvelopeError::Checksum { expected, actual });
    }
    let (state, rest): (GuestState, _) =
        postcard::take_from_bytes(content).map_err(EnvelopeError::Content)?;
    if !rest.is_empty() {
        return Err(EnvelopeError::Trailing(rest.len()));
    }
    check(&state, vcpus)?;
    Ok(state)
}

fn check(state: &GuestState, vcpus: usize) -> Result<(), EnvelopeError> {
    if state.vcpus.len() != vcpus {
        return Err(EnvelopeError::Vcpus { expected: vcpus, actual: state.vcpus.len() });
    }
    for (vcpu, state) in state.vcpus.iter().enumerate() {
        let lists = [
            ("MSRs", state.msrs.len(), kvm_bindings::KVM_MAX_MSR_ENTRIES),
            ("CPUID entries", state.cpuid.len(), kvm_bindings::KVM_MAX_CPUID_ENTRIES),
        ];
        for (what, actual, max) in lists {
            if actual > max {
                return Err(EnvelopeError::TooMany { vcpu, what, actual, max });
            }
        }
    }
    Ok(())
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..CHECKSUM.start]);
    hasher.update(&bytes[CHECKSUM.end..]);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::kvm::state::{VcpuState, VmState};
    use kvm_bindings::kvm_msr_entry;

    fn state(vcpus: usize) -> GuestState {
        let vcpu = |_| {
            let mut vcpu = VcpuState::default();
            vcpu.msrs = vec![kvm_msr_entry { index: 16, data: 5, ..Default::default() }];
            vcpu.tsc_khz = 7;
            vcpu
        };
        GuestState { vm: VmState::default(), vcpus: (0..vcpus).map(vcpu).collect() }
    }

    /// Puts other content under a right length and checksum.
    fn reseal(mut bytes: Vec<u8>) -> Vec<u8> {
        let length = (bytes.len() - HEADER_BYTES) as u32;
        bytes[12..16].copy_from_slice(&length.to_le_bytes());
        let sum = checksum(&bytes);
        bytes[CHECKSUM].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    #[test]
    fn what_was_sealed_is_opened() {
        let opened = open(&seal(&state(2)).unwrap(), 2).unwrap();
        assert_eq!(opened.vcpus.len(), 2);
        assert_eq!(opened.vcpus[1].msrs[0].data, 5);
        assert_eq!(opened.vcpus[1].tsc_khz, 7);
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_refused() {
        let sealed = seal(&state(1)).unwrap();
        for length in 0..sealed.len() {
            let error = open(&sealed[..length], 1).unwrap_err();
            assert!(matches!(error, EnvelopeError::Truncated { .. }), "{length}: {error}");
        }
        let mut flipped = sealed.clone();
        for bit in 0..sealed.len() * 8 {
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&flipped, 1).is_err(), "bit {bit}");
            flipped[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(open(&flipped, 1).is_ok());
    }

    #[test]
    fn each_reason_has_its_name() {
        let sealed = seal(&state(2)).unwrap();
        let with = |at: usize, value: u8| {
            let mut bytes = sealed.clone();
            bytes[at] = value;
            open(&bytes, 2).unwrap_err()
        };
        assert!(matches!(with(0, b'Q'), EnvelopeError::Magic));
        assert!(matches!(with(8, 2), EnvelopeError::Version(2)));
        assert!(matches!(with(10, 9), EnvelopeError::Architecture(9)));
        assert!(matches!(with(15, 0xFF), EnvelopeError::TooLarge(_)));
        assert!(matches!(with(100, sealed[100] ^ 4), EnvelopeError::Checksum { .. }));
        assert!(matches!(
            open(&sealed, 1).unwrap_err(),
            EnvelopeError::Vcpus { expected: 1, actual: 2 }
        ));
        let large = vec![0; STATE_BYTES_MAX + 1];
        assert!(matches!(open(&large, 2).unwrap_err(), EnvelopeError::TooLarge(_)));
        let mut longer = sealed.clone();
        longer.push(0);
        assert!(matches!(open(&longer, 2).unwrap_err(), EnvelopeError::Trailing(1)));
        assert!(matches!(open(&reseal(longer), 2).unwrap_err(), EnvelopeError::Trailing(1)));
        let shorter = reseal(sealed[..sealed.len() - 1].to_vec());
        assert!(matches!(open(&shorter, 2).unwrap_err(), EnvelopeError::Content(_)));
        let mut many = state(1);
        many.vcpus[0].msrs = vec![Default::default(); kvm_bindings::KVM_MAX_MSR_ENTRIES + 1];
        let many = seal(&many).unwrap();
        assert!(matches!(open(&many, 1).unwrap_err(), EnvelopeError::TooMany { .. }));
    }
}
