//! Handshakes between real endpoints on loopback: what goes wrong is told to the side that can act.

use arc_topk_common::wire::ALPN;
use arc_topk_common::wire::Control;
use arc_topk_transport::certs::{CertRequest, JobCerts, make_job_certs};
use arc_topk_transport::config::HELLO_WINDOW_BYTES;
use arc_topk_transport::{
    Connection, ControlStream, Endpoint, Identity, PeerFault, TransportConfig, TransportError,
    admit, connect, connection_error, server_endpoint, summary,
};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

fn certs(dir: &Path, request: &CertRequest) -> JobCerts {
    make_job_certs(dir, request).unwrap()
}

fn request() -> CertRequest {
    CertRequest::new("job", &[], 2)
}

/// Valid from three days ago to two days ago.
fn expired() -> CertRequest {
    let mut request = request();
    request.not_before -= Duration::from_secs(3 * 86_400);
    request.not_after -= Duration::from_secs(4 * 86_400);
    request
}

fn load(dir: &Path) -> Identity {
    Identity::load_unchecked(
        &dir.join("ca.pem"),
        &dir.join("cert.pem"),
        &dir.join("key.pem"),
    )
    .unwrap()
}

fn any() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn listen(identity: &Identity) -> (Endpoint, String) {
    let endpoint = server_endpoint(any(), identity, &TransportConfig::default()).unwrap();
    let address = endpoint.local_addr().unwrap().to_string();
    (endpoint, address)
}

/// Connects and exchanges one message each way; the errors of both sides, if any.
async fn meet(
    shard: &Identity,
    worker: &Identity,
) -> (Result<(), TransportError>, Result<(), TransportError>) {
    let (endpoint, address) = listen(shard);
    let server = async {
        let incoming = endpoint.accept().await.unwrap();
        let connection = incoming
            .await
            .map_err(|e| connection_error("the worker", &e))?;
        let mut control = ControlStream::accept(&connection, "the worker").await?;
        let message = control.recv().await?.unwrap();
        control.send(&message).await?;
        control.sender.finish().await
    };
    let client = async {
        let connection = connect(&address, worker, &TransportConfig::default()).await?;
        let mut control = ControlStream::open(&connection, "the shard").await?;
        control.send(&Control::Leave).await?;
        assert_eq!(control.recv().await?, Some(Control::Leave));
        assert_eq!(control.recv().await?, None);
        Ok(())
    };
    tokio::join!(server, client)
}

fn own_fault(result: &Result<(), TransportError>) -> Option<PeerFault> {
    match result {
        Err(TransportError::OwnCertificate { fault, .. }) => Some(*fault),
        _ => None,
    }
}

fn peer_fault(result: &Result<(), TransportError>) -> Option<PeerFault> {
    match result {
        Err(TransportError::PeerCertificate { fault, .. }) => Some(*fault),
        _ => None,
    }
}

#[tokio::test]
async fn certificates_of_one_job_meet() {
    let dir = tempfile::tempdir().unwrap();
    let certs = certs(dir.path(), &request());
    let (server, client) = meet(
        &Identity::load(&certs.shard).unwrap(),
        &Identity::load(&certs.worker).unwrap(),
    )
    .await;
    assert_eq!((server, client), (Ok(()), Ok(())));
}

#[tokio::test]
async fn a_worker_of_another_ca_is_refused_by_both_sides() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ours = certs(ours.path(), &request());
    let theirs = certs(theirs.path(), &request());
    let (_, client) = meet(&load(&ours.shard), &load(&theirs.worker)).await;
    assert_eq!(peer_fault(&client), Some(PeerFault::UnknownAuthority));
    assert!(
        client
            .unwrap_err()
            .to_string()
            .contains("is not signed by this job's CA")
    );
}

#[tokio::test]
async fn a_worker_that_trusts_the_shard_but_has_a_foreign_certificate_is_told_so() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ours = certs(ours.path(), &request());
    let theirs = certs(theirs.path(), &request());
    let mixed = Identity::load_files(
        &ours.ca,
        &theirs.worker.join("cert.pem"),
        &theirs.worker.join("key.pem"),
    )
    .unwrap();
    let (server, client) = meet(&load(&ours.shard), &mixed).await;
    assert_eq!(peer_fault(&server), Some(PeerFault::UnknownAuthority));
    assert_eq!(own_fault(&client), Some(PeerFault::UnknownAuthority));
    let text = client.unwrap_err().to_string();
    assert!(
        text.contains("refused this side's certificate") && text.contains("arc-ps certs"),
        "{text}"
    );
}

#[tokio::test]
async fn an_expired_worker_certificate_is_told_to_the_worker() {
    let dir = tempfile::tempdir().unwrap();
    let valid = certs(dir.path(), &request());
    let old = tempfile::tempdir().unwrap();
    let old = certs(old.path(), &expired());
    // The shard trusts the old CA's names as well: only the dates are wrong.
    let shard = Identity::load_files(
        &old.ca,
        &valid.shard.join("cert.pem"),
        &valid.shard.join("key.pem"),
    )
    .unwrap();
    let worker = Identity::load_unchecked(
        &valid.ca,
        &old.worker.join("cert.pem"),
        &old.worker.join("key.pem"),
    )
    .unwrap();
    let (server, client) = meet(&shard, &worker).await;
    assert_eq!(peer_fault(&server), Some(PeerFault::Expired));
    assert_eq!(own_fault(&client), Some(PeerFault::Expired));
    assert!(
        client
            .unwrap_err()
            .to_string()
            .contains("expired or not yet valid")
    );
}

