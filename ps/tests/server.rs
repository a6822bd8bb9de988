//! The shell over real QUIC on loopback: rounds, bad peers, admin pages, shutdown.
#![allow(clippy::unwrap_used, reason = "tests")]

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::Compressor;
use arc_topk_common::ids::{BucketId, Epoch, Rank, ShardId, Step};
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};
use arc_topk_common::wire::{
    Control, FrameFlags, FrameHeader, FrameKind, HEADER_BYTES, Hello, PROTOCOL_VERSION, RefusalCode,
};
use arc_topk_ps::server::{ServeError, ServeOptions, Server, Timeouts};
use arc_topk_ps::shard::{ShardConfig, Stage};
use arc_topk_transport::certs::{CertRequest, make_job_certs};
use arc_topk_transport::{
    Connection, ControlStream, Identity, RecvStream, SendStream, TransportConfig, TransportError,
    connect, read_frame, write_frame,
};
use bytes::Bytes;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Long enough for a slow machine, short enough for a test that hangs.
const PATIENCE: Duration = Duration::from_secs(30);

fn certs(dir: &Path) -> (Identity, Identity) {
    let made = make_job_certs(dir, &CertRequest::new("job", &[], 1)).unwrap();
    (
        Identity::load(&made.shard).unwrap(),
        Identity::load(&made.worker).unwrap(),
    )
}

fn options(identity: Identity, world: u16) -> ServeOptions {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let quick = Duration::from_millis(300);
    ServeOptions {
        listen: any,
        admin: Some(any),
        identity,
        transport: TransportConfig::default(),
        shard: ShardConfig {
            shard: ShardId(0),
            shards: 1,
            job: "job".to_owned(),
            world,
            min_workers: 1,
        },
        chaos_delay: Duration::ZERO,
        timeouts: Timeouts {
            hello: quick,
            header: quick,
            body: quick,
        },
    }
}

fn spec() -> PlanSpec {
    let tensors = vec![TensorSpec {
        name: "a".to_owned(),
        shape: vec![4, 4],
        dtype: DType::F32,
        density: None,
    }];
    let algorithm = AlgorithmConfig {
        compressor: Compressor::Dense,
        ..AlgorithmConfig::default()
    };
    PlanSpec {
        algorithm,
        shards: 1,
        tensors,
    }
}

fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        job: "job".to_owned(),
        incarnation: [7; 16],
        rank: None,
        world: None,
        start_step: Step(0),
        shard: 0,
        host: "test".to_owned(),
        plan: spec(),
    }
}

struct Worker {
    connection: Connection,
    control: ControlStream,
}

impl Worker {
    async fn hello(server: &Server, identity: &Identity, hello: Hello) -> Self {
        let address = server.quic_address().to_string();
        let connection = connect(&address, identity, &TransportConfig::default())
            .await
            .unwrap();
        let mut control = ControlStream::open(&connection, "shard").await.unwrap();
        control
            .send(&Control::Hello(Box::new(hello)))
            .await
            .unwrap();
        Self {
            connection,
            control,
        }
    }

    async fn message(&mut self) -> Control {
        tokio::time::timeout(PATIENCE, self.control.recv())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
    }

    /// Skips what came before.
    async fn refusal(&mut self) -> (RefusalCode, String) {
        loop {
            if let Control::Refused { code, detail } = self.message().await {
                return (code, detail);
            }
        }
    }

