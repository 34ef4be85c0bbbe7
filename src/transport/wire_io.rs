//! Frames from quinn streams, each with a limit, never copied.
//!
//! [`FrameReader`] reads back-to-back `[header | payload]` frames, as push lanes
//! carry them; [`read_message`] and [`write_message`] a length-prefixed message, as
//! control conversations do. What headers and payloads mean is the caller's.
//!
//! Writing frames needs no counterpart here: build header and payload in one
//! `Bytes` of 64 to 256 KiB and hand it to [`quinn::SendStream::write_chunk`] (see
//! [`write_bytes`]). Many small writes are slow, because quinn walks a list of them for each
//! packet.

use super::error::TransportError;
use bytes::{Bytes, BytesMut};
use quinn::{RecvStream, SendStream};
use std::{collections::VecDeque, fmt};

/// How many chunks one read takes from quinn; a chunk is at most a datagram's worth.
const CHUNKS_A_READ: usize = 64;

/// Chunks below this size are copied: each keeps the whole datagram that it came in
/// alive, and a hostile peer could send single bytes in datagrams of 64 KiB.
const CHUNK_BYTES_COPIED: usize = 1024;

/// The longest header, in bytes.
const HEADER_BYTES_MAX: usize = 64;

/// Reads back-to-back frames of a fixed-length header and a payload.
///
/// Holds at most one frame and what quinn had ready behind it.
#[derive(Debug)]
pub struct FrameReader {
    stream: RecvStream,
    chunks: VecDeque<Bytes>,
    buffered: usize,
    header_bytes: usize,
    payload_bytes_max: usize,
}

/// A frame: its parsed header, and its payload as it lies in received datagrams.
#[derive(Debug)]
pub struct Frame<H> {
    /// What the parser made of the header.
    pub header: H,
    /// The payload.
    pub payload: Payload,
}

/// Received bytes in one or more pieces.
#[derive(Debug, Default)]
pub struct Payload {
    pieces: Vec<Bytes>,
    length: usize,
}

impl FrameReader {
    /// Reads frames with headers of `header_bytes` (1 to 64) and payloads of up to
    /// `payload_bytes_max` bytes from `stream`.
    pub fn new(stream: RecvStream, header_bytes: usize, payload_bytes_max: usize) -> Self {
        assert!((1..=HEADER_BYTES_MAX).contains(&header_bytes), "a header has 1 to 64 bytes");
        Self { stream, chunks: VecDeque::new(), buffered: 0, header_bytes, payload_bytes_max }
    }

    /// Waits for the next whole frame. `parse` gets exactly the header's bytes and
    /// returns what they mean with the payload's length; it may be called again
    /// for the same header after a cancelled call. `None` is the stream's end between two
    /// frames, which says that the peer finished the stream, and not that all is done.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    /// [`TransportError::Malformed`] with the parser's error, [`TransportError::TooLong`],
    /// [`TransportError::Truncated`], or how the stream or connection ended.
    pub async fn next<H, E: fmt::Display>(
        &mut self,
        parse: impl FnOnce(&[u8]) -> Result<(H, usize), E>,
    ) -> Result<Option<Frame<H>>, TransportError> {
        if !self.fill(self.header_bytes).await? {
            return match self.buffered {
                0 => Ok(None),
                got => Err(TransportError::Truncated { got, wanted: self.header_bytes }),
            };
        }
        let mut header = [0; HEADER_BYTES_MAX];
        let header = &mut header[..self.header_bytes];
        self.peek(header);
        let (header, length) = parse(header)
            .map_err(|error| TransportError::Malformed { detail: error.to_string() })?;
        if length > self.payload_bytes_max {
            return Err(TransportError::TooLong { length, max: self.payload_bytes_max });
        }
        let wanted = self.header_bytes + length;
        if !self.fill(wanted).await? {
            return Err(TransportError::Truncated { got: self.buffered, wanted });
        }
        self.take(self.header_bytes);
        Ok(Some(Frame { header, payload: self.take(length) }))
    }

    /// The stream, to stop it or for its id.
    pub fn stream_mut(&mut self) -> &mut RecvStream {
        &mut self.stream
    }

