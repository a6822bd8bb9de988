//! The device backend on the kernels' emulator. `gpu.rs` runs the same bodies on a GPU.
#![allow(
    unsafe_code,
    reason = "lending is a promise about memory, which the tests keep"
)]

use crate::support::emulated::EmulatedDriver;
use crate::support::{algorithm, cluster, gradients, model, spec, tensor};
use crate::support::{bodies, emulated};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback};
use arc_topk_common::ids::{Rank, TensorId};
use arc_topk_kernels::Element;
use arc_topk_worker::backend::{DeviceGradient, Gradient};
use arc_topk_worker::memory::{MemoryCluster, MemoryError, MemoryOptions};

#[test]
fn the_same_steps_as_on_the_cpu() {
    bodies::the_same_steps_as_on_the_cpu(&emulated::backend(7));
}

#[test]
fn lent_device_memory_holds_the_results() {
    let mut memory = EmulatedDriver::new(0, usize::MAX);
    bodies::lent_device_memory_holds_the_results(&emulated::backend(11), &mut memory, |_, _| {
        panic!("the emulator has no events")
    });
}

#[test]
fn state_moves_between_cpu_and_device() {
    bodies::state_moves_between_cpu_and_device(&emulated::backend(5));
}

#[test]
fn wide_and_tall_tensors_in_many_segments() {
    bodies::wide_and_tall_tensors_in_many_segments(&emulated::backend(2));
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
        // Every other gradient is missing: a bucket may be opened by its end alone.
        let there = |id: TensorId| bytes % 16_000 == 0 || id.0.is_multiple_of(2);
        match job.step(|rank, id| there(id).then_some(&given[rank.index()][id.index()][..])) {
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
    let lent = unsafe { DeviceGradient::new(256, 320, Element::F32, None) };
    let error = job.push(Rank(0), TensorId(0), Gradient::OnDevice(&lent));
    let text = error.unwrap_err().to_string();
    assert!(text.contains("computes on the CPU"), "{text}");
}