    async fn welcome(&mut self) -> Rank {
        loop {
            match self.message().await {
                Control::Welcome(welcome) => return welcome.rank,
                Control::Waiting { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn send_dense(&self, step: u64, value: f32) -> (SendStream, RecvStream) {
        let (mut send, recv) = self.connection.open_bi().await.unwrap();
        let body: Vec<u8> = [value; 16].into_iter().flat_map(f32::to_le_bytes).collect();
        write_frame(&mut send, &header(step, body.len()), body.into(), "shard")
            .await
            .unwrap();
        (send, recv)
    }
}

fn header(step: u64, bytes: usize) -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Dense,
        flags: FrameFlags::default(),
        bucket: BucketId(0),
        epoch: Epoch(1),
        step: Step(step),
        update: step,
        body_bytes: bytes as u32,
    }
}

async fn answer(recv: &mut RecvStream) -> (FrameHeader, Bytes) {
    tokio::time::timeout(PATIENCE, read_frame(recv, 1 << 20, "shard"))
        .await
        .unwrap()
        .unwrap()
        .unwrap()
}

/// A server and its welcomed workers.
async fn running(dir: &Path, world: u16) -> (Server, Identity, Vec<Worker>) {
    let (shard, worker) = certs(dir);
    let server = Server::start(options(shard, world)).await.unwrap();
    let mut workers = Vec::new();
    for _ in 0..world {
        workers.push(Worker::hello(&server, &worker, hello()).await);
    }
    for worker in &mut workers {
        worker.welcome().await;
    }
    (server, worker, workers)
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn workers_get_the_mean_and_the_pages_show_it() {
    let dir = tempfile::tempdir().unwrap();
    let (server, _, workers) = running(dir.path(), 2).await;
    for step in 0..3 {
        let mut streams = Vec::new();
        for (value, worker) in [1.0, 3.0].into_iter().zip(&workers) {
            streams.push(worker.send_dense(step, value).await);
        }
        for (_, recv) in &mut streams {
            let (header, body) = answer(recv).await;
            assert!(header.flags.counted && header.kind == FrameKind::DenseMean);
            assert!(body.chunks(4).all(|value| value == 2f32.to_le_bytes()));
        }
    }
    let admin = server.admin_address().unwrap();
    assert!(get(admin, "/healthz").await.ends_with("ok\n"));
    assert!(get(admin, "/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(get(admin, "/").await.contains("<title>arc-ps</title>"));
    let status = get(admin, "/status").await;
    assert!(
        status.contains("\"rounds_complete\":3") && status.contains("\"stage\":\"running\""),
        "{status}"
    );
    let metrics = get(admin, "/metrics").await;
    assert!(
        metrics.contains("arc_rounds_total{outcome=\"complete\"} 3"),
        "{metrics}"
    );
    assert!(
        metrics.contains("arc_communication_bytes_total{direction=\"up\",kind=\"dense\"} 384"),
        "{metrics}"
    );
    server.shutdown("test").await;
}

#[tokio::test]
async fn a_worker_that_vanishes_is_removed_and_the_round_closes() {
    let dir = tempfile::tempdir().unwrap();
    let (server, _, mut workers) = running(dir.path(), 2).await;
    let (_send, mut recv) = workers[0].send_dense(0, 5.0).await;
    let rank = Rank(1);
    workers.pop().unwrap().connection.close(0u32.into(), b"");
    let (header, _) = answer(&mut recv).await;
    assert!(header.flags.counted);
    let Control::Membership { epoch, members, .. } = workers[0].message().await else {
        panic!()
    };
    assert_eq!(epoch, Epoch(2));
    assert!(!members.contains(&rank) || members.len() == 1);
    server.shutdown("test").await;
}

#[tokio::test]
async fn shutdown_tells_workers() {
    let dir = tempfile::tempdir().unwrap();
    let (server, _, mut workers) = running(dir.path(), 1).await;
    let told = tokio::spawn(async move { workers[0].refusal().await });
    tokio::time::timeout(PATIENCE, server.shutdown("SIGTERM"))
        .await
        .unwrap();
    let (code, detail) = told.await.unwrap();
    assert_eq!(code, RefusalCode::Shutdown);
    assert!(detail.contains("SIGTERM"), "{detail}");
}

#[tokio::test]
async fn a_wrong_certificate_costs_a_handshake_and_a_count() {
    let dir = tempfile::tempdir().unwrap();
    let (server, identity, workers) = running(&dir.path().join("a"), 1).await;
    let (_, stranger) = certs(&dir.path().join("b"));
    // Both sides refuse: the stranger's authority is unknown here, and ours there.
    let address = server.quic_address().to_string();
    let refused = connect(&address, &stranger, &TransportConfig::default()).await;
    assert!(
        matches!(refused, Err(TransportError::PeerCertificate { .. })),
        "{refused:?}"
    );
    for _ in 0..600 {
        if server.metrics().contains("arc_failed_handshakes_total 1") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(server.metrics().contains("arc_failed_handshakes_total 1"));
    let (_send, mut recv) = workers[0].send_dense(0, 1.0).await;
    answer(&mut recv).await;
    drop(identity);
    server.shutdown("test").await;
}

#[tokio::test]
async fn no_hello_closes_the_connection_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (shard, worker) = certs(dir.path());
    let server = Server::start(options(shard, 1)).await.unwrap();
    let address = server.quic_address().to_string();
    let connection = connect(&address, &worker, &TransportConfig::default())
        .await
        .unwrap();
    let closed = tokio::time::timeout(PATIENCE, connection.closed())
        .await
        .unwrap();
    assert!(
        closed.to_string().contains("no Hello came within 0.3 s"),
        "{closed}"
    );
    server.shutdown("test").await;
}

#[tokio::test]
async fn a_second_worker_with_a_taken_rank_is_refused_and_the_first_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (shard, identity) = certs(dir.path());
    let server = Server::start(options(shard, 2)).await.unwrap();
    let ranked = Hello {
        rank: Some(Rank(0)),
        ..hello()
    };
    let mut first = Worker::hello(&server, &identity, ranked.clone()).await;
    assert_eq!(
        first.message().await,
        Control::Waiting {
            joined: 1,
            world: 2
        }
    );
    let (code, detail) = Worker::hello(&server, &identity, ranked)
        .await
        .refusal()
        .await;
    assert_eq!(code, RefusalCode::Rank);
    assert!(detail.contains("rank 0 is taken by test"), "{detail}");
    let mut second = Worker::hello(&server, &identity, hello()).await;
    assert_eq!(
        (first.welcome().await, second.welcome().await),
        (Rank(0), Rank(1))
    );
    server.shutdown("test").await;
}

/// Rank of the offender's words after `offend`; the other worker's round closes without it.
async fn offence(offend: impl AsyncFnOnce(&Worker) -> Vec<SendStream>) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (server, _, mut workers) = running(dir.path(), 2).await;
    let (_send, mut recv) = workers[0].send_dense(0, 5.0).await;
    let mut offender = workers.pop().unwrap();
    let kept = offend(&offender).await;
    let (code, detail) = offender.refusal().await;
    assert_eq!(code, RefusalCode::Protocol);
    let (header, _) = answer(&mut recv).await;
    assert!(header.flags.counted);
    assert_eq!(server.status().await.unwrap().stage, Stage::Running);
    drop(kept);
    server.shutdown("test").await;
    detail
}

#[tokio::test]
async fn a_stream_on_which_nothing_comes() {
    let detail = offence(async |worker: &Worker| {
        let (mut send, _) = worker.connection.open_bi().await.unwrap();
        // A stream is opened by its first byte.
        send.write_all(&[0]).await.unwrap();
        vec![send]
    });
    let detail = detail.await;
    assert!(
        detail.starts_with("a stream was opened and no frame came on it within 0.3 s"),
        "{detail}"
    );
}

#[tokio::test]
async fn a_body_that_stands_still() {
    let detail = offence(async |worker: &Worker| {
        let (mut send, _) = worker.connection.open_bi().await.unwrap();
        send.write_all(&header(0, 64).encode()).await.unwrap();
        send.write_all(&[0; 10]).await.unwrap();
        vec![send]
    });
    let detail = detail.await;
    assert!(
        detail.starts_with("a frame stood still for 0.3 s after"),
        "{detail}"
    );
}

#[tokio::test]
async fn a_frame_longer_than_the_plan_allows() {
    let detail = offence(async |worker: &Worker| {
        let (mut send, _) = worker.connection.open_bi().await.unwrap();
        send.write_all(&header(0, 1 << 20).encode()).await.unwrap();
        vec![send]
    });
    let detail = detail.await;
    assert!(
        detail.starts_with("a frame announces 1048576 bytes, above the limit of 64"),
        "{detail}"
    );
}

#[tokio::test]
async fn a_header_that_means_nothing() {
    let detail = offence(async |worker: &Worker| {
        let (mut send, _) = worker.connection.open_bi().await.unwrap();
        send.write_all(&[0xff; HEADER_BYTES]).await.unwrap();
        vec![send]
    });
    let detail = detail.await;
    assert!(
        detail.starts_with("a frame's header cannot be read"),
        "{detail}"
    );
}

#[tokio::test]
async fn addresses_in_use_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (shard, _) = certs(dir.path());
    let first = Server::start(options(shard, 1)).await.unwrap();
    let (shard, _) = certs(&dir.path().join("again"));
    let mut same_port = options(shard, 1);
    same_port.listen = first.quic_address();
    let error = Server::start(same_port.clone()).await.unwrap_err();
    assert!(
        matches!(
            error,
            ServeError::Transport(TransportError::PortInUse { .. })
        ),
        "{error}"
    );
    same_port.listen = "127.0.0.1:0".parse().unwrap();
    same_port.admin = first.admin_address();
    let error = Server::start(same_port).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("choose another address with --admin"),
        "{error}"
    );
    first.shutdown("test").await;
}