    /// Reads until `wanted` bytes are buffered; `false` if the stream ends before.
    async fn fill(&mut self, wanted: usize) -> Result<bool, TransportError> {
        while self.buffered < wanted {
            let mut ready = [const { Bytes::new() }; CHUNKS_A_READ];
            let Some(count) = self.stream.read_chunks(&mut ready).await? else {
                return Ok(false);
            };
            for chunk in ready.into_iter().take(count).filter(|chunk| !chunk.is_empty()) {
                self.buffered += chunk.len();
                self.chunks.push_back(if chunk.len() < CHUNK_BYTES_COPIED {
                    Bytes::copy_from_slice(&chunk)
                } else {
                    chunk
                });
            }
        }
        Ok(true)
    }

    /// Copies the next bytes out without taking them; they must be buffered.
    fn peek(&self, mut into: &mut [u8]) {
        for chunk in &self.chunks {
            let part = chunk.len().min(into.len());
            let (now, later) = into.split_at_mut(part);
            now.copy_from_slice(&chunk[..part]);
            into = later;
        }
        debug_assert!(into.is_empty(), "peeked beyond what is buffered");
    }

    /// Takes the next `length` bytes, which must be buffered, without copying them.
    fn take(&mut self, length: usize) -> Payload {
        let mut pieces = Vec::new();
        let mut missing = length;
        while missing > 0 {
            let Some(chunk) = self.chunks.front_mut() else { break };
            if chunk.len() <= missing {
                missing -= chunk.len();
                pieces.extend(self.chunks.pop_front());
            } else {
                pieces.push(chunk.split_to(missing));
                missing = 0;
            }
        }
        debug_assert_eq!(missing, 0, "took more than is buffered");
        self.buffered -= length;
        Payload { pieces, length }
    }
}

impl Payload {
    /// Its bytes in all.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Its pieces in order; none is empty.
    pub fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }
}

/// Fills `into` from the stream. Not cancel-safe.
///
/// # Errors
/// [`TransportError::Truncated`] if the stream ends before, or how stream or connection ended.
pub async fn read_exact_into(
    stream: &mut RecvStream,
    into: &mut [u8],
) -> Result<(), TransportError> {
    let wanted = into.len();
    stream.read_exact(into).await.map_err(|error| match error {
        quinn::ReadExactError::FinishedEarly(got) => TransportError::Truncated { got, wanted },
        quinn::ReadExactError::ReadError(error) => error.into(),
    })
}

/// Reads a message of up to `max` bytes behind its length, which is 4 bytes,
/// little-endian. `None` if the stream ends before it begins. Not cancel-safe.
///
/// # Errors
/// [`TransportError::TooLong`] before anything of it is read or allocated,
/// [`TransportError::Truncated`], or how the stream or connection ended.
pub async fn read_message(
    stream: &mut RecvStream,
    max: usize,
) -> Result<Option<Bytes>, TransportError> {
    let mut length = [0; 4];
    match read_exact_into(stream, &mut length).await {
        Ok(()) => {}
        Err(TransportError::Truncated { got: 0, .. }) => return Ok(None),
        Err(error) => return Err(error),
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > max {
        return Err(TransportError::TooLong { length, max });
    }
    let mut message = BytesMut::zeroed(length);
    read_exact_into(stream, &mut message).await?;
    Ok(Some(message.freeze()))
}

/// Writes a message for [`read_message`]. Not cancel-safe.
///
/// # Errors
/// [`TransportError::TooLong`] above 4 GiB, or how the stream or connection ended.
pub async fn write_message(stream: &mut SendStream, message: &[u8]) -> Result<(), TransportError> {
    let length = u32::try_from(message.len())
        .map_err(|_| TransportError::TooLong { length: message.len(), max: u32::MAX as usize })?;
    let mut framed = BytesMut::with_capacity(4 + message.len());
    framed.extend_from_slice(&length.to_le_bytes());
    framed.extend_from_slice(message);
    write_bytes(stream, framed.freeze()).await
}

/// Writes all of `bytes` without copying it; waits while the connection's send
/// window is full. Not cancel-safe.
///
/// # Errors
/// How the stream or connection ended.
pub async fn write_bytes(stream: &mut SendStream, bytes: Bytes) -> Result<(), TransportError> {
    Ok(stream.write_chunk(bytes).await?)
}
