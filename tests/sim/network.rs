//! The network: connections of several lanes between the two sides.
//!
//! A lane is an ordered and reliable stream, as a QUIC stream is, while the lanes
//! of a connection race each other. A connection can be cut at any time: what is
//! in flight is lost, at once or a little later, and each side notices after a
//! while of its own.

use crate::random::Random;
use std::collections::HashMap;
use std::time::Duration;

/// A connection that is silent for so long is given up, in microseconds.
pub const IDLE_MAX: u64 = 1_600_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    Source,
    Destination,
}

impl Side {
    pub fn peer(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    Control,
    /// Requests one way and their answers the other; one for each vCPU and one for
    /// faults of no vCPU.
    Demand(u16),
    Push(u16),
}

/// What a lane carries.
#[derive(Clone, Debug)]
pub enum Packet {
    /// A control message: its length and its body.
    Message(Vec<u8>),
    /// A page frame: its header, and for its content the version of each page.
    Frame([u8; 24], Vec<u64>),
    Request([u8; 24]),
    /// The sender closed the connection in good order.
    Close,
}

/// Names a connection.
pub type ConnectionId = usize;

#[derive(Debug, Default)]
struct Connection {
    epoch: u32,
    /// When the last packet of each lane and direction arrives.
    busy_until: HashMap<(Lane, Side), Duration>,
    /// Nothing arrives at that side from that time on.
    cut: HashMap<Side, Duration>,
    /// Lanes that are lost by themselves, either way, from that time on.
    lanes_cut: HashMap<Lane, Duration>,
    /// Sides that know that it is gone, or have closed it.
    gone: Vec<Side>,
}

/// All connections that there ever were.
#[derive(Debug)]
pub struct Network {
    connections: Vec<Connection>,
    random: Random,
    /// The longest time under way, in microseconds.
    delay_max: u64,
    /// No connection can be made before.
    pub outage_until: Duration,
}

impl Network {
    pub fn new(mut random: Random) -> Self {
        let delay_max = random.pick(&[50, 500, 5_000, 20_000]);
        Self { connections: Vec::new(), random, delay_max, outage_until: Duration::ZERO }
    }

    /// A new connection of a link epoch.
    pub fn connect(&mut self, epoch: u32) -> ConnectionId {
        self.connections.push(Connection { epoch, ..Connection::default() });
        self.connections.len() - 1
    }

    pub fn epoch(&self, connection: ConnectionId) -> u32 {
        self.connections[connection].epoch
    }

    /// How long a handshake, or its failure, takes.
    pub fn handshake(&mut self) -> Duration {
        self.random.micros(20, 3 * self.delay_max)
    }

    /// When a packet that is sent now arrives at `to`; `None` if it is lost.
    pub fn send(
        &mut self,
        now: Duration,
        connection: ConnectionId,
        lane: Lane,
        to: Side,
    ) -> Option<Duration> {
        let state = &mut self.connections[connection];
        let lost = state.cut.contains_key(&to) || state.lanes_cut.contains_key(&lane);
        if state.gone.contains(&to.peer()) || lost {
            return None;
        }
        // Now and then a packet is lost and sent again.
        let slow = if self.random.percent(3) { 10 } else { 1 };
        let at = now + self.random.micros(1, slow * self.delay_max);
        let last = state.busy_until.entry((lane, to)).or_default();
        *last = at.max(*last + Duration::from_micros(1));
        Some(*last)
    }

    /// Whether a packet that is due now reaches `to`.
    pub fn arrives(&self, now: Duration, connection: ConnectionId, lane: Lane, to: Side) -> bool {
        let state = &self.connections[connection];
        let in_time = |cut: Option<&Duration>| cut.is_none_or(|cut| now < *cut);
        let whole = in_time(state.cut.get(&to)) && in_time(state.lanes_cut.get(&lane));
        whole && !state.gone.contains(&to)
    }

    /// Whether `side` can still use the connection as far as it knows.
    pub fn usable(&self, connection: ConnectionId, side: Side) -> bool {
        !self.connections[connection].gone.contains(&side)
    }

    /// Whether nothing has cut the connection.
    pub fn is_whole(&self, connection: ConnectionId) -> bool {
        let state = &self.connections[connection];
        state.gone.is_empty() && state.cut.is_empty() && state.lanes_cut.is_empty()
    }

    /// `side` notices, or decides, that the connection is over.
    pub fn give_up(&mut self, connection: ConnectionId, side: Side) {
        let gone = &mut self.connections[connection].gone;
        if !gone.contains(&side) {
            gone.push(side);
        }
    }

    /// The destination is dead: what it has sent does not arrive any more.
    pub fn silence(&mut self, now: Duration, connection: ConnectionId) {
        self.give_up(connection, Side::Destination);
        self.connections[connection].cut.insert(Side::Source, now);
    }

    /// From now on `deaf` hears nothing, but is heard: it notices by its silence, and goes
    /// silent by that, which its peer then notices. Returns when each does.
    pub fn cut_towards(
        &mut self,
        now: Duration,
        connection: ConnectionId,
        deaf: Side,
    ) -> [(Side, Duration); 2] {
        self.connections[connection].cut.entry(deaf).or_insert(now);
        let deaf_notices = now + self.random.micros(1_000_000, IDLE_MAX);
        let peer_notices = deaf_notices + self.random.micros(0, IDLE_MAX);
        [(deaf, deaf_notices), (deaf.peer(), peer_notices)]
    }

    /// Loses one lane, and all that is on its way there; a side that notices gives up
    /// the whole connection.
    pub fn cut_lane(
        &mut self,
        now: Duration,
        connection: ConnectionId,
        lane: Lane,
    ) -> [(Side, Duration); 2] {
        self.connections[connection].lanes_cut.entry(lane).or_insert(now);
        [Side::Source, Side::Destination]
            .map(|side| (side, now + self.random.micros(1_000, IDLE_MAX)))
    }

    /// Cuts the connection; returns when each side will notice.
    pub fn cut(&mut self, now: Duration, connection: ConnectionId) -> [(Side, Duration); 2] {
        [Side::Source, Side::Destination].map(|side| {
            // Some of what is under way may still get through one way.
            let grace = if self.random.percent(30) { 4 * self.delay_max } else { 0 };
            let cut = now + self.random.micros(0, grace);
            self.connections[connection].cut.entry(side).or_insert(cut);
            // A closed socket is noticed at once, a silent one by the idle timeout.
            let notice_max = self.random.pick(&[100, 20_000, IDLE_MAX]);
            (side, cut.max(now + self.random.micros(0, notice_max)))
        })
    }
}
