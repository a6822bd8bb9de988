//! What one shard aggregates, in bytes of bodies a second, beside a plain copy of the same bytes.
//!
//! `sum`: decoding and adding the bodies of four workers and forming the mean. `round`: the whole machine, from
//! the frames of four workers to their answers.
#![allow(
    missing_docs,
    reason = "criterion's macros make undocumented functions"
)]

use arc_topk_common::compress::ValueCodec;
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, ValueType};
use arc_topk_common::ids::{BucketId, Epoch, ShardId, Step};
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};
use arc_topk_common::wire::{
    FrameFlags, FrameHeader, FrameKind, Hello, Intent, JoinWhen, PROTOCOL_VERSION,
};
use arc_topk_ps::shard::aggregate::{Piece, Sum};
use arc_topk_ps::shard::{Event, SessionId, Shard, ShardConfig};
use bytes::Bytes;
use core::hint::black_box;
use core::time::Duration;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

const WORKERS: u64 = 4;
/// A quarter of a 25 MiB bucket of f32 gradient: one of four shards.
const ROWS: u64 = 1 << 11;
const WIDTH: u64 = 800;
const VALUES: usize = (ROWS * WIDTH) as usize;

fn body(codec: ValueCodec, salt: u64) -> Bytes {
    let values: Vec<f32> = (0..VALUES as u64)
        .map(|i| ((i * 7919 + salt * 104_729) % 2003) as f32 / 1000.0 - 1.0)
        .collect();
    let mut out = Vec::new();
    codec.encode(&values, &mut out);
    out.into()
}

fn sums(c: &mut Criterion) {
    for value_type in [
        ValueType::F32,
        ValueType::Bf16,
        ValueType::Int8,
        ValueType::Int4,
    ] {
        let codec = ValueCodec {
            value_type,
            quant_block: 64,
        };
        let bodies: Vec<Bytes> = (0..WORKERS).map(|w| body(codec, w)).collect();
        let bytes: u64 = bodies.iter().map(|b| b.len() as u64).sum();
        let mut group = c.benchmark_group(format!("sum/{value_type:?}").to_lowercase());
        group.throughput(Throughput::Bytes(bytes)).sample_size(20);
        let mut copy = vec![0; bodies[0].len()];
        group.bench_function("copy", |b| {
            b.iter(|| {
                bodies
                    .iter()
                    .for_each(|body| black_box(&mut copy).copy_from_slice(body))
            });
        });
        group.bench_function("mean", |b| {
            b.iter(|| {
                let mut sum = Sum::new(vec![Piece {
                    codec,
                    values: VALUES,
                }]);
                bodies.iter().for_each(|body| sum.add(body));
                black_box(sum.mean())
            });
        });
        group.finish();
    }
}

fn shard(value_type: ValueType) -> Shard {
    let config = ShardConfig::new("job", ShardId(0), 1, WORKERS as u16);
    let algorithm = AlgorithmConfig {
        compressor: Compressor::Dense,
        wire_dense: value_type,
        ..AlgorithmConfig::default()
    };
    let tensors = vec![TensorSpec {
        name: "a".to_owned(),
        shape: vec![ROWS, WIDTH],
        dtype: DType::F32,
        density: None,
    }];
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        job: "job".to_owned(),
        incarnation: [0; 16],
        shard: 0,
        host: String::new(),
        intent: Intent::Join {
            rank: None,
            world: None,
            start_step: Step(0),
            when: JoinWhen::Start,
        },
        plan: PlanSpec {
            trainer: String::new(),
            algorithm,
            shards: 1,
            tensors,
        },
    };
    let mut shard = Shard::new(config);
    let mut out = Vec::new();
    for session in 0..WORKERS {
        let event = Event::Hello {
            session: SessionId(session),
            hello: Box::new(hello.clone()),
        };
        shard.handle(Duration::ZERO, event, &mut out);
    }
    assert!(shard.is_running());
    shard
}

fn rounds(c: &mut Criterion) {
    for value_type in [ValueType::F32, ValueType::Bf16] {
        let codec = ValueCodec {
            value_type,
            quant_block: 64,
        };
        let bodies: Vec<Bytes> = (0..WORKERS).map(|w| body(codec, w)).collect();
        let bytes: u64 = bodies.iter().map(|b| b.len() as u64).sum();
        let mut group = c.benchmark_group(format!("round/{value_type:?}").to_lowercase());
        group.throughput(Throughput::Bytes(bytes)).sample_size(20);
        let mut shard = shard(value_type);
        let mut step = 0;
        group.bench_function("dense", |b| {
            b.iter_batched(
                || bodies.clone(),
                |bodies| {
                    let mut out = Vec::new();
                    // The last rank first: everything is parked until rank 0 comes.
                    for (session, body) in bodies.into_iter().enumerate().rev() {
                        let event = Event::Round {
                            session: SessionId(session as u64),
                            header: header(step, &body),
                            body,
                        };
                        shard.handle(Duration::ZERO, event, &mut out);
                    }
                    step += 1;
                    out
                },
                BatchSize::PerIteration,
            );
        });
        group.finish();
    }
}

fn header(step: u64, body: &Bytes) -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Dense,
        flags: FrameFlags::default(),
        bucket: BucketId(0),
        epoch: Epoch(1),
        step: Step(step),
        update: step,
        body_bytes: body.len() as u32,
        roster_bytes: 0,
        lead: 0,
    }
}

criterion_group!(benches, sums, rounds);
criterion_main!(benches);
