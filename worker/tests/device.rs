//! Whole jobs with the device backend, on the kernels' emulator, beside the CPU backend: the same bits.
//!
//! Sketches alone are rounded in another order; they travel as f32 here and only choose rows.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(
    unsafe_code,
    reason = "lending is a promise about memory, which the tests keep"
)]

#[path = "support/emulated.rs"]
mod emulated;
mod support;

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, ProjectionKind, ValueType};
use arc_topk_common::ids::{Rank, TensorId};
use arc_topk_common::plan::PlanSpec;
use arc_topk_kernels::Element;
use arc_topk_worker::backend::{DeviceGradient, Gradient, MakeBackend};
use arc_topk_worker::memory::{MemoryCluster, MemoryError, MemoryOptions};
use half::bf16;
use support::{
    Gradients, algorithm, cluster, fingerprint, gradients, model, results, spec, state, step,
    tensor,
};

fn on(backend: MakeBackend, spec: &PlanSpec, workers: u16) -> MemoryCluster {
    let options = MemoryOptions {
        backend,
        ..MemoryOptions::default()
    };
    MemoryCluster::new(spec.clone(), workers, &options).unwrap()
}

fn rules() -> Vec<AlgorithmConfig> {
    let mut rules: Vec<AlgorithmConfig> = [
        Feedback::None,
        Feedback::Ef14,
        Feedback::Ef21,
        Feedback::Ef21m,
    ]
    .into_iter()
    .map(|feedback| algorithm(feedback, 0.3))
    .collect();
    for compressor in [Compressor::Randk, Compressor::Dense] {
        rules.push(AlgorithmConfig {
            compressor,
            ..algorithm(Feedback::Ef14, 0.3)
        });
    }
    // Rounded values both ways, a rounded warm-up, a residual that decays, and a last row that is filled up.
    rules.push(AlgorithmConfig {
        block_width: 9,
        wire_up: ValueType::Int4,
        wire_down: ValueType::Int8,
        wire_dense: ValueType::Bf16,
        wire_warmup: ValueType::F16,
        warmup_updates: 2,
        feedback_decay: 0.9,
        ..algorithm(Feedback::Ef14, 0.3)
    });
    rules.push(AlgorithmConfig {
        block_width: 9,
        wire_up: ValueType::Int4,
        ..algorithm(Feedback::Ef21m, 0.3)
    });
    rules.push(AlgorithmConfig {
        projection: ProjectionKind::Gaussian,
        sketch_rank: 3,
        ..algorithm(Feedback::Ef14, 0.2)
    });
    rules
}

/// Numbers that steps report, to f32's accuracy.
fn assert_near(what: &str, a: Option<f32>, b: Option<f32>) {
    match (a, b) {
        (Some(a), Some(b)) => assert!((a - b).abs() <= 1e-5 * b.abs(), "{what}: {a} and {b}"),
        _ => assert_eq!(a, b, "{what}"),
    }
}

#[test]
fn the_same_steps_as_on_the_cpu() {
    for (number, rule) in rules().into_iter().enumerate() {
        let spec = spec(rule.clone(), 2, model());
        let mut on_cpu = cluster(&spec, 2);
        let mut device = on(emulated::backend(number as u64), &spec, 2);
        for rank in 0..2 {
            for job in [&mut on_cpu, &mut device] {
                job.worker_mut(Rank(rank)).unwrap().set_measure_every(2);
            }
        }
        for number in 0..5 {
            let mut given = gradients(&spec, 2, number);
            if number == 2 {
                // All skip this one.
                given[1][0][0] = f32::NAN;
            }
            let (expected, got) = (step(&mut on_cpu, &given), step(&mut device, &given));
            for (expected, got) in expected
                .into_iter()
                .flatten()
                .zip(got.into_iter().flatten())
            {
                assert_eq!(got.skipped, number == 2);
                let (want, got) = (expected.stats, got.stats);
                assert_eq!((got.sent, got.received), (want.sent, want.received));
                assert_near("energy", got.captured_energy, want.captured_energy);
                assert_near("gradient", got.gradient_norm, want.gradient_norm);
                assert_near("residual", got.residual_norm, want.residual_norm);
            }
            assert!(
                fingerprint(&device, 2) == fingerprint(&on_cpu, 2),
                "step {number} of {rule:?}"
            );
        }
    }
}

