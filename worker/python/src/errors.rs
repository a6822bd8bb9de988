//! Exceptions. Every text names cause and remedy, as its Rust error does.

use arc_topk_common::wire::RefusalCode;
use arc_topk_worker::reducer::ReduceError;
use arc_topk_worker::session::ConnectError;
use pyo3::PyErr;
use pyo3::exceptions::{PyRuntimeError, PyValueError};

pyo3::create_exception!(
    arc_topk,
    ArcError,
    PyRuntimeError,
    "Something failed in arc_topk."
);
pyo3::create_exception!(
    arc_topk,
    ConfigError,
    PyValueError,
    "A setting, or a tensor, is not what it must be."
);
pyo3::create_exception!(
    arc_topk,
    ConnectionFailed,
    ArcError,
    "The job could not be joined, or the connection with it is lost."
);
pyo3::create_exception!(
    arc_topk,
    JobEnded,
    ArcError,
    "The shards ended the job, for the reason given."
);
pyo3::create_exception!(
    arc_topk,
    Superseded,
    ArcError,
    "The job went on without this worker, further than it can follow: join again, with another worker's state."
);

/// A session could not begin.
pub(crate) fn connecting(error: &ConnectError) -> PyErr {
    let text = error.to_string();
    match error {
        ConnectError::Plan(_) => ConfigError::new_err(text),
        ConnectError::Refused {
            code: RefusalCode::Superseded,
            ..
        } => Superseded::new_err(text),
        _ => ConnectionFailed::new_err(text),
    }
}

/// A step failed.
pub(crate) fn reducing(error: &ReduceError) -> PyErr {
    let text = error.to_string();
    match error {
        ReduceError::Superseded { .. } => Superseded::new_err(text),
        ReduceError::Refused { .. } | ReduceError::Ended { .. } => JobEnded::new_err(text),
        ReduceError::Disconnected { .. } | ReduceError::Stalled { .. } => {
            ConnectionFailed::new_err(text)
        }
        ReduceError::Step(_) | ReduceError::Import(_) | ReduceError::StartStep { .. } => {
            ConfigError::new_err(text)
        }
    }
}

/// A setting is wrong.
pub(crate) fn config(error: impl std::fmt::Display) -> PyErr {
    ConfigError::new_err(error.to_string())
}
