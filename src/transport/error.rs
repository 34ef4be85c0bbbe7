//! What can go wrong on a lane, each case one clear line.
//!
//! Text that a peer chose (close reasons) is cut to [`REASON_BYTES_MAX`] bytes and
//! reduced to printable characters before it gets here, so that it can go to a
//! terminal or a log as it is.

use quinn::{ConnectionError, Side, TransportErrorCode};
use std::{io, net::SocketAddr, time::Duration};
use thiserror::Error;

/// The most bytes of a peer's close reason that are kept or sent.
pub const REASON_BYTES_MAX: usize = 256;

/// A failure of the transport, or of the peer as the transport sees it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The peer is the right one, but does not accept our ticket's secret.
    #[error(
        "the peer refused our ticket: it was made for another migration, or by another process"
    )]
    TicketRefused,
    /// The peer is the right one, but the ticket's time is over.
    #[error("the peer refused our ticket: it has expired")]
    TicketExpired,
    /// Whoever answered is not the peer that the ticket names.
    #[error(
        "{peer} is not the peer that the ticket was made by: its certificate has another fingerprint"
    )]
    WrongPeer {
        /// Who answered.
        peer: SocketAddr,
    },
    /// The other side completed no handshake of ours, because it speaks something else.
    #[error("{peer} does not speak this version of the postcopy protocol: {detail}")]
    NotOurProtocol {
        /// Who answered.
        peer: SocketAddr,
        /// What it said or did.
        detail: String,
    },
    /// The port belongs to another lane than the one asked for.
    #[error(
        "{peer} serves the {found} lane, not the {wanted} lane: are the ports in the right order?"
    )]
    WrongLane {
        /// Who answered.
        peer: SocketAddr,
        /// The lane that was asked for.
        wanted: String,
        /// The lane that the port serves.
        found: String,
    },
    /// Nobody answered, or not to the end of the handshake, in time.
    #[error("no answer from {peer} within {} ms", after.as_millis())]
    HandshakeTimeout {
        /// Who was asked.
        peer: SocketAddr,
        /// How long was waited.
        after: Duration,
    },
    /// A client was turned away while shaking hands (the server's side).
    #[error("a client at {peer} was not admitted: {reason}")]
    NotAdmitted {
        /// Who it was.
        peer: SocketAddr,
        /// Why.
        reason: String,
    },
    /// The UDP port to listen on is taken.
    #[error("UDP port {} on {} is in use already", addr.port(), addr.ip())]
    PortInUse {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// The address to listen on cannot be bound for another reason than that it is taken.
    #[error("cannot listen on UDP {addr}")]
    Bind {
        /// The address asked for.
        addr: SocketAddr,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A socket or runtime could not be set up.
    #[error("cannot {what}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The ticket's host name has no address.
    #[error("cannot find an address for host {host}")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's reason.
        source: io::Error,
    },
    /// The ticket has no port for this lane.
    #[error("the ticket has {push_ports} push ports, so there is no {lane} lane")]
    NoSuchLane {
        /// The lane asked for.
        lane: String,
        /// How many push lanes there are.
        push_ports: usize,
    },
    /// Keys, certificates or QUIC parameters could not be set up.
    #[error("cannot set up {what}: {detail}")]
    Setup {
        /// What was being made.
        what: &'static str,
        /// Why it failed.
        detail: String,
    },
    /// The peer's program closed the connection and said why.
    #[error("the peer closed the connection ({code}: {reason})")]
    PeerClosed {
        /// The code it gave.
        code: u64,
        /// Its words: printable and bounded.
        reason: String,
    },
    /// The link was lost: nothing was heard for the idle timeout, or the peer restarted.
    #[error("the link was lost: {detail}")]
    LinkLost {
        /// How it showed.
        detail: String,
    },
    /// This side closed the connection, endpoint or stream.
    #[error("the connection was closed on this side")]
    ClosedHere,
    /// The peer abandoned a stream that it was sending.
    #[error("the peer reset the stream with code {code}")]
    StreamReset {
        /// The code it gave.
        code: u64,
    },
    /// The peer will not read more from a stream.
    #[error("the peer stopped the stream with code {code}")]
    StreamStopped {
        /// The code it gave.
        code: u64,
    },
    /// A stream ended within a frame.
    #[error("the stream ended after {got} of {wanted} bytes of a frame")]
    Truncated {
        /// Bytes of the frame that had come.
        got: usize,
        /// Bytes that it should have had, as far as known.
        wanted: usize,
    },
    /// A frame announced more bytes than are allowed there.
    #[error("the peer announced a frame of {length} bytes where at most {max} are allowed")]
    TooLong {
        /// Bytes announced.
        length: usize,
        /// The limit.
        max: usize,
    },
    /// A frame's header made no sense.
    #[error("the peer sent a malformed frame: {detail}")]
    Malformed {
        /// What was wrong with it.
        detail: String,
    },
    /// A lane's thread panicked.
    #[error("thread {name} panicked: {message}")]
    ThreadPanicked {
        /// The thread's name.
        name: String,
        /// The panic's message.
        message: String,
    },
}

