//! One whole step of one worker in memory, LLaMA-60M shapes: gradients in, frames through real shard machines, results
//! in place. Throughput is bytes of f32 gradient; a plain copy of the same bytes stands beside it.
//!
//! `cargo bench -p arc-topk-worker --bench step`. Without `--bench` (under `cargo test`) it runs a tiny model once.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, ValueType};
use arc_topk_common::ids::Rank;
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};
use arc_topk_worker::memory::{MemoryCluster, MemoryOptions};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gradient::gradient;
use std::hint::black_box;

#[path = "../examples/shared/gradient.rs"]
mod gradient;

struct Shape {
    vocabulary: u64,
    hidden: u64,
    intermediate: u64,
    layers: u64,
}

const LLAMA_60M: Shape = Shape {
    vocabulary: 32000,
    hidden: 512,
    intermediate: 1376,
    layers: 8,
};
const TINY: Shape = Shape {
    vocabulary: 64,
    hidden: 32,
    intermediate: 48,
    layers: 1,
};

fn tensors(shape: &Shape) -> Vec<TensorSpec> {
    let tensor = |name: String, shape: &[u64]| TensorSpec {
        name,
        shape: shape.to_vec(),
        dtype: DType::F32,
        density: None,
    };
    let Shape {
        vocabulary,
        hidden: h,
        intermediate: i,
        layers,
    } = *shape;
    let mut all = vec![tensor("embed".into(), &[vocabulary, h])];
    for layer in 0..layers {
        for name in ["q", "k", "v", "o"] {
            all.push(tensor(format!("{layer}.{name}"), &[h, h]));
        }
        all.push(tensor(format!("{layer}.gate"), &[i, h]));
        all.push(tensor(format!("{layer}.up"), &[i, h]));
        all.push(tensor(format!("{layer}.down"), &[h, i]));
        all.push(tensor(format!("{layer}.norm"), &[h]));
    }
    all.push(tensor("head".into(), &[vocabulary, h]));
    all
}

fn steps(c: &mut Criterion) {
    let full = std::env::args().any(|argument| argument == "--bench");
    let tensors = tensors(if full { &LLAMA_60M } else { &TINY });
    let elements = |tensor: &TensorSpec| tensor.shape.iter().product::<u64>() as usize;
    let gradients: Vec<Vec<f32>> = (1..)
        .zip(&tensors)
        .map(|(seed, tensor)| gradient(elements(tensor), seed))
        .collect();
    let bytes: u64 = gradients
        .iter()
        .map(|gradient| 4 * gradient.len() as u64)
        .sum();

    let mut group = c.benchmark_group("step");
    group.sample_size(10).throughput(Throughput::Bytes(bytes));
    let mut copies: Vec<Vec<f32>> = gradients
        .iter()
        .map(|gradient| vec![0.0; gradient.len()])
        .collect();
    group.bench_function("copy", |b| {
        b.iter(|| {
            copies
                .iter_mut()
                .zip(&gradients)
                .for_each(|(to, from)| to.copy_from_slice(black_box(from)))
        });
    });
    drop(copies);

    let cases = [
        (
            "arc 0.2 int4 ef14",
            Compressor::Arc,
            Feedback::Ef14,
            0.2,
            ValueType::Int4,
        ),
        (
            "arc 0.05 bf16 ef14",
            Compressor::Arc,
            Feedback::Ef14,
            0.05,
            ValueType::Bf16,
        ),
        (
            "arc 0.2 int4/f32 ef21m",
            Compressor::Arc,
            Feedback::Ef21m,
            0.2,
            ValueType::Int4,
        ),
        (
            "randk 0.2 int4 ef14",
            Compressor::Randk,
            Feedback::Ef14,
            0.2,
            ValueType::Int4,
        ),
        (
            "dense f32",
            Compressor::Dense,
            Feedback::Ef14,
            1.0,
            ValueType::F32,
        ),
    ];
    for (name, compressor, feedback, density, wire) in cases {
        let algorithm = AlgorithmConfig {
            compressor,
            feedback,
            density,
            wire_up: wire,
            wire_down: if feedback == Feedback::Ef21m {
                ValueType::F32
            } else {
                wire
            },
            wire_warmup: ValueType::F32,
            warmup_updates: 0,
            ..AlgorithmConfig::default()
        };
        let spec = PlanSpec {
            trainer: String::new(),
            algorithm,
            shards: 2,
            tensors: tensors.clone(),
        };
        let mut cluster =
            MemoryCluster::new(spec, 1, &MemoryOptions::default()).expect("a valid plan");
        cluster
            .worker_mut(Rank(0))
            .expect("rank 0 lives")
            .set_measure_every(0);
        group.bench_function(name, |b| {
            b.iter(|| {
                cluster
                    .step(|_, tensor| Some(&gradients[tensor.index()][..]))
                    .expect("a step in memory")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
