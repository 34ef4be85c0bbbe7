//! The process guest's state in its envelope.
//!
//! ```text
//!  0          8         10         12        16        20
//! +----------+---------+----------+---------+---------+--------------------+
//! | magic    | version | machine  | length  | CRC-32  | payload (postcard) |
//! +----------+---------+----------+---------+---------+--------------------+
//! ```
//!
//! Integers are little-endian; `machine` is ELF's number of the architecture;
//! `length` is the payload's; the CRC covers the header before it and the payload.

use super::walker::Registers;
use crate::vmm::clock::ClockRecord;
use crate::vmm::workload::{Pattern, VCPUS_MAX, Workload};
use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 8] = b"PCPROC\0\0";
const VERSION: u16 = 2;
/// ELF's `EM_X86_64`.
const MACHINE: u16 = 62;
const HEADER_BYTES: usize = 20;
/// The largest payload; four vCPUs need less than 1 KiB.
const PAYLOAD_BYTES_MAX: usize = 16 << 10;

/// Why bytes are not the state of this process guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Fewer bytes than the envelope tells of.
    #[error("the state is truncated: {actual} of {expected} bytes")]
    Truncated {
        /// Bytes needed.
        expected: usize,
        /// Bytes there.
        actual: usize,
    },
    /// Bytes follow the end of the state.
    #[error("{0} bytes follow the state")]
    Trailing(usize),
    /// Something else altogether.
    #[error("the bytes are not the state of a process guest")]
    Magic,
    /// Written by a newer version, or by none.
    #[error("the state has version {0}; version {VERSION} is understood")]
    Version(u16),
    /// Of another processor architecture.
    #[error("the state is of architecture {0} (ELF number); this one is {MACHINE}")]
    Architecture(u16),
    /// More than any guest of this kind has.
    #[error("the state claims {0} bytes, more than {PAYLOAD_BYTES_MAX}")]
    TooLarge(usize),
    /// Damaged.
    #[error("the state's checksum is {actual:#010x}, not {expected:#010x}")]
    Checksum {
        /// As the envelope has it.
        expected: u32,
        /// As the bytes have it.
        actual: u32,
    },
    /// The checksum is right and the content still makes no sense.
    #[error("the state's payload cannot be read: {0}")]
    Payload(String),
    /// Another number of vCPUs.
    #[error("the state has {found} vCPUs; this guest has {expected}")]
    Vcpus {
        /// This guest's.
        expected: u32,
        /// The state's.
        found: usize,
    },
    /// A guest that was set up otherwise.
    #[error("the state's {field} is {found}; this guest has {expected}")]
    Workload {
        /// What differs.
        field: &'static str,
        /// This guest's.
        expected: String,
        /// The state's.
        found: String,
    },
    /// Registers that no vCPU can have.
    #[error("the registers of vCPU {0} are impossible")]
    Registers(usize),
}

/// All of a paused process guest but its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) pages: u64,
    pub(super) pattern: Pattern,
    pub(super) seed: u64,
    pub(super) zero_pages: u64,
    pub(super) clock: ClockRecord,
    pub(super) vcpus: Vec<Registers>,
}

impl State {
    pub(super) fn seal(&self) -> Result<Vec<u8>, StateError> {
        let payload =
            postcard::to_stdvec(self).map_err(|error| StateError::Payload(error.to_string()))?;
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(StateError::TooLarge(payload.len()));
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&MACHINE.to_le_bytes());
        bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        let checksum = checksum(&bytes, &payload);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes.extend_from_slice(&payload);
        Ok(bytes)
    }

    /// Reads the state of a guest with `workload` on `pages` pages.
    pub(super) fn open(bytes: &[u8], workload: &Workload, pages: u64) -> Result<Self, StateError> {
        let state = Self::parse(payload(bytes)?)?;
        state.fits(workload, pages)?;
        Ok(state)
    }

    fn parse(payload: &[u8]) -> Result<Self, StateError> {
        let (state, rest) = postcard::take_from_bytes::<Self>(payload)
            .map_err(|error| StateError::Payload(error.to_string()))?;
        if !rest.is_empty() {
            return Err(StateError::Payload(format!("{} bytes are left over", rest.len())));
        }
        Ok(state)
    }

    fn fits(&self, workload: &Workload, pages: u64) -> Result<(), StateError> {
        let found = self.vcpus.len();
        if found != workload.vcpus as usize || found > VCPUS_MAX as usize {
            return Err(StateError::Vcpus { expected: workload.vcpus, found });
        }
        same("number of pages", pages, self.pages)?;
        same("number of zero pages", workload.zero_pages, self.zero_pages)?;
        same("seed", workload.seed, self.seed)?;
        same("pattern", format!("{:?}", workload.pattern), format!("{:?}", self.pattern))
    }
}

fn same<T: PartialEq + ToString>(field: &'static str, here: T, there: T) -> Result<(), StateError> {
    if here == there {
        return Ok(());
    }
    Err(StateError::Workload { field, expected: here.to_string(), found: there.to_string() })
}

/// The payload of an undamaged envelope.
fn payload(bytes: &[u8]) -> Result<&[u8], StateError> {
    let truncated = |expected| StateError::Truncated { expected, actual: bytes.len() };
    let (header, payload) =
        bytes.split_first_chunk::<HEADER_BYTES>().ok_or(truncated(HEADER_BYTES))?;
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
    if &header[..8] != MAGIC {
        return Err(StateError::Magic);
    }
    if half(8) != VERSION {
        return Err(StateError::Version(half(8)));
    }
    if half(10) != MACHINE {
        return Err(StateError::Architecture(half(10)));
    }
    let length = word(12) as usize;
    if length > PAYLOAD_BYTES_MAX {
        return Err(StateError::TooLarge(length));
    }
    if payload.len() < length {
        return Err(truncated(HEADER_BYTES + length));
    }
    if payload.len() > length {
        return Err(StateError::Trailing(payload.len() - length));
    }
    let (expected, actual) = (word(16), checksum(&header[..16], payload));
    if expected != actual {
        return Err(StateError::Checksum { expected, actual });
    }
    Ok(payload)
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(payload);
    hasher.finalize()
}

#[cfg(test)]
mod tests;
