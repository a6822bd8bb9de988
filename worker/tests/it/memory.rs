//! Whole steps of N workers and S shards: what the algorithm promises, checked on the machines that run in production.

use crate::support::{
    algorithm, array, assert_close, bits, cluster, fingerprint, gradients, mean, model, results,
    spec, state, step, tensor,
};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, Init, ValueType};
use arc_topk_common::ids::{Rank, ShardId, Step, TensorId};
use arc_topk_worker::backend::Gradient;
use arc_topk_worker::memory::{MemoryCluster, MemoryError, MemoryOptions};
use arc_topk_worker::reducer::Reducer;
use arc_topk_worker::step::{ImportError, StepOutcome};
use half::{bf16, f16};

#[test]
fn density_one_is_dense_averaging() {
    for feedback in [
        Feedback::None,
        Feedback::Ef14,
        Feedback::Ef21,
        Feedback::Ef21m,
    ] {
        for shards in [1, 3] {
            let algorithm = AlgorithmConfig {
                eta: 1.0,
                init: Init::Zeros,
                ..algorithm(feedback, 1.0)
            };
            let spec = spec(algorithm, shards, model());
            let mut cluster = cluster(&spec, 3);
            for number in 0..3 {
                let gradients = gradients(&spec, 3, number);
                let outcomes = step(&mut cluster, &gradients);
                assert_eq!(outcomes[0].unwrap().stats.density, 1.0);
                for got in results(&cluster, 1) {
                    let what = format!(
                        "{feedback:?}, {shards} shards, step {number}, tensor {}",
                        got.tensor
                    );
                    assert_close(
                        &what,
                        &got.values,
                        &mean(&gradients, got.tensor.index()),
                        1e-5,
                    );
                }
            }
        }
    }
}

/// Trap 4: with a shared mask C is linear.
#[test]
fn mean_of_states_is_the_state_of_one_worker_on_the_mean_gradient() {
    for (feedback, fields) in [
        (Feedback::Ef14, &["residual"][..]),
        (Feedback::Ef21, &["local", "global"]),
        (Feedback::Ef21m, &["local", "global", "momentum"]),
    ] {
        let spec = spec(algorithm(feedback, 0.25), 2, model());
        let (mut many, mut one) = (cluster(&spec, 4), cluster(&spec, 1));
        for number in 0..4 {
            let gradients = gradients(&spec, 4, number);
            let means = vec![
                (0..spec.tensors.len())
                    .map(|id| mean(&gradients, id))
                    .collect(),
            ];
            step(&mut many, &gradients);
            step(&mut one, &means);
            for (many, one) in results(&many, 2).iter().zip(results(&one, 0)) {
                assert_eq!(many.rows, one.rows, "{feedback:?}, tensor {}", one.tensor);
                assert_close(
                    &format!("{feedback:?}, tensor {}", one.tensor),
                    &many.values,
                    &one.values,
                    1e-5,
                );
            }
        }
        for field in fields {
            for name in ["embed", "conv", "head"] {
                let name = format!("{field}/{name}");
                let alone = array(&one, 0, &name).unwrap();
                let all: Vec<Vec<f32>> = (0..4)
                    .map(|rank| array(&many, rank, &name).unwrap())
                    .collect();
                let mean: Vec<f32> = (0..alone.len())
                    .map(|i| all.iter().map(|a| a[i]).sum::<f32>() / 4.0)
                    .collect();
                assert_close(&name, &mean, &alone, 1e-5);
            }
        }
    }
}

