//! Binding, connecting, admitting and closing.
//!
//! A connection is handed out only when both sides are sure of each other: TLS lets
//! a client go on before the server has looked at its certificate, so the
//! server opens each connection with a two-byte greeting that names its lane, and
//! [`connect`] waits for it. Handshakes run side by side and are limited in number and time:
//! clients that are wrong, slow or silent neither stop nor delay the right one.

use super::{
    error::{REASON_BYTES_MAX, TransportError},
    lanes::{Lane, LinkOptions, PUSH_LANES_MAX},
    resolve::resolve,
    socket::{CappedSocket, enlarge_buffers, route_mtu},
    ticket::Ticket,
    tls::{self, Identity, SERVER_NAME, setup},
};
use quinn::{
    ClientConfig, Connection, Endpoint, Incoming, ReadError, ReadExactError, ServerConfig, Side,
    TokioRuntime, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};
use tokio::{task::JoinSet, time::timeout};

/// The most handshakes under way on a listening endpoint; further hellos are dropped and come
/// again.
const HANDSHAKES_MAX: usize = 32;

/// From so many on, a client must first prove that its address is its own, so
/// that forged senders cannot use the places up.
const HANDSHAKES_UNPROVEN_MAX: usize = 8;

/// Hellos waiting to be looked at, and bytes that may come behind them.
const INCOMING_MAX: usize = 64;
const INCOMING_BYTES_MAX: u64 = 64 << 10;
const INCOMING_BYTES_TOTAL_MAX: u64 = 1 << 20;

/// How long a closing side waits for the peer to have heard of it.
const CLOSE_WAIT: Duration = Duration::from_millis(500);

/// Application close code for the wrong lane behind a port.
const CLOSE_WRONG_LANE: VarInt = VarInt::from_u32(0x7067);

/// A lane's connection and the endpoint that drives it.
///
/// Both belong to the lane's runtime; the connection's streams may be used elsewhere.
#[derive(Clone, Debug)]
pub struct Link {
    /// The connection, authenticated by both sides.
    pub connection: Connection,
    /// The endpoint that it runs on.
    pub endpoint: Endpoint,
    /// The lane that it is for.
    pub lane: Lane,
}

impl Link {
    /// Closes the connection with an application's `code` and `reason` (cut to 256
    /// bytes) and gives the peer half a second to hear of it. What was written and not yet
    /// acknowledged may be lost: agree on the end first.
    ///
    /// With bulk data under way the congestion window also holds the close back, for
    /// good: the peer then learns of it by a reset or the idle timeout. Give reasons on the
    /// urgent lane, and close it last.
    pub async fn close(&self, code: u32, reason: &str) {
        let reason = &reason.as_bytes()[..reason.len().min(REASON_BYTES_MAX)];
        self.connection.close(VarInt::from_u32(code), reason);
        let _ = timeout(CLOSE_WAIT, self.endpoint.wait_idle()).await;
    }
}

/// A bound UDP port that nobody reads yet. Unlike an endpoint it needs no
/// runtime, so all ports of a ticket can be had before the lanes' threads start.
#[derive(Debug)]
pub struct LaneSocket {
    socket: UdpSocket,
    local: SocketAddr,
}

impl LaneSocket {
    /// Binds `addr`; port 0 takes any free one.
    ///
    /// # Errors
    /// [`TransportError::PortInUse`], or [`TransportError::Bind`] for other reasons.
    pub fn bind(addr: SocketAddr, options: &LinkOptions) -> Result<Self, TransportError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => TransportError::PortInUse { addr },
            _ => TransportError::Bind { addr, source },
        };
        let socket = UdpSocket::bind(addr).map_err(failed)?;
        let local = socket.local_addr().map_err(failed)?;
        enlarge_buffers(&socket, options.socket_buffer);
        Ok(Self { socket, local })
    }

    /// The address that it is bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }
}

/// Binds the ports of a ticket on `ip`: the urgent lane's first, then those of
/// `push_lanes` (1 to 8) push lanes; consecutive from `first_port`, or any free ones if it is 0.
///
/// # Errors
/// As [`LaneSocket::bind`]; [`TransportError::Setup`] for a number of lanes or
/// ports out of range.
pub fn bind_ports(
    ip: IpAddr,
    first_port: u16,
    push_lanes: usize,
    options: &LinkOptions,
) -> Result<Vec<LaneSocket>, TransportError> {
    let range_error = |detail: &str| setup("the list of ports")(detail.to_owned());
    if !(1..=PUSH_LANES_MAX).contains(&push_lanes) {
        return Err(range_error("there must be 1 to 8 push lanes"));
    }
    (0..=push_lanes)
        .map(|index| {
            let offset = if first_port == 0 { 0 } else { index as u16 };
            let port =
                first_port.checked_add(offset).ok_or_else(|| range_error("above port 65535"))?;
            LaneSocket::bind(SocketAddr::new(ip, port), options)
        })
        .collect()
}

