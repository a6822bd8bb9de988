//! The built-in trainer: models on candle, data, the loop, checkpoints.
//!
//! [`run`] trains one worker with any [`Reducer`](crate::reducer::Reducer). Everything that decides the result comes from the settings, the
//! seed (the plan's) and the step number, so a run can be repeated, and resumed from a checkpoint, to the bit, with
//! any number of threads. [`Trainer`] is one worker's share without the loop, for programs with a loop of their own.

mod checkpoint;
pub mod data;
#[cfg(test)]
mod elastic_tests;
mod encoding;
mod feedback;
mod local;
pub mod model;
mod observer;
mod run;
mod schedule;
mod snapshot;
mod start;
#[cfg(test)]
mod tests;
mod trainer;

pub use checkpoint::{Arrays, Checkpoint, CheckpointError, CheckpointStore};
pub use local::LocalReducer;
pub use observer::{Observer, Quiet, Validation};
pub use run::{TrainConfig, agreed_settings, run, run_on};
pub use schedule::Schedule;
pub use snapshot::SnapshotStore;
pub use start::{ResumePoint, resume_point};
pub use trainer::{Push, Results, Trainer, optimizer_config, parameters, use_threads};

use crate::record::RecordError;
use crate::reducer::ReduceError;
use crate::store::StoreError;
use arc_topk_common::ids::Step;
use arc_topk_common::wire::SnapshotId;

/// Why training stopped.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Settings out of range.
    #[error(transparent)]
    Setting(#[from] arc_topk_common::config::SettingError),
    /// No usable data.
    #[error(transparent)]
    Data(#[from] data::DataError),
    /// The model cannot be made or run.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// The other workers or the shards.
    #[error(transparent)]
    Reduce(#[from] ReduceError),
    /// A checkpoint cannot be written or used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A snapshot cannot be had or used.
    #[error(transparent)]
    Snapshot(Box<SnapshotError>),
    /// Records cannot be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// This worker would start elsewhere than the job.
    #[error(
        "the job starts at {joined}, but rank {rank} would start at {here}, since {} checkpoint of that rank is used here: \
         start every worker with the same --checkpoint-dir and --resume, and with the --rank whose checkpoints it has",
        if *here == Step(0) { "no" } else { "a" }
    )]
    StartStep {
        /// Rank of this worker.
        rank: u16,
        /// Where the job starts.
        joined: Step,
        /// Where this worker would.
        here: Step,
    },
    /// The plan was made for another model.
    #[error(
        "the plan does not fit the model: {detail}; build the plan from train::parameters of the same settings"
    )]
    Plan {
        /// First difference.
        detail: String,
    },
}

impl TrainError {
    /// Whether the job goes on without this worker, which may join it again.
    #[must_use]
    pub fn may_join_again(&self) -> bool {
        match self {
            Self::Reduce(error) => matches!(error, ReduceError::Superseded { .. }),
            Self::Snapshot(error) => matches!(**error, SnapshotError::Late { .. }),
            _ => false,
        }
    }
}

impl From<SnapshotError> for TrainError {
    fn from(error: SnapshotError) -> Self {
        Self::Snapshot(Box::new(error))
    }
}

/// Why a run cannot go on from the shards' store.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The store cannot be reached, or does not have it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The replica that was stored for this worker is gone, or was never whole.
    #[error(
        "the replica that was put into the shards' store for this worker cannot be had: {source}"
    )]
    Late {
        /// Cause.
        source: StoreError,
    },
    /// There is no store to ask.
    #[error(
        "this worker joined a job that runs, but was given no store to take its state from; pass TrainConfig::store"
    )]
    NoStore,
    /// A part cannot be read.
    #[error("{what} is damaged: {detail}; go on from an older snapshot, or start without --resume")]
    Damaged {
        /// Which part.
        what: String,
        /// What is wrong.
        detail: String,
    },
    /// It was made by another model, optimizer or feedback rule.
    #[error("{what} does not fit this run: {detail}; use the settings that made it")]
    Mismatch {
        /// Which part.
        what: String,
        /// First difference.
        detail: String,
    },
    /// A new run would mix its snapshots with those of an earlier one.
    #[error(
        "the shards' store holds snapshots of an earlier run, the newest of {newest}: pass --resume on all workers to go on from it, \
         or empty the shards' --snapshot-dir and start them anew"
    )]
    InUse {
        /// The newest.
        newest: SnapshotId,
    },
}
