//! A userspace UDP relay that stands for a link of given bandwidth, round trip and loss.
//!
//! It forwards the ports of one destination. As on a real link, all of them share
//! *one* bottleneck per direction: a rate, a queue that drops at its tail, random loss from a
//! seed, and half the round trip of delay. Order is kept. Datagrams above the link's MTU
//! vanish, so that MTU discovery finds it. It shapes what passes; it neither reads nor changes
//! it.
//!
//! It fails as links do, too: wholly ([`Relay::blackhole`]), one direction of it, single ports
//! ([`Relay::cut`], [`Relay::cut_port`]), or by another address at its target's end
//! ([`Relay::rebind`], [`Relay::retarget`]).
//!
//! For tests and measurements where the kernel's own shaping is not at hand. One
//! thread without a runtime; bandwidth is exact in the long run, because it is kept in
//! virtual time from the kernel's arrival stamps, and moments of delivery are as exact as the
//! thread's wake-ups.

mod bottleneck;
mod forwarder;
mod stamps;
mod switch;

use super::{
    error::TransportError,
    lanes::Lane,
    socket::enlarge_buffers,
    ticket::{Host, Ticket, TicketParseError},
    tls::setup,
};
use forwarder::{Forwarder, Port};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};
use switch::Switch;

/// The most ports of one relay: an urgent and eight push lanes.
pub const PORTS_MAX: usize = 9;

/// Kernel buffers of the relay's sockets, each way. They must hold what arrives
/// while its thread waits for a core.
const SOCKET_BUFFER: usize = 16 << 20;

/// The link that a relay stands for.
#[derive(Clone, Debug)]
pub struct RelayConfig {
    /// Bits per second each way, IP and UDP headers counted; `None` for no limit.
    pub bandwidth_bps: Option<u64>,
    /// Round trip of an empty link; half of it is added each way.
    pub rtt: Duration,
    /// The share of datagrams that are lost at random, 0 to 1.
    pub loss: f64,
    /// Decides which: the n-th datagram of a direction has the same fate in each run.
    pub seed: u64,
    /// The largest IP packet in bytes, 1,280 to 65,535.
    pub mtu: usize,
    /// How much the bottleneck holds before it drops; of no effect without a bandwidth.
    pub queue: QueueLimit,
    /// Where to listen; `None` for the loopback address.
    pub listen: Option<IpAddr>,
}

/// The depth of a bottleneck's queue.
#[derive(Clone, Copy, Debug)]
pub enum QueueLimit {
    /// So much time at the link's rate.
    Time(Duration),
    /// So many bytes.
    Bytes(u64),
}

impl Default for RelayConfig {
    fn default() -> Self {
        Self {
            bandwidth_bps: None,
            rtt: Duration::ZERO,
            loss: 0.0,
            seed: 1,
            mtu: 9000,
            queue: QueueLimit::Time(Duration::from_millis(20)),
            listen: None,
        }
    }
}

/// A direction of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From clients to the destination.
    ToTarget,
    /// From the destination to clients.
    ToClient,
}

/// What a relay did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelayStats {
    /// From clients to the destination.
    pub to_target: DirectionStats,
    /// From the destination to clients.
    pub to_client: DirectionStats,
}

/// What a relay did in one direction. Bytes are UDP payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectionStats {
    /// Datagrams delivered.
    pub forwarded: u64,
    /// Their bytes.
    pub forwarded_bytes: u64,
    /// Datagrams dropped because the queue was full.
    pub dropped_queue: u64,
    /// Datagrams lost at random.
    pub dropped_loss: u64,
    /// Datagrams larger than the link's MTU.
    pub dropped_mtu: u64,
    /// Datagrams that came, or were on their way, while the link was down.
    pub dropped_down: u64,
    /// Datagrams that the relay's own host would not take, or from one client too many.
    pub dropped_host: u64,
}

