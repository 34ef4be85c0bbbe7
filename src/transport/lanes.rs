//! Which lanes there are, and how their connections are tuned.
//!
//! The numbers were measured with quinn 0.11 on loopback and shaped links; each
//! has its reason beside it.

use super::{error::TransportError, tls::setup};
use quinn::{
    AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt,
    congestion::CubicConfig,
};
use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

/// The most push lanes of a migration.
pub const PUSH_LANES_MAX: usize = 8;

/// The largest UDP payload used. One send carries at most 65,507 bytes, and a
/// payload near that size makes one datagram a send, which is what loopback is fastest with.
pub const UDP_PAYLOAD_MAX: u16 = 65_400;

/// The least that QUIC allows a path to carry, and what connections begin with.
pub const UDP_PAYLOAD_MIN: u16 = 1200;

/// The congestion window to begin with, in bytes, where datagrams are small (RFC 9002).
const INITIAL_WINDOW_MIN: u64 = 14_720;

/// A lane of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Network faults and control; one a migration.
    Urgent,
    /// All other pages; numbered from 0.
    Push(u8),
}

impl Lane {
    /// As two bytes on the wire: kind, index.
    pub(super) fn to_wire(self) -> [u8; 2] {
        match self {
            Self::Urgent => [0, 0],
            Self::Push(index) => [1, index],
        }
    }

    /// The lane that these bytes stand for, if any.
    pub(super) fn from_wire(bytes: [u8; 2]) -> Option<Self> {
        match bytes {
            [0, 0] => Some(Self::Urgent),
            [1, index] if usize::from(index) < PUSH_LANES_MAX => Some(Self::Push(index)),
            _ => None,
        }
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Urgent => f.write_str("urgent"),
            Self::Push(index) => write!(f, "push {index}"),
        }
    }
}

/// How a lane's connections behave. The defaults are right for most links.
#[derive(Clone, Debug)]
pub struct LinkOptions {
    /// The largest UDP payload to try, in bytes, 1,200 to 65,400; `None` takes it
    /// from the MTU of the route to the peer. MTU discovery finds out how much of it the path
    /// takes.
    pub mtu_max: Option<u16>,
    /// After so long without a sign of life the link counts as lost.
    pub idle_timeout: Duration,
    /// Silence after which a side sends a sign of life; well below `idle_timeout`.
    pub keep_alive: Duration,
    /// How long a handshake may take, admission included.
    pub handshake_timeout: Duration,
    /// How long a side that connects waits for the peer's first answer, if that is shorter.
    pub answer_timeout: Duration,
    /// What a round trip is taken for before one was measured: it decides when a hello that was
    /// lost is sent again.
    pub rtt_initial: Duration,
    /// Bytes that a connection takes from its writers beyond what is acknowledged,
    /// to begin with; [`quinn::Connection::set_send_window`] changes it later.
    pub send_window: u64,
    /// Bytes on the way to this side, over all streams of a connection.
    pub receive_window: u32,
    /// Bytes on the way to this side on one stream.
    pub stream_receive_window: u32,
    /// Streams of each kind that the peer may have open at once.
    pub streams_max: u32,
    /// Bytes for each of a UDP socket's two kernel buffers.
    pub socket_buffer: usize,
}

impl Default for LinkOptions {
    fn default() -> Self {
        Self {
            mtu_max: None,
            idle_timeout: Duration::from_millis(1500),
            keep_alive: Duration::from_millis(400),
            handshake_timeout: Duration::from_secs(4),
            answer_timeout: Duration::from_secs(4),
            rtt_initial: Duration::from_millis(100),
            send_window: 4 << 20,
            receive_window: 16 << 20,
            stream_receive_window: 8 << 20,
            streams_max: 64,
            socket_buffer: 4 << 20,
        }
    }
}

impl LinkOptions {
    /// The largest UDP payload to try, where the route has an MTU of `route_mtu`
    /// bytes and the peer's address is `peer`.
    pub(super) fn payload_max(&self, route_mtu: Option<u32>, peer: IpAddr) -> u16 {
        let headers = if peer.to_canonical().is_ipv4() { 28 } else { 48 };
        let from_route = route_mtu.map_or(1452, |mtu| {
            u16::try_from(mtu.saturating_sub(headers)).unwrap_or(UDP_PAYLOAD_MAX)
        });
        self.mtu_max.unwrap_or(from_route).clamp(UDP_PAYLOAD_MIN, UDP_PAYLOAD_MAX)
    }

