//! The ticket: one line that lets a peer in, and tells it whom to expect.
//!
//! ```text
//! postcopy1:HOST:PORT,PORT[,PORT...]:EXPIRES:FINGERPRINT:SECRET:CHECKSUM
//! ```
//!
//! The first port is the urgent lane's, the others (1 to 8) are the push lanes'.
//! `EXPIRES` is in seconds since 1970, fingerprint and secret are base64url
//! without padding, and the checksum is the CRC-32 of all that stands before it,
//! its colon included, in 8 hexadecimal digits: it tells a mistyped or cut line
//! from a refused one and protects nothing else.
//!
//! Whoever reads the line can take the guest. It belongs on a channel as
//! trusted as the one by which the operator reaches both hosts.

use super::lanes::{Lane, PUSH_LANES_MAX};
use data_encoding::BASE64URL_NOPAD;
use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};
use thiserror::Error;

/// The most bytes that a ticket's line may have.
pub const TICKET_BYTES_MAX: usize = 1024;

const PREFIX: &str = "postcopy";
const VERSION: &str = "1";
const FIELDS: usize = 7;
const CHECKSUM_DIGITS: usize = 8;
const HOST_NAME_BYTES_MAX: usize = 253;

/// Where a peer listens, how to recognise it, and what lets one in.
#[derive(Clone, PartialEq, Eq)]
pub struct Ticket {
    host: Host,
    urgent_port: u16,
    push_ports: Vec<u16>,
    server_fingerprint: [u8; 32],
    secret: Secret,
    expires: u64,
}

/// The host part of a ticket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// An address.
    Ip(IpAddr),
    /// A name, to be resolved by who connects.
    Name(String),
}

/// 32 random bytes that both sides know. Does not show in debug output.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

/// Why a line is not a ticket.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TicketParseError {
    /// It does not begin like one.
    #[error("this is not a ticket: a ticket begins with \"postcopy1:\"")]
    NotATicket,
    /// It is of another version.
    #[error("this ticket has version {found}, this program knows version 1")]
    Version {
        /// The version that it has.
        found: String,
    },
    /// It is longer than any ticket.
    #[error("this is not a ticket: it is longer than 1024 bytes")]
    TooLong,
    /// Its end is missing.
    #[error("the ticket is cut off: its end is missing")]
    Truncated,
    /// It was changed on its way.
    #[error("the ticket has a typing or copying error: its checksum does not match")]
    Checksum,
    /// One of its parts makes no sense.
    #[error("the ticket's {part} is not valid")]
    Part {
        /// Which part.
        part: &'static str,
    },
}

impl Ticket {
    /// A ticket for the given parts; `expires` is in seconds since 1970.
    ///
    /// # Errors
    /// If a port is 0 or there are not 1 to 8 push ports.
    pub fn new(
        host: Host,
        urgent_port: u16,
        push_ports: Vec<u16>,
        server_fingerprint: [u8; 32],
        secret: Secret,
        expires: u64,
    ) -> Result<Self, TicketParseError> {
        let ports_valid = (1..=PUSH_LANES_MAX).contains(&push_ports.len())
            && urgent_port != 0
            && !push_ports.contains(&0);
        if !ports_valid {
            return Err(TicketParseError::Part { part: "list of ports" });
        }
        Ok(Self { host, urgent_port, push_ports, server_fingerprint, secret, expires })
    }

    /// The same ticket for another address, as a relay or a forwarded port has it.
    ///
    /// # Errors
    /// As [`Ticket::new`].
    pub fn with_address(
        &self,
        host: Host,
        urgent_port: u16,
        push_ports: Vec<u16>,
    ) -> Result<Self, TicketParseError> {
        let secret = self.secret.clone();
        Self::new(host, urgent_port, push_ports, self.server_fingerprint, secret, self.expires)
    }

    /// The host that listens.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The UDP port of `lane`, or `None` if there is no such lane.
    pub fn port(&self, lane: Lane) -> Option<u16> {
        match lane {
            Lane::Urgent => Some(self.urgent_port),
            Lane::Push(index) => self.push_ports.get(usize::from(index)).copied(),
        }
    }

    /// Where the peer listens, as `HOST:PORT,PORT...`: nothing of it is secret.
    pub fn address(&self) -> String {
        let ports = std::iter::once(&self.urgent_port).chain(&self.push_ports);
        let ports: Vec<String> = ports.map(u16::to_string).collect();
        format!("{}:{}", self.host, ports.join(","))
    }

    /// How many push lanes there are, 1 to 8.
    pub fn push_lanes(&self) -> usize {
        self.push_ports.len()
    }

    /// SHA-256 of the listening side's certificate (DER).
    pub fn server_fingerprint(&self) -> &[u8; 32] {
        &self.server_fingerprint
    }

    /// What lets a peer in.
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// When it expires, in seconds since 1970. Only the side that listens enforces
    /// it, and only until the first peer is in: a migration that takes longer can reconnect.
    pub fn expires(&self) -> u64 {
        self.expires
    }

