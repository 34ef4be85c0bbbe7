//! Wrong, used and expired tickets, and strangers at the port: nobody gets in, nobody
//! who may is kept out, and the guest runs on.

use super::fakes::{FakeDestination, forged};
use super::harness::{Guest, MIGRATION, Receiver, Running, SOON, check_report, read_report};
use postcopy::proto::message;
use postcopy::transport::{Lane, Ticket};
use quinn::crypto::rustls::QuicClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, Error, SignatureScheme};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

const RUNS_ON: &str = "the guest runs on here";

#[test]
fn a_wrong_ticket_lets_nobody_in_and_spoils_nothing() {
    let guest = Guest::start();
    let receiver = Receiver::start();
    let ticket = receiver.ticket.clone();
    let mut other_character = ticket.clone();
    let last = other_character.pop().expect("a ticket");
    other_character.push(if last == '0' { '1' } else { '0' });
    let unreadable = [
        ("", "this is not a ticket"),
        ("password", "this is not a ticket"),
        ("postcopy1:", "the ticket is cut off"),
        (&ticket[..ticket.len() / 2], "the ticket is cut off"),
        (&ticket[..ticket.len() - 1], "the ticket is cut off"),
        (&other_character, "the ticket has a typing or copying error"),
        (&ticket.replacen("postcopy1", "postcopy2", 1), "this ticket has version 2"),
        (&"x".repeat(100_000), "this is not a ticket"),
    ];
    for (wrong, why) in unreadable {
        guest.migrate(wrong, &[]).wait(SOON).failed_with(1, &[why]);
        // The same through standard input, where nobody else of this host sees it.
        let mut migration = guest.migrate("-", &[]);
        migration.feed(wrong.as_bytes());
        migration.wait(SOON).failed_with(1, &["ticket"]);
    }
    let refused = [
        (forged(&ticket, 1, 0), "the peer refused our ticket"),
        (forged(&ticket, 0x80, 0), "the peer refused our ticket"),
        (forged(&ticket, 0, 1), "not the peer that the ticket was made by"),
    ];
    for (wrong, why) in refused {
        guest.migrate(&wrong, &[]).wait(SOON).failed_with(3, &[why, RUNS_ON]);
        guest.runs_on();
    }
    guest.migrates_to(receiver);
}

#[test]
fn a_used_ticket_is_refused() {
    let first = Guest::start();
    let second = first.start_another();
    let receiver = Receiver::start_with(&["--verify-after", "8s"]);
    let report = first.path("report.json");
    first.migrate(&receiver.ticket, &["--report", &report]).succeed(MIGRATION);
    let mut whole = read_report(&report);
    first.has_left();
    // The guest runs there now; nobody listens any more.
    let ended = second.migrate(&receiver.ticket, &[]).wait(SOON);
    ended.failed_with(3, &["no answer from 127.0.0.1", RUNS_ON]);
    second.runs_on();
    whole["verified"] = receiver.report()["verified"].clone();
    check_report(&whole);
}

/// Two sources with one ticket, the second in the middle of the first one's migration:
/// the second is refused, and each guest is whole in exactly one place.
#[test]
fn a_ticket_in_use_moves_one_guest() {
    let first = Guest::start();
    let second = first.start_another();
    let receiver = Receiver::start();
    let control = first.control();
    let migrate = ["migrate", "--control", &control, "--ticket", &receiver.ticket];
    let report = first.path("report.json");
    let slow = ["--policy", "demand-only", "--drain-after", "3s", "--report", &report];
    let mut migration = Running::start(&[&migrate[..], &slow].concat());
    migration.says("target brownout");
    let meanwhile = second.migrate(&receiver.ticket, &[]).wait(SOON);
    meanwhile.failed_with(3, &["this ticket has been used", RUNS_ON]);
    second.runs_on();

    migration.succeed(MIGRATION);
    // The second one did not even cost the first one its link.
    assert_eq!(read_report(&report)["link"]["epochs"], 1);
    first.has_left();
    assert_eq!(receiver.report()["verified"], true);
}

