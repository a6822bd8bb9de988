//! Worker and shard loops over a 25 MB bucket, beside a plain copy of the same bytes in the same group.
//!
//! `cargo bench -p arc-topk-common --bench compress`. Rates are bytes of f32 a second: in a group, all entries
//! count the same bytes, so the ratio of two rates is the ratio of their times. Everything runs on one thread but for the entries
//! named `threads`. `cargo bench … -- --test` runs each once, so that they never rot.
#![allow(
    missing_docs,
    reason = "criterion's macros make an undocumented function"
)]

use arc_topk_common::compress::fast::Fast;
use arc_topk_common::compress::{
    FeedbackParams, Kernels, ProjectionKey, SketchShape, TensorState, ValueCodec, projection,
    score, select_top_k,
};
use arc_topk_common::config::algorithm::{Feedback, ProjectionKind, ValueType};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::Duration;

const ROWS: usize = 12_800;
const WIDTH: usize = 512;
const KEEP: usize = ROWS / 5;
const RANK: usize = 4;
const KEY: ProjectionKey = ProjectionKey {
    seed: 1,
    tensor: 2,
    step: 3,
};
/// What is formed from what was formed before stays bounded, however often.
const PARAMS: FeedbackParams = FeedbackParams {
    eta: 0.1,
    decay: -1.0,
};
const SHAPE: SketchShape = SketchShape {
    width: WIDTH,
    rank: RANK,
    kind: ProjectionKind::Rademacher,
};
const TYPES: [ValueType; 5] = [
    ValueType::F32,
    ValueType::Bf16,
    ValueType::F16,
    ValueType::Int8,
    ValueType::Int4,
];

fn codec(value_type: ValueType) -> ValueCodec {
    ValueCodec {
        value_type,
        quant_block: 64,
    }
}

fn normal(values: usize) -> Vec<f32> {
    projection(
        SketchShape {
            width: values,
            rank: 1,
            kind: ProjectionKind::Gaussian,
        },
        KEY,
    )
}

fn single() -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .expect("one thread can be had")
}

/// What a worker does before its first and second frame.
fn sketch_and_gather(c: &mut Criterion) {
    let mut group = c.benchmark_group("worker, 25 MB");
    group.throughput(Throughput::Bytes((ROWS * WIDTH * 4) as u64));
    let (mut buffer, mut copy) = (normal(ROWS * WIDTH), vec![0f32; ROWS * WIDTH]);
    let mut state = TensorState::new(Feedback::Ef14, ROWS, WIDTH);
    state.residual.copy_from_slice(&buffer);
    let mut sketch = vec![0.0; ROWS * RANK];
    Fast.sketch(&state, SHAPE, KEY, &buffer, 0..ROWS, &mut sketch);
    let selected = select_top_k(&score(&sketch, RANK), KEEP);
    let mut bytes = Vec::new();
    group.bench_function("copy", |b| {
        b.iter(|| black_box(&mut copy).copy_from_slice(black_box(&buffer)))
    });
    let pool = single();
    group.bench_function("sketch", |b| {
        b.iter(|| {
            pool.install(|| {
                Fast.sketch(&state, SHAPE, KEY, black_box(&buffer), 0..ROWS, &mut sketch)
            })
        });
    });
    for value_type in [ValueType::F32, ValueType::Bf16, ValueType::Int4] {
        group.bench_function(format!("sketch + gather 0.2 {value_type:?}"), |b| {
            b.iter(|| {
                pool.install(|| {
                    Fast.sketch(&state, SHAPE, KEY, black_box(&buffer), 0..ROWS, &mut sketch);
                    bytes.clear();
                    Fast.gather(
                        &state,
                        false,
                        &buffer,
                        &selected,
                        codec(value_type),
                        &mut bytes,
                    );
                });
            });
        });
    }
    group.bench_function("sketch + gather 0.2 Int4, threads", |b| {
        b.iter(|| {
            Fast.sketch(&state, SHAPE, KEY, black_box(&buffer), 0..ROWS, &mut sketch);
            bytes.clear();
            Fast.gather(
                &state,
                false,
                &buffer,
                &selected,
                codec(ValueType::Int4),
                &mut bytes,
            );
        });
    });
    group.bench_function("input ef14", |b| {
        b.iter(|| {
            pool.install(|| Fast.input(&mut state, PARAMS, false, black_box(&mut buffer), 0..ROWS))
        });
    });
    group.finish();
}

/// The end of a round.
fn commit(c: &mut Criterion) {
    let mut group = c.benchmark_group("commit, 25 MB");
    group.throughput(Throughput::Bytes((ROWS * WIDTH * 4) as u64));
    let (mut buffer, mut copy) = (normal(ROWS * WIDTH), vec![0f32; ROWS * WIDTH]);
    let selected: Vec<u32> = (0..ROWS as u32).step_by(5).collect();
    let (mean, mut sent, int4) = (normal(KEEP * WIDTH), Vec::new(), codec(ValueType::Int4));
    int4.encode(&mean, &mut sent);
    group.bench_function("copy", |b| {
        b.iter(|| black_box(&mut copy).copy_from_slice(black_box(&buffer)))
    });
    let pool = single();
    for feedback in [
        Feedback::None,
        Feedback::Ef14,
        Feedback::Ef21,
        Feedback::Ef21m,
    ] {
        let mut state = TensorState::new(feedback, ROWS, WIDTH);
        group.bench_function(format!("{feedback:?}"), |b| {
            b.iter(|| {
                pool.install(|| {
                    let buffer = black_box(&mut buffer);
                    Fast.commit(
                        &mut state,
                        false,
                        buffer,
                        0..ROWS,
                        &selected,
                        Some(&sent),
                        int4,
                        &mean,
                    );
                });
            });
        });
    }
    group.finish();
}

/// Scores and rows of an averaged sketch.
fn select(c: &mut Criterion) {
    let mut group = c.benchmark_group("select, sketch of 12800 rows");
    group.throughput(Throughput::Bytes((ROWS * RANK * 4) as u64));
    let sketch = normal(ROWS * RANK);
    let mut copy = vec![0f32; ROWS * RANK];
    group.bench_function("copy", |b| {
        b.iter(|| black_box(&mut copy).copy_from_slice(black_box(&sketch)))
    });
    group.bench_function("score + select 0.2", |b| {
        b.iter(|| select_top_k(&score(black_box(&sketch), RANK), KEEP));
    });
    group.finish();
}

/// A bucket's values at density 0.2.
fn codecs(c: &mut Criterion) {
    let mut group = c.benchmark_group("codec, 5 MB");
    let values = normal(KEEP * WIDTH);
    group.throughput(Throughput::Bytes((values.len() * 4) as u64));
    let mut copy = vec![0f32; values.len()];
    group.bench_function("copy", |b| {
        b.iter(|| black_box(&mut copy).copy_from_slice(black_box(&values)))
    });
    for value_type in TYPES {
        let codec = codec(value_type);
        let mut bytes = vec![0; codec.encoded_bytes(values.len())];
        group.bench_function(format!("encode {value_type:?}"), |b| {
            b.iter(|| codec.encode_into(black_box(&values), &mut bytes));
        });
        group.bench_function(format!("decode {value_type:?}"), |b| {
            b.iter(|| codec.decode(black_box(&bytes), &mut copy));
        });
        group.bench_function(format!("decode_add {value_type:?}"), |b| {
            b.iter(|| codec.decode_add(black_box(&bytes), &mut copy));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = sketch_and_gather, commit, select, codecs
}
criterion_main!(benches);
