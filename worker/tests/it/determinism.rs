//! I3: bytes depend on the contributions alone. And a naive model of the whole job, compared to the bit.

use crate::support::{
    self, algorithm, bits, cluster, fingerprint, gradients, model, results, spec, state, step,
    tensor,
};
use arc_topk_common::compress::fast::Fast;
use arc_topk_common::compress::round::{Round, RoundCodecs};
use arc_topk_common::compress::{FeedbackParams, ProjectionKey, SketchShape, TensorState};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{
    Compressor, Feedback, Init, ProjectionKind, RoundKind, SelectionPolicy, ValueType,
};
use arc_topk_common::ids::{Rank, TensorId};
use arc_topk_common::plan::{Plan, PlanSpec, Segment};
use arc_topk_worker::backend::Gradient;
use arc_topk_worker::memory::{MemoryCluster, MemoryOptions};
use proptest::prelude::*;

const COMPRESSORS: [Compressor; 4] = [
    Compressor::Arc,
    Compressor::Randk,
    Compressor::Topk,
    Compressor::Dense,
];

fn lossy(compressor: Compressor, feedback: Feedback) -> AlgorithmConfig {
    allowed(AlgorithmConfig {
        compressor,
        wire_up: ValueType::Int4,
        wire_down: ValueType::Int8,
        wire_sketch: ValueType::Bf16,
        wire_dense: ValueType::F16,
        wire_warmup: ValueType::Int8,
        ..algorithm(feedback, 0.3)
    })
}

/// The same with the exact mean that ef21's estimates need.
fn allowed(mut algorithm: AlgorithmConfig) -> AlgorithmConfig {
    if algorithm.keeps_estimates() {
        algorithm.wire_down = ValueType::F32;
        algorithm.wire_dense = ValueType::F32;
        algorithm.wire_warmup = ValueType::F32;
    }
    algorithm
}

fn run(spec: &PlanSpec, order_seed: Option<u64>) -> Vec<Vec<u32>> {
    let options = MemoryOptions {
        order_seed,
        ..MemoryOptions::default()
    };
    let mut cluster = MemoryCluster::new(spec.clone(), 4, &options).unwrap();
    for number in 0..3 {
        step(&mut cluster, &gradients(spec, 4, number));
    }
    fingerprint(&cluster, 4)
}

#[test]
fn the_order_of_delivery_cannot_be_seen() {
    for compressor in COMPRESSORS {
        for feedback in [Feedback::Ef14, Feedback::Ef21m] {
            let spec = spec(lossy(compressor, feedback), 3, model());
            let expected = run(&spec, None);
            for seed in 0..25 {
                assert_eq!(
                    run(&spec, Some(seed)),
                    expected,
                    "{compressor:?}, {feedback:?}, seed {seed}"
                );
            }
        }
    }
}

#[test]
fn the_order_of_tensors_cannot_be_seen() {
    let spec = spec(lossy(Compressor::Arc, Feedback::Ef14), 2, model());
    let expected = run(&spec, None);
    for shift in 0..spec.tensors.len() {
        let mut cluster = cluster(&spec, 4);
        for number in 0..3 {
            let gradients = gradients(&spec, 4, number);
            cluster.begin();
            for at in 0..spec.tensors.len() {
                for (rank, own) in gradients.iter().enumerate() {
                    // Another order on every worker.
                    let id = (at * 3 + shift * (rank + 1)) % spec.tensors.len();
                    let gradient = Gradient::F32(&own[id]);
                    cluster
                        .push(Rank(rank as u16), TensorId(id as u32), gradient)
                        .unwrap();
                }
                cluster.deliver(at).unwrap();
            }
            cluster.finish().unwrap();
        }
        assert_eq!(fingerprint(&cluster, 4), expected, "shift {shift}");
    }
}

#[test]
fn all_workers_get_the_same_bits() {
    for compressor in COMPRESSORS {
        let spec = spec(lossy(compressor, Feedback::Ef14), 2, model());
        let mut cluster = cluster(&spec, 4);
        for number in 0..3 {
            step(&mut cluster, &gradients(&spec, 4, number));
            for rank in 1..4 {
                assert_eq!(results(&cluster, 0), results(&cluster, rank));
            }
        }
    }
}

