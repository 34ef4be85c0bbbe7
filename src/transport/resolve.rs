//! [`resolve`]: a ticket's host as addresses.
//!
//! The system's resolver blocks, so each look-up has a thread. Not one of tokio's: that panics
//! where none can be made, and a lane's end would wait for a resolver that hangs.

use super::error::TransportError;
use super::ticket::Host;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// How many of a host name's addresses are tried.
const ADDRESSES_MAX: usize = 4;
/// The most look-ups at a time, of all lanes of this process, those included that nobody waits
/// for any more.
const LOOK_UPS_MAX: usize = 32;

static LOOK_UPS: AtomicUsize = AtomicUsize::new(0);

/// The addresses of `host`, if they come in time.
///
/// # Errors
/// [`TransportError::Resolve`].
pub(super) async fn resolve(
    host: &Host,
    port: u16,
    within: Duration,
) -> Result<Vec<SocketAddr>, TransportError> {
    let name = match host {
        Host::Ip(ip) => return Ok(vec![SocketAddr::new(*ip, port)]),
        Host::Name(name) => name,
    };
    let failed = |source: io::Error| TransportError::Resolve { host: name.clone(), source };
    let found = look_up(name.clone(), port).map_err(failed)?;
    match timeout(within, found).await {
        Ok(Ok(addresses)) => addresses.map_err(failed),
        // Its thread has panicked.
        Ok(Err(_)) => Err(failed(io::ErrorKind::Other.into())),
        Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
    }
}

type Found = io::Result<Vec<SocketAddr>>;

fn look_up(name: String, port: u16) -> io::Result<oneshot::Receiver<Found>> {
    let place = Place::take().ok_or_else(|| {
        io::Error::new(io::ErrorKind::ResourceBusy, "the system's resolver does not answer")
    })?;
    let (tell, found) = oneshot::channel();
    let ask = move || {
        let addresses = (name.as_str(), port).to_socket_addrs();
        let _ = tell.send(addresses.map(|addresses| addresses.take(ADDRESSES_MAX).collect()));
        drop(place);
    };
    std::thread::Builder::new().name("resolve".into()).spawn(ask)?;
    Ok(found)
}

/// One of the look-ups that may be under way.
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let one_more = |taken| (taken < LOOK_UPS_MAX).then_some(taken + 1);
        LOOK_UPS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok().map(|_| Self)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        LOOK_UPS.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn look_ups_have_an_end_to_their_number_and_give_their_places_back() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let within = Duration::from_secs(20);
        let host = Host::Name("localhost".into());
        let look = || runtime.block_on(resolve(&host, 7, within));
        let places: Vec<_> = std::iter::from_fn(Place::take).take(1000).collect();
        assert!(places.len() <= LOOK_UPS_MAX);
        let error = format!("{:?}", look().unwrap_err());
        assert!(error.contains("does not answer"), "{error}");
        drop(places);
        // More than there are places.
        for _ in 0..2 * LOOK_UPS_MAX {
            let addresses = loop {
                match look() {
                    Ok(addresses) => break addresses,
                    // The last one's thread is about to give its place back.
                    Err(_) => std::thread::yield_now(),
                }
            };
            assert!(
                addresses.iter().all(|address| address.port() == 7 && address.ip().is_loopback())
            );
        }
    }
}
