//! The messages of the attach protocol and their bounded encoding.
//!
//! A message on the wire is a `u32` length, little-endian, and that many bytes of
//! postcard: the variant's number, then its fields. [`Request`] goes to the VMM,
//! [`Reply`] comes back, one for each. Variants and fields are only ever appended
//! and never renumbered within a version; `Hello` and `Refused` are the same in
//! all versions, so that a mismatch can be named. Nothing here touches a socket.

use super::handover::{HandoverError, RegionFile, check_region_files};
use crate::proto::layout::MemoryLayout;
use crate::proto::page::PageIndex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The version of the protocol that this crate speaks.
pub const VERSION: u16 = 4;
/// First bytes of every conversation.
pub const MAGIC: [u8; 8] = *b"pc-attch";
/// The most bytes of a [`Reply`], its length prefix apart.
pub const REPLY_BYTES_MAX: usize = 17 << 20;
/// The most bytes of a [`Request`], its length prefix apart.
pub const REQUEST_BYTES_MAX: usize = 4096;
/// The most bytes of captured machine state.
pub const STATE_BYTES_MAX: usize = 16 << 20;
/// The most seed pages.
pub const SEEDS_MAX: usize = 4096;
/// The most bytes of a text that describes (machine, workload).
pub const TEXT_BYTES_MAX: usize = 64 << 10;
/// The most bytes of a text that gives a reason; a longer one is cut.
pub const REASON_BYTES_MAX: usize = 1024;
/// The most capabilities that a VMM names.
pub const CAPABILITIES_MAX: usize = 16;
/// The most bytes of a capability's name.
pub const CAPABILITY_BYTES_MAX: usize = 64;
/// The VMM can tell which pages were written: `StartDirtyLog`, `DirtyRound`,
/// `StopDirtyLog`.
pub const CAPABILITY_DIRTY_LOG: &str = "dirty-log";
/// It has the record of the session that the memory belongs to: `Record`.
pub const CAPABILITY_SESSION_RECORD: &str = "session-record";
/// The VMM holds a record for its fault-server: `KeepRecord`.
pub const CAPABILITY_KEEP_RECORD: &str = "keep-record";

/// What the attached process asks of the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The first message, and only the first.
    Hello {
        /// [`MAGIC`].
        magic: [u8; 8],
        /// [`VERSION`].
        version: u16,
    },
    /// Stop the vCPUs and capture the machine's state. Asked again, it is answered
    /// with the same capture.
    Pause,
    /// The migration is off: let the guest go on as it was before `Pause`.
    Resume,
    /// The commit word says committed: let go of the guest, whose memory lives on in
    /// whoever maps it. To a keeper: nobody needs the memory any more.
    Committed,
    /// Have the guest clear its instruments.
    ResetInstruments,
    /// How is the guest? Also a sign of life while the guest is paused.
    Status,
    /// End the guest and exit.
    Stop {
        /// Why, for the VMM's log.
        why: String,
    },
    /// From here on, remember which pages are written.
    StartDirtyLog,
    /// Put the pages that were written since the last round into the bitmap.
    DirtyRound,
    /// Remember no more.
    StopDirtyLog,
    /// The record of the session that the memory belongs to. Whoever asks a keeper for it
    /// goes on with the session: another one is to follow if it dies.
    Record,
    /// To a keeper: this fault-server ends, and on purpose. Nobody is to follow it by
    /// itself; the memory stays until an operator decides.
    Leave,
    /// To a VMM: hold this record, which comes with it as a memfd, for a fault-server that
    /// comes later, as long as the guest's memory is held for one.
    KeepRecord,
}

/// What the VMM answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To `Hello`, or before it: no conversation. The connection ends.
    Refused {
        /// The version that the VMM speaks.
        version: u16,
        /// Why.
        why: String,
    },
    /// To `Hello`; comes with memfds: those of guest memory, then the commit word.
    Welcome(Box<Welcome>),
    /// To `Pause`.
    Paused(Box<Paused>),
    /// To anything: not done, and nothing has changed.
    Failed {
        /// Why.
        why: String,
    },
    /// To `Resume`: the guest is as it was before `Pause`. The connection ends.
    Resumed,
    /// To `Committed`: the VMM has let go and may exit. The connection ends.
    Released,
    /// To `ResetInstruments`.
    InstrumentsReset,
    /// To `Status`.
    Status(Status),
    /// To `Stop`: the guest ends. The connection ends.
    Stopping,
    /// To `StartDirtyLog`; comes with one memfd: the bitmap, see
    /// [`DirtyBitmap`](crate::memory::dirty_bitmap::DirtyBitmap).
    DirtyLogStarted {
        /// Each write after this moment is in a round:
        /// [`monotonic_ns`](super::monotonic_ns).
        started_at_ns: u64,
    },
    /// To `DirtyRound`: the bitmap has them.
    DirtyRound(DirtyRound),
    /// To `StopDirtyLog`.
    DirtyLogStopped,
    /// To `Record`; comes with the memfd that holds it.
    Record,
    /// To `Leave`. The connection ends.
    Left,
    /// To `KeepRecord`.
    RecordKept,
}