/// What one worker of a job holds in device memory: bf16 gradients, which are replaced by results.
fn lent_step(job: &mut MemoryCluster, memory: &mut [Vec<Vec<bf16>>]) {
    job.begin();
    for (rank, own) in memory.iter_mut().enumerate() {
        for (id, values) in own.iter_mut().enumerate().rev() {
            let (address, rank) = (values.as_mut_ptr() as u64, Rank(rank as u16));
            // SAFETY: the emulator's device memory is the host's; it is looked at after `finished` alone.
            let lent = unsafe { DeviceGradient::new(address, values.len(), Element::Bf16, 0) };
            job.push(rank, TensorId(id as u32), Gradient::OnDevice(lent))
                .unwrap();
        }
    }
    let outcomes = job.finish().unwrap();
    assert!(outcomes.iter().flatten().all(|outcome| !outcome.skipped));
    for rank in 0..memory.len() as u16 {
        let worker = job.worker_mut(Rank(rank)).unwrap();
        assert_eq!(worker.finished(), None);
        worker.for_each_result(&mut |result| assert!(result.values.is_empty()));
    }
}

#[test]
fn lent_device_memory_holds_the_results() {
    for feedback in [Feedback::Ef14, Feedback::Ef21m] {
        let rule = AlgorithmConfig {
            warmup_updates: 1,
            ..algorithm(feedback, 0.3)
        };
        let spec = spec(rule, 2, model());
        let mut on_cpu = cluster(&spec, 2);
        let mut device = on(emulated::backend(11), &spec, 2);
        for number in 0..4 {
            let given: Vec<Vec<Vec<bf16>>> = gradients(&spec, 2, number)
                .iter()
                .map(|own| {
                    let rounded = own.iter();
                    rounded
                        .map(|values| values.iter().map(|x| bf16::from_f32(*x)).collect())
                        .collect()
                })
                .collect();
            let expected: Gradients = given
                .iter()
                .map(|own| {
                    let values = own.iter();
                    values
                        .map(|values| values.iter().map(|x| x.to_f32()).collect())
                        .collect()
                })
                .collect();
            step(&mut on_cpu, &expected);
            let mut memory = given;
            lent_step(&mut device, &mut memory);
            for rank in 0..2 {
                for (got, want) in memory[usize::from(rank)].iter().zip(results(&on_cpu, rank)) {
                    let want: Vec<bf16> = want.values.iter().map(|x| bf16::from_f32(*x)).collect();
                    assert!(*got == want, "step {number}, tensor {}", want.len());
                }
                assert!(state(&device, rank) == state(&on_cpu, rank));
            }
        }
    }
}

/// A worker without gradients, one that joins with saved state, and what was not counted of a tensor that travels whole.
#[test]
fn state_moves_between_cpu_and_device() {
    for rule in rules() {
        let spec = spec(rule, 1, model());
        let mut on_cpu = cluster(&spec, 1);
        for number in 0..3 {
            step(&mut on_cpu, &gradients(&spec, 1, number));
        }
        let saved = state(&on_cpu, 0);
        let start = MemoryOptions {
            backend: emulated::backend(5),
            start: saved.step,
            update: saved.update,
            ..MemoryOptions::default()
        };
        let mut device = MemoryCluster::new(spec.clone(), 1, &start).unwrap();
        let worker = device.worker_mut(Rank(0)).unwrap();
        worker.import_state(saved.clone()).unwrap();
        assert!(worker.export_state() == saved);
        // A step without any gradient: zeros.
        for job in [&mut on_cpu, &mut device] {
            job.step(|_, _| None).unwrap();
        }
        step(&mut on_cpu, &gradients(&spec, 1, 9));
        step(&mut device, &gradients(&spec, 1, 9));
        assert!(fingerprint(&device, 1) == fingerprint(&on_cpu, 1));
    }
}

