//! [`SessionRecord`]: what a fault server that is started again must know of the session
//! that it is to go on with; and [`RecordFile`], the memory in which the record outlives the
//! process that wrote it.
//!
//! The file is a memfd that fault server and keeper share, never a file on a disk: the
//! record has the ticket in it. It has two slots, written in turn, each with a sequence
//! number and a checksum. A process killed while it writes one leaves the other.

use super::PushPlan;
use crate::attach::handover::RegionFile;
use crate::attach::message::GuestInfo;
use crate::engine::source::Journal;
use crate::failpoint::failpoint;
use crate::proto::layout::MemoryLayout;
use crate::proto::message::SessionId;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// First bytes of a slot, the format's version included.
const MAGIC: [u8; 8] = *b"pc-rec03";
/// Of them, those that are the same in all versions.
const MAGIC_ANY: &[u8] = b"pc-rec";
/// Magic, sequence number, length, checksum.
const HEADER_BYTES: usize = 24;
/// Room for a record and its header: the longest texts that a VMM may give fit in.
const SLOT_BYTES: usize = 256 << 10;
const SLOTS: u64 = 2;

/// A session, as far as another process must know it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    /// Its name.
    pub session: SessionId,
    /// The last link epoch in which it tried to connect.
    pub last_epoch: u32,
    /// The guest was told to pause, so the machine state may have left: without a word from
    /// here the destination waits.
    pub state_left: bool,
    /// When the guest's first instruction at the destination was heard of: a reading of the
    /// host's [`monotonic_ns`](crate::attach::monotonic_ns).
    pub runs_since_ns: Option<u64>,
    /// The destination has said that it has every page: whatever comes now, the guest is
    /// not lost.
    pub drained: bool,
    /// The ticket's line, with the address where the destination was looked for last.
    pub ticket: String,
    /// Where the guest's memory lies.
    pub layout: MemoryLayout,
    /// In which of the memory's files each region lies.
    pub memory: Vec<RegionFile>,
    /// The machine configuration.
    pub machine: String,
    /// What the guest is.
    pub guest: GuestInfo,
    /// How its pages are pushed.
    pub plan: PushPlan,
    /// Where a report was promised: an absolute path.
    pub report: Option<OsString>,
}

impl std::fmt::Debug for SessionRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionRecord")
            .field("session", &self.session)
            .field("last_epoch", &self.last_epoch)
            .field("state_left", &self.state_left)
            .finish_non_exhaustive()
    }
}

/// Why there is no record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The kernel's reason.
    #[error("cannot {action} the session record")]
    System {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// More than fits in.
    #[error("the session record would have {0} bytes, more than {SLOT_BYTES}")]
    TooLong(usize),
    /// A record that cannot be encoded.
    #[error("the session record cannot be encoded")]
    Encode(#[source] postcard::Error),
    /// It was written by another version of this crate.
    #[error(
        "the session record is of version {theirs}, and this is version {ours}: go on with \
             the version that began"
    )]
    Version {
        /// Its version.
        theirs: String,
        /// This one.
        ours: String,
    },
    /// No slot holds a whole record.
    #[error("the session record is damaged")]
    Damaged,
}

/// A record in memory that its readers share.
#[derive(Debug)]
pub struct RecordFile {
    file: File,
    sequence: u64,
    record: SessionRecord,
}

impl RecordFile {
    /// Writes `record` into a new file.
    pub fn create(record: SessionRecord) -> Result<Self, RecordError> {
        let failed = |source: nix::Error| system("make")(source.into());
        let memfd = memfd_create(c"session-record", MFdFlags::MFD_CLOEXEC).map_err(failed)?;
        let file = File::from(memfd);
        file.set_len(SLOTS * SLOT_BYTES as u64).map_err(system("make"))?;
        let mut made = Self { file, sequence: 0, record };
        made.write()?;
        Ok(made)
    }

    /// Reads what another process has written. It may have died while it did.
    pub fn open(memfd: OwnedFd) -> Result<Self, RecordError> {
        let file = File::from(memfd);
        let (sequence, record) = read(&file)?;
        Ok(Self { file, sequence, record })
    }

    /// What another process has written since.
    pub fn newest(&self) -> Result<SessionRecord, RecordError> {
        Ok(read(&self.file)?.1)
    }

    /// The record as it was read, or written last.
    pub fn record(&self) -> &SessionRecord {
        &self.record
    }

    /// The memfd, to be handed to another process.
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The same file, for another reader or the next writer.
    pub fn share(&self) -> Result<Self, RecordError> {
        let file = self.file.try_clone().map_err(system("share"))?;
        Ok(Self { file, sequence: self.sequence, record: self.record.clone() })
    }