impl TransportError {
    /// Whether a new connection may succeed where this one failed: the link or
    /// the peer's process went away, rather than that something was refused.
    pub fn is_link_loss(&self) -> bool {
        matches!(self, Self::LinkLost { .. } | Self::HandshakeTimeout { .. })
    }

    /// What a handshake on `side` with `peer` failed of, `after` this long.
    pub(super) fn from_handshake(
        error: ConnectionError,
        side: Side,
        peer: SocketAddr,
        after: Duration,
    ) -> Self {
        match side {
            Side::Client => client_handshake_error(error, peer, after),
            Side::Server => Self::NotAdmitted { peer, reason: server_handshake_reason(error) },
        }
    }
}

// TLS alerts (RFC 8446, section 6.2) as they show in QUIC: 0x100 + alert.
const ALERT_CERTIFICATE_EXPIRED: u64 = 0x100 + 45;
const ALERT_ACCESS_DENIED: u64 = 0x100 + 49;
const ALERT_CERTIFICATE_REQUIRED: u64 = 0x100 + 116;
const ALERT_NO_APPLICATION_PROTOCOL: u64 = 0x100 + 120;
/// bad_certificate, unsupported_certificate, certificate_revoked,
/// certificate_unknown, unknown_ca, decrypt_error.
const ALERTS_ABOUT_A_CERTIFICATE: [u64; 6] = [0x12a, 0x12b, 0x12c, 0x12e, 0x130, 0x133];

fn client_handshake_error(
    error: ConnectionError,
    peer: SocketAddr,
    after: Duration,
) -> TransportError {
    let not_ours = |detail: String| TransportError::NotOurProtocol { peer, detail };
    match error {
        // The server's own verdict on us.
        ConnectionError::ConnectionClosed(close) => match code(close.error_code) {
            ALERT_CERTIFICATE_EXPIRED => TransportError::TicketExpired,
            ALERT_ACCESS_DENIED | ALERT_CERTIFICATE_REQUIRED => TransportError::TicketRefused,
            alert if ALERTS_ABOUT_A_CERTIFICATE.contains(&alert) => TransportError::TicketRefused,
            ALERT_NO_APPLICATION_PROTOCOL => {
                not_ours("it is a QUIC server of another application or version".into())
            }
            _ => not_ours(format!("{}: {}", close.error_code, sanitise(&close.reason))),
        },
        // Our verdict on the server.
        ConnectionError::TransportError(error) => match code(error.code) {
            ALERT_ACCESS_DENIED => TransportError::WrongPeer { peer },
            alert if ALERTS_ABOUT_A_CERTIFICATE.contains(&alert) => {
                TransportError::WrongPeer { peer }
            }
            ALERT_NO_APPLICATION_PROTOCOL => {
                not_ours("it is a QUIC server of another application or version".into())
            }
            _ => not_ours(sanitise(error.to_string().as_bytes())),
        },
        ConnectionError::VersionMismatch => not_ours("it speaks another version of QUIC".into()),
        ConnectionError::TimedOut => TransportError::HandshakeTimeout { peer, after },
        other => other.into(),
    }
}

