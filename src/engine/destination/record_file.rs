//! [`Recorded`], and the file that it is kept in.
//!
//! All numbers are little endian.
//!
//! ```text
//! offset  bytes
//!      0      8  "pcrecord"
//!      8      4  version: 1
//!     12      4  CRC-32 of all that follows
//!     16      8  pages of the guest
//!     24      8  events in this file, at most 2^22
//!     32      8  events that there was no room for
//!     40      8  samples of the guest's steps in this file, at most 2^16
//!     48      8  when the first vCPU entered the guest, in ns; 2^64 - 1: never
//!     56      8  steps a second of the guest when all memory was there; 2^64 - 1: unknown
//!     64     16  each event, in order of time:
//!                  8  when, in ns since the recording began
//!                  4  page
//!                  2  pages from there on
//!                  1  what: 1 a fault was read; what was placed: 2 seeds, 3 pages in answer to
//!                     a fault, 4 pushed ones, 5 ones of the final drain, 6 zeros, 7 holes,
//!                     8 pages that the source could not read
//!                  1  the vCPU that raised the fault; 255: none, or not known
//!            16  each sample: 8 when, in ns since the recording began; 8 steps
//! ```

use super::recording::EVENTS_MAX;
use std::io::{Read, Write};
use std::path::Path;

const MAGIC: [u8; 8] = *b"pcrecord";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
const ENTRY_BYTES: usize = 16;
/// The most samples of steps.
const SAMPLES_MAX: u64 = 1 << 16;
/// What was not measured.
const ABSENT: u64 = u64::MAX;
const NO_VCPU: u8 = u8::MAX;

/// What an event was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EventKind {
    /// A fault was read.
    Fault = 1,
    /// Pages that came with the switchover were placed.
    Seed = 2,
    /// A page was placed because it was asked for.
    Demand = 3,
    /// Pushed pages were placed.
    Push = 4,
    /// Pages of the final drain were placed.
    Drain = 5,
    /// Zero pages were announced.
    Zero = 6,
    /// Holes were announced.
    Hole = 7,
    /// Pages were given up that the source could not read.
    Poison = 8,
}

impl EventKind {
    const ALL: [Self; 8] = [
        Self::Fault,
        Self::Seed,
        Self::Demand,
        Self::Push,
        Self::Drain,
        Self::Zero,
        Self::Hole,
        Self::Poison,
    ];
}

/// An event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedEvent {
    /// When, in nanoseconds since the recording began.
    pub at_ns: u64,
    /// The first page.
    pub page: u32,
    /// Pages from there on.
    pub count: u16,
    /// What it was.
    pub kind: EventKind,
    /// The vCPU that raised a fault, if one did.
    pub vcpu: Option<u8>,
}

impl RecordedEvent {
    /// All of it but the time; never 0.
    pub(super) fn packed(self) -> u64 {
        let vcpu = self.vcpu.unwrap_or(NO_VCPU);
        u64::from(self.page)
            | u64::from(self.count) << 32
            | u64::from(self.kind as u8) << 48
            | u64::from(vcpu) << 56
    }

    pub(super) fn unpacked(at_ns: u64, what: u64) -> Option<Self> {
        let [.., kind, vcpu] = what.to_le_bytes();
        let kind = EventKind::ALL.into_iter().find(|of| *of as u8 == kind)?;
        let vcpu = (vcpu != NO_VCPU).then_some(vcpu);
        Some(Self { at_ns, page: what as u32, count: (what >> 32) as u16, kind, vcpu })
    }
}

/// A finished recording.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Pages of the guest.
    pub pages: u64,
    /// Events that there was no room for.
    pub dropped: u64,
    /// When the first vCPU entered the guest, in nanoseconds since the recording began.
    pub entered_ns: Option<u64>,
    /// Steps a second of the guest when all memory was there.
    pub steady_per_second: Option<u64>,
    /// Events, in order of time.
    pub events: Vec<RecordedEvent>,
    /// Steps that the guest had made, by the time in nanoseconds since the recording began.
    pub steps: Vec<(u64, u64)>,
}

/// A file that is no recording.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read or written.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// It is not what it should be.
    #[error("not a recording: {0}")]
    Malformed(&'static str),
}

