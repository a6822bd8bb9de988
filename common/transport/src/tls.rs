//! TLS 1.3 with certificates on both sides.

use crate::certs::Role;
use crate::error::TransportError;
use crate::identity::Identity;
use arc_topk_common::wire::ALPN;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls_pki_types::UnixTime;
use std::sync::Arc;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(identity: &Identity) -> Result<Arc<RootCertStore>, TransportError> {
    let mut roots = RootCertStore::empty();
    for authority in identity.authorities() {
        roots
            .add(authority.clone())
            .map_err(|e| identity.bad_authority(&e))?;
    }
    Ok(Arc::new(roots))
}

fn client_verifier(identity: &Identity) -> Result<Arc<dyn ClientCertVerifier>, TransportError> {
    WebPkiClientVerifier::builder_with_provider(roots(identity)?, provider())
        .build()
        .map_err(|e| identity.bad_authority(&e))
}

/// What a peer with the same authorities would say of the certificate, names aside.
pub(crate) fn judge(
    identity: &Identity,
    role: Role,
) -> Result<Result<(), rustls::Error>, TransportError> {
    let [own, intermediates @ ..] = identity.chain() else {
        return Ok(Err(rustls::Error::NoCertificatesPresented));
    };
    let now = UnixTime::now();
    Ok(match role {
        Role::Worker => client_verifier(identity)?
            .verify_client_cert(own, intermediates, now)
            .map(drop),
        Role::Shard => {
            let roots = roots(identity)?;
            let algorithms = provider().signature_verification_algorithms.all;
            ParsedCertificate::try_from(own).and_then(|own| {
                verify_server_cert_signed_by_trust_anchor(
                    &own,
                    &roots,
                    intermediates,
                    now,
                    algorithms,
                )
            })
        }
    })
}

pub(crate) fn server(identity: &Identity) -> Result<Arc<QuicServerConfig>, TransportError> {
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring provides TLS 1.3")
        .with_client_cert_verifier(client_verifier(identity)?)
        .with_single_cert(identity.chain().to_vec(), identity.key())
        .map_err(|e| identity.mismatch(&e))?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    // A worker connects once per job: tickets would only cost bytes.
    tls.send_tls13_tickets = 0;
    let quic = QuicServerConfig::try_from(tls).expect("ring provides QUIC's initial cipher suite");
    Ok(Arc::new(quic))
}

pub(crate) fn client(identity: &Identity) -> Result<Arc<QuicClientConfig>, TransportError> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring provides TLS 1.3")
        .with_root_certificates(roots(identity)?)
        .with_client_auth_cert(identity.chain().to_vec(), identity.key())
        .map_err(|e| identity.mismatch(&e))?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = rustls::client::Resumption::disabled();
    let quic = QuicClientConfig::try_from(tls).expect("ring provides QUIC's initial cipher suite");
    Ok(Arc::new(quic))
}
