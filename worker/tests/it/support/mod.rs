//! What the tests of whole steps share.

pub mod bodies;
pub mod emulated;
pub mod golden;
mod problem;
pub mod shard;

use arc_topk_common::ids::{Rank, TensorId};
use arc_topk_common::plan::PlanSpec;
use arc_topk_worker::memory::{MemoryCluster, MemoryOptions};
use arc_topk_worker::step::{RowsCame, StepOutcome, WorkerState};

pub use problem::*;

pub fn cluster(spec: &PlanSpec, workers: u16) -> MemoryCluster {
    MemoryCluster::new(spec.clone(), workers, &MemoryOptions::default()).unwrap()
}

/// One step with all gradients.
pub fn step(cluster: &mut MemoryCluster, gradients: &Gradients) -> Vec<Option<StepOutcome>> {
    cluster
        .step(|rank, tensor| Some(&gradients[rank.index()][tensor.index()][..]))
        .unwrap()
}

/// Result of one tensor, and its rows (`None`: all).
#[derive(Clone, PartialEq, Debug)]
pub struct Got {
    pub tensor: TensorId,
    pub values: Vec<f32>,
    pub rows: Option<Vec<u32>>,
}

/// A worker's results, by tensor; empty after a skipped step.
pub fn results(cluster: &MemoryCluster, rank: u16) -> Vec<Got> {
    let mut all = Vec::new();
    cluster
        .worker(Rank(rank))
        .unwrap()
        .for_each_result(&mut |result| {
            let rows = match result.rows {
                RowsCame::All => None,
                RowsCame::Rows(rows) => Some(rows.to_vec()),
            };
            all.push(Got {
                tensor: result.tensor,
                values: result.values.to_vec(),
                rows,
            });
        });
    all
}

pub fn state(cluster: &MemoryCluster, rank: u16) -> WorkerState {
    cluster.worker(Rank(rank)).unwrap().export_state()
}

/// An array of a worker's state.
pub fn array(cluster: &MemoryCluster, rank: u16, name: &str) -> Option<Vec<f32>> {
    state(cluster, rank)
        .arrays
        .into_iter()
        .find(|(n, _)| n == name)
        .map(|(_, values)| values)
}

/// Bits of every worker's results and states: what must not depend on anything but the contributions.
pub fn fingerprint(cluster: &MemoryCluster, workers: u16) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    for rank in (0..workers).filter(|rank| cluster.worker(Rank(*rank)).is_some()) {
        for got in results(cluster, rank) {
            all.push(bits(&got.values));
            all.push(got.rows.unwrap_or_else(|| vec![u32::MAX]));
        }
        all.extend(
            state(cluster, rank)
                .arrays
                .iter()
                .map(|(_, values)| bits(values)),
        );
    }
    all
}
