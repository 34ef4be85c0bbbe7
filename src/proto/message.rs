//! Control messages: what the two session machines say to each other.
//!
//! On the wire a message is its length (`u32`, little-endian) and its postcard
//! encoding. The first one, [`Hello`], begins with a magic number and the protocol
//! version, so that a peer of another version can be told which one we speak.

use super::layout::MemoryLayout;
use super::page::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The version of the wire protocol. A peer of another version is refused.
pub const PROTOCOL_VERSION: u16 = 2;
/// First bytes of a [`Hello`].
pub const MAGIC: [u8; 4] = *b"PCPY";
/// The most bytes of a guest's machine state.
pub const STATE_MAX: usize = 16 << 20;
/// The most bytes of a message: a machine state and its envelope.
pub const MESSAGE_MAX: usize = STATE_MAX + (64 << 10);
/// The most bytes of any text in a message.
pub const TEXT_MAX: usize = 4096;
/// The most bytes of the VMM's own description of the guest.
pub const GUEST_INFO_MAX: usize = 32 << 10;

/// The feature bit of a source that sends pages before the machine state, too.
pub const FEATURE_COPY: u64 = 1;
/// The feature bit of a source that may send pages compressed.
pub const FEATURE_COMPRESSION: u64 = 2;
/// All feature bits that a destination of this version takes.
pub const FEATURES: u64 = FEATURE_COPY | FEATURE_COMPRESSION;

/// Names one migration; drawn at random by the source.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What the source proposes before anything is paused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// [`PROTOCOL_VERSION`] of the sender.
    pub version: u16,
    /// The migration's name.
    pub session: SessionId,
    /// Bytes in a page.
    pub page_size: u32,
    /// Feature bits that the sender insists on: some of [`FEATURES`].
    pub features: u64,
    /// The guest's memory.
    pub layout: MemoryLayout,
    /// The machine configuration as text that must be equal on both sides.
    pub machine: String,
    /// The VMM's own description of the guest, opaque to the engine.
    pub guest: Vec<u8>,
    /// vCPUs: how many demand streams there will be, one each and one for faults
    /// that no vCPU raised.
    pub vcpus: u16,
    /// Push connections that the source will open.
    pub push_lanes: u16,
}

impl Hello {
    /// A proposal of this version.
    pub fn new(session: SessionId, layout: MemoryLayout, machine: String) -> Self {
        Self {
            magic: MAGIC,
            version: PROTOCOL_VERSION,
            session,
            page_size: PAGE_SIZE as u32,
            features: 0,
            layout,
            machine,
            guest: Vec::new(),
            vcpus: 1,
            push_lanes: 1,
        }
    }

    /// Whether its pages may come compressed.
    pub fn compressed(&self) -> bool {
        self.features & FEATURE_COMPRESSION != 0
    }
}

/// Why a proposal was not taken: the field, and what each side has there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("the two sides differ in {field}: source {source_value}, destination {destination_value}")]
pub struct Mismatch {
    /// What differs.
    pub field: String,
    /// The source's value.
    pub source_value: String,
    /// The destination's value.
    pub destination_value: String,
}

impl Mismatch {
    /// A mismatch of `field`, its texts made printable and cut to [`TEXT_MAX`].
    pub fn new(field: &str, source: impl fmt::Display, destination: impl fmt::Display) -> Self {
        Self {
            field: field.into(),
            source_value: cut(printable(source.to_string())),
            destination_value: cut(printable(destination.to_string())),
        }
    }
}

/// Shortens a text to [`TEXT_MAX`] bytes at a character's boundary.
pub fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(TEXT_MAX));
    text
}

/// A peer's text as it may go to a terminal or a log: characters that print nothing but
/// move, reorder or hide what stands around them become `?`.
pub fn printable(text: String) -> String {
    let hides = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
            || matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    if text.contains(hides) { text.replace(hides, "?") } else { text }
}

/// The record that a commit leaves: from then on the guest belongs to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitRecord {
    /// Which migration.
    pub session: SessionId,
    /// The link epoch it was made in.
    pub epoch: u32,
}

