//! The floors of a transfer: how fast one thread gets bytes to another over loopback.

use super::Measured;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What is written to TCP at a time.
const WRITTEN_BYTES: usize = 128 << 10;
/// Bytes of a datagram: the lanes' own come to that over loopback.
const DATAGRAM_BYTES: usize = 65_400;
/// How long one value is taken.
const SLICE: Duration = Duration::from_millis(20);
/// Nothing here waits longer for its peer.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// How long the receiver of datagrams waits for one more: all were sent by then.
const LAST_WAIT: Duration = Duration::from_millis(100);

/// Over TCP.
pub fn tcp(time: Duration) -> anyhow::Result<Measured> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut from = TcpStream::connect(listener.local_addr()?)?;
    from.set_write_timeout(Some(WAIT_MAX))?;
    let (mut to, _) = listener.accept()?;
    to.set_read_timeout(Some(WAIT_MAX))?;
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let bytes = vec![1u8; WRITTEN_BYTES];
            let began = Instant::now();
            while began.elapsed() < time {
                from.write_all(&bytes)?;
            }
            Ok::<_, std::io::Error>(())
        });
        let mut buffer = vec![0u8; WRITTEN_BYTES];
        let rates = slices(|| to.read(&mut buffer));
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Measured::of_rates(&rates?)
    })
}

/// Over UDP. What the receiver has no room for is lost, and does not count.
pub fn udp(time: Duration) -> anyhow::Result<Measured> {
    let to = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    to.set_read_timeout(Some(LAST_WAIT))?;
    let from = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    from.connect(to.local_addr()?)?;
    let sent_all = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sent_all = &sent_all;
        let sender = scope.spawn(move || {
            let datagram = vec![1u8; DATAGRAM_BYTES];
            let began = Instant::now();
            let mut sent = Ok(());
            while sent.is_ok() && began.elapsed() < time {
                sent = from.send(&datagram).map(drop);
            }
            sent_all.store(true, Ordering::Release);
            sent
        });
        let mut buffer = vec![0u8; DATAGRAM_BYTES];
        let rates = slices(|| {
            loop {
                match to.recv(&mut buffer) {
                    Err(error) if is_timeout(&error) && sent_all.load(Ordering::Acquire) => {
                        return Ok(0);
                    }
                    Err(error) if is_timeout(&error) => {}
                    received => return received,
                }
            }
        });
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Measured::of_rates(&rates?)
    })
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

/// Calls `receive` until it has received nothing, and returns the rate of each whole slice.
fn slices(mut receive: impl FnMut() -> std::io::Result<usize>) -> std::io::Result<Vec<f64>> {
    let mut slices = Slices::begin();
    loop {
        match receive()? {
            0 => return Ok(slices.rates),
            received => slices.received(received),
        }
    }
}

/// How fast bytes come in, slice by slice.
pub(super) struct Slices {
    /// Of each whole slice so far, in bits a second.
    pub(super) rates: Vec<f64>,
    began: Instant,
    bytes: usize,
}

impl Slices {
    pub(super) fn begin() -> Self {
        Self { rates: Vec::new(), began: Instant::now(), bytes: 0 }
    }

    pub(super) fn received(&mut self, bytes: usize) {
        self.bytes += bytes;
        let took = self.began.elapsed();
        if took >= SLICE {
            self.rates.push((8.0 * self.bytes as f64 / took.as_secs_f64()).round());
            (self.began, self.bytes) = (Instant::now(), 0);
        }
    }
}