#[test]
fn an_expired_ticket_is_refused_as_such() {
    let guest = Guest::start();
    let mut destination = FakeDestination::listen_expired();
    let mut migration = guest.migrate(&destination.ticket, &[]);
    destination.refuse_while(|| migration.runs());
    migration.wait(SOON).failed_with(3, &["the peer refused our ticket: it has expired", RUNS_ON]);
    guest.runs_on();
}

#[test]
fn a_receiver_whose_ticket_expires_ends_and_the_source_says_so() {
    let guest = Guest::start();
    let receiver = Receiver::start_with(&["--ticket-life", "1s"]);
    let ticket = receiver.ticket.clone();
    receiver.fails_with(3, &["the ticket expired and nobody came"]);
    let ended = guest.migrate(&ticket, &[]).wait(SOON);
    ended.failed_with(3, &["no answer", "the ticket has expired", RUNS_ON]);
    guest.runs_on();
}

#[test]
fn strangers_at_the_ports_get_nothing_and_keep_nobody_out() {
    let guest = Guest::start();
    let receiver = Receiver::start();
    let ticket: Ticket = receiver.ticket.parse().expect("a ticket");
    let ports = [Lane::Urgent, Lane::Push(0)].map(|lane| ticket.port(lane).expect("a port"));
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let mut noise = 1u64;
    for port in ports {
        let to = ("127.0.0.1", port);
        for length in (0..1500).step_by(7) {
            let datagram: Vec<u8> =
                std::iter::repeat_with(|| random_byte(&mut noise)).take(length).collect();
            socket.send_to(&datagram, to).expect("loopback takes it");
            // The same, but with a long header of QUIC version 1.
            let mut initial = datagram;
            for (byte, header) in initial.iter_mut().zip([0xc3, 0, 0, 0, 1, 8]) {
                *byte = header;
            }
            socket.send_to(&initial, to).expect("loopback takes it");
        }
        let http = "GET / HTTP/1.1\r\nHost: postcopy\r\n\r\n";
        socket.send_to(http.as_bytes(), to).expect("loopback takes it");
        let hello = message::encode(&super::fakes::proposal(4096));
        socket.send_to(&hello, to).expect("loopback takes it");
        socket.send_to(&[0xaa; 65_000], to).expect("loopback takes it");
        for application in [None, Some("h3"), Some("postcopy/1"), Some("postcopy/2")] {
            let why = quic_stranger(SocketAddr::from(([127, 0, 0, 1], port)), application);
            assert!(!why.contains("timed out"), "{application:?} was left waiting: {why}");
        }
    }
    guest.migrates_to(receiver);
}

fn random_byte(state: &mut u64) -> u8 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    (*state >> 56) as u8
}

/// Tries to get in with plain QUIC and without a ticket, naming this application; says
/// why it did not.
fn quic_stranger(to: SocketAddr, application: Option<&str>) -> String {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustAnybody))
        .with_no_client_auth();
    tls.alpn_protocols = application.iter().map(|name| name.as_bytes().to_vec()).collect();
    let crypto = QuicClientConfig::try_from(tls).expect("a QUIC client");
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).expect("an endpoint");
        let connecting = endpoint.connect_with(config, to, "postcopy").expect("a connection");
        let refusal = async {
            // A client's own side of the handshake may be done before the server looks
            // at what it has to show; then the first thing it hears is the refusal.
            let connection = connecting.await?;
            let opened = connection.accept_uni().await.map(drop);
            assert!(opened.is_err(), "a stranger was let in as {application:?}");
            opened
        };
        match tokio::time::timeout(Duration::from_secs(5), refusal).await {
            Ok(refused) => refused.expect_err("a stranger was let in").to_string(),
            Err(_) => "timed out".to_owned(),
        }
    })
}

#[derive(Debug)]
struct TrustAnybody;

impl ServerCertVerifier for TrustAnybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let provider = rustls::crypto::ring::default_provider();
        provider.signature_verification_algorithms.supported_schemes()
    }
}