#[tokio::test]
async fn certificates_of_the_other_role_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let certs = certs(dir.path(), &request());
    let (_, client) = meet(&load(&certs.shard), &load(&certs.shard)).await;
    assert_eq!(own_fault(&client), Some(PeerFault::WrongRole));
    let (_, client) = meet(&load(&certs.worker), &load(&certs.worker)).await;
    assert!(peer_fault(&client).is_some(), "{client:?}");
}

/// A worker that poses as a shard: its certificate has the right names and is of the job's authority.
#[tokio::test]
async fn a_workers_certificate_does_not_make_a_shard_whatever_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
    let ca = rcgen::CertifiedIssuer::self_signed(params, key).unwrap();
    let identity = |usage: rcgen::ExtendedKeyUsagePurpose| {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![usage];
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &ca).unwrap();
        for (file, text) in [
            ("ca.pem", ca.pem()),
            ("cert.pem", certificate.pem()),
            ("key.pem", key.serialize_pem()),
        ] {
            std::fs::write(dir.path().join(file), text).unwrap();
        }
        load(dir.path())
    };
    let shard = identity(rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    let worker = identity(rcgen::ExtendedKeyUsagePurpose::ClientAuth);
    // The names would do: a shard's certificate made in the same way is taken.
    assert_eq!(meet(&shard, &worker).await, (Ok(()), Ok(())));
    let (_, client) = meet(&worker, &worker).await;
    assert_eq!(
        peer_fault(&client),
        Some(PeerFault::WrongRole),
        "{client:?}"
    );
}

/// What the handshake granted cannot be taken back, so it is little.
#[tokio::test]
async fn a_peer_that_is_not_admitted_gets_one_stream_and_a_small_window() {
    let dir = tempfile::tempdir().unwrap();
    let certs = certs(dir.path(), &request());
    let (endpoint, address) = listen(&load(&certs.shard));
    let server = async { endpoint.accept().await.unwrap().await.unwrap() };
    let config = TransportConfig::default();
    let worker = load(&certs.worker);
    let (server, client) = tokio::join!(server, connect(&address, &worker, &config));
    let client = client.unwrap();
    let (mut control, _) = client.open_bi().await.unwrap();
    let mut second = Box::pin(client.open_bi());
    assert!(still_waits(second.as_mut()).await);
    // Nobody reads: what is written beyond the window stays here.
    let mut written = 0;
    let mut writing = Box::pin(async {
        loop {
            written += control.write(&[0; 4096]).await.unwrap();
        }
    });
    assert!(still_waits(writing.as_mut()).await);
    drop(writing);
    assert_eq!(written, HELLO_WINDOW_BYTES as usize);
    admit(&server, &config, 2);
    second.await.unwrap();
    control.write_all(&[0; 4096]).await.unwrap();
}

/// Whether the future is not ready after both sides had time to talk. On a slow machine it may only look as if more
/// were forbidden than is.
async fn still_waits(future: impl Future) -> bool {
    tokio::time::timeout(Duration::from_millis(300), future)
        .await
        .is_err()
}

#[tokio::test]
async fn a_shard_under_a_name_that_its_certificate_lacks_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let certs = certs(dir.path(), &request());
    let (endpoint, address) = listen(&load(&certs.shard));
    let server = async { endpoint.accept().await.unwrap().await.err().map(drop) };
    let peer = address.parse().unwrap();
    let config = TransportConfig::default();
    let from = arc_topk_transport::client_endpoint(peer, &config).unwrap();
    let worker = load(&certs.worker);
    let client =
        arc_topk_transport::connect_resolved(&from, peer, "elsewhere.example", &worker, &config);
    let (_, client) = tokio::join!(server, client);
    let client = client.map(drop);
    assert_eq!(
        peer_fault(&client),
        Some(PeerFault::WrongName),
        "{client:?}"
    );
    assert!(client.unwrap_err().to_string().contains("--host"));
}