impl DirectionStats {
    /// All datagrams that did not arrive.
    pub fn dropped(&self) -> u64 {
        self.dropped_queue
            + self.dropped_loss
            + self.dropped_mtu
            + self.dropped_down
            + self.dropped_host
    }
}

/// A running relay. Stops when dropped; what is on its way then is lost.
#[derive(Debug)]
pub struct Relay {
    local: Vec<SocketAddr>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Starts a relay to `targets` (1 to 9 of one address family), with a port of
    /// its own for each.
    ///
    /// # Errors
    /// [`TransportError::Setup`] for values out of range, [`TransportError::Io`] for the kernel's.
    pub fn spawn(config: RelayConfig, targets: &[SocketAddr]) -> Result<Self, TransportError> {
        let failed = |source: io::Error| TransportError::Io { what: "start a relay", source };
        check(&config, targets).map_err(setup("a relay"))?;
        let listen = config.listen.unwrap_or(if targets[0].is_ipv4() {
            Ipv4Addr::LOCALHOST.into()
        } else {
            Ipv6Addr::LOCALHOST.into()
        });

        let mut ports = Vec::new();
        let mut local = Vec::new();
        for &target in targets {
            let socket = open_socket(SocketAddr::new(listen, 0)).map_err(failed)?;
            local.push(socket.local_addr().map_err(failed)?);
            ports.push(Port { socket, target });
        }
        stamps::wait_until_made(listen).map_err(failed)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| failed(errno.into()))?;
        let shared = Arc::new(Shared {
            wake,
            stop: AtomicBool::new(false),
            switch: Switch::default(),
            targets: Mutex::new(targets.to_vec()),
            rebinds: AtomicU64::new(0),
            to_target: Counters::default(),
            to_client: Counters::default(),
        });
        let forwarder = Forwarder::new(&config, ports, shared.clone());
        let thread = std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || forwarder.run())
            .map_err(failed)?;
        Ok(Self { local, shared, thread: Some(thread) })
    }

    /// Where it listens: one address for each target, in the targets' order.
    pub fn local(&self) -> &[SocketAddr] {
        &self.local
    }

    /// The same ticket, by way of this relay, whose targets must be the ticket's ports in order.
    ///
    /// # Errors
    /// If there are not 2 to 9 targets.
    pub fn redirect(&self, ticket: &Ticket) -> Result<Ticket, TicketParseError> {
        let host = Host::from(self.local[0].ip());
        let push_ports = self.local[1..].iter().map(SocketAddr::port).collect();
        ticket.with_address(host, self.local[0].port(), push_ports)
    }

    /// What it did so far.
    pub fn stats(&self) -> RelayStats {
        RelayStats {
            to_target: self.shared.to_target.read(),
            to_client: self.shared.to_client.read(),
        }
    }

    /// Takes the link down (both directions, what is on its way included) or up again.
    pub fn blackhole(&self, down: bool) {
        self.cut(Way::ToTarget, down);
        self.cut(Way::ToClient, down);
    }

    /// Takes one direction down, what is on its way included, or up again: half-open, as behind
    /// a firewall that lost its state.
    pub fn cut(&self, way: Way, down: bool) {
        for port in 0..self.local.len() {
            self.cut_port(port, way, down);
        }
    }

    /// Takes one direction of one port (by its place among the targets, from 0) down or up
    /// again. A port that it does not have is ignored.
    pub fn cut_port(&self, port: usize, way: Way, down: bool) {
        self.shared.switch.set(port, way, down);
    }

    /// Changes the addresses by which the targets see the clients, as a NAT that lost its state
    /// or a host with a new address does. What comes to the old ones is lost.
    pub fn rebind(&self) {
        self.shared.rebinds.fetch_add(1, Ordering::AcqRel);
        // A full counter is a pending wake-up just as well.
        let _ = self.shared.wake.write(1);
    }

    /// Forwards to other addresses from now on; what is on its way to the old ones, and what
    /// comes from them, is lost.
    ///
    /// # Errors
    /// [`TransportError::Setup`] if they are not as many, or of the other address family.
    pub fn retarget(&self, targets: &[SocketAddr]) -> Result<(), TransportError> {
        let as_before = targets.len() == self.local.len()
            && targets.iter().all(|target| target.is_ipv4() == self.local[0].is_ipv4());
        let reason = "its targets are as many, and of the same family, as before";
        as_before.then_some(()).ok_or(reason).map_err(setup("a relay"))?;
        *self.shared.targets() = targets.to_vec();
        for port in 0..targets.len() {
            self.shared.switch.flush(port, Way::ToTarget);
        }
        self.rebind();
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // A full counter is a pending wake-up just as well.
        let _ = self.shared.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The targets of a relay for all lanes of a ticket on `host`: urgent first.
pub fn targets(host: IpAddr, ticket: &Ticket) -> Vec<SocketAddr> {
    let push = (0..ticket.push_lanes()).map(|index| Lane::Push(index as u8));
    std::iter::once(Lane::Urgent)
        .chain(push)
        .filter_map(|lane| ticket.port(lane))
        .map(|port| SocketAddr::new(host, port))
        .collect()
}

/// What the handle and the thread share.
#[derive(Debug)]
struct Shared {
    wake: EventFd,
    stop: AtomicBool,
    switch: Switch,
    /// Where each port forwards to.
    targets: Mutex<Vec<SocketAddr>>,
    /// Counts the times that the forwarder has to look at them again, from new addresses.
    rebinds: AtomicU64,
    to_target: Counters,
    to_client: Counters,
}

impl Shared {
    fn targets(&self) -> std::sync::MutexGuard<'_, Vec<SocketAddr>> {
        // It is replaced as a whole, so it is sound whoever panicked.
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Counters {
    forwarded: AtomicU64,
    forwarded_bytes: AtomicU64,
    dropped_queue: AtomicU64,
    dropped_loss: AtomicU64,
    dropped_mtu: AtomicU64,
    dropped_down: AtomicU64,
    dropped_host: AtomicU64,
}

impl Counters {
    fn read(&self) -> DirectionStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DirectionStats {
            forwarded: read(&self.forwarded),
            forwarded_bytes: read(&self.forwarded_bytes),
            dropped_queue: read(&self.dropped_queue),
            dropped_loss: read(&self.dropped_loss),
            dropped_mtu: read(&self.dropped_mtu),
            dropped_down: read(&self.dropped_down),
            dropped_host: read(&self.dropped_host),
        }
    }
}

fn check(config: &RelayConfig, targets: &[SocketAddr]) -> Result<(), &'static str> {
    let one_family = targets.windows(2).all(|pair| pair[0].is_ipv4() == pair[1].is_ipv4());
    let listen_fits = config
        .listen
        .zip(targets.first())
        .is_none_or(|(ip, target)| ip.is_ipv4() == target.is_ipv4());
    match () {
        () if !(1..=PORTS_MAX).contains(&targets.len()) => Err("it has 1 to 9 targets"),
        () if !one_family || !listen_fits => Err("all its addresses are of one family"),
        () if config.bandwidth_bps == Some(0) => Err("its bandwidth is above 0"),
        () if !(0.0..=1.0).contains(&config.loss) => Err("its loss is from 0 to 1"),
        () if !(1280..=65_535).contains(&config.mtu) => Err("its MTU is from 1,280 to 65,535"),
        () if config.rtt > Duration::from_secs(60) => Err("its round trip is a minute at most"),
        () => Ok(()),
    }
}

/// A nonblocking socket whose datagrams carry the kernel's arrival stamp.
fn open_socket(addr: SocketAddr) -> io::Result<UdpSocket> {
    use nix::sys::socket::{setsockopt, sockopt};
    let socket = UdpSocket::bind(addr)?;
    socket.set_nonblocking(true)?;
    enlarge_buffers(&socket, SOCKET_BUFFER);
    setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests;