/// Source to destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDestination {
    /// The proposal; first message of link epoch 0.
    Hello(Hello),
    /// The machine state, sent in the blackout.
    State {
        /// Whether the guest was paused by its user: it stays so where it arrives.
        was_paused: bool,
        /// The VMM's own encoding of it.
        state: Vec<u8>,
    },
    /// The guest is the destination's; sent after the commit word was written.
    Commit(CommitRecord),
    /// First message of a later link epoch, after a lost link.
    Reattach {
        /// Which migration.
        session: SessionId,
        /// The new epoch.
        epoch: u32,
        /// Set once the commit was made.
        committed: Option<CommitRecord>,
    },
    /// The source saw `Drained` and lets go.
    Released,
    /// The migration is off; the guest stays at the source.
    Abort {
        /// Why.
        reason: String,
    },
    /// Asks for a `Pong`, to time the urgent lane.
    Ping(u64),
    /// Before the machine state: so many pages were sent so far, to be told of when all
    /// are here.
    Copied {
        /// Pages, those counted again that were sent again.
        pages: u64,
    },
    /// Before the machine state: some parts of the set of pages that are at the destination as
    /// they are here, see [`placed`](super::placed). All others are missing.
    Valid {
        /// The encoded parts.
        part: Vec<u8>,
        /// Whether it is the last one.
        last: bool,
    },
}

/// Destination to source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSource {
    /// The proposal is taken: memory, VM and vCPUs exist and faults are served.
    Accept {
        /// The protocol version, for the record.
        version: u16,
    },
    /// The proposal is not taken.
    Refuse(Mismatch),
    /// The state is restored; only the commit is missing.
    Ready,
    /// The vCPUs run. The figures are the destination's part of the downtime.
    Running {
        /// From the state's arrival until it was restored, in microseconds.
        restore_us: u64,
        /// From the commit's arrival until the first vCPU entered the guest.
        resume_us: u64,
        /// From the state's arrival until the first vCPU entered the guest.
        held_us: u64,
    },
    /// Answer to `Reattach`: some parts of the set of placed pages, see
    /// [`placed`](super::placed).
    Placed {
        /// The encoded parts.
        part: Vec<u8>,
        /// Whether it is the last one.
        last: bool,
    },
    /// How far it is; said with each `Pong`.
    Progress {
        /// Pages that are settled.
        settled: u64,
        /// Network faults so far.
        network_faults: u64,
        /// Bytes of page content, compressed as it came, that the push lanes have delivered:
        /// what the source's pacer measures the link by.
        pushed_bytes: u64,
    },
    /// The guest's workload came to its end (for policies that wait for it).
    WorkloadEnded,
    /// The ledger is full: no page is missing.
    Drained {
        /// Pages placed or known to be zero.
        settled: u64,
    },
    /// The destination's part of the report, as JSON; the last message.
    Report(Vec<u8>),
    /// The migration is off; the guest stays at the source.
    Abort {
        /// Why.
        reason: String,
    },
    /// Answer to `Ping`.
    Pong(u64),
    /// The guest cannot go on at the destination, and may not anywhere else: said from
    /// `Ready` on; the last message.
    Lost {
        /// Why.
        reason: String,
    },
    /// Answer to `Copied`.
    Landed {
        /// Its number.
        pages: u64,
    },
}

/// A message that no honest peer of this version sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Longer than [`MESSAGE_MAX`].
    #[error("a control message says it has {0} bytes; at most {MESSAGE_MAX} are allowed")]
    TooLong(u64),
    /// Not decodable.
    #[error("a control message is malformed")]
    Malformed,
    /// The first message is not ours at all.
    #[error("the peer does not speak this protocol")]
    NotOurs,
    /// A text or list in it is longer than allowed.
    #[error("{0} in a control message is too long")]
    FieldTooLong(&'static str),
}

