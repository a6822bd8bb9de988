//! Whole jobs with the device backend beside the CPU backend, on whichever device: the same bits.
//!
//! Sketches alone are rounded in another order; they travel as f32 here and only choose rows.
#![allow(
    dead_code,
    unreachable_pub,
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests; lending is a promise about memory, which they keep"
)]

use super::support::{
    algorithm, cluster, fingerprint, gradients, model, results, spec, state, step, tensor,
};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, ProjectionKind, ValueType};
use arc_topk_common::ids::{Rank, TensorId};
use arc_topk_common::plan::PlanSpec;
use arc_topk_kernels::Element;
use arc_topk_worker::backend::device::Driver;
use arc_topk_worker::backend::{DeviceGradient, Gradient, MakeBackend};
use arc_topk_worker::memory::{MemoryCluster, MemoryOptions};
use half::bf16;

pub fn on(backend: &MakeBackend, spec: &PlanSpec, workers: u16) -> MemoryCluster {
    let options = MemoryOptions {
        backend: MakeBackend::clone(backend),
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

/// Whole steps under every rule, a skipped one among them.
pub fn the_same_steps_as_on_the_cpu(make: &MakeBackend) {
    for rule in rules() {
        let spec = spec(rule.clone(), 2, model());
        let mut on_cpu = cluster(&spec, 2);
        let mut device = on(make, &spec, 2);
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

/// What one worker of a job holds in device memory, by tensor: bf16 gradients, which results replace.
struct Held {
    address: u64,
    elements: usize,
}

fn hold<D: Driver>(driver: &mut D, values: &[bf16]) -> Held {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let address = driver.allocate(bytes.len()).unwrap();
    driver.upload(address, bytes).unwrap();
    // Uploads of one driver are not ordered with another's launches.
    driver.fetch(address, &mut [0]).unwrap();
    Held {
        address,
        elements: values.len(),
    }
}

fn read<D: Driver>(driver: &mut D, held: &Held) -> Vec<bf16> {
    let mut values = vec![bf16::ZERO; held.elements];
    driver
        .fetch(held.address, bytemuck::cast_slice_mut(&mut values))
        .unwrap();
    values
}

fn lent_step(job: &mut MemoryCluster, memory: &[Vec<Held>]) {
    job.begin();
    for (rank, own) in (0..).zip(memory) {
        for (id, held) in own.iter().enumerate().rev() {
            // SAFETY: the memory stays until the test has read the results.
            let lent =
                unsafe { DeviceGradient::new(held.address, held.elements, Element::Bf16, 0) };
            job.push(Rank(rank), TensorId(id as u32), Gradient::OnDevice(lent))
                .unwrap();
        }
    }
    let outcomes = job.finish().unwrap();
    assert!(outcomes.iter().flatten().all(|outcome| !outcome.skipped));
}

/// Gradients that lie on the device; `driver` holds them, and `wait` sees that an event has happened.
pub fn lent_device_memory_holds_the_results<D: Driver>(
    make: &MakeBackend,
    driver: &mut D,
    wait: impl Fn(&mut D, u64),
) {
    for feedback in [Feedback::Ef14, Feedback::Ef21m] {
        let rule = AlgorithmConfig {
            warmup_updates: 1,
            ..algorithm(feedback, 0.3)
        };
        let spec = spec(rule, 2, model());
        let (mut on_cpu, mut device) = (cluster(&spec, 2), on(make, &spec, 2));
        for number in 0..4 {
            let mut given = gradients(&spec, 2, number);
            let mut memory: Vec<Vec<Held>> = Vec::new();
            for own in &mut given {
                let mut held = Vec::new();
                for values in own {
                    let rounded: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
                    *values = rounded.iter().map(|x| x.to_f32()).collect();
                    held.push(hold(driver, &rounded));
                }
                memory.push(held);
            }
            step(&mut on_cpu, &given);
            lent_step(&mut device, &memory);
            for (rank, memory) in (0..).zip(&memory) {
                let worker = device.worker_mut(Rank(rank)).unwrap();
                worker.for_each_result(&mut |result| assert!(result.values.is_empty()));
                if let Some(event) = worker.finished() {
                    wait(driver, event);
                }
                for (held, want) in memory.iter().zip(results(&on_cpu, rank)) {
                    let want: Vec<bf16> = want.values.iter().map(|x| bf16::from_f32(*x)).collect();
                    assert!(read(driver, held) == want, "step {number}");
                    driver.free(held.address, held.elements * 2);
                }
                assert!(state(&device, rank) == state(&on_cpu, rank));
            }
        }
    }
}

/// A worker without gradients, one that joins with saved state, and what was not counted of a tensor that travels whole.
pub fn state_moves_between_cpu_and_device(make: &MakeBackend) {
    for rule in rules() {
        let spec = spec(rule, 1, model());
        let mut on_cpu = cluster(&spec, 1);
        for number in 0..3 {
            step(&mut on_cpu, &gradients(&spec, 1, number));
        }
        let saved = state(&on_cpu, 0);
        let start = MemoryOptions {
            backend: MakeBackend::clone(make),
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

/// Rows that are cut into parts, short ones, and many segments.
pub fn wide_and_tall_tensors_in_many_segments(make: &MakeBackend) {
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
    let mut device = on(make, &spec, 2);
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
