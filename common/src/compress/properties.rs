//! What the rules promise, and one test for each way in which implementations of them commonly break ("traps") that
//! is a matter of mathematics. The numbers are those of the project's list of twelve; the others concern
//! whole jobs and are tested where those are.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::fast::Fast;
use super::philox;
use super::reference::Reference;
use super::round::{Round, RoundCodecs, RoundTrace};
use super::*;
use crate::config::algorithm::{Compressor, RoundKind};
use proptest::prelude::*;

const RULES: [Feedback; 4] = [
    Feedback::None,
    Feedback::Ef14,
    Feedback::Ef21,
    Feedback::Ef21m,
];
const F32: ValueCodec = ValueCodec {
    value_type: ValueType::F32,
    quant_block: 64,
};
const INT4: ValueCodec = ValueCodec {
    value_type: ValueType::Int4,
    quant_block: 16,
};

/// Numbers in (−1, 1), rows of very different size.
fn gradient(seed: u32, rows: usize, width: usize) -> Vec<f32> {
    let key = ProjectionKey {
        seed: 99,
        tensor: seed,
        step: 0,
    };
    let words = (0..(rows * width).div_ceil(4) as u32).flat_map(|b| philox::block(key, b));
    let values = words.take(rows * width).enumerate();
    values
        .map(|(i, w)| (w as i32) as f32 / 2_147_483_648.0 * (1.0 + (i / width * 7 % 5) as f32))
        .collect()
}

fn round(
    compressor: Compressor,
    density: f32,
    width: usize,
    step: u64,
    codec: ValueCodec,
) -> Round<'static> {
    Round {
        kernels: &Fast,
        compressor,
        kind: RoundKind::Sparse { density },
        energy: 1.0,
        params: FeedbackParams {
            eta: 0.3,
            decay: 1.0,
        },
        shape: SketchShape {
            width,
            rank: 4,
            kind: ProjectionKind::Rademacher,
        },
        key: ProjectionKey {
            seed: 3,
            tensor: 1,
            step,
        },
        codecs: RoundCodecs {
            up: codec,
            down: F32,
            sketch: F32,
            dense: codec,
        },
    }
}

fn mean(vectors: &[Vec<f32>]) -> Vec<f32> {
    let n = vectors.len() as f64;
    (0..vectors[0].len())
        .map(|i| (vectors.iter().map(|v| f64::from(v[i])).sum::<f64>() / n) as f32)
        .collect()
}

fn assert_close(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}: length");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!(
            (a - b).abs() <= 1e-4 * (1.0 + b.abs()),
            "{what}[{i}]: {a} and {b}"
        );
    }
}

/// One worker's round whose rows are given.
fn with_rows(round: &Round<'_>, state: &mut TensorState, buffer: &mut [f32], rows: &[u32]) {
    let all = 0..state.rows;
    let dense = round.kind == RoundKind::Dense;
    assert!(
        round
            .kernels
            .input(state, round.params, dense, buffer, all.clone())
    );
    let mut sent = Vec::new();
    round
        .kernels
        .gather(state, dense, buffer, rows, F32, &mut sent);
    let mut values = vec![0.0; rows.len() * state.width];
    F32.decode(&sent, &mut values);
    round
        .kernels
        .commit(state, dense, buffer, all, rows, Some(&sent), F32, &values);
}

fn squares(v: &[f32]) -> f64 {
    v.iter().map(|x| f64::from(*x).powi(2)).sum()
}

#[test]
fn trap_1_rows_that_cancel_between_workers_are_not_chosen() {
    let mut buffers = vec![vec![100.0, 100.0, 1.0, 1.0], vec![-100.0, -100.0, 1.0, 1.0]];
    let mut states = vec![TensorState::new(Feedback::None, 2, 2); 2];
    let trace = round(Compressor::Arc, 0.5, 2, 0, F32).run(&mut states, &mut buffers);
    assert_eq!(trace.selected, [1]);
    assert_eq!(buffers[0], [0.0, 0.0, 1.0, 1.0]);
}