#[test]
fn the_number_of_threads_cannot_be_seen() {
    // Large enough that the kernels do split their work.
    let tensors = vec![
        tensor("a", &[700, 512]),
        tensor("b", &[4096, 96]),
        tensor("norm", &[300_000]),
    ];
    for feedback in [Feedback::Ef14, Feedback::Ef21m] {
        let spec = spec(lossy(Compressor::Arc, feedback), 2, tensors.clone());
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let mut cluster = cluster(&spec, 2);
                (0..2).for_each(|number| drop(step(&mut cluster, &gradients(&spec, 2, number))));
                fingerprint(&cluster, 2)
            })
        };
        let expected = on(1);
        assert!(on(2) == expected && on(4) == expected, "{feedback:?}");
    }
}

/// Segment by segment, worker by worker, without frames, buckets or states of rounds.
struct Naive {
    plan: Plan,
    workers: usize,
    /// Per segment (all shards', any order), every worker's state.
    segments: Vec<(Segment, Vec<TensorState>)>,
}

impl Naive {
    fn new(spec: &PlanSpec, workers: usize) -> Self {
        let plan = Plan::build(spec.clone()).unwrap();
        let algorithm = &spec.algorithm;
        let state = |segment: &Segment| {
            let tensor = &plan.tensors[segment.tensor.index()];
            match (tensor.sparse, algorithm.compressor) {
                (true, Compressor::Arc | Compressor::Randk | Compressor::Topk) => {
                    TensorState::new(algorithm.feedback, segment.rows(), tensor.width)
                }
                _ => TensorState {
                    width: tensor.width,
                    rows: segment.rows(),
                    ..TensorState::for_dense_tensor(
                        algorithm.feedback,
                        segment.rows() * tensor.width,
                        algorithm.rounds_dense_tensors(),
                    )
                },
            }
        };
        let all = plan
            .buckets
            .iter()
            .flat_map(|bucket| bucket.segments.iter().flatten());
        let segments = all
            .map(|segment| (*segment, vec![state(segment); workers]))
            .collect();
        Self {
            plan,
            workers,
            segments,
        }
    }

    /// One step. Returns `[tensor]` → result with padding.
    fn step(&mut self, gradients: &support::Gradients, number: u64) -> Vec<Vec<f32>> {
        let algorithm = self.plan.spec.algorithm.clone();
        let sizes = self
            .plan
            .tensors
            .iter()
            .map(|tensor| vec![0.0; tensor.rows * tensor.width]);
        let mut whole: Vec<Vec<f32>> = sizes.collect();
        for (segment, states) in &mut self.segments {
            let tensor = &self.plan.tensors[segment.tensor.index()];
            let range =
                segment.row_start as usize * tensor.width..segment.row_end as usize * tensor.width;
            let padded = |worker: usize| {
                let mut gradient = gradients[worker][tensor.id.index()].clone();
                gradient.resize(tensor.rows * tensor.width, 0.0);
                gradient[range.clone()].to_vec()
            };
            let mut buffers: Vec<Vec<f32>> = (0..self.workers).map(padded).collect();
            let own = AlgorithmConfig {
                density: tensor.spec.density.unwrap_or(algorithm.density),
                ..algorithm.clone()
            };
            let round = Round {
                kernels: &Fast,
                compressor: algorithm.compressor,
                kind: if tensor.sparse {
                    own.round_kind(number)
                } else {
                    RoundKind::Dense
                },
                energy: algorithm.energy,
                params: FeedbackParams {
                    eta: algorithm.eta,
                    decay: if tensor.sparse {
                        algorithm.feedback_decay
                    } else {
                        1.0
                    },
                },
                shape: SketchShape {
                    width: tensor.width,
                    rank: usize::from(algorithm.sketch_rank),
                    kind: algorithm.projection,
                },
                key: ProjectionKey {
                    seed: algorithm.seed,
                    tensor: tensor.id.0,
                    step: number,
                },
                codecs: RoundCodecs {
                    up: algorithm.codec_up(),
                    down: algorithm.codec_down(),
                    sketch: algorithm.codec_sketch(),
                    dense: match algorithm.round_kind(number) {
                        RoundKind::Dense => algorithm.codec_dense_round(),
                        RoundKind::Sparse { .. } => algorithm.codec_dense(),
                    },
                },
            };
            assert!(!round.run(states, &mut buffers).skipped);
            whole[tensor.id.index()][range].copy_from_slice(&buffers[0]);
        }
        whole
    }

