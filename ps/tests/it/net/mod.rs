//! A shard in this process, and workers made by hand that join it over loopback.

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::Compressor;
use arc_topk_common::ids::{BucketId, Epoch, Rank, ShardId, Step};
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};
use arc_topk_common::wire::{
    Control, FrameFlags, FrameHeader, FrameKind, Hello, Intent, JoinWhen, MAX_ROSTER_BYTES,
    PROTOCOL_VERSION, RefusalCode, Welcome,
};
use arc_topk_ps::server::{ServeOptions, Server, Timeouts};
use arc_topk_ps::shard::ShardConfig;
use arc_topk_ps::store::StoreOptions;
use arc_topk_transport::certs::{CertRequest, make_job_certs};
use arc_topk_transport::{
    Connection, ControlStream, Identity, IdentitySource, RecvStream, SendStream, TransportConfig,
    connect, read_frame, write_frame,
};
use bytes::Bytes;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

/// Long enough for a slow machine, short enough for a test that hangs.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn certs(dir: &Path) -> (Identity, Identity) {
    let made = make_job_certs(dir, &CertRequest::new("job", &[], 1)).unwrap();
    (
        Identity::load(&made.shard).unwrap(),
        Identity::load(&made.worker).unwrap(),
    )
}

pub fn options(identity: impl Into<IdentitySource>, world: u16) -> ServeOptions {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    ServeOptions {
        listen: any,
        admin: Some(any),
        identity: identity.into(),
        transport: TransportConfig::default(),
        shard: ShardConfig::new("job", ShardId(0), 1, world),
        chaos_delay: Duration::ZERO,
        timeouts: Timeouts::default(),
        store: StoreOptions::default(),
    }
}

/// For tests that wait until they are over, and for no others: a slow machine takes longer than this.
pub fn quick() -> Timeouts {
    let patience = Duration::from_millis(300);
    Timeouts {
        hello: patience,
        header: patience,
        body: patience,
    }
}

pub fn spec() -> PlanSpec {
    spec_of(4)
}

/// One bucket of `rows` rows of four.
pub fn spec_of(rows: u64) -> PlanSpec {
    let tensors = vec![TensorSpec {
        name: "a".to_owned(),
        shape: vec![rows, 4],
        dtype: DType::F32,
        density: None,
    }];
    let algorithm = AlgorithmConfig {
        compressor: Compressor::Dense,
        ..AlgorithmConfig::default()
    };
    PlanSpec {
        trainer: String::new(),
        algorithm,
        shards: 1,
        tensors,
    }
}

pub fn join(rank: Option<Rank>) -> Intent {
    Intent::Join {
        rank,
        world: None,
        start_step: Step(0),
        when: JoinWhen::Start,
    }
}

pub fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        job: "job".to_owned(),
        incarnation: [7; 16],
        intent: join(None),
        shard: 0,
        host: "test".to_owned(),
        plan: spec(),
    }
}

pub struct Worker {
    pub connection: Connection,
    pub control: ControlStream,
    /// Once welcomed.
    pub welcome: Option<Welcome>,
    /// Of the plan of its Hello.
    pub elements: usize,
}

impl Worker {
    pub async fn hello(server: &Server, identity: &Identity, hello: Hello) -> Self {
        Self::hello_with(server, identity, hello, &TransportConfig::default()).await
    }

    pub async fn hello_with(
        server: &Server,
        identity: &Identity,
        hello: Hello,
        config: &TransportConfig,
    ) -> Self {
        let address = server.quic_address().to_string();
        let connection = connect(&address, identity, config).await.unwrap();
        let shapes = hello.plan.tensors.iter().map(|tensor| &tensor.shape);
        let elements: u64 = shapes.map(|shape| shape.iter().product::<u64>()).sum();
        let mut control = ControlStream::open(&connection, "shard").await.unwrap();
        control
            .send(&Control::Hello(Box::new(hello)))
            .await
            .unwrap();
        Self {
            connection,
            control,
            welcome: None,
            elements: elements as usize,
        }
    }

    pub fn rank(&self) -> Rank {
        self.welcome.as_ref().unwrap().place.rank
    }

    pub async fn message(&mut self) -> Control {
        tokio::time::timeout(PATIENCE, self.control.recv())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
    }

    /// Skips what came before.
    pub async fn refusal(&mut self) -> (RefusalCode, String) {
        loop {
            if let Control::Refused { code, detail } = self.message().await {
                return (code, detail);
            }
        }
    }

    pub async fn welcome(&mut self) -> Rank {
        loop {
            match self.message().await {
                Control::Welcome(welcome) => {
                    return self.welcome.insert(welcome).place.rank;
                }
                Control::Waiting { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub async fn send_dense(&self, step: u64, value: f32) -> (SendStream, RecvStream) {
        let (mut send, recv) = self.connection.open_bi().await.unwrap();
        write_dense(&mut send, step, value, self.elements).await;
        (send, recv)
    }
}

/// The only frame of a round, whose elements are all `value`. A connection that has ended is for others to notice.
pub async fn write_dense(send: &mut SendStream, step: u64, value: f32, elements: usize) {
    let body = value.to_le_bytes().repeat(elements);
    let _ended = write_frame(send, &header(step, body.len()), body.into(), "shard").await;
}

pub fn header(step: u64, bytes: usize) -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Dense,
        flags: FrameFlags::default(),
        bucket: BucketId(0),
        epoch: Epoch(1),
        step: Step(step),
        update: step,
        body_bytes: bytes as u32,
        roster_bytes: 0,
        lead: 0,
    }
}

pub async fn answer(recv: &mut RecvStream) -> (FrameHeader, Bytes) {
    tokio::time::timeout(
        PATIENCE,
        read_frame(recv, (1 << 20) + MAX_ROSTER_BYTES, "shard"),
    )
    .await
    .unwrap()
    .unwrap()
    .unwrap()
}

/// A server and its welcomed workers.
pub async fn running(dir: &Path, world: u16) -> (Server, Identity, Vec<Worker>) {
    running_with(dir, world, Timeouts::default()).await
}

pub async fn running_with(
    dir: &Path,
    world: u16,
    timeouts: Timeouts,
) -> (Server, Identity, Vec<Worker>) {
    let (shard, worker) = certs(dir);
    let options = ServeOptions {
        timeouts,
        ..options(shard, world)
    };
    let server = Server::start(options).await.unwrap();
    let mut workers = Vec::new();
    for _ in 0..world {
        workers.push(Worker::hello(&server, &worker, hello()).await);
    }
    for worker in &mut workers {
        worker.welcome().await;
    }
    (server, worker, workers)
}

/// Waits until the metrics show this line.
pub async fn shows(server: &Server, line: &str) {
    for _ in 0..600 {
        if server.metrics().lines().any(|shown| shown == line) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{line} is not among\n{}", server.metrics());
}
