//! The relay's thread: receives, asks the bottleneck, holds, sends.

use super::{
    Counters, RelayConfig, Shared, Way,
    bottleneck::{Bottleneck, Fate},
    open_socket,
    switch::Stretch,
};
use nix::{
    cmsg_space,
    errno::Errno,
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        prctl::set_timerslack,
        socket::{ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg},
        time::{TimeSpec, TimeValLike},
    },
    time::{ClockId, clock_gettime},
};
use std::{
    collections::{HashMap, VecDeque},
    io::IoSliceMut,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

/// Datagrams that one system call receives.
const BATCH: usize = 32;

/// Client addresses that are served at once; the least recently used gives way.
const FLOWS_MAX: usize = 64;

/// Bytes on their way in one direction, whatever bandwidth and delay would allow.
const IN_FLIGHT_BYTES_MAX: usize = 256 << 20;

/// Bytes of buffers kept for reuse.
const SPARE_BYTES_MAX: usize = 64 << 20;

/// Datagrams due so soon go out now: a sleep would end later than that.
const EARLY_NS: u64 = 20_000;

/// The most that an arrival stamp is believed to lie back.
const STAMP_AGE_NS_MAX: u64 = 50_000_000;

/// One forwarded port.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) socket: UdpSocket,
    pub(super) target: SocketAddr,
}

/// All that the thread owns.
#[derive(Debug)]
pub(super) struct Forwarder {
    shared: Arc<Shared>,
    ports: Vec<Port>,
    flows: HashMap<FlowId, Flow>,
    flow_of_client: HashMap<(usize, SocketAddr), FlowId>,
    flows_made: FlowId,
    /// The last change of addresses that was seen.
    rebinds: u64,
    to_target: Direction,
    to_client: Direction,
    spare: Vec<Box<[u8]>>,
    payload_max: usize,
    header_bytes: usize,
    epoch: Instant,
}

type FlowId = u64;

/// A client on a port, and the socket by which the target sees it.
#[derive(Debug)]
struct Flow {
    port: usize,
    client: SocketAddr,
    upstream: UdpSocket,
    used_ns: u64,
}

#[derive(Debug)]
struct Direction {
    bottleneck: Bottleneck,
    /// In order of their due times.
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: usize,
}

#[derive(Debug)]
struct InFlight {
    due_ns: u64,
    port: usize,
    stretch: Stretch,
    flow: FlowId,
    datagram: Datagram,
}

#[derive(Debug)]
struct Datagram {
    buffer: Box<[u8]>,
    length: usize,
}

/// A datagram that has come in, not yet judged.
#[derive(Debug)]
struct Arrival {
    from: Source,
    sender: Option<SocketAddr>,
    at_ns: u64,
    too_large: bool,
    datagram: Datagram,
}

#[derive(Clone, Copy, Debug)]
enum Source {
    Port(usize),
    Upstream(FlowId),
}

impl Forwarder {
    pub(super) fn new(config: &RelayConfig, ports: Vec<Port>, shared: Arc<Shared>) -> Self {
        let header_bytes = if ports.iter().all(|port| port.target.is_ipv4()) { 28 } else { 48 };
        let direction = |stream| Direction {
            bottleneck: Bottleneck::new(config, stream),
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
        };
        Self {
            shared,
            ports,
            flows: HashMap::new(),
            flow_of_client: HashMap::new(),
            flows_made: 0,
            rebinds: 0,
            to_target: direction(0),
            to_client: direction(1),
            spare: Vec::new(),
            payload_max: config.mtu - header_bytes,
            header_bytes,
            epoch: Instant::now(),
        }
    }

