//! Who may speak to whom: TLS 1.3, both sides authenticated, from a ticket alone.
//!
//! * The listening side makes a fresh key and a self-signed certificate for each
//!   migration. The ticket carries the certificate's SHA-256, and the client
//!   accepts a certificate with that hash and no other.
//! * The ticket also carries 32 random bytes. Both sides derive the client's
//!   Ed25519 key from them (HKDF-SHA256, bound to the server's fingerprint); the client proves
//!   in its handshake signature that it has the private half, and the server
//!   accepts that one public key. So a peer without the ticket completes no handshake:
//!   it reads no page and places none.
//!
//! rustls calls a verifier of one's own `dangerous`, because most of those check
//! less than the Web PKI. These check more: not "some authority vouches for this
//! name" but "this very key". No name, date or issuer could add to that, so they are not looked
//! at. What must never be left out, and is not, is the check of the handshake's
//! signature: without it anybody could present a copied certificate. Chains, session tickets,
//! early data (which could be replayed) and TLS 1.2 are all refused or off.
//!
//! Forward secrecy is TLS's own: a ticket that leaks after its migration opens nothing recorded.

use super::{
    error::TransportError,
    ticket::{Host, Secret, Ticket, TicketParseError},
};
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519, PublicKeyData};
use ring::{digest, hkdf, rand::SecureRandom};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring as provider, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    server::{
        NoServerSessionStorage, ParsedCertificate,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// The application protocol that both sides must name.
pub const ALPN: &[u8] = b"postcopy/1";

/// The name in certificates and hellos. It identifies nobody: the keys do.
pub(super) const SERVER_NAME: &str = "postcopy.invalid";

/// PKCS #8 version 1 of an Ed25519 key (RFC 8410), up to where its 32-byte seed follows.
const ED25519_PKCS8_PREFIX: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

/// The listening side's certificate, key and secret: what a ticket is made from.
///
/// Clones are the same identity, admissions included.
#[derive(Clone)]
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: Arc<KeyPair>,
    fingerprint: [u8; 32],
    secret: Secret,
    expires: u64,
    admitted: Arc<AtomicBool>,
}

impl Identity {
    /// A new identity whose tickets expire at `expires`, in seconds since 1970.
    ///
    /// # Errors
    /// [`TransportError::Setup`] if the system's random numbers or the crypto library fail.
    pub fn generate(expires: u64) -> Result<Self, TransportError> {
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(setup("the server's key"))?;
        let certificate = self_signed(&key)?;
        let mut secret = [0; 32];
        ring::rand::SystemRandom::new().fill(&mut secret).map_err(setup("the ticket's secret"))?;
        Ok(Self {
            fingerprint: fingerprint(&certificate),
            certificate,
            key: Arc::new(key),
            secret: Secret::new(secret),
            expires,
            admitted: Arc::new(AtomicBool::new(false)),
        })
    }

    /// The ticket that admits a peer here, if it finds this host and these ports.
    ///
    /// # Errors
    /// If a port is 0 or there are not 1 to 8 push ports.
    pub fn ticket(
        &self,
        host: impl Into<Host>,
        urgent_port: u16,
        push_ports: Vec<u16>,
    ) -> Result<Ticket, TicketParseError> {
        let secret = self.secret.clone();
        Ticket::new(host.into(), urgent_port, push_ports, self.fingerprint, secret, self.expires)
    }

    /// SHA-256 of the certificate's DER.
    pub fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// From now on the ticket does not expire: its peer is in, and may have to
    /// reconnect late in a long migration.
    pub(super) fn mark_admitted(&self) {
        self.admitted.store(true, Ordering::Relaxed);
    }