#[test]
fn wide_and_tall_tensors_in_many_segments() {
    let tensors = vec![
        tensor("wide", &[7, 9001]),
        tensor("tall", &[3001, 5]),
        tensor("norm", &[5000]),
        tensor("square", &[130, 128]),
    ];
    let rule = AlgorithmConfig {
        bucket_bytes: 1 << 20,
        wire_up: ValueType::Int8,
        wire_down: ValueType::Bf16,
        ..algorithm(Feedback::Ef14, 0.1)
    };
    let spec = spec(rule, 3, tensors);
    let mut on_cpu = cluster(&spec, 2);
    let mut device = on(emulated::backend(2), &spec, 2);
    for number in 0..3 {
        let given = gradients(&spec, 2, number);
        step(&mut on_cpu, &given);
        step(&mut device, &given);
        assert!(
            fingerprint(&device, 2) == fingerprint(&on_cpu, 2),
            "{number}"
        );
    }
}

#[test]
fn what_a_device_cannot_do_is_told_before_the_job_starts() {
    let topk = AlgorithmConfig {
        compressor: Compressor::Topk,
        ..algorithm(Feedback::Ef14, 0.3)
    };
    let refused = |rule, backend| {
        let options = MemoryOptions {
            backend,
            ..MemoryOptions::default()
        };
        match MemoryCluster::new(spec(rule, 1, model()), 1, &options) {
            Err(MemoryError::Device(fault)) => fault.to_string(),
            other => panic!("{:?}", other.err()),
        }
    };
    let text = refused(topk, emulated::backend(0));
    assert!(text.contains("topk") && text.contains("take arc"), "{text}");
    let text = refused(
        algorithm(Feedback::Ef14, 0.3),
        emulated::with_memory(0, 4096),
    );
    assert!(
        text.contains("no ") && text.contains("bytes left"),
        "{text}"
    );
}

/// However little memory there is: an error before the job, or one of the step, and no panic.
#[test]
fn memory_that_ends_is_an_error_wherever_it_ends() {
    let spec = spec(algorithm(Feedback::Ef14, 0.3), 1, model());
    let given = gradients(&spec, 1, 0);
    let (mut at_start, mut in_step, mut enough) = (0, 0, 0);
    for bytes in (8_000..160_000).step_by(8_000) {
        let options = MemoryOptions {
            backend: emulated::with_memory(0, bytes),
            ..MemoryOptions::default()
        };
        let Ok(mut job) = MemoryCluster::new(spec.clone(), 1, &options) else {
            at_start += 1;
            continue;
        };
        match job.step(|rank, id| Some(&given[rank.index()][id.index()][..])) {
            Ok(_) if job.worker(Rank(0)).unwrap().check_device().is_ok() => enough += 1,
            Ok(_) => in_step += 1,
            Err(error) => {
                assert!(error.to_string().contains("bytes left"), "{error}");
                in_step += 1;
            }
        }
    }
    assert!(
        at_start > 0 && in_step > 0 && enough > 0,
        "{at_start} {in_step} {enough}"
    );
}

#[test]
fn a_gradient_on_a_gpu_is_refused_by_the_cpu() {
    let spec = spec(
        algorithm(Feedback::Ef14, 0.3),
        1,
        vec![tensor("w", &[40, 8])],
    );
    let mut job = cluster(&spec, 1);
    job.begin();
    // SAFETY: nobody reads it: that is what is tested.
    let lent = unsafe { DeviceGradient::new(256, 320, Element::F32, 0) };
    let error = job.push(Rank(0), TensorId(0), Gradient::OnDevice(lent));
    let text = error.unwrap_err().to_string();
    assert!(text.contains("computes on the CPU"), "{text}");
}