/// A lane's listening endpoint.
#[derive(Debug)]
pub struct LaneServer {
    endpoint: Endpoint,
    socket: Arc<CappedSocket>,
    identity: Identity,
    lane: Lane,
    options: LinkOptions,
    config: ServerConfig,
    handshakes: JoinSet<Result<Connection, TransportError>>,
    refused: u64,
}

/// Binds `addr` and listens there for `lane`. Must be called on the lane's runtime.
///
/// # Errors
/// As [`LaneSocket::bind`] and [`LaneServer::listen`].
pub fn bind_server(
    addr: SocketAddr,
    identity: &Identity,
    lane: Lane,
    options: LinkOptions,
) -> Result<LaneServer, TransportError> {
    LaneServer::listen(LaneSocket::bind(addr, &options)?, identity, lane, options)
}

impl LaneServer {
    /// Listens on `socket` for who holds `identity`'s ticket. Must be called on the lane's runtime.
    ///
    /// # Errors
    /// [`TransportError::Setup`] or [`TransportError::Io`] if the endpoint cannot be made.
    pub fn listen(
        socket: LaneSocket,
        identity: &Identity,
        lane: Lane,
        options: LinkOptions,
    ) -> Result<Self, TransportError> {
        let crypto =
            QuicServerConfig::try_from(identity.server_config()?).map_err(setup("TLS for QUIC"))?;
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config
            .max_incoming(INCOMING_MAX)
            .incoming_buffer_size(INCOMING_BYTES_MAX)
            .incoming_buffer_size_total(INCOMING_BYTES_TOTAL_MAX);
        let (endpoint, socket) = endpoint(
            socket.socket,
            options.payload_max(None, socket.local.ip()),
            &options,
            Some(config.clone()),
        )?;
        Ok(Self {
            endpoint,
            socket,
            identity: identity.clone(),
            lane,
            options,
            config,
            handshakes: JoinSet::new(),
            refused: 0,
        })
    }

    /// The endpoint, for its address and statistics.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// How many clients were turned away or gave up in their handshake so far.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Waits for the next client that holds the ticket. All others are turned
    /// away on the way; each is reported through `tracing` and counted.
    ///
    /// Cancel-safe: handshakes under way go on with the next call. Call it again
    /// for the connections that a recovery opens.
    ///
    /// # Errors
    /// [`TransportError::ClosedHere`] once the endpoint is closed.
    pub async fn accept(&mut self) -> Result<Link, TransportError> {
        loop {
            tokio::select! {
                Some(finished) = self.handshakes.join_next() => match finished {
                    Ok(Ok(connection)) => {
                        self.identity.mark_admitted();
                        let endpoint = self.endpoint.clone();
                        return Ok(Link { connection, endpoint, lane: self.lane });
                    }
                    Ok(Err(error)) => {
                        self.refused += 1;
                        tracing::info!(lane = %self.lane, "{error}");
                    }
                    Err(error) => {
                        self.refused += 1;
                        tracing::error!(lane = %self.lane, "a handshake's task failed: {error}");
                    }
                },
                incoming = self.endpoint.accept() => match incoming {
                    Some(incoming) => self.consider(incoming),
                    None => return Err(TransportError::ClosedHere),
                },
            }
        }
    }

    fn consider(&mut self, incoming: Incoming) {
        let under_way = self.handshakes.len();
        if under_way >= HANDSHAKES_MAX {
            incoming.ignore();
            return;
        }
        if under_way >= HANDSHAKES_UNPROVEN_MAX && !incoming.remote_address_validated() {
            // May only fail for a client that has proven its address.
            let _ = incoming.retry();
            return;
        }
        match self.config_for(incoming.remote_address()) {
            Ok(config) => {
                let (lane, limit) = (self.lane, self.options.handshake_timeout);
                self.handshakes.spawn(admit(incoming, config, lane, limit));
            }
            Err(error) => {
                tracing::error!(lane = %self.lane, "{error}");
                incoming.refuse();
            }
        }
    }

    /// The parameters for a client at `peer`: the route to it sets the largest datagram.
    fn config_for(&self, peer: SocketAddr) -> Result<Arc<ServerConfig>, TransportError> {
        let payload_max = self.options.payload_max(route_mtu(peer), peer.ip());
        self.socket.raise_payload_max(payload_max);
        let mut config = self.config.clone();
        config.transport_config(self.options.transport_config(payload_max)?);
        Ok(Arc::new(config))
    }
}

/// The server's side of one handshake, and the greeting.
async fn admit(
    incoming: Incoming,
    config: Arc<ServerConfig>,
    lane: Lane,
    limit: Duration,
) -> Result<Connection, TransportError> {
    let peer = incoming.remote_address();
    let failed = |error| TransportError::from_handshake(error, Side::Server, peer, limit);
    let handshake = async {
        let connection = incoming.accept_with(config).map_err(failed)?.await.map_err(failed)?;
        let mut greeting = connection.open_uni().await.map_err(failed)?;
        greeting.write_all(&lane.to_wire()).await?;
        greeting.finish().map_err(|_| TransportError::ClosedHere)?;
        Ok(connection)
    };
    timeout(limit, handshake).await.unwrap_or(Err(TransportError::NotAdmitted {
        peer,
        reason: format!("its handshake took longer than {} ms", limit.as_millis()),
    }))
}

