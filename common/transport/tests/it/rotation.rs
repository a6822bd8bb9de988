//! New certificates under a running endpoint.

use arc_topk_transport::certs::{Authority, CertRequest, Role};
use arc_topk_transport::source::IdentityFiles;
use arc_topk_transport::{
    Connection, Endpoint, Identity, IdentitySource, Listener, Look, PeerFault, TransportConfig,
    TransportError, connect, connection_error,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

fn request() -> CertRequest {
    CertRequest {
        force: true,
        ..CertRequest::new("job", &[], 2)
    }
}

fn authority() -> Authority {
    Authority::new(&request()).unwrap()
}

/// An identity directory, filled by `authority`.
fn place(dir: &TempDir, name: &str, authority: &Authority, role: Role) -> PathBuf {
    let place = dir.path().join(name);
    authority.issue(&place, role, &request()).unwrap();
    place
}

fn source(dir: &Path, role: Role) -> IdentitySource {
    let [ca, cert, key] = ["ca.pem", "cert.pem", "key.pem"].map(|file| dir.join(file));
    IdentitySource::files(&ca, &cert, &key, role).unwrap()
}

fn files(source: &IdentitySource) -> &Arc<IdentityFiles> {
    match source {
        IdentitySource::Files(files) => files,
        IdentitySource::Fixed(_) => panic!("not files"),
    }
}

/// Writes `ca.pem` of `to` from those of all `from`.
fn trust(to: &Path, from: &[&Path]) {
    let all = from
        .iter()
        .flat_map(|dir| fs::read(dir.join("ca.pem")).unwrap());
    let all: Vec<u8> = all.collect();
    fs::write(to.join("ca.pem"), all).unwrap();
}

fn listen(source: &IdentitySource) -> (Listener, String) {
    let any = "127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(any, &source.current(), &TransportConfig::default()).unwrap();
    let address = listener.endpoint().local_addr().unwrap().to_string();
    (listener, address)
}

/// Both ends of a connection on which a byte went to and fro, or what the worker's side says.
async fn meet(
    endpoint: &Endpoint,
    address: &str,
    worker: &IdentitySource,
) -> Result<[Connection; 2], TransportError> {
    let server = async {
        let connection = endpoint.accept().await.unwrap().await.ok()?;
        Some(connection)
    };
    let worker = worker.current();
    let config = TransportConfig::default();
    let client = connect(address, &worker, &config);
    let (server, client) = tokio::join!(server, client);
    let client = client?;
    let Some(server) = server else {
        // TLS 1.3: the refusal comes after this side's handshake has ended.
        return Err(connection_error("the shard", &client.closed().await));
    };
    talk(&client, &server).await;
    Ok([client, server])
}

async fn talk(client: &Connection, server: &Connection) {
    server.set_max_concurrent_bi_streams(9u32.into());
    let (mut send, mut recv) = client.open_bi().await.unwrap();
    send.write_all(b"?").await.unwrap();
    send.finish().unwrap();
    let (mut answer, mut question) = server.accept_bi().await.unwrap();
    assert_eq!(question.read_to_end(9).await.unwrap(), b"?");
    answer.write_all(b"!").await.unwrap();
    answer.finish().unwrap();
    assert_eq!(recv.read_to_end(9).await.unwrap(), b"!");
}

/// The certificate that the other side showed.
fn shown(connection: &Connection) -> Vec<u8> {
    let identity = connection.peer_identity().unwrap();
    let chain = identity.downcast::<Vec<rustls_pki_types::CertificateDer<'static>>>();
    chain.unwrap()[0].to_vec()
}

fn taken(look: Look) -> Identity {
    match look {
        Look::Taken(identity) => identity,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn new_connections_see_the_new_certificate_and_old_ones_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let ca = authority();
    let shard = place(&dir, "shard", &ca, Role::Shard);
    let worker = place(&dir, "worker", &ca, Role::Worker);
    let (shards, workers) = (source(&shard, Role::Shard), source(&worker, Role::Worker));
    let (mut listener, address) = listen(&shards);
    let [old_client, old_server] = meet(listener.endpoint(), &address, &workers).await.unwrap();
    let before = [shown(&old_client), shown(&old_server)];

    assert!(matches!(files(&shards).look(), Look::Same));
    ca.issue(&shard, Role::Shard, &request()).unwrap();
    ca.issue(&worker, Role::Worker, &request()).unwrap();
    listener.renew(&taken(files(&shards).look())).unwrap();
    let [client, server] = meet(listener.endpoint(), &address, &workers).await.unwrap();
    let after = [shown(&client), shown(&server)];
    assert!(before[0] != after[0] && before[1] != after[1]);
    talk(&old_client, &old_server).await;
    assert_eq!([shown(&old_client), shown(&old_server)], before);
}

#[tokio::test]
async fn an_authority_is_replaced_while_both_are_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (authority(), authority());
    let shard = place(&dir, "shard", &old, Role::Shard);
    let worker = place(&dir, "worker", &old, Role::Worker);
    let [old_ca, new_ca] = [("old", &old), ("new", &new)]
        .map(|(name, authority)| place(&dir, name, authority, Role::Worker));
    let (shards, workers) = (source(&shard, Role::Shard), source(&worker, Role::Worker));
    let (mut listener, address) = listen(&shards);
    let [first, first_server] = meet(listener.endpoint(), &address, &workers).await.unwrap();

    // A worker that is ahead of the shard: nobody trusts its authority yet.
    let ahead = place(&dir, "ahead", &new, Role::Worker);
    trust(&ahead, &[&old_ca, &new_ca]);
    let ahead = source(&ahead, Role::Worker);
    let refused = meet(listener.endpoint(), &address, &ahead)
        .await
        .unwrap_err();
    assert!(
        matches!(
            refused,
            TransportError::OwnCertificate {
                fault: PeerFault::UnknownAuthority,
                ..
            }
        ),
        "{refused:?}"
    );

    // Everybody trusts both, the shard first.
    trust(&shard, &[&old_ca, &new_ca]);
    listener.renew(&taken(files(&shards).look())).unwrap();
    meet(listener.endpoint(), &address, &workers).await.unwrap();
    meet(listener.endpoint(), &address, &ahead).await.unwrap();
    trust(&worker, &[&old_ca, &new_ca]);
    meet(listener.endpoint(), &address, &workers).await.unwrap();

    // Everybody gets a certificate of the new one, the shard first.
    new.issue(&shard, Role::Shard, &request()).unwrap();
    trust(&shard, &[&old_ca, &new_ca]);
    listener.renew(&taken(files(&shards).look())).unwrap();
    meet(listener.endpoint(), &address, &workers).await.unwrap();
    new.issue(&worker, Role::Worker, &request()).unwrap();
    meet(listener.endpoint(), &address, &workers).await.unwrap();

    // Nobody trusts the old one.
    trust(&shard, &[&new_ca]);
    listener.renew(&taken(files(&shards).look())).unwrap();
    meet(listener.endpoint(), &address, &workers).await.unwrap();
    let behind = place(&dir, "behind", &old, Role::Worker);
    trust(&behind, &[&old_ca, &new_ca]);
    let behind = source(&behind, Role::Worker);
    let refused = meet(listener.endpoint(), &address, &behind).await;
    assert!(
        matches!(refused, Err(TransportError::OwnCertificate { .. })),
        "{refused:?}"
    );
    talk(&first, &first_server).await;
}

#[tokio::test]
async fn files_that_do_not_fit_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ca = authority();
    let shard = place(&dir, "shard", &ca, Role::Shard);
    let shards = source(&shard, Role::Shard);
    let before = shards.current().chain().to_vec();
    let good = ["ca.pem", "cert.pem", "key.pem"].map(|file| fs::read(shard.join(file)).unwrap());
    let restore = || {
        for (file, content) in ["ca.pem", "cert.pem", "key.pem"].iter().zip(&good) {
            fs::write(shard.join(file), content).unwrap();
        }
    };
    let stranger = place(&dir, "stranger", &authority(), Role::Shard);
    let worker = place(&dir, "worker", &ca, Role::Worker);
    let copy = |from: &Path, names: &[&str]| {
        for name in names {
            fs::copy(from.join(name), shard.join(name)).unwrap();
        }
    };
    type Damage<'a> = &'a dyn Fn();
    let cases: [(Damage<'_>, &str); 6] = [
        (
            &|| fs::write(shard.join("cert.pem"), "x").unwrap(),
            "cert.pem holds no certificate",
        ),
        (
            &|| fs::remove_file(shard.join("key.pem")).unwrap(),
            "cannot read",
        ),
        (
            &|| fs::write(shard.join("ca.pem"), "").unwrap(),
            "ca.pem holds no CA certificate",
        ),
        (&|| copy(&stranger, &["cert.pem"]), "is not the key of"),
        (
            &|| copy(&stranger, &["cert.pem", "key.pem"]),
            "is not signed by this job's CA",
        ),
        (
            &|| copy(&worker, &["cert.pem", "key.pem"]),
            "is for another role",
        ),
    ];
    for (damage, words) in cases {
        damage();
        match files(&shards).look() {
            Look::Kept(error) => assert!(error.to_string().contains(words), "{error}"),
            other => panic!("{words}: {other:?}"),
        }
        // It is judged, and told of, once.
        assert!(matches!(files(&shards).look(), Look::Same));
        assert_eq!(shards.current().chain(), before);
        restore();
        assert_eq!(taken(files(&shards).look()).chain(), before);
    }
}

/// The state between two of three files is no fault, and not an identity either.
#[test]
fn a_patient_look_waits_until_nothing_changes_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let ca = authority();
    let shard = place(&dir, "shard", &ca, Role::Shard);
    let next = place(&dir, "next", &ca, Role::Shard);
    let shards = source(&shard, Role::Shard);
    let files = files(&shards);
    assert!(matches!(files.look_patiently(), Look::Same));
    for file in ["cert.pem", "key.pem"] {
        fs::copy(next.join(file), shard.join(file)).unwrap();
        assert!(matches!(files.look_patiently(), Look::Same), "{file}");
    }
    let expected = Identity::load(&next).unwrap();
    assert_eq!(taken(files.look_patiently()).chain(), expected.chain());
    assert!(matches!(files.look_patiently(), Look::Same));

    fs::write(shard.join("cert.pem"), "x").unwrap();
    assert!(matches!(files.look_patiently(), Look::Same));
    assert!(matches!(files.look_patiently(), Look::Kept(_)));
    assert!(matches!(files.look_patiently(), Look::Same));
}

#[test]
fn an_identity_that_is_given_stays() {
    let dir = tempfile::tempdir().unwrap();
    let ca = authority();
    let worker = place(&dir, "worker", &ca, Role::Worker);
    let fixed = IdentitySource::from(Identity::load(&worker).unwrap());
    let before = fixed.current().chain().to_vec();
    ca.issue(&worker, Role::Worker, &request()).unwrap();
    assert_eq!(fixed.current().chain(), before);
}