    /// Changes the record. The one before stays whole until the new one is.
    pub fn change(&mut self, change: impl FnOnce(&mut SessionRecord)) -> Result<(), RecordError> {
        change(&mut self.record);
        self.write()
    }

    fn write(&mut self) -> Result<(), RecordError> {
        let sequence = self.sequence + 1;
        let slot = encode(sequence, &self.record)?;
        let at = (sequence % SLOTS) * SLOT_BYTES as u64;
        self.file.write_all_at(&slot, at).map_err(system("write"))?;
        self.sequence = sequence;
        Ok(())
    }
}

impl Journal for RecordFile {
    fn dials(&mut self, epoch: u32) -> io::Result<()> {
        failpoint!("source::before_epoch_kept", return Err(io::ErrorKind::StorageFull.into()));
        self.change(|record| record.last_epoch = epoch).map_err(io::Error::other)?;
        failpoint!("source::after_epoch_kept");
        Ok(())
    }

    fn redirected(&mut self, ticket: &str) -> io::Result<()> {
        self.change(|record| record.ticket = ticket.to_owned()).map_err(io::Error::other)
    }

    fn guest_pauses(&mut self) -> io::Result<()> {
        failpoint!("source::before_pause_kept", return Err(io::ErrorKind::StorageFull.into()));
        self.change(|record| record.state_left = true).map_err(io::Error::other)?;
        failpoint!("source::after_pause_kept");
        Ok(())
    }

    fn guest_runs(&mut self) -> io::Result<()> {
        let now = crate::attach::monotonic_ns();
        self.change(|record| record.runs_since_ns = Some(now)).map_err(io::Error::other)
    }

    fn drained(&mut self) -> io::Result<()> {
        self.change(|record| record.drained = true).map_err(io::Error::other)
    }
}

/// The newest record in `file`, and its number.
fn read(file: &File) -> Result<(u64, SessionRecord), RecordError> {
    let read = (0..SLOTS).filter_map(|slot| read_slot(file, slot).transpose());
    let slots: Vec<_> = read.collect::<Result<_, _>>().map_err(system("read"))?;
    let newest = slots.into_iter().max_by_key(|(sequence, _)| *sequence);
    newest.ok_or_else(|| foreign_version(file).unwrap_or(RecordError::Damaged))
}

/// What is wrong with a file in which no slot is of this version, if one is of another.
fn foreign_version(file: &File) -> Option<RecordError> {
    let version = |slot: u64| {
        let mut magic = [0; MAGIC.len()];
        file.read_exact_at(&mut magic, slot * SLOT_BYTES as u64).ok()?;
        let theirs =
            magic.strip_prefix(MAGIC_ANY).filter(|theirs| magic != MAGIC && theirs.is_ascii())?;
        Some(String::from_utf8_lossy(theirs).into_owned())
    };
    let theirs = (0..SLOTS).find_map(version)?;
    let ours = String::from_utf8_lossy(&MAGIC[MAGIC_ANY.len()..]).into_owned();
    Some(RecordError::Version { theirs, ours })
}

fn encode(sequence: u64, record: &SessionRecord) -> Result<Vec<u8>, RecordError> {
    let mut slot = Vec::with_capacity(4096);
    slot.extend(MAGIC);
    slot.extend(sequence.to_le_bytes());
    slot.extend([0; 8]);
    let mut slot = postcard::to_extend(record, slot).map_err(RecordError::Encode)?;
    if slot.len() > SLOT_BYTES {
        return Err(RecordError::TooLong(slot.len()));
    }
    let length = (slot.len() - HEADER_BYTES) as u32;
    slot[16..20].copy_from_slice(&length.to_le_bytes());
    let checksum = checksum(&slot);
    slot[20..24].copy_from_slice(&checksum.to_le_bytes());
    Ok(slot)
}

/// Of a whole slot but for the checksum itself.
fn checksum(slot: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&slot[..20]);
    hasher.update(&slot[HEADER_BYTES..]);
    hasher.finalize()
}