    pub(super) fn run(mut self) {
        // The default slack of 50 us would be added to each wake-up.
        let _ = set_timerslack(1);
        let mut arrivals = Vec::new();
        while !self.shared.stop.load(Ordering::Relaxed) {
            let ready = self.wait(!arrivals.is_empty());
            // Sockets are read one after the other, yet the link takes datagrams as they
            // came: up to the moment for which every socket is known to be read.
            let mut horizon_ns = self.now_ns();
            for source in ready {
                if self.receive(source, &mut arrivals) == BATCH {
                    let last_ns = arrivals.last().map_or(0, |arrival| arrival.at_ns);
                    horizon_ns = horizon_ns.min(last_ns);
                }
            }
            arrivals.sort_by_key(|arrival| arrival.at_ns);
            let later = arrivals.partition_point(|arrival| arrival.at_ns <= horizon_ns);
            self.follow_addresses();
            for arrival in arrivals.drain(..later) {
                self.judge(arrival);
            }
            self.deliver();
        }
    }

    /// Sleeps until a socket is readable or a datagram is due, or not at all if
    /// there is something to do `at_once`.
    fn wait(&self, at_once: bool) -> Vec<Source> {
        let due = [&self.to_target, &self.to_client]
            .into_iter()
            .filter_map(|direction| direction.in_flight.front())
            .map(|next| next.due_ns)
            .chain(at_once.then_some(0))
            .min();
        let timeout = due.map(|due| {
            let ns = due.saturating_sub(self.now_ns() + EARLY_NS);
            TimeSpec::nanoseconds(i64::try_from(ns).unwrap_or(i64::MAX))
        });

        let mut sources = Vec::with_capacity(self.ports.len() + self.flows.len());
        let mut fds = Vec::with_capacity(sources.capacity() + 1);
        fds.push(PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN));
        for (index, port) in self.ports.iter().enumerate() {
            sources.push(Source::Port(index));
            fds.push(PollFd::new(port.socket.as_fd(), PollFlags::POLLIN));
        }
        for (id, flow) in &self.flows {
            sources.push(Source::Upstream(*id));
            fds.push(PollFd::new(flow.upstream.as_fd(), PollFlags::POLLIN));
        }
        if ppoll(&mut fds, timeout, None).is_err() {
            // Interrupted: the loop comes back.
            return Vec::new();
        }
        let any = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        if any(&fds[0]) {
            let _ = self.shared.wake.read();
        }
        sources.into_iter().zip(&fds[1..]).filter(|(_, fd)| any(fd)).map(|(s, _)| s).collect()
    }

    /// Takes a batch from a socket, and says how many datagrams there were.
    fn receive(&mut self, from: Source, arrivals: &mut Vec<Arrival>) -> usize {
        while self.spare.len() < BATCH {
            self.spare.push(vec![0; self.payload_max].into_boxed_slice());
        }
        let fd = match from {
            Source::Port(index) => self.ports[index].socket.as_raw_fd(),
            Source::Upstream(id) => match self.flows.get(&id) {
                Some(flow) => flow.upstream.as_raw_fd(),
                None => return 0,
            },
        };

        let first_buffer = self.spare.len() - BATCH;
        let mut slices: Vec<_> =
            self.spare[first_buffer..].iter_mut().map(|b| [IoSliceMut::new(b)]).collect();
        // The kernel shortens the headers' fields, so each call needs fresh ones.
        let mut headers =
            MultiHeaders::<SockaddrStorage>::preallocate(BATCH, Some(cmsg_space!(TimeSpec)));
        let flags = MsgFlags::MSG_DONTWAIT;
        let results = match recvmmsg(fd, &mut headers, slices.iter_mut(), flags, None) {
            Ok(results) => results,
            // The target's port is closed, or another reader was faster: nothing came.
            Err(Errno::ECONNREFUSED | Errno::EAGAIN | Errno::EINTR) => return 0,
            Err(error) => {
                tracing::warn!("the relay cannot receive: {error}");
                return 0;
            }
        };
        let received: Vec<_> = results
            .map(|message| {
                let stamp = message.cmsgs().ok().and_then(|mut cmsgs| {
                    cmsgs.find_map(|cmsg| match cmsg {
                        ControlMessageOwned::ScmTimestampns(stamp) => Some(stamp),
                        _ => None,
                    })
                });
                let too_large = message.flags.contains(MsgFlags::MSG_TRUNC);
                let sender = message.address.as_ref().and_then(to_socket_addr);
                (message.bytes, sender, too_large, stamp)
            })
            .collect();

        let count = received.len();
        let now_ns = self.now_ns();
        let wall_clock = clock_gettime(ClockId::CLOCK_REALTIME).ok().map(Duration::from);
        let buffers = self.spare.drain(first_buffer..first_buffer + count);
        for (buffer, (length, sender, too_large, stamp)) in buffers.zip(received) {
            let age_ns = wall_clock
                .zip(stamp)
                .and_then(|(now, stamp)| now.checked_sub(Duration::from(stamp)))
                .map_or(0, |age| (age.as_nanos() as u64).min(STAMP_AGE_NS_MAX));
            let at_ns = now_ns.saturating_sub(age_ns);
            let datagram = Datagram { buffer, length };
            arrivals.push(Arrival { from, sender, at_ns, too_large, datagram });
        }
        count
    }

    /// Puts a datagram on its way, or drops it.
    fn judge(&mut self, arrival: Arrival) {
        let Arrival { from, sender, at_ns, too_large, datagram } = arrival;
        let shared = self.shared.clone();
        let (port, way, flow) = match from {
            Source::Port(port) => (port, Way::ToTarget, sender.and_then(|c| self.flow(port, c))),
            Source::Upstream(id) => match self.flows.get(&id) {
                Some(flow) => (flow.port, Way::ToClient, Some(id)),
                None => return self.drop_datagram(datagram, &shared.to_client.dropped_host),
            },
        };
        let (direction, counters) = match way {
            Way::ToTarget => (&mut self.to_target, &shared.to_target),
            Way::ToClient => (&mut self.to_client, &shared.to_client),
        };
        let Some(flow) = flow else {
            return self.drop_datagram(datagram, &counters.dropped_host);
        };
        let Some(stretch) = shared.switch.up(port, way) else {
            return self.drop_datagram(datagram, &counters.dropped_down);
        };
        if too_large {
            return self.drop_datagram(datagram, &counters.dropped_mtu);
        }
        if direction.in_flight_bytes + datagram.length > IN_FLIGHT_BYTES_MAX {
            return self.drop_datagram(datagram, &counters.dropped_queue);
        }
        match direction.bottleneck.offer(at_ns, (datagram.length + self.header_bytes) as u64) {
            Fate::Arrives(due_ns) => {
                direction.in_flight_bytes += datagram.length;
                direction.in_flight.push_back(InFlight { due_ns, port, stretch, flow, datagram });
            }
            Fate::QueueFull => self.drop_datagram(datagram, &counters.dropped_queue),
            Fate::Lost => self.drop_datagram(datagram, &counters.dropped_loss),
        }
    }

    /// Sends all that is due.
    fn deliver(&mut self) {
        let shared = self.shared.clone();
        let limit_ns = self.now_ns() + EARLY_NS;
        while let Some(next) = self.to_target.pop_due(limit_ns) {
            let up = shared.switch.up(next.port, Way::ToTarget) == Some(next.stretch);
            let flow = self.flows.get(&next.flow).filter(|_| up);
            let sent = flow.map(|flow| flow.upstream.send(next.datagram.bytes()));
            self.account(next, sent, up, &shared.to_target);
        }
        while let Some(next) = self.to_client.pop_due(limit_ns) {
            let up = shared.switch.up(next.port, Way::ToClient) == Some(next.stretch);
            let flow = self.flows.get(&next.flow).filter(|_| up);
            let sent = flow.map(|flow| {
                self.ports[flow.port].socket.send_to(next.datagram.bytes(), flow.client)
            });
            self.account(next, sent, up, &shared.to_client);
        }
    }

    fn account(
        &mut self,
        sent: InFlight,
        result: Option<std::io::Result<usize>>,
        up: bool,
        counters: &Counters,
    ) {
        let length = sent.datagram.length as u64;
        match result {
            Some(Ok(_)) => {
                counters.forwarded_bytes.fetch_add(length, Ordering::Relaxed);
                self.drop_datagram(sent.datagram, &counters.forwarded);
            }
            _ if up => self.drop_datagram(sent.datagram, &counters.dropped_host),
            _ => self.drop_datagram(sent.datagram, &counters.dropped_down),
        }
    }

    /// Gives every flow a new socket if the addresses have changed.
    fn follow_addresses(&mut self) {
        let rebinds = self.shared.rebinds.load(Ordering::Acquire);
        if rebinds == self.rebinds {
            return;
        }
        self.rebinds = rebinds;
        for (port, target) in self.ports.iter_mut().zip(self.shared.targets().iter()) {
            port.target = *target;
        }
        // The old sockets live until all new ones exist, so that no address is used again.
        let mut old = Vec::new();
        let ports = &self.ports;
        self.flows.retain(|_, flow| match connect(ports[flow.port].target) {
            Some(upstream) => {
                old.push(std::mem::replace(&mut flow.upstream, upstream));
                true
            }
            None => false,
        });
        let flows = &self.flows;
        self.flow_of_client.retain(|_, id| flows.contains_key(id));
    }

    /// Counts a datagram that is done with, and keeps its buffer.
    fn drop_datagram(&mut self, datagram: Datagram, counter: &std::sync::atomic::AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
        if self.spare.len() * self.payload_max < SPARE_BYTES_MAX {
            self.spare.push(datagram.buffer);
        }
    }

    /// The flow of `client` on `port`, made if need be.
    fn flow(&mut self, port: usize, client: SocketAddr) -> Option<FlowId> {
        let used_ns = self.now_ns();
        if let Some(id) = self.flow_of_client.get(&(port, client)) {
            if let Some(flow) = self.flows.get_mut(id) {
                flow.used_ns = used_ns;
            }
            return Some(*id);
        }
        let target = self.ports[port].target;
        let upstream = connect(target)?;
        if self.flows.len() >= FLOWS_MAX {
            self.forget_oldest_flow();
        }
        self.flows_made += 1;
        let id = self.flows_made;
        self.flows.insert(id, Flow { port, client, upstream, used_ns });
        self.flow_of_client.insert((port, client), id);
        Some(id)
    }

    fn forget_oldest_flow(&mut self) {
        let oldest = self.flows.iter().min_by_key(|(_, flow)| flow.used_ns).map(|(id, _)| *id);
        if let Some(flow) = oldest.and_then(|id| self.flows.remove(&id)) {
            self.flow_of_client.remove(&(flow.port, flow.client));
        }
    }

    fn now_ns(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }
}

impl Direction {
    fn pop_due(&mut self, limit_ns: u64) -> Option<InFlight> {
        let next = self.in_flight.pop_front_if(|next| next.due_ns <= limit_ns)?;
        self.in_flight_bytes -= next.datagram.length;
        Some(next)
    }
}

impl Datagram {
    fn bytes(&self) -> &[u8] {
        &self.buffer[..self.length]
    }
}

/// A socket of any address to `target`.
fn connect(target: SocketAddr) -> Option<UdpSocket> {
    let upstream = open_socket(any_port(target)).and_then(|socket| {
        socket.connect(target)?;
        Ok(socket)
    });
    upstream.map_err(|error| tracing::warn!("the relay cannot reach {target}: {error}")).ok()
}

fn any_port(target: SocketAddr) -> SocketAddr {
    match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

fn to_socket_addr(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|address| SocketAddr::from(*address));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| SocketAddr::from(*address)))
}
