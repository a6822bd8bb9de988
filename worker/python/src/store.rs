//! The class `Store`: replicas in the shards' snapshot store.

use super::errors::ArcError;
use super::options::Peers;
use arc_topk_common::ids::{RunId, Step};
use arc_topk_common::wire::{Owner, SnapshotId};
use arc_topk_worker::store::{StoreClient, StoreConfig};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// The shards' snapshot store, for what all workers have alike.
#[pyclass(frozen, module = "arc_topk._native")]
pub(crate) struct Store {
    client: StoreClient,
}

fn failed(error: impl std::fmt::Display) -> PyErr {
    ArcError::new_err(error.to_string())
}

fn snapshot(run: &str, step: u64) -> PyResult<SnapshotId> {
    let mut bytes = [0; 16];
    let digits = |at: usize| run.get(2 * at..2 * at + 2);
    for (at, byte) in bytes.iter_mut().enumerate() {
        let parsed = digits(at).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        let malformed = || super::errors::config(format!("{run:?} is not the name of a run"));
        *byte = parsed.ok_or_else(malformed)?;
    }
    Ok(SnapshotId {
        step: Step(step),
        run: RunId(bytes),
    })
}

#[pymethods]
impl Store {
    /// At the shards that `peers`, a JSON object, names.
    #[new]
    fn new(py: Python<'_>, peers: &str) -> PyResult<Self> {
        let peers = Peers::parse(peers)?;
        let config = StoreConfig::new(&peers.shards, peers.identity()?);
        let client = py.detach(|| StoreClient::new(config)).map_err(failed)?;
        Ok(Self { client })
    }

    /// Stores the replica before `step` of `run`.
    fn put(&self, py: Python<'_>, run: &str, step: u64, replica: Vec<u8>) -> PyResult<()> {
        let id = snapshot(run, step)?;
        let stored = py.detach(|| self.client.upload_part(id, Owner::Replica, replica.into()));
        stored.map(|_| ()).map_err(failed)
    }

    /// The replica before `step` of `run`; waits until somebody has stored it.
    fn fetch<'py>(&self, py: Python<'py>, run: &str, step: u64) -> PyResult<Bound<'py, PyBytes>> {
        let id = snapshot(run, step)?;
        let replica = py
            .detach(|| self.client.fetch_replica(id))
            .map_err(failed)?;
        Ok(PyBytes::new(py, &replica))
    }
}
