//! Certificates for QEMU's TLS: an authority and one certificate for each side, in the files
//! that `tls-creds-x509` looks for.

use anyhow::Context;
use data_encoding::BASE64;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use std::fs;
use std::path::Path;

/// Writes them into `folder`. The server's certificate is good for 127.0.0.1.
pub fn write(folder: &Path) -> anyhow::Result<()> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.distinguished_name.push(DnType::CommonName, "peers authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = authority.self_signed(&key)?;
    pem(&folder.join("ca-cert.pem"), "CERTIFICATE", certificate.der())?;
    let issuer = Issuer::new(authority, key);

    for (side, purpose) in [
        ("server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, format!("peers {side}"));
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &issuer)?;
        pem(&folder.join(format!("{side}-cert.pem")), "CERTIFICATE", certificate.der())?;
        pem(&folder.join(format!("{side}-key.pem")), "PRIVATE KEY", &key.serialize_der())?;
    }
    Ok(())
}

fn pem(path: &Path, label: &str, der: &[u8]) -> anyhow::Result<()> {
    let mut text = format!("-----BEGIN {label}-----\n");
    // Base64 is ASCII: any place is a place between two characters.
    let mut rest = BASE64.encode(der);
    while !rest.is_empty() {
        let behind = rest.split_off(rest.len().min(64));
        text.push_str(&rest);
        text.push('\n');
        rest = behind;
    }
    text.push_str(&format!("-----END {label}-----\n"));
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