    /// The TLS side of a listening endpoint.
    pub(super) fn server_config(&self) -> Result<rustls::ServerConfig, TransportError> {
        let client_key = derive_client_key(&self.secret, &self.fingerprint)?;
        let verifier = OnlyTicketHolder {
            public_key_info: client_key.subject_public_key_info(),
            expires: self.expires,
            admitted: self.admitted.clone(),
            algorithms: crypto_provider().signature_verification_algorithms,
        };
        let mut config = rustls::ServerConfig::builder_with_provider(crypto_provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(setup("TLS"))?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(vec![self.certificate.clone()], private_key(&self.key))
            .map_err(setup("the server's certificate"))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// The TLS side of a client that holds `ticket`.
pub(super) fn client_config(ticket: &Ticket) -> Result<rustls::ClientConfig, TransportError> {
    let key = derive_client_key(ticket.secret(), ticket.server_fingerprint())?;
    let certificate = self_signed(&key)?;
    let verifier = OnlyThisCertificate {
        fingerprint: *ticket.server_fingerprint(),
        algorithms: crypto_provider().signature_verification_algorithms,
    };
    let mut config = rustls::ClientConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(setup("TLS"))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(vec![certificate], private_key(&key))
        .map_err(setup("the client's certificate"))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    Ok(config)
}

/// Accepts the certificate whose hash the ticket has.
#[derive(Debug)]
struct OnlyThisCertificate {
    fingerprint: [u8; 32],
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for OnlyThisCertificate {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if intermediates.is_empty() && fingerprint(end_entity) == self.fingerprint {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// Accepts the client key that is derived from the ticket's secret.
#[derive(Debug)]
struct OnlyTicketHolder {
    public_key_info: Vec<u8>,
    expires: u64,
    admitted: Arc<AtomicBool>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for OnlyTicketHolder {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let presented = ParsedCertificate::try_from(end_entity)?.subject_public_key_info();
        if !intermediates.is_empty() || presented.as_ref() != self.public_key_info {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        if now.as_secs() > self.expires && !self.admitted.load(Ordering::Relaxed) {
            return Err(CertificateError::Expired.into());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// The client's key pair. The server's fingerprint goes into it, so that a secret
/// is of use for one server's certificate only.
fn derive_client_key(
    secret: &Secret,
    server_fingerprint: &[u8; 32],
) -> Result<KeyPair, TransportError> {
    let mut seed = [0; 32];
    hkdf::Salt::new(hkdf::HKDF_SHA256, ALPN)
        .extract(secret.expose())
        .expand(&[b"client key", server_fingerprint], hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut seed))
        .map_err(setup("the client's key"))?;
    let pkcs8 = [ED25519_PKCS8_PREFIX.as_slice(), &seed].concat();
    KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(pkcs8), &PKCS_ED25519)
        .map_err(setup("the client's key"))
}

fn self_signed(key: &KeyPair) -> Result<CertificateDer<'static>, TransportError> {
    let params =
        CertificateParams::new([SERVER_NAME.to_owned()]).map_err(setup("a certificate"))?;
    Ok(params.self_signed(key).map_err(setup("a certificate"))?.der().clone())
}

fn private_key(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(key.serialize_der()).into()
}

fn fingerprint(certificate: &CertificateDer<'_>) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, certificate).as_ref());
    hash
}

/// *ring* with one cipher suite: AES-128-GCM, the fastest one with hardware
/// help, and required of every QUIC implementation. One suite leaves nothing to negotiate down.
fn crypto_provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![provider::cipher_suite::TLS13_AES_128_GCM_SHA256],
        ..provider::default_provider()
    })
}

fn only_tls13() -> Error {
    Error::General("only TLS 1.3 is spoken here".into())
}

/// For `map_err`: a failure to make `what`.
pub(super) fn setup<E: fmt::Display>(what: &'static str) -> impl FnOnce(E) -> TransportError {
    move |error| TransportError::Setup { what, detail: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_derive_the_same_key_and_only_from_the_same_ticket() {
        let one = derive_client_key(&Secret::new([1; 32]), &[2; 32]).unwrap();
        let same = derive_client_key(&Secret::new([1; 32]), &[2; 32]).unwrap();
        let other_secret = derive_client_key(&Secret::new([3; 32]), &[2; 32]).unwrap();
        let other_server = derive_client_key(&Secret::new([1; 32]), &[3; 32]).unwrap();
        assert_eq!(one.public_key_raw(), same.public_key_raw());
        assert_ne!(one.public_key_raw(), other_secret.public_key_raw());
        assert_ne!(one.public_key_raw(), other_server.public_key_raw());
    }

    #[test]
    fn identities_are_not_alike_and_do_not_print_their_secret() {
        let one = Identity::generate(5).unwrap();
        let other = Identity::generate(5).unwrap();
        assert_ne!(one.fingerprint, other.fingerprint);
        assert_ne!(one.secret, other.secret);
        assert_eq!(format!("{one:?}"), "Identity { expires: 5, .. }");
    }
}