/// Trap 6.
#[test]
fn a_nan_on_one_worker_makes_all_skip_and_leaves_every_state_untouched() {
    for compressor in [
        Compressor::Arc,
        Compressor::Randk,
        Compressor::Topk,
        Compressor::Dense,
    ] {
        for feedback in [Feedback::Ef14, Feedback::Ef21m] {
            let lossy = AlgorithmConfig {
                compressor,
                wire_dense: if feedback == Feedback::Ef14 {
                    ValueType::Bf16
                } else {
                    ValueType::F32
                },
                ..algorithm(feedback, 0.2)
            };
            let spec = spec(lossy, 2, model());
            let mut cluster = cluster(&spec, 3);
            step(&mut cluster, &gradients(&spec, 3, 0));
            step(&mut cluster, &gradients(&spec, 3, 1));
            let before: Vec<_> = (0..3).map(|rank| state(&cluster, rank)).collect();
            for (id, bad) in [(0, f32::NAN), (1, f32::INFINITY), (7, f32::NEG_INFINITY)] {
                let mut poisoned = gradients(&spec, 3, 2);
                poisoned[1][id][5] = bad;
                for outcome in step(&mut cluster, &poisoned) {
                    assert!(outcome.unwrap().skipped);
                    assert_eq!(outcome.unwrap().update, 2);
                }
                assert!(results(&cluster, 0).is_empty());
            }
            for (rank, before) in before.iter().enumerate() {
                let after = state(&cluster, rank as u16);
                assert_eq!(after.step, Step(5));
                assert_eq!(after.update, 2);
                for ((name, was), (_, is)) in before.arrays.iter().zip(&after.arrays) {
                    assert_eq!(bits(was), bits(is), "{compressor:?}, {feedback:?}, {name}");
                }
            }
            let outcome = step(&mut cluster, &gradients(&spec, 3, 3))[2].unwrap();
            assert!(!outcome.skipped && outcome.update == 2 && outcome.step == Step(5));
        }
    }
}

#[test]
fn a_sum_that_overflows_makes_all_skip() {
    let spec = spec(
        algorithm(Feedback::Ef14, 1.0),
        1,
        vec![tensor("w", &[8, 8])],
    );
    let mut cluster = cluster(&spec, 2);
    let huge = vec![vec![vec![3e38; 64]]; 2];
    assert!(
        step(&mut cluster, &huge)
            .iter()
            .all(|outcome| outcome.unwrap().skipped)
    );
}

/// Trap 7.
#[test]
fn absent_gradients_are_zeros() {
    let spec = spec(algorithm(Feedback::Ef14, 0.3), 2, model());
    let (mut absent, mut zeros) = (cluster(&spec, 3), cluster(&spec, 3));
    for number in 0..3 {
        let mut gradients = gradients(&spec, 3, number);
        gradients[1][0].fill(0.0);
        gradients[1][1].fill(0.0);
        gradients[2].iter_mut().for_each(|tensor| tensor.fill(0.0));
        step(&mut zeros, &gradients);
        let given = |rank: Rank, tensor: TensorId| rank.0 == 0 || (rank.0 == 1 && tensor.0 > 1);
        absent
            .step(|rank, tensor| {
                given(rank, tensor).then(|| &gradients[rank.index()][tensor.index()][..])
            })
            .unwrap();
    }
    assert_eq!(fingerprint(&absent, 3), fingerprint(&zeros, 3));
}

/// Traps 10 and conservation: with one worker and an exact way down, all results and what is left are all gradients.
#[test]
fn what_the_wire_rounds_off_stays_in_the_residual() {
    for wire in [
        ValueType::F32,
        ValueType::Bf16,
        ValueType::F16,
        ValueType::Int8,
        ValueType::Int4,
    ] {
        for compressor in [Compressor::Arc, Compressor::Randk, Compressor::Topk] {
            let algorithm = AlgorithmConfig {
                compressor,
                wire_up: wire,
                wire_sketch: ValueType::Bf16,
                ..algorithm(Feedback::Ef14, 0.3)
            };
            let spec = spec(algorithm, 2, model());
            let mut cluster = cluster(&spec, 1);
            let mut given: Vec<Vec<f32>> = gradients(&spec, 1, 0)[0]
                .iter()
                .map(|t| vec![0.0; t.len()])
                .collect();
            let mut came = given.clone();
            for number in 0..4 {
                let gradients = gradients(&spec, 1, number);
                step(&mut cluster, &gradients);
                for got in results(&cluster, 0) {
                    let id = got.tensor.index();
                    came[id]
                        .iter_mut()
                        .zip(&got.values)
                        .for_each(|(sum, x)| *sum += x);
                    given[id]
                        .iter_mut()
                        .zip(&gradients[0][id])
                        .for_each(|(sum, x)| *sum += x);
                }
            }
            for (id, tensor) in spec.tensors.iter().enumerate() {
                if let Some(left) = array(&cluster, 0, &format!("residual/{}", tensor.name)) {
                    came[id]
                        .iter_mut()
                        .zip(&left)
                        .for_each(|(sum, x)| *sum += x);
                }
                assert_close(
                    &format!("{wire:?}, {compressor:?}, {}", tensor.name),
                    &came[id],
                    &given[id],
                    1e-5,
                );
            }
        }
    }
}