/// Connects `lane` to the peer that `ticket` names, from a port and endpoint of
/// its own. Must be called on the lane's runtime. One attempt; retrying, after a lost link or
/// before the peer is up, is the caller's.
///
/// # Errors
/// [`TransportError::TicketRefused`], [`TicketExpired`](TransportError::TicketExpired),
/// [`WrongPeer`](TransportError::WrongPeer), [`NotOurProtocol`](TransportError::NotOurProtocol),
/// [`WrongLane`](TransportError::WrongLane),
/// [`HandshakeTimeout`](TransportError::HandshakeTimeout),
/// [`Resolve`](TransportError::Resolve), or a failure to set up.
pub async fn connect(
    ticket: &Ticket,
    lane: Lane,
    options: &LinkOptions,
) -> Result<Link, TransportError> {
    let port = ticket.port(lane).ok_or_else(|| TransportError::NoSuchLane {
        lane: lane.to_string(),
        push_ports: ticket.push_lanes(),
    })?;
    let crypto =
        QuicClientConfig::try_from(tls::client_config(ticket)?).map_err(setup("TLS for QUIC"))?;
    let crypto = Arc::new(crypto);

    let mut result = Err(TransportError::Resolve {
        host: ticket.host().to_string(),
        source: io::ErrorKind::NotFound.into(),
    });
    for peer in resolve(ticket.host(), port, options.handshake_timeout).await? {
        result = connect_to(peer, crypto.clone(), lane, options).await;
        // Only silence says that the host may be found at another of its addresses.
        if !matches!(result, Err(TransportError::HandshakeTimeout { .. })) {
            break;
        }
    }
    result
}

async fn connect_to(
    peer: SocketAddr,
    crypto: Arc<QuicClientConfig>,
    lane: Lane,
    options: &LinkOptions,
) -> Result<Link, TransportError> {
    let any: IpAddr =
        if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let local = LaneSocket::bind(SocketAddr::new(any, 0), options)?;
    let payload_max = options.payload_max(route_mtu(peer), peer.ip());
    let (endpoint, _) = endpoint(local.socket, payload_max, options, None)?;
    let mut config = ClientConfig::new(crypto);
    config.transport_config(options.transport_config(payload_max)?);

    let limit = options.handshake_timeout;
    let failed = |error| TransportError::from_handshake(error, Side::Client, peer, limit);
    let handshake = async {
        let mut connecting =
            endpoint.connect_with(config, peer, SERVER_NAME).map_err(setup("a connection"))?;
        let after = options.answer_timeout;
        timeout(after, connecting.handshake_data())
            .await
            .map_err(|_| TransportError::HandshakeTimeout { peer, after })?
            .map_err(failed)?;
        let connection = connecting.await.map_err(failed)?;
        let mut greeting = connection.accept_uni().await.map_err(failed)?;
        let mut found = [0; 2];
        greeting.read_exact(&mut found).await.map_err(|error| match error {
            ReadExactError::ReadError(ReadError::ConnectionLost(error)) => failed(error),
            other => TransportError::NotOurProtocol { peer, detail: other.to_string() },
        })?;
        Ok((connection, Lane::from_wire(found)))
    };
    let (connection, found) = timeout(limit, handshake)
        .await
        .unwrap_or(Err(TransportError::HandshakeTimeout { peer, after: limit }))?;
    if found != Some(lane) {
        connection.close(CLOSE_WRONG_LANE, b"another lane was expected at this port");
        let _ = timeout(CLOSE_WAIT, endpoint.wait_idle()).await;
        return Err(TransportError::WrongLane {
            peer,
            wanted: lane.to_string(),
            found: found.map_or_else(|| "unknown".to_owned(), |found| found.to_string()),
        });
    }
    Ok(Link { connection, endpoint, lane })
}

fn endpoint(
    socket: UdpSocket,
    payload_max: u16,
    options: &LinkOptions,
    server: Option<ServerConfig>,
) -> Result<(Endpoint, Arc<CappedSocket>), TransportError> {
    let failed = |source| TransportError::Io { what: "set up a lane's socket", source };
    let config = options.endpoint_config()?;
    let receive_max = config.get_max_udp_payload_size().try_into().unwrap_or(u16::MAX);
    let socket = CappedSocket::wrap(socket, payload_max, receive_max).map_err(failed)?;
    let endpoint =
        Endpoint::new_with_abstract_socket(config, server, socket.clone(), Arc::new(TokioRuntime))
            .map_err(failed)?;
    Ok((endpoint, socket))
}