    /// Whether it has expired by this host's clock. The hosts' clocks may
    /// differ, so this is worth a warning and not a refusal.
    pub fn looks_expired(&self, now: SystemTime) -> bool {
        now.duration_since(UNIX_EPOCH).is_ok_and(|now| now.as_secs() > self.expires)
    }
}

impl Secret {
    /// From its bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes, for deriving keys.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("host", &self.host)
            .field("urgent_port", &self.urgent_port)
            .field("push_ports", &self.push_ports)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

impl From<IpAddr> for Host {
    fn from(address: IpAddr) -> Self {
        Self::Ip(address)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(IpAddr::V6(address)) => write!(f, "[{address}]"),
            Self::Ip(IpAddr::V4(address)) => address.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl FromStr for Host {
    type Err = TicketParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const BAD: TicketParseError = TicketParseError::Part { part: "host" };
        if let Some(inner) = text.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or(BAD)?;
            return Ok(Self::Ip(inner.parse::<Ipv6Addr>().map_err(|_| BAD)?.into()));
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Ip(address));
        }
        let name_byte = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        let valid = (1..=HOST_NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(name_byte);
        if valid { Ok(Self::Name(text.to_owned())) } else { Err(BAD) }
    }
}

/// The full line, secret included.
impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = format!("{PREFIX}{VERSION}:{}:{}", self.host, self.urgent_port);
        for port in &self.push_ports {
            line.push_str(&format!(",{port}"));
        }
        line.push_str(&format!(
            ":{}:{}:{}:",
            self.expires,
            BASE64URL_NOPAD.encode(&self.server_fingerprint),
            BASE64URL_NOPAD.encode(self.secret.expose()),
        ));
        write!(f, "{line}{:08x}", crc32fast::hash(line.as_bytes()))
    }
}

impl FromStr for Ticket {
    type Err = TicketParseError;

    /// Reads a ticket. White space within it, as terminals and mail programs put it
    /// into long lines, is skipped.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > TICKET_BYTES_MAX {
            return Err(TicketParseError::TooLong);
        }
        let line: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
        check_version(&line)?;

        let fields = split_fields(&line);
        let Ok([_, host, ports, expires, fingerprint, secret, checksum]) =
            <[&str; FIELDS]>::try_from(fields.as_slice())
        else {
            let cut = fields.len() < FIELDS;
            return Err(if cut { TicketParseError::Truncated } else { TicketParseError::Checksum });
        };
        if checksum.len() < CHECKSUM_DIGITS {
            return Err(TicketParseError::Truncated);
        }
        let covered = &line[..line.len() - checksum.len()];
        if checksum != format!("{:08x}", crc32fast::hash(covered.as_bytes())) {
            return Err(TicketParseError::Checksum);
        }

        let ports = parse_ports(ports)?;
        Self::new(
            host.parse()?,
            ports[0],
            ports[1..].to_vec(),
            parse_bytes(fingerprint, "fingerprint")?,
            Secret(parse_bytes(secret, "secret")?),
            expires.parse().map_err(|_| TicketParseError::Part { part: "time of expiry" })?,
        )
    }
}

fn check_version(line: &str) -> Result<(), TicketParseError> {
    let rest = line.strip_prefix(PREFIX).ok_or(TicketParseError::NotATicket)?;
    let Some((version, _)) = rest.split_once(':') else {
        // "postcopy1" alone, with nothing behind it.
        let cut = rest.is_empty() || rest == VERSION;
        return Err(if cut { TicketParseError::Truncated } else { TicketParseError::NotATicket });
    };
    let is_number = (1..=9).contains(&version.len()) && version.bytes().all(|b| b.is_ascii_digit());
    match version {
        VERSION => Ok(()),
        _ if is_number => Err(TicketParseError::Version { found: version.to_owned() }),
        _ => Err(TicketParseError::NotATicket),
    }
}

/// The parts between colons, but for those inside the brackets of an IPv6 address.
fn split_fields(line: &str) -> Vec<&str> {
    let mut in_brackets = false;
    line.split(|c| {
        match c {
            '[' => in_brackets = true,
            ']' => in_brackets = false,
            _ => {}
        }
        c == ':' && !in_brackets
    })
    .collect()
}

/// At least one port; how many, and that none is 0, [`Ticket::new`] checks.
fn parse_ports(text: &str) -> Result<Vec<u16>, TicketParseError> {
    text.split(',')
        .map(|port| port.parse().map_err(|_| TicketParseError::Part { part: "list of ports" }))
        .collect()
}