#[test]
fn dense_tensors_on_a_lossy_wire_keep_a_residual_whatever_the_rule() {
    // ef21's rules take a lossy wire only where nothing is compressed.
    for (compressor, feedback) in [
        (Compressor::Arc, Feedback::Ef14),
        (Compressor::Dense, Feedback::Ef21),
        (Compressor::Dense, Feedback::Ef21m),
    ] {
        let algorithm = AlgorithmConfig {
            compressor,
            wire_dense: ValueType::Int4,
            ..algorithm(feedback, 0.3)
        };
        let spec = spec(algorithm, 2, model());
        let mut cluster = cluster(&spec, 2);
        let gradients = gradients(&spec, 2, 0);
        step(&mut cluster, &gradients);
        let residual = array(&cluster, 0, "residual/norm").unwrap();
        assert!(residual.iter().any(|x| *x != 0.0), "{feedback:?}");
        assert!(
            residual
                .iter()
                .zip(&gradients[0][1])
                .all(|(e, g)| e.abs() <= 0.2 * g.abs().max(1.0))
        );
    }
}

#[test]
fn exact_dense_training_keeps_no_state() {
    let algorithm = AlgorithmConfig {
        compressor: Compressor::Dense,
        ..algorithm(Feedback::Ef21m, 0.3)
    };
    let spec = spec(algorithm, 2, model());
    let mut cluster = cluster(&spec, 2);
    step(&mut cluster, &gradients(&spec, 2, 0));
    assert!(state(&cluster, 0).arrays.is_empty());
}

/// Wherever a worker is lost, the others agree to the bit and go on.
#[test]
fn a_worker_lost_in_mid_step_leaves_the_others_equal() {
    for delivered in 0..60 {
        let spec = spec(algorithm(Feedback::Ef14, 0.3), 2, model());
        let options = MemoryOptions {
            order_seed: Some(delivered),
            ..MemoryOptions::default()
        };
        let mut cluster = MemoryCluster::new(spec.clone(), 3, &options).unwrap();
        step(&mut cluster, &gradients(&spec, 3, 0));
        let second = gradients(&spec, 3, 1);
        cluster.begin();
        for id in (0..spec.tensors.len()).rev() {
            for (rank, own) in second.iter().enumerate() {
                let gradient = Gradient::F32(&own[id]);
                cluster
                    .push(Rank(rank as u16), TensorId(id as u32), gradient)
                    .unwrap();
            }
        }
        cluster.deliver(delivered as usize).unwrap();
        cluster.lose(Rank(1));
        let outcomes = cluster.finish().unwrap();
        assert!(outcomes[1].is_none() && !outcomes[0].unwrap().skipped);
        assert_eq!(
            results(&cluster, 0),
            results(&cluster, 2),
            "lost after {delivered} frames"
        );
        step(&mut cluster, &gradients(&spec, 3, 2));
        assert_eq!(results(&cluster, 0), results(&cluster, 2));
    }
}

#[test]
fn too_few_workers_end_the_job_with_a_reason() {
    let spec = spec(algorithm(Feedback::Ef14, 0.3), 2, model());
    let options = MemoryOptions {
        min_workers: 2,
        ..MemoryOptions::default()
    };
    let mut cluster = MemoryCluster::new(spec.clone(), 2, &options).unwrap();
    cluster.begin();
    cluster.lose(Rank(0));
    let error = cluster.finish().unwrap_err();
    assert!(
        matches!(&error, MemoryError::Worker { rank: Rank(1), .. }),
        "{error}"
    );
    assert!(error.to_string().contains("TooFewWorkers"), "{error}");
}

