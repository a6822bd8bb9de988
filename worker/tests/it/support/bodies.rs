//! Whole jobs with the device backend beside the CPU backend, on whichever device: the same bits.
//!
//! Sketches alone are rounded in another order; they travel as f32 here and only choose rows.

#![allow(
    unsafe_code,
    reason = "lending is a promise about memory, which the tests keep"
)]

use crate::support::{
    algorithm, cluster, fingerprint, gradients, model, results, rules_and, spec, state, step,
    tensor,
};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, ProjectionKind, ValueType};
use arc_topk_common::ids::{Rank, TensorId};
use arc_topk_common::plan::PlanSpec;
use arc_topk_kernels::Element;
use arc_topk_worker::backend::device::Driver;
use arc_topk_worker::backend::{DeviceGradient, Gradient, MakeBackend};
use arc_topk_worker::memory::{MemoryCluster, MemoryOptions};
use half::{bf16, f16};

pub fn on(backend: &MakeBackend, spec: &PlanSpec, workers: u16) -> MemoryCluster {
    let options = MemoryOptions {
        backend: MakeBackend::clone(backend),
        ..MemoryOptions::default()
    };
    MemoryCluster::new(spec.clone(), workers, &options).unwrap()
}

fn rules() -> Vec<AlgorithmConfig> {
    let mut rules = rules_and(&[Compressor::Randk, Compressor::Dense]);
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

/// What one worker of a job holds in device memory, by tensor: gradients, which results replace.
struct Held {
    /// Of the memory, in which the elements begin some elements later, as those of a bucket do.
    memory: u64,
    address: u64,
    elements: usize,
    element: Element,
}

/// Elements before the first of a tensor: its memory is aligned to its elements alone.
fn shift(tensor: usize) -> usize {
    tensor % 4
}

/// Values as a tensor of a type holds them, and what they are then.
fn stored(values: &[f32], element: Element) -> (Vec<u8>, Vec<f32>) {
    match element {
        Element::F32 => (bytemuck::cast_slice(values).to_vec(), values.to_vec()),
        Element::Bf16 => {
            let narrow: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
            let wide = narrow.iter().map(|x| x.to_f32()).collect();
            (bytemuck::cast_slice(&narrow).to_vec(), wide)
        }
        Element::F16 => {
            let narrow: Vec<f16> = values.iter().map(|x| f16::from_f32(*x)).collect();
            let wide = narrow.iter().map(|x| x.to_f32()).collect();
            (bytemuck::cast_slice(&narrow).to_vec(), wide)
        }
    }
}

fn hold<D: Driver>(driver: &mut D, tensor: usize, bytes: &[u8], element: Element) -> Held {
    let before = shift(tensor) * element.bytes();
    let memory = driver.allocate(before + bytes.len()).unwrap();
    let address = memory + before as u64;
    driver.upload(address, bytes).unwrap();
    // Uploads of one driver are not ordered with another's launches.
    driver.fetch(address, &mut [0]).unwrap();
    Held {
        memory,
        address,
        elements: bytes.len() / element.bytes(),
        element,
    }
}

/// The bytes that lie there now; the memory is freed.
fn take<D: Driver>(driver: &mut D, tensor: usize, held: &Held) -> Vec<u8> {
    let mut bytes = vec![0; held.elements * held.element.bytes()];
    driver.fetch(held.address, &mut bytes).unwrap();
    let before = shift(tensor) * held.element.bytes();
    driver.free(held.memory, before + bytes.len());
    bytes
}

fn lent_step(job: &mut MemoryCluster, memory: &[Vec<Held>]) {
    job.begin();
    for (rank, own) in (0..).zip(memory) {
        for (id, held) in own.iter().enumerate().rev() {
            // SAFETY: the memory stays until the test has read the results.
            let lent =
                unsafe { DeviceGradient::new(held.address, held.elements, held.element, None) };
            job.push(Rank(rank), TensorId(id as u32), Gradient::OnDevice(&lent))
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
    for (feedback, element) in [
        (Feedback::Ef14, Element::Bf16),
        (Feedback::Ef14, Element::F32),
        (Feedback::Ef21m, Element::F16),
    ] {
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
                for (tensor, values) in own.iter_mut().enumerate() {
                    let (bytes, rounded) = stored(values, element);
                    *values = rounded;
                    held.push(hold(driver, tensor, &bytes, element));
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
                for (tensor, (held, want)) in memory.iter().zip(results(&on_cpu, rank)).enumerate()
                {
                    let (want, _) = stored(&want.values, element);
                    assert!(take(driver, tensor, held) == want, "step {number}");
                }
                assert!(state(&device, rank) == state(&on_cpu, rank));
            }
        }
    }
}

/// Saved state goes on on the device, and a step without any gradient.
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