fn server_handshake_reason(error: ConnectionError) -> String {
    match error {
        ConnectionError::TransportError(error) => match code(error.code) {
            ALERT_CERTIFICATE_EXPIRED => "its ticket has expired".into(),
            ALERT_ACCESS_DENIED => "its ticket is for another migration".into(),
            ALERT_CERTIFICATE_REQUIRED => "it has no ticket".into(),
            ALERT_NO_APPLICATION_PROTOCOL => "it speaks another protocol".into(),
            _ => sanitise(error.to_string().as_bytes()),
        },
        ConnectionError::ConnectionClosed(close)
            if code(close.error_code) == ALERT_ACCESS_DENIED =>
        {
            "it expected another server".into()
        }
        other => sanitise(other.to_string().as_bytes()),
    }
}

fn code(code: TransportErrorCode) -> u64 {
    code.into()
}

impl From<ConnectionError> for TransportError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => {
                Self::PeerClosed { code: close.error_code.into(), reason: sanitise(&close.reason) }
            }
            ConnectionError::LocallyClosed => Self::ClosedHere,
            ConnectionError::TimedOut => {
                Self::LinkLost { detail: "nothing was heard within the idle timeout".into() }
            }
            ConnectionError::Reset => {
                Self::LinkLost { detail: "the peer no longer knows this connection".into() }
            }
            ConnectionError::ConnectionClosed(close) => {
                // A ticket can be refused after our side of the handshake is done.
                match close.error_code.into() {
                    ALERT_ACCESS_DENIED | ALERT_CERTIFICATE_REQUIRED => Self::TicketRefused,
                    ALERT_CERTIFICATE_EXPIRED => Self::TicketExpired,
                    _ => Self::LinkLost {
                        detail: format!("{}: {}", close.error_code, sanitise(&close.reason)),
                    },
                }
            }
            other => Self::LinkLost { detail: sanitise(other.to_string().as_bytes()) },
        }
    }
}

impl From<quinn::ReadError> for TransportError {
    fn from(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::Reset(code) => Self::StreamReset { code: code.into() },
            quinn::ReadError::ConnectionLost(error) => error.into(),
            quinn::ReadError::ClosedStream
            | quinn::ReadError::IllegalOrderedRead
            | quinn::ReadError::ZeroRttRejected => Self::ClosedHere,
        }
    }
}

impl From<quinn::ReadExactError> for TransportError {
    fn from(error: quinn::ReadExactError) -> Self {
        match error {
            quinn::ReadExactError::ReadError(error) => error.into(),
            quinn::ReadExactError::FinishedEarly(_) => {
                Self::LinkLost { detail: "the peer ended a stream".into() }
            }
        }
    }
}

impl From<quinn::WriteError> for TransportError {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::Stopped(code) => Self::StreamStopped { code: code.into() },
            quinn::WriteError::ConnectionLost(error) => error.into(),
            quinn::WriteError::ClosedStream | quinn::WriteError::ZeroRttRejected => {
                Self::ClosedHere
            }
        }
    }
}

/// A peer's text, cut to [`REASON_BYTES_MAX`] bytes and made printable: control
/// characters and what is not UTF-8 become `?`.
pub fn sanitise(text: &[u8]) -> String {
    let bounded = &text[..text.len().min(REASON_BYTES_MAX)];
    String::from_utf8_lossy(bounded)
        .chars()
        .map(|c| if c.is_control() || is_format_control(c) || c == '\u{fffd}' { '?' } else { c })
        .collect()
}

/// Characters that print nothing but reorder or hide what stands around them.
fn is_format_control(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_text_is_bounded_and_printable() {
        let text = sanitise(b"bad\x1b[2Jnews\n\xff\xe2\x80\xae!");
        assert_eq!(text, "bad?[2Jnews???!");
        let long = vec![b'x'; 10_000];
        assert_eq!(sanitise(&long).len(), REASON_BYTES_MAX);
    }
}
