//! What goes wrong with GPUs, in words that name the remedy.

use crate::backend::DeviceFault;
use cudarc::driver::result::DriverError;
use cudarc::driver::sys::CUresult;
use std::sync::Arc;

/// Which GPU. A copy costs nothing: every call may need it for an error.
#[derive(Clone, Debug)]
pub(super) struct Gpu {
    ordinal: usize,
    name: Arc<str>,
}

impl Gpu {
    pub(super) fn new(ordinal: usize, name: &str) -> Self {
        Self {
            ordinal,
            name: Arc::from(name),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

impl core::fmt::Display for Gpu {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "GPU {} ({})", self.ordinal, self.name)
    }
}

pub(super) fn no_driver() -> DeviceFault {
    DeviceFault(
        "no CUDA driver: libcuda.so.1 was not found. Install NVIDIA's driver (580 or later); in a container, give it the GPU \
         (docker run --gpus all, or a resource limit of nvidia.com/gpu in Kubernetes); or compute on the CPU"
            .to_owned(),
    )
}

pub(super) fn old_driver(version: i32) -> DeviceFault {
    DeviceFault(format!(
        "NVIDIA's driver is of CUDA {}.{}, and the kernels need 13.0: update the driver to 580 or later, or compute on the CPU",
        version / 1000,
        version % 1000 / 10
    ))
}

pub(super) fn no_gpu(cause: &DriverError) -> DeviceFault {
    DeviceFault(format!(
        "no GPU can be used ({}): see whether nvidia-smi shows one, and what CUDA_VISIBLE_DEVICES is set to; or compute on the CPU",
        name_of(cause)
    ))
}

pub(super) fn no_such_gpu(ordinal: usize, count: i32) -> DeviceFault {
    DeviceFault(format!(
        "there is no GPU {ordinal}: {count} are visible, counted from 0 (see CUDA_VISIBLE_DEVICES); or compute on the CPU"
    ))
}

pub(super) fn old_gpu(gpu: &Gpu, (major, minor): (i32, i32)) -> DeviceFault {
    DeviceFault(format!(
        "{gpu} has compute capability {major}.{minor}, and the kernels need 8.0 (A100 and later): take another GPU, or compute \
         on the CPU"
    ))
}

pub(super) fn no_memory(gpu: &Gpu, bytes: usize, cause: &DriverError) -> DeviceFault {
    if cause.0 != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        return failed(gpu, "its memory", cause);
    }
    let mib = |bytes: usize| bytes.div_ceil(1 << 20);
    let free = cudarc::driver::result::mem_get_info();
    let free = free.map_or_else(
        |_| String::new(),
        |(free, all)| format!(", and {} of {} MiB are free", mib(free), mib(all)),
    );
    DeviceFault(format!(
        "{gpu} has no {} MiB of memory left{free}: feedback state takes as much as the model in float32 (three times with ef21m, \
         twice with ef21); use feedback ef14, a smaller model or batch, or fewer processes on this GPU",
        mib(bytes)
    ))
}

/// Anything else. The context is of no use after most of them.
pub(super) fn failed(gpu: &Gpu, what: &str, cause: &DriverError) -> DeviceFault {
    let remedy = match cause.0 {
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | CUresult::CUDA_ERROR_INVALID_PTX => "update the driver, or compute on the CPU",
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            "use a smaller model or batch, or fewer processes on this GPU"
        }
        _ => {
            "restart this worker, it takes up the job; if it happens again, see dmesg for Xid messages, and run `make gpu-check`"
        }
    };
    DeviceFault(format!(
        "{gpu}: {what} failed ({}): {remedy}",
        name_of(cause)
    ))
}

fn name_of(cause: &DriverError) -> String {
    let name = cause.error_name().ok();
    let text = name.map(|name| name.to_string_lossy().into_owned());
    text.unwrap_or_else(|| format!("{:?}", cause.0))
}