/// The guest that the VMM has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// [`VERSION`].
    pub version: u16,
    /// Where its memory lies for the guest.
    pub layout: MemoryLayout,
    /// In which of the memfds that come with it each region lies.
    pub memory: Vec<RegionFile>,
    /// The machine configuration that the destination must have, as stable text.
    pub machine: String,
    /// What it is.
    pub guest: GuestInfo,
    /// What the VMM can do beyond what each must, by name. Unknown names are ignored.
    pub capabilities: Vec<String>,
}

/// What a guest is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// "kvm", "process".
    pub kind: String,
    /// How many vCPUs.
    pub vcpus: u32,
    /// What it was told to do, as JSON.
    pub workload_json: String,
    /// The VMM's process.
    pub pid: u32,
}

/// A paused guest, captured.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paused {
    /// The complete machine state, memory apart, in its envelope.
    #[serde(with = "byte_string")]
    pub state: Vec<u8>,
    /// Pages that the vCPUs need first.
    pub seeds: Vec<PageIndex>,
    /// When the last vCPU had stopped: [`monotonic_ns`](super::monotonic_ns).
    pub paused_at_ns: u64,
    /// From when on nothing writes to the guest's memory until it is resumed. After
    /// `paused_at_ns`: device threads stop later, and capturing may write (an interrupt
    /// controller that keeps its tables in guest memory).
    pub frozen_at_ns: u64,
    /// From the request until the last vCPU had stopped.
    pub pause_us: u64,
    /// From then until the state was captured.
    pub capture_us: u64,
    /// Steps that the guest had made when it stopped, over all vCPUs.
    pub steps: u64,
    /// Whether its user had it paused before. `Resume` then leaves it so, and it arrives paused.
    pub was_paused: bool,
}

/// How the guest is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether its vCPUs run.
    pub running: bool,
    /// Steps made, over all vCPUs.
    pub steps: u64,
    /// What ended it, if something did.
    pub failure: Option<String>,
}

/// What a round found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyRound {
    /// Pages written since the last round, whether or not their bits were set already.
    pub pages: u64,
    /// Each write before this moment is in this round or an earlier one:
    /// [`monotonic_ns`](super::monotonic_ns).
    pub began_at_ns: u64,
    /// No write after this moment is in this round.
    pub ended_at_ns: u64,
}