    /// A connection's parameters, where the path may take datagrams of up to
    /// `payload_max` bytes.
    pub(super) fn transport_config(
        &self,
        payload_max: u16,
    ) -> Result<Arc<TransportConfig>, TransportError> {
        let mut config = TransportConfig::default();

        // Discovery goes up from 1,200: an initial size at or above the congestion
        // controller's initial window would hang the handshake.
        let mut discovery = MtuDiscoveryConfig::default();
        discovery
            .upper_bound(payload_max)
            // A burst of congestion losses is easily mistaken for a black hole, and the size
            // then falls to the least: look again soon, not after quinn's minute.
            .black_hole_cooldown(Duration::from_millis(200));
        config.initial_mtu(UDP_PAYLOAD_MIN).mtu_discovery_config(Some(discovery));

        // The peer's delay of acknowledgements goes into our loss timer: the
        // standard 25 ms would be added to every fault whose answer is lost.
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(1))
            .max_ack_delay(Some(Duration::from_millis(1)));
        config.ack_frequency_config(Some(acks));

        config.initial_rtt(self.rtt_initial);

        // An MTU probe counts against the congestion window. If one alone fills it, all else
        // waits for a round trip, or for the loss timer if the probe is lost, and a close goes
        // unheard.
        let mut cubic = CubicConfig::default();
        cubic.initial_window((4 * u64::from(payload_max)).max(INITIAL_WINDOW_MIN));
        config.congestion_controller_factory(Arc::new(cubic));

        let idle = IdleTimeout::try_from(self.idle_timeout).map_err(setup("the idle timeout"))?;
        config.max_idle_timeout(Some(idle)).keep_alive_interval(Some(self.keep_alive));

        config
            .stream_receive_window(VarInt::from_u32(self.stream_receive_window))
            .receive_window(VarInt::from_u32(self.receive_window))
            .send_window(self.send_window)
            .max_concurrent_bidi_streams(VarInt::from_u32(self.streams_max))
            .max_concurrent_uni_streams(VarInt::from_u32(self.streams_max))
            .datagram_receive_buffer_size(None)
            .allow_spin(false);
        Ok(Arc::new(config))
    }

    /// What an endpoint accepts. quinn's default would limit the peer to 1,472 bytes a datagram.
    pub(super) fn endpoint_config(&self) -> Result<EndpointConfig, TransportError> {
        let mut config = EndpointConfig::default();
        let payload_max =
            self.mtu_max.map_or(UDP_PAYLOAD_MAX, |max| max.clamp(UDP_PAYLOAD_MIN, UDP_PAYLOAD_MAX));
        config.max_udp_payload_size(payload_max).map_err(setup("the datagram size"))?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn lanes_survive_the_wire_and_nothing_else_does() {
        for lane in [Lane::Urgent, Lane::Push(0), Lane::Push(7)] {
            assert_eq!(Lane::from_wire(lane.to_wire()), Some(lane));
        }
        for bytes in [[0, 1], [1, 8], [2, 0]] {
            assert_eq!(Lane::from_wire(bytes), None);
        }
    }

    #[test]
    fn the_datagram_size_follows_route_and_option() {
        let v4 = IpAddr::from(Ipv4Addr::LOCALHOST);
        let v6 = IpAddr::from(Ipv6Addr::LOCALHOST);
        let options = LinkOptions::default();
        assert_eq!(options.payload_max(Some(9000), v4), 8972);
        assert_eq!(options.payload_max(Some(9000), v6), 8952);
        assert_eq!(options.payload_max(Some(65_536), v4), 65_400);
        assert_eq!(options.payload_max(Some(65_536), v6), 65_400);
        assert_eq!(options.payload_max(Some(576), v4), 1200);
        assert_eq!(options.payload_max(None, v4), 1452);
        let fixed = LinkOptions { mtu_max: Some(4000), ..options };
        assert_eq!(fixed.payload_max(Some(9000), v4), 4000);
    }
}
