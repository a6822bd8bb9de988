//! The native half of the Python package `arc_topk`: a worker's session on tensors that are given by address.
//!
//! | module | room for |
//! |---|---|
//! | `options` | what Python asks for, as JSON, and what is made of it |
//! | `session` | the class `Session`: a place in a job, and its steps |
//! | `store` | the class `Store`: replicas in the shards' snapshot store |
//! | `optim` | the function `catch_up_adamw`: the optimizer's step on PyTorch's own memory |
//! | `local` | the class `LocalShards`: the shards of a job on this machine |
//! | `tensor` | the one place where addresses become slices |
//! | `gpu` | the order between PyTorch's streams and the worker's own, where tensors are on a GPU |
//! | `errors` | Rust's errors as Python's exceptions |
//!
//! Everything that may take time lets go of the interpreter's lock. How PyTorch is met is the business of the Python half.

mod errors;
mod gpu;
mod local;
mod optim;
mod options;
mod session;
mod store;
mod tensor;

/// The extension module.
#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use super::errors::{ArcError, ConfigError, ConnectionFailed, JobEnded, Superseded};
    #[pymodule_export]
    use super::gpu::gpu_name;
    #[pymodule_export]
    use super::local::LocalShards;
    #[pymodule_export]
    use super::optim::catch_up_adamw;
    #[pymodule_export]
    use super::session::{Outcome, Session};
    #[pymodule_export]
    use super::store::Store;

    #[pymodule_init]
    fn init(module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        use pyo3::types::PyModuleMethods;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
