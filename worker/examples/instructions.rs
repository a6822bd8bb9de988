//! Whole steps of two workers and one shard in memory, for `make instructions` to count what they execute.
//!
//! `instructions CASE STEPS` prints the cases when called without arguments. Everything is the same in every run: gradients,
//! choices, order; `RAYON_NUM_THREADS=1` keeps threads out of it.

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, SelectionPolicy, ValueType};
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};
use arc_topk_worker::memory::{MemoryCluster, MemoryOptions};
use gradient::gradient;
use std::error::Error;

#[path = "shared/gradient.rs"]
mod gradient;

const WORKERS: u16 = 2;

/// What is compared with its baseline, by name.
const CASES: [(&str, AlgorithmOf); 6] = [
    ("arc 0.2 int4", |a| a),
    ("arc 0.05 bf16", |a| AlgorithmConfig {
        density: 0.05,
        wire_up: ValueType::Bf16,
        wire_down: ValueType::Bf16,
        ..a
    }),
    ("arc 0.2 int4 pooled", |a| AlgorithmConfig {
        selection: SelectionPolicy::Pooled,
        ..a
    }),
    ("arc 0.2 ef21m", |a| AlgorithmConfig {
        feedback: Feedback::Ef21m,
        wire_down: ValueType::F32,
        wire_warmup: ValueType::F32,
        ..a
    }),
    ("dense f32", |a| AlgorithmConfig {
        compressor: Compressor::Dense,
        ..a
    }),
    ("dense int8", |a| AlgorithmConfig {
        compressor: Compressor::Dense,
        wire_dense: ValueType::Int8,
        ..a
    }),
];

type AlgorithmOf = fn(AlgorithmConfig) -> AlgorithmConfig;

/// A decoder layer's matrices between an embedding and a norm.
fn tensors() -> Vec<TensorSpec> {
    let shapes: [(&str, &[u64]); 6] = [
        ("embed", &[2000, 256]),
        ("attention", &[1024, 256]),
        ("up", &[688, 256]),
        ("down", &[256, 688]),
        ("head", &[1000, 256]),
        ("norm", &[256]),
    ];
    let spec = |(name, shape): (&str, &[u64])| TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: DType::F32,
        density: None,
    };
    shapes.into_iter().map(spec).collect()
}

fn run(algorithm: AlgorithmConfig, steps: u64) -> Result<(), Box<dyn Error>> {
    let tensors = tensors();
    let elements = |tensor: &TensorSpec| tensor.shape.iter().product::<u64>() as usize;
    let gradients: Vec<Vec<f32>> = (1..)
        .zip(&tensors)
        .map(|(seed, tensor)| gradient(elements(tensor), seed))
        .collect();
    let spec = PlanSpec {
        trainer: String::new(),
        algorithm,
        shards: 1,
        tensors,
    };
    let mut cluster = MemoryCluster::new(spec, WORKERS, &MemoryOptions::default())?;
    for _ in 0..steps {
        cluster.step(|_, tensor| Some(&gradients[tensor.index()][..]))?;
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [case, steps] = &arguments[..] else {
        CASES.iter().for_each(|(name, _)| println!("{name}"));
        return Ok(());
    };
    let found = CASES.iter().find(|(name, _)| name == case);
    let (_, algorithm) = found.ok_or_else(|| format!("there is no case {case:?}"))?;
    let base = AlgorithmConfig {
        warmup_updates: 0,
        ..AlgorithmConfig::default()
    };
    run(algorithm(base), steps.parse()?)
}