impl Recorded {
    /// As it is in the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Of more there could be no recording that is read again.
        let events = &self.events[..self.events.len().min(EVENTS_MAX as usize)];
        let steps = &self.steps[..self.steps.len().min(SAMPLES_MAX as usize)];
        let mut bytes = Vec::with_capacity(HEADER_BYTES + 16 * (events.len() + steps.len()));
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 4]);
        for number in [
            self.pages,
            events.len() as u64,
            self.dropped,
            steps.len() as u64,
            self.entered_ns.unwrap_or(ABSENT),
            self.steady_per_second.unwrap_or(ABSENT),
        ] {
            bytes.extend(number.to_le_bytes());
        }
        let events = events.iter().map(|event| (event.at_ns, event.packed()));
        for (first, second) in events.chain(steps.iter().copied()) {
            bytes.extend(first.to_le_bytes());
            bytes.extend(second.to_le_bytes());
        }
        let sum = crc32fast::hash(&bytes[16..]);
        bytes[12..16].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) made, with nothing before or behind it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let wrong = RecordError::Malformed;
        let (header, body) =
            bytes.split_at_checked(HEADER_BYTES).ok_or(wrong("it is too short"))?;
        if header[..8] != MAGIC {
            return Err(wrong("it does not begin as one"));
        }
        if header[8..12] != VERSION.to_le_bytes() {
            return Err(wrong("it is of another version"));
        }
        if header[12..16] != crc32fast::hash(&bytes[16..]).to_le_bytes() {
            return Err(wrong("its checksum is another"));
        }
        let numbers: Vec<u64> = numbers(&header[16..]).collect();
        let [pages, events, dropped, steps, entered, steady] = numbers[..] else {
            return Err(wrong("it is too short"));
        };
        if events > EVENTS_MAX || steps > SAMPLES_MAX {
            return Err(wrong("it has too many events"));
        }
        if body.len() as u64 != (events + steps) * ENTRY_BYTES as u64 {
            return Err(wrong("its length is another"));
        }
        let entries: Vec<u64> = self::numbers(body).collect();
        let (entries, _) = entries.as_chunks::<2>();
        let (events, steps) = entries.split_at(events as usize);
        let events: Option<Vec<_>> =
            events.iter().map(|[at, what]| RecordedEvent::unpacked(*at, *what)).collect();
        Ok(Self {
            pages,
            dropped,
            entered_ns: (entered != ABSENT).then_some(entered),
            steady_per_second: (steady != ABSENT).then_some(steady),
            events: events.ok_or(wrong("it has an event of an unknown kind"))?,
            steps: steps.iter().map(|[at, steps]| (*at, *steps)).collect(),
        })
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) -> Result<(), RecordError> {
        Ok(std::fs::File::create(path)?.write_all(&self.to_bytes())?)
    }

    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self, RecordError> {
        let most = HEADER_BYTES as u64 + ENTRY_BYTES as u64 * (EVENTS_MAX + SAMPLES_MAX);
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
        Self::from_bytes(&bytes)
    }
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<8>().0.iter().map(|number| u64::from_le_bytes(*number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded() -> Recorded {
        let event = |at_ns, page, kind, vcpu| RecordedEvent { at_ns, page, count: 3, kind, vcpu };
        let kinds = EventKind::ALL.into_iter().zip(1..);
        Recorded {
            pages: 2048,
            dropped: 5,
            entered_ns: Some(17),
            steady_per_second: None,
            events: kinds.map(|(kind, n)| event(n, 7, kind, (n % 2 == 0).then_some(3))).collect(),
            steps: vec![(20, 1), (40, 500)],
        }
    }

    #[test]
    fn a_recording_survives_its_file() {
        let (folder, recorded) = (tempfile::tempdir().unwrap(), recorded());
        let path = folder.path().join("record");
        recorded.write(&path).unwrap();
        assert_eq!(Recorded::read(&path).unwrap(), recorded);
        let none = Recorded::default();
        assert_eq!(Recorded::from_bytes(&none.to_bytes()).unwrap(), none);
    }

    #[test]
    fn the_file_is_as_its_description_says() {
        let bytes = recorded().to_bytes();
        assert_eq!(bytes.len(), 64 + 8 * 16 + 2 * 16);
        assert_eq!(bytes[..12], *b"pcrecord\x01\0\0\0");
        assert_eq!(bytes[16..24], 2048u64.to_le_bytes());
        assert_eq!(bytes[24..32], 8u64.to_le_bytes());
        assert_eq!(bytes[56..64], [0xff; 8]);
        // The first event, a fault of no vCPU.
        assert_eq!(bytes[64..80], [1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 3, 0, 1, 255]);
    }

    #[test]
    fn what_is_no_recording_is_refused() {
        let good = recorded().to_bytes();
        for length in [0, 8, 63, 64, good.len() - 1] {
            assert!(Recorded::from_bytes(&good[..length]).is_err(), "{length} bytes");
        }
        assert!(Recorded::from_bytes(&[&good[..], &[0]].concat()).is_err());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x20;
            assert!(Recorded::from_bytes(&bad).is_err(), "byte {at} is another");
        }
        // Counts that promise more than there can be, with a checksum that is right.
        for (at, value) in [(24, u64::MAX), (40, u64::MAX), (24, EVENTS_MAX)] {
            let mut bad = good.clone();
            bad[at..at + 8].copy_from_slice(&value.to_le_bytes());
            let sum = crc32fast::hash(&bad[16..]);
            bad[12..16].copy_from_slice(&sum.to_le_bytes());
            assert!(Recorded::from_bytes(&bad).is_err(), "{value} at {at}");
        }
    }
}