#[test]
fn a_saved_state_continues_to_the_bit() {
    for feedback in [Feedback::Ef14, Feedback::Ef21, Feedback::Ef21m] {
        let algorithm = AlgorithmConfig {
            warmup_updates: 1,
            ramp_updates: 3,
            wire_up: ValueType::Int4,
            wire_down: if feedback == Feedback::Ef14 {
                ValueType::Int8
            } else {
                ValueType::F32
            },
            ..algorithm(feedback, 0.2)
        };
        let spec = spec(algorithm, 2, model());
        let mut whole = cluster(&spec, 2);
        (0..3).for_each(|number| drop(step(&mut whole, &gradients(&spec, 2, number))));
        let saved: Vec<_> = (0..2).map(|rank| state(&whole, rank)).collect();
        let options = MemoryOptions {
            start: saved[0].step,
            ..MemoryOptions::default()
        };
        let mut resumed = MemoryCluster::new(spec.clone(), 2, &options).unwrap();
        for (rank, saved) in (0..).zip(saved) {
            resumed
                .worker_mut(Rank(rank))
                .unwrap()
                .import_state(saved)
                .unwrap();
        }
        for number in 3..6 {
            step(&mut whole, &gradients(&spec, 2, number));
            step(&mut resumed, &gradients(&spec, 2, number));
            assert_eq!(
                fingerprint(&whole, 2),
                fingerprint(&resumed, 2),
                "{feedback:?}, step {number}"
            );
        }
    }
}

#[test]
fn updates_that_are_averaged_elsewhere_end_the_warm_up() {
    let algorithm = AlgorithmConfig {
        warmup_updates: 3,
        ..algorithm(Feedback::Ef14, 0.25)
    };
    let spec = spec(algorithm, 2, model());
    let mut cluster = cluster(&spec, 2);
    let density = |outcomes: &[Option<StepOutcome>]| outcomes[0].unwrap().stats.density;
    let first = step(&mut cluster, &gradients(&spec, 2, 0));
    assert_eq!(density(&first), 1.0);
    for rank in 0..2 {
        let machine = cluster.worker_mut(Rank(rank)).unwrap();
        machine.pass_update().unwrap();
        machine.pass_update().unwrap();
        assert_eq!((machine.step(), machine.update()), (Step(1), 3));
    }
    let second = step(&mut cluster, &gradients(&spec, 2, 1));
    assert!(density(&second) < 0.5, "the shards followed");
}

#[test]
fn what_was_not_sent_can_be_taken_and_put_back() {
    let spec = spec(algorithm(Feedback::Ef14, 0.25), 2, model());
    let mut cluster = cluster(&spec, 2);
    for number in 0..2 {
        step(&mut cluster, &gradients(&spec, 2, number));
    }
    let before = state(&cluster, 0);
    assert!(!before.arrays.is_empty());
    for tensor in 0..spec.tensors.len() {
        let id = TensorId(tensor as u32);
        let name = format!("residual/{}", spec.tensors[tensor].name);
        let kept = array(&cluster, 0, &name).unwrap_or_default();
        let machine = cluster.worker_mut(Rank(0)).unwrap();
        let taken = machine.swap_residual(id, Vec::new()).unwrap();
        assert_eq!(bits(&taken), bits(&kept), "{name}");
        let wrong = machine.swap_residual(id, vec![1.0; 1_000_003]);
        assert!(matches!(wrong, Err(ImportError::Length { .. })), "{name}");
        if !kept.is_empty() {
            let left = array(&cluster, 0, &name).unwrap_or_default();
            assert!(left.iter().all(|x| *x == 0.0), "{name}");
        }
        let machine = cluster.worker_mut(Rank(0)).unwrap();
        machine.swap_residual(id, taken).unwrap();
    }
    assert_eq!(state(&cluster, 0), before);
    let machine = cluster.worker_mut(Rank(0)).unwrap();
    machine.begin();
    assert_eq!(machine.pass_update(), Err(ImportError::StepOpen));
    assert!(machine.swap_residual(TensorId(0), Vec::new()).is_err());
}