    /// `residual` of a worker's tensor.
    fn residual(&self, worker: usize, tensor: TensorId) -> Vec<f32> {
        let mut own: Vec<_> = self
            .segments
            .iter()
            .filter(|(segment, _)| segment.tensor == tensor)
            .collect();
        own.sort_by_key(|(segment, _)| segment.row_start);
        own.iter()
            .flat_map(|(_, states)| states[worker].residual.iter().copied())
            .collect()
    }
}

fn wire() -> impl Strategy<Value = ValueType> {
    prop::sample::select(vec![
        ValueType::F32,
        ValueType::Bf16,
        ValueType::F16,
        ValueType::Int8,
        ValueType::Int4,
    ])
}

prop_compose! {
    fn algorithms()(
        compressor in prop::sample::select(COMPRESSORS.to_vec()),
        feedback in prop::sample::select(vec![Feedback::None, Feedback::Ef14, Feedback::Ef21, Feedback::Ef21m]),
        zeros in any::<bool>(),
        gaussian in any::<bool>(),
        density in 0.02f32..1.0,
        energy in prop_oneof![Just(1.0f32), 0.05f32..1.0],
        decay in 0.5f32..=1.0,
        sketch_rank in 1u16..7,
        block_width in prop::sample::select(vec![0u32, 0, 8, 24]),
        warmup_updates in 0u64..2,
        ramp_updates in 0u64..3,
        (wire_up, wire_down, wire_sketch, wire_dense, wire_warmup) in (wire(), wire(), wire(), wire(), wire()),
    ) -> AlgorithmConfig {
        allowed(AlgorithmConfig {
            compressor,
            init: if zeros { Init::Zeros } else { Init::FirstGradient },
            projection: if gaussian { ProjectionKind::Gaussian } else { ProjectionKind::Rademacher },
            energy: if compressor == Compressor::Arc { energy } else { 1.0 },
            feedback_decay: decay,
            sketch_rank,
            block_width,
            warmup_updates,
            ramp_updates,
            selection: SelectionPolicy::PerTensor,
            wire_up,
            wire_down,
            wire_sketch,
            wire_dense,
            wire_warmup,
            quant_block: 16,
            ..algorithm(feedback, density)
        })
    }
}

fn shapes() -> impl Strategy<Value = Vec<Vec<u64>>> {
    let shape = prop_oneof![
        3 => (1u64..70, 2u64..30).prop_map(|(m, n)| vec![m, n]),
        1 => (1u64..9, 1u64..5, 1u64..4, 1u64..4).prop_map(|(a, b, c, d)| vec![a, b, c, d]),
        1 => (1u64..3000).prop_map(|n| vec![n]),
        1 => Just(vec![]),
    ];
    prop::collection::vec(shape, 1..7)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn the_machines_do_what_a_naive_model_does(
        algorithm in algorithms(),
        shapes in shapes(),
        shards in 1u16..4,
        workers in 1u16..4,
        own_density in prop::option::of(0.05f32..1.0),
        order in any::<u64>(),
    ) {
        // The model draws randk's rows per tensor, not per segment.
        let shards = if algorithm.compressor == Compressor::Randk { 1 } else { shards };
        let mut tensors: Vec<_> =
            shapes.iter().enumerate().map(|(id, shape)| tensor(&format!("t{id}"), shape)).collect();
        tensors[0].density = own_density;
        let spec = spec(algorithm, shards, tensors);
        let options = MemoryOptions { order_seed: Some(order), ..MemoryOptions::default() };
        let mut cluster = MemoryCluster::new(spec.clone(), workers, &options).unwrap();
        let mut naive = Naive::new(&spec, usize::from(workers));
        for number in 0..4 {
            let gradients = gradients(&spec, usize::from(workers), number);
            let outcomes = step(&mut cluster, &gradients);
            prop_assert!(outcomes.iter().all(|outcome| !outcome.unwrap().skipped));
            let expected = naive.step(&gradients, number);
            for rank in 0..workers {
                for got in results(&cluster, rank) {
                    let expected = &expected[got.tensor.index()][..got.values.len()];
                    prop_assert_eq!(bits(&got.values), bits(expected), "step {}, tensor {}", number, got.tensor);
                }
                for (name, values) in state(&cluster, rank).arrays {
                    if let Some(name) = name.strip_prefix("residual/t") {
                        let id = TensorId(name.parse().unwrap());
                        prop_assert_eq!(bits(&values), bits(&naive.residual(usize::from(rank), id)));
                    }
                }
            }
        }
    }
}
