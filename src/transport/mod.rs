//! Lanes between the two hosts of a migration: QUIC over capped UDP sockets.
//!
//! Each side has one *urgent* endpoint, which only network faults and the
//! control conversation use, and 1 to 8 *push* endpoints for all other pages. Every
//! endpoint has its own UDP port, OS thread and single-threaded runtime, because
//! bulk data that shares a socket with a fault delays it by milliseconds, and no
//! priority changes the order of what is in a socket's buffer already.
//!
//! * [`ticket`]: the one line that lets a peer in, and names whom to expect there.
//! * [`redirect`]: another address for the same destination.
//! * [`tls`]: both sides authenticated, from that line alone.
//! * [`lanes`]: which lanes there are and how their connections are tuned.
//! * [`endpoint`]: binding, connecting, admitting, closing.
//! * [`socket`]: the UDP socket below quinn, with batches that fit one send.
//! * `udp`: that socket, awake for datagrams only.
//! * [`thread`]: a lane's thread.
//! * [`wire_io`]: frames from streams, bounded.
//! * [`relay`]: a userspace link of a given bandwidth, delay and loss, for tests and measurements.
//!
//! What goes over the lanes is not known here; quinn's connections and streams
//! are handed out as they are.

pub mod endpoint;
pub mod error;
pub mod lanes;
pub mod redirect;
pub mod relay;
mod resolve;
pub mod socket;
pub mod thread;
pub mod ticket;
pub mod tls;
mod udp;
pub mod wire_io;

#[cfg(test)]
mod tests;

pub use endpoint::{LaneServer, LaneSocket, Link, bind_ports, bind_server, connect};
pub use error::TransportError;
pub use lanes::{Lane, LinkOptions, PUSH_LANES_MAX};
pub use thread::LaneThread;
pub use ticket::{Ticket, TicketParseError};
pub use tls::Identity;
