//! Certificates are replaced under a shard whose workers step on.

use crate::net::{Worker, answer, hello, options, shows};
use arc_topk_ps::server::Server;
use arc_topk_transport::certs::{CertRequest, Role, make_job_certs, renew_job_certs};
use arc_topk_transport::{Connection, Identity, IdentitySource, TransportConfig, connect};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

fn request(days: u32) -> CertRequest {
    CertRequest::new("job", &[], days)
}

fn files(dir: &Path) -> IdentitySource {
    let [ca, cert, key] = ["ca.pem", "cert.pem", "key.pem"].map(|file| dir.join(file));
    IdentitySource::files(&ca, &cert, &key, Role::Shard).unwrap()
}

/// The certificate that a shard shows.
fn shown(connection: &Connection) -> Vec<u8> {
    let identity = connection.peer_identity().unwrap();
    let chain = identity.downcast::<Vec<rustls_pki_types::CertificateDer<'static>>>();
    chain.unwrap()[0].to_vec()
}

async fn dial(server: &Server, worker: &Path) -> Connection {
    let address = server.quic_address().to_string();
    let identity = Identity::load(worker).unwrap();
    connect(&address, &identity, &TransportConfig::default())
        .await
        .unwrap()
}

async fn step(worker: &Worker, step: u64) {
    let (_send, mut recv) = worker.send_dense(step, 1.0).await;
    assert!(answer(&mut recv).await.0.flags.counted);
}

fn expiry(identity: &Identity) -> String {
    let end = identity.not_after().unwrap();
    assert!(end > SystemTime::now());
    let seconds = end.duration_since(UNIX_EPOCH).unwrap().as_secs();
    format!("arc_certificate_expiry_timestamp_seconds {seconds}")
}

const TAKEN: &str = "arc_certificate_renewals_total{outcome=\"taken\"}";
const REFUSED: &str = "arc_certificate_renewals_total{outcome=\"refused\"}";

#[tokio::test]
async fn a_shard_takes_new_files_and_keeps_the_old_if_they_do_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let made = make_job_certs(dir.path(), &request(9)).unwrap();
    let server = Server::start(options(files(&made.shard), 1)).await.unwrap();
    let first = Identity::load(&made.shard).unwrap();
    shows(&server, &expiry(&first)).await;
    let identity = Identity::load(&made.worker).unwrap();
    let mut worker = Worker::hello(&server, &identity, hello()).await;
    worker.welcome().await;
    step(&worker, 0).await;
    assert_eq!(
        shown(&dial(&server, &made.worker).await),
        first.chain()[0].to_vec()
    );

    renew_job_certs(dir.path(), &request(4)).unwrap();
    let second = Identity::load(&made.shard).unwrap();
    // Without being asked, within some seconds.
    shows(&server, &format!("{TAKEN} 1")).await;
    shows(&server, &expiry(&second)).await;
    step(&worker, 1).await;
    assert_eq!(
        shown(&dial(&server, &made.worker).await),
        second.chain()[0].to_vec()
    );

    // Half of a set, at once.
    let key = std::fs::read(made.shard.join("key.pem")).unwrap();
    std::fs::copy(made.worker.join("key.pem"), made.shard.join("key.pem")).unwrap();
    server.renew_identity();
    shows(&server, &format!("{REFUSED} 1")).await;
    assert_eq!(
        shown(&dial(&server, &made.worker).await),
        second.chain()[0].to_vec()
    );
    std::fs::write(made.shard.join("key.pem"), key).unwrap();

    renew_job_certs(dir.path(), &request(5)).unwrap();
    server.renew_identity();
    shows(&server, &format!("{TAKEN} 2")).await;
    let third = Identity::load(&made.shard).unwrap();
    assert_eq!(
        shown(&dial(&server, &made.worker).await),
        third.chain()[0].to_vec()
    );
    step(&worker, 2).await;
    let status = server.status().await.unwrap();
    assert_eq!((status.members.len(), status.totals.lost), (1, 0));
    server.shutdown("test").await;
}
