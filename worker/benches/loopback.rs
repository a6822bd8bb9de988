//! A shard's aggregation over loopback QUIC beside raw quinn moving the same bytes between the same endpoints.
//!
//! Four workers push frames of one kind through a real server, as fast as it takes them, and read the
//! means; then the same number of raw connections, with the same settings of TLS and QUIC, move bodies of the
//! same lengths both ways: read and thrown away on one side, sent from one shared buffer on the other. Both
//! parts run in turn several times in one process; the ratio is that of the medians.
//! Workers do nothing but move bytes, so the ratio is the shard's alone.
//!
//! `cargo bench -p arc-topk-worker --bench loopback`; under `cargo test` it is tiny.
#![allow(
    clippy::unwrap_used,
    reason = "a program that stops at the first surprise"
)]

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, ValueType};
use arc_topk_common::ids::{BucketId, Epoch, Rank, ShardId, Step};
use arc_topk_common::plan::{DType, Plan, PlanSpec, TensorSpec};
use arc_topk_common::wire::{
    Control, Direction, FrameFlags, FrameHeader, FrameKind, HEADER_BYTES, Hello, Intent, JoinWhen,
    PROTOCOL_VERSION, RoundShape, encode_roster,
};
use arc_topk_ps::server::{ServeOptions, Server, Timeouts};
use arc_topk_ps::shard::ShardConfig;
use arc_topk_ps::store::StoreOptions;
use arc_topk_transport::certs::{CertRequest, JobCerts, make_job_certs};
use arc_topk_transport::{
    Connection, ControlStream, Endpoint, Identity, RecvStream, TransportConfig, admit, connect,
    server_endpoint, write_frame,
};
use bytes::Bytes;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

const WORKERS: u16 = 4;

#[derive(Clone, Copy)]
struct Size {
    buckets: u64,
    rows: u64,
    width: u64,
    steps: u64,
    rounds: usize,
}

const FULL: Size = Size {
    buckets: 8,
    rows: 2048,
    width: 1024,
    steps: 4,
    rounds: 5,
};
const TINY: Size = Size {
    buckets: 2,
    rows: 64,
    width: 64,
    steps: 2,
    rounds: 1,
};

struct Case {
    name: &'static str,
    compressor: Compressor,
    density: f32,
    wire: ValueType,
}

const CASES: [Case; 4] = [
    Case {
        name: "dense f32",
        compressor: Compressor::Dense,
        density: 1.0,
        wire: ValueType::F32,
    },
    Case {
        name: "dense bf16",
        compressor: Compressor::Dense,
        density: 1.0,
        wire: ValueType::Bf16,
    },
    Case {
        name: "values bf16",
        compressor: Compressor::Randk,
        density: 0.4,
        wire: ValueType::Bf16,
    },
    Case {
        name: "values int4",
        compressor: Compressor::Randk,
        density: 0.4,
        wire: ValueType::Int4,
    },
];

fn plan(case: &Case, size: Size) -> Plan {
    let tensors = (0..size.buckets).map(|at| TensorSpec {
        name: format!("t{at}"),
        shape: vec![size.rows, size.width],
        dtype: DType::F32,
        density: None,
    });
    let algorithm = AlgorithmConfig {
        compressor: case.compressor,
        density: case.density,
        wire_up: case.wire,
        wire_down: case.wire,
        wire_dense: case.wire,
        warmup_updates: 0,
        bucket_bytes: (size.rows * size.width * 4) as u32,
        ..AlgorithmConfig::default()
    };
    let spec = PlanSpec {
        trainer: String::new(),
        algorithm,
        shards: 1,
        tensors: tensors.collect(),
    };
    Plan::build(spec).unwrap()
}

/// What one worker sends and gets in every round of a plan.
#[derive(Clone)]
struct Load {
    kind: FrameKind,
    up: Bytes,
    down_bytes: usize,
    buckets: u16,
    steps: u64,
}

