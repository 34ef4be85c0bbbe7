//! Lanes as a whole: who gets in, what gets through, over which link.

mod admission;
mod traffic;

use super::{Identity, Lane, LaneServer, LinkOptions, Ticket, bind_server};
use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::mpsc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Aborts the test process if it is not dropped within the time given.
pub(super) struct Watchdog(Option<mpsc::Sender<()>>);

impl Watchdog {
    pub(super) fn seconds(seconds: u64) -> Self {
        let (alive, dropped) = mpsc::channel::<()>();
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        std::thread::spawn(move || {
            if dropped.recv_timeout(Duration::from_secs(seconds))
                == Err(mpsc::RecvTimeoutError::Timeout)
            {
                eprintln!("{test} hung for {seconds} s");
                std::process::abort();
            }
        });
        Self(Some(alive))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.take();
    }
}

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

fn in_an_hour() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + 3600
}

/// An urgent lane's server on loopback, and a ticket for it whose push port is the same port.
fn urgent_server(identity: &Identity, options: &LinkOptions) -> (LaneServer, Ticket) {
    let server = bind_server(loopback(), identity, Lane::Urgent, options.clone()).unwrap();
    let addr = server.endpoint().local_addr().unwrap();
    let ticket = identity.ticket(addr.ip(), addr.port(), vec![addr.port()]).unwrap();
    (server, ticket)
}