fn parse_bytes(text: &str, part: &'static str) -> Result<[u8; 32], TicketParseError> {
    BASE64URL_NOPAD
        .decode(text.as_bytes())
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or(TicketParseError::Part { part })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ticket(host: &str) -> Ticket {
        let host = host.parse().unwrap();
        Ticket::new(host, 4433, vec![4434, 4435], [7; 32], Secret([200; 32]), 1_900_000_000)
            .unwrap()
    }

    #[test]
    fn every_kind_of_host_survives_the_text_form() {
        for host in ["10.0.0.7", "[fd00::7]", "[::ffff:10.0.0.7]", "node-7.example.org"] {
            let ticket = ticket(host);
            let line = ticket.to_string();
            assert!(line.starts_with(&format!("postcopy1:{host}:4433,4434,4435:1900000000:")));
            assert_eq!(line.parse::<Ticket>(), Ok(ticket), "{line}");
        }
    }

    #[test]
    fn white_space_from_a_wrapped_line_is_skipped() {
        let ticket = ticket("[fd00::7]");
        let line = ticket.to_string();
        let wrapped = format!("  {}\n  {}\r\n", &line[..60], &line[60..]);
        assert_eq!(wrapped.parse::<Ticket>(), Ok(ticket));
    }

    #[test]
    fn debug_output_keeps_the_secret() {
        let ticket = ticket("10.0.0.7");
        let secret = BASE64URL_NOPAD.encode(ticket.secret().expose());
        let debug = format!("{ticket:?} {:?}", ticket.secret());
        assert!(ticket.to_string().contains(&secret));
        assert!(!debug.contains(&secret) && !debug.contains("200"), "{debug}");
    }

    #[test]
    fn each_cut_is_told_as_such() {
        let line = ticket("[fd00::7]").to_string();
        for end in "postcopy1".len()..line.len() {
            let error = line[..end].parse::<Ticket>().unwrap_err();
            assert_eq!(error, TicketParseError::Truncated, "{}", &line[..end]);
        }
        assert_eq!("postcop".parse::<Ticket>(), Err(TicketParseError::NotATicket));
        assert_eq!("".parse::<Ticket>(), Err(TicketParseError::NotATicket));
    }

    #[test]
    fn each_changed_letter_is_told_as_such() {
        let line = ticket("10.0.0.7").to_string();
        for at in "postcopy1:".len()..line.len() {
            let mut changed = line.clone().into_bytes();
            changed[at] = if changed[at] == b'4' { b'5' } else { b'4' };
            let changed = String::from_utf8(changed).unwrap();
            let error = changed.parse::<Ticket>().unwrap_err();
            let expected = [TicketParseError::Checksum, TicketParseError::Truncated];
            assert!(expected.contains(&error), "{changed}: {error}");
        }
    }

    #[test]
    fn other_versions_and_other_lines_are_told_apart() {
        let newer = ticket("10.0.0.7").to_string().replacen("postcopy1", "postcopy12", 1);
        let error = newer.parse::<Ticket>().unwrap_err();
        assert_eq!(error, TicketParseError::Version { found: "12".into() });
        for other in ["postcopyX:a:b", "hello", "postcopy:1", "https://example.org/"] {
            assert_eq!(other.parse::<Ticket>(), Err(TicketParseError::NotATicket), "{other}");
        }
        let long = format!("postcopy1:{}", "a".repeat(TICKET_BYTES_MAX));
        assert_eq!(long.parse::<Ticket>(), Err(TicketParseError::TooLong));
    }

    #[test]
    fn parts_are_checked_even_under_a_right_checksum() {
        let good = ticket("10.0.0.7").to_string();
        let with = |from: &str, to: &str| {
            let changed = good.replacen(from, to, 1);
            let covered = &changed[..changed.len() - CHECKSUM_DIGITS];
            format!("{covered}{:08x}", crc32fast::hash(covered.as_bytes())).parse::<Ticket>()
        };
        let part = |part| Err(TicketParseError::Part { part });
        assert_eq!(with(":4433,", ":0,"), part("list of ports"));
        assert_eq!(with(",4434,4435:", ":"), part("list of ports"));
        assert_eq!(with(",4434,4435:", ",1,2,3,4,5,6,7,8,9:"), part("list of ports"));
        assert_eq!(with(",4434,4435:", ",65536:"), part("list of ports"));
        assert_eq!(with("10.0.0.7", "a/b"), part("host"));
        assert_eq!(with("10.0.0.7", "[1.2.3.4]"), part("host"));
        assert_eq!(with("10.0.0.7", ""), part("host"));
        assert_eq!(with("1900000000", "-1"), part("time of expiry"));
        assert_eq!(with(":BwcH", ":wcH"), part("fingerprint"));
        assert_eq!(with(":yMjI", ":y+jI"), part("secret"));
    }

    #[test]
    fn expiry_is_read_against_the_given_clock() {
        let ticket = ticket("10.0.0.7");
        let at = |seconds| UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        assert!(!ticket.looks_expired(at(1_900_000_000)));
        assert!(ticket.looks_expired(at(1_900_000_001)));
    }

    proptest! {
        #[test]
        fn no_line_panics(line in ".{0,300}") {
            let _ = line.parse::<Ticket>();
            let _ = format!("postcopy1:{line}").parse::<Ticket>();
        }
    }
}
