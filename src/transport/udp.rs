//! [`ReadyToRead`]: a UDP socket that wakes its thread for datagrams that come, and for room to
//! send only where there was none.
//!
//! What sockets of a runtime commonly do costs a lane dearly: they are registered for both, and
//! each datagram that leaves a send buffer tells of room again, so that a thread wakes once more
//! for each that it sends. They also ask for datagrams until the kernel has no more: here fewer than
//! there were buffers for are taken to be all. Of ten system calls for a network fault at the
//! destination, and seven at the source, that was two each.

use nix::libc;
use quinn::udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The socket.
#[derive(Debug)]
pub(super) struct ReadyToRead {
    socket: AsyncFd<UdpSocket>,
    state: UdpSocketState,
    /// There was no room for the last datagram.
    full: AtomicBool,
}

impl ReadyToRead {
    /// Takes over `socket`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel's, if the socket cannot be registered or configured.
    pub(super) fn new(socket: UdpSocket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        // SAFETY: the descriptor is the socket's own, which the `AsyncFd` owns.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        Ok(Self { socket, state, full: AtomicBool::new(false) })
    }
}

impl AsyncUdpSocket for ReadyToRead {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Room { socket: self, awaited: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = self.state.send(UdpSockRef::from(self.socket.get_ref()), transmit);
        if sent.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
            self.full.store(true, Ordering::Relaxed);
        }
        sent
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.socket.poll_read_ready(cx))?;
            let received = self.state.recv(UdpSockRef::from(self.socket.get_ref()), bufs, meta);
            match received {
                Ok(count) => {
                    // The kernel had no more. Of what comes later it tells anew, and that is not
                    // undone here: only what was told before `ready` was taken.
                    if count < bufs.len() {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => ready.clear_ready(),
                // No memory to put a datagram into: it is lost, like one on the way. An error
                // would end the endpoint, and with it every way to come back.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EFAULT | libc::ENOMEM)) => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.get_ref().local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

/// Waits for room in the send buffer, by a registration of its own while there is none.
#[derive(Debug)]
struct Room {
    socket: Arc<ReadyToRead>,
    awaited: Option<AsyncFd<OwnedFd>>,
}

impl UdpPoller for Room {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { socket, awaited } = &mut *self;
        if awaited.is_none() {
            if !socket.full.load(Ordering::Relaxed) {
                return Poll::Ready(Ok(()));
            }
            let again = socket.socket.get_ref().as_fd().try_clone_to_owned()?;
            // SAFETY: the `AsyncFd` owns the descriptor.
            let room = unsafe { AsyncFd::register_with_interest(again, Interest::WRITABLE) }?;
            *awaited = Some(room);
        }
        if let Some(room) = awaited {
            drop(ready!(room.poll_write_ready(cx))?);
        }
        *awaited = None;
        socket.full.store(false, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    fn socket() -> Arc<ReadyToRead> {
        Arc::new(ReadyToRead::new(UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap())
    }

    /// Receives into this many buffers; how many datagrams came.
    async fn receive(socket: &ReadyToRead, buffers: usize) -> usize {
        let mut bytes = vec![[0u8; 2048]; buffers];
        let mut meta = vec![RecvMeta::default(); buffers];
        let mut into: Vec<_> = bytes.iter_mut().map(|of| IoSliceMut::new(of)).collect();
        let count = poll_fn(|cx| socket.poll_recv(cx, &mut into, &mut meta)).await.unwrap();
        meta[..count].iter().map(|of| of.len / of.stride).sum()
    }

    fn bursts() -> impl Iterator<Item = usize> {
        (0..20_000).map(|number| number * 7919 % 70)
    }

    /// Were a wake-up lost, the datagrams of a burst would lie there until the test's end.
    #[tokio::test]
    async fn every_datagram_is_told_of_in_bursts_of_any_length() {
        let (to, received) = (socket(), Arc::new(AtomicUsize::new(0)));
        let datagrams: usize = bursts().sum();
        let (address, seen) = (to.local_addr().unwrap(), received.clone());
        let sending = std::thread::spawn(move || {
            let from = UdpSocket::bind("127.0.0.1:0").unwrap();
            let mut sent = 0;
            for burst in bursts() {
                (0..burst).for_each(|_| assert_eq!(from.send_to(b"page", address).unwrap(), 4));
                sent += burst;
                // No other burst is to make up for a wake-up that was lost.
                while seen.load(Ordering::Acquire) < sent {
                    std::thread::yield_now();
                }
            }
        });
        let all = async {
            while received.load(Ordering::Acquire) < datagrams {
                received.fetch_add(receive(&to, 32).await, Ordering::Release);
            }
        };
        tokio::time::timeout(Duration::from_secs(60), all).await.expect("nothing is told any more");
        sending.join().unwrap();
        assert_eq!(received.load(Ordering::Acquire), datagrams);
    }

    #[tokio::test]
    async fn a_datagram_that_there_is_no_memory_for_is_lost_and_no_other() {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
        use std::num::NonZero;
        let (to, from) = (socket(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let (bytes, flags) = (NonZero::new(4096).unwrap(), MapFlags::MAP_PRIVATE);
        // SAFETY: a new mapping. Nobody reads or writes it, not even the kernel: it cannot.
        let nowhere = unsafe {
            let start = mmap_anonymous(None, bytes, ProtFlags::PROT_NONE, flags).unwrap();
            std::slice::from_raw_parts_mut(start.cast::<u8>().as_ptr(), bytes.get())
        };
        from.send_to(b"lost", to.local_addr().unwrap()).unwrap();
        drop(to.socket.readable().await.unwrap());
        let mut meta = [RecvMeta::default()];
        let polled = poll_fn(|cx| {
            let mut into = [IoSliceMut::new(nowhere)];
            Poll::Ready(to.poll_recv(cx, &mut into, &mut meta))
        });
        assert!(polled.await.is_pending(), "it is no error");
        from.send_to(b"a page", to.local_addr().unwrap()).unwrap();
        let mut bytes = [0; 100];
        let mut into = [IoSliceMut::new(&mut bytes)];
        poll_fn(|cx| to.poll_recv(cx, &mut into, &mut meta)).await.unwrap();
        assert_eq!((meta[0].len, &bytes[..6]), (6, &b"a page"[..]));
    }

    #[tokio::test]
    async fn room_is_waited_for_only_where_there_was_none() {
        let socket = socket();
        let mut room = Room { socket: socket.clone(), awaited: None };
        for full in [false, true, false] {
            socket.full.store(full, Ordering::Relaxed);
            let mut waited = false;
            poll_fn(|cx| {
                let polled = Pin::new(&mut room).poll_writable(cx);
                waited |= polled.is_pending();
                polled
            })
            .await
            .unwrap();
            assert!(room.awaited.is_none() && !socket.full.load(Ordering::Relaxed));
            assert_eq!(waited, full, "a new registration is told of by the kernel");
        }
    }
}
