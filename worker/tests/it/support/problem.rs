//! What is averaged in the tests of whole steps: algorithms, models and gradients.

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, ValueType};
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};

/// `[worker][tensor]` → values.
pub type Gradients = Vec<Vec<Vec<f32>>>;

/// Exact wires, no warm-up, small tensors sparse too, buckets of about 4 KiB.
pub fn algorithm(feedback: Feedback, density: f32) -> AlgorithmConfig {
    AlgorithmConfig {
        feedback,
        density,
        eta: 0.3,
        dense_below_elements: 32,
        wire_up: ValueType::F32,
        wire_down: ValueType::F32,
        wire_sketch: ValueType::F32,
        wire_dense: ValueType::F32,
        wire_warmup: ValueType::F32,
        warmup_updates: 0,
        seed: 7,
        bucket_bytes: 4096,
        ..AlgorithmConfig::default()
    }
}

/// arc with every feedback rule, and other compressors with ef14.
pub fn rules_and(compressors: &[Compressor]) -> Vec<AlgorithmConfig> {
    let rules = [
        Feedback::None,
        Feedback::Ef14,
        Feedback::Ef21,
        Feedback::Ef21m,
    ];
    let arc = rules.map(|feedback| algorithm(feedback, 0.3)).into_iter();
    let others = compressors.iter().map(|compressor| AlgorithmConfig {
        compressor: *compressor,
        ..algorithm(Feedback::Ef14, 0.3)
    });
    arc.chain(others).collect()
}

pub fn tensor(name: &str, shape: &[u64]) -> TensorSpec {
    TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: DType::F32,
        density: None,
    }
}

pub fn spec(algorithm: AlgorithmConfig, shards: u16, tensors: Vec<TensorSpec>) -> PlanSpec {
    PlanSpec {
        trainer: String::new(),
        algorithm,
        shards,
        tensors,
    }
}

/// A little model: matrices, a filter, 1-D and tiny tensors, several buckets.
pub fn model() -> Vec<TensorSpec> {
    vec![
        tensor("embed", &[60, 24]),
        tensor("norm", &[24]),
        tensor("up", &[40, 24]),
        tensor("down", &[24, 40]),
        tensor("scalar", &[]),
        tensor("conv", &[30, 3, 3, 3]),
        tensor("tiny", &[3, 5]),
        tensor("head", &[60, 24]),
    ]
}

/// Values that depend on their position alone, some rows much larger than others.
pub fn gradients(spec: &PlanSpec, workers: usize, step: u64) -> Gradients {
    let value = |worker: usize, id: usize, i: usize, width: usize| {
        let row = i / width;
        let x = noise(
            step.wrapping_mul(1_000_003) ^ (worker as u64) << 40 ^ (id as u64) << 32 ^ i as u64,
        );
        x * (1.0 + 3.0 * noise((id * 1000 + row) as u64 ^ step << 20).abs())
    };
    let one = |worker: usize, id: usize, tensor: &TensorSpec| {
        let elements = tensor.shape.iter().product::<u64>() as usize;
        let width = elements / tensor.shape.first().map_or(1, |m| *m as usize).max(1);
        (0..elements).map(|i| value(worker, id, i, width)).collect()
    };
    (0..workers)
        .map(|worker| {
            spec.tensors
                .iter()
                .enumerate()
                .map(|(id, tensor)| one(worker, id, tensor))
                .collect()
        })
        .collect()
}

/// Uniform in −1..1.
pub fn noise(seed: u64) -> f32 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// Bits, so that −0 and 0, and NaNs, are told apart.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Equal to `tolerance` of the largest expected value.
pub fn assert_close(what: &str, actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    let scale = expected.iter().fold(0.0f32, |scale, x| scale.max(x.abs()));
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(
            (a - e).abs() <= tolerance * scale.max(1e-6),
            "{what}[{i}]: {a} instead of {e}"
        );
    }
}

/// Mean of a tensor's gradients over the workers.
pub fn mean(gradients: &Gradients, id: usize) -> Vec<f32> {
    let elements = gradients[0][id].len();
    let sum = |i| {
        gradients
            .iter()
            .map(|worker| f64::from(worker[id][i]))
            .sum::<f64>()
    };
    (0..elements)
        .map(|i| (sum(i) / gradients.len() as f64) as f32)
        .collect()
}