/// The record in a slot and its number; none if there is none, or only a part of one.
fn read_slot(file: &File, slot: u64) -> io::Result<Option<(u64, SessionRecord)>> {
    let at = slot * SLOT_BYTES as u64;
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, at)?;
    let number = |range: std::ops::Range<usize>| {
        header[range].iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
    };
    let (sequence, length) = (number(8..16), number(16..20) as usize);
    if header[..8] != MAGIC || length > SLOT_BYTES - HEADER_BYTES {
        return Ok(None);
    }
    let mut whole = header.to_vec();
    whole.resize(HEADER_BYTES + length, 0);
    file.read_exact_at(&mut whole[HEADER_BYTES..], at + HEADER_BYTES as u64)?;
    if u64::from(checksum(&whole)) != number(20..24) {
        return Ok(None);
    }
    Ok(match postcard::take_from_bytes(&whole[HEADER_BYTES..]) {
        Ok((record, [])) => Some((sequence, record)),
        _ => None,
    })
}

fn system(action: &'static str) -> impl Fn(io::Error) -> RecordError {
    move |source| RecordError::System { action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> SessionRecord {
        SessionRecord {
            session: SessionId([3; 16]),
            last_epoch: 0,
            state_left: false,
            ticket: "a ticket".into(),
            layout: MemoryLayout::flat(8).unwrap(),
            memory: vec![RegionFile { file: 0, offset: 0 }],
            machine: "m".repeat(300),
            guest: GuestInfo { kind: "none".into(), vcpus: 1, workload_json: "{}".into(), pid: 1 },
            plan: PushPlan::default(),
            runs_since_ns: None,
            drained: false,
            report: Some("/r\u{fc}ckblick.json".into()),
        }
    }

    fn reader(file: &RecordFile) -> Result<RecordFile, RecordError> {
        RecordFile::open(file.memfd().try_clone_to_owned().unwrap())
    }

    #[test]
    fn a_reader_sees_the_last_record_and_goes_on_from_it() {
        let mut file = RecordFile::create(record()).unwrap();
        assert_eq!(reader(&file).unwrap().record(), &record());
        for epoch in 1..=5 {
            file.dials(epoch).unwrap();
            assert_eq!(reader(&file).unwrap().record().last_epoch, epoch);
        }
        file.guest_pauses().unwrap();
        let mut successor = reader(&file).unwrap();
        drop(file);
        successor.dials(6).unwrap();
        let last = reader(&successor).unwrap();
        assert_eq!((last.record().last_epoch, last.record().state_left), (6, true));
    }

    /// A write that was cut off at any byte, over any older content of its slot, leaves the
    /// record before it or the new one, and never a mixture.
    #[test]
    fn a_write_that_is_cut_off_anywhere_leaves_a_whole_record() {
        let mut file = RecordFile::create(record()).unwrap();
        file.dials(1).unwrap();
        let mut newer = record();
        newer.last_epoch = 2;
        newer.machine = "n".repeat(200);
        let sequence = file.sequence + 1;
        let slot = encode(sequence, &newer).unwrap();
        let at = (sequence % SLOTS) * SLOT_BYTES as u64;
        for written in 0..slot.len() {
            file.file.write_all_at(&slot[..written], at).unwrap();
            assert_eq!(reader(&file).unwrap().record().last_epoch, 1, "after {written} bytes");
        }
        file.file.write_all_at(&slot, at).unwrap();
        assert_eq!(reader(&file).unwrap().record(), &newer);
        // And a bit that flips in it is not believed.
        for byte in [0, 9, 17, 21, 40, slot.len() - 1] {
            file.file.write_all_at(&[slot[byte] ^ 1], at + byte as u64).unwrap();
            assert_eq!(reader(&file).unwrap().record().last_epoch, 1, "byte {byte}");
            file.file.write_all_at(&slot, at).unwrap();
        }
    }

    #[test]
    fn a_record_of_another_version_is_refused_by_name() {
        let file = RecordFile::create(record()).unwrap();
        for slot in 0..SLOTS {
            file.file.write_all_at(b"pc-rec02", slot * SLOT_BYTES as u64).unwrap();
        }
        let error = reader(&file).unwrap_err();
        assert!(error.to_string().contains("of version 02, and this is version 03"), "{error}");
    }

    #[test]
    fn no_record_is_not_one() {
        let empty = memfd_create(c"x", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(matches!(RecordFile::open(empty), Err(RecordError::System { .. })));
        let zeros = memfd_create(c"x", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&zeros, (SLOTS * SLOT_BYTES as u64) as i64).unwrap();
        assert!(matches!(RecordFile::open(zeros), Err(RecordError::Damaged)));
        let long = SessionRecord { machine: "m".repeat(SLOT_BYTES), ..record() };
        assert!(matches!(RecordFile::create(long), Err(RecordError::TooLong(_))));
    }

    #[test]
    fn debug_output_keeps_the_ticket() {
        let file = RecordFile::create(record()).unwrap();
        assert!(!format!("{file:?}").contains("a ticket"));
    }
}
