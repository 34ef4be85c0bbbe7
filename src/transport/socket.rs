//! The UDP socket below quinn: batches that fit one send, and large kernel buffers.
//!
//! quinn hands up to ten datagrams to the kernel in one call, and one call carries
//! at most 65,507 bytes. A larger batch fails as a whole, which quinn-udp takes for
//! a lost MTU probe: above 6,550 bytes a datagram, every full batch would vanish
//! silently. So the batch is capped by the largest datagram that MTU discovery may arrive at.
//!
//! Some network devices (those without checksum offload) cannot split a batch at all. That
//! shows only when the first one is refused, which is in the middle of a migration's blackout;
//! quinn-udp then drops it, and the loss is noticed a retransmission timer later. Here its
//! datagrams are sent one by one instead.

use super::udp::ReadyToRead;
#[cfg(feature = "failpoints")]
use crate::failpoint;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use std::{
    fmt::Debug,
    io::{self, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

/// What one UDP send carries at most: 65,535 less the IPv4 and UDP headers.
const SEND_BYTES_MAX: usize = 65_507;

/// What one receive yields at most, coalesced datagrams included.
const RECEIVE_BYTES_MAX: usize = 65_535;

/// A UDP socket whose batches fit the kernel's limits.
#[derive(Debug)]
pub struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// The largest payload that any connection on this socket may come to send.
    payload_max: AtomicUsize,
    receive_segments: usize,
}

impl CappedSocket {
    /// Wraps `socket`, on which datagrams of up to `send_payload_max` bytes will be sent
    /// and of up to `receive_payload_max` announced to the peer. Must be called within a tokio
    /// runtime.
    ///
    /// # Errors
    /// The kernel's, if the socket cannot be registered or configured.
    pub fn wrap(
        socket: UdpSocket,
        send_payload_max: u16,
        receive_payload_max: u16,
    ) -> io::Result<Arc<Self>> {
        let inner = Arc::new(ReadyToRead::new(socket)?);
        // quinn reserves this many payloads for each of 32 receive buffers, where
        // one coalesced receive is never above 64 KiB: 4 MiB in all at most, instead of 128.
        let receive_segments = RECEIVE_BYTES_MAX
            .div_ceil(receive_payload_max.into())
            .min(inner.max_receive_segments());
        Ok(Arc::new(Self {
            inner,
            payload_max: AtomicUsize::new(send_payload_max.into()),
            receive_segments: receive_segments.max(1),
        }))
    }

    /// Says that a connection on this socket may send datagrams of up to `payload_max` bytes.
    pub fn raise_payload_max(&self, payload_max: u16) {
        self.payload_max.fetch_max(payload_max.into(), Ordering::Relaxed);
    }
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        debug_assert!(transmit.contents.len() <= SEND_BYTES_MAX, "this batch would be lost");
        #[cfg(feature = "failpoints")]
        if failpoint::drops(failpoint::Direction::Out) {
            return Ok(());
        }
        let splits = || self.inner.max_transmit_segments() > 1;
        let batch = transmit.segment_size.filter(|&size| transmit.contents.len() > size);
        let Some(size) = batch else { return self.inner.try_send(transmit) };
        if splits() {
            self.inner.try_send(transmit)?;
            if splits() {
                return Ok(());
            }
            // That was refused, and is why there will be no more of them.
        }
        for (nth, contents) in transmit.contents.chunks(size).enumerate() {
            let one = Transmit { contents, segment_size: None, ..transmit.clone() };
            match self.inner.try_send(&one) {
                // The caller would send all of them again: rather lose the rest.
                Err(error) if nth > 0 && error.kind() == io::ErrorKind::WouldBlock => break,
                done => done?,
            }
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        #[cfg(feature = "failpoints")]
        while failpoint::drops(failpoint::Direction::In) {
            std::task::ready!(self.inner.poll_recv(cx, bufs, meta))?;
        }
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let fitting = SEND_BYTES_MAX / self.payload_max.load(Ordering::Relaxed).max(1);
        self.inner.max_transmit_segments().min(fitting).max(1)
    }

    fn max_receive_segments(&self) -> usize {
        self.receive_segments
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// Asks for kernel buffers of `bytes` each way: beyond the system's limit if we
/// are privileged, else up to it.
pub(super) fn enlarge_buffers(socket: &impl AsFd, bytes: usize) {
    use nix::sys::socket::{setsockopt, sockopt};
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        let _ = setsockopt(socket, sockopt::RcvBuf, &bytes);
    }
    if setsockopt(socket, sockopt::SndBufForce, &bytes).is_err() {
        let _ = setsockopt(socket, sockopt::SndBuf, &bytes);
    }
}

/// The MTU in bytes of the route from here to `peer`, as far as the kernel knows it.
pub(super) fn route_mtu(peer: SocketAddr) -> Option<u32> {
    use std::os::fd::AsRawFd;

    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    // Connecting a UDP socket sends nothing; it only looks the route up.
    let any: SocketAddr = if peer.is_ipv4() {
        (std::net::Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let probe = UdpSocket::bind(any).ok()?;
    probe.connect(peer).ok()?;

    let (level, option) = if peer.is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_MTU)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU)
    };
    let mut mtu: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `mtu` and `length` live across the call, and `length` says how many
    // bytes the kernel may write to `mtu`.
    let result = unsafe {
        libc::getsockopt(probe.as_raw_fd(), level, option, (&raw mut mtu).cast(), &mut length)
    };
    if result == 0 { u32::try_from(mtu).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrapped(send: u16, receive: u16) -> Arc<CappedSocket> {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        CappedSocket::wrap(socket, send, receive).unwrap()
    }

    #[tokio::test]
    async fn no_batch_exceeds_one_send() {
        for payload in [1200_u16, 1452, 6550, 8972, 40_000, 65_400] {
            let segments = wrapped(payload, payload).max_transmit_segments();
            assert!(segments >= 1);
            assert!(segments * usize::from(payload) <= SEND_BYTES_MAX);
        }
        assert_eq!(wrapped(65_400, 1452).max_transmit_segments(), 1);
        let socket = wrapped(1452, 1452);
        assert!(socket.max_transmit_segments() > 7);
        socket.raise_payload_max(8972);
        assert_eq!(socket.max_transmit_segments(), 7);
        socket.raise_payload_max(1452);
        assert_eq!(socket.max_transmit_segments(), 7);
    }

    #[tokio::test]
    async fn receive_buffers_hold_any_coalesced_receive_and_little_more() {
        for payload in [1200_u16, 1452, 8972, 65_400] {
            let socket = wrapped(payload, payload);
            // Where the kernel does not coalesce, one datagram is all there is to hold.
            let coalesces = socket.inner.max_receive_segments() > 1;
            let bytes = socket.max_receive_segments() * usize::from(payload);
            assert!(!coalesces || bytes >= RECEIVE_BYTES_MAX || bytes >= 64 * usize::from(payload));
            assert!(bytes <= 2 * RECEIVE_BYTES_MAX);
        }
    }

    /// A device that cannot split batches, as quinn-udp passes it on: the first batch is
    /// gone, and from then on none is announced.
    #[derive(Debug)]
    struct NoOffload {
        socket: Arc<dyn AsyncUdpSocket>,
        segments: AtomicUsize,
        sent: std::sync::Mutex<Vec<Vec<u8>>>,
    }

    impl AsyncUdpSocket for NoOffload {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            self.socket.clone().create_io_poller()
        }

        fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            if transmit.segment_size.is_some_and(|size| transmit.contents.len() > size) {
                self.segments.store(1, Ordering::Relaxed);
            } else {
                self.sent.lock().unwrap().push(transmit.contents.to_vec());
            }
            Ok(())
        }

        fn poll_recv(
            &self,
            cx: &mut Context<'_>,
            bufs: &mut [IoSliceMut<'_>],
            meta: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            self.socket.poll_recv(cx, bufs, meta)
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            self.socket.local_addr()
        }

        fn max_transmit_segments(&self) -> usize {
            self.segments.load(Ordering::Relaxed)
        }
    }

    #[tokio::test]
    async fn a_batch_that_the_device_refuses_is_sent_one_by_one() {
        let plain = wrapped(1452, 1452);
        let device = Arc::new(NoOffload {
            socket: plain.inner.clone(),
            segments: AtomicUsize::new(10),
            sent: std::sync::Mutex::default(),
        });
        let socket = CappedSocket {
            inner: device.clone(),
            payload_max: AtomicUsize::new(1452),
            receive_segments: 1,
        };
        let batch = |contents, size| Transmit {
            destination: "127.0.0.1:9".parse().unwrap(),
            ecn: None,
            contents,
            segment_size: Some(size),
            src_ip: None,
        };
        // The second one was put together before the first was refused.
        socket.try_send(&batch(b"aabbc", 2)).unwrap();
        socket.try_send(&batch(b"ddde", 3)).unwrap();
        socket.try_send(&batch(b"ff", 2)).unwrap();
        let sent = device.sent.lock().unwrap();
        let sent: Vec<&[u8]> = sent.iter().map(Vec::as_slice).collect();
        assert_eq!(sent, [&b"aa"[..], b"bb", b"c", b"ddd", b"e", b"ff"]);
    }

    #[test]
    fn loopback_routes_have_the_loopback_mtu() {
        // The interface has 65,536; IPv4 packets end at 65,535.
        assert_eq!(route_mtu("127.0.0.1:9".parse().unwrap()), Some(65_535));
    }
}
