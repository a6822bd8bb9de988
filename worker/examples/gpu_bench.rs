//! Time of the kernels on a GPU, beside a device copy of as many bytes: `make gpu-check` runs it.
//!
//! A job in memory of one worker and one shard, whose gradients lie on the GPU. Kernels are timed by events around each launch,
//! over all steps but the first; bytes are counted as in worker/kernels/README.md.
#![allow(unsafe_code, reason = "device memory is lent by its address")]

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Feedback, ValueType};
use arc_topk_common::ids::{Rank, TensorId};
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};
use arc_topk_worker::backend::device::nvidia::{NvidiaDriver, TrainerStream, on_gpu};
use arc_topk_worker::backend::device::{DeviceSeconds, Driver, Element};
use arc_topk_worker::backend::{DeviceGradient, Gradient};
use arc_topk_worker::memory::{MemoryCluster, MemoryOptions};
use std::error::Error;

const STEPS: u32 = 20;
/// Rows and columns of a matrix of 25 MiB of f32, and how many of them.
const SHAPE: [u64; 2] = [3200, 2048];
const MATRICES: u64 = 8;

struct Case {
    name: &'static str,
    density: f32,
    wire: ValueType,
    element: Element,
}

/// Bytes that a value takes on the wire, scales included.
fn wire_bytes(wire: ValueType) -> f64 {
    match wire {
        ValueType::F32 => 4.0,
        ValueType::Bf16 | ValueType::F16 => 2.0,
        ValueType::Int8 => 1.0 + 2.0 / 64.0,
        ValueType::Int4 => 0.5 + 2.0 / 64.0,
    }
}

/// Bytes per element of the sketch pass, the gather and the commit, with ef14.
fn bytes(case: &Case) -> [f64; 3] {
    let (g, density) = (case.element.bytes() as f64, f64::from(case.density));
    let wire = density * wire_bytes(case.wire);
    [
        g + 4.0 + 16.0 / SHAPE[1] as f64,
        density * (g + 4.0) + wire,
        2.0 * (g + 4.0) + 2.0 * wire,
    ]
}

fn spec(case: &Case) -> PlanSpec {
    let algorithm = AlgorithmConfig {
        feedback: Feedback::Ef14,
        density: case.density,
        warmup_updates: 0,
        wire_up: case.wire,
        wire_down: case.wire,
        ..AlgorithmConfig::default()
    };
    let tensor = |index| TensorSpec {
        name: format!("matrix{index}"),
        shape: SHAPE.to_vec(),
        dtype: DType::F32,
        density: None,
    };
    PlanSpec {
        trainer: String::new(),
        algorithm,
        shards: 1,
        tensors: (0..MATRICES).map(tensor).collect(),
    }
}

/// Seconds of a step by kernel, and megabytes over the bus each way and of scratch memory.
fn measure(case: &Case) -> Result<(DeviceSeconds, [f64; 3]), Box<dyn Error>> {
    let options = MemoryOptions {
        backend: on_gpu(0),
        ..MemoryOptions::default()
    };
    let mut memory = NvidiaDriver::open(0)?;
    let trainer = TrainerStream::open(0)?;
    let mut job = MemoryCluster::new(spec(case), 1, &options)?;
    let elements = (SHAPE[0] * SHAPE[1]) as usize;
    let size = case.element.bytes();
    let noise: Vec<u8> = (0..elements * size)
        .map(|i| {
            if i % size == size - 1 {
                0x3c
            } else {
                (i * 131) as u8
            }
        })
        .collect();
    let mut gradients = Vec::new();
    for _ in 0..MATRICES {
        let address = memory.allocate(noise.len())?;
        gradients.push(address);
    }
    let (mut seconds, mut traffic) = (DeviceSeconds::default(), [0.0; 3]);
    for step in 0..=STEPS {
        for address in &gradients {
            memory.upload(*address, &noise)?;
        }
        memory.fetch(gradients[0], &mut [0])?;
        job.begin();
        for (id, address) in (0..).zip(&gradients) {
            // SAFETY: the memory stays until the job is dropped, and nothing else touches it during the step.
            let lent = unsafe { DeviceGradient::new(*address, elements, case.element, None) };
            job.push(Rank(0), TensorId(id), Gradient::OnDevice(&lent))?;
        }
        let outcome = job.finish()?[0].ok_or("the worker is lost")?;
        let worker = job.worker_mut(Rank(0)).ok_or("the worker is lost")?;
        if let Some(event) = worker.finished() {
            // SAFETY: the stream is `memory`'s, and the event is the backend's, which is there.
            unsafe { trainer.wait(memory.stream(), event) }?;
        }
        let device = outcome
            .stats
            .device
            .ok_or("the backend is not on a device")?;
        // The first step loads code; its commit is timed with the second, where it weighs little.
        if step > 0 {
            seconds += device.seconds;
            traffic =
                [device.bytes_in, device.bytes_out, device.scratch_bytes].map(|x| x as f64 / 1e6);
        }
    }
    let per_step = |seconds: f64| seconds / f64::from(STEPS);
    Ok((
        DeviceSeconds {
            sketch: per_step(seconds.sketch),
            gather: per_step(seconds.gather),
            commit: per_step(seconds.commit),
            energy: per_step(seconds.energy),
        },
        traffic,
    ))
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut gpu = NvidiaDriver::open(0)?;
    let elements = (SHAPE[0] * SHAPE[1] * MATRICES) as f64;
    println!(
        "{}, {MATRICES} matrices of {} x {}, feedback ef14, {STEPS} steps; share: of a device copy's rate with as many bytes\n",
        gpu.name(),
        SHAPE[0],
        SHAPE[1]
    );
    println!(
        "| gradient, density, wire | kernel | µs | GB/s | share | MB to / from the GPU, scratch |"
    );
    println!("|---|---|---|---|---|---|");
    let cases = [
        Case {
            name: "f32, 0.05, int4",
            density: 0.05,
            wire: ValueType::Int4,
            element: Element::F32,
        },
        Case {
            name: "f32, 0.2, int4",
            density: 0.2,
            wire: ValueType::Int4,
            element: Element::F32,
        },
        Case {
            name: "f32, 0.05, bf16",
            density: 0.05,
            wire: ValueType::Bf16,
            element: Element::F32,
        },
        Case {
            name: "bf16, 0.05, int4",
            density: 0.05,
            wire: ValueType::Int4,
            element: Element::Bf16,
        },
    ];
    for case in &cases {
        let (seconds, [to, from, scratch]) = measure(case)?;
        let kernels = [
            ("sketch", seconds.sketch),
            ("gather", seconds.gather),
            ("commit", seconds.commit),
        ];
        for ((kernel, seconds), per_element) in kernels.into_iter().zip(bytes(case)) {
            let moved = per_element * elements;
            // A copy of n bytes moves 2n.
            let copy = gpu.copy_seconds((moved / 2.0) as usize, STEPS)?;
            println!(
                "| {} | {kernel} | {:.1} | {:.0} | {:.2} | {to:.1} / {from:.1}, {scratch:.1} |",
                case.name,
                seconds * 1e6,
                moved / seconds / 1e9,
                copy / seconds
            );
        }
    }
    Ok(())
}