impl Load {
    fn new(plan: &Plan, size: Size) -> Self {
        let shape = RoundShape::new(plan, BucketId(0), ShardId(0), 0);
        let phase = shape.phases()[0];
        let bytes = |direction| match phase.up {
            FrameKind::Dense => shape.dense_layout().bytes,
            _ => shape.values_layout(&shape.keep(), direction).bytes,
        };
        Self {
            kind: phase.up,
            // Zeros are values, scales and all, in every type.
            up: Bytes::from(vec![0; bytes(Direction::Up)]),
            down_bytes: bytes(Direction::Down),
            buckets: plan.buckets.len() as u16,
            steps: size.steps,
        }
    }

    fn header(&self, step: u64, bucket: u16) -> FrameHeader {
        FrameHeader {
            kind: self.kind,
            flags: FrameFlags::default(),
            bucket: BucketId(bucket),
            epoch: Epoch(1),
            step: Step(step),
            update: step,
            body_bytes: self.up.len() as u32,
            roster_bytes: 0,
            lead: 0,
        }
    }

    /// Payload of the whole run, both directions, all workers.
    fn bytes(&self) -> u64 {
        (self.up.len() + self.down_bytes) as u64
            * u64::from(self.buckets)
            * self.steps
            * u64::from(WORKERS)
    }
}

fn runtime(name: &str) -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name(name)
        .enable_all()
        .build()
        .unwrap()
}

struct Bench {
    servers: Runtime,
    clients: Runtime,
    certs: JobCerts,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            servers: runtime("server"),
            clients: runtime("client"),
            certs: make_job_certs(dir.path(), &CertRequest::new("bench", &[], 1)).unwrap(),
            _dir: dir,
        }
    }

    fn shard(&self) -> Identity {
        Identity::load(&self.certs.shard).unwrap()
    }

    fn worker(&self) -> Identity {
        Identity::load(&self.certs.worker).unwrap()
    }

    /// Seconds of all steps through a real server.
    fn aggregate(&self, plan: &Plan, load: &Load) -> f64 {
        let patience = Duration::from_secs(60);
        let options = ServeOptions {
            chaos_delay: std::time::Duration::ZERO,
            store: StoreOptions::default(),
            listen: "127.0.0.1:0".parse().unwrap(),
            admin: None,
            identity: self.shard().into(),
            transport: TransportConfig::default(),
            shard: ShardConfig::new("bench", ShardId(0), 1, WORKERS),
            timeouts: Timeouts {
                hello: patience,
                header: patience,
                body: patience,
            },
        };
        let server = self.servers.block_on(Server::start(options)).unwrap();
        let address = server.quic_address().to_string();
        let seconds = self.clients.block_on(async {
            let joined = (0..WORKERS).map(|_| join(&address, self.worker(), plan.spec.clone()));
            let mut workers = Vec::new();
            for worker in joined.collect::<Vec<_>>() {
                workers.push(worker.await);
            }
            for (_, control) in &mut workers {
                while !matches!(control.recv().await.unwrap(), Some(Control::Welcome(_))) {}
            }
            let begun = Instant::now();
            let mut tasks = JoinSet::new();
            for (connection, control) in workers {
                tasks.spawn(push_all(connection, control, load.clone()));
            }
            tasks.join_all().await;
            begun.elapsed().as_secs_f64()
        });
        self.servers.block_on(server.shutdown("the run is over"));
        seconds
    }

    /// Seconds that raw quinn takes to move the same bodies.
    fn raw(&self, load: &Load) -> f64 {
        let _inside = self.servers.enter();
        let config = TransportConfig::default();
        let endpoint =
            server_endpoint("127.0.0.1:0".parse().unwrap(), &self.shard(), &config).unwrap();
        let address = endpoint.local_addr().unwrap().to_string();
        let answer = Bytes::from(vec![0; load.down_bytes]);
        self.servers.spawn(raw_server(endpoint.clone(), answer));
        let seconds = self.clients.block_on(async {
            let mut connections = Vec::new();
            for _ in 0..WORKERS {
                let config = TransportConfig::default();
                connections.push(connect(&address, &self.worker(), &config).await.unwrap());
            }
            let begun = Instant::now();
            let mut tasks = JoinSet::new();
            for connection in connections {
                tasks.spawn(raw_client(connection, load.clone()));
            }
            tasks.join_all().await;
            begun.elapsed().as_secs_f64()
        });
        endpoint.close(0u32.into(), b"the run is over");
        seconds
    }
}