#[test]
fn gradients_may_be_half_precision() {
    let spec = spec(
        algorithm(Feedback::Ef14, 1.0),
        1,
        vec![tensor("w", &[8, 8])],
    );
    let single: Vec<f32> = (0..64).map(|i| i as f32 / 4.0).collect();
    let halves: Vec<f16> = single.iter().map(|x| f16::from_f32(*x)).collect();
    let brains: Vec<bf16> = single.iter().map(|x| bf16::from_f32(*x)).collect();
    for gradient in [
        Gradient::F32(&single),
        Gradient::F16(&halves),
        Gradient::Bf16(&brains),
    ] {
        let mut cluster = cluster(&spec, 1);
        cluster.begin();
        cluster.push(Rank(0), TensorId(0), gradient).unwrap();
        cluster.finish().unwrap();
        assert_eq!(results(&cluster, 0)[0].values, single);
    }
}

#[test]
fn measurements_are_those_of_the_own_input() {
    let spec = spec(algorithm(Feedback::Ef14, 0.25), 2, model());
    let mut cluster = cluster(&spec, 2);
    let gradients = gradients(&spec, 2, 0);
    let stats = step(&mut cluster, &gradients)[0].unwrap().stats;
    let norm = |tensors: &[Vec<f32>]| {
        tensors
            .iter()
            .flatten()
            .map(|x| f64::from(*x).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    let left: Vec<Vec<f32>> = state(&cluster, 0)
        .arrays
        .into_iter()
        .map(|(_, values)| values)
        .collect();
    assert!((f64::from(stats.gradient_norm.unwrap()) / norm(&gradients[0]) - 1.0).abs() < 1e-5);
    assert!((f64::from(stats.residual_norm.unwrap()) / norm(&left) - 1.0).abs() < 1e-5);
    let sparse: Vec<Vec<f32>> = [0, 2, 3, 5, 7]
        .iter()
        .map(|id| gradients[0][*id].clone())
        .collect();
    let captured = 1.0 - (norm(&left) / norm(&sparse)).powi(2);
    assert!((f64::from(stats.captured_energy.unwrap()) - captured).abs() < 1e-4);
    assert!(
        stats.captured_energy.unwrap() > stats.density,
        "chosen rows hold more than their share"
    );
    let next = step(&mut cluster, &gradients)[0].unwrap().stats;
    assert_eq!(next.captured_energy, None);
    assert_eq!(next.residual_ratio(), None);
}

#[test]
fn reducers_in_threads_agree_with_the_cluster() {
    let spec = spec(algorithm(Feedback::Ef14, 0.3), 2, model());
    let mut cluster = cluster(&spec, 3);
    let reducers = MemoryCluster::reducers(spec.clone(), 3, &MemoryOptions::default()).unwrap();
    let threads: Vec<_> = reducers
        .into_iter()
        .map(|mut reducer| {
            let spec = spec.clone();
            std::thread::spawn(move || {
                let mut values = Vec::new();
                for number in 0..4 {
                    let gradients = gradients(&spec, 3, number);
                    reducer.begin().unwrap();
                    for (id, gradient) in gradients[reducer.rank().index()].iter().enumerate().rev()
                    {
                        reducer.push(TensorId(id as u32), gradient).unwrap();
                    }
                    assert!(!reducer.finish().unwrap().skipped);
                    values.clear();
                    reducer.for_each_result(&mut |result| values.push(bits(result.values)));
                }
                let state = reducer.export_state();
                Reducer::leave(Box::new(reducer));
                (values, state)
            })
        })
        .collect();
    (0..4).for_each(|number| drop(step(&mut cluster, &gradients(&spec, 3, number))));
    for (rank, thread) in (0..).zip(threads) {
        let (values, saved) = thread.join().unwrap();
        let expected: Vec<_> = results(&cluster, rank)
            .iter()
            .map(|got| bits(&got.values))
            .collect();
        assert_eq!(values, expected);
        assert_eq!(saved, state(&cluster, rank));
    }
    assert!(cluster.shard(ShardId(1)).is_running());
}
