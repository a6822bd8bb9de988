//! TLS 1.3 with certificates on both sides.

use crate::endpoint::Service;
use crate::error::TransportError;
use crate::identity::Identity;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use std::sync::Arc;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(identity: &Identity) -> Result<Arc<RootCertStore>, TransportError> {
    let mut roots = RootCertStore::empty();
    roots
        .add(identity.ca().clone())
        .map_err(|e| identity.mismatch(&e))?;
    Ok(Arc::new(roots))
}

pub(crate) fn server(identity: &Identity) -> Result<Arc<QuicServerConfig>, TransportError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(identity)?, provider())
        .build()
        .map_err(|e| identity.mismatch(&e))?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring provides TLS 1.3")
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain().to_vec(), identity.key())
        .map_err(|e| identity.mismatch(&e))?;
    tls.alpn_protocols = Service::ALL.map(|service| service.alpn().to_vec()).into();
    // A worker connects once per job: tickets would only cost bytes.
    tls.send_tls13_tickets = 0;
    let quic = QuicServerConfig::try_from(tls).expect("ring provides QUIC's initial cipher suite");
    Ok(Arc::new(quic))
}

pub(crate) fn client(
    identity: &Identity,
    service: Service,
) -> Result<Arc<QuicClientConfig>, TransportError> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring provides TLS 1.3")
        .with_root_certificates(roots(identity)?)
        .with_client_auth_cert(identity.chain().to_vec(), identity.key())
        .map_err(|e| identity.mismatch(&e))?;
    tls.alpn_protocols = vec![service.alpn().to_vec()];
    tls.resumption = rustls::client::Resumption::disabled();
    let quic = QuicClientConfig::try_from(tls).expect("ring provides QUIC's initial cipher suite");
    Ok(Arc::new(quic))
}