async fn join(address: &str, identity: Identity, plan: PlanSpec) -> (Connection, ControlStream) {
    let config = TransportConfig::default();
    let connection = connect(address, &identity, &config).await.unwrap();
    let mut control = ControlStream::open(&connection, "shard").await.unwrap();
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        job: "bench".to_owned(),
        incarnation: [0; 16],
        shard: 0,
        host: "bench".to_owned(),
        intent: Intent::Join {
            rank: None,
            world: None,
            start_step: Step(0),
            when: JoinWhen::Start,
        },
        plan,
    };
    let hello = Control::Hello(Box::new(hello));
    control.send(&hello).await.unwrap();
    (connection, control)
}

/// All rounds of a step at once, step after step, as a worker does.
async fn push_all(
    connection: Connection,
    control: ControlStream,
    load: Load,
) -> (Connection, ControlStream) {
    for step in 0..load.steps {
        let mut rounds = JoinSet::new();
        for bucket in 0..load.buckets {
            let (connection, load) = (connection.clone(), load.clone());
            rounds.spawn(async move {
                let (mut send, mut recv) = connection.open_bi().await.unwrap();
                let header = load.header(step, bucket);
                write_frame(&mut send, &header, load.up, "shard")
                    .await
                    .unwrap();
                send.finish().unwrap();
                let got = discard(&mut recv).await;
                let roster = encode_roster(&(0..WORKERS).map(Rank).collect()).len();
                assert_eq!(got, HEADER_BYTES + load.down_bytes + roster);
            });
        }
        rounds.join_all().await;
    }
    // Kept until all are through: an end would be a loss.
    (connection, control)
}

/// Reads to the end as cheaply as quinn allows; the number of bytes.
async fn discard(recv: &mut RecvStream) -> usize {
    let mut got = 0;
    while let Some(chunk) = recv.read_chunk(usize::MAX, true).await.unwrap() {
        got += chunk.bytes.len();
    }
    got
}

async fn raw_client(connection: Connection, load: Load) -> Connection {
    for _ in 0..load.steps {
        let mut rounds = JoinSet::new();
        for _ in 0..load.buckets {
            let (connection, load) = (connection.clone(), load.clone());
            rounds.spawn(async move {
                let (mut send, mut recv) = connection.open_bi().await.unwrap();
                send.write_chunk(load.up).await.unwrap();
                send.finish().unwrap();
                let got = discard(&mut recv).await;
                assert_eq!(got, load.down_bytes);
            });
        }
        rounds.join_all().await;
    }
    connection
}

async fn raw_server(endpoint: Endpoint, answer: Bytes) {
    while let Some(incoming) = endpoint.accept().await {
        let connection = incoming.await.unwrap();
        admit(&connection, &TransportConfig::default(), 1024);
        let answer = answer.clone();
        tokio::spawn(async move {
            while let Ok((mut send, mut recv)) = connection.accept_bi().await {
                let answer = answer.clone();
                tokio::spawn(async move {
                    discard(&mut recv).await;
                    send.write_chunk(answer).await.unwrap();
                    send.finish().unwrap();
                });
            }
        });
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    // `cargo test` runs this too, and must not take long; only `cargo bench` passes --bench.
    let tiny = !std::env::args().any(|argument| argument == "--bench");
    let size = if tiny { TINY } else { FULL };
    let bench = Bench::new();
    println!(
        "{WORKERS} workers, one shard, loopback, payload both ways; medians of {} runs in turn",
        size.rounds
    );
    println!("case         body up   shard GB/s   raw quinn GB/s   ratio (target 0.9)");
    for case in &CASES {
        let plan = plan(case, size);
        let load = Load::new(&plan, size);
        let (mut ours, mut raw) = (Vec::new(), Vec::new());
        for _ in 0..size.rounds {
            ours.push(bench.aggregate(&plan, &load));
            raw.push(bench.raw(&load));
        }
        let (ours, raw) = (median(ours), median(raw));
        let rate = |seconds: f64| load.bytes() as f64 / seconds / 1e9;
        println!(
            "{:<12} {:>6} KB {:>12.3} {:>16.3} {:>7.3}",
            case.name,
            load.up.len() / 1000,
            rate(ours),
            rate(raw),
            raw / ours
        );
    }
}