#[test]
fn trap_2_what_is_sketched_is_the_input_not_the_raw_gradient() {
    let g = vec![3.0, 0.0, 0.0];
    let mut ef14 = TensorState::new(Feedback::Ef14, 3, 1);
    ef14.residual = vec![0.0, 0.0, 5.0];
    let trace = round(Compressor::Arc, 0.3, 1, 0, F32).run(&mut [ef14], &mut [g.clone()]);
    assert_eq!((trace.selected, trace.mean), (vec![2], vec![5.0]));
    let mut ef21 = TensorState::new(Feedback::Ef21, 3, 1);
    ef21.local = vec![3.0, -1.0, 0.0];
    let trace = round(Compressor::Arc, 0.3, 1, 0, F32).run(&mut [ef21], &mut [g.clone()]);
    assert_eq!((trace.selected, trace.mean), (vec![1], vec![1.0]));
    let mut ef21m = TensorState::new(Feedback::Ef21m, 3, 1);
    ef21m.momentum = vec![0.0, 10.0, 0.0];
    let trace = round(Compressor::Arc, 0.3, 1, 0, F32).run(&mut [ef21m], &mut [g]);
    assert_eq!((trace.selected, trace.mean), (vec![1], vec![7.0]));
}

#[test]
fn trap_3_v_is_the_same_whoever_draws_it_in_whatever_order_and_split() {
    let (rows, shape) = (
        40,
        SketchShape {
            width: 50,
            rank: 5,
            kind: ProjectionKind::Gaussian,
        },
    );
    let (a, b) = (
        ProjectionKey {
            seed: 1,
            tensor: 0,
            step: 7,
        },
        ProjectionKey {
            seed: 1,
            tensor: 1,
            step: 7,
        },
    );
    let (state, u) = (
        TensorState::new(Feedback::None, rows, 50),
        gradient(1, rows, 50),
    );
    let sketch = |key, rows: Range<usize>| {
        let mut out = vec![0.0; rows.len() * 5];
        Fast.sketch(&state, shape, key, &u, rows, &mut out);
        out
    };
    let (first_a, first_b) = (sketch(a, 0..40), sketch(b, 0..40));
    assert_eq!(
        (sketch(b, 0..40), sketch(a, 0..40)),
        (first_b, first_a.clone()),
        "order of draws"
    );
    assert_eq!(
        [sketch(a, 0..13), sketch(a, 13..40)].concat(),
        first_a,
        "split over shards"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn trap_4_the_mean_of_the_states_is_one_worker_on_the_mean_gradient(
        feedback in prop::sample::select(RULES.to_vec()), randk: bool, dense_start: bool,
        workers in 1usize..5, rows in 1usize..25, width in 1usize..20, density in 0.05f32..1.0, seed in 0u32..1000,
    ) {
        let compressor = if randk { Compressor::Randk } else { Compressor::Arc };
        let mut states = vec![TensorState::new(feedback, rows, width); workers];
        let mut single = states[0].clone();
        for step in 0..5 {
            let mut round = round(compressor, density, width, step, F32);
            if dense_start && step == 0 {
                round.kind = RoundKind::Dense;
            }
            let mut buffers: Vec<_> = (0..workers).map(|i| gradient(seed + i as u32 * 50 + step as u32, rows, width)).collect();
            let mut alone = mean(&buffers);
            let trace = round.run(&mut states, &mut buffers);
            with_rows(&round, &mut single, &mut alone, &trace.selected);
            for buffer in &buffers {
                assert_close("result", buffer, &alone);
            }
        }
        let all = |f: fn(&TensorState) -> &Vec<f32>| mean(&states.iter().map(|s| f(s).clone()).collect::<Vec<_>>());
        assert_close("residual", &all(|s| &s.residual), &single.residual);
        assert_close("local", &all(|s| &s.local), &single.local);
        assert_close("momentum", &all(|s| &s.momentum), &single.momentum);
        assert_close("global", &all(|s| &s.global), &single.global);
        assert_close("H = mean h", &all(|s| &s.local), &states[0].global);
    }

    #[test]
    fn trap_4_density_1_is_dense_averaging(
        feedback in prop::sample::select(RULES.to_vec()),
        compressor in prop::sample::select(vec![Compressor::Arc, Compressor::Randk, Compressor::Topk, Compressor::Dense]),
        workers in 1usize..5, rows in 1usize..25, width in 1usize..20, seed in 0u32..1000,
    ) {
        let mut states = vec![TensorState::new(feedback, rows, width); workers];
        for step in 0..4 {
            let mut round = round(compressor, 1.0, width, step, F32);
            round.params.eta = 1.0;
            let mut buffers: Vec<_> = (0..workers).map(|i| gradient(seed + i as u32 * 50 + step as u32, rows, width)).collect();
            let expected = mean(&buffers);
            round.run(&mut states, &mut buffers);
            for buffer in &buffers {
                assert_close("result", buffer, &expected);
            }
        }
    }

    /// E over V of ‖A − C(A)‖² ≤ (1 − K/m)‖A‖² for A the mean of the inputs, without any rescaling.
    #[test]
    fn trap_5_the_mean_contracts(
        workers in 1usize..4, rows in 2usize..25, width in 1usize..20, density in 0.05f32..1.0, rank in 1usize..5, gaussian: bool, seed in 0u32..1000,
    ) {
        let gradients: Vec<_> = (0..workers).map(|i| gradient(seed + i as u32 * 50, rows, width)).collect();
        let a = mean(&gradients);
        let steps = 4000;
        let mut lost = 0.0;
        for step in 0..steps {
            let mut round = round(Compressor::Arc, density, width, step, F32);
            round.shape.rank = rank;
            round.shape.kind = if gaussian { ProjectionKind::Gaussian } else { ProjectionKind::Rademacher };
            let (mut states, mut buffers) = (vec![TensorState::new(Feedback::None, rows, width); workers], gradients.clone());
            round.run(&mut states, &mut buffers);
            lost += squares(&a.iter().zip(&buffers[0]).map(|(a, c)| a - c).collect::<Vec<_>>());
        }
        let bound = (1.0 - rows_to_keep(density, rows) as f64 / rows as f64) * squares(&a);
        // Some matrices meet the bound with equality, so the mean of finitely many draws lies above it half the time.
        // Every draw's loss is in [0, ‖A‖²]: by Hoeffding's inequality it lies ε‖A‖² above with probability exp(−2nε²),
        // here 1e-9.
        let allowance = (9.0 * 10f64.ln() / (2.0 * steps as f64)).sqrt();
        prop_assert!(lost / steps as f64 <= bound + allowance * squares(&a), "{} > {bound}", lost / steps as f64);
    }

    #[test]
    fn trap_10_the_estimate_stays_the_mean_of_the_workers(
        value_type in prop::sample::select(vec![ValueType::F32, ValueType::Bf16, ValueType::F16, ValueType::Int8, ValueType::Int4]),
        compressor in prop::sample::select(vec![Compressor::Arc, Compressor::Randk, Compressor::Topk]),
        feedback in prop::sample::select(vec![Feedback::Ef21, Feedback::Ef21m]),
        reference: bool, workers in 1usize..5, rows in 1usize..25, width in 1usize..20, density in 0.05f32..1.0, seed in 0u32..1000,
    ) {
        let mut round = round(compressor, density, width, 0, ValueCodec { value_type, quant_block: 16 });
        // What settings allow: the mean comes back exactly.
        round.codecs.dense = F32;
        let kernels: &'static dyn Kernels = if reference { &Reference } else { &Fast };
        estimates_stay_equal(kernels, feedback, &round, (workers, rows, width), seed);
    }

    #[test]
    fn sent_and_residual_are_the_input_whatever_the_wire_rounds(
        value_type in prop::sample::select(vec![ValueType::F32, ValueType::Bf16, ValueType::F16, ValueType::Int8, ValueType::Int4]),
        compressor in prop::sample::select(vec![Compressor::Arc, Compressor::Randk, Compressor::Topk, Compressor::Dense]),
        reference: bool, rows in 1usize..25, width in 1usize..20, density in 0.05f32..1.0, seed in 0u32..1000,
    ) {
        let codec = ValueCodec { value_type, quant_block: 16 };
        for feedback in [Feedback::Ef14, Feedback::Ef21, Feedback::Ef21m] {
            let mut state = TensorState::new(feedback, rows, width);
            for step in 0..4 {
                let mut round = round(compressor, density, width, step, codec);
                if reference {
                    round.kernels = &Reference;
                }
                round.params.decay = 0.9;
                // A dense round restarts ef21's estimate, which therefore moves from 0.
                let dense = compressor == Compressor::Dense;
                if dense {
                    round.kind = RoundKind::Dense;
                }
                let mut input = gradient(seed + step as u32, rows, width);
                let mut buffers = [input.clone()];
                let mut open = state.clone();
                assert!(Reference.input(&mut open, round.params, dense, &mut input, 0..rows));
                let input = open.formed(&input);
                let h_before = if dense { vec![0.0; rows * width] } else { state.local.clone() };
                let mut states = [state];
                let trace = round.run(&mut states, &mut buffers);
                [state] = states;
                let sent = sent_rows(&trace, codec, rows, width);
                let kept: Vec<f32> = match feedback {
                    Feedback::Ef14 => state.residual.iter().zip(&sent).map(|(e, s)| e + s).collect(),
                    // h moved by what was sent, so the next input still holds all that was not.
                    _ => {
                        let moved: Vec<f32> = h_before.iter().zip(&sent).map(|(h, s)| h + s).collect();
                        prop_assert_eq!(&moved, &state.local);
                        continue;
                    }
                };
                assert_close("sent + residual", &kept, input);
            }
        }
    }
}

/// Trap 10 under ef21 and ef21m: whatever wire_up rounds, H stays the mean of all h, through dense rounds too.
fn estimates_stay_equal(
    kernels: &'static dyn Kernels,
    feedback: Feedback,
    round: &Round<'_>,
    sizes: (usize, usize, usize),
    seed: u32,
) {
    let (workers, rows, width) = sizes;
    let mut states = vec![TensorState::new(feedback, rows, width); workers];
    for step in 0..6 {
        let round = Round {
            kernels,
            key: ProjectionKey { step, ..round.key },
            kind: if step == 2 {
                RoundKind::Dense
            } else {
                round.kind
            },
            ..*round
        };
        let mut buffers: Vec<_> = (0..workers)
            .map(|i| gradient(seed + i as u32 * 50 + step as u32, rows, width))
            .collect();
        round.run(&mut states, &mut buffers);
        let all: Vec<_> = states.iter().map(|s| s.local.clone()).collect();
        assert_close("H = mean h", &mean(&all), &states[0].global);
        assert!(states.iter().all(|s| s.global == states[0].global));
    }
}

/// What one worker sent, scattered into the tensor.
fn sent_rows(trace: &RoundTrace, codec: ValueCodec, rows: usize, width: usize) -> Vec<f32> {
    let mut values = vec![0.0; trace.selected.len() * width];
    codec.decode(&trace.sent[0], &mut values);
    let mut out = vec![0.0; rows * width];
    for (row, values) in trace.selected.iter().zip(values.chunks_exact(width)) {
        out[*row as usize * width..(*row as usize + 1) * width].copy_from_slice(values);
    }
    out
}

#[test]
fn trap_6_one_overflow_skips_the_round_and_touches_no_state() {
    for feedback in RULES {
        let mut states = vec![TensorState::new(feedback, 4, 3); 2];
        let mut buffers = vec![gradient(1, 4, 3), gradient(2, 4, 3)];
        round(Compressor::Arc, 0.5, 3, 0, F32).run(&mut states, &mut buffers);
        let before = states.clone();
        let mut buffers = vec![gradient(3, 4, 3), gradient(4, 4, 3)];
        buffers[1][5] = f32::INFINITY;
        assert!(
            round(Compressor::Arc, 0.5, 3, 1, F32)
                .run(&mut states, &mut buffers)
                .skipped
        );
        assert_eq!(states, before);
    }
}

#[test]
fn trap_7_an_absent_gradient_contributes_zeros() {
    for feedback in [Feedback::None, Feedback::Ef14] {
        let mut states = vec![TensorState::new(feedback, 3, 2); 2];
        let mut buffers = vec![vec![0.0; 6], vec![2.0, 4.0, 0.5, 0.5, 8.0, 2.0]];
        let trace = round(Compressor::Arc, 1.0, 2, 0, F32).run(&mut states, &mut buffers);
        assert_eq!(trace.mean, [1.0, 2.0, 0.25, 0.25, 4.0, 1.0]);
        assert_eq!(buffers[0], buffers[1]);
    }
}

/// Under ef14 with any wire: Σ results + mean residual = Σ mean gradients; nothing is lost, only late.
#[test]
fn trap_10_what_rounding_loses_comes_later() {
    let (workers, rows, width) = (3, 12, 10);
    for (compressor, dense_tensor) in [
        (Compressor::Arc, false),
        (Compressor::Topk, false),
        (Compressor::Dense, true),
    ] {
        let state = if dense_tensor {
            TensorState::for_dense_tensor(Feedback::Ef21, rows * width, true)
        } else {
            TensorState::new(Feedback::Ef14, rows, width)
        };
        let shape = (state.rows, state.width);
        let mut states = vec![state; workers];
        let (mut given, mut got) = (vec![0f32; rows * width], vec![0f32; rows * width]);
        for step in 0..20 {
            let mut round = round(compressor, 0.25, shape.1, step, INT4);
            if dense_tensor {
                round.kind = RoundKind::Dense;
                // The mean must come back exactly for this sum to close: only the way up has feedback.
                round.codecs.dense = ValueCodec {
                    value_type: ValueType::Bf16,
                    quant_block: 16,
                };
            }
            let mut buffers: Vec<_> = (0..workers)
                .map(|i| gradient(i as u32 * 50 + step as u32, rows, width))
                .collect();
            given
                .iter_mut()
                .zip(mean(&buffers))
                .for_each(|(s, g)| *s += g);
            let trace = round.run(&mut states, &mut buffers);
            let up: Vec<f32> = if dense_tensor {
                mean_sent(&trace, round.codecs.dense)
            } else {
                buffers[0].clone()
            };
            got.iter_mut().zip(up).for_each(|(s, g)| *s += g);
        }
        let residual = mean(
            &states
                .iter()
                .map(|s| s.residual.clone())
                .collect::<Vec<_>>(),
        );
        assert!(squares(&residual) > 0.0);
        let together: Vec<f32> = got.iter().zip(&residual).map(|(a, b)| a + b).collect();
        assert_close("results + residual", &together, &given);
    }
}

fn mean_sent(trace: &RoundTrace, codec: ValueCodec) -> Vec<f32> {
    let decoded = trace.sent.iter().map(|bytes| {
        let mut values = vec![0.0; trace.mean.len()];
        codec.decode(bytes, &mut values);
        values
    });
    mean(&decoded.collect::<Vec<_>>())
}

#[test]
fn dense_tensors_keep_state_only_where_the_wire_loses_something() {
    for feedback in RULES {
        assert_eq!(
            TensorState::for_dense_tensor(feedback, 5, false).residual,
            [0f32; 0]
        );
        let lossy = TensorState::for_dense_tensor(feedback, 5, true)
            .residual
            .len();
        assert_eq!(lossy, if feedback == Feedback::None { 0 } else { 5 });
    }
}

/// A worker that missed the round: ef14 keeps all; ef21 follows the mean, so that H stays mean hᵢ.
#[test]
fn trap_12_values_that_missed_the_round_are_late_not_lost() {
    for kernels in [&Fast as &dyn Kernels, &Reference] {
        let mut ef14 = TensorState::new(Feedback::Ef14, 2, 2);
        ef14.residual = vec![1.0; 4];
        let mut buffer = vec![1.0, 2.0, 3.0, 4.0];
        let params = FeedbackParams {
            eta: 1.0,
            decay: 0.5,
        };
        assert!(kernels.input(&mut ef14, params, false, &mut buffer, 0..2));
        kernels.commit(
            &mut ef14,
            false,
            &mut buffer,
            0..2,
            &[1],
            None,
            F32,
            &[9.0, 9.0],
        );
        assert_eq!(ef14.residual, [1.5, 2.5, 3.5, 4.5]);
        assert_eq!(buffer, [0.0, 0.0, 9.0, 9.0]);
        for dense in [false, true] {
            let mut ef21 = TensorState::new(Feedback::Ef21, 1, 2);
            (ef21.local, ef21.global) = (vec![1.0, 1.0], vec![2.0, 2.0]);
            kernels.commit(
                &mut ef21,
                dense,
                &mut [5.0, 5.0],
                0..1,
                &[0],
                None,
                F32,
                &[3.0, 4.0],
            );
            let global = if dense { [3.0, 4.0] } else { [5.0, 6.0] };
            assert_eq!(
                (&ef21.local[..], &ef21.global[..]),
                (&global[..], &global[..])
            );
        }
    }
}
