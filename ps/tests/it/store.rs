//! The snapshot store's service, asked by clients that die, dawdle, lie or send nonsense.

use arc_topk_common::ids::{RunId, ShardId, Step};
use arc_topk_common::wire::{
    MAX_STORE_MESSAGE_BYTES, Owner, PieceMeta, SnapshotId, StoreCode, StoreRequest, StoreResponse,
};
use arc_topk_ps::server::{ServeOptions, Server, Timeouts};
use arc_topk_ps::shard::ShardConfig;
use arc_topk_ps::store::StoreOptions;
use arc_topk_transport::certs::{CertRequest, make_job_certs};
use arc_topk_transport::{
    Connection, Endpoint, Identity, RecvStream, SendStream, Service, TransportConfig, VarInt,
    client_endpoint, connect_service, read_message, write_message,
};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);

struct Shard {
    server: Server,
    worker: Identity,
    dir: tempfile::TempDir,
}

impl Shard {
    async fn start(timeouts: Timeouts) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let request = CertRequest::new("job", &[], 1);
        let made = make_job_certs(&dir.path().join("certs"), &request).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let options = ServeOptions {
            listen: any,
            admin: None,
            identity: Identity::load(&made.shard).unwrap().into(),
            transport: TransportConfig::default(),
            shard: ShardConfig::new("job", ShardId(0), 1, 1),
            timeouts,
            chaos_delay: Duration::ZERO,
            store: StoreOptions {
                dir: Some(dir.path().join("snapshots")),
                ..StoreOptions::default()
            },
        };
        Self {
            server: Server::start(options).await.unwrap(),
            worker: Identity::load(&made.worker).unwrap(),
            dir,
        }
    }

    async fn connect(&self) -> (Connection, Endpoint) {
        let address = self.server.quic_address();
        let config = TransportConfig::default();
        let endpoint = client_endpoint(address, &config).unwrap();
        let (worker, service) = (&self.worker, Service::Store);
        let connecting = connect_service(&endpoint, address, "127.0.0.1", worker, &config, service);
        (connecting.await.unwrap(), endpoint)
    }

    fn snapshots(&self) -> std::path::PathBuf {
        self.dir.path().join("snapshots")
    }

    /// Waits until nothing is coming any more.
    async fn quiet(&self) {
        for _ in 0..6000 {
            let status = self.server.store_status();
            if status.incoming_bytes == 0 && names(&self.snapshots()) == ["lock"] {
                assert!(status.snapshots.is_empty(), "{status:?}");
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{:?}", self.server.store_status());
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// One piece of a thousand bytes, with the hash of something else.
fn meta() -> PieceMeta {
    PieceMeta {
        snapshot: SnapshotId {
            step: Step(10),
            run: RunId([3; 16]),
        },
        owner: Owner::Replica,
        piece: 0,
        pieces: 1,
        piece_bytes: 1000,
        total_bytes: 1000,
        total_sha256: [1; 32],
        piece_sha256: [1; 32],
    }
}

async fn put(connection: &Connection, bytes: &[u8]) -> (SendStream, RecvStream) {
    let (mut send, recv) = connection.open_bi().await.unwrap();
    let request = StoreRequest::Put(meta()).encode();
    write_message(&mut send, &request, "shard").await.unwrap();
    send.write_all(bytes).await.unwrap();
    (send, recv)
}

async fn answer(recv: &mut RecvStream) -> StoreResponse {
    let reading = read_message(recv, MAX_STORE_MESSAGE_BYTES, "an answer", "shard");
    let message = tokio::time::timeout(PATIENCE, reading).await.unwrap();
    StoreResponse::decode(&message.unwrap().unwrap()).unwrap()
}

fn code(response: &StoreResponse) -> StoreCode {
    match response {
        StoreResponse::Failed { code, .. } => *code,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_dies_in_the_middle_of_a_put_leaves_nothing() {
    let shard = Shard::start(Timeouts::default()).await;
    let (connection, _endpoint) = shard.connect().await;
    let _streams = put(&connection, &[7; 500]).await;
    while shard.server.store_status().incoming_bytes == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    connection.close(VarInt::from_u32(0), b"died");
    shard.quiet().await;
    // One that ends its stream too early is told.
    let (connection, _endpoint) = shard.connect().await;
    let (mut send, mut recv) = put(&connection, &[7; 500]).await;
    send.finish().unwrap();
    assert_eq!(code(&answer(&mut recv).await), StoreCode::Damaged);
    shard.quiet().await;
    shard.server.shutdown("test").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_not_those_announced_are_refused() {
    let shard = Shard::start(Timeouts::default()).await;
    let (connection, _endpoint) = shard.connect().await;
    for bytes in [vec![7; 1000], vec![7; 1001], vec![7; 3 << 20]] {
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        let request = StoreRequest::Put(meta()).encode();
        write_message(&mut send, &request, "shard").await.unwrap();
        // The shard may stop reading before the end.
        let _stopped = send.write_all(&bytes).await;
        let _stopped = send.finish();
        assert_eq!(code(&answer(&mut recv).await), StoreCode::Damaged);
    }
    shard.quiet().await;
    shard.server.shutdown("test").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_is_refused_and_the_connection_goes_on() {
    let shard = Shard::start(Timeouts::default()).await;
    let (connection, _endpoint) = shard.connect().await;
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    write_message(&mut send, &[99; 100], "shard").await.unwrap();
    assert_eq!(code(&answer(&mut recv).await), StoreCode::Protocol);
    // A length above the limit: nothing of it is read, and the stream ends.
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    assert_eq!(code(&answer(&mut recv).await), StoreCode::Protocol);
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    let list = StoreRequest::List.encode();
    write_message(&mut send, &list, "shard").await.unwrap();
    assert_eq!(answer(&mut recv).await, StoreResponse::Listing(Vec::new()));
    let text = shard.server.metrics();
    for line in [
        "arc_snapshot_requests_total{outcome=\"done\",request=\"list\"} 1",
        "arc_snapshot_requests_total{outcome=\"refused\",request=\"unreadable\"} 1",
    ] {
        assert!(text.contains(line), "{line}");
    }
    shard.server.shutdown("test").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_that_stands_still_is_given_up() {
    let patience = Duration::from_millis(300);
    let shard = Shard::start(Timeouts {
        hello: patience,
        header: patience,
        body: patience,
    })
    .await;
    let (connection, _endpoint) = shard.connect().await;
    let (_send, mut recv) = put(&connection, &[7; 500]).await;
    assert_eq!(code(&answer(&mut recv).await), StoreCode::Protocol);
    shard.quiet().await;
    shard.server.shutdown("test").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_bounded_and_training_keeps_its_share() {
    let shard = Shard::start(Timeouts::default()).await;
    let mut connections = Vec::new();
    loop {
        let (connection, endpoint) = shard.connect().await;
        let listed = async {
            let (mut send, mut recv) = connection.open_bi().await.ok()?;
            let list = StoreRequest::List.encode();
            write_message(&mut send, &list, "shard").await.ok()?;
            read_message(&mut recv, 1000, "an answer", "shard")
                .await
                .ok()
        };
        if listed.await.is_none() {
            break;
        }
        connections.push((connection, endpoint));
    }
    assert_eq!(connections.len(), 33, "half of 2 × 1 + 64");
    shard.server.shutdown("test").await;
}