/// Encodes a message with its length before it.
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    let body = vec![0; 4];
    // Serialising plain data into a growing vector has no way to fail.
    let mut bytes = postcard::to_extend(message, body).expect("messages are plain data");
    let length = (bytes.len() - 4) as u32;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// The length of the message's body, checked.
pub fn body_len(prefix: [u8; 4]) -> Result<usize, MessageError> {
    let length = u32::from_le_bytes(prefix) as usize;
    if length > MESSAGE_MAX { Err(MessageError::TooLong(length as u64)) } else { Ok(length) }
}

impl ToDestination {
    /// Decodes a message's body.
    pub fn decode(body: &[u8]) -> Result<Self, MessageError> {
        let message = exactly(body)?;
        match &message {
            Self::Hello(hello) if hello.machine.len() > TEXT_MAX => {
                Err(MessageError::FieldTooLong("the machine configuration"))
            }
            Self::Hello(hello) if hello.guest.len() > GUEST_INFO_MAX => {
                Err(MessageError::FieldTooLong("the guest's description"))
            }
            Self::State { state, .. } if state.len() > STATE_MAX => {
                Err(MessageError::FieldTooLong("the machine state"))
            }
            Self::Abort { reason } if reason.len() > TEXT_MAX => {
                Err(MessageError::FieldTooLong("a reason"))
            }
            Self::Abort { reason } => Ok(Self::Abort { reason: printable(reason.clone()) }),
            _ => Ok(message),
        }
    }

    /// Decodes the first body of a connection: one of another protocol version is
    /// reported as a [`Mismatch`], whatever else it holds.
    pub fn decode_first(body: &[u8]) -> Result<Result<Self, Mismatch>, MessageError> {
        // A Hello is variant 0, then the magic, then the version as a varint.
        if body.first() == Some(&0) {
            let (magic, version): ([u8; 4], u16) = postcard::take_from_bytes(&body[1..])
                .map(|(head, _)| head)
                .map_err(|_| MessageError::NotOurs)?;
            if magic != MAGIC {
                return Err(MessageError::NotOurs);
            }
            if version != PROTOCOL_VERSION {
                let field = "the protocol version";
                return Ok(Err(Mismatch::new(field, version, PROTOCOL_VERSION)));
            }
        }
        Self::decode(body).map(Ok)
    }
}

impl ToSource {
    /// Decodes a message's body.
    pub fn decode(body: &[u8]) -> Result<Self, MessageError> {
        let message = exactly(body)?;
        match &message {
            Self::Abort { reason } | Self::Lost { reason } if reason.len() > TEXT_MAX => {
                Err(MessageError::FieldTooLong("a reason"))
            }
            Self::Refuse(mismatch)
                if mismatch.source_value.len() > TEXT_MAX
                    || mismatch.destination_value.len() > TEXT_MAX
                    || mismatch.field.len() > TEXT_MAX =>
            {
                Err(MessageError::FieldTooLong("a refusal"))
            }
            Self::Abort { reason } => Ok(Self::Abort { reason: printable(reason.clone()) }),
            Self::Lost { reason } => Ok(Self::Lost { reason: printable(reason.clone()) }),
            Self::Refuse(Mismatch { field, source_value, destination_value }) => {
                Ok(Self::Refuse(Mismatch {
                    field: printable(field.clone()),
                    source_value: printable(source_value.clone()),
                    destination_value: printable(destination_value.clone()),
                }))
            }
            _ => Ok(message),
        }
    }
}

