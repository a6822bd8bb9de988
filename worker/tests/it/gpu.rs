//! The bodies of `device.rs`, and the golden vectors, on a GPU: `make gpu-check`. Here they only compile.
#![allow(unsafe_code, reason = "streams and events are named by numbers")]

use crate::support::{bodies, golden};
use arc_topk_worker::backend::device::nvidia::{NvidiaDriver, TrainerStream, on_gpu};

#[test]
#[ignore = "needs a GPU: make gpu-check"]
fn golden_vectors() {
    golden::check_all(&on_gpu(0));
}

#[test]
#[ignore = "needs a GPU: make gpu-check"]
fn the_same_steps_as_on_the_cpu() {
    bodies::the_same_steps_as_on_the_cpu(&on_gpu(0));
}

#[test]
#[ignore = "needs a GPU: make gpu-check"]
fn lent_device_memory_holds_the_results() {
    let mut memory = NvidiaDriver::open(0).unwrap();
    let trainer = TrainerStream::open(0).unwrap();
    bodies::lent_device_memory_holds_the_results(&on_gpu(0), &mut memory, |memory, event| {
        // SAFETY: the stream is the driver's of this GPU; the event is the backend's, which is there.
        unsafe { trainer.wait(memory.stream(), event) }.unwrap();
    });
}

#[test]
#[ignore = "needs a GPU: make gpu-check"]
fn state_moves_between_cpu_and_device() {
    bodies::state_moves_between_cpu_and_device(&on_gpu(0));
}

#[test]
#[ignore = "needs a GPU: make gpu-check"]
fn wide_and_tall_tensors_in_many_segments() {
    bodies::wide_and_tall_tensors_in_many_segments(&on_gpu(0));
}