/// Why a message cannot be sent or is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Longer than it may be.
    #[error("{what} of {bytes} bytes is longer than {max}")]
    TooLong {
        /// What: "message", "machine state", "machine text", ...
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// The most there may be.
        max: usize,
    },
    /// Bytes that encode no message.
    #[error("message cannot be decoded")]
    Decode(#[source] postcard::Error),
    /// Bytes after the message.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// Guest memory in places where it cannot be.
    #[error("the guest memory cannot lie where it is said to")]
    Memory(#[source] Box<HandoverError>),
    /// A message that could not be encoded.
    #[error("message cannot be encoded")]
    Encode(#[source] postcard::Error),
}

/// A message of one direction: its limits.
pub trait Message: Serialize + DeserializeOwned {
    /// The most bytes that its encoding has.
    const BYTES_MAX: usize;
    /// Refuses fields that are too long.
    fn check(&self) -> Result<(), MessageError>;
    /// Its name, for errors: a state of megabytes is not printed.
    fn name(&self) -> &'static str;

    /// The length and the bytes.
    fn encode(&self) -> Result<Vec<u8>, MessageError> {
        self.check()?;
        let bytes = postcard::to_extend(self, vec![0; 4]).map_err(MessageError::Encode)?;
        let len = bytes.len() - 4;
        limit("message", len, Self::BYTES_MAX)?;
        let mut bytes = bytes;
        bytes[..4].copy_from_slice(&(len as u32).to_le_bytes());
        Ok(bytes)
    }

    /// The message that `bytes`, without the length, encode.
    fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        limit("message", bytes.len(), Self::BYTES_MAX)?;
        let (message, rest) =
            postcard::take_from_bytes::<Self>(bytes).map_err(MessageError::Decode)?;
        if !rest.is_empty() {
            return Err(MessageError::Trailing(rest.len()));
        }
        message.check()?;
        Ok(message)
    }
}

impl Request {
    /// The greeting of this version.
    pub fn hello() -> Self {
        Request::Hello { magic: MAGIC, version: VERSION }
    }
}

impl Message for Request {
    const BYTES_MAX: usize = REQUEST_BYTES_MAX;

    fn check(&self) -> Result<(), MessageError> {
        match self {
            Request::Stop { why } => limit("reason", why.len(), REASON_BYTES_MAX),
            _ => Ok(()),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Request::Hello { .. } => "Hello",
            Request::Pause => "Pause",
            Request::Resume => "Resume",
            Request::Committed => "Committed",
            Request::ResetInstruments => "ResetInstruments",
            Request::Status => "Status",
            Request::Stop { .. } => "Stop",
            Request::StartDirtyLog => "StartDirtyLog",
            Request::DirtyRound => "DirtyRound",
            Request::StopDirtyLog => "StopDirtyLog",
            Request::Record => "Record",
            Request::Leave => "Leave",
            Request::KeepRecord => "KeepRecord",
        }
    }
}

impl Reply {
    /// A refusal; a long reason is cut.
    pub fn refused(why: impl Into<String>) -> Self {
        Reply::Refused { version: VERSION, why: reason(why) }
    }

    /// A failure; a long reason is cut.
    pub fn failed(why: impl Into<String>) -> Self {
        Reply::Failed { why: reason(why) }
    }
}

impl Message for Reply {
    const BYTES_MAX: usize = REPLY_BYTES_MAX;

    fn check(&self) -> Result<(), MessageError> {
        match self {
            Reply::Refused { why, .. } | Reply::Failed { why } => {
                limit("reason", why.len(), REASON_BYTES_MAX)
            }
            Reply::Welcome(welcome) => welcome.check(),
            Reply::Paused(paused) => paused.check(),
            Reply::Status(status) => {
                let failure = status.failure.as_deref().unwrap_or_default();
                limit("failure text", failure.len(), REASON_BYTES_MAX)
            }
            _ => Ok(()),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Reply::Refused { .. } => "Refused",
            Reply::Welcome(_) => "Welcome",
            Reply::Paused(_) => "Paused",
            Reply::Failed { .. } => "Failed",
            Reply::Resumed => "Resumed",
            Reply::Released => "Released",
            Reply::InstrumentsReset => "InstrumentsReset",
            Reply::Status(_) => "Status",
            Reply::Stopping => "Stopping",
            Reply::DirtyLogStarted { .. } => "DirtyLogStarted",
            Reply::DirtyRound(_) => "DirtyRound",
            Reply::DirtyLogStopped => "DirtyLogStopped",
            Reply::Record => "Record",
            Reply::Left => "Left",
            Reply::RecordKept => "RecordKept",
        }
    }
}

impl Welcome {
    fn check(&self) -> Result<(), MessageError> {
        check_region_files(&self.layout, &self.memory)
            .map_err(|error| MessageError::Memory(error.into()))?;
        limit("machine text", self.machine.len(), TEXT_BYTES_MAX)?;
        limit("guest kind", self.guest.kind.len(), REASON_BYTES_MAX)?;
        limit("workload text", self.guest.workload_json.len(), TEXT_BYTES_MAX)?;
        limit("list of capabilities", self.capabilities.len(), CAPABILITIES_MAX)?;
        let mut names = self.capabilities.iter();
        names.try_for_each(|name| limit("capability", name.len(), CAPABILITY_BYTES_MAX))
    }
}

impl Paused {
    /// Refuses a state or a list of seeds that is too long to be sent.
    pub fn check(&self) -> Result<(), MessageError> {
        limit("machine state", self.state.len(), STATE_BYTES_MAX)?;
        limit("list of seed pages", self.seeds.len(), SEEDS_MAX)
    }
}

impl std::fmt::Debug for Paused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Paused")
            .field("state_bytes", &self.state.len())
            .field("seeds", &self.seeds.len())
            .field("steps", &self.steps)
            .finish_non_exhaustive()
    }
}

/// A reason of at most [`REASON_BYTES_MAX`] bytes.
pub(super) fn reason(why: impl Into<String>) -> String {
    let mut why = why.into();
    why.truncate(why.floor_char_boundary(REASON_BYTES_MAX));
    why
}

fn limit(what: &'static str, bytes: usize, max: usize) -> Result<(), MessageError> {
    if bytes > max { Err(MessageError::TooLong { what, bytes, max }) } else { Ok(()) }
}

/// Bytes as one string of bytes: the same encoding as a sequence of `u8`, without
/// a call for each of up to 16 million.
mod byte_string {
    use serde::de::{Deserializer, Error, Visitor};
    use serde::ser::Serializer;

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}