fn exactly<'a, M: Deserialize<'a>>(body: &'a [u8]) -> Result<M, MessageError> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => Err(MessageError::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello::new(SessionId([9; 16]), MemoryLayout::flat(3).unwrap(), "m".into())
    }

    #[test]
    fn the_bytes_of_each_message_are_these() {
        let record = CommitRecord { session: SessionId([1; 16]), epoch: 2 };
        let to_destination = [
            ToDestination::Hello(hello()),
            ToDestination::State { was_paused: false, state: vec![1, 2] },
            ToDestination::State { was_paused: true, state: vec![] },
            ToDestination::Commit(record),
            ToDestination::Reattach { session: record.session, epoch: 3, committed: Some(record) },
            ToDestination::Released,
            ToDestination::Abort { reason: "no".into() },
            ToDestination::Ping(300),
            ToDestination::Copied { pages: 300 },
            ToDestination::Valid { part: vec![5], last: true },
        ];
        let to_source = [
            ToSource::Accept { version: 1 },
            ToSource::Refuse(Mismatch::new("f", "s", "d")),
            ToSource::Ready,
            ToSource::Running { restore_us: 1, resume_us: 2, held_us: 3 },
            ToSource::Placed { part: vec![5], last: true },
            ToSource::Progress { settled: 1, network_faults: 2, pushed_bytes: 3 },
            ToSource::WorkloadEnded,
            ToSource::Drained { settled: 3 },
            ToSource::Report(vec![b'{', b'}']),
            ToSource::Abort { reason: "no".into() },
            ToSource::Lost { reason: "no".into() },
            ToSource::Pong(300),
            ToSource::Landed { pages: 300 },
        ];
        let mut golden = String::new();
        for message in &to_destination {
            let bytes = encode(message);
            assert_eq!(ToDestination::decode(&bytes[4..]).as_ref(), Ok(message));
            golden += &format!("{message:?}\n  {bytes:02x?}\n");
        }
        for message in &to_source {
            let bytes = encode(message);
            assert_eq!(ToSource::decode(&bytes[4..]).as_ref(), Ok(message));
            golden += &format!("{message:?}\n  {bytes:02x?}\n");
        }
        insta::assert_snapshot!(golden);
    }

    #[test]
    fn another_version_is_named_even_if_the_rest_is_unknown() {
        let mut future = hello();
        future.version = 3;
        let mut body = encode(&ToDestination::Hello(future))[4..].to_vec();
        body.extend([0xff; 40]);
        let mismatch = ToDestination::decode_first(&body).unwrap().unwrap_err();
        assert_eq!(
            mismatch.to_string(),
            "the two sides differ in the protocol version: source 3, destination 2"
        );
    }

    #[test]
    fn what_a_peer_says_is_made_printable() {
        let said = "no\x1b[2J\n\u{202e}room".to_owned();
        let shown = "no?[2J??room".to_owned();
        let body = encode(&ToSource::Abort { reason: said.clone() });
        let heard = ToSource::decode(&body[4..]);
        assert_eq!(heard, Ok(ToSource::Abort { reason: shown.clone() }));
        let body = encode(&ToSource::Lost { reason: said.clone() });
        let heard = ToSource::decode(&body[4..]);
        assert_eq!(heard, Ok(ToSource::Lost { reason: shown.clone() }));
        let body = encode(&ToDestination::Abort { reason: said.clone() });
        let heard = ToDestination::decode(&body[4..]);
        assert_eq!(heard, Ok(ToDestination::Abort { reason: shown.clone() }));
        let mismatch = |text: &str| Mismatch {
            field: text.into(),
            source_value: text.into(),
            destination_value: text.into(),
        };
        let body = encode(&ToSource::Refuse(mismatch(&said)));
        assert_eq!(ToSource::decode(&body[4..]), Ok(ToSource::Refuse(mismatch(&shown))));
    }

    #[test]
    fn garbage_and_trailing_bytes_are_refused() {
        assert_eq!(ToDestination::decode_first(b"\0GET "), Err(MessageError::NotOurs));
        let mut body = encode(&ToSource::Ready)[4..].to_vec();
        body.push(0);
        assert_eq!(ToSource::decode(&body), Err(MessageError::Malformed));
        assert_eq!(ToDestination::decode(&[]), Err(MessageError::Malformed));
        assert!(matches!(body_len([0xff; 4]), Err(MessageError::TooLong(_))));
        let long = ToDestination::Abort { reason: "x".repeat(TEXT_MAX + 1) };
        let error = ToDestination::decode(&encode(&long)[4..]);
        assert_eq!(error, Err(MessageError::FieldTooLong("a reason")));
    }
}