/// A client of our TLS with settings that [`connect`] does not offer.
async fn raw_client(
    address: &str,
    ca: &Identity,
    alpn: &[u8],
    certificate: Option<&Path>,
) -> Result<Connection, quinn::ConnectionError> {
    use rustls_pki_types::PrivateKeyDer;
    use rustls_pki_types::pem::PemObject;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.ca().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut tls = match certificate {
        Some(dir) => builder
            .with_client_auth_cert(
                load(dir).chain().to_vec(),
                PrivateKeyDer::from_pem_file(dir.join("key.pem")).unwrap(),
            )
            .unwrap(),
        None => builder.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![alpn.to_vec()];
    let quic = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let endpoint = Endpoint::client(any()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(quic));
    endpoint
        .connect_with(config, address.parse().unwrap(), "localhost")
        .unwrap()
        .await
}

#[tokio::test]
async fn a_peer_without_a_certificate_is_refused_and_told_why() {
    let dir = tempfile::tempdir().unwrap();
    let certs = certs(dir.path(), &request());
    let shard = load(&certs.shard);
    let (endpoint, address) = listen(&shard);
    let server = async { endpoint.accept().await.unwrap().await.map(drop) };
    let client = async {
        match raw_client(&address, &shard, ALPN, None).await {
            // TLS 1.3: the refusal comes after this side's handshake has ended.
            Ok(connection) => connection.closed().await,
            Err(error) => error,
        }
    };
    let (server, client) = tokio::join!(server, client);
    let server = connection_error("the worker", &server.unwrap_err());
    assert_eq!(peer_fault(&Err(server)), Some(PeerFault::Missing));
    let client = connection_error("the shard", &client);
    assert!(client.to_string().contains("--certs DIR"), "{client}");
    assert_eq!(own_fault(&Err(client)), Some(PeerFault::Missing));
}

#[tokio::test]
async fn another_protocol_version_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let certs = certs(dir.path(), &request());
    let shard = load(&certs.shard);
    let (endpoint, address) = listen(&shard);
    let server = async { endpoint.accept().await.unwrap().await.map(drop) };
    let client = raw_client(&address, &shard, b"arc-topk/1", Some(&certs.worker));
    let (server, client) = tokio::join!(server, client);
    for error in [server.unwrap_err(), client.unwrap_err()] {
        let error = connection_error("the peer", &error);
        assert!(matches!(error, TransportError::Alpn { .. }), "{error:?}");
        assert!(
            error.to_string().contains("does not speak arc-topk/2"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let certs = certs(dir.path(), &request());
    let shard = load(&certs.shard);
    let (_endpoint, address) = listen(&shard);
    let again = server_endpoint(
        address.parse().unwrap(),
        &shard,
        &TransportConfig::default(),
    );
    let error = again.map(drop).unwrap_err();
    assert_eq!(error, TransportError::PortInUse { address });
    assert!(error.to_string().contains("--listen"));
}

#[tokio::test]
async fn silence_and_unknown_names_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let certs = certs(dir.path(), &request());
    let worker = load(&certs.worker);
    let config = TransportConfig {
        connect_timeout: Duration::from_millis(200),
        ..TransportConfig::default()
    };
    // A socket that nobody answers on.
    let silent = std::net::UdpSocket::bind(any()).unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let error = connect(&address, &worker, &config).await.unwrap_err();
    assert!(
        matches!(error, TransportError::ConnectTimeout { .. }),
        "{error:?}"
    );
    for address in ["no-port", "host.invalid:1", ":1", "127.0.0.1:70000"] {
        let error = connect(address, &worker, &config).await.unwrap_err();
        assert!(
            matches!(error, TransportError::Unresolvable { .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains(address));
    }
}

#[tokio::test]
async fn connections_are_measured() {
    let dir = tempfile::tempdir().unwrap();
    let certs = certs(dir.path(), &request());
    let (endpoint, address) = listen(&load(&certs.shard));
    let server = async { endpoint.accept().await.unwrap().await.unwrap() };
    let config = TransportConfig::default();
    let worker = load(&certs.worker);
    let (_kept, client) = tokio::join!(server, connect(&address, &worker, &config));
    let figures = summary(&client.unwrap());
    assert!(figures.sent_packets > 0 && figures.sent_bytes > 0 && figures.received_bytes > 0);
    assert!(figures.rtt > Duration::ZERO && figures.congestion_window_bytes > 0);
}

/// A process that is killed says nothing. One that takes its place answers the next packet of its peers.
#[test]
fn a_restarted_endpoint_resets_connections_of_its_predecessor() {
    let dir = tempfile::tempdir().unwrap();
    let certs = certs(dir.path(), &request());
    let (shard, worker) = (load(&certs.shard), load(&certs.worker));
    let clients = tokio::runtime::Runtime::new().unwrap();
    let killed = tokio::runtime::Runtime::new().unwrap();
    let (endpoint, address) = killed.block_on(async { listen(&shard) });
    let connection = clients.block_on(async {
        killed.spawn(async move {
            let connection = endpoint.accept().await.unwrap().await.unwrap();
            connection.closed().await;
        });
        // No idle timeout may end it before.
        let config = TransportConfig {
            idle_timeout: Duration::from_secs(600),
            ..TransportConfig::default()
        };
        connect(&address, &worker, &config).await.unwrap()
    });
    // Nothing is driven any more, so that no farewell goes out.
    killed.shutdown_background();
    let ended = clients.block_on(async {
        let config = TransportConfig::default();
        let listening = address.parse().unwrap();
        let mut successor = server_endpoint(listening, &shard, &config);
        while successor.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
            successor = server_endpoint(listening, &shard, &config);
        }
        let _successor = successor.unwrap();
        connection.closed().await
    });
    let error = connection_error("the shard", &ended);
    assert!(matches!(error, TransportError::Reset { .. }), "{error:?}");
}
