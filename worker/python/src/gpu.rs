//! A worker's GPU: which gradients lie there, and the order between PyTorch's stream and the worker's own.
#![allow(
    unsafe_code,
    reason = "streams and device memory are named by numbers, which come from PyTorch"
)]

use super::tensor::Memory;
use arc_topk_worker::backend::DeviceGradient;
use arc_topk_worker::backend::device::nvidia::{NvidiaDriver, TrainerStream};
use pyo3::{PyResult, pyfunction};

/// Name of the GPU of this number; raises ConfigError, with cause and remedy, if it cannot be used.
#[pyfunction]
pub(crate) fn gpu_name(py: pyo3::Python<'_>, ordinal: usize) -> PyResult<String> {
    let driver = py.detach(|| NvidiaDriver::open(ordinal));
    let driver = driver.map_err(super::errors::config)?;
    Ok(driver.name().to_owned())
}

/// What happens on PyTorch's streams.
pub(crate) struct Gpu {
    trainer: TrainerStream,
}

impl Gpu {
    pub(crate) fn open(ordinal: usize) -> PyResult<Self> {
        let trainer = TrainerStream::open(ordinal).map_err(super::errors::config)?;
        Ok(Self { trainer })
    }

    /// A gradient that is there once PyTorch's `stream` has come so far.
    pub(crate) fn gradient(&mut self, memory: &Memory, stream: u64) -> PyResult<DeviceGradient> {
        // SAFETY: the Python half passes a stream of the device that the gradient is on, which is this one.
        let ready = unsafe { self.trainer.record(stream) }.map_err(super::errors::config)?;
        // SAFETY: the session holds the tensor until `give_back`, PyTorch's stream waits for the results before it goes on, and
        // the Python half leaves the gradient alone meanwhile.
        Ok(unsafe { memory.on_device(Some(ready)) })
    }

    /// What PyTorch's `stream` does from here on finds the results.
    pub(crate) fn wait(&self, stream: u64, event: u64) -> PyResult<()> {
        // SAFETY: as above; the event is the backend's, which lives as long as the session.
        unsafe { self.trainer.wait(stream, event) }.map_err(super::errors::config)
    }
}
