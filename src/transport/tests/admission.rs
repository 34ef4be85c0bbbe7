//! Who gets in. Each refusal is checked on both sides: the client gets an error that
//! names the reason, and the server counts a refusal and hands out no connection.

use super::{super::*, Watchdog, in_an_hour, loopback, urgent_server};
use crate::transport::{
    lanes::UDP_PAYLOAD_MAX,
    ticket::{Host, Secret},
    tls,
};
use quinn::{
    ClientConfig, Connection, Endpoint,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use std::{net::UdpSocket, sync::Arc, time::Duration};

/// Connects with `ticket`, while `server` goes on accepting; who gets in first wins.
async fn attempt(
    server: &mut LaneServer,
    ticket: &Ticket,
    options: &LinkOptions,
) -> Result<Link, TransportError> {
    let client = connect(ticket, Lane::Urgent, options);
    tokio::pin!(client);
    let mut admitted = None;
    loop {
        tokio::select! {
            link = server.accept() => admitted = Some(link.unwrap()),
            result = &mut client => {
                assert_eq!(result.is_ok(), admitted.is_some(), "both sides agree: {result:?}");
                return result;
            }
        }
    }
}

/// Lets the server finish what it has begun, until it has turned `count` clients away.
async fn refusals(server: &mut LaneServer, count: u64) {
    while server.refused() < count {
        let more = tokio::time::timeout(Duration::from_millis(5), server.accept()).await;
        assert!(more.is_err(), "nobody must be admitted: {more:?}");
    }
    assert_eq!(server.refused(), count);
}

#[tokio::test]
async fn the_ticket_lets_in_and_both_sides_know_each_other() {
    let _watchdog = Watchdog::seconds(20);
    let identity = Identity::generate(in_an_hour()).unwrap();
    let options = LinkOptions::default();
    let (mut server, ticket) = urgent_server(&identity, &options);
    // As it goes from host to host: as a line of text.
    let ticket: Ticket = ticket.to_string().parse().unwrap();

    let (accepted, link) = tokio::join!(server.accept(), connect(&ticket, Lane::Urgent, &options));
    let (accepted, link) = (accepted.unwrap(), link.unwrap());
    assert_eq!((accepted.lane, link.lane), (Lane::Urgent, Lane::Urgent));
    assert_eq!(server.refused(), 0);
    for connection in [&accepted.connection, &link.connection] {
        let identity = connection.peer_identity().expect("the peer has a certificate");
        let chain = identity.downcast::<Vec<rustls::pki_types::CertificateDer<'_>>>().unwrap();
        assert_eq!(chain.len(), 1);
        let handshake = connection.handshake_data().unwrap();
        let handshake = handshake.downcast::<quinn::crypto::rustls::HandshakeData>().unwrap();
        assert_eq!(handshake.protocol.as_deref(), Some(tls::ALPN));
    }

    // What the application says on closing arrives bounded and printable.
    let reason = format!("all done\n{}", "x".repeat(1000));
    let (reported, ()) = tokio::join!(accepted.connection.closed(), link.close(7, &reason));
    let reported = TransportError::from(reported);
    let TransportError::PeerClosed { code: 7, reason } = &reported else { panic!("{reported:?}") };
    assert!(reason.starts_with("all done?xxx") && reason.len() == 256, "{reason}");
}

#[tokio::test]
async fn another_secret_is_refused() {
    let _watchdog = Watchdog::seconds(20);
    let identity = Identity::generate(in_an_hour()).unwrap();
    let options = LinkOptions::default();
    let (mut server, good) = urgent_server(&identity, &options);
    let port = good.port(Lane::Urgent).unwrap();
    let mut secret = *good.secret().expose();
    secret[31] ^= 1;
    let forged = Ticket::new(
        good.host().clone(),
        port,
        vec![port],
        *identity.fingerprint(),
        Secret::new(secret),
        good.expires(),
    )
    .unwrap();

    let error = attempt(&mut server, &forged, &options).await.unwrap_err();
    assert!(matches!(error, TransportError::TicketRefused), "{error:?}");
    refusals(&mut server, 1).await;
    attempt(&mut server, &good, &options).await.unwrap();
}

#[tokio::test]
async fn another_server_is_refused_by_the_client() {
    let _watchdog = Watchdog::seconds(20);
    let options = LinkOptions::default();
    let imposter = Identity::generate(in_an_hour()).unwrap();
    let (mut server, ticket_of_imposter) = urgent_server(&imposter, &options);
    let real = Identity::generate(in_an_hour()).unwrap();
    let port = ticket_of_imposter.port(Lane::Urgent).unwrap();
    let ticket = real.ticket(loopback().ip(), port, vec![port]).unwrap();

    let error = attempt(&mut server, &ticket, &options).await.unwrap_err();
    assert!(matches!(error, TransportError::WrongPeer { .. }), "{error:?}");
    refusals(&mut server, 1).await;
}

#[tokio::test]
async fn an_expired_ticket_is_refused_unless_its_peer_was_in_before() {
    let _watchdog = Watchdog::seconds(20);
    let options = LinkOptions::default();
    let expired = Identity::generate(1_000_000_000).unwrap();
    let (mut server, ticket) = urgent_server(&expired, &options);
    let error = attempt(&mut server, &ticket, &options).await.unwrap_err();
    assert!(matches!(error, TransportError::TicketExpired), "{error:?}");
    refusals(&mut server, 1).await;

    expired.mark_admitted();
    attempt(&mut server, &ticket, &options).await.unwrap();
}

/// A QUIC client or server with one thing changed, as a stranger would have it.
async fn raw_client(config: rustls::ClientConfig, ticket: &Ticket) -> quinn::ConnectionError {
    let endpoint = Endpoint::client(loopback()).unwrap();
    let crypto = QuicClientConfig::try_from(config).unwrap();
    let port = ticket.port(Lane::Urgent).unwrap();
    let connecting = endpoint
        .connect_with(
            ClientConfig::new(Arc::new(crypto)),
            (loopback().ip(), port).into(),
            tls::SERVER_NAME,
        )
        .unwrap();
    match connecting.await {
        Err(error) => error,
        // TLS lets a client go on before the server has judged it; nothing may come of it.
        Ok(connection) => nothing_then_closed(connection).await,
    }
}

async fn nothing_then_closed(connection: Connection) -> quinn::ConnectionError {
    tokio::select! {
        stream = connection.accept_uni() => stream.expect_err("the server must open no stream"),
        stream = connection.accept_bi() => stream.map(drop).expect_err("the server must open no stream"),
    }
}

async fn raw_attempt(
    server: &mut LaneServer,
    config: rustls::ClientConfig,
    ticket: &Ticket,
) -> quinn::ConnectionError {
    let client = raw_client(config, ticket);
    let accept = async { panic!("admitted: {:?}", server.accept().await) };
    tokio::select! {
        error = client => error,
        never = accept => never,
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let _watchdog = Watchdog::seconds(20);
    let identity = Identity::generate(in_an_hour()).unwrap();
    let options = LinkOptions::default();
    let (mut server, ticket) = urgent_server(&identity, &options);
    let mut config = tls::client_config(&ticket).unwrap();
    config.client_auth_cert_resolver = Arc::new(NoCertificate);

    let error = raw_attempt(&mut server, config, &ticket).await;
    assert!(matches!(&error, quinn::ConnectionError::ConnectionClosed(_)), "{error:?}");
    let error = TransportError::from(error);
    assert!(matches!(error, TransportError::TicketRefused), "{error:?}");
    refusals(&mut server, 1).await;
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _hints: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// A certificate can be copied by anybody who saw it; the signature cannot.
#[tokio::test]
async fn a_copied_certificate_without_its_key_is_refused() {
    let _watchdog = Watchdog::seconds(20);
    let identity = Identity::generate(in_an_hour()).unwrap();
    let options = LinkOptions::default();
    let (mut server, ticket) = urgent_server(&identity, &options);
    let real = tls::client_config(&ticket).unwrap();
    let mut thief = tls::client_config(&ticket).unwrap();
    let schemes = [rustls::SignatureScheme::ED25519];
    let stolen = real.client_auth_cert_resolver.resolve(&[], &schemes).unwrap();
    let other_key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let other_key = rustls::pki_types::PrivatePkcs8KeyDer::from(other_key.serialize_der());
    let signer = rustls::crypto::ring::sign::any_eddsa_type(&other_key).unwrap();
    // Without the check that rustls does on our behalf when key and certificate are loaded.
    thief.client_auth_cert_resolver =
        Arc::new(Stolen(Arc::new(rustls::sign::CertifiedKey::new(stolen.cert.clone(), signer))));

    let error = raw_attempt(&mut server, thief, &ticket).await;
    assert!(matches!(&error, quinn::ConnectionError::ConnectionClosed(_)), "{error:?}");
    refusals(&mut server, 1).await;
}

#[derive(Debug)]
struct Stolen(Arc<rustls::sign::CertifiedKey>);

impl rustls::client::ResolvesClientCert for Stolen {
    fn resolve(
        &self,
        _hints: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn another_application_is_refused_by_name() {
    let _watchdog = Watchdog::seconds(20);
    let identity = Identity::generate(in_an_hour()).unwrap();
    let options = LinkOptions::default();

    // A client of another application at our server.
    let (mut server, ticket) = urgent_server(&identity, &options);
    for protocols in [vec![b"h3".to_vec()], vec![b"postcopy/2".to_vec()], vec![]] {
        let refused = server.refused();
        let mut config = tls::client_config(&ticket).unwrap();
        config.alpn_protocols = protocols;
        raw_attempt(&mut server, config, &ticket).await;
        refusals(&mut server, refused + 1).await;
    }

    // Our client at a server of another application.
    let mut config = identity.server_config().unwrap();
    config.alpn_protocols = vec![b"h3".to_vec()];
    let crypto = QuicServerConfig::try_from(config).unwrap();
    let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let other = Endpoint::server(config, loopback()).unwrap();
    let port = other.local_addr().unwrap().port();
    let ticket = ticket.with_address(loopback().ip().into(), port, vec![port]).unwrap();
    let serve = async {
        while let Some(hello) = other.accept().await {
            let _ = hello.accept();
        }
    };
    let error = tokio::select! {
        result = connect(&ticket, Lane::Urgent, &options) => result.unwrap_err(),
        () = serve => panic!("the other server stopped"),
    };
    assert!(matches!(error, TransportError::NotOurProtocol { .. }), "{error:?}");
}

#[tokio::test]
async fn a_silent_peer_times_out_and_other_lanes_are_told_apart() {
    let _watchdog = Watchdog::seconds(20);
    let options =
        LinkOptions { handshake_timeout: Duration::from_millis(300), ..LinkOptions::default() };
    let identity = Identity::generate(in_an_hour()).unwrap();
    let silent = UdpSocket::bind(loopback()).unwrap();
    let port = silent.local_addr().unwrap().port();
    let ticket = identity.ticket(loopback().ip(), port, vec![port]).unwrap();
    let error = connect(&ticket, Lane::Urgent, &options).await.unwrap_err();
    assert!(matches!(error, TransportError::HandshakeTimeout { .. }), "{error:?}");
    assert!(error.is_link_loss());

    let error = connect(&ticket, Lane::Push(1), &options).await.unwrap_err();
    assert!(matches!(error, TransportError::NoSuchLane { .. }), "{error:?}");

    let (mut server, ticket) = urgent_server(&identity, &options);
    let (_, error) = tokio::join!(server.accept(), connect(&ticket, Lane::Push(0), &options));
    let error = error.unwrap_err();
    assert!(matches!(error, TransportError::WrongLane { .. }), "{error:?}");
    assert!(error.to_string().contains("serves the urgent lane, not the push 0 lane"), "{error}");
}

#[tokio::test]
async fn a_name_is_resolved_and_an_unknown_one_named() {
    let _watchdog = Watchdog::seconds(30);
    let identity = Identity::generate(in_an_hour()).unwrap();
    let options = LinkOptions::default();
    let (mut server, ticket) = urgent_server(&identity, &options);
    let port = ticket.port(Lane::Urgent).unwrap();
    let named = |name: &str| ticket.with_address(name.parse::<Host>().unwrap(), port, vec![port]);
    attempt(&mut server, &named("localhost").unwrap(), &options).await.unwrap();

    let error =
        connect(&named("no-such-host.invalid").unwrap(), Lane::Urgent, &options).await.unwrap_err();
    assert!(matches!(error, TransportError::Resolve { .. }), "{error:?}");
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let options = LinkOptions::default();
    let ports = bind_ports(loopback().ip(), 0, 2, &options).unwrap();
    assert_eq!(ports.len(), 3);
    let taken = ports[0].local_addr();
    let error = LaneSocket::bind(taken, &options).unwrap_err();
    assert!(matches!(error, TransportError::PortInUse { addr } if addr == taken), "{error:?}");
    assert!(error.to_string().contains(&taken.port().to_string()));

    for lanes in [0, PUSH_LANES_MAX + 1] {
        assert!(matches!(
            bind_ports(loopback().ip(), 0, lanes, &options),
            Err(TransportError::Setup { .. })
        ));
    }
    assert!(bind_ports(loopback().ip(), 65_535, 1, &options).is_err());
    // An address of nobody here is another error than a taken port.
    let elsewhere = LaneSocket::bind("192.0.2.1:0".parse().unwrap(), &options).unwrap_err();
    assert!(matches!(elsewhere, TransportError::Bind { .. }), "{elsewhere:?}");
}

#[tokio::test]
async fn garbage_neither_kills_nor_stalls_a_server() {
    let _watchdog = Watchdog::seconds(30);
    let identity = Identity::generate(in_an_hour()).unwrap();
    let options = LinkOptions::default();
    let (mut server, ticket) = urgent_server(&identity, &options);
    let target = server.endpoint().local_addr().unwrap();

    // Bytes of all lengths and first bytes, seeded; an HTTP request; half a hello.
    use rand::{RngCore, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(7);
    let noise = UdpSocket::bind(loopback()).unwrap();
    for length in (0..1500).step_by(13).chain([8972, usize::from(UDP_PAYLOAD_MAX)]) {
        let mut bytes = vec![0; length];
        rng.fill_bytes(&mut bytes);
        noise.send_to(&bytes, target).unwrap();
    }
    noise.send_to(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", target).unwrap();
    // A version of QUIC that nobody speaks, padded as a hello is.
    let mut unknown_version = vec![0; 1200];
    unknown_version[..6].copy_from_slice(&[0xc0, 0x1a, 0x2a, 0x3a, 0x4a, 8]);
    noise.send_to(&unknown_version, target).unwrap();

    // More clients than there are places, each of which says hello and goes away.
    for _ in 0..40 {
        let endpoint = Endpoint::client(loopback()).unwrap();
        let crypto = QuicClientConfig::try_from(tls::client_config(&ticket).unwrap()).unwrap();
        let config = ClientConfig::new(Arc::new(crypto));
        let connecting = endpoint.connect_with(config, target, tls::SERVER_NAME).unwrap();
        // One poll of the endpoint's driver sends the hello; then nobody is there any more.
        let gone = tokio::time::timeout(Duration::from_millis(1), connecting).await;
        drop((gone, endpoint));
    }

    // And one of another application, while the right client comes.
    let mut config = tls::client_config(&ticket).unwrap();
    config.alpn_protocols = vec![b"h3".to_vec()];
    raw_attempt(&mut server, config, &ticket).await;

    // Those who went may have finished their handshake before: what counts is that
    // the right client is served, and soon.
    let accept_all = async {
        let mut links = Vec::new();
        loop {
            links.push(server.accept().await.unwrap());
        }
    };
    let link = tokio::select! {
        result = connect(&ticket, Lane::Urgent, &options) => result.unwrap(),
        () = accept_all => unreachable!(),
    };
    assert!(link.connection.close_reason().is_none());
}
