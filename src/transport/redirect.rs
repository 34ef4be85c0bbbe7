//! Another address for the destination that a ticket names.
//!
//! Only where it is looked for changes: whoever answers there must have the same key.

use super::lanes::Lane;
use super::ticket::{Host, Ticket, TicketParseError};
use std::net::IpAddr;

/// Why a ticket cannot be redirected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedirectError {
    /// It was meant for a ticket and is none, or an address that makes no sense.
    #[error("{0}; an address is HOST or HOST:PORT,PORT[,PORT...]")]
    Malformed(#[from] TicketParseError),
    /// The ticket of another destination.
    #[error("this is the ticket of another destination: only the address may differ")]
    Another,
    /// Other than as many ports as before.
    #[error(
        "there are {found} ports, and the session has {wanted}: one for faults, then one for \
             each push lane"
    )]
    Ports {
        /// Ports named.
        found: usize,
        /// Ports that there must be.
        wanted: usize,
    },
}

/// `ticket` with the address that `to` has: another line of the same ticket, or
/// `HOST[:PORT,PORT...]`. Without ports they stay.
///
/// # Errors
/// If it is neither, of another destination, or has another number of ports.
pub fn redirected(ticket: &Ticket, to: &str) -> Result<Ticket, RedirectError> {
    let to = to.trim();
    let ports_of = |ticket: &Ticket| -> Vec<u16> {
        let push = (0..ticket.push_lanes()).map(|lane| Lane::Push(lane as u8));
        std::iter::once(Lane::Urgent).chain(push).filter_map(|lane| ticket.port(lane)).collect()
    };
    let (host, ports) = if to.starts_with("postcopy") && to.matches(':').count() > 1 {
        let other: Ticket = to.parse()?;
        let same = other.server_fingerprint() == ticket.server_fingerprint()
            && other.secret() == ticket.secret();
        if !same {
            return Err(RedirectError::Another);
        }
        (other.host().clone(), ports_of(&other))
    } else {
        let (host, ports) = split(to);
        let ports = match ports {
            Some(ports) => parse_ports(ports)?,
            None => ports_of(ticket),
        };
        (host.parse::<Host>()?, ports)
    };
    let wanted = 1 + ticket.push_lanes();
    match ports.split_first() {
        Some((urgent, push)) if ports.len() == wanted => {
            Ok(ticket.with_address(host, *urgent, push.to_vec())?)
        }
        _ => Err(RedirectError::Ports { found: ports.len(), wanted }),
    }
}

/// Host, and ports if there are some.
fn split(to: &str) -> (&str, Option<&str>) {
    if to.parse::<IpAddr>().is_ok() || to.ends_with(']') {
        return (to, None);
    }
    match to.rsplit_once(':') {
        Some((host, ports)) => (host, Some(ports)),
        None => (to, None),
    }
}

fn parse_ports(text: &str) -> Result<Vec<u16>, TicketParseError> {
    let port =
        |port: &str| port.parse().map_err(|_| TicketParseError::Part { part: "list of ports" });
    text.split(',').map(port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::ticket::Secret;

    fn ticket() -> Ticket {
        let host = "10.0.0.7".parse().unwrap();
        Ticket::new(host, 4433, vec![4434, 4435], [7; 32], Secret::new([200; 32]), 1).unwrap()
    }

    #[test]
    fn each_way_to_write_an_address_changes_the_address_only() {
        for (to, address) in [
            ("10.0.0.8", "10.0.0.8:4433,4434,4435"),
            ("dst.example.org", "dst.example.org:4433,4434,4435"),
            ("fd00::7", "[fd00::7]:4433,4434,4435"),
            ("[fd00::7]", "[fd00::7]:4433,4434,4435"),
            ("[fd00::7]:1,2,3", "[fd00::7]:1,2,3"),
            (" dst:1,2,3\n", "dst:1,2,3"),
        ] {
            let other = redirected(&ticket(), to).unwrap();
            assert_eq!(other.address(), address);
            assert_eq!(other.server_fingerprint(), ticket().server_fingerprint());
            assert!(other.secret() == ticket().secret());
            assert_eq!(redirected(&ticket(), &other.to_string()).unwrap(), other);
        }
    }

    #[test]
    fn what_is_no_address_of_the_same_destination_is_refused_by_its_reason() {
        let wrong = |to: &str| redirected(&ticket(), to).unwrap_err();
        for to in ["dst:1", "dst:1,2", "dst:1,2,3,4"] {
            let found = to.split(',').count();
            assert_eq!(wrong(to), RedirectError::Ports { found, wanted: 3 });
        }
        for to in ["", "dst:", "dst:x,2,3", "a b", "dst:0,1,2", "[fd00::7", "dst:1,2,65536"] {
            assert!(matches!(wrong(to), RedirectError::Malformed(_)), "{to}");
        }
        let line = ticket().to_string();
        assert!(matches!(wrong(&line[..line.len() - 1]), RedirectError::Malformed(_)));
        let host = || "10.0.0.7".parse().unwrap();
        for (fingerprint, secret) in [([8; 32], [200; 32]), ([7; 32], [201; 32])] {
            let secret = Secret::new(secret);
            let other = Ticket::new(host(), 1, vec![2, 3], fingerprint, secret, 1).unwrap();
            assert_eq!(wrong(&other.to_string()), RedirectError::Another);
        }
    }
}
